"""The figure of every kind of result: numbers read back off the artists are the result's own."""

import importlib
import io
import math
import pkgutil
from functools import cache

import matplotlib
import numpy as np
import pytest
import torch
from models import quiet
from test_figures import PROMPT, TWIN, bar_lengths, cells, colour_bar, labels, lens_of

import tensorlens_tl
from tensorlens_tl import (
    Convention,
    Edge,
    MeanAttribution,
    Node,
    Routing,
    RunReport,
    demo,
    features,
)
from tensorlens_tl.circuits import Faithfulness, FaithfulnessCurve
from tensorlens_tl.costs import Plan
from tensorlens_tl.editing import EditCheck
from tensorlens_tl.editing.patching_study import Predictions
from tensorlens_tl.editing.ranking import EditRanking
from tensorlens_tl.editing.study import MEASURES, EditEvaluation
from tensorlens_tl.evaluation.intervals import Estimate
from tensorlens_tl.evaluation.report import Evaluation, Row
from tensorlens_tl.evaluation.significance import Comparison
from tensorlens_tl.methods import TokenScores
from tensorlens_tl.pictures import cell_map, split_figure, token_figure
from tensorlens_tl.pictures.figures import _luminance, label, limit
from tensorlens_tl.pictures.tabled import Tabled
from tensorlens_tl.relations.decoding_study import Decoding, RelationStudy
from tensorlens_tl.relations.validity_study import ErrorCurve, ValidityStudy

pytestmark = pytest.mark.algebra

SEVERAL = (RunReport,)
"""Results that hold others, each with a figure of its own."""


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_every_table_has_a_figure():
    for module in pkgutil.walk_packages(tensorlens_tl.__path__, "tensorlens_tl."):
        if module.name.endswith("__main__"):
            continue
        for thing in vars(importlib.import_module(module.name)).values():
            if isinstance(thing, type) and hasattr(thing, "to_dataframe") and thing != Tabled:
                assert hasattr(thing, "to_html"), thing
                assert hasattr(thing, "plot") or thing in SEVERAL, thing


# --- Tokens and words -----------------------------------------------------------------------------


def test_token_matrices():
    signed, norm = (lens_of().token_matrix(name) for name in ("in_out", "norm"))
    ax = signed.plot()
    assert np.array_equal(cells(ax), signed[0].numpy())
    assert labels(ax) == labels(ax, "x") == list(signed.labels[0])
    assert colour_bar(ax).startswith("logits")
    (image,) = norm.plot().images
    assert np.array_equal(image.get_array(), norm[0].numpy())
    assert image.get_clim() == (0, float(norm[0].max()))
    (image,) = (ax := signed.plot(largest=2.0)).images
    assert image.get_clim() == (-2, 2) and ax.images[0].colorbar.extend == "both"


def test_token_scores():
    scores = lens_of(PROMPT, TWIN).token_scores("in_out", "Mary")
    assert bar_lengths(scores[:1].plot()) == scores[0].tolist()
    lengths = bar_lengths(scores.plot())
    assert lengths[15:] == scores[1].abs().tolist() and lengths[0] == -abs(float(scores[0][0]))


def test_logit_lenses():
    whole = lens_of().logit_lens(None)
    ax = whole.plot()
    (image,) = ax.images
    best = whole.probabilities[0].max(-1)
    assert np.allclose(image.get_array(), best.values.numpy(), rtol=1e-5)
    assert image.get_clim() == (0, 1) and labels(ax) == list(whole.sites)
    decode = demo.load_model().tokenizer.decode
    words = [repr(decode([int(i)])) for i in best.indices.flatten()]
    assert texts(ax) == words and labels(ax, "x")[4] == '"John"@4'
    for text, color in zip(ax.texts, image.to_rgba(image.get_array()).reshape(-1, 4), strict=True):
        light, ink = _luminance(color), {"white": 1.0, "black": 0.0}[text.get_color()]
        assert (max(light, ink) + 0.05) / (min(light, ink) + 0.05) >= 4.5
    assert labels(lens_of().logit_lens().plot(), "x") == ["1", "2", "3", "4", "5"]


