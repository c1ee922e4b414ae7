"""Saved lenses: equal to the bit after loading, and whatever is wrong with a file is refused."""

import contextlib
import json
import os
import re
import struct
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from models import PER_SHAPE, SHAPES
from safetensors import safe_open
from safetensors.torch import save_file

import tensorlens_tl
from tensorlens_tl import Attribution, CaptureMismatchError, demo
from tensorlens_tl.lens.tensor_lens import TensorLens
from tensorlens_tl.saving import saved_file as saving
from tensorlens_tl.saving import saved_tree as headers
from tensorlens_tl.saving import saved_vocabulary

pytestmark = pytest.mark.algebra

every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)
FIRST = SHAPES[0]
NEEDS_MODEL = re.escape("Pass model= to tensorlens_tl.load")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lens.safetensors"


@pytest.fixture
def lens():
    return models.lens_of(FIRST)


def assert_same_answers(ours: TensorLens, theirs: TensorLens) -> None:
    x = models.randn_like(theirs.embedding)
    assert torch.equal(ours.operator @ x, theirs.operator @ x)
    assert torch.equal(ours.operator.T @ x, theirs.operator.T @ x)
    assert torch.equal(ours.operator.bias, theirs.operator.bias)
    assert torch.equal(ours.readout(x), theirs.readout(x))
    assert ours.verify() == theirs.verify()
    for by in ("token", "component"):
        assert_same_attribution(ours.attribute(3, by=by), theirs.attribute(3, by=by))
    site = theirs.operator.sites[1]
    last = theirs.operator.sites[-1]
    assert torch.equal(ours.between(site, last) @ x, theirs.between(site, last) @ x)
    assert_same_record(ours, theirs)


def assert_same_record(ours: TensorLens, theirs: TensorLens) -> None:
    assert repr(ours) == repr(theirs) and len(ours) == len(theirs)
    assert ours.tokens == theirs.tokens and ours.convention == theirs.convention
    assert (
        ours.logits.dtype == theirs.logits.dtype and ours.embedding.dtype == theirs.embedding.dtype
    )
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.embedding, theirs.embedding)
    assert (
        ours.capture_check == theirs.capture_check and ours.capture.checks == theirs.capture.checks
    )
    assert torch.equal(ours.capture.prompts.tokens, theirs.capture.prompts.tokens)
    assert ours.capture.frame == theirs.capture.frame


