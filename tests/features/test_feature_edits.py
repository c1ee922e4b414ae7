"""Features edited, ranked, and proved in the real model as circuits."""

import pytest
import torch
from comparisons import assert_close
from dictionaries import dictionary, weights
from models import ORACLE, PER_SHAPE, ROUNDING, lens_of, quiet, tokens

import tensorlens_tl
from tensorlens_tl import features

CASE = PER_SHAPE[0]
PRE, POST = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"


def run(hooks, ids=None):
    """The logits of the real model at the last position, its sites changed."""
    fwd = [(site, lambda x, hook, change=change: change(x)) for site, change in hooks]
    with quiet(), torch.no_grad():
        ids = tokens() if ids is None else ids
        return CASE.model().run_with_hooks(ids, fwd_hooks=fwd)[:, -1]


def strongest(lens, sae):
    found = lens.attribute(3, by="feature", saes=sae).sum("pos").select(kind="feature")
    return sae.feature(found.sources[int(found.values[0].abs().argmax())].node.index), found


@pytest.mark.parametrize("kind", ["topk", "layer norm"])
def test_removals_are_ranked_predicted_and_made(kind):
    lens, sae = lens_of(CASE), dictionary(kind, site=PRE)
    feature, rows = strongest(lens, sae)
    ranked = lens.rank_edits(3, by="feature", saes=sae)
    names = [str(source.node) for source in rows.sources]
    assert sorted(ranked.labels) == sorted(names)
    assert_close(ranked.values, -rows.values[:, [names.index(n) for n in ranked.labels]], ROUNDING)
    edit = lens.edit(3, along=feature, activation=0, positions=None)
    at = ranked.labels.index(f"L1.preF{feature.index}")
    assert_close(edit.predicted, ranked.values[:, at], ORACLE)
    check = edit.check(CASE.model())

    def without(x):
        z = sae.encode(x)[..., feature.index, None]
        return x - z * sae.W_dec[feature.index] * sae.normed(x).unscale

    real = run([(PRE, without)])[:, 3] - lens.logits[:, -1, 3]
    assert_close(check.real, real, ORACLE)


def test_the_smallest_edit_along_a_feature_reaches_what_is_asked():
    lens, sae = lens_of(CASE), dictionary("topk", site=PRE)
    feature, _ = strongest(lens, sae)
    for options in ({"by": -0.5}, {"to": 2.0}):
        edit = lens.edit(3, along=feature, positions=None, **options)
        wanted = options.get("by", 2.0) - (0 if "by" in options else edit.before)
        assert_close(edit.predicted, torch.full_like(edit.before, 0) + wanted, ORACLE)
        d = sae.W_dec[feature.index]
        off = edit.delta - (edit.delta @ d)[..., None] * d / (d @ d)
        assert float(off.abs().max()) < 1e-12 * float(edit.delta.abs().max())
    g = lens.covector(3, site=PRE) @ sae.W_dec[feature.index]
    raised = lens.edit(3, along=feature, activation=4.0)
    z = sae.encode(lens.operator.states()[PRE])[:, -1, feature.index]
    assert_close(raised.predicted, (4 - z) * g[:, -1], ORACLE)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_circuits_of_features_are_runs_of_the_real_model(ablation):
    lens, model = lens_of(CASE), CASE.model()
    saes = [dictionary("topk", site="blocks.1.hook_resid_pre"), dictionary("gated", site=POST)]
    with quiet(), torch.no_grad():
        other = tensorlens_tl.capture(model, tokens(seed=1))[1]
    corrupted = other if ablation == "resample" else None
    kept = [saes[0].feature(int(i)) for i in (0, 5, 9, 40)] + [saes[1].feature(7)]
    found = lens.feature_faithfulness(
        model, saes, kept, 3, 5, ablation=ablation, corrupted=corrupted
    )
    assert_close(found.full, lens.logits[:, -1, 3] - lens.logits[:, -1, 5], ROUNDING)

    def replaced(sae, keep, site):
        source = other if corrupted else lens
        states = source.operator.states() | {POST: source.capture.resid_final}
        z = sae.encode(states[site])
        z = {"zero": 0 * z, "mean": z.mean((0, 1)).expand_as(z), "resample": z}[ablation]

        def change(x):
            moved = z - sae.encode(x)
            moved[..., keep] = 0
            return x + moved @ sae.W_dec

        return site, change

    for keep, values in (([[0, 5, 9, 40], [7]], found.circuit), ([[], []], found.ablated)):
        pairs = zip(saes, keep, (PRE, POST), strict=True)
        logits = run([replaced(*pair) for pair in pairs])
        assert_close(values, logits[:, 3] - logits[:, 5], ORACLE)
    assert "features, " in repr(found) and found.n_edges == 5
    every = [sae.feature(i) for sae in saes for i in range(sae.d_sae)]
    whole = lens.feature_faithfulness(
        model, saes, every, 3, 5, ablation=ablation, corrupted=corrupted
    )
    assert_close(whole.circuit, found.full, ROUNDING)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_a_number_keeps_the_features_of_the_largest_predicted_effects(ablation):
    lens, model, sae = lens_of(CASE), CASE.model(), dictionary("layer norm", site=PRE)
    with quiet(), torch.no_grad():
        other = tensorlens_tl.capture(model, tokens(seed=1))[1]
    corrupted = other if ablation == "resample" else None
    x, y = (each.operator.states()[PRE] for each in (lens, other))
    z, there = sae.encode(x), sae.encode(y)
    new = {"zero": 0 * z, "mean": z.mean((0, 1)).expand_as(z), "resample": there}[ablation]
    g = lens.covector(3, versus=5, site=PRE) * sae.normed(x).unscale
    effects = torch.einsum("bpf,bpd,fd->bf", new - z, g, sae.W_dec)
    order = effects.sum(0).abs().argsort(descending=True)
    kept = [sae.feature(int(i)) for i in order[:9]]
    options = {"ablation": ablation, "corrupted": corrupted}
    ranked = lens.rank_edits(3, 5, by="feature", saes=sae, **options)
    assert [one.index for one in ranked.features(9)] == order[:9].tolist()
    assert_close(ranked.values, effects[:, [one.index for one in ranked.every_feature]], ORACLE)
    assert ranked.top(1)[0][0] == f"L1.preF{int(order[0])}"
    ours = lens.feature_faithfulness(model, sae, 9, 3, 5, **options)
    theirs = lens.feature_faithfulness(model, sae, kept, 3, 5, **options)
    assert ours.n_edges == 9 and torch.equal(ours.circuit, theirs.circuit)
    assert not torch.equal(ours.circuit, ours.ablated)
    with pytest.raises(ValueError, match="keep=129 is no number of features"):
        lens.feature_faithfulness(model, sae, 129, 3, 5, **options)


