"""What the real model made of an edit, at one size and at many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import as_array, finite, spelled
from ..pictures import Page, Paged, Tabled, agreement, curves, curves_view, points_view, table_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOLERANCES = (0.1, 0.25)
"""Relative errors whose radius a sweep's page names."""


@spelled
@dataclass(frozen=True, eq=False)
class EditCheck(Paged, Tabled):
    """What an edit predicted, and what the real model did.

    Attributes:
        site: Where the edit was made.
        before: The target's value without the edit, in logits [batch].
        predicted: The change that the operator predicts [batch].
        real: The change in the real model [batch].
        jacobian: The change that the real model's gradient predicts; NaN if not asked for [batch].
        tops: The likeliest tokens before and after, one pair per prompt.
        kl: The mean KL divergence of the predictions at all other positions, in nats [batch].
        size: ‖δ‖ divided by the norm of what stood there [batch].
        kl_held_out: The mean KL divergence on held-out prompts to which the same vectors are
            added, from the first edited position on, in nats; NaN if not asked for [batch].
        rounding: By how much two runs of the model may differ by its rounding alone, in logits.

    Example:
        >>> from tensorlens_tl import demo
        >>> model = demo.load_model()
        >>> _, lens = model.run_with_tensorlens("The capital of France is")
        >>> check = lens.edit("Paris", versus="Rome", by=-18.0, site=2).check(model)
        >>> check.tops, check.error < 0.5
        ((('Paris', 'Rome'),), True)
    """

    site: str
    before: Float[Tensor, " batch"]
    predicted: Float[Tensor, " batch"]
    real: Float[Tensor, " batch"]
    jacobian: Float[Tensor, " batch"]
    tops: tuple[tuple[str, str], ...]
    kl: Float[Tensor, " batch"]
    size: Float[Tensor, " batch"]
    kl_held_out: Float[Tensor, " batch"]
    rounding: float = 0.0

    _COLUMNS = (
        *("prompt", "site", "before", "predicted", "real", "jacobian", "kl", "size"),
        *("kl_held_out", "top", "top_after"),
    )

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        numbers = (self.before, self.predicted, self.real, self.jacobian)
        numbers += (self.kl, self.size, self.kl_held_out)
        rows = zip(self.tops, *(column.tolist() for column in numbers), strict=True)
        for prompt, (tops, *row) in enumerate(rows):
            yield (prompt, self.site, *row, *tops)

    def _facts(self) -> dict[str, Any]:
        return {"unit": "logits; kl in nats, size of the state", "error": self.error}

    @property
    def error(self) -> float:
        """Σ |predicted − real| / Σ |real| over the prompts.

        Where no change is above the model's rounding it is 0 if none was predicted, else infinite.
        """
        # Sums before the ratio: a prompt that hardly moves has no relative error of its own.
        sums = [x.abs().sum() for x in (self.predicted, self.real, self.predicted - self.real)]
        return float(_relative(*sums, rounding=self.rounding * len(self.real)))

    def _outcome(self) -> str:
        """What became of the prediction, in a few words."""
        if self.error == torch.inf:
            up_to = float(self.predicted.abs().max())
            return f"no change seen, though up to {up_to:.2g} logits were predicted"
        seen = bool(self.real.abs().sum() > self.rounding * len(self.real))
        return f"predicted off by {self.error:.0%}" if seen else "no change, as predicted"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw predicted against real changes with matplotlib, one point per prompt.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. A point on the diagonal is a prediction that came true.

        Raises:
            ValueError: If matplotlib is missing.
        """
        series = {"operator": self.predicted.tolist()}
        if not bool(self.jacobian.isnan().all()):
            series["jacobian"] = self.jacobian.tolist()
        title = f"edit at {self.site}, {self._outcome()}"
        return agreement(ax, series, self.real.tolist(), unit="logits", title=title)

    def _page(self) -> Page:
        names = ["before", "predicted", "real", "jacobian", "kl", "size", "kl_held_out"]
        names = [name for name in names if not bool(getattr(self, name).isnan().all())]
        values = torch.stack([getattr(self, name) for name in names], 1).cpu().numpy()
        labels = [[str(number), *pair] for number, pair in enumerate(self.tops)]
        table = table_view(["prompt", "top before", "top after"], names, labels, values)
        points = points_view(
            _lines([self]), _texts([self]), ("predicted change, logits", "real change, logits")
        )
        notes = ["Changes and targets are in logits."]
        return Page(repr(self).splitlines()[0], [points, table], notes, height=760)

    def __repr__(self) -> str:
        rows = [f"Edit at {self.site}, in the real model ({self._outcome()})"]
        numbers = zip(self.before, self.predicted, self.real, self.kl, self.tops, strict=True)
        for before, predicted, real, kl, (top, after) in list(numbers)[:10]:
            rows.append(
                f"  {float(before):+.3f} → predicted {float(before + predicted):+.3f}, real "
                f"{float(before + real):+.3f}; {top!r} → {after!r}; KL elsewhere {float(kl):.2g}"
            )
        more = len(self.tops) - 10
        return "\n".join(rows + ([f"  … {more} more"] if more > 0 else []))


@spelled
@dataclass(frozen=True, eq=False)
class EditSweep(Paged, Tabled):
    """An edit at several sizes, each run in the real model.

    Attributes:
        factors: What δ was multiplied by.
        checks: What each size predicted, and what the real model did.

    Example:
        >>> from tensorlens_tl import demo
        >>> model = demo.load_model()
        >>> _, lens = model.run_with_tensorlens("The capital of France is")
        >>> edit = lens.edit("Paris", versus="Rome", to=-5.0, site=1)
        >>> sweep = edit.sweep(model, [0.1, 0.5, 1.0], jacobian=True)
        >>> [check.tops[0][1] for check in sweep.checks]
        ['Paris', 'Paris', 'Rome']
        >>> sweep.errors().shape
        torch.Size([3, 1])
    """

    factors: tuple[float, ...]
    checks: tuple[EditCheck, ...]

    _COLUMNS = ("factor", *EditCheck._COLUMNS)

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for factor, check in self._pairs():
            for row in check._rows():
                yield (factor, *row)

    def errors(self, method: str = "predicted") -> Float[Tensor, "factor batch"]:
        """Compute |prediction − real| / |real| of every size and prompt.

        Args:
            method: "predicted" (the operator) or "jacobian".

        Returns:
            The relative errors [factor, batch]. Where the real change is below the model's
            rounding it is 0 if none was predicted, else infinite.

        Raises:
            ValueError: If there is no such method.
        """
        if method not in ("predicted", "jacobian"):
            raise ValueError(f"method={method!r} predicts nothing. Use predicted or jacobian.")
        found = []
        for check in self.checks:
            predicted = getattr(check, method)
            sizes = (x.abs() for x in (predicted, check.real, predicted - check.real))
            found.append(_relative(*sizes, rounding=check.rounding))
        return torch.stack(found)

    def radius(self, tolerance: float = 0.1) -> Float[Tensor, " batch"]:
        """The largest size within a relative error.

        Args:
            tolerance: The relative error that is allowed.

        Returns:
            ‖α δ‖ divided by the norm of what stands there [batch]; 0 where no factor is within.
            A smaller size may be off by more; :meth:`errors` tells each.

        Raises:
            ValueError: If the tolerance is not a number of at least 0.
        """
        if (tolerance := finite(tolerance, "tolerance")) < 0:
            raise ValueError(f"tolerance={tolerance:g} is below 0. Pass a share such as 0.1.")
        found = torch.zeros_like(self.checks[0].size)
        for check, errors in zip(self.checks, self.errors(), strict=True):
            # The largest size that holds, also where a smaller one does not.
            found = torch.where(errors <= tolerance, check.size.maximum(found), found)
        return found

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the median relative error of the predictions by size with matplotlib.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on, with one curve per method.

        Raises:
            ValueError: If matplotlib is missing.
        """
        series = {
            name: [(float(x), float("nan"), float("nan")) for x in self._medians(method)]
            for name, method in self._methods()
        }
        title = f"edits at {self.checks[0].site}, {len(self.checks[0].before)} prompts"
        xlabel = "factor of the edit"
        return curves(ax, self.factors, series, title=title, xlabel=xlabel, ylabel="relative error")

    def _methods(self) -> list[tuple[str, str]]:
        asked = not bool(self.checks[0].jacobian.isnan().all())
        return [("operator", "predicted"), *([("jacobian", "jacobian")] if asked else [])]

    def _medians(self, method: str) -> np.ndarray:
        return as_array(self.errors(method).double().nanmedian(1).values)

    def _page(self) -> Page:
        means = [float(check.size.mean()) for check in self.checks]
        stops = [
            f"{factor:.3g} δ: {100 * mean:.2g} % of what stands there"
            for factor, mean in zip(self.factors, means, strict=True)
        ]
        # The slider starts at the edit that was asked for.
        start = min(range(len(stops)), key=lambda i: abs(self.factors[i] - 1))
        names = ("predicted change, logits", "real change, logits")
        lines, texts = _lines(self.checks), _texts(self.checks)
        points = points_view(lines, texts, names, stops, "Size", start, "Predicted against real")
        error = [(name, self._medians(method), None, None) for name, method in self._methods()]
        axes = ("factor of the edit", "relative error, median over prompts")
        across = {f"{100 * share:.0f} %": share for share in TOLERANCES}
        curve = curves_view(self.factors, error, axes, across, "Error by size", start)
        labels, values = [], []
        for factor, check in self._pairs():
            for prompt, pair in enumerate(check.tops):
                labels.append([f"{factor:.3g}", str(prompt), *pair])
                found = [check.before, check.predicted, check.real, check.jacobian, check.kl]
                values.append([float(x[prompt]) for x in (*found, check.size)])
        columns = ["before", "predicted", "real", "jacobian", "KL elsewhere", "size"]
        text = ["factor", "prompt", "top before", "top after"]
        table = table_view(text, columns, labels, np.array(values))
        notes = [self._within(share) for share in TOLERANCES]
        return Page(repr(self), [points, curve, table], notes, height=900)

    def _within(self, share: float) -> str:
        """Between which sizes the curve of errors is within a share."""
        held = self._medians("predicted") <= share
        sizes = [_percent(float(check.size.median())) for check in self.checks]
        # By size: a negative factor is an edit the other way, and no smaller one.
        pairs = sorted(zip(map(abs, self.factors), sizes, held.tolist(), strict=True))
        runs = [
            [size for _, size, _ in run] for fits, run in groupby(pairs, lambda x: x[2]) if fits
        ]
        spans = [f"of {run[0]}" + f" to {run[-1]}" * (len(run) > 1) for run in runs]
        where = f"sizes {' and '.join(spans)} of what stands there" if spans else "no size of these"
        return f"The prediction is within {share:.0%} at {where} (median over prompts)."

    def _pairs(self) -> list[tuple[float, EditCheck]]:
        return list(zip(self.factors, self.checks, strict=True))

    def __repr__(self) -> str:
        low, high = self.factors[0], self.factors[-1]
        return (
            f"Edits at {self.checks[0].site}, {len(self.checks)} sizes from {low:.3g} to "
            f"{high:.3g} δ, {len(self.checks[0].before)} prompts"
        )


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{100 * share:.1g}%"


def _relative(predicted: Tensor, real: Tensor, off: Tensor, rounding: float) -> Tensor:
    """|predicted − real| / |real|; 0 or infinite where rounding hides the real change."""
    # A change that rounding hides has no relative error: predicted to be none, it came true.
    hidden = torch.where(predicted <= rounding, 0.0, torch.inf).to(off)
    return torch.where(real <= rounding, hidden, off / real)


def _lines(checks: Sequence[EditCheck]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Predicted and real changes [check, prompt] of every method."""
    real = np.stack([as_array(check.real) for check in checks])
    methods = ("operator", "predicted"), ("jacobian", "jacobian")
    found = [(n, np.stack([as_array(getattr(c, key)) for c in checks]), real) for n, key in methods]
    return [line for line in found if not np.isnan(line[1]).all()]


def _texts(checks: Sequence[EditCheck]) -> list[str]:
    """What stands at every point: the prompt, and its likeliest tokens."""
    return [
        f"prompt {i}: {top!r} → {after!r}, size {float(check.size[i]):.0%}"
        for check in checks
        for i, (top, after) in enumerate(check.tops)
    ]
