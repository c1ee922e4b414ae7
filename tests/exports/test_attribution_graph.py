"""Attribution graphs: sums over positions, into nodes and into the target; and their JSON."""

import json
import re
from dataclasses import replace

import pytest
import torch
from comparisons import assert_close
from models import CASES, ENCODERS, PER_SHAPE, lens_of
from test_experts import NAMES as MIXTURES
from test_experts import lens_of as mixture_of
from test_experts import within

from tensorlens_tl import demo
from tensorlens_tl.exports.attribution_graph import cumulative, influences

pytestmark = pytest.mark.algebra
EVERYTHING = {"n_nodes": 10**6, "n_links": 10**9}


@pytest.fixture(scope="session")
def lens():
    return demo.load_model().run_with_tensorlens("The capital of France is")[1]


@pytest.fixture(scope="session")
def graph(lens):
    return lens.attribution_graph("Paris", versus="Rome", n_nodes=40)


def check_sums(lens, tol, **target):
    """With nothing left out, the graph is the split by edge, laid out by position."""
    qk = lens.capture.known_scores != ()
    graph = lens.attribution_graph(**target, **EVERYTHING, qk=qk)
    assert len(graph.links) == graph.n_found
    # 1. Over positions, every edge.
    edges = lens.attribute(**target, by="edge", qk=qk)
    expected = dict(zip(map(str, (s.node for s in edges.sources)), edges.values[0], strict=True))
    found = dict.fromkeys(expected, 0.0)
    for link in graph.links:
        reader = f"{graph.nodes[link.dest].node}{link.reads and '.' + link.reads}"
        found[f"{graph.nodes[link.src].node}→{reader}"] += link.weight
    values = [torch.tensor([float(x[name]) for name in expected]) for x in (found, expected)]
    assert_close(*values, tol, "edges")
    # 2. Into every head, MLP and expert; into the target.
    read = [i for i, x in enumerate(graph.nodes) if x.node.kind in ("head", "mlp", "expert")]
    read.append(len(graph) - 1)
    sums = torch.tensor([sum(link.weight for link in graph.into(i)) for i in read])
    assert_close(sums, torch.tensor([graph.nodes[i].effect for i in read]), tol, "nodes")


@pytest.mark.parametrize("case", PER_SHAPE, ids=str)
def test_weights_sum_to_edges_to_nodes_and_to_the_target(case):
    check_sums(lens_of(case)[0], case.within("oracle"), target=3, versus=7)


ALIBI = [case for case in CASES.values() if case.name in ("bridge-bloom", "hooked-bloom")]


@pytest.mark.parametrize("case", ALIBI[:1], ids=str)
def test_distances_count_from_the_position_that_asks(case):
    check_sums(lens_of(case)[0], case.within("oracle"), target=3)


@pytest.mark.parametrize("case", ENCODERS[-1:], ids=str)
def test_norms_of_the_residual_are_passed_on_the_way(case):
    check_sums(lens_of(case)[1], case.within("oracle"), target=3, pos=2)


@pytest.mark.parametrize("name", MIXTURES[:1])
def test_experts_are_nodes(name):
    lens = mixture_of(name)[0]
    check_sums(lens, within(name, "oracle"), target=3)
    assert any(x.node.kind == "expert" for x in lens.attribution_graph(3).nodes)


def test_what_is_kept_is_the_largest_and_tokens_always_stay(lens, graph):
    whole = lens.attribution_graph("Paris", versus="Rome", **EVERYTHING)
    small = lens.attribution_graph("Paris", versus="Rome", n_nodes=3, n_links=5)
    kept = {(x.node, x.pos) for x in small.nodes}
    assert {(x.node.kind, x.pos) for x in small.nodes} >= {("embed", pos) for pos in range(6)}
    least = min(abs(x.effect) for x in small.nodes if x.node.kind != "embed")
    for x in whole.nodes:
        assert (x.node, x.pos) in kept or abs(x.effect) <= least
    assert len(small.links) == 5 and small.n_found > 5
    # A weight does not depend on what else is kept.
    of = {(g.labels[x.src], g.labels[x.dest], x.reads): x.weight for g in (whole,) for x in g.links}
    for x in graph.links:
        key = graph.labels[x.src], graph.labels[x.dest], x.reads
        assert of[key] == pytest.approx(x.weight, rel=1e-4, abs=1e-6)


