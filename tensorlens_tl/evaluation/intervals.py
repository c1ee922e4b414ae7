"""Bootstrap intervals: how uncertain a mean or a median is, from the values alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import spelled
from ..pictures import (
    Page,
    Paged,
    Tabled,
    estimates,
    interval_text,
    interval_view,
    intervals_over,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWS = 2000


@spelled
@dataclass(frozen=True)
class Estimate(Paged, Tabled):
    """A statistic and its percentile bootstrap interval.

    Attributes:
        value: Value of the statistic.
        low: Lower end of the 95 % interval; nan where there is none, as of one value.
        high: Upper end of the 95 % interval; nan where there is none.
        n: Number of values that the statistic is of.
    """

    value: float
    low: float
    high: float
    n: int

    _FRAMED = False
    _COLUMNS = ("value", "low", "high", "n")

    def _rows(self) -> list[tuple[float, ...]]:
        return [(self.value, self.low, self.high, self.n)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the value with its interval, with matplotlib.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on.

        Raises:
            ValueError: If matplotlib is missing.
        """
        points = {"": [(self.value, self.low, self.high)]}
        xlabel = f"value ({intervals_over([self.low], self.n, 'value')})"
        return estimates(ax, [f"n = {self.n}"], points, title=str(self), xlabel=xlabel)

    def _page(self) -> Page:
        values = np.array([[self.value, self.low, self.high]])
        view = interval_view([""], [[f"n = {self.n}"]], values, what="value")
        return Page(
            str(self),
            [view],
            [f"{intervals_over([self.low], self.n, 'value').capitalize()}."],
            height=200,
        )

    def __str__(self) -> str:
        return f"{self.value:.3g} {interval_text(self.low, self.high, self.n)}"


def mean(values: Float[Tensor, "*draws n"]) -> Float[Tensor, "*draws"]:
    """Mean along the last axis."""
    return values.mean(-1)


@spelled
def median(values: Float[Tensor, "*draws n"]) -> Float[Tensor, "*draws"]:
    """Lower median along the last axis: always one of the values, so that it may be infinite."""
    return values.median(-1).values


@spelled
def bootstrap(
    values: Sequence[float], statistic: Callable[[Tensor], Tensor] = mean, seed: int = 0
) -> Estimate:
    """Estimate a statistic of independent values, with a 95 % interval.

    The ends are the 2.5 and 97.5 % points of the statistic over 2,000 resamples with replacement
    (Efron 1979). Each end is one of the resampled statistics, never between two of them, so that
    infinite values are allowed. One value says nothing of its spread, so it has no interval: the
    ends are nan.

    Args:
        values: Independent values. Where values come in groups, pass one per group.
        statistic: Either :func:`mean` or :func:`median`.
        seed: Seed of the resamples.

    Returns:
        The statistic with its interval.

    Raises:
        ValueError: If there is no value.
    """
    x = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(
            f"values have shape {list(x.shape)}, not [n]. Pass a list of at least one number."
        )
    if len(x) == 1:
        return Estimate(float(x), math.nan, math.nan, 1)
    # [draw, n] indices: all resamples at once.
    drawn = statistic(x[_resamples(len(x), seed)])
    low, high = drawn.sort().values[[round(q * (DRAWS - 1)) for q in (0.025, 0.975)]].tolist()
    return Estimate(float(statistic(x)), low, high, len(x))


@lru_cache(maxsize=4)  # many calls have the same n and seed
def _resamples(n: int, seed: int) -> Int[Tensor, "draw n"]:
    # One draw of indices for all values of one length, so that methods are resampled alike.
    return torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(seed), device="cpu")
