"""Tiny models of every family, for every class the installed host offers; comparisons; oracles."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tensorlens_tl
from tensorlens_tl.lens.tensor_lens import TensorLens
from tensorlens_tl.support.tiny_models import (  # noqa: F401  (the tests take them from here)
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
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
except ImportError:  # transformer_lens 2
    build_bridge_from_module = None

try:
    from transformer_lens import TransformerBridge, TransformerBridgeConfig  # noqa: F401
except ImportError:  # before transformer_lens 4; 3.9's boot_native passes over edited patterns
    TransformerBridgeConfig = None

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SEQ = 7

# --- Families ------------------------------------------------------------------------------------


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
ALL = list(CASES.values())
if os.environ.get("FAMILIES") == "few":  # one of each block shape: for slow runs
    SHAPES = {"gpt2", "llama", "neox", "gemma2", "qwen3", "attn-only", "solu"}
    ALL = [case for case in ALL if case.name.split("-", 1)[1] in SHAPES]

# Families that are block shapes of the above in another dress: one pass through the laws.
COMPATS = {"cohere": (True,), "cohere2": (True,), "olmo2": (False, True), "bloom": (False, True)}
MORE = [
    _bridge_case(name, *MORE_BRIDGE[name], compat)
    for name in MORE_BRIDGE
    for compat in COMPATS.get(name, (False,))
    if bridge_offered(name)
]
if hooked_offered("olmo2"):
    MORE.append(
        Case("hooked-olmo2", lambda dtype: hooked_model("olmo2", dtype), "hooked", gated=True)
    )
if HookedTransformer is not None:
    MORE.append(Case("hooked-bloom", lambda dtype: hooked_model("bloom", dtype), "hooked"))
CASES |= {case.name: case for case in MORE}
GATED = [case for case in ALL if case.gated]


@cache
def _model(name: str, dtype: torch.dtype) -> Any:
    with quiet():
        return CASES[name].build(dtype)


def uniform_attention(family: str) -> Any:
    """A fresh tiny model in float64 whose queries are 0, so that no pattern depends on the input."""
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
    """A capture of ``tokens()``; the same one again unless something is hooked, edited or asked for."""
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


# --- Comparisons ---------------------------------------------------------------------------------


def assert_close(ours: Tensor, theirs: Tensor, tol: float, what: str = "") -> None:
    """max |ours − theirs| ≤ tol · max |theirs|."""
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)} ≠ {list(theirs.shape)}"
    assert ours.isfinite().all() and theirs.isfinite().all(), f"{what}: not finite"
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    assert error <= tol, f"{what}: off by {float(error):.2e}, expected at most {tol:.0e}"


def attends_apart(model: Any) -> bool:
    """Whether Hugging Face's own attention runs, so that edits of its pattern are discarded."""
    attn = model.blocks[1].attn
    made_here = getattr(getattr(attn, "original_component", None), "accepts_pattern_fn", False)
    return type(attn).__name__ == "AttentionBridge" and not made_here


# --- The oracle: the real model, frozen by hooks -------------------------------------------------


