"""The operator between two runs: exact on their difference, and the derivative where they agree."""

from dataclasses import replace

import pytest
import torch
from comparisons import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    GRADIENT,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    HookedTransformer,
    build_hooked,
    lens_of,
    quiet,
    tokens,
)
from oracles import gradient_of

import tensorlens_tl
from tensorlens_tl import Edge
from tensorlens_tl.maps import NormWeights
from tensorlens_tl.maps.factored import Factored
from tensorlens_tl.operator import secant
from tensorlens_tl.operator.capture import CaptureMismatchError
from tensorlens_tl.operator.secant import NormSecant, act_secant, softmax_secant
from tensorlens_tl.sublayers.activations import RATIOS, gating_ratio

SOLU = [case for case in SHAPES if "solu" in str(case)]
CASES = [case for case in SHAPES if case not in SOLU]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_shape = pytest.mark.parametrize("case", [c for c in CASES if c in PER_SHAPE], ids=str)
CAPPED = ("gemma2", "vaultgemma")


def capped(case):
    """Whether the readout is not linear in y: a soft cap, or a masked language model's head."""
    return any(name in case.name for name in CAPPED) or hasattr(case.model(), "mlm_head")


def other_tokens():
    """A prompt of equal length that differs in the middle."""
    ids = tokens()
    ids[:, 2:4] = tokens(seed=1)[:, 2:4]
    return ids


def lens_at(case, ids):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(case.model(), ids)[1]


def pair(case):
    return lens_of(case), lens_at(case, other_tokens())


# --- Single steps --------------------------------------------------------------------------------

floats = st.floats(-30, 30).map(float)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_the_softmaxs_secant_is_exact(pairs, masked):
    """ΔA by the formula, entry by entry, with an entry masked; nothing where all is masked."""
    S, other = torch.tensor(pairs, dtype=torch.float64).T
    if masked < len(pairs) - 1:
        S[masked] = other[masked] = -torch.inf
    mean, L = softmax_secant(S, other)
    A, B = S.softmax(-1), other.softmax(-1)
    for shift in (0.0, 3.0):  # scores moved all alike are none of attention's business
        change = (S + shift - other).nan_to_num(0.0)
        found = L * (change - (L * change).sum() / L.sum())
        assert ((found - (A - B)).abs() <= 1e-11).all()
    assert_close(mean, (A + B) / 2, ROUNDING)
    assert (mean >= 0).all() and (L >= 0).all()
    nothing = torch.full_like(S, -torch.inf)
    assert all((x == 0).all() for x in softmax_secant(nothing, nothing))


def test_the_softmaxs_secant_of_equal_rows_is_its_jacobian():
    S = torch.randn(3, 5, dtype=torch.float64)
    for x in softmax_secant(S, S):
        assert_close(x, S.softmax(-1), ROUNDING)


@pytest.mark.parametrize("act", [a for a in RATIOS if a != "solu"])
def test_an_activations_secant_is_exact_and_its_derivative_where_nothing_changes(act):
    for dtype, tol in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
        z = torch.cat([torch.linspace(-4.03, 4.01, 101), torch.linspace(-2e-3, 1e-3, 8)]).to(dtype)
        for change in (0.0, 1e-9, 1e-5, 1e-3, 0.3, 7.0):
            slope = act_secant(act, z, z + change)
            high, low = (gating_ratio(act, x) * x for x in (z + change, z))
            exact = (z + change) - z  # as it is rounded
            assert ((slope * exact - (high - low)).abs() <= tol * (1 + high.abs())).all()
        leaf = z.clone().requires_grad_()
        with torch.enable_grad():
            (derivative,) = torch.autograd.grad((gating_ratio(act, leaf) * leaf).sum(), leaf)
        assert_close(
            act_secant(act, z, z), derivative, GRADIENT if dtype == torch.float64 else 1e-4
        )