def test_sequences():
    with quiet():
        _, lens = demo.load_model().run_with_tensorlens("Paris is the capital of France")
    matrix = lens.attribute_sequence("of France").sum("node")
    ax = matrix.plot(top=5)
    rows = [matrix.labels[0].index(name) for name in labels(ax)]
    assert np.array_equal(cells(ax), matrix.values[0, rows].numpy())
    assert rows == sorted(rows) and labels(ax, "x") == ['"of"@5', '"France"@6']
    assert colour_bar(ax) == "nats" and f"{len(matrix.labels[0]) - 5} more rows" in ax.get_title()


def test_routings():
    experts = torch.tensor([[[0, 2], [2, 1]]])
    weights = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])
    ax = Routing(3, (("A", "cat"),), ((0, 2),), experts, weights, n_experts=4).plot()
    (image,) = ax.images
    nan = math.nan
    expected = [[0.75, nan, 0.25, nan], [nan, 0.5, 0.5, nan]]
    assert np.array_equal(np.ma.getdata(image.get_array()), expected, equal_nan=True)
    assert labels(ax) == ['"A"@0', '"cat"@1'] and labels(ax, "x") == ["E0", "E1", "E2", "E3"]
    assert texts(ax) == ["0.75", "", "0.25", "", "", "0.50", "0.50", ""]  # none went there


def test_singular_values_and_their_words():
    lens = lens_of()
    found = lens.operator.svd(3, query_pos=-1, key_pos=2)
    assert bar_lengths(found.plot()) == found.S.tolist()
    logits = found.U[:, 0] @ demo.load_model().W_U
    decode = demo.load_model().tokenizer.decode
    for (up, down), row, note in zip(
        found.words(lens, k=2), logits, texts(found.plot(lens=lens)), strict=True
    ):
        order = row.argsort(descending=True).tolist()
        assert up == [decode([i]) for i in order[:2]]
        assert down == [decode([i]) for i in order[:-3:-1]]
        assert note.startswith(f"+ {up[0]!r} {up[1]!r}") and f"− {down[0]!r}" in note


# --- Paths, means, circuits -----------------------------------------------------------------------


def test_paths():
    paths = lens_of().paths("Mary", k=4, versus="John", by_position=True)
    ax = paths.plot()
    lines = ax.get_lines()
    assert labels(ax) == [path.label for path in paths]
    widths = [
        line.get_linewidth() ** 2 / abs(p.contribution)
        for line, p in zip(lines, paths, strict=True)
    ]
    assert max(widths) == pytest.approx(min(widths))
    names = [f"{n}@{at}" for p in paths for n, at in zip(p.nodes, p.positions, strict=True)]
    sums = [f"{p.contribution:+.3g}" for p in paths]
    assert sorted(texts(ax)) == sorted(names + sums)


def test_means_have_intervals():
    nodes = tuple(map(Node.parse, ("embed", "L0H1", "L0MLP", "b_U")))
    mean, sem = torch.tensor([1.0, -3.0, 2.0, 0.0]), torch.tensor([0.1, 0.5, 0.25, 0.0])
    found = MeanAttribution(mean, sem, nodes, "component", "direct", 7, 0.0, None)
    ax = found.plot()
    assert labels(ax) == ["L0H1", "L0MLP", "embed"] and bar_lengths(ax) == [-3, 2, 1]
    (spread,) = (c for c in ax.collections if hasattr(c, "get_segments"))
    ends = [end for segment in spread.get_segments() for end in segment[:, 0]]
    assert ends == pytest.approx([-3.5, -2.5, 1.75, 2.25, 0.9, 1.1])
    assert ax.get_title() == "mean of 7 prompts = 0, by component"
    assert cells(found.plot(kind="heads")).tolist() == [[-3, 2]]


