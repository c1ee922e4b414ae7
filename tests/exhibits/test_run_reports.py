"""The report of one prompt: the results of its calls, whole, and what a model cannot have."""

import pytest
import torch
from models import quiet

from tensorlens_tl import demo

pytestmark = pytest.mark.algebra
GOAL = "Paris", "Rome"


@pytest.fixture(scope="module")
def lens():
    with quiet():
        return demo.load_model().run_with_tensorlens("The capital of France is")[1]


@pytest.fixture(scope="module")
def report(lens):
    return lens.report(None, *GOAL)


def test_it_holds_the_results_of_its_calls(lens, report):
    results = report.results
    assert torch.equal(results["By token"].values, lens.attribute(*GOAL).values)
    assert torch.equal(results["By head"].values, lens.attribute(*GOAL, by="head").values)
    assert torch.equal(results["Through depth"].sums, lens.waterfall(*GOAL).sums)
    assert results["As a graph"].links == lens.attribution_graph(*GOAL).links
    maps = lens.operator_maps("Paris")
    assert torch.equal(results["The operator"].depths[0].values, maps.depths[0].values)
    logits = lens.logits[0, -1].double()
    for text, logit, share in report.predictions:
        token = lens.capture.tokenizer.encode(text, add_special_tokens=False)[0]
        assert logit == float(logits[token])
        assert share == pytest.approx(float(logits.softmax(-1)[token]))
    assert not report.left_out and lens.exactness in report.exactness[0]


def test_the_page_says_how_exact_each_part_is(report):
    page = report._page()
    headings = [view.heading.partition(":")[0] for view in page.views]
    assert list(dict.fromkeys(headings)) == ["Predictions", *report.results]
    said = [note.partition(": ") for note in page.notes]
    for name, result in report.results.items():
        for note in result._page().notes:  # each once, with all that it is said of
            (of,) = (of for of, _, text in said if text == note)
            assert name in of.split(", ")


def test_what_cannot_be_had_is_named(lens, monkeypatch):
    def refused(*_, **__):
        raise ValueError("No layer of this model has patterns. Ask another model.")

    monkeypatch.setattr(type(lens), "operator_maps", refused)
    found = lens.report()
    assert "The operator" not in found.results
    assert found.left_out == {
        "The operator": "No layer of this model has patterns. Ask another model."
    }
    assert "The operator is left out: No layer of this model has patterns." in repr(found)
    assert any("The operator is left out" in note for note in found._page().notes)


def test_a_file_is_written_whole_or_not_at_all(lens, tmp_path):
    found = lens.report(tmp_path / "report.html", *GOAL)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == found.to_html()
    with pytest.raises(ValueError, match="cannot be written"):
        lens.report(tmp_path / "none" / "report.html")
    two = demo.load_model().run_with_tensorlens(["The capital of France is"] * 2)[1]
    with pytest.raises(ValueError, match=r"report is of one prompt, but the lens has 2"):
        two.report()


@pytest.mark.browser
@pytest.mark.algebra
def test_all_parts_are_drawn_and_every_row_can_be_seen(opened, lens, report):
    page = opened(report.to_html())
    views = report._page().views
    assert page.evaluate("() => tensorlens.views.length") == len(views)
    table = page.locator("section", has=page.get_by_text("By token:")).first
    rows = table.locator("tbody tr")
    if (more := table.get_by_role("button", name="more")).is_visible():
        more.click()
    assert rows.count() == len(report.results["By token"].sources)
