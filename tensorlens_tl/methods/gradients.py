"""Earlier attributions that differentiate the real model: each runs it once more, through hooks.

A :class:`LiveModel` is the host itself on unpadded prompts of one length, as a differentiable
function of X, the residual that enters the first block: X → y, the final normalized residual. The
target is u · y, as everywhere in this library; a logit soft cap's ratio is held inside u. Hooks are
taken off after every run, also after an error, and gradients are asked of activations only, so that
weights, their ``grad``, flags and mode stay as they were.

Every method is a function (live, query, covector) → scores of the prompts' tokens [prompt, pos].
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import at_least_one, need
from ..hosts import LiveModel, Scores, UnsupportedArchitectureError, hooked, target_of

# --- Methods -------------------------------------------------------------------------------------


def grad_x_input(
    live: LiveModel, query: Int[Tensor, " prompt"], covector: Float[Tensor, "prompt d_model"]
) -> Scores:
    """Gradient × input, x_j · ∂(u · y)/∂x_j, summed over the width; signed.

    Source: Shrikumar et al. 2016 (arXiv 1605.01713). Cost: a forward and a backward pass.

    Args:
        live: The model.
        query: The target's positions.
        covector: u.

    Returns:
        The scores.
    """
    y, _ = live.plain
    target = target_of(y, query, covector).sum()
    (gradient,) = torch.autograd.grad(target, live.x, retain_graph=True)
    return (gradient * live.x).sum(-1)


def integrated_gradients(
    live: LiveModel,
    query: Int[Tensor, " prompt"],
    covector: Float[Tensor, "prompt d_model"],
    baseline: str = "zero",
    steps: int = 50,
) -> Scores:
    """Integrated gradients, (x_j − x′_j) · ∫₀¹ ∂(u · y)/∂x_j at x′ + α (x − x′) dα; signed.

    They sum to the target's difference between x and x′, up to the quadrature's error. Source:
    Sundararajan et al. 2017; computed by captum (Gauss–Legendre, weights in float32). Cost:
    ``steps`` forward and backward passes.

    Args:
        live: The model.
        query: The target's positions.
        covector: u.
        baseline: x′: "zero", "mean" (the mean of the prompt's own embedded tokens) or "bos" (the
            beginning-of-sequence token at every position).
        steps: Points of the quadrature.

    Returns:
        The scores.

    Raises:
        ValueError: If captum is missing, or the baseline does not exist.
    """
    captum = need("captum.attr", "baselines", "integrated_gradients")
    at_least_one(steps, "steps")

    def target(x: Tensor, query: Tensor, covector: Tensor) -> Tensor:
        return target_of(live.run(x), query, covector)

    live.checked(live.run(live.x))
    found = captum.IntegratedGradients(target).attribute(
        live.x.detach(),
        reference(live, baseline),
        additional_forward_args=(query, covector),
        n_steps=steps,
        internal_batch_size=max(len(live.x), 32),
    )
    return found.sum(-1)


def reference(live: LiveModel, baseline: str) -> Float[Tensor, "prompt pos d_model"]:
    """The input x′ that integrated gradients start from.

    Args:
        live: The model.
        baseline: "zero", "mean" or "bos".

    Returns:
        x′.

    Raises:
        ValueError: If there is no such baseline, or no beginning-of-sequence token.
    """
    x = live.x.detach()
    if baseline == "zero":
        return torch.zeros_like(x)
    if baseline == "mean":
        return x.mean(1, keepdim=True).expand_as(x).contiguous()
    if baseline != "bos":
        raise ValueError(f"expected baseline to be one of zero, mean, bos, got {baseline!r}")
    bos = getattr(live.adapter.tokenizer, "bos_token_id", None)
    if bos is None:
        raise ValueError(
            "the model has no beginning-of-sequence token: use baseline='zero' or 'mean'"
        )
    embedded: list[Tensor] = []
    entry = live.adapter.points()[0, "resid_pre"]
    with torch.no_grad(), hooked([(entry, embedded.append)]):
        # Read before the entry's replacement: this hook was put on first.
        live.run(x, ids=torch.full_like(live.ids, bos))
    return embedded[0].detach()


def chefer(
    live: LiveModel, query: Int[Tensor, " prompt"], covector: Float[Tensor, "prompt d_model"]
) -> Scores:
    """Chefer's rule: relevance R ← R + Ē R from R = I, with Ē = mean_h (∇A ⊙ A)⁺; the row R[query].

    ∇A is the target's gradient at the layer's pattern, with everything behind it live. Source:
    Chefer et al. 2021 (ICCV, bimodal transformers). Cost: a forward and a backward pass.

    Args:
        live: The model.
        query: The target's positions.
        covector: u.

    Returns:
        The scores, none negative; the query's own begins at 1, the identity's.

    Raises:
        UnsupportedArchitectureError: If the pattern that can be read is not the one that acts.
    """
    y, patterns = live.plain
    target = target_of(y, query, covector).sum()
    gradients = _gradients(live, target, patterns)
    relevance = torch.eye(y.shape[1], dtype=y.dtype, device=y.device).expand(len(y), -1, -1)
    for pattern, gradient in zip(patterns, gradients, strict=True):
        relevance = relevance + (gradient * pattern).clamp_min(0).mean(1).to(y) @ relevance
    return relevance[torch.arange(len(y), device=y.device), query]


def _gradients(live: LiveModel, target: Tensor, patterns: list[Tensor]) -> list[Tensor]:
    found: tuple[Tensor | None, ...] = (None,)
    if all(pattern.requires_grad for pattern in patterns):
        found = torch.autograd.grad(target, patterns, retain_graph=True, allow_unused=True)
    if any(gradient is None for gradient in found):
        raise UnsupportedArchitectureError(
            f"chefer needs gradients of attention patterns, but the patterns that {live.adapter.name} "
            "shows are not those it computes with: use a HookedTransformer, or another method"
        )
    return [gradient for gradient in found if gradient is not None]
