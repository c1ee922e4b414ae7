"""Every split of a target: laws 2 to 6, totals by injection, slow edges, one sweep for all."""

from dataclasses import replace

import pytest
import torch
from comparisons import assert_close
from models import (
    HOOKED,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    HookedTransformer,
    build_hooked,
    lens_of,
    quiet,
    shape_conventions,
    tokens,
)
from oracles import FrozenModel, gradient_of, written

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError
from tensorlens_tl.attribution import edges
from tensorlens_tl.attribution.edges import Writers
from tensorlens_tl.attribution.splits import BY, TOTALS
from tensorlens_tl.graph.nodes import Edge, Node
from tensorlens_tl.lens.tensor_lens import TensorLens
from tensorlens_tl.operator.frozen_transformer import FrozenTransformer

pytestmark = pytest.mark.algebra

DIRECT = [by for by in BY if by != "edge"]
every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)


def value(lens, target=3, versus=4, pos=-1):
    """The target by the operator: T·X + bias, read out with the run's own soft-cap ratios."""
    y = (lens.operator @ lens.embedding + lens.operator.bias)[:, pos]
    sweep = gradient_of(lens, target, versus, pos)
    return (y * sweep.target.covector).sum(-1) + sweep.target.constant


def rows(a, kind=None):
    """Values by node, summed over positions."""
    a = a.sum("pos")
    return {
        s.node: a.values[:, i]
        for i, s in enumerate(a.sources)
        if kind is None or s.node.kind == kind
    }


def assert_same(ours, theirs, scale, what, tol=ORACLE):
    assert ((ours - theirs).abs() <= tol * scale).all(), f"{what}: {ours} ≠ {theirs}"


def between_states(case):
    """Tolerance of sums over several states of the run: the host may have normed in float32."""
    return case.within("oracle")


@shape_conventions
def test_every_direct_split_sums_to_the_target(case, gate):
    lens = lens_of(case, gate=gate)
    for target, versus, pos in ((3, 4, -1), (None, None, 2)):
        total = value(lens, target, versus, pos)
        for by in DIRECT:
            a = lens.attribute(target, versus, pos, by)
            assert a.sums_to_target and a.effect == "direct"
            assert_same(a.values.sum(1), total, a.values.abs().sum(1), by, between_states(case))
            assert a.completeness_error <= 10 * case.tol(), by
            for prompt in (a[0], a[1]):
                assert prompt.completeness_error <= 10 * case.tol(), by


@shape_conventions
def test_finer_splits_sum_to_the_components(case, gate):
    """Law 4: heads by position read, neurons, layers."""
    lens = lens_of(case, gate=gate)
    component = rows(lens.attribute(3, 4, by="component"))
    scale = sum(v.abs() for v in component.values())
    finer = rows(lens.attribute(3, 4, by="head"))
    assert finer.keys() == component.keys()
    for node, v in finer.items():
        assert_same(v, component[node], scale, f"head {node}")
    neurons = rows(lens.attribute(3, 4, by="neuron"))
    layers = rows(lens.attribute(3, 4, by="layer"), "layer")
    for layer in range(2):
        own = sum(v for n, v in component.items() if n.layer == layer)
        assert_same(layers[Node("layer", layer)], own, scale, f"L{layer}")
        mlp = component.get(Node("mlp", layer), torch.zeros(2))
        own = [v for n, v in neurons.items() if n.kind == "neuron" and n.layer == layer]
        assert_same(sum(own, torch.zeros(2)), mlp, scale, f"L{layer} neurons")
        block = lens.capture.blocks[layer]
        assert len(own) == (0 if block.mlp is None else block.mlp.weights.W_out.shape[0])
    others = {n: v for n, v in component.items() if n.kind != "mlp"}
    assert all(torch.equal(neurons[n], v) for n, v in others.items())


@every_case
def test_constants_are_those_of_the_token_split(case):
    lens = lens_of(case)
    token, constant = (rows(lens.attribute(3, 4, by=by)) for by in ("token", "constant"))
    assert token.keys() == constant.keys()
    for node, v in token.items():
        assert_close(constant[node], v, ROUNDING, str(node))


