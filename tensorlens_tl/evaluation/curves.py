"""Masking curves of an evaluation, drawn: numbers against the share of tokens masked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..pictures import View, curves, curves_view
from .intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import Row


_DRAWN: Mapping[str, tuple[str, str]] = {
    "positive": ("{}", "most relevant masked"),
    "negative": ("{}", "least relevant masked"),
    "morf": ("{}", "most relevant masked"),
    "lerf": ("{}", "least relevant masked"),
    "delta": ("{}, LeRF − MoRF", "masked"),
    "deletion": ("{}, of that of the whole prompt", "most relevant masked"),
    "insertion": ("{}, of that of the whole prompt", "most relevant kept"),
    "comprehensiveness": ("loss of {}", "most relevant masked"),
    "sufficiency": ("loss of {}", "most relevant kept"),
}
"""What the points of a measure are, of its metric, and what the fractions are of."""


def curve_figure(ax: Axes | None, rows: Mapping[str, Row], title: str, seed: int) -> Axes:
    """Draw the curves of one measure, one per method, with 95 % intervals.

    Args:
        ax: Axes to draw on, or None.
        rows: The row of every method, in the order of the legend.
        title: What stands above.
        seed: Seed of the bootstrap.

    Returns:
        The axes drawn on. The legend has the number that the curve makes.
    """
    x, (xlabel, ylabel) = _axes(rows)
    series = {
        f"{name}, {row.estimate(seed).value:.3g}": [
            (e.value, e.low, e.high) for e in row.curve(seed)
        ]
        for name, row in rows.items()
    }
    return curves(ax, x, series, title=title, xlabel=xlabel, ylabel=ylabel)


def curve_page_view(rows: Mapping[str, Row], heading: str, seed: int) -> View:
    """The same curves as a view of a page."""
    x, names = _axes(rows)
    lines = []
    for name, row in rows.items():
        points = np.array([(e.value, e.low, e.high) for e in row.curve(seed)])
        lines.append((f"{name}, {row.estimate(seed).value:.3g}", *points.T))
    return curves_view(x, lines, names, heading=heading)


def best_first(found: Mapping[str, Estimate], higher: bool) -> list[str]:
    """Names by their means, the best first; those without a mean last."""
    worst = -math.inf if higher else math.inf
    size = {name: worst if math.isnan(e.value) else e.value for name, e in found.items()}
    return sorted(size, key=size.__getitem__, reverse=higher)


def _axes(rows: Mapping[str, Row]) -> tuple[Sequence[float], tuple[str, str]]:
    one = next(iter(rows.values()))
    points, which = _DRAWN.get(one.measure, (f"{one.measure}, {{}}", "masked"))
    return [100 * f for f in one.fractions], (f"tokens, %: {which}", points.format(one.metric))