def assert_same_attribution(ours: Attribution, theirs: Attribution) -> None:
    assert torch.equal(ours.values, theirs.values) and ours.values.dtype == theirs.values.dtype
    assert torch.equal(ours.target_value, theirs.target_value)
    assert ours.target_value.dtype == theirs.target_value.dtype
    for name in ("sources", "labels", "by", "target", "sums_to_target", "convention", "spans"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.completeness_error == theirs.completeness_error


# --- There and back ------------------------------------------------------------------------------


@every_case
def test_with_the_model_everything_is_equal_and_weights_are_the_models_own(case, path):
    lens = models.lens_of(case)
    lens.save(path)
    loaded = tensorlens_tl.load(path, model=case.model())
    assert_same_answers(loaded, lens)
    pairs = zip(loaded.capture.blocks, lens.capture.blocks, strict=True)
    for ours, theirs in pairs:
        assert ours.attn.weights.W_O.data_ptr() == theirs.attn.weights.W_O.data_ptr()
    assert (
        loaded.capture.unembed.weights.W_U.data_ptr() == lens.capture.unembed.weights.W_U.data_ptr()
    )


@every_case
def test_self_contained_files_need_no_model(case, path):
    lens = models.lens_of(case)
    lens.save(path, weights=True)
    loaded = tensorlens_tl.load(path)
    assert_same_answers(loaded, lens)
    ours, theirs = (x.capture.unembed.weights.W_U for x in (loaded, lens))
    assert ours.data_ptr() != theirs.data_ptr() and ours.stride() == theirs.stride()
    attached = tensorlens_tl.load(path, model=case.model())
    assert attached.capture.unembed.weights.W_U.data_ptr() == theirs.data_ptr()
    assert torch.equal(attached.operator.bias, lens.operator.bias)


@pytest.mark.parametrize("case", models.GATED[:1], ids=str)
@pytest.mark.parametrize("gate", ["gate", "up", "half"])
def test_conventions_are_kept(case, gate, path):
    lens = models.lens_of(case, gate=gate)
    lens.save(path)
    loaded = tensorlens_tl.load(path, model=case.model())
    assert loaded.convention.gate == gate
    assert_same_answers(loaded, lens)
    assert_same_answers(loaded.with_convention("up"), lens.with_convention("up"))


def test_float32(path):
    lens = models.lens_of(FIRST, torch.float32)
    lens.save(path, weights=True)
    assert_same_answers(tensorlens_tl.load(path), lens)
    assert_same_answers(tensorlens_tl.load(path, FIRST.model(torch.float32)), lens)


def _bfloat16_lenses():
    # Random weights this large amplify bfloat16's rounding: some captures are refused.
    for case in SHAPES:
        with contextlib.suppress(CaptureMismatchError):
            yield models.lens_of(case, torch.bfloat16), case.model(torch.bfloat16)


def test_a_bfloat16_model(path):
    lens, model = next(_bfloat16_lenses())
    assert lens.logits.dtype == torch.bfloat16 and lens.embedding.dtype == torch.float32
    lens.save(path, weights=True)
    assert_same_answers(tensorlens_tl.load(path), lens)
    assert_same_answers(tensorlens_tl.load(path, model), lens)


def test_padded_batches_and_one_prompt_of_them(path):
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with models.quiet(), torch.no_grad():
        model = FIRST.model()
        lens = tensorlens_tl.capture(model, models.tokens(), attention_mask=mask)[1]
    assert lens.capture.frame.spans == ((0, 7), (0, 4))
    lens.save(path)
    whole = tensorlens_tl.load(path, model=model)
    assert_same_answers(whole, lens)
    assert_same_answers(whole[1], lens[1])
    lens[1].save(path)
    one = tensorlens_tl.load(path, model=model)
    assert_same_answers(one, lens[1])
    assert len(one) == 1 and one.embedding.shape[1] == 4


def test_edits_by_the_users_own_hooks_are_kept(path):
    model = FIRST.model()
    point = model.hook_dict["blocks.0.attn.hook_z"]
    point.add_hook(lambda z, hook: 1.5 * z)
    try:
        lens = models.lens_of(FIRST)
    finally:
        point.remove_hooks()
    plain = models.lens_of(FIRST)
    assert not torch.equal(lens.logits, plain.logits)
    lens.save(path)
    assert_same_answers(tensorlens_tl.load(path, model=model), lens)


def test_what_is_loaded_is_independent_of_the_file_and_shared_memory_is_stored_once(lens, path):
    capture = lens.capture
    shared = replace(capture, resid_final=capture.blocks[0].resid_pre)
    TensorLens(shared).save(path)
    loaded = tensorlens_tl.load(path, model=FIRST.model())
    assert loaded.capture.resid_final is loaded.embedding
    path.write_bytes(b"")
    assert torch.equal(loaded.embedding, lens.embedding)


def test_views_of_one_memory_are_saved(lens, path):
    capture = lens.capture
    both = torch.stack([capture.embed, capture.resid_final])
    view = replace(
        capture,
        embeddings={**capture.embeddings, "embed": both[0]},
        resid_final=both[1],
        logits=both.new_zeros(1).expand(capture.logits.shape),
    )
    TensorLens(view).save(path)
    loaded = tensorlens_tl.load(path).capture
    assert torch.equal(loaded.embed, capture.embed)
    assert torch.equal(loaded.resid_final, capture.resid_final)
    assert torch.equal(loaded.logits, torch.zeros_like(capture.logits))


def test_a_saved_lens_reads_words_without_its_model(path):
    """Its tokenizer's own JSON is in the file, with words that were added; nothing is executed."""
    tokenizer = deepcopy(demo.load_model().tokenizer)
    tokenizer.add_tokens(["Quux"])
    lens = demo.load_model().run_with_tensorlens("The capital of France is")[1]
    TensorLens(replace(lens.capture, tokenizer=tokenizer)).save(path, weights=True)
    loaded = tensorlens_tl.load(path)
    assert torch.equal(loaded.attribute("Paris").values, lens.attribute("Paris").values)
    with pytest.raises(ValueError, match="target='Brie' is not known to the tokenizer"):
        loaded.attribute("Brie")
    ours, every = loaded.capture.tokenizer, range(len(tokenizer))
    assert [ours.decode([i]) for i in every] == [tokenizer.decode([i]) for i in every]
    for text in ("The Quux of France", " Paris", "", "<pad>"):
        assert ours.encode(text, add_special_tokens=False) == tokenizer.encode(
            text, add_special_tokens=False
        )
    assert ours.special_tokens_map == tokenizer.special_tokens_map
    loaded.save(path, weights=True)  # from a file into a file
    assert tensorlens_tl.load(path).attribute("Paris").target == ("'Paris'",)


@pytest.mark.parametrize("text", ["", "!", "eJw=", None], ids=["empty", "no text", "cut", "other"])
def test_damaged_or_missing_tokenizers(text, path):
    _, lens = demo.load_model().run_with_tensorlens("The capital")
    lens.save(path, weights=True)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    del metadata["tensorlens_tl tokenizer"]
    if text is not None:
        save_file(tensors, path, metadata | {"tensorlens_tl tokenizer": text})
        with pytest.raises(ValueError, match="is damaged: its tokenizer cannot be read"):
            tensorlens_tl.load(path)
        return
    save_file(tensors, path, metadata)  # as files of earlier releases
    loaded = tensorlens_tl.load(path)
    assert torch.equal(loaded.attribute(5).values, lens.attribute(5).values)
    with pytest.raises(ValueError, match=r"no tokenizer. Pass .* load\(path, model=model\)"):
        loaded.attribute("Paris")
    model = demo.load_model()
    assert tensorlens_tl.load(path, model=model).attribute("Paris").target == ("'Paris'",)


def test_a_vocabulary_is_packed_once(tmp_path, monkeypatch):
    packed, pack = [], saved_vocabulary.zlib.compress
    saved_vocabulary._packed.cache_clear()
    monkeypatch.setattr(saved_vocabulary.zlib, "compress", lambda x: packed.append(1) or pack(x))
    model = demo.load_model()
    for i, prompt in enumerate(("The capital", "The key", "The")):
        model.run_with_tensorlens(prompt)[1].save(tmp_path / str(i))
    assert len(packed) == 1
    model.tokenizer.add_tokens(["one more"])
    model.run_with_tensorlens("The")[1].save(tmp_path / "other")
    assert len(packed) == 2


def test_the_models_tokenizer_is_attached_and_one_without_json_is_not_saved(lens, path):
    class Tokenizer:
        def encode(self, text, add_special_tokens=False):
            return [3]

        def decode(self, ids):
            return f"<{ids[0]}>"

    model = FIRST.model()
    TensorLens(replace(lens.capture, tokenizer=Tokenizer())).save(path, weights=True)
    with pytest.raises(ValueError, match="target='x' is a string, but the model has no tokenizer"):
        tensorlens_tl.load(path).attribute("x")
    before, model.tokenizer = model.tokenizer, Tokenizer()
    try:
        loaded = tensorlens_tl.load(path, model=model)
    finally:
        model.tokenizer = before
    assert loaded.attribute("x").target == ("'<3>'",) * 2


# --- Without weights -----------------------------------------------------------------------------


def test_without_weights_records_are_served(lens, path):
    lens.save(path)
    loaded = tensorlens_tl.load(path)
    assert_same_record(loaded, lens)
    assert_same_record(loaded[1], lens[1])
    assert_same_record(next(iter(loaded)), lens[0])
    assert "not loaded" in repr(loaded.capture.unembed)


@pytest.mark.parametrize(
    "ask",
    [
        lambda lens: lens.operator,
        lambda lens: lens.operator @ lens.embedding,
        lambda lens: lens.readout(lens.embedding),
        lambda lens: lens.attribute(3),
        lambda lens: lens.attribute(3, by="component"),
        lambda lens: lens.attribute(torch.ones(lens.embedding.shape[-1])),
        lambda lens: lens.verify(),
        lambda lens: lens.completeness_error,
        lambda lens: lens.between("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"),
        lambda lens: lens[0].verify(),
        lambda lens: lens.with_convention("half").operator,
        lambda lens: lens.save("never", weights=True),
        lambda lens: lens.capture.unembed.weights.soft_cap,
        lambda lens: lens.capture.blocks[0].attn.nodes(),
    ],
)
def test_without_weights_the_operator_asks_for_the_model(lens, path, ask):
    lens.save(path)
    with pytest.raises(ValueError, match=NEEDS_MODEL):
        ask(tensorlens_tl.load(path))


def test_a_lens_without_weights_is_saved_again(lens, path):
    lens.save(path)
    tensorlens_tl.load(path)[1].save(path)
    assert_same_answers(tensorlens_tl.load(path, model=FIRST.model()), lens[1])


# --- The wrong model -----------------------------------------------------------------------------


def _parameters() -> list[str]:
    """Names of parameters that the operator uses: those whose storage a capture refers to."""
    used = {t.untyped_storage().data_ptr() for t in models.lens_of(FIRST).capture.tensors(False)}
    named = FIRST.model().named_parameters()
    # Queries and keys are no part of an operator: a wrong one is found by the run's pattern.
    others = (".q.", ".k.", "qkv", "W_Q", "W_K", "b_Q", "b_K")
    found = [
        name
        for name, p in named
        if p.untyped_storage().data_ptr() in used and not any(q in name for q in others)
    ]
    return found[:: max(1, len(found) // 9)]


@pytest.mark.parametrize("weights", [False, True])
def test_an_edited_weight_is_found_and_named(lens, path, weights):
    """Two elements exchanged, or one off by 1e-6: by turns, where the file has weights, too."""
    lens.save(path, weights=weights)
    model = FIRST.model()
    for i, name in enumerate(_parameters()):
        parameter = dict(model.named_parameters())[name].data
        parameter = parameter if parameter.ndim == 1 else parameter[0]
        parameter = parameter if parameter.ndim == 1 else parameter[0]
        kept = parameter[:2].clone()
        edits = kept.flip(0), kept + torch.tensor([1e-6, 0.0]).to(kept)
        for edited in edits[i % 2 : i % 2 + 1] if weights else edits:
            parameter[:2] = edited
            try:
                with pytest.raises(ValueError, match=r"has other values.*Pass that model"):
                    tensorlens_tl.load(path, model=model)
            finally:
                parameter[:2] = kept
    tensorlens_tl.load(path, model=model)


def test_another_architecture_and_another_dtype_are_refused(lens, path):
    lens.save(path)
    with pytest.raises(ValueError, match=r"is float32 \[.*\], expected float64"):
        tensorlens_tl.load(path, model=FIRST.model(torch.float32))
    others = [case for case in SHAPES[1:] if case.host == FIRST.host]
    refused = 0
    for case in others:
        with pytest.raises(ValueError, match=r"The model .* is not the one that .* was made with"):
            tensorlens_tl.load(path, model=case.model())
        refused += 1
    assert refused > 5
    with pytest.raises(ValueError, match="neither a HookedTransformer nor a TransformerBridge"):
        tensorlens_tl.load(path, model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="device='meta' does not fit the model, which is on cpu"):
        tensorlens_tl.load(path, model=FIRST.model(), device="meta")


def test_a_model_with_other_layers_is_refused(lens, path):
    one = replace(lens.capture, blocks=lens.capture.blocks[:1])
    TensorLens(one).save(path)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn is AttentionWeights, expected None"):
        tensorlens_tl.load(path, model=FIRST.model())


def test_the_fingerprint_sees_every_element_and_every_exchange():
    W = models.randn_like(torch.empty(6, 5, 4, dtype=torch.float64))
    whole = headers.products(W)
    assert headers.agree(whole, headers.products(W.clone()))
    assert headers.agree(whole, headers.products(W.mT.contiguous().mT))
    assert not headers.agree(whole, headers.products(W.mT.contiguous()))
    flat = W.flatten()
    for i in range(flat.numel()):
        edited = flat.clone()
        edited[i] += 1e-8
        assert not headers.agree(whole, headers.products(edited.view_as(W)))
        edited = flat.clone()
        edited[[0, i]] = edited[[i, 0]]
        assert i == 0 or not headers.agree(whole, headers.products(edited.view_as(W)))
    assert not headers.agree(whole, headers.products(W.flip(0)))
    bad = W.clone()
    bad[0] = float("nan")
    assert headers.agree(headers.products(bad), headers.products(bad))
    assert not headers.agree(whole, headers.products(bad))
    assert not headers.agree(headers.products(bad), whole)


# --- Damaged and foreign files -------------------------------------------------------------------


def unpack(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def pack(path: Path, table: dict, data: bytes) -> None:
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(path: Path, change) -> None:
    table, data = unpack(path)
    header = json.loads(table["__metadata__"]["tensorlens_tl"])
    header = change(header) or header
    table["__metadata__"]["tensorlens_tl"] = json.dumps(header)
    pack(path, table, data)


def refuse(path: Path, match: str) -> None:
    match += "|TypeCheckError"  # run-time type checks, where they are on, come first
    with pytest.raises(ValueError, match=match) as caught:
        tensorlens_tl.load(path)
    assert re.search(
        "Save the lens again|save or copy it|save the lens again|Pass one that lens.save",
        str(caught.value),
    )
    with pytest.raises(ValueError, match=match):
        tensorlens_tl.load(path, model=FIRST.model())


def test_truncated_files(lens, path):
    lens.save(path)
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    for length in (0, 1, 7, 8, 9, n // 2, n + 7, n + 8, n + 9, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        refuse(path, "is no whole safetensors file")
    path.write_bytes(raw + b"\0")
    refuse(path, "is no whole safetensors file")


def test_foreign_files(path):
    with pytest.raises(ValueError, match="There is no file"):
        tensorlens_tl.load(path)
    with pytest.raises(ValueError, match="There is no file"):
        tensorlens_tl.load(path.parent)
    path.write_text("Once upon a time there was a text file.\n" * 10)
    refuse(path, "is no whole safetensors file")
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refuse(path, "is no whole safetensors file")
    save_file({"a": torch.zeros(3)}, path)
    refuse(path, "but no saved lens")
    save_file({"a": torch.zeros(3)}, path, metadata={"format": "pt"})
    refuse(path, "but no saved lens")
    for text in ("{", "[]", "3", "{}", "[" * 100_000, '{"format": "else", "version": 1}'):
        save_file({"a": torch.zeros(3)}, path, metadata={"tensorlens_tl": text})
        refuse(path, "header is not that of a lens|has version None")


EMBED = "embeddings.embed"


def _embedded(header):
    return header["capture"]["embeddings"]["items"][0][1]


def test_sizes_are_checked_before_memory_is_taken(lens, path):
    lens.save(path)
    table, data = unpack(path)
    for shape in ([10**12], [2**40, 2**40], [2**63]):
        n = 8
        for size in shape:
            n *= size
        for end in (table[EMBED]["data_offsets"][1], n % 2**64):
            begin = table[EMBED]["data_offsets"][0]
            entry = {"dtype": "F64", "shape": shape, "data_offsets": [begin, end]}
            pack(path, {**table, EMBED: entry}, data)
            refuse(path, "is no whole safetensors file")
    for shape in ([0, 10**15], [2**50, 7, 32], [2, 7, True], [2, -7, 32], [2.0, 7, 32], "abc"):
        lens.save(path)
        edit_header(path, lambda header, shape=shape: _embedded(header).update(shape=shape))
        refuse(path, "is damaged: ")


def test_versions(lens, path):
    lens.save(path)
    for version in (0, 2, "1", None):
        edit_header(path, lambda header, version=version: header.update(version=version))
        refuse(path, f"has version {version!r} of the format, but only version 1")


def test_missing_and_unknown_tensors(lens, path):
    lens.save(path)
    table, data = unpack(path)
    renamed = {("other" if name == "resid_final" else name): v for name, v in table.items()}
    pack(path, renamed, data)
    refuse(path, "is damaged: .*(resid_final|other)")
    lens.save(path)

    def forget(header):
        header["capture"]["embeddings"]["items"].pop()

    if lens.capture.pos_embed is not None:
        edit_header(path, forget)
        refuse(path, "tensor embeddings.pos_embed is unknown")


def test_a_stored_tensor_of_another_shape_or_dtype(lens, path):
    for change in (
        {"shape": [7, 2, 32]},
        {"shape": [2 * 7 * 32]},
        {"dtype": "I64"},
        {"dtype": "U64"},
    ):
        lens.save(path)
        table, data = unpack(path)
        table[EMBED] |= change
        pack(path, table, data)
        refuse(path, "embed: expected F64 of shape .*, got")


def _set(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(header):
        for key in keys:
            header = header[key]
        header[last] = value

    return change


def _both(dtype, code):
    # Header and table agree on a wrong dtype.
    def change(table):
        header = json.loads(table["__metadata__"]["tensorlens_tl"])
        _embedded(header)["dtype"] = dtype
        table["__metadata__"]["tensorlens_tl"] = json.dumps(header)
        table[EMBED]["dtype"] = code

    return change


def test_a_dtype_that_header_and_table_agree_on(lens, path):
    lens.save(path)
    table, data = unpack(path)
    _both("int64", "I64")(table)
    pack(path, table, data)
    refuse(path, r"lens\.embeddings\.embed: expected Float.*got torch\.int64")


BLOCK = ("capture", "blocks", 0)
FIRST_SOURCE = ("capture", "embeddings", "items", 0, 1)
HEADER_EDITS = {
    "frame dtype": (_set("frame", "dtype", "name", "float32"), "float64 .*float32"),
    "frame dtype is no compute dtype": (_set("frame", "dtype", "name", "int64"), "compute dtype"),
    "unknown dtype": (_set("frame", "dtype", "name", "float4"), "expected a dtype"),
    "positions": (_set("frame", "n_pos", 10**12), "expected shape"),
    "positions below": (_set("frame", "n_pos", 3), "spans within 0 to 3"),
    "spans": (_set("frame", "spans", [[0, 7], [0, 9]]), "spans within"),
    "one span": (_set("frame", "spans", [[0, 7]]), "expected shape"),
    "span of three": (_set("frame", "spans", [[0, 7, 8], [0, 7, 8]]), "expected 2 values, got 3"),
    "span of text": (_set("frame", "spans", ["07", "07"]), "expected tuple"),
    "other spans": (_set("capture", "prompts", "spans", [[0, 7], [0, 6]]), "prompts: expected"),
    "strings": (_set("capture", "prompts", "strings", [["a"], ["b"]]), "prompts: expected"),
    "ids for strings": (
        _set("capture", "prompts", "strings", [[1] * 7] * 2),
        "expected <class 'str'>",
    ),
    "no blocks": (_set("capture", "blocks", []), "damaged"),
    "no checks": (_set("capture", "checks", "items", []), "at least one block"),
    "text for a check": (
        _set("capture", "checks", "items", [["a", "b"]]),
        "expected <class 'float'>",
    ),
    "list for a check": (
        _set("capture", "checks", "items", [[["a"], 1.0]]),
        "expected <class 'str'>",
    ),
    "gate": (_set("capture", "convention", "gate", "open"), "is not known. Pass one of gate, up"),
    "class": (
        _set("capture", "convention", "$", "Popen"),
        "expected a part of a lens, got 'Popen'",
    ),
    "library class": (
        _set("capture", "convention", "$", "TensorLens"),
        "expected a part of a lens",
    ),
    "builder": (_set("capture", "convention", "$", "Builder"), "expected a part of a lens"),
    "other part": (
        _set("capture", "convention", {"$": "Frame"}),
        "expected .*Convention.*got Frame",
    ),
    "unknown field": (_set("capture", "more", 1), "Capture has no more"),
    "lost field": (_set("capture", {"$": "Capture"}), "damaged"),
    "no capture": (_set("capture", 3), "expected .*Capture.*got int"),
    "no header": (_set("frame", None), "damaged"),
    "attention is none": (_set(*BLOCK, "attn", None), "expected .*Attention.*got NoneType"),
    "norm as attention": (_set(*BLOCK, "attn", "$", "Norm"), "Norm has no"),
    "weights of another class": (
        _set(*BLOCK, "attn", "weights", "$", "NormWeights"),
        "NormWeights has no",
    ),
    "wide weights": (_set(*BLOCK, "attn", "weights", "W_O", "shape", [4, 8, 33]), "expected shape"),
    "heads": (_set(*BLOCK, "attn", "weights", "W_O", "shape", [5, 8, 32]), "Two maps do not fit"),
    "layer": (_set(*BLOCK, "attn", "layer", "0"), "expected <class 'int'>, got str"),
    "model name": (_set("capture", "model_name", 1), "expected <class 'str'>, got int"),
    "no key": (
        _set(
            *FIRST_SOURCE,
            {"$": "tensor", "dtype": "float64", "shape": [2, 7, 32], "products": ["0.0", "0.0"]},
        ),
        "embed has no tensor",
    ),
    "weights maybe": (_set("weights", None), "does not say whether it holds weights"),
    "weights said to be there": (_set("weights", True), "has no tensor"),
    "order": (_set(*FIRST_SOURCE, "order", [0, 0, 1]), "expected an order of axes"),
    "products": (_set(*FIRST_SOURCE, "products", ["a", "b"]), "damaged"),
    "another tensor": (
        _set(*FIRST_SOURCE, "key", "resid_final"),
        "tensor embeddings.embed is unknown",
    ),
    "key": (_set(*FIRST_SOURCE, "key", [1]), "damaged"),
    "fingerprint of the data": (
        _set(*FIRST_SOURCE, "products", ["1.0", "2.0"]),
        "the values of embeddings.embed are not those that were saved",
    ),
}


@pytest.mark.parametrize("edit", HEADER_EDITS)
def test_edited_headers(lens, path, edit):
    change, match = HEADER_EDITS[edit]
    lens.save(path)
    edit_header(path, change)
    refuse(path, match)


def test_a_norms_width_is_checked_before_memory_is_taken(lens, path):
    norms = [name for name in ("ln1", "ln2") if getattr(lens.capture.blocks[0], name) is not None]
    assert norms
    for name in norms:
        lens.save(path)
        edit_header(path, _set("capture", "blocks", 0, name, "width", 10**13))
        refuse(path, "is damaged: ")


def test_flipped_bits_in_the_data(lens, path):
    lens.save(path)
    raw = path.read_bytes()
    table, data = unpack(path)
    start = len(raw) - len(data)
    for name in (EMBED, "logits", "blocks.1.attn.mix.pattern"):
        begin, end = (start + offset for offset in table[name]["data_offsets"])
        at = begin + (end - begin) // 16 * 8 + 6  # the exponent of a float64
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        refuse(path, f"the values of {re.escape(name)} are not those that were saved")


# --- Writing -------------------------------------------------------------------------------------


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError("disk full"), Interruption()])
@pytest.mark.parametrize("where", ["save_file", "replace", "fsync"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    lens, path, monkeypatch, error, where
):
    lens.save(path)
    before = path.read_bytes()

    def half(tensors, target, metadata=None):
        Path(target).write_bytes(b"half")
        raise error

    def fail(*args):
        raise error

    if where == "save_file":
        monkeypatch.setattr(saving, "save_file", half)
    else:
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        lens.save(path, weights=True)
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == before
    monkeypatch.undo()
    lens.save(path, weights=True)
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() != before


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(lens, path):
    with pytest.raises(ValueError, match=r"cannot be written. Pass a file in a folder that exists"):
        lens.save(path / "deeper")
    with pytest.raises(ValueError, match=r"cannot be written. Pass a file"):
        lens.save(path.parent)
    writer = headers.Writer(lens.capture.frame, False)
    with pytest.raises(
        ValueError, match=r"Cannot save checks\.a, which holds an object of class object"
    ):
        writer.node({"a": object()}, "checks")
    with pytest.raises(ValueError, match="Cannot save logits of complex64"):
        writer.node(torch.zeros(2, dtype=torch.complex64), "logits")
    assert os.listdir(path.parent) == []


def test_links_are_followed(lens, path):
    link = path.with_name("link")
    link.symlink_to(path)
    lens.save(link)
    assert link.is_symlink() and path.is_file()
    assert_same_record(tensorlens_tl.load(link), lens)


def test_nothing_executable_is_read_or_written():
    for module in (saving, headers):
        source = Path(module.__file__).read_text()
        for word in ("pickle", "eval(", "exec(", "torch.load", "import_module", "marshal"):
            assert word not in source


# --- Attributions --------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("by", ["token", "component"])
def test_attributions_survive_json(case, by):
    for dtype in (torch.float64, torch.float32):
        found = models.lens_of(case, dtype).attribute(3, versus=4, by=by)
        assert found.values.dtype == dtype
        again = Attribution.from_json(found.to_json())
        assert_same_attribution(again, found)
        assert again.to_json() == found.to_json() and repr(again) == repr(found)
        assert_same_attribution(again[1], found[1])


def test_odd_labels_and_numbers_survive_json(lens):
    found = lens[0].attribute(3)
    labels = tuple(f'"{i}\n\\ ü 猫 \ud83d' for i in range(len(found.sources)))
    values = found.values.clone()
    values[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    odd = replace(found, labels=(labels,), values=values, sums_to_target=False)
    text = odd.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = Attribution.from_json(text)
    assert again.labels == odd.labels and again.sums_to_target is False
    assert torch.equal(again.values.view(torch.int64), odd.values.view(torch.int64))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "else"},
        {"dtype": "float16"},
        {"values": [[1.0]]},
        {"values": [[1.0], [1.0, 2.0]]},
        {"values": [["x"]]},
        {"values": 3},
        {"labels": []},
        {"labels": 3},
        {"spans": []},
        {"target": ["a"]},
        {"target_value": []},
        {"sources": [3]},
        {"sources": [[["embed"], 0, 0]]},
        {"convention": {"gate": "open"}},
        {"convention": {"door": 1}},
        {"more": 1},
    ],
    ids=str,
)
def test_other_json_is_no_attribution(lens, change):
    data = json.loads(lens.attribute(3).to_json()) | change
    with pytest.raises(ValueError, match="The text is not an attribution as to_json writes it"):
        Attribution.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", "null", "[" * 100_000])
def test_other_text_is_no_attribution(text):
    with pytest.raises(ValueError, match="The text is not an attribution as to_json writes it"):
        Attribution.from_json(text)
