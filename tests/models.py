"""Tiny models of every family, for every class the installed host offers, and captures of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tensorlens_tl
from tensorlens_tl.lens.tensor_lens import TensorLens
from tensorlens_tl.support.every_name import tiny_model
from tensorlens_tl.support.tiny_models import (
    BRIDGE,
    COMPAT,
    D_VOCAB,
    FLOAT32_NORMS,
    HOOKED,
    MORE_BRIDGE,
    N_CTX,
    NATIVE,
    TOL,
    bridge_offered,
    build_bridge,
    build_hf,
    build_hooked,
    build_native,
    find,
    hooked_model,
    hooked_offered,
    quiet,
    randomize,
    to_bridge,
)

try:
    from transformer_lens import HookedTransformer
except ImportError:  # transformer_lens 4
    HookedTransformer = None
try:
    from transformer_lens import HookedEncoder, HookedTransformerConfig
except ImportError:  # transformer_lens 4
    HookedEncoder = None
try:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
except ImportError:  # transformer_lens 2
    build_bridge_from_module = None

try:
    from transformer_lens import TransformerBridge, TransformerBridgeConfig
except ImportError:  # before transformer_lens 4; 3.9's boot_native passes over edited patterns
    TransformerBridgeConfig = None

TOLERANCES = {
    # what is compared, relative to the largest value: (float64 throughout, norms in float32)
    "products": (1e-13, 5e-6),  # the self-check's random projections
    "run": (1e-12, 1e-6),  # the operator with the run it is of; other dtypes are in TOL
    "padded": (1e-12, 1e-4),  # prompts in a padded batch with themselves alone, by all methods
    "oracle": (1e-10, 1e-6),  # another way to compute the same
    "padded gradient": (1e-10, 1e-4),  # padded batches of methods that differentiate the model
    "ratio": (1e-10, 1e-5),  # quotients of differences
    "two runs": (1e-9, 1e-5),  # sums over differences of two runs
    "gradient of two runs": (1e-8, 1e-5),  # against autograd through a path between two runs
    "slope": (1e-6, 1e-3),  # finite differences
}
"""Relative tolerances by what limits a comparison. Tests that meet a host use ``case.within``."""
ROUNDING, ORACLE, TWO_RUNS, GRADIENT = (
    TOLERANCES[compared][0] for compared in ("run", "oracle", "two runs", "gradient of two runs")
)
"""Those of float64, for tests of the library's own algebra."""

_BASE_CONFIG = {
    "n_layers": 2,
    "d_model": 32,
    "d_head": 8,
    "n_heads": 4,
    "d_mlp": 48,
    "n_ctx": N_CTX,
    "d_vocab": D_VOCAB,
    "normalization_type": "LN",
    "device": "cpu",
    "seed": 0,
}
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SEQ = 7


@dataclass(frozen=True)
class Case:
    """A tiny random model: how to build it, and what its host does."""

    name: str
    build: Callable[[torch.dtype], Any]
    host: str
    float32_norms: bool = False
    gated: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float64) -> Any:
        return _model(self.name, dtype)

    def tol(self, dtype: torch.dtype = torch.float64) -> float:
        return TOL[dtype, self.float32_norms]

    def within(self, compared: str) -> float:
        """The tolerance of a comparison: a key of :data:`TOLERANCES`."""
        return TOLERANCES[compared][self.float32_norms]


def _hooked_case(name: str, config: dict[str, Any]) -> Case:
    gated = bool(config.get("gated_mlp"))
    return Case(f"hooked-{name}", lambda dtype: build_hooked(config, dtype), "hooked", gated=gated)


def _bridge_case(name: str, class_name: str, config: dict, compat: bool) -> Case:
    return Case(
        f"bridge-{name}{'-compat' if compat else ''}",
        lambda dtype: build_bridge(class_name, config, dtype, compat),
        "bridge",
        float32_norms=name in FLOAT32_NORMS,
        gated=name in FLOAT32_NORMS - {"arcee"} | {"cohere", "cohere2", "stablelm"},
    )


CASES: dict[str, Case] = {}
if HookedTransformer is not None:
    CASES |= {c.name: c for c in (_hooked_case(n, cfg) for n, cfg in HOOKED.items())}
if build_bridge_from_module is not None:
    for _name, (_class, _config) in BRIDGE.items():
        for _compat in (False, True) if _name in COMPAT else (False,):
            _case = _bridge_case(_name, _class, _config, _compat)
            CASES[_case.name] = _case
if TransformerBridgeConfig is not None:
    for _name, _config in NATIVE.items():
        CASES[f"native-{_name}"] = Case(
            f"native-{_name}",
            lambda dtype, config=_config: build_native(config, dtype),
            "bridge",
            float32_norms=_config.get("normalization_type") == "RMS",
            gated=bool(_config.get("gated_mlp")),
        )
