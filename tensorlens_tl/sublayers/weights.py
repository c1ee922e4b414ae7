"""Weights in one layout for all hosts: row vectors, x @ W. They are referenced, never copied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..maps import NormWeights


@dataclass(frozen=True, eq=False)
class EmbedWeights:
    """The embedding matrix, with the norm that BLOOM applies to its rows.

    The rows that enter the residual are these rows, or multiples of them (Gemma scales them).

    Attributes:
        W_E: The embedding matrix.
        norm: The norm of the rows, or None.
    """

    W_E: Float[Tensor, "d_vocab d_model"]
    norm: NormWeights | None = None

    def rows(self, ids: slice | Tensor, dtype: torch.dtype) -> Float[Tensor, "*ids d_model"]:
        """Rows of the matrix, after the norm if there is one."""
        rows = self.W_E[ids].detach().to(dtype)
        if self.norm is None:
            return rows
        w, b = (None if x is None else x.detach().to(dtype) for x in (self.norm.w, self.norm.b))
        # Not a frozen scale: rows of words that the prompt lacks have a scale of their own.
        return torch.nn.functional.layer_norm(rows, rows.shape[-1:], w, b, self.norm.eps or 0.0)

    def mean(self, dtype: torch.dtype) -> Float[Tensor, " d_model"]:
        """The mean of all rows, after the norm if there is one."""
        if self.norm is None:
            return self.W_E.detach().mean(0, dtype=dtype)
        # The norm of a mean is not the mean of norms. Slices keep the normalized copy small.
        n, step = len(self.W_E), 4096
        sums = [self.rows(slice(i, i + step), dtype).sum(0) for i in range(0, n, step)]
        return torch.stack(sums).sum(0) / n


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Value and output matrices.

    Grouped-query attention has fewer key/value heads than query heads. Query head h then reads
    key/value head h // (heads // kv_heads), and no matrix is repeated.
    """

    W_V: Float[Tensor, "kv_head d_read d_head"]
    b_V: Float[Tensor, "kv_head d_head"] | None
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"] | None


@dataclass(frozen=True, eq=False)
class LatentWeights(AttentionWeights):
    """Latent attention: W_V reads a narrow latent, c = norm(x W_DKV + b_DKV).

    Attributes:
        W_DKV: The matrix that compresses what is read [d_model, d_latent]; W_V takes d_latent.
        b_DKV: The bias of W_DKV, or None.
        norm: The norm of the latent, an RMSNorm.
    """

    W_DKV: Float[Tensor, "d_model d_latent"]
    b_DKV: Float[Tensor, " d_latent"] | None
    norm: NormWeights


