"""Runs that users' hooks changed: attention that looks ahead, edited residuals and norms."""

from __future__ import annotations

import pytest
import torch
from comparisons import assert_close
from models import (
    CASES,
    GATED,
    ROUNDING,
    HookedTransformer,
    build_hooked,
    lens_of,
    quiet,
    randn_like,
    tokens,
)
from oracles import gradient_of
from test_contraction import dense_of

import tensorlens_tl

TWO = [CASES[name] for name in ("hooked-gpt2", "native-gpt2", "bridge-llama") if name in CASES][-2:]


def hooked_lens(case, hooks, **kwargs):
    model = case.model()
    with quiet(), torch.no_grad(), model.hooks(hooks):
        return tensorlens_tl.capture(model, tokens(), **kwargs)[1]


def uniform(pattern, hook):
    return torch.full_like(pattern, 1 / pattern.shape[-1])


@pytest.mark.parametrize("case", TWO, ids=str)
def test_blocks_rows_and_dense_form_of_attention_that_looks_ahead(case):
    lens = hooked_lens(case, [("blocks.1.attn.hook_pattern", uniform)])
    T, dense = lens.operator, dense_of(lens.operator)
    assert dense[:, 0, :, -1].abs().max() > 1e-3  # the first position reads the last
    assert_close(T.to_dense(), dense, ROUNDING)
    assert_close(T.block(0, None), dense[:, 0], ROUNDING)
    assert_close(T.block(None, 6), dense[:, :, :, 6], ROUNDING)
    assert_close(T.block(1, 5), dense[:, 1, :, 5], ROUNDING)
    for block in lens.capture.blocks:
        for query in (0, 3):
            rows = block.attn.mix.rows(torch.tensor([query, query]))
            assert torch.equal(rows, block.attn.mix.pattern[:, :, query])
    assert lens.capture.blocks[1].attn.mix.looks_ahead(0)
    assert not lens.capture.blocks[0].attn.mix.looks_ahead(0)
    assert lens.attribute(3, pos=0).completeness_error <= 1e-6


if HookedTransformer is not None:

    def test_recomputed_attention_that_looks_ahead():
        model = build_hooked({"attention_dir": "bidirectional"}, torch.float64)
        with quiet(), torch.no_grad():
            stored, again = (
                tensorlens_tl.capture(model, tokens(), pattern=pattern)[1]
                for pattern in ("stored", "recomputed")
            )
        assert_close(again.operator.to_dense(), stored.operator.to_dense(), ROUNDING)
        assert_close(again.operator.block(0, None), stored.operator.block(0, None), ROUNDING)
        query = torch.tensor([0, 2])
        for one, other in zip(stored.capture.blocks, again.capture.blocks, strict=True):
            assert other.attn.mix.looks_ahead(0)
            assert_close(other.attn.mix.rows(query), one.attn.mix.rows(query), ROUNDING)


@pytest.mark.parametrize("case", GATED[:1], ids=str)
def test_a_baseline_of_another_gate_is_refused(case):
    lens, other = lens_of(case), lens_of(case, gate="half")
    with pytest.raises(ValueError, match=r"captured with .*Capture both in the same way"):
        lens.attribute(3, baseline=other)


def times(factor):
    return lambda x, hook: x * factor


EDITS = [
    ("blocks.0.hook_attn_out", times(1.3)),
    ("blocks.1.hook_resid_pre", times(0.8)),
    ("blocks.1.hook_resid_post", times(1.5)),
    ("ln_final.hook_normalized", times(1.1)),
]


@pytest.mark.parametrize("case", TWO, ids=str)
def test_restrictions_keep_every_edit(case):
    lens = hooked_lens(case, EDITS)
    op, x, u = lens.operator, randn_like(lens.embedding), randn_like(lens.embedding, 1)
    assert sum("[user]" in name for name in op.constants()) == len(EDITS)
    whole = op.restrict(op.wiring.edges())
    assert_close(whole @ x, op @ x, ROUNDING)
    assert_close(whole.bias, op.bias, ROUNDING)
    part = op.restrict(list(op.wiring.edges())[::2])
    y = randn_like(lens.embedding, 2)
    assert_close((part.apply(x) * y).sum(), (x * part.apply_t(y)).sum(), ROUNDING)
    constants, effects = part.constants(), {}
    part.apply_t(u, effects)
    assert effects.keys() == constants.keys()
    assert sum("[user]" in name for name in constants) == len(EDITS)
    assert_close(sum(constants.values()), part.bias, ROUNDING)
    for name, constant in constants.items():
        own = (u * constant).sum()
        assert (effects[name].sum() - own).abs() <= ROUNDING * (u * constant).abs().sum(), name


@pytest.mark.parametrize("case", TWO, ids=str)
def test_layer_totals_count_the_edits_of_their_layer(case):
    lens = hooked_lens(case, EDITS)
    op, blocks = lens.operator, lens.capture.blocks
    states = [*(block.resid_pre for block in blocks), lens.capture.resid_final]
    target = gradient_of(lens, 3).target
    u = torch.zeros_like(lens.embedding)
    u[:, -1] = target.covector
    layers = lens.attribute(3, by="layer", effect="total")
    for layer in range(2):
        c = op.between(f"blocks.{layer}.hook_resid_post", op.sites[-1]).T @ u
        expected = ((states[layer + 1] - states[layer]) * c).sum(-1)
        ours = layers.values[:, layer * 7 : layer * 7 + 7]
        assert_close(ours, expected, 10 * case.tol(), f"L{layer}")
