"""Circuits: the restricted operator against a loop, selection against its definition, files."""

import json
import math
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from comparisons import assert_close
from models import (
    GRADIENT,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    TWO_RUNS,
    lens_of,
    quiet,
    randn_like,
    shape_conventions,
    tokens,
)
from oracles import gradient_of

import tensorlens_tl
from tensorlens_tl import Circuit, Edge, Node, demo, dot_test
from tensorlens_tl.circuits.edge_averages import edge_scores
from tensorlens_tl.circuits.model_id import ModelInfo
from tensorlens_tl.graph.eap_names import eap_name, parse_eap
from tensorlens_tl.graph.selection import SELECTIONS, connected, influences, ranked_by, select
from tensorlens_tl.graph.wiring import INPUT, LOGITS, Wiring, as_edges, owner

pytestmark = pytest.mark.algebra

every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)
DIRECT = ("embed→logits", "pos_embed→logits")


def direct_edges(lens):
    return DIRECT if lens.capture.pos_embed is not None else DIRECT[:1]


def assert_same(ours, theirs, tol=ROUNDING):
    """Where both may be 0: against a size of 1 beside their own."""
    assert (ours - theirs).abs().max() <= tol * (1 + theirs.abs().max())


def some_edges(wiring, seed, share=0.5, qk=False):
    edges = list(wiring.edges(qk))
    return random.Random(seed).sample(edges, int(share * len(edges)))


# --- The restricted operator ---------------------------------------------------------------------


def slowly(lens, edges):
    """The final residual along some edges: from the logits down, head by head, from the weights."""
    capture, cast = lens.capture, lens.capture.frame.cast
    kept = {(str(e.src), str(e.dest)) for e in edges}
    embedded = sum(capture.embeddings.values())
    done = {"input": embedded}

    def normed(norm, x):
        if norm is None:
            return x
        y = norm.apply(x)
        return y if norm.weights.b is None else y + cast(norm.weights.b)

    def without_b(norm, y):
        return y if norm is None else norm.apply(y)

    def fixed(layer, after_attention):
        """Constants outside nodes, before a layer or between its halves."""
        found = torch.zeros_like(embedded)
        for i, block in enumerate(capture.blocks[: layer + 1]):
            halves = [(block.attn.weights.b_O, block.ln1_post, block.mid_norm)]
            if block.mlp is not None:
                halves.append((block.mlp.weights.b_out, block.ln2_post, block.post_norm))
            if i == layer:
                halves = halves[:1] if after_attention else []
            for b, post, after in halves:
                if b is not None:
                    found = found + without_b(post, cast(b).expand_as(embedded))
                if post is not None and post.weights.b is not None:
                    found = found + cast(post.weights.b)
                found = normed(after, found)
        return found

    def carried(src, layer, after_attention):
        """What a node wrote, past the norms of the residual itself that come before a reader."""
        x, node = written(src), Node.parse(src)
        for i, block in enumerate(capture.blocks[: layer + 1]):
            norms = [block.mid_norm, block.post_norm]
            if i == layer:
                norms = norms[:1] if after_attention else []
            for half, norm in enumerate(norms):
                if node.layer is None or (node.layer, node.kind == "mlp") <= (i, bool(half)):
                    x = without_b(norm, x)
        return x

    def read(reader, layer, after_attention=False):
        x = fixed(layer, after_attention)
        for src, dest in kept:
            if dest == reader:
                x = x + carried(src, layer, after_attention)
        return x

    def written(node):
        if node not in done:
            n = Node.parse(node)
            block = capture.blocks[n.layer]
            if n.kind == "head":
                w = block.attn.weights
                kv = n.index * w.W_V.shape[0] // w.W_O.shape[0]
                v = normed(block.ln1, read(f"{node}.v", n.layer)) @ cast(w.W_V[kv])
                v = v if w.b_V is None else v + cast(w.b_V[kv])
                z = block.attn.pattern[:, n.index] @ v
                done[node] = without_b(block.ln1_post, z @ cast(w.W_O[n.index]))
            else:
                x = normed(block.ln2, read(node, n.layer, block.resid_mid is not None))
                y = block.mlp.map.apply(x) + block.mlp.map.bias
                b = block.mlp.weights.b_out
                done[node] = without_b(block.ln2_post, y if b is None else y - cast(b))
        return done[node]

    return normed(capture.ln_final, read("logits", len(capture.blocks)))


