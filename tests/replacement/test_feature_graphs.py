"""Feature graphs: sums, effects, scores, what pruning keeps, and their file."""

import json
import warnings

import pytest
import torch
from comparisons import assert_close
from models import PER_SHAPE, lens_of
from test_attribution_graph import SCHEMA
from torch.utils.flop_counter import FlopCounterMode
from transcoders import transcoders

from tensorlens_tl.attribution import resolve
from tensorlens_tl.replacement import FeatureGraph, ReplacementModel
from tensorlens_tl.replacement.influence import Influence

pytestmark = [
    pytest.mark.algebra,
    pytest.mark.filterwarnings("ignore:Errors do more than features"),
]
CASE = PER_SHAPE[0]


@pytest.fixture(scope="session")
def lens():
    return lens_of(CASE)[0]


@pytest.fixture(scope="session")
def given(lens):
    return transcoders(lens, "cross-layer skip")


@pytest.fixture(scope="session")
def graph(lens, given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lens.feature_graph(given, [3, 5])


@pytest.fixture(scope="session")
def small(lens, given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lens.feature_graph(given, [3, 5], max_features=20)


def numbered(graph, kind):
    return [i for i, at in enumerate(graph.nodes) if at.node.kind == kind]


def check_sums(graph, tol=1e-12):
    assert_close(graph.weights.sum(1), graph.values, tol)
    ends = ("feature", "logits")
    sources = sum(at.effect for at in graph.nodes if at.node.kind not in ends)
    assert sources == pytest.approx(graph.target_value, rel=tol)


def test_all_weights_into_a_reader_sum_to_it(graph, small):
    for found in (graph, small, graph.prune(), small.prune(0.5, 0.9)):
        check_sums(found)
        assert [found.nodes[i].node.kind for i in found.readers].count("feature") == (
            found.n_features
        )
    assert graph.n_features == graph.n_active > 100 and small.n_features == 20
    assert graph.nodes[-3].effect == 0 and small.nodes[-3].effect != 0  # the rest


def test_effects_are_those_of_a_sweep_through_features(lens, given, graph, small):
    model = ReplacementModel.of(given, lens.capture, lens.operator)
    total = model.of_targets([resolve(lens.capture, i) for i in (3, 5)], through=True)
    w = torch.tensor(graph.shares, dtype=torch.float64)
    parts = [total.tokens, *total.features, total.errors.flatten(1)]
    effects = torch.tensor([at.effect for at in graph.nodes], dtype=torch.float64)
    n = sum(part.shape[1] for part in parts)
    assert_close(effects[:n], w @ torch.cat(parts, 1), 1e-12)
    # Σ |effect| of errors among that of features and errors, block by block.
    for layer, share in graph.error_by_layer.items():
        errors, features = total.errors[:, layer], total.features[layer]
        size = (w @ errors.abs()).sum()
        assert share == pytest.approx(float(size / (size + (w @ features.abs()).sum())))
    # The largest are kept where the graph is to be small.
    sizes = torch.cat([w @ own.abs() for own in total.features])
    largest = set(sizes.topk(20).indices.tolist())
    labels = [graph.labels[i] for i in numbered(graph, "feature")]
    kept = [small.labels[i] for i in numbered(small, "feature")]
    assert {labels.index(label) for label in kept} == largest


def test_features_that_are_left_out_are_one_writer(graph, small):
    kept = {small.labels[i] for i in numbered(small, "feature")}
    # A weight does not depend on what else is kept, and the rest is the sum of all others.
    number = {label: i for i, label in enumerate(graph.labels)}
    row = {graph.labels[node]: i for i, node in enumerate(graph.readers)}
    rows = [row[small.labels[node]] for node in small.readers]
    columns = [number[label] for label in small.labels[: small.weights.shape[1] - 1]]
    whole = graph.weights[rows]
    assert_close(small.weights[:, :-1], whole[:, columns], 1e-12)
    left = [i for i in numbered(graph, "feature") if graph.labels[i] not in kept]
    assert_close(small.weights[:, -1], whole[:, left].sum(1), 1e-12)


def square(graph):
    """|weights| between tokens, features, errors and targets, and the targets' shares."""
    kinds = [at.node.kind for at in graph.nodes]
    kept = [i for i, kind in enumerate(kinds) if kind in ("embed", "feature", "error", "logits")]
    every = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.float64)
    every[list(graph.readers), : graph.weights.shape[1]] = graph.weights.abs()
    w = torch.zeros(len(graph.nodes), dtype=torch.float64)
    w[-len(graph.shares) :] = torch.tensor(graph.shares)
    return every[kept][:, kept], w[kept], [kinds[i] for i in kept]


def test_scores_are_those_of_the_inverse(graph):
    sizes, w, kinds = square(graph)
    A = sizes / sizes.sum(1, keepdim=True).clamp_min(1e-30)
    eye = torch.eye(len(A), dtype=torch.float64)
    influence = w @ (torch.linalg.inv(eye - A) - eye)
    tokens, errors = (torch.tensor([k == kind for k in kinds]) for kind in ("embed", "error"))
    replacement = influence[tokens].sum() / influence[tokens | errors].sum()
    assert graph.replacement_score == pytest.approx(float(replacement))
    has = influence + w
    complete = (has * (1 - A[:, errors].sum(1))).sum() / has.sum()
    assert graph.completeness_score == pytest.approx(float(complete))
    held = {at: node.influence for at, node in zip(graph.labels, graph.nodes, strict=True)}
    top = int(influence.argmax())
    assert held[graph.labels[top]] == pytest.approx(float(influence[top] / influence.sum()))


def test_influence_and_pruning_by_hand():
    # A token t, features a and b, an error e. Rows: a, b, and the target.
    weights = torch.tensor(
        [
            [3.0, 0.0, 0.0, -1.0],  # a: ¾ token, ¼ error
            [0.0, 1.0, 0.0, 1.0],  # b: ½ a, ½ error
            [1.0, 2.0, 1.0, 0.0],  # target: ¼ token, ½ a, ¼ b
        ],
        dtype=torch.float64,
    )
    flow = Influence(weights, (1, 2, 1), torch.ones(1, dtype=torch.float64))
    a, b = 1 / 2 + 1 / 8, 1 / 4
    token, error = 1 / 4 + 3 / 4 * a, a / 4 + b / 2
    assert flow.of_nodes.tolist() == pytest.approx([token, a, b, error])
    has, of_errors = 1 + a + b + token + error, a / 4 + b / 2
    assert flow.scores() == pytest.approx((token / (token + error), 1 - of_errors / has))
    # Half of all influence is at the token (.72) and a (.63), of 1.88.
    nodes, edges = flow.most(0.5, 1.0)
    assert nodes.tolist() == [True, True, False, False]
    assert edges.tolist() == [[True, False, False, False], [False] * 4, [True, True, False, False]]
    # Between these a has 2/3 and passes all of it on; 1/3 of the target reads the token.
    _, edges = flow.most(0.5, 0.7)
    assert edges.tolist() == [[True, False, False, False], [False] * 4, [False, True, False, False]]
    # b reads nothing that is kept, once the error and the edge from a are cut.
    nodes, _ = flow.most(0.9, 0.75)
    assert nodes.tolist() == [True, True, False, False]
    # 2 a reads 3, and b reads a: what goes through is in proportion.
    effects = flow.effects(torch.tensor([2.0, 2.0, 9.0], dtype=torch.float64))
    assert effects.tolist() == pytest.approx([1 + 3 * 1.25, 2.5, 1.0, -1.25 + 0.5])


def test_pruning_is_circuit_tracers(graph):
    theirs = pytest.importorskip("circuit_tracer.graph", reason="circuit-tracer is not installed")
    sizes, w, kinds = square(graph)
    order = [
        k
        for kind in ("feature", "error", "embed", "logits")
        for k in range(len(kinds))
        if kinds[k] == kind
    ]

    class Cfg:
        n_layers = graph.n_layers

    class Graph:
        cfg = Cfg
        adjacency_matrix = sizes[order][:, order]
        selected_features, input_tokens = range(graph.n_features), graph.tokens
        logit_targets, logit_probabilities = graph.targets, w[-2:]

    back = torch.tensor(order).argsort()
    rows = [i for i, kind in enumerate(kinds) if kind in ("feature", "logits")]
    torch.set_default_dtype(torch.float64)
    try:
        scores = theirs.compute_graph_scores(Graph)
        assert scores == pytest.approx((graph.replacement_score, graph.completeness_score))
        for thresholds in ((0.8, 0.98), (0.95, 0.98), (0.4, 0.6)):
            nodes, edges = graph._influence.most(*thresholds)
            found = theirs.prune_graph(Graph, *thresholds)
            assert torch.equal(found.node_mask[back][: len(nodes)], nodes)
            there = sizes[rows][:, : len(nodes)] > 0
            assert torch.equal(found.edge_mask[back][:, back][rows][:, : len(nodes)] & there, edges)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_pruned_graph_keeps_the_edges_of_the_whole(graph):
    few = graph.prune(0.95, 0.98)
    assert 0 < few.n_features < graph.n_features and few.n_found == graph.n_found
    assert [at.node.kind for at in few.nodes].count("embed") == len(graph.tokens)
    of = {(graph.labels[x.src], graph.labels[x.dest]): x.weight for x in graph.links}
    for link in few.links:
        src, dest = few.labels[link.src], few.labels[link.dest]
        assert src.startswith(("rest", "constants")) or of[src, dest] == link.weight
    assert few.replacement_score == graph.replacement_score
    for i in numbered(few, "feature"):
        assert any(x.src == i for x in few.links) and few.into(i)
    # All of it is what reaches the targets at all.
    reaches = graph._influence.of_nodes[graph._influence.features] > 0
    assert graph.prune(1, 1).n_features == int(reaches.sum()) < graph.n_features


def test_the_file_is_that_of_circuit_tracer_and_is_read_back(graph, tmp_path):
    few = graph.prune()
    few.save(tmp_path / "graph.json")
    text = (tmp_path / "graph.json").read_text()
    data = json.loads(text)
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is in the extra dev")
    jsonschema.Draft202012Validator(SCHEMA).validate(data)
    nodes = {node["node_id"]: node for node in data["nodes"]}
    assert len(nodes) == len({node["jsNodeId"] for node in nodes.values()}) == len(few)
    kinds = {
        "embed": ("embedding", "E_{token}_{pos}"),
        "feature": ("cross layer transcoder", "{layer}_{index}_{pos}"),
        "error": ("mlp reconstruction error", "{layer}_-1_{pos}"),
        "logits": ("logit", "3_{token}_{pos}"),
    }
    answers = iter(few.answers)
    for at, node in zip(few.nodes, data["nodes"], strict=True):
        kind, name = kinds.get(at.node.kind, ("bias", node["node_id"]))
        token = next(answers)[0][1] if kind == "logit" else few.ids[at.pos]
        places = {"layer": at.node.layer, "index": at.node.index, "pos": at.pos, "token": token}
        assert (node["feature_type"], node["node_id"]) == (kind, name.format(**places))
    logits = [node for node in data["nodes"] if node["feature_type"] == "logit"]
    assert [node["is_target_logit"] for node in logits] == [True, False]
    assert len(data["links"]) == len(few.links)
    again = FeatureGraph.from_json(text)
    assert again.to_json() == few.to_json() and torch.equal(again.weights, few.weights)
    assert again.nodes == few.nodes and repr(again) == repr(few)
    models = pytest.importorskip(
        "circuit_tracer.frontend.graph_models", reason="circuit-tracer is not installed"
    )
    assert len(models.Model.model_validate_json(text).nodes) == len(few)


def test_errors_are_said_and_warned_about(lens, given):
    assert "L0 " in repr(lens.feature_graph(given, 3)) and "“rest”" in repr(
        lens.feature_graph(given, 3, max_features=1)
    )
    alone = given[1:]  # block 0 has no transcoder: all of it is error
    with pytest.warns(UserWarning, match=r"in 2 of 2 MLPs, most in block 0 \(100%\)"):
        found = lens.feature_graph(alone, 3)
    assert found.error_by_layer[0] == pytest.approx(1)
    assert "L0 100%" in repr(found)
    check_sums(found)


def test_pages_and_pictures_show_it(graph):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra plot")
    page = graph.to_html()
    assert "Replacement score" in page and "<title>" in page
    (view,) = graph.prune()._page().views
    rows = dict(zip(view.data["labels"], view.data["row"].tolist(), strict=True))
    assert rows["rest"] == rows["constants"] == 0 and rows[graph.targets[0]] == max(rows.values())
    assert {"feature", "error", "token", "constant", "target"} == {*view.data["kinds"]}
    assert graph.target in graph.plot(top=5).get_title()
    assert "digraph" in graph.prune().to_dot()
    assert list(graph.to_dataframe().columns) == ["src", "dest", "reads", "value"]


@pytest.mark.parametrize(("kind", "most"), [("topk", 5000), ("topk", 20)])
def test_a_plan_counts_what_the_call_does(lens, kind, most):
    ask = {"transcoders": transcoders(lens, kind), "target": [3, 5], "max_features": most}
    with FlopCounterMode(display=False) as counted:
        lens.feature_graph(**ask)
    plan = lens.plan("feature_graph", **ask)
    assert plan.flops == pytest.approx(counted.get_total_flops(), rel=0.2)
    with pytest.raises(ValueError, match="max_features=0 is not an integer"):
        lens.plan("feature_graph", **ask | {"max_features": 0})


def test_what_cannot_be_served_is_refused(lens, given, graph):
    with pytest.raises(ValueError, match="needs one prompt, but the lens has 2"):
        lens_of(CASE).feature_graph(given, 3)
    with pytest.raises(ValueError, match="max_features=0 is not an integer"):
        lens.feature_graph(given, 3, max_features=0)
    with pytest.raises(ValueError, match="node_threshold=2 is no share"):
        graph.prune(2)
    with pytest.raises(ValueError, match="no feature graph as to_json writes it"):
        FeatureGraph.from_json("{}")
    for wrong in ("sae", [], [given[0], None]):
        with pytest.raises(ValueError, match=r"transcoders= is a (str|list), which names no trans"):
            lens.feature_graph(wrong, 3)
    with pytest.raises(ValueError, match=r"2 dictionaries that write at 'blocks\.0"):
        lens.feature_graph([*given[:1], *given], 3)
    with pytest.raises(ValueError, match=r"target=\[\] names no target"):
        lens.feature_graph(given, [])
    direction = lens.feature_graph(given, torch.ones(lens.operator.out_dim))
    assert direction.answers == ((),)
    with pytest.raises(ValueError, match="is a direction"):
        direction.to_json()
