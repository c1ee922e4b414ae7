"""What a capture with a graph needs: gradients that reach every weight it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..hosts import Adapter
from ..maps import HALF
from ..operator import Capture, FrozenBlock
from ..refusals import UnsupportedArchitectureError
from .live_model import inference_weights

_followed: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Models whose logits' graph reaches all weights that a capture reads; looked at once."""


def require_gradients(adapter: Adapter, pattern: str) -> None:
    """Refuse a graph where the run cannot keep one.

    Args:
        adapter: Adapter of the model that is to run.
        pattern: How attention patterns are kept.

    Raises:
        ValueError: If gradients are off, or the run could not keep them; the message says why.
    """
    dtype = str(adapter.dtype).removeprefix("torch.")
    causes = (
        (pattern == "recomputed", 'pattern="recomputed" keeps none', 'Pass pattern="stored"'),
        (adapter.dtype in HALF, f"{dtype} rounds it too much", "Call model.float() first"),
        (
            inference_weights(adapter.model),
            "the model was built under torch.inference_mode",
            "Load it outside",
        ),
        (
            not torch.is_grad_enabled(),
            "torch.no_grad is on",
            "Capture outside, or without graph=True",
        ),
        (
            not any(p.requires_grad for p in adapter.model.parameters()),
            "no weight of the model requires a gradient",
            "Call model.requires_grad_() first",
        ),
    )
    for found, why, remedy in causes:
        if found:
            raise ValueError(f"graph=True keeps an autograd graph, but {why}. {remedy}.")


def require_kept_graph(adapter: Adapter, capture: Capture) -> None:
    """Refuse a run in which the host lost the graph of a weight or of an activation.

    Args:
        adapter: Adapter of the model that ran.
        capture: The run, with its graph.

    Raises:
        UnsupportedArchitectureError: If a weight that was read is a copy, which gradients do not
            leave, or if the host detached what it shows of its activations.
    """
    model = adapter.model
    fixed = (t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    own = {t.untyped_storage().data_ptr() for t in fixed}
    for W in capture.tensors()[1:]:
        if not W.requires_grad and W.untyped_storage().data_ptr() not in own:
            raise UnsupportedArchitectureError(
                _lost(adapter, f"holds a copy of weights {list(W.shape)}")
            )
    if adapter.foreign_hooks():  # they may put constants in place of activations
        return
    if capture.logits.grad_fn is not None and model not in _followed:
        reached = _leaves(capture.logits)
        for W in capture.tensors(scores=False, experts=False)[1:]:
            if W.requires_grad and not _leaves(W) <= reached:
                raise UnsupportedArchitectureError(
                    _lost(adapter, f"does not run on its own weights {list(W.shape)}")
                )
        _followed[model] = True
    for layer, block in enumerate(capture.blocks):
        if block.resid_pre.requires_grad:
            for name, frozen in _frozen(block):
                if not frozen.requires_grad:
                    why = f"detaches the {name} of layer {layer}"
                    raise UnsupportedArchitectureError(_lost(adapter, why))


def _leaves(tensor: Tensor) -> set[int]:
    """The leaves of a tensor's graph, by identity."""
    if tensor.grad_fn is None:
        return {id(tensor)}
    nodes, todo, found = {tensor.grad_fn}, [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        below = {n for n, _ in node.next_functions if n is not None} - nodes
        nodes |= below
        todo += below
    return found


def _frozen(block: FrozenBlock) -> Iterator[tuple[str, Tensor]]:
    """What a block keeps of the run and is a function of the residual, by name."""
    yield from (("attention", tensor) for tensor in block.attn.frozen)
    yield from ((norm.name, norm.scale) for norm in block.norms)
    for part in filter(None, (block.mlp, block.shared)):
        held = ((name, getattr(part, name, None)) for name in ("pre", "pre_linear", "ln_scale"))
        yield from ((name, tensor) for name, tensor in held if tensor is not None)


def _lost(adapter: Adapter, why: str) -> str:
    return (
        f"graph=True does not serve {adapter.name}: the host {why}, and gradients stop there. "
        "Capture without graph=True, or load the model as another host class."
    )
