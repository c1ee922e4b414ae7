"""Where an edit would matter most, from one sweep: sites, heads, neurons, experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Target, TargetGradient
from ..checks import as_array, spelled
from ..features import Feature, Reading, by_feature
from ..operator import Capture, FrozenTransformer
from ..pictures import Page, Paged, Tabled, bars, cell_map, grid_view, table_view
from ..sublayers import Experts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("site", "head", "neuron", "expert", "feature")
"""What edits can be ranked by."""

REPLACED = ("zero", "mean", "resample")
"""What the activations of features outside a circuit become."""


@spelled
@dataclass(frozen=True, eq=False)
class EditRanking(Paged, Tabled):
    """Predicted changes of a target by many edits, none of which was run.

    Attributes:
        labels: A name of every edit: "L2H1", "L2N7", "L2E1", or a site with its position.
        values: The predicted change in logits [batch, edit].
        by: What is ranked.
        what: What each edit is, in words.
        every_feature: The feature of every edit; () where other parts are ranked.
    """

    labels: tuple[str, ...]
    values: Float[Tensor, "batch edit"]
    by: str
    what: str
    every_feature: tuple[Feature, ...] = ()

    _COLUMNS = ("prompt", "label", "predicted")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for prompt, row in enumerate(self.values.tolist()):
            for label, value in zip(self.labels, row, strict=True):
                yield prompt, label, value

    def _facts(self) -> dict[str, Any]:
        return {"unit": "logits", "by": self.by, "what": self.what}

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The edits of the largest change, in the mean over the prompts.

        Args:
            k: Number of edits to return.

        Returns:
            Pairs of a name and a change in logits, largest |change| first.
        """
        mean = self.values.mean(0)
        return [(self.labels[i], float(mean[i])) for i in self._order(k)]

    def features(self, k: int = 10) -> list[Feature]:
        """The features of the largest change, in the mean over the prompts, as a circuit's.

        Args:
            k: Number of features to return.

        Returns:
            The features, largest |change| first, for ``keep=`` of ``lens.feature_faithfulness``.

        Raises:
            ValueError: If other parts than features are ranked, or there are not so many.
        """
        if self.by != "feature":
            raise ValueError(f"The edits are by {self.by}. Rank by='feature' with saes=.")
        if not 0 <= k <= len(self.every_feature):
            raise ValueError(f"k={k} features are not there. Pass up to {len(self.every_feature)}.")
        return [self.every_feature[i] for i in self._order(k)]

    def _order(self, k: int) -> list[int]:
        return self.values.mean(0).abs().argsort(descending=True, stable=True)[:k].tolist()

    def plot(self, ax: Axes | None = None, top: int = 20) -> Axes:
        """Draw the changes with matplotlib, in the mean over the prompts.

        Args:
            ax: Axes to draw on. None makes a figure.
            top: Number of bars, where edits are heads or neurons.

        Returns:
            The axes drawn on: a map of sites by positions, or bars of the largest changes.

        Raises:
            ValueError: If matplotlib is missing.
        """
        if self.by == "site":
            sites, places, grid = self._grid()
            names = ("", "position")
            return cell_map(
                ax, grid, sites, places, unit="logits", title=self.what, axis_names=names
            )
        names, values = zip(*self.top(top), strict=True)
        more = len(self.labels) - len(names)
        left = f"{more} more" if more else ""
        return bars(ax, names, values, unit="logits", title=self.what, left_out=left)

    def _grid(self) -> tuple[list[str], list[str], list[list[float]]]:
        """Sites, positions, and the mean change of every site's edit at every position."""
        parts = [label.rpartition("@") for label in self.labels]
        sites, _, places = (list(dict.fromkeys(part)) for part in zip(*parts, strict=True))
        return sites, places, self.values.mean(0).reshape(len(sites), len(places)).tolist()

    def _page(self) -> Page:
        mean, views = as_array(self.values.double().mean(0)), []
        if self.by == "site":
            views.append(grid_view(*self._grid(), ("site", "position"), "logits", self.what))
        labels = [[label] for label in self.labels]
        views.append(table_view(["edit"], ["change"], labels, mean[:, None], sort=0))
        notes = [
            "Predicted changes in logits, in the mean over the prompts. None was run: ask .check."
        ]
        return Page(f"Edits by {self.by}: {self.what}", views, notes, height=760)

    def __repr__(self) -> str:
        rows = [f"Edits by {self.by}: {self.what}, predicted change in logits"]
        rows += [f"    {value:+.4g}  {label}" for label, value in self.top(10)]
        more = len(self.labels) - 10
        return "\n".join(rows + ([f"  … {more} more: .top(k)"] if more > 0 else []))


