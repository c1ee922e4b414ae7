"""One target of a run, its gradient at every site, and targets at a site of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import as_list
from ..maps import take_row
from ..operator import Capture, FrozenTransformer, Trace
from .targets import (
    Target,
    TargetLike,
    as_direction,
    is_token,
    own_prediction,
    resolve,
    resolve_target,
    resolve_token,
)

Effects = dict[str, Float[Tensor, "batch pos"]]
"""What constants add to a target, by the constant's name, in units of the target."""


@dataclass(frozen=True, eq=False)
class TargetGradient:
    """One target of a run, pulled back to every residual site.

    Attributes:
        capture: The captured run.
        operator: The operator of that run.
        target: The linear functional that is split.
        pulled: The trace, where a batched sweep has made it already; None to make it on first use.
    """

    capture: Capture
    operator: FrozenTransformer
    target: Target
    pulled: Trace | None = None

    @cached_property
    def trace(self) -> Trace:
        """The target's covector at every site, and every constant's share ⟨covector, constant⟩."""
        if self.pulled is not None:
            return self.pulled
        u = _at_query(self.operator, [self.target])[0]
        # From one position alone, the last block's W_O and MLP are pulled at one row.
        return self.operator.pull(u, self.target.query if self.target.rows == 1 else None)

    def each_row(self) -> Iterator[TargetGradient]:
        """The gradients of the target's rows apart, for what is written at one row."""
        for target in self.target.each_row(self.capture.unembed.final):
            yield TargetGradient(self.capture, self.operator, target)

    @classmethod
    def many(
        cls, capture: Capture, operator: FrozenTransformer, targets: Sequence[Target]
    ) -> tuple[TargetGradient, ...]:
        """Pull several targets of one run at once.

        Args:
            capture: The captured run.
            operator: The operator of that run.
            targets: The targets, at least one.

        Returns:
            One gradient per target, in the order of ``targets``.
        """
        query = targets[0].query
        # With one common position the sweep may drop all later positions.
        same = all(torch.equal(t.query, query) and t.rows == 1 for t in targets)
        trace = operator.pull(_at_query(operator, targets), query if same else None)
        return tuple(cls(capture, operator, target, trace[i]) for i, target in enumerate(targets))


def top_covector(gradient: TargetGradient) -> tuple[Float[Tensor, "batch 1 d_model"], Effects]:
    """Pull the target through the final norm, at the target's position alone.

    Args:
        gradient: The target and its run.

    Returns:
        The covector below the final norm, and what the constants above that site add, by name.
    """
    capture, query = gradient.capture, gradient.target.query
    u, effects = gradient.target.covector[:, None], {}
    if (edit := capture.final_edit) is not None:
        effects[edit.name] = dot(u, take_row(edit.constant, query))
    if capture.ln_final is not None:
        u = capture.ln_final.row(query).apply_t(u, effects)
    return u, effects


def direct_covectors(
    gradient: TargetGradient,
) -> tuple[list[Float[Tensor, "batch 1 d_model"]], Effects]:
    """Pull the target past all nodes, through the norms alone, at the target's position.

    Args:
        gradient: The target and its run.

    Returns:
        The covector at the embeddings, at what each step adds, and above the last step: all are the
        one below the final norm, but in post-norm models. And what the constants above the last
        step add, by name.
    """
    u, effects = top_covector(gradient)
    found = [u]
    for step in reversed(gradient.operator.steps):
        if step.norm is not None:
            u = step.norm.row(gradient.target.query).apply_t(u)
        found.append(u)
    # Nothing but norms stands between: in pre-norm models every entry is the same tensor.
    return [u, *reversed(found)], effects


class GradientCache:
    """The gradients of the latest few targets of one run, so that asking again costs nothing.

    Each one holds about two residual streams of numbers, hence only a few are kept.
    """

    def __init__(self, capture: Capture, operator: FrozenTransformer, size: int = 2):
        self.capture, self.operator, self.size = capture, operator, size
        self.latest: list[TargetGradient] = []

    def gradient(self, target: Target) -> TargetGradient:
        """The gradient of a target: a kept one where the same target was asked for lately.

        Args:
            target: The linear functional.

        Returns:
            The gradient. Its trace is made on first use.
        """
        for kept in self.latest:
            if kept.target.same(target):
                return kept
        found = TargetGradient(self.capture, self.operator, target)
        self.latest = [*self.latest, found][-self.size :]
        return found


