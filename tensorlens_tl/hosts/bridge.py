"""TransformerBridge of transformer_lens 3.x and 4.x: weight layout, attention scores, refusals.

A Bridge wraps each module of a Hugging Face model in a component. How scores are made is told by
the component's class: see ``BRIDGE_READINGS``, one entry per component and none per architecture.
``build_bridge`` wraps a model, and compares the Bridge with the model as it was.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import resid_site
from ..sublayers import (
    TINY,
    AttentionWeights,
    BlockWeights,
    GatedMLPWeights,
    MLPWeights,
    NormWeights,
    Rotation,
    UnembedWeights,
)
from .adapter import Adapter, QueryKeyWeights, norm_eps
from .attention_reading import (
    BRIDGE_READINGS,
    NotRecomputableError,
    RecomputedReading,
    drop_pattern,
)
from .self_check import not_finite
from .supported import (
    NotFoldedError,
    UnsupportedArchitectureError,
    adapter_at,
    check_architecture,
    check_weights,
    faulty_option,
    flags_off,
    is_adapted,
    merge_first,
    refusal,
    restore,
    snapshot,
)

_ACT_FNS = {
    "BloomGelu": "gelu_bloom",
    "FastGELUActivation": "gelu_fast",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_new",
    "NewGELUActivation": "gelu_new",
    "PytorchGELUTanh": "gelu_new",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
"""Activations by the class of their module. A Bridge's config may name another one."""

_HALVES_INTERLEAVED = ("GlmForCausalLM", "Glm4ForCausalLM", "Ernie4_5ForCausalLM")
"""Architectures that turn neighbours by the first half of their tables, each entry for two."""


BRIDGE = "_tensorlens_bridge"
"""Attribute of a Hugging Face model that holds the Bridge around it."""

BEFORE = "_tensorlens_before"
"""Attribute of such a model that holds what it was before."""


