"""Relations decoded linearly: maps against the real model, selection, edits, studies, files."""

import json
from dataclasses import replace

import pytest
import torch
from comparisons import assert_close
from models import (
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    SHARED,
    lens_of,
    quiet,
    randn_like,
    tokens,
    uniform_attention,
)
from oracles import FrozenModel

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.evaluation.intervals import bootstrap, median
from tensorlens_tl.relations.decoding_study import MEAN, RelationStudy, decode
from tensorlens_tl.relations.linear_relation import LinearRelation, jacobian_maps, operator_maps
from tensorlens_tl.relations.relation import Relation, subject_position
from tensorlens_tl.relations.statements import state

FILES = SHARED / "text" / "relations"
LAYERS, POS = (0, 1), 2
every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)
few = pytest.mark.parametrize(
    "case",
    [c for c in SHAPES if c.name.split("-", 1)[1] in ("gpt2", "gemma2", "neox", "no-norm")],
    ids=str,
)


def times(maps, h):
    return torch.einsum("lij,lj->li", maps.W, h) + maps.b


# --- One prompt ----------------------------------------------------------------------------------


@every_case
def test_the_operators_map_is_the_frozen_real_model_and_exact_at_beta_one(case):
    lens = lens_of(case)[0]
    blocks, y = lens.capture.blocks, lens.capture.unembed.final[0, -1]
    maps = operator_maps(lens, POS, LAYERS)
    h = torch.stack([blocks[layer].resid_pre[0, POS] for layer in LAYERS])
    assert_close(times(maps, h), y.expand(2, -1), case.tol(), "its own prompt")
    # Another h: what the host itself gives with pattern, scale and ratio overwritten by hooks. A b
    # that were the remainder y − W h could not be right at both.
    frozen = FrozenModel(case.model(), tokens()[:1])
    other = h + randn_like(h) * h.norm(dim=-1, keepdim=True)
    for row, layer in enumerate(LAYERS):
        x = blocks[0].resid_pre.clone()
        change = torch.zeros_like(x)
        change[0, POS] = other[row] - h[row]
        inject = {} if layer == 0 else {f"blocks.{layer}.hook_resid_pre": change}
        with torch.no_grad():
            theirs, _ = frozen(x + change if layer == 0 else x, inject)
        assert_close(
            times(maps, other)[row], theirs[0, -1].to(y.dtype), case.tol() * 50, f"{layer}"
        )


