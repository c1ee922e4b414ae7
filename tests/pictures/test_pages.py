"""Pages in a real browser: what they show is what Python has, and nothing leaves the file."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import pytest
from models import SHAPES, lens_of, quiet

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.evaluation import evaluate
from tensorlens_tl.pictures import Page, curves_view, depth, map_view, panel, patch_view, table_view
from tensorlens_tl.pictures.split_pages import over

pytestmark = [pytest.mark.browser, pytest.mark.algebra]

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


def test_hovering_colours_and_saving(opened):
    values = np.tril(np.full((6, 6), 0.5, np.float32))
    values[4, 1], values[5, 2] = -8, 8
    page = opened(a_map(values))
    canvas = page.get_by_role("application")
    at, edge = page.evaluate("tensorlens.views[0].figures[0].at"), canvas.bounding_box()

    def move(i, j):
        x, y = ((k + 0.5) * at["cell"] for k in (j, i))
        page.mouse.move(edge["x"] + at["left"] + x, edge["y"] + at["top"] + y)

    inks = {(4, 1): "--neg", (5, 2): "--pos"}
    middles = [
        [round(at[side] + (k + 0.5) * at["cell"]) for side, k in (("left", j), ("top", i))]
        for i, j in inks
    ]
    drawn = page.evaluate(
        "(middles) => { const { canvas } = tensorlens.views[0].figures[0], { width } = canvas;"
        " const { data } = canvas.getContext('2d').getImageData(0, 0, width, canvas.height);"
        " return middles.map(([x, y]) => [...data.slice(4 * (y * width + x)).slice(0, 3)]); }",
        middles,
    )
    for ((i, j), ink), colour in zip(inks.items(), drawn, strict=True):
        move(i, j)
        said = page.locator(".tip").inner_text()
        share = abs(values[i, j]) / np.abs(values[i]).sum()
        assert f"{values[i, j]:+.4g}, {share:.0%}".replace("%", " %") in said and f"@{j}" in said
        hexed = page.evaluate(
            f"getComputedStyle(document.documentElement).getPropertyValue('{ink}')"
        )
        assert colour == [int(hexed.strip()[k : k + 2], 16) for k in (1, 3, 5)]
    page.mouse.click(
        edge["x"] + at["left"] + 1.5 * at["cell"], edge["y"] + at["top"] + 4.5 * at["cell"]
    )
    assert "t4" in page.locator("caption").first.inner_text()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save PNG").click()
    assert saved.value.suggested_filename == "map.png"
    assert Path(saved.value.path()).read_bytes()[1:4] == b"PNG"


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
    # Dragging moves the window, and so do keys.
    whole = page.get_by_role("application", name="The whole map")
    edge = whole.bounding_box()
    page.mouse.move(edge["x"] + edge["width"] / 2, edge["y"] + edge["height"] / 2)
    page.mouse.down()
    page.mouse.up()
    row, column = page.evaluate("[tensorlens.views[0].state.row, tensorlens.views[0].state.column]")
    assert abs(row - 1008) < 8 and abs(column - 1008) < 8
    whole.press("ArrowUp")
    assert page.evaluate("tensorlens.views[0].state.row") == row - 8


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
    maps = lenses[0].operator_maps("Mary", sites=[0, 1, 3])
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


@pytest.mark.parametrize("by", ["token", "head", "edge"])
def test_every_row_of_a_split_is_in_its_page(opened, lenses, by):
    found = lenses[0].attribute("Mary", "John", by=by)
    page = opened(found.to_html())
    last = page.evaluate("tensorlens.views.length") - 1
    assert last == (by != "token")
    n = len(found.sources)
    shown = page.evaluate(
        f"[...Array({n}).keys()].map((i) => tensorlens.views[{last}].value(i, 0))"
    )
    assert shown == found.values[0].tolist()
    rows = page.locator(".table tbody tr")
    assert rows.count() == min(40, n) < n
    page.locator(".table").get_by_role("button", name="more").click()
    assert rows.count() == n
    note, error = page.locator(".note").first.inner_text(), found.completeness_error
    assert ("overlap" if error is None else f"off by at most {error:.0e}") in note


def test_other_results_have_pages(opened, lenses):
    lens = lenses[0]
    for result, said in (
        (lens.logit_lens(), "Mary"),
        (lens.attribute_sequence(-2), "softmax"),
        (lens.head_maps("L1H0"), "Attention pattern"),
        (lens.edit("Mary", versus="John", to=-2.0, site=1).check(demo.load_model()), "top after"),
    ):
        assert said in opened(result.to_html()).locator("main").inner_text()


def test_curves_and_evaluations(opened):
    model, pairs = demo.load_model(), demo.prompts("ioi", 2)
    clean, corrupted = [p.clean for p in pairs], [p.corrupted for p in pairs]
    scores = tensorlens_tl.score_edges(model, clean, corrupted)
    curve = tensorlens_tl.faithfulness_curve(model, clean, scores, corrupted, sizes=(0.0, 0.2, 1.0))
    page = opened(curve.to_html())
    shown = page.evaluate("[0, 1, 2].map((i) => tensorlens.views[1].value(i, 0))")
    assert shown == pytest.approx(curve.shares.tolist(), rel=1e-6)
    drawing = page.get_by_role("application")
    assert drawing.get_by_text("the whole model").count() == 1  # the line across at 1
    drawing.press("ArrowLeft")
    said = page.get_by_role("status").inner_text()
    low, high = curve.intervals()["signed"][1]
    assert f"signed scores: {curve.shares[1]:+.4g} ({low:+.4g} to {high:+.4g})" in said
    assert "edges kept" in drawing.get_attribute("aria-label") and "20" in said
    with quiet():
        found = evaluate(model, clean, ["in_out", "random"], progress=False)
    page = opened(found.to_html())
    means = [row.estimate(found.seed) for row in found.rows]
    assert page.evaluate("tensorlens.views[0].value(0, 0)") == means[0].value
    kin = [e for row, e in zip(found.rows, means, strict=True) if row.measure == "positive"]
    ends = min(0, *(e.low for e in kin)), max(e.high for e in kin)
    drawn = page.evaluate(
        "[...document.querySelectorAll('td.of rect')].map((e) => +e.getAttribute('width'))"
    )
    assert len(page.query_selector_all("td.of path")) == len(found.rows)
    assert drawn[0] == pytest.approx(140 * abs(means[0].value) / (ends[1] - ends[0]), rel=1e-6)
    page.get_by_label("Show").select_option(index=1)
    page.get_by_role("application").press("ArrowLeft")
    said = page.get_by_role("status").inner_text()
    (row,) = (row for row in found.rows if (row.method, row.measure) == ("random", "positive"))
    point, mean = row.curve(found.seed)[-2], row.estimate(found.seed).value
    assert "tokens, %: most relevant masked 25" in said
    ends = f"({point.low:+.4g} to {point.high:+.4g})"
    assert f"random, {mean:.3g}: {point.value:+.4g} {ends}" in said


def test_pages_in_a_notebook(chromium, lenses, tmp_path):
    """Two results, through nbconvert: a strip for readers without frames, a page for the others."""
    nbformat = pytest.importorskip("nbformat")
    exporter = pytest.importorskip("nbconvert").HTMLExporter(embed_images=False)
    results = lenses[0].attribute("Mary"), lenses[0].waterfall("Mary")
    cells = []
    for result in results:
        data = {"text/html": result._repr_html_(), "text/plain": repr(result)}
        output = nbformat.v4.new_output("execute_result", data=data)
        cells.append(nbformat.v4.new_code_cell("result", outputs=[output]))
    page_text, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=cells))
    path = tmp_path / "notebook.html"
    path.write_text(page_text, encoding="utf-8")
    context = chromium.new_context(offline=True)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.route(
        "https://**", lambda route: route.abort()
    )  # nbconvert's own template asks for MathJax
    page.goto(path.as_uri())
    for frame in page.locator("iframe").all():
        frame.scroll_into_view_if_needed()
        assert frame.content_frame.locator("section .view").first.is_visible()
    assert page.locator("iframe").count() == 2 and "takes away" in page.content()
    heights = page.evaluate("[...document.querySelectorAll('iframe')].map((f) => f.offsetHeight)")
    assert heights == [620, 760]
    context.close()
    assert not faults


def test_show_opens_a_file_or_a_cell(lenses, monkeypatch, capsys):
    found, opened = lenses[0].attribute("Mary"), []
    monkeypatch.setattr("webbrowser.open", opened.append)
    found.show()
    path = Path(url2pathname(urlparse(opened[0]).path))
    assert path.read_text(encoding="utf-8") == found.to_html()
    path.unlink()
    shown = []
    display = SimpleNamespace(display=shown.append, HTML=str)
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=display)
    )
    found.show()
    assert len(opened) == 1 and shown[0].startswith("<iframe") and "sandbox" in shown[0]


def test_a_page_is_written_whole(lenses, tmp_path):
    found = lenses[0].attribute("Mary")
    assert found.to_html(tmp_path / "a.html") is None
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == found.to_html()
    with pytest.raises(ValueError, match=r"cannot be written\. Pass a file in a folder"):
        found.to_html(tmp_path / "no" / "a.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_named_reachable_and_legible(opened, lenses, scheme):
    """Controls have names and take the focus; text stands out 4.5 : 1, marks 3 : 1 (WCAG AA)."""
    for result in lenses[0].compare(lenses[1], "Mary"), lenses[0].waterfall("Mary"):
        page = opened(result.to_html(), color_scheme=scheme)
        if scheme == "light":
            controls = "[...document.querySelectorAll('input, select, button, [tabindex]')]"
            unnamed = page.evaluate(
                controls + ".filter((e) => !(e.labels && e.labels.length) && !e.textContent.trim()"
                " && !e.getAttribute('aria-label')).map((e) => e.outerHTML)"
            )
            assert not unnamed
            hidden = page.evaluate(controls + ".map((e) => !e.getClientRects().length)")
            reached = set()
            for _ in range(len(hidden) + 4):
                page.keyboard.press("Tab")
                reached.add(page.evaluate(controls + ".indexOf(document.activeElement)"))
            assert reached - {-1} == {i for i, unseen in enumerate(hidden) if not unseen}
        colours = page.evaluate(
            "Object.fromEntries('ground panel text quiet pos neg mark third size'.split(' ')"
            ".map((name) => [name, getComputedStyle(document.documentElement)"
            ".getPropertyValue('--' + name).trim()]))"
        )
        for front, back, least in (
            *(("text", back, 4.5) for back in ("ground", "panel")),
            *(("quiet", back, 4.5) for back in ("ground", "panel")),
            *((front, "ground", 3) for front in ("pos", "neg", "mark", "third", "size")),
        ):
            assert contrast(colours[front], colours[back]) >= least, (front, back)


def contrast(one, other):
    """The ratio of two colours' relative luminances, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_script_stays_small():
    """What a page carries beside its numbers, as shipped: at most 40 kB with all views together."""
    from tensorlens_tl.pictures import page

    kinds = {path.stem for path in page.ASSETS.glob("*.js")} - {"view", "boot"}
    assert {"map", "graph", "waterfall"} <= kinds
    script, boot = page._script(tuple(sorted(kinds))), page._lines("boot")
    style = len((page.ASSETS / "view.css").read_bytes())
    assert len(page.packed(script.encode())) + len(boot.encode()) + style <= 40_000
    for kind in kinds:  # unpacked, a single view stays below it, too
        assert len(page._script((kind,)).encode()) + style <= 40_000, kind


