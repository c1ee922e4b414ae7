"""Docstrings and messages keep the manner that CONTRIBUTING describes.

``python tests/test_prose.py FILE …`` prints what a file breaks.
"""

import ast
import doctest
import inspect
import re
import sys
from pathlib import Path

import pytest

import tensorlens_tl

pytestmark = pytest.mark.algebra

PACKAGE = Path(__file__).resolve().parents[1] / "tensorlens_tl"
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\*{0,2}\w+)(?: \([^)]*\))?: (.*(?:\n {5,}.*)*)", re.MULTILINE)
PRONOUNS = {
    "it",
    "its",
    "itself",
    "they",
    "them",
    "their",
    "theirs",
    "these",
    "those",
    "this",
    "that",
    "which",
    "whose",
    "so",
    "his",
}
RIDDLES = re.compile(r", expected |leave it out|is none of these|as many|, got .*, expected")


def entries(docstring: str):
    """(section, name, text) of every entry; Returns and Yields have no names."""
    parts = SECTION.split(inspect.cleandoc(docstring))
    for section, body in zip(parts[1::2], parts[2::2], strict=True):
        if section in ("Returns", "Yields"):
            text = body.split("\n\n")[0]
            yield section, "", " ".join(text.split())
        else:
            for name, text in ENTRY.findall(body):
                yield section, name, " ".join(text.split())


def docstring_faults(path: Path) -> list[str]:
    faults = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        for section, name, text in entries(ast.get_docstring(node) or ""):
            words = text.split()
            where = (
                f"{path.name}: {getattr(node, 'name', 'module')}: {section} {name}: {text[:60]!r}"
            )
            if section != "Raises" and len(words) < 3:
                faults.append(f"{where} is too short")
            elif words and words[0].strip(".,;:").lower() in PRONOUNS:
                faults.append(f"{where} begins with a pronoun")
            elif max(len(s.split()) for s in re.split(r"(?<=[.;:])\s", text)) > 40:
                faults.append(f"{where} has a sentence of over 40 words")
    return faults


def _text(node: ast.expr) -> str | None:
    """A message with {} for what is filled in; None where it is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    return None


def message_faults(path: Path) -> list[str]:
    """Messages of ValueErrors that are not two short sentences."""
    faults = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        kind = getattr(node.exc.func, "id", "")
        text = _text(node.exc.args[0])
        if (
            not kind.endswith("Error")
            or kind in ("AttributeError", "KeyError", "IndexError")
            or not text
        ):
            continue
        where = f"{path.name}:{node.lineno}: {text[:70]!r}"
        sentences = [s for s in re.split(r"(?<=[.?!])\s+", text.strip()) if s]
        if not text.endswith((".", "{}")):
            faults.append(f"{where} does not end with a full stop")
        elif len(sentences) < 2 and not text.endswith("{}"):
            faults.append(f"{where} has no second sentence that says what to do")
        elif max(len(s.split()) for s in sentences) > 32:
            faults.append(f"{where} has a sentence of over 32 words")
        elif RIDDLES.search(text):
            faults.append(f"{where} is not in the plain manner")
    return faults


FILES = sorted(p for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("check", [docstring_faults, message_faults], ids=lambda f: f.__name__)
def test_plain_words(check):
    assert [fault for path in FILES for fault in check(path)] == []


def test_the_checks_find_faults(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        'def f(x):\n    """Do.\n\n    Args:\n        x: Them.\n    """\n'
        '    raise ValueError("bad x")\n'
    )
    assert len(docstring_faults(bad)) == len(message_faults(bad)) == 1


@pytest.mark.parametrize("name", tensorlens_tl.__all__)
def test_every_public_name_has_an_example_that_runs(name):
    thing = getattr(tensorlens_tl, name)
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(thing, name, module=False, globs={})
    assert test.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=sys.stdout.write).failed == 0


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        print(*docstring_faults(file), *message_faults(file), sep="\n")
