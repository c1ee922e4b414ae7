"""Evaluations: known best orders, calls of the model made by hand, bad input, files."""

import json
import math
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from models import CASES, lens_of, quiet
from test_masking import PROMPT, demo_model, state_of

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.attribution.targets import expected_others, own_prediction, resolve_target
from tensorlens_tl.evaluation.parts import Parts
from tensorlens_tl.evaluation.protocols import PROTOCOLS, measures
from tensorlens_tl.evaluation.report import Evaluation
from tensorlens_tl.evaluation.runner import evaluate
from tensorlens_tl.evaluation.scoring import score
from tensorlens_tl.evaluation.significance import rank_correlation

pytestmark = pytest.mark.algebra

PROMPTS = (PROMPT, "The capital of France is", "The keys near the cabinet")
SHAPES = tuple(PROTOCOLS)


def run(prompts=PROMPTS, *args, **kwargs):
    with quiet():
        return evaluate(demo_model(), list(prompts), *args, progress=False, **kwargs)


@cache
def found():
    return run(
        PROMPTS, ("in_out", "rollout", "random"), SHAPES, ("delete", "token", "mean"), beam=1
    )


def probability(ids, target):
    with quiet(), torch.no_grad():
        return float(demo_model()(ids[None])[0, -1].softmax(-1)[target])


# --- Against the model itself --------------------------------------------------------------------


def test_numbers_are_those_of_calls_by_hand():
    """One prompt, tokens deleted by hand in the order of in_out's scores from a lens."""
    model, text = demo_model(), "The capital of France is"
    with quiet():
        _, lens = tensorlens_tl.capture(model, text)
    ids, scores = model.to_tokens(text)[0], lens.token_scores("in_out")[0]
    target, n = int(lens.logits[0, -1].argmax()), len(ids) - 1
    order = [j for j in scores.argsort(descending=True).tolist() if j > 0]

    def without(gone):
        return probability(ids[[j for j in range(len(ids)) if j not in gone]], target)

    morf = [without(order[:k]) for k in range(n + 1)]
    lerf = [without(order[n - k :]) for k in range(n + 1)]
    fractions = [k / n for k in range(n + 1)]
    got = run([text], "in_out", measures("morf_lerf", fractions))
    assert got.row("in_out", "morf").values[0] == pytest.approx(sum(morf) / (n + 1), abs=1e-5)
    assert got.row("in_out", "lerf").values[0] == pytest.approx(sum(lerf) / (n + 1), abs=1e-5)
    area = sum((a + b) / 2 for a, b in pairwise(morf)) / n
    got = run([text], "in_out", preset=fractions)
    assert got.row("in_out", "positive").values[0] == pytest.approx(area, abs=1e-5)
    for name, curve in (("positive", morf), ("negative", lerf)):
        assert got.row("in_out", name).fractions == tuple(fractions)
        assert got.row("in_out", name).points[0] == pytest.approx(curve, abs=1e-5)
    assert got.targets == ("Paris",) and got.lengths == (n,) and len(got) == 1


def test_scores_that_are_the_drops_agree_with_leave_one_out():
    """A scorer that knows the truth: its rank correlation is 1, its opposite's −1."""
    model, drops = demo_model(), []
    for text in PROMPTS:
        ids = model.to_tokens(text)[0]
        with quiet(), torch.no_grad():
            target = int(model(ids[None])[0, -1].argmax())
        whole = probability(ids, target)
        gone = [
            whole - probability(torch.cat([ids[:j], ids[j + 1 :]]), target)
            for j in range(1, len(ids))
        ]
        drops.append([0.0, *gone])
    scores = {"truth": drops, "opposite": [[-d for d in one] for one in drops]}
    got = run(PROMPTS, protocol=["leave_one_out", "perturbation"], scores=scores)
    assert got.row("truth", "leave_one_out").values == pytest.approx([1] * 3, abs=1e-2)
    assert got.row("opposite", "leave_one_out").values == pytest.approx([-1] * 3, abs=1e-2)
    assert got.methods == ("truth", "opposite")
    for measure in ("positive", "negative"):
        assert got.compare("truth", "opposite", measure).difference.value > 0.3


