"""Recomputed patterns equal stored ones, for every family and mask, with no heads × L² array."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comparisons import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    GRADIENT,
    N_CTX,
    NATIVE,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    HookedTransformer,
    build_hooked,
    build_native,
    lens_of,
    quiet,
    randn_like,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode

import tensorlens_tl
from tensorlens_tl import dot_test
from tensorlens_tl.hosts.entry import adapt
from tensorlens_tl.maps.batch_layout import Frame
from tensorlens_tl.maps.primitives import Mix
from tensorlens_tl.methods import baselines
from tensorlens_tl.operator.capture import CaptureMismatchError
from tensorlens_tl.readers.attention_reading import alibi_slopes
from tensorlens_tl.refusals.errors import NotRecomputableError
from tensorlens_tl.sublayers import attention_kernel as score_blocks
from tensorlens_tl.sublayers.attention_kernel import Scores
from tensorlens_tl.sublayers.recomputed_pattern import RecomputedMix

every_case = pytest.mark.parametrize("case", SHAPES, ids=str)
every_shape = pytest.mark.parametrize("case", PER_SHAPE, ids=str)
HOSTS = [case for case in SHAPES if case.name in ("hooked-gpt2", "bridge-gpt2", "native-gpt2")]
every_host = pytest.mark.parametrize("case", HOSTS, ids=str)
needs_hooked = pytest.mark.offered(HookedTransformer is not None)


def capture(model, ids, **kwargs):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(model, ids, **kwargs)[1]


def both(model, ids, **kwargs):
    return capture(model, ids, **kwargs), capture(model, ids, pattern="recomputed", **kwargs)


# --- Every family ---------------------------------------------------------------------------------


def assert_same_answers(lens, stored, tol):
    assert isinstance(lens.capture.blocks[0].attn.mix, RecomputedMix)
    assert isinstance(stored.capture.blocks[0].attn.mix, Mix)
    real = stored.capture.frame.real
    x = randn_like(stored.embedding) * real[..., None]
    ours, theirs = lens.operator, stored.operator
    assert_close((ours @ x)[real], (theirs @ x)[real], tol, "push")
    assert_close((ours.T @ x)[real], (theirs.T @ x)[real], tol, "pull")
    assert_close(ours.bias[real], theirs.bias[real], tol, "bias")
    assert lens.completeness_error <= tol
    for by in ("token", "component"):
        for pos in (-1, 0):
            a, b = (x.attribute(3, 5, pos=pos, by=by) for x in (lens, stored))
            assert_close(a.values, b.values, tol, by)
            if tol < GRADIENT:  # else the host's logits have the rounding of its float32 softmax
                assert a.completeness_error <= tol
    for mine, other in zip(lens.capture.blocks, stored.capture.blocks, strict=True):
        for i, (start, stop) in enumerate(stored.capture.frame.spans):
            span = (i, slice(None), slice(start, stop), slice(start, stop))
            assert_close(mine.attn.pattern[span], other.attn.pattern[span], tol, "pattern")
        for node in mine.attn.nodes():
            a, b = (block.attn.part(node) @ x for block in (mine, other))
            assert_close(a[real], b[real], tol, str(node))


@every_case
def test_recomputed_equals_stored(case):
    lens = lens_of(case, pattern="recomputed")
    assert_same_answers(lens, lens_of(case), case.tol())
    assert dot_test(lens.operator) <= ROUNDING


@every_case
def test_one_token_and_the_whole_context(case):
    for seq in (1, N_CTX):
        assert_same_answers(*reversed(both(case.model(), tokens(2, seq))), case.tol())


@every_shape
def test_whatever_asks_for_the_pattern(case):
    """Every split, edges, loadings, paths, sweeps, blocks, baselines: two ragged prompts."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    stored, lens = both(case.model(), tokens(), attention_mask=mask)
    tol = case.tol()

    def same(ask, what):
        assert_close(ask(lens), ask(stored), tol, what)

    for by in ("head", "edge", "order", "layer"):
        same(lambda lens, by=by: lens.attribute(3, by=by).values, by)
    for by in ("component", "head"):
        same(lambda lens, by=by: lens.attribute(3, by=by, effect="total").values, f"total {by}")
    for kind in ("norm", "in", "out", "in_out"):
        same(lambda lens, kind=kind: lens.token_matrix(kind).values, kind)
    part = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"
    same(lambda lens: lens.token_matrix("out", layers=part).values, "one layer")
    same(lambda lens: lens.operator.block(-1, slice(5)), "block")
    same(lambda lens: lens[1].operator.to_dense(), "dense")
    same(lambda lens: lens[1].loadings(2, 3).values, "loadings")
    for name in ("rollout", "alti"):
        same(lambda lens, name=name: baselines.baseline_matrix(name, lens[0].capture), name)
    if case.name in ("hooked-gpt2", "hooked-gemma2", "bridge-llama"):
        same(
            lambda lens: torch.tensor([p.contribution for p in lens[0].paths(3, k=4)]).double(),
            "paths",
        )


