"""Circuits in the real model: rebuilt inputs against the host's own runs, patched hook by hook."""

import json
import math

import pytest
import torch
from comparisons import assert_close
from models import (
    CASES,
    D_VOCAB,
    ORACLE,
    ROUNDING,
    SHAPES,
    HookedTransformer,
    quiet,
    tokens,
)

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.circuits.ablation import (
    SIZES,
    AblationOptions,
    faithfulness,
    faithfulness_curve,
    faithfulness_of_many,
)
from tensorlens_tl.circuits.edge_averages import first_edges
from tensorlens_tl.circuits.faithfulness_result import (
    Faithfulness,
    FaithfulnessCurve,
    share_difference,
)
from tensorlens_tl.hosts.entry import adapt
from tensorlens_tl.passes import edge_patching
from tensorlens_tl.passes.edge_patching import edge_model
from tensorlens_tl.readers.attention_scores import whole_norms

every_case = pytest.mark.parametrize("case", SHAPES, ids=str)
_EACH = ("gpt2", "gpt2-compat", "llama", "neox", "gemma2", "gemma2-compat")
ONE_OF_EACH = [case for case in CASES.values() if case.name.partition("-")[2] in _EACH]
CLEAN, CORRUPTED = tokens(3), tokens(3, seed=5)
FIRST = SHAPES[0]


def runs(case, dtype=torch.float64):
    return case.model(dtype), CLEAN, CORRUPTED


# --- Ablating nothing and everything --------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_ablating_nothing_and_everything_gives_the_model_s_own_logits(case, dtype):
    """Clean and corrupted logits through rebuilt inputs, several circuits in one pass.

    ≤ 1e-10 in float64, ≤ 1e-6 in float32 or where the host norms in float32; or twice the model's
    own float32 rounding, where that is more (a model without norms: 1.4e-6).
    """
    model, clean, corrupted = runs(case, dtype)
    with quiet(), torch.no_grad(), edge_model(model) as edged:
        own, twin = model(clean), model(corrupted)
        other = edged.run(corrupted)
        assert torch.equal(other.logits[0], twin)
        keep = torch.ones(3, len(edged.universe.readers), len(edged.universe.writers))
        keep[1:] = torch.tensor([0.0, 1.0])[:, None, None]
        ours = edged.run(clean, keep, other.writes[0])
        patterns = [p[0] for p in edged.run(clean).patterns]
        held = edged.run(clean, keep[:1], other.writes[0], patterns)
        exact = case.model(torch.float64)(clean)
    tol = 1e-6 if dtype == torch.float32 or case.float32_norms else ORACLE
    noise = float((own - exact).abs().max() / own.abs().max())
    tol = max(tol, 2 * noise) if dtype == torch.float32 else tol
    assert noise <= 2e-6
    assert_close(ours.logits[0], own, tol, "nothing")
    assert_close(ours.logits[1], twin, tol, "everything")
    assert_close(ours.logits[2], own, tol, "nothing, in another circuit's company")
    assert_close(held.logits[0], own, tol, "nothing, patterns frozen")
    assert_close(ours.writes[1, 1:], other.writes[0, 1:], tol, "writers above the input")
    assert (own - twin).abs().max() > 0.1 * own.abs().max()


@pytest.mark.parametrize("case", ONE_OF_EACH[:3], ids=str)
def test_half_precision_is_off_by_the_model_s_own_noise(case):
    """Sums over writers are in float32; noise: the bfloat16 model against the float32 one."""
    with quiet():
        model = case.build(torch.bfloat16)
    with quiet(), torch.no_grad(), edge_model(model) as edged:
        own, exact = model(CLEAN).float(), case.model(torch.float32)(CLEAN)
        other = edged.run(CORRUPTED).writes[0]
        keep = torch.ones(1, len(edged.universe.readers), len(edged.universe.writers))
        ours = edged.run(CLEAN, keep, other).logits[0].float()
    noise = float((own - exact).abs().max() / own.abs().max())
    assert other.dtype == torch.float32 and 1e-3 < noise < 0.05
    assert_close(ours, own, noise)


# --- One edge, the slow way -----------------------------------------------------------------------


