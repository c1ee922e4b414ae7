"""The edges that a model of a given shape has. No torch.

Writers are ``input`` (all that enters the first block), heads, MLPs and experts.
Readers are the queries, keys and values of every query head, the MLPs, the experts, and the logits.
Constants write, too, but a circuit does not choose them: they are always kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from .nodes import CONTENTS, Edge, Node

INPUT, LOGITS = Node("input"), Node("logits")


def owner(reader: Node) -> Node:
    """The node that a reader belongs to: the head L2H1 for its input "L2H1.k"."""
    return replace(reader, name="") if reader.kind == "head" else reader


@dataclass(frozen=True)
class Wiring:
    """The shape of a model, as far as it decides which edges exist.

    Attributes:
        n_layers: Number of blocks.
        n_heads: Number of query heads in each block; one number per block where blocks differ.
        parallel: Whether attention and MLP of a block read the same residual.
        attn_only: Whether the model has no MLPs.
        experts: For a model with mixtures of experts, the nodes of every block's MLP: its experts,
            or the one MLP of a dense block. Empty for all other models.
    """

    n_layers: int
    n_heads: int | tuple[int, ...]
    parallel: bool = False
    attn_only: bool = False
    experts: tuple[tuple[Node, ...], ...] = ()

    def mlps(self, layer: int) -> tuple[Node, ...]:
        """The nodes of a block beside its heads: its MLP, its experts, or none."""
        if self.experts:
            return self.experts[layer]
        return () if self.attn_only else (Node("mlp", layer),)

    def heads_of(self, layer: int) -> int:
        """Number of query heads in one block."""
        return self.n_heads if isinstance(self.n_heads, int) else self.n_heads[layer]

    def writers(self) -> tuple[Node, ...]:
        """All writers, first to last."""
        found = [INPUT]
        for layer in range(self.n_layers):
            found += [Node("head", layer, head) for head in range(self.heads_of(layer))]
            found += self.mlps(layer)
        return tuple(found)

    def readers(self, qk: bool = True) -> tuple[Node, ...]:
        """All readers, first to last.

        Args:
            qk: Whether to include queries and keys.

        Returns:
            The readers as nodes, the logits last.
        """
        found: list[Node] = []
        for layer in range(self.n_layers):
            for name in "qkv" if qk else "v":
                found += [Node("head", layer, head, name) for head in range(self.heads_of(layer))]
            found += self.mlps(layer)
        return (*found, LOGITS)

    def edges(self, qk: bool = True) -> tuple[Edge, ...]:
        """All edges, grouped by reader, first reader first.

        Args:
            qk: Whether queries and keys are readers.

        Returns:
            The edges that this model has.
        """
        return _edges(self, qk)

    def below(self, qk: bool = True) -> tuple[int, ...]:
        """Number of writers that every reader sees: the first so many."""
        written = [self._written(src) for src in self.writers()]  # from below, so it never falls
        return tuple(bisect_right(written, self._read(dest)) for dest in self.readers(qk))

    def numbers(self, edges: Iterable[Any]) -> list[int | None]:
        """Number of every edge in :meth:`edges`; None for what is no edge of this model."""
        places = _places(self)
        return [places.get(edge) if type(edge) is Edge else None for edge in edges]

    def has(self, edge: Edge) -> bool:
        """Whether this model has the edge."""
        return edge in _places(self)

    def check(self, edges: Iterable[Edge]) -> None:
        """Refuse edges that this model does not have.

        Raises:
            ValueError: If a node does not exist, or an edge goes against the order of layers.
        """
        writers, readers = _members(self)
        known = _places(self)
        for edge in (edge for edge in edges if edge not in known):
            for node, known, role in ((edge.src, writers, "writes"), (edge.dest, readers, "reads")):
                if node not in known:
                    raise ValueError(
                        f"The edge {edge} does not exist, because nothing called {node} {role} in "
                        f"this model. Use one of {_some(known)}."
                    )
            raise ValueError(
                f"The edge {edge} does not exist, because {edge.dest} reads before {edge.src} "
                "writes. Use an edge along the order of layers."
            )

    # A half-step of the run each: 2l is before attention of block l, 2l + 1 after it and before the
    # MLP, 2l + 2 after the MLP. A reader sees every writer whose half-step is not after its own.

    def _written(self, writer: Node) -> int:
        if writer.layer is None:
            return 0
        return 2 * writer.layer + (1 if writer.kind == "head" else 2)

    def _read(self, reader: Node) -> int:
        if reader.layer is None:
            return 2 * self.n_layers
        return 2 * reader.layer + (reader.kind != "head" and not self.parallel)


@lru_cache(maxsize=16)
def _edges(wiring: Wiring, qk: bool) -> tuple[Edge, ...]:
    writers, found = wiring.writers(), []
    for dest, below in zip(wiring.readers(qk), wiring.below(qk), strict=True):
        found += [Edge(src, dest) for src in writers[:below]]
    return tuple(found)


@lru_cache(maxsize=16)
def _places(wiring: Wiring) -> dict[Edge, int]:
    return {edge: i for i, edge in enumerate(wiring.edges())}


@lru_cache(maxsize=16)
def _members(wiring: Wiring) -> tuple[dict[Node, None], dict[Node, None]]:
    return dict.fromkeys(wiring.writers()), dict.fromkeys(wiring.readers())


def _some(nodes: dict[Node, None]) -> str:
    names = list(map(str, nodes))
    return ", ".join(names if len(names) <= 12 else [*names[:6], "…", *names[-5:]])


def as_edges(
    wiring: Wiring, given: Iterable[Edge | Node | str], sources: Collection[str] | None = None
) -> tuple[Edge, ...]:
    """The edges that a user named, or all edges between the nodes that a user named.

    Args:
        wiring: Shape of the model.
        given: Either edges such as "L0H1→L1H2.k", or nodes such as "L0H1". Nodes are joined with
            each other, the input and the logits. All sources together stand for ``input``.
        sources: Names of the sources that sum to what enters the first block; None where they are
            not known.

    Returns:
        The edges without repeats, in the order of :meth:`Wiring.edges`.

    Raises:
        ValueError: If ``given`` mixes nodes and edges, or the model lacks one of them.
    """
    if isinstance(given, str | Node | Edge) or not isinstance(given, Iterable):
        raise ValueError(f"{given!r} is not a list of nodes or edges. Put it in a list.")
    given = list(given)
    numbers = wiring.numbers(given)
    if None not in numbers:  # edges of the model all
        edges = wiring.edges()
        return tuple(edges[i] for i in sorted({i for i in numbers if i is not None}))
    items = [
        (Edge if "→" in item or "->" in item else Node).parse(item)
        if isinstance(item, str)
        else item
        for item in given
    ]
    if odd := [item for item in items if not isinstance(item, Edge | Node)]:
        raise ValueError(f"{odd[0]!r} is neither a node nor an edge. Pass names such as 'L0H1'.")
    if items and all(isinstance(item, Node) for item in items):
        nodes = {owner(_whole(node)) for node in items if isinstance(node, Node)}
        if unknown := nodes - set(wiring.writers()) - {LOGITS}:
            node = min(map(str, unknown))
            raise ValueError(
                f"The model has no node {node}. Use one of {_some(_members(wiring)[0])}."
            )
        nodes |= {INPUT, LOGITS}
        return tuple(e for e in wiring.edges() if e.src in nodes and owner(e.dest) in nodes)
    if any(isinstance(item, Node) for item in items):
        raise ValueError(
            "The list holds both nodes and edges. Name edges only, or nodes only: all edges "
            "between the nodes are then kept."
        )
    edges = {item for item in items if isinstance(item, Edge)}
    _all_sources(edges, sources)
    wanted = {Edge(_whole(edge.src), edge.dest) for edge in edges}
    wiring.check(wanted)
    return tuple(sorted(wanted, key=_places(wiring).__getitem__))


def _whole(node: Node) -> Node:
    return INPUT if node.enters else node


def _all_sources(edges: set[Edge], sources: Collection[str] | None) -> None:
    given: dict[Node, set[str]] = {}
    for edge in edges:
        if edge.src.enters:
            given.setdefault(edge.dest, set()).add(str(edge.src))
    for dest in sorted(given, key=str):
        # Of sources that are not known, what stands at a position is one for certain.
        whole = sources or [name for name in CONTENTS if name in given[dest]] or ["embed"]
        if not given[dest] >= {*whole} or (sources and len(given[dest]) > len(whole)):
            named, whole = (", ".join(sorted(names)) for names in (given[dest], whole))
            raise ValueError(
                f"Of the sources, {named} was given for {dest}, but the operator acts on their "
                f"sum: {whole}. Name all of these, or input→{dest}."
            )
