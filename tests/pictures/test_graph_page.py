"""The page of nodes and edges in a real browser: its numbers, its controls, and its files."""

import json
from dataclasses import replace
from functools import cache
from xml.etree import ElementTree

import pytest
import torch
from models import quiet

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.graph import Edge, Node
from tensorlens_tl.pictures import Page, edge_view, graph_view

pytestmark = [pytest.mark.browser, pytest.mark.algebra]


@cache
def graph_of(prompt="The capital of France is"):
    with quiet(), torch.no_grad():
        lens = demo.load_model().run_with_tensorlens(prompt)[1]
    return lens.attribution_graph("Paris", versus="Rome", n_nodes=40)


@cache
def html():
    return graph_of().to_html()


def links_of(page, more=""):
    return page.evaluate(
        "() => tensorlens.views[0].links().map((x) => [x.src.label, x.dest.label, x.read, x.weight"
        f"{more}])"
    )


def visible(page):
    return page.evaluate(
        "() => tensorlens.views[0].links().filter((x) => x.line"
        " && getComputedStyle(x.line).visibility === 'visible').length"
    )


def press(page, name):
    page.get_by_role("button", name=name).click()


def saved(page, name):
    with page.expect_download() as found:
        press(page, name)
    with open(found.value.path(), encoding="utf-8") as file:
        return file.read()


def test_the_page_has_pythons_numbers(opened):
    graph, page = graph_of(), opened(html())
    names = ("", "v", "q", "k")
    expected = {
        (graph.labels[x.src], graph.labels[x.dest], names.index(x.reads)): x.weight
        for x in graph.links
    }
    assert {tuple(key): weight for *key, weight in links_of(page)} == expected
    effects = page.evaluate("() => tensorlens.views[0].units().map((u) => [u.label, u.effect])")
    assert dict(effects) == dict(zip(graph.labels, (x.effect for x in graph.nodes), strict=True))
    total = sum(abs(x.weight) for x in graph.links if x.conserved)
    assert page.evaluate("() => tensorlens.views[0].total()") == pytest.approx(total)
    kept = sum(x.weight for x in graph.into(-1))
    assert f"those into the target to {graph.target_value:+.6g}" in page.inner_text("main")
    assert f"the edges kept into the target sum to {kept:+.6g}" in page.inner_text("main")


def test_the_slider_keeps_the_largest_and_says_their_share(opened):
    graph, page = graph_of(), opened(html())
    slider = page.get_by_label("Edges", exact=True)
    for key, count in (("Home", 5), ("ArrowRight", 10), ("ArrowRight", 20)):
        slider.press(key)
        assert visible(page) == count
        shown = [x for x in graph.links[:count] if x.conserved]
        share = sum(abs(x.weight) for x in shown)
        share /= sum(abs(x.weight) for x in graph.links if x.conserved)
        assert f"{count} of {len(graph.links)}" in slider.get_attribute("aria-valuetext")
        assert f"{100 * share:.0f} % of Σ|weight|" in slider.get_attribute("aria-valuetext")
    slider.press("End")
    assert visible(page) == min(500, len(graph.links))


def test_queries_and_keys_are_dashed_and_can_be_left_out(opened):
    page = opened(html())
    styles = links_of(
        page, ", x.line?.getAttribute('stroke'), x.line?.getAttribute('stroke-dasharray')"
    )
    for _, _, read, weight, hue, dash in styles[:500]:
        if read > 1:
            assert hue == "var(--third)" and dash
        else:
            assert hue == ("var(--pos)" if weight > 0 else "var(--neg)") and dash is None
    page.get_by_label("Queries and keys").uncheck()
    assert {read for _, _, read, *_ in links_of(page)} <= {0, 1}
    page.get_by_label("Constants").uncheck()
    assert not any("b_" in src for src, *_ in links_of(page))


