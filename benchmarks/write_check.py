"""What it costs a lens to tell whether the weights were written to, beside a plain forward pass.

``python benchmarks/write_check.py [--rounds 30] [--pos 128]``

1. Take the bundled model, and models of GPT-2-small's shape with random weights, and capture each.
2. A lens notes some numbers of every weight at the capture, and compares them at every question.
   Time both in turn with a forward pass.
3. Print medians of the per-round ratios, with quartiles, beside the bar.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings

import torch
from capture import bridge, hooked
from timing import interleave, ratio

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.lens import WriteCheck

BAR = 0.01
"""Largest cost of one question's comparison, as a share of a forward pass."""


def bench(name, model, ids, rounds) -> bool:
    with torch.no_grad():
        captured = tensorlens_tl.capture(model, ids)[1].capture
        tensors = captured.tensors()
        writes = WriteCheck.of(tensors)
        # 2. Timed in turn.
        contenders = {
            "plain forward": lambda: model(ids, return_type="logits"),
            "noted at the capture": lambda: WriteCheck.of(tensors),
            "compared at a question": writes.written,
        }
        times = interleave(contenders, rounds)
    # 3. Ratios and the bar.
    kept = sum(len(sample) for sample in writes.samples)
    total = sum(tensor.numel() for tensor in tensors)
    print(f"\n{name}, {ids.shape[1]} tokens: {kept} of {total} numbers of {len(tensors)} tensors")
    for label in list(contenders)[1:]:
        middle, low, high = ratio(times, label, "plain forward")
        bar = f"≤ {BAR:.0%}  {'ok' if middle <= BAR else 'MISSED'}" if "question" in label else ""
        print(f"{label:26}{middle:9.2%}  {low:7.2%} – {high:.2%}   {bar}")
    return middle <= BAR


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pos", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    generator = torch.Generator().manual_seed(0)
    # 1. The models.
    small = demo.load_model()
    ok = bench("bundled model", small, small.to_tokens("The capital of France is"), args.rounds)
    ids = torch.randint(0, 50257, (1, args.pos), generator=generator)
    for name, build in (("HookedTransformer", hooked), ("TransformerBridge", bridge)):
        with contextlib.suppress(ImportError):
            with contextlib.redirect_stdout(io.StringIO()):
                model = build()
            ok &= bench(name, model, ids, max(3, args.rounds // 10))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