def test_circuits():
    circuit = lens_of().discover("Mary", versus="John", n_edges=20)
    ax = circuit.plot()
    drawn = {patch.get_label(): patch.get_linewidth() for patch in ax.patches}
    assert set(drawn) == set(map(str, circuit.edges))
    assert sorted(texts(ax)) == sorted(map(str, circuit.nodes))
    order = sorted(circuit.edges, key=lambda edge: abs(circuit.scores[edge]))
    sizes = [drawn[str(edge)] for edge in order]
    assert sizes == sorted(sizes)
    places = {text.get_text(): text.get_position() for text in ax.texts}
    for edge in circuit.edges:  # upwards
        reader = str(edge.dest).split(".")[0]
        assert places[str(edge.src)][1] < places[reader][1]
    assert "(the 5 largest of 20 edges)" in circuit.plot(top=5).get_title()
    share = lens_of().circuit(circuit).share("Mary", "John")
    dots = [list(line.get_ydata()) for line in share.plot().get_lines()][:2]
    assert dots == [list(share.value), list(share.target_value)]
    assert len(lens_of().circuit(circuit).plot().patches) == 20


def test_faithfulness():
    torch.manual_seed(0)
    full, ablated, circuit = torch.randn(3, 6).add(torch.tensor([[3.0], [0.0], [2.0]])).unbind()
    about = {"ablation": "resample", "attention": "live", "n_total": 9}
    found = Faithfulness(full, ablated, ablated, circuit, n_edges=4, **about)
    ax = found.plot()
    assert labels(ax, "x") == ["full", "circuit", "ablated"]
    drawn = [line.get_ydata() for line in ax.get_lines()[:3]]
    assert np.array_equal(drawn, torch.stack([full, circuit, ablated]).numpy())
    means = [segment[0, 1] for lines in ax.collections for segment in lines.get_segments()]
    assert means == pytest.approx([float(x.mean()) for x in (full, circuit, ablated)])
    assert f"{found.share:.3f}" in ax.get_title()

    rows = torch.stack([ablated, circuit, full])
    sizes = {"sizes": (0.0, 0.5, 1.0), "n_edges": (0, 4, 9)}
    curve = FaithfulnessCurve(
        full=full, ablated=ablated, signed=rows, absolute=rows, **sizes, **about
    )
    ax = curve.plot()
    signed, absolute = ax.get_lines()
    assert np.array_equal(signed.get_ydata(), curve.shares.numpy())
    assert signed.get_xdata().tolist() == [0, 50, 100]
    low, high = found.interval  # that of the middle size
    assert curve.intervals()["signed"][1] == pytest.approx((low, high), rel=1e-5)
    (band, _) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert any(np.isclose(heights, low)) and any(np.isclose(heights, high))
    assert signed.get_marker() != absolute.get_marker() and ax.get_xscale() == "linear"
    assert not curve._page().views[0].data["log"]
    small = {"sizes": (0.0, 0.002, 1.0), "n_edges": (0, 1, 9)}
    curve = FaithfulnessCurve(
        full=full, ablated=ablated, signed=rows, absolute=rows, **small, **about
    )
    ax = curve.plot()  # by decades, and 0 on the left of them
    assert ax.get_xscale() == "symlog" and labels(ax, "x") == ["0", "0.2", "100"]
    assert curve._page().views[0].data["log"]


# --- Studies --------------------------------------------------------------------------------------


def test_evaluations():
    def row(method, masking, values, measure="positive"):
        return Row(measure, "probability", "tenths", masking, method, False, values)

    rows = [row(m, k, (a, a + 0.2)) for k in ("token", "mean") for m, a in (("b", 0.5), ("a", 0.1))]
    given = {"model": "m", "dtype": "float32", "lengths": (3, 4), "targets": ("x", "y")}
    given |= {"versus": None, "mask_token": None, "convention": "half", "batch_size": 1}
    given |= {"keep_last": True, "seed": 0, "seconds": {}, "forward_seconds": 1.0, "runs": {}}
    found = Evaluation(rows=tuple(rows), **given)
    ax = found.plot()
    assert labels(ax) == ["a", "b"]  # lower is better
    token, mean = ax.containers
    assert token.lines[0].get_xdata().tolist() == pytest.approx([0.2, 0.6])
    estimate = found.estimate("a", masking="token")
    (bars,) = token.lines[2]
    assert bars.get_segments()[0][:, 0].tolist() == pytest.approx([estimate.low, estimate.high])
    assert mean.get_label() == "positive ↓ (tenths, probability), masked by mean"
    assert len(found.plot(masking="mean").containers) == 1
    with pytest.raises(ValueError, match="0 metrics fit"):
        found.plot(measure="negative")


