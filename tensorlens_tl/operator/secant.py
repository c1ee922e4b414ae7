"""The operator between two runs: linear, and exact on their difference.

The frozen operator of one run says what that run did; what another would have done it says to first
order at best. Between two runs every nonlinear step has a *secant*, a linear map that takes the
difference of its inputs to the difference of its outputs, so

    f(x) − f(x′) = S (x − x′),      S: the chain of secants, patterns, norms and activations included,

holds exactly, and no row of "what the operator changed" is left over. With ā the mean of a and a′:

    act      Δact(z) = s ⊙ Δz,                     s = Δact(z) / Δz
    product  Δ(a b) = ā Δb + b̄ Δa                  scores q·k, A v, act(g) ⊙ u
    norm     Δ(x/σ) = mean(1/σ) Δx − x̄ ⟨x̄, Δx⟩ · 2 / (d σ σ′ (σ + σ′))
    softmax  ΔA_k = L_k (ΔS_k − Σ_j L_j ΔS_j / Σ_j L_j),     L_k = L(A_k, A′_k)

where L(a, b) = (a − b) / (log a − log b) is the logarithmic mean: ΔA = L Δ log A = L (ΔS − Δ log Z), and
Σ ΔA = 0 says what Δ log Z is. It does not see what attention does not see: scores moved all alike, values
moved all alike. Where the runs agree every secant is the derivative. The activation's is DeepLIFT's
rescale rule (Shrikumar et al. 2017, arXiv 1704.02685). Nothing is integrated: the cost is that of one
transposed sweep, beside the two runs, of which the heads' queries and keys are part.

The sweep proves itself: ⟨covector, Δstate⟩ is the same at every site, or it is refused. A soft cap on the
logits is the target's, not the operator's: see ``differences``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import LOGITS, Node
from ..sublayers import (
    MLP,
    TINY,
    Attention,
    Factored,
    GatedMLP,
    Identity,
    Norm,
    NormWeights,
    gating_ratio,
)
from .capture import Capture, CaptureMismatchError
from .frozen_transformer import FrozenTransformer
from .query_key import CELLS, Projection, check_pattern, tolerated, with_alibi_bias
from .residual_stream import Branch, Readers

INSTEAD = "pass at='clean' or at='corrupted'"

# --- Secants of single steps ---------------------------------------------------------------------


def act_secant(act: str, z: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> Tensor:
    """Δact(z) / Δz, elementwise; a smooth one's over a short interval where z hardly differs.

    Args:
        act: One of :data:`tensorlens_tl.sublayers.primitives.RATIOS`, elementwise.
        z: Pre-activations of one run.
        other: Those of the other.

    Returns:
        The slopes.
    """
    if act == "relu":
        return _slope(z.clamp_min(0) - other.clamp_min(0), z - other, (z > 0).to(z.dtype), 0.0)
    if act == "relu2":
        return (z.clamp_min(0) + other.clamp_min(0)) * act_secant("relu", z, other)
    short = torch.finfo(z.dtype).eps ** 0.25 / 2
    mid, half = (z + other) / 2, ((z - other).abs() / 2).clamp_min(short)
    high, low = (gating_ratio(act, x) * x for x in (mid + half, mid - half))
    return (high - low) / (2 * half)


def _slope(change: Tensor, of: Tensor, derivative: Tensor, least: float) -> Tensor:
    """The quotient of two changes, and the derivative where the lower is no more than ``least``."""
    still = of.abs() <= least
    return torch.where(still, derivative, change / of.masked_fill(still, 1.0))


def log_mean_exp(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Tensor:
    """(e^a − e^b) / (a − b), and e^a where they are equal."""
    x = (a - b).abs()
    slope = torch.where(x < 1e-4, 1 - x / 2 + x * x / 6, -torch.expm1(-x) / x.clamp_min(TINY))
    return torch.maximum(a, b).exp() * slope


def softmax_secant(
    S: Float[Tensor, "*rows key"], other: Float[Tensor, "*rows key"]
) -> tuple[Tensor, Tensor]:
    """The secant of a softmax: ΔA = L ⊙ (ΔS − Σ_j L_j ΔS_j / Σ_j L_j).

    Args:
        S: Scores of one run, −∞ where masked.
        other: Those of the other run, masked alike.

    Returns:
        The mean of both softmaxes, and L: 0 where masked, and in rows all of which is.
    """
    masked = torch.isneginf(S)
    log_A, log_B = S.log_softmax(-1), other.log_softmax(-1)
    mean = (log_A.exp() + log_B.exp()) / 2
    L = log_mean_exp(log_A, log_B)
    return mean.masked_fill(masked, 0.0), L.masked_fill(masked, 0.0)


@dataclass(frozen=True, eq=False)
class NormSecant:
    """The secant of a norm.

    Attributes:
        weights: Its own.
        inverse: The mean of 1/σ.
        mid: x̄ (less its mean, for LayerNorm) · √(2 / (d σ σ′ (σ + σ′))).
    """

    weights: NormWeights
    inverse: Float[Tensor, "*many pos 1"]
    mid: Float[Tensor, "*many pos d"]

    @classmethod
    def of(cls, weights: NormWeights, x: Tensor, y: Tensor, s: Tensor, t: Tensor) -> NormSecant:
        """From two runs' inputs x, y and scales s, t."""
        mid = (x + y) / 2
        mid = mid - mid.mean(-1, keepdim=True) if weights.center else mid
        return cls(weights, (1 / s + 1 / t) / 2, mid * (2 / (x.shape[-1] * s * t * (s + t))).sqrt())

    def pull_(
        self, y: Float[Tensor, "*more pos d"], span: slice = slice(None)
    ) -> Float[Tensor, "*more pos d"]:
        """The adjoint, in place, at a span of positions."""
        mid, inverse = self.mid[..., span, :], self.inverse[..., span, :]
        if (gain := self.weights.gain) is not None:
            y *= gain.detach().to(y)
        along = (y * mid).sum(-1, keepdim=True)
        y *= inverse
        y -= along * mid
        if self.weights.center:
            y -= y.mean(-1, keepdim=True)
        return y

    def after(self, covectors: Factored) -> Factored:
        """Covectors of what the norm gives, as those of what it reads."""
        return replace(covectors, finish=self.pull_)


