"""Ways in which a lens could be silently wrong, each of them closed."""

import numpy as np
import pytest
import torch
from models import (
    ORACLE,
    ROUNDING,
    SHAPES,
    SHARED,
    HookedTransformer,
    build_bridge_from_module,
    build_hooked,
    lens_of,
    quiet,
    tokens,
)

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError, demo

FIRST = SHAPES[0]
every_host = pytest.mark.parametrize(
    "case", list({c.host: c for c in reversed(SHAPES)}.values()), ids=str
)
capped = pytest.mark.parametrize("case", [c for c in SHAPES if "gemma2" in c.name][:2], ids=str)


def capture(model, inputs, **kwargs):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(model, inputs, **kwargs)


@pytest.mark.parametrize("names", [(0, 1), (3, 7), (10, 40)], ids=str)
@every_host
def test_an_edit_that_moves_something_between_two_coordinates_is_seen(case, names):
    a, b = names

    def move(t, hook):
        t = t.clone()
        t[..., a] += 1
        t[..., b] -= 1
        return t

    model = case.model()
    name = "unembed.hook_in" if "unembed.hook_in" in model.hook_dict else "ln_final.hook_normalized"
    if b < model.cfg.d_model and name in model.hook_dict:
        with model.hooks(fwd_hooks=[(name, move)]):
            lens = capture(model, tokens())[1]
        moved = torch.zeros(model.cfg.d_model, dtype=torch.float64)
        moved[a], moved[b] = 1, -1
        if name == "unembed.hook_in":  # before it there may be a gain
            assert (lens.operator.constants()[f"{name}[user]"] - moved).abs().max() < 1e-6
        assert lens.completeness_error <= case.tol()

    def swap(t, hook):
        return t.flip(-1)

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", swap)]):
        assert capture(model, tokens())[1].completeness_error <= case.tol()


@capped
def test_one_edited_capped_logit_is_seen(case):
    model = case.model()

    def edit(module, args, output):
        return output + torch.nn.functional.one_hot(torch.tensor(17), output.shape[-1]) * 0.5

    handle = model.unembed.register_forward_hook(edit)
    try:
        with pytest.raises(CaptureMismatchError, match="logits"):
            capture(model, tokens())
    finally:
        handle.remove()
    assert capture(model, tokens())[1].completeness_error <= case.tol()


@every_host
def test_in_place_edits_are_refused(case):
    """A module hook that writes over the last block's output, after it was read there."""
    model = case.build(torch.float64)

    def double(module, args, output):
        (output[0] if isinstance(output, tuple) else output).mul_(2)

    handle = model.blocks[-1].register_forward_hook(double)
    try:
        with pytest.raises(
            CaptureMismatchError, match="Block 1 has a resid_post that was changed in place"
        ):
            capture(model, tokens())
    finally:
        handle.remove()
    assert capture(model, tokens())[1].completeness_error <= case.tol()


@every_host
def test_a_lens_knows_when_it_no_longer_describes_its_run(case):
    model = case.build(torch.float64)
    logits, lens = capture(model, tokens())
    assert lens.completeness_error <= case.tol()
    logits[..., :5] -= 100
    for question in (
        lens.attribute,
        lens.verify,
        lambda: lens.operator,
        lambda: lens.completeness_error,
    ):
        with pytest.raises(ValueError, match=r"logits it returned were written to.*Capture again"):
            question()
    _, lens = capture(model, tokens())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    with pytest.raises(ValueError, match="model's weights were written to after the capture"):
        lens[0].attribute(3)


@every_host
def test_edits_through_data_are_no_false_refusal(case):
    model = case.build(torch.float64)
    for factor in (1.0, 1.5, 0.7, 1.2):
        for parameter in model.parameters():
            parameter.data.mul_(factor)
        assert capture(model, tokens())[1].completeness_error <= case.tol()
    for factor in (1.1, 0.9, 1.1, 0.9):
        for parameter in model.parameters():
            parameter.data = parameter.data * factor
        assert capture(model, tokens())[1].completeness_error <= case.tol()


