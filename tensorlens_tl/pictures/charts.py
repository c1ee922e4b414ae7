"""Drawers of static figures, for matplotlib: tokens, curves, intervals, dots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .figures import (
    LONGER,
    MOST_LABELS,
    PLAIN,
    axes,
    bare,
    bars,
    beside_legend,
    cell_map,
    colour,
    label,
    mirrored_bars,
    named_axis,
    titled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Interval = tuple[float, float, float]
"""A value, and the ends of its interval."""
MARKERS = "osD^vX"
LEGEND = 64
"""How long a name in a legend is."""


# --- Tokens --------------------------------------------------------------------------------------


def token_figure(
    ax: Axes | None,
    tokens: Sequence[Sequence[str]],
    values: Sequence[Sequence[float]],
    titles: Sequence[str],
    how: str,
    unit: str,
) -> Axes:
    """Draw a number per token: bars for one prompt, mirrored bars for two, strips for more.

    Args:
        ax: Axes to draw on, or None.
        tokens: The names of every prompt's tokens.
        values: The numbers of every prompt.
        titles: What each prompt's numbers are.
        how: What all numbers are.
        unit: What the numbers count.

    Returns:
        The axes drawn on.
    """
    if len(tokens) > 2:
        wide = max(map(len, tokens))
        grid = [[*own, *[math.nan] * (wide - len(own))] for own in values]
        texts = [[*own, *[""] * (wide - len(own))] for own in tokens]
        places = [str(i) for i in range(wide)]
        low = min((v for own in values for v in own if v == v), default=0.0)
        return cell_map(
            ax,
            grid,
            list(titles),
            places,
            unit=unit,
            title=how,
            texts=texts,
            axis_names=("", "position"),
            signed=unit != "score" or low < 0,
        )
    if max(map(len, tokens)) > MOST_LABELS + 12 and len(tokens) == 1:
        return columns(
            ax, tokens[0], values[0], unit=unit, title=f"{titles[0]}, {how}", xlabel="position"
        )
    if len(tokens) == 2:
        sides = (tokens[0], tokens[1]), (values[0], values[1])
        return mirrored_bars(ax, *sides, unit=unit, titles=(titles[0], titles[1]), middle=how)
    return bars(ax, tokens[0], values[0], unit=unit, title=f"{titles[0]}, {how}")


def columns(
    ax: Axes | None,
    names: Sequence[str],
    values: Sequence[float],
    *,
    unit: str,
    title: str = "",
    xlabel: str = "",
) -> Axes:
    """Draw many numbers in a row, as upright bars. The largest ones bear their names.

    Args:
        ax: Axes to draw on, or None.
        names: Names of the numbers.
        values: The numbers, first on the left.
        unit: What the numbers count.
        title: What stands above.
        xlabel: What stands below, with the numbers 0, 1, 2, ….

    Returns:
        The axes drawn on.
    """
    ax = axes(ax, 7.5, 4.0)
    finite = [v if math.isfinite(v) else 0.0 for v in values]
    ax.bar(range(len(finite)), finite, width=1.0, color=[colour(v) for v in finite])
    named: list[int] = []
    for i in sorted(range(len(finite)), key=lambda i: -abs(finite[i])):
        if len(named) < 8 and all(abs(i - j) > len(finite) / 50 for j in named):  # side by side
            named.append(i)
            up = finite[i] >= 0
            ax.annotate(
                label(names[i], 16),
                (i, finite[i]),
                (0, 3 if up else -3),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                rotation=90,
                fontsize="x-small",
                **PLAIN,
            )
    ax.axhline(0, color="0.2", linewidth=0.8)
    ax.margins(y=0.45)  # for the names
    ax.set_xlim(-0.5, len(finite) - 0.5)
    bare(ax)
    return titled(ax, title, xlabel, unit)


# --- Curves and intervals -------------------------------------------------------------------------


def curves(
    ax: Axes | None,
    x: Sequence[float],
    series: Mapping[str, Sequence[Interval]],
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
) -> Axes:
    """Draw curves, each with a band for its intervals. Markers and dashes tell them apart, too.

    Where x spans more than 10×, its scale is logarithmic; a point at 0 then stands on the left.

    Args:
        ax: Axes to draw on, or None.
        x: Where the points lie.
        series: The points of each curve, by its name.
        title: What stands above.
        xlabel: What x is.
        ylabel: What the curves are.

    Returns:
        The axes drawn on.
    """
    ax = axes(ax, 5.2 + _beside(series), 3.8)
    looks = [(m, d) for d in ("-", "--", ":", "-.") for m in MARKERS]
    for i, (name, points) in enumerate(series.items()):
        values, low, high = zip(*points, strict=True)
        marker, dash = looks[i % len(looks)]
        (line,) = ax.plot(
            x, values, marker=marker, linestyle=dash, markersize=4, label=label(name, LEGEND)
        )
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    if by_decades(x):
        _by_decades(ax, sorted(set(x)))
    beside_legend(ax, len(series))
    bare(ax)
    return titled(ax, title, xlabel, ylabel)


def by_decades(sizes: Sequence[float]) -> bool:
    """Whether sizes call for a logarithmic scale: none is below 0, and they span more than 10×."""
    above = [size for size in sizes if size > 0]
    return len(above) > 0 and min(sizes) >= 0 and max(above) > 10 * min(above)


def _by_decades(ax: Axes, sizes: Sequence[float]) -> None:
    """A logarithmic scale with the sizes' own numbers; below the least positive it is linear."""
    least = min(size for size in sizes if size > 0)
    linear = {"linthresh": least, "linscale": 0.5} if sizes[0] == 0 else {}
    ax.set_xscale("symlog" if linear else "log", **linear)
    places = [math.log10(s / least) if s >= least else s / least - 1 for s in sizes]
    names, shown = [f"{size:.3g}" for size in sizes], [0]
    for i, place in enumerate(places):
        share = (place - places[shown[-1]]) / (places[-1] - places[0])
        if share > 0.012 * (len(names[i]) + len(names[shown[-1]]) + 2):  # the labels' own width
            shown.append(i)
    ax.set_xticks([sizes[i] for i in shown], [names[i] for i in shown])
    ax.set_xticks([], minor=True)


