"""Models of pictures: exact against Hugging Face, with patches as rows and classes as targets."""

import pytest
import torch
from comparisons import assert_close
from models import ORACLE, ROUNDING, quiet
from oracles import FrozenModel
from pictures import COLUMNS, KINDS, OFFERED, ROWS, build, picture

import tensorlens_tl

pytestmark = pytest.mark.offered(OFFERED)
every_kind = pytest.mark.parametrize("kind", KINDS)
SPLITS = ("token", "constant", "component", "layer", "head", "neuron", "dimension", "order")


@every_kind
def test_the_operator_gives_what_hugging_face_gives(kind):
    _, _, expected, lens = picture(kind)
    ours = lens.readout(lens.operator @ lens.embedding + lens.operator.bias)
    assert_close(ours, expected, ROUNDING)
    assert_close(lens.logits, expected, ROUNDING)
    assert lens.completeness_error <= ROUNDING


@every_kind
@pytest.mark.parametrize("by", SPLITS)
def test_every_split_sums_to_the_class(kind, by):
    case = picture(kind)
    found = case.lens.attribute(case.target, by=by)
    value = case.expected[:, 3] if case.expected.ndim == 2 else case.expected[:, 0] @ case.target
    assert_close(found.target_value, value, ROUNDING)
    assert_close(found.values.sum(1), value, ROUNDING)


@every_kind
def test_the_adjoint_is_the_gradient_of_the_frozen_model(kind):
    model, inputs, _, lens = picture(kind)
    x = lens.embedding.clone().requires_grad_()
    y, _ = FrozenModel(model, inputs)(x)
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (gradient,) = torch.autograd.grad((y * u).sum(), x)
    assert_close(lens.operator.T @ u, gradient, ORACLE)


def test_rows_are_called_after_patches():
    names = picture("deit").lens.tokens[0]
    assert names[:3] == ("[CLS]", "[DIST]", "patch[0,0]")
    assert names[-1] == f"patch[{ROWS - 1},{COLUMNS - 1}]" and len(names) == 2 + ROWS * COLUMNS


def test_classes_are_called_by_name_and_number():
    case = picture("vit")
    by_name, by_number = case.lens.attribute("class 2"), case.lens.attribute(2)
    assert torch.equal(by_name.values, by_number.values)
    assert by_name.target == ("'class 2'",) * 2
    own = case.lens.attribute().target
    assert own == tuple(repr(f"class {i}") for i in case.expected.argmax(-1).tolist())
    difference = case.lens.attribute("class 2", versus="class 1", of="logprob")
    assert_close(difference.target_value, case.expected[:, 2] - case.expected[:, 1], ROUNDING)
    with pytest.raises(ValueError, match=r"target='klass 2' is no class of the model\. Pass a cl"):
        case.lens.attribute("klass 2")


def test_a_direction_is_read_at_any_row_and_a_class_at_one():
    case, u = picture("vit"), torch.linspace(-1, 1, 32, dtype=torch.float64)
    y = case.lens.capture.unembed.final
    for pos, row in ((0, 0), (-1, 0), (3, 3), (-2, -2)):
        assert_close(case.lens.attribute(u, pos=pos).target_value, y[:, row] @ u, ROUNDING)
    with pytest.raises(ValueError, match=r"The classes are read at row 0 alone\. Drop pos="):
        case.lens.attribute("class 2", pos=3)


def test_a_model_without_a_head_has_no_classes():
    lens = picture("vit-headless").lens
    for target in (None, 2, "class 2"):
        with pytest.raises(ValueError, match=r"ViTModel has no head\. Pass a direction in the fin"):
            lens.attribute(target)


WRONG = {
    "a cat": r"The input is a str, and .* reads pictures\. Pass numbers \[batch, channel, row, c",
    (1, 2): "The input is a tuple, and",
    torch.zeros(1, 2, dtype=torch.long): r"The input is torch.int64, and",
    torch.zeros(3, 8, 8): r"The input has shape \[3, 8, 8\], and .* reads \[batch, 3, 12, 8\]\. P",
    torch.zeros(0, 3, 12, 8): r"The input has shape \[0, 3, 12, 8\]",
}


@pytest.mark.parametrize("given", WRONG, ids=lambda given: type(given).__name__)
def test_what_is_no_picture_is_refused(given):
    with pytest.raises(ValueError, match=WRONG[given]):
        tensorlens_tl.capture(picture("vit").model, given)


def test_one_picture_an_array_and_a_processors_mapping():
    model, inputs, expected, _ = picture("vit")
    for given in (inputs[0], inputs[:1].numpy(), {"pixel_values": inputs[:1]}, [inputs[0]]):
        logits, lens = tensorlens_tl.capture(model, given)
        assert len(lens) == 1
        assert_close(logits, expected[:1], ROUNDING)


def test_a_picture_of_another_size():
    hf, inputs = build("vit", rows=COLUMNS)
    inputs = inputs.repeat(1, 1, 2, 2)
    with torch.no_grad(), quiet():
        expected = hf(inputs, interpolate_pos_encoding=True).logits
        logits, lens = tensorlens_tl.capture(hf, inputs, interpolate_pos_encoding=True)
    assert lens.tokens[0][-1] == "patch[3,3]"
    assert_close(logits, expected, ROUNDING)
    assert lens.completeness_error <= ROUNDING
