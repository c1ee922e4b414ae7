"""TransformerBridge of transformer_lens 3.x and 4.x: weight layout, attention scores, refusals.

A Bridge wraps each module of a Hugging Face model in a component. How scores are made is told by
the component's class: see ``_READINGS``, one entry per component and none per architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sublayers import (
    HALF,
    AttentionWeights,
    BlockWeights,
    GatedMLPWeights,
    MLPWeights,
    NormWeights,
    Rotation,
    Scores,
    UnembedWeights,
)
from .adapter import Adapter, QueryKeyWeights
from .attention_reading import NotRecomputableError, RecomputedReading, rotated
from .supported import SUPPORTED, UnsupportedArchitectureError, flags_off, refusal

_ACT_FNS = {"FalconForCausalLM": "gelu", "MptForCausalLM": "gelu", "BloomForCausalLM": "gelu_bloom"}
"""What these compute whatever their Bridge's config says (the self-check would tell)."""

_HALVES_INTERLEAVED = ("GlmForCausalLM", "Glm4ForCausalLM", "Ernie4_5ForCausalLM")
"""Architectures that turn neighbours by the first half of their tables, each entry for two."""


class BridgeAdapter(Adapter):
    """``TransformerBridge`` of transformer_lens 3.x and 4.x, raw or in compatibility mode."""

    before_edits = frozenset({"resid_mid"})

    def check_model(self) -> None:
        flags_off(self.cfg)
        if self.architecture not in SUPPORTED:
            raise UnsupportedArchitectureError(
                refusal(f"{self.architecture}", "this architecture is not tested")
            )
        if getattr(self.model.original_model, "logit_scale", 1) != 1:
            raise UnsupportedArchitectureError(
                f"Cannot freeze {self.architecture} as it is: its logits are scaled after the "
                "unembedding. Call model.enable_compatibility_mode() first, which folds that in."
            )
        config = getattr(self.model.original_model, "config", None)
        width = getattr(config, "word_embed_proj_dim", self.cfg.d_model)
        if not getattr(config, "do_layer_norm_before", True) or width != self.cfg.d_model:
            raise UnsupportedArchitectureError(
                refusal(
                    f"{self.architecture} built like opt-350m",
                    "its norms stand on the stream itself, or its embeddings are projected",
                )
            )
        if getattr(config, "apply_residual_connection_post_layernorm", False):
            raise UnsupportedArchitectureError(
                refusal(
                    f"{self.architecture} with apply_residual_connection_post_layernorm",
                    "its blocks add to the normalized residual",
                )
            )
        attention = getattr(config, "_attn_implementation", "eager")
        if attention not in ("eager", None) and self.attends_apart:
            raise ValueError(
                f"The attention implementation {attention!r} has no pattern to read. "
                "Load the model with attn_implementation='eager'."
            )
        if dropout := self._active_dropout():
            raise ValueError(
                f"The model is in training mode with dropout ({dropout}), which draws new numbers "
                "at every run. Call model.eval() before the capture."
            )

    @property
    def n_ctx(self) -> int:
        config = getattr(self.model.original_model, "config", None)
        return min(self.cfg.n_ctx, getattr(config, "max_seq_len", self.cfg.n_ctx))  # MPT's own

    @property
    def act_fn(self) -> str:
        return _ACT_FNS.get(self.architecture or "") or self.cfg.act_fn

    def norm_names(self, block: Any) -> dict[str, str]:
        names = super().norm_names(block)
        if "Parallel" in type(block).__name__ and getattr(block, "ln2", None) is None:
            names["ln2"] = "ln1"  # Phi, Falcon, Cohere: both branches read through one norm
        return names

    @property
    def attends_apart(self) -> bool:
        # The other attention bridges compute softmax(QK) themselves, whatever Hugging Face would
        # do. So does boot_native's module of transformer_lens 4, with what hooks return for it.
        attn = self.model.blocks[0].attn
        made_here = getattr(attn.original_component, "accepts_pattern_fn", False)
        return type(attn).__name__ == "AttentionBridge" and not made_here

    def _active_dropout(self) -> str:
        for module in self.model.original_model.modules():
            if module.training and isinstance(module, nn.Dropout) and module.p > 0:
                return f"p = {module.p}"
        config = getattr(self.model.original_model, "config", None)
        for name in ("attention_dropout", "dropout", "layerdrop") if self.model.training else ():
            if rate := getattr(config, name, 0) or 0:
                return f"{name} = {rate}"
        return ""

    def norm_weights(self, norm: nn.Module | None) -> NormWeights | None:
        component: Any = getattr(norm, "original_component", None)
        if component is None or isinstance(component, nn.Identity):
            return None
        kind = type(component).__name__
        rms = "RMSNorm" in kind
        if not (rms or "LayerNorm" in kind):
            raise UnsupportedArchitectureError(
                refusal(f"the norm {kind}", "it is neither LayerNorm nor RMSNorm")
            )
        offset = 1.0 if rms and getattr(self.cfg, "rmsnorm_uses_offset", False) else 0.0
        w, b = getattr(component, "weight", None), getattr(component, "bias", None)
        return NormWeights(w, b, center=not rms, offset=offset)

    def block_weights(self, block: Any) -> BlockWeights:
        norm = partial(self._norm_weights_of, block)
        attn, d_head = block.attn, self.cfg.d_head
        W_V, b_V = linear_weights(attn.v)
        W_O, b_O = linear_weights(attn.o)
        return BlockWeights(
            AttentionWeights(
                W_V.unflatten(1, (-1, d_head)).transpose(0, 1),
                None if b_V is None else b_V.unflatten(0, (-1, d_head)),
                W_O.unflatten(0, (-1, d_head)),
                b_O,
            ),
            None if (mlp := getattr(block, "mlp", None)) is None else self._mlp_weights(mlp),
            norm("ln1"),
            norm("ln2") if mlp is not None else None,
            norm("ln1_post"),
            norm("ln2_post"),
            parallel="Parallel" in type(block).__name__,
        )

    def _mlp_weights(self, mlp: Any) -> MLPWeights | GatedMLPWeights:
        kind, act = type(mlp).__name__, self.activation()
        if str(self.cfg.act_fn).endswith("_ln"):
            kind = f"{kind} with {self.cfg.act_fn}"
        plain = kind in ("MLPBridge", "BloomMLPBridge")
        if not plain and kind not in ("GatedMLPBridge", "JointGateUpMLPBridge"):
            raise UnsupportedArchitectureError(
                refusal(f"the MLP {kind}", "it is neither MLPBridge nor GatedMLPBridge")
            )
        W_in, b_in = linear_weights(getattr(mlp, "in"))
        W_out, b_out = linear_weights(mlp.out)
        if plain:
            return MLPWeights(W_in, b_in, W_out, b_out, act)
        return GatedMLPWeights(*linear_weights(mlp.gate), W_in, b_in, None, W_out, b_out, act)

    def unembed_weights(self) -> UnembedWeights:
        W_U, b_U = linear_weights(self.model.unembed)
        if b_U is not None and not bool(b_U.any()):
            b_U = None  # zeros that the Bridge adds where the model has no bias
        return UnembedWeights(W_U, b_U, self.soft_cap())

    # --- Attention scores

    def recomputed_reading(self) -> RecomputedReading:
        attentions = [block.attn for block in self.model.blocks]
        kind = type(attentions[0]).__name__
        if kind not in _READINGS:
            raise NotRecomputableError.unknown(kind)
        found = _READINGS[kind](self, [attn.original_component for attn in attentions])
        keepers = [attn for attn in attentions if hasattr(attn, "_pattern")]

        def listen() -> list[Any]:
            return found.listen() + [a.register_forward_hook(_drop_pattern) for a in keepers]

        return replace(found, listen=listen)

    def query_key_weights_of(self, attn: Any) -> QueryKeyWeights:
        d_head = self.cfg.d_head
        (W_Q, b_Q), (W_K, b_K) = (
            (
                W.unflatten(1, (-1, d_head)).transpose(0, 1),
                None if b is None else b.unflatten(0, (-1, d_head)),
            )
            for W, b in (linear_weights(attn.q), linear_weights(attn.k))
        )
        return W_Q, b_Q, W_K, b_K

    def rotations(self, n_pos: int) -> Sequence[Rotation | None] | None:
        blocks, cfg = self.model.blocks, self.cfg
        if getattr(cfg, "positional_embedding_type", None) != "rotary":
            return [None] * len(blocks)
        part = blocks[0].attn.original_component
        if type(part).__name__ == "NativeAttention":
            tables = (part.rotary.cos_cached[:n_pos], part.rotary.sin_cached[:n_pos])
            return [Rotation(*tables, True)] * len(blocks)
        adjacent = bool(getattr(cfg, "rotary_adjacent_pairs", False))
        for name, module in self.model.original_model.named_modules():
            if name.rpartition(".")[2] == "rotary_emb":
                rotary = getattr(module, "original_component", module)  # no hook is to fire
                x = self.weights.unembed.W_U[:1]
                try:
                    cos, sin = rotary(x, torch.arange(n_pos, device=x.device)[None])
                except TypeError:  # one that asks for more than positions
                    return None
                if self.architecture in _HALVES_INTERLEAVED:
                    half, adjacent = cos.shape[-1] // 2, True
                    cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
                return [Rotation(cos[0], sin[0], adjacent)] * len(blocks)
        return None


