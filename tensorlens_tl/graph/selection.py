"""Which edges make a circuit: ranked by their scores, cut to a size, connected. No torch.

    greedy      from the logits down: again and again the largest |score| into a node that is in
    absolute    the largest |score|
    signed      the largest score
    influence   what an edge carries to the logits: a node passes its influence down to the edges
                into it in proportion to |score|, the logits have 1

An edge that is on no path from the input to the logits carries nothing. So an edge comes with what
connects it: the largest edge into its writer, into that one's writer and so on down to a node that
is in, and likewise the largest out of its reader up. Where that passes the size asked for, the edge
is passed over. (Cut at a size and pruned instead, a ranking may leave nothing: an induction
circuit's first head reads the tokens by an edge that many are larger than.)

Greedy growth: Hanna, Pezzelle, Belinkov, "Have faith in faithfulness" (arXiv 2403.17806).
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..checks import is_int
from .nodes import Edge, Node
from .wiring import INPUT, LOGITS, Wiring, owner

SELECTIONS = ("greedy", "absolute", "signed", "influence")


def connected(edges: Iterable[Edge]) -> frozenset[Edge]:
    """The edges on a path from the input to the logits.

    Args:
        edges: Some edges.

    Returns:
        Those of them.
    """
    edges, up, down = list(edges), defaultdict(set), defaultdict(set)
    for edge in edges:
        up[edge.src].add(owner(edge.dest))
        down[owner(edge.dest)].add(edge.src)
    reached, needed = _reach(INPUT, up), _reach(LOGITS, down)
    return frozenset(e for e in edges if e.src in reached and owner(e.dest) in needed)


def _reach(start: Node, following: Mapping[Node, set[Node]]) -> set[Node]:
    found, todo = {start}, [start]
    while todo:
        new = following.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def influences(scores: Mapping[Edge, float], wiring: Wiring) -> dict[Edge, float]:
    """What every edge carries to the logits, by shares of |score|.

    Args:
        scores: Every edge's.
        wiring: The model's.

    Returns:
        Numbers from 0 to 1; those into the logits sum to 1.
    """
    into: dict[Node, list[Edge]] = defaultdict(list)
    for edge in scores:
        into[owner(edge.dest)].append(edge)
    of_node: dict[Node, float] = defaultdict(float, {LOGITS: 1.0})
    found: dict[Edge, float] = {}
    for node in (LOGITS, *reversed(wiring.writers())):
        total = math.fsum(abs(scores[edge]) for edge in into[node])
        for edge in into[node]:
            found[edge] = of_node[node] * abs(scores[edge]) / total if total else 0.0
            of_node[edge.src] += found[edge]
    return found


def ranked_by(scores: Mapping[Edge, float], wiring: Wiring, selection: str) -> dict[Edge, float]:
    """The number that a selection ranks every edge by, the larger the better.

    Args:
        scores: Every edge's.
        wiring: The model's.
        selection: One of :data:`SELECTIONS`.

    Returns:
        Numbers by edge, in the order of ``scores``.

    Raises:
        ValueError: If there is no such selection, or a score is no number.
    """
    if selection not in SELECTIONS:
        raise ValueError(
            f"selection={selection!r} does not exist. Use one of {', '.join(SELECTIONS)}."
        )
    if wrong := [edge for edge, score in scores.items() if not math.isfinite(score)]:
        raise ValueError(f"the score of {wrong[0]} is {scores[wrong[0]]}, expected a finite number")
    if selection == "influence":
        found = influences(scores, wiring)
        return {edge: found[edge] for edge in scores}
    return {edge: score if selection == "signed" else abs(score) for edge, score in scores.items()}


def select(
    scores: Mapping[Edge, float],
    wiring: Wiring,
    n_edges: int | None = None,
    threshold: float | None = None,
    selection: str = "greedy",
) -> tuple[Edge, ...]:
    """A circuit's edges.

    Args:
        scores: Every edge's.
        wiring: The model's.
        n_edges: So many, or
        threshold: all edges that are ranked by at least this, with what connects them.
        selection: One of :data:`SELECTIONS`.

    Returns:
        The edges, in the order of ``scores``: all on paths from the input to the logits.

    Raises:
        ValueError: If not one of ``n_edges`` and ``threshold`` is given, or it makes no sense.
    """
    values = ranked_by(scores, wiring, selection)
    if (n_edges is None) == (threshold is None):
        given = "both" if n_edges is not None else "neither"
        raise ValueError(f"expected n_edges or threshold, got {given}: give one of them")
    size, least = len(scores), -math.inf
    if threshold is None:
        size = _count(n_edges, len(scores))
    elif isinstance(threshold, bool) or not math.isfinite(threshold):
        raise ValueError(f"expected threshold as a finite number, got {threshold!r}")
    else:
        least = threshold
    growth = _Growth(values, size)
    if selection == "greedy":
        growth.from_the_logits(least)
    else:
        for edge in sorted(values, key=lambda e: -values[e]):
            if len(growth.edges) == size or values[edge] < least:
                break
            growth.add(edge)
    return tuple(edge for edge in scores if edge in growth.edges)


def _count(n_edges: object, total: int) -> int:
    if not is_int(n_edges) or not 1 <= n_edges <= total:
        raise ValueError(
            f"expected n_edges as an integer from 1 to {total}, all the edges that were ranked, got "
            f"{n_edges!r}"
        )
    return int(n_edges)


class _Growth:
    """A circuit that stays connected while edges are added."""

    def __init__(self, values: Mapping[Edge, float], size: int):
        self.values, self.size = values, size
        self.edges: set[Edge] = set()
        self.nodes = {INPUT, LOGITS}
        self.into: dict[Node, list[Edge]] = defaultdict(list)
        self.best_in: dict[Node, Edge] = {}
        self.best_out: dict[Node, Edge] = {}
        for edge, value in values.items():
            self.into[owner(edge.dest)].append(edge)
            for best, node in ((self.best_in, owner(edge.dest)), (self.best_out, edge.src)):
                if node not in best or value > values[best[node]]:
                    best[node] = edge

    def add(self, edge: Edge) -> list[Node]:
        """Add an edge and what connects it, if that fits.

        Returns:
            The nodes that are new.
        """
        if edge in self.edges:
            return []
        chain, node = [edge], edge.src
        while node not in self.nodes and node in self.best_in:
            chain.append(self.best_in[node])
            node = chain[-1].src
        top = owner(edge.dest)
        while top not in self.nodes and top in self.best_out:
            chain.append(self.best_out[top])
            top = owner(chain[-1].dest)
        fits = len(self.edges) + len(chain) <= self.size
        if not fits or node not in self.nodes or top not in self.nodes:
            return []
        self.edges.update(chain)
        new = {end for e in chain for end in (e.src, owner(e.dest))} - self.nodes
        self.nodes |= new
        return sorted(new, key=str)

    def from_the_logits(self, least: float) -> None:
        """Add the largest edge into a node that is in, as long as one fits."""
        order = {edge: i for i, edge in enumerate(self.values)}
        todo: list[tuple[float, int, Edge]] = []

        def candidates(node: Node) -> None:
            for edge in self.into[node]:
                if self.values[edge] >= least:
                    heapq.heappush(todo, (-self.values[edge], order[edge], edge))

        candidates(LOGITS)
        while todo and len(self.edges) < self.size:
            for node in self.add(heapq.heappop(todo)[2]):
                candidates(node)
