"""docs/check.py finds each kind of fault that it is there for."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.algebra

PAGE = Path(__file__).resolve().parents[1] / "docs" / "check.py"


@pytest.fixture
def check():
    spec = importlib.util.spec_from_file_location("docs_check", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages(check, root, **texts):
    found = {}
    for name, text in texts.items():
        path = root / f"{name}.html"
        path.write_text(text)
        found[path] = check.Page(text)
    return found


FOREIGN = [
    '<script src="https://cdn.example/x.js"></script>',
    '<script src="//cdn.example/x.js"></script>',
    '<link rel="stylesheet" href="https://cdn.example/x.css">',
    '<link rel="shortcut icon" href="http://cdn.example/x.ico">',
    '<img src="https://cdn.example/x.png">',
    '<img srcset="https://cdn.example/x.png 2x">',
    '<iframe src="https://cdn.example/"></iframe>',
    '<div style="background:url(https://cdn.example/x.png)"></div>',
    "<style>@import 'https://cdn.example/x.css';</style>",
]


@pytest.mark.parametrize("html", FOREIGN)
def test_what_another_host_would_be_asked_for(check, tmp_path, html):
    found = list(check.foreign_resources(tmp_path, pages(check, tmp_path, a=html)))
    assert len(found) == 1 and "cdn.example" in found[0]


def test_foreign_styles_and_scripts_in_files(check, tmp_path):
    (tmp_path / "a.css").write_text("@font-face { src: url('https://cdn.example/f.woff2') }")
    (tmp_path / "a.js").write_text('fetch("https://cdn.example/x.json")')
    assert len(list(check.foreign_resources(tmp_path, {}))) == 2


def test_links_and_own_files_are_no_fault(check, tmp_path):
    html = (
        '<a href="https://example.org">x</a><link rel="canonical" href="https://example.org">'
        '<img src="data:image/png;base64,AA=="><script src="_static/x.js"></script>'
    )
    assert not list(check.foreign_resources(tmp_path, pages(check, tmp_path, a=html)))


def test_broken_links(check, tmp_path):
    html = '<p id="here"></p><a href="#here">1</a><a href="b.html#there">2</a>'
    both = pages(check, tmp_path, a=html, b='<p id="there"></p>')
    assert not list(check.broken_links(tmp_path, both))
    wrong = '<a href="#gone">1</a><a href="b.html#gone">2</a><a href="c.html">3</a>'
    both |= pages(check, tmp_path, a=wrong)
    found = list(check.broken_links(tmp_path, both))
    assert [line.split(": ")[1] for line in found] == ["no such anchor"] * 2 + ["no such file"]


def test_a_name_that_the_reference_leaves_out(check, tmp_path):
    surface = (
        "tensorlens_tl.capture(model)\ntensorlens_tl.Node.kind\ntensorlens_tl.lens.load(path)\n"
    )
    html = '<p id="tensorlens_tl.capture"></p>'
    found = list(check.missing_names(pages(check, tmp_path, a=html), surface))
    assert found == ["tensorlens_tl.lens.load is in no page of the reference"]
    html += '<p id="tensorlens_tl.load"></p>'
    assert not list(check.missing_names(pages(check, tmp_path, a=html), surface))


@pytest.mark.parametrize(
    ("page", "faults"),
    [
        ("```python\nx = 1\n```\n", 1),
        ("% not run: it downloads\n```python\nx = 1\n```\n", 0),
        ("% not run: it downloads\n\n```{code-block} python\nx = \n```\n", 1),
        ("```{code-cell}\nx = 1\n```\n", 0),
    ],
)
def test_python_that_is_not_executed(check, tmp_path, page, faults):
    (tmp_path / "a.md").write_text(page)
    assert len(list(check.unmarked_blocks(tmp_path))) == faults


def test_a_test_that_is_not_there(check, tmp_path):
    (tmp_path / "test_here.py").write_text("")
    found = list(check.missing_tests("`test_here.py`, `test_gone.py`", tmp_path))
    assert len(found) == 1 and "test_gone.py" in found[0]