def test_masking_curves():
    def row(measure, method, points, masking="mean"):
        values = tuple(sum(own) / 3 for own in points)
        about = measure, "probability", "thirds", masking, method, False, values
        return Row(*about, (0.0, 0.15, 0.3), points)

    low, high = ((1.0, 0.5, 0.0), (0.8, 0.3, 0.1)), ((1.0, 0.9, 0.8), (0.8, 0.7, math.nan))
    rows = [row("morf", "b", high), row("morf", "a", low)]
    rows += [row("lerf", name, high) for name in "ab"]
    given = {"model": "m", "dtype": "float32", "lengths": (3, 4), "targets": ("x", "y")}
    given |= {"versus": None, "mask_token": None, "convention": "half", "batch_size": 1}
    given |= {"keep_last": True, "seed": 0, "seconds": {}, "forward_seconds": 1.0, "runs": {}}
    found = Evaluation(rows=tuple(rows), **given)
    ax = found.plot(kind="curves", measure="morf")
    first, second = ax.get_lines()
    assert first.get_xdata().tolist() == [0, 15, 30] and ax.get_xscale() == "linear"
    assert first.get_ydata() == pytest.approx([0.9, 0.4, 0.05])  # lower is better
    assert second.get_ydata() == pytest.approx([0.9, 0.8, 0.8])  # nan is left out
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a, 0.45", "b, 0.9"]
    end = rows[1].curve()[1]
    assert any(np.isclose(ax.collections[0].get_paths()[0].vertices[:, 1], end.high))
    assert ax.get_xlabel() == "tokens, %: most relevant masked"
    table, *curves = found._page().views
    assert [view.tab for view in curves] == [
        f"{n} ↓ (thirds, probability), masked by mean" for n in ("morf", "lerf")
    ]
    drawn = {line["name"]: line["y"].tolist() for line in curves[0].data["lines"]}
    assert drawn["a, 0.45"] == first.get_ydata().tolist() and table.tab == "means"
    with pytest.raises(ValueError, match=r"2 measures fit .*Name one by measure=, of morf, lerf"):
        found.plot(kind="curves")
    with pytest.raises(ValueError, match=r"kind='curve' does not exist\. Use 'means' or 'curves'"):
        found.plot(kind="curve")


def test_a_few_numbers():
    """They have figures and pages, and notebooks show their line of text alone."""
    plan = Plan("a call", 2e9, 150.0, 3 * 2**20, 2**30, 2, ("a note",))
    ax = plan.plot()
    assert bar_lengths(ax) == [3, 1024] and labels(ax) == ["needed", "allowed"]
    assert ax.get_title() == "a call: about 2.5 min, 2 Gflop, 2 chunks"
    assert plan._page().views[0].data["values"].tolist() == [[3], [1024]]
    assert plan._page().notes == ["A note."]
    one = Estimate(0.5, 0.25, 1.0, 4)
    (points,) = one.plot().containers
    assert points.lines[0].get_xdata().tolist() == [0.5]
    assert points.lines[2][0].get_segments()[0][:, 0].tolist() == [0.25, 1.0]
    assert one._page().views[0].data["values"].tolist() == [[0.5, 0.25, 1.0]]
    both = Comparison(one, 0.125)
    assert list(both.plot().get_lines()[-1].get_xdata()) == [0, 0]
    assert both._page().title == "0.5 [0.25, 1], p = 0.12" == both.plot().get_title()
    row = Row("naopc", "probability", "beam 1", "mean", "norm", True, (0.25, math.nan, 0.75))
    ax = row.plot()
    assert ax.get_lines()[0].get_ydata().tolist() == [0.25, 0.75]
    assert ax.collections[0].get_segments()[0][:, 1].tolist() == [0.5, 0.5]
    (table,) = row._page().views
    assert np.array_equal(table.data["values"][:, 0], row.values, equal_nan=True)
    for few in (plan, one, both, row):
        assert "<iframe" not in few._repr_html_() and "<script" in few.to_html()


