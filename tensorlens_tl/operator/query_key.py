"""The gradient of a target at queries and keys. First-order, as the operator's patterns are frozen.

Let z be the covector at a head's mixed values and v the values. The target's sensitivity is

    to the pattern   dA[q, k] = ⟨z_q, v_k⟩
    to the scores    dS[q, k] = A[q, k] (dA[q, k] − Σ_k' A[q, k'] dA[q, k'])  the softmax's Jacobian
    to the products  dP[q, k] = dS[q, k] · (1 − (S[q, k] / cap)²) · scale      the soft cap's slope
    to queries       Σ_k dP[q, k] k_k,     to keys  Σ_q dP[q, k] q_q

From there linear maps lead to the residual: the inverse rotation, the norms of queries and keys
with their scales frozen, W_Q or W_K, and ln1 with its scale frozen. An edge is ⟨what a writer adds,
that covector⟩. It is the sensitivity to the scores, times the part of the scores that the writer
makes: linear in queries while keys are held, and in keys while queries are held. Masked entries
have A = 0 and drop out.

Queries and keys are recomputed from the run's residual. The softmax of their scores must be the
pattern that the run had. Otherwise the weights are not what they are taken for, and the run is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import Node
from ..maps import HALF, TINY, Factored, Frame, Mix, Norm
from ..sublayers import (
    Attention,
    HeadNorm,
    RecomputedMix,
    Rotation,
    ScoreWeights,
    add_alibi_bias_,
)
from .capture import CaptureMismatchError

CELLS = 2**24
"""Entries of patterns that are held at a time. More heads are served a few at a time."""


def tolerated(model_dtype: torch.dtype) -> float:
    """The largest relative error allowed of what is recomputed from a run's residual."""
    return 0.2 if model_dtype in HALF else 1e-3