# One of each block shape and host class: pre-norm, gated and grouped, parallel, double norm with
# caps and windows, normed queries and keys, no MLP, and an MLP with a norm inside. All laws run on
# these.
_SHAPES = ("gpt2", "llama", "neox", "gemma2", "qwen3", "attn-only", "solu")
SHAPES = [case for case in CASES.values() if case.name.split("-", 1)[1] in _SHAPES]
GATED = [case for case in SHAPES if case.gated]
_OF_THE_LAST_HOST = ("llama", "neox")
_FOUND = [[case for case in SHAPES if case.name.endswith(f"-{shape}")] for shape in _SHAPES]
PER_SHAPE = [
    found[-1 if shape in _OF_THE_LAST_HOST else 0]
    for shape, found in zip(_SHAPES, _FOUND, strict=True)
    if found
]
"""One of each block shape, from the host classes in turn: for laws of what is done with captures.

Between two hosts of one shape only the reading of the run differs, which other laws hold to.
"""
every_convention = pytest.mark.parametrize(
    ("case", "gate"),
    [(case, "gate") for case in SHAPES] + [(c, g) for c in GATED[:1] for g in ("up", "half")],
    ids=str,
)
"""Every shape and host, and one with each other way to make a gated MLP linear."""
shape_conventions = pytest.mark.parametrize(
    ("case", "gate"),
    [(case, "gate") for case in PER_SHAPE] + [(c, g) for c in GATED[:1] for g in ("up", "half")],
    ids=str,
)
"""The same of :data:`PER_SHAPE`."""


def encoder_hf(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny BERT or RoBERTa of Hugging Face, with two token types."""
    import transformers

    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": D_VOCAB,
        "max_position_embeddings": N_CTX,
        "type_vocab_size": 2,
        "attn_implementation": "eager",
    }
    kind = name.removesuffix("Model").removesuffix("ForMaskedLM")
    own = getattr(transformers, f"{kind}Config")(**config)
    cls = getattr(transformers, name if name.endswith("Model") else f"{kind}ForMaskedLM")
    model = cls(own).to(dtype).eval()
    randomize(model)
    return model


def encoder_bridge(name: str, dtype: torch.dtype) -> Any:
    return to_bridge(encoder_hf(name, dtype))


def encoder_offered(architecture: str) -> bool:
    """Whether the installed host has Bridges of this class of Hugging Face's."""
    known = find(
        "transformer_lens.factories.architecture_adapter_factory", "SUPPORTED_ARCHITECTURES"
    )
    return known is not None and architecture in known


def hooked_encoder(dtype: torch.dtype) -> Any:
    cfg = {**_BASE_CONFIG, "act_fn": "gelu", "attention_dir": "bidirectional", "dtype": dtype}
    model = HookedEncoder(HookedTransformerConfig(**cfg)).to(dtype)
    randomize(model)
    return model.eval()


# Families that are those shapes in another dress: the laws that need the host, once each.
# Cohere's Bridges are Hugging Face's model under transformer_lens 4 alone.
DELTA_NETS = ("qwen3.5", "olmo-hybrid")
_COHERE = () if HookedTransformer else (True,)
_COMPAT = {"cohere": _COHERE, "cohere2": _COHERE, "olmo2": (False, True), "bloom": (False, True)}
MORE = [
    _bridge_case(name, *MORE_BRIDGE[name], compat)
    for name in MORE_BRIDGE
    for compat in _COMPAT.get(name, (False,))
    if bridge_offered(name)
    # transformer_lens 3 does not run gated delta nets.
    and (HookedTransformer is None or name not in DELTA_NETS)
]
if hooked_offered("olmo2"):
    MORE.append(
        Case("hooked-olmo2", lambda dtype: hooked_model("olmo2", dtype), "hooked", gated=True)
    )
if HookedTransformer is not None:
    MORE.append(Case("hooked-bloom", lambda dtype: hooked_model("bloom", dtype), "hooked"))
ENCODERS = [
    Case(f"bridge-{name}", lambda dtype, name=name: encoder_bridge(name, dtype), "bridge")
    for name in ("Bert", "Roberta")
    if encoder_offered(f"{name}ForMaskedLM")
]
"""Post-norm models: BERT and RoBERTa, in every class that the host has for them."""
if HookedEncoder is not None:
    ENCODERS.append(Case("hooked-encoder", hooked_encoder, "hooked"))
POST_NORM = [*ENCODERS]
"""The same, and GPT-1, a decoder."""
if encoder_offered("OpenAIGPTLMHeadModel"):
    POST_NORM.append(
        Case(
            "bridge-gpt1",
            lambda dtype: to_bridge(tiny_model("OpenAIGPTLMHeadModel").to(dtype)),
            "bridge",
        )
    )
DRESSED = [case for case in CASES.values() if case.name.split("-", 1)[1] not in _SHAPES]
CASES |= {case.name: case for case in (*MORE, *POST_NORM)}


@cache
def _model(name: str, dtype: torch.dtype) -> Any:
    with quiet():
        return CASES[name].build(dtype)


def uniform_attention(family: str) -> Any:
    """A fresh tiny model in float64 whose queries are 0: no pattern depends on the input."""
    with quiet(), torch.no_grad():
        model = CASES[f"{'native' if HookedTransformer is None else 'hooked'}-{family}"].build(
            torch.float64
        )
        for name, p in model.named_parameters():
            if name.endswith(("W_Q", "b_Q")) or ".q." in name:
                p.zero_()
    return model


def tokens(batch: int = 2, seq: int = SEQ, seed: int = 0) -> Tensor:
    return torch.randint(0, D_VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def lens_of(case: Case, model_dtype: torch.dtype = torch.float64, **kwargs: Any) -> TensorLens:
    """A capture of ``tokens()``: the same one unless something is hooked, edited or asked for."""
    model = case.model(model_dtype)
    plain = not any(point._forward_hooks for point in model.hook_dict.values())
    key = (case.name, model_dtype, tuple(sorted(kwargs.items())))
    if plain and key in _LENSES:
        return _LENSES[key]
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(model, tokens(), **kwargs)[1]
    return _LENSES.setdefault(key, lens) if plain else lens


_LENSES: dict[tuple, TensorLens] = {}


def randn_like(x: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
