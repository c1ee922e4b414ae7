"""How an attention sublayer is read and frozen: one class per component of a host.

Plain attention shows its values and z, and W_O reads z as it is. A component that does more has a
class here, which tells what else to read and how the sublayer is frozen from it:

    AttentionReader   v = x W_V + b_V
    LatentReader      v = norm(x W_DKV + b_DKV) W_V, the norm's scale as the run had it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..maps import Frame
from ..sublayers import Attention, AttentionWeights, LatentWeights
from .attention_reading import RecomputedReading, StoredReading, Take
from .supported import UnsupportedArchitectureError, refusal

if TYPE_CHECKING:
    from .adapter import Adapter

Point = str | nn.Module
"""Where something is read: a hook point by its name within the block, or a module."""


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
