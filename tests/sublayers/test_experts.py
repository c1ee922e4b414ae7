"""Mixtures of experts: the map of an expert by plain loops, and every question about a mixture.

Every served name is compared with Hugging Face and its gradient in ``tests/support``.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from comparisons import assert_close
from models import (
    D_VOCAB,
    ORACLE,
    ROUNDING,
    TOLERANCES,
    bridge_offered,
    build_bridge,
    build_hf,
    build_hooked,
    quiet,
    randn_like,
    tokens,
)

import tensorlens_tl
from tensorlens_tl import Circuit, Node, dot_test
from tensorlens_tl.hosts.entry import adapt
from tensorlens_tl.maps import Frame, Routed
from tensorlens_tl.operator import CaptureMismatchError
from tensorlens_tl.passes.edge_patching import edge_model
from tensorlens_tl.recording import freeze
from tensorlens_tl.refusals.errors import UnsupportedArchitectureError
from tensorlens_tl.sublayers import Experts, ExpertsWeights, GatedMLP
from tensorlens_tl.support.tiny_models import _LLAMA, find

F64 = torch.float64
_HF = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": D_VOCAB, "max_position_embeddings": 32,
    "tie_word_embeddings": False, "num_experts_per_tok": 2, "head_dim": 8,
}  # fmt: skip
BRIDGES = {
    # A dense layer, a shared expert with a gate of its own, two of four experts a token.
    "qwen2-moe": ("Qwen2Moe", {**_HF, "num_experts": 4, "moe_intermediate_size": 16,
                               "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}),
    # Biases, an activation that is cut off, attention sinks, windows.
    "gpt-oss": ("GptOss", {**_HF, "num_local_experts": 4, "sliding_window": 3,
                           "swiglu_limit": 1.0}),
}  # fmt: skip
HOOKED = {**_LLAMA, "n_key_value_heads": 2, "num_experts": 4, "experts_per_token": 2}
NAMES = [name for name in BRIDGES if bridge_offered(name) or name == "qwen2-moe"]
NAMES = NAMES if find("transformer_lens.model_bridge", "TransformerBridge") else []
NAMES += ["hooked-mixtral"] if find("transformer_lens", "HookedTransformer") else []
every_mixture = pytest.mark.parametrize("name", NAMES)


@cache
def model_of(name):
    with quiet():
        if name in BRIDGES:
            return build_bridge(*BRIDGES[name], F64)
        return build_hooked(HOOKED, F64).to(F64)


@cache
def lens_of(name, gate="gate", seed=0):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(model_of(name), tokens(seed=seed), gate=gate)[1]


def within(name, compared):
    return TOLERANCES[compared][name in BRIDGES]


def mixtures(lens):
    return [b for step in lens.operator.steps for b in step.branches if isinstance(b.body, Experts)]


# --- One mixture, by plain loops -----------------------------------------------------------------


def mixture(limit=None, offset=0.0, scales_input=False, biases=True):
    """Four experts: tokens meet 1, and 0 or 2; nobody meets 3; the last row is padding."""
    frame = Frame(((0, 5), (0, 4)), 5, F64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    def bias(d):
        return draw(4, d) if biases else None

    w = ExpertsWeights(
        draw(4, 6, 8),
        bias(8),
        draw(4, 6, 8),
        bias(8),
        draw(4, 8, 6),
        bias(6),
        "silu",
        limit,
        offset,
        scales_input,
    )
    first = torch.tensor([[0, 2, 2, 0, 2], [2, 0, 0, 2, -1]])
    experts = torch.stack([first, torch.where(first < 0, -1, 1)], -1)
    x, share = draw(2, 5, 6), draw(2, 5, 2).abs()
    into = Routed(frame, experts, w.W_gate, w.b_gate), Routed(frame, experts, w.W_in, w.b_in)
    parts = [(m.apply(x) + m.bias).unflatten(-1, (2, 8)) for m in into]
    parts = [p * share[..., None] for p in parts] if scales_input else parts
    return Experts(frame, 3, w, experts, share, *parts, n_experts=4), x


def by_loops(mlp, x):
    """The mixture token by token, each expert apart: [expert, batch, pos, d_model]."""
    w, found = mlp.weights, torch.zeros(4, *x.shape, dtype=F64)
    for b, t, s in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(2)):
        e = int(mlp.experts[b, t, s])
        if e < 0:
            continue
        rho = mlp.share[b, t, s]
        row = x[b, t] * rho if w.scales_input else x[b, t]
        g, u = (
            row @ W[e] + (0 if b_ is None else b_[e])
            for W, b_ in ((w.W_gate, w.b_gate), (w.W_in, w.b_in))
        )
        if w.limit is not None:
            g, u = g.clamp(max=w.limit), u.clamp(-w.limit, w.limit)
        out = torch.nn.functional.silu(g) * (u + w.up_offset) @ w.W_out[e]
        if w.scales_input:
            rho = 1.0
        found[e, b, t] += rho * (out + (0 if w.b_out is None else w.b_out[e]))
    return found


KINDS = {
    "plain": {},
    "cut off": {"limit": 0.8, "offset": 1.0},
    "scaled input": {"scales_input": True, "biases": False},
}


@pytest.mark.parametrize("gate", ["gate", "up", "half"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_the_sum_of_its_experts(kind, gate):
    mlp, x = mixture(**KINDS[kind])
    mlp, each = replace(mlp, convention=gate), by_loops(mlp, x)
    assert kind != "cut off" or ((mlp.pre > 0.8).any() and (mlp.pre_linear.abs() > 0.8).any())
    assert_close(mlp.apply(x) + mlp.bias, each.sum(0), ROUNDING, "the mixture")
    parts = [part.apply(x) + part.bias for part in map(mlp.part, mlp.nodes())]
    assert_close(torch.stack(parts), each, ROUNDING, "part by part")
    assert_close(mlp.factored(mlp.posts).wide(), each, ROUNDING, "what experts write")
    assert_close(mlp.hidden(x), mlp.posts, ROUNDING, "post-activations")
    assert dot_test(mlp) < 1e-15
    y = randn_like(x, 3)
    shares = torch.einsum("ebpd,bpd->bpe", each, y)
    assert_close(mlp.node_shares(mlp.posts, y), shares, ROUNDING, "one number per expert")
    query = torch.tensor([4, 3])
    at = each[:, [0, 1], query].transpose(0, 1)
    assert_close(mlp.outputs_at(x, query), at, ROUNDING, "at one position")
    effects, own = {}, {}
    covector, kept = mlp.pull(y, effects)
    apart, own = mlp.readers(kept, None)
    assert_close(apart.summed(), covector, ROUNDING, "readers sum to the adjoint")
    for name, effect in effects.items():
        assert_close(own[name].sum(0), effect.sum(-1), ROUNDING, name)
    read = torch.einsum("ebpd,bpd->eb", apart.wide(), x) + sum(own.values())
    assert_close(read, shares.sum(1).T, ROUNDING, "reader by reader")


def test_an_expert_that_no_token_reached_is_exactly_zero_and_costs_nothing():
    mlp, x = mixture()
    assert [expert for expert, _ in mlp.output.groups] == [0, 1, 2]
    part = mlp.part(Node("expert", 3, 3))
    assert not part.output.groups
    assert not (part.apply(x) + part.bias).any() and not part.apply_t(x).any()
    assert not (mlp.apply(x) + mlp.bias)[1, 4].any()  # padding
    with pytest.raises(ValueError, match="no node L3E4"):
        mlp.part(Node("expert", 3, 4))


def test_a_mixture_moves_as_its_experts_with_the_routing_held():
    for kind in KINDS.values():
        mlp, x = mixture(**kind)
        other = x + 0.1 * randn_like(x, 5)
        moved = mlp.moved(other - x)
        assert_close(moved.apply(other) + moved.bias, by_loops(mlp, other).sum(0), ROUNDING)


def test_names():
    for text in ("L3E2", "L3E.shared", "L3E2N17", "L3E.sharedN5"):
        assert str(Node.parse(text)) == text
    assert Node.parse("L3E.shared") == Node("expert", 3, name="shared")
    with pytest.raises(ValueError, match="'L3Ex' is not a node"):
        Node.parse("L3Ex")


# --- In the hosts --------------------------------------------------------------------------------


@every_mixture
def test_every_convention_reproduces_the_run(name):
    with quiet(), torch.no_grad():
        logits = model_of(name)(tokens(), return_type="logits")
    for gate in ("gate", "up", "half"):
        lens = lens_of(name, gate)
        ours = lens.readout(lens.operator @ lens.embedding + lens.operator.bias)
        assert_close(ours, logits, within(name, "run"), gate)
        once = lens_of(name).with_convention(gate).attribute(3, by="expert").values
        assert torch.equal(once, lens.attribute(3, by="expert").values)


@every_mixture
def test_experts_sum_to_the_mlp_and_neurons_to_experts(name):
    lens, tol = lens_of(name), within(name, "run")
    for effect in ("direct", "total"):
        values = {
            by: lens.attribute(3, 4, by=by, effect=effect)
            for by in ("component", "expert", "neuron")
        }

        def of(by, kind, layer, name="", values=values):
            found = values[by]
            rows = [
                i
                for i, source in enumerate(found.sources)
                if source.node.kind == kind and source.node.layer == layer
                if not name or source.node.name == name
            ]
            return found.values[:, rows].sum(-1)

        for branch in mixtures(lens):
            layer, whole = branch.body.layer, values["component"]
            assert not [s for s in whole.sources if s.node.kind == "expert"]
            experts = of("expert", "expert", layer)
            assert_close(of("component", "mlp", layer), experts, tol, f"L{layer} {effect}")
            neurons = of("neuron", "neuron", layer)
            neurons = neurons + of("neuron", "constant", layer, "b_out")
            b_out = of("component", "constant", layer, "b_out")
            assert_close(neurons - b_out, experts, tol, f"L{layer} neurons {effect}")
        if effect == "direct":
            for found in values.values():
                assert_close(found.values.sum(-1), found.target_value, tol, found.by)


@every_mixture
def test_edges_into_and_out_of_experts(name):
    lens, tol = lens_of(name), within(name, "run")
    found = lens.attribute(3, by="edge")
    whole = lens.operator.restrict(lens.operator.wiring.edges(qk=False))
    assert_close(whole @ lens.embedding, lens.operator @ lens.embedding, tol, "all edges")
    assert_close(whole.bias, lens.operator.bias, tol, "and their constants")
    totals = lens.attribute(3, by="expert", effect="total")
    for branch in mixtures(lens):
        for node in branch.body.nodes():
            into = found.select(dest=str(node)).values.sum(-1)
            made = [i for i, s in enumerate(totals.sources) if s.node == node]
            assert_close(into, totals.values[:, made].sum(-1), tol, f"what {node} makes")
            if node.index not in branch.body.experts.unique().tolist():
                assert not into.any()
    out = found.select(dest="logits")
    assert_close(out.values.sum(-1), out.target_value, tol, "into the logits")


@every_mixture
def test_the_adjoint_and_batched_sweeps(name):
    lens, tol = lens_of(name), within(name, "run")
    T = lens.operator
    assert dot_test(T) < 1e-14
    dense = T.to_dense()
    assert_close(T.block(-1, 2), dense[:, -1, :, 2], tol, "a block")
    x = lens.embedding
    shares = torch.einsum("bqdkf,bkf->bqkd", dense, x)
    assert_close(lens.token_matrix("in").values, shares.norm(dim=-1), tol, "in")
    assert_close(lens.token_matrix("norm").values, dense.norm(dim=(2, 4)), tol, "norm")
    orders = lens.attribute(3, by="order")
    assert_close(orders.values.sum(-1), orders.target_value, tol, "orders")
    decompx = lens.token_matrix("decompx").values
    below = lens.between("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post").to_dense()
    forwards = torch.einsum("bqdkf,bkf->bqkd", below, x).norm(dim=-1)
    assert_close(decompx, forwards, tol, "token by token, forwards")


@every_mixture
def test_the_self_check_names_the_layer_of_a_wrong_expert(name):
    adapter, layer = adapt(model_of(name)), 1
    weights = adapter.weights
    w = weights.blocks[layer].mlp

    def swapped(W):
        return W.flip(0) if isinstance(W, torch.Tensor) else W[::-1]

    wrong = {
        "gate (W_gate": {"W_gate": swapped(w.W_gate)},
        "input (W_in": {"W_in": w.W_gate},
        "output (W_out": {"W_out": swapped(w.W_out)},
    }
    for match, parts in wrong.items():
        block = replace(weights.blocks[layer], mlp=replace(w, **parts))
        blocks = (*weights.blocks[:layer], block)
        adapter.weights = replace(weights, blocks=blocks)
        with pytest.raises(CaptureMismatchError, match=rf"L{layer} (experts|MLP) {match[:5]}"):
            freeze(adapter, tokens())


@every_mixture
def test_padding_reaches_no_expert(name):
    ids, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(model_of(name), ids, attention_mask=mask)[1]
        alone = tensorlens_tl.capture(model_of(name), ids[:1, :5])[1]
    for branch in mixtures(lens):
        assert (branch.body.experts[0, 5:] == -1).all() and (branch.body.experts[1] >= 0).all()
    ours, theirs = (one.attribute(3, by="expert").values for one in (lens[0], alone))
    assert_close(ours, theirs, within(name, "padded"), "alone")


@every_mixture
def test_a_file_holds_the_routing(name, tmp_path):
    lens, path = lens_of(name), tmp_path / "lens.safetensors"
    lens.save(path)
    again = tensorlens_tl.load(path, model=model_of(name))
    rows = [one.attribute(3, by="expert", effect="total").values for one in (lens, again)]
    assert torch.equal(*rows)
    assert repr(tensorlens_tl.load(path).routing(1)) == repr(lens.routing(1))
    lens.save(path, weights=True)
    assert torch.equal(
        tensorlens_tl.load(path).attribute(3, by="neuron").values,
        lens.attribute(3, by="neuron").values,
    )


@every_mixture
def test_what_a_mixture_cannot_answer_is_refused_by_name(name):
    lens, other, model = lens_of(name), lens_of(name, seed=1), model_of(name)
    found = lens.attribute(3, by="component", baseline=other)
    assert_close(found.values.sum(-1), found.target_value, within(name, "two runs"), "baseline")
    if isinstance(lens.capture.score_weights, tuple):
        with pytest.raises(ValueError, match="the router of a mixture of experts chooses"):
            lens.attribute(3, baseline=other, at="secant")
    with pytest.raises(UnsupportedArchitectureError, match="mixture of experts, for which attnlrp"):
        lens.token_scores("attnlrp", model=model)


@every_mixture
def test_the_router_is_something_to_look_at(name):
    lens = lens_of(name)
    routing = lens.routing(1)
    body = next(b.body for b in mixtures(lens) if b.body.layer == 1)
    assert routing.experts.shape == routing.weights.shape == (2, 7, 2)
    assert torch.equal(routing.experts, body.experts)
    counted = routing.counts
    assert counted.shape == (2, 4) and counted.sum() == 2 * 7 * 2
    frame = routing.to_dataframe()
    assert list(frame.columns) == ["prompt", "pos", "token", "expert", "weight"]
    assert len(frame) == 28
    assert "L1" in repr(routing) and "E" in repr(routing)
    with pytest.raises(ValueError, match="layer=7"):
        lens.routing(7)


@pytest.mark.offered("qwen2-moe" in NAMES)
def test_a_dense_layer_has_no_router_and_a_shared_expert_is_a_node():
    lens = lens_of("qwen2-moe")
    with pytest.raises(ValueError, match="layer=0 has no mixture"):
        lens.routing(0)
    shared = lens.capture.blocks[1].shared
    assert isinstance(shared, GatedMLP) and shared.nodes() == (Node("expert", 1, name="shared"),)
    assert isinstance(lens.capture.blocks[0].mlp, GatedMLP)
    assert shared.factor.min() > 0 and shared.factor.max() < 1  # a sigmoid
    assert "L1E.shared" in [str(s.node) for s in lens.attribute(3, by="expert").sources]


@pytest.mark.offered("qwen2-moe" in NAMES)
def test_a_model_in_float64_is_served_and_set_back():
    """Hugging Face's faster ways to run experts reject float64, and hide single experts."""
    model = build_hf(*BRIDGES["qwen2-moe"], F64)
    model.config._experts_implementation = "grouped_mm"
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(model, tokens())[1]
    assert lens.completeness_error < 1e-6
    assert model.config._experts_implementation == "grouped_mm"


