"""What enters the first block: each source by itself, and all of them together."""

from __future__ import annotations

import html
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from comparisons import assert_close
from models import CASES, HookedTransformer, build_bridge_from_module, quiet
from test_operator import test_gradient_and_curvature_of_the_frozen_model as gradient_law

import tensorlens_tl
from tensorlens_tl.graph import Node
from tensorlens_tl.support.tiny_models import find, randomize

bridges = pytest.mark.skipif(build_bridge_from_module is None, reason="this host has no Bridge")
VERSION_4 = build_bridge_from_module is not None and HookedTransformer is None

_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 50, "max_position_embeddings": 64, "head_dim": 8,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
            "attention_multiplier": 0.3}  # fmt: skip
_XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "vocab_size": 50}
TEXTS = {
    "granite": ("Granite", {**_TEXT, **_GRANITE}, ("embed",)),
    "xglm": ("XGLM", _XGLM, ("embed", "pos_embed")),
    "nanochat": ("NanoChat", _TEXT, ("embed",)),
}
IDS = torch.tensor([[1, 5, 7, 9, 3], [1, 6, 8, 2, 4]])


@contextmanager
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # XGLM's mask is of the default dtype
    try:
        with torch.no_grad(), quiet():
            yield
    finally:
        torch.set_default_dtype(before)


def hugging_face(name, config):
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = find("transformers", name)(config).to(torch.float64).eval()
    randomize(model)
    return model


@cache
def of_text(kind):
    name, options, _ = TEXTS[kind]
    config = find("transformers", f"{name}Config")
    if config is None or not build_bridge_from_module:
        pytest.skip("this host has no such model")
    with float64():
        model = hugging_face(f"{name}ForCausalLM", config(**options))
        expected = model(IDS).logits
        return model, expected, tensorlens_tl.capture(model, IDS)[1]


@pytest.mark.parametrize("kind", TEXTS)
def test_multipliers_sinusoids_and_a_norm_of_embeddings(kind):
    _, expected, lens = of_text(kind)
    c = lens.capture
    assert c.sources == TEXTS[kind][2]
    assert_close(c.input, lens.embedding, 1e-6)
    assert_close(lens.readout(lens.operator @ lens.embedding + lens.operator.bias), expected, 1e-6)
    for by in ("token", "component", "head"):
        found = lens.attribute(3, by=by)
        assert_close(found.values.sum(1), expected[:, -1, 3], 1e-5)


@bridges
def test_the_multiplied_model_frozen_by_hooks_has_the_operator_as_its_gradient(monkeypatch):
    case = CASES["bridge-llama"]
    model, _, lens = of_text("granite")
    monkeypatch.setattr(type(case), "model", lambda *_: tensorlens_tl.wrap(model))
    monkeypatch.setattr("test_operator.lens_of", lambda *_, **__: lens)
    monkeypatch.setattr("test_operator.tokens", lambda *_: IDS)
    gradient_law(case, "gate")


@bridges
def test_a_norm_of_embeddings_leaves_no_mean_embedding():
    _, _, lens = of_text("nanochat")
    with pytest.raises(ValueError, match=r"are not rows of W_E.*Pass the mean embedding"):
        lens.attribute(3, baseline="mean")


# --- Pictures in a text ---------------------------------------------------------------------------

IMAGE = 49
_SEES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 8, "patch_size": 2}  # fmt: skip
_GRID = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 2,
         "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_AROUND = {"vision_start_token_id": 48, "vision_end_token_id": 47, "video_token_id": 46}
SEEING = {
    "Llava": {
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **_SEES},
        "text_config": {"model_type": "llama", **_TEXT},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
    "Gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", **_SEES},
        "text_config": {**_TEXT, "query_pre_attn_scalar": 8,
                        "layer_types": ["sliding_attention", "full_attention"]},
        "mm_tokens_per_image": 4,
    },
    "Qwen3VL": {
        "vision_config": {**_GRID, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [0, 1]},
        "text_config": {**_TEXT, "rope_parameters": _SECTIONS},
        **_AROUND,
    },
}  # fmt: skip