@pytest.mark.parametrize("center", [True, False])
def test_a_norms_secant_is_exact(center):
    x, y = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    weights = NormWeights(torch.rand(8).double(), torch.randn(8).double(), center)

    def norm(t):
        t = t - t.mean(-1, keepdim=True) if center else t
        scale = (t.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return t / scale * weights.w + weights.b, scale

    (a, s), (b, t) = norm(x), norm(y)
    found = NormSecant.of(weights, x, y, s, t)
    c = torch.randn(3, 5, 8, dtype=torch.float64)
    assert_close((found.pull_(c.clone()) * (x - y)).sum(-1), (c * (a - b)).sum(-1), ROUNDING)
    part = found.pull_(c[:, 1:3].clone(), slice(1, 3))
    assert_close(part, found.pull_(c.clone())[:, 1:3], 1e-15)


@pytest.mark.parametrize("groups", [None, 1, 2, 4])
def test_the_sum_over_nodes_is_one_product(groups):
    narrow = torch.randn(4, 2, 5, 3, dtype=torch.float64)
    W = None if groups is None else torch.randn(groups, 3, 7, dtype=torch.float64)
    found = Factored(narrow, None if W is None else lambda: W)
    assert_close(found.summed(), found.wide().sum(0), ROUNDING)


# --- Whole models --------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("by", ["token", "component"])
def test_rows_sum_to_the_difference_and_nothing_is_left_over(case, by):
    clean, corrupted = pair(case)
    found = clean.attribute(3, 4, by=by, baseline=corrupted, at="secant")
    assert found.sums_to_target and found.completeness_error <= 10 * case.tol()
    value = [lens.attribute(3, 4).target_value for lens in (clean, corrupted)]
    assert_close(found.target_value, value[0] - value[1], 1e-6)
    names = {str(source.node) for source in found.sources}
    assert ("readout change" in names) == capped(case) and "operator change" not in names
    if by == "token":  # what is the same in both prompts has no share
        same = (clean.embedding == corrupted.embedding).all(-1)
        for i, source in enumerate(found.sources):
            if source.pos is not None:
                assert (found.values[same[:, source.pos], i] == 0).all()
    back = corrupted.attribute(3, 4, by=by, baseline=clean, at="secant")  # the same secants
    assert_close(back.values, -found.values, 10 * case.tol())


@every_case
def test_edges_are_a_flow(case):
    """What comes into a branch by values, queries and keys (or an MLP) goes out by its writers."""
    clean, corrupted = pair(case)
    found = clean.attribute(3, 4, by="edge", baseline=corrupted, at="secant", qk=True)
    assert not found.sums_to_target
    edges = {s.node: found.values[:, i] for i, s in enumerate(found.sources)}
    size = sum(v.abs() for v in edges.values())
    tol = 10 * case.tol() * size

    def total(of):
        return sum((v for e, v in edges.items() if of(e)), torch.zeros_like(size))

    change = clean.attribute(3, 4, baseline=corrupted, at="secant")
    whole = change.target_value
    for i, source in enumerate(change.sources):
        whole = whole - change.values[:, i] * (source.node.name == "readout change")
    embedded = set(clean.capture.embeddings)
    assert ((total(lambda e: str(e.src) in embedded) - whole).abs() <= tol).all()
    assert ((total(lambda e: e.dest.kind == "logits") - whole).abs() <= tol).all()
    for step in clean.operator.steps:
        for branch in step.branches:
            nodes = set(branch.body.nodes())
            constants = set(branch.outside_names())
            into = total(lambda e, own=nodes: replace(e.dest, name="") in own)
            out = total(lambda e, own=nodes, b=constants: e.src in own or str(e.src) in b)
            assert ((into - out).abs() <= tol).all(), str(branch.body.nodes()[0])


@pytest.mark.parametrize("case", [c for c in PER_SHAPE if c in CASES and not capped(c)], ids=str)
def test_a_head_alone_is_a_flow_where_no_norm_follows_it(case):
    clean, corrupted = pair(case)
    found = clean.attribute(3, 4, by="edge", baseline=corrupted, at="secant", qk=True)
    edges = {s.node: found.values[:, i] for i, s in enumerate(found.sources)}
    size = sum(v.abs() for v in edges.values())
    branch = next(b for s in clean.operator.steps for b in s.branches if b.has_heads)
    assert branch.post is None
    for node in branch.body.nodes():
        into = sum(v for e, v in edges.items() if replace(e.dest, name="") == node)
        out = sum(v for e, v in edges.items() if e.src == node)
        assert ((into - out).abs() <= 10 * case.tol() * size).all(), str(node)


@every_case
def test_between_equal_runs_it_is_the_models_gradient(case):
    """Patterns, norms and activations live: autograd through the real model."""
    lens, twin = lens_of(case), lens_at(case, tokens())
    model, leaf = case.model(), None

    def enter(t, hook):
        nonlocal leaf
        leaf = t.detach().clone().requires_grad_()
        return leaf

    sweeps, seen = [gradient_of(one, 3, 4) for one in (lens, twin)], []
    head = getattr(model, "mlm_head", torch.nn.Identity())
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with quiet(), torch.enable_grad():
        logits = model.run_with_hooks(tokens(), fwd_hooks=[("blocks.0.hook_resid_pre", enter)])[
            :, -1
        ].double()
        handle.remove()
        cap = lens.capture.unembed.weights.soft_cap
        below = logits if cap is None else cap * torch.atanh(logits / cap)
        rates = (logits / below).detach()  # a readout's cap is held: the target is its ratio's
        values = (below * rates)[:, 3] - (below * rates)[:, 4]
        if seen:  # a head is held, too: the target is what it reads of y
            values = (seen[-1][:, -1] * sweeps[0].target.covector).sum(-1)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    u = torch.zeros_like(lens.embedding)
    u[:, -1] = sweeps[0].target.covector
    runs = [(one.capture, one.operator) for one in (lens, twin)]
    ours = secant.SecantOperator(*runs, u).covectors[0]
    assert_close(ours, gradient, case.within("gradient of two runs"))
    found = lens.attribute(3, 4, by="edge", baseline=twin, at="secant", qk=True)
    assert (found.values.abs() <= case.tol()).all()


@pytest.mark.offered(HookedTransformer is not None)
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_it_sees_the_function_and_not_how_its_biases_are_written(kv_heads):
    """b_V moved into b_O, and a constant added to a head's keys, leave the model what it is."""
    rows = []
    for moved in (False, True):
        with quiet(), torch.no_grad():
            model = build_hooked({"n_key_value_heads": kv_heads}, torch.float64)
            for attn in (block.attn for block in model.blocks):
                grouped = isinstance(getattr(attn, "_b_V", None), torch.nn.Parameter)
                b_V, b_K = (getattr(attn, f"{'_' * grouped}{b}") for b in ("b_V", "b_K"))
                each = attn.W_O.shape[0] // len(b_V)
                d = torch.randn(b_V.shape, generator=torch.Generator().manual_seed(0)).to(b_V)
                if moved:
                    b_V += d
                    b_K += 3 * d
                    attn.b_O -= torch.einsum("he,hed->d", d.repeat_interleave(each, 0), attn.W_O)
            a, b = (tensorlens_tl.capture(model, t)[1] for t in (tokens(), other_tokens()))
        args = {"baseline": b, "at": "secant"}
        rows.append((a.attribute(3, 4, **args), a.attribute(3, 4, by="edge", qk=True, **args)))
    for before, after in zip(*rows, strict=True):
        assert_close(after.values, before.values, ORACLE)


@every_shape
@pytest.mark.parametrize("what", ["a key", "all keys"])
def test_runs_whose_patterns_were_edited_are_refused(case, what):
    """A pattern is frozen as it was seen: what made it is not what the model would make."""

    def edit(t, hook):
        t = t.clone()
        t[:, :, -1, -1 if what == "a key" else slice(None)] = 0
        return t

    model = case.model()
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", edit)]):
        edited = tensorlens_tl.capture(model, tokens())[1]
    for baseline in (lens_at(case, other_tokens()), lens_at(case, tokens())):
        for by in ("token", "edge"):
            with pytest.raises(CaptureMismatchError, match="Pass at='clean'"):
                edited.attribute(3, 4, by=by, baseline=baseline, at="secant")


@pytest.mark.offered(HookedTransformer is not None)
@pytest.mark.parametrize("name", ["blocks.1.ln1.hook_scale", "ln_final.hook_scale"])
def test_runs_whose_norms_were_edited_are_refused(name):
    case = next(case for case in CASES if str(case) == "hooked-gpt2")
    model = case.model()
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda t, hook: t * 1.5)]):
        edited = tensorlens_tl.capture(model, tokens())[1]
    with pytest.raises(CaptureMismatchError, match=r"edited scores, patterns or norms.*Pass at="):
        edited.attribute(3, 4, baseline=lens_at(case, other_tokens()), at="secant")


