"""The frozen sublayers, contracted: the whole transformer as one affine map X → y.

A block is one or two steps, and every block shape is an expression of the same kind,

    step: x → x + Σ branches(x),     branch: post-norm ∘ sublayer ∘ pre-norm

one branch a step in a sequential block, both in one step in a parallel block; absent norms are left
out. The operator is the chain of all steps and the final norm; nothing of size (pos · d_model)² is
ever built.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from ..graph import FINAL_SITE, Edge, Node, Wiring, as_edges, resid_site
from ..sublayers import Chain, Frame, Identity, LinearMap, Norm, Shift
from .blocks import Contractible
from .capture import Capture
from .residual_stream import Branch, Step, Trace
from .restricted_transformer import RestrictedTransformer


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
        if site not in self.sites and str(site).endswith("hook_resid_post"):
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

    @property
    def wiring(self) -> Wiring:
        """Which edges there are."""
        kinds = [{b.body.nodes()[0].kind for b in step.branches} for step in self.steps]
        heads = next(b for step in self.steps for b in step.branches if b.has_heads).body.nodes()
        return Wiring(
            self.steps[-1].layer + 1,
            len(heads),
            parallel=any(len(own) > 1 for own in kinds),
            attn_only=not any("mlp" in own for own in kinds),
        )

    def restrict(self, edges: Iterable[Edge | Node | str]) -> RestrictedTransformer:
        """The operator with some edges alone: every reader reads only what they bring it.

        Constants that no node holds are read by all; a node's own stay where it has a kept path to
        the logits. Query and key edges do nothing here: the patterns are frozen.

        Args:
            edges: Edges, "L0H1→L1H2.v", or nodes, between which all edges are kept; input and
                logits are always among the nodes.

        Returns:
            The restricted map, from the same X to the final normalized residual.

        Raises:
            ValueError: If there is no such node or edge.
        """
        kept = as_edges(self.wiring, edges)
        return RestrictedTransformer(self.frame, self.steps, self.map.maps[-1], frozenset(kept))

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
                last MLP and the last W_O are then pulled back there alone.

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
            c, at = covectors[-1], query if step.layer == self.steps[-1].layer else None
            found = [b.pull(c) if at is None else b.pull_at(c, at) for b in step.branches]
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
