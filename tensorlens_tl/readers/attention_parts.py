"""How an attention sublayer is read and frozen: one class per component of a host.

Plain attention shows its values and z, and W_O reads z as it is. A component that does more has a
class here, which tells what else to read and how the sublayer is frozen from it:

    AttentionReader   v = x W_V + b_V
    FusedReader       the same without hooks: one product makes queries, keys and values
    LatentReader      v = norm(x W_DKV + b_DKV) W_V, the norm's scale as the run had it
    GatedReader       z ⊙ σ(gate), the gate as the run had it
    NormedValuesReader  v = norm(x W_V), head by head
    NormedOutputReader  norm(z), all heads together
    DeltaNetReader    v = silu(conv(x W_V)), a recurrence in place of a pattern, and a gated norm
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..maps import Frame, NormWeights
from ..refusals import (
    NotRecomputableError,
    UnsupportedArchitectureError,
    in_block,
    refusal,
    refuse_extras,
)
from ..sublayers import (
    Attention,
    AttentionWeights,
    DeltaNetRun,
    DeltaNetWeights,
    HeadNorm,
    LatentWeights,
)
from .attention_reading import NORM_LAST, RecomputedReading, StoredReading, Take
from .host import Host
from .linear import linear_weights, norm_before

Point = str | nn.Module
"""Where something is read: a hook point by its name within the block, or what a module gives."""

_OUTPUT_GATES = {"sigmoid": torch.sigmoid, "softplus": torch.nn.functional.softplus}

_GATE_OF = {
    "AfmoeAttention": "sigmoid",
    "LagunaAttention": "softplus",
    "MuseGlimmerTextAttention": "sigmoid",
}
"""What makes an output gate of its logits, by Hugging Face's class of the component."""


class AttentionReader:
    """Attention that shows values and z, whose weights the adapter of its host reads.

    Args:
        adapter: Adapter of the model.
        block: The host's block.
        weights: Value and output matrices.
    """

    def __init__(self, adapter: Host, block: Any, weights: AttentionWeights):
        self.adapter, self.block, self.weights = adapter, block, weights

    @property
    def points(self) -> Mapping[str, Point]:
        """What is read beside the pattern, by name."""
        return {"v": "attn.hook_v", "z": "attn.hook_z"}

    kind = "attention"
    """What the component is, for messages."""

    has_pattern = True
    """Whether attention has a pattern to read."""

    shows_queries = True
    """Whether hooks show queries and keys."""

    shown = True
    """Whether hooks show all that is frozen, as patterns and scales, so that they can hold it."""

    @property
    def plain(self) -> bool:
        """Whether the sublayer is W_V, a pattern and W_O alone."""
        return type(self) is AttentionReader

    def head_norm(self, which: str) -> NormWeights | None:
        """The norm of queries ("q_norm") or of keys ("k_norm"), or None."""
        attn = self.block.attn
        if (
            shared := getattr(getattr(attn, "original_component", None), "qk_norm", None)
        ) is not None:
            return NormWeights(None, None, center=False, eps=shared.eps)  # Llama-4
        norm = getattr(attn, which, None)
        each = getattr(getattr(norm, "original_component", None), "norms", None)
        if each is None:
            return self.adapter.norm_weights(norm)
        # StableLM's attention has a LayerNorm for each head.
        w = None if each[0].weight is None else torch.stack([one.weight for one in each])
        b = None if each[0].bias is None else torch.stack([one.bias for one in each])
        return NormWeights(w, b, center=True, eps=each[0].eps)

    def norms(self) -> tuple[HeadNorm | None, HeadNorm | None]:
        """The norm of queries, and that of keys, with their gains head by head."""
        of_q, of_k = self.head_norm("q_norm"), self.head_norm("k_norm")
        if of_q is None and of_k is None:
            return None, None
        W_Q, _, W_K, _ = self.adapter.query_key_weights_of(self.block.attn)
        return _of_heads(of_q, W_Q), _of_heads(of_k, W_K)

    @property
    def norm_last(self) -> bool:
        """Whether queries and keys are normalized after their rotation: HunYuan, Llama-4."""
        part = getattr(self.block.attn, "original_component", None)
        told = getattr(self.adapter.cfg, "qk_norm_after_rope", False)
        return told or hasattr(part, "qk_norm") or type(part).__name__ in NORM_LAST

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


