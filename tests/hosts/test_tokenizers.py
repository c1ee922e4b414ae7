"""The prompt that a user passes is the one that is run: tokenizers, special tokens, padding."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from comparisons import assert_close
from models import (
    BRIDGE,
    CASES,
    HookedTransformer,
    build_bridge_from_module,
    build_hf,
    quiet,
    tokens,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast

import tensorlens_tl
from tensorlens_tl import MeanAttribution
from tensorlens_tl.evaluation import evaluate
from tensorlens_tl.hosts.tokens import each_prompt, mask_spans
from tensorlens_tl.operator.prompts import token_id

WORDS = "<unk> <pad> <s> </s> we went home late"
NAMES = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
TEXTS = ["we went home", "home", "we late"]
every_host = pytest.mark.parametrize(
    "case", [CASES[n] for n in ("bridge-gpt2", "hooked-gpt2") if n in CASES], ids=str
)
wrapped = pytest.mark.offered(build_bridge_from_module is not None)


def tokenizer(words=WORDS, unk="<unk>", **names):
    """A tokenizer of whole words that was made in memory and has no folder."""
    ids = {word: i for i, word in enumerate(words.split())}
    inner = Tokenizer(models.WordLevel(ids, unk_token=unk) if unk else models.WordLevel(ids))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def llama():
    with quiet():
        return build_hf(*BRIDGE["llama"], torch.float32)


def capture(model, prompts, **kwargs):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(model, prompts, **kwargs)[1]


def told(model, prompts, **kwargs):
    """The lens, and what the library warned of."""
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        lens = tensorlens_tl.capture(model, prompts, **kwargs)[1]
    return lens, [str(w.message) for w in seen if "TransformerLens reads" in str(w.message)]


# --- The tokenizer that is used ------------------------------------------------------------------


@wrapped
def test_words_added_in_memory_are_read_and_the_users_tokenizer_is_left_alone():
    own, model = tokenizer(**NAMES), llama()
    own.add_tokens(["Quux"])
    before = own.special_tokens_map, own.padding_side, len(own), own("we")["input_ids"]
    lens = capture(model, "we went Quux home", tokenizer=own)
    assert lens.tokens == (("<s>", "we", "went", "Quux", "home"),)
    assert lens.attribute("Quux").target == ("'Quux'",)
    assert (own.special_tokens_map, own.padding_side, len(own), own("we")["input_ids"]) == before
    own.add_tokens(["Zap"])  # after a capture
    assert capture(model, "we Zap", tokenizer=own).tokens == (("<s>", "we", "Zap"),)
    bridge = tensorlens_tl.wrap(model)
    assert bridge.to_tokens("we Zap").tolist() == [[2, 4, len(own) - 1]]
    assert bridge.cfg.d_vocab == model.config.vocab_size  # not that of the tokenizer


@wrapped
def test_a_tokenizer_given_after_a_first_capture():
    model = llama()
    capture(model, [4, 5])
    lens = capture(model, "we went", tokenizer=tokenizer(**NAMES), prepend_bos=False)
    assert lens.tokens == (("we", "went"),)
    assert capture(model, "we went").tokens == (("<s>", "we", "went"),)


@wrapped
def test_a_tokenizer_set_on_a_bridge():
    """A Bridge of ours takes one by name; one set by hand may cut the first word: refused."""
    bridge = tensorlens_tl.wrap(llama())
    assert capture(bridge, "we", tokenizer=tokenizer(**NAMES)).tokens == (("<s>", "we"),)
    bridge = tensorlens_tl.wrap(llama())
    bridge.tokenizer = tokenizer(**NAMES)  # the host still takes it for one that prepends BOS
    with pytest.raises(ValueError, match=r"would lose a token of 'we went' and run 'went'\. Pass"):
        capture(bridge, "we went", prepend_bos=False)
    bridge.cfg.tokenizer_prepends_bos = False
    assert capture(bridge, "we went", prepend_bos=False).tokens == (("we", "went"),)


@wrapped
@pytest.mark.parametrize(
    "names, ids",
    [
        (NAMES, [2, 4]),
        ({"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}, [3, 4]),
        ({"unk_token": "<unk>"}, [4]),
        ({**NAMES, "add_bos_token": True}, [2, 4]),
        ({**NAMES, "add_eos_token": True}, [2, 4]),
        ({**NAMES, "add_bos_token": True, "add_eos_token": True}, [2, 4]),
        (dict.fromkeys(NAMES, "<unk>"), [0, 4]),
    ],
    ids=["no bos", "eos", "none", "own bos", "own eos", "both", "one for all"],
)
def test_where_the_convention_differs_it_is_told_once(names, ids):
    """The host's ids, and one line where the tokenizer itself gives others for the text."""
    adds = {k: names[k] for k in names if k.startswith("add_")}
    own, model = tokenizer(**{k: v for k, v in names.items() if k not in adds}), llama()
    for name in adds:
        setattr(own, name, True)
    lens, lines = told(model, "we", tokenizer=own)
    assert lens.capture.prompts.tokens.tolist() == [ids]
    alone = own("we")["input_ids"]
    assert len(lines) == (ids != alone)
    assert told(model, "we", tokenizer=own)[1] == []
    if lines:
        extra = {own.decode([i]) for i in {*ids} ^ {*alone}}
        assert all(repr(token) in lines[0] for token in extra)
        how = "prepend_bos=False" if not adds else "token ids"
        assert lines[0].endswith(f"Pass {how} for the tokenizer's own.")
        assert told(llama(), "we", tokenizer=own, prepend_bos=True)[1] == []
    if "add_eos_token" not in adds:
        without = capture(model, "we", prepend_bos=False).capture.prompts.tokens
        assert without.tolist() == [own("we", add_special_tokens=False)["input_ids"]]


