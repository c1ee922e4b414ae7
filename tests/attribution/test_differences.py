"""Differences of two runs, baselines, many targets, head loadings."""

import pytest
import torch
from comparisons import assert_close
from models import (
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    TWO_RUNS,
    lens_of,
    quiet,
    shape_conventions,
    tokens,
)
from oracles import gradient_of

import tensorlens_tl
from tensorlens_tl import Edge, Node
from tensorlens_tl.attribution import GradientCache, TargetGradient, resolve
from tensorlens_tl.operator.frozen_transformer import FrozenTransformer

pytestmark = pytest.mark.algebra

every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)
FIRST = SHAPES[0]


def corrupted_of(case, seed=1, **kwargs):
    ids = tokens()
    ids[:, 2:4] = tokens(seed=seed)[:, 2:4]
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(case.model(), ids, **kwargs)[1]


def by_node(a):
    return {(s.node, s.pos): a.values[:, i] for i, s in enumerate(a.sources)}


@shape_conventions
def test_a_difference_sums_to_the_difference_of_the_models_own_logits(case, gate):
    clean, corrupted = lens_of(case, gate=gate), corrupted_of(case, gate=gate)
    for by in ("token", "component"):
        for at in ("clean", "corrupted"):
            for target, versus, pos in ((3, 4, -1), (None, None, 4)):
                a = clean.attribute(target, versus, pos, by, baseline=corrupted, at=at)
                assert a.completeness_error <= 10 * case.tol()
                ids = clean.logits[:, pos].argmax(-1) if target is None else torch.tensor([3, 3])
                gap = clean.logits[:, pos] - corrupted.logits[:, pos]
                own = gap[torch.arange(2), ids] - (gap[:, 4] if versus else 0)
                assert_close(a.target_value, own, TWO_RUNS, f"{by} {at}")
                name = "operator change" if by == "token" else "readout change"
                assert name in a.labels[0]


@every_case
def test_the_tokens_part_by_the_slow_way(case):
    """u T (x_c − x_k) of either operator; the change is what two operators make of one prompt."""
    clean, corrupted = lens_of(case), corrupted_of(case)
    u = {
        "clean": gradient_of(clean, 3, 4).target,
        "corrupted": gradient_of(corrupted, 3, 4).target,
    }
    lenses = {"clean": clean, "corrupted": corrupted}

    def value(name, x):
        y = lenses[name].operator @ x + lenses[name].operator.bias
        return (y[:, -1] * u[name].covector).sum(-1) + u[name].constant

    for at, other in (("clean", corrupted), ("corrupted", clean)):
        rows = by_node(clean.attribute(3, 4, baseline=corrupted, at=at))
        step = clean.embedding - corrupted.embedding
        moved = ((lenses[at].operator @ step)[:, -1] * u[at].covector).sum(-1)
        scale = sum(v.abs() for v in rows.values())
        ours = sum(v for (node, _), v in rows.items() if node.kind != "change")
        assert ((ours - moved).abs() <= ORACLE * scale).all()
        change = value("clean", other.embedding) - value("corrupted", other.embedding)
        assert (
            (rows[Node("change", name="operator change"), None] - change).abs() <= ORACLE * scale
        ).all()
        same = [p for p in range(7) if p not in (2, 3)]
        for p in same:  # equal tokens contribute nothing
            assert rows[Node("embed"), p].abs().max() <= ROUNDING


@every_case
def test_components_are_differences_of_what_is_written(case):
    clean, corrupted = lens_of(case), corrupted_of(case)
    norms = [clean.capture.ln_final, *(step.norm for step in clean.operator.steps)]
    if not any(norms) and clean.capture.unembed.weights.soft_cap is None:
        a, k = (by_node(lens.attribute(3, 4, by="component")) for lens in (clean, corrupted))
        ours = by_node(clean.attribute(3, 4, by="component", baseline=corrupted))
        assert ours.pop((Node("change", name="readout change"), None)).abs().max() <= ROUNDING
        scale = sum(v.abs() for v in a.values()) + sum(v.abs() for v in k.values())
        for key, v in ours.items():
            assert ((v - (a[key] - k[key])).abs() <= ROUNDING * scale).all(), str(key)
    nothing = clean.attribute(3, 4, by="component", baseline=clean)
    assert nothing.values.abs().max() == 0