class FusedReader(AttentionReader):
    """Attention without hooks, whose queries, keys and values one linear module makes."""

    kind = "attention that shows no queries"
    shows_queries = False

    @classmethod
    def of(cls, adapter: Any, block: Any) -> FusedReader:
        """Read the weights of the module inside."""
        part = block.attn.original_component
        (W, b), (W_O, b_O) = linear_weights(part.c_attn), linear_weights(part.c_proj)
        d_head = adapter.cfg.d_head
        weights = AttentionWeights(
            W.chunk(3, 1)[2].unflatten(1, (-1, d_head)).transpose(0, 1),
            None if b is None else b.chunk(3)[2].unflatten(0, (-1, d_head)),
            W_O.unflatten(0, (-1, d_head)),
            b_O,
        )
        return cls(adapter, block, weights)

    @property
    def points(self):
        part = self.block.attn.original_component
        return {"qkv": part.c_attn, "z_in": part.c_proj}

    def freeze(self, layer, frame, reading, take):
        mix = reading.mix(layer, frame, take, self.weights)
        v, z = take(layer, "qkv").chunk(3, -1)[2], take(layer, "z_in")
        return Attention(frame, layer, mix, self.weights), v, z


class LatentReader(AttentionReader):
    """Multi-head latent attention: keys and values are made from one narrow, normalized latent."""

    weights: LatentWeights
    kind = "latent attention"

    @classmethod
    def of(cls, adapter: Any, block: Any) -> LatentReader:
        """Read the weights of the host's module."""
        attn = block.attn
        part = attn.original_component
        heads, latent = int(part.num_heads), int(part.kv_lora_rank)
        parts = (attn.kv_a_proj_with_mqa, attn.kv_b_proj, attn.o)
        (W_DKV, b_DKV), (W_UKV, b_UKV), (W_O, b_O) = map(linear_weights, parts)
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


