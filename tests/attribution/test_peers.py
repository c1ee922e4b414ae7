"""Our numbers against TransformerLens's own: direct logit attribution, attribution patching."""

import contextlib

import pytest
import torch
from models import CASES, ORACLE, SHAPES, quiet, tokens

import tensorlens_tl
from tensorlens_tl import Edge, Node
from tensorlens_tl.circuits.ablation import faithfulness
from tensorlens_tl.circuits.edge_baselines import score_edges
from tensorlens_tl.passes.edge_patching import edge_model

try:
    from transformer_lens.tools.analysis import attribution_patching as peer
except ImportError:  # before transformer_lens 4
    peer = None

FOLDED = [
    c
    for c in SHAPES
    if c.name in ("hooked-gpt2-folded", "hooked-llama-folded", "bridge-gpt2-compat")
]


def corrupt():
    ids = tokens(1)
    ids[:, 2:4] = tokens(1, seed=1)[:, 2:4]
    return ids


@pytest.mark.offered(bool(FOLDED))
@pytest.mark.parametrize("case", FOLDED, ids=str)
def test_direct_effects_are_the_hosts_logit_attrs(case):
    """Heads and MLPs of a folded model: stack of results, ln_final's scale, W_U."""
    model, ids = case.model(), tokens(1)
    model.set_use_attn_result(True)
    try:
        with quiet(), torch.no_grad():
            _, cache = model.run_with_cache(ids)
            _, lens = tensorlens_tl.capture(model, ids)
            n = model.cfg.n_layers
            heads = torch.cat(
                [cache[f"blocks.{i}.attn.hook_result"][:, -1].transpose(0, 1) for i in range(n)]
            )
            mlps = [cache[f"blocks.{i}.hook_mlp_out"][:, -1] for i in range(n)]
            stack = torch.cat([heads, torch.stack(mlps)])
            theirs = cache.logit_attrs(stack, tokens=3, incorrect_tokens=4, pos_slice=-1)[:, 0]
    finally:
        model.set_use_attn_result(False)
    a = lens.attribute(3, 4, by="component")
    ours = {s.node: a.values[0, i] for i, s in enumerate(a.sources)}
    nodes = [Node("head", i, h) for i in range(n) for h in range(4)]
    # The host's own MLP output holds b_out.
    own = [ours[node] for node in nodes] + [
        ours[Node("mlp", i)] + ours.get(Node("constant", i, name="b_out"), 0) for i in range(n)
    ]
    assert (torch.stack(own) - theirs).abs().max() <= ORACLE * theirs.abs().max()


# --- Attribution patching ------------------------------------------------------------------------


