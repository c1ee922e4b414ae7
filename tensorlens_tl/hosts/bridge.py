"""TransformerBridge of transformer_lens 3.x and 4.x: weight layout, attention scores, refusals.

A Bridge wraps each module of a Hugging Face model in a component. How scores are made is told by
the component's class: see ``bridge_reading``, one entry per component and none per architecture.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..costs import forgets
from ..graph import CONTENTS
from ..maps import NormWeights, version
from ..operator import Prompts
from ..readers import (
    AttentionReader,
    DeltaNetReader,
    FusedReader,
    GatedReader,
    LatentReader,
    NormedOutputReader,
    NormedValuesReader,
    PackedMixture,
    QueryKeyWeights,
    RecomputedReading,
    as_rotation,
    bridge_reading,
    drop_pattern,
    eager_experts,
    gate_of,
    gated_mlp,
    head_weights,
    inner,
    joined_mlp,
    layer_scalar,
    linear_weights,
    norm_eps,
    packed_weights,
    rotary_tables,
    rotates,
    shared_expert,
)
from ..refusals import (
    NotRecomputableError,
    UnsupportedArchitectureError,
    act_name,
    check_architecture,
    faulty_option,
    flags_off,
    refusal,
    xielu_name,
)
from ..sublayers import (
    AttentionWeights,
    BlockWeights,
    ExpertsWeights,
    GatedMLPWeights,
    MLPWeights,
    Rotation,
    UnembedWeights,
)
from .adapter import Adapter
from .embedded import from_embeddings

UNASKED = "_tensorlens_unasked"
"""Attribute of a Bridge that a call made for itself: how to unwrap it if its first run is refused.
"""

BRIDGE = "_tensorlens_bridge"
"""Attribute of a Hugging Face model that holds the Bridge around it."""

_HALVES_INTERLEAVED = ("GlmForCausalLM", "Glm4ForCausalLM", "Ernie4_5ForCausalLM")
"""Architectures that turn neighbours by the first half of their tables, each entry for two."""


_multiplied: WeakKeyDictionary[Any, dict] = forgets(WeakKeyDictionary())
"""Weights with their multipliers, by model and place; they are made once, and when one changes."""


class BridgeAdapter(Adapter):
    """``TransformerBridge`` of transformer_lens 3.x and 4.x, raw or in compatibility mode."""

    before_edits = frozenset({"resid_mid", "z_in", "shared.post", "into_output"})

    def check_model(self) -> None:
        flags_off(self.cfg)
        check_architecture(self.architecture, self.model.original_model)
        config = getattr(self.model.original_model, "config", None)
        what, remedy = faulty_option(self.architecture, config)
        # Of a wrapped model the comparison with Hugging Face has told.
        if what != self.architecture and BRIDGE not in vars(self.model.original_model):
            why = "its Bridge gives other logits than Hugging Face's model"
            raise UnsupportedArchitectureError(refusal(what, why, remedy))
        folded = getattr(self.model, "compatibility_mode", False)
        if folded and any(name.endswith("sinks") for name, _ in self.model.named_parameters()):
            raise UnsupportedArchitectureError(
                refusal(
                    f"{self.architecture} in compatibility mode",
                    "value biases are folded as if patterns summed to 1, and attention sinks take "
                    "a share",
                    "Capture the model without enable_compatibility_mode().",
                )
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
        part = self.attentions[0].original_component
        if kind == "standard" or hasattr(part, "embed_positions") or hasattr(part, "rotary"):
            return self.cfg.n_ctx
        return getattr(self.model.original_model.config, "max_seq_len", sys.maxsize)

    @cached_property
    def act_fn(self) -> str:
        for name, module in self.model.blocks[0].named_modules():
            if re.search(r"\b(act|act_fn|activation_fn|gelu_impl|intermediate_act_fn)$", name):
                return act_name(module)
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
        attn = next(b.attn for b in self.model.blocks if hasattr(b, "attn"))
        made_here = getattr(attn.original_component, "accepts_pattern_fn", False)
        return type(attn).__name__ == "AttentionBridge" and not made_here

    def _active_dropout(self) -> str:
        for _, module in self.tree.inner:
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
        shifted = rms and getattr(self.cfg, "rmsnorm_uses_offset", False)
        offset = 1.0 if shifted or kind.endswith(("LayerNorm1P", "CenteredRMSNorm")) else 0.0
        w, b = getattr(component, "weight", None), getattr(component, "bias", None)
        return NormWeights(w, b, center=not rms, offset=offset, eps=norm_eps(component))

    def attention_reader(self, block: Any) -> AttentionReader:
        if getattr(block, "attn", None) is None and hasattr(block, "linear_attn"):
            return DeltaNetReader.of(self, block)
        attn, d_head = block.attn, self.cfg.d_head
        if type(attn).__name__ == "MLAAttentionBridge":
            return LatentReader.of(self, block)
        if not hasattr(attn, "v") and hasattr(attn.original_component, "c_attn"):
            return FusedReader.of(self, block)
        # Gemma-4 may share one matrix between keys and values; the widths of its layers differ.
        part, own = attn.original_component, getattr(attn, "submodules", {})
        d_head = getattr(part, "head_dim", d_head)
        W_V, b_V = linear_weights(attn.k if getattr(part, "v_proj", part) is None else attn.v)
        W_O, b_O = linear_weights(attn.o)
        weights = AttentionWeights(
            W_V.unflatten(1, (-1, d_head)).transpose(0, 1),
            None if b_V is None else b_V.unflatten(0, (-1, d_head)),
            W_O.unflatten(0, (-1, d_head)),
            b_O,
        )
        weights = self.multiplied("residual_multiplier", weights)
        if getattr(self.cfg, "gated_q_proj", False):
            return GatedReader(self, block, weights, "attn.hook_q_gate", "sigmoid")
        if "gate" in own and hasattr(attn, "gate"):
            return GatedReader(self, block, weights, "attn.gate.hook_out", gate_of(attn))
        if "v_norm" in own:
            return NormedValuesReader(self, block, weights)
        if hasattr(part, "attn_sub_norm"):
            return NormedOutputReader(self, block, weights)
        return AttentionReader(self, block, weights)

    @property
    def attentions(self) -> list[Any]:
        """The attention of every block that has one with a pattern."""
        return [r.block.attn for r in self.attention if r.has_pattern]

    def block_weights(self, block: Any, attention: AttentionReader) -> BlockWeights:
        norm = self.norms_of(block)
        mlp = getattr(block, "mlp", None)
        own = None if mlp is None else self._mlp_weights(mlp)
        return BlockWeights(
            attention.weights,
            self.multiplied("residual_multiplier", own),
            norm("ln1"),
            norm("ln2") if mlp is not None else None,
            norm("ln1_post"),
            norm("ln2_post"),
            parallel="Parallel" in type(block).__name__,
            shared=self._shared_weights(mlp),
            mid_norm=norm("mid_norm"),
            post_norm=norm("post_norm") or layer_scalar(block),
        )

    def _shared_weights(self, mlp: Any) -> GatedMLPWeights | None:
        if (shared := shared_expert(inner(mlp))) is None:
            return None
        act = self.activation(act_name(getattr(shared, "act_fn", None) or shared.activation_fn))
        return gated_mlp(shared, (shared.gate_proj, shared.up_proj, shared.down_proj), act)

    def _mlp_weights(self, mlp: Any) -> MLPWeights | GatedMLPWeights | ExpertsWeights:
        if hasattr(module := inner(mlp), "experts"):
            return packed_weights(inner(module.experts), lambda m: self.activation(act_name(m)))
        kind, act = type(mlp).__name__, xielu_name(mlp) or self.activation()
        if getattr(mlp, "_bound_dense_gate", False):  # a dense block among mixtures
            return gated_mlp(mlp, (mlp.dense_gate, mlp.dense_in, mlp.dense_out), act)
        if str(self.cfg.act_fn).endswith("_ln"):
            kind = f"{kind} with {self.cfg.act_fn}"
        plain = kind in ("MLPBridge", "BloomMLPBridge")
        if not plain and kind not in ("GatedMLPBridge", "JointGateUpMLPBridge"):
            raise UnsupportedArchitectureError(
                refusal(f"the MLP {kind}", "it is neither MLPBridge nor GatedMLPBridge")
            )
        part = inner(mlp)
        shown = hasattr(mlp, "in")
        W_in, b_in = linear_weights(getattr(mlp, "in") if shown else part.c_fc)
        W_out, b_out = linear_weights(mlp.out if shown else part.c_proj)
        if hasattr(part, "Wi"):  # ModernBERT's
            return joined_mlp(W_in, b_in, W_out, b_out, act)
        if plain:
            return MLPWeights(W_in, b_in, W_out, b_out, act)
        return gated_mlp(mlp, (mlp.gate, getattr(mlp, "in"), mlp.out), act)

    def mixture(self, layer: int) -> PackedMixture:
        factor = self.multiplier("residual_multiplier")
        return PackedMixture(inner(self.model.blocks[layer].mlp), factor)

    def mlp_points(self, layer: int) -> dict[str, nn.Module]:
        mlp = self.model.blocks[layer].mlp
        part: Any = inner(mlp)
        if hasattr(part, "Wi"):
            return {"pre_and_up": getattr(mlp, "in"), "post": mlp.hook_post}
        hidden = type(mlp).__name__ == "MLPBridge" and not hasattr(mlp, "in")
        return {"pre": part.c_fc, "post": part.act} if hidden else {}

    def unembed_weights(self) -> UnembedWeights:
        W_U, b_U = linear_weights(self.model.unembed)
        head = getattr(self.model, "prediction_head", None)
        if b_U is not None and not bool(b_U.any()):
            b_U = None  # zeros that the Bridge adds where the model has no bias
        own = None if head is None else head_weights(inner(head), self.activation)
        weights = UnembedWeights(W_U, b_U, self.soft_cap(), own)
        self.raw_factor = self.multiplier("output_multiplier")  # Muse Glimmer's
        weights = self.multiplied("output_multiplier", weights)
        return self.multiplied("logits_scaling", self.multiplied("logit_scale", weights))

    @property
    def readout(self) -> nn.Module:
        return getattr(self.model, "prediction_head", None) or super().readout

    # --- Multipliers

    def multiplier(self, option: str) -> float:
        """A factor of Hugging Face's by which an activation, or the logits, are multiplied."""
        # Compatibility mode folds the logits' scale itself, and then sets the model's own to 1.
        model = self.model.original_model
        holder = model if option == "logit_scale" else getattr(model, "config", None)
        holder = getattr(holder, "text_config", holder)
        factor = float(getattr(holder, option, None) or 1)
        return 1 / factor if option == "logits_scaling" else factor

    def multiplied(self, option: str, weights: Any) -> Any:
        """Fold the multiplier of what a sublayer, or the unembedding, gives into its weights.

        Args:
            option: The multiplier's name in the configuration.
            weights: Weights of the sublayer, or None.

        Returns:
            The same weights where the multiplier is 1, else ones whose outputs are multiplied.

        Raises:
            UnsupportedArchitectureError: If a norm stands before the multiplier.
        """
        if (factor := self.multiplier(option)) == 1 or weights is None:
            return weights
        if option == "residual_multiplier" and self.norm(self.model.blocks[0], "ln1_post"):
            why = "it multiplies what a norm gives"
            raise UnsupportedArchitectureError(refusal(f"{option}={factor}", why))
        known, changed = _multiplied.setdefault(self.model, {}), {}
        for name in ("W_O", "b_O", "W_out", "b_out", "W_U", "b_U"):
            if (W := getattr(weights, name, None)) is not None:
                place, now = (W.data_ptr(), W.shape, W.stride()), (version(W), factor)
                if known.get(place, (None,))[0] != now:
                    known[place] = now, W.detach() * factor
                changed[name] = known[place][1]
        return replace(weights, **changed)

    # --- What enters block 0

    @property
    def source_hooks(self):
        names = super().source_hooks
        if self.multiplier("embedding_multiplier") != 1:
            names["embed"] = self.model.embed  # its hook point is passed over without a hook there
        sinusoids = self.tree.by_end.get("embed_positions", ())
        if sinusoids and "hook_pos_embed" not in self.hooks:
            names["pos_embed"] = sinusoids[-1]  # XGLM's, which the host does not wrap
        return names

    def sources_of(self, seen, prompts, kwargs):
        parts = super().sources_of(seen, prompts, kwargs)
        if (factor := self.multiplier("embedding_multiplier")) != 1:
            parts |= {name: x * factor for name, x in parts.items() if name in CONTENTS}
        return parts

    def prepare(self, inputs: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Prompts]:
        return from_embeddings(self, inputs, kwargs) or super().prepare(inputs, kwargs)

    def run(self, inputs: Any, kwargs: Mapping[str, Any]) -> Tensor:
        config = getattr(self.model.original_model, "config", None)
        config = getattr(config, "attn_config", config)  # MPT
        clip: float = getattr(config, "clip_qkv", None) or 0.0
        points = [attn.hook_v for attn in self.attentions] if clip else []

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
            mixtures = (inner(getattr(block, "mlp", None)) for block in self.model.blocks)
            with eager_experts([inner(m.experts) for m in mixtures if hasattr(m, "experts")]):
                logits = super().run(inputs, kwargs)
            vars(self.model).pop(UNASKED, None)
            return logits
        except UnsupportedArchitectureError:
            if (unwrap := vars(self.model).pop(UNASKED, None)) is not None:
                unwrap()
            raise
        finally:
            for hook in watching:
                hook.remove()

    # --- Attention scores

    def recomputed_reading(self) -> RecomputedReading:
        for reader in self.attention:
            if not (reader.has_pattern and reader.shows_queries):
                why = "it has no pattern" if not reader.has_pattern else "one product makes them"
                raise NotRecomputableError(what=reader.kind, why=why)
        attentions = self.attentions
        found = bridge_reading(self)
        keepers = [attn for attn in attentions if hasattr(attn, "_pattern")]

        def listen() -> list[Any]:
            return found.listen() + [a.register_forward_hook(drop_pattern) for a in keepers]

        return replace(found, listen=listen)

    def query_key_weights_of(self, attn: Any) -> QueryKeyWeights:
        d_head = getattr(attn.original_component, "head_dim", self.cfg.d_head)
        (W_Q, b_Q), (W_K, b_K) = (
            (
                W.unflatten(1, (-1, d_head)).transpose(0, 1),
                None if b is None else b.unflatten(0, (-1, d_head)),
            )
            for W, b in (linear_weights(attn.q), linear_weights(attn.k))
        )
        return W_Q, b_Q, W_K, b_K

    def rotations(self, n_pos: int) -> Sequence[Rotation | None] | None:
        attentions, cfg = [block.attn for block in self.model.blocks], self.cfg
        parts = [attn.original_component for attn in attentions]
        if (tables := rotary_tables(parts[0])) is not None:
            cos, sin = (table[:n_pos] for table in tables)
            return [Rotation(cos, sin, True)] * len(parts)
        if getattr(cfg, "positional_embedding_type", None) != "rotary":
            return [None] * len(parts)
        config = getattr(parts[0], "config", None)
        rope = getattr(config, "rope_parameters", None) or {}
        beta, first = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        if beta and first and n_pos > first:
            why = f"queries from position {first} on are scaled after their rotation"
            raise NotRecomputableError(f"llama_4_scaling_beta={beta}", why)
        kinds = getattr(config, "layer_types", None) or [None] * len(parts)
        found: dict[str | None, Rotation | None] = {}
        for kind in dict.fromkeys(kinds):
            found[kind] = self._rotation(n_pos, kind)
        if None in found.values():
            return None
        turned = [rotates(attn) for attn in attentions]
        return [found[kind] if turns else None for kind, turns in zip(kinds, turned, strict=True)]

    @property
    def turns_neighbours(self) -> bool:
        return self.architecture in _HALVES_INTERLEAVED

    def _rotation(self, n_pos: int, kind: str | None) -> Rotation | None:
        """What the model's rotary module gives for a kind of layers; None if it is not found."""
        first = self.model.blocks[0]
        for _, module in self.tree.inner:
            rotary = getattr(module, "rotary_emb", None)
            # A tower of pictures or sounds may have one of its own, but not these blocks.
            if rotary is not None and any(part is first for part in module.modules()):
                rotary = getattr(rotary, "original_component", rotary)  # no hook is to fire
                known = inspect.signature(rotary.forward).parameters
                of = {"layer_type": kind} if "layer_type" in known else {}
                x, n = self.weights.unembed.W_U.detach()[:1], max(n_pos, 2)  # one row has no layout
                try:
                    tables = rotary(x, torch.arange(n, device=x.device)[None], **of)
                except TypeError:  # one that asks for more than positions
                    return None
                cos, sin, adjacent = as_rotation(self, tables)
                return Rotation(cos[0, :n_pos], sin[0, :n_pos], adjacent)
        return None