def linear_weights(bridge: Any) -> tuple[Tensor, Tensor | None]:
    """A Bridge's linear module as x @ W + b."""
    # The orientation is told by the module's type, never by the shape: square weights have both.
    module = bridge.original_component
    if isinstance(module, nn.Linear):
        return module.weight.T, module.bias
    if type(module).__name__ == "Conv1D":
        return module.weight, module.bias
    raise UnsupportedArchitectureError(
        refusal(f"the linear module {type(module).__name__}", "its orientation is not known here")
    )


# --- How the scores of each component are computed ------------------------------------------------


def _rotated_by_host(adapter: BridgeAdapter, parts: list[Any]) -> RecomputedReading:
    """Queries and keys are shown normalized and rotated; the rest is in the wrapped module."""
    if getattr(parts[0], "sinks", None) is not None:
        raise NotRecomputableError(
            what="attention sinks", why="they change the scores after the last hook"
        )

    def scores(attn: Any, layer: int) -> Scores:
        window, kinds = (getattr(attn.config, n, None) for n in ("sliding_window", "layer_types"))
        local = kinds is None or kinds[layer] == "sliding_attention"
        cap = getattr(attn, "attn_logit_softcapping", None)
        return Scores(float(attn.scaling), True, cap, window if window and local else None)

    reads = ("rot_q", "rot_k")
    return RecomputedReading(reads, tuple(map(scores, parts, range(len(parts)))), reads)


