"""Earlier token-by-token maps, made of attention and the value vectors that it moves.

Every function returns [batch, query_pos, key_pos], destination first; padding is 0. All of them
split attention's step by source token:

    x_i  →  x_i + Σ_j F_ij + b,     F_ij = post(Σ_h A_h[i, j] v_j^h W_O^h)

v are the run's own value vectors, with b_V inside. post is the frozen norm after attention, where
there is one. Costs are per layer, with L tokens, D = d_model and H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..maps import Norm
from ..operator import Capture, FrozenBlock
from .attention_maps import Matrix, halved, product, rows

# --- Attention's step, split by source token -----------------------------------------------------


def normed(norm: Norm | None, x: Tensor) -> Tensor:
    """Apply a frozen norm with its constant; without a norm, give x itself."""
    return x if norm is None else norm.apply(x) + norm.bias


def linear(norm: Norm | None, x: Tensor) -> Tensor:
    """Apply a frozen norm without its constant; without a norm, give x itself."""
    return x if norm is None else norm.apply(x)


@dataclass(frozen=True, eq=False)
class Split:
    """One layer's attention step, split by source token.

    Attributes:
        block: The frozen block.
        moved: Value vectors of every token through W_O [batch, key_pos, head, d_model].
        out: Output of attention before the norm after it, constants included
            [batch, pos, d_model].
        resid_post: State after the block [batch, pos, d_model].
        gated: Values of every token and query head, and what multiplies z [batch, pos, head,
            d_head]; None where nothing does.
        next_norms: Two frozen norms: the one that reads the state after attention, and the one
            that reads the state after the block. In post-norm models those of the residual itself.
    """

    block: FrozenBlock
    moved: Float[Tensor, "batch key_pos head d_model"]
    out: Float[Tensor, "batch pos d_model"]
    resid_post: Float[Tensor, "batch pos d_model"]
    next_norms: tuple[Norm | None, Norm | None]
    gated: tuple[Tensor, Tensor] | None = None

    def part(self, key: int) -> Float[Tensor, "batch query_pos d_model"]:
        """What one source adds to every destination, before the norm after attention."""
        if self.gated is None:
            return torch.einsum("bhq,bhd->bqd", self.pattern[..., key], self.moved[:, key])
        v, gate = self.gated  # a gate of the destination stands between the values and W_O
        z = torch.einsum("bhq,bhe,bqhe->bqhe", self.pattern[..., key], v[:, key], gate)
        return self.block.attn.output.apply(z.flatten(2))

    @cached_property
    def pattern(self) -> Float[Tensor, "batch head query_pos key_pos"]:
        """The layer's attention pattern, computed once."""
        return self.block.attn.pattern

    def with_residual(self, key: int) -> Float[Tensor, "batch query_pos d_model"]:
        """G_ij = F_ij + δ_ij x_i: one source's part of the state after attention."""
        part = linear(self.block.ln1_post, self.part(key))
        # δ_ij x_i: the residual carries a token to its own position alone.
        part[:, key] += self.block.resid_pre[:, key]
        return part

    def matrix(self, measure: Callable[[int], Tensor]) -> Matrix:
        """Measure every source: ``measure(key)`` gives [batch, query_pos], stacked over sources."""
        return torch.stack([measure(key) for key in range(self.moved.shape[1])], -1)


def splits(capture: Capture) -> Iterator[Split]:
    """Split every layer's attention step by source token, first layer first."""
    # A block's output is read by the next block's first norm, the last one's by ln_final.
    readers = [*(block.ln1 for block in capture.blocks[1:]), capture.ln_final]
    states = [*(block.resid_pre for block in capture.blocks[1:]), capture.resid_final]
    for block, reader, after in zip(capture.blocks, readers, states, strict=True):
        attn, x = block.attn, normed(block.ln1, block.resid_pre)
        v = attn.values.apply(x) + attn.values.bias
        if attn.v_edit is not None:
            v = v + attn.v_edit.constant
        # Grouped queries share key/value heads: kv_of tells which one each query head reads.
        v = v.unflatten(-1, (-1, attn.weights.W_V.shape[-1]))[..., attn.kv_of, :]
        moved = torch.einsum("bkhe,hed->bkhd", v, capture.frame.cast(attn.weights.W_O))
        out, ratio = attn.apply(x) + attn.bias, attn.output_ratio
        gated = None if ratio is None else (v, attn.by_node(ratio))
        # A parallel block has no ln2 after attention: the next reader sees the sum of both.
        norms = (reader if block.resid_mid is None else block.ln2, reader)
        norms = norms if block.mid_norm is None else (block.mid_norm, block.post_norm)
        yield Split(block, moved, out, after, norms, gated)


