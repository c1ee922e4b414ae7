"""Which architectures can be frozen, and which options or versions of a host are in the way."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from .errors import UnsupportedArchitectureError, refusal
from .obstacles import adapter_at, merge_first, obstacle

SUPPORTED = {
    "GPT2LMHeadModel": "GPT-2",
    "LlamaForCausalLM": "Llama",
    "MistralForCausalLM": "Mistral",
    "GPTNeoXForCausalLM": "GPT-NeoX/Pythia",
    "Qwen2ForCausalLM": "Qwen2",
    "Qwen3ForCausalLM": "Qwen3",
    "GemmaForCausalLM": "Gemma",
    "Gemma2ForCausalLM": "Gemma-2",
    "Gemma3ForCausalLM": "Gemma-3",
    "PhiForCausalLM": "Phi",
    "Phi3ForCausalLM": "Phi-3",
    "FalconForCausalLM": "Falcon",
    "CohereForCausalLM": "Cohere",
    "OlmoForCausalLM": "OLMo",
    "Olmo2ForCausalLM": "OLMo-2",
    "Olmo3ForCausalLM": "OLMo-3",
    "StableLmForCausalLM": "StableLM",
    "Starcoder2ForCausalLM": "StarCoder2",
    "MptForCausalLM": "MPT",
    "GPTJForCausalLM": "GPT-J",
    "GPTNeoForCausalLM": "GPT-Neo",
    "OPTForCausalLM": "OPT",
    "BloomForCausalLM": "BLOOM",
    "GPTBigCodeForCausalLM": "GPTBigCode",
    "CodeGenForCausalLM": "CodeGen",
    "SmolLM3ForCausalLM": "SmolLM3",
    "SeedOssForCausalLM": "Seed-OSS",
    "Ministral3ForCausalLM": "Ministral-3",
    "Ernie4_5ForCausalLM": "ERNIE-4.5",
    "GlmForCausalLM": "GLM",
    "Glm4ForCausalLM": "GLM-4",
    "ArceeForCausalLM": "Arcee",
    "Jais2ForCausalLM": "Jais-2",
    "VaultGemmaForCausalLM": "VaultGemma",
    "Cohere2ForCausalLM": "Cohere-2",
    "ViTForImageClassification": "ViT",
    "ViTModel": "ViT",
    "DeiTForImageClassification": "DeiT",
    "DeiTModel": "DeiT",
    "ASTForAudioClassification": "AST",
    "YoutuForCausalLM": "Youtu",
    "MixtralForCausalLM": "Mixtral",
    "Qwen2MoeForCausalLM": "Qwen2-MoE",
    "Qwen3MoeForCausalLM": "Qwen3-MoE",
    "OlmoeForCausalLM": "OLMoE",
    "FlexOlmoForCausalLM": "FlexOlmo",
    "GptOssForCausalLM": "GPT-OSS",
    "Glm4MoeForCausalLM": "GLM-4.5",
    "Ernie4_5_MoeForCausalLM": "ERNIE-4.5-MoE",
    "MiniMaxM2ForCausalLM": "MiniMax-M2",
    "PhiMoEForCausalLM": "Phi-MoE",
    "Llama4ForCausalLM": "Llama-4",
    "GraniteForCausalLM": "Granite",
    "XGLMForCausalLM": "XGLM",
    "NanoChatForCausalLM": "NanoChat",
    "BertForMaskedLM": "BERT",
    "BertLMHeadModel": "BERT",
    "RobertaForMaskedLM": "RoBERTa",
    "Qwen3_5ForCausalLM": "Qwen3.5",
    "Qwen3_5ForConditionalGeneration": "Qwen3.5",
    "Qwen3_5MoeForCausalLM": "Qwen3.5-MoE",
    "Qwen3NextForCausalLM": "Qwen3-Next",
    "OlmoHybridForCausalLM": "OLMo-Hybrid",
    "AfmoeForCausalLM": "AFMoE",
    "LagunaForCausalLM": "Laguna",
    "Gemma4ForCausalLM": "Gemma-4",
    "Gemma4ForConditionalGeneration": "Gemma-4",
    "Gemma4UnifiedForConditionalGeneration": "Gemma-4",
    "MuseGlimmerForConditionalGeneration": "Muse Glimmer",
    "BitNetForCausalLM": "BitNet",
    "TransformerLensNative": "TransformerBridge.boot_native",
    "DeepseekV2ForCausalLM": "DeepSeek-V2",
    "DeepseekV3ForCausalLM": "DeepSeek-V3",
    "Glm4MoeLiteForCausalLM": "GLM-4-MoE-Lite",
    "Llama4ForConditionalGeneration": "Llama-4 with pictures",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3-VL-MoE",
    "GraniteMoeForCausalLM": "Granite-MoE",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3.5-MoE with pictures",
    "Exaone4ForCausalLM": "EXAONE-4",
    "HunYuanDenseV1ForCausalLM": "HunYuan",
    "GPT2LMHeadCustomModel": "GPT-2, custom",
    "NanoGPTForCausalLM": "nanoGPT",
    "NemotronForCausalLM": "Nemotron",
    "ApertusForCausalLM": "Apertus",
    "OpenAIGPTLMHeadModel": "GPT-1",
    "ModernBertDecoderForCausalLM": "ModernBERT decoder",
}
"""Architectures that the tests cover, by Hugging Face class name."""

_OLD, _SEES = "an old name", "a model that also sees or hears"
SUPPORTED |= dict.fromkeys([
    "Gemma1ForCausalLM", "NeoForCausalLM", "NeoXForCausalLM", "MinGPTForCausalLM",
    "MPTForCausalLM", "BloomModel",
], _OLD)  # fmt: skip
SUPPORTED |= dict.fromkeys([
    "Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration", "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration", "Idefics3ForConditionalGeneration",
    "Glm4vForConditionalGeneration", "Emu3ForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration", "AudioFlamingo3ForConditionalGeneration",
    "MusicFlamingoForConditionalGeneration", "GlmAsrForConditionalGeneration",
], _SEES)  # fmt: skip


def family(name: str) -> str:
    """The family of an architecture; "" where the name is an old one of another architecture."""
    found = SUPPORTED.get(name, name)
    return {_OLD: "", _SEES: name}.get(found, found)


_FAULTY = {
    ("GPT2LMHeadModel", "scale_attn_weights"): False,
    ("GPTBigCodeForCausalLM", "scale_attn_weights"): False,
    ("GPTBigCodeForCausalLM", "multi_query"): False,
    ("GPTNeoXForCausalLM", "attention_bias"): False,
    ("FalconForCausalLM", "new_decoder_architecture"): True,
    ("OPTForCausalLM", "_remove_final_layer_norm"): True,
}
"""Values of options under which the host's Bridge is another model, or none."""

