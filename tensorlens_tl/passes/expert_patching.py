"""Experts run edge by edge: each reads an input of its own, and its router reads the same.

1. The mixture is given one copy of its input per expert, each what that expert reads.
2. The host's own router and experts run on them; in copy e, only expert e answers.
3. What leaves a copy is what that expert writes. The host goes on with their sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..maps import NormWeights
from ..readers import in_this_thread
from ..sublayers import ExpertsWeights

if TYPE_CHECKING:
    from .edge_patching import Flow


def post_normed(w: NormWeights | None, scale: Tensor | None, x: Tensor, b: bool = False) -> Tensor:
    """Apply a post-norm to one part x of its input, at the scale of the whole; with b if asked."""
    return x if w is None or scale is None else w.at_scale(x, scale, b)


def experts_apart(flow: Flow) -> list[Any]:
    """Let the experts of every mixture read and write apart in a pass.

    Args:
        flow: The pass under way.

    Returns:
        Handles of the hooks, to be removed after the pass.
    """
    blocks = enumerate(flow.model.adapter.weights.blocks)
    layers = (layer for layer, block in blocks if isinstance(block.mlp, ExpertsWeights))
    return [handle for layer in layers for handle in _apart(flow, layer)]


def _apart(flow: Flow, layer: int) -> list[Any]:
    adapter = flow.model.adapter
    block, weights = adapter.model.blocks[layer], adapter.weights.blocks[layer]
    mixture = adapter.mixture(layer)
    nodes = len(flow.universe.wiring.mlps(layer))
    norm = adapter.norm(block, "ln2") if weights.ln2 is not None else None

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        # 1. A copy of the input per expert.
        if flow.rebuilt:
            read = flow.normed(norm, flow.read(("expert", layer, ""), nodes))
            # Copy e holds what expert e reads; its router decides by that input, too.
            copies = torch.cat([flow.handed(one) for one in read.unbind(1)])
        else:
            copies = given.repeat(nodes, 1, 1)
        if args:
            return (copies, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): copies}

    def after(module: Any, args: Any, output: Any) -> Any:
        # 3. What leaves each copy.
        whole = output[0] if isinstance(output, tuple) else output
        rows = len(whole) // nodes
        parts = whole.unflatten(0, (nodes, rows))
        kept = torch.stack([flow.cells(part) for part in _by_prompt(flow, parts)], 1)
        kept = kept.to(flow.model.dtype) * mixture.factor
        flow.pending.append(lambda: _write(flow, layer, kept))
        # Only expert e answers in copy e, so the sum over copies is what the mixture gives.
        total = parts.sum(0)
        return (total, *output[1:]) if isinstance(output, tuple) else total

    start = block.mlp.register_forward_pre_hook(in_this_thread(before), with_kwargs=True)
    end = block.mlp.register_forward_hook(in_this_thread(after))
    # 2. In between, only expert e answers in copy e.
    return [start, *mixture.part(nodes), end]


def _write(flow: Flow, layer: int, parts: Tensor) -> None:
    norm = flow.model.adapter.weights.blocks[layer].ln2_post
    scale = flow.scales.get((layer, "ln2_post"))
    at = flow.firsts["out", "expert", layer]
    flow.writes[at] = post_normed(norm, None if scale is None else scale[:, None], parts)
    # An expert's bias is part of what it writes: only the post-norm's own bias is left over.
    flow.constant(at, None, norm, scale, parts[:, 0])


def _by_prompt(flow: Flow, parts: Tensor) -> Tensor:
    """[node, row, pos, d_model], also where the host has rows and positions in one axis."""
    rows = flow.copies * flow.circuits * flow.prompts
    return parts if parts.ndim == 4 else parts.unflatten(1, (rows, -1))
