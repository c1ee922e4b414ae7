"""One logit through depth: what every sublayer adds, and what the logit lens reads there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import (
    Attribution,
    TargetGradient,
    TargetLike,
    attribute,
    own_prediction,
    resolve_token,
)
from ..checks import as_array
from ..graph import Node
from ..methods import logit_lens
from ..operator import FrozenTransformer
from ..pictures import Page, Paged, waterfall_view

LENS = "logit lens"


@dataclass(frozen=True, eq=False, repr=False)
class Waterfall(Paged):
    """A target as the sum of what is added to the residual, in the order of the run.

    The sum so far is exact: it is the target's own covector, with the final norm as the run had it,
    on the residual so far. The logit lens reads the same residuals with the norm applied anew, so
    the two differ before the last step.

    Attributes:
        components: The target by component. Its rows are summed step by step.
        heads: The target by head and position, for what a step consists of.
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
    heads: Attribution
    steps: tuple[str, ...]
    of_step: tuple[int, ...]
    lens: Float[Tensor, "prompt step"] | None

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

    def _page(self) -> Page:
        views = []
        for prompt in range(len(self)):
            one, own = self.components[prompt], self.heads[prompt]
            rows: dict[int, list[int]] = {}
            for i, source in enumerate(own.sources):
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
            ]
            lens = None if self.lens is None else as_array(self.lens[prompt])
            heading = f"{one.target[0]} = {float(one.target_value[0]):.4g}"
            parts = list(zip(self.of_step, one.labels[0], strict=True))
            values = as_array(one.values[0])
            views.append(waterfall_view(self.steps, parts, values, details, lens, heading))
        error = self.components.completeness_error
        note = "The sum so far reads the residual with the final norm's scale of this run."
        exact = f"All steps sum to the target, off by at most {error or 0.0:.0e} of Σ|·|."
        return Page("One logit through depth", views, [exact, note], tabs=len(self) > 1, height=760)

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
    names, place = _steps(operator)
    of_step, latest = [], 0
    for source in components.sources:
        node = source.node
        if isinstance(node, Node) and node.enters:
            step = 0
        elif not isinstance(node, Node) or node.layer is None:
            step = len(names) - 1
        else:  # a constant follows what it belongs to
            step = latest = place.get(str(node), latest)
        of_step.append(step)
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
    return Waterfall(components, heads, names, tuple(of_step), lens)


def _at(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids[:, None, None].expand(*logits.shape[:2], 1))[..., 0]


def _steps(operator: FrozenTransformer) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of the steps in order, and the step of every head, MLP and expert."""
    names, place = ["embed"], {}
    for number, step in enumerate(operator.steps, 1):
        kinds = []
        for branch in step.branches:
            nodes: list[Any] = list(branch.body.nodes())
            kinds.append("attn" if nodes[0].kind == "head" else "MLP")
            place |= {str(node): number for node in nodes}
        names.append(f"L{step.layer} {' + '.join(kinds)}")
    return (*names, "readout"), place
