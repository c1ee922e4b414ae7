"""Our numbers against TransformerLens's own: direct logit attribution, attribution patching."""

import contextlib

import pytest
import torch
from helpers import ALL, CASES, quiet, tokens

import tensorlens_tl
from tensorlens_tl import Edge, Node

try:
    from transformer_lens.tools.analysis import attribution_patching as peer
except ImportError:  # before transformer_lens 4
    peer = None

FOLDED = [
    c for c in ALL if c.name in ("hooked-gpt2-folded", "hooked-llama-folded", "bridge-gpt2-compat")
]


def corrupt():
    ids = tokens(1)
    ids[:, 2:4] = tokens(1, seed=1)[:, 2:4]
    return ids


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
    assert (torch.stack(own) - theirs).abs().max() <= 1e-10 * theirs.abs().max()


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
            assert abs(score) <= 1e-10 * scale, str(edge)
        else:
            assert abs(score - ours[edge]) <= 1e-10 * scale, str(edge)
