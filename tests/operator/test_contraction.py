"""Sweeps, blocks and token matrices against the slow twin: dense T, and plain pushes and pulls."""

from functools import partial

import numpy as np
import pytest
import torch
from comparisons import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    CASES,
    GRADIENT,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHARED,
    TWO_RUNS,
    lens_of,
    quiet,
    randn_like,
    shape_conventions,
    tokens,
)
from torch.utils.flop_counter import FlopCounterMode

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.costs import machine_rates
from tensorlens_tl.costs.cost_model import HALF_BYTES, folds_below, half_bytes
from tensorlens_tl.methods.operator_matrices import orthogonal_probes
from tensorlens_tl.methods.tables import student_t
from tensorlens_tl.operator.batched_sweep import BatchedSweep
from tensorlens_tl.operator.normal_forms import dots, squares, states
from tensorlens_tl.operator.svd import SVDProblem

pytestmark = pytest.mark.algebra

SHAPES = [
    case
    for case in PER_SHAPE
    if case.name.split("-", 1)[1] in ("gpt2", "gemma2", "neox", "llama", "attn-only", "solu")
]
every_case = pytest.mark.parametrize("case", SHAPES, ids=str)
SITE = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"


def ragged(case, dtype=torch.float64):
    """Two prompts of 7 and 5 tokens, padded on the right by less than a window, and their lens."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(case.model(dtype), ids, attention_mask=mask)[1]


def dense_of(op):
    """The slow twin: pushes of unit vectors, one position after another."""
    frame = op.frame
    dense = frame.zeros(op.out_dim * frame.n_pos * op.in_dim)
    dense = dense.unflatten(2, (op.out_dim, frame.n_pos, op.in_dim))
    for key in range(frame.n_pos):
        x = frame.zeros(op.in_dim, op.in_dim)
        x[:, :, key] = torch.eye(op.in_dim).to(x)[:, None]
        dense[:, :, :, key] = op.apply(x).permute(1, 2, 3, 0)
    return dense


# --- Sweeps --------------------------------------------------------------------------------------


@shape_conventions
@pytest.mark.parametrize("folding", [None, True, False], ids=["rule", "folded", "unfolded"])
@pytest.mark.parametrize("pull", [True, False], ids=["pull", "push"])
def test_a_sweep_is_what_dense_T_says(case, gate, folding, pull):
    lens = lens_of(case, gate=gate)
    op, prompt = lens.operator, 1
    T = dense_of(op)[prompt]  # [query, out, key, in]
    at = torch.tensor([5, 0, 3, 6])
    given_ = randn_like(torch.zeros(4, 3, op.in_dim, dtype=T.dtype), 1)
    x = randn_like(torch.zeros(op.frame.n_pos, op.in_dim, dtype=T.dtype), 2)
    product = "npo,noki->npki" if pull else "npi,qoni->npqo"
    slow = torch.einsum(product, given_, T[at] if pull else T[:, :, at])
    sweep = BatchedSweep(op.map, prompt, pull, folding=folding)

    def fast(reduce):
        return sweep.carry(at, lambda i, part: given_[i][:, part], 3, reduce)

    assert_close(fast(states(op.in_dim)), slow, ROUNDING, "vectors")
    assert_close(fast(squares()), slow.square().sum(-1), ROUNDING, "squares")
    assert_close(fast(dots(x)), (slow * x).sum(-1), ROUNDING, "dots")


@every_case
def test_nothing_reaches_back_from_the_future(case):
    op = lens_of(case).operator
    at = torch.arange(op.frame.n_pos)
    vectors = randn_like(torch.zeros(len(at), 2, op.in_dim, dtype=torch.float64), 3)
    got = BatchedSweep(op.map, 0, True).carry(
        at, lambda i, p: vectors[i][:, p], 2, states(op.in_dim)
    )
    future = torch.ones(len(at), len(at)).triu(1).bool()
    assert (got.movedim(1, 2)[future] == 0).all()
    assert (got.movedim(1, 2)[~future] != 0).any()


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(SHAPES),
    many=st.integers(1, 40),
    limit=st.integers(350_000, 3_000_000),
    at=st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True),
    folding=st.sampled_from([None, True, False]),
    pull=st.booleans(),
)
def test_however_it_is_cut(case, many, limit, at, folding, pull):
    """Chunks by memory limit, numbers of probes and of positions change nothing."""
    op = lens_of(case).operator
    at = torch.tensor(at)
    vectors = randn_like(torch.zeros(len(at), many, op.in_dim, dtype=torch.float64), many)
    sweep = BatchedSweep(op.map, 0, pull, folding=folding)
    reduce = states(op.in_dim)
    shape = sweep.shape(at, many, reduce)
    try:
        chunks = shape.chunks(limit)
    except ValueError as error:
        assert "Raise memory_limit" in str(error)
        return
    assert all(shape.peak(b, part.stop - part.start) <= limit for part, b in chunks)
    whole = op.frame.zeros(op.in_dim, len(at), many)
    for k, pos in enumerate(at.tolist()):
        whole[k, :, 0, pos] = vectors[k]
    slow = (op.apply_t(whole) if pull else op.apply(whole))[:, :, 0]
    fast = sweep.carry(at, lambda i, p: vectors[i][:, p], many, reduce, limit)
    assert_close(fast, slow, 1e-11, f"{len(chunks)} chunks")


def test_work_is_cut_where_memory_is_short():
    op = lens_of(SHAPES[0]).operator
    at = torch.arange(7)
    shape = BatchedSweep(op.map, 0, True).shape(at, 32, squares())
    assert len(shape.chunks(10**9)) == 1
    assert len(shape.chunks(shape.peak(shape.blocks(32), 32) - 1)) > 1


@pytest.mark.offered("hooked-gpt2" in CASES)
def test_a_pattern_that_looks_ahead():
    """A user's own pattern need not be causal: then nothing is truncated."""
    case = CASES["hooked-gpt2"]

    def uniform(pattern, hook):
        return torch.full_like(pattern, 1 / pattern.shape[-1])

    model = case.model()
    with quiet(), torch.no_grad(), model.hooks([("blocks.0.attn.hook_pattern", uniform)]):
        lens = tensorlens_tl.capture(model, tokens())[1]
    assert_close(lens.operator.to_dense(), dense_of(lens.operator), ROUNDING)
    matrix = lens.token_matrix("in_out", "prediction")
    assert matrix.completeness_error <= ROUNDING
    assert matrix.values[0].triu(1).abs().max() > 0


