"""Runs of a Bridge that start from embeddings: all rows given, or a soft prompt before tokens."""

from functools import cache

import pytest
import torch
from comparisons import assert_close
from models import ORACLE, ROUNDING, build_bridge_from_module, quiet, tokens

import tensorlens_tl
from tensorlens_tl.support.every_name import tiny_model

pytestmark = pytest.mark.offered(build_bridge_from_module is not None)
NAMES = {
    "GPT2LMHeadModel": (ROUNDING, ["pos_embed"]),
    "BloomForCausalLM": (ROUNDING, []),
    "GraniteForCausalLM": (1e-6, []),
    "BertForMaskedLM": (ROUNDING, ["pos_embed", "type_embed", "embed_ln.b"]),
}
"""Models whose embeddings are given positions, a norm, a multiplier, or a norm and two others."""
SOFT = 2


@cache
def run(name):
    """A model, rows of it, Hugging Face's logits of them and gradient, and a capture."""
    with quiet():
        model = tiny_model(name)
        x = model.get_input_embeddings()(tokens()).detach()
        x[:, :SOFT] += 0.3 * torch.randn(
            2, SOFT, x.shape[-1], generator=torch.Generator().manual_seed(0), dtype=x.dtype
        )
        given = x.clone().requires_grad_()
        logits = model(inputs_embeds=given).logits
        (gradient,) = torch.autograd.grad(logits[:, -1, 3].sum(), given)
        bridge = tensorlens_tl.wrap(model)
        lens = tensorlens_tl.capture(bridge, None, inputs_embeds=x)[1]
    return bridge, x, logits.detach(), gradient, lens


@pytest.mark.parametrize("name", NAMES)
def test_rows_sum_to_hugging_faces_logit(name):
    (within, others), (_, x, expected, _, lens) = NAMES[name], run(name)
    ours = lens.readout(lens.operator.apply(lens.embedding) + lens.operator.bias)
    assert_close(ours, expected, within)
    assert list(lens.capture.embeddings) == ["inputs_embeds", *others]
    for by in ("token", "component"):
        assert_close(lens.attribute(3, by=by).values.sum(1), expected[:, -1, 3], within)
    labels = lens.attribute(3).labels[0]
    assert labels[: x.shape[1]] == tuple(f"inputs_embeds[{i}]" for i in range(x.shape[1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_soft_prompt_stands_before_the_tokens(name):
    (within, others), (bridge, x, expected, _, lens) = NAMES[name], run(name)
    with quiet():
        ids = tokens()[:, SOFT:]
        soft = tensorlens_tl.capture(bridge, ids, soft_prompt=x[:, :SOFT])[1]
    assert_close(soft.logits, expected, within)
    assert list(soft.capture.embeddings) == ["embed", "soft_prompt", *others]
    both, found = lens.attribute(3), soft.attribute(3)
    n = x.shape[1]
    order = [*range(SOFT, n), *range(SOFT)]  # tokens first, then the soft prompt
    assert_close(found.values[:, :n], both.values[:, order], within)
    assert found.labels[0][n - SOFT : n] == ("soft_prompt[0]", "soft_prompt[1]")
    assert found.labels[0][0] == f'"#{int(ids[0, 0])}"@{SOFT}'


def test_prompts_of_several_lengths_are_each_as_alone():
    bridge, x, *_ = run("GPT2LMHeadModel")
    ids, mask = torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    soft = x[0, :SOFT]
    with quiet():
        lens = tensorlens_tl.capture(bridge, ids, attention_mask=mask, soft_prompt=soft)[1]
        alone = tensorlens_tl.capture(bridge, ids[1, 1:], soft_prompt=soft)[1]
    assert lens[1].capture.prompts.strings == alone.capture.prompts.strings
    assert_close(lens[1].attribute(3).values, alone.attribute(3).values, ROUNDING)
    scores = lens.token_scores("grad_x_input", 3, model=bridge).values
    there = alone.token_scores("grad_x_input", 3, model=bridge).values
    assert_close(scores[1, : there.shape[1]], there[0], ORACLE)


def test_gradients_of_the_model_two_inputs_and_a_file(tmp_path):
    bridge, x, expected, gradient, lens = run("GPT2LMHeadModel")
    live = lens.token_scores("grad_x_input", 3, model=bridge).values
    entered = lens.embedding  # with the positions
    assert_close(live, (gradient * entered).sum(-1), ORACLE)
    with quiet():
        other = tensorlens_tl.capture(bridge, {"inputs_embeds": x.flip(0)})[1]
    found = lens.attribute(3, baseline=other, at="secant")
    assert_close(found.values.sum(1), (expected - expected.flip(0))[:, -1, 3], ORACLE)
    lens.save(tmp_path / "lens.safetensors")
    loaded = tensorlens_tl.load(tmp_path / "lens.safetensors", model=bridge)
    assert torch.equal(loaded.attribute(3).values, lens.attribute(3).values)


def test_what_asks_for_token_ids_is_refused_by_name():
    lens = run("GPT2LMHeadModel")[-1]
    match = r"needs token ids, and .*inputs_embeds\[0\], .*Ask it of a run on text"
    with pytest.raises(ValueError, match=match):
        lens.attribute_sequence(-2)
    with pytest.raises(ValueError, match="this run has none, but inputs_embeds, pos_embed"):
        lens.attribute(3, baseline="mean")


X = torch.zeros(1, 2, 32)
WRONG = {
    "inputs_embeds is given beside a prompt": ([5, 6], {"inputs_embeds": X}),
    r"inputs_embeds is \[1, 2\], and a run from embeddings": (None, {"inputs_embeds": X[..., 0]}),
    r"inputs_embeds is a list": (None, {"inputs_embeds": [[0.0]]}),
    "with at most 64 positions": (None, {"inputs_embeds": torch.zeros(65, 32)}),
    "attention_mask has shape": (None, {"inputs_embeds": X, "attention_mask": [[1, 1, 1]]}),
    "soft_prompt stands before .* no prompt stands": (None, {"soft_prompt": X}),
    "soft_prompt stands before .* position_ids": ([5], {"soft_prompt": X, "position_ids": [[0]]}),
    "soft_prompt has 3 prompts beside 1": (
        [5],
        {"soft_prompt": X.repeat(3, 1, 1)},
    ),
    r"soft_prompt is \[1, 2, 16\]": ([5], {"soft_prompt": X[..., :16]}),
}


@pytest.mark.parametrize("words", WRONG)
def test_other_rows_are_refused(words):
    given, kwargs = WRONG[words]
    with pytest.raises(ValueError, match=words), quiet():
        tensorlens_tl.capture(run("GPT2LMHeadModel")[0], given, **kwargs)
