"""The mathematics of a frozen transformer, sublayer by sublayer, one screen each.

A sublayer is what is left of a nonlinear one when the pattern, the scale or the gating ratio keeps
the value it took in one run: a short chain of primitive maps. Attention is Linear, Mix, Linear; an
MLP is Linear, Gate, Linear. Weights are referenced, never copied.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .graph import Node
from .linear_map import Chain, Frame, LinearMap, Sum
from .primitives import Gate, Linear, Mix, Norm, Shift, gating_ratio, soft_cap_ratio, take_row
from .recomputed import RecomputedMix
from .weights import AttentionWeights, GatedMLPWeights, MLPWeights, UnembedWeights


class Sublayer(LinearMap):
    """A frozen sublayer: a chain of primitive maps whose width-preserving parts are nodes.

    Subclasses give ``map``, :meth:`nodes` and :meth:`part`.
    """

    @property
    @abstractmethod
    def map(self) -> LinearMap:
        """The sublayer as an expression of primitive maps."""

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

    @abstractmethod
    def outputs_at(
        self, x: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch node d_model"]:
        """What every node adds at one destination per prompt, its internal constants included.

        Args:
            x: The sublayer's input (after its norm).
            query: Destinations, as tensor indices.
        """

    @property
    @abstractmethod
    def external(self) -> tuple[str, Float[Tensor, " d_model"] | None]:
        """The constant that no node holds, b_O or b_out, and its name."""

    @property
    @abstractmethod
    def edits(self) -> dict[str, Shift]:
        """The user's edits inside the sublayer, by the stage they follow; no node holds them."""

    def outside_at(self, query: Int[Tensor, " batch"]) -> dict[str, Float[Tensor, "batch d_model"]]:
        """What is added at one destination per prompt that no node holds: b_O or b_out, edits.

        Args:
            query: Destinations, as tensor indices.

        Returns:
            The constants, carried to the sublayer's output, by name.
        """
        name, b = self.external
        found = {} if b is None else {name: self.frame.cast(b).expand(len(query), -1)}
        if self.edits:
            carried = self.map.constants()
            names = (edit.name for edit in self.edits.values())
            found |= {name: take_row(carried[name], query)[:, 0] for name in names}
        return found

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


def _chain(maps: tuple[LinearMap | None, ...]) -> Chain:
    return Chain(tuple(m for m in maps if m is not None))


def _edits(**stages: Shift | None) -> dict[str, Shift]:
    return {stage: edit for stage, edit in stages.items() if edit is not None}


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
    mix: Mix | RecomputedMix
    weights: AttentionWeights
    v_edit: Shift | None = None
    z_edit: Shift | None = None

    @property
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

    def outputs_at(self, x, query):
        # Mixing comes first, A_h[q] x, then W_V and W_O on that one row: L·D + D² instead of L·D².
        w, frame = self.weights, self.frame
        row = self.mix.rows(query)
        mixed = row @ x  # [batch, head, d_model]
        kv_heads = w.W_V.shape[0]
        z = torch.einsum(
            "bgrd,gde->bgre", mixed.unflatten(1, (kv_heads, -1)), frame.cast(w.W_V)
        ).flatten(1, 2)
        if w.b_V is not None:
            z = z + row.sum(-1, keepdim=True) * frame.cast(w.b_V)[self.kv_of]
        return torch.einsum("bhe,hed->bhd", z, frame.cast(w.W_O))

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

    @abstractmethod
    def row(self, query: Int[Tensor, " batch"]) -> FeedForward:
        """The MLP at one position per prompt."""

    def nodes(self) -> tuple[Node, ...]:
        return (Node("mlp", self.layer),)

    def part(self, node: Node) -> FeedForward:
        if node not in self.nodes():
            raise _unknown(node, self.nodes())
        none = dict.fromkeys(f"{stage}_edit" for stage in self.edits)
        return replace(self, weights=replace(self.weights, b_out=None), **none)

    def outputs_at(self, x, query):
        mlp = self.part(self.nodes()[0]).row(query)
        return mlp.apply(take_row(x, query)) + mlp.bias

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
