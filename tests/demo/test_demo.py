"""The bundled model: its loaders, tokenizer, prompts and held-out combinations."""

import json
import random
import socket
from dataclasses import replace
from itertools import combinations, islice, pairwise

import pytest
import torch
from transformers.utils import logging

from tensorlens_tl import demo
from tensorlens_tl.demo import evaluate, grammar, tokenizer, train
from tensorlens_tl.demo.facts import COUNTRIES, PHRASINGS

KINDS = []
try:
    from transformer_lens import HookedTransformer  # noqa: F401

    KINDS.append("hooked")
except ImportError:
    pass
try:
    from transformer_lens.model_bridge import TransformerBridge  # noqa: F401

    KINDS.append("bridge")
except ImportError:
    pass

SENTENCE = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return demo.load_model(request.param)


@pytest.fixture(scope="module")
def plain():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo.model_folder()).eval()


def next_word(model, prompt):
    with torch.no_grad():
        return model.tokenizer.decode([model(prompt)[0, -1].argmax().item()])


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (SENTENCE, "Mary"),
        ("After Anna and Paul came to the park, Anna smiled and handed the ring to", "Paul"),
        ("river king Anna euro Paris lamp river king Anna euro Paris", "lamp"),
        ("The capital of France is", "Paris"),
        ("People in Brazil speak", "Portuguese"),
        ("The currency of Japan is the", "yen"),
        ("Kenya is a country in", "Africa"),
        ("The keys near the cabinet", "are"),
        ("The key near the cabinets", "is"),
    ],
)
def test_it_knows_a_prompt_of_every_task(model, prompt, answer):
    assert next_word(model, prompt) == answer


def test_it_knows_which_years_come_later(model):
    assert int(next_word(model, "The war lasted from 1732 to 17")) > 32


def test_loaders_agree():
    """In float32 to 2e-5 on each task's prompt; what is left is rounding: in float64 it is gone."""
    from transformers import AutoModelForCausalLM

    models = [demo.load_model(kind) for kind in KINDS]
    plain = AutoModelForCausalLM.from_pretrained(
        demo.model_folder(), attn_implementation="eager"
    ).eval()
    prompts = [models[0].to_tokens(demo.prompts(task, 1, seed=1)[0].clean) for task in demo.TASKS]
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-9)):
        plain, models = plain.to(dtype), [model.to(dtype) for model in models]
        for ids in prompts:
            with torch.no_grad():
                reference = plain(ids).logits
                for other in models:
                    torch.testing.assert_close(other(ids), reference, atol=tolerance, rtol=0)


def test_default_is_the_first_class_the_host_has():
    default, first = demo.load_model(), demo.load_model(KINDS[0])
    assert type(default) is type(first)


def test_model_is_ready(model):
    assert not model.training
    assert model.cfg.default_prepend_bos
    assert (model.cfg.n_ctx, model.cfg.d_vocab) == (64, len(tokenizer.IDS))
    tokens = model.to_tokens(SENTENCE)
    assert tokens[0, 0] == model.tokenizer.bos_token_id
    assert tokens.shape == (1, 15)
    assert model.to_single_token(" Mary") == model.to_single_token("Mary")
    assert model.to_single_token("Mary") == tokenizer.IDS["Mary"]
    _, cache = model.run_with_cache(tokens)
    assert cache["blocks.3.attn.hook_pattern"].shape == (1, 4, 15, 15)


