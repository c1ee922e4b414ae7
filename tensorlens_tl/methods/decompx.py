"""DecompX (Modarressi et al. 2023): the last residual split by source token, carried forward.

1. Give every token a state of its own: its embedding at its position, 0 elsewhere.
2. Carry all of them through every block's frozen sublayers, without constants.
3. Take norms at the last residual, or read a target by its covector.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..operator import Capture
from .value_vectors import linear


def decompx_vectors(capture: Capture) -> Float[Tensor, "key_pos batch query_pos d_model"]:
    """DecompX (Modarressi et al. 2023): split the last residual, x_i = Σ_j x_{i⇐j} + constants."""
    # 1. Every token's own state.
    frame, x = capture.frame, capture.blocks[0].resid_pre
    vectors = frame.zeros(x.shape[-1], frame.n_pos)
    keys = torch.arange(frame.n_pos, device=frame.device)
    vectors[keys, :, keys] = (x * frame.real[..., None]).transpose(0, 1)
    # 2. Through every block.
    for block in capture.blocks:
        attn = linear(block.ln1_post, block.attn.apply(linear(block.ln1, vectors)))
        state = linear(block.mid_norm, vectors + attn)
        if block.mlp is not None:
            # A parallel MLP reads the state that attention read, too.
            read = vectors if block.resid_mid is None else state
            for mlp in (block.mlp, *([] if block.shared is None else [block.shared])):
                state = state + linear(block.ln2_post, mlp.apply(linear(block.ln2, read)))
        vectors = linear(block.post_norm, state)
    return vectors


def decompx(
    capture: Capture,
    query: Int[Tensor, " batch"] | None = None,
    covector: Float[Tensor, "batch d_model"] | None = None,
) -> Tensor:
    """DecompX-style vectors (Modarressi et al. 2023), carried forward token by token.

    x_{i⇐j} passes patterns and norm scales as the run had them, and activations by the slope from
    the origin, act(z)/z. Biases are left out. With those choices x_{i⇐j} = T_ij x_j before the
    final norm, so this is the operator's "in" by another road: forward, one vector per source.
    Cost: L forward passes of the frozen model.

    Args:
        capture: The captured run. Its convention settles gated MLPs.
        query: Position of a target, per prompt [batch], or None.
        covector: Covector u of the target [batch, d_model], or None.

    Returns:
        Without a target, the matrix ‖x_{i⇐j}‖ at the last residual [batch, query_pos, key_pos].
        With one, every token's share u · norm(x_{i⇐j}) of the target [batch, pos]; signed. The
        shares and the constants sum to the target.
    """
    vectors = decompx_vectors(capture)
    # 3. Norms, or a target's shares.
    if query is None or covector is None:
        real = capture.frame.real
        return torch.where(real[:, :, None], vectors.norm(dim=-1).permute(1, 2, 0), 0)
    prompts = torch.arange(capture.frame.batch, device=capture.frame.device)
    final = linear(capture.ln_final, vectors)[:, prompts, query]
    return torch.einsum("kbd,bd->bk", final, covector)
