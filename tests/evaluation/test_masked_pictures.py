"""Patches masked in the picture, before the model reads it: by hand, and in an evaluation."""

import math

import pytest
import torch
from comparisons import assert_close
from models import ORACLE
from pictures import COLUMNS, OFFERED, ROWS, picture

from tensorlens_tl.evaluation import evaluate
from tensorlens_tl.evaluation.masking import Masking, end_logits
from tensorlens_tl.hosts.entry import adapt

pytestmark = pytest.mark.offered(OFFERED)
BLACK = [-1.0, -0.5, 0.25]


def by_hand(inputs, kind):
    """The picture with patch [1, 0] masked: rows 4 to 7, columns 0 to 3."""
    found = inputs.clone()
    for channel in range(3):
        own = inputs[:, channel]
        for i in range(4, 8):
            for j in range(4):
                if kind == "zero":
                    found[:, channel, i, j] = BLACK[channel]
                elif kind == "mean":
                    found[:, channel, i, j] = own.mean((1, 2))
                else:
                    found[:, channel, i, j] = blurred(own, i, j)
    return found


def blurred(own, i, j):
    """A Gaussian as wide as a patch around one pixel, whose weights inside the picture sum to 1."""
    total, weights = 0, 0
    for a in range(own.shape[1]):
        for b in range(own.shape[2]):
            weight = math.exp(-((i - a) ** 2 + (j - b) ** 2) / (2 * 4**2))
            total, weights = total + weight * own[:, a, b], weights + weight
    return total / weights


@pytest.mark.parametrize("kind", ["zero", "mean", "blur"])
def test_a_masked_patch_is_the_picture_without_it(kind):
    case = picture("vit")
    adapter = adapt(case.model)
    masked = torch.zeros(2, 1 + ROWS * COLUMNS, dtype=torch.bool)
    masked[:, case.lens.tokens[0].index("patch[1,0]")] = True
    masking = Masking.of(kind, adapter, black=BLACK if kind == "zero" else None)
    with torch.no_grad():
        expected = case.model(by_hand(case.inputs, kind))
    assert_close(end_logits(adapter, case.inputs, masked, masking), expected, ORACLE)
    assert (expected - case.expected).abs().max() > 1e-3


def test_evaluate_on_pictures():
    case = picture("vit")
    maskings = ["zero", "mean", "blur"]
    found = evaluate(
        case.model, case.inputs, ["in_out", "random"], masking=maskings, black=-1.0, progress=False
    )
    assert found.methods == ("in_out", "random") and found.lengths == (ROWS * COLUMNS,) * 2
    assert {row.masking for row in found.rows} == set(maskings)
    assert all(0 <= value <= 1 for row in found.rows for value in row.values)


WRONG = {
    r"masking='delete' does not exist for pictures\. Use one of zero, mean, blur": {
        "masking": "delete"
    },
    r"black=None is not what 0 is after normalization\. Pass one": {"masking": "zero"},
    r"black= is used by masking='zero' only": {"masking": "mean", "black": 1},
    r"keep_last= keeps a token .*\. Drop keep_last=": {"masking": "mean", "keep_last": True},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_does_not_fit_pictures_is_refused(words):
    case = picture("vit")
    with pytest.raises(ValueError, match=words):
        evaluate(case.model, case.inputs, ["in_out"], **WRONG[words])
