"""How much of some targets reaches every node of a feature graph, and which nodes hold most of it.

Every reader shares out what it has among its writers by |weight|. A is |weights| with rows that sum
to 1, and w the targets' shares. Then

    I = w (A + A² + …)
    replacement  = I(tokens) / (I(tokens) + I(errors))
    completeness = Σ_nodes (I + w) · (1 − share of errors in what the node reads) / Σ_nodes (I + w)

Constants, and features that are left out, are in none of these sums.

Source: Ameisen et al., Circuit Tracing (2025); the definitions are those of circuit-tracer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..maps import TINY


@dataclass(frozen=True, eq=False)
class Influence:
    """The weights of a graph, and what flows along them.

    Attributes:
        weights: What every reader makes of every writer [reader, node]: features and targets of
            tokens, features and errors, and then of anything else.
        sizes: The numbers of tokens, features and errors.
        shares: How much each target counts [target].
    """

    weights: Float[Tensor, "reader node"]
    sizes: tuple[int, int, int]
    shares: Float[Tensor, " target"]

    @property
    def features(self) -> slice:
        """Where the features stand among the nodes."""
        return slice(self.sizes[0], self.sizes[0] + self.sizes[1])

    @cached_property
    def normed(self) -> Float[Tensor, "reader node"]:
        """A: |weights| of tokens, features and errors, each row divided by its sum."""
        # Constants and the rest have no part in influence: they are no nodes to keep or to cut.
        found = self.weights[:, : sum(self.sizes)].abs()
        return found.div_(found.sum(1, keepdim=True).clamp_min(TINY))

    @cached_property
    def of_nodes(self) -> Float[Tensor, " node"]:
        """I of every token, feature and error."""
        return self._flow(self.normed, torch.ones_like(self.shares[:1]))

    def effects(self, values: Float[Tensor, " reader"]) -> Float[Tensor, " node"]:
        """What every node adds to the targets, by itself and through features.

        Args:
            values: What the readers are: pre-activations and targets.

        Returns:
            One number per node, the targets weighted by their shares. A feature passes on what it
            reads in proportion, so sources and constants sum to the targets.
        """
        # A feature hands on its own effect, split by weight / pre-activation, which sums to 1.
        return self._flow(self.weights, 1 / values[: self.sizes[1]])

    def _flow(self, weights: Tensor, gain: Tensor) -> Float[Tensor, " node"]:
        n = self.sizes[1]
        more = self.shares @ weights[n:]
        found = more.clone()
        while more.any():  # ends, as features read those of earlier layers alone
            # The Neumann series of (I − A)⁻¹, term by term: paths of one more edge in each round.
            more = (more[self.features] * gain) @ weights[:n]
            found += more
        return found

    def scores(self) -> tuple[float, float]:
        """The replacement score and the completeness score; nan where nothing flows."""
        of, (tokens, n, _) = self.of_nodes, self.sizes
        of_errors = of[tokens + n :].sum()
        replacement = of[:tokens].sum() / (of[:tokens].sum() + of_errors)
        has = torch.cat([of[self.features], self.shares])  # what every reader has to share out
        whole = of.sum() + self.shares.sum()
        read_of_errors = (has * self.normed[:, tokens + n :].sum(1)).sum()
        return float(replacement), float(1 - read_of_errors / whole)

    def most(
        self, node_threshold: float, edge_threshold: float
    ) -> tuple[Bool[Tensor, " node"], Bool[Tensor, "reader node"]]:
        """The nodes and edges that hold most of the influence.

        Args:
            node_threshold: The share of all nodes' influence that is kept.
            edge_threshold: The share of the influence along edges between these that is kept.

        Returns:
            Whether each token, feature and error is kept, and each edge from one of them. Tokens
            always are. A feature that nothing reads or that reads nothing is not.
        """
        (tokens, n, _), own = self.sizes, self.features
        nodes = self.of_nodes >= _least(self.of_nodes, node_threshold)
        nodes[:tokens] = True
        rows = torch.cat([nodes[own], torch.ones_like(self.shares, dtype=torch.bool)])
        cut = self.weights[:, : sum(self.sizes)] * nodes * rows[:, None]
        few = Influence(cut, self.sizes, self.shares)
        has = torch.cat([few.of_nodes[own], self.shares])
        along = few.normed * has[:, None]
        edges = (along >= _least(along, edge_threshold)) & (along > 0)
        was = None
        # To a fixed point: a node that goes takes edges along, which may leave others without any.
        while was is None or not torch.equal(was, nodes):
            was = nodes.clone()
            nodes[tokens:] &= edges[:, tokens:].any(0)
            nodes[own] &= edges[:n].any(1)
            edges &= nodes
            edges[:n] &= nodes[own, None]
        return nodes, edges


def _least(scores: Tensor, share: float) -> Tensor:
    """The score from which on the largest scores hold a share of their sum."""
    # In float64: millions of small scores are summed, and the last ones decide.
    ordered = scores.flatten().double().sort(descending=True).values
    if not len(ordered):
        return scores.new_zeros(())
    held = ordered.cumsum(0) / ordered.sum().clamp_min(TINY)
    at = int(torch.searchsorted(held, share))
    return ordered[min(at, len(ordered) - 1)].to(scores)
