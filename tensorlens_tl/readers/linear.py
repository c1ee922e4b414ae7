"""Linear modules of a Bridge, however the model inside lays their weights out.

Also what is made of them: a gated MLP from one matrix, and a head before an unembedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..maps import NormWeights
from ..refusals import (
    UnsupportedArchitectureError,
    act_name,
    is_adapted,
    merge_first,
    refusal,
)
from ..sublayers import GatedMLPWeights, HeadWeights
from .hook_points import norm_eps


def inner(module: Any) -> Any:
    """The module inside a component of a Bridge, or the module itself."""
    return getattr(module, "original_component", module)


def linear_weights(bridge: Any) -> tuple[Tensor, Tensor | None]:
    """A Bridge's linear module as x @ W + b."""
    # The orientation is told by the module's type, never by the shape: square weights have both.
    module = inner(bridge)
    if is_adapted(module):
        at = bridge.hook_in.name.removesuffix(".hook_in") if module is not bridge else "an expert"
        raise UnsupportedArchitectureError(merge_first(at))
    if isinstance(module, nn.Linear):
        return module.weight.T, module.bias
    if type(module).__name__ == "Conv1D":
        return module.weight, module.bias
    raise UnsupportedArchitectureError(
        refusal(f"the linear module {type(module).__name__}", "its orientation is not known here")
    )


def norm_before(part: Any, name: str) -> NormWeights | None:
    """The RMSNorm that a module has before its output matrix, as BitNet's modules have.

    Args:
        part: The module, or the Bridge around it.
        name: Name of the norm in it.

    Returns:
        The norm, or None.
    """
    norm = getattr(inner(part), name, None)
    if norm is None:
        return None
    return NormWeights(norm.weight, None, center=False, eps=norm_eps(norm))


def layer_scalar(block: Any) -> NormWeights | None:
    """The number by which a block of a Bridge multiplies what leaves it, as Gemma-4's do."""
    scalar = inner(block)._buffers.get("layer_scalar")
    if scalar is None or (factor := float(scalar)) == 1:
        return None
    if factor == 0:
        raise UnsupportedArchitectureError(refusal("layer_scalar=0", "nothing passes the block"))
    return NormWeights(None, None, center=False, factor=factor)


def gated_mlp(mlp: Any, parts: Iterable[Any], act: str) -> GatedMLPWeights:
    """A gated MLP from three linear modules.

    Args:
        mlp: The module that holds them, and maybe a norm before the last, as BitNet's does.
        parts: The modules that give W_gate, W_in and W_out.
        act: The activation's name in this library.

    Returns:
        The weights, as views.
    """
    gate, into, out = map(linear_weights, parts)
    return GatedMLPWeights(*gate, *into, None, *out, act, norm_before(mlp, "ffn_sub_norm"))


def joined_mlp(
    W: Tensor, b: Tensor | None, W_out: Tensor, b_out: Tensor | None, act: str
) -> GatedMLPWeights:
    """A gated MLP from one matrix, in which what is activated stands before what is not.

    Args:
        W: Both matrices [d_model, 2 · d_mlp].
        b: Both biases [2 · d_mlp], or None.
        W_out: The matrix after the product [d_mlp, d_model].
        b_out: The bias after it [d_model], or None.
        act: The activation's name in this library.

    Returns:
        The weights, as views.
    """
    (W_gate, W_in), (b_gate, b_in) = W.chunk(2, -1), (None, None) if b is None else b.chunk(2)
    return GatedMLPWeights(W_gate, b_gate, W_in, b_in, None, W_out, b_out, act)


def head_weights(head: Any, activation: Callable[[str], str]) -> HeadWeights:
    """The weights of a head norm(act(y W + b)), which stands before an unembedding.

    Args:
        head: Hugging Face's module, with ``dense``, ``act`` and ``norm``.
        activation: Gives this library's name of an activation.

    Returns:
        The weights in the canonical layout.
    """
    norm = NormWeights(head.norm.weight, head.norm.bias, center=True, eps=norm_eps(head.norm))
    return HeadWeights(*linear_weights(head.dense), activation(act_name(head.act)), norm)
