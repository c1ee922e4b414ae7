"""Tiny random models of every family, for every class that the installed host offers.

The tests and the support table share this one list. Nothing comes from a hub. Hosts are imported
only when something is built.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch

D_VOCAB, N_CTX = 50, 32

TOL = {
    # (model dtype, host computes norms in float32): relative tolerance
    (torch.float64, False): 1e-12,
    (torch.float64, True): 1e-6,
    (torch.float32, False): 2e-6,
    (torch.float32, True): 2e-6,
}

# --- Families: configurations of tiny models ------------------------------------------------------

_BASE = {
    "n_layers": 2, "d_model": 32, "d_head": 8, "n_heads": 4, "d_mlp": 48, "n_ctx": N_CTX,
    "d_vocab": D_VOCAB, "act_fn": "gelu_new", "normalization_type": "LN",
    "device": "cpu", "seed": 0,
}  # fmt: skip
_ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8}
_LLAMA = {**_ROTARY, "normalization_type": "RMS", "act_fn": "silu", "gated_mlp": True}
_GEMMA = {**_LLAMA, "act_fn": "gelu_pytorch_tanh", "n_key_value_heads": 2}
_DOUBLE = {
    "use_normalization_before_and_after": True,
    "use_local_attn": True,
    "window_size": 3,
    "attn_types": ["global", "local"],
}
HOOKED: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-folded": {"normalization_type": "LNPre"},
    "llama": {**_LLAMA, "n_key_value_heads": 2},
    "llama-ungrouped": _LLAMA,
    "llama-folded": {**_LLAMA, "n_key_value_heads": 2, "normalization_type": "RMSPre"},
    "mistral": {**_LLAMA, "n_key_value_heads": 1, "use_local_attn": True, "window_size": 3,
                "attn_types": ["local", "local"]},
    "neox": {**_ROTARY, "act_fn": "gelu", "rotary_dim": 4, "parallel_attn_mlp": True},
    "neox-sequential": {**_ROTARY, "act_fn": "gelu", "rotary_dim": 4},
    "qwen3": {**_LLAMA, "n_key_value_heads": 2, "use_qk_norm": True},
    "gemma2": {**_GEMMA, **_DOUBLE, "output_logits_soft_cap": 3.0, "attn_scores_soft_cap": 5.0},
    "no-cap": {**_LLAMA, "output_logits_soft_cap": -1.0},
    "attn-only": {"attn_only": True, "d_mlp": None, "act_fn": None},
    "attn-only-no-norm": {"attn_only": True, "d_mlp": None, "act_fn": None,
                          "normalization_type": None},
    "no-norm": {"normalization_type": None, "act_fn": "relu"},
    "solu": {"act_fn": "solu_ln"},
    "solu-folded": {"act_fn": "solu_ln", "normalization_type": "LNPre"},
    "gelu-fast": {"act_fn": "gelu_fast"},
}  # fmt: skip
"""Arguments of HookedTransformerConfig over a common base, for families that the tests cover."""

_OTHER_HOOKED: dict[str, dict[str, Any]] = {
    "shortformer": {"positional_embedding_type": "shortformer"},
    # The loader knows these sizes by hub name only, so they cannot be had from a small config.
    "gemma": {**_GEMMA, "original_architecture": "GemmaForCausalLM"},
    "gemma3": {**_GEMMA, **_DOUBLE, "use_qk_norm": True,
               "original_architecture": "Gemma3ForCausalLM"},
    "olmo": {**_LLAMA, "normalization_type": "LN", "original_architecture": "OlmoForCausalLM"},
    "olmo2": {**_LLAMA, "original_architecture": "Olmo2ForCausalLM"},
}  # fmt: skip

_HF = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": D_VOCAB, "max_position_embeddings": N_CTX, "rms_norm_eps": 1e-5,
}  # fmt: skip
_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
_GQA = {**_HF, "num_key_value_heads": 2, "tie_word_embeddings": False}
BRIDGE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": N_CTX,
                      "n_ctx": N_CTX, "vocab_size": D_VOCAB}),
    "llama": ("Llama", _GQA),
    "mistral": ("Mistral", {**_GQA, "sliding_window": 3}),
    "neox": ("GPTNeoX", _HF),
    "neox-sequential": ("GPTNeoX", {**_HF, "use_parallel_residual": False}),
    "qwen2": ("Qwen2", _GQA),
    "qwen3": ("Qwen3", {**_GQA, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_GQA, "head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8,
                          **_CAPS}),
}  # fmt: skip
"""Class name of Hugging Face (less the head) and arguments of its configuration, for Bridges."""

_GQA_8 = {**_GQA, "head_dim": 8}
_MOE = {**_GQA, "num_experts_per_tok": 2}
_EMBD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": N_CTX, "vocab_size": D_VOCAB}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
    "linear_value_head_dim": 5, "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "attention_bias": True, "tie_word_embeddings": False,
}  # fmt: skip
MORE_BRIDGE: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": ("Phi", _HF),
    "phi3": ("Phi3", {**_GQA, "pad_token_id": 0}),
    "falcon": ("Falcon", _HF),
    "cohere": ("Cohere", _GQA),
    "gemma": ("Gemma", {**_GQA, "head_dim": 8}),
    "gemma3": ("Gemma3", {**_GQA, "head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8,
                          "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo": ("Olmo", _GQA),
    "olmo2": ("Olmo2", _GQA),
    "olmo3": ("Olmo3", _GQA),
    "stablelm": ("StableLm", _GQA),
    "starcoder2": ("Starcoder2", _GQA),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": D_VOCAB,
                    "max_seq_len": N_CTX}),
    "gptj": ("GPTJ", {**_EMBD, "rotary_dim": 4}),
    "gpt-neo": ("GPTNeo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 3,
                           "attention_types": [[["global", "local"], 1]], "vocab_size": D_VOCAB,
                           "max_position_embeddings": N_CTX}),
    "opt": ("OPT", {**_HF, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": D_VOCAB}),
    "gpt-bigcode": ("GPTBigCode", _EMBD),
    "codegen": ("CodeGen", {**_EMBD, "rotary_dim": 4, "n_ctx": N_CTX}),
    "smollm3": ("SmolLM3", {**_GQA, "pad_token_id": 0, "no_rope_layer_interval": 2}),
    "seed-oss": ("SeedOss", _GQA_8),
    "ministral3": ("Ministral3", _GQA_8),
    "ernie4.5": ("Ernie4_5", _GQA_8),
    "glm": ("Glm", {**_GQA_8, "pad_token_id": 0}),
    "glm4": ("Glm4", {**_GQA_8, "pad_token_id": 0}),
    "arcee": ("Arcee", _GQA),
    "jais2": ("Jais2", _GQA),
    "vaultgemma": ("VaultGemma", {**_GQA_8, "sliding_window": 3, "query_pre_attn_scalar": 8,
                                  **_CAPS}),
    "cohere2": ("Cohere2", {**_GQA_8, "sliding_window": 3}),
    "youtu": ("Youtu", {**_HF, **_LATENT}),
    "qwen3.5": ("Qwen3_5", {**_GQA_8, **_DELTA}),
    "olmo-hybrid": ("OlmoHybrid", {**_GQA, **_DELTA, "linear_num_key_heads": 4,
                                   "linear_allow_neg_eigval": True, "pad_token_id": 0}),
}  # fmt: skip
"""The same, for families whose blocks have a shape of those above."""

_OTHER_BRIDGE: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("Granite", _GQA),
    "mixtral": ("Mixtral", {**_MOE, "num_local_experts": 4}),
    "olmoe": ("Olmoe", {**_MOE, "num_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**_MOE, "head_dim": 8, "moe_intermediate_size": 16,
                               "num_experts": 4}),
    "gpt-oss": ("GptOss", {**_MOE, "head_dim": 8, "num_local_experts": 4, "sliding_window": 3}),
    "deepseek-v2": ("DeepseekV2", {**_MOE, "num_key_value_heads": 4, "n_routed_experts": 4,
                                   "kv_lora_rank": 8,
                                   "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
                                   "v_head_dim": 8, "moe_intermediate_size": 16,
                                   "first_k_dense_replace": 1}),
    "bert": ("Bert", _HF),
    "t5": ("T5", {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2,
                  "vocab_size": D_VOCAB, "n_positions": N_CTX, "decoder_start_token_id": 0}),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": D_VOCAB,
                        "state_size": 4}),
}  # fmt: skip
_ROWS = {**BRIDGE, **MORE_BRIDGE, **_OTHER_BRIDGE}
_HEADS = {"GPT2": "LMHeadModel", "Bert": "ForMaskedLM", "T5": "ForConditionalGeneration"}

NATIVE = {
    name: HOOKED[name]
    for name in (
        "gpt2",
        "gpt2-folded",
        "llama",
        "neox",
        "no-norm",
        "attn-only",
        "attn-only-no-norm",
    )
}
COMPAT = {"gpt2", "llama", "neox", "gemma2"}  # one of every block shape, in compatibility mode too
FLOAT32_NORMS = {
    "granite",
    "mixtral",
    "olmoe",
    "qwen3-moe",
    "gpt-oss",
    "deepseek-v2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma",
    "gemma3",
    "phi3",
    "olmo",
    "olmo2",
    "olmo3",
    "smollm3",
    "seed-oss",
    "ministral3",
    "ernie4.5",
    "glm",
    "glm4",
    "arcee",
    "vaultgemma",
    "youtu",
    "qwen3.5",
    "olmo-hybrid",
}

_HOOKED_CLASS = {"bert": "HookedEncoder", "t5": "HookedEncoderDecoder"}  # else HookedTransformer
_NATIVE_LACKS = {
    "use_qk_norm",
    "use_local_attn",
    "use_normalization_before_and_after",
    "original_architecture",
}
"""Options that boot_native would ignore without an error."""

FAMILIES = {
    "gpt2": "GPT-2", "gpt2-folded": "GPT-2, norms folded", "gelu-fast": "GPT-2, gelu_fast",
    "llama": "Llama", "llama-ungrouped": "Llama, ungrouped", "llama-folded": "Llama, norms folded",
    "no-cap": "Llama, soft cap −1", "mistral": "Mistral", "neox": "GPT-NeoX/Pythia",
    "neox-sequential": "GPT-NeoX, sequential", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "gemma2": "Gemma-2", "attn-only": "Attention-only",
    "attn-only-no-norm": "Attention-only, no norms", "no-norm": "No norms", "solu": "SoLU",
    "solu-folded": "SoLU, norms folded", "shortformer": "Shortformer", "gemma": "Gemma",
    "gemma3": "Gemma-3", "opt": "OPT", "gptj": "GPT-J", "gpt-neo": "GPT-Neo", "bloom": "BLOOM",
    "phi": "Phi", "phi3": "Phi-3", "falcon": "Falcon", "cohere": "Cohere", "olmo": "OLMo",
    "olmo2": "OLMo-2", "olmo3": "OLMo-3", "granite": "Granite", "stablelm": "StableLM",
    "starcoder2": "StarCoder2", "mpt": "MPT",
    "gpt-bigcode": "GPTBigCode", "codegen": "CodeGen", "smollm3": "SmolLM3", "seed-oss": "Seed-OSS",
    "ministral3": "Ministral-3", "ernie4.5": "ERNIE-4.5", "glm": "GLM", "glm4": "GLM-4",
    "arcee": "Arcee", "jais2": "Jais-2", "vaultgemma": "VaultGemma", "cohere2": "Cohere-2",
    "youtu": "Youtu", "qwen3.5": "Qwen3.5", "olmo-hybrid": "OLMo-Hybrid",
    "mixtral": "Mixtral", "olmoe": "OLMoE",
    "qwen3-moe": "Qwen3-MoE", "gpt-oss": "GPT-OSS", "deepseek-v2": "DeepSeek-V2", "bert": "BERT",
    "t5": "T5", "mamba": "Mamba",
}  # fmt: skip
"""Names of all families for people, in the order of the table's rows."""