def estimates(
    ax: Axes | None,
    names: Sequence[str],
    series: Mapping[str, Sequence[Interval]],
    *,
    title: str = "",
    xlabel: str = "",
) -> Axes:
    """Draw one point with its interval per name and series, from top to bottom.

    Args:
        ax: Axes to draw on, or None.
        names: Names of the rows.
        series: The points of each series, one per row, by the series' name.
        title: What stands above.
        xlabel: What the numbers are.

    Returns:
        The axes drawn on.
    """
    ax = axes(ax, 6.0 + _beside(series), 1.2 + len(names) * max(0.26, 0.14 * len(series)))
    for i, (name, points) in enumerate(series.items()):
        y = [row + 0.6 * ((i + 0.5) / len(series) - 0.5) for row in range(len(names))]
        values, low, high = zip(*points, strict=True)
        ends = [
            [v - a for v, a in zip(values, low, strict=True)],
            [b - v for v, b in zip(values, high, strict=True)],
        ]
        ax.errorbar(
            values,
            y,
            xerr=ends,
            fmt=MARKERS[i % len(MARKERS)],
            markersize=4,
            capsize=2,
            label=label(name, LEGEND),
        )
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(len(names)), [label(n, LONGER) for n in names], fontsize="small", **PLAIN)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    beside_legend(ax, len(series))
    bare(ax)
    return titled(ax, title, xlabel)


def dots(
    ax: Axes | None, groups: Mapping[str, Sequence[float]], *, ylabel: str, title: str = ""
) -> Axes:
    """Draw every number of some groups as a dot, and the mean of each group as a line.

    Args:
        ax: Axes to draw on, or None.
        groups: The numbers of each group, by its name.
        ylabel: What the numbers are.
        title: What stands above.

    Returns:
        The axes drawn on.
    """
    wide = 0.6 + 0.085 * max(map(len, title.split("\n")))
    ax = axes(ax, max(wide, 1.5 + 1.1 * len(groups)), 3.6)
    for i, values in enumerate(groups.values()):
        n = len(values)
        x = [i + (0.0 if n == 1 else 0.4 * (j / (n - 1) - 0.5)) for j in range(n)]
        ax.plot(x, values, "o", color="#2b6cb0", markersize=4, alpha=0.6)
        mean = math.fsum(values) / n if n else math.nan
        ax.hlines(mean, i - 0.32, i + 0.32, color="0.1", linewidth=2)
    ax.axhline(0, color="0.7", linewidth=0.8)
    named_axis("x", ax, list(groups))
    ax.set_xlim(-0.6, len(groups) - 0.4)
    bare(ax)
    return titled(ax, title, "", ylabel)


def _beside(series: Mapping[str, object]) -> float:
    """The width in inches of a legend beside the axes."""
    longest = max(min(LEGEND, len(name)) for name in series)
    return 0.6 + 0.075 * longest if len(series) > 1 else 0.0
