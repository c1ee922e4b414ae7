"""A target split by feature sums to it, whatever the dictionary; its rows are what a run shows."""

import warnings

import pytest
import torch
from comparisons import assert_close
from dictionaries import KINDS, D, dictionary, weights
from models import ENCODERS, ORACLE, PER_SHAPE, lens_of, quiet, tokens
from oracles import FrozenModel

import tensorlens_tl
from tensorlens_tl import features

pytestmark = [
    pytest.mark.algebra,
    pytest.mark.filterwarnings("ignore:The error of FeatureDictionary"),
]

PRE = "blocks.1.hook_resid_pre"
POST = "blocks.1.hook_resid_post"
CASE = PER_SHAPE[0]


def firing(lens, sae, site, pos=-1):
    """The number of the feature that fires most at a position of the first prompt."""
    state = lens.capture.resid_final if site == POST else lens.operator.states()[site]
    return int(sae.encode(state[0, pos]).argmax())


@pytest.mark.parametrize("case", [*PER_SHAPE, *ENCODERS[:1]], ids=str)
def test_rows_sum_to_the_target_at_every_site(case):
    lens = lens_of(case)
    sites = [PRE] if case in ENCODERS else [*lens.operator.sites[:-1], POST]
    for site in sites:
        found = lens.attribute(3, 5, by="feature", saes=dictionary(site=site))
        assert found.sums_to_target and {"feature", "error"} <= {s.node.kind for s in found.sources}
        assert found.completeness_error < case.within("run")
    prob = lens.attribute(3, by="feature", of="logprob", saes=dictionary())
    assert prob.completeness_error < case.within("run")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_sums_and_tells_why_its_features_fire(kind):
    lens, sae = lens_of(CASE), dictionary(kind)
    found = lens.attribute(3, by="feature", saes=sae)
    assert found.completeness_error < CASE.within("run")
    state = lens.operator.states()[PRE]
    assert_close(sae.encode(state), _plain(sae, kind, state), 1e-12)
    for one in (sae.feature(firing(lens, sae, PRE)), sae.feature(4, pre=True)):
        for by in ("token", "component", "head"):
            why = lens.attribute(one, by=by)
            assert why.sums_to_target and why.completeness_error < CASE.within("run")
        below = lens.attribute(one, by="feature", saes=dictionary(site="blocks.0.hook_resid_mid"))
        assert below.completeness_error < CASE.within("run")


def _plain(sae, kind, x):
    """The activations, written out."""
    w = weights(KINDS[kind])
    if kind == "layer norm":
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    if kind == "constant norm":
        x = x * D**0.5 / x.norm(dim=-1, keepdim=True)
    x = x if kind == "input as it is" else x - w["b_dec"]
    if kind == "gated":
        size = x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]
        return size.relu() * (x @ w["W_enc"] + w["b_gate"] > 0)
    a = x @ w["W_enc"] + w["b_enc"]
    if "topk" in kind:
        a = a * w["W_dec"].norm(dim=-1) if kind.startswith("rescaled") else a
        ranked = a.abs() if kind == "abstopk" else a
        least = ranked.sort(dim=-1).values[..., -sae.k, None]
        return torch.where(ranked >= least, a if kind == "abstopk" else a.relu(), 0)
    if kind == "jumprelu":
        return torch.where(a > w["threshold"], a.relu(), 0)
    return a.relu().tanh() if kind == "tanh" else a.relu()