@shape_conventions
def test_what_branches_write(case, gate):
    """Law 4 at every position: nodes + constants outside them = what the branch adds."""
    for step in lens_of(case, gate=gate).operator.steps:
        for branch in step.branches:
            whole = branch.map.apply(step.state) + branch.map.bias
            outside = branch.outside()
            assert tuple(outside) == branch.outside_names()
            parts = branch.outputs(step.state).sum(1) + sum(outside.values())
            assert_close(parts, whole, between_states(case))


# --- Total effects -------------------------------------------------------------------------------


@every_case
def test_totals_are_what_injecting_a_writers_output_into_the_real_model_changes(case):
    """The real model, frozen by hooks: without a node's output, later sites change as predicted."""
    lens, frozen = lens_of(case), FrozenModel(case.model(), tokens())
    op, tol = lens.operator, case.within("oracle")
    u = gradient_of(lens, 3, 4).target.covector
    totals = rows(lens.attribute(3, 4, by="component", effect="total"))
    with torch.no_grad():
        y, base = frozen(lens.embedding)
        for i, step in enumerate(op.steps):
            site = op.sites[i + 1]
            for branch in step.branches:
                for node, delta in zip(
                    branch.body.nodes(), branch.outputs(step.state).unbind(1), strict=True
                ):
                    delta = step.normed(delta)
                    y2, states = frozen(lens.embedding, {site: -delta})
                    change = ((y2 - y)[:, -1] * u).sum(-1)
                    scale = (y[:, -1] * u).abs().sum(-1)
                    assert ((change + totals[node]).abs() <= tol * scale).all(), str(node)
                    for stop in (name for name in op.sites[i + 1 :] if name in states):
                        moved = op.between(site, stop) @ -delta
                        assert_close(states[stop] - base[stop], moved, 10 * tol, f"{node} → {stop}")


@shape_conventions
def test_totals_agree_with_each_other(case, gate):
    lens = lens_of(case, gate=gate)
    if lens.capture.blocks[0].mlp is None:
        for by in ("mlp", "neuron"):
            with pytest.raises(ValueError, match=f"by='{by}' needs MLPs, and this model has none"):
                lens.attribute(by=by, effect="total")
        return
    found = {by: lens.attribute(3, 4, by=by, effect="total") for by in TOTALS}
    for by, a in found.items():
        assert not a.sums_to_target and a.completeness_error is None and a.effect == "total", by
        assert "(total effect)" in repr(a[0])
    component = rows(found["component"])
    scale = sum(v.abs() for v in component.values())
    for by in ("head", "mlp"):
        own = rows(found[by])
        assert own.keys() == {n for n in component if n.kind == by}
        for node, v in own.items():
            assert_same(v, component[node], scale, str(node))
    neurons = rows(found["neuron"])
    for node in rows(found["mlp"]):
        own = sum(v for n, v in neurons.items() if n.layer == node.layer)
        assert_same(own, component[node], scale, f"neurons of {node}")
    # Embeddings along all paths, and constants where they are added: as by token.
    token = rows(lens.attribute(3, 4))
    for node, v in component.items():
        if node in token:
            assert_same(v, token[node], scale, str(node))


@every_case
def test_a_layers_total_is_the_change_over_it(case):
    lens = lens_of(case)
    op, blocks = lens.operator, lens.capture.blocks
    states = [*(block.resid_pre for block in blocks), lens.capture.resid_final]
    u = torch.zeros_like(lens.embedding)
    u[:, -1] = gradient_of(lens, 3, 4).target.covector
    layers = lens.attribute(3, 4, by="layer", effect="total")
    for layer in range(2):
        c = op.between(f"blocks.{layer}.hook_resid_post", op.sites[-1]).T @ u  # no sweep of ours
        expected = ((states[layer + 1] - states[layer]) * c).sum(-1)
        ours = layers.values[:, layer * 7 : layer * 7 + 7]
        assert_close(ours, expected, 10 * case.tol(), f"L{layer}")