class PathPatching:
    """One edge patched by whole runs of the host, hooked by name: no weight but W_O is read here.

    A reader gets the clean residual plus what the writer's replacement changes. What it then makes
    of it is read off a run whose whole block starts from that residual; for a head's query, key or
    value, that one activation is put into a second, clean run, and its head's z into a third.
    """

    def __init__(self, model, clean, corrupted):
        self.model, self.ids, self.points = model, clean, model.hook_dict
        self.n_layers = len(model.blocks)
        self.names = adapt(model).norm_names(model.blocks[0])
        self.hooks = {name: f"hook_{name}" for name in "qkvz"}
        if whole_norms(adapt(model)):  # a head's query is what the norm makes of its own input
            self.hooks |= {name: f"hook_rot_{name}" for name in "qk"}
        self.clean, self.corrupted = (self.cached(ids) for ids in (clean, corrupted))

    def cached(self, ids, hooks=()):
        kept = {}
        wanted = [
            n
            for layer in range(self.n_layers)
            for n in (
                *(f"blocks.{layer}.attn.{self.hooks[name]}" for name in "qkvz"),
                f"blocks.{layer}.hook_mlp_out",
                f"blocks.{layer}.hook_resid_pre",
                f"blocks.{layer}.hook_resid_mid",
                f"blocks.{layer}.hook_resid_post",
                *(f"blocks.{layer}.{norm}.hook_scale" for norm in self.names.values()),
                f"blocks.{layer}.hook_attn_out",
                f"blocks.{layer}.attn.o.hook_out",
            )
        ]
        wanted += ["hook_embed", "hook_pos_embed"]

        def keep(name):
            def hook(t, hook):
                kept.setdefault(name, t.detach().clone())  # a second look: after an edit

            return hook

        fwd = [(n, keep(n)) for n in wanted if n in self.points]
        kept["logits"] = self.model.run_with_hooks(ids, fwd_hooks=[*hooks, *fwd])
        return kept

    def put(self, name, value):
        return self.cached(self.ids, [(name, lambda t, hook: value.reshape(t.shape).clone())])

    def writes(self, cache, node):
        if node.kind == "input":
            return cache["hook_embed"] + cache.get("hook_pos_embed", 0)
        at = f"blocks.{node.layer}"
        block = self.model.blocks[node.layer]
        norm = self.names.get("ln2_post" if node.kind == "mlp" else "ln1_post", "none")
        scale, post = f"{at}.{norm}.hook_scale", getattr(block, norm, None)
        if node.kind == "mlp":
            out = cache[f"{at}.hook_mlp_out"]  # with its constants, which cancel below
            if scale in cache and (b_out := getattr(block.mlp, "b_out", None)) is not None:
                out = out - b_out / cache[scale] * post.w  # but not where the live norm scales them
            return out
        out = self.heads(cache, node.layer, "z")[:, :, node.index] @ block.attn.W_O[node.index]
        if scale not in cache:
            return out
        component = getattr(post, "original_component", None)
        gain = (
            post.w if component is None else component.weight + self.model.cfg.rmsnorm_uses_offset
        )
        return out / cache[scale] * gain

    def heads(self, cache, layer, name):
        t = cache[f"blocks.{layer}.attn.{self.hooks[name]}"]
        return t if t.ndim == 4 else t.unflatten(-1, (-1, 8))

    def site(self, dest):
        """Where the residual passes that a reader reads."""
        if dest.kind == "logits":
            return f"blocks.{self.n_layers - 1}.hook_resid_post"
        block = self.model.blocks[dest.layer]
        hooked = not hasattr(block.attn, "original_component")
        parallel = (
            self.model.cfg.parallel_attn_mlp if hooked else "Parallel" in type(block).__name__
        )
        mid = dest.kind == "mlp" and not parallel
        return f"blocks.{dest.layer}.hook_resid_{'mid' if mid else 'pre'}"

    def rebuilt(self, site, edge, change):
        """The residual there, with ``change`` added to what the edge's writer sends."""
        return self.clean[site] + change

    def logits(self, edge, change):
        """The host's logits with ``change`` added to what the edge's writer sends to its reader."""
        dest = edge.dest
        site = self.site(dest)
        block = self.put(site, self.rebuilt(site, edge, change))
        if dest.kind == "logits":
            return block["logits"]
        at, h = f"blocks.{dest.layer}", dest.index
        if dest.kind == "mlp":
            return self.put(f"{at}.hook_mlp_out", block[f"{at}.hook_mlp_out"])["logits"]
        theirs, ours = (self.heads(c, dest.layer, dest.name) for c in (block, self.clean))
        own = h * ours.shape[2] // 4  # under grouped queries, the head that it reads
        mixed = ours.clone()
        mixed[:, :, own] = theirs[:, :, own]
        one = self.put(f"{at}.attn.{self.hooks[dest.name]}", mixed)
        z = self.heads(self.clean, dest.layer, "z").clone()
        z[:, :, h] = self.heads(one, dest.layer, "z")[:, :, h]
        return self.put(f"{at}.attn.hook_z", z)["logits"]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_one_edge_patched_is_path_patching_on_the_host(case):
    """Every twelfth edge, resampled; a few zeroed: against three runs of the host for each."""
    model, clean, corrupted = runs(case)
    with quiet(), torch.no_grad(), edge_model(model) as edged:
        universe, other = edged.universe, edged.run(corrupted).writes[0]
        slow = PathPatching(model, clean, corrupted)
        edges = universe.edges[::12]
        assert {e.dest.name or e.dest.kind for e in edges} == {"q", "k", "v", "mlp", "logits"}
        edges = edges if case is FIRST else edges[len(str(case)) % 2 :: 2]
        keep = torch.ones(len(edges), len(universe.readers), len(universe.writers))
        for i, edge in enumerate(edges):
            keep[(i, *universe.place(edge))] = 0
        ours = edged.run(clean, keep, other).logits
        own = edged.run(clean)
        moved = 0
        for i, edge in enumerate(edges):
            change = slow.writes(slow.corrupted, edge.src) - slow.writes(slow.clean, edge.src)
            theirs = slow.logits(edge, change)
            assert_close(ours[i], theirs, case.within("oracle"), str(edge))
            moved += bool((theirs - own.logits[0]).abs().max() > 1e-3)
        assert moved > len(edges) // 2
        zeroed = edged.run(clean, keep).logits
        for i in range(0, len(edges), 5):
            out = own.writes[0, universe.place(edges[i])[1]]
            theirs = slow.logits(edges[i], -out)
            assert_close(zeroed[i], theirs, case.within("oracle"), str(edges[i]))


