"""The frozen sublayers, contracted: the whole transformer as one affine map X → y.

A block is one or two steps, and every block shape is an expression of the same kind,

    step: x → x + Σ branches(x),     branch: post-norm ∘ sublayer ∘ pre-norm

one branch a step in a sequential block, both in one step in a parallel block; absent norms are left
out. The operator is the chain of all steps and the final norm; nothing of size (pos · d_model)² is
ever built.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from .blocks import Contractible
from .capturing import Capture
from .graph import FINAL_SITE, resid_site
from .linear_map import Chain, Frame, LinearMap, Residual, Sum
from .primitives import Identity, Norm, Shift, put_row, take_row
from .sublayer import Sublayer


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

    def read(self, state: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the body reads of a residual state."""
        return state if self.pre is None else self.pre.apply(state) + self.pre.bias

    def outputs(
        self, state: Float[Tensor, "batch pos d_model"], out: Tensor | None = None
    ) -> Float[Tensor, "batch node pos d_model"]:
        """What every node adds to the residual in the run, its internal constants included.

        Args:
            state: The residual it reads in the run.
            out: Where to write it, if anywhere.

        Returns:
            One row per node.
        """
        y = self.body.outputs(self.read(state), out)
        if self.post is None:
            return y
        y = self.post.apply(y.transpose(0, 1)).transpose(0, 1)
        return y if out is None else out.copy_(y)

    def outputs_at(
        self, state: Float[Tensor, "batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch node d_model"]:
        """The same at one destination per prompt."""
        y = self.body.outputs_at(self.read(state), query)
        return y if self.post is None else self.post.row(query).apply(y)

    def pull(self, c: Float[Tensor, "*many batch pos d_model"]) -> Pull:
        """The adjoint, with what it needs to tell readers and constants apart."""
        effects: dict[str, Tensor] = {}
        y = c if self.post is None else self.post.apply_t(c, effects)
        x, kept = self.body.pull(y, effects)
        return Pull(x if self.pre is None else self.pre.apply_t(x, effects), kept, effects)

    def pull_at(
        self, c: Float[Tensor, "*many batch pos d_model"], query: Int[Tensor, " batch"]
    ) -> Pull:
        """The same where c is zero but at one position per prompt: for a row's cost, if it can."""
        row = None if self.body.edits else self.body.row(query)
        if row is None:
            return self.pull(c)
        pre, post = (norm and norm.row(query) for norm in (self.pre, self.post))
        found, n_pos = Branch(pre, row, post).pull(take_row(c, query)), c.shape[-2]
        return Pull(
            put_row(found.covector, query, n_pos),
            put_row(found.kept, query, n_pos),
            {n: put_row(e[..., None], query, n_pos)[..., 0] for n, e in found.effects.items()},
        )

    def readers(
        self, pull: Pull, out: Float[Tensor, "batch reader pos d_model"]
    ) -> dict[str, Float[Tensor, "batch reader"]]:
        """Every reader's covector at the residual, and the shares of its own constants.

        Args:
            pull: From :meth:`pull`.
            out: Where the covectors go, which sum to the adjoint.

        Returns:
            Shares by constant.
        """
        if len(self.body.reads()) > 1:
            return self.body.readers(pull.kept, self.pre, out)
        out[:, 0] = pull.covector
        outside = self.outside_names()
        return {n: e.sum(-1, keepdim=True) for n, e in pull.effects.items() if n not in outside}

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


@dataclass(frozen=True, eq=False, repr=False)
class Segment(Contractible):
    """The operator from one residual site to a later one."""

    frame: Frame
    width: int
    steps: tuple[LinearMap, ...]

    def __repr__(self) -> str:
        shape = f"[{self.frame.batch}, {self.frame.n_pos}, {self.width}]"
        return f"Segment({shape} → {shape}, {len(self.steps)} steps, {self.frame.dtype})"

    @cached_property
    def map(self) -> Chain:
        """The steps as one chain; an identity where there are none."""
        return Chain(self.steps or (Identity(self.frame, self.width),))

    @property
    def in_dim(self) -> int:
        return self.width

    @property
    def out_dim(self) -> int:
        return self.width

    def apply(self, x):
        return self.map.apply(x)

    def apply_t(self, y, effects=None):
        return self.map.apply_t(y, effects)

    @property
    def bias(self):
        return self.map.bias

    def constants(self):
        return self.map.constants()


@dataclass(frozen=True, eq=False, repr=False)
class FrozenTransformer(Contractible):
    """The TensorLens operator: X [batch, pos, d_model] → y, the final normalized residual.

    y = T · X + bias, where T is Atad et al. (2026, arXiv 2601.17958)'s tensor at this prompt.
    ``edit`` is what the user's own hooks added to y.
    """

    frame: Frame
    steps: tuple[Step, ...]
    ln_final: Norm | Identity
    edit: Shift | None = None

    def __repr__(self) -> str:
        shape = f"[{self.frame.batch}, {self.frame.n_pos}, {self.in_dim}]"
        return f"FrozenTransformer({shape} → {shape}, {len(self.steps)} steps, {self.frame.dtype})"

    @classmethod
    def of(cls, capture: Capture) -> FrozenTransformer:
        """Compose a capture's sublayers."""
        steps = []
        for layer, block in enumerate(capture.blocks):
            attn = Branch(block.ln1, block.attn, block.ln1_post)
            mlp = () if block.mlp is None else (Branch(block.ln2, block.mlp, block.ln2_post),)
            pre = resid_site(layer, "pre")
            if block.resid_mid is None:
                steps.append(Step(pre, (attn, *mlp), block.resid_pre, block.post_edits))
            else:
                mid = resid_site(layer, "mid")
                steps.append(Step(pre, (attn,), block.resid_pre, block.mid_edits))
                steps.append(Step(mid, mlp, block.resid_mid, block.post_edits))
        width = capture.embed.shape[-1]
        ln_final = capture.ln_final or Identity(capture.frame, width)
        return cls(capture.frame, tuple(steps), ln_final, capture.final_edit)

    @cached_property
    def map(self) -> Chain:
        """The whole chain."""
        last = self.ln_final if self.edit is None else Chain((self.ln_final, self.edit))
        return Chain((*(step.map for step in self.steps), last))

    @property
    def in_dim(self) -> int:
        return self.ln_final.in_dim

    @property
    def out_dim(self) -> int:
        return self.ln_final.in_dim

    def apply(self, x):
        return self.map.apply(x)

    def apply_t(self, y, effects=None):
        return self.map.apply_t(y, effects)

    @cached_property
    def bias(self):
        return self.map.bias

    # --- Sites

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The residual sites in order: before every step, after the last, and the final one."""
        last = int(self.steps[-1].site.split(".")[1])
        return (*(step.site for step in self.steps), resid_site(last, "post"), FINAL_SITE)

    def site_index(self, site: str) -> int:
        """Where a site stands in :attr:`sites`; a block's resid_post is the next one's resid_pre.

        Returns:
            Its index.

        Raises:
            ValueError: If this model has no such site; lists those it has.
        """
        name = site
        if site not in self.sites and site.endswith("hook_resid_post"):
            parts = site.split(".")
            if len(parts) == 3 and parts[1].isdigit():
                name = resid_site(int(parts[1]) + 1, "pre")
        if name not in self.sites:
            raise ValueError(f"no residual site {site!r}; there are {', '.join(self.sites)}")
        return self.sites.index(name)

    def between(self, start: str, stop: str) -> Segment:
        """The operator from one residual site to a later one.

        Args:
            start: For instance "blocks.2.hook_resid_pre".
            stop: For instance "blocks.8.hook_resid_post"; "unembed.hook_in" is after the final
                norm.

        Returns:
            The map; the identity where start is stop.

        Raises:
            ValueError: If a site does not exist, or stop is before start.
        """
        first, last = self.site_index(start), self.site_index(stop)
        if last < first:
            raise ValueError(f"expected a site at or after {start!r}, got {stop!r}: swap them")
        return Segment(self.frame, self.in_dim, self.map.maps[first:last])

    def trace(
        self, x: Float[Tensor, "*many batch pos d_model"]
    ) -> dict[str, Float[Tensor, "*many batch pos d_model"]]:
        """The linear part of the state at every site, pushed from x at the first.

        Args:
            x: Vectors at the first site.

        Returns:
            States by site name, in order.
        """
        states = [x]
        for map_ in self.map.maps:
            states.append(map_.apply(states[-1]))
        return dict(zip(self.sites, states, strict=True))

    def trace_t(
        self,
        u: Float[Tensor, "*many batch pos d_model"],
        effects: dict[str, Float[Tensor, "*many batch pos"]] | None = None,
    ) -> dict[str, Float[Tensor, "*many batch pos d_model"]]:
        """The covector at every site, pulled from u at the last.

        Args:
            u: Covectors at the final site.
            effects: See :meth:`LinearMap.apply_t`.

        Returns:
            Covectors by site name, in order.
        """
        trace = self.pull(u)
        if effects is not None:
            effects |= trace.effects
        return dict(zip(self.sites, trace.covectors, strict=True))

    def pull(
        self,
        u: Float[Tensor, "*many batch pos d_model"],
        query: Int[Tensor, " batch"] | None = None,
    ) -> Trace:
        """One transposed sweep, with what each branch contributed to it.

        Args:
            u: Covectors at the final site.
            query: The one position per prompt where they are not zero, if there is only one: the
                last MLP is then pulled back there alone.

        Returns:
            The sweep.
        """
        top: dict[str, Tensor] = {}
        covectors = [u, self.map.maps[-1].apply_t(u, top)]
        kept, shares = [], []
        for step in reversed(self.steps):
            own = {}
            for edit in reversed(step.edits):
                edit.apply_t(covectors[-1], own)
            c, row = covectors[-1], query if step is self.steps[-1] else None
            found = [b.pull(c) if row is None else b.pull_at(c, row) for b in step.branches]
            covectors.append(sum((f.covector for f in found), covectors[-1]))
            kept.append(tuple(found))
            shares.append(own)
        pulls = tuple(reversed(kept))
        effects = dict(top)
        for edits, found in zip(shares, kept, strict=True):
            effects |= edits
            for f in reversed(found):
                effects |= f.effects
        return Trace(tuple(reversed(covectors)), pulls, top, effects)

    def states(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """The states the run itself had at every site before the last block's output."""
        return {step.site: step.state for step in self.steps}

    def constants(self):
        return self.map.constants()
