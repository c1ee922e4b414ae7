"""What a capture of an encoder costs, beside a plain forward pass.

``python benchmarks/encoders.py [--rounds 15] [--threads 1]``

ViT-Base (224 pixels, patches of 16, 197 rows) and BERT-Base (128 tokens), random weights. Every
contender runs once a round. The table shows the median of the per-round ratios to the plain
forward pass, with quartiles, and a plain pass against itself.

1. Build the models as Bridges.
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


def vit():
    """A model of ViT-Base's shape, and a picture."""
    from transformers import ViTConfig, ViTForImageClassification

    pictures = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return ViTForImageClassification(ViTConfig(num_labels=1000)), pictures


def bert():
    """A model of BERT-Base's shape, and a prompt."""
    from transformers import BertConfig, BertForMaskedLM

    ids = torch.randint(3, 30000, (1, 128), generator=torch.Generator().manual_seed(0))
    return BertForMaskedLM(BertConfig()), ids


def table(name, make, rounds):
    """Print the table of one model; whether its bar is met."""
    # 1.
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        plain, given = make()
        model = tensorlens_tl.wrap(plain.eval()).requires_grad_(False)
    contenders = {
        "plain forward": lambda: model(given, return_type="logits"),
        "itself": lambda: model(given, return_type="logits"),
        "capture": lambda: tensorlens_tl.capture(model, given),
        "capture + attribution": lambda: tensorlens_tl.capture(model, given)[1].attribute(7),
    }
    # 2.
    with torch.no_grad():
        times = interleave(contenders, rounds)
        lens = tensorlens_tl.capture(model, given)[1]
    # 3.
    print(f"{name}, {len(lens.tokens[0])} rows")
    print(f"{'':26}{'ratio to plain':>15}{'quartiles':>16}   bar")
    met = True
    for label in list(contenders)[1:]:
        middle, low, high = ratio(times, label, "plain forward")
        verdict = f"≤ {BAR}  {'ok' if middle <= BAR else 'MISSED'}" if label == "capture" else ""
        met &= label != "capture" or middle <= BAR
        print(f"{label:26}{middle:15.3f}{low:9.3f}–{high:.3f}   {verdict}")
    print(f"capture check {lens.capture_check:.0e}, completeness {lens.completeness_error:.0e}")
    return met


def main() -> int:
    """Print both tables; 1 where a bar is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    print(f"{args.rounds} rounds, {args.threads} thread(s)")
    met = [
        table(name, make, args.rounds) for name, make in (("ViT-Base", vit), ("BERT-Base", bert))
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