# --- What a user calls ----------------------------------------------------------------------------


def universe_of(model):
    with edge_model(model) as edged:
        return edged.universe


def some_edges(model, share=0.3, seed=0):
    edges = universe_of(model).edges
    drawn = torch.rand(len(edges), generator=torch.Generator().manual_seed(seed)) < share
    return [edge for edge, kept in zip(edges, drawn.tolist(), strict=True) if kept]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_full_and_empty_circuits(case):
    """All kept: the clean metric, share 1. Nothing kept: the corrupted, share 0. Frozen, too."""
    model, clean, corrupted = runs(case)
    edges, tol = universe_of(model).edges, case.within("ratio")
    goal = {"corrupted": corrupted, "target": 3, "versus": [4, 5, 6]}
    with quiet(), torch.no_grad():
        full = faithfulness(model, clean, edges, **goal)
        empty = faithfulness(model, clean, [], **goal)
        frozen = faithfulness(
            model, clean, [str(edge) for edge in edges], attention="frozen", **goal
        )
        logits = [model(ids)[:, -1] for ids in (clean, corrupted)]
    rows = torch.arange(3)
    own, twin = (one[:, 3] - one[rows, torch.tensor([4, 5, 6])] for one in logits)
    assert_close(full.full, own, tol)
    assert_close(full.circuit, own, tol)
    assert_close(full.ablated, twin, tol)
    assert_close(empty.circuit, twin, tol)
    assert abs(full.share - 1) <= tol and abs(empty.share) <= tol and abs(frozen.share - 1) <= tol
    assert full.empty_share == 0 and abs(frozen.empty_share) > 1e-6
    assert full.n_edges == full.n_total == len(edges) and empty.n_edges == 0


def test_frozen_patterns_are_no_edges():
    """Query and key edges change nothing where patterns are frozen, and much where they live."""
    model, clean, corrupted = runs(FIRST)
    values = [edge for edge in universe_of(model).edges if edge.dest.name not in ("q", "k")]
    with quiet():
        found = {
            p: faithfulness(model, clean, values, corrupted, attention=p, target=3).share
            for p in ("live", "frozen")
        }
    assert abs(found["frozen"] - 1) <= ORACLE and abs(found["live"] - 1) > 1e-3


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_mean_and_zero_against_replacements_by_hand(ablation):
    model, clean, _ = runs(FIRST)
    edges = some_edges(model)
    with quiet(), torch.no_grad(), edge_model(model) as edged:
        writes = edged.run(clean).writes[0]
        other = writes.mean(1, keepdim=True).expand_as(writes) * (ablation == "mean")
        keep = torch.stack([edged.universe.keep(e) for e in ([], edges)])
        logits = edged.run(clean, keep, other).logits[:, :, -1, 3]
    with quiet():
        found = faithfulness(model, clean, edges, ablation=ablation, target=3)
    assert_close(found.ablated, logits[0], ROUNDING)
    assert_close(found.circuit, logits[1], ROUNDING)


def test_means_are_over_the_prompts_given():
    model, clean, corrupted = runs(FIRST)
    with quiet():
        both = torch.cat([clean, corrupted])
        given = faithfulness(model, clean, [], ablation="mean", target=3, mean_over=both)
        whole = faithfulness(model, both, [], ablation="mean", target=3)
    assert_close(given.circuit, whole.circuit[:3], ROUNDING)


