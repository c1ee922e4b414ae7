"""README's Python blocks run, in order, as pasted; its first output is what they print."""

import contextlib
import io
import re
from pathlib import Path

from models import HookedTransformer, quiet

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_blocks_run_and_print_what_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    printed = []
    for block in BLOCKS:
        out = io.StringIO()
        with quiet(), contextlib.redirect_stdout(out):
            exec(compile(block, "README.md", "exec"), names)
        printed.append(out.getvalue())
    assert len(BLOCKS) >= 2 and len(BLOCKS[0].splitlines()) <= 12
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1).splitlines()
    lines = printed[0].splitlines()
    assert len(shown) == len(lines)
    # Labels in order, and values to two decimals; the check's figure is the machine's rounding.
    for ours, theirs in zip(lines[2:-1], shown[2:-1], strict=True):
        assert ours.split()[1:] == theirs.split()[1:]
        assert abs(float(ours.split()[0]) - float(theirs.split()[0])) < 0.01
    assert shown[-1].startswith(lines[-1])  # the Bridge has no b_U of zeros
    assert HookedTransformer is None or names["lens"].completeness_error < 2e-6


def test_the_two_commands_that_ci_runs_are_there():
    assert "pip install -c constraints.txt -e . && tensorlens-tl\n" in README
    assert 'pip install -c constraints.txt -e ".[dev]" && pytest\n' in README
