"""Find a circuit over many prompts: scores averaged batch by batch, kept in a file, resumable.

A search takes five steps:

1. Read the model, and each prompt's own tokens.
2. Check the question, and sort the prompts so that a batch has little padding.
3. Resume from the file, where there is one of the same question.
4. Capture batch by batch, score every edge, and average; write the file from time to time.
5. Select the edges of the circuit by their mean scores.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import (
    Target,
    TargetGradient,
    TargetLike,
    attribute,
    check_comparable,
    difference,
    own_prediction,
    resolve_each,
)
from ..checks import (
    at_least_one,
    new_file,
    one_each,
    progress_bar,
    spelled,
    whole,
    write_whole,
)
from ..chunks import plain, question_of, spread
from ..graph import Edge, limits
from ..hosts import Adapter, adapt, added_token, as_host, each_prompt, prompts_of
from ..operator import Capture, Convention, FrozenTransformer
from ..passes import edge_model
from ..recording import freeze
from .circuit import Circuit, select_circuit
from .edge_averages import edge_columns, edge_sums
from .model_id import ModelInfo
from .packed_search import PackedSearch

WRITE_EVERY = 10.0
"""Seconds between two writes of the file; it is also written at the end, and when interrupted."""

WINDOW = 128
"""Prompts that are sorted by length, so that little of a batch is padding."""

NAMED = 3
"""Targets that a circuit names, where its prompts have several."""

_Row = tuple[Any, Any, Any, Any]  # prompt, corrupted prompt, target, versus
_Means = Float[Tensor, " edge"]


@spelled
def discover(
    model: Any,
    prompts: Sequence[Any],
    corrupted: Sequence[Any] | None = None,
    target: TargetLike | Sequence[TargetLike] = None,
    versus: TargetLike | Sequence[TargetLike] = None,
    pos: int = -1,
    *,
    n_edges: int | None = None,
    threshold: float | None = None,
    selection: str = "greedy",
    qk: bool = True,
    at: str | None = None,
    batch_size: int = 8,
    sample: int | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Circuit:
    """Find the edges that make a target, over many prompts: average their scores, then select.

    Only one batch of captures is held in memory. With ``path``, the circuit of what is done so far
    is always in that file: the same call resumes from it, and gives the same numbers.

    Args:
        model: As for :func:`tensorlens_tl.capture`.
        prompts: Strings, or token ids [pos], one sequence per prompt.
        corrupted: One corrupted prompt per prompt, of the same number of tokens, or None. With
            corrupted prompts, the score of an edge is what the reader makes of what the writer adds
            in the prompt and not in the corrupted prompt.
        target: Token or direction to explain: one for all prompts, a list with one per prompt, or
            None for what the model predicts for each prompt.
        versus: Subtracted from the target, in the same forms; None for no subtraction.
        pos: Position of the prediction among the real tokens.
        n_edges: Number of edges in the circuit. Give either this or ``threshold``.
        threshold: Keep every edge ranked at or above this value, plus the edges needed to connect
            it.
        selection: How edges are selected by their scores: "greedy" grows from the logits down by
            |score|; "absolute" and "signed" take the largest |score| or score; "influence" takes
            what shares of |score| carry to the logits.
        qk: Whether the queries and keys of heads are readers, too.
        at: With corrupted prompts, whose covectors read the difference: "secant" (the default),
            those of the operator between the two runs, which is exact on the difference; "clean"
            or "corrupted", those of one run.
        batch_size: Number of prompts captured at once, padded where their lengths differ.
        sample: Number of prompts to draw at random by ``seed``; None to use all of them.
        seed: Seed of the draw.
        path: File for the circuit, and to resume from: the circuit's JSON with an entry of
            progress.
        resume: Folder that keeps finished chunks of 64 prompts: the same call goes on from it.
            With it, all processes that a launcher started share the work, and all return the
            result; see :doc:`/guides/many_prompts`. None keeps nothing.
        progress: Whether to show a progress bar on standard error after 2 s.
        **kwargs: Arguments of the capture: ``gate``, ``dtype``, and the model's own arguments.

    Returns:
        The circuit, with the mean score of every edge.

    Raises:
        ValueError: If an argument is not allowed, a corrupted prompt has another length, the file
            holds another search, or there is no operator between the two runs of this model (SoLU,
            runs that hooks edited). In the last case, use ``at="clean"``.

    Example:
        >>> from tensorlens_tl import demo, discover
        >>> pairs = demo.prompts("ioi", 2)
        >>> texts, corrupted = [p.clean for p in pairs], [p.corrupted for p in pairs]
        >>> circuit = discover(demo.load_model(), texts, corrupted, n_edges=24)
        >>> len(circuit), circuit.n_prompts
        (24, 2)
    """
    # 1. The model, and each prompt's own tokens.
    adapter = adapt(as_host(model, kwargs.pop("tokenizer", None)))
    info = ModelInfo.of(adapter.name, adapter.weights)
    mask = kwargs.pop("attention_mask", None)
    prompts = each_prompt(prompts, adapter.tokenizer, mask)
    if corrupted is not None:
        corrupted = each_prompt(corrupted, adapter.tokenizer, mask, "corrupted")
    # 2. The question.
    at = at or ("clean" if corrupted is None else "secant")
    edges = info.wiring.edges(qk)
    work = _Work(prompts, corrupted, target, versus, pos, qk, at, sample, seed, kwargs, edges)
    batch_size = at_least_one(batch_size, "batch_size")

    def circuit(means: _Means, n: int) -> Circuit:
        scores = dict(zip(edges, means.tolist(), strict=True))
        how = {key: kwargs[key] for key in ("prepend_bos",) if key in kwargs}
        added = added_token(adapter, prompts[0], **how)
        return select_circuit(
            info,
            scores,
            n_edges,
            threshold,
            selection,
            target=_in_words(adapter, [row[2:] for row in work.rows[:n]]),
            n_prompts=n,
            corrupted=corrupted is not None,
            convention=Convention(kwargs.get("gate", "gate"), added),
        )

    means, n = torch.zeros(len(edges), dtype=torch.double), 0
    limits(len(edges), n_edges, threshold, selection)  # refused before anything is run
    # 3. What is done already.
    if resume is not None:
        return circuit(*_spread(work, adapter, batch_size, resume, path, info, progress))
    file = None
    if path is not None:
        file = _File(new_file(path), work.digest(info), len(work))
        scores, n = file.read(info)
        means = torch.tensor([scores.get(edge, 0.0) for edge in edges], dtype=torch.double)
    # 4. The rest, and 5. the circuit.
    return circuit(*_average(work, adapter, batch_size, means, n, file, circuit, progress))


def _spread(
    work: _Work,
    adapter: Adapter,
    batch_size: int,
    resume: str | os.PathLike[str],
    path: str | os.PathLike[str] | None,
    info: ModelInfo,
    progress: bool,
) -> tuple[_Means, int]:
    """Mean scores over all prompts, by chunks that a folder keeps and processes share."""
    if path is not None:
        raise ValueError(
            "path= and resume= are both given, and one place keeps the search. Drop one."
        )

    def run(start: int, stop: int) -> dict[str, Tensor]:
        batches = range(start, stop, batch_size)
        with torch.no_grad():
            found = (work.sums(adapter, i, min(i + batch_size, stop)) for i in batches)
            total = next(found)  # its shape and dtype are the first part's
            for part in found:
                total = total + part
        return {"sum": total}

    # Another batch size sums in another order, so its chunks are not mixed with these.
    question = f"{work.digest(info)} {batch_size}"
    total = torch.zeros(len(work.edges), dtype=torch.double)
    for chunk in spread(resume, question, len(work), run, progress):
        total += chunk["sum"]
    return total / len(work), len(work)


def _average(
    work: _Work,
    adapter: Adapter,
    batch_size: int,
    means: _Means,
    n: int,
    file: _File | None,
    circuit: Callable[[_Means, int], Circuit],
    progress: bool,
) -> tuple[_Means, int]:
    """Mean scores over all prompts, from the means over the first n; keeps the file current."""
    written, last = n, time.monotonic()
    try:
        with progress_bar("prompts", len(work), progress, initial=n) as bar:
            for start in range(n, len(work), batch_size):
                stop = min(start + batch_size, len(work))
                with torch.no_grad():
                    found = work.sums(adapter, start, stop)
                # One assignment: an interruption must not part the means from their number.
                means, n = means + (found - (stop - n) * means) / stop, stop
                if file is not None and time.monotonic() - last > WRITE_EVERY:
                    file.write(circuit(means, n), n)
                    written, last = n, time.monotonic()
                bar.update(stop - start)
    finally:  # an interruption keeps what is done
        if file is not None and n > written:
            file.write(circuit(means, n), n)
    return means, n


class _Work:
    """The question: prompts, targets, and how edges are scored."""

    def __init__(
        self,
        prompts: Sequence[Any],
        corrupted: Sequence[Any] | None,
        target: Any,
        versus: Any,
        pos: int,
        qk: bool,
        at: str,
        sample: int | None,
        seed: int,
        kwargs: dict[str, Any],
        edges: tuple[Edge, ...],
    ):
        n = len(prompts)
        if corrupted is not None and (isinstance(corrupted, str) or len(corrupted) != n):
            count = 1 if isinstance(corrupted, str) else len(corrupted)
            raise ValueError(
                f"There are {n} prompts but {count} corrupted prompts. Pass a list with one for "
                "each."
            )
        known = ("clean",) if corrupted is None else ("clean", "corrupted", "secant")
        if at not in known:
            given = "without" if corrupted is None else "with"
            raise ValueError(
                f"at={at!r} is not allowed {given} corrupted prompts. Use {', '.join(known)}."
            )
        for i, (prompt, other) in enumerate(zip(prompts, corrupted or (), strict=False)):
            texts = isinstance(prompt, str) or isinstance(other, str)
            if not texts and len(prompt) != len(other):
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens, its corrupted prompt {len(other)}. Pad "
                    "or reword the corrupted prompt."
                )
        goals = one_each(target, n, "target"), one_each(versus, n, "versus")
        others = [None] * n if corrupted is None else list(corrupted)
        rows = list(zip(prompts, others, *goals, strict=True))
        whole(seed, "seed")
        if sample is not None:
            if at_least_one(sample, "sample") > n:
                raise ValueError(f"sample={sample} is more than the {n} prompts. Pass at most {n}.")
            rows = [rows[i] for i in sorted(random.Random(seed).sample(range(n), sample))]
        self.rows = _by_length(rows)
        self.pos, self.qk, self.at, self.kwargs = pos, qk, at, kwargs
        self.edges = edges
        self._names: tuple[str, ...] = ()
        self._columns: list[int] = []
        self._places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self, model: ModelInfo) -> str:
        """A hash of all that the scores depend on."""
        options = sorted((name, plain(value)) for name, value in self.kwargs.items())
        about = (model.fingerprint, self.pos, self.qk, self.at, options)
        return question_of(about, self.rows)

    def sums(self, adapter: Adapter, start: int, stop: int) -> Float[Tensor, " edge"]:
        """Score every edge, summed over some prompts, in the order of :attr:`edges`."""
        rows = self.rows[start:stop]
        found = self._packed(adapter, rows)
        if found is None:
            parts = [self._sums(adapter, alike) for alike in _alike(rows)]
            found = sum(parts[1:], parts[0])
        return found

    def _packed(self, adapter: Adapter, rows: list[_Row]) -> Float[Tensor, " edge"] | None:
        """The same from packed runs, many times as fast; None where these do not serve."""
        plain = self.at == "secant" and not self.kwargs and not adapter.foreign_hooks()
        if not plain:
            return None
        with edge_model(adapter.model) as edged:
            found = PackedSearch(edged, self.pos).sums(*zip(*rows, strict=True))
            if found is None:
                return None
            if self._places is None:  # the same for all prompts
                universe = edged.universe
                self._places = universe.places[torch.tensor(universe.wiring.numbers(self.edges))]
            return found[self._places[:, 0], self._places[:, 1]]

    def _sums(self, model: Any, rows: list[_Row]) -> Float[Tensor, " edge"]:
        prompts, corrupted, targets, versus = zip(*rows, strict=True)
        clean = self.run(model, prompts)
        # Both runs are asked for what the clean one predicts.
        predicted = own_prediction(clean, self.pos)
        gradient = self.gradient(clean, targets, versus, predicted)
        if corrupted[0] is None:
            split = attribute(gradient, "edge", qk=self.qk)
        else:
            run = self.run(model, corrupted)
            check_comparable(clean, run, "corrupted run")
            baseline = self.gradient(run, targets, versus, predicted)
            split = difference(gradient, baseline, "edge", self.at, self.qk)
        if split.labels[0] != self._names:  # the same for all prompts of a model, and thousands
            self._names, self._columns = split.labels[0], edge_columns(self.edges, split.sources)
        return edge_sums(split.values, self._columns, len(self.edges)).cpu().sum(0)

    def run(self, model: Any, prompts: Sequence[Any]) -> Capture:
        """Capture some prompts; ids of several lengths are padded."""
        if isinstance(prompts[0], str):
            return freeze(model, list(prompts), **self.kwargs)[1]
        lengths = torch.tensor([len(p) for p in prompts])
        rows = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        if (lengths == lengths[0]).all():
            return freeze(model, prompts_of(model, rows), **self.kwargs)[1]
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        return freeze(model, rows, attention_mask=real, **self.kwargs)[1]

    def gradient(
        self, run: Capture, targets: Sequence[Any], versus: Sequence[Any], predicted: Tensor
    ) -> TargetGradient:
        """The gradient of every prompt's own target."""
        goal = resolve_each(run, targets, self.pos, predicted)
        if any(other is not None for other in versus):
            both = goal.minus(resolve_each(run, versus, self.pos, predicted, "versus"))
            goal = Target.stack(
                [(goal if other is None else both).row(i) for i, other in enumerate(versus)]
            )
        return TargetGradient(run, FrozenTransformer.of(run), goal)