@shape_conventions
def test_restriction_the_slow_way(case, gate):
    """Law 7, for some edges: also adjoint, constants, and what they do to a target."""
    lens = lens_of(case, gate=gate)
    op = lens.operator
    for seed, share in ((0, 0.7), (1, 0.4), (2, 0.9)):
        edges = some_edges(op.wiring, seed, share)
        restricted = op.restrict(edges)
        ours = restricted @ lens.embedding + restricted.bias
        assert_close(ours, slowly(lens, edges), ORACLE, f"seed {seed}")
        assert dot_test(restricted) <= ROUNDING
        constants = restricted.constants()
        if constants:
            assert_close(sum(constants.values()), restricted.bias, ROUNDING)
        u, effects = randn_like(lens.embedding), {}
        restricted.apply_t(u, effects)
        assert effects.keys() == constants.keys()
        for name, share_of in effects.items():
            expected = (u * constants[name]).sum()
            size = (u * constants[name]).abs().sum() + share_of.abs().sum()
            assert (share_of.sum() - expected).abs() <= ROUNDING * size, name


@shape_conventions
def test_all_edges_are_the_operator_and_two_are_the_direct_path(case, gate):
    lens = lens_of(case, gate=gate)
    op, capture = lens.operator, lens.capture
    x, u = randn_like(lens.embedding), randn_like(lens.embedding, 1)
    whole, own, theirs = op.restrict(op.wiring.edges()), {}, {}
    assert_close(whole @ x, op @ x, ROUNDING)
    assert_same(whole.bias, op.bias)
    assert_close(whole.apply_t(u, own), op.apply_t(u, theirs), ROUNDING)
    assert own.keys() == theirs.keys()
    direct = op.restrict(direct_edges(lens))
    assert direct.live == frozenset() and direct.reads == {LOGITS: (INPUT,)}
    past = x
    for step in op.steps:
        past = step.normed(past)
    assert torch.equal(direct @ x, op.map.maps[-1].apply(past))
    # What no node holds stays: from the run's own states, everything less what nodes write.
    fixed = op.bias * 0
    for step in op.steps:
        fixed = fixed + sum((c for b in step.branches for c in b.outside().values()), 0.0)
        fixed = step.normed(fixed) + sum(step.own.values())
    assert_same(direct.bias, op.map.maps[-1].apply(fixed) + op.map.maps[-1].bias)
    empty = op.restrict([])
    assert (empty @ x == 0).all() and torch.equal(empty.bias, direct.bias)
    assert len(capture.blocks) == op.wiring.n_layers


@every_case
def test_a_nodes_constants_stay_if_it_has_a_path_to_the_logits(case):
    lens = lens_of(case)
    op = lens.operator
    direct = op.restrict(direct_edges(lens))
    dangling = op.restrict([*direct_edges(lens), "input→L0H1.v"])
    assert torch.equal(dangling.bias, direct.bias) and dangling.live == frozenset()
    node, effects = Node("head", 0, 1), {}
    alone = op.restrict(["L0H1→logits"])  # reads nothing: its own constants are left
    alone.apply_t(torch.ones_like(lens.embedding), effects)
    assert (alone @ lens.embedding == 0).all() and alone.live == {node}
    attn = lens.capture.blocks[0].attn
    part = op.steps[0].branches[0].part(node)
    assert_same(alone.bias, direct.bias + op.map.maps[-1].apply(part.bias))
    assert ("L0.b_V" in effects) == (attn.weights.b_V is not None)


@shape_conventions
def test_a_subgraphs_logits_share_and_attribution(case, gate):
    lens = lens_of(case, gate=gate)
    edges = some_edges(lens.operator.wiring, 3, 0.6)
    sub = lens.circuit(edges)
    final = slowly(lens, edges)
    u = gradient_of(lens, 3, 4).target
    value = (final[:, -1] * u.covector).sum(-1) + u.constant
    assert_close(sub.final, final, ORACLE)
    assert_close(sub.logits, lens.readout(final), ORACLE)
    share, a = sub.share(3, 4), sub.attribute(3, 4)
    assert_close(torch.tensor(share.value, dtype=torch.float64), value, TWO_RUNS)
    assert share.target_value == tuple(u.value.tolist()) and share.name == u.name
    assert_close(torch.tensor(share.contributions).double(), a.values.abs().sum(1), 1e-6)
    assert a.sums_to_target and a.completeness_error <= ORACLE
    assert_close(a.target_value, value, TWO_RUNS)
    whole = lens.circuit(lens.operator.wiring.edges())
    assert_close(
        whole.logits, lens.readout(lens.operator @ lens.embedding + lens.operator.bias), ROUNDING
    )
    ours, theirs = whole.attribute(3, 4), lens.attribute(3, 4)
    full = dict(zip(ours.labels[0], ours.values[0], strict=True))
    assert full.keys() == set(theirs.labels[0])
    for label, v in zip(theirs.labels[0], theirs.values[0], strict=True):
        assert (full[label] - v).abs() <= ORACLE * theirs.values[0].abs().sum(), label
    if case.float32_norms is False and lens.capture.unembed.weights.soft_cap is None:
        assert whole.share(3, 4).share == pytest.approx((1.0, 1.0), rel=GRADIENT)


