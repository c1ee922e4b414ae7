"""The two classes of hosts: their weight layouts, what they refuse, ways to run."""

from __future__ import annotations

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
from .supported import SUPPORTED, UnsupportedArchitectureError, refusal

_ACT_FNS = {"FalconForCausalLM": "gelu", "MptForCausalLM": "gelu", "BloomForCausalLM": "gelu_bloom"}
"""What these compute whatever their Bridge's config says (the self-check would tell)."""


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
                f"cannot freeze {self.architecture} as it is: its logits are scaled after the "
                "unembedding; call model.enable_compatibility_mode() first, which folds that in"
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
                f"attention implementation {attention!r} has no pattern to read, expected 'eager': "
                "load the model with attn_implementation='eager'"
            )
        if dropout := self._active_dropout():
            raise ValueError(
                f"the model is in training mode with dropout ({dropout}), expected evaluation mode: "
                "call model.eval()"
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
        # The other attention bridges compute softmax(QK) themselves, whatever Hugging Face would do;
        # so does boot_native's module of transformer_lens 4, with what hooks return for the pattern.
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
