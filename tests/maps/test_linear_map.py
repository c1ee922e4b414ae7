"""The contract of floor 0, on maps small enough to write down."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ROUNDING

from tensorlens_tl.maps import NormWeights
from tensorlens_tl.maps.batch_layout import Frame
from tensorlens_tl.maps.linear_map import Chain, Residual, Sum, Transposed, dot_test
from tensorlens_tl.maps.primitives import Gate, Linear, Mix, Norm

pytestmark = pytest.mark.algebra

FRAME = Frame(((0, 3), (1, 3)), 3, torch.float64, torch.device("cpu"))


def linear(d_in=4, d_out=4, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(d_in, d_out, generator=g, dtype=torch.float64)
    b = torch.randn(d_out, generator=g, dtype=torch.float64) if bias else None
    return Linear(FRAME, W, b, f"b{seed}")


def test_a_chain_by_hand():
    two = Linear(
        FRAME, torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([1.0]).double(), "a"
    )
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]], dtype=torch.float64)
    chain = Chain((two, two))
    assert torch.equal(chain @ x, 4 * x)
    assert torch.equal(chain.bias, torch.full_like(x, 3.0))  # 2·1 + 1
    residual = Residual(two)
    assert torch.equal(residual @ x, 3 * x) and torch.equal(residual.bias, torch.ones_like(x))
    assert torch.equal((two + two) @ x, 4 * x)
    assert torch.equal((two @ two) @ x, 4 * x)
    effects = {}
    chain.apply_t(torch.ones_like(x), effects)
    # Both maps bear one name here, so the entry is the first map's: its b seen through ×2.
    assert torch.equal(effects["a"], torch.full((2, 3), 2.0).double())


def test_transposes():
    op = Chain((linear(4, 5, 1), linear(5, 3, 2)))
    y = torch.randn(2, 3, 3, dtype=torch.float64)
    assert isinstance(op.T, Transposed) and op.T.T is op
    assert torch.equal(op.T @ y, op.apply_t(y))
    assert op.T.bias.shape == (2, 3, 4) and op.T.bias.abs().max() == 0 and op.T.constants() == {}
    assert dot_test(op) < 1e-15 and dot_test(op.T) < 1e-15


def test_the_dot_test_finds_a_wrong_adjoint():
    class Wrong(Linear):
        def apply_t(self, y, effects=None):
            return super().apply_t(y) * 1.001

    good = linear()
    assert dot_test(Wrong(FRAME, good.W)) > 1e-5


def test_composites_check_widths_when_built():
    with pytest.raises(ValueError, match=r"gives width 5, and the next takes 4"):
        Chain((linear(4, 5), linear(4, 4)))
    with pytest.raises(ValueError, match="Add maps of equal widths"):
        Sum((linear(4, 5), linear(4, 4)))
    with pytest.raises(ValueError, match="Use a branch that keeps the width"):
        Residual(linear(4, 5))
    with pytest.raises(ValueError, match="at least one"):
        Chain(())
    other = Linear(Frame(((0, 3),), 3, torch.float64, FRAME.device), linear().W)
    with pytest.raises(ValueError, match="different captures"):
        Chain((linear(), other))


def test_wrong_vectors_are_refused():
    op = linear()
    for x in (
        torch.zeros(2, 3, 5).double(),
        torch.zeros(3, 4).double(),
        torch.zeros(2, 3, 4),
        torch.zeros(2, 3, 4).int(),
    ):
        with pytest.raises(
            ValueError, match=r"\[\.\.\., 2, 3, 4\] of torch\.float64.*lens\.embedding"
        ):
            op @ x


def test_no_vectors_and_no_positions():
    for other in ([1.0], 3, None):
        with pytest.raises(ValueError, match=r"The vector is .*not a tensor.*embedding"):
            linear() @ other
    for pos in (1.0, None, "last", [1], True):
        with pytest.raises(ValueError, match=r"Position .* is not an integer"):
            FRAME.index(pos)


def test_positions_count_over_real_tokens():
    assert FRAME.index(-1).tolist() == [2, 2]
    assert FRAME.index(0).tolist() == [0, 1]
    with pytest.raises(
        ValueError, match=r"Position 2 is outside prompt 1, which has 2 tokens. Pass -2 to 1"
    ):
        FRAME.index(2)
    with pytest.raises(ValueError, match="Position -4 is outside prompt 0"):
        FRAME.index(-4)
    assert FRAME.real.tolist() == [[True, True, True], [False, True, True]]


def test_dense_form_over_the_limit():
    op = linear()
    assert op.to_dense().shape == (2, 3, 4, 3, 4)
    with pytest.raises(ValueError, match=r"GiB.*memory_limit.*op @ x"):
        op.to_dense(memory_limit=2 * 3 * 4 * 3 * 4 * 8 - 1)
    assert op.to_dense(memory_limit=2 * 3 * 4 * 3 * 4 * 8).shape == (2, 3, 4, 3, 4)


def test_scipy_wants_one_prompt():
    with pytest.raises(ValueError, match=r"has 2 prompts.*lens\[i\]"):
        linear().to_scipy()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    pos=st.integers(1, 5),
    kv=st.integers(1, 3),
    rep=st.integers(1, 3),
    d_head=st.integers(1, 4),
    many=st.lists(st.integers(1, 2), max_size=2),
    seed=st.integers(0, 9),
)
def test_primitives_are_linear_with_exact_adjoints(batch, pos, kv, rep, d_head, many, seed):
    g = torch.Generator().manual_seed(seed)
    frame = Frame(((0, pos),) * batch, pos, torch.float64, torch.device("cpu"))

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    width = kv * d_head
    pattern = randn(batch, kv * rep, pos, pos)
    maps = [
        Mix(frame, pattern, kv, d_head),
        Gate(frame, randn(batch, pos, width), randn(width), "offset"),
        Norm(
            frame,
            "ln",
            randn(batch, pos, 1).abs() + 0.1,
            NormWeights(randn(width), randn(width), True),
            width,
        ),
        Norm(frame, "rms", randn(batch, pos, 1).abs() + 0.1, NormWeights(None, None, False), width),
        Linear(frame, randn(width, 3), randn(3), "b"),
    ]
    for op in maps:
        assert dot_test(op, seed) <= ROUNDING
        x = randn(*many, batch, pos, width)
        one = op.apply(x.reshape(-1, batch, pos, width)[0])
        assert torch.allclose(op.apply(x).reshape(-1, *one.shape)[0], one, atol=ROUNDING)
        assert op.apply(torch.zeros_like(x)).abs().max() == 0
    v = randn(batch, pos, width)
    slow = torch.zeros(batch, pos, kv * rep, d_head, dtype=torch.float64)
    for h in range(kv * rep):
        slow[:, :, h] = pattern[:, h] @ v.unflatten(-1, (kv, d_head))[:, :, h // rep]
    assert torch.allclose(maps[0].apply(v), slow.flatten(2), atol=ROUNDING)
