"""Where a dictionary writes in one run: a residual site, or what a sublayer adds to the residual.

A residual site is all that goes on. What a sublayer adds is one part of the sum after it, so what
goes past the sublayer is a row of its own,

    m = ⟨g, y⟩ + Σ_p ⟨c_p, x_p + what stands beside⟩ + the constants after,    g = c, or W_Oᵀ c at z

with y what the sublayer adds, x the residual before it, and c the covector of the sum.

Where SAELens spliced an SAE in, what the SAE read is what stood there before, and what goes on is
what it gave back. The difference is a constant of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from jaxtyping import Float
from torch import Tensor

from ..graph import layer_site, resid_site, site_parts
from ..maps import Norm, Shift
from ..operator import Branch, Capture, FrozenTransformer, Step, Trace
from ..readers import MLP_INPUTS, MLP_OUT, SUBLAYER_SITES
from .dictionary import FeatureDictionary


@dataclass(frozen=True, eq=False)
class Place:
    """Where a dictionary writes in one run.

    Attributes:
        layer: The number of the block.
        name: "pre", "mid" or "post" of a residual site; "attn_out", "z" or "mlp_out" of a sublayer.
        site: The hook point that the dictionary names.
        hook: The hook point of the host that is edited.
        index: The number of the residual site, or of the step that the sublayer is in.
        step: The step of a sublayer; None for a residual site.
        branches: The branches of the step that are the sublayer: one, or the experts and the shared
            expert of a mixture.
    """

    layer: int
    name: str
    site: str
    hook: str
    index: int
    step: Step | None = None
    branches: tuple[Branch, ...] = ()

    @classmethod
    def of(cls, site: str, operator: FrozenTransformer) -> Place:
        """Find a place by the name of its hook point.

        Args:
            site: A residual site, or the output of a sublayer.
            operator: The operator of the run.

        Returns:
            The place in this run.

        Raises:
            ValueError: If the model has no such place.
        """
        layer, name = place_of(site)
        heads, normed = name != "mlp_out", operator.steps[0].norm is not None
        if normed and name in ("mid", "post", "attn_out"):
            raise ValueError(
                f"This model normalizes the residual, and hosts differ in what stands at {site!r}. "
                f"Pass a dictionary of {resid_site(2, 'pre')!r}, or of a sublayer's z or mlp_out."
            )
        if site_parts(site)[0] >= 0:
            index = operator.site_index(site)
            return cls(layer, name, site, operator.sites[index], index)
        for index, step in enumerate(operator.steps):
            own = tuple(b for b in step.branches if b.has_heads == heads)
            if step.layer == layer and own:
                added = layer_site(layer, MLP_OUT) if name == "mlp_out" else site
                if site != added and own[0].post is not None:
                    raise ValueError(
                        f"A norm follows {site!r} before the residual. Pass a dictionary of "
                        f"{added!r}."
                    )
                return cls(layer, name, site, added, index, step, own)
        last = operator.steps[-1].layer
        lack = f"its last block is {last}" if layer > last else "that block has no MLP"
        raise ValueError(f"This model has no {site!r}: {lack}. Pass a dictionary of this model.")

    @staticmethod
    def read_by(
        dictionary: FeatureDictionary, operator: FrozenTransformer
    ) -> tuple[int, Norm | None]:
        """Where a dictionary reads the residual, and the norm that it reads it through.

        Args:
            dictionary: An SAE of the residual, or a transcoder.
            operator: The operator of the run.

        Returns:
            The number of the residual site, and the norm; None where there is none.

        Raises:
            ValueError: If the model has no such place.
        """
        site = dictionary.site
        if site_parts(site)[0] >= 0:
            return Place.of(site, operator).index, None
        number, _, point = site.removeprefix("blocks.").partition(".")
        layer = int(number) if number.isdecimal() else -1
        if layer < 0 or point not in MLP_INPUTS:
            known = (resid_site(2, "mid"), *(layer_site(2, name) for name in MLP_INPUTS))
            raise ValueError(
                f"{dictionary} reads {site!r}, which is no place that can be read in a run. Pass "
                f"one of a residual site or an MLP's input: {', '.join(known)}."
            )
        place, kind = Place.of(layer_site(layer, MLP_OUT), operator), MLP_INPUTS[point]
        norm = place.branches[0].pre
        if kind == "read":
            return place.index, norm
        if norm is None or not norm.name.endswith("ln2"):
            plain = next(name for name, how in MLP_INPUTS.items() if how == "read")
            raise ValueError(
                f"This model has no {site!r}: its MLP has no norm of its own. Pass a transcoder "
                f"that reads {layer_site(layer, plain)!r}."
            )
        weights = norm.weights
        if kind == "weighted" or (weights.w is None and weights.b is None):
            return place.index, norm
        if weights.center:
            raise ValueError(
                f"Versions of transformer_lens differ in whether {site!r} of a LayerNorm holds its "
                "weight and bias. Load the model with its norms folded, or pass site= of the MLP's "
                "input."
            )
        return place.index, replace(norm, weights=replace(weights, w=None, b=None))

    @property
    def first_after(self) -> int:
        """The number of the first residual site that holds what the dictionary gives back."""
        # A sublayer's output enters the residual at the site after its step.
        return self.index + (self.step is not None)

    def covectors(self, trace: Trace) -> Float[Tensor, "*many batch pos d"]:
        """The gradient of a target at the place.

        Args:
            trace: The target, pulled to every site.

        Returns:
            One covector per prompt and position.
        """
        if self.step is None:
            return trace.covectors[self.index]
        return self.inside(trace.written[self.index])

    def inside(self, c: Float[Tensor, "*many batch pos d_model"]) -> Float[Tensor, "*many pos d"]:
        """Covectors of the residual after the place, as covectors at it."""
        return self.branches[0].pull_to_hidden(c) if self.name == "z" else c

    def edited_at(self, operator: FrozenTransformer) -> str:
        """The place where an edit of what the dictionary gives back is made.

        Args:
            operator: The operator of the run.

        Returns:
            The place itself; for what a sublayer adds to the residual the site after it.

        Raises:
            ValueError: If a norm stands between the two.
        """
        if self.step is None or self.name == "z":
            return self.hook
        if self.step.norm is not None:
            raise ValueError(
                f"An edit at {self.hook!r} is not served, as this model normalizes the residual "
                "right after it. Pass a feature of another site."
            )
        return operator.sites[self.first_after]

    def written_by(self, below: Sequence[int]) -> range:
        """The numbers of the writers that stand for what the dictionary gives back.

        Args:
            below: How many writers come before each step.

        Returns:
            All writers before a residual site, or the sublayer's own. Constants beside z, such as
            b_O, stay writers.
        """
        if self.step is None:
            return range(below[self.index])
        # Writers of a step stand branch by branch: the nodes of each, then its other constants.
        before = (b for b in self.step.branches[: self.step.branches.index(self.branches[0])])
        start = below[self.index] + sum(map(_writers, before))
        if self.name == "z":
            return range(start, start + len(self.branches[0].body.nodes()))
        return range(start, start + sum(map(_writers, self.branches)))

    def state(
        self, operator: FrozenTransformer, capture: Capture, read: bool = False
    ) -> Float[Tensor, "batch pos d"]:
        """What stands at the place in the run.

        Args:
            operator: The operator of the run.
            capture: The captured run.
            read: Whether to give what a spliced SAE read there, and not what it gave back.

        Returns:
            The values in the dtype of the operator.
        """
        splice = self.splice(operator, capture)
        if self.step is None:
            found = state_at(operator, capture, self.index)
            # A recorded residual is what went on, the hook's edit included: what was read lacks it.
            return found if splice is None or not read else found - splice
        x = capture.frame.cast(self.step.state)
        first, *others = self.branches
        if self.name == "z":
            found = first.body.hidden_in_run(first.read(x))
        else:
            found = sum((_output(b, x) for b in others), _output(first, x))
        # What a sublayer computes comes before the hook's edit: here what went on lacks it.
        return found if splice is None or read else found + splice

    def splice(
        self, operator: FrozenTransformer, capture: Capture
    ) -> Float[Tensor, "batch pos d"] | None:
        """What an SAE of SAELens that is spliced in here changed in the run, or None.

        Args:
            operator: The operator of the run.
            capture: The captured run.

        Returns:
            What the SAE gave back less what it read.
        """
        edits: Sequence[Shift] = ()
        if self.name == "z":
            edits = tuple(self.branches[0].body.edits.values())
        elif self.step is not None:
            edits = self.step.edits
        elif self.index == 0:
            return capture.embeddings.get(self.splice_name)
        else:
            edits = operator.steps[self.index - 1].edits
        return next((edit.constant for edit in edits if edit.name == self.splice_name), None)

    @property
    def splice_name(self) -> str:
        """The name of the constant that a spliced SAE leaves here."""
        return f"L{self.layer}.{self.site.rpartition('.')[2]}[sae]"

    def past(self, trace: Trace) -> Float[Tensor, "batch pos"]:
        """⟨covector, the residual before the sublayer and what stands beside it⟩, by position."""
        c, step = trace.written[self.index], cast(Step, self.step)
        others = (b for b in step.branches if b not in self.branches)
        x = step.state.to(c)
        # In a parallel block the other branches write at the same step, beside this one.
        return (c * sum((_output(b, x) for b in others), x)).sum(-1)

    def constants_after(self, operator: FrozenTransformer, trace: Trace) -> Iterator[str]:
        """Name the constants that are added after the place, the last ones first.

        Args:
            operator: The operator of the run.
            trace: A target pulled to every site.

        Yields:
            Names of ``trace.effects``.
        """
        names, after = {*trace.top}, self.first_after
        for step, pulls in zip(operator.steps[after:], trace.pulls[after:], strict=True):
            names |= {edit.name for edit in step.edits} | step.own.keys()
            names |= {name for pull in pulls for name in pull.effects}
        if self.step is not None:
            names |= {edit.name for edit in self.step.edits} | self.step.own.keys()
            # Behind z stand b_O and the post-norm's b; behind a whole output nothing of the branch
            # does.
            names.update(*(b.outside_names() for b in self.branches if self.name == "z"))
            names.discard(self.splice_name)  # in what goes on from here
        yield from (name for name in trace.effects if name in names)


def place_of(site: str) -> tuple[int, str]:
    """Split the name of a place into the block and the place.

    Args:
        site: The name of a hook point.

    Returns:
        The number of the block, and one of "pre", "mid", "post", "attn_out", "z" and "mlp_out". For
        any other text −1 and "".
    """
    if (found := site_parts(site))[0] >= 0:
        return found
    layer, _, point = site.removeprefix("blocks.").partition(".")
    named = layer.isdecimal() and layer_site(int(layer), point) == site
    return (int(layer), SUBLAYER_SITES[point]) if named and point in SUBLAYER_SITES else (-1, "")


def input_of(
    dictionary: FeatureDictionary, operator: FrozenTransformer, capture: Capture
) -> Float[Tensor, "batch pos d_in"]:
    """What a dictionary reads in a run.

    Args:
        dictionary: An SAE, or a transcoder.
        operator: The operator of the run.
        capture: The captured run.

    Returns:
        The values in the dtype of the operator.

    Raises:
        ValueError: If the model has no such place.
    """
    if place_of(dictionary.site)[0] >= 0:
        return Place.of(dictionary.site, operator).state(operator, capture, read=True)
    index, norm = Place.read_by(dictionary, operator)
    x = state_at(operator, capture, index)
    # With the scale of the run, which is what the host's own norm gave to the MLP.
    return x if norm is None else norm.apply(x) + norm.bias


def state_at(
    operator: FrozenTransformer, capture: Capture, index: int
) -> Float[Tensor, "batch pos d_model"]:
    """What stands at a residual site of a run.

    Args:
        operator: The operator of the run.
        capture: The captured run.
        index: The number of the site.

    Returns:
        The residual in the dtype of the operator.
    """
    found = operator.steps[index].state if index < len(operator.steps) else capture.resid_final
    return capture.frame.cast(found)


def _writers(branch: Branch) -> int:
    """How many writers a branch has: its nodes, and its constants that no node holds."""
    return len(branch.body.nodes()) + len(branch.outside_names())


def _output(branch: Branch, x: Tensor) -> Float[Tensor, "batch pos d_model"]:
    """What a branch adds in the run, with all its constants."""
    return branch.map.apply(x) + branch.map.bias
