"""README's Python blocks run, in order, as pasted; its first output is what they print."""

import contextlib
import io
import re
import statistics
from pathlib import Path

import transformers
from models import HookedTransformer, build_bridge_from_module, quiet

import tensorlens_tl
from tensorlens_tl import demo

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class FromTheBundledFolder:
    """Stands in for transformers' Auto classes, and for a hub: every name is the bundled model."""

    def __init__(self, name):
        self.name = name

    def from_pretrained(self, name):
        return getattr(transformers, self.name).from_pretrained(demo.model_folder())


def test_blocks_run_and_print_what_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensorlens_tl, "load_model", lambda name: demo.load_model(), raising=False)
    autos = ("AutoModelForCausalLM", "AutoTokenizer")
    names: dict = {name: FromTheBundledFolder(name) for name in autos}
    printed = []
    for block in BLOCKS:
        block = re.sub(r"^from transformers import .*", "", block, flags=re.M)
        if build_bridge_from_module is None:  # transformer_lens 2 wraps no Hugging Face model
            block = re.sub(r"^(hf|bridge|logits, lens = bridge).*\n", "", block, flags=re.M)
        out = io.StringIO()
        with quiet(), contextlib.redirect_stdout(out):
            exec(compile(block.replace('"cuda"', '"cpu"'), "README.md", "exec"), names)
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
    commands = re.findall(r"^pip install .*?(?= {2,}#|$)", README, re.MULTILINE)
    assert commands[0] == "pip install -c constraints.txt -e . && tensorlens-tl"
    assert commands[1] == 'pip install -c constraints.txt -e ".[dev]" && pytest'


def test_readme_is_short_and_its_links_lead_somewhere():
    root = Path(__file__).resolve().parents[1]
    assert len(README.splitlines()) <= 130
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert (root / link).exists(), link
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    prose = re.sub(r"^[|#].*$", "", prose, flags=re.MULTILINE)
    sentences = [len(s.split()) for s in re.split(r"(?<=[.:])\s", prose) if len(s.split()) > 2]
    assert statistics.median(sentences) <= 25
