"""A split of a target as a figure: which drawer fits its rows, and what they hand it.

Rows keep their numbers. Where a figure has one place for several rows, such as a token with its
position, or all heads of a layer, it shows their sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checks import at_least_one
from ..graph import CONTENTS, Edge, Node
from .charts import token_figure
from .figures import PLAIN, bars, cell_map, mirrored_bars, waterfall
from .graphs import floor, layered_graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("bars", "tokens", "heads", "map", "waterfall", "graph", "patches")
"""The figures of a split."""
_STEPS = 40
_TOKEN, _PATCH = re.compile(r'"(.*?)"@\d+', re.DOTALL), re.compile(r"patch\[\d+,\d+\]")
_ADDED = re.compile(r"( \+ (position|type))+$")


@dataclass(frozen=True)
class Rows:
    """The rows of one prompt: nodes, positions, names and values; what they sum to, or None."""

    nodes: Sequence[Node | Edge]
    places: Sequence[int | None]
    names: Sequence[str]
    values: Sequence[float]
    target: str
    how: str
    total: float | None
    span: tuple[int, int]

    @property
    def title(self) -> str:
        """What the rows are a split of."""
        return f"{self.target}, {self.how}"


@dataclass(frozen=True)
class Split:
    """A split of a target, for one prompt or several, as plain numbers and names.

    Attributes:
        by: The kind of source that the target was split by.
        effect: What the split is of: "direct" or "total".
        sources: The node or edge of each row, and its position or None.
        names: The names of the rows, for each prompt.
        values: The numbers of the rows, for each prompt.
        targets: The name of the target, for each prompt.
        totals: The value of the target, for each prompt.
        sums: Whether the rows add up to the target.
        spans: Where the real tokens of each prompt start and stop.
    """

    by: str
    effect: str
    sources: Sequence[tuple[Node | Edge, int | None]]
    names: Sequence[Sequence[str]]
    values: Sequence[Sequence[float]]
    targets: Sequence[str]
    totals: Sequence[float]
    sums: bool
    spans: Sequence[tuple[int, int]]

    def rows(self) -> list[Rows]:
        """The rows of each prompt."""
        nodes, places = zip(*self.sources, strict=True) if self.sources else ((), ())
        how = f"by {self.by}" + (", total effect" if self.effect == "total" else "")
        parts = (self.names, self.values, self.targets, self.totals, self.spans)
        return [
            Rows(
                nodes,
                places,
                names,
                values,
                f"{target} = {total:.4g}",
                how,
                total if self.sums else None,
                span,
            )
            for names, values, target, total, span in zip(*parts, strict=True)
        ]


def unit_of(target: str) -> str:
    """Name the unit of a target by its name: logits for tokens, nats for log-probabilities.

    Args:
        target: The target's name.

    Returns:
        The unit for an axis.
    """
    name = target.removeprefix("change of ")
    other = "nats" if name.startswith("log p(") else "units of the target"
    return "logits" if name[:1] in ("'", '"') else other


def split_figure(
    ax: Axes | None,
    split: Split,
    kind: str | None,
    top: int,
    *,
    errors: Sequence[float] | None = None,
    grid: Callable[[], Sequence[Sequence[float]]] | None = None,
    image: Any = None,
) -> Axes:
    """Draw a split of one prompt, or of several beside each other.

    Args:
        ax: Axes to draw on, or None.
        split: The rows of all prompts.
        kind: One of :data:`KINDS`, or None for the one that fits.
        top: How many rows bars show, largest first. A graph shows three times as many.
        errors: Half the interval of every row of a single prompt, or None.
        grid: What gives the numbers of a picture's patches [row][column], or None.
        image: The picture itself, for its patches, or None.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If there is no such figure, or it does not fit the rows.
    """
    prompts, unit = split.rows(), unit_of(split.targets[0])
    top, first = at_least_one(top, "top"), prompts[0]
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not a figure. Use one of {', '.join(KINDS)}, or None.")
    kind = kind or _fitting(first, split.by)
    if image is not None and kind != "patches":
        raise ValueError(f"image= lies under patches, and kind={kind!r} draws none. Drop image=.")
    if len(prompts) > 1 and kind not in ("bars", "tokens"):
        raise ValueError(
            f"kind={kind!r} draws one prompt, and there are {len(prompts)}. Take one by its index, "
            "or use 'bars'."
        )
    edges = all(isinstance(node, Edge) for node in first.nodes)
    placed = any(place is not None for place in first.places)
    layered = any(isinstance(n, Node) and n.layer is not None for n in first.nodes)
    fits = {
        "tokens": placed and not edges,
        "map": placed and layered,
        "heads": layered,
        "waterfall": not edges,
        "graph": edges,
        "patches": grid is not None and any(map(_PATCH.search, first.names)),
    }
    if not fits.get(kind, True):
        raise ValueError(
            f"kind={kind!r} does not fit a split by {split.by}. Use kind='bars', or None."
        )
    if kind == "patches" and grid is not None:
        drawn = patch_figure(ax, grid(), unit=unit, title=first.title, image=image)
        return _beside(drawn, "not patches", _outside(first))
    if kind == "tokens":
        return _tokens(ax, prompts, unit)
    if kind == "bars":
        return _largest(ax, prompts, unit, top, errors)
    return _SINGLE[kind](ax, first, unit, top)


def _fitting(rows: Rows, by: str) -> str:
    placed = [node for node, at in zip(rows.nodes, rows.places, strict=True) if at is not None]
    if by == "token" and any(map(_PATCH.fullmatch, rows.names)):
        return "patches"
    if by == "token" and placed:
        return "tokens"
    if by == "edge" and len(rows.nodes) > 1:
        return "graph" if all(isinstance(node, Edge) for node in rows.nodes) else "bars"
    if by in ("head", "loading") and any(getattr(n, "kind", "") == "head" for n in rows.nodes):
        layered = any(getattr(n, "kind", "") == "mlp" for n in rows.nodes) or not placed
        return "heads" if layered else "map"
    if by != "feature" and any(isinstance(n, Node) and n.layer is not None for n in placed):
        return "map"
    return "waterfall" if by == "layer" and rows.total is not None else "bars"


# --- Tokens ---------------------------------------------------------------------------------------


def _tokens(ax: Axes | None, prompts: Sequence[Rows], unit: str) -> Axes:
    """Tokens in the order of the prompt, each with all that stands at its position."""
    names, values, first = [], [], prompts[0]
    for rows in prompts:
        sums: dict[int, list[float]] = {}
        texts: dict[int, str] = {}
        rest: dict[str, list[float]] = {}
        for node, place, name, value in zip(
            rows.nodes, rows.places, rows.names, rows.values, strict=True
        ):
            if place is not None and not rows.span[0] <= place < rows.span[1]:
                continue
            if place is None:
                kind = getattr(node, "kind", "")
                rest.setdefault(str(node) if kind == "change" else "constants", []).append(value)
                continue
            sums.setdefault(place, []).append(value)
            if getattr(node, "kind", "") in CONTENTS or place not in texts:
                texts[place] = _ADDED.sub("", name)
        places = sorted(sums)
        own = [_TOKEN.sub(r"\1", texts[at]) if len(prompts) > 2 else texts[at] for at in places]
        own += [
            f"{len(parts)} {name}" if name == "constants" else name for name, parts in rest.items()
        ]
        names.append(own)
        values.append(
            [math.fsum(parts) for parts in (*(sums[at] for at in places), *rest.values())]
        )
    return token_figure(ax, names, values, [rows.target for rows in prompts], first.how, unit)


# --- Largest rows ---------------------------------------------------------------------------------


def _largest(
    ax: Axes | None,
    prompts: Sequence[Rows],
    unit: str,
    top: int,
    errors: Sequence[float] | None,
) -> Axes:
    """The rows of the largest |values|, largest first; rows of exactly 0 are left out."""
    first = prompts[0]
    size = [
        max(abs(v) if v == v else 0.0 for v in row)
        for row in zip(*(p.values for p in prompts), strict=True)
    ]
    order = [i for i in sorted(range(len(size)), key=lambda i: -size[i]) if size[i]]
    shown, zeros = order[:top], len(size) - len(order)
    counts = {"more": len(order) - len(shown), "exactly 0": zeros}
    left = " and ".join(f"{n} {what}" for what, n in counts.items() if n)
    names = [[rows.names[i] for i in shown] for rows in prompts]
    values = [[rows.values[i] for i in shown] for rows in prompts]
    if len(prompts) == 1:
        spread = None if errors is None else [errors[i] for i in shown]
        return bars(
            ax, names[0], values[0], unit=unit, title=first.title, errors=spread, left_out=left
        )
    if len(prompts) == 2:
        titles, sides = (first.target, prompts[1].target), (values[0], values[1])
        pair = names[0], names[1]
        return mirrored_bars(ax, pair, sides, unit=unit, titles=titles, middle=first.how)
    targets = [rows.target for rows in prompts]
    return cell_map(ax, values, targets, names[0], unit=unit, title=first.how)


# --- One prompt, by layer -------------------------------------------------------------------------


def head_cells(
    nodes: Sequence[Node | Edge], values: Sequence[float]
) -> tuple[list[str], list[str], list[list[float]], dict[str, float]]:
    """Lay rows out by layer and head, with columns for MLPs, experts and constants.

    Args:
        nodes: The node of each row.
        values: The number of each row. Rows of one cell are summed.

    Returns:
        Names of the layers, names of the columns, the cells (nan where there is nothing), and what
        has no layer, by name.
    """
    cells: dict[tuple[int, str], list[float]] = {}
    beside: dict[str, list[float]] = {}
    for node, value in zip(nodes, values, strict=True):
        if isinstance(node, Node) and node.layer is not None:
            cells.setdefault((node.layer, _column(node)), []).append(value)
        else:
            beside.setdefault(str(node), []).append(value)
    layers = sorted({layer for layer, _ in cells})
    order = {"MLP": 1, "constants": 3}
    names = sorted(
        {column for _, column in cells},
        key=lambda c: (0 if c[0] == "H" else order.get(c, 2), len(c), c),
    )
    grid = [
        [math.fsum(cells[at]) if (at := (layer, name)) in cells else math.nan for name in names]
        for layer in layers
    ]
    return (
        [f"L{layer}" for layer in layers],
        names,
        grid,
        {name: math.fsum(parts) for name, parts in beside.items()},
    )


def _column(node: Node) -> str:
    if node.kind == "constant":
        return "past" if node.name == "past" else "constants"
    if node.kind == "expert":
        return "E.shared" if node.index is None else f"E{node.index}"
    return {"head": f"H{node.index}", "mlp": "MLP", "layer": "block"}.get(node.kind, node.kind)


def _heads(ax: Axes | None, rows: Rows, unit: str, top: int) -> Axes:
    names, across, grid, beside = head_cells(rows.nodes, rows.values)
    drawn = cell_map(ax, grid, names, across, unit=unit, title=rows.title)
    return _beside(drawn, "not by layer", beside)


def _beside(drawn: Axes, what: str, sums: Mapping[str, float]) -> Axes:
    """Name below a map the numbers that it has no place for, so that nothing is left out."""
    parts = [f"{name} {sums[name]:+.3g}" for name in sorted(sums, key=lambda n: -abs(sums[n]))]
    longest = max(map(len, [*parts, ""])) + 2
    wide = max(1, int(drawn.figure.bbox.width / drawn.figure.dpi / (0.085 * longest)))
    lines = [", ".join(parts[i : i + wide]) for i in range(0, len(parts), wide)]
    if lines:
        drawn.set_xlabel(f"{what}: " + "\n".join(lines), fontsize="small", **PLAIN)
    return drawn


def _outside(rows: Rows) -> dict[str, float]:
    """Sums of the rows at no patch: by the place's own name, and of all constants."""
    named = list(zip(rows.nodes, rows.places, rows.names, rows.values, strict=True))
    patches = {place for _, place, name, _ in named if _PATCH.search(name)}
    names: dict[int | None, str] = {None: "constants"}
    for node, place, name, _ in named:
        if getattr(node, "kind", "") in CONTENTS:
            names.setdefault(place, name)
    sums: dict[str, list[float]] = {}
    for _, place, name, value in named:
        if place not in patches:
            sums.setdefault(names.get(place, name), []).append(value)
    return {name: math.fsum(parts) for name, parts in sums.items()}


