"""Targets beyond one logit: log-probabilities, and directions at any residual site."""

import numpy as np
import pytest
import torch
from comparisons import assert_close
from models import (
    D_VOCAB,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    TWO_RUNS,
    lens_of,
    quiet,
    randn_like,
    tokens,
)

import tensorlens_tl
from tensorlens_tl.attribution.splits import BY, TOTALS

pytestmark = pytest.mark.algebra

every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)
SUMMED = [by for by in BY if by != "edge"]


# --- Log-probabilities


def rows(attribution, *names):
    """The values of the rows of some names, by name."""
    found = {str(s.node): attribution.values[:, i] for i, s in enumerate(attribution.sources)}
    return [found[name] for name in names]


@every_case
def test_log_probabilities_sum_and_say_what_is_not_split(case):
    lens = lens_of(case)
    logits = lens.logits[:, 3].double()
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    for by in SUMMED:
        found = lens.attribute(5, pos=3, by=by, of="logprob")
        assert_close(found.target_value, log_p[:, 5], ROUNDING)
        assert_close(found.values.sum(1), log_p[:, 5], case.within("run"))
        names = lens.attribute(5, pos=3, by=by).target
        assert found.sums_to_target and found.target == tuple(f"log p({name})" for name in names)
        if by != "order":  # there the constants have passed no node: order 0
            assert_close(rows(found, "softmax")[0], -entropy, ORACLE)
    # Without the entropy it is the logit less the mean logit, a direction that is split as ever.
    found = lens.attribute(5, pos=3, by="component", of="logprob")
    for prompt in range(2):
        direction = torch.eye(D_VOCAB, dtype=torch.float64)[5] - p[prompt]
        plain = lens.attribute(direction, pos=3, by="component")
        kept = [i for i, s in enumerate(found.sources) if str(s.node) != "softmax"]
        assert_close(found.values[prompt, kept], plain.values[prompt], ORACLE)


@every_case
def test_log_probabilities_by_edge_between_runs_and_many_at_once(case):
    lens, model = lens_of(case), case.model()
    edges = lens.attribute(5, by="edge", of="logprob").select(dest="logits")
    log_p = lens.logits[:, -1].double().log_softmax(-1)
    assert_close(edges.values.sum(1), log_p[:, 5], case.within("run"))
    with quiet(), torch.no_grad():
        other = tensorlens_tl.capture(model, tokens(seed=1))[1]
    expected = log_p[:, 5] - other.logits[:, -1].double().log_softmax(-1)[:, 5]
    for at in ("clean", "corrupted", "secant"):
        if at == "secant" and "solu" in case.name:
            continue
        for by in ("token", "component"):
            found = lens.attribute(5, by=by, baseline=other, at=at, of="logprob")
            assert_close(found.values.sum(1), expected, case.within("two runs"))
            assert_close(found.target_value, expected, ORACLE)
    many = lens.attribute_many([3, None], pos=[1, 2], of="logprob")
    for (target, pos), one in zip(((3, 1), (None, 2)), many, strict=True):
        assert_close(one.values, lens.attribute(target, pos=pos, of="logprob").values, ORACLE)


def test_the_difference_of_two_log_probabilities_is_that_of_the_logits():
    lens = lens_of(SHAPES[0])
    a, b = lens.attribute(5, 6, of="logprob"), lens.attribute(5, 6)
    assert torch.equal(a.values, b.values) and a.target == b.target
    log_p = lens.logits[:, -1].log_softmax(-1)
    assert_close(a.target_value, log_p[:, 5] - log_p[:, 6], ROUNDING)


def test_means_of_log_probabilities():
    model, prompts = SHAPES[0].model(), list(tokens())
    with quiet():
        found = tensorlens_tl.mean_attribution(model, prompts, 3, by="component", of="logprob")
    expected = lens_of(SHAPES[0]).attribute(3, by="component", of="logprob")
    assert_close(found.mean, expected.values.mean(0), ORACLE)
    assert found.target_mean == pytest.approx(float(expected.target_value.mean()))


# --- Directions at a site


def direction(lens):
    return randn_like(lens.embedding[0, 0], seed=3)


def states(lens):
    """Every residual site by all its names, with the run's state there."""
    capture, found = lens.capture, {}
    for i, block in enumerate(capture.blocks):
        found[f"blocks.{i}.hook_resid_pre"] = block.resid_pre
        if i:
            found[f"blocks.{i - 1}.hook_resid_post"] = block.resid_pre
        if block.resid_mid is not None:
            found[f"blocks.{i}.hook_resid_mid"] = block.resid_mid
    found[f"blocks.{len(capture.blocks) - 1}.hook_resid_post"] = capture.resid_final
    return found | {"unembed.hook_in": capture.unembed.final}


@every_case
def test_a_direction_at_any_site_is_split_exactly(case):
    lens = lens_of(case)
    d = direction(lens)
    with quiet(), torch.no_grad():
        _, cache = case.model().run_with_cache(tokens())
    for site, state in states(lens).items():
        if "hook_resid" in site:  # the host's own value
            assert_close(state, cache[site].double(), case.within("run"))
        for by in SUMMED:
            found = lens.attribute(d, site=site, pos=4, by=by)
            assert_close(found.target_value, state[:, 4] @ d, ROUNDING)
            assert_close(found.values.sum(1), state[:, 4] @ d, case.within("run"))
            assert "b_U" not in [str(s.node) for s in found.sources]
        total = lens.attribute(d, site=site, pos=4, by="component", effect="total")
        embedded = lens.attribute(d, site=site, pos=4).values[:, : total.values.shape[1]]
        assert embedded.isfinite().all() and total.values.isfinite().all()
        edges = lens.attribute(d, site=site, pos=4, by="edge").select(dest="logits")
        assert_close(edges.values.sum(1), state[:, 4] @ d, case.within("run"))