@contextlib.contextmanager
def frozen(model):
    """Pattern, scale and gating ratio constant in every backward pass; all values as they are."""
    kept, handles, hooks = {}, [], [("ln_final.hook_scale", lambda t, hook: t.detach())]

    def norm(module, args, output):
        x = args[0]
        if type(module).__name__ != "LayerNorm":
            raise AssertionError(type(module))
        scale = (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / scale * module.weight + module.bias

    for i, block in enumerate(model.blocks):
        for name in ("ln1", "ln2"):
            hooks.append((f"blocks.{i}.{name}.hook_scale", lambda t, hook: t.detach()))
            raw = getattr(block, name).original_component  # split inputs go past hook_scale
            handles.append(raw.register_forward_hook(norm))
        hooks.append((f"blocks.{i}.attn.hook_pattern", lambda t, hook: t.detach() + 0 * t))

        def pre(t, hook, i=i):
            kept[i] = t

        def post(t, hook, i=i):
            return (t / kept[i]).detach() * kept[i]

        hooks += [(f"blocks.{i}.mlp.hook_pre", pre), (f"blocks.{i}.mlp.hook_post", post)]
    try:
        with model.hooks(fwd_hooks=hooks):
            yield
    finally:
        for handle in handles:
            handle.remove()


READERS = {"q_input": "q", "k_input": "k", "v_input": "v"}


def ours_of(node):
    """Their node's name here."""
    if node.kind == "embed":
        return Node("embed")
    if node.kind == "logits":
        return Node("logits")
    if node.kind in ("mlp_out", "mlp_in"):
        return Node("mlp", node.layer)
    return Node("head", node.layer, node.head, READERS.get(node.kind, ""))


@pytest.mark.offered(hasattr(peer, "enumerate_edges"))
@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-neox", "bridge-neox-sequential"])
def test_edges_of_a_difference_are_the_hosts_attribution_patching_when_frozen(name):
    """(a_clean − a_corrupted) · covector of the corrupted run; q and k see nothing."""
    model, clean, corrupted = CASES[name].model(), tokens(1), corrupt()
    config = peer.EdgeAttributionConfig(granularity="edge")
    with quiet():
        with frozen(model):
            theirs = peer.attribution_patch(
                model, clean, corrupted, lambda logits: logits[0, -1, 3] - logits[0, -1, 4], config
            ).edge_scores
        with torch.no_grad():
            lenses = [tensorlens_tl.capture(model, ids)[1] for ids in (clean, corrupted)]
    a = lenses[0].attribute(3, 4, by="edge", baseline=lenses[1], at="corrupted")
    ours = {s.node: float(a.values[0, i]) for i, s in enumerate(a.sources)}
    sums: dict[Edge, float] = {}  # their nodes stand at a position each
    for (src, dest), score in theirs.items():
        edge = Edge(ours_of(src), ours_of(dest))
        sums[edge] = sums.get(edge, 0.0) + score
    scale = max(map(abs, ours.values()))
    assert len(sums) > 50
    for edge, score in sums.items():
        if edge.dest.name in ("q", "k"):
            assert abs(score) <= ORACLE * scale, str(edge)
        else:
            assert abs(score - ours[edge]) <= ORACLE * scale, str(edge)


# --- Ablating outside a circuit -------------------------------------------------------------------


def positions_of(edge, graph):
    """Their edges that are ours, one at each position."""
    return [pair for pair in graph if whole_of(*pair) == edge]


def whole_of(src, dest):
    """Their edge's name here, where the input is one writer."""
    return Edge(Node("input") if src.kind == "embed" else ours_of(src), ours_of(dest))


@pytest.mark.offered(hasattr(peer, "faithfulness"))
@pytest.mark.parametrize("ablation", ["corrupt", "mean"])
@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-neox", "bridge-neox-sequential"])
def test_faithfulness_is_the_hosts(name, ablation):
    """The same circuits, edge by edge, are the same logits.

    What differs, and is settled here: their nodes stand at a position each (a circuit of ours is
    all positions of theirs) and one pair is measured at a time; a graph counts its edges at every
    position. Their writer ``embed`` is without positions, which they always keep; our ``input`` is
    both (between runs of equal length positions replace themselves). Their MLP's output holds
    b_out, ours not: no difference where the replacement has it, too. Their share divides by the gap
    between the clean and the *corrupted* run also for ``mean``, ours by that to everything ablated:
    the ablated measures are compared, and the shares with ``corrupt``. Their mean is over other
    prompts, our ``mean_over``.
    """
    model, clean, corrupted = CASES[name].model(), tokens(1), corrupt()
    config = peer.FaithfulnessConfig(ablation=ablation)
    held_out = {"mean_tokens": tokens(5, seed=9)} if ablation == "mean" else {}
    ours_only = (
        {"ablation": "mean", "mean_over": tokens(5, seed=9)}
        if ablation == "mean"
        else {"corrupted": corrupted}
    )

    def metric(logits):
        return logits[0, -1, 3] - logits[0, -1, 4]

    with quiet():
        names = peer._edge_hook_names(model.cfg.n_layers)
        with torch.no_grad(), peer._edge_hook_flags(model):
            cache = peer.cache_activation_and_gradient(model, clean, metric, names, False)
            graph = peer.enumerate_edges(model, cache)
        edges = list(dict.fromkeys(whole_of(a, b) for a, b in graph))
        universe = set(edge_universe(model))
        assert set(edges) == universe
        moved = []
        for share, seed in ((0.2, 0), (0.6, 1), (0.95, 2)):
            drawn = torch.rand(len(edges), generator=torch.Generator().manual_seed(seed)) < share
            circuit = [edge for edge, kept in zip(edges, drawn.tolist(), strict=True) if kept]
            kept = [pair for edge in circuit for pair in positions_of(edge, graph)]
            theirs = peer.faithfulness(model, clean, corrupted, metric, kept, config, **held_out)
            ours = faithfulness(model, clean, circuit, target=3, versus=4, **ours_only)
            gap = theirs.full_metric - theirs.corrupt_metric
            ablated = theirs.corrupt_metric + theirs.recovered * gap
            assert float(ours.full[0]) == pytest.approx(theirs.full_metric, abs=ORACLE)
            assert float(ours.circuit[0]) == pytest.approx(ablated, abs=ORACLE)
            if ablation == "corrupt":
                assert ours.share == pytest.approx(theirs.recovered, abs=ORACLE)
            assert (theirs.circuit_size, theirs.total_edges) == (
                len(circuit) * clean.shape[1],
                len(edges) * clean.shape[1],
            )
            moved.append(ablated)
    assert max(moved) - min(moved) > 1e-2


def edge_universe(model):
    with edge_model(model) as edged:
        return edged.universe.edges


@pytest.mark.offered(hasattr(peer, "enumerate_edges"))
@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-neox", "bridge-neox-sequential"])
def test_eap_is_the_hosts_attribution_patching(name):
    """Query and key edges included. Their gradient is at the second prompt, ours at the first."""
    model, clean, corrupted = CASES[name].model(), tokens(1), corrupt()
    config = peer.EdgeAttributionConfig(granularity="edge")
    with quiet():
        theirs = peer.attribution_patch(
            model, corrupted, clean, lambda logits: logits[0, -1, 3] - logits[0, -1, 4], config
        ).edge_scores
        ours = score_edges(model, clean, corrupted, target=3, versus=4)
    sums: dict[Edge, float] = {}
    for (src, dest), score in theirs.items():
        edge = whole_of(src, dest)
        sums[edge] = sums.get(edge, 0.0) - score
    assert max(abs(s) for e, s in sums.items() if e.dest.name in ("q", "k")) > 1e-3
    for edge, score in sums.items():
        assert ours[edge] == pytest.approx(score, abs=ORACLE), str(edge)
