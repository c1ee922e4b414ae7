"""Runs that the user's own hooks edit: frozen as seen, or a constant source of its own."""

from collections import Counter

import pytest
import torch
from comparisons import assert_close
from models import (
    BRIDGE,
    CASES,
    ORACLE,
    PER_SHAPE,
    SHAPES,
    build_bridge_from_module,
    build_hf,
    lens_of,
    quiet,
    tokens,
)
from oracles import attends_apart

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError
from tensorlens_tl.attribution.splits import BY
from tensorlens_tl.readers.hook_points import EDITS

STAGES = {
    "blocks.0.hook_resid_pre": "L0.hook_resid_pre[user]",
    "blocks.1.hook_resid_pre": "L1.hook_resid_pre[user]",
    "blocks.1.attn.hook_v": "L1.hook_v[user]",
    "blocks.1.attn.hook_z": "L1.hook_z[user]",
    "blocks.1.hook_attn_out": "L1.hook_attn_out[user]",
    "blocks.1.mlp.hook_pre": "L1.hook_pre[user]",
    "blocks.1.mlp.hook_pre_linear": "L1.hook_pre_linear[user]",
    "blocks.1.mlp.hook_post": "L1.hook_post[user]",
    "blocks.1.hook_mlp_out": "L1.hook_mlp_out[user]",
    "blocks.1.hook_resid_post": "L1.hook_resid_post[user]",
    "blocks.1.hook_resid_mid": "L1.hook_resid_mid[user]",
    "blocks.1.ln1.hook_normalized": "L1.ln1.hook_normalized[user]",
    "blocks.1.ln2.hook_normalized": "L1.ln2.hook_normalized[user]",
    "blocks.1.ln2.hook_out": "L1.ln2.hook_out[user]",
    "blocks.1.mlp.hook_in": "L1.hook_in[user]",
    "blocks.1.attn.hook_in": "L1.hook_in[user]",
    "ln_final.hook_in": "ln_final.hook_in[user]",
    "ln_final.hook_normalized": "ln_final.hook_normalized[user]",
    "ln_final.hook_out": "ln_final.hook_out[user]",
    "unembed.hook_in": "unembed.hook_in[user]",
    "ln_final.hook_scale": None,
    "hook_embed": None,
    "blocks.1.attn.hook_pattern": None,
    "blocks.1.attn.hook_attn_scores": None,
    "blocks.1.attn.hook_q": None,
}


FLAGGED = ("hook_result", "hook_mlp_in")  # the host has them only when asked to


def add_noise(t, hook):
    """A steering vector that differs at every position."""
    g = torch.Generator().manual_seed(t.numel())
    noise = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t)
    return torch.where(t.isfinite(), t + 0.3 * noise * t.isfinite(), t)


def ablate(t, hook):
    return torch.zeros_like(t)


def has(case, name):
    block = lens_of(case).capture.blocks[1]
    if name not in case.model().hook_dict:
        return False
    if "mlp" in name or name.endswith("mlp_out"):
        return block.mlp is not None and (case.gated or "pre_linear" not in name)
    if case.name.startswith("native") and name.endswith("attn_scores"):
        return False  # the host discards that edit
    return not (name.endswith("pattern") and discards_patterns(case))


def discards_patterns(case):
    """GPT-J's Bridge and boot_native of 3.9 run on with the pattern before a hook's edit."""
    return attends_apart(case.model())


