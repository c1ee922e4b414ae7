"""Scores of many prompts by many methods: captured once, prompts of one length together, timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from .adapters import adapt
from .capturing import Convention
from .composer import FrozenTransformer
from .masking import all_real
from .methods import token_scores
from .recording import record
from .targets import resolve_target, token_id


@dataclass(frozen=True, eq=False)
class Scored:
    """Prompts with their targets and every method's scores.

    Attributes:
        prompts: Token ids, one tensor [pos] per prompt.
        targets: The target's token id, per prompt.
        predicted: The model's own prediction, per prompt.
        scores: Every method's scores of every prompt's tokens [pos].
        seconds: What every method took, all prompts together.
        forward_seconds: What plain forward passes took.
    """

    prompts: tuple[Int[Tensor, " pos"], ...]
    targets: tuple[int, ...]
    predicted: tuple[int, ...]
    scores: Mapping[str, Sequence[Float[Tensor, " pos"]]]
    seconds: Mapping[str, float]
    forward_seconds: float


def score(
    model: Any,
    prompts: Sequence[Any],
    methods: Sequence[str],
    targets: Sequence[str | int] | None = None,
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
        options: Options of methods, by name.
        gate: See :class:`tensorlens_tl.Convention`.
        batch_size: Prompts captured at once.
        progress: Whether to count prompts on standard error.

    Returns:
        The scores.
    """
    adapter, options = adapt(model), options or {}
    ids = [adapter.prepare(prompt, {})[1].tokens[0] for prompt in prompts]
    scores: dict[str, list[Any]] = {name: [None] * len(ids) for name in methods}
    goals, predicted, seconds, plain = (
        [0] * len(ids),
        [0] * len(ids),
        dict.fromkeys(methods, 0.0),
        0.0,
    )
    with tqdm(total=len(ids), desc="scores", delay=2, leave=False, disable=not progress) as bar:
        for batch in _by_length(ids, batch_size):
            stack = torch.stack([ids[i] for i in batch])
            start = time.perf_counter()
            with torch.no_grad():
                adapter.run(stack, all_real(adapter, stack))
            plain += time.perf_counter() - start
            with torch.no_grad():
                _, capture = record(adapter, stack, Convention(gate), None, "stored",
                                    **all_real(adapter, stack))  # fmt: skip
            operator = FrozenTransformer.of(capture)
            own = capture.logits[:, -1].argmax(-1)
            wanted = own if targets is None else torch.tensor(
                [_id(capture, targets[i]) for i in batch], device=own.device)  # fmt: skip
            goal = resolve_target(capture, None, -1, wanted)
            for i, a, b in zip(batch, wanted.tolist(), own.tolist(), strict=True):
                goals[i], predicted[i] = a, b
            for name in methods:
                start = time.perf_counter()
                with torch.no_grad():
                    found = token_scores(
                        name, capture, operator, goal, model, **options.get(name, {})
                    )
                seconds[name] += time.perf_counter() - start
                for row, i in enumerate(batch):
                    scores[name][i] = found[row].detach()
            bar.update(len(batch))
    return Scored(tuple(ids), tuple(goals), tuple(predicted), scores, seconds, plain)


def _id(capture: Any, target: str | int) -> int:
    return token_id(capture, target) if isinstance(target, str) else int(target)


def _by_length(ids: Sequence[Tensor], size: int) -> Iterator[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(ids):
        groups.setdefault(len(one), []).append(i)
    for _, group in sorted(groups.items()):
        yield from (group[start : start + size] for start in range(0, len(group), size))