def test_a_circuit_keeps_its_edges_alone(lens):
    circuit = lens.discover("Paris", n_edges=12)
    graph = lens.attribution_graph("Paris", circuit=circuit, **EVERYTHING)
    for link in graph.links:
        src, dest = graph.nodes[link.src].node, graph.nodes[link.dest].node
        reader = f"{dest}{link.reads and '.' + link.reads}"
        name = f"{'input' if src.enters else src}→{reader}"
        assert src.kind == "constant" or name in circuit


def test_a_direction_and_several_prompts(lens):
    graph = lens.attribution_graph(torch.ones(lens.operator.out_dim), n_nodes=2)
    assert graph.answer == () and "digraph" in graph.to_dot()
    with pytest.raises(ValueError, match="is a direction, and such a graph ends at a token"):
        graph.to_json()
    with pytest.raises(ValueError, match="n_nodes=0 is not an integer"):
        lens.attribution_graph(n_nodes=0)
    two = demo.load_model().run_with_tensorlens(["The capital of France is"] * 2)[1]
    with pytest.raises(ValueError, match="attribution_graph needs one prompt, but the lens has 2"):
        two.attribution_graph()


# --- The JSON ------------------------------------------------------------------------------------

_TEXT, _NUMBER, _NAMED = {"type": "string"}, {"type": "number"}, {"type": ["string", "integer"]}


def _object(required, **properties):
    return {
        "type": "object",
        "required": list(required),
        "properties": required | properties,
    }


def _list(items):
    return {"type": "array", "items": items}


_PAIR = {"type": "array", "prefixItems": [_TEXT, _NUMBER], "minItems": 2, "maxItems": 2}
_QK = _object(
    {
        "pair_wise_contributors": _list({"type": "array", "minItems": 3, "maxItems": 3}),
        "top_q_marginal_contributors": _list(_PAIR),
        "top_k_marginal_contributors": _list(_PAIR),
    }
)
SCHEMA = _object(
    {
        "metadata": _object(
            {"slug": _TEXT, "scan": _TEXT, "prompt_tokens": _list(_TEXT), "prompt": _TEXT},
            node_threshold=_NUMBER,
            schema_version=_NUMBER,
            transcoder_list=_list(_TEXT),
            info={"type": "object"},
        ),
        "qParams": _object(
            {},
            pinnedIds=_list(_TEXT),
            supernodes=_list(_list(_TEXT)),
            linkType=_TEXT,
            clickedId=_TEXT,
            sg_pos=_TEXT,
        ),
        "nodes": _list(
            _object(
                {
                    "node_id": _TEXT,
                    "feature": {"type": ["integer", "null"]},
                    "layer": _NAMED,
                    "ctx_idx": {"type": "integer"},
                    "feature_type": _TEXT,
                    "jsNodeId": _TEXT,
                    "clerp": _TEXT,
                },
                influence=_NUMBER,
                activation=_NUMBER,
                token_prob=_NUMBER,
                is_target_logit={"type": "boolean"},
                qk_tracing_results=_QK,
            )
        ),
        "links": _list(_object({"source": _TEXT, "target": _TEXT, "weight": _NUMBER})),
    }
)
"""What the server's schema requires, and the types of what else is written."""


@pytest.fixture(scope="session")
def data(graph):
    return json.loads(graph.to_json())


