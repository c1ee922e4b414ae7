"""Nodes and the edges between them as a view: layers from below, columns by position or by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from ..graph import Edge, Node, feature_site, owner
from .graphs import floor
from .page import View

READS = ("", "v", "q", "k")
"""What an edge is read by: a whole node, or the value, query or key input of a head."""
_PARTS = ((0, "heads"), (1, "MLP"))
_SHAPES = {name: name for name in ("head", "mlp", "expert", "feature", "error")}
_SHAPES["logits"] = "target"


def graph_view(
    nodes: Sequence[tuple[str, Node, float]],
    links: Iterable[tuple[int, int, str, float]],
    tokens: Sequence[str] = (),
    positions: Sequence[int] = (),
    *,
    unit: str = "logits",
    effect: str = "total effect",
    sums: bool = True,
    legend: str = "",
    json: str | None = None,
    ids: Sequence[str] = (),
    heading: str = "",
) -> View:
    """A view of nodes and edges.

    Args:
        nodes: Label, node and effect of every node; the target is the last one. The effect is nan
            where it is not known.
        links: Number of the writer, number of the reader, the input that reads (one of
            :data:`READS`) and weight of every edge.
        tokens: The tokens of the prompt, which are the columns. With none, the columns are heads by
            number, the MLP, experts and constants.
        positions: The position of every node, as the number of its token.
        unit: What weights are counted in.
        effect: What a node's own number is.
        sums: Whether all edges into a node sum to its own number.
        legend: A sentence about what is drawn.
        json: The graph in a file of its own, to be saved from the page. None is no such file.
        ids: The name of every node in that file; () where it has no groups of nodes.
        heading: A line above the view.

    Returns:
        The view of this graph.
    """
    found = list(links)
    kept = [node for _, node, _ in nodes]
    depth = max((node.layer + 1 for node in kept if node.layer is not None), default=0)
    names = [_column(node) for node in kept]
    order = sorted(set(names))
    columns = list(tokens) if tokens else [name for *_, name in order]
    column = list(positions) if tokens else [order.index(name) for name in names]
    heights = [_height(node, depth) for node in kept]
    rows = dict(_levels(depth)) | dict(heights)
    at = {height: i for i, height in enumerate(sorted(rows))}
    data = {
        "name": heading or "Graph",
        "labels": [label for label, *_ in nodes],
        "kinds": [_shape(node) for node in kept],
        "column": np.array(column, np.int32),
        "row": np.array([at[height] for height, _ in heights], np.int32),
        "effect": np.array([x for *_, x in nodes], np.float64),
        "src": np.array([link[0] for link in found], np.uint32),
        "dest": np.array([link[1] for link in found], np.uint32),
        "reads": np.array([READS.index(link[2]) for link in found], np.uint8),
        "weight": np.array([link[3] for link in found], np.float64),
        "columns": columns,
        "tokens": bool(tokens),
        "rows": [rows[height] for height in at],
        "unit": unit,
        "effect_name": effect,
        "sums": sums and all(math.isfinite(x) for *_, x in nodes),
        "legend": legend,
        "json": None if json is None else np.frombuffer(json.encode("utf-8", "replace"), np.uint8),
        "ids": list(ids),
    }
    return View("graph", data, heading)


def edge_view(
    edges: Sequence[Edge], weights: Sequence[float], unit: str = "logits", json: str | None = None
) -> View:
    """A view of edges whose positions are summed.

    Args:
        edges: Edges of one model.
        weights: The weight of each; nan where edges have none, and are drawn alike.
        unit: What weights are counted in.
        json: The edges in a file of their own, to be saved from the page, or None.

    Returns:
        The view of these edges, with one node for all inputs of a head.
    """
    found = dict.fromkeys(node for edge in edges for node in (edge.src, owner(edge.dest)))
    order = sorted(found, key=lambda node: node.kind == "logits")
    number = {node: i for i, node in enumerate(order)}
    unknown = all(map(math.isnan, weights))
    links = [
        (
            number[edge.src],
            number[owner(edge.dest)],
            edge.dest.name if edge.dest.kind == "head" else "",
            1.0 if unknown else weight,
        )
        for edge, weight in zip(edges, weights, strict=True)
    ]
    return graph_view(
        [(str(node), node, math.nan) for node in order],
        links,
        unit="(no score)" if unknown else unit,
        legend="Positions are summed." + (" The edges have no scores." if unknown else ""),
        json=json,
    )


Stop = tuple[str, Node]
"""A node that a path passes, and its name there."""


def flow_view(paths: Sequence[tuple[Stop, Sequence[Stop], float]], unit: str = "logits") -> View:
    """A view of paths as a flow: each edge carries the sum of the paths along it.

    Args:
        paths: The source, the nodes passed, and the contribution of each.
        unit: What contributions are counted in.

    Returns:
        The view of this flow.
    """
    through: dict[Stop, float] = {}
    links: dict[tuple[Stop, Stop], float] = {}
    end = "target", Node("logits")
    for start, passed, value in paths:
        stops = [start, *passed, end]
        for stop in stops:
            through[stop] = through.get(stop, 0.0) + value
        for pair in pairwise(stops):
            links[pair] = links.get(pair, 0.0) + value
    order = [*(stop for stop in through if stop != end), *([end] if through else [])]
    number = {stop: i for i, stop in enumerate(order)}
    return graph_view(
        [(*stop, through[stop]) for stop in order],
        [(number[a], number[b], "", value) for (a, b), value in links.items()],
        unit=unit,
        effect="paths through it",
        sums=False,
        legend="An edge carries the sum of the listed paths along it. Paths cancel: none is a "
        "share.",
    )


def _shape(node: Node) -> str:
    if node.kind in _SHAPES:
        return _SHAPES[node.kind]
    return (
        "token" if (node.enters and node.kind != "constant") or node.kind == "input" else "constant"
    )


def _height(node: Node, depth: int) -> tuple[int | float, str]:
    """How high a node stands, and what stands there; what is added last stands with the target."""
    if node.layer is not None:
        return floor(node, depth)
    below = node.enters or node.kind in ("input", "rest") or node.name == "constants"
    return (0, "input") if below else (2 * depth + 1, "target")


def _levels(depth: int) -> list[tuple[int | float, str]]:
    """The rows of every model, drawn also where no node stands."""
    parts = [(2 * n + 1 + i, f"L{n} {part}") for n in range(depth) for i, part in _PARTS]
    return [(0, "input"), *parts, (2 * depth + 1, "target")]


def _column(node: Node) -> tuple[int, int, str]:
    """Where a node stands among those of its layer, and the name of that column."""
    if node.kind == "head":
        return 1, node.index or 0, f"H{node.index}"
    if node.kind == "expert":
        return 3, -1 if node.index is None else node.index, str(node).partition("E")[2].lstrip(".")
    if feature_site(node) is not None:
        return 5, 0, "features"
    if node.kind == "constant" and not node.enters:
        return 4, 0, "constants"
    return 2, 0, "MLP"