@spelled
def rank_edits(
    capture: Capture,
    operator: FrozenTransformer,
    target: Target,
    by: str,
    budget: int | float,
    readings: Sequence[Reading] = (),
    ablation: str = "zero",
    corrupted: Sequence[Reading] | None = None,
) -> EditRanking:
    """Predict many edits of a run from one sweep.

    Args:
        capture: The captured run.
        operator: The operator of that run.
        target: The target that the edits change.
        by: "site", "head", "neuron", "expert" or "feature".
        budget: Size of the edit of a site, as a share of what stands there.
        readings: The features of every site, for "feature".
        ablation: What replaces a feature's activations, one of :data:`REPLACED`.
        corrupted: The features of every site in another run, for "resample".

    Returns:
        The predicted change of every edit.

    Raises:
        ValueError: If ``by`` does not exist, or the model has no such parts.
    """
    if by not in KINDS:
        raise ValueError(f"by={by!r} cannot be ranked. Use one of {', '.join(KINDS)}.")
    gradient = TargetGradient(capture, operator, target)
    trace = gradient.trace
    labels: list[str] = []
    values: list[Tensor] = []
    every: list[Feature] = []
    if by == "site":
        if not budget > 0:
            raise ValueError(f"budget={budget!r} is no share. Pass a number above 0, such as 0.1.")
        # ⟨g, δ⟩ is largest along g: ‖δ‖ ‖g‖, with ‖δ‖ = budget ‖x‖.
        names = [f"@{i}" for i in range(capture.frame.n_pos)]
        for step, g in zip(operator.steps, trace.covectors, strict=False):
            values.append(budget * step.state.norm(dim=-1) * g.norm(dim=-1))
            labels += [f"{step.site}{name}" for name in names]
        what = f"the best edit of {budget:.0%} of what stands there"
    elif by == "feature":
        others = replacements(readings, ablation, corrupted)
        for reading, other in zip(readings, others, strict=True):
            # For its warning: the edits keep the error, and it may be more than the features.
            by_feature(gradient, [reading])
            fires = (activations(reading) != 0) | (other != 0)  # in either run, at any position
            there = fires.flatten(0, 1).any(0).nonzero()[:, 0]
            values.append(feature_effects(gradient, reading, other)[:, there])
            labels += [str(reading.node(i)) for i in there.tolist()]
            every += [Feature(reading.dictionary, i) for i in there.tolist()]
        what = f"each feature {_DONE[ablation]} at all positions, the error kept"
    else:
        for step, c in zip(operator.steps, trace.written, strict=True):
            for branch in step.branches:
                mixture = isinstance(branch.body, Experts)
                if branch.has_heads != (by == "head") or mixture != (by == "expert"):
                    continue
                here = branch.body.hidden_in_run(branch.read(step.state))
                if mixture:
                    # An expert is removed with its routing weight and its own bias.
                    y = c if branch.post is None else branch.post.apply_t(c)
                    share = -branch.body.node_shares(here, y)
                else:
                    # ⟨g, −h⟩ dimension by dimension: the edit that sets the activation to 0.
                    share = -(here * branch.pull_to_hidden(c))
                if by == "head":
                    # A head is d_head dimensions of z, removed together.
                    share = branch.body.by_node(share).sum(-1)
                share = share.sum(1)  # over positions
                values.append(share)
                letter = {"head": "H", "neuron": "N", "expert": "E"}[by]
                labels += [f"L{step.layer}{letter}{i}" for i in range(share.shape[1])]
        what = f"each {by} removed at all positions"
    if not values:
        raise ValueError(f"by={by!r} has nothing to rank here. Rank by='site' instead.")
    return EditRanking(tuple(labels), torch.cat(values, -1), by, what, tuple(every))


# --- Features replaced

_DONE = {"zero": "removed", "mean": "at its mean", "resample": "as in the corrupted prompt"}


def replacements(
    readings: Sequence[Reading], ablation: str, corrupted: Sequence[Reading] | None
) -> list[Float[Tensor, "batch pos _"]]:
    """The activations that features get outside a circuit, for every site.

    Args:
        readings: The features of every site in the run.
        ablation: What replaces the activations, one of :data:`REPLACED`.
        corrupted: The features of every site in another run, for "resample".

    Returns:
        A number for every prompt, position and feature of each dictionary.

    Raises:
        ValueError: If the ablation does not exist, or does not go with ``corrupted``.
    """
    if ablation not in REPLACED:
        raise ValueError(f"ablation={ablation!r} does not exist. Use one of {', '.join(REPLACED)}.")
    if (ablation == "resample") != (corrupted is not None):
        raise ValueError(
            f"ablation={ablation!r} and corrupted= do not go together. Pass corrupted= with "
            "ablation='resample', and only there."
        )
    if ablation == "resample":
        for reading, other in zip(readings, corrupted or (), strict=True):
            if other.error.shape != reading.error.shape:
                raise ValueError(
                    f"corrupted= has prompts of shape {list(other.error.shape[:2])}, and this lens "
                    f"{list(reading.error.shape[:2])}. Pass prompts of the same lengths."
                )
        return [activations(other) for other in corrupted or ()]
    found = [activations(reading) for reading in readings]
    if ablation == "zero":
        return [torch.zeros_like(z) for z in found]
    # Over all real tokens, also those at which the feature is silent; padding is not counted.
    means = [z.sum((0, 1)) / max(1, r.n_real) for z, r in zip(found, readings, strict=True)]
    return [mean.expand_as(z) for mean, z in zip(means, found, strict=True)]


def activations(reading: Reading) -> Float[Tensor, "batch pos d_sae"]:
    """What every feature of a dictionary is in a run, at every position; 0 where it is silent.

    Args:
        reading: The features of one site.

    Returns:
        The activations, for every prompt.
    """
    batch, n_pos = reading.error.shape[:2]
    z = reading.acts.new_zeros(batch * n_pos, reading.dictionary.d_sae)
    z[reading.at, reading.features] = reading.acts
    return z.view(batch, n_pos, -1)


def feature_effects(
    gradient: TargetGradient, reading: Reading, other: Float[Tensor, "batch pos d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """What the target is predicted to gain where a feature is replaced: Σ_pos (z′ − z) ⟨g, d⟩.

    Args:
        gradient: The target's covectors, which are held.
        reading: The features of one site.
        other: The activations z′ that replace z.

    Returns:
        The change of every prompt's target, feature by feature.
    """
    g, W = reading.place.covectors(gradient.trace), reading.dictionary.W_dec
    moved = (other - activations(reading)) * (g @ W.to(g).T)
    # What a dictionary gives back is in units of its own norm, position by position.
    return (moved * reading.unscale.view(*moved.shape[:2], 1)).sum(1)
