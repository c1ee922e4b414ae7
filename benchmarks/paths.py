"""How far the search for the k largest paths has to look on a trained model, and how long it takes.

``python benchmarks/paths.py [--model ../shared/data/stories260K] [--prompt ...] [--k 10]``

1. Capture the prompt, and print how many paths there are.
2. Search for the k largest from all sources and from every token alone, with whole bounds and with
   bounds of a few directions. Print the expansions and the seconds.
3. Exit with 1 if a search with whole bounds took more than 1,000 expansions: the bar for k = 10 on
   the 37-token prompt.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch

import tensorlens_tl
from tensorlens_tl.hosts import load_model

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260K"
PROMPT = (
    "Lily and Ben were playing in the garden with a ball. Ben threw the ball to Lily. Lily was so "
    "happy that she"
)
BAR = 1_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(STORIES))
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # 1. The prompt.
    with torch.no_grad():
        _, lens = tensorlens_tl.capture(load_model(args.model), args.prompt)
    n_pos, width = lens.embedding.shape[1:]
    steps = lens.operator.steps
    sequences = math.prod(1 + sum(len(b.body.nodes()) for b in s.branches) for s in steps)
    print(f"{lens}\n{sequences:,} node sequences from each of {n_pos} tokens; k = {args.k}")
    # 2. Searches.
    rank_8 = 8 * n_pos * width * (5 * width + 8 * (len(steps) + 1))
    whole = 0
    print("\n| energies | paths | from | expansions: median, most | seconds: median |\n|-|-|-|-|-|")
    for energies, limit in (("whole", 2**31), ("rank 8 + λI", rank_8)):
        for by_position in (False, True):
            for name, tokens in (("all sources", [None]), ("each token", range(n_pos))):
                counts, seconds = [], []
                for token in tokens:
                    start = time.perf_counter()
                    paths = lens.paths(
                        None,
                        args.k,
                        from_token=token,
                        by_position=by_position,
                        memory_limit=limit,
                        max_expansions=10**6,
                    )
                    seconds.append(time.perf_counter() - start)
                    counts.append(paths.expansions)
                if energies == "whole":
                    whole = max(whole, *counts)
                kind = "by position" if by_position else "positions summed"
                count = f"{statistics.median(counts):.0f}, {max(counts)}"
                print(
                    f"| {energies} | {kind} | {name} | {count} | {statistics.median(seconds):.3f} |"
                )
    # 3. The bar.
    print(f"\nmost expansions with whole energies: {whole} (bar for k = 10, 37 tokens: {BAR:,})")
    return int(whole > BAR)


if __name__ == "__main__":
    sys.exit(main())