def _map(ax: Axes | None, rows: Rows, unit: str, top: int) -> Axes:
    """Nodes by position; where they are many, all of a layer's heads in one row."""
    sources = list(zip(rows.nodes, rows.places, rows.names, rows.values, strict=True))
    placed = [(n, p, name, v) for n, p, name, v in sources if p is not None and isinstance(n, Node)]
    whole = len({node for node, *_ in placed}) > _STEPS
    mixed = any(node.layer is not None and node.kind != "constant" for node, *_ in placed)
    cells: dict[tuple[str, int], list[float]] = {}
    texts: dict[int, str] = {}
    for node, place, name, value in placed:
        row = _stage(node) if whole or (mixed and node.kind == "constant") else str(node)
        cells.setdefault((row, place), []).append(value)
        read = name.rpartition(" ← ")[2] if " ← " in name else name
        if _TOKEN.search(read):
            texts[place] = _ADDED.sub("", read)
    down = list(dict.fromkeys(row for row, _ in cells))
    first, last = (end(place for _, place in cells) for end in (min, max))
    start, across = min(first, rows.span[0] or first), list(range(first, last + 1))
    grid = [
        [math.fsum(cells[at]) if (at := (row, place)) in cells else math.nan for place in across]
        for row in down
    ]
    return cell_map(
        ax,
        grid,
        down,
        [texts.get(place, str(place - start)) for place in across],
        unit=unit,
        title=rows.title,
        axis_names=("", "position"),
    )


