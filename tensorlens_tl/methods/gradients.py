"""Earlier attributions that differentiate the real model: each runs it once more, through hooks.

A :class:`LiveModel` is the host itself on unpadded prompts of one length, as a differentiable
function of X, the residual that enters the first block: X → y, the final normalized residual. The
target is u · y, as everywhere in this library; a logit soft cap's ratio is held inside u. Hooks are
taken off after every run, also after an error, and gradients are asked of activations only, so that
weights, their ``grad``, flags and mode stay as they were.

Every method is a function (live, query, covector) → scores of the prompts' tokens [prompt, pos].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..attribution.table import at_least_one
from ..graph.nodes import score_sites
from ..hosts.adapter import Adapter, Read
from ..hosts.bridge import adapt
from ..hosts.supported import UnsupportedArchitectureError
from ..operator.capture import Capture
from ..sublayers.primitives import gating_ratio, soft_cap_ratio

Scores = Float[Tensor, "prompt pos"]
Edit = tuple[Any, Callable[[Tensor], Tensor | None]]
"""A hook point, and what becomes of the activation there; None leaves it."""


@contextmanager
def hooked(edits: Iterable[Edit]) -> Iterator[None]:
    """Hooks of our own, on for a while; other hooks stay as they are."""
    handles = []
    try:
        for point, edit in edits:
            # The host's own way: its norms look at fwd_hooks to decide how they compute.
            point.add_hook(lambda tensor, hook, edit=edit: edit(tensor))
            handles.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


@dataclass(frozen=True, eq=False)
class LiveModel:
    """The real model on some prompts of one length, without padding.

    Attributes:
        adapter: The host's.
        ids: Token ids.
        x: X as the capture had it, in the model's dtype; requires grad.
        final: y as the capture had it: what a run must give again.
        place: Which prompts of the capture these are [prompt], and where in it their tokens are
            [prompt, pos].
    """

    adapter: Adapter
    ids: Int[Tensor, "prompt pos"]
    x: Float[Tensor, "prompt pos d_model"]
    final: Float[Tensor, "prompt pos d_model"]
    place: tuple[Int[Tensor, " prompt"], Int[Tensor, "prompt pos"]]

    def run(self, x: Tensor, edits: Iterable[Edit] = (), ids: Tensor | None = None) -> Tensor:
        """One forward pass from X [many · prompt, pos, d_model] to y.

        Args:
            x: What enters the first block.
            edits: Hooks of the method's own.
            ids: Other tokens, where only the shape of theirs matters.

        Returns:
            y, connected to x.
        """
        ids = self.ids.repeat(len(x) // len(self.ids), 1) if ids is None else ids
        kwargs = {}
        if self.adapter.mask(ids, {}) is not None:  # a host that would mask pad ids
            kwargs["attention_mask"] = torch.ones_like(ids)
        seen: list[Tensor] = []
        entry = self.adapter.points()[0, "resid_pre"]
        end = self.adapter.model.unembed.register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        try:
            with hooked([(entry, lambda tensor: x), *edits]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a Bridge says that norms are computed in python
                self.adapter.run(ids, kwargs)
        finally:
            end.remove()
        return seen[-1]

    def checked(self, y: Tensor) -> Tensor:
        """The run's y, once it is seen to be the capture's.

        Returns:
            y.

        Raises:
            ValueError: If the model gave another one.
        """
        # As exact as the host, which may compute norms in float32 inside float64.
        tolerance = max(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
        off = (y.detach().to(self.final.dtype) - self.final).abs().max()
        if not off <= tolerance * self.final.abs().max():
            raise ValueError(
                f"the model does not repeat the captured run (final residual off by {float(off):.1e}, "
                f"its size is {float(self.final.abs().max()):.1e}): expected the model of the capture, "
                "with the weights and hooks it had then"
            )
        return y

    @cached_property
    def plain(self) -> tuple[Tensor, list[Tensor]]:
        """The final y and every layer's pattern, in one graph with :attr:`x`."""
        patterns: list[Tensor] = []
        points = [point for (_, key), point in self.adapter.points().items() if key == "pattern"]
        y = self.run(self.x, [(point, patterns.append) for point in points])
        return self.checked(y), patterns

    @cached_property
    def attnlrp(self) -> tuple[Tensor, set[Read], set[Read]]:
        """The final y under AttnLRP's rules, the rules to be applied, and those that a gradient has met."""
        edits, rules, met = _attnlrp_edits(self.adapter)
        return self.checked(self.run(self.x, edits)), rules, met


def target_of(y: Tensor, query: Tensor, covector: Tensor) -> Float[Tensor, " prompt"]:
    """The target u · y at one position per prompt."""
    picked = y[torch.arange(len(y), device=y.device), query]
    return (picked * covector.to(y.dtype)).sum(-1)


@contextmanager
def live_models(capture: Capture, model: Any) -> Iterator[list[LiveModel]]:
    """The real model on the capture's prompts, those of one length together, with gradients on.

    Args:
        capture: The run.
        model: The host it came from.

    Yields:
        A live model per length of prompt.
    """
    adapter, frame = adapt(model), capture.frame
    spans = torch.tensor(frame.spans, device=frame.device)
    lengths = spans[:, 1] - spans[:, 0]
    with torch.inference_mode(False), torch.enable_grad():
        lives = []
        for n in sorted(set(lengths.tolist())):
            prompts = (lengths == n).nonzero().flatten()
            columns = spans[prompts, :1] + torch.arange(n, device=frame.device)
            here = prompts[:, None], columns
            x = capture.blocks[0].resid_pre[here].detach().to(adapter.dtype)
            ids, final = capture.prompts.tokens[here], capture.unembed.final[here]
            lives.append(LiveModel(adapter, ids, x.requires_grad_(), final, (prompts, columns)))
        yield lives


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
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise ValueError(
            "integrated_gradients needs captum: pip install 'tensorlens-tl[baselines]'"
        ) from None
    at_least_one(steps, "steps")

    def target(x: Tensor, query: Tensor, covector: Tensor) -> Tensor:
        return target_of(live.run(x), query, covector)

    live.checked(live.run(live.x))
    found = IntegratedGradients(target).attribute(
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
    y, rules, met = live.attnlrp
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
