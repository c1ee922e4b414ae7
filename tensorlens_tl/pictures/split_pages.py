"""A split of a target as a page: all rows as a table, and by layer or by patch as a map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..checks import spelled
from ..graph import Edge, Node
from .maps import depth, map_view, panel
from .node_graph import edge_view
from .page import Page, Paged, View
from .splits import Rows, Split, head_cells, unit_of
from .tables import table_view

FIRST_TOKEN = "The first token is a source like any other."
MOST = 20_000
"""Rows that a page holds; of more, the largest."""
MOST_PIXELS = 512
"""Rows or columns of pixels that a page holds of a picture; of more, every second or so."""


def grid_view(
    names: Sequence[str],
    across: Sequence[str],
    cells: Sequence[Sequence[float]],
    axes: tuple[str, str],
    unit: str,
    heading: str = "",
    patches: bool = False,
    signed: bool = True,
) -> View:
    """A view of a small grid of numbers with names on both sides.

    Args:
        names: Names of the rows.
        across: Names of the columns.
        cells: The numbers [row][column]; nan where there is nothing.
        axes: What a row is, and what a column is.
        unit: What the numbers are counted in.
        heading: A line above the view.
        patches: Whether the cells are the patches of a picture, which may lie under them.
        signed: Whether the numbers can be below 0.

    Returns:
        The view of this grid.
    """
    whole = np.array(cells, dtype=np.float64)
    filled = np.where(np.isnan(whole), 0, whole)
    sums = {"sums": filled.sum(1), "columns": filled.sum(0)}
    shown = panel(heading or "All", unit, [depth("", whole) | sums], signed=signed)
    view = map_view(names, across, [shown], axes, named=True)
    return replace(view, data={**view.data, "patches": True}) if patches else view


def patch_view(grid: Sequence[Sequence[float]], unit: str, signed: bool = True) -> View:
    """A view of the numbers of a picture's patches, in their places.

    Args:
        grid: The number of every patch [row][column].
        unit: What the numbers are counted in.
        signed: Whether the numbers can be below 0.

    Returns:
        The view of this map.
    """
    down, across = ([str(i) for i in range(len(axis))] for axis in (grid, grid[0]))
    axes, heading = ("patch row", "patch column"), "Patches, with their positions"
    return grid_view(down, across, grid, axes, unit, heading, patches=True, signed=signed)


@spelled
class PagedPatches(Paged):
    """What has a page on which a picture may lie under the map of its patches."""

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        beside: Any = None,
        image: Any = None,
    ) -> str | None:
        """Write the result as one interactive HTML page, which needs no network and no server.

        Args:
            path: The file to write, whole or not at all. None returns the text instead.
            beside: What stands below the title, too: a text, or a result whose text form is taken.
            image: The picture [row, column] or [row, column, channel] that patches are of, to lie
                under their map. Bytes, or floats that are scaled from least to largest.

        Returns:
            The text of the page, or None where a file was written.

        Raises:
            ValueError: If the folder does not exist, or there are no patches for the image.
        """
        return over(self._page(), image).with_lines(beside).write(path)

    def show(self, image: Any = None) -> None:
        """Show the page: below the cell of a notebook, or else in the browser.

        Args:
            image: As in :meth:`to_html`.

        Raises:
            ValueError: If there are no patches for the image.
        """
        over(self._page(), image).show()


def over(page: Page, image: Any) -> Page:
    """Lay a picture under the patches of a page.

    Args:
        page: The page of a result.
        image: The picture [row, column] or [row, column, channel], or None.

    Returns:
        The page with the picture.

    Raises:
        ValueError: If the page has no patches, or the image has another shape.
    """
    if image is None:
        return page
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"image= has shape {list(np.shape(image))}. Pass [row, column], or [row, column, "
            "channel] with 1, 3 or 4 channels."
        )
    if not any(view.data.get("patches") for view in page.views):
        raise ValueError("image= was given, but no row is a patch. Leave image out.")
    pixels = pixels[..., : min(3, pixels.shape[-1])]
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = np.rint(255 * (pixels - low) / ((high - low) or 1.0)).astype(np.uint8)
    step = -(-max(pixels.shape[:2]) // MOST_PIXELS)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))[::step, ::step]
    views = [
        replace(view, data={**view.data, "image": pixels}) if view.data.get("patches") else view
        for view in page.views
    ]
    return replace(page, views=views)


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
            parts.append(patch_view(grids[number], unit))
        kinds = {node.kind for node in rows.nodes if isinstance(node, Node)}
        if kinds & {"head", "mlp", "expert", "layer"}:
            down, across, cells, _ = head_cells(rows.nodes, rows.values)
            axes, heading = ("layer", "part"), "By layer, positions summed"
            parts.append(grid_view(down, across, cells, axes, unit, heading))
        edges = [node for node in rows.nodes if isinstance(node, Edge)]
        if edges and len(edges) == len(rows.nodes):
            parts.append(edge_view(edges, rows.values, unit))
        parts.append(_all_rows(rows, split.by, unit, errors, len(split.targets) > 1))
        tab = f"{number + 1}: {rows.target}"
        views += [replace(part, tab=tab) for part in parts]
    title = split.rows()[0].title if len(split.targets) == 1 else f"{len(split.targets)} prompts"
    return Page(title, views, [*notes, FIRST_TOKEN], tabs=len(split.targets) > 1, height=620)


def _all_rows(rows: Rows, by: str, unit: str, errors: Sequence[float] | None, titled: bool) -> View:
    inside = [
        i
        for i, place in enumerate(rows.places)
        if place is None or rows.span[0] <= place < rows.span[1]
    ]
    caption = f"{rows.title}. " if titled else ""
    if len(inside) > MOST:
        caption += f"The {len(inside) - MOST} smallest rows are not in this page."
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
    return table_view([by], names, labels, values, caption.strip(), sort=sort)
