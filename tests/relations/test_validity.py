"""Local validity: both errors against slow oracles, frozen parts held by hooks, radii, studies."""

import json
import math

import pytest
import torch
from comparisons import assert_close
from models import (
    CASES,
    GRADIENT,
    ORACLE,
    PER_SHAPE,
    SHAPES,
    TWO_RUNS,
    lens_of,
    quiet,
    randn_like,
    tokens,
    uniform_attention,
)

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.recording.live_model import live_models
from tensorlens_tl.refusals.errors import UnsupportedArchitectureError
from tensorlens_tl.relations.held_model import FREEZABLE, hold_frozen
from tensorlens_tl.relations.validity_errors import (
    DIRECTION_KINDS,
    direction_errors,
    draw,
    radius,
)
from tensorlens_tl.relations.validity_study import ErrorCurve, ValidityStudy, validity

SOLU = [case for case in SHAPES if "solu" in case.name]
EXACT = [case for case in SHAPES if not case.float32_norms]
FEW = [c for c in EXACT if c.name.split("-", 1)[1] in ("gpt2", "gemma2", "neox", "no-norm")]


def captured(model, ids=None):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(model, tokens()[:1] if ids is None else ids)[1]


def steps(lens, n=2, seed=0):
    """Directions as large as X."""
    found = randn_like(lens.embedding.expand(n, -1, -1), seed)
    return found / found.flatten(1).norm(dim=1)[:, None, None] * lens.embedding.norm()


def final(model, x):
    """y of the real model run from x, by the host's own hooks."""
    seen = []
    handle = model.unembed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad(), quiet():
            hook = ("blocks.0.hook_resid_pre", lambda t, hook: x)
            model.run_with_hooks(tokens()[:1], fwd_hooks=[hook])
    finally:
        handle.remove()
    return seen[-1]


# --- Oracles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW, ids=str)
def test_errors_the_slow_way(case):
    model, lens = case.model(), lens_of(case)[0]
    x, directions, sizes = lens.embedding, steps(lens), (0.01, 0.3, 2.0)
    found = direction_errors(lens, model, directions, sizes)
    T, c = lens.operator.to_dense()[0], lens.operator.bias
    for row, delta in enumerate(directions):
        slope = (final(model, x + 1e-5 * delta) - final(model, x - 1e-5 * delta)) / 2e-5
        for column, size in enumerate(sizes):
            moved = x + size * delta
            change = final(model, moved) - final(model, x)
            predicted = torch.einsum("qdke,bke->bqd", T, moved) + c
            r = (final(model, moved) - predicted).norm() / change.norm()
            first = (change - size * slope).norm() / change.norm()
            assert_close(found.operator[row, column], r, GRADIENT, f"operator at {size}")
            assert abs(found.jacobian[row, column] - first) < 1e-6, f"Jacobian at {size}"
        limit = (slope - torch.einsum("qdke,ke->qd", T, delta)).norm() / slope.norm()
        assert abs(found.limit[row] - limit) < 1e-6


@pytest.mark.parametrize("case", PER_SHAPE, ids=str)
def test_r_goes_to_its_limit_and_the_jacobians_error_to_0(case):
    if case in SOLU:
        return  # its limit is tested below with patterns and scales
    model, lens = case.model(), lens_of(case)[0]
    directions = steps(lens)
    small = 2e-3 if case.float32_norms else 1e-4
    found = direction_errors(lens, model, directions, (small, 2 * small))
    assert (found.operator[:, 0] - found.limit).abs().max() < 30 * small
    assert found.jacobian[:, 0].max() < 30 * small
    if "no-norm" not in case.name:  # curved: the error of the first order is of the second
        twice = found.jacobian[:, 1] / found.jacobian[:, 0]
        assert (twice - 2).abs().max() < 0.2