def test_a_nodes_edges_by_mouse_and_by_keys(opened):
    graph, page = graph_of(), opened(html())
    page.locator("svg g.unit .glyph").last.click()
    into = graph.into(-1)
    assert visible(page) == sum(x.dest == len(graph) - 1 for x in graph.links[:500])
    said = page.locator(".lists").inner_text()
    assert f"these sum to {sum(x.weight for x in into):+.4g}" in said
    assert f"all of it to {graph.target_value:+.4g}" in said
    first = page.locator(".listing td.num").first.inner_text()
    assert first == f"{into[0].weight:+.4g}"
    drawing = page.locator("svg[role=application]")
    drawing.press("Escape")
    drawing.press("ArrowDown")
    assert "Paris" in page.locator("[role=status]").inner_text()  # the target is first
    drawing.press("ArrowDown")
    drawing.press("Enter")
    label = page.evaluate("() => tensorlens.views[0].state.only.label")
    i = graph.labels.index(label)
    assert visible(page) == sum(i in (x.src, x.dest) for x in graph.links[:500])
    assert f"{graph.nodes[i].effect:+.4g}" in page.locator(".lists").inner_text()
    press(page, "Show all")
    assert visible(page) == 80


def test_groups_sum_their_edges_and_go_into_the_file(opened):
    graph, page = graph_of(), opened(html())
    picked = [graph.labels.index(name) for name in ("L1H0@5", "L1H1@5")]
    for i in picked:
        page.evaluate(f"() => tensorlens.views[0].pick({graph.labels[i]!r})")
    page.get_by_label("Name").fill("movers")
    press(page, "Group picked nodes")
    found = {tuple(key): weight for *key, weight in links_of(page)}
    out = {}
    for x in graph.links:
        if x.src in picked:
            key = "movers", graph.labels[x.dest], ("", "v", "q", "k").index(x.reads)
            out[key] = out.get(key, 0.0) + x.weight
    assert {key: w for key, w in found.items() if key[0] == "movers"} == pytest.approx(out)
    data = json.loads(saved(page, "Save JSON"))
    nodes = json.loads(graph.to_json())["nodes"]
    assert data["qParams"]["supernodes"] == [["movers", *(nodes[i]["node_id"] for i in picked)]]
    assert data["nodes"] == nodes
    press(page, "Ungroup all")
    assert len(links_of(page)) == len(graph.links)
    assert saved(page, "Save JSON") == graph.to_json()


def test_the_saved_drawing_and_dot_stand_alone(opened):
    page = opened(html())
    text = saved(page, "Save SVG")
    root = ElementTree.fromstring(text)
    assert "var(" not in text and 'visibility="hidden"' not in text
    lines = [x for x in root.iter("{http://www.w3.org/2000/svg}path") if x.get("fill") == "none"]
    assert sum(x.get("class") != "glyph" for x in lines) == 80
    assert [x.text for x in root.iter("{http://www.w3.org/2000/svg}text")][-1] == "input"
    assert saved(page, "Save DOT").count("->") == 80


def test_edges_and_paths_without_positions(opened):
    lens = demo.load_model().run_with_tensorlens("The capital of France is")[1]
    circuit = lens.discover("Paris", versus="Rome", n_edges=30)
    scores = [circuit.scores[edge] for edge in circuit]
    page = opened(circuit.to_html(beside="Faithfulness 0.9\nof two prompts"))
    others = len(circuit.scores) - 30
    assert others > 400 and f"scores of {others} others" in page.locator("main").inner_text()
    assert page.locator("p.note").all_inner_texts()[-2:] == ["Faithfulness 0.9", "of two prompts"]
    text = saved(page, "Save JSON")
    assert len(text) < len(circuit.to_json()) / 4
    assert tensorlens_tl.Circuit.from_json(text) == replace(
        circuit, scores=dict(zip(circuit, scores, strict=True))
    )
    reads = {"v": 1, "q": 2, "k": 3}
    expected = {
        (str(e.src), str(e.dest).partition(".")[0], reads.get(e.dest.name, 0)): x
        for e, x in zip(circuit, scores, strict=True)
    }
    assert {tuple(key): x for *key, x in links_of(page)} == pytest.approx(expected)
    paths = lens.paths("Paris", k=12)
    page = opened(paths.to_html())
    found = links_of(page)
    into = sum(x for _, dest, _, x in found if dest == "target")
    assert into == pytest.approx(sum(p.contribution for p in paths))
    units = dict(page.evaluate("() => tensorlens.views[0].units().map((u) => [u.label, u.effect])"))
    for name, effect in units.items():  # what flows in flows out
        for end in (0, 1):
            sums = [x[3] for x in found if x[end] == name]
            assert not sums or sum(sums) == pytest.approx(effect)


