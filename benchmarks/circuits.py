"""Circuits against the real model: faithfulness, agreement with patching, known circuits.

1. Score all edges on some prompts, by every method.
2. Test circuits of them on other prompts, in the model itself, everything else resampled from
   corrupted prompts. All methods are cut to the same sizes in the same way (greedy, connected).
3. Compare the scores with activation patching, node by node and head by head.
4. Where a circuit is known, tell at which size each method has found it.
5. Print the figures of the task, and keep them in benchmarks/results/circuits.json.

``--quick`` takes few prompts and writes no file.

    python benchmarks/circuits.py [--quick] [--stories FOLDER] [--only TASK]
    python benchmarks/circuits.py --page     # docs/circuits.md from the kept figures
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from patching import KINDS, Sites
from torch import Tensor

import tensorlens_tl
from tensorlens_tl import Edge, demo, faithfulness_curve, faithfulness_of_many, score_edges
from tensorlens_tl.circuits.faithfulness_result import share_difference
from tensorlens_tl.graph.selection import select
from tensorlens_tl.hosts import load_model
from tensorlens_tl.passes.edge_patching import edge_model

RESULTS = Path(__file__).parent / "results" / "circuits.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "circuits.md"
STORIES = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZES = (0.02, 0.05, 0.1)
OURS = "secant operator"
CLEAN = "clean run's operator, q and k"
AUC = "head AUC"
RANDOM_SEEDS = 3


@dataclass
class Pairs:
    """Prompts as token ids, their corrupted twins, answers and foils."""

    clean: list[Tensor]
    corrupted: list[Tensor]
    target: list[int]
    versus: list[int]

    @property
    def goal(self) -> dict[str, Any]:
        """As the library's functions take it."""
        return {"corrupted": self.corrupted, "target": self.target, "versus": self.versus}

    def first(self, n: int) -> Pairs:
        """The first n."""
        return Pairs(self.clean[:n], self.corrupted[:n], self.target[:n], self.versus[:n])


@dataclass
class Task:
    """A behaviour of a model: pairs to find circuits on, and others to test them on."""

    name: str
    model: Any
    find: Pairs
    test: Pairs


# --- Tasks ----------------------------------------------------------------------------------------


def demo_pairs(model: Any, task: str, n: int, seed: int) -> Pairs:
    """Held-out prompts of the bundled model's task."""
    drawn = demo.prompts(task, n, seed)
    ids = {
        name: [model.to_tokens(getattr(p, name))[0] for p in drawn]
        for name in ("clean", "corrupted")
    }
    words = {
        name: [
            model.tokenizer.encode(getattr(p, name), add_special_tokens=False)[-1] for p in drawn
        ]
        for name in ("answer", "foil")
    }
    return Pairs(ids["clean"], ids["corrupted"], words["answer"], words["foil"])


def lookup_pairs(model: Any, n: int, seed: int) -> Pairs:
    """Induction prompts whose twin lacks the first mention of the last word: the place is lost.

    The task's own twins change the word that is copied, so that where it stands is the same in
    both.
    """
    rng, found = random.Random(f"lookup {seed}"), Pairs([], [], [], [])
    pairs = demo_pairs(model, "induction", n, seed)
    for clean, target, versus in zip(pairs.clean, pairs.target, pairs.versus, strict=True):
        twin = clean.clone()
        words = [i for p in pairs.clean for i in p.tolist() if i not in clean.tolist()]
        twin[clean.tolist().index(int(clean[-1]))] = rng.choice(words)
        found.clean.append(clean)
        found.corrupted.append(twin)
        found.target.append(target)
        found.versus.append(versus)
    return found