def test_r_is_0_where_nothing_frozen_depends_on_the_input():
    model = uniform_attention("attn-only-no-norm")
    lens = captured(model)
    found = direction_errors(lens, model, steps(lens), (1e-3, 1.0, 100.0))
    for errors in (found.operator, found.jacobian, found.limit):
        assert errors.max() < ORACLE


def test_relu_is_its_own_first_order_and_exact_until_a_unit_turns():
    """With fixed attention and no norms, T = J: what is frozen of a ReLU is its derivative."""
    model = uniform_attention("no-norm")
    lens = captured(model)
    directions, ids = steps(lens, 1), tokens()[:1]
    signs = []
    points = [f"blocks.{layer}.mlp.hook_pre" for layer in range(2)]
    for size in (0.0, 1e-6, 1.0):
        with torch.no_grad(), quiet():
            hook = (
                "blocks.0.hook_resid_pre",
                lambda t, hook, size=size: lens.embedding + size * directions,
            )
            seen = []
            keep = [(p, lambda t, hook, seen=seen: seen.append(t > 0)) for p in points]
            model.run_with_hooks(ids, fwd_hooks=[hook, *keep])
        signs.append(torch.stack([s.clone() for s in seen]))
    assert torch.equal(signs[0], signs[1]) and not torch.equal(signs[0], signs[2])
    found = direction_errors(lens, model, directions, (1e-6, 1.0))
    assert found.operator[0, 0] < GRADIENT and found.limit[0] < ORACLE
    assert found.operator[0, 1] > 1e-3
    assert_close(found.operator, found.jacobian, GRADIENT)


@pytest.mark.parametrize("case", PER_SHAPE, ids=str)
def test_with_all_three_held_the_real_model_is_the_operator(case):
    model, lens = case.model(), lens_of(case)[0]
    held = ("pattern", "scale") if case in SOLU else (*FREEZABLE, "all")
    found = direction_errors(lens, model, steps(lens), (0.1,), held)
    assert tuple(found.held) == held
    if case in SOLU:
        with pytest.raises(UnsupportedArchitectureError, match="uses SoLU"):
            direction_errors(lens, model, steps(lens), (0.1,), ("all",))
        return
    assert found.held["all"].max() < 20 * case.tol()
    assert found.limit.min() > 1e-3  # and it is not where they are live
    for part in FREEZABLE:
        live = {
            "pattern": True,
            "scale": "no-norm" not in case.name,
            "ratio": "attn-only" not in case.name,
        }[part]
        if not live or (part == "ratio" and case.name.endswith("no-norm")):  # ReLU's is flat
            assert (found.held[part] - found.limit).abs().max() < 1e-5
        else:
            assert (found.held[part] - found.limit).abs().max() > 1e-4


def test_what_is_held_is_held_far_away_too():
    case = CASES.get("hooked-gpt2") or CASES["bridge-gpt2"]
    model, lens = case.model(), lens_of(case)[0]
    x = lens.embedding + 3 * steps(lens, 3)
    with live_models(lens.capture, model) as (live,), torch.no_grad():
        y = live.run(x, hold_frozen(live, FREEZABLE))
    predicted = lens.operator.apply(x[:, None])[:, 0] + lens.operator.bias
    assert_close(y, predicted, ORACLE)


# --- Directions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_whole_swap_is_the_other_prompts_run(case):
    model, lens = case.model(), lens_of(case)[0]
    delta, whole = draw(lens, model, "swap", seed=3)
    (pos,) = delta.norm(dim=-1).nonzero().flatten().tolist()
    assert math.isclose(float(delta.norm()), float(lens.embedding[0, pos].norm()), rel_tol=TWO_RUNS)
    others = [t for t in range(50) if t != tokens()[0, pos]]
    swapped = tokens()[:1].repeat(len(others), 1)
    swapped[:, pos] = torch.tensor(others)
    every = captured(model, swapped).embedding - lens.embedding - whole * delta
    (only,) = (every.flatten(1).abs().amax(1) < TWO_RUNS).nonzero().flatten().tolist()
    found = direction_errors(lens, model, delta[None], (whole,))
    change = (
        captured(model, swapped[only : only + 1]).capture.unembed.final - lens.capture.unembed.final
    )
    predicted = whole * lens.operator.apply(delta[None])
    assert_close(found.operator[0, 0], (change - predicted).norm() / change.norm(), GRADIENT)


