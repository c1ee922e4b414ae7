"""What every frozen sublayer offers: an affine map that is the sum of its nodes."""

from __future__ import annotations

from abc import abstractmethod
from functools import reduce
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import spelled
from ..graph import Node
from ..maps import Chain, Factored, Linear, LinearMap, Routed, Shift


@spelled
class Mapped(LinearMap):
    """A map that is given as an expression of other maps."""

    @property
    @abstractmethod
    def map(self) -> LinearMap:
        """The expression."""

    @property
    def in_dim(self) -> int:
        return self.map.in_dim

    @property
    def out_dim(self) -> int:
        return self.map.out_dim

    def apply(self, x):
        return self.map.apply(x)

    def apply_t(self, y, effects=None):
        return self.map.apply_t(y, effects)

    @property
    def bias(self):
        return self.map.bias

    def constants(self):
        return self.map.constants()


class Sublayer(Mapped):
    """A frozen sublayer: a chain of primitive maps that is the sum of its nodes' maps.

    The nodes are the heads of attention, or the MLP as a whole. Subclasses give ``map``,
    :meth:`nodes` and :meth:`part`.
    """

    @abstractmethod
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that the sublayer consists of."""

    @abstractmethod
    def part(self, node: Node) -> LinearMap:
        """The map of one node, with its internal constants.

        The parts sum to the sublayer, up to the external constant (b_O, b_out) and the user's
        edits, which belong to no node.

        Args:
            node: One of :meth:`nodes`.

        Returns:
            The map from the sublayer's input to what the node writes.

        Raises:
            ValueError: If the node is not in this sublayer.
        """

    @property
    @abstractmethod
    def output(self) -> Linear | Routed:
        """The last map, W_O or W_out. Its rows are split evenly among the nodes, in order.

        Not so in a mixture: which node a row belongs to differs from token to token there.
        """

    @abstractmethod
    def hidden(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_hidden"]:
        """Compute what the output matrix reads: z or post-activations, with internal constants.

        The user's edits are left out, because they belong to no node.

        Args:
            x: Input of the sublayer, after its norm [batch, pos, d_model].
        """

    def hidden_in_run(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_hidden"]:
        """The same as :meth:`hidden` at the input of the run, from stored values if possible."""
        return self.hidden(x)

    @abstractmethod
    def hidden_at(
        self, x: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch d_hidden"]:
        """The same as :meth:`hidden` at one position per prompt, at lower cost.

        Args:
            x: Input of the sublayer, after its norm [batch, pos, d_model].
            query: Index of the position, per prompt [batch].
        """

    def by_node(self, hidden: Float[Tensor, "*many d_hidden"]) -> Float[Tensor, "*many node d"]:
        """Split the hidden axis into one slice per node."""
        return hidden.unflatten(-1, (len(self.nodes()), -1))

    def node_shares(
        self,
        hidden: Float[Tensor, "batch pos d_hidden"],
        y: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos node"]:
        """Compute ⟨y, what every node writes⟩ at every position, without forming what they write.

        Args:
            hidden: z or post-activations [batch, pos, d_hidden].
            y: Covectors at the output [batch, pos, d_model].

        Returns:
            One number per node, prompt and position.
        """
        # y · W_O (or W_out) is the covector of the hidden values.
        return self.by_node(hidden * self.output.apply_t(y)).sum(-1)

    @property
    def _W_out(self) -> Tensor:
        return cast(Tensor, self.output.W)  # a mixture, whose experts hold several, has its own way

    def factored(self, hidden: Float[Tensor, "batch pos d_hidden"]) -> Factored:
        """Compute what every node writes, from what the output matrix reads.

        Args:
            hidden: z or post-activations [batch, pos, d_hidden].

        Returns:
            One row per node. Rows stay narrow where the matrix makes them wider.
        """
        nodes = len(self.nodes())
        # An MLP is wider inside than outside: nothing is gained by keeping it narrow.
        if hidden.shape[-1] // nodes >= self.out_dim:
            W = self.frame.cast(self._W_out).unflatten(0, (nodes, -1))
            return Factored(self.by_node(hidden).permute(2, 0, 1, 3) @ W[:, None])
        return Factored(
            self.by_node(hidden).permute(2, 0, 1, 3),
            lambda: self.frame.cast(self._W_out).unflatten(0, (nodes, -1)),
        )

    def factored_at(
        self, x: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Factored:
        """The same as :meth:`factored` at one position per prompt, from the sublayer's input."""
        return self.factored(self.hidden_at(x, query)[:, None])

    def outputs_at(
        self, x: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch node d_model"]:
        """Compute what every node adds at one position per prompt, with its internal constants.

        Args:
            x: Input of the sublayer, after its norm [batch, pos, d_model].
            query: Index of the position, per prompt [batch].

        Returns:
            One row per node [batch, node, d_model].
        """
        W = self.frame.cast(self._W_out).unflatten(0, (len(self.nodes()), -1))
        return torch.einsum("bne,ned->bnd", self.by_node(self.hidden_at(x, query)), W)

    @property
    @abstractmethod
    def external(self) -> tuple[str, Float[Tensor, " d_model"] | None]:
        """Name and value of the constant that belongs to no node, b_O or b_out."""

    @property
    @abstractmethod
    def edits(self) -> dict[str, Shift]:
        """The user's edits inside the sublayer, by stage, such as "v". No node owns them."""

    def pull(
        self, y: Float[Tensor, "*many batch pos d_model"], effects: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "*many batch pos d_model"], Tensor]:
        """Apply the adjoint, and keep what tells the readers apart.

        Args:
            y: Covectors at the output.
            effects: Dictionary that receives the part of each constant, as in
                :meth:`LinearMap.apply_t`.

        Returns:
            The covectors at the input, and the covectors of the single readers: per head for
            attention, the same covectors for an MLP.
        """
        # Where nodes share one covector, as in an MLP, no second one is kept.
        covector = self.apply_t(y, effects)
        return covector, covector

    @abstractmethod
    def pull_at(
        self,
        y: Float[Tensor, "*many batch 1 d_model"],
        query: Int[Tensor, " batch"],
        effects: dict[str, Tensor],
    ) -> tuple[Float[Tensor, "*many batch pos d_model"], Tensor]:
        """The same as :meth:`pull` for covectors at one position per prompt, at lower cost.

        Args:
            y: Covectors at the output at this position.
            query: Index of the position, per prompt [batch].
            effects: Dictionary that receives the part of each constant, at all positions.

        Returns:
            Two tensors over all positions, as from :meth:`pull`.
        """

    def reads(self) -> tuple[Node, ...]:
        """The readers of the residual here: an MLP as a whole, a head by its values."""
        return self.nodes()

    def read_at(
        self,
        x: Float[Tensor, "batch pos d_model"],
        query: Int[Tensor, " batch"],
        y: Float[Tensor, "batch d_model"],
    ) -> Float[Tensor, "batch node pos"]:
        """Split ⟨y, output of every node at one position⟩ over the positions that the node read.

        Args:
            x: Input of the sublayer, after its norm [batch, pos, d_model].
            query: Index of the output position, per prompt [batch].
            y: Covector at the output of the sublayer at this position [batch, d_model].

        Returns:
            One row per node [batch, node, pos].
        """
        shares = x.new_zeros(x.shape[0], len(self.nodes()), x.shape[1])
        prompts = torch.arange(len(query), device=query.device)
        # An MLP acts on each position alone, so all it reads for a position stands at that
        # position.
        shares[prompts, :, query] = torch.einsum("bnd,bd->bn", self.outputs_at(x, query), y)
        return shares

    def outside(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """The constants that belong to no node: b_O or b_out, and the user's edits.

        Returns:
            The constants by name, each carried to the output of the sublayer.
        """
        name, b = self.external
        found = {} if b is None else {name: self.frame.spread(b)}
        if self.edits:
            carried = self.map.constants()
            found |= {edit.name: carried[edit.name] for edit in self.edits.values()}
        return found


def _chain(maps: tuple[LinearMap | None, ...]) -> Chain:
    return Chain(tuple(m for m in maps if m is not None))


def _edits(**stages: Shift | None) -> dict[str, Shift]:
    return {stage: edit for stage, edit in stages.items() if edit is not None}


def _push(x: Tensor, m: LinearMap) -> Tensor:
    return reduce(torch.add, m.constants().values(), m.apply(x))  # absent constants cost nothing


def _unknown(node: Node, nodes: tuple[Node, ...]) -> ValueError:
    return ValueError(f"This sublayer has no node {node}. Its nodes are {nodes[0]} to {nodes[-1]}.")
