"""What an edit is asked for: a target of each prompt, named so that other runs can be asked it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attribution import Target, TargetLike, is_token, own_prediction, resolve_each, resolve_token
from ..operator import Capture


@dataclass(frozen=True, eq=False)
class Goal:
    """A target of every prompt, less another one where there is one, at one position.

    Attributes:
        targets: The target of each prompt: a token id or a direction.
        versus: What is subtracted from each, or None.
        pos: Position of the prediction among the real tokens.
    """

    targets: tuple[Any, ...]
    versus: tuple[Any, ...] | None
    pos: int

    @classmethod
    def of(
        cls,
        capture: Capture,
        target: TargetLike | Sequence[TargetLike],
        versus: TargetLike | Sequence[TargetLike],
        pos: int,
    ) -> Goal:
        """Resolve what a user names, once, so that an edited run is asked for the same tokens.

        Args:
            capture: The captured run.
            target: As in :meth:`TensorLens.attribute`, or a list with one per prompt.
            versus: The same for what is subtracted, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.

        Returns:
            The goal, with a token id or a direction for every prompt.
        """
        own = own_prediction(capture, pos).tolist()
        targets = _each(capture, target, "target")
        # Fixed here: an edited run may predict another token, and is asked for this one.
        found = tuple(mine if t is None else t for t, mine in zip(targets, own, strict=True))
        foils = None if versus is None else _each(capture, versus, "versus")
        return cls(found, foils, pos)

    def on(self, capture: Capture, prompts: Sequence[int] | None = None) -> Target:
        """The goal as a functional of a run, of all prompts or of some.

        Args:
            capture: A run of these prompts.
            prompts: Numbers of the run's prompts among the goal's; None for all.

        Returns:
            The functional, one row per prompt of the run.
        """
        rows = range(len(self.targets)) if prompts is None else prompts
        own = torch.zeros(len(rows), dtype=torch.long, device=capture.frame.device)
        goal = resolve_each(capture, [self.targets[i] for i in rows], self.pos, own)
        if self.versus is None:
            return goal
        foils = [self.versus[i] for i in rows]
        return goal.minus(resolve_each(capture, foils, self.pos, own, "versus"))

    def same(self, other: Goal) -> bool:
        """Tell whether another goal asks for the same."""
        mine, others = ((*goal.targets, *(goal.versus or ())) for goal in (self, other))
        alike = self.pos == other.pos and (self.versus is None) == (other.versus is None)
        return (
            alike
            and len(mine) == len(others)
            and all(
                torch.equal(torch.as_tensor(a), torch.as_tensor(b))
                for a, b in zip(mine, others, strict=True)
            )
        )

    def read(self, logits: Tensor, prompt: int) -> Tensor:
        """Read the goal of one prompt off logits, with their graph.

        Args:
            logits: Logits at the goal's position [d_vocab].
            prompt: Number of the prompt.

        Returns:
            The target's value.

        Raises:
            ValueError: If the goal is no token.
        """
        pair = (self.targets[prompt], None if self.versus is None else self.versus[prompt])
        if not all(is_token(one) for one in pair):
            raise ValueError(
                "The Jacobian is taken of tokens, and a direction was passed. Pass tokens as "
                "target= and versus=."
            )
        return logits[pair[0]] - (0 if pair[1] is None else logits[pair[1]])


def _each(capture: Capture, given: Any, name: str) -> tuple[Any, ...]:
    """One target per prompt: a list of one for each, or one for all."""
    batch = capture.frame.batch

    def known(one: Any) -> Any:
        return resolve_token(capture, one, name) if one is not None and is_token(one) else one

    if isinstance(given, list | tuple) and not all(isinstance(x, float) for x in given):
        if len(given) != batch:
            raise ValueError(
                f"{name}= has {len(given)} entries for {batch} prompts. Give one for each prompt, "
                "or one for all."
            )
        return tuple(map(known, given))
    return (known(given),) * batch
