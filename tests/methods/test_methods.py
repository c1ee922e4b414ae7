"""Every method by one call: the operator's collapses beside the baselines, rows as scores."""

import pytest
import torch
from comparisons import assert_close
from models import CASES, ROUNDING, lens_of, quiet
from test_baselines_gradient import QUICK, ragged

from tensorlens_tl.attribution.targets import resolve_target
from tensorlens_tl.methods import baselines
from tensorlens_tl.methods.baselines import BASELINES
from tensorlens_tl.methods.operator_matrices import OPERATOR_METHODS
from tensorlens_tl.methods.registry import METHODS

pytestmark = pytest.mark.algebra

FEW = [c for c in CASES.values() if c.name.split("-", 1)[1] in ("gpt2", "llama")]
every_few = pytest.mark.parametrize("case", FEW, ids=str)


@every_few
@pytest.mark.parametrize("name", list(METHODS))
def test_one_call_serves_every_method(case, name):
    dtype = torch.float32 if case.float32_norms else torch.float64
    lens, model, options = ragged(case, "right", dtype), case.model(dtype), QUICK.get(name, {})
    with quiet():
        matrix = lens.token_matrix(name, model=model, **options)
        scores = lens.token_scores(name, 3, 5, model=model, **options)
    assert matrix.kind == scores.method == name and len(matrix) == len(scores) == 3
    assert matrix.values.shape == (3, 7, 7) and scores.values.shape == (3, 7)
    assert not scores.values[~lens.capture.frame.real].any()
    for prompt, n in enumerate((4, 7, 4)):
        assert matrix[prompt].shape == (n, n) and scores[prompt].shape == (n,)
    if name in BASELINES:
        goal = resolve_target(lens.capture, 3).minus(resolve_target(lens.capture, 5))
        with quiet():
            ours = baselines.baseline_scores(name, lens.capture, goal, model, **options)
        assert torch.equal(scores.values, ours)


@every_few
@pytest.mark.parametrize("pos", [-1, 1])
def test_a_row_is_the_matrix_s(case, pos):
    """Without a direction of its own, the row of the target's position; with one, u read by it."""
    dtype = torch.float32 if case.float32_norms else torch.float64
    lens, tol = ragged(case, "left", dtype), case.within("padded")
    query = lens.capture.frame.index(pos)
    for name in OPERATOR_METHODS:
        target = 3 if name in ("out", "in_out") else None
        rows = lens.token_matrix(name, target).values[torch.arange(3), query]
        assert_close(lens.token_scores(name, 3, pos=pos).values, rows, tol, name)
    one, two = (lens.token_scores("in_out", target, pos=pos).values for target in (3, 5))
    assert_close(lens.token_scores("in_out", 3, 5, pos=pos).values, one - two, tol)


def test_in_out_and_the_constants_are_the_target():
    lens = lens_of(FEW[0])
    table = lens.attribute(3, 5)
    constants = [i for i, s in enumerate(table.sources) if s.pos is None]
    total = lens.token_scores("in_out", 3, 5).values.sum(-1) + table.values[:, constants].sum(-1)
    assert_close(total, table.target_value, ROUNDING)


@every_few
def test_decompx_is_in_before_the_final_norm(case):
    lens = lens_of(case)
    sites = lens.operator.sites
    ours, before = (
        lens.token_matrix("decompx"),
        lens.token_matrix("in", layers=sites[:1] + sites[-2:-1]),
    )
    assert_close(ours.values, before.values, max(ROUNDING, case.tol()))


def test_estimated_rows():
    lens = lens_of(FEW[0])
    exact = lens.token_scores("norm").values
    whole = lens.token_scores("norm", probes=lens.embedding.shape[-1]).values
    assert_close(whole, exact, ROUNDING, "as many orthogonal probes as dimensions")
    assert not torch.equal(lens.token_scores("norm", probes=4).values, exact)


def test_what_it_looks_like():
    scores = lens_of(FEW[0]).token_scores("in_out", 3)
    (name, value), *_ = scores.top(2)
    assert abs(value) == scores[0].abs().max() and name.startswith('"')
    assert repr(scores).splitlines()[0] == "in_out of '#3', prompt 1 of 2"
    assert scores._repr_html_().count("<b>in_out</b>") == 2


def test_refusals():
    lens = lens_of(FEW[0])
    for call in (lens.token_matrix, lens.token_scores):
        with pytest.raises(ValueError, match=r"no method 'roll'. Choose one of norm, .*random"):
            call("roll")
        with pytest.raises(
            ValueError, match=r"in_out has no option steps. Use one of probes, seed, .*, or none"
        ):
            call("in_out", steps=3)
        with pytest.raises(
            ValueError,
            match=r"rollout has no option probes. Drop it, as this method has no opt",
        ):
            call("rollout", probes=3)
        with pytest.raises(
            ValueError, match=r"chefer runs the model again. Pass the captured model as model="
        ):
            call("chefer")
    with pytest.raises(ValueError, match=r"Drop target=, or ask for token_scores"):
        lens.token_matrix("rollout", 3)
    with pytest.raises(ValueError, match="layers= is for norm"):
        lens.token_matrix("rollout", layers=("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"))
    with pytest.raises(ValueError, match="probes= estimates 'norm' only"):
        lens.token_scores("out", probes=3)
