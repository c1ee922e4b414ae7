"""Do predicted edits come true? Edits of many prompts, by several methods, in the real model.

Every method makes an edit of the residual at the last position that is to bring m = logit(answer) −
logit(foil) to a multiple of itself. The real model then tells what m became.

    operator   the smallest edit by the operator's covector
    refined    the same, corrected twice by the edited runs
    …_qk       operator or refined, with queries and keys to first order in the covector
    …_qk_gates the same with the gating ratios of MLPs, too: only norm scales are held
    jacobian   the smallest edit by the real model's gradient
    refined_jacobian  the same, with two Newton steps more
    caa        the mean difference of clean and corrupted residuals (Rimsky et al. 2024, arXiv
               2312.06681), scaled until the operator predicts what is asked
    logit_lens the difference of the two columns of W_U, scaled through the frozen final norm
    random     a random direction, as long as the operator's edit
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checks import spelled
from ..costs import rehearsed
from ..evaluation import Comparison, Estimate, compare, estimate
from ..hosts import Adapter, adapt
from ..maps import take_row
from ..operator import Capture, FrozenTransformer
from ..pictures import Page, Paged, Tabled, estimates, interval_view, intervals_over
from ..recording import freeze
from .asking import Asked, smallest_edit
from .edit import Edit
from .goals import Goal
from .real_runs import jacobian_covectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EDIT_METHODS = ("operator", "refined", "jacobian", "caa", "logit_lens", "random")
"""What :func:`evaluate` compares unless told otherwise."""

MOVING = {"qk": (True, False), "qk_gates": (True, True)}
"""What moves to first order in covectors of the operator, by the end of a method's name."""

MORE = *(f"{m}_{moving}" for m in ("operator", "refined") for moving in MOVING), "refined_jacobian"
"""What :func:`evaluate` compares on request, too."""

MEASURES = ("delivered", "norm", "size", "flipped", "kl", "kl_held_out")
"""What is measured of every edit."""

_PARTS = ("clean", "corrupted", "answer", "foil")

Case = tuple[str, str, str, str]
"""A prompt, its corrupted prompt, the answer and the foil."""


