"""The smallest edit that changes targets as asked: closed forms in the frozen model.

With a covector g_i for each of k targets and a metric M, the edit

    min δᵀ M δ   such that ⟨g_i, δ⟩ = t_i for all i,      δ = M⁻¹ Gᵀ (G M⁻¹ Gᵀ)⁻¹ t

is unique where the g_i are independent. One target alone: δ = t M⁻¹g / (gᵀ M⁻¹ g). A target that
is kept has t_i = 0. With ≥ in place of =, the multipliers are non-negative, and those of targets
that are met anyway are 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import kind_of
from ..costs import rehearsed
from ..maps import TINY

RIDGE = 1e-6
"""What a measured metric gets on its diagonal, as a share of its mean."""


_NONE = (
    "No edit here changes the target as asked: it does not depend on this place and these "
    "positions, or what is kept moves with it. Pass another site, positions or keep=."
)


class EditCost:
    """What an edit costs: ‖δ‖² by itself, or weighted by how much activations vary.

    Args:
        metric: "identity"; "activations", for the mean square of each dimension in this run; or
            your own second moments of activations, [d] or [d, d].
        state: What stands at the place in the run [batch, pos, width].
        real: True at real tokens [batch, pos].

    Raises:
        ValueError: If the metric is none of these.
    """

    def __init__(self, metric: str | Tensor, state: Tensor, real: Tensor):
        self.diagonal: Tensor | None = None
        self.vectors: Tensor | None = None
        self.roots: Tensor | None = None
        if isinstance(metric, str) and metric == "activations":
            metric = state[real].square().mean(0)
        elif isinstance(metric, str) and metric == "identity":
            return
        width = state.shape[-1]
        if not isinstance(metric, Tensor) or metric.shape not in ((width,), (width, width)):
            shown = f"of shape {list(metric.shape)}" if isinstance(metric, Tensor) else repr(metric)
            shown = shown if isinstance(metric, Tensor | str) else f"is {kind_of(metric)}"
            raise ValueError(
                f"metric= {shown} is no metric here. Pass 'identity', 'activations', or second "
                f"moments [{width}] or [{width}, {width}]."
            )
        moments = metric.detach().to(state)
        diagonal = moments if moments.ndim == 1 else moments.diagonal()
        # A dimension that never varied would cost nothing, and an edit along it would be huge.
        ridge = RIDGE * diagonal.mean()
        if not bool(moments.isfinite().all()) or bool((diagonal < 0).any()) or not ridge > 0:
            raise ValueError("metric= holds no second moments. Pass numbers that are means of x².")
        if moments.ndim == 1:
            self.diagonal = moments + ridge
        else:
            # Rounding, and fewer samples than dimensions, leave roots at or below 0.
            roots, self.vectors = torch.linalg.eigh((moments + moments.mT).double() / 2)
            self.roots = roots.clamp_min(float(ridge))

    def inverse(self, g: Float[Tensor, "*many d"]) -> Float[Tensor, "*many d"]:
        """M⁻¹ g, position by position."""
        if self.diagonal is not None:
            return g / self.diagonal
        if self.vectors is not None and self.roots is not None:
            found = (g.double() @ self.vectors / self.roots) @ self.vectors.mT
            return found.to(g)
        return g


def smallest(
    rows: Float[Tensor, "batch row pos d"], asked: Float[Tensor, "batch row"], metric: EditCost
) -> Float[Tensor, "batch pos d"]:
    """The smallest edit that changes every target by what is asked.

    Args:
        rows: The covectors, 0 where nothing may change.
        asked: The change of each target.
        metric: What an edit costs.

    Returns:
        The edit at every position.

    Raises:
        ValueError: If no such edit exists: a covector is 0, or depends on the others.
    """
    spread = metric.inverse(rows)
    gram = _gram(rows, spread)
    size = gram.diagonal(dim1=-2, dim2=-1)
    # Rows of length 1 in the metric: the least eigenvalue then tells whether they are independent,
    # however large their targets are.
    lengths = size.clamp_min(TINY).sqrt()
    scaled = gram / lengths[:, :, None] / lengths[:, None]
    eps = 100 * torch.finfo(rows.dtype).eps
    alike = (size <= TINY).any() | (torch.linalg.eigvalsh(scaled)[:, 0] < eps).any()
    if bool(alike) and not rehearsed():
        raise ValueError(_NONE)
    # solve_ex raises nothing: rehearsals compute with numbers that are all the same.
    weights = torch.linalg.solve_ex(scaled, asked / lengths).result / lengths
    return torch.einsum("bk,bkpd->bpd", weights, spread)


def smallest_shared(
    rows: Float[Tensor, "batch row pos d"],
    asked: Float[Tensor, "batch row"],
    signs: Float[Tensor, "batch row"],
    metric: EditCost,
) -> Float[Tensor, " d"]:
    """The smallest vector that changes every target of every prompt by at least what is asked.

    The vector is added at every position where a row is not 0, so its covector is the sum over
    positions. Targets of sign 0 change by exactly what is asked. The rest is found among vectors
    that leave those as they are. Were equality asked of all, prompts that hardly differ would need
    a huge vector that tells them apart.

    Args:
        rows: The covectors, 0 where nothing may change.
        asked: The change of each target.
        signs: The direction in which a target may change by more: 1, −1, or 0 for none.
        metric: What an edit costs.

    Returns:
        The vector that every edited position gets.

    Raises:
        ValueError: If no such vector exists: a covector is 0, or depends on what is kept.
    """
    flat, asked, signs = rows.sum(2).flatten(0, 1), asked.flatten(), signs.flatten()
    kept, free = flat[signs == 0], flat[signs != 0] * signs[signs != 0, None]
    more = asked[signs != 0] * signs[signs != 0]
    delta, size = torch.zeros_like(flat[0]), (free * metric.inverse(free)).sum(-1)
    if len(kept):
        spread = metric.inverse(kept)
        # Kept targets may depend on each other, as near words do: a plain solve would fail.
        inverse = torch.linalg.pinv(kept @ spread.mT, hermitian=True)
        delta = asked[signs == 0] @ inverse @ spread
        more = more - free @ delta
        # Covectors less what those of kept targets determine, by projection in the metric: what is
        # then found leaves those as ``delta`` made them.
        free = free - free @ spread.mT @ inverse @ kept
    if not len(free):
        return delta
    # A covector of which projection leaves rounding alone cannot move while the others are kept.
    left = (free * metric.inverse(free)).sum(-1)
    alike = (left <= 100 * torch.finfo(rows.dtype).eps * size + TINY).any()
    if bool(alike) and not rehearsed():
        raise ValueError(_NONE)
    return delta + smallest_above(free[:, None], more, metric)[0]


def smallest_above(
    rows: Float[Tensor, "row pos d"], asked: Float[Tensor, " row"], metric: EditCost
) -> Float[Tensor, "pos d"]:
    """The smallest edit of one prompt that changes every target by at least what is asked.

    The active set: rows are added while one falls short, and left out while a multiplier is
    negative.

    Args:
        rows: The covectors, 0 where nothing may change.
        asked: The least change of each target.
        metric: What an edit costs.

    Returns:
        The edit at every position.
    """
    spread = metric.inverse(rows)
    gram = _gram(rows[None], spread[None])[0]
    active: list[int] = []
    weights = asked.new_zeros(0)
    tolerance = 100 * torch.finfo(asked.dtype).eps * float(asked.abs().max().clamp_min(1))
    for _ in range(10 * len(rows)):
        short = asked - (gram[:, active] @ weights if active else 0)
        short[active] = 0  # these are met to rounding
        if float(short.max()) <= tolerance:
            break
        active.append(int(short.argmax()))
        while True:
            # Least squares, as rows of prompts that are alike may be dependent.
            weights = torch.linalg.lstsq(gram[active][:, active], asked[active, None]).solution
            weights = weights[:, 0]
            if float(weights.min()) >= 0:
                break
            # A negative multiplier: this target would be met without being asked for.
            active.pop(int(weights.argmin()))
    return torch.einsum("k,kpd->pd", weights, spread[active])


def _gram(rows: Tensor, spread: Tensor) -> Float[Tensor, "batch row row"]:
    return rows.flatten(2) @ spread.flatten(2).mT
