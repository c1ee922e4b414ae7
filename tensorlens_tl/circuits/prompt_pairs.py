"""Prompts beside their corrupted prompts, those of one length together, and what is measured."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import is_int
from ..chunks import plain
from ..hosts import Adapter, each_prompt, own_ids
from ..operator import token_id

METRIC_KEPT = (
    "resume= cannot tell metric= functions apart. Pass target= and versus=, or drop resume=."
)
Metric = Callable[
    [Float[Tensor, "prompt d_vocab"], Int[Tensor, " prompt"]], Float[Tensor, " prompt"]
]
"""(logits where the prediction is made, indices of these prompts) → one number per prompt."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts of one length, and their corrupted prompts where there are any.

    Attributes:
        index: Index of each prompt among all prompts of the call [prompt].
        ids: Token ids of the prompts [prompt, pos]; or pictures.
        n_pos: Number of positions of each prompt.
        corrupted: Token ids of the corrupted prompts [prompt, pos], or None.
    """

    index: Int[Tensor, " prompt"]
    ids: Int[Tensor, "prompt pos"] | Float[Tensor, "prompt ..."]
    n_pos: int
    corrupted: Int[Tensor, "prompt pos"] | Float[Tensor, "prompt ..."] | None = None

    def split(self, size: int) -> list[Pairs]:
        """Split into pieces of at most ``size`` prompts."""
        none = [None] * len(self.ids)
        corrupted = none if self.corrupted is None else self.corrupted.split(size)
        # Not strict: without corrupted prompts there is a None per prompt, more than there are
        # pieces.
        pieces = zip(self.index.split(size), self.ids.split(size), corrupted, strict=False)
        return [Pairs(index, ids, self.n_pos, other) for index, ids, other in pieces]

    @property
    def about(self) -> tuple[Any, ...]:
        """What tells these prompts from others."""
        return self.index, self.ids, self.corrupted

    @classmethod
    def together(cls, pairs: Sequence[Pairs]) -> list[Pairs]:
        """Group prompts by length again, shortest first."""
        found = []
        for n_pos in sorted({pair.n_pos for pair in pairs}):
            these = [pair for pair in pairs if pair.n_pos == n_pos]
            others = [pair.corrupted for pair in these if pair.corrupted is not None]
            ids = torch.cat([pair.ids for pair in these])
            index = torch.cat([pair.index for pair in these])
            found.append(cls(index, ids, n_pos, torch.cat(others) if others else None))
        return found


def token_rows(adapter: Adapter, prompts: Any, name: str = "prompts") -> list[Int[Tensor, " pos"]]:
    """Turn prompts into token ids, each without padding.

    Args:
        adapter: Adapter of the model that reads the prompts.
        prompts: Strings, or token ids [prompt, pos], or ids [pos] of any lengths; any iterable.
        name: Name of the argument in error messages.

    Returns:
        One row of ids [pos] per prompt.

    Raises:
        ValueError: If the list is empty, or something in it is not a prompt.
    """
    return [
        own_ids(adapter, prompt) for prompt in each_prompt(prompts, adapter.tokenizer, None, name)
    ]


def paired(adapter: Adapter, prompts: Any, corrupted: Any = None) -> list[Pairs]:
    """Pair prompts with their corrupted prompts, and group them by length.

    Args:
        adapter: Adapter of the model that reads the prompts.
        prompts: As for :func:`token_rows`.
        corrupted: One corrupted prompt per prompt, of the same number of tokens; or None.

    Returns:
        The groups, shortest prompts first.

    Raises:
        ValueError: If a prompt and its corrupted prompt have unequal lengths, or the lists have.
    """
    rows = token_rows(adapter, prompts)
    others = None if corrupted is None else token_rows(adapter, corrupted, "corrupted")
    if others is not None and len(others) != len(rows):
        raise ValueError(
            f"There are {len(rows)} prompts but {len(others)} corrupted prompts. Pass one for each."
        )
    for i, (row, other) in enumerate(zip(rows, others or rows, strict=True)):
        if len(row) != len(other):
            raise ValueError(
                f"Prompt {i} has {len(row)} tokens, its corrupted prompt {len(other)}. They are "
                "compared position by position: change one token for another."
            )
    found = []
    # No padding: an ablation compares two prompts position by position.
    for length in sorted({len(row) for row in rows}):
        these = [i for i, row in enumerate(rows) if len(row) == length]
        ids = torch.stack([rows[i] for i in these])
        bad = None if others is None else torch.stack([others[i] for i in these])
        found.append(Pairs(torch.tensor(these), ids, adapter.n_pos_of(ids), bad))
    return found


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # one of C, which has no signature
        return True
    return True


def check_metric(metric: Any, pos: Any) -> None:
    """Refuse a metric that is not a function, and a position that is not an integer.

    Raises:
        ValueError: If one of them is something else.
    """
    if callable(metric) and not _takes_two(metric):
        raise ValueError(
            f"metric={metric!r} does not take two arguments. Pass a function of logits "
            "[prompt, d_vocab] and indices of the prompts [prompt]."
        )
    if metric is not None and not callable(metric):
        raise ValueError(
            f"metric={metric!r} is not a function. Pass a function of logits and indices, or "
            "use target= and versus=."
        )
    if not is_int(pos):
        raise ValueError(f"pos={pos!r} is not an integer. Pass one: -1 is the last.")


@dataclass(frozen=True, eq=False)
class LogitMetric:
    """One number per prompt, read off the logits at one position.

    Attributes:
        target: Token id measured for every prompt [prompt], or None for what the clean run
            predicts.
        versus: Token id whose logit is subtracted [prompt], or None for no subtraction.
        metric: Function measured in place of target − versus, or None.
        pos: Position of the prediction. Negative positions count from the end, as in Python.
    """

    target: Int[Tensor, " prompt"] | None
    versus: Int[Tensor, " prompt"] | None
    metric: Metric | None
    pos: int

    @classmethod
    def of(
        cls, adapter: Adapter, n: int, target: Any, versus: Any, metric: Metric | None, pos: int
    ) -> LogitMetric:
        """Turn what a user names into a metric.

        Args:
            adapter: Adapter of the model, which knows its tokens.
            n: Number of prompts.
            target: Token string or id for all prompts, a list with one per prompt, or None.
            versus: Token whose logit is subtracted, in the same forms.
            metric: Function of logits and indices, or None.
            pos: Position of the prediction.

        Returns:
            The metric of these prompts.

        Raises:
            ValueError: If a token does not exist, a list has another length than n, a metric is not
                a function, or both a metric and a target are given.
        """
        check_metric(metric, pos)
        if adapter.headless and metric is None:
            raise ValueError(
                f"A logit is measured, and {adapter.name} has no head. Pass metric=, a function of "
                "the final residual at pos."
            )
        if adapter.headless and pos == -1 and adapter.read_at is not None:
            # Such a model reads one row, often the first. "Last" means that one.
            pos = adapter.read_at
        if metric is not None and (target is not None or versus is not None):
            raise ValueError(
                "metric= and target= (or versus=) are both given, but only one is measured. Drop "
                "one."
            )
        tokens = _ids(adapter, target, n, "target"), _ids(adapter, versus, n, "versus")
        return cls(*tokens, metric, pos)

    @property
    def about(self) -> tuple[Any, ...]:
        """What tells this metric from others, where it is no function."""
        return self.pos, *map(plain, (self.target, self.versus))

    def values(
        self,
        logits: Float[Tensor, "circuit prompt pos d_vocab"],
        clean: Float[Tensor, "prompt pos d_vocab"],
        index: Int[Tensor, " prompt"],
    ) -> Float[Tensor, "circuit prompt"]:
        """Measure several runs of the same prompts; differentiable.

        Args:
            logits: Logits of the runs.
            clean: Logits of the clean run, whose prediction is measured where no target is given.
            index: Index of each of these prompts among all prompts of the call.

        Returns:
            One number per run and prompt.

        Raises:
            ValueError: If the position does not exist, or the metric returns another shape.
        """
        row = self.row(logits.shape[2])
        return self.values_at(logits[:, :, row], clean[:, row], index)

    def row(self, n_pos: int) -> int:
        """Find the position of the prediction in a prompt of some length.

        Args:
            n_pos: Number of tokens of the prompt.

        Returns:
            The position, from 0.

        Raises:
            ValueError: If the position does not exist.
        """
        if not -n_pos <= self.pos < n_pos:
            raise ValueError(
                f"pos={self.pos} is outside a prompt of {n_pos} tokens. Use {-n_pos} to "
                f"{n_pos - 1}."
            )
        # Python's % is never negative, so −1 becomes the last position.
        return self.pos % n_pos

    def values_at(
        self,
        at: Float[Tensor, "circuit prompt d_vocab"],
        clean: Float[Tensor, "prompt d_vocab"],
        index: Int[Tensor, " prompt"],
    ) -> Float[Tensor, "circuit prompt"]:
        """The same of logits at the position of the prediction alone."""
        if self.metric is not None:
            # Run by run: a user's function knows prompts and a vocabulary, and no axis of circuits.
            found = [self.metric(one, index) for one in at]
            if any(getattr(one, "shape", ()) != (len(index),) for one in found):
                raise ValueError(
                    f"metric returned shape {list(getattr(found[0], 'shape', ()))} for "
                    f"{len(index)} prompts. Return one number per prompt, [{len(index)}]."
                )
            return torch.stack(found)
        # Every run is measured by the clean run's word, else the runs could not be compared.
        target = clean.argmax(-1) if self.target is None else self.target[index]
        rows = torch.arange(len(index), device=at.device)
        value = at[:, rows, target.to(at.device)]
        if self.versus is not None:
            value = value - at[:, rows, self.versus[index].to(at.device)]
        return value


def _id(given: Any, name: str) -> int:
    try:
        # True is an integer to Python, and would be token 1.
        if isinstance(given, bool):
            raise TypeError
        # Takes integers of NumPy and torch, and no float: 3.0 is no token.
        return operator.index(given)
    except TypeError:
        raise ValueError(
            f"{name}={given!r} ({type(given).__name__}) is not a token. Pass a token string or an "
            "id, or measure something else with metric=."
        ) from None


def _ids(adapter: Adapter, given: Any, n: int, name: str) -> Tensor | None:
    """The token id of every prompt, from one for all or a list with one per prompt."""
    if given is None:
        return None
    each = given.tolist() if isinstance(given, Tensor) else given
    each = list(each) if isinstance(each, Sequence) and not isinstance(each, str) else [each] * n
    if len(each) != n:
        raise ValueError(
            f"{name} has {len(each)} entries for {n} prompts. Pass one for each, or one for all."
        )
    each = [_id(one, name) if one is None else one for one in each]
    return torch.tensor(token_ids(adapter, each, name))


def token_ids(adapter: Adapter, each: Sequence[Any], name: str) -> list[int | None]:
    """The ids of tokens; None stays None.

    Args:
        adapter: Adapter of the model, which knows its tokens.
        each: Token strings, ids, or None.
        name: Name of the argument in error messages.

    Returns:
        One id for each.

    Raises:
        ValueError: If a token does not exist.
    """
    ids = [
        None
        if one is None
        else token_id(adapter, one, name)
        if isinstance(one, str)
        else _id(one, name)
        for one in each
    ]
    d_vocab = adapter.weights.unembed.W_U.shape[1]
    if wrong := [i for i in ids if i is not None and not 0 <= i < d_vocab]:
        raise ValueError(
            f"{name} id {wrong[0]} is outside the vocabulary. Use ids from 0 to {d_vocab - 1}."
        )
    return ids