def story_pairs(
    model: Any, text: str, n: int, length: int = 16, seed: int = 0
) -> tuple[Pairs, Pairs]:
    """Windows of the text, one token replaced so that the model's own prediction is another.

    The measure is the clean prompt's own prediction less its runner-up.
    """
    rng = random.Random(seed)
    ids = model.to_tokens(text.replace("<|endoftext|>", " "), truncate=False)[0]
    bos, ids = ids[:1], ids[1:]
    found = Pairs([], [], [], [])
    windows = list(ids.split(length - 1)[:-1])
    rng.shuffle(windows)
    for window in windows:
        clean = torch.cat([bos, window])
        with torch.no_grad():
            first, second = model(clean[None])[0, -1].topk(2).indices.tolist()
            for _ in range(50):
                twin = clean.clone()
                twin[rng.randrange(1, length)] = ids[rng.randrange(len(ids))]
                if int(model(twin[None])[0, -1].argmax()) != first:
                    break
            else:
                continue
        found.clean.append(clean)
        found.corrupted.append(twin)
        found.target.append(first)
        found.versus.append(second)
    half = min(n, len(found.clean) // 2)
    rest = Pairs(*(part[half:] for part in vars(found).values()))
    return found.first(half), rest


def tasks(n_find: int, n_test: int, stories: Path) -> list[Task]:
    """All of them."""
    model = demo.load_model("hooked")
    twins = lookup_pairs(model, n_find, 11), lookup_pairs(model, n_test, 12)
    found = [Task("induction, place lost", model, *twins)]
    found += [
        Task(name, model, demo_pairs(model, name, n_find, 11), demo_pairs(model, name, n_test, 12))
        for name in ("ioi", "agreement", "greater_than", "induction")
    ]
    text = stories / "text" / "tinystories_sample" / "tinystories_sample.txt"
    if (stories / "stories260K").is_dir():
        other = load_model(str(stories / "stories260K"), "hooked")
        find, test = story_pairs(other, text.read_text(), n_find)
        found.append(Task("stories260K", other, find, test.first(n_test)))
    return found


# --- Faithfulness ---------------------------------------------------------------------------------


def ours(task: Task, qk: bool = True, at: str = "secant", gate: str = "gate") -> dict[Edge, float]:
    """Every edge's mean score by the operator."""
    found = tensorlens_tl.discover(
        task.model, *vars(task.find).values(), n_edges=1, qk=qk, at=at, batch_size=32, gate=gate
    )
    return dict(found.scores)


def scored(task: Task) -> tuple[dict[str, dict[Edge, float]], dict[str, float]]:
    """Every method's scores and seconds: the least of three rounds, one after the other."""

    def by(method: str, **kwargs: Any) -> Any:
        return lambda: score_edges(
            task.model, task.find.clean, method=method, **task.find.goal, **kwargs
        )

    methods = {
        OURS: lambda: ours(task),
        CLEAN: lambda: ours(task, at="clean"),
        "operator alone (T)": lambda: ours(task, qk=False, at="clean"),
        "eap": by("eap"),
        "eap_ig": by("eap_ig"),
        "direct": by("direct"),
    }
    if task.model.cfg.gated_mlp:
        methods[f"{CLEAN}, half of each gate"] = lambda: ours(task, at="clean", gate="half")
    methods |= {f"random {seed}": by("random", seed=seed) for seed in range(RANDOM_SEEDS)}
    scores: dict[str, dict[Edge, float]] = {}
    seconds = dict.fromkeys(methods, float("inf"))
    for _ in range(3):
        for name, run in methods.items():
            start = time.perf_counter()
            scores[name] = run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return scores, seconds


def faithful(task: Task, scores: Mapping[str, Mapping[Edge, float]]) -> dict[str, Any]:
    """Shares at every size, with intervals; paired differences to EAP and to random circuits."""
    with edge_model(task.model) as edged:
        wiring = edged.universe.wiring
    total, rows = len(wiring.edges()), {}
    counts = {size: max(1, round(size * total)) for size in SIZES}
    circuits = {
        f"{size} {name}": select(by, wiring, n, None, "greedy")
        for size, n in counts.items()
        for name, by in scores.items()
    }
    runs = faithfulness_of_many(task.model, task.test.clean, circuits, **task.test.goal)
    for size, n in counts.items():
        found = {name: runs[f"{size} {name}"] for name in scores}
        row: dict[str, Any] = {"n_edges": n}
        for name, one in found.items():
            row[name] = {"share": one.share, "interval": one.interval}
        for other in ("eap", "eap_ig", *(f"random {seed}" for seed in range(RANDOM_SEEDS))):
            value, interval = share_difference(found[OURS], found[other])
            row[OURS][f"minus {other}"] = {"share": value, "interval": interval}
        mean = statistics.fmean(found[f"random {seed}"].share for seed in range(RANDOM_SEEDS))
        row["random, mean"] = {"share": mean}
        rows[f"{size:.0%}"] = row
    return rows


def areas(task: Task, scores: Mapping[str, Mapping[Edge, float]], n: int) -> dict[str, Any]:
    """CPR and CMD."""
    found, test = {}, task.test.first(n)
    for name, by in scores.items():
        if name in (OURS, "eap", "eap_ig", "random 0"):
            curve = faithfulness_curve(task.model, test.clean, by, **test.goal)
            found[name] = {
                "cpr": curve.cpr,
                "cpr_interval": curve.cpr_interval,
                "cmd": curve.cmd,
                "cmd_interval": curve.cmd_interval,
                "n": len(test.clean),
            }
    return found


# --- Agreement with activation patching -----------------------------------------------------------


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's over all units."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean over prompts, and its bootstrap interval."""
    x = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(x), (1000, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = x[drawn].mean(-1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return {"mean": float(x.mean()), "interval": [low, high], "n": len(x)}


def agreement(task: Task, n: int) -> dict[str, Any]:
    """Pearson over units (site × position), and heads' ROC AUC, mean over prompts."""
    estimates = ["secant", "frozen", "frozen+qk", "gradient"]
    estimates += ["frozen+qk, half of each gate"] if task.model.cfg.gated_mlp else []
    found: dict[str, dict[str, list[float]]] = {
        e: {k: [] for k in (*KINDS, AUC)} for e in estimates
    }
    for i in range(min(n, len(task.test.clean))):
        goal = task.test.target[i], task.test.versus[i]
        sites = Sites(task.model, task.test.clean[i], task.test.corrupted[i], goal)
        truth = sites.truth()
        by = {
            "secant": sites.secant(),
            "frozen": sites.frozen(False),
            "frozen+qk": sites.frozen(True),
            "gradient": sites.gradient(),
        }
        if len(estimates) > len(by):
            by[estimates[-1]] = sites.frozen(True, "half")
        for name, kind in ((name, kind) for name in estimates for kind in KINDS):
            value = correlation(truth[kind], by[name][kind])
            if value == value:  # a kind of unit that nothing moves has no correlation
                found[name][kind].append(value)
        for name in estimates:
            found[name][AUC].append(unit_auc(by[name]["head"].flatten(), truth["head"].flatten()))
    return {
        name: {kind: mean_interval(values) for kind, values in kinds.items()}
        for name, kinds in found.items()
    }


def head_effects(task: Task, n: int) -> dict[str, float]:
    """The mean effect of each head patched, at all positions, from the clean run."""
    pairs = task.test.first(n)
    with edge_model(task.model) as edged, torch.no_grad():
        universe = edged.universe
        heads = [node for node in universe.writers if node.kind == "head"]
        keep = torch.ones(len(heads), len(universe.readers), len(universe.writers))
        for i, head in enumerate(heads):
            keep[i, :, universe.writers.index(head)] = 0
        total = torch.zeros(len(heads))
        for i, (clean, twin) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
            other = edged.run(clean[None]).writes[0]
            logits = edged.run(twin[None], keep, other).logits[:, 0, -1]
            plain = edged.run(twin[None]).logits[0, 0, -1]
            moved = logits[:, pairs.target[i]] - logits[:, pairs.versus[i]]
            total += moved - (plain[pairs.target[i]] - plain[pairs.versus[i]])
    return dict(zip(map(str, heads), (total / len(pairs.clean)).tolist(), strict=True))


def unit_auc(scores: Tensor, effects: Tensor) -> float:
    """ROC AUC of |score| for the tenth of all units with the largest |effect|, five at least."""
    scores, order = scores.abs(), effects.abs().argsort(descending=True)
    n = max(5, round(0.1 * len(order)))
    top, rest = scores[order[:n], None], scores[order[n:]]
    return float(((top > rest).double() + 0.5 * (top == rest).double()).mean())


def auc(scores: Mapping[str, float], effects: Mapping[str, float]) -> float:
    """The same of named heads."""
    columns = (torch.tensor([by[name] for name in effects]) for by in (scores, effects))
    return unit_auc(*columns)


def head_auc(task: Task, scores: Mapping[str, Mapping[Edge, float]], n: int) -> dict[str, Any]:
    """ROC AUC of what every method's edges out of each head sum to."""
    effects, found = head_effects(task, n), {}
    for name, by in scores.items():
        if name.startswith("random"):
            continue
        sums = dict.fromkeys(effects, 0.0)
        for edge, score in by.items():
            if edge.src.kind == "head":
                sums[str(edge.src)] += score
        if name == "direct":
            sums = {head: by[Edge.parse(f"{head}→logits")] for head in effects}
        found[name] = auc(sums, effects)
    return {"auc": found, "effects": effects, "positives": max(5, round(0.1 * len(effects)))}


# --- A known circuit ------------------------------------------------------------------------------


def known(task: Task, scores: Mapping[str, Mapping[Edge, float]]) -> dict[str, Any]:
    """The smallest circuit with the previous-token head, an induction head, and the way between.

    Which heads these are was measured by attention and ablation (the bundled model's metrics.json).
    """
    metrics = json.loads((demo.model_folder() / "metrics.json").read_text())
    heads = metrics["circuits"]["induction"]
    previous, induction = heads["previous_token"]["heads"], heads["induction"]["heads"]
    with edge_model(task.model) as edged:
        wiring = edged.universe.wiring
    total, found = len(wiring.edges()), {"previous_token": previous, "induction": induction}
    links = {f"{p}→{i}.k" for p in previous for i in induction}
    for name, by in scores.items():
        if name.startswith("random"):
            continue
        nodes = both = None
        for n in range(1, len(by) + 1):
            edges = {str(edge) for edge in select(by, wiring, n, None, "greedy")}
            sources = {edge.partition("→")[0] for edge in edges}
            if nodes is None and sources & set(previous) and sources & set(induction):
                nodes = n
            if both is None and edges & links:
                both = n
            if nodes and both:
                break
        found[name] = {
            "heads at": nodes and nodes / total,
            "with the key edge at": both and both / total,
            "all induction heads at 5 %": sorted(
                set(induction)
                & {str(e.src) for e in select(by, wiring, round(0.05 * total), None, "greedy")}
            ),
        }
    return found


# --- Printing -------------------------------------------------------------------------------------


def show(name: str, result: dict[str, Any]) -> None:
    """One task's tables."""
    print(f"\n## {name}: {result['n_find']} pairs to find, {result['n_test']} to test")
    rows = result["faithfulness"]
    print("\nshare recovered, by share of edges kept")
    names = [n for n in next(iter(rows.values())) if n != "n_edges" and not n.startswith("random ")]
    for method in names:
        cells = []
        for row in rows.values():
            low, high = row[method].get("interval", (None, None))
            interval = f" [{low:+.3f}, {high:+.3f}]" if low is not None else ""
            cells.append(f"{row[method]['share']:+.3f}{interval}")
        seconds = result["seconds"].get(method)
        took = f"{seconds:6.1f} s" if seconds is not None else ""
        print(f"  {method:42}", *(f"{cell:26}" for cell in cells), took)
    for other in ("eap", "eap_ig"):
        cells = [row[OURS][f"minus {other}"] for row in rows.values()]
        texts = (
            f"{c['share']:+.3f} [{c['interval'][0]:+.3f}, {c['interval'][1]:+.3f}]" for c in cells
        )
        print(f"  {OURS + ' − ' + other:42}", *(f"{text:26}" for text in texts))
    print("\nCPR (more is better), CMD (less is better)")
    for method, a in result["areas"].items():
        print(f"  {method:42} {a['cpr']:.3f}  {a['cmd']:.3f}")
    print("\nagreement with activation patching: Pearson over units, mean over prompts")
    for estimate, kinds in result["agreement"].items():
        cells = (
            f"{kind} {k['mean']:.3f} [{k['interval'][0]:.3f}, {k['interval'][1]:.3f}]"
            for kind, k in kinds.items()
        )
        print(f"  {estimate:10}", *cells, sep="  ")
    print(
        f"\nROC AUC of heads, {result['heads']['positives']} positives:",
        ", ".join(f"{n} {v:.3f}" for n, v in result["heads"]["auc"].items()),
    )
    if "known" in result:
        print(
            "\ninduction: previous-token head and an induction head both in, "
            "at a share of the edges"
        )
        for method, at in result["known"].items():
            print(f"  {method:42} {at}")


ABOUT = {
    "model dtype": "float32",
    "ablation": "resample",
    "attention": "live",
    "selection": "greedy, connected",
    "measure": "answer − foil; stories260K: own prediction − runner-up",
    "interval": "bootstrap over test prompts, 95 %",
    "torch": torch.__version__,
}


def keep(name: str, result: dict[str, Any]) -> None:
    """One task's figures, beside those of the others, in the kept file."""
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"tasks": {}}
    kept = {"about": ABOUT, "tasks": kept["tasks"] | {name: result}}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


# --- The page of kept figures ---------------------------------------------------------------------

NOTES = """## What to read out of it

- *induction, place lost* is the case that needs query and key edges: \
which word is copied is the same in both
  prompts, only where it is found is not. The operator alone (T) has no such edge and recovers \
nothing; with them
  the previous-token head's output reaches the induction heads' keys.
- The *secant operator* is the one between the two runs: exact on their difference, queries, keys, \
norms and
  activations included. Scores of one run are first-order: where a pattern or an activation is \
saturated in that
  run, an edge that the model needs may score near 0. That is what the other rows lose in *place \
lost* and
  *agreement*: the edges and their selection are the same, only the slopes are taken between the \
runs, and at
  5 % of the edges the share is that of integrated gradients on five points of the way.
- At the smallest sizes every method is bounded by connectedness: \
an edge counts only on a path from the input to
  the logits, and a few edges are hardly one path in models of few, broad heads.
- Tried beside what is shown: the corrupted run's operator alone, the mean of both runs', \
and selection by
  "absolute" and "influence". None was better on every task.
- CPR ranks by *signed* score: an edge whose effect has the wrong sign comes last, however needed.
- Agreement with patching is that of single units, put into the corrupted run. \
For stories260K's heads, one at a
  time, the corrupted run's own gradient is nearly exact, and a slope on the way to the clean run \
is not; for
  residual states and MLPs it is the other way.
- stories260K's measure is a small margin on running text, and the shares of a small gap are \
noisy: see the
  intervals.
- Heads' ROC AUC of five heads out of few counts heads that hardly move anything as positives; \
of units (a head at
  a position, within a prompt) it is the steadier figure.
"""


def _cell(share: float, interval: Sequence[float] | None = None) -> str:
    beside = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{share:.3f}{beside}"


def page(kept: dict[str, Any]) -> str:
    """The kept figures as Markdown."""
    about = "; ".join(f"{name}: {value}" for name, value in kept["about"].items())
    lines = [
        "# Circuits against the real model",
        "",
        "Made by `python benchmarks/circuits.py --page` from `benchmarks/results/circuits.json`.",
        f"{about}.",
        "",
    ]
    for name, result in kept["tasks"].items():
        rows, seconds = result["faithfulness"], result["seconds"]
        lines += [
            f"## {name}",
            "",
            f"Edges scored on {result['n_find']} pairs, "
            f"circuits tested on {result['n_test']} others. "
            "Share recovered, by share of edges kept:",
            "",
            "| method | " + " | ".join(rows) + " | seconds | CPR | CMD |",
            "|---|" + "---|" * (len(rows) + 3),
        ]
        for method in next(iter(rows.values())):
            if method == "n_edges" or method.startswith("random "):
                continue
            cells = [
                _cell(row[method]["share"], row[method].get("interval")) for row in rows.values()
            ]
            area = result["areas"].get("random 0" if method == "random, mean" else method)
            cells.append(f"{seconds[method]:.1f}" if method in seconds else "–")
            cells += [f"{area['cpr']:.3f}", f"{area['cmd']:.3f}"] if area else ["–", "–"]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        for other in ("eap", "eap_ig"):
            cells = [row[OURS][f"minus {other}"] for row in rows.values()]
            texts = (_cell(cell["share"], cell["interval"]) for cell in cells)
            lines.append(f"| {OURS}, less {other} (paired) | " + " | ".join(texts) + " | | | |")
        n = result["agreement"]["frozen"][AUC]["n"]
        lines += [
            "",
            f"Agreement with activation patching on {n} of the pairs, Pearson over units:",
            "",
            "| estimate | " + " | ".join((*KINDS, AUC)) + " |",
            "|---|" + "---|" * (len(KINDS) + 1),
        ]
        for estimate, kinds in result["agreement"].items():
            cells = (_cell(kinds[kind]["mean"], kinds[kind]["interval"]) for kind in (*KINDS, AUC))
            lines.append(f"| {estimate} | " + " | ".join(cells) + " |")
        heads = ", ".join(
            f"{method} {value:.3f}" for method, value in result["heads"]["auc"].items()
        )
        lines += [
            "",
            f"ROC AUC of whole heads, {result['heads']['positives']} positives: {heads}.",
            "",
        ]
        if "known" in result:
            found = result["known"]
            lines += [
                f"Previous-token head {', '.join(found['previous_token'])}; induction heads "
                f"{', '.join(found['induction'])}. "
                "Share of edges at which both kinds are in, and at "
                "which an edge from the first to a key of the others is:",
                "",
                "| method | both heads | the key edge |",
                "|---|---|---|",
            ]
            for method in result["seconds"]:
                if method in found:
                    at = (found[method]["heads at"], found[method]["with the key edge at"])
                    cells = ("never" if x is None else f"{x:.1%}" for x in at)
                    lines.append(f"| {method} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join([*lines, NOTES])


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts, no file written")
    parser.add_argument("--stories", type=Path, default=STORIES, help="the shared data's folder")
    parser.add_argument("--only", help="one task")
    parser.add_argument("--find", type=int, default=60, help="pairs that edges are scored on")
    parser.add_argument("--test", type=int, default=200, help="pairs that circuits are tested on")
    parser.add_argument(
        "--agree", type=int, default=40, help="of these, pairs patched unit by unit"
    )
    parser.add_argument(
        "--heads", type=int, default=60, help="of these, pairs with whole heads patched"
    )
    parser.add_argument("--areas", type=int, default=60, help="of these, pairs for CPR and CMD")
    parser.add_argument(
        "--page", action="store_true", help="write docs/circuits.md, measure nothing"
    )
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text())), encoding="utf-8")
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.quick:
        options.find, options.test, options.agree, options.heads = 12, 16, 4, 8
        options.areas = 8
    for task in tasks(options.find, options.test, options.stories):
        if options.only not in (None, task.name):
            continue
        # 1. Scores.
        scores, seconds = scored(task)
        start = time.perf_counter()
        found = {
            "n_find": len(task.find.clean),
            "n_test": len(task.test.clean),
            "seconds": seconds,
            # 2. Circuits, and whole curves.
            "faithfulness": faithful(task, scores),
            "areas": areas(task, scores, options.areas),
            # 3. Patching.
            "agreement": agreement(task, options.agree),
            "heads": head_auc(task, scores, options.heads),
        }
        # 4. The known circuit.
        if task.name == "induction, place lost":
            found["known"] = known(task, scores)
        # 5. The figures.
        show(task.name, found)
        print(f"{time.perf_counter() - start:.0f} s of measuring", flush=True)
        if not options.quick:
            keep(task.name, found)


if __name__ == "__main__":
    main()
