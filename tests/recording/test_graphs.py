"""A lens with a graph: its operator as a function of the weights, and what cannot have one."""

from dataclasses import replace

import pytest
import torch
from models import CASES, GRADIENT, ORACLE, PER_SHAPE, SEQ, Case, HookedTransformer, quiet
from oracles import FrozenModel
from torch.overrides import TorchFunctionMode

import tensorlens_tl
from tensorlens_tl import UnsupportedArchitectureError, demo
from tensorlens_tl.operator import FrozenTransformer
from tensorlens_tl.support.tiny_models import host_classes

IDS = torch.arange(3, 3 + SEQ)[None]
EXACT = [case for case in PER_SHAPE if not case.float32_norms]


def graph_of(model, ids=IDS, **kwargs):
    with quiet():
        return tensorlens_tl.capture(model, ids, graph=True, **kwargs)[1]


def fresh(case: Case):
    """A model of its own, as its weights change; and the weights that its graph may reach."""
    return trained(case.build(torch.float64))


def trained(model):
    named = {n: p.requires_grad_(True) for n, p in model.named_parameters()}
    return model, [p for n, p in named.items() if "qkv" not in n and "lm_head.bias" not in n]


def draw(like, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, dtype=torch.float64, generator=generator)


def answers(lens):
    """One number per question that is linear in the operator."""
    x, u, T = draw(lens.embedding, 1), draw(lens.embedding, 2), lens.operator
    weights = draw(torch.empty(SEQ, SEQ), 3)
    found = {
        "T @ x": (u * (T @ x)).sum(),
        "T.T @ u": (x * (T.T @ u)).sum(),
        "between": (u * (lens.between(1, 1) @ x)).sum(),
        "attribute": (lens.attribute(5).values[0] ** 2).sum(),
        "in": (lens.token_matrix("in").values * weights).sum(),
        "norm": (lens.token_matrix("norm", probes=4).values * weights).sum(),
        "block": T.block(-1, 0).square().sum(),
    }
    return found | {"in_out": (lens.token_matrix("in_out", 5).values * weights).sum()}


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_gradients_are_slopes(case):
    """Every answer's derivative along a random change of all weights is its finite difference."""
    slopes_hold(*fresh(case))


def slopes_hold(model, weights):
    found = answers(graph_of(model))
    steps = [draw(p, seed) for seed, p in enumerate(weights)]
    slopes = {}
    for name, value in found.items():
        grads = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        slopes[name] = sum(
            (g * s).sum() for g, s in zip(grads, steps, strict=True) if g is not None
        )
    moved, h = {}, 1e-5
    for by in (-2, -1, 1, 2):
        with torch.no_grad(), quiet():
            for p, step in zip(weights, steps, strict=True):
                p.add_(step, alpha=by * h)
            moved[by] = answers(model.run_with_tensorlens(IDS)[1])
            for p, step in zip(weights, steps, strict=True):
                p.sub_(step, alpha=by * h)
    for name, slope in slopes.items():
        down, up = moved[-2][name] - moved[2][name], moved[1][name] - moved[-1][name]
        expected = (8 * up + down) / (12 * h)
        scale = expected.abs() + 1e-2 * found[name].abs()
        assert (slope - expected).abs() <= GRADIENT * scale, name