@few
def test_the_jacobians_map_is_the_real_models_slope(case):
    model, lens = case.model(), lens_of(case)[0]
    before = [(p.requires_grad, p.grad, p.clone()) for p in model.parameters()]
    maps = jacobian_maps(lens, POS, LAYERS, model)
    h = torch.stack([lens.capture.blocks[layer].resid_pre[0, POS] for layer in LAYERS])
    assert_close(times(maps, h), lens.capture.unembed.final[0, -1].expand(2, -1), ORACLE)
    direction = randn_like(h[0])
    for row, layer in enumerate(LAYERS):
        step, tolerance = (1e-3, 1e-3) if case.float32_norms else (1e-5, 1e-6)
        ends = [final_of(model, layer, sign * step * direction) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert_close(maps.W[row] @ direction, slope, tolerance, f"layer {layer}")
    after = list(model.parameters())
    assert all(
        p.requires_grad == grad and p.grad is g
        for p, (grad, g, _) in zip(after, before, strict=True)
    )
    assert all(torch.equal(p, old) for p, (_, _, old) in zip(after, before, strict=True))


def final_of(model, layer, step):
    """The last final residual of the first prompt, with a step at POS before a block."""
    seen = []

    def add(t, hook):
        t = t.clone()
        t[:, POS] += step
        return t

    handle = model.unembed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad(), quiet():
            model.run_with_hooks(tokens()[:1], fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", add)])
    finally:
        handle.remove()
    return seen[-1][0, -1]


def test_both_maps_are_one_where_nothing_is_frozen():
    """Without norms, activations and scores that depend on the input the model is linear itself."""
    model = uniform_attention("attn-only-no-norm")
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(model, tokens()[:1])[1]
    ours, theirs = operator_maps(lens, POS, LAYERS), jacobian_maps(lens, POS, LAYERS, model)
    assert_close(ours.W, theirs.W, ORACLE)
    assert_close(ours.b, theirs.b, ORACLE)
    with torch.no_grad():
        far = final_of(model, 1, 10 * torch.ones_like(lens.embedding[0, 0]))
    h = lens.capture.blocks[1].resid_pre[0, POS]
    assert_close(ours.W[1] @ (h + 10) + ours.b[1], far, ORACLE)


# --- One template of the demo model --------------------------------------------------------------


def small(name="capital", n=12):
    relation = demo.relation(name)
    return replace(relation, samples=relation.samples[::4][:n])


@pytest.fixture(scope="module")
def model():
    with quiet():
        return demo.load_model()


@pytest.fixture(scope="module")
def statements(model):
    return state(model, small())


def test_statements_are_the_models_own_runs(model, statements):
    assert len(statements) == 12 and statements.accuracy == 1
    assert repr(statements) == "Statements('The capital of {} is', 12 subjects, right 100%)"
    for i, (country, capital) in enumerate(statements.relation.samples):
        assert statements.lenses[i].tokens[0][int(statements.pos[i])] == country
        assert model.tokenizer.decode([int(statements.first[i])]).strip() == capital
    logits = torch.stack([lens.logits[0, -1] for lens in statements.lenses])
    assert_close(statements.logits(statements.output), logits, 1e-5)


def test_beta_one_is_exact_on_every_training_prompt(statements):
    for i in range(len(statements)):
        found = times(statements.maps("operator", i), statements.hidden[i])
        assert_close(found, statements.output[i].expand_as(found), 2e-5)
        assert statements.maps("operator", i) is statements.maps("operator", i)


def test_layer_and_beta_by_leaving_one_out_the_slow_way(statements):
    train, betas = [3, 5, 8, 1], (0.25, 1.0, 3.0, 8.0)
    for method in ("operator", "jacobian"):
        maps = {i: statements.maps(method, i) for i in train}
        hits = {}
        for layer in statements.layers:
            for beta in betas:
                hits[layer, beta] = 0
                for i in train:
                    W = sum(maps[j].W[layer] for j in train if j != i) / 3
                    b = sum(maps[j].b[layer] for j in train if j != i) / 3
                    y = beta * W @ statements.hidden[i, layer] + b
                    hits[layer, beta] += int(statements.logits(y).argmax() == statements.first[i])
        best = max(hits.values())
        layer = min(layer for layer, beta in hits if hits[layer, beta] == best)
        tied = [beta for beta in betas if hits[layer, beta] == best]
        fitted = statements.fit(method, train, betas)
        assert (fitted.layer, fitted.beta) == (layer, tied[len(tied) // 2])
        assert_close(fitted.W, sum(maps[i].W[layer] for i in train) / 4, 1e-5)
        assert_close(fitted.b, sum(maps[i].b[layer] for i in train) / 4, 1e-5)
        assert fitted.subjects == tuple(statements.relation.subjects[i] for i in train)
    assert "before block" in repr(fitted)


def test_nothing_but_training_subjects_is_looked_at(statements):
    train, rest = [3, 5, 8], [0, 1, 2, 4, 6, 7, 9, 10, 11]
    blind = replace(
        statements,
        hidden=statements.hidden.index_fill(0, torch.tensor(rest), torch.nan),
        output=statements.output.index_fill(0, torch.tensor(rest), torch.nan),
        first=statements.first.index_fill(0, torch.tensor(rest), 0),
        lenses=tuple(statements.lenses[i if i in train else 3] for i in range(12)),
    )
    seen, unseen = (s.fit("operator", train, (0.5, 1.0, 2.0)) for s in (statements, blind))
    assert (seen.layer, seen.beta) == (unseen.layer, unseen.beta) and torch.equal(seen.W, unseen.W)
    (seen, rank), (unseen, other) = (s.fit_causal("operator", train) for s in (statements, blind))
    assert (seen.layer, rank) == (unseen.layer, other)


def test_decoding_is_one_product(statements):
    fitted = statements.fit("jacobian", [3, 5, 8, 1], (2.0,))
    test = [0, 2, 4, 6, 7]
    expected = []
    for i in test:
        y = 2 * fitted.W @ statements.hidden[i, fitted.layer] + fitted.b
        expected.append(int(statements.logits(y).argmax()))
    assert statements.decoded(fitted, test).tolist() == expected


def test_edits_run_the_real_model(statements):
    who, to = [0, 1, 2, 3], [4, 5, 6, 7]
    own = torch.stack([lens.logits[0, -1] for lens in statements.lenses])
    same = statements.rerun(who, 1, statements.hidden[who, 1])
    assert_close(same, own[who], 1e-5, "its own h")
    # Nothing but one token differs: with the other's embedding, the run is the other's.
    swapped = statements.substituted(0, list(zip(who, to, strict=True)))
    assert_close(swapped, own[to], 1e-5, "the other's h")
    fitted = statements.fit("operator", [3, 5, 8], layers=[1])
    pairs = list(zip(who, to, strict=True))
    edited = statements.causal(fitted, 16, pairs)
    step = fitted.step(statements.output[to] - statements.output[who], 16)
    for row, i in enumerate(who):
        hook = ("blocks.1.hook_resid_pre", lambda t, hook, i=i, row=row: put(t, i, row))

        def put(t, i, row):
            t = t.clone()
            t[0, int(statements.pos[i])] += step[row]
            return t

        with torch.no_grad(), quiet():
            ids = statements.lenses[i].capture.prompts.tokens
            logits = statements.model.run_with_hooks(ids, fwd_hooks=[hook])
        assert_close(edited[row], logits[0, -1], 1e-5)


def test_subjects_of_several_tokens_and_lengths(model):
    samples = (("Peru", "Lima"), ("the old Peru", "Lima"), ("Chile", "Santiago"))
    relation = Relation("capital", ("It is true : {} has its capital in", "{} is in"), samples)
    statements = state(model, relation)
    assert statements.pos.tolist() == [5, 7, 5]
    own = torch.stack([lens.logits[0, -1] for lens in statements.lenses])
    assert_close(
        statements.rerun([2, 1, 0], 2, statements.hidden[[2, 1, 0], 2]), own[[2, 1, 0]], 1e-5
    )
    assert state(model, relation, 1, layers=[1]).hidden.shape == (3, 1, 128)
    assert state(model, relation, "{}").pos.tolist() == [1, 3, 1]
    whole = model.to_tokens("Peru is in")[0]
    with pytest.raises(
        ValueError, match=r"'Chile' does not end with a token .* Put a space or a comma after"
    ):
        subject_position(model, "{} is in", "Chile", whole)


def test_steps_are_the_truncated_pseudo_inverse():
    W = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    relation = LinearRelation("operator", 0, 2.0, W, W[0], ("France",))
    change = randn_like(W[:2])
    assert_close(relation.step(change, 6) @ W.mT, change, ORACLE)
    U, S, Vh = torch.linalg.svd(W)
    low = (U[:, :2] * S[:2]) @ Vh[:2]
    assert_close(relation.step(change, 2), change @ torch.linalg.pinv(low).mT, ORACLE)
    assert_close(relation(change), 2 * change @ W.mT + W[0], ROUNDING)
    flat = replace(relation, W=low)  # singular: what is rounding is not inverted
    assert_close(flat.step(change, 6), flat.step(change, 2), ORACLE)
    with pytest.raises(ValueError, match=r"rank=0 is below 1"):
        relation.step(change, 0)


# --- Studies -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(model):
    relations = [small("capital", 11), small("continent", 11)]
    return decode(model, relations, (3, 5), splits=2, ranks=(8, 32))


@pytest.mark.algebra
def test_the_operator_needs_no_beta_and_the_jacobian_does(study):
    for n in (3, 5):
        ours = study.estimate("faithfulness", "operator, β = 1", n).value
        assert ours >= 0.9
        assert ours > study.estimate("faithfulness", "jacobian, β = 1", n).value
        assert ours > study.estimate("faithfulness", MEAN, n).value
        assert study.estimate("causality", "operator, β = 1", n).value >= 0.7
    assert all(row.ceiling == 1 for row in study.rows if row.edit_layer == 0)


@pytest.mark.algebra
def test_a_study_counts_what_it_says(study, model):
    assert len(study.rows) == 2 * 2 * 2 * 5 and study.accuracy == {"capital": 1.0, "continent": 1.0}
    assert study.sizes == (3, 5) and study.model == "tensorlens_tl demo"
    rows = study.select("jacobian, β tuned", 5, "capital")
    assert [row.split for row in rows] == [0, 1] and {row.n_test for row in rows} == {6}
    assert rows[0].template != rows[1].template and rows[0].train != rows[1].train
    assert study.select(MEAN, 3, "capital")[0].train == rows[0].train[:3]
    shares = [row.faithfulness for row in rows]
    assert (
        study.estimate("faithfulness", "jacobian, β tuned", 5, "capital").value == sum(shares) / 2
    )
    one, two = "operator, β = 1", "jacobian, β = 1"
    means = [study.estimate("faithfulness", v, 5).value for v in (one, two)]
    gap = study.difference("faithfulness", one, two, 5)
    assert abs(gap.value - (means[0] - means[1])) < ROUNDING and gap.low <= gap.value <= gap.high
    assert gap.n == 2  # of the splits: both relations of one count as one
    # One of its rows by the parts it is made of.
    statements = state(model, small("capital", 11))
    row = study.select(one, 3, "capital")[0]
    order = [
        statements.relation.subjects.index(s) for s in study.select(one, 5, "capital")[0].train
    ]
    test = [i for i in range(11) if i not in order]
    fitted = statements.fit("operator", order[:3])
    assert row.layer == fitted.layer
    decoded = statements.decoded(fitted, test)
    right = decoded == statements.first[test]
    assert row.faithfulness == float(right.double().mean())
    assert row.missed == tuple(
        statements.relation.subjects[i] for i, ok in zip(test, right, strict=True) if not ok
    )
    known = statements.first[order[:3]].tolist()
    assert row.echoes == sum(d in known for d in decoded[~right].tolist())
    mean = study.select(MEAN, 3, "capital")[0]  # it can but say what training subjects are of
    assert len(mean.missed) == round((1 - mean.faithfulness) * 6) and mean.echoes <= len(
        mean.missed
    )
    edit, rank = statements.fit_causal("operator", order[:3], (8, 32))
    assert (row.edit_layer, row.rank) == (edit.layer, rank)


@pytest.mark.algebra
def test_a_study_prints_and_keeps_itself(study, model):
    text = repr(study)
    assert text.startswith("RelationStudy(tensorlens_tl demo, capital, continent; 2 splits)")
    assert "operator, β tuned" in text and "n = 5" in text
    assert RelationStudy.from_json(study.to_json()) == study
    relations = [small("capital", 11)]
    again = decode(model, relations, (3, 5), splits=1, ranks=(8, 32))
    assert list(again.rows) == [r for r in study.rows if r.relation == "capital" and r.split == 0]
    for wrong in ("{}", "[]", "no", json.dumps(json.loads(study.to_json()) | {"format": "x"})):
        with pytest.raises(ValueError, match="not a study of the format"):
            RelationStudy.from_json(wrong)
    with pytest.raises(
        ValueError, match=r"No rows are of 'rollout'.*Choose one of .*operator, β = 1 \(n = 3\)"
    ):
        study.select("rollout", 3)


def test_a_model_written_to_since_is_refused():
    with quiet():
        model = demo.load_model()
    statements = state(model, small(n=3))
    with torch.no_grad():
        next(p for p in model.unembed.parameters() if p.ndim == 2).mul_(2)
    for ask in (
        lambda: statements.rerun([0], 1, statements.hidden[:1, 1]),
        lambda: statements.fit("operator", [0, 1]),
    ):
        with pytest.raises(
            ValueError, match="The model's weights were written to after the capture"
        ):
            ask()


@pytest.mark.wrong_types
def test_hooks_and_state_are_left_as_they_were(model, statements):
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    with pytest.raises(RuntimeError):
        statements.rerun([0], 1, statements.hidden[0:1, 1, :5])
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    assert not model.unembed._forward_pre_hooks and not model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_train": (1,)}, "does not fit capital, .* Pass numbers from 2 to 10"),
        ({"n_train": (3, 11)}, "12 subjects, of which at least two must be left to test"),
        ({"splits": 0}, "0 splits, .* Pass at least one of each"),
        ({"n_train": ()}, "0 numbers of training subjects"),
        ({"betas": ()}, "0 β"),
        ({"layers": (9,)}, r"layers=\(9,\) is not a list of blocks. Pass indices from 0 to 3"),
        ({"ranks": (0, 300)}, "0 ranks from 1 to d_model"),
    ],
)
def test_what_no_study_can_be_made_of_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        decode(model, [small()], **{"n_train": (3,), "splits": 1} | arguments)


@pytest.mark.wrong_types
def test_what_is_no_list_of_subjects_or_relations_is_refused(model, statements):
    linear = statements.fit("operator", [0, 1])
    for wrong, shown in (([0, -1], "-1"), ([0, 99], "99"), (["France", "Peru"], "'France'")):
        with pytest.raises(
            ValueError, match=rf"{shown} is not the index of a subject. Pass indices from 0"
        ):
            statements.fit("operator", wrong)
        with pytest.raises(
            ValueError, match=rf"{shown} is not the index of a subject. Pass indices from 0"
        ):
            statements.decoded(linear, wrong)
    with pytest.raises(ValueError, match="at least two different training subjects"):
        statements.fit("operator", 1)
    for arguments in ((small(),), ([small()], 3)):
        with pytest.raises(ValueError, match=r"must be lists. Put a single one"):
            decode(model, *arguments)
    with pytest.raises(ValueError, match=r"is a str, not a Relation. .* Relation\.load"):
        state(model, "The capital of {} is")
    with pytest.raises(ValueError, match=r"layers=2 is not a list of blocks"):
        state(model, small(), layers=2)


def test_relations_that_cannot_be_told_apart_are_refused(model, statements):
    with pytest.raises(ValueError, match="have the same name"):
        decode(model, [small(), small()], (3,))
    one = Relation(
        "one", ("{} is in",), tuple((s, "Europe") for s in ("France", "Italy", "Spain", "Greece"))
    )
    with pytest.raises(ValueError, match="too few to give training and test subjects two each"):
        decode(model, [one], (2,), splits=1)
    for train in ([1], [1, 1]):
        with pytest.raises(ValueError, match="at least two different training subjects"):
            statements.fit("operator", train)
    with pytest.raises(ValueError, match="training subjects and one β"):
        statements.fit("operator", [1, 2], ())
    with pytest.raises(ValueError, match=r"no method 'rollout'. Choose one of operator, jacobian"):
        statements.fit("rollout", [1, 2])
    with pytest.raises(
        ValueError, match=r"layers=\[7\] were not all read. Choose some of \[0, 1, 2, 3\]"
    ):
        statements.fit("operator", [1, 2], layers=[7])
    with pytest.raises(ValueError, match=r"template=8 does not exist. Pass an index from 0 to 7"):
        state(model, small(), 8)
    with pytest.raises(ValueError, match=r"a template with one \{\}"):
        state(model, small(), "The capital")
    with pytest.raises(ValueError, match="no relation 'mayor'"):
        demo.relation("mayor")


# --- Files ---------------------------------------------------------------------------------------

GOOD = {
    "name": "capital",
    "prompt_templates": ["The capital of {} is"],
    "properties": {"relation_type": "factual"},
    "samples": [
        {"subject": "France", "object": "Paris"},
        {"subject": "Peru", "object": "Lima"},
        {"subject": "Peru", "object": "lima"},
    ],
}


def test_files_are_read(tmp_path):
    path = tmp_path / "relation.json"
    path.write_text(json.dumps(GOOD))
    relation = Relation.load(path)
    assert relation.samples == (("France", "Paris"), ("Peru", "Lima"))
    assert repr(relation) == "Relation(capital, 2 subjects, 1 templates)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "a string as name, but has 3"),
        ({"prompt_templates": "The {}"}, "prompt_templates as a list of strings"),
        ({"prompt_templates": []}, "at least one template"),
        ({"prompt_templates": ["The capital"]}, "one {} for the subject"),
        ({"prompt_templates": ["{} and {}"]}, "one {} for the subject"),
        ({"samples": None}, "samples as a list of objects"),
        ({"samples": [["France", "Paris"]]}, "samples as a list of objects"),
        ({"samples": [{"subject": "France"}]}, "Sample 0 of .* must have a subject and an object"),
        ({"samples": GOOD["samples"][:1]}, "two different subjects"),
        ({"samples": [{"subject": "", "object": "x"}, *GOOD["samples"]]}, "not empty"),
    ],
)
def test_files_of_another_shape_are_refused(tmp_path, change, message):
    path = tmp_path / "relation.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=message) as error:
        Relation.load(path)
    assert "Give a name, prompt_templates such as" in str(error.value)


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "relation.json"
    for text in ("{", "[]", "\ud83d".encode("utf-16", "surrogatepass")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match="relation"):
            Relation.load(path)
    with pytest.raises(ValueError, match=r"no JSON file with a relation at .*nowhere"):
        Relation.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="every subject once, but has France more than once"):
        Relation("twice", ("{}",), (("France", "a"), ("France", "b"), ("Peru", "c")))


@pytest.mark.skipif(not FILES.is_dir(), reason="needs the shared relations")
def test_published_relations_are_read():
    found = [Relation.load(path) for path in sorted(FILES.glob("*.json"))]
    assert len(found) == 32 and all(len(relation.samples) > 4 for relation in found)


# --- Intervals -----------------------------------------------------------------------------------


def test_bootstrap_intervals():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bootstrap(values.tolist())
    sem = float(values.std() / 20)
    assert abs(found.value - float(values.mean())) < ROUNDING and found.n == 400
    assert abs(found.high - found.value - 1.96 * sem) < 0.2 * sem
    assert abs(found.value - found.low - 1.96 * sem) < 0.2 * sem
    assert bootstrap(values.tolist()) == found != bootstrap(values.tolist(), seed=1)
    infinite = bootstrap([1.0, 2.0, torch.inf], median)
    assert infinite.value == 2 and infinite.high == torch.inf and infinite.low == 1
    one = bootstrap([0.5])  # one value says nothing of its spread
    assert str(one) == "0.5 (n = 1)" and str((one.low, one.high)) == "(nan, nan)"
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap([])
