"""Attention over positions without its pattern: the pull beside the gradient of fused attention.

``python benchmarks/recomputed.py [--quick] [--rounds 15] [--threads 1] [--lengths 512 … 4096]
[--medium] [--device cuda]``

1. Time exp beside exp2, where numbers are usual and where they underflow.
2. For every length, time one layer of GPT-2-small's shape (12 heads of 64), and the same with 4
   key/value heads. Everything runs once a round, and rounds are fewer at the longest lengths. The
   peer is torch's scaled-dot-product attention differentiated by its values: the graph is built
   once, outside the clock, and one backward pass is timed per probe (for 8 probes, the better of a
   loop and one pass over a batch of 8). Under grouped queries the peer takes ``enable_gqa`` or
   repeated keys and values, whichever is faster.
   a. The error, against a float64 pattern, row block by row block.
   b. Ratios: the median over rounds, with quartiles, beside the peer against itself. "At most" is
      what the ratio would be if the pull were nothing but its two products over the causal
      triangle, as fast as a large product, and its powers of 2, as fast as those of a block that
      stays in the cache. A bar above that is out of this machine's reach.
3. Two fresh processes tell their high-water marks: one pulls and pushes, one stores the pattern.
4. Compare with the bars. ``--json PATH`` keeps all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch
from timing import high_water_mark, interleave, ratio
from torch.nn.functional import scaled_dot_product_attention as fused

from tensorlens_tl.maps.batch_layout import Frame
from tensorlens_tl.maps.primitives import Mix
from tensorlens_tl.sublayers.attention_kernel import LN2, Scores
from tensorlens_tl.sublayers.recomputed_pattern import RecomputedMix

HEADS, D_HEAD, PROBES, SIDE = 12, 64, 8, 1024
BARS = {1: 3.0, PROBES: 6.0}
EXPONENTS = {"A is near 1": -8, "A underflows": -200, "A is subnormal": -98}


def exact_pull(q, k, y, kv_heads):
    """Aᵀ y in float64, for 64 queries at a time; [pos, kv_head, d_head]."""
    length = q.shape[1]
    q, y = q[0].double().transpose(0, 1), y.double().view(length, HEADS, D_HEAD).transpose(0, 1)
    k = k[0].double().transpose(0, 1).repeat_interleave(HEADS // kv_heads, 0)
    out = torch.zeros_like(k)
    for start in range(0, length, 64):
        stop = min(start + 64, length)
        s = q[:, start:stop] @ k[:, :stop].mT * D_HEAD**-0.5
        hidden = torch.arange(stop) > torch.arange(start, stop)[:, None]
        A = s.masked_fill(hidden, -torch.inf).softmax(-1)
        out[:, :stop] += A.mT @ y[:, start:stop]
    return out.unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1)


def peers(q, k, v, kv_heads):
    """Graphs of the fused attention, (output, values) by name."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = {}
    with torch.enable_grad():
        if kv_heads == HEADS:
            v = v.detach().requires_grad_()
            return {"fused": (fused(q, k, v, is_causal=True), v)}
        for name in ("enable_gqa", "repeated"):
            values = v.detach().clone().requires_grad_()
            if name == "enable_gqa":
                out = fused(q, k, values, is_causal=True, enable_gqa=True)
            else:
                n = HEADS // kv_heads
                both = (x.repeat_interleave(n, 1) for x in (k, values))
                out = fused(q, *both, is_causal=True)
            found[name] = (out, values)
    return found


def inputs(length, kv_heads):
    torch.manual_seed(0)
    frame = Frame(((0, length),), length, torch.float32, torch.get_default_device())
    q = torch.randn(1, length, HEADS, D_HEAD)
    k, v = torch.randn(2, 1, length, kv_heads, D_HEAD)
    y = torch.randn(PROBES, 1, length, HEADS * D_HEAD)
    return frame, q, k, v, y


