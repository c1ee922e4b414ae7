"""The operator of one run, restricted to a circuit: its logits and its share of a target."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Attribution, TableBuilder, Target, TargetLike, resolve
from ..checks import need, spelled
from ..graph import Edge, Node, as_edges
from ..operator import Capture, FrozenTransformer, RestrictedTransformer
from ..pictures import Page, Paged, dots, table_view
from .circuit import Circuit
from .model_id import ModelInfo

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


@spelled
@dataclass(frozen=True)
class CircuitShare(Paged):
    """How much of a target a circuit carries.

    Attributes:
        value: Value of the target in the circuit, one per prompt (logits).
        target_value: Value of the target in the whole run, one per prompt (logits).
        contributions: Σ |contribution| of the circuit's tokens and constants, one per prompt. Where
            this sum is much larger than the value, contributions cancel, and a share says little.
        name: Name of the target, one per prompt.
    """

    value: tuple[float, ...]
    target_value: tuple[float, ...]
    contributions: tuple[float, ...]
    name: tuple[str, ...]

    @property
    def share(self) -> tuple[float, ...]:
        """Value / target value, one per prompt; nan where the target is 0."""
        pairs = zip(self.value, self.target_value, strict=True)
        # Unlike faithfulness, nothing is subtracted first: what constants add counts, too.
        return tuple(part / whole if whole else float("nan") for part, whole in pairs)

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the values as a pandas table.

        Returns:
            One row per prompt, with columns prompt, target, value, target_value, share and
            contributions.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        names = ("value", "target_value", "share", "contributions")
        columns = {"prompt": range(len(self.name)), "target": self.name}
        return pandas.DataFrame(columns | {name: getattr(self, name) for name in names})

    def to_json(self) -> str:
        """Write the values as JSON, in logits; a share that is nan is null."""
        share = [None if math.isnan(s) else s for s in self.share]
        data = {"format": "tensorlens_tl circuit share 1", "unit": "logits; shares have none"}
        return json.dumps(data | vars(self) | {"share": share}, ensure_ascii=False)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the circuit's values beside the whole run's with matplotlib, one dot per prompt.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on.

        Raises:
            ValueError: If matplotlib is missing.
        """
        groups = {"circuit": self.value, "whole run": self.target_value}
        return dots(ax, groups, ylabel="logits", title=", ".join(dict.fromkeys(self.name)))

    def _page(self) -> Page:
        names = ("value", "target_value", "share", "contributions")
        values = np.array([getattr(self, name) for name in names], dtype=np.float64).T
        labels = [[str(i), name] for i, name in enumerate(self.name)]
        heads = ["in the circuit", "in the whole run", "share", "Σ|contribution| in the circuit"]
        notes = [
            "Values and contributions are in logits. Where Σ|·| is large, a share says little."
        ]
        table = table_view(["prompt", "target"], heads, labels, values)
        return Page("How much of a target a circuit carries", [table], notes, height=420)

    def __repr__(self) -> str:
        columns = (self.name, self.value, self.target_value, self.share, self.contributions)
        return "\n".join(
            f"{name}: {part:.4g} of {whole:.4g} ({share:.1%}), from Σ|·| = {size:.4g}"
            for name, part, whole, share, size in zip(*columns, strict=True)
        )


