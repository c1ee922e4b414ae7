"""Which architectures can be frozen, and what is in the way of the others. Imports no torch.

What is in the way is found by looking at the model's own modules and configuration:

    faulty_option  what the host builds wrongly, or not at all
    obstacle       the first part of an untested architecture that no sublayer here computes
    refuse_extras  what a block adds to the residual beside attention and MLP
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

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
}
"""Architectures that the tests cover, by Hugging Face class name."""

SUPPORTED |= dict.fromkeys([
    "Gemma1ForCausalLM", "NeoForCausalLM", "NeoXForCausalLM", "MinGPTForCausalLM",
    "MPTForCausalLM", "BloomModel",
], "an old name")  # fmt: skip
SUPPORTED |= dict.fromkeys([
    "Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration", "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration", "Idefics3ForConditionalGeneration",
    "Glm4vForConditionalGeneration", "Emu3ForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration", "AudioFlamingo3ForConditionalGeneration",
    "MusicFlamingoForConditionalGeneration", "GlmAsrForConditionalGeneration",
], "a model that also sees or hears")  # fmt: skip

UNASKED = "_tensorlens_unasked"
"""Attribute of a Bridge that a call made for itself: how to unwrap it if its first run is refused.
"""

BRIDGE = "_tensorlens_bridge"
"""Attribute of a Hugging Face model that holds the Bridge around it."""

ENCODER = "_tensorlens_encoder"
"""Attribute of a model that was made around an encoder without a head: the encoder, and the module
in the head's place."""

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
_WRONG_IN_3 = (*_WRONG_IN_3, "Gemma3ForConditionalGeneration with pixel_values")
"""Architectures, or uses of them, whose Bridge of transformer_lens 3 is another model."""

_PARTS = (
    ("a state space or other recurrence", r"mamba|rwkv|recurrent|rglru|deltanet|shortconv",
     {"A_log", "time_decay"}),
    ("several residual streams", r"hyperconnection", set()),
    ("a mixture of attention heads", r"moa$", set()),
    ("attention to what an indexer chooses", r"indexer$", {"indexer"}),
    ("a gate on what attention gives", r"", {"g_proj"}),
    ("a norm before W_O or W_out", r"", {"attn_sub_norm", "ffn_sub_norm"}),
    ("a mixture of experts", r"(moe|moeblock|moelayer|experts|sparsemlp)$", {"experts"}),
    ("latent attention", r"", {"kv_a_proj_with_mqa", "kv_b_proj"}),
    ("attention to an encoder", r"", {"crossattention", "encoder_attn"}),
)  # fmt: skip
"""What may be in the way in a block: how classes end that do it, and what such modules own."""


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


def refusal(what: str, why: str, remedy: str = "") -> str:
    """Word the message that refuses something by name.

    Args:
        what: The model, or the part of one, that is refused.
        why: What keeps it from being frozen exactly.
        remedy: What to do, as a sentence; "" tells where the supported models are listed.

    Returns:
        The message, in two sentences.
    """
    listed = "Supported models are listed in docs/models.md and by python -m tensorlens_tl.support."
    return f"Cannot freeze {what} exactly: {why}. {remedy or listed}"


def adapter_at(model: Any) -> str:
    """Name of the first module of a model that holds a LoRA adapter or the like; "" for none."""
    return next((name for name, module in model.named_modules() if is_adapted(module)), "")


def is_adapted(module: Any) -> bool:
    """Whether a module wraps a linear layer and adds to it, as the layers of peft do."""
    return "base_layer" in getattr(module, "_modules", {})


def merge_first(where: str) -> str:
    """Word the refusal of an adapter that is still beside its weights.

    Args:
        where: Name of the module that holds the adapter.

    Returns:
        The message, in two sentences.
    """
    return (
        f"There is a LoRA adapter at {where}, beside the weights that are read. "
        "Merge it first: model = model.merge_and_unload()."
    )


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


