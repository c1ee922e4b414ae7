"""What a capture of a mixture of experts costs, beside a plain forward pass.

``python benchmarks/experts.py [--rounds 15] [--threads 1] [--pos 128]``

1. Build a model of Mixtral's shape, small: 8 experts of which each token meets 2, random weights,
   as a Bridge.
2. Time all contenders in turn, once a round. The plain pass runs in the model's own implementation
   of experts, and one after the other ("eager") as well, as a capture runs them.
3. Print medians of the per-round ratios to the plain forward pass, with quartiles, beside their
   bars.
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

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 512,
}
BARS = {"capture": 1.2, "capture, first time": 1.3}


def bridge():
    """A Bridge around a small Mixtral."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SHAPE)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    hf = MixtralForCausalLM(config).eval()
    return build_bridge_from_module(hf, "MixtralForCausalLM", hf_config=hf.config, tokenizer=None)


def main() -> int:
    """Print the table; 1 where a bar is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pos", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    # 1. The model.
    with contextlib.redirect_stdout(io.StringIO()):
        model = bridge()
    for p in model.parameters():
        p.requires_grad_(False)
    config = model.original_model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, args.pos), generator=generator)
    own = config._experts_implementation

    # 2. Contenders, in turn.
    def plain(implementation):
        config._experts_implementation = implementation
        try:
            return model(ids, return_type="logits")
        finally:
            config._experts_implementation = own

    def capture():
        return tensorlens_tl.capture(model, ids)[1]

    def first():
        selfcheck._products.clear()
        return capture()

    contenders = {
        "plain forward": lambda: plain(own),
        "itself": lambda: plain(own),
        "plain forward, eager": lambda: plain("eager"),
        "capture, first time": first,
        "capture": capture,
    }
    with torch.no_grad():
        lens, times = capture(), interleave(contenders, args.rounds)
    # 3. Ratios and bars.
    print(f"{args.pos} tokens, {args.rounds} rounds, {args.threads} thread(s), experts: {own}")
    print(f"{'':26}{'ratio to plain':>15}{'quartiles':>16}   bar")
    ok = True
    for label in [name for name in contenders if name != "plain forward"]:
        middle, low, high = ratio(times, label, "plain forward")
        bar = BARS.get(label)
        verdict = "" if bar is None else f"≤ {bar}  {'ok' if middle <= bar else 'MISSED'}"
        ok &= bar is None or middle <= bar
        print(f"{label:26}{middle:15.3f}{low:9.3f}–{high:.3f}   {verdict}")
    middle, *_ = ratio(times, "capture", "plain forward, eager")
    print(f"capture / plain forward, eager: {middle:.3f}")
    print(f"capture check {lens.capture_check:.0e}, completeness {lens.completeness_error:.0e}")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
