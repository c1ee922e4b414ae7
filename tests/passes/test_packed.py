"""Packed runs of circuits against the host's own runs with rebuilt inputs, edge by edge."""

import pytest
import torch
from comparisons import assert_close
from models import CASES, D_VOCAB, PER_SHAPE, SHAPES, quiet, tokens

from tensorlens_tl import demo, discover, faithfulness, faithfulness_of_many, score_edges
from tensorlens_tl.circuits import edge_baselines
from tensorlens_tl.circuits.discovery import _Work
from tensorlens_tl.circuits.study import Study
from tensorlens_tl.passes import Layout, edge_model, packed_model
from tensorlens_tl.passes.packed_model import PackedLayer

_DRESSED = (
    "hooked-mistral",
    "hooked-neox-sequential",
    "hooked-no-norm",
    "hooked-olmo2",
    "hooked-bloom",
    "bridge-gpt-bigcode",
)
SERVED = [*PER_SHAPE, *(CASES[name] for name in _DRESSED if name in CASES)]
"""Every block shape, and windows, one norm of all queries, ALiBi, and one key for all heads."""
FIRST = SHAPES[0]


def pairs(lengths=(5, 7, 4), at=(0, 3, 2)):
    """Prompts of several lengths, and twins that differ first at these positions."""
    rows = [tokens(1, n, seed=n)[0] for n in lengths]
    twins = [row.clone() for row in rows]
    for twin, first in zip(twins, at, strict=True):
        twin[first:] = (twin[first:] + 7) % D_VOCAB
    return rows, twins


def circuits_of(model):
    with quiet(), edge_model(model) as edged:
        edges = edged.universe.edges
    draw, found = torch.Generator().manual_seed(1), {"all": edges, "none": []}
    for share in (0.04, 0.4):
        kept = torch.rand(len(edges), generator=draw) < share
        found[str(share)] = [edge for edge, own in zip(edges, kept.tolist(), strict=True) if own]
    return found


def both_ways(monkeypatch, model, *args, **kwargs):
    """The results of the packed way, which must serve the model, and those of the host's way."""
    packed, served = Study._packed, []

    def spy(self, masks, n):
        found = packed(self, masks, n)
        served.append(found is not None)
        return found

    with quiet():
        monkeypatch.setattr(Study, "_packed", spy)
        ours = faithfulness_of_many(model, *args, **kwargs)
        monkeypatch.setattr(Study, "_packed", lambda self, masks, n: None)
        theirs = faithfulness_of_many(model, *args, **kwargs)
    assert served == [True]
    return ours, theirs


SETTINGS = {
    "resample": {},
    "resample, frozen, before the end": {"attention": "frozen", "pos": -2},
    "mean": {"ablation": "mean"},
    "zero, frozen, a position": {"ablation": "zero", "attention": "frozen", "pos": 3},
}


RUNS = [  # all settings of the first, two of every other shape, by turns
    (case, setting)
    for i, case in enumerate(SERVED)
    for j, setting in enumerate(SETTINGS)
    if case is FIRST or (i + j) % 2
]


@pytest.mark.parametrize(("case", "setting"), RUNS, ids=str)
def test_packed_runs_are_the_host_s_rebuilt_runs(case, setting, monkeypatch):
    """Every metric of every run: ≤ 1e-10 in float64, ≤ 1e-6 where the host norms in float32."""
    model, kwargs = case.model(), SETTINGS[setting]
    rows, twins = pairs() if kwargs.get("ablation") is None else (list(tokens(3)), None)
    ours, theirs = both_ways(
        monkeypatch, model, rows, circuits_of(model), twins, target=3, versus=[4, 5, 6], **kwargs
    )
    for name, found in ours.items():
        for part in ("full", "ablated", "empty", "circuit"):
            own, other = (getattr(one, part) for one in (found, theirs[name]))
            assert_close(own, other, case.within("oracle"), f"{name}: {part}")
    moved = (ours["0.4"].circuit - ours["none"].circuit).abs().max()
    assert moved > 1e-4 * ours["all"].circuit.abs().max()