def test_prompts_of_several_lengths_come_back_in_order_whatever_the_batch():
    model = FIRST.model()
    rows = [tokens(1, n, seed=n)[0] for n in (5, 7, 4, 7, 5)]
    corrupted = [tokens(1, n, seed=n + 9)[0] for n in (5, 7, 4, 7, 5)]
    edges = some_edges(model)
    with quiet():
        many = faithfulness(model, rows, edges, corrupted, target=[1, 2, 3, 4, 5])
        small = faithfulness(model, rows, edges, corrupted, target=[1, 2, 3, 4, 5], batch_size=1)
        each = [
            faithfulness(model, [row], edges, [twin], target=i)
            for i, (row, twin) in enumerate(zip(rows, corrupted, strict=True), 1)
        ]
    for name in ("full", "ablated", "circuit"):
        assert_close(getattr(many, name), torch.cat([getattr(one, name) for one in each]), ROUNDING)
        assert_close(getattr(small, name), getattr(many, name), ROUNDING)
    assert all(math.isnan(x) for x in each[0].interval)


def test_own_prediction_and_metrics():
    model, clean, corrupted = runs(FIRST)
    edges = some_edges(model)

    def metric(logits, index):
        return logits[:, 7] * (1 + index)

    with quiet(), torch.no_grad():
        own = faithfulness(model, clean, edges, corrupted, pos=-2)
        logits = model(clean)[:, -2]
        mine = faithfulness(model, clean, edges, corrupted, metric=metric)
        theirs = faithfulness(model, clean, edges, corrupted, target=7)
    assert_close(own.full, logits.max(-1).values, ROUNDING)
    assert_close(mine.circuit, theirs.circuit * torch.tensor([1, 2, 3]), ROUNDING)


def test_the_bundled_model_s_text_prompts():
    pairs = demo.prompts("ioi", 12)
    with quiet():
        model = demo.load_model()
        texts = [p.clean for p in pairs], [p.corrupted for p in pairs]
        goal = {"target": [p.answer for p in pairs], "versus": [p.foil for p in pairs]}
        found = faithfulness(model, texts[0], universe_of(model).edges, texts[1], **goal)
        logits = [model(text)[0, -1] for text in texts[0]]
    ids = [[model.tokenizer.encode(w)[-1] for w in (p.answer, p.foil)] for p in pairs]
    own = torch.stack([one[a] - one[b] for one, (a, b) in zip(logits, ids, strict=True)])
    assert_close(found.circuit, own.double(), 1e-5)
    assert found.share == pytest.approx(1, abs=1e-5) and found.n_total == 479


@pytest.mark.parametrize("case", ONE_OF_EACH[:1] + ONE_OF_EACH[-1:], ids=str)
def test_the_empty_frozen_circuit_is_the_corrupted_run_under_clean_patterns(case):
    """The host's own corrupted run, its patterns overwritten by name with the clean run's."""
    model, clean, corrupted = runs(case)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(len(model.blocks))]
    with quiet(), torch.no_grad():
        _, cache = model.run_with_cache(clean, return_cache_object=False)
        held = [(name, lambda t, hook, name=name: cache[name].clone()) for name in names]
        logits = model.run_with_hooks(corrupted, fwd_hooks=held)[:, -1, 3]
        found = faithfulness(model, clean, [], corrupted, attention="frozen", target=3)
    assert_close(found.empty, logits, case.within("oracle"))
    assert_close(found.circuit, found.empty, ROUNDING)


# --- As a circuit's methods -----------------------------------------------------------------------


@every_case
def test_the_operator_and_the_real_model_have_the_same_edges(case):
    with quiet(), torch.no_grad():
        _, lens = tensorlens_tl.capture(case.model(), CLEAN)
    universe = universe_of(case.model())
    assert lens.operator.wiring == universe.wiring
    assert len(universe.edges) == sum(universe.below)
    for edge in universe.edges:
        reader, writer = universe.place(edge)
        assert (universe.readers[reader], universe.writers[writer]) == (edge.dest, edge.src)
        assert writer < universe.below[reader]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_discovered_circuit_is_verified_in_its_model(case):
    model, clean, corrupted = runs(case)
    goal = {"target": 3, "versus": 4}
    with quiet(), torch.no_grad():
        lenses = [tensorlens_tl.capture(model, ids)[1] for ids in (clean, corrupted)]
        circuit = lenses[0].discover(**goal, n_edges=40, corrupted=lenses[1])
        found = circuit.faithfulness(model, clean, corrupted, **goal)
        same = faithfulness(model, clean, circuit.edges, corrupted, **goal)
        curve = circuit.faithfulness_curve(model, clean, corrupted, **goal, sizes=(0.3, 1.0))
        direct = faithfulness_curve(
            model, clean, circuit.scores, corrupted, **goal, sizes=(0.3, 1.0)
        )
        itself = faithfulness(model, clean, circuit, corrupted, **goal)
    assert found.n_edges == 40 and found.share == same.share == itself.share
    assert torch.equal(curve.signed, direct.signed) and torch.equal(curve.absolute, direct.absolute)
    assert float(curve.shares[1]) == pytest.approx(1, abs=1e-5)


