"""The real model, run with hooks of the library."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..operator import Capture
from .adapter import Adapter
from .entry import adapt

Scores = Float[Tensor, "prompt pos"]


Edit = tuple[Any, Callable[[Tensor], Tensor | None]]
"""A hook point, and what becomes of the activation there; None leaves it."""


@contextmanager
def hooked(edits: Iterable[Edit]) -> Iterator[None]:
    """Hooks of our own, on for a while; other hooks stay as they are."""
    handles = []
    try:
        for point, edit in edits:
            # The host's own way: its norms look at fwd_hooks to decide how they compute.
            point.add_hook(lambda tensor, hook, edit=edit: edit(tensor))
            handles.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


@dataclass(frozen=True, eq=False)
class LiveModel:
    """The real model on some prompts of one length, without padding.

    Attributes:
        adapter: The host's.
        ids: Token ids.
        x: X as the capture had it, in the model's dtype; requires grad.
        final: y as the capture had it: what a run must give again.
        place: Which prompts of the capture these are [prompt], and where in it their tokens are
            [prompt, pos].
    """

    adapter: Adapter
    ids: Int[Tensor, "prompt pos"]
    x: Float[Tensor, "prompt pos d_model"]
    final: Float[Tensor, "prompt pos d_model"]
    place: tuple[Int[Tensor, " prompt"], Int[Tensor, "prompt pos"]]

    def run(self, x: Tensor, edits: Iterable[Edit] = (), ids: Tensor | None = None) -> Tensor:
        """One forward pass from X [many · prompt, pos, d_model] to y.

        Args:
            x: What enters the first block.
            edits: Hooks of the method's own.
            ids: Other tokens, where only the shape of theirs matters.

        Returns:
            y, connected to x.
        """
        ids = self.ids.repeat(len(x) // len(self.ids), 1) if ids is None else ids
        kwargs = {}
        if self.adapter.mask(ids, {}) is not None:  # a host that would mask pad ids
            kwargs["attention_mask"] = torch.ones_like(ids)
        seen: list[Tensor] = []
        entry = self.adapter.points()[0, "resid_pre"]
        end = self.adapter.model.unembed.register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        try:
            with hooked([(entry, lambda tensor: x), *edits]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a Bridge says that norms are computed in python
                self.adapter.run(ids, kwargs)
        finally:
            end.remove()
        return seen[-1]

    def checked(self, y: Tensor) -> Tensor:
        """The run's y, once it is seen to be the capture's.

        Returns:
            y.

        Raises:
            ValueError: If the model gave another one.
        """
        # As exact as the host, which may compute norms in float32 inside float64.
        tolerance = max(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
        off = (y.detach().to(self.final.dtype) - self.final).abs().max()
        if not off <= tolerance * self.final.abs().max():
            raise ValueError(
                f"the model does not repeat the captured run (final residual off by {float(off):.1e}, "
                f"its size is {float(self.final.abs().max()):.1e}): expected the model of the capture, "
                "with the weights and hooks it had then"
            )
        return y

    @cached_property
    def plain(self) -> tuple[Tensor, list[Tensor]]:
        """The final y and every layer's pattern, in one graph with :attr:`x`."""
        patterns: list[Tensor] = []
        points = [point for (_, key), point in self.adapter.points().items() if key == "pattern"]
        y = self.run(self.x, [(point, patterns.append) for point in points])
        return self.checked(y), patterns


def target_of(y: Tensor, query: Tensor, covector: Tensor) -> Float[Tensor, " prompt"]:
    """The target u · y at one position per prompt."""
    picked = y[torch.arange(len(y), device=y.device), query]
    return (picked * covector.to(y.dtype)).sum(-1)


@contextmanager
def live_models(capture: Capture, model: Any) -> Iterator[list[LiveModel]]:
    """The real model on the capture's prompts, those of one length together, with gradients on.

    Args:
        capture: The run.
        model: The host it came from.

    Yields:
        A live model per length of prompt.
    """
    adapter, frame = adapt(model), capture.frame
    spans = torch.tensor(frame.spans, device=frame.device)
    lengths = spans[:, 1] - spans[:, 0]
    with torch.inference_mode(False), torch.enable_grad():
        lives = []
        for n in sorted(set(lengths.tolist())):
            prompts = (lengths == n).nonzero().flatten()
            columns = spans[prompts, :1] + torch.arange(n, device=frame.device)
            here = prompts[:, None], columns
            x = capture.blocks[0].resid_pre[here].detach().to(adapter.dtype)
            ids, final = capture.prompts.tokens[here], capture.unembed.final[here]
            lives.append(LiveModel(adapter, ids, x.requires_grad_(), final, (prompts, columns)))
        yield lives
