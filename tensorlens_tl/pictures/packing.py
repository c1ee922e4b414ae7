"""Numbers packed into text, for a page that must be one file.

Arrays are zlib-compressed and written in base64; the browser inflates them. A large map is packed
in one of three forms:

    "exact"    every cell, in its own precision
    "coarse"   every cell as one of 15 levels, ±(l / 7)² times the row's largest |cell| with
               l = 0 … 7, or beyond 1,024 rows of 9 levels, so that a page of 2,048 tokens stays
               small; and the largest cells of every row and column exactly
    "largest"  only the largest cells of every row, exactly, and the share of Σ|cell| that they hold
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

LEVELS, FEWER = 7, 4
"""Levels on each side of 0 of a coarse map, and of one with more than 1,024 rows."""
EXACT_CELLS = 2**16
"""A map with more cells is not packed exactly, unless the caller asks for it."""


def plain(data: Any) -> Any:
    """Make data ready for JSON: arrays become packed blocks, numbers that JSON lacks become None.

    Args:
        data: Nested mappings and sequences of text, numbers and NumPy arrays.

    Returns:
        The same nest of dictionaries, lists, text and finite numbers.
    """
    if isinstance(data, np.ndarray):
        return block(data)
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return data


def block(array: np.ndarray) -> dict[str, Any]:
    """Pack one array.

    Args:
        array: Numbers of any shape, in a dtype that JavaScript has.

    Returns:
        The dtype, the shape, and the little-endian bytes as compressed base64.
    """
    data = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "zlib": packed(data.tobytes(), 6),
    }


def packed(data: bytes, level: int = 9) -> str:
    """Compress bytes by zlib and write them in base64."""
    return base64.b64encode(zlib.compress(data, level)).decode("ascii")


def packed_map(
    values: np.ndarray, form: str | None = None, keep: int | None = None
) -> dict[str, Any]:
    """Pack a map of numbers.

    Args:
        values: The map [row, column].
        form: "exact", "coarse" or "largest". None is exact up to 2¹⁶ cells, then coarse.
        keep: How many of the largest cells of every row, and of every column, a map that is not
            exact holds exactly. None is 6, or 3 beyond 512 rows.

    Returns:
        The form, its blocks, ``share`` (how much of Σ|cell| is given exactly), and Σ|cell| of every
        row.
    """
    rows, columns = values.shape
    triangle = rows == columns and not np.triu(values, 1).any()  # NaN counts as something
    form = form or ("exact" if values.size <= EXACT_CELLS else "coarse")
    head = {"form": form, "rows": rows, "columns": columns, "triangle": triangle}
    if form == "exact":
        cells = values[np.tril_indices(rows)] if triangle else values.ravel()
        return head | {"cells": block(cells), "share": 1.0}
    keep = keep or (6 if rows <= 512 else 3)
    finite = np.isfinite(values)
    size = np.where(finite, np.abs(values), 0)
    at = _largest(size, keep, form == "coarse")
    whole = float(size.sum(dtype=np.float64))
    share = float(size.ravel()[at].sum(dtype=np.float64)) / whole if whole else 1.0
    head |= {"at": block(np.diff(at, prepend=0).astype(np.uint32)), "share": share}
    head |= {"value": block(values.ravel()[at]), "sizes": block(size.sum(1))}
    if form == "largest":
        return head
    steps, top = LEVELS if rows <= 1024 else FEWER, size.max(1, keepdims=True, initial=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        level = np.rint(steps * np.sqrt(np.where(top > 0, size / top, 0)))
    level = np.where(finite, np.sign(np.where(finite, values, 0)) * level + steps, 15)
    level = level[np.tril_indices(rows)] if triangle else level.ravel()
    level = np.append(level, np.zeros(len(level) % 2)).astype(np.uint8)
    levels = block(level[::2] << 4 | level[1::2])
    return head | {"levels": levels, "top": block(top.ravel()), "steps": steps}


def _largest(size: np.ndarray, keep: int, of_columns: bool) -> np.ndarray:
    """Flat places of the largest cells of every row (and column), without those that are 0."""
    rows, columns = size.shape
    found = []
    if k := min(keep, columns):
        best = np.argpartition(size, columns - k, axis=1)[:, columns - k :]
        found.append((np.arange(rows)[:, None] * columns + best).ravel())
    if of_columns and (k := min(keep, rows)):
        best = np.argpartition(size, rows - k, axis=0)[rows - k :]
        found.append((best * columns + np.arange(columns)).ravel())
    at = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    return at[size.ravel()[at] > 0]
