"""The method on the host classes: there before or after the host's import, and off again."""

import doctest
import pydoc
import re
import subprocess
import sys
from inspect import signature

import pytest
from models import SHAPES

import tensorlens_tl

# A package with the modules and classes of transformer_lens and nothing else: the real one takes
# ten seconds to import, and what is asked here is the order of imports. Real classes come below.
STAND_IN = {
    "__init__": "from .HookedTransformer import HookedTransformer",
    "HookedTransformer": "class HookedTransformer: pass",
    "model_bridge/__init__": "from .bridge import TransformerBridge",
    "model_bridge/bridge": "class TransformerBridge: pass",
}
plugin = "import tensorlens_tl"
hosts = """
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
"""
has = "print(*(hasattr(c, 'run_with_tensorlens') for c in (HookedTransformer, TransformerBridge)))"
no, yes = ["False"] * 2, ["True"] * 2


@pytest.fixture
def run(tmp_path):
    for name, text in STAND_IN.items():
        path = tmp_path / "transformer_lens" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(*lines):
        code = "\n".join((f"import sys; sys.path.insert(0, {str(tmp_path)!r})", *lines))
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return out.stdout.split()

    return run


def test_either_order_of_import_and_off_and_on_again(run):
    twice = "tensorlens_tl.uninstall(); tensorlens_tl.uninstall()"
    again = "tensorlens_tl.install(); tensorlens_tl.install()"
    assert run(hosts, has, plugin, has) == no + yes
    assert run(plugin, hosts, has, twice, has, again, has) == yes + no + yes
    assert run(plugin, twice, hosts, has, again, has) == no + yes


@pytest.mark.parametrize("case", SHAPES[:1] + SHAPES[-1:], ids=str)
def test_every_model_has_the_method(case):
    method = type(case.model()).run_with_tensorlens
    assert "TensorLens" in method.__doc__
    ours, theirs = signature(method).parameters, signature(tensorlens_tl.capture).parameters
    assert list(ours) == ["self", *(n for n in theirs if n not in ("model", "tokenizer"))]
    assert all(ours[name] == theirs[name] for name in list(ours)[1:])
    documented = set(re.findall(r"^ {8}\**(\w+): ", method.__doc__.split("Returns:")[0], re.M))
    assert documented == set(ours) - {"self"}
    assert "same call" not in method.__doc__ and "capture(" not in method.__doc__
    assert "same call" in tensorlens_tl.capture.__doc__
    shown = pydoc.render_doc(case.model().run_with_tensorlens, renderer=pydoc.plaintext)
    assert "run_with_tensorlens(input: 'Any', *, gate: 'str' = 'gate'" in shown
    (example,) = doctest.DocTestFinder(recurse=False).find(method, "method", False, globs={})
    assert "model.run_with_tensorlens(" in example.examples[2].source
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.DocTestRunner(optionflags=flags).run(example).failed == 0
    tensorlens_tl.install()
    assert type(case.model()).run_with_tensorlens is method