PAIRS = [  # of a shape's second host every third point, and patterns, which hosts read apart
    (case, name)
    for case in SHAPES
    for i, name in enumerate(STAGES)
    if has(case, name) and (case in PER_SHAPE or i % 3 == 0 or name.endswith("hook_pattern"))
]


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=[f"{c}-{n}" for c, n in PAIRS])
def test_an_edited_run_is_reproduced(case, name):
    model = case.model()
    own = case in PER_SHAPE[:3]  # an edit's value and the convention are few shapes' matter
    for edit in (add_noise, ablate) if own else (add_noise,):
        if edit is ablate and any(
            part in name for part in ("resid", "_scale", "_scores", "_q", "ln_final", "unembed")
        ):
            continue
        gates = ("gate", "up", "half") if "mlp" in name and case.gated and own else ("gate",)
        for gate in gates:
            with quiet(), torch.no_grad(), model.hooks(fwd_hooks=[(name, edit)]):
                logits = model(tokens(), return_type="logits")
                same, lens = tensorlens_tl.capture(model, tokens(), gate=gate)
            assert torch.equal(logits, same)
            plain = lens_of(case)
            assert (logits - plain.logits).abs().max() > 1e-4, "the edit does something"
            # An ablated sublayer's post-norm divides by √ε: what cancels there cancels at that
            # scale, so a float32 norm's 1e-7 becomes 1e-4.
            amplified = edit is ablate and case.float32_norms and "gemma2" in case.name
            tol = 1e3 * case.tol() if amplified else case.tol()
            assert lens.completeness_error <= tol
            total = sum(lens.operator.constants().values(), torch.zeros_like(lens.embedding))
            assert_close(total, lens.operator.bias, ORACLE)
            for by in ("token", "component"):
                a = lens.attribute(3, 4, by=by)
                assert a.completeness_error <= 10 * tol
                labels = [label for label in a.labels[0] if "[user]" in label]
                if STAGES[name] is None or (gate, name[-4:]) in (("gate", "_pre"), ("up", "near")):
                    continue  # frozen as seen
                expected = STAGES[name] + (
                    "@0" if name.startswith("blocks.0") and by == "token" else ""
                )
                assert expected in labels
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_other_point_that_is_served(case):
    model = case.model()
    names = dict.fromkeys(f"blocks.1.{name}" for names in EDITS.values() for name in names)
    for name in names:
        if name in STAGES or name not in model.hook_dict or name.endswith(FLAGGED):
            continue
        with quiet(), torch.no_grad(), model.hooks(fwd_hooks=[(name, add_noise)]):
            logits, lens = tensorlens_tl.capture(model, tokens(), gate="half")
        assert lens.completeness_error <= case.tol(), name
        for by in ("token", "component"):
            assert lens.attribute(3, 4, by=by).completeness_error <= 10 * case.tol(), name
        if not torch.equal(logits, lens_of(case).logits):
            assert any("[user]" in constant for constant in lens.operator.constants()), name


@pytest.mark.parametrize("case", SHAPES[:1] + [c for c in SHAPES if discards_patterns(c)], ids=str)
def test_an_edit_that_the_host_discards_is_refused(case):
    model = case.model()
    with quiet(), model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", add_noise)]):
        if not discards_patterns(case):
            assert tensorlens_tl.capture(model, tokens())[1].completeness_error <= case.tol()
            return
        with pytest.raises(CaptureMismatchError, match=r"mixing.* your own hooks at .*pattern"):
            tensorlens_tl.capture(model, tokens())


@pytest.mark.offered(build_bridge_from_module is not None)
def test_a_hook_at_any_other_point_of_a_bridge():
    """What never fires or is dropped changes nothing; what changes the run is in it or refused."""
    case = CASES["bridge-neox"]
    model, known = case.model(), {name for names in EDITS.values() for name in names}
    found = Counter()
    for name in model.hook_dict:
        if name.startswith("blocks.0.") or name.removeprefix("blocks.1.") in known:
            continue
        fired = []

        def edit(x, hook, fired=fired):
            fired.append(hook)
            return add_noise(x, hook) if x.is_floating_point() else None

        try:
            with quiet(), torch.no_grad(), model.hooks(fwd_hooks=[(name, edit)]):
                logits, lens = tensorlens_tl.capture(model, tokens())
        except ValueError:  # the host's own, for flags that are off, or ours
            found["refused"] += 1
            continue
        assert lens.completeness_error <= case.tol(), name
        found["served" if fired else "never fired"] += 1
        assert fired or torch.equal(logits, lens_of(case).logits), name
    assert found["never fired"] >= 4 and found["served"] >= 15, found