# --- The real model, run edge by edge ------------------------------------------------------------


@every_mixture
def test_experts_run_apart_in_the_real_model(name):
    model, lens, tol = model_of(name), lens_of(name), within(name, "oracle")
    with quiet(), torch.no_grad():
        plain, corrupted = model(tokens()), model(tokens(seed=1))
        with edge_model(model) as edges:
            run, other = edges.run(tokens()), edges.run(tokens(seed=1))
            every = torch.ones(1, len(edges.universe.readers), len(edges.universe.writers))
            kept = edges.run(tokens(), every.to(F64))
            replaced = edges.run(tokens(), 0 * every.to(F64), other.writes[0])
            names = [str(node) for node in edges.universe.writers]
            cut = every.to(F64)
            cut[:, :, names.index("L1E2")] = 0
            ablated = edges.run(tokens(), cut)
            assert edges.universe.wiring == lens.operator.wiring
    for found in (run, kept):
        assert_close(found.logits[0], plain, ROUNDING, "the host's own logits")
    assert_close(replaced.logits[0], corrupted, ROUNDING, "all replaced")
    steps = lens.operator.steps
    ours = torch.cat([b.writes(step.state).wide() for step in steps for b in step.branches])
    assert_close(run.writes[0][1:], ours, tol, "what every node writes")
    # The same by hand: the routing weights of expert 2 at zero.
    mlp = model.blocks[1].mlp
    if name in BRIDGES:
        experts = mlp.original_component.experts
        experts = getattr(experts, "original_component", experts)
        hook = experts.register_forward_pre_hook(
            lambda module, args: (args[0], args[1], torch.where(args[1] == 2, 0, args[2]))
        )
    else:
        hook = mlp.experts[2].register_forward_hook(lambda module, args, out: 0 * out)
    with quiet(), torch.no_grad():
        by_hand = model(tokens())
    hook.remove()
    assert (by_hand - plain).abs().max() > 1e-3
    assert_close(ablated.logits[0], by_hand, ORACLE, "without one expert")


@every_mixture
def test_a_circuit_of_experts_is_found_kept_in_a_file_and_tested(name):
    lens, model = lens_of(name), model_of(name)
    circuit = lens.discover(3, n_edges=60, qk=False)
    assert any(edge.dest.kind == "expert" for edge in circuit.edges)
    again = Circuit.from_json(circuit.to_json())
    assert again.edges == circuit.edges and again.model == circuit.model
    found = circuit.faithfulness(model, tokens(), corrupted=tokens(seed=1), ablation="resample")
    assert (found.full - found.ablated).abs().min() > 1e-3
