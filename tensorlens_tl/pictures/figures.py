"""Drawers of static figures, for matplotlib: maps, bars, waterfalls, and what all drawers share.

They change no style and no backend, and keep pyplot out: a figure belongs to whoever holds its
axes. Without given axes, a drawer makes a figure that fits what is drawn. Signed numbers are red
where they add and blue where they take away, on limits that lie evenly about 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast
from unicodedata import bidirectional

from ..checks import kind_of, need

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIGNED, UNSIGNED = "RdBu_r", "Purples"
"""The colour maps of signed and of other numbers."""
ADDS, TAKES, NEUTRAL = "#c0392b", "#2b6cb0", "0.45"
"""Colours of bars and lines: above 0, below 0, and without a sign."""
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
"""How labels are set: "$" and "_" in a token are text, not mathematics."""
MOST_LABELS, MOST_TEXTS, LONGEST, LONGER = 48, 600, 22, 34
"""How many labels an axis bears, how many cells have a text, how long a label is, and a row's."""


# --- What all drawers share -----------------------------------------------------------------------


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Give axes to draw on.

    Args:
        ax: The axes that a user passed, or None.
        width: Width of a new figure in inches.
        height: Height of a new figure in inches.

    Returns:
        ``ax``, or the axes of a new figure that pyplot does not know.

    Raises:
        ValueError: If matplotlib is missing, or ``ax`` is something else.
    """
    figure = need("matplotlib.figure", "plot", "plot")
    if ax is None:
        sized = figure.Figure((min(width, 16.0), min(height, 24.0)), layout="constrained")
        sized.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        return sized.add_subplot(axes_class=_shown_axes())
    if not hasattr(ax, "set_xticks"):
        raise ValueError(f"ax is {kind_of(ax)}, not axes. Pass axes of matplotlib, or None.")
    return ax


@cache
def _shown_axes() -> type:
    """Axes that a notebook shows as their figure, which needs no pyplot for it."""
    import io

    from matplotlib.axes import Axes

    class FigureAxes(Axes):
        def _repr_png_(self) -> bytes:
            written, figure = io.BytesIO(), cast(Any, self.figure)
            figure.savefig(written, format="png", dpi=100)
            return written.getvalue()

    return FigureAxes


def label(text: str, longest: int = LONGEST) -> str:
    """Put a name on one line: what cannot be printed as an escape, the middle of a long one cut.

    Args:
        text: A token or another name.
        longest: Most characters that are kept.

    Returns:
        The text of the label.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    half = (longest - 1) // 2
    line = line if len(line) <= longest else f"{line[:half]}…{line[-half:]}"
    if any(bidirectional(c) in ("R", "AL") for c in line):  # its quotes keep their places
        line = re.sub("([\"'])", "\\1\u200e", line)
    return line


def limit(values: Iterable[float]) -> float:
    """Find the number up to which a scale about 0 reaches: the largest |value| that is finite.

    Args:
        values: The numbers, in which nan and infinities do not count.

    Returns:
        The end of the scale; 1 where no number is left, or all are 0.
    """
    return max((abs(v) for v in values if math.isfinite(v)), default=0.0) or 1.0


def number(value: float, form: str) -> str:
    """A number as text, with its sign where ``form`` asks for one; nan has none."""
    return format(value, form) if math.isfinite(value) else str(value)


def colour(value: float) -> str:
    """The colour of a bar or line."""
    return ADDS if value > 0 else TAKES if value < 0 else NEUTRAL


def named_axis(axis: str, ax: Axes, names: Sequence[str]) -> None:
    """Labels at every place of an axis; numbers where there are too many."""
    if len(names) > MOST_LABELS:
        from matplotlib.ticker import MaxNLocator

        getattr(ax, f"{axis}axis").set_major_locator(MaxNLocator(10, integer=True))
        return
    texts = [label(name, LONGEST if axis == "x" else LONGER) for name in names]
    turned = axis == "x" and max(map(len, texts), default=0) * len(texts) > 60
    style = PLAIN | ({"rotation": 90} if turned else {})
    getattr(ax, f"set_{axis}ticks")(range(len(names)), texts, fontsize="small", **style)