def test_circuits_of_other_models_and_without_scores_are_refused():
    model, clean, corrupted = runs(FIRST)
    other = next(
        case for case in SHAPES if case.host == FIRST.host and case.name != FIRST.name
    ).model()
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(model, clean)[1]
        circuit = lens.discover(3, n_edges=20)
        with pytest.raises(ValueError, match=r"The circuit is of .* this model"):
            circuit.faithfulness(other, clean, corrupted)
        with pytest.raises(ValueError, match="The circuit is of"):
            faithfulness(other, clean, circuit, corrupted)
        named = lens.circuit(["L0H1"]).circuit
        with pytest.raises(ValueError, match="This circuit has no scores: its edges were named"):
            named.faithfulness_curve(model, clean, corrupted)


# --- Results --------------------------------------------------------------------------------------


def test_shares_and_intervals_by_hand():
    """m(N) = 4, m(∅) = 0, m(C) = 3: three quarters. Equal prompts: the interval is the point."""
    full, ablated, circuit = (torch.full((8,), x).double() for x in (4.0, 0.0, 3.0))
    found = Faithfulness(full, ablated, ablated, circuit, "resample", "live", 5, 10)
    assert found.share == 0.75 and found.interval == (0.75, 0.75) and found.empty_share == 0
    spread = torch.arange(8).double() - 3.5
    loose = Faithfulness(full, ablated, ablated, circuit + spread, "resample", "live", 5, 10)
    low, high = loose.interval
    # 2 · 1.96 · 2.29 / √8 / 4 = .79; an interval of 90 % would be .67 wide.
    assert low < 0.75 < high and 0.73 < high - low < 0.86
    assert loose.interval == loose.interval
    data = json.loads(loose.to_json())
    assert data["share"] == 0.75 and data["interval"] == [low, high] and len(data["circuit"]) == 8
    assert "0.750" in repr(loose) and "5 of 10 edges" in repr(loose)
    some = torch.tensor([4.0, 0.0]).double()  # the draw of the second prompt alone has no gap
    rare = Faithfulness(some, 0 * some, 0 * some, some + 1, "zero", "live", 5, 10)
    assert rare.share == 1.5 and all(map(math.isnan, rare.interval))
    nothing = Faithfulness(full, full, full, full, "zero", "live", 0, 10)
    assert math.isnan(nothing.share) and json.loads(nothing.to_json())["share"] is None


def test_share_differences_are_paired():
    """Circuits that differ by a constant differ surely, however the prompts vary."""
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    full, ablated = 4 + noise, noise
    ours, other = (
        Faithfulness(full, ablated, ablated, c + noise, "zero", "live", 1, 2) for c in (3, 2)
    )
    value, (low, high) = share_difference(ours, other)
    assert (
        value == pytest.approx(0.25) and low == pytest.approx(0.25) and high == pytest.approx(0.25)
    )
    with pytest.raises(ValueError, match="not run on the same prompts and ablation"):
        share_difference(ours, Faithfulness(full + 1, ablated, ablated, full, "zero", "live", 1, 2))


def test_many_circuits_are_each_as_alone():
    model, clean, corrupted = runs(FIRST)
    circuits = {str(seed): some_edges(model, seed=seed) for seed in range(3)}
    for attention in ("live", "frozen"):
        with quiet():
            many = faithfulness_of_many(
                model, clean, circuits, corrupted, attention=attention, target=3
            )
            one = faithfulness(
                model, clean, circuits["1"], corrupted, attention=attention, target=3
            )
        assert list(many) == ["0", "1", "2"] and many["0"].n_edges != many["1"].n_edges
        assert_close(many["1"].circuit, one.circuit, ROUNDING)
        assert_close(many["1"].empty, one.empty, ROUNDING)
        assert many["1"].n_edges == one.n_edges


def test_options_are_their_fields_as_keywords():
    """One object for several calls, and a keyword that overrides one of its fields."""
    model, clean, corrupted = runs(FIRST)
    edges, options = some_edges(model), AblationOptions(attention="frozen", batch_size=2)
    with quiet():
        one = faithfulness(model, clean, edges, corrupted, 3, None, options)
        same = faithfulness(
            model, clean, edges, corrupted, 3, attention="frozen", batch_size=2, progress=True
        )
        live = faithfulness(model, clean, edges, corrupted, 3, None, options, attention="live")
    assert torch.equal(one.circuit, same.circuit) and one.attention == same.attention == "frozen"
    assert live.attention == "live" and not torch.equal(one.circuit, live.circuit)
    assert AblationOptions.of(options, {}) is options


