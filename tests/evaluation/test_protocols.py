"""Protocols on outcomes that are known: by hand, additive toys, every order tried."""

import math
import random
from itertools import permutations

import pytest
import torch
from models import ROUNDING

from tensorlens_tl.evaluation.protocols import (
    PRESETS,
    PROTOCOLS,
    aopc,
    as_set,
    beam_bound,
    count,
    exact_bounds,
    measures,
)
from tensorlens_tl.evaluation.significance import compare, estimate, rank_correlation, ranks

pytestmark = pytest.mark.algebra

THIRDS = (0, 1 / 3, 2 / 3, 1)


def additive(weights):
    """m(set) = 1 − the weights of what is masked: the best order is always by weight."""
    positions = range(len(weights))
    return lambda sets: [1 - sum(weights[j] for j in positions if s >> j & 1) for s in sets]


def tangled(n, seed):
    """Outcomes with no structure at all: one random number per set."""
    drawn = random.Random(seed)
    values = [drawn.random() for _ in range(2**n)]
    return lambda sets: [values[s] for s in sets]


def read(protocol, m, order, scores=(), preset=None, **options):
    found = {}
    for one in measures(protocol, preset, **options):
        seen = []

        def watched(sets, seen=seen):
            seen.extend(sets)
            return m(sets)

        found[one.name] = one.read(watched, order, scores)
        if one.name != "naopc":
            assert set(seen) == set(one.masks(order)), "asked for in advance"
    return found


def test_three_tokens_by_hand():
    """Weights .5, .3, .1. MoRF: 1, .5, .2, .1. LeRF: 1, .9, .6, .1. Kept: .1, .6, .9, 1.

    Areas over thirds: (½ + .5 + .2 + .05)/3 and (½ + .9 + .6 + .05)/3. Means .45 and .65.
    First third and two thirds masked: drops .5 and .8; alone left: drops .4 and .1.
    AOPC (.5 + .8 + .9)/3; the worst order's is (.1 + .4 + .9)/3.
    """
    m, order = additive((0.5, 0.3, 0.1)), (0, 1, 2)
    expected = {
        "perturbation": {"positive": 1.25 / 3, "negative": 2.05 / 3},
        "morf_lerf": {"morf": 0.45, "lerf": 0.65, "delta": 0.2},
        "insertion_deletion": {"deletion": 1.25 / 3, "insertion": 2.05 / 3},
    }
    for protocol, numbers in expected.items():
        assert read(protocol, m, order, preset=THIRDS) == pytest.approx(numbers, abs=ROUNDING)
    eraser = read("eraser", m, order, preset=(1 / 3, 2 / 3))
    assert eraser == pytest.approx({"comprehensiveness": 0.65, "sufficiency": 0.25}, abs=ROUNDING)
    assert aopc(m, order) == pytest.approx(2.2 / 3)
    assert exact_bounds(m, order) == pytest.approx((1.4 / 3, 2.2 / 3))
    assert read("naopc", m, order)["naopc"] == pytest.approx(1)
    assert read("naopc", m, order[::-1])["naopc"] == pytest.approx(0)
    assert read("leave_one_out", m, order, (7, 6, 5))["leave_one_out"] == pytest.approx(1)
    assert read("leave_one_out", m, order, (5, 6, 7))["leave_one_out"] == pytest.approx(-1)


def test_areas_are_divided_by_the_span_of_their_fractions():
    """From 1/3 to 1: MoRF .5, .2, .1 and LeRF .9, .6, .1; areas (.35 + .15)/2 and (.75 + .35)/2."""
    m = additive((0.5, 0.3, 0.1))
    found = read("perturbation", m, (0, 1, 2), preset=(1 / 3, 2 / 3, 1))
    assert found == pytest.approx({"positive": 0.25, "negative": 0.55}, abs=ROUNDING)
    # Deletion and insertion from 2/3: (.2 + .1)/2 and (.9 + 1)/2.
    found = read("insertion_deletion", m, (0, 1, 2), preset=(2 / 3, 1))
    assert found == pytest.approx({"deletion": 0.15, "insertion": 0.95}, abs=ROUNDING)


def test_relative_outcomes_are_divided_by_the_unmasked_one():
    m = additive((0.5, 0.3, 0.1))
    half = lambda sets: [0.5 * value for value in m(sets)]  # noqa: E731
    one, other = (read("insertion_deletion", f, (2, 0, 1)) for f in (m, half))
    assert one == pytest.approx(other)


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_the_best_order_is_the_best(protocol):
    """Where outcomes add up, no order beats the one by weight, in any measure's own direction."""
    drawn = random.Random(protocol)
    weights = [drawn.random() / 6 for _ in range(6)]
    m, best = additive(weights), sorted(range(6), key=lambda j: -weights[j])
    ideal = read(protocol, m, best, weights)
    worst = read(protocol, m, best[::-1], [-w for w in weights])
    for one in measures(protocol):
        sign = 1 if one.higher else -1
        assert sign * ideal[one.name] > sign * worst[one.name]
        for _ in range(20):
            order = drawn.sample(range(6), 6)
            scores = [6 - order.index(j) for j in range(6)]
            found = read(protocol, m, order, scores)[one.name]
            assert sign * found <= sign * ideal[one.name] + ROUNDING


