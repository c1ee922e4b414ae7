"""The logit lens and direct logit attribution, beside TransformerLens's own."""

import json

import numpy as np
import pytest
import torch
from comparisons import assert_close
from models import (
    CASES,
    D_VOCAB,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SHAPES,
    TWO_RUNS,
    lens_of,
    quiet,
    tokens,
)

import tensorlens_tl
from tensorlens_tl.methods import logit_lens

every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)


def host_sites(case):
    """Every residual of a run by the host's name, with the host's own cache."""
    model = case.model()
    with quiet(), torch.no_grad():
        _, cache = model.run_with_cache(tokens())
    return [n for n in lens_of(case).operator.sites if "hook_resid" in n], cache


@every_case
def test_the_norm_applied_anew_is_the_hosts_own_final_norm(case):
    lens, model = lens_of(case), case.model()
    names, cache = host_sites(case)
    cap = lens.capture.unembed.weights.soft_cap
    found = lens.logit_lens(pos=None)
    assert found.sites == tuple(names) and len(found) == 2
    with quiet(), torch.no_grad():
        for i, name in enumerate(names):
            expected = model.unembed(model.ln_final(cache[name])).double()
            expected = expected if cap is None else cap * torch.tanh(expected / cap)
            assert_close(found.logits[:, i], expected, case.within("run"))
            one = lens.logit_lens(pos=4)
            assert_close(one.logits[:, i, 0], expected[:, 4], case.within("run"))
    assert_close(found.logits[:, -1], lens.logits.double(), case.within("run"))


@every_case
def test_the_frozen_norm_is_the_operators_own_readout_at_every_site(case):
    lens = lens_of(case)
    names, cache = host_sites(case)
    found = lens.logit_lens(pos=None, norm="frozen").logits
    for i, name in enumerate(names):
        y = lens.capture.ln_final.apply(cache[name].to(lens.embedding))
        expected = lens.readout(y + lens.capture.ln_final.bias)
        assert_close(found[:, i], expected, case.within("run"))
    assert_close(found[:, -1], lens.logits.double(), case.within("run"))
    # What the last layers add to a logit is what their components write.
    gained = found[:, -1, -1, 3] - found[:, 0, -1, 3]
    parts = lens.dla(3)
    low = [i for i, s in enumerate(parts.sources) if str(s.node) in ("embed", "pos_embed")]
    above = [str(s.node) in ("b_U", "ln_final.b") for s in parts.sources]
    kept = [i for i in range(len(above)) if i not in low and not above[i]]
    assert_close(parts.values[:, kept].sum(1), gained, case.within("oracle"))


@pytest.mark.parametrize("name", [n for n in CASES if n.endswith(("-olmo", "-no-norm", "-bloom"))])
def test_norms_of_unknown_epsilon_and_none(name):
    """OLMo's norm holds its ε in its code: it is read off the run."""
    case = CASES[name]
    lens, model = lens_of(case), case.model()
    found = lens.logit_lens(pos=None)
    names, cache = host_sites(case)
    with quiet(), torch.no_grad():
        for i, site in enumerate(names):
            final = getattr(model, "ln_final", None) or torch.nn.Identity()
            expected = model.unembed(final(cache[site])).double()
            assert_close(found.logits[:, i], expected, max(case.within("run"), TWO_RUNS))


def test_padded_prompts_are_read_like_themselves_alone(demo_model):
    with torch.no_grad():
        _, both = demo_model.run_with_tensorlens(["Paris is in", "The capital of France is"])
        _, alone = demo_model.run_with_tensorlens("Paris is in")
    many, one = both.logit_lens(pos=None), alone.logit_lens(pos=None)
    assert_close(many[0].logits, one.logits, 1e-4)
    assert many[0].labels == one.labels and len(many) == 2
    assert_close(both.logit_lens()[0].logits, one.logits[:, :, -1:], 1e-4)
    assert_close(many[0].logprob("Paris"), one.logits.log_softmax(-1)[..., demo_id("Paris")], 1e-4)


def demo_id(token):
    from tensorlens_tl import demo

    return demo.load_model().tokenizer.encode(token, add_special_tokens=False)[0]


def test_forms_of_the_result(demo_model):
    _, lens = demo_model.run_with_tensorlens("The capital of France is")
    found = lens.logit_lens()
    assert found.norm == "anew" and '"is"@5' in repr(found) and "applied anew" in repr(found)
    best = found.probabilities[0, -1, 0].max()
    assert f"'Paris' {float(best):.1%}" in repr(found).splitlines()[-1]
    assert f"'Paris' {float(best):.1%}" in found._repr_html_().replace("&#x27;", "'")
    pytest.importorskip("pandas", reason="an extra")
    table = found.to_dataframe(k=2)
    assert list(table.columns) == [
        *("prompt", "site", "label", "rank", "id", "token", "logit", "probability")
    ]
    last = table.iloc[-2]
    assert last["label"] == '"is"@5'
    assert (last["token"], last["rank"], last["site"]) == ("Paris", 1, found.sites[-1])
    assert last["probability"] == pytest.approx(float(best))
    rows = json.loads(found.to_json(k=2))["rows"]
    assert rows == table.to_dict("records")
    assert np.asarray(found).shape == tuple(found.logits.shape)
    assert "6 positions" in repr(lens.logit_lens(pos=None, norm="frozen"))