def test_a_circuit_opens_the_model_once(monkeypatch):
    model, clean, corrupted = runs(FIRST)
    opened, adapt = [], edge_patching.adapt
    monkeypatch.setattr(edge_patching, "adapt", lambda model: opened.append(1) or adapt(model))
    with quiet(), torch.no_grad():
        circuit = tensorlens_tl.capture(model, clean)[1].discover(3, n_edges=20)
        circuit.faithfulness(model, clean, corrupted, 3)
        circuit.faithfulness_curve(model, clean, corrupted, 3, sizes=(0.5,))
    assert len(opened) == 2


def test_areas_by_hand():
    """f = 0, ½, 1 at k = 0, .5, 1: ∫f = ½; |1 − f| = 1, ½, 0: ½. Overshooting costs CMD only."""
    ones, zero = torch.ones(4).double(), torch.zeros(4).double()
    rows = torch.tensor([0.0, 0.5, 1.0]).double()[:, None] * ones
    curve = FaithfulnessCurve(
        (0.0, 0.5, 1.0), (0, 5, 10), ones, zero, rows, 2 * rows, "mean", "live", 10
    )
    assert curve.cpr == 0.5 and curve.cpr_interval == (0.5, 0.5)
    assert curve.cmd == (1 + 0) / 2 * 0.5 + (0 + 1) / 2 * 0.5
    data = json.loads(curve.to_json())
    assert data["cpr"] == 0.5 and data["shares"] == [0, 0.5, 1] and "CPR 0.500" in repr(curve)


def test_the_curve_is_faithfulness_at_every_size():
    model, clean, corrupted = runs(FIRST)
    universe = universe_of(model)
    noise = torch.randn(len(universe.edges), generator=torch.Generator().manual_seed(1)).tolist()
    scores = dict(zip(universe.edges, noise, strict=True))
    with quiet():
        curve = faithfulness_curve(model, clean, scores, corrupted, target=3)
        for absolute, shares in ((False, curve.shares), (True, curve.absolute_shares)):
            for n, share in list(zip(curve.n_edges, shares, strict=True))[2::3]:
                circuit = first_edges(universe, scores, n, absolute)
                assert len(circuit) == n
                one = faithfulness(model, clean, circuit, corrupted, target=3)
                assert one.share == pytest.approx(float(share), abs=ORACLE)
        ranked = faithfulness_curve(
            model, clean, universe.edges, corrupted, target=3, sizes=(0.0, 0.5, 1.0)
        )
    assert curve.sizes == SIZES and curve.n_edges[-1] == len(universe.edges)
    assert torch.equal(ranked.signed, ranked.absolute)
    assert_close(ranked.shares[[0, 2]], torch.tensor([0.0, 1.0]).double(), ORACLE)


def test_nodes_and_both_names_of_the_input():
    """Nodes keep the edges between them; ``embed`` and ``pos_embed`` together are ``input``."""
    model, clean, corrupted = runs(FIRST)
    edges = universe_of(model).named(["L0H1", "L1H2"])
    assert len(edges) == 1 + 3 + 3 + 3 + 1 + 1 and str(edges[-1]) == "L1H2→logits"
    names = [str(edge).replace("input", name) for name in ("embed", "pos_embed") for edge in edges]
    with quiet():
        found = [
            faithfulness(model, clean, given, corrupted, target=3).circuit
            for given in (edges, ["L0H1", "L1H2"], names)
        ]
        scores = dict.fromkeys(edges, 1.0)
        curve = faithfulness_curve(
            model, clean, scores, corrupted, target=3, sizes=(len(edges) / 110,)
        )
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert_close(curve.signed[0], found[0], ROUNDING)


# --- A guest's manners ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_the_host_stays_as_it_was(case):
    model, clean, corrupted = runs(case)
    split = "native" not in case.name  # which has no such flag
    if split:
        model.set_use_split_qkv_input(True)
    before = [(p.detach().clone(), p.requires_grad, p.grad) for p in model.parameters()]
    try:
        with quiet():
            faithfulness(model, clean, some_edges(model), corrupted, target=3)
            with pytest.raises(ZeroDivisionError):
                faithfulness(model, clean, [], corrupted, metric=lambda logits, index: 1 / 0)
        assert bool(model.cfg.use_split_qkv_input) == split
    finally:
        if split:
            model.set_use_split_qkv_input(False)
    after = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    assert all(
        torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(before, after, strict=True)
    )
    assert not any(point.fwd_hooks or point._forward_hooks for point in model.hook_dict.values())
    assert not any(
        m._forward_pre_hooks for n, m in model.named_modules() if "mlp" in n or "ln_f" in n
    )