@wrapped
def test_a_tokenizer_that_knows_few_words_and_no_special_token():
    own = tokenizer("we went home late", unk=None)
    lens = capture(llama(), TEXTS, tokenizer=own)
    assert lens.tokens == (("we", "went", "home"), ("home",), ("we", "late"))
    for wrong, match in (
        (own.backend_tokenizer, "tokenizer is a Tokenizer, and not a tokenizer of transformers"),
        (tokenizer("", unk=None), "The tokenizer knows no text. Pass token ids"),
    ):
        with pytest.raises(ValueError, match=match):
            capture(llama(), "we", tokenizer=wrong)


@wrapped
def test_the_first_word_is_cut_as_the_tokenizer_cuts_it():
    """A token written before the text would make "we" the second word, without its mark."""
    ids = {"<unk>": 0, "<s>": 1, "▁we": 2, "we": 3, "▁went": 4}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    own = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")
    found = capture(llama(), "we went", tokenizer=own).capture.prompts.tokens
    assert found.tolist() == [[1, *own("we went")["input_ids"]]] == [[1, 2, 4]]


# --- Padding -------------------------------------------------------------------------------------


def assert_each_is_itself(model, texts, **kwargs):
    """Every prompt of a padded batch has the tokens and the logits that it has alone."""
    batch = capture(model, texts, **kwargs)
    for i, text in enumerate(texts):
        alone = capture(model, text, **kwargs)
        start, stop = batch.capture.frame.spans[i]
        assert batch.tokens[i] == alone.tokens[0]
        assert_close(batch.logits[i, start:stop], alone.logits[0], 1e-5, f"logits of prompt {i}")
        values = batch[i].attribute(3).values, alone.attribute(3).values
        assert_close(*values, 1e-4, f"rows of prompt {i}")
    return batch


@wrapped
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prepend", [True, False])
@pytest.mark.parametrize("names", [NAMES, dict.fromkeys(NAMES, "<unk>")], ids=["apart", "one"])
def test_special_tokens_that_are_also_padding(names, prepend, side):
    """pad = BOS = EOS, also inside and at both ends of a text, and with prepend_bos=False."""
    texts = ["<unk> we", "we went home <unk>", "home", "<unk> <unk> late we <unk> <unk>"]
    own = tokenizer(**names)
    kwargs = {"tokenizer": own, "padding_side": side, "prepend_bos": prepend}
    batch = assert_each_is_itself(llama(), texts, **kwargs)
    lengths = [stop - start for start, stop in batch.capture.frame.spans]
    assert lengths == [len(text.split()) + prepend for text in texts]


@pytest.mark.offered(HookedTransformer is not None)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prepend", [True, False])
def test_padding_of_a_hooked_transformer(prepend, side):
    """The host would hide a text's own first token where it is the padding token."""
    with quiet():
        model = CASES["hooked-gpt2"].build(torch.float32)
    own = tokenizer(**dict.fromkeys(NAMES, "<unk>"))
    model.tokenizer, model.cfg.tokenizer_prepends_bos, own.padding_side = own, False, side
    assert_each_is_itself(model, ["<unk> we", "we went home <unk>"], prepend_bos=prepend)


