"""Interleaved timing: every contender once a round, ratios pair by pair, medians of the ratios.

Everything is on torch's default device (``--device``); an accelerator is waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def wait() -> None:
    """Until the default device has done what it was given."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def high_water_mark() -> int:
    """Bytes that this process has held at most: on an accelerator of its memory."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    # The mark of getrusage outlives exec: a child would begin with its parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_high_water_mark() -> None:
    """Begin anew, from what is held now."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def interleave(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round, after one round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, run in contenders.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the per-round ratios."""
    ratios = [a / b for a, b in zip(times[name], times[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high