def _of_norms(ours: Norm | None, theirs: Norm | None, x: Tensor, y: Tensor) -> NormSecant | None:
    if ours is None or theirs is None:
        return None
    return NormSecant.of(ours.weights, x, y, ours.scale, theirs.scale)


# --- Branches ------------------------------------------------------------------------------------

Reads = tuple[tuple[Node, ...], Factored]
"""Readers, and their covectors at the residual."""


def _pull(
    ours: Branch, theirs: Branch, states: tuple[Tensor, Tensor], c: Tensor,
    captures: tuple[Capture, Capture],
) -> tuple[Tensor, list[Reads]]:  # fmt: skip
    """A branch's adjoint, and what its readers make of the target: values, queries, keys, or an MLP."""
    xs = ours.read(states[0]), theirs.read(states[1])
    pre = _of_norms(ours.pre, theirs.pre, *states)
    if ours.post is not None:
        out = [b.body.apply(x) + b.body.bias for b, x in zip((ours, theirs), xs, strict=True)]
        post = cast(NormSecant, _of_norms(ours.post, theirs.post, *out))
        c = post.pull_(c.clone())
    if isinstance(ours.body, Attention):
        parts = _attention(ours.body, cast(Attention, theirs.body), xs, c, captures)
        total = sum((p.summed() for _, p in parts[1:]), parts[0][1].summed())
        total = total if pre is None else pre.pull_(total)
        return total, [(nodes, p if pre is None else pre.after(p)) for nodes, p in parts]
    total = _mlp(ours.body, theirs.body, c)
    total = total if pre is None else pre.pull_(total)
    return total, [(ours.body.reads(), Factored(total[None]))]


def _mlp(ours: object, theirs: object, c: Tensor) -> Tensor:
    """Back through W_out, the secant of what is between, and W_in."""
    if isinstance(ours, MLP) and isinstance(theirs, MLP) and ours.weights.act != "solu":
        slopes = act_secant(ours.weights.act, ours.pre, theirs.pre)
        return ours.with_slopes(slopes).apply_t(c)
    if isinstance(ours, GatedMLP) and isinstance(theirs, GatedMLP):
        name = ours.weights.act
        posts = [gating_ratio(name, b.pre) * b.pre for b in (ours, theirs)]
        act = (posts[0] + posts[1]) / 2
        up = (ours.pre_linear + theirs.pre_linear) / 2
        return ours.with_slopes(act, up * act_secant(name, ours.pre, theirs.pre)).apply_t(c)
    raise ValueError(
        "expected MLPs with an elementwise activation for at='secant', got SoLU: " + INSTEAD
    )