def _by_length(rows: Sequence[_Row]) -> list[_Row]:
    """Sort ids by length within windows; every part of the work has prompts of all lengths."""
    parts = (rows[i : i + WINDOW] for i in range(0, len(rows), WINDOW))
    return [row for part in parts for row in sorted(part, key=_length)]


def _length(row: _Row) -> int:
    return 0 if isinstance(row[0], str) else len(row[0])


def _alike(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows to capture together: strings, ids, and each pair of unequal lengths by itself."""
    kinds: dict[Any, list[_Row]] = {}
    for i, row in enumerate(rows):
        found = {-1 if isinstance(p, str) else len(p) for p in row[:2] if p is not None}
        kind = i if len(found) > 1 else isinstance(row[0], str)
        kinds.setdefault((len(found), kind), []).append(row)
    yield from kinds.values()


def _in_words(adapter: Adapter, goals: Sequence[Sequence[Any]]) -> str:
    """Name the targets of some prompts, each given with what is subtracted from it."""

    def named(goal: Any) -> str:
        if goal is None:
            return "each prompt's own prediction"
        if isinstance(goal, str):
            return repr(goal)
        return "a direction" if getattr(goal, "ndim", 0) else repr(adapter.token_string(int(goal)))

    pairs = ((named(a), "" if b is None else f" − {named(b)}") for a, b in goals)
    found = list(dict.fromkeys(a + b for a, b in pairs))
    if len(found) == 1:
        return found[0]
    more = f", … {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"{', '.join(found[:NAMED])}{more} (each prompt's own)"


class _File:
    """The circuit of what is done so far, and how far that is."""

    def __init__(self, path: Path, digest: str, total: int):
        self.path, self.digest, self.total = path, digest, total

    def read(self, model: ModelInfo) -> tuple[dict[Edge, float], int]:
        """The scores so far, and the number of prompts that they are means over."""
        if not self.path.exists():
            return {}, 0
        try:
            text = self.path.read_text(encoding="utf-8")
            about, found = json.loads(text)["progress"], Circuit.from_json(text)
            question, n = about["question"], about["done"]
            own = question == self.digest
            if own and (isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= self.total):
                raise ValueError(
                    f"It says {n!r} prompts are done. It should say 1 to {self.total}."
                )
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ValueError(
                f"{self.path} does not hold a search for a circuit ({str(error).rstrip('.')}). "
                "Pass another path=, or delete the file."
            ) from None
        if not own:
            raise ValueError(
                f"{self.path} holds another search (other prompts, targets, options or weights). "
                "Pass another path=, or delete the file."
            )
        found.model.check(model)
        return dict(found.scores), n

    def write(self, circuit: Circuit, n: int) -> None:
        """Write the file, whole or not at all."""
        data = json.loads(circuit.to_json())
        data["progress"] = {"question": self.digest, "done": n, "of": self.total}
        text = json.dumps(data, ensure_ascii=False)
        write_whole(self.path, lambda file: file.write_text(text, encoding="utf-8"))
