"""Prompts beside their corrupted twins, those of one length together; what is measured at their ends."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..attribution import token_id
from ..hosts import Adapter, each_prompt, is_text

Metric = Callable[
    [Float[Tensor, "prompt d_vocab"], Int[Tensor, " prompt"]], Float[Tensor, " prompt"]
]
"""(logits where the prediction is made, which of the prompts these are) → one number a prompt."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts of one length, and their corrupted twins where there are any.

    Attributes:
        index: Which of all prompts these are.
        ids: Their tokens.
        twins: The corrupted prompts' tokens, or None.
    """

    index: Int[Tensor, " prompt"]
    ids: Int[Tensor, "prompt pos"]
    twins: Int[Tensor, "prompt pos"] | None = None

    def split(self, size: int) -> list[Pairs]:
        """Pieces of at most so many prompts."""
        twins = [None] * len(self.ids) if self.twins is None else self.twins.split(size)
        pieces = zip(self.index.split(size), self.ids.split(size), twins, strict=False)
        return [Pairs(*piece) for piece in pieces]


def token_rows(adapter: Adapter, prompts: Any, name: str = "prompts") -> list[Int[Tensor, " pos"]]:
    """Each prompt's own tokens, without padding.

    Args:
        adapter: The model's.
        prompts: Strings, or token ids [prompt, pos], or a list of ids [pos] of any lengths.
        name: What they are called in an error.

    Returns:
        One row of ids per prompt.

    Raises:
        ValueError: If there are none, or they are no prompts.
    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__") or len(prompts) == 0:
        raise ValueError(
            f"expected {name} as a non-empty list, got {prompts!r}: put a single one in a list"
        )
    if isinstance(prompts, Tensor) and prompts.ndim == 1:
        raise ValueError(
            f"expected {name} as token ids [prompt, pos], got one dimension: add [None]"
        )
    prompts = each_prompt(prompts, adapter.tokenizer)
    if is_text(prompts):
        _, found = adapter.prepare(prompts, {})
        rows = zip(found.tokens, found.spans, strict=True)
        return [tokens[start:stop] for tokens, (start, stop) in rows]
    return [adapter.prepare(prompt, {})[1].tokens[0] for prompt in prompts]


def paired(adapter: Adapter, prompts: Any, corrupted: Any = None) -> list[Pairs]:
    """Prompts and their corrupted twins, in groups of one length.

    Args:
        adapter: The model's.
        prompts: As for :func:`token_rows`.
        corrupted: As many, each of as many tokens as its prompt; or None.

    Returns:
        The groups, shortest first.

    Raises:
        ValueError: If a prompt and its twin have unequal lengths, or there are not as many of both.
    """
    rows = token_rows(adapter, prompts)
    twins = None if corrupted is None else token_rows(adapter, corrupted, "corrupted")
    if twins is not None and len(twins) != len(rows):
        raise ValueError(
            f"expected one corrupted prompt per prompt, {len(rows)}, got {len(twins)}: pair them"
        )
    for i, (row, twin) in enumerate(zip(rows, twins or rows, strict=True)):
        if len(row) != len(twin):
            raise ValueError(
                f"prompt {i} has {len(row)} tokens and its corrupted one {len(twin)}, expected equal "
                "lengths, as they are compared position by position: change one token for another"
            )
    found = []
    for length in sorted({len(row) for row in rows}):
        these = [i for i, row in enumerate(rows) if len(row) == length]
        ids = torch.stack([rows[i] for i in these])
        found.append(
            Pairs(
                torch.tensor(these),
                ids,
                None if twins is None else torch.stack([twins[i] for i in these]),
            )
        )
    return found


