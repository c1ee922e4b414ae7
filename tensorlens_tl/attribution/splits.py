"""Where a logit comes from: one target, split by source at every granularity.

One transposed sweep carries the target's covector u to every residual site; whatever is written to
the residual, at any position, adds ⟨what is written, covector there⟩ to the target. So

    token, constant   ⟨embedding, Tᵀu⟩, and the constants' shares that the sweep collects: sums to it
    direct effect     ⟨what is written at the target's position, Nᵀu⟩, N the final norm: sums to it
    total effect      ⟨what is written, covector where it is written⟩: overlaps, does not sum
    edge              ⟨what one node writes, the covector of what another reads⟩: see ``edges.py``

all come from that one sweep and dot products. An order (how many heads and MLPs were passed) needs
a state per order instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import Node
from ..operator import Branch, Capture, FrozenTransformer, QueryKey, Readers, Step
from ..sublayers import Attention, take_row
from .edges import Writers, edge_scores, frozen_readers
from .sweep import B_U, Effects, Rows, Sweep, _dot, _has_b_U, result
from .table import Attribution
from .targets import Target

BY = (
    "token", "constant", "layer", "component", "head", "mlp", "neuron", "dimension", "edge", "order",
)  # fmt: skip
TOTALS = ("layer", "component", "head", "mlp", "neuron")
"""What a total effect can be split by: what writes to the residual above the embedding."""

SWEEP_LIMIT = 512 * 2**20
"""Bytes that a batched sweep's covectors may take unless the caller allows more."""


def attribute(
    sweep: Sweep, by: str = "token", effect: str = "direct", qk: bool = False
) -> Attribution:
    """Split a target by source.

    Args:
        sweep: The target.
        by: See :meth:`TensorLens.attribute`.
        effect: "direct" or "total".
        qk: Whether queries and keys are readers, too; by edge only.

    Returns:
        The contributions, for every prompt.

    Raises:
        ValueError: If ``by`` or ``effect`` is none of these, or ``by`` has no total effect.
    """
    if by not in BY:
        remedy = ": no model with experts can be frozen yet" if by == "expert" else ""
        raise ValueError(f"expected by to be one of {', '.join(BY)}, got {by!r}{remedy}")
    if effect not in ("direct", "total"):
        raise ValueError(f"expected effect to be direct or total, got {effect!r}")
    if effect == "total" and by not in TOTALS:
        raise ValueError(
            f"by={by!r} has no total effect apart from its direct one, expected by to be one of "
            f"{', '.join(TOTALS)}: leave effect out"
        )
    check_qk(by, qk)
    rows = Rows()
    if (effect, by) in (("total", "mlp"), ("total", "neuron")) and _attention_only(sweep):
        raise ValueError(
            f"this model has no MLPs, expected by to be layer, component or head: got {by!r}"
        )
    if effect == "total":
        (_total_by_layer if by == "layer" else _total)(sweep, rows, by)
    elif by in ("token", "constant"):
        _embedded(sweep, rows, by)
    elif by == "order":
        _orders(sweep, rows)
    elif by == "edge":
        return by_edge(sweep, Writers.of(sweep.operator, sweep.capture, sweep.target.query), qk=qk)
    else:
        _direct(sweep, rows, "component" if by == "layer" else by)
    whole = effect == "direct" and by != "order"
    if (whole or (effect, by) == ("total", "component")) and _has_b_U(sweep.capture):
        rows.add([B_U], sweep.target.constant[:, None])
    found = result(sweep, rows, by, effect)
    return found.sum("layer") if by == "layer" and effect == "direct" else found


def check_qk(by: str, qk: bool) -> None:
    """Refuse queries and keys where nothing reads.

    Raises:
        ValueError: If they are asked for in a split that is not by edge.
    """
    if qk and by != "edge":
        raise ValueError(f"expected by='edge' with qk=True, got by={by!r}: only edges have readers")


def by_edge(sweep: Sweep, writers: Writers, own: bool = True, qk: bool = False) -> Attribution:
    """What readers make of what writers add.

    Args:
        sweep: The target, whose readers they are.
        writers: What is written: in this run, or the difference to another.
        own: Whether the readers' own constants are rows, too.
        qk: Whether queries and keys are readers, too.

    Returns:
        One row per edge, positions summed; it does not sum to the target.

    Raises:
        ValueError: With ``qk``, if the weights of queries and keys are not known, or do not give
            the run's pattern.
    """
    target, constants = sweep.target, None
    if own:
        constants = {name: effect.sum(-1) for name, effect in sweep.trace.top.items()}
        constants |= {"b_U": target.constant} if _has_b_U(sweep.capture) else {}
    scores_of = _queries_and_keys(sweep.capture) if qk else None
    readers = frozen_readers(sweep.operator, writers.below, sweep.trace, constants, scores_of)
    return edge_result(sweep, writers, readers)


