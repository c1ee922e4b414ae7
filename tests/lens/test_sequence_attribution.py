"""Every token of a continuation, split by all tokens before it."""

import json

import numpy as np
import pytest
import torch
from comparisons import assert_close
from models import ORACLE, PER_SHAPE, ROUNDING, SHAPES, lens_of, quiet, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import tensorlens_tl
from tensorlens_tl import SequenceAttribution
from tensorlens_tl.lens.sequence_attribution import continuation_targets

every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)


@every_case
def test_columns_are_the_tokens_and_sum_exactly(case):
    """With both prompts of a batch at once, each with its own continuation."""
    lens = lens_of(case)
    log_p = lens.logits.double().log_softmax(-1)
    for of, scores in (("logprob", log_p), ("logit", lens.logits.double())):
        found = lens.attribute_sequence(4, of=of)
        wanted = torch.stack(
            [scores[[0, 1], at - 1, tokens()[:, at]] for at in range(4, 7)], dim=-1
        )
        assert_close(found.target_value, wanted, ROUNDING)
        assert_close(found.values.sum(1), wanted, case.within("run"))
        assert found.completeness_error < case.within("run")
        # No token is a source of itself or of an earlier one.
        for column, at in zip(found.columns, range(4, 7), strict=True):
            later = [i for i, s in enumerate(column.sources) if s.pos is not None and s.pos >= at]
            assert later and not column.values[:, later].any()
            earlier = [i for i, s in enumerate(column.sources) if s.pos == at - 1]
            assert column.values[:, earlier].all()
        total = found.total()
        assert_close(total.values.sum(1), wanted.sum(-1), case.within("run"))
        assert_close(total.target_value, wanted.sum(-1), ROUNDING)
    assert found.outputs[0] == tuple(f'"{t}"@{i}' for i, t in enumerate(lens.tokens[0][4:], 4))


@every_case
def test_a_column_is_the_attribution_of_its_token(case):
    lens = lens_of(case)
    for by in ("token", "component", "head"):
        found = lens.attribute_sequence(-2, by=by, of="logit")
        for prompt in range(2):
            one, alone = found[prompt], lens[prompt]
            for i, column in enumerate(one.columns):
                expected = alone.attribute(int(tokens()[prompt, 5 + i]), pos=4 + i, by=by)
                assert_close(column.values, expected.values, ORACLE)
                assert column.labels == expected.labels and column.target == expected.target


