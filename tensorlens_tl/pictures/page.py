"""One result as one HTML file: its numbers, the script that draws them, and nothing else.

1. A result says what to draw: a :class:`Page` of views, each of a kind, with plain data.
2. The numbers are packed into one JSON text; "<" is written so that no text of a token ends it.
3. The script is view.js and the parts of the kinds in use, packed like the numbers; boot.js unpacks
   it. A policy in the page allows these scripts and this style by their hashes, and forbids every
   request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from ..checks import new_file, spelled, write_whole
from .packing import packed, plain
from .tabled import Result

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class View:
    """One drawing of a page.

    Attributes:
        kind: The drawer: ``views[kind]`` of assets/kind.js.
        data: What the drawer gets: nested mappings and sequences of text, numbers, NumPy arrays.
        heading: A line above the drawing.
        tab: Views of one tab are shown together. Empty is a tab of its own.
    """

    kind: str
    data: Mapping[str, Any]
    heading: str = ""
    tab: str = ""


@dataclass(frozen=True)
class Page:
    """What one file shows.

    Attributes:
        title: The result in a few words.
        views: The drawings, from top to bottom.
        notes: Sentences below the title: how exact the result is, and by which conventions.
        tabs: Whether a control shows one tab at a time, as for the prompts of a batch.
        tab_name: What that control is called.
        height: Height of the page's frame in a notebook, in pixels.
    """

    title: str
    views: Sequence[View]
    notes: Sequence[str] = ()
    tabs: bool = False
    tab_name: str = "Prompt"
    height: int = 640

    def html(self) -> str:
        """Write the page.

        Returns:
            The text of one HTML file that needs nothing beside it and asks for nothing.
        """
        script, style = (
            _script(tuple(sorted({view.kind for view in self.views}))),
            _asset("view.css"),
        )
        views = [
            {
                "kind": view.kind,
                "heading": view.heading,
                "tab": view.tab or f"{number}: {view.heading}",
                "data": view.data,
            }
            for number, view in enumerate(self.views, 1)
        ]
        boot = _lines("boot")
        data = {"title": self.title, "notes": self.notes, "tabs": self.tabs, "views": views}
        data["tab_name"] = self.tab_name
        data["script"] = packed(script.encode("utf-8"))
        text = json.dumps(plain(data), allow_nan=False, separators=(",", ":"))
        policy = (
            f"default-src 'none'; script-src {_hash(boot)} {_hash(script)}; "
            f"style-src {_hash(style)}; img-src data: blob:; base-uri 'none'; form-action 'none'"
        )
        page = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
            f"<title>{escape(self.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
            "<main><noscript>This page draws with JavaScript, which is off.</noscript></main>\n"
            f'<script type="application/json" id="data">{_inert(text)}</script>\n'
            f"<script>{boot}</script>\n</body>\n</html>\n"
        )
        return page.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair

    def with_lines(self, beside: Any) -> Page:
        """The page with the lines of a text, or of a result's text form, below its notes."""
        lines = [] if beside is None else str(beside).splitlines()
        return replace(self, notes=(*self.notes, *lines))

    def show(self) -> None:
        """Show the page: below the cell of a notebook, or else in the browser."""
        ipython = sys.modules.get("IPython")
        shell = None if ipython is None else ipython.get_ipython()
        if ipython is not None and getattr(shell, "kernel", None) is not None:
            ipython.display.display(ipython.display.HTML(self.frame()))
            return
        # The browser reads the file after this call has returned: it is left to the system.
        handle, name = tempfile.mkstemp(prefix="tensorlens-", suffix=".html")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self.html())
        webbrowser.open(Path(name).as_uri())

    def write(self, path: str | os.PathLike[str] | None) -> str | None:
        """Write the page to a file, whole or not at all; None returns the text instead."""
        text = self.html()
        if path is None:
            return text
        write_whole(new_file(path), lambda file: file.write_text(text, encoding="utf-8"))
        return None

    def frame(self) -> str:
        """Write the page as a frame for notebooks, which keeps its script and style to itself.

        Returns:
            One HTML element.
        """
        return (
            f'<iframe title="{escape(self.title)}" srcdoc="{escape(self.html())}" '
            'sandbox="allow-scripts allow-downloads" loading="lazy" '
            f'style="width:100%;height:{self.height}px;border:0;resize:vertical"></iframe>'
        )


@spelled
class Paged(Result):
    """What has a page: ``to_html``, ``show``, and a frame in notebooks. A result inherits this."""

    _FRAMED: ClassVar[bool] = True
    """Whether notebooks show the page. Of a few numbers they show the line of text alone."""

    def _page(self) -> Page:
        """What is drawn."""
        raise NotImplementedError

    def _strip(self) -> str:
        """HTML above the frame, for where frames are not shown."""
        return f"<pre>{escape(repr(self))}</pre>"

    def to_html(self, path: str | os.PathLike[str] | None = None, beside: Any = None) -> str | None:
        """Write the result as one interactive HTML page, which needs no network and no server.

        Args:
            path: The file to write, whole or not at all. None returns the text instead.
            beside: What stands below the title, too: a text, or a result such as the faithfulness
                of a circuit, whose text form is taken.

        Returns:
            The text of the page, or None where a file was written.

        Raises:
            ValueError: If the folder does not exist.
        """
        return self._page().with_lines(beside).write(path)

    def show(self) -> None:
        """Show the page: below the cell of a notebook, or else in the browser."""
        self._page().show()

    def _repr_html_(self) -> str:
        return self._strip() + (self._page().frame() if self._FRAMED else "")


def _inert(text: str) -> str:
    """JSON that cannot end the element it stands in, whatever its strings hold."""
    return text.replace("<", "\\u003c")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _script(kinds: tuple[str, ...]) -> str:
    text = "\n".join(_lines(name) for name in ("view", *kinds))
    return "(() => {\n" + text + "\nstart();\n})();\n//# sourceURL=tensorlens.js"


@cache
def _lines(name: str) -> str:
    """A script without its comments and the blanks that lines begin with."""
    text = _asset(f"{name}.js")
    text = re.sub(r"^/\*.*?\*/", "", text, flags=re.DOTALL)
    lines = (line.strip() for line in text.splitlines())  # no text of the scripts spans lines
    kept = (line for line in lines if line and not line.startswith("//"))
    return "\n".join(kept)