def test_a_frame_is_as_tall_as_its_page(opened, lenses):
    """In the docs: a page in a frame says how tall it is, and the script beside it listens."""
    script = Path(__file__).parents[2] / "docs" / "_static" / "frames.js"
    frame = lenses[0].waterfall("Mary")._page().frame()
    page = opened(f"<script>{script.read_text(encoding='utf-8')}</script>{frame}")
    inner = page.frame_locator("iframe")
    inner.locator("main[data-ready]").wait_for()
    tall = inner.locator("html").evaluate("(e) => e.offsetHeight")
    page.wait_for_function(f"() => document.querySelector('iframe').offsetHeight === {tall + 4}")


def test_a_row_of_the_map_is_shown_through_depth(opened, lenses):
    maps = lenses[0].operator_maps("Mary", sites=[0])
    page = opened(maps.to_html())
    (rows,) = maps.waterfalls
    canvas = page.get_by_role("application").first
    for row in (14, 13):
        sums, after = page.evaluate("[tensorlens.views[1].sums, tensorlens.views[1].after]")
        assert np.allclose(sums, rows.sums[row].tolist(), rtol=0, atol=1e-6)
        target = float(rows.components.target_value[row])
        assert after[-1] == pytest.approx(target, abs=1e-4)
        assert target == float(maps.depths[0].target_value[0, row])
        canvas.press("ArrowUp")
    chosen = page.get_by_label("Row", exact=True)
    chosen.select_option(index=3)
    sums = page.evaluate("tensorlens.views[1].sums")
    assert np.allclose(sums, rows.sums[3].tolist(), rtol=0, atol=1e-6)


