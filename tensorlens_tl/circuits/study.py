"""Prompts and options of one call, checked; and every circuit's metric, by either of two ways.

The packed way runs all prompts at once from the model's weights. The host's way runs the host
itself with rebuilt inputs, prompts of one length at a time; it serves every model. A study takes
the packed way where the model is known and gives the host's own logits, in these steps:

1. Cut every prompt after the position of the prediction: nothing later is read.
2. The clean run.
3. What replaces an ablated writer: the corrupted run, from the first token at which the two
   prompts differ; or means; or nothing. With it, the run with every edge ablated.
4. Every circuit's run.
5. Measure the logits of every run, prompt by prompt.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..checks import progress_bar
from ..chunks import question_of, spread
from ..hosts import added_token, each_prompt
from ..passes import CircuitRuns, EdgeModel, Layout, Outputs, PackedModel, Run, Writes, run
from .model_id import ModelInfo
from .packed_pairs import PackedPairs
from .prompt_pairs import LogitMetric, Pairs, paired

if TYPE_CHECKING:
    from .ablation import AblationOptions


@dataclass(frozen=True, eq=False)
class Study:
    """Prompts and options of one call, checked and ready to run."""

    model: EdgeModel
    groups: list[Pairs]
    mean_over: list[Pairs]
    metric: LogitMetric
    options: AblationOptions
    first_token: str | None

    @classmethod
    def of(
        cls,
        model: EdgeModel,
        prompts: Any,
        corrupted: Any,
        target: Any,
        versus: Any,
        options: AblationOptions,
    ) -> Study:
        """Check the prompts and the target of a call."""
        kind = options.ablation
        if kind == "resample" and corrupted is None:
            raise ValueError(
                "ablation='resample' needs corrupted=, one prompt of equal length for each "
                "prompt. Pass corrupted=, or use ablation='mean' or 'zero'."
            )
        if kind != "resample" and corrupted is not None:
            raise ValueError(
                f"corrupted= is used by ablation='resample' only, not by ablation={kind!r}. Drop "
                "corrupted=; for means over those prompts, pass ablation='mean' and mean_over=."
            )
        prompts = each_prompt(prompts, model.adapter.tokenizer)
        groups = paired(model.adapter, prompts, corrupted)
        mean_over = groups
        if options.mean_over is not None:
            mean_over = paired(model.adapter, options.mean_over)
        if kind == "mean":
            lengths = [group.n_pos for group in (*groups, *mean_over)]
            if len(set(lengths)) > 1:
                raise ValueError(
                    "ablation='mean' needs prompts of one length, as it averages position by "
                    f"position. These have {min(lengths)} to {max(lengths)} tokens: measure each "
                    "length apart, or use 'resample'."
                )
            if sum(len(group.ids) for group in mean_over) < 2:
                raise ValueError(
                    "ablation='mean' over one prompt changes nothing. Pass more prompts by "
                    "mean_over=."
                )
        n = sum(len(group.ids) for group in groups)
        metric = LogitMetric.of(model.adapter, n, target, versus, options.metric, options.pos)
        first = added_token(model.adapter, prompts[0])
        return cls(model, groups, mean_over, metric, options, first)

    @property
    def frozen(self) -> bool:
        return self.options.attention == "frozen"

    @property
    def told(self) -> tuple[int, str | None]:
        """What every result ends with: the seed, and what was put in front of the first prompt."""
        return self.options.seed, self.first_token

    def run(
        self, masks: Bool[Tensor, "circuit reader writer"]
    ) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"], Float[Tensor, "circuit prompt"]]:
        """The metric of the model as it is, with every edge ablated, and of every circuit."""
        n = sum(len(group.ids) for group in self.groups)
        # Equal circuits (small sizes, rankings without negative scores) are run once.
        masks, which = torch.unique(masks, dim=0, return_inverse=True)
        if self.options.resume is None:
            values = self._values(masks, n)
        else:
            values = self._spread(masks, n, self.options.resume)
        return values[0], values[1], values[2:][which]

    def _values(self, masks: Bool[Tensor, "circuit reader writer"], n: int) -> Tensor:
        """The metric of every run [2 + circuit, prompt], whichever way serves."""
        values = self._packed(masks, n)
        return self._of_the_host(masks, n) if values is None else values

    def _spread(
        self,
        masks: Bool[Tensor, "circuit reader writer"],
        n: int,
        resume: str | os.PathLike[str],
    ) -> Tensor:
        """The same by chunks of prompts, which a folder keeps and processes share."""
        pairs = [pair for group in self.groups for pair in group.split(1)]
        adapter, options = self.model.adapter, replace(self.options, progress=False, resume=None)
        marked = ModelInfo.of(adapter.name, adapter.weights).fingerprint
        circuits = hashlib.sha256(masks.numpy().tobytes()).hexdigest()
        how = options.ablation, options.attention, options.batch_size
        question = question_of(
            (marked, circuits, how, self.metric.about), (pair.about for pair in pairs)
        )

        def run(start: int, stop: int) -> dict[str, Tensor]:
            index = torch.cat([pair.index for pair in pairs[start:stop]])
            part = replace(self, groups=Pairs.together(pairs[start:stop]), options=options)
            return {"index": index, "values": part._values(masks, n)[:, index]}

        values = torch.zeros(2 + len(masks), n, dtype=torch.float64, device="cpu")
        for chunk in spread(resume, question, n, run, self.options.progress):
            values[:, chunk["index"]] = chunk["values"]
        return values

    # --- The packed way

    def _packed(self, masks: Bool[Tensor, "circuit reader writer"], n: int) -> Tensor | None:
        """The metric of every run [2 + circuit, prompt]; None where the model is not known."""
        adapter, universe = self.model.adapter, self.model.universe
        longest = max(group.n_pos for group in self.groups)
        model = PackedModel.of(adapter, universe.wiring, self.model.points[0, "resid_pre"], longest)
        if model is None:
            return None
        values = torch.zeros(2 + len(masks), n, dtype=torch.float64, device="cpu")
        most, given = (
            model.most_tokens(int(masks.any(1).sum(-1).max()) + 1),
            self.options.batch_size,
        )
        other, metric, device = None, self.metric, self.model.device
        with progress_bar("prompts", n, self.options.progress) as bar:
            # 1. Nothing after the prediction is read.
            for p in PackedPairs.pieces(self.groups, metric, device, lambda n: given or most // n):
                # 2. The clean run; at first, beside the host's own.
                x = model.embed(p.rows)
                clean = run(model, p.where, x, keep=False, patterns=self.frozen)
                logits = model.logits(clean.last)
                if bar.n == 0 and not model.agrees(p.rows[0], logits[0]):
                    return None
                if self.options.ablation == "mean" and other is None:
                    other = self._packed_mean(model, len(p.rows[0]))
                # 3. What replaces, and the run with every edge ablated.
                ablated, runs = self._ablated(model, clean, x, p, other)
                # 4. and 5. Every circuit.
                for i, last in enumerate(chain([clean.last, ablated.last], map(runs.last, masks))):
                    at = model.logits(last) if i else logits
                    found = metric.values_at(at[None], logits, p.index)
                    values[i, p.index] = found[0].double().cpu()
                bar.update(len(p.rows))
        return values

    def _ablated(
        self,
        model: PackedModel,
        clean: Run,
        x: Float[Tensor, "token d_model"],
        pairs: PackedPairs,
        mean: Outputs | None,
    ) -> tuple[Run, CircuitRuns]:
        """The run with every edge ablated, of live patterns; and what all circuits' runs share."""
        where, held = clean.where, clean.A if self.frozen else None
        blocks = len(model.layers)
        if self.options.ablation != "resample":
            none = Outputs(None, [None] * blocks, [None] * blocks)
            other = none if mean is None else _repeated(mean, len(pairs.rows))
            base = ablated = run(model, where, x, other=other)
            if held is not None:
                base = run(model, where, x, held=held, other=other)
            return ablated, CircuitRuns(model, self.model.universe, x, base, other, held)
        tail = pairs.tail
        kept = tail.tail_of(where)
        x, corrupted = x[kept], model.embed(pairs.twins)[kept]
        base = ablated = run(model, tail, corrupted, past=clean)
        if held is not None:
            held = [tail.queries_of(A) for A in held]
            base = run(model, tail, corrupted, past=clean, held=held)
        return ablated, CircuitRuns(model, self.model.universe, x, base, base.outputs, held)

    def _packed_mean(self, model: PackedModel, n_pos: int) -> Outputs:
        """Mean outputs of all writers at every position, over prompts."""
        total: list[Any] = []
        n = sum(len(group.ids) for group in self.mean_over)
        for group in self.mean_over:
            size = max(1, model.most_tokens(1) // n_pos)
            for piece in group.split(self.options.batch_size or size):
                rows = list(piece.ids[:, :n_pos])
                where = Layout((n_pos,) * len(rows), (0,) * len(rows), self.model.device)
                found = run(model, where, model.embed(rows), keep=False).outputs
                parts = [found.x, *found.z, *found.mlp]
                sums = [
                    None if part is None else part.unflatten(-2, (-1, n_pos)).sum(-3) / n
                    for part in parts
                ]
                pairs = zip(total, sums, strict=True) if total else ((None, s) for s in sums)
                total = [b if a is None else a + b for a, b in pairs]
        blocks = len(model.layers)
        return Outputs(total[0], total[1 : 1 + blocks], total[1 + blocks :])

    # --- The host's way

    def at_once(self, n_pos: int) -> int:
        """Number of sequences of one length that are run together."""
        return self.options.batch_size or self.model.at_once(n_pos)

    def mean(self) -> Writes:
        """Mean output of every writer at every position [writer, 1, pos, d_model]."""
        pieces = (p for g in self.mean_over for p in g.split(self.at_once(g.n_pos)))
        sums = (self.model.run(piece.ids).writes[0].sum(1, keepdim=True) for piece in pieces)
        total = next(sums)
        for other in sums:
            total = total + other
        return total / sum(len(group.ids) for group in self.mean_over)

    def _of_the_host(self, masks: Bool[Tensor, "circuit reader writer"], n: int) -> Tensor:
        """The metric of every run [2 + circuit, prompt]."""
        values = torch.zeros(2 + len(masks), n, dtype=torch.float64, device="cpu")
        mean = self.mean() if self.options.ablation == "mean" else None
        with progress_bar("prompts", n, self.options.progress) as bar:
            for group in self.groups:
                size = self.at_once(group.n_pos)
                circuits = min(len(masks), size)
                for piece in group.split(max(1, size // circuits)):
                    runs = self._runs(piece, masks.split(circuits), mean)
                    values[:, piece.index] = torch.cat(list(runs))
                    bar.update(len(piece.ids))
        return values

    def _runs(
        self, piece: Pairs, masks: Sequence[Tensor], mean: Writes | None
    ) -> Iterator[Float[Tensor, "circuit prompt"]]:
        """The metric of the clean run, of the fully ablated run, then of the circuits' runs."""
        # 3a. The clean run, and its patterns where attention is frozen.
        clean = self.model.run(piece.ids)
        held = [pattern[0] for pattern in clean.patterns] if self.frozen else None
        # 3b. What replaces an ablated writer, and the run with every edge ablated (live patterns).
        if piece.corrupted is None:
            replacement = None if mean is None else mean.expand(-1, len(piece.ids), -1, -1)
            none = torch.zeros_like(masks[0][:1])
            ablated = self.model.run(piece.ids, none, replacement).logits
        else:
            corrupted = self.model.run(piece.corrupted)
            ablated = corrupted.logits
            if held is not None:
                corrupted = self.model.run(piece.corrupted, patterns=held)
            replacement = corrupted.writes[0]
        # 3c. Every circuit's run, some circuits at once.
        circuits = (self.model.run(piece.ids, part, replacement, held).logits for part in masks)
        # 4. Measure.
        for logits in chain((clean.logits, ablated), circuits):
            yield self.metric.values(logits, clean.logits[0], piece.index).double().cpu()


def _repeated(mean: Outputs, prompts: int) -> Outputs:
    """Means by position, once for every prompt."""
    x, *parts = (
        None if t is None else torch.cat([t] * prompts, -2) for t in (mean.x, *mean.z, *mean.mlp)
    )
    return Outputs(x, parts[: len(mean.z)], parts[len(mean.z) :])
