"""What attention scores are computed from: weights of queries and keys, norms, rotations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..refusals import NotRecomputableError, UnsupportedArchitectureError
from ..sublayers import (
    ScoreWeights,
)
from .hook_points import Read
from .host import Host, QueryKeyWeights


def query_key_weights(adapter: Host) -> tuple[QueryKeyWeights, ...]:
    """W_Q, b_Q, W_K and b_K of every block, by reference; norms and rotations come after.

    Args:
        adapter: Adapter of the model.

    Returns:
        One entry per block.

    Raises:
        UnsupportedArchitectureError: If a block's queries and keys are no such products.
    """
    if odd := adapter.unlike("plain"):
        raise UnsupportedArchitectureError(
            f"{odd}, so the model cannot be run edge by edge. "
            'Use lens.attribute(by="edge"), which does not run it.'
        )
    return tuple(adapter.query_key_weights_of(block.attn) for block in adapter.model.blocks)


def whole_norms(adapter: Host) -> dict[Read, nn.Module]:
    """Norms of the queries ("q") or keys ("k") of all heads together, by layer.

    Args:
        adapter: Adapter of the model.

    Returns:
        The host's modules. A norm of each head apart is not among them.
    """
    found: dict[Read, nn.Module] = {}
    for layer, reader in enumerate(adapter.attention):
        for side, norm in zip("qk", reader.norms(), strict=True):
            if norm is not None and norm.whole:
                found[layer, side] = getattr(reader.block.attn, f"{side}_norm")
    return found


def score_weights(adapter: Host, n_pos: int, position_ids: Any) -> Iterator[ScoreWeights]:
    """What the attention scores of every block are made of, by reference.

    Args:
        adapter: Adapter of the model.
        n_pos: Number of positions for which rotations are needed.
        position_ids: Positions of the run, or None for consecutive ones.

    Yields:
        One entry per block.

    Raises:
        NotRecomputableError: If it is not known how the model computes its scores.
    """
    how, weights = adapter.recomputed_reading(), query_key_weights(adapter)
    how.fits(n_pos)
    with torch.no_grad():
        rotations = adapter.rotations(n_pos)
    if rotations is None:
        raise NotRecomputableError(what="rotations", why="the model's tables of them are not found")
    given = torch.as_tensor([0] if position_ids is None else position_ids)
    if any(rotations) and bool((given.diff() != 1).any()):
        raise NotRecomputableError(what="position_ids", why="they are not consecutive")
    rows = zip(adapter.attention, weights, how.scores, rotations, strict=True)
    for layer, (reader, own, s, rotation) in enumerate(rows):
        q_norm, k_norm = reader.norms()
        yield ScoreWeights(
            *own,
            scale=s.scale,
            soft_cap=s.soft_cap,
            q_norm=q_norm,
            k_norm=k_norm,
            rotation=rotation,
            slopes=s.slopes,
            sinks=how.sinks[layer] if how.sinks else None,
            norm_last=reader.norm_last,
        )
