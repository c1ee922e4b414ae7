"""Do a method's scores say which tokens the model needs? The real model, run with them masked.

:func:`evaluate` scores every prompt's tokens by some methods, asks the protocols (``protocols``) which
sets of tokens to mask, runs the model with them masked (``masking``), each set once however
many methods ask for it, and keeps one number for each prompt, method, measure and masking.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .adapters import Adapter, adapt
from .masking import METRICS, MaskedRuns, Masking
from .methods import METHODS, check
from .protocols import BEAM, Measure, measures
from .results import at_least_one
from .scoring import Scored, score
from .significance import Comparison, Interval, bootstrap, compare

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

    def interval(self, level: float = 0.95, seed: int = 0) -> Interval:
        """Mean and bootstrap interval over the prompts."""
        return bootstrap(self.values, level, seed)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What the protocols found, prompt by prompt.

    Attributes:
        rows: Every measure × metric × masking × method.
        model: The model's name.
        dtype: Its dtype.
        lengths: Each prompt's tokens that could be masked.
        targets: Each prompt's target token, as text.
        mask_token: The id that stood for masked tokens, where one did.
        convention: The choice made for gated MLPs.
        batch_size: Rows run at once.
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
    mask_token: int | None
    convention: str
    batch_size: int
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

    def interval(self, method: str, measure: str | None = None, masking: str | None = None,
                 metric: str | None = None, level: float = 0.95) -> Interval:  # fmt: skip
        """A row's mean and bootstrap interval."""
        return self.row(method, measure, masking, metric).interval(level, self.seed)

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
        try:
            import pandas
        except ImportError:
            raise ValueError(
                "to_dataframe needs pandas: pip install 'tensorlens-tl[pandas]'"
            ) from None
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
            f"Evaluation of {len(self.methods)} methods on {len(self)} prompts of {self.model} "
            f"({self.dtype}), mean [95 % interval]"
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
                cells.append([method, *(str(mine[h].interval(seed=self.seed)) for h in heads)])
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            yield ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip()
                   for line in cells]  # fmt: skip


_FIELDS = ("model", "dtype", "lengths", "targets", "mask_token", "convention", "batch_size", "seed",
           "seconds", "forward_seconds", "runs")  # fmt: skip


def _head(measure: str, metric: str, preset: str, higher: bool) -> str:
    what = ", ".join(word for word in (preset, metric) if word)
    return f"{measure} {'↑' if higher else '↓'} ({what})"


# --- Running it ----------------------------------------------------------------------------------

CHUNK = 256
"""Prompts whose masked runs are remembered together."""


def evaluate(
    model: Any,
    prompts: Sequence[Any],
    methods: str | Sequence[str] | None = None,
    protocol: str | Measure | Sequence[str | Measure] = "perturbation",
    masking: str | Sequence[str] = "delete",
    *,
    preset: str | Sequence[float] | None = None,
    metric: str = "probability",
    targets: str | int | Sequence[str | int] | None = None,
    scores: Mapping[str, Sequence[Sequence[float]]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    mask_token: str | int | None = None,
    beam: int = BEAM,
    gate: str = "gate",
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Test methods on prompts: mask the tokens they name, run the model, see what is left of a target.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        prompts: Strings, or token ids [pos], one sequence per prompt.
        methods: Names of :data:`tensorlens_tl.methods.METHODS`; None for all of them (or none, where
            ``scores`` are given).
        protocol: Names of :data:`tensorlens_tl.protocols.PROTOCOLS`, or measures of
            :func:`tensorlens_tl.protocols.measures`.
        masking: "delete", "token", "mean", or several; see ``masking``.
        preset: Which fractions of the tokens are masked: a key of
            :data:`tensorlens_tl.protocols.PRESETS`, or fractions; by default the protocol's.
        metric: What is read of the masked runs: "probability", "log_probability" or "logit" of the
            target, or "agreement", whether it is the model's prediction.
        targets: A token or id for all, one for each prompt, or None for the model's own predictions.
        scores: Scores of your own, by name: for every prompt one number per token.
        options: Options of methods, by name: ``{"norm": {"probes": 16}}``.
        mask_token: What stands for masked tokens where masking is "token"; by default the tokenizer's
            mask token, or else its unknown, padding or end-of-sequence token.
        beam: For "naopc": orders kept in the search for its bounds.
        gate: See :class:`tensorlens_tl.Convention`.
        seed: Of ties between scores, the bootstrap and the permutations.
        batch_size: Rows run at once.
        progress: Whether to show progress on standard error.

    Returns:
        One number for each prompt, measure, masking and method.

    Raises:
        ValueError: If a method, protocol, preset, fraction, masking, metric or target does not exist,
            no prompt predicts the target, a prompt is too short, or an extra is missing.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"expected a list of prompts, got {prompts!r}: put a single one in a list")
    batch_size, own = at_least_one(batch_size, "batch_size"), dict(scores or {})
    names = _names(methods, own)
    for name in names:
        check(name, dict((options or {}).get(name, {})))
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; expected one of {', '.join(METRICS)}")
    asked = _measures(protocol, preset, metric, beam)
    adapter = adapt(model)
    maskings = [Masking.of(kind, adapter, mask_token) for kind in _listed(masking)]
    goals = _targets(targets, len(prompts))
    scored = score(model, prompts, names, goals, options, gate, batch_size, progress)
    if goals is not None and not any(map(int.__eq__, scored.targets, scored.predicted)):
        raise ValueError(
            f"no prompt predicts its target ({adapter.token_string(scored.targets[0])!r}, …): a target "
            "that no prompt has says nothing; leave targets out for the model's own predictions"
        )
    positions = _maskable(adapter, scored, asked, maskings)
    orders = {name: _orders(name, scored.scores[name], positions, seed) for name in names}
    orders |= {name: _orders(name, values, positions, seed) for name, values in own.items()}
    rows: list[Row] = []
    runs: dict[str, int] = {}
    for way in maskings:
        runner = MaskedRuns(adapter, scored.prompts, scored.targets, way, batch_size, progress)
        found = _read(runner, asked, orders, len(prompts))
        runs[way.kind] = runner.runs
        rows += [
            Row(one.name, one.metric, one.preset, way.kind, name, one.higher,
                tuple(found[i, name]))
            for i, one in enumerate(asked)
            for name in orders
        ]  # fmt: skip
    return Evaluation(
        tuple(rows), adapter.name, str(adapter.dtype).removeprefix("torch."),
        tuple(map(len, positions)), tuple(map(adapter.token_string, scored.targets)),
        next((way.token for way in maskings if way.token is not None), None), gate, batch_size, seed,
        dict(scored.seconds), scored.forward_seconds, runs,
    )  # fmt: skip


Ordered = tuple[tuple[int, ...], tuple[float, ...]]
"""Positions, most relevant first; and the scores, in the order of the positions."""


def _read(
    runner: MaskedRuns,
    asked: Sequence[Measure],
    orders: Mapping[str, Sequence[Ordered]],
    n: int,
) -> dict[tuple[int, str], list[float]]:
    found: dict[tuple[int, str], list[float]] = {
        (i, name): [] for i in range(len(asked)) for name in orders
    }
    for start in range(0, n, CHUNK):
        chunk = range(start, min(start + CHUNK, n))
        runner.need(
            (prompt, masked)
            for prompt in chunk
            for of in orders.values()
            for one in asked
            for masked in one.masks(of[prompt][0])
        )
        for prompt in chunk:
            m = {one.metric: partial(runner.outcomes, prompt, one.metric) for one in asked}
            for (i, name), values in found.items():
                values.append(asked[i].read(m[asked[i].metric], *orders[name][prompt]))
        runner.forget()
    return found


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | Measure) else list(given)


