"""The parts of a block: branches that write to the residual stream, and steps of one or two.

    step: x → norm(x + Σ branches(x)),     branch: post-norm ∘ sublayer ∘ pre-norm

The norm of the residual itself is the identity but in post-norm models such as BERT.

A transposed sweep carries a covector, the gradient of a target at a site, down through the steps.
``Pull`` and ``Trace`` hold what it finds on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from ..graph import Node
from ..maps import (
    Chain,
    Factored,
    LinearMap,
    Norm,
    NormWeights,
    Residual,
    Shift,
    Sum,
    put_effects,
    put_row,
    take_row,
)
from ..sublayers import Attention, Experts, Sublayer


@dataclass(frozen=True, eq=False)
class Pull:
    """The result of pulling a covector back through one branch.

    Attributes:
        covector: What the branch adds to the covector at the residual that it reads
            [..., batch, pos, d_model].
        kept: The covector at the point where readers can still be told apart, the values of each
            head. :meth:`Branch.readers` needs it.
        effects: What each constant of the branch adds to the target, by name [..., batch, pos].
    """

    covector: Float[Tensor, "*many batch pos d_model"]
    kept: Tensor
    effects: dict[str, Float[Tensor, "*many batch pos"]]

    def __getitem__(self, index: int) -> Pull:
        effects = {name: effect[index] for name, effect in self.effects.items()}
        return Pull(self.covector[index], self.kept[index], effects)


@dataclass(frozen=True, eq=False)
class Trace:
    """The result of a transposed sweep through the whole operator.

    Attributes:
        covectors: The covector before every step, after the last step and after the final norm,
            each [..., batch, pos, d_model].
        written: The covector at what each step writes, below the residual's own norm.
        pulls: For every step, the result of each of its branches.
        top: What the constants of the final norm, and edits after it, add to the target, by name.
        effects: What every constant adds to the target, by name [..., batch, pos].
    """

    covectors: tuple[Float[Tensor, "*many batch pos d_model"], ...]
    written: tuple[Float[Tensor, "*many batch pos d_model"], ...]
    pulls: tuple[tuple[Pull, ...], ...]
    top: dict[str, Float[Tensor, "*many batch pos"]]
    effects: dict[str, Float[Tensor, "*many batch pos"]]

    def __getitem__(self, index: int) -> Trace:
        """The sweep of one of the many vectors."""
        return Trace(
            tuple(c[index] for c in self.covectors),
            tuple(c[index] for c in self.written),
            tuple(tuple(p[index] for p in pulls) for pulls in self.pulls),
            *({n: e[index] for n, e in found.items()} for found in (self.top, self.effects)),
        )


@dataclass(frozen=True, eq=False)
class Branch:
    """One writer to the residual stream: post ∘ body ∘ pre.

    Attributes:
        pre: The norm that the sublayer reads the residual through, or None.
        body: The sublayer, attention or an MLP.
        post: The norm of what the sublayer writes, or None.
    """

    pre: Norm | None
    body: Sublayer
    post: Norm | None

    @cached_property
    def map(self) -> Chain:
        """The branch as one map."""
        return Chain(tuple(m for m in (self.pre, self.body, self.post) if m is not None))

    def part(self, node: Node) -> Chain:
        """One node's map, from the residual that it reads to what it writes.

        The map includes the node's internal constants. All nodes' maps and the constants of
        :meth:`outside` sum to the whole branch.

        Args:
            node: A node of the sublayer.

        Returns:
            The map of that node.
        """
        post = self.post
        if post is not None:  # the b of a post-norm belongs to no node
            post = replace(post, weights=replace(post.weights, b=None))
        maps = (self.pre, self.body.part(node), post)
        return Chain(tuple(m for m in maps if m is not None))

    def read(self, state: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the sublayer reads of a residual state: the state after the pre-norm."""
        return state if self.pre is None else self.pre.apply(state) + self.pre.bias

    def writes(
        self, state: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"] | None = None
    ) -> Factored:
        """What every node adds to the residual in the run, its internal constants included.

        Args:
            state: The residual that the branch reads in the run [batch, pos, d_model].
            query: For each prompt, the one position of interest. The result is zero elsewhere. None
                is all positions.

        Returns:
            One row per node [node, batch, pos, d_model], kept narrow.
        """
        x, post = self.read(state), self.post
        if query is None:
            found = self.body.factored(self.body.hidden_in_run(x))  # from what the run left
        else:
            found = self.body.factored_at(x, query)
            post = post and post.row(query)
        # The post-norm's b is left out: it is added once, and belongs to no head.
        found = found if post is None else found.then(post.scale, post.unscaled_)
        if query is None:
            return found
        return replace(found, narrow=put_row(found.narrow, query, state.shape[1]))

    def outputs(
        self, state: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch node pos d_model"]:
        """What :meth:`writes` gives, as one tensor of heads · pos · d_model numbers a prompt."""
        return self.writes(state).wide().transpose(0, 1)

    def outputs_at(
        self, state: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch node d_model"]:
        """What every node adds at one position per prompt; see :meth:`writes`."""
        y = self.body.outputs_at(self.read(state), query)
        return y if self.post is None else self.post.row(query).apply(y)

    @property
    def has_heads(self) -> bool:
        """Whether the sublayer is attention."""
        return self.body.nodes()[0].kind == "head"

    def pull_to_hidden(
        self, c: Float[Tensor, "*many batch pos d_model"]
    ) -> Float[Tensor, "*many batch pos d_hidden"]:
        """The covector at what W_O or W_out reads: mixed values z, or post-activations."""
        return self.body.output.apply_t(c if self.post is None else self.post.apply_t(c))

    def pull(self, c: Float[Tensor, "*many batch pos d_model"]) -> Pull:
        """Pull covectors back, and keep what tells the readers and constants apart."""
        effects: dict[str, Tensor] = {}
        # Against the direction of the run: post-norm, sublayer, pre-norm.
        y = c if self.post is None else self.post.apply_t(c, effects)
        x, kept = self.body.pull(y, effects)
        return Pull(x if self.pre is None else self.pre.apply_t(x, effects), kept, effects)

    def pull_at(
        self, c: Float[Tensor, "*many batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Pull:
        """Pull covectors back that are zero but at one position per prompt: W_O costs one row."""
        if self.body.edits:  # the short way knows no edits
            return self.pull(c)
        y, own = take_row(c, query), {}
        y = y if self.post is None else self.post.row(query).apply_t(y, own)
        effects = put_effects(own, query, c.shape[-2])
        x, kept = self.body.pull_at(y, query, effects)
        return Pull(x if self.pre is None else self.pre.apply_t(x, effects), kept, effects)

    def readers(self, pull: Pull) -> tuple[Factored, dict[str, Float[Tensor, "reader batch"]]]:
        """Every reader's covector at the residual, and what its own constants add to the target.

        Args:
            pull: The result of :meth:`pull`.

        Returns:
            The covectors [reader, batch, pos, d_model], which sum to that of the whole branch, and
            the constants' effects by name [reader, batch].
        """
        if isinstance(self.body, Attention | Experts):
            return self.body.readers(pull.kept, self.pre)
        # An MLP is one reader; constants that belong to no node are not its own.
        outside = self.outside_names()
        shares = {n: e.sum(-1)[None] for n, e in pull.effects.items() if n not in outside}
        return Factored(pull.covector[None]), shares

    def outside_names(self) -> tuple[str, ...]:
        """The names of the constants of :meth:`outside`, in the same order."""
        name, b = self.body.external
        names = () if b is None else (name,)
        names += tuple(edit.name for edit in self.body.edits.values())
        return names if self.post is None else (*names, *self.post.constants())

    def outside(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """The constants that belong to no node: b_O, b_out, the b of a post-norm, and edits."""
        found = self.body.outside()
        if self.post is not None:
            # A post-norm acts on b_O and b_out, too, before they reach the residual.
            found = {name: self.post.apply(c) for name, c in found.items()}
            found |= self.post.constants()
        return found


@dataclass(frozen=True, eq=False)
class Step:
    """A step of the residual stream, x → norm(x + Σ branches(x)).

    Attributes:
        site: Name of the residual site that the step starts from.
        branches: The branches: one, or attention and MLP side by side.
        state: The run's residual at that site [batch, pos, d_model].
        edits: What the user's hooks added to the sum.
        norm: The norm of the residual itself, after the sum (post-norm models), or None.
    """

    site: str
    branches: tuple[Branch, ...]
    state: Float[Tensor, "batch pos d_model"]
    edits: tuple[Shift, ...] = ()
    norm: Norm | None = None

    @property
    def layer(self) -> int:
        """Index of the block that the step belongs to."""
        return self.branches[0].body.nodes()[0].layer or 0

    @cached_property
    def map(self) -> LinearMap:
        """The step as one map."""
        step = Residual(Sum(tuple(branch.map for branch in self.branches)))
        after = (*self.edits, self.norm) if self.norm is not None else self.edits
        return Chain((step, *after)) if after else step

    @property
    def summed(self) -> Float[Tensor, "batch pos d_model"]:
        """The run's sum x + Σ branches(x) and edits, which the residual's norm reads."""
        edits = sum(edit.constant for edit in self.edits)
        return self.state + sum(b.map.apply(self.state) + b.map.bias for b in self.branches) + edits

    @property
    def own(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """The constant b of the residual's norm, by name. It is added after the norm."""
        return {} if self.norm is None else self.norm.constants()

    def normed(self, x: Float[Tensor, "*many batch pos d_model"]) -> Tensor:
        """Carry what the step, or a step before, has written past the residual's norm."""
        return x if self.norm is None else self.norm.apply(x)


@dataclass(frozen=True, eq=False)
class Readers:
    """Readers that the same writers reach, such as the value inputs of one layer's heads.

    Attributes:
        nodes: The reader nodes.
        n_writers: Number of writers that come before these readers.
        covectors: Gradient of the target at the residual, through each reader alone
            [reader, batch, pos, d_model].
        own: What each reader's own constants (ln1.b, b_V, b_in) add to the target, by name
            [reader, batch].
        norm: The norm of the residual between these readers and those before, or None. All that was
            written before passes it; its own constant is the last writer.
    """

    nodes: tuple[Node, ...]
    n_writers: int
    covectors: Factored
    own: dict[str, Float[Tensor, "reader batch"]]
    norm: StreamNorm | None = None


class StreamNorm(Protocol):
    """A norm of the residual, or its secant, as writers pass it on the way to a reader."""

    @property
    def weights(self) -> NormWeights:
        """The affine part; its b is a writer of its own."""
        ...

    def push_(self, x: Float[Tensor, "*many batch pos d"], span: slice) -> None:
        """Carry vectors at a span of positions past the norm, in place."""


@dataclass(frozen=True, eq=False)
class NormSecant:
    """The secant of a norm: Δ(x/σ) = inverse Δx − mid ⟨mid, Δx⟩, times the norm's weights.

    Attributes:
        weights: The weights of the norm.
        inverse: The mean of 1/σ and 1/σ′ [..., pos, 1].
        mid: x̄ · √(2 / (d σ σ′ (σ + σ′))) [..., pos, d], where x̄ has mean zero for a LayerNorm.
    """

    weights: NormWeights
    inverse: Float[Tensor, "*many pos 1"]
    mid: Float[Tensor, "*many pos d"]

    @classmethod
    def of(
        cls, weights: NormWeights, x: Tensor, y: Tensor, s: Tensor, t: Tensor, parts: int = 1
    ) -> NormSecant:
        """Make the secant of two runs' inputs x, y and scales s, t, each of ``parts`` vectors."""
        mid, width = (x + y) / 2, x.shape[-1] * parts
        mid = mid - mid.mean(-1, keepdim=True) if weights.center else mid
        # x/σ − y/τ = (1/σ + 1/τ)/2 · Δx + x̄ (1/σ − 1/τ), and 1/σ − 1/τ = (τ² − σ²) / (σ τ (σ + τ))
        # with σ² − τ² = 2 ⟨x̄, Δx⟩ / d: ε cancels. The root is taken so that mid serves on both
        # sides.
        return cls(weights, (1 / s + 1 / t) / 2, mid * (2 / (width * s * t * (s + t))).sqrt())

    def pull_(
        self, y: Float[Tensor, "*more pos d"], span: slice = slice(None)
    ) -> Float[Tensor, "*more pos d"]:
        """Apply the adjoint at a span of positions, in place."""
        mid, inverse = self.mid[..., span, :], self.inverse[..., span, :]
        if (gain := self.weights.gain) is not None:
            y *= gain.detach().to(y)
        # The secant is symmetric before the weights, like the norm's derivative.
        along = (y * mid).sum(-1, keepdim=True)
        y *= inverse
        y -= along * mid
        if self.weights.center:
            y -= y.mean(-1, keepdim=True)
        return y

    def push_(self, x: Float[Tensor, "*more pos d"], span: slice) -> None:
        """Apply the secant at a span of positions, in place."""
        mid, inverse = self.mid[..., span, :], self.inverse[..., span, :]
        if self.weights.center:
            x -= x.mean(-1, keepdim=True)
        along = (x * mid).sum(-1, keepdim=True)
        x *= inverse
        x -= along * mid
        if (gain := self.weights.gain) is not None:
            x *= gain.detach().to(x)

    def after(self, covectors: Factored) -> Factored:
        """Pull covectors at the norm's output back to its input."""
        return replace(covectors, finish=self.pull_)
