"""Half precision: the completeness error beside the model's own rounding; and autocast."""

import copy

import pytest
import torch
from models import CASES, PER_SHAPE, SHAPES, build_bridge_from_module, quiet, tokens

import tensorlens_tl
from tensorlens_tl import demo

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def capture(model, inputs, **kwargs):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(model, inputs, **kwargs)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("case", PER_SHAPE, ids=str)
def test_the_error_is_the_models_own_rounding(case, name):
    dtype = HALF[name]
    model = case.model(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits, lens = capture(model, tokens(), noise_floor=True)
    assert lens.capture.frame.dtype == torch.float32 and logits.dtype == dtype
    # The same by another way: the weights of the half model in a model built in float32.
    exact = case.build(torch.float32)
    exact.load_state_dict(before, strict=False)
    with quiet(), torch.no_grad():
        theirs = exact(tokens(), return_type="logits")
    noise = float((logits.float() - theirs).abs().max() / theirs.abs().max())
    assert 0.7 * noise <= lens.noise_floor <= 1.4 * noise and noise > 1e-4
    # The operator freezes what the run rounded: measured 0.1 to 1.2 times the noise.
    assert lens.completeness_error <= 2 * lens.noise_floor
    error, floor = lens.completeness_error, lens.noise_floor
    assert (
        lens.exactness == f"completeness error {error:.0e} (model's own {name} noise {floor:.0e})"
    )
    assert lens.exactness in repr(lens)
    for by in ("token", "component"):
        assert lens.attribute(3, by=by).completeness_error <= 2 * lens.noise_floor
    # The model is as it was.
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with quiet(), torch.no_grad():
        assert torch.equal(model(tokens(), return_type="logits"), logits)


KINDS = [
    k
    for k, there in (("hooked", "hooked-gpt2" in CASES), ("bridge", build_bridge_from_module))
    if there
]


@pytest.mark.parametrize(("kind", "name"), list(zip(KINDS * 2, HALF, strict=False)))
def test_the_demo_model_padded_and_saved(kind, name, tmp_path):
    with quiet():
        model = demo.load_model(kind).to(HALF[name])
    texts = ["When Mary and John went to the store, John gave a drink to", "The capital of"]
    _, lens = capture(model, texts, noise_floor=True, padding_side="left")
    assert 1e-4 < lens.noise_floor < 2e-2
    assert lens.completeness_error <= 2 * lens.noise_floor
    assert lens[1].noise_floor == lens.noise_floor
    lens.save(tmp_path / "half.safetensors")
    assert (
        tensorlens_tl.load(tmp_path / "half.safetensors", model=model).exactness == lens.exactness
    )
    _, plain = capture(model, texts, padding_side="left")
    assert plain.noise_floor is None and "noise" not in repr(plain)
    assert plain.exactness == f"completeness error {lens.completeness_error:.0e}"


@pytest.mark.parametrize("case", SHAPES[:1] + SHAPES[-1:], ids=str)
def test_edits_run_in_float32_too(case):
    model = copy.deepcopy(case.model(torch.bfloat16))
    hook = ("blocks.1.hook_attn_out", lambda t, hook: t * 20)
    with model.hooks(fwd_hooks=[hook]):
        _, lens = capture(model, tokens(), noise_floor=True)
    assert 1e-4 < lens.noise_floor < 0.1  # without the edit the second run is far off
    assert "L1.hook_attn_out[user]" in lens.operator.constants()


FUSED = [c for c in SHAPES if c.name in ("hooked-gpt2", "bridge-gpt2", "bridge-neox")]


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_a_model_that_keeps_its_runs_graph_is_served(case):
    """Bridges with fused queries, keys and values leave their pattern on the attention."""
    model = case.build(torch.bfloat16)
    with quiet(), torch.enable_grad():
        lens = tensorlens_tl.capture(model, tokens(), noise_floor=True)[1]
    assert lens.noise_floor == capture(model, tokens(), noise_floor=True)[1].noise_floor > 0


@pytest.mark.parametrize("case", [c for c in CASES.values() if "falcon" in c.name], ids=str)
def test_the_noise_floor_of_a_host_with_patched_modules(case):
    """Falcon's layers hold on to their own modules, so that a deep copy runs the original's."""
    model = case.build(torch.bfloat16)
    logits, lens = capture(model, tokens(), noise_floor=True)
    exact = case.build(torch.float32)
    with quiet(), torch.no_grad():
        for own, half in zip(exact.buffers(), model.buffers(), strict=True):
            own.copy_(half)  # frequencies of the rotation, which no state holds
        exact.load_state_dict(model.state_dict())
        theirs = exact(tokens(), return_type="logits")
    noise = float((logits.float() - theirs).abs().max() / theirs.abs().max())
    assert lens.noise_floor == pytest.approx(noise, rel=1e-3) and noise > 1e-4


@pytest.mark.parametrize("case", SHAPES[:1] + SHAPES[-1:], ids=str)
def test_weights_are_the_same_tensors_after_an_error(case):
    model = case.build(torch.bfloat16)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}

    def fail(z, hook):
        if z.dtype == torch.float32:
            raise RuntimeError("in the second run")

    point = "blocks.1.attn.hook_z"
    with model.hooks([(point, fail)]), pytest.raises(RuntimeError, match="second run"):
        capture(model, tokens(), noise_floor=True)
    after = dict(model.named_parameters())
    for name, (p, pointer, values) in before.items():
        assert after[name] is p and p.data_ptr() == pointer and torch.equal(p, values)
    assert model.cfg.dtype == torch.bfloat16
    assert model(tokens(), return_type="logits").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_noise_floor_is_for_half_precision(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"model is in {name}. Call without noise_floor"):
        capture(SHAPES[0].model(dtype), tokens(), noise_floor=True)


