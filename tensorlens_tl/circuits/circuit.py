"""Circuits: some of a model's edges, with the scores they were chosen by, and their files.

An edge's score is what a reader makes of what a writer adds (``edges``), summed over positions and
averaged over prompts; with a corrupted run, of what it adds here and not there. The input stands
for both embeddings. Constants write, too, but are always kept and not counted.

A circuit's JSON is the edge list of EAP-IG and MIB, which both evaluate as it is, with an entry of
our own beside: Hanna, Pezzelle, Belinkov (arXiv 2403.17806); Mueller et al. (arXiv 2504.13151).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..graph import INPUT, LOGITS, Edge, Node, Wiring, as_edges, connected, owner, select
from ..operator import Capture, Convention
from .ablation import faithfulness, faithfulness_curve
from .eap_names import eap_name, parse_eap
from .edge_patching import edge_model
from .faithfulness_result import Faithfulness, FaithfulnessCurve
from .model_id import ModelInfo

FORMAT = "tensorlens_tl circuit 1"


@dataclass(frozen=True)
class Circuit:
    """Some edges of a model.

    Attributes:
        edges: The kept ones, reader by reader from below.
        scores: Of all edges that were ranked, kept or not; empty where the edges were named.
        model: Which model it is of.
        target: What the scores are of, for people; "" where there are none.
        method: How the edges were chosen: "greedy", "absolute", "signed", "influence" or "named".
        n_prompts: Over how many prompts the scores are means.
        corrupted: Whether they compare each with a corrupted one.
        convention: How gated MLPs were made linear.
    """

    edges: tuple[Edge, ...]
    scores: Mapping[Edge, float] = field(repr=False)
    model: ModelInfo
    target: str = ""
    method: str = "named"
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
        against = " against corrupted ones" if self.corrupted else ""
        head = (
            f"Circuit{about} in {self.model.name}: {len(self)} of {total} edges "
            f"({len(self) / total:.1%}), {len(self.nodes)} nodes, {self.method}{means}{against}"
        )
        order = sorted(self.edges, key=lambda edge: -abs(self.scores.get(edge, 0.0)))
        rows = [
            f"\n  {self.scores[edge]:+9.4f}  {edge}" if edge in self.scores else f"\n  {edge}"
            for edge in order[:10]
        ]
        more = f"\n  … {len(self) - 10} more" if len(self) > 10 else ""
        return head + "".join(rows) + more

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What the edges join, from below: the input, heads, MLPs, the logits."""
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
        method: str | None = None,
    ) -> Circuit:
        """Another circuit by the same scores; nothing is run.

        Args:
            n_edges: So many edges; or
            threshold: the smallest number a method may rank an edge by.
            method: As in :func:`tensorlens_tl.discover`; by default, this circuit's.

        Returns:
            The circuit.

        Raises:
            ValueError: If there are no scores, or the arguments make no sense.
        """
        if not self.scores:
            raise ValueError("this circuit has no scores, its edges were named: discover one")
        method = self.method if method is None else method
        edges = select(self.scores, self.model.wiring, n_edges, threshold, method)
        return replace(self, edges=edges, method=method)

    # --- In the real model

    def faithfulness(
        self,
        model: Any,
        prompts: Any,
        corrupted: Any = None,
        ablation: str = "resample",
        pattern: str = "live",
        target: Any = None,
        versus: Any = None,
        **options: Any,
    ) -> Faithfulness:
        """How much of a behaviour the model itself keeps with every other edge ablated.

        Args:
            model: The model that the circuit is of; left as it was.
            prompts: See :func:`tensorlens_tl.faithfulness`, also for all that follows.
            corrupted: Each prompt's twin; needed to ``resample``.
            ablation: "resample", "mean" or "zero".
            pattern: "live" or "frozen".
            target: What is measured.
            versus: What is subtracted.
            **options: ``metric``, ``pos``, ``mean_over``, ``seed``, ``batch_size``, ``progress``.

        Returns:
            The share recovered, with its bootstrap interval.

        Raises:
            ValueError: If the circuit is of another model, or an argument makes no sense.
        """
        self._check_model(model)
        return faithfulness(
            model, prompts, self.edges, corrupted, ablation, pattern, target, versus, **options
        )

    def faithfulness_curve(
        self,
        model: Any,
        prompts: Any,
        corrupted: Any = None,
        ablation: str = "resample",
        pattern: str = "live",
        target: Any = None,
        versus: Any = None,
        **options: Any,
    ) -> FaithfulnessCurve:
        """The same for the first edges by score at growing sizes, with the areas CPR and CMD.

        Args:
            model: As for :meth:`faithfulness`.
            prompts: Prompts.
            corrupted: Twins.
            ablation: "resample", "mean" or "zero".
            pattern: "live" or "frozen".
            target: Token.
            versus: Token.
            **options: ``sizes`` and those of :meth:`faithfulness`.

        Returns:
            The curve.

        Raises:
            ValueError: If the circuit has no scores, is of another model, or an argument makes no sense.
        """
        self._check_model(model)
        if not self.scores:
            raise ValueError("this circuit has no scores, its edges were named: discover one")
        return faithfulness_curve(
            model, prompts, self.scores, corrupted, ablation, pattern, target, versus, **options
        )

    def _check_model(self, model: Any) -> None:
        with edge_model(model) as edged:
            self.model.check(ModelInfo.of(edged.adapter.name, edged.adapter.weights))

    # --- In other forms

    def to_networkx(self) -> Any:
        """The circuit as a ``networkx.MultiDiGraph``: an edge per reader, "q", "k" or "v" of a head.

        Returns:
            The graph; nodes have a layer, edges a reader and, where there are some, a score.

        Raises:
            ValueError: If networkx is missing.
        """
        networkx = _networkx()
        graph = networkx.MultiDiGraph(model=self.model.name, target=self.target)
        for node in self.nodes:
            layer = self.model.wiring.n_layers if node == LOGITS else node.layer
            graph.add_node(str(node), kind=node.kind, layer=-1 if layer is None else layer)
        for edge in self.edges:
            reader = edge.dest.name or edge.dest.kind
            score = {"score": self.scores[edge]} if edge in self.scores else {}
            graph.add_edge(str(edge.src), str(owner(edge.dest)), key=reader, reader=reader, **score)
        return graph

    def to_graphml(self) -> str:
        """The circuit as GraphML, which graph programs read.

        Returns:
            The XML.

        Raises:
            ValueError: If networkx is missing.
        """
        return "\n".join(_networkx().generate_graphml(self.to_networkx(), named_key_ids=True))

    def to_dot(self) -> str:
        """The circuit in Graphviz's language; what raises the target is blue, what lowers it red."""
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
        """The circuit as the edge list that EAP-IG and MIB read: every ranked edge, and if it is in.

        Kept edges without a score are written with 0. :meth:`from_json` gives the circuit back.

        Returns:
            The JSON.
        """
        wiring, kept, nodes = self.model.wiring, set(self.edges), set(self.nodes)
        listed = [edge for edge in wiring.edges() if edge in kept or edge in self.scores]
        data = {
            "cfg": {
                "n_layers": wiring.n_layers, "n_heads": wiring.n_heads,
                "parallel_attn_mlp": wiring.parallel, "d_model": self.model.d_model,
            },
            "nodes": {
                eap_name(node): {"in_graph": node in nodes or node in (INPUT, LOGITS)}
                for node in (*wiring.writers(), LOGITS)
            },
            "edges": {
                eap_name(e): {"score": self.scores.get(e, 0.0), "in_graph": e in kept} for e in listed
            },
            "tensorlens_tl": {
                "format": FORMAT, "model": self.model.name, "fingerprint": self.model.fingerprint,
                "attn_only": wiring.attn_only, "scored": bool(self.scores), "target": self.target,
                "method": self.method, "n_prompts": self.n_prompts, "corrupted": self.corrupted,
                "convention": asdict(self.convention),
            },
        }  # fmt: skip
        return json.dumps(data, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Circuit:
        """Read a circuit from :meth:`to_json`, or from EAP-IG or MIB.

        Args:
            text: The JSON.

        Returns:
            The circuit; one of theirs does not know its model's weights.

        Raises:
            ValueError: If the text is no circuit.
        """
        try:
            data = json.loads(text)
            cfg, about = data["cfg"], data.get("tensorlens_tl", {})
            if about and about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r}, expected {FORMAT!r}")
            layers, heads, width = (_size(cfg[n]) for n in ("n_layers", "n_heads", "d_model"))
            wiring = Wiring(
                layers, heads, bool(cfg["parallel_attn_mlp"]), bool(about.get("attn_only"))
            )
            rows = {parse_eap(name): row for name, row in data["edges"].items()}
            wiring.check(rows)
            scores = {edge: float(row["score"]) for edge, row in rows.items()}
            if wrong := [edge for edge, score in scores.items() if not math.isfinite(score)]:
                raise ValueError(f"the score of {wrong[0]} is no finite number")
            order = [edge for edge in wiring.edges() if edge in rows]
            return cls(
                tuple(edge for edge in order if _truth(rows[edge]["in_graph"])),
                {e: scores[e] for e in order} if about.get("scored", True) else {},
                ModelInfo(str(about.get("model", "a model of EAP-IG's")), wiring, width,
                          str(about.get("fingerprint", ""))),
                str(about.get("target", "")),
                str(about.get("method", "greedy")),
                int(about.get("n_prompts", 0)),
                bool(about.get("corrupted", False)),
                Convention(**about.get("convention", {})),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"expected a circuit that to_json wrote, or an edge list of EAP-IG, got something else "
                f"({error}): write it again"
            ) from None


