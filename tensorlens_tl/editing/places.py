"""Places where a run can be edited, and the covector of a target there.

A target m is affine in what stands at any place, while patterns, scales and ratios are held. Its
gradient there is the covector g, so an edit δ changes m by ⟨g, δ⟩ exactly in the frozen model. One
sweep passes all places.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import TargetGradient, queries_and_keys
from ..graph import numbered_site
from ..operator import Branch, Capture, FrozenTransformer, Step, Trace
from ..readers import LAYER_HOOKS
from ..sublayers import Attention, Experts, FeedForward

_INSIDE = {"z": "attention's mixed values", "v": "its values", "post": "the MLP's activations"}
_NAMES = re.compile(r"L(\d+)(?:H(\d+)|N(\d+)|E(\d+)|MLP)")


@dataclass(frozen=True, eq=False)
class Place:
    """A place in the run whose activations an edit adds to.

    Attributes:
        name: The place as people name it, such as "blocks.2.hook_resid_pre", "L2H1" or "L2N7".
        hook: Name of the host's hook point.
        step: Number of the residual step that the place is in or before.
        kind: "resid"; "z", "v" or "post" for a place inside a sublayer; "expert" for what one
            expert adds, times its routing weight, at the tokens that reach it.
        branch: Number of the branch within the step, for a place inside a sublayer.
        part: The first dimension of the activation that may change, and the one after the last;
            None for all. Of an expert, its number and the one after.
    """

    name: str
    hook: str
    step: int
    kind: str = "resid"
    branch: int = 0
    part: tuple[int, int] | None = None

    @classmethod
    def of(cls, operator: FrozenTransformer, site: str | int) -> Place:
        """Find a place by its name.

        Args:
            operator: The operator of the run.
            site: A residual site, or the number of a block for what it leaves; a hook point
                "blocks.2.attn.hook_z", "….hook_v" or "blocks.2.mlp.hook_post"; or a head "L2H1",
                an MLP "L2MLP", a neuron "L2N7" or an expert "L2E1".

        Returns:
            The place, with the hook point of the host that is edited.

        Raises:
            ValueError: If the model has no such place.
        """
        n_layers = operator.steps[-1].layer + 1
        name = numbered_site(site, n_layers, "post")
        layer, kind, one = _inside(str(name))
        if kind == "resid":
            index = operator.site_index(name)
            return cls(str(name), operator.sites[index], index)
        for number, step in enumerate(operator.steps):
            for at, branch in enumerate(step.branches):
                if step.layer != layer or branch.has_heads != (kind in ("z", "v")):
                    continue
                if kind == "expert" and isinstance(branch.body, Experts):
                    return cls._expert(str(name), number, at, branch, cast(int, one))
                if kind != "expert":
                    hook = f"blocks.{layer}.{LAYER_HOOKS[kind]}"
                    place = cls(str(name), hook, number, kind, at)
                    return place._narrowed(branch, one)
        raise ValueError(
            f"site={site!r} is no place of this model. Pass a residual site, or one inside the "
            f"blocks 0 to {n_layers - 1}, such as 'L0H0'."
        )

    @classmethod
    def _expert(cls, name: str, number: int, at: int, branch: Branch, one: int) -> Place:
        """What one expert of a mixture adds."""
        experts = cast(Experts, branch.body)
        if branch.post is not None:
            raise ValueError(
                f"site={name!r} has a norm behind it, which has no hook point of its own on every "
                "host. Pass a residual site."
            )
        if one >= experts.n_experts:
            most = experts.n_experts - 1
            raise ValueError(f"site={name!r} does not exist. Use a number from 0 to {most}.")
        hook = f"blocks.{experts.layer}.{LAYER_HOOKS['mlp_out']}"
        return cls(name, hook, number, "expert", at, (one, one + 1))

    def _narrowed(self, branch: Branch, one: int | None) -> Place:
        """The same place, of one head or neuron; refuse what a component cannot show."""
        body: Any = branch.body
        gated = isinstance(body, Attention) and (body.value_maps or body.output_gate is not None)
        if isinstance(body, Experts) or gated:
            raise ValueError(
                f"site={self.name!r} is inside {'experts' if not gated else 'gated attention'}, "
                "where no single activation can be edited. Pass a residual site"
                f"{'' if gated else ', or an expert such as ' + repr(f'L{body.layer}E0')}."
            )
        if one is None:
            return self
        width = body.output.in_dim // (
            len(body.nodes()) if branch.has_heads else body.output.in_dim
        )
        first = one * width
        if first >= body.output.in_dim:
            most = body.output.in_dim // width - 1
            raise ValueError(f"site={self.name!r} does not exist. Use a number from 0 to {most}.")
        return replace(self, part=(first, first + width))

    @property
    def columns(self) -> slice:
        """The dimensions of the activation that may change."""
        whole = self.part is None or self.kind == "expert"
        return slice(None) if whole else slice(*cast(tuple[int, int], self.part))

    def state(self, operator: FrozenTransformer, capture: Capture) -> Float[Tensor, "batch pos d"]:
        """What stands at the place in the run [batch, pos, width]."""
        if self.kind == "resid":
            if self.step < len(operator.steps):
                return operator.steps[self.step].state
            last = self.step == len(operator.steps)
            # Two sites more than there are steps: before the final norm, and after it.
            return capture.resid_final if last else capture.unembed.final
        step = operator.steps[self.step]
        branch = step.branches[self.branch]
        if self.kind == "expert":
            one = branch.part(branch.body.nodes()[cast(tuple[int, int], self.part)[0]])
            return one.apply(step.state) + one.bias
        x = branch.read(step.state)
        if self.kind == "v":
            attn = cast(Attention, branch.body)
            return attn.values.apply(x) + attn.values.bias
        return branch.body.hidden_in_run(x)

    def covector(self, operator: FrozenTransformer, trace: Trace) -> Float[Tensor, "batch pos d"]:
        """The gradient of a target at the place, from the target's sweep [batch, pos, width]."""
        if self.kind == "resid":
            return trace.covectors[self.step]
        step = operator.steps[self.step]
        branch = step.branches[self.branch]
        if self.kind == "v":
            kept = trace.pulls[self.step][self.branch].kept
            heads = cast(Attention, branch.body).weights.W_V.shape[0]
            # Query heads of a group read one value, so their covectors add up.
            return kept.unflatten(-2, (heads, -1)).sum(-2).flatten(-2)
        if self.kind == "expert":
            reached = cast(Experts, branch.body).experts == cast(tuple[int, int], self.part)[0]
            # An expert can only be edited where tokens reach it: elsewhere it adds nothing.
            return trace.written[self.step] * reached.any(-1, keepdim=True)
        whole = branch.pull_to_hidden(trace.written[self.step])
        found = torch.zeros_like(whole)
        # A head or a neuron is some columns of what its sublayer mixes: others may not change.
        found[..., self.columns] = whole[..., self.columns]
        return found


