"""The operator against the model itself: logits, gradients, curvature, injections, laws 1 to 3."""

import json
import math

import pytest
import torch
from comparisons import assert_close
from models import (
    GRADIENT,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    every_convention,
    lens_of,
    quiet,
    randn_like,
    shape_conventions,
    tokens,
)
from oracles import FrozenModel

import tensorlens_tl
from tensorlens_tl import dot_test

every_case = pytest.mark.parametrize("case", SHAPES, ids=str)
every_shape = pytest.mark.parametrize("case", PER_SHAPE, ids=str)


def test_both_classes_where_the_host_has_them():
    hosts = {case.host for case in SHAPES}
    assert hosts and hosts <= {"hooked", "bridge"}


@every_convention
def test_operator_reproduces_the_logits(case, gate):
    lens = lens_of(case, gate=gate)
    with quiet(), torch.no_grad():
        logits = case.model()(tokens(), return_type="logits")
    ours = lens.readout(lens.operator @ lens.embedding + lens.operator.bias)
    assert_close(ours, logits, case.tol(), "logits")
    assert lens.completeness_error <= case.tol()
    assert lens.convention.gate == gate


@every_case
def test_float32(case):
    lens = lens_of(case, torch.float32)
    assert lens.capture.frame.dtype == torch.float32
    assert lens.completeness_error <= 2e-6


def test_the_completeness_error_is_the_largest_one():
    lens = lens_of(SHAPES[0], torch.float32)
    ours = lens.readout(lens.operator @ lens.embedding + lens.operator.bias)
    off = (ours - lens.logits).abs() / lens.logits.abs().max()
    assert off.min() < 0.1 * off.max()
    assert lens.completeness_error == pytest.approx(float(off.max()), rel=1e-6)


@every_shape
def test_float64_operator_of_a_float32_model(case):
    lens = lens_of(case, torch.float32, dtype=torch.float64)
    assert lens.operator.bias.dtype == torch.float64
    assert lens.completeness_error <= 2e-6  # the model's own rounding


@shape_conventions
def test_adjoint(case, gate):
    lens = lens_of(case, gate=gate)
    assert dot_test(lens.operator) <= ROUNDING
    assert dot_test(lens.operator.T) <= ROUNDING
    assert dot_test(lens.capture.unembed) <= ROUNDING


@every_shape
def test_linear_and_bias_apart(case):
    op = lens_of(case).operator
    x, y = randn_like(op.frame.zeros(op.in_dim), 1), randn_like(op.frame.zeros(op.in_dim), 2)
    assert_close(op @ (2 * x - 3 * y), 2 * (op @ x) - 3 * (op @ y), ROUNDING)
    assert (op @ torch.zeros_like(x)).abs().max() == 0
    many = torch.stack([x, y])[None]
    assert_close(op @ many, torch.stack([op @ x, op @ y])[None], ROUNDING, "leading axes")
    assert_close(
        op.T @ many, torch.stack([op.T @ x, op.T @ y])[None], ROUNDING, "leading axes, adjoint"
    )


@every_convention
def test_gradient_and_curvature_of_the_frozen_model(case, gate):
    lens, frozen = lens_of(case, gate=gate), FrozenModel(case.model(), tokens(), gate)
    tol = case.within("oracle")
    x = lens.embedding.clone().requires_grad_()
    y, _ = frozen(x)
    assert_close(lens.operator @ lens.embedding + lens.operator.bias, y.detach(), tol, "y")
    u = randn_like(y.detach(), 3)
    (gradient,) = torch.autograd.grad((y * u).sum(), x)
    assert_close(lens.operator.T @ u, gradient, tol, "Tᵀu")
    with torch.no_grad():
        step = randn_like(x, 4)
        base, once, twice = (frozen(x.detach() + k * step)[0] for k in (0, 1, 2))
        assert_close(once - base, lens.operator @ step, tol, "T·step")
        curvature = (twice - 2 * once + base).abs().max() / (once - base).abs().max()
    # The host may itself compute the frozen norm's output in float32.
    assert curvature <= case.within("oracle")


@every_case
def test_an_injected_vector_changes_every_later_site_as_predicted(case):
    lens, frozen = lens_of(case), FrozenModel(case.model(), tokens())
    tol = case.within("oracle")
    with torch.no_grad():
        y, base = frozen(lens.embedding)
        for site in frozen.site_names()[1:]:
            delta = randn_like(lens.embedding, 5)
            y2, states = frozen(lens.embedding, {site: delta})
            later = frozen.site_names()[frozen.site_names().index(site) :]
            for stop in later:
                change = lens.between(site, stop) @ delta
                assert_close(states[stop] - base[stop], change, tol, f"{site} → {stop}")
            assert_close(y2 - y, lens.between(site, "unembed.hook_in") @ delta, tol, f"{site} → y")


