"""Circuits of many prompts: scores averaged batch by batch, kept in a file, gone on with later."""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..attribution import (
    AT,
    Sweep,
    Target,
    TargetLike,
    attribute,
    check_comparable,
    difference,
    own_prediction,
    resolve_each,
)
from ..checks import as_list, at_least_one, one_each
from ..graph import Edge
from ..hosts import adapt, each_prompt, freeze, hosted, mask_spans
from ..operator import Capture, Convention, FrozenTransformer
from .circuit import Circuit, find
from .edge_averages import edge_columns, edge_sums
from .model_id import ModelInfo

WRITE_EVERY = 10.0
"""Seconds between two writes of the file; it is also written at the end, and when interrupted."""

WINDOW = 128
"""Prompts that are sorted by length, so that little of a batch is padding."""

_Row = tuple[Any, Any, Any, Any]  # prompt, corrupted prompt, target, versus


def discover(
    model: Any,
    prompts: Sequence[Any],
    corrupted: Sequence[Any] | None = None,
    targets: TargetLike | Sequence[TargetLike] = None,
    versus: TargetLike | Sequence[TargetLike] = None,
    pos: int = -1,
    *,
    n_edges: int | None = None,
    threshold: float | None = None,
    method: str = "greedy",
    qk: bool = True,
    at: str | None = None,
    batch_size: int = 8,
    sample: int | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Circuit:
    """The edges that make a target, over many prompts: mean scores, then :meth:`TensorLens.discover`.

    Only one batch of captures is held at a time. With ``path``, the circuit of what is done so far
    is in that file, whatever happens: the same call goes on from there, and gives the same numbers.

    Args:
        model: As for :func:`tensorlens_tl.capture`.
        prompts: Strings, or token ids [pos], one sequence per prompt.
        corrupted: For every prompt another one of as many tokens, or None: an edge's score is then
            what the reader makes of what the writer adds in the first and not in the second.
        targets: A target for all, a list with one for each prompt, or None for each prompt's own
            prediction.
        versus: Subtracted from the target; for all, one for each prompt, or None.
        pos: Position of the prediction among the real tokens.
        n_edges: So many edges; or
        threshold: the smallest number an edge is ranked by.
        method: "greedy", "absolute", "signed" or "influence"; see :meth:`TensorLens.discover`.
        qk: Whether queries and keys are readers, too.
        at: With corrupted prompts, whose covectors read the difference: by default "secant", those
            of the operator between the two runs, which is exact on it; or "clean", "corrupted".
        batch_size: Prompts captured at once, padded where their lengths differ.
        sample: How many of the prompts to take, drawn by ``seed``; None for all. They are taken by length,
            within 128 at a time.
        seed: Of the draw.
        path: A file for the circuit, and to go on from: a circuit's JSON with an entry of progress.
        progress: Whether to count prompts on standard error.
        **kwargs: For the capture: ``gate``, ``dtype``, the model's own arguments.

    Returns:
        The circuit, with every edge's mean score.

    Raises:
        ValueError: If an argument makes no sense, a corrupted prompt has another length, or the file
            holds another search; or if there is no operator between the two runs of this model
            (SoLU, runs that hooks edited): take ``at="clean"``.
    """
    model = hosted(model, kwargs.pop("tokenizer", None))
    adapter = adapt(model)
    info = ModelInfo.of(adapter.name, adapter.weights)
    mask = kwargs.pop("attention_mask", None)
    if not isinstance(prompts, str):
        prompts = _unpadded(each_prompt(prompts, adapter.tokenizer, mask is not None), mask)
    if corrupted is not None and not isinstance(corrupted, str):
        corrupted = _unpadded(each_prompt(corrupted, adapter.tokenizer, mask is not None), mask)
    at = at or ("clean" if corrupted is None else "secant")
    edges = info.wiring.edges(qk)
    work = _Work(prompts, corrupted, targets, versus, pos, qk, at, sample, seed, kwargs, edges)
    batch_size = at_least_one(batch_size, "batch_size")

    def circuit(scores: Mapping[Edge, float], n: int) -> Circuit:
        return find(
            info, scores, n_edges, threshold, method,
            target=work.target, n_prompts=n, corrupted=corrupted is not None,
            convention=Convention(kwargs.get("gate", "gate")),
        )  # fmt: skip

    circuit(dict.fromkeys(edges, 0.0), 0)  # refuses bad arguments before the work
    file = (
        None if path is None else _File(Path(os.path.realpath(path)), work.digest(info), len(work))
    )
    scores, n = ({}, 0) if file is None else file.read(info)
    means = torch.tensor([scores.get(edge, 0.0) for edge in edges], dtype=torch.double)
    written, last = n, time.monotonic()

    def named() -> dict[Edge, float]:
        return dict(zip(edges, means.tolist(), strict=True))

    try:
        with tqdm(desc="prompts", total=len(work), initial=n, disable=not progress) as bar:
            for start in range(n, len(work), batch_size):
                with torch.no_grad():
                    found = work.scores(adapter, start, start + batch_size)
                both = n + len(found)
                means, n = (
                    means + (found - means).sum(0) / both,
                    both,
                )  # together: one may interrupt
                if file is not None and time.monotonic() - last > WRITE_EVERY:
                    file.write(circuit(named(), n), n)
                    written, last = n, time.monotonic()
                bar.update(len(found))
    finally:  # an interruption keeps what is done
        if file is not None and n > written:
            file.write(circuit(named(), n), n)
    return circuit(named(), n)


class _Work:
    """What is to be done: prompts, targets, and how they are scored."""

    def __init__(self, prompts: Sequence[Any], corrupted: Sequence[Any] | None, targets: Any,
                 versus: Any, pos: int, qk: bool, at: str, sample: int | None, seed: int,
                 kwargs: dict[str, Any], edges: tuple[Edge, ...]):  # fmt: skip
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(
                f"expected a list of prompts, got {prompts!r}: put a single one in a list"
            )
        if corrupted is not None and (isinstance(corrupted, str) or len(corrupted) != len(prompts)):
            raise ValueError(
                f"expected a corrupted prompt for every prompt, {len(prompts)}, got "
                f"{1 if isinstance(corrupted, str) else len(corrupted)}"
            )
        if at not in AT or (at != "clean" and corrupted is None):
            raise ValueError(
                f"expected at to be clean, or corrupted or secant with corrupted prompts, got {at!r}"
            )
        for i, (ours, theirs) in enumerate(zip(prompts, corrupted or (), strict=False)):
            if (
                not isinstance(ours, str)
                and not isinstance(theirs, str)
                and len(ours) != len(theirs)
            ):
                raise ValueError(
                    f"expected corrupted prompt {i} of as many tokens as its prompt, {len(ours)}, got "
                    f"{len(theirs)}: pad or reword the corrupted prompt"
                )
        n = len(prompts)
        self.target = _in_words(targets) + ("" if versus is None else f" − {_in_words(versus)}")
        goals = one_each(targets, n, "targets"), one_each(versus, n, "versus")
        others = [None] * n if corrupted is None else list(corrupted)
        rows = list(zip(prompts, others, *goals, strict=True))
        if sample is not None:
            if at_least_one(sample, "sample") > n:
                raise ValueError(f"expected sample of at most {n}, the prompts, got {sample}")
            rows = [rows[i] for i in sorted(random.Random(seed).sample(range(n), sample))]
        self.rows = _by_length(rows)
        self.pos, self.qk, self.at, self.kwargs = pos, qk, at, kwargs
        self.edges = edges
        self._names: tuple[str, ...] = ()
        self._columns: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self, model: ModelInfo) -> str:
        """A hash of all that the scores depend on."""
        options = sorted((name, _plain(value)) for name, value in self.kwargs.items())
        about = (model.fingerprint, self.pos, self.qk, self.at, options)
        digest = hashlib.sha256(repr(about).encode())
        for row in self.rows:
            digest.update(repr([_plain(part) for part in row]).encode())
        return digest.hexdigest()[:32]

    def scores(self, model: Any, start: int, stop: int) -> Float[Tensor, "prompt edge"]:
        """Every edge's score in some prompts, in the order of :attr:`edges`."""
        found = [self._scores(model, rows) for rows in _alike(self.rows[start:stop])]
        return torch.cat(found)

    def _scores(self, model: Any, rows: list[_Row]) -> Float[Tensor, "prompt edge"]:
        clean, corrupted, targets, versus = zip(*rows, strict=True)
        run = self.run(model, clean)
        own = own_prediction(run, self.pos)
        ours = self.sweep(run, targets, versus, own)
        if corrupted[0] is None:
            split = attribute(ours, "edge", qk=self.qk)
        else:
            other = self.run(model, corrupted)
            check_comparable(run, other)
            theirs = self.sweep(other, targets, versus, own)
            split = difference(ours, theirs, "edge", self.at, self.qk)
        if split.labels[0] != self._names:  # the same for all prompts of a model, and thousands
            self._names, self._columns = split.labels[0], edge_columns(self.edges, split.sources)
        return edge_sums(split.values, self._columns, len(self.edges)).cpu()

    def run(self, model: Any, prompts: Sequence[Any]) -> Capture:
        """The capture of some prompts; ids of several lengths are padded."""
        if isinstance(prompts[0], str):
            return freeze(model, list(prompts), **self.kwargs)[1]
        ids = [torch.as_tensor(p) for p in prompts]
        lengths, padding = torch.tensor([len(p) for p in ids]), {}
        if (lengths != lengths[0]).any():
            padding = {
                "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            }
        rows = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return freeze(model, rows, **padding, **self.kwargs)[1]

    def sweep(
        self, run: Capture, targets: Sequence[Any], versus: Sequence[Any], own: Tensor
    ) -> Sweep:
        """Every prompt's own target."""
        goal = resolve_each(run, targets, self.pos, own)
        if any(other is not None for other in versus):
            both = goal.minus(resolve_each(run, versus, self.pos, own))
            goal = Target.stack([
                (goal if other is None else both).row(i) for i, other in enumerate(versus)
            ])  # fmt: skip
        return Sweep(run, FrozenTransformer.of(run), goal)


def _by_length(rows: Sequence[_Row]) -> list[_Row]:
    """Ids of about one length side by side, within windows: a part of the work is of all lengths."""
    parts = (rows[i : i + WINDOW] for i in range(0, len(rows), WINDOW))
    return [row for part in parts for row in sorted(part, key=_length)]


def _length(row: _Row) -> int:
    return 0 if isinstance(row[0], str) else len(row[0])


def _alike(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows that can be captured together: strings, ids, and each pair of unequal lengths by itself."""
    kinds: dict[Any, list[_Row]] = {}
    for i, row in enumerate(rows):
        found = {-1 if isinstance(p, str) else len(p) for p in row[:2] if p is not None}
        kind = i if len(found) > 1 else isinstance(row[0], str)
        kinds.setdefault((len(found), kind), []).append(row)
    yield from kinds.values()


def _unpadded(prompts: list[Any], mask: Any) -> list[Any]:
    """Each prompt's own ids, where a mask tells them from padding: batches are padded here."""
    if mask is None:
        return prompts
    if any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("attention_mask is for token ids, got strings: leave it out")
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            "attention_mask is for ids padded to one length, got several: leave it out, each prompt's ids "
            "are its own"
        )
    ids = torch.stack(rows)
    spans = mask_spans(torch.as_tensor(mask), ids, None)
    return [row[start:stop] for row, (start, stop) in zip(ids, spans, strict=True)]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _in_words(target: Any) -> str:
    if target is None:
        return "own prediction"
    if isinstance(as_list(target), list | tuple):
        return "a target each"
    return "a direction" if getattr(target, "ndim", 0) else repr(target)


class _File:
    """The circuit of what is done so far, and how far that is."""

    def __init__(self, path: Path, digest: str, total: int):
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"expected the path of a file to write, got {path}")
        self.path, self.digest, self.total = path, digest, total

    def read(self, model: ModelInfo) -> tuple[dict[Edge, float], int]:
        """The scores so far, and over how many prompts they are means."""
        if not self.path.exists():
            return {}, 0
        try:
            text = self.path.read_text(encoding="utf-8")
            about, found = json.loads(text)["progress"], Circuit.from_json(text)
            question, n = about["question"], about["done"]
            own = question == self.digest
            if own and (isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= self.total):
                raise ValueError(f"expected from 1 to {self.total} prompts done, got {n!r}")
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ValueError(
                f"expected {self.path} to hold a search for a circuit, got something else ({error}): "
                "pass another path, or delete it"
            ) from None
        if not own:
            raise ValueError(
                f"{self.path} holds another search (other prompts, targets, options or weights): pass "
                "another path, or delete it"
            )
        found.model.check(model)
        return dict(found.scores), n

    def write(self, circuit: Circuit, n: int) -> None:
        """Write the file, whole or not at all."""
        data = json.loads(circuit.to_json())
        data["progress"] = {"question": self.digest, "done": n, "of": self.total}
        unfinished = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.tmp")
        try:
            unfinished.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)