_WRONG_IN_3 = ("CohereForCausalLM", "Cohere2ForCausalLM", "HunYuanDenseV1ForCausalLM")
"""Architectures whose Bridge of transformer_lens 3 is another model."""


_UNSEEN_IN_3 = (
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen3NextForCausalLM",
    "OlmoHybridForCausalLM",
)
"""Architectures whose gated delta nets the Bridge of transformer_lens 3 does not show."""


def faulty_option(architecture: str | None, config: Any) -> tuple[str, str]:
    """Name what the installed host is known to build wrongly.

    Args:
        architecture: Hugging Face's name of the model's class.
        config: Hugging Face's configuration of the model.

    Returns:
        The model's name and what it is with, such as an option and its value; and the remedy, or
        "". The name alone if nothing is known.
    """
    found = remedy = ""
    for (name, option), value in _FAULTY.items():
        if name == architecture and getattr(config, option, None) is value:
            found = f"{option}={value}"
    if architecture == "Gemma3ForCausalLM" and getattr(config, "attn_logit_softcapping", None):
        found = f"attn_logit_softcapping={config.attn_logit_softcapping}"
    if architecture == "BloomForCausalLM" and config.slow_but_exact and config.pretraining_tp > 1:
        found = f"slow_but_exact=True and pretraining_tp={config.pretraining_tp}"
    if architecture in _WRONG_IN_3 and _version() < (4,):
        found, remedy = "transformer_lens 3", "Install transformer_lens 4."
    if architecture == "CodeGenForCausalLM" and _version("transformers") >= (5, 24):
        found, remedy = "transformers 5.24 or later", "Install an earlier one: transformers<5.24."
    return f"{architecture} with {found}" if found else f"{architecture}", remedy


def _version(package: str = "transformer_lens") -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", metadata.version(package))[:2])


def check_architecture(name: str | None, model: Any) -> None:
    """Refuse an untested architecture, and options of a tested one that change its shape.

    Args:
        name: Hugging Face's name of the model's class.
        model: The Hugging Face model.

    Raises:
        UnsupportedArchitectureError: The message names what is in the way.
    """
    if hasattr(model, "merge_and_unload"):
        raise UnsupportedArchitectureError(merge_first(adapter_at(model) or type(model).__name__))
    if name not in SUPPORTED:
        raise UnsupportedArchitectureError(refusal(f"{name}", f"it has {obstacle(model)}"))
    if name in _UNSEEN_IN_3 and _version() < (4,):
        what, why = f"{name} with transformer_lens 3", "its Bridge shows no gated delta net"
        raise UnsupportedArchitectureError(refusal(what, why, "Install transformer_lens 4."))
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if not getattr(config, "do_layer_norm_before", True) or (
        getattr(config, "word_embed_proj_dim", width) != width
    ):
        why = "its norms stand on the stream itself, or its embeddings are projected"
        raise UnsupportedArchitectureError(refusal(f"{name} built like opt-350m", why))
    option = "apply_residual_connection_post_layernorm"
    if getattr(config, option, False):
        why = "its blocks add to the normalized residual"
        raise UnsupportedArchitectureError(refusal(f"{name} with {option}", why))


def flags_off(cfg: object) -> None:
    """Refuse the flags under which every head has its own norm.

    Args:
        cfg: Configuration of the host model.

    Raises:
        ValueError: If one of the flags is on.
    """
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(cfg, flag, False):
            raise ValueError(
                f"cfg.{flag} is on, which gives every head its own norm. "
                f"Call model.set_{flag}(False) before the capture."
            )
