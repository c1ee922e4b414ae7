"""Value zeroing (Mohebbi et al. 2023): what a layer loses without one token's value vectors.

1. Split every layer's attention step by source token.
2. Take one token's part out, and run what follows in the block anew: norms and MLP, no pattern.
3. Measure the cosine distance between the block's output with and without it.
4. Normalize rows, and multiply the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps import Norm
from ..operator import Capture
from .attention_maps import Matrix, product, rows
from .value_vectors import Split, normed, splits


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute 1 − cos(a, b) as ½‖a/‖a‖ − b/‖b‖‖², which is exact where the two nearly agree."""
    unit = torch.nn.functional.normalize
    return 0.5 * (unit(a, dim=-1) - unit(b, dim=-1)).square().sum(-1)


def _rerun(norm: Norm | None, was: Tensor, x: Tensor) -> Tensor:
    """A norm as the model would run it on x, where the run had the input ``was``."""
    return x if norm is None else normed(norm.moved(was, x), x)


def _passed(norm: Norm | None, was: Tensor, change: Tensor) -> Tensor:
    """What the residual's own norm makes of a change of the sum that it reads."""
    return change if norm is None else _rerun(norm, was, was + change) - normed(norm, was)


def _zeroed(s: Split, key: int) -> Tensor:
    """The block's output with one token's value vectors at zero, everything behind them live."""
    block, mid = s.block, s.block.resid_mid
    mlps = [mlp for mlp in (block.mlp, block.shared) if mlp is not None]
    # With the pattern kept, zeroing v_j takes exactly the part of source j out of the output.
    # 2. Without one token's part: attention's norm, then the MLP.
    attn = _rerun(block.ln1_post, s.out, s.out - s.part(key))
    change = attn - normed(block.ln1_post, s.out)
    if mid is None or not mlps:  # no MLP reads what attention wrote
        # Added to the run's own state, a change brings its own rounding alone.
        return s.resid_post + change
    edits = sum(edit.constant for edit in block.mid_edits)
    summed = block.resid_pre + normed(block.ln1_post, s.out) + edits
    change = _passed(block.mid_norm, summed, change)
    was, x = normed(block.ln2, mid), _rerun(block.ln2, mid, mid + change)
    raw_was = torch.stack([mlp.apply(was) + mlp.bias for mlp in mlps]).sum(0)
    # Frozen ratios would pass the change on linearly; here activations are computed anew.
    moved = [mlp.moved(x - was) for mlp in mlps]
    raw = torch.stack([mlp.apply(x) + mlp.bias for mlp in moved]).sum(0)
    out = normed(block.ln2_post, raw_was)
    change = change + _rerun(block.ln2_post, raw_was, raw) - out
    summed = mid + out + sum(edit.constant for edit in block.post_edits)
    return s.resid_post + _passed(block.post_norm, summed, change)


def value_zeroing_layers(capture: Capture) -> list[Matrix]:
    """Value zeroing (Mohebbi et al. 2023), layer by layer: distances in [0, 2], not normalized."""

    def measure(s: Split, key: int) -> Tensor:
        # 3. How far the block's output moves.
        distance = cosine_distance(s.resid_post, _zeroed(s, key))
        # Rows that the token does not reach differ by rounding at most.
        return torch.where((s.part(key) != 0).any(-1), distance, 0)

    # 1. Every layer, split by token.
    return [s.matrix(lambda key, s=s: measure(s, key)) for s in splits(capture)]


def value_zeroing(capture: Capture) -> Matrix:
    """Value zeroing (Mohebbi et al. 2023): what outputs lose without a token's values, rolled out.

    A layer's matrix is the cosine distance between the block's output at i and the same output
    with v_j = 0. Patterns, and the routing of a mixture of experts, are kept; norms and MLP run
    anew. Rows are normalized, and the layers multiplied. Cost: L runs of every block. The real
    model is not needed: a norm's scale tells ε.

    Args:
        capture: The captured run.

    Returns:
        The matrix; its rows sum to one.
    """
    # 4. Rows, and layers.
    return product(capture, [rows(capture, layer) for layer in value_zeroing_layers(capture)])
