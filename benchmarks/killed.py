"""Many prompts on one and two processes, and killed five times at random: is anything lost?

1. One process searches for a circuit over the prompts, and then two processes; both are timed.
2. The search is killed five times, a random while after a new chunk, and goes on with one process
   or two, in turn.
3. All three results must be equal to the bit. The bar of two processes is 1.8 times one's speed.

    python benchmarks/killed.py [--prompts 1000] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS, BAR = 5, 1.8


def search(folder: Path, n: int) -> None:
    """The work of one process: what a user's own script would be."""
    import torch

    from tensorlens_tl import demo, discover

    torch.set_num_threads(1)
    model, pairs = demo.load_model(), demo.prompts("ioi", n)
    texts, twins = [p.clean for p in pairs], [p.corrupted for p in pairs]
    start = time.perf_counter()
    found = discover(model, texts, twins, n_edges=40, resume=folder, progress=False)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder.parent / f"{folder.name}.json").write_text(found.to_json())
        (folder.parent / f"{folder.name}.s").write_text(str(time.perf_counter() - start))


def started(folder: Path, n: int, processes: int) -> subprocess.Popen[bytes]:
    """Start the search in a session of its own, so that it can be killed whole."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    own = [__file__, "--prompts", str(n), "--work", str(folder)]
    line = [sys.executable, *(launcher if processes > 1 else []), *own]
    kept = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL, env=kept)


def chunks(folder: Path) -> int:
    """Number of finished chunks in a folder."""
    return len([*folder.glob("*.safetensors")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        search(args.work, args.prompts)
        return 0
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as kept:
        folder, seconds = Path(kept), {}
        # 1. One process, and two.
        for count in (1, 2):
            begun = time.perf_counter()
            assert started(folder / f"by{count}", args.prompts, count).wait() == 0
            whole = time.perf_counter() - begun
            seconds[count] = float((folder / f"by{count}.s").read_text())
            print(f"{count} process(es): {seconds[count]:.1f} s, with its start {whole:.1f} s")
        # 2. Killed at random.
        there = 0
        for i in range(KILLS):
            process = started(folder / "killed", args.prompts, 1 + i % 2)
            while process.poll() is None and chunks(folder / "killed") <= there:
                time.sleep(0.01)
            time.sleep(draw.random() * seconds[1] * 64 / args.prompts)
            done = process.poll() is not None
            if not done:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            there = chunks(folder / "killed")
            print(f"{'ended' if done else 'killed'} with {there} chunks kept")
        assert started(folder / "killed", args.prompts, 2).wait() == 0
        # 3. The same?
        texts = {name: (folder / f"{name}.json").read_text() for name in ("by1", "by2", "killed")}
    same, ratio = len(set(texts.values())) == 1, seconds[1] / seconds[2]
    print(f"equal to the bit: {same}; two processes {ratio:.2f} × one, bar {BAR}")
    return 0 if same and ratio >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
