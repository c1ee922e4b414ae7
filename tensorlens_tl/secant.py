"""The operator between two runs: linear, and exact on their difference.

The frozen operator of one run says what that run did; what another would have done it says to first
order at best. Between two runs every nonlinear step has a *secant*, a linear map that takes the
difference of its inputs to the difference of its outputs, so

    f(x) − f(x′) = S (x − x′),      S: the chain of secants, patterns, norms and activations included,

holds exactly, and no row of "what the operator changed" is left over. With ā the mean of a and a′:

    act      Δact(z) = s ⊙ Δz,                     s = Δact(z) / Δz
    product  Δ(a b) = ā Δb + b̄ Δa                  scores q·k, A v, act(g) ⊙ u
    norm     Δ(x/σ) = mean(1/σ) Δx − x̄ ⟨x̄, Δx⟩ · 2 / (d σ σ′ (σ + σ′))
    softmax  ΔA_k = L(A_k, A′_k) (ΔS_k − Σ_j w_j ΔS_j),   w_j = L(e^S_j, e^S′_j) / L(Z, Z′)

where L(a, b) = (a − b) / (log a − log b) is the logarithmic mean and Z = Σ_j e^S_j: Δe^S = L ΔS, and
Δ log Z = ΔZ / L(Z, Z′). Where the runs agree every secant is the derivative. The activation's is
DeepLIFT's rescale rule (Shrikumar et al. 2017, arXiv 1704.02685). Nothing is integrated: the cost is
that of one transposed sweep, beside the two runs, of which the heads' queries and keys are part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from .branches import Branch
from .capturing import Capture
from .composer import FrozenTransformer
from .edges import LOGITS, Readers
from .factored import Factored
from .graph import Node
from .primitives import Identity, Norm, gating_ratio
from .query_key import CELLS, Projection, check_pattern
from .sublayers import MLP, Attention, GatedMLP
from .weights import NormWeights

# --- Secants of single steps ---------------------------------------------------------------------


def act_secant(act: str, z: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> Tensor:
    """Δact(z) / Δz, elementwise; where z hardly differs, over a short interval around it.

    Args:
        act: One of :data:`tensorlens_tl.primitives.RATIOS`, elementwise.
        z: Pre-activations of one run.
        other: Those of the other.

    Returns:
        The slopes.
    """
    short = torch.finfo(z.dtype).eps ** 0.25 / 2
    mid, half = (z + other) / 2, ((z - other).abs() / 2).clamp_min(short)
    high, low = (gating_ratio(act, x) * x for x in (mid + half, mid - half))
    return (high - low) / (2 * half)


def log_mean_exp(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Tensor:
    """(e^a − e^b) / (a − b), and e^a where they are equal."""
    x = (a - b).abs()
    slope = torch.where(x < 1e-4, 1 - x / 2 + x * x / 6, -torch.expm1(-x) / x.clamp_min(1e-30))
    return torch.maximum(a, b).exp() * slope


def softmax_secant(
    S: Float[Tensor, "*rows key"], other: Float[Tensor, "*rows key"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The secant of a softmax: ΔA = L ⊙ (ΔS − Σ_j w_j ΔS_j).

    Args:
        S: Scores of one run, −∞ where masked.
        other: Those of the other run, masked alike.

    Returns:
        The mean of both softmaxes, L and w: all 0 where masked, and in rows all of which is.
    """
    masked = torch.isneginf(S)
    top = torch.maximum(S, other).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    S, other = S - top, other - top
    Z, other_Z = (s.logsumexp(-1, keepdim=True) for s in (S, other))
    mean = ((S - Z).exp() + (other - other_Z).exp()) / 2
    L = log_mean_exp(S - Z, other - other_Z)
    w = log_mean_exp(S, other) / log_mean_exp(Z, other_Z)
    return (*(x.masked_fill(masked, 0.0) for x in (mean, L, w)),)  # type: ignore[return-value]


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
    """C W_outᵀ, the secant of what is between, W_inᵀ."""
    if isinstance(ours, MLP) and isinstance(theirs, MLP) and ours.weights.ln is None:
        w, cast_ = ours.weights, ours.frame.cast
        h = ours.output.apply_t(c) * act_secant(w.act, ours.pre, theirs.pre)
        return h @ cast_(w.W_in).T
    if isinstance(ours, GatedMLP) and isinstance(theirs, GatedMLP):
        w, cast_ = ours.weights, ours.frame.cast
        h = ours.output.apply_t(c)
        act = sum(gating_ratio(w.act, b.pre) * b.pre for b in (ours, theirs)) / 2
        up = (ours.pre_linear + theirs.pre_linear) / 2
        gate = h * up * act_secant(w.act, ours.pre, theirs.pre)
        return (h * act) @ cast_(w.W_in).T + gate @ cast_(w.W_gate).T
    raise ValueError(
        "expected MLPs with an elementwise activation for at='secant', got SoLU with its norm: pass "
        "at='clean' or at='corrupted'"
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
            "load with model= (a file holds none); at='clean' does without"
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
    step = max(1, CELLS // (4 * frame.batch * each * frame.n_pos**2))
    for first in range(0, kv_heads, step):
        last = min(first + step, kv_heads)
        kv, own = slice(first, last), slice(first * each, last * each)
        A = [
            torch.cat([a.mix.head(h).pattern for h in range(own.start, own.stop)], 1) for a in runs
        ]
        hidden = (A[0] <= 0) & (A[1] <= 0)
        products = [
            q_.rotated[:, own] @ k_.rotated[:, kv].repeat_interleave(each, 1).mT * w.scale
            for q_, k_ in zip(q.runs, k.runs, strict=True)
        ]
        S, slope = products, 1.0
        if (cap := w.soft_cap) is not None:
            S = [cap * torch.tanh(P / cap) for P in products]
            slope = _slope(S[0] - S[1], products[0] - products[1], 1 - (S[0] / cap) ** 2)
        for run, pattern, scores, capture in zip(runs, A, S, captures, strict=True):
            check_pattern(run, pattern, scores, capture.logits.dtype)
        mean, L, u = softmax_secant(*(s.masked_fill(hidden, -torch.inf) for s in S))
        g = L * (z[:, own] @ v[:, kv].repeat_interleave(each, 1).mT)
        dP = (g - u * g.sum(-1, keepdim=True)) * slope * w.scale
        at_v[:, own] = mean.mT @ z[:, own]
        at_q[:, own] = dP @ k.mean[:, kv].repeat_interleave(each, 1)
        at_k[:, own] = dP.mT @ q.mean[:, own]
    W_V = ours.weights.W_V
    parts = [("v", Factored(at_v.transpose(0, 1), lambda: frame.cast(W_V).mT)),
             ("q", q.pull(at_q)), ("k", k.pull(at_k))]  # fmt: skip
    return [(tuple(replace(n, name=side) for n in ours.nodes()), part) for side, part in parts]


def _slope(change: Tensor, of: Tensor, derivative: Tensor) -> Tensor:
    """Change / of, and the derivative where nothing changed."""
    still = of.abs() < torch.finfo(of.dtype).eps ** 0.5
    return torch.where(still, derivative, change / of.masked_fill(still, 1.0))


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
                    "expected runs that no hook of your own edited for at='secant': pass at='clean' or "
                    "at='corrupted'"
                )

    @cached_property
    def top(self) -> Float[Tensor, "batch pos d_model"]:
        """The target's covector below the final norm."""
        (capture, ours), (other, theirs) = self.ours, self.theirs
        a, b = ours.ln_final, theirs.ln_final
        if isinstance(a, Identity) or isinstance(b, Identity):
            return self.covector
        ends = capture.resid_final, other.resid_final
        return NormSecant.of(a.weights, *ends, a.scale, b.scale).pull_(self.covector.clone())

    @cached_property
    def _sweep(self) -> tuple[tuple[Tensor, ...], tuple[list[Reads], ...]]:
        (capture, ours), (other, theirs) = self.ours, self.theirs
        covectors, found = [self.top], []
        for a, b in zip(reversed(ours.steps), reversed(theirs.steps), strict=True):
            c, states = covectors[-1], (a.state, b.state)
            pulls = [_pull(x, y, states, c, (capture, other))
                     for x, y in zip(a.branches, b.branches, strict=True)]  # fmt: skip
            covectors.append(sum((total for total, _ in pulls), c))
            found.append([reads for _, parts in pulls for reads in parts])
        return tuple(reversed(covectors)), tuple(reversed(found))

    @property
    def covectors(self) -> tuple[Float[Tensor, "batch pos d_model"], ...]:
        """The target's covectors before every step and after the last.

        The first is at the embeddings: ⟨it, x − x′⟩ is the target's difference.
        """
        return self._sweep[0]

    def readers(self, below: tuple[int, ...], qk: bool) -> Iterator[Readers]:
        """Every reader, for :func:`tensorlens_tl.edges.edge_scores`.

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
