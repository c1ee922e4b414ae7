"""All node and edge scores of one target, beside a forward pass and beside the peers' way.

``python benchmarks/attribution.py [--quick] [--rounds 15] [--threads 1] [--pos 128] [--json FILE]``

1. Build a model of GPT-2-small's shape with random weights, and capture it.
2. Time all contenders in turn, once a round. Ours is every writer's output, one transposed sweep,
   and all writer → reader edges, as ``lens.attribute(by="edge")`` gives them, on a lens that has
   not been asked anything before. The peers' way is edge attribution by hooks: a forward pass with
   the query, key and value inputs split per head, one backward pass, and the same products. Every
   head's output is computed from z and W_O as ours is. With "and attn_result" the host computes and
   keeps them instead, as ``use_attn_result`` does, which is slower.
3. Print the ratios to a forward pass that stops before the unembedding, beside their bars.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import warnings

import torch
from capture import SHAPE, hooked
from timing import interleave, ratio

import tensorlens_tl

FORWARD, EDGES = "forward, no unembedding", "writers + sweep + edges"
PEERS, SLOW_PEERS = "split-qkv + backward", "  and attn_result"
BAR, PEERS_BAR = 1.15, 4.5


@contextlib.contextmanager
def split(model, results):
    """The flags under which a hook sees every head's own inputs, and its result where asked for."""
    setters = [model.set_use_split_qkv_input, model.set_use_hook_mlp_in]
    setters += [model.set_use_attn_result] * results
    try:
        for setter in setters:
            setter(True)
        yield
    finally:
        for setter in setters:
            setter(False)


def peers_way(model, ids, results=False):
    """Edge attribution: a forward pass with split inputs, one backward pass, products per layer."""
    written, read = [], []

    def writer(t, hook):
        written.append(t.detach() if t.ndim == 4 else t.detach()[:, :, None])

    def heads(t, hook):
        W_O = model.blocks[hook.layer()].attn.W_O
        written.append(torch.einsum("bqhe,hed->bqhd", t.detach(), W_O))

    def reader(t, hook):
        t.retain_grad()
        read.append((t, sum(w.shape[2] for w in written)))

    hooks = [("hook_embed", writer), ("hook_pos_embed", writer)]
    for layer in range(SHAPE["n_layers"]):
        block = f"blocks.{layer}"
        hooks += [(f"{block}.hook_{name}_input", reader) for name in "qkv"]
        hooks.append(
            (f"{block}.attn.hook_result", writer) if results else (f"{block}.attn.hook_z", heads)
        )
        hooks.append((f"{block}.hook_mlp_out", writer))
        hooks.append((f"{block}.hook_mlp_in", reader))
    # one leaf that requires a gradient is enough for a graph of activations alone
    start = ("hook_embed", lambda t, hook: t.detach().requires_grad_())
    with torch.enable_grad(), split(model, results):
        logits = model.run_with_hooks(ids, fwd_hooks=[start, *hooks])
        (logits[0, -1, 7] - logits[0, -1, 8]).backward()
    outputs = torch.cat(written, 2)[0].transpose(0, 1).flatten(1)
    scores = []
    for t, below in read:
        grad = t.grad if t.grad.ndim == 4 else t.grad[:, :, None]
        scores.append(grad[0].transpose(0, 1).flatten(1) @ outputs[:below].T)
    return scores


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pos", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--json", help="where to write the ratios")
    args = parser.parse_args()
    args.rounds = 3 if args.quick else args.rounds
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    # 1. The model, captured.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPE["d_vocab"], (1, args.pos), generator=generator)
    with contextlib.redirect_stdout(io.StringIO()):
        model = hooked()
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        _, lens = tensorlens_tl.capture(model, ids)

        # 2. Contenders, in turn.
        def several():
            fresh = lens[0]
            for by in ("token", "component", "edge"):
                fresh.attribute(7, 8, by=by)
            fresh.attribute(7, 8, by="component", effect="total")

        contenders = {
            FORWARD: lambda: model(ids, stop_at_layer=SHAPE["n_layers"]),
            "itself": lambda: model(ids, stop_at_layer=SHAPE["n_layers"]),
            "sweep (tokens)": lambda: lens[0].attribute(7, 8),
            EDGES: lambda: lens[0].attribute(7, 8, by="edge"),
            "four splits of one target": several,
            PEERS: lambda: peers_way(model, ids),
            SLOW_PEERS: lambda: peers_way(model, ids, results=True),
        }
        times = interleave(contenders, args.rounds)
        edges = lens.attribute(7, 8, by="edge")
    # 3. Ratios and bars.
    n_edges = len(edges.sources)
    print(
        f"{args.pos} tokens, {n_edges} edges, {args.rounds} rounds, "
        f"{torch.get_num_threads()} thread(s)"
    )
    print(f"{'':28}{'ratio':>10}{'quartiles':>16}   bar")
    for label in contenders:
        if label != FORWARD:
            middle, low, high = ratio(times, label, FORWARD)
            bar = f"≤ {BAR}  {'ok' if middle <= BAR else 'MISSED'}" if label == EDGES else ""
            print(f"{label:28}{middle:10.3f}{low:9.3f}–{high:.3f}   {bar}")
    faster, low, high = ratio(times, PEERS, EDGES)
    verdict = "ok" if faster >= PEERS_BAR else "MISSED"
    print(f"faster than {PEERS}: {faster:.2f} ({low:.2f}–{high:.2f})   ≥ {PEERS_BAR}  {verdict}")
    middle = ratio(times, EDGES, FORWARD)[0]
    if args.json:
        rows = {label: ratio(times, label, FORWARD) for label in contenders if label != FORWARD}
        found = {"pos": args.pos, "rounds": args.rounds, "over a forward": rows, PEERS: faster}
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
    return 0 if middle <= BAR and faster >= PEERS_BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