def test_directions_are_as_large_as_what_they_move():
    case = FEW[0]
    model, lens = case.model(), lens_of(case)[0]
    steer = torch.ones_like(lens.embedding[0, 0])
    for kind in DIRECTION_KINDS:
        delta, whole = draw(lens, model, kind, 1, steer)
        moved = delta.norm(dim=-1) > 0
        assert int(moved.sum()) == (1 if kind == "swap" else len(moved))
        assert_close(delta.norm(), lens.embedding[0][moved].norm(), TWO_RUNS)
        assert torch.equal(delta, draw(lens, model, kind, 1, steer)[0])
        if kind != "steering":
            assert not torch.equal(delta, draw(lens, model, kind, 2, steer)[0])
    assert_close(whole * delta, steer.expand_as(delta), TWO_RUNS)
    with pytest.raises(ValueError, match="random, swap, steering, the last with a vector"):
        draw(lens, model, "steering", 1)
    with pytest.raises(ValueError, match="'mail' is not a kind"):
        draw(lens, model, "mail", 1)


def test_radii_by_hand():
    sizes = (0.1, 0.2, 0.4)
    assert radius(sizes, (0.05, 0.15, 0.5), 0.0) == pytest.approx(0.15)
    assert radius(sizes, (0.2, 0.3, 0.5), 0.0) == pytest.approx(0.05)  # between 0 and the first
    assert radius(sizes, (0.05, 0.15, 0.05), 0.02) == pytest.approx(0.15)  # the first passing
    assert radius(sizes, (0.01, 0.02, 0.1), 0.0) == math.inf
    assert radius(sizes, (0.01, 0.02, 0.1), 0.11) == 0


# --- Studies -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    with quiet():
        return demo.load_model()


@pytest.fixture(scope="module")
def study(model):
    prompts = [pair.clean for pair in demo.prompts("facts", 6)]
    return validity(model, prompts, sizes=(0.01, 0.1, 1.0), held=("pattern", "all"))


def test_a_study_sums_its_curves_up(study, model):
    assert study.n == 6 and len(study.rows) == 18 and study.kinds == DIRECTION_KINDS
    prompts = [pair.clean for pair in demo.prompts("facts", 6)]
    lens = captured(model, prompts[2])
    delta, whole = draw(lens, model, "swap", seed=2)
    found = direction_errors(lens, model, delta[None], study.sizes, ("pattern",))
    row = study.select("swap")[2]
    assert row.whole == pytest.approx(whole, rel=1e-6)
    assert row.operator == pytest.approx(found.operator[0].tolist(), rel=1e-3)
    assert row.jacobian == pytest.approx(found.jacobian[0].tolist(), rel=1e-2)
    assert row.held["pattern"] == pytest.approx(float(found.held["pattern"]), rel=1e-3)
    values = sorted(r.operator[1] for r in study.select("random"))
    error = study.error("random", "operator", 0.1)
    assert error.value == values[2] and values[0] <= error.low <= error.high <= values[-1]
    assert study.limit("random").value == sorted(r.limit for r in study.select("random"))[2]
    assert study.limit("random", "all").value < 1e-4 < 0.1 < study.limit("random", "pattern").value
    # What was measured, and is no fault: the operator is no first order.
    assert study.radius("random", "operator").value == 0
    assert 0.01 < study.radius("random", "jacobian").value < 0.5
    with pytest.raises(
        ValueError, match=r"no directions of kind 'mail'. Choose one of random, swap"
    ):
        study.select("mail")