def test_the_best_order_found_by_trying_all():
    """Five tokens: of 120 orders the best has NAOPC 1, the worst 0, and in_out one between."""
    text = "The capital of France is"
    best, worst = (-math.inf, ()), (math.inf, ())
    ids = demo_model().to_tokens(text)[0]
    n = len(ids)
    with quiet():
        target = score(demo_model(), [text], ["random"], progress=False).targets[0]
    value = {}
    for s in range(2 ** (n - 1)):
        kept = [0, *(j for j in range(1, n) if not s >> (j - 1) & 1)]
        value[s] = probability(ids[kept], target)
    from itertools import permutations

    for order in permutations(range(1, n)):
        masked, total = 0, 0.0
        for j in order:
            masked |= 1 << (j - 1)
            total += value[0] - value[masked]
        best, worst = max(best, (total, order)), min(worst, (total, order))
    scores = {
        name: [[-float(order.index(j)) if j else 0.0 for j in range(n)]]
        for name, (_, order) in (("best", best), ("worst", worst))
    }
    got = run([text], "in_out", "naopc", scores=scores)
    assert got.row("best").values[0] == pytest.approx(1, abs=1e-5)
    assert got.row("worst").values[0] == pytest.approx(0, abs=1e-5)
    assert 0 < got.row("in_out").values[0] < 1


# --- What must not matter ------------------------------------------------------------------------


def test_bos_is_never_masked_and_the_last_token_on_request():
    """Scores at tokens that stay change nothing; at others they do."""
    lengths = [len(demo_model().to_tokens(text)[0]) for text in PROMPTS]
    plain = [[float(j) for j in range(n)] for n in lengths]
    high = [[1e9, *row[1:]] for row in plain]
    low_last = [[*row[:-1], -1e9] for row in plain]
    scores = {"plain": plain, "bos": high, "last": low_last}
    free = run(PROMPTS, protocol=["perturbation", "leave_one_out"], scores=scores)
    kept = run(PROMPTS, protocol=["perturbation", "leave_one_out"], scores=scores, keep_last=True)
    for one, n in ((free, 1), (kept, 2)):
        assert one.lengths == tuple(length - n for length in lengths)
        for measure in ("positive", "negative", "leave_one_out"):
            assert one.row("plain", measure).values == one.row("bos", measure).values
    assert free.row("plain", "positive").values != free.row("last", "positive").values
    assert kept.row("plain", "positive").values == kept.row("last", "positive").values


def test_batches_and_company_change_nothing():
    whole = found()
    alone = [run([text], "in_out", SHAPES, beam=1) for text in PROMPTS]
    small = run(PROMPTS, "in_out", SHAPES, batch_size=3, beam=1)
    for measure in dict.fromkeys(row.measure for row in whole.rows):
        values = whole.row("in_out", measure, "delete").values
        assert small.row("in_out", measure).values == pytest.approx(values, abs=1e-4)
        single = [one.row("in_out", measure).values[0] for one in alone]
        assert single == pytest.approx(values, abs=1e-4)


def test_ties_are_broken_by_the_seed():
    flat = {"flat": [[0.0] * len(demo_model().to_tokens(text)[0]) for text in PROMPTS]}
    one, same, other = (run(PROMPTS, scores=flat, seed=s).rows[0].values for s in (0, 0, 1))
    assert one == same != other


def test_the_model_is_left_as_it_was():
    model = demo_model()
    before = state_of(model)
    run(PROMPTS[:1], ("in_out", "chefer"), masking=("delete", "token", "mean"))
    assert state_of(model) == before


