"""Masked runs equal calls of the model made by hand, and leave the model as it was."""

from functools import cache

import pytest
import torch
from comparisons import assert_close
from models import CASES, quiet, tokens

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.evaluation import evaluate
from tensorlens_tl.evaluation.masking import MASKINGS, METRICS, MaskedRuns, Masking, end_logits
from tensorlens_tl.hosts.entry import adapt

FAMILIES = ("gpt2", "llama", "neox", "gemma2", "attn-only", "qwen3", "solu")
FEW = [c for c in CASES.values() if c.name.split("-", 1)[1] in FAMILIES]
MASKED = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 1]]).bool()


def by_hand(model, ids, masked, kind, token, scale=1.0):
    if kind == "delete":
        return model(torch.stack([row[~m] for row, m in zip(ids, masked, strict=True)]))[:, -1]
    if kind == "token":
        return model(torch.where(masked, token, ids))[:, -1]
    mean = scale * model.W_E.mean(0)

    def average(x, hook):
        x = x.clone()
        x[masked] = mean
        return x

    return model.run_with_hooks(ids, fwd_hooks=[("hook_embed", average)])[:, -1]


def state_of(model):
    hooks = [(name, len(point.fwd_hooks)) for name, point in model.hook_dict.items()]
    grads = [(p.requires_grad, p.grad, p._version) for p in model.parameters()]
    return hooks, grads, model.training, len(model.unembed._forward_pre_hooks)


@pytest.mark.parametrize("kind", MASKINGS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_masked_runs_are_calls_of_the_model(case, kind):
    model, ids = case.model(), tokens()
    with quiet(), torch.no_grad():
        # Gemma scales its embeddings; that of an ordinary token tells by how much.
        _, seen = model.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_embed"))
        embed = next(iter(seen.values()))
        scale = float(embed[0, 0].norm() / model.W_E[ids[0, 0]].norm())
        before = state_of(model)
        adapter = adapt(model)
        ours = end_logits(adapter, ids, MASKED, Masking.of(kind, adapter, 5))
        assert state_of(model) == before
        theirs = by_hand(model, ids, MASKED, kind, 5, scale)
        plain = end_logits(adapter, ids, torch.zeros_like(MASKED), Masking.of(kind, adapter, 5))
        assert_close(plain, model(ids)[:, -1], case.tol())
    assert_close(ours, theirs, case.tol())
    assert (ours - plain).abs().max() > 1e-3


NO_ROW = [c for c in CASES.values() if c.name in ("hooked-gpt2", "bridge-opt", "bridge-gemma2")]


@pytest.mark.parametrize("case", NO_ROW, ids=str)
def test_a_row_of_zeros_as_of_a_padding_token_tells_no_scale(case):
    """Token 1 is OPT's padding, whose row is 0; a prompt may begin with it."""
    with quiet(), torch.no_grad():
        model = case.build(torch.float64)
        model.W_E[1] = 0
        mean = model.W_E.mean(0) * (32**0.5 if "gemma" in case.name else 1)
        lens = tensorlens_tl.capture(model, [1, 5, 1, 7])[1]
        found = Masking.of("mean", adapt(model)).embedding
    assert found is not None
    assert_close(found, mean, case.tol())
    given, own = (lens.attribute(3, baseline=one).values for one in (mean, "mean"))
    assert_close(own, given, case.tol())


@pytest.mark.parametrize("kind", MASKINGS)
def test_hooks_come_off_after_an_error(kind, monkeypatch):
    model, ids = FEW[0].model(), tokens()
    adapter = adapt(model)
    way, before = Masking.of(kind, adapter, 5), state_of(model)

    def broken(self, inputs, kwargs):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(type(adapter), "run", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        end_logits(adapter, ids, MASKED, way)
    assert state_of(model) == before


def test_a_model_that_shows_no_embeddings_has_no_mean(monkeypatch):
    adapter = adapt(FEW[0].model())
    monkeypatch.setattr(type(adapter), "embed_weights", lambda self: None)
    with pytest.raises(ValueError, match=r"'mean' needs W_E, which .* Use 'delete' or 'token'"):
        Masking.of("mean", adapter)


@cache
def demo_model():
    with quiet():
        return demo.load_model()


PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.mark.parametrize("kind", MASKINGS)
def test_outcomes_are_read_off_the_model_s_logits(kind):
    """Two prompts of unequal length; each set is run once, in whatever batches."""
    model = demo_model()
    adapter = adapt(model)
    prompts = [model.to_tokens(text)[0] for text in (PROMPT, "The capital of France is")]
    targets, foils = (
        [model.to_single_token(word) for word in words]
        for words in (("Mary", "Paris"), ("John", "Rome"))
    )
    way = Masking.of(kind, adapter)
    runs = MaskedRuns(adapter, prompts, targets, foils, way, batch_size=2, progress=False)
    asked = [(0, 0), (0, 0b100), (1, 0b1000), (0, 0b10100), (0, 0b100)]
    runs.need(asked)
    assert runs.runs == 4
    for prompt, masked in asked:
        ids = prompts[prompt][None]
        where = torch.tensor([[bool(masked >> j & 1) for j in range(ids.shape[1])]])
        with torch.no_grad(), quiet():
            logits = by_hand(model, ids, where, kind, way.token)[0].double()
        p = float(logits.softmax(-1)[targets[prompt]])
        expected = {
            "probability": p,
            "log_odds": float(torch.tensor(p).logit()),
            "logit": float(logits[targets[prompt]]),
            "logit_diff": float(logits[targets[prompt]] - logits[foils[prompt]]),
            "agreement": float(logits.argmax() == targets[prompt]),
        }
        for metric in METRICS:
            (found,) = runs.outcomes(prompt, metric, [masked])
            tolerance = 2e-2 if metric == "log_odds" else 2e-4  # 1 − p loses digits, by hand
            assert found == pytest.approx(expected[metric], rel=tolerance, abs=1e-4)
    assert runs.runs == 4
    runs.forget()
    runs.need(asked)
    assert runs.runs == 8


def test_the_mask_token():
    adapter = adapt(demo_model())
    assert Masking.of("token", adapter).token == adapter.tokenizer.unk_token_id
    assert Masking.of("token", adapter, "Mary").token == adapter.model.to_single_token("Mary")
    assert Masking.of("token", adapter, 7).token == 7


@pytest.mark.parametrize("given", [0, None])
def test_a_mask_token_whose_id_is_0(given):
    """Given as an id, or as the first that the tokenizer has: 0 is an id and not nothing."""
    model, ids = demo_model(), demo_model().to_tokens(PROMPT)
    adapter, masked = adapt(model), torch.zeros_like(ids).bool()
    masked[0, [1, 3]] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.tokenizer), "mask_token_id", 0, raising=False)
        masking = Masking.of("token", adapter, given)
        found = evaluate(
            model, [PROMPT], "random", "insertion_deletion", masking="token", mask_token=given
        )
    assert masking.token == found.mask_token == 0 and found.runs["token"] > 0
    with quiet(), torch.no_grad():
        expected = by_hand(model, ids, masked, "token", 0)
    assert_close(end_logits(adapter, ids, masked, masking), expected, 1e-6)


