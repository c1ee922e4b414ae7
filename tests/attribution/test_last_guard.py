"""A table whose rows do not sum to its target is an error, and rounding is none."""

from dataclasses import replace
from functools import cache

import models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import PER_SHAPE, SHAPES, lens_of

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError, TensorLens
from tensorlens_tl.attribution import contrast, splits, table_builder

FIRST = SHAPES[0]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SINGLE = ("token", "constant", "component", "layer", "head", "neuron", "dimension", "order")


@cache
def pair(case, dtype):
    """Lenses of two prompts, or None where rounding is so large that the capture is refused."""
    try:
        with models.quiet(), torch.no_grad():
            other = tensorlens_tl.capture(case.model(dtype), models.tokens(seed=5))[1]
        return lens_of(case, dtype), other
    except CaptureMismatchError:
        return None


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_rounding_explains_is_no_error(data):
    """Compared with the bound on rounding alone, without the share of Σ |rows| on top."""
    case, dtype = data.draw(st.sampled_from(PER_SHAPE)), data.draw(st.sampled_from(DTYPES))
    if (lenses := pair(case, dtype)) is None:
        return
    lens, other = lenses
    choices = [{"by": by} for by in SINGLE if by != "neuron" or lens.capture.blocks[0].mlp]
    ats = ("clean", "corrupted") if "solu" in case.name else ("clean", "corrupted", "secant")
    choices += [{"by": b, "baseline": other, "at": a} for b in ("token", "component") for a in ats]
    choices += [{"by": "token", "baseline": b} for b in ("zero", "mean")]
    target, versus = data.draw(st.integers(0, 40)), data.draw(st.sampled_from([None, 4, 17]))
    checked = []

    def bound(found, *runs):
        off = (found.values.double().sum(1) - found.target_value).abs()
        assert (off <= sum(table_builder._rounding(run) for run in runs)).all()
        assert table_builder.check_sum(found, *runs) is found
        checked.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "check_sum", bound)
        patch.setattr(contrast, "check_sum", bound)
        lens.attribute(
            target, versus, data.draw(st.integers(-7, 6)), **data.draw(st.sampled_from(choices))
        )
    assert len(checked) == 1


def test_terms_that_cancel_inside_a_row_are_no_error():
    """Logits of 1e4 and more that differ by little: the split of the difference is mostly noise."""
    lens = lens_of(FIRST, torch.float32)
    W = lens.capture.unembed.weights
    for size in (1.0, 1e4, 1e8):
        direction = W.W_U.detach().sum(1).nan_to_num() * size
        found = lens.attribute(direction, (direction * (1 + 1e-6)).detach())
        assert found.values.isfinite().all()


@pytest.mark.parametrize("by", ["token", "component", "order"])
def test_rows_that_are_left_out_are_an_error(by):
    for dtype in DTYPES[:2]:
        lens = lens_of(FIRST, dtype)
        found, gradient = lens.attribute(3, by=by), lens._gradient(3, None, -1)
        largest = int(found.values[0].abs().argmax())
        values = found.values.clone()
        values[:, largest] = 0
        with pytest.raises(CaptureMismatchError, match=r"sum to .* more than rounding explains"):
            table_builder.check_sum(replace(found, values=values), gradient)
        values[:, largest] = torch.nan
        with pytest.raises(CaptureMismatchError, match="sum to nan"):
            table_builder.check_sum(replace(found, values=values), gradient)


@pytest.mark.parametrize("case", PER_SHAPE, ids=str)
def test_other_weights_are_an_error_where_no_sample_tells(case):
    """A lens without its check of writes: the sums alone show that the weights are others."""
    with models.quiet():
        model = case.build(torch.float64)
    with torch.no_grad():
        captured = tensorlens_tl.capture(model, models.tokens())[1].capture
    lens = TensorLens(captured)
    captured.blocks[1].attn.weights.W_O.data[0].zero_()
    for by in SINGLE[:3]:
        with pytest.raises(
            CaptureMismatchError, match=r"The step from blocks\.1\.hook_resid_pre no"
        ):
            lens.attribute(3, by=by)