@spelled
@dataclass(frozen=True, eq=False)
class Subgraph(Paged):
    """The operator of a run, restricted to the edges of a circuit.

    Patterns, scales and gating ratios stay those of the whole run: only the real model tells what
    they would be in the circuit. Query and key edges have no effect here, as patterns are frozen.

    Attributes:
        capture: The recorded run.
        whole: The operator of the whole run.
        circuit: The edges that are kept.
    """

    capture: Capture
    whole: FrozenTransformer
    circuit: Circuit

    def __repr__(self) -> str:
        size = f"{len(self.circuit)} edges, {len(self.circuit.nodes)} nodes"
        return f"Subgraph({self.capture.model_name}, {size})"

    def _page(self) -> Page:
        page = self.circuit._page()
        note = (
            "Patterns, scales and ratios are those of the whole run; .share tells what it carries."
        )
        title = f"One run on {len(self.circuit)} edges alone"
        return replace(page, title=title, notes=(*page.notes, note))

    def plot(self, ax: Axes | None = None, top: int = 60) -> Axes:
        """Draw the edges that are kept, as :meth:`Circuit.plot` does."""
        return self.circuit.plot(ax, top)

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the edges that are kept as a pandas table, as :meth:`Circuit.to_dataframe` does."""
        return self.circuit.to_dataframe()

    def to_json(self) -> str:
        """Write the edges that are kept as JSON, as :meth:`Circuit.to_json` does."""
        return self.circuit.to_json()

    @cached_property
    def operator(self) -> RestrictedTransformer:
        """The restricted operator: X → the final normalized residual."""
        # Query and key edges are passed over: with frozen patterns nothing flows along them.
        return self.whole.restrict(self.circuit.edges)

    @cached_property
    def final(self) -> Float[Tensor, "batch pos d_model"]:
        """Final normalized residual of the circuit [batch, pos, d_model]."""
        # The restricted operator is affine like the whole one; constants are never cut.
        return self.operator.apply(self.capture.input) + self.operator.bias

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"] | Float[Tensor, "batch d_vocab"]:
        """Logits of the circuit, at the soft-cap ratios of the whole run, as the model has them."""
        found = self.capture.unembed @ self.final + self.capture.unembed.bias
        return found if self.capture.logits.ndim == 3 else found[:, self.capture.frame.read_at]

    def attribute(
        self, target: TargetLike = None, versus: TargetLike = None, pos: int = -1
    ) -> Attribution:
        """Split the circuit's value of a target by token and constant.

        Args:
            target: Token or direction to explain, as in :meth:`TensorLens.attribute`.
            versus: Token or direction subtracted from the target, or None.
            pos: Position of the prediction among the real tokens.

        Returns:
            Contributions along the kept edges, which sum to the circuit's value of the target.

        Raises:
            ValueError: If the target or the position does not exist.
        """
        goal = resolve(self.capture, target, versus, pos)
        return self._attribute(goal.alone("attribute of a circuit"))

    def _attribute(self, goal: Target) -> Attribution:
        u = torch.zeros_like(self.final)
        prompts = torch.arange(len(u), device=u.device)
        u[prompts, goal.query] = goal.covector
        effects: dict[str, Tensor] = {}
        # One pull gives the covector c at the embeddings, and every constant's effect on its way.
        c, rows = self.operator.apply_t(u, effects), TableBuilder(self.capture, goal)
        for name, embedding in self.capture.embeddings.items():
            # ⟨Tᵀ u, x_j⟩ of every token j.
            rows.spread(Node.parse(name), (c * embedding).sum(-1))
        for name, effect in effects.items():
            rows.add([Node.parse(name)], effect.sum(-1, keepdim=True))
        # Constants above the sweep, such as b_U, are of the target: no edge can hold them.
        rows.add_constants()
        names = tuple(f"{name} in the circuit" for name in goal.name)
        # The rows sum to the circuit's value, so that, and not the run's, is the table's target.
        found = rows.to_attribution("token")
        return replace(found, target=names, target_value=self._value(goal))

    def share(
        self, target: TargetLike = None, versus: TargetLike = None, pos: int = -1
    ) -> CircuitShare:
        """Compare the circuit's value of a target with the value in the whole run.

        Args:
            target: Token or direction to explain, as in :meth:`TensorLens.attribute`.
            versus: Token or direction subtracted from the target, or None.
            pos: Position of the prediction among the real tokens.

        Returns:
            Both values, and Σ |contribution| of the circuit beside.

        Raises:
            ValueError: If the target or the position does not exist.
        """
        goal = resolve(self.capture, target, versus, pos).alone("share of a circuit")
        sizes = self._attribute(goal).values.abs().sum(1)
        columns = (self._value(goal), goal.value, sizes)
        value, target_value, contributions = (tuple(column.tolist()) for column in columns)
        return CircuitShare(value, target_value, contributions, goal.name)

    def _value(self, goal: Target) -> Float[Tensor, " batch"]:
        prompts = torch.arange(len(self.final), device=self.final.device)
        return (self.final[prompts, goal.query] * goal.covector).sum(-1) + goal.constant


def circuit_from_names(capture: Capture, given: Circuit | Iterable[Edge | Node | str]) -> Circuit:
    """Make the circuit of edges or nodes that a user named; pass a circuit of the same model on.

    Args:
        capture: A run of the model.
        given: A circuit, or edges, or nodes (then all edges between them are kept).

    Returns:
        The circuit, without scores where edges or nodes were named.

    Raises:
        ValueError: If the model has no such node or edge, or the circuit is of another model.
    """
    model = ModelInfo.of_capture(capture)
    if isinstance(given, Circuit):
        given.model.check(model)
        return given
    edges = as_edges(model.wiring, given, capture.sources)
    return Circuit(edges, {}, model, convention=capture.convention)
