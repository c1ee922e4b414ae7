"""Attributions over many prompts; how results print, sum, sort and draw themselves."""

import json
import math
import re
from html import unescape

import numpy as np
import pytest
import torch
from comparisons import assert_close
from models import ORACLE, ROUNDING, SHAPES, lens_of, quiet, tokens

import tensorlens_tl
from tensorlens_tl import Attribution, MeanAttribution, Node, demo
from tensorlens_tl.attribution.html import changes, grid_html, strip_html, table_html

pytestmark = pytest.mark.algebra

FIRST = SHAPES[0]


def prompts(n=5):
    return list(tokens(n))


def test_means_are_those_of_single_attributions(tmp_path):
    model, path = FIRST.model(), tmp_path / "rows.jsonl"
    with quiet():
        found = tensorlens_tl.attribute(model, prompts(), 3, 4, by="head", batch_size=2, path=path)
        singles = [
            tensorlens_tl.capture(model, ids)[1].attribute(3, 4, by="head") for ids in prompts()
        ]
    values = torch.cat([a.sum("pos").values for a in singles])
    assert_close(found.mean, values.mean(0), ROUNDING)
    assert_close(found.sem, values.std(0) / math.sqrt(5), ORACLE)
    assert found.n == 5 and found.nodes == tuple(s.node for s in singles[0].sum("pos").sources)
    assert math.isclose(found.target_mean, sum(float(a.target_value) for a in singles) / 5)
    assert found.completeness_error is not None and found.completeness_error <= 1e-11
    lines = [Attribution.from_json(line) for line in path.read_text().splitlines()]
    assert len(lines) == 5
    for line, single in zip(lines, singles, strict=True):
        assert_close(line.values, single.values, ORACLE)
    table = found.to_dataframe()
    assert list(table.columns) == ["node", "mean", "sem"] and len(table) == len(found.nodes)
    assert [abs(mean) for _, mean, _ in found.top(3)] == sorted(found.mean.abs().tolist())[::-1][:3]
    assert repr(found).startswith("Attribution by head, mean of 5 prompts = ") and " ± " in repr(
        found
    )


def test_targets_of_their_own_and_prompts_of_several_lengths(capsys, monkeypatch):
    monkeypatch.setattr("tensorlens_tl.checks.PROGRESS_AFTER", 0)
    model = FIRST.model()
    ragged = [ids[: 4 + i] for i, ids in enumerate(prompts(3))]
    found = tensorlens_tl.attribute(model, ragged, [1, 2, None], by="component")
    assert "0/3" in capsys.readouterr().err
    with quiet(), torch.no_grad():
        values = [
            tensorlens_tl.capture(model, ids)[1].attribute(t, by="component").values[0]
            for ids, t in zip(ragged, (1, 2, None), strict=True)
        ]
    assert_close(found.mean, torch.stack(values).mean(0), ORACLE)
    one = tensorlens_tl.attribute(model, ragged[:1], effect="total")
    assert one.sem.isnan().all() and one.completeness_error is None
    data = json.loads(one.to_json())
    assert (
        data["n"] == 1
        and data["unit"].startswith("units of the target")
        and {row["sem"] for row in data["rows"]} == {None}
    )
    data = json.loads(found.to_json())
    assert [row["mean"] for row in data["rows"]] == found.mean.tolist()
    assert [row["node"] for row in data["rows"]] == list(map(str, found.nodes))
    assert "mean of 3 prompts" in found._repr_html_() and "(± " in found._repr_html_()


