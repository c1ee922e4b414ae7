"""Results for looking at hold the numbers of the calls that they are made of."""

import pytest
import torch
from comparisons import assert_close
from models import ORACLE, PER_SHAPE, SHAPES, lens_of, quiet, tokens

import tensorlens_tl

pytestmark = pytest.mark.algebra

FIRST = SHAPES[0]
every_shape = pytest.mark.parametrize("case", PER_SHAPE, ids=str)


@pytest.fixture(scope="module")
def padded():
    """Three prompts of 7, 5 and 6 tokens, padded on the left."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :2], mask[2, :1] = 0, 0
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(FIRST.model(), tokens(3), attention_mask=mask)[1]


@every_shape
def test_the_sum_so_far_is_the_frozen_logit_lens_without_its_constants(case):
    """Two ways to one number: added up step by step, or read off each residual."""
    lens = lens_of(case)
    found = lens.waterfall(3, 4)
    read = lens.logit_lens(norm="frozen").logits[:, :, 0]
    readout = found.sums[:, -1:]
    assert_close(
        found.sums.cumsum(1)[:, :-1], read[..., 3] - read[..., 4] - readout, case.within("oracle")
    )
    anew = lens.logit_lens().logits[:, :, 0]
    assert torch.equal(found.lens[:, :-1], anew[..., 3] - anew[..., 4])
    assert_close(found.sums.sum(1), found.components.target_value, case.within("oracle"))
    assert_close(found.lens[:, -1], found.components.target_value, case.within("oracle"))
    assert found.steps[0] == "embed" and found.steps[-1] == "readout"
    assert len(found.steps) == len(lens.operator.steps) + 2


def test_a_direction_has_no_logit_lens():
    lens = lens_of(FIRST)
    direction = torch.arange(lens.capture.resid_final.shape[-1], dtype=torch.float64)
    found = lens.waterfall(direction)
    assert found.lens is None and "logit lens" not in repr(found)
    predicted = lens.waterfall().lens[:, -1]
    assert torch.equal(predicted, lens.logit_lens().logits[:, -1, 0].amax(-1))


def test_maps_by_depth_are_those_of_each_site(padded):
    found = padded.operator_maps(3)
    sites = padded.operator.sites
    assert [one.layers for one in found.depths] == [(site, sites[-1]) for site in sites[:-1]]
    for one in found.depths:
        assert torch.equal(one.values, padded.token_matrix("in_out", 3, one.layers).values)
    assert torch.equal(found.baseline.values, padded.token_matrix("rollout").values)
    assert found.completeness_error <= ORACLE
    # At the last site every position is made of what stands there.
    last = found.depths[-1][0]
    assert_close(last, last.diagonal().diag(), ORACLE)
    some = padded.operator_maps(3, None, [1])
    assert some.baseline is None and some.depths[0].layers[0] == "blocks.1.hook_resid_pre"
    with pytest.raises(ValueError, match=r"sites= is empty\. Pass names of sites"):
        padded.operator_maps(sites=[])


def test_rows_of_the_map_are_waterfalls_of_their_own(padded):
    for target in (3, "prediction"):
        found = padded.operator_maps(target, None, [0])
        for prompt, rows in enumerate(found.waterfalls):
            for pos in (0, len(rows) - 1):
                own = padded[prompt].waterfall(None if target == "prediction" else 3, pos=pos)
                assert_close(rows.components.values[pos], own.components.values[0], ORACLE)
                assert_close(rows.lens[pos], own.lens[0], ORACLE)
                assert rows.steps == own.steps and rows.of_step == own.of_step
            start, stop = padded.capture.frame.spans[prompt]
            asked = found.depths[0].target_value[prompt, start:stop]
            assert_close(rows.sums.sum(1), asked, ORACLE)


def test_heads_are_those_of_every_positions_own_split(padded):
    found = padded.head_maps(["L1H2", "L0H0"], 3)
    attention = padded.capture.blocks[1].attn.pattern[:, 2]
    for prompt, (start, stop) in enumerate(padded.capture.frame.spans):
        for pos in range(stop - start):
            split = padded[prompt].attribute(3, pos=pos, by="component")
            rows = {str(s.node): v for s, v in zip(split.sources, split.values[0], strict=True)}
            sums = found.values[prompt, :, start + pos].sum(-1)
            assert_close(sums, torch.stack([rows["L1H2"], rows["L0H0"]]), ORACLE)
        here = slice(start, stop)
        assert torch.equal(found.patterns[prompt, 0, here, here], attention[prompt, here, here])
        outside = found.values[prompt].clone()
        outside[:, here, here] = 0
        assert not outside.any()
    for head, said in (
        ("L9H0", "is not a head"),
        ("L0H99", "There is no head"),
        ("embed", "is not"),
    ):
        with pytest.raises(ValueError, match=said):
            padded.head_maps(head)


def test_a_comparison_is_the_secants(padded):
    lens = lens_of(FIRST)
    with quiet(), torch.no_grad():
        other = tensorlens_tl.capture(FIRST.model(), tokens(2, seed=1))[1]
    found = lens.compare(other, 3, 4)
    for by, split in (("token", found.tokens), ("component", found.components)):
        again = lens.attribute(3, 4, by=by, baseline=other, at="secant")
        assert torch.equal(split.values, again.values)
        assert_close(
            split.values.sum(1), found.clean.target_value - found.corrupted.target_value, ORACLE
        )
    # Without a target, both runs are asked for this run's prediction.
    assert lens.compare(other).corrupted.target == lens.compare(other).clean.target
    with pytest.raises(ValueError, match=r"other is .*, not a lens\. Capture the other prompt"):
        lens.compare("x")