def titled(ax: Axes, title: str, xlabel: str = "", ylabel: str = "") -> Axes:
    """Set the title and the names of both axes as plain text."""
    ax.set_title(title, fontsize="medium", **PLAIN)
    ax.set_xlabel(xlabel, **PLAIN)
    ax.set_ylabel(ylabel, **PLAIN)
    return ax


def bare(ax: Axes) -> None:
    """Take the frame away on top and on the right."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


# --- Maps -----------------------------------------------------------------------------------------


def cell_map(
    ax: Axes | None,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    unit: str,
    title: str = "",
    axis_names: tuple[str, str] = ("", ""),
    texts: Sequence[Sequence[str]] | None = None,
    signed: bool = True,
    largest: float | None = None,
    image: Any = None,
) -> Axes:
    """Draw numbers as a map of coloured cells, with a colour bar.

    Args:
        ax: Axes to draw on, or None.
        values: The numbers [row][column]. nan leaves a cell gray.
        rows: Names of the rows, first on top.
        columns: Names of the columns.
        unit: What the colour bar counts.
        title: What stands above.
        axis_names: What rows and columns are.
        texts: What stands in the cells. None writes the numbers, where there is room.
        signed: Whether colours diverge from 0. Else they run from 0 to the largest number.
        largest: Where the scale ends. None is the largest number.
        image: A picture [row, column] or [row, column, channel] under the map, or None.

    Returns:
        The axes drawn on.
    """
    need("matplotlib", "plot", "plot")
    import numpy
    from matplotlib import colormaps

    grid = numpy.asarray(values, dtype=float).reshape(len(rows), len(columns))
    width, height = len(columns), len(rows)
    if texts is None and grid.size <= MOST_TEXTS // 4 and image is None:
        form = ("+" if signed else "") + (".2f" if limit(grid.flat) >= 0.1 else ".1e")
        texts = [["" if v != v else number(v, form) if v else "0" for v in row] for row in grid]
    texts = texts if texts is not None and grid.size <= MOST_TEXTS else None
    longest = max((len(text) for row in texts or () for text in row), default=0)
    wide = min(13.0, max(2.4, width * (0.085 * longest + 0.16 if texts else 0.22)))
    tall = min(13.0, max(1.2, height * 0.24))
    if not texts:  # square cells
        wide = tall = max(2.4, min(7.0, max(wide, tall)))
        wide, tall = wide * min(1.0, width / height), tall * min(1.0, height / width)
    room = wide / width if ax is None else ax.bbox.width / ax.figure.dpi / width
    texts = texts if room > 0.2 else None
    names = (
        max((len(label(name, LONGER)) for name in rows), default=0) if height <= MOST_LABELS else 4
    )
    ax = axes(ax, wide + 0.075 * names + 1.5, tall + 1.6)
    end = limit(grid.flat) if largest is None else largest
    chosen = colormaps[SIGNED if signed else UNSIGNED].with_extremes(bad="0.85")
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    if image is not None:
        ax.imshow(numpy.asarray(image), cmap="gray", extent=extent, interpolation="none")
    drawn = ax.imshow(
        grid,
        cmap=chosen,
        vmin=-end if signed else 0.0,
        vmax=end,
        extent=extent,
        interpolation="none",  # one pixel a cell in the file, so that it stays small
        alpha=None if image is None else 0.65,
        aspect="auto" if texts else "equal",
    )
    shades = drawn.to_rgba(numpy.ma.masked_invalid(grid)) if texts else None
    for i, row in enumerate(texts or ()):
        for j, text in enumerate(row):
            ink = "white" if shades is not None and _luminance(shades[i, j]) < 0.18 else "black"
            text = label(text, max(3, int(room / 0.062)))
            ax.text(j, i, text, ha="center", va="center", color=ink, size="x-small", **PLAIN)
    named_axis("x", ax, columns)
    named_axis("y", ax, rows)
    finite = grid[numpy.isfinite(grid)]
    over, under = (bool((side > end).any()) for side in (finite, -finite))
    beyond = {(1, 1): "both", (1, 0): "max", (0, 1): "min"}.get((over, under and signed), "neither")
    ax.figure.colorbar(drawn, ax=ax, label=unit, fraction=0.05, pad=0.02, extend=beyond)
    return titled(ax, title, axis_names[1], axis_names[0])


def _luminance(rgba: Any) -> float:
    """The relative luminance of an sRGB colour, of which WCAG makes contrasts."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgba[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# --- Bars -----------------------------------------------------------------------------------------


