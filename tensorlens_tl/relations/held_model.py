"""The real model with some of what the operator freezes held by hooks, and the rest live.

Held at their values in the captured run: "pattern", every attention pattern; "scale", every norm's
scale; "ratio", every gating ratio (of a gated MLP its act(g)). With all three held the real model is
the operator, so what is left live tells where the two part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..hosts import Edit, LiveModel, Read, UnsupportedArchitectureError
from ..sublayers import gating_ratio

PARTS = ("pattern", "scale", "ratio")


def holding(live: LiveModel, parts: Sequence[str]) -> list[Edit]:
    """Hooks under which a live model of one prompt holds some parts. Cost: a forward pass.

    An MLP's post-activations become post₀ + r ⊙ (z − z₀), with r = act(z₀)/z₀ and, of a gated one,
    r = act(g₀) and z the factor beside it; ₀ marks the captured run.

    Args:
        live: The model.
        parts: Of :data:`PARTS`.

    Returns:
        The hooks, for :meth:`LiveModel.run`.

    Raises:
        ValueError: If there is no such part.
        UnsupportedArchitectureError: If ratios are to be held in a model with SoLU activations, or
            patterns where the host would discard them.
    """
    if wrong := set(parts) - set(PARTS):
        raise ValueError(
            f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(wrong))}: name some of these"
        )
    if "pattern" in parts and live.adapter.attends_apart:
        raise UnsupportedArchitectureError(
            f"the patterns of {live.adapter.name} cannot be held by a hook: its host goes on with its own. "
            "Hold scales or ratios, or use a HookedTransformer"
        )
    points, seen = live.adapter.points(), {}
    acts = [block.mlp.act if block.mlp is not None else "" for block in live.adapter.weights.blocks]
    if "ratio" in parts and "solu" in acts:
        raise UnsupportedArchitectureError(
            f"the ratios of SoLU, x ⊙ softmax(x), cannot be held by a hook in {live.adapter.name}: hold "
            "patterns or scales"
        )
    keys = {"pattern": ("pattern",), "ratio": ("pre", "pre_linear", "post")}

    def part(read: Read) -> str:
        return next((p for p, names in keys.items() if read[1] in names), read[1].split(".")[-1])

    points = {read: point for read, point in points.items() if part(read) in parts}
    with torch.no_grad():
        keep = {read: (lambda t, read=read: seen.__setitem__(read, t.detach())) for read in points}
        live.checked(live.run(live.x, [(point, keep[read]) for read, point in points.items()]))
    now: dict[Read, Tensor] = {}
    return [(point, _held(read, acts, seen, now)) for read, point in points.items()]


def _held(
    read: Read, acts: list[str], seen: dict[Read, Tensor], now: dict[Read, Tensor]
) -> Callable[[Tensor], Tensor | None]:
    layer, key = read
    if key in ("pre", "pre_linear"):
        return lambda t: now.__setitem__(read, t)
    if key != "post" or layer is None:
        return lambda t: _again(seen[read], t)

    def post(t: Tensor) -> Tensor:
        gated = (layer, "pre_linear") in seen
        z = layer, "pre_linear" if gated else "pre"
        ratio = gating_ratio(acts[layer], seen[layer, "pre"])
        ratio = ratio * seen[layer, "pre"] if gated else ratio
        return seen[read] + ratio * (now[z] - seen[z])

    return post


def _again(seen: Tensor, now: Tensor) -> Tensor:
    # OPT's second norm shows its scales with batch and positions in one axis.
    return seen.repeat(len(now) // len(seen), 1) if now.ndim == 2 else seen.expand_as(now).clone()