def _joint_rotary(adapter: BridgeAdapter, parts: list[Any]) -> RecomputedReading:
    """Queries and keys are shown before they are rotated, beside the cosines and sines."""
    scores = (Scores(adapter.cfg.d_head**-0.5),) * len(parts)
    return RecomputedReading(("q", "k", "cos", "sin"), scores, rotate=_rotate_halves)


def _joint(adapter: BridgeAdapter, parts: list[Any]) -> RecomputedReading:
    """Nothing rotates; GPT-2 may divide the scores by the number of the layer, too."""
    by_layer = getattr(adapter.cfg, "scale_attn_by_inverse_layer_idx", False)
    scale = adapter.cfg.d_head**-0.5
    scores = (Scores(scale / (i + 1 if by_layer else 1)) for i in range(len(parts)))
    return RecomputedReading(("q", "k"), tuple(scores))


def _alibi(adapter: BridgeAdapter, parts: list[Any]) -> RecomputedReading:
    """ALiBi's slope · distance is subtracted from the scores, in the model's dtype."""
    cfg = adapter.cfg
    slopes = alibi_slopes(cfg.n_heads)
    scales = (getattr(part, "softmax_scale", cfg.d_head**-0.5) for part in parts)
    return RecomputedReading(("q", "k"), tuple(Scores(s, slopes=slopes) for s in scales))


