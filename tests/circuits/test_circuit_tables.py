"""Circuits and their tests in other forms; sizes given as shares; the input by its two names."""

import json
import math

import pytest
import torch
from models import SHAPES, lens_of, quiet, tokens

from tensorlens_tl import Edge, faithfulness_curve
from tensorlens_tl.circuits.edge_averages import ranked_scores
from tensorlens_tl.circuits.faithfulness_result import Faithfulness, FaithfulnessCurve
from tensorlens_tl.circuits.subgraph import CircuitShare
from tensorlens_tl.passes.edge_patching import edge_model

pytestmark = pytest.mark.algebra

FIRST = SHAPES[0]
CLEAN, CORRUPTED = tokens(2), tokens(2, seed=1)
NUMBERS = torch.tensor([4.0, 2.0]), torch.tensor([1.0, 0.0])


def universe():
    with quiet(), edge_model(FIRST.model()) as edged:
        return edged.universe


def test_a_circuit_as_a_table():
    lens = lens_of(FIRST)[0]
    circuit = lens.discover(3, 4, n_edges=12)
    table = circuit.to_dataframe()
    assert list(table.columns) == ["edge", "src", "dest", "score", "in_circuit"]
    assert dict(zip(table["edge"], table["score"], strict=True)) == {
        str(edge): score for edge, score in circuit.scores.items()
    }
    assert set(table["edge"][table["in_circuit"]]) == set(map(str, circuit))
    assert (table["src"] + "→" + table["dest"] == table["edge"]).all()
    named = lens.circuit(["L0H1", "L1H2"]).circuit.to_dataframe()
    assert len(named) > 0 and named["score"].isna().all() and named["in_circuit"].all()


def test_a_share_as_a_table_and_json():
    found = CircuitShare((1.0, 2.0), (4.0, 0.0), (3.0, 5.0), ("a", "b"))
    table = found.to_dataframe()
    assert table["target"].tolist() == ["a", "b"] and table["share"][0] == 0.25
    data = json.loads(found.to_json())
    assert data["share"] == [0.25, None] and data["value"] == [1, 2]


def test_faithfulness_as_a_table():
    full, ablated = NUMBERS
    found = Faithfulness(full, ablated, ablated, full - 1, "resample", "live", 3, 9)
    table = found.to_dataframe()
    assert list(table.columns) == ["prompt", "full", "ablated", "empty", "circuit"]
    assert table["full"].tolist() == [4, 2] and table["circuit"].tolist() == [3, 1]
    assert json.loads(found.to_json())["unit"].startswith("the unit of the metric, logits")


def curve(sizes, signed, absolute):
    """Shares f of a behaviour that goes from 0 (all ablated) to 1 (the model)."""
    rows = [torch.tensor(f)[:, None] for f in (signed, absolute)]
    counts = tuple(range(len(sizes)))
    ends = torch.ones(1), torch.zeros(1)
    return FaithfulnessCurve(sizes, counts, *ends, *rows, "zero", "live", 9)


def test_a_curve_as_a_table():
    table = curve((0.1, 0.5), [0.25, 0.75], [0.5, 1.0]).to_dataframe()
    assert list(table.columns) == ["size", "n_edges", "signed", "absolute"]
    assert table["signed"].tolist() == [0.25, 0.75] and table["absolute"].tolist() == [0.5, 1.0]


def test_areas_whose_sizes_do_not_start_at_0():
    """∫ f over what was measured alone: from .2 to 1, nothing is added below .2."""
    found = curve((0.2, 0.4, 1.0), [0.5, 0.7, 1.1], [0.5, 0.7, 1.1])
    assert math.isclose(found.cpr, 0.2 * 0.6 + 0.6 * 0.9, rel_tol=1e-6)
    assert math.isclose(found.cmd, 0.2 * 0.4 + 0.6 * 0.2, rel_tol=1e-6)


def test_sizes_given_as_shares_are_rounded_to_whole_edges():
    """To the nearest number of edges, and never to none unless the share is 0."""
    total = len(universe().edges)
    ranking = list(universe().edges[::-1])
    ranking.remove(direct := Edge.parse("input→logits"))  # a circuit by itself: the third
    ranking.insert(2, direct)
    shares = (0.0, 1e-9, 0.4 / total, 2.4 / total, 2.6 / total, (total - 0.4) / total, 1.0)
    with quiet():
        found = faithfulness_curve(FIRST.model(), CLEAN, ranking, CORRUPTED, target=3, sizes=shares)
    assert found.n_edges == (0, 1, 1, 2, 3, total, total)
    assert torch.equal(found.signed[1], found.signed[2])
    assert torch.equal(found.signed[5], found.signed[6])
    assert not torch.equal(found.signed[3], found.signed[4])


def test_embed_and_pos_embed_are_one_writer_in_other_tools_scores():
    """Their scores add up to the input's. In a list, the first of the two names has the place."""
    given = {"pos_embed→L0MLP": 2.0, "L0H1→logits": -4.0, "embed→L0MLP": 0.5, "input→L0MLP": 0.25}
    found = ranked_scores(universe(), given)
    assert {str(edge): score for edge, score in found.items()} == {
        "input→L0MLP": 2.75,
        "L0H1→logits": -4.0,
    }
    found = ranked_scores(universe(), list(given))
    assert {str(edge): score for edge, score in found.items()} == {
        "input→L0MLP": 2.0,
        "L0H1→logits": 1.0,
    }
