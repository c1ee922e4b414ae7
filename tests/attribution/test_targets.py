"""Targets at the edge of what may be asked: equal ones, odd types, many at once."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparisons import assert_close
from models import D_VOCAB, ORACLE, PER_SHAPE, ROUNDING, SHAPES, TWO_RUNS, lens_of, quiet, tokens

import tensorlens_tl
from tensorlens_tl.attribution.splits import BY
from tensorlens_tl.lens.tensor_lens import TensorLens

pytestmark = pytest.mark.algebra

every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)


@every_case
def test_a_target_less_an_equal_one_is_exactly_0(case):
    """Also where the same logit is reached by another sum (a direction, a frozen soft cap)."""
    lens = lens_of(case)
    same = torch.eye(D_VOCAB, dtype=torch.float64)[3]
    for versus in (3, same, same.float()):
        for by in BY:
            a = lens.attribute(3, versus, by=by)
            assert not a.values.any() and not a.target_value.any(), by
            assert "off by" not in repr(a[0]) and f"{a[0].values.shape[1]} exactly 0" in repr(a[0])
        assert not lens[0].paths(3, 5, versus)
    other = lens.attribute(3, 4)
    assert other.values.abs().sum() > 1e-3  # others are not swallowed
    near = same.clone()
    near[4] = 1e-9
    tiny = lens.attribute(near, versus=3)
    assert_close(tiny.values.sum(1), TWO_RUNS * lens.logits[:, -1, 4], 1e-3)


@every_case
def test_a_list_of_tokens_is_one_target_for_each_prompt(case):
    """As every prompt alone is asked; ids [batch], as an argmax gives them, are such a list."""
    lens = lens_of(case)
    likeliest = lens.logits[:, -1].argmax(-1)
    for target, versus, of in (
        ([3, 7], None, "logit"),
        ([3, 7], [5, None], "logit"),
        (likeliest, None, "logprob"),
        (likeliest, 4, "logprob"),
        (None, [5, 6], "logit"),
    ):
        found = lens.attribute(target, versus, by="component", of=of)
        for i, one in enumerate(lens):
            a, b = (x if isinstance(x, int | None) else x[i] for x in (target, versus))
            if isinstance(versus, list) and b is None:
                b = int(likeliest[i])
            expected = one.attribute(a, b, by="component", of=of)
            assert found[i].target == expected.target
            assert_close(found[i].values, expected.values, ROUNDING)
            assert_close(found[i].target_value, expected.target_value, ROUNDING)
    assert lens[1].attribute(likeliest[1:]).target == lens.attribute(likeliest)[1].target
    with quiet(), pytest.raises(ValueError, match=r"outside the vocabulary"):
        lens.attribute([3, D_VOCAB])


def test_integers_of_every_kind():
    lens = lens_of(SHAPES[0])
    expected = lens.attribute(3, pos=2).values
    for target in (np.int64(3), np.array(3), torch.tensor(3)):
        assert torch.equal(lens.attribute(target, pos=2).values, expected)
    assert_close(lens.attribute(np.eye(D_VOCAB)[3], pos=2).values, expected, ROUNDING)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"target": torch.full((D_VOCAB,), torch.nan)},
            "target= is a direction with nan or inf. Pass finite real",
        ),
        (
            {"target": torch.zeros(D_VOCAB, dtype=torch.complex64)},
            "direction with complex numbers",
        ),
        ({"target": 3.0}, "target=3.0 of type float is no token and no direction"),
        ({"target": [3, 4, 5]}, r"shape \[3\] is no direction .* direction in logits \[50\]"),
        ({"pos": 1.5}, "Position 1.5 is not an integer"),
        ({"at": "corrupted"}, "at='corrupted' needs a baseline"),
        ({"baseline": ["zero"]}, r"baseline= is a list, which is no baseline.* embedding \[32\]"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lens_of(SHAPES[0]).attribute(**kwargs)


@pytest.mark.wrong_types
def test_numpy_positions():
    lens = lens_of(SHAPES[0])
    assert torch.equal(lens.attribute(3, pos=np.int64(2)).values, lens.attribute(3, pos=2).values)
    assert len(lens.attribute_many(pos=np.arange(3))) == 3
    a, b = (lens.loadings(p, 3) for p in (np.int64(2), 2))
    assert torch.equal(a.values, b.values) and a.target == b.target


@every_case
def test_many_targets_against_others(case):
    lens = lens_of(case)
    many = lens.attribute_many([3, None, 5], versus=[4, 6, None])
    for (target, versus), a in zip(((3, 4), (None, 6), (5, None)), many, strict=True):
        own = lens.attribute(target, versus)
        assert a.target == own.target
        assert_close(a.values, own.values, ORACLE)
    for a in lens.attribute_many(pos=range(2), versus=4):
        assert all(name.endswith("− '#4'") for name in a.target)
    for pos, a in enumerate(lens.attribute_many(3, pos=range(2))):
        assert_close(a.values, lens.attribute(3, pos=pos).values, ORACLE)
    (one,) = lens.attribute_many(3)
    assert_close(one.values, lens.attribute(3).values, ORACLE)
    directions = torch.eye(D_VOCAB)[[3, 4]]
    for i, a in enumerate(lens.attribute_many(directions)):
        assert_close(a.values, lens.attribute(directions[i]).values, ORACLE)
    pairs = [(3, 0), (None, 2), (5, -1), (3, 4)]  # several targets at several positions
    versus = [None, 4, 6, None]
    many = lens.attribute_many(*(list(x) for x in zip(*pairs, strict=True)), versus=versus)
    for (target, pos), foil, a in zip(pairs, versus, many, strict=True):
        own = lens.attribute(target, foil, pos=pos)
        assert a.target == own.target and a.labels == own.labels
        assert_close(a.values, own.values, ORACLE)
    (one,) = lens.attribute_many(directions[1])
    assert_close(one.values, lens.attribute(directions[1]).values, ORACLE)


def test_without_a_tokenizer_tokens_are_named_by_number():
    """Labels, targets and the command line write an id as "#3", which is a target, too."""
    lens = lens_of(SHAPES[0])
    named, by_id = lens.attribute("#3", versus="#4"), lens.attribute(3, versus=4)
    assert named.target == by_id.target == ("'#3' − '#4'",) * 2
    assert torch.equal(named.values, by_id.values)
    assert lens.tokens[0][0] == f"#{int(lens.capture.prompts.tokens[0, 0])}"
    assert named.labels[0][0].startswith(f'"{lens.tokens[0][0]}"@0')
    for wrong in ("#", "#x", "3", "#-1"):
        with pytest.raises(ValueError, match="is a string, but the model has no tokenizer"):
            lens.attribute(wrong)
    with pytest.raises(ValueError, match="target=50 is outside"):
        lens.attribute("#50")


def test_a_target_with_and_without_its_leading_space():
    """What is typed is what is meant; the space is dropped only where no token has it."""
    ids = {"Mary": [3], " Mary": [4], "John": [5], " John": [9, 5], " to": [6], "to": [0]}
    tokenizer = SimpleNamespace(
        unk_token_id=0, encode=lambda text, add_special_tokens: ids[text], decode=str
    )
    lens = lens_of(SHAPES[0])
    lens = TensorLens(replace(lens.capture, tokenizer=tokenizer))
    for text, token in (("Mary", 3), (" Mary", 4), ("John", 5), (" John", 5), (" to", 6)):
        assert lens.attribute(text).target == (f"'[{token}]'",) * 2
        assert torch.equal(lens.attribute(text).values, lens.attribute(token).values)


@pytest.mark.wrong_types
def test_many_targets_refused():
    lens = lens_of(SHAPES[0])
    with pytest.raises(ValueError, match="target has 2 entries, versus has 1 entries"):
        lens.attribute_many([3, 4], versus=[5])


@every_case
def test_a_model_that_differs_in_any_weight_is_another_model(case):
    lens, model = lens_of(case), case.build(torch.float64)
    with quiet(), torch.no_grad():
        same = tensorlens_tl.capture(model, tokens())[1]
        assert lens.attribute(3, baseline=same).completeness_error == 0
        block = same.capture.blocks[-1]
        part = block.attn if block.mlp is None else block.mlp
        weight = part.weights.W_O if block.mlp is None else part.weights.W_in
        weight.add_(0.01)
        other = tensorlens_tl.capture(model, tokens())[1]
    with pytest.raises(ValueError, match=r"its baseline of another one"):
        lens.attribute(3, baseline=other)