# --- Edges ---------------------------------------------------------------------------------------


@shape_conventions
def test_edges_into_a_reader_sum_to_what_it_makes_of_the_target(case, gate):
    """Law 5: for every head's values, every MLP, and the logits."""
    lens = lens_of(case, gate=gate)
    edges = lens.attribute(3, 4, by="edge")
    assert not edges.sums_to_target and edges.completeness_error is None
    totals = rows(lens.attribute(3, 4, by="component", effect="total"))
    readers = edges.sum("src")
    read = {s.node: readers.values[:, i] for i, s in enumerate(readers.sources)}
    nodes = {n for n in totals if n.kind in ("head", "mlp")}
    assert read.keys() == {replace(n, name="v" if n.kind == "head" else "") for n in nodes} | {
        Node("logits")
    }
    size = edges.values.abs().sum(1)
    for node in nodes:
        reader = replace(node, name="v" if node.kind == "head" else "")
        assert_same(read[reader], totals[node], size, str(reader), between_states(case))
    assert_same(read[Node("logits")], value(lens), size, "logits", between_states(case))
    top = edges.select(dest="logits")
    assert top.sums_to_target and top.completeness_error <= 10 * case.tol()
    direct = rows(lens.attribute(3, 4, by="component"))
    for i, source in enumerate(top.sources):
        name, v = str(source.node), direct[source.node.src]
        assert_same(top.values[:, i], v, size, name, between_states(case))


@shape_conventions
def test_edges_the_slow_way(case, gate):
    """Every edge between nodes as ⟨output, part's own adjoint⟩, part by part, pair by pair."""
    lens = lens_of(case, gate=gate)
    op, edges = lens.operator, lens.attribute(3, 4, by="edge")
    found = {s.node: edges.values[:, i] for i, s in enumerate(edges.sources)}
    covectors = gradient_of(lens, 3, 4).trace.covectors
    outputs = {Node.parse(name): e for name, e in lens.capture.embeddings.items()}
    slow = {}
    for step, c in zip(op.steps, covectors[1:], strict=False):
        written, c = {}, c if step.norm is None else step.norm.apply_t(c)
        for branch in step.branches:
            y = c if branch.post is None else branch.post.apply_t(c)
            for node, reader in zip(branch.body.nodes(), branch.body.reads(), strict=True):
                part = branch.body.part(node)
                x = part.apply_t(y)
                x = x if branch.pre is None else branch.pre.apply_t(x)
                for writer, output in outputs.items():
                    slow[Edge(writer, reader)] = (output * x).sum((-2, -1))
                out = part.apply(branch.read(step.state)) + part.bias
                written[node] = out if branch.post is None else branch.post.apply(out)
        outputs = {node: step.normed(output) for node, output in (outputs | written).items()}
    size = edges.values.abs().sum(1)
    for edge, score in slow.items():
        assert_same(found[edge], score, size, str(edge), between_states(case))
    between = [e for e in found if e.src in outputs and e.dest.kind != "logits"]
    assert set(between) == set(slow)


@every_case
def test_edge_names_and_selection(case):
    lens = lens_of(case)
    edges = lens.attribute(3, by="edge")
    names = [str(s.node) for s in edges.sources]
    assert len(set(names)) == len(names) and "L0H3→L1H1.v" in names and "embed→logits" in names
    assert all(Edge.parse(name) == s.node for name, s in zip(names, edges.sources, strict=True))
    both = edges.select("L0H3", "L1H1.v")
    assert both.labels[0] == ("L0H3→L1H1.v",) and not both.sums_to_target
    with pytest.raises(ValueError, match=r"No edge has dest L9MLP. Use one of L0H0\.v, .*logits"):
        edges.select(dest="L9MLP")
    with pytest.raises(ValueError, match=r"No edge has src L9H0. Use one of embed"):
        edges.select("L9H0")
    with pytest.raises(ValueError, match=r"src= and dest= need a split by edge, but this one is b"):
        lens.attribute(3).select("L0H3")


# --- Orders --------------------------------------------------------------------------------------


