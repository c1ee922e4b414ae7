"""Baselines that differentiate the real model; what all methods share: batches, state, refusals."""

import math
import sys
from functools import cache

import pytest
import torch
from comparisons import assert_close
from models import (
    CASES,
    HOOKED,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    TWO_RUNS,
    HookedTransformer,
    TransformerBridgeConfig,
    build_hooked,
    build_native,
    lens_of,
    quiet,
    tokens,
)
from oracles import FrozenModel, attends_apart
from test_baselines import FEW, every_few, matrix, scores, t

import tensorlens_tl
from tensorlens_tl.attribution.targets import resolve_target
from tensorlens_tl.hosts.entry import adapt
from tensorlens_tl.methods import gradients as gradient
from tensorlens_tl.methods.baselines import BASELINES, baseline_scores
from tensorlens_tl.recording.live_model import live_models
from tensorlens_tl.refusals.errors import UnsupportedArchitectureError

MODELS = [name for name, baseline in BASELINES.items() if baseline.needs_model]
every_method = pytest.mark.parametrize("name", list(BASELINES))
every_model_method = pytest.mark.parametrize("name", MODELS)
with_hooked = pytest.mark.offered(HookedTransformer is not None)
with_native = pytest.mark.offered(TransformerBridgeConfig is not None)
QUICK = {"integrated_gradients": {"steps": 2}}


# --- By hand -------------------------------------------------------------------------------------


