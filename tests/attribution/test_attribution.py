"""Laws 1 and 2 for every model, targets, results, and a two-token model worked out by hand."""

import math

import pytest
import torch
from comparisons import assert_close
from models import (
    GATED,
    ORACLE,
    ROUNDING,
    SEQ,
    SHAPES,
    TWO_RUNS,
    lens_of,
    quiet,
    randn_like,
    tokens,
)
from oracles import FrozenModel

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError
from tensorlens_tl.graph.nodes import Node
from tensorlens_tl.lens.tensor_lens import TensorLens
from tensorlens_tl.maps.batch_layout import Frame
from tensorlens_tl.maps.primitives import Mix, Norm
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

every_case = pytest.mark.parametrize("case", SHAPES, ids=str)
SPLITS = [(c, by, "gate") for c in SHAPES for by in ("token", "component")]
SPLITS += [(c, by, g) for c in GATED[:1] for by in ("token", "component") for g in ("up", "half")]
every_split = pytest.mark.parametrize(
    ("case", "by", "gate"), SPLITS, ids=[f"{c}-{by}-{g}" for c, by, g in SPLITS]
)


@every_split
def test_contributions_sum_to_the_target(case, by, gate):
    """Laws 1 and 2, between our own sums and against the model's logits."""
    lens = lens_of(case, gate=gate)
    for target, versus, pos in ((None, None, -1), (3, None, 2), (3, 4, -2), (7, 5, 0)):
        a = lens.attribute(target, versus, pos, by)
        assert a.sums_to_target and a.by == by and a.convention.gate == gate
        assert a.completeness_error <= 10 * case.tol()
        p = pos % SEQ
        ours = lens.readout(lens.operator @ lens.embedding + lens.operator.bias)[:, p]
        ids = lens.logits[:, p].argmax(-1) if target is None else torch.tensor([target] * 2)
        value = ours[torch.arange(2), ids] - (0 if versus is None else ours[:, versus])
        scale = a.values.abs().sum(1)
        # The soft cap's ratio is taken at the run's own state, which a float32 norm moves a little.
        tol = case.within("oracle")
        assert ((a.values.sum(1) - value).abs() <= tol * scale).all()
        own = lens.logits[torch.arange(2), p, ids] - (
            0 if versus is None else lens.logits[:, p, versus]
        )
        assert_close(a.target_value, own, ROUNDING)


@every_case
def test_no_part_is_a_remainder(case):
    """With the operator replaced by zeros the sums must break: nothing is "target − the rest"."""
    from dataclasses import replace

    lens = lens_of(case)
    blocks = tuple(
        replace(
            b,
            attn=replace(b.attn, mix=replace(b.attn.mix, pattern=torch.zeros_like(b.attn.pattern))),
        )
        for b in lens.capture.blocks
    )
    broken = TensorLens(replace(lens.capture, blocks=blocks))
    for by in ("token", "component"):
        with pytest.raises(
            CaptureMismatchError, match=r"The step from blocks\.0\.hook_resid_pre no"
        ):
            broken.attribute(3, by=by)
    assert broken.verify() > 1e-3


@every_case
def test_token_contributions_are_gradient_times_input_of_the_frozen_model(case):
    lens, frozen = lens_of(case), FrozenModel(case.model(), tokens())
    x = lens.embedding.clone().requires_grad_()
    y, _ = frozen(x)
    unembed = lens.capture.unembed
    u = (unembed.weights.W_U[:, 3] - unembed.weights.W_U[:, 4]).expand(len(y), -1)
    u = unembed.pull_head(u, torch.full((len(y),), y.shape[1] - 1))[0]  # in test_encoders
    target = (y[:, -1] * u).sum(-1)
    if lens.capture.unembed.weights.soft_cap is None:
        (g,) = torch.autograd.grad(target.sum(), x)
        a = lens.attribute(3, 4)
        parts = {"embed": lens.capture.embed, "pos_embed": lens.capture.pos_embed}
        tol = case.within("oracle")
        for kind, part in parts.items():
            if part is not None:
                columns = [i for i, s in enumerate(a.sources) if s.node.kind == kind]
                assert_close(a.values[:, columns], (g * part).sum(-1), tol, kind)
    else:  # the cap's ratio is part of the readout: checked by the sums above
        assert lens.attribute(3, 4).completeness_error <= 10 * case.tol()


