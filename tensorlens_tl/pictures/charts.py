"""Drawers of static figures, for matplotlib: curves, intervals, dots, graphs, paths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..graph import Edge, Node, owner
from .figures import (
    ADDS,
    LONGER,
    MOST_LABELS,
    NEUTRAL,
    PLAIN,
    TAKES,
    axes,
    bare,
    bars,
    beside_legend,
    cell_map,
    colour,
    label,
    limit,
    mirrored_bars,
    named_axis,
    titled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Interval = tuple[float, float, float]
"""A value, and the ends of its interval."""
MARKERS = "osD^vX"


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
    logarithmic: bool = False,
) -> Axes:
    """Draw curves, each with a band for its intervals. Markers and dashes tell them apart, too.

    Args:
        ax: Axes to draw on, or None.
        x: Where the points lie.
        series: The points of each curve, by its name.
        title: What stands above.
        xlabel: What x is.
        ylabel: What the curves are.
        logarithmic: Whether x is drawn on a logarithmic scale.

    Returns:
        The axes drawn on.
    """
    ax = axes(ax, 5.2 + _beside(series), 3.8)
    looks = [(m, d) for d in ("-", "--", ":", "-.") for m in MARKERS]
    for i, (name, points) in enumerate(series.items()):
        values, low, high = zip(*points, strict=True)
        marker, dash = looks[i % len(looks)]
        (line,) = ax.plot(x, values, marker=marker, linestyle=dash, markersize=4, label=name)
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    if logarithmic:
        ax.set_xscale("log")
    beside_legend(ax, len(series))
    bare(ax)
    return titled(ax, title, xlabel, ylabel)


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
            values, y, xerr=ends, fmt=MARKERS[i % len(MARKERS)], markersize=4, capsize=2, label=name
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
    ax = axes(ax, 1.5 + 1.1 * len(groups), 3.6)
    for i, values in enumerate(groups.values()):
        n = len(values)
        x = [i + (0.0 if n == 1 else 0.4 * (j / (n - 1) - 0.5)) for j in range(n)]
        ax.plot(x, values, "o", color="#2b6cb0", markersize=4, alpha=0.6)
        ax.hlines(math.fsum(values) / n, i - 0.32, i + 0.32, color="0.1", linewidth=2)
    ax.axhline(0, color="0.7", linewidth=0.8)
    named_axis("x", ax, list(groups))
    ax.set_xlim(-0.6, len(groups) - 0.4)
    bare(ax)
    return titled(ax, title, "", ylabel)


def _beside(series: Mapping[str, object]) -> float:
    """The width in inches of a legend beside the axes."""
    return 0.6 + 0.075 * max(map(len, series)) if len(series) > 1 else 0.0


# --- Graphs ---------------------------------------------------------------------------------------

_DASHES: dict[str, Any] = {"q": (0, (5, 2)), "k": (0, (1.2, 1.6))}
"""How edges into queries and keys are drawn: they are part of no sum."""
_THICKEST = 3.5


def floor(node: Node, n_layers: int) -> tuple[int, str]:
    """Tell how high a node stands: its half-step of the run, and what stands there."""
    if node.layer is None:
        return (2 * n_layers + 1, "logits") if node.kind == "logits" else (0, "embeddings")
    if node.kind == "layer":
        return 2 * node.layer + 1, f"L{node.layer}"
    above = node.kind in ("mlp", "expert", "neuron") or node.name.startswith(_OF_MLPS)
    what = "MLP" if above else "heads"
    return 2 * node.layer + 1 + above, f"L{node.layer} {what}"


_OF_MLPS = ("ln2", "b_in", "b_out", "b_gate")


def layered_graph(
    ax: Axes | None, edges: Sequence[Edge], scores: Mapping[Edge, float], *, title: str, unit: str
) -> Axes:
    """Draw nodes by layer, from the embeddings at the bottom to the logits on top.

    Heads of one number stand above each other. A line is as thick as √|score|; its colour is the
    sign of the score. Edges into queries are dashed, edges into keys dotted.

    Args:
        ax: Axes to draw on, or None.
        edges: The edges that are drawn.
        scores: The score of every edge that has one.
        title: What stands above.
        unit: What the scores count.

    Returns:
        The axes drawn on.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyArrowPatch

    nodes = list(dict.fromkeys(n for e in edges for n in (e.src, owner(e.dest))))
    deepest = max((n.layer for n in nodes if n.layer is not None), default=0) + 1
    floors = {node: floor(node, deepest) for node in nodes}
    rows = {height: i for i, height in enumerate(sorted({at for at, _ in floors.values()}))}
    heads = sorted({n.index or 0 for n in nodes if n.kind == "head"})
    place: dict[Node, tuple[float, float]] = {}
    for height in rows:
        own = [node for node in nodes if floors[node][0] == height]
        alone = [node for node in own if node.kind != "head"]
        for node in own:
            x = float(heads.index(node.index or 0)) if node.kind == "head" else 0.0
            if node.kind != "head":
                middle = (len(heads) - 1) / 2 if heads else 0.0
                x = middle + alone.index(node) - (len(alone) - 1) / 2
                if len(alone) < len(own):  # constants of a layer stand beside its heads
                    x = -1.0 - alone.index(node)
            place[node] = (x, float(rows[height]))
    wide = max((x for x, _ in place.values()), default=0) - min(
        [0.0, *(x for x, _ in place.values())]
    )
    ax = axes(ax, 2.6 + 0.72 * (wide + 1), 1.6 + 0.62 * len(rows))
    largest = limit(scores.get(edge, 0.0) for edge in edges)
    beside: dict[tuple[Node, Node], int] = {}
    for edge in sorted(edges, key=lambda e: abs(scores.get(e, 0.0))):
        score = scores.get(edge)
        ends = edge.src, owner(edge.dest)
        turn = beside[ends] = beside.get(ends, -1) + 1
        far = rows[floors[ends[1]][0]] - rows[floors[ends[0]][0]]
        straight = place[ends[0]][0] == place[ends[1]][0] and far > 1
        bend = (0.28 if straight else 0.06) + 0.1 * turn
        size = 1.0 if score is None else max(0.5, _THICKEST * math.sqrt(abs(score) / largest))
        ax.add_patch(
            FancyArrowPatch(
                place[ends[0]],
                place[ends[1]],
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-",
                shrinkA=9,
                shrinkB=9,
                linewidth=size,
                linestyle=_DASHES.get(edge.dest.name, "-"),
                color=NEUTRAL if score is None else colour(score),
                alpha=0.8,
                label=str(edge),
                zorder=1,
            )
        )
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "0.4", "linewidth": 0.8}
    for node, (x, y) in place.items():
        ax.text(x, y, str(node), ha="center", va="center", fontsize="x-small", bbox=box, **PLAIN)
    names = dict(floors.values())
    ax.set_yticks(list(rows.values()), [names[height] for height in rows], fontsize="small")
    ax.set_xticks([])
    ax.set_xlim(min([0.0, *(x for x, _ in place.values())]) - 0.8, _right(place) + 0.8)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    kinds = {edge.dest.name for edge in edges if edge.dest.name in _DASHES}
    signs = {colour(scores[e]) for e in edges if e in scores}
    looks: list[tuple[str, str, Any]] = [(name, ADDS, "-") for name in ["adds"] if ADDS in signs]
    looks += [(name, TAKES, "-") for name in ["takes away"] if TAKES in signs]
    looks += [(f"into {w}", "0.2", _DASHES[k]) for k, w in _READERS.items() if k in kinds]
    handles = [Line2D([], [], color=c, linestyle=d, label=name) for name, c, d in looks]
    if handles:
        ax.legend(
            handles=handles,
            fontsize="x-small",
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(1, 1),
        )
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)
    scored = any(edge in scores for edge in edges)
    return titled(ax, title, f"width: √|score|, up to {largest:.3g} {unit}" if scored else "")


