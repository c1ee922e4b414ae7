"""Scores of many prompts by many methods: captured once, prompts of one length together, timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from ..attribution import (
    expected_others,
    likeliest_others,
    own_prediction,
    resolve_target,
    resolve_token,
)
from ..hosts import adapt, each_prompt, record
from ..methods import token_scores
from ..operator import Capture, Convention, FrozenTransformer
from .masking import all_real

RIVALS = ("runner_up", "others")
"""What stands for the likeliest token beside the target, and for all of them by their probability."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Prompts with their targets and every method's scores.

    Attributes:
        prompts: Token ids, one tensor [pos] per prompt.
        targets: The target's token id, per prompt.
        rivals: The token id that a logit difference is taken from, per prompt: what ``versus`` names,
            else the likeliest other than the target.
        predicted: The model's own prediction, per prompt.
        scores: Every method's scores of every prompt's tokens [pos].
        seconds: What every method took, all prompts together.
        forward_seconds: What plain forward passes took.
        versus: What the target was less: one of :data:`RIVALS`, "own" for given tokens, or None.
        gate: The choice made for gated MLPs.
    """

    prompts: tuple[Int[Tensor, " _"], ...]
    targets: tuple[int, ...]
    rivals: tuple[int, ...]
    predicted: tuple[int, ...]
    scores: Mapping[str, Sequence[Float[Tensor, " _"]]]
    seconds: Mapping[str, float]
    forward_seconds: float
    versus: str | None
    gate: str

    def take(self, chosen: Sequence[int]) -> Scored:
        """Some of the prompts."""
        scores = {name: [values[i] for i in chosen] for name, values in self.scores.items()}
        parts = (
            tuple(given[i] for i in chosen)
            for given in (self.prompts, self.targets, self.rivals, self.predicted)
        )
        names = ("prompts", "targets", "rivals", "predicted")
        return replace(self, scores=scores, **dict(zip(names, parts, strict=True)))


def score(
    model: Any,
    prompts: Sequence[Any],
    methods: Sequence[str],
    targets: Sequence[str | int] | None = None,
    versus: str | Sequence[str | int] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    gate: str = "gate",
    batch_size: int = 8,
    progress: bool = True,
) -> Scored:
    """Every prompt's tokens scored by some methods; prompts of one length are captured together.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        prompts: Strings, or token ids [pos].
        methods: Names of :data:`tensorlens_tl.methods.METHODS`.
        targets: A token or id for each prompt, or None for the model's own predictions.
        versus: Subtracted from the target: a token or id for each prompt; "runner_up", the likeliest
            other token; "others", their mean weighted by probability (log-odds); or None.
        options: Options of methods, by name.
        gate: See :class:`tensorlens_tl.Convention`.
        batch_size: Prompts captured at once.
        progress: Whether to count prompts on standard error.

    Returns:
        The scores.
    """
    adapter, options = adapt(model), options or {}
    alone = each_prompt(prompts, adapter.tokenizer)
    ids = [adapter.prepare(prompt, {})[1].tokens[0] for prompt in alone]
    goals, rivals, predicted = [0] * len(ids), [0] * len(ids), [0] * len(ids)
    scores: dict[str, list[Any]] = {name: [None] * len(ids) for name in methods}
    plain, seconds = 0.0, dict.fromkeys(methods, 0.0)
    bar = tqdm(total=len(ids), desc="scores", delay=2, leave=False, disable=not progress)
    with torch.no_grad(), bar:
        for batch in _by_length(ids, batch_size):
            tokens = torch.stack([ids[i] for i in batch])
            kwargs, start = all_real(adapter, tokens), time.perf_counter()
            adapter.run(tokens, kwargs)
            plain += time.perf_counter() - start
            _, capture = record(adapter, tokens, Convention(gate), None, "stored", **kwargs)
            operator, own = FrozenTransformer.of(capture), own_prediction(capture)
            wanted = own if targets is None else _ids(capture, batch, targets)
            goal = resolve_target(capture, None, -1, wanted)
            given = versus is not None and not isinstance(versus, str)
            rival = _ids(capture, batch, versus) if given else likeliest_others(capture, wanted)
            if versus == "others":
                goal = goal.minus(expected_others(capture, wanted))
            elif versus is not None:
                goal = goal.minus(resolve_target(capture, None, -1, rival))
            for i, *of in zip(batch, *(x.tolist() for x in (wanted, rival, own)), strict=True):
                goals[i], rivals[i], predicted[i] = of
            for name in methods:
                start, mine = time.perf_counter(), options.get(name, {})
                found = token_scores(name, capture, operator, goal, model, **mine)
                seconds[name] += time.perf_counter() - start
                for row, i in enumerate(batch):
                    scores[name][i] = found[row].detach()
            bar.update(len(batch))
    named = versus if versus is None or isinstance(versus, str) else "own"
    return Scored(
        tuple(ids), tuple(goals), tuple(rivals), tuple(predicted),
        scores, seconds, plain, named, gate,
    )  # fmt: skip


def _ids(capture: Capture, batch: list[int], given: Any) -> Int[Tensor, " batch"]:
    found = (resolve_token(capture, given[i]) for i in batch)
    return torch.tensor(list(found), device=capture.frame.device)


def _by_length(ids: Sequence[Tensor], size: int) -> Iterator[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(ids):
        groups.setdefault(len(one), []).append(i)
    for _, group in sorted(groups.items()):
        yield from (group[start : start + size] for start in range(0, len(group), size))
