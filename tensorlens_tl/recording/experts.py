"""Freeze a mixture of experts from what its experts did in the run, and check it.

As for an MLP, every product is compared under a random projection: those before the activation per
slot, and the sum of what the slots add. So a wrong, swapped or transposed expert that a token of
the run reached is an error of the capture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..maps import Frame, Norm
from ..readers import ExpertsRead
from ..sublayers import Experts, ExpertsWeights
from .self_check import SelfCheck, affine


def experts_read(reads: Mapping[int, ExpertsRead], layer: int) -> ExpertsRead:
    """Look up what the experts of a block did.

    Args:
        reads: What was read so far, by block.
        layer: Number of the block.

    Returns:
        What its experts did in the run.

    Raises:
        ValueError: If they never ran.
    """
    if (read := reads.get(layer)) is None:
        raise ValueError(
            f"Block {layer} ran without exposing its experts (the host ran something else than its "
            "blocks). Run the whole model, with no module replaced."
        )
    return read


def frozen_experts(
    frame: Frame, layer: int, w: ExpertsWeights, read: ExpertsRead, gate: str
) -> Experts:
    """Freeze the experts of a block at the routing of the run.

    Args:
        frame: Layout of the batch.
        layer: Number of the block.
        w: Weights of the experts.
        read: What the experts did.
        gate: How gated MLPs are made linear.

    Returns:
        The frozen sublayer, which is not yet checked.
    """
    # Padding is sent to no expert, so nothing of it is kept.
    experts = _by_prompt(frame, read.experts)
    experts = torch.where(frame.real[..., None], experts, -1) if _padded(frame) else experts
    share, pre, up = (kept(frame, part) for part in (read.share, read.pre, read.pre_linear))
    return Experts(frame, layer, w, experts, share, pre, up, len(w.W_out), gate)


def kept(frame: Frame, read: Tensor) -> Tensor:
    """What was read of all tokens, by prompt, in the compute dtype, and 0 in padding."""
    by_prompt = _by_prompt(frame, frame.cast(read))
    if not _padded(frame):
        return by_prompt
    real = frame.real
    return torch.where(real.reshape(*real.shape, *[1] * (by_prompt.ndim - 2)), by_prompt, 0)


def _padded(frame: Frame) -> bool:
    return any(span != (0, frame.n_pos) for span in frame.spans)


def _by_prompt(frame: Frame, read: Tensor) -> Tensor:
    return read.unflatten(0, (frame.batch, frame.n_pos))


# --- The check -----------------------------------------------------------------------------------


@torch.no_grad()
def checked_hidden(
    check: SelfCheck, mlp: Experts, read: ExpertsRead, norm: Norm | None, x: Tensor
) -> Tensor:
    """Compare what happened before the output matrices with what the sublayer predicts.

    Args:
        check: The check of the run.
        mlp: The frozen experts.
        read: What the experts did.
        norm: The frozen norm before them, or None.
        x: The residual that it reads [batch, pos, d_model].

    Returns:
        What the output matrices read in the run, without routing weights
        [batch, pos, slot, d_mlp].
    """
    name = f"L{mlp.layer} experts"
    _check_input(check, f"{name} gate (W_gate, b_gate)", mlp, "gate", mlp.pre, norm, x)
    _check_input(check, f"{name} input (W_in, b_in)", mlp, "in", mlp.pre_linear, norm, x)
    post = kept(mlp.frame, read.post)
    label = f"{name} gating (activation · up)"
    check.activation(label, post.flatten(2), lambda at: mlp.at(at).unweighted.flatten(2))
    return post


@torch.no_grad()
def _check_input(
    check: SelfCheck,
    name: str,
    mlp: Experts,
    side: str,
    seen: Tensor,
    norm: Norm | None,
    x: Tensor,
) -> None:
    """Compare the pre-activations of every slot with N(x) W_e + b_e of its expert."""
    W, b = getattr(mlp.weights, f"W_{side}"), getattr(mlp.weights, f"b_{side}")
    before, r, cast = affine(norm), check.probe(seen.shape[-1]), mlp.frame.cast

    def through_all() -> Tensor:
        return torch.stack([cast(M) @ r for M in W], -1)  # [d_model, expert]

    def compute() -> tuple:
        start, c = check.through(before, through_all())
        zeros = start.new_zeros(len(W))
        bias = zeros if b is None else torch.stack([cast(one) @ r for one in b])
        # A normalized row has length √d: the size of the terms, that may cancel.
        return start, c + zeros, bias, 0.01 * math.sqrt(len(start)) * start.norm(dim=0)

    parts = (*_each(W), *_each(b), before)
    start, c, bias, terms = check.cached_product("experts", parts, compute)
    slots, at = mlp.experts >= 0, mlp.experts.clamp_min(0)
    whole = (x @ start if norm is None else x @ start / norm.scale) + c  # [batch, pos, expert]
    predicted = whole.gather(-1, at)
    predicted = predicted * mlp.share if mlp.weights.scales_input else predicted
    found = seen @ r - bias[at]
    size = torch.where(slots, found, 0).square().mean().sqrt() + terms[at]
    off = torch.where(slots, (found - predicted).abs() / size, 0).amax(-1)

    def rounding() -> Tensor | float:
        units = check.of_the_mean(norm, x, through_all())
        if not isinstance(units, Tensor):
            return units
        return torch.where(slots, units.gather(-1, at) / size, 0).amax(-1)

    check.note(name, off, torch.ones_like(off), rounding)


@torch.no_grad()
def experts_output(check: SelfCheck, mlp: Experts, post: Norm | None, hidden: Tensor) -> Tensor:
    """Predict what experts add, post(Σ_s h_s W_e + share_s b_e) · r.

    Args:
        check: The check of the run.
        mlp: The frozen experts.
        post: The frozen norm after the mixture, or None.
        hidden: What the output matrices read in the run [batch, pos, slot, d_mlp].

    Returns:
        The projection of what is added to the residual [batch, pos].
    """
    W, b, cast, after = mlp.weights.W_out, mlp.weights.b_out, mlp.frame.cast, affine(post)

    def compute() -> tuple:
        r, end = check.through(after, check.probe(W[0].shape[-1]))
        starts = torch.stack([cast(M) @ r for M in W])  # [expert, d_mlp]
        zeros = starts.new_zeros(len(W))
        return starts, zeros if b is None else torch.stack([cast(one) @ r for one in b]), end

    parts = (*_each(W), *_each(b), after)
    starts, bias, end = check.cached_product("experts output", parts, compute)
    slots, at = mlp.experts >= 0, mlp.experts.clamp_min(0)
    # Of all experts: they are few, beside the width of one.
    by_slot = (hidden @ starts.T).gather(-1, at[..., None]).squeeze(-1)
    by_slot = by_slot if mlp.weights.scales_input else by_slot * mlp.share
    added = torch.where(slots, by_slot + mlp.share * bias[at], 0).sum(-1)
    return added if post is None else added / post.scale.squeeze(-1) + end


def _each(stack: Any) -> tuple[Any, ...]:
    """The tensors that a stack of experts is held in: one, or one per expert."""
    return stack if isinstance(stack, tuple) else (stack,)
