"""One run's operator restricted to a circuit: its logits, its share of a target, where that comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import B_U, Attribution, Rows, Sweep, Target, TargetLike, resolve_target, result
from ..graph import Node
from ..operator import Capture, FrozenTransformer, RestrictedTransformer
from .circuit import Circuit


@dataclass(frozen=True)
class Share:
    """How much of a target a circuit carries.

    Attributes:
        value: The target's value in the circuit, one per prompt.
        target_value: In the whole run.
        contributions: Σ |contribution| of the circuit's tokens and constants: where it is much
            larger than the value, they cancel, and a share says little.
        name: The target's name, one per prompt.
    """

    value: tuple[float, ...]
    target_value: tuple[float, ...]
    contributions: tuple[float, ...]
    name: tuple[str, ...]

    @property
    def share(self) -> tuple[float, ...]:
        """Value / target value, one per prompt; nan where the target is 0."""
        pairs = zip(self.value, self.target_value, strict=True)
        return tuple(ours / whole if whole else float("nan") for ours, whole in pairs)

    def __repr__(self) -> str:
        columns = zip(self.name, self.value, self.target_value, self.share, self.contributions,
                      strict=True)  # fmt: skip
        return "\n".join(
            f"{name}: {ours:.4g} of {whole:.4g} ({share:.1%}), from Σ|·| = {size:.4g}"
            for name, ours, whole, share, size in columns
        )


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A run's operator restricted to a circuit.

    Patterns, scales and gating ratios stay those of the whole run: what the circuit's own would be,
    only the real model tells. Query and key edges have no place here.

    Attributes:
        capture: The run.
        whole: Its operator.
        circuit: The kept edges.
    """

    capture: Capture
    whole: FrozenTransformer
    circuit: Circuit

    def __repr__(self) -> str:
        size = f"{len(self.circuit)} edges, {len(self.circuit.nodes)} nodes"
        return f"Subgraph({self.capture.model_name}, {size})"

    @cached_property
    def operator(self) -> RestrictedTransformer:
        """The restricted operator, X → the final normalized residual."""
        return self.whole.restrict(self.circuit.edges)

    @cached_property
    def final(self) -> Float[Tensor, "batch pos d_model"]:
        """The final normalized residual that the circuit makes."""
        x = sum(self.capture.embeddings.values(), torch.zeros_like(self.capture.embed))
        return self.operator.apply(x) + self.operator.bias

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """The circuit's logits, at the ratios of a soft cap that the whole run had."""
        return self.capture.unembed.apply(self.final) + self.capture.unembed.bias

    def attribute(
        self, target: TargetLike = None, versus: TargetLike = None, pos: int = -1
    ) -> Attribution:
        """Split what the circuit makes of a target by token and constant.

        Args:
            target: As in :meth:`TensorLens.attribute`.
            versus: Subtracted from the target, or None.
            pos: Position of the prediction among the real tokens.

        Returns:
            Contributions along the kept edges; they sum to the circuit's value of the target.

        Raises:
            ValueError: If the target or the position does not exist.
        """
        return self._attribute(self._goal(target, versus, pos))

    def _attribute(self, goal: Target) -> Attribution:
        sweep = Sweep(self.capture, self.whole, goal)
        u = torch.zeros_like(self.final)
        prompts = torch.arange(len(u), device=u.device)
        u[prompts, goal.query] = goal.covector
        effects: dict[str, Tensor] = {}
        c, rows = self.operator.apply_t(u, effects), Rows()
        for name, embedding in self.capture.embeddings.items():
            rows.spread(Node.parse(name), (c * embedding).sum(-1))
        for name, effect in effects.items():
            rows.add([Node.parse(name)], effect.sum(-1, keepdim=True))
        if self.capture.unembed.weights.b_U is not None:
            rows.add([B_U], goal.constant[:, None])
        names = tuple(f"{name} in the circuit" for name in goal.name)
        return replace(result(sweep, rows, "token"), target=names, target_value=self._value(goal))

    def share(self, target: TargetLike = None, versus: TargetLike = None, pos: int = -1) -> Share:
        """How much of a target the circuit carries, of what the whole operator makes of it.

        Args:
            target: As in :meth:`TensorLens.attribute`.
            versus: Subtracted from the target, or None.
            pos: Position of the prediction among the real tokens.

        Returns:
            Both values, and Σ |contribution| beside.

        Raises:
            ValueError: If the target or the position does not exist.
        """
        goal = self._goal(target, versus, pos)
        sizes = self._attribute(goal).values.abs().sum(1)
        columns = (self._value(goal), goal.value, sizes)
        value, target_value, contributions = (tuple(column.tolist()) for column in columns)
        return Share(value, target_value, contributions, goal.name)

    def _goal(self, target: TargetLike, versus: TargetLike, pos: int) -> Target:
        goal = resolve_target(self.capture, target, pos)
        return goal if versus is None else goal.minus(resolve_target(self.capture, versus, pos))

    def _value(self, goal: Target) -> Float[Tensor, " batch"]:
        prompts = torch.arange(len(self.final), device=self.final.device)
        return (self.final[prompts, goal.query] * goal.covector).sum(-1) + goal.constant