class BridgeAdapter(Adapter):
    """``TransformerBridge`` of transformer_lens 3.x and 4.x, raw or in compatibility mode."""

    before_edits = frozenset({"resid_mid"})

    def check_model(self) -> None:
        flags_off(self.cfg)
        check_architecture(self.architecture, self.model.original_model)
        config = getattr(self.model.original_model, "config", None)
        what, remedy = faulty_option(self.architecture, config)
        # Of a wrapped model the comparison with Hugging Face has told.
        if what != self.architecture and BRIDGE not in vars(self.model.original_model):
            why = "its Bridge gives other logits than Hugging Face's model"
            raise UnsupportedArchitectureError(refusal(what, why, remedy))
        if getattr(self.model.original_model, "logit_scale", 1) != 1:
            raise NotFoldedError(
                f"Cannot freeze {self.architecture} as it is: its logits are scaled after the "
                "unembedding. Call tensorlens_tl.wrap(model).enable_compatibility_mode() first, "
                "which folds that in."
            )
        attention = getattr(config, "_attn_implementation", "eager")
        if attention not in ("eager", None) and self.attends_apart:
            raise ValueError(
                f"The attention implementation {attention!r} has no pattern to read. "
                "Load the model with attn_implementation='eager'."
            )
        if dropout := self._active_dropout():
            raise ValueError(
                f"The model is in training mode with dropout ({dropout}), which draws new numbers "
                "at every run. Call model.eval() before the capture."
            )

    @property
    def n_ctx(self) -> int:
        # Learned positions end, and so do tables: MPT's biases, rotations of GPT-J, CodeGen and
        # boot_native. Other rotations and ALiBi are computed for any position.
        kind = getattr(self.cfg, "positional_embedding_type", "standard")
        part = self.model.blocks[0].attn.original_component
        if kind == "standard" or hasattr(part, "embed_positions") or hasattr(part, "rotary"):
            return self.cfg.n_ctx
        return getattr(self.model.original_model.config, "max_seq_len", sys.maxsize)

    @property
    def act_fn(self) -> str:
        for name, module in self.model.blocks[0].named_modules():
            if re.search(r"\b(act|act_fn|activation_fn|gelu_impl)$", name):
                kind = type(module).__name__
                if kind == "GELU":
                    return "gelu" if module.approximate == "none" else "gelu_new"
                return _ACT_FNS.get(kind, kind)
        return self.cfg.act_fn

    def norm_names(self, block: Any) -> dict[str, str]:
        names = super().norm_names(block)
        if "Parallel" in type(block).__name__ and getattr(block, "ln2", None) is None:
            names["ln2"] = "ln1"  # Phi, Falcon, Cohere: both branches read through one norm
        return names

    @property
    def attends_apart(self) -> bool:
        # The other attention bridges compute softmax(QK) themselves, whatever Hugging Face would
        # do. So does boot_native's module of transformer_lens 4, with what hooks return for it.
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
        if not (rms or "LayerNorm" in kind) or any(True for _ in component.children()):
            raise UnsupportedArchitectureError(
                refusal(f"the norm {kind}", "it is neither one LayerNorm nor one RMSNorm")
            )
        offset = 1.0 if rms and getattr(self.cfg, "rmsnorm_uses_offset", False) else 0.0
        w, b = getattr(component, "weight", None), getattr(component, "bias", None)
        return NormWeights(w, b, center=not rms, offset=offset, eps=norm_eps(component))

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

    def run(self, inputs: Any, kwargs: Mapping[str, Any]) -> Tensor:
        config = getattr(self.model.original_model, "config", None)
        config = getattr(config, "attn_config", config)  # MPT
        clip: float = getattr(config, "clip_qkv", None) or 0.0
        points = [block.attn.hook_v for block in self.model.blocks] if clip else []

        def see(module: Any, args: Any, output: Tensor) -> None:
            if bool((output.abs() > clip).any()):
                raise UnsupportedArchitectureError(
                    refusal(
                        f"{self.architecture} with clip_qkv={clip}",
                        "it clips values of this run, after the last hook that shows them",
                    )
                )

        watching = [point.register_forward_hook(see) for point in points]
        try:
            return super().run(inputs, kwargs)
        finally:
            for hook in watching:
                hook.remove()

    # --- Attention scores

    def recomputed_reading(self) -> RecomputedReading:
        attentions = [block.attn for block in self.model.blocks]
        kind = type(attentions[0]).__name__
        if kind not in BRIDGE_READINGS:
            raise NotRecomputableError.unknown(kind)
        found = BRIDGE_READINGS[kind](self, [attn.original_component for attn in attentions])
        keepers = [attn for attn in attentions if hasattr(attn, "_pattern")]

        def listen() -> list[Any]:
            return found.listen() + [a.register_forward_hook(drop_pattern) for a in keepers]

        return replace(found, listen=listen)

    def query_key_weights_of(self, attn: Any) -> QueryKeyWeights:
        d_head = self.cfg.d_head
        (W_Q, b_Q), (W_K, b_K) = (
            (
                W.unflatten(1, (-1, d_head)).transpose(0, 1),
                None if b is None else b.unflatten(0, (-1, d_head)),
            )
            for W, b in (linear_weights(attn.q), linear_weights(attn.k))
        )
        return W_Q, b_Q, W_K, b_K

    def rotations(self, n_pos: int) -> Sequence[Rotation | None] | None:
        blocks, cfg = self.model.blocks, self.cfg
        if getattr(cfg, "positional_embedding_type", None) != "rotary":
            return [None] * len(blocks)
        part = blocks[0].attn.original_component
        if type(part).__name__ == "NativeAttention":
            tables = (part.rotary.cos_cached[:n_pos], part.rotary.sin_cached[:n_pos])
            return [Rotation(*tables, True)] * len(blocks)
        config = getattr(self.model.original_model, "config", None)
        rope = getattr(config, "rope_parameters", None) or {}
        beta, first = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        if beta and first and n_pos > first:
            why = f"queries from position {first} on are scaled after their rotation"
            raise NotRecomputableError(f"llama_4_scaling_beta={beta}", why)
        flags = ("rotary_adjacent_pairs", "rotary_interleaved_cos_sin")
        adjacent = any(getattr(cfg, flag, False) for flag in flags)
        for name, module in self.model.original_model.named_modules():
            if name.rpartition(".")[2] == "rotary_emb":
                rotary = getattr(module, "original_component", module)  # no hook is to fire
                x = self.weights.unembed.W_U[:1]
                try:
                    cos, sin = rotary(x, torch.arange(n_pos, device=x.device)[None])
                except TypeError:  # one that asks for more than positions
                    return None
                if self.architecture in _HALVES_INTERLEAVED:
                    half, adjacent = cos.shape[-1] // 2, True
                    cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
                return [Rotation(cos[0], sin[0], adjacent)] * len(blocks)
        return None


def linear_weights(bridge: Any) -> tuple[Tensor, Tensor | None]:
    """A Bridge's linear module as x @ W + b."""
    # The orientation is told by the module's type, never by the shape: square weights have both.
    module = bridge.original_component
    if is_adapted(module):
        raise UnsupportedArchitectureError(
            merge_first(bridge.hook_in.name.removesuffix(".hook_in"))
        )
    if isinstance(module, nn.Linear):
        return module.weight.T, module.bias
    if type(module).__name__ == "Conv1D":
        return module.weight, module.bias
    raise UnsupportedArchitectureError(
        refusal(f"the linear module {type(module).__name__}", "its orientation is not known here")
    )


# --- Around a Hugging Face model ------------------------------------------------------------------