def test_every_set_is_run_once():
    text = ["The capital of France is"]  # 5 tokens: 32 sets
    got = run(text, None, "naopc", options={"integrated_gradients": {"steps": 2}})
    assert got.runs == {"delete": 32} and len(got.methods) == 19
    assert set(got.seconds) == set(got.methods) and got.forwards["in_out"] > 0


def test_evaluations_share_scores():
    with quiet():
        scored = score(demo_model(), list(PROMPTS), ["in_out", "rollout"], progress=False)
    whole = run(PROMPTS, ["in_out", "rollout"])
    with quiet():
        again = evaluate(demo_model(), scored, progress=False)
        some = evaluate(demo_model(), scored.take([1]), "rollout", progress=False)
    for row in whole.rows:
        values = again.row(row.method, row.measure).values
        assert values == pytest.approx(row.values, abs=1e-5)
    assert some.targets == ("Paris",) and some.methods == ("rollout",)
    sizes = {"sizes": [one.abs() for one in scored.scores["in_out"]]}
    more = replace(scored, scores=dict(scored.scores) | sizes)  # a column that took no seconds
    with quiet():
        own = evaluate(demo_model(), more, progress=False)
    assert own.methods == ("in_out", "rollout", "sizes") and own.seconds == scored.seconds
    with pytest.raises(
        ValueError, match=r"There are no scores by chefer. Choose among in_out, rollout"
    ):
        evaluate(demo_model(), scored, "chefer")
    with pytest.raises(ValueError, match="cannot change scores that are made already"):
        evaluate(demo_model(), scored, versus="all_others")


def test_prompts_as_ids_and_targets():
    model = demo_model()
    ids = [model.to_tokens(text)[0] for text in PROMPTS]
    one, two = run(PROMPTS, "in_out"), run(ids, "in_out", target=["Mary", "Paris", "are"])
    assert one.rows == two.rows and one.targets == two.targets
    foils = run(PROMPTS, "in_out", versus=["John", "Rome", "is"])
    assert foils.versus == "own" and foils.rows != one.rows


def test_a_logit_difference_is_from_the_foil_or_else_the_runner_up():
    """Leave-one-out, against the model's own logits with each token deleted."""
    model, words = demo_model(), ["John", "Rome", "is"]
    for foils in (None, words):
        with quiet():
            scored = score(model, PROMPTS, ["in_out"], versus=foils, progress=False)
            logits = [model(ids[None])[0, -1].detach() for ids in scored.prompts]
        ranked = [int(one.argsort()[-2]) for one in logits]
        assert list(scored.foils) == (
            ranked if foils is None else [model.to_single_token(word) for word in words]
        )
        (measure,) = measures("leave_one_out", metric="logit_diff")
        whole = evaluate(model, scored, "in_out", measure, progress=False, keep_last=True)
        for i, ids in enumerate(scored.prompts):
            goal = torch.tensor([scored.targets[i], scored.foils[i]])
            lost = []
            for j in range(1, len(ids) - 1):
                with quiet(), torch.no_grad():
                    left = model(torch.cat([ids[:j], ids[j + 1 :]])[None])[0, -1]
                a, b = logits[i][goal] - left[goal]
                lost.append(float(a - b))
            expected = rank_correlation(scored.scores["in_out"][i][1:-1].tolist(), lost)
            assert whole.rows[0].values[i] == pytest.approx(expected)


SMOOTH = [name for name in ("hooked-gpt2", "hooked-gemma2", "bridge-llama") if name in CASES]


