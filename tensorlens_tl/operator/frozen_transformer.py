"""Compose the frozen sublayers: the whole transformer as one affine map X → y.

A block is one step or two, and every block shape is an expression of the same kind,

    step: x → norm(x + Σ branches(x)),     branch: post-norm ∘ sublayer ∘ pre-norm

A sequential block has two steps of one branch each. A parallel block has one step of two branches.
A norm that a model lacks is left out: only post-norm models (BERT) have one of the residual itself.
The operator is the chain of all steps and the final norm.
Nothing of size (pos · d_model)² is ever built.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from ..checks import is_int, spelled
from ..costs import Cost, Plan, memory_budget, rates_of
from ..graph import (
    FINAL_SITE,
    Edge,
    Node,
    Wiring,
    as_edges,
    numbered_site,
    resid_site,
    site_parts,
)
from ..maps import Chain, Frame, Identity, LinearMap, Norm, Shift
from .blocks import StepChain
from .capture import Capture, FrozenBlock
from .folding import shape_of, stages_of
from .residual_stream import Branch, Step, Trace
from .restricted_transformer import RestrictedTransformer


@dataclass(frozen=True, eq=False, repr=False)
class Segment(StepChain):
    """The operator from one residual site to a later one.

    Attributes:
        frame: Spans of real tokens, number of positions, dtype and device.
        width: Width of input and output, d_model.
        steps: The residual steps in between, and the final norm where the segment includes it.
    """

    frame: Frame
    width: int
    steps: tuple[LinearMap, ...]

    def __repr__(self) -> str:
        shape = f"[{self.frame.batch}, {self.frame.n_pos}, {self.width}]"
        return f"Segment({shape} → {shape}, {len(self.steps)} steps, {self.frame.dtype})"

    @cached_property
    def chain(self) -> Chain:
        """The steps as one chain, or the identity where there are none."""
        return Chain(self.steps or (Identity(self.frame, self.width),))


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class FrozenTransformer(StepChain):
    """The TensorLens operator: X [batch, pos, d_model] → y, the final normalized residual.

    y = T · X + bias, where T is the tensor of Atad et al. (2026, arXiv 2601.17958) at this prompt.

    Attributes:
        frame: Spans of real tokens, number of positions, dtype and device.
        steps: The residual steps, first to last.
        ln_final: The final norm, or the identity in a model without one.
        edit: What the user's hooks added to y, or None.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> T = lens.operator
        >>> y = T @ lens.embedding + T.bias
        >>> bool((lens.readout(y) - lens.logits).abs().max() < 1e-3)
        True
        >>> T.block(query_pos=-1, key_pos=3).shape
        torch.Size([1, 128, 128])
    """

    frame: Frame
    steps: tuple[Step, ...]
    ln_final: Norm | Identity
    edit: Shift | None = None

    def __repr__(self) -> str:
        shape = f"[{self.frame.batch}, {self.frame.n_pos}, {self.ln_final.in_dim}]"
        return f"FrozenTransformer({shape} → {shape}, {len(self.steps)} steps, {self.frame.dtype})"

    @classmethod
    def of(cls, capture: Capture) -> FrozenTransformer:
        """Compose the sublayers of a capture."""
        steps = []
        for layer, block in enumerate(capture.blocks):
            attn = Branch(block.ln1, block.attn, block.ln1_post)
            mlp = _branches_of_mlp(block)
            pre = resid_site(layer, "pre")
            if block.resid_mid is None:  # parallel, or attention only: one step
                branches, edits = (attn, *mlp), block.post_edits
                steps.append(Step(pre, branches, block.resid_pre, edits, block.post_norm))
            else:
                mid = resid_site(layer, "mid")
                steps += [
                    Step(pre, (attn,), block.resid_pre, block.mid_edits, block.mid_norm),
                    Step(mid, mlp, block.resid_mid, block.post_edits, block.post_norm),
                ]
        width = capture.resid_final.shape[-1]
        ln_final = capture.ln_final or Identity(capture.frame, width)
        return cls(capture.frame, tuple(steps), ln_final, capture.final_edit)

    @cached_property
    def chain(self) -> Chain:
        """The chain of all steps, the final norm and the edit after it."""
        last = self.ln_final if self.edit is None else Chain((self.ln_final, self.edit))
        return Chain((*(step.map for step in self.steps), last))

    @cached_property
    def bias(self):
        return self.map.bias

    # --- Sites

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The residual sites in order: before every step, after the last, and the final one."""
        last = resid_site(self.steps[-1].layer, "post")
        return (*(step.site for step in self.steps), last, FINAL_SITE)

    def site_index(self, site: str | int) -> int:
        """The place of a site in :attr:`sites`.

        Args:
            site: Name of a residual site. A block's ``hook_resid_post`` is the same site as the
                next block's ``hook_resid_pre``.

        Returns:
            The index of the site.

        Raises:
            ValueError: If this model has no such site. The message lists those it has.
        """
        name, (layer, where) = site, site_parts(str(site))
        if site not in self.sites and where == "post":
            name = resid_site(layer + 1, "pre")
        if name not in self.sites:
            names = []
            for known in self.sites:
                layer, where = site_parts(known)
                # What a block leaves is what the next one reads: one site with two names.
                names += [resid_site(layer - 1, "post")] if where == "pre" and layer else []
                names.append(known)
            raise ValueError(
                f"This model has no residual site {site!r}. Pass one of {', '.join(names)}."
            )
        return self.sites.index(name)

    def between(self, start: str | int, stop: str | int) -> Segment:
        """The operator from one residual site to a later one.

        Args:
            start: Site that the part starts from, such as "blocks.2.hook_resid_pre". A number is
                the first block of the part.
            stop: Site that the part ends at, such as "blocks.8.hook_resid_post". "unembed.hook_in"
                is the site after the final norm. A number is the last block of the part.

        Returns:
            The part of the operator. It is the identity where both sites are the same.

        Raises:
            ValueError: If a site does not exist, or ``stop`` comes before ``start``.
        """
        n_layers = self.steps[-1].layer + 1
        first = self.site_index(numbered_site(start, n_layers, "pre"))
        last = self.site_index(numbered_site(stop, n_layers, "post"))
        blocks = [number % n_layers for number in (start, stop) if is_int(number)]
        if last < first or blocks != sorted(blocks):
            raise ValueError(f"The site {stop!r} comes before {start!r}. Swap the two sites.")
        return Segment(self.frame, self.in_dim, self.map.maps[first:last])

    @property
    def wiring(self) -> Wiring:
        """The edges that the model has."""
        branches = (b for step in self.steps for b in step.branches)
        heads = tuple(len(b.body.nodes()) for b in branches if b.has_heads)
        bodies = [(b.body, step) for step in self.steps for b in step.branches if not b.has_heads]
        layers = range(self.steps[-1].layer + 1)
        nodes = [[n for body, s in bodies if s.layer == at for n in body.nodes()] for at in layers]
        mixture = any(node.kind == "expert" for own in nodes for node in own)
        return Wiring(
            len(layers),
            heads[0] if len({*heads}) == 1 else heads,
            parallel=any(step.branches[0].has_heads for _, step in bodies),
            attn_only=not bodies,
            experts=tuple(map(tuple, nodes)) if mixture else (),
        )

    def restrict(self, edges: Iterable[Edge | Node | str]) -> RestrictedTransformer:
        """The operator along some edges only: every reader reads what these edges bring it.

        Constants that belong to no node are read by every reader. A node's own constants stay where
        the node has a kept path to the logits. Query and key edges change nothing here, because the
        patterns are frozen.

        Args:
            edges: Edges such as "L0H1→L1H2.v", or nodes. Of nodes, all edges between them are kept;
                the input and the logits are always among them.

        Returns:
            The restricted operator, from the same X to the final normalized residual.

        Raises:
            ValueError: If the model has no such node or edge.
        """
        kept = as_edges(self.wiring, edges)
        return RestrictedTransformer(self.frame, self.steps, self.map.maps[-1], frozenset(kept))

    def trace(
        self, x: Float[Tensor, "*many batch pos d_model"]
    ) -> dict[str, Float[Tensor, "*many batch pos d_model"]]:
        """Push vectors through the linear part and keep the state at every site.

        Args:
            x: Vectors at the first site [..., batch, pos, d_model].

        Returns:
            The states by site, in order.
        """
        self.frame.check(x, self.in_dim)
        states = [x]
        for map_ in self.map.maps:
            states.append(map_.apply(states[-1]))
        return dict(zip(self.sites, states, strict=True))

    def trace_t(
        self,
        u: Float[Tensor, "*many batch pos d_model"],
        effects: dict[str, Float[Tensor, "*many batch pos"]] | None = None,
    ) -> dict[str, Float[Tensor, "*many batch pos d_model"]]:
        """Pull covectors back and keep the covector at every site.

        Args:
            u: Covectors at the final site [..., batch, pos, d_model].
            effects: A dictionary that receives what each constant adds to ⟨u, y⟩, by name
                [..., batch, pos]. See :meth:`LinearMap.apply_t`.

        Returns:
            The covectors by site, in order.
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
            u: Covectors at the final site [..., batch, pos, d_model].
            query: For each prompt, the one position where ``u`` is not zero, if there is only one.
                The last MLP and the last W_O are then pulled back at that position alone.

        Returns:
            The covectors at every site and the effect of every constant.
        """
        self.frame.check(u, self.out_dim)
        # 1. Above the last step: the final norm and the edit after it.
        top: dict[str, Tensor] = {}
        covectors = [u, self.map.maps[-1].apply_t(u, top)]
        # 2. Step by step downwards. Edits come after a step, so their shares are read off first.
        kept, shares, written = [], [], []
        for step in reversed(self.steps):
            own, c = {}, covectors[-1]
            c = c if step.norm is None else step.norm.apply_t(c, own)
            for edit in reversed(step.edits):
                edit.apply_t(c, own)
            # Below the last layer, attention has spread the covector to other positions.
            at = query if step.layer == self.steps[-1].layer else None
            found = [b.pull(c) if at is None else b.pull_at(c, at) for b in step.branches]
            covectors.append(sum((f.covector for f in found), c))
            written.append(c)
            kept.append(tuple(found))
            shares.append(own)
        # 3. All constants' effects, in the order in which the sweep met them.
        effects = dict(top)
        for edits, found in zip(shares, kept, strict=True):
            effects |= edits
            for f in reversed(found):
                effects |= f.effects
        sites = tuple(reversed(covectors)), tuple(reversed(written))
        return Trace(*sites, tuple(reversed(kept)), top, effects)

    def plan_pull(
        self,
        what: str = "pull",
        more: Cost | None = None,
        kept: int = 0,
        many: int = 1,
        apart: bool = False,
    ) -> Plan:
        """Predict what a transposed sweep of :meth:`pull` costs, all positions kept.

        With a graph that includes what autograd keeps of the sweep, and the backward pass.

        Args:
            what: Name of what is planned, for display.
            more: Work beside the sweep; it is counted up.
            kept: Memory beside the sweep's, in bytes.
            many: Number of covectors that are swept together.
            apart: Whether they start at different positions.

        Returns:
            The plan. Nothing has run but products that measure the machine.
        """
        frame, cost = self.frame, more or Cost()
        kept += self.count_pull(cost, many, apart)
        if frame.graph:  # backwards, two products for each one
            cost = Cost(**{kind: 3 * amount for kind, amount in vars(cost).items()})
        # A step keeps about four arrays of the size of the residual.
        rows = many * frame.batch * frame.n_pos
        kept += 4 * (len(self.steps) + 1) * rows * self.in_dim * frame.dtype.itemsize
        return self.plan_work(what, cost, kept)

    def count_pull(self, cost: Cost, many: int, apart: bool = False, mlps: bool = True) -> int:
        """Count the work of a transposed sweep.

        Args:
            cost: What the work is added to.
            many: Number of covectors that are swept together.
            apart: Whether they start at different positions.
            mlps: Whether MLPs are passed, and not attention alone.

        Returns:
            The bytes that autograd keeps of it, where there is a graph.
        """
        frame, D, kept = self.frame, self.in_dim, 0
        rows = many * frame.batch * frame.n_pos
        for step in self.steps:
            # In the last layer the covector is at one position until attention spreads it.
            last = step.layer == self.steps[-1].layer and not apart
            top = many * (frame.batch if last else frame.batch * frame.n_pos)
            for b in (b for stage in stages_of(step.map) for b in shape_of(stage, True)):
                if not b.heads and not mlps:
                    continue
                below = rows if b.heads else top
                cost.product += 2 * D * (top * b.width_in + below * b.width_out)
                cost.moved += D * (b.width_in + b.width_out) + rows * (3 * D + b.width_in)
                cost.calls += 21
                if b.heads:
                    cells = b.heads * rows * frame.n_pos
                    cost.mixing += 2 * cells * (b.width_in // b.heads + b.score)
                if frame.graph:  # what entered each product, norm and gate
                    per_row = 2 * D * below + (b.width_in + b.width_out) * (top + below)
                    kept += per_row * frame.dtype.itemsize
        return kept

    def plan_work(self, what: str, cost: Cost, peak: int) -> Plan:
        """Predict how long some work takes, at the rates of products as large as this operator's.

        Args:
            what: Name of what is planned, for display.
            cost: The work, counted by kind.
            peak: The memory that it takes, in bytes.

        Returns:
            The plan. Nothing has run but products that measure the machine.
        """
        frame, shapes = self.frame, [shape_of(stage, True) for stage in stages_of(self.map)]
        rows = frame.batch * frame.n_pos
        measured = rates_of(shapes, self.in_dim, frame.n_pos, rows, frame.dtype, frame.device)
        budget = memory_budget(None, frame.device)
        return Plan(what, cost.flops, measured.seconds(cost), peak, budget, 1)

    def states(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """The run's own states at every site before the last block's output, by site."""
        return {step.site: step.state for step in self.steps}


def _branches_of_mlp(block: FrozenBlock) -> tuple[Branch, ...]:
    """The MLP of a block as branches: none, one, or a mixture's experts and its shared expert."""
    if block.mlp is None:
        return ()
    branch = Branch(block.ln2, block.mlp, block.ln2_post)
    if block.shared is None:
        return (branch,)
    # Constants of norms are counted by name, and that of the norm after the sum counts once.
    norm, post = block.ln2, block.ln2_post
    norm = norm and replace(norm, name=f"{block.shared.name}.ln2")
    post = post and replace(post, weights=replace(post.weights, b=None))
    return (branch, Branch(norm, block.shared, post))
