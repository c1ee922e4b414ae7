"""Means, paired comparisons and rank correlation, without scipy.

Inputs that are nan (a measure that is not defined for a prompt) are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from ..checks import spelled
from ..pictures import Page, Paged, Tabled
from .intervals import Estimate, bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Number = float | int
FLIPS = 10_000
EXACT = 14
"""Largest number of pairs for which all 2ⁿ sign patterns are tried."""


@spelled
@dataclass(frozen=True)
class Comparison(Paged, Tabled):
    """A paired comparison of two methods on the same inputs.

    Attributes:
        difference: Mean by which the first method is better, with its 95 % interval.
        p: Two-sided p-value of the sign-flip permutation test of that mean.
    """

    difference: Estimate
    p: float

    _FRAMED = False
    _COLUMNS = (*Estimate._COLUMNS, "p")

    def _rows(self) -> list[tuple[float, ...]]:
        return [(*row, self.p) for row in self.difference._rows()]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the difference with its interval beside 0, with matplotlib.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. Right of 0 the first method is better.

        Raises:
            ValueError: If matplotlib is missing.
        """
        ax = self.difference.plot(ax)
        ax.axvline(0, color="0.2", linewidth=0.8)
        ax.set(title=str(self), xlabel=ax.get_xlabel().replace("value", "first better by", 1))
        return ax

    def _page(self) -> Page:
        notes = ["Above 0 the first method is better.", *self.difference._page().notes]
        return replace(self.difference._page(), title=str(self), notes=notes)

    def __str__(self) -> str:
        return f"{self.difference}, p = {self.p:.2g}"


@spelled
def estimate(values: Sequence[Number], seed: int = 0) -> Estimate:
    """Estimate the mean of some inputs, with a bootstrap interval; nan where all inputs are nan.

    Args:
        values: One number per input.
        seed: Seed of the resampling.

    Returns:
        The mean with its interval.
    """
    found = [float(value) for value in values if not math.isnan(value)]
    return bootstrap(found, seed=seed) if found else Estimate(math.nan, math.nan, math.nan, 0)


@spelled
def compare(first: Sequence[Number], second: Sequence[Number], seed: int = 0) -> Comparison:
    """Compare paired numbers: by how much the first are larger, and whether that may be chance.

    The test flips the sign of every pair's difference. Where neither method is better, each of the
    2ⁿ sign patterns is as likely as the observed one. For few pairs all patterns are tried.
    Otherwise 10,000 are drawn, and the observed one is counted among them, so that p ≥ 1 / 10,001.

    Args:
        first: One number per input.
        second: One number per input, in the same order.
        seed: Seed of resampling and flipping.

    Returns:
        The mean difference with its interval, and the p-value.

    Raises:
        ValueError: If the lists have different lengths.
    """
    if len(first) != len(second):
        raise ValueError(
            f"first has {len(first)} numbers and second {len(second)}. Pass one of each per input."
        )
    d = _numbers(first) - _numbers(second)
    # A pair without a number in one method says nothing of their difference.
    d = d[~d.isnan()]
    difference = estimate(d.tolist(), seed)
    if len(d) == 0:
        return Comparison(difference, math.nan)
    flips, seen = _signs(len(d), seed), len(d) > EXACT
    # Sums that differ by rounding alone count as equal to the observed one.
    least = d.sum().abs() - 1e-12 * d.abs().sum()
    parts = flips.split(max(1, 2**22 // len(d)))
    reached = sum(int(((signs.to(d) @ d).abs() >= least).sum()) for signs in parts)
    return Comparison(difference, (reached + seen) / (len(flips) + seen))


@lru_cache(maxsize=4)  # many calls have the same n and seed
def _signs(n: int, seed: int) -> Int8[Tensor, "flip n"]:
    if n <= EXACT:
        flips, inputs = (torch.arange(m, device="cpu") for m in (2**n, n))
        # Bit j of pattern i, as a sign: every pattern once.
        return ((flips[:, None] >> inputs & 1) * 2 - 1).to(torch.int8)
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 2, (FLIPS, n), generator=generator, device="cpu", dtype=torch.int8) * 2 - 1
    )


def _numbers(values: Sequence[Number]) -> Float[Tensor, " n"]:
    # On the CPU, whatever the default device is: the random draws are there, too.
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def ranks(values: Sequence[Number]) -> Float[Tensor, " n"]:
    """Ranks from 1; equal values share their mean rank."""
    x = _numbers(values)
    # All pairs: n² comparisons, of a few hundred tokens at most.
    below = (x[None] < x[:, None]).sum(1)
    equal = (x[None] == x[:, None]).sum(1).double()
    return below + (equal + 1) / 2


@spelled
def rank_correlation(a: Sequence[Number], b: Sequence[Number]) -> float:
    """Spearman's ρ, the correlation of the ranks; nan where a or b does not vary."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else math.nan