def _inside(name: str) -> tuple[int, str, int | None]:
    """The block, the kind of place, and the number of one head or neuron of a name."""
    if found := _NAMES.fullmatch(name):
        layer, head, neuron, expert = (None if n is None else int(n) for n in found.groups())
        kind = "z" if head is not None else "post" if expert is None else "expert"
        return (
            cast(int, layer),
            kind,
            next((n for n in (head, neuron, expert) if n is not None), None),
        )
    for kind in _INSIDE:
        start, _, rest = name.partition(f".{LAYER_HOOKS[kind]}")
        layer = start.removeprefix("blocks.")
        if name == f"{start}.{LAYER_HOOKS[kind]}" and layer.isdecimal() and not rest:
            return int(layer), kind, None
    return -1, "resid", None


def pulled(gradient: TargetGradient, qk: bool = False, gates: bool = False) -> Trace:
    """Sweep a target down to all places.

    Args:
        gradient: The target and its run.
        qk: Whether the attention scores move, too, to first order: every covector then has the
            Jacobian's part through queries and keys.
        gates: Whether the gating ratios of MLPs move, too, to first order. With both, only the
            scales of norms stay held.

    Returns:
        The covectors of all places; with neither, the gradient's own trace.

    Raises:
        ValueError: If the run has no scores of its own, or tokens are routed to experts.
    """
    if not (qk or gates):
        return gradient.trace
    operator = gradient.operator
    scores = queries_and_keys(gradient.capture) if qk else None
    # From the top: at the final norm's output, then at the last residual site.
    covectors = [gradient.trace.covectors[-1], gradient.trace.covectors[-2]]
    written, pulls = [], []
    for step in reversed(operator.steps):
        c = covectors[-1] if step.norm is None else step.norm.apply_t(covectors[-1])
        below, own = c, []
        for branch in step.branches:
            found = branch.pull(c)
            own.append(found)
            if branch.has_heads:
                # A product rule: patterns held with values moving, plus values held with patterns
                # moving.
                below = below + found.covector + _through_scores(step, branch, c, scores)
            else:
                below = below + (_through_gates(branch, c) if gates else found.covector)
        covectors.append(below)
        written.append(c)
        pulls.append(tuple(own))
    return Trace(
        tuple(reversed(covectors)), tuple(reversed(written)), tuple(reversed(pulls)), {}, {}
    )


def _through_scores(step: Step, branch: Branch, c: Tensor, scores: Any) -> Tensor | float:
    """What moving queries and keys adds to the covector at the residual, to first order."""
    if scores is None:
        return 0.0
    both = scores(branch).readers(branch.pull_to_hidden(c), step.state)
    # Over all heads: one residual stands below them.
    return both[0].wide().sum(0) + both[1].wide().sum(0)


def _through_gates(branch: Branch, c: Tensor) -> Tensor:
    """The covector at the residual through an MLP whose ratios move to first order."""
    c = c if branch.post is None else branch.post.apply_t(c)
    c = cast(FeedForward, branch.body).tangent().apply_t(c)
    return c if branch.pre is None else branch.pre.apply_t(c)
