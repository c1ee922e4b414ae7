"""Copies of lenses: pickled, deep-copied, on another device, and of some prompts of a batch."""

import copy
import io
import pickle

import models
import pytest
import torch
from models import PER_SHAPE, SHAPES

import tensorlens_tl
from tensorlens_tl import TensorLens, demo

every_shape = pytest.mark.parametrize("case", PER_SHAPE, ids=str)
FIRST = SHAPES[0]


def pickled(lens):
    return pickle.loads(pickle.dumps(lens))


def saved_by_torch(lens):
    file = io.BytesIO()
    torch.save(lens, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def ragged(case):
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]])
    # A masked float64 run of Gemma-2 overflows in its host.
    padding = {} if case.name == "bridge-gemma2" else {"attention_mask": mask}
    with models.quiet():  # with a graph, as by default
        return tensorlens_tl.capture(case.model(), models.tokens(3), **padding)[1]


@every_shape
def test_copies_answer_to_the_bit(case):
    lens = ragged(case)
    expected = lens.attribute(3)  # caches an operator and its gradients, which no copy takes along
    for copied in (pickled, copy.deepcopy, copy.copy, saved_by_torch):
        twin = copied(lens)
        assert isinstance(twin, TensorLens) and repr(twin) == repr(lens)
        assert torch.equal(twin.attribute(3).values, expected.values), copied
        assert twin.tokens == lens.tokens and torch.equal(twin.logits, lens.logits)
        assert twin.verify() == lens.verify()


def test_pickles_hold_one_prompt_and_no_other():
    lens = ragged(FIRST)
    whole, one = (len(pickle.dumps(x)) for x in (lens, lens[1]))
    assert one < whole
    assert torch.equal(pickled(lens[1]).attribute(3).values, lens[1].attribute(3).values)


def test_a_lens_without_weights_is_pickled_without(tmp_path):
    lens = ragged(FIRST)
    lens.save(tmp_path / "l.safetensors")
    bare = tensorlens_tl.load(tmp_path / "l.safetensors")
    twin = pickled(bare)
    assert torch.equal(twin.logits, lens.logits)
    with pytest.raises(ValueError, match="loaded without the model's weights"):
        twin.attribute(3)


def test_a_pickle_needs_nothing_of_this_process():
    """What it names is in installed packages: a class made by a test or a script would not be."""
    _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
    modules: set[str] = set()

    class Elsewhere(pickle.Unpickler):
        def find_class(self, module, name):
            modules.add(module.split(".")[0])
            return super().find_class(module, name)

    read = Elsewhere(io.BytesIO(pickle.dumps(lens))).load()
    assert read.attribute("Paris").top(1)[0][0] == '"France"@4'
    assert read.prompt == "<bos> The capital of France is"
    assert modules <= {"builtins", "collections", "numpy", "torch", "tensorlens_tl"} | {
        "tokenizers",
        "transformers",
        "_codecs",
    }


# --- Slices --------------------------------------------------------------------------------------


@every_shape
def test_a_slice_is_the_lens_of_its_prompts(case):
    batch = ragged(case)
    whole = batch.attribute(3)
    picks = (slice(0, 2), slice(1, None), slice(None, None, 2), slice(None, None, -1), slice(1, 2))
    for pick in picks:
        part = batch[pick]
        rows = list(range(3)[pick])
        assert part.tokens == tuple(batch.tokens[row] for row in rows)
        for i, row in enumerate(rows):
            ours, theirs = part[i].attribute(3).values, whole[row].values
            assert (ours - theirs).abs().max() <= case.within("padded") * theirs.abs().max()
        edges = part.attribute(3, by="edge").values
        assert edges.shape[0] == len(rows) and edges.isfinite().all()
    assert batch[1:2].embedding.shape == batch[1].embedding.shape  # no padding is left
    assert batch[0:2].logits.data_ptr() == batch.logits.data_ptr()
    assert len(batch[-1]) == 1 and batch[-1].tokens == batch.tokens[2:]


def test_what_a_lens_is_indexed_by():
    batch = ragged(FIRST)
    for wrong in ("blocks.0.hook_resid_pre", 1.5, (0, 1), None, True):
        with pytest.raises(ValueError, match="the index is a prompt's number or a slice"):
            batch[wrong]
    with pytest.raises(ValueError, match=r"holds no prompt. Take a slice such as \[:3\]"):
        batch[5:]
    with pytest.raises(IndexError, match="There is no prompt 3"):
        batch[3]


def test_a_lens_is_not_built_of_a_model():
    for given in (FIRST.model(), "a prompt", None):
        with pytest.raises(ValueError, match=r"not of .*. Call tensorlens_tl.capture\(model"):
            TensorLens(given, "The capital of France is")


# --- Devices -------------------------------------------------------------------------------------


@every_shape
def test_all_tensors_move(case):
    """On the device "meta", which needs no second device: nothing is left on the CPU."""
    lens = ragged(case)
    lens.attribute(3)
    moved = lens.capture.mapped(lambda t: t.to("meta"), torch.device("meta"))
    operator = tensorlens_tl.FrozenTransformer.of(moved)
    y = operator @ moved.blocks[0].resid_pre + operator.bias
    assert (moved.unembed @ y + moved.unembed.bias).device.type == "meta"
    left = []

    def seen(tensor):
        left.append(tensor)
        return tensor

    moved.mapped(seen)
    assert {t.device.type for t in left} == {"meta"} and len(left) > 20
    assert operator.frame.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_there_and_back():
    lens = ragged(FIRST)
    moved = lens.to("cuda")
    assert moved.device.type == moved.logits.device.type == "cuda" and moved.to("cuda") is moved
    back = moved.cpu()
    assert torch.equal(back.attribute(3).values, lens.attribute(3).values)
    close = moved.attribute(3).values.cpu() - lens.attribute(3).values
    assert close.abs().max() <= FIRST.within("run") * lens.logits.abs().max()


def test_where_and_how_a_lens_computes():
    lens = ragged(FIRST)
    assert lens.to("cpu") is lens and lens.cpu() is lens
    assert lens.device == torch.device("cpu") and lens.dtype == torch.float64
    with pytest.raises(ValueError, match=r"Capture again with capture\(..., dtype=torch.float32\)"):
        lens.to(torch.float32)
    with pytest.raises(ValueError, match="device='gpu' is no device"):
        lens.to("gpu")
    with pytest.raises(ValueError, match="device='meta' holds no numbers"):
        lens.to("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device='cuda' cannot be used: .*Pass a device of"):
            lens.to("cuda")


def test_the_prompt_as_text():
    _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
    assert lens.prompt == "<bos> The capital of France is"
    assert ragged(FIRST)[1].prompt == " ".join(ragged(FIRST).tokens[1])
    with pytest.raises(ValueError, match=r"there are 3. Take one with lens\[i\]"):
        _ = ragged(FIRST).prompt