def test_studies_of_relations():
    curve = ErrorCurve("swap", (0.1, 0.4), (0.0, 0.5), 0.1, {}, 1.0)
    other = ErrorCurve("swap", (0.3, 0.6), (0.1, 0.7), 0.1, {}, 1.0)
    study = ValidityStudy("m", "float32", 0, 2, (0.05, 1.0), (curve, other))
    ax = study.plot()
    operator, jacobian = ax.get_lines()
    assert operator.get_ydata().tolist() == [
        study.error("swap", "operator", s).value for s in (0.05, 1.0)
    ]
    assert jacobian.get_label() == "swap, jacobian" and ax.get_xscale() == "log"
    with pytest.raises(ValueError, match="no directions of kind 'steering'"):
        study.plot(kind="steering")

    rows = [
        Decoding("r", "{}", split, ("a", "b"), 4, variant, share, (), 0, causality=causality)
        for variant, causality in (("mean output", None), ("operator, β = 1", 0.5))
        for split, share in ((0, 0.25), (1, 0.75))
    ]
    found = RelationStudy("m", "float32", 0, (1.0,), (1,), {"r": 1.0}, tuple(rows))
    (points,) = found.plot().containers
    assert points.lines[0].get_xdata().tolist() == [0.5, 0.5]
    assert labels(found.plot(what="causality")) == ["operator, β = 1"]


def test_one_prompt_has_no_interval():
    """Neither certainty, [0.5, 0.5], nor nan is shown: texts, notes and axes say that it is one."""
    given = {"model": "m", "dtype": "float32", "lengths": (3,), "targets": ("x",), "versus": None}
    given |= {"mask_token": None, "convention": "half", "batch_size": 1, "keep_last": True}
    given |= {"seed": 0, "seconds": {}, "forward_seconds": 1.0, "runs": {}}
    row = Row("morf", "p", "x", "mean", "a", False, (0.5,), (0.0, 1.0), ((0.75, 0.25),))
    full, ablated, circuit = torch.tensor([[3.0], [0.0], [2.0]])
    about = {"full": full, "ablated": ablated, "ablation": "zero", "attention": "live"}
    about |= {"n_total": 9}
    sizes = {"sizes": (0.0, 1.0), "n_edges": (0, 9)}
    both = torch.stack([ablated, full])
    curve = ErrorCurve("swap", (0.1, 0.4), (0.0, 0.5), 0.1, {}, 1.0)
    decoded = Decoding("r", "{}", 0, ("a", "b"), 4, "operator", 0.5, (), 0, causality=0.5)
    mean = torch.tensor([1.0, -3.0]), torch.full((2,), math.nan), (Node("embed"), Node("b_U"))
    results = [
        Estimate(0.5, math.nan, math.nan, 1),
        Comparison(Estimate(0.5, math.nan, math.nan, 1), 1.0),
        row,
        Evaluation(rows=(row,), **given),
        Faithfulness(empty=ablated, circuit=circuit, n_edges=4, **about),
        FaithfulnessCurve(signed=both, absolute=both, **sizes, **about),
        ValidityStudy("m", "float32", 0, 1, (0.05, 1.0), (curve,)),
        RelationStudy("m", "float32", 0, (1.0,), (1,), {"r": 1.0}, (decoded,)),
        EditEvaluation({("caa", m): [0.5] for m in MEASURES}, (1,), -1.0, 1),
        MeanAttribution(*mean, "component", "direct", 1, -2.0, 0.0),
    ]
    for found in results:
        page, ax = found._page(), found.plot()
        for view in page.views:
            if view.kind == "table":
                assert np.isfinite(view.data["values"]).all() and "low" not in view.data["columns"]
        said = [str(found), page.title, *page.notes]
        assert not any("nan" in text or "[0" in text for text in said), said
        drawn = [ax.get_xlabel(), ax.get_title()]
        ax.figure.canvas.draw()
        for where in said, drawn:
            assert any(word in " ".join(where) for word in ("one ", "(n = 1)")), (found, where)
    ax = results[3].plot(kind="curves", measure="morf")
    assert "1 prompt of m, so no interval" in ax.get_title()
    line = results[3]._page().views[1].data["lines"][0]
    assert line["low"] is None is line["high"]