def live_by_hand():
    """A real attention-only model without norms whose last token attends [1/4, 3/4].

    X = [[1, 0], [2, 1]]. q = b_Q = 1, W_K = (0, ln 3)ᵀ: scores (0, ln 3), A = [1/4, 3/4].
    W_V = (4, 0)ᵀ: v = (4, 8), z = 1/4·4 + 3/4·8 = 7, W_O = (0, 1): y_b = (2, 1 + 7).
    The target is y₂ = 8.
    """
    config = {
        **HOOKED["attn-only-no-norm"],
        "n_layers": 1,
        "d_model": 2,
        "n_heads": 1,
        "d_head": 1,
        "d_vocab": 3,
    }
    model = build_hooked(config, torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        attn = model.blocks[0].attn
        model.embed.W_E[:2] = t([1, 0], [2, 1])[:]
        attn.b_Q.fill_(1)
        attn.W_K.copy_(t([0], [math.log(3)])[None])
        attn.W_V.copy_(t([4], [0])[None])
        attn.W_O.copy_(t([0, 1])[None])
        model.unembed.W_U.copy_(t([0, 0, 0], [0, 1, 0]))
        lens = tensorlens_tl.capture(model, torch.tensor([[0, 1]]))[1]
    return lens, model


@with_hooked
def test_gradients_by_hand():
    """The model above, target y₂ of b.

    Residual: 1 from b. Values: dz/dv = A: 1/4·4·1 = 1 from a, 3/4·4·2 = 6 from b.
    Scores: dz/dS = A ⊙ (v − z) = (−3/4, 3/4), times S = (0, ln 3): 0 and ¾ ln 3.
    Gradient × input: [1, 7 + ¾ ln 3].
    AttnLRP halves values and quarters scores: [½, 4 + 3/16 ln 3].
    Chefer: A ⊙ ∇A = A ⊙ v = (1, 6), R = I + E: [1, 7].
    IG from 0: at αX the scores are (0, α ln 3), a's value 4α enters with weight 1/(1 + 3^α), and
    a's score is 0: 4 ∫ dα / (1 + 3^α) = 4 (1 − ln 2 / ln 3); b has the rest of y₂(X) − y₂(0) = 8.
    """
    lens, model = live_by_hand()
    ln3, a = math.log(3), 4 * (1 - math.log(2) / math.log(3))
    expected = {
        "grad_x_input": [1, 7 + 0.75 * ln3],
        "attnlrp": [0.5, 4 + 3 / 16 * ln3],
        "chefer": [1, 7],
        "integrated_gradients": [a, 8 - a],
    }
    for name, row in expected.items():
        # captum's quadrature weights are float32
        tol = 1e-6 if name == "integrated_gradients" else 1e-14
        assert_close(scores(name, lens, model, target=1), t(row), tol, name)


# --- The real model as the oracle ----------------------------------------------------------------


class Final:
    """The host's y as a function of X and, where given, of patterns: its own hooks, by name."""

    def __init__(self, case, ids=None):
        self.model, self.ids = case.model(), tokens() if ids is None else ids

    def __call__(self, x, edits=()):
        seen = []
        readout = getattr(self.model, "mlm_head", self.model.unembed)
        end = readout.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        entry = ("blocks.0.hook_resid_pre", lambda state, hook: x)
        try:
            with quiet():
                self.model.run_with_hooks(self.ids, fwd_hooks=[entry, *edits])
        finally:
            end.remove()
        return seen[-1]


@pytest.mark.parametrize("case", [c for c in FEW if not c.float32_norms], ids=str)
def test_grad_x_input_is_the_slope_along_a_token(case):
    """Central differences of the real model along x_j; those of float32 norms are noise."""
    lens, final, h = lens_of(case), Final(case), 1e-4
    u, x = resolve_target(lens.capture, 3).covector, lens.embedding
    ours = scores("grad_x_input", lens, case.model())
    for key in (0, 4, 6):
        step = torch.zeros_like(x)
        step[:, key] = h * x[:, key]
        with torch.no_grad():
            slope = ((final(x + step) - final(x - step))[:, -1] * u).sum(-1) / (2 * h)
        assert_close(ours[:, key], slope, 1e-5)


@every_few
def test_chefer_is_not_negative(case):
    ours = scores("chefer", lens_of(case), case.model())
    assert (ours >= 0).all() and (ours[:, -1] >= 1).all()


@with_hooked
@pytest.mark.parametrize("name", ["hooked-attn-only", "hooked-llama"])
def test_chefer_follows_the_real_model_s_patterns(name):
    """Chefer's rule with ∇A from differences of the real model, its pattern edited by name."""
    case = CASES[name]
    ids = tokens(2, 4)
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(case.model(), ids)[1]
    final = Final(case, ids)
    u = resolve_target(lens.capture, 3).covector
    relevance, h = torch.eye(4).double().expand(2, 4, 4), 1e-5
    for layer, block in enumerate(lens.capture.blocks):
        pattern, slope = block.attn.pattern, torch.zeros_like(block.attn.pattern)
        for head, q, k in torch.ones(4, 4, 4).tril().nonzero().tolist():
            values = []
            for sign in (1, -1):

                def nudge(p, hook, sign=sign, head=head, q=q, k=k):
                    p = p.clone()
                    p[:, head, q, k] += sign * h
                    return p

                edit = (f"blocks.{layer}.attn.hook_pattern", nudge)
                with torch.no_grad():
                    values.append((final(lens.embedding, [edit])[:, -1] * u).sum(-1))
            slope[:, head, q, k] = (values[0] - values[1]) / (2 * h)
        relevance = relevance + (slope * pattern).clamp_min(0).mean(1) @ relevance
    assert_close(scores("chefer", lens, case.model()), relevance[:, -1], 1e-6)


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_integrated_gradients_are_complete(baseline):
    """Σ = u·y(X) − u·y(X′). Smooth without norms; a LayerNorm's kink at 0 takes more steps."""
    for name, steps, tol in (("attn-only-no-norm", 60, 1e-6), ("gpt2", 300, 1e-2)):
        case = next(c for c in CASES.values() if c.name.endswith(f"-{name}"))
        lens, final = lens_of(case), Final(case)
        u = resolve_target(lens.capture, 3).covector
        with torch.no_grad():
            x = lens.embedding
            reference = torch.zeros_like(x) if baseline == "zero" else x.mean(1, keepdim=True)
            gained = ((final(x) - final(reference.expand_as(x)))[:, -1] * u).sum(-1)
        errors = []
        for m in (steps // 20, steps):
            found = scores("integrated_gradients", lens, case.model(), baseline=baseline, steps=m)
            errors.append(float((found.sum(-1) - gained).abs().max() / gained.abs().max()))
        assert errors[1] <= tol and errors[1] < errors[0]


def relevance_by_the_rules(model, lens, query, u):
    """AttnLRP for GPT-2's blocks as the paper writes it: relevances, quotients, one rule a line."""
    capture, cast = lens.capture, lens.capture.frame.cast

    def linear(x, W, y, R):  # ε-rule: R_i = x_i Σ_j w_ij R_j / y_j
        return x * ((R / y) @ W.mT)

    def norm(ln, x, R):  # weight and bias; identity through the division; centering
        centered = x - x.mean(-1, keepdim=True)
        out = ln.apply(x) + ln.bias
        width = x.shape[-1]
        R = (centered / ln.scale * cast(ln.weights.gain)) * R / out
        return linear(x, torch.eye(width).to(x) - 1 / width, centered, R)

    y = capture.unembed.final
    R = torch.zeros_like(y)
    R[torch.arange(len(y)), query] = (y[torch.arange(len(y)), query]) * u
    R = norm(capture.ln_final, capture.resid_final, R)
    after = capture.resid_final
    for layer, block in reversed(list(enumerate(capture.blocks))):
        if block.mlp is not None:
            w, mid = block.mlp.weights, block.resid_mid
            n, out = block.ln2.apply(mid) + block.ln2.bias, after - mid
            z = n @ cast(w.W_in) + cast(w.b_in)
            act = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            R_out, R_mid = out * R / after, mid * R / after
            R_z = linear(act, cast(w.W_out), out, R_out)  # identity: R_z = R_act
            R, after = R_mid + norm(block.ln2, mid, linear(n, cast(w.W_in), z, R_z)), mid
        attn, x, host = block.attn, block.resid_pre, model.blocks[layer].attn
        n, out = block.ln1.apply(x) + block.ln1.bias, after - x
        R_x, R_out, R_n = x * R / after, out * R / after, torch.zeros_like(x)
        zs = [
            attn.pattern[:, h] @ (n @ cast(attn.weights.W_V[h]) + cast(attn.weights.b_V[h]))
            for h in range(4)
        ]
        for h, z in enumerate(zs):
            A, v = attn.pattern[:, h], n @ cast(attn.weights.W_V[h]) + cast(attn.weights.b_V[h])
            R_z = linear(z, cast(attn.weights.W_O[h]), out, R_out) / z
            R_A = 0.5 * A * (R_z @ v.mT)  # uniform rule: half to either factor
            R_v = 0.5 * v * (A.mT @ R_z)
            q = n @ cast(host.W_Q[h]) + cast(host.b_Q[h])
            k = n @ cast(host.W_K[h]) + cast(host.b_K[h])
            S = q @ k.mT / math.sqrt(q.shape[-1])
            R_S = S * (R_A - A * R_A.sum(-1, keepdim=True))  # Taylor rule
            share = 0.5 * R_S / S / math.sqrt(q.shape[-1])
            R_n = R_n + linear(n, cast(attn.weights.W_V[h]), v, R_v)
            R_n = R_n + linear(n, cast(host.W_Q[h]), q, q * (share @ k))
            R_n = R_n + linear(n, cast(host.W_K[h]), k, k * (share.mT @ q))
        R, after = R_x + norm(block.ln1, x, R_n), x
    return R.sum(-1)


BY_RULES = ("hooked-gpt2", "hooked-attn-only", "bridge-gpt2", "native-gpt2")


@pytest.mark.parametrize("name", [name for name in BY_RULES if name in CASES])
def test_attnlrp_is_what_its_rules_give(name):
    lens, model = lens_of(CASES[name]), CASES[name].model()
    for pos in (-1, 3):
        goal = resolve_target(lens.capture, 3, pos)
        theirs = relevance_by_the_rules(model, lens, goal.query, goal.covector)
        assert_close(scores("attnlrp", lens, model, pos=pos), theirs, TWO_RUNS)


@every_few
def test_attnlrp_in_every_family(case):
    """The rules written as values: frozen ratios and scales, straight-through shares elsewhere."""
    lens, model = lens_of(case), case.model()
    if case.name.endswith("solu"):
        with pytest.raises(UnsupportedArchitectureError, match="for which attnlrp has no rule"):
            scores("attnlrp", lens, model)
        return
    frozen, final = FrozenModel(model, tokens(), gate="half"), Final(case)

    def share(part):
        return lambda x, hook: x.detach() * (1 - part) + x * part

    def uncapped(s, hook):
        cap = model.cfg.attn_scores_soft_cap
        inside = s.abs() < cap
        raw = cap * torch.atanh(torch.where(inside, s, 0) / cap)
        value = s.detach()
        return torch.where(inside, value + value / raw.detach() * (raw - raw.detach()), value)

    live = ("pattern", "q.hook_out", "k.hook_out")
    hooks = [(name, hook) for name, hook in frozen._hooks() if not name.endswith(live)]
    for layer in range(2):
        attn = f"blocks.{layer}.attn"
        # All that reaches queries and keys comes through the pattern: its share is theirs.
        of = ("q.hook_out", "k.hook_out") if attends_apart(model) else ("hook_pattern",)
        hooks += [(f"{attn}.{name}", share(0.25)) for name in of] + [(f"{attn}.hook_v", share(0.5))]
        hooks += [
            (name, lambda x, hook, name=name: frozen.cache[name].clone())
            for name in (
                f"{attn}.{norm}.hook_scale" for norm in ("q_norm", "k_norm", "q_a_layernorm")
            )
            if name in frozen.cache
        ]
        if adapt(model).soft_cap("attn_scores_soft_cap"):
            hooks.append((f"{attn}.hook_attn_scores", uncapped))
    x = lens.embedding.clone().requires_grad_()
    goal = resolve_target(lens.capture, 3)
    (g,) = torch.autograd.grad((final(x, hooks)[:, -1] * goal.covector).sum(), x)
    assert_close(scores("attnlrp", lens, model), (g * x).sum(-1), max(ORACLE, case.tol()))


@every_few
def test_attnlrp_conserves_relevance_where_it_holds(case):
    """Without biases and with attention silent, every rule left conserves: Σ R = target."""
    if case.name.endswith("solu"):
        return
    with quiet():
        model = case.build(torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", ".b")) or ".b_" in name:
                p.zero_()
        for block in adapt(model).weights.blocks:
            block.attn.W_O.zero_()
        with quiet():
            lens = tensorlens_tl.capture(model, tokens())[1]
    goal = resolve_target(lens.capture, 3)
    y = lens.capture.unembed.final[:, -1]
    total = scores("attnlrp", lens, model).sum(-1)
    assert_close(total, (y * goal.covector).sum(-1), max(ORACLE, case.tol()))


@with_native
def test_attnlrp_refuses_capped_scores_that_it_cannot_see():
    with quiet():
        model = build_native({**HOOKED["llama"], "attn_scores_soft_cap": 5.0}, torch.float64)
        lens = tensorlens_tl.capture(model, tokens())[1]
    with pytest.raises(UnsupportedArchitectureError, match="needs attention scores before"):
        scores("attnlrp", lens, model)


# --- What all methods share ----------------------------------------------------------------------


@cache
def ragged(case, side, dtype):
    """Prompts of 4, 7 and 4 tokens."""
    ids, real = tokens(3), torch.ones(3, 7, dtype=torch.long)
    for prompt, n in enumerate((4, 7, 4)):
        real[prompt, slice(n, None) if side == "right" else slice(0, 7 - n)] = 0
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(case.model(dtype), ids, attention_mask=real)[1]


PADDED = [c for c in FEW if not c.name.endswith(("solu", "mistral", "qwen3"))]
PAIRS = [  # methods that run the model, on every host; the others read captures alone
    (case, name)
    for case in PADDED
    for name in BASELINES
    if name in MODELS  # patterns alone, below
    or (case is FEW[0] if name == "attention_flow" else case in PER_SHAPE[::2])
]


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=[f"{c}-{n}" for c, n in PAIRS])
def test_padding_changes_nothing_and_gets_nothing(case, name):
    # A Bridge's masked float64 rows are NaN in some families.
    dtype = torch.float32 if case.float32_norms else torch.float64
    model, lens, options = case.model(dtype), ragged(case, "right", dtype), QUICK.get(name, {})
    goal = resolve_target(lens.capture, None)
    with quiet():
        found = baseline_scores(name, lens.capture, goal, model, **options)
    whole = matrix(name, lens, model, **options)
    for prompt, (start, stop) in enumerate(lens.capture.frame.spans[:2]):
        one = matrix(name, lens[prompt], model, **options)
        tol = case.within("padded gradient")
        assert_close(whole[prompt, start:stop, start:stop], one[0], tol)
        padding = ~lens.capture.frame.real[prompt]
        assert not whole[prompt, padding].any() and not whole[prompt][:, padding].any()
        assert not found[prompt, padding].any()
        if name != "decompx":  # its scores are signed shares of a target, its matrix has norms
            assert_close(found[prompt, start:stop], one[0, -1], tol)


@with_hooked
@every_method
def test_left_padding(name):
    case = next(c for c in FEW if c.name == "hooked-gpt2")
    lens, options = ragged(case, "left", torch.float64), QUICK.get(name, {})
    assert lens.capture.frame.spans[0] == (3, 7)
    whole, one = (matrix(name, x, case.model(), **options) for x in (lens, lens[0]))
    assert_close(whole[0, 3:, 3:], one[0], ORACLE)
    assert not whole[0, :3].any() and not whole[0, :, :3].any()


def state_of(model):
    points = {id(p): p for p in model.hook_dict.values()}.values()
    hooks = [(len(p.fwd_hooks), len(p.bwd_hooks), len(p._forward_hooks)) for p in points]
    modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]
    return hooks, modules, flags, [m.training for m in model.modules()], torch.is_grad_enabled()


@every_model_method
@every_few
def test_the_model_is_left_as_it_was(case, name, monkeypatch):
    if name == "attnlrp" and case.name.endswith("solu"):
        return
    lens, model, options = lens_of(case), case.model(), QUICK.get(name, {})
    before = state_of(model)
    with torch.no_grad():
        first = scores(name, lens, model, **options)
        assert state_of(model)[:-1] == before[:-1]
    assert not first.requires_grad and state_of(model) == before
    with torch.inference_mode():
        inside = scores(name, lens, model, **options)
    assert_close(first, inside, ROUNDING)

    def broken(self, inputs, kwargs):
        run(self, inputs, kwargs)
        raise RuntimeError("in the middle")

    run = type(adapt(model)).run
    monkeypatch.setattr(type(adapt(model)), "run", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        scores(name, lens, model, **options)
    assert state_of(model) == before


def test_hooks_of_the_user_s_own_stay():
    """A run with an edit is repeated with it, and refused without."""
    case = FEW[0]
    lens, model, seen = lens_of(case), case.model(), []
    point = model.hook_dict["blocks.1.hook_resid_pre"]
    point.add_hook(lambda x, hook: seen.append(1) or 2 * x)
    mine = point.fwd_hooks[-1]
    try:
        with pytest.raises(ValueError, match="does not repeat the captured run"):
            scores("chefer", lens, model)
        edited = lens_of(case)
        first = scores("grad_x_input", edited, model)
        assert point.fwd_hooks[-1] is mine and len(point.fwd_hooks) == 1 and len(seen) == 3
    finally:
        mine.hook.remove()
        point.fwd_hooks.remove(mine)
    assert (first - scores("grad_x_input", lens, model)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    case = FEW[0]
    ours, lens = (lens_of(case, d) for d in (dtype, torch.float64))
    for name in MODELS:
        found = scores(name, ours, case.model(dtype), **QUICK.get(name, {}))
        assert found.dtype == torch.float32
        if dtype == torch.float32:
            theirs = scores(name, lens, case.model(), **QUICK.get(name, {}))
            assert_close(found.double(), theirs, 1e-3)


def test_the_registry():
    for name, baseline in BASELINES.items():
        assert name == baseline.name and baseline.cost and baseline.source
        text = baseline.function.__doc__
        assert text and (baseline.source == "–" or baseline.source[-4:] in text), name
    assert BASELINES["integrated_gradients"].options == {"baseline": "zero", "steps": 50}
    assert set(MODELS) == {"grad_x_input", "integrated_gradients", "chefer", "attnlrp"}


def test_refusals(monkeypatch):
    case = FEW[0]
    lens, model = lens_of(case), case.model()
    with pytest.raises(
        ValueError, match=r"no method 'roll'. Choose one of mean_attention, .*random"
    ):
        matrix("roll", lens)
    with pytest.raises(ValueError, match=r"chefer runs the model again. Pass the captured model"):
        scores("chefer", lens)
    with pytest.raises(ValueError, match=r"random has no option sed. Use seed=0, or none"):
        matrix("random", lens, sed=1)
    with pytest.raises(
        ValueError, match=r"rollout has no option query. Drop it, as this method has no options"
    ):
        matrix("rollout", lens, query=None)
    with pytest.raises(ValueError, match=r"baseline='noise' does not exist. Choose 'zero'"):
        scores("integrated_gradients", lens, model, baseline="noise")
    with pytest.raises(ValueError, match=r"no beginning-of-sequence token. Use baseline="):
        scores("integrated_gradients", lens, model, baseline="bos")
    with pytest.raises(ValueError, match="steps=0 is not an integer ≥ 1"):
        scores("integrated_gradients", lens, model, steps=0)
    monkeypatch.setitem(sys.modules, "networkx", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    for name in ("attention_flow", "integrated_gradients"):
        with pytest.raises(ValueError, match=r"pip install 'tensorlens-tl\[baselines\]'"):
            scores(name, lens, model)


def test_bos_as_the_reference():
    """X′ is the host's own embedding of the beginning-of-sequence token at every position."""
    case = FEW[0]
    lens, model = lens_of(case), case.model()
    with live_models(lens.capture, model) as (live,):
        live.adapter.__class__ = type(
            "WithBos",
            (type(live.adapter),),
            {"tokenizer": type("Tokenizer", (), {"bos_token_id": 5, "padding_side": "right"})()},
        )
        ours = gradient.reference(live, "bos")
    with quiet(), torch.no_grad():
        theirs = tensorlens_tl.capture(model, torch.full_like(tokens(), 5))[1].embedding
    assert_close(ours, theirs, 1e-15)
    assert not torch.equal(ours, lens.embedding)
