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
from torch import Tensor
from tqdm.auto import tqdm

from .adapters import adapt
from .attribution import Sweep, attribute
from .capturing import Convention
from .circuits import Circuit, ModelInfo, edge_scores, find
from .datasets import as_list, one_each
from .differences import check_comparable, difference
from .graph import Edge
from .lens import TensorLens
from .plugin import capture, hosted
from .prompts import each_prompt
from .results import at_least_one
from .targets import Target, TargetLike, own_prediction, resolve_target

WRITE_EVERY = 10.0
"""Seconds between two writes of the file; it is also written at the end, and when interrupted."""


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
    at: str = "clean",
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
        at: With corrupted prompts, whose covectors read the difference: "clean" or "corrupted".
        batch_size: Prompts captured at once; strings are padded, ids are captured one by one where
            their lengths differ.
        sample: How many of the prompts to take, drawn by ``seed``; None for all, in order.
        seed: Of the draw.
        path: A file for the circuit, and to go on from: a circuit's JSON with an entry of progress.
        progress: Whether to count prompts on standard error.
        **kwargs: For the capture: ``gate``, ``dtype``, the model's own arguments.

    Returns:
        The circuit, with every edge's mean score.

    Raises:
        ValueError: If an argument makes no sense, a corrupted prompt has another length, or the file
            holds another search.
    """
    model = hosted(model, kwargs.pop("tokenizer", None))
    adapter = adapt(model)
    info = ModelInfo.of(adapter.name, adapter.weights)
    masked = "attention_mask" in kwargs
    if not isinstance(prompts, str):
        prompts = each_prompt(prompts, adapter.tokenizer, masked)
    if corrupted is not None and not isinstance(corrupted, str):
        corrupted = each_prompt(corrupted, adapter.tokenizer, masked)
    work = _Work(prompts, corrupted, targets, versus, pos, qk, at, sample, seed, kwargs)
    batch_size = at_least_one(batch_size, "batch_size")

    def circuit(scores: Mapping[Edge, float], n: int) -> Circuit:
        return find(
            info, scores, n_edges, threshold, method,
            target=work.target, n_prompts=n, corrupted=corrupted is not None,
            convention=Convention(kwargs.get("gate", "gate")),
        )  # fmt: skip

    circuit(dict.fromkeys(info.wiring.edges(qk), 0.0), 0)  # refuses bad arguments before the work
    file = (
        None if path is None else _File(Path(os.path.realpath(path)), work.digest(info), len(work))
    )
    scores, n = ({}, 0) if file is None else file.read(info)
    written, last = n, time.monotonic()
    try:
        with tqdm(desc="prompts", total=len(work), initial=n, disable=not progress) as bar:
            for start in range(n, len(work), batch_size):
                with torch.no_grad():
                    found = work.scores(model, start, start + batch_size)
                scores, n = _folded(scores, n, found), n + len(found)
                if file is not None and time.monotonic() - last > WRITE_EVERY:
                    file.write(circuit(scores, n), n)
                    written, last = n, time.monotonic()
                bar.update(len(found))
    finally:  # an interruption keeps what is done
        if file is not None and n > written:
            file.write(circuit(scores, n), n)
    return circuit(scores, n)


def _folded(
    means: Mapping[Edge, float], n: int, found: Sequence[Mapping[Edge, float]]
) -> dict[Edge, float]:
    """Means over n prompts, and some more."""
    means = dict(means) if n else dict.fromkeys(found[0], 0.0)
    for scores in found:
        n += 1
        for edge, score in scores.items():
            means[edge] += (score - means[edge]) / n
    return means


class _Work:
    """What is to be done: prompts, targets, and how they are scored."""

    def __init__(self, prompts: Sequence[Any], corrupted: Sequence[Any] | None, targets: Any,
                 versus: Any, pos: int, qk: bool, at: str, sample: int | None, seed: int,
                 kwargs: dict[str, Any]):  # fmt: skip
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(
                f"expected a list of prompts, got {prompts!r}: put a single one in a list"
            )
        if corrupted is not None and (isinstance(corrupted, str) or len(corrupted) != len(prompts)):
            raise ValueError(
                f"expected a corrupted prompt for every prompt, {len(prompts)}, got "
                f"{1 if isinstance(corrupted, str) else len(corrupted)}"
            )
        if at not in ("clean", "corrupted") or (at == "corrupted" and corrupted is None):
            raise ValueError(
                f"expected at to be clean, or corrupted with corrupted prompts, got {at!r}"
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
        self.rows, self.pos, self.qk, self.at, self.kwargs = rows, pos, qk, at, kwargs

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self, model: ModelInfo) -> str:
        """A hash of all that the scores depend on."""
        about = (model.fingerprint, self.pos, self.qk, self.at, sorted(self.kwargs.items()))
        digest = hashlib.sha256(repr(about).encode())
        for row in self.rows:
            digest.update(repr([_plain(part) for part in row]).encode())
        return digest.hexdigest()[:32]

    def scores(self, model: Any, start: int, stop: int) -> list[dict[Edge, float]]:
        """Every edge's score in some prompts."""
        found: list[dict[Edge, float]] = []
        for rows in _alike(self.rows[start:stop]):
            clean, corrupted, targets, versus = zip(*rows, strict=True)
            lens = self.run(model, clean)
            ours, wiring = self.sweep(lens, targets, versus, None), lens.operator.wiring
            if corrupted[0] is None:
                split = attribute(ours, "edge", qk=self.qk)
            else:
                other = self.run(model, corrupted)
                check_comparable(lens.capture, other.capture)
                theirs = self.sweep(other, targets, versus, own_prediction(lens.capture, self.pos))
                split = difference(ours, theirs, "edge", self.at, self.qk)
            found += [edge_scores(wiring, split, prompt) for prompt in range(len(rows))]
        return found

    def run(self, model: Any, prompts: Sequence[Any]) -> TensorLens:
        text = isinstance(prompts[0], str)
        ids = list(prompts) if text else torch.stack([torch.as_tensor(p) for p in prompts])
        return capture(model, ids, **self.kwargs)[1]

    def sweep(
        self, lens: TensorLens, targets: Sequence[Any], versus: Sequence[Any], own: Tensor | None
    ) -> Sweep:
        goals = []
        for i, (target, other) in enumerate(zip(targets, versus, strict=True)):
            goal = resolve_target(lens.capture, target, self.pos, own)
            if other is not None:
                goal = goal.minus(resolve_target(lens.capture, other, self.pos))
            goals.append(goal.row(i))
        return Sweep(lens.capture, lens.operator, Target.stack(goals))


def _alike(rows: list[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """Rows that can be captured together: strings, or ids of one length."""
    kinds: dict[Any, list[tuple[Any, ...]]] = {}
    for i, row in enumerate(rows):
        found = {-1 if isinstance(p, str) else len(p) for p in row[:2] if p is not None}
        kinds.setdefault(found.pop() if len(found) == 1 else (i,), []).append(row)
    yield from kinds.values()


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
