"""Fingerprints: two numbers of a tensor that tell whether another tensor is equal to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _numbers(n: int, seed: int) -> Tensor:
    """N fixed numbers in [−1, 1), the same on every machine: an integer hash of 1 … n."""
    x = (torch.arange(1, n + 1) + (seed << 40)) * 3141592653589793239
    x = (x ^ (x >> 29)) * 2718281828459045235
    return ((x ^ (x >> 32)) & 0xFFFFF).double() / 2**19 - 1


def products(tensor: Tensor) -> list[str]:
    """The fingerprint of W: Σ r_i W_ij s_j with fixed pseudorandom r, s, and the norm of W."""
    W = tensor.detach()
    W = W.reshape(1, -1) if W.ndim < 2 else W
    s = _numbers(W.shape[-1], 1).to(W.device)
    rows, squares = [], torch.zeros((), dtype=torch.float64, device=W.device)
    # In parts, so that only a part is ever copied to float64.
    for part in W.split(max(1, 2**22 // math.prod(W.shape[1:]))):
        part = part.double()
        rows.append((part @ s).flatten())
        squares += part.square().sum()
    row = torch.cat(rows)
    return [repr(float(row @ _numbers(len(row), 2).to(row))), repr(float(squares.sqrt()))]


def agree(saved: list[str], found: list[str]) -> bool:
    """Tell whether two fingerprints are of one tensor, up to rounding."""
    # Machines add in different orders: a float64 sum may be off by a little.
    off, size = abs(float(saved[0]) - float(found[0])), float(found[1])
    return saved == found or (off <= 1e-12 * size and math.isclose(float(saved[1]), size))
