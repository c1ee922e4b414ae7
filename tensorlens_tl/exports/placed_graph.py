"""A graph of nodes at positions: its picture, its page, and the forms of other tools."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..checks import at_least_one, new_file, place_label, spelled, write_whole
from ..graph import CONTENTS, Node
from ..pictures import Page, Paged, Tabled, graph_view, placed_graph, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Answer = tuple[tuple[str, int, float], ...]
"""A target's tokens, each as (text, id, probability), the second one subtracted; () for others."""


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
class PlacedGraph(Paged, Tabled):
    """A graph of one prompt, whose nodes stand at positions; the targets are the last ones.

    Attributes:
        nodes: The nodes, the targets last.
        links: The edges, the largest first.
        n_found: How many edges between these nodes are not 0.
        target: The name of the target.
        target_value: The target in the model's own run, in logits.
        tokens: The strings of the prompt's tokens.
        ids: The ids of the prompt's tokens; None where the rows are no tokens.
        model: The name of the model.
        n_layers: Number of blocks.
        prompt: The prompt as one text.
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
    prompt: str

    _sums = True
    """Whether all edges into a node sum to its effect."""
    _unit: str | None = None
    """What weights are counted in; None is the target's unit."""
    _legend = "A node stands where it writes; its area is its total effect."
    _COLUMNS = ("src", "dest", "reads", "value")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        names = self.labels
        return ((names[x.src], names[x.dest], x.reads, x.weight) for x in self.links)

    @property
    def _names(self) -> Sequence[str]:
        """The name of every target."""
        raise NotImplementedError

    @property
    def _answers(self) -> Sequence[Answer]:
        """The tokens of every target."""
        raise NotImplementedError

    def _influences(self) -> list[float]:
        """The share of all influence that nodes at least as influential hold, node by node."""
        raise NotImplementedError

    def _notes(self) -> Iterator[str]:
        """Sentences about the graph, for its page."""
        raise NotImplementedError

    def _settings(self) -> Mapping[str, Any]:
        """What is said of the graph in its file: a description, and how it was made."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The name of every node: ``"France"@4``, "L3H7@5"; of the target, the target's."""
        return tuple(map(self._label, self.nodes))

    def _label(self, at: GraphNode) -> str:
        if at.node.kind == "logits":
            return self._names[at.node.index or 0]
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
            unit=self._unit or unit_of(self.target),
        )

    def _page(self) -> Page:
        nodes = zip(self.labels, self.nodes, strict=True)
        view = graph_view(
            [(label, at.node, at.effect) for label, at in nodes],
            [(link.src, link.dest, link.reads, link.weight) for link in self.links],
            self.tokens,
            [at.pos for at in self.nodes],
            unit=self._unit or "logits",
            legend=self._legend,
            sums=self._sums,
            json=self.to_json() if all(self._answers) else None,
            ids=self._ids() if all(self._answers) else (),
        )
        title = f"{self.target} = {self.target_value:.4g} in {self.model}"
        return Page(title, [view], tuple(self._notes()))

    def _ids(self) -> list[str]:
        from .graph_json import node_entry

        return [node_entry(self, at)["node_id"] for at in self.nodes]

    def to_json(self, slug: str | None = None, scan: str | None = None) -> str:
        """Write the graph as attribution-graph JSON, which Neuronpedia and circuit-tracer read.

        A head is an attention feature (``lorsa``); an MLP, an expert or a feature is a transcoder
        feature, and a constant is a ``bias``. Edges into queries and keys are in no sum, so they
        stand in the head's ``qk_tracing_results``. A node stands at the position at which it
        writes.

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
