"""Predicted against real: one position's residual replaced by its twin's, in many prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checks import spelled
from ..evaluation import rank_correlation
from ..hosts import adapt
from ..operator import FrozenTransformer
from ..pictures import Page, Paged, Tabled, agreement, points_view, table_view
from ..recording import freeze
from .asking import Asked
from .real_runs import jacobian_covectors
from .study import case_of, right_cases

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@spelled
@dataclass(frozen=True, eq=False)
class Predictions(Paged, Tabled):
    """Predicted and real changes of a target under the same edits.

    Attributes:
        predicted: The predictions by method: "operator", "operator_qk", "operator_qk_gates",
            "jacobian".
        real: The changes in the real model.
    """

    predicted: dict[str, list[float]]
    real: list[float]

    _COLUMNS = ("edit", "method", "predicted", "real")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for method, values in self.predicted.items():
            for edit, pair in enumerate(zip(values, self.real, strict=True)):
                yield (edit, method, *pair)

    def _facts(self) -> dict[str, Any]:
        return {"unit": "logits"}

    def error(self, method: str) -> float:
        """Σ |predicted − real| / Σ |real|."""
        pairs = zip(self.predicted[method], self.real, strict=True)
        # nan where nothing moved: then there is no error to speak of.
        return sum(abs(p - r) for p, r in pairs) / (sum(map(abs, self.real)) or math.nan)

    def pearson(self, method: str) -> float:
        """Pearson's correlation of predicted and real changes."""
        both = torch.tensor([self.predicted[method], self.real], dtype=torch.float64)
        return float(torch.corrcoef(both)[0, 1])

    def spearman(self, method: str) -> float:
        """Spearman's rank correlation of predicted and real changes."""
        return rank_correlation(self.predicted[method], self.real)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw predicted against real changes with matplotlib, one point per edit and method.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. A point on the diagonal is a prediction that came true.

        Raises:
            ValueError: If matplotlib is missing.
        """
        return agreement(ax, self.predicted, self.real, unit="logits")

    def _page(self) -> Page:
        real = np.array(self.real)
        lines = [(method, np.array(x), real) for method, x in self.predicted.items()]
        labels = [f"edit {i}" for i in range(len(real))]
        names = ("predicted change, logits", "real change, logits")
        points = points_view(lines, labels, names)
        numbers = np.stack([*(np.array(x) for x in self.predicted.values()), real], 1)
        columns = [*self.predicted, "real"]
        table = table_view(["edit"], columns, [[str(i)] for i in range(len(real))], numbers)
        notes = [line.strip() for line in repr(self).splitlines()]
        return Page("Predicted against real", [points, table], notes, height=860)

    def __repr__(self) -> str:
        rows = [f"{len(self.real)} edits, predicted and real: error, Pearson"]
        rows += [f"{m:>14}  {self.error(m):6.1%}  {self.pearson(m):+.3f}" for m in self.predicted]
        return "\n".join(rows)


@spelled
def predict(
    model: Any,
    cases: Iterable[Any],
    site: str | int,
    methods: Sequence[str] = ("operator",),
    gate: str = "gate",
) -> Predictions:
    """Patch one position of every prompt by its corrupted twin's, and compare the predictions.

    Args:
        model: A host model, or a Hugging Face model.
        cases: As for :func:`evaluate`; prompt and twin have equally many tokens.
        site: A residual site.
        methods: "operator", "operator_qk" (with queries and keys to first order),
            "operator_qk_gates" (with gating ratios, too), "jacobian".
        gate: How gated MLPs are made linear, as for :func:`tensorlens_tl.capture`.

    Returns:
        One prediction per prompt and position where prompt and twin differ at the site.

    Raises:
        ValueError: If a method does not exist, or twins have other lengths.

    Example:
        >>> from tensorlens_tl import demo, editing
        >>> model, cases = demo.load_model(), demo.prompts("facts", 8)
        >>> found = editing.predict(model, cases, 1, methods=("operator", "jacobian"))
        >>> found.error("operator") < found.error("jacobian")
        True
    """
    known = {"operator": (False, False), "operator_qk": (True, False)}
    known |= {"operator_qk_gates": (True, True), "jacobian": None}
    for method in methods:
        if method not in known:
            raise ValueError(f"methods= has {method!r}. Use some of {', '.join(known)}.")
    adapter = adapt(model)
    made, capture, goal = right_cases(adapter, [case_of(case) for case in cases], gate)
    _, twins = freeze(adapter, [case[1] for case in made], gate=gate)
    if twins.prompts.spans != capture.prompts.spans:
        raise ValueError(
            "A prompt and its corrupted prompt have different numbers of tokens. Pass pairs of "
            "equal length."
        )
    operator = FrozenTransformer.of(capture)
    asked = {
        m: Asked(capture, operator, site, None, "identity", *moves)
        for m in methods
        if (moves := known[m]) is not None
    }
    first = Asked(capture, operator, site, None)
    other = first.place.state(FrozenTransformer.of(twins), twins)
    # Padding is no position, and hosts leave any numbers there.
    difference = (other - first.state) * capture.frame.real[..., None]
    rows = {m: one.covector(goal.on(capture)) for m, one in asked.items()}
    if "jacobian" in methods:
        rows["jacobian"], _ = jacobian_covectors(adapter, capture, first.place, goal)
    predicted: dict[str, list[float]] = {m: [] for m in methods}
    real: list[float] = []
    moved = difference.abs().sum(-1) > 0
    for pos in moved.any(0).nonzero().flatten().tolist():
        delta = torch.zeros_like(difference)
        # One position of all prompts at once: prompts do not meet, so one run serves them.
        delta[:, pos] = difference[:, pos]
        check = first.edit(goal, delta).check(adapter.model)
        # Where prompt and twin agree there is no edit, and 0 = 0 would flatter every method.
        here = moved[:, pos].nonzero().flatten().tolist()
        real += [float(check.real[i]) for i in here]
        for m in methods:
            # One sweep per method gave the covectors of all positions; a patch is a dot product.
            numbers = (rows[m][:, pos] * delta[:, pos]).sum(-1)
            predicted[m] += [float(numbers[i]) for i in here]
    return Predictions(predicted, real)