SIDES = [(case, side) for case in SHAPES for side in ("left", "right")]


@pytest.mark.parametrize(
    ("case", "side"),
    [(c, side) for c, side in SIDES if side == "left" or c in PER_SHAPE],
    ids=str,
)
def test_padding(case, side):
    # In float64 the hosts with a float32 softmax give NaN themselves.
    dtype = torch.float32 if case.float32_norms else torch.float64
    tol, mask = case.tol(dtype), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    given = {"attention_mask": mask.flip(-1) if side == "left" else mask, "dtype": torch.float64}
    stored = capture(case.model(dtype), tokens(), **given)
    lens = capture(case.model(dtype), tokens(), **given, pattern="recomputed")
    assert_same_answers(lens, stored, tol)
    for one, other in zip(lens, stored, strict=True):
        assert_same_answers(one, other, tol)


@every_shape
def test_saved_and_loaded(case, tmp_path):
    lens = lens_of(case, pattern="recomputed")
    lens.save(tmp_path / "lens.safetensors")
    loaded = tensorlens_tl.load(tmp_path / "lens.safetensors", model=case.model())
    for ours, theirs in zip(loaded.capture.blocks, lens.capture.blocks, strict=True):
        assert ours.attn.mix.scores == theirs.attn.mix.scores
        assert torch.equal(ours.attn.mix.queries, theirs.attn.mix.queries)
        assert torch.equal(ours.attn.mix.keys, theirs.attn.mix.keys)
    x = randn_like(lens.embedding)
    assert torch.equal(loaded.operator.T @ x, lens.operator.T @ x)


@every_host
def test_low_precision_models(case):
    """The pattern is recomputed in float32 from float16 queries: the run's own had its rounding."""
    stored, lens = both(case.model(torch.float16), tokens())
    x = randn_like(stored.embedding)
    assert_close(lens.operator @ x, stored.operator @ x, 1e-2)
    assert lens.capture.check <= 1e-2


# --- Every mask, block size and number of probes --------------------------------------------------