def test_edits():
    before = torch.zeros(3)
    predicted, real = torch.tensor([-2.0, 1.0, 4.0]), torch.tensor([-1.0, 1.0, 5.0])
    given = {"before": before, "predicted": predicted, "real": real, "kl": before, "size": before}
    tops = (("a", "b"),) * 3
    check = EditCheck(site="s", jacobian=before / 0, kl_held_out=before / 0, tops=tops, **given)
    ax = check.plot()
    points = ax.get_lines()[-1]
    assert list(points.get_xdata()) == predicted.tolist()
    assert list(points.get_ydata()) == real.tolist()
    assert ax.get_xlim() == ax.get_ylim() and ax.get_legend() is None
    both = Predictions({"operator": [1.0, 2.0], "jacobian": [0.5, 0.1]}, [1.0, 3.0]).plot()
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["operator", "jacobian"]
    assert list(both.get_lines()[-1].get_xdata()) == [0.5, 0.1]
    values = torch.tensor([[1.0, -2.0, 3.0, 0.5], [2.0, -3.0, 1.0, 0.5]])
    sites = EditRanking(("a@0", "a@1", "b@0", "b@1"), values, "site", "what").plot()
    assert cells(sites).tolist() == [[1.5, -2.5], [2.0, 0.5]] and labels(sites) == ["a", "b"]
    heads = EditRanking(("L0H0", "L0H1", "L1H0", "L1H1"), values, "head", "what").plot(top=2)
    assert bar_lengths(heads) == [-2.5, 2.0] and labels(heads) == ["L0H1", "L1H0"]
    study = EditEvaluation({("caa", "delivered"): [0.5, 1.0]}, (1,), -1.0, 2)
    (points,) = study.plot().containers
    assert points.lines[0].get_xdata().tolist() == [0.75] and labels(study.plot()) == ["caa"]


