"""Compose one run into the operator T, apply it, take it apart, and tell what that costs.

Key concepts:
    Capture: What one run left (frozen sublayers, residual states, logits), without the model.
    FrozenTransformer: The operator T and its bias, from X to the final normalized residual y.
    SecantOperator: The operator between two runs, exact on their difference.
"""

from .batched_sweep import BatchedSweep
from .blocks import PLANNED
from .capture import Capture, CaptureMismatchError, Convention, FrozenBlock, tolerance
from .frozen_transformer import FrozenTransformer, Segment
from .normal_forms import Reduction, dots, squares
from .prompts import EMPTY, ClassNames, Prompts, check_tokens, patch_names, token_id
from .query_key import QueryKey, turned
from .residual_stream import Branch, NormSecant, Readers, Step, Trace
from .restricted_transformer import RestrictedTransformer
from .secant import SecantOperator, act_secant, cap_secant, gated_secants, softmax_secant

__all__ = [
    "BatchedSweep",
    "Branch",
    "Capture",
    "CaptureMismatchError",
    "ClassNames",
    "Convention",
    "EMPTY",
    "FrozenBlock",
    "FrozenTransformer",
    "NormSecant",
    "PLANNED",
    "Prompts",
    "QueryKey",
    "Readers",
    "Reduction",
    "RestrictedTransformer",
    "SecantOperator",
    "Segment",
    "act_secant",
    "cap_secant",
    "Step",
    "Trace",
    "check_tokens",
    "dots",
    "gated_secants",
    "patch_names",
    "softmax_secant",
    "squares",
    "token_id",
    "tolerance",
    "turned",
]
