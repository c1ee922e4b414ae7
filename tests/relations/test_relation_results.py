"""The page of relations and local validity: made of its results, some of them measured again."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from models import ROUNDING, quiet

from tensorlens_tl import demo
from tensorlens_tl.relations.decoding_study import RelationStudy, decode
from tensorlens_tl.relations.validity_study import validity

pytestmark = pytest.mark.algebra

ROOT = Path(__file__).resolve().parents[2]
DATA = json.loads((ROOT / "benchmarks" / "results" / "relations.json").read_text())


def benchmark():
    spec = importlib.util.spec_from_file_location(
        "relations_benchmark", ROOT / "benchmarks" / "relations.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    with quiet():
        return demo.load_model()


def test_the_page_is_made_of_the_results():
    assert benchmark().page(DATA) == (ROOT / "docs" / "relations.md").read_text()


def test_studies_as_tables():
    study = RelationStudy.from_json(json.dumps(DATA["relations"]))
    table = study.to_dataframe()
    assert len(table) == len(study.rows)
    for name in ("relation", "variant", "faithfulness"):
        assert table[name].tolist() == [getattr(row, name) for row in study.rows]
    curves = benchmark().validity_study(DATA["validity"][0])[0]
    table = curves.to_dataframe()
    assert list(table.columns) == ["prompt", "kind", "size", "operator", "jacobian"]
    assert len(table) == len(curves.rows) * len(curves.sizes)
    one = table[(table.kind == "swap") & (table.prompt == 3)]
    row = curves.select("swap")[3]
    assert tuple(one["operator"]) == row.operator and tuple(one["jacobian"]) == row.jacobian
    assert tuple(one["size"]) == curves.sizes


def test_a_draw_measured_again(model):
    study = RelationStudy.from_json(json.dumps(DATA["relations"]))
    with quiet():
        again = decode(model, [demo.relation("capital")], (3, 5), splits=1)
    kept = [row for row in study.rows if (row.relation, row.split) == ("capital", 0)]
    assert len(kept) == len(again.rows) == 10
    for ours, theirs in zip(again.rows, kept, strict=True):
        same = ("variant", "template", "train", "n_test", "layer")
        assert [getattr(ours, name) for name in same] == [getattr(theirs, name) for name in same]
        # Another host may round one subject to the other side.
        assert abs(ours.faithfulness - theirs.faithfulness) <= 1.01 / ours.n_test
        assert abs((ours.causality or 0) - (theirs.causality or 0)) <= 1.01 / ours.n_test


def test_curves_measured_again(model):
    (kept, _), prompts = (
        benchmark().validity_study(DATA["validity"][0]),
        benchmark().demo_prompts(200),
    )
    kinds = ("random", "swap")
    with quiet():
        double = demo.load_model().to(torch.float64)
        again = validity(double, prompts[:3], kinds, held=("scale",))
    for kind in kinds:
        for ours, theirs in zip(again.select(kind), kept.select(kind)[:3], strict=True):
            assert ours.operator == pytest.approx(theirs.operator, rel=1e-4)
            assert ours.jacobian == pytest.approx(theirs.jacobian, rel=1e-3)
            assert ours.held["scale"] == pytest.approx(theirs.held["scale"], rel=1e-4)


def test_what_the_pages_prose_says_is_what_was_measured():
    data = DATA["validity"]
    assert [one["dtype"] for one in data] == ["float64"] * 2 and data[0]["n"] == 200
    for one in data:
        assert all(row["held"]["all"] < ROUNDING for row in one["rows"])
    study = RelationStudy.from_json(json.dumps(DATA["relations"]))
    missed = [row for n in study.sizes for row in study.select("operator, β = 1", n) if row.missed]
    own = DATA["own parts"]
    assert all(row["own W and b"] == row["missed"] for row in own.values())
    assert sum(row["missed"] for row in own.values()) == sum(len(row.missed) for row in missed)
    for name in study.accuracy:
        ours, *theirs = (
            sum(rows[2]) / 60 for key, rows in DATA["one prompt"].items() if key.startswith(name)
        )
        assert len(theirs) == 2 and ours > 0.9 and ours > max(theirs)
    for one in data:
        rows = [row for row in one["rows"] if row["kind"] != "swap"]
        small = [(row["operator"][0], row["jacobian"][0]) for row in rows]
        assert all(a > 0.1 > b for a, b in small)
