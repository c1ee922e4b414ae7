"""Which edges make a circuit: ranked by their scores, cut to a size, connected. No torch.

    greedy      from the logits down: again and again the largest |score| into a node that is in
    absolute    the largest |score|
    signed      the largest score
    influence   what an edge carries to the logits: a node passes its influence down to the edges
                into it in proportion to |score|, the logits have 1

An edge that is on no path from the input to the logits carries nothing and is left out; so a
ranking is read until as many edges as asked for are connected.

Greedy selection: Hanna, Pezzelle, Belinkov, "Have faith in faithfulness" (arXiv 2403.17806).
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from .graph import Edge, Node
from .wiring import INPUT, LOGITS, Wiring, owner

METHODS = ("greedy", "absolute", "signed", "influence")


def connected(edges: Iterable[Edge]) -> frozenset[Edge]:
    """The edges on a path from the input to the logits.

    Args:
        edges: Some edges.

    Returns:
        Those of them.
    """
    edges = list(edges)
    down, up = defaultdict(list), defaultdict(list)
    for edge in edges:
        up[edge.src].append(owner(edge.dest))
        down[owner(edge.dest)].append(edge.src)
    reached, needed = _reach(INPUT, up), _reach(LOGITS, down)
    return frozenset(e for e in edges if e.src in reached and owner(e.dest) in needed)


def _reach(start: Node, following: Mapping[Node, list[Node]]) -> set[Node]:
    found, todo = {start}, [start]
    while todo:
        new = set(following.get(todo.pop(), ())) - found
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


def ranking(scores: Mapping[Edge, float], wiring: Wiring, method: str) -> list[tuple[Edge, float]]:
    """Edges in the order in which a method takes them, with what it ranks them by.

    Args:
        scores: Every edge's.
        wiring: The model's.
        method: One of :data:`METHODS`.

    Returns:
        Edges and numbers; equal ones in the order of ``scores``.

    Raises:
        ValueError: If there is no such method, or a score is no number.
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}")
    if wrong := [edge for edge, score in scores.items() if not math.isfinite(score)]:
        raise ValueError(f"the score of {wrong[0]} is {scores[wrong[0]]}, expected a finite number")
    if method == "influence":
        values = influences(scores, wiring)
    else:
        values = {e: score if method == "signed" else abs(score) for e, score in scores.items()}
    if method == "greedy":
        return _greedy(values)
    return sorted(values.items(), key=lambda item: -item[1])


def _greedy(values: Mapping[Edge, float]) -> list[tuple[Edge, float]]:
    into: dict[Node, list[tuple[float, int, Edge]]] = defaultdict(list)
    for i, (edge, value) in enumerate(values.items()):
        into[owner(edge.dest)].append((-value, i, edge))
    inside, todo, found = {LOGITS, INPUT}, into[LOGITS], []
    heapq.heapify(todo)
    while todo:
        value, _, edge = heapq.heappop(todo)
        found.append((edge, -value))
        if edge.src not in inside:
            inside.add(edge.src)
            for item in into[edge.src]:
                heapq.heappush(todo, item)
    return found


def select(
    scores: Mapping[Edge, float],
    wiring: Wiring,
    n_edges: int | None = None,
    threshold: float | None = None,
    method: str = "greedy",
) -> tuple[Edge, ...]:
    """A circuit's edges.

    Args:
        scores: Every edge's.
        wiring: The model's.
        n_edges: At most so many, all of them connected; or
        threshold: what the method ranks by is at least this.
        method: One of :data:`METHODS`.

    Returns:
        The edges, in the order of ``scores``; none where even the first path has more.

    Raises:
        ValueError: If not one of ``n_edges`` and ``threshold`` is given, or it makes no sense.
    """
    order = ranking(scores, wiring, method)
    if (n_edges is None) == (threshold is None):
        given = "both" if n_edges is not None else "neither"
        raise ValueError(f"expected n_edges or threshold, got {given}: give one of them")
    if threshold is not None:
        if isinstance(threshold, bool) or not math.isfinite(threshold):
            raise ValueError(f"expected threshold as a finite number, got {threshold!r}")
        kept = connected(edge for edge, value in order if value >= threshold)
    else:
        kept = _largest(order, _count(n_edges, len(scores)))
    return tuple(edge for edge in scores if edge in kept)


def _count(n_edges: object, total: int) -> int:
    if isinstance(n_edges, bool) or not isinstance(n_edges, int) or not 1 <= n_edges <= total:
        raise ValueError(
            f"expected n_edges as an integer from 1 to {total}, all the edges that were ranked, got "
            f"{n_edges!r}"
        )
    return n_edges


def _largest(order: Sequence[tuple[Edge, float]], n_edges: int) -> frozenset[Edge]:
    # The longer a prefix, the more of it is connected.
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        enough = len(connected(e for e, _ in order[:middle])) <= n_edges
        low, high = (middle, high) if enough else (low, middle - 1)
    return connected(edge for edge, _ in order[:low])
