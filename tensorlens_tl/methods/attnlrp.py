"""AttnLRP (Achtibat et al. 2024): layer-wise relevance propagation through attention.

1. Put every rule on the real model as a hook that changes gradients and no value.
2. Run the model once under these hooks; its output must still be the captured one.
3. Differentiate the target. The scores are gradient × input.
4. Refuse the result if the gradient passed by one of the hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..hosts import Adapter
from ..readers import Read
from ..recording import HookEdit, LiveModel, Scores, target_of
from ..refusals import UnsupportedArchitectureError
from ..sublayers import ExpertsWeights, gating_ratio, soft_cap_ratio


def attnlrp(
    live: LiveModel, query: Int[Tensor, " prompt"], covector: Float[Tensor, "prompt d_model"]
) -> Scores:
    """AttnLRP (Achtibat et al. 2024, arXiv 2402.05602): relevance rules for attention; signed.

    The rules are taken with ε → 0, and each is written as a gradient. Let every relevance be
    R_x = x ⊙ g. The g of the target is u, and a rule says what g becomes:

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
        live: The real model on prompts of one length.
        query: Position of the target, per prompt [prompt].
        covector: Covector u of the target [prompt, d_model].

    Returns:
        A score for every token [prompt, pos], in the target's units.

    Raises:
        UnsupportedArchitectureError: If the model has SoLU activations, for which there is no rule,
            or the host does not let a rule act.
    """
    # 1. and 2. One run under the rules serves all rows of a matrix.
    y, rules, met = _run(live)
    # 3. Scores.
    target = target_of(y, query, covector).sum()
    (gradient,) = torch.autograd.grad(target, live.x, retain_graph=True)
    # 4. Every rule must have met the gradient.
    if unmet := rules - met:
        where = ", ".join(
            f"{key} of {f'L{i}' if i is not None else 'the model'}" for i, key in unmet
        )
        raise UnsupportedArchitectureError(
            f"The rules of attnlrp cannot act in {live.adapter.name}, whose gradient does not pass "
            f"the hook points of {where}. Use a HookedTransformer, or another method."
        )
    return (gradient * live.x).sum(-1)


_RUNS: WeakKeyDictionary[LiveModel, tuple[Tensor, set[Read], set[Read]]] = WeakKeyDictionary()
"""One run per live model, for all rows of a matrix. It is dropped with the live model."""


def _run(live: LiveModel) -> tuple[Tensor, set[Read], set[Read]]:
    """The final y under the rules, all rules, and the rules that a gradient has met so far."""
    if live not in _RUNS:
        edits, rules, met = _attnlrp_edits(live.adapter)
        _RUNS[live] = live.checked(live.run(live.x, edits)), rules, met
    return _RUNS[live]


def _attnlrp_edits(adapter: Adapter) -> tuple[list[HookEdit], set[Read], set[Read]]:
    """AttnLRP's rules as hooks that change gradients and no value.

    Args:
        adapter: Adapter of the host model.

    Returns:
        The hooks, the activations that have a rule, and a set that fills with those whose hook a
        gradient has met.

    Raises:
        UnsupportedArchitectureError: If the model has SoLU activations, or a mixture of experts.
    """
    if odd := adapter.unlike("shown"):
        raise UnsupportedArchitectureError(
            f"{odd}, for which attnlrp has no rule. Use another method."
        )
    cap = adapter.soft_cap("attn_scores_soft_cap")
    # A·V halves both factors; Q·Kᵀ halves again, once at the pattern, as softmax is linear in g.
    factors: dict[str, Callable[[Tensor], Tensor | float]] = {
        "pattern": lambda _: 0.25,
        "v": lambda _: 0.5,
        "v_by_head": lambda _: 0.5,
    }
    if cap is not None:
        factors["scores"] = lambda scores: _cap_factor(scores, cap, adapter.name)
    points = adapter.points() | adapter.score_points()
    acts: dict[int | None, str] = {}
    for layer, block in enumerate(adapter.weights.blocks):
        if isinstance(block.mlp, ExpertsWeights):
            raise UnsupportedArchitectureError(
                f"{adapter.name} has a mixture of experts, for which attnlrp has no rule. "
                "Use another method."
            )
        acts[layer] = block.mlp.act if block.mlp is not None else ""
        if acts[layer] == "solu":
            raise UnsupportedArchitectureError(
                f"{adapter.name} uses SoLU, x ⊙ softmax(x), for which attnlrp has no rule. "
                "Use another method."
            )
    met: set[Read] = set()
    kept: dict[Read, Tensor] = {}
    edits: dict[Read, HookEdit] = {}
    for read, point in points.items():
        layer, key = read
        if key == "embed_ln.scale":  # below X, where relevance ends
            continue
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
    """Multiply the gradient that reaches an activation by a factor of that activation."""

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
    # Rows that sum to 1 are patterns: without the true scores the rule would be wrong in silence.
    if bool((scores >= 0).all()) and bool(((scores.sum(-1) - 1).abs() < 0.01).all()):
        raise UnsupportedArchitectureError(
            f"attnlrp needs attention scores before the softmax, because {name} caps them, but the "
            "host shows patterns instead. Use a HookedTransformer, or another method."
        )
    # Of t = tanh(l / cap): the ratio t / atanh(t) over the derivative 1 − t² that autograd applies.
    # Masked scores are no tanh; their gradient stays as it is.
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
        result = post.detach() + (linear - linear.detach())  # post's value, linear's gradient
        result.register_hook(lambda gradient: met.add(read))
        return result

    return edit
