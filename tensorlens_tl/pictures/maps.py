"""A map of tokens by tokens as a view: panels side by side, each at one or several depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .packing import packed_map
from .page import View


def depth(
    name: str, values: np.ndarray, constants: np.ndarray | None = None, form: str | None = None
) -> dict[str, Any]:
    """One depth of a panel: a map, its sums, and what constants add to every row.

    Args:
        name: Where the map starts, such as a residual site.
        values: The map [row, column].
        constants: What belongs to a row and to no column [row]. None where rows have no target.
        form: How the map is packed, as :func:`packed_map` takes it.

    Returns:
        The data that map.js draws.
    """
    whole = values.astype(np.float64)
    return {
        "name": name,
        "map": packed_map(values, form),
        "sums": whole.sum(1).astype(values.dtype),
        "columns": whole.sum(0).astype(values.dtype),
        "constants": constants,
    }


def panel(
    name: str,
    unit: str,
    depths: Sequence[Mapping[str, Any]],
    target: np.ndarray | None = None,
    target_name: str = "target",
    note: str = "",
    signed: bool = True,
) -> dict[str, Any]:
    """One of the maps that stand side by side.

    Args:
        name: What the map shows.
        unit: What its numbers are counted in.
        depths: The map at one or several depths, made by :func:`depth`.
        target: What every row and its constants sum to [row]; None where there is no such number.
        target_name: What the target is.
        note: One sentence about the map.
        signed: Whether the numbers can be below 0. Shares and sizes have a colour of their own.

    Returns:
        The data that map.js draws.
    """
    found = {"name": name, "unit": unit, "stops": depths, "target": target, "note": note}
    return found | {"target_name": target_name, "signed": signed}


def map_view(
    rows: Sequence[str],
    columns: Sequence[str],
    panels: Sequence[Mapping[str, Any]],
    axes: tuple[str, str] = ("predicting position", "source position"),
    heading: str = "",
    slider: str = "From",
    named: bool = False,
    link: str = "",
) -> View:
    """A view of maps side by side, in one window.

    Args:
        rows: The text of every row.
        columns: The text of every column.
        panels: The maps, made by :func:`panel`.
        axes: What a row is, and what a column is.
        heading: A line above the view.
        slider: What the slider through the depths is called.
        named: Whether rows and columns are names, not tokens at positions.
        link: A name, by which a waterfall shows the chosen row.

    Returns:
        The view of these maps.
    """
    same = tuple(rows) == tuple(columns)
    data = {"rows": list(rows), "columns": None if same else list(columns), "axes": axes}
    data |= {"panels": list(panels), "slider": slider, "named": named, "link": link}
    return View("map", data, heading)
