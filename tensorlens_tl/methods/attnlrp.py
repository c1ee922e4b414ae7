"""AttnLRP: attributions by layer-wise relevance propagation through attention."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..graph import score_sites
from ..hosts import Adapter, Edit, LiveModel, Read, Scores, UnsupportedArchitectureError, target_of
from ..sublayers import gating_ratio, soft_cap_ratio


def attnlrp(
    live: LiveModel, query: Int[Tensor, " prompt"], covector: Float[Tensor, "prompt d_model"]
) -> Scores:
    """AttnLRP: layer-wise relevance propagation with rules for attention; signed.

    Rules of Achtibat et al. 2024 (arXiv 2402.05602), with ε → 0, and what each is as a gradient.
    Write every relevance as R_x = x ⊙ g; g of the target is u, and a rule is what g becomes:

    - linear map and sum (ε-rule): R_i = x_i Σ_j w_ij R_j / y_j, so g_x = W g_y: the gradient.
      A bias keeps its share b ⊙ g_y.
    - softmax (Taylor rule): R_i = x_i (R_i − s_i Σ_j R_j) with R = s ⊙ g_s, so
      g_x = s ⊙ (g_s − Σ s g_s): the gradient.
    - a product of two activations, A·V and Q·Kᵀ (uniform rule) and act(g) ⊙ u: each factor
      gets half of R: the gradient, halved. Halving at both Q and K is halving at the scores once,
      and softmax is linear in g: a quarter at the pattern, half at the values.
    - an activation, also a soft cap of scores (identity rule): R_x = R_y, so g_x = act(x)/x · g_y:
      the ratio in place of the derivative.
    - a norm x/s (identity rule): R_x = R_y, so g_x = g_y / s: the scale is held.

    Relevance is conserved through every rule but softmax's, whose constant term keeps a share, and
    biases, which keep theirs. Cost: a forward and a backward pass.

    Args:
        live: The model.
        query: The target's positions.
        covector: u.

    Returns:
        The scores.

    Raises:
        UnsupportedArchitectureError: If the model has SoLU activations, for which there is no rule, or
            the host does not let a rule act.
    """
    y, rules, met = _run(live)
    target = target_of(y, query, covector).sum()
    (gradient,) = torch.autograd.grad(target, live.x, retain_graph=True)
    if unmet := rules - met:
        where = ", ".join(
            f"{key} of {f'L{i}' if i is not None else 'the model'}" for i, key in unmet
        )
        raise UnsupportedArchitectureError(
            f"attnlrp's rules cannot act in {live.adapter.name}: the gradient does not pass its hook "
            f"points for {where}. Use a HookedTransformer, or another method"
        )
    return (gradient * live.x).sum(-1)


_RUNS: WeakKeyDictionary[LiveModel, tuple[Tensor, set[Read], set[Read]]] = WeakKeyDictionary()
"""One run per live model, as all rows of a matrix need it; it goes with the live model."""


def _run(live: LiveModel) -> tuple[Tensor, set[Read], set[Read]]:
    """The final y under the rules, the rules, and those that a gradient has met so far."""
    if live not in _RUNS:
        edits, rules, met = _attnlrp_edits(live.adapter)
        _RUNS[live] = live.checked(live.run(live.x, edits)), rules, met
    return _RUNS[live]


def _attnlrp_edits(adapter: Adapter) -> tuple[list[Edit], set[Read], set[Read]]:
    """AttnLRP's rules as hooks that change gradients and no value; what they are for; what they met."""
    cap = adapter.soft_cap("attn_scores_soft_cap")
    factors: dict[str, Callable[[Tensor], Tensor | float]] = {
        "pattern": lambda _: 0.25,
        "v": lambda _: 0.5,
    }
    if cap is not None:
        factors["scores"] = lambda scores: _cap_factor(scores, cap, adapter.name)
    points = adapter.points()
    acts: dict[int | None, str] = {}
    for layer, block in enumerate(adapter.weights.blocks):
        acts[layer] = block.mlp.act if block.mlp is not None else ""
        sites = {key: adapter.hooks.get(name) for key, name in score_sites(layer).items()}
        points |= {(layer, key): point for key, point in sites.items() if point is not None}
        if acts[layer] == "solu":
            raise UnsupportedArchitectureError(
                f"attnlrp has no rule for SoLU, x ⊙ softmax(x), which {adapter.name} uses: take "
                "another method"
            )
    met: set[Read] = set()
    kept: dict[Read, Tensor] = {}
    edits: dict[Read, Edit] = {}
    for read, point in points.items():
        layer, key = read
        if key.endswith("scale"):
            edits[read] = point, _rescaled(read, lambda _: 0.0, met)
        elif key in factors:
            edits[read] = point, _rescaled(read, factors[key], met)
        elif key == "post":
            edits[read] = point, _surrogate(read, acts[layer], kept, met)
        elif key in ("pre", "pre_linear"):
            keep = lambda tensor, read=read: kept.__setitem__(read, tensor)  # noqa: E731
            edits[read] = point, keep
    rules = {read for read in edits if read[1] not in ("pre", "pre_linear")}
    return list(edits.values()), rules, met


def _rescaled(
    read: Read, factor: Callable[[Tensor], Tensor | float], met: set[Read]
) -> Callable[[Tensor], Tensor | None]:
    """Multiply the gradient that comes to an activation."""

    def edit(tensor: Tensor) -> Tensor | None:
        # A Bridge shows views of values, and scales computed beside the run, but uses what a hook
        # returns; some of its attentions show the pattern they use, but nothing returned.
        result = tensor if read[1] in ("pattern", "scores") else tensor.clone()
        by = factor(tensor.detach())

        def scaled(gradient: Tensor) -> Tensor:
            met.add(read)
            return gradient * by

        if result.requires_grad:
            result.register_hook(scaled)
        return None if result is tensor else result

    return edit


def _cap_factor(scores: Tensor, cap: float, name: str) -> Tensor:
    # With t = tanh(l / cap): the ratio t / atanh(t) over the derivative 1 − t². Masked scores stay.
    if bool((scores >= 0).all()) and bool(((scores.sum(-1) - 1).abs() < 0.01).all()):
        raise UnsupportedArchitectureError(
            f"attnlrp needs attention scores before the softmax, as {name} caps them, but it shows "
            "patterns in their place: use a HookedTransformer, or another method"
        )
    t = scores / cap
    t = torch.where(t.abs() < 1, t, 0)
    return soft_cap_ratio(torch.atanh(t) * cap, cap) / (1 - t.square())


def _surrogate(
    read: Read, act: str, kept: dict[Read, Tensor], met: set[Read]
) -> Callable[[Tensor], Tensor]:
    """Post-activations of the same value, linear in z, or half in either factor of act(g) ⊙ u."""

    def edit(post: Tensor) -> Tensor:
        z, up = kept.pop((read[0], "pre")), kept.pop((read[0], "pre_linear"), None)
        ratio = gating_ratio(act, z.detach())
        linear = ratio * z
        if up is not None:
            linear = 0.5 * ratio * (z.detach() * up + up.detach() * z)
        result = post.detach() + (linear - linear.detach())
        result.register_hook(lambda gradient: met.add(read))
        return result

    return edit