@spelled
@dataclass(frozen=True, eq=False)
class EditEvaluation(Paged, Tabled):
    """What edits by several methods did in the real model, prompt by prompt.

    Attributes:
        values: For every (method, measure), one number per prompt and site. "delivered" is the real
            change of the target by what was asked; "norm" is ‖δ‖, and "size" that by the residual's
            norm; "flipped" is 1 where the foil became the likeliest token; "kl" is the mean KL
            divergence at all other positions, in nats, and "kl_held_out" that on held-out prompts.
        sites: The sites, in the order of the numbers.
        to: What the target was to become, as a multiple of itself.
        n: Number of prompts.
    """

    values: dict[tuple[str, str], list[float]]
    sites: tuple[str | int, ...]
    to: int | float
    n: int

    _COLUMNS = ("prompt", "site", "method", "measure", "value")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for (method, measure), values in self.values.items():
            for i, value in enumerate(values):
                yield i % self.n, self.sites[i // self.n], method, measure, value

    def _facts(self) -> dict[str, Any]:
        return {"to": self.to}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that were compared."""
        return tuple(dict.fromkeys(method for method, _ in self.values))

    def mean(self, method: str, measure: str) -> Estimate:
        """Estimate the mean of a measure, with a bootstrap interval over prompts and sites.

        Args:
            method: One of the methods.
            measure: "delivered", "norm", "size", "flipped", "kl" or "kl_held_out".

        Returns:
            The mean and its 95 % interval.
        """
        return estimate(self._of(method, measure))

    def median_miss(self, method: str) -> float:
        """The median of |delivered − 1|: how far edits miss what was asked, as a share of it."""
        # A median: one prompt whose target does not move would rule a mean.
        missed = sorted(abs(x - 1) for x in self._of(method, "delivered"))
        return missed[len(missed) // 2]

    def compare(self, first: str, second: str, measure: str) -> Comparison:
        """Compare two methods on the same prompts.

        Args:
            first: The method whose numbers come first.
            second: The method whose numbers are subtracted.
            measure: What is compared.

        Returns:
            The mean difference, its interval and its p-value.
        """
        return compare(self._of(first, measure), self._of(second, measure))

    def plot(self, ax: Axes | None = None, measure: str = "delivered") -> Axes:
        """Draw the means of a measure with matplotlib, with 95 % intervals: methods down.

        Args:
            ax: Axes to draw on. None makes a figure.
            measure: "delivered", "norm", "size", "flipped", "kl" or "kl_held_out".

        Returns:
            The axes drawn on. Of "delivered", 1 is what was asked.

        Raises:
            ValueError: If matplotlib is missing, or there is no such measure.
        """
        found = [self.mean(method, measure) for method in self.methods]
        series = {measure: [(one.value, one.low, one.high) for one in found]}
        title = f"edits of {self._size()}"
        over = intervals_over((one.low for one in found), found[0].n, "edit")
        return estimates(ax, self.methods, series, title=title, xlabel=f"mean {measure} ({over})")

    def _size(self) -> str:
        """How many prompts and sites there are."""
        counts = ((self.n, "prompt"), (len(self.sites), "site"))
        return " at ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counts)

    def _page(self) -> Page:
        labels, rows = [], []
        for method, measure in self.values:
            one = self.mean(method, measure)
            labels.append([measure, method])
            rows.append([one.value, one.low, one.high])
        order = sorted(range(len(labels)), key=lambda i: MEASURES.index(labels[i][0]))
        labels, values = [labels[i] for i in order], np.array(rows)[order]
        over = intervals_over(values[:, 1], self.n * len(self.sites), "edit")
        notes = [f"Means over prompts and sites; {over}. Of delivered, 1 is what was asked."]
        table = interval_view(["measure", "method"], labels, values, group=0)
        return Page(repr(self).splitlines()[0], [table], notes)

    def _of(self, method: str, measure: str) -> list[float]:
        if (method, measure) not in self.values:
            raise ValueError(
                f"There is no {measure!r} of {method!r}. Choose a method, one of "
                f"{', '.join(self.methods)}, and a measure, one of {', '.join(MEASURES)}."
            )
        return self.values[method, measure]

    def __repr__(self) -> str:
        rows = [
            f"Edits of {self._size()}, asked for {self.to:g} × the target",
            f"{'method':>12}  {'miss':>6}  {'flipped':>20}  {'norm':>20}  KL elsewhere",
        ]
        for m in self.methods:
            flipped, norm, kl = (str(self.mean(m, x)) for x in ("flipped", "norm", "kl"))
            rows.append(f"{m:>12}  {self.median_miss(m):6.1%}  {flipped:>20}  {norm:>20}  {kl}")
        return "\n".join(rows)


@spelled
def evaluate(
    model: Any,
    cases: Iterable[Any],
    methods: Sequence[str] = EDIT_METHODS,
    sites: Sequence[str | int] = (1,),
    to: int | float = -1.0,
    seed: int = 0,
    gate: str = "gate",
    held_out: Sequence[str] = (),
) -> EditEvaluation:
    """Edit many prompts by several methods, and run every edit in the real model.

    Prompts whose answer is not ahead of the foil are left out.

    Args:
        model: A host model, or a Hugging Face model.
        cases: Prompts with ``clean``, ``corrupted``, ``answer`` and ``foil``, as
            ``demo.prompts`` makes them, or tuples of these four texts.
        methods: What to compare: "operator", "refined", "jacobian", "caa", "logit_lens", "random";
            "operator" and "refined" with "_qk" or "_qk_gates" behind, by covectors in which
            queries and keys, or gating ratios, too, move to first order; and "refined_jacobian".
        sites: Residual sites to edit, at the last position, or numbers of blocks.
        to: What logit(answer) − logit(foil) is to become, as a multiple of itself.
        seed: Seed of the random directions.
        gate: How gated MLPs are made linear, as for :func:`tensorlens_tl.capture`.
        held_out: Other prompts, to whose last position every edit is added, too.

    Returns:
        What every edit did.

    Raises:
        ValueError: If a method or a site does not exist, or no prompt is left.

    Example:
        >>> from tensorlens_tl import demo, editing
        >>> model, cases = demo.load_model(), demo.prompts("facts", 8)
        >>> study = editing.evaluate(model, cases, methods=("operator", "jacobian"), sites=(1, 2))
        >>> study.median_miss("operator") < study.median_miss("jacobian")
        True
    """
    for method in methods:
        if method not in EDIT_METHODS + MORE:
            raise ValueError(
                f"methods= has {method!r}. Use some of {', '.join(EDIT_METHODS + MORE)}."
            )
    adapter, made = adapt(model), [case_of(case) for case in cases]
    # 1. The clean runs, of the prompts that the model gets right.
    made, capture, goal = right_cases(adapter, made, gate)
    operator = FrozenTransformer.of(capture)
    _, twins = freeze(adapter, [case[1] for case in made], gate=gate)
    generator = torch.Generator().manual_seed(seed)
    measures = MEASURES if len(held_out) else MEASURES[:-1]
    values: dict[tuple[str, str], list[float]] = {(m, x): [] for m in methods for x in measures}
    for site in sites:
        # 2. Every method's edit.
        asked = Asked(capture, operator, site, -1)
        best = _operator_edit(asked, goal, to)
        change = best.predicted
        for method in methods:
            kind, _, moving = method.partition("_")
            if kind in ("operator", "refined") and moving != "jacobian":
                moves = MOVING.get(moving, (False, False))
                own = Asked(capture, operator, site, -1, "identity", *moves)
                edit = _operator_edit(own, goal, to)
                edit = edit.refine(adapter.model, rounds=2) if kind == "refined" else edit
            elif method.endswith("jacobian"):
                rounds = 3 if kind == "refined" else 1
                edit = _by_jacobian(adapter, asked, best, rounds)
            else:
                delta = _rival(method, asked, goal, change, made, twins, generator)
                size = delta.flatten(1).norm(dim=-1, keepdim=True)[..., None]
                if method == "random":
                    # As long as the operator's edit, so that only its direction is compared.
                    delta = delta / size * best.norm[:, None, None]
                edit = replace(asked.edit(goal, delta), predicted=change)
            # 3. The real model.
            check = edit.check(adapter.model, held_out=held_out)
            found = {
                "delivered": check.real / change,
                "norm": edit.norm,
                "size": edit.size,
                "flipped": _flipped(adapter, check.tops, goal),
                "kl": check.kl,
                "kl_held_out": check.kl_held_out,
            }
            for name in measures:
                values[method, name] += [float(x) for x in found[name]]
    return EditEvaluation(values, tuple(sites), to, len(made))


def right_cases(adapter: Adapter, made: list[Case], gate: str) -> tuple[list[Case], Capture, Goal]:
    """Run the prompts whose answer is ahead of the foil.

    Args:
        adapter: Adapter of the model.
        made: The cases, right or not.
        gate: How gated MLPs are made linear.

    Returns:
        The cases that are left, their run, and logit(answer) − logit(foil) as the target.

    Raises:
        ValueError: If no case is left.
    """
    for _ in range(2):
        if not made:
            break
        _, capture = freeze(adapter, [case[0] for case in made], gate=gate)
        goal = Goal.of(capture, [case[2] for case in made], [case[3] for case in made], -1)
        ahead = goal.on(capture).value > 0
        if bool(ahead.all()) or rehearsed():
            return made, capture, goal
        # Run again without the others: padding, and so rounding, are those of the cases that are
        # left.
        made = [case for case, right in zip(made, ahead.tolist(), strict=True) if right]
    raise ValueError("No case is left: the model puts no answer before its foil. Pass other cases.")


def _operator_edit(asked: Asked, goal: Goal, to: int | float) -> Edit:
    """The smallest edit of every prompt, to a multiple of its own target."""
    one = smallest_edit(asked, goal, None, 1.0, ())
    # Smallest edits are linear in what is asked: one by 1 logit serves every amount.
    change = (to - 1) * one.before
    return replace(
        one,
        delta=one.delta * change[:, None, None],
        predicted=change,
        size=one.size * change.abs(),
    )


def _by_jacobian(adapter: Adapter, asked: Asked, best: Edit, rounds: int) -> Edit:
    """The smallest edit by the real model's gradient, at the last position; then Newton steps."""
    delta, goal = torch.zeros_like(best.delta), best.goal
    for _ in range(rounds):
        g, value = jacobian_covectors(adapter, asked.capture, asked.place, goal, delta)
        g, missing = g * asked.where[..., None], best.before + best.predicted - value
        # δ += g t / ‖g‖², the smallest step by which this gradient predicts what is missing.
        delta = delta + g * (missing / g.flatten(1).square().sum(1))[:, None, None]
    return replace(asked.edit(goal, delta), predicted=best.predicted)


def _rival(
    method: str,
    asked: Asked,
    goal: Goal,
    change: Tensor,
    made: list[Case],
    twins: Capture,
    generator: torch.Generator,
) -> Tensor:
    """Another method's edit [batch, pos, width], at the last position."""
    capture, frame = asked.capture, asked.capture.frame
    at = frame.index(-1)
    if method == "random":
        # Normal numbers: all directions are equally likely.
        noise = torch.randn(asked.state[:, 0].shape, generator=generator).to(asked.state)
        return noise[:, None] * asked.where[..., None]
    if method == "caa":
        other = asked.place.state(FrozenTransformer.of(twins), twins)
        d = take_row(asked.state, at)[:, 0] - take_row(other, twins.frame.index(-1))[:, 0]
        direction = torch.stack([_mean_of_others(d, made, i) for i in range(len(made))])
    else:
        W_U = frame.cast(capture.unembed.weights.W_U)
        pairs = zip(goal.targets, goal.versus or (), strict=True)
        direction = torch.stack([W_U[:, a] - W_U[:, b] for a, b in pairs])
        if capture.ln_final is not None:
            # Through the frozen final norm, so that both methods' directions are of the residual.
            direction = capture.ln_final.row(at).apply_t(direction[:, None])[:, 0]
    delta = direction[:, None] * asked.where[..., None]
    if method == "logit_lens":
        # By its own reading, which passes over all later blocks: ⟨g, g⟩.
        predicted = direction.square().sum(-1)
    else:
        # The operator predicts what one length of CAA's direction does, and sets its length so.
        predicted = (asked.covector(goal.on(capture)) * delta).flatten(1).sum(-1)
    return delta * (change / predicted)[:, None, None]


def _mean_of_others(d: Tensor, made: list[Case], i: int) -> Tensor:
    """The mean over other prompts of the same answer and foil; over all others where none has."""
    same = [j for j, case in enumerate(made) if j != i and case[2:] == made[i][2:]]
    # Without the prompt itself, whose own difference would tell the answer.
    return d[same or [j for j in range(len(made)) if j != i] or [i]].mean(0)


def _flipped(adapter: Adapter, tops: Iterable[tuple[str, str]], goal: Goal) -> list[float]:
    words = [adapter.token_string(int(foil)) for foil in goal.versus or ()]
    return [float(after == word) for (_, after), word in zip(tops, words, strict=True)]


def case_of(case: Any) -> Case:
    """Read prompt, corrupted prompt, answer and foil off a case, or refuse it."""
    if isinstance(case, tuple) and len(case) == 4:
        return case[0], case[1], case[2], case[3]
    try:
        clean, corrupted, answer, foil = (getattr(case, name) for name in _PARTS)
        return clean, corrupted, answer, foil
    except AttributeError:
        raise ValueError(
            f"cases= has {case!r}. Pass prompts with clean, corrupted, answer and foil, or tuples "
            "of these four texts."
        ) from None
