"""Rows of numbers, curves and points as views, and one number through depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .charts import by_decades
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


def interval_view(
    names: Sequence[str],
    labels: Sequence[Sequence[str]],
    values: np.ndarray,
    caption: str = "",
    group: int = -1,
    what: str = "mean",
) -> View:
    """A view of means with their intervals: a bar per mean, and across its end the interval.

    Args:
        names: Headings of the columns of text.
        labels: The texts of every row, one per name.
        values: Mean (or other number), low and high end of every row [row, 3].
        caption: A line above the table.
        group: The column of text whose rows of one text have one scale; −1 is one scale for all.
        what: What the numbers are, where they are no means.

    Returns:
        The view of these rows.
    """
    if not np.isfinite(values[:, 1:]).any():  # of one prompt each
        return table_view(names, [what], labels, values[:, :1], caption)
    view = table_view(names, [what, "low", "high"], labels, values, caption)
    return View("table", {**view.data, "scaled": "interval", "group": group})


def interval_text(low: float, high: float, n: int, places: str = ".3g") -> str:
    """Write an interval in brackets, or why there is none.

    Args:
        low: The lower end; nan where there is none.
        high: The upper end.
        n: The number of values that the interval is of.
        places: Format of the ends, as Python writes it.

    Returns:
        The interval as text, without the number that stands before it.
    """
    if n < 2:
        return f"(n = {n})"
    if math.isnan(low) or math.isnan(high):
        return "(no interval)"
    return f"[{low:{places}}, {high:{places}}]"


def intervals_over(ends: Iterable[float], n: int, what: str = "prompt") -> str:
    """Say what the intervals of a table or figure are over, or why there are none.

    Args:
        ends: Ends of all intervals; nan where there is none.
        n: The number of prompts or others that the intervals are over.
        what: What these are, in the singular.

    Returns:
        A few words, for a note or beside an axis.
    """
    if not all(map(math.isnan, ends)):
        return f"95 % bootstrap intervals over {what}s"
    return f"one {what}, so no interval" if n == 1 else "no intervals"


def curves_view(
    x: Sequence[float],
    lines: Sequence[tuple[str, np.ndarray, np.ndarray | None, np.ndarray | None]],
    names: tuple[str, str],
    guides: Mapping[str, float] | None = None,
    heading: str = "",
    start: int | None = None,
) -> View:
    """A view of numbers against a size.

    Args:
        x: The sizes that the numbers stand against, in order.
        lines: For every line its name, its numbers [size], and the ends of their intervals or None.
        names: What the sizes are, and what the numbers are.
        guides: Names and heights of lines that are drawn across.
        heading: A line above the view.
        start: Number of the size that is marked at first. None is the last.

    Returns:
        The view of these curves.
    """
    parts = []
    for name, y, low, high in lines:
        ends = (None, None) if low is None or np.isnan(low).all() else (low, high)
        parts.append({"name": name, "y": y, "low": ends[0], "high": ends[1]})
    at = np.array(x, dtype=np.float64)
    across = guides or {}
    data = {"x": at, "lines": parts, "log": by_decades(x), "start": start}
    data |= {"guides": list(across.values()), "guide_names": list(across)}
    return View("curves", data | {"x_name": names[0], "y_name": names[1]}, heading)


def points_view(
    lines: Sequence[tuple[str, np.ndarray, np.ndarray]],
    labels: Sequence[str],
    names: tuple[str, str],
    stops: Sequence[str] = ("",),
    slider: str = "",
    start: int = 0,
    heading: str = "",
) -> View:
    """A view of points beside the diagonal, which a slider moves.

    Args:
        lines: For every kind of point its name, and where its points are: x and y [stop, point].
        labels: The text of every point at every stop, stop by stop.
        names: What x and y are.
        stops: Names of the slider's stops.
        slider: What the slider is called.
        start: The stop that is shown at first.
        heading: A line above the view.

    Returns:
        The view of these points.
    """
    parts = [{"name": n, "x": x.ravel(), "y": y.ravel()} for n, x, y in lines]
    data = {"lines": parts, "labels": list(labels), "stops": list(stops), "slider": slider}
    return View("curves", data | {"start": start, "x_name": names[0], "y_name": names[1]}, heading)


def words_view(
    rows: Sequence[str],
    columns: Sequence[str],
    words: Sequence[Sequence[str]],
    shares: np.ndarray,
    name: str,
    heading: str = "",
) -> View:
    """A view of a word in every cell of a grid, shaded by its share.

    Args:
        rows: Names of the rows.
        columns: Names of the columns.
        words: The word of every cell [row][column].
        shares: The share of every cell, from 0 to 1 [row, column].
        name: What the grid shows.
        heading: A line above the view.

    Returns:
        The view of this grid.
    """
    flat = [word for row in words for word in row]
    data = {"rows": rows, "columns": columns, "words": flat, "shares": shares.ravel()}
    return View("words", data | {"name": name}, heading)


def waterfall_view(
    steps: Sequence[str],
    parts: Sequence[tuple[int, str]],
    values: np.ndarray,
    details: Sequence[Mapping[str, Any]] = (),
    lens: np.ndarray | None = None,
    heading: str = "",
    lens_name: str = "logit lens",
    rows: Sequence[str] = (),
    link: str = "",
    unit: str = "units of the target",
) -> View:
    """A view of one number as the sum of steps, each made of parts.

    Args:
        steps: Names of the steps, in order.
        parts: For every part, the number of its step, and its name.
        values: What every part adds [part], or [row, part] of several numbers.
        details: Finer splits of steps, each with ``step``, ``name``, ``labels`` and ``values``.
        lens: Another reading after each step [step], or [row, step]; nan where there is none.
        heading: A line above the view.
        lens_name: What the other reading is.
        rows: Names of several numbers, one of which is shown; () for a single number.
        link: The name of a map whose chosen row is the one that is shown.
        unit: What the numbers are counted in.

    Returns:
        The view of these steps.
    """
    data = {"steps": steps, "parts": parts, "values": values, "details": details}
    data |= {"lens": lens, "lens_name": lens_name, "unit": unit}
    if len(rows):
        data |= {"rows": rows, "link": link, "values": values.ravel()}
        data |= {"lens": None if lens is None else lens.ravel()}
    return View("waterfall", data, heading)