def slow_pattern(q, k, scores, spans, sinks=None):
    """Softmax over explicit scores [batch, head, query, key], padding rows zero."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * scores.scale
    if scores.soft_cap is not None:
        s = scores.soft_cap * torch.tanh(s / scores.soft_cap)
    if scores.slopes is not None:
        pos = torch.arange(q.shape[1])
        s = s - s.new_tensor(scores.slopes)[:, None, None] * (pos[:, None] - pos)
    out = torch.zeros_like(s)
    for b, (start, stop) in enumerate(spans):
        for i in range(start, stop):
            first = start if scores.window is None else max(start, i - scores.window + 1)
            seen = slice(first, i + 1 if scores.causal else stop)
            row = s[b, :, i, seen]
            row = row if sinks is None else torch.cat((row, sinks[:, None]), -1)
            out[b, :, i, seen] = row.softmax(-1)[:, : s[b, :, i, seen].shape[-1]]
    return out


@st.composite
def attentions(draw):
    length = draw(st.integers(1, 23))
    kv_heads, repeat = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    starts = [draw(st.integers(0, length - 1)) for _ in range(draw(st.integers(1, 3)))]
    spans = tuple((start, draw(st.integers(start + 1, length))) for start in starts)
    causal = draw(st.booleans())
    scores = Scores(
        scale=draw(st.sampled_from([0.1, 1.0, 3.0])),
        causal=causal,
        soft_cap=draw(st.sampled_from([None, 0.5, 20.0])),
        window=draw(st.sampled_from([None, 1, 2, 5, 40])) if causal else None,
        slopes=alibi_slopes(kv_heads * repeat) if causal and draw(st.booleans()) else None,
    )
    blocks = draw(st.sampled_from([1, 2, 5, 64])), draw(st.sampled_from([1, 3, 64]))
    return length, kv_heads, repeat, spans, scores, (*blocks, draw(st.sampled_from([1, 200])))


@settings(max_examples=60, deadline=None)
@given(attentions(), st.sampled_from([(), (1,), (2, 3)]), st.booleans(), st.integers(0, 3))
def test_every_mask_block_and_number_of_probes(attention, many, with_sinks, seed):
    length, kv_heads, repeat, spans, scores, (rows, columns, cells) = attention
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    frame = Frame(spans, length, torch.float64, torch.device("cpu"))
    q, k = randn(len(spans), length, kv_heads * repeat, 3), randn(len(spans), length, kv_heads, 3)
    sinks = randn(kv_heads * repeat) if with_sinks else None
    A = slow_pattern(q, k, scores, spans, sinks)
    slow = Mix(frame, A, kv_heads, 2)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("ROWS", rows), ("COLUMNS", columns), ("CELLS", cells)):
            patch.setattr(score_blocks, name, size)
        mix = RecomputedMix.of(frame, q, k, scores, 2, sinks)
        x = randn(*many, len(spans), length, kv_heads * 2)
        y = randn(*many, len(spans), length, kv_heads * repeat * 2)
        values = randn(len(spans), length, kv_heads * repeat)
        pairs = {
            "push": (mix @ x, slow @ x),
            "pull": (mix.T @ y, slow.T @ y),
            "by head": (mix.by_head_t(y), slow.by_head_t(y)),
            "sum of heads": (mix.sum_heads(values), slow.sum_heads(values)),
            "pattern": (mix.pattern, A),
            "bias": (mix.bias + 1, slow.bias + 1),
        }
        for h in range(kv_heads * repeat):
            v = x[..., :2]
            pairs[f"head {h}"] = (mix.head(h) @ v + 1, slow.head(h) @ v + 1)
        query = torch.tensor([stop - 1 for _, stop in spans])
        pairs["rows"] = (mix.rows(query), slow.rows(query))
        assert dot_test(mix) <= 1e-13
    for name, (ours, theirs) in pairs.items():
        assert_close(ours, theirs, ORACLE, name)
    # What a mask hides is exactly zero, not small.
    assert bool((mix.pattern[A == 0] == 0).all())


@settings(max_examples=50, deadline=None)
@given(attentions(), st.booleans(), st.integers(0, 3))
def test_every_tile_of_a_sweep(attention, transposed, seed):
    """In causal coordinates: keys and queries of a pull, reversed queries and keys of a push."""
    length, kv_heads, repeat, spans, scores, _ = attention
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    frame = Frame(spans, length, torch.float64, torch.device("cpu"))
    q, k = randn(len(spans), length, kv_heads * repeat, 3), randn(len(spans), length, kv_heads, 3)
    mix = RecomputedMix.of(frame, q, k, scores, 2)
    (start, stop), prompt = spans[-1], len(spans) - 1
    n = stop - start
    A = slow_pattern(q, k, scores, spans)[prompt, :, start:stop, start:stop]
    a, b = randn(n), randn(n)
    A = (A * a[:, None] * b).unflatten(0, (kv_heads, repeat))
    A = A.mT if transposed else A.flip(-2, -1)
    tiles = mix.tiles(prompt).times(query_gain=a).times(key_gain=b).flipped(transposed)
    first, last = sorted(torch.randint(0, n + 1, (2,), generator=generator).tolist())
    some = torch.randint(0, n, (3,), generator=generator)
    every = slice(None)
    for to, source in ((every, every), (slice(first, last), slice(first, n)), (slice(last), some)):
        found = tiles[to, source]
        if found.numel():
            assert_close(found + 1, A[:, :, to, source] + 1, ORACLE)
    assert tiles.dtype is None and replace(tiles, dtype=torch.bfloat16)[every, every].dtype == (
        torch.bfloat16
    )


def test_extreme_scores_stay_finite():
    """Scores of ±1000: masked ones would overflow the exponential, small ones underflow it."""
    frame = Frame(((0, 40),), 40, torch.float32, torch.device("cpu"))
    q, k = (torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    scores = Scores(150.0)
    A = slow_pattern(q.double(), k.double(), scores, frame.spans)
    assert_close(RecomputedMix.of(frame, q, k, scores, 8).pattern.double(), A, 1e-3)


def test_gradients_go_through():
    frame = Frame(((0, 5),), 5, torch.float64, torch.device("cpu"))
    q, k, x = (torch.randn(1, 5, n, 4, dtype=torch.float64) for n in (4, 2, 2))
    mix = RecomputedMix.of(frame, q, k, Scores(0.5), 4)
    x = x.flatten(2).requires_grad_()
    assert torch.autograd.gradcheck(mix.apply, (x,))
    assert torch.autograd.gradgradcheck(lambda v: mix.apply(v) ** 2, (x,))
    assert torch.autograd.gradcheck(mix.apply_t, (torch.cat((x, x), -1),))


# --- What is never allocated ----------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes or writes to."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        sizes = [t.untyped_storage().nbytes() // t.itemsize for t in made if torch.is_tensor(t)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "scores"),
    [(4, 4, Scores(0.3)), (4, 1, Scores(0.3, True, 5.0, 100))],
    ids=str,
)
def test_no_array_of_heads_by_length_squared(heads, kv_heads, scores):
    length, d = 2048, 4
    frame = Frame(((0, length),), length, torch.float32, torch.device("cpu"))
    q, k = torch.randn(1, length, heads, d), torch.randn(1, length, kv_heads, d)
    with Largest() as largest:
        mix = RecomputedMix.of(frame, q, k, scores, d)
        mix.apply(torch.randn(2, 1, length, kv_heads * d))
        mix.apply_t(torch.randn(2, 1, length, heads * d))
        mix.by_head_t(torch.randn(1, length, heads * d))
        mix.sum_heads(torch.randn(1, length, heads))
        mix.rows(torch.tensor([length - 1]))
    assert 0 < largest.numel <= score_blocks.ROWS * score_blocks.COLUMNS < length**2 / 8
    with Largest() as largest:  # and the measure would have seen one
        assert mix.pattern.numel() == heads * length**2 <= largest.numel


@needs_hooked
def test_a_capture_keeps_and_uses_no_pattern():
    length, heads = 800, 4
    config = {"n_ctx": length, "positional_embedding_type": "rotary", "rotary_dim": 8}
    model = build_hooked(config, torch.float32)
    stored, lens = both(model, tokens(1, length))
    saved = stored.capture.nbytes - lens.capture.nbytes
    kept = 2 * 4 * heads * (8 + 1) * length * 2  # queries and keys, one number more each
    assert saved == 2 * 4 * heads * length**2 - kept
    with Largest() as largest:
        for by in ("token", "component"):
            a = lens.attribute(3, by=by)
        lens.operator.T @ randn_like(lens.embedding)
    assert largest.numel < heads * length**2 / 8
    assert_close(a.values, stored.attribute(3, by="component").values, 1e-4)


def test_a_sweep_keeps_to_tiles_and_the_plan_knows():
    """Where folding the stored pattern does not fit the limit, tiles do."""
    length = 800
    if HookedTransformer is None:
        model = build_native({**NATIVE["gpt2"], "n_ctx": length}, torch.float32)
    else:
        model = build_hooked({"n_ctx": length}, torch.float32)
    stored, lens = both(model, tokens(1, length))
    square = 4 * length**2  # heads × L² numbers
    few = {"name": "in_out", "target": 3, "layers": None, "memory_limit": 13 * square}
    with pytest.raises(ValueError, match=r"memory_limit is .* smallest chunk"):
        stored.token_matrix(**few)
    with Largest() as largest:
        matrix = lens.token_matrix(**few)
    assert length**2 <= largest.numel < square / 2
    assert_close(matrix.values, stored.token_matrix("in_out", 3).values, 1e-4)
    plans = [x.plan("in_out", target=3) for x in (lens, stored)]
    assert plans[0].peak_bytes < plans[1].peak_bytes and plans[0].flops > plans[1].flops
    assert "forward pass computed them whole" in repr(plans[0])
    assert "recomputed" not in repr(plans[1])


@every_host
def test_the_host_keeps_no_pattern(case):
    """Neither a graph does, nor what some Bridges leave on their attention."""
    model = case.model()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with quiet(), torch.enable_grad():
        logits, lens = tensorlens_tl.capture(model, tokens(), pattern="recomputed")
        assert torch.is_grad_enabled()
    assert logits.grad_fn is None and lens.completeness_error <= case.tol()
    assert all(getattr(block.attn, "_pattern", None) is None for block in model.blocks)
    assert all(parameter.requires_grad for parameter in model.parameters())


@needs_hooked
def test_attention_sinks():
    """A score beside the keys' takes its share and mixes nothing: rows sum to less than 1."""
    model = build_hooked({}, torch.float64)
    if not hasattr(model.cfg, "use_attention_sinks"):
        return  # transformer_lens 2
    model = build_hooked({"use_attention_sinks": True}, torch.float64)
    for block in model.blocks:
        block.attn.sinks.data = torch.linspace(-1, 3, 4).double()
    stored, lens = both(model, tokens())
    assert_same_answers(lens, stored, ORACLE)
    assert 0 < stored.capture.blocks[0].attn.pattern.sum(-1).min() < 0.9