@pytest.mark.parametrize("case", [c for c in PER_SHAPE if "solu" not in c.name], ids=str)
def test_removing_a_feature_in_the_frozen_real_model_moves_the_target_by_its_row(case):
    lens, frozen = lens_of(case), FrozenModel(case.model(), tokens())
    sae = dictionary("topk")
    direction = torch.linspace(-1, 1, D, dtype=torch.float64)
    found = lens.attribute(direction, by="feature", saes=sae)
    x = lens.capture.input
    plain, _ = frozen(x)
    state = lens.operator.states()[PRE]
    z = sae.encode(state)
    later = dictionary("topk", site=POST, seed=1)
    i = firing(lens, later, POST)
    why = lens.attribute(later.feature(i, pre=True), by="feature", saes=sae)
    before = later.pre_activations(frozen(x)[1][POST])[0][:, -1, i]
    for pos in (2, 6):
        number = int(z[0, pos].argmax())
        delta = torch.zeros_like(state)
        delta[:, pos] = -z[:, pos, number, None] * sae.W_dec[number]
        y, sites = frozen(x, {PRE: delta})
        moved = (y - plain)[:, -1] @ direction
        assert_close(moved, -_row(found, f"L1.preF{number}", pos), case.within("oracle"))
        moved = later.pre_activations(sites[POST])[0][:, -1, i] - before
        assert_close(moved, -_row(why, f"L1.preF{number}", pos), case.within("oracle"))


def _row(found, node, pos=None):
    (at,) = [i for i, s in enumerate(found.sources) if (str(s.node), s.pos) == (node, pos)]
    return found.values[:, at]


@pytest.mark.parametrize("case", PER_SHAPE, ids=str)
def test_edges_from_features_sum_to_what_each_reader_reads(case):
    lens, sae = lens_of(case), dictionary("layer norm", site="blocks.0.hook_resid_post")
    plain = lens.attribute(3, 5, by="edge")
    ours = lens.attribute(3, 5, by="edge", saes=sae)
    dests = {str(s.node.dest) for s in ours.sources}
    assert dests == {str(s.node.dest) for s in plain.sources if s.node.dest.layer != 0}
    assert len(dests) > 2
    scale = float(plain.values.abs().max())
    for dest in dests:
        a, b = (found.select(dest=dest).values.sum(1) for found in (ours, plain))
        assert float((a - b).abs().max()) < case.within("run") * scale
    assert_close(ours.select(dest="logits").values.sum(1), ours.target_value, case.within("run"))
    # The last site has one reader, and its edges are the rows of the split by feature.
    last = dictionary("topk", site=POST)
    whole = lens.attribute(3, by="edge", saes=last)
    rows = lens.attribute(3, by="feature", saes=last).sum("pos")
    found = {str(s.node.src): whole.values[:, i] for i, s in enumerate(whole.sources)}
    for i, source in enumerate(rows.sources):
        assert_close(found[str(source.node)], rows.values[:, i], case.within("oracle"))


def test_queries_and_keys_read_features_to_first_order():
    """The edges of an orthonormal dictionary's features sum to those of all that came before."""
    lens, sae = lens_of(CASE), dictionary("topk", site="blocks.0.hook_resid_post")
    plain = lens.attribute(3, by="edge", qk=True)
    ours = lens.attribute(3, by="edge", qk=True, saes=sae)
    for dest in ("L1H0.q", "L1H2.k", "L1H1.v"):
        before = plain.select(dest=dest)
        own = ("q", "k")  # readers of the pattern have no constants of their own
        assert dest[-1] not in own or all(s.node.src.layer in (None, 0) for s in before.sources)
        assert_close(ours.select(dest=dest).values.sum(1), before.values.sum(1), ORACLE)
    edge = ours.select(kind="feature", dest="L1H0.q")
    assert float(edge.values.abs().max()) > 0 and not edge.sources[0].node.conserved
    # A feature as the target: the heads between two sites read features for it.
    later = dictionary("topk", site=POST, seed=1)
    one = later.feature(firing(lens, later, POST))
    why = lens.attribute(one, by="edge", qk=True, saes=sae)
    assert_close(why.select(dest="logits").values.sum(1), why.target_value, ORACLE)
    assert {"L1H0.v", "L1H0.q", "L1H0.k"} <= {str(s.node.dest) for s in why.sources}
    with pytest.raises(ValueError, match="with 2 SAEs"):
        lens.attribute(3, by="edge", saes=[sae, later])
    with pytest.raises(ValueError, match="qk=True is not available"):
        lens.attribute(3, by="feature", qk=True, saes=sae)


