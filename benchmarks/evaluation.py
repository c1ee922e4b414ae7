"""Every method, every protocol, every masking, on two trained models: numbers, intervals, costs.

``python benchmarks/evaluation.py [--quick] [--keep FOLDER]`` takes an hour and a half of one slow
core. ``--costs`` only times the methods anew, ``--page`` only makes the page.

1. Score every prompt by every method, and run every protocol. With ``--keep`` each part's
   per-prompt numbers stay in a folder, and are not run again: with ``--sets`` several processes can
   fill it, side by side.
2. Summarize, time the methods, and write ``benchmarks/results/evaluation.json``.
3. Make ``docs/results.md`` of that file.

The prompts are drawn with seed 1; choices (which targets, which last token) were made on seed 0.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from evaluation_page import page
from torch import Tensor

from tensorlens_tl import demo
from tensorlens_tl.evaluation.protocols import BEAM, EXACT_NAOPC, Measure, measures
from tensorlens_tl.evaluation.report import Evaluation
from tensorlens_tl.evaluation.runner import evaluate
from tensorlens_tl.evaluation.scoring import Scored, score
from tensorlens_tl.evaluation.significance import compare, estimate
from tensorlens_tl.hosts import load_model
from tensorlens_tl.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation.json"
PAGE = ROOT / "docs" / "results.md"
SHARED = ROOT.parent / "shared" / "data"
TASKS = ("agreement", "facts", "ioi", "induction")
SETS = (*TASKS, "stories")
MASKINGS = ("delete", "token", "mean")
SEED = 1

ATTENTION = (
    "mean_attention",
    "last_layer_attention",
    "rollout",
    "attention_flow",
    "norm_attention",
    "norm_attention_resln",
    "globenc",
    "alti",
    "value_zeroing",
)
GRADIENT = ("grad_x_input", "integrated_gradients", "chefer", "attnlrp")
AIMED = ("in_out", *GRADIENT)
"""Methods that can explain any target: they are also run for the prediction's log-odds, and for its
logit less the runner-up's."""
CONTRASTS = {"log-odds": "all_others", "runner-up": "runner_up"}
"""What the prediction's logit is then less, by the name it has in the tables."""

LONG_BEAM = 2
"""Orders kept in the search for NAOPC's bounds: a beam of 5 takes longer and moves them little."""


def all_protocols() -> list[Measure]:
    return [
        *measures("perturbation"),
        *measures("perturbation", "chefer"),
        *measures("perturbation", metric="agreement"),
        *measures("morf_lerf"),
        *measures("insertion_deletion"),
        *measures("eraser"),
        *measures("leave_one_out"),
    ]


def last_kept() -> list[Measure]:
    both = ("perturbation", "leave_one_out")
    return [
        m
        for metric in ("probability", "logit_diff")
        for one in both
        for m in measures(one, metric=metric)
    ]


def products() -> str:
    """Another kernel for float32 products, where as exact: about 1.5 times faster on some CPUs."""
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    off = (a @ b - (a.double() @ b.double())).abs().max() / (a.double() @ b.double()).abs().max()
    if off > 1e-5:  # bfloat16 after all
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()


# --- Prompts -------------------------------------------------------------------------------------


def task_prompts(model: Any, task: str, n: int) -> list[Tensor]:
    """Held-out prompts of 5 to 34 tokens: some of the facts are shorter, of induction longer."""
    drawn = (model.to_tokens(pair.clean)[0] for pair in demo.prompts(task, 2 * n, SEED))
    return [ids for ids in drawn if 5 <= len(ids) <= 34][:n]


