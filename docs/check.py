"""Check the built pages and their sources: `python docs/check.py docs/_build/html`.

1. Nothing is loaded from another host: no script, style, font, picture or frame.
2. Every link to a page of ours leads to a page, and its anchor is there.
3. Every public name of the package has an entry in the reference.
4. Python that is shown without being executed says why, and is at least valid Python.
5. Every test that the page of guarantees names is there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

LOADS = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
"""Attributes by which a tag loads something."""
FETCHED = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "manifest", "dns-prefetch"}
"""Kinds of <link> by which a page loads something or asks another host."""
IN_STYLES = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s]+)""")
IN_SCRIPTS = re.compile(r"""(?:fetch|import|importScripts)\(\s*["']((?:https?:)?//[^"']+)""")
SOURCES = Path(__file__).resolve().parent
TESTS = SOURCES.parent / "tests"
SURFACE = TESTS / "data" / "public_api.txt"
BLOCK = re.compile(r"^(```+)(?:\{code-block\} )?python\n(.*?)^\1", re.DOTALL | re.MULTILINE)
REASON = "% not run: "


class Page(HTMLParser):
    """What a page loads, where it links to, and the anchors it has."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag's addresses and its anchor."""
        given = {name: value or "" for name, value in attrs}
        self._style = tag == "style"
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.loads += [given[name] for name in LOADS.get(tag, ()) if name in given]
        self.loads += IN_STYLES.findall(given.get("style", ""))
        if tag == "link" and FETCHED & set(given.get("rel", "").split()):
            self.loads.append(given.get("href", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])

    def handle_data(self, data: str) -> None:
        """Note what a style element loads."""
        if self._style:
            self.loads += IN_STYLES.findall(data)


def is_foreign(address: str) -> bool:
    """Whether an address names a host."""
    parts = urlsplit(address.strip())
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp")


def foreign_resources(root: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """What a page, a style or a script of ours would load from another host.

    Args:
        root: The folder of the built pages.
        pages: The pages by their file.

    Yields:
        One line for each.
    """
    for path, page in pages.items():
        for address in page.loads:
            if is_foreign(address):
                yield f"{path.relative_to(root)} loads {address}"
    for pattern, found in (("*.css", IN_STYLES), ("*.js", IN_SCRIPTS)):
        for path in sorted(root.rglob(pattern)):
            for address in found.findall(path.read_text(encoding="utf-8", errors="replace")):
                if is_foreign(address):
                    yield f"{path.relative_to(root)} loads {address}"


def broken_links(root: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Links to pages or anchors of ours that are not there.

    Args:
        root: The folder of the built pages.
        pages: The pages by their file.

    Yields:
        One line for each.
    """
    for path, page in pages.items():
        for address in page.links:
            if is_foreign(address) or urlsplit(address).scheme:
                continue
            file, anchor = urldefrag(address)
            target = path if not file else (path.parent / unquote(file)).resolve()
            if not target.is_file():
                yield f"{path.relative_to(root)} links to {address}: no such file"
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{path.relative_to(root)} links to {address}: no such anchor"


def missing_names(pages: dict[Path, Page], surface: str) -> Iterator[str]:
    """Public names that the reference leaves out.

    Args:
        pages: The pages by their file.
        surface: The public names with their signatures, one per line, as the tests keep them.

    Yields:
        One line for each.
    """
    anchors = set().union(*(page.anchors for page in pages.values()))
    for line in surface.splitlines():
        name, signature, _ = line.partition("(")
        owner = name.split(".")[-2]
        if owner[0].isupper() and not signature:
            continue  # a field or property, which the entry of its class lists
        places = {name, name.replace("tensorlens_tl.lens.", "tensorlens_tl.")}
        places.add(name.replace("tensorlens_tl.", "tensorlens_tl.relations."))
        if not places & anchors:
            yield f"{name} is in no page of the reference"


def unmarked_blocks(sources: Path) -> Iterator[str]:
    """Python blocks that are not executed and do not say why, or are not Python.

    Args:
        sources: The folder of the Markdown pages.

    Yields:
        One line for each.
    """
    for path in sorted(sources.rglob("*.md")):
        if "_build" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            where = f"{path.relative_to(sources)}, line {text.count(chr(10), 0, block.start()) + 1}"
            before = text[: block.start()].rstrip("\n").rpartition("\n")[2]
            if not before.startswith(REASON):
                yield f"{where}: expected a line '{REASON}WHY' before Python that is not executed"
            try:
                compile(block[2], str(path), "exec")
            except SyntaxError as error:
                yield f"{where}: {error}"


def missing_tests(page: str, tests: Path) -> Iterator[str]:
    """Tests that a page names and that do not exist.

    Args:
        page: The page's text.
        tests: The folder of the tests.

    Yields:
        One line for each.
    """
    there = {path.name for path in tests.rglob("*.py")}
    for name in sorted(set(re.findall(r"`(\w+\.py)`", page)) - there):
        yield f"testing.md names {name}, which is not in {tests.name}"


def main(argv: list[str]) -> int:
    """Run all checks.

    Args:
        argv: The folder of the built pages.

    Returns:
        0 if all is well, 1 if not, 2 without built pages.
    """
    root = Path(argv[0] if argv else Path(__file__).parent / "_build" / "html").resolve()
    files = sorted(root.rglob("*.html"))
    if not files:
        sys.stderr.write(f"No pages are in {root}. Build them first.\n")
        return 2
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in files}
    wrong = [
        *foreign_resources(root, pages),  # 1.
        *broken_links(root, pages),  # 2.
        *missing_names(pages, SURFACE.read_text(encoding="utf-8")),  # 3.
        *unmarked_blocks(SOURCES),  # 4.
        *missing_tests((SOURCES / "testing.md").read_text(encoding="utf-8"), TESTS),  # 5.
    ]
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    links = sum(len(page.links) for page in pages.values())
    sys.stdout.write(f"{len(pages)} pages, {links} links: {len(wrong)} faults\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
