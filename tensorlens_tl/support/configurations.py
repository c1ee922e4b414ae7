"""Tiny configurations of any Hugging Face class, made by one rule.

1. Take the class's own default configuration, and those nested in it.
2. Replace each size by a small one, told by the field's name. Multipliers are not 1, windows are
   narrower than a prompt, caps and norms of queries and keys are on.
3. Where the rule fails, a row in ``EXCEPTIONS`` says what to change.
"""

from __future__ import annotations

from typing import Any

import torch

from .tiny_models import D_VOCAB, find

LAYERS, HEADS, D_HEAD, D_MODEL = 2, 4, 8, 32

_SIZES: tuple[tuple[int | float, str], ...] = (
    (D_MODEL,
     "hidden_size d_model n_embd word_embed_proj_dim out_hidden_size projection_dim lru_width "
     "attention_hidden_size output_hidden_size projector_hidden_size embedding_size num_mel_bins "
     "projector_output_dim projector_input_dim"),
    (LAYERS,
     "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth "
     "num_decoder_layers num_layers_per_stack"),
    (HEADS,
     "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
     "decoder_attention_heads linear_num_value_heads index_n_heads mamba_n_heads mamba_num_heads"),
    (HEADS // 2,
     "num_key_value_heads num_kv_heads linear_num_key_heads num_global_key_value_heads"),
    (16, "head_dim global_head_dim"),
    (D_HEAD, "d_kv kv_channels v_head_dim qk_rope_head_dim linear_key_head_dim "
     "linear_value_head_dim index_head_dim rotary_dim"),
    (4, "qk_nope_head_dim"),
    (12, "qk_head_dim"),
    (8, "q_lora_rank kv_lora_rank o_lora_rank chunk_size mamba_chunk_size adapter_rank "
     "laurel_rank"),
    (48,
     "intermediate_size ffn_dim ffn_hidden_size d_ff moe_intermediate_size n_inner "
     "shared_expert_intermediate_size encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp "
     "moe_shared_expert_intermediate_size shared_intermediate_size"),
    (D_VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (64,
     "max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions "
     "max_encoder_position_embeddings max_decoder_position_embeddings max_length"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts state_size ssm_state_size "
     "mamba_d_state patch_size num_codevectors_per_group hidden_size_per_layer_input"),
    (2, "num_experts_per_tok moe_k num_experts_per_token top_k_experts"),
    (1, "first_k_dense_replace num_dense_layers n_group topk_group n_shared_experts "
     "num_shared_experts moe_num_shared_experts num_nextn_predict_layers moe_layer_start_index "
     "mamba_n_groups n_groups"),
    (3, "sliding_window attention_window_size attention_window local_radius"),
    (16, "image_size num_position_embeddings codevector_dim proj_codevector_dim "
     "num_conv_pos_embeddings"),
    (3.0, "final_logit_softcapping logits_soft_cap embedding_multiplier logits_scaling "
     "embedding_scale"),
    (5.0, "attn_logit_softcapping"),
    (5, "query_pre_attn_scalar"),
    (0.5, "residual_multiplier logit_scale lm_head_multiplier attention_out_multiplier "
     "output_multiplier"),
    (0.3, "attention_multiplier attention_in_multiplier key_multiplier"),
    (1.5, "routed_scaling_factor route_scale moe_routed_scaling_factor"),
)  # fmt: skip
SIZES = {name: value for value, names in _SIZES for name in names.split()}
"""Sizes and factors by the name of the field."""

_ON = ("use_qk_norm", "qk_layernorm", "attention_bias", "use_bias", "mlp_bias", "norm_topk_prob")
"""Options that are switched on wherever a class has them off."""

_MAY_BE_NONE = ("head_dim", "num_key_value_heads", "n_inner", "q_lora_rank", "num_experts_per_tok")
"""Sizes that are set even where a class leaves them to others."""

OLD_NAMES = {
    "BloomModel": "BloomForCausalLM",
    "Gemma1ForCausalLM": "GemmaForCausalLM",
    "GPT2LMHeadCustomModel": "GPT2LMHeadModel",
    "JetMoEForCausalLM": "JetMoeForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
    "MinGPTForCausalLM": "GPT2LMHeadModel",
    "NanoGPTForCausalLM": "GPT2LMHeadModel",
    "NeoForCausalLM": "GPTNeoForCausalLM",
    "NeoXForCausalLM": "GPTNeoXForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
}
"""Names that transformer_lens registers, and the class of transformers that they stand for."""

ELSEWHERE = {"TransformerLensPretrain": "it stands for a module of the user's own, and no class"}
"""Names for which there is no class of models, and why."""

_FLOAT32 = ("XGLMForCausalLM",)
"""Names whose Hugging Face model does not run in float64: its mask overflows."""

_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Options that this host's Bridge cannot build, or that make it another model.
    "PhiConfig": {"qk_layernorm": False},
    "Gemma3TextConfig": {"attn_logit_softcapping": None},
    # Served without these; a test tells that they are refused by name.
    "Gemma4TextConfig": {"hidden_size_per_layer_input": 0, "enable_moe_block": False},
    # Layers of every kind that the class knows.
    "BambaConfig": {"attn_layer_indices": [1]},
    "DeepseekV4Config": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 3},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "HrmTextConfig": {"num_layers_per_stack": None},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1],
                     "attention_hidden_size": 64},
    # Sizes that depend on each other, or that are lists.
    "Emu3Config": {"vocabulary_map": {"<image>": 49}},
    "Emu3VQVAEConfig": {"base_channels": 32, "hidden_size": 32, "channel_multiplier": (1,),
                        "attn_resolutions": (0,)},
    "Florence2VisionConfig": {"embed_dim": (32,) * 4, "num_heads": (4,) * 4,
                              "num_groups": (4,) * 4},
    "GlmAsrEncoderConfig": {"intermediate_size": 4 * D_MODEL},
    "Glm4vTextConfig": {"rope_parameters": _SECTIONS},
    "LEDConfig": {"attention_window": 4},
    "Qwen3VLMoeVisionConfig": {"deepstack_visual_indexes": [0]},
    "Qwen3VLVisionConfig": {"deepstack_visual_indexes": [0]},
    "Qwen2_5_VLTextConfig": {"rope_parameters": _SECTIONS},
}  # fmt: skip
"""Fields of a configuration class by its name, where the rule alone gives no model."""


