"""The page of circuits in docs/ is made of the kept figures, which have the sizes they claim."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.algebra

ROOT = Path(__file__).resolve().parents[2]


def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "circuits_benchmark", ROOT / "benchmarks/circuits.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_kept_figures(monkeypatch):
    kept = json.loads((ROOT / "benchmarks/results/circuits.json").read_text())
    assert (ROOT / "docs/circuits.md").read_text() == benchmark(monkeypatch).page(kept)
    for name, result in kept["tasks"].items():
        assert result["n_test"] >= (40 if name == "stories260K" else 200)
        assert list(result["faithfulness"]) == ["2%", "5%", "10%"]
    assert len(kept["tasks"]) == 6
