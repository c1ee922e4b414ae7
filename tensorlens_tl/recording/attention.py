"""Freeze the attention of a block from what was read of it, and check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..maps import DeltaRule, Norm
from ..sublayers import Attention
from .self_check import Rounding

if TYPE_CHECKING:
    from .recorder import Recorder

Added = tuple[Tensor, Callable[[], Tensor], Rounding]
"""What a branch adds to the residual: projected [batch, pos], and whole when it is called; and what
rounding may have made of it."""


def normed(norm: Norm | None, x: Tensor) -> Tensor:
    """What a sublayer reads of the residual: the residual after its norm, if it has one."""
    return x if norm is None else norm.apply(x) + norm.bias


def freeze_attention(
    recorder: Recorder,
    layer: int,
    norm: Norm | None,
    post: Norm | None,
    x: Tensor,
) -> tuple[Attention, Added]:
    """Freeze the attention of a block.

    Args:
        recorder: The recorder of the run.
        layer: Number of the block.
        norm: The frozen norm before attention, or None.
        post: The frozen norm after attention, or None.
        x: The residual that attention reads [batch, pos, d_model].

    Returns:
        The sublayer, and what it adds to the residual.
    """
    check = recorder.check
    name = f"L{layer} attention{recorder.reading.note}"
    reader = recorder.adapter.attention[layer]
    attn, v, z = reader.freeze(layer, recorder.frame, recorder.reading, recorder.pop)
    w, mix, gate = attn.weights, attn.mix, attn.output_gate

    def predict_v() -> Tensor:
        values = attn.values
        return values.apply(normed(norm, x)) + values.bias

    def predict_z() -> Tensor:
        return mix.apply(v) if gate is None else gate.apply(mix.apply(v))

    v_edit = recorder.edit(layer, ("v",), v, predict_v)
    z_edit = recorder.edit(layer, ("z",), z, predict_z)
    if v_edit or z_edit:
        attn = replace(attn, v_edit=v_edit, z_edit=z_edit)

    def out() -> Tensor:
        return normed(post, attn.output.apply(z) + attn.output.bias)

    if attn.edits:
        return attn, (check.project(out()), out, float)
    values, mixing = f"{name} values (W_V, b_V)", f"{name} mixing (pattern · values)"
    if isinstance(mix, DeltaRule) or not reader.plain:
        check.whole(values, v, predict_v())
        check.whole(mixing, z, predict_z())
        return attn, (check.output(w.W_O.flatten(0, 1), w.b_O, post, z), out, float)
    check.check_later(values, v, predict_v)
    check.check_later(mixing, z, predict_z)
    added, rounding = check.attention(norm, x, mix, w, post)
    return attn, (added, out, rounding)