def _bloom(adapter: BridgeAdapter, parts: list[Any]) -> RecomputedReading:
    if adapter.dtype in HALF:
        raise NotRecomputableError(
            what="BLOOM in half precision",
            why="the host rounds ALiBi's biases, which float32 would not",
        )
    return _alibi(adapter, parts)


def _native(adapter: BridgeAdapter, parts: list[Any]) -> RecomputedReading:
    """The module of ``boot_native``, which the Bridge wraps like a Hugging Face one."""
    if type(parts[0]).__name__ != "NativeAttention":
        raise NotRecomputableError.unknown("AttentionBridge")
    cap = adapter.soft_cap("attn_scores_soft_cap")
    scores = tuple(Scores(1 / part.scale, part.causal, cap) for part in parts)
    if getattr(adapter.cfg, "positional_embedding_type", None) != "rotary":
        return RecomputedReading(("q", "k"), scores)
    tables = _NativeTables(parts)
    return RecomputedReading(("q", "k"), scores, rotate=tables, listen=tables.listen)


_READINGS: dict[str, Callable[[BridgeAdapter, list[Any]], RecomputedReading]] = {
    "PositionEmbeddingsAttentionBridge": _rotated_by_host,
    "JointQKVPositionEmbeddingsAttentionBridge": _joint_rotary,
    "JointQKVAttentionBridge": _joint,
    "BloomAttentionBridge": _bloom,
    "MPTALiBiAttentionBridge": _alibi,
    "AttentionBridge": _native,
}
"""How scores are computed, by the class of the attention component."""


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's slopes (Press et al. 2022): 2^(−8 i / n), i = 1 … n, for n heads, a power of 2.

    Any other number of heads goes on, after the n of the next power below, with the odd steps of
    the series for 2n. HookedTransformer takes the first formula for every n.

    Args:
        heads: Number of query heads.

    Returns:
        One slope per query head, in scores per position.
    """
    n = 2 ** (heads.bit_length() - 1)
    exponents = [i / n for i in range(1, n + 1)] + [i / (2 * n) for i in range(1, 2 * n, 2)]
    return tuple(2 ** (-8 * e) for e in exponents[:heads])


def _rotate_halves(layer: int, read: Mapping[str, Tensor], x: Tensor) -> Tensor:
    cos, sin = read["cos"], read["sin"]  # [batch or 1, pos, rotary]
    a, b = x[..., : cos.shape[-1]].chunk(2, -1)
    return rotated(x, torch.cat((-b, a), -1), cos, sin)


class _NativeTables:
    """The native host's rotation: its own tables, at the positions it gave its attention."""

    def __init__(self, parts: list[Any]):
        self.parts, self.positions = parts, [None] * len(parts)

    def listen(self) -> list[Any]:
        def see(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.positions[layer] = kwargs.get("position_ids")

        return [
            part.register_forward_pre_hook(partial(see, layer), with_kwargs=True)
            for layer, part in enumerate(self.parts)
        ]

    def __call__(self, layer: int, read: Mapping[str, Tensor], x: Tensor) -> Tensor:
        at, rotary = self.positions[layer], self.parts[layer].rotary
        at = torch.arange(x.shape[1], device=x.device)[None] if at is None else at
        cos, sin = rotary.cos_cached[at].to(x), rotary.sin_cached[at].to(x)
        a, b = x[..., : cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
        return rotated(x, torch.stack((-b, a), -1).flatten(-2), cos, sin)


def _drop_pattern(module: Any, args: Any, output: Any) -> None:
    module._pattern = None
