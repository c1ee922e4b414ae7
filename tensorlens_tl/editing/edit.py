"""An edit of some prompts: what it adds, what it predicts, and what the real model makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..attribution import TargetGradient
from ..checks import at_least_one, need, token_text
from ..hosts import Adapter, adapt
from ..maps import TINY
from ..operator import Capture, FrozenTransformer
from ..pictures import Page, Paged, agreement, table_view
from ..readers import alone
from ..recording import freeze
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
    row_of,
)
from .smallest import Metric, smallest, smallest_shared

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Edit:
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
        real, tops, kl = self.before.new_zeros(n), [("", "")] * n, self.before.new_zeros(n)
        slopes = self.before.new_full((n,), torch.nan)
        for rows, columns, ids in groups(run.prompts):
            whole = run.logits.ndim == 2  # a classifier has one row of logits
            plain = run.logits[rows] if whole else run.logits[rows[:, None], columns]
            capture = self._edited(adapter, rows, columns, ids)
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
                g = jacobian_covectors(adapter, ids, self.place, self.goal, rows.tolist())
                here = self.delta[rows[:, None], columns]
                slopes[rows] = (g.to(here) * here).sum((1, 2)).to(slopes)
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
        cost = Metric(metric, self.place.state(FrozenTransformer.of(run), run), run.frame.real)
        for _ in range(rounds):
            now, missing = replace(self, delta=delta), torch.zeros_like(self.before)
            g = torch.zeros_like(delta)
            for rows, columns, ids in groups(run.prompts):
                capture = now._edited(adapter, rows, columns, ids)
                goal = self.goal.on(capture, rows.tolist())
                missing[rows] = self.before[rows] + self.predicted[rows] - goal.value.to(missing)
                operator = FrozenTransformer.of(capture)
                trace = pulled(TargetGradient(capture, operator, goal), *self.moves)
                g[rows[:, None], columns] = self.place.covector(operator, trace).to(g)
            if worse := int((missing.abs() > was).sum()):
                warnings.warn(
                    f"A round of refine brought {worse} of {len(was)} prompts no nearer to what "
                    "was asked. Ask for less, or edit another site.",
                    stacklevel=2,
                )
            was, wanted = missing.abs(), ((g * where)[:, None], missing[:, None].to(g))
            if self.vector is None:
                delta = delta + smallest(*wanted, cost)
            else:
                delta = delta + smallest_shared(*wanted, cost) * where
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
            ValueError: If the model is another one.
        """
        adapter, found = adapt(model), torch.zeros_like(self.size)
        for factor in torch.logspace(-5, 2, 12, base=2).tolist():
            scaled = self * factor
            for rows, columns, ids in groups(self.run.prompts):
                capture = scaled._edited(adapter, rows, columns, ids)
                real = self.goal.on(capture, rows.tolist()).value.to(self.before)
                real = real - self.before[rows]
                held = (real - scaled.predicted[rows]).abs() <= tolerance * real.abs()
                found[rows] = torch.where(held, scaled.size[rows], found[rows])
        return found

    def _edited(self, adapter: Adapter, rows: Tensor, columns: Tensor, ids: Tensor) -> Capture:
        """Freeze the edited run of prompts of one length."""
        check_same(adapter, self.run)
        if self.place.hook not in adapter.hooks:
            raise ValueError(
                f"{adapter.name} has no hook point {self.place.hook}. Pass the model of the lens, "
                "or edit another site."
            )
        delta = self.delta[rows[:, None], columns]
        with alone(adapter.model), adapter.model.hooks(fwd_hooks=hooks_of(self.place, delta)):
            given = adapter.all_real(ids)
            _, capture = freeze(
                adapter, ids, gate=self.run.convention.gate, dtype=delta.dtype, **given
            )
        return capture


@dataclass(frozen=True, eq=False)
class EditCheck(Paged):
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

    @property
    def error(self) -> float:
        """Σ |predicted − real| / Σ |real| over the prompts."""
        off = (self.predicted - self.real).abs().sum()
        return float(off / self.real.abs().sum().clamp_min(TINY))

    def to_dataframe(self) -> Any:
        """Make a pandas table of the check.

        Returns:
            A ``DataFrame`` with one row per prompt.

        Raises:
            ValueError: If pandas is not installed.
        """
        columns = ("before", "predicted", "real", "jacobian", "kl", "size", "kl_held_out")
        table = {name: getattr(self, name).tolist() for name in columns}
        first, after = zip(*self.tops, strict=True)
        table |= {"top": list(first), "top_after": list(after)}
        return need("pandas", "pandas", "to_dataframe").DataFrame(table)

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
        title = f"edit at {self.site}, predicted off by {self.error:.0%}"
        return agreement(ax, series, self.real.tolist(), unit="logits", title=title)

    def _page(self) -> Page:
        names = ["before", "predicted", "real", "jacobian", "kl", "size", "kl_held_out"]
        names = [name for name in names if not bool(getattr(self, name).isnan().all())]
        values = torch.stack([getattr(self, name) for name in names], 1).cpu().numpy()
        labels = [[str(number), *pair] for number, pair in enumerate(self.tops)]
        table = table_view(["prompt", "top before", "top after"], names, labels, values)
        return Page(repr(self).splitlines()[0], [table], ["Changes and targets are in logits."])

    def __repr__(self) -> str:
        rows = [f"Edit at {self.site}, in the real model (predicted off by {self.error:.0%})"]
        numbers = zip(self.before, self.predicted, self.real, self.kl, self.tops, strict=True)
        for before, predicted, real, kl, (top, after) in list(numbers)[:10]:
            rows.append(
                f"  {float(before):+.3f} → predicted {float(before + predicted):+.3f}, real "
                f"{float(before + real):+.3f}; {top!r} → {after!r}; KL elsewhere {float(kl):.2g}"
            )
        more = len(self.tops) - 10
        return "\n".join(rows + ([f"  … {more} more"] if more > 0 else []))