def _stage(node: Node) -> str:
    """Where in the run a node writes: "L3 heads", "L3 MLP", "L3 constants", or its own name."""
    if node.layer is None:
        return str(node)
    return f"L{node.layer} constants" if node.kind == "constant" else floor(node, node.layer)[1]


def _waterfall(ax: Axes | None, rows: Rows, unit: str, top: int) -> Axes:
    """Rows in the order of the run; where they are many, all of a layer's heads in one step."""
    nodes = [node for node in rows.nodes if isinstance(node, Node)]
    whole = len(set(nodes)) > _STEPS
    steps: dict[str, list[float]] = {}
    for node, value in zip(nodes, rows.values, strict=True):
        steps.setdefault(_stage(node) if whole else str(node), []).append(value)
    return waterfall(
        ax,
        list(steps),
        [math.fsum(parts) for parts in steps.values()],
        unit=unit,
        title=rows.title,
        total=None if rows.total is None else ("target", rows.total),
    )


def _graph(ax: Axes | None, rows: Rows, unit: str, top: int) -> Axes:
    scores: dict[Edge, float] = {}
    for node, value in zip(rows.nodes, rows.values, strict=True):
        if isinstance(node, Edge) and value:
            scores[node] = scores.get(node, 0.0) + value
    return graph_figure(ax, list(scores), scores, title=rows.title, unit=unit, top=3 * top)


