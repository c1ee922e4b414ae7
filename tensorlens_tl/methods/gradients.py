"""Earlier attributions that differentiate the real model: each runs the model once more.

A :class:`LiveModel` is the host on unpadded prompts of one length. It is a differentiable function
from X, the residual that enters the first block, to y, the final normalized residual. The target is
u · y, as everywhere in this library; the ratio of a logit soft cap is held inside u. Hooks are
taken off after every run, also after an error. Gradients are asked of activations only, so weights,
their ``grad``, flags and mode stay as they were.

Every method is a function (live, query, covector) → scores of the prompts' tokens [prompt, pos].
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import at_least_one, need
from ..recording import LiveModel, Scores, hooked, target_of
from ..refusals import UnsupportedArchitectureError

# --- Methods -------------------------------------------------------------------------------------


def grad_x_input(
    live: LiveModel, query: Int[Tensor, " prompt"], covector: Float[Tensor, "prompt d_model"]
) -> Scores:
    """Gradient × input (Shrikumar et al. 2016, arXiv 1605.01713): x_j · ∂(u · y)/∂x_j; signed.

    The product is summed over the width. Cost: a forward and a backward pass.

    Args:
        live: The real model on prompts of one length.
        query: Position of the target, per prompt [prompt].
        covector: Covector u of the target [prompt, d_model].

    Returns:
        A score for every token [prompt, pos], in the target's units.
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
    """Integrated gradients (Sundararajan et al. 2017): the mean gradient on the way from x′ to x.

    A token's score is (x_j − x′_j) · ∫₀¹ ∂(u · y)/∂x_j dα, taken at x′ + α (x − x′); signed. The
    scores sum to the target's difference between x and x′, up to the error of the quadrature. It is
    computed by captum (Gauss–Legendre, weights in float32). Cost: ``steps`` forward and backward
    passes.

    Args:
        live: The real model on prompts of one length.
        query: Position of the target, per prompt [prompt].
        covector: Covector u of the target [prompt, d_model].
        baseline: Reference input x′. "zero" is 0, "mean" the mean of the prompt's own embedded
            tokens, "bos" the beginning-of-sequence token at every position.
        steps: Number of points of the quadrature.

    Returns:
        A score for every token [prompt, pos], in the target's units.

    Raises:
        ValueError: If captum is missing, or the baseline does not exist.
    """
    captum = need("captum.attr", "baselines", "integrated_gradients")
    at_least_one(steps, "steps")

    def target(x: Tensor, query: Tensor, covector: Tensor) -> Tensor:
        return target_of(live.run(x), query, covector)

    live.checked(live.run(live.x))  # captum's own runs are at other inputs
    found = captum.IntegratedGradients(target).attribute(
        live.x.detach(),
        reference(live, baseline),
        additional_forward_args=(query, covector),
        n_steps=steps,
        # captum runs several points together, and never less than one point of all prompts.
        internal_batch_size=max(len(live.x), 32),
    )
    return found.sum(-1)


def reference(live: LiveModel, baseline: str) -> Float[Tensor, "prompt pos d_model"]:
    """Make the input x′ that integrated gradients start from.

    Args:
        live: The real model on prompts of one length.
        baseline: Name of the reference: "zero", "mean" or "bos".

    Returns:
        The reference input x′ [prompt, pos, d_model], in the model's dtype.

    Raises:
        ValueError: If there is no such baseline, or no beginning-of-sequence token.
    """
    x = live.x.detach()
    if baseline == "zero":
        return torch.zeros_like(x)
    if baseline == "mean":
        # One vector at all positions: their order is gone, and the mean of the words is left.
        return x.mean(1, keepdim=True).expand_as(x).contiguous()
    if baseline != "bos":
        raise ValueError(f"baseline={baseline!r} does not exist. Choose 'zero', 'mean' or 'bos'.")
    bos = getattr(live.adapter.tokenizer, "bos_token_id", None)
    if bos is None:
        raise ValueError(
            "The model's tokenizer has no beginning-of-sequence token. "
            "Use baseline='zero' or baseline='mean'."
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
    """Chefer's relevance rule (Chefer et al. 2021, ICCV): R ← R + Ē R, from R = I, layer by layer.

    Ē = mean_h (∇A ⊙ A)⁺, and ∇A is the target's gradient at the layer's pattern, with everything
    behind it live. The scores are the row R[query]. Cost: a forward and a backward pass.

    Args:
        live: The real model on prompts of one length.
        query: Position of the target, per prompt [prompt].
        covector: Covector u of the target [prompt, d_model].

    Returns:
        A score for every token [prompt, pos], none negative. The target's own position starts
        at 1, from the identity.

    Raises:
        UnsupportedArchitectureError: If the pattern that can be read is not the one that acts.
    """
    if odd := live.adapter.unlike("has_pattern"):
        raise UnsupportedArchitectureError(
            f"{odd}, which has no pattern to weigh. Use a method without patterns."
        )
    y, patterns = live.plain  # one run serves every row of a matrix
    target = target_of(y, query, covector).sum()
    gradients = _gradients(live, target, patterns)
    # R = I at the embeddings: each token is relevant to itself alone.
    relevance = torch.eye(y.shape[1], dtype=y.dtype, device=y.device).expand(len(y), -1, -1)
    for pattern, gradient in zip(patterns, gradients, strict=True):
        # Ē R: heads averaged after negative parts are dropped, as in the paper.
        relevance = relevance + (gradient * pattern).clamp_min(0).mean(1).to(y) @ relevance
    return relevance[torch.arange(len(y), device=y.device), query]


def _gradients(live: LiveModel, target: Tensor, patterns: list[Tensor]) -> list[Tensor]:
    found: tuple[Tensor | None, ...] = (None,)
    if all(pattern.requires_grad for pattern in patterns):
        found = torch.autograd.grad(target, patterns, retain_graph=True, allow_unused=True)
    if any(gradient is None for gradient in found):
        raise UnsupportedArchitectureError(
            f"chefer needs gradients of attention patterns, but {live.adapter.name} shows patterns "
            "that it does not compute with. Use a HookedTransformer, or another method."
        )
    return [gradient for gradient in found if gradient is not None]
