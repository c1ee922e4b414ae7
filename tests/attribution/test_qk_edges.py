"""Query and key edges: the gradient of the real model with its pattern live in one reader alone."""

from dataclasses import replace

import pytest
import torch
from comparisons import assert_close
from models import (
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    TWO_RUNS,
    every_convention,
    lens_of,
    quiet,
    tokens,
)
from oracles import FrozenModel, arrived, attends_apart, gradient_of, written

import tensorlens_tl
from tensorlens_tl import Edge, Node
from tensorlens_tl.attribution.edges import Writers
from tensorlens_tl.operator import query_key
from tensorlens_tl.operator.capture import CaptureMismatchError

every_case = pytest.mark.parametrize("case", SHAPES, ids=str)
every_shape = pytest.mark.parametrize("case", PER_SHAPE, ids=str)


class LiveScores(FrozenModel):
    """The frozen real model with one layer's pattern live; its values read a detached residual."""

    def __init__(self, model, ids, gate, layer):
        super().__init__(model, ids, gate)
        self.attn = f"blocks.{layer}.attn"
        self.open = {"q": 0.0, "k": 0.0}
        self.head = torch.zeros(1)

    def _hooks(self):
        def through(gain):  # forward as it is; backward × what is open at that time
            def hook(t, hook):
                t = t * 1.0  # not a view that autograd may not hook
                t.register_hook(lambda g: g * gain(g))
                return t

            return hook

        def pattern(t, hook):
            live = t - t.detach()
            live.register_hook(lambda g: g * self.head.to(g)[:, None, None])
            return self.cache[f"{self.attn}.hook_pattern"] + live

        kept = [(n, f) for n, f in super()._hooks() if n != f"{self.attn}.hook_pattern"]
        if attends_apart(self.model):  # no edit of its pattern counts: open a head's q or k itself
            kept = [(n, f) for n, f in kept if not n.startswith(f"{self.attn}.")]

            def of_head(side):
                return lambda g: self.open[side] * self.head.to(g)[:, None]

            kept += [(f"{self.attn}.hook_{s}", through(of_head(s))) for s in "qk"]
            return [*kept, (f"{self.attn}.hook_v", lambda t, hook: t.detach())]
        scales = [
            n for n in self.cache if n.startswith(self.attn) and n.endswith("_norm.hook_scale")
        ]
        kept += [(n, lambda t, hook, n=n: self.cache[n].clone()) for n in scales]
        kept += [(f"{self.attn}.hook_{s}", through(lambda g, s=s: self.open[s])) for s in "qk"]
        kept += [(f"{self.attn}.hook_v", lambda t, hook: t.detach())]
        return [*kept, (f"{self.attn}.hook_pattern", pattern)]

    def gradients(self, x, u, layer, heads):
        """The gradient of u · y at the layer's input, through one reader alone; and around all.

        The former are differences from the latter, and as exact as it is large.
        """
        leaf = torch.zeros_like(x, requires_grad=True)
        with torch.enable_grad():
            y, _ = self(x, {f"blocks.{layer}.hook_resid_pre": leaf})
            target = (y[:, -1] * u).sum()
        found = {}
        for side, head in [("", 0), *((s, h) for s in "qk" for h in heads)]:
            self.open = {s: float(s == side) for s in "qk"}
            self.head = torch.nn.functional.one_hot(torch.tensor(head), heads.stop).double()
            found[side, head] = torch.autograd.grad(target, leaf, retain_graph=True)[0]
        around = found.pop(("", 0))  # what reaches the target beside the scores
        return {key: g - around for key, g in found.items()}, around


@every_convention
def test_query_and_key_edges_are_gradients_of_the_real_model(case, gate):
    lens = lens_of(case, gate=gate)
    op, sweep = lens.operator, gradient_of(lens, 3, 4)
    edges = lens.attribute(3, 4, by="edge", qk=True)
    found = {s.node: edges.values[:, i] for i, s in enumerate(edges.sources)}
    writers = Writers.of(op, lens.capture, sweep.target.query)
    checked = 0
    for layer in range(2):
        model = LiveScores(case.model(), tokens(), gate, layer)
        # Of other families than the shapes, heads 0 and 2: they read other keys where some share.
        u, heads = sweep.target.covector, range(0, lens.capture.n_heads, 1 + (case not in SHAPES))
        live, around = model.gradients(lens.embedding, u, layer, heads)
        below = next(n for n, s in zip(writers.below, op.steps, strict=False) if s.layer == layer)
        nodes, outputs = writers.nodes[:below], arrived(op, writers, layer)[:, :below]
        for (side, head), g in live.items():
            reader = Node("head", layer, head, side)
            expected = torch.einsum("bwpd,bpd->bw", outputs, g.to(outputs))
            ours = torch.stack([found[Edge(node, reader)] for node in nodes], 1)
            g_all = (g + around).flatten(1).norm(dim=-1)
            size = outputs.flatten(2).norm(dim=-1).amax(1) * g_all
            tol = case.within("oracle")
            assert ((ours - expected).abs() <= tol * size[:, None]).all(), str(reader)
            checked += ours.numel()
        assert max(g.abs().max() for g in live.values()) > 1e-6
    assert checked == sum(not s.node.conserved for s in edges.sources) * 2 // heads.step


