"""Plain and gated MLPs, frozen at one run; and what they share with mixtures of experts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..graph import Node
from ..maps import (
    Chain,
    Frame,
    Gate,
    Linear,
    LinearMap,
    Norm,
    Shift,
    Sum,
    put_effects,
    put_row,
    take_row,
)
from .activations import activation_slope, gating_ratio
from .sublayer import Sublayer, _chain, _edits, _push, _unknown
from .weights import ExpertsWeights, GatedMLPWeights, MLPWeights


@dataclass(frozen=True, eq=False)
class FeedForward(Sublayer):
    """What MLPs and mixtures of experts share: nothing passes between positions.

    Attributes:
        frame: Layout of the batch.
        layer: Number of the block, from 0.
        weights: Weights of the MLP, or of the experts.
    """

    frame: Frame
    layer: int
    weights: MLPWeights | GatedMLPWeights | ExpertsWeights

    @property
    @abstractmethod
    def map(self) -> Chain: ...

    @abstractmethod
    def part(self, node: Node) -> FeedForward: ...

    @abstractmethod
    def row(self, query: Int[Tensor, " batch"]) -> FeedForward:
        """The MLP at one position per prompt, given as indices [batch]."""

    def at(self, rows: slice) -> Any:
        """The sublayer at some positions only, without the user's edits."""
        if rows == slice(None):
            return replace(self)  # what is made of it belongs to the copy
        names = ("pre", "pre_linear", "ln_scale", "factor", "experts", "share")
        tensors = {name: getattr(self, name, None) for name in names}
        cut: dict[str, Any] = {n: t[:, rows] for n, t in tensors.items() if t is not None}
        n_pos = cut["pre"].shape[1]
        frame = replace(self.frame, n_pos=n_pos, spans=((0, n_pos),) * self.frame.batch)
        return replace(self, frame=frame, **cut)

    @abstractmethod
    def moved(self, change: Float[Tensor, "batch pos d_model"]) -> FeedForward:
        """The MLP as the model would run it on an input moved by ``change``, with new ratios."""

    @abstractmethod
    def tangent(self) -> Chain:
        """The MLP's own derivative in the run, as a map: its ratios move to first order.

        Raises:
            ValueError: If the ratios of all neurons depend on each other, or tokens are routed.
        """

    def hidden(self, x):
        whole = self.part(self.nodes()[0]) if self.edits else self
        maps = whole.map.maps[:-1]
        return reduce(_push, maps, x)

    def hidden_in_run(self, x):
        return self.hidden(x) if self.edits else self.posts

    @property
    @abstractmethod
    def posts(self) -> Float[Tensor, "batch pos d_mlp"]:
        """The post-activations that W_out read in the run, without the user's edits."""

    def hidden_at(self, x, query):
        return self.row(query).hidden(take_row(x, query))[:, 0]

    def pull_at(self, y, query, effects):
        own: dict[str, Tensor] = {}
        found = self.row(query).pull(y, own)
        effects |= put_effects(own, query, self.frame.n_pos)
        covector, kept = (put_row(row, query, self.frame.n_pos) for row in found)
        return covector, kept


@dataclass(frozen=True, eq=False)
class Dense(FeedForward):
    """An MLP that every token passes. It is one node, and the bias b_out belongs to no node.

    Attributes:
        weights: Weights of the MLP.
        pre: The pre-activations of the run.
        ln_scale: Frozen scale of the norm before W_out that SoLU models and BitNet have, or None.
    """

    weights: MLPWeights | GatedMLPWeights
    pre: Float[Tensor, "batch pos d_mlp"]
    ln_scale: Float[Tensor, "batch pos 1"] | None = field(default=None, kw_only=True)

    @property
    def ln(self) -> Norm | None:
        """The norm before W_out, or None."""
        if self.weights.ln is None or self.ln_scale is None:
            return None
        name = f"{self.name}.mlp.ln"
        return Norm(self.frame, name, self.ln_scale, self.weights.ln, self.pre.shape[-1])

    @property
    def name(self) -> str:
        """What the names of its constants begin with, such as "L3"."""
        return f"L{self.layer}"

    @property
    def output(self) -> Linear:
        """The map from post-activations to what the MLP adds to the residual."""
        return Linear(self.frame, self.weights.W_out, self.weights.b_out, f"{self.name}.b_out")

    def nodes(self) -> tuple[Node, ...]:
        return (Node("mlp", self.layer),)

    def part(self, node: Node) -> Dense:
        if node not in self.nodes():
            raise _unknown(node, self.nodes())
        none = dict.fromkeys(f"{stage}_edit" for stage in self.edits)
        return replace(self, weights=replace(self.weights, b_out=None), **none)

    @property
    def external(self):
        return f"{self.name}.b_out", self.weights.b_out