@every_case
def test_padded_batches(case):
    if case.float32_norms:
        return  # a float64 Hugging Face model makes NaN of left padding
    ids, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    with quiet(), torch.no_grad():
        _, batch = tensorlens_tl.capture(case.model(), ids, attention_mask=mask)
        _, alone = tensorlens_tl.capture(case.model(), ids[:1, 2:])
    edges = some_edges(batch.operator.wiring, 4, 0.6)
    ours, theirs = batch.circuit(edges), alone.circuit(edges)
    assert_close(ours.logits[:1, 2:], theirs.logits, TWO_RUNS)
    assert ours.share(3, 4).value[0] == pytest.approx(theirs.share(3, 4).value[0], rel=GRADIENT)
    assert ours.attribute(3, 4)[0].completeness_error <= ORACLE
    assert_close(ours.attribute(3, 4)[0].values, theirs.attribute(3, 4).values, GRADIENT)


@every_case
def test_edits_of_the_users_own_are_constants_that_all_read(case):
    model = case.model()
    edits = [
        (f"blocks.{layer}.{name}", lambda t, hook: t * 1.5 + 0.3)
        for layer, name in (
            (0, "hook_resid_pre"),
            (0, "attn.hook_z"),
            (1, "attn.hook_v"),
            (1, "hook_resid_post"),
        )
    ]
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=edits):
        _, lens = tensorlens_tl.capture(model, tokens())
    op, x, own, theirs = lens.operator, lens.embedding, {}, {}
    whole = op.restrict(op.wiring.edges())
    assert_close(whole @ x + whole.bias, op @ x + op.bias, ORACLE)
    u = randn_like(x)
    assert_close(whole.apply_t(u, own), op.apply_t(u, theirs), ROUNDING)
    assert own.keys() == theirs.keys() and any(name.endswith("[user]") for name in own)
    for name, share in own.items():
        assert_close(share.sum(), theirs[name].sum(), TWO_RUNS, name)
    some = op.restrict(some_edges(op.wiring, 5))
    assert_close(sum(some.constants().values()), some.bias, ROUNDING)
    assert lens.circuit(op.wiring.edges()).attribute(3, 4).completeness_error <= TWO_RUNS
    plain = lens.discover(3, 4, n_edges=10, qk=False)
    assert plain.is_connected and len(plain) <= 10


# --- Wiring --------------------------------------------------------------------------------------


def test_numbers_of_edges():
    assert len(Wiring(12, 12).edges()) == 32491 and len(Wiring(12, 12).edges(qk=False)) == 11611
    parallel = Wiring(2, 3, parallel=True)
    assert not parallel.has(Edge.parse("L0H1→L0MLP")) and Wiring(2, 3).has(Edge.parse("L0H1→L0MLP"))
    assert Node("mlp", 0) not in Wiring(2, 3, attn_only=True).writers()


@every_case
def test_edges_are_those_of_the_attribution(case):
    lens = lens_of(case)
    wiring = lens.operator.wiring
    assert wiring == ModelInfo.of_capture(lens.capture).wiring
    for qk in (False, True):
        scores = edge_scores(wiring, lens.attribute(3, 4, by="edge", qk=qk))
        assert tuple(scores) == wiring.edges(qk)
    a = lens.attribute(3, 4, by="edge", qk=True)
    expected: dict[Edge, float] = {}
    for i, source in enumerate(a.sources):
        if source.node.src.kind != "constant":
            src = INPUT if "embed" in source.node.src.kind else source.node.src
            key = Edge(src, source.node.dest)
            expected[key] = expected.get(key, 0.0) + float(a.values[:, i].mean())
    size = sum(map(abs, expected.values()))
    assert all(abs(scores[e] - v) <= ROUNDING * size for e, v in expected.items())


