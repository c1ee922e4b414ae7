"""Weights and logits written to after the capture: by whatever way, the lens refuses."""

import copy

import models
import pytest
import torch
from models import PER_SHAPE, SHAPES, tokens
from torch.nn.utils import vector_to_parameters

import tensorlens_tl
from tensorlens_tl.lens import WriteCheck

WRITTEN = "The model's weights were written to after the capture"
every_shape = pytest.mark.parametrize("case", PER_SHAPE, ids=str)
FIRST = SHAPES[0]


def fresh(case, dtype=torch.float64):
    with models.quiet():
        model = case.build(dtype)
    with torch.no_grad():
        return model, *tensorlens_tl.capture(model, tokens())


def by_data(model):
    for p in model.parameters():
        p.data.mul_(0.9)


def by_numpy(model):
    for p in model.parameters():
        array = p.detach().numpy()
        array *= 0.9


def by_fused_optimizer(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), fused=True).step()


def by_vector(model):
    vector = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    vector_to_parameters(0.9 * vector, model.parameters())


def by_cast(model):
    torch.nn.Module.half(model)


def by_replaced_data(model):
    for p in model.parameters():
        p.data = p.data * 0.9


@every_shape
@pytest.mark.parametrize("write", [by_data, by_numpy, by_fused_optimizer], ids=lambda f: f.__name__)
def test_writes_that_torch_does_not_count_are_refused(case, write):
    model, _, lens = fresh(case)
    write(model)
    for ask in (lens.attribute, lambda: lens.operator, lens.verify, lambda: lens[0].paths(3)):
        with pytest.raises(ValueError, match=WRITTEN):
            ask()


@every_shape
@pytest.mark.parametrize("write", [by_vector, by_cast, by_replaced_data], ids=lambda f: f.__name__)
def test_replaced_weights_are_refused_or_the_lens_still_has_the_old_ones(case, write):
    model, _, lens = fresh(case)
    before = lens.attribute(3).values
    write(model)
    try:
        after = lens.attribute(3).values
    except ValueError as error:
        assert WRITTEN in str(error)
    else:  # the lens refers to the old memory, which nobody wrote to
        assert torch.equal(after, before)


@every_shape
def test_eight_rows_or_columns_of_any_weight_are_noticed(case):
    model, _, lens = fresh(case)
    read = {t.untyped_storage().data_ptr() for t in lens.capture.tensors()}
    assert all(p.untyped_storage().data_ptr() in read for p in model.ln_final.parameters())
    n = 0
    for name, p in model.named_parameters():
        if p.untyped_storage().data_ptr() not in read or not lens.capture.known_scores:
            continue
        for axis in {0, p.ndim - 1}:
            size = p.shape[axis]
            for start in {0, max(0, size // 2 - 4), max(0, size - 8)}:
                kept = p.data.clone()
                p.data.narrow(axis, start, min(8, size)).add_(1)
                assert lens.writes.written() is not None, (name, axis, start)
                p.data.copy_(kept)
                n += 1
    assert lens.writes.written() is None and (n > 20 or not lens.capture.known_scores)


@pytest.mark.parametrize(
    ("shape", "transposed"), [((300, 700), 0), ((700, 300), 1), ((6, 512, 32), 0), ((9000, 48), 0)]
)
def test_every_column_and_eight_rows_of_large_matrices_are_noticed(shape, transposed):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    W = W.mT if transposed else W
    writes, rows = WriteCheck.of([W]), W.flatten(0, -2)
    assert writes.samples[0].numel() < W.numel() / 6
    stored = W.mT if transposed else rows
    for piece in (*stored.split(8), *stored.split(1, 1)):
        old = piece.clone()
        piece.data.zero_()
        assert writes.written() is W
        piece.data.copy_(old)
    assert writes.written() is None


def test_the_logits_are_named_where_they_were_written_to():
    _, logits, lens = fresh(FIRST)
    logits.data.mul_(2)
    with pytest.raises(ValueError, match="The logits it returned were written to after"):
        lens.attribute(3)


def test_the_embedding_matrix_is_a_weight_that_the_lens_reads():
    _, _, lens = fresh(FIRST)
    lens.capture.embed_weights.W_E.data.mul_(2)
    with pytest.raises(ValueError, match=WRITTEN):
        lens.attribute(3, baseline="mean")


def test_equal_numbers_elsewhere_are_no_write():
    model, _, lens = fresh(FIRST, torch.float32)
    before = lens.attribute(3).values
    for p in model.parameters():
        p.data = p.data.clone()
    assert torch.equal(lens.attribute(3).values, before)
    for p in model.parameters():
        p.data = p.data.double()  # rounds nothing
    assert lens.writes.written() is None


def test_another_shape_and_no_number_at_all():
    W = torch.ones(40, 50)
    writes = WriteCheck.of([W])
    W.data = torch.ones(3)
    assert writes.written() is W
    N = torch.full((2, 3), torch.nan)
    assert WriteCheck.of([N]).written() is None
    assert WriteCheck().written() is None


def test_a_copy_of_a_lens_does_not_hide_a_write():
    model, _, lens = fresh(FIRST)
    twin = copy.deepcopy(lens)
    expected = twin.attribute(3).values
    by_data(model)
    with pytest.raises(ValueError, match=WRITTEN):
        copy.deepcopy(lens)
    assert torch.equal(twin.attribute(3).values, expected)  # its weights are its own
    twin.capture.unembed.weights.W_U.data.mul_(2)
    with pytest.raises(ValueError, match=WRITTEN):
        twin.attribute(3)
