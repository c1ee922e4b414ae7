"""Mixtures of experts, frozen at one run: y = Σ_e ρ_e · expert_e(x).

The routing weights ρ are frozen at the values that the router gave them, like an attention pattern.
So an expert is a gated MLP with frozen ratios, and its part of the mixture is affine in x. A token
has as many slots as it has experts: nothing is as wide as all experts together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..graph import Node
from ..maps import Chain, Factored, Gate, LinearMap, Norm, Routed, Shift, Sum, take_row
from .activations import gating_ratio
from .mlp import FeedForward
from .sublayer import _chain, _unknown
from .weights import ExpertsWeights


@dataclass(frozen=True, eq=False)
class Experts(FeedForward):
    """The experts of one block. Every expert is a node, "L3E2", and holds all its own constants.

    Attributes:
        weights: Weights of all experts.
        experts: The expert in every slot of every token; −1 in padding.
        share: The routing weights ρ of the run.
        pre: The values g = x W_gate + b_gate of the run, before the limit.
        pre_linear: The values u = x W_in + b_in of the run, before the limit.
        n_experts: Number of experts, also of those that no token reached.
        convention: "gate", "up" or "half", as for a gated MLP.
    """

    weights: ExpertsWeights
    experts: Int[Tensor, "batch pos slot"]
    share: Float[Tensor, "batch pos slot"]
    pre: Float[Tensor, "batch pos slot d_mlp"]
    pre_linear: Float[Tensor, "batch pos slot d_mlp"]
    n_experts: int
    convention: str = "gate"

    def _routed(self, name: str, out: bool = False) -> Routed:
        W, b = (getattr(self.weights, f"{kind}_{name}") for kind in "Wb")
        share = self.share if out else None
        return Routed(self.frame, self.experts, W, b, f"L{self.layer}.b_{name}", out, share)

    @property
    def output(self) -> Routed:
        """The map from the slots' post-activations to what the mixture adds to the residual."""
        return self._routed("out", out=True)

    @property
    def _gated(self) -> tuple[Tensor, Tensor]:
        """act(g) / g and the factor u + up_offset, both with the limit."""
        w, g, u = self.weights, self.pre, self.pre_linear
        if w.limit is None:
            return gating_ratio(w.act, g), u + w.up_offset
        limited = g.clamp(max=w.limit)
        # act(min(g, l)) / g = act(l) / l · l / g where the limit bites; l is positive.
        ratio = gating_ratio(w.act, limited) * torch.where(g > w.limit, w.limit / g, 1.0)
        return ratio, u.clamp(-w.limit, w.limit) + w.up_offset

    @cached_property
    def map(self) -> Chain:
        w, ratio_up = self.weights, self._gated
        ratio, up = ratio_up[0] * self.share[..., None], ratio_up[1]
        part = 0.5 if self.convention == "half" else 1.0
        branches: list[LinearMap] = []
        if self.convention != "up":  # act(g) frozen: linear in u
            act, u = ratio * self.pre * part, self.pre_linear
            into = self._routed("in")
            slope = act
            if w.limit is not None:
                slope = act * torch.where(u.abs() > w.limit, w.limit / u.abs(), 1.0)
            half: tuple[LinearMap | None, ...] = (into, Gate(self.frame, slope.flatten(2)))
            if w.up_offset:
                constant = (act * w.up_offset).flatten(2)
                half = (*half, Shift(self.frame, constant, f"L{self.layer}.up_offset"))
            branches.append(_chain(half))
        if self.convention != "gate":  # the factor frozen: linear in g
            slope = (ratio * up * part).flatten(2)
            branches.append(_chain((self._routed("gate"), Gate(self.frame, slope))))
        product = Sum(tuple(branches)) if len(branches) > 1 else branches[0]
        return _chain((product, self.output))

    def tangent(self):
        raise ValueError(
            f"Block {self.layer} routes tokens to experts, and weights that move would route them "
            "anew. Drop gates=."
        )

    @property
    def unweighted(self) -> Float[Tensor, "batch pos slot d_mlp"]:
        """The post-activations of every slot, before its routing weight."""
        ratio, up = self._gated
        return ratio * self.pre * up

    @property
    def posts(self):
        return self.weighted(self.unweighted)

    def weighted(
        self, post: Float[Tensor, "batch pos slot d_mlp"]
    ) -> Float[Tensor, "batch pos slot_d_mlp"]:
        """What the output matrices read, times the routing weights; slots side by side."""
        # Where ρ multiplies the input, it is in g and u already.
        return (post if self.weights.scales_input else post * self.share[..., None]).flatten(2)

    @property
    def edits(self) -> dict[str, Shift]:
        return {}

    @property
    def external(self):
        return f"L{self.layer}.b_out", None  # an expert's b_out comes with its weight ρ

    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node("expert", self.layer, e) for e in range(self.n_experts))

    def part(self, node: Node) -> Experts:
        if node not in self.nodes():
            raise _unknown(node, self.nodes())
        return replace(self, experts=torch.where(self.experts == node.index, self.experts, -1))

    def row(self, query) -> Experts:
        def row(t: Tensor) -> Tensor:
            return take_row(t.flatten(2), query).view(len(query), 1, *t.shape[2:])

        rows = {n: row(getattr(self, n)) for n in ("experts", "share", "pre", "pre_linear")}
        return replace(self, frame=self.frame.row, **rows)

    def moved(self, change) -> Experts:
        def moved(name: str, was: Tensor) -> Tensor:
            by = self._routed(name).apply(change).view(was.shape)
            return was + (by * self.share[..., None] if self.weights.scales_input else by)

        return replace(self, pre=moved("gate", self.pre), pre_linear=moved("in", self.pre_linear))

    def factored(self, hidden):
        # One row per expert, as writers and readers have. Only reached experts are computed.
        made = hidden.new_zeros(len(self.nodes()), hidden.shape[0] * hidden.shape[1], self.out_dim)
        for expert, tokens, added in self.output.each(hidden):
            made[expert, tokens] = added
        return Factored(made.unflatten(1, hidden.shape[:2]))

    def factored_at(self, x, query):
        row = self.row(query)
        return row.factored(row.hidden(take_row(x, query)))

    def outputs_at(self, x, query):
        return self.factored_at(x, query).wide()[:, :, 0].transpose(0, 1)

    def node_shares(self, hidden, y):
        shares = hidden * self.output.apply_t(y)
        by_slot = shares.unflatten(-1, (self.output.slots, -1)).sum(-1)
        if (b := self.weights.b_out) is not None:
            by_slot = by_slot + (self.output.of_slots(b) * y[..., None, :]).sum(-1) * self.share
        found = by_slot.new_zeros(*by_slot.shape[:-1], len(self.nodes()))
        # A slot without an expert holds 0, so it may count for any expert.
        return found.scatter_add(-1, self.experts.clamp_min(0), by_slot)

    def pull(self, y, effects):
        return self.apply_t(y, effects), y  # readers are told apart by what the slots make of y

    def readers(
        self, kept: Float[Tensor, "batch pos d_model"], norm: Norm | None
    ) -> tuple[Factored, dict[str, Float[Tensor, "expert batch"]]]:
        """Compute the covector of every expert at the residual. They sum to the adjoint.

        Args:
            kept: Covectors at the output, the second result of :meth:`pull`.
            norm: Norm through which the sublayer reads the residual, or None.

        Returns:
            The covectors, and what each expert's own constants add to the target, by name
            [expert, batch].
        """
        made = self.frame.zeros(self.in_dim, len(self.nodes()))
        own: dict[str, Tensor] = {}
        for expert, _ in self.output.groups:
            effects: dict[str, Tensor] = {}
            covector = self.part(self.nodes()[expert]).apply_t(kept, effects)
            made[expert] = covector if norm is None else norm.apply_t(covector, effects)
            for name, effect in effects.items():
                own.setdefault(name, effect.new_zeros(len(made), len(effect)))
                own[name][expert] = effect.sum(-1)
        return Factored(made), own