def _size(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 10**6:
        raise ValueError(f"expected a size, got {number!r}")
    return number


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected in_graph to be true or false, got {value!r}")
    return value


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _networkx() -> Any:
    try:
        import networkx
    except ImportError:
        raise ValueError(
            "graphs need networkx: pip install 'tensorlens-tl[circuits]', or take to_dot or to_json"
        ) from None
    return networkx


# --- From an attribution, or from names ----------------------------------------------------------


def named(capture: Capture, given: Circuit | Iterable[Edge | Node | str]) -> Circuit:
    """The circuit of edges or nodes that a user named, or one that was found in the same model.

    Args:
        capture: A run of the model.
        given: A circuit, edges, or nodes, between which all edges are kept.

    Returns:
        The circuit.

    Raises:
        ValueError: If there is no such node or edge, or the circuit is of another model.
    """
    model = ModelInfo.of_capture(capture)
    if isinstance(given, Circuit):
        given.model.check(model)
        return given
    edges = as_edges(model.wiring, given, capture.pos_embed is not None)
    return Circuit(edges, {}, model, convention=capture.convention)


def find(
    model: ModelInfo,
    scores: Mapping[Edge, float],
    n_edges: int | None,
    threshold: float | None,
    method: str,
    **about: Any,
) -> Circuit:
    """The circuit that scores tell.

    Args:
        model: Whose edges they are.
        scores: Every edge's.
        n_edges: See :func:`selection.select`.
        threshold: See there.
        method: See there.
        **about: The circuit's other attributes.

    Returns:
        The circuit.

    Raises:
        ValueError: If the arguments make no sense.
    """
    edges = select(scores, model.wiring, n_edges, threshold, method)
    return Circuit(edges, scores, model, method=method, **about)
