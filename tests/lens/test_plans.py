"""What calls cost, told before they run."""

import warnings

import models
import pytest
import torch
from models import SHAPES, encoder_offered
from torch.utils.flop_counter import FlopCounterMode

import tensorlens_tl
from tensorlens_tl import TensorLens, demo, score_edges
from tensorlens_tl.costs import Rehearsal
from tensorlens_tl.costs.machine_rates import Rates
from tensorlens_tl.recording import run
from tensorlens_tl.support.every_name import tiny_model

pytestmark = pytest.mark.algebra

FIRST = SHAPES[0]


def lens_of_demo():
    prompt = "When Mary and John went to the store, John gave a drink to"
    return tensorlens_tl.capture(demo.load_model(), prompt)[1]


@pytest.mark.parametrize("pattern", ["stored", "recomputed"])
def test_flops_of_a_split_by_token(pattern):
    """Those that torch counts, within a twentieth."""
    prompt = "When Mary and John went to the store, John gave a drink to"
    lens = tensorlens_tl.capture(demo.load_model(), prompt, pattern=pattern)[1]
    plan = lens.plan("attribute", target="Mary")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        TensorLens(lens.capture).attribute("Mary")
    assert abs(plan.flops / counted.get_total_flops() - 1) <= 0.05
    assert 0 < plan.seconds < 60 and 0 < plan.peak_bytes < plan.memory_limit
    assert repr(plan).startswith("Plan(attribute: about ")


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("attribute", {}),
        ("attribute", {"by": "order"}),
        ("attribute", {"by": "edge"}),
        ("attribute", {"by": "edge", "qk": True}),
        ("attribute_many", {"target": [5, 6]}),
        ("attribute_sequence", {"continuation": -3}),
        ("token_matrix", {"name": "in"}),
        ("discover", {"n_edges": 10}),
    ],
    ids=str,
)
def test_calls_of_torch_that_a_plan_counts(what, given, monkeypatch):
    """Of short calls they are the time. They are those of a rehearsal, within three fifths."""
    monkeypatch.setattr(Rates, "seconds", lambda _, cost: float(cost.calls))
    lens = lens_of_demo()
    counted = tensorlens_tl.plan(getattr(lens, what), **given).seconds
    assert 0.6 <= lens.plan(what, **given).seconds / counted <= 1 / 0.6


def test_calls_of_torch_in_a_capture_and_in_scores_of_edges(monkeypatch):
    monkeypatch.setattr(Rates, "seconds", lambda _, cost: float(cost.calls))
    model, lens = demo.load_model(), lens_of_demo()
    text = lens.prompt
    counted = tensorlens_tl.plan(tensorlens_tl.capture, model, text).seconds
    assert 0.6 <= lens.plan("capture").seconds / counted <= 1 / 0.6
    other = text.replace("John gave", "Mary gave")
    counted = tensorlens_tl.plan(score_edges, model, [text], [other]).seconds
    assert 0.6 <= lens.plan("score_edges").seconds / counted <= 1 / 0.6


def test_a_product_of_one_row_costs_what_its_weights_take_to_read():
    """Few rows multiply at the speed of memory, not of the arithmetic unit."""
    with Rehearsal() as rehearsal:
        torch.ones(1, 300) @ torch.ones(300, 700)
    assert rehearsal.cost.moved >= 300 * 700


def test_what_is_not_planned():
    lens = models.lens_of(FIRST)
    for what, wrong, match in (
        ("attribute", {"bye": "edge"}, "There is no argument bye= of attribute. Did you mean by=?"),
        ("discover", {"edges": 5}, "no argument edges= of discover. Did you mean n_edges=?"),
        ("score_edges", {"method": "eep"}, "method='eep' does not exist. Use one of eap"),
        ("score_edges", {"steps": 0}, "steps=0 is not an integer ≥ 1"),
        ("score_edges", {"model": 3}, "no argument model= of score_edges. Use method, steps"),
        ("faith", {}, "no plan of 'faith'. Use a method of the lens, or capture, attribute"),
        ("faithfulness", {}, "no plan of 'faithfulness' in a lens, as it runs"),
        ("evaluate", {}, "no plan of 'evaluate' in a lens, as it runs the re"),
        ("capture", {"pattern": "kept"}, "pattern='kept' is not known"),
        ("capture", {"n_pos": 0}, "n_pos=0 is not an integer ≥ 1"),
        ("attribute", {"by": "tokens"}, "by='tokens' does not exist"),
        ("attribute", {"by": "token", "effect": "total"}, "effect='total' is not available"),
        ("attribute_many", {"by": "mlp"}, "by='mlp' has no direct split of its own"),
        ("attribute_many", {"bye": "edge"}, "Did you mean by=?"),
    ):
        with pytest.raises(ValueError, match=match):
            lens.plan(what, **wrong)


def flops(call):
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        call()
    return counted.get_total_flops()