def test_no_circuit_is_the_corrupted_run_to_the_bit_and_batches_change_nothing():
    model, (rows, twins) = FIRST.model(), pairs()
    edges = circuits_of(model)["0.4"]
    with quiet():
        none = faithfulness(model, rows, [], twins, target=3)
        whole = faithfulness(model, rows, edges, twins, target=3)
        small = faithfulness(model, rows, edges, twins, target=3, batch_size=1)
        same = faithfulness(model, rows, edges, rows, target=3)
    assert torch.equal(none.circuit, none.ablated)
    assert_close(small.circuit, whole.circuit, 1e-12)
    assert_close(same.circuit, same.full, 1e-12)  # prompts that differ nowhere


@pytest.mark.parametrize("metric", [None, lambda logits, index: logits.softmax(-1)[:, 7] * index])
def test_own_predictions_and_metrics(metric, monkeypatch):
    model, (rows, twins) = FIRST.model(), pairs()
    ours, theirs = both_ways(monkeypatch, model, rows, circuits_of(model), twins, metric=metric)
    for name, found in ours.items():
        assert_close(found.circuit, theirs[name].circuit, FIRST.within("oracle"), name)


def test_a_model_that_is_misread_is_run_by_the_host(monkeypatch):
    """Scores of another scale: the packed logits are not the host's, so the host's way answers."""
    model, (rows, twins) = FIRST.model(), pairs()
    edges = circuits_of(model)["0.4"]
    with quiet():
        right = faithfulness(model, rows, edges, twins, target=3)
        pattern = PackedLayer.pattern
        monkeypatch.setattr(
            PackedLayer, "pattern", lambda self, q, *rest: pattern(self, 1.1 * q, *rest)
        )
        monkeypatch.setattr(packed_model, "AGREED", {})  # the host is asked once a model
        found = faithfulness(model, rows, edges, twins, target=3)
        monkeypatch.setattr(Study, "_packed", lambda self, masks, n: None)
        host = faithfulness(model, rows, edges, twins, target=3)
    assert torch.equal(found.circuit, host.circuit)
    assert_close(found.circuit, right.circuit, FIRST.within("oracle"))


def test_padding_sides_of_the_tokenizer_change_nothing():
    model, found = demo.load_model(), []
    drawn = [*demo.prompts("ioi", 2), *demo.prompts("facts", 1)]
    texts, twins = [p.clean for p in drawn], [p.corrupted for p in drawn]
    answers, side = [p.answer for p in drawn], model.tokenizer.padding_side
    try:
        for model.tokenizer.padding_side in ("left", "right"):
            found.append(faithfulness(model, texts, ["L1H1", "L2H1"], twins, target=answers))
    finally:
        model.tokenizer.padding_side = side
    assert torch.equal(found[0].circuit, found[1].circuit)


# --- First-order effects --------------------------------------------------------------------------


def scored_both_ways(monkeypatch, model, *args, **kwargs):
    packed, served = edge_baselines._packed, []

    def spy(*given):
        found = packed(*given)
        served.append(found is not None)
        return found

    with quiet():
        monkeypatch.setattr(edge_baselines, "_packed", spy)
        ours = score_edges(model, *args, **kwargs)
        monkeypatch.setattr(edge_baselines, "_packed", lambda *given: None)
        theirs = score_edges(model, *args, **kwargs)
    return ours, theirs, served


SCORED = [  # both methods of the first shape, one of every other, by turns
    (case, *method)
    for i, case in enumerate(SERVED)
    for method in (("eap", -1), ("eap_ig", -2))
    if case is FIRST or i % 2 == (method[0] == "eap_ig")
]