def test_a_lens_from_a_file(demo_model, tmp_path):
    _, lens = demo_model.run_with_tensorlens("The capital of France is")
    for weights in (True, False):
        lens.save(tmp_path / "lens", weights=weights)
        loaded = tensorlens_tl.load(tmp_path / "lens", None if weights else demo_model)
        assert_close(loaded.logit_lens().logits, lens.logit_lens().logits, 1e-5)
        assert_close(loaded.dla(7).values, lens.dla(7).values, 1e-5)
    bare = tensorlens_tl.load(tmp_path / "lens")
    for ask in (bare.logit_lens, bare.dla, lambda: bare.attribute_sequence(-1)):
        with pytest.raises(ValueError, match="was loaded without the model's weights"):
            ask()


@pytest.mark.wrong_types
def test_refusals(monkeypatch):
    lens = lens_of(SHAPES[0])
    with pytest.raises(ValueError, match=r"norm='new' does not exist. Use 'anew' or 'frozen'"):
        lens.logit_lens(norm="new")
    with pytest.raises(ValueError, match="Position 7 is outside prompt 0"):
        lens.logit_lens(pos=7)
    with pytest.raises(ValueError, match=r"token=50 is outside the vocabulary"):
        lens.logit_lens().logprob(D_VOCAB)
    with pytest.raises(ValueError, match=r"k=0 is not an integer"):
        lens.logit_lens().to_json(k=0)
    with pytest.raises(IndexError, match=r"There is no prompt 2"):
        lens.logit_lens()[2]
    monkeypatch.setitem(logit_lens.__globals__, "DENSE_LIMIT", 100)
    with pytest.raises(ValueError, match=r"The logits of all sites need .* GiB. Pass one position"):
        lens.logit_lens(pos=None)


# --- Direct logit attribution


@pytest.mark.offered("hooked-gpt2-folded" in CASES)
def test_dla_is_transformer_lenss_logit_attrs():
    case = CASES["hooked-gpt2-folded"]
    lens, model = lens_of(case), case.model()
    with quiet(), torch.no_grad():
        _, cache = model.run_with_cache(tokens())
        stack, names = cache.get_full_resid_decomposition(
            layer=len(model.blocks), expand_neurons=False, apply_ln=False, return_labels=True
        )
        for target, versus in ((3, None), (3, 4)):
            wrong = None if versus is None else torch.tensor([versus] * 2)
            theirs = cache.logit_attrs(
                stack[:, :, -1], torch.tensor([target] * 2), wrong, has_batch_dim=True, pos_slice=-1
            )
            theirs = dict(zip(names, theirs, strict=True))
            ours = lens.dla(target, versus)
            found = {str(s.node): ours.values[:, i] for i, s in enumerate(ours.sources)}
            for layer in range(len(model.blocks)):
                for head in range(model.cfg.n_heads):
                    assert_close(found[f"L{layer}H{head}"], theirs[f"L{layer}H{head}"], ORACLE)
                both = found[f"L{layer}MLP"] + found[f"L{layer}.b_out"]  # theirs holds its bias
                assert_close(both, theirs[f"{layer}_mlp_out"], ORACLE)
            for name in ("embed", "pos_embed"):
                assert_close(found[name], theirs[name], ORACLE)
            biases = sum(found[f"L{layer}.b_O"] for layer in range(len(model.blocks)))
            assert_close(biases, theirs["bias"], 1e-6)  # the host sums them in float32
            logits = lens.logits[:, -1]
            expected = logits[:, target] - (0 if versus is None else logits[:, versus])
            assert_close(ours.values.sum(1), expected, ROUNDING)
            b_U = model.b_U[target] - (0 if versus is None else model.b_U[versus])
            assert_close(found["b_U"], b_U.expand(2), ROUNDING)
            # Theirs leave out b_U, and so miss the logit by it.
            assert_close(sum(theirs.values()) + b_U, expected, 1e-6)


@every_case
def test_dla_is_the_split_by_component(case):
    lens = lens_of(case)
    for kwargs in ({}, {"versus": 4, "pos": 2}, {"of": "logprob"}):
        a, b = lens.dla(3, **kwargs), lens.attribute(3, by="component", **kwargs)
        assert torch.equal(a.values, b.values) and a.labels == b.labels


@pytest.fixture(scope="module")
def demo_model():
    from tensorlens_tl import demo

    return demo.load_model()