@pytest.mark.offered(build_bridge_from_module is not None)
def test_a_torch_hook_in_a_users_model_is_named_as_there():
    with quiet():
        hf = build_hf(*BRIDGE["llama"], torch.float32)
        hf.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: 2 * out)
        with pytest.raises(CaptureMismatchError, match=r"hooks at blocks\.1\.mlp\.down_proj: an"):
            tensorlens_tl.capture(hf, tokens())


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_edited_logits_are_refused(case):
    model = case.model()
    if "unembed.hook_out" in model.hook_dict:
        with (
            model.hooks(fwd_hooks=[("unembed.hook_out", add_noise)]),
            pytest.raises(CaptureMismatchError, match=r"logits .* your own hooks at .*unembed"),
        ):
            tensorlens_tl.capture(model, tokens())


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_an_edited_final_residual_in_every_split_path_and_file(case, tmp_path):
    model, name = case.model(), "unembed.hook_in"
    if name not in model.hook_dict:
        name = "ln_final.hook_normalized"
    if name not in model.hook_dict:
        return  # 2.18 without norms
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=[(name, add_noise)]):
        _, lens = tensorlens_tl.capture(model, tokens())
    for by in BY:
        a = lens.attribute(3, 4, by=by)
        assert a.completeness_error is None or a.completeness_error <= 10 * case.tol(), by
    edges = lens.attribute(3, 4, by="edge").select(dest="logits")
    assert_close(edges.values.sum(-1), edges.target_value, 10 * case.tol(), "edges to the logits")
    assert len(lens[0].paths(3, versus=4, k=3)) == 3
    lens.save(tmp_path / "edited.safetensors", weights=True)
    again = tensorlens_tl.load(tmp_path / "edited.safetensors")
    assert torch.equal(again.operator.bias, lens.operator.bias)
    assert f"{name}[user]" in again.operator.constants()
    shift = lens.operator.constants()[f"{name}[user]"]
    assert_close(lens.operator.bias - shift, lens_of(case).operator.bias, 10 * case.tol())


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_an_edit_is_nothing_at_padding(case):
    model, mask = case.model(torch.float32), torch.ones(2, 7).long()
    mask[1, 4:] = 0
    names = ("blocks.1.attn.hook_z", "blocks.1.hook_resid_post")
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=[(name, add_noise) for name in names]):
        _, lens = tensorlens_tl.capture(model, tokens(), attention_mask=mask)
    assert lens.completeness_error <= case.tol(torch.float32)
    assert lens.operator.constants()["L1.hook_resid_post[user]"][1, 4:].abs().max() == 0


@pytest.mark.parametrize("case", SHAPES[:3] + SHAPES[-3:], ids=str)
def test_a_hook_that_only_looks_leaves_no_source(case):
    model, seen = case.model(), set()
    names = [name for name in STAGES if has(case, name)]
    hooks = [(name, lambda t, hook: seen.add(hook.name)) for name in names]
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=hooks):
        _, lens = tensorlens_tl.capture(model, tokens())
    assert len(seen) == len(names) and lens.completeness_error <= case.tol()
    assert not any("[user]" in name for name in lens.operator.constants())
    assert_close(lens.operator.bias, lens_of(case).operator.bias, ORACLE)


@pytest.mark.parametrize("case", SHAPES[:3] + SHAPES[-3:], ids=str)
def test_several_edits_and_one_prompt_of_a_batch(case):
    model = case.model()
    names = [n for n in STAGES if has(case, n) and n not in ("blocks.1.attn.hook_attn_scores",)]
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=[(name, add_noise) for name in names]):
        _, lens = tensorlens_tl.capture(model, tokens())
    assert lens.completeness_error <= case.tol()
    for by in ("token", "component"):
        assert lens.attribute(3, by=by).completeness_error <= 10 * case.tol()
        assert lens[1].attribute(3, by=by).completeness_error <= 10 * case.tol()
    assert lens[1].completeness_error <= case.tol()


@pytest.mark.parametrize("case", SHAPES[:1] + SHAPES[-1:], ids=str)
def test_hooks_added_for_good(case):
    model = case.build(torch.float64)
    model.add_hook("blocks.1.attn.hook_z", ablate)
    with quiet(), torch.no_grad():
        _, lens = tensorlens_tl.capture(model, tokens())
        assert "L1.hook_z[user]" in lens.operator.constants()
        model.reset_hooks()
        _, plain = tensorlens_tl.capture(model, tokens())
    assert "L1.hook_z[user]" not in plain.operator.constants()
    # An ablated layer writes nothing but b_O: the constant cancels what the tokens would do there.
    a = lens.attribute(3, by="component")
    rows = {str(s.node): v for s, v in zip(a.sources, a.values.T, strict=True)}
    heads = sum(v for n, v in rows.items() if n.startswith("L1H"))
    tol = case.within("oracle")
    assert_close(heads, -rows["L1.hook_z[user]"], tol)