class InDouble(TorchFunctionMode):
    """Casts to float32 leave float64: hosts that round inside are differentiable in differences."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


ROUTED = [("HookedTransformer", "mixtral")]
ROUTED += [("Bridge", name) for name in ("gpt-oss", "deepseek-v2", "qwen3.5", "olmo-hybrid")]


@pytest.mark.parametrize(("host", "family"), ROUTED)
def test_experts_and_delta_nets_have_slopes(host, family):
    """Shares of experts, sinks, latents and states of a recurrence are functions of the weights."""
    build = host_classes().get(host)
    if HookedTransformer is not None and family in ("qwen3.5", "olmo-hybrid"):
        pytest.skip("the Bridge of this host does not run gated delta nets")
    with quiet(), InDouble():
        model = build and build(family, torch.float64)
        if model is None:
            pytest.skip(f"this host has no {host} of {family}")
        slopes_hold(*trained(model))


class Written:
    """A GPT-2 of two layers, written out: patterns, scales and ratios from its weights."""

    def __init__(self, model, held: bool = False):
        self.model, self.held = model, held

    def hold(self, t):
        return t.detach() if self.held else t

    def scale(self, x):
        return self.hold(
            ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-5).sqrt()
        )

    def maps(self, ids):
        """The branches as functions of a vector, each at its run's own pattern, scale, ratio."""
        m = self.model
        x = m.embed.W_E[ids] + m.pos_embed.W_pos[: ids.shape[1]]
        steps = []
        for b in m.blocks:
            s1 = self.scale(x)
            n = (x - x.mean(-1, keepdim=True)) / s1 * b.ln1.w + b.ln1.b
            q = torch.einsum("bpd,hde->bhpe", n, b.attn.W_Q) + b.attn.b_Q[:, None]
            k = torch.einsum("bpd,hde->bhpe", n, b.attn.W_K) + b.attn.b_K[:, None]
            scores = (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(
                torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), -torch.inf
            )
            A = self.hold(scores.softmax(-1))
            OV = b.attn.W_V @ b.attn.W_O

            def attn(v, b=b, s1=s1, A=A, OV=OV):
                v = (v - v.mean(-1, keepdim=True)) / s1 * b.ln1.w
                return torch.einsum("bhqk,bkd,hde->bqe", A, v, OV)

            bias = torch.einsum("bhqk,d,hde->bqe", A, b.ln1.b, OV)
            bias = bias + torch.einsum("bhqk,he,hed->bqd", A, b.attn.b_V, b.attn.W_O) + b.attn.b_O
            x = x + attn(x) + bias
            s2 = self.scale(x)
            n = (x - x.mean(-1, keepdim=True)) / s2 * b.ln2.w + b.ln2.b
            z = n @ b.mlp.W_in + b.mlp.b_in
            r = self.hold(0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))))

            def mlp(v, b=b, s2=s2, r=r):
                v = (v - v.mean(-1, keepdim=True)) / s2 * b.ln2.w
                return (v @ b.mlp.W_in * r) @ b.mlp.W_out

            x = x + (z * r) @ b.mlp.W_out + b.mlp.b_out
            steps += [attn, mlp]
        s, w = self.scale(x), m.ln_final.w
        return steps, lambda v: (v - v.mean(-1, keepdim=True)) / s * w

    def __call__(self, ids, x):
        steps, last = self.maps(ids)
        for step in steps:
            x = x + step(x)
        return last(x)


def detached(capture):
    """The same capture, its patterns, scales and ratios constants; the weights are not."""

    def norm(n):
        return None if n is None else replace(n, scale=n.scale.detach())

    blocks = []
    for b in capture.blocks:
        attn = replace(b.attn, mix=replace(b.attn.mix, pattern=b.attn.mix.pattern.detach()))
        mlp = replace(b.mlp, pre=b.mlp.pre.detach())
        blocks.append(replace(b, attn=attn, mlp=mlp, ln1=norm(b.ln1), ln2=norm(b.ln2)))
    return replace(capture, blocks=tuple(blocks), ln_final=norm(capture.ln_final))


@pytest.mark.skipif("hooked-gpt2" not in CASES, reason="this host has no HookedTransformer")
@pytest.mark.parametrize("held", [False, True])
def test_against_a_written_out_model(held):
    """With everything held but the weights, the gradient is that of the frozen model."""
    model, weights = fresh(CASES["hooked-gpt2"])
    capture = graph_of(model).capture
    operator = FrozenTransformer.of(detached(capture) if held else capture)
    x, u = draw(capture.resid_final, 1), draw(capture.resid_final, 2)
    ours, theirs = (u * (operator @ x)).sum(), (u * Written(model, held)(IDS, x)).sum()
    assert (ours - theirs).abs() <= ORACLE * ours.abs()
    pairs = (torch.autograd.grad(v, weights, allow_unused=True) for v in (ours, theirs))
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None) or not (b if a is None else a).any()
        assert a is None or b is None or (a - b).abs().max() <= ORACLE * (1 + b.abs().max())


@pytest.mark.skipif("hooked-gpt2" not in CASES, reason="this host has no HookedTransformer")
def test_frozen_gradient_of_the_host():
    """Held, y = T X + c has the gradient of the host's own run with all of that held by hooks."""
    model, _ = fresh(CASES["hooked-gpt2"])
    capture = graph_of(model).capture
    operator, u = FrozenTransformer.of(detached(capture)), draw(capture.resid_final, 2)
    weights = [p for n, p in model.named_parameters() if "blocks" in n or "ln_final" in n]
    x = capture.resid_final.new_tensor(capture.blocks[0].resid_pre.detach().numpy())
    y, _ = FrozenModel(model, IDS)(x)
    pairs = [
        torch.autograd.grad((u * v).sum(), weights, allow_unused=True)
        for v in (operator @ x + operator.bias, y)
    ]
    for a, b in zip(*pairs, strict=True):
        zeros = torch.zeros(1, dtype=torch.float64)
        a, b = (zeros if g is None else g for g in (a, b))
        assert (a - b).abs().max() <= ORACLE * (1 + b.abs().max())


