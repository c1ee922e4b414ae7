"""Circuits of SmolLM2-135M: faithfulness at small sizes, CPR, CMD, agreement with patching, time.

    python benchmarks/real_circuits.py --keep FOLDER [--tasks TASK ...] [--until HH:MM]
    python benchmarks/real_circuits.py --keep FOLDER --merge   # the JSON, and the page of it

1. Pairs of prompts from public data in a folder (``--data``): ioi_llama.csv (hard twins: the same
   two names, the other one twice) and greater_than_data.csv of EAP-IG, nounpp_test.jsonl of
   feature-circuits. Of the last two digits of a year the model is asked for the tens, as it reads
   digit by digit: the digit above the first year's less the digit below it.
2. Every method scores all edges on some pairs; CPU time is told in forward passes of the same.
3. Circuits of .1 to 2 % of the edges are tested on other pairs, everything else resampled.
4. Whole curves on some pairs, for CPR and CMD.
5. Every head and MLP is patched, one by one, and compared with the scores of its edges.

Chunks of pairs run in turn and are kept in the folder: a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation
import resumed
import torch
from circuits import CLEAN, OURS, Pairs, Task, correlation, mean_interval, ours
from torch import Tensor

import tensorlens_tl
from tensorlens_tl import Edge, faithfulness_curve, faithfulness_of_many, score_edges
from tensorlens_tl.circuits.faithfulness_result import (
    Faithfulness,
    FaithfulnessCurve,
    share_difference,
)
from tensorlens_tl.graph.selection import select
from tensorlens_tl.passes.edge_patching import edge_model

RESULTS = Path(__file__).parent / "results" / "real_circuits.json"
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02)
TASKS = ("agreement", "indirect object", "greater-than")
EAP_IG = "eap_ig"
N_FIND, CHUNK, N_TEST = 16, 10, 100


# --- Pairs ---------------------------------------------------------------------------------------


def pairs(model: Any, data: Path, task: str) -> Pairs:
    """All pairs of a task whose twins have as many tokens and whose answers are single tokens."""
    text, rows = data / "text", []
    if task == "agreement":
        for line in (text / "sva" / "nounpp_test.jsonl").read_text().splitlines():
            one = json.loads(line)
            rows.append(
                [one[k] for k in ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")]
            )
    elif task == "indirect object":
        with (text / "circuits" / "ioi_llama.csv").open() as file:
            for one in csv.DictReader(file):
                words = zip(one["clean"].split(), one["corrupted_hard"].split(), strict=True)
                ((giver, other),) = [(a, b) for a, b in words if a != b]
                rows.append([one["clean"], one["corrupted_hard"], f" {other}", f" {giver}"])
    else:
        with (text / "circuits" / "greater_than_data.csv").open() as file:
            for one in csv.DictReader(file):
                tens = int(one["label"][0])
                if 1 <= tens <= 8:
                    rows.append([one["clean"], one["corrupted"], str(tens + 1), str(tens - 1)])
    found, seen = Pairs([], [], [], []), set()
    for clean, twin, *words in rows:
        ids = [model.to_tokens(one)[0] for one in (clean, twin)]
        said = [model.tokenizer.encode(word, add_special_tokens=False) for word in words]
        if clean in seen or len(ids[0]) != len(ids[1]) or any(len(one) != 1 for one in said):
            continue
        seen.add(clean)
        for into, value in zip(vars(found).values(), (*ids, said[0][0], said[1][0]), strict=True):
            into.append(value)
    drawn = torch.randperm(len(seen), generator=torch.Generator().manual_seed(evaluation.SEED))
    return some(found, drawn.tolist())


def some(of: Pairs, chosen: Any) -> Pairs:
    """Some of the pairs, by their numbers."""
    return Pairs(*([part[i] for i in chosen] for part in vars(of).values()))


# --- Steps 2 to 5 --------------------------------------------------------------------------------


def methods(model: Any, find: Pairs) -> dict[str, Callable[[], dict[Edge, float]]]:
    """Every way to score edges."""
    task, goal = Task("", model, find, find), find.goal

    def by(method: str) -> Callable[[], dict[Edge, float]]:
        return lambda: score_edges(model, find.clean, method=method, progress=False, **goal)

    return {
        OURS: lambda: ours(task),
        CLEAN: lambda: ours(task, at="clean"),
        "eap": by("eap"),
        EAP_IG: by(EAP_IG),
        "random": by("random"),
    }


def forward(model: Any, prompts: list[Tensor]) -> float:
    """CPU seconds of a forward pass of prompts, those of one length in a batch."""
    start = time.process_time()
    with torch.no_grad():
        for n in sorted({len(one) for one in prompts}):
            model(torch.stack([one for one in prompts if len(one) == n]))
    return time.process_time() - start


def found(model: Any, of: Pairs) -> dict[str, Any]:
    """Step 2: scores, and the circuits that they select."""
    find = of.first(N_FIND)
    with edge_model(model) as edged:
        wiring = edged.universe.wiring
    total = len(wiring.edges())
    counts = {str(size): max(1, round(size * total)) for size in SIZES}
    forward(model, find.clean)
    result: dict[str, Any] = {"n_find": len(find.clean), "n_total": total, "methods": {}}
    for name, run in methods(model, find).items():
        plain, start = forward(model, find.clean), time.process_time()
        scores = run()
        spent = time.process_time() - start
        plain = (plain + forward(model, find.clean)) / 2
        circuits = {
            size: [str(edge) for edge in select(scores, wiring, n, None, "greedy")]
            for size, n in counts.items()
        }
        result["methods"][name] = {
            "forwards": spent / plain,
            "circuits": circuits,
            "scores": {str(edge): float(f"{value:.4g}") for edge, value in scores.items()},
        }
    return result


def tested(model: Any, of: Pairs, before: dict[str, Any]) -> dict[str, Any]:
    """Step 3: the measure of every pair in every circuit's run."""
    circuits = {
        f"{size} {name}": edges
        for name, one in before["methods"].items()
        for size, edges in one["circuits"].items()
    }
    runs = faithfulness_of_many(model, of.clean, circuits, progress=False, **of.goal)
    one = next(iter(runs.values()))
    kept = {"full": one.full.tolist(), "ablated": one.ablated.tolist()}
    return kept | {"circuits": {name: run.circuit.tolist() for name, run in runs.items()}}


