"""Every name that the host registers: exact against plain Hugging Face, or refused by name."""

import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from models import quiet

from tensorlens_tl import UnsupportedArchitectureError, capture
from tensorlens_tl.readers import PackedMixture
from tensorlens_tl.refusals.supported import SUPPORTED
from tensorlens_tl.support import every_name, table
from tensorlens_tl.support.configurations import tiny_config
from tensorlens_tl.support.every_name import (
    EXACT,
    Name,
    exactness,
    registered,
    summary,
    tiny_inputs,
    tiny_model,
    try_name,
)
from tensorlens_tl.support.frozen_gradient import plain_run
from tensorlens_tl.support.tiny_models import to_bridge

NAMES = registered()
VERSION = metadata.version("transformer_lens")
KEPT = Path(__file__).resolve().parents[2] / "docs" / "support" / f"{VERSION}.json"
AS_KEPT = {one.name: one for one in table.Report.load(KEPT).names} if KEPT.exists() else {}
REMEDY = (
    f"if this is meant: `python -m tensorlens_tl.support --all --json > {KEPT.name}`, and --merge"
)
pytestmark = pytest.mark.offered(bool(NAMES))
OF_THE_HOST = re.compile(
    r"transformer_lens \S+ cannot bridge it|with transformer_lens 3 |as it is:|has no hook point"
)
"""Reasons that lie with the host: what it builds is no model, or another one."""
NO_ADJOINT = {"TransformerLensNative"}
"""Names without a Hugging Face model."""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_exact_against_hugging_face_or_refused_by_name(name):
    found = try_name(name)
    kept = AS_KEPT.get(name, found)
    assert (found.outcome, found.reason) == (kept.outcome, kept.reason), REMEDY
    assert found.outcome in ("exact", "refused", "not built"), found
    if found.outcome == "exact":
        compared = {"logits", "token", "component", "adjoint"}
        assert found.errors.keys() == compared - ({"adjoint"} if name in NO_ADJOINT else set())
        assert max(found.errors.values()) <= EXACT and bool(found.no_adjoint) == (
            name in NO_ADJOINT
        )
    else:
        assert found.reason and not found.errors
        assert name not in SUPPORTED or OF_THE_HOST.search(found.reason), found
        named = found.reason.startswith("Cannot freeze") or OF_THE_HOST.search(found.reason)
        assert found.outcome == "not built" or named, found


RECURRENT = {
    "MambaForCausalLM": "MambaMixer",
    "RwkvForCausalLM": "RwkvSelfAttention",
    "RecurrentGemmaForCausalLM": "RecurrentGemmaRecurrentBlock",
    "Lfm2ForCausalLM": "Lfm2ShortConv",
    "JambaForCausalLM": "JambaMambaMixer",
}
"""State spaces, recurrent blocks and short convolutions, by the layer that is named."""


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrence_is_refused_at_its_first_block_by_the_name_of_the_layer(name):
    why = f"it has a state space or other recurrence in block 0: {RECURRENT[name]}"
    with quiet():
        model = tiny_model(name)
        ids = tiny_inputs(model)["input_ids"]
        with pytest.raises(UnsupportedArchitectureError, match=why):
            capture(model, ids)
        with pytest.raises(UnsupportedArchitectureError, match=why):  # a Bridge of the user's own
            capture(to_bridge(model), ids)


@pytest.fixture(scope="module")
def llama():
    with quiet():
        model = tiny_model("LlamaForCausalLM")
        plain = plain_run(model, inputs := tiny_inputs(model))
        return capture(model, inputs["input_ids"])[1], plain


@pytest.mark.parametrize("what", ["logits", "gradient"])
def test_another_model_is_not_exact(llama, what):
    lens, plain = llama
    assert max(exactness(lens, plain).values()) <= EXACT
    other = replace(plain, **{what: getattr(plain, what).roll(1, 0)})
    assert exactness(lens, other)["adjoint" if what == "gradient" else what] > 0.1


def test_what_is_multiplied_in_another_way_has_no_gradient():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

        def forward(self, x):
            y = self.blocks[0](x)
            return {"logits": y * y.roll(1, -1)}

    found = plain_run(Odd(), {"x": torch.ones(1, 2, 4)})
    assert found.gradient is None and "A product (1, 2, 4) · (1, 2, 4)" in found.no_gradient


OUTCOMES = {
    "exact": (lambda *_: {"logits": 2e-16}, "2e-16", 0),
    "wrong": (lambda *_: {"logits": 0.5}, "wrong 5e-01", 1),
    "refused": (lambda *_: 1 / 0, "refused", 0),
    "crashed": (lambda *_: 1 / 0, "crashed", 1),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_what_becomes_of_a_name(outcome, monkeypatch, capsys):
    compare, shown, code = OUTCOMES[outcome]
    if outcome == "refused":
        compare = failing(UnsupportedArchitectureError("Cannot freeze X: v2.5 of it. Load Y."))
    monkeypatch.setattr(every_name, "exactness", compare)
    monkeypatch.setattr(every_name, "answers", lambda *_: {})
    assert table.main(["--only", "LlamaForCausalLM"]) == code
    line = capsys.readouterr().out
    assert line.split()[0] == "LlamaForCausalLM" and shown in line and "Traceback" not in line
    assert ("v2.5 of it" in line) == (outcome == "refused")
    assert ("ZeroDivisionError: division by zero" in line) == (outcome == "crashed")


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_a_name_without_a_class_is_not_built():
    found = try_name("BD3LM")
    assert (
        found.outcome == str(found) == "not built" and "its code is on the hub only" in found.reason
    )
    one = Name("X", "exact", {"logits": 1e-9})
    assert summary([found, one, one]) == "3 names: 2 exact, 1 not built"


def test_questions_are_asked_of_a_lens(capsys):
    assert table.main(["--only", "LlamaForCausalLM", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["names"]
    assert found["answers"] == dict.fromkeys(every_name.QUESTIONS, "")


@pytest.mark.offered("GraniteMoeForCausalLM" in NAMES)
def test_a_model_with_all_of_its_edges_is_the_model(monkeypatch):
    """Granite-MoE's block multiplies what its mixture gives."""
    assert not try_name("GraniteMoeForCausalLM", ask=True).answers["circuits"]
    monkeypatch.setattr(PackedMixture, "factor", property(lambda self: 1.0, lambda *_: None), False)
    found = try_name("GraniteMoeForCausalLM", ask=True)
    assert found.outcome == "crashed" and "run edge by edge is off by" in found.reason


def test_a_tiny_model_has_the_options_that_are_easily_wrong():
    from transformers import Gemma2Config, GraniteConfig, Qwen3Config

    assert tiny_config(Qwen3Config).head_dim != 32 // 4
    assert tiny_config(GraniteConfig).residual_multiplier == 0.5
    gemma = tiny_config(Gemma2Config)
    assert gemma.sliding_window == 3 and gemma.final_logit_softcapping == 3.0
    assert set(gemma.layer_types) == {"sliding_attention", "full_attention"}
