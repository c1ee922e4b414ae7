"""Baselines: numbers by hand, what their papers state, and the real model as the oracle."""

import math
from types import SimpleNamespace

import pytest
import torch
from comparisons import assert_close
from models import CASES, ORACLE, ROUNDING, TWO_RUNS, lens_of, quiet, tokens

from tensorlens_tl.attribution.targets import resolve_target
from tensorlens_tl.maps.batch_layout import Frame
from tensorlens_tl.maps.primitives import Mix, Norm
from tensorlens_tl.methods.attention_maps import FLOW_UNIT, halved, mean_patterns
from tensorlens_tl.methods.baselines import baseline_matrix, baseline_scores
from tensorlens_tl.methods.decompx import decompx_vectors
from tensorlens_tl.methods.value_vectors import alti_layers, normed, splits
from tensorlens_tl.methods.value_zeroing import cosine_distance, value_zeroing_layers
from tensorlens_tl.operator.capture import Capture, Convention, FrozenBlock, Prompts
from tensorlens_tl.sublayers.attention import Attention
from tensorlens_tl.sublayers.mlp import MLP
from tensorlens_tl.sublayers.unembed import Unembed
from tensorlens_tl.sublayers.weights import (
    AttentionWeights,
    MLPWeights,
    NormWeights,
    UnembedWeights,
)

pytestmark = pytest.mark.algebra

FAMILIES = ("gpt2", "llama", "neox", "gemma2", "attn-only", "qwen3", "mistral", "solu")
FEW = [c for c in CASES.values() if c.name.split("-", 1)[1] in FAMILIES]
every_few = pytest.mark.parametrize("case", FEW, ids=str)
# Their rows are shares of one: products of row-normalized layers.
STOCHASTIC = (
    "mean_attention",
    "last_layer_attention",
    "rollout",
    "norm_attention",
    "norm_attention_resln",
    "globenc",
    "alti",
    "value_zeroing",
)


def matrix(name, lens, model=None, **options):
    with quiet():
        return baseline_matrix(name, lens.capture, model, **options)


def scores(name, lens, model=None, target=3, pos=-1, **options):
    with quiet():
        goal = resolve_target(lens.capture, target, pos)
        return baseline_scores(name, lens.capture, goal, model, **options)


# --- Two tokens by hand --------------------------------------------------------------------------


def t(*v):
    return torch.tensor(v, dtype=torch.float64)


def by_hand(patterns, mlp=False, norm=True):
    """X = [[1, 2], [3, 4]], W_V = (1, 1)ᵀ, b_V = 1, W_O = (2, 0), b_O = (0, 1), one head a layer.

    In the first layer v = (1 + 2, 3 + 4) + 1 = (4, 8), which W_O turns into (8, 0) and (16, 0).
    ln2 is an RMSNorm of scale 1 and gain (1, 2), ln_final a LayerNorm of scale 1 and gain 1.
    """
    frame = Frame(((0, 2),), 2, torch.float64, torch.device("cpu"))
    X = t([[1, 2], [3, 4]])
    weights = AttentionWeights(t([1], [1])[None], t(1)[None], t([2, 0])[None], t(0, 1))
    one = t([[1], [1]])
    ln2 = Norm(frame, "ln2", one, NormWeights(t(1, 2), None, center=False), 2)
    ln2 = ln2 if mlp and norm else None
    final = Norm(frame, "ln_final", one, NormWeights(t(1, 1), None, center=True), 2)
    blocks, state = [], X
    for layer, pattern in enumerate(patterns):
        attn = Attention(frame, layer, Mix(frame, t([pattern]), 1, 1), weights)
        mid = state + attn.apply(state) + attn.bias
        after, sublayer = mid, None
        if mlp:  # W_in = (0, 1)ᵀ, b_in = −1, ReLU, W_out = (1, 1)
            w = MLPWeights(t([0], [1]), t(-1), t([1, 1]), None, "relu")
            sublayer = MLP(frame, layer, w, normed(ln2, mid) @ w.W_in + w.b_in)
            after = mid + sublayer.apply(normed(ln2, mid)) + sublayer.bias
        blocks.append(
            FrozenBlock(state, mid if mlp else None, attn, sublayer, None, ln2, None, None)
        )
        state = after
    y = final.apply(state)
    unembed = Unembed(frame, UnembedWeights(t([1], [10]), None), y)
    prompts = Prompts(torch.tensor([[0, 0]]), frame.spans, (("a", "b"),))
    return SimpleNamespace(
        capture=Capture(
            "by hand",
            frame,
            prompts,
            {"embed": X},
            tuple(blocks),
            state,
            final,
            unembed,
            y @ t([1], [10]),
            Convention(),
            {"none": 0.0},
        )
    )


