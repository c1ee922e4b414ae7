"""docs/results.md is made of its JSON, and a sample of that JSON is made again here."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from models import quiet

from tensorlens_tl import demo
from tensorlens_tl.evaluation.runner import evaluate

pytestmark = pytest.mark.algebra

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "evaluation.json").read_text())


def benchmark():
    path = ROOT / "benchmarks" / "evaluation.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_evaluation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_its_file():
    from evaluation_page import page

    assert (ROOT / "docs" / "results.md").read_text() == page(RESULTS)


def test_every_method_protocol_and_masking_is_there():
    made = benchmark()
    assert set(RESULTS["sets"]) == {*made.TASKS, "stories"}
    asked = {"last masked, too": made.all_protocols(), "last kept": made.last_kept(), "naopc": [0]}
    page = (ROOT / "docs" / "results.md").read_text()
    for group in RESULTS["sets"]:
        for part, protocols in asked.items():
            if part not in RESULTS["tables"][group]:
                assert f"{group} ({part})" in page.split("Not run yet: ")[1].splitlines()[0]
                continue
            for cells in (RESULTS["tables"][group][part][masking] for masking in made.MASKINGS):
                assert len(cells) == len(protocols)
                assert all(set(RESULTS["methods"]) <= set(c["methods"]) for c in cells.values())
    for name, one in RESULTS["sets"].items():
        assert one["prompts"]["last kept"] >= (300 if name == "stories" else 200)
        assert set(one["forwards"]) == set(RESULTS["methods"])


@pytest.mark.parametrize("task", ["agreement", "facts"])
def test_a_sample_made_again(task):
    """The first prompts of a task, with whichever host is installed."""
    made = benchmark()
    with quiet():
        model = demo.load_model()
        prompts = made.task_prompts(model, task, made.SAMPLE)
        found = evaluate(
            model,
            prompts,
            made.SAMPLED,
            masking=made.MASKINGS,
            seed=made.SEED,
            keep_last=True,
            progress=False,
        )
    for method in made.SAMPLED:
        for masking in made.MASKINGS:
            ours = found.row(method, "positive", masking).values
            assert ours == pytest.approx(RESULTS["sample"][task][f"{method} {masking}"], abs=2e-3)
