"""Threads of a program that share one model: what each gets is what it would get alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import pytest
import torch
from models import CASES, quiet, tokens
from torch import Tensor

import tensorlens_tl
from tensorlens_tl.support.tiny_models import BRIDGE, build_hf

NAMES = [name for name in ("hooked-llama", "bridge-llama") if name in CASES]


@contextmanager
def unhurried(model: Any) -> Iterator[None]:
    """Let other threads run between the blocks of a model."""

    def rest(module: Any, args: Any, output: Any) -> None:
        time.sleep(1e-3)

    rest.__module__ = "transformer_lens"  # a hook of the host's own: ablations refuse a user's
    handles = [block.register_forward_hook(rest) for block in model.blocks]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        for handle in handles:
            handle.remove()


def together(jobs: list[Callable[[], Tensor]]) -> list[Tensor]:
    """Run all jobs at once, each in a thread of its own."""
    barrier = Barrier(len(jobs))

    def run(job: Callable[[], Tensor]) -> Tensor:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@pytest.mark.parametrize("name", NAMES)
def test_threads_get_what_each_gets_alone(name):
    with quiet():
        model = CASES[name].build(torch.float64)
    first, second = tokens(1, 6, 1), tokens(1, 6, 2)
    lens = tensorlens_tl.capture(model, first)[1]
    edges = lens.discover(3, n_edges=5, qk=False)

    def captured(ids: Tensor) -> Tensor:
        return tensorlens_tl.capture(model, ids)[1].attribute(3).values

    def live() -> Tensor:
        return lens.token_scores("integrated_gradients", 3, model=model).values

    def ablated() -> Tensor:
        return torch.tensor(edges.faithfulness(model, first, second, target=3).share)

    def plain() -> Tensor:
        return model(second, return_type="logits").detach()

    jobs = [lambda: captured(first), lambda: captured(second), live, ablated, plain]
    with unhurried(model):
        alone, beside = [job() for job in jobs], together(jobs)
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one, other)


@pytest.mark.offered("bridge-llama" in CASES)
def test_threads_wrap_a_model_once():
    with quiet():
        model = build_hf(*BRIDGE["llama"], torch.float64)
    first, second = tokens(1, 6, 1), tokens(1, 6, 2)
    jobs = [lambda ids=ids: tensorlens_tl.capture(model, ids)[0] for ids in (first, second) * 2]
    with quiet():
        beside = together(jobs)
        bridge = tensorlens_tl.wrap(model)
        alone = [bridge(ids, return_type="logits") for ids in (first, second) * 2]
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one, other)