def test_means_select_and_come_back_from_their_json():
    model, ids = FIRST.model(), prompts(2)
    for by in ("token", "component", "head", "layer", "dimension", "order"):
        found = tensorlens_tl.attribute(model, ids, by=by)
        again = MeanAttribution.from_json(found.to_json())
        assert repr(again) == repr(found) and again.nodes == found.nodes
        assert torch.equal(again.mean, found.mean) and torch.equal(again.sem, found.sem)
        assert np.array_equal(np.asarray(found), found.mean.numpy())
    found = tensorlens_tl.attribute(model, ids, by="component", progress=False)
    assert found.select().completeness_error == found.completeness_error is not None
    heads = found.select(kind="head", layer=1)
    assert list(map(str, heads.nodes)) == [f"L1H{i}" for i in range(4)]
    at = [i for i, node in enumerate(found.nodes) if node in heads.nodes]
    assert torch.equal(heads.mean, found.mean[at]) and torch.equal(heads.sem, found.sem[at])
    assert heads.completeness_error is None and "do not sum" in heads._repr_html_()
    edges = tensorlens_tl.attribute(model, ids, by="edge")
    into = edges.select(dest="logits")
    assert into.mean.sum().item() == pytest.approx(edges.target_mean, rel=ORACLE)
    assert repr(MeanAttribution.from_json(into.to_json())) == repr(into)
    with pytest.raises(ValueError, match=r"No row has layer 9\. Use one of 0, 1"):
        found.select(layer=9)
    with pytest.raises(ValueError, match=r"src= and dest= need a split by edge.*by component"):
        found.select(src="L0H1")
    for text in ("{}", "no", found.to_json().replace("mean attribution 1", "x")):
        with pytest.raises(ValueError, match="is not means as to_json writes them"):
            MeanAttribution.from_json(text)


def test_strings_are_padded_in_batches():
    with quiet():
        model = demo.load_model()
        pairs = demo.prompts("ioi", 6)
        texts, answers, foils = (
            [getattr(p, n) for p in pairs] for n in ("clean", "answer", "foil")
        )
        found = tensorlens_tl.attribute(model, texts, answers, foils, by="component", batch_size=4)
        singles = [
            model.run_with_tensorlens(t)[1].attribute(a, f, by="component").values[0]
            for t, a, f in zip(texts, answers, foils, strict=True)
        ]
    assert (found.mean - torch.stack(singles).double().mean(0)).abs().max() <= 1e-3
    assert found.completeness_error <= 1e-5 and found.target_mean > 0


def test_ids_as_the_host_gives_them():
    """Ids [1, pos], and targets as a tensor: as lists of ids and of targets are."""
    model, targets = FIRST.model(), torch.tensor([1, 2, 3, 4, 5])
    with quiet():
        expected = tensorlens_tl.attribute(model, prompts(), targets.tolist())
        found = tensorlens_tl.attribute(
            model, [torch.as_tensor(ids)[None] for ids in prompts()], targets
        )
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.sem, expected.sem)


def test_refusals():
    model = FIRST.model()
    for wrong in ([], "a prompt"):
        with pytest.raises(
            ValueError, match=r"prompts=.* is not a non-empty list. Put a single prompt in a list"
        ):
            tensorlens_tl.attribute(model, wrong)
    with pytest.raises(ValueError, match="target has 2 entries for 5 prompts"):
        tensorlens_tl.attribute(model, prompts(), [1, 2])
    with pytest.raises(ValueError, match="versus has 1 entries for 5 prompts"):
        tensorlens_tl.attribute(model, prompts(), 1, [2])
    with pytest.raises(ValueError, match="batch_size=0 is not an integer ≥ 1"):
        tensorlens_tl.attribute(model, prompts(), batch_size=0)
    with pytest.raises(ValueError, match="k=0 is not an integer ≥ 1"):
        tensorlens_tl.attribute(model, prompts(2)).top(0)


# --- Results -------------------------------------------------------------------------------------


