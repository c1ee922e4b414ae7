"""The maps of linear attention, beside slow plain loops."""

import pytest
import torch
from comparisons import assert_close

from tensorlens_tl.maps import Conv, DeltaRule, Frame, dot_test

FRAME = Frame(((0, 6), (2, 6)), 6, torch.float64, torch.device("cpu"))


def drawn(*shape):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64
    )


def rule(frame=FRAME):
    q, k = drawn(2, 6, 3, 4), drawn(2, 6, 3, 4).flip(1)
    k = k / k.norm(dim=-1, keepdim=True)
    return DeltaRule(frame, q, k, drawn(2, 6, 3).sigmoid() * 2, drawn(2, 6, 3).flip(0).sigmoid(), 5)


def test_the_recurrence_is_its_definition():
    """S_t = α (I − β k kᵀ) S + β k vᵀ and o = Sᵀ q, one head and position at a time."""
    r, v = rule(), drawn(2, 6, 15)
    expected = torch.zeros(2, 6, 3, 5, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            S = torch.zeros(4, 5, dtype=torch.float64)
            for t in range(6):
                k, beta, eye = r.k[b, t, h], r.beta[b, t, h], torch.eye(4, dtype=torch.float64)
                S = r.decay[b, t, h] * (eye - beta * torch.outer(k, k)) @ S
                S = S + beta * torch.outer(k, v[b, t].view(3, 5)[h])
                expected[b, t, h] = S.T @ r.q[b, t, h]
    assert_close(r.apply(v), expected.flatten(2), 1e-14)
    many = torch.stack([v, 2 * v, v.flip(1)])
    assert_close(r.apply(many)[2], r.apply(v.flip(1)), 1e-14, "many vectors at once")


def test_the_adjoint_is_the_transposed_dense_form():
    r = rule()
    dense = r.to_dense().permute(0, 1, 2, 3, 4).reshape(2, 90, 90)
    y = drawn(2, 6, 15)
    assert_close(r.apply_t(y).flatten(1), torch.einsum("bij,bi->bj", dense, y.flatten(1)), 1e-14)
    assert dot_test(r) < 1e-15
    assert torch.stack(
        [r.head(h).apply_t(y.unflatten(2, (3, 5))[:, :, h]) for h in range(3)], 2
    ).equal(r.by_head_t(y))
    with pytest.raises(ValueError, match="gated delta nets, which have no attention pattern"):
        _ = r.pattern


def test_a_part_of_one_prompt_is_cut_out():
    r, v = rule(), drawn(2, 6, 15)
    v[1, :2] = 0
    assert_close(r.cut(1, slice(2, 6)).apply(v[1:, 2:]), r.apply(v)[1:, 2:], 1e-14)


def test_the_convolution_looks_back_over_real_tokens():
    conv, x = Conv(FRAME, drawn(15, 3)), drawn(2, 6, 15)
    seen = torch.where(FRAME.real[..., None], x, 0)
    padded = torch.nn.functional.pad(seen.mT, (2, 0))
    expected = torch.nn.functional.conv1d(padded, conv.W[:, None], groups=15).mT
    assert_close(conv.apply(x), expected, 1e-14)
    assert dot_test(conv) < 1e-15
    assert_close(conv.columns(slice(5, 10)).apply(x[..., 5:10]), expected[..., 5:10], 1e-14)
    assert_close(conv.cut(1, slice(2, 6)).apply(x[1:, 2:]), expected[1:, 2:], 1e-14)
    long = Conv(FRAME, drawn(15, 9))  # longer than the prompt
    assert dot_test(long) < 1e-15