@pytest.mark.offered(HookedTransformer is not None)
def test_flags_that_change_a_host_s_shapes_change_nothing():
    model, clean, corrupted = runs(CASES["hooked-llama"])
    edges = some_edges(model)
    plain = faithfulness(model, clean, edges, corrupted, target=3)
    flags = (
        "ungroup_grouped_query_attention",
        "use_attn_result",
        "use_hook_mlp_in",
        "use_split_qkv_input",
    )
    try:
        for flag in flags:
            getattr(model, f"set_{flag}")(True)
        found = faithfulness(model, clean, edges, corrupted, target=3)
        assert all(getattr(model.cfg, flag) for flag in flags)
    finally:
        for flag in flags:
            getattr(model, f"set_{flag}")(False)
    assert_close(found.circuit, plain.circuit, ROUNDING)


BAD = {
    "L1H2→L0MLP": "L0MLP reads before L1H2 writes. Use an edge along the order of layers",
    "L0MLP→L0H1.v": "L0H1.v reads before L0MLP writes",
    "L7H0→logits": "nothing called L7H0 writes in this model. Use one of input, L0H0",
    "L0H0→L0H9.q": "nothing called L0H9.q reads in this model",
    "L0.b_O→logits": "nothing called L0.b_O writes in this model",  # constants are always kept
    "L0H0→L1N3": "is not an edge. Name a writer",
}


@pytest.mark.parametrize("edge", BAD)
def test_edges_that_are_not_there(edge):
    model, clean, corrupted = runs(FIRST)
    with quiet(), pytest.raises(ValueError, match=BAD[edge]):
        faithfulness(model, clean, [edge], corrupted, target=3)


BAD_CALLS = {
    "needs corrupted": ({}, "ablation='resample' needs corrupted=, one prompt of equal length"),
    "lengths": (
        {"corrupted": tokens(3, 6)},
        "Prompt 0 has 7 tokens, its corrupted prompt 6. They are",
    ),
    "counts": ({"corrupted": tokens(2)}, "There are 3 prompts but 2 corrupted prompts"),
    "ablation": (
        {"ablation": "noise"},
        "ablation='noise' does not exist. Use one of resample, mean, zero",
    ),
    "attention": (
        {"corrupted": CORRUPTED, "attention": "dead"},
        "attention='dead' does not exist. Use one of live",
    ),
    "a misspelt option": (
        {"corrupted": CORRUPTED, "ablations": "zero"},
        "no option ablations=. Did you mean ablation=",
    ),
    "an unknown option": (
        {"corrupted": CORRUPTED, "zzz": "live"},
        "no option zzz=. Use ablation, attention",
    ),
    "mean_over": (
        {"corrupted": CORRUPTED, "mean_over": CLEAN},
        "mean_over= is used by ablation='mean' only",
    ),
    "corrupted of means": (
        {"corrupted": CORRUPTED, "ablation": "mean"},
        "corrupted= is used by ablation='resample' only",
    ),
    "lengths of means": (
        {"ablation": "mean", "mean_over": tokens(3, 5)},
        r"needs prompts of one length, .* 5 to 7 tokens",
    ),
    "one prompt's mean": (
        {"ablation": "mean", "mean_over": tokens(1)},
        "over one prompt changes nothing",
    ),
    "target and metric": (
        {"corrupted": CORRUPTED, "target": 3, "metric": max},
        "metric= and target= .* only one is measured",
    ),
    "targets": ({"corrupted": CORRUPTED, "target": [1, 2]}, "target has 2 entries for 3 prompts"),
    "a number": ({"corrupted": CORRUPTED, "target": 3.7}, "target=3.7 .float. is not a token"),
    "a truth": ({"corrupted": CORRUPTED, "versus": True}, "versus=True .bool. is not a token"),
    "nothing": (
        {"corrupted": CORRUPTED, "target": [3, None, 3]},
        "target=None .NoneType. is not a token",
    ),
    "vocabulary": (
        {"corrupted": CORRUPTED, "target": D_VOCAB},
        "target id 50 is outside the vocabulary",
    ),
    "pos": ({"corrupted": CORRUPTED, "pos": 7}, "pos=7 is outside a prompt of 7 tokens"),
    "batch": ({"corrupted": CORRUPTED, "batch_size": 0}, "batch_size=0 is not an integer ≥ 1"),
    "a metric's number": (
        {"corrupted": CORRUPTED, "metric": lambda logits, index: 1.0},
        r"metric returned shape \[\] for 3 prompts",
    ),
    "metric": (
        {"corrupted": CORRUPTED, "metric": lambda logits, index: logits},
        "Return one number per prompt",
    ),
    "text": (
        {"corrupted": CORRUPTED, "target": "Mary"},
        "is a string, but the model has no tokenizer",
    ),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_calls_are_refused(what):
    kwargs, message = BAD_CALLS[what]
    with quiet(), pytest.raises(ValueError, match=message):
        faithfulness(FIRST.model(), CLEAN, [], **kwargs)


@pytest.mark.parametrize("sizes", [(), (0.5, 0.1), (0.1, 2.0)])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="are not increasing shares of all edges"):
        faithfulness_curve(FIRST.model(), CLEAN, [], CORRUPTED, target=3, sizes=sizes)