def test_sums_over_axes():
    a = lens_of(FIRST).attribute(3, 4)
    total = a.values.sum(1)
    for axis in ("pos", "node", "layer"):
        b = a.sum(axis)
        assert_close(b.values.sum(1), total, ROUNDING)
        assert (
            b.completeness_error <= 1e-11 and len(b.sources) < len(a.sources)
        ) or axis == "layer"
    by_pos = a.sum("node")
    columns = {p: [i for i, s in enumerate(a.sources) if s.pos == p] for p in range(7)}
    for i, source in enumerate(by_pos.sources[:7]):
        assert_close(by_pos.values[:, i], a.values[:, columns[source.pos]].sum(1), ROUNDING)
        assert by_pos.labels[1][i] == a.labels[1][columns[source.pos][0]] + " + position"
    heads = lens_of(FIRST).attribute(3, 4, by="head")
    assert heads.labels[0][7].startswith("L0H1 ← ") and heads.sum("pos").labels[0][1] == "L0H1"
    edges = lens_of(FIRST).attribute(3, 4, by="edge")
    assert edges.sum("src").labels[0][0] == "L0H0.v" and edges.sum("dest").labels[0][0] == "embed"


def test_every_kind_of_row_survives_json():
    lens = lens_of(FIRST)
    tables = [
        lens.attribute(3, 4, by=by) for by in ("edge", "order", "dimension", "neuron", "layer")
    ]
    tables += [lens.attribute(3, by="head", effect="total"), lens.loadings(2, 3)]
    tables += [lens.attribute(3, baseline=lens), lens.attribute(3, baseline="zero")]
    for a in (*tables, tables[0].sum("src"), lens.attribute(3).sum("node")):
        again = Attribution.from_json(a.to_json())
        assert torch.equal(again.values, a.values) and repr(again) == repr(a)
        assert again.sources == a.sources and again.labels == a.labels and again.effect == a.effect


def text_of(html):
    """What a reader of a page sees, and what hovering shows."""
    titles = [unescape(t) for t in re.findall(r'title="(.*?)"', html, re.DOTALL)]
    return unescape(re.sub(r"<[^>]*>", "|", html)), titles


def test_a_notebook_shows_tokens_heads_and_tables():
    lens = lens_of(FIRST)
    strip = lens.attribute(3, 4)._repr_html_()
    assert strip.count("<span") == 2 * 7 and "by token (direct)" in strip
    grid = lens.attribute(3, 4, by="head")._repr_html_()
    assert grid.count("<table>") == 2 and ">H3<" in grid and ">L1<" in grid
    assert lens.loadings(2, 3)._repr_html_().count(">H0<") == 2
    table = lens.attribute(3, 4, by="component", effect="total")._repr_html_()
    assert table.count("<tr>") == 2 * 20
    assert "rgba(214, 96, 77, 1.00)" in strip + grid + table


@pytest.mark.parametrize("by", ["token", "head", "neuron", "layer"])
def test_a_picture_says_all_that_the_text_says(by):
    """The target, the sum and its error, what is left out, units, and what the colours mean."""
    a = lens_of(FIRST)[0].attribute(3, 4, by=by)
    shown, _ = text_of(a._repr_html_())
    assert f"{a.target[0]} = {float(a.target_value[0]):.4g}" in shown
    assert (
        f"sum to {float(a.values.sum()):+.4g}, off by at most {a.completeness_error:.0e}" in shown
    )
    assert "takes away" in shown and "adds, in units of the target: logits for tokens" in shown
    if by == "neuron":
        zeros = int((a.values == 0).sum())
        left = f"… {len(a.sources) - 20 - zeros} more" + f" and {zeros} exactly 0" * bool(zeros)
        assert left in shown


def test_a_strip_tells_token_from_position():
    a = lens_of(FIRST)[0].attribute(3, 4)
    shown, titles = text_of(a._repr_html_())
    rest = [float(v) for s, v in zip(a.sources, a.values[0], strict=True) if s.pos is None]
    assert f"{len(rest)} constants {math.fsum(rest):+.4g}. A token is shown with" in shown
    at = {(str(s.node), s.pos): float(v) for s, v in zip(a.sources, a.values[0], strict=True)}
    for pos in range(7):
        parts = [at["embed", pos], at["pos_embed", pos]]
        (title,) = (t for t in titles if f"@{pos} + position: " in t)
        assert title.splitlines()[0].endswith(f": {sum(parts):+.4g}")
        assert title.splitlines()[1:] == [
            f"embed {parts[0]:+.4g}",
            f"pos_embed {parts[1]:+.4g}",
        ]


