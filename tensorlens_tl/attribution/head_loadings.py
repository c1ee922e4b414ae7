"""Head loadings: how much of a source's effect each head carries, layer by layer.

The effect of a source on the target is e = ⟨state, covector⟩ at every residual site above it, with
the state pushed forward from the source alone. Over a layer's attention e splits, exactly, into

    e = Σ_heads ⟨state, covector of the head's values⟩ + ⟨state, covector after⟩:

what each head reads of the state and brings to the target, and what passes the heads by. So in
every layer the heads and ``past`` sum to e.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import Edge, Node
from ..operator import Branch, Step
from .table import Attribution
from .table_builder import TableBuilder
from .target_gradient import TargetGradient


def loadings(gradient: TargetGradient, source: int | Node | Edge) -> Attribution:
    """Split a source's effect on the target by head, in every layer above the source.

    Args:
        gradient: The target, pulled to every site.
        source: What the effect starts from. An integer is a position among the real tokens: the
            embeddings of that token and position. A node is a head or an MLP: what the node writes,
            at all positions. An edge is what its reader makes of its writer's output.

    Returns:
        One row per head of every layer above the source, and one row per layer, as ``L3.past``, for
        what no head of that layer moved. The rows of a layer sum to the effect of the source, which
        is the result's ``target_value``.

    Raises:
        ValueError: If there is no such position, node or edge, or no layer with heads above it.
    """
    gradient.target.alone("loadings")
    state, first = _start(gradient, source)
    steps, trace = gradient.operator.steps, gradient.trace
    effect = _dot(state, trace.covectors[first])
    table = TableBuilder(gradient.capture, gradient.target)
    for i in range(first, len(steps)):
        step = steps[i]
        # ⟨state, covector after the step⟩ without the branches: what goes straight on.
        past = _dot(state, trace.written[i])
        pairs = list(zip(step.branches, trace.pulls[i], strict=True))
        heads = [pair for pair in pairs if pair[0].body.nodes()[0].kind == "head"]
        for branch, pull in heads:
            covectors = branch.readers(pull)[0].wide()
            # ⟨state, covector of head n's values⟩: what the head reads of it and brings to the
            # target.
            table.add(branch.body.nodes(), torch.einsum("bpd,nbpd->bn", state, covectors))
        if heads:
            for branch, pull in pairs:  # a parallel MLP is past the heads
                if branch.body.nodes()[0].kind != "head":
                    past = past + _dot(state, pull.covector)
            table.add([Node("constant", step.layer, name="past")], past[:, None])
        # The linear part alone: constants of a branch do not come from the source.
        state = step.normed(state + sum(branch.map.apply(state) for branch in step.branches))
    if not table.sources:
        raise ValueError(f"No layer with heads is above {source}. Take a source further below.")
    name = str(source) if isinstance(source, Node | Edge) else f"position {source}"
    return replace(
        table.to_attribution("loading"),
        target=tuple(f"{target} from {name}" for target in gradient.target.name),
        target_value=effect,
        sums_to_target=False,
    )


def _dot(state: Tensor, covector: Tensor) -> Float[Tensor, " batch"]:
    """⟨state, covector⟩ over all positions."""
    return (state * covector).sum((-2, -1))


def _start(gradient: TargetGradient, source: int | Node | Edge) -> tuple[Tensor, int]:
    """The state [batch, pos, d_model] that a source makes, and the first step above it."""
    steps = gradient.operator.steps
    if not isinstance(source, Node | Edge):
        index = gradient.capture.frame.index(source)
        prompts = torch.arange(len(index), device=index.device)
        x = torch.zeros_like(steps[0].state)
        # Only this position: what it brings to others is carried by the sweep.
        x[prompts, index] = steps[0].state[prompts, index]
        return x, 0
    if isinstance(source, Node):
        return _written(gradient, source)
    if source.dest.kind == "logits":
        raise ValueError(
            f"{source} goes straight to the logits, so no head carries it. Take an edge into a "
            "head or an MLP."
        )
    if source.dest.name not in ("", "v"):
        values = replace(source.dest, name="v")
        raise ValueError(
            f"{source} is no edge of the operator, whose patterns are frozen. Take "
            f"{source.src}→{values}."
        )
    x, first = _written(gradient, source.src)
    node = replace(source.dest, name="")
    i, branch = _find(steps, node)
    if i < first:
        raise ValueError(
            f"There is no edge {source}, as {source.dest} is not above {source.src}. Take a reader "
            "above the writer."
        )
    # An edge goes from writer to reader directly: only norms of the residual are passed.
    for step in steps[first:i]:
        x = step.normed(x)
    x = branch.body.part(node).apply(x if branch.pre is None else branch.pre.apply(x))
    return steps[i].normed(x if branch.post is None else branch.post.apply(x)), i + 1


def _written(gradient: TargetGradient, node: Node) -> tuple[Tensor, int]:
    """What a node adds [batch, pos, d_model], as it reaches the first step above the node."""
    if str(node) in gradient.capture.embeddings:
        return gradient.capture.embeddings[str(node)], 0
    i, branch = _find(gradient.operator.steps, node)
    step = gradient.operator.steps[i]
    return step.normed(branch.outputs(step.state)[:, branch.body.nodes().index(node)]), i + 1


def _find(steps: tuple[Step, ...], node: Node) -> tuple[int, Branch]:
    """The step and the branch that hold a node."""
    nodes = {
        n: (i, b) for i, step in enumerate(steps) for b in step.branches for n in b.body.nodes()
    }
    if node not in nodes:
        raise ValueError(f"There is no node {node}. Use one of {', '.join(map(str, nodes))}.")
    return nodes[node]