def test_an_orthonormal_dictionary_without_error_is_the_split_by_dimension_rotated():
    lens = lens_of(CASE)
    Q, _ = torch.linalg.qr(weights()["W_enc"][:, :D])
    for turn in (torch.eye(D, dtype=torch.float64), Q):
        zero = torch.zeros(D, dtype=torch.float64)
        parts = {"W_enc": turn, "W_dec": turn.T, "b_enc": zero, "b_dec": zero}
        sae = features.load(parts, site=POST, config={"architecture": "abstopk", "k": D})
        found = lens.attribute(3, by="feature", saes=sae)
        assert float(abs(_errors(found)).max()) < 1e-12
        rows = torch.stack([_row(found, f"L1.postF{i}", 6) for i in range(D)], 1)
        y = lens.capture.resid_final[:, -1]
        g = lens.covector(3, site=POST)[:, -1]
        assert_close(rows, (y @ turn) * (g @ turn), 1e-12)
        if turn is not Q:
            dims = lens.attribute(3, by="dimension")
            assert_close(rows, dims.values[:, :D], ORACLE)


def _errors(found):
    return found.values[:, [i for i, s in enumerate(found.sources) if s.node.kind == "error"]]


def test_several_sites_each_sum_to_the_target_and_errors_are_told():
    lens = lens_of(CASE)
    pair = [dictionary(site="blocks.0.hook_resid_mid"), dictionary("topk")]
    both = lens.attribute(3, by="feature", saes=pair)
    assert not both.sums_to_target
    for place in ("mid", "pre"):
        own = [i for i, s in enumerate(both.sources) if s.node.name.split(".")[0] == place]
        assert_close(both.values[:, own].sum(1), both.target_value, 1e-12)
    shares = features.error_shares(both)
    assert {site: tuple(share.shape) for site, share in shares.items()} == {
        "L0.mid": (2, 7),
        "L1.pre": (2, 7),
    }
    one = lens.attribute(3, by="feature", saes=pair[1])
    at = [i for i, s in enumerate(one.sources) if s.pos == 2]
    error = _row(one, "L1.pre.error", 2).abs()
    assert_close(shares["L1.pre"][:, 2], error / one.values[:, at].abs().sum(1), 1e-12)
    # One share of a site, in words, whatever is passed beside.
    rows = [i for i, s in enumerate(one.sources) if s.pos is not None]
    share = float(_errors(one)[0].abs().sum() / one.values[0, rows].abs().sum())
    said = f"{share:.0%} of Σ|·| at L1.pre"
    assert "L1.pre.error:" in repr(one[0]) and said in repr(one[0]) and said in repr(both[0])
    again = type(one).from_json(one.to_json())
    assert again.sources == one.sources and torch.equal(again.values, one.values)


def test_padded_prompts_are_split_as_alone():
    ids, mask = tokens(), torch.ones(2, 7)
    mask[1, 4:] = 0
    with quiet(), torch.no_grad():
        batch = tensorlens_tl.capture(CASE.model(), ids, attention_mask=mask)[1]
        alone = tensorlens_tl.capture(CASE.model(), ids[1:, :4])[1]
    for sae in (dictionary("topk"), dictionary("layer norm")):
        ours, theirs = (lens.attribute(3, by="feature", saes=sae) for lens in (batch[1], alone))
        assert ours.sources == theirs.sources and ours.labels == theirs.labels
        assert_close(ours.values, theirs.values, CASE.within("padded"))
        whole = batch.attribute(3, by="feature", saes=sae)
        assert whole.completeness_error < CASE.within("run")


def test_float32_sums_to_two_millionths():
    lens = lens_of(CASE, torch.float32)
    for kind in KINDS:
        found = lens.attribute(3, by="feature", saes=dictionary(kind, dtype=torch.float32))
        assert found.completeness_error < 2e-6


