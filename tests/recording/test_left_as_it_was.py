"""A host is left as it was, whatever goes wrong: hooks, mode, flags, gradients and weights."""

from __future__ import annotations

import pytest
from models import CASES, HookedTransformer, build_bridge_from_module, quiet, tokens

import tensorlens_tl
from tensorlens_tl.recording import live_models

KINDS = [
    CASES[name]
    for name, there in (
        ("hooked-llama", HookedTransformer),
        ("bridge-llama", build_bridge_from_module),
    )
    if there
]
every_kind = pytest.mark.parametrize("case", KINDS, ids=str)


def state_of(model):
    """All that an error could leave behind in a host."""
    modules = dict(model.named_modules())
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(getattr(m, "fwd_hooks", ())))
        for name, m in modules.items()
    }
    weights = {
        name: (p.data_ptr(), p.dtype, p._version, p.requires_grad, p.grad)
        for name, p in model.named_parameters()
    }
    modes = {name: m.training for name, m in modules.items()}
    flags = {k: v for k, v in vars(model.cfg).items() if isinstance(v, bool | int | str)}
    return hooks, weights, modes, flags, model.cfg.dtype


class InTheMiddleError(RuntimeError):
    """What a user's hook raises in the middle of a run."""


def broken(x, hook):
    raise InTheMiddleError("This hook fails in the middle of a run. Take it off.")


def fails_in_a_hook(model, lens):
    with model.hooks([("blocks.1.attn.hook_z", broken)]):
        tensorlens_tl.capture(model, tokens())


def fails_in_a_live_run(model, lens):
    with live_models(lens.capture, model) as (live,):
        live.run(live.x, [(model.hook_dict["blocks.1.attn.hook_z"], lambda z: broken(z, None))])


def fails_in_an_ablation(model, lens):
    circuit = lens.discover(3, n_edges=3, qk=False)
    circuit.faithfulness(model, tokens(), tokens(seed=1), target=10**6)


def fails_in_a_refused_edit(model, lens):
    with model.hooks([("blocks.0.attn.hook_pattern", lambda x, hook: x * 2)]):
        tensorlens_tl.capture(model, tokens(), pattern="recomputed")


def fails_in_the_input(model, lens):
    tensorlens_tl.capture(model, [[1, 2], [3]])


FAILING = [
    (fails_in_a_hook, InTheMiddleError),
    (fails_in_a_live_run, InTheMiddleError),
    (fails_in_an_ablation, ValueError),
    (fails_in_a_refused_edit, ValueError),
    (fails_in_the_input, ValueError),
]


@pytest.mark.parametrize(("fail", "error"), FAILING, ids=lambda x: x.__name__)
@every_kind
def test_the_host_is_left_as_it_was(case, fail, error):
    model = case.model()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)  # some trainable, some not
    try:
        with quiet():
            lens = tensorlens_tl.capture(model, tokens())[1]
            before = state_of(model)
            with pytest.raises(error, match=r"."):
                fail(model, lens)
        assert state_of(model) == before
        with quiet():
            assert tensorlens_tl.capture(model, tokens())[1].completeness_error <= case.tol()
    finally:
        for p in model.parameters():
            p.requires_grad_(True)
