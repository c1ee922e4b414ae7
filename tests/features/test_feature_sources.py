"""Dictionaries read from folders, objects and weights; what cannot be served is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from comparisons import assert_close
from dictionaries import KINDS, D, by_saelens, dictionary, weights
from safetensors.torch import save_file

from tensorlens_tl import features

pytestmark = pytest.mark.algebra
SITE = "blocks.1.hook_resid_pre"


def saved(folder, config=None, parts=None):
    """A folder as SAELens writes it."""
    folder.mkdir(exist_ok=True)
    parts = weights(config) if parts is None else parts
    save_file(
        {name: t.contiguous() for name, t in parts.items()}, folder / "sae_weights.safetensors"
    )
    entries = {"architecture": "standard", "metadata": {"hook_name": SITE}} | (config or {})
    (folder / "cfg.json").write_text(json.dumps(entries))
    return folder


def test_a_folder_an_object_and_weights_give_the_same(tmp_path):
    config = KINDS["topk"]
    cfg = config | {"metadata": {"hook_name": SITE}}
    sae = SimpleNamespace(
        state_dict=lambda: weights(config), cfg=SimpleNamespace(to_dict=lambda: cfg)
    )
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = dictionary("topk").encode(x)
    for source in (saved(tmp_path / "a", config), str(tmp_path / "a"), sae):
        found = features.load(source)
        assert (found.site, found.architecture, found.k) == (SITE, "topk", 5)
        assert torch.equal(found.encode(x), expected)


def test_norms_are_folded():
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    config = {"normalize_activations": "expected_average_only_in"}
    folded = features.load(weights(), site=SITE, scale=0.25, config=config)
    plain = dictionary()
    assert_close(folded.encode(x), plain.encode(x / 4), 1e-12)
    with pytest.raises(ValueError, match="multiplied by a constant"):
        features.load(weights(), site=SITE, config=config)
    with pytest.raises(ValueError, match="belongs to no 'none' norm"):
        features.load(weights(), site=SITE, scale=2.0)
    batch = {"architecture": "batchtopk", "rescale_acts_by_decoder_norm": True, "k": 5}
    parts = weights() | {"topk_threshold": torch.tensor(0.3, dtype=torch.float64)}
    z = features.load(parts, site=SITE, config=batch).encode(x)
    a = plain.pre_activations(x)[0] * parts["W_dec"].norm(dim=-1)
    assert_close(z, torch.where(a > 0.3, a, 0), 1e-12)


def test_transcoder_sets_are_read_layer_by_layer(tmp_path):
    parts = [weights(seed=i) for i in range(2)]
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = skip[:3]
    files = tmp_path / "set"
    files.mkdir()
    for i, own in enumerate(parts):
        own = own | {"W_enc": own["W_enc"].T.contiguous(), "W_skip": skip}
        own["activation_function.threshold"] = torch.full((128,), 0.2, dtype=torch.float64)
        save_file(own, files / f"layer_{i}.safetensors")
    (files / "config.yaml").write_text(
        'model_name: "tiny"\nfeature_input_hook: "ln2.hook_normalized"\n'
        "feature_output_hook: hook_mlp_out\n"
    )
    found = features.load(files)
    assert [f.site for f in found] == [f"blocks.{i}.ln2.hook_normalized" for i in range(2)]
    assert {f.writes for f in found} == {"blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"}
    assert found[0].model_name == "tiny" and not found[0].centered
    a = x @ parts[1]["W_enc"] + parts[1]["b_enc"]
    assert_close(found[1].encode(x), torch.where(a > 0.2, a, 0), 1e-12)
    assert torch.equal(found[1].W_skip, skip.T)
    # The same set as objects, and a cross-layer transcoder.
    act = SimpleNamespace(k=3)
    objects = [
        SimpleNamespace(**own | {"W_enc": own["W_enc"].T, "activation_function": act})
        for own in parts
    ]
    held = SimpleNamespace(
        transcoders=objects, feature_input_hook="hook_resid_mid", feature_output_hook="hook_mlp_out"
    )
    found = features.load(held)
    assert [f.activation for f in found] == ["topk", "topk"] and found[0].k == 3
    assert found[0].site == "blocks.0.hook_resid_mid"
    for i, own in enumerate(parts):
        late = torch.stack([own["W_dec"]] * (2 - i), 1)
        encoder = {
            f"W_enc_{i}": own["W_enc"].T,
            f"b_enc_{i}": own["b_enc"],
            f"b_dec_{i}": own["b_dec"],
        }
        (tmp_path / "across").mkdir(exist_ok=True)
        save_file(
            {name: t.contiguous() for name, t in encoder.items()},
            tmp_path / "across" / f"W_enc_{i}.safetensors",
        )
        save_file({f"W_dec_{i}": late.contiguous()}, tmp_path / "across" / f"W_dec_{i}.safetensors")
    found = features.load(tmp_path / "across")
    assert [tuple(f.W_dec.shape) for f in found] == [(128, 2, D), (128, 1, D)]
    assert_close(found[1].encode(x), (x @ parts[1]["W_enc"] + parts[1]["b_enc"]).relu(), 1e-12)


def test_what_is_no_dictionary_is_refused(tmp_path):
    def refused(match, source, **options):
        with pytest.raises(ValueError, match=match):
            features.load(source, **({"site": SITE} | options))

    refused("holds no whole dictionary", tmp_path)
    (saved(tmp_path / "broken") / "sae_weights.safetensors").write_bytes(b"nothing")
    refused("holds no whole dictionary", tmp_path / "broken")
    refused("source=an int is no dictionary", 3)
    refused("lack W_dec", {n: t for n, t in weights().items() if n != "W_dec"})
    refused("do not fit each other", weights() | {"b_enc": torch.zeros(3)})
    refused("holds nan", weights() | {"b_enc": torch.full((128,), torch.nan)})
    refused("does not say which hook point it reads", weights(), site=None)
    refused("does not say its k", weights(), config={"architecture": "topk"})
    refused("no dictionary that can be read", weights(), config={"architecture": "temporal"})
    refused("is not folded in", weights(), config={"normalize_activations": "covariance_whitening"})
    refused("depend on the batch", weights(), config={"architecture": "batchtopk"})
    refused("activation='sine'", weights(), config={"activation": "sine"})
    refused("which hook point it writes", weights(), config={"architecture": "transcoder"})


def test_the_activations_are_those_of_saelens(tmp_path):
    off = by_saelens("compare_saelens.py", tmp_path)
    assert len(off) >= 10 and all(error <= 1e-6 for error in off.values()), off
