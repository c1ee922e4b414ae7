"""Freeze the MLP of a block, or a mixture of experts and the MLP beside it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..maps import Norm, Shift
from ..sublayers import MLP, ExpertsWeights, FeedForward, GatedMLP, GatedMLPWeights, MLPWeights
from .attention import Added, normed
from .experts import checked_hidden, experts_output, experts_read, frozen_experts

if TYPE_CHECKING:
    from .recorder import Recorder


def freeze_mlps(
    recorder: Recorder, layer: int, norm: Norm | None, post_norm: Norm | None, x: Tensor
) -> tuple[FeedForward, GatedMLP | None, Added]:
    """Freeze the MLP of a block, or its experts and the MLP beside them.

    Args:
        recorder: Recorder of the run.
        layer: Number of the block.
        norm: The frozen norm before the MLP, or None.
        post_norm: The frozen norm after the MLP, or None.
        x: The residual that the MLP reads [batch, pos, d_model].

    Returns:
        The sublayer, the shared expert or None, and what they add to the residual.
    """
    weights = recorder.adapter.weights.blocks[layer]
    w, shared = weights.mlp, weights.shared
    if isinstance(w, ExpertsWeights):
        read, gate = experts_read(recorder.experts, layer), recorder.convention.gate
        mlp = frozen_experts(recorder.frame, layer, w, read, gate)
        seen = checked_hidden(recorder.check, mlp, read, norm, x)
        added = experts_output(recorder.check, mlp, post_norm, seen)
        own = (
            added,
            lambda: normed(post_norm, mlp.output.apply(mlp.weighted(seen)) + mlp.output.bias),
            float,
        )
    else:
        dense = cast(MLPWeights | GatedMLPWeights, w)  # a block without an MLP does not come here
        mlp, own = _freeze_mlp(recorder, layer, dense, norm, post_norm, x)
    if shared is None:
        return mlp, None, own
    if post_norm is not None:  # its b is added once
        post_norm = replace(post_norm, weights=replace(post_norm.weights, b=None))
    beside, (added, out, _) = _freeze_mlp(recorder, layer, shared, norm, post_norm, x, "shared.")
    return mlp, beside, (own[0] + added, lambda: own[1]() + out(), float)


def _freeze_mlp(
    recorder: Recorder,
    layer: int,
    w: MLPWeights | GatedMLPWeights,
    norm: Norm | None,
    post_norm: Norm | None,
    x: Tensor,
    part: str = "",
) -> tuple[Any, Added]:
    """Freeze the MLP of a block.

    The activation is one function for all positions, so it is compared at a sample of them.
    Gating ratios are left to whoever asks for them first.

    Args:
        recorder: Recorder of the run.
        layer: Number of the block.
        w: MLP weights of the block.
        norm: The frozen norm before the MLP, or None.
        post_norm: The frozen norm after the MLP, or None.
        x: The residual that the MLP reads [batch, pos, d_model].
        part: "shared." for the MLP beside a mixture's experts.

    Returns:
        The sublayer, and what it adds to the residual.
    """
    name, frame = f"L{layer} {part.replace('.', ' ')}MLP", recorder.frame
    linear = partial(_linear, recorder, layer, norm, x)
    joined = (layer, f"{part}pre_and_up") in recorder.reads.tensors
    if joined:
        pre, up = recorder.pop(layer, f"{part}pre_and_up").chunk(2, -1)
    else:
        pre, up = recorder.pop(layer, f"{part}pre"), None
    seen = recorder.pop(layer, f"{part}post")
    into, factor = f"{name} input (W_in, b_in)", None
    if isinstance(w, GatedMLPWeights):
        up = recorder.pop(layer, f"{part}pre_linear") if up is None else up
        if (layer, f"{part}gate") in recorder.reads.tensors:
            factor = recorder.pop(layer, f"{part}gate").sigmoid()
            seen = seen * factor
        label = f"{name} gating (activation · up)"
        gate = linear("pre", f"{name} gate (W_gate, b_gate)", pre, w.W_gate, w.b_gate)
        edits = {
            "pre_edit": gate,
            "pre_linear_edit": linear("pre_linear", into, up, w.W_in, w.b_in),
        }
        mlp: MLP | GatedMLP = GatedMLP(frame, layer, w, pre, up, recorder.convention.gate)
        if part:
            mlp = replace(mlp, shared=True, factor=factor)
        elif w.ln is not None:  # no hook shows its scale
            mlp = replace(mlp, ln_scale=w.ln.scale_at(mlp.posts))
    else:
        edits = {"pre_edit": linear("pre", into, pre, w.W_in, w.b_in)}
        ln = recorder.norm(layer, "mlp.ln", w.ln)
        label = f"{name} activation" + ("" if ln is None else " and norm")
        mlp = MLP(frame, layer, w, pre, ln_scale=None if ln is None else ln.scale)

    def out() -> Tensor:
        return normed(post_norm, mlp.output.apply(seen) + mlp.output.bias)

    # The sublayer without its edits predicts what W_out read from the run's pre-activations.
    post_edit = recorder.edit(layer, ("post",), seen, lambda: mlp.posts)
    if post_edit is None:
        recorder.check.activation(label, seen, lambda rows: mlp.at(rows).posts)
    added = recorder.check.output(w.W_out, w.b_out, post_norm, seen)
    if post_edit is not None or any(edits.values()):
        mlp = replace(mlp, **edits, post_edit=post_edit)
    return mlp, (added, out, float)


def _linear(
    recorder: Recorder,
    layer: int,
    norm: Norm | None,
    x: Tensor,
    stage: str,
    name: str,
    seen: Tensor,
    W: Tensor,
    b: Tensor | None,
) -> Shift | None:
    """Check pre-activations N(x) W + b, or keep the user's edit of them."""

    def predict() -> Tensor:
        z = normed(norm, x) @ recorder.frame.cast(W)
        return z if b is None else z + recorder.frame.cast(b)

    edit = recorder.edit(layer, (stage,), seen, predict)
    if edit is None:
        recorder.check.linear(name, norm, x, seen, W, b)
    return edit
