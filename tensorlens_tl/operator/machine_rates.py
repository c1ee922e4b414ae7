"""How fast this machine multiplies and moves numbers, measured; and what is counted in those terms."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass
class Cost:
    """Flops by the kind of product, bytes moved beside, and calls."""

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
    """Flops a second by kind of product, numbers moved a second, seconds a call."""

    product: float
    mixing: float
    making: float
    folded: float
    moved: float
    call: float

    def seconds(self, cost: Cost) -> float:
        """How long a cost takes."""
        return (
            cost.product / self.product + cost.mixing / self.mixing + cost.making / self.making
            + cost.folded / self.folded + cost.moved / self.moved + cost.calls * self.call
        )  # fmt: skip


def _timed(run: Callable[[], object], device: torch.device) -> float:
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


@cache
def rates(
    d_model: int, width: int, heads: int, d_head: int, n_pos: int, rows: int,
    tile: int,
    dtype: torch.dtype, device: torch.device, threads: int,
) -> Rates:  # fmt: skip
    """Measure products of a job's shapes; under 0.3 s on one core.

    Args:
        d_model: D.
        width: The MLP's width, or the attention's where there is none.
        heads: Of one layer.
        d_head: Of one head.
        n_pos: Positions.
        rows: Vectors side by side in a block.
        tile: Positions of a pattern's tile.
        dtype: Of the vectors.
        device: Where.
        threads: torch.get_num_threads(), so that another setting is measured anew.

    Returns:
        The rates.
    """
    few = min(256, max(64, int(3e9 / (2 * d_model * width))))
    x, W = _filled(few, d_model, dtype, device), _filled(d_model, width, dtype, device)
    product = 2 * few * d_model * width / _timed(lambda: x @ W, device)
    end, side = min(n_pos, 128), min(rows * d_head, 2048)
    tile = min(tile, end)
    A, z = _filled(heads, tile, end, dtype, device), _filled(heads, end, side, dtype, device)
    mixing = 2 * heads * tile * end * side / _timed(lambda: torch.bmm(A, z), device)
    slim = min(width, 1024)
    V = _filled(2, d_model, slim, dtype, device)
    making = 2 * 2 * d_model**2 * slim / _timed(lambda: V @ V[0].T, device)
    S, F = (
        _filled(2, min(rows, 256), d_model, dtype, device),
        _filled(2, d_model, d_model, dtype, device),
    )
    folded = 2 * 2 * S.shape[1] * d_model**2 / _timed(lambda: torch.bmm(S, F), device)
    big = _filled(2**21, dtype, device)
    moved = 2 * 2**21 / _timed(lambda: big.clone(), device)
    small = _filled(8, dtype, device)
    call = _timed(lambda: [small + small for _ in range(50)], device) / 50
    return Rates(product, mixing, making, folded, moved, 2 * call)


def _filled(*shape) -> torch.Tensor:
    *size, dtype, device = shape
    return torch.full(size, 0.5, dtype=dtype, device=device)