def test_a_run_with_an_sae_spliced_in_has_its_error_as_a_constant():
    model, sae = CASE.model(), dictionary("gated", site=PRE)
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=sae.hooks()):
        logits, lens = tensorlens_tl.capture(model, tokens())
    assert_close(logits[:, -1], run([(PRE, sae.reconstruct)]), ROUNDING)
    found = lens.attribute(3, by="component", effect="total")
    source = f"L1.{PRE.rpartition('.')[2]}[user]"
    at = [i for i, s in enumerate(found.sources) if str(s.node) == source]
    before = lens_of(CASE).operator.states()[PRE]  # what stood there without the SAE
    moved = (sae.reconstruct(before) - before) * lens.covector(3, site=PRE)
    assert_close(found.values[:, at], moved.sum(-1), ORACLE)
    assert lens.attribute(3).completeness_error < CASE.within("run")
    with pytest.raises(ValueError, match="Splice in an SAE"):
        features.load(weights(), site=PRE, writes=POST).hooks()


def test_what_does_not_fit_is_refused():
    lens, model, sae = lens_of(CASE), CASE.model(), dictionary("topk", site=PRE)

    def refused(match, ask, *given, **options):
        with pytest.raises(ValueError, match=match):
            ask(*given, **options)

    one = sae.feature(3)
    refused("needs one of to=", lens.edit, 3, along=one)
    refused("names the site", lens.edit, 3, along=one, site=1, by=1.0)
    refused("names the site", lens.edit, 3, along="L1F3", by=1.0)
    refused("site= is missing", lens.edit, 3, by=1.0)
    refused("activation= needs along=", lens.edit, 3, site=1, activation=1.0)
    refused("do not go together", lens.rank_edits, 3, by="feature")
    refused("do not go together", lens.rank_edits, 3, by="head", saes=sae)
    refused("for by='feature'", lens.rank_edits, 3, by="head", ablation="mean")
    refused("does not exist", lens.rank_edits, 3, by="feature", saes=sae, ablation="noise")
    refused("edits are by head", lens.rank_edits(3, by="head").features)
    refused("features are not there", lens.rank_edits(3, by="feature", saes=sae).features, 999)
    ask = lens.feature_faithfulness
    refused("does not exist", ask, model, sae, [], 3, ablation="noise")
    refused("do not go together", ask, model, sae, [], 3, ablation="resample")
    refused("no feature of saes", ask, model, sae, [dictionary().feature(3)], 3)
    refused("names no SAE", ask, model, None, [], 3)
    with quiet(), torch.no_grad():
        short = tensorlens_tl.capture(model, tokens(seq=5))[1]
    refused("of the same lengths", ask, model, sae, [], 3, ablation="resample", corrupted=short)
