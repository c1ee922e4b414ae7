"""Pages in a real browser: what they show is what Python has, and nothing leaves the file."""

import json
import re

import numpy as np
import pytest
from models import SHAPES, lens_of

from tensorlens_tl import demo
from tensorlens_tl.pictures import Page, depth, map_view, panel

pytestmark = pytest.mark.browser

FIRST = SHAPES[0]

NASTY = [
    "</script><script>alert(1)</script>",
    "<!--",
    "<b>&amp;",
    "שלום",
    "a\nb\tc",
    "x" * 400,
    "\u2028",
    "😀",
]


def a_map(values, tokens=None, **options):
    tokens = tokens or [f"t{i}" for i in range(len(values))]
    only = depth("start", values, np.zeros(len(values)), **options)
    shown = panel("T", "logits", [only], values.astype(float).sum(1))
    return Page("a map", [map_view(tokens, tokens, [shown])]).html()


def cells(page, places):
    """What the page holds at places [i, j] of its first panel, and what it says of them."""
    return page.evaluate(
        "(at) => at.map(([i, j]) => [tensorlens.views[0].value(0, i, j),"
        " tensorlens.views[0].exact(0, i, j), tensorlens.views[0].words(0, [i, j])])",
        places,
    )


def test_a_small_map_holds_pythons_numbers(opened):
    matrix = lens_of(FIRST)[0].token_matrix("in_out", 3)
    page = opened(matrix.to_html())
    n = len(matrix.labels[0])
    every = [[i, j] for i in range(n) for j in range(n)]
    found = cells(page, every)
    assert [v for v, *_ in found] == matrix[0].flatten().tolist()
    assert all(exact for _, exact, _ in found)
    # Clicking a row lists its numbers, largest first, and says what they sum to.
    row = matrix[0][n - 1].tolist()
    listed = page.locator(".listing").first
    assert listed.locator("td.num").first.inner_text() == f"{max(row, key=abs):+.4g}"
    said = listed.locator("caption").inner_text()
    assert f"row sum {matrix[0][n - 1].double().sum():+.4g}" in said
    assert f"target {float(matrix.target_value[0, -1]):+.6g}" in said


def test_a_long_map_is_small_and_exact_where_it_says_so(opened):
    rng, n = np.random.default_rng(0), 2048
    values = np.tril(rng.standard_t(1.5, (n, n)) * rng.random((n, 1))).astype(np.float32)
    html = a_map(values)
    assert len(html) <= 2**20
    page = opened(html)
    places = rng.integers(0, n, (200, 2))
    best = np.abs(values).argmax(1)
    places = [*places.tolist(), *[[i, int(best[i])] for i in range(0, n, 100)]]
    exact = 0
    for (i, j), (value, known, words) in zip(places, cells(page, places), strict=True):
        real = float(values[i, j])
        if known:
            exact += 1
            assert value == real
        elif "below" in words:
            assert abs(real) <= float(re.search(r"below (\S+)", words)[1]) * 1.05
        else:
            low, high = sorted(map(float, re.search(r"\n(\S+) to (\S+)", words).groups()), key=abs)
            assert abs(low) * 0.95 <= abs(real) <= abs(high) * 1.05 and real * high > 0
    assert exact > 20


@pytest.mark.parametrize("kind", ["nan", "zero", "one token", "nasty"])
def test_odd_maps(opened, kind):
    values, tokens = np.tril(np.ones((8, 8), np.float32)), NASTY
    if kind == "nan":
        values[3, :2] = np.nan, np.inf
    values = values * 0 if kind == "zero" else values
    if kind == "one token":
        values, tokens = values[:1, :1], tokens[:1]
    page = opened(a_map(values, tokens), viewport={"width": 420, "height": 800})
    assert page.evaluate("document.querySelectorAll('main script, main b script').length") == 0
    found = cells(page, [[i, j] for i in range(len(values)) for j in range(len(values))])
    shown = np.array([np.nan if v is None else v for v, *_ in found]).reshape(values.shape)
    assert np.array_equal(shown, values, equal_nan=True)


