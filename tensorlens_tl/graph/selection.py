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
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
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
    links = [(edge.src, owner(edge.dest), score) for edge, score in scores.items()]
    shares, _ = shared_out(links, (LOGITS, *reversed(wiring.writers())))
    return dict(zip(scores, shares, strict=True))


def shared_out(
    links: Sequence[tuple[Hashable, Hashable, float]], order: Sequence[Hashable]
) -> tuple[list[float], dict[Hashable, float]]:
    """Pass 1 from the last node down: every node shares out what it has by |weight|.

    Args:
        links: The writer, the reader and the weight of every edge.
        order: All nodes. The last node of the graph comes first, and readers before their writers.

    Returns:
        What passes through every edge, and what reaches every node.
    """
    into: dict[Hashable, list[int]] = defaultdict(list)
    for i, (_, dest, _) in enumerate(links):
        into[dest].append(i)
    of_node: dict[Hashable, float] = defaultdict(float, {order[0]: 1.0})
    found = [0.0] * len(links)
    for node in order:
        total = math.fsum(abs(links[i][2]) for i in into[node])
        for i in into[node]:
            src, _, weight = links[i]
            found[i] = of_node[node] * abs(weight) / total if total else 0.0
            of_node[src] += found[i]
    return found, of_node


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
    _check_selection(selection)
    return dict(zip(scores, _numbers(scores, wiring, selection), strict=True))


def _numbers(scores: Mapping[Edge, float], wiring: Wiring, selection: str) -> list[float]:
    numbers = list(scores.values())
    if not all(map(math.isfinite, numbers)):
        edge, score = next((e, s) for e, s in scores.items() if not math.isfinite(s))
        raise ValueError(f"The score of {edge} is {score}. Use finite numbers.")
    if selection == "influence":
        found = influences(scores, wiring)
        return [found[edge] for edge in scores]
    return numbers if selection == "signed" else list(map(abs, numbers))


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
    _check_selection(selection)
    # 1. The rank of every edge.
    values = _numbers(scores, wiring, selection)
    size, least = limits(len(scores), n_edges, threshold, selection)
    edges = tuple(scores)
    growth = _Growth(edges, values, size)
    if selection == "greedy":
        growth.from_the_logits(least)
    else:
        for i in growth.best_first(range(len(values))):
            if len(growth.edges) == size or values[i] < least:
                break
            growth.add(i)
    return tuple(edges[i] for i in sorted(growth.edges))


def limits(
    total: int, n_edges: int | None, threshold: float | None, selection: str
) -> tuple[int, float]:
    """Check how much is to be selected, before there are scores.

    Args:
        total: Number of candidate edges.
        n_edges: Largest size of the circuit, or None.
        threshold: Smallest number an edge may be ranked by, or None.
        selection: Ranking rule, one of :data:`SELECTIONS`.

    Returns:
        The largest size, and the smallest number.

    Raises:
        ValueError: If the rule does not exist, both or neither of ``n_edges`` and ``threshold`` are
            given, or one is not a usable number.
    """
    _check_selection(selection)
    if (n_edges is None) == (threshold is None):
        given = (
            "neither n_edges= nor threshold=" if n_edges is None else "both n_edges= and threshold="
        )
        raise ValueError(f"The call gives {given}. Give exactly one of them.")
    if threshold is None:
        return _count(n_edges, total), -math.inf
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, Real)
        or not math.isfinite(threshold)
    ):
        raise ValueError(f"threshold={threshold!r} is not a finite number. Pass one such as 0.05.")
    return total, float(threshold)


def _check_selection(selection: str) -> None:
    if selection not in SELECTIONS:
        raise ValueError(
            f"selection={selection!r} does not exist. Use one of {', '.join(SELECTIONS)}."
        )


def _count(n_edges: object, total: int) -> int:
    if not is_int(n_edges) or not 1 <= n_edges <= total:
        raise ValueError(
            f"n_edges={n_edges!r} is not an integer from 1 to {total}, the number of ranked edges. "
            "Choose a size in this range."
        )
    return int(n_edges)


class _Growth:
    """A circuit that stays connected while edges are added. Edges and nodes are numbers."""

    def __init__(self, edges: Sequence[Edge], values: Sequence[float], size: int):
        self.values, self.size = values, size
        self.src, self.dest = ends(edges)
        self.edges: set[int] = set()
        self.nodes = {_INPUT, _LOGITS}
        self.into: dict[int, list[int]] = defaultdict(list)
        self.best_in: dict[int, int] = {}
        self.best_out: dict[int, int] = {}
        for i, (src, dest) in enumerate(zip(self.src, self.dest, strict=True)):
            self.into[dest].append(i)
            for best, node in ((self.best_in, dest), (self.best_out, src)):
                if node not in best or values[i] > values[best[node]]:
                    best[node] = i

    def best_first(self, edges: Iterable[int]) -> list[int]:
        """Sort edges by their numbers. Of equal ones the first in the order of scores is first."""
        return sorted(edges, key=lambda i: -self.values[i])

    def add(self, edge: int) -> set[int]:
        """Add an edge with the edges that connect it, if they fit.

        Returns:
            The nodes that were not in the circuit before.
        """
        if edge in self.edges:
            return set()
        # 2. The edge, with what connects it below and above.
        chain, node = [edge], self.src[edge]
        while node not in self.nodes and node in self.best_in:
            chain.append(self.best_in[node])
            node = self.src[chain[-1]]
        top = self.dest[edge]
        while top not in self.nodes and top in self.best_out:
            chain.append(self.best_out[top])
            top = self.dest[chain[-1]]
        # 3. Skipped where that does not fit.
        fits = len(self.edges) + len(chain) <= self.size
        if not fits or node not in self.nodes or top not in self.nodes:
            return set()
        self.edges.update(chain)
        new = {end for i in chain for end in (self.src[i], self.dest[i])} - self.nodes
        self.nodes |= new
        return new

    def from_the_logits(self, least: float) -> None:
        """Add the best edge into any selected node, again and again, while one fits."""
        waiting: dict[int, Iterator[int]] = {}
        todo: list[tuple[float, int, int]] = []

        def next_into(node: int) -> None:  # the heap holds one edge per node: its next
            edge = next(waiting[node], None)
            if edge is not None and self.values[edge] >= least:
                heapq.heappush(todo, (-self.values[edge], edge, node))

        def open_node(node: int) -> None:
            waiting[node] = iter(self.best_first(self.into[node]))
            next_into(node)

        open_node(_LOGITS)
        while todo and len(self.edges) < self.size:
            _, edge, node = heapq.heappop(todo)
            next_into(node)
            for new in self.add(edge):
                open_node(new)


_INPUT, _LOGITS = 0, 1


def ends(edges: Sequence[Edge]) -> tuple[list[int], list[int]]:
    """Number the nodes at both ends of edges: 0 is the input, 1 the logits.

    Args:
        edges: Edges of one model.

    Returns:
        The number of every edge's writer, and of the node that its reader belongs to.
    """
    number: dict[Node, int] = {INPUT: _INPUT, LOGITS: _LOGITS}
    of_reader: dict[Node, int] = {}
    src, dest = [], []
    for edge in edges:
        src.append(number.setdefault(edge.src, len(number)))
        if (at := of_reader.get(edge.dest)) is None:
            at = of_reader[edge.dest] = number.setdefault(owner(edge.dest), len(number))
        dest.append(at)
    return src, dest