@pytest.mark.parametrize("case", SHAPES, ids=str)  # only the Bridge's W_E lacks Gemma's scale
def test_fixed_baselines_run_no_second_pass_and_have_no_operator_term(case):
    lens = lens_of(case)
    x = lens.embedding
    target = gradient_of(lens, 3, 4).target
    mean = lens.capture.embed_weights.W_E.detach().double().mean(0)
    embed, pos = lens.capture.embed, lens.capture.pos_embed
    scale = (
        embed[0, 0] / lens.capture.embed_weights.W_E[tokens()[0, 0]].double()
    ).mean()  # Gemma scales W_E
    at = {
        "zero": torch.zeros_like(x),
        "mean": (mean * scale).expand_as(x) + (0 if pos is None else pos),
    }
    for baseline, there in at.items():
        expected = ((lens.operator @ (x - there))[:, -1] * target.covector).sum(-1)
        for by in ("token", "component"):
            a = lens.attribute(3, 4, by=by, baseline=baseline)
            assert a.completeness_error <= 10 * case.tol()
            assert not any(s.node.kind == "change" for s in a.sources)
            tol = case.within("two runs")
            assert_close(a.target_value, expected, tol, f"{baseline} {by}")
    own = lens.attribute(3, 4, baseline=mean * scale)
    assert_close(own.values, lens.attribute(3, 4, baseline="mean").values, ORACLE)


@pytest.mark.wrong_types
def test_baseline_refusals(tmp_path):
    clean, corrupted = lens_of(FIRST), corrupted_of(FIRST)
    with quiet(), torch.no_grad():
        _, shorter = tensorlens_tl.capture(FIRST.model(), tokens()[:, :5])
        _, single = tensorlens_tl.capture(FIRST.model(torch.float32), tokens())
    with pytest.raises(ValueError, match=r"prompt 0 has 7, its baseline 5\. Reword the corrupted"):
        clean.attribute(3, baseline=shorter)
    with pytest.raises(
        ValueError, match=r"captured with torch\.float64.*its baseline with torch\.float32"
    ):
        clean.attribute(3, baseline=single)
    strange = next(c for c in SHAPES if c.name.endswith("-neox"))
    with pytest.raises(ValueError, match=r"its baseline of another one.*with the same model"):
        clean.attribute(3, baseline=lens_of(strange))
    with pytest.raises(ValueError, match="by='order' is not available with a baseline"):
        clean.attribute(3, by="order", baseline=corrupted)
    with pytest.raises(ValueError, match="at='both' does not exist"):
        clean.attribute(3, baseline=corrupted, at="both")
    with pytest.raises(ValueError, match="effect='total' is not available with a baseline"):
        clean.attribute(3, by="component", effect="total", baseline=corrupted)
    for wrong in ("median", torch.zeros(3), 3):
        with pytest.raises(ValueError, match=r"no baseline\. Pass the lens of .* embedding \[32\]"):
            clean.attribute(3, baseline=wrong)
    clean.save(tmp_path / "lens.safetensors", weights=True)
    loaded = tensorlens_tl.load(tmp_path / "lens.safetensors")
    with pytest.raises(ValueError, match=r"needs W_E.*or pass the mean embedding"):
        loaded.attribute(3, baseline="mean")
    known = tensorlens_tl.load(tmp_path / "lens.safetensors", model=FIRST.model())
    ours, theirs = (lens.attribute(3, baseline="mean").values for lens in (known, clean))
    assert_close(ours, theirs, ROUNDING)
    again = loaded.attribute(3, 4, baseline=corrupted)  # copies of the weights are the same model
    assert_close(again.values, clean.attribute(3, 4, baseline=corrupted).values, ROUNDING)


