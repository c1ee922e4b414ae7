"""Where a logit comes from: one target, split by source in many ways.

One transposed sweep carries the target's covector u to every residual site. Whatever is written to
the residual, at any position, adds ⟨what is written, covector there⟩ to the target. So one sweep
and dot products give

    token, constant   ⟨embedding, Tᵀu⟩, and the shares of all constants: they sum to the target
    direct effect     ⟨what is written at the target's position, Nᵀu⟩, N the final norm: they sum
    total effect      ⟨what is written, covector where it is written⟩: they overlap and do not sum
    edge              ⟨what one node writes, covector of what another reads⟩: see ``edges.py``

Only a split by order (how many heads and MLPs were passed) needs a state per order instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import CONTENTS, Node
from ..maps import take_row
from ..operator import Branch, Capture, FrozenTransformer, QueryKey, Readers, Step
from ..sublayers import Attention, Experts
from .edges import Writers, edge_products, frozen_readers
from .table import Attribution
from .table_builder import TableBuilder, check_sum, summed
from .target_gradient import TargetGradient, direct_covectors, dot, top_covector
from .targets import Target

BY = (
    "token",
    "constant",
    "layer",
    "component",
    "head",
    "expert",
    "neuron",
    "dimension",
    "edge",
    "order",
)
"""What a target can be split by."""
TOTALS = ("layer", "component", "head", "mlp", "expert", "neuron")
"""What a total effect can be split by: parts that write to the residual above the embedding."""

SWEEP_LIMIT = 512 * 2**20
"""Bytes that the covectors of a batched sweep may take unless the caller allows more."""


def attribute(
    gradient: TargetGradient, by: str = "token", effect: str = "direct", qk: bool = False
) -> Attribution:
    """Split a target by source.

    Args:
        gradient: The target, pulled to every site.
        by: The kind of source, one of :data:`BY`, or of :data:`TOTALS` for total effects; see
            :meth:`TensorLens.attribute`.
        effect: "direct" or "total".
        qk: Whether queries and keys are readers, too; only by edge.

    Returns:
        The contributions, for every prompt.

    Raises:
        ValueError: If ``by`` or ``effect`` does not exist, or ``by`` has no total effect.
        CaptureMismatchError: If the contributions do not sum to the target, up to rounding.
    """
    check_split(by, effect)
    check_qk(by, qk)
    if gradient.target.rows > 1 and effect == "direct" and by not in ("token", "constant"):
        parts = [attribute(row, by, effect, qk) for row in gradient.each_row()]
        return summed(parts, gradient.target.value)
    table = TableBuilder(gradient.capture, gradient.target)
    if effect == "total" and by in ("mlp", "expert", "neuron") and _attention_only(gradient):
        raise ValueError(
            f"by={by!r} needs MLPs, and this model has none. Use by='layer', 'component' or 'head'."
        )
    if effect == "total":
        (_total_by_layer if by == "layer" else _total)(gradient, table, by)
    elif by in ("token", "constant"):
        _embedded(gradient, table, by)
    elif by == "order":
        _orders(gradient, table)
    elif by == "edge":
        return by_edge(
            gradient, Writers.of(gradient.operator, gradient.capture, gradient.target.query), qk=qk
        )
    else:
        _direct(gradient, table, "component" if by == "layer" else by)
    whole = effect == "direct" and by != "order"
    if whole or (effect, by) == ("total", "component"):
        table.add_constants()
    found = check_sum(table.to_attribution(by, effect), gradient)
    return found.sum("layer") if by == "layer" and effect == "direct" else found


def check_split(by: str, effect: str) -> None:
    """Refuse a split that does not exist.

    Args:
        by: The kind of source.
        effect: "direct" or "total".

    Raises:
        ValueError: If one of the two does not exist, or they do not go together.
    """
    if by == "mlp" and effect == "direct":
        raise ValueError(
            "by='mlp' has no direct split of its own, as an MLP reads the target's position alone. "
            "Use by='component' and .select(kind='mlp'), or by='neuron'."
        )
    if by not in (*BY, *TOTALS):
        features = ', or by="feature" with saes=' if by in ("sae", "features", "transcoder") else ""
        raise ValueError(f"by={by!r} does not exist. Use one of {', '.join(BY)}{features}.")
    if effect not in ("direct", "total"):
        raise ValueError(f"effect={effect!r} does not exist. Use 'direct' or 'total'.")
    if effect == "total" and by not in TOTALS:
        raise ValueError(
            f"effect='total' is not available for by={by!r}. Drop effect=, or use by="
            f"{', '.join(map(repr, TOTALS[:-1]))} or {TOTALS[-1]!r}."
        )


def check_qk(by: str, qk: bool) -> None:
    """Refuse ``qk=True`` in a split that is not by edge.

    Raises:
        ValueError: If ``qk`` is True and ``by`` is not "edge".
    """
    if qk and by != "edge":
        raise ValueError(f"qk=True is not available for by={by!r}. Drop qk=, or use by='edge'.")


def by_edge(
    gradient: TargetGradient, writers: Writers, own: bool = True, qk: bool = False
) -> Attribution:
    """Split a target by edge: what each reader makes of what each writer adds.

    Args:
        gradient: The target whose readers read.
        writers: What is written: in this run, or the difference between two runs.
        own: Whether the readers' own constants are rows, too.
        qk: Whether queries and keys are readers, too.

    Returns:
        One row per edge, positions summed. The rows do not sum to the target.

    Raises:
        ValueError: With ``qk``, if the weights of queries and keys are not known, or do not give
            the pattern of the run.
    """
    target, constants = gradient.target, None
    if own:
        constants = {name: effect.sum(-1) for name, effect in gradient.trace.top.items()}
        constants |= target.constants
    scores_of = queries_and_keys(gradient.capture) if qk else None
    readers = frozen_readers(gradient.operator, writers.below, gradient.trace, constants, scores_of)
    return edge_result(gradient, writers, readers)


def edge_result(
    gradient: TargetGradient, writers: Writers, readers: Iterable[Readers]
) -> Attribution:
    """Multiply writers and readers, and make an attribution of the edges."""
    sources, names, values = edge_products(writers, readers, gradient.operator.frame.n_pos)
    table = TableBuilder(gradient.capture, gradient.target)
    table.sources, table.values = list(sources), [values]
    return table.to_attribution("edge", labels=(names,) * len(gradient.target.query))


def queries_and_keys(capture: Capture) -> Callable[[Branch], QueryKey]:
    """Prepare the query and key readers of a run.

    Args:
        capture: The captured run.

    Returns:
        A function that gives the queries and keys of an attention branch.

    Raises:
        ValueError: If the capture does not hold the weights of queries and keys.
    """
    otherwise = "drop qk=: edges into values, MLPs and logits do not need the scores"
    weights = capture.required_scores("qk=True", otherwise)

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
        capture: The captured run.
        operator: The operator of that run.
        targets: The functionals to split, at least one.
        by: As in :func:`attribute`.
        effect: As in :func:`attribute`.
        memory_limit: Bytes that the covectors of one batched sweep may take.
        qk: As in :func:`attribute`.

    Yields:
        One attribution per target.
    """
    # A step keeps about four arrays of the size of the residual per target.
    each = (
        4 * (len(operator.steps) + 1) * capture.resid_final.numel() * capture.frame.dtype.itemsize
    )
    chunk = max(1, memory_limit // each)
    for start in range(0, len(targets), chunk):
        some = targets[start : start + chunk]
        if effect == "total" or by in ("token", "constant", "edge"):
            gradients = TargetGradient.many(capture, operator, some)
        else:  # what is written at the target's own position needs no sweep
            gradients = tuple(TargetGradient(capture, operator, target) for target in some)
        for gradient in gradients:
            yield attribute(gradient, by, effect, qk)


def _attention_only(gradient: TargetGradient) -> bool:
    return all(block.mlp is None for block in gradient.capture.blocks)


# --- The splits ----------------------------------------------------------------------------------


def _embedded(gradient: TargetGradient, table: TableBuilder, by: str) -> None:
    """Embeddings and all constants, each apart. ``by`` names the kind that is split by position."""
    sources = gradient.capture.embeddings
    several = sum(name in CONTENTS for name in sources) > 1
    for name, embedding in sources.items():
        shares = dot(gradient.trace.covectors[0], embedding)
        if by == "token":
            # A patch is not at the row of [CLS]: what stands nowhere in a row has none there.
            there = embedding.any(-1).any(0) if several and name in CONTENTS else None
            table.spread(Node.parse(name), shares, there)
        else:
            table.add([Node.parse(name)], shares.sum(-1, keepdim=True))
    for name, effect in reversed(gradient.trace.effects.items()):
        node = Node.parse(name)
        if by == "token" or node.layer is None:
            table.add([node], effect.sum(-1, keepdim=True))
        else:
            table.spread(node, effect)


def written_at(
    gradient: TargetGradient, without: tuple[str, ...] = (), experts: bool = False
) -> Iterator[tuple[int, Sequence[Node], Float[Tensor, "batch node d_model"]]]:
    """Give what every writer adds to the residual at the target's position.

    Args:
        gradient: The target and its run.
        without: Kinds of nodes to leave out, such as "head".
        experts: Whether the experts of a mixture stand apart, and not as one MLP.

    Yields:
        The index of the covector of :func:`direct_covectors` that reads them, nodes, and one
        vector for each of them.
    """
    query = gradient.target.query
    for name, embedding in gradient.capture.embeddings.items():
        yield 0, (Node.parse(name),), take_row(embedding, query)
    for i, step in enumerate(gradient.operator.steps, 1):
        mixture = None
        for branch in step.branches:
            nodes = branch.body.nodes()
            if nodes[0].kind in without:
                continue
            vectors = branch.outputs_at(step.state, query)
            if nodes[0].kind != "expert" or experts:
                yield i, nodes, vectors
            else:  # routed and shared experts together are the block's MLP
                vectors = vectors.sum(1, keepdim=True)
                mixture = vectors if mixture is None else mixture + vectors
        if mixture is not None:
            yield i, (Node("mlp", step.layer),), mixture
        for name, constant in _outside(step):
            yield i, (Node.parse(name),), take_row(constant, query)
        for name, constant in step.own.items():
            yield i + 1, (Node.parse(name),), take_row(constant, query)


def _direct(gradient: TargetGradient, table: TableBuilder, by: str) -> None:
    """What every writer adds at the target's position, read through the final norm."""
    us, effects = direct_covectors(gradient)
    split = {"head": ("head",), "neuron": ("mlp", "expert")}.get(by, ())
    for step, u in zip(gradient.operator.steps, us[1:], strict=False):
        for branch in step.branches:
            if branch.body.nodes()[0].kind in split:
                _refine(branch, step.state, gradient.target, u, table)
    by_dimension = torch.zeros_like(us[0][:, 0])
    for i, nodes, vectors in written_at(gradient, split, by == "expert"):
        if by == "dimension":
            by_dimension += (vectors * us[i]).sum(1)  # all writers: they sum to the residual
        else:
            table.add(nodes, dot(vectors, us[i]))
    if by == "dimension":
        width = by_dimension.shape[-1]
        table.add([Node("dimension", index=i) for i in range(width)], by_dimension)
    for name, effect in effects.items():
        table.add([Node.parse(name)], effect)


def _refine(branch: Branch, state: Tensor, target: Target, u: Tensor, table: TableBuilder) -> None:
    """A branch's direct effect in finer parts: heads by the position they read, MLPs by neuron."""
    x, body = branch.read(state), branch.body
    y = u if branch.post is None else branch.post.row(target.query).apply_t(u)
    nodes = body.nodes()
    if nodes[0].kind == "head":
        read = body.read_at(x, target.query, y[:, 0])  # [batch, head, pos]
        for node, shares in zip(nodes, read.unbind(1), strict=True):
            table.spread(node, shares)
    elif isinstance(body, Experts):
        row = body.row(target.query)
        _expert_neurons(row, row.hidden(take_row(x, target.query)), y, table)
    else:
        shares = body.hidden_at(x, target.query) * body.output.apply_t(y)[:, 0]
        table.add(_neurons(nodes[0], shares.shape[-1]), shares)


def _expert_neurons(body: Experts, hidden: Tensor, y: Tensor, table: TableBuilder) -> None:
    """The neurons of the experts that tokens reached, and the experts' b_out."""
    output = body.output
    shares = (hidden * output.apply_t(y)).unflatten(-1, (output.slots, -1)).flatten(1, 2)
    experts = body.experts.flatten(1)  # [batch, pos · slot]
    for expert, _ in output.groups:
        own = torch.einsum("bsm,bs->bm", shares, (experts == expert).to(shares))
        table.add(_neurons(body.nodes()[expert], own.shape[-1]), own)
    if output.b is not None:
        table.add([Node.parse(output.name)], (output.bias * y).sum((-2, -1))[:, None])


def _neurons(owner: Node, width: int) -> list[Node]:
    name = "" if owner.kind == "mlp" else str(owner).removeprefix(f"L{owner.layer}")
    return [Node("neuron", owner.layer, i, name) for i in range(width)]


def _outside(step: Step) -> Iterator[tuple[str, Tensor]]:
    """The constants that a step adds to its sum and no node holds, with their names."""
    for branch in step.branches:
        yield from branch.outside().items()
    for edit in step.edits:
        yield edit.name, edit.constant


def _total(gradient: TargetGradient, table: TableBuilder, by: str) -> None:
    """⟨output, covector where it is written⟩ of every writer, at every position."""
    trace, steps = gradient.trace, gradient.operator.steps
    covectors = trace.covectors
    if by == "component":
        for name, embedding in gradient.capture.embeddings.items():
            table.spread(Node.parse(name), dot(embedding, covectors[0]))
    for step, c, after in zip(steps, trace.written, covectors[1:], strict=False):
        mixture: Tensor | float = 0.0
        for branch in step.branches:
            body = branch.body
            nodes, kind = body.nodes(), body.nodes()[0].kind
            whole = kind == "expert" and by in ("component", "mlp")
            neurons = by == "neuron" and kind != "head"
            apart = by == "expert" and kind != "head"
            if by not in ("component", kind) and not (whole or neurons or apart):
                continue
            y = c if branch.post is None else branch.post.apply_t(c)
            hidden = body.hidden_in_run(branch.read(step.state))
            if neurons:  # one row per position would be millions
                if isinstance(body, Experts):
                    _expert_neurons(body, hidden, y, table)
                else:
                    shares = (hidden * body.output.apply_t(y)).sum(1)
                    table.add(_neurons(nodes[0], shares.shape[-1]), shares)
                continue
            by_node = body.node_shares(hidden, y)
            if whole:  # routed and shared experts together are the block's MLP
                mixture = by_node.sum(-1) + mixture
                continue
            for node, own in zip(nodes, by_node.unbind(-1), strict=True):
                table.spread(node, own)
        if isinstance(mixture, Tensor):
            table.spread(Node("mlp", step.layer), mixture)
        if by == "component":
            for name, constant in _outside(step):
                table.spread(Node.parse(name), dot(constant, c))
            for name, constant in step.own.items():
                table.spread(Node.parse(name), dot(constant, after))
    if by == "component":
        for name in gradient.trace.effects:
            if (node := Node.parse(name)).layer is None:
                table.add([node], gradient.trace.effects[name].sum(-1, keepdim=True))


def _total_by_layer(gradient: TargetGradient, table: TableBuilder, by: str) -> None:
    """⟨all that a layer adds, covector after it⟩."""
    steps = enumerate(gradient.operator.steps)
    for layer, own in groupby(steps, key=lambda item: item[1].layer):
        added, after = torch.zeros_like(gradient.capture.resid_final), 0
        for i, step in own:
            added = added + sum(b.map.apply(step.state) + b.map.bias for b in step.branches)
            for edit in step.edits:
                added = added + edit.constant
            added, after = step.normed(added) + sum(step.own.values()), i + 1
        table.spread(Node("layer", layer), dot(added, gradient.trace.covectors[after]))


def _orders(gradient: TargetGradient, table: TableBuilder) -> None:
    """Push one state per order, the number of heads and MLPs passed since the source.

    A node's own constants have passed that node: order 1. Constants that no node holds are order 0.
    """
    states = gradient.capture.input[None]
    for step in gradient.operator.steps:
        grown = torch.cat([states, torch.zeros_like(states[:1])])
        for branch in step.branches:
            grown[1:] += branch.map.apply(states)  # through a node: one order up
            outside = branch.outside_names()
            for name, constant in branch.map.constants().items():
                grown[0 if name in outside else 1] += constant
        for edit in step.edits:
            grown[0] += edit.constant
        states = step.normed(grown)
        states[0] += sum(step.own.values())  # a norm's own b has passed no node
    u, effects = top_covector(gradient)
    prompts = torch.arange(u.shape[0], device=u.device)
    shares = dot(states[:, prompts, gradient.target.query], u[:, 0]).T
    shares[:, 0] += gradient.target.constant + sum(effect.sum(-1) for effect in effects.values())
    table.add([Node("order", index=n) for n in range(shares.shape[1])], shares)