@pytest.mark.parametrize("own", ["left", "right"])
@pytest.mark.parametrize("given", ["left", "right"])
def test_padding_side_given_against_the_tokenizers(own, given):
    """Padding that is masked is cut off; padding on a side that nothing masks is refused."""
    model = demo.load_model()
    ids = model.to_tokens(["When Mary and John went to", "The capital"], padding_side="left")
    model.tokenizer.padding_side = own
    if given == "right" or HookedTransformer is None:  # a Bridge masks no ids by itself
        with pytest.raises(ValueError, match="prompt 1 begins in the padding token"):
            capture(model, ids, padding_side=given)
        return
    _, lens = capture(model, ids, padding_side=given)
    assert lens.completeness_error <= 2e-6
    assert lens[1].completeness_error <= 2e-6
    assert lens.attribute()[1].completeness_error <= 2e-6


if HookedTransformer is not None:

    def test_real_tokens_that_read_padding_are_refused():
        model = build_hooked({"attention_dir": "bidirectional"}, torch.float64)
        assert capture(model, tokens())[1].completeness_error <= ROUNDING
        mask = torch.ones(2, 7).long()
        mask[1, 4:] = 0
        with pytest.raises(ValueError, match="real tokens attend to padding"):
            capture(model, tokens(), attention_mask=mask)


def test_text_over_the_context_is_refused_not_cut():
    with pytest.raises(
        ValueError, match=r"tokens, but the model's context holds n_ctx = 64\. Shorten"
    ):
        capture(demo.load_model(), "Mary " * 100)


def test_targets_of_other_types():
    lens = lens_of(FIRST)
    expected = lens.attribute(3).values
    for same in (np.int64(3), torch.tensor(3)):
        assert torch.equal(lens.attribute(same).values, expected)
    direction = np.zeros(lens.logits.shape[-1])
    direction[3] = 1
    assert (lens.attribute(direction).values - expected).abs().max() < ORACLE
    assert (lens.attribute(direction.tolist()).values - expected).abs().max() < ORACLE
    for wrong in (3.7, True, {"a": 1}, b"Mary", torch.tensor(3.7)):
        with pytest.raises(ValueError, match=r"is no token and no direction"):
            lens.attribute(wrong)


@every_host
def test_a_target_against_itself_is_nothing(case):
    itself = lens_of(case).attribute(3, versus=3)[0]
    assert itself.values.abs().max() == 0 and itself.completeness_error == 0
    assert str(itself).splitlines()[0] == "Attribution by token of '#3' − '#3' = 0"


@every_host
def test_a_capture_warns_of_nothing_and_reprs_are_short(case):
    import warnings

    model = case.build(torch.float64)  # fresh: nothing of it is kept yet
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        _, lens = tensorlens_tl.capture(model, tokens())
        assert lens.attribute(3).completeness_error <= 10 * case.tol()
    assert len(repr(lens.operator)) < 120 and len(repr(lens.capture)) < 120


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared model")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype):
    """The operator computes in float32; what is left is the model's own rounding."""
    from tensorlens_tl.hosts import load_model

    with quiet():
        model = load_model(str(SHARED / "stories260K"))
        model.to(dtype)
    text = (SHARED / "text" / "tinystories_sample" / "tinystories_sample.txt").read_text()
    sentences = [s.strip() + "." for s in text.replace("\n", " ").split(".") if len(s.strip()) > 5]
    for sentence in sentences[:20]:
        _, lens = capture(model, sentence)
        assert lens.capture.frame.dtype == torch.float32
        assert lens.completeness_error <= (0.05 if dtype == torch.bfloat16 else 0.01)


if build_bridge_from_module is not None:

    def test_an_unsupported_hugging_face_model_is_left_as_it_was():
        from transformers import MambaConfig, MambaForCausalLM

        config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4)
        model = MambaForCausalLM(config)
        before = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match="Cannot freeze MambaForCausalLM"):
            tensorlens_tl.capture(model, [1, 2])
        assert before == [type(m) for m in model.modules()]