@pytest.mark.parametrize("case", SHAPES[:1] + SHAPES[-1:], ids=str)
def test_autocast_is_refused(case):
    model = case.model(torch.float32)
    _, lens = capture(model, tokens())
    operator, x = lens.operator, lens.embedding
    part, subgraph = (
        lens.between("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"),
        lens.circuit(["L0H0"]),
    )
    _ = lens.attribute(3), subgraph.logits  # what is kept must not answer under autocast, either
    questions = (
        lambda: subgraph.logits,
        lambda: subgraph.operator.apply(x),
        lambda: subgraph.operator.apply_t(x),
        lambda: part.apply(x),
        lambda: part.bias,
        lambda: operator.pull(x),
        lambda: operator.trace(x),
        lambda: operator.frobenius_norm(),
        lambda: tensorlens_tl.dot_test(operator),
        lambda: lens.capture.blocks[0].attn @ x,
        lambda: lens.token_matrix("rollout"),
        lambda: lens.paths(3, k=1),
        lambda: capture(model, tokens()),
        lambda: lens.attribute(3),
        lambda: lens.attribute(3, by="component"),
        lens.verify,
        lambda: operator @ x,
        lambda: operator.T @ x,
        lambda: operator.block(-1, 0),
        lambda: lens.readout(x),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for question in questions:
            with pytest.raises(
                ValueError, match=r"autocast is on.* Leave the torch.autocast block"
            ):
                question()
        with torch.autocast("cpu", enabled=False):
            assert lens.completeness_error <= case.tol(torch.float32)
    assert lens.attribute(3).completeness_error <= case.tol(torch.float32)


def test_autocast_is_not_looked_up_for_every_product(monkeypatch):
    model = SHAPES[0].model(torch.float32)
    _, lens = capture(model, tokens())
    looked, enabled = [], torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *kind: looked.append(kind) or enabled(*kind)
    )
    lens.attribute(3, by="component")
    assert 1 <= len(looked) <= 4
