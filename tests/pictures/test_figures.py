"""Static figures: what is drawn is read back off the artists, and is the result's own."""

import math
import sys
from functools import cache

import numpy as np
import pytest
from models import quiet

from tensorlens_tl import demo
from tensorlens_tl.pictures import cell_map, curves
from tensorlens_tl.pictures.figures import label

pytestmark = pytest.mark.algebra

PROMPT = "When Mary and John went to the store, John gave a drink to"
TWIN = PROMPT.replace("John gave", "Mary gave")


@cache
def lens_of(*prompts):
    with quiet():
        return demo.load_model().run_with_tensorlens(list(prompts) or PROMPT)[1]


def split(**options):
    return lens_of().attribute("Mary", "John", **options)


def labels(ax, axis="y"):
    return [text.get_text() for text in getattr(ax, f"get_{axis}ticklabels")()]


def bar_lengths(ax):
    return [patch.get_width() for patch in ax.patches]


def cells(ax):
    """The numbers of a map, and that its colours lie evenly about 0."""
    (image,) = ax.images
    low, high = image.get_clim()
    array = np.ma.getdata(image.get_array())
    assert low == -high < 0 and np.nanmax(np.abs(array)) == high
    return array


def colour_bar(ax):
    return ax.images[0].colorbar.ax.get_ylabel()


# --- Splits ---------------------------------------------------------------------------------------


def test_a_bar_per_token_in_the_order_of_the_prompt():
    found = split()
    ax = found.plot()
    lengths = bar_lengths(ax)
    assert lengths[:-1] == pytest.approx(found.sum("node").values[0, :15].tolist(), rel=1e-6)
    constants = [
        v for s, v in zip(found.sources, found.values[0].tolist(), strict=True) if s.pos is None
    ]
    assert (
        lengths[-1] == pytest.approx(math.fsum(constants))
        and labels(ax)[-1] == f"{len(constants)} constants"
    )
    assert math.fsum(lengths) == pytest.approx(float(found.target_value[0]), rel=1e-5)
    assert labels(ax)[2] == '"Mary"@2' and ax.get_xlabel() == "logits"
    assert [text.get_text() for text in ax.texts] == [f"{v:+.3g}" for v in lengths]


def test_the_largest_components_as_bars():
    found = split(by="component")
    ax = found.plot(top=7)
    assert list(zip(labels(ax), bar_lengths(ax), strict=True)) == found.top(7)
    zeros = int((found.values == 0).sum())  # b_U, where the host has one
    left = f"{len(found.sources) - 7 - zeros} more" + f" and {zeros} exactly 0" * (zeros > 0)
    assert ax.get_xlabel() == f"logits   (… {left})"


def test_a_waterfall_ends_at_the_target():
    found = split(by="component")
    ax = found.plot(kind="waterfall")
    *steps, total = ax.patches
    assert [step.get_height() for step in steps] == found.values[0].tolist()
    assert [round(step.get_y(), 4) for step in steps[1:]] == [
        round(float(x), 4) for x in found.values[0].double().cumsum(0)[:-1]
    ]
    assert total.get_height() == float(found.target_value[0])
    assert total.get_height() == pytest.approx(steps[-1].get_y() + steps[-1].get_height(), rel=1e-5)
    assert labels(ax, "x") == [*found.labels[0], "target"]
    assert labels(split(by="layer").plot(), "x")[2] == "L0"  # a waterfall of itself


def test_heads_by_layer_with_mlps_beside():
    found = split(by="head").sum("pos")
    ax = split(by="head").plot()
    grid = cells(ax)
    values = dict(zip(found.labels[0], found.values[0].tolist(), strict=True))
    assert labels(ax, "x") == ["H0", "H1", "H2", "H3", "MLP", "constants"]
    assert grid[1, 0] == pytest.approx(values["L1H0"]) and grid[2, 4] == values["L2MLP"]
    assert f"embed {values['embed']:+.3g}" in ax.get_xlabel()
    beside = sum(v for name, v in values.items() if name[0] != "L")
    assert grid.sum() + beside == pytest.approx(float(found.target_value[0]), rel=1e-5)
    assert colour_bar(ax) == "logits"
    assert {f"{v:+.2f}" for v in grid.flat} == {text.get_text() for text in ax.texts}


