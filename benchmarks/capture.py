"""What a capture costs, beside a plain forward pass and beside the peers' way.

``python benchmarks/capture.py [--rounds 15] [--threads 1] [--pos 128]``

1. Build a model of GPT-2-small's shape with random weights, under each host class.
2. Time all contenders in turn, once a round. The peers' way is one forward pass with pattern, scale
   and gate detached by hooks, and one backward pass to the first residual.
3. Print medians of the per-round ratios to the plain forward pass, with quartiles, beside their
   bars; what a capture stores; and how far it is from the peers' numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings

import torch
from timing import interleave, ratio

import tensorlens_tl
from tensorlens_tl.recording import self_check as selfcheck

SHAPE = {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_mlp": 3072, "d_vocab": 50257}
BARS = {
    "capture": 1.15,
    "capture, first time": 1.2,
    "capture + attribution": 1.9,
}


def hooked():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(
        HookedTransformerConfig(
            **SHAPE,
            n_ctx=1024,
            d_head=64,
            act_fn="gelu_new",
            normalization_type="LN",
            seed=0,
            device="cpu",
        )
    ).eval()


def bridge():
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_ctx=1024)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(config).eval()
    return build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config, tokenizer=None)


def peers_way(model, ids):
    """Token attribution by autograd through the frozen graph: forward + backward, all hooks on."""
    kept = {}

    def detach(t, hook):
        return t.detach()

    def keep(name):
        return lambda t, hook: kept.__setitem__(name, t)

    def start(t, hook):
        kept["x"] = t.detach().requires_grad_()
        return kept["x"]

    hooks = [("blocks.0.hook_resid_pre", start), ("ln_final.hook_scale", detach)]
    for layer in range(SHAPE["n_layers"]):
        block = f"blocks.{layer}"
        hooks += [(f"{block}.{n}.hook_scale", detach) for n in ("ln1", "ln2")]
        hooks.append((f"{block}.attn.hook_pattern", detach))
        pre = f"{block}.mlp.hook_pre"
        hooks.append((pre, keep(pre)))
        hooks.append(
            (
                f"{block}.mlp.hook_post",
                lambda t, hook, p=pre: (t / kept[p]).nan_to_num().detach() * kept[p],
            )
        )
    with torch.enable_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=hooks)
        (g,) = torch.autograd.grad(logits[0, -1, 7] - logits[0, -1, 8], kept["x"])
    return (g * kept["x"]).sum(-1)


def bench(name, model, ids, rounds):
    for p in model.parameters():
        p.requires_grad_(False)

    def capture():
        return tensorlens_tl.capture(model, ids)[1]

    def first():
        selfcheck._products.clear()
        return capture()

    def attribute():
        lens = capture()
        return lens.attribute(7, 8), lens.attribute(7, 8, by="component")

    # 2. Contenders, in turn.
    contenders = {
        "plain forward": lambda: model(ids, return_type="logits"),
        "itself": lambda: model(ids, return_type="logits"),
        "run_with_cache, all": lambda: model.run_with_cache(ids),
        "capture, first time": first,
        "capture": capture,
        "capture + attribution": attribute,
        "peers: frozen autograd": lambda: peers_way(model, ids),
    }
    with torch.no_grad():
        lens, times = capture(), interleave(contenders, rounds)
        peer = peers_way(model, ids)
        ours = lens.attribute(7, 8)
        embedded = [i for i, s in enumerate(ours.sources) if s.node.kind in ("embed", "pos_embed")]
        tokens = ours.values[0, embedded].unflatten(0, (2, -1)).sum(0)
    # 3. Ratios, memory and the peers' numbers.
    print(f"\n{name}: {len(ids[0])} tokens, {rounds} rounds, {torch.get_num_threads()} thread(s)")
    print(f"{'':26}{'ratio to plain':>15}{'quartiles':>16}   bar")
    ok = True
    for label in contenders:
        if label == "plain forward":
            continue
        middle, low, high = ratio(times, label, "plain forward")
        bar = BARS.get(label)
        verdict = "" if bar is None else f"≤ {bar}  {'ok' if middle <= bar else 'MISSED'}"
        ok &= bar is None or middle <= bar
        print(f"{label:26}{middle:15.3f}{low:9.3f}–{high:.3f}   {verdict}")
    c = lens.capture
    n, pos = SHAPE["n_layers"], ids.shape[1]
    budget = n * (SHAPE["n_heads"] * pos**2 + 2 * pos + pos * SHAPE["d_mlp"]) + pos
    budget += 2 * n * pos * SHAPE["d_model"] + 2 * pos * SHAPE["d_model"]
    stored = c.nbytes / (4 * budget)
    ok &= stored <= 1.05
    print(f"stored: {c.nbytes / 2**20:.1f} MiB, {stored:.3f} of the budget (≤ 1.05)")
    print(f"capture check {c.check:.0e}, completeness error {lens.completeness_error:.0e}")
    print(
        "against the peers' numbers: "
        f"{float((tokens - peer[0]).abs().max() / peer.abs().max()):.0e}"
    )
    return ok


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pos", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    ids = torch.randint(
        0, SHAPE["d_vocab"], (1, args.pos), generator=torch.Generator().manual_seed(0)
    )
    ok = True
    # 1. The model under each host class.
    for name, build in (("HookedTransformer", hooked), ("TransformerBridge", bridge)):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                model = build()
        except ImportError:
            continue
        ok &= bench(name, model, ids, args.rounds)
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