def test_the_rule_for_folding():
    """16 D² flops a row against 8 D³ once and 2 D² a row: from 4 D / 7 rows, and a twentieth."""
    rows = [1000, 700, 468, 467, 460, 400]
    assert folds_below(4 * 768, 768, rows, None) == sum(r >= 1.05 * 4 / 7 * 768 for r in rows)
    assert folds_below(4 * 768, 768, rows, True) == 6
    assert folds_below(4 * 768, 768, rows, False) == 0
    assert folds_below(300, 768, rows, None) == 0  # narrower than half: a map is never cheaper


# --- Token matrices ------------------------------------------------------------------------------


@every_case
def test_the_four_matrices(case):
    lens = ragged(case)
    dense = dense_of(lens.operator)
    x, y = lens.embedding, lens.capture.unembed.final
    for prompt, (start, stop) in enumerate(lens.capture.frame.spans):
        here = slice(start, stop)
        T, X, u = dense[prompt, here, :, here], x[prompt, here], y[prompt, here]
        u = u / u.norm(dim=-1, keepdim=True)
        slow = {
            "norm": T.square().sum((1, 3)).sqrt(),
            "in": torch.einsum("qoki,ki->qko", T, X).norm(dim=-1),
            "out": torch.einsum("qoki,qo->qki", T, u).norm(dim=-1),
            "in_out": torch.einsum("qoki,qo,ki->qk", T, u, X),
        }
        for kind, expected in slow.items():
            matrix = lens.token_matrix(kind)
            assert_close(matrix[prompt], expected, ORACLE, kind)
            assert matrix.values[1, 5:].abs().max() == 0 == matrix.values[1, :, 5:].abs().max()