def test_nodes_by_position():
    found = split(by="component", effect="total")
    ax = found.plot()
    grid, rows = cells(ax), labels(ax)
    values = dict(zip(found.labels[0], found.values[0].tolist(), strict=True))
    assert labels(ax, "x")[2] == '"Mary"@2'
    assert grid[rows.index("L0MLP"), 4] == values["L0MLP@4"]
    assert grid[rows.index("embed"), 10] == values['"John"@10']


def test_two_prompts_are_mirrored():
    found = lens_of(PROMPT, TWIN).attribute("Mary", "John", by="component")
    ax = found.plot(top=5)
    left, right = bar_lengths(ax)[:5], bar_lengths(ax)[5:]
    rows = [found.labels[0].index(name) for name in labels(ax)]
    assert [-x for x in left] == [abs(float(found.values[0, i])) for i in rows]
    assert right == [abs(float(found.values[1, i])) for i in rows]
    texts = [text.get_text() for text in ax.texts]
    assert texts == [f"{float(v):+.3g}" for prompt in found.values for v in prompt[rows]]
    tokens = lens_of(PROMPT, TWIN).attribute("Mary", "John").plot()
    (beside,) = tokens.child_axes
    assert labels(tokens)[10] == '"John"@10' and labels(beside)[10] == '"Mary"@10'


def test_three_prompts_are_strips():
    found = lens_of(PROMPT, TWIN, "The capital of France is").attribute("Mary", "John")
    ax = found.plot()
    grid = cells(ax)
    whole = found[2].sum("node")
    assert grid[2, :6] == pytest.approx(whole.values[0, :6].tolist(), rel=1e-6)
    assert np.isnan(grid[2, 7:]).all() and "France" in [text.get_text() for text in ax.texts]


def test_edges_as_a_graph():
    found = split(by="edge", qk=True)
    ax = found.plot(top=5)
    drawn = {patch.get_label(): patch for patch in ax.patches}
    largest = found.top(15)
    assert set(drawn) == {name for name, _ in largest}
    sizes = [drawn[name].get_linewidth() / math.sqrt(abs(value)) for name, value in largest]
    assert max(sizes) == pytest.approx(min(sizes))
    for name, value in largest:
        dashed = name.endswith((".q", ".k"))
        assert (drawn[name].get_linestyle() != "-") == dashed, name
        red, _, blue, _ = drawn[name].get_edgecolor()
        assert (red > blue) == (value > 0)


def test_what_does_not_fit_is_refused(monkeypatch):
    found = split()
    with pytest.raises(ValueError, match=r"kind=.pie. is not a figure\. Use one of bars"):
        found.plot(kind="pie")
    with pytest.raises(ValueError, match="kind='graph' does not fit a split by token"):
        found.plot(kind="graph")
    with pytest.raises(ValueError, match="kind='heads' draws one prompt, and there are 2"):
        lens_of(PROMPT, TWIN).attribute("Mary", by="head").plot()
    with pytest.raises(ValueError, match=r"ax is an int, not axes\. Pass axes"):
        found.plot(3)
    with pytest.raises(ValueError, match="image= lies under patches"):
        found.plot(image=[[0]])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ValueError, match=r"plot needs the package matplotlib.*tensorlens-tl\[plot\]"
    ):
        found.plot()


def test_names_from_right_to_left_and_long_names():
    """A mark behind each quote keeps a token beside its position; legends stay on the page."""
    assert label('"שלום"@3') == '"\u200eשלום"\u200e@3' and label('"a"@3') == '"a"@3'
    long = "x" * 400
    ax = curves(None, [0, 1], {long: [(1.0, 1.0, 1.0)] * 2, "a\nb": [(0.0, 0.0, 0.0)] * 2})
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == [label(long, 64), "a\\nb"] and len(names[0]) == 63


def test_small_numbers_are_not_written_as_zeros():
    ax = cell_map(None, [[0.001, 0.0], [-2e-4, math.nan]], ["a", "b"], ["c", "d"], unit="nats")
    assert [text.get_text() for text in ax.texts] == ["+1.0e-03", "0", "-2.0e-04", ""]