def build_bridge(model: Any, build: Callable[[], Any]) -> Any:
    """Wrap a Hugging Face model, and compare its logits before and after.

    Args:
        model: The Hugging Face model.
        build: Function without arguments that builds the Bridge around the model.

    Returns:
        The Bridge around the model, in the same mode (training or evaluation).

    Raises:
        ValueError: If the model is inside another Bridge, or its logits are not finite.
        UnsupportedArchitectureError: If the Bridge cannot be built or run, or gives other logits.
            The model is then as it was.
    """
    name = type(model).__name__
    if any(type(module).__module__.startswith("transformer_lens.") for module in model.modules()):
        raise ValueError(
            f"This {name} is inside a TransformerBridge already, which wrap did not make. "
            "Pass that Bridge in its place."
        )
    check_architecture(name, model)
    check_weights(model)
    adapted, (what, remedy) = adapter_at(model), faulty_option(name, model.config)
    before = snapshot(model)
    kept = [(module, module.training) for module in model.modules()]
    ids = _probe_ids(model)
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        failing = "the model itself does not run on token ids"
        try:
            with torch.random.fork_rng(devices):  # a Bridge draws the weights that it then replaces
                with _at_rest(model):
                    expected = model(ids).logits
                failing = (
                    f"transformer_lens {metadata.version('transformer_lens')} cannot bridge it"
                )
                bridge = build()
                with _at_rest(model, bridge):
                    off, rounding = _difference(model, bridge, ids, expected)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0].rstrip(".: ")
            raise UnsupportedArchitectureError(
                refusal(what, f"{failing} ({reason})", remedy)
            ) from error
        if not off <= rounding:
            if adapted:
                raise UnsupportedArchitectureError(merge_first(adapted))
            if not expected.isfinite().all():
                raise ValueError(not_finite("logits", model))
            why = (
                f"its Bridge gives logits that differ from Hugging Face's by {off:.1e} of the "
                f"largest, where rounding explains {rounding:.0e}"
            )
            raise UnsupportedArchitectureError(refusal(what, why, remedy))
    except BaseException:
        restore(before)
        raise
    finally:
        for module, training in kept:
            module.training = training
    vars(model)[BRIDGE], vars(model)[BEFORE] = bridge, before  # not among the submodules
    return bridge


def _probe_ids(model: Any) -> Tensor:
    """Eight random ids, or as many as the model has positions for [1, pos]."""
    config, weight = model.config, model.get_input_embeddings().weight
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    room = min([8, *(int(getattr(config, n, None) or 8) for n in names)])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(weight), (1, room), generator=generator, device="cpu")
    return ids.to(weight.device)


@contextmanager
def _at_rest(*models: Any) -> Iterator[None]:
    """Run models without dropout and without a graph."""
    modules = {id(m): m for model in models for m in model.modules()}.values()
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _difference(model: Any, bridge: Any, ids: Tensor, expected: Tensor) -> tuple[float, float]:
    """Compare a Bridge with what the model gave: max |Δ logits|, and what rounding explains.

    Both are relative to the largest logit. A Bridge computes the same in another order, so every
    number may round another way. What that does depends on the model: it may amplify one feature.
    So it is measured. Every embedding, and what enters the first block, is moved by its last digit,
    and the logits move by n. The last digit is that of the coarsest dtype in the model, or of
    float32 where that is coarser, as hosts compute norms, softmax and rotations in float32. In half
    precision, the move changes all roundings after it, as another order does: 4 n is allowed. In
    float32 and float64 it may be one rounding for the many of a deep model, and n is small: 32 n is
    allowed.

    Args:
        model: The Hugging Face model, inside the Bridge.
        bridge: The Bridge around it, at rest.
        ids: Token ids [1, pos].
        expected: Logits that the model gave before it was wrapped [1, pos, d_vocab].

    Returns:
        The difference and the largest that rounding explains.
    """
    dtypes = {torch.float32} | {p.dtype for p in model.parameters() if p.is_floating_point()}
    digit = max(torch.finfo(dtype).eps for dtype in dtypes)
    times = 4 if digit > 1e-4 else 32
    found = bridge(ids, return_type="logits")
    size = expected.abs().max().clamp_min(TINY)
    off, rounding = _largest(found - expected, found, expected) / size, times * digit
    if off > rounding:

        def move(module: Any, args: Any, output: Tensor) -> Tensor:
            signs = torch.ones_like(output)
            signs[..., ::2] = -1
            return output * (1 + digit * signs)

        points = model.get_input_embeddings(), bridge.hook_dict[resid_site(0, "pre")]
        moving = [point.register_forward_hook(move) for point in points]
        try:
            moved = bridge(ids, return_type="logits")
        finally:
            for hook in moving:
                hook.remove()
        rounding = max(rounding, times * float(_largest(moved - found, moved, found) / size))
    return float(off), rounding


def _largest(difference: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The largest difference, where not both are NaN or infinite: a later check tells of those."""
    same = ~a.isfinite() & ~b.isfinite()
    return difference.masked_fill(same, 0).abs().nan_to_num(torch.inf).max()
