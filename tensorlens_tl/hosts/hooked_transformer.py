"""HookedTransformer and HookedEncoder of transformer_lens 2.x and 3.x.

Weight layout, attention scores, refusals; and BERT's blocks, embeddings and head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from ..checks import is_int
from ..maps import NormWeights
from ..operator import Prompts
from ..readers import (
    AttentionReader,
    HookedMixture,
    QueryKeyWeights,
    RecomputedReading,
    hooked_weights,
    norm_eps,
)
from ..refusals import NotRecomputableError, UnsupportedArchitectureError, flags_off, refusal
from ..sublayers import (
    AttentionWeights,
    BlockWeights,
    ExpertsWeights,
    GatedMLPWeights,
    HeadWeights,
    MLPWeights,
    Rotation,
    Scores,
    UnembedWeights,
)
from .adapter import Adapter
from .embedded import all_rows, rows_of

_ATTENTION = ("Attention", "GroupedQueryAttention")
_BLOCKS = ("TransformerBlock", "BertBlock")


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
        w, b = getattr(norm, "w", None), getattr(norm, "b", None)
        return NormWeights(w, b, center=kind.startswith("Layer"), eps=norm_eps(norm))

    def attention_reader(self, block: Any) -> AttentionReader:
        for module in (block, block.attn):
            kind = type(module).__name__
            if kind not in (*_BLOCKS, *_ATTENTION):
                raise UnsupportedArchitectureError(
                    refusal(f"the module {kind}", "its computation is not known here")
                )
        attn = block.attn
        # The grouped class keeps the raw weights in _W_V and repeats them in W_V.
        W_V, b_V = (attn._W_V, attn._b_V) if hasattr(attn, "_W_V") else (attn.W_V, attn.b_V)
        weights = AttentionWeights(W_V, b_V, attn.W_O, attn.b_O)
        return AttentionReader(self, block, weights)

    def block_weights(self, block: Any, attention: AttentionReader) -> BlockWeights:
        norm = self.norms_of(block)
        return BlockWeights(
            attention.weights,
            None if self.cfg.attn_only else self._mlp_weights(block.mlp),
            norm("ln1"),
            None if self.cfg.attn_only else norm("ln2"),
            norm("ln1_post"),
            norm("ln2_post"),
            parallel=bool(self.cfg.parallel_attn_mlp),
            mid_norm=norm("mid_norm"),
            post_norm=norm("post_norm"),
        )

    def mixture(self, layer: int) -> HookedMixture:
        return HookedMixture(self.model.blocks[layer].mlp)

    def _mlp_weights(self, mlp: Any) -> MLPWeights | GatedMLPWeights | ExpertsWeights:
        kind, act = type(mlp).__name__, self.activation()
        if kind == "GptOssMoE" and not hasattr(self.cfg, "use_attention_sinks"):
            why = "attention has no sinks there, so its logits are not Hugging Face's"
            remedy = "Install transformer_lens 3 or later."
            raise UnsupportedArchitectureError(
                refusal("GPT-OSS in transformer_lens 2", why, remedy)
            )
        if kind in ("MoE", "GptOssMoE"):
            return hooked_weights(mlp, act)
        ln = self.norm_weights(getattr(mlp, "ln", None))
        if kind == "MLP":
            return MLPWeights(mlp.W_in, mlp.b_in, mlp.W_out, mlp.b_out, act, ln=ln)
        if kind == "GatedMLP" and ln is None:
            # Its b_in is added after gating.
            return GatedMLPWeights(
                mlp.W_gate, None, mlp.W_in, None, mlp.b_in, mlp.W_out, mlp.b_out, act
            )
        why = "it is neither MLP, GatedMLP nor a mixture of experts"
        raise UnsupportedArchitectureError(refusal(f"the MLP {kind}", why))

    def unembed_weights(self) -> UnembedWeights:
        unembed = self.model.unembed
        return UnembedWeights(unembed.W_U, unembed.b_U, self.soft_cap())

    def recomputed_reading(self) -> RecomputedReading:
        blocks, cfg = self.model.blocks, self.cfg
        if (kind := type(blocks[0].attn).__name__) not in _ATTENTION:
            raise NotRecomputableError.unknown(kind)
        rotary = cfg.positional_embedding_type == "rotary"
        if getattr(cfg, "use_logn_attn", False):
            raise NotRecomputableError(what="use_logn_attn", why="no hook follows its scaling")
        if not rotary and getattr(cfg, "use_qk_norm", False):
            raise NotRecomputableError(
                what="use_qk_norm without rotary positions", why="no hook follows the norm"
            )
        causal = cfg.attention_dir == "causal"
        cap, slopes = self.soft_cap("attn_scores_soft_cap"), self._alibi_slopes()
        scores = tuple(
            Scores(
                scale=1 / block.attn.attn_scale,
                causal=causal,
                soft_cap=cap,
                window=cfg.window_size if causal and block.attn.attn_type == "local" else None,
                slopes=slopes,
            )
            for block in blocks
        )
        has_sinks = getattr(cfg, "use_attention_sinks", False)
        sinks = tuple(block.attn.sinks.detach().clone() for block in blocks) if has_sinks else ()
        return RecomputedReading(("rot_q", "rot_k") if rotary else ("q", "k"), scores, sinks=sinks)

    def _alibi_slopes(self) -> tuple[float, ...] | None:
        """ALiBi's slopes: this host takes 2^(−8 i / n), i = 1 … n, for any number n of heads."""
        cfg = self.cfg
        if cfg.positional_embedding_type != "alibi":
            return None
        if cfg.attention_dir != "causal":
            raise NotRecomputableError(
                what="ALiBi both ways", why="the host counts distances ahead as 0"
            )
        if getattr(cfg, "use_attention_sinks", False):
            raise NotRecomputableError(
                what="ALiBi with attention sinks",
                why="scores depend on the longest prompt that ran before",
            )
        return tuple(2 ** (-8 * (i + 1) / cfg.n_heads) for i in range(cfg.n_heads))

    def query_key_weights_of(self, attn: Any) -> QueryKeyWeights:
        # The grouped class keeps the raw weights in _W_K and repeats them in W_K.
        grouped = hasattr(attn, "_W_K")
        return attn.W_Q, attn.b_Q, *((attn._W_K, attn._b_K) if grouped else (attn.W_K, attn.b_K))

    def rotations(self, n_pos: int) -> Sequence[Rotation | None]:
        blocks, cfg = self.model.blocks, self.cfg
        if cfg.positional_embedding_type != "rotary":
            return [None] * len(blocks)
        adjacent = bool(getattr(cfg, "rotary_adjacent_pairs", False))
        tables = ((block.attn.rotary_cos, block.attn.rotary_sin) for block in blocks)
        return [Rotation(cos[:n_pos], sin[:n_pos], adjacent) for cos, sin in tables]

    # --- A run that starts from what enters block 0, such as patches of a picture

    def prepare(self, inputs: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Prompts]:
        start = kwargs.get("start_at_layer")
        if isinstance(inputs, Prompts) or not is_int(start) or start != 0:
            return super().prepare(inputs, kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "start_at_layer"}
        if wrong := sorted(rest):
            raise ValueError(
                f"{', '.join(wrong)} is not known beside start_at_layer=0. Call without it."
            )
        what = "start_at_layer=0 starts from what enters block 0"
        return {}, all_rows(rows_of(self, inputs, "The input", what))

    def run(self, inputs: Any, kwargs: Mapping[str, Any]) -> Float[Tensor, "batch pos d_vocab"]:
        start = {"start_at_layer": 0} if inputs.is_floating_point() else {}
        return super().run(inputs, {**kwargs, **start})

    def mask(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        if tokens.is_floating_point():
            return None
        given = kwargs.get("attention_mask")
        side = kwargs.get("padding_side") or getattr(self.tokenizer, "padding_side", None)
        if given is not None or side != "left":
            return given
        # With left padding this host masks pad ids in token tensors, too.
        from transformer_lens.utils import get_attention_mask

        bos = kwargs.get("prepend_bos")
        bos = self.cfg.default_prepend_bos if bos is None else bos
        return get_attention_mask(self.tokenizer, tokens, bos)


class HookedEncoderAdapter(HookedTransformerAdapter):
    """``HookedEncoder`` of transformer_lens 2.x and 3.x."""

    renamed: ClassVar[Mapping[str, str]] = {"attention_mask": "one_zero_attention_mask"}
    embed_norm_hook = "embed.ln.hook_scale"

    def check_model(self) -> None:
        flags_off(self.cfg)

    @property
    def attends_ahead(self) -> bool:
        return True

    @property
    def n_types(self) -> int:
        return len(self.model.embed.token_type_embed.W_token_type)

    def norm_names(self, block: Any) -> dict[str, str]:
        return {"mid_norm": "ln1", "post_norm": "ln2"}

    def residual_hooks(self, layer: int) -> dict[str, str]:
        # This host's sites in the middle and at the end are the sums, before their norms.
        names = {
            "resid_pre": "hook_resid_pre",
            "mid_sum": "hook_resid_mid",
            "post_sum": "hook_resid_post",
            "resid_post": "hook_normalized_resid_post",
        }
        return {read: f"blocks.{layer}.{name}" for read, name in names.items()}

    @property
    def source_hooks(self) -> dict[str, str]:
        names = {"embed": "embed", "pos_embed": "pos_embed", "type_embed": "token_type_embed"}
        return {source: f"embed.hook_{name}" for source, name in names.items()}

    def embed_norm(self) -> NormWeights | None:
        return self.norm_weights(self.model.embed.ln)

    def unembed_weights(self) -> UnembedWeights:
        head, unembed = self.model.mlm_head, self.model.unembed
        norm = cast(NormWeights, self.norm_weights(head.ln))
        weights = HeadWeights(head.W, head.b, self.activation("gelu"), norm)
        return UnembedWeights(unembed.W_U, unembed.b_U, None, weights)

    def mask(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        return kwargs.get("attention_mask")
