"""The only file that knows the hosts: hook names, weight layouts, ways to run.

An adapter reads a TransformerLens model and answers four questions in framework-free terms: what
are the weights (:class:`ModelWeights`), where is each activation to be read
(:meth:`Adapter.points`),
what are the tokens (:class:`Prompts`), and how is the model run. It never edits the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .graph import FINAL_SITE, resid_site
from .prompts import Prompts, as_ids, check_arguments, check_tokens, is_text, mask_spans, tokenize
from .supported import SUPPORTED, UnsupportedArchitectureError, refusal
from .weights import (
    AttentionWeights,
    BlockWeights,
    GatedMLPWeights,
    MLPWeights,
    ModelWeights,
    NormWeights,
    UnembedWeights,
)

_ACTIVATIONS = {
    "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_fast",
    "quick_gelu": "quick_gelu", "solu": "solu", "solu_ln": "solu",
}  # fmt: skip

_ACT_FNS = {"FalconForCausalLM": "gelu", "MptForCausalLM": "gelu"}
"""What these compute whatever their Bridge's config says (the self-check would tell)."""

_LAYER_HOOKS = {
    "pattern": "attn.hook_pattern", "scores": "attn.hook_attn_scores",
    "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "z": "attn.hook_z",
    "rot_q": "attn.hook_rot_q", "rot_k": "attn.hook_rot_k",
    "cos": "attn.hook_cos", "sin": "attn.hook_sin",
    "pre": "mlp.hook_pre", "pre_linear": "mlp.hook_pre_linear",
    "mlp.ln.scale": "mlp.ln.hook_scale", "post": "mlp.hook_post",
}  # fmt: skip

# What the MLP reads: on the Bridge hook_resid_mid, too, which stands beside the residual there.
_MLP_IN = ("hook_mlp_in", "hook_resid_mid", "ln2.hook_in", "ln2.hook_normalized", "ln2.hook_out",
           "mlp.hook_in", "mlp.in.hook_in")  # fmt: skip
_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
_NORMS_AFTER = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
"""Architectures whose norms stand after the sublayers; transformer_lens 3 calls them as if before."""
_EDITS = {
    "resid_pre": ("hook_resid_pre",),
    "v": ("ln1.hook_in", "ln1.hook_normalized", "ln1.hook_out", "attn.hook_in", "attn.v.hook_in",
          "attn.hook_v"),
    "z": ("attn.hook_z",),
    "attn_out": ("hook_attn_out", "attn.hook_result", "attn.o.hook_out", "attn.hook_out",
                 "ln1_post.hook_in", "ln1_post.hook_normalized", "hook_resid_mid"),
    "pre": (*_MLP_IN, "mlp.gate.hook_in", "mlp.hook_pre"),
    "pre_linear": (*_MLP_IN, "mlp.hook_pre_linear"),
    "post": ("mlp.hook_mid", "mlp.ln.hook_normalized", "mlp.hook_post"),
    "mlp_out": ("hook_mlp_out", "mlp.out.hook_out", "mlp.hook_out", "ln2_post.hook_in",
                "ln2_post.hook_normalized", "hook_resid_post"),
}  # fmt: skip
"""Hook points whose edits become constants, by the stage at which they are seen."""

_KNOWN_HOOKS = {"transformer_lens", "transformers", "tensorlens_tl"}
_FINAL_EDITS = ("ln_final.hook_in", "ln_final.hook_normalized", "ln_final.hook_out", FINAL_SITE)

Read = tuple[int | None, str]
"""What is read, and in which layer: (3, "pattern"), (None, "embed")."""


