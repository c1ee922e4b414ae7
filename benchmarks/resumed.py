"""Long measurements that go on where they were stopped: a file per chunk, then the page."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import evaluation
import torch


def arguments(text: str | None, kept: str) -> argparse.ArgumentParser:
    """What all of these scripts are told: ``kept`` says what the folder holds."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keep", type=Path, required=True, help=f"a folder for {kept}")
    parser.add_argument("--data", type=Path, default=evaluation.SHARED, help="texts' folder")
    parser.add_argument("--model", help="a folder of SmolLM2, which loads faster")
    parser.add_argument("--until", help="a time such as 22:25, after which nothing begins")
    parser.add_argument("--merge", action="store_true", help="only make the JSON and the page")
    return parser


def keep(path: Path, text: str, said: str, start: float, until: str | None) -> bool:
    """Write a chunk whole or not at all, and say so; true when the time is over.

    Args:
        path: The chunk's file.
        text: What it holds.
        said: What is told of the chunk.
        start: The process's time when the chunk began, in seconds.
        until: A time of the day such as "22:25", or None.
    """
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)
    spent = time.process_time() - start
    print(f"{path.stem}: {said}, {spent:.0f} s", file=sys.stderr, flush=True)
    return bool(until) and datetime.now().strftime("%H:%M") >= until


def measure_or_merge(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], None],
    merged: Callable[[Path], dict[str, Any]],
    results: Path,
    indent: int | None = 1,
) -> None:
    """Measure on one thread; or, with ``--merge``, make the results' file and the page."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    args.keep.mkdir(parents=True, exist_ok=True)
    if not args.merge:
        print(f"float32 products: {evaluation.products()}", file=sys.stderr)
        return run(args)
    import real_page

    results.write_text(json.dumps(merged(args.keep), indent=indent, ensure_ascii=False) + "\n")
    return real_page.write()
