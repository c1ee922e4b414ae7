"""The first part of a model that no sublayer here computes, and what a block adds by itself.

Found by looking at the model's own modules and configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .errors import UnsupportedArchitectureError, refusal

_PARTS = (
    ("a state space or other recurrence", r"mamba|rwkv|recurrent|rglru|deltanet|shortconv",
     {"A_log", "time_decay"}),
    ("several residual streams", r"hyperconnection", set()),
    ("a mixture of attention heads", r"moa$", set()),
    ("attention to what an indexer chooses", r"indexer$", {"indexer"}),
    ("a gate on what attention gives", r"", {"g_proj"}),
    ("a norm before W_O or W_out", r"", {"attn_sub_norm", "ffn_sub_norm"}),
    ("a mixture of experts", r"(moe|moeblock|moelayer|experts|sparsemlp)$", {"experts"}),
    ("latent attention", r"", {"kv_a_proj_with_mqa", "kv_b_proj"}),
    ("attention to an encoder", r"", {"crossattention", "encoder_attn"}),
)  # fmt: skip
"""What may be in the way in a block: how classes end that do it, and what such modules own."""


def obstacle(model: Any) -> str:
    """Find the first part of a model of an untested architecture that is in the way.

    Args:
        model: A Hugging Face model, also one inside a Bridge.

    Returns:
        The part, as a noun phrase.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder and a decoder, with attention between them"
    if getattr(config, "H_cycles", 0):
        return "stacks of blocks that run several times (H_cycles and L_cycles)"
    for _, module in model.named_modules():
        if (kind := type(module).__name__).endswith("PositionalConvEmbedding"):
            return f"a convolution over positions before block 0: {kind}"
    blocks, where = _blocks(model)
    for number, block in enumerate(blocks):
        for part in _parts(block, number):
            return part
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    if outputs is None and not hasattr(model, "lm_head"):
        return "no unembedding, so its output is no logits of tokens"
    kind = type(blocks[0]).__name__ if blocks else type(model).__name__
    return f"blocks{where} that no test covers: {kind}"


def _blocks(model: Any) -> tuple[list[Any], str]:
    """The model's longest list of modules of a class of their own, and its name for messages."""
    found: list[Any] = []
    where = ""
    for name, module in model.named_modules():
        if type(module).__name__ == "ModuleList" and len(module) > len(found):
            found, where = list(module), f" in {name}"
    return [getattr(block, "original_component", block) for block in found], where


def _parts(block: Any, number: int) -> Iterator[str]:
    """What is known to be in the way inside a block, in the order of ``_PARTS``."""
    for what, pattern, parts in _PARTS:
        for name, module in block.named_modules():
            kind, own = type(module).__name__, {*module._modules, *module._parameters}
            if "Bridge" in kind or "Norm" in kind:  # what a Bridge holds comes next
                continue
            gated = "g_proj" in parts and "Attention" in kind and "gate_proj" in own
            if (name and pattern and re.search(pattern, kind.lower())) or own & parts or gated:
                yield f"{what} in block {number}: {kind}"


def refuse_extras(block: Any) -> None:
    """Refuse what a block adds to or makes of the residual beside attention and MLP.

    Args:
        block: The host's block.

    Raises:
        UnsupportedArchitectureError: If there is such a part; the message names it.
    """
    part = block.original_component
    for what, why, name in (
        ("per-layer inputs", "each multiplies a gate of the residual", "per_layer_input_gate"),
        ("experts beside an MLP", "both go through one more norm", "router"),
    ):
        if getattr(part, name, None) is not None:
            raise UnsupportedArchitectureError(refusal(f"{what}{in_block(part)}", why))


def in_block(part: Any) -> str:
    """Such as " in block 3", of a module of Hugging Face that knows its block; else ""."""
    layer = getattr(part, "layer_idx", None)
    return "" if layer is None else f" in block {layer}"


def adapter_at(model: Any) -> str:
    """Name of the first module of a model that holds a LoRA adapter or the like; "" for none."""
    return next((name for name, module in model.named_modules() if is_adapted(module)), "")


def is_adapted(module: Any) -> bool:
    """Whether a module wraps a linear layer and adds to it, as the layers of peft do."""
    return "base_layer" in getattr(module, "_modules", {})


def merge_first(where: str) -> str:
    """Word the refusal of an adapter that is still beside its weights.

    Args:
        where: Name of the module that holds the adapter.

    Returns:
        The message, in two sentences.
    """
    return (
        f"There is a LoRA adapter at {where}, beside the weights that are read. "
        "Merge it first: model = model.merge_and_unload()."
    )