A1, A2 = [[1, 0], [1 / 4, 3 / 4]], [[1, 0], [1 / 2, 1 / 2]]


def test_attention_alone_by_hand():
    """Two layers, A1 below A2.

    Mean: [(1/4 + 1/2)/2, (3/4 + 1/2)/2] = [3/8, 5/8]. ½A + ½I: rows [1/8, 7/8] and [1/4, 3/4].
    Rollout: [1/4·1 + 3/4·1/8, 3/4·7/8] = [11/32, 21/32].
    Flow to a: 1/4 by a in the middle, min(3/4, 1/8) by b: 3/8. To b: min(3/4, 7/8) = 3/4.
    """
    lens = by_hand([A1, A2])
    assert_close(matrix("mean_attention", lens), t([[1, 0], [3 / 8, 5 / 8]]), 1e-15)
    assert_close(matrix("last_layer_attention", lens), t(A2), 1e-15)
    assert_close(matrix("rollout", lens), t([[1, 0], [11 / 32, 21 / 32]]), 1e-15)
    assert_close(matrix("attention_flow", lens), t([[1, 0], [3 / 8, 3 / 4]]), 1e-15)
    one = baseline_scores("attention_flow", lens.capture, resolve_target(lens.capture, 0, 0))
    assert_close(one, t([1, 0]), 1e-15)


def test_norms_by_hand():
    """One layer, A1. To b: F_ba = 1/4·(8, 0) = (2, 0), F_bb = 3/4·(16, 0) = (12, 0).

    Norms 2 : 12, so N = [1/7, 6/7] and ½N + ½I = [1/14, 13/14].
    With the residual G_ba = (2, 0), G_bb = (12, 0) + (3, 4) = (15, 4). Under ln2: (2, 0) and
    (15, 8), norms 2 : 17. GlobEnc, under ln_final: (1, −1) and (5.5, −5.5), norms 1 : 5.5.
    Without an MLP ln_final reads the state after attention, too: 1 : 5.5.
    ALTI: y_b = (3, 4) + (14, 0) + (0, 1) = (17, 5), ‖y_b‖₁ = 22; without a (15, 5): 22 − 20 = 2;
    without b (2, 1): 22 − 3 = 19.
    """
    plain, sequential = by_hand([A1]), by_hand([A1], mlp=True)
    assert_close(matrix("norm_attention", plain), t([[1, 0], [1 / 14, 13 / 14]]), 1e-15)
    rows = {
        "norm_attention_resln": (2 / 19, 17 / 19),
        "globenc": (2 / 13, 11 / 13),
        "alti": (2 / 21, 19 / 21),
    }
    for name, row in rows.items():
        assert_close(matrix(name, sequential), t([[1, 0], row]), 1e-15, name)
    assert_close(matrix("norm_attention_resln", plain), t([[1, 0], [2 / 13, 11 / 13]]), 1e-15)