@every_case
def test_total_effects_on_a_site_are_those_along_the_operator_between(case):
    lens = lens_of(case)
    d, site = direction(lens), "blocks.1.hook_resid_pre"
    part = lens.between("blocks.0.hook_resid_pre", site)
    u = torch.zeros_like(lens.embedding)
    u[:, 4] = d
    expected = ((part.T @ u) * lens.embedding).sum((-2, -1))
    found = lens.attribute(d, site=site, pos=4)
    embedded = [i for i, s in enumerate(found.sources) if "embed" in str(s.node)]
    assert_close(found.values[:, embedded].sum(1), expected, ORACLE)
    for by in TOTALS:
        if by in ("mlp", "neuron", "expert") and lens.capture.blocks[0].mlp is None:
            continue
        assert lens.attribute(d, site=site, by=by, effect="total").values.abs().sum() > 0


@every_case
def test_names_of_sites_differences_and_many_directions(case):
    lens, model = lens_of(case), case.model()
    d, e = direction(lens), randn_like(lens.embedding[0, 0], seed=4)
    by_name = lens.attribute(d, e, site="blocks.0.hook_resid_post")
    assert_close(by_name.target_value, lens.capture.blocks[1].resid_pre[:, -1] @ (d - e), ORACLE)
    assert_close(by_name.values.sum(1), by_name.target_value, case.within("run"))
    for site in (0, np.int64(0), -len(lens.capture.blocks), "blocks.1.hook_resid_pre"):
        again = lens.attribute(d, e, site=site)
        assert torch.equal(again.values, by_name.values)
    many = lens.attribute_many([d, e], site=0)
    assert_close(many[0].values - many[1].values, by_name.values, TWO_RUNS)
    with quiet(), torch.no_grad():
        other = tensorlens_tl.capture(model, tokens(seed=1))[1]
    expected = by_name.target_value - other.attribute(d, e, site=0).target_value
    ways = ("clean", "secant") if "solu" not in case.name else ("clean",)
    for at in ways:
        found = lens.attribute(d, e, site=0, baseline=other, at=at)
        assert_close(found.values.sum(1), expected, case.within("two runs"))
        changes = [s for s in found.sources if getattr(s.node, "kind", "") == "change"]
        assert bool(changes) == (at == "clean")
    zero = lens.attribute(d, site=0, baseline="zero")
    assert_close(zero.values.sum(1), zero.target_value, case.within("run"))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": 3, "of": "prob"}, "of='prob' does not exist. Use 'logit' or 'logprob'"),
        ({"target": torch.ones(D_VOCAB), "of": "logprob"}, "of='logprob' is for tokens"),
        ({"target": torch.ones(32), "site": 0, "of": "logprob"}, "is not available with site="),
        ({"target": 3, "site": 0}, r"target=3 is no direction, which site= needs. Pass one \[32\]"),
        ({"site": 0}, "target=None is no direction, which site= needs"),
        (
            {"target": torch.ones(D_VOCAB), "site": 0},
            r"target= of shape \[50\] is no direction at blocks\.0\.hook_resid_post",
        ),
        ({"target": torch.ones(32), "versus": 3, "site": 0}, "versus=3 is no direction"),
        (
            {"target": torch.ones(32), "site": "blocks.0.hook_attn_out"},
            r"no residual site 'blocks\.0\.hook_attn_out'. Pass one of "
            r"blocks\.0\.hook_resid_pre, blocks\.0\.hook_resid_mid, blocks\.0\.hook_resid_post, "
            r"blocks\.1\.hook_resid_pre",
        ),
        ({"target": torch.ones(32), "site": 9}, "no residual site 9"),
        ({"target": torch.ones(32), "site": True}, "no residual site True"),
        # The argument is named as typed.
        ({"target": 3, "versus": 99}, "versus=99 is outside the vocabulary"),
        ({"target": 3, "versus": 3.0}, "versus=3.0 of type float is no token"),
        ({"target": 3, "versus": "x"}, "versus='x' is a string, but the model has no tokenizer"),
        ({"target": 3, "versus": torch.ones(4)}, r"versus= of shape \[4\] is no direction"),
        ({"target": 3, "versus": torch.full((32,), torch.nan)}, "versus= is a direction with nan"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lens_of(SHAPES[0]).attribute(**kwargs)


# --- Strings


def test_unknown_words_and_words_of_several_pieces(demo_lens):
    with pytest.raises(
        ValueError,
        match=r"target='Mry' is not known to the tokenizer, which knows whole words only. Pass a "
        "known token such as 'Mary'",
    ):
        demo_lens.attribute("Mry")
    with pytest.raises(ValueError, match=r"versus='Rme' is not known.* such as 'Rome'"):
        demo_lens.attribute("Paris", versus="Rme")
    with pytest.raises(ValueError, match=r"versus='Paris Rome' is 2 tokens: .*attribute_sequence"):
        demo_lens.attribute("Paris", versus="Paris Rome")


@pytest.mark.wrong_types
def test_discover_names_its_own_arguments(demo_lens):
    for at in ("secant", "corrupted"):
        with pytest.raises(ValueError, match=f"at='{at}' needs a corrupted run. Pass corrupted="):
            demo_lens.discover("Paris", n_edges=5, at=at)
    with pytest.raises(ValueError, match=r"corrupted is a str, not a lens. Capture the corrupted"):
        demo_lens.discover("Paris", n_edges=5, corrupted="The capital of Italy is")


@pytest.fixture(scope="module")
def demo_lens():
    from tensorlens_tl import demo

    return demo.load_model().run_with_tensorlens("The capital of France is")[1]