class FrozenModel:
    """The host's own forward pass with pattern, scale and gating ratio overwritten by hooks.

    The frozen values come from the host's own cache (ratio = post / pre, by division), not from
    the library; a model call with them frozen is then a function of the first residual alone.
    """

    def __init__(self, model: Any, ids: Tensor, gate: str = "gate"):
        self.model, self.ids, self.gate = model, ids, gate
        with torch.no_grad(), quiet():
            _, cache_ = model.run_with_cache(ids, return_cache_object=False)
        self.cache = {k: v.detach() for k, v in cache_.items() if isinstance(v, Tensor)}
        self.layers = range(len(model.blocks))

    def site_names(self) -> list[str]:
        names = []
        for layer in self.layers:
            names.append(f"blocks.{layer}.hook_resid_pre")
            mid = f"blocks.{layer}.hook_resid_mid"
            parallel = "Parallel" in type(self.model.blocks[layer]).__name__ or getattr(
                self.model.cfg, "parallel_attn_mlp", False
            )
            if mid in self.cache and not parallel:
                names.append(mid)
        return [*names, f"blocks.{self.layers[-1]}.hook_resid_post"]

    def _hooks(self) -> list[tuple[str, Callable]]:
        def constant(name):
            return lambda t, hook: self.cache[name].clone()

        held = ("ln1.hook_scale", "ln2.hook_scale", "ln1_post.hook_scale", "ln2_post.hook_scale",
                "attn.hook_pattern", "ln_final.hook_scale", "mlp.ln.hook_scale")  # fmt: skip
        if attends_apart(self.model):  # it would go on with its own pattern: hold what makes it
            held += "attn.q.hook_out", "attn.k.hook_out"
        names = [n for n in self.cache if n.endswith(held)]
        hooks = [(name, constant(name)) for name in names]
        for layer in self.layers:
            mlp = f"blocks.{layer}.mlp"
            if f"{mlp}.hook_pre" in self.cache:
                hooks += self._gate_hooks(mlp)
        return hooks

    def _gate_hooks(self, mlp: str) -> list[tuple[str, Callable]]:
        pre, live = self.cache[f"{mlp}.hook_pre"], {}
        post_name = f"{mlp}.hook_mid" if f"{mlp}.hook_mid" in self.cache else f"{mlp}.hook_post"
        post = self.cache[post_name]

        def keep(name):
            return lambda t, hook: live.__setitem__(name, t)

        if f"{mlp}.hook_pre_linear" not in self.cache:
            ratio = post / pre
            return [
                (f"{mlp}.hook_pre", keep("pre")),
                (post_name, lambda t, hook: ratio * live["pre"]),
            ]
        up, share = self.cache[f"{mlp}.hook_pre_linear"], {"gate": 1.0, "up": 0.0, "half": 0.5}
        layer = self.model.blocks[int(mlp.split(".")[1])]
        b_post = getattr(layer.mlp, "b_in", None) if hasattr(layer.mlp, "W_gate") else None
        offset = (
            b_post.detach()
            if b_post is not None and "Bridge" not in type(layer.mlp).__name__
            else 0
        )
        product = post - offset
        a = share[self.gate]
        on_up, on_gate = a * product / up, (1 - a) * product / pre
        return [
            (f"{mlp}.hook_pre", keep("pre")),
            (f"{mlp}.hook_pre_linear", keep("up")),
            (post_name, lambda t, hook: on_up * live["up"] + on_gate * live["pre"] + offset),
        ]

    def __call__(
        self, x: Tensor, inject: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Final normalized residual and all residual sites, from the first residual x."""
        sites: dict[str, Tensor] = {}
        first = self.site_names()[0]

        def site_hook(name):
            def hook(t, hook):
                t = x if name == first else t
                if inject and name in inject and not name.endswith("mid"):
                    t = t + inject[name]
                sites[name] = t
                return t

            return hook

        hooks = [(name, site_hook(name)) for name in self.site_names()] + self._hooks()
        # On the Bridge hook_resid_mid is only what ln2 reads: what reaches the residual there is
        # added to the attention's output.
        for name in inject or ():
            if name.endswith("mid"):
                at = name.replace("hook_resid_mid", "hook_attn_out")
                hooks.append((at, lambda t, hook, name=name: t + inject[name]))
        final: list[Tensor] = []
        has_norm = hasattr(self.model, "ln_final")
        handle = None
        if has_norm:
            handle = self.model.ln_final.register_forward_hook(lambda m, a, out: final.append(out))
        try:
            with quiet():
                self.model.run_with_hooks(self.ids, fwd_hooks=hooks)
        finally:
            if handle is not None:
                handle.remove()
        return (final[-1] if has_norm else sites[self.site_names()[-1]]), sites


def written(writers):
    """What every writer adds, everywhere: [batch, writer, pos, d_model]."""
    pos = writers.moving()[0][0].wide()
    rows = [
        part.wide() if hasattr(part, "wide") else part.expand_as(pos[:1]) for part in writers.parts
    ]
    return torch.cat(rows).transpose(0, 1)
