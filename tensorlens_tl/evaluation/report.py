"""Results of an evaluation: numbers by prompt, measure, masking and method, and statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..checks import need, spelled
from ..operator import Convention
from ..pictures import (
    Page,
    Paged,
    Tabled,
    dots,
    estimates,
    interval_view,
    intervals_over,
    table_view,
)
from .curves import best_first, curve_figure, curve_page_view
from .intervals import Estimate
from .significance import Comparison, compare, estimate
from .study_file import read_study, study_text

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl evaluation 1"


class Kind(NamedTuple):
    """What rows of several methods have in common."""

    measure: str
    metric: str
    preset: str
    higher: bool
    masking: str

    def __str__(self) -> str:
        return f"{_head(*self[:4])}, masked by {self.masking}"


@spelled
@dataclass(frozen=True)
class Row(Paged, Tabled):
    """One measure of one method under one masking.

    Attributes:
        measure: Name of the measure, such as "positive" or "comprehensiveness"; see ``protocols``.
        metric: Number read of the masked runs, such as "probability".
        preset: Name of the fractions of tokens that were masked; "" where there are none.
        masking: How tokens were masked: "delete", "token" or "mean".
        method: Name of the method whose scores were tested.
        higher: Whether a higher number is better.
        values: One number per prompt; nan where the measure is not defined.
        fractions: Shares of the tokens, from 0 to 1, at which the curve was read; () where the
            measure has no curve, or the file is of an earlier build that kept none.
        points: The curve of every prompt [prompt][fraction], whose mean or area is the value.
    """

    measure: str
    metric: str
    preset: str
    masking: str
    method: str
    higher: bool
    values: tuple[float, ...]
    fractions: tuple[float, ...] = ()
    points: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    _FRAMED = False
    _COLUMNS = ("measure", "metric", "preset", "masking", "method", "higher", "prompt", "value")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        own = tuple(getattr(self, name) for name in self._COLUMNS[:6])
        return ((*own, prompt, value) for prompt, value in enumerate(self.values))

    @property
    def _kind(self) -> Kind:
        """What rows of other methods have in common with this one."""
        return Kind(*(getattr(self, name) for name in Kind._fields))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the number of every prompt with matplotlib, and their mean as a line.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. The mean with its interval stands above.

        Raises:
            ValueError: If matplotlib is missing.
        """
        known = {self.method: [v for v in self.values if not math.isnan(v)]}
        title = f"{self._kind}\n{self.estimate()}, {_many(len(self.values), 'prompt')}"
        return dots(ax, known, ylabel=f"{self.measure}, {self.metric}", title=title)

    def _page(self) -> Page:
        labels, values = [[str(i)] for i in range(len(self.values))], np.array(self.values)
        views = [table_view(["prompt"], [self.measure], labels, values[:, None])]
        if self.points:
            views.insert(0, curve_page_view({self.method: self}, "", 0))
        found = self.estimate()
        notes = [f"Mean {found}: {intervals_over([found.low], found.n)}."]
        return Page(f"{self.method}: {self._kind}", views, notes)

    def estimate(self, seed: int = 0) -> Estimate:
        """Mean over the prompts, with its bootstrap interval."""
        return estimate(self.values, seed)

    def curve(self, seed: int = 0) -> tuple[Estimate, ...]:
        """Mean over the prompts at every one of ``fractions``, with its bootstrap interval."""
        return tuple(estimate(at, seed) for at in zip(*self.points, strict=True))


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Paged):
    """Results of an evaluation, prompt by prompt.

    Attributes:
        rows: One row per measure, metric, masking and method.
        model: Name of the model.
        dtype: Name of the model's dtype, such as "float32".
        lengths: Number of tokens that could be masked, per prompt.
        targets: Target token as text, per prompt.
        versus: What was subtracted from the target: "runner_up", "all_others", "own" for given
            tokens, or None.
        mask_token: Token id that replaced masked tokens, or None.
        convention: How gated MLPs were made linear.
        batch_size: Number of masked prompts run at once.
        keep_last: Whether the last token was never masked.
        seed: Seed of ties, bootstrap and permutations.
        seconds: Seconds that the scores of each method took, all prompts together.
        forward_seconds: Seconds that plain forward passes of the same prompts took.
        runs: Number of masked runs of the model, by masking.
        first_token: Token that was put in front of the prompts, as in :class:`Convention`.
    """

    rows: tuple[Row, ...]
    model: str
    dtype: str
    lengths: tuple[int, ...]
    targets: tuple[str, ...]
    versus: str | None
    mask_token: int | None
    convention: str
    batch_size: int
    keep_last: bool
    seed: int
    seconds: Mapping[str, float]
    forward_seconds: float
    runs: Mapping[str, int]
    first_token: str | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def row(
        self,
        method: str,
        measure: str | None = None,
        masking: str | None = None,
        metric: str | None = None,
    ) -> Row:
        """Find the one row that fits.

        Args:
            method: Name of the method.
            measure: Name of the measure; may be omitted where all rows of the method share one.
            masking: How tokens were masked; may be omitted likewise.
            metric: Number read of the masked runs; may be omitted likewise.

        Returns:
            The row that fits.

        Raises:
            ValueError: If no row fits, or several rows do.
        """
        asked = {"method": method, "measure": measure, "masking": masking, "metric": metric}
        asked = {name: value for name, value in asked.items() if value is not None}
        found = [r for r in self.rows if all(getattr(r, k) == v for k, v in asked.items())]
        if len(found) == 1:
            return found[0]
        had = {
            name: dict.fromkeys(getattr(r, name) for r in found or self.rows)
            for name in ("method", "measure", "masking", "metric")
        }
        shown = "; ".join(f"{name} {', '.join(values)}" for name, values in had.items())
        raise ValueError(f"{len(found)} rows fit {asked}, but one is needed. Choose among {shown}.")

    def estimate(
        self,
        method: str,
        measure: str | None = None,
        masking: str | None = None,
        metric: str | None = None,
    ) -> Estimate:
        """Mean of one row, with its bootstrap interval; arguments as in :meth:`row`."""
        return self.row(method, measure, masking, metric).estimate(self.seed)

    def compare(
        self,
        method: str,
        other: str,
        measure: str | None = None,
        masking: str | None = None,
        metric: str | None = None,
    ) -> Comparison:
        """By how much a method is better than another on the same prompts; below 0 it is worse.

        Args:
            method: Name of the first method.
            other: Name of the method to compare with.
            measure: As in :meth:`row`.
            masking: As in :meth:`row`.
            metric: As in :meth:`row`.

        Returns:
            The mean difference with its interval, and the p-value of a paired permutation test.
        """
        one, two = (self.row(name, measure, masking, metric) for name in (method, other))
        pair = (one.values, two.values) if one.higher else (two.values, one.values)
        return compare(*pair, seed=self.seed)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order they were given."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def forwards(self) -> dict[str, float]:
        """Time that the scores of each method took beyond the capture, in plain forward passes."""
        return {name: spent / self.forward_seconds for name, spent in self.seconds.items()}

    def plot(
        self,
        ax: Axes | None = None,
        measure: str | None = None,
        masking: str | None = None,
        metric: str | None = None,
        kind: str = "means",
    ) -> Axes:
        """Draw means with matplotlib, or the curves by masked share, with 95 % intervals.

        Args:
            ax: Axes to draw on. None makes a figure.
            measure: Name of the measure. None draws the means of each of them.
            masking: How tokens were masked. None draws the means of each masking.
            metric: Number read of the masked runs. None takes the only one.
            kind: "means", methods down; or "curves" of one measure and masking, a line per method.

        Returns:
            The axes drawn on. By the first measure, the best method is first.

        Raises:
            ValueError: If matplotlib is missing, not exactly one metric fits, or, of curves, not
                exactly one measure and masking, or there are none.
        """
        if kind not in ("means", "curves"):
            raise ValueError(f"kind={kind!r} does not exist. Use 'means' or 'curves'.")
        asked = {"measure": measure, "masking": masking, "metric": metric}
        kinds = self._kinds(**asked)
        for name in ("metric",) if kind == "means" else ("metric", "measure", "masking"):
            if (n := len({getattr(one, name) for one in kinds})) != 1:
                known = ", ".join(dict.fromkeys(getattr(row, name) for row in self.rows))
                raise ValueError(
                    f"{n} {name}s fit {asked}, but one is drawn. Name one by {name}=, of {known}, "
                    "and others that the evaluation has."
                )
        first, rows = next(iter(kinds.items()))
        means = {name: row.estimate(self.seed) for name, row in rows.items()}
        order = best_first(means, first.higher)
        title = f"{_many(len(self), 'prompt')} of {self.model}"
        if kind == "curves":
            title += ", so no interval" if len(self) == 1 else ""
            if not all(row.points for row in rows.values()):
                raise ValueError(f"measure={first.measure!r} has no curves here. {_NO_CURVES}")
            rows = {name: rows[name] for name in order}
            return curve_figure(ax, rows, f"{first}\n{title}", self.seed)
        found = {
            str(one): [own[name].estimate(self.seed) for name in order]
            for one, own in kinds.items()
        }
        series = {name: [(e.value, e.low, e.high) for e in own] for name, own in found.items()}
        over = intervals_over((e.low for own in found.values() for e in own), len(self))
        return estimates(ax, order, series, title=title, xlabel=f"mean ({over})")

    def _kinds(self, **asked: str | None) -> dict[Kind, dict[str, Row]]:
        """The rows by what they measure and by method; of what is asked, None fits all."""
        found: dict[Kind, dict[str, Row]] = {}
        for row in self.rows:
            if all(value in (None, getattr(row, name)) for name, value in asked.items()):
                found.setdefault(row._kind, {})[row.method] = row
        return found

    def to_dataframe(self) -> pandas.DataFrame:
        """Turn the results into a table with one line per row and prompt.

        Returns:
            A data frame with the fields of :class:`Row`, "prompt" and "value".

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        names = ("measure", "metric", "preset", "masking", "method", "higher")
        lines = [
            {name: getattr(row, name) for name in names} | {"prompt": i, "value": value}
            for row in self.rows
            for i, value in enumerate(row.values)
        ]
        return pandas.DataFrame(lines)

    def to_json(self) -> str:
        """Write everything as JSON, which :meth:`from_json` reads; nan is null."""
        rows = [
            vars(row) | {"values": _null(row.values), "points": [_null(own) for own in row.points]}
            for row in self.rows
        ]
        return study_text({name: getattr(self, name) for name in _FIELDS} | {"rows": rows}, FORMAT)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read what :meth:`to_json` wrote.

        Args:
            text: JSON of an evaluation.

        Returns:
            The evaluation that was written.

        Raises:
            ValueError: If the text is not JSON of an evaluation.
        """

        def build(data: dict[str, Any]) -> Evaluation:
            rows = tuple(map(_row, data.pop("rows")))
            data |= {name: tuple(data[name]) for name in ("lengths", "targets")}
            found = cls(rows=rows, **data)
            if any(len(row.values) != len(found) for row in rows):
                raise ValueError(f"A row does not have {len(found)} values. Keep one per prompt.")
            for row in rows:
                sizes = {len(own) for own in row.points}
                if row.points and (len(row.points), sizes) != (len(found), {len(row.fractions)}):
                    raise ValueError("A row's points do not fit. Keep one per prompt and fraction.")
            return found

        return read_study(text, FORMAT, build, "Evaluation.to_json")

    def _page(self) -> Page:
        labels, numbers = [], []
        for row in self.rows:
            found = row.estimate(self.seed)
            numbers.append([found.value, found.low, found.high])
            head = _head(row.measure, row.metric, row.preset, row.higher)
            labels.append([row.method, head, row.masking])
        names, values = ["method", "measure", "masked by"], np.array(numbers).reshape(-1, 3)
        table = interval_view(names, labels, values, group=1)
        notes = [f"{intervals_over(values[:, 1], len(self)).capitalize()}."]
        views = [replace(table, tab="means")]
        for kind, rows in self._kinds().items():
            if all(row.points for row in rows.values()):
                means = {name: row.estimate(self.seed) for name, row in rows.items()}
                best = {name: rows[name] for name in best_first(means, kind.higher)}
                views.append(replace(curve_page_view(best, "", self.seed), tab=str(kind)))
        if len(views) == 1:
            notes.append(f"There are no curves to draw. {_NO_CURVES}")
        return Page(repr(self).splitlines()[0], views, notes, tabs=True, tab_name="Show")

    def __repr__(self) -> str:
        head = (
            f"Evaluation of {_many(len(self.methods), 'method')} on {_many(len(self), 'prompt')} "
            f"of {self.model} ({self.dtype}), "
        )
        head += "one prompt, so no interval" if len(self) == 1 else "mean [95 % interval]"
        in_front = Convention(first_token=self.first_token).in_front
        head = ", ".join(filter(None, (head, in_front)))
        return "\n".join([head, *(line for block in self._blocks() for line in ("", *block))])

    def _blocks(self) -> Iterator[list[str]]:
        """A table per masking: methods down, measures across."""
        for masking in dict.fromkeys(row.masking for row in self.rows):
            here = [row for row in self.rows if row.masking == masking]
            heads = dict.fromkeys((r.measure, r.metric, r.preset, r.higher) for r in here)
            cells = [[f"masked by {masking}", *(_head(*head) for head in heads)]]
            for method in self.methods:
                mine = {
                    (r.measure, r.metric, r.preset, r.higher): r for r in here if r.method == method
                }
                cells.append([method, *(str(mine[h].estimate(self.seed)) for h in heads)])
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            yield [
                "  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip()
                for line in cells
            ]


_NO_CURVES = (
    "Measures that read no fractions have none, and evaluations of earlier builds kept none: name "
    "another measure, or evaluate again."
)
_FIELDS = tuple(field.name for field in fields(Evaluation) if field.name != "rows")


def _row(data: Mapping[str, Any]) -> Row:
    """A row of JSON; those of earlier builds have no curve."""
    curve = {
        "fractions": tuple(map(float, data.get("fractions", ()))),
        "points": tuple(map(_with_nan, data.get("points", ()))),
    }
    return Row(**{**data, "values": _with_nan(data["values"]), **curve})


def _null(values: Sequence[float]) -> list[float | None]:
    """Values for JSON, which has no nan."""
    return [None if math.isnan(value) else value for value in values]


def _with_nan(values: Sequence[float | None]) -> tuple[float, ...]:
    """Values of JSON, which has no nan, and null in its place."""
    return tuple(math.nan if value is None else float(value) for value in values)


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _head(measure: str, metric: str, preset: str, higher: bool) -> str:
    what = ", ".join(word for word in (preset, metric) if word)
    return f"{measure} {'↑' if higher else '↓'} ({what})"