def tiny_config(config_class: Any, layers: int = LAYERS) -> Any:
    """Make a tiny configuration of a class, and of those nested in it.

    Args:
        config_class: A configuration class of ``transformers``.
        layers: Number of layers; parts of a model that see or hear have one.

    Returns:
        The configuration, with attention and experts set to "eager".
    """
    default = config_class()
    given = EXCEPTIONS.get(config_class.__name__, {})
    fields = {
        name: found
        for name, value in vars(default).items()
        if (found := _tiny(default, name, value, layers)) is not None
    }
    config = config_class(**fields | given)
    config._attn_implementation = config._experts_implementation = "eager"
    return config


def _tiny(config: Any, name: str, value: Any, layers: int) -> Any:
    """The tiny value of a field, or None to leave it to the class."""
    if name in getattr(config, "sub_configs", ()):
        text = name in ("text_config", "encoder", "decoder")
        return None if value is None else tiny_config(type(value), layers if text else 1)
    if name.endswith(("_token_id", "_token_index")):
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        others = sorted(n for n in vars(config) if n.endswith(("_token_id", "_token_index")))
        return special.get(name, D_VOCAB - 1 - others.index(name))
    if isinstance(value, (list, tuple)):
        depth = getattr(config, "num_hidden_layers", None)
        kinds = [v for i, v in enumerate(value) if v not in value[:i]]
        return (kinds * layers)[:layers] if len(value) == depth else None
    if name == "head_dim" and hasattr(config, "qk_rope_head_dim"):
        return None  # it is made of others
    if name == "num_key_value_heads" and hasattr(config, "qk_rope_head_dim"):
        return HEADS  # a latent has keys of every head
    if name in ("num_hidden_layers", "depth", "encoder_layers"):
        return layers
    if name in _ON or name == "use_cache":
        return name != "use_cache"
    known = name in SIZES and not isinstance(value, (dict, bool))
    return SIZES[name] if known and (value is not None or name in _MAY_BE_NONE) else None


def hugging_face_class(name: str) -> Any:
    """The class of ``transformers`` behind a name that transformer_lens registers, or None."""
    found = find("transformers", OLD_NAMES.get(name, name))
    if found is None or name in (found.__name__, "BertLMHeadModel"):
        return found
    return type(name, (found,), {})  # the host tells models by their class's name


def model_dtype(name: str) -> torch.dtype:
    """The dtype in which a registered name is tried."""
    return torch.float32 if name in _FLOAT32 else torch.float64
