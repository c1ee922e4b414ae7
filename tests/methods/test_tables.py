"""Token matrices and token scores as results: prompts, NumPy, pandas, JSON, notebooks, layers."""

import json
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch
from comparisons import assert_close
from models import ORACLE, SHAPES, lens_of, quiet, tokens

import tensorlens_tl

pytestmark = pytest.mark.algebra

FIRST = SHAPES[0]


@pytest.fixture(scope="module")
def padded():
    """Three prompts of 7, 5 and 6 tokens, padded on the left."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :2], mask[2, :1] = 0, 0
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(FIRST.model(), tokens(3), attention_mask=mask)[1]


def results(lens):
    return lens.token_matrix("in_out", 3), lens.token_scores("in_out", 3, 4)


@pytest.mark.wrong_types
def test_slices_of_prompts(padded):
    for whole in results(padded):
        some = whole[1:]
        assert len(some) == 2 and some.labels == whole.labels[1:]
        for i in range(2):
            assert torch.equal(some[i], whole[1 + i])
            assert some[i].shape[0] == (5, 6)[i]
        assert torch.equal(whole[-1], whole[2])
        with pytest.raises(ValueError, match=r"\['a'\] does not exist, as the index is a prompt's"):
            whole["a"]
        with pytest.raises(IndexError, match="There is no prompt 3"):
            whole[3]
        assert len(list(whole)) == 3
    matrix, scores = results(padded)
    assert matrix[1:].completeness_error <= 1e-11
    assert scores[2:].target == scores.target[2:]
    estimated = padded.token_matrix("norm", probes=4)
    low, _ = estimated[:1].interval()
    assert torch.equal(low, estimated.interval()[0][:1])


def test_numpy_reads_the_values(padded):
    for result in results(padded):
        array = np.asarray(result)
        assert np.array_equal(array, result.values.numpy())
        array[:] = 0
        assert result.values.any()


def test_scores_as_a_table_and_json(padded):
    scores = padded.token_scores("in_out", 3, 4)
    table = scores.to_dataframe()
    assert list(table.columns) == ["prompt", "token", "pos", "score"] and len(table) == 7 + 5 + 6
    data = json.loads(scores.to_json())
    assert data["method"] == "in_out" and data["unit"] == "units of the target, logits for tokens"
    for i, prompt in enumerate(data["prompts"]):
        own = table[table.prompt == i]
        assert own["score"].tolist() == prompt["scores"] == scores[i].tolist()
        assert own["token"].tolist() == prompt["tokens"] == list(scores.labels[i])
        assert own["pos"].tolist() == list(range(len(own))) and prompt["target"] == scores.target[i]


def test_matrices_as_json(padded):
    matrix = padded.token_matrix("in_out", 3)
    data = json.loads(matrix.to_json())
    assert data["completeness_error"] == matrix.completeness_error and data["probes"] is None
    assert data["axes"] == ["query_pos", "key_pos"] and data["layers"] == list(matrix.layers)
    for i, prompt in enumerate(data["prompts"]):
        values = torch.tensor(prompt["values"], dtype=torch.float64)
        assert torch.equal(values, matrix[i]) and prompt["tokens"] == list(matrix.labels[i])
        whole = values.sum(1) + torch.tensor(prompt["constants"], dtype=torch.float64)
        assert_close(whole, torch.tensor(prompt["target_value"], dtype=torch.float64), ORACLE)
    estimated = padded.token_matrix("norm", probes=4)
    data = json.loads(estimated.to_json())
    error = torch.tensor(data["prompts"][1]["standard_error"], dtype=torch.float64)
    assert data["probes"] == 4 and torch.equal(error, estimated.standard_error[1, 2:, 2:])
    assert "constants" not in data["prompts"][1] and data["completeness_error"] is None


def test_the_largest_scores_leave_out_exact_zeros(padded):
    scores = padded.token_scores("last_layer_attention")
    first = replace(scores, values=torch.where(scores.values == scores[0].max(), scores.values, 0))
    assert first.top(5) == scores.top(1)


def test_a_notebook_shows_three_prompts_and_what_the_colours_mean():
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(FIRST.model(), tokens(5))[1]
    scores = lens.token_scores("in_out", 3)
    shown = unescape(re.sub(r"<[^>]*>", "|", scores._repr_html_()))
    assert shown.count(f"in_out| of {scores.target[0]}") == 3 and "… 2 more prompts" in shown
    largest = float(scores[0].abs().max())
    assert f"-{largest:.3g}| takes away, |+{largest:.3g}| adds, in scores" in shown


@pytest.mark.wrong_types
def test_layers_by_number():
    lens = lens_of(FIRST)
    first, last = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"
    for numbers, names in {(0, 1): (first, last), (0, -1): (first, last), (1, last): None}.items():
        names = names or ("blocks.1.hook_resid_pre", last)
        ours, theirs = (lens.token_matrix("in", layers=layers) for layers in (numbers, names))
        assert torch.equal(ours.values, theirs.values) and ours.layers == names
    assert lens.plan("in", layers=(0, 0)).flops < lens.plan("in").flops
    for wrong in (0, (0,), "01", (0, 1, 2)):
        with pytest.raises(ValueError, match=r"layers must be a pair .*\(0, 2\) for blocks 0 to 2"):
            lens.token_matrix("in", layers=wrong)
    with pytest.raises(ValueError, match="no residual site 2"):
        lens.token_matrix("in", layers=(0, 2))


@pytest.mark.wrong_types
def test_types_are_named_with_their_article():
    with pytest.raises(ValueError, match="baseline= is an int, which is no baseline"):
        lens_of(FIRST).attribute(baseline=3)
    with pytest.raises(ValueError, match="baseline= is a list, which is no baseline"):
        lens_of(FIRST).attribute(baseline=[3])
    with pytest.raises(ValueError, match="model is an int, which is neither"):
        tensorlens_tl.capture(3, "a prompt")
