"""Attribution-graph JSON, as Neuronpedia and circuit-tracer read it.

The schema is Neuronpedia's "Anthropic Attribution Graph", version 1.0.0. What it does not say:

* A logit's label holds its token in double quotes, and its probability as "(p=0.123)".
* A head is of type ``lorsa`` (a feature of attention); an MLP, an expert or a transcoder's feature
  is ``cross layer transcoder``. ``feature`` is the Cantor pair of the layer and a number within it.
* ``influence`` is the share of all influence held by nodes at least as influential.
* A graph whose nodes are all in layer 0 is refused by the server, so a placeholder stands in
  layer 1.
* What reaches a head's queries and keys is no link. It stands in ``qk_tracing_results``.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..checks import place_label
from ..graph import CONTENTS
from .placed_graph import GraphNode, PlacedGraph

MOST_QK = 20
"""How many nodes are listed for the queries of a head, and as many for its keys."""


def graph_json(graph: PlacedGraph, slug: str | None = None, scan: str | None = None) -> str:
    """Write a graph as JSON; see :meth:`PlacedGraph.to_json`."""
    if not all(graph._answers):
        raise ValueError(
            f"The target {graph.target} is a direction, and such a graph ends at a token. Pass a "
            "token to attribution_graph, or use to_dot."
        )
    slug = _slug(graph) if slug is None else slug
    if not isinstance(slug, str) or not re.fullmatch(r"[a-z0-9-]+", slug):
        raise ValueError(f"slug={slug!r} is not the name of a graph. Use a–z, 0–9 and '-' alone.")
    held, told = graph._influences(), graph._settings()
    nodes = [node_entry(graph, at) for at in graph.nodes]
    names = [node["node_id"] for node in nodes]
    for i, (node, at, share) in enumerate(zip(nodes, graph.nodes, held, strict=True)):
        node |= {"influence": share, "activation": getattr(at, "activation", at.effect)}
        node |= {"run_idx": 0, "reverse_ctx_idx": len(graph.tokens) - 1 - at.pos}
        if at.node.kind == "head":
            node["qk_tracing_results"] = _query_key(graph, i, names)
    if graph.n_layers == 1:
        nodes.append(_placeholder(graph))
    data = {
        "metadata": {
            "slug": slug,
            "scan": graph.model if scan is None else scan,
            "transcoder_list": [],
            "prompt_tokens": list(graph.tokens),
            "prompt": graph.prompt,
            "node_threshold": 0.8,
            "schema_version": 1,
            "info": {
                "description": told["description"],
                "generator": {"name": "tensorlens_tl"},
            },
            "generation_settings": told["generation_settings"],
            "pruning_settings": told["pruning_settings"],
        },
        "qParams": {
            "pinnedIds": [n for n, at in zip(names, graph.nodes, strict=True) if _is_target(at)],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": names[link.src], "target": names[link.dest], "weight": link.weight}
            for link in graph.links
            if link.conserved
        ],
    }
    return json.dumps(data, ensure_ascii=False)


def _slug(graph: PlacedGraph) -> str:
    words = re.findall(r"[a-z0-9]+", graph.prompt.lower())
    return "-".join(words)[:60].strip("-") or "graph"


def _cantor(a: int, b: int) -> int:
    return (a + b) * (a + b + 1) // 2 + b


def node_entry(graph: PlacedGraph, at: GraphNode) -> dict[str, Any]:
    """The entry of one node, without its influence."""
    node, pos, label = at.node, at.pos, place_label(graph.tokens[at.pos], at.pos)
    layer = graph.n_layers if node.layer is None else node.layer
    if _is_target(at):
        answer = graph._answers[node.index or 0]
        text, token, p = answer[0]
        against = "".join(f" − {_quoted(text)}" for text, _, _ in answer[1:])
        found = _entry(f"{layer + 1}_{token}_{pos}", layer + 1, pos, token, "logit")
        found |= {"jsNodeId": f"L_{token}-{pos}", "token_prob": p}
        found |= {"is_target_logit": not node.index}
        return found | {"clerp": f"Output {_quoted(text)}{against} (p={p:.3f})"}
    if node.kind in CONTENTS:
        token = pos if graph.ids is None else graph.ids[pos]
        found = _entry(f"E_{token}_{pos}", "E", pos, pos, "embedding")
        return found | {
            "jsNodeId": f"E_{token}-{pos}",
            "clerp": f"Emb: {label}",
        }
    if node.kind == "head":
        number = int(node.index or 0)
        found = _entry(f"{layer}_lor_{number}_{pos}", layer, pos, _cantor(layer, number), "lorsa")
        return found | {"clerp": str(node)}
    if node.kind == "error":
        found = _entry(f"{layer}_-1_{pos}", layer, pos, -1, "mlp reconstruction error")
        return found | {"jsNodeId": f"{layer}_-1-{pos}", "clerp": f"Err: mlp {label}"}
    if node.kind in ("mlp", "expert", "feature"):
        number = node.index or 0
        if node.kind != "feature":  # numbered: heads, the MLP or shared expert, experts
            number = getattr(graph, "n_heads", 0) + (0 if node.index is None else 1 + node.index)
        name = f"{layer}_{number}_{pos}"
        found = _entry(name, layer, pos, _cantor(layer, number), "cross layer transcoder")
        clerp = "" if node.kind == "feature" else str(node)  # the page knows what features mean
        return found | {"jsNodeId": f"{layer}_{number}-0", "clerp": clerp}
    layer = 0 if node.enters else layer
    kind = re.sub(r"[^A-Za-z0-9]+", "-", node.name or node.kind)
    return _entry(f"{layer}_bias_{kind}_{pos}", layer, pos, -1, "bias") | {"clerp": str(node)}


def _is_target(at: GraphNode) -> bool:
    return at.node.kind == "logits"


def _entry(name: str, layer: int | str, pos: int, feature: int, kind: str) -> dict[str, Any]:
    return {
        "node_id": name,
        "jsNodeId": name,
        "feature": feature,
        "layer": str(layer),
        "ctx_idx": pos,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
    }


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "”").replace("\n", "\\n") + '"'


def _query_key(graph: PlacedGraph, i: int, names: list[str]) -> dict[str, Any]:
    """What reaches the queries and keys of a head: each with the other held."""

    def listed(side: str) -> list[list[Any]]:
        own = [link for link in graph.links if link.dest == i and link.reads == side]
        return [[names[link.src], link.weight] for link in own[:MOST_QK]]

    return {
        "pair_wise_contributors": [],
        "top_q_marginal_contributors": listed("q"),
        "top_k_marginal_contributors": listed("k"),
    }


def _placeholder(graph: PlacedGraph) -> dict[str, Any]:
    pos = graph.nodes[-1].pos
    found = _entry(f"1_unknown_placeholder_{pos}", 1, pos, -1, "unknown")
    clerp = "placeholder: the model has one layer, and the page needs two"
    return found | {"clerp": clerp, "influence": 1.0, "activation": 0.0}
