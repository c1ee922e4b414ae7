"""The method on the host classes: there before or after the host's import, and off again."""

import subprocess
import sys

import pytest
from helpers import ALL, HookedTransformer, build_bridge_from_module

import tensorlens_tl

HOSTS = []
if HookedTransformer is not None:
    HOSTS.append("from transformer_lens import HookedTransformer as Host")
if build_bridge_from_module is not None:
    HOSTS.append("from transformer_lens.model_bridge import TransformerBridge as Host")

has = "print(hasattr(Host, 'run_with_tensorlens'))"
plugin = "import tensorlens_tl"


def run(*lines):
    code = "\n".join(("import warnings; warnings.simplefilter('ignore')", *lines))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [line for line in out.stdout.split() if line in ("True", "False")]


@pytest.mark.parametrize("host", HOSTS)
def test_either_order_of_import(host):
    assert run(plugin, host, has) == ["True"]
    assert run(host, has, plugin, has) == ["False", "True"]


@pytest.mark.parametrize("host", HOSTS)
def test_uninstall_and_install_are_idempotent(host):
    twice = "tensorlens_tl.uninstall(); tensorlens_tl.uninstall()"
    again = "tensorlens_tl.install(); tensorlens_tl.install()"
    assert run(plugin, host, twice, has, again, has) == ["False", "True"]
    assert run(plugin, twice, host, has, again, has) == ["False", "True"]


@pytest.mark.parametrize("case", ALL[:1] + ALL[-1:], ids=str)
def test_every_model_has_the_method(case):
    method = type(case.model()).run_with_tensorlens
    assert "TensorLens" in method.__doc__
    tensorlens_tl.install()
    assert type(case.model()).run_with_tensorlens is method