def resolve_at_site(
    capture: Capture, site: str, target: TargetLike, versus: TargetLike = None, pos: int = -1
) -> Target:
    """Turn a direction into a functional of the residual that a run was cut at.

    Args:
        capture: The run up to the site, of ``Capture.until``.
        site: Name of the site, for the target's name.
        target: A direction [d_model].
        versus: A direction that is subtracted, or None.
        pos: Position of the residual among the real tokens; −1 is the last.

    Returns:
        The functional ⟨direction, residual⟩, for every prompt.

    Raises:
        ValueError: If a direction is something else, or the position does not exist.
    """
    query, width = capture.frame.index(pos), capture.resid_final.shape[-1]
    # The capture ends at the site, so its "final" residual is the state there.
    state = take_row(capture.unembed.final, query)[:, 0]

    def one(direction: TargetLike, name: str) -> Target:
        if is_token(direction):
            raise ValueError(
                f"{name}={direction!r} is no direction, which site= needs. Pass one [{width}], or "
                "drop site=."
            )
        u = as_direction(direction, name)
        if u.shape != (width,):
            raise ValueError(
                f"{name}= of shape {list(u.shape)} is no direction at {site}. Pass a "
                f"direction [{width}]."
            )
        u = u.to(state)
        names = (f"direction at {site}",) * len(state)
        return Target(names, query, u.expand(len(state), -1), {}, state @ u)

    goal = one(target, "target")
    return goal if versus is None else goal.minus(one(versus, "versus"))


def resolve_each(
    capture: Capture,
    targets: Sequence[TargetLike],
    pos: int,
    predicted: Int[Tensor, " batch"],
    name: str = "target",
) -> Target:
    """Turn one target per prompt into one functional per prompt.

    Args:
        capture: The captured run.
        targets: One target per prompt, each as in :func:`resolve_target`.
        pos: Position of the prediction among the real tokens; −1 is the last.
        predicted: Ids that stand for the model's own predictions [batch].
        name: The name of the user's argument, for messages.

    Returns:
        The functional of each prompt's own target.
    """
    if not all(map(is_token, targets)):
        goals = (resolve_target(capture, target, pos, predicted, name) for target in targets)
        return Target.stack([goal.row(prompt) for prompt, goal in enumerate(goals)])
    ids = [
        own if target is None else resolve_token(capture, target, name)
        for target, own in zip(targets, predicted.tolist(), strict=True)
    ]
    return resolve_target(capture, None, pos, torch.tensor(ids, device=predicted.device))


def resolve_prompts(
    capture: Capture,
    target: Any,
    versus: Any = None,
    pos: int = -1,
    predicted: Int[Tensor, " batch"] | None = None,
    of: str = "logit",
) -> Target:
    """Do as :func:`resolve`, where a target may also be tokens, one for every prompt.

    Args:
        capture: The captured run.
        target: As in :func:`resolve_target`; or a list of tokens or ids [batch].
        versus: What is subtracted, likewise; None subtracts nothing.
        pos: Position of the prediction among the real tokens; −1 is the last.
        predicted: Ids that stand for the model's own predictions [batch], or None.
        of: "logit" or "logprob".

    Returns:
        The functional of each prompt's own target.

    Raises:
        ValueError: As :func:`resolve`; and if ``versus`` is "all_others".
    """

    def each(given: Any, name: str) -> Int[Tensor, " batch"] | None:
        given = as_list(given)
        if not isinstance(given, list | tuple) or len(given) != capture.frame.batch:
            return None
        if not all(map(is_token, given)):
            return None
        own = own_prediction(capture, pos) if predicted is None else predicted
        ids = [
            int(p) if one is None else resolve_token(capture, one, name)
            for one, p in zip(given, own, strict=True)
        ]
        return torch.tensor(ids, device=own.device)

    if isinstance(versus, str) and versus == "all_others":
        raise ValueError(
            "versus='all_others' is for evaluate alone. Pass of='logprob', which sets a token "
            "against all others, or name one token."
        )
    first, second = each(target, "target"), each(versus, "versus")
    if first is not None:
        target, predicted = None, first
    if second is None:
        return resolve(capture, target, versus, pos, predicted, of)
    of = "logit" if of == "logprob" else of  # of a difference both are the same
    goal = resolve(capture, target, None, pos, predicted, of)
    return goal.minus(resolve_target(capture, None, pos, second, "versus"))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ over the last axis; the others broadcast."""
    return (a * b).sum(-1)


def _at_query(
    operator: FrozenTransformer, targets: Sequence[Target]
) -> Float[Tensor, "many batch pos d_model"]:
    """The targets' covectors, each at the target's position, zero elsewhere."""
    frame = operator.frame
    u = frame.zeros(operator.out_dim, len(targets))
    prompts = torch.arange(frame.batch, device=frame.device)
    for i, target in enumerate(targets):
        # Classes that read a mean of rows have the same covector at each of them.
        for row in range(target.rows):
            u[i, prompts, target.query + row] = target.covector
    return u
