"""Dictionaries of what a sublayer writes, and transcoders: the values, the sums, and the proof."""

import pytest
import torch
from comparisons import assert_close
from dictionaries import D, dictionary, weights
from models import ENCODERS, ORACLE, PER_SHAPE, ROUNDING, lens_of, quiet, tokens
from oracles import FrozenModel

import tensorlens_tl
from tensorlens_tl import features
from tensorlens_tl.features.places import Place, input_of

pytestmark = [
    pytest.mark.algebra,
    pytest.mark.filterwarnings("ignore:The error of FeatureDictionary"),
]

CASE = PER_SHAPE[0]
ATTN, Z, MLP = "blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"
INPUTS = ("ln2.hook_normalized", "ln2.hook_out", "mlp.hook_in", "hook_resid_mid")
SKIP = {"W_skip": torch.linspace(-1, 1, D * D, dtype=torch.float64).view(D, D)}


def transcoder(point="hook_resid_mid", skip=False, seed=0):
    """A random transcoder of the MLP of block 1."""
    parts = weights(seed=seed) | (SKIP if skip else {})
    return features.load(parts, site=f"blocks.1.{point}", writes=MLP)


def places_of(case):
    """The places that a case has and serves."""
    found = [Z] if case in ENCODERS else [ATTN, Z]
    return found if "attn-only" in case.name else [*found, MLP]


def cache_of(case):
    with quiet(), torch.no_grad():
        return case.model().run_with_cache(tokens(), return_cache_object=False)[1]


def _unfolded(lens):
    """Whether the MLP's norm is a LayerNorm with a weight."""
    weights = lens.capture.blocks[1].ln2.weights
    return weights.center and weights.w is not None


@pytest.mark.parametrize("case", [*PER_SHAPE, *ENCODERS[:1]], ids=str)
def test_what_sublayers_write_is_read_and_rows_sum_to_the_target(case):
    lens, cache = lens_of(case), cache_of(case)
    for site in places_of(case):
        y = Place.of(site, lens.operator).state(lens.operator, lens.capture)
        assert_close(y, cache[site].reshape(y.shape), case.within("run"))
        sae = dictionary("layer norm", site=site)
        found = lens.attribute(3, 5, by="feature", saes=sae)
        assert found.sums_to_target and found.completeness_error < case.within("run")
        assert {"feature", "error", "past"} <= {s.node.kind for s in found.sources}
    if MLP not in places_of(case):
        return
    for point in INPUTS:
        one = transcoder(point, skip=True)
        if one.site not in cache or case in ENCODERS:
            continue
        if point == "ln2.hook_normalized" and _unfolded(lens):
            with pytest.raises(ValueError, match="differ in whether"):
                input_of(one, lens.operator, lens.capture)
            continue
        x = input_of(one, lens.operator, lens.capture)
        assert_close(x, cache[one.site], case.within("run"))
        found = lens.attribute(3, by="feature", saes=one)
        assert found.completeness_error < case.within("run")
        assert "skip" in {s.node.kind for s in found.sources}


@pytest.mark.parametrize("case", [c for c in PER_SHAPE if "solu" not in c.name], ids=str)
def test_removing_a_feature_in_the_frozen_real_model_moves_the_target_by_its_row(case):
    lens, model = lens_of(case), case.model()
    frozen, direction = FrozenModel(model, tokens()), torch.linspace(-1, 1, D, dtype=torch.float64)
    plain, _ = frozen(lens.capture.input)
    for site in places_of(case):
        sae = dictionary("topk", site=site)
        found = lens.attribute(direction, by="feature", saes=sae)
        y = Place.of(site, lens.operator).state(lens.operator, lens.capture)
        z, pos = sae.encode(y), 4
        number = int(z[0, pos].argmax())
        delta = torch.zeros_like(y)
        delta[:, pos] = -z[:, pos, number, None] * sae.W_dec[number]
        hook = (site, lambda t, hook, delta=delta: t + delta.view(t.shape))
        with model.hooks(fwd_hooks=[hook]):
            moved = (frozen(lens.capture.input)[0] - plain)[:, -1] @ direction
        name = f"L1.{Place.of(site, lens.operator).name}F{number}"
        (at,) = [i for i, s in enumerate(found.sources) if (str(s.node), s.pos) == (name, pos)]
        assert_close(moved, -found.values[:, at], case.within("oracle"))


