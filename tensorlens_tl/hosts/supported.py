"""What can be frozen, the refusal of what cannot, and what counts as a whole number. No torch."""

from __future__ import annotations

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
    "TransformerLensNative": "TransformerBridge.boot_native",
}
"""Architectures that the tests cover, by Hugging Face class name."""


class UnsupportedArchitectureError(ValueError):
    """A model, or a part of one, that cannot be frozen exactly; the message names it."""


def refusal(what: str, why: str) -> str:
    """The message that refuses something by name.

    Args:
        what: A model or a part of one.
        why: What keeps it from being frozen.

    Returns:
        The message; it lists what is supported.
    """
    return (
        f"cannot freeze {what} exactly: {why}. Supported: {', '.join(SUPPORTED)}, as "
        "HookedTransformer or TransformerBridge"
    )