@every_case
def test_components_are_all_the_writers(case):
    lens = lens_of(case)
    a = lens.attribute(3, by="component")
    names = [str(s.node) for s in a.sources]
    assert len(set(names)) == len(names)
    for layer, block in enumerate(lens.capture.blocks):
        assert {f"L{layer}H{h}" for h in range(4)} <= set(names)
        assert (f"L{layer}MLP" in names) == (block.mlp is not None)
        assert (f"L{layer}.b_O" in names) == (block.attn.weights.b_O is not None)
    assert ("pos_embed" in names) == (lens.capture.pos_embed is not None)


@every_case
def test_directions_are_targets(case):
    lens = lens_of(case)
    d_vocab, d_model = lens.logits.shape[-1], lens.embedding.shape[-1]
    g = torch.Generator().manual_seed(0)
    logit_direction = torch.randn(d_vocab, generator=g)  # float32 is cast
    a = lens.attribute(logit_direction)
    assert_close(a.target_value, lens.logits[:, -1] @ logit_direction.double(), ROUNDING)
    assert a.completeness_error <= 10 * case.tol()
    one_hot = torch.zeros(d_vocab)
    one_hot[3] = 1
    assert_close(lens.attribute(one_hot).values, lens.attribute(3).values, ORACLE)
    residual = lens.attribute(torch.randn(d_model, generator=g), by="component")
    assert residual.completeness_error <= 10 * case.tol()


def test_results():
    lens = lens_of(SHAPES[0])
    a = lens.attribute(3, 4)
    assert len(a) == 2 and a.values.shape == (2, len(a.sources))
    one = a[1]
    assert len(one) == 1 and torch.equal(one.values[0], a.values[1])
    top = one.top(3)
    assert [abs(v) for _, v in top] == sorted((abs(v) for _, v in top), reverse=True)
    assert abs(top[0][1]) == float(one.values.abs().max())
    assert repr(one).count("\n") == 11 and "Attribution by token of '#3' − '#4'" in repr(one)
    assert "2 prompts" in repr(a)
    with pytest.raises(ValueError, match=r"one prompt, but there are 2.*attribution\[i\]"):
        a.top()
    with pytest.raises(ValueError, match="k=0 is not an integer ≥ 1"):
        one.top(0)
    with pytest.raises(IndexError):
        a[2]
    frame = a.to_dataframe()
    assert list(frame.columns) == ["prompt", "label", "node", "pos", "value"]
    assert len(frame) == 2 * len(a.sources)
    assert math.isclose(
        frame[frame.prompt == 1].value.sum(), float(a.target_value[1]), rel_tol=TWO_RUNS
    )
    with pytest.raises(ValueError, match=r"by='heads' does not exist. Use one of token, constant"):
        lens.attribute(by="heads")


# --- By hand -------------------------------------------------------------------------------------


def hand_made():
    """Two tokens, one layer, d_model = 2, one head of width 1, one neuron; no normalization.

    X = [[1, 2], [3, 4]], A = [[1, 0], [1/4, 3/4]], W_V = (1, 1)ᵀ, b_V = 1, W_O = (2, 0), b_O = (0,
    1).
    v = (1 + 2, 3 + 4) + 1 = (4, 8); z = (4, 1/4·4 + 3/4·8) = (4, 7).
    mid = X + z W_O + b_O = [[9, 3], [17, 5]].
    MLP: W_in = (0, 1)ᵀ, b_in = −1, ReLU: pre = (2, 4), ratio 1; W_out = (1, 1), b_out = (0, 3).
    y = mid + relu(pre) W_out + b_out = [[11, 8], [21, 12]].
    Unembedding: W_U = (1, 10)ᵀ for the one logit, b_U = 5: logits (11 + 80 + 5, 21 + 120 + 5).
    """
    t = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    frame = Frame(((0, 2),), 2, torch.float64, torch.device("cpu"))
    X = t([[1, 2], [3, 4]])
    pattern = t([[[1, 0], [0.25, 0.75]]])
    attn = Attention(
        frame,
        0,
        Mix(frame, pattern, 1, 1),
        AttentionWeights(t([1], [1])[None], t(1)[None], t([2, 0])[None], t(0, 1)),
    )
    mlp = MLP(frame, 0, MLPWeights(t([0], [1]), t(-1), t([1, 1]), t(0, 3), "relu"), t([[1], [1]]))
    block = FrozenBlock(X, t([[9, 3], [17, 5]]), attn, mlp, None, None, None, None)
    y = t([[11, 8], [21, 12]])
    unembed = Unembed(frame, UnembedWeights(t([1], [10]), t(5)), y)
    prompts = Prompts(torch.tensor([[0, 0]]), frame.spans, (("a", "b"),))
    return TensorLens(
        Capture(
            "by hand",
            frame,
            prompts,
            {"embed": X},
            (block,),
            y,
            None,
            unembed,
            t([[96], [146]]),
            Convention(),
            {"none": 0.0},
        )
    )