def test_the_file_is_one_element_of_plain_text():
    """No token ends the script or starts an element; no address but the page's own."""
    html = a_map(np.eye(8, dtype=np.float32), NASTY)
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "http:" not in html
    data = re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1]
    assert "<" not in data and json.loads(data)["views"][0]["data"]["rows"] == NASTY


@pytest.fixture(scope="module")
def lenses():
    """The demo's lens of a prompt, and of its twin."""
    model = demo.load_model()
    prompts = "When Mary and John went to the store, {} gave a drink to"
    return [model.run_with_tensorlens(prompts.format(name))[1] for name in ("John", "Mary")]


def test_a_slider_through_the_depths(opened, lenses):
    maps = lenses[0].operator_maps("Mary")
    page = opened(maps.to_html())
    slider = page.get_by_label("From")
    n = len(maps.depths[0].labels[0])
    for i, one in enumerate(maps.depths):
        every = [[q, k] for q in range(n) for k in range(n)]
        assert [v for v, *_ in cells(page, every)] == one[0].flatten().tolist()
        assert (
            page.locator("output").inner_text()
            == one.layers[0]
            == slider.get_attribute("aria-valuetext")
        )
        if i + 1 < len(maps.depths):
            slider.press("ArrowRight")
    share = page.evaluate("tensorlens.views[0].value(1, 5, 2)")
    assert share == float(maps.baseline[0][5, 2])


def test_a_waterfall_shows_every_step(opened, lenses):
    found = lenses[0].waterfall("Mary", "John")
    page = opened(found.to_html())
    shown = page.evaluate("[tensorlens.views[0].sums, tensorlens.views[0].after]")
    assert np.allclose(shown[0], found.sums[0].tolist(), rtol=0, atol=1e-6)
    assert np.allclose(shown[1], found.sums[0].double().cumsum(0).tolist(), rtol=0, atol=1e-5)
    # Keys choose a step; its parts and its heads by position are listed exactly.
    page.evaluate("tensorlens.views[0].choose(0)")
    page.get_by_role("application").press("ArrowRight")
    rows = [
        source
        for source, step in zip(found.components.sources, found.of_step, strict=True)
        if step == 1
    ]
    values = dict(
        zip(map(str, found.components.sources), found.components.values[0].tolist(), strict=True)
    )
    listed = page.locator(".listing").first.locator("td.num:not(.quiet)").all_inner_texts()
    numbers = sorted((values[str(row)] for row in rows), key=abs, reverse=True)
    assert listed == [f"{v:+.4g}" for v in numbers]
    heads = [
        float(v)
        for s, v in zip(found.heads.sources, found.heads.values[0], strict=True)
        if s.pos == 2
    ]
    more = page.get_by_role("button", name="more")
    more.first.click()
    text = page.locator(".listing").nth(1).inner_text()
    assert f"{heads[0]:+.4g}" in text and "L0H0" in text
    before = page.locator("polyline").count()
    page.get_by_label("logit lens").uncheck()
    assert page.locator("polyline").count() == before - 1 == 1


def test_two_prompts_side_by_side(opened, lenses):
    found = lenses[0].compare(lenses[1], "Mary", "John")
    page = opened(found.to_html())
    by_position = [one.sum("node") for one in (found.clean, found.corrupted, found.tokens)]
    for k, one in enumerate(by_position):
        for source, value in zip(one.sources, one.values[0].tolist(), strict=True):
            if source.pos is not None:
                shown = page.evaluate(f"tensorlens.views[0].value({source.pos}, {k})")
                assert shown == pytest.approx(value, abs=1e-5)
    page.get_by_label("Order").select_option("size of difference")
    first = page.locator("tbody tr").first.inner_text()
    assert "John @9" in first or "John @10" in first
    page.get_by_label("Find").fill("mary")
    assert page.locator("table").first.locator("tbody tr").count() == 2
