"""Every tutorial runs to its end; its asserts are the test."""

import runpy
from pathlib import Path

import pytest
from models import quiet

TUTORIALS = sorted((Path(__file__).resolve().parents[1] / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial(path):
    with quiet():
        names = runpy.run_path(str(path), run_name="tutorial")
    assert names["lens"].completeness_error < 2e-6


def test_there_are_tutorials():
    assert TUTORIALS
