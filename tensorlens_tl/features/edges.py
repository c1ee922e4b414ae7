"""Edges from features: what a head's values, queries and keys, an MLP or the logits read of them.

    Edge(f → r) = Σ_p z_pf ⟨d_f, covector of r at p⟩

Features stand for all that was written before their site; so do the error, b_dec, and the mean
where the dictionary normalises. What was written after the site is a writer as ever. So the edges
into one reader sum to that reader's effect, and those into the logits to the target.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attribution import (
    Attribution,
    TableBuilder,
    TargetGradient,
    Writers,
    edge_products,
    frozen_readers,
    queries_and_keys,
)
from ..checks import spelled
from ..graph import Edge
from ..operator import Readers
from .reading import Reading


@spelled
def by_feature_edge(gradient: TargetGradient, reading: Reading, qk: bool = False) -> Attribution:
    """Split a target by edge, from the features of one site on.

    Args:
        gradient: The target whose readers read.
        reading: The features of the site.
        qk: Whether queries and keys are readers, too.

    Returns:
        One row per edge, positions summed. The rows do not sum to the target.

    Raises:
        ValueError: If the site comes after the target's, or the model normalises the residual.
    """
    operator, target, trace = gradient.operator, gradient.target, gradient.trace
    reading.check_below(operator)
    if any(step.norm is not None for step in operator.steps[reading.index :]):
        raise ValueError(
            "by='edge' with saes= is not served where norms of the residual follow the site. Use "
            "by='feature'."
        )
    writers = Writers.of(operator, gradient.capture, target.query)
    first = writers.below[reading.index]
    constants = {name: effect.sum(-1) for name, effect in trace.top.items()} | target.constants
    scores = queries_and_keys(gradient.capture) if qk else None
    every = frozen_readers(operator, writers.below, trace, constants, scores)
    readers = [r for r in every if r.n_writers >= first]
    table = TableBuilder(gradient.capture, target)
    # 1. What every reader makes of the features, and of what stands beside them.
    for group in readers:
        _from_site(reading, group, table)
    # 2. What it makes of what was written later, and of its own constants.
    late = replace(
        writers,
        nodes=writers.nodes[first:],
        below=tuple(n - first for n in writers.below),
        parts=_after(writers, first),
    )
    readers = [replace(r, n_writers=r.n_writers - first) for r in readers]
    sources, _, values = edge_products(late, readers, operator.frame.n_pos)
    table.sources += sources
    table.values.append(values)
    return table.to_attribution("edge")


def _from_site(reading: Reading, group: Readers, table: TableBuilder) -> None:
    """The edges from a site to readers."""
    c = group.covectors.wide()  # [reader, batch, pos, d_model]
    batch, n_pos = c.shape[1:3]
    features, at = reading.features.unique(return_inverse=True)
    prompt, n = reading.at // n_pos, len(features)
    by_feature = c.new_zeros(len(c), batch * n)
    by_feature.index_add_(1, prompt * n + at, reading.shares(c))
    beside = reading.beside(c)
    nodes = [*map(reading.node, features.tolist()), *beside]
    for i, reader in enumerate(group.nodes):
        rest = [part[i].sum(-1, keepdim=True) for part in beside.values()]
        table.add(
            [Edge(node, reader) for node in nodes],
            torch.cat([by_feature[i].view(batch, n), *rest], -1),
        )


def _after(writers: Writers, first: int) -> tuple[Any, ...]:
    """The parts of the writers from a number on."""
    found, at = [], 0
    for part in writers.parts:
        if at >= first:
            found.append(part)
        at += 1 if isinstance(part, Tensor) or part is None else len(part.narrow)
    return tuple(found)