@pytest.mark.parametrize("pattern", ["stored", "recomputed"])
@pytest.mark.parametrize("case", models.PER_SHAPE[:4], ids=str)
def test_flops_and_memory_of_a_capture(case, pattern):
    """Of a prompt three times as long as that of the lens; kept are the tensors of the run."""
    ids = models.tokens(2, 21)
    with models.quiet():
        longer = tensorlens_tl.capture(case.model(), ids, pattern=pattern)[1]  # loads what is lazy
        plan = models.lens_of(case).plan("capture", n_pos=21, pattern=pattern)
        counted = flops(lambda: tensorlens_tl.capture(case.model(), ids, pattern=pattern))
    assert abs(plan.flops / counted - 1) <= 0.05
    weights = {t.data_ptr() for t in case.model().parameters()}
    run: dict[int, int] = {}

    def note(t):
        if t.data_ptr() not in weights and t.ndim > 1 and len(t) == 2:
            run[t.data_ptr()] = t.numel() * t.itemsize
        return t

    longer.capture.mapped(note)
    assert 0.5 <= plan.peak_bytes / sum(run.values()) <= 2


def test_flops_of_many_targets():
    """Several targets at one position, at several, and every token of a continuation."""
    text = "When Mary and John went to the store, John gave a drink to"
    run = tensorlens_tl.capture(demo.load_model(), text)[1].capture
    for call, given in (
        ("attribute_many", {"target": ["Mary", "John", 7]}),
        ("attribute_many", {"pos": [-1, -2, 3]}),
        ("attribute_many", {"target": ["Mary", 7], "by": "edge"}),
        ("attribute_sequence", {"continuation": "a drink to", "by": "head"}),
        ("attribute_sequence", {"continuation": "a drink to"}),
        ("attribute", {"by": "order", "target": "Mary"}),
    ):
        plan = TensorLens(run).plan(call, **given)
        lens = TensorLens(run)
        counted = flops(lambda: getattr(lens, call)(**given))  # noqa: B023
        assert abs(plan.flops / counted - 1) <= 0.05, (call, given)
    assert lens.plan("token_matrix", name="norm").flops == lens.plan("norm").flops


def test_flops_of_edges_and_of_a_search():
    """Those that torch counts, within a twentieth: one run, two, and the operator between them."""
    text = "When Mary and John went to the store, {} gave a drink to"
    model = demo.load_model()
    runs = [tensorlens_tl.capture(model, text.format(name))[1].capture for name in ("John", "Mary")]
    for at, qk in ((None, True), (None, False), ("corrupted", True), ("secant", True)):
        lens, other = map(TensorLens, runs)
        two = {} if at is None else {"baseline": other, "at": at}
        plan = lens.plan("attribute", by="edge", qk=qk, **two)
        counted = flops(lambda: lens.attribute("Mary", by="edge", qk=qk, **two))  # noqa: B023
        assert abs(plan.flops / counted - 1) <= 0.05, (at, qk)
        assert 0 < plan.seconds < 60 and 0 < plan.peak_bytes < plan.memory_limit
    lens, other = map(TensorLens, runs)
    search = lens.plan("discover", target="Mary", n_edges=20, corrupted=other)
    assert search.flops == plan.flops and repr(search).startswith("Plan(discover: about ")
    assert lens.plan("discover", n_edges=20, qk=False).flops < search.flops


@pytest.mark.offered(encoder_offered("MixtralForCausalLM"))
@pytest.mark.parametrize("gate", ["gate", "half"])
def test_flops_of_edges_of_a_mixture(gate):
    """Those that torch counts, within a twentieth: every expert is a reader of its own."""
    with models.quiet():
        model = tiny_model("MixtralForCausalLM")
        lens = tensorlens_tl.capture(model, models.tokens(1, 32).clamp_min(3), gate=gate)[1]
    for qk in (False, True):
        fresh = TensorLens(lens.capture)
        plan = fresh.plan("attribute", by="edge", qk=qk)
        counted = flops(lambda: fresh.attribute(3, by="edge", qk=qk))  # noqa: B023
        assert abs(plan.flops / counted - 1) <= 0.05, qk


@pytest.mark.parametrize("case", models.PER_SHAPE[:3], ids=str)
def test_flops_of_score_edges(case):
    ids, other = models.tokens(), models.tokens(seed=4)
    score_edges(case.model(), ids, other, progress=False)  # the host is asked once a model
    for method in ("eap", "eap_ig"):
        plan = models.lens_of(case).plan("score_edges", method=method, steps=2)
        arguments = case.model(), ids, other, method, 3
        counted = flops(lambda: score_edges(*arguments, steps=2, progress=False))  # noqa: B023
        assert abs(plan.flops / counted - 1) <= 0.05
    assert models.lens_of(case).plan("score_edges", method="random").flops == 0


@pytest.mark.parametrize("case", SHAPES[:2], ids=str)
def test_much_memory_for_patterns_is_told(case, monkeypatch):
    blocks = models.lens_of(case).capture.blocks
    taken = sum(block.attn.mix.pattern.nbytes for block in blocks)

    def told(**how):
        with warnings.catch_warnings(record=True) as seen, torch.no_grad():
            warnings.simplefilter("always")
            tensorlens_tl.capture(case.model(), models.tokens(), **how)
        return [str(w.message) for w in seen if "attention patterns" in str(w.message)]

    monkeypatch.setattr(run, "NOTED_BYTES", taken + 1)
    assert told() == []
    monkeypatch.setattr(run, "NOTED_BYTES", taken)
    (note,) = told()
    assert 'Pass pattern="recomputed" to keep' in note
    assert told(pattern="recomputed") == []
    monkeypatch.setattr(run, "free_memory", lambda device: taken - 1)
    with pytest.raises(ValueError, match=r"take .* GiB, and .* GiB are free. Pass pattern="):
        told()
    assert told(pattern="recomputed") == []
