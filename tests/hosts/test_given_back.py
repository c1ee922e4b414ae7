"""What unwrap gives back takes hooks again, and arguments of a run are checked for ids as well."""

from pathlib import Path

import numpy
import pytest
import torch
import transformers
from models import build_bridge_from_module, quiet
from tokenizers import Tokenizer, models

import tensorlens_tl
from tensorlens_tl.checks import as_list, usable_device
from tensorlens_tl.lens import WriteCheck
from tensorlens_tl.readers.hook_points import foreign_hooks
from tensorlens_tl.saving import saved_file

wraps = pytest.mark.offered(build_bridge_from_module is not None)
WORDS = ("<unk>", "<s>", "we", "went", "home")
IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


def small():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=20, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@wraps
def test_an_unwrapped_model_takes_hooks_and_lets_go_of_earlier_ones():
    model, seen = small(), []
    early = model.lm_head.register_forward_hook(lambda *_: seen.append("early"))
    with quiet():
        tensorlens_tl.unwrap(tensorlens_tl.wrap(model))
    early.remove()
    seen.clear()  # wrap ran the model to compare it with its Bridge
    late = model.lm_head.register_forward_hook(lambda *_: seen.append("late"))
    model(IDS)
    late.remove()
    model(IDS)
    assert seen == ["late"]


@wraps
@pytest.mark.parametrize("ids", [IDS, [IDS[0], IDS[1, :2]]], ids=["one length", "two lengths"])
def test_an_unknown_argument_is_refused_with_ids_of_many_prompts(ids):
    with quiet():
        model = tensorlens_tl.wrap(small())
        with pytest.raises(ValueError, match="gatee is no argument"):
            tensorlens_tl.mean_attribution(model, ids, gatee="up")
        with pytest.raises(ValueError, match="gatee is no argument"):
            tensorlens_tl.discover(model, ids, n_edges=4, gatee="up")


@wraps
def test_a_large_mean_of_the_positions_rounds_and_is_no_other_model():
    model = small()
    with torch.no_grad():  # LayerNorm takes the mean off, and its rounding stays
        model.transformer.wpe.weight.add_(1000)
        model.transformer.wte.weight.mul_(50)
    with quiet():
        logits, lens = tensorlens_tl.capture(tensorlens_tl.wrap(model), IDS)
    assert lens.capture.embed.abs().max() < 10 and bool((lens.embedding > 900).all())
    assert torch.equal(logits, lens.logits)


@wraps
def test_slices_of_results_are_those_of_single_prompts():
    with quiet():
        _, lens = tensorlens_tl.capture(tensorlens_tl.wrap(small()), IDS)
    matrix, readings = lens.attribute_sequence(-1), lens.logit_lens(None)
    assert matrix[0:2].outputs == matrix.outputs
    assert matrix[1:].outputs == matrix[1].outputs
    assert torch.equal(matrix[1:].values, matrix[1].values)
    assert readings[::-1].labels == readings.labels[::-1]
    assert torch.equal(readings[::-1].logits, readings.logits.flip(0))
    with pytest.raises(ValueError, match=r"logit_lens\['a'\] does not exist"):
        readings["a"]


@wraps
def test_a_device_without_its_number_is_that_of_the_model(monkeypatch, tmp_path):
    # On an accelerator "cuda" means cuda:0; here the CPU plays both.
    with quiet():
        model = tensorlens_tl.wrap(small())
        _, lens = tensorlens_tl.capture(model, IDS)
    lens.save(tmp_path / "lens")
    assert usable_device("cpu:0") == torch.device("cpu")
    asked = []
    monkeypatch.setattr(
        saved_file, "usable_device", lambda d: asked.append(d) or torch.device("cpu")
    )
    loaded = tensorlens_tl.load(tmp_path / "lens", model=model, device="cuda")
    assert asked == ["cuda"]
    assert torch.equal(loaded.attribute().values, lens.attribute().values)


@wraps
def test_one_unknown_word_at_the_end_is_no_padding_where_both_are_one_token():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", bos_token="<s>"
    )
    with quiet():
        model = tensorlens_tl.wrap(small(), own)
        _, lens = tensorlens_tl.capture(model, [2, 3, 0])
        assert lens.tokens == (("we", "went", "<unk>"),)
        with pytest.raises(ValueError, match="ends in the padding token"):
            tensorlens_tl.capture(model, [2, 0, 0])


def test_a_hook_of_no_module_is_the_users_own():
    module, seen = torch.nn.Linear(2, 2), []
    module.register_forward_pre_hook(type("Hook", (), {"__module__": None, "__call__": seen})())
    assert foreign_hooks({}, torch.nn.Sequential(module)) == ["0"]


def test_a_name_as_a_path_is_refused_like_a_name():
    with pytest.raises(ValueError, match="'no/such-model' is no folder here"):
        tensorlens_tl.load_model(Path("no/such-model"))


@wraps
def test_a_question_looks_once_whether_weights_were_written_to(monkeypatch):
    with quiet():
        _, lens = tensorlens_tl.capture(tensorlens_tl.wrap(small()), IDS)
    looks, written = [], WriteCheck.written
    monkeypatch.setattr(WriteCheck, "written", lambda check: looks.append(0) or written(check))
    for ask in (
        lens.attribute,
        lambda: lens.attribute(torch.ones(8), site=0),
        lambda: lens.attribute_many([1, 2]),
        lambda: lens.attribute_sequence(-1),
        lambda: lens.loadings(0),
    ):
        looks.clear()
        ask()
        assert len(looks) == 1


def test_an_array_of_strings_is_a_list_of_tokens():
    assert as_list(numpy.array(["a", "b"])) == ["a", "b"]
    assert as_list(numpy.array([1, 2])) == [1, 2]
    direction = numpy.array([0.5, 1.0])
    assert as_list(direction) is direction
