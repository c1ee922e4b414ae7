"""The real model on the prompts of a capture, run with hooks of the library.

1. Take the prompts of one length out of the capture, without their padding (``live_models``).
2. Run the model from X, with hooks that edit it, up to the final normalized residual y.
3. Without edits, y must be the capture's: else it is another model, or it was changed since.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..hosts import Adapter, adapt, as_host
from ..maps import HALF
from ..operator import Capture
from ..readers import alone, in_this_thread

Scores = Float[Tensor, "prompt pos"]
"""One score per token, in the target's units."""

HookEdit = tuple[Any, Callable[[Tensor], Tensor | None]]
"""A hook point, and a function from the activation there to another, or to None to keep it."""


@contextmanager
def hooked(edits: Iterable[HookEdit]) -> Iterator[None]:
    """Add hooks of the library for a while; other hooks stay as they are."""
    handles = []
    try:
        for point, edit in edits:
            # The host's own way: its norms look at fwd_hooks to decide how they compute.
            point.add_hook(in_this_thread(lambda tensor, hook, edit=edit: edit(tensor)))
            handles.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def input_replaced(module: nn.Module, replace: Callable[[], Tensor | None]) -> Any:
    """Give a module of the host another input.

    Args:
        module: A module that the host calls in its forward pass.
        replace: Makes the input when the module is called, in any shape of the same size; None
            keeps the module's own.

    Returns:
        Handle of the hook, to be removed.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, found = [*args, *kwargs.values()][0], replace()
        if found is None:
            return args, kwargs
        found = found.reshape(given.shape)
        if args:
            return (found, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): found}

    return module.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True)


def output_replaced(module: nn.Module, replace: Callable[[], Tensor | None]) -> Any:
    """Give a module of the host another output.

    Args:
        module: A module that the host calls in its forward pass.
        replace: Makes the output, in any shape of the same size; None keeps the module's own.

    Returns:
        Handle of the hook, to be removed.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if (found := replace()) is None else found.reshape(output.shape)

    return module.register_forward_hook(in_this_thread(hook))