@wrapped
def test_prompts_of_a_batch_are_not_mixed_up():
    """Four lengths in an order that sorting would change; each next to its own single run."""
    texts = ["home", "we went home late", "late we", "went home we"]
    batch = assert_each_is_itself(llama(), texts, tokenizer=tokenizer(**NAMES))
    spans = batch.capture.frame.spans
    assert_close(batch.logits[:, 0], batch.logits[:1, 0].expand(4, -1), 1e-5, "all begin alike")
    ends = torch.stack([batch.logits[i, stop - 1] for i, (_, stop) in enumerate(spans)])
    assert torch.pdist(ends).min() > 0.1  # what would be mixed up differs


# --- Other forms of a prompt ---------------------------------------------------------------------


@every_host
def test_what_a_tokenizer_returns_is_a_prompt(case):
    """The mask comes with the ids; what the model's own call ignores is left out."""
    model, ids = case.model(torch.float32), tokens(2)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    expected = capture(model, ids, attention_mask=mask).logits
    lists = {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "offset_mapping": [0]}
    for given in (BatchEncoding({"input_ids": ids, "attention_mask": mask}), lists):
        assert torch.equal(capture(model, given).logits, expected)
        rows = each_prompt(given, None)
        assert [row.tolist() for row in rows] == [ids[0].tolist(), ids[1, 2:].tolist()]
    one = {"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1]}
    assert torch.equal(capture(model, one).logits, capture(model, ids[:1]).logits)
    with pytest.raises(ValueError, match="attention_mask is given twice, in the prompt's dict and"):
        capture(model, lists, attention_mask=mask)
    with pytest.raises(ValueError, match="The input is a dict without input_ids"):
        capture(model, {"ids": ids})


@every_host
def test_masks_and_ids_as_lists_arrays_and_lists_of_tensors(case):
    model, ids = case.model(torch.float32), tokens(2)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    expected = capture(model, ids, attention_mask=mask).logits
    for given in (mask.tolist(), mask.numpy(), mask.bool(), mask.float(), list(mask)):
        assert torch.equal(capture(model, ids.tolist(), attention_mask=given).logits, expected)
    for given in (list(ids), tuple(ids), [row[None] for row in ids], ids.numpy()):
        assert torch.equal(capture(model, given, attention_mask=mask).logits, expected)
    one = capture(model, ids[0], attention_mask=mask[0].tolist())
    assert_close(one.logits[0, :5], expected[0, :5], 1e-5)
    for wrong, match in (
        ([[1, 1], [1]], "attention_mask is a list that is no rectangle of numbers"),
        (torch.full(ids.shape, 0.5), "attention_mask holds other numbers than 1 and 0"),
        (torch.zeros(ids.shape) - torch.inf, "attention_mask holds other numbers than 1 and 0"),
        ([1, 1], r"attention_mask has shape \[2\], but the token ids have \[2, 7\]"),
    ):
        with pytest.raises(ValueError, match=match):
            capture(model, ids, attention_mask=wrong)
    with pytest.raises(ValueError, match="The input is a list, which is neither text nor a rect"):
        capture(model, [ids[0], ids[1, 2:]])


@wrapped
@pytest.mark.parametrize("encoded", [True, False])
def test_token_type_ids_are_refused_by_name(encoded):
    """GPT-2 adds their embedding; Llama does not know them, and its own call ignores them."""
    with quiet():
        model = build_hf(*BRIDGE["gpt2"], torch.float32)
    ids = tokens(1)
    both = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    given = ((both,), {}) if encoded else ((ids,), {"token_type_ids": both["token_type_ids"]})
    with pytest.raises(ValueError, match=r"token_type_ids adds an embedding .* Call without it"):
        capture(model, *given[0], **given[1])
    assert capture(llama(), both).completeness_error < 1e-5


@wrapped
def test_a_tuple_of_texts():
    own, model = tokenizer(**NAMES), llama()
    expected = capture(model, TEXTS, tokenizer=own)
    assert torch.equal(capture(model, tuple(TEXTS)).logits, expected.logits)


def test_lists_of_prompts():
    """Any iterable; a mapping is no list of its keys; each entry is one prompt."""
    ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
    enc = {"input_ids": ids, "attention_mask": [[1, 1, 1], [1, 1, 0]]}
    rows = [[3, 4, 5], [6, 7]]
    pad = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for given, mask in (
        (enc, None),
        (ids, enc["attention_mask"]),
        ((row for row in rows), None),
        ([{"input_ids": row} for row in rows], None),
    ):
        assert [p.tolist() for p in each_prompt(given, pad, mask)] == rows
    own = [
        torch.tensor(row) for row in ([3, 4, 5], [6, 7, 0])
    ]  # ids of one prompt each: no padding
    assert [p.tolist() for p in each_prompt(own, pad)] == [[3, 4, 5], [6, 7, 0]]
    assert each_prompt((t for t in TEXTS), pad) == TEXTS == each_prompt(tuple(TEXTS), pad)
    for wrong, match in (
        ("we", "prompts='we' is not a non-empty list. Put a single prompt in a list"),
        ((x for x in ()), "prompts=.* is not a non-empty list"),
        (7, "prompts=7 is not a non-empty list"),
        ({"we": 1}, "prompts=.'we': 1. is not a non-empty list"),
        (ids[0], "prompts are token ids of one dimension"),
        (["we", ids], r"prompts\[1\] has ids of shape \[2, 3\], which are 2 prompts"),
        (ids, r"prompt 1 ends in the padding token \(id 0\) and others do not"),
    ):
        with pytest.raises(ValueError, match=match):
            each_prompt(wrong, pad)


@pytest.mark.parametrize(
    "row, pad, refused",
    [
        ([0, 0, 5, 6], "apart", "begins"),
        ([5, 6, 0], "apart", "ends"),
        ([1, 5, 6], "bos", None),
        ([1, 1, 5], "bos", "begins"),
        ([5, 6, 1], "bos", None),
        ([5, 1, 1], "bos", "ends"),
        ([2, 1, 5], "eos", "begins"),
        ([2, 5, 6], "eos", None),
        ([5, 6, 2], "eos", None),
    ],
)
def test_one_prompt_of_ids_with_padding(row, pad, refused):
    """What can only be padding is refused; a special token that may be meant is run."""
    special = SimpleNamespace(
        pad_token_id={"apart": 0, "bos": 1, "eos": 2}[pad], bos_token_id=1, eos_token_id=2
    )
    ids = torch.tensor([row])
    if refused is not None:
        match = rf"prompt 0 {refused} in the padding token .* Pass strings, or the attention_mask"
        with pytest.raises(ValueError, match=match):
            mask_spans(None, ids, special)
    assert mask_spans([1] * len(row), ids, special) == [(0, len(row))]
    if refused is None:
        assert mask_spans(None, ids, special) == [(0, len(row))]


@wrapped
def test_results_say_what_was_put_in_front():
    with quiet():
        model = tensorlens_tl.wrap(llama(), tokenizer(**NAMES))
    for options, first, words in (
        ({}, "<s>", "<s> added in front"),
        ({"prepend_bos": False}, "", "no token added in front"),
    ):
        lens = capture(model, "we went home", **options)
        found = lens.attribute(4)
        results = (
            found,
            lens.paths(4, k=1),
            lens.token_matrix("rollout"),
            lens.token_scores("in", 4),
        )
        for result in (lens, *results, lens[0], lens.attribute_sequence("home")):
            assert words in repr(result)
        assert found.convention.first_token == first
        assert type(found).from_json(found.to_json()).convention.first_token == first
    lens = capture(model, model.to_tokens("we went home"))
    assert lens.convention.first_token is None and "in front" not in repr(lens)
    assert lens.convention == found.convention  # the gate alone must agree between two runs


def test_an_empty_target_gets_no_empty_suggestions():
    own = SimpleNamespace(tokenizer=tokenizer("Ġ <unk> we", unk_token="<unk>"))
    with pytest.raises(ValueError, match=r"target='' is not known .* Pass a known token, or a"):
        token_id(own, "")
    with pytest.raises(ValueError, match="such as 'we'"):
        token_id(own, "wee")


@wrapped
def test_results_of_many_prompts_say_what_was_put_in_front():
    with quiet():
        model = tensorlens_tl.wrap(llama(), tokenizer(**NAMES))
    text, twin = ["we went home"], ["we went went"]
    for clean, corrupted, first in (
        (text, twin, "<s>"),
        (model.to_tokens(text[0]), model.to_tokens(twin[0]), None),
    ):
        mean = tensorlens_tl.mean_attribution(model, clean)
        lens = capture(model, clean)
        results = (
            mean,
            MeanAttribution.from_json(mean.to_json()),
            lens.logit_lens(),
            evaluate(model, list(clean), ["random"], progress=False),
            tensorlens_tl.faithfulness(model, clean, [], corrupted),
            tensorlens_tl.faithfulness_curve(model, clean, [], corrupted, sizes=(0.5, 1.0)),
        )
        for result in results:
            of = result if hasattr(result, "first_token") else result.convention
            assert of.first_token == first
            assert ("<s> added in front" in repr(result)) == (first is not None)
    old = json.loads(mean.to_json())
    del old["convention"]  # as earlier builds wrote it
    assert MeanAttribution.from_json(json.dumps(old)).convention.first_token is None