class Adapter(ABC):
    """What the rest of the library needs of a host model. One subclass per host class."""

    forbidden = ("return_type", "loss_per_token", "start_at_layer", "stop_at_layer", "past_kv_cache",
                 "past_key_values", "use_cache", "names_filter")  # fmt: skip
    """Keyword arguments that would make the run something else than prompt → logits."""

    before_edits: frozenset[str] = frozenset()
    """What is read before the user's own hooks at its point, as they do not enter the residual."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.cfg: Any = model.cfg
        self.hooks: dict[str, Any] = self.model.hook_dict  # a Bridge gathers it anew at every look
        self.check_model()
        if len(self.model.blocks) == 0:
            raise UnsupportedArchitectureError(refusal(self.name, "it has no blocks"))
        self.weights = ModelWeights(
            tuple(self.block_weights(block) for block in self.model.blocks),
            self.norm_weights(getattr(self.model, "ln_final", None)),
            self.unembed_weights(),
        )

    # --- What differs between the hosts

    @abstractmethod
    def check_model(self) -> None:
        """Refuse what cannot be frozen, by name."""

    @abstractmethod
    def norm_weights(self, norm: nn.Module | None) -> NormWeights | None:
        """A norm's affine part in the canonical form; None where there is no norm."""

    @abstractmethod
    def block_weights(self, block: Any) -> BlockWeights:
        """A block's weights in the canonical layout."""

    @abstractmethod
    def unembed_weights(self) -> UnembedWeights:
        """The unembedding in the canonical layout."""

    def norm_names(self, block: Any) -> dict[str, str]:
        """What the host calls each of a block's norms."""
        if self.architecture in _NORMS_AFTER and getattr(block, "ln1_post", None) is None:
            return {"ln1_post": "ln1", "ln2_post": "ln2"}
        return dict(zip(_NORMS, _NORMS, strict=True))

    # --- What they share

    def norm(self, block: Any, which: str) -> nn.Module | None:
        """A norm of a block of the host: "ln1", "ln1_post", "ln2" or "ln2_post"."""
        return getattr(block, self.norm_names(block).get(which, ""), None)

    def _norm_weights_of(self, block: Any, which: str) -> NormWeights | None:
        return self.norm_weights(self.norm(block, which))

    @property
    def architecture(self) -> str | None:
        """Hugging Face's name of the model's class, where the host knows it."""
        names = ("architecture", "original_architecture")
        return next((found for name in names if (found := getattr(self.cfg, name, None))), None)

    @property
    def name(self) -> str:
        """The model's name, for people."""
        name = getattr(self.cfg, "model_name", None)
        if name in (None, "custom", "external", ""):
            name = getattr(self.cfg, "architecture", None) or "custom model"
        return str(name)

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return int(self.cfg.n_heads)

    @property
    def tokenizer(self) -> Any:
        """The host's tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def dtype(self) -> torch.dtype:
        """The model's own dtype."""
        return self.weights.unembed.W_U.dtype

    def soft_cap(self, name: str = "output_logits_soft_cap") -> float | None:
        """The soft cap of logits or of scores; hosts write −1 or None for none."""
        cap = getattr(self.cfg, name, None)
        return float(cap) if cap is not None and cap > 0 else None

    def activation(self) -> str:
        """The activation's canonical name.

        Returns:
            A key of :data:`tensorlens_tl.primitives.RATIOS`.

        Raises:
            UnsupportedArchitectureError: If it has no closed-form ratio here.
        """
        act = _ACT_FNS.get(self.architecture or "", self.cfg.act_fn)
        if act not in _ACTIVATIONS:
            raise UnsupportedArchitectureError(
                refusal(f"the activation {act!r}", f"known are {', '.join(_ACTIVATIONS)}")
            )
        return _ACTIVATIONS[act]

    def points(self, attention: tuple[str, ...] = ("pattern",)) -> dict[Read, nn.Module]:
        """Where each needed activation passes: a hook point per (layer, quantity).

        Args:
            attention: What of attention is read beside values and z.

        Returns:
            The hook points by what they carry.

        Raises:
            ValueError: If the host has no such hook point.
        """
        names: dict[Read, str] = {(None, "embed"): "hook_embed"}
        if getattr(self.cfg, "positional_embedding_type", "standard") == "standard":
            names[None, "pos_embed"] = "hook_pos_embed"
        if self.weights.ln_final is not None:
            names[None, "ln_final.scale"] = "ln_final.hook_scale"
        for layer, block in enumerate(self.weights.blocks):
            wanted = ["v", *attention, "z"]
            if block.mlp is not None:
                wanted += ["pre", "post"]
                wanted += ["pre_linear"] if isinstance(block.mlp, GatedMLPWeights) else []
                wanted += ["mlp.ln.scale"] if getattr(block.mlp, "ln", None) is not None else []
            names |= {(layer, key): f"blocks.{layer}.{_LAYER_HOOKS[key]}" for key in wanted}
            for norm, own in self.norm_names(self.model.blocks[layer]).items():
                if getattr(block, norm) is not None:
                    names[layer, f"{norm}.scale"] = f"blocks.{layer}.{own}.hook_scale"
            names[layer, "resid_pre"] = resid_site(layer, "pre")
            if block.mlp is not None and not block.parallel:
                names[layer, "resid_mid"] = resid_site(layer, "mid")
            names[layer, "resid_post"] = resid_site(layer, "post")
        hooks = self.hooks
        if missing := [name for name in names.values() if name not in hooks]:
            raise ValueError(
                f"{self.name} has no hook point {', '.join(missing)}: expected the hook points of "
                "TransformerLens 2.18 to 4.x; update transformer_lens or report the model"
            )
        points = {read: hooks[name] for read, name in names.items()}
        if self.weights.unembed.soft_cap is not None:
            points[None, "raw_logits"] = self.model.unembed  # the cap comes after this module
        if self._hooked("", _named(_FINAL_EDITS, {})):  # 2.18 has no hook at the unembedding
            points[None, "normalized"] = hooks.get(FINAL_SITE) or self.model.ln_final
        return points

    def hooked_patterns(self) -> dict[str, nn.Module]:
        """Hook points of scores and patterns that carry forward hooks of somebody else."""
        layers = range(len(self.weights.blocks))
        keys = (_LAYER_HOOKS["scores"], _LAYER_HOOKS["pattern"])
        names = (f"blocks.{layer}.{name}" for layer in layers for name in keys)
        found = {name: self.hooks.get(name) for name in names}
        return {name: p for name, p in found.items() if p is not None and p.fwd_hooks}

    def foreign_hooks(self) -> list[str]:
        """Names of the hook points and modules that carry forward hooks of somebody else."""
        points = {id(point): name for name, point in self.hooks.items() if point.fwd_hooks}
        for name, module in self.model.named_modules():  # torch's own hooks; hosts have some, too
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            made_by = {getattr(hook, "func", hook).__module__.split(".")[0] for hook in hooks}
            if made_by - _KNOWN_HOOKS:
                points.setdefault(id(module), name)
        return list(points.values())

    def _hooked(self, prefix: str, names: Mapping[str, str]) -> tuple[str, ...]:
        points: dict[int, str] = {}  # a hook point of the Bridge has several names
        for name, own in names.items():
            point = self.hooks.get(prefix + own)
            if point is not None and point.fwd_hooks:
                points.setdefault(id(point), name.removeprefix("attn.").removeprefix("mlp."))
        return tuple(points.values())

    def edits(self) -> dict[Read, tuple[str, ...]]:
        """Where hooks of the user's own may edit the run: labels by (layer, stage)."""
        found: dict[Read, tuple[str, ...]] = {
            (None, "normalized"): self._hooked("", _named(_FINAL_EDITS, {}))
        }
        for layer, block in enumerate(self.model.blocks):
            own = self.norm_names(block)
            for stage, names in _EDITS.items():
                found[layer, stage] = self._hooked(f"blocks.{layer}.", _named(names, own))
        return {read: labels for read, labels in found.items() if labels}

    def prepare(self, inputs: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Prompts]:
        """Tokens of a string, a list of strings or token ids, checked, and what to pass to the model.

        Args:
            inputs: What the user gave.
            kwargs: The model's own keyword arguments.

        Returns:
            The input for :meth:`run`, and the prompts.

        Raises:
            ValueError: On arguments that change the run or are unknown, an empty prompt, one longer
                than n_ctx, ids outside the vocabulary or padded, or text without a tokenizer.
        """
        wrapped = getattr(self.model, "original_model", self.model)
        check_arguments(kwargs, self.forbidden, (self.model, wrapped))
        if is_text(inputs):
            texts = [inputs] if isinstance(inputs, str) else inputs
            tokens, spans = tokenize(self.model, texts, kwargs)
        else:
            inputs = tokens = as_ids(inputs, self.weights.unembed.W_U.device)
            knows_padding = None if "padding_side" in kwargs else self.tokenizer
            spans = mask_spans(self.mask(tokens, kwargs), tokens, knows_padding)
        check_tokens(tokens, self.cfg.n_ctx, self.cfg.d_vocab)
        rows = [row[start:stop] for row, (start, stop) in zip(tokens.tolist(), spans, strict=True)]
        text = {token: self.token_string(token) for row in rows for token in dict.fromkeys(row)}
        strings = tuple(tuple(text[token] for token in row) for row in rows)
        return inputs, Prompts(tokens, tuple(spans), strings)

    def mask(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The attention mask under which the host runs token ids, or None."""
        return kwargs.get("attention_mask")

    def token_string(self, token: int) -> str:
        """A token as text; its id where there is no tokenizer."""
        return str(token) if self.tokenizer is None else self.tokenizer.decode([token])

    def run(self, inputs: Any, kwargs: Mapping[str, Any]) -> Float[Tensor, "batch pos d_vocab"]:
        """One ordinary forward pass."""
        return self.model(inputs, return_type="logits", **kwargs)


def _named(names: tuple[str, ...], norms: Mapping[str, str]) -> dict[str, str]:
    """What the host calls hook points; without those of norms that it has not.

    A norm that two branches share is an edit of each: under its own name in either.

    Returns:
        The host's names by ours.
    """
    parts = {name: name.partition(".") for name in names}
    return {
        name: f"{norms.get(head, head)}{dot}{rest}"
        for name, (head, dot, rest) in parts.items()
        if head not in _NORMS or head in norms
    }


def _flags_off(cfg: Any) -> None:
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(cfg, flag, False):
            raise ValueError(
                f"cfg.{flag} is on, expected off: it gives every head its own norm. Call "
                f"model.set_{flag}(False) before the capture"
            )


class HookedTransformerAdapter(Adapter):
    """``HookedTransformer`` of transformer_lens 2.x and 3.x."""

    def check_model(self) -> None:
        _flags_off(self.cfg)
        kind = self.cfg.positional_embedding_type
        if kind not in ("standard", "rotary"):
            raise UnsupportedArchitectureError(
                refusal(f"{kind!r} positions", "only standard and rotary ones are tested")
            )
        if getattr(self.cfg, "post_embedding_ln", False):
            raise UnsupportedArchitectureError(
                refusal("post_embedding_ln", "an embedding norm is not served yet")
            )

    def norm_weights(self, norm: nn.Module | None) -> NormWeights | None:
        kind = type(norm).__name__
        if norm is None or kind == "Identity":
            return None
        if kind not in ("LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"):
            raise UnsupportedArchitectureError(
                refusal(f"the norm {kind}", "it is neither LayerNorm nor RMSNorm")
            )
        return NormWeights(
            getattr(norm, "w", None), getattr(norm, "b", None), center=kind.startswith("Layer")
        )

    def block_weights(self, block: Any) -> BlockWeights:
        for module in (block, block.attn):
            kind = type(module).__name__
            if kind not in ("TransformerBlock", "Attention", "GroupedQueryAttention"):
                raise UnsupportedArchitectureError(
                    refusal(f"the module {kind}", "its computation is not known here")
                )
        norm, attn = partial(self._norm_weights_of, block), block.attn
        # The grouped class keeps the raw weights in _W_V and repeats them in W_V.
        W_V, b_V = (attn._W_V, attn._b_V) if hasattr(attn, "_W_V") else (attn.W_V, attn.b_V)
        return BlockWeights(
            AttentionWeights(W_V, b_V, attn.W_O, attn.b_O),
            None if self.cfg.attn_only else self._mlp_weights(block.mlp),
            norm("ln1"),
            None if self.cfg.attn_only else norm("ln2"),
            norm("ln1_post"),
            norm("ln2_post"),
            parallel=bool(self.cfg.parallel_attn_mlp),
        )

    def _mlp_weights(self, mlp: Any) -> MLPWeights | GatedMLPWeights:
        kind, act = type(mlp).__name__, self.activation()
        ln = self.norm_weights(getattr(mlp, "ln", None))
        if kind == "MLP":
            return MLPWeights(mlp.W_in, mlp.b_in, mlp.W_out, mlp.b_out, act, ln=ln)
        if kind == "GatedMLP" and ln is None:
            # Its b_in is added after gating.
            return GatedMLPWeights(
                mlp.W_gate, None, mlp.W_in, None, mlp.b_in, mlp.W_out, mlp.b_out, act
            )
        raise UnsupportedArchitectureError(
            refusal(f"the MLP {kind}", "it is neither MLP nor GatedMLP")
        )

    def unembed_weights(self) -> UnembedWeights:
        unembed = self.model.unembed
        return UnembedWeights(unembed.W_U, unembed.b_U, self.soft_cap())

    def mask(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        given = kwargs.get("attention_mask")
        side = kwargs.get("padding_side") or getattr(self.tokenizer, "padding_side", None)
        if given is not None or side != "left":
            return given
        # With left padding this host masks pad ids in token tensors, too.
        from transformer_lens.utils import get_attention_mask

        bos = kwargs.get("prepend_bos")
        bos = self.cfg.default_prepend_bos if bos is None else bos
        return get_attention_mask(self.tokenizer, tokens, bos)


class BridgeAdapter(Adapter):
    """``TransformerBridge`` of transformer_lens 3.x and 4.x, raw or in compatibility mode."""

    before_edits = frozenset({"resid_mid"})

    def check_model(self) -> None:
        _flags_off(self.cfg)
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
        attention = getattr(config, "_attn_implementation", "eager")
        if attention not in ("eager", None) and not self._reconstructs():
            raise ValueError(
                f"attention implementation {attention!r} has no pattern to read, expected 'eager': "
                "load the model with attn_implementation='eager'"
            )
        if dropout := self._active_dropout():
            raise ValueError(
                f"the model is in training mode with dropout ({dropout}), expected evaluation mode: "
                "call model.eval()"
            )

    def norm_names(self, block: Any) -> dict[str, str]:
        names = super().norm_names(block)
        if "Parallel" in type(block).__name__ and getattr(block, "ln2", None) is None:
            names["ln2"] = "ln1"  # Phi, Falcon, Cohere: both branches read through one norm
        return names

    def _reconstructs(self) -> bool:
        # These attention bridges compute softmax(QK) themselves, whatever Hugging Face would do.
        return type(self.model.blocks[0].attn).__name__ != "AttentionBridge"

    def _active_dropout(self) -> str:
        for module in self.model.original_model.modules():
            if module.training and isinstance(module, nn.Dropout) and module.p > 0:
                return f"p = {module.p}"
        config = getattr(self.model.original_model, "config", None)
        rate = getattr(config, "attention_dropout", 0) or 0
        return f"attention_dropout = {rate}" if rate > 0 and self.model.training else ""

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
        if kind not in ("MLPBridge", "GatedMLPBridge", "JointGateUpMLPBridge"):
            raise UnsupportedArchitectureError(
                refusal(f"the MLP {kind}", "it is neither MLPBridge nor GatedMLPBridge")
            )
        W_in, b_in = linear_weights(getattr(mlp, "in"))
        W_out, b_out = linear_weights(mlp.out)
        if kind == "MLPBridge":
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


def adapt(model: Any) -> Adapter:
    """The adapter of a TransformerLens model.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.

    Returns:
        A fresh adapter; it holds references to the weights.

    Raises:
        UnsupportedArchitectureError: If it is neither, or has a part that cannot be frozen.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if "HookedTransformer" in names:
        return HookedTransformerAdapter(model)
    if any("TransformerBridge" in name for name in names):
        return BridgeAdapter(model)
    raise UnsupportedArchitectureError(
        f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}; a "
        "Hugging Face model is wrapped by tensorlens_tl.capture where the Bridge is installed"
    )