def test_pad_ids_in_a_row_are_no_padding():
    """A host that pads left masks pad ids in token tensors; masked tokens are real."""
    model, ids = demo_model(), demo_model().to_tokens(PROMPT)
    masked = torch.zeros_like(ids).bool()
    masked[0, [2, 5]] = True
    adapter, pad = adapt(model), model.tokenizer.pad_token_id
    right = end_logits(adapter, ids, masked, Masking.of("token", adapter, pad))
    side = model.tokenizer.padding_side
    try:
        model.tokenizer.padding_side = "left"
        left = end_logits(adapter, ids, masked, Masking.of("token", adapter, pad))
    finally:
        model.tokenizer.padding_side = side
    assert_close(left, right, 1e-5)


def test_refusals():
    adapter = adapt(demo_model())
    with pytest.raises(
        ValueError, match=r"masking='blur' does not exist. Use one of delete, token, mean"
    ):
        Masking.of("blur", adapter)
    with pytest.raises(ValueError, match=r"mask_token='Mary John' is 2 tokens. Pass one token"):
        Masking.of("token", adapter, "Mary John")
    with pytest.raises(
        ValueError, match=r"mask_token=9999 is outside the vocabulary. Pass an id from 0 to \d+"
    ):
        Masking.of("token", adapter, 9999)
    with pytest.raises(ValueError, match=r"has no mask token. Pass mask_token="):
        Masking.of("token", adapt(FEW[0].model()))
