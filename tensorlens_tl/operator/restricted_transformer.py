"""The operator restricted to a subgraph: every reader reads what the kept edges bring it.

Let w → r be the kept edges, y_w what a writer adds, and k the sum of the constants so far that
belong to no node. Then

    x_r = Σ_{w → r} y_w + k,     y_n = F_n(x_n) for every node n with a kept path to the logits

where y_w and k have passed the norms of the residual that stand before r (in post-norm models),
and the output is the final norm of x_logits. All edges together give the unrestricted operator.
The edge input → logits alone gives the direct path. F_n are frozen parts of the sublayers, so the
restricted operator is affine, too. Its adjoint carries covectors along the same edges backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..checks import no_autocast, spelled
from ..graph import INPUT, LOGITS, Edge, Node, owner
from ..maps import Chain, Frame, LinearMap
from .residual_stream import Step

Constants = Callable[[], dict[str, Tensor]]
"""Gives the constants of a part by name [batch, pos, d_model]; called only if they are wanted."""


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class RestrictedTransformer(LinearMap):
    """X [batch, pos, d_model] → the final normalized residual, along some edges only.

    Attributes:
        frame: Spans of real tokens, number of positions, dtype and device.
        steps: The residual steps of the whole operator.
        last: The final norm, and what the user's hooks added after it.
        edges: The kept edges. Those into queries and keys have no place in the operator.
    """

    frame: Frame
    steps: tuple[Step, ...]
    last: LinearMap
    edges: frozenset[Edge]

    def __repr__(self) -> str:
        shape = f"[{self.frame.batch}, {self.frame.n_pos}, {self.in_dim}]"
        size = f"{len(self.edges)} edges, {len(self.live)} nodes alive"
        return f"RestrictedTransformer({shape} → {shape}, {size}, {self.frame.dtype})"

    @property
    def in_dim(self) -> int:
        return self.last.in_dim

    @property
    def out_dim(self) -> int:
        return self.last.out_dim

    @cached_property
    def reads(self) -> dict[Node, tuple[Node, ...]]:
        """For every reader (the values of a head, an MLP or the logits), the writers it reads."""
        found: dict[Node, tuple[Node, ...]] = {}
        for edge in sorted((e for e in self.edges if e.conserved), key=str):
            found[owner(edge.dest)] = (*found.get(owner(edge.dest), ()), edge.src)
        return found

    @cached_property
    def live(self) -> frozenset[Node]:
        """The nodes with a kept path to the logits."""
        # Backwards from the logits: a node that reaches nothing would be computed for nothing.
        found, todo = set(), [LOGITS]
        while todo:
            new = set(self.reads.get(todo.pop(), ())) - found
            found |= new
            todo += new
        return frozenset(found - {INPUT})

    @cached_property
    def _parts(self) -> tuple[tuple[tuple[Node, Chain], ...], ...]:
        """For every step, its live nodes and their maps F_n."""
        return tuple(
            tuple(
                (node, branch.part(node))
                for branch in step.branches
                for node in branch.body.nodes()
                if node in self.live
            )
            for step in self.steps
        )

    def _push(self, x: Tensor, constant: Callable[[Constants], Tensor | float]) -> Tensor:
        """The output for x at the input.

        Args:
            x: Vectors at the input [..., batch, pos, d_model].
            constant: Chooses what to add of the constants of a part.

        Returns:
            The final normalized residual [..., batch, pos, d_model].
        """
        no_autocast(self.frame.device.type)
        written: dict[Node, Tensor] = {INPUT: x}
        everywhere: Tensor | float = 0.0

        def read(node: Node) -> Tensor:
            # Constants belong to no writer, so every reader gets them, whatever edges are kept.
            found = sum((written[src] for src in self.reads.get(node, ())), everywhere)
            return found if isinstance(found, Tensor) else torch.zeros_like(x)

        for step, parts in zip(self.steps, self._parts, strict=True):
            # Nodes of one step run side by side: none reads what another of them writes.
            written |= {n: part.apply(read(n)) + constant(part.constants) for n, part in parts}
            for branch in step.branches:
                everywhere = everywhere + constant(branch.outside)
            for edit in step.edits:
                everywhere = everywhere + constant(edit.constants)
            if (norm := step.norm) is not None:  # all that is written so far passes it
                written = {node: norm.apply(y) for node, y in written.items()}
                if isinstance(everywhere, Tensor):
                    everywhere = norm.apply(everywhere)
                everywhere = everywhere + constant(norm.constants)
        # The final norm's scale is the run's, so the readout stays linear in what is kept.
        return self.last.apply(read(LOGITS)) + constant(self.last.constants)

    def apply(self, x):
        return self._push(x, lambda own: 0.0)

    def apply_t(self, y, effects=None):
        no_autocast(self.frame.device.type)
        shares: dict[str, Tensor] = {} if effects is None else effects
        c = self.last.apply_t(y, shares)
        covectors: dict[Node, Tensor] = {}  # at what each node writes
        everywhere = c  # at a constant that all readers above read

        def give(node: Node, c: Tensor) -> None:
            for src in self.reads.get(node, ()):
                covectors[src] = covectors[src] + c if src in covectors else c

        def enter(own: dict[str, Tensor]) -> None:
            for name, share in own.items():
                shares[name] = shares[name] + share if name in shares else share

        give(LOGITS, c)
        for step, parts in zip(reversed(self.steps), reversed(self._parts), strict=True):
            if (norm := step.norm) is not None:
                own = {}
                everywhere = norm.apply_t(everywhere, own)
                enter(own)
                covectors = {node: norm.apply_t(c) for node, c in covectors.items()}
            for edit in step.edits:
                enter({edit.name: (everywhere * edit.constant).sum(-1)})
            for branch in step.branches:
                outside = branch.outside()
                enter({name: (everywhere * k).sum(-1) for name, k in outside.items()})
            # Readers of one step first, all of them, as none writes to another.
            pulled = []
            for node, part in parts:
                own: dict[str, Tensor] = {}
                pulled.append((node, part.apply_t(covectors.pop(node), own)))
                enter(own)
            for node, c in pulled:
                give(node, c)
                everywhere = everywhere + c
        return covectors.get(INPUT, torch.zeros_like(c))

    @cached_property
    def bias(self):
        zeros = self.frame.zeros(self.in_dim)
        return self._push(zeros, lambda own: sum(own().values()))

    def constants(self):
        names: dict[str, Tensor] = {}
        self.apply_t(self.frame.zeros(self.out_dim), names)
        zeros = self.frame.zeros(self.in_dim)
        return {
            name: self._push(zeros, lambda own, name=name: own().get(name, 0.0)) for name in names
        }
