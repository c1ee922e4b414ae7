"""A trained model on real text: sentences and stories of TinyStories, in float32."""

import pytest
import torch
from models import SHARED, HookedTransformer, build_bridge_from_module, quiet

import tensorlens_tl
from tensorlens_tl.hosts import load_model

FOLDER = SHARED / "stories260K"
SAMPLE = SHARED / "text" / "tinystories_sample" / "tinystories_sample.txt"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the shared model and texts")
KINDS = [k for k, c in (("hooked", HookedTransformer), ("bridge", build_bridge_from_module)) if c]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    with quiet():
        return load_model(str(FOLDER), request.param)


def host_of(model):
    return "bridge" if type(model).__name__ == "TransformerBridge" else "hooked"


def stories():
    return [s.strip() for s in SAMPLE.read_text().split("<|endoftext|>") if s.strip()]


def sentences():
    text = " ".join(stories()).replace("\n", " ")
    found = [s.strip() + "." for s in text.split(".") if len(s.strip()) > 5]
    assert 60 <= len(found) <= 100
    return found


def test_sentences_and_stories(model):
    """Every sixth text; with both classes of hosts, each has its own."""
    for text in [*sentences(), *stories()][KINDS.index(host_of(model)) :: 6]:
        with quiet(), torch.no_grad():
            logits, lens = tensorlens_tl.capture(model, text)
        assert lens.completeness_error <= 2e-6
        assert lens.capture_check <= 1e-4
        for by in ("token", "component"):
            a = lens.attribute(by=by)
            assert a.completeness_error <= 2e-6
            assert torch.allclose(a.target_value[0], logits[0, -1].max())


def test_text_prompts_and_targets(model):
    with quiet(), torch.no_grad():
        _, lens = tensorlens_tl.capture(model, "Once upon a time, there was a little girl named")
    assert lens.attribute().target == ("'Lily'",)
    assert torch.equal(lens.attribute().values, lens.attribute("Lily").values)
    assert torch.equal(lens.attribute(" Lily").values, lens.attribute("Lily").values)
    assert lens.attribute().labels[0][0] == '"<s>"@0'
    with pytest.raises(ValueError, match=r"target=' Mary' is \d tokens: .*Pass one of them"):
        lens.attribute(" Mary")


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches_equal_single_prompts(model, side):
    texts = ["Once upon a time", "The dog was big. It ran to the park and", "Tom"]
    with quiet(), torch.no_grad():
        logits, lens = tensorlens_tl.capture(model, texts, padding_side=side)
        alone = [tensorlens_tl.capture(model, text)[1] for text in texts]
    assert len(lens) == 3 and lens.completeness_error <= 2e-6
    batched = lens.attribute()
    for i, single in enumerate(alone):
        start, stop = lens.capture.frame.spans[i]
        scale = single.logits.abs().max()
        assert (logits[i, start:stop] - single.logits[0]).abs().max() <= 1e-4 * scale
        assert lens.tokens[i] == single.tokens[0]
        one, two = batched[i], single.attribute()
        assert one.labels == two.labels and one.target == two.target
        assert (one.values - two.values).abs().max() <= 1e-4 * two.values.abs().sum()
        assert (
            lens[i].attribute().values - one.values
        ).abs().max() <= 1e-4 * two.values.abs().sum()
        assert lens[i].completeness_error <= 2e-6


def test_prepend_bos_passes_through(model):
    with quiet(), torch.no_grad():
        with_bos = tensorlens_tl.capture(model, "Once upon a time", prepend_bos=True)[1]
        without = tensorlens_tl.capture(model, "Once upon a time", prepend_bos=False)[1]
    assert len(with_bos.tokens[0]) == len(without.tokens[0]) + 1


def test_both_classes_agree():
    if len(KINDS) == 2:
        text = "One day, a boy named Tim went to the park with his mom"
        lenses = []
        for kind in KINDS:
            with quiet(), torch.no_grad():
                lenses.append(tensorlens_tl.capture(load_model(str(FOLDER), kind), text)[1])
        one, two = (lens.attribute(by="component") for lens in lenses)
        ours, theirs = (
            dict(zip(a.labels[0], a.values[0].tolist(), strict=True)) for a in (one, two)
        )
        for label in theirs:
            assert abs(ours.get(label, 0.0) - theirs[label]) <= 1e-4
    assert KINDS


@pytest.mark.parametrize("name", ["my-llama", "gemma-like"])
def test_folders_with_misleading_names(tmp_path, name):
    (tmp_path / name).symlink_to(FOLDER.resolve(), target_is_directory=True)
    for kind in KINDS:
        with quiet(), torch.no_grad():
            loaded = load_model(str(tmp_path / name), kind)
            assert tensorlens_tl.capture(loaded, "Once")[1].completeness_error <= 2e-6