def test_names_of_other_tools():
    wiring = Wiring(2, 3)
    names = [eap_name(edge) for edge in wiring.edges()]
    assert [parse_eap(name) for name in names] == list(wiring.edges())
    assert {"input->a0.h2<q>", "m0->a1.h0<k>", "a1.h1->m1", "m1->logits"} <= set(names)
    for text in ("a0.h1", "a0.h1->m1->logits", "a0.h1<q>->m1", "b0->m1", ""):
        with pytest.raises(ValueError, match=r"is not the name of an edge. Use names such as"):
            parse_eap(text)


# --- Selection -----------------------------------------------------------------------------------


def random_scores(wiring, seed=0, qk=True):
    generator = random.Random(seed)
    return {edge: generator.gauss(0, 1) ** 3 for edge in wiring.edges(qk)}


def on_a_path(edges):
    """The edges on paths, every path written out."""
    by_src = {}
    for edge in edges:
        by_src.setdefault(edge.src, []).append(edge)
    found = set()

    def walk(node, path):
        if node == LOGITS:
            found.update(path)
        for edge in by_src.get(node, ()):
            walk(owner(edge.dest), [*path, edge])

    walk(INPUT, [])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_connected_edges_are_those_on_a_path(seed):
    wiring = Wiring(2, 2, parallel=bool(seed % 2))
    edges = some_edges(wiring, seed, 0.3, qk=True)
    assert connected(edges) == on_a_path(edges)