@pytest.mark.parametrize("name", SMOOTH)
def test_log_odds_are_what_is_explained_versus_others(name):
    """The gradient of log p/(1 − p) by the final residual is u, soft caps' ratios held."""
    capture = lens_of(CASES[name]).capture
    ids = own_prediction(capture)
    goal = resolve_target(capture, None).minus(expected_others(capture, ids))
    y = capture.unembed.final[:, -1].clone().requires_grad_()
    capped = capture.unembed.weights.soft_cap is not None
    if capped:  # the ratio is held, not differentiated
        ratio = capture.unembed.ratio[:, -1]
    logits = y @ capture.frame.cast(capture.unembed.weights.W_U)
    b_U = capture.unembed.weights.b_U
    logits = logits if b_U is None else logits + b_U
    logits = logits * ratio if capped else logits
    mine = logits.gather(1, ids[:, None])[:, 0]
    odds = mine - logits.scatter(1, ids[:, None], -torch.inf).logsumexp(-1)
    (gradient,) = torch.autograd.grad(odds.sum(), y)
    assert torch.allclose(goal.covector, gradient, atol=1e-6)
    total = (goal.covector * y).sum(-1) + goal.constant
    assert torch.allclose(total, goal.value, atol=1e-6)


# --- What it looks like --------------------------------------------------------------------------


def test_table_json_and_dataframe():
    pytest.importorskip("pandas", reason="an extra")
    whole = found()
    text = repr(whole)
    assert text.startswith("Evaluation of 3 methods on 3 prompts of tensorlens_tl demo (float32)")
    for part in (
        "masked by delete",
        "masked by mean",
        "positive ↓ (tensorlens, probability)",
        "sufficiency ↓ (eraser, probability)",
        "rollout",
    ):
        assert part in text
    again = Evaluation.from_json(whole.to_json())
    assert vars(again) == vars(whole) and repr(again) == text
    frame = whole.to_dataframe()
    assert len(frame) == len(whole.rows) * 3 == 11 * 3 * 3 * 3
    one = whole.row("in_out", "positive", "mean")
    picked = frame.query("method == 'in_out' and measure == 'positive' and masking == 'mean'")
    assert tuple(picked.value) == one.values
    assert whole.estimate("in_out", "positive", "mean").value == pytest.approx(sum(one.values) / 3)


AREAS = ("positive", "negative", "deletion", "insertion")


def test_a_measure_is_the_area_or_the_mean_of_its_curve():
    for row in found().rows:
        if row.measure in ("naopc", "leave_one_out"):
            assert (row.fractions, row.points) == ((), ())
            continue
        points, x = np.array(row.points), np.array(row.fractions)
        assert points.shape == (3, len(x))
        area = ((points[:, 1:] + points[:, :-1]) / 2) @ np.diff(x) / (x[-1] - x[0])
        expected = area if row.measure in AREAS else points.mean(1)
        assert np.allclose(expected, row.values, rtol=0, atol=1e-14), row.measure
        means = [one.value for one in row.curve()]
        assert means == pytest.approx(points.mean(0).tolist()), row.measure
    positive, negative = (found().row("random", n, "mean") for n in ("positive", "negative"))
    model = demo_model()
    ids = [model.to_tokens(text)[0] for text in PROMPTS]
    targets = [int(model.to_single_token(target)) for target in found().targets]
    whole = [probability(*pair) for pair in zip(ids, targets, strict=True)]
    for row in (positive, negative):  # of no token masked
        assert [own[0] for own in row.points] == pytest.approx(whole, abs=1e-6)


def test_files_and_chunks_of_earlier_builds_have_no_curves():
    data = json.loads(found().to_json())
    for row in data["rows"]:
        del row["fractions"], row["points"]
    old = Evaluation.from_json(json.dumps(data))
    assert [row.values for row in old.rows] == [row.values for row in found().rows]
    assert not any(row.points for row in old.rows)
    with pytest.raises(
        ValueError, match=r"measure='positive' has no curves here\. .*earlier builds"
    ):
        old.plot(kind="curves", measure="positive", masking="mean", metric="probability")
    notes = "\n".join(old._page().notes)
    assert len(old._page().views) == 1 and "evaluations of earlier builds kept none" in notes
    chunk = {name: torch.ones(1) for name in ("lengths", "targets", "predicted", "runs", "seconds")}
    chunk |= {"values": torch.ones(1, 1, 1, 1), "curves": torch.ones(1, 1, 1, 1, 2)}
    new = Parts.of([chunk, chunk])
    assert new.curve(0, 0, 0, (0.0, 0.5)) == ((0.0, 0.5), ((1.0, 1.0), (1.0, 1.0)))
    del (older := dict(chunk))["curves"]
    mixed = Parts.of([chunk, older])
    assert mixed.values == new.values and mixed.curve(0, 0, 0, (0.0, 0.5)) == ((), ())