# --- Edits, mistakes, refusals --------------------------------------------------------------------


def nudge(t, hook):
    return torch.where(t.isfinite(), t * 1.001, t)


def nudge_in_place(t, hook):
    t.mul_(1.001)


@every_host
@pytest.mark.parametrize("name", ["pattern", "attn_scores"])
@pytest.mark.parametrize("edit", [nudge, nudge_in_place])
def test_edits_of_pattern_and_scores_are_refused(case, name, edit):
    at = f"blocks.1.attn.hook_{name}"
    with case.model().hooks(fwd_hooks=[(at, edit)]):
        with pytest.raises(ValueError, match=rf'edits {at}.*Use pattern="stored"'):
            capture(case.model(), tokens(), pattern="recomputed")
        if edit is nudge:
            capture(case.model(), tokens())


@every_host
@pytest.mark.parametrize("name", ["pattern", "attn_scores"])
def test_hooks_that_only_look_are_no_edits(case, name):
    seen = []
    for look in (lambda t, hook: seen.append(t.shape), lambda t, hook: t, lambda t, hook: t + 0):
        with case.model().hooks(fwd_hooks=[(f"blocks.1.attn.hook_{name}", look)]):
            lens = capture(case.model(), tokens(), pattern="recomputed")
        assert_same_answers(lens, lens_of(case), case.tol())
    assert seen