def inference_weights(model: nn.Module) -> bool:
    """Whether the model was built under ``torch.inference_mode``, without any gradients."""
    return any(p.is_inference() for p in model.parameters())


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Hold a half-precision model in float32 for a while. A deep copy of a host is not safe.

    At the end, also after an error, every weight is the same tensor with the same storage.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
    """
    modules = list(model.modules())
    held: dict[int, Tensor] = {}
    # Weights and buffers; processed weights of transformer_lens 3.9 are plain attributes.
    for owner in (vars(module) for module in modules):
        for tensors in (owner, owner["_parameters"], owner["_buffers"]):
            found = [t for t in tensors.values() if isinstance(t, Tensor) and t.dtype in HALF]
            held |= {id(t): t for t in found}
    own = [(t, t.data) for t in held.values()]
    found: list[Any] = [getattr(module, "cfg", None) for module in modules]
    configs = {id(c): (c, c.dtype) for c in found if getattr(c, "dtype", None) in HALF}
    try:
        for tensor, data in own:
            tensor.data = data.float()
        for config, _ in configs.values():
            config.dtype = torch.float32
        yield
    finally:
        for tensor, data in own:
            tensor.data = data
        for config, dtype in configs.values():
            config.dtype = dtype


@dataclass(frozen=True, eq=False)
class LiveModel:
    """The real model on some prompts of one length, without padding.

    Attributes:
        adapter: Adapter of the host model.
        ids: Token ids of the prompts, or the pictures that stand in their place.
        x: X as the capture had it, in the model's dtype; requires grad.
        final: y as the capture had it, which a run without edits must give again.
        place: Numbers of these prompts in the capture [prompt], and the positions of their tokens
            there [prompt, pos].
    """

    adapter: Adapter
    ids: Int[Tensor, "prompt pos"] | Float[Tensor, "prompt ..."]
    x: Float[Tensor, "prompt pos d_model"]
    final: Float[Tensor, "prompt pos d_model"]
    place: tuple[Int[Tensor, " prompt"], Int[Tensor, "prompt pos"]]

    def run(self, x: Tensor, edits: Iterable[HookEdit] = (), ids: Tensor | None = None) -> Tensor:
        """Run one forward pass from X to y.

        Args:
            x: Input of the first block [many · prompt, pos, d_model].
            edits: Hooks of the calling method.
            ids: Token ids of the run, where other than the prompts' are needed.

        Returns:
            The final normalized residual y, connected to x [many · prompt, pos, d_model].
        """
        if ids is None:
            ids = self.ids.repeat(len(x) // len(self.ids), *[1] * (self.ids.ndim - 1))
        # 2. X replaces what enters block 0, so a gradient of y reaches it.
        seen: list[Tensor] = []
        entry = self.adapter.points()[0, "resid_pre"]
        with alone(self.adapter.model):
            model = self.adapter.model
            if self.adapter.of_pictures:  # whose head is given one row, or is not there
                see = in_this_thread(lambda module, args, output: seen.append(output))
                end = model.ln_final.register_forward_hook(see)
            else:
                see = in_this_thread(lambda module, args: seen.append(args[0]))
                end = self.adapter.readout.register_forward_pre_hook(see)
            try:
                with hooked([(entry, lambda tensor: x), *edits]), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a Bridge says how it computes norms
                    self.adapter.run(ids, self.adapter.all_real(ids))
            finally:
                end.remove()
        return seen[-1]

    def checked(self, y: Tensor) -> Tensor:
        """Check that a run without edits gave the capture's y.

        Args:
            y: Final normalized residual of the run [prompt, pos, d_model].

        Returns:
            The same tensor.

        Raises:
            ValueError: If the model gave another one.
        """
        # 3. As exact as the host, which may compute norms in float32 inside float64.
        tolerance = max(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
        off = (y.detach().to(self.final.dtype) - self.final).abs().max()
        if not off <= tolerance * self.final.abs().max():
            raise ValueError(
                f"The model does not repeat the captured run: its final residual is off by "
                f"{float(off):.1e}, of {float(self.final.abs().max()):.1e}. "
                "Pass the model of the capture, with the weights and hooks it had then."
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
    """Value of the target u · y at one position per prompt.

    Args:
        y: Final normalized residual [prompt, pos, d_model].
        query: Position of the target [prompt].
        covector: Covector u of the target [prompt, d_model].

    Returns:
        The target of each prompt, in logits.
    """
    picked = y[torch.arange(len(y), device=y.device), query]
    return (picked * covector.to(y.dtype)).sum(-1)


@contextmanager
def live_models(capture: Capture, model: Any) -> Iterator[list[LiveModel]]:
    """Open the real model on the capture's prompts, those of one length together, with gradients.

    Args:
        capture: Capture of a run of the model.
        model: The host model that ran.

    Yields:
        One live model per length of prompt.

    Raises:
        ValueError: If the model has other sizes than the captured one, or its weights are inference
            tensors, which know no gradients.
    """
    # 1. Prompts of one length run side by side, and none is padded.
    frame = capture.frame
    spans = torch.tensor(frame.spans, device=frame.device)
    lengths = spans[:, 1] - spans[:, 0]
    adapter, lives = adapt(model), []
    sizes = [capture.unembed.final.shape[-1], capture.logits.shape[-1]]
    if [*adapter.weights.unembed.W_U.shape] != sizes:
        raise ValueError(
            f"The model does not repeat the captured run: {adapter.name} has other sizes than "
            f"{capture.model_name}. Pass the model of the capture."
        )
    with alone(adapter.model), torch.inference_mode(False), torch.enable_grad():
        if inference_weights(adapter.model):
            raise ValueError(
                "model was built under torch.inference_mode, and such weights have no gradients. "
                "Build or load the model outside of it."
            )
        for n in sorted(set(lengths.tolist())):
            prompts = (lengths == n).nonzero().flatten()
            columns = spans[prompts, :1] + torch.arange(n, device=frame.device)
            here = prompts[:, None], columns
            x = capture.blocks[0].resid_pre[here].detach().to(adapter.dtype)
            given, final = capture.prompts.given, capture.unembed.final[here]
            ids = given[here] if capture.prompts.by_row else given[prompts]
            lives.append(LiveModel(adapter, ids, x.requires_grad_(), final, (prompts, columns)))
        yield lives


@contextmanager
def unsplit(model: Any) -> Iterator[None]:
    """Switch off, for a while, the flags under which each head has inputs of its own.

    Other threads of the library wait meanwhile.

    Args:
        model: A ``HookedTransformer``, a ``TransformerBridge`` or a Hugging Face model.
    """
    model = as_host(model)
    cfg = getattr(model, "cfg", None)
    with alone(model):
        flags = [flag for flag in Adapter.split_flags if getattr(cfg, flag, False)]
        try:
            for flag in flags:
                getattr(model, f"set_{flag}")(False)
            yield
        finally:
            for flag in flags:
                getattr(model, f"set_{flag}")(True)