def test_two_tokens_by_hand():
    """The last logit, 146, pulled back by hand with u = (1, 10) at position 1.

    Below the MLP: u + (u·W_out) W_inᵀ = (1, 10) + 11·(0, 1) = (1, 21).
    Below attention at position 1: (1, 21) + 3/4·(2·1)·(1, 1) = (2.5, 22.5);
    at position 0: 1/4·2·(1, 1) = (.5, .5).
    Tokens: a: .5·1 + .5·2 = 1.5;  b: 2.5·3 + 22.5·4 = 97.5.
    b_V: (1/4 + 3/4)·2·1 = 2; b_O: (1, 21)·(0, 1) = 21; b_in: −1·11 = −11; b_out: 10·3 = 30; b_U: 5.
    Sum: 1.5 + 97.5 + 2 + 21 − 11 + 30 + 5 = 146.
    """
    lens = hand_made()
    assert lens.completeness_error == 0
    a = lens.attribute(0)
    assert dict(zip(a.labels[0], a.values[0].tolist(), strict=True)) == {
        '"a"@0': 1.5,
        '"b"@1': 97.5,
        "L0.b_V": 2,
        "L0.b_O": 21,
        "L0.b_in": -11,
        "L0.b_out": 30,
        "b_U": 5,
    }
    # Direct: embed 3 + 40; head z W_O·u = 14; MLP without b_out: relu(4) (1, 1)·u = 44;
    # b_O 10; b_out 30; b_U 5.
    d = lens.attribute(0, by="component")
    assert dict(zip(d.labels[0], d.values[0].tolist(), strict=True)) == {
        "embed": 43,
        "L0H0": 14,
        "L0MLP": 44,
        "L0.b_O": 10,
        "L0.b_out": 30,
        "b_U": 5,
    }
    assert d.completeness_error == a.completeness_error == 0
    # The block of T from token a to the end: T = rows of the covectors above.
    block = lens.operator.block(-1, 0)[0]
    assert torch.equal(
        torch.tensor([1.0, 10.0]).double() @ block, torch.tensor([0.5, 0.5]).double()
    )


def test_norms_by_hand():
    """LayerNorm of (1, 3) with s = 2, w = (2, 4), b = (1, 1): ((−1, 1)/2)·w + b = (0, 3).

    Pulling (1, 1): (1, 1)·w/2 = (1, 2), minus its mean 1.5: (−.5, .5).
    """
    t = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    frame = Frame(((0, 1),), 1, torch.float64, torch.device("cpu"))
    norm = Norm(frame, "ln", t([[2]]), NormWeights(t(2, 4), t(1, 1), center=True), 2)
    assert torch.equal(norm.apply(t([[1, 3]])) + norm.bias, t([[0, 3]]))
    effects = {}
    assert torch.equal(norm.apply_t(t([[1, 1]]), effects), t([[-0.5, 0.5]]))
    assert effects == {"ln.b": t([2])} or torch.equal(effects["ln.b"], t([2]))
    rms = Norm(frame, "rms", t([[2]]), NormWeights(t(2, 4), None, center=False), 2)
    assert torch.equal(rms.apply(t([[1, 3]])), t([[1, 6]]))


def test_labels_and_nodes():
    a = hand_made().attribute(0)
    assert [s.node for s in a.sources][:3] == [
        Node("embed"),
        Node("embed"),
        Node("constant", 0, name="b_V"),
    ]
    assert a.top(1) == [('"b"@1', 97.5)]


def test_random_vectors_are_not_the_embedding():
    lens = hand_made()
    x = randn_like(lens.embedding)
    assert (lens.operator @ x - lens.operator @ lens.embedding).abs().max() > 0.1


def test_capture_is_what_the_method_returns():
    model = SHAPES[0].model()
    with quiet(), torch.no_grad():
        logits, lens = model.run_with_tensorlens(tokens())
        logits2, lens2 = tensorlens_tl.capture(model, tokens())
    assert torch.equal(logits, logits2) and repr(lens) == repr(lens2)
