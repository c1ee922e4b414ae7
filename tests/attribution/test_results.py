"""Results as tables: taking prompts and rows, subtracting, names of sums, NumPy, JSON."""

import json
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from comparisons import assert_close
from models import ORACLE, ROUNDING, SHAPES, TWO_RUNS, lens_of, quiet, tokens

import tensorlens_tl
from tensorlens_tl import Attribution, Node

pytestmark = pytest.mark.algebra

FIRST = SHAPES[0]
ROTARY = next(case for case in SHAPES if "llama" in case.name)


def captured(ids, case=FIRST, **kwargs):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(case.model(), ids, **kwargs)[1]


@pytest.fixture(scope="module")
def padded():
    """Three prompts of 7, 5 and 6 tokens, padded on the left."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :2], mask[2, :1] = 0, 0
    return captured(tokens(3), attention_mask=mask)


# --- Prompts -------------------------------------------------------------------------------------


def test_a_slice_of_prompts_is_those_prompts(padded):
    a = padded.attribute(3, 4)
    some = a[1:]
    assert len(some) == 2 and some.target == a.target[1:] and some.spans == a.spans[1:]
    assert torch.equal(some.target_value, a.target_value[1:])
    for i in range(2):
        assert torch.equal(some[i].values, a[1 + i].values)
        assert some[i].labels == a[1 + i].labels and some[i].sources == a[1 + i].sources
    # Rows that are padding in all prompts of the slice are gone, as with one prompt.
    assert min(s.pos for s in some.sources if s.pos is not None) == 1
    assert some.completeness_error <= 1e-11
    assert a[::-1].target_value.tolist() == a.target_value.flip(0).tolist()
    assert torch.equal(a[-1].values, a[2].values)
    assert [one.values.shape for one in a] == [a[i].values.shape for i in range(3)]


@pytest.mark.wrong_types
def test_what_is_no_prompt_is_refused():
    a = lens_of(FIRST).attribute(3, 4)
    message = r"attribution\['Mary'\] does not exist.*For rows use .top, .select or .to_dataframe"
    with pytest.raises(ValueError, match=message):
        a["Mary"]
    for wrong in (1.0, True, None, (0, 1), [0]):
        with pytest.raises(ValueError, match="as the index is a prompt's number or a slice"):
            a[wrong]
    for wrong in (slice(5, 9), slice(0, 2, 0), slice("a", None)):
        with pytest.raises(ValueError, match=r"holds no prompt. Take a slice such as \[:2\]"):
            a[wrong]
    with pytest.raises(IndexError, match=r"There is no prompt 2\. The number of prompts is 2"):
        a[2]


# --- NumPy ---------------------------------------------------------------------------------------


def test_numpy_reads_the_values_and_cannot_change_them():
    a = lens_of(FIRST).attribute(3, 4)
    array = np.asarray(a)
    assert array.shape == a.values.shape and array.dtype == np.float64
    assert np.array_equal(array, a.values.numpy())
    array[:] = 0
    assert a.values.abs().sum() > 0
    assert np.asarray(a, dtype=np.float32).dtype == np.float32


# --- Names of sums -------------------------------------------------------------------------------


def test_one_label_stands_for_one_number():
    """A sum bears a label that no row of the split has, unless it is that row."""
    lens = lens_of(FIRST)
    tables = [lens.attribute(3, 4, by=by) for by in ("token", "constant", "head", "component")]
    tables += [
        lens.attribute(3, 4, by=by, effect="total") for by in ("component", "head", "layer", "mlp")
    ]
    for a in tables:
        for axis in ("pos", "node", "layer"):
            summed = a.sum(axis)
            for prompt in range(2):
                rows = dict(zip(a.labels[prompt], a.values[prompt].tolist(), strict=True))
                sums = dict(zip(summed.labels[prompt], summed.values[prompt].tolist(), strict=True))
                assert len(sums) == len(summed.sources), (a.by, a.effect, axis)
                for label in rows.keys() & sums.keys():
                    assert rows[label] == sums[label], (a.by, a.effect, axis, label)


def test_names_of_sums_over_nodes(padded):
    lens, token = lens_of(FIRST), lens_of(FIRST).attribute(3, 4).labels[0][2]
    assert token.endswith('"@2')
    assert lens.attribute(3, 4).sum("node").labels[0][2] == f"{token} + position"
    assert lens.attribute(3, by="head").sum("node").labels[0][2] == f"heads ← {token}"
    total = {
        by: lens.attribute(3, by=by, effect="total").sum("node") for by in ("head", "component")
    }
    assert total["head"].labels[0][2] == "heads@2"
    assert total["component"].labels[0][2] == f"all at {token}"
    assert lens.attribute(3, by="constant").sum("node").labels[0][-1] != "constants@2"
    assert "constants@2" in lens.attribute(3, by="constant").sum("node").labels[0]
    # Without position embeddings, a position is its token's embedding alone.
    rotary = lens_of(ROTARY).attribute(3, 4)
    assert rotary.sum("node").labels[0][:7] == rotary.labels[0][:7]
    # Padding stays padding, and counts for nothing in later positions.
    labels = padded.attribute(3).sum("node").labels[1]
    assert labels[:2] == ("padding", "padding") and labels[2].endswith("@0 + position")
    layers = padded.attribute(3, by="component", effect="total").sum("layer").labels[1]
    assert layers.count("padding") > 0 and "L1@0" in layers and "L0@-1" not in layers


# --- Rows ----------------------------------------------------------------------------------------


def test_rows_by_kind_and_layer():
    lens = lens_of(FIRST)
    a = lens.attribute(3, 4, by="neuron")
    neurons = a.select(kind="neuron", layer=1)
    rows = [i for i, s in enumerate(a.sources) if (s.node.kind, s.node.layer) == ("neuron", 1)]
    assert torch.equal(neurons.values, a.values[:, rows]) and len(rows) > 1
    assert neurons.labels[1] == tuple(a.labels[1][i] for i in rows)
    assert not neurons.sums_to_target and neurons.completeness_error is None
    assert {s.node.kind for s in a.select(layer=0).sources} == {"head", "neuron", "constant"}
    component = lens.attribute(3, 4, by="component")
    whole = [component.select(layer=i).values.sum(1) for i in range(2)]
    layers = lens.attribute(3, 4, by="layer").select(kind="layer")
    assert_close(layers.values, torch.stack(whole, 1), ROUNDING)
    assert [str(s.node) for s in component.select(kind="mlp").sources] == ["L0MLP", "L1MLP"]
    # All rows of a table still sum to the target.
    orders = lens.attribute(3, by="order")
    assert orders.select(kind="order").completeness_error == orders.completeness_error


def test_edges_by_the_kind_and_layer_of_their_writer():
    edges = lens_of(FIRST).attribute(3, 4, by="edge", qk=True)
    heads = edges.select(dest="logits", kind="head", layer=0)
    assert [str(s.node) for s in heads.sources] == [f"L0H{i}→logits" for i in range(4)]
    assert not heads.sums_to_target and edges.select(dest=Node("logits")).sums_to_target
    into = edges.select("embed", kind="embed")
    assert {str(s.node.src) for s in into.sources} == {"embed"}


@pytest.mark.wrong_types
def test_what_no_row_has_is_refused_with_what_there_is():
    lens = lens_of(FIRST)
    edges, a = lens.attribute(3, by="edge", qk=True), lens.attribute(3, by="component")
    with pytest.raises(
        ValueError, match=r"No edge has dest L1H0. Did you mean L1H0\.v or L1H0\.q or L1H0\.k\?"
    ):
        edges.select(dest="L1H0")
    with pytest.raises(ValueError, match=r"No row has kind neuron. Use one of .*head, .*mlp"):
        a.select(kind="neuron")
    with pytest.raises(ValueError, match=r"No row has layer 7. Use one of 0, 1\."):
        a.select(layer=7)
    with pytest.raises(ValueError, match=r"No row has layer 1\.5"):
        a.select(layer=1.5)
    with pytest.raises(ValueError, match="No row has kind='embed', layer='1' together"):
        a.select(kind="embed", layer=1)
    with pytest.raises(ValueError, match="'L1X' is not a node"):
        edges.select(dest="L1X")


def test_the_largest_rows_leave_out_exact_zeros():
    lens = lens_of(FIRST)[0]
    same = lens.attribute(3, 4, baseline=lens)
    assert not same.values.any() and same.top(3) == []
    a = lens.attribute(3, 4)
    some = replace(a, values=torch.where(a.values == a.values.max(), a.values, 0))
    assert len(some.top(3)) == 1
    assert some.top(3)[0][1] == float(a.values.max())


# --- Differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["token", "component", "head", "edge", "neuron"])
def test_two_targets_of_one_run_subtract_row_by_row(by):
    lens = lens_of(FIRST)
    change = lens.attribute(3, by=by) - lens.attribute(4, by=by)
    at_once = lens.attribute(3, 4, by=by)
    assert change.labels == at_once.labels and change.sources == at_once.sources
    assert_close(change.values, at_once.values, 1e-11)
    assert_close(change.target_value, at_once.target_value, 1e-11)
    assert change.sums_to_target == at_once.sums_to_target
    assert change.target[0].count(" − ") == 1


def test_two_prompts_subtract_by_node_and_position(padded):
    """The rows of a padded prompt are those of the same prompt alone, and so is the sum."""
    here = padded.attribute(3, 4)[1]
    alone = captured(tokens(3)[1:2, 2:]).attribute(3, 4)
    assert here.sources != alone.sources
    nothing = here - alone
    assert nothing.values.abs().max() <= TWO_RUNS * here.values.abs().max()
    assert nothing.labels == here.labels and nothing.target[0].startswith("change of ")
    other = captured(tokens(3)[2:, 2:]).attribute(3, 4)
    change = here - other
    assert change.sums_to_target
    assert_close(change.values.sum(1), here.target_value - other.target_value, ORACLE)
    first = change.labels[0][0]
    assert first == f"{here.labels[0][0]} − {other.labels[0][0]}"
    assert change.labels[0][-1] == here.labels[0][-1]


def test_prompts_of_two_lengths_subtract_where_positions_are_summed(padded):
    a, b = (padded.attribute(3, 4)[i] for i in (0, 1))
    with pytest.raises(ValueError, match=r'Only one of the attributions has the row ".*"@5'):
        a - b
    summed = a.sum("pos") - b.sum("pos")
    assert_close(summed.values, a.sum("pos").values - b.sum("pos").values, ROUNDING)
    assert summed.completeness_error <= 1e-11


@pytest.mark.wrong_types
def test_what_cannot_be_subtracted_is_refused(padded):
    lens = lens_of(FIRST)
    a = lens.attribute(3)
    with pytest.raises(ValueError, match="One has by=token, the other component"):
        a - lens.attribute(3, by="component")
    with pytest.raises(ValueError, match="One has effect=direct, the other total"):
        lens.attribute(3, by="head") - lens.attribute(3, by="head", effect="total")
    gated = lens_of(ROTARY)
    with pytest.raises(ValueError, match="One has convention="):
        gated.attribute(3) - gated.with_convention("up").attribute(3)
    with pytest.raises(ValueError, match=r"two batches have different rows\. Take one prompt"):
        padded.attribute(3) - a
    with pytest.raises(TypeError, match="unsupported operand"):
        a - 1.0


# --- JSON ----------------------------------------------------------------------------------------


def test_json_says_what_the_numbers_are():
    a = lens_of(FIRST).attribute(3, 4)
    data = json.loads(a.to_json())
    assert data["unit"].startswith("units of the target: logits for tokens")
    assert data["completeness_error"] == a.completeness_error
    again = Attribution.from_json(a.to_json())
    assert again.to_json() == a.to_json()
    for name in ("unit", "completeness_error"):  # texts of earlier versions have neither
        del data[name]
    assert Attribution.from_json(json.dumps(data)).to_json() == a.to_json()


RESULTS = {
    "attribution": ("Attribution", "MeanAttribution"),
    "paths": ("Paths",),
    "circuits.circuit": ("Circuit",),
    "circuits.faithfulness_result": ("Faithfulness", "FaithfulnessCurve"),
    "circuits.subgraph": ("CircuitShare",),
    "evaluation.report": ("Evaluation",),
    "lens.sequence_attribution": ("SequenceAttribution",),
    "methods": ("LogitLens", "TokenMatrix", "TokenScores"),
    "operator.svd": ("SVD",),
    "relations.decoding_study": ("RelationStudy",),
    "relations.validity_study": ("ValidityStudy",),
}


@pytest.mark.parametrize(("room", "name"), [(r, n) for r, names in RESULTS.items() for n in names])
def test_every_result_has_the_same_two_verbs(room, name):
    result = getattr(import_module(f"tensorlens_tl.{room}"), name)
    assert callable(result.to_json) and callable(result.to_dataframe)