def curves(model: Any, of: Pairs, before: dict[str, Any]) -> dict[str, Any]:
    """Step 4: the measure of every pair at every size, by signed and by absolute scores."""
    rows = {}
    for name, one in before["methods"].items():
        scores = {Edge.parse(edge): value for edge, value in one["scores"].items()}
        curve = faithfulness_curve(model, of.clean, scores, progress=False, **of.goal)
        kept = ("full", "ablated", "signed", "absolute")
        rows[name] = {part: getattr(curve, part).tolist() for part in kept}
        rows[name] |= {"sizes": curve.sizes, "n_edges": curve.n_edges, "n_total": curve.n_total}
    return rows


def patched(model: Any, of: Pairs, before: dict[str, Any]) -> dict[str, float]:
    """Step 5: for one pair, Pearson's correlation over heads and MLPs, by method.

    Truth: the measure when a node's clean output is put into the twin's run, at all positions, less
    the twin's. Estimate: what the scores of the node's edges, of this pair alone, sum to.
    """
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    clean, twin = of.clean[0], of.corrupted[0]
    names = [f"blocks.{i}.attn.hook_z" for i in range(layers)]
    mlps = [f"blocks.{i}.hook_mlp_out" for i in range(layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean[None], names_filter=lambda n: n in names + mlps)

        def patch(name: str, row: int, by_head: bool) -> Any:
            def hook(t: Tensor, hook: Any) -> Tensor:
                t = t.clone()
                for k in range(heads) if by_head else [0]:
                    if by_head:
                        t[row + k, :, k] = cache[name][0, :, k]
                    else:
                        t[row] = cache[name][0]
                return t

            return name, hook

        hooks = [patch(name, heads * i, True) for i, name in enumerate(names)]
        hooks += [patch(name, layers * heads + i, False) for i, name in enumerate(mlps)]
        rows = layers * (heads + 1) + 1
        with model.hooks(fwd_hooks=hooks):
            last = model(twin.expand(rows, -1))[:, -1]
        values = last[:, of.target[0]] - last[:, of.versus[0]]
    truth = (values - values[-1])[:-1].double()
    nodes = [f"L{i}H{k}" for i in range(layers) for k in range(heads)]
    nodes += [f"L{i}MLP" for i in range(layers)]
    result = {}
    for name, run in methods(model, of).items():
        sums = dict.fromkeys(nodes, 0.0)
        for edge, score in run().items():
            if str(edge.src) in sums:
                sums[str(edge.src)] += score
        assert len(sums) == len(nodes) == len(truth)
        if name != "random":
            result[name] = correlation(truth, torch.tensor(list(sums.values())).double())
    return result


# --- Running -------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """All steps of all tasks in turn, until the time is over or all is done."""
    load = tensorlens_tl.load_model
    model = load(args.model) if args.model else tensorlens_tl.models.smollm2()
    # 1. Pairs.
    of = {task: pairs(model, args.data, task) for task in args.tasks}
    jobs: list[tuple[str, str, int, int]] = [("found", task, 0, 0) for task in args.tasks]
    chunks = [(i, min(CHUNK, args.tests - i)) for i in range(0, args.tests, CHUNK)]
    for k, (i, n) in enumerate(chunks):
        jobs += [("tested", task, i, n) for task in args.tasks]
        jobs += [("curves", task, i, n) for task in args.tasks if k < args.curves]
        jobs += [
            ("patched", task, j, 1)
            for task in args.tasks
            for j in range(args.patched * k // 2, args.patched * (k + 1) // 2)
            if k < 2
        ]
    steps = {"tested": tested, "curves": curves, "patched": patched}
    # 2. to 5. Each of them, unless the folder has it.
    for step, task, i, n in jobs:
        path = args.keep / f"{task}, {step} {i}.json"
        if path.exists():
            continue
        start = time.process_time()
        if step == "found":
            result: Any = found(model, of[task])
        else:
            before = json.loads((args.keep / f"{task}, found 0.json").read_text())
            chosen = range(N_FIND + i, N_FIND + i + n)
            result = steps[step](model, some(of[task], chosen), before)
        if resumed.keep(path, json.dumps(result), f"{n}", start, args.until):
            return


# --- Merging -------------------------------------------------------------------------------------


def merged(folder: Path) -> dict[str, Any]:
    """What makes the page: shares with intervals and differences, areas, correlations, times."""
    result: dict[str, Any] = {"sizes": SIZES, "wanted": N_TEST, "tasks": {}}
    for task in TASKS:
        kept: dict[str, list[Any]] = {}
        for step in ("found", "tested", "curves", "patched"):
            paths = folder.glob(f"{task}, {step} *.json")
            paths = sorted(paths, key=lambda path: int(path.stem.rpartition(" ")[2]))
            kept[step] = [json.loads(path.read_text()) for path in paths]
        if not kept["tested"]:
            continue
        (before,) = kept["found"]
        names = list(before["methods"])
        full, ablated = (
            torch.tensor([v for one in kept["tested"] for v in one[part]]).double()
            for part in ("full", "ablated")
        )
        row: dict[str, Any] = {
            "n_find": before["n_find"],
            "n_total": before["n_total"],
            "n_test": len(full),
            "right": float((full > 0).double().mean()),
            "full": float(full.mean()),
            "ablated": float(ablated.mean()),
            "forwards": {name: before["methods"][name]["forwards"] for name in names},
            "shares": {},
            "areas": {},
            "patched": {},
        }
        for size in SIZES:
            runs = {}
            for name in names:
                values = [v for one in kept["tested"] for v in one["circuits"][f"{size} {name}"]]
                n_edges = len(before["methods"][name]["circuits"][str(size)])
                about = torch.tensor(values).double(), "resample", "live", n_edges
                runs[name] = Faithfulness(full, ablated, ablated, *about, before["n_total"])
            cells = {n: {"share": r.share, "interval": r.interval} for n, r in runs.items()}
            for other in (EAP_IG, "eap", CLEAN):
                value, interval = share_difference(runs[OURS], runs[other])
                cells[OURS][f"minus {other}"] = {"share": value, "interval": interval}
            row["shares"][str(size)] = cells
        for name in names if kept["curves"] else []:
            parts = [one[name] for one in kept["curves"]]
            tensors = [
                torch.cat([torch.tensor(part[key]).double() for part in parts], -1)
                for key in ("full", "ablated", "signed", "absolute")
            ]
            at = tuple(parts[0]["sizes"]), tuple(parts[0]["n_edges"])
            curve = FaithfulnessCurve(*at, *tensors, "resample", "live", parts[0]["n_total"])
            row["areas"][name] = {
                "n": len(tensors[0]),
                "cpr": [curve.cpr, *curve.cpr_interval],
                "cmd": [curve.cmd, *curve.cmd_interval],
            }
        for name in kept["patched"][0] if kept["patched"] else []:
            row["patched"][name] = mean_interval([one[name] for one in kept["patched"]])
        result["tasks"][task] = row
    return result


def main() -> None:
    parser = resumed.arguments(__doc__, "what was measured")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--curves", type=int, default=10, help="chunks that have whole curves")
    parser.add_argument("--patched", type=int, default=8, help="pairs whose nodes are patched")
    parser.add_argument("--tests", type=int, default=N_TEST, help="pairs to test on")
    args = parser.parse_args()
    resumed.measure_or_merge(args, run, merged, RESULTS)


if __name__ == "__main__":
    main()