def test_comparisons_point_to_the_better_method():
    whole = found()
    for measure in ("positive", "comprehensiveness"):
        ours, theirs = (whole.row(name, measure, "token") for name in ("in_out", "random"))
        sign = 1 if ours.higher else -1
        gap = sign * (sum(ours.values) - sum(theirs.values)) / 3
        got = whole.compare("in_out", "random", measure, "token")
        assert got.difference.value == pytest.approx(gap)
        back = whole.compare("random", "in_out", measure, "token")
        assert back.difference.value == pytest.approx(-gap) and got.p == back.p


def test_undefined_values_survive_a_file():
    flat = {"flat": [[0.0] * len(demo_model().to_tokens(PROMPT)[0])]}
    got = run([PROMPT], protocol="leave_one_out", scores=flat)
    assert math.isnan(got.rows[0].values[0]) and "null" in got.to_json()
    assert math.isnan(Evaluation.from_json(got.to_json()).rows[0].values[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("model"), "Pass what Evaluation.to_json wrote"),
        (lambda data: data.update(format="other"), "another format"),
        (lambda data: data["rows"][0].update(values=[1.0]), "A row does not have 3 values"),
        (lambda data: data["rows"][0]["points"].pop(), "A row's points do not fit"),
        (lambda data: data["rows"][0].update(fractions=[0.0]), "A row's points do not fit"),
        (lambda data: data["rows"][0].update(values="abc"), "is not a study of the format"),
        (lambda data: data.update(rows=None), "is not a study of the format"),
    ],
)
def test_damaged_files_are_refused(change, message):
    data = json.loads(found().to_json())
    change(data)
    with pytest.raises(ValueError, match=message):
        Evaluation.from_json(json.dumps(data))
    with pytest.raises(ValueError, match=r"is not a study of the format"):
        Evaluation.from_json("no JSON")


