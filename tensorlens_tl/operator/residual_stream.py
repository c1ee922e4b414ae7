"""What a block consists of: branches that write to the residual, and steps of one or two of them.

    step: x → x + Σ branches(x),     branch: post-norm ∘ sublayer ∘ pre-norm

and what a transposed sweep leaves of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from ..graph import Node
from ..sublayers import (
    Attention,
    Chain,
    Factored,
    LinearMap,
    Norm,
    Residual,
    Shift,
    Sublayer,
    Sum,
    put_effects,
    put_row,
    take_row,
)


@dataclass(frozen=True, eq=False)
class Pull:
    """What a transposed sweep leaves of one branch.

    Attributes:
        covector: What the branch adds to the covector of the residual it reads.
        kept: What :meth:`Branch.readers` takes.
        effects: Its constants' shares, per position, by name.
    """

    covector: Float[Tensor, "*many batch pos d_model"]
    kept: Tensor
    effects: dict[str, Float[Tensor, "*many batch pos"]]

    def __getitem__(self, index: int) -> Pull:
        effects = {name: effect[index] for name, effect in self.effects.items()}
        return Pull(self.covector[index], self.kept[index], effects)


@dataclass(frozen=True, eq=False)
class Trace:
    """A transposed sweep: covectors at every site, what every branch did, every constant's share.

    Attributes:
        covectors: Before every step, after the last, after the final norm.
        pulls: By step and branch.
        top: The shares of the constants of the final norm and after it.
        effects: The shares of all constants, per position, by name.
    """

    covectors: tuple[Float[Tensor, "*many batch pos d_model"], ...]
    pulls: tuple[tuple[Pull, ...], ...]
    top: dict[str, Float[Tensor, "*many batch pos"]]
    effects: dict[str, Float[Tensor, "*many batch pos"]]

    def __getitem__(self, index: int) -> Trace:
        """One of many vectors' sweeps."""
        return Trace(
            tuple(c[index] for c in self.covectors),
            tuple(tuple(p[index] for p in pulls) for pulls in self.pulls),
            *({n: e[index] for n, e in found.items()} for found in (self.top, self.effects)),
        )


