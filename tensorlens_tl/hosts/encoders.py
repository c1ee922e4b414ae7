"""BERT and its like in a Bridge: norms on the residual itself, with or without a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..graph import resid_site
from ..maps import NormWeights
from ..operator import Prompts
from ..readers import linear_weights
from ..refusals import UnsupportedArchitectureError, act_name, refusal
from ..sublayers import HeadWeights, UnembedWeights
from .bridge import BridgeAdapter

ENCODER = "_tensorlens_encoder"
"""Attribute of a model that was made around an encoder without a head: the encoder, and the module
in the head's place."""


_DECODERS = ("OpenAIGPTLMHeadModel",)
"""Decoders whose blocks normalize the sums, which the names of their norms do not tell."""


def post_norm_adapter(model: Any) -> type[PostNormAdapter] | None:
    """The adapter of a Bridge whose blocks normalize the residual itself; None for another one."""
    if getattr(model.cfg, "architecture", None) in _DECODERS:
        return PostNormAdapter
    norm = getattr(next(iter(getattr(model, "blocks", [])), None), "ln1", None)
    return EncoderAdapter if str(getattr(norm, "name", "")).endswith("output.LayerNorm") else None


class PostNormAdapter(BridgeAdapter):
    """A Bridge whose blocks normalize the residual itself, after each sum, as GPT-1 and BERT do."""

    def final_norm(self) -> NormWeights | None:
        return None  # a module of that name is in the head

    def norm_names(self, block: Any) -> dict[str, str]:
        return {"mid_norm": "ln1", "post_norm": "ln2"}

    def residual_hooks(self, layer: int) -> dict[str, str]:
        sums = {"mid_sum": f"blocks.{layer}.ln1.hook_in", "post_sum": f"blocks.{layer}.ln2.hook_in"}
        # GPT-1's blocks return lists, at which the host's hook of a block does not fire.
        end = f"blocks.{layer}.ln2.hook_out"
        return sums | {"resid_pre": resid_site(layer, "pre"), "resid_post": end}

    def prepare(self, inputs: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Prompts]:
        kwargs, prompts = super().prepare(inputs, kwargs)
        mask = None if self.attends_ahead else kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            why = "its Bridge then reads later tokens, which Hugging Face's model does not"
            remedy = "Capture prompts one by one, or those of one length together."
            raise UnsupportedArchitectureError(refusal(f"{self.name} with padding", why, remedy))
        return {k: v for k, v in kwargs.items() if v is not mask or mask is None}, prompts


class EncoderAdapter(PostNormAdapter):
    """A Bridge around BERT, RoBERTa, or the like, with or without a head."""

    def residual_hooks(self, layer: int) -> dict[str, str]:
        return {**super().residual_hooks(layer), "resid_post": resid_site(layer, "post")}

    @property
    def attends_ahead(self) -> bool:
        return True

    @property
    def n_types(self) -> int:
        return len(self.model.token_type_embed.weight)

    @property
    def headless(self) -> bool:
        """Whether an encoder without a head is inside; see ``wrapping.within_head``."""
        return ENCODER in vars(self.model.original_model)

    @property
    def readout(self) -> nn.Module:
        inner = self.model.original_model
        return vars(inner)[ENCODER][1] if self.headless else super().readout

    @property
    def source_hooks(self) -> dict[str, Any]:
        # Below the norm of the embeddings; hook_embed is behind it.
        names = {"embed": "embed", "pos_embed": "pos_embed", "type_embed": "token_type_embed"}
        return {source: f"{name}.hook_out" for source, name in names.items()}

    def embed_norm(self) -> NormWeights | None:
        return self.norm_weights(self.model.embed_ln)

    def unembed_weights(self) -> UnembedWeights:
        if self.headless:  # what it returns is read as it is
            like = self.model.embed.weight
            eye = torch.eye(self.cfg.d_model, dtype=like.dtype, device=like.device)
            return UnembedWeights(eye, None)
        norm = self.norm_weights(self.model.ln_final)
        modules = self.tree.inner
        own = [m for name, m in modules if name.endswith("transform_act_fn")]  # RoBERTa has none
        act = self.activation(act_name(own[0] if own else nn.GELU()))
        head = HeadWeights(*linear_weights(self.model.mlm_head), act, cast(NormWeights, norm))
        return replace(super().unembed_weights(), head=head)
