"""Drawers of static figures, for matplotlib: nodes and edges by layer, and paths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..graph import FEATURE_SITES, Edge, Node, feature_site, owner
from .figures import ADDS, LONGER, NEUTRAL, PLAIN, TAKES, axes, colour, label, limit, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[float, float]
Link = tuple[Place, Place, str, float | None, str]
"""Where an edge starts and ends, the input that reads, its score or None, and its name."""
_BOX = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "0.4", "linewidth": 0.8}
_DASHES: dict[str, Any] = {"q": (0, (5, 2)), "k": (0, (1.2, 1.6))}
"""How edges into queries and keys are drawn: they are part of no sum."""
_THICKEST = 3.5


def floor(node: Node, n_layers: int) -> tuple[int | float, str]:
    """Tell how high a node stands: its half-step of the run, and what stands there."""
    if node.layer is None:
        return (2 * n_layers + 1, "logits") if node.kind == "logits" else (0, "embeddings")
    if (site := feature_site(node)) is not None:
        return 2 * node.layer + _ABOVE[site.partition(".")[2]], site
    if node.kind == "layer":
        return 2 * node.layer + 1, f"L{node.layer}"
    above = node.kind in ("mlp", "expert", "neuron") or node.name.startswith(_OF_MLPS)
    what = "MLP" if above else "heads"
    return 2 * node.layer + 1 + above, f"L{node.layer} {what}"


_ABOVE: dict[str, float] = dict(zip(FEATURE_SITES, (0.5, 1.2, 1.3, 1.5, 2.3, 2.5), strict=True))
"""How high the site of an SAE is above the start of its block."""
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
    links: list[Link] = [
        (place[edge.src], place[owner(edge.dest)], edge.dest.name, scores.get(edge), str(edge))
        for edge in sorted(edges, key=lambda e: abs(scores.get(e, 0.0)))
    ]
    largest = _lines(ax, links)
    for node, (x, y) in place.items():
        ax.text(x, y, str(node), ha="center", va="center", fontsize="x-small", bbox=_BOX, **PLAIN)
    names = dict(floors.values())
    ax.set_yticks(list(rows.values()), [names[height] for height in rows], fontsize="small")
    ax.set_xticks([])
    ax.set_xlim(min([0.0, *(x for x, _ in place.values())]) - 0.8, _right(place) + 0.8)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    scored = any(edge in scores for edge in edges)
    return titled(ax, title, f"width: √|score|, up to {largest:.3g} {unit}" if scored else "")


def placed_graph(
    ax: Axes | None,
    nodes: Sequence[tuple[Node, int]],
    links: Sequence[tuple[int, int, str, float]],
    tokens: Sequence[str],
    *,
    title: str,
    unit: str,
) -> Axes:
    """Draw nodes by layer and position, where each of them writes; lines as in a layered graph.

    Args:
        ax: Axes to draw on, or None.
        nodes: Node and position of every node. Those without an edge are not drawn.
        links: Number of the writer, number of the reader, the input that reads, and the score.
        tokens: The tokens of the prompt.
        title: What stands above.
        unit: What the scores count.

    Returns:
        The axes drawn on.
    """
    shown = sorted({end for link in links for end in link[:2]})
    deepest = max((n.layer for n, _ in nodes if n.layer is not None), default=0) + 1
    floors = {i: floor(nodes[i][0], deepest) for i in shown}
    rows = {height: y for y, height in enumerate(sorted({at for at, _ in floors.values()}))}
    cells: dict[tuple[int, float], list[int]] = {}
    for i in shown:
        cells.setdefault((nodes[i][1], floors[i][0]), []).append(i)
    left, middles = 0.0, dict[int, float]()
    for at in sorted({at for at, _ in cells}):  # a column is as wide as its fullest cell
        width = max(len(own) for (here, _), own in cells.items() if here == at)
        middles[at], left = left + width / 2, left + width
    place = {
        i: (middles[at] + k - (len(own) - 1) / 2, float(rows[height]))
        for (at, height), own in cells.items()
        for k, i in enumerate(own)
    }
    ax = axes(ax, 2.6 + 0.62 * left, 2.0 + 0.62 * len(rows))
    largest = _lines(
        ax,
        [
            (place[src], place[dest], reads, score, f"{nodes[src][0]}→{nodes[dest][0]}")
            for src, dest, reads, score in sorted(links, key=lambda link: abs(link[3]))
        ],
    )
    for i, (x, y) in place.items():
        name = str(nodes[i][0])
        if (site := feature_site(nodes[i][0])) is not None:  # the row names it
            name = name.removeprefix(site).removeprefix(".")
        ax.text(x, y, name, ha="center", va="center", fontsize="x-small", bbox=_BOX, **PLAIN)
    names = dict(floors.values())
    ax.set_yticks(list(rows.values()), [names[height] for height in rows], fontsize="small")
    labels = [f"{label(tokens[at])} @{at}" for at in middles]
    ax.set_xticks(list(middles.values()), labels, fontsize="small", rotation=90, **PLAIN)
    ax.set_xlim(-0.3, left + 0.3)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    return titled(ax, title, f"width: √|score|, up to {largest:.3g} {unit}")


def _lines(ax: Axes, links: Sequence[Link]) -> float:
    """Draw edges, and a legend beside them; the largest |score| is returned."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyArrowPatch

    largest = limit(score or 0.0 for *_, score, _ in links)
    beside: dict[tuple[Place, Place], int] = {}
    for src, dest, reads, score, name in links:
        turn = beside[src, dest] = beside.get((src, dest), -1) + 1
        straight = src[0] == dest[0] and dest[1] - src[1] > 1
        bend = (0.28 if straight else 0.06) + 0.1 * turn
        size = 1.0 if score is None else max(0.5, _THICKEST * math.sqrt(abs(score) / largest))
        ax.add_patch(
            FancyArrowPatch(
                src,
                dest,
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-",
                shrinkA=9,
                shrinkB=9,
                linewidth=size,
                linestyle=_DASHES.get(reads, "-"),
                color=NEUTRAL if score is None else colour(score),
                alpha=0.8,
                label=name,
                zorder=1,
            )
        )
    kinds = {reads for _, _, reads, _, _ in links if reads in _DASHES}
    signs = {colour(score) for *_, score, _ in links if score is not None}
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
    return largest


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
