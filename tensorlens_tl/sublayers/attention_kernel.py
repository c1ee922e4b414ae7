"""Scores of queries and keys, and products with the pattern, block by block.

The algorithm is described in :mod:`tensorlens_tl.sublayers.recomputed_pattern`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

LN2 = math.log(2.0)
ROWS, COLUMNS, CELLS = 128, 2048, 2**18
"""Rows and columns of the largest block, and cells of the blocks of all heads together on a CPU.

2^18 cells of float32 are one MiB, which stays in the cache of a core.
"""
ACCELERATOR = 512, 4096, 2**26
"""The same on an accelerator, where the launch of a kernel is what costs."""


@dataclass(frozen=True)
class Scores:
    """How scores come from queries and keys: cap · tanh(q·k · scale / cap) − slope · distance.

    Attributes:
        scale: Factor of q·k.
        causal: Whether a query sees no later key.
        soft_cap: Largest absolute score, or None.
        window: Number of keys that a query sees, its own included, or None for all. Causal only.
        slopes: ALiBi's loss of score per position of distance, one per query head, or None. Causal
            only. (Press et al. 2022, arXiv 2108.12409.)
    """

    scale: float
    causal: bool = True
    soft_cap: float | None = None
    window: int | None = None
    slopes: tuple[float, ...] | None = None

    def __post_init__(self):
        cap = 1.0 if self.soft_cap is None else self.soft_cap
        if not (math.isfinite(self.scale) and math.isfinite(cap) and cap > 0):
            raise ValueError(f"{self} is not usable. Give a finite scale and a positive soft cap.")
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(
                f"{self} is not usable. Give a window of at least 1, and causal attention."
            )
        if self.slopes is not None and not self.causal:
            raise ValueError(f"{self} is not usable. Give slopes with causal attention only.")

    def reach(self, start: int, stop: int, length: int, pull: bool) -> tuple[int, int]:
        """The columns that rows [start, stop) meet: keys of queries, or queries of keys (pull)."""
        if not self.causal:
            return 0, length
        window = length if self.window is None else self.window
        if pull:
            # A key is seen by itself, by later queries, and by none beyond its window.
            return start, min(length, stop + window - 1)
        return max(0, start - window + 1), stop

    def mask_(self, block: Tensor, offset: int, pull: bool) -> Tensor:
        """Set a block of A to zero, in place, where a query must not see a key.

        Args:
            block: The block [..., row, column].
            offset: Position of the first row minus position of the first column.
            pull: Whether rows are keys and columns queries.

        Returns:
            The same block.
        """
        if not self.causal:
            return block
        # Exponentials may overflow to inf above the diagonal. tril_ sets cells to 0 and multiplies
        # none.
        near = block.triu_(offset) if pull else block.tril_(offset)
        if self.window is None:
            return near
        far = self.window - 1
        return near.tril_(offset + far) if pull else near.triu_(offset - far)

    def slopes_in_bits(self, like: Tensor, kv_heads: int) -> Tensor | None:
        """The slopes in bits [repeat, kv_head, 1, 1] in the dtype of ``like``, or None."""
        if self.slopes is None:
            return None
        # Scores are kept in bits, so that exp2 serves, which is cheaper than exp.
        slopes = torch.tensor(self.slopes, dtype=like.dtype, device=like.device) / LN2
        return slopes.view(kv_heads, -1, 1, 1).transpose(0, 1)


def capped_(products: Tensor, scores: Scores) -> Tensor:
    """Apply the soft cap, in place: turn q·k · scale / cap into capped scores in bits."""
    return products if scores.soft_cap is None else products.tanh_().mul_(scores.soft_cap / LN2)


def _block_sizes(like: Tensor, heads: int, length: int, width: int) -> tuple[int, int, int]:
    """Heads, rows and columns of a block, when a position has ``width`` numbers of values."""
    rows, columns, cells = (ROWS, COLUMNS, CELLS) if like.device.type == "cpu" else ACCELERATOR
    # As many heads at once as leave both the block and the values of those heads in the cache.
    rows, columns = min(rows, length), min(columns, length)
    return max(1, min(heads, cells // max(rows * columns, length * width))), rows, columns


def add_alibi_bias_(block: Tensor, slopes: Tensor, offset: int, pull: bool) -> Tensor:
    """Subtract ALiBi's slope · (query − key) from scores, in place; ``offset`` as in ``mask_``."""
    like = {"dtype": block.dtype, "device": block.device}
    rows, columns = (torch.arange(n, **like) for n in block.shape[-2:])
    # Rows are keys in a pull, so (row − column) is minus the distance there.
    return block.addcmul_(slopes, rows[:, None] + offset - columns, value=1 if pull else -1)


