"""A model's edges as masks: which of the writers each reader is given live."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from ..graph import Edge, Node, Wiring, as_edges
from ..sublayers import ModelWeights


def wiring_of(weights: ModelWeights) -> Wiring:
    """Which edges a model has.

    Args:
        weights: The model's.

    Returns:
        Its shape.
    """
    blocks = weights.blocks
    return Wiring(
        len(blocks),
        blocks[0].attn.W_O.shape[0],
        parallel=any(b.parallel and b.mlp is not None for b in blocks),
        attn_only=all(b.mlp is None for b in blocks),
    )


@dataclass(frozen=True)
class EdgeUniverse:
    """All writers and readers of a model, from below; see :class:`Wiring`.

    Attributes:
        wiring: Which edges there are.
        positions: Whether the input is token and position embeddings.
    """

    wiring: Wiring
    positions: bool

    @cached_property
    def writers(self) -> tuple[Node, ...]:
        """Nodes that add to the residual."""
        return self.wiring.writers()

    @cached_property
    def readers(self) -> tuple[Node, ...]:
        """Nodes that read it."""
        return self.wiring.readers()

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, reader by reader from below."""
        return self.wiring.edges()

    @cached_property
    def below(self) -> tuple[int, ...]:
        """How many writers each reader sees: the first so many."""
        found = dict.fromkeys(self.readers, 0)
        for edge in self.edges:
            found[edge.dest] += 1
        return tuple(found.values())

    @cached_property
    def _writer(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.writers)}

    @cached_property
    def _reader(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.readers)}

    def place(self, edge: Edge) -> tuple[int, int]:
        """Where one of :attr:`edges` stands: (reader, writer)."""
        return self._reader[edge.dest], self._writer[edge.src]

    def named(self, given: Iterable[Edge | Node | str]) -> tuple[Edge, ...]:
        """The edges that a user named, or all between the nodes that a user named.

        Args:
            given: See :func:`tensorlens_tl.graph.wiring.as_edges`.

        Returns:
            The edges, each once, from below.

        Raises:
            ValueError: If this model does not have them.
        """
        return as_edges(self.wiring, given, self.positions)

    def keep(self, edges: Iterable[Edge]) -> Bool[Tensor, "reader writer"]:
        """A circuit as a mask: true where an edge is in it."""
        mask = torch.zeros(len(self.readers), len(self.writers), dtype=torch.bool)
        for place in map(self.place, edges):
            mask[place] = True
        return mask
