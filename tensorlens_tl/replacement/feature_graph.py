"""The attribution graph of a replacement model: features, errors, tokens and targets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import place_label, spelled
from ..exports import Answer, GraphLink, GraphNode, PlacedGraph
from ..graph import CONTENTS, Node
from ..pictures import Page
from .influence import Influence

REST = Node("rest")
"""The features that are left out, and edges that are cut off, as one writer."""
CONSTANTS = Node("constant", name="constants")
"""All constants of a pruned graph."""
MOST_ERROR = 0.5
"""The share of an MLP's effects from which on its error is warned about."""
_FORMAT = "tensorlens_tl feature graph 1"
_MOST_DRAWN = 5000


@dataclass(frozen=True)
class FeatureNode(GraphNode):
    """A node of a feature graph.

    Attributes:
        node: A token's source, a feature, an error, a constant, the "rest", or a target: "logits".
        pos: The position at which the node writes, among the real tokens. Constants and the rest,
            which are sums over positions, stand at the target's.
        effect: What the node adds to the targets, by itself and through features. Of a target, its
            value.
        activation: The activation of a feature; of any other node the effect.
        influence: The share of all influence that nodes at least as influential hold: 0 is most.
    """

    activation: float
    influence: float


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class FeatureGraph(PlacedGraph):
    """Targets and features, each as a sum of what features, errors and tokens add to it.

    MLPs are replaced by transcoders, y = W_dec z + b_dec (+ x W_skip) + error. Attention patterns,
    norm scales and what fires are held. So the weights into a feature sum to its pre-activation,
    and those into a target to the target, exactly, with the constants and the rest.

    Attributes:
        nodes: Tokens, features, errors, constants, the rest, and the targets last.
        weights: What every reader makes of every writer [reader, node]. Readers are the features
            and then the targets, writers all nodes but the targets, in the order of ``nodes``.
        values: What the weights of every reader sum to [reader].
        target: The names of the targets.
        target_value: The targets in the model's own run, weighted by their shares.
        targets: The name of every target.
        answers: The tokens of every target, each as (text, id, probability), the second one
            subtracted; () for a direction.
        shares: How much each target counts; they sum to 1.
        replacement_score: The share of the influence at tokens among that at tokens and errors.
        completeness_score: The share of what nodes read that is no error, weighted by influence.
        error_by_layer: By number of the block, the error's share of Σ|total effects| of the MLP's
            features and error.
        error_by_position: The same at every position.
        n_active: How many features fire, positions counted apart.
        n_found: How many edges were not 0 before the graph was pruned.
        tokens: The strings of the prompt's tokens.
        ids: The ids of the prompt's tokens; None where the rows are no tokens.
        model: The name of the model.
        n_layers: Number of blocks.
        prompt: The prompt as one text.

    Example:
        >>> import torch
        >>> from tensorlens_tl import FeatureGraph, demo, features
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> random = torch.Generator().manual_seed(0)
        >>> W = torch.randn(64, 128, generator=random) / 8
        >>> weights = {"W_enc": W.T, "W_dec": W, "b_enc": W[:, 0] * 0, "b_dec": W[0] * 0}
        >>> sites = [(f"blocks.{i}.hook_resid_mid", f"blocks.{i}.hook_mlp_out") for i in (2, 3)]
        >>> given = [features.load(weights, site=a, writes=b) for a, b in sites]
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # random transcoders: all is error
        ...     graph = lens.feature_graph(given, "Paris", max_features=50)
        >>> sums = graph.weights.double().sum(1)
        >>> bool(((sums - graph.values).abs() < 1e-3).all()), graph.n_features
        (True, 50)
        >>> few = graph.prune()
        >>> few.n_features < 50, FeatureGraph.from_json(few.to_json()).labels == few.labels
        (True, True)
    """

    nodes: tuple[FeatureNode, ...]
    weights: Float[Tensor, "reader node"]
    values: Float[Tensor, " reader"]
    target: str
    target_value: float
    targets: tuple[str, ...]
    answers: tuple[Answer, ...]
    shares: tuple[float, ...]
    replacement_score: float
    completeness_score: float
    error_by_layer: Mapping[int, float]
    error_by_position: Mapping[int, tuple[float, ...]]
    n_active: int
    n_found: int
    tokens: tuple[str, ...]
    ids: tuple[int, ...] | None
    model: str
    n_layers: int
    prompt: str

    _sums = False
    _unit = "in the reader's unit"
    _legend = (
        "Squares are tokens and targets, circles features, diamonds errors, at the position where "
        "they write; the area is the total effect. Edges into a feature sum to its pre-activation."
    )

    @property
    def n_features(self) -> int:
        """How many features are nodes."""
        return len(self.values) - len(self.targets)

    @cached_property
    def readers(self) -> tuple[int, ...]:
        """The number of every reader in ``nodes``."""
        first = sum(at.node.kind in CONTENTS for at in self.nodes)
        last = range(len(self.nodes) - len(self.targets), len(self.nodes))
        return (*range(first, first + self.n_features), *last)

    @cached_property
    def links(self) -> tuple[GraphLink, ...]:  # type: ignore[override]
        """All edges that are not 0, the largest first."""
        return self._largest(self.weights.numel())

    def _largest(self, n: int) -> tuple[GraphLink, ...]:
        flat = self.weights.flatten()
        there = flat.nonzero().flatten()
        order = flat[there].abs().topk(min(n, len(there))).indices
        at, width = there[order].tolist(), self.weights.shape[1]
        weights = flat[there[order]].tolist()
        return tuple(
            GraphLink(i % width, self.readers[i // width], "", x)
            for i, x in zip(at, weights, strict=True)
        )

    def __repr__(self) -> str:
        lines = [
            f"FeatureGraph of {self.target} = {self.target_value:.4g} in {self.model}:",
            *(f"  {note}" for note in self._notes()),
        ]
        shown, labels = self._largest(10), self.labels
        lines += [f"  {x.weight:+9.4f}  {labels[x.src]} → {labels[x.dest]}" for x in shown]
        more = int(self.weights.count_nonzero()) - len(shown)
        return "\n".join([*lines, *([f"  … {more} more edges"] if more else [])])

    @property
    def _names(self) -> Sequence[str]:
        return self.targets

    @property
    def _answers(self) -> Sequence[Answer]:
        return self.answers

    def _label(self, at: GraphNode) -> str:
        placed = at.node.kind in (*CONTENTS, "feature", "error", "logits")
        return super()._label(at) if placed else str(at.node)

    def _influences(self) -> list[float]:
        return [at.influence for at in self.nodes]

    def _notes(self) -> Iterator[str]:
        kept = self.n_features, int(self.weights.count_nonzero())
        rest = "" if kept == (self.n_active, self.n_found) else "; all others are “rest”"
        yield (
            f"{kept[0]} of the {self.n_active} features that fire, and {kept[1]} of "
            f"{self.n_found} edges{rest}."
        )
        yield (
            f"Replacement score {self.replacement_score:.2f}, completeness score "
            f"{self.completeness_score:.2f}."
        )
        shares = []
        for layer, by_pos in self.error_by_position.items():
            most = max(range(len(by_pos)), key=by_pos.__getitem__)
            where = f"{by_pos[most]:.0%} {place_label(self.tokens[most], most)}"
            shares.append(f"L{layer} {self.error_by_layer[layer]:.0%} ({where})")
        yield f"Errors by layer, and where they are largest: {', '.join(shares)}."

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> FeatureGraph:
        """Keep the nodes and edges that hold most of the influence on the targets.

        What is cut off is added to the rest, and constants are joined. So the weights into every
        node that is kept still sum to its value. Scores stay those of the whole graph.

        Args:
            node_threshold: The share of all nodes' influence that is kept.
            edge_threshold: The share of the influence along edges between these that is kept.

        Returns:
            The smaller graph. Tokens and targets are all kept, features and errors only where an
            edge to another node is.

        Raises:
            ValueError: If a threshold is not between 0 and 1.

        Source: circuit-tracer's ``prune_graph``.
        """
        for name, share in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"{name}={share!r} is no share. Pass a number from 0 to 1.")
        flow = self._influence
        keep, edges = flow.most(node_threshold, edge_threshold)
        n, n_targets = sum(flow.sizes), len(self.targets)
        # Features are writers and readers, targets readers alone: rows follow from both.
        rows = torch.cat([keep[flow.features], keep.new_ones(n_targets)])
        weights, edges = self.weights[rows], edges[rows]
        left = weights[:, :n] * edges
        # In float64: the sum of all that was cut off must still complete each row.
        cut = (weights[:, :n] * ~edges).double().sum(1) + weights[:, -1].double()
        constants = weights[:, n:-1].double().sum(1)
        weights = torch.cat([left[:, keep], torch.stack([constants, cut], 1).to(left)], 1)
        nodes = list(compress(self.nodes, keep.tolist()))
        nodes += [replace(self.nodes[-n_targets - 1], node=node) for node in (CONSTANTS, REST)]
        sizes = flow.sizes[0], int(keep[flow.features].sum()), int(keep[flow.features.stop :].sum())
        values = self.values[rows]
        effects = Influence(weights, sizes, flow.shares).effects(values).tolist()
        for i, effect in enumerate(effects):
            at = nodes[i]
            activation = at.activation if at.node.kind == "feature" else effect
            nodes[i] = replace(at, effect=effect, activation=activation)
        nodes += self.nodes[-n_targets:]
        return replace(self, nodes=tuple(nodes), weights=weights, values=values)

    @cached_property
    def _influence(self) -> Influence:
        kinds = [at.node.kind for at in self.nodes]
        sizes = sum(k in CONTENTS for k in kinds), kinds.count("feature"), kinds.count("error")
        return Influence(self.weights, sizes, self.weights.new_tensor(self.shares))

    # --- In other forms

    def _page(self) -> Page:
        if int(self.weights.count_nonzero()) > _MOST_DRAWN and self.weights.shape[1] > 1:
            small = self.prune()
            if len(small) < len(self):
                return small._page()
        return super()._page()

    def _settings(self) -> Mapping[str, Any]:
        names = ("target", "target_value", "targets", "answers", "shares", "replacement_score")
        names += ("completeness_score", "n_active", "n_found", "ids", "n_layers", "model")
        told = {name: getattr(self, name) for name in names}
        told |= {
            "format": _FORMAT,
            "dtype": str(self.weights.dtype).removeprefix("torch."),
            "values": self.values.tolist(),
            "error_by_layer": list(self.error_by_layer.items()),
            "error_by_position": list(self.error_by_position.items()),
            "nodes": [[str(at.node), *list(asdict(at).values())[1:]] for at in self.nodes],
        }
        return {
            "description": "Features of transcoders in the place of MLPs, their errors and tokens",
            "generation_settings": told,
            "pruning_settings": {"nodes": len(self), "links": int(self.weights.count_nonzero())},
        }

    @classmethod
    def from_json(cls, text: str) -> FeatureGraph:
        """Read a graph that :meth:`to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            The graph, on the CPU.

        Raises:
            ValueError: If the text is not a whole feature graph.
        """
        try:
            data = json.loads(text)
            metadata = data["metadata"]
            told = dict(metadata["generation_settings"])
            if told.pop("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            dtype = {"float32": torch.float32, "float64": torch.float64}[told.pop("dtype")]
            nodes = [FeatureNode(Node.parse(name), *rest) for name, *rest in told.pop("nodes")]
            last = range(-len(told["targets"]), 0)
            for i in last:  # targets are numbered
                nodes[i] = replace(nodes[i], node=replace(nodes[i].node, index=i - last[0]))
            values = torch.tensor(told.pop("values"), dtype=dtype)
            told["answers"] = tuple(tuple(map(tuple, answer)) for answer in told["answers"])
            told["error_by_layer"] = dict(told["error_by_layer"])
            by_position = told["error_by_position"]
            told["error_by_position"] = {layer: tuple(by_pos) for layer, by_pos in by_position}
            for name in ("targets", "shares", "ids"):
                told[name] = told[name] and tuple(told[name])
            found = cls(
                nodes=tuple(nodes),
                # Links of weight 0 are not written, so all else is 0.
                weights=values.new_zeros(len(values), len(nodes) - len(told["targets"])),
                values=values,
                tokens=tuple(metadata["prompt_tokens"]),
                prompt=metadata["prompt"],
                **told,
            )
            number = {name: i for i, name in enumerate(found._ids())}
            row = {node: i for i, node in enumerate(found.readers)}
            for link in data["links"]:
                at = row[number[link["target"]]], number[link["source"]]
                found.weights[at] = link["weight"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"The text is no feature graph as to_json writes it ({error}). Write it again."
            ) from None
        return found
