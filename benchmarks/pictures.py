"""What a capture of a picture costs, beside a plain forward pass.

``python benchmarks/pictures.py [--rounds 15] [--threads 1]``

ViT-Base shapes (224 pixels, patches of 16, 197 rows) with random weights. Every contender runs once
a round. The table shows the median of the per-round ratios to the plain forward pass, with
quartiles, and a plain pass against itself.

1. Build the model as a Bridge.
2. Time the contenders, interleaved.
3. Print the ratios beside their bar.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings

import torch
from timing import interleave, ratio

import tensorlens_tl

BAR = 1.2


def bridge():
    """A Bridge of ViT-Base's shape."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    return tensorlens_tl.wrap(model).requires_grad_(False)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    # 1.
    with contextlib.redirect_stdout(io.StringIO()):
        model = bridge()
    pictures = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    contenders = {
        "plain forward": lambda: model(pictures, return_type="logits"),
        "itself": lambda: model(pictures, return_type="logits"),
        "capture": lambda: tensorlens_tl.capture(model, pictures),
        "capture + attribution": lambda: tensorlens_tl.capture(model, pictures)[1].attribute(7),
    }
    # 2.
    with torch.no_grad():
        times = interleave(contenders, args.rounds)
        lens = tensorlens_tl.capture(model, pictures)[1]
    # 3.
    print(f"ViT-Base, {len(lens.tokens[0])} rows, {args.rounds} rounds, {args.threads} thread(s)")
    print(f"{'':26}{'ratio to plain':>15}{'quartiles':>16}   bar")
    ok = True
    for label in list(contenders)[1:]:
        middle, low, high = ratio(times, label, "plain forward")
        verdict = f"≤ {BAR}  {'ok' if middle <= BAR else 'MISSED'}" if label == "capture" else ""
        ok &= label != "capture" or middle <= BAR
        print(f"{label:26}{middle:15.3f}{low:9.3f}–{high:.3f}   {verdict}")
    print(f"capture check {lens.capture_check:.0e}, completeness {lens.completeness_error:.0e}")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