def bars(
    ax: Axes | None,
    names: Sequence[str],
    values: Sequence[float],
    *,
    unit: str,
    title: str = "",
    errors: Sequence[float] | None = None,
    notes: Sequence[str] = (),
    left_out: str = "",
    signed: bool = True,
) -> Axes:
    """Draw a bar for every number, from top to bottom; beside it the number.

    Args:
        ax: Axes to draw on, or None.
        names: Names of the numbers.
        values: The numbers, as long as the bars.
        unit: What the numbers count.
        title: What stands above.
        errors: Half the length of each number's interval, or None.
        notes: What stands beside the bars in place of the numbers.
        left_out: What is said of rows that are not drawn.
        signed: Whether colours and numbers tell the sign.

    Returns:
        The axes drawn on.
    """
    n = len(values)
    ax = axes(ax, 6.4, 1.1 + 0.21 * max(n, 2))
    finite = [v if math.isfinite(v) else 0.0 for v in values]
    spread = [e if math.isfinite(e) else 0.0 for e in errors] if errors is not None else [0.0] * n
    ax.barh(
        range(n),
        finite,
        height=0.75,
        color=[colour(v) if signed else NEUTRAL for v in finite],
        xerr=None if errors is None else spread,
        error_kw={"elinewidth": 1.0, "capsize": 2.0, "ecolor": "0.2"},
    )
    for i, (value, end) in enumerate(zip(values, finite, strict=True)):
        side = -1 if end < 0 else 1
        ax.annotate(
            notes[i] if notes else number(value, "+.3g" if signed else ".3g"),
            (end + side * spread[i], i),
            (4 * side, 0),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center",
            fontsize="x-small",
            **PLAIN,
        )
    low = min([0.0, *(v - e for v, e in zip(finite, spread, strict=True))])
    high = max([0.0, *(v + e for v, e in zip(finite, spread, strict=True))])
    room = 0.16 * ((high - low) or 1.0)
    ax.set_xlim(low - room * (low < 0), high + room * (1 + 2 * bool(notes)))
    ax.set_ylim(n - 0.4, -0.6)
    ax.axvline(0, color="0.2", linewidth=0.8)
    ax.set_yticks(range(n), [label(name, LONGER) for name in names], fontsize="small", **PLAIN)
    bare(ax)
    return titled(ax, title, f"{unit}{f'   (… {left_out})' if left_out else ''}")


def mirrored_bars(
    ax: Axes | None,
    names: tuple[Sequence[str], Sequence[str]],
    values: tuple[Sequence[float], Sequence[float]],
    *,
    unit: str,
    titles: tuple[str, str],
    middle: str = "",
) -> Axes:
    """Draw two lists of numbers back to back: length is |number|, colour is the sign.

    Args:
        ax: Axes to draw on, or None.
        names: Names of the rows, on the left and on the right.
        values: The numbers, on the left and on the right.
        unit: What the numbers count.
        titles: What the two sides are.
        middle: What stands between the titles.

    Returns:
        The axes drawn on.
    """
    n = max(map(len, values))
    ax = axes(ax, 8.0, 1.3 + 0.21 * max(n, 2))
    end = limit([*values[0], *values[1]])
    for side, own in zip((-1, 1), values, strict=True):
        lengths = [side * abs(v) if math.isfinite(v) else 0.0 for v in own]
        ax.barh(range(len(own)), lengths, height=0.75, color=[colour(v) for v in own])
        for i, (value, at) in enumerate(zip(own, lengths, strict=True)):
            ax.annotate(
                number(value, "+.3g"),
                (at, i),
                (4 * side, 0),
                textcoords="offset points",
                ha="right" if side < 0 else "left",
                va="center",
                fontsize="x-small",
            )
    ax.set_xlim(-1.25 * end, 1.25 * end)
    ax.set_ylim(n - 0.4, -0.6)
    ax.xaxis.set_major_formatter(lambda x, _: f"{abs(x):.4g}")
    ax.axvline(0, color="0.2", linewidth=0.8)
    left, right = ([label(name, LONGER) for name in side] for side in names)
    ax.set_yticks(range(len(left)), left, fontsize="small", **PLAIN)
    if left != right:
        beside = ax.secondary_yaxis("right")
        beside.set_yticks(range(len(right)), right, fontsize="small", **PLAIN)
    ax.spines["top"].set_visible(False)
    for side, title in zip(("left", "right"), titles, strict=True):
        ax.set_title(title, loc=side, fontsize="medium", **PLAIN)
    return titled(ax, middle, f"|{unit}|: red adds, blue takes away")


