"""The pages of real models are made of their files; the scripts that fill these are sound."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from models import quiet

from tensorlens_tl import demo

pytestmark = pytest.mark.algebra

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_pages_are_made_of_their_files(benchmark):
    made = benchmark("real_page")
    for name, text in made.pages().items():
        assert (ROOT / "docs" / f"{name}.md").read_text() == text
    for name in made.PARTS:
        assert (ROOT / "docs" / f"{name}.md").exists() == bool(made.load(made.PARTS[name][0]))


def test_a_bar_is_met_only_above_every_method(benchmark):
    page = benchmark("real_method_page")
    r = {"attention": ["rollout", "alti"]}
    cell = {"compared": {"in_out": {"rollout": [0.1, 0, 0, 0.001], "alti": [0.2, 0, 0, 0.009]}}}
    assert page.above(r, cell, "in_out")
    for worse in ([0.1, 0, 0, 0.02], [-0.1, 0, 0, 0.001]):
        cell["compared"]["in_out"]["alti"] = worse
        assert not page.above(r, cell, "in_out")


def test_pairs_of_sentences_share_some_meaning(benchmark):
    made = benchmark("real_sentences")
    found = made.pairs(40, 1)
    assert len(set(found)) == 40 and found == made.pairs(60, 1)[:40]  # a longer run goes on
    same = {one: other for slot in made.SLOTS for one, other in slot}
    for first, second in found:
        kept = [w for w in same if w in first.lower() and same[w] in second.lower()]
        assert kept


def test_parts_of_a_run_are_put_together(benchmark, tmp_path):
    """Two chunks of test pairs give what one run on all of them would have given."""
    made = benchmark("real_circuits")
    generator = torch.Generator().manual_seed(0)
    names, n = [made.OURS, made.CLEAN, "eap", "eap_ig", "random"], 6
    full, ablated = 2 + torch.rand(n, generator=generator), torch.rand(n, generator=generator)
    values = {f"{s} {m}": torch.rand(n, generator=generator) for s in made.SIZES for m in names}
    one = {"forwards": 2.0, "circuits": {str(size): ["a"] * 3 for size in made.SIZES}}
    found = {"n_find": 1, "n_total": 9, "methods": dict.fromkeys(names, one)}
    (tmp_path / "agreement, found 0.json").write_text(json.dumps(found))
    for start, stop in ((0, 2), (2, 6)):
        part = {"full": full[start:stop].tolist(), "ablated": ablated[start:stop].tolist()}
        part["circuits"] = {key: v[start:stop].tolist() for key, v in values.items()}
        (tmp_path / f"agreement, tested {start}.json").write_text(json.dumps(part))
    row = made.merged(tmp_path)["tasks"]["agreement"]
    assert row["n_test"] == n and row["right"] == 1
    share = (values["0.01 eap"].mean() - ablated.mean()) / (full.mean() - ablated.mean())
    assert row["shares"]["0.01"]["eap"]["share"] == pytest.approx(float(share), abs=1e-6)


def test_relations_are_studied_one_by_one(benchmark, tmp_path, monkeypatch):
    """Of a relation only what the model knows is studied; a second call has nothing to do."""
    made, page = benchmark("real_relations"), benchmark("real_relation_page")
    folder, kept = tmp_path / "text" / "relations", tmp_path / "kept"
    folder.mkdir(parents=True)
    for name, wrong in (("capital", False), ("language", True)):
        whole = demo.relation(name)
        rows = [{"subject": s, "object": "?" if wrong else o} for s, o in whole.samples[:12]]
        data = {"name": name, "prompt_templates": whole.templates[:2], "samples": rows}
        (folder / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(made, "DEPTHS", (0.25,))
    monkeypatch.setattr(made, "RANKS", (8,))
    call = ["x", "--keep", str(kept), "--data", str(tmp_path), "--splits", "2", "--most", "10"]
    monkeypatch.setattr(sys, "argv", [*call, "--model", str(demo.model_folder())])
    with quiet():
        made.main()
    r = made.merged(kept)
    assert r["without"] == ["language"] and list(r["study"]["accuracy"].values()) == [1.0]
    study = page.study_of(r)
    assert study.sizes == (3, 5) and {row.n_test for row in study.rows} == {5}
    assert "| 3 | capital |" in page.page(r) and len(page.bars(r)) == 2
    monkeypatch.setattr(made, "decode", None)
    with quiet():
        made.main()