def test_value_zeroing_by_hand():
    """One layer, A1: b's output is (17, 5), without a's value (15, 5), without b's (5, 5).

    With an MLP and no norm, z = 5 − 1 = 4 in all three: (4, 4) more, (21, 9), (19, 9), (9, 9).
    """

    def distance(a, b):
        return 1 - (a[0] * b[0] + a[1] * b[1]) / (math.hypot(*a) * math.hypot(*b))

    outputs = {False: ((17, 5), (15, 5), (5, 5)), True: ((21, 9), (19, 9), (9, 9))}
    for mlp, (y, *without) in outputs.items():
        lens = by_hand([A1], mlp, norm=False)
        zeroed = [distance(y, other) for other in without]
        assert_close(value_zeroing_layers(lens.capture)[0][:, 1], t(zeroed), ROUNDING)
        row = [zeroed[0] / sum(zeroed), zeroed[1] / sum(zeroed)]
        assert_close(matrix("value_zeroing", lens), t([[1, 0], row]), ROUNDING)


def test_decompx_by_hand():
    """One layer, A1, no biases: W_V = (1, 1)ᵀ, W_O = (2, 0): a's value vector (6, 0), b's (14, 0).

    To b: x_{b⇐a} = 1/4·(6, 0) = (1.5, 0), x_{b⇐b} = (3, 4) + 3/4·(14, 0) = (13.5, 4).
    The MLP, ratio 1, adds 2·x₂·(1, 1): (1.5, 0) and (21.5, 12). Under ln_final and u = (1, 10):
    (.75, −.75)·u = −6.75 and (4.75, −4.75)·u = −42.75.
    """
    lens = by_hand([A1], mlp=True)
    row = matrix("decompx", lens)[0, 1]
    assert_close(row, t(1.5, math.hypot(21.5, 12)), 1e-15)
    assert_close(scores("decompx", lens, target=0), t([-6.75, -42.75]), 1e-15)


# --- What the papers state -----------------------------------------------------------------------


@every_few
def test_shares_of_one(case):
    lens = lens_of(case)
    for name in STOCHASTIC:
        m = matrix(name, lens)
        assert_close(m.sum(-1), torch.ones_like(m[..., 0]), max(ROUNDING, case.tol()), name)
        assert (m >= 0).all() and m.triu(1).abs().max() == 0
        assert torch.equal(scores(name, lens, pos=2), m[:, 2])


@every_few
def test_the_split_by_source_is_attention_s_step(case):
    """Σ_j (F_ij + δ_ij x_i) and the constants are the state after attention."""
    for s in splits(lens_of(case).capture):
        n = s.moved.shape[1]
        whole = s.block.resid_pre + normed(s.block.ln1_post, s.out)
        b_O = s.block.attn.weights.b_O
        rest = torch.zeros_like(whole) if b_O is None else torch.zeros_like(whole) + b_O
        parts = sum(s.with_residual(key) for key in range(n)) + normed(s.block.ln1_post, rest)
        assert_close(parts, whole, ROUNDING)
        if s.block.resid_mid is not None:
            assert_close(parts, s.block.resid_mid, max(ROUNDING, case.tol()))


@every_few
def test_second_norm(case):
    """GlobEnc reads the norm behind the MLP: the same one where no MLP reads attention's output."""
    lens = lens_of(case)
    first, second = matrix("norm_attention_resln", lens), matrix("globenc", lens)
    one = all(block.resid_mid is None for block in lens.capture.blocks)
    assert torch.equal(first, second) == one


def test_alti_is_row_normalized():
    for layer in alti_layers(lens_of(FEW[0]).capture):
        assert_close(layer.sum(-1), torch.ones_like(layer[..., 0]), ROUNDING)


@every_few
def test_flow_is_bounded_by_the_capacities(case):
    lens = lens_of(case)
    flow = matrix("attention_flow", lens)
    first = halved(lens.capture, mean_patterns(lens.capture)[0])
    eps = 100 / FLOW_UNIT
    assert (flow <= 1 + eps).all(), "what leaves a token"
    assert (flow <= first.sum(1)[:, None] + eps).all(), "what enters an input"
    assert (flow >= matrix("rollout", lens) - ROUNDING).all(), "rollout's own flow is one of them"
    assert torch.equal(scores("attention_flow", lens), flow[:, -1])