def test_tokens_from_right_to_left_keep_their_places(opened):
    """The position of a token stands on its right, whatever its script, and nothing is too wide."""
    name, lines = '"שלום"@3', [("x" * 400, np.ones(2), None, None)]
    table = table_view(["token"], ["logits"], [[name]], np.ones((1, 1)))
    page = opened(Page("", [table, curves_view([0, 1], lines, ("x", "y"))]).html())
    ends = page.evaluate(
        """() => { const text = document.querySelector('tbody th bdi').firstChild, at = text.data,
        place = (c) => { const range = document.createRange(), i = at.indexOf(c);
          range.setStart(text, i); range.setEnd(text, i + 1);
          return range.getBoundingClientRect().left; };
        return [place('ש'), place('@'), place('3'), place('"')]; }"""
    )
    letter, sign, digit, quote = ends
    assert quote < letter < sign < digit
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_picture_under_its_patches(opened):
    """The picture's pixels where colours are off; a map of other rows takes none."""
    view = patch_view([[1.0, -1.0], [0.0, 0.5]], "logits")
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, 2:] = (10, 200, 30)
    page = opened(over(Page("a picture", [view]), pixels).html())
    page.get_by_label("Colours over the picture").uncheck()
    drawn = page.evaluate(
        "() => { const { at, canvas } = tensorlens.views[0].figures[0];"
        " const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        " const read = (i, j) => { const [x, y] = [j, i].map((k) => (k + 0.6) * at.cell);"
        " const start = 4 * (Math.round(at.top + y) * canvas.width + Math.round(at.left + x));"
        " return [...data.slice(start, start + 3)]; };"
        " return [read(0, 1), read(1, 0)]; }"
    )
    assert drawn == [[10, 200, 30], [0, 0, 0]]
    scaled = over(Page("", [view]), np.array([[-1.0, 0.0], [1.0, 3.0]])).views[0].data["image"]
    assert scaled[..., 0].tolist() == [[0, 64], [128, 255]] and scaled.shape == (2, 2, 3)
    with pytest.raises(ValueError, match=r"no row is a patch\. Leave image out"):
        over(Page("", [map_view(["a"], ["a"], [])]), pixels)
    with pytest.raises(ValueError, match=r"image= has shape \[5\]\. Pass \[row, column\], or"):
        over(Page("", [view]), np.zeros(5))


def test_the_words_of_a_logit_lens(opened, lenses):
    found = lenses[0].logit_lens(pos=None)
    page = opened(found.to_html())
    names, rows = found._table()
    shown = page.evaluate(
        f"[...Array({len(rows)}).keys()].map((i) => [...Array({len(names)}).keys()].map((j) =>"
        " [tensorlens.views[0].word(i, j), tensorlens.views[0].share(i, j)]))"
    )
    assert shown == [[list(cell) for cell in cells] for _, cells in rows]
    head = page.locator(".words thead th").all_inner_texts()
    assert len(head) == len(names) and page.locator(".words tbody tr").count() == len(rows)


def test_numbers_without_a_sign_have_a_hue_of_their_own(opened):
    """Shares are no addition to anything: red and blue are for what adds and takes away."""
    values = np.full((3, 3), 0.5, np.float32)
    for signed, ink in ((False, "--size"), (True, "--pos")):
        shown = panel("P", "share", [depth("start", values)], signed=signed)
        page = opened(Page("a map", [map_view(["a", "b", "c"], ["0", "1", "2"], [shown])]).html())
        drawn, hexed = page.evaluate(
            """(ink) => {
            const { at, canvas } = tensorlens.views[0].figures[0], middle = at.cell / 2;
            const pen = canvas.getContext("2d"), [x, y] = [at.left + middle, at.top + middle];
            const said = getComputedStyle(document.documentElement).getPropertyValue(ink).trim();
            return [[...pen.getImageData(x, y, 1, 1).data].slice(0, 3), said]; }""",
            ink,
        )
        assert drawn == [int(hexed[k : k + 2], 16) for k in (1, 3, 5)]


@pytest.mark.parametrize("n", [1, 8])
def test_a_map_of_zeros_has_one_colour_and_room_for_its_words(opened, n):
    page = opened(a_map(np.zeros((n, n), np.float32)))
    assert page.locator(".legend .step").all_inner_texts() == ["0"]
    wide = [box.bounding_box()["width"] for box in page.locator("caption").all()]
    assert len(wide) == 2 and min(wide) > 200
