"""The edges of one target at positions: what a node writes at one, and what another makes of it.

    weight((w, p) → (r, q)) = ⟨what w writes at p, covector of r at p⟩

The covector is that of an edge (see ``attribution/edges.py``), pulled back from position q alone.
So the weights of (w, p) → (r, q) over all p and q sum to the edge w → r. The weights into (r, q)
and the reader's own constants sum to the total effect of (r, q). The weights into the target sum
to the target.

1. Rank all nodes by their total effect, and keep the largest.
2. Take what each of them writes at its position.
3. Pull the target's covector back through each of them, and multiply. Norms of the residual
   between a writer and a reader are passed on the way, as in ``attribution/edges.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Attribution, TargetGradient, Writers, attribute, queries_and_keys
from ..checks import at_least_one
from ..graph import CONTENTS, INPUT, LOGITS, Edge, Node, owner
from ..maps import Factored, put_row, take_row
from ..operator import Branch
from .attribution_graph import AttributionGraph
from .placed_graph import GraphLink, GraphNode

Place = tuple[Node, int]
"""A node and the position at which it writes, as a tensor index."""


def find_graph(
    gradient: TargetGradient,
    n_nodes: int = 100,
    n_links: int = 2000,
    qk: bool = True,
    only: Collection[Edge] | None = None,
) -> AttributionGraph:
    """Find the nodes of the largest total effects, and the edges between them.

    Args:
        gradient: The target and its run, of one prompt.
        n_nodes: How many heads, MLPs, experts and constants to keep. Tokens are all kept.
        n_links: How many edges to keep, by absolute value.
        qk: Whether queries and keys are readers, too.
        only: The edges of a circuit, or None for all edges. Constants are always kept.

    Returns:
        The graph, its target's tokens and probabilities left out.

    Raises:
        ValueError: If there are several prompts, the target reads several rows, or a number is
            below 1.
    """
    n_nodes, n_links = at_least_one(n_nodes, "n_nodes"), at_least_one(n_links, "n_links")
    frame, target = gradient.capture.frame, gradient.target.alone("attribution_graph")
    if frame.batch != 1:
        raise ValueError(
            f"attribution_graph needs one prompt, but the lens has {frame.batch}. Take one with "
            "lens[i]."
        )
    # 1. The nodes.
    effects = _total_effects(gradient)
    if only is not None:
        ends = {edge.src for edge in only} | {owner(edge.dest) for edge in only}
        effects = {at: x for at, x in effects.items() if _whole(at[0]) in ends or _constant(at[0])}
    tokens = [at for at in effects if at[0].kind in CONTENTS]
    others = [at for at in effects if at[0].kind not in CONTENTS]
    others.sort(key=lambda at: -abs(effects[at]))
    kept = {*tokens, *others[:n_nodes]}
    least = abs(effects[others[n_nodes - 1]]) if len(others) > n_nodes else 0.0
    # 2. and 3. The edges; what readers hold of their own is known only here.
    found = list(_Edges(gradient, kept, qk, only).all())
    own: dict[Place, float] = {}
    for link in found:
        if link.src not in effects:
            own[link.src] = own.get(link.src, 0.0) + link.weight
    effects |= own
    kept |= {at for at, x in own.items() if abs(x) >= least}
    found = [link for link in found if link.src in kept and link.weight != 0]
    largest = sorted(found, key=lambda link: -abs(link.weight))[:n_links]
    # 4. In the order of the run, with positions among the real tokens.
    query, start = int(target.query), frame.spans[0][0]
    end = LOGITS, query
    effects[end] = float(target.value)
    order = [*sorted(kept, key=_depth), end]
    index = {at: i for i, at in enumerate(order)}
    prompts, capture = gradient.capture.prompts, gradient.capture
    return AttributionGraph(
        nodes=tuple(GraphNode(node, p - start, effects[node, p]) for node, p in order),
        links=tuple(
            GraphLink(index[link.src], index[link.dest], link.reads, link.weight)
            for link in largest
        ),
        n_found=len(found),
        target=target.name[0],
        target_value=float(target.value),
        tokens=prompts.strings[0],
        ids=None if prompts.tokens is None else tuple(prompts.tokens[0, start:].tolist()),
        model=capture.model_name,
        n_layers=len(capture.blocks),
        n_heads=max(len(block.attn.nodes()) for block in capture.blocks),
        convention=capture.convention,
    )


def _total_effects(gradient: TargetGradient) -> dict[Place, float]:
    """The total effect of every writer at every position, without those that are exactly 0."""
    query = int(gradient.target.query)
    found: dict[Place, float] = {}

    def take(table: Attribution, without: Collection[int | None] = ()) -> None:
        values = table.values[0].tolist()
        for source, value in zip(table.sources, values, strict=True):
            mixed = source.node.kind == "mlp" and source.node.layer in without  # type: ignore
            if value != 0 and not mixed:
                # Constants above the last block have no position of their own.
                found[source.node, query if source.pos is None else source.pos] = value  # type: ignore

    steps = gradient.operator.steps
    mixtures = {s.layer for s in steps for b in s.branches if b.body.nodes()[0].kind == "expert"}
    take(attribute(gradient, "component", "total"), mixtures)
    if mixtures:
        take(attribute(gradient, "expert", "total"))
    return found


def _whole(node: Node) -> Node:
    return INPUT if node.enters else node


def _constant(node: Node) -> bool:
    return node.kind == "constant" and not node.enters


def _depth(at: Place) -> tuple[int, int, int, str]:
    node, pos = at
    layer = (-1 if node.enters else 10**6) if node.layer is None else node.layer
    kind = (
        ("head", "mlp", "expert").index(node.kind) if node.kind in ("head", "mlp", "expert") else 3
    )
    return layer, kind, pos, str(node)


@dataclass(frozen=True)
class _Link:
    src: Place
    dest: Place
    reads: str
    weight: float


class _Edges:
    """All edges between some nodes at positions."""

    def __init__(
        self,
        gradient: TargetGradient,
        kept: Collection[Place],
        qk: bool,
        only: Collection[Edge] | None,
    ):
        self.gradient, self.kept, self.only = gradient, set(kept), only
        self.scores = queries_and_keys(gradient.capture) if qk else None
        self.writers = Writers.of(gradient.operator, gradient.capture, gradient.target.query)
        rank = {node: i for i, node in enumerate(self.writers.nodes)}
        self.places = sorted((at for at in kept if at[0] in rank), key=lambda at: rank[at[0]])
        device = gradient.capture.frame.device
        self.rank = torch.tensor([rank[node] for node, _ in self.places], device=device)
        self.pos = torch.tensor([pos for _, pos in self.places], device=device, dtype=torch.long)
        self.written = self._written()

    def _written(self) -> Float[Tensor, "place d_model"]:
        """What each node writes at its position, before any norm of the residual."""
        found = self.gradient.capture.frame.zeros(self.gradient.operator.in_dim)[0, :1]
        found = found.repeat(len(self.places), 1)
        first = 0
        for part in self.writers.parts:
            size = len(part.narrow) if isinstance(part, Factored) else 1
            rows = ((self.rank >= first) & (self.rank < first + size)).nonzero().flatten()
            if isinstance(part, Factored):
                for pos in self.pos[rows].unique().tolist():
                    here = rows[self.pos[rows] == pos]
                    wide = part.wide(slice(pos, pos + 1))
                    found[here] = wide[self.rank[here] - first, 0, 0]
            elif part is not None:
                found[rows] = part
            first += size
        return found

    def all(self) -> Iterator[_Link]:
        """Every edge, from below: into heads, MLPs and experts, then into the target."""
        gradient, trace = self.gradient, self.gradient.trace
        steps = gradient.operator.steps
        for step, c, below, after in zip(
            steps, trace.written, self.writers.below, self.writers.below[1:], strict=False
        ):
            for branch in step.branches:
                yield from self._into(branch, step.state, c, below)
            if step.norm is not None:
                past = self.rank < after - len(step.own)
                for pos in self.pos[past].unique().tolist():
                    here = past & (self.pos == pos)
                    pushed = self.written[here][:, None, None]
                    step.norm.push_(pushed, slice(pos, pos + 1))
                    self.written[here] = pushed[:, 0, 0]
        query = int(gradient.target.query)
        covector = trace.covectors[-2][:, query]
        at_query = self.pos == query
        yield from self._links((LOGITS, query), "", (self.written @ covector[0]) * at_query, LOGITS)
        own = {name: share.sum() for name, share in trace.top.items()}
        own |= gradient.target.constants
        for name, share in own.items():
            yield _Link((Node.parse(name), query), (LOGITS, query), "", float(share))

    def _into(
        self, branch: Branch, state: Tensor, c: Float[Tensor, "batch pos d_model"], below: int
    ) -> Iterator[_Link]:
        """The edges into the nodes of one branch."""
        nodes = branch.body.nodes()
        own_nodes = set(nodes)
        places = [at for at in self.kept if at[0] in own_nodes]
        n_pos = c.shape[1]
        for pos in sorted({pos for _, pos in places}):
            query = torch.tensor([pos], device=c.device)
            alone = put_row(take_row(c, query), query, n_pos)
            covectors, own = branch.readers(branch.pull_at(alone, query))
            mine = [i for i, node in enumerate(nodes) if (node, pos) in self.kept]
            sides = [(branch.body.reads(), covectors)]
            if self.scores is not None and branch.has_heads:
                side = self.scores(branch)
                both = side.readers(branch.pull_to_hidden(alone), state, pos)
                heads = len(nodes)
                sides += [(side.reads()[:heads], both[0]), (side.reads()[heads:], both[1])]
            for reads, pulled in sides:
                weights = self._products(pulled, mine, below)
                for i, row in zip(mine, weights, strict=True):
                    side = reads[i].name if branch.has_heads else ""
                    yield from self._links((nodes[i], pos), side, row, reads[i])
            for name, share in own.items():
                for i in mine:
                    # Each is a node of its own where it is read.
                    at = Node.parse(name), pos
                    reads = "v" if branch.has_heads else ""
                    yield _Link(at, (nodes[i], pos), reads, float(share[i, 0]))

    def _products(
        self, covectors: Factored, readers: list[int], below: int
    ) -> Float[Tensor, "reader place"]:
        """⟨what is written at a place, covector of a reader there⟩, of all places below."""
        seen = self.rank < below
        found = self.written.new_zeros(len(readers), len(self.places))
        if len(readers) and bool(seen.any()):
            there = covectors.wide()[readers, 0][:, self.pos[seen]]
            found[:, seen] = (there * self.written[seen]).sum(-1)
        return found

    def _links(
        self, dest: Place, reads: str, weights: Float[Tensor, " place"], reader: Node
    ) -> Iterator[_Link]:
        for i in weights.nonzero().flatten().tolist():
            src = self.places[i]
            free = self.only is None or _constant(src[0])
            if free or Edge(_whole(src[0]), reader) in (self.only or ()):
                yield _Link(src, dest, reads, float(weights[i]))