def test_a_run_with_itself_is_nothing():
    lens = lens_of(CASES[0])
    found = lens.attribute(3, 4, baseline=lens, at="secant")
    assert (found.values == 0).all() and (found.target_value == 0).all()


@every_shape
def test_heads_in_parts_are_the_same(case, monkeypatch):
    clean, corrupted = pair(case)
    args = {"by": "edge", "baseline": corrupted, "at": "secant", "qk": True}
    whole = clean.attribute(3, 4, **args).values
    monkeypatch.setattr(secant, "CELLS", 1)
    assert_close(clean.attribute(3, 4, **args).values, whole, ROUNDING)
    args["qk"] = False
    plain = clean.attribute(3, 4, **args)
    kept = [
        i
        for i, s in enumerate(clean.attribute(3, 4, **(args | {"qk": True})).sources)
        if s.node.dest.name not in ("q", "k")
    ]
    assert_close(plain.values, whole[:, kept], ROUNDING)


@every_shape
def test_discover_over_prompts_of_several_lengths(case):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 50, (2, n), generator=generator) for n in (5, 7, 7, 6)]
    with quiet(), torch.no_grad():
        found = tensorlens_tl.discover(
            case.model(), [a for a, _ in ids], [b for _, b in ids], 3, 4, n_edges=20, at="secant"
        )
    parts = []
    for a, b in ids:
        clean, corrupted = (lens_at(case, p[None]) for p in (a, b))
        one = clean.discover(3, 4, n_edges=20, corrupted=corrupted, at="secant")
        parts.append(torch.tensor(list(one.scores.values()), dtype=torch.float64))
    ours = torch.tensor(list(found.scores.values()), dtype=torch.float64)
    assert_close(ours, sum(parts) / 4, case.within("two runs"))
    assert any(isinstance(edge, Edge) and edge.dest.name == "q" for edge in found.scores)


