"""What a host's attention scores are made of: W_Q, W_K, norms and rotation in one canonical layout.

Nothing of the run is read for it. Whether the layout is right is told by the run all the same: the
pattern recomputed from it must be the captured one (``query_key``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..sublayers import Rotation, ScoreWeights
from .adapter import Adapter, norm_eps
from .attention_reading import NotRecomputableError, Queries
from .bridge import linear_weights
from .hooked_transformer import HookedTransformerAdapter

_HALVES_INTERLEAVED = ("GlmForCausalLM", "Glm4ForCausalLM", "Ernie4_5ForCausalLM")
"""Architectures that turn neighbours by the first half of their tables, each entry for two."""


def score_weights(adapter: Adapter, n_pos: int) -> tuple[ScoreWeights, ...] | None:
    """The weights of every block's attention scores, referenced.

    Args:
        adapter: The model's.
        n_pos: For how many positions rotations are needed.

    Returns:
        One entry per block, or None where it is not known how this model's scores are computed.
    """
    try:
        how = Queries.of(adapter)
    except NotRecomputableError:
        return None
    if how.sinks:  # a pattern with sinks is no softmax of the scores alone
        return None
    layouts = query_key_weights(adapter)
    with torch.no_grad():
        rotations = _rotations(adapter, n_pos)
    if rotations is None:
        return None
    found = []
    blocks, d_head = adapter.model.blocks, adapter.cfg.d_head
    for block, layout, scores, rotation in zip(blocks, layouts, how.scores, rotations, strict=True):
        attn = block.attn
        norms = [getattr(attn, name, None) for name in ("q_norm", "k_norm")]
        q_norm, k_norm = map(adapter.norm_weights, norms)
        if any(w is not None and w.w is not None and len(w.w) != d_head for w in (q_norm, k_norm)):
            return None  # OLMo-2 norms all heads together
        found.append(
            ScoreWeights(
                *layout, scale=scores.scale, soft_cap=scores.soft_cap,
                q_norm=q_norm, k_norm=k_norm, eps=norm_eps(norms[0]), rotation=rotation,
                slopes=scores.slopes,
            )
        )  # fmt: skip
    return tuple(found)


Layout = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""W_Q [head, d_model, d_head], b_Q, W_K [kv_head, d_model, d_head], b_K; no bias is None."""


def query_key_weights(adapter: Adapter) -> tuple[Layout, ...]:
    """W_Q, b_Q, W_K and b_K of every block, referenced; norms and rotations come after them."""
    of_block = _hooked if isinstance(adapter, HookedTransformerAdapter) else _bridged
    return tuple(of_block(block.attn, adapter.cfg.d_head) for block in adapter.model.blocks)


def _hooked(attn: Any, d_head: int) -> Layout:
    # The grouped class keeps the raw weights in _W_K and repeats them in W_K.
    grouped = hasattr(attn, "_W_K")
    return attn.W_Q, attn.b_Q, *((attn._W_K, attn._b_K) if grouped else (attn.W_K, attn.b_K))


def _bridged(attn: Any, d_head: int) -> Layout:
    (W_Q, b_Q), (W_K, b_K) = (
        (W.unflatten(1, (-1, d_head)).transpose(0, 1),
         None if b is None else b.unflatten(0, (-1, d_head)))
        for W, b in (linear_weights(attn.q), linear_weights(attn.k))
    )  # fmt: skip
    return W_Q, b_Q, W_K, b_K


def _rotations(adapter: Adapter, n_pos: int) -> Sequence[Rotation | None] | None:
    """Every block's rotation, from the host's own tables; None where they are not found."""
    blocks, cfg = adapter.model.blocks, adapter.cfg
    if getattr(cfg, "positional_embedding_type", None) != "rotary":
        return [None] * len(blocks)
    adjacent = bool(getattr(cfg, "rotary_adjacent_pairs", False))
    if hasattr(blocks[0].attn, "rotary_cos"):
        tables = ((block.attn.rotary_cos, block.attn.rotary_sin) for block in blocks)
        return [Rotation(cos[:n_pos], sin[:n_pos], adjacent) for cos, sin in tables]
    parts = [block.attn.original_component for block in blocks]
    if type(parts[0]).__name__ == "NativeAttention":
        rotary = parts[0].rotary
        tables = (rotary.cos_cached[:n_pos], rotary.sin_cached[:n_pos])
        return [Rotation(*tables, True)] * len(blocks)
    for name, module in adapter.model.original_model.named_modules():
        if name.rpartition(".")[2] == "rotary_emb":
            rotary = getattr(module, "original_component", module)  # no hook is to fire
            x = adapter.weights.unembed.W_U[:1]
            try:
                cos, sin = rotary(x, torch.arange(n_pos, device=x.device)[None])
            except TypeError:  # one that asks for more than positions
                return None
            if adapter.architecture in _HALVES_INTERLEAVED:
                half, adjacent = cos.shape[-1] // 2, True
                cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
            return [Rotation(cos[0], sin[0], adjacent)] * len(blocks)
    return None
