"""Whether plans of short calls, of milliseconds, say what they take.

``python benchmarks/short_calls.py [--model gpt2] [--rounds 5]``

Prints for every call the seconds that its plan says, the least processor time that it took on fresh
lenses, and their ratio. Exits with 1 if a plan is off by more than a factor of 3, or the median
plan by more than a factor of 1.5.

1. The calls: questions to a lens by ``lens.plan``, others by ``tensorlens_tl.plan``.
2. Plan and run each of them.
3. The table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import tensorlens_tl
from tensorlens_tl import demo

PROMPT = "When Mary and John went to the store, John gave a drink to"
TWIN = "When Mary and John went to the store, Mary gave a drink to"
QUESTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("attribute", {}),
    ("attribute", {"by": "component"}),
    ("attribute", {"by": "head"}),
    ("attribute", {"by": "order"}),
    ("attribute", {"by": "edge"}),
    ("attribute", {"by": "edge", "qk": True}),
    ("attribute_many", {"target": [5, 6]}),
    ("attribute_sequence", {"continuation": -3}),
    ("logit_lens", {}),
    ("waterfall", {}),
    ("token_matrix", {"name": "in"}),
    ("token_matrix", {"name": "out"}),
    ("token_matrix", {"name": "in_out"}),
    ("token_scores", {"name": "rollout"}),
    ("discover", {"n_edges": 10}),
)
MOST, MEDIAN = 3.0, 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name or a folder; left out, the bundled model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Other work on this machine is no part of a plan: its rates are taken in processor time, too.
    time.perf_counter = time.process_time
    model = tensorlens_tl.load_model(args.model) if args.model else demo.load_model()

    def fresh() -> Any:
        return tensorlens_tl.capture(model, PROMPT)[1]

    def ask(what: str, given: dict[str, Any], lens: Any) -> object:
        return getattr(lens, what)(**given)

    # 1. The calls.
    calls: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {}
    for what, given in QUESTIONS:
        named = ", ".join(f"{name}={value!r}" for name, value in given.items())
        calls[f"lens.{what}({named})"] = (
            lambda what=what, given=given: fresh().plan(what, **given),
            partial(ask, what, given),
        )
    pair = [PROMPT], [TWIN]
    functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "capture": (tensorlens_tl.capture, (model, PROMPT)),
        "score_edges": (tensorlens_tl.score_edges, (model, *pair)),
        "discover": (partial(tensorlens_tl.discover, n_edges=10), (model, *pair)),
        "faithfulness": (tensorlens_tl.faithfulness, (model, pair[0], ["L0H0"], pair[1])),
        "mean_attribution": (tensorlens_tl.mean_attribution, (model, pair[0])),
    }
    for name, (function, given) in functions.items():
        plain = getattr(function, "func", function)
        more = getattr(function, "keywords", {})
        calls[name] = (
            partial(tensorlens_tl.plan, plain, *given, **more),
            lambda _, function=function, given=given: function(*given),
        )
    calls["lens.plan('capture')"] = (lambda: fresh().plan("capture"), lambda _: fresh())
    # 2. Plan and run each of them.
    fresh()  # what is loaded late
    factors = []
    print("| call | plan, ms | taken, ms | plan / taken |\n|-|-|-|-|")
    for name, (plan, run) in calls.items():
        with torch.no_grad():
            taken = min(_seconds(run, fresh()) for _ in range(args.rounds))
            said = min(plan().seconds for _ in range(2))
        factors.append(said / taken)
        print(f"| {name} | {1e3 * said:.2f} | {1e3 * taken:.2f} | {factors[-1]:.2f} |", flush=True)
    # 3. The table.
    off = [max(factor, 1 / factor) for factor in factors]
    print(
        f"\noff by a factor of {statistics.median(off):.2f} in the median, {max(off):.2f} at most"
    )
    return int(max(off) > MOST or statistics.median(off) > MEDIAN)


def _seconds(run: Callable[[Any], object], lens: Any) -> float:
    start = time.perf_counter()
    run(lens)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
