"""The mathematics of a frozen transformer, sublayer by sublayer, one screen each.

A sublayer is what is left of a nonlinear one when the pattern, the scale or the gating ratio keeps
the value it took in one run: a short chain of primitive maps. Attention is Linear, Mix, Linear; an
MLP is Linear, Gate, Linear. Weights are referenced, never copied.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..graph.nodes import Node
from .batch_layout import Frame
from .factored import Factored
from .linear_map import Chain, LinearMap, Sum
from .primitives import (
    Gate,
    Linear,
    Norm,
    Shift,
    gating_ratio,
    put_effects,
    put_row,
    soft_cap_ratio,
    take_row,
)
from .recomputed_pattern import AnyMix
from .sublayer import Sublayer
from .weights import AttentionWeights, GatedMLPWeights, MLPWeights, UnembedWeights


def _chain(maps: tuple[LinearMap | None, ...]) -> Chain:
    return Chain(tuple(m for m in maps if m is not None))


def _edits(**stages: Shift | None) -> dict[str, Shift]:
    return {stage: edit for stage, edit in stages.items() if edit is not None}


def _push(x: Tensor, m: LinearMap) -> Tensor:
    return reduce(torch.add, m.constants().values(), m.apply(x))  # absent constants cost nothing


def _unknown(node: Node, nodes: tuple[Node, ...]) -> ValueError:
    return ValueError(f"no part {node} here; there are {nodes[0]} to {nodes[-1]}")


@dataclass(frozen=True, eq=False)
class Attention(Sublayer):
    """Attention with its pattern frozen: y_q = Σ_h Σ_k A_h[q, k] (x_k W_V^{kv(h)} + b_V) W_O^h + b_O.

    ``mix`` is A, the map v → z: stored, or recomputed from queries and keys wherever it is used.
    Rows of A need not sum to 1 (sinks, masked rows): b_V stays inside the sum.
    """

    frame: Frame
    layer: int
    mix: AnyMix
    weights: AttentionWeights
    v_edit: Shift | None = None
    z_edit: Shift | None = None

    @cached_property
    def values(self) -> Linear:
        """The map x → v, key/value heads side by side."""
        w = self.weights
        b_V = None if w.b_V is None else w.b_V.flatten()
        return Linear(self.frame, rearrange(w.W_V, "h d e -> d (h e)"), b_V, f"L{self.layer}.b_V")

    @property
    def pattern(self) -> Float[Tensor, "batch head query_pos key_pos"]:
        """A: as it was stored, or else the whole of it, recomputed at every look."""
        return self.mix.pattern

    @property
    def output(self) -> Linear:
        """The map z → what attention adds."""
        W_O = self.weights.W_O.flatten(0, 1)
        return Linear(self.frame, W_O, self.weights.b_O, f"L{self.layer}.b_O")

    @cached_property
    def map(self) -> Chain:
        return _chain((self.values, self.v_edit, self.mix, self.z_edit, self.output))

    @property
    def kv_of(self) -> list[int]:
        """The key/value head that each query head reads."""
        heads, kv_heads = self.weights.W_O.shape[0], self.weights.W_V.shape[0]
        return [h * kv_heads // heads for h in range(heads)]

    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node("head", self.layer, h) for h in range(self.weights.W_O.shape[0]))

    def part(self, node: Node) -> Attention:
        if node not in self.nodes():
            raise _unknown(node, self.nodes())
        h, w = self.nodes().index(node), self.weights
        kv = self.kv_of[h]
        return replace(
            self,
            mix=self.mix.head(h),
            v_edit=None,
            z_edit=None,
            weights=AttentionWeights(
                w.W_V[kv : kv + 1],
                None if w.b_V is None else w.b_V[kv : kv + 1],
                w.W_O[h : h + 1],
                None,
            ),
        )

    def hidden(self, x):
        return self.mix.apply(self.values.apply(x) + self.values.bias)

    def hidden_at(self, x, query):
        # Mixing comes first, A_h[q] x, then W_V on that one row: L·D + D² instead of L·D².
        w, frame = self.weights, self.frame
        row = self.mix.rows(query)
        mixed = row @ x  # [batch, head, d_model]
        kv_heads = w.W_V.shape[0]
        z = torch.einsum(
            "bgrd,gde->bgre", mixed.unflatten(1, (kv_heads, -1)), frame.cast(w.W_V)
        ).flatten(1, 2)
        if w.b_V is not None:
            z = z + row.sum(-1, keepdim=True) * frame.cast(w.b_V)[self.kv_of]
        return z.flatten(1)

    def reads(self):
        return tuple(replace(node, name="v") for node in self.nodes())

    def pull(self, y, effects):
        z = self.output.apply_t(y, effects)
        z = z if self.z_edit is None else self.z_edit.apply_t(z, effects)
        return self._pull_values(self.mix.by_head_t(z), effects)

    def pull_at(self, y, query, effects):
        own: dict[str, Tensor] = {}
        z = self.by_node(self.output.apply_t(y, own)[..., 0, :])
        effects |= put_effects(own, query, self.frame.n_pos)
        by_head = torch.einsum("...bhe,bhk->...bkhe", z, self.mix.rows(query))
        return self._pull_values(by_head, effects)

    def _pull_values(
        self, by_head: Float[Tensor, "*many batch pos head d_head"], effects: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        v = by_head.unflatten(-2, (self.weights.W_V.shape[0], -1)).sum(-2).flatten(-2)
        v = v if self.v_edit is None else self.v_edit.apply_t(v, effects)
        return self.values.apply_t(v, effects), by_head

    def readers(
        self, kept: Float[Tensor, "batch pos head d_head"], norm: Norm | None
    ) -> tuple[Factored, dict[str, Float[Tensor, "head batch"]]]:
        """The covector of every head's values at the residual; they sum to the adjoint.

        Args:
            kept: What :meth:`pull` left.
            norm: What the sublayer reads the residual through.

        Returns:
            The covectors, and the shares of the constants that are a head's own, by name.
        """
        w, cast = self.weights, self.frame.cast
        by_head, own = kept.permute(2, 0, 1, 3), {}  # [head, batch, pos, d_head]
        if norm is not None and norm.weights.b is not None:
            own[f"{norm.name}.b"] = cast(norm.weights.b) @ cast(w.W_V)
        if w.b_V is not None:
            own[self.values.name] = cast(w.b_V)
        total = by_head.sum(2)  # [head, batch, d_head]
        shares = {name: (total * b[self.kv_of, None]).sum(-1) for name, b in own.items()}
        covectors = Factored(by_head, lambda: cast(w.W_V).mT)
        return covectors if norm is None else covectors.then(norm.scale, norm.unscaled_t_), shares

    def read_at(self, x, query, y):
        # y is carried to one vector per head at the input: D² once, then L·D for all positions.
        w, frame = self.weights, self.frame
        row = self.mix.rows(query)
        z = torch.einsum("bd,hed->bhe", y, frame.cast(w.W_O))
        grouped = z.unflatten(1, (w.W_V.shape[0], -1))
        v = torch.einsum("bgre,gde->bgrd", grouped, frame.cast(w.W_V)).flatten(1, 2)
        shares = v @ x.mT
        if w.b_V is not None:
            shares = shares + (z * frame.cast(w.b_V)[self.kv_of]).sum(-1, keepdim=True)
        return row * shares

    @property
    def external(self):
        return f"L{self.layer}.b_O", self.weights.b_O

    @property
    def edits(self) -> dict[str, Shift]:
        return _edits(v=self.v_edit, z=self.z_edit)


@dataclass(frozen=True, eq=False)
class FeedForward(Sublayer):
    """What MLPs of either kind share: one node, b_out outside it, nothing between positions."""

    frame: Frame
    layer: int
    weights: MLPWeights | GatedMLPWeights

    @property
    def output(self) -> Linear:
        """The map from post-activations to what the MLP adds."""
        return Linear(self.frame, self.weights.W_out, self.weights.b_out, f"L{self.layer}.b_out")

    @property
    @abstractmethod
    def map(self) -> Chain: ...

    @abstractmethod
    def row(self, query: Int[Tensor, " batch"]) -> FeedForward:
        """The sublayer at one position per prompt."""

    def nodes(self) -> tuple[Node, ...]:
        return (Node("mlp", self.layer),)

    def part(self, node: Node) -> FeedForward:
        if node not in self.nodes():
            raise _unknown(node, self.nodes())
        none = dict.fromkeys(f"{stage}_edit" for stage in self.edits)
        return replace(self, weights=replace(self.weights, b_out=None), **none)

    def hidden(self, x):
        maps = (self.part(self.nodes()[0]) if self.edits else self).map.maps[:-1]
        return reduce(_push, maps, x)

    def hidden_in_run(self, x):
        return self.hidden(x) if self.edits else self.posts

    @property
    @abstractmethod
    def posts(self) -> Float[Tensor, "batch pos d_mlp"]:
        """What W_out read in the run, where nobody edited it."""

    def hidden_at(self, x, query):
        return self.row(query).hidden(take_row(x, query))[:, 0]

    def pull_at(self, y, query, effects):
        own: dict[str, Tensor] = {}
        found = self.row(query).pull(y, own)
        effects |= put_effects(own, query, self.frame.n_pos)
        covector, kept = (put_row(row, query, self.frame.n_pos) for row in found)
        return covector, kept

    @property
    def external(self):
        return f"L{self.layer}.b_out", self.weights.b_out


@dataclass(frozen=True, eq=False)
class MLP(FeedForward):
    """An MLP with its gating ratios frozen, r = act(z) / z: y = ((x W_in + b_in) ⊙ r) W_out + b_out.

    The run left z (``pre``); its ratios are computed on first use. SoLU models normalize between
    gate and W_out: ``ln_scale`` is that norm's frozen scale.
    """

    weights: MLPWeights
    pre: Float[Tensor, "batch pos d_mlp"]
    ln_scale: Float[Tensor, "batch pos 1"] | None = None
    pre_edit: Shift | None = None
    post_edit: Shift | None = None

    @cached_property
    def map(self) -> Chain:
        w, name, ln = self.weights, f"L{self.layer}", None
        if w.ln is not None and self.ln_scale is not None:
            width = self.pre.shape[-1]
            ln = Norm(self.frame, f"{name}.mlp.ln", self.ln_scale, w.ln, width)
        return _chain(
            (
                Linear(self.frame, w.W_in, w.b_in, f"{name}.b_in"),
                self.pre_edit,
                Gate(self.frame, gating_ratio(w.act, self.pre)),
                ln,
                self.post_edit,
                self.output,
            )
        )

    @property
    def posts(self):
        return reduce(_push, self.map.maps[1:-1], self.pre)

    @property
    def edits(self) -> dict[str, Shift]:
        return _edits(pre=self.pre_edit, post=self.post_edit)

    def row(self, query) -> MLP:
        scale = None if self.ln_scale is None else take_row(self.ln_scale, query)
        pre = take_row(self.pre, query)
        return replace(self, frame=self.frame.row, pre=pre, ln_scale=scale)


@dataclass(frozen=True, eq=False)
class GatedMLP(FeedForward):
    """A gated MLP, post = act(g) ⊙ u with g = x W_gate + b_gate and u = x W_in + b_in, made linear.

    The product is bilinear, so its linear form is a choice (``Convention.gate``):

        "gate"  act(g) frozen, linear in u      post = on_up ⊙ u,    on_up = act(g)
        "up"    u frozen, linear in g           post = on_gate ⊙ g,  on_gate = u ⊙ act(g)/g
        "half"  half of each

    All three reproduce the run, which left g (``pre``) and u (``pre_linear``).
    """

    weights: GatedMLPWeights
    pre: Float[Tensor, "batch pos d_mlp"]
    pre_linear: Float[Tensor, "batch pos d_mlp"]
    convention: str = "gate"
    pre_edit: Shift | None = None
    pre_linear_edit: Shift | None = None
    post_edit: Shift | None = None

    @cached_property
    def map(self) -> Chain:
        w, name, frame = self.weights, f"L{self.layer}", self.frame
        share = 0.5 if self.convention == "half" else 1.0
        ratio = gating_ratio(w.act, self.pre) * share
        branches: list[LinearMap] = []
        if self.convention in ("gate", "half"):
            up = Linear(frame, w.W_in, w.b_in, f"{name}.b_in")
            gate = Gate(frame, ratio * self.pre)
            branches.append(_chain((up, self.pre_linear_edit, gate)))
        if self.convention in ("up", "half"):
            into = Linear(frame, w.W_gate, w.b_gate, f"{name}.b_gate")
            gate = Gate(frame, ratio * self.pre_linear)
            branches.append(_chain((into, self.pre_edit, gate)))
        offset = None
        if w.b_post is not None:  # HookedTransformer adds b_in after gating
            offset = Gate(frame, torch.ones_like(ratio), w.b_post, f"{name}.b_in")
        whole = Sum(tuple(branches)) if len(branches) > 1 else branches[0]
        return _chain((whole, offset, self.post_edit, self.output))

    @property
    def posts(self):
        b = 0.0 if self.weights.b_post is None else self.frame.cast(self.weights.b_post)
        return gating_ratio(self.weights.act, self.pre) * self.pre * self.pre_linear + b

    @property
    def edits(self) -> dict[str, Shift]:
        used = {"post": self.post_edit}
        if self.convention in ("gate", "half"):
            used["pre_linear"] = self.pre_linear_edit
        if self.convention in ("up", "half"):
            used["pre"] = self.pre_edit
        return _edits(**used)

    def row(self, query) -> GatedMLP:
        pre, up = take_row(self.pre, query), take_row(self.pre_linear, query)
        return replace(self, frame=self.frame.row, pre=pre, pre_linear=up)


@dataclass(frozen=True, eq=False)
class Unembed(LinearMap):
    """The readout (y W_U + b_U) ⊙ ratio: a soft cap's ratio cap(l) / l is frozen.

    ``final`` is the run's own final normalized residual: where it is capped, the ratio is
    computed from it on first use, since [pos, d_vocab] ratios are the largest frozen quantity.
    """

    frame: Frame
    weights: UnembedWeights
    final: Float[Tensor, "batch pos d_model"]

    @cached_property
    def ratio(self) -> Tensor | float:
        if self.weights.soft_cap is None:
            return 1.0
        logits = self._linear.apply(self.final) + self._linear.bias
        return soft_cap_ratio(logits, self.weights.soft_cap)

    @property
    def _linear(self) -> Linear:
        return Linear(self.frame, self.weights.W_U, self.weights.b_U, "b_U")

    @property
    def in_dim(self) -> int:
        return self.weights.W_U.shape[0]

    @property
    def out_dim(self) -> int:
        return self.weights.W_U.shape[1]

    def apply(self, x):
        return self._linear.apply(x) * self.ratio

    def apply_t(self, y, effects=None):
        return self._linear.apply_t(y * self.ratio, effects)

    @property
    def bias(self):
        return self._linear.bias * self.ratio

    def constants(self):
        return dict.fromkeys(self._linear.constants(), self.bias)