def test_flow_is_the_maximum():
    """The same maximum as a linear program."""
    from scipy.optimize import linprog

    lens = lens_of(FEW[0])
    layers = [halved(lens.capture, layer)[0] for layer in mean_patterns(lens.capture)]
    n = len(layers[0])
    edges = [(level, i, j) for level in (0, 1) for i in range(n) for j in range(i + 1)]
    bounds = [(0, float(layers[level][i, j])) for level, i, j in edges]
    conserve = [
        [(e[0] == 0 and e[1] == m) - (e[0] == 1 and e[2] == m) for e in edges] for m in range(n)
    ]
    flow = matrix("attention_flow", lens)[0]
    for i, j in ((n - 1, 0), (n - 1, 3), (4, 2)):
        gain = [-(e[0] == 0 and e[2] == j) for e in edges]
        shut = [
            (0, 0) if (e[0] == 1 and e[1] != i) or (e[0] == 0 and e[2] != j) else b
            for e, b in zip(edges, bounds, strict=True)
        ]
        best = linprog(gain, A_eq=conserve, b_eq=[0] * n, bounds=shut)
        assert math.isclose(float(flow[i, j]), -best.fun, rel_tol=TWO_RUNS)


@every_few
def test_value_zeroing_is_the_real_model_s(case):
    """The real model with one token's value vectors at zero in one layer, all behind it live."""
    lens, model, ids = lens_of(case), case.model(), tokens()
    for layer, distances in enumerate(value_zeroing_layers(lens.capture)):
        assert (distances >= 0).all() and (distances <= 2).all()
        found = {}

        def keep(x, hook, found=found):
            found["x"] = x.detach()

        for key in (None, 0, 3):

            def zero(v, hook, key=key):
                v = v.clone()
                v[:, key] = 0
                return v

            hooks = [(f"blocks.{layer}.hook_resid_post", keep)]
            hooks += [(f"blocks.{layer}.attn.hook_v", zero)] if key is not None else []
            with quiet(), torch.no_grad():
                model.run_with_hooks(ids, fwd_hooks=hooks)
            if key is None:
                clean = found["x"]
                continue
            ours = distances[..., key]
            assert_close(ours, cosine_distance(clean, found["x"]), 10 * case.tol())


@every_few
@pytest.mark.parametrize("gate", ["gate", "up", "half"])
def test_decompx_is_the_operator_before_the_final_norm(case, gate):
    if gate != "gate" and not case.gated:
        return
    lens = lens_of(case, gate=gate)
    ours, operator = decompx_vectors(lens.capture), lens.operator
    through = operator.between(operator.sites[0], operator.sites[-2])
    for key in range(ours.shape[0]):
        x = torch.zeros_like(lens.embedding)
        x[:, key] = lens.embedding[:, key]
        assert_close(ours[key], through @ x, ROUNDING)
    last = operator.block(-1, 2) @ lens.embedding[:, 2, :, None]
    u = resolve_target(lens.capture, 3).covector
    assert_close(scores("decompx", lens)[:, 2], (u[:, None] @ last).flatten(), ORACLE)


def test_decompx_shares_and_constants_sum_to_the_target():
    lens = lens_of(FEW[0])
    by_token = lens.attribute(3)
    constants = [i for i, s in enumerate(by_token.sources) if s.pos is None]
    total = scores("decompx", lens).sum(-1) + by_token.values[:, constants].sum(-1)
    assert_close(total, by_token.target_value, ROUNDING)


def test_random_is_reproducible():
    lens = lens_of(FEW[0])
    first = matrix("random", lens)
    assert torch.equal(first, matrix("random", lens))
    assert not torch.equal(first, matrix("random", lens, seed=1))
    assert not torch.equal(first[0], first[1]), "prompts have numbers of their own"
    assert torch.equal(first[:1], matrix("random", lens[0])), "whatever else is in the batch"
    assert first.triu(1).abs().max() == 0 and (first < 1).all() and (first >= 0).all()