def test_a_grid_shows_every_row_of_a_split_by_head():
    """Heads, MLPs and constants by layer, the rest below; positions read are in the titles."""
    a = lens_of(FIRST)[0].attribute(3, 4, by="head")
    shown, titles = text_of(a._repr_html_())
    assert "|H0||H1||H2||H3||MLP||constants|" in shown
    nodes = {
        str(s.node): float(v)
        for s, v in zip(a.sum("pos").sources, a.sum("pos").values[0], strict=True)
    }
    cells = [float(x) for x in re.findall(r"\|([+-]\d+\.\d\d)\|", shown)]
    of_layers = [
        [nodes[f"L{i}{name}"] for name in ("H0", "H1", "H2", "H3", "MLP")] for i in range(2)
    ]
    for i, row in enumerate(of_layers):
        constants = sum(v for name, v in nodes.items() if name.startswith(f"L{i}."))
        assert cells[6 * i : 6 * i + 6] == [float(f"{v:.2f}") for v in (*row, constants)]
    names = re.findall(r"[| ](\w[\w.]*) \|[+-]", shown)
    assert names == [name for name in nodes if not name.startswith("L")]
    # Hovering over a head shows the positions that it read, largest first.
    title = next(t for t in titles if t.startswith("L1H2: "))
    own = [
        (float(v), s.pos)
        for s, v in zip(a.sources, a.values[0], strict=True)
        if str(s.node) == "L1H2"
    ]
    largest = sorted(own, key=lambda row: -abs(row[0]))
    for line, (value, pos) in zip(title.splitlines()[1:], largest[:6], strict=False):
        assert line.startswith(f"{value:+.4g}  ") and line.endswith(f"@{pos}")
    assert title.endswith("… 1 more")


def test_pictures_tell_what_changed():
    lens = lens_of(FIRST)[0]
    with quiet(), torch.no_grad():
        other = tensorlens_tl.capture(FIRST.model(), tokens(1, seed=1))[1]
    a = lens.attribute(3, baseline=other)
    (line,) = changes(a)
    assert line.startswith(f"operator change: {float(a.values[0, -1]):+.4f}, ")
    assert line in text_of(a._repr_html_())[0] and f"  {line}" in repr(a).splitlines()
    nothing = lens.attribute(3, baseline=lens)
    assert repr(nothing).splitlines()[1] == f"  … {len(nothing.sources)} exactly 0"
    assert nothing.top() == [] and "takes away" not in nothing._repr_html_()
    overlapping = lens.attribute(3, by="component", effect="total")
    assert "The rows do not sum to the target." in overlapping._repr_html_()


def test_pictures_escape_what_they_show():
    text = strip_html(['<b>"&', " x"], [1.0, -2.0])
    assert "<b>" not in text and "&lt;b&gt;" in text and "rgba(67, 147, 195, 1.00)" in text
    assert strip_html(["a\nb"], [0.0]).count("0.00)") == 1 and "\n" not in strip_html(["\n"], [1.0])
    assert 'title="&quot;&#10;&lt;"' in strip_html(["a"], [1.0], ['"\n<'])
    assert "nan" in table_html([("x", math.nan), ("y", 1.0)])
    grid = grid_html(["<"], ["a", "b", "c"], [[0.5, None, -1.0]])
    assert re.findall(r">([+-][\d.]+)<", grid) == ["+0.50", "-1.00"] and "<td>&lt;</td>" in grid
    assert grid.count("<td></td>") == 2
    assert Node.parse("L3") == Node("layer", 3)
