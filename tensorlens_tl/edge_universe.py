"""Every edge of a model: which writers each reader sees, the residual stream's own order.

    writers  embed, pos_embed, heads "L0H3", MLPs "L0MLP"
    readers  every query head's "L2H1.q", ".k", ".v", MLPs "L2MLP", "logits"

Constants (biases outside the nodes) are always kept and are no edges. ``embed`` and ``pos_embed`` are
two writers but one input: a circuit's size counts what they write into one reader once, so that GPT-2
small has the 32,491 edges of the literature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from .graph import Edge, Node
from .weights import ModelWeights

INPUT = "embed", "pos_embed"
"""The kinds of writer that are one input."""


@dataclass(frozen=True)
class EdgeUniverse:
    """All writers and readers of a model, from below.

    Attributes:
        writers: Nodes that add to the residual.
        readers: Nodes that read it.
        below: How many writers each reader sees: the first so many.
    """

    writers: tuple[Node, ...]
    readers: tuple[Node, ...]
    below: tuple[int, ...]

    @classmethod
    def of(cls, weights: ModelWeights, positions: bool) -> EdgeUniverse:
        """A model's universe.

        Args:
            weights: The model's.
            positions: Whether it adds position embeddings to the residual.

        Returns:
            Writers and readers.
        """
        writers = [Node(kind) for kind in (INPUT if positions else INPUT[:1])]
        readers: list[Node] = []
        below: list[int] = []
        for layer, block in enumerate(weights.blocks):
            heads = [Node("head", layer, h) for h in range(block.attn.W_O.shape[0])]
            inputs = [Node("head", layer, node.index, name) for name in "qkv" for node in heads]
            readers, below = readers + inputs, below + [len(writers)] * len(inputs)
            seen = len(writers)
            writers = writers + heads
            if block.mlp is not None:
                readers.append(Node("mlp", layer))
                below.append(seen if block.parallel else len(writers))
                writers.append(Node("mlp", layer))
        return cls(tuple(writers), (*readers, Node("logits")), (*below, len(writers)))

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, reader by reader from below."""
        return tuple(
            Edge(src, dest)
            for dest, n in zip(self.readers, self.below, strict=True)
            for src in self.writers[:n]
        )

    @cached_property
    def size(self) -> int:
        """How many edges there are, the input counted once."""
        return count(self.edges)

    @cached_property
    def _writer(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.writers)}

    @cached_property
    def _reader(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.readers)}

    def place(self, edge: Edge | str) -> tuple[int, int] | None:
        """Where an edge stands: (reader, writer); None for an edge out of a constant.

        Args:
            edge: The edge, or its name "L0H3→L2H1.v".

        Returns:
            The indices.

        Raises:
            ValueError: If a node is not in this model, or the edge goes against the order of layers.
        """
        edge = Edge.parse(edge) if isinstance(edge, str) else edge
        r, w = self._reader.get(edge.dest), self._writer.get(edge.src)
        if r is None:
            raise ValueError(
                f"{edge}: no reader {edge.dest} in this model; expected {self._told(self.readers)}: "
                "was the circuit found in another model?"
            )
        if edge.src.kind == "constant":
            return None  # always kept
        if w is None:
            raise ValueError(
                f"{edge}: no writer {edge.src} in this model; expected {self._told(self.writers)}: "
                "was the circuit found in another model?"
            )
        if w >= self.below[r]:
            raise ValueError(
                f"{edge} goes against the order of layers: {edge.dest} reads "
                f"{self._told(self.writers[: self.below[r]])}; turn the edge round or leave it out"
            )
        return r, w

    def keep(self, edges: Iterable[Edge | str]) -> Bool[Tensor, "reader writer"]:
        """A circuit as a mask: true where an edge is in it.

        Args:
            edges: The circuit.

        Returns:
            The mask.

        Raises:
            ValueError: As :meth:`place`.
        """
        mask = torch.zeros(len(self.readers), len(self.writers), dtype=torch.bool)
        for found in map(self.place, edges):
            if found is not None:
                mask[found] = True
        return mask

    @staticmethod
    def _told(nodes: tuple[Node, ...]) -> str:
        if len(nodes) <= 4:
            return ", ".join(map(str, nodes))
        return f"{nodes[0]}, {nodes[1]}, … to {nodes[-2]}, {nodes[-1]}"


def input_once(edge: Edge) -> Edge:
    """The edge that stands for it where sizes are counted: ``pos_embed``'s by ``embed``'s."""
    return Edge(Node("embed"), edge.dest) if edge.src.kind == "pos_embed" else edge


def count(edges: Iterable[Edge]) -> int:
    """A circuit's size: constants not counted, the input once.

    Returns:
        The number of edges.
    """
    return len({input_once(edge) for edge in edges if edge.src.kind != "constant"})