def test_features_are_bars_and_stand_at_their_site():
    lens = lens_of("The capital of France is")
    random = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(64, 128, generator=random), dim=-1)
    given = {"W_enc": W.T, "W_dec": W, "b_enc": torch.zeros(64), "b_dec": torch.zeros(128)}
    config = {"architecture": "topk", "k": 4}
    sae = features.load(given, site="blocks.2.hook_resid_pre", config=config)
    with quiet():  # these features explain nothing
        found = lens.attribute("Paris", by="feature", saes=sae)
        edges = lens.attribute("Paris", by="edge", saes=sae)
    ax = found.plot(top=3)
    assert [(a, pytest.approx(b)) for a, b in found.top(3)] == list(
        zip(labels(ax), bar_lengths(ax), strict=True)
    )
    names = labels(edges.plot(top=3))
    assert names[0] == "L2.pre" and names[-1] == "logits"
    view = edges._page().views[0].data
    at = view["labels"].index("L2.pre.error")
    assert view["rows"][view["row"][at]] == "L2.pre" == view["rows"][view["row"].min()]

    sites = {"z": "attn.hook_z", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
    heights = []
    for name, point in sites.items():
        sae = features.load(given, site=f"blocks.2.{point}", config=config)
        with quiet():
            edges = lens.attribute("Paris", by="edge", saes=sae)
        assert "logits" in labels(edges.plot(top=3))
        view = edges._page().views[0].data
        rows = [view["row"][view["labels"].index(f"L2.{name}.{end}")] for end in ("error", "b_dec")]
        assert [view["rows"][row] for row in rows] == [f"L2.{name}"] * 2
        heights.append(view["rows"].index("L2 MLP") - rows[0])
    assert heights[0] > 0 and heights[1] > 0 > heights[2]  # around the MLP, as they are written


def test_exhibits():
    lens = lens_of()
    steps = lens.waterfall("Mary", "John")
    ax = steps.plot()
    assert [bar.get_height() for bar in ax.patches[:-1]] == pytest.approx(steps.sums[0].tolist())
    assert ax.patches[-1].get_height() == pytest.approx(float(steps.components.target_value))
    (dashed,) = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert dashed.get_ydata().tolist() == steps.lens[0].tolist()

    found = lens.compare(lens_of(TWIN), "Mary", "John")
    grid = cells(found.plot())
    assert grid.shape == (3, 16)
    values = [float(one.target_value) for one in (found.clean, found.corrupted)]
    assert grid.sum(1) == pytest.approx([*values, values[0] - values[1]], abs=1e-4)

    heads = lens.head_maps(["L1H0", "L2H3"], "Mary")
    assert np.array_equal(cells(heads.plot(head="L2H3")), heads.values[0, 1].numpy())
    (image,) = heads.plot(what="patterns").images
    assert np.array_equal(np.ma.getdata(image.get_array()), heads.patterns[0, 0].numpy())
    for wrong, said in ({"head": "L0H0"}, "L1H0, L2H3"), ({"what": "keys"}, "values, patterns"):
        with pytest.raises(ValueError, match=rf"\. Use one of {said}\."):
            heads.plot(**wrong)

    maps = lens.operator_maps("Mary")
    assert np.array_equal(cells(maps.plot()), maps.depths[0][0].numpy())
    site = maps.depths[3].layers[0]
    assert np.array_equal(cells(maps.plot(site=site)), maps.depths[3][0].numpy())
    assert "rollout" in maps.plot(site="rollout").get_title()
    with pytest.raises(ValueError, match=r"site='nowhere' has no map here"):
        maps.plot(site="nowhere")

    edit = lens.edit("Mary", versus="John", by=-2.0, site=1)
    before, after = (line.get_ydata()[0] for line in edit.plot().get_lines()[:2])
    assert after - before == pytest.approx(float(edit.predicted))


def test_attribution_graphs():
    graph = lens_of().attribution_graph("Mary", "John", n_nodes=30)
    ax = graph.plot(top=12)
    links = sorted(graph.links[:12], key=lambda link: abs(link.weight))
    names = [f"{graph.nodes[x.src].node}→{graph.nodes[x.dest].node}" for x in links]
    assert [line.get_label() for line in ax.patches] == names
    widths = [line.get_linewidth() for line in ax.patches]
    shares = [(abs(x.weight) / abs(links[-1].weight)) ** 0.5 for x in links]
    assert widths == pytest.approx([max(0.5, 3.5 * share) for share in shares])
    assert labels(ax)[-1] == "logits" and labels(ax, "x")[-1] == "to @14"
    assert len(texts(ax)) == len({end for x in links for end in (x.src, x.dest)})


# --- What figures keep to -------------------------------------------------------------------------

ODD = ["Ġthe", "\n", "a" * 60, "שלום", "$x_1$ costs $5", "a_b^c", "\\frac", "%&#{}~", "", "\ud800"]


def test_odd_tokens_are_plain_text():
    numbers = [math.nan, math.inf, -1.0, 0.0, 2.0, -2.0, 0.5, 0.1, 0.2, 0.3]
    grid = np.array(numbers)[:, None] + np.zeros(10)
    drawn = [
        token_figure(None, [ODD], [numbers], ["'$5' = 1"], "by token", "logits"),
        token_figure(None, [ODD, ODD], [numbers] * 2, ["'$5' = 1"] * 2, "by token", "logits"),
        token_figure(None, [ODD] * 3, [numbers] * 3, ["'$5' = 1"] * 3, "by token", "logits"),
        token_figure(None, [ODD * 8], [numbers * 8], ["'$5' = 1"], "by token", "logits"),
        cell_map(None, grid, ODD, ODD, unit="logits", title="$x"),
    ]
    for ax in drawn:
        written = io.BytesIO()
        ax.figure.savefig(written, format="svg")
        assert written.getvalue().rstrip().endswith(b"</svg>")
    assert labels(drawn[0])[1:2] == ["\\n"] and labels(drawn[0])[4] == "$x_1$ costs $5"
    assert labels(drawn[0])[9] == "\\ud800" and len(labels(drawn[0])[2]) == 33
    assert drawn[0].get_title() == "'$5' = 1, by token" and texts(drawn[0])[:2] == ["nan", "inf"]
    assert drawn[4].images[0].get_clim() == (-2, 2)
    assert label("a\tb") == "a\\tb"
    inks = {text.get_text(): text.get_color() for text in drawn[4].texts}
    assert inks["inf"] == "black" and inks["+2.00"] == "white" and "nan" not in inks


def test_scales_about_0():
    assert limit([0.0, 0.0]) == limit([]) == limit([math.nan, math.inf]) == 1
    assert limit([math.nan, -3.0, 2.0]) == 3
    for grid in ([[0.0, 0.0]], [[math.nan, 0.0]], [[1e-300, 0.0]]):
        low, high = cell_map(None, grid, ["a"], ["b", "c"], unit="logits").images[0].get_clim()
        assert low == -high < 0


def test_a_large_map_is_a_small_file():
    grid = np.tril(np.random.default_rng(0).standard_normal((512, 512)))
    ax = cell_map(None, grid, ["t"] * 512, ["t"] * 512, unit="logits")
    written = io.BytesIO()
    ax.figure.savefig(written, format="pdf")
    assert len(written.getvalue()) <= 200_000
    assert np.array_equal(ax.images[0].get_array(), grid) and not ax.texts


def test_nothing_global_is_touched():
    from matplotlib import pyplot

    before, open_figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    found = lens_of().attribute("Mary", by="head")
    ax = found.plot()
    assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == open_figures
    assert ax._repr_png_().startswith(b"\x89PNG")  # a notebook shows it
    figure = matplotlib.figure.Figure()
    own = figure.subplots()
    assert found.plot(own) is own and own.images
    with matplotlib.rc_context({"text.usetex": True}):
        assert not found.plot().get_yticklabels()[0].get_usetex()


def test_patches_over_a_picture():
    names = ["[CLS]", "patch[0,0]", "patch[0,1]", "patch[1,0]", "patch[1,1]", "b_U"]
    nodes = [Node("cls_token"), *[Node("patch")] * 4, Node("constant", name="b_U")]
    places = [*range(5), None]
    rows = {"names": [names], "values": [[5.0, 1.0, -2.0, 3.0, 0.5, 7.0]], "targets": ["'cat'"]}
    sources = list(zip(nodes, places, strict=True))
    split = tensorlens_tl.pictures.Split(
        by="token",
        effect="direct",
        sources=sources,
        totals=[14.5],
        sums=True,
        spans=[(0, 5)],
        **rows,
    )
    picture = np.arange(16.0).reshape(4, 4)
    grid = lambda: [[1.0, -2.0], [3.0, 0.5]]  # noqa: E731
    ax = split_figure(None, split, None, 20, grid=grid, image=picture)
    below, drawn = ax.images
    assert np.array_equal(below.get_array(), picture) and drawn.get_alpha() < 1
    assert drawn.get_array().tolist() == grid() and drawn.get_clim() == (-3, 3)
    assert below.get_extent() == drawn.get_extent()
    assert ax.get_xlabel() == "not patches: constants +7, [CLS] +5"
    scores = TokenScores(
        "rollout", torch.arange(5.0)[None], (tuple(names[:5]),), ((0, 5),), ("'cat'",), Convention()
    )
    assert scores.plot(image=picture).images[1].get_array().tolist() == [[1, 2], [3, 4]]


def test_edges_without_scores():
    @cache
    def edge(name):
        return Edge.parse(name)

    edges = [edge("input→L0H0.q"), edge("input→L0H0.v"), edge("L0H0→logits")]
    ax = tensorlens_tl.pictures.graph_figure(None, edges, {}, title="t", unit="logits", top=9)
    assert {patch.get_linewidth() for patch in ax.patches} == {1.0} and ax.get_xlabel() == ""
