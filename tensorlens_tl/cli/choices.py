"""Names that options take, so that a wrong one is refused before torch is imported.

The rooms that own these lists import torch. A test compares every list with its room's.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..checks import nearest

BY = (
    "token",
    "constant",
    "layer",
    "component",
    "head",
    "expert",
    "neuron",
    "dimension",
    "edge",
    "order",
)
TOTALS = ("layer", "component", "head", "mlp", "expert", "neuron")
KINDS = ("bridge", "hooked")
DTYPES = ("float64", "float32", "bfloat16", "float16")
METHODS = (
    "norm",
    "in",
    "out",
    "in_out",
    "mean_attention",
    "last_layer_attention",
    "rollout",
    "attention_flow",
    "norm_attention",
    "norm_attention_resln",
    "globenc",
    "alti",
    "value_zeroing",
    "grad_x_input",
    "integrated_gradients",
    "chefer",
    "attnlrp",
    "decompx",
    "random",
)
PROTOCOLS = (
    "perturbation",
    "morf_lerf",
    "insertion_deletion",
    "eraser",
    "naopc",
    "leave_one_out",
)
MASKINGS = ("delete", "token", "mean")
PRESETS = ("tensorlens", "chefer", "eraser", "full")
METRICS = ("probability", "log_odds", "logit", "logit_diff", "agreement")
SELECTIONS = ("greedy", "absolute", "signed", "influence")
AT = ("clean", "corrupted", "secant")
ABLATIONS = ("resample", "mean", "zero")
ATTENTION = ("live", "frozen")
TASKS = ("ioi", "induction", "facts", "agreement", "greater_than")


def remedy(name: str, known: Sequence[str]) -> str:
    """Say what to type in place of a name that does not exist.

    Args:
        name: The name as typed.
        known: The names that exist.

    Returns:
        "Did you mean …?", or the list where none is near.
    """
    close = nearest(name, known)
    return f"Did you mean {close}?" if close else f"Use one of {', '.join(known)}."