@every_case
def test_edges_of_a_difference(case):
    """Covectors of one run × differences of what is written; into the logits: the components."""
    clean, corrupted = lens_of(case), corrupted_of(case)
    ours, theirs = (lens.attribute(3, 4, by="edge") for lens in (clean, corrupted))
    for at, lens in (("clean", clean), ("corrupted", corrupted)):
        a = clean.attribute(3, 4, by="edge", baseline=corrupted, at=at)
        assert not a.sums_to_target and all(s.node.src.kind != "change" for s in a.sources)
        scale = ours.values.abs().sum(1) + theirs.values.abs().sum(1)
        component = by_node(clean.attribute(3, 4, by="component", baseline=corrupted, at=at))
        for i, source in enumerate(a.select(dest="logits").sources):
            v = a.select(dest="logits").values[:, i]
            tol = case.within("oracle")
            assert ((v - component[source.node.src, None]).abs() <= tol * scale).all()
        readers = a.sum("src")  # what a reader makes of the whole difference of its input
        for step, pulls in zip(
            lens.operator.steps, gradient_of(lens, 3, 4).trace.pulls, strict=True
        ):
            i = lens.operator.steps.index(step)
            moved = clean.operator.steps[i].state - corrupted.operator.steps[i].state
            for branch, pull in zip(step.branches, pulls, strict=True):
                total = sum(
                    v for (node, _), v in by_node(readers).items() if node in branch.body.reads()
                )
                expected = (moved * pull.covector).sum((-2, -1))
                assert ((total - expected).abs() <= tol * scale).all()


# --- Many targets --------------------------------------------------------------------------------


@every_case
def test_many_targets_are_one_batched_sweep(case, monkeypatch):
    lens = lens_of(case)
    calls, pull = [], FrozenTransformer.pull
    monkeypatch.setattr(FrozenTransformer, "pull", lambda *args: calls.append(args) or pull(*args))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    targets = [3, None, direction, 4]
    for by in ("token", "edge", "component"):
        calls.clear()
        many = lens.attribute_many(targets, by=by)
        assert len(calls) == (by != "component")
        for target, a in zip(targets, many, strict=True):
            assert_close(a.values, lens.attribute(target, by=by).values, ORACLE, by)
    own = lens.attribute_many(pos=range(7))
    assert [a.target for a in own] == [lens.attribute(pos=p).target for p in range(7)]
    assert max(a.completeness_error for a in own) <= 10 * case.tol()


def test_many_targets_in_chunks_and_refusals(monkeypatch):
    from tensorlens_tl.attribution.splits import attribute_many

    lens = lens_of(FIRST)
    goals = [gradient_of(lens, t).target for t in range(5)]
    calls, pull = [], FrozenTransformer.pull
    monkeypatch.setattr(
        FrozenTransformer, "pull", lambda *args: calls.append(len(args[1])) or pull(*args)
    )
    found = list(attribute_many(lens.capture, lens.operator, goals, memory_limit=1))
    assert calls == [1] * 5 and len(found) == 5
    for wrong in ({"target": []}, {"target": [3, 4], "pos": [1]}, {"pos": []}):
        with pytest.raises(ValueError, match="The lists cannot be paired"):
            lens.attribute_many(**wrong)


# --- Head loadings -------------------------------------------------------------------------------