class GatedReader(AttentionReader):
    """Attention whose z is multiplied by a gate that its own projection of the input makes."""

    kind = "gated attention"
    shown = False

    def __init__(self, adapter: Host, block: Any, weights: AttentionWeights, at: str, act: str):
        super().__init__(adapter, block, weights)
        self.at, self.act = at, act

    @property
    def points(self):
        return {**super().points, "gate": self.at}

    def freeze(self, layer, frame, reading, take):
        attn, v, z = super().freeze(layer, frame, reading, take)
        gate = _OUTPUT_GATES[self.act](take(layer, "gate").flatten(2))
        gate = gate.repeat_interleave(z.shape[-1] // gate.shape[-1], -1)  # one number for a head
        return replace(attn, output_ratio=gate), v, z


class NormedValuesReader(AttentionReader):
    """Attention whose values are normalized head by head, with a norm that has no weights."""

    kind = "a norm of values"
    shown = False

    def __init__(self, adapter: Host, block: Any, weights: AttentionWeights):
        super().__init__(adapter, block, weights)
        refuse_extras(block)
        part = block.attn.original_component
        if getattr(part, "is_kv_shared_layer", False):
            what, why = f"attention{in_block(part)}", "it reuses the values of an earlier block"
            raise UnsupportedArchitectureError(refusal(what, why))
        norm = adapter.norm_weights(block.attn.v_norm)
        if norm is None or norm.w is not None or norm.center:
            why = "it is no RMSNorm without weights"
            raise UnsupportedArchitectureError(refusal("the norm of values", why))
        self.norm = norm

    @property
    def points(self):
        return {"v": "attn.v_norm.hook_out", "v_in": "attn.v_norm.hook_in", "z": "attn.hook_z"}

    def freeze(self, layer, frame, reading, take):
        attn, v, z = super().freeze(layer, frame, reading, take)
        heads = attn.by_kv_head(take(layer, "v_in").flatten(2))
        inverse = self.norm.scale_at(heads).reciprocal()
        return replace(attn, value_ratio=inverse.expand_as(heads).flatten(2)), v, z


class NormedOutputReader(AttentionReader):
    """Attention that normalizes the mixed values of all heads together before W_O, as BitNet's."""

    kind = "a norm before W_O"
    shown = False

    def freeze(self, layer, frame, reading, take):
        attn, v, z = super().freeze(layer, frame, reading, take)
        norm: Any = norm_before(self.block.attn, "attn_sub_norm")
        inverse = norm.scale_at(attn.mix.apply(v)).reciprocal()  # no hook shows it
        return replace(attn, output_ratio=inverse * frame.cast(norm.w)), v, z


class DeltaNetReader(AttentionReader):
    """A gated delta net: gates, decay, keys and queries frozen, it is linear in its values.

    All is read where the host's own projections give it, before its short convolution. What
    follows is computed here, and checked by what the output matrix reads.
    """

    weights: DeltaNetWeights
    kind = "a gated delta net"
    has_pattern = shown = False

    @classmethod
    def of(cls, adapter: Any, block: Any) -> DeltaNetReader:
        """Read the weights of the host's module."""
        part = block.linear_attn.original_component
        conv, first = part.conv1d, 2 * int(part.key_dim)
        if conv.bias is not None or part.activation not in ("silu", "swish"):
            raise UnsupportedArchitectureError(
                refusal(
                    "a gated delta net", "its convolution has a bias, or is not followed by SiLU"
                )
            )
        heads, width = int(part.num_v_heads), int(part.head_v_dim)
        if hasattr(part, "in_proj_qkvz"):  # grouped by key head: q, k, then its values and gates
            groups, d_key = int(part.num_k_heads), int(part.head_k_dim)
            W = _matrix(part.in_proj_qkvz).unflatten(1, (groups, -1))
            values = W[..., 2 * d_key : 2 * d_key + heads // groups * width]
            W_V = values.unflatten(-1, (-1, width)).flatten(1, 2)
        elif hasattr(part, "in_proj_qkv"):
            W_V = _matrix(part.in_proj_qkv)[:, first:].unflatten(1, (heads, width))
        else:
            W_V = _matrix(part.v_proj).unflatten(1, (heads, width))
        W_O = _matrix(part.out_proj if hasattr(part, "out_proj") else part.o_proj)
        parts = W_V.transpose(0, 1), None, W_O.unflatten(0, (heads, width)), None
        return cls(adapter, block, DeltaNetWeights(*parts, conv.weight[first:, 0]))

    @property
    def part(self) -> Any:
        """The host's module."""
        return self.block.linear_attn.original_component

    @property
    def points(self):
        names = ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        names += ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
        found = {name: getattr(self.part, name) for name in names if hasattr(self.part, name)}
        return found | {"into_output": getattr(self.part, "out_proj", None) or self.part.o_proj}

    def projections(self, take: Callable[[str], Tensor]) -> tuple[Tensor, ...]:
        """What enters the short convolution, and the logits of the gates.

        Args:
            take: Gives what one of the host's projections gave.

        Returns:
            Queries, keys and values side by side [batch, pos, d], the gate of the norm, and the
            logits of β and of the decay [batch, pos, head].
        """
        part = self.part
        if hasattr(part, "in_proj_qkvz"):
            found = take("in_proj_qkvz"), take("in_proj_ba")
            q, k, v, z, b, a = part.fix_query_key_value_ordering(*found)
            return torch.cat([x.flatten(2) for x in (q, k, v)], -1), z.flatten(2), b, a
        if hasattr(part, "in_proj_qkv"):
            return tuple(take(f"in_proj_{name}") for name in ("qkv", "z", "b", "a"))
        qkv = torch.cat([take(f"{name}_proj") for name in "qkv"], -1)
        return qkv, *(take(f"{name}_proj") for name in "gba")

    def freeze(self, layer, frame, reading, take):
        part = self.part
        norm = getattr(part, "norm", None) or part.o_norm
        run = DeltaNetRun(
            *self.projections(lambda name: take(layer, name)),
            kernel=part.conv1d.weight[: 2 * int(part.key_dim), 0],
            A_log=part.A_log,
            dt_bias=part.dt_bias,
            norm=norm.weight,
            eps=float(norm.variance_epsilon),
            d_key=int(part.head_k_dim),
            most=2 if getattr(part, "allow_neg_eigval", False) else 1,
        )
        return *run.freeze(frame, layer, self.weights), take(layer, "into_output")


def _matrix(module: Any) -> Tensor:
    """A linear module without a bias as x @ W."""
    if type(module) is not nn.Linear or module.bias is not None:
        raise UnsupportedArchitectureError(
            refusal(
                f"the linear module {type(module).__name__}", "a delta net's have no more than W"
            )
        )
    return module.weight.T


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


def gate_of(attn: Any) -> str:
    """Name what makes the output gate of an attention of its logits.

    Args:
        attn: The host's attention, which has a projection for its gate.

    Returns:
        A key of the gates that are known.

    Raises:
        UnsupportedArchitectureError: If the component is not known.
    """
    kind = type(attn.original_component).__name__
    if kind not in _GATE_OF:
        raise UnsupportedArchitectureError(
            refusal(f"the attention {kind}", "it is not known what its output gate computes")
        )
    return _GATE_OF[kind]
