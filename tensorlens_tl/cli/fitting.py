"""Whether what was typed fits together: files that exist, and options that go with each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import choices


def check_files(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written, and models that are not there."""
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise ValueError(
            f"{args.written_by} {args.output} cannot be written. Pass a file in a folder that "
            "exists."
        )
    if args.model is None:
        return
    folder = Path(args.model).expanduser()
    if folder.is_dir():
        args.model = str(folder)
        if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
            raise ValueError(
                f"--model {folder} is not a model, as it has no config.json. Pass the folder that "
                "save_pretrained wrote, or a GGUF file."
            )
    elif folder.is_file() and folder.suffix.lower() == ".gguf":
        args.model = str(folder)
    elif folder.exists() or args.model.startswith((".", "/", "~")) or args.model.count("/") > 1:
        raise ValueError(
            f"--model {args.model} is not a folder or a GGUF file. Pass a hub name, or the folder "
            "that save_pretrained wrote."
        )


def check_together(args: argparse.Namespace, default_by: Sequence[str]) -> None:
    """Refuse options that do not fit each other."""
    if args.command == "explain":
        if args.qk and "edge" not in args.by:
            raise ValueError("--qk is for --by edge. Drop --qk, or add --by edge.")
        if args.effect == "total" and args.by == default_by:
            args.by = ["component"]
        served = choices.TOTALS if args.effect == "total" else choices.BY
        if wrong := [by for by in args.by if by not in served]:
            raise ValueError(
                f"--effect {args.effect} is not available for --by {wrong[0]}. Use --by with "
                f"{', '.join(served)}."
            )
    testing = getattr(args, "test", False)
    if args.command == "circuit":
        given = [
            name
            for name, value in (("PROMPT", args.prompts), ("--file", args.file))
            if value and not testing
        ]
        if given:
            raise ValueError(f"{given[0]} is for --test. Add --test, or drop {given[0]}.")
        if args.corrupted and args.ablation != "resample":
            raise ValueError(
                f"--corrupted is not used by --ablation {args.ablation}. Drop one of the two."
            )
