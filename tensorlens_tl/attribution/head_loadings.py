"""Who carries an effect: how much of it each head moves, layer by layer.

The effect of a source on the target is e = ⟨state, covector⟩ at every residual site above it, with
the state pushed forward from the source alone. Over a layer's attention it splits, exactly, into

    e = Σ_heads ⟨state, covector of the head's values⟩ + ⟨state, covector after⟩

what each head reads of the state and brings to the target, and what passes it by. So in every layer
the heads and ``past`` sum to e.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import Edge, Node
from ..operator import Step
from .table import Attribution
from .table_builder import TableBuilder
from .target_gradient import TargetGradient


def loadings(gradient: TargetGradient, source: int | Node | Edge) -> Attribution:
    """How much of a source's effect on the target each head carries.

    Args:
        gradient: The target, pulled to every site.
        source: A position among the real tokens (the token's and the position's embedding), a head
            or an MLP (what it writes, everywhere), or an edge between two (what the reader makes of
            the writer's output).

    Returns:
        For every layer above the source, one row per head and one, ``L3.past``, for what no head of
        that layer moved; each layer's rows sum to the effect, which is the result's target_value.

    Raises:
        ValueError: If there is no such position, node or edge, or no layer above it.
    """
    state, first = _start(gradient, source)
    steps, trace = gradient.operator.steps, gradient.trace
    effect = _dot(state, trace.covectors[first])
    table = TableBuilder(gradient.capture, gradient.target)
    for i in range(first, len(steps)):
        step, after = steps[i], trace.covectors[i + 1]
        past = _dot(state, after)
        heads = [
            (branch, pull) for branch, pull in zip(step.branches, trace.pulls[i], strict=True)
            if branch.body.nodes()[0].kind == "head"
        ]  # fmt: skip
        for branch, pull in heads:
            covectors = branch.readers(pull)[0].wide()
            table.add(branch.body.nodes(), torch.einsum("bpd,nbpd->bn", state, covectors))
        for branch, pull in zip(step.branches, trace.pulls[i], strict=True):
            if heads and branch.body.nodes()[0].kind != "head":  # a parallel MLP is past the heads
                past = past + _dot(state, pull.covector)
        if heads:
            table.add([Node("constant", step.layer, name="past")], past[:, None])
        state = state + sum(branch.map.apply(state) for branch in step.branches)
    if not table.sources:
        raise ValueError(f"no layer with heads is above {source}: take a source further below")
    name = str(source) if isinstance(source, Node | Edge) else f"position {source}"
    return replace(
        table.to_attribution("loading"),
        target=tuple(f"{target} from {name}" for target in gradient.target.name),
        target_value=effect,
        sums_to_target=False,
    )


def _dot(state: Tensor, covector: Tensor) -> Float[Tensor, " batch"]:
    return (state * covector).sum((-2, -1))


def _start(gradient: TargetGradient, source: int | Node | Edge) -> tuple[Tensor, int]:
    """The state a source makes, and the step from which on it is carried."""
    steps = gradient.operator.steps
    if not isinstance(source, Node | Edge):
        index = gradient.capture.frame.index(source)
        prompts = torch.arange(len(index), device=index.device)
        x = torch.zeros_like(steps[0].state)
        x[prompts, index] = steps[0].state[prompts, index]
        return x, 0
    if isinstance(source, Node):
        return _written(gradient, source)
    if source.dest.kind == "logits":
        raise ValueError(f"{source} goes straight to the logits: no head carries it")
    if source.dest.name not in ("", "v"):
        raise ValueError(f"{source} has no place in the operator, whose patterns are frozen: take "
                         f"{source.src}→{replace(source.dest, name='v')}")  # fmt: skip
    x, first = _written(gradient, source.src)
    node = replace(source.dest, name="")
    i, branch = _find(steps, node)
    if i < first:
        raise ValueError(f"no edge {source}: {source.dest} is not above {source.src}")
    x = branch.body.part(node).apply(x if branch.pre is None else branch.pre.apply(x))
    return (x if branch.post is None else branch.post.apply(x)), i + 1


def _written(gradient: TargetGradient, node: Node) -> tuple[Tensor, int]:
    if str(node) in gradient.capture.embeddings:
        return gradient.capture.embeddings[str(node)], 0
    i, branch = _find(gradient.operator.steps, node)
    state = gradient.operator.steps[i].state
    return branch.outputs(state)[:, branch.body.nodes().index(node)], i + 1


def _find(steps: tuple[Step, ...], node: Node):
    nodes = {
        n: (i, b) for i, step in enumerate(steps) for b in step.branches for n in b.body.nodes()
    }
    if node not in nodes:
        raise ValueError(f"no node {node}; there are {', '.join(map(str, nodes))}")
    return nodes[node]
