"""Some prompts of an evaluation, masked and run; and the numbers of all such parts together.

A part takes three steps: 1. order the tokens that may be masked; 2. run all sets of masked tokens
that the measures read; 3. keep one number per prompt, masking, measure and method, as tensors, and
the curve of numbers by fraction that it comes from.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..checks import kind_of
from ..hosts import Adapter
from .masking import MaskedRuns, Masking, maskable
from .protocols import Measure, as_set
from .scoring import Scored

REMEMBERED = 256
"""Prompts whose masked runs are remembered together."""

Ordered = tuple[tuple[int, ...], tuple[float, ...]]
"""Positions, most relevant first; and the scores, in the order of the positions."""


@dataclass(frozen=True, eq=False)
class Masked:
    """How prompts are masked and run, for all parts.

    Attributes:
        adapter: Adapter of the model.
        asked: The measures that read the masked runs.
        maskings: The ways of masking.
        own: Scores of the user's own for all prompts, by name.
        keep_last: Whether the last token is never masked.
        seed: Seed of ties between scores.
        batch_size: Number of masked prompts run at once.
        progress: Whether to show progress bars on standard error after 2 s.
    """

    adapter: Adapter
    asked: Sequence[Measure]
    maskings: Sequence[Masking]
    own: Mapping[str, Sequence[Any]]
    keep_last: bool
    seed: int
    batch_size: int
    progress: bool

    def run(self, scored: Scored, first: int) -> dict[str, Tensor]:
        """Mask and run some prompts.

        Args:
            scored: The prompts with their scores.
            first: Number of the first of them among all prompts.

        Returns:
            The numbers, as :class:`Parts` reads them.
        """
        # 1. Orders.
        positions = self.positions(scored, first)
        lengths = [maskable(self.adapter, ids).stop for ids in scored.prompts]
        own = {name: values[first : first + len(lengths)] for name, values in self.own.items()}
        orders = [
            orders_of(name, values, lengths, positions, self.seed, first)
            for name, values in (dict(scored.scores) | own).items()
        ]
        # 2. Masked runs.
        shape = len(self.maskings), len(self.asked), len(orders), len(lengths)
        values, runs = torch.zeros(shape, dtype=torch.float64, device="cpu"), []
        wide = max(len(one.fractions) for one in self.asked)
        curves = values.new_full((*shape, wide), math.nan)
        for i, way in enumerate(self.maskings):
            goals = scored.targets, scored.foils, way
            runner = MaskedRuns(
                self.adapter, scored.prompts, *goals, self.batch_size, self.progress
            )
            self._read(runner, orders, values[i], curves[i])
            runs.append(runner.runs)
        # 3. All as tensors, for a file.
        found = {
            "runs": runs,
            "lengths": list(map(len, positions)),
            "targets": scored.targets,
            "predicted": scored.predicted,
        }
        spent = [scored.seconds.get(name, 0.0) for name in scored.scores]  # own columns took none
        tensors = {name: torch.tensor(x, device="cpu") for name, x in found.items()}
        seconds = torch.tensor([*spent, scored.forward_seconds], dtype=torch.float64, device="cpu")
        found = tensors | {"values": values, "seconds": seconds}
        return found | ({"curves": curves} if wide else {})

    def _read(
        self,
        runner: MaskedRuns,
        orders: Sequence[Sequence[Ordered]],
        into: Tensor,
        curves: Tensor,
    ) -> None:
        """Fill in numbers [measure, method, prompt], and curves [… fraction], from masked runs."""
        n = into.shape[-1]
        for start in range(0, n, REMEMBERED):
            chunk = range(start, min(start + REMEMBERED, n))
            # All sets of a chunk at once, so that batches are full; then every measure reads its
            # own.
            runner.need(
                (prompt, masked)
                for prompt in chunk
                for of in orders
                for one in self.asked
                for masked in one.masks(of[prompt][0])
            )
            for prompt in chunk:
                m = {one.metric: partial(runner.outcomes, prompt, one.metric) for one in self.asked}
                for i, one in enumerate(self.asked):
                    for j, of in enumerate(orders):
                        order, scores = of[prompt]
                        into[i, j, prompt] = one.read(m[one.metric], order, scores)
                        for k, value in enumerate(one.points(m[one.metric], order)):
                            curves[i, j, prompt, k] = value
            runner.forget()

    def positions(self, scored: Scored, first: int) -> list[range]:
        """Positions that may be masked: all but the first special token, and the last if asked."""
        if self.keep_last and self.adapter.of_pictures:
            raise ValueError(
                "keep_last= keeps a token at which the prediction is made, and pictures have none. "
                "Drop keep_last=: the row [CLS] is never masked."
            )
        found = []
        least = max(self.asked, key=lambda one: one.least)
        for i, ids in enumerate(scored.prompts, first):
            rows = maskable(self.adapter, ids)
            start, stop = rows.start, rows.stop - self.keep_last
            n = stop - start
            if n < least.least:
                raise ValueError(
                    f"Prompt {i} has {n} tokens that may be masked, but {least.name} needs "
                    f"{least.least}. Drop the prompt, or use a longer one."
                )
            found.append(places := range(start, stop))
            # Deleting needs a token that stays: a kept one, or sets that are never all tokens.
            if n < rows.stop or all(way.kind != "delete" for way in self.maskings):
                continue
            if whole := [one.name for one in self.asked if as_set(places) in one.masks(places)]:
                raise ValueError(
                    f"{whole[0]} masks every token of prompt {i}, which has no "
                    "beginning-of-sequence token that stays. Use masking='token' or 'mean', or "
                    "fractions below 1."
                )
        return found


@dataclass(frozen=True, eq=False)
class Parts:
    """The numbers of all prompts, from those of the parts.

    Attributes:
        values: One number per masking, measure, method and prompt.
        curves: One list per number: what the number comes from, by fraction, nan beyond a measure's
            own fractions. None where a part holds no curves, as those of earlier builds.
        lengths: Number of tokens that could be masked, per prompt.
        targets: Token id of the target, per prompt.
        predicted: Token id that the model predicts, per prompt.
        runs: Number of masked runs of the model, by masking.
        seconds: Seconds that each method took, and then plain forward passes.
    """

    values: Sequence[Sequence[Sequence[tuple[float, ...]]]]
    curves: Sequence[Sequence[Sequence[Sequence[Sequence[float]]]]] | None
    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    predicted: tuple[int, ...]
    runs: Sequence[int]
    seconds: Sequence[float]

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Tensor]]) -> Parts:
        """Put parts together, in their order."""
        all_ = list(parts)
        kept = set.intersection(*(set(part) for part in all_))
        columns = {name: [part[name] for part in all_] for name in kept}
        lengths, targets, predicted = (
            tuple(torch.cat(columns[name]).tolist()) for name in ("lengths", "targets", "predicted")
        )
        runs, seconds = (torch.stack(columns[name]).sum(0).tolist() for name in ("runs", "seconds"))
        values = torch.cat(columns["values"], -1).tolist()
        rows = [[list(map(tuple, by_method)) for by_method in way] for way in values]
        curves = torch.cat(columns["curves"], -2).tolist() if "curves" in kept else None
        return cls(rows, curves, lengths, targets, predicted, runs, seconds)

    def curve(
        self, masking: int, measure: int, method: int, fractions: Sequence[float]
    ) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
        """Fractions and every prompt's points of one curve; both empty where there is none."""
        own = [] if self.curves is None else self.curves[masking][measure][method]
        points = tuple(tuple(by_fraction[: len(fractions)]) for by_fraction in own)
        if all(math.isnan(value) for curve in points for value in curve):
            return (), ()
        return tuple(map(float, fractions)), points