@pytest.mark.parametrize("seed", range(3))
def test_bounds_of_aopc_are_those_of_all_orders(seed):
    m, positions = tangled(7, seed), (1, 2, 4, 5, 6)  # bits that are not all next to each other
    every = [aopc(m, order) for order in permutations(positions)]
    low, high = exact_bounds(m, positions)
    assert (low, high) == pytest.approx((min(every), max(every)), abs=ROUNDING)
    wide = [beam_bound(m, positions, 10, sign) for sign in (1, -1)]  # 10: the most sets of one size
    assert wide == pytest.approx([low, high], abs=ROUNDING)
    for beam in (1, 3):
        narrow = [beam_bound(m, positions, beam, sign) for sign in (1, -1)]
        assert low - 1e-12 <= narrow[0] <= narrow[1] <= high + ROUNDING


def test_naopc_of_a_long_prompt_stays_between_0_and_1():
    m = additive([1 / 2 ** (j + 1) for j in range(14)])
    order = list(range(14))
    assert read("naopc", m, order, beam=1)["naopc"] == pytest.approx(1)
    random.Random(0).shuffle(order)
    assert 0 < read("naopc", m, order, beam=2)["naopc"] < 1


def test_measures_that_are_not_defined_are_nan():
    flat = lambda sets: [1.0] * len(sets)  # noqa: E731
    assert math.isnan(read("leave_one_out", flat, (0, 1, 2), (1, 2, 3))["leave_one_out"])
    assert math.isnan(read("naopc", flat, (0, 1, 2))["naopc"])


def test_counts_and_presets():
    assert [count(f, 10) for f in (0, 0.01, 0.1, 0.3, 0.7, 0.71, 1)] == [0, 1, 1, 3, 7, 8, 10]
    assert count(0.29, 100) == 29 and count(0.01, 5) == 1
    assert PRESETS["tensorlens"] == (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    assert PRESETS["chefer"] == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert as_set((0, 3)) == 0b1001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("perturb",),
            r"protocol='perturb' does not exist. Use one of perturbation, .*leave_one_out",
        ),
        (("perturbation", "atad"), r"preset='atad' does not exist. Use one of tensorlens, chefer"),
        (
            ("perturbation", (0, 30)),
            r"preset=\[0.0, 30.0\] is not .* between 0 and 1. Write 30 % as 0.3",
        ),
        (("perturbation", (-0.1, 0.3)), "fractions between 0 and 1"),
        (("eraser", (0.5,)), "at least two fractions"),
        (("eraser", (0.5, 0.2)), r"preset=\[0.5, 0.2\] does not grow"),
        (("naopc", "chefer"), "preset='chefer' names fractions, and protocol 'naopc' has none"),
        (
            ("insertion_deletion", None, "logit"),
            "metric='logit' may be 0 .*Use metric='probability'",
        ),
        (("naopc", None, "logit", 0), "beam=0 keeps no order"),
    ],
)
def test_bad_protocols_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        measures(*arguments)


# --- Statistics ----------------------------------------------------------------------------------


def test_rank_correlation_is_scipy_s():
    from scipy.stats import rankdata, spearmanr

    drawn = random.Random(0)
    for _ in range(20):
        a, b = ([drawn.randrange(5) for _ in range(12)] for _ in range(2))
        assert ranks(a).tolist() == rankdata(a).tolist()
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=ROUNDING)


def test_paired_comparisons():
    """Of the 8 signs of (1, 2, 3) two reach |6|; those of (1, −1) all reach 0."""
    assert compare([2, 4, 6], [1, 2, 3]).p == 2 / 8
    assert compare([1, 0], [0, 1]).p == 1
    assert compare([1, math.nan, 3], [0, 5, 0]).difference.n == 2
    assert math.isnan(compare([math.nan], [1]).p)
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=draws, dtype=torch.float64)
    far = compare((noise + 1).tolist(), [0] * 200)
    assert far.p == 1 / 10_001 and far.difference.low > 0.8
    ps = [compare(torch.randn(30, generator=draws).tolist(), [0] * 30).p for _ in range(200)]
    assert 0.02 <= sum(p < 0.05 for p in ps) / 200 <= 0.09, "as often as it says, by chance"


def test_undefined_values_are_left_out():
    assert estimate([1, 2, 3]) == estimate([1, 2, math.nan, 3])
    assert math.isnan(estimate([]).value) and estimate([math.nan]).n == 0
    with pytest.raises(ValueError, match="first has 1 numbers and second 2"):
        compare([1], [1, 2])