def test_crossings_by_hand():
    rows = (ErrorCurve("random", (0.7, 0.7, 0.9, 1.0), (0.1, 0.8, 0.8, 1.1), 0.7, {}, 1.0),)
    study = ValidityStudy("m", "float64", 0, 1, (0.1, 0.2, 0.4, 0.8), rows)
    assert study.crossing("random") == 0.8
    never = (ErrorCurve("random", (0.7,) * 4, (0.1,) * 4, 0.7, {}, 1.0),)
    assert ValidityStudy("m", "float64", 0, 1, study.sizes, never).crossing("random") is None


def test_a_study_prints_and_keeps_itself(study):
    text = repr(study)
    assert text.startswith("ValidityStudy(tensorlens_tl demo, 6 prompts, float32)")
    assert "10 % is passed at 0 [0, 0]" in text and "steering, jacobian" in text
    again = ValidityStudy.from_json(study.to_json())
    assert again.rows[3].operator == pytest.approx(study.rows[3].operator, rel=1e-4)
    assert ValidityStudy.from_json(again.to_json()) == again
    for wrong in ("{}", "[]", "no", json.dumps(json.loads(study.to_json()) | {"format": "x"})):
        with pytest.raises(ValueError, match="not a study of the format"):
            ValidityStudy.from_json(wrong)


def test_the_model_is_left_as_it_was(model):
    lens = captured(model, "The capital of France is")
    before = [(p.requires_grad, p.grad, p._version) for p in model.parameters()]
    direction_errors(lens, model, steps(lens), (0.1,), FREEZABLE)
    after = [(p.requires_grad, p.grad, p._version) for p in model.parameters()]
    assert after == before and not model.training
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    assert lens.completeness_error < 1e-5  # and the lens still answers


def test_half_precision_is_refused():
    """Its rounding is as large as what small δ change: the radius would be the rounding's."""
    model = demo.load_model().to(torch.bfloat16)
    with (
        quiet(),
        pytest.raises(ValueError, match=r"in bfloat16, whose .* model\.to\(torch\.float32\)"),
    ):
        validity(model, ["The key is", "The boy is", "The keys are"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "The capital"}, "prompts='The capital' holds fewer than three prompts"),
        ({"prompts": ["The capital"]}, "holds fewer than three prompts"),
        (
            {"kinds": ("random", "mail")},
            "kinds holds 'mail'. Choose some of random, swap, steering",
        ),
        ({"kinds": ()}, "kinds holds nothing"),
        ({"sizes": (0.1, 0.1)}, "do not rise from above 0"),
        ({"sizes": (0.0, 0.1)}, "do not rise from above 0"),
        ({"sizes": ()}, "do not rise from above 0"),
        ({"held": ("norms",)}, "freezes no norms. Hold some of pattern, scale, ratio"),
    ],
)
def test_what_no_study_can_be_made_of_is_refused(model, arguments, message):
    given = {"prompts": ["The key is", "The boy is", "The keys are"]} | arguments
    with pytest.raises(ValueError, match=message):
        validity(model, **given)


@pytest.mark.wrong_types
def test_directions_that_do_not_fit_are_refused():
    case = FEW[0]
    model, lens = case.model(), lens_of(case)
    one = lens[0]
    good = steps(one)
    with pytest.raises(ValueError, match=r"holds 2 prompts. Take one with lens\[i\]"):
        direction_errors(lens, model, good)
    with pytest.raises(ValueError, match=r"directions must be \[direction, 7, 32\], not \[7, 32\]"):
        direction_errors(one, model, good[0])
    for wrong in (good * 0, good * torch.nan):
        with pytest.raises(ValueError, match="is 0 or not finite"):
            direction_errors(one, model, wrong)
    with pytest.raises(ValueError, match="not all above 0 and finite"):
        direction_errors(one, model, good, (-1.0,))
