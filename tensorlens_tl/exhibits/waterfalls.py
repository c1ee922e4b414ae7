"""One logit through depth: what every sublayer adds, and what the logit lens reads there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import (
    Attribution,
    TargetGradient,
    TargetLike,
    attribute,
    attribute_many,
    own_prediction,
    resolve,
    resolve_token,
)
from ..checks import as_array, spelled
from ..graph import Node
from ..methods import logit_lens
from ..operator import Capture, FrozenTransformer
from ..pictures import Page, Paged, Tabled, View, unit_of, waterfall, waterfall_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LENS = "logit lens"
LENS_LIMIT = 2**26
"""Numbers that logit lenses of all positions may take, beside a map."""
Steps = tuple[int, ...]
"""The number of the step of every component."""


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class Waterfall(Paged, Tabled):
    """A target as the sum of what is added to the residual, in the order of the run.

    The sum so far is exact: it is the target's own covector, with the final norm as the run had it,
    on the residual so far. The logit lens reads the same residuals with the norm applied anew, so
    the two differ before the last step.

    Attributes:
        components: The target by component. Its rows are summed step by step.
        heads: The target by head and position, for what a step consists of; None for rows of a map.
        steps: Names of the steps: "embed", every sublayer in order, and "readout".
        of_step: For every row of ``components``, the number of its step.
        lens: What the logit lens reads after each step, [prompt, step]; nan where no residual is
            left. None for a target that is no token.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> found = lens.waterfall("Paris", "Rome")
        >>> found.steps[:3]
        ('embed', 'L0 attn', 'L0 MLP')
        >>> bool((found.sums.sum(1) - found.components.target_value).abs().max() < 1e-4)
        True
    """

    components: Attribution
    heads: Attribution | None
    steps: tuple[str, ...]
    of_step: tuple[int, ...]
    lens: Float[Tensor, "prompt step"] | None

    _COLUMNS = ("prompt", "step", "value", "so_far", "logit")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        values = self.sums.double()
        columns = [
            values,
            values.cumsum(-1),
            values * torch.nan if self.lens is None else self.lens,
        ]
        for prompt, rows in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            for step, *row in zip(self.steps, *rows, strict=True):
                yield (prompt, step, *row)

    def _facts(self) -> dict[str, Any]:
        return {"target": self.components.target}

    def __len__(self) -> int:
        return len(self.components)

    @property
    def sums(self) -> Float[Tensor, "prompt step"]:
        """What every step adds [prompt, step]."""
        values = self.components.values
        at = torch.tensor(self.of_step, device=values.device)
        return values.new_zeros(len(values), len(self.steps)).index_add(1, at, values)

    def __repr__(self) -> str:
        one = self.components
        lines = [f"Waterfall of {one.target[0]} = {float(one.target_value[0]):.4g}"]
        so_far = 0.0
        for i, (name, value) in enumerate(zip(self.steps, self.sums[0].tolist(), strict=True)):
            so_far += value
            read = "" if self.lens is None else f"  {LENS} {float(self.lens[0, i]):+9.4f}"
            lines.append(f"  {value:+9.4f}  {name:<14} so far {so_far:+9.4f}{read}")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None, prompt: int = 0) -> Axes:
        """Draw the steps of one prompt with matplotlib, and the logit lens as a dashed line.

        Args:
            ax: Axes to draw on. None makes a figure.
            prompt: Index of the prompt in the batch.

        Returns:
            The axes drawn on, with a bar for every step and one for the target.

        Raises:
            ValueError: If matplotlib is missing.
        """
        name, value = self.components.target[prompt], float(self.components.target_value[prompt])
        beside = None if self.lens is None else (LENS, as_array(self.lens[prompt]).tolist())
        return waterfall(
            ax,
            self.steps,
            self.sums[prompt].tolist(),
            unit=unit_of(name),
            title=f"{name} = {value:.4g}",
            total=("target", value),
            beside=beside,
        )

    def _page(self) -> Page:
        views = []
        for prompt in range(len(self)):
            one, own = self.components[prompt], self.heads and self.heads[prompt]
            rows: dict[int, list[int]] = {}
            for i, source in enumerate(own.sources if own else ()):
                if source.pos is not None and getattr(source.node, "kind", "") == "head":
                    rows.setdefault(self._step_of(str(source.node)), []).append(i)
            details = [
                {
                    "step": step,
                    "name": "Heads by the position that they read",
                    "labels": [own.labels[0][i] for i in found],
                    "values": as_array(own.values[0][found]),
                }
                for step, found in rows.items()
                if own
            ]
            lens = None if self.lens is None else as_array(self.lens[prompt])
            goal = f"{one.target[0]} = {float(one.target_value[0]):.4g}"
            parts = list(zip(self.of_step, one.labels[0], strict=True))
            values, unit = as_array(one.values[0]), unit_of(one.target[0])
            views.append(waterfall_view(self.steps, parts, values, details, lens, goal, unit=unit))
        error = self.components.completeness_error
        note = "The sum so far reads the residual with the final norm's scale of this run."
        exact = f"All steps sum to the target, off by at most {error or 0.0:.0e} of Σ|·|."
        return Page("One logit through depth", views, [exact, note], tabs=len(self) > 1, height=760)

    def row_view(self, tokens: Sequence[str], link: str) -> View:
        """Lay out the numbers of several positions as one view, which shows one of them.

        Args:
            tokens: The tokens at the positions.
            link: The name of the map whose rows these are.

        Returns:
            The view of these rows, with a control that chooses one.
        """
        one = self.components
        names = [f"“{t}” @{i}: {one.target[i]}" for i, t in enumerate(tokens)]
        parts = list(zip(self.of_step, one.labels[0], strict=True))
        lens = None if self.lens is None else as_array(self.lens)
        return waterfall_view(
            self.steps,
            parts,
            as_array(one.values),
            lens=lens,
            heading="The chosen row through depth",
            rows=names,
            link=link,
            unit=unit_of(one.target[0]),
        )

    def _step_of(self, node: str) -> int:
        names = [str(source.node) for source in self.components.sources]
        return self.of_step[names.index(node)]


def logit_waterfall(
    gradient: TargetGradient, target: TargetLike = None, versus: TargetLike = None, pos: int = -1
) -> Waterfall:
    """Order a target's components by depth, and read the logit lens beside.

    Args:
        gradient: The target, pulled back.
        target: The target as the user gave it: a token for the logit lens, or a direction.
        versus: What is subtracted, as the user gave it.
        pos: Position of the prediction among the real tokens.

    Returns:
        The steps of every prompt.
    """
    capture, operator = gradient.capture, gradient.operator
    components, heads = (attribute(gradient, by, "direct") for by in ("component", "head"))
    names, of_step = _steps(operator, components)
    lens = None
    if all(isinstance(one, str | int | None) for one in (target, versus)) and not capture.headless:
        logits = logit_lens(capture, operator, pos).logits[:, :, 0]
        ids = own_prediction(capture, pos)
        if target is not None:
            ids = torch.full_like(ids, resolve_token(capture, target))
        lens = _at(logits, ids)
        if versus is not None:
            lens = lens - _at(
                logits, torch.full_like(ids, resolve_token(capture, versus, "versus"))
            )
        # What is left after the last sublayer is read by the readout: both are the logit.
        lens = torch.cat([lens, lens[:, -1:]], 1)
    return Waterfall(components, heads, names, of_step, lens)


def row_waterfalls(capture: Capture, target: TargetLike = None) -> Waterfall:
    """Order the target of every position of a prompt by depth.

    Args:
        capture: The captured run of one prompt.
        target: The target at every position; None is each position's own prediction.

    Returns:
        The steps; a row is a position. There is no logit lens of a direction, nor where its logits
        at all positions would take more than :data:`LENS_LIMIT` numbers.
    """
    operator, (start, stop) = FrozenTransformer.of(capture), capture.frame.spans[0]
    goals = [resolve(capture, target, None, pos) for pos in range(stop - start)]
    found = list(attribute_many(capture, operator, goals, "component"))
    components = replace(
        found[0],
        values=torch.cat([one.values for one in found]),
        labels=tuple(one.labels[0] for one in found),
        target=tuple(one.target[0] for one in found),
        target_value=torch.cat([one.target_value for one in found]),
        spans=tuple(one.spans[0] for one in found),
    )
    names, of_step = _steps(operator, components)
    lens, size = None, (len(operator.steps) + 1) * capture.logits.numel()
    if isinstance(target, str | int | None) and not capture.headless and size <= LENS_LIMIT:
        logits = logit_lens(capture, operator, None).logits[0, :, start:stop].transpose(0, 1)
        own = capture.logits[0, start:stop].argmax(-1)
        ids = own if target is None else torch.full_like(own, resolve_token(capture, target))
        lens = _at(logits, ids)
        lens = torch.cat([lens, lens[:, -1:]], 1)
    return Waterfall(components, None, names, of_step, lens)


def _at(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids[:, None, None].expand(*logits.shape[:2], 1))[..., 0]


def _steps(operator: FrozenTransformer, components: Attribution) -> tuple[tuple[str, ...], Steps]:
    """Names of the steps in order, and the step of every component."""
    names, place = ["embed"], {}
    for number, step in enumerate(operator.steps, 1):
        kinds = []
        for branch in step.branches:
            nodes: list[Any] = list(branch.body.nodes())
            kinds.append("attn" if nodes[0].kind == "head" else "MLP")
            place |= {str(node): number for node in nodes}
        names.append(f"L{step.layer} {' + '.join(kinds)}")
    names, of_step, latest = [*names, "readout"], [], 0
    for source in components.sources:
        node = source.node
        if isinstance(node, Node) and node.enters:
            step = 0
        elif not isinstance(node, Node) or node.layer is None:
            step = len(names) - 1
        else:  # a constant follows what it belongs to
            step = latest = place.get(str(node), latest)
        of_step.append(step)
    return tuple(names), tuple(of_step)
