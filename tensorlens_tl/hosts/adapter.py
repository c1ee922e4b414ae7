"""What the library asks of a host model, and the names that transformer_lens gives its hook points.

An adapter reads a TransformerLens model and answers four questions in framework-free terms: what
are the weights (:class:`ModelWeights`), where is each activation to be read
(:meth:`Adapter.points`),
what are the tokens (:class:`Prompts`), and how is the model run. It never edits the run. The two
classes of hosts are in ``adapters``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..graph import FINAL_SITE, resid_site
from ..operator import Prompts
from ..sublayers import (
    BlockWeights,
    EmbedWeights,
    GatedMLPWeights,
    ModelWeights,
    NormWeights,
    UnembedWeights,
)
from .supported import UnsupportedArchitectureError, refusal
from .tokens import as_ids, check_arguments, check_tokens, is_text, mask_spans, tokenize

_ACTIVATIONS = {
    "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_fast",
    "gelu_bloom": "gelu_bloom", "quick_gelu": "quick_gelu", "solu": "solu", "solu_ln": "solu",
}  # fmt: skip

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

    def embed_weights(self) -> EmbedWeights | None:
        """The embedding matrix and, where the host has one, the norm that its rows pass."""
        if (W_E := getattr(self.model, "W_E", None)) is None:
            return None
        norm = getattr(self.model, "embed_ln", None) or getattr(self.model.embed, "ln", None)
        weights = self.norm_weights(norm)
        return EmbedWeights(W_E, weights, 0.0 if weights is None else norm_eps(norm))

    @property
    def attends_apart(self) -> bool:
        """Whether an attention of the host's source runs, and shows its pattern when it is done.

        What a hook returns for that pattern is then discarded.
        """
        return False

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

    @property
    def n_ctx(self) -> int:
        """Tokens that a prompt may have."""
        return self.cfg.n_ctx

    @property
    def act_fn(self) -> str:
        """The activation's name in the host's words."""
        return self.cfg.act_fn

    def activation(self) -> str:
        """The activation's canonical name.

        Returns:
            A key of :data:`tensorlens_tl.sublayers.primitives.RATIOS`.

        Raises:
            UnsupportedArchitectureError: If it has no closed-form ratio here.
        """
        act = self.act_fn
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
        return {name: p for name, p in found.items() if p is not None and _edited(p)}

    def foreign_hooks(self) -> list[str]:
        """Names of the hook points and modules that carry forward hooks of somebody else."""
        points = {id(point): name for name, point in self.hooks.items() if _edited(point)}
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
            if point is not None and _edited(point):
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
        check_tokens(tokens, self.n_ctx, self.cfg.d_vocab)
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


def norm_eps(norm: Any) -> float:
    """What a host's norm adds to the variance; 0 for none."""
    norm = getattr(norm, "original_component", norm)
    found = getattr(norm, "variance_epsilon", None)
    return float(getattr(norm, "eps", 0.0) if found is None else found)


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


def flags_off(cfg: Any) -> None:
    """Refuse the flags under which every head has its own norm.

    Args:
        cfg: The model's configuration.

    Raises:
        ValueError: If one is on.
    """
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(cfg, flag, False):
            raise ValueError(
                f"cfg.{flag} is on, expected off: it gives every head its own norm. Call "
                f"model.set_{flag}(False) before the capture"
            )


def _edited(point: Any) -> bool:
    """Whether hooks stand there that the host did not put there itself."""

    # transformer_lens 4 gives OPT's MLP back its shape by permanent hooks of its own.
    def own(handle: Any) -> bool:
        made_by = getattr(getattr(handle, "user_hook", None), "__module__", None) or ""
        return handle.is_permanent and made_by.startswith("transformer_lens")

    return any(not own(handle) for handle in point.fwd_hooks)