@shape_conventions
def test_every_layers_loadings_sum_to_the_effect(case, gate):
    lens = lens_of(case, gate=gate)
    token, total = (
        lens.attribute(3, 4),
        lens.attribute(3, 4, by="component", effect="total").sum("pos"),
    )
    edges = lens.attribute(3, 4, by="edge")
    sources = {
        2: token.sum("node"),
        -1: token.sum("node"),
        "L0H1": total,
        "embed": token.sum("pos"),
        "L0H1→L1H2.v": edges,
    }
    if lens.capture.blocks[0].mlp is not None:
        sources["L0MLP"] = total
    for source, table in sources.items():
        if "→" in str(source) and gate != "gate":
            continue
        try:
            a = lens.loadings(source, 3, 4)
        except ValueError as error:
            assert "→" in str(source) and "No layer with heads is above" in str(error)
            continue
        key = {2: 2, -1: 6}.get(source)
        values = {
            (s.pos if key is not None else str(s.node)): table.values[:, i]
            for i, s in enumerate(table.sources)
        }
        effect = values[source if key is None else key]
        scale = token.values.abs().sum(1)
        assert ((a.target_value - effect).abs() <= ORACLE * scale).all() or case.float32_norms
        layers = a.sum("layer")
        assert len(layers.sources) == (2 if source in (2, -1, "embed") else 1)
        assert (
            (layers.values - effect[:, None]).abs() <= case.within("oracle") * scale[:, None]
        ).all()
        assert not a.sums_to_target and a.target[0].endswith(
            f"from {'position ' if key is not None else ''}{source}"
        )


def test_loadings_are_what_zeroing_a_heads_values_for_this_state_takes():
    """A head's loading is the part of the effect that goes once the state no longer enters it."""
    lens = lens_of(FIRST)
    op, u = lens.operator, gradient_of(lens, 3, 4).target.covector
    a = lens.loadings(2, 3, 4)
    x = torch.zeros_like(lens.embedding)
    x[:, 2] = lens.embedding[:, 2]
    for layer in (0, 1):
        site = f"blocks.{layer}.hook_resid_pre"
        state = op.between(op.sites[0], site) @ x
        step = op.steps[op.site_index(site)]
        (branch,) = step.branches
        for node in branch.body.nodes():
            added = branch.body.part(node).apply(branch.pre.apply(state))
            expected = (
                (op.between(op.sites[op.site_index(site) + 1], op.sites[-1]) @ added)[:, -1] * u
            ).sum(-1)
            assert_close(by_node(a)[node, None], expected, ORACLE, str(node))


def test_loading_refusals():
    lens = lens_of(FIRST)
    with pytest.raises(ValueError, match="Position 9 is outside prompt 0"):
        lens.loadings(9)
    with pytest.raises(ValueError, match=r"There is no node L7H1\. Use one of L0H0, .*L1MLP"):
        lens.loadings("L7H1")
    with pytest.raises(ValueError, match="No layer with heads is above L1H0"):
        lens.loadings("L1H0")
    with pytest.raises(ValueError, match="goes straight to the logits, so no head carries it"):
        lens.loadings("L0H0→logits")
    with pytest.raises(ValueError, match=r"patterns are frozen\. Take L0H0→L1H1\.v"):
        lens.loadings("L0H0→L1H1.q")
    with pytest.raises(ValueError, match=r"no edge L0MLP→L0H0\.v, as .* is not above"):
        lens.loadings(Edge(Node("mlp", 0), Node("head", 0, 0, "v")))


# --- Gradients -----------------------------------------------------------------------------------


def test_the_latest_gradients_are_kept_and_no_more():
    lens = lens_of(SHAPES[0])
    cache = GradientCache(lens.capture, lens.operator, size=2)
    goals = [resolve(lens.capture, t) for t in (3, 4, 5)]
    first, second = map(cache.gradient, goals[:2])
    assert cache.gradient(resolve(lens.capture, 3)) is first and cache.latest == [first, second]
    third = cache.gradient(goals[2])
    assert cache.latest == [second, third] and cache.gradient(goals[0]) is not first


def test_many_gradients_are_those_of_each_target():
    lens = lens_of(SHAPES[0])
    for poses in ((-1, -1), (2, -1)):  # one position, and several
        goals = [resolve(lens.capture, t, pos=p) for t, p in zip((3, 4), poses, strict=True)]
        for many in TargetGradient.many(lens.capture, lens.operator, goals):
            alone = TargetGradient(lens.capture, lens.operator, many.target)
            for a, b in zip(many.trace.covectors, alone.trace.covectors, strict=True):
                assert_close(a, b, ROUNDING)
