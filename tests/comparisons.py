"""Comparisons that assert."""

from __future__ import annotations

from torch import Tensor


def assert_close(ours: Tensor, theirs: Tensor, tol: float, what: str = "") -> None:
    """max |ours − theirs| ≤ tol · max |theirs|."""
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)} ≠ {list(theirs.shape)}"
    assert ours.isfinite().all() and theirs.isfinite().all(), f"{what}: not finite"
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    assert error <= tol, f"{what}: off by {float(error):.2e}, expected at most {tol:.0e}"