@torch.no_grad()
def story_prompts(model: Any, n: int) -> list[Tensor]:
    """Windows of 24 to 64 tokens of the sample, a quarter at most; then prompts of the model's own.

    Windows begin where a sentence does. The others go on from a sentence's first eight tokens,
    drawn from the model itself.
    """
    generator = torch.Generator().manual_seed(SEED)

    def length() -> int:
        return int(torch.randint(24, 65, (2,), generator=generator).min())  # more short than long

    text = (SHARED / "text/tinystories_sample/tinystories_sample.txt").read_text()
    starts: list[Tensor] = []
    for story in text.replace("\n", " ").split("<|endoftext|>"):
        sentences = [part.strip() for part in story.split(". ") if len(part.strip()) > 5]
        starts += [model.to_tokens(". ".join(sentences[i:]))[0] for i in range(len(sentences))]
    found = [ids[: length()] for ids in starts if len(ids) >= 64][: n // 4]
    openings = torch.stack([ids[:9] for ids in starts if len(ids) >= 9])
    rows = openings[torch.randint(len(openings), (n - len(found),), generator=generator)]
    for _ in range(64 - rows.shape[1]):
        p = model(rows)[:, -1].softmax(-1)
        p[:, [model.tokenizer.bos_token_id, model.tokenizer.eos_token_id]] = 0
        rows = torch.cat([rows, torch.multinomial(p, 1, generator=generator)], 1)
    return found + [row[: length()] for row in rows]


# --- Running -------------------------------------------------------------------------------------


def scores(model: Any, prompts: list[Tensor]) -> Scored:
    """All methods' scores, and those of some for other targets or without their signs."""
    plain = score(model, prompts, list(METHODS), progress=False, batch_size=16)
    more = {"|in_out|": [one.abs() for one in plain.scores["in_out"]]}
    for shown, versus in CONTRASTS.items():
        aimed = score(model, prompts, AIMED, versus=versus, progress=False, batch_size=16)
        more |= {f"{name}, {shown}": aimed.scores[name] for name in AIMED}
    return replace(plain, scores=dict(plain.scores) | more)


ENOUGH = 300
"""Prompts of a set that every protocol runs on; the bars' own are run on all."""
PARTS = ("last masked, too", "last kept", "naopc")


def part(model: Any, scored: Scored, name: str, quick: bool) -> Evaluation:
    """One part of the evaluation of a set of prompts."""
    common: dict[str, Any] = {"masking": MASKINGS, "seed": SEED, "progress": False}
    fewer = [*METHODS, "in_out, log-odds", "|in_out|"]
    if name == "last masked, too":
        n = len(scored.prompts)
        scored = scored.take(range(0, n, max(1, n // ENOUGH)))
        return evaluate(model, scored, fewer, all_protocols(), **common)
    if name == "last kept":
        return evaluate(model, scored, None, last_kept(), keep_last=True, **common)
    lengths = [len(ids) for ids in scored.prompts]
    short = [i for i, n in enumerate(lengths) if n - 1 <= EXACT_NAOPC]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    chosen = short if len(short) >= 20 else order[: 3 if quick else 20]
    return evaluate(model, scored.take(chosen), fewer, "naopc", beam=LONG_BEAM, **common)


def prompts_of(name: str, quick: bool) -> tuple[Any, list[Tensor]]:
    """A set's model and prompts."""
    if name == "stories":
        model = load_model(str(SHARED / "stories260K"))
        return model, story_prompts(model, 6 if quick else 600)
    model = demo.load_model("bridge")
    return model, task_prompts(model, name, 6 if quick else 200)


def run(
    quick: bool, keep: Path | None, kept_only: bool, sets: list[str]
) -> dict[str, dict[str, Evaluation]]:
    """Every part of every set of prompts; what a folder keeps is not run again."""
    found: dict[str, dict[str, Evaluation]] = {}
    for name in sets:
        paths = {one: None if keep is None else keep / f"{name}, {one}.json" for one in PARTS}
        done = {one: p for one, p in paths.items() if p is not None and p.exists()}
        found[name] = {one: Evaluation.from_json(p.read_text()) for one, p in done.items()}
        if kept_only or len(done) == len(PARTS):
            continue
        model, prompts = prompts_of(name, quick)
        scored = scores(model, prompts)
        for one, path in paths.items():
            if one in done:
                continue
            start = time.process_time()
            result = found[name][one] = part(model, scored, one, quick)
            spent = time.process_time() - start
            print(
                f"{name}, {one}: {len(result)} prompts, runs {dict(result.runs)}, {spent:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            if path is not None:
                path.write_text(result.to_json())
    return found


# --- Summary -------------------------------------------------------------------------------------


def summary(found: dict[str, dict[str, Evaluation]]) -> dict[str, Any]:
    """What makes the page: means, intervals and comparisons, rounded; costs; a sample of values."""
    names = list(found)
    groups = {name: [name] for name in names} | {"demo": [n for n in names if n in TASKS]}
    tables: dict[str, dict[str, Any]] = {}
    members_of: dict[str, dict[str, list[str]]] = {}
    for group, members in groups.items():
        for part in PARTS:
            having = [name for name in members if part in found[name]]
            if having:
                members_of.setdefault(group, {})[part] = having
                evaluations = [found[name][part] for name in having]
                tables.setdefault(group, {})[part] = table(evaluations, compared=part != "naopc")
    first = {name: parts["last kept"] for name, parts in found.items()}
    return {
        "seed": SEED,
        "torch": torch.__version__.split("+")[0],
        "beam": LONG_BEAM,
        "exact_naopc": EXACT_NAOPC,
        "library_beam": BEAM,
        "methods": {name: [m.cost, m.source] for name, m in METHODS.items()},
        "attention": ATTENTION,
        "gradient": GRADIENT,
        "sets": {
            name: {
                "model": one.model,
                "dtype": one.dtype,
                "prompts": {
                    part: len(found[name][part]) if part in found[name] else 0 for part in PARTS
                },
                "tokens": [min(one.lengths), sum(one.lengths) / len(one), max(one.lengths)],
                "mask_token": one.mask_token,
                "runs": sum(sum(part.runs.values()) for part in found[name].values()),
            }
            for name, one in first.items()
        },
        "members": members_of,
        "tables": tables,
        "sample": sample(first),
    }


TIMED = 64
"""Prompts of a set that methods' costs are timed on."""


def costs(sets: dict[str, Any], quick: bool = False) -> None:
    """Time what scoring takes, with nothing else running, in forward passes of the same prompts."""
    for name, one in sets.items():
        model, prompts = prompts_of(name, quick)
        scored = score(model, prompts[:: -(-len(prompts) // TIMED)], list(METHODS), progress=False)
        one["timed"] = len(scored.prompts)
        one["forwards"] = {
            method: rounded(seconds / scored.forward_seconds)
            for method, seconds in scored.seconds.items()
        }


def table(evaluations: list[Evaluation], compared: bool) -> dict[str, Any]:
    """Cells by masking, measure, method: mean, low, high; norm and in_out compared with all."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in (row for one in evaluations for row in one.rows):
        key = " ".join(filter(None, (row.measure, row.preset, row.metric)))
        key = key if row.measure != "naopc" else f"naopc {row.metric}"
        new = {"higher": row.higher, "values": {}}
        cell = cells.setdefault(row.masking, {}).setdefault(key, new)
        cell["values"].setdefault(row.method, []).extend(row.values)
    for measures_of in cells.values():
        for key, cell in measures_of.items():
            values = cell.pop("values")
            cell["n"] = sum(not math.isnan(v) for v in values["in_out"])
            cell["methods"] = {
                method: [rounded(x) for x in (i.value, i.low, i.high)]
                for method, i in ((m, estimate(v, SEED)) for m, v in values.items())
            }
            if compared and key.startswith(COMPARED):
                aimed = (f"{m}, {shown}" for shown in CONTRASTS for m in GRADIENT)
                others = [other for other in (*ATTENTION, *GRADIENT, *aimed) if other in values]
                cell["compared"] = {
                    ours: {
                        other: comparison(values[ours], values[other], cell["higher"])
                        for other in others
                    }
                    for ours in (*OURS, *(f"in_out, {shown}" for shown in CONTRASTS))
                    if ours in values
                }
    return cells


OURS = ("norm", "in_out", "|in_out|")
COMPARED = (*(f"positive tensorlens {m}" for m in ("prob", "logit", "cosine")), "leave_one_out")


def comparison(ours: list[float], theirs: list[float], higher: bool) -> list[float]:
    """Mean by which ours is better, its interval, p."""
    found = compare(*((ours, theirs) if higher else (theirs, ours)), seed=SEED)
    return [
        rounded(x)
        for x in (found.difference.value, found.difference.low, found.difference.high, found.p)
    ]


SAMPLED = ("norm", "in_out", "rollout", "last_layer_attention")
SAMPLE = 10


def sample(first: dict[str, Evaluation]) -> dict[str, Any]:
    """The first prompts' own numbers, last token kept, for the test that makes them again."""
    return {
        task: {
            f"{method} {masking}": [
                rounded(v)
                for v in next(
                    row
                    for row in first[task].rows
                    if (row.method, row.masking, row.measure, row.preset, row.metric)
                    == (method, masking, "positive", "tensorlens", "probability")
                ).values[:SAMPLE]
            ]
            for method in SAMPLED
            for masking in MASKINGS
        }
        for task in TASKS
        if task in first
    }


def rounded(x: float) -> float | None:
    return float(f"{x:.4g}") if math.isfinite(x) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="6 prompts a set; nothing is written")
    parser.add_argument("--keep", type=Path, help="a folder for per-prompt numbers")
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=SETS,
        default=SETS,
        metavar="SET",
        help="with --keep: run these alone; another run makes the page",
    )
    parser.add_argument("--kept-only", action="store_true", help="with --keep: run nothing more")
    parser.add_argument("--costs", action="store_true", help="only time the methods' costs anew")
    parser.add_argument("--page", action="store_true", help="only make the page anew")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"float32 products: {products()}", file=sys.stderr)
    if args.costs:
        results = json.loads(RESULTS.read_text())
        costs(results["sets"])
        RESULTS.write_text(json.dumps(results, indent=None, ensure_ascii=False) + "\n")
    elif not args.page:
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
        # 1. Scores and protocols.
        found = run(args.quick, args.keep, args.kept_only, args.sets)
        if len(found) < len(SETS):
            return 0
        # 2. The summary, and costs.
        results = summary(found)
        costs(results["sets"], args.quick)
        if args.quick:
            print(page(results))
            return 0
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=None, ensure_ascii=False) + "\n")
    # 3. The page.
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
    print(PAGE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