@every_shape
def test_states_and_covectors_at_every_site(case):
    """Law 3: state · covector + the constants written after it = the target, at every site."""
    lens = lens_of(case)
    op = lens.operator
    u = randn_like(op.frame.zeros(op.out_dim), 6)
    target = ((op @ lens.embedding + op.bias) * u).sum()
    covectors = op.trace_t(u)
    states = op.states()
    assert set(states) <= set(op.sites) and len(states) == len(op.steps)
    for site, state in states.items():
        after = op.between(site, "unembed.hook_in").bias
        total = (state * covectors[site]).sum() + (after * u).sum()
        assert abs(total - target) <= 10 * case.tol() * (state * covectors[site]).abs().sum()


@every_shape
def test_trace_is_between_from_the_first_site(case):
    lens = lens_of(case)
    op = lens.operator
    x = randn_like(lens.embedding, 7)
    states = op.trace(x)
    assert list(states) == list(op.sites)
    for site, state in states.items():
        assert_close(op.between(op.sites[0], site) @ x, state, ROUNDING, site)
    assert_close(states["unembed.hook_in"], op @ x, ROUNDING)


@shape_conventions
def test_constants_sum_to_the_bias(case, gate):
    op = lens_of(case, gate=gate).operator
    total = sum(op.constants().values(), torch.zeros_like(op.bias))
    assert_close(total, op.bias, ORACLE, "Σ constants")
    # and the pull tells the same of each
    u, effects = randn_like(op.bias, 8), {}
    op.apply_t(u, effects)
    assert set(effects) == set(op.constants())
    for name, constant in op.constants().items():
        off = (effects[name].sum() - (constant * u).sum()).abs()
        assert off <= ORACLE * (constant * u).abs().sum().clamp_min(1), name


@every_shape
def test_dense_block_and_scipy(case):
    lens = lens_of(case)
    op = lens.between("blocks.1.hook_resid_pre", "unembed.hook_in")
    dense = op.to_dense()
    x = randn_like(lens.embedding, 9)
    assert_close(torch.einsum("bqokd,bkd->bqo", dense, x), op @ x, ROUNDING)
    assert_close(op.block(-1, 2), dense[:, -1, :, 2, :], ROUNDING)
    assert_close(op.block(3, -7), dense[:, 3, :, 0, :], ROUNDING)
    future = torch.ones(dense.shape[1], dense.shape[3]).triu(1).bool()
    assert dense.permute(1, 3, 0, 2, 4)[future].abs().max() == 0, "causal"
    row = x[:, 2:3] @ op.block(-1, 2).mT
    only = torch.zeros_like(x)
    only[:, 2] = x[:, 2]
    assert_close(row[:, 0], (op @ only)[:, -1], ROUNDING, "rows: x @ block.mT")
    scipy_op = lens[1].between("blocks.1.hook_resid_pre", "unembed.hook_in").to_scipy()
    flat = dense[1].flatten(2).flatten(0, 1).numpy()
    assert abs(scipy_op @ x[1].flatten().numpy() - flat @ x[1].flatten().numpy()).max() <= ORACLE
    assert (
        abs(scipy_op.T @ x[1].flatten().numpy() - flat.T @ x[1].flatten().numpy()).max() <= ORACLE
    )


@pytest.mark.wrong_types
def test_blocks_by_the_brackets_of_the_paper():
    op = lens_of(SHAPES[0]).operator
    assert op.shape == op.to_dense().shape == (2, 7, 32, 7, 32)
    assert op.between(0, 0).shape == op.shape
    for at in ((3, 1), (-1, None), (slice(2), slice(1, 3)), (None, 0)):
        assert torch.equal(op[at], op.block(*at)), at
    for wrong in (2, slice(2), (1, 2, 3), "3"):
        with pytest.raises(ValueError, match=r"does not name a block, .*Write T\[i, j\]"):
            op[wrong]
    with pytest.raises(ValueError, match=r"query_pos=7 is outside prompt 0"):
        op[7, 0]
    with pytest.raises(ValueError, match="does not name a block"):  # and no endless loop
        list(op)


@pytest.mark.wrong_types
def test_unfit_arguments_are_named():
    lens = lens_of(SHAPES[0])
    with pytest.raises(ValueError, match=r"does not fit block: missing a required .*'key_pos'"):
        lens.operator.block(2)
    with pytest.raises(ValueError, match=r"no argument vs= of attribute. Did you mean versus="):
        lens.attribute(vs=3)


@pytest.mark.wrong_types
def test_parts_by_numbers_of_blocks():
    """A number is a block: the part starts at what it reads, or ends at what it leaves."""
    op = lens_of(SHAPES[0]).operator
    x = randn_like(lens_of(SHAPES[0]).embedding)
    names = {
        (0, 0): (op.sites[0], "blocks.0.hook_resid_post"),
        (1, 1): ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"),
        (0, -1): (op.sites[0], "blocks.1.hook_resid_post"),
        (1, "unembed.hook_in"): ("blocks.1.hook_resid_pre", "unembed.hook_in"),
    }
    for numbers, sites in names.items():
        assert torch.equal(op.between(*numbers) @ x, op.between(*sites) @ x), numbers
    for wrong in (2, -3, 1.0, True):
        with pytest.raises(ValueError, match=f"This model has no residual site {wrong}. Pass one"):
            op.between(0, wrong)
    with pytest.raises(ValueError, match=r"comes before"):
        op.between(1, 0)


