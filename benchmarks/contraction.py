"""Blocks and token-by-token maps, beside autograd through the same frozen graph.

``python benchmarks/contraction.py [--quick] [--rounds 7] [--threads 1] [--medium] [--device cuda]
[--json FILE]``

1. Choose the cases, with random weights in float32.
2. Run ours and the peer once a round, one after the other. The peer is a plain torch graph of the
   frozen transformer, differentiated one destination at a time or by ``is_grads_batched=True``, at
   the better of its chunk sizes. Tables show medians of the per-round ratios with their quartiles,
   and ours against itself. Where the peer is slow it is timed on a sample of destinations (or of
   output directions) and scaled; "linear" is the time of the sample over twice that of its half.
   "share" is ours: flops of the plan over its time, against the rate of a [4096, D] × [D, 4D]
   product measured in the same round.
3. Count how often the intervals of estimated norms cover the truth.
4. Check plans in fresh processes: measured over predicted.
5. Fit how the time grows with the prompt.

``--medium`` prints the same with ``torch.set_float32_matmul_precision("medium")`` on both sides,
and what that costs in precision. Long attention without stored patterns has a file of its own,
``recomputed.py``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import forget_high_water_mark, high_water_mark, interleave, ratio, wait
from torch import Tensor

import tensorlens_tl


@dataclass(frozen=True)
class Case:
    """What is asked of which model: ``bar`` against the peer."""

    name: str
    layers: int
    d_model: int
    pos: int
    ask: str
    probes: int | None = None
    precision: str | None = None
    bar: float = 0.0
    sample: int = 8
    quick: bool = True


CASES = [
    Case("in_out", 12, 768, 128, "in_out", bar=2.0, sample=8, quick=False),
    Case("in_out", 4, 128, 512, "in_out", bar=3.5, sample=32),
    Case("in_out", 4, 256, 512, "in_out", bar=3.5, sample=16, quick=False),
    Case("row of blocks", 12, 768, 24, "row", bar=1.5, sample=64, quick=False),
    Case("row of blocks", 4, 256, 64, "row", sample=64),
    Case("norm", 4, 128, 64, "norm", bar=6.5, sample=4),
    Case("norm", 4, 256, 64, "norm", bar=6.5, sample=2),
    Case("norm, bfloat16", 4, 128, 64, "norm", precision="bfloat16", bar=20, sample=4),
    Case("norm, bfloat16", 4, 256, 64, "norm", precision="bfloat16", bar=20, sample=2),
    Case("norm, 4 probes", 4, 256, 64, "norm", probes=4, bar=3.0, sample=32),
    Case("norm, 16 probes", 4, 256, 64, "norm", probes=16, bar=3.5, sample=16),
    Case("norm, 64 probes", 4, 256, 64, "norm", probes=64, bar=7.0, sample=8),
]
SINGULAR = [  # plans alone: their peers would be the same pushes and pulls
    Case("svd", 4, 256, 64, "svd"),
    Case("svd", 12, 768, 128, "svd", quick=False),
    Case("svd of a row", 4, 256, 64, "svd of a row"),
    Case("svd of a block", 4, 256, 64, "svd of a block"),
    Case("svd of a block", 4, 768, 24, "svd of a block", quick=False),
    Case("spectral norm", 4, 128, 256, "spectral_norm"),
]
WHERE = {"svd of a row": {"query_pos": -1}, "svd of a block": {"query_pos": -1, "key_pos": 2}}


def has_bfloat16() -> bool:
    """Whether the device has units for bfloat16 products."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def model_of(layers: int, d_model: int, pos: int):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=layers,
        d_model=d_model,
        n_heads=d_model // 64 if d_model > 64 else 2,
        d_head=64 if d_model > 64 else d_model // 2,
        d_mlp=4 * d_model,
        d_vocab=128,
        n_ctx=pos,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=0,
        device=str(torch.get_default_device()),
    )
    model = HookedTransformer(config).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (1, pos), generator=generator, device="cpu")
    return model, ids.to(torch.get_default_device())


