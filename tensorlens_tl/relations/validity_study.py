"""Local validity: how far from a prompt the frozen operator tells what the real model would do.

``validity_errors`` defines the errors of the operator and of the Jacobian. This file measures
them on many prompts.

1. Capture every prompt.
2. Draw one direction of each kind from each prompt.
3. Measure both errors along the directions, at every size.
4. Take medians over prompts, with intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checks import need, no_table, progress_bar, spelled
from ..evaluation import Estimate, bootstrap, median, read_study, study_text
from ..pictures import Page, Paged, View, curves, curves_view, interval_view, intervals_over
from ..plugin import capture
from .linear_relation import MAP_METHODS
from .validity_errors import DIRECTION_KINDS, SIZES, direction_errors, draw, radius

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

STUDY_FORMAT = "tensorlens_tl validity study 1"


@dataclass(frozen=True)
class ErrorCurve:
    """Errors of one prompt along a direction of one kind.

    Attributes:
        kind: Kind of the direction, one of :data:`DIRECTION_KINDS`.
        operator: Error r of the operator at every size.
        jacobian: Error of the Jacobian's first order at every size.
        limit: Limit of r as δ goes to 0.
        held: The same limit with a part of the real model held, by the part's name.
        whole: The size at which δ is the whole swap, or the steering vector as it is.
    """

    kind: str
    operator: tuple[float, ...]
    jacobian: tuple[float, ...]
    limit: float
    held: dict[str, float]
    whole: float


@spelled
@dataclass(frozen=True)
class ValidityStudy(Paged):
    """Error curves of many prompts, and their medians.

    Attributes:
        model: Name of the model.
        dtype: Dtype of the model, such as "float32".
        seed: Seed of the directions.
        n: Number of prompts.
        sizes: Sizes of δ, as shares of ‖X‖ at the positions that δ moves.
        rows: An error curve per prompt and kind of direction.
    """

    model: str
    dtype: str
    seed: int
    n: int
    sizes: tuple[float, ...]
    rows: tuple[ErrorCurve, ...]

    def select(self, kind: str) -> list[ErrorCurve]:
        """Give the curves of a kind, one per prompt.

        Args:
            kind: One of :attr:`kinds`.

        Returns:
            An error curve per prompt.

        Raises:
            ValueError: If there is none.
        """
        if not (found := [row for row in self.rows if row.kind == kind]):
            raise ValueError(
                f"The study has no directions of kind {kind!r}. "
                f"Choose one of {', '.join(self.kinds)}."
            )
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of directions in the study."""
        return tuple(dict.fromkeys(row.kind for row in self.rows))

    def error(self, kind: str, method: str, size: float) -> Estimate:
        """Give the median error over prompts at a size.

        Args:
            kind: One of :attr:`kinds`.
            method: Name of the map whose error is asked for, one of :data:`MAP_METHODS`.
            size: One of the study's sizes.

        Returns:
            The median and its 95 % interval over prompts.
        """
        at = self.sizes.index(size)
        return bootstrap([getattr(row, method)[at] for row in self.select(kind)], median)

    def limit(self, kind: str, held: str | None = None) -> Estimate:
        """Give the median over prompts of the limit of r as δ goes to 0.

        The Jacobian's error has the limit 0.

        Args:
            kind: One of :attr:`kinds`.
            held: Name of a part of the real model that is held, or "all". None holds nothing.

        Returns:
            The median and its 95 % interval over prompts.
        """
        rows = self.select(kind)
        return bootstrap([row.limit if held is None else row.held[held] for row in rows], median)

    def radius(self, kind: str, method: str) -> Estimate:
        """Give the median over prompts of the size at which the error first passes 10 %.

        Args:
            kind: One of :attr:`kinds`.
            method: Name of the map whose error is asked for, one of :data:`MAP_METHODS`.

        Returns:
            The median and its 95 % interval over prompts.
        """
        return bootstrap(
            [
                radius(self.sizes, getattr(r, method), r.limit if method == "operator" else 0.0)
                for r in self.select(kind)
            ],
            median,
        )

    def crossing(self, kind: str) -> float | None:
        """Give the size from which on the operator's median error is below the Jacobian's, or None.

        Args:
            kind: One of :attr:`kinds`.

        Returns:
            The smallest such size of the study.
        """
        found = None
        for size in reversed(self.sizes):
            operator, jacobian = (self.error(kind, method, size).value for method in MAP_METHODS)
            if operator >= jacobian:
                break
            found = size
        return found

    def __repr__(self) -> str:
        lines = [f"ValidityStudy({self.model}, {self.n} prompt{'s' * (self.n != 1)}, {self.dtype})"]
        lines.append(
            f"  {'median error at ‖δ‖/‖X‖':<24}" + "".join(f"{s:>8.3g}" for s in self.sizes)
        )
        for kind in self.kinds:
            for method in MAP_METHODS:
                cells = [f"{self.error(kind, method, size).value:>8.3f}" for size in self.sizes]
                lines.append(f"  {kind + ', ' + method:<24}" + "".join(cells))
                lines.append(f"{'':>6}10 % is passed at {self.radius(kind, method)}")
            lines.append(f"{'':>6}the operator's error at δ → 0: {self.limit(kind)}")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None, kind: str | None = None) -> Axes:
        """Draw the median errors by the size of the step with matplotlib, with 95 % intervals.

        Args:
            ax: Axes to draw on. None makes a figure.
            kind: One of :attr:`kinds`. None draws all of them.

        Returns:
            The axes drawn on, with a curve per kind of direction and map.

        Raises:
            ValueError: If matplotlib is missing, or there is no such kind.
        """
        series = self._series(self.kinds if kind is None else [kind])
        return curves(
            ax,
            self.sizes,
            series,
            title=f"{self.model}, {self._over()}",
            xlabel="‖δ‖ / ‖X‖",
            ylabel="median relative error",
        )

    def _over(self) -> str:
        ends = (low for own in self._series(self.kinds).values() for _, low, _ in own)
        return intervals_over(ends, self.n)

    def _series(self, kinds: Sequence[str]) -> dict[str, list[tuple[float, float, float]]]:
        """For every kind and map, the median error at every size with its interval."""
        return {
            f"{kind}, {method}": [
                (e.value, e.low, e.high)
                for e in (self.error(kind, method, size) for size in self.sizes)
            ]
            for kind in kinds
            for method in MAP_METHODS
        }

    def _page(self) -> Page:
        views: list[View] = []
        for kind in self.kinds:
            found = {name: np.array(row) for name, row in self._series([kind]).items()}
            lines = [(name, *row.T) for name, row in found.items()]
            axes = ("‖δ‖ / ‖X‖", "median relative error")
            labels = [[f"{size:.3g}", name] for name in found for size in self.sizes]
            reach = [f"{self.radius(kind, method)} for the {method}" for method in MAP_METHODS]
            caption = (
                f"The error first passes 10 % at {' and '.join(reach)}. The operator's error at "
                f"δ → 0 is {self.limit(kind)}."
            )
            values = np.concatenate([*found.values()])
            parts = (
                curves_view(self.sizes, lines, axes, {"10 %": 0.1}, kind),
                interval_view(["size", "map"], labels, values, caption, what="error"),
            )
            views += [replace(part, tab=kind) for part in parts]
        title = "How far the maps predict a changed run"
        notes = [repr(self).splitlines()[0], f"{self._over().capitalize()}."]
        several = len(self.kinds) > 1
        return Page(title, views, notes, tabs=several, tab_name="Directions", height=860)

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the errors as a pandas table.

        Returns:
            One row per prompt, kind of direction and size, with columns prompt, kind, size,
            operator and jacobian.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        each = len(self.rows) // self.n
        lines = [
            (i // each, row.kind, size, *(getattr(row, method)[at] for method in MAP_METHODS))
            for i, row in enumerate(self.rows)
            for at, size in enumerate(self.sizes)
        ]
        return pandas.DataFrame(lines, columns=["prompt", "kind", "size", *MAP_METHODS])

    def to_json(self) -> str:
        """Write the study as JSON, curves to five digits; :meth:`from_json` reads it."""
        rows = [{name: _rounded(value) for name, value in asdict(row).items()} for row in self.rows]
        return study_text(asdict(self) | {"rows": rows}, STUDY_FORMAT)

    @classmethod
    def from_json(cls, text: str) -> ValidityStudy:
        """Read what :meth:`to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            The study that was written.
        """

        def build(data: dict[str, Any]) -> ValidityStudy:
            rows = tuple(
                ErrorCurve(**row | {method: tuple(row[method]) for method in MAP_METHODS})
                for row in data.pop("rows")
            )
            return cls(rows=rows, sizes=tuple(data.pop("sizes")), **data)

        return read_study(text, STUDY_FORMAT, build, "ValidityStudy.to_json")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@spelled
def validity(
    model: Any,
    prompts: Sequence[Any],
    kinds: Sequence[str] = DIRECTION_KINDS,
    sizes: Sequence[float] = SIZES,
    seed: int = 0,
    held: Sequence[str] = (),
    progress: bool = True,
    **kwargs: Any,
) -> ValidityStudy:
    """Measure how far from its prompt the operator holds, beside the Jacobian.

    Every prompt is moved along one direction of each kind: a random vector, the swap of one token,
    and a steering vector. A prompt's steering vector is the difference of two other prompts' mean
    embedded tokens. In float32 the smallest sizes are near the model's own rounding; a float64
    model tells them better.

    Args:
        model: The model, as for :func:`tensorlens_tl.capture`.
        prompts: At least three prompts: strings, or token ids [pos].
        kinds: Kinds of directions, of "random", "swap" and "steering".
        sizes: Sizes of the step, rising, as shares of ‖X‖ at the positions that the step moves.
        seed: Seed of the directions.
        held: Parts of the real model to hold, each in turn: "pattern", "scale", "ratio" or "all".
            Their limits tell which frozen part the operator's error comes from.
        progress: Whether to show a bar after 2 s, one step per prompt.
        **kwargs: Arguments of :func:`tensorlens_tl.capture`.

    Returns:
        The study: error curves, medians with intervals, and radii.

    Raises:
        ValueError: If there are fewer than three prompts, a kind does not exist, the sizes do not
            rise from above 0, or the model is in half precision.

    Example:
        >>> from tensorlens_tl import demo, validity
        >>> prompts = ["The capital of France is", "The keys near the cabinet", "The dog is"]
        >>> study = validity(demo.load_model(), prompts, kinds=("random",), sizes=(0.1, 1.0))
        >>> study.n, study.kinds
        (3, ('random',))
        >>> round(study.error("random", "jacobian", 0.1).value, 1)
        0.1
    """
    given = (
        []
        if isinstance(prompts, str) or not isinstance(prompts, Iterable)
        else list(no_table(prompts, "prompts"))
    )
    if len(given) < 3:
        raise ValueError(
            f"prompts={prompts!r} holds fewer than three prompts. Pass a list of at least three."
        )
    unknown = [kind for kind in kinds if kind not in DIRECTION_KINDS]
    if unknown or not kinds:
        shown = f"kinds holds {', '.join(map(repr, unknown)) or 'nothing'}"
        raise ValueError(f"{shown}. Choose some of {', '.join(DIRECTION_KINDS)}.")
    if not sizes or sizes[0] <= 0 or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"sizes={list(sizes)} do not rise from above 0. Sort them, without 0.")
    # 1. Captures.
    with torch.no_grad():
        lenses = [capture(model, prompt, **kwargs)[1] for prompt in given]
    dtype = lenses[0].logits.dtype
    name = str(dtype).removeprefix("torch.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The model is in {name}, whose rounding hides small steps. "
            "Cast it with model.to(torch.float32)."
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, lens in enumerate(progress_bar("validity", len(lenses), progress, iterable=lenses)):
        # 2. Directions; two prompts other than this one steer.
        drawn = torch.randperm(len(lenses) - 1, generator=generator, device="cpu")[:2].tolist()
        a, b = (j + (j >= i) for j in drawn)
        steer = lenses[a].embedding[0].mean(0) - lenses[b].embedding[0].mean(0)
        directions = [draw(lens, model, kind, seed + i, steer) for kind in kinds]
        # 3. Errors.
        deltas = torch.stack([delta for delta, _ in directions])
        found = direction_errors(lens, model, deltas, sizes, held)
        for row, (kind, (_, whole)) in enumerate(zip(kinds, directions, strict=True)):
            rows.append(
                ErrorCurve(
                    kind=kind,
                    operator=tuple(found.operator[row].tolist()),
                    jacobian=tuple(found.jacobian[row].tolist()),
                    limit=float(found.limit[row]),
                    held={part: float(values[row]) for part, values in found.held.items()},
                    whole=whole,
                )
            )
    # 4. Medians are taken when they are asked for, as every curve is kept.
    return ValidityStudy(
        lenses[0].capture.model_name, name, seed, len(lenses), tuple(sizes), tuple(rows)
    )
