"""One target as a graph of tokens, heads, MLPs, experts and constants at positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import spelled
from ..graph import shared_out
from ..operator import Convention
from .placed_graph import Answer, GraphLink, GraphNode, PlacedGraph


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph(PlacedGraph):
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
    answer: Answer = ()
    prompt: str = ""

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

    @property
    def _names(self) -> Sequence[str]:
        return (self.target,)

    @property
    def _answers(self) -> Sequence[Answer]:
        return (self.answer,)

    def _influences(self) -> list[float]:
        return cumulative(influences(self))

    def _notes(self) -> Iterator[str]:
        kept = sum(link.weight for link in self.into(-1))
        yield f"{len(self)} nodes and {len(self.links)} of the {self.n_found} edges between them."
        yield (
            "All edges into a node sum to its total effect, and those into the target to "
            f"{self.target_value:+.6g}; the edges kept into the target sum to {kept:+.6g}."
        )

    def _settings(self) -> Mapping[str, Any]:
        return {
            "description": "Edges of the frozen run; heads, MLPs and constants in full",
            "generation_settings": {
                "target": self.target,
                "target_value": self.target_value,
                "gate": self.convention.gate,
                "position": "at which the node writes",
            },
            "pruning_settings": {"nodes": len(self), "links": len(self.links)},
        }


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
