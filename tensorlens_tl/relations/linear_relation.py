"""Relations as linear maps: from a subject's hidden state to what the model says at the end.

A relation is a template, "The capital of {} is", and its subjects. With h the residual before
block l at the subject's last token and y the final normalized residual at the last position (what
the unembedding reads, so that decoding is linear, too), both sides of

    y ≈ β W h + b

come from n training subjects: W and b are means over their prompts (Hernandez et al. 2024, "Linearity
of relation decoding", arXiv 2308.09124). Two methods give them for one prompt:

    operator   W is the frozen operator's block from the subject to the end, T[−1, subject] of
               ``lens.between(site, "unembed.hook_in")``, and b what all other positions and every
               bias add: the operator on the states with h taken out. On its own prompt W h + b = y
               exactly, and nothing in it is a remainder
    jacobian   W = ∂y/∂h of the real model, with patterns, scales and activations live, and b
               the remainder y − W h, which is exact on its own prompt, too, but by its definition

The site of y is not the last residual: the final norm is a part of the map (frozen, or derived).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..graph import FINAL_SITE, resid_site
from ..hosts import live_models
from ..lens import FrozenRun

METHODS = ("operator", "jacobian")
ROWS = 256
"""Rows of a Jacobian, and edited prompts, that run at once."""


@dataclass(frozen=True, eq=False)
class Maps:
    """W and b of one prompt, before every block asked for.

    Attributes:
        W: [layer, d_model, d_model]; multiplies a column.
        b: [layer, d_model].
    """

    W: Float[Tensor, "layer d_model d_model"]
    b: Float[Tensor, "layer d_model"]


def operator_maps(lens: FrozenRun, pos: int, layers: Sequence[int]) -> Maps:
    """The frozen operator's block from one position to the end, and the rest as b.

    With S, s the operator from the residual before block l to the end, and H the run's states there:
    W = S[−1, pos], b = (S H₀ + s)[−1] with H₀ = H but 0 at pos. So W h + b = (S H + s)[−1] = y.
    Cost: d_model pulls and a push per layer.

    Args:
        lens: One prompt's.
        pos: Position among its tokens.
        layers: Blocks before which h is read.

    Returns:
        The maps.
    """
    W, b = [], []
    for layer in layers:
        segment = lens.between(resid_site(layer, "pre"), FINAL_SITE)
        others = lens.capture.blocks[layer].resid_pre.clone()
        others[:, pos] = 0
        W.append(segment.block(-1, pos)[0])
        b.append((segment.apply(others) + segment.bias)[0, -1])
    return Maps(torch.stack(W), torch.stack(b))


def jacobian_maps(lens: FrozenRun, pos: int, layers: Sequence[int], model: Any) -> Maps:
    """The real model's Jacobian from one position to the end, and the remainder as b.

    W = ∂y[−1]/∂h and b = y[−1] − W h (Hernandez et al. 2024). Cost: d_model forward and backward
    passes in batches, for all layers together.

    Args:
        lens: One prompt's.
        pos: Position among its tokens.
        layers: Blocks before which h is read.
        model: The host it came from; left as it was.

    Returns:
        The maps.
    """
    width, frame, W = lens.embedding.shape[-1], lens.capture.frame, []
    with live_models(lens.capture, model) as (live,):
        points, x = live.adapter.points(), live.x.detach()
        for rows in torch.arange(width, device=x.device).split(ROWS):
            # A step from h for every row of W: one backward pass then tells all rows apart.
            steps = [x.new_zeros(len(rows), width, requires_grad=True) for _ in layers]
            edits = [
                (
                    points[layer, "resid_pre"],
                    lambda t, step=step: with_row(t, pos, t[:, pos] + step),
                )
                for layer, step in zip(layers, steps, strict=True)
            ]
            y = live.checked(live.run(x.expand(len(rows), -1, -1), edits))
            picked = y[torch.arange(len(rows), device=x.device), -1, rows]
            W.append(torch.stack(torch.autograd.grad(picked.sum(), steps)))
    W = frame.cast(torch.cat(W, 1))
    h = torch.stack([lens.capture.blocks[layer].resid_pre[0, pos] for layer in layers])
    return Maps(W, lens.capture.unembed.final[0, -1] - torch.einsum("lij,lj->li", W, h))


def with_row(
    states: Float[Tensor, "prompt pos d_model"],
    pos: int | Int[Tensor, " prompt"],
    row: Float[Tensor, "prompt d_model"],
) -> Float[Tensor, "prompt pos d_model"]:
    """The states with one position per prompt replaced; a copy."""
    states = states.clone()
    states[torch.arange(len(states), device=states.device), pos] = row.to(states.dtype)
    return states


@dataclass(frozen=True, eq=False)
class LinearRelation:
    """y ≈ β W h + b, from some training subjects.

    Attributes:
        method: One of :data:`METHODS`.
        layer: The block before which h is read.
        beta: β.
        W: The mean over the training subjects' prompts [d_model, d_model].
        b: Likewise [d_model].
        subjects: The training subjects.
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
        """The final normalized residual it expects at the last position."""
        return self.beta * h @ self.W.mT + self.b

    def step(
        self, change: Float[Tensor, "*many d_model"], rank: int
    ) -> Float[Tensor, "*many d_model"]:
        """What to add to h so that the output changes so: W† of a low rank, times the change.

        β has no part in it: it stretches what is decoded, not what the real model answers a step with.

        Args:
            change: Of the output.
            rank: How many of the largest singular triples are inverted.

        Returns:
            The step Σ_{k ≤ rank} v_k (u_k · change) / s_k.

        Raises:
            ValueError: If rank < 1.
        """
        if rank < 1:
            raise ValueError(f"expected a rank of at least 1, got {rank}")
        U, S, V = (part[..., :rank] for part in self._svd)
        return (change @ U) / S @ V.mT

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(self.W)
        keep = S[0] * len(S) * torch.finfo(S.dtype).eps < S  # the rest is rounding
        return U[:, keep], S[keep], Vh.mT[:, keep]
