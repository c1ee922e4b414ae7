"""Scores of edges: summed over positions, averaged over prompts, ranked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Attribution, Source
from ..graph import INPUT, Edge, Wiring
from ..passes import EdgeUniverse

NO_SCORES = (
    "This circuit has no scores: its edges were named. Use a circuit that discover returned, or "
    "pass scores by edge."
)


def edge_columns(edges: Sequence[Edge], sources: Sequence[Source]) -> list[int]:
    """Find the edge of every source of a split by edge.

    Args:
        edges: Edges of the model.
        sources: Sources of the split.

    Returns:
        For every source the index of its edge in ``edges``, or −1 for a constant. All sources of
        the embeddings belong to the edge of the input.
    """
    place, columns = {edge: i for i, edge in enumerate(edges)}, []
    for source in sources:
        node = source.node
        if isinstance(node, Edge) and node.src.enters:
            # Token and position embeddings are one writer of the graph, whose score is their sum.
            node = Edge(INPUT, node.dest)
        columns.append(place.get(node, -1) if isinstance(node, Edge) else -1)
    return columns


def edge_sums(
    values: Float[Tensor, "batch source"], columns: Sequence[int], n_edges: int
) -> Float[Tensor, "batch edge"]:
    """Sum a split by edge over positions, in double precision; constants are left out.

    Args:
        values: Contributions of a split by edge.
        columns: The edge of every source, from :func:`edge_columns`.
        n_edges: Number of edges of the model.

    Returns:
        The score of every edge [batch, edge], in float64.
    """
    place = torch.tensor(columns, device=values.device)
    # Constants are no edges: every circuit keeps them.
    kept = (place >= 0).nonzero()[:, 0]
    sums = values.new_zeros(len(values), n_edges, dtype=torch.double)
    # An edge has one column per position, and the embeddings of a position have several.
    return sums.index_add_(1, place[kept], values[:, kept].double())


def edge_scores(wiring: Wiring, found: Attribution) -> dict[Edge, float]:
    """Average a split by edge over its prompts; constants are left out.

    Args:
        wiring: The edges that the model has.
        found: The split by edge. The embeddings are summed to the input.

    Returns:
        Scores by edge, reader by reader from below.
    """
    edges = wiring.edges()
    columns = edge_columns(edges, found.sources)
    sums, there = edge_sums(found.values, columns, len(edges)).mean(0).tolist(), set(columns)
    # Edges that were not split, such as those into queries without qk, have no score, not a 0.
    return {edge: sums[i] for i, edge in enumerate(edges) if i in there}


def ranked_scores(
    universe: EdgeUniverse, ranking: Mapping[Edge, float] | Iterable[Edge | str]
) -> dict[Edge, float]:
    """Turn what a user ranks edges by into scores by edge.

    Args:
        universe: All edges of the model.
        ranking: Scores by edge, a circuit with scores, or edges, best first.

    Returns:
        Scores by edge. All embeddings are one input, whose score is their sum. Edges
        of a list get falling whole numbers.

    Raises:
        ValueError: If a circuit has no scores, or the model has no such edge.
    """
    given = getattr(ranking, "scores", ranking)  # of a circuit, its scores
    if given is not ranking and not given:
        raise ValueError(NO_SCORES)
    ranked = isinstance(given, Mapping)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(
            f"ranking={ranking!r} does not rank edges. Pass scores by edge, or a list of edges, "
            "best first."
        )
    scores: Mapping[Any, float] = given if ranked else dict.fromkeys(given, 0.0)
    found: dict[Edge, float] = {}
    for edge, score in scores.items():
        edge = Edge.parse(edge) if isinstance(edge, str) else edge
        if not isinstance(edge, Edge) or not hasattr(score, "__float__"):
            raise ValueError(
                f"ranking holds {edge} with the score {score!r}, but needs an edge and a number. "
                "Pass edges such as 'L0H1→logits'."
            )
        if edge.src.enters:
            edge = Edge(INPUT, edge.dest)
        found[edge] = found.get(edge, 0.0) + score
    universe.wiring.check(found)
    if ranked:
        return found
    return {edge: float(len(found) - i) for i, edge in enumerate(found)}


def first_edges(
    universe: EdgeUniverse, scores: Mapping[Edge, float], n: int, absolute: bool = True
) -> list[Edge]:
    """The n edges of the highest scores, connected or not.

    Args:
        universe: All edges of the model.
        scores: Scores by edge. An edge without a score has 0.
        n: Number of edges to take.
        absolute: Whether to rank by the absolute value of the score.

    Returns:
        The edges, best first. Edges with equal scores keep the order of the model.
    """

    def rank(edge: Edge) -> float:
        score = scores.get(edge, 0.0)
        return -abs(score) if absolute else -score

    # sorted is stable, so ties are decided by the model and not by a dictionary's order.
    return sorted(universe.edges, key=rank)[:n]