def edge_result(sweep: Sweep, writers: Writers, readers: Iterable[Readers]) -> Attribution:
    """Edges as an attribution of a target."""
    sources, names, values = edge_scores(writers, readers, sweep.operator.frame.n_pos)
    rows = Rows()
    rows.sources, rows.values = list(sources), [values]
    return result(sweep, rows, "edge", labels=(names,) * len(sweep.target.query))


def _queries_and_keys(capture: Capture) -> Callable[[Branch], QueryKey]:
    weights = capture.score_weights
    if weights is None:
        raise ValueError(
            "this lens does not know W_Q and W_K, which query and key edges need: capture with the "
            "model, or load with model= (a file holds none); where the model itself has attention "
            "that is not known here, leave qk out"
        )

    def of(branch: Branch) -> QueryKey:
        attn = cast(Attention, branch.body)
        return QueryKey(branch.pre, attn, weights[attn.layer], capture.logits.dtype)

    return of


def attribute_many(
    capture: Capture,
    operator: FrozenTransformer,
    targets: Sequence[Target],
    by: str = "token",
    effect: str = "direct",
    memory_limit: int = SWEEP_LIMIT,
    qk: bool = False,
) -> Iterator[Attribution]:
    """Split many targets of one run, in batched sweeps.

    Args:
        capture: The run.
        operator: Its operator.
        targets: One or more.
        by: As in :func:`attribute`.
        effect: As in :func:`attribute`.
        memory_limit: Bytes that the covectors of one batched sweep may take.
        qk: As in :func:`attribute`.

    Yields:
        One attribution per target.
    """
    each = 4 * (len(operator.steps) + 1) * capture.embed.numel() * capture.frame.dtype.itemsize
    chunk = max(1, memory_limit // each)
    for start in range(0, len(targets), chunk):
        sweeps = [Sweep(capture, operator, target) for target in targets[start : start + chunk]]
        if effect == "total" or by in ("token", "constant", "edge"):  # the others need no sweep
            Sweep.all(sweeps)
        for sweep in sweeps:
            yield attribute(sweep, by, effect, qk)


def _attention_only(sweep: Sweep) -> bool:
    return all(block.mlp is None for block in sweep.capture.blocks)


# --- The splits ----------------------------------------------------------------------------------


def _embedded(sweep: Sweep, rows: Rows, by: str) -> None:
    """Embeddings and all constants, each apart; one of the two kinds per position."""
    for name, embedding in sweep.capture.embeddings.items():
        shares = _dot(sweep.trace.covectors[0], embedding)
        if by == "token":
            rows.spread(Node.parse(name), shares)
        else:
            rows.add([Node.parse(name)], shares.sum(-1, keepdim=True))
    for name, effect in reversed(sweep.trace.effects.items()):
        node = Node.parse(name)
        if by == "token" or node.layer is None:
            rows.add([node], effect.sum(-1, keepdim=True))
        else:
            rows.spread(node, effect)


def top_covector(sweep: Sweep) -> tuple[Float[Tensor, "batch 1 d_model"], Effects]:
    """The target's covector below the final norm, at its position, and the constants above."""
    capture, query = sweep.capture, sweep.target.query
    u, effects = sweep.target.covector[:, None], {}
    if (edit := capture.final_edit) is not None:
        effects[edit.name] = _dot(u, take_row(edit.constant, query))
    if capture.ln_final is not None:
        u = capture.ln_final.row(query).apply_t(u, effects)
    return u, effects


def written_at(
    sweep: Sweep, without: str = ""
) -> Iterator[tuple[Sequence[Node], Float[Tensor, "batch node d_model"]]]:
    """What every writer adds to the residual at the target's position.

    Args:
        sweep: The target.
        without: A kind of node to leave out.

    Yields:
        Nodes, and one vector for each.
    """
    query = sweep.target.query
    for name, embedding in sweep.capture.embeddings.items():
        yield (Node.parse(name),), take_row(embedding, query)
    for step in sweep.operator.steps:
        for branch in step.branches:
            nodes = branch.body.nodes()
            if nodes[0].kind != without:
                yield nodes, branch.outputs_at(step.state, query)
        for name, constant in _outside(step):
            yield (Node.parse(name),), take_row(constant, query)


def _direct(sweep: Sweep, rows: Rows, by: str) -> None:
    """What every writer adds at the target's position, read by the final norm and the target."""
    u, effects = top_covector(sweep)
    split = {"head": "head", "neuron": "mlp"}.get(by, "")
    for step in sweep.operator.steps:
        for branch in step.branches:
            if branch.body.nodes()[0].kind == split:
                _refine(branch, step.state, sweep.target, u, rows)
    by_dimension = torch.zeros_like(u[:, 0])
    for nodes, vectors in written_at(sweep, split):
        if by == "dimension":
            by_dimension += (vectors * u).sum(1)
        else:
            rows.add(nodes, _dot(vectors, u))
    if by == "dimension":
        rows.add([Node("dimension", index=i) for i in range(u.shape[-1])], by_dimension)
    for name, effect in effects.items():
        rows.add([Node.parse(name)], effect)


def _refine(branch: Branch, state: Tensor, target: Target, u: Tensor, rows: Rows) -> None:
    """A branch's direct effect by what it consists of: heads by position read, MLPs by neuron."""
    x, body = branch.read(state), branch.body
    y = u if branch.post is None else branch.post.row(target.query).apply_t(u)
    nodes = body.nodes()
    if nodes[0].kind == "head":
        for node, shares in zip(
            nodes, body.read_at(x, target.query, y[:, 0]).unbind(1), strict=True
        ):
            rows.spread(node, shares)
    else:
        shares = body.hidden_at(x, target.query) * body.output.apply_t(y)[:, 0]
        rows.add(_neurons(nodes[0], shares.shape[-1]), shares)


def _neurons(mlp: Node, width: int) -> list[Node]:
    return [Node("neuron", mlp.layer, i) for i in range(width)]


def _outside(step: Step) -> Iterator[tuple[str, Tensor]]:
    """The constants that a step writes and no node holds."""
    for branch in step.branches:
        yield from branch.outside().items()
    for edit in step.edits:
        yield edit.name, edit.constant


def _total(sweep: Sweep, rows: Rows, by: str) -> None:
    """⟨output, covector where it is written⟩ of every writer, at every position."""
    covectors, steps = sweep.trace.covectors, sweep.operator.steps
    if by == "component":
        for name, embedding in sweep.capture.embeddings.items():
            rows.spread(Node.parse(name), _dot(embedding, covectors[0]))
    for step, c in zip(steps, covectors[1:], strict=False):
        for branch in step.branches:
            body = branch.body
            nodes, kind = body.nodes(), body.nodes()[0].kind
            if by not in ("component", kind) and (by, kind) != ("neuron", "mlp"):
                continue
            y = c if branch.post is None else branch.post.apply_t(c)
            shares = body.hidden_in_run(branch.read(step.state)) * body.output.apply_t(y)
            if by == "neuron":  # per position there would be millions
                rows.add(_neurons(nodes[0], shares.shape[-1]), shares.sum(1))
            else:
                by_node = body.by_node(shares).sum(-1)
                for node, own in zip(nodes, by_node.unbind(-1), strict=True):
                    rows.spread(node, own)
        if by == "component":
            for name, constant in _outside(step):
                rows.spread(Node.parse(name), _dot(constant, c))
    if by == "component":
        for name in sweep.trace.effects:
            if (node := Node.parse(name)).layer is None:
                rows.add([node], sweep.trace.effects[name].sum(-1, keepdim=True))


def _total_by_layer(sweep: Sweep, rows: Rows, by: str) -> None:
    """⟨all that a layer adds, covector after it⟩."""
    steps = enumerate(sweep.operator.steps)
    for layer, own in groupby(steps, key=lambda item: item[1].layer):
        added, after = torch.zeros_like(sweep.capture.embed), 0
        for i, step in own:
            added, after = (
                added + sum(b.map.apply(step.state) + b.map.bias for b in step.branches),
                i,
            )
            for edit in step.edits:
                added = added + edit.constant
        rows.spread(Node("layer", layer), _dot(added, sweep.trace.covectors[after + 1]))


def _orders(sweep: Sweep, rows: Rows) -> None:
    """One state per order: how many heads and MLPs were passed since the source.

    A node's own constants have passed it: order 1. Constants that no node holds are order 0.
    """
    states = torch.stack(
        [sum(sweep.capture.embeddings.values(), torch.zeros_like(sweep.capture.embed))]
    )
    for step in sweep.operator.steps:
        grown = torch.cat([states, torch.zeros_like(states[:1])])
        for branch in step.branches:
            grown[1:] += branch.map.apply(states)
            outside = branch.outside_names()
            for name, constant in branch.map.constants().items():
                grown[0 if name in outside else 1] += constant
        for edit in step.edits:
            grown[0] += edit.constant
        states = grown
    u, effects = top_covector(sweep)
    prompts = torch.arange(u.shape[0], device=u.device)
    shares = _dot(states[:, prompts, sweep.target.query], u[:, 0]).T
    shares[:, 0] += sweep.target.constant + sum(effect.sum(-1) for effect in effects.values())
    rows.add([Node("order", index=n) for n in range(shares.shape[1])], shares)


# --- Labels --------------------------------------------------------------------------------------
