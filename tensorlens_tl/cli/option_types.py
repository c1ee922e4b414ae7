"""How single options read what was typed: names, numbers, the version."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NoReturn

from tensorlens_tl import __version__

from . import choices


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        message = message.replace("FILE, PROMPT", "FILE")
        found = re.match(r"argument (\S+): (.*)", message, re.DOTALL)
        text = f"{found[1]} {found[2]}" if found else f"{message[:1].upper()}{message[1:]}"
        raise ValueError(
            text if text.endswith((".", "?")) else f"{text}. See tensorlens-tl --help."
        )


class Names(argparse.Action):
    """A list of names, separated by commas or spaces.

    An option of several values also catches a prompt that follows. A value with a space that is no
    list of names is such a prompt.
    """

    def __init__(self, *args: Any, known: Sequence[str], **kwargs: Any):
        self.known = known
        super().__init__(*args, **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        names = getattr(namespace, self.dest)
        names = [] if names is self.default else list(names)
        for value in [values] if isinstance(values, str) else values:
            parts = [part.strip() for part in value.split(",")]
            wrong = [part for part in parts if part not in self.known]
            if wrong and " " in value and self.nargs == "+":
                namespace.caught = [*getattr(namespace, "caught", []), value]
            elif wrong:
                remedy = choices.remedy(wrong[0], self.known)
                raise argparse.ArgumentError(self, f"{wrong[0]!r} does not exist. {remedy}")
            else:
                names += parts
        if not names:
            raise argparse.ArgumentError(self, "has no name. Write prompts before the option.")
        setattr(namespace, self.dest, names)


class Version(argparse.Action):
    """Print the versions of the library and of what it stands on, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        others = (f"{name} {metadata.version(name)}" for name in ("transformer-lens", "torch"))
        print(f"tensorlens-tl {__version__} ({', '.join(others)})")
        parser.exit()


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """A reader of one of the known names."""

    def read(text: str) -> str:
        if text not in known:
            remedy = choices.remedy(text, known)
            raise argparse.ArgumentTypeError(f"{text!r} does not exist. {remedy}")
        return text

    return read


def number(least: int | None) -> Callable[[str], int]:
    """A reader of whole numbers that are not below ``least``."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or (least is not None and int(text) < least):
            bound = "" if least is None else f" ≥ {least}"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number{bound}. Pass one such as {max(8, least or 0)}."
            )
        return int(text)

    return read


def score(text: str) -> float:
    """Read a number that an edge may be ranked by."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number. Pass one such as 0.05.")
    return found


def lead(text: str) -> float:
    """Read by how many logits a token is to win."""
    if (found := score(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0. Pass a lead such as 1.")
    return found