def graph_figure(
    ax: Axes | None,
    edges: Sequence[Edge],
    scores: Mapping[Edge, float],
    *,
    title: str,
    unit: str,
    top: int,
) -> Axes:
    """Draw the edges of the largest |scores| by layer, and say how many others there are.

    Args:
        ax: Axes to draw on, or None.
        edges: The edges to choose from.
        scores: The score of every edge that has one.
        title: What stands above.
        unit: What the scores count.
        top: How many edges are drawn.

    Returns:
        The axes drawn on.
    """
    order = sorted(edges, key=lambda edge: -abs(scores.get(edge, 0.0)))
    left = f" (the {top} largest of {len(order)} edges)" if len(order) > top else ""
    return layered_graph(ax, order[:top], scores, title=title + left, unit=unit)


_SINGLE: dict[str, Any] = {"heads": _heads, "map": _map, "waterfall": _waterfall, "graph": _graph}


def patch_figure(
    ax: Axes | None, grid: Sequence[Sequence[float]], *, unit: str, title: str, image: Any = None
) -> Axes:
    """Draw the numbers of a picture's patches as a map, over the picture where it is given.

    Args:
        ax: Axes to draw on, or None.
        grid: The number of every patch [row][column].
        unit: What the numbers count.
        title: What stands above.
        image: The picture [row, column] or [row, column, channel], or None.

    Returns:
        The axes drawn on.
    """
    names = ([str(i) for i in range(len(grid))], [str(i) for i in range(len(grid[0]))])
    return cell_map(ax, grid, *names, unit=unit, title=title, image=image)
