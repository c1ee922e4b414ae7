"""The operator restricted to a subgraph: every reader reads what some edges alone bring it.

With w → r the kept edges, y_w what a writer adds and k all constants that no node holds so far,

    x_r = Σ_{w → r} y_w + k,     y_n = F_n(x_n) for every node n with a kept path to the logits

and the output is the final norm of x_logits. All edges give the unrestricted operator; input →
logits alone gives the direct path. F_n are the frozen parts of the sublayers, so the restricted
operator is affine, too; its adjoint carries covectors along the same edges backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..graph import INPUT, LOGITS, Edge, Node, owner
from ..sublayers import Chain, Frame, LinearMap
from .residual_stream import Branch, Step

Constants = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, eq=False, repr=False)
class RestrictedTransformer(LinearMap):
    """X [batch, pos, d_model] → the final normalized residual, along some edges alone.

    Attributes:
        frame: Prompts, positions, dtype, device.
        steps: The steps of the whole operator.
        last: The final norm, with what the user's own hooks added after it.
        edges: The kept edges; those into queries and keys have no place in the operator.
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
        """What every node reads: values of a head, an MLP, or the logits."""
        found: dict[Node, tuple[Node, ...]] = {}
        for edge in sorted((e for e in self.edges if e.conserved), key=str):
            found[owner(edge.dest)] = (*found.get(owner(edge.dest), ()), edge.src)
        return found

    @cached_property
    def live(self) -> frozenset[Node]:
        """The nodes with a kept path to the logits."""
        found, todo = set(), [LOGITS]
        while todo:
            new = set(self.reads.get(todo.pop(), ())) - found
            found |= new
            todo += new
        return frozenset(found - {INPUT})

    def _parts(self, step: Step) -> Iterator[tuple[Node, Chain]]:
        for branch in step.branches:
            for node in branch.body.nodes():
                if node in self.live:
                    yield node, self._part(branch, node)

    @cached_property
    def _known(self) -> dict[Node, Chain]:
        return {}

    def _part(self, branch: Branch, node: Node) -> Chain:
        if node not in self._known:
            self._known[node] = branch.part(node)
        return self._known[node]

    def _push(self, x: Tensor, constant: Callable[[Constants], Tensor | float]) -> Tensor:
        """The state at the logits, from x at the input and what is chosen of the constants."""
        written: dict[Node, Tensor] = {INPUT: x}
        everywhere: Tensor | float = 0.0

        def read(node: Node) -> Tensor:
            found = sum((written[src] for src in self.reads.get(node, ())), everywhere)
            return found if isinstance(found, Tensor) else torch.zeros_like(x)

        for step in self.steps:
            added = {}
            for node, part in self._parts(step):
                added[node] = part.apply(read(node)) + constant(part.constants)
            written |= added
            for branch in step.branches:
                everywhere = everywhere + constant(branch.outside)
            for edit in step.edits:
                everywhere = everywhere + constant(edit.constants)
        return self.last.apply(read(LOGITS)) + constant(self.last.constants)

    def apply(self, x):
        return self._push(x, lambda own: 0.0)

    def apply_t(self, y, effects=None):
        shares: dict[str, Tensor] = {} if effects is None else effects
        c = self.last.apply_t(y, shares)
        covectors: dict[Node, Tensor] = {}  # of what a node writes
        everywhere = c  # of what all readers above read

        def give(node: Node, c: Tensor) -> None:
            for src in self.reads.get(node, ()):
                covectors[src] = covectors[src] + c if src in covectors else c

        def enter(own: dict[str, Tensor]) -> None:
            for name, share in own.items():
                shares[name] = shares[name] + share if name in shares else share

        give(LOGITS, c)
        for step in reversed(self.steps):
            for edit in step.edits:
                enter({edit.name: (everywhere * edit.constant).sum(-1)})
            for branch in step.branches:
                outside = branch.outside()
                enter({name: (everywhere * k).sum(-1) for name, k in outside.items()})
            pulled = []
            for node, part in self._parts(step):
                own: dict[str, Tensor] = {}
                pulled.append((node, part.apply_t(covectors[node], own)))
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
