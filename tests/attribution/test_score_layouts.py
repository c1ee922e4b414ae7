"""Ways to make scores of queries and keys that the families of the other tests lack.

Norms by head, norms after the rotation, layers without rotation, sinks, and modules that the host
runs as they are. The real model's own gradient and its own pattern are the oracles.
"""

import inspect

import pytest
import test_interventions
import test_qk_edges
import test_secant
import torch
from comparisons import assert_close
from models import (
    CASES,
    HOOKED,
    MORE_BRIDGE,
    Case,
    HookedTransformer,
    bridge_offered,
    build_bridge,
    build_hooked,
    lens_of,
    quiet,
    to_bridge,
    tokens,
)
from test_more_families import KNOWN

import tensorlens_tl
from tensorlens_tl.refusals.errors import NotRecomputableError
from tensorlens_tl.support.every_name import tiny_model, without_processor

NAMES = {
    "hunyuan": "HunYuanDenseV1ForCausalLM",  # norms after the rotation
    "exaone4": "Exaone4ForCausalLM",  # norms after sublayers, layers without rotation
    "qwen3-vl": "Qwen3VLForConditionalGeneration",  # a module of Hugging Face's own, with norms
    "nanochat": "NanoChatForCausalLM",  # such a module, with norms after a rotation backwards
    "glm4v": "Glm4vForConditionalGeneration",  # such a module, which turns adjacent pairs
}
MIXTURES = {
    "gpt-oss": "GptOssForCausalLM",  # sinks, and tables of half the width
    "llama4": "Llama4ForCausalLM",  # complex tables, a norm without weights after the rotation
    "ernie4.5-moe": "Ernie4_5_MoeForCausalLM",  # tables whose halves are equal, for adjacent pairs
}
EDGES = test_qk_edges.test_query_and_key_edges_are_gradients_of_the_real_model
ABLATED = test_interventions.test_ablating_nothing_and_everything_gives_the_model_s_own_logits
GRADIENT = test_secant.test_between_equal_runs_it_is_the_models_gradient
HELD, EACH = [], []


def hold(name, build, *laws, float32_norms=True, host="bridge"):
    case = Case(f"{host}-{name}", build, host, float32_norms, gated=True)
    CASES[case.name] = case
    EACH.append(case)
    HELD.extend((case, law) for law in laws)


def named(name):
    def build(dtype):
        with without_processor(name):
            return to_bridge(tiny_model(name).to(dtype))

    return build


if HookedTransformer is None:  # transformer_lens 4, whose Bridges of all of them are right
    for short, name in NAMES.items():
        hold(short, named(name), GRADIENT, ABLATED)
    for short, name in MIXTURES.items():  # test_experts.py runs circuits of mixtures
        hold(short, named(name))
if bridge_offered("stablelm"):
    BY_HEAD = {**MORE_BRIDGE["stablelm"][1], "qk_layernorm": True}
    hold("by-head", lambda dtype: build_bridge("StableLm", BY_HEAD, dtype), GRADIENT, ABLATED)
if "use_attention_sinks" in KNOWN:
    SUNK = {**HOOKED["llama"], "use_attention_sinks": True}
    laws = GRADIENT, EDGES, ABLATED
    hold("sinks", lambda d: build_hooked(SUNK, d), *laws, float32_norms=False, host="hooked")


@pytest.mark.offered(bool(HELD))
@pytest.mark.parametrize(("case", "law"), HELD, ids=lambda x: getattr(x, "__name__", str(x))[:40])
def test_the_laws_of_scores_hold(case, law):
    given = {"case": case, "gate": "gate", "dtype": torch.float64}
    law(**{name: given[name] for name in inspect.signature(law).parameters})


@pytest.mark.offered(bool(EACH))
@pytest.mark.parametrize("case", EACH, ids=str)
def test_patterns_made_anew_are_the_runs_own(case):
    """Of the queries and keys that were read, and of W_Q, W_K, norms and rotations alone."""
    stored, lens = lens_of(case), lens_of(case, pattern="recomputed")
    for one, other in zip(stored.capture.blocks, lens.capture.blocks, strict=True):
        assert_close(other.attn.pattern, one.attn.pattern, case.within("oracle"))
    # Scores that do not give the run's pattern are an error here.
    edges = stored.attribute(3, 4, by="edge", qk=True).select(dest="L1H1.k")
    assert edges.values.isfinite().all() and edges.values.any()


@pytest.mark.offered("bridge-llama4" in CASES)
def test_chunks_of_attention_are_refused_where_they_would_matter():
    with quiet(), torch.no_grad():
        model = CASES["bridge-llama4"].build(torch.float64)
        config = model.original_model.config
        part = getattr(config, "text_config", config)
        part.attention_chunk_size = 5
        with pytest.raises(NotRecomputableError, match=r"a prompt of 7 tokens: .* up to 5"):
            tensorlens_tl.capture(model, tokens(), pattern="recomputed")
