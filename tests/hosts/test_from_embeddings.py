"""A HookedTransformer that starts from what enters block 0, as a vision transformer does."""

from functools import cache

import pytest
import torch
from comparisons import assert_close
from models import ORACLE, ROUNDING, HookedTransformer, build_hooked, quiet

import tensorlens_tl

pytestmark = pytest.mark.offered(HookedTransformer is not None)
CLASSES, ROWS = 5, 7


@cache
def run():
    config = {"attention_dir": "bidirectional", "normalization_type": "LN", "act_fn": "gelu"}
    with quiet():
        model = build_hooked({**config, "d_vocab": CLASSES, "d_vocab_out": CLASSES}, torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, ROWS, model.cfg.d_model, generator=generator, dtype=torch.float64)
    with torch.no_grad(), quiet():
        expected = model(x, start_at_layer=0, return_type="logits")
        lens = tensorlens_tl.capture(model, x, start_at_layer=0)[1]
    return model, x, expected, lens


def test_classes_at_a_row_are_the_sum_of_all_rows():
    _, x, expected, lens = run()
    assert_close(lens.logits, expected, ROUNDING)
    assert lens.completeness_error <= ROUNDING
    assert list(lens.capture.embeddings) == ["inputs_embeds"]
    assert torch.equal(lens.embedding, x)
    for by in ("token", "component", "head"):
        found = lens.attribute(3, pos=0, by=by)
        assert_close(found.values.sum(1), expected[:, 0, 3], ROUNDING)
    assert lens.attribute(3, pos=0).labels[0][:2] == ("inputs_embeds[0]", "inputs_embeds[1]")


def test_gradients_of_the_model_and_two_inputs():
    model, x, expected, lens = run()
    given = x.clone().requires_grad_()
    logits = model(given, start_at_layer=0, return_type="logits")
    (gradient,) = torch.autograd.grad(logits[:, 0, 3].sum(), given)
    scores = lens.token_scores("grad_x_input", 3, pos=0, model=model).values
    assert_close(scores, (gradient * given).sum(-1), ORACLE)
    other = tensorlens_tl.capture(model, x.flip(0), start_at_layer=0)[1]
    found = lens.attribute(3, pos=0, baseline=other, at="secant")
    assert_close(found.values.sum(1), (expected - expected.flip(0))[:, 0, 3], ORACLE)


def test_it_is_saved_and_loaded(tmp_path):
    model, _, _, lens = run()
    lens.save(tmp_path / "lens.safetensors")
    loaded = tensorlens_tl.load(tmp_path / "lens.safetensors", model=model)
    assert torch.equal(loaded.attribute(3, pos=0).values, lens.attribute(3, pos=0).values)


WRONG = {
    r"The input is a list, and start_at_layer=0 starts from .*\. Pass numbers": ([1, 2], 0),
    r"The input is \[2, 3\], and start_at_layer=0": (torch.zeros(2, 3), 0),
    r"start_at_layer would change what is run": ([1, 2], 1),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_enters_no_block_is_refused(words):
    given, start = WRONG[words]
    with pytest.raises(ValueError, match=words):
        tensorlens_tl.capture(run()[0], given, start_at_layer=start)