def test_svd_results_in_other_forms():
    svd = lens_of(SHAPES[0]).operator.svd(3, query_pos=-1, key_pos=slice(0, 2))
    table = svd.to_dataframe()
    assert table["singular_value"].tolist() == svd.S.tolist() and list(table["k"]) == [0, 1, 2]
    assert math.isclose(table["share"].sum(), 1)
    assert math.isclose(table["share"][0], float(svd.S[0] ** 2 / (svd.S**2).sum()))
    data = json.loads(svd.to_json())
    assert (data["query_pos"], data["key_pos"]) == ([6], [0, 1]) and data["S"] == svd.S.tolist()
    assert torch.equal(torch.tensor(data["V"], dtype=torch.float64), svd.V)
    assert data["axes"]["U"] == ["k", "query_pos", "d_model"]


def test_plans_in_json():
    plan = lens_of(SHAPES[0]).plan("norm")
    data = json.loads(plan.to_json())
    assert data["format"] == "tensorlens_tl plan 1" and data["notes"] == list(plan.notes)
    assert data["rows"] == [{name: x for name, x in vars(plan).items() if name != "notes"}]


def test_svds_of_the_matrix_free_operator():
    from scipy.sparse.linalg import svds

    lens = lens_of(SHAPES[0])[0]
    dense = lens.operator.to_dense()[0].flatten(2).flatten(0, 1)
    found = torch.as_tensor(sorted(svds(lens.operator.to_scipy(), k=3)[1], reverse=True).copy())
    assert_close(found, torch.linalg.svdvals(dense)[:3], GRADIENT)


@every_case
def test_one_prompt_of_a_batch(case):
    """A batched capture is the single captures side by side."""
    lens = lens_of(case)
    assert len(lens) == 2
    for i, one in enumerate(lens):
        with quiet(), torch.no_grad():
            _, alone = tensorlens_tl.capture(case.model(), tokens()[i])
        assert_close(one.operator.bias, alone.operator.bias, ORACLE)
        x = randn_like(alone.embedding, 10)
        assert_close(one.operator @ x, alone.operator @ x, ORACLE)
        assert_close(one.embedding, alone.embedding, ROUNDING)
        assert one.completeness_error <= case.tol()


@pytest.mark.parametrize("case", [c for c in SHAPES if c.gated], ids=str)
def test_conventions_differ_but_agree_on_the_run(case):
    lens = lens_of(case)
    others = {gate: lens.with_convention(gate) for gate in ("gate", "up", "half")}
    x = randn_like(lens.embedding, 11)
    assert_close(others["gate"].operator @ x, lens.operator @ x, ROUNDING)
    assert (others["up"].operator @ x - lens.operator @ x).abs().max() > 1e-3
    # gate and up differ, and half is not their average beyond one block. Each reproduces the run.
    for gate, other in others.items():
        assert other.completeness_error <= case.tol(), gate
        fresh = lens_of(case, gate=gate)
        assert_close(other.operator @ x, fresh.operator @ x, ROUNDING, gate)


if len({case.host for case in SHAPES}) == 2:  # transformer_lens 3 has both classes

    @pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "neox", "qwen2", "qwen3"])
    def test_same_weights_as_either_class(name, tmp_path):
        """HookedTransformer and Bridge of one folder: same operator, same attributions."""
        from models import BRIDGE, build_hf, to_bridge

        from tensorlens_tl.hosts import load_model

        class_name, config = BRIDGE[name]
        with quiet(), torch.no_grad():
            build_hf(class_name, config, torch.float64).save_pretrained(tmp_path)
            hooked = load_model(str(tmp_path), "hooked", dtype=torch.float64)
            bridge = to_bridge(build_hf(class_name, config, torch.float64))
            ours = {
                k: tensorlens_tl.capture(m, tokens())[1] for k, m in (("h", hooked), ("b", bridge))
            }
        tol = ORACLE if name == "gpt2" else 1e-6  # norms or rotary in float32 on the Bridge
        h, b = ours["h"], ours["b"]
        x = randn_like(h.embedding, 12)
        assert_close(h.operator @ x, b.operator @ x, tol, "T·x")
        assert_close(h.operator.T @ x, b.operator.T @ x, tol, "Tᵀ·x")
        assert_close(h.operator.bias, b.operator.bias, tol, "bias")
        for by in ("token", "component"):
            one, two = (
                {s: v for s, v in zip(a.sources, a.values.T, strict=True) if v.abs().max() > 0}
                for a in (h.attribute(7, by=by), b.attribute(7, by=by))
            )
            assert one.keys() == two.keys()
            for source in one:
                assert (one[source] - two[source]).abs().max() <= 10 * tol, source