@shape_conventions
def test_orders_are_the_powers_of_the_branches(case, gate):
    """Law 6, apart from the sum: with every node scaled by t, the target is Σ order_n tⁿ."""
    lens = lens_of(case, gate=gate)
    op, capture = lens.operator, lens.capture
    a = lens.attribute(3, 4, by="order")
    assert [str(s.node) for s in a.sources] == [f"order {n}" for n in range(len(op.steps) + 1)]
    sweep = gradient_of(lens, 3, 4)
    for t in (0.0, 0.5, -1.0, 2.0):
        x = sum(capture.embeddings.values())
        for step in op.steps:
            added = 0
            for branch in step.branches:
                outside = sum(branch.outside().values())
                added = added + t * (branch.map.apply(x) + branch.map.bias - outside) + outside
            x = step.normed(x + added) + sum(step.own.values())
        y = op.map.maps[-1].apply(x) + op.map.maps[-1].bias
        expected = (y[:, -1] * sweep.target.covector).sum(-1) + sweep.target.constant
        powers = torch.tensor([t**n for n in range(len(a.sources))], dtype=torch.float64)
        assert_same(a.values @ powers, expected, (a.values.abs() @ powers.abs()), f"t = {t}")


# --- One sweep -----------------------------------------------------------------------------------


def test_several_splits_of_one_target_sweep_once(monkeypatch):
    monkeypatch.setattr("models._LENSES", {})  # none that was swept before
    lens = lens_of(SHAPES[0])
    calls, model = [], SHAPES[0].model()
    monkeypatch.setattr(type(model), "forward", lambda *_: pytest.fail("the model ran again"))
    pull = FrozenTransformer.pull
    monkeypatch.setattr(FrozenTransformer, "pull", lambda *args: calls.append(args) or pull(*args))
    for by in BY:
        lens.attribute(3, 4, by=by)
    for by in TOTALS:
        lens.attribute(3, 4, by=by, effect="total")
    lens.loadings(2, 3, 4)
    lens.attribute(3, 4, baseline="zero")
    assert len(calls) == 1
    lens.attribute(3, 5)
    lens.attribute(3, 5, pos=-2)
    assert len(calls) == 3
    lens.attribute(3, 5, by="edge")
    assert len(calls) == 3
    lens.attribute(5, 6, by="component")  # direct effects need no sweep
    assert len(calls) == 3


@pytest.mark.parametrize("by", DIRECT)
def test_no_split_has_a_remainder(by):
    """With patterns replaced by zeros every sum breaks: nothing is "target − the rest"."""
    for case in SHAPES:
        lens = lens_of(case)
        blocks = tuple(
            replace(
                b,
                attn=replace(
                    b.attn, mix=replace(b.attn.mix, pattern=torch.zeros_like(b.attn.pattern))
                ),
            )
            for b in lens.capture.blocks
        )
        broken = TensorLens(replace(lens.capture, blocks=blocks))
        with pytest.raises(
            CaptureMismatchError, match=r"The step from blocks\.0\.hook_resid_pre no"
        ):
            broken.attribute(3, by=by)
    if by == "component":
        edges = broken.attribute(3, by="edge").select(dest="logits")
        assert edges.completeness_error > 1e-3


# --- Bad input -----------------------------------------------------------------------------------


def test_refusals():
    lens = lens_of(SHAPES[0])
    with pytest.raises(ValueError, match=r"by='heads' does not exist. Use one of token, .*order"):
        lens.attribute(by="heads")
    with pytest.raises(ValueError, match="effect='indirect' does not exist"):
        lens.attribute(effect="indirect")
    with pytest.raises(ValueError, match=r"'mlp' has no direct split.*by='component' and .select"):
        lens.attribute(by="mlp")
    for by in ("token", "constant", "dimension", "edge", "order"):
        with pytest.raises(
            ValueError, match=rf"effect='total' is not available for by='{by}'.*Drop effect"
        ):
            lens.attribute(by=by, effect="total")
    with pytest.raises(ValueError, match="There is no axis 'time'"):
        lens.attribute().sum("time")