@pytest.mark.parametrize(("case", "method", "pos"), SCORED, ids=str)
def test_packed_effects_are_gradients_through_the_host(case, method, pos, monkeypatch):
    """Every edge; effects are products with what differs between two runs."""
    model, goal = case.model(), {"target": 3, "versus": [4, 5, 6], "steps": 3, "pos": pos}
    ours, theirs, served = scored_both_ways(monkeypatch, model, *pairs(), method, **goal)
    joint = case.name.endswith("olmo2")  # one norm divides the queries of all heads
    assert served == [not joint] and list(ours) == list(theirs)
    own, other = (torch.tensor([*found.values()]).double() for found in (ours, theirs))
    # Float32 norms are off in the two runs whose difference every effect is multiplied with.
    assert_close(own, other, case.within("two runs" if case.float32_norms else "oracle"), method)
    assert other.abs().max() > 1e-2


def test_effects_of_twins_that_differ_at_the_first_token_and_of_a_metric(monkeypatch):
    model = FIRST.model()
    rows, twins = pairs(at=(0, 0, 0))
    goal = {"metric": lambda logits, index: logits.softmax(-1)[:, 7] * (index + 1)}
    ours, theirs, served = scored_both_ways(monkeypatch, model, rows, twins, "eap_ig", **goal)
    assert served == [True]
    own, other = (torch.tensor([*found.values()]).double() for found in (ours, theirs))
    assert_close(own, other, FIRST.within("oracle"))


def test_effects_of_a_misread_model_are_the_host_s(monkeypatch):
    model = FIRST.model()
    pattern = PackedLayer.pattern
    monkeypatch.setattr(
        PackedLayer, "pattern", lambda self, q, *rest: pattern(self, 1.1 * q, *rest)
    )
    monkeypatch.setattr(packed_model, "AGREED", {})
    ours, theirs, served = scored_both_ways(monkeypatch, model, *pairs(), target=3)
    assert served == [False] and ours == theirs


# --- The operator between two runs ----------------------------------------------------------------


def found_both_ways(monkeypatch, model, *args, **kwargs):
    """Scores by packed runs and by captures, and whether the former served every batch."""
    packed, served = _Work._packed, []

    def spy(self, *given):
        found = packed(self, *given)
        served.append(found is not None)
        return found

    with quiet():
        monkeypatch.setattr(_Work, "_packed", spy)
        ours = discover(model, *args, n_edges=9, **kwargs).scores
        monkeypatch.setattr(_Work, "_packed", lambda *given: None)
        # One prompt at a time: some hosts cannot pad in double precision.
        theirs = discover(model, *args, n_edges=9, batch_size=1, **kwargs).scores
    assert list(ours) == list(theirs)
    return *(torch.tensor([*found.values()]).double() for found in (ours, theirs)), served


WITH_SECANTS = [case for case in SERVED if not case.name.endswith("solu")]


@pytest.mark.parametrize("case", WITH_SECANTS, ids=str)
def test_packed_secants_are_those_of_captures(case, monkeypatch):
    """Every edge, for twins that differ late; own predictions, and foils of some prompts."""
    goal = {"target": [3, None, 4], "versus": [None, 5, 6], "pos": -2}
    own, other, served = found_both_ways(monkeypatch, case.model(), *pairs(), **goal)
    joint = case.name.endswith("olmo2")  # one norm divides the queries of all heads
    assert served == [not joint]
    assert_close(own, other, case.within("two runs" if case.float32_norms else "oracle"))
    assert other.abs().max() > 1e-2


def test_rows_of_padding_see_their_prompt_s_last_token():
    """Else a window would hide all keys of such a row, and its gradient would be nan."""
    behind = Layout((9, 3), (0, 2), torch.device("cpu")).behind
    assert (behind == 0).any(-1).all()
    assert torch.equal(behind[1], behind[1, :1].expand_as(behind[1]))
    assert torch.equal(behind[0], torch.arange(9)[:, None] - torch.arange(9))
