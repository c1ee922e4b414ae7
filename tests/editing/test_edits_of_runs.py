"""Edits: covectors against the frozen real model, closed forms, and what the real model does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from comparisons import assert_close
from models import (
    HOOKED,
    PER_SHAPE,
    TOLERANCES,
    bridge_offered,
    build_bridge,
    build_hooked,
    find,
    lens_of,
    quiet,
    randn_like,
    tokens,
)
from oracles import FrozenModel, attends_apart

import tensorlens_tl
from tensorlens_tl import demo, editing
from tensorlens_tl.editing.places import Place
from tensorlens_tl.editing.smallest import EditCost, smallest, smallest_above
from tensorlens_tl.support.tiny_models import _ROWS

PLACES = (
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_z",
    "blocks.1.attn.hook_v",
    "blocks.0.mlp.hook_post",
)
FACT = "The capital of France is"
every_shape = pytest.mark.parametrize("case", PER_SHAPE, ids=str)


class Nudged(FrozenModel):
    """The frozen real model with numbers added at one hook point; what is asked for is live."""

    def __init__(self, model, ids, place, live=False, gates=False):
        super().__init__(model, ids)
        self.place, self.live, self.gates = place, live, gates
        self.nudge = torch.zeros_like(self.cache[place]).requires_grad_()

    def _gate_hooks(self, mlp):
        return [] if self.gates else super()._gate_hooks(mlp)

    def _hooks(self):
        live = ("hook_pattern", "q.hook_out", "k.hook_out") if self.live else ("nothing",)
        held = [(n, f) for n, f in super()._hooks() if not n.endswith(live)]
        if self.live:  # the scales of queries' and keys' norms stay held
            scales = [
                n for n in self.cache if n.endswith(("q_norm.hook_scale", "k_norm.hook_scale"))
            ]
            held += [(n, lambda t, hook, n=n: self.cache[n].clone()) for n in scales]
        return [*held, (self.place, lambda t, hook: t + self.nudge)]


@every_shape
@pytest.mark.parametrize("place", PLACES)
def test_covectors_are_gradients_of_the_frozen_model(case, place):
    model, lens = case.model(), lens_of(case)
    if place not in model.hook_dict or (place.endswith("hook_v") and attends_apart(model)):
        pytest.skip("the model has no such hook point")
    frozen = Nudged(model, tokens(), place)
    u = randn_like(lens.embedding[0, 0], 3)
    y, _ = frozen(lens.embedding)
    (expected,) = torch.autograd.grad((y[:, -1] * u).sum(), frozen.nudge)
    found = lens.covector(u, site=place)
    assert_close(found, expected.flatten(2), case.within("oracle"))
    delta = randn_like(found, 4)
    predicted = lens.effect(delta, u, site=place)
    assert_close(predicted, (delta * expected.flatten(2)).sum((1, 2)), case.within("oracle"))
    many = lens.effect(torch.stack([delta, 2 * delta]), u, site=place)
    assert_close(many, torch.stack([predicted, 2 * predicted]), 1e-12)


@every_shape
def test_with_queries_and_keys_the_scores_move_to_first_order(case):
    model, lens, place = case.model(), lens_of(case), PLACES[0]
    if attends_apart(model):
        pytest.skip("Hugging Face's own attention shows no pattern that can be live")
    frozen = Nudged(model, tokens(), place, live=True)
    u = randn_like(lens.embedding[0, 0], 3)
    y, _ = frozen(lens.embedding)
    (expected,) = torch.autograd.grad((y[:, -1] * u).sum(), frozen.nudge)
    assert_close(lens.covector(u, site=place, qk=True), expected, case.within("oracle"))
    assert not torch.allclose(lens.covector(u, site=place), expected, rtol=1e-3)


@every_shape
def test_with_gates_the_ratios_move_to_first_order(case):
    model, lens, place = case.model(), lens_of(case), PLACES[0]
    u = randn_like(lens.embedding[0, 0], 3)
    if "solu" in str(case):
        with pytest.raises(ValueError, match=r"SoLU's ratios depend on all neurons"):
            lens.covector(u, site=place, gates=True)
        return
    for qk in (False, True)[: 1 if attends_apart(model) else 2]:
        frozen = Nudged(model, tokens(), place, live=qk, gates=True)
        y, _ = frozen(lens.embedding)
        (expected,) = torch.autograd.grad((y[:, -1] * u).sum(), frozen.nudge)
        assert_close(
            lens.covector(u, site=place, qk=qk, gates=True), expected, case.within("oracle")
        )


def test_heads_and_neurons_are_parts_of_their_sublayers():
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT)
    whole = lens.covector("Paris", site="blocks.1.attn.hook_z")
    parts = [lens.covector("Paris", site=f"L1H{h}") for h in range(model.cfg.n_heads)]
    assert_close(torch.stack(parts).sum(0), whole, 1e-6)
    neurons = lens.covector("Paris", site="blocks.2.mlp.hook_post")
    one = lens.covector("Paris", site="L2N7")
    assert torch.equal(one[..., 7], neurons[..., 7]) and int((one != 0).any(1).sum()) == 1
    z = torch.zeros(model.cfg.d_head)
    z[0] = 1.0
    effect = lens.effect(z, "Paris", site="L1H1")
    assert_close(effect, whole[:, -1, model.cfg.d_head], 1e-6)


EXPERTS = ["bridge", "hooked"][: 2 if find("transformer_lens", "HookedTransformer") else 1]


def mixture(kind):
    if kind == "hooked":
        config = {"n_key_value_heads": 2, "num_experts": 4, "experts_per_token": 2}
        return build_hooked({**HOOKED["llama"], **config}, torch.float64).double()
    if not bridge_offered("mixtral"):
        pytest.skip("the host has no Bridge of Mixtral")
    return build_bridge(*_ROWS["mixtral"], torch.float64)


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_expert_is_a_place(kind):
    with quiet(), torch.no_grad():
        model = mixture(kind)
        _, lens = tensorlens_tl.capture(model, tokens())
        _, cache = model.run_with_cache(tokens(), return_cache_object=False)
    within = TOLERANCES["oracle"][kind == "bridge"]  # that one computes norms in float32
    places = [f"L0E{e}" for e in range(4)]
    states = [Place.of(lens.operator, p).state(lens.operator, lens.capture) for p in places]
    assert_close(torch.stack(states).sum(0), cache["blocks.0.hook_mlp_out"], within)
    ranked = lens.rank_edits(3, by="expert")
    assert ranked.labels[:4] == tuple(places)
    after = lens.covector(3, site=0)
    for i, (place, state) in enumerate(zip(places, states, strict=True)):
        assert_close(lens.effect(-state, 3, site=place), ranked.values[:, i], within)
        g, reached = lens.covector(3, site=place), state.abs().sum(-1) > 0
        assert torch.equal(g, after * reached[..., None])
    place = next(p for p, s in zip(places, states, strict=True) if bool(s.flatten(1).any(1).all()))
    with quiet():
        edit = lens.edit(3, versus=5, by=0.2, site=place, positions=None)
        with model.hooks(fwd_hooks=edit.hooks()):
            logits = model(tokens())[:, -1]
        check = edit.check(model)
    was = lens.capture.logits[:, -1]
    assert_close(check.real, (logits - was)[:, 3] - (logits - was)[:, 5], 1e-5)
    assert edit.refine(model, 4).check(model).error < check.error / 10
    with pytest.raises(ValueError, match=r"does not exist\. Use a number from 0 to 3"):
        lens.covector(3, site="L0E4")
    with pytest.raises(ValueError, match=r"or an expert such as 'L1E0'"):
        lens.covector(3, site="L1MLP")
    with pytest.raises(ValueError, match=r"would route them anew\. Drop gates="):
        lens.covector(3, site=0, gates=True)


# --- Closed forms --------------------------------------------------------------------------------


def metric(d, kind):
    A = torch.randn(2 * d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    real = torch.ones(1, 2 * d, dtype=torch.bool)
    given = {"identity": "identity", "diagonal": A.square().mean(0), "full": A.mT @ A / len(A)}
    return EditCost(given[kind], A[None], real), given[kind]


@pytest.mark.parametrize("kind", ["identity", "diagonal", "full"])
def test_the_smallest_edit_does_what_is_asked_and_none_is_smaller(kind):
    d, cost_of = 6, {"identity": lambda M: torch.eye(6).double(), "diagonal": torch.diag}
    cost, given = metric(d, kind)
    M = cost_of.get(kind, lambda M: M)(given)
    rows = randn_like(torch.zeros(2, 3, 4, d, dtype=torch.float64), 2)
    asked = randn_like(torch.zeros(2, 3, dtype=torch.float64), 3)
    found = smallest(rows, asked, cost)
    assert_close(torch.einsum("bkpd,bpd->bk", rows, found), asked, 1e-12)
    # Any other solution differs by a vector that no row sees, and is longer.
    flat = rows.flatten(2)
    step = randn_like(found, 4).flatten(1)
    step = step - (torch.linalg.pinv(flat) @ flat @ step[..., None])[..., 0]
    assert float((flat @ step[..., None]).abs().max()) < 1e-10

    def size(x):
        return torch.einsum("bpd,de,bpe->b", x, M, x)

    for factor in (-0.1, 0.1):
        assert bool((size(found + factor * step.view_as(found)) > size(found) - 1e-9).all())


def test_two_inequalities_against_a_grid():
    for seed in range(5):
        rows = randn_like(torch.zeros(2, 1, 2, dtype=torch.float64), seed)
        rows[1, 0] = rows[1, 0].flip(0) if seed % 2 else rows[1, 0]
        if abs(float(torch.cosine_similarity(rows[0], rows[1]))) > 0.9:
            rows[1, 0] = torch.tensor([-rows[0, 0, 1], rows[0, 0, 0]])
        asked = randn_like(torch.zeros(2, dtype=torch.float64), seed + 50)
        cost, _ = metric(2, "identity")
        found = smallest_above(rows, asked, cost)[0]
        axis = torch.linspace(-4, 4, 801, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        allowed = ((grid @ rows[:, 0].mT) >= asked).all(1)
        best = grid[allowed].norm(dim=1).min()
        assert bool((rows[:, 0] @ found >= asked - 1e-9).all())
        assert float(found.abs().max()) < 3.9  # within the grid
        assert float(found.norm()) <= float(best) <= float(found.norm()) + 0.05


def test_what_is_kept_does_not_move_in_the_frozen_model():
    _, lens = demo.load_model().run_with_tensorlens(FACT, dtype=torch.float64)
    probe = randn_like(lens.embedding[0, 0], 1)
    keep = ["Madrid", {"target": "Berlin", "versus": "Rome"}, {"direction": probe}]
    edit = lens.edit("Paris", versus="Rome", by=-3.0, site=1, keep=keep)
    assert_close(edit.predicted, torch.tensor([-3.0]).double(), 1e-9)
    for target, versus in (("Madrid", None), ("Berlin", "Rome")):
        assert abs(float(lens.effect(edit.delta, target, versus, site=1))) < 1e-9
    assert float((edit.delta @ probe).abs().max()) < 1e-9
    assert float(lens.edit("Paris", versus="Rome", by=-3.0, site=1).norm) < float(edit.norm)
    with pytest.raises(ValueError, match=r"what is kept moves with it"):
        lens.edit("Paris", by=-3.0, site=1, keep=["Paris"])


def test_one_vector_for_many_prompts():
    model = demo.load_model()
    prompts = [FACT, "The main city of France is", "The capital city of France is called"]
    _, lens = model.run_with_tensorlens(prompts, dtype=torch.float64)
    probe = randn_like(lens.embedding[0, 0], 1)
    keep = [{"target": "Madrid", "versus": "Berlin"}, {"direction": probe}]
    edit = lens.edit("Paris", versus="Rome", by=-14.0, site=1, keep=keep, shared=True)
    assert edit.vector is not None and int(edit.edited.sum()) == 3
    assert float(edit.predicted.max()) == pytest.approx(-14.0, abs=1e-9)  # at least that
    kept = lens.effect(edit.vector, "Madrid", versus="Berlin", site=1)
    assert float(kept.abs().max()) < 1e-9 and abs(float(edit.vector @ probe)) < 1e-9
    # The smallest: a sum of what it must change, with multipliers of one sign that are 0 where the
    # change is larger than asked, and of what it must keep (Karush, Kuhn and Tucker).
    rows = [
        lens.covector(a, versus=b, site=1) for a, b in (("Paris", "Rome"), ("Madrid", "Berlin"))
    ]
    spans = torch.stack(
        [r[i, p] for r in rows for i, p in edit.edited.nonzero().tolist()] + [probe]
    )
    fit = torch.linalg.lstsq(spans.mT, edit.vector[:, None]).solution
    assert_close(spans.mT @ fit, edit.vector[:, None], 1e-9)
    slack, loads = edit.predicted + 14.0, fit[:3, 0]
    assert bool((loads <= 1e-9).all()) and float((slack * loads).abs().max()) < 1e-9
    refined = edit.refine(model, rounds=3)
    assert refined.vector is not None
    asked = edit.predicted
    assert bool((refined.check(model).real < 0.99 * asked).all())
    assert bool((edit.check(model).real > 0.95 * asked).all())
    one = lens.edit("Paris", versus="Rome", by=[-14.0, 0.0, -2.0], site=1)
    assert_close(one.predicted, torch.tensor([-14.0, 0.0, -2.0]).double(), 1e-9)
    with pytest.raises(ValueError, match=r"by= has 2 entries for 3 prompts"):
        lens.edit("Paris", by=[1.0, 2.0], site=1)
    assert lens.edit("Paris", versus="Rome", by=-14.0, site=1).vector is None
    with pytest.raises(ValueError, match=r"different numbers of edited positions"):
        lens.edit("Paris", by=-1.0, site=1, positions=None, keep=[{"direction": probe}])
    _, many = model.run_with_tensorlens([FACT, FACT])
    with pytest.raises(ValueError, match=r"No edit here changes the target as asked"):
        many.edit("Paris", to=0.0, site=1, keep=["Paris"], shared=True)


# --- In the real model ---------------------------------------------------------------------------


@every_shape
def test_a_refined_edit_gives_what_was_asked(case):
    """The prediction is not exact in the real model; corrected by its runs, the edit is."""
    model, lens = case.model(), lens_of(case)
    if attends_apart(model) or "blocks.0.hook_resid_post" not in model.hook_dict:
        pytest.skip("the host has no such hook point")
    with quiet():
        edit = lens.edit(3, versus=5, by=0.3, site=0)
        refined = edit.refine(model, rounds=4)
        first, then = edit.check(model), refined.check(model)
    assert_close(edit.predicted, torch.full_like(edit.predicted, 0.3), 1e-9)
    assert then.error < first.error / 10


def test_check_is_what_hooks_do():
    model = demo.load_model()
    prompts = [FACT, "The capital of Italy is"]
    logits, lens = model.run_with_tensorlens(prompts)
    edit = lens.edit(["Paris", "Rome"], versus=["Rome", "Paris"], by=-18.0, site=2)
    before = [len(point.fwd_hooks) for point in model.hook_dict.values()]
    check = edit.check(model, jacobian=True)
    assert [len(point.fwd_hooks) for point in model.hook_dict.values()] == before
    with model.hooks(fwd_hooks=edit.hooks()):
        edited = model(prompts)
    a, b = edit.goal.targets

    def value(z):
        return torch.stack([z[0, -1, a] - z[0, -1, b], z[1, -1, b] - z[1, -1, a]])

    assert_close(check.real, value(edited) - value(logits), 1e-4)
    assert check.tops == (("Paris", "Rome"), ("Rome", "Paris"))
    x = edit.place.state(lens.operator, lens.capture).detach()
    step = 1e-2 * edit
    with model.hooks(fwd_hooks=step.hooks()):
        slope = (value(model(prompts)) - value(logits)) / 1e-2
    assert_close(check.jacobian, slope, 2e-2)
    assert_close(edit.size, edit.norm / x[:, -1].norm(dim=-1), 1e-5)
    assert "predicted" in repr(check) and "2 prompts" in repr(edit)
    table = check.to_dataframe()
    assert list(table["top_after"]) == ["Rome", "Paris"]


def test_padded_prompts_are_edited_as_single_ones():
    model = demo.load_model()
    prompts = [FACT, "Mary and John went to the store, and Mary gave a book to"]
    _, both = model.run_with_tensorlens(prompts)
    edits = both.edit(by=-2.0, site=1)
    check = edits.check(model)
    for i, prompt in enumerate(prompts):
        _, lens = model.run_with_tensorlens(prompt)
        alone = lens.edit(by=-2.0, site=1).check(model)
        assert_close(check.real[i : i + 1], alone.real, 1e-3)
        assert check.tops[i] == alone.tops[0]


def test_a_kl_divergence_elsewhere_is_of_later_positions():
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT)
    assert float(lens.edit("Paris", by=-2.0, site=1).check(model).kl) < 1e-6
    early = lens.edit("Paris", by=-2.0, site=1, positions=3).check(model)
    edit = lens.edit("Paris", by=-2.0, site=1, positions=3)
    with torch.no_grad(), model.hooks(fwd_hooks=edit.hooks()):
        edited = model(FACT)
    with torch.no_grad():
        logits = model(FACT)
    p, q = logits[0].double().log_softmax(-1), edited[0].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[:-1].mean()
    assert_close(early.kl, kl[None], 1e-3)
    assert float(kl) > 1e-6


def test_a_kl_divergence_on_held_out_prompts():
    model = demo.load_model()
    _, lens = model.run_with_tensorlens([FACT, "The main city of Italy is"])
    edit = lens.edit("Paris", versus="Rome", by=-8.0, site=1, positions=-2)
    assert bool(edit.check(model).kl_held_out.isnan().all())
    held = ["People in Spain speak", "The language of Spain is"]
    check = edit.check(model, held_out=held)
    expected = torch.zeros(2)
    for i, row in enumerate(edit.delta[edit.edited]):
        for prompt in held:

            def add(t, hook, row=row):
                t = t.clone()
                t[:, -2] += row
                return t

            with torch.no_grad():
                p = model(prompt)[0, -2:].double().log_softmax(-1)
                hooks = [("blocks.1.hook_resid_post", add)]
                q = model.run_with_hooks(prompt, fwd_hooks=hooks)[0, -2:].double().log_softmax(-1)
            expected[i] += float((p.exp() * (p - q)).sum(-1).mean()) / 2
    assert_close(check.kl_held_out, expected, 1e-4)
    assert float(expected.min()) > 1e-3 and "kl_held_out" in check.to_dataframe()
    with pytest.raises(ValueError, match=r"held_out= has a prompt of 2 tokens"):
        lens.edit(by=-1.0, site=1, positions=-4).check(model, held_out=["Paris"])


def test_what_edits_cost_in_runs(monkeypatch):
    """Predictions cost no run at all; a check costs one, each round of refine one."""
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT)
    runs, sweeps, own = [], [], type(lens.operator).pull
    pull = lambda self, *a, **k: sweeps.append(1) or own(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(type(lens.operator), "pull", pull)
    point = model.hook_dict["blocks.0.hook_resid_pre"]
    point.add_hook(lambda t, hook: runs.append(1), is_permanent=True)
    try:
        edit = lens.edit("Paris", versus="Rome", by=-3.0, site=1)
        assert (len(runs), len(sweeps)) == (0, 1)
        edit.check(model)
        assert len(runs) == 1
        edit.refine(model, rounds=2)
        assert len(runs) == 3
    finally:
        model.reset_hooks(including_permanent=True)


def test_hooks_are_off_after_an_error():
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT)
    edit = lens.edit("Paris", versus="Rome", by=-3.0, site=1)
    plain = model(FACT)
    broken = replace(edit, delta=edit.delta[..., :5])
    for call in (broken.check, broken.refine, broken.radius):
        with pytest.raises(RuntimeError):
            call(model)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert torch.equal(model(FACT), plain)


def test_an_edit_holds_while_text_is_generated():
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT)
    edit = lens.edit("Paris", versus="Rome", by=-14.0, site=1)
    texts = []
    for cached in (True, False):
        with model.hooks(fwd_hooks=edit.hooks()), quiet():
            texts.append(
                model.generate(
                    FACT, max_new_tokens=3, do_sample=False, use_past_kv_cache=cached, verbose=False
                )
            )
    assert texts[0] == texts[1] and "Rome" in texts[0]
    with pytest.raises(ValueError, match=r"The run has 2 prompts, and the edit is of 3"):
        _, three = model.run_with_tensorlens([FACT] * 3)
        with model.hooks(fwd_hooks=three.edit(by=-1.0, site=1).hooks()):
            model([FACT] * 2)


def test_a_token_becomes_the_likeliest_one():
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT, dtype=torch.float64)
    edit = lens.edit_to_top("Rome", site=2, margin=1.0)
    y = (
        lens.capture.unembed.final
        + lens.between("blocks.2.hook_resid_post", "unembed.hook_in") @ edit.delta
    )
    z = lens.readout(y)[0, -1]
    rome = edit.goal.targets[0]
    others = torch.cat([z[:rome], z[rome + 1 :]])
    assert abs(float(z[rome] - others.max()) - 1.0) < 1e-6
    assert edit.refine(model).check(model).tops == (("Paris", "Rome"),)
    assert lens.edit_to_top("Paris", site=2).norm == 0  # it is the likeliest already
    with pytest.raises(ValueError, match=r"inside a sublayer"):
        lens.edit_to_top("Rome", site="L1H0")


def test_edits_add_up_and_shrink():
    _, lens = demo.load_model().run_with_tensorlens(FACT)
    a = lens.edit("Paris", by=-2.0, site=1)
    b = lens.edit("Paris", by=-1.0, site=1, positions=3)
    both = a + 2 * b
    assert_close(both.predicted, torch.tensor([-4.0]), 1e-5)
    assert_close((both - a).delta, (b * 2.0).delta, 1e-5)
    assert_close((-a).predicted, -a.predicted, 1e-6)
    for other in (lens.edit("Rome", by=-1.0, site=1), lens.edit("Paris", by=-1.0, site=2)):
        with pytest.raises(ValueError, match=r"two places, targets or runs"):
            _ = a + other


def test_how_far_a_prediction_holds():
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT)
    edit = lens.edit("Paris", versus="Rome", by=-10.0, site=2)
    wide, narrow = edit.radius(model, 0.5), edit.radius(model, 0.1)
    assert float(narrow) <= float(wide) and float(wide) > 0
    scaled = edit * (float(wide) / float(edit.size))
    check = scaled.check(model)
    assert float((check.predicted - check.real).abs() / check.real.abs()) <= 0.5 + 1e-6


def test_a_weight_edit_adds_the_vector_and_is_taken_back():
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT)
    edit = lens.edit("Paris", versus="Rome", by=-14.0, site=1)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = lens.capture.blocks[1]
    k = state.mlp.hidden_in_run(state.ln2.apply(state.resid_mid) + state.ln2.bias)[0]
    moments = k.mT @ k / len(k)
    seen = {}

    def see(name):
        return lambda tensor, hook: seen.__setitem__(name, tensor.detach().clone())

    for covariance in (None, moments, moments.diagonal()):
        with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", see("plain"))]):
            model(FACT)
        edited = model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", see("edited"))])
        with editing.to_weights(edit, model, 1, covariance), edited:
            logits = model(FACT)
        added = (seen["edited"] - seen["plain"])[0, -1]
        assert_close(added, edit.delta[0, -1], 1e-4)
    assert model.tokenizer.decode([int(logits[0, -1].argmax())]) == "Rome"
    with pytest.raises(RuntimeError, match="inside"), editing.to_weights(edit, model, 1):
        raise RuntimeError("inside")
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters())
    with (
        pytest.raises(ValueError, match=r"leaves another residual"),
        editing.to_weights(edit, model, 2),
    ):
        pass
    many = lens.edit("Paris", by=-1.0, site=1, positions=None)
    with (
        pytest.raises(ValueError, match=r"one prompt and one position"),
        editing.to_weights(many, model, 1),
    ):
        pass


def test_rankings_are_effects():
    _, lens = demo.load_model().run_with_tensorlens(FACT, dtype=torch.float64)
    heads = lens.rank_edits("Paris", by="head")
    z = lens.capture.blocks[1].attn.hidden_in_run(
        lens.capture.blocks[1].ln1.apply(lens.capture.blocks[1].resid_pre)
        + lens.capture.blocks[1].ln1.bias
    )
    for h in (0, 3):
        one = torch.zeros_like(z)
        part = slice(32 * h, 32 * h + 32)
        one[..., part] = -z[..., part]
        effect = lens.effect(one, "Paris", site="blocks.1.attn.hook_z")
        assert_close(heads.values[:, heads.labels.index(f"L1H{h}")], effect, 1e-9)
    sites = lens.rank_edits("Paris", by="site", budget=0.2)
    label, value = sites.top(1)[0]
    site, pos = label.split("@")
    x = lens.operator.states()[site][0, int(pos)]
    g = lens.covector("Paris", site=site)[0, int(pos)]
    best = 0.2 * x.norm() * g / g.norm()
    found = lens.effect(best, "Paris", site=site, positions=int(pos))
    assert_close(found, torch.tensor([value], dtype=torch.float64), 1e-9)
    neurons = lens.rank_edits("Paris", by="neuron")
    assert neurons.values.shape[1] == sum(block.mlp.output.in_dim for block in lens.capture.blocks)
    assert "more: .top(k)" in repr(neurons) and len(neurons.to_dataframe()) == len(neurons.labels)


def test_edits_in_files(tmp_path):
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT)
    w = randn_like(lens.embedding[0, 0], 2)
    for edit in (
        lens.edit("Paris", versus="Rome", by=-9.0, site="L1H0"),
        lens.edit(w, to=1, site=1),
    ):
        path = tmp_path / "edit.safetensors"
        editing.save_edit(edit, path)
        again = editing.load_edit(path, lens)
        for name in ("delta", "before", "predicted", "size"):
            assert torch.equal(getattr(again, name), getattr(edit, name))
        assert_close(again.check(model).real, edit.check(model).real, 1e-6)
        bare = editing.load_edit(path)
        assert bare.hooks()[0][0] == edit.place.hook
        with pytest.raises(ValueError, match=r"knows no run"):
            bare.check(model)
    _, other = model.run_with_tensorlens("Paris is in France")
    with pytest.raises(ValueError, match=r"other lengths"):
        editing.load_edit(path, other)
    data = path.read_bytes()
    for wrong in (data[:50], b"", data.replace(b'"delta"', b'"delto"')):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"is no edit, or is damaged"):
            editing.load_edit(path)


def test_studies_count_what_single_edits_do():
    model, cases = demo.load_model(), demo.prompts("facts", 3, seed=3)
    found = editing.evaluate(model, cases, sites=(2,), to=-1.0)
    assert found.n == 3 and found.methods == editing.study.EDIT_METHODS
    _, lens = model.run_with_tensorlens(cases[0].clean)
    plain = lens.attribute(cases[0].answer, versus=cases[0].foil).target_value
    edit = lens.edit(cases[0].answer, versus=cases[0].foil, to=-float(plain), site=2)
    check = edit.check(model)
    expected = float(check.real / edit.predicted)
    assert found.values["operator", "delivered"][0] == pytest.approx(expected, rel=1e-3)
    assert found.values["operator", "norm"] == pytest.approx(
        found.values["random", "norm"], rel=1e-4
    )
    assert found.median_miss("refined") < found.median_miss("operator") < 0.5
    assert found.median_miss("random") > 0.7
    assert len(found.to_dataframe()) == 3 * 6 * 5
    named = ("operator_qk_gates", "refined_qk_gates")
    moved = editing.evaluate(model, cases, named, (2,), -1.0, held_out=["People in Spain speak"])
    assert moved.median_miss(named[1]) < moved.median_miss(named[0])
    again = lens.edit(
        cases[0].answer, versus=cases[0].foil, to=-float(plain), site=2, qk=True, gates=True
    ).refine(model)
    assert moved.values[named[1], "norm"][0] == pytest.approx(float(again.norm), rel=1e-3)
    assert min(moved.values[named[0], "kl_held_out"]) > 0
    methods = ("operator", "operator_qk", "operator_qk_gates", "jacobian")
    predictions = editing.predict(model, cases[:2], 1, methods)
    assert -1 <= predictions.spearman("operator_qk_gates") <= 1
    assert predictions.error("operator") < 0.3 and predictions.pearson("operator") > 0.9


@torch.no_grad()
def test_what_the_operator_misses_of_agreement_is_what_attention_moves():
    model, site = demo.load_model(), "blocks.2.hook_resid_pre"
    predicted, live, held = [], [], []
    for case in demo.prompts("agreement", 8):
        _, lens = model.run_with_tensorlens(case.clean)
        logits, cache = model.run_with_cache(case.clean)
        _, twin = model.run_with_cache(case.corrupted)
        goal = [model.to_single_token(token) for token in (case.answer, case.foil)]
        patterns = [
            (n, lambda t, hook, c=cache: c[hook.name]) for n in cache if n.endswith("hook_pattern")
        ]
        for pos in (twin[site] - cache[site])[0].abs().sum(-1).nonzero().flatten().tolist():
            delta = torch.zeros_like(cache[site])
            delta[0, pos] = twin[site][0, pos] - cache[site][0, pos]
            predicted.append(float(lens.effect(delta, case.answer, versus=case.foil, site=site)))
            for seen, hooks in ((live, []), (held, patterns)):
                patch = (site, lambda t, hook, d=delta: t + d)
                moved = model.run_with_hooks(case.clean, fwd_hooks=[patch, *hooks]) - logits
                seen.append(float(moved[0, -1, goal[0]] - moved[0, -1, goal[1]]))
    real, still, ours = (torch.tensor(values) for values in (live, held, predicted))
    assert (ours - real).abs().sum() > 0.5 * real.abs().sum()  # most of it is missed
    assert (ours - still).abs().sum() < 0.2 * still.abs().sum()  # little, once patterns are held
    assert (real - still).abs().sum() > 0.5 * real.abs().sum()


# --- Refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_edited_is_refused():
    model = demo.load_model()
    _, lens = model.run_with_tensorlens(FACT)
    wrong = {
        "is no place of this model": lambda: lens.covector(site="L9H0"),
        "does not exist. Use a number": lambda: lens.covector(site="L0H4"),
        "has no residual site": lambda: lens.covector(site="blocks.0.hook_nothing"),
        "Both or none of to= and by=": lambda: lens.edit(site=1),
        "Give one of the two": lambda: lens.edit(site=1, to=1.0, by=1.0),
        "by='much' is not a finite number": lambda: lens.edit(site=1, by="much"),
        "to=nan is not a finite": lambda: lens.edit(site=1, to=torch.nan),
        "by=inf is not a finite": lambda: lens.edit(site=1, by=[torch.inf]),
        "margin=nan is not a finite": lambda: lens.edit_to_top("Rome", site=1, margin=torch.nan),
        "margin=0 lets another token win": lambda: lens.edit_to_top("Rome", site=1, margin=0),
        "factor=nan is not a finite": lambda: lens.edit(site=1, by=1.0) * torch.nan,
        "delta= is a str, not a tensor": lambda: lens.edit(site=1, delta="x"),
        "delta= holds numbers that are not real": lambda: lens.effect([torch.nan] * 128, site=1),
        "keep= direction is a str": lambda: lens.edit(site=1, by=1.0, keep={"direction": "x"}),
        "tolerance=nan is not a": lambda: lens.edit(site=1, by=1.0).radius(model, torch.nan),
        "positions=\\[\\] names no position": lambda: lens.edit(site=1, by=1.0, positions=[]),
        "is no metric here": lambda: lens.edit(site=1, by=1.0, metric="size"),
        "delta= has shape": lambda: lens.effect(torch.ones(3), site=1),
        "delta= is an edit already": lambda: lens.edit(site=1, delta=torch.ones(128), by=1.0),
        "has 2 entries for 1 prompt": lambda: lens.edit(["Paris", "Rome"], site=1, by=1.0),
        "cannot be ranked": lambda: lens.rank_edits(by="word"),
        "is no share": lambda: lens.rank_edits(budget=0),
        "it does not depend on this place": lambda: (
            lens.edit(site=1, by=1.0, positions=0, pos=0)
            and lens.edit(site=1, by=1.0, positions=4, pos=2)
        ),
        "Use some of operator": lambda: editing.evaluate(model, [], methods=("magic",)),
        "No case is left": lambda: editing.evaluate(model, []),
    }
    for match, call in wrong.items():
        with pytest.raises(ValueError, match=match):
            call()
    twin = demo.load_model()
    twin.W_U.data.mul_(1.01)
    for ask in ("check", "refine", "radius"):
        with pytest.raises(ValueError, match=r"other weights than the model of the lens"):
            getattr(lens.edit(site=1, by=1.0), ask)(twin)
    other = replace(lens.edit(site=1, by=1.0), capture=None)
    with pytest.raises(ValueError, match=r"editing\.load_edit\(path, lens\)"):
        other.refine(model)


def test_numbers_and_single_targets_are_read_in_every_form():
    _, lens = demo.load_model().run_with_tensorlens(FACT)
    plain = lens.edit("Paris", by=-2.0, site=1, keep=["Madrid"]).delta
    for by in (torch.tensor(-2.0), np.float32(-2), np.array([-2.0]), torch.tensor([-2.0])):
        assert torch.equal(lens.edit("Paris", by=by, site=1, keep="Madrid").delta, plain)
    for one in ({"target": "Madrid"}, lens.capture.tokenizer.encode("Madrid")[-1]):
        assert torch.equal(lens.edit("Paris", by=-2.0, site=1, keep=one).delta, plain)
    top = lens.edit_to_top("Rome", site=1).delta
    assert torch.equal(lens.edit_to_top("Rome", site=1, margin=np.float64(1)).delta, top)


def test_an_edit_below_the_models_rounding_is_refused():
    model = demo.load_model().to(torch.bfloat16)
    _, lens = tensorlens_tl.capture(model, FACT)
    with pytest.raises(ValueError, match=r"rounds away\. Load the model in float32"):
        lens.edit("Paris", by=1e-6, site=1)
    assert lens.edit("Paris", by=-5.0, site=1).size > 0.01


@pytest.mark.parametrize("case", [c for c in PER_SHAPE if "gemma2" in str(c)], ids=str)
def test_a_capped_logit_is_not_moved_far(case):
    lens = lens_of(case)
    with pytest.raises(ValueError, match=r"the held ratio of the cap"):
        lens.edit(3, by=1e4, site=0)
    assert bool((lens.edit(3, by=1e-3, site=0).size > 0).all())


LLAMAS = [case for case in PER_SHAPE if "llama" in str(case) and case.host != "native"]


@pytest.mark.parametrize("case", LLAMAS, ids=str)
def test_between_attention_and_mlp_a_bridge_is_not_edited(case):
    """What a Bridge's hook leaves there is read by the MLP, and does not enter the residual."""
    edit = lens_of(case)[0].edit(3, 5, site="blocks.0.hook_resid_mid", by=0.1, qk=True, gates=True)
    if case.host == "bridge":
        with pytest.raises(ValueError, match="only the MLP reads it"):
            edit.check(case.model())
    else:
        small = 1e-6 * edit
        check = small.check(case.model(), jacobian=True)
        assert_close(check.real, check.jacobian, 1e-4)
