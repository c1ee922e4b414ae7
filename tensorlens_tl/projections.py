"""Query and key matrices of either host in the canonical layout: what a head reads with, before rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .adapters import Adapter, linear_weights


@dataclass(frozen=True, eq=False)
class QueryKeyWeights:
    """q_h = x W_Q^h + b_Q^h and k_g = x W_K^g + b_K^g; a norm of queries and keys comes after.

    Under grouped-query attention there are fewer kv_heads than heads: query head h reads kv_head
    h // (heads // kv_heads), and nothing is repeated.
    """

    W_Q: Float[Tensor, "head d_model d_head"]
    b_Q: Float[Tensor, "head d_head"] | None
    W_K: Float[Tensor, "kv_head d_model d_head"]
    b_K: Float[Tensor, "kv_head d_head"] | None


def query_key_weights(adapter: Adapter) -> tuple[QueryKeyWeights, ...]:
    """Every block's, referenced from the model.

    Args:
        adapter: The model's.

    Returns:
        One per block.
    """
    return tuple(_of(block.attn, int(adapter.cfg.d_head)) for block in adapter.model.blocks)


def _of(attn: Any, d_head: int) -> QueryKeyWeights:
    if hasattr(attn, "original_component"):  # a Bridge's, of linear components
        (W_Q, b_Q), (W_K, b_K) = linear_weights(attn.q), linear_weights(attn.k)
        return QueryKeyWeights(
            W_Q.unflatten(1, (-1, d_head)).transpose(0, 1),
            None if b_Q is None else b_Q.unflatten(0, (-1, d_head)),
            W_K.unflatten(1, (-1, d_head)).transpose(0, 1),
            None if b_K is None else b_K.unflatten(0, (-1, d_head)),
        )
    # The grouped class keeps the raw weights in _W_K and repeats them in W_K.
    W_K, b_K = (attn._W_K, attn._b_K) if hasattr(attn, "_W_K") else (attn.W_K, attn.b_K)
    return QueryKeyWeights(attn.W_Q, attn.b_Q, W_K, b_K)
