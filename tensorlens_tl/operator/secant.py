"""The operator between two runs: linear, and exact on their difference.

The frozen operator of one run describes that run. What another run does, it says to first order
at best. Between two runs every nonlinear step has a *secant*, a linear map that takes the
difference of its inputs to the difference of its outputs. So

    f(x) − f(x′) = S (x − x′),    S: the chain of secants, patterns, norms and activations included,

holds exactly, and no row "operator change" is left over. Let ā be the mean of a and a′:

    act      Δact(z) = s ⊙ Δz,                     s = Δact(z) / Δz
    product  Δ(a b) = ā Δb + b̄ Δa                  scores q·k, A v, act(g) ⊙ u
    norm     Δ(x/σ) = mean(1/σ) Δx − x̄ ⟨x̄, Δx⟩ · 2 / (d σ σ′ (σ + σ′))
    softmax  ΔA_k = L_k (ΔS_k − Σ_j L_j ΔS_j / Σ_j L_j),     L_k = L(A_k, A′_k)

where L(a, b) = (a − b) / (log a − log b) is the logarithmic mean. It comes from
ΔA = L Δ log A = L (ΔS − Δ log Z), where Σ ΔA = 0 determines Δ log Z. Like attention itself, the
softmax's secant does not depend on a number that is added to all scores of a row. Where the runs
agree, every secant is the derivative. The activation's secant is DeepLIFT's rescale rule (Shrikumar
et al. 2017, arXiv 1704.02685). Nothing is integrated: the cost is that of one transposed sweep.

1. The target's covector goes down through the secant of the final norm.
2. Branch by branch it goes through the secants of post-norm, attention or MLP, and pre-norm. The
   part of each reader is kept.
3. At every site ⟨covector, Δstate⟩ must be what it was at the site above. Otherwise the runs are
   refused.

A soft cap on the logits belongs to the target, not to the operator; see ``attribution.contrast``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import LOGITS, Node
from ..maps import TINY, Factor, Factored, Identity, Norm
from ..sublayers import MLP, Attention, Experts, GatedMLP, gating_ratio
from .capture import Capture, CaptureMismatchError
from .frozen_transformer import FrozenTransformer
from .query_key import (
    CELLS,
    Projection,
    check_pattern,
    tolerated,
    with_alibi_bias,
    with_sinks,
)
from .residual_stream import Branch, NormSecant, Readers

REMEDY = "Pass at='clean' or at='corrupted'."
"""What a user can do where there is no operator between two runs."""

# --- Secants of single steps ---------------------------------------------------------------------


def act_secant(act: str, z: Float[Tensor, "*shape"], z_other: Float[Tensor, "*shape"]) -> Tensor:
    """The slope Δact(z) / Δz, elementwise.

    Args:
        act: Name of an elementwise activation, one of
            :data:`tensorlens_tl.sublayers.activations.RATIOS`.
        z: Pre-activations of one run.
        z_other: Pre-activations of the other run.

    Returns:
        The slopes, in the shape of ``z``.
    """
    if act == "relu":
        change = z.clamp_min(0) - z_other.clamp_min(0)
        return _slope(change, z - z_other, (z > 0).to(z.dtype), 0.0)
    if act == "relu2":  # a² − b² = (a + b)(a − b)
        return (z.clamp_min(0) + z_other.clamp_min(0)) * act_secant("relu", z, z_other)
    # Where z hardly differs, the quotient would be rounding. The slope over a short interval around
    # both is as good for a smooth activation: the error is of second order in its length.
    short = torch.finfo(z.dtype).eps ** 0.25 / 2
    mid, half = (z + z_other) / 2, ((z - z_other).abs() / 2).clamp_min(short)
    high, low = (gating_ratio(act, x) * x for x in (mid + half, mid - half))
    return (high - low) / (2 * half)


def gated_secants(
    act: str, gates: Sequence[Float[Tensor, "*shape"]], ups: Sequence[Float[Tensor, "*shape"]]
) -> tuple[Tensor, Tensor]:
    """The secants of a gated MLP: Δ(act(g) ⊙ u) = mean act(g) ⊙ Δu + ū ⊙ Δact(g).

    Args:
        act: Name of the activation, as for :func:`act_secant`.
        gates: What the activation reads in both runs.
        ups: What its result is multiplied with, in both runs.

    Returns:
        The factors of Δu and of Δg, in the shape of both.
    """
    first, second = (gating_ratio(act, g) * g for g in gates)
    return (first + second) / 2, (ups[0] + ups[1]) / 2 * act_secant(act, *gates)


def cap_secant(
    cap: float, S: Sequence[Float[Tensor, "*shape"]], products: Sequence[Float[Tensor, "*shape"]]
) -> Tensor:
    """The slope ΔS / Δproduct of a soft cap, elementwise.

    Args:
        cap: Largest absolute score.
        S: Capped scores of both runs.
        products: The same before the cap.

    Returns:
        The slopes, in the shape of ``S``.
    """
    least = torch.finfo(S[0].dtype).eps ** 0.5
    return _slope(S[0] - S[1], products[0] - products[1], 1 - (S[0] / cap) ** 2, least)


def _slope(change: Tensor, of: Tensor, derivative: Tensor, least: float) -> Tensor:
    """``change / of``, or the derivative where ``of`` is no larger than ``least``."""
    still = of.abs() <= least  # there the quotient would be 0 / 0, or rounding
    return torch.where(still, derivative, change / of.masked_fill(still, 1.0))


def log_mean_exp(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Tensor:
    """(e^a − e^b) / (a − b), and e^a where a = b: the logarithmic mean of e^a and e^b."""
    # With m the larger and x = |a − b| it is e^m (1 − e^−x) / x, by its series where x is small.
    x = (a - b).abs()
    slope = torch.where(x < 1e-4, 1 - x / 2 + x * x / 6, -torch.expm1(-x) / x.clamp_min(TINY))
    return torch.maximum(a, b).exp() * slope


def softmax_secant(
    S: Float[Tensor, "*rows key"], S_other: Float[Tensor, "*rows key"]
) -> tuple[Tensor, Tensor]:
    """The secant of a softmax: ΔA = L ⊙ (ΔS − Σ_j L_j ΔS_j / Σ_j L_j).

    Args:
        S: Scores of one run, −∞ where masked.
        S_other: Scores of the other run, with the same mask.

    Returns:
        The mean of both softmaxes, and L, both in the shape of ``S``. Both are zero where masked.
    """
    masked = torch.isneginf(S)
    log_A, log_B = S.log_softmax(-1), S_other.log_softmax(-1)
    mean = (log_A.exp() + log_B.exp()) / 2
    L = log_mean_exp(log_A, log_B)
    return mean.masked_fill(masked, 0.0), L.masked_fill(masked, 0.0)


def _of_norms(a: Norm | None, b: Norm | None, x: Tensor, y: Tensor) -> NormSecant | None:
    if a is None or b is None:
        return None
    if isinstance(a, Factor):  # linear as it is
        return NormSecant(a.weights, 1 / a.scale, torch.zeros_like(x))
    return NormSecant.of(a.weights, x, y, a.scale, b.scale)


# --- Branches ------------------------------------------------------------------------------------

Reads = tuple[tuple[Node, ...], Factored]
"""Reader nodes, and the gradient of the target at the residual through each of them."""


def _pull(
    clean: Branch,
    corrupted: Branch,
    states: tuple[Tensor, Tensor],
    c: Tensor,
    captures: tuple[Capture, Capture],
) -> tuple[Tensor, list[Reads]]:
    """Pull the covector c back through a branch: the sum, and the part of each reader."""
    xs = clean.read(states[0]), corrupted.read(states[1])
    pre = _of_norms(clean.pre, corrupted.pre, *states)
    if clean.post is not None:
        # The norm's secant needs what both runs gave it.
        out = [b.body.apply(x) + b.body.bias for b, x in zip((clean, corrupted), xs, strict=True)]
        post = cast(NormSecant, _of_norms(clean.post, corrupted.post, *out))
        c = post.pull_(c.clone())
    if isinstance(clean.body, Attention):
        parts = _attention(clean.body, cast(Attention, corrupted.body), xs, c, captures)
        total = sum((p.summed() for _, p in parts[1:]), parts[0][1].summed())
        total = total if pre is None else pre.pull_(total)
        return total, [(nodes, p if pre is None else pre.after(p)) for nodes, p in parts]
    total = _mlp(clean.body, corrupted.body, c)
    total = total if pre is None else pre.pull_(total)
    return total, [(clean.body.reads(), Factored(total[None]))]


def _mlp(clean: object, corrupted: object, c: Tensor) -> Tensor:
    """Pull the covector c back through W_out, the secant of the activation, and W_in."""
    if isinstance(clean, MLP) and isinstance(corrupted, MLP) and clean.weights.act != "solu":
        slopes = act_secant(clean.weights.act, clean.pre, corrupted.pre)
        return clean.with_slopes(slopes).apply_t(c)
    if isinstance(clean, GatedMLP) and isinstance(corrupted, GatedMLP) and clean.ln is None:
        ups = clean.pre_linear, corrupted.pre_linear
        found = gated_secants(clean.weights.act, (clean.pre, corrupted.pre), ups)
        return clean.with_slopes(*found).apply_t(c)
    needs = "an elementwise activation, which SoLU is not"
    if isinstance(clean, GatedMLP):
        needs = "MLPs without a norm before W_out"
    if isinstance(clean, Experts):
        needs = "a function without jumps, and the router of a mixture of experts chooses"
    raise ValueError(f"at='secant' needs {needs}. {REMEDY}")


def _attention(
    clean: Attention,
    corrupted: Attention,
    xs: tuple[Tensor, Tensor],
    c: Tensor,
    captures: tuple[Capture, Capture],
) -> list[Reads]:
    """Covectors at what W_V, W_Q and W_K read, head by head."""
    otherwise = "pass at='clean' and qk=False"
    weights = captures[0].required_scores("at='secant'", otherwise)
    # 1. Queries, keys and values of both runs.
    w, frame = weights[clean.layer], clean.frame
    heads, kv_heads = len(clean.nodes()), w.W_K.shape[0]
    each = heads // kv_heads
    runs = clean, corrupted
    both = [Projection.both(frame, x, w) for x in xs]
    q, k = (_Projections.of(*sides) for sides in zip(*both, strict=True))
    v = clean.values.apply((xs[0] + xs[1]) / 2) + clean.values.bias
    v = v.unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    z = clean.output.apply_t(c).unflatten(-1, (heads, -1)).transpose(1, 2)
    at_v, at_q, at_k = torch.empty_like(z), torch.empty_like(q.mean), torch.empty_like(q.mean)
    # 2. Through the secants of A v and of the softmax, some prompts and key/value heads at a time.
    n_pos, batch = frame.n_pos, frame.batch
    prompts = max(1, CELLS // (8 * each * n_pos**2))
    step = max(1, CELLS // (8 * min(prompts, batch) * each * n_pos**2))
    parts = [
        (slice(b, b + prompts), slice(g, min(g + step, kv_heads)))
        for b in range(0, batch, prompts)
        for g in range(0, kv_heads, step)
    ]
    for b, kv in parts:
        own = slice(kv.start * each, kv.stop * each)

        def shared(t: Tensor, b: slice = b, kv: slice = kv) -> Tensor:
            return t[b, kv].repeat_interleave(each, 1)

        A = [
            torch.cat([a.mix.head(h).pattern[b] for h in range(own.start, own.stop)], 1)
            for a in runs
        ]
        hidden = (A[0] <= 0) & (A[1] <= 0)  # masked: no weight in either run
        products = [
            q_.rotated[b, own] @ shared(k_.rotated).mT * w.scale
            for q_, k_ in zip(q.runs, k.runs, strict=True)
        ]
        # Scores of both runs, and the slope ΔS / Δproduct of a soft cap.
        S, slope = products, 1.0
        if (cap := w.soft_cap) is not None:
            S = [cap * torch.tanh(P / cap) for P in products]
            slope = cap_secant(cap, S, products)
        S = [with_alibi_bias(scores, w.slopes, own).masked_fill(hidden, -torch.inf) for scores in S]
        S = [with_sinks(scores, w.sinks, own) for scores in S]
        for run, pattern, scores, capture in zip(runs, A, S, captures, strict=True):
            check_pattern(run, pattern, scores, capture.logits.dtype, REMEDY, b)
        # Δ(A v) = Ā Δv + ΔA v̄. Through ΔA = L ⊙ (ΔS − Σ_j L_j ΔS_j / Σ_j L_j) goes the adjoint:
        # with g = L ⊙ ⟨z, v̄⟩ it is g − L Σ g / Σ L. Then Δ(q·k) = q̄ Δk + k̄ Δq.
        mean, L = softmax_secant(*S)
        total = L.sum(-1, keepdim=True).clamp_min(torch.finfo(L.dtype).tiny)
        mean, L = mean[..., :n_pos], L[..., :n_pos]  # a sink has a share in the sum, and no value
        g = L * (z[b, own] @ shared(v).mT)
        dP = (g - L * (g.sum(-1, keepdim=True) / total)) * slope * w.scale
        at_v[b, own] = mean.mT @ z[b, own]
        at_q[b, own] = dP @ shared(k.mean)
        at_k[b, own] = dP.mT @ q.mean[b, own]
    # 3. Back through W_V, W_Q and W_K, to what they read.
    W_V = clean.weights.W_V
    at_values = Factored(at_v.transpose(0, 1), lambda: frame.cast(W_V).mT)
    found = [("v", at_values), ("q", q.pull(at_q)), ("k", k.pull(at_k))]
    return [(tuple(replace(n, name=side) for n in clean.nodes()), part) for side, part in found]


@dataclass(frozen=True, eq=False)
class _Projections:
    """The queries (or keys) of two runs.

    Attributes:
        runs: The queries of the clean and of the corrupted run.
        mean: The mean of both, after norm and rotation [batch, head, pos, d_query].
        norm: The secant of the norm of queries, or None.
    """

    runs: tuple[Projection, Projection]
    mean: Float[Tensor, "batch any_head pos d_query"]
    norm: NormSecant | None

    @classmethod
    def of(cls, clean: Projection, corrupted: Projection) -> _Projections:
        norm = None
        if clean.norm is not None and clean.scale is not None and corrupted.scale is not None:
            parts = len(clean.W) if clean.norm.whole else 1
            ends, scales = (clean.raw, corrupted.raw), (clean.scale, corrupted.scale)
            norm = NormSecant.of(clean.norm.weights, *ends, *scales, parts)
        return cls((clean, corrupted), (clean.rotated + corrupted.rotated) / 2, norm)

    def pull(self, y: Float[Tensor, "batch head pos d_query"]) -> Factored:
        """Pull covectors at rotated queries back to what W_Q reads."""
        run, norm = self.runs[0], self.norm
        y = run.to_norm(y)
        if norm is None or run.norm is None:
            return run.from_norm(y)
        parts = run.by_head(y).contiguous()  # query heads of a group share the norm of their keys
        if not run.norm.whole:
            parts = torch.stack([norm.pull_(p) for p in parts.unbind(1)], 1)
            return run.from_norm(parts.transpose(1, 2).flatten(1, 2))
        # One scale divides all heads, and it depends on every head's queries. So a head reads
        # inverse Δq of its own, and by its share of mid ⟨mid, Δq⟩ what all W_Q read.
        if (gain := norm.weights.gain) is not None:
            parts = parts * gain.detach().to(parts)
        along = (parts * norm.mid[:, None]).sum(-1).transpose(1, 2).flatten(1, 2)
        found = run.from_norm((parts * norm.inverse[:, None]).transpose(1, 2).flatten(1, 2))
        common = run.from_norm(norm.mid).summed()
        return replace(found, along=-along.transpose(0, 1), common=common)


def _check(site: str, capture: Capture, *sites: tuple[Tensor, Tensor]) -> None:
    """Refuse a step after a site unless ⟨covector, Δstate⟩ is the same below and above the step."""
    values = [(c * x).sum((-2, -1)) for c, x in sites]
    sizes = [c.flatten(1).norm(dim=-1) * x.flatten(1).norm(dim=-1) for c, x in sites]
    off = (values[0] - values[1]).abs() / (sizes[0] + sizes[1]).clamp_min(TINY)
    error = float(off.max())
    expected = tolerated(capture.logits.dtype)
    if not error <= expected:
        raise CaptureMismatchError(
            f"The operator between the two runs does not reproduce their difference after {site} "
            f"(relative error {error:.1e}, at most {expected:.0e} is allowed). A hook of yours "
            f"edited scores, patterns or norms, or their kind is not known here. {REMEDY}"
        )


# --- The whole -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SecantOperator:
    """The operator S between two runs of a model, read by one target: f(x) − f(x′) = S (x − x′).

    Attributes:
        clean: Capture and operator of the clean run, x.
        corrupted: Capture and operator of the corrupted run, x′.
        covector: Gradient of the target at the final normalized residual [batch, pos, d_model].

    Raises:
        ValueError: If a user's hook edited one of the runs.
    """

    clean: tuple[Capture, FrozenTransformer]
    corrupted: tuple[Capture, FrozenTransformer]
    covector: Float[Tensor, "batch pos d_model"]

    def __post_init__(self):
        for _, operator in (self.clean, self.corrupted):
            edits = [e.name for s in operator.steps for e in s.edits]
            added = [name for name in edits if not name.endswith(("[user]", "[sae]"))]
            if added:  # by the model, such as rows of a picture after a block
                raise ValueError(
                    f"at='secant' needs runs where sublayers alone add to the residual, and here "
                    f"{added[0]} does, too. " + REMEDY
                )
            edited = [b for s in operator.steps for b in s.branches if b.body.edits or s.edits]
            if edited or operator.edit is not None:
                raise ValueError(
                    "at='secant' needs two runs that no hook of yours edited. " + REMEDY
                )

    @cached_property
    def top(self) -> Float[Tensor, "batch pos d_model"]:
        """The covector below the final norm [batch, pos, d_model]."""
        (capture, operator), (other, other_operator) = self.clean, self.corrupted
        a, b = operator.ln_final, other_operator.ln_final
        if isinstance(a, Identity) or isinstance(b, Identity):
            return self.covector
        ends = capture.resid_final, other.resid_final
        top = NormSecant.of(a.weights, *ends, a.scale, b.scale).pull_(self.covector.clone())
        y = capture.unembed.final - other.unembed.final
        _check("ln_final", capture, (top, ends[0] - ends[1]), (self.covector, y))
        return top

    @cached_property
    def _norms(self) -> tuple[NormSecant | None, ...]:
        """For every step, the secant of the residual's own norm."""
        found = []
        for a, b in zip(self.clean[1].steps, self.corrupted[1].steps, strict=True):
            sums = (a.state, b.state) if a.norm is None else (a.summed, b.summed)
            found.append(_of_norms(a.norm, b.norm, *sums))
        return tuple(found)

    @property
    def direct(self) -> list[Float[Tensor, "batch pos d_model"]]:
        """The covector past all nodes: at the embeddings, at what each step adds, and above."""
        found = [self.top]
        for norm in reversed(self._norms):
            found.append(found[-1] if norm is None else norm.pull_(found[-1].clone()))
        return [found[-1], *reversed(found)]

    @cached_property
    def _sweep(self) -> tuple[tuple[Tensor, ...], tuple[list[Reads], ...]]:
        (capture, operator), (other, other_operator) = self.clean, self.corrupted
        covectors, found = [self.top], []
        after = capture.resid_final - other.resid_final
        steps = zip(operator.steps, other_operator.steps, self._norms, strict=True)
        for a, b, norm in reversed(list(steps)):
            whole, states = covectors[-1], (a.state, b.state)
            c = whole if norm is None else norm.pull_(whole.clone())
            pulls = [
                _pull(x, y, states, c, (capture, other))
                for x, y in zip(a.branches, b.branches, strict=True)
            ]
            covectors.append(sum((total for total, _ in pulls), c))
            before = a.state - b.state
            _check(a.site, capture, (covectors[-1], before), (whole, after))
            after = before
            found.append([reads for _, parts in pulls for reads in parts])
        return tuple(reversed(covectors)), tuple(reversed(found))

    @property
    def covectors(self) -> tuple[Float[Tensor, "batch pos d_model"], ...]:
        """The covector before every step and after the last.

        The first is at the embeddings. Its product with x − x′ is the target's difference.
        """
        return self._sweep[0]

    def readers(self, below: tuple[int, ...], qk: bool) -> Iterator[Readers]:
        """Every reader, for :func:`tensorlens_tl.attribution.edges.edge_products`.

        Args:
            below: Number of writers before each step, and in all.
            qk: Whether to include the query and key inputs of heads.

        Yields:
            The readers, first layer first.
        """
        norm: NormSecant | None = None
        for reads, seen, then in zip(self._sweep[1], below, self._norms, strict=False):
            for nodes, covectors in reads:
                if qk or nodes[0].name not in ("q", "k"):
                    yield Readers(nodes, seen, covectors, {}, norm)
                    norm = None
            norm = then
        yield Readers((LOGITS,), below[-1], Factored(self.top[None]), {}, norm)
