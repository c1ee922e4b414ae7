"""Small HTML pictures of numbers: a strip of tokens, a grid of heads, a table.

The colours stand in each element, so that no style sheet is needed. What a picture has no place
for stands below it: every number of the text form is in the HTML form, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from ..graph import Edge, Node, at_sites, feature_site
from ..maps import TINY
from ..pictures import Page, Split, split_page

if TYPE_CHECKING:
    from .table import Attribution

POSITIVE, NEGATIVE = "214, 96, 77", "67, 147, 195"  # red and blue, readable side by side
UNIT = "units of the target: logits for tokens, nats for log-probabilities"
PROMPTS, ROWS, HOVER = 3, 20, 6
"""How many prompts, rows of a table, and positions of a head a notebook shows."""


def _cell(text: str, value: float, largest: float, tag: str, title: str = "") -> str:
    strength = min(1.0, abs(value) / largest) if largest > 0 else 0.0
    color = f"rgba({POSITIVE if value >= 0 else NEGATIVE}, {strength:.2f})"
    title = escape(title or f"{value:+.4g}").replace("\n", "&#10;")
    return (
        f'<{tag} style="background:{color};padding:1px 3px;white-space:pre" title="{title}">'
        f"{escape(text)}</{tag}>"
    )


def _largest(values: Sequence[float]) -> float:
    return max((abs(v) for v in values if v == v), default=0.0)


def legend_html(values: Sequence[float], unit: str = UNIT) -> str:
    """Say what the colours of a picture mean.

    Args:
        values: The numbers that the picture shows.
        unit: What the numbers are counted in.

    Returns:
        One HTML element; "" where all numbers are 0.
    """
    if not (largest := _largest(values)):
        return ""
    blue, red = (_cell(f"{v:+.3g}", v, largest, "b") for v in (-largest, largest))
    return f"<div><small>{blue} takes away, {red} adds, in {escape(unit)}</small></div>"


def strip_html(tokens: Sequence[str], values: Sequence[float], titles: Sequence[str] = ()) -> str:
    """Draw tokens in a row, each coloured by its value: red adds to the target, blue takes away.

    Args:
        tokens: The texts of the tokens.
        values: One number per token, in units of the target.
        titles: What hovering over a token shows; () to show its number.

    Returns:
        One HTML element.
    """
    largest = _largest(values)
    rows = zip(tokens, values, titles or [""] * len(tokens), strict=True)
    cells = (
        _cell(text.replace("\n", "\\n"), value, largest, "span", title)
        for text, value, title in rows
    )
    return '<div style="display:flex;flex-wrap:wrap">' + "".join(cells) + "</div>"


def grid_html(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    titles: Sequence[Sequence[str]] = (),
    beside: Sequence[tuple[str, float]] = (),
) -> str:
    """Draw numbers as a grid of coloured cells.

    Args:
        rows: Names of the rows.
        columns: Names of the columns.
        values: One number per row and column; None leaves the cell empty.
        titles: What hovering over a cell shows; () to show its number.
        beside: Labels and numbers that have no row and column. They stand below, in the same scale.

    Returns:
        An HTML table, and a line below it.
    """
    inside = [v for row in values for v in row if v is not None]
    largest = _largest([*inside, *(v for _, v in beside)])
    head = "<tr><td></td>" + "".join(f"<td>{escape(name)}</td>" for name in columns) + "</tr>"
    lines = []
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        cells = "".join(
            "<td></td>"
            if v is None
            else _cell(f"{v:+.2f}", v, largest, "td", titles[i][j] if titles else "")
            for j, v in enumerate(row)
        )
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    below = " · ".join(f"{escape(n)} {_cell(f'{v:+.2f}', v, largest, 'b')}" for n, v in beside)
    return f"<table>{head}{''.join(lines)}</table>" + (f"<div>{below}</div>" if below else "")


def table_html(rows: Sequence[tuple[str, float]], left_out: str = "") -> str:
    """Draw labels beside their values.

    Args:
        rows: Pairs of a label and its value.
        left_out: What is said of further rows, such as "3 more".

    Returns:
        One HTML table.
    """
    largest = _largest([value for _, value in rows])
    cells = (
        f"<tr><td>{escape(n)}</td>{_cell(f'{v:+.4f}', v, largest, 'td')}</tr>" for n, v in rows
    )
    more = f"<div>… {escape(left_out)}</div>" if left_out else ""
    return f"<table>{''.join(cells)}</table>{more}"


def left_out(values: Float[Tensor, " row"], shown: int) -> str:
    """Say how many rows are not among the largest ``shown``; "" for none."""
    zeros = int((values == 0).sum())
    counts = {"more": len(values) - shown - zeros, "exactly 0": zeros}
    return " and ".join(f"{count} {what}" for what, count in counts.items() if count)


def changes(one: Attribution) -> list[str]:
    """The rows of one prompt that qualify all other rows, in words, with their shares."""
    values = one.values[0].tolist()
    # The share of an SAE's error is of the rows that its site is made of.
    places = at_sites(one.sources).items()
    sizes = {site: sum(abs(values[i]) for i in own) for site, own in places}
    whole = sum(map(abs, values))
    found: dict[Node, tuple[float, float]] = {}
    for source, value in zip(one.sources, values, strict=True):
        node = source.node
        if isinstance(node, Node) and node.kind in ("change", "error"):
            total, absolute = found.get(node, (0.0, 0.0))
            found[node] = total + value, absolute + abs(value)
    lines = []
    for node, (total, part) in found.items():
        site = feature_site(node)
        share, of = part / max(sizes.get(site or "", whole), TINY), f" at {site}" if site else ""
        lines.append(f"{node}: {total:+.4f}, {share:.0%} of Σ|·|{of}")
    return lines


def sum_html(total: float, error: float | None) -> str:
    """Say what the rows sum to.

    Args:
        total: The sum of all rows.
        error: The completeness error; None where the rows do not sum to the target.

    Returns:
        One HTML element.
    """
    if error is None:
        return _note("The rows do not sum to the target.")
    return _note(f"The rows sum to {total:+.4g}, off by at most {error:.0e} of Σ|·|.")


def more_prompts(n: int) -> str:
    """Say that some of n prompts are not shown."""
    return f"<div>… {n - PROMPTS} more prompts</div>" if n > PROMPTS else ""


_PATCH = re.compile(r"patch\[(\d+),(\d+)\]")


def patch_map(
    names: Sequence[str], places: Sequence[int | None], values: Float[Tensor, " source"]
) -> Float[Tensor, "row column"]:
    """Lay numbers out as the patches of a picture that they belong to.

    Args:
        names: The names of the numbers; those of patches hold "patch[2,3]".
        places: The position of each number; None where it has none.
        values: The numbers. Those at the position of one patch are summed.

    Returns:
        The sum of every patch. Numbers at no patch are left out.

    Raises:
        ValueError: If no number belongs to a patch, or the patches are those of several pictures.
    """
    found: dict[int | None, tuple[int, int]] = {}
    for name, place in zip(names, places, strict=True):
        if place is not None and (match := _PATCH.search(name)):
            found[place] = int(match[1]), int(match[2])
    if not found:
        raise ValueError(
            "No row is a patch of a picture. Take the map of a run on a picture, split by token."
        )
    if len(set(found.values())) < len(found):
        raise ValueError(
            "The rows are patches of several pictures, which have one map each. Use .to_dataframe."
        )
    rows, columns = (max(at) + 1 for at in zip(*found.values(), strict=True))
    grid = values.new_zeros(rows, columns)
    for place, value in zip(places, values, strict=True):
        if place in found:
            grid[found[place]] += value
    return grid


# --- Attributions --------------------------------------------------------------------------------


def attribution_html(attribution: Attribution) -> str:
    """Draw an attribution: tokens as a strip, heads as a grid, anything else as a table.

    Args:
        attribution: What is drawn.

    Returns:
        HTML of the first prompts.
    """
    parts = [_one_prompt(attribution[i]) for i in range(min(PROMPTS, len(attribution)))]
    return "".join(parts) + more_prompts(len(attribution))


def _one_prompt(one: Attribution) -> str:
    heads = any(getattr(source.node, "kind", "") == "head" for source in one.sources)
    value = f"{escape(one.target[0])} = {float(one.target_value[0]):.4g}"
    parts = [f"<div><b>{value}</b>, by {one.by} ({one.effect})</div>"]
    if one.by == "token" and any(map(_PATCH.fullmatch, one.labels[0])):
        parts.append(_picture(one))
    elif one.by == "token" and any(source.pos is not None for source in one.sources):
        parts.append(_strip(one))
    elif one.by in ("head", "loading") and heads:
        parts.append(_grid(one))
    else:
        rows = one.top(ROWS)
        parts += [
            table_html(rows, left_out(one.values[0], len(rows))),
            legend_html([v for _, v in rows]),
        ]
    parts.append(sum_html(float(one.values.double().sum()), one.completeness_error))
    return "".join(parts + [_note(change) for change in changes(one)])


def as_split(attribution: Attribution) -> Split:
    """The rows of an attribution as plain numbers and names."""
    sources = [(source.node, source.pos) for source in attribution.sources]
    return Split(
        attribution.by,
        attribution.effect,
        sources,
        attribution.labels,
        attribution.values.tolist(),
        attribution.target,
        attribution.target_value.tolist(),
        attribution.sums_to_target,
        attribution.spans,
    )


def attribution_page(attribution: Attribution) -> Page:
    """The page of an attribution: every row, patches in their places, and how exact it is."""
    error, grids = attribution.completeness_error, []
    exact = "The rows overlap: they do not sum to the target."
    if error is not None:
        exact = f"The rows sum to the target, off by at most {error:.0e} of Σ|·|."
    if attribution.by == "token" and any(map(_PATCH.fullmatch, attribution.labels[0])):
        with suppress(ValueError):  # several pictures in one prompt
            grids = attribution.grid().tolist()
    said = [change for i in range(len(attribution)) for change in changes(attribution[i])]
    return split_page(as_split(attribution), [exact, *said], grids)


def _note(text: str) -> str:
    return f"<div><small>{escape(text)}</small></div>"


def _strip(one: Attribution) -> str:
    """The tokens of a prompt, each with all that stands at its position."""
    whole, rest = one.sum("node"), []
    parts = {source.pos: [] for source in one.sources}
    for source, value in zip(one.sources, one.values[0].tolist(), strict=True):
        parts[source.pos].append(f"{source.node} {value:+.4g}")
    tokens, values, titles = [], [], []
    rows = zip(whole.sources, whole.labels[0], whole.values[0].tolist(), strict=True)
    # A picture's rows come after those of tokens, and stand between them in the prompt.
    for source, label, value in sorted(rows, key=lambda row: row[0].pos or 0):
        if source.pos is not None:
            tokens.append(
                " − ".join(re.findall(r'"(.*?)"@\d+', label, re.DOTALL))
                or label.partition(" + ")[0]
            )
            titles.append("\n".join([f"{label}: {value:+.4g}", *parts[source.pos]]))
            values.append(value)
        elif getattr(source.node, "kind", "") != "change":
            rest.append(value)
    note = f"{len(rest)} constants {math.fsum(rest):+.4g}. " if rest else ""
    note += "" if len(one.sources) == len(whole.sources) else _MERGED
    return strip_html(tokens, values, titles) + legend_html(values) + (_note(note) if note else "")


def _picture(one: Attribution) -> str:
    """The patches of a picture in their places; beside them other rows, and the constants."""
    places, values = [source.pos for source in one.sources], one.values[0]
    grid = patch_map(one.labels[0], places, values).tolist()
    patches = {s.pos for s, n in zip(one.sources, one.labels[0], strict=True) if _PATCH.search(n)}
    names: dict[int | None, str] = {None: "constants"}
    for source, label in zip(one.sources, one.labels[0], strict=True):
        if getattr(source.node, "kind", "") != "pos_embed":  # the row's own name, not its position
            names.setdefault(source.pos, label)
    beside: dict[str, float] = {}
    for place, value in zip(places, values.tolist(), strict=True):
        if place not in patches:
            named = names.get(place, f"row {place}")
            beside[named] = beside.get(named, 0.0) + value
    rows, columns = ([str(i) for i in range(len(axis))] for axis in (grid, grid[0]))
    numbers = [*(value for row in grid for value in row), *beside.values()]
    picture = grid_html(rows, columns, grid, beside=list(beside.items()))
    return picture + legend_html(numbers) + _note("A patch is shown with its position.")


_MERGED = "A token is shown with the embedding of its position; hover for both."


def _grid(one: Attribution) -> str:
    """Heads by layer, beside them MLPs and constants; hovering shows the positions of a head."""
    cells: dict[tuple[int, str], float] = {}
    places: dict[tuple[int, str], list[tuple[int | float, str]]] = {}
    beside: dict[str, float] = {}
    rows = zip(one.sources, one.labels[0], one.values[0].tolist(), strict=True)
    for source, label, value in rows:
        node, column = source.node, _column(source.node)
        if isinstance(node, Node) and node.layer is not None:
            at = node.layer, column
            cells[at] = cells.get(at, 0.0) + value
            if source.pos is not None or column == "constants":
                places.setdefault(at, []).append((value, label.rpartition(" ← ")[2]))
        elif column != "change":
            beside[str(node)] = beside.get(str(node), 0.0) + value
    layers = sorted({layer for layer, _ in cells})
    # Heads by number, then what else a layer has.
    columns = sorted({c for _, c in cells}, key=lambda c: (c[0] != "H", len(c), c))
    values = [[cells.get((layer, c)) for c in columns] for layer in layers]
    titles = [[_hover(layer, c, cells, places) for c in columns] for layer in layers]
    names = [f"L{layer}" for layer in layers]
    picture = grid_html(names, columns, values, titles, list(beside.items()))
    return picture + legend_html([*cells.values(), *beside.values()])


def _column(node: Node | Edge) -> str:
    if not isinstance(node, Node):
        return ""
    if node.kind == "constant":
        return "past" if node.name == "past" else "constants"
    return {"head": f"H{node.index}", "mlp": "MLP"}.get(node.kind, node.kind)


def _hover(
    layer: int,
    column: str,
    cells: dict[tuple[int, str], float],
    places: dict[tuple[int, str], list[tuple[int | float, str]]],
) -> str:
    """A cell's sum, and the largest of the rows that it sums."""
    at = layer, column
    own = sorted(places.get(at, []), key=lambda row: -abs(row[0]))
    lines = [f"{value:+.4g}  {label}" for value, label in own[:HOVER]]
    more = [f"… {len(own) - HOVER} more"] if len(own) > HOVER else []
    space = " " if column.islower() else ""
    return "\n".join([f"L{layer}{space}{column}: {cells.get(at, 0.0):+.4g}", *lines, *more])