RECURRENCE = 1e-5
"""Relative tolerance where the host runs a delta rule in float32, in chunks; its rounding grows."""


def tolerance_of(family: str, host_class: str) -> float:
    """The relative tolerance of a family in float64, by what its host computes in float32."""
    if family == "qwen3.5":
        return RECURRENCE
    return TOL[torch.float64, norms_in_float32(family, host_class)]


def norms_in_float32(family: str, host_class: str) -> bool:
    """Tell whether this host class computes the family's norms in float32, whatever the dtype."""
    rms = HOOKED.get(family, {}).get("normalization_type") == "RMS"
    return host_class != "HookedTransformer" and (rms or family in FLOAT32_NORMS)


# --- Builders -------------------------------------------------------------------------------------


def find(module: str, name: str) -> Any:
    """Import an attribute of a host's module, or give None where the host has none."""
    try:
        return getattr(import_module(module), name)  # transformer_lens 4 raises ImportErrors here
    except (ImportError, AttributeError):
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what hosts print, log and warn while they load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Randomize every parameter, with biases and norm weights away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        scalars = [(n, b) for n, b in model.named_buffers() if n.endswith("layer_scalar")]
        for name, p in (*model.named_parameters(), *scalars):
            scale = 0.5 if p.ndim == 1 or ".b_" in name else 1.5 * p.shape[-2] ** -0.5
            noise = scale * torch.randn(
                p.shape, generator=generator, device="cpu", dtype=torch.float64
            ).to(p)
            p.copy_(p + noise if p.ndim == 1 else noise)