@dataclass(frozen=True, eq=False)
class Measure:
    """One number per prompt, read off the logits at one position.

    Attributes:
        target: Every prompt's token, or None for what the clean run itself predicts.
        versus: The token whose logit is subtracted; None for nothing.
        metric: Something else to measure in their place.
        pos: The position of the prediction, counted as in Python.
    """

    target: Int[Tensor, " prompt"] | None
    versus: Int[Tensor, " prompt"] | None
    metric: Metric | None
    pos: int

    @classmethod
    def of(
        cls, adapter: Adapter, n: int, target: Any, versus: Any, metric: Metric | None, pos: int
    ) -> Measure:
        """Turn what a user names into a measure.

        Args:
            adapter: The model's.
            n: How many prompts there are.
            target: A token string or id for all, one for each, or None.
            versus: The same.
            metric: A function of logits, or None.
            pos: Position.

        Returns:
            The measure.

        Raises:
            ValueError: If a token does not exist, the number is wrong, or both a metric and a target
                are given.
        """
        if metric is not None and not callable(metric):
            raise ValueError(
                f"expected metric as a function of logits and indices, got {metric!r}: pass one, or "
                "target and versus"
            )
        if metric is not None and (target is not None or versus is not None):
            raise ValueError(
                "expected either a metric or target and versus, got both: leave one out"
            )
        if not isinstance(pos, Integral):
            raise ValueError(f"expected a position as an integer, got {pos!r}: −1 is the last")
        tokens = _ids(adapter, target, n, "target"), _ids(adapter, versus, n, "versus")
        return cls(*tokens, metric, pos)

    def values(
        self,
        logits: Float[Tensor, "circuit prompt pos d_vocab"],
        clean: Float[Tensor, "prompt pos d_vocab"],
        index: Int[Tensor, " prompt"],
    ) -> Float[Tensor, "circuit prompt"]:
        """The measure of several runs of the same prompts; differentiable.

        Args:
            logits: The runs'.
            clean: The clean run's, for its own prediction.
            index: Which prompts these are.

        Returns:
            One number per run and prompt.

        Raises:
            ValueError: If the position does not exist, or the metric gives something else.
        """
        n_pos = logits.shape[2]
        if not -n_pos <= self.pos < n_pos:
            raise ValueError(
                f"position {self.pos} does not exist in a prompt of {n_pos} tokens: expected "
                f"{-n_pos} to {n_pos - 1}"
            )
        at = logits[:, :, self.pos]
        if self.metric is not None:
            found = [self.metric(one, index) for one in at]
            if any(getattr(one, "shape", ()) != (len(index),) for one in found):
                raise ValueError(
                    f"expected metric to give one number a prompt, [{len(index)}], got "
                    f"{list(getattr(found[0], 'shape', ()))}"
                )
            return torch.stack(found)
        target = clean[:, self.pos].argmax(-1) if self.target is None else self.target[index]
        rows = torch.arange(len(index), device=at.device)
        value = at[:, rows, target.to(at.device)]
        if self.versus is not None:
            value = value - at[:, rows, self.versus[index].to(at.device)]
        return value


def _id(given: Any, name: str) -> int:
    try:
        if isinstance(given, bool):
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise ValueError(
            f"expected {name} as a token string or an id, got {given!r} of {type(given).__name__}: pass "
            "one of these, or measure something else by metric="
        ) from None


def _ids(adapter: Adapter, given: Any, n: int, name: str) -> Tensor | None:
    if given is None:
        return None
    each = given.tolist() if isinstance(given, Tensor) else given
    each = list(each) if isinstance(each, Sequence) and not isinstance(each, str) else [each] * n
    if len(each) != n:
        raise ValueError(f"expected one {name} per prompt, {n}, or one for all, got {len(each)}")
    ids = [token_id(adapter, one) if isinstance(one, str) else _id(one, name) for one in each]
    d_vocab = int(adapter.cfg.d_vocab)
    if wrong := [i for i in ids if not 0 <= i < d_vocab]:
        raise ValueError(
            f"{name} id {wrong[0]} is outside the vocabulary: expected 0 to {d_vocab - 1}"
        )
    return torch.tensor(ids)