@every_case
@pytest.mark.parametrize("target", ["prediction", 7, None], ids=str)
def test_rows_and_constants_sum_to_the_target(case, target):
    lens = ragged(case)
    matrix = lens.token_matrix("in_out", target)
    assert matrix.completeness_error <= 10 * case.tol()
    real = lens.capture.frame.real
    logits = lens.logits[real]
    value = matrix.target_value[real]
    if target is None:
        assert_close(value, lens.capture.unembed.final[real].norm(dim=-1), ROUNDING)
    else:
        assert_close(value, logits.amax(-1) if target == "prediction" else logits[:, 7], ROUNDING)


@every_case
def test_a_row_is_the_attribution_by_token(case):
    lens = lens_of(case)
    row = lens.token_matrix("in_out", 7).values[:, -1]
    result = lens.attribute(7)
    tokens_ = [i for i, s in enumerate(result.sources) if s.node.kind in ("embed", "pos_embed")]
    by_token = result.values[:, tokens_].unflatten(1, (-1, lens.capture.frame.n_pos)).sum(1)
    assert_close(row, by_token, ORACLE)


@every_case
def test_a_part_of_the_layers(case):
    lens = lens_of(case)
    part = lens.between(*SITE)
    dense = dense_of(part)
    got = lens.token_matrix("norm", layers=SITE)
    assert got.layers == SITE
    assert_close(got.values, dense.square().sum((2, 4)).sqrt(), ORACLE)
    sums = lens.token_matrix("in_out", layers=SITE)
    assert sums.completeness_error <= 10 * case.tol()
    identity = lens.token_matrix("norm", layers=(SITE[0], SITE[0])).values
    expected = torch.eye(7, dtype=torch.float64) * lens.embedding.shape[-1] ** 0.5
    assert_close(identity[0], expected, ROUNDING, "the identity")


def test_half_precision_is_named():
    case = SHAPES[0]
    lens = lens_of(case, torch.float32)
    exact = lens.token_matrix("norm").values
    low = lens.token_matrix("norm", precision="bfloat16").values
    assert 0 < (low - exact).abs().max() / exact.max() <= 2e-2


# --- Randomized norms ----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [32, 48, 7, 64, 768])
def test_probes_are_orthogonal(d):
    g = orthogonal_probes(3, min(d, 20), d, torch.Generator().manual_seed(0))
    eye = torch.eye(g.shape[1], dtype=torch.float64).expand(3, -1, -1)
    assert_close(g @ g.mT, eye, ROUNDING)


def test_as_many_probes_as_dimensions_are_exact():
    lens = lens_of(SHAPES[0])
    exact = lens.token_matrix("norm").values
    full = lens.token_matrix("norm", probes=lens.embedding.shape[-1])
    assert_close(full.values, exact, ROUNDING)
    assert full.standard_error.max() <= 1e-6 * exact.max()