def build_hooked(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build a HookedTransformer from a row of :data:`HOOKED`."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = {k: v for k, v in {**_BASE, **config}.items() if v is not None or "norm" in k}
    model = HookedTransformer(HookedTransformerConfig(**config, dtype=dtype))
    randomize(model)
    return model.eval()


def build_native(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build a Bridge by ``boot_native`` from a row of :data:`HOOKED`."""
    config = {k: v for k, v in {**_BASE, **config}.items() if k not in ("d_mlp", "act_fn") or v}
    cfg = find("transformer_lens.config", "TransformerBridgeConfig")(**config)
    bridge = find("transformer_lens.model_bridge", "TransformerBridge")
    model = bridge.boot_native(cfg, dtype=dtype)
    randomize(model)
    return model.eval()


def hf_config(class_name: str, config: Mapping[str, Any]) -> Any:
    """Build the configuration of a row of :data:`BRIDGE`; None where there is no such class."""
    text = find("transformers", f"{class_name}TextConfig")  # the part of a model that also sees
    cls = text or find("transformers", f"{class_name}Config")
    if cls is None:
        return None
    cfg = cls(**config)
    cfg._attn_implementation = cfg._experts_implementation = "eager"
    cfg.architectures = [class_name + _HEADS.get(class_name, "ForCausalLM")]
    return cfg


def build_hf(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build the Hugging Face model of a row of :data:`BRIDGE`."""
    cfg = hf_config(class_name, config)
    torch.manual_seed(0)
    model = find("transformers", cfg.architectures[0])(cfg).to(dtype).eval()
    randomize(model)
    return model


def hugging_face_logits(name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits of the Hugging Face model that a family's Bridge is built around.

    Args:
        name: Name of the family.
        ids: Token ids [batch, pos].
        dtype: Dtype of the model.

    Returns:
        The logits [batch, pos, d_vocab] of the model, which no host has touched.
    """
    with torch.no_grad():
        return build_hf(*_ROWS[name], dtype)(ids).logits


def to_bridge(hf: Any, tokenizer: Any = None) -> Any:
    """A Hugging Face model as a Bridge, without asking the hub."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, tokenizer=tokenizer)


def build_bridge(
    class_name: str, config: Mapping[str, Any], dtype: torch.dtype, compat: bool = False
) -> Any:
    """Build a Bridge from a row of :data:`BRIDGE`."""
    bridge = to_bridge(build_hf(class_name, config, dtype))
    if compat:
        bridge.enable_compatibility_mode()
        bridge.original_model.to(dtype)  # folded value biases come out in float32 (Qwen2)
    return bridge


def _hooked_from_hf(name: str, dtype: torch.dtype) -> Any:
    """Build a HookedTransformer from a Hugging Face configuration, by the host's own loader."""
    cfg = hf_config(*_ROWS[name])
    if cfg is None:
        return None
    loader = import_module("transformer_lens.loading_from_pretrained")
    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:  # the loader wants a folder
        cfg.save_pretrained(folder)
        try:
            config = loader.get_pretrained_model_config(folder, device="cpu", dtype=dtype)
        except NotImplementedError:
            return None
    config.tokenizer_name = None
    model = find("transformer_lens", _HOOKED_CLASS.get(name, "HookedTransformer"))(config)
    randomize(model.to(dtype))  # a mixture's experts come in float32
    return model.eval()


def hooked_offered(name: str) -> bool:
    """Tell whether the installed host can build a HookedTransformer from a row of ours."""
    config = {**HOOKED, **_OTHER_HOOKED}.get(name)
    if config is None or find("transformer_lens", "HookedTransformer") is None:
        return False
    known = inspect.getsource(import_module("transformer_lens.loading_from_pretrained"))
    return config.get("original_architecture", "") in known


def hooked_model(name: str, dtype: torch.dtype) -> Any:
    """Build a HookedTransformer of a family, or give None where the host has none."""
    config = {**HOOKED, **_OTHER_HOOKED}.get(name)
    if config is None:
        return _hooked_from_hf(name, dtype)
    return build_hooked(config, dtype) if hooked_offered(name) else None


def bridge_offered(name: str) -> bool:
    """Tell whether the installed host can build Bridges of a family."""
    factory = "transformer_lens.factories.architecture_adapter_factory"
    known = find(factory, "SUPPORTED_ARCHITECTURES")
    cfg = hf_config(*_ROWS.get(name, ("", {})))
    return cfg is not None and known is not None and cfg.architectures[0] in known


def _bridge(name: str, dtype: torch.dtype, compat: bool = False) -> Any:
    if not bridge_offered(name):
        return None
    return build_bridge(*_ROWS[name], dtype, compat)


def _native(name: str, dtype: torch.dtype) -> Any:
    config = {**HOOKED, **_OTHER_HOOKED}.get(name)
    return None if config is None or config.keys() & _NATIVE_LACKS else build_native(config, dtype)


def host_classes() -> dict[str, Any]:
    """List the classes that the installed host offers.

    Returns:
        Builders by class. A builder takes a family and a dtype, and gives a model, or None where
        the class has no such family.
    """
    found: dict[str, Any] = {}
    if find("transformer_lens", "HookedTransformer") is not None:
        found["HookedTransformer"] = hooked_model
    bridge = find("transformer_lens.model_bridge", "TransformerBridge")
    if bridge is not None:
        found["Bridge"] = _bridge
        found["Bridge, compatibility mode"] = lambda name, dtype: _bridge(name, dtype, True)
    if hasattr(bridge, "boot_native"):
        found["boot_native"] = _native
    return found
