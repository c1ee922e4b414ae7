"""The page of the distillation study is what its results make."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from distillation_page import PAGE, RESULTS, page  # noqa: E402


def test_the_page_is_made_of_the_results():
    assert PAGE.read_text() == page()


def test_another_result_makes_another_page(tmp_path):
    for name in ("distillation.jsonl", "shortcut.jsonl"):
        lines = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
        for line in lines:
            for point in line.get("checkpoints", ()):
                point["mean"] = 0.123
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    assert "| 0.123 |" in page(tmp_path) and page(tmp_path) != page()