def test_a_corrupted_prompt_left_over_what_one_runs_operator_cannot_say():
    """The frozen operator of either run leaves a row; the one between them leaves none."""
    clean, corrupted = pair(CASES[0])
    for at in ("clean", "corrupted"):
        found = clean.attribute(3, 4, baseline=corrupted, at=at)
        change = [i for i, s in enumerate(found.sources) if s.node.name == "operator change"]
        assert len(change) == 1 and (found.values[:, change].abs() > 1e-4).all()


@pytest.mark.offered(bool(SOLU))
def test_solu_is_refused():
    for case in SOLU:
        clean, corrupted = pair(case)
        with pytest.raises(ValueError, match=r"needs an elementwise activation, which SoLU"):
            clean.attribute(3, 4, baseline=corrupted, at="secant")


@pytest.mark.offered(bool(SOLU))
def test_solu_without_its_norm_is_refused_too():
    with quiet(), torch.no_grad():
        model = build_hooked({"act_fn": "solu"}, torch.float64)
        clean, corrupted = (tensorlens_tl.capture(model, t)[1] for t in (tokens(), other_tokens()))
    with pytest.raises(ValueError, match=r"needs an elementwise activation, which SoLU"):
        clean.attribute(3, 4, baseline=corrupted, at="secant")


def test_refusals(tmp_path):
    case = CASES[0]
    clean, corrupted = pair(case)
    with pytest.raises(ValueError, match=r"at='secant' is between two runs.*or drop at="):
        clean.attribute(3, 4, baseline="zero", at="secant")
    with pytest.raises(ValueError, match="at='secant' needs a baseline"):
        clean.attribute(3, 4, at="secant")
    clean.save(tmp_path / "lens", weights=True)
    loaded = tensorlens_tl.load(tmp_path / "lens")
    with pytest.raises(ValueError, match=r"at='secant' needs W_Q and W_K.*Load it with model="):
        loaded.attribute(3, 4, baseline=corrupted, at="secant")
    edited = case.model()
    with quiet(), torch.no_grad():
        edited.add_hook("blocks.0.attn.hook_z", lambda t, hook: t + 1)
        try:
            _, lens = tensorlens_tl.capture(edited, tokens())
        finally:
            edited.reset_hooks()
    with pytest.raises(ValueError, match=r"needs two runs that no hook of yours edited. Pass at="):
        clean.attribute(3, 4, baseline=lens, at="secant")
