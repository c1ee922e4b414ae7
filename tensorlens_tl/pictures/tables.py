"""Rows of numbers as a view, and one number through depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .page import View


def table_view(
    names: Sequence[str],
    columns: Sequence[str],
    labels: Sequence[Sequence[str]],
    values: np.ndarray,
    caption: str = "",
    heading: str = "",
    together: bool = False,
    sort: int = -1,
) -> View:
    """A view of rows with numbers and bars, which the reader can sort and search.

    Args:
        names: Headings of the columns of text.
        columns: Headings of the columns of numbers.
        labels: The texts of every row, one per name.
        values: The numbers [row, column].
        caption: A line above the table.
        heading: A line above the view.
        together: Whether the bars of all columns have one scale.
        sort: The column of numbers that orders the rows at first, largest first; −1 for none.

    Returns:
        The view of this table.
    """
    data = {"names": names, "columns": columns, "labels": labels, "values": values}
    scaled = "together" if together else "apart"
    return View("table", data | {"caption": caption, "scaled": scaled, "sort": sort}, heading)


def curves_view(
    x: Sequence[float],
    lines: Sequence[tuple[str, np.ndarray, np.ndarray | None, np.ndarray | None]],
    names: tuple[str, str],
    guides: Sequence[float] = (),
    heading: str = "",
) -> View:
    """A view of numbers against a size.

    Args:
        x: The sizes that the numbers stand against, in order.
        lines: For every line its name, its numbers [size], and the ends of their intervals or None.
        names: What the sizes are, and what the numbers are.
        guides: Numbers at which a line is drawn across.
        heading: A line above the view.

    Returns:
        The view of these curves.
    """
    parts = [{"name": n, "y": y, "low": low, "high": high} for n, y, low, high in lines]
    data = {"x": np.array(x, dtype=np.float64), "lines": parts, "guides": list(guides)}
    return View("curves", data | {"x_name": names[0], "y_name": names[1]}, heading)


def waterfall_view(
    steps: Sequence[str],
    parts: Sequence[tuple[int, str]],
    values: np.ndarray,
    details: Sequence[Mapping[str, Any]] = (),
    lens: np.ndarray | None = None,
    heading: str = "",
    lens_name: str = "logit lens",
) -> View:
    """A view of one number as the sum of steps, each made of parts.

    Args:
        steps: Names of the steps, in order.
        parts: For every part, the number of its step, and its name.
        values: What every part adds [part].
        details: Finer splits of steps, each with ``step``, ``name``, ``labels`` and ``values``.
        lens: Another reading after each step [step]; nan where there is none.
        heading: A line above the view.
        lens_name: What the other reading is.

    Returns:
        The view of these steps.
    """
    data = {"steps": steps, "parts": parts, "values": values, "details": details}
    data |= {"lens": lens, "lens_name": lens_name, "unit": "units of the target"}
    return View("waterfall", data, heading)