EDITED = [  # two points of every shape, by turns
    (case, name)
    for i, case in enumerate(PER_SHAPE)
    for name in (("hook_q", "hook_v"), ("hook_k", "hook_z"))[i % 2]
]


@pytest.mark.parametrize(("case", "name"), EDITED, ids=str)
def test_other_edits_are_served_as_ever(case, name):
    """Queries and keys are read with the user's edits in them."""
    with case.model().hooks(fwd_hooks=[(f"blocks.1.attn.{name}", lambda t, hook: t * 0.5)]):
        stored, lens = both(case.model(), tokens())
    assert_same_answers(lens, stored, case.tol())


@every_case
@pytest.mark.parametrize("wrong", [{"scale": 0.4}, {"soft_cap": 0.5}, {"window": 2}], ids=str)
def test_a_wrong_score_is_found_by_the_self_check(case, wrong, monkeypatch):
    of = RecomputedMix.of
    monkeypatch.setattr(
        RecomputedMix,
        "of",
        lambda frame, q, k, scores, d, sinks: of(frame, q, k, replace(scores, **wrong), d, sinks),
    )
    with pytest.raises(
        CaptureMismatchError, match=r'attention with a recomp.*pattern="stored".* mixing'
    ):
        capture(case.model(), tokens(), pattern="recomputed")


class Unheard:
    original_component = None


@every_host
def test_what_cannot_be_recomputed_is_refused(case):
    with pytest.raises(ValueError, match=r'pattern=.flash. is not known. Give pattern="stored" or'):
        capture(case.model(), tokens(), pattern="flash")
    adapter, block = adapt(case.model()), SimpleNamespace(attn=Unheard())
    adapter.model = SimpleNamespace(blocks=[block])
    with pytest.raises(NotRecomputableError, match=r'the attention Unheard.*pattern="stored"'):
        adapter.recomputed_reading()


@needs_hooked
@pytest.mark.parametrize("flag", ["use_logn_attn", "use_qk_norm"])
def test_scores_that_no_hook_shows_are_refused(flag, monkeypatch):
    model = build_hooked({}, torch.float64)
    monkeypatch.setattr(model.cfg, flag, True, raising=False)
    with pytest.raises(ValueError, match=f'does not serve .*{flag}.*Use pattern="stored"'):
        capture(model, tokens(), pattern="recomputed")


def test_scores_are_checked():
    for wrong in ({"scale": math.nan}, {"soft_cap": 0.0}, {"soft_cap": -1.0}):
        with pytest.raises(ValueError, match="Give a finite scale and a positive soft cap"):
            Scores(**{"scale": 1.0, **wrong})
    for wrong in ({"window": 0}, {"window": 3, "causal": False}):
        with pytest.raises(ValueError, match="Give a window of at least 1, and causal"):
            Scores(1.0, **wrong)
    with pytest.raises(ValueError, match="Give slopes with causal attention only"):
        Scores(1.0, causal=False, slopes=(0.5,))
    frame = Frame(((0, 2),), 2, torch.float64, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"do not fit\. Give the same positions"):
        RecomputedMix.of(frame, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 2, 4), Scores(1.0), 4)
    with pytest.raises(ValueError, match="slopes were given for 3 heads"):
        x = torch.ones(1, 2, 3, 4)
        RecomputedMix.of(frame, x, x, Scores(1.0, slopes=(0.5, 0.5)), 4)