def test_the_schema_and_its_unwritten_rules(graph, data):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is in the extra dev")
    jsonschema.Draft202012Validator(SCHEMA).validate(data)
    nodes = {node["node_id"]: node for node in data["nodes"]}
    assert len(nodes) == len(data["nodes"]) == len(graph)
    # 1. The logit's label.
    (logit,) = (node for node in nodes.values() if node["feature_type"] == "logit")
    token = re.search(r'"(.*?)"', logit["clerp"])[1]
    p = float(re.search(r"\(p=(\d\.\d{3})\)", logit["clerp"])[1])
    assert token == "Paris" and p == pytest.approx(logit["token_prob"], abs=6e-4)
    assert logit["is_target_logit"] and logit["token_prob"] > 0.5
    # 2. Ids.
    kinds = {
        "embedding": r"E_\d+_\d+",
        "lorsa": r"\d+_lor_\d+_\d+",
        "cross layer transcoder": r"\d+_\d+_\d+",
        "bias": r"\d+_bias_[A-Za-z0-9-]+_\d+",
        "logit": r"\d+_\d+_\d+",
    }
    for name, node in nodes.items():
        assert re.fullmatch(kinds[node["feature_type"]], name), name
        assert name.endswith(f"_{node['ctx_idx']}")
    assert {node["feature_type"] for node in nodes.values()} == set(kinds)
    assert logit["layer"] == str(graph.n_layers + 1)
    # 3. Influence is the share held by all that are at least as influential.
    ranked = sorted(data["nodes"], key=lambda node: node["influence"])
    assert ranked[0] is logit and ranked[-1]["influence"] == pytest.approx(1)
    # 4. A model of one layer gets a placeholder; this one does not.
    assert not any(node["feature_type"] == "unknown" for node in nodes.values())
    one = json.loads(replace(graph, n_layers=1).to_json())
    (extra,) = (node for node in one["nodes"] if node["feature_type"] == "unknown")
    assert extra["layer"] == "1"
    # 5. Queries and keys are in no link.
    links = {(x["source"], x["target"]): x["weight"] for x in data["links"]}
    assert len(links) == sum(link.conserved for link in graph.links)
    names = [node["node_id"] for node in data["nodes"]]
    for link in graph.links:
        src, dest = names[link.src], names[link.dest]
        if link.conserved:
            assert links[src, dest] == link.weight
    heads = [node for node in data["nodes"] if node["feature_type"] == "lorsa"]
    assert all("qk_tracing_results" in node for node in heads)
    found = [
        pair
        for node in heads
        for side in "qk"
        for pair in node["qk_tracing_results"][f"top_{side}_marginal_contributors"]
    ]
    assert found and {name for name, _ in found} <= set(names)


def test_influence_by_hand(graph):
    shares, into = influences(graph), graph.into(-1)
    total = sum(abs(link.weight) for link in into)
    for link in into:
        if sum(x.src == link.src and x.conserved for x in graph.links) == 1:
            assert shares[link.src] == pytest.approx(abs(link.weight) / total)
    assert shares[-1] == 1
    assert cumulative([1.0, 3.0, 0.0]) == [1.0, 0.75, 1.0]


def test_odd_tokens_and_slugs(graph):
    odd = replace(graph, answer=(('a"\n', 1, 0.25),))
    (logit,) = (x for x in json.loads(odd.to_json())["nodes"] if x["feature_type"] == "logit")
    assert logit["clerp"] == 'Output "a”\\n" (p=0.250)'
    named = json.loads(graph.to_json("a-1", "gpt2"))["metadata"]
    assert (named["slug"], named["scan"]) == ("a-1", "gpt2")
    with pytest.raises(ValueError, match="slug='A b' is not the name of a graph"):
        graph.to_json("A b")


def test_a_file_is_whole_or_not_there(graph, tmp_path):
    graph.save(tmp_path / "graph.json")
    assert json.loads((tmp_path / "graph.json").read_text()) == json.loads(graph.to_json())
    with pytest.raises(ValueError, match="is not the name of a graph"):
        graph.save(tmp_path / "other.json", "A b")
    assert [file.name for file in tmp_path.iterdir()] == ["graph.json"]


def test_circuit_tracer_reads_it(graph):
    models = pytest.importorskip(
        "circuit_tracer.frontend.graph_models", reason="circuit-tracer is not installed"
    )
    read = models.Model.model_validate_json(graph.to_json())
    assert len(read.nodes) == len(graph)


def test_dot_has_every_node_and_edge(graph):
    lines = graph.to_dot().splitlines()
    assert sum("->" in line for line in lines) == len(graph.links)
    dashed = sum(not link.conserved for link in graph.links)
    assert sum("style=dashed" in line for line in lines) == dashed > 0


def test_a_reader_of_dot_finds_them(graph, lens):
    pydot = pytest.importorskip("pydot", reason="pydot is not installed")
    circuit = lens.discover("Paris", n_edges=12)
    for found, edges in ((graph, graph.links), (circuit, circuit.edges)):
        (read,) = pydot.graph_from_dot_data(found.to_dot())
        assert len(read.get_edges()) == len(edges)
    assert {f'"{node}"' for node in circuit.nodes} <= {node.get_name() for node in read.get_nodes()}
