"""Measure how fast this machine multiplies and moves numbers, and count work in those terms."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

KEPT_SECONDS = 60
"""How long measured rates are used again, in seconds. A machine may be busy now and idle a minute
later, so they are not kept for ever. Plans that are made side by side need not measure each."""


@dataclass
class Cost:
    """The work of a sweep, by kind. Counted up while a plan goes through the stages.

    Attributes:
        product: Flops of products with weights.
        mixing: Flops of products with patterns.
        making: Flops of making one map per position.
        folded: Flops of products with one map per position.
        moved: Numbers that are read or written besides.
        calls: Number of calls of torch.
    """

    product: float = 0.0
    mixing: float = 0.0
    making: float = 0.0
    folded: float = 0.0
    moved: float = 0.0
    calls: int = 0

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.product + self.mixing + self.making + self.folded


@dataclass(frozen=True)
class Rates:
    """How much of each kind of work (see :class:`Cost`) this machine does in a second.

    Attributes:
        product: Flops a second of products with weights.
        mixing: Flops a second of products with patterns.
        making: Flops a second of making one map per position.
        folded: Flops a second of products with one map per position.
        moved: Numbers moved a second.
        call: Seconds that a call of torch takes whatever its size.
    """

    product: float
    mixing: float
    making: float
    folded: float
    moved: float
    call: float

    def seconds(self, cost: Cost) -> float:
        """The time in seconds that some work takes."""
        products = cost.product / self.product + cost.mixing / self.mixing
        maps = cost.making / self.making + cost.folded / self.folded
        return products + maps + cost.moved / self.moved + cost.calls * self.call


@dataclass(frozen=True)
class ProductShape:
    """How large the products are whose rates are measured.

    Attributes:
        d_model: Width of the residual.
        width: Width of the MLP, or of the attention where there is no MLP.
        heads: Number of heads of a layer.
        d_head: Width of a head.
        n_pos: Number of positions.
        rows: Number of vectors side by side in a block.
        tile: Positions in a tile of a pattern.
    """

    d_model: int
    width: int
    heads: int
    d_head: int
    n_pos: int
    rows: int
    tile: int


def rates(shape: ProductShape, dtype: torch.dtype, device: torch.device) -> Rates:
    """Measure products of some shapes, in under 0.3 s on one core.

    Args:
        shape: How large the products are.
        dtype: Dtype of the numbers.
        device: Device that multiplies.

    Returns:
        The rates, measured now or at most :data:`KEPT_SECONDS` ago.
    """
    period = int(time.monotonic() / KEPT_SECONDS)
    return _measured(shape, dtype, device, torch.get_num_threads(), period)


@lru_cache(maxsize=64)
def _measured(
    shape: ProductShape, dtype: torch.dtype, device: torch.device, threads: int, period: int
) -> Rates:
    """The rates; the number of threads and the minute are there to be told apart by the cache."""

    def filled(*size: int) -> torch.Tensor:
        return torch.full(size, 0.5, dtype=dtype, device=device)

    D, width = shape.d_model, shape.width
    # 1. Products with weights.
    some = min(256, max(64, int(3e9 / (2 * D * width))))
    x, W = filled(some, D), filled(D, width)
    product = 2 * some * D * width / _timed(lambda: x @ W, device)
    # 2. Products with a tile of the pattern, head by head.
    end, side = min(shape.n_pos, 128), min(shape.rows * shape.d_head, 2048)
    tile = min(shape.tile, end)
    A, z = filled(shape.heads, tile, end), filled(shape.heads, end, side)
    mixing = 2 * shape.heads * tile * end * side / _timed(lambda: torch.bmm(A, z), device)
    # 3. One map per position: making two of them, and products with them.
    slim = min(width, 1024)
    V = filled(2, D, slim)
    making = 2 * 2 * D**2 * slim / _timed(lambda: V @ V[0].T, device)
    S, F = filled(2, min(shape.rows, 256), D), filled(2, D, D)
    folded = 2 * 2 * S.shape[1] * D**2 / _timed(lambda: torch.bmm(S, F), device)
    # 4. Moving numbers, and calls too small to cost anything else, with the views between them.
    big, few, tiny = filled(2**21), filled(1, 2, 8), filled(8, 8)
    moved = 2 * 2**21 / _timed(lambda: big.clone(), device)

    def three_calls() -> torch.Tensor:
        return (torch.einsum("bpd,de->bpe", few, tiny)[:, :1] * few).sum(-1)

    call = _timed(lambda: [three_calls() for _ in range(20)], device) / 60
    return Rates(product, mixing, making, folded, moved, call)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of four runs, after one that warms up."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(4))  # a busy moment slows some of them