def check_one_each(name: str, scores: Any, n: int) -> None:
    """Refuse scores that are no list with an entry for every prompt."""
    if not isinstance(scores, Sequence | Tensor):
        raise ValueError(
            f"scores[{name!r}] is {kind_of(scores)}, not a list. Pass one list of numbers for each "
            "prompt."
        )
    if len(scores) != n:
        raise ValueError(
            f"scores[{name!r}] has {len(scores)} entries for {n} prompts. Pass one each."
        )


def orders_of(
    name: str,
    scores: Sequence[Any],
    lengths: Sequence[int],
    positions: Sequence[range],
    seed: int,
    first: int = 0,
) -> list[Ordered]:
    """Every prompt's maskable positions by falling score; ties in random order."""
    found = []
    for prompt, (given, n, places) in enumerate(
        zip(scores, lengths, positions, strict=True), first
    ):
        values = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(values, list | tuple) or not all(isinstance(v, Real) for v in values):
            raise ValueError(
                f"scores[{name!r}][{prompt}] is {kind_of(given)}, not a list of numbers. Pass one "
                "list for each prompt, with one number for each token."
            )
        if len(values) != n:
            raise ValueError(
                f"scores[{name!r}] has {len(values)} numbers for the {n} tokens of prompt "
                f"{prompt}. Pass one number per token."
            )
        if any(map(math.isnan, values)):
            raise ValueError(
                f"scores[{name!r}] has nan in prompt {prompt}, which has no rank. Use numbers."
            )
        tie = list(places)
        random.Random(f"{seed} {prompt}").shuffle(tie)
        order = sorted(tie, key=lambda j: -values[j])
        found.append((tuple(order), tuple(values[j] for j in places)))
    return found
