"""The contract of a frozen sublayer: an affine map whose width-preserving parts are nodes."""

from __future__ import annotations

from abc import abstractmethod
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..graph import Node
from .factored import Factored
from .linear_map import Chain, LinearMap
from .primitives import Linear, Shift


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
    """A frozen sublayer: a chain of primitive maps whose width-preserving parts are nodes.

    Subclasses give ``map``, :meth:`nodes` and :meth:`part`.
    """

    @abstractmethod
    def nodes(self) -> tuple[Node, ...]:
        """The parts it is the sum of."""

    @abstractmethod
    def part(self, node: Node) -> LinearMap:
        """One node's map, its internal constants included.

        The parts sum to the whole, up to the external constant (b_O, b_out), which is nobody's.

        Returns:
            The part.

        Raises:
            ValueError: If the node is not in this sublayer.
        """

    @property
    @abstractmethod
    def output(self) -> Linear:
        """The last map, W_O or W_out: each node owns as many of its rows, in order."""

    @abstractmethod
    def hidden(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_hidden"]:
        """What the output matrix reads: z or post-activations, internal constants included.

        The user's edits are left out: no node holds them.

        Args:
            x: The sublayer's input (after its norm).
        """

    def hidden_in_run(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_hidden"]:
        """The same where x is the run's own: from what the run left, where that is cheaper."""
        return self.hidden(x)

    @abstractmethod
    def hidden_at(
        self, x: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch d_hidden"]:
        """The same at one destination per prompt, for less.

        Args:
            x: The sublayer's input (after its norm).
            query: Destinations, as tensor indices.
        """

    def by_node(self, hidden: Float[Tensor, "*many d_hidden"]) -> Float[Tensor, "*many node d"]:
        """The hidden axis split into the slices that nodes own."""
        return hidden.unflatten(-1, (len(self.nodes()), -1))

    def factored(self, hidden: Float[Tensor, "batch pos d_hidden"]) -> Factored:
        """What every node makes of what the output matrix reads.

        Args:
            hidden: z or post-activations.

        Returns:
            One row per node: kept narrow where the matrix widens.
        """
        nodes = len(self.nodes())
        if hidden.shape[-1] // nodes >= self.out_dim:
            W = self.frame.cast(self.output.W).unflatten(0, (nodes, -1))
            return Factored(self.by_node(hidden).permute(2, 0, 1, 3) @ W[:, None])
        return Factored(
            self.by_node(hidden).permute(2, 0, 1, 3),
            lambda: self.frame.cast(self.output.W).unflatten(0, (nodes, -1)),
        )

    def outputs_at(
        self, x: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch node d_model"]:
        """What every node adds at one destination per prompt, its internal constants included.

        Args:
            x: The sublayer's input (after its norm).
            query: Destinations, as tensor indices.

        Returns:
            One row per node.
        """
        W = self.frame.cast(self.output.W).unflatten(0, (len(self.nodes()), -1))
        return torch.einsum("bne,ned->bnd", self.by_node(self.hidden_at(x, query)), W)

    @property
    @abstractmethod
    def external(self) -> tuple[str, Float[Tensor, " d_model"] | None]:
        """The constant that no node holds, b_O or b_out, and its name."""

    @property
    @abstractmethod
    def edits(self) -> dict[str, Shift]:
        """The user's edits inside the sublayer, by the stage they follow; no node holds them."""

    def pull(
        self, y: Float[Tensor, "*many batch pos d_model"], effects: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "*many batch pos d_model"], Tensor]:
        """The adjoint, and what is left on its way to tell the readers apart.

        Args:
            y: Covectors at the output.
            effects: See :meth:`LinearMap.apply_t`.

        Returns:
            The covector at the input, and what is left.
        """
        covector = self.apply_t(y, effects)
        return covector, covector

    @abstractmethod
    def pull_at(
        self,
        y: Float[Tensor, "*many batch 1 d_model"],
        query: Int[Tensor, " batch"],
        effects: dict[str, Tensor],
    ) -> tuple[Float[Tensor, "*many batch pos d_model"], Tensor]:
        """The same where the covectors are zero but at one position per prompt, for less.

        Args:
            y: Covectors at the output there.
            query: The positions, as tensor indices.
            effects: See :meth:`LinearMap.apply_t`; of all positions.

        Returns:
            What :meth:`pull` returns.
        """

    def reads(self) -> tuple[Node, ...]:
        """What reads the residual here: an MLP as a whole, a head by its values."""
        return self.nodes()

    def read_at(
        self,
        x: Float[Tensor, "batch pos d_model"],
        query: Int[Tensor, " batch"],
        y: Float[Tensor, "batch d_model"],
    ) -> Float[Tensor, "batch node pos"]:
        """⟨y, what every node adds at one destination⟩, split over the positions it read.

        Args:
            x: The sublayer's input (after its norm).
            query: Destinations, as tensor indices.
            y: A covector at the sublayer's output there.

        Returns:
            One row per node.
        """
        shares = x.new_zeros(x.shape[0], len(self.nodes()), x.shape[1])
        prompts = torch.arange(len(query), device=query.device)
        shares[prompts, :, query] = torch.einsum("bnd,bd->bn", self.outputs_at(x, query), y)
        return shares

    def outside(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """What is added that no node holds: b_O or b_out, and edits.

        Returns:
            The constants, carried to the sublayer's output, by name.
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
    return ValueError(f"no part {node} here; there are {nodes[0]} to {nodes[-1]}")
