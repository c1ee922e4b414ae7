"""Means with intervals, paired comparisons, rank correlation: small, seeded, without scipy.

Inputs that are nan (a measure that is not defined for a prompt) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int8
from torch import Tensor

RESAMPLES = 2_000
FLIPS = 10_000
EXACT = 14
"""Up to so many pairs every one of the 2ⁿ signs is tried."""


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        mean: The mean; nan where there is nothing.
        low: Lower end.
        high: Upper end.
        n: How many inputs.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two methods on the same inputs.

    Attributes:
        difference: Mean by which the first is better, and its interval.
        p: Two-sided, of the sign-flip permutation test of that mean.
    """

    difference: Interval
    p: float

    def __str__(self) -> str:
        return f"{self.difference}, p = {self.p:.2g}"


def _present(values: Sequence[float]) -> Float[Tensor, " n"]:
    found = torch.as_tensor(values, dtype=torch.float64)
    return found[~found.isnan()]


def bootstrap(values: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of some inputs, and its percentile bootstrap interval.

    Args:
        values: One number for each input.
        level: The interval's coverage.
        seed: Of the resampling.

    Returns:
        The interval.

    Raises:
        ValueError: If the level is no share.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, got {level}: for 95 % pass 0.95")
    x = _present(values)
    if len(x) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    generator = torch.Generator().manual_seed(seed)
    drawn = x[torch.randint(len(x), (RESAMPLES, len(x)), generator=generator)].mean(1)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = drawn.quantile(ends).tolist()
    return Interval(float(x.mean()), low, high, len(x))


def compare(
    ours: Sequence[float], theirs: Sequence[float], level: float = 0.95, seed: int = 0
) -> Comparison:
    """A paired comparison: by how much ours is larger, and whether that may be chance.

    The test flips the sign of every pair's difference: where neither is better, each of the 2ⁿ sign
    patterns is as likely as the one seen. All are tried for few pairs, else 10,000 drawn ones, the seen
    one counted among them (so that p is never below 1 / 10,001).

    Args:
        ours: One number for each input.
        theirs: The same inputs' numbers.
        level: The interval's coverage.
        seed: Of resampling and flipping.

    Returns:
        The comparison.

    Raises:
        ValueError: If they are not as many.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"expected pairs, got {len(ours)} and {len(theirs)} inputs")
    d = torch.as_tensor(ours, dtype=torch.float64) - torch.as_tensor(theirs, dtype=torch.float64)
    d = d[~d.isnan()]
    interval = bootstrap(d.tolist(), level, seed)
    if len(d) == 0:
        return Comparison(interval, math.nan)
    flips, seen = _signs(len(d), seed), len(d) > EXACT
    least = d.sum().abs() - 1e-12 * d.abs().sum()
    parts = flips.split(max(1, 2**22 // len(d)))
    reached = sum(int(((signs.to(d) @ d).abs() >= least).sum()) for signs in parts)
    return Comparison(interval, (reached + seen) / (len(flips) + seen))


@lru_cache(maxsize=4)  # many comparisons are of as many inputs
def _signs(n: int, seed: int) -> Int8[Tensor, "flip n"]:
    if n <= EXACT:
        return ((torch.arange(2**n)[:, None] >> torch.arange(n) & 1) * 2 - 1).to(torch.int8)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (FLIPS, n), generator=generator, dtype=torch.int8) * 2 - 1


def ranks(values: Sequence[float]) -> Float[Tensor, " n"]:
    """Ranks from 1, equal values sharing their mean rank."""
    x = torch.as_tensor(values, dtype=torch.float64)
    below = (x[None] < x[:, None]).sum(1)
    equal = (x[None] == x[:, None]).sum(1).double()
    return below + (equal + 1) / 2


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's ρ, the correlation of the ranks; nan where one of the two does not vary."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else math.nan
