"""How an attention sublayer is read and frozen: one class per component of a host.

Plain attention shows its values and z, and W_O reads z as it is. A component that does more has a
class here, which tells what else to read and how the sublayer is frozen from it:

    AttentionReader   v = x W_V + b_V
    LatentReader      v = norm(x W_DKV + b_DKV) W_V, the norm's scale as the run had it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..maps import Frame, NormWeights
from ..sublayers import Attention, AttentionWeights, HeadNorm, LatentWeights, ScoreWeights
from .attention_reading import (
    NotRecomputableError,
    RecomputedReading,
    StoredReading,
    Take,
    norm_last,
)
from .hook_points import Read
from .supported import UnsupportedArchitectureError, refusal

if TYPE_CHECKING:
    from .adapter import Adapter

Point = str | nn.Module
"""Where something is read: a hook point by its name within the block, or a module."""


QueryKeyWeights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""W_Q [head, d_model, d_head], b_Q, W_K [kv_head, d_model, d_head], b_K; no bias is None."""


class AttentionReader:
    """Attention that shows values and z, whose weights the adapter of its host reads.

    Args:
        adapter: Adapter of the model.
        block: The host's block.
        weights: Value and output matrices.
    """

    def __init__(self, adapter: Adapter, block: Any, weights: AttentionWeights):
        self.adapter, self.block, self.weights = adapter, block, weights

    @property
    def points(self) -> Mapping[str, Point]:
        """What is read beside the pattern, by name."""
        return {"v": "attn.hook_v", "z": "attn.hook_z"}

    kind = "attention"
    """What the component is, for messages."""

    @property
    def plain(self) -> bool:
        """Whether the sublayer is W_V, a pattern and W_O alone."""
        return type(self) is AttentionReader

    def head_norm(self, which: str) -> NormWeights | None:
        """The norm of queries ("q_norm") or of keys ("k_norm"), or None."""
        norm = getattr(self.block.attn, which, None)
        each = getattr(getattr(norm, "original_component", None), "norms", None)
        if each is None:
            return self.adapter.norm_weights(norm)
        # StableLM's attention has a LayerNorm for each head.
        w = None if each[0].weight is None else torch.stack([one.weight for one in each])
        b = None if each[0].bias is None else torch.stack([one.bias for one in each])
        return NormWeights(w, b, center=True, eps=each[0].eps)

    def freeze(
        self, layer: int, frame: Frame, reading: StoredReading | RecomputedReading, take: Take
    ) -> tuple[Attention, Tensor, Tensor]:
        """Freeze the sublayer from what was read.

        Args:
            layer: Number of the block.
            frame: Spans of real tokens, positions, dtype and device of the run.
            reading: How attention is read.
            take: Gives what was read of a block.

        Returns:
            The sublayer without edits, the values, and what W_O read [batch, pos, …].
        """
        mix = reading.mix(layer, frame, take, self.weights)
        v, z = take(layer, "v").flatten(2), take(layer, "z").flatten(2)
        return Attention(frame, layer, mix, self.weights), v, z


class LatentReader(AttentionReader):
    """Multi-head latent attention: keys and values are made from one narrow, normalized latent."""

    weights: LatentWeights
    kind = "latent attention"

    @classmethod
    def of(cls, adapter: Any, block: Any, linear: Any) -> LatentReader:
        """Read the weights of the host's module; ``linear`` reads those of a linear module."""
        attn = block.attn
        part = attn.original_component
        heads, latent = int(part.num_heads), int(part.kv_lora_rank)
        (W_DKV, b_DKV), (W_UKV, b_UKV) = linear(attn.kv_a_proj_with_mqa), linear(attn.kv_b_proj)
        W_O, b_O = linear(attn.o)
        first = int(part.qk_nope_head_dim)  # of every head's columns the first ones make keys
        norm = adapter.norm_weights(attn.kv_a_layernorm)
        if norm.center or norm.b is not None:
            raise UnsupportedArchitectureError(
                refusal("the norm of a latent", "it is no RMSNorm without a bias")
            )
        weights = LatentWeights(
            W_UKV.unflatten(1, (heads, -1))[..., first:].transpose(0, 1),
            None if b_UKV is None else b_UKV.unflatten(0, (heads, -1))[:, first:],
            W_O.unflatten(0, (heads, -1)),
            b_O,
            W_DKV[:, :latent],
            None if b_DKV is None else b_DKV[:latent],
            norm,
        )
        return cls(adapter, block, weights)

    @property
    def points(self):
        scale = {"latent.scale": "attn.kv_a_layernorm.hook_scale"}
        return {"v_by_head": "attn.hook_v", "z": "attn.hook_z"} | scale

    def freeze(self, layer, frame, reading, take):
        w = self.weights
        mix = reading.mix(layer, frame, take, w)
        v, z = take(layer, "v_by_head").transpose(1, 2).flatten(2), take(layer, "z").flatten(2)
        return Attention(frame, layer, mix, w, latent_scale=take(layer, "latent.scale")), v, z