def _attention(
    ours: Attention, theirs: Attention, xs: tuple[Tensor, Tensor], c: Tensor,
    captures: tuple[Capture, Capture],
) -> list[Reads]:  # fmt: skip
    """Covectors at what W_V, W_Q and W_K read, head by head."""
    weights = captures[0].score_weights
    if weights is None:
        raise ValueError(
            "this lens does not know W_Q and W_K, which at='secant' needs: capture with the model, or "
            "load with model= (a file holds none); at='clean' does without. Where the model's own attention is "
            "of a kind not known here, edges are had with at='clean', qk=False"
        )
    w, frame = weights[ours.layer], ours.frame
    heads, kv_heads = len(ours.nodes()), w.W_K.shape[0]
    each = heads // kv_heads
    runs = ours, theirs
    q = _Projections.of(*(Projection.of(frame, x, w, w.W_Q, w.b_Q, w.q_norm) for x in xs))
    k = _Projections.of(*(Projection.of(frame, x, w, w.W_K, w.b_K, w.k_norm) for x in xs))
    v = ours.values.apply((xs[0] + xs[1]) / 2) + ours.values.bias
    v = v.unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    z = ours.output.apply_t(c).unflatten(-1, (heads, -1)).transpose(1, 2)
    at_v, at_q, at_k = torch.empty_like(z), torch.empty_like(q.mean), torch.empty_like(q.mean)
    n_pos, batch = frame.n_pos, frame.batch
    prompts = max(1, CELLS // (8 * each * n_pos**2))  # of some prompts, then of some heads
    step = max(1, CELLS // (8 * min(prompts, batch) * each * n_pos**2))
    parts = [(slice(b, b + prompts), slice(g, min(g + step, kv_heads)))
             for b in range(0, batch, prompts) for g in range(0, kv_heads, step)]  # fmt: skip
    for b, kv in parts:
        own = slice(kv.start * each, kv.stop * each)

        def shared(t: Tensor, b: slice = b, kv: slice = kv) -> Tensor:
            return t[b, kv].repeat_interleave(each, 1)

        A = [torch.cat([a.mix.head(h).pattern[b] for h in range(own.start, own.stop)], 1)
             for a in runs]  # fmt: skip
        hidden = (A[0] <= 0) & (A[1] <= 0)
        products = [q_.rotated[b, own] @ shared(k_.rotated).mT * w.scale
                    for q_, k_ in zip(q.runs, k.runs, strict=True)]  # fmt: skip
        S, slope = products, 1.0
        if (cap := w.soft_cap) is not None:
            S = [cap * torch.tanh(P / cap) for P in products]
            least = torch.finfo(v.dtype).eps ** 0.5
            slope = _slope(S[0] - S[1], products[0] - products[1], 1 - (S[0] / cap) ** 2, least)
        S = [with_alibi_bias(scores, w.slopes, own).masked_fill(hidden, -torch.inf) for scores in S]
        for run, pattern, scores, capture in zip(runs, A, S, captures, strict=True):
            check_pattern(run, pattern, scores, capture.logits.dtype, INSTEAD, b)
        mean, L = softmax_secant(*S)
        g = L * (z[b, own] @ shared(v).mT)
        total = L.sum(-1, keepdim=True).clamp_min(torch.finfo(L.dtype).tiny)
        dP = (g - L * (g.sum(-1, keepdim=True) / total)) * slope * w.scale
        at_v[b, own] = mean.mT @ z[b, own]
        at_q[b, own] = dP @ shared(k.mean)
        at_k[b, own] = dP.mT @ q.mean[b, own]
    W_V = ours.weights.W_V
    found = [("v", Factored(at_v.transpose(0, 1), lambda: frame.cast(W_V).mT)),
             ("q", q.pull(at_q)), ("k", k.pull(at_k))]  # fmt: skip
    return [(tuple(replace(n, name=side) for n in ours.nodes()), part) for side, part in found]


@dataclass(frozen=True, eq=False)
class _Projections:
    """Two runs' queries or keys.

    Attributes:
        runs: Each run's.
        mean: Their mean, rotated.
        norm: The secant of their own norm, or None.
    """

    runs: tuple[Projection, Projection]
    mean: Float[Tensor, "batch any_head pos d_query"]
    norm: NormSecant | None

    @classmethod
    def of(cls, ours: Projection, theirs: Projection) -> _Projections:
        norm = None
        if ours.norm is not None and ours.scale is not None and theirs.scale is not None:
            norm = NormSecant.of(ours.norm, ours.raw, theirs.raw, ours.scale, theirs.scale)
        return cls((ours, theirs), (ours.rotated + theirs.rotated) / 2, norm)

    def pull(self, y: Float[Tensor, "batch head pos d_query"]) -> Factored:
        """To what W_Q or W_K reads."""
        y = self.runs[0].unrotated(y)
        if self.norm is not None:
            repeat = y.shape[1] // self.norm.mid.shape[1]
            parts = y.unflatten(1, (-1, repeat)).transpose(1, 2).contiguous()
            y = torch.stack([self.norm.pull_(p) for p in parts.unbind(1)], 2).flatten(1, 2)
        return self.runs[0].through(y)


def _check(site: str, capture: Capture, *sites: tuple[Tensor, Tensor]) -> None:
    """Refuse a step after a site across which ⟨covector, Δstate⟩ changes."""
    values = [(c * x).sum((-2, -1)) for c, x in sites]
    sizes = [c.flatten(1).norm(dim=-1) * x.flatten(1).norm(dim=-1) for c, x in sites]
    off = (values[0] - values[1]).abs() / (sizes[0] + sizes[1]).clamp_min(TINY)
    error = float(off.max())
    expected = tolerated(capture.logits.dtype)
    if not error <= expected:
        raise CaptureMismatchError(
            f"the operator between the two runs does not take their difference before {site} to the "
            f"one after it: off by {error:.1e} (relative; expected at most {expected:.0e}); a hook of your "
            f"own edited scores, patterns or norms, or their kind is not known here: {INSTEAD}"
        )


# --- The whole -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SecantOperator:
    """The operator between two runs of a model, for one target: S in the module's formula.

    Attributes:
        ours: The run's capture and operator.
        theirs: The other run's.
        covector: The target's, at the final normalized residual, [batch, pos, d_model].
    """

    ours: tuple[Capture, FrozenTransformer]
    theirs: tuple[Capture, FrozenTransformer]
    covector: Float[Tensor, "batch pos d_model"]

    def __post_init__(self):
        for _, operator in (self.ours, self.theirs):
            edited = [b for s in operator.steps for b in s.branches if b.body.edits or s.edits]
            if edited or operator.edit is not None:
                raise ValueError(
                    "expected runs that no hook of your own edited for at='secant': " + INSTEAD
                )

    @cached_property
    def top(self) -> Float[Tensor, "batch pos d_model"]:
        """The target's covector below the final norm."""
        (capture, ours), (other, theirs) = self.ours, self.theirs
        a, b = ours.ln_final, theirs.ln_final
        if isinstance(a, Identity) or isinstance(b, Identity):
            return self.covector
        ends = capture.resid_final, other.resid_final
        top = NormSecant.of(a.weights, *ends, a.scale, b.scale).pull_(self.covector.clone())
        y = capture.unembed.final - other.unembed.final
        _check("ln_final", capture, (top, ends[0] - ends[1]), (self.covector, y))
        return top

    @cached_property
    def _sweep(self) -> tuple[tuple[Tensor, ...], tuple[list[Reads], ...]]:
        (capture, ours), (other, theirs) = self.ours, self.theirs
        covectors, found = [self.top], []
        after = capture.resid_final - other.resid_final
        for a, b in zip(reversed(ours.steps), reversed(theirs.steps), strict=True):
            c, states = covectors[-1], (a.state, b.state)
            pulls = [_pull(x, y, states, c, (capture, other))
                     for x, y in zip(a.branches, b.branches, strict=True)]  # fmt: skip
            covectors.append(sum((total for total, _ in pulls), c))
            before = a.state - b.state
            _check(a.site, capture, (covectors[-1], before), (c, after))
            after = before
            found.append([reads for _, parts in pulls for reads in parts])
        return tuple(reversed(covectors)), tuple(reversed(found))

    @property
    def covectors(self) -> tuple[Float[Tensor, "batch pos d_model"], ...]:
        """The target's covectors before every step and after the last.

        The first is at the embeddings: ⟨it, x − x′⟩ is the target's difference.
        """
        return self._sweep[0]

    def readers(self, below: tuple[int, ...], qk: bool) -> Iterator[Readers]:
        """Every reader, for :func:`tensorlens_tl.attribution.edges.edge_products`.

        Args:
            below: How many writers there are before each step, and in all.
            qk: Whether queries and keys are among them.

        Yields:
            Readers, from below.
        """
        for reads, seen in zip(self._sweep[1], below, strict=False):
            for nodes, covectors in reads:
                if qk or nodes[0].name not in ("q", "k"):
                    yield Readers(nodes, seen, covectors, {})
        yield Readers((LOGITS,), below[-1], Factored(self.top[None]), {})
