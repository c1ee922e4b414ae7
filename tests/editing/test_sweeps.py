"""An edit at many sizes: the checks of single sizes, their radius, and the page of points."""

from dataclasses import replace

import pytest
import torch
from comparisons import assert_close
from models import quiet

from tensorlens_tl import demo, editing

pytestmark = pytest.mark.algebra

FACTORS = (0.25, 1.0, 3.0)
SIZES = (0.005, 0.02, 0.1, 0.44)


@pytest.fixture(scope="module")
def model():
    return demo.load_model()


@pytest.fixture(scope="module")
def edit(model):
    with quiet():
        lens = model.run_with_tensorlens(["The capital of France is", "The capital of Italy is"])[1]
    return lens.edit("Paris", versus="Rome", by=-4.0, site=1)


@pytest.fixture(scope="module")
def sweep(model, edit):
    return edit.sweep(model, FACTORS, jacobian=True)


def test_every_size_is_a_check_of_its_own(model, edit, sweep):
    for factor, found in zip(FACTORS, sweep.checks, strict=True):
        alone = (edit * factor).check(model, jacobian=True)
        for name in ("before", "predicted", "real", "kl", "size"):
            assert torch.equal(getattr(found, name), getattr(alone, name)), name
        assert found.tops == alone.tops
        assert_close(found.jacobian, alone.jacobian, 1e-5)  # linear in the factor
    for method in ("predicted", "jacobian"):
        off = [(getattr(c, method) / c.real - 1).abs() for c in sweep.checks]
        assert_close(sweep.errors(method), torch.stack(off), 1e-4)
    with pytest.raises(ValueError, match=r"factors= is empty\. Pass numbers"):
        edit.sweep(model, [])
    with pytest.raises(ValueError, match=r"method='real' predicts nothing\. Use"):
        sweep.errors("real")


def test_the_radius_is_the_largest_size_within(model, edit, sweep):
    for tolerance in (0.0, 0.2, 100.0):
        for prompt in range(2):
            within = [
                float(check.size[prompt])
                for check, errors in zip(sweep.checks, sweep.errors(), strict=True)
                if errors[prompt] <= tolerance
            ]
            assert float(sweep.radius(tolerance)[prompt]) == max(within, default=0.0)
    assert torch.equal(sweep.radius(100.0), (edit * 3.0).size)


def test_the_page_starts_at_the_edit_itself(sweep):
    points, curve, _ = sweep._page().views
    start = points.data["start"]
    assert curve.data["start"] == start == FACTORS.index(1.0)
    share = float(sweep.checks[start].size.mean())
    assert points.data["stops"][start] == f"1 δ: {100 * share:.2g} % of what stands there"
    assert dict(zip(curve.data["guide_names"], curve.data["guides"], strict=True)) == {
        "10 %": 0.1,
        "25 %": 0.25,
    }


def test_what_rounding_hides_is_no_error(model, edit):
    nothing = (edit * 0.0).check(model)
    assert nothing.error == 0 and "(no change, as predicted)" in repr(nothing)
    assert 0 < nothing.rounding < 1e-3
    unseen = replace(nothing, predicted=torch.tensor([0.5, -2.0]), real=torch.full((2,), 1e-6))
    assert unseen.error == torch.inf
    assert "(no change seen, though up to 2 logits were predicted)" in repr(unseen)
    single = editing.EditSweep((1.0, 2.0), (nothing, unseen)).errors()
    assert single.tolist() == [[0, 0], [torch.inf, torch.inf]]


def test_a_page_tells_between_which_sizes_a_prediction_holds(sweep):
    def noted(*errors):
        checks = [
            replace(c, predicted=c.real * (1 + error), size=torch.full((2,), size))
            for c, error, size in zip(sweep.checks * 2, errors, SIZES, strict=False)
        ]
        found = editing.EditSweep(tuple(SIZES[: len(errors)]), tuple(checks))
        return found._page().notes[0].removeprefix("The prediction is within 10% at ")

    assert noted(0, 0, 1, 0) == (
        "sizes of 0.5% to 2% and of 44% of what stands there (median over prompts)."
    )
    assert noted(1, 1, 1) == "no size of these (median over prompts)."
    assert noted(1, 0, 0, 1) == "sizes of 2% to 10% of what stands there (median over prompts)."


def test_frames_and_figures(sweep):
    pytest.importorskip("pandas", reason="an extra")
    pytest.importorskip("matplotlib", reason="an extra")
    frame = sweep.to_dataframe()
    assert len(frame) == 6 and list(frame.factor.unique()) == list(FACTORS)
    assert frame.real[3] == float(sweep.checks[1].real[1])
    drawn = [line.get_ydata() for line in sweep.plot().get_lines()]
    medians = sweep.errors().double().nanmedian(1).values
    assert any(len(y) == 3 and torch.equal(torch.tensor(y), medians) for y in drawn)


@pytest.mark.browser
def test_a_slider_moves_the_points(opened, sweep):
    page = opened(sweep.to_html())
    slider, drawing = page.get_by_label("Size"), page.get_by_role("application").first
    slider.press("Home")
    for k, check in enumerate(sweep.checks):
        shown = page.evaluate(
            "() => tensorlens.views[0].current().map((line) => [[...line.x], [...line.y]])"
        )
        expected = [check.predicted.tolist(), check.jacobian.tolist()]
        assert shown == [[x, check.real.tolist()] for x in expected]
        drawing.press("ArrowLeft")
        said = page.locator("div[role=status]").text_content()
        top, after = check.tops[0]
        assert f"prompt 0: {top!r} → {after!r}" in said and f"{check.real[0]:+.4g}" in said
        assert page.locator(".chosen").first.text_content() == said
        assert f"{FACTORS[k]:.3g} δ" in slider.get_attribute("aria-valuetext")
        slider.press("ArrowRight")
    assert page.locator("table tbody tr").count() == 6


def test_other_studies_have_pages(model, edit):
    cases = demo.prompts("facts", 4)
    with quiet():
        predictions = editing.predict(model, cases, 1)
        study = editing.evaluate(model, cases, methods=("operator", "random"))
        ranking = edit_ranking(model)
    points, table = predictions._page().views
    assert points.data["lines"][0]["x"].tolist() == predictions.predicted["operator"]
    assert table.data["values"][:, 1].tolist() == predictions.real
    (table,) = study._page().views
    rows = [tuple(label) for label in table.data["labels"]]
    at = rows.index(("flipped", "operator"))
    found = study.mean("operator", "flipped")
    assert table.data["values"][at].tolist() == [found.value, found.low, found.high]
    grid, table = ranking._page().views
    assert len(grid.data["rows"]) * len(grid.data["columns"]) == len(ranking.labels)
    assert table.data["values"][:, 0].tolist() == ranking.values.double().mean(0).tolist()
    (table,) = edit._page().views
    assert table.data["values"][:, 1].tolist() == edit.predicted.double().tolist()


def edit_ranking(model):
    lens = model.run_with_tensorlens("The capital of France is")[1]
    return lens.rank_edits("Paris", versus="Rome", by="site")
