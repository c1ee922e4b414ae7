"""The capture: one forward pass that leaves the host as it was, and a check that finds mistakes."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from models import CASES, PER_SHAPE, SHAPES, lens_of, quiet, tokens

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError
from tensorlens_tl.hosts.entry import adapt
from tensorlens_tl.operator.capture import Convention
from tensorlens_tl.recording.run import record

every_case = pytest.mark.parametrize("case", SHAPES, ids=str)
every_host = pytest.mark.parametrize(
    "case", list({c.host: c for c in reversed(SHAPES)}.values()), ids=str
)


def snapshot(model):
    hooks = {
        n: (list(p.fwd_hooks), list(p.bwd_hooks), list(p._forward_hooks))
        for n, p in model.hook_dict.items()
    }
    weights = {
        n: (p.data_ptr(), p._version, p.detach().clone(), p.requires_grad, p.grad)
        for n, p in model.named_parameters()
    }
    modes = {n: m.training for n, m in model.named_modules()}
    config = {k: repr(v) for k, v in vars(model.cfg).items()}
    return hooks, weights, modes, config, torch.is_grad_enabled()


def assert_same(before, after):
    for one, two in zip(before[1].values(), after[1].values(), strict=True):
        assert one[:2] == two[:2] and torch.equal(one[2], two[2]) and one[3:] == two[3:]
    assert before[1].keys() == after[1].keys()
    assert before[0] == after[0] and before[2:] == after[2:]


@every_case
def test_the_host_is_left_as_it_was(case):
    model = case.model()
    before = snapshot(model)
    with quiet():
        tensorlens_tl.capture(model, tokens())
        assert_same(before, snapshot(model))
        last = model.blocks[-1].attn

        def fail(*_):
            raise RuntimeError("in the middle of the run")

        handle = last.register_forward_pre_hook(fail)
        try:
            with pytest.raises(RuntimeError, match="in the middle"):
                tensorlens_tl.capture(model, tokens())
        finally:
            handle.remove()
    assert_same(before, snapshot(model))


@every_case
def test_one_forward_pass_and_the_models_own_logits(case):
    model, calls = case.model(), []
    handle = model.unembed.register_forward_hook(lambda *_: calls.append(1))
    try:
        with quiet(), torch.no_grad():
            plain = model(tokens(), return_type="logits")
            calls.clear()
            logits, lens = tensorlens_tl.capture(model, tokens())
    finally:
        handle.remove()
    assert len(calls) == 1
    assert torch.equal(logits, plain)
    assert lens.logits.data_ptr() == logits.data_ptr() and not lens.logits.requires_grad


@every_case
def test_the_callers_grad_mode_is_kept(case):
    with quiet():
        logits, lens = tensorlens_tl.capture(case.model(), tokens())
    assert logits.requires_grad
    kept = [lens.embedding, lens.operator.bias, *lens.operator.constants().values()]
    assert not any(t.requires_grad for t in kept)


@every_case
def test_stored_bytes(case):
    """Patterns + scales + gates + one state per sublayer + embeddings, and one state at the end."""
    c = lens_of(case).capture
    state = c.resid_final.untyped_storage().nbytes()
    expected = 2 * state  # the last residual and the token embedding
    if c.ln_final is not None:
        expected += state + c.ln_final.scale.nbytes  # and what the unembedding reads
    # Without position embeddings the first residual is the token embedding itself.
    expected += -state if c.pos_embed is None else c.pos_embed.untyped_storage().nbytes()
    for block in c.blocks:
        expected += state * (1 + (block.resid_mid is not None)) + block.attn.pattern.nbytes
        for norm in (block.ln1, block.ln2, block.ln1_post, block.ln2_post):
            expected += 0 if norm is None else norm.scale.nbytes
        for name in ("pre", "pre_linear", "ln_scale"):
            gate = getattr(block.mlp, name, None)
            expected += 0 if gate is None else gate.nbytes
    assert c.nbytes == expected


# --- The self-check finds what it must, and says where


def _weights(adapter, layer, **changes):
    blocks = list(adapter.weights.blocks)
    blocks[layer] = replace(blocks[layer], **changes)
    adapter.weights = replace(adapter.weights, blocks=tuple(blocks))


def _attn(adapter, **changes):
    _weights(adapter, 1, attn=replace(adapter.weights.blocks[1].attn, **changes))


def _mlp(adapter, **changes):
    _weights(adapter, 1, mlp=replace(adapter.weights.blocks[1].mlp, **changes))


def transposed_W_O(a):
    W = a.weights.blocks[1].attn.W_O
    _attn(a, W_O=W.flatten(0, 1).T.contiguous().view_as(W))


def swapped_W_V_heads(a):
    _attn(a, W_V=a.weights.blocks[1].attn.W_V.flip(0))


def dropped_b_V(a):
    _attn(a, b_V=None)


def dropped_b_O(a):
    _attn(a, b_O=None)


def wrong_gate_branch(a):
    w = a.weights.blocks[1].mlp
    _mlp(a, W_gate=w.W_in, W_in=w.W_gate)


def wrong_activation(a):
    _mlp(a, act="relu" if a.weights.blocks[1].mlp.act != "relu" else "silu")


def transposed_W_out(a):
    _mlp(a, W_out=a.weights.blocks[1].mlp.W_out.flip(0))


def forgotten_one_plus_w(a):
    ln1 = a.weights.blocks[1].ln1
    _weights(a, 1, ln1=replace(ln1, w=ln1.gain - 1, offset=0.0))


def skipped_norm_weight(a):
    _weights(a, 1, ln2=replace(a.weights.blocks[1].ln2, w=None))


def skipped_post_norm(a):
    _weights(a, 1, ln1_post=replace(a.weights.blocks[1].ln1_post, w=None))


def uncentred(a):
    _weights(a, 1, ln1=replace(a.weights.blocks[1].ln1, center=False))


def final_norm_skipped(a):
    a.weights = replace(a.weights, ln_final=replace(a.weights.ln_final, w=None))


def dropped_soft_cap(a):
    a.weights = replace(a.weights, unembed=replace(a.weights.unembed, soft_cap=None))


MISTAKES = [
    (transposed_W_O, "L1 attention.*output", lambda c: True),
    (swapped_W_V_heads, "L1 attention values", lambda c: c.kv > 1),
    (dropped_b_V, "L1 attention values", lambda c: c.b_V),
    (dropped_b_O, "L1 attention.*output", lambda c: c.b_O),
    (wrong_gate_branch, "L1 MLP gate", lambda c: c.gated),
    (wrong_activation, "L1 MLP (activation|gating)", lambda c: c.mlp),
    (transposed_W_out, "L1.* MLP output", lambda c: c.mlp),
    (forgotten_one_plus_w, "L1 attention values", lambda c: c.w),
    (skipped_norm_weight, "L1 MLP (gate|input)", lambda c: c.w and c.mlp),
    (skipped_post_norm, "L1 attention output", lambda c: c.post),
    (uncentred, "L1 attention values", lambda c: c.center),
    (final_norm_skipped, "logits", lambda c: c.w),
    (dropped_soft_cap, "logits", lambda c: c.cap),
]


class Traits:
    """What a model has, so that each mistake is made where it can be."""

    def __init__(self, case):
        weights = adapt(case.model()).weights
        block = weights.blocks[1]

        def is_set(b):
            return b is not None and bool(b.abs().max() > 0)

        self.kv = block.attn.W_V.shape[0]
        self.b_V, self.b_O = is_set(block.attn.b_V), is_set(block.attn.b_O)
        self.mlp, self.gated = block.mlp is not None, case.gated
        gain = None if block.ln1 is None else block.ln1.gain
        self.w = gain is not None and bool((gain != 1).any())
        # Compatibility mode centres what writes to the residual: a mean of 0 cannot be missed.
        self.center = block.ln1 is not None and block.ln1.center and "compat" not in case.name
        self.post = block.ln1_post is not None
        self.cap = weights.unembed.soft_cap is not None


PAIRS = [
    (case, mistake, where)
    for case in SHAPES
    for traits in [Traits(case)]
    for mistake, where, applies in MISTAKES
    if applies(traits)
]


@pytest.mark.parametrize(
    ("case", "mistake", "where"), PAIRS, ids=[f"{c}-{m.__name__}" for c, m, _ in PAIRS]
)
def test_the_self_check_finds(case, mistake, where):
    """And the same run passes without the mistake: ``lens_of`` is that."""
    for dtype in (torch.float64, torch.float32)[: 1 + (case in PER_SHAPE)]:
        adapter = adapt(case.model(dtype))
        with torch.no_grad(), quiet():
            mistake(adapter)
            for reader, block in zip(adapter.attention, adapter.weights.blocks, strict=True):
                reader.weights = block.attn  # a mistake of weights, wherever they are read
            with pytest.raises(CaptureMismatchError, match=where):
                record(adapter, tokens())
        assert lens_of(case, dtype).capture_check <= 1e-4


@every_case
def test_every_product_is_checked(case):
    checks = lens_of(case).capture.checks
    assert any("logits" in name for name in checks) and any("embed" in name for name in checks)
    for layer, block in enumerate(lens_of(case).capture.blocks):
        names = " ".join(name for name in checks if name.startswith(f"L{layer} "))
        assert "W_O" in names  # the whole of attention: norm, W_V, pattern, W_O, and its biases
        if block.mlp is not None:
            assert "W_in" in names and "W_out" in names and ("W_gate" in names) == case.gated
    assert lens_of(case).capture_check == max(checks.values()) <= case.within("products")


def test_probe_products_follow_the_weights():
    """A weight edited in place is read anew: no stale product refuses, or passes, a capture."""
    case = SHAPES[0]
    model = case.build(torch.float64)
    with torch.no_grad(), quiet():
        tensorlens_tl.capture(model, tokens())
        for p in model.parameters():
            p.mul_(1.25)
        lens = tensorlens_tl.capture(model, tokens())[1]
        assert lens.completeness_error <= case.tol()
        for p in model.parameters():
            p.data = p.data * 0.9
        assert tensorlens_tl.capture(model, tokens())[1].completeness_error <= case.tol()


def test_convention_is_checked():
    with pytest.raises(ValueError, match=r"gate='down' is not known. Pass one of gate, up, half"):
        Convention("down")
    with pytest.raises(
        ValueError, match=r"dtype=torch\.bfloat16 is no compute dtype.*Give torch\.float32 or"
    ):
        record(adapt(SHAPES[0].model()), tokens(), dtype=torch.bfloat16)


def test_there_is_a_case_of_every_kind():
    names = " ".join(CASES)
    for family in ("gpt2", "llama", "mistral", "neox", "qwen3", "gemma2"):
        assert family in names


@every_host
def test_what_a_block_keeps_not_is_freed_while_the_model_runs(case):
    model, seen, alive = case.model(), {}, {}
    passing = [f"blocks.0.{name}" for name in ("attn.hook_v", "attn.hook_z", "mlp.hook_post")]

    def note(tensor, hook):
        seen[hook.name] = weakref.ref(tensor)

    def look(tensor, hook):
        alive.update({name: at() is not None for name, at in seen.items()})

    hooks = [(name, note) for name in passing] + [("blocks.1.hook_resid_mid", look)]
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=hooks):
        tensorlens_tl.capture(model, tokens())
    assert len(alive) == len(passing) and not any(alive.values())


@every_host
def test_a_module_that_was_replaced_since_the_last_capture_is_found(case):
    model = case.model()
    with quiet():
        tree = adapt(model).tree
        assert adapt(model).tree is tree
        parts, own = model.blocks[0]._modules, model.blocks[0].attn
        parts["attn"] = copy.copy(own)
        try:
            found = adapt(model).tree
        finally:
            parts["attn"] = own
    assert found is not tree
    assert [m for n, m in found.named if n == "blocks.0.attn"] != [own]