def picture_of(kind):
    """A prompt with a picture of 4 × 4, 2 × 2 or 2 × 4 rows, and the arguments of a run."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = {"Llava": (4, 4), "Gemma3": (2, 2), "Qwen3VL": (2, 4)}[kind]
    shape = (1, 3, 8, 8) if kind != "Qwen3VL" else (32, 24)
    kwargs = {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}
    ids = torch.tensor([[1, 5, 48, *[IMAGE] * (rows * columns), 47, 7, 3]])
    if kind == "Qwen3VL":
        kwargs |= {"image_grid_thw": torch.tensor([[1, 4, 8]])}
        kwargs |= {"mm_token_type_ids": (ids == IMAGE).int()}
    if kind == "Gemma3":  # its rows see each other, both ways
        kwargs["token_type_ids"] = (ids == IMAGE).long()
    return ids, kwargs, (rows, columns)


@cache
def seeing(kind):
    name = f"{kind}ForConditionalGeneration"
    adapter = find("transformer_lens.model_bridge.architecture_adapter", "ArchitectureAdapter")
    if adapter is None or not (VERSION_4 or kind == "Llava"):
        pytest.skip("this host has no such model")
    ids, kwargs, _ = picture_of(kind)
    with pytest.MonkeyPatch.context() as patch, float64():
        patch.setattr(adapter, "_check_required_libraries", lambda self: None, raising=False)
        config = find("transformers", f"{kind}Config")(image_token_id=IMAGE, **SEEING[kind])
        model = hugging_face(name, config)
        expected = model(ids, **kwargs).logits
        return model, expected, tensorlens_tl.capture(model, ids, **kwargs)[1]


@pytest.mark.parametrize("kind", SEEING)
def test_rows_of_a_picture_are_a_source_apart_from_the_tokens(kind):
    _, expected, lens = seeing(kind)
    ids, _, (rows, columns) = picture_of(kind)
    c, of_picture = lens.capture, ids == IMAGE
    assert c.sources == ("embed", "patch")
    assert not c.embeddings["patch"][~of_picture].any() and not c.embed[of_picture].any()
    assert (c.embeddings["patch"][of_picture] != 0).any(-1).all()
    names = [f"patch[{i},{j}]" for i in range(rows) for j in range(columns)]
    assert list(c.prompts.strings[0][3 : 3 + rows * columns]) == names
    assert_close(lens.readout(lens.operator @ lens.embedding + lens.operator.bias), expected, 1e-5)
    found = lens.attribute(3)
    assert_close(found.values.sum(1), expected[:, -1, 3], 1e-5)
    shown = found.select(kind="patch")
    assert list(shown.labels[0]) == names and shown.values.abs().min() > 0
    assert {"patch[0,0]", '"#7"@' + str(rows * columns + 4)} <= {*found.sum("node").labels[0]}
    shown = html.unescape(found._repr_html_())
    assert '"#1"@0 <b' in shown and "row 1 <b" not in shown  # the rows beside the map, by name
    assert lens.attribute(3, by="component").completeness_error <= 1e-5
    own = lens.paths(3, k=2, from_token=4).paths
    assert {path.label for path in own} == {"patch[0,1]"}
    assert {str(path.start) for path in own} == {"patch"}


@pytest.mark.parametrize("kind", SEEING)
def test_baselines_of_a_picture_and_files(kind, tmp_path):
    model, _, lens = seeing(kind)
    ids, kwargs, _ = picture_of(kind)
    with quiet(), torch.no_grad():
        other = {**kwargs, "pixel_values": -kwargs["pixel_values"]}
        baseline = tensorlens_tl.capture(model, ids, **other)[1]
    change = lens.attribute(3, baseline=baseline)
    assert change.completeness_error <= 1e-5
    assert not change.select(kind="embed").values.any()
    assert lens.attribute(3, baseline="zero").completeness_error <= 1e-5
    # A mean embedding stands where tokens were, and the picture stays.
    kept = lens.attribute(3, baseline=torch.zeros(32, dtype=torch.float64))
    assert not kept.select(kind="patch").values.any()
    lens.save(tmp_path / "a.safetensors")
    loaded = tensorlens_tl.load(tmp_path / "a.safetensors", model=model)
    assert torch.equal(loaded.attribute(3).values, lens.attribute(3).values)
    assert loaded.attribute(3).labels == lens.attribute(3).labels


def test_rows_that_are_added_after_a_block_are_constants_of_their_own():
    lens = seeing("Qwen3VL")[2]
    at = picture_of("Qwen3VL")[0] == IMAGE
    for layer, block in enumerate(lens.capture.blocks):
        (added,) = block.post_edits
        assert added.name == f"L{layer}.deepstack" and Node.parse(added.name).layer == layer
        assert not added.constant[~at].any() and added.constant[at].any()
    assert {"L0.deepstack", "L1.deepstack"} <= set(lens.operator.constants())
    for asked in ({"by": "edge", "qk": True}, {"baseline": lens, "at": "secant"}):
        with pytest.raises(ValueError, match=r"three axes|L0\.deepstack does, too"):
            lens.attribute(3, **asked)


def test_what_a_picture_changes_of_attention_is_refused_by_name():
    model, _, lens = seeing("Gemma3")
    ids, kwargs, _ = picture_of("Gemma3")
    with pytest.raises(ValueError, match="rows of a picture see later ones"):
        lens.attribute(3, by="edge", qk=True)
    match = 'pattern="recomputed" does not serve .*rows of a picture see later ones'
    with pytest.raises(ValueError, match=match):
        tensorlens_tl.capture(model, ids, pattern="recomputed", **kwargs)


def test_pictures_without_a_place_and_films_are_refused():
    model, _, _ = seeing("Llava")
    _, kwargs, _ = picture_of("Llava")
    with pytest.raises(ValueError, match="no token of the prompt stands for a picture"):
        tensorlens_tl.capture(model, IDS, **kwargs)
    with pytest.raises(ValueError, match="pixel_values_videos"):
        tensorlens_tl.capture(model, IDS, pixel_values_videos=kwargs["pixel_values"])
