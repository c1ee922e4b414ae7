"""Edges from features: what a head's values, queries and keys, an MLP or the logits read of them.

    Edge(f → r) = Σ_p z_pf ⟨d_f, covector of r at p⟩

Features stand for all that was written before their site, or for what a sublayer wrote; so do the
error, b_dec, and a mean or a skip where there is one. All else is a writer as ever. So the edges
into one reader sum to that reader's effect, and those into the logits to the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, compress
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
    place = reading.place
    if any(step.norm is not None for step in operator.steps[place.index :]):
        raise ValueError(
            "by='edge' with saes= is not served where norms of the residual follow the site. Use "
            "by='feature'."
        )
    writers = Writers.of(operator, gradient.capture, target.query)
    first, dropped = writers.below[place.first_after], place.written_by(writers.below)
    constants = {name: effect.sum(-1) for name, effect in trace.top.items()} | target.constants
    scores = queries_and_keys(gradient.capture) if qk else None
    every = frozen_readers(operator, writers.below, trace, constants, scores)
    every = [r for r in every if r.n_writers >= first or place.step is not None]
    table = TableBuilder(gradient.capture, target)
    # 1. What every reader after the site makes of the features, and of what stands beside them.
    for group in every:
        if group.n_writers >= first:
            _from_site(reading, group, table)
    # 2. What readers make of all that the features do not stand for, and of their own constants.
    kept = [n not in dropped for n in range(len(writers.nodes))]
    left = [0, *accumulate(kept)]
    late = replace(
        writers,
        nodes=tuple(compress(writers.nodes, kept)),
        below=tuple(left[n] for n in writers.below),
        parts=_kept_parts(writers, kept),
    )
    readers = [replace(r, n_writers=left[r.n_writers]) for r in every]
    sources, _, values = edge_products(late, readers, operator.frame.n_pos)
    table.sources += sources
    table.values.append(values)
    return table.to_attribution("edge")


def _from_site(reading: Reading, group: Readers, table: TableBuilder) -> None:
    """The edges from a site to readers."""
    c = reading.place.inside(group.covectors.wide())  # [reader, batch, pos, d]
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


def _kept_parts(writers: Writers, kept: Sequence[bool]) -> tuple[Any, ...]:
    """The parts of the writers that are kept; a part is kept or dropped as a whole."""
    found, at = [], 0
    for part in writers.parts:
        if kept[at]:
            found.append(part)
        at += 1 if isinstance(part, Tensor) or part is None else len(part.narrow)
    return tuple(found)