@dataclass(frozen=True, eq=False)
class DeltaNetWeights(AttentionWeights):
    """A gated delta net, as far as it is linear in what it reads.

    Attributes:
        kernel: The short convolution over x W_V, one kernel per dimension [head · d_head, kernel].
    """

    kernel: Float[Tensor, "d_values kernel"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary positions: the first dimensions of x become x ⊙ cos + quarter turn(x) ⊙ sin.

    Scores depend only on differences of positions. So the same rows serve a prompt wherever it
    starts in a padded batch.

    Attributes:
        cos: Cosines by position.
        sin: Sines by position.
        adjacent: Whether dimensions (0, 1), (2, 3), … turn together, and not the two halves.
    """

    cos: Float[Tensor, "pos rotary"]
    sin: Float[Tensor, "pos rotary"]
    adjacent: bool


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """The norm of queries or keys. Every head has a scale of its own, or all heads share one.

    Attributes:
        weights: The affine part. Its gain is the same for all heads, or one row for each.
        whole: Whether one scale, of the vector of all heads side by side, divides every head.
    """

    weights: NormWeights
    whole: bool = False

    def apply(self, y: Float[Tensor, "*batch any_head pos d_query"]) -> tuple[Tensor, Tensor]:
        """Normalize queries or keys.

        Args:
            y: Queries or keys, heads apart.

        Returns:
            The normalized ones, and the scale that divided them [..., any_head or 1, pos, 1].
        """
        w, over = self.weights, (-3, -1) if self.whole else -1
        centered = y - y.mean(-1, keepdim=True) if w.center else y
        scale = (centered.square().mean(over, keepdim=True) + (w.eps or 0.0)).sqrt()
        return w.at_scale(y, scale), scale


@dataclass(frozen=True, eq=False)
class ScoreWeights:
    """Query and key matrices, and how scores come from them: cap · tanh(q·k · scale / cap).

    q = rotated(q_norm(x W_Q + b_Q)), and k in the same way. A part that a model lacks is None. The
    operator needs no scores, because its patterns are frozen; query and key edges do.

    Attributes:
        W_Q: Query matrix of every query head.
        b_Q: Bias of the queries, or None.
        W_K: Key matrix of every key/value head.
        b_K: Bias of the keys, or None.
        scale: Factor of q·k, usually 1 / √d_query.
        soft_cap: Largest absolute score.
        q_norm: Norm of the queries.
        k_norm: Norm of the keys.
        rotation: Rotary positions of queries and keys.
        slopes: ALiBi's loss of score per position of distance, one per query head.
        sinks: One more score per query head, which takes part in the softmax and has no value.
        norm_last: Whether the norms follow the rotation, and do not precede it.
    """

    W_Q: Float[Tensor, "head d_model d_query"]
    b_Q: Float[Tensor, "head d_query"] | None
    W_K: Float[Tensor, "kv_head d_model d_query"]
    b_K: Float[Tensor, "kv_head d_query"] | None
    scale: float
    soft_cap: float | None = None
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    rotation: Rotation | None = None
    slopes: tuple[float, ...] | None = None
    sinks: Float[Tensor, " head"] | None = None
    norm_last: bool = False


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """A plain MLP, act(x W_in + b_in) W_out + b_out; ``ln`` is the norm of SoLU models."""

    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"] | None
    act: str
    ln: NormWeights | None = None


@dataclass(frozen=True, eq=False)
class GatedMLPWeights:
    """A gated MLP: (act(x W_gate + b_gate) ⊙ (x W_in + b_in) + b_post) W_out + b_out.

    ``ln`` is the norm before W_out that BitNet has.
    """

    W_gate: Float[Tensor, "d_model d_mlp"]
    b_gate: Float[Tensor, " d_mlp"] | None
    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"] | None
    b_post: Float[Tensor, " d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"] | None
    act: str
    ln: NormWeights | None = None


@dataclass(frozen=True, eq=False)
class ExpertsWeights:
    """The experts of a mixture, each a gated MLP: (act(g) ⊙ (u + up_offset)) W_out + b_out.

    The matrices of all experts are one tensor where the host packs them, else one tensor each.

    g = min(x W_gate + b_gate, limit), and u = x W_in + b_in, cut off at ±limit. Most models have no
    limit and the offset 0; those of GPT-OSS are 7 and 1.

    Attributes:
        W_gate: Matrix before the activation, per expert.
        b_gate: Bias of the pre-activations, per expert, or None.
        W_in: Matrix of the factor beside the activation, per expert.
        b_in: Bias of that factor, per expert, or None.
        W_out: Output matrix, per expert.
        b_out: Output bias, per expert, or None.
        act: Name of the activation.
        limit: Largest value of g, and largest absolute value of u; None for no limit.
        up_offset: Number added to u.
        scales_input: Whether the routing weight multiplies an expert's input (Llama-4), and not
            its output.
    """

    W_gate: Float[Tensor, "expert d_model d_mlp"] | tuple[Float[Tensor, "d_model d_mlp"], ...]
    b_gate: Float[Tensor, "expert d_mlp"] | tuple[Float[Tensor, " d_mlp"], ...] | None
    W_in: Float[Tensor, "expert d_model d_mlp"] | tuple[Float[Tensor, "d_model d_mlp"], ...]
    b_in: Float[Tensor, "expert d_mlp"] | tuple[Float[Tensor, " d_mlp"], ...] | None
    W_out: Float[Tensor, "expert d_mlp d_model"] | tuple[Float[Tensor, "d_mlp d_model"], ...]
    b_out: Float[Tensor, "expert d_model"] | tuple[Float[Tensor, " d_model"], ...] | None
    act: str
    limit: float | None = None
    up_offset: float = 0.0
    scales_input: bool = False


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The head of a masked language model, norm(act(y W + b)), before its unembedding."""

    W: Float[Tensor, "d_model d_head"]
    b: Float[Tensor, " d_head"] | None
    act: str
    norm: NormWeights


@dataclass(frozen=True, eq=False)
class PooledHead:
    """A head that reads the norm of the mean of the first rows: AST's, of [CLS] and [DIST]."""

    norm: NormWeights
    rows: int


@dataclass(frozen=True, eq=False)
class UnembedWeights:
    """The readout cap(h W_U + b_U), where cap(l) = soft_cap · tanh(l / soft_cap), or l.

    h is the final residual y, or what a head makes of it.
    """

    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"] | None
    soft_cap: float | None = None
    head: HeadWeights | PooledHead | None = None


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """One block: mid_norm(x + ln1_post(attn(ln1(x)))), then the same with ln2, mlp and post_norm.

    In a parallel block both branches read the same residual. A norm that a model lacks is None.
    ``shared`` is the MLP that every token passes beside a mixture's experts.
    """

    attn: AttentionWeights
    mlp: MLPWeights | GatedMLPWeights | ExpertsWeights | None
    ln1: NormWeights | None
    ln2: NormWeights | None
    ln1_post: NormWeights | None
    ln2_post: NormWeights | None
    parallel: bool
    shared: GatedMLPWeights | None = None
    mid_norm: NormWeights | None = None
    post_norm: NormWeights | None = None


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """All weights that the operator uses."""

    blocks: tuple[BlockWeights, ...]
    ln_final: NormWeights | None
    unembed: UnembedWeights