def edges_of(lens, **kwargs):
    a = lens.attribute(3, 4, by="edge", qk=True, **kwargs)
    return {s.node: a.values[:, i] for i, s in enumerate(a.sources)}


@every_shape
def test_the_other_edges_stay_as_they_are_and_none_sums(case):
    lens = lens_of(case)
    plain, both = lens.attribute(3, 4, by="edge"), lens.attribute(3, 4, by="edge", qk=True)
    found = {s.node: both.values[:, i] for i, s in enumerate(both.sources)}
    for i, source in enumerate(plain.sources):
        assert_close(found.pop(source.node), plain.values[:, i], ROUNDING, str(source.node))
    assert found and not any(edge.conserved for edge in found)
    assert {str(edge.dest) for edge in found} == {
        f"L{layer}H{head}.{side}" for layer in range(2) for head in range(4) for side in "qk"
    }
    assert not both.sums_to_target and not both.select(dest="L1H2.k").sums_to_target
    assert both.select(dest="logits").completeness_error <= 10 * case.tol()
    (many,) = lens.attribute_many([3], versus=4, by="edge", qk=True)
    assert_close(many.values, both.values, ORACLE)


@every_shape
def test_differences_of_runs_are_read_by_one_runs_queries_and_keys(case):
    ids = tokens()
    ids[:, 2:4] = tokens(seed=1)[:, 2:4]
    clean = lens_of(case)
    with quiet(), torch.no_grad():
        corrupted = tensorlens_tl.capture(case.model(), ids)[1]
    ours, theirs = edges_of(clean), edges_of(corrupted)
    at_clean = edges_of(clean, baseline=corrupted)
    writers = [
        Writers.of(lens.operator, lens.capture, gradient_of(lens, 3, 4).target.query)
        for lens in (clean, corrupted)
    ]
    assert {e for e in at_clean if not e.conserved} == {e for e in ours if not e.conserved}
    # Linear in what is written: the difference at one run's covectors, from the run with itself.
    there = edges_of(corrupted, baseline=clean, at="corrupted")
    size = sum(v.abs() for v in [*ours.values(), *theirs.values()])
    for edge, v in at_clean.items():
        if not edge.conserved:
            assert ((there[edge] + v).abs() <= ORACLE * size).all(), str(edge)
            node = writers[0].nodes.index(edge.src)
            same = torch.equal(*(written(w)[:, node] for w in writers))
            assert not same or v.abs().max() == 0
    zero = edges_of(clean, baseline="zero")
    for edge, v in zero.items():
        if edge.src.kind == "embed" and not edge.conserved:
            assert ((v - ours[edge]).abs() <= ORACLE * size).all()


@every_shape
def test_patterns_recomputed_block_by_block(case, monkeypatch):
    lens = lens_of(case)
    expected = lens.attribute(3, 4, by="edge", qk=True)
    recomputed = lens_of(case, pattern="recomputed").attribute(3, 4, by="edge", qk=True)
    assert_close(recomputed.values, expected.values, case.within("oracle"))
    monkeypatch.setattr(query_key, "CELLS", 1)  # one key/value head at a time
    assert_close(lens.attribute(3, 4, by="edge", qk=True).values, expected.values, ORACLE)


@every_case
def test_prompts_of_a_batch_and_their_padding(case):
    """A prompt cut out of a padded batch, whose positions start later, has the same edges."""
    if case.float32_norms:
        return  # a float64 Hugging Face model makes NaN of left padding
    ids, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    with quiet(), torch.no_grad():
        _, batch = tensorlens_tl.capture(case.model(), ids, attention_mask=mask)
        _, alone = tensorlens_tl.capture(case.model(), ids[:1, 2:])
    expected = edges_of(alone)
    whole, cut = edges_of(batch), edges_of(batch[0])
    size = sum(v.abs() for v in expected.values())
    for edge, v in expected.items():
        assert ((cut[edge] - v).abs() <= TWO_RUNS * size).all(), str(edge)
        assert ((whole[edge][:1] - v).abs() <= TWO_RUNS * size).all(), str(edge)


