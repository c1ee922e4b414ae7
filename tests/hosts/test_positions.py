"""Positions: where a context ends, windows, and what queries and keys cannot be read from."""

from __future__ import annotations

import pytest
import torch
from models import D_VOCAB, MORE_BRIDGE, build_bridge, build_hf, quiet, to_bridge

import tensorlens_tl
from tensorlens_tl.support.tiny_models import BRIDGE, bridge_offered

IDS = torch.randint(0, D_VOCAB, (1, 13), generator=torch.Generator().manual_seed(0))
LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
DYNAMIC = {
    "rope_type": "dynamic",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "partial_rotary_factor": 1.0,
}


def short(name, **more):
    """A Hugging Face model of a family with room for 8 positions."""
    kind, config = {**BRIDGE, **MORE_BRIDGE}[name]
    cut = {key: 8 if key in LIMITS else value for key, value in config.items()}
    return build_hf(kind, {**cut, **more}, torch.float64)


def offered(*names):
    return [n for n in names if bridge_offered(n)]


@pytest.mark.parametrize("rope", [None, DYNAMIC], ids=["plain", "dynamic"])
@pytest.mark.parametrize("name", offered("llama", "neox"))
def test_rotary_positions_go_on_as_far_as_the_model_runs(name, rope):
    with quiet(), torch.no_grad():
        hf = short(name, **({} if rope is None else {"rope_parameters": rope}))
        theirs = hf(IDS).logits
        model = to_bridge(hf)
        logits, lens = tensorlens_tl.capture(model, IDS)
        again = tensorlens_tl.capture(model, IDS, pattern="recomputed")[1]
    assert (logits - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    whole = logits[0, -1, 3]
    for each in (lens, again):
        assert each.completeness_error <= 1e-6
        assert abs(each.attribute(3).values.sum() - whole) <= 1e-5 * whole.abs()
    assert torch.isfinite(lens.attribute(3, by="edge", qk=True).values).all()


@pytest.mark.parametrize("name", offered("gpt2", "opt", "gptj", "mpt", "gpt-bigcode"))
def test_learned_positions_and_tables_end(name):
    with quiet():
        model = to_bridge(short(name))
    with pytest.raises(ValueError, match="has 13 tokens, but the model's context holds n_ctx = 8"):
        tensorlens_tl.capture(model, IDS)
    with quiet(), torch.no_grad():
        assert tensorlens_tl.capture(model, IDS[:, :8])[1].completeness_error <= 1e-6


@pytest.mark.offered(bridge_offered("phi3"))
@pytest.mark.parametrize("window", [3, 64])
def test_a_window_of_fused_queries_and_keys_is_recomputed(window):
    kind, config = MORE_BRIDGE["phi3"]
    with quiet(), torch.no_grad():
        model = build_bridge(kind, {**config, "sliding_window": window}, torch.float64)
        lens = tensorlens_tl.capture(model, IDS)[1]
        again = tensorlens_tl.capture(model, IDS, pattern="recomputed")[1]
    assert again.completeness_error <= 1e-6
    pairs = zip(lens.capture.blocks, again.capture.blocks, strict=True)
    for one, other in ((a.attn.mix.pattern, b.attn.mix.pattern) for a, b in pairs):
        assert (one - other).abs().max() <= 1e-6
        assert bool((other[0, :, -1, : 13 - window] == 0).all())


YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "llama_4_scaling_beta": 0.5}
CAUSES = {
    "ministral3": (
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 8}},
        {},
        r"llama_4_scaling_beta=0\.5: queries from position 8 on",
    ),
    "llama": ({}, {"position_ids": torch.tensor([[0, 1, 2] * 4 + [3]])}, "position_ids: they are"),
}


@pytest.mark.parametrize("name", offered(*CAUSES))
def test_what_keeps_queries_and_keys_from_being_read_is_named(name):
    kind, config = {**BRIDGE, **MORE_BRIDGE}[name]
    more, arguments, cause = CAUSES[name]
    with quiet(), torch.no_grad():
        model = build_bridge(kind, {**config, **more}, torch.float64)
        lens = tensorlens_tl.capture(model, IDS, **arguments)[1]
    assert lens.completeness_error <= 1e-6  # the operator itself needs no scores
    with pytest.raises(ValueError, match=rf"qk=True needs W_Q and W_K, .*\({cause}.*drop qk="):
        lens.attribute(3, by="edge", qk=True)


@pytest.mark.offered(bridge_offered("llama"))
def test_consecutive_positions_from_any_start_are_served():
    with quiet(), torch.no_grad():
        model = build_bridge(*BRIDGE["llama"], torch.float64)
        plain, moved = (
            tensorlens_tl.capture(model, IDS, **given)[1].attribute(3, by="edge", qk=True).values
            for given in ({}, {"position_ids": torch.arange(5, 18)[None]})
        )
    assert (plain - moved).abs().max() <= 1e-5 * plain.abs().max()
