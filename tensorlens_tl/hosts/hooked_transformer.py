"""HookedTransformer of transformer_lens 2.x and 3.x: its weight layout, what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..sublayers import (
    AttentionWeights,
    BlockWeights,
    GatedMLPWeights,
    MLPWeights,
    NormWeights,
    UnembedWeights,
)
from .adapter import Adapter, flags_off
from .supported import UnsupportedArchitectureError, refusal


class HookedTransformerAdapter(Adapter):
    """``HookedTransformer`` of transformer_lens 2.x and 3.x."""

    def check_model(self) -> None:
        flags_off(self.cfg)
        kind = self.cfg.positional_embedding_type
        if kind not in ("standard", "rotary", "alibi"):
            raise UnsupportedArchitectureError(
                refusal(f"{kind!r} positions", "only standard, rotary and ALiBi ones are tested")
            )

    def norm_weights(self, norm: nn.Module | None) -> NormWeights | None:
        kind = type(norm).__name__
        if norm is None or kind == "Identity":
            return None
        if kind not in ("LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"):
            raise UnsupportedArchitectureError(
                refusal(f"the norm {kind}", "it is neither LayerNorm nor RMSNorm")
            )
        return NormWeights(
            getattr(norm, "w", None), getattr(norm, "b", None), center=kind.startswith("Layer")
        )

    def block_weights(self, block: Any) -> BlockWeights:
        for module in (block, block.attn):
            kind = type(module).__name__
            if kind not in ("TransformerBlock", "Attention", "GroupedQueryAttention"):
                raise UnsupportedArchitectureError(
                    refusal(f"the module {kind}", "its computation is not known here")
                )
        norm, attn = partial(self._norm_weights_of, block), block.attn
        # The grouped class keeps the raw weights in _W_V and repeats them in W_V.
        W_V, b_V = (attn._W_V, attn._b_V) if hasattr(attn, "_W_V") else (attn.W_V, attn.b_V)
        return BlockWeights(
            AttentionWeights(W_V, b_V, attn.W_O, attn.b_O),
            None if self.cfg.attn_only else self._mlp_weights(block.mlp),
            norm("ln1"),
            None if self.cfg.attn_only else norm("ln2"),
            norm("ln1_post"),
            norm("ln2_post"),
            parallel=bool(self.cfg.parallel_attn_mlp),
        )

    def _mlp_weights(self, mlp: Any) -> MLPWeights | GatedMLPWeights:
        kind, act = type(mlp).__name__, self.activation()
        ln = self.norm_weights(getattr(mlp, "ln", None))
        if kind == "MLP":
            return MLPWeights(mlp.W_in, mlp.b_in, mlp.W_out, mlp.b_out, act, ln=ln)
        if kind == "GatedMLP" and ln is None:
            # Its b_in is added after gating.
            return GatedMLPWeights(
                mlp.W_gate, None, mlp.W_in, None, mlp.b_in, mlp.W_out, mlp.b_out, act
            )
        raise UnsupportedArchitectureError(
            refusal(f"the MLP {kind}", "it is neither MLP nor GatedMLP")
        )

    def unembed_weights(self) -> UnembedWeights:
        unembed = self.model.unembed
        return UnembedWeights(unembed.W_U, unembed.b_U, self.soft_cap())

    def mask(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        given = kwargs.get("attention_mask")
        side = kwargs.get("padding_side") or getattr(self.tokenizer, "padding_side", None)
        if given is not None or side != "left":
            return given
        # With left padding this host masks pad ids in token tensors, too.
        from transformer_lens.utils import get_attention_mask

        bos = kwargs.get("prepend_bos")
        bos = self.cfg.default_prepend_bos if bos is None else bos
        return get_attention_mask(self.tokenizer, tokens, bos)
