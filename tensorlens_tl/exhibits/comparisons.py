"""Two prompts of one length: the target in each, and its difference split without a remainder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..attribution import Attribution, TargetGradient, attribute, difference
from ..checks import spelled
from ..pictures import (
    Page,
    Paged,
    Tabled,
    View,
    grid_view,
    head_cells,
    table_view,
    token_figure,
    unit_of,
)
from .operator_maps import beginning

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class PromptComparison(Paged, Tabled):
    """A target in two runs, by token, and its exact difference by token and by component.

    The differences are read by the secant, the operator between the two runs. Their rows sum to
    target(clean) − target(corrupted), and no row is what was left over.

    Attributes:
        clean: The target of this run, by token.
        corrupted: The target of the other run, by token.
        tokens: The difference, by token.
        components: The difference, by component.
        labels: The tokens of every prompt, in this run and in the other.

    Example:
        >>> from tensorlens_tl import demo
        >>> model = demo.load_model()
        >>> _, lens = model.run_with_tensorlens("The capital of France is")
        >>> _, other = model.run_with_tensorlens("The capital of Italy is")
        >>> found = lens.compare(other, "Paris", "Rome")
        >>> found.tokens.completeness_error < 1e-5
        True
        >>> value = found.clean.target_value - found.corrupted.target_value
        >>> bool((found.components.values.sum(1) - value).abs().max() < 1e-3)
        True
    """

    clean: Attribution
    corrupted: Attribution
    tokens: Attribution
    components: Attribution
    labels: tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]

    _COLUMNS = ("part", "prompt", "label", "node", "pos", "value")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for part in ("clean", "corrupted", "tokens", "components"):
            for row in getattr(self, part)._rows():
                yield part, *row

    def _facts(self) -> dict[str, Any]:
        return {"target": self.clean.target}

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        a, b = (float(one.target_value[0]) for one in (self.clean, self.corrupted))
        head = f"{self.clean.target[0]}: {a:.4g} here, {b:.4g} there"
        return f"PromptComparison of {head}\n{self.tokens!r}"

    def plot(self, ax: Axes | None = None, prompt: int = 0) -> Axes:
        """Draw both runs and their difference as strips with matplotlib, position by position.

        Args:
            ax: Axes to draw on. None makes a figure.
            prompt: Index of the prompt in the batch.

        Returns:
            The axes drawn on: this run, the other run, and the difference. What has no position is
            the last column.

        Raises:
            ValueError: If matplotlib is missing.
        """
        parts = (self.clean, self.corrupted, self.tokens)
        numbers = [_by_position(one[prompt]) for one in parts]
        here, there = (own[prompt] for own in self.labels)
        places = [*range(len(here)), None]
        values = [[found.get(place, 0.0) for place in places] for found in numbers]
        names = [[*own, "constants"] for own in (here, there, here)]
        a, b = (float(one.target_value[prompt]) for one in (self.clean, self.corrupted))
        titles = [f"here {a:+.3g}", f"there {b:+.3g}", f"difference {a - b:+.3g}"]
        target = self.clean.target[prompt]
        return token_figure(ax, names, values, titles, target, unit_of(target))

    def _page(self) -> Page:
        views = [view for prompt in range(len(self)) for view in self._views(prompt)]
        worst = max(
            error or 0.0
            for error in (self.tokens.completeness_error, self.components.completeness_error)
        )
        notes = [
            f"The differences sum to that of the targets, off by at most {worst:.0e} of Σ|·|.",
            "The secant reads them, the operator between the two runs: no row is a remainder.",
        ]
        return Page(
            "Two prompts and their difference", views, notes, tabs=len(self) > 1, height=860
        )

    def _views(self, prompt: int) -> list[View]:
        numbers = [_by_position(one[prompt]) for one in (self.clean, self.corrupted, self.tokens)]
        places = list(dict.fromkeys(place for found in numbers for place in found))
        places.sort(key=lambda place: (place is None, place))
        here, there = (own[prompt] for own in self.labels)
        names = [
            ["constants and changes", ""] if i is None else [f"{here[i]} @{i}", there[i]]
            for i in places
        ]
        values = np.array([[found.get(i, 0.0) for found in numbers] for i in places])
        a, b = (float(one.target_value[prompt]) for one in (self.clean, self.corrupted))
        caption = f"Sums: {a:+.6g} here, {b:+.6g} there, difference {a - b:+.6g}."
        table = table_view(
            ["token here", "token there"],
            ["here", "there", "difference"],
            names,
            values,
            caption,
            f"{self.clean.target[prompt]}, by position",
            together=True,
        )
        one = self.components[prompt]
        nodes = [source.node for source in one.sources]
        down, across, cells, beside = head_cells(nodes, one.values[0].double().tolist())
        unit, parts = unit_of(self.clean.target[prompt]), [table]
        if down:
            heading = "The difference, by component"
            parts.append(grid_view(down, across, cells, ("layer", "part"), unit, heading))
        if beside:
            labels, found = [[name] for name in beside], np.array([[v] for v in beside.values()])
            parts.append(table_view(["outside the layers"], ["difference"], labels, found))
        tab = f"{prompt + 1}: {beginning(here)}"
        return [replace(part, tab=tab) for part in parts]


def _by_position(one: Attribution) -> dict[int | None, float]:
    """The numbers of one prompt by position among its real tokens; None for all other rows."""
    start, found = one.spans[0][0], {}
    for source, value in zip(one.sources, one.values[0].double().tolist(), strict=True):
        place = None if source.pos is None else source.pos - start
        found[place] = found.get(place, 0.0) + value
    return found


def compare_prompts(clean: TargetGradient, corrupted: TargetGradient) -> PromptComparison:
    """Split a target in two runs of one length, and its difference between them.

    Args:
        clean: The target in this run, pulled back.
        corrupted: The same target in the other run.

    Returns:
        All four splits.
    """
    here, there = (attribute(gradient, "token", "direct") for gradient in (clean, corrupted))
    by_token, by_component = (
        difference(clean, corrupted, by, "secant") for by in ("token", "component")
    )
    labels = clean.capture.prompts.strings, corrupted.capture.prompts.strings
    return PromptComparison(here, there, by_token, by_component, labels)
