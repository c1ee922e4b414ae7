"""One target as a graph of tokens, heads, MLPs, experts and constants at positions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..checks import at_least_one, new_file, place_label, spelled, write_whole
from ..graph import CONTENTS, LOGITS, Node, shared_out
from ..operator import Convention
from ..pictures import Page, Paged, Tabled, graph_view, placed_graph, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class GraphNode:
    """A node of an attribution graph.

    Attributes:
        node: The token's source ("embed"), head, MLP, expert or constant; the target is "logits".
        pos: The position at which the node writes, among the real tokens.
        effect: The total effect of what is written there, in units of the target. For the target it
            is the target's value.
    """

    node: Node
    pos: int
    effect: float


@dataclass(frozen=True)
class GraphLink:
    """An edge of an attribution graph.

    Attributes:
        src: The number of the writer in ``nodes``.
        dest: The number of the reader in ``nodes``.
        reads: The input of a head: "v", "q" or "k". "" for any other reader.
        weight: What the reader makes of what the writer adds, in units of the target. Those of "q"
            and "k" are first-order, and in no sum.
    """

    src: int
    dest: int
    reads: str
    weight: float

    @property
    def conserved(self) -> bool:
        """Whether the weights into the reader sum to its total effect."""
        return self.reads not in ("q", "k")


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph(Paged, Tabled):
    """A target as a graph: nodes at positions, and what each makes of what others write.

    All weights into a node, queries and keys apart, sum to its total effect; those into the target
    sum to the target. The graph keeps the largest nodes and edges, so what is shown sums to a part.

    Attributes:
        nodes: The nodes in the order of the run, the target last.
        links: The edges, the largest first.
        n_found: How many edges between these nodes are not 0.
        target: The name of the target.
        target_value: The target in the model's own run, in logits.
        tokens: The strings of the prompt's tokens.
        ids: The ids of the prompt's tokens; None where the rows are no tokens.
        model: The name of the model.
        n_layers: Number of blocks.
        n_heads: The largest number of heads in a block.
        convention: The choices under which the operator is unique.
        answer: The target's tokens, each as (text, id, probability), the second one subtracted;
            empty where the target is a direction.
        prompt: The prompt as one text.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> graph = lens.attribution_graph("Paris", n_nodes=20)
        >>> [(graph.labels[x.src], round(x.weight, 1)) for x in graph.into(-1)[:2]]
        [('L3MLP@5', 10.9), ('L2MLP@5', 2.8)]
        >>> len(graph.into(-1)), round(graph.target_value, 1)
        (11, 18.6)
    """

    nodes: tuple[GraphNode, ...]
    links: tuple[GraphLink, ...]
    n_found: int
    target: str
    target_value: float
    tokens: tuple[str, ...]
    ids: tuple[int, ...] | None
    model: str
    n_layers: int
    n_heads: int
    convention: Convention
    answer: tuple[tuple[str, int, float], ...] = ()
    prompt: str = ""

    _COLUMNS = ("src", "dest", "reads", "value")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        names = self.labels
        return ((names[x.src], names[x.dest], x.reads, x.weight) for x in self.links)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        head = (
            f"AttributionGraph of {self.target} = {self.target_value:.4g} in {self.model}: "
            f"{len(self)} nodes, {len(self.links)} of {self.n_found} edges"
        )
        shown, labels = self.links[:10], self.labels
        rows = [
            f"  {x.weight:+9.4f}  {labels[x.src]} → {labels[x.dest]}{x.reads and '.' + x.reads}"
            for x in shown
        ]
        more = len(self.links) - len(shown)
        return "\n".join([head, *rows, *([f"  … {more} more"] if more else [])])

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The name of every node: ``"France"@4``, "L3H7@5"; of the target, the target's."""
        return tuple(map(self._label, self.nodes))

    def _label(self, at: GraphNode) -> str:
        if at.node == LOGITS:
            return self.target
        if at.node.kind in CONTENTS:
            return place_label(self.tokens[at.pos], at.pos)
        return f"{at.node}@{at.pos}"

    def into(self, node: int) -> tuple[GraphLink, ...]:
        """The edges into a node that are part of a sum, the largest first.

        Args:
            node: The number of the node; −1 is the target.

        Returns:
            The edges, without those into queries and keys.
        """
        dest = node % len(self)
        return tuple(link for link in self.links if link.dest == dest and link.conserved)

    # --- In other forms

    def plot(self, ax: Axes | None = None, top: int = 40) -> Axes:
        """Draw the largest edges with matplotlib: positions across, layers from below.

        Args:
            ax: Axes to draw on. None makes a figure.
            top: How many edges are drawn. Those into queries are dashed, those into keys dotted.

        Returns:
            The axes drawn on.

        Raises:
            ValueError: If matplotlib is missing, or ``top`` is below 1.
        """
        links = self.links[: at_least_one(top, "top")]
        return placed_graph(
            ax,
            [(at.node, at.pos) for at in self.nodes],
            [(link.src, link.dest, link.reads, link.weight) for link in links],
            self.tokens,
            title=f"{self.target} = {self.target_value:.4g} (the {len(links)} largest edges)",
            unit=unit_of(self.target),
        )

    def _page(self) -> Page:
        kept = sum(link.weight for link in self.into(-1))
        nodes = zip(self.labels, self.nodes, strict=True)
        view = graph_view(
            [(label, at.node, at.effect) for label, at in nodes],
            [(link.src, link.dest, link.reads, link.weight) for link in self.links],
            self.tokens,
            [at.pos for at in self.nodes],
            legend="A node stands where it writes; its area is its total effect.",
            json=self.to_json() if self.answer else None,
            ids=self._ids() if self.answer else (),
        )
        notes = (
            f"{len(self)} nodes and {len(self.links)} of the {self.n_found} edges between them.",
            "All edges into a node sum to its total effect, and those into the target to "
            f"{self.target_value:+.6g}; the edges kept into the target sum to {kept:+.6g}.",
        )
        return Page(f"{self.target} = {self.target_value:.4g} in {self.model}", [view], notes)

    def _ids(self) -> list[str]:
        from .graph_json import node_entry

        return [node_entry(self, at)["node_id"] for at in self.nodes]

    def to_json(self, slug: str | None = None, scan: str | None = None) -> str:
        """Write the graph as attribution-graph JSON, which Neuronpedia and circuit-tracer read.

        A head is an attention feature (``lorsa``), an MLP or expert a transcoder feature, and a
        constant a ``bias``. Edges into queries and keys are in no sum, so they stand in the head's
        ``qk_tracing_results``. A node stands at the position at which it writes.

        Args:
            slug: The graph's name in its address; None makes one of the prompt.
            scan: The model's id on the server; None is the model's name.

        Returns:
            The JSON text.

        Raises:
            ValueError: If the target is not a token, or the slug has other characters than a–z, 0–9
                and "-".
        """
        from .graph_json import graph_json

        return graph_json(self, slug, scan)

    def save(
        self, path: str | os.PathLike[str], slug: str | None = None, scan: str | None = None
    ) -> None:
        """Write :meth:`to_json` to a file, whole or not at all.

        Args:
            path: The file to write.
            slug: As in :meth:`to_json`.
            scan: As in :meth:`to_json`.

        Raises:
            ValueError: If the folder does not exist, or as in :meth:`to_json`.
        """
        file, text = new_file(path), self.to_json(slug, scan)
        write_whole(file, lambda new: new.write_text(text, encoding="utf-8"))

    def to_dot(self) -> str:
        """Write the graph for Graphviz. Edges into queries and keys are dashed."""
        largest = max((abs(link.weight) for link in self.links), default=0.0) or 1.0
        lines = ["digraph attribution {", "  rankdir=BT; node [shape=box, style=rounded];"]
        lines += [f"  n{i} [label={_quoted(label)}];" for i, label in enumerate(self.labels)]
        for link in self.links:
            style = [
                f"color={_COLORS[link.conserved][link.weight < 0]}",
                f"penwidth={0.5 + 4.5 * abs(link.weight) / largest:.2f}",
            ]
            style += [f"label={_quoted(link.reads)}"] if link.reads else []
            style += [] if link.conserved else ["style=dashed"]
            lines.append(f"  n{link.src} -> n{link.dest} [{', '.join(style)}];")
        return "\n".join([*lines, "}"])


_COLORS = {True: ("blue", "red"), False: ("purple", "orange")}


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def influences(graph: AttributionGraph) -> list[float]:
    """How much of the target reaches each node, when every node shares itself out by |weight|.

    Args:
        graph: A graph with its edges.

    Returns:
        One number per node, 1 for the target.

    Source: Ameisen et al., Circuit Tracing (2025), on pruning graphs.
    """
    links = [(link.src, link.dest, link.weight) for link in graph.links if link.conserved]
    _, found = shared_out(links, list(reversed(range(len(graph)))))  # in the order of the run
    return [found.get(i, 0.0) for i in range(len(graph))]


def cumulative(influence: Sequence[float]) -> list[float]:
    """The share of all influence that nodes at least as influential hold: 0 is the most."""
    order = sorted(range(len(influence)), key=lambda i: -influence[i])
    total, held, found = sum(influence) or 1.0, 0.0, [0.0] * len(influence)
    for i in order:
        held += influence[i]
        found[i] = min(1.0, held / total)
    return found