@dataclass(frozen=True, eq=False)
class QueryKey:
    """The queries and keys of one attention sublayer in the captured run.

    Attributes:
        norm: The norm that attention reads the residual through, or None.
        attn: The frozen attention.
        weights: The weights that its scores are made of: W_Q, W_K, norms, rotation.
        model_dtype: The model's dtype, in which the pattern was computed.
    """

    norm: Norm | None
    attn: Attention
    weights: ScoreWeights
    model_dtype: torch.dtype

    def reads(self) -> tuple[Node, ...]:
        """The reader nodes: every query head's query input, then every query head's key input."""
        nodes = self.attn.nodes()
        return tuple(replace(node, name=name) for name in ("q", "k") for node in nodes)

    def readers(
        self,
        z: Float[Tensor, "batch pos z"],
        state: Float[Tensor, "batch pos d_model"],
        row: int | None = None,
    ) -> tuple[Factored, Factored]:
        """The covector of every query input, and of every key input, at the residual.

        Args:
            z: The target's covector at the mixed values, heads side by side [batch, pos, z].
            state: The residual that attention reads in the run [batch, pos, d_model].
            row: The one position at which ``z`` is not zero, as a tensor index: then only that row
                of the patterns is computed. None for all.

        Returns:
            The covectors of the query inputs and of the key inputs, in the order of :meth:`reads`,
            each [head, batch, pos, d_model].

        Raises:
            CaptureMismatchError: If the recomputed pattern is not the run's.
        """
        # 1. The run's queries, keys and values, from its residual.
        w, frame, heads = self.weights, self.attn.frame, len(self.attn.nodes())
        kv_heads, n_pos = w.W_K.shape[0], frame.n_pos
        x = state if self.norm is None else self.norm.apply(state) + self.norm.bias
        q, k = Projection.both(frame, x, w)
        values = self.attn.values.apply(x) + self.attn.values.bias
        if self.attn.v_edit is not None:
            values = values + self.attn.v_edit.constant
        v = values.unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        z = z.unflatten(-1, (heads, -1)).transpose(1, 2)
        rows = slice(None) if row is None else slice(row, row + 1)
        # 2. The covectors at queries and keys, as many key/value heads at a time as CELLS allows.
        each = heads // kv_heads
        at_q, at_k = torch.zeros_like(q.rotated), torch.empty_like(q.rotated)
        step = max(1, CELLS // (frame.batch * each * n_pos**2))
        for first in range(0, kv_heads, step):
            last = min(first + step, kv_heads)
            kv, own = slice(first, last), slice(first * each, last * each)
            A = self._pattern(own, row)
            keys = k.rotated[:, kv].repeat_interleave(each, 1)
            queries = q.rotated[:, own, rows]
            S = queries @ keys.mT * w.scale
            S = S if w.soft_cap is None else w.soft_cap * torch.tanh(S / w.soft_cap)
            seen = with_alibi_bias(S, w.slopes, own, row or 0).masked_fill(A <= 0, -torch.inf)
            seen = with_sinks(seen, w.sinks, own)
            check_pattern(self.attn, A, seen, self.model_dtype, rows=rows)
            # Adjoints of z = A v, of the softmax and of the soft cap: the formulas of the module.
            dA = z[:, own, rows] @ v[:, kv].repeat_interleave(each, 1).mT
            dP = A * (dA - (A * dA).sum(-1, keepdim=True)) * w.scale
            dP = dP if w.soft_cap is None else dP * (1 - (S / w.soft_cap) ** 2)
            at_q[:, own, rows], at_k[:, own] = dP @ keys, dP.mT @ queries
        # 3. From queries and keys to the residual.
        return q.pull(at_q, self.norm), k.pull(at_k, self.norm)

    def _pattern(self, heads: slice, row: int | None) -> Tensor:
        """The pattern of some heads, or one row of it [batch, head, query_pos, key_pos]."""
        mix = cast(Mix | RecomputedMix, self.attn.mix)  # a delta rule has no scores
        if row is not None:
            at = torch.full((self.attn.frame.batch,), row, device=self.attn.frame.device)
            return mix.rows(at)[:, heads, None]
        return torch.cat([mix.head(h).pattern for h in range(heads.start, heads.stop)], 1)


def with_alibi_bias(
    S: Tensor, slopes: tuple[float, ...] | None, heads: slice, first: int = 0
) -> Tensor:
    """Scores [batch, head, query_pos, key_pos] of some heads, less ALiBi's slope · distance.

    Args:
        S: The scores of these heads, before ALiBi.
        slopes: The slope of every head of the layer, or None in a model without ALiBi.
        heads: The heads of ``S`` among all heads of the layer.
        first: The position of the first row of ``S``.

    Returns:
        The scores after ALiBi.
    """
    if slopes is None:
        return S
    return add_alibi_bias_(S.clone(), S.new_tensor(slopes[heads])[:, None, None], first, False)


def with_sinks(S: Tensor, sinks: Tensor | None, heads: slice) -> Tensor:
    """Scores [batch, head, query_pos, key_pos], and in a last column the sinks of the heads.

    Args:
        S: The scores of these heads.
        sinks: The sink of every head of the layer, or None in a model without sinks.
        heads: The heads of ``S`` among all heads of the layer.

    Returns:
        The scores, with one column more where there are sinks.
    """
    if sinks is None:
        return S
    return torch.cat((S, sinks[heads].to(S)[:, None, None].expand(*S.shape[:-1], 1)), -1)


def check_pattern(
    attn: Attention,
    A: Tensor,
    S: Tensor,
    model_dtype: torch.dtype,
    remedy: str = "Pass qk=False: edges into values, MLPs and logits do not need the scores.",
    prompts: slice = slice(None),
    rows: slice = slice(None),
) -> None:
    """Compare a pattern with the softmax of scores.

    Args:
        attn: The sublayer, for its name and its real tokens.
        A: The pattern of the run [batch, head, query_pos, key_pos].
        S: The recomputed scores, −∞ where nothing is attended to; a column of sinks may follow.
        model_dtype: The model's dtype.
        remedy: Last sentence of the message: what to do instead.
        prompts: The prompts of the batch that ``A`` and ``S`` belong to.
        rows: The query positions that they hold.

    Raises:
        CaptureMismatchError: If the two differ by more than rounding.
    """
    softmax = S.softmax(-1).nan_to_num(0.0)[..., : A.shape[-1]]
    real = attn.frame.real[prompts, None, rows, None]
    size = (A * real).square().sum((-2, -1)).sqrt()
    off = ((softmax - A) * real).square().sum((-2, -1)).sqrt()
    error = float((off / size.clamp_min(TINY)).max())
    expected = tolerated(model_dtype)
    if not error <= expected:
        raise CaptureMismatchError(
            f"L{attn.layer}: the pattern recomputed from W_Q and W_K differs from the run's "
            f"(relative error {error:.1e}, at most {expected:.0e} is allowed). A hook of yours "
            "edited queries, keys or the pattern, clip_qkv clips them, or their layout is unknown. "
            f"{remedy}"
        )


@dataclass(frozen=True, eq=False)
class Projection:
    """The queries (or keys) of a run, and the way back from them to the residual.

    Attributes:
        frame: Spans of real tokens, number of positions, dtype and device.
        raw: What their norm reads [batch, head, pos, d_query]; without a norm, what W_Q gives.
        rotated: Queries after their norm and rotation. Scores are products of these.
        W: The weights W_Q (or W_K) [head, d_model, d_query].
        norm: The norm of queries (or keys), or None.
        scale: The divisor of that norm in the run [batch, head or 1, pos, 1], or None.
        rotation: The rotary embedding, or None.
        norm_last: Whether the norm follows the rotation.
    """

    frame: Frame
    raw: Float[Tensor, "batch any_head pos d_query"]
    rotated: Float[Tensor, "batch any_head pos d_query"]
    W: Float[Tensor, "any_head d_model d_query"]
    norm: HeadNorm | None
    scale: Float[Tensor, "batch heads_apart pos 1"] | None
    rotation: Rotation | None
    norm_last: bool

    @classmethod
    def both(cls, frame: Frame, x: Tensor, w: ScoreWeights) -> tuple[Projection, Projection]:
        """Project the normalized residual x [batch, pos, d_model] to queries, and to keys."""
        return (
            cls._of(frame, x, w, w.W_Q, w.b_Q, w.q_norm),
            cls._of(frame, x, w, w.W_K, w.b_K, w.k_norm),
        )

    @classmethod
    def _of(
        cls,
        frame: Frame,
        x: Tensor,
        w: ScoreWeights,
        W: Tensor,
        b: Tensor | None,
        norm: HeadNorm | None,
    ) -> Projection:
        # W and b, then a norm where the model has one, then the rotation, or these two in turn.
        y, scale = x[:, None] @ frame.cast(W), None
        y = y if b is None else y + frame.cast(b)[:, None]
        raw = y = turned(y, w.rotation) if w.norm_last else y
        if norm is not None:
            y, scale = norm.apply(y)
        y = y if w.norm_last else turned(y, w.rotation)
        return cls(frame, raw, y, W, norm, scale, w.rotation, w.norm_last)

    def pull(self, y: Float[Tensor, "batch head pos d_query"], before: Norm | None) -> Factored:
        """Pull covectors at every query head's queries or keys back to the residual."""
        y = self.to_norm(y)
        if self.norm is not None and self.scale is not None:
            # The adjoint of the norm with its scale frozen: weights, scale, centering.
            w, y = self.norm.weights, self.by_head(y)
            y = (y if w.gain is None else y * w.gain.detach().to(y)) / self.scale[:, None]
            y = y - y.mean(-1, keepdim=True) if w.center else y
            y = y.transpose(1, 2).flatten(1, 2)
        found = self.from_norm(y)
        return found if before is None else found.then(before.scale, before.unscaled_t_)

    def by_head(self, y: Float[Tensor, "batch head pos d_query"]) -> Tensor:
        """Tell query heads that share a key apart: [batch, repeat, any_head, pos, d_query]."""
        return y.unflatten(1, (self.W.shape[0], -1)).transpose(1, 2)

    def to_norm(self, y: Float[Tensor, "batch head pos d_query"]) -> Tensor:
        """Pull covectors back to what the norm gives."""
        return y if self.norm_last else turned(y, self.rotation, back=True)

    def from_norm(self, y: Float[Tensor, "batch head pos d_query"]) -> Factored:
        """Pull covectors at what the norm reads back through W_Q or W_K."""
        y = turned(y, self.rotation, back=True) if self.norm_last else y
        return Factored(y.transpose(0, 1), lambda: self.frame.cast(self.W).mT)


def turned(
    y: Float[Tensor, "*many pos d"], rotation: Rotation | None, back: bool = False
) -> Tensor:
    """Rotate vectors, or pull covectors back through the rotation.

    Args:
        y: Vectors at the positions 0, 1, … of the rotation.
        rotation: Cosines and sines by position, or None for no rotation.
        back: Whether ``y`` are covectors of what the rotation gives.

    Returns:
        The rotated vectors, or the covectors of what the rotation takes.
    """
    if rotation is None:
        return y
    # y = x cos + quarter(x) sin, with quarter a turn by 90° in each plane, whose adjoint is
    # −quarter. Rotary embeddings may turn the first dimensions only.
    cos, sin = (t[: y.shape[-2]].to(y) for t in (rotation.cos, rotation.sin))
    x, rest = y[..., : cos.shape[-1]], y[..., cos.shape[-1] :]
    quarter = -_quarter(x * sin, rotation) if back else _quarter(x, rotation) * sin
    return torch.cat((x * cos + quarter, rest), -1)


def _quarter(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn by 90° in every plane: of two adjacent dimensions, or of one from each half."""
    if rotation.adjacent:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-b, a), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)
