"""Prompts from arguments, files and standard input. One rule for every command, without torch.

An argument is one prompt, as typed. A file and standard input have one prompt per line. They are
read as UTF-8; a byte-order mark, line ends of any system and blank lines are no part of a prompt.
Spaces at both ends of a line are.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

Prompt = str | list[int]
PAIRS = ("prompt", "corrupted", "target", "versus")
"""Columns of --data."""
DEMO_PROMPT = "When Mary and John went to the store, John gave a drink to"


def read_prompts(args: argparse.Namespace) -> Sequence[Prompt]:
    """Read the prompts of a command.

    Args:
        args: Parsed arguments of the command.

    Returns:
        Texts, or with ``--ids`` lists of token ids. The list is empty where the demo model's own
        prompts are to be drawn.

    Raises:
        ValueError: If there are no prompts, or some are given twice, empty or not ids.
    """
    if args.prompts and args.file is not None:
        raise ValueError("PROMPT and --file were both given. Drop one of them.")
    if args.file is not None:
        texts = _file_lines(args.file, "--file")
    elif args.prompts in ([], ["-"]):
        texts = _lines(_standard_input())
    else:
        texts = args.prompts
    if blank := [i for i, text in enumerate(texts, 1) if not text.strip()]:
        raise ValueError(f"PROMPT {blank[0]} is empty. Pass a text.")
    if not texts and args.prompts == [] and args.file is None and args.model is None:
        return [DEMO_PROMPT] if args.command == "explain" and not args.ids else []
    if not texts:
        raise ValueError(
            "There are no prompts. Pass them as arguments, or one per line in --file or on "
            "standard input."
        )
    return [_ids(text) for text in texts] if args.ids else texts


def read_corrupted(args: argparse.Namespace, prompts: Sequence[Prompt]) -> Sequence[Prompt] | None:
    """Read the corrupted prompts of ``--corrupted``.

    Args:
        args: Parsed arguments of the command.
        prompts: The prompts that they belong to.

    Returns:
        One corrupted prompt per prompt, or None where there is no file.

    Raises:
        ValueError: If there is not one for each prompt.
    """
    if args.corrupted is None:
        return None
    found = _file_lines(args.corrupted, "--corrupted")
    if len(found) != len(prompts):
        raise ValueError(
            f"--corrupted {args.corrupted} has {len(found)} lines for {len(prompts)} prompts. "
            "Write one corrupted prompt for each, and pass the prompts."
        )
    return [_ids(text) for text in found] if args.ids else found


def read_pairs(args: argparse.Namespace) -> dict[str, list[str]]:
    """Read the columns of ``--data``.

    Args:
        args: Parsed arguments of the command.

    Returns:
        Columns by name: "prompt", and those of "corrupted", "target" and "versus" that are there.

    Raises:
        ValueError: If there is no such column, a cell is empty, or prompts are given twice.
    """
    given = {"PROMPT": args.prompts, "--file": args.file, "--corrupted": args.corrupted}
    given |= {"--target": args.target, "--versus": args.versus}
    if twice := [name for name, value in given.items() if value]:
        raise ValueError(f"--data and {twice[0]} were both given. Drop one of them.")
    text = read_text(args.data, "--data")
    rows = list(csv.DictReader(io.StringIO(text), strict=True))
    names = [name for name in PAIRS if rows and rows[0].get(name) is not None]
    if "prompt" not in names:
        raise ValueError(f"--data {args.data} has no column prompt. Name the columns in line 1.")
    columns = {name: [row[name] or "" for row in rows] for name in names}
    for name, cells in columns.items():
        if blank := [i for i, cell in enumerate(cells, 1) if not cell.strip()]:
            raise ValueError(
                f"--data {args.data} has no {name} in row {blank[0]}. Fill in every cell of the "
                "column, or drop the column."
            )
    return columns


def _ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if wrong := [word for word in words if not word.isdecimal()]:
        raise ValueError(f"--ids takes whole numbers, and {wrong[0]!r} is not one. Drop --ids.")
    return [int(word) for word in words]


def read_text(path: Path, option: str) -> str:
    """Read a text file.

    Args:
        path: The file to read.
        option: What the file was given as, for the message.

    Returns:
        The text, without a byte-order mark, every line end as a newline.

    Raises:
        ValueError: If the file cannot be read, or is not UTF-8.
    """
    try:
        return _decoded(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{option} {path} cannot be read, as there is no such file. Check its name."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{option} {path} cannot be read ({error}). Pass a text in UTF-8."
        ) from None


def _file_lines(path: Path, option: str) -> list[str]:
    return _lines(read_text(path, option))


def _standard_input() -> str:
    """Standard input where it is piped, and nothing where a person would have to type."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    stream = getattr(sys.stdin, "buffer", None)  # notebooks have none
    try:
        return _decoded(sys.stdin.read().encode() if stream is None else stream.read())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Standard input cannot be read ({error}). Pass a text in UTF-8."
        ) from None


def _decoded(data: bytes) -> str:
    return io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=None).read()


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]