# --- Norms of moved value vectors ----------------------------------------------------------------


def norm_attention(capture: Capture) -> Matrix:
    """Norm-based attention (Kobayashi et al. 2020): norms of moved value vectors, rolled out.

    A layer's matrix is N_ij = ‖Σ_h A_h[i, j] v_j^h W_O^h‖ with rows normalized. The result is
    Π_l (½ N_l + ½ I): N lacks the residual, which counts half, as in ``rollout``. Cost: L² H D
    per layer.

    Args:
        capture: The captured run.

    Returns:
        The matrix; its rows sum to one.
    """
    layers = (s.matrix(lambda key, s=s: s.part(key).norm(dim=-1)) for s in splits(capture))
    return product(capture, [halved(capture, layer) for layer in layers])


def _with_next_norm(capture: Capture, which: int) -> Matrix:
    """Norms of G_ij under one of :attr:`Split.next_norms`, rolled out."""

    def measure(s: Split, key: int) -> Tensor:
        return linear(s.next_norms[which], s.with_residual(key)).norm(dim=-1)

    layers = (s.matrix(lambda key, s=s: measure(s, key)) for s in splits(capture))
    return product(capture, [rows(capture, layer) for layer in layers])


def norm_attention_resln(capture: Capture) -> Matrix:
    """Norms with residual and LayerNorm (Kobayashi et al. 2021), rolled out.

    A layer's matrix is ‖norm(F_ij + δ_ij x_i)‖ with rows normalized; the layers are multiplied. The
    paper's blocks normalize after the residual. Here the norm is the frozen one that reads the
    state after attention, without its constant: ln2, or in a parallel or attention-only block the
    next block's ln1 or ln_final. Cost: L² H D per layer.

    Args:
        capture: The captured run.

    Returns:
        The matrix; its rows sum to one.
    """
    return _with_next_norm(capture, 0)


def globenc(capture: Capture) -> Matrix:
    """GlobEnc (Modarressi et al. 2022): norms up to the norm after the MLP's residual, rolled out.

    As :func:`norm_attention_resln`, but with the frozen norm that reads the state after the whole
    block: the next block's ln1, or ln_final. The MLP itself is left out. The paper's blocks
    normalize after each residual. Cost: L² H D per layer.

    Args:
        capture: The captured run.

    Returns:
        The matrix; its rows sum to one.
    """
    return _with_next_norm(capture, 1)


def alti_layers(capture: Capture) -> list[Matrix]:
    """ALTI (Ferrando et al. 2022), one layer at a time: contributions with rows normalized."""
    layers = []
    for s in splits(capture):
        own = s.block.mid_norm
        y = normed(own, s.block.resid_pre + normed(s.block.ln1_post, s.out))
        size = y.abs().sum(-1)

        # 0 where y without the token is farther from 0 than y itself, in the 1-norm.
        def measure(
            key: int, s: Split = s, y: Tensor = y, size: Tensor = size, own: Norm | None = own
        ) -> Tensor:
            part = linear(own, s.with_residual(key))
            return (size - (y - part).abs().sum(-1)).clamp_min(0)

        layers.append(rows(capture, s.matrix(measure)))
    return layers


def alti(capture: Capture) -> Matrix:
    """ALTI (Ferrando et al. 2022): how much nearer a token's vector comes to the output.

    c_ij = max(0, ‖y_i‖₁ − ‖y_i − G_ij‖₁), with y_i the state after attention and
    G_ij = F_ij + δ_ij x_i. Rows are normalized, and the layers multiplied. In post-norm models, as
    in the paper, both are taken after the residual's norm, without its constant in G. Cost:
    L² H D per layer.

    Args:
        capture: The captured run.

    Returns:
        The matrix; its rows sum to one.
    """
    return product(capture, alti_layers(capture))
