"""Relations as linear maps: from a subject's hidden state to what the model says at the end.

A relation is a template such as "The capital of {} is", and subjects that fill the template. Let h
be the residual before block l at the subject's last token. Let y be the final normalized residual
at the last position. The unembedding reads y, so decoding y is linear, too. The map

    y ≈ β W h + b

comes from n training subjects: W and b are means over their prompts (Hernandez et al. 2024,
"Linearity of relation decoding", arXiv 2308.09124). Two methods give W and b for one prompt:

    operator   W is the frozen operator's block from the subject to the end, T[−1, subject] of
               ``lens.between(site, "unembed.hook_in")``. b is what all other positions and every
               bias add: the operator on the states without h. On the prompt itself W h + b = y
               exactly, and neither W nor b is a remainder
    jacobian   W = ∂y/∂h of the real model, with patterns, scales and activations live. b is the
               remainder y − W h, so that W h + b = y on the prompt itself by definition

y is not read from the last residual: the final norm is part of the map (frozen, or differentiated).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import spelled
from ..graph import FINAL_SITE, resid_site
from ..lens import FrozenRun
from ..recording import live_models

MAP_METHODS = ("operator", "jacobian")
"""Two ways to get a linear map from one prompt."""
ROWS = 256
"""How many rows of a Jacobian, or edited prompts, run in one batch."""


@dataclass(frozen=True, eq=False)
class Maps:
    """W and b of one prompt, before each of some blocks.

    Attributes:
        W: Map from h to y [layer, d_model, d_model]; multiplies a column.
        b: Constant beside the map [layer, d_model].
    """

    W: Float[Tensor, "layer d_model d_model"]
    b: Float[Tensor, "layer d_model"]


def operator_maps(lens: FrozenRun, pos: int, layers: Sequence[int]) -> Maps:
    """Take the frozen operator's block from one position to the end as W, and the rest as b.

    Let S x + s be the operator from the residual before block l to the end, and H the run's states
    there. Then W = S[−1, pos] and b = (S H₀ + s)[−1], where H₀ is H with 0 at ``pos``. It follows
    that W h + b = (S H + s)[−1] = y. Cost: d_model pulls and a push per layer.

    Args:
        lens: Lens of one prompt.
        pos: Position of h among the prompt's tokens.
        layers: Blocks before which h is read.

    Returns:
        W and b before each of the blocks.
    """
    W, b = [], []
    for layer in layers:
        segment = lens.between(resid_site(layer, "pre"), FINAL_SITE)
        # h taken out of the run's states: what is left belongs to b.
        others = lens.capture.blocks[layer].resid_pre.clone()
        others[:, pos] = 0
        # [d_out, d_in], which multiplies a column, as the paper writes W h.
        W.append(segment.block(-1, pos)[0])
        b.append((segment.apply(others) + segment.bias)[0, -1])
    return Maps(torch.stack(W), torch.stack(b))


def jacobian_maps(lens: FrozenRun, pos: int, layers: Sequence[int], model: Any) -> Maps:
    """Take the real model's Jacobian from one position to the end as W, and the remainder as b.

    W = ∂y[−1]/∂h and b = y[−1] − W h (Hernandez et al. 2024). Cost: one forward pass and d_model
    backward passes in batches, for all layers together.

    Args:
        lens: Lens of one prompt.
        pos: Position of h among the prompt's tokens.
        layers: Blocks before which h is read.
        model: The host model of the lens; left as it was.

    Returns:
        W and b before each of the blocks.
    """
    width, frame = lens.embedding.shape[-1], lens.capture.frame
    with live_models(lens.capture, model) as (live,):
        points, x = live.adapter.points(), live.x.detach()
        # All steps from h are 0, so one run serves every layer: each gradient is taken at the run.
        steps = [x.new_zeros(1, width, requires_grad=True) for _ in layers]
        edits = [
            (points[layer, "resid_pre"], lambda t, step=step: with_row(t, pos, t[:, pos] + step))
            for layer, step in zip(layers, steps, strict=True)
        ]
        y = live.checked(live.run(x, edits))[0, -1]
        # Row i of W is what coordinate i of y answers. Rows are batched in the backward pass alone.
        found = [
            torch.stack(
                torch.autograd.grad(y, steps, rows, retain_graph=True, is_grads_batched=True)
            )
            for rows in torch.eye(len(y), dtype=y.dtype, device=y.device).split(ROWS)
        ]
    # [layer, row, d_model]: one gradient per layer and coordinate of y.
    W = frame.cast(torch.cat(found, 1)[:, :, 0])
    h = torch.stack([lens.capture.blocks[layer].resid_pre[0, pos] for layer in layers])
    # b is what is left of y, so here W h + b = y says nothing about W.
    return Maps(W, lens.capture.unembed.final[0, -1] - torch.einsum("lij,lj->li", W, h))


def with_row(
    states: Float[Tensor, "prompt pos d_model"],
    pos: int | Int[Tensor, " prompt"],
    row: Float[Tensor, "prompt d_model"],
) -> Float[Tensor, "prompt pos d_model"]:
    """Copy the states with one position per prompt replaced by ``row``."""
    states = states.clone()
    states[torch.arange(len(states), device=states.device), pos] = row.to(states.dtype)
    return states


@spelled
@dataclass(frozen=True, eq=False)
class LinearRelation:
    """A relation's linear map y ≈ β W h + b, from some training subjects.

    Attributes:
        method: How W and b were had, one of :data:`MAP_METHODS`.
        layer: Index of the block before which h is read.
        beta: Factor β of the map.
        W: Mean W over the training subjects' prompts [d_model, d_model].
        b: Mean b over the training subjects' prompts [d_model].
        subjects: Texts of the training subjects.
    """

    method: str
    layer: int
    beta: float
    W: Float[Tensor, "d_model d_model"]
    b: Float[Tensor, " d_model"]
    subjects: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"LinearRelation({self.method}, before block {self.layer}, β = {self.beta:g}, "
            f"from {', '.join(self.subjects)})"
        )

    def __call__(self, h: Float[Tensor, "*many d_model"]) -> Float[Tensor, "*many d_model"]:
        """Predict the final normalized residual at the last position from h."""
        # β (W h) + b, for rows h. β does not touch b.
        return self.beta * h @ self.W.mT + self.b

    def step(
        self, change: Float[Tensor, "*many d_model"], rank: int
    ) -> Float[Tensor, "*many d_model"]:
        """Compute what to add to h so that the output changes by ``change``.

        The step is W† ``change``, with W† the inverse of W on its largest singular values. β is
        left out: β stretches what is decoded, not how the real model answers a step.

        Args:
            change: Wanted change of the output y.
            rank: Number of the largest singular values that are inverted.

        Returns:
            The step Σ_{k ≤ rank} v_k (u_k · change) / s_k.

        Raises:
            ValueError: If rank < 1.
        """
        if rank < 1:
            raise ValueError(f"rank={rank} is below 1. Pass a rank from 1 to d_model.")
        U, S, V = (part[..., :rank] for part in self._svd)
        return (change @ U) / S @ V.mT  # Σ_k v_k (u_k · change) / s_k, for rows

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular vectors and values of W, without those that are rounding."""
        U, S, Vh = torch.linalg.svd(self.W)
        # Smaller singular values are rounding, and their inverses would be noise.
        keep = S[0] * len(S) * torch.finfo(S.dtype).eps < S
        return U[:, keep], S[keep], Vh.mT[:, keep]