@pytest.mark.parametrize("case", [c for c in PER_SHAPE if "attn-only" not in c.name], ids=str)
def test_edges_sum_to_what_each_reader_reads(case):
    lens = lens_of(case)
    for site in (ATTN, "blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"):
        plain = lens.attribute(3, 5, by="edge")
        ours = lens.attribute(3, 5, by="edge", saes=dictionary("topk", site=site))
        assert {s.node.dest for s in ours.sources} == {s.node.dest for s in plain.sources}
        scale = float(plain.values.abs().max())
        for dest in {str(s.node.dest) for s in ours.sources}:
            a, b = (found.select(dest=dest).values.sum(1) for found in (ours, plain))
            assert float((a - b).abs().max()) < case.within("run") * scale
    kinds = {s.node.src.kind for s in ours.sources}
    assert {"feature", "error", "head", "embed"} <= kinds
    assert "L0MLP" not in {str(s.node.src) for s in ours.sources}


@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_circuits_are_runs_of_the_real_model(ablation):
    lens, model = lens_of(CASE), CASE.model()
    saes = [dictionary("topk", site=Z), transcoder(seed=2)]
    with quiet(), torch.no_grad():
        other = tensorlens_tl.capture(model, tokens(seed=1))[1]
    corrupted = other if ablation == "resample" else None
    kept = [saes[0].feature(i) for i in range(0, 128, 3)] + [saes[1].feature(7)]
    found = lens.feature_faithfulness(
        model, saes, kept, 3, 5, ablation=ablation, corrupted=corrupted
    )
    inputs = {}

    def changed(sae, keep):
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens(seed=1), return_cache_object=False)
        z = sae.encode(cache[sae.site].flatten(2)) * (corrupted is not None)

        def see(x, hook):
            inputs[sae.site] = x.flatten(2)

        def change(y, hook):
            moved = z - sae.encode(inputs[sae.site])
            moved[..., keep] = 0
            return y + (moved @ sae.W_dec).view(y.shape)

        return [(sae.site, see), (sae.writes, change)]

    for keep, values in (((slice(0, 128, 3), [7]), found.circuit), (([], []), found.ablated)):
        hooks = [hook for pair in zip(saes, keep, strict=True) for hook in changed(*pair)]
        with quiet(), torch.no_grad():
            logits = model.run_with_hooks(tokens(), fwd_hooks=hooks)[:, -1]
        assert_close(values, logits[:, 3] - logits[:, 5], ORACLE)
    every = [sae.feature(i) for sae in saes for i in range(sae.d_sae)]
    whole = lens.feature_faithfulness(model, saes, every, 3, 5)
    assert_close(whole.circuit, whole.full, ROUNDING)


def test_a_mix_of_sites_is_ranked_and_each_site_sums():
    lens = lens_of(CASE)
    saes = [dictionary(site=ATTN), dictionary(site=Z), dictionary(), transcoder(skip=True)]
    both = lens.attribute(3, by="feature", saes=saes)
    for place in ("attn_out", "z", "pre", "mlp_out"):
        own = [i for i, s in enumerate(both.sources) if s.node.name.split(".")[0] == place]
        assert_close(both.values[:, own].sum(1), both.target_value, 1e-12)
    assert set(features.error_shares(both)) == {"L1.attn_out", "L1.z", "L1.pre", "L1.mlp_out"}
    again = type(both).from_json(both.to_json())
    assert again.sources == both.sources
    ranked = lens.rank_edits(3, by="feature", saes=saes)
    rows = lens.attribute(3, by="feature", saes=saes[3]).sum("pos").select(kind="feature")
    at = [ranked.labels.index(str(source.node)) for source in rows.sources]
    assert_close(ranked.values[:, at], -rows.values, ROUNDING)


@pytest.mark.parametrize("site", [ATTN, Z, MLP, "transcoder"])
def test_removals_are_predicted_and_made(site):
    lens = lens_of(CASE)
    sae = transcoder() if site == "transcoder" else dictionary("topk", site=site)
    rows = lens.attribute(3, by="feature", saes=sae).sum("pos").select(kind="feature")
    at = int(rows.values[0].abs().argmax())
    one = sae.feature(rows.sources[at].node.index)
    edit = lens.edit(3, along=one, activation=0, positions=None)
    assert_close(edit.predicted, -rows.values[:, at], ORACLE)
    if site == ATTN and CASE.host == "bridge":
        return
    x = cache_of(CASE)[sae.site].flatten(2)
    change = -sae.encode(x)[..., one.index, None] * sae.W_dec[one.index]
    hook = (sae.writes, lambda y, hook: y + change.view(y.shape))
    with quiet(), torch.no_grad():
        logits = CASE.model().run_with_hooks(tokens(), fwd_hooks=[hook])[:, -1, 3]
    assert_close(edit.check(CASE.model()).real, logits - lens.logits[:, -1, 3], ORACLE)