def obstacle(model: Any) -> str:
    """Find the first part of a model of an untested architecture that is in the way.

    Args:
        model: A Hugging Face model, also one inside a Bridge.

    Returns:
        The part, as a noun phrase.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder and a decoder, with attention between them"
    if not _ids_enter(model):
        return "no token embedding, so its input is no token ids"
    blocks, where = _blocks(model)
    for number, block in enumerate(blocks):
        for part in _parts(block, number):
            return part
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    if outputs is None and not hasattr(model, "lm_head"):
        return "no unembedding, so its output is no logits of tokens"
    kind = type(blocks[0]).__name__ if blocks else type(model).__name__
    return f"blocks{where} that no test covers: {kind}"


def _ids_enter(model: Any) -> bool:
    try:
        return hasattr(model.get_input_embeddings(), "num_embeddings") or hasattr(
            getattr(model.get_input_embeddings(), "original_component", None), "num_embeddings"
        )
    except (AttributeError, NotImplementedError):
        return False


def _blocks(model: Any) -> tuple[list[Any], str]:
    """The model's longest list of modules of a class of their own, and its name for messages."""
    found: list[Any] = []
    where = ""
    for name, module in model.named_modules():
        if type(module).__name__ == "ModuleList" and len(module) > len(found):
            found, where = list(module), f" in {name}"
    return [getattr(block, "original_component", block) for block in found], where


def _parts(block: Any, number: int) -> Iterator[str]:
    """What is known to be in the way inside a block, in the order of ``_PARTS``."""
    for what, pattern, parts in _PARTS:
        for name, module in block.named_modules():
            kind, own = type(module).__name__, {*module._modules, *module._parameters}
            if "Bridge" in kind or "Norm" in kind:  # what a Bridge holds comes next
                continue
            gated = "g_proj" in parts and "Attention" in kind and "gate_proj" in own
            if (name and pattern and re.search(pattern, kind.lower())) or own & parts or gated:
                yield f"{what} in block {number}: {kind}"


_ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_fast",
    "gelu_bloom": "gelu_bloom",
    "quick_gelu": "quick_gelu",
    "solu": "solu",
    "solu_ln": "solu",
}
"""Activations by the hosts' names of them."""


def activation_name(act: str) -> str:
    """Name an activation as this library does.

    Args:
        act: The host's name of it.

    Returns:
        A key of :data:`tensorlens_tl.sublayers.activations.RATIOS`.

    Raises:
        UnsupportedArchitectureError: If no closed form of its gating ratio is known.
    """
    if act not in _ACTIVATIONS:
        raise UnsupportedArchitectureError(
            refusal(f"the activation {act!r}", "no closed form of act(z) / z is known for it")
        )
    return _ACTIVATIONS[act]


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


def refuse_extras(block: Any) -> None:
    """Refuse what a block adds to or makes of the residual beside attention and MLP.

    Args:
        block: The host's block.

    Raises:
        UnsupportedArchitectureError: If there is such a part; the message names it.
    """
    part = block.original_component
    scalar = getattr(part, "layer_scalar", None)
    for what, why, there in (
        (
            "per-layer inputs",
            "each multiplies a gate of the residual",
            _has(part, "per_layer_input_gate"),
        ),
        ("experts beside an MLP", "both go through one more norm", _has(part, "router")),
        (
            "layer_scalar",
            "it multiplies the residual itself",
            scalar is not None and scalar.item() != 1,
        ),
    ):
        if there:
            raise UnsupportedArchitectureError(refusal(what, why))


def _has(part: Any, name: str) -> bool:
    return getattr(part, name, None) is not None


_GATE_OF = {
    "AfmoeAttention": "sigmoid",
    "LagunaAttention": "softplus",
    "MuseGlimmerTextAttention": "sigmoid",
}
"""What makes an output gate of its logits, by Hugging Face's class of the component."""


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


def norm_eps(norm: Any) -> float | None:
    """The ε that a host's norm adds to the variance; None where it shows none."""
    norm = getattr(norm, "original_component", norm)
    found = getattr(norm, "variance_epsilon", None)
    found = getattr(norm, "eps", None) if found is None else found
    return None if found is None else float(found)
