"""The self-check: what rounding explains is no mistake, and every mistake is told by its cause."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import CASES, SHAPES, quiet, tokens

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError
from tensorlens_tl.hosts import adapt
from tensorlens_tl.maps import Frame
from tensorlens_tl.recording import record
from tensorlens_tl.recording.self_check import SelfCheck

CENTRED = ("hooked-gpt2", "hooked-neox", "native-neox")
CENTRED += ("bridge-gpt2", "bridge-neox", "bridge-opt", "bridge-falcon", "bridge-phi")
CENTRED = [CASES[name] for name in CENTRED if name in CASES]
CONSTANT = 17
IDS = torch.tensor([[3, CONSTANT, 29, 5, CONSTANT, 8]])


def with_a_constant_embedding(case):
    """A model in float32 whose block 0 reads a row of variance 0 at one token."""
    with quiet(), torch.no_grad():
        model = case.build(torch.float32)
        for name, p in model.named_parameters():
            if p.ndim == 2 and ("pos" in name or "wpe" in name):
                p.zero_()
        model.W_E[CONSTANT] = 5.0
    return model


@pytest.mark.parametrize("case", CENTRED, ids=str)
def test_a_row_without_variance_is_served(case):
    """LayerNorm divides by √ε there, and so makes the rounding of a mean 300 times larger."""
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(with_a_constant_embedding(case), IDS)[1]
    state = lens.capture.blocks[0].resid_pre[0, 1]
    largest = torch.finfo(torch.float32).eps / 1e-5**0.5  # ε of these norms is 1e-5
    assert state.var() == 0 and lens.completeness_error <= largest


def make_wrong(adapter, part, name):
    """Make a weight of block 0 a hundredth too large, wherever it is read."""
    weights = adapter.weights
    block = weights.blocks[0]
    own = getattr(block, part)
    own = replace(own, **{name: getattr(own, name) * 1.01})
    adapter.weights = replace(weights, blocks=(replace(block, **{part: own}), *weights.blocks[1:]))
    adapter.attention[0].weights = adapter.weights.blocks[0].attn


@pytest.mark.parametrize(
    ("part", "name"), [("attn", "W_V"), ("attn", "W_O"), ("mlp", "W_in"), ("mlp", "b_in")]
)
@pytest.mark.parametrize("case", CENTRED[::2], ids=str)
def test_a_wrong_weight_is_noticed_beside_such_a_row(case, part, name):
    adapter = adapt(with_a_constant_embedding(case))
    if getattr(getattr(adapter.weights.blocks[0], part), name) is None:
        pytest.skip("this family has no such bias")
    make_wrong(adapter, part, name)
    with quiet(), torch.no_grad(), pytest.raises(CaptureMismatchError, match=f"L0 .*{name}"):
        record(adapter, IDS)


def test_a_small_branch_of_a_large_state_is_checked_sharply():
    """The state rounds at its own size, which may hide a twentieth of its rounding, not more."""
    frame = Frame(((0, 6),), 6, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    before, added = (torch.randn(1, 6, 64, generator=generator) for _ in range(2))
    before = 10 * before

    def errors(factor):
        check = SelfCheck(torch.nn.Linear(1, 1), frame, torch.float32)
        check.residual("branch", before, before + added, check.project(factor * added))
        check.check_block(list)
        return check.errors["branch"]

    assert errors(1.0) < 1e-6 < errors(1.00001)
    with pytest.raises(CaptureMismatchError, match="branch: the run differs"):
        errors(1.001)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_a_refusal_names_sublayer_error_and_causes(case):
    adapter = adapt(case.model(torch.float32))
    make_wrong(adapter, "attn", "W_V")
    with quiet(), torch.no_grad(), pytest.raises(CaptureMismatchError) as caught:
        record(adapter, tokens())
    message = str(caught.value)
    assert message.startswith("L0 attention values (W_V, b_V): the run differs ")
    assert "Likely causes, in this order: a module there was replaced" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", SHAPES[:1] + SHAPES[-1:], ids=str)
def test_a_weight_that_is_no_number_is_named(case, value):
    model = case.build(torch.float32)
    names = [n for n, p in model.named_parameters() if "1" in n and p.ndim > 1]
    with torch.no_grad():
        model.get_parameter(names[-1]).view(-1)[0] = value
    name = names[-1].replace("_original_component.", "")
    for mask in (None, torch.tensor([[0] + [1] * 6, [1] * 7])):  # padded runs are cleaned earlier
        given = {} if mask is None else {"attention_mask": mask}
        with quiet(), torch.no_grad(), pytest.raises(ValueError) as caught:
            tensorlens_tl.capture(model, tokens(), **given)
        assert f"the weight {name} holds NaN or infinity" in str(caught.value)


@pytest.mark.parametrize("case", SHAPES[:1] + SHAPES[-1:], ids=str)
def test_weights_of_inference_mode_have_no_gradients(case):
    with quiet(), torch.inference_mode():
        model = case.build(torch.float32)
    lens = tensorlens_tl.capture(model, tokens(1))[1]  # autograd is on, and not asked for
    assert lens.attribute(3).completeness_error < 1e-4
    with pytest.raises(ValueError, match=r"built under torch\.inference_mode"):
        lens.token_scores("chefer", 3, model=model)
