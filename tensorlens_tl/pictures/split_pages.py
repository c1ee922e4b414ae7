"""A split of a target as a page: all rows as a table, and by layer or by patch as a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..graph import Edge, Node
from .maps import depth, map_view, panel
from .node_graph import edge_view
from .page import Page, View
from .splits import Rows, Split, head_cells, unit_of
from .tables import table_view

FIRST_TOKEN = "The first token is a source like any other."
MOST = 20_000
"""Rows that a page holds; of more, the largest."""


def grid_view(
    names: Sequence[str],
    across: Sequence[str],
    cells: Sequence[Sequence[float]],
    axes: tuple[str, str],
    unit: str,
    heading: str = "",
) -> View:
    """A view of a small grid of numbers with names on both sides.

    Args:
        names: Names of the rows.
        across: Names of the columns.
        cells: The numbers [row][column]; nan where there is nothing.
        axes: What a row is, and what a column is.
        unit: What the numbers are counted in.
        heading: A line above the view.

    Returns:
        The view of this grid.
    """
    shown = panel(heading or "All", unit, [depth("", np.array(cells, dtype=np.float64))])
    return map_view(names, across, [shown], axes, named=True)


def split_page(
    split: Split,
    notes: Sequence[str],
    grids: Sequence[Sequence[Sequence[float]]] = (),
    errors: Sequence[float] | None = None,
) -> Page:
    """Make the page of a split: every row, whatever the text form leaves out.

    Args:
        split: The rows of all prompts.
        notes: How exact the rows are.
        grids: For every prompt, the numbers of a picture's patches [row][column]; empty for none.
        errors: The standard error of every row of a single prompt, or None.

    Returns:
        The page, with one tab for each prompt.
    """
    views, unit = [], unit_of(split.targets[0])
    for number, rows in enumerate(split.rows()):
        parts = []
        if len(grids) > number:
            own = grids[number]
            down, across = ([str(i) for i in range(len(axis))] for axis in (own, own[0]))
            axes = ("patch row", "patch column")
            parts.append(grid_view(down, across, own, axes, unit, "Patches, with their positions"))
        kinds = {node.kind for node in rows.nodes if isinstance(node, Node)}
        if kinds & {"head", "mlp", "expert", "layer"}:
            down, across, cells, _ = head_cells(rows.nodes, rows.values)
            axes, heading = ("layer", "part"), "By layer, positions summed"
            parts.append(grid_view(down, across, cells, axes, unit, heading))
        edges = [node for node in rows.nodes if isinstance(node, Edge)]
        if edges and len(edges) == len(rows.nodes):
            parts.append(edge_view(edges, rows.values, unit))
        parts.append(_all_rows(rows, split.by, unit, errors))
        tab = f"{number + 1}: {rows.target}"
        views += [replace(part, tab=tab) for part in parts]
    title = split.rows()[0].title if len(split.targets) == 1 else f"{len(split.targets)} prompts"
    return Page(title, views, [*notes, FIRST_TOKEN], tabs=len(split.targets) > 1, height=620)


def _all_rows(rows: Rows, by: str, unit: str, errors: Sequence[float] | None) -> View:
    inside = [
        i
        for i, place in enumerate(rows.places)
        if place is None or rows.span[0] <= place < rows.span[1]
    ]
    left = ""
    if len(inside) > MOST:
        left = f" The {len(inside) - MOST} smallest rows are not in this page."
        largest = sorted(inside, key=lambda i: -abs(rows.values[i]))[:MOST]
        inside = sorted(largest)
    columns = [[rows.values[i] for i in inside]]
    names = [unit]
    if errors is not None:
        columns.append([errors[i] for i in inside])
        names.append("standard error")
    labels = [[rows.names[i]] for i in inside]
    values = np.array(columns, dtype=np.float64).T
    sort = -1 if by in ("token", "layer", "order") else 0
    return table_view([by], names, labels, values, f"{rows.title}.{left}", sort=sort)
