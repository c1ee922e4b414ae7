"""Circuits: some of a model's edges, with the scores they were chosen by, and their files.

The score of an edge is what a reader makes of what a writer adds, summed over positions and
averaged over prompts; with corrupted prompts, of what the writer adds there less. The input is one
writer: it stands for token and position embeddings. Constants write, too, but are always kept and
not counted.

The JSON of a circuit is the edge list that EAP-IG and MIB evaluate, with an entry of this library
beside: Hanna, Pezzelle, Belinkov (arXiv 2403.17806); Mueller et al. (arXiv 2504.13151).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..checks import need, spelled
from ..graph import (
    INPUT,
    LOGITS,
    Edge,
    Node,
    Wiring,
    connected,
    eap_name,
    owner,
    parse_eap,
    select,
)
from ..operator import Convention
from ..pictures import Page, Paged, edge_view, graph_figure
from .ablation import DEFAULTS, AblationOptions, faithfulness, faithfulness_curve
from .edge_averages import NO_SCORES
from .faithfulness_result import Faithfulness, FaithfulnessCurve
from .model_id import ModelInfo

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl circuit 2"


@spelled
@dataclass(frozen=True)
class Circuit(Paged):
    """Some edges of a model, with the scores they were selected by.

    Attributes:
        edges: The edges in the circuit, reader by reader from below.
        scores: Score of every edge that was ranked, in the circuit or not; empty where a user named
            the edges.
        model: Identity of the model that the circuit is of.
        target: Description of what the scores are of; "" where there are none.
        selection: How the edges were selected: "greedy", "absolute", "signed", "influence" or
            "named".
        n_prompts: Number of prompts that the scores are means over.
        corrupted: Whether the scores compare each prompt with a corrupted one.
        convention: How gated MLPs were made linear.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> circuit = lens.discover("Paris", n_edges=20)
        >>> len(circuit), circuit.is_connected
        (20, True)
    """

    edges: tuple[Edge, ...]
    scores: Mapping[Edge, float] = field(repr=False)
    model: ModelInfo
    target: str = ""
    selection: str = "named"
    n_prompts: int = 0
    corrupted: bool = False
    convention: Convention = field(default_factory=Convention)

    def __post_init__(self):
        self.model.wiring.check(self.edges)
        self.model.wiring.check(self.scores)

    def __len__(self) -> int:
        return len(self.edges)

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.edges)

    def __contains__(self, item: Edge | Node | str) -> bool:
        if isinstance(item, str):
            item = Edge.parse(item) if "→" in item or "->" in item else Node.parse(item)
        return item in (self.edges if isinstance(item, Edge) else self.nodes)

    def __repr__(self) -> str:
        total = len(self.model.wiring.edges())
        about = f" of {self.target}" if self.target else ""
        means = f", mean of {self.n_prompts} prompts" if self.n_prompts > 1 else ""
        against = f" against corrupted {'ones' if means else 'prompts'}" if self.corrupted else ""
        head = (
            f"Circuit{about} in {self.model.name}: {len(self)} of {total} edges "
            f"({len(self) / total:.1%}), {len(self.nodes)} nodes, {self.selection}{means}{against}"
        )
        head += f", {self.convention.in_front}" if self.convention.in_front else ""
        order = sorted(self.edges, key=lambda edge: -abs(self.scores.get(edge, 0.0)))
        rows = [
            f"\n  {self.scores[edge]:+9.4f}  {edge}" if edge in self.scores else f"\n  {edge}"
            for edge in order[:10]
        ]
        more = f"\n  … {len(self) - 10} more" if len(self) > 10 else ""
        return head + "".join(rows) + more

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes that the edges join, from below: the input, heads, MLPs, the logits."""
        found = {edge.src for edge in self.edges} | {owner(edge.dest) for edge in self.edges}
        return tuple(node for node in (*self.model.wiring.writers(), LOGITS) if node in found)

    @property
    def is_connected(self) -> bool:
        """Whether every edge is on a path from the input to the logits."""
        return len(connected(self.edges)) == len(self.edges)

    def resized(
        self,
        n_edges: int | None = None,
        threshold: float | None = None,
        selection: str | None = None,
    ) -> Circuit:
        """Select another circuit by the same scores; nothing is run.

        Args:
            n_edges: Number of edges to select. Give either this or ``threshold``.
            threshold: Smallest number an edge may be ranked by.
            selection: How edges are selected, as in :func:`tensorlens_tl.discover`. By default, the
                selection of this circuit.

        Returns:
            The circuit of the new size.

        Raises:
            ValueError: If this circuit has no scores, or an argument is not allowed.
        """
        if not self.scores:
            raise ValueError(NO_SCORES)
        selection = self.selection if selection is None else selection
        edges = select(self.scores, self.model.wiring, n_edges, threshold, selection)
        return replace(self, edges=edges, selection=selection)

    # --- In the real model

    def faithfulness(
        self,
        model: Any,
        prompts: Any,
        corrupted: Any = None,
        target: Any = None,
        versus: Any = None,
        options: AblationOptions = DEFAULTS,
        **changes: Any,
    ) -> Faithfulness:
        """Measure how much of a behaviour the model keeps with every other edge ablated.

        Args:
            model: The model that the circuit is of. The call leaves the model unchanged.
            prompts: As for :func:`tensorlens_tl.faithfulness`.
            corrupted: One corrupted prompt per prompt. Needed for ablation="resample"; None for
                "mean" and "zero", which refuse corrupted prompts.
            target: Token whose logit is measured: a string or an id, or one per prompt.
            versus: Token whose logit is subtracted, in the same forms.
            options: How edges are ablated and what is measured.
            **changes: Fields of :class:`AblationOptions` that differ from ``options``.

        Returns:
            The share recovered, with its bootstrap interval.

        Raises:
            ValueError: If the circuit is of another model, or an argument is not allowed.
        """
        return faithfulness(model, prompts, self, corrupted, target, versus, options, **changes)

    def faithfulness_curve(
        self,
        model: Any,
        prompts: Any,
        corrupted: Any = None,
        target: Any = None,
        versus: Any = None,
        options: AblationOptions = DEFAULTS,
        **changes: Any,
    ) -> FaithfulnessCurve:
        """Measure the faithfulness of the first edges by score at growing sizes, and CPR and CMD.

        Args:
            model: As for :meth:`faithfulness`.
            prompts: As for :meth:`faithfulness`.
            corrupted: As for :meth:`faithfulness`.
            target: As for :meth:`faithfulness`.
            versus: As for :meth:`faithfulness`.
            options: As for :meth:`faithfulness`.
            **changes: As for :meth:`faithfulness`, or ``sizes``, the sizes as shares of all edges.

        Returns:
            The share recovered at every size.

        Raises:
            ValueError: If the circuit has no scores, is of another model, or an argument is not
                allowed.
        """
        return faithfulness_curve(
            model, prompts, self, corrupted, target, versus, options, **changes
        )

    # --- In other forms

    def plot(self, ax: Axes | None = None, top: int = 60) -> Axes:
        """Draw the edges of the largest |scores| by layer, with matplotlib.

        Args:
            ax: Axes to draw on. None makes a figure.
            top: Number of edges that are drawn.

        Returns:
            The axes drawn on. Edges into queries are dashed, edges into keys dotted.
        """
        one = self.target and "a target each" not in self.target
        title = f"circuit of {self.target}" if one else "circuit"
        return graph_figure(ax, self.edges, self.scores, title=title, unit="logits", top=top)

    def _page(self) -> Page:
        # The scores of all other edges would weigh megabytes.
        own = replace(self, scores={e: self.scores[e] for e in self.edges if e in self.scores})
        weights = [own.scores.get(edge, math.nan) for edge in self.edges]
        view = edge_view(self.edges, weights, json=own.to_json())
        notes = [repr(self).splitlines()[0]]
        notes += ["Only the real model tells whether it needs these edges: ask .faithfulness."]
        if others := len(self.scores) - len(own.scores):
            notes.append(
                f"The page holds these edges. .to_json() has the scores of {others} others, too."
            )
        return Page(f"Circuit of {len(self)} edges", [view], notes)

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the edges as a pandas table.

        Returns:
            One row per edge that is in the circuit or has a score, with columns edge, src, dest,
            score (nan where there is none) and in_circuit.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        kept = set(self.edges)
        rows = [
            (str(e), str(e.src), str(e.dest), self.scores.get(e, math.nan), e in kept)
            for e in dict.fromkeys((*self.scores, *self.edges))
        ]
        return pandas.DataFrame(rows, columns=["edge", "src", "dest", "score", "in_circuit"])

    def to_networkx(self) -> Any:
        """Turn the circuit into a ``networkx.MultiDiGraph``, with one edge per reader of a node.

        Returns:
            The graph. Nodes have a layer; edges have a reader and, where there are scores, a score.

        Raises:
            ValueError: If networkx is missing.
        """
        networkx = need("networkx", "circuits", "to_networkx")
        graph = networkx.MultiDiGraph(model=self.model.name, target=self.target)
        for node in self.nodes:
            layer = self.model.wiring.n_layers if node == LOGITS else node.layer
            graph.add_node(str(node), kind=node.kind, layer=-1 if layer is None else layer)
        for edge in self.edges:
            # The q, k and v inputs of a head are one node with three edges.
            reader = edge.dest.name or edge.dest.kind
            score = {"score": self.scores[edge]} if edge in self.scores else {}
            graph.add_edge(str(edge.src), str(owner(edge.dest)), key=reader, reader=reader, **score)
        return graph

    def to_graphml(self) -> str:
        """Write the circuit as GraphML, which graph programs read.

        Returns:
            The XML text of the graph.

        Raises:
            ValueError: If networkx is missing.
        """
        networkx = need("networkx", "circuits", "to_graphml")
        return "\n".join(networkx.generate_graphml(self.to_networkx(), named_key_ids=True))

    def to_dot(self) -> str:
        """Write the circuit for Graphviz: edges that raise the target are blue, others red."""
        largest = max((abs(self.scores.get(e, 0.0)) for e in self.edges), default=0.0)
        lines = ["digraph circuit {", "  rankdir=BT; node [shape=box, style=rounded];"]
        lines += [f"  {_quoted(str(node))};" for node in self.nodes]
        for edge in self.edges:
            score = self.scores.get(edge)
            style = [f"label={_quoted(edge.dest.name)}"] if edge.dest.name else []
            if score is not None:
                width = 0.5 + 4.5 * abs(score) / largest if largest else 0.5
                style += [f"color={'blue' if score >= 0 else 'red'}", f"penwidth={width:.2f}"]
            ends = f"{_quoted(str(edge.src))} -> {_quoted(str(owner(edge.dest)))}"
            lines.append(f"  {ends} [{', '.join(style)}];")
        return "\n".join([*lines, "}"])

    def to_json(self) -> str:
        """Write the circuit as an edge list that EAP-IG, MIB and :meth:`from_json` read.

        Returns:
            JSON with every ranked edge, its score, and whether it is in the circuit. Edges without
            a score are written with 0.
        """
        wiring, kept, nodes = self.model.wiring, set(self.edges), set(self.nodes)
        cfg = {
            "n_layers": wiring.n_layers,
            "n_heads": wiring.n_heads,
            "parallel_attn_mlp": wiring.parallel,
            "d_model": self.model.d_model,
        }
        # 1. What EAP-IG and MIB read. Input and logits are in each of their graphs.
        named = {
            eap_name(node): {"in_graph": node in nodes or node in (INPUT, LOGITS)}
            for node in (*wiring.writers(), LOGITS)
        }
        edges = {
            eap_name(edge): {"score": self.scores.get(edge, 0.0), "in_graph": edge in kept}
            for edge in wiring.edges()
            if edge in kept or edge in self.scores
        }
        # 2. What only this library knows.
        about = {name: getattr(self, name) for name in ABOUT} | {
            "format": FORMAT,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "attn_only": wiring.attn_only,
            "experts": [[str(node) for node in own] for own in wiring.experts],
            "scored": bool(self.scores),
            "convention": asdict(self.convention),
        }
        data = {"cfg": cfg, "nodes": named, "edges": edges, "tensorlens_tl": about}
        return json.dumps(data, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Circuit:
        """Read a circuit from :meth:`to_json`, or from EAP-IG or MIB.

        Args:
            text: JSON of an edge list.

        Returns:
            The circuit. One of EAP-IG or MIB does not know the weights of its model.

        Raises:
            ValueError: If the text is not a circuit.
        """
        try:
            data = json.loads(text)
            cfg, about = data["cfg"], data.get("tensorlens_tl", {})
            if about and about["format"] != FORMAT:
                raise ValueError(
                    f"format {about['format']!r} is not {FORMAT!r}. Save the circuit again."
                )
            # 1. The model's shape, which says what edges there are.
            layers, heads, width = (_size(cfg[n]) for n in ("n_layers", "n_heads", "d_model"))
            parallel, attn_only = bool(cfg["parallel_attn_mlp"]), bool(about.get("attn_only"))
            experts = tuple(tuple(map(Node.parse, own)) for own in about.get("experts", ()))
            wiring = Wiring(layers, heads, parallel, attn_only, experts)
            name = str(about.get("model", "a model of EAP-IG's"))
            model = ModelInfo(name, wiring, width, str(about.get("fingerprint", "")))
            # 2. Edges and scores, in the order of the model.
            rows = {parse_eap(name): row for name, row in data["edges"].items()}
            wiring.check(rows)
            scores = {edge: float(row["score"]) for edge, row in rows.items()}
            if wrong := [edge for edge, score in scores.items() if not math.isfinite(score)]:
                raise ValueError(f"The score of {wrong[0]} is not finite. Use numbers.")
            order = [edge for edge in wiring.edges() if edge in rows]
            kept = tuple(edge for edge in order if _truth(rows[edge]["in_graph"]))
            ranked = {edge: scores[edge] for edge in order} if about.get("scored", True) else {}
            # 3. What else is known of them.
            return cls(
                kept,
                ranked,
                model,
                str(about.get("target", "")),
                str(about.get("selection", "greedy")),
                int(about.get("n_prompts", 0)),
                bool(about.get("corrupted", False)),
                Convention(**about.get("convention", {})),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                "This text is not a circuit of to_json, nor an edge list of EAP-IG "
                f"({str(error).rstrip('.')}). Write the file again."
            ) from None


ABOUT = ("target", "selection", "n_prompts", "corrupted")
"""Fields of a circuit that its JSON keeps as they are."""


def _size(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 10**6:
        raise ValueError(f"{number!r} is not a size of a model. Use an integer ≥ 1.")
    return number


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"in_graph={value!r} is not a truth value. Use true or false.")
    return value


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# --- From scores ------------------------------------------------------------------


def select_circuit(
    model: ModelInfo,
    scores: Mapping[Edge, float],
    n_edges: int | None,
    threshold: float | None,
    selection: str,
    **about: Any,
) -> Circuit:
    """Select a circuit by the scores of its edges.

    Args:
        model: Identity of the model that the edges are of.
        scores: Score of every edge.
        n_edges: Number of edges to select, or None.
        threshold: Smallest number an edge may be ranked by, or None.
        selection: How edges are selected, as in :func:`tensorlens_tl.discover`.
        **about: Other attributes of the circuit, such as ``target``.

    Returns:
        The circuit, with all scores.

    Raises:
        ValueError: If an argument is not allowed.
    """
    edges = select(scores, model.wiring, n_edges, threshold, selection)
    return Circuit(edges, scores, model, selection=selection, **about)