def agreement(
    ax: Axes | None,
    predicted: Mapping[str, Sequence[float]],
    real: Sequence[float],
    *,
    unit: str,
    title: str = "",
) -> Axes:
    """Draw predictions against what came true, one point each, on even scales with a diagonal.

    Args:
        ax: Axes to draw on, or None.
        predicted: The predictions of each method, by its name.
        real: What came true.
        unit: What the numbers count.
        title: What stands above.

    Returns:
        The axes drawn on.
    """
    longest = max(map(len, predicted))
    ax = axes(ax, 4.8 + (0.6 + 0.075 * longest) * (len(predicted) > 1), 4.4)
    everything = [*real, *(x for own in predicted.values() for x in own)]
    finite = [x for x in (*everything, 0.0) if math.isfinite(x)]
    room = 0.06 * ((max(finite) - min(finite)) or 1.0)
    ends = min(finite) - room, max(finite) + room
    ax.plot(ends, ends, color="0.6", linewidth=0.8)
    ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    ax.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    for i, (name, own) in enumerate(predicted.items()):
        ax.plot(own, real, "osD^vX"[i % 6], markersize=5, alpha=0.7, label=name)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    beside_legend(ax, len(predicted))
    bare(ax)
    return titled(ax, title, f"predicted, {unit}", f"in the model, {unit}")


def beside_legend(ax: Axes, n: int) -> None:
    """Put a legend of n > 1 names beside the axes, where no point can lie under it."""
    if n > 1:
        handles, names = ax.get_legend_handles_labels()
        legend = ax.legend(
            handles, names, fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1)
        )
        for text in legend.get_texts():
            text.set(**PLAIN)


def waterfall(
    ax: Axes | None,
    names: Sequence[str],
    steps: Sequence[float],
    *,
    unit: str,
    title: str = "",
    total: tuple[str, float] | None = None,
    beside: tuple[str, Sequence[float]] | None = None,
) -> Axes:
    """Draw numbers as steps of a running sum, each bar from where the last one ended.

    Args:
        ax: Axes to draw on, or None.
        names: Names of the steps.
        steps: The numbers, in order.
        unit: What the numbers count.
        title: What stands above.
        total: Name and value of what the steps lead to, drawn from 0, or None.
        beside: Name and values of another reading after every step, a dashed line, or None.

    Returns:
        The axes drawn on.
    """
    n = len(steps)
    ax = axes(ax, 1.4 + 0.26 * (n + 1), 3.8)
    ax.use_sticky_edges = False  # room above and below the steps
    before = [math.fsum(steps[:i]) for i in range(n)]
    ax.bar(range(n), steps, bottom=before, width=0.8, color=[colour(v) for v in steps])
    after = [math.fsum(steps[: i + 1]) for i in range(n)]
    for i in range(n):
        ax.plot([i - 0.4, i + 1.4], [after[i]] * 2, color="0.4", linewidth=0.7)
    if beside is not None:
        ax.plot(range(n), beside[1], "--", color="#b35806", linewidth=1.2, label=beside[0])
        ax.legend(fontsize="small", frameon=False)
    ends = list(names)
    if total is not None:
        ax.bar([n], [total[1]], width=0.8, color=NEUTRAL)
        ends.append(total[0])
    ax.axhline(0, color="0.2", linewidth=0.8)
    ax.set_xlim(-0.7, len(ends) - 0.3)
    named_axis("x", ax, ends)
    bare(ax)
    return titled(ax, title, "", f"running sum, {unit}")