def grown(scores, wiring, n, method, least=-math.inf):
    """A circuit by definition: the best edge allowed, with what connects it, while it fits."""
    values, edges, nodes, over = ranked_by(scores, wiring, method), set(), {INPUT, LOGITS}, set()
    while len(edges) < n:
        may = [
            e
            for e in scores
            if e not in edges | over
            and values[e] >= least
            and (method != "greedy" or owner(e.dest) in nodes)
        ]
        if not may:
            break
        edge = max(may, key=lambda e: values[e])
        chain = {edge}
        while (low := min((e.src for e in chain), key=wiring.writers().index)) not in nodes:
            chain.add(max((e for e in scores if owner(e.dest) == low), key=lambda e: values[e]))
        order = [*wiring.writers(), LOGITS]
        while (top := max((owner(e.dest) for e in chain), key=order.index)) not in nodes:
            chain.add(max((e for e in scores if e.src == top), key=lambda e: values[e]))
        if len(edges) + len(chain) > n:
            over.add(edge)
        else:
            edges |= chain
            nodes |= {e.src for e in chain} | {owner(e.dest) for e in chain}
    return edges


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_a_selection_is_what_its_definition_says(selection, seed):
    wiring = Wiring(2, 2, parallel=seed == 1, attn_only=seed == 2)
    scores = random_scores(wiring, seed)
    for n in (1, 2, 3, 8, 15, len(scores)):
        kept = select(scores, wiring, n, selection=selection)
        assert set(kept) == grown(scores, wiring, n, selection) and len(kept) <= n
        assert connected(kept) == set(kept) and list(kept) == [e for e in scores if e in set(kept)]
    assert set(kept) == set(scores)
    values = ranked_by(scores, wiring, selection)
    bar = sorted(values.values())[len(values) // 2]
    kept = select(scores, wiring, threshold=bar, selection=selection)
    assert set(kept) == grown(scores, wiring, len(scores), selection, bar)
    assert connected(kept) == set(kept)
    if selection != "greedy":
        assert set(kept) >= {e for e, v in values.items() if v >= bar}


def test_influence_is_what_random_walks_down_from_the_logits_take():
    wiring = Wiring(2, 2)
    scores = random_scores(wiring, 1)
    found = influences(scores, wiring)

    def reach(node):  # the chance that a walk passes a node, by all ways to it
        if node == LOGITS:
            return 1.0
        return math.fsum(chance(e) for e in scores if e.src == node)

    def chance(edge):
        own = [abs(v) for e, v in scores.items() if owner(e.dest) == owner(edge.dest)]
        return reach(owner(edge.dest)) * abs(scores[edge]) / math.fsum(own)

    for edge in scores:
        assert found[edge] == pytest.approx(chance(edge), rel=ROUNDING)
    assert math.fsum(v for e, v in found.items() if e.src == INPUT) == pytest.approx(1.0)
    assert set(influences(dict.fromkeys(scores, 0.0), wiring).values()) == {0.0}


# --- Discovery in one run ------------------------------------------------------------------------


def corrupted_of(case):
    ids = tokens()
    ids[:, 2:4] = tokens(seed=1)[:, 2:4]
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(case.model(), ids)[1]


@every_case
def test_discovered_circuits(case):
    lens, corrupted = lens_of(case), corrupted_of(case)
    total = len(lens.operator.wiring.edges())
    for selection in SELECTIONS:
        circuit = lens.discover(3, 4, n_edges=15, selection=selection)
        assert circuit.is_connected and len(circuit) <= 15 and circuit.selection == selection
        assert circuit.n_prompts == 2 and not circuit.corrupted and len(circuit.scores) == total
        assert set(circuit.edges) == set(
            select(circuit.scores, lens.operator.wiring, 15, selection=selection)
        )
        assert Circuit.from_json(circuit.to_json()) == circuit
    assert len(lens.discover(3, n_edges=total)) == total
    plain = lens.discover(3, 4, threshold=0.0, selection="absolute", qk=False)
    assert all(edge.conserved for edge in plain.edges)
    a = lens.attribute(3, 4, by="edge", qk=True, baseline=corrupted, at="corrupted")
    against = lens.discover(3, 4, n_edges=15, corrupted=corrupted, at="corrupted")
    assert against.corrupted and "against corrupted ones" in repr(against)
    expected = edge_scores(lens.operator.wiring, a)
    assert against.scores == expected
    sub = lens.circuit(against)
    assert sub.circuit is against and sub.operator.edges == frozenset(against.edges)


@pytest.mark.wrong_types
def test_numbers_of_edges_by_numpy():
    lens = lens_of(SHAPES[0])[0]
    assert lens.discover(3, n_edges=np.int64(9)) == lens.discover(3, n_edges=9)


def test_the_circuit_of_a_trained_model():
    model = demo.load_model()
    text = "When Mary and John went to the store, {} gave a drink to"
    _, clean = tensorlens_tl.capture(model, text.format("John"))
    _, other = tensorlens_tl.capture(model, text.format("Mary"))
    circuit = clean.discover("Mary", versus="John", n_edges=40, corrupted=other)
    assert circuit.is_connected
    share = clean.circuit(circuit).share("Mary", versus="John")
    assert share.share[0] > 0.5  # measured .69
    assert "'Mary' − 'John'" in repr(circuit) and "'Mary' − 'John': " in repr(share)
    assert len(circuit) == 40
    assert "L0H2" in circuit and "input→L0H2.v" in circuit and "L2H0→logits" not in circuit
    small = circuit.resized(n_edges=10)
    assert set(small.edges) <= set(circuit.edges) and len(small) <= 10
    assert circuit.resized(threshold=1.0, selection="signed").selection == "signed"


# At the clean run the induction heads' patterns are nearly one-hot: little is first-order.
@pytest.mark.parametrize(
    ("at", "selection"),
    [
        ("secant", "greedy"),
        ("corrupted", "influence"),
        ("clean", "influence"),
    ],
)
def test_an_induction_circuit_is_found_by_its_keys(at, selection):
    """The previous-token head L0H0 is read by the induction heads' keys: T alone cannot see it."""
    model, clean, corrupted, answers = demo.load_model(), [], [], []
    for drawn in demo.unseen("induction", 20, seed=1):
        words = list(drawn.words[: len(drawn.corrupted)])
        first = words.index(words[-1])  # whose next word is to be repeated
        other = [*words[:first], drawn.foil, *words[first + 1 :]]
        clean.append(demo.text(words))
        corrupted.append(demo.text(other))
        answers.append(words[first + 1])
    run = partial(
        tensorlens_tl.discover,
        model,
        clean,
        corrupted,
        answers,
        at=at,
        selection=selection,
        n_edges=479 // 20,
    )
    found = run()
    assert len(found) <= 0.05 * 479
    heads = {
        e.dest.index for e in found.edges if e.src == Node("head", 0, 0) and e.dest.name == "k"
    }
    assert heads and heads <= {0, 1, 2, 3} and "L1H0" in found and "L1H1" in found
    if at == "clean":
        return  # as blind as at the corrupted run
    blind = run(qk=False)
    largest = max(abs(v) for v in blind.scores.values())
    seen = [v for e, v in blind.scores.items() if e.src == Node("head", 0, 0) and e.dest.layer == 1]
    assert max(map(abs, seen)) < 0.05 * largest


# --- Forms ---------------------------------------------------------------------------------------


def example():
    wiring = Wiring(2, 2)
    scores = random_scores(wiring, 7)
    model = ModelInfo("tiny", wiring, 8, "0123")
    return Circuit(select(scores, wiring, 12), scores, model, 'a "target"', "greedy", 5, True)


def test_the_edge_list_of_eap_ig_and_mib():
    circuit = example()
    data = json.loads(circuit.to_json())
    assert data["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    assert next(iter(data["nodes"])) == "input" and list(data["nodes"])[-1] == "logits"
    assert len(data["nodes"]) == 2 + 2 * 3 and len(data["edges"]) == len(
        circuit.model.wiring.edges()
    )
    kept = {name for name, row in data["edges"].items() if row["in_graph"]}
    assert kept == {eap_name(edge) for edge in circuit.edges}
    alive = {name for name, row in data["nodes"].items() if row["in_graph"]}
    assert alive == {eap_name(node) for node in circuit.nodes}
    assert data["edges"]["input->a0.h1<q>"]["score"] == circuit.scores[Edge.parse("input→L0H1.q")]
    # As they write it: no entry of ours.
    del data["tensorlens_tl"]
    theirs = Circuit.from_json(json.dumps(data))
    assert theirs.edges == circuit.edges and theirs.scores == circuit.scores
    assert theirs.model.fingerprint == "" and theirs.model.wiring == circuit.model.wiring
    by_name = Circuit(circuit.edges, {}, circuit.model)
    assert Circuit.from_json(by_name.to_json()) == by_name


def test_graphs():
    networkx = pytest.importorskip("networkx", reason="an extra")
    circuit = example()
    graph = circuit.to_networkx()
    assert graph.number_of_edges() == len(circuit) and set(graph) == set(map(str, circuit.nodes))
    assert networkx.is_directed_acyclic_graph(graph)
    for edge in circuit.edges:
        own = graph[str(edge.src)][str(owner(edge.dest))][edge.dest.name or edge.dest.kind]
        assert own["score"] == circuit.scores[edge]
    again = networkx.parse_graphml(circuit.to_graphml(), force_multigraph=True)
    assert set(again) == set(graph) and again.number_of_edges() == len(circuit)
    dot = circuit.to_dot()
    assert (
        dot.count(" -> ") == len(circuit)
        and dot.startswith("digraph circuit {")
        and dot.endswith("}")
    )


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.wrong_types
def test_refused_nodes_and_edges():
    lens = lens_of(SHAPES[0])
    for wrong, match in (
        (
            ["L1H0→L0H1.v"],
            r"edge L1H0→L0H1.v does not exist, because L0H1.v reads before L1H0 writes",
        ),
        (["L0MLP→L0H1.q"], r"L0H1.q reads before L0MLP writes"),
        (["L0H9→logits"], r"nothing called L0H9 writes in this model. Use one of input, .*L1MLP"),
        (["L0H1→L7MLP"], r"nothing called L7MLP reads in this model. Use one of L0H0.q"),
        (["L0.b_O→L1MLP"], r"nothing called L0.b_O writes in this model"),
        (["L7H1"], r"no node L7H1. Use one of input"),
        (["L0H1", "L0H1→logits"], "holds both nodes and edges"),
        (["embed→L0MLP"], "Of the sources, embed was given for L0MLP, .*: embed, pos_embed"),
        (["pos_embed→L0MLP"], "Of the sources, pos_embed was given for L0MLP"),
        ("L0H1", "'L0H1' is not a list of nodes or edges. Put it in a list"),
        (5, "5 is not a list of nodes or edges. Put it in a list"),
        ([3], "3 is neither a node nor an edge. Pass names"),
        (["L0H1→L1H2"], "is not an edge. Name a writer"),
    ):
        with pytest.raises(ValueError, match=match):
            lens.circuit(wrong)
    assert len(lens.circuit(["L0H1"]).circuit) == 5  # q, k, v, logits, and past it
    assert as_edges(lens.operator.wiring, []) == ()


@pytest.mark.wrong_types
def test_refused_sizes_and_runs():
    case = SHAPES[0]
    lens = lens_of(case)
    total = len(lens.operator.wiring.edges())
    for kwargs, match in (
        ({"n_edges": total + 1}, rf"n_edges={total + 1} is not an integer from 1 to {total}"),
        ({"n_edges": 0}, "n_edges=0 is not an integer from 1"),
        ({"n_edges": 2.5}, "n_edges=2.5 is not an integer from 1"),
        ({"n_edges": True}, "n_edges=True is not an integer from 1"),
        ({}, "gives neither n_edges= nor threshold="),
        ({"n_edges": 3, "threshold": 0.1}, "gives both n_edges= and threshold="),
        ({"threshold": math.nan}, "threshold=nan is not a finite number"),
        (
            {"n_edges": 3, "selection": "best"},
            "selection='best' does not exist. Use one of greedy, absolute",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            lens.discover(3, **kwargs)
    with quiet(), torch.no_grad():
        _, shorter = tensorlens_tl.capture(case.model(), tokens()[:, :5])
    with pytest.raises(ValueError, match=r"prompt 0 has 7, its corrupted run 5. Reword the corr"):
        lens.discover(3, n_edges=5, corrupted=shorter)
    scores = dict.fromkeys(lens.operator.wiring.edges(), math.nan)
    with pytest.raises(ValueError, match=r"The score of input→L0H0\.q is nan"):
        select(scores, lens.operator.wiring, 5)


def test_circuits_of_other_models():
    lens = lens_of(SHAPES[0])
    circuit = lens.discover(3, n_edges=8)
    other = next(c for c in SHAPES if lens_of(c).operator.wiring != circuit.model.wiring)
    with pytest.raises(
        ValueError,
        match=r"The circuit is of .* not of this model .*Discover a circuit of this model",
    ):
        lens_of(other).circuit(circuit)
    with quiet():
        model = SHAPES[0].build(torch.float64)
    with torch.no_grad():
        W_O = tensorlens_tl.hosts.adapt(model).weights.blocks[1].attn.W_O
        W_O[0, 0, 0] += 1.0
        _, edited = tensorlens_tl.capture(model, tokens())
    with pytest.raises(
        ValueError, match=r"has other weights. Load and process the model as it was"
    ):
        edited.circuit(circuit)
    for dtype in (torch.float32, torch.bfloat16):  # the same model all the same
        with quiet(), torch.no_grad():
            _, same = tensorlens_tl.capture(SHAPES[0].build(torch.float64).to(dtype), tokens())
        assert len(same.circuit(circuit).circuit) == len(circuit)
    with pytest.raises(
        ValueError,
        match=r"has no scores: its edges were named. Use a circuit that discover returned",
    ):
        lens.circuit(["L0H1"]).circuit.resized(n_edges=3)
    backwards = Edge(Node("head", 1, 0), Node("head", 0, 1, "v"))
    with pytest.raises(ValueError, match="Use an edge along the order of layers"):
        replace(circuit, edges=(backwards,))


def test_damaged_files():
    good = json.loads(example().to_json())

    def changed(**parts):
        return json.dumps({**good, **parts})

    row = {"score": 1.0, "in_graph": True}
    for text in (
        "",
        "[]",
        "{}",
        "nan",
        "[" * 10**5,
        changed(cfg=None),
        changed(edges=[]),
        changed(cfg={**good["cfg"], "n_layers": -1}),
        changed(cfg={**good["cfg"], "n_heads": 2.0}),
        changed(edges={"a1.h0->a0.h1<q>": row}),
        changed(edges={"a0.h0->a1.h9<q>": row}),
        changed(edges={"m0->logits": {"score": math.nan, "in_graph": True}}),
        changed(edges={"m0->logits": {"score": 1.0}}),
        changed(edges={"m0->logits": {"score": 1.0, "in_graph": "yes"}}),
        changed(edges={"m0->logits": {"score": "one", "in_graph": True}}),
        changed(tensorlens_tl={**good["tensorlens_tl"], "format": "tensorlens_tl circuit 99"}),
        changed(tensorlens_tl={**good["tensorlens_tl"], "convention": {"gate": "no"}}),
        changed(tensorlens_tl={**good["tensorlens_tl"], "n_prompts": "many"}),
    ):
        with pytest.raises(
            ValueError, match="not a circuit of to_json, nor an edge list of EAP-IG"
        ):
            Circuit.from_json(text)
