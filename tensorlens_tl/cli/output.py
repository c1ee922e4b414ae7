"""What a command found, in the form that was asked for, printed or written to a file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..checks import write_whole

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;padding:0 1em;max-width:64em}"
    "section,pre{overflow:auto}"
)


@dataclass(frozen=True)
class Output:
    """A command's results in every form.

    Attributes:
        text: What a person reads in the terminal.
        json: All numbers, for other programs.
        results: Pairs of a heading and a result, or a text, for the HTML page.
        dot: Graph for Graphviz, of circuits only.
        html: Makes the HTML page, where it is more than the results one after another.
    """

    text: str
    json: str
    results: Sequence[tuple[str, Any]] = ()
    dot: str | None = None
    html: Callable[[], str] | None = None

    def form(self, args: argparse.Namespace) -> str:
        """Choose the form: by option, then by the name of the file, or else text."""
        suffix = "" if args.output is None else args.output.suffix.lower()
        if args.json or (suffix == ".json" and not args.html):
            return self.json
        if wants_page(args):
            return page(self.results) if self.html is None else self.html()
        return self.dot if self.dot is not None and suffix in (".dot", ".gv") else self.text


def wants_page(args: argparse.Namespace) -> bool:
    """Whether the results are to be an HTML page: by option, or by the name of the file."""
    named = args.output is not None and args.output.suffix.lower() in (".html", ".htm")
    return args.html or (named and not args.json)


def emit(found: Output, args: argparse.Namespace) -> None:
    """Print the results, or write them to the file of ``--output``.

    Args:
        found: The results of the command.
        args: Parsed arguments of the command.
    """
    text = found.form(args)
    if args.output is not None:
        write_whole(args.output, lambda file: file.write_text(text + "\n", encoding="utf-8"))
        return
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has what it wanted
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def page(results: Sequence[tuple[str, Any]]) -> str:
    """Make one HTML page that needs nothing beside it.

    Args:
        results: Pairs of a heading and a result. A result that draws itself in notebooks is drawn,
            any other is text.

    Returns:
        The text of the page.
    """
    body = "\n".join(
        f"<h2>{escape(heading)}</h2>\n<section>{_drawn(result)}</section>"
        for heading, result in results
    )
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n<title>tensorlens_tl</title>\n'
        f"<style>{STYLE}</style>\n{body}\n</html>"
    )


def _drawn(result: Any) -> str:
    draw = getattr(result, "_repr_html_", None)
    if draw is not None:
        return draw()
    return f"<pre>{escape(result if isinstance(result, str) else repr(result))}</pre>"