def peak(length, what):
    """High-water mark in MiB after a pull and a push, or a stored pattern's."""
    frame, q, k, v, y = inputs(length, HEADS)
    if what != "nothing":
        mix = RecomputedMix.of(frame, q, k, Scores(D_HEAD**-0.5), D_HEAD)
        mix = Mix(frame, mix.pattern, HEADS, D_HEAD) if what == "stored" else mix
        mix.apply_t(y[0])
        mix.apply(v.flatten(2))
    return high_water_mark() / 2**20


def bench(length, kv_heads, rounds):
    frame, q, k, v, y = inputs(length, kv_heads)
    mix = RecomputedMix.of(frame, q, k, Scores(D_HEAD**-0.5), D_HEAD)
    us = y.view(PROBES, 1, length, HEADS, D_HEAD).transpose(2, 3)
    graphs = peers(q, k, v, kv_heads)

    def grad(graph, probe):
        return torch.autograd.grad(graph[0], graph[1], us[probe], retain_graph=True)[0]

    def batched(graph):
        return torch.autograd.grad(
            graph[0], graph[1], us, retain_graph=True, is_grads_batched=True
        )[0]

    contenders = {"pull 1": lambda: mix.apply_t(y[0]), f"pull {PROBES}": lambda: mix.apply_t(y)}
    for name, graph in graphs.items():
        contenders |= {
            f"1: {name}": lambda graph=graph: grad(graph, 0),
            f"1: {name} again": lambda graph=graph: grad(graph, 0),
            f"{PROBES}: {name}, loop": lambda graph=graph: [grad(graph, p) for p in range(PROBES)],
            f"{PROBES}: {name}, batched": lambda graph=graph: batched(graph),
        }
    values, heads = v.flatten(2), [x.transpose(1, 2) for x in (q, k, v)]
    gqa = kv_heads != HEADS
    square, bits = torch.randn(SIDE, SIDE), torch.rand(128, 2048) * 8 - 12
    powers = torch.empty_like(bits)
    contenders |= {
        "push": lambda: mix.apply(values),
        "fused forward": lambda: fused(*heads, is_causal=True, enable_gqa=gqa),
        "lse": lambda: RecomputedMix.of(frame, q, k, mix.scores, D_HEAD),
        "product": lambda: torch.mm(square, square),
        "power": lambda: torch.exp2(bits, out=powers),
    }
    times = interleave(contenders, rounds)
    total = {name: sum(t) for name, t in times.items()}
    # 2a. Errors.
    exact = exact_pull(q, k, y[0, 0], kv_heads)
    ours = mix.apply_t(y[0])[0].view_as(exact)
    theirs = grad(next(iter(graphs.values())), 0)[0].transpose(0, 1)
    errors = [float((x - exact).abs().max() / exact.abs().max()) for x in (ours, theirs)]
    kernel = type(next(iter(graphs.values()))[0].grad_fn).__name__
    print(
        f"\n{length} tokens, {HEADS} heads, {kv_heads} key/value heads; {rounds} rounds; {kernel}"
    )
    row = {"length": length, "kv_heads": kv_heads, "rounds": rounds, "kernel": kernel}
    # 2b. Ratios.
    for probes in (1, PROBES):
        names = [n for n in times if n.startswith(f"{probes}:") and not n.endswith("again")]
        peer = min(names, key=total.__getitem__)
        middle, low, high = ratio(times, peer, f"pull {probes}")
        seconds = sorted(times[f"pull {probes}"])[rounds // 2]
        flops = HEADS * length**2 * (D_HEAD + 1 + probes * D_HEAD)
        rate = flops / seconds / 1e9
        speed = 2 * SIDE**3 / sorted(times["product"])[rounds // 2] / 1e9
        numbers = HEADS * length**2 / 2 / bits.numel()
        times[f"least {probes}"] = [
            product * flops / (2 * SIDE**3) + power * numbers
            for product, power in zip(times["product"], times["power"], strict=True)
        ]
        most = ratio(times, peer, f"least {probes}")[0]
        row[f"pull {probes}"], row[f"most {probes}"] = (middle, low, high), most
        print(
            f"  pull, {probes} probe(s): {seconds * 1e3:8.1f} ms, {rate:.0f} Gflop/s "
            f"({rate / speed:.0%} of a large product's), "
            f"{middle:5.2f}× ({low:.2f}–{high:.2f}) faster than "
            f"{peer[3:]}, {most:.1f}× at most; bar {BARS[probes]:g}  "
            f"{'ok' if middle >= BARS[probes] else 'MISSED'}"
        )
    peer = min(graphs, key=lambda name: total[f"1: {name}"])
    for label, a, b in (
        ("the peer against itself", f"1: {peer} again", f"1: {peer}"),
        ("the fused forward over the push", "fused forward", "push"),
        ("keeping q, k, lse over the fused forward", "lse", "fused forward"),
    ):
        row[label] = middle, low, high = ratio(times, a, b)
        print(f"  {label}: {middle:.2f} ({low:.2f}–{high:.2f})")
    print(f"  error against float64: {errors[0]:.0e}, the peer's {errors[1]:.0e}")
    return {**row, "error": errors[0], "error of the peer": errors[1]}


def power_ratio(low, rounds):
    """Times of exp over exp2's for the same block of A, exponents in [low, low + 8)."""
    x = torch.rand(128, 2048) * 8 + low
    bits, out = x / LN2, torch.empty_like(x)
    calls = {"exp": lambda: torch.exp(x, out=out), "exp2": lambda: torch.exp2(bits, out=out)}
    return ratio(interleave(calls, rounds), "exp", "exp2")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--quick", action="store_true", help="5 rounds, up to 1024 tokens")
    parser.add_argument(
        "--medium", action="store_true", help="torch's faster kernels on both sides"
    )
    parser.add_argument("--device", default="cpu", help="where all of it runs")
    parser.add_argument("--json", help="where to write the table")
    parser.add_argument("--peak", nargs=2, metavar=("LENGTH", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.set_default_device(args.device)
    torch.set_float32_matmul_precision("medium" if args.medium else "highest")
    if args.peak:
        print(peak(int(args.peak[0]), args.peak[1]))
        return 0
    if args.quick:
        args.rounds, args.lengths = 5, [n for n in args.lengths if n <= 1024]
    print(f"{args.device}, matmul precision {torch.get_float32_matmul_precision()}")
    # 1. Powers.
    powers = {where: power_ratio(low, args.rounds) for where, low in EXPONENTS.items()}
    said = "; ".join(
        f"{m:.2f} ({a:.2f}–{b:.2f}) where {where}" for where, (m, a, b) in powers.items()
    )
    print(f"exp over exp2, time: {said}")
    rows = []
    # 2. Every length, with and without groups.
    for length in args.lengths:
        for kv_heads in (HEADS, 4):
            rounds = max(5, args.rounds * 1024 // length) if length > 1024 else args.rounds
            rows.append(bench(length, kv_heads, rounds))
    # 3. Memory.
    length = args.lengths[-1]
    marks = {
        what: float(
            subprocess.run(
                [sys.executable, __file__, "--peak", str(length), what, "--device", args.device],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for what in ("nothing", "recomputed", "stored")
    }
    size = HEADS * length**2 * 4 / 2**20
    print(f"\nmemory beyond the inputs at {length} tokens (the pattern has {size:.0f} MiB):")
    for what in ("recomputed", "stored"):
        print(f"  {what}: {marks[what] - marks['nothing']:.0f} MiB")
    # 4. Bars.
    small = marks["recomputed"] - marks["nothing"] < size / 4 or length < 1024
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": rows, "MiB": marks, "exp over exp2": powers}, file, indent=1)
    bars = all(row[f"pull {n}"][0] >= bar for row in rows for n, bar in BARS.items())
    return 0 if bars and small else 1


if __name__ == "__main__":
    raise SystemExit(main())
