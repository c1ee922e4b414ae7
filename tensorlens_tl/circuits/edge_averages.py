"""Scores of edges, summed over positions and averaged over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Attribution, Source
from ..graph import INPUT, Edge, Wiring


def edge_columns(edges: Sequence[Edge], sources: Sequence[Source]) -> list[int]:
    """Where in a list of the model's edges every source of a split by edge belongs.

    Args:
        edges: The list.
        sources: The split's.

    Returns:
        For every source its edge's place (token and position embeddings have the input's), or −1 for
        a constant's.
    """
    place, columns = {edge: i for i, edge in enumerate(edges)}, []
    for source in sources:
        node = source.node
        if isinstance(node, Edge) and node.src.kind in ("embed", "pos_embed"):
            node = Edge(INPUT, node.dest)
        columns.append(place.get(node, -1) if isinstance(node, Edge) else -1)
    return columns


def edge_sums(
    values: Float[Tensor, "batch source"], columns: Sequence[int], n_edges: int
) -> Float[Tensor, "batch edge"]:
    """Every edge's score in double precision, constants left out.

    Args:
        values: A split by edge.
        columns: From :func:`edge_columns`.
        n_edges: How many edges there are.

    Returns:
        A row per prompt.
    """
    place = torch.tensor(columns, device=values.device)
    kept = (place >= 0).nonzero()[:, 0]
    sums = values.new_zeros(len(values), n_edges, dtype=torch.double)
    return sums.index_add_(1, place[kept], values[:, kept].double())


def edge_scores(wiring: Wiring, found: Attribution) -> dict[Edge, float]:
    """Every edge's score: a split by edge, averaged over its prompts, constants left out.

    Args:
        wiring: The model's.
        found: The split; token and position embeddings are summed to the input's.

    Returns:
        Scores by edge, reader by reader from below.
    """
    edges = wiring.edges()
    columns = edge_columns(edges, found.sources)
    sums, there = edge_sums(found.values, columns, len(edges)).mean(0).tolist(), set(columns)
    return {edge: sums[i] for i, edge in enumerate(edges) if i in there}
