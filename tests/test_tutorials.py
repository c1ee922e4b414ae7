"""Tutorials run to their end; their asserts are the test.

The docs build runs all of them and fails on any error. Here the longest ones are left out.
"""

import runpy
from pathlib import Path

import pytest
from models import quiet

LONG = ("04", "05", "06")
FOLDER = Path(__file__).resolve().parents[1] / "tutorials"
TUTORIALS = [path for path in sorted(FOLDER.glob("*.py")) if not path.name.startswith(LONG)]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial(path):
    with quiet():
        names = runpy.run_path(str(path), run_name="tutorial")
    assert names["lens"].completeness_error < 2e-6


def test_there_are_tutorials():
    assert TUTORIALS