@every_case
@pytest.mark.parametrize("few_readers", [1, 5, 10**6])
def test_edges_do_not_depend_on_how_positions_and_readers_are_cut(case, few_readers, monkeypatch):
    lens = lens_of(case)
    whole = lens.attribute(3, 4, by="edge", qk=True).values
    assert lens.capture.frame.n_pos == 7
    one = len(Writers.of(lens.operator, lens.capture, torch.tensor([6, 6])).moving()[1])
    one *= 2 * lens.embedding.shape[-1] * whole.element_size()  # bytes of one position
    monkeypatch.setattr(edges, "FEW_READERS", few_readers)
    for n_pos in (0, 1, 2, 3, 7):  # seven spans, and with a short last one
        monkeypatch.setattr(edges, "SPAN_BYTES", n_pos * one)
        cut = lens.attribute(3, 4, by="edge", qk=True).values
        assert_close(cut, whole, ROUNDING, f"{n_pos} positions")


@every_case
def test_factored_vectors_are_what_a_branch_writes_and_reads(case):
    """At a span, in total, with and without a place to write to, against the part's own map."""
    lens = lens_of(case)
    sweep = gradient_of(lens, 3, 4)
    for step, pulls in zip(lens.operator.steps, sweep.trace.pulls, strict=True):
        for branch, pull in zip(step.branches, pulls, strict=True):
            writes, reads = branch.writes(step.state), branch.readers(pull)[0]
            expected = torch.stack(
                [
                    branch.part(n).apply(step.state) + branch.part(n).bias
                    for n in branch.body.nodes()
                ]
            )
            if not branch.body.edits:
                assert_close(writes.wide(), expected, 10 * case.tol(), str(branch.body.nodes()[0]))
            assert_close(reads.wide().sum(0), pull.covector, ORACLE)
            for found in (writes, reads):
                wide = found.wide()
                assert_close(found.total(), wide.sum(2), ROUNDING)
                out = torch.full_like(wide[:, :, 2:5].contiguous(), torch.nan)
                assert_close(found.wide(slice(2, 5), out), wide[:, :, 2:5], ROUNDING)
                assert_close(out, wide[:, :, 2:5], ROUNDING)


@every_case
@pytest.mark.parametrize("finer", [False, True], ids=["as the run", "finer than the run"])
def test_what_edges_take_for_an_mlps_output_is_its_own_map(case, finer):
    """Read off the residual where the run is as fine as the operator, W_out's product elsewhere."""
    model_dtype = torch.float32 if finer else torch.float64
    lens = lens_of(case, model_dtype, dtype=torch.float64)
    op, last = lens.operator, torch.tensor([6, 6])
    writers = Writers.of(op, lens.capture, last)
    row, outputs = {node: i for i, node in enumerate(writers.nodes)}, written(writers)
    below = [step for step in op.steps if step.layer < op.steps[-1].layer]
    assert below
    for step in below:
        for branch in step.branches:
            for i, node in enumerate(branch.body.nodes()):
                mine, own = outputs[:, row[node]], branch.outputs(step.state)[:, i]
                assert_close(mine, own, ROUNDING if finer else case.tol(), str(node))


@pytest.mark.offered("neox" in HOOKED and HookedTransformer is not None)
def test_a_parallel_block_of_as_many_heads_as_branches():
    """Two heads beside an MLP: what the residual gained is nobody's alone."""
    with quiet(), torch.no_grad():
        model = build_hooked(HOOKED["neox"] | {"n_heads": 2}, torch.float64)
        lens = tensorlens_tl.capture(model, tokens())[1]
    step, writers = (
        lens.operator.steps[0],
        Writers.of(lens.operator, lens.capture, torch.tensor([6, 6])),
    )
    assert len(step.branches) == len(step.branches[0].body.nodes()) == 2
    own = torch.cat([branch.outputs(step.state) for branch in step.branches], 1)
    nodes = [node for branch in step.branches for node in branch.body.nodes()]
    mine = written(writers)[:, [writers.nodes.index(node) for node in nodes]]
    assert_close(mine, own, ROUNDING)
