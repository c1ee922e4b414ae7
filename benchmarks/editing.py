"""Edits, predicted and real: python benchmarks/editing.py [--model demo|smollm2] [--n 200].

1. Patch one position by its corrupted twin's, at the input of blocks. Compare what the operator,
   the operator with queries and keys to first order, and the Jacobian predict with what happens.
2. Ask for the target's opposite at the last position: what is delivered, at what size, by the
   operator, after two corrections, by the Jacobian and by three other methods.
3. Print the bars, and with --json write the numbers.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

import tensorlens_tl
from tensorlens_tl import demo, editing

TASKS = ("ioi", "facts", "agreement")
BARS = {"error": 0.15, "pearson": 0.98, "miss": 0.15, "miss, refined": 0.03, "flipped": 0.95}


NAMES = ("Mary", "John", "Anna", "Peter", "Alice", "David", "Laura", "James", "Emma", "Daniel")
PLACES, THINGS = ("store", "park", "school", "office"), ("drink", "book", "ring", "letter")
CAPITALS = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid",
            "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "Greece": "Athens",
            "Egypt": "Cairo", "Ireland": "Dublin", "England": "London"}  # fmt: skip
NOUNS = ("key", "letter", "picture", "teacher", "doctor", "student", "book", "car", "dog", "boy")
NEAR = ("table", "garden", "window", "house", "road", "door")


def written(task: str, n: int) -> list[editing.study.Case]:
    """Prompts of English for a model of English, each with its corrupted prompt."""
    rng = random.Random(0)
    found: dict[str, tuple[str, str, str, str]] = {}
    for _ in range(100 * n):
        if task == "ioi":
            a, b = rng.sample(NAMES, 2)
            place, thing = rng.choice(PLACES), rng.choice(THINGS)
            head = f"When {a} and {b} went to the {place},"
            case = (
                f"{head} {b} gave a {thing} to",
                f"{head} {a} gave a {thing} to",
                f" {a}",
                f" {b}",
            )
        elif task == "facts":
            a, b = rng.sample(sorted(CAPITALS), 2)
            head = rng.choice(
                ("The capital of", "Everybody knows that the capital of", "I live in")
            )
            tail = ", in the city of" if head == "I live in" else " is the city of"
            case = f"{head} {a}{tail}", f"{head} {b}{tail}", f" {CAPITALS[a]}", f" {CAPITALS[b]}"
        else:
            noun, near = rng.choice(NOUNS), rng.choice(NEAR)
            one, two = f"The {noun} near the {near}", f"The {noun}s near the {near}"
            case = (one, two, " is", " are") if rng.random() < 0.5 else (two, one, " are", " is")
        found[case[0]] = case
        if len(found) == n:
            break
    return list(found.values())


def equally_long(model: Any, cases: list) -> list:
    """Cases whose prompts have equally many tokens, and whose answers are one token each."""

    def count(text: str) -> int:
        return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    return [c for c in cases if count(c[0]) == count(c[1]) and count(c[2]) == count(c[3]) == 1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo", choices=("demo", "smollm2"))
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--layers", type=int, nargs="+", help="blocks whose input is edited")
    parser.add_argument("--gate", default="gate", help="how gated MLPs are made linear")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = args.model == "demo"
    model = demo.load_model() if own else tensorlens_tl.models.smollm2()
    layers = args.layers or range(model.cfg.n_layers)
    found = {}
    for task in TASKS:
        cases = demo.prompts(task, args.n) if own else equally_long(model, written(task, args.n))
        print(f"\n== {task}, {len(cases)} prompts")
        for layer in layers:
            site = f"blocks.{layer}.hook_resid_pre"
            made = editing.predict(
                model, cases, site, ("operator", "operator_qk", "jacobian"), args.gate
            )
            print(f"{site}: {made}")
            for m in made.predicted:
                found[f"{task} {site} {m}"] = {"error": made.error(m), "pearson": made.pearson(m)}
        sites = [f"blocks.{i}.hook_resid_pre" for i in layers]
        study = editing.evaluate(model, cases, sites=sites, gate=args.gate)
        print(study)
        for first, second in (("operator", "jacobian"), ("refined", "jacobian")):
            print(f"‖δ‖, {first} − {second}: {study.compare(first, second, 'norm')}")
        for m in study.methods:
            found[f"{task} edits {m}"] = {
                "miss": study.median_miss(m),
                **{x: study.mean(m, x).value for x in ("norm", "size", "flipped")},
            }
    print("\nbars:", ", ".join(f"{name} {bar}" for name, bar in BARS.items()))
    print(f"tensorlens_tl {tensorlens_tl.__version__}, torch {torch.__version__}, one thread")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