def test_loading_is_offline_and_quiet(monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for kind in KINDS:
        demo.load_model(kind)
    assert capsys.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()  # for the models of users


def test_tokenizer_round_trip(model):
    rng = random.Random(3)
    for task in ("ioi", "facts", "agreement", "greater_than", "filler"):
        for _ in range(50):
            words = grammar.document(task, rng).words
            text = grammar.text(words)
            ids = model.tokenizer.encode(text, add_special_tokens=False)
            assert ids == [tokenizer.IDS[word] for word in words]
            assert model.tokenizer.decode(ids) == text
    spaced, joined = (model.to_tokens(s) for s in ("store , John", "store, John"))
    assert spaced.equal(joined)


def test_unknown_words_are_unk(model):
    ids = model.tokenizer.encode("zebra crossing", add_special_tokens=False)
    assert ids == [model.tokenizer.unk_token_id] * 2


@pytest.mark.parametrize("task", demo.TASKS)
def test_prompt_pairs(model, task):
    pairs = demo.prompts(task, 20, seed=5)
    assert len(pairs) == 20
    assert pairs == demo.prompts(task, 20, seed=5) != demo.prompts(task, 20, seed=6)
    right = better = 0
    ids = [model.to_tokens(text) for pair in pairs for text in (pair.clean, pair.corrupted)]
    last = {}  # the logits after every prompt; those of a length are run together
    for length in {one.shape[1] for one in ids}:
        own = [i for i, one in enumerate(ids) if one.shape[1] == length]
        with torch.no_grad():
            last |= dict(zip(own, model(torch.cat([ids[i] for i in own]))[:, -1], strict=True))
    for i, pair in enumerate(pairs):
        clean, corrupted = ids[2 * i : 2 * i + 2]
        assert clean.shape == corrupted.shape
        assert clean.shape[1] < model.cfg.n_ctx
        assert (clean != corrupted).sum() == 1
        assert pair.task == task
        answer, foil = model.to_single_token(pair.answer), model.to_single_token(pair.foil)
        assert answer != foil
        logits, other = last[2 * i], last[2 * i + 1]
        right += (logits[answer] > logits[foil]).item()
        better += (logits[answer] - logits[foil] > other[answer] - other[foil]).item()
    assert right >= 19
    assert better >= 19


def test_no_held_out_combination_in_the_training_stream():
    rng = random.Random(11)
    mix = train.STAGES[0].mix
    nouns = {form: noun for noun in grammar.NOUNS for form in (noun, grammar.plural(noun))}
    facts = {
        " ".join(phrasing.format(country).split())
        for relation, phrasings in PHRASINGS.items()
        for index, phrasing in enumerate(phrasings)
        for country in COUNTRIES
        if grammar.held_out("facts", relation, country, str(index))
    }
    assert len(facts) == 60 * 4 * 2
    for drawn in islice(train.training_documents(rng, mix), 6_000):
        words = drawn.words
        names = sorted(set(words) & set(grammar.NAMES))
        assert not any(grammar.held_out("names", *pair) for pair in combinations(names, 2))
        if drawn.task == "facts":
            sentence = " ".join(words[:-2])
            assert not any(sentence.endswith(fact) for fact in facts)
        if drawn.task == "agreement":
            pair = [nouns[word] for word in words if word in nouns]
            assert not grammar.held_out("nouns", *pair)
        if drawn.task == "greater_than":
            event = next(word for word in words if word in grammar.EVENTS)
            year = [word for word in words if word.isdigit()][1]
            assert not grammar.held_out("years", event, year)
        if drawn.task == "ioi":
            place = next(word for word in words if word in grammar.PLACES)
            openings = [key[1] for key in drawn.keys if key[0] == "place"]
            assert not grammar.held_out("place", openings[0], place)


def test_no_held_out_neighbours_in_induction_rows():
    rng = random.Random(12)
    for _ in range(200):
        words = grammar.segment(rng, 25)
        assert not any(grammar.held_out("words", *two) for two in pairwise(words))
        words, weights = train.induction_row(rng)
        assert len(words) == len(weights) == train.N_CTX


def test_prompts_are_held_out():
    for task in demo.TASKS:
        for drawn in demo.unseen(task, 50, seed=2):
            assert drawn.core
            assert all(grammar.held_out(*key) for key in drawn.keys[: drawn.core])


def test_training_learns_and_saves(tmp_path):
    stage = train.STAGES[0]
    short = replace(stage, steps=6)
    model = train.new_model(seed=0)
    ids, weights = next(train.batches(short, random.Random(0)))
    assert ids.shape == weights.shape == (train.ROWS, train.N_CTX)
    before = train.loss_of(model, ids, weights).item()
    train.train(model, (short,), seed=0)
    assert train.loss_of(model, ids, weights).item() < before
    train.save(model, tmp_path / "out")
    shipped = demo.model_folder()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        kept, made = ((f / name).read_text() for f in (shipped, tmp_path / "out"))
        kept, made = json.loads(kept), json.loads(made)
        both = (kept.keys() & made.keys()) - {"transformers_version"}
        assert {"n_ctx", "version", "bos_token"} & both
        assert {key: kept[key] for key in both} == {key: made[key] for key in both}


def test_metrics_reach_the_bars():
    metrics = json.loads((demo.model_folder() / "metrics.json").read_text())
    for name, bar in evaluate.BARS.items():
        assert metrics["tasks"][name] >= bar, name
    assert (demo.model_folder() / "model.safetensors").stat().st_size <= 4.5e6


def test_measuring_again_finds_the_bars(plain):
    figures = evaluate.evaluate(plain, 60, seed=9)
    for name, bar in evaluate.BARS.items():
        assert figures[name] >= bar - 0.05, name


def test_bad_input():
    with pytest.raises(ValueError, match="kind='mlp' does not exist"):
        demo.load_model("mlp")
    with pytest.raises(ValueError, match="greater_than"):
        demo.prompts("sorting", 3, 0)
    with pytest.raises(ValueError, match="n=0 is not an integer ≥ 1"):
        demo.prompts("ioi", 0, 0)


def test_a_class_the_host_lacks():
    for kind in {"hooked", "bridge"} - set(KINDS):
        with pytest.raises(ValueError, match="Use the other kind of model"):
            demo.load_model(kind)
    assert KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_that_names_another_architecture(kind, tmp_path, monkeypatch):
    """Some releases read the architecture off the path; one loader keeps them from that."""
    here = tmp_path / "gemma-and-llama"
    here.symlink_to(demo.model_folder(), target_is_directory=True)
    plain = demo.load_model(kind)
    monkeypatch.setattr(demo, "model_folder", lambda: here)
    model = demo.load_model(kind)
    assert model.cfg.model_name == "tensorlens_tl demo"
    assert torch.equal(model(SENTENCE), plain(SENTENCE))


def test_the_device_is_chosen():
    assert next(demo.load_model(device="cpu").parameters()).device.type == "cpu"
    with pytest.raises(ValueError, match="device='tpux'"):
        demo.load_model(device="tpux")