@dataclass(frozen=True, eq=False)
class MLP(Dense):
    """A plain MLP with frozen gating ratios: y = ((x W_in + b_in) ⊙ r) W_out + b_out.

    The ratios r = act(z) / z are computed from z on first use.

    Attributes:
        weights: Weights of the MLP.
        pre: The pre-activations z of the run.
        pre_edit: What a hook of the user added to z, or None.
        post_edit: What a hook of the user added to the post-activations, or None.
    """

    weights: MLPWeights
    pre_edit: Shift | None = None
    post_edit: Shift | None = None

    @cached_property
    def map(self) -> Chain:
        return self.with_slopes(gating_ratio(self.weights.act, self.pre))

    def with_slopes(self, slopes: Float[Tensor, "batch pos d_mlp"]) -> Chain:
        """The MLP with a factor per neuron in place of its activation: (x W_in ⊙ slopes) W_out."""
        w = self.weights
        into = Linear(self.frame, w.W_in, w.b_in, f"L{self.layer}.b_in")
        gate = Gate(self.frame, slopes)
        return _chain((into, self.pre_edit, gate, self.ln, self.post_edit, self.output))

    def tangent(self) -> Chain:
        return self.with_slopes(activation_slope(self.weights.act, self.pre))

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

    def moved(self, change) -> MLP:
        pre, ln = self.pre + change @ self.frame.cast(self.weights.W_in), self.ln
        if ln is None:
            return replace(self, pre=pre)
        # The norm behind SoLU sees post-activations: its scale follows what they become.
        posts = (gating_ratio(self.weights.act, z) * z for z in (self.pre, pre))
        return replace(self, pre=pre, ln_scale=ln.moved(*posts).scale)