def test_a_bad_dictionary_is_warned_about_and_a_wrong_one_refused():
    lens = lens_of(CASE)
    bad = weights() | {"W_dec": weights()["W_dec"] * 1e-6, "b_dec": weights()["b_dec"] * 0}
    with pytest.warns(UserWarning, match="more than its features"):
        lens.attribute(3, by="feature", saes=features.load(bad, site=PRE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens.attribute(3, by="feature", saes=dictionary())

    def asked(sae, match, **options):
        with pytest.raises(ValueError, match=match):
            lens.attribute(options.pop("target", 3), by="feature", saes=sae, **options)

    asked(dictionary(d_in=16), "another width")
    asked(dictionary(site="blocks.7.hook_resid_pre"), "no residual site")
    asked(dictionary(site="blocks.1.hook_nothing"), "no site of the residual stream")
    asked(features.load(weights(), site=PRE, config={"model_name": "gpt2"}), "trained on 'gpt2'")
    asked(None, "names no SAE")
    asked("sae", "names no SAE")
    asked([dictionary(), dictionary("topk")], "2 dictionaries that write at 'blocks.1.hook_resid")
    with pytest.raises(ValueError, match=r"site=1 is no hook point\. Pass its name"):
        features.load(weights(), site=1)
    asked(dictionary(), "cannot be combined", baseline="zero")
    if ENCODERS:
        with pytest.raises(ValueError, match="norms of the residual"):
            lens_of(ENCODERS[0]).attribute(3, by="edge", saes=dictionary())
    asked(
        dictionary(site=POST), "after the target's site", target=dictionary().feature(3, pre=True)
    )
    with pytest.raises(ValueError, match="names no SAE"):
        lens.attribute(3, by="feature")
    for name, value in (("versus", 5), ("site", 0), ("baseline", "zero")):
        with pytest.raises(ValueError, match=f"{name}= cannot be combined with a feature"):
            lens.attribute(dictionary().feature(3, pre=True), **{name: value})
    sae = dictionary("topk")
    silent = int((sae.encode(lens.operator.states()[PRE])[:, -1] == 0).all(0).nonzero()[0])
    with pytest.raises(ValueError, match="does not fire"):
        lens.attribute(sae.feature(silent))
    assert lens.attribute(sae.feature(silent, pre=True)).target[0].endswith("its activation")
    with pytest.raises(ValueError, match="no feature of"):
        sae.feature(128)
    with pytest.raises(ValueError, match="no error rows"):
        features.error_shares(lens.attribute(3))
    with pytest.raises(ValueError, match="no token and no direction"):
        lens.attribute(object())


def test_a_plan_counts_what_fires_or_may_fire():
    lens = lens_of(CASE)
    sweep = lens.plan("attribute")
    few = dictionary("topk", site=PRE, d_sae=256)
    many = dictionary("topk", site="blocks.0.hook_resid_mid", d_sae=1024)
    small, large = (lens.plan("attribute", by="feature", saes=sae) for sae in (few, many))
    encoding = 2 * 14 * D * (1024 - 256)
    assert large.flops - small.flops == encoding and small.flops > sweep.flops
    both = lens.plan("attribute", by="feature", saes=[few, many])
    assert both.flops - small.flops == large.flops - sweep.flops
    assert both.peak_bytes > small.peak_bytes > sweep.peak_bytes
    sparse = dictionary("jumprelu", site=PRE, d_sae=1024)  # all may fire, until it is read
    before = lens.plan("attribute", by="feature", saes=sparse)
    found = lens.attribute(3, by="feature", saes=sparse)
    after = lens.plan("attribute", by="feature", saes=sparse)
    fired = int((sparse.encode(lens.operator.states()[PRE]) != 0).sum())
    assert found.values.shape[1] < 14 * 1024 and after.flops == sweep.flops + 2 * fired * D
    assert after.peak_bytes < before.peak_bytes
    for saes, match in ((None, "names no SAE"), (dictionary(site="blocks.1.hook_q"), "no output")):
        with pytest.raises(ValueError, match=match):
            lens.plan("attribute", by="feature", saes=saes)
