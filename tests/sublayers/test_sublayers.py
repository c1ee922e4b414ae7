"""Every sublayer: adjoint, bias, parts that sum to the whole; ratios in closed form."""

import pytest
import torch
from comparisons import assert_close
from models import GATED, ORACLE, ROUNDING, SHAPES, lens_of, randn_like

from tensorlens_tl import dot_test
from tensorlens_tl.sublayers.activations import RATIOS, gating_ratio, soft_cap_ratio

pytestmark = pytest.mark.algebra

FUNCTIONS = {
    "relu": torch.relu,
    "relu2": lambda z: torch.relu(z) ** 2,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "gelu_fast": lambda z: 0.5 * z * (1 + torch.tanh(z * 0.7978845608 * (1 + 0.044715 * z * z))),
    "gelu_bloom": lambda z: 0.5 * z * (1 + torch.tanh(z * 0.79788456 * (1 + 0.044715 * z * z))),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "solu": lambda z: z * z.softmax(-1),
    "xielu(0.01, 0.9, 0.5)": lambda z: (
        torch.where(z > 0, 0.01 * z * z, 0.9 * (z.clamp_max(0).expm1() - z)) + 0.5 * z
    ),
}


@pytest.mark.parametrize("act", [*RATIOS, "xielu(0.01, 0.9, 0.5)"])
def test_ratio_times_z_is_the_activation(act):
    z = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([0.0, -0.0, 1e-300])]).double()[None]
    ratio = gating_ratio(act, z)
    assert ratio.isfinite().all()
    assert (ratio * z - FUNCTIONS[act](z)).abs().max() <= 1e-13


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"'swoosh' is not known. Use one of relu"):
        gating_ratio("swoosh", torch.zeros(1))


def test_a_unit_at_zero_is_off():
    """At z = 0 any ratio gives act(z); the library takes 0, as PyTorch takes for the derivative."""
    assert gating_ratio("relu", torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 0, 1]


def test_soft_cap_ratio():
    logits = torch.tensor([-200.0, -1.0, 0.0, 1e-9, 3.0]).double()
    assert_close(soft_cap_ratio(logits, 5.0) * logits, 5 * torch.tanh(logits / 5), 1e-14)
    assert soft_cap_ratio(logits, 5.0)[2] == 1


def sublayers(lens):
    for block in lens.capture.blocks:
        yield block.attn
        if block.mlp is not None:
            yield block.mlp


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_parts_sum_to_the_whole(case):
    lens = lens_of(case)
    for sub in sublayers(lens):
        x = randn_like(lens.embedding, 1)
        parts = [sub.part(node) for node in sub.nodes()]
        assert dot_test(sub) <= ROUNDING and all(dot_test(p) <= ROUNDING for p in parts)
        assert_close(sum(p.apply(x) for p in parts), sub.apply(x), ORACLE)
        name, external = sub.external
        total = sum((p.bias for p in parts), torch.zeros_like(sub.bias))
        total = total if external is None else total + external
        assert (name in sub.constants()) == (external is not None)
        assert (total - sub.bias).abs().max() <= ORACLE * sub.bias.abs().max().clamp_min(1)
        with pytest.raises(ValueError, match="has no node L9H9"):
            sub.part(type(sub.nodes()[0])("head", 9, 9))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_outputs_at_a_row_are_the_parts(case):
    lens = lens_of(case)
    query = torch.tensor([3, 6])
    for sub in sublayers(lens):
        x = randn_like(lens.embedding, 2)
        outputs = sub.outputs_at(x, query)
        assert outputs.shape[1] == len(sub.nodes())
        for i, node in enumerate(sub.nodes()):
            part = sub.part(node)
            whole = part.apply(x) + part.bias
            assert_close(outputs[:, i], whole[torch.arange(2), query], ORACLE, str(node))


@pytest.mark.parametrize("case", GATED, ids=str)
def test_half_is_half_of_each(case):
    ours = {g: lens_of(case, gate=g).capture.blocks[0].mlp for g in ("gate", "up", "half")}
    x = randn_like(lens_of(case).embedding, 3)
    gate, up, half = (ours[g].apply(x) for g in ("gate", "up", "half"))
    assert_close(half, (gate + up) / 2, ROUNDING)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_weights_are_referenced_not_copied(case):
    """No W_V, W_O, W_in, W_out, W_U of the capture is new memory."""
    lens = lens_of(case)
    storages = {p.untyped_storage().data_ptr() for p in case.model().parameters()}
    for block in lens.capture.blocks:
        used = [block.attn.weights.W_V, block.attn.weights.W_O]
        if block.mlp is not None:
            w = block.mlp.weights
            used += [w.W_in, w.W_out] + ([w.W_gate] if case.gated else [])
        for W in [*used, lens.capture.unembed.weights.W_U]:
            assert W.untyped_storage().data_ptr() in storages
    heads, kv = block.attn.weights.W_O.shape[0], block.attn.weights.W_V.shape[0]
    assert kv <= heads and heads % kv == 0
