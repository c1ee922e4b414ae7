"""Scores of many prompts by many methods: captured once, prompts of one length together, timed.

:func:`score` takes four steps for every batch of prompts of one length:

1. Run the model plainly, for the time of a forward pass.
2. Capture the batch, and compose its operator.
3. Resolve every prompt's target, and what is subtracted.
4. Ask each method for its scores, and add up the time that each takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..attribution import (
    expected_others,
    likeliest_others,
    own_prediction,
    resolve_target,
    resolve_token,
)
from ..checks import progress_bar
from ..hosts import adapt, added_token, each_prompt, own_ids, prompts_of
from ..methods import token_scores
from ..operator import Capture, Convention, FrozenTransformer
from ..recording import record

CONTRASTS = ("runner_up", "all_others")
"""Words for what a target is compared with: the likeliest other token, or all others, weighted by
their probabilities."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Prompts with their targets and every method's scores.

    Attributes:
        prompts: Token ids, one tensor [pos] per prompt; or pictures.
        targets: Token id of the target, per prompt.
        foils: Token id whose logit a logit difference subtracts, per prompt: what ``versus`` names,
            or else the likeliest token other than the target.
        predicted: Token id that the model predicts, per prompt.
        scores: Scores of every prompt's tokens [pos], by method.
        seconds: Seconds that each method took, all prompts together.
        forward_seconds: Seconds that plain forward passes of the same prompts took.
        versus: What was subtracted from the target: one of :data:`CONTRASTS`, "own" for given
            tokens, or None.
        gate: How gated MLPs were made linear.
        first_token: Token that was put in front of the prompts, as in :class:`Convention`.
    """

    prompts: tuple[Int[Tensor, " _"], ...]
    targets: tuple[int, ...]
    foils: tuple[int, ...]
    predicted: tuple[int, ...]
    scores: Mapping[str, Sequence[Float[Tensor, " _"]]]
    seconds: Mapping[str, float]
    forward_seconds: float
    versus: str | None
    gate: str
    first_token: str | None = None

    def take(self, chosen: Sequence[int]) -> Scored:
        """Take some of the prompts, by their indices."""
        names = ("prompts", "targets", "foils", "predicted")
        parts = {name: tuple(getattr(self, name)[i] for i in chosen) for name in names}
        scores = {name: [values[i] for i in chosen] for name, values in self.scores.items()}
        return replace(self, scores=scores, **parts)


def score(
    model: Any,
    prompts: Sequence[Any],
    methods: Sequence[str],
    target: Sequence[str | int] | None = None,
    versus: str | Sequence[str | int] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    gate: str = "gate",
    batch_size: int = 8,
    progress: bool = True,
) -> Scored:
    """Score every prompt's tokens by some methods; prompts of one length are captured together.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        prompts: Strings, or token ids [pos]; or pictures, of a model that reads them.
        methods: Names of :data:`tensorlens_tl.methods.METHODS`.
        target: Token or id for each prompt, or None for the predictions of the model.
        versus: Subtracted from the target: a token or id for each prompt; "runner_up", the
            likeliest other token; "all_others", their mean weighted by probability (log-odds); or
            None.
        options: Options of methods, by name.
        gate: How gated MLPs are made linear; see :class:`tensorlens_tl.Convention`.
        batch_size: Number of prompts captured at once.
        progress: Whether to show a progress bar on standard error after 2 s.

    Returns:
        The scores of every method, with targets and times.
    """
    adapter, options = adapt(model), options or {}
    alone = each_prompt(prompts, adapter.tokenizer)
    ids = [own_ids(adapter, prompt) for prompt in alone]
    goals, foils, predicted = [0] * len(ids), [0] * len(ids), [0] * len(ids)
    scores: dict[str, list[Any]] = {name: [None] * len(ids) for name in methods}
    plain, seconds = 0.0, dict.fromkeys(methods, 0.0)
    bar = progress_bar("scores", len(ids), progress)
    with torch.no_grad(), bar:
        for batch in _by_length(ids, batch_size):
            # 1. A plain run.
            tokens = torch.stack([ids[i] for i in batch])
            kwargs, start = adapter.all_real(tokens), time.perf_counter()
            adapter.run(tokens, kwargs)
            plain += time.perf_counter() - start
            # 2. The operator.
            given = prompts_of(adapter, tokens)
            _, capture = record(adapter, given, Convention(gate), None, "stored")
            operator, own = FrozenTransformer.of(capture), own_prediction(capture)
            # 3. Targets.
            wanted = own if target is None else _ids(capture, batch, target)
            goal = resolve_target(capture, None, -1, wanted)
            given = versus is not None and not isinstance(versus, str)
            # A foil is kept in any case: a metric may ask for a difference that no method
            # explained.
            foil = _ids(capture, batch, versus) if given else likeliest_others(capture, wanted)
            if versus == "all_others":
                goal = goal.minus(expected_others(capture, wanted))
            elif versus is not None:
                goal = goal.minus(resolve_target(capture, None, -1, foil))
            for i, *of in zip(batch, *(x.tolist() for x in (wanted, foil, own)), strict=True):
                goals[i], foils[i], predicted[i] = of
            # 4. Methods.
            for name in methods:
                start, mine = time.perf_counter(), options.get(name, {})
                found = token_scores(name, capture, operator, goal, model, **mine)
                seconds[name] += time.perf_counter() - start
                for row, i in enumerate(batch):
                    scores[name][i] = found[row].detach()
            bar.update(len(batch))
    named = versus if versus is None or isinstance(versus, str) else "own"
    tokens = tuple(ids), tuple(goals), tuple(foils), tuple(predicted)
    added = added_token(adapter, alone[0])
    return Scored(*tokens, scores, seconds, plain, named, gate, added)


def _ids(capture: Capture, batch: list[int], given: Any) -> Int[Tensor, " batch"]:
    found = (resolve_token(capture, given[i]) for i in batch)
    return torch.tensor(list(found), device=capture.frame.device)


def _by_length(ids: Sequence[Tensor], size: int) -> Iterator[list[int]]:
    """Batches of prompts of one length, as indices; shortest first."""
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(ids):
        groups.setdefault(len(one), []).append(i)
    for _, group in sorted(groups.items()):
        yield from (group[start : start + size] for start in range(0, len(group), size))
