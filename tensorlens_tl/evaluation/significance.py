"""Means that leave out what is not defined, paired comparisons, rank correlation; without scipy.

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

from .intervals import Estimate, bootstrap

Number = float | int
FLIPS = 10_000
EXACT = 14
"""Up to so many pairs every one of the 2ⁿ signs is tried."""


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two methods on the same inputs.

    Attributes:
        difference: Mean by which the first is better, and its interval.
        p: Two-sided, of the sign-flip permutation test of that mean.
    """

    difference: Estimate
    p: float

    def __str__(self) -> str:
        return f"{self.difference}, p = {self.p:.2g}"


def estimate(values: Sequence[Number], seed: int = 0) -> Estimate:
    """The mean of some inputs and its bootstrap interval; nan where there is nothing.

    Args:
        values: One number for each input.
        seed: Of the resampling.

    Returns:
        The estimate.
    """
    found = [float(value) for value in values if not math.isnan(value)]
    return bootstrap(found, seed=seed) if found else Estimate(math.nan, math.nan, math.nan, 0)


def compare(ours: Sequence[Number], theirs: Sequence[Number], seed: int = 0) -> Comparison:
    """A paired comparison: by how much ours is larger, and whether that may be chance.

    The test flips the sign of every pair's difference: where neither is better, each of the 2ⁿ sign
    patterns is as likely as the one seen. All are tried for few pairs, else 10,000 drawn ones, the seen
    one counted among them (so that p is never below 1 / 10,001).

    Args:
        ours: One number for each input.
        theirs: The same inputs' numbers.
        seed: Of resampling and flipping.

    Returns:
        The comparison.

    Raises:
        ValueError: If they are not as many.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"expected pairs, got {len(ours)} and {len(theirs)} inputs")
    d = _numbers(ours) - _numbers(theirs)
    d = d[~d.isnan()]
    difference = estimate(d.tolist(), seed)
    if len(d) == 0:
        return Comparison(difference, math.nan)
    flips, seen = _signs(len(d), seed), len(d) > EXACT
    least = d.sum().abs() - 1e-12 * d.abs().sum()
    parts = flips.split(max(1, 2**22 // len(d)))
    reached = sum(int(((signs.to(d) @ d).abs() >= least).sum()) for signs in parts)
    return Comparison(difference, (reached + seen) / (len(flips) + seen))


@lru_cache(maxsize=4)  # many comparisons are of as many inputs
def _signs(n: int, seed: int) -> Int8[Tensor, "flip n"]:
    if n <= EXACT:
        flips, inputs = (torch.arange(m, device="cpu") for m in (2**n, n))
        return ((flips[:, None] >> inputs & 1) * 2 - 1).to(torch.int8)
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 2, (FLIPS, n), generator=generator, device="cpu", dtype=torch.int8) * 2 - 1
    )


def _numbers(values: Sequence[Number]) -> Float[Tensor, " n"]:
    # On the CPU, whatever the default device: the draws are there, too.
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def ranks(values: Sequence[Number]) -> Float[Tensor, " n"]:
    """Ranks from 1, equal values sharing their mean rank."""
    x = _numbers(values)
    below = (x[None] < x[:, None]).sum(1)
    equal = (x[None] == x[:, None]).sum(1).double()
    return below + (equal + 1) / 2


def rank_correlation(a: Sequence[Number], b: Sequence[Number]) -> float:
    """Spearman's ρ, the correlation of the ranks; nan where one of the two does not vary."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else math.nan