@every_shape
def test_half_precision_models_have_them_too(case):
    with quiet(), torch.no_grad():
        _, lens = tensorlens_tl.capture(case.model(torch.bfloat16), tokens())
    found = edges_of(lens)
    assert all(v.isfinite().all() for v in found.values())


# --- Refusals ------------------------------------------------------------------------------------


def wrong(scores):
    """Ways in which weights may be laid out otherwise, each of the right shape."""
    turn = scores.rotation
    yield "W_Q transposed", replace(scores, W_Q=scores.W_Q.mT.reshape(scores.W_Q.shape))
    yield "heads in another order", replace(scores, W_K=scores.W_K.roll(1, -1))
    yield "Q and K swapped heads", replace(scores, W_Q=scores.W_Q.flip(0))
    yield "scale", replace(scores, scale=scores.scale * 1.1)
    if scores.b_Q is not None and scores.b_Q.any():
        yield "no b_Q", replace(scores, b_Q=None)
    if scores.q_norm is not None:
        yield "no q_norm", replace(scores, q_norm=None)
    if turn is not None:
        yield "no rotation", replace(scores, rotation=None)
        if turn.cos.shape[-1] > 2:  # one pair is both
            yield "pairs", replace(scores, rotation=replace(turn, adjacent=not turn.adjacent))
        yield "backwards", replace(scores, rotation=replace(turn, sin=-turn.sin))
    if scores.soft_cap is not None:
        yield "no cap", replace(scores, soft_cap=None)


@every_case
def test_a_wrong_layout_is_found_by_the_runs_own_pattern(case):
    lens = lens_of(case)
    right = lens.capture.score_weights
    for name, other in wrong(right[1]):
        capture = replace(lens.capture, score_weights=(right[0], other))
        bad = type(lens)(capture)
        with pytest.raises(
            CaptureMismatchError, match=r"L1: the pattern recomputed from W_Q and W_K"
        ):
            bad.attribute(3, 4, by="edge", qk=True)
            pytest.fail(name)
        assert bad.attribute(3, 4, by="edge").values.isfinite().all()


def test_edits_of_scores_and_patterns():
    """Scores that a hook masked are a softmax still; changed queries or patterns are not."""
    case = SHAPES[0]
    model = case.model()

    def run(name, hook):
        with quiet(), torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.1.attn.{name}", hook)]):
            return tensorlens_tl.capture(model, tokens())[1]

    def knock_out(t, hook):
        t = t.clone()
        t[:, 2, 4:, 1] = -torch.inf
        return t

    found = edges_of(run("hook_attn_scores", knock_out))
    assert all(v.isfinite().all() for v in found.values())
    gone = edges_of(
        run("hook_pattern", lambda t, hook: t * torch.tensor([1, 0, 1, 1.0])[:, None, None])
    )
    assert all(
        (v == 0).all() == (e.dest.index == 1 and e.dest.layer == 1)
        for e, v in gone.items()
        if not e.conserved
    )
    for name, hook in (
        ("hook_q", lambda t, hook: t * 0.5),
        ("hook_pattern", lambda t, hook: t * 0.5),
    ):
        with pytest.raises(CaptureMismatchError, match=r"L1: .*A hook of yours edited"):
            edges_of(run(name, hook))


def test_refusals(tmp_path):
    case = SHAPES[0]
    lens = lens_of(case)
    with pytest.raises(ValueError, match=r"qk=True is not available for by='head'"):
        lens.attribute(by="head", qk=True)
    with pytest.raises(ValueError, match=r"qk=True is not available for by='token'"):
        lens.attribute(qk=True, baseline="zero")
    path = tmp_path / "lens.safetensors"
    lens.save(path, weights=True)
    with pytest.raises(ValueError, match=r"qk=True needs W_Q and W_K.*Load it with model="):
        tensorlens_tl.load(path).attribute(by="edge", qk=True)
    again = tensorlens_tl.load(path, model=case.model())
    expected = lens.attribute(3, 4, by="edge", qk=True)
    assert_close(again.attribute(3, 4, by="edge", qk=True).values, expected.values, ROUNDING)


def test_writing_to_query_weights_makes_the_lens_refuse():
    model = SHAPES[0].build(torch.float64)
    with quiet(), torch.no_grad():
        _, lens = tensorlens_tl.capture(model, tokens())
    attn = model.blocks[0].attn
    with torch.no_grad():
        (
            attn.W_Q
            if hasattr(attn, "rotary_dim") or hasattr(attn, "attn_scale")
            else attn.q.original_component.weight
        ).mul_(2)
    with pytest.raises(ValueError, match="model's weights were written to after the capture"):
        lens.attribute(by="edge", qk=True)