class FrozenGraph:
    """The peers' way: the frozen transformer as a torch graph from X to the final residual."""

    def __init__(self, model, ids: Tensor):
        _, cache = model.run_with_cache(ids)
        self.X = cache["blocks.0.hook_resid_pre"][0].detach().requires_grad_()
        with torch.enable_grad():
            x = self.X
            for layer, block in enumerate(model.blocks):
                at = f"blocks.{layer}."
                a, m = block.attn, block.mlp
                n = self._norm(x, block.ln1.w, cache[at + "ln1.hook_scale"][0])
                v = torch.einsum("pd,hde->hpe", n, a.W_V.detach())
                z = cache[at + "attn.hook_pattern"][0].detach() @ v
                x = x + torch.einsum("hpe,hed->pd", z, a.W_O.detach())
                n = self._norm(x, block.ln2.w, cache[at + "ln2.hook_scale"][0])
                pre = cache[at + "mlp.hook_pre"][0].detach()
                gate = cache[at + "mlp.hook_post"][0].detach() / pre
                x = x + ((n @ m.W_in.detach()) * gate) @ m.W_out.detach()
            self.y = self._norm(x, model.ln_final.w, cache["ln_final.hook_scale"][0])

    @staticmethod
    def _norm(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / scale.detach() * w.detach()

    def pull(self, pos: Tensor, rows: Tensor, chunk: int) -> Tensor:
        """Tᵀ of rows [n, d_model] at positions [n]: [n, pos, d_model]."""
        found = []
        for i in range(0, len(pos), chunk):
            at, u = pos[i : i + chunk], rows[i : i + chunk]
            if chunk == 1:
                found.append(
                    torch.autograd.grad(self.y[at[0]] @ u[0], self.X, retain_graph=True)[0]
                )
                continue
            g = u.new_zeros(len(at), *self.y.shape)
            g[torch.arange(len(at)), at] = u
            (back,) = torch.autograd.grad(
                self.y, self.X, g, retain_graph=True, is_grads_batched=True
            )
            found.extend(back)
        return torch.stack(found)


class Contest:
    """One case: ours, the peer on a sample, and how the sample scales."""

    def __init__(self, case: Case):
        self.case = case
        model, ids = model_of(case.layers, case.d_model, case.pos)
        with torch.no_grad():
            _, self.lens = tensorlens_tl.capture(model, ids)
        self.graph = FrozenGraph(model, ids)
        self.plan = self.lens.plan(*self.arguments()[0], **self.arguments()[1])
        L, D = case.pos, case.d_model
        y = self.graph.y.detach()
        if case.ask == "row":  # one destination, every output direction
            self.units, self.per_unit = D, 1
        else:
            self.units = L
            self.per_unit = 1 if case.ask == "in_out" else (case.probes or D)
        self.unit_y = y / y.norm(dim=-1, keepdim=True)
        self.chunk = 1

    def arguments(self):
        c = self.case
        if c.ask == "row":
            return ("block",), {"query_pos": -1, "key_pos": slice(None)}
        if c.ask in WHERE:
            return ("svd",), WHERE[c.ask]
        if c in SINGULAR:
            return (c.ask,), {}
        return (c.ask,), {"probes": c.probes, "precision": c.precision}

    def ours(self) -> Tensor:
        c = self.case
        with torch.no_grad():
            if c.ask == "row":
                return self.lens.operator.block(-1, slice(None))
            if c in SINGULAR:
                (what,), options = self.arguments()
                found = getattr(self.lens.operator, what)(**options)
                return found if what == "spectral_norm" else found.S
            return self.lens.token_matrix(c.ask, probes=c.probes, precision=c.precision).values[0]

    def sampled(self, n: int) -> Tensor:
        """Which units the peer does: spread over all of them."""
        return torch.linspace(0, self.units - 1, n).round().long()

    def peer(self, n: int | None = None) -> Tensor:
        """The peer on a sample: rows of what :meth:`ours` gives."""
        c, D = self.case, self.case.d_model
        units = self.sampled(n or c.sample)
        if c.ask == "row":
            rows = torch.eye(D)[units]
            return self.graph.pull(torch.full_like(units, c.pos - 1), rows, self.chunk)
        if c.ask == "in_out":
            back = self.graph.pull(units, self.unit_y[units], self.chunk)
            return (back * self.graph.X.detach()).sum(-1)
        k = c.probes or D
        found = []
        for i in units:
            rows = torch.eye(D)[:k]
            back = self.graph.pull(i.repeat(k), rows, self.chunk)
            found.append(back.square().sum((0, 2)).sqrt())
        return torch.stack(found)

    def choose_chunk(self) -> None:
        """The peer's better way, each tried once after a warm-up."""
        best = {}
        most = self.case.sample * self.per_unit
        for chunk in (1, 4, 8, 16, 32, 64, 128):
            if chunk > most or chunk * self.case.pos * self.case.d_model * 4 > 2**28:
                continue
            self.chunk = chunk
            n = max(1, min(self.case.sample, -(-2 * chunk // self.per_unit)))
            self.peer(1)
            wait()
            start = time.perf_counter()
            self.peer(n)
            wait()
            best[chunk] = (time.perf_counter() - start) / n
        self.chunk = min(best, key=best.__getitem__)

    def error(self) -> float:
        """Largest difference from the peer's own numbers over their largest."""
        c, ours = self.case, self.ours()
        units, theirs = self.sampled(c.sample), self.peer()
        if c.ask == "row":
            mine = ours[units] if ours.ndim == 3 else ours[0][units]
        elif c.probes:
            return math.nan  # an estimate; its intervals are checked apart
        else:
            mine = ours[units]
        return float((mine - theirs).abs().max() / theirs.abs().max())

    def run(self, rounds: int) -> dict:
        c, D = self.case, self.case.d_model
        self.choose_chunk()
        a, b = torch.randn(4096, D), torch.randn(D, 4 * D)
        half = max(1, c.sample // 2)
        times = interleave(
            {
                "ours": self.ours,
                "peer": self.peer,
                "itself": self.ours,
                "half": lambda: self.peer(half),
                "product": lambda: a @ b,
            },
            rounds,
        )
        scale = self.units / c.sample
        speedup, low, high = ratio(times, "peer", "ours")
        rate = 2 * 4096 * D * 4 * D / statistics.median(times["product"])
        return {
            "case": c.name,
            "layers": c.layers,
            "d_model": D,
            "pos": c.pos,
            "ratio": speedup * scale,
            "low": low * scale,
            "high": high * scale,
            "itself": ratio(times, "itself", "ours")[0],
            "bar": c.bar,
            "chunk": self.chunk,
            "sample": f"{c.sample}/{self.units}",
            "linear": ratio(times, "peer", "half")[0] * half / c.sample,
            "share": self.plan.flops / statistics.median(times["ours"]) / rate,
            "error": self.error(),
            "rounds": rounds,
        }


# --- Intervals, plans, exponents ------------------------------------------------------------------


def coverage(layers: int = 4, d_model: int = 64, pos: int = 32) -> dict[int, float]:
    """Share of exact norms inside the 95 % intervals, over seeds."""
    model, ids = model_of(layers, d_model, pos)
    with torch.no_grad():
        _, lens = tensorlens_tl.capture(model, ids)
        exact = lens.token_matrix("norm").values[0]
        causal = torch.ones_like(exact, dtype=torch.bool).tril()
        found = {}
        for k in (4, 16, 32):
            inside = []
            for seed in range(10):
                low, high = lens.token_matrix("norm", probes=k, seed=seed).interval()
                inside.append(((low[0] <= exact) & (exact <= high[0]))[causal].float().mean())
            found[k] = float(torch.stack(inside).mean())
    return found


def measure(case: Case, baseline: bool) -> None:
    """In a process of its own: prints seconds and the high-water mark, in bytes."""
    contest = Contest(case)
    arguments, options = contest.arguments()
    small = torch.randn(64, 64)
    _ = small @ small
    start = time.perf_counter()
    plan = contest.lens.plan(*arguments, **options)
    again = time.perf_counter() - start
    del contest.graph
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    forget_high_water_mark()
    start = time.perf_counter()
    if not baseline:
        contest.ours()
        wait()
    seconds, peak = time.perf_counter() - start, high_water_mark()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak": peak,
                "plan_seconds": plan.seconds,
                "plan_peak": plan.peak_bytes,
                "again": again,
            }
        )
    )


def plan_row(case: Case) -> dict:
    def fresh(*more: str) -> dict:
        index = str((CASES + SINGULAR).index(case))
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--measure",
                index,
                *more,
                "--threads",
                str(torch.get_num_threads()),
                "--device",
                str(torch.get_default_device()),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    full, baseline = fresh(), fresh("--baseline")
    return {
        "case": case.name,
        "d_model": case.d_model,
        "pos": case.pos,
        "memory": (full["peak"] - baseline["peak"]) / full["plan_peak"],
        "MiB": (full["peak"] - baseline["peak"]) / 2**20,
        "time": full["seconds"] / full["plan_seconds"],
    }


def calibration() -> float:
    """Seconds of a plan whose rates were not measured before."""
    from tensorlens_tl.costs import machine_rates

    lens = Contest(CASES[0]).lens
    machine_rates._measured.cache_clear()
    start = time.perf_counter()
    lens.plan("in_out")
    return time.perf_counter() - start


def exponents(rounds: int, quick: bool) -> dict[str, float]:
    """Slopes of log time over log size: in_out over L at D = 128, and over layers at L = 128."""

    def slope(xs: list[int], runs: list[Callable]) -> float:
        times = interleave({str(x): run for x, run in zip(xs, runs, strict=True)}, rounds)
        ys = [math.log(statistics.median(times[str(x)])) for x in xs]
        logs = [math.log(x) for x in xs]
        return statistics.linear_regression(logs, ys).slope

    lengths = [32, 64, 128, 256] if quick else [32, 64, 128, 256, 512]
    depths = [2, 4, 8, 16]
    by_length = [Contest(Case("", 4, 128, n, "in_out")).ours for n in lengths]
    by_depth = [Contest(Case("", n, 128, 128, "in_out")).ours for n in depths]
    return {"length": slope(lengths, by_length), "layers": slope(depths, by_depth)}


# --- Tables ---------------------------------------------------------------------------------------


def show(rows: list[dict]) -> bool:
    print(
        f"{'':18}{'D':>5}{'L':>5}{'nl':>4}{'peer/ours':>11}{'quartiles':>14}{'bar':>6}"
        f"{'itself':>8}{'chunk':>7}{'sample':>9}{'linear':>8}{'share':>8}{'error':>9}"
    )
    ok = True
    for r in rows:
        met = r["ratio"] >= r["bar"]
        ok &= met
        verdict = "" if not r["bar"] else "  ok" if met else "  MISSED"
        print(
            f"{r['case']:18}{r['d_model']:5}{r['pos']:5}{r['layers']:4}{r['ratio']:11.2f}"
            f"{r['low']:8.2f}–{r['high']:<5.2f}{r['bar'] or '':>6}{r['itself']:8.2f}{r['chunk']:7}"
            f"{r['sample']:>9}{r['linear']:8.2f}{r['share']:8.0%}{r['error']:9.0e}{verdict}"
        )
    return ok


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smaller cases, fewer rounds")
    parser.add_argument("--medium", action="store_true", help="a second table, faster kernels")
    parser.add_argument("--device", default="cpu", help="where all of it runs")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--json")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--baseline", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    if args.measure is not None:
        measure((CASES + SINGULAR)[args.measure], args.baseline)
        return 0
    rounds = 3 if args.quick else args.rounds

    # 1. The cases.
    def chosen(cases: list[Case]) -> list[Case]:
        cases = [c for c in cases if c.quick or not args.quick]
        return [c for c in cases if args.only is None or args.only in f"{c.name} {c.d_model}"]

    cases = chosen(CASES)
    if not has_bfloat16():
        print("no units for bfloat16 products here: those cases are left out")
        cases = [c for c in cases if c.precision is None]
    report: dict = {"torch": torch.__version__, "threads": args.threads, "rounds": rounds}
    ok = True
    # 2. Ours beside the peer.
    for kernel in ["highest", *(["medium"] if args.medium else [])] if cases else []:
        torch.set_float32_matmul_precision(kernel)
        rows = []
        for case in cases:
            print(f"… {case.name} D={case.d_model} ({kernel})", file=sys.stderr, flush=True)
            rows.append(Contest(case).run(rounds))
        print(
            f"\nAgainst frozen autograd: float32, matmul precision {kernel}, {rounds} rounds, "
            f"{args.threads} thread(s), {args.device}"
        )
        met = show(rows)
        ok &= met or kernel == "medium"
        report[kernel] = rows
    torch.set_float32_matmul_precision("highest")
    if args.only is None:
        # 3. Intervals of estimated norms.
        report["coverage"] = coverage()
        print(
            "\n95 % intervals cover:",
            ", ".join(f"k={k} {v:.2f}" for k, v in report["coverage"].items()),
        )
        ok &= min(report["coverage"].values()) >= 0.9
    # 4. Plans.
    report["calibration"] = calibration()
    print(f"\nA plan's calibration: {report['calibration']:.2f} s (≤ 0.3)")
    report["plans"] = [plan_row(case) for case in cases + chosen(SINGULAR)]
    print(f"{'measured / planned':18}{'D':>5}{'L':>5}{'memory':>8}{'MiB':>8}{'time':>7}")
    for r in report["plans"]:
        good = 0.75 <= r["memory"] <= 1.25 and 1 / 1.5 <= r["time"] <= 1.5
        ok &= good
        print(
            f"{r['case']:18}{r['d_model']:5}{r['pos']:5}{r['memory']:8.2f}{r['MiB']:8.0f}"
            f"{r['time']:7.2f}{'' if good else '  MISSED'}"
        )
    if args.only is None:
        # 5. Growth with the prompt.
        report["exponents"] = exponents(rounds, args.quick)
        print(
            "\nExponents of in_out:",
            ", ".join(f"{k} {v:.2f}" for k, v in report["exponents"].items()),
        )
    if args.json:
        with open(args.json, "w") as f:
            json.dump(report, f, indent=1)
    print(f"\nhigh-water mark {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