def mix_blocks(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    out: Tensor,
    scores: Scores,
    slopes: Tensor | None,
    pull: bool,
) -> None:
    """Write out_i = Σ_r Σ_j A_r[i, j] values_j in one prompt, or with A_r[j, i] for a pull.

    Args:
        q: Queries [q · scale / ln 2, −lse] of the heads r that share keys
            [repeat, head, d_score, pos].
        k: Keys [k, 1], with axes [head, d_score, pos].
        values: Values to mix [repeat, many, head, pos, width].
        out: Tensor that receives the result [many, head, pos, width].
        scores: Soft cap and mask.
        slopes: ALiBi's slopes in bits [repeat, head, 1, 1], or None.
        pull: Whether rows are keys and columns queries.
    """
    # −lse rides along as one more coordinate, so the product is the exponent at once. Under a soft
    # cap, tanh comes between, and −lse is added afterwards.
    width = slice(None) if scores.soft_cap is None else slice(-1)
    repeat, many, n_heads, length, d = values.shape
    n, height, broad = _block_sizes(q, n_heads, length, many * d)
    cells = q.new_empty(n * height * broad)
    # The vectors stand side by side in one copy, which stays in the cache while its head is served.
    side, sums = q.new_empty(n, length, many, d), q.new_empty(n, length, many * d)
    for first, r in product(range(0, n_heads, n), range(repeat)):
        h = slice(first, min(first + n, n_heads))
        c = h.stop - first
        v = side[:c].copy_(values[r, :, h].permute(1, 2, 0, 3)).flatten(2)
        rows, columns = (k[h, width], q[r, h, width]) if pull else (q[r, h, width], k[h, width])
        rows = rows.mT  # a copy in that order costs more than the product gains
        for start in range(0, length, height):
            i = slice(start, min(start + height, length))
            left, right = scores.reach(i.start, i.stop, length, pull)
            # Columns outside [left, right) are masked for every row of the block: they are not
            # computed.
            for at in range(left, right, broad):
                j = slice(at, min(at + broad, right))
                size = c, i.stop - start, j.stop - at
                block = cells[: math.prod(size)].view(size)
                torch.bmm(rows[:, i], columns[..., j], out=block)
                if scores.soft_cap is not None:
                    lse = q[r, h, -1, j].unsqueeze(1) if pull else q[r, h, -1, i].unsqueeze(2)
                    capped_(block, scores).add_(lse)
                if slopes is not None:
                    add_alibi_bias_(block, slopes[r, h], start - at, pull)
                scores.mask_(block.exp2_(), start - at, pull)
                # beta=0 overwrites what is left of the group before; later blocks and repeats add
                # up.
                sums[:c, i].baddbmm_(block, v[:, j], beta=0 if at == left and r == 0 else 1)
        if r == repeat - 1:
            out[:, h] = sums[:c].unflatten(2, (many, d)).permute(2, 0, 1, 3)


def log_sum_exp(q: Tensor, k: Tensor, scores: Scores, slopes: Tensor | None) -> Tensor:
    """The natural log-sum-exp of the scores per query [head, pos], computed block by block."""
    n_heads, _, length = q.shape
    n, height, broad = _block_sizes(q, n_heads, length, 1)
    lse = q.new_full((n_heads, length), -math.inf)
    for first in range(0, n_heads, n):
        h = slice(first, min(first + n, n_heads))
        for start in range(0, length, height):
            i = slice(start, min(start + height, length))
            left, right = scores.reach(i.start, i.stop, length, False)
            for at in range(left, right, broad):
                j = slice(at, min(at + broad, right))
                s = capped_(q[h, :-1, i].mT @ k[h, :-1, j], scores)
                s = s if slopes is None else add_alibi_bias_(s, slopes[h], start - at, False)
                s.mul_(LN2)
                seen = scores.mask_(torch.ones_like(s[0], dtype=torch.bool), start - at, False)
                s.masked_fill_(~seen, -math.inf)
                lse[h, i] = torch.logaddexp(lse[h, i], s.logsumexp(-1))
    return lse
