"""What enters the first block: each source by itself, and all of them together."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from comparisons import assert_close
from models import CASES, build_bridge_from_module, quiet
from test_operator import test_gradient_and_curvature_of_the_frozen_model as gradient_law

import tensorlens_tl
from tensorlens_tl.support.tiny_models import find, randomize

bridges = pytest.mark.skipif(build_bridge_from_module is None, reason="this host has no Bridge")

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 50, "max_position_embeddings": 64, "head_dim": 8,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
            "attention_multiplier": 0.3}  # fmt: skip
_XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "vocab_size": 50}
TEXTS = {
    "granite": ("Granite", {**TEXT, **_GRANITE}, ("embed",)),
    "xglm": ("XGLM", _XGLM, ("embed", "pos_embed")),
    "nanochat": ("NanoChat", TEXT, ("embed",)),
}
IDS = torch.tensor([[1, 5, 7, 9, 3], [1, 6, 8, 2, 4]])


@contextmanager
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # XGLM's mask is of the default dtype
    try:
        with torch.no_grad(), quiet():
            yield
    finally:
        torch.set_default_dtype(before)


def hugging_face(name, config):
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = find("transformers", name)(config).to(torch.float64).eval()
    randomize(model)
    return model


@cache
def of_text(kind):
    name, options, _ = TEXTS[kind]
    config = find("transformers", f"{name}Config")
    if config is None or not build_bridge_from_module:
        pytest.skip("this host has no such model")
    with float64():
        model = hugging_face(f"{name}ForCausalLM", config(**options))
        expected = model(IDS).logits
        return model, expected, tensorlens_tl.capture(model, IDS)[1]


@pytest.mark.parametrize("kind", TEXTS)
def test_multipliers_sinusoids_and_a_norm_of_embeddings(kind):
    _, expected, lens = of_text(kind)
    c = lens.capture
    assert c.sources == TEXTS[kind][2]
    assert_close(c.input, lens.embedding, 1e-6)
    assert_close(lens.readout(lens.operator @ lens.embedding + lens.operator.bias), expected, 1e-6)
    for by in ("token", "component", "head"):
        found = lens.attribute(3, by=by)
        assert_close(found.values.sum(1), expected[:, -1, 3], 1e-5)


@bridges
def test_the_multiplied_model_frozen_by_hooks_has_the_operator_as_its_gradient(monkeypatch):
    case = CASES["bridge-llama"]
    model, _, lens = of_text("granite")
    monkeypatch.setattr(type(case), "model", lambda *_: tensorlens_tl.wrap(model))
    monkeypatch.setattr("test_operator.lens_of", lambda *_, **__: lens)
    monkeypatch.setattr("test_operator.tokens", lambda *_: IDS)
    gradient_law(case, "gate")


@bridges
def test_a_norm_of_embeddings_leaves_no_mean_embedding():
    _, _, lens = of_text("nanochat")
    with pytest.raises(ValueError, match=r"are not rows of W_E.*Pass the mean embedding"):
        lens.attribute(3, baseline="mean")