# --- What attention scores are made of -----------------------------------------------------------


def query_key_weights(adapter: Adapter) -> tuple[QueryKeyWeights, ...]:
    """W_Q, b_Q, W_K and b_K of every block, by reference; norms and rotations come after.

    Args:
        adapter: Adapter of the model.

    Returns:
        One entry per block.

    Raises:
        UnsupportedArchitectureError: If a block's queries and keys are no such products.
    """
    for layer, reader in enumerate(adapter.attention):
        if not reader.plain:
            raise UnsupportedArchitectureError(
                f"{adapter.name} cannot be run edge by edge, as L{layer} has {reader.kind}, whose "
                "queries and keys are no products of the residual alone. Use "
                'lens.attribute(by="edge").'
            )
    return tuple(adapter.query_key_weights_of(block.attn) for block in adapter.model.blocks)


def whole_norms(adapter: Adapter) -> dict[Read, nn.Module]:
    """Norms of the queries ("q") or keys ("k") of all heads together, by layer.

    Args:
        adapter: Adapter of the model.

    Returns:
        The host's modules. A norm of each head apart is not among them.
    """
    found: dict[Read, nn.Module] = {}
    rows = zip(adapter.attention, query_key_weights(adapter), strict=True)
    for layer, (reader, (W_Q, _, W_K, _)) in enumerate(rows):
        for side, W in (("q", W_Q), ("k", W_K)):
            norm = _of_heads(reader.head_norm(f"{side}_norm"), W)
            if norm is not None and norm.whole:
                found[layer, side] = getattr(reader.block.attn, f"{side}_norm")
    return found


def score_weights(adapter: Adapter, n_pos: int, position_ids: Any) -> Iterator[ScoreWeights]:
    """What the attention scores of every block are made of, by reference.

    Args:
        adapter: Adapter of the model.
        n_pos: Number of positions for which rotations are needed.
        position_ids: Positions of the run, or None for consecutive ones.

    Yields:
        One entry per block.

    Raises:
        NotRecomputableError: If it is not known how the model computes its scores.
    """
    how, weights = adapter.recomputed_reading(), query_key_weights(adapter)
    with torch.no_grad():
        rotations = adapter.rotations(n_pos)
    if rotations is None:
        raise NotRecomputableError(what="rotations", why="the model's tables of them are not found")
    given = torch.as_tensor([0] if position_ids is None else position_ids)
    if any(rotations) and bool((given.diff() != 1).any()):
        raise NotRecomputableError(what="position_ids", why="they are not consecutive")
    rows = zip(adapter.attention, weights, how.scores, rotations, strict=True)
    for layer, (reader, own, s, rotation) in enumerate(rows):
        yield ScoreWeights(
            *own,
            scale=s.scale,
            soft_cap=s.soft_cap,
            q_norm=_of_heads(reader.head_norm("q_norm"), own[0]),
            k_norm=_of_heads(reader.head_norm("k_norm"), own[2]),
            rotation=rotation,
            slopes=s.slopes,
            sinks=how.sinks[layer] if how.sinks else None,
            norm_last=norm_last(adapter),
        )


def _of_heads(norm: NormWeights | None, W: Tensor) -> HeadNorm | None:
    """A norm of queries or keys, with its gains head by head; their shape tells what it divides."""
    if norm is None:
        return None
    (heads, _, width), w = W.shape, norm.w
    if w is None or w.shape == (width,):
        return HeadNorm(norm)
    whole = w.shape == (heads * width,)
    if norm.b is not None or not (whole or w.shape == (heads, width)) or (whole and norm.center):
        raise NotRecomputableError(
            what=f"the norm of queries and keys with weights {list(w.shape)}",
            why="it is neither one of each head nor an RMSNorm of all heads together",
        )
    return HeadNorm(replace(norm, w=w.reshape(heads, 1, width)), whole)