def test_without_a_graph_nothing_is_kept():
    """A plain lens has no graph, the same numbers, and keeps as many tensors as before."""
    model = demo.load_model()
    logits, plain = model.run_with_tensorlens("The capital of France is")
    _, lens = model.run_with_tensorlens("The capital of France is", graph=True)
    assert logits.requires_grad  # as the user's own run has it
    tensors = []
    plain.capture.mapped(lambda t: tensors.append(t) or t)
    own = {id(t) for t in plain.capture.tensors()[1:]}
    assert all(t.grad_fn is None for t in tensors if id(t) not in own)
    assert plain.capture.nbytes == lens.capture.nbytes
    for name in ("in_out", "in", "out"):
        assert torch.equal(plain.token_matrix(name).values, lens.token_matrix(name).values)
    a, b = plain.attribute("Paris"), lens.attribute("Paris")
    assert torch.equal(a.values, b.values) and not a.values.requires_grad
    assert b.values.requires_grad and lens.completeness_error == plain.completeness_error


def test_copies_have_no_graph(tmp_path):
    """A file holds numbers alone: those of a plain lens, to the bit."""
    model, found = demo.load_model(), []
    for graph in (False, True):
        _, lens = model.run_with_tensorlens("The capital of France is", graph=graph)
        lens.save(tmp_path / "lens.safetensors", weights=True)
        copy = tensorlens_tl.load(tmp_path / "lens.safetensors")
        assert not copy.capture.frame.graph
        found.append(copy.attribute("Paris").values)
    assert torch.equal(*found) and not found[1].requires_grad


def test_a_step_ends_the_lens():
    model = demo.load_model()
    lens = graph_of(model, "The capital of France is")
    lens.attribute("Paris").values.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    with pytest.raises(ValueError, match="weights were written to"):
        lens.attribute("Paris")


@pytest.mark.parametrize(
    ("prepare", "kwargs", "message"),
    [
        (lambda m: m, {"pattern": "recomputed"}, "stored"),
        (lambda m: m.to(torch.bfloat16), {}, r"model\.float"),
        (lambda m: m.requires_grad_(False), {}, "requires_grad_"),
    ],
)
def test_refusals(prepare, kwargs, message):
    model = prepare(demo.load_model())
    with pytest.raises(ValueError, match=message):
        graph_of(model, "The capital of France is", **kwargs)


def test_refused_without_gradients():
    model = demo.load_model()
    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        graph_of(model, "The capital of France is")
    lens = graph_of(model, "The capital of France is")
    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        lens.attribute("Paris")
    with pytest.raises(ValueError, match="graph=True"):
        lens.operator.svd(k=1)
    with pytest.raises(ValueError, match="qk"):
        lens.attribute("Paris", by="edge", qk=True)


@pytest.mark.skipif(
    "bridge-llama-compat" not in CASES or HookedTransformer is None,
    reason="this host runs on its own weights in that mode, or has no Bridge",
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_a_host_that_runs_on_copies_is_refused(family):
    with quiet():
        model = CASES[f"bridge-{family}-compat"].build(torch.float32)
    with pytest.raises(UnsupportedArchitectureError, match="weights"):
        graph_of(model)


def test_the_plan_knows_what_autograd_keeps():
    """Of one pull, the plan tells the memory that a graph adds, and three times the products."""
    ids = torch.randint(3, 60, (4, 48), generator=torch.Generator().manual_seed(0))
    model = demo.load_model()
    lens, (_, plain) = graph_of(model, ids), model.run_with_tensorlens(ids)
    lens.attribute(5)  # what is made once, such as ratios, is the capture's
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    kept = {}

    def see(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage, storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        found = lens.attribute(6).values.sum()
    held = {t.untyped_storage().data_ptr() for t in capture_tensors(lens)}
    measured = sum(size for at, (_, size) in kept.items() if at not in held)
    planned, without = lens.plan("attribute"), plain.plan("attribute")
    assert found.requires_grad and planned.flops == 3 * without.flops
    assert planned.peak_bytes / 2 <= measured + without.peak_bytes <= 2 * planned.peak_bytes


def capture_tensors(lens):
    found = []
    for block in lens.capture.blocks:
        found += [*block.attn.frozen, *(n.scale for n in block.norms), block.mlp.map.maps[1].ratio]
    return found
