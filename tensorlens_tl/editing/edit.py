"""An edit of some prompts: what it adds, what it predicts, and what the real model makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..attribution import TargetGradient
from ..checks import at_least_one, finite, spelled, token_text
from ..hosts import Adapter, adapt
from ..maps import TINY
from ..operator import Capture, FrozenTransformer
from ..pictures import Page, Paged, Tabled, dots, table_view
from ..readers import alone
from ..recording import freeze
from .edit_check import EditCheck, EditSweep
from .goals import Goal
from .places import Place, pulled
from .real_runs import (
    Hook,
    check_same,
    divergence,
    groups,
    held_out_divergence,
    hooks_of,
    jacobian_covectors,
    require_point,
    row_of,
)
from .smallest import EditCost, smallest, smallest_shared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACTORS = tuple(torch.logspace(-5, 2, 12, base=2).tolist())
"""Twelve factors from 1/32 to 4."""

ROUNDING = 16
"""By how many units of rounding of its largest logit two runs of a model may differ."""


@spelled
@dataclass(frozen=True, eq=False)
class Edit(Paged, Tabled):
    """A change δ of what stands at one place in a run, and the change of a target it predicts.

    The prediction is ⟨g, δ⟩, with the covector g of the target: exact while attention patterns,
    norm scales and gating ratios stay as they were. :meth:`check` tells what the real model does.

    Attributes:
        place: Where the edit is made.
        delta: What is added at every position, 0 where nothing is [batch, pos, width].
        goal: The target of every prompt.
        before: The target's value in the run, in logits [batch].
        predicted: The predicted change of the target, in logits [batch].
        size: ‖δ‖ divided by the norm of what stands at the edited positions [batch].
        capture: The run; None for an edit from a file, until it is given a lens again.
        moves: Whether the covector has queries and keys, and gating ratios, to first order.

    Example:
        >>> from tensorlens_tl import demo
        >>> model = demo.load_model()
        >>> _, lens = model.run_with_tensorlens("The capital of France is")
        >>> edit = lens.edit("Paris", versus="Rome", to=-5.0, site=1)
        >>> with model.hooks(fwd_hooks=edit.hooks()):
        ...     logits = model("The capital of France is")
        >>> model.tokenizer.decode([int(logits[0, -1].argmax())])
        'Rome'
    """

    place: Place
    delta: Float[Tensor, "batch pos d"]
    goal: Goal
    before: Float[Tensor, " batch"]
    predicted: Float[Tensor, " batch"]
    size: Float[Tensor, " batch"]
    capture: Capture | None
    moves: tuple[bool, bool] = (False, False)

    _COLUMNS = ("prompt", "site", "before", "predicted", "norm", "size")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        numbers = (self.before, self.predicted, self.norm, self.size)
        for prompt, row in enumerate(zip(*(n.tolist() for n in numbers), strict=True)):
            yield (prompt, self.place.name, *row)

    def _facts(self) -> dict[str, Any]:
        return {"unit": "logits; norm of the residual, size of what stands there"}

    def __repr__(self) -> str:
        def span(values: Tensor, form: str) -> str:
            low, high = float(values.min()), float(values.max())
            return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"

        n = len(self.before)
        return (
            f"Edit({self.place.name}, {n} prompt{'s' * (n > 1)}, "
            f"target {span(self.before, '.3g')} → {span(self.before + self.predicted, '.3g')} "
            f"predicted, {span(self.size, '.0%')} of what stands there)"
        )

    @property
    def run(self) -> Capture:
        """The run that is edited.

        Raises:
            ValueError: If the edit is from a file and was given no lens.
        """
        if self.capture is None:
            raise ValueError(
                "An edit from a file knows no run. Load it with the lens of its prompts: "
                "editing.load_edit(path, lens)."
            )
        return self.capture

    @property
    def norm(self) -> Float[Tensor, " batch"]:
        """‖δ‖ of every prompt."""
        return self.delta.flatten(1).norm(dim=-1)

    @property
    def edited(self) -> Bool[Tensor, "batch pos"]:
        """Which positions are edited."""
        return self.delta.abs().sum(-1) > 0

    @property
    def vector(self) -> Float[Tensor, " d"] | None:
        """The one vector that all edited positions of all prompts get; None where they differ."""
        each = self.delta[self.edited]
        return each[0] if len(each) and bool((each == each[0]).all()) else None

    # --- Arithmetic

    def __mul__(self, factor: int | float) -> Edit:
        factor = finite(factor, "factor")
        return replace(
            self,
            delta=self.delta * factor,
            predicted=self.predicted * factor,
            size=self.size * abs(factor),
        )

    __rmul__ = __mul__

    def __neg__(self) -> Edit:
        return self * -1.0

    def __add__(self, other: Edit) -> Edit:
        """Make both edits at once; they must be of one place, target and run."""
        if not isinstance(other, Edit):
            return NotImplemented
        same = other.place.hook == self.place.hook and other.delta.shape == self.delta.shape
        if not same or not other.goal.same(self.goal) or other.capture is not self.capture:
            raise ValueError(
                "The edits are of two places, targets or runs. Add edits of one lens with the same "
                "site= and target, or pass the hooks of both."
            )
        # Predictions add, as the operator is linear; norms do not.
        delta = self.delta + other.delta
        ratio = delta.flatten(1).norm(dim=-1) / self.norm.clamp_min(TINY)
        return replace(
            self, delta=delta, predicted=self.predicted + other.predicted, size=self.size * ratio
        )

    def __sub__(self, other: Edit) -> Edit:
        return self + -other

    # --- In the model

    def hooks(self) -> list[Hook]:
        """Make the hooks that edit a run of the same prompts.

        Pass them to ``model.hooks(fwd_hooks=...)`` or ``model.run_with_hooks``. While text is
        generated, the prompt's positions are edited, and none that comes after; so it does not
        matter whether keys and values are cached.

        Returns:
            Pairs of a hook point's name and a function.
        """
        return hooks_of(self.place, self.delta)

    def check(self, model: Any, jacobian: bool = False, held_out: Sequence[str] = ()) -> EditCheck:
        """Run the edited model once, and compare.

        Args:
            model: The model of the lens, with the weights it had then.
            jacobian: Whether to tell, too, what the real model's gradient at the place predicts.
                It costs a run and a backward pass more.
            held_out: Other prompts, to which every edit is added at the same positions from the
                end. Each costs a run per edit.

        Returns:
            Predicted and real changes of the target, the likeliest tokens before and after, and how
            far other positions and prompts moved.

        Raises:
            ValueError: If the model is another one, lacks the hook point, or a held-out prompt is
                too short.
        """
        adapter, run, n = adapt(model), self.run, len(self.before)
        size, noise = float(run.logits.abs().max()), torch.finfo(run.logits.dtype).eps
        real, tops, kl = self.before.new_zeros(n), [("", "")] * n, self.before.new_zeros(n)
        slopes = self.before.new_full((n,), torch.nan)
        for rows, columns, ids in groups(run.prompts):
            whole = run.logits.ndim == 2  # a classifier has one row of logits
            plain = run.logits[rows] if whole else run.logits[rows[:, None], columns]
            capture = self._edited(adapter, rows, columns, ids)
            # Prompts of one length are run without padding, which could otherwise move the numbers.
            real[rows] = self.goal.on(capture, rows.tolist()).value.to(real) - self.before[rows]
            at = capture.frame.index(self.goal.pos)
            for i, row in enumerate(rows.tolist()):
                top, after = (
                    token_text(adapter.tokenizer, int(row_of(logits, i, at).argmax()))
                    for logits in (plain, capture.logits)
                )
                tops[row] = (top, after)
            kl[rows] = divergence(plain, capture.logits, at).to(kl)
        if jacobian:
            g, _ = jacobian_covectors(adapter, run, self.place, self.goal)
            # The same product as the prediction, with a gradient in which patterns, scales and
            # ratios move.
            slopes = (g.to(self.delta) * self.delta).sum((1, 2)).to(slopes)
        others = torch.full_like(slopes, torch.nan)
        if len(held_out):
            _, held = freeze(adapter, list(held_out), gate=run.convention.gate)
            others = held_out_divergence(adapter, run, held, self.place, self.delta).to(others)
        return EditCheck(
            self.place.name,
            self.before,
            self.predicted,
            real,
            slopes,
            tuple(tops),
            kl,
            self.size,
            others,
            ROUNDING * noise * size,
        )

    def refine(self, model: Any, rounds: int = 2, metric: str | Tensor = "identity") -> Edit:
        """Correct the edit by what the real model made of it.

        Every round freezes the edited run, pulls the target in it, and adds the smallest edit
        that makes up for what is missing: a Newton step on the operators of the edited runs.

        Args:
            model: The model of the lens, with the weights it had then.
            rounds: How many times to correct. Each is one run.
            metric: What an edit costs, as in :meth:`TensorLens.edit`.

        Returns:
            The corrected edit. What it predicts is what was asked at first.

        Raises:
            ValueError: If the model is another one, or the target no longer depends on the place.
        """
        at_least_one(rounds, "rounds")
        adapter, run, delta = adapt(model), self.run, self.delta.clone()
        where, was = self.edited[..., None], torch.full_like(self.before, torch.inf)
        shared = self.vector is not None and int(self.edited.sum()) > 1
        cost = EditCost(metric, self.place.state(FrozenTransformer.of(run), run), run.frame.real)
        for _ in range(rounds):
            now, missing = replace(self, delta=delta), torch.zeros_like(self.before)
            g = torch.zeros_like(delta)
            for rows, columns, ids in groups(run.prompts):
                capture = now._edited(adapter, rows, columns, ids)
                goal = self.goal.on(capture, rows.tolist())
                missing[rows] = self.before[rows] + self.predicted[rows] - goal.value.to(missing)
                # The edited run's own operator: this is what makes the round a Newton step.
                operator = FrozenTransformer.of(capture)
                trace = pulled(TargetGradient(capture, operator, goal), *self.moves)
                g[rows[:, None], columns] = self.place.covector(operator, trace).to(g)
            if shared:  # more than was promised is no miss
                missing = torch.where(missing * self.predicted < 0, 0.0, missing)
            if worse := int((missing.abs() > was).sum()):
                warnings.warn(
                    f"A round of refine brought {worse} of {len(was)} prompts no nearer to what "
                    "was asked. Ask for less, or edit another site.",
                    stacklevel=3,
                )
            was, rows, wanted = missing.abs(), (g * where)[:, None], missing[:, None].to(g)
            if not shared:
                delta = delta + smallest(rows, wanted, cost)
            else:  # a change of 0 was asked to be kept; others may be larger than promised
                small = self.predicted.abs() <= 1e-6 * self.predicted.abs().max()
                signs = torch.where(small, 0.0, self.predicted.sign())[:, None].to(g)
                delta = delta + smallest_shared(rows, wanted, signs, cost) * where
        ratio = delta.flatten(1).norm(dim=-1) / self.norm.clamp_min(TINY)
        return replace(self, delta=delta, size=self.size * ratio)

    def radius(self, model: Any, tolerance: float = 0.1) -> Float[Tensor, " batch"]:
        """How far the prediction holds along this edit: the largest size within a relative error.

        The error at a factor α is |real(α) − α · predicted| / |real(α)|. It is measured at twelve
        factors from 1/32 to 4. Very small edits may have larger errors than larger ones: their real
        change is the Jacobian's, which also moves what is held here.

        Args:
            model: The model of the lens, with the weights it had then.
            tolerance: The relative error that is allowed.

        Returns:
            ‖α δ‖ divided by the norm of what stands there [batch]; 0 where no factor is within.

        Raises:
            ValueError: If the tolerance is no number, or the model is another one.
        """
        return self.sweep(model).radius(tolerance)

    def sweep(
        self, model: Any, factors: Sequence[int | float] | None = None, jacobian: bool = False
    ) -> EditSweep:
        """Make the edit at several sizes, and run each in the real model.

        Args:
            model: The model of the lens, with the weights it had then.
            factors: What δ is multiplied by, in growing order. Each is one run. None is twelve
                factors from 1/32 to 4.
            jacobian: Whether to tell, too, what the real model's gradient predicts.

        Returns:
            A check of every size, as a result with a page: points that a slider moves.

        Raises:
            ValueError: If there are no factors, or the model is another one.
        """
        factors = FACTORS if factors is None else factors
        if not len(factors):
            raise ValueError("factors= is empty. Pass numbers such as [0.25, 0.5, 1.0].")
        checks = [(self * factor).check(model) for factor in factors]
        if jacobian:  # it is linear in the size
            slope = self.check(model, jacobian=True).jacobian
            pairs = zip(checks, factors, strict=True)
            checks = [replace(check, jacobian=slope * factor) for check, factor in pairs]
        return EditSweep(tuple(map(float, factors)), tuple(checks))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the target before and after as predicted with matplotlib, one dot per prompt.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. What the real model does is drawn by the results of :meth:`check` and
            :meth:`sweep`.

        Raises:
            ValueError: If matplotlib is missing.
        """
        after = self.before + self.predicted
        groups = {"before": self.before.tolist(), "predicted": after.tolist()}
        return dots(ax, groups, ylabel="logits", title=f"edit at {self.place.name}")

    def _page(self) -> Page:
        rows = [self.before, self.predicted, self.before + self.predicted, self.norm, self.size]
        names = ["before", "predicted change", "predicted", "norm", "size"]
        labels = [[str(number)] for number in range(len(self.before))]
        values = torch.stack([row.double() for row in rows], 1).cpu().numpy()
        notes = [
            "Targets and changes are in logits; the size is a share of what stands there.",
            "The real model was not run: .check(model) runs it, and .sweep(model) does at many "
            "sizes.",
        ]
        return Page(
            f"Edit at {self.place.name}", [table_view(["prompt"], names, labels, values)], notes
        )

    def _edited(self, adapter: Adapter, rows: Tensor, columns: Tensor, ids: Tensor) -> Capture:
        """Freeze the edited run of prompts of one length."""
        check_same(adapter, self.run)
        require_point(adapter, self.place.hook)
        delta = self.delta[rows[:, None], columns]
        with alone(adapter.model), adapter.model.hooks(fwd_hooks=hooks_of(self.place, delta)):
            given = adapter.all_real(ids)
            _, capture = freeze(
                adapter, ids, gate=self.run.convention.gate, dtype=delta.dtype, **given
            )
        return capture