def test_prompts_that_begin_with_pad_ids():
    """Each prompt's ids are its own, also for a host that hides pad ids where it pads left."""
    model, pair = demo.load_model(), demo.prompts("ioi", 1)[0]
    ids = [model.to_tokens(text) for text in (pair.clean, pair.corrupted)]
    for row in ids:
        row[0, :2] = model.tokenizer.pad_token_id
    found, side = {}, model.tokenizer.padding_side
    try:
        for model.tokenizer.padding_side in ("right", "left"):
            where = model.tokenizer.padding_side
            found[where] = faithfulness(model, ids[0], ["L2H1"], ids[1], target=pair.answer)
    finally:
        model.tokenizer.padding_side = side
    with quiet(), torch.no_grad():
        logits = model(ids[0], attention_mask=torch.ones_like(ids[0]))
    expected = logits[0, -1, model.to_single_token(pair.answer)]
    for name in ("full", "ablated", "circuit"):
        ours, other = (getattr(found[where], name) for where in ("right", "left"))
        assert_close(ours, other, 1e-6, name)
    assert_close(torch.as_tensor(found["left"].full).flatten(), expected[None], 1e-5, "full")


@pytest.mark.parametrize("prompts", ["text", [], tokens(1)[0]])
def test_bad_prompts_are_refused(prompts):
    with (
        quiet(),
        pytest.raises(
            ValueError, match=r"prompts(=.* is not a non-empty list| are token ids of one)"
        ),
    ):
        faithfulness(FIRST.model(), prompts, [], ablation="zero")


@pytest.mark.wrong_types
def test_a_position_and_sizes_of_wrong_types_are_refused():
    with quiet(), pytest.raises(ValueError, match=r"pos=1\.5 is not an integer"):
        faithfulness(FIRST.model(), CLEAN, [], CORRUPTED, pos=1.5)
    with pytest.raises(ValueError, match="are not increasing shares of all edges"):
        faithfulness_curve(FIRST.model(), CLEAN, [], CORRUPTED, sizes=0.1)


@pytest.mark.wrong_types
@pytest.mark.parametrize("what", ["kl", 3])
def test_a_metric_that_is_no_function_is_refused(what):
    with quiet(), pytest.raises(ValueError, match=r"metric=.* is not a function"):
        faithfulness(FIRST.model(), CLEAN, [], CORRUPTED, metric=what)


def test_several_prompts_as_one_are_refused():
    with (
        quiet(),
        pytest.raises(
            ValueError, match=r"prompts\[0\] has ids of shape \[3, 7\], which are 3 prompts"
        ),
    ):
        faithfulness(FIRST.model(), [CLEAN], [], ablation="zero")


def test_padded_ids_are_refused():
    ids = demo.load_model().to_tokens(["The capital of France is", "The capital"])
    with (
        quiet(),
        pytest.raises(ValueError, match=r"prompt 1 ends in the padding token"),
    ):
        faithfulness(demo.load_model(), ids, [], ablation="zero")


@pytest.mark.parametrize("case", {case.host: case for case in SHAPES}.values(), ids=str)
def test_autocast_is_refused(case):
    model, clean, corrupted = runs(case)
    refused = pytest.raises(ValueError, match=r"torch.autocast is on")
    with quiet(), torch.autocast("cpu", torch.bfloat16), refused:
        faithfulness(model, clean, [], corrupted, target=3)


@pytest.mark.offered(HookedTransformer is not None)
def test_a_model_with_hooks_of_the_user_s_own_is_refused():
    model = CASES["hooked-gpt2"].model()
    own = model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z)])
    with own, pytest.raises(ValueError, match=r"hooks of your own at blocks\.0\.attn\.hook_z"):
        faithfulness(model, CLEAN, [], CORRUPTED)


@pytest.mark.parametrize("case", {case.host: case for case in ONE_OF_EACH}.values(), ids=str)
def test_hooks_of_torch_s_own_are_refused_too(case):
    """They edit the clean run and not what is rebuilt: the full circuit's share was 1.2."""
    model, clean, corrupted = runs(case)
    with quiet(), torch.no_grad():
        model(clean)  # a host may set hooks of its own in its first run
        for add in ("register_forward_hook", "register_forward_pre_hook"):
            handle = getattr(model.blocks[1].mlp, add)(lambda *args: None)
            with pytest.raises(ValueError, match=r"hooks of your own at .*mlp, and"):
                faithfulness(model, clean, [], corrupted, target=3)
            handle.remove()
        assert faithfulness(model, clean, [], corrupted, target=3).share == pytest.approx(
            0, abs=1e-5
        )
