"""Which architectures can be frozen, and the refusal of what cannot. Imports no torch."""

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
    """A model, or a part of one, cannot be frozen exactly; the message names it.

    Example:
        >>> import torch, tensorlens_tl
        >>> try:
        ...     tensorlens_tl.capture(torch.nn.Linear(2, 2), [1, 2])
        ... except tensorlens_tl.UnsupportedArchitectureError as error:
        ...     print(error)
        model is a Linear, which is neither a HookedTransformer nor a TransformerBridge. ...
    """


def refusal(what: str, why: str) -> str:
    """Word the message that refuses something by name.

    Args:
        what: The model, or the part of one, that is refused.
        why: What keeps it from being frozen exactly.

    Returns:
        The message, in two sentences.
    """
    return (
        f"Cannot freeze {what} exactly: {why}. "
        "Supported models are listed in docs/models.md and by python -m tensorlens_tl.support."
    )


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
