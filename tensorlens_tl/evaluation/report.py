"""Results of an evaluation: numbers by prompt, measure, masking and method, and statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import need, spelled
from ..operator import Convention
from ..pictures import Page, Paged, Tabled, estimates, interval_view
from .intervals import Estimate
from .significance import Comparison, compare, estimate
from .study_file import read_study, study_text

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl evaluation 1"


@spelled
@dataclass(frozen=True)
class Row(Tabled):
    """One measure of one method under one masking.

    Attributes:
        measure: Name of the measure, such as "positive" or "comprehensiveness"; see ``protocols``.
        metric: Number read of the masked runs, such as "probability".
        preset: Name of the fractions of tokens that were masked; "" where there are none.
        masking: How tokens were masked: "delete", "token" or "mean".
        method: Name of the method whose scores were tested.
        higher: Whether a higher number is better.
        values: One number per prompt; nan where the measure is not defined.
    """

    measure: str
    metric: str
    preset: str
    masking: str
    method: str
    higher: bool
    values: tuple[float, ...]

    _COLUMNS = ("measure", "metric", "preset", "masking", "method", "higher", "prompt", "value")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        own = tuple(getattr(self, name) for name in self._COLUMNS[:6])
        return ((*own, prompt, value) for prompt, value in enumerate(self.values))

    def estimate(self, seed: int = 0) -> Estimate:
        """Mean over the prompts, with its bootstrap interval."""
        return estimate(self.values, seed)


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
    ) -> Axes:
        """Draw the means of a measure with matplotlib, with 95 % intervals: methods down.

        Args:
            ax: Axes to draw on. None makes a figure.
            measure: Name of the measure. None draws each of them.
            masking: How tokens were masked. None draws each masking.
            metric: Number read of the masked runs. None takes the only one.

        Returns:
            The axes drawn on. By the first measure, the best method is on top.

        Raises:
            ValueError: If matplotlib is missing, or not exactly one metric fits.
        """
        asked = {"measure": measure, "masking": masking, "metric": metric}
        kinds: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in self.rows:
            if all(value in (None, getattr(row, name)) for name, value in asked.items()):
                kind = row.metric, row.masking, row.measure, row.preset, row.higher
                kinds.setdefault(kind, {})[row.method] = row
        metrics = dict.fromkeys(kind[0] for kind in kinds)
        if len(metrics) != 1:
            known = ", ".join(dict.fromkeys(row.metric for row in self.rows))
            raise ValueError(
                f"{len(metrics)} metrics fit {asked}, but one is drawn. Name one by metric=, of "
                f"{known}, and a measure that the evaluation has."
            )
        found = {}
        for (name, masked, of, preset, higher), rows in kinds.items():
            head = f"{_head(of, name, preset, higher)}, masked by {masked}"
            found[head] = [rows[method].estimate(self.seed) for method in self.methods]
        (best, *_), (*_, higher) = found.values(), next(iter(kinds))
        worst = -math.inf if higher else math.inf
        size = [worst if math.isnan(e.value) else e.value for e in best]
        order = sorted(range(len(size)), key=size.__getitem__, reverse=higher)
        series = {n: [(e[i].value, e[i].low, e[i].high) for i in order] for n, e in found.items()}
        title = f"{_many(len(self), 'prompt')} of {self.model}"
        names = [self.methods[i] for i in order]
        return estimates(ax, names, series, title=title, xlabel="mean and 95 % interval")

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
            vars(row) | {"values": [None if math.isnan(v) else v for v in row.values]}
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
            rows = tuple(
                Row(**row | {"values": _with_nan(row["values"])}) for row in data.pop("rows")
            )
            data |= {name: tuple(data[name]) for name in ("lengths", "targets")}
            found = cls(rows=rows, **data)
            if any(len(row.values) != len(found) for row in rows):
                raise ValueError(f"A row does not have {len(found)} values. Keep one per prompt.")
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
        notes = ["Low and high are the ends of 95 % bootstrap intervals over prompts."]
        return Page(repr(self).splitlines()[0], [table], notes)

    def __repr__(self) -> str:
        head = (
            f"Evaluation of {_many(len(self.methods), 'method')} on {_many(len(self), 'prompt')} "
            f"of {self.model} ({self.dtype}), mean [95 % interval]"
        )
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


_FIELDS = tuple(field.name for field in fields(Evaluation) if field.name != "rows")


def _with_nan(values: Sequence[float | None]) -> tuple[float, ...]:
    """Values of JSON, which has no nan, and null in its place."""
    return tuple(math.nan if value is None else float(value) for value in values)


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _head(measure: str, metric: str, preset: str, higher: bool) -> str:
    what = ", ".join(word for word in (preset, metric) if word)
    return f"{measure} {'↑' if higher else '↓'} ({what})"