@dataclass(frozen=True, eq=False)
class GatedMLP(Dense):
    """A gated MLP, made linear: post = act(g) ⊙ u, g = x W_gate + b_gate, u = x W_in + b_in.

    The product is bilinear, so its linear form is a choice, ``convention``:

        "gate"  act(g) frozen, linear in u      post = on_up ⊙ u,    on_up = act(g)
        "up"    u frozen, linear in g           post = on_gate ⊙ g,  on_gate = u ⊙ act(g)/g
        "half"  half of each

    All three reproduce the run.

    Attributes:
        weights: Weights of the MLP.
        pre: The values g of the run.
        pre_linear: The values u of the run.
        convention: "gate", "up" or "half".
        pre_edit: What a hook of the user added to g, or None.
        pre_linear_edit: What a hook of the user added to u, or None.
        post_edit: What a hook of the user added to the post-activations, or None.
        shared: Whether it stands beside a mixture's experts, as the node "L3E.shared".
        factor: The frozen factor of what a shared expert adds, or None for 1.
    """

    weights: GatedMLPWeights
    pre_linear: Float[Tensor, "batch pos d_mlp"]
    convention: str = "gate"
    pre_edit: Shift | None = None
    pre_linear_edit: Shift | None = None
    post_edit: Shift | None = None
    shared: bool = False
    factor: Float[Tensor, "batch pos 1"] | None = None

    @property
    def name(self) -> str:
        return f"L{self.layer}.shared" if self.shared else f"L{self.layer}"

    def nodes(self) -> tuple[Node, ...]:
        return (Node("expert", self.layer, name="shared"),) if self.shared else super().nodes()

    @cached_property
    def map(self) -> Chain:
        # act(g) ⊙ u = ratio ⊙ g ⊙ u with ratio = act(g) / g, which is finite at g = 0, too.
        share = 0.5 if self.convention == "half" else 1.0
        ratio = gating_ratio(self.weights.act, self.pre) * share
        ratio = ratio if self.factor is None else ratio * self.factor
        on_up = None if self.convention == "up" else ratio * self.pre
        on_gate = None if self.convention == "gate" else ratio * self.pre_linear
        return self.with_slopes(on_up, on_gate)

    def with_slopes(
        self,
        on_up: Float[Tensor, "batch pos d_mlp"] | None,
        on_gate: Float[Tensor, "batch pos d_mlp"] | None,
    ) -> Chain:
        """The MLP with a sum in place of its product: (on_up ⊙ u + on_gate ⊙ g) W_out.

        Args:
            on_up: Factor of u = x W_in + b_in, or None to leave this half out.
            on_gate: Factor of g = x W_gate + b_gate, or None to leave this half out.

        Returns:
            The map from the MLP's input to what it adds.
        """
        w, name, frame = self.weights, self.name, self.frame
        branches: list[LinearMap] = []
        if on_up is not None:
            up = Linear(frame, w.W_in, w.b_in, f"{name}.b_in")
            # Each half reads its own projection, so an edit of g counts in the half that is linear
            # in g.
            branches.append(_chain((up, self.pre_linear_edit, Gate(frame, on_up))))
        if on_gate is not None:
            into = Linear(frame, w.W_gate, w.b_gate, f"{name}.b_gate")
            branches.append(_chain((into, self.pre_edit, Gate(frame, on_gate))))
        offset = None
        if w.b_post is not None:  # HookedTransformer adds b_in after gating
            offset = Gate(frame, torch.ones_like(self.pre), w.b_post, f"{name}.b_in")
        product = Sum(tuple(branches)) if len(branches) > 1 else branches[0]
        return _chain((product, offset, self.ln, self.post_edit, self.output))

    def tangent(self) -> Chain:
        act, factor = self.weights.act, 1.0 if self.factor is None else self.factor
        on_up = gating_ratio(act, self.pre) * self.pre * factor
        on_gate = activation_slope(act, self.pre) * self.pre_linear * factor
        return self.with_slopes(on_up, on_gate)

    @property
    def posts(self):
        b = 0.0 if self.weights.b_post is None else self.frame.cast(self.weights.b_post)
        post = gating_ratio(self.weights.act, self.pre) * self.pre * self.pre_linear + b
        post = post if self.factor is None else post * self.factor
        return post if self.ln is None else self.ln.apply(post) + self.ln.bias

    @property
    def edits(self) -> dict[str, Shift]:
        # An edit of the frozen factor is inside that factor already and is no constant of the map.
        used = {"post": self.post_edit}
        if self.convention in ("gate", "half"):
            used["pre_linear"] = self.pre_linear_edit
        if self.convention in ("up", "half"):
            used["pre"] = self.pre_edit
        return _edits(**used)

    def row(self, query) -> GatedMLP:
        pre, up = take_row(self.pre, query), take_row(self.pre_linear, query)
        others = {"factor": self.factor, "ln_scale": self.ln_scale}
        cut = {name: take_row(x, query) for name, x in others.items() if x is not None}
        return replace(self, frame=self.frame.row, pre=pre, pre_linear=up, **cut)

    def moved(self, change) -> GatedMLP:
        cast, w = self.frame.cast, self.weights
        pre, up = self.pre + change @ cast(w.W_gate), self.pre_linear + change @ cast(w.W_in)
        found, ln = replace(self, pre=pre, pre_linear=up, ln_scale=None), self.ln
        if ln is None:
            return found
        return replace(
            found, ln_scale=ln.moved(replace(self, ln_scale=None).posts, found.posts).scale
        )
