"""Select the edges of a circuit: rank them by score, cut to a size, keep them connected. No torch.

    greedy      from the logits down: again and again the largest |score| into a selected node
    absolute    the largest |score|
    signed      the largest score
    influence   the largest part that reaches the logits: the logits have influence 1, and a node
                passes its influence to the edges into it in proportion to |score|

1. Rank all edges by one of these rules.
2. Take the best edge, with the edges that connect it. An edge on no path from the input to the
   logits carries nothing. So add the largest edge into its writer, then into the writer of that
   edge, down to a selected node; and likewise the largest edge out of its reader, up to one.
3. Skip an edge whose connection does not fit the size. Repeat until the size is reached.

Pruning after a plain cut may leave nothing instead: the first head of an induction circuit reads
the tokens by an edge that many other edges exceed.

Greedy growth: Hanna, Pezzelle, Belinkov, "Have faith in faithfulness" (arXiv 2403.17806).
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from numbers import Real

from ..checks import is_int
from .nodes import Edge, Node
from .wiring import INPUT, LOGITS, Wiring, owner

SELECTIONS = ("greedy", "absolute", "signed", "influence")


def connected(edges: Iterable[Edge]) -> frozenset[Edge]:
    """Keep the edges that lie on a path from the input to the logits.

    Args:
        edges: The edges to choose from.

    Returns:
        The edges on such a path.
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
    """The share of the logits that passes through every edge, split by |score|.

    Args:
        scores: Score of every edge.
        wiring: Shape of the model.

    Returns:
        Influence of every edge, from 0 to 1. The edges into the logits sum to 1.
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
    """Compute the number that a selection rule ranks every edge by. Larger is better.

    Args:
        scores: Score of every edge.
        wiring: Shape of the model.
        selection: Ranking rule, one of :data:`SELECTIONS`.

    Returns:
        The number of every edge, in the order of ``scores``.

    Raises:
        ValueError: If ``selection`` does not exist, or a score is not finite.
    """
    if selection not in SELECTIONS:
        raise ValueError(
            f"selection={selection!r} does not exist. Use one of {', '.join(SELECTIONS)}."
        )
    if wrong := [edge for edge, score in scores.items() if not math.isfinite(score)]:
        raise ValueError(f"The score of {wrong[0]} is {scores[wrong[0]]}. Scores must be finite.")
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
    """Select the edges of a circuit from their scores.

    Args:
        scores: Score of every candidate edge.
        wiring: Shape of the model.
        n_edges: Largest size of the circuit. Give either this or ``threshold``.
        threshold: Keep every edge ranked at or above this value, with the edges that connect it.
        selection: Ranking rule, one of :data:`SELECTIONS`.

    Returns:
        The selected edges, in the order of ``scores``. All lie on paths from input to logits.

    Raises:
        ValueError: If both or neither of ``n_edges`` and ``threshold`` are given, or one is not a
            usable number.
    """
    values = ranked_by(scores, wiring, selection)
    if (n_edges is None) == (threshold is None):
        given = (
            "neither n_edges= nor threshold=" if n_edges is None else "both n_edges= and threshold="
        )
        raise ValueError(f"The call gives {given}. Give exactly one of them.")
    size, least = len(scores), -math.inf
    if threshold is None:
        size = _count(n_edges, len(scores))
    elif (
        isinstance(threshold, bool)
        or not isinstance(threshold, Real)
        or not math.isfinite(threshold)
    ):
        raise ValueError(f"threshold={threshold!r} is not a finite number. Pass one such as 0.05.")
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
            f"n_edges={n_edges!r} is not an integer from 1 to {total}, the number of ranked edges. "
            "Choose a size in this range."
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
        """Add an edge with the edges that connect it, if they fit.

        Returns:
            The nodes that were not in the circuit before.
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
        """Add the best edge into any selected node, again and again, while one fits."""
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