def test_a_long_prompt_is_drawn_where_its_largest_edges_are(opened):
    n = 400
    nodes = [(f'"t"@{i}', Node("embed"), 1.0) for i in range(n)] + [("end", Node("logits"), 2.0)]
    links = [(i, n, "", 1.0 + i) for i in range(n)]
    page = opened(Page("long", [graph_view(nodes, links, ["t"] * n, [*range(n), n - 1])]).html())
    page.get_by_label("Edges", exact=True).press("End")
    assert visible(page) == 80 and len(links_of(page)) == n
    assert page.get_by_role("button", name="388 more").is_visible()  # the list has them all


def test_features_have_short_names_and_shapes_of_their_own(opened):
    places = [Node("feature", 0, 17, "mlp_out"), Node("error", 0, name="mlp_out"), Node("rest")]
    nodes = [(f"{node}@0", node, 1.0) for node in places] + [("end", Node("logits"), 3.0)]
    links = [(i, 3, "", 1.0) for i in range(3)]
    page = opened(Page("features", [graph_view(nodes, links, ["t"], [0] * 4)]).html())
    units = page.evaluate(
        "() => tensorlens.views[0].units().map((u) => [u.name.textContent, u.kind, "
        "u.glyph.tagName, u.y])"
    )
    names, kinds, shapes, heights = zip(*units, strict=True)
    assert [name.strip("\u2068\u2069") for name in names] == ["F17", "error", "rest", "end"]
    assert kinds == ("feature", "error", "constant", "target")
    assert shapes == ("circle", "path", "path", "rect")
    assert heights[2] > heights[0] == heights[1] > heights[3]
    page.get_by_label("Errors").uncheck()
    assert len(links_of(page)) == 2


@pytest.mark.parametrize("kind", ["nan", "zero", "alone", "nasty"])
def test_odd_graphs(opened, kind):
    tokens = ['"</script><b>', "שלום", "x" * 300, "a\nb"]
    nodes = [(f'"{token}"@{i}', Node("embed"), 1.0) for i, token in enumerate(tokens)]
    nodes += [("L0MLP@3", Node("mlp", 0), 0.0), ("end", Node("logits"), 2.0)]
    weight = {"nan": float("nan"), "zero": 0.0}.get(kind, 1.0)
    links = [(i, 4, "", weight) for i in range(4)] + [(4, 5, "", 2.0 * weight)]
    if kind == "alone":
        nodes, links, tokens = nodes[-1:], [], tokens[:1]
    positions = [0] if kind == "alone" else [0, 1, 2, 3, 3, 3]
    view = graph_view(nodes, links, tokens, positions)
    page = opened(Page("odd", [view]).html(), viewport={"width": 420, "height": 700})
    assert len(links_of(page)) == len(links)
    assert page.evaluate("document.querySelectorAll('main script, main b b').length") == 0
    ElementTree.fromstring(saved(page, "Save SVG"))


def test_edges_without_scores_are_drawn_alike():
    edges = [Edge.parse("input→L0MLP"), Edge.parse("L0MLP→logits")]
    view = edge_view(edges, [float("nan")] * 2)
    assert view.data["weight"].tolist() == [1.0, 1.0] and "no score" in view.data["unit"]
