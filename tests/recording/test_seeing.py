"""Pictures, films and sounds among the tokens of a text: their rows are a source of their own."""

from __future__ import annotations

import html
from functools import cache

import pytest
import torch
from comparisons import assert_close
from models import build_bridge_from_module, quiet
from test_sources import IDS, TEXT, float64, hugging_face

import tensorlens_tl
from tensorlens_tl.graph import Node
from tensorlens_tl.support.every_name import tiny_model, without_processor
from tensorlens_tl.support.tiny_models import find

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
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
    "Gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", **_SEES},
        "text_config": {**TEXT, "query_pre_attn_scalar": 8,
                        "layer_types": ["sliding_attention", "full_attention"]},
        "mm_tokens_per_image": 4,
    },
    "Qwen3VL": {
        "vision_config": {**_GRID, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [0, 1]},
        "text_config": {**TEXT, "rope_parameters": _SECTIONS},
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


def model_of(kind):
    if build_bridge_from_module is None:
        pytest.skip("this host has no such model")
    with float64():
        config = find("transformers", f"{kind}Config")(image_token_id=IMAGE, **SEEING[kind])
        return hugging_face(f"{kind}ForConditionalGeneration", config)


@cache
def seeing(kind):
    ids, kwargs, _ = picture_of(kind)
    model = model_of(kind)
    with float64(), without_processor(f"{kind}ForConditionalGeneration"):
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
    assert_close(lens.readout(lens.operator @ lens.embedding + lens.operator.bias), expected, 1e-6)
    target = int(expected[0, -1].abs().argmax())
    found = lens.attribute(target)
    assert_close(found.values.sum(1), expected[:, -1, target], 1e-6)
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


def test_what_stands_nowhere_or_is_not_shown_is_refused():
    model, _, _ = seeing("Llava")
    ids, kwargs, _ = picture_of("Llava")
    with pytest.raises(ValueError, match="no token of the prompt stands for it"):
        tensorlens_tl.capture(model, IDS, **kwargs)
    with pytest.raises(ValueError, match="15 tokens of the prompt stand for its 16 rows"):
        tensorlens_tl.capture(model, ids[:, 4:], **kwargs)
    with pytest.raises(ValueError, match="pixel_values_videos exactly: no function of the model"):
        tensorlens_tl.capture(model, IDS, pixel_values_videos=kwargs["pixel_values"])


# --- Norms of what sees ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llava", "Gemma3"])
def test_a_bridge_with_the_norms_of_the_text_is_refused_or_mended(kind):
    """transformer_lens 3.9 takes ε and offset of the text's norms for the vision tower's."""
    model, (ids, kwargs, _) = model_of(kind), picture_of(kind)
    name = f"{kind}ForConditionalGeneration"
    with float64(), without_processor(name):
        expected = model(ids, **kwargs).logits
        bridge = build_bridge_from_module(model, name, hf_config=model.config)
        norms = [m for m in bridge.vision_encoder.modules() if hasattr(m, "hook_normalized")]
        for norm in norms:
            norm.use_native_layernorm_autograd = False
        off = (bridge(ids, return_type="logits", **kwargs) - expected).abs().max()
        off /= expected.abs().max()
        # The ε of LLaVA's tower is 1e-5 and the text's 1e-6; Gemma-3's differ by the offset, which
        # transformer_lens 4 knows.
        if kind == "Llava" or not hasattr(norms[0], "uses_weight_offset"):
            assert off > 1e-7
            with pytest.raises(ValueError, match="takes ε and offset of the text's norms"):
                tensorlens_tl.capture(bridge, ids, **kwargs)
        else:
            assert off < 1e-12
            assert_close(tensorlens_tl.capture(bridge, ids, **kwargs)[0], expected, 1e-12)
        assert tensorlens_tl.capture(bridge, IDS)[1].completeness_error < 1e-6  # text is served
        for norm in norms:
            norm.use_native_layernorm_autograd = True
        assert_close(tensorlens_tl.capture(bridge, ids, **kwargs)[0], expected, 1e-12)


# --- Batches --------------------------------------------------------------------------------------


def batch_of(kind, side):
    """Prompts with one picture, none and two, padded; and the arguments of each by itself."""
    one, kwargs, _ = picture_of(kind)
    two = torch.cat([one[:, :-1], one[:, 2:]], 1)
    prompts = [one[0], torch.tensor([1, 5, 7, 3]), two[0]]
    n_pos = max(map(len, prompts))
    ids, mask = torch.zeros(3, n_pos, dtype=int), torch.zeros(3, n_pos, dtype=int)
    for i, prompt in enumerate(prompts):
        at = slice(0, len(prompt)) if side == "right" else slice(n_pos - len(prompt), n_pos)
        ids[i, at], mask[i, at] = prompt, 1
    pixels = kwargs["pixel_values"].float()
    pictures = [pixels, pixels.flip(-1), -pixels]
    given = [[0], [], [1, 2]]

    def arguments(ids, which):
        found = {"pixel_values": torch.cat([pictures[i] for i in which])} if which else {}
        if which and "image_grid_thw" in kwargs:
            found["image_grid_thw"] = kwargs["image_grid_thw"].repeat(len(which), 1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in kwargs:
                found[name] = (ids == IMAGE).long()
        return found

    alone = [(p[None], arguments(p[None], which)) for p, which in zip(prompts, given, strict=True)]
    return ids, mask, arguments(ids, [0, 1, 2]), alone


@cache
def in_float32(kind):
    """The model, and each prompt of the batch by itself: plain logits, and a lens."""
    model = model_of(kind).float()
    *_, alone = batch_of(kind, "right")
    with quiet(), torch.no_grad(), without_processor(f"{kind}ForConditionalGeneration"):
        plain = [model(ids, **kwargs).logits for ids, kwargs in alone]
        bridge = tensorlens_tl.wrap(model)
        return bridge, plain, [tensorlens_tl.capture(bridge, i, **kwargs)[1] for i, kwargs in alone]


def by_label(found, prompt):
    """The shares of a prompt; a position may have a row of tokens and one of patches."""
    shares = dict.fromkeys(found.labels[prompt], 0.0)
    for label, value in zip(found.labels[prompt], found.values[prompt].tolist(), strict=True):
        shares[label] += value
    return shares


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", SEEING)
def test_prompts_in_a_padded_batch_are_what_they_are_alone(kind, side):
    model, plain, alone = in_float32(kind)
    ids, mask, kwargs, _ = batch_of(kind, side)
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(model, ids, attention_mask=mask, **kwargs)[1]
    assert lens.completeness_error < 1e-5
    for by in ("token", "component"):
        found = lens.attribute(3, by=by)
        for i, (logits, single) in enumerate(zip(plain, alone, strict=True)):
            real = mask[i].bool()
            assert_close(lens.logits[i, real], logits[0], 1e-5, "logits")
            assert abs(found.values[i].sum() - logits[0, -1, 3]) <= 1e-5 * logits.abs().max()
            assert lens.capture.prompts.strings[i] == single.capture.prompts.strings[0]
            mine, theirs = by_label(found, i), by_label(single.attribute(3, by=by), 0)
            size = max(map(abs, theirs.values()))
            for label in mine | theirs:  # those of padding, and of other prompts' sources, are 0
                assert abs(mine[label] - theirs.get(label, 0)) <= 1e-4 * size, label
    last = lens.capture.prompts.strings[2]
    assert "patch[0,0,0]" in last and "patch[1,0,1]" in last


# --- Films and sounds -----------------------------------------------------------------------------


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def film_of_qwen(model):
    """Two times of 1 × 2 rows, beside a picture of 2 × 1."""
    config = model.config
    start, film, picture = (
        config.vision_start_token_id,
        config.video_token_id,
        config.image_token_id,
    )
    between = [6] if "3" in type(model).__name__ else []
    ids = [1, start, *[picture] * 2, 5, start, *[film] * 2, *between, *[film] * 2, 7]
    ids, own = torch.tensor([ids]), config.vision_config
    width = 3 * own.temporal_patch_size * own.patch_size**2
    names = {"film[0,0,0]", "film[0,0,1]", "film[1,0,0]", "film[1,0,1]", "patch[0,0]", "patch[1,0]"}
    kwargs = {
        "pixel_values_videos": numbers(16, width),
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
        "pixel_values": -numbers(8, width),
        "image_grid_thw": torch.tensor([[1, 4, 2]]),
        "mm_token_type_ids": (ids == picture).int() + 2 * (ids == film).int(),
    }
    return ids, kwargs, names


def film_of_glm(model):
    """Two times of 1 × 2 rows, whose tokens are those of pictures."""
    config = model.config
    film, own = [config.image_token_id] * 2, config.vision_config
    ids = [1, config.video_start_token_id, *film, 6, *film, config.video_end_token_id, 7]
    ids = torch.tensor([ids])
    kwargs = {
        "pixel_values_videos": numbers(16, 3 * own.temporal_patch_size * own.patch_size**2),
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
        "mm_token_type_ids": 2 * (ids == film[0]).int(),
    }
    return ids, kwargs, {"film[0,0,0]", "film[0,0,1]", "film[1,0,0]", "film[1,0,1]"}


def film_of_llava(model):
    own = model.config.vision_config
    n = 2 * (-(-own.image_size // own.patch_size) // 2) ** 2 + 1
    ids = torch.tensor([[1, 5, *[model.config.video_token_index] * n, 7]])
    kwargs = {"pixel_values_videos": numbers(1, 2, 3, own.image_size, own.image_size)}
    return ids, kwargs, {f"film[{k}]" for k in range(n)}


def sounds(model):
    """Two sounds, the second shorter."""
    mask = torch.ones(2, 128, dtype=int)
    mask[1, 20:] = 0
    audio, token = model.model.audio_tower, model.config.audio_token_id
    if hasattr(audio, "_get_feat_extract_output_lengths"):
        long, short = audio._get_feat_extract_output_lengths(mask.sum(-1))[1].tolist()
    else:  # GLM-ASR halves a sound, and joins four rows
        long, short = 16, 2
    ids = torch.tensor([[1, *[token] * long, 6, *[token] * short, 7]])
    name = "feature_attention_mask" if "Qwen2" in type(model).__name__ else "input_features_mask"
    names = {f"sound[{i},{k}]" for i, n in enumerate((long, short)) for k in range(n)}
    return ids, {"input_features": numbers(2, 32, 128), name: mask}, names


HEARD = {
    "Qwen3VL": film_of_qwen,
    "Qwen2_5_VL": film_of_qwen,
    "Glm4v": film_of_glm,
    "LlavaOnevision": film_of_llava,
    "Qwen2Audio": sounds,
    "AudioFlamingo3": sounds,
    "MusicFlamingo": sounds,
    "GlmAsr": sounds,
}


@pytest.mark.parametrize("kind", HEARD)
def test_rows_of_films_and_sounds_are_a_source_apart_from_the_tokens(kind):
    name = f"{kind}ForConditionalGeneration"
    if build_bridge_from_module is None:
        pytest.skip("this host has no such model")
    # GLM-4V's tower runs in float32 only.
    dtype = torch.float32 if kind == "Glm4v" else torch.float64
    with quiet(), torch.no_grad(), without_processor(name):
        model = tiny_model(name).to(dtype)
        ids, kwargs, names = HEARD[kind](model)
        kwargs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in kwargs.items()}
        expected = model(ids, **kwargs).logits
        logits, lens = tensorlens_tl.capture(model, ids, **kwargs)
    assert_close(logits, expected, 1e-6 if kind == "Glm4v" else 1e-12)
    c = lens.capture
    assert c.sources == ("embed", "patch")
    assert not ((c.embeddings["embed"] != 0) & (c.embeddings["patch"] != 0)).any()
    found = lens.attribute(3)
    assert_close(found.values.sum(1), expected[:, -1, 3], 1e-6)
    shown = found.select(kind="patch")
    assert {*shown.labels[0]} == names and shown.values.abs().min() > 0
    assert lens.attribute(3, by="component").completeness_error <= 1e-5
    # The operator is linear in the rows: scaled, their shares are.
    x = c.embeddings["embed"] + 2 * c.embeddings["patch"]
    twice = lens.readout(lens.operator @ x + lens.operator.bias)[0, -1, 3]
    assert_close(twice, expected[0, -1, 3] + shown.values.sum(), 1e-6)


def test_a_token_that_stands_for_a_whole_sound_is_refused():
    name = "Qwen2AudioForConditionalGeneration"
    if build_bridge_from_module is None:
        pytest.skip("this host has no such model")
    with float64(), without_processor(name):
        model = tiny_model(name)
        _, kwargs, _ = sounds(model)
        ids = torch.tensor([[1, model.config.audio_token_id, 6, model.config.audio_token_id]])
        with pytest.raises(ValueError, match="2 tokens of the prompt stand for its 37 rows"):
            tensorlens_tl.capture(model, ids, **kwargs)