@pytest.mark.parametrize("case", [*PER_SHAPE, *ENCODERS[:1]], ids=str)
def test_why_a_feature_of_an_mlp_fires(case):
    """Rows sum to it; removing a writer in the frozen real model moves it by the writer's row."""
    lens = lens_of(case)
    if MLP not in places_of(case):
        return
    points = ["mlp.hook_in"]
    if case not in ENCODERS and not _unfolded(lens):
        points.append("ln2.hook_normalized")
    for sae in (dictionary(site=MLP), *map(transcoder, points)):
        x = input_of(sae, lens.operator, lens.capture)
        i = int(sae.encode(x)[:, 4].amin(0).argmax())
        for one in (sae.feature(i), sae.feature(7, pre=True)):
            for by in ("token", "component", "neuron"):
                why = lens.attribute(one, pos=4, by=by)
                assert why.sums_to_target and why.completeness_error < case.within("run")
        assert_close(
            lens.attribute(sae.feature(i), pos=4).target_value, sae.encode(x)[:, 4, i], ORACLE
        )


@pytest.mark.parametrize("case", [c for c in PER_SHAPE if MLP in places_of(c)], ids=str)
def test_a_feature_of_an_mlp_falls_by_the_row_of_what_is_taken_away(case):
    lens = lens_of(case)
    frozen, start = FrozenModel(case.model(), tokens()), "blocks.0.hook_resid_pre"
    place = Place.of(MLP, lens.operator)
    mid, post = (lens.operator.sites[i] for i in (place.index, place.index + 1))
    delta = torch.zeros_like(lens.capture.input)
    delta[:, 2] = -lens.capture.input[:, 2]
    before, after = frozen(lens.capture.input)[1], frozen(lens.capture.input, {start: delta})[1]
    moved = {site: after[site] - before[site] for site in (mid, post)}
    read = place.branches[0].pre.apply(moved[mid])
    asked = [(transcoder("mlp.hook_in"), read)]
    if len(lens.operator.steps[place.index].branches) == 1:  # else attention writes beside it
        asked.append((dictionary(site=MLP), moved[post] - moved[mid]))
    for sae, change in asked:
        why = lens.attribute(sae.feature(7, pre=True), pos=4)
        rows = [i for i, s in enumerate(why.sources) if s.pos == 2]
        own = why.values[:, rows].sum(1)
        assert_close(change[:, 4] @ sae.W_enc[:, 7], -own, case.within("oracle"))
        assert own.abs().min() > 1e-3


def test_what_does_not_fit_is_refused():
    lens = lens_of(CASE)

    def refused(sae, match, lens=lens, ask="feature"):
        with pytest.raises(ValueError, match=match):
            lens.attribute(3, by=ask, saes=sae)

    refused(dictionary(site=MLP, d_in=16), "reads another width, 16")
    refused(dictionary(site=Z, d_in=24), "reads another width, 24")
    wide = weights() | {"W_dec": weights(d_in=16)["W_dec"], "b_dec": torch.zeros(16)}
    one = features.load(wide, site="blocks.1.hook_resid_mid", writes=MLP)
    refused(one, "writes another width, 16")
    refused(dictionary(site="blocks.7.hook_mlp_out"), "its last block is 1")
    refused(transcoder("attn.hook_pattern"), "no place that can be read")
    refused(features.load(weights(), site=MLP, writes="blocks.1.hook_resid_post"), "gives back")
    refused(features.load(weights(), site=MLP, writes="blocks.1.hook_q"), "no output of a sublayer")
    across = weights() | {"W_dec": weights()["W_dec"][:, None].expand(-1, 2, -1)}
    refused(features.load(across, site=Z, writes=MLP), "writes to several layers")
    for site in (ATTN, Z):
        with pytest.raises(ValueError, match="heads move what it reads"):
            lens.attribute(dictionary(site=site).feature(3))
    with pytest.raises(ValueError, match="reads another width, 16"):
        lens.attribute(dictionary(site=MLP, d_in=16).feature(3))
    for case in (*PER_SHAPE, *ENCODERS[:1]):
        own = lens_of(case)
        if "attn-only" in case.name:
            refused(dictionary(site=MLP), "that block has no MLP", own)
        if "blocks.1.hook_resid_mid" not in own.operator.sites and MLP in places_of(case):
            refused(transcoder(), "no residual site", own)
        if case in ENCODERS:
            refused(transcoder("ln2.hook_normalized"), "no norm of its own", own)
            for site in (ATTN, "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"):
                refused(dictionary(site=site), "normalizes the residual", own)