@dataclass(frozen=True, eq=False)
class Branch:
    """One writer to the residual stream: post ∘ body ∘ pre."""

    pre: Norm | None
    body: Sublayer
    post: Norm | None

    @cached_property
    def map(self) -> Chain:
        """The branch as one map."""
        return Chain(tuple(m for m in (self.pre, self.body, self.post) if m is not None))

    def part(self, node: Node) -> Chain:
        """One node's map from the residual it reads to what it writes, internal constants included.

        The parts, and what is :meth:`outside`, sum to the whole.

        Args:
            node: One of its body's.

        Returns:
            The map.
        """
        post = self.post
        if post is not None:  # its b is nobody's
            post = replace(post, weights=replace(post.weights, b=None))
        maps = (self.pre, self.body.part(node), post)
        return Chain(tuple(m for m in maps if m is not None))

    def read(self, state: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the body reads of a residual state."""
        return state if self.pre is None else self.pre.apply(state) + self.pre.bias

    def writes(
        self, state: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"] | None = None
    ) -> Factored:
        """What every node adds to the residual in the run, its internal constants included.

        Args:
            state: The residual it reads in the run.
            query: Where alone it is wanted, if not everywhere: elsewhere it is left zero.

        Returns:
            One row per node.
        """
        x, post = self.read(state), self.post
        if query is None:
            found = self.body.factored(self.body.hidden_in_run(x))
        else:
            found = self.body.factored(self.body.hidden_at(x, query)[:, None])
            post = post and post.row(query)
        found = found if post is None else found.then(post.scale, post.unscaled_)
        if query is None:
            return found
        return replace(found, narrow=put_row(found.narrow, query, state.shape[1]))

    def outputs(
        self, state: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch node pos d_model"]:
        """The same, all of it: heads · pos · d_model numbers."""
        return self.writes(state).wide().transpose(0, 1)

    def outputs_at(
        self, state: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch node d_model"]:
        """The same at one destination per prompt."""
        y = self.body.outputs_at(self.read(state), query)
        return y if self.post is None else self.post.row(query).apply(y)

    @property
    def has_heads(self) -> bool:
        """Whether it is attention."""
        return self.body.nodes()[0].kind == "head"

    def pull_to_hidden(
        self, c: Float[Tensor, "*many batch pos d_model"]
    ) -> Float[Tensor, "*many batch pos d_hidden"]:
        """The covector of what the output matrix reads: z or post-activations."""
        return self.body.output.apply_t(c if self.post is None else self.post.apply_t(c))

    def pull(self, c: Float[Tensor, "*many batch pos d_model"]) -> Pull:
        """The adjoint, with what it needs to tell readers and constants apart."""
        effects: dict[str, Tensor] = {}
        y = c if self.post is None else self.post.apply_t(c, effects)
        x, kept = self.body.pull(y, effects)
        return Pull(x if self.pre is None else self.pre.apply_t(x, effects), kept, effects)

    def pull_at(
        self, c: Float[Tensor, "*many batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Pull:
        """The same where c is zero but at one position per prompt: for a row's cost, up to W_V."""
        if self.body.edits:
            return self.pull(c)
        y, own = take_row(c, query), {}
        y = y if self.post is None else self.post.row(query).apply_t(y, own)
        effects = put_effects(own, query, c.shape[-2])
        x, kept = self.body.pull_at(y, query, effects)
        return Pull(x if self.pre is None else self.pre.apply_t(x, effects), kept, effects)

    def readers(self, pull: Pull) -> tuple[Factored, dict[str, Float[Tensor, "reader batch"]]]:
        """Every reader's covector at the residual, and the shares of its own constants.

        Args:
            pull: From :meth:`pull`.

        Returns:
            The covectors, which sum to the adjoint, and shares by constant.
        """
        if isinstance(self.body, Attention):
            return self.body.readers(pull.kept, self.pre)
        outside = self.outside_names()
        shares = {n: e.sum(-1)[None] for n, e in pull.effects.items() if n not in outside}
        return Factored(pull.covector[None]), shares

    def outside_names(self) -> tuple[str, ...]:
        """The names of :meth:`outside`, in its order."""
        name, b = self.body.external
        names = () if b is None else (name,)
        names += tuple(edit.name for edit in self.body.edits.values())
        return names if self.post is None else (*names, *self.post.constants())

    def outside(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """What it adds to the residual that no node holds: b_O, b_out, a post-norm's b, edits."""
        found = self.body.outside()
        if self.post is not None:
            found = {name: self.post.apply(c) for name, c in found.items()}
            found |= self.post.constants()
        return found


@dataclass(frozen=True, eq=False)
class Step:
    """A step of the residual stream, x → x + Σ branches(x), and the site it starts from.

    ``edits`` are what the user's own hooks added to the residual after it.
    """

    site: str
    branches: tuple[Branch, ...]
    state: Float[Tensor, "batch pos d_model"]
    edits: tuple[Shift, ...] = ()

    @property
    def layer(self) -> int:
        """The block it belongs to."""
        return self.branches[0].body.nodes()[0].layer or 0

    @cached_property
    def map(self) -> LinearMap:
        """The step as one map."""
        step = Residual(Sum(tuple(branch.map for branch in self.branches)))
        return Chain((step, *self.edits)) if self.edits else step


@dataclass(frozen=True, eq=False)
class Readers:
    """Readers that see the same writers.

    Attributes:
        nodes: They.
        below: How many writers they see.
        covectors: Theirs, at the residual.
        own: The shares of their own constants, by name.
    """

    nodes: tuple[Node, ...]
    below: int
    covectors: Factored
    own: dict[str, Float[Tensor, "reader batch"]]