@pytest.mark.parametrize(("of", "whole"), [("logprob", 1), ("logit", 0)])
def test_w_u_of_a_half_precision_model_is_cast_once(of, whole):
    lens = lens_of(SHAPES[0], torch.bfloat16)
    W_U = lens.capture.unembed.weights.W_U

    class Casts(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            wide = func is torch.ops.aten._to_copy.default and out.dtype == torch.float32
            self.made += wide and out.shape == W_U.shape
            return out

    with Casts() as casts, torch.no_grad():
        found = continuation_targets(lens.capture, 4, of)[0]
    assert len(found) == 3 and casts.made == whole


def test_ways_to_name_a_continuation():
    lens = lens_of(SHAPES[0])[0]
    expected = lens.attribute_sequence(-2)
    ids = tokens()[0, -2:]
    for same in (5, np.int64(-2), ids, ids.tolist(), tuple(ids.tolist()), ids.numpy()):
        assert torch.equal(lens.attribute_sequence(same).values, expected.values)


def test_texts_with_any_white_space(demo_model):
    _, lens = demo_model.run_with_tensorlens("Paris is the capital of France")
    expected = lens.attribute_sequence(-2)
    assert expected.outputs == (('"of"@5', '"France"@6'),)
    for text in ("of France", " of  France\n"):
        assert torch.equal(lens.attribute_sequence(text).values, expected.values)
    with pytest.raises(ValueError, match=r"'f France' is not what prompt 0 ends with. Capture"):
        lens.attribute_sequence("f France")
    # Padded prompts with one continuation.
    _, both = demo_model.run_with_tensorlens(
        ["Paris is the capital of France", "the capital of France"]
    )
    again = both.attribute_sequence("of France")
    assert_close(again[0].values, expected.values, 1e-4)
    assert again[0].labels == expected.labels
    with pytest.raises(ValueError, match=r"have different numbers of tokens: 4, 2. Pass a neg"):
        both.attribute_sequence(3)


def test_forms_of_the_matrix(demo_model):
    _, lens = demo_model.run_with_tensorlens("Paris is the capital of France")
    found = lens.attribute_sequence(-2)
    again = SequenceAttribution.from_json(found.to_json())
    assert torch.equal(again.values, found.values) and again.outputs == found.outputs
    assert torch.equal(again.total().values, found.total().values)
    assert np.array_equal(np.asarray(found), found.values.numpy())
    by_pos = found.sum("node")
    assert_close(by_pos.values.sum(1), found.values.sum(1), 1e-5)
    assert len(by_pos.labels[0]) < len(found.labels[0])
    for shown in (repr(found), found._repr_html_().replace("&quot;", '"')):
        assert '"of"@5' in shown and '"France"@6' in shown and '"capital"@4' in shown
    value = float(found.target_value[0, 1])
    assert f"{value:+.4f}" in repr(found).splitlines()[-1]
    assert f"= {value:.4g}; off by at most" in found._repr_html_()
    of_both = 'Attribution of the log-probabilities of "of"@5, "France"@6, <bos> added'
    assert repr(found).startswith("Sequence" + of_both)
    assert found._page().title.startswith(of_both)
    one, long = lens.attribute_sequence(-1, of="logit"), lens.attribute_sequence(-5)
    assert repr(one).startswith('SequenceAttribution of the logit of "France"@6, <bos> added')
    assert repr(one).endswith("= logit") and ' of "is"@2 … "France"@6, 5 tokens, ' in repr(long)
    edges = lens.attribute_sequence(-2, by="edge")
    assert edges.completeness_error is None and "do not sum" in repr(edges)
    assert "The rows do not sum to" in edges._repr_html_()
    pytest.importorskip("pandas", reason="an extra")
    table = found.to_dataframe()
    assert list(table.columns) == list(found.outputs[0])
    assert np.array_equal(table.to_numpy(), found.values[0].numpy())


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("continuation", "message"),
    [
        (0, r"continuation=0 is not a token of prompt 0 with one before it. Pass a position from "),
        (7, r"from 1 to 6, or from -6 to −1"),
        (-7, r"continuation=-7 is not a token"),
        ([1, 2], r"continuation=\[1, 2\] is not what prompt 0 ends with. Capture the prompt"),
        ("", r"continuation='' is not what prompt 0 ends with"),
        (3.5, r"continuation=3.5 is no continuation. Pass a position, a text or a list"),
        ([], r"continuation=\[\] is no continuation"),
        (True, r"continuation=True is no continuation"),
        (None, r"continuation=None is no continuation"),
    ],
)
def test_refusals(continuation, message):
    with pytest.raises(ValueError, match=message):
        lens_of(SHAPES[0])[0].attribute_sequence(continuation)


@pytest.mark.wrong_types
def test_other_refusals():
    lens = lens_of(SHAPES[0])
    with pytest.raises(ValueError, match=r"of='prob' does not exist"):
        lens.attribute_sequence(-1, of="prob")
    with pytest.raises(ValueError, match=r"by='word' does not exist"):
        lens.attribute_sequence(-1, by="word")
    matrix = lens.attribute_sequence(-1)
    for text in ("{}", json.dumps({"format": "x"}), matrix.to_json().replace("outputs", "o")):
        with pytest.raises(ValueError, match=r"is not a matrix as to_json writes it .* Write it"):
            SequenceAttribution.from_json(text)
    with pytest.raises(IndexError, match=r"There is no prompt 2"):
        matrix[2]


@pytest.fixture(scope="module")
def demo_model():
    from tensorlens_tl import demo

    return demo.load_model()


def test_the_sum_is_the_models_own_log_probability_of_the_continuation(demo_model):
    """Of a prompt with its continuation, as a user captures them."""
    prompt, continuation = "Paris is the", " capital of France"
    with quiet(), torch.no_grad():
        logits, lens = tensorlens_tl.capture(demo_model, prompt + continuation)
        ids = demo_model.to_tokens(prompt + continuation)[0]
    expected = logits[0, :-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]][-3:].sum()
    total = lens.attribute_sequence(continuation).total()
    assert_close(total.values.sum(1)[0], expected, 1e-5)