_READERS = {"q": "queries", "k": "keys"}


def _right(place: Mapping[Node, tuple[float, float]]) -> float:
    return max((x for x, _ in place.values()), default=0.0)


def path_rows(
    ax: Axes | None,
    paths: Sequence[tuple[str, Sequence[tuple[Node, str]], float]],
    *,
    title: str,
    unit: str,
) -> Axes:
    """Draw each path as a row of its nodes, from the source on the left to the logits.

    Args:
        ax: Axes to draw on, or None.
        paths: Source, nodes with their names, and contribution of each path.
        title: What stands above.
        unit: What contributions count.

    Returns:
        The axes drawn on.
    """
    passed = [node for _, nodes, _ in paths for node, _ in nodes]
    deepest = max((node.layer for node in passed if node.layer is not None), default=0) + 1
    floors = dict(sorted(floor(node, deepest) for node in passed))
    column = {height: i + 1 for i, height in enumerate(floors)}
    end = len(floors) + 1
    ax = axes(ax, 3.2 + 0.8 * end, 1.2 + 0.34 * max(2, len(paths)))
    largest = limit(value for _, _, value in paths)
    for i, (_, nodes, value) in enumerate(paths):
        stops = [column[floor(node, deepest)[0]] for node, _ in nodes]
        size = max(0.5, _THICKEST * math.sqrt(abs(value) / largest))
        ax.plot(
            [0, *stops, end], [i] * (len(stops) + 2), color=colour(value), linewidth=size, zorder=1
        )
        for x, (_, name) in zip(stops, nodes, strict=True):
            ax.text(
                x,
                i,
                name,
                ha="center",
                va="center",
                fontsize="x-small",
                bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "0.4"},
                **PLAIN,
            )
        ax.annotate(
            f"{value:+.3g}",
            (end, i),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    ax.set_xticks(range(end + 1), ["source", *floors.values(), "logits"], fontsize="small")
    ax.tick_params(axis="x", labelrotation=90 if end > 7 else 0)
    ax.set_yticks(
        range(len(paths)),
        [label(source, LONGER) for source, _, _ in paths],
        fontsize="small",
        **PLAIN,
    )
    ax.set_xlim(-0.3, end + 0.7)
    ax.set_ylim(len(paths) - 0.4, -0.6)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    return titled(ax, title, f"contribution in {unit}; width: √|contribution|")