def _names(methods: str | Sequence[str] | None, own: Mapping[str, Any]) -> list[str]:
    if methods is None:
        methods = [] if own else list(METHODS)
    names = list(dict.fromkeys(_listed(methods)))
    if both := [name for name in own if name in METHODS]:
        raise ValueError(
            f"scores are named {', '.join(both)} like a method: give them another name"
        )
    if not names and not own:
        raise ValueError(f"expected at least one method, got none; there are {', '.join(METHODS)}")
    return names


def _measures(
    protocol: Any, preset: str | Sequence[float] | None, metric: str, beam: int
) -> list[Measure]:
    asked: list[Measure] = []
    for one in _listed(protocol):
        asked += [one] if isinstance(one, Measure) else measures(one, preset, metric, beam)
    if not asked:
        raise ValueError("expected at least one protocol, got none")
    return asked


def _targets(given: Any, n: int) -> list[str | int] | None:
    if given is None:
        return None
    if isinstance(given, str | int):
        return [given] * n
    if len(given) != n:
        raise ValueError(f"expected one target per prompt, {n}, or one for all, got {len(given)}")
    return list(given)


def _maskable(
    adapter: Adapter, scored: Scored, asked: Sequence[Measure], maskings: Sequence[Masking]
) -> list[range]:
    """Positions that may be masked: all but the beginning-of-sequence token's."""
    bos, found = getattr(adapter.tokenizer, "bos_token_id", None), []
    least = max(asked, key=lambda one: one.least)
    for i, ids in enumerate(scored.prompts):
        start = int(bos is not None and int(ids[0]) == bos)
        n = len(ids) - start
        if n < least.least:
            raise ValueError(
                f"prompt {i} has {n} tokens that may be masked, expected at least {least.least} for "
                f"{least.name}: leave it out, or make it longer"
            )
        whole = next((one.name for one in asked if one.masks_all), None)
        if start == 0 and whole and any(way.kind == "delete" for way in maskings):
            raise ValueError(
                f"{whole} masks every token, and prompt {i} has no beginning-of-sequence token that "
                "would stay: expected masking by token or mean, or fractions below 1"
            )
        found.append(range(start, len(ids)))
    return found


def _orders(
    name: str, scores: Sequence[Any], positions: Sequence[range], seed: int
) -> list[Ordered]:
    if len(scores) != len(positions):
        raise ValueError(f"expected {name} scores for {len(positions)} prompts, got {len(scores)}")
    found = []
    for prompt, (given, places) in enumerate(zip(scores, positions, strict=True)):
        values = given.tolist() if hasattr(given, "tolist") else list(given)
        if len(values) != places.stop or any(math.isnan(value) for value in values):
            raise ValueError(
                f"expected {name} to score the {places.stop} tokens of prompt {prompt}, got "
                f"{len(values)} numbers" + (", nan among them" * any(map(math.isnan, values)))
            )
        tie = list(places)
        random.Random(f"{seed} {prompt}").shuffle(tie)
        order = sorted(tie, key=lambda j: -values[j])
        found.append((tuple(order), tuple(values[j] for j in places)))
    return found
