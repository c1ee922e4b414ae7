"""A model's edges as masks: which writers each reader is given live."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..graph import Edge, Node, Wiring, as_edges
from ..hosts import Adapter
from ..sublayers import BlockWeights, ExpertsWeights, ModelWeights


def wiring_of(weights: ModelWeights) -> Wiring:
    """Tell which edges a model has.

    Args:
        weights: All weights of the model.

    Returns:
        The shape of the model's graph.
    """
    blocks = weights.blocks
    mixture = any(isinstance(block.mlp, ExpertsWeights) for block in blocks)
    return Wiring(
        len(blocks),
        blocks[0].attn.W_O.shape[0],
        parallel=any(b.parallel and b.mlp is not None for b in blocks),
        attn_only=all(b.mlp is None for b in blocks),
        experts=tuple(_mlps(layer, b) for layer, b in enumerate(blocks)) if mixture else (),
    )


def _mlps(layer: int, block: BlockWeights) -> tuple[Node, ...]:
    """The nodes of a block's MLP: its experts and its shared expert, or one node, or none."""
    if not isinstance(block.mlp, ExpertsWeights):
        return () if block.mlp is None else (Node("mlp", layer),)
    found = tuple(Node("expert", layer, e) for e in range(len(block.mlp.W_out)))
    return found if block.shared is None else (*found, Node("expert", layer, name="shared"))


def norms_between(adapter: Adapter) -> dict[tuple[str, int], nn.Module]:
    """Find the host's norms of the residual itself, which stand between writers and readers.

    Args:
        adapter: Adapter of the model.

    Returns:
        The norms, by kind and layer of the nodes whose sum they normalize: ("head", 0), ("mlp", 0).
        Empty unless the model is post-norm, as BERT is.
    """
    found = {}
    for layer, block in enumerate(adapter.model.blocks):
        for kind, name in (("head", "mid_norm"), ("mlp", "post_norm")):
            if (norm := adapter.norm(block, name)) is not None:
                found[kind, layer] = norm
    return found


@dataclass(frozen=True)
class EdgeUniverse:
    """All writers and readers of a model, from below; see :class:`Wiring`.

    Attributes:
        wiring: The edges that the model has.
        sources: Names of the sources that sum to the input.
    """

    wiring: Wiring
    sources: tuple[str, ...]

    @cached_property
    def writers(self) -> tuple[Node, ...]:
        """Nodes that add to the residual stream."""
        return self.wiring.writers()

    @cached_property
    def readers(self) -> tuple[Node, ...]:
        """Inputs of nodes that read the residual stream."""
        return self.wiring.readers()

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, reader by reader from below."""
        return self.wiring.edges()

    @cached_property
    def below(self) -> tuple[int, ...]:
        """Number of writers that each reader sees: the first ``below[reader]`` writers."""
        return self.wiring.below()

    @cached_property
    def _writer(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.writers)}

    @cached_property
    def _reader(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.readers)}

    def place(self, edge: Edge) -> tuple[int, int]:
        """Indices (reader, writer) of one of :attr:`edges` in a mask."""
        return self._reader[edge.dest], self._writer[edge.src]

    def named(self, given: Iterable[Edge | Node | str]) -> tuple[Edge, ...]:
        """The edges that a user named, or all edges between the nodes that a user named.

        Args:
            given: Edges, nodes, or names of one kind; see
                :func:`tensorlens_tl.graph.wiring.as_edges`.

        Returns:
            The edges, each once, from below.

        Raises:
            ValueError: If this model does not have such an edge or node.
        """
        return as_edges(self.wiring, given, self.sources)

    def keep(self, edges: Iterable[Edge]) -> Bool[Tensor, "reader writer"]:
        """A circuit as a mask [reader, writer]: true where an edge is in the circuit."""
        mask = torch.zeros(len(self.readers), len(self.writers), dtype=torch.bool)
        places = self.places[torch.tensor(self.wiring.numbers(edges), dtype=torch.long)]
        # Most edges of a mask are off: only those of the circuit are touched.
        mask[places[:, 0], places[:, 1]] = True
        return mask

    @cached_property
    def places(self) -> Int[Tensor, "edge 2"]:
        """Indices (reader, writer) of all :attr:`edges` in a mask."""
        below = torch.tensor(self.below)
        reader = torch.arange(len(below)).repeat_interleave(below)
        # Edges stand reader by reader: an edge's writer is its number less that of its reader's
        # first.
        first = (below.cumsum(0) - below).repeat_interleave(below)
        return torch.stack([reader, torch.arange(len(reader)) - first], 1)

    def scores(self, matrix: Float[Tensor, "reader writer"]) -> dict[Edge, float]:
        """Numbers of a matrix by edge."""
        found = matrix.cpu()[self.places[:, 0], self.places[:, 1]]
        return dict(zip(self.edges, found.tolist(), strict=True))
