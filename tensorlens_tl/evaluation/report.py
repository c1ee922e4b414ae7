"""What an evaluation found: a number per prompt, measure, masking and method; means, intervals, tests."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ..checks import need
from .intervals import Estimate
from .significance import Comparison, compare, estimate

if TYPE_CHECKING:
    import pandas

FORMAT = "tensorlens_tl evaluation 1"


@dataclass(frozen=True)
class Row:
    """One measure of one method under one masking.

    Attributes:
        measure: "positive", "comprehensiveness", …: see ``protocols``.
        metric: What was read of the masked runs.
        preset: Whose fractions.
        masking: How tokens were masked.
        method: Whose scores.
        higher: Whether a higher number is better.
        values: One for each prompt; nan where the measure is not defined.
    """

    measure: str
    metric: str
    preset: str
    masking: str
    method: str
    higher: bool
    values: tuple[float, ...]

    def estimate(self, seed: int = 0) -> Estimate:
        """Mean over the prompts, and its bootstrap interval."""
        return estimate(self.values, seed)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What the protocols found, prompt by prompt.

    Attributes:
        rows: Every measure × metric × masking × method.
        model: The model's name.
        dtype: Its dtype.
        lengths: Each prompt's tokens that could be masked.
        targets: Each prompt's target token, as text.
        versus: What the methods' target was less: "runner_up", "others", a token, "own" for several, or None.
        mask_token: The id that stood for masked tokens, where one did.
        convention: The choice made for gated MLPs.
        batch_size: Rows run at once.
        keep_last: Whether the last token was never masked.
        seed: Of ties, bootstrap and permutations.
        seconds: What every method's scores took, all prompts together.
        forward_seconds: What plain forward passes of the same prompts took.
        runs: Masked runs of the model, by masking.
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

    def __len__(self) -> int:
        return len(self.lengths)

    def row(
        self,
        method: str,
        measure: str | None = None,
        masking: str | None = None,
        metric: str | None = None,
    ) -> Row:
        """One row; what is left out must be the same in all that fit.

        Args:
            method: Whose.
            measure: Which; see :class:`Row`.
            masking: How tokens were masked.
            metric: What was read.

        Returns:
            The row.

        Raises:
            ValueError: If none fits, or several do.
        """
        asked = {"method": method, "measure": measure, "masking": masking, "metric": metric}
        asked = {name: value for name, value in asked.items() if value is not None}
        found = [r for r in self.rows if all(getattr(r, k) == v for k, v in asked.items())]
        if len(found) == 1:
            return found[0]
        had = {name: dict.fromkeys(getattr(r, name) for r in found or self.rows)
               for name in ("method", "measure", "masking", "metric")}  # fmt: skip
        shown = "; ".join(f"{name} {', '.join(values)}" for name, values in had.items())
        raise ValueError(f"{len(found)} rows are {asked}, expected one: say more of {shown}")

    def estimate(
        self,
        method: str,
        measure: str | None = None,
        masking: str | None = None,
        metric: str | None = None,
    ) -> Estimate:
        """A row's mean and its bootstrap interval; arguments as in :meth:`row`."""
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
            method: The one.
            other: The other.
            measure: Which; see :class:`Row`.
            masking: How tokens were masked.
            metric: What was read.

        Returns:
            The mean difference with its interval, and the p of a paired permutation test.
        """
        one, two = (self.row(name, measure, masking, metric) for name in (method, other))
        pair = (one.values, two.values) if one.higher else (two.values, one.values)
        return compare(*pair, seed=self.seed)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, as given."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def forwards(self) -> dict[str, float]:
        """What every method's scores took beyond the capture, in plain forward passes, as timed."""
        return {name: spent / self.forward_seconds for name, spent in self.seconds.items()}

    def to_dataframe(self) -> pandas.DataFrame:
        """A line per row and prompt.

        Returns:
            The frame.

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
        """Everything as JSON; nan is null. :meth:`from_json` reads it."""
        data = {"format": FORMAT} | {name: getattr(self, name) for name in _FIELDS}
        rows = [
            vars(row) | {"values": [None if math.isnan(v) else v for v in row.values]}
            for row in self.rows
        ]
        return json.dumps(data | {"rows": rows}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read what :meth:`to_json` wrote.

        Args:
            text: The JSON.

        Returns:
            The evaluation.

        Raises:
            ValueError: If it is something else.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            rows = tuple(
                Row(**row | {"values": tuple(math.nan if v is None else float(v)
                                             for v in row["values"])})
                for row in data.pop("rows")
            )  # fmt: skip
            data |= {name: tuple(data[name]) for name in ("lengths", "targets")}
            found = cls(rows=rows, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected JSON that Evaluation.to_json wrote: {error!r}") from None
        if any(len(row.values) != len(found) for row in rows):
            raise ValueError(f"expected {len(found)} values in every row, as many as prompts")
        return found

    def __repr__(self) -> str:
        head = (
            f"Evaluation of {_many(len(self.methods), 'method')} on {_many(len(self), 'prompt')} of "
            f"{self.model} ({self.dtype}), mean [95 % interval]"
        )
        return "\n".join([head, *(line for block in self._blocks() for line in ("", *block))])

    def _blocks(self) -> Iterator[list[str]]:
        """A table per masking: methods down, measures across."""
        for masking in dict.fromkeys(row.masking for row in self.rows):
            here = [row for row in self.rows if row.masking == masking]
            heads = dict.fromkeys((r.measure, r.metric, r.preset, r.higher) for r in here)
            cells = [[f"masked by {masking}", *(_head(*head) for head in heads)]]
            for method in self.methods:
                mine = {(r.measure, r.metric, r.preset, r.higher): r for r in here
                        if r.method == method}  # fmt: skip
                cells.append([method, *(str(mine[h].estimate(self.seed)) for h in heads)])
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            yield ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip()
                   for line in cells]  # fmt: skip


_FIELDS = tuple(field.name for field in fields(Evaluation) if field.name != "rows")


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _head(measure: str, metric: str, preset: str, higher: bool) -> str:
    what = ", ".join(word for word in (preset, metric) if word)
    return f"{measure} {'↑' if higher else '↓'} ({what})"
