"""Small HTML pictures of numbers: a strip of tokens, a grid of heads, a table.

The colours stand in each element, so that no style sheet is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

POSITIVE, NEGATIVE = "214, 96, 77", "67, 147, 195"  # red and blue, readable side by side


def _cell(text: str, value: float, largest: float, tag: str) -> str:
    strength = min(1.0, abs(value) / largest) if largest > 0 else 0.0
    color = f"rgba({POSITIVE if value >= 0 else NEGATIVE}, {strength:.2f})"
    return (
        f'<{tag} style="background:{color};padding:1px 3px;white-space:pre" title="{value:+.4g}">'
        f"{escape(text)}</{tag}>"
    )


def _largest(values: Sequence[float]) -> float:
    return max((abs(v) for v in values if v == v), default=0.0)


def strip_html(tokens: Sequence[str], values: Sequence[float]) -> str:
    """Draw tokens in a row, each coloured by its value: red adds to the target, blue takes away.

    Args:
        tokens: The texts of the tokens.
        values: One number per token, in units of the target.

    Returns:
        One HTML element.
    """
    largest = _largest(values)
    pairs = zip(tokens, values, strict=True)
    return "<div>" + "".join(_cell(t, v, largest, "span") for t, v in pairs) + "</div>"


def grid_html(values: Sequence[Sequence[float]]) -> str:
    """Draw heads as a grid, one row per layer.

    Args:
        values: One number per head, by layer and then by head.

    Returns:
        One HTML table.
    """
    largest = _largest([v for row in values for v in row])
    head = "<tr><td></td>" + "".join(f"<td>H{h}</td>" for h in range(len(values[0]))) + "</tr>"
    rows = (
        f"<tr><td>L{layer}</td>"
        + "".join(_cell(f"{v:+.2f}", v, largest, "td") for v in row)
        + "</tr>"
        for layer, row in enumerate(values)
    )
    return f"<table>{head}{''.join(rows)}</table>"


def table_html(rows: Sequence[tuple[str, float]]) -> str:
    """Draw labels beside their values.

    Args:
        rows: Pairs of a label and its value.

    Returns:
        One HTML table.
    """
    largest = _largest([value for _, value in rows])
    cells = (
        f"<tr><td>{escape(n)}</td>{_cell(f'{v:+.4f}', v, largest, 'td')}</tr>" for n, v in rows
    )
    return f"<table>{''.join(cells)}</table>"