def test_probes_are_reproducible():
    lens = lens_of(SHAPES[0])
    one, same, other = (lens.token_matrix("norm", probes=4, seed=s).values for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.wrong_types
def test_probes_of_numpy():
    lens = lens_of(SHAPES[0])
    ours, theirs = (lens.token_matrix("norm", probes=k(4)).values for k in (int, np.int64))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("k", [4, 16])
def test_intervals_cover_what_they_say(k):
    """At a nominal .95, at least .9 of 28 entries × 40 seeds lie inside."""
    lens = lens_of(SHAPES[0])
    exact = lens.token_matrix("norm").values[0]
    past = torch.ones_like(exact).tril().bool()
    inside = []
    for seed in range(40):
        low, high = lens.token_matrix("norm", probes=k, seed=seed).interval()
        inside.append(((low[0] <= exact) & (exact <= high[0]))[past])
    cover = float(torch.stack(inside).double().mean())
    assert 0.9 <= cover <= 0.999


def test_student_t():
    # Tables: t(.975) of 1, 2, 3, 5, 15 and 63 degrees of freedom.
    for freedom, quantile in (
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (5, 2.571),
        (15, 2.131),
        (63, 1.998),
    ):
        assert student_t(0.975, freedom) == pytest.approx(quantile, rel=5e-3)


# --- Blocks, norms, singular vectors -------------------------------------------------------------


@every_case
def test_blocks(case):
    lens = lens_of(case)
    for op in (lens.operator, lens.between(*SITE)):
        dense = dense_of(op)
        assert_close(op.block(-1, 2), dense[:, -1, :, 2], ROUNDING)
        assert_close(op.block(-1, None), dense[:, -1], ROUNDING, "a row")
        assert_close(op.block(None, 0), dense[:, :, :, 0], ROUNDING, "a column")
        assert_close(op.block(slice(2, 6, 2), slice(-3, None)), dense[:, 2:6:2, :, 4:], ROUNDING)
        assert_close(op.to_dense(), dense, ROUNDING)
        assert_close(op.frobenius_norm(), dense.flatten(1).norm(dim=1), ROUNDING)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_singular_vectors(case):
    pytest.importorskip("scipy", reason="an extra")
    lens = lens_of(case)
    op, D = lens.operator, lens.embedding.shape[-1]
    dense = dense_of(op)[1]
    for query, key in ((None, None), (slice(3, None), slice(1, 4)), (-1, 2), (-1, None)):
        q = slice(6, 7) if query == -1 else query or slice(None)
        k = slice(2, 3) if key == 2 else key or slice(None)
        matrix = dense[q][:, :, k].flatten(2).flatten(0, 1)
        found = op.svd(4, query, key, prompt=1)
        expected = torch.linalg.svdvals(matrix)[:4]
        assert_close(found.S, expected, TWO_RUNS)
        U, V = found.U.flatten(1), found.V.flatten(1)
        assert_close(matrix @ V.T, U.T * found.S, GRADIENT)
        assert_close(U @ U.T, torch.eye(4, dtype=U.dtype), TWO_RUNS)
        assert found.U.shape[2] == found.V.shape[2] == D
    spectral = torch.linalg.svdvals(dense.flatten(2).flatten(0, 1))[0]
    assert_close(op.spectral_norm()[1], spectral, TWO_RUNS)


def test_singular_triples_of_every_number_and_of_nothing():
    pytest.importorskip("scipy", reason="an extra")
    lens = lens_of(SHAPES[0])
    op, dense = lens.operator, dense_of(lens.operator)[0]
    row = torch.linalg.svdvals(dense[-1].flatten(1))
    for k in (1, 15, 16, 24, 31, 32):  # 16 and more leave ARPACK no room
        assert_close(op.svd(k, -1).S, row[:k], TWO_RUNS)
    for query, key in (
        (slice(0, 2), slice(3, None)),
        (0, slice(1, None)),
        (slice(0, 2), 6),
        (1, 4),
    ):
        found = op.svd(3, query, key)
        U, V = found.U.flatten(1), found.V.flatten(1)
        assert (found.S == 0).all()
        assert_close(U @ U.T, torch.eye(3, dtype=U.dtype), ROUNDING)
        assert_close(V @ V.T, torch.eye(3, dtype=V.dtype), ROUNDING)


# --- Plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["norm", "in", "out", "in_out"])
def test_a_plan_costs_nothing_and_says_what_will_be(kind):
    lens = lens_of(SHAPES[0])
    plan = lens.plan(kind)
    assert plan.flops > 0
    assert plan.seconds > 0
    assert 0 < plan.peak_bytes <= plan.memory_limit
    assert kind in repr(plan)
    limit = max(plan.peak_bytes // 2, 350_000)
    small = lens.plan(kind, memory_limit=limit)
    assert small.peak_bytes <= limit
    assert small.chunks > plan.chunks or limit >= plan.peak_bytes
    cut = lens.token_matrix(kind, memory_limit=limit)
    assert_close(cut.values, lens.token_matrix(kind).values, ROUNDING)


def test_a_plan_counts_the_kernels_that_bfloat16_is_compiled_to():
    lens = lens_of(SHAPES[0])
    plain, low = (lens.plan("norm", precision=p) for p in (None, "bfloat16"))
    assert low.peak_bytes - HALF_BYTES < plain.peak_bytes < low.peak_bytes
    assert half_bytes(torch.bfloat16, torch.device("meta")) == 0
    with pytest.raises(ValueError, match=r"memory_limit is .* Raise memory_limit"):
        lens.token_matrix("norm", precision="bfloat16", memory_limit=HALF_BYTES)


@pytest.mark.parametrize("what", ["block", "to_dense", "frobenius_norm"])
def test_a_plan_of_the_operators_own_calls_is_kept(what):
    lens = lens_of(SHAPES[0])
    where = {"query_pos": -1, "key_pos": slice(None)} if what == "block" else {}
    plan = lens.plan(what, **where)
    assert plan.flops > 0
    assert plan.seconds > 0
    assert what in repr(plan)
    limit = max(plan.peak_bytes * 3 // 4, 100_000)
    call = getattr(lens.operator, what)
    assert_close(call(**where), dense_call(lens, what), ROUNDING)
    if what == "block":
        assert lens.plan(what, **where, memory_limit=limit).peak_bytes <= limit
        assert_close(call(**where, memory_limit=limit), call(**where), ROUNDING)


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("svd", {"k": 3}),
        ("svd", {"k": 3, "query_pos": -1, "prompt": 1}),
        ("svd", {"query_pos": -1, "key_pos": 2}),
        ("spectral_norm", {}),
    ],
)
def test_singular_values_keep_to_their_plan(what, where):
    pytest.importorskip("scipy", reason="an extra")
    lens = lens_of(SHAPES[0])
    call, plan = getattr(lens.operator, what), lens.plan(what, **where)
    assert plan.flops > 0 and plan.seconds > 0 and what in repr(plan)
    assert ("pushes and pulls" in repr(plan)) == ("key_pos" not in where)
    call(**where, memory_limit=plan.peak_bytes)
    tight = lens.plan(what, **where, memory_limit=plan.peak_bytes)
    assert (
        (tight.flops, tight.peak_bytes)
        == (plan.flops, plan.peak_bytes)
        == (plan.flops, tight.memory_limit)
    )
    for ask in (call, partial(lens.plan, what)):
        with pytest.raises(ValueError, match=r"memory_limit is .* Raise memory_limit"):
            ask(**where, memory_limit=1000)


def test_flops_of_a_push_and_pull_are_the_formula():
    """4 · (2 D² for W_V and W_O + 2 m D), 4 · H e L for the pattern, every position and layer."""
    case = CASES.get("hooked-gpt2") or SHAPES[0]
    lens = lens_of(case)
    op, problem = lens.operator, SVDProblem(lens.operator, 0, [*range(7)], [*range(7)], 1)
    D, L, B, m = op.in_dim, 7, 2, lens.capture.blocks[0].mlp.pre.shape[-1]
    steps = round(20 + 0.5 * 19 + 0.5)
    one = 2 * B * L * (4 * (2 * D * D + 2 * m * D) + 4 * L * D)
    assert problem.plan("svd", 2**30, op.map).flops == steps * one


def dense_call(lens, what):
    dense = dense_of(lens.operator)
    if what == "frobenius_norm":
        return dense.flatten(1).norm(dim=1)
    # The last token of the block is each prompt's own last one: here both have seven
    return dense[:, -1] if what == "block" else dense


def test_flops_of_a_pull_are_the_formula():
    """4 D² + 16 D² a carried row and layer, but for the top layer's and the bottom's shortcuts."""
    case = CASES.get("hooked-gpt2") or SHAPES[0]
    lens = lens_of(case)
    op = lens.operator
    D, L, m = op.in_dim, 7, lens.capture.blocks[0].mlp.pre.shape[-1]
    shape = BatchedSweep(op.map, 0, True, folding=False).shape(
        torch.arange(L), 1, dots(lens.embedding[0])
    )
    ((_, blocks),) = shape.chunks(10**9)
    cost = shape.cost(blocks, 1)
    rows = L * L  # one block of seven destinations, seven positions each
    top = L * (4 * m * D + 4 * D * D)
    bottom = rows * (4 * m * D + 2 * D * D)  # its W_V is not applied
    assert cost.product == top + bottom


def test_rates_are_measured_anew_after_a_minute(monkeypatch):
    """A machine that is busy now may be idle later: the first timing is not kept for ever."""
    asked = machine_rates.ProductShape(8, 32, 2, 4, 5, 8, 64), torch.float32, torch.device("cpu")
    now = 1000 * machine_rates.KEPT_SECONDS
    monkeypatch.setattr(machine_rates.time, "monotonic", lambda: now)
    first = machine_rates.rates(*asked)
    now += machine_rates.KEPT_SECONDS / 2
    assert machine_rates.rates(*asked) is first
    now += machine_rates.KEPT_SECONDS
    assert machine_rates.rates(*asked) is not first


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "rollout?"}, "(one of|Use) .*norm, in, out, in_out"),
        ({"name": "norm", "probes": 1}, "probes must be an integer from 2 to d_model = 32"),
        ({"name": "norm", "probes": 33}, "probes must be an integer from 2 to d_model = 32"),
        ({"name": "out", "probes": 4}, "probes= estimates 'norm' only"),
        ({"name": "in", "target": 3}, "takes no target"),
        ({"name": "norm", "precision": "int8"}, "precision must be 'bfloat16' or None"),
        ({"name": "norm", "layers": "blocks.1.hook_resid_pre"}, "layers must be a pair"),
        ({"name": "norm", "layers": SITE[::-1]}, "comes before .*Swap"),
        ({"name": "norm", "layers": ("blocks.9.hook_resid_pre", SITE[1])}, "no residual site"),
        ({"name": "in_out", "target": 3, "layers": SITE}, "A target in logits needs layers up to"),
        ({"name": "norm", "memory_limit": 1000}, "the smallest chunk .* Raise memory_limit"),
        ({"name": "norm", "memory_limit": -1}, "is not a positive whole number of bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_matrices_are_refused(arguments, message):
    lens = lens_of(SHAPES[0])
    with pytest.raises(ValueError, match=message):
        lens.token_matrix(**arguments)
    with pytest.raises(ValueError, match=message):
        lens.plan(arguments.pop("name"), **arguments)


@pytest.mark.wrong_types
def test_bad_blocks_are_refused():
    case = SHAPES[0]
    op = lens_of(case).operator
    for query, message in (
        (7, "query_pos=7 is outside prompt 0, .* Pass a position from -7 to 6"),
        (slice(5, 2), "selects none of the 7 tokens"),
        (slice(9, None), "selects none of the 7 tokens"),
        (1.5, r"query_pos=.* is not a position\. Pass an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            op.block(query, 0)
    with pytest.raises(ValueError, match="different numbers of positions in different prompts"):
        ragged(case).operator.block(-1, None)
    with pytest.raises(ValueError, match="different numbers of positions in different prompts"):
        ragged(case).plan("block", query_pos=-1, key_pos=None)
    with pytest.raises(ValueError, match=r"k=0 does not fit .* Pass an integer from 1 to 32"):
        op.svd(0, -1, 2)
    assert torch.equal(
        op.svd(np.int64(2), np.int64(-1)).S, op.svd(2, 6).S
    )  # NumPy's integers serve
    with pytest.raises(
        ValueError, match=r"prompt=2 is not in this batch. Pass an index from 0 to 1"
    ):
        op.svd(1, prompt=2)
    with pytest.raises(
        ValueError,
        match=r"There is no argument k= of block. Use query_pos, key_pos, memory",
    ):
        lens_of(case).plan("block", query_pos=-1, key_pos=0, k=3)
    with pytest.raises(
        ValueError, match=r"does not fit block: missing a required argument: 'key_pos'"
    ):
        lens_of(case).plan("block", query_pos=-1)
    for wrong, message in (
        ({"seed": -1}, "seed=-1 is not an integer ≥ 0"),
        ({"k": True}, "k=True does not fit .* Pass an integer"),
        ({"prompt": False}, "prompt=False is not in this batch"),
        ({"query_pos": slice("a", "b")}, r"query_pos=.* is not a position\. Pass an integer"),
        ({"key_pos": slice(None, None, 0)}, r"key_pos=.* is not a position\. Pass an integer"),
        ({"memory_limit": True}, "is not a positive whole number of bytes"),
    ):
        for ask in (op.svd, partial(op.plan, "svd")):
            with pytest.raises(ValueError, match=message):
                ask(**wrong)
    for ask in (op.to_dense, partial(op.plan, "to_dense")):
        for limit, message in ((1e9, "positive whole number"), (1000, "The dense form needs")):
            with pytest.raises(ValueError, match=message):
                ask(memory_limit=limit)
    with pytest.raises(ValueError, match="Raise memory_limit"):
        op.block(None, None, memory_limit=1000)
    with pytest.raises(ValueError, match="This matrix is exact"):
        lens_of(case).token_matrix("norm").interval()
    with pytest.raises(ValueError, match="level=95 is not between 0 and 1"):
        lens_of(case).token_matrix("norm", probes=4).interval(95)
    with pytest.raises(ValueError, match="Unembed is not a chain of residual steps"):
        BatchedSweep(lens_of(case).capture.unembed, 0, True).shape(torch.arange(2), 1, squares())


# --- A trained model -----------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data folder")
def test_long_prompts_of_a_trained_model():
    """in_out at half the context, norm at an eighth of it, against plain pulls of some rows."""
    from tensorlens_tl.hosts import load_model

    with quiet():
        model = load_model(str(SHARED / "stories260K"))
    ids = torch.randint(3, model.cfg.d_vocab, (1, 256), generator=torch.Generator().manual_seed(0))
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(model, ids)[1]
        short = tensorlens_tl.capture(model, ids[:, :64])[1]
    op, D = short.operator, short.embedding.shape[-1]
    in_out, norm = lens.token_matrix("in_out", "prediction"), short.token_matrix("norm")
    assert in_out.completeness_error <= 2e-5
    for query in (3, 100, 255):
        one = lens.attribute(int(lens.logits[0, query].argmax()), pos=query)
        embed = [i for i, s in enumerate(one.sources) if s.node.kind == "embed"]
        assert_close(in_out.values[0, query], one.values[0, embed], 2e-4, f"in_out row {query}")
    for query in (3, 30, 63):
        u = op.frame.zeros(D, D)
        u[:, 0, query] = torch.eye(D)
        slow = op.apply_t(u)[:, 0].square().sum((0, 2)).sqrt()
        assert_close(norm.values[0, query], slow, 1e-4, f"norm row {query}")


def test_a_block_from_a_late_source_carries_what_is_behind_that_source_alone():
    _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
    T, spent = lens.between(1, "unembed.hook_in"), {}
    for key in (0, -1):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            T.block(-1, key)
        spent[key] = counted.get_total_flops()
    assert spent[-1] < spent[0] / 3
    assert_close(T.block(-1, -1), T.block(-1, None)[:, :, -1], 1e-5)
