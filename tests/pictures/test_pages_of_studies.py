"""Pages of results whose numbers are given: what the views hold is what the results hold."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import torch
from models import quiet

from tensorlens_tl import Faithfulness, Routing, demo
from tensorlens_tl.relations.decoding_study import Decoding, RelationStudy
from tensorlens_tl.relations.validity_study import ErrorCurve, ValidityStudy


def test_the_spectrum_and_its_words():
    with quiet():
        lens = demo.load_model().run_with_tensorlens("The capital of France is")[1]
    found = lens.operator.svd(3, query_pos=-1, key_pos=4)
    (table,) = found._page(lens).views
    assert torch.allclose(torch.tensor(table.data["values"][:, 0]), found.S.double())
    assert abs(table.data["values"][:, 1].sum() - 1) < 1e-12
    words = found.words(lens, 6)
    assert table.data["labels"][0][1] == " ".join(map(repr, words[0][0]))
    assert "raises" in found.to_html(lens=lens) and "raises" not in found.to_html()


def test_a_circuits_share_by_prompt():
    full, ablated = torch.tensor([2.0, 3.0]), torch.zeros(2)
    found = Faithfulness(full, ablated, ablated, full / 2, "zero", "live", 3, 9)
    (table,) = found._page().views
    expected = torch.stack([full, full / 2, ablated, ablated], 1)
    assert torch.equal(torch.tensor(table.data["values"]), expected)


def test_experts_by_token():
    experts, weights = torch.tensor([[[0, 2], [2, 1]]]), torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])
    (view,) = Routing(3, (("A", "cat"),), ((0, 2),), experts, weights, n_experts=4)._page().views
    cells = view.data["panels"][0]["stops"][0]["map"]
    assert view.data["rows"] == ['"A"@0', '"cat"@1'] and cells["rows"] == 2
    sums = view.data["panels"][0]["stops"][0]["sums"]
    assert sums.tolist() == [1.0, 1.0]  # empty cells are left out


def test_studies_of_relations():
    curve = ErrorCurve("swap", (0.1, 0.4), (0.0, 0.5), 0.1, {}, 1.0)
    other = ErrorCurve("swap", (0.3, 0.6), (0.1, 0.7), 0.1, {}, 1.0)
    study = ValidityStudy("m", "float32", 0, 2, (0.1, 1.0), (curve, other))
    drawn, table = study._page().views
    medians = [study.error("swap", "operator", size).value for size in study.sizes]
    assert drawn.data["lines"][0]["y"].tolist() == medians
    assert table.data["values"][:2, 0].tolist() == medians
    assert table.data["labels"][2] == ["0.1", "swap, jacobian"]
    rows = [
        Decoding("r", "{}", split, ("a", "b"), 4, variant, share, (), 0, causality=causality)
        for variant, causality in (("mean output", None), ("operator, β = 1", 0.5))
        for split, share in ((0, 0.25), (1, 0.75))
    ]
    study = RelationStudy("m", "float32", 0, (1.0,), (1,), {"r": 1.0}, tuple(rows))
    (table,) = study._page().views
    assert [label[1:] for label in table.data["labels"]] == [
        ["mean output", "faithfulness"],
        ["operator, β = 1", "faithfulness"],
        ["operator, β = 1", "causality"],
    ]
    assert table.data["values"][:, 0].tolist() == [0.5, 0.5, 0.5]
    other = replace(
        study, accuracy={"r": 1.0, "s": 0.5}, rows=(*rows, replace(rows[1], relation="s"))
    )
    page = other._page()
    assert [view.tab for view in page.views] == ["all relations", "r", "s"]
    assert page.tab_name == "Relation" and page.views[2].data["values"][0, 0] == 0.75


def test_a_part_of_the_operator():
    with quiet():
        lens = demo.load_model().run_with_tensorlens("The capital of France is")[1]
    kept = lens.circuit(lens.discover("Paris", n_edges=12))
    page, share = kept._page(), kept.share("Paris")
    assert page.views[0].data["src"].shape == (12,) and "12 edges" in page.title
    (table,) = share._page().views
    assert table.data["values"].tolist() == [
        [share.value[0], share.target_value[0], share.share[0], share.contributions[0]]
    ]


def test_the_page_of_measures_is_made_of_its_file():
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("bench", root / "benchmarks" / "pages.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    results = json.loads(made.RESULTS.read_text())
    assert made.PAGE.read_text() == made.page(results)
    assert made.scripts()["packed"] <= 40_000
