"""Run the real model with chosen quantities fixed at their values in the captured run.

Any of attention patterns ("pattern"), norm scales ("scale") and gating ratios ("ratio", of a gated
MLP its act(g)) can be fixed. With all three fixed the real model equals the operator. Leaving one
live shows how much of their difference that one accounts for.

1. Run the model once and keep what is to be fixed.
2. Make a hook for every kept activation, which puts the kept value back, or for post-activations
   the value that follows from the kept ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..readers import Read
from ..recording import HookEdit, LiveModel
from ..refusals import UnsupportedArchitectureError
from ..sublayers import ExpertsWeights, gating_ratio

FREEZABLE = ("pattern", "scale", "ratio")
"""What the operator freezes, by name."""


def hold_frozen(live: LiveModel, parts: Sequence[str]) -> list[HookEdit]:
    """Make hooks under which a live model of one prompt holds some frozen parts.

    An MLP's post-activations become post₀ + r ⊙ (z − z₀), where ₀ marks the captured run. The ratio
    is r = act(z₀)/z₀. For a gated MLP it is r = act(g₀), and z is the factor beside act(g). Cost: a
    forward pass.

    Args:
        live: The real model on one prompt.
        parts: Names of what to hold, of :data:`FREEZABLE`.

    Returns:
        The hooks, for :meth:`LiveModel.run`.

    Raises:
        ValueError: If there is no such part.
        UnsupportedArchitectureError: If ratios are to be held in a model with SoLU activations, or
            patterns where the host would discard them.
    """
    _check_parts(live, parts)
    acts = [block.mlp.act if block.mlp is not None else "" for block in live.adapter.weights.blocks]
    keys = {"pattern": ("pattern",), "ratio": ("pre", "pre_linear", "post")}

    def part(read: Read) -> str:
        # Every other read is named after the norm whose scale it is: "ln1.scale".
        return next((p for p, names in keys.items() if read[1] in names), read[1].split(".")[-1])

    points = live.adapter.points()
    points = {read: point for read, point in points.items() if part(read) in parts}
    # 1. Keep.
    seen: dict[Read, Tensor] = {}
    with torch.no_grad():
        keep = {read: (lambda t, read=read: seen.__setitem__(read, t.detach())) for read in points}
        live.checked(live.run(live.x, [(point, keep[read]) for read, point in points.items()]))
    # 2. Hold.
    now: dict[Read, Tensor] = {}
    return [(point, _held(read, acts, seen, now)) for read, point in points.items()]


def _check_parts(live: LiveModel, parts: Sequence[str]) -> None:
    name = live.adapter.name
    if wrong := sorted(set(parts) - set(FREEZABLE)):
        raise ValueError(
            f"The operator freezes no {', '.join(wrong)}. Hold some of {', '.join(FREEZABLE)}."
        )
    if odd := live.adapter.unlike("shown") if parts else "":
        raise UnsupportedArchitectureError(
            f"{odd}, parts of which no hook can hold. Measure with nothing held."
        )
    if "pattern" in parts and live.adapter.attends_apart:
        raise UnsupportedArchitectureError(
            f"{name} computes on with its own patterns, so a hook cannot hold them. "
            "Hold scales or ratios, or use a HookedTransformer."
        )
    mlps = [block.mlp for block in live.adapter.weights.blocks if block.mlp is not None]
    if "ratio" in parts and any(isinstance(mlp, ExpertsWeights) for mlp in mlps):
        raise UnsupportedArchitectureError(
            f"{name} has a mixture of experts, whose ratios and routing a hook cannot hold. "
            "Hold patterns or scales."
        )
    acts = [mlp.act for mlp in mlps]
    if "ratio" in parts and "solu" in acts:
        raise UnsupportedArchitectureError(
            f"{name} uses SoLU, x ⊙ softmax(x), whose ratio a hook cannot hold. "
            "Hold patterns or scales."
        )


def _held(
    read: Read, acts: list[str], seen: dict[Read, Tensor], now: dict[Read, Tensor]
) -> Callable[[Tensor], Tensor | None]:
    layer, key = read
    if key in ("pre", "pre_linear"):  # stays live; the hook of post reads it
        return lambda t: now.__setitem__(read, t)
    if key != "post" or layer is None:
        return lambda t: _again(seen[read], t)

    def post(t: Tensor) -> Tensor:
        # The gate act(g₀) is held whole, and the other factor is live: linear in it.
        gated = (layer, "pre_linear") in seen
        z = layer, "pre_linear" if gated else "pre"
        ratio = gating_ratio(acts[layer], seen[layer, "pre"])
        ratio = ratio * seen[layer, "pre"] if gated else ratio
        # From the run's own value, not ratio · z: a ratio that is not quite act(z)/z leaves no
        # trace at z₀.
        return seen[read] + ratio * (now[z] - seen[z])

    return post


def _again(seen: Tensor, now: Tensor) -> Tensor:
    # OPT's second norm shows its scales with batch and positions in one axis.
    return seen.repeat(len(now) // len(seen), 1) if now.ndim == 2 else seen.expand_as(now).clone()