def test_rows_are_named_or_refused():
    with pytest.raises(
        ValueError, match=r"33 rows fit .*but one is needed. Choose among .*measure positive"
    ):
        found().row("in_out")
    with pytest.raises(ValueError, match=r"0 rows fit .*'chefer'.*method in_out, rollout, random"):
        found().row("chefer", "positive", "delete")


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "roll"}, r"There is no method 'roll'. Choose one of norm, in, .*random"),
        ({"methods": []}, r"methods=\[\] names no method. Name at least one of norm"),
        ({"options": {"norm": {"steps": 3}}, "methods": "norm"}, "norm has no option steps"),
        ({"options": {"chefer": {}}}, "options= has an entry for chefer, .*in_out.*Name the"),
        ({"mask_token": "the"}, "mask_token= is used by masking='token' only"),
        ({"mask_token": "zzz", "masking": "token"}, "mask_token='zzz' is unknown to the tokenizer"),
        (
            {"prompts": [torch.ones(2, 5).long()]},
            r"prompts\[0\] has ids of shape \[2, 5\], which are 2",
        ),
        ({"prompts": [[1, 9, 8, 7], [1, 9, 2, 2]]}, "prompt 1 ends in the padding token"),
        ({"protocol": "perturb"}, "protocol='perturb' does not exist. Use one of perturbation"),
        ({"protocol": []}, r"protocol=\[\] names no protocol"),
        ({"preset": "atad"}, "preset='atad' does not exist. Use one of tensorlens"),
        ({"preset": (0, 30)}, "fractions between 0 and 1"),
        ({"preset": (0, 1.5)}, "fractions between 0 and 1"),
        ({"masking": "blur"}, "masking='blur' does not exist. Use one of delete, token, mean"),
        ({"metric": "loss"}, "metric='loss' does not exist. Use one of probability"),
        ({"target": "John"}, "target='John' is predicted by no prompt, .*Drop target="),
        ({"target": ["Mary"]}, "target has 1 entries for 3 prompts"),
        ({"versus": ["Mary"]}, "versus has 1 entries for 3 prompts"),
        ({"target": "Mary John"}, "target='Mary John' is 2 tokens"),
        ({"target": 9999}, "target=9999 is outside the vocabulary"),
        ({"batch_size": 0}, "batch_size"),
        ({"prompts": PROMPT}, "prompts=.* is not a non-empty list"),
        ({"prompts": []}, r"prompts=\[\] is not a non-empty list"),
        ({"prompts": [PROMPT, "Mary"]}, "Prompt 1 has 1 tokens .* but positive needs 2"),
        ({"prompts": ["Mary and"], "protocol": "leave_one_out"}, "2 tokens .* leave_one_out needs"),
        ({"scores": {"mine": [[1.0]]}}, r"scores\['mine'\] has 1 entries for 3 prompts"),
        ({"scores": {"mine": [[1.0]] * 3}}, r"scores\['mine'\] has 1 numbers for the 15 tokens of"),
        ({"scores": {"mine": [[math.nan] * 15] * 3}}, r"scores\['mine'\] has nan in prompt 0"),
        ({"scores": {"norm": [[1.0]] * 3}}, "has the name of a method. Give your scores another"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(arguments, message):
    given = {"prompts": PROMPTS, "methods": None if "scores" in arguments else "in_out"}
    arguments = given | arguments
    prompts = arguments.pop("prompts")
    with pytest.raises(ValueError, match=message), quiet():
        evaluate(demo_model(), prompts, progress=False, **arguments)


def test_a_prompt_without_bos_keeps_a_token():
    ids = [demo_model().to_tokens(PROMPT)[0][1:]]
    assert run(ids, "in_out").lengths == (14,)
    with pytest.raises(
        ValueError, match=r"morf masks every token of prompt 0, which has no beginning"
    ):
        run(ids, "in_out", "morf_lerf")
    with pytest.raises(ValueError, match=r"positive masks every token of prompt 0"):
        run(ids, "in_out", preset=(0, 0.95))  # 14 of 14
    with pytest.raises(ValueError, match="sufficiency masks every token"):
        run(ids, "in_out", "eraser", preset=(0, 0.5))
    assert run(ids, "in_out", "morf_lerf", "token").lengths == (14,)
    assert run(ids, "in_out", "morf_lerf", keep_last=True).lengths == (13,)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "networkx", None)
    for name in ("integrated_gradients", "attention_flow"):
        with pytest.raises(ValueError, match=r"pip install 'tensorlens-tl\[baselines\]'"):
            run(PROMPTS, name)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=r"pip install 'tensorlens-tl\[pandas\]'"):
        found().to_dataframe()


def test_the_demo_tasks_are_served():
    pairs = demo.prompts("facts", 4)
    got = run([p.clean for p in pairs], "in_out", target=[p.answer for p in pairs])
    assert len(got) == 4 and got.targets == tuple(p.answer for p in pairs)


@pytest.mark.wrong_types
def test_scores_and_tokens_of_wrong_types_are_refused():
    with pytest.raises(
        ValueError, match=r"scores is a list, not a dictionary by method. Pass \{'mine'"
    ):
        run(PROMPTS, scores=[[1.0] * 6] * 3)
    with pytest.raises(ValueError, match=r"versus=1.5 is not a token. Pass a token, an id"):
        run(PROMPTS, "in_out", versus=1.5)


def test_ids_may_be_numpys():
    foil = demo_model().to_single_token("Rome")
    one, two = (run(PROMPTS, "in_out", versus=given) for given in (foil, np.int64(foil)))
    assert one.rows == two.rows
