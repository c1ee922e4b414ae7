"""The laws of the other modules, once over, for families whose block shapes are known."""

import inspect
from dataclasses import replace

import pytest
import test_attribution
import test_baselines_gradient
import test_circuits
import test_contraction
import test_differences
import test_edits
import test_granularity
import test_interventions
import test_operator
import test_padding
import test_qk_edges
import test_recomputed
import test_saving
import test_secant
import torch
from comparisons import assert_close
from models import (
    DELTA_NETS,
    DRESSED,
    MORE,
    MORE_BRIDGE,
    ROUNDING,
    HookedTransformer,
    bridge_offered,
    build_bridge,
    build_hooked,
    lens_of,
    quiet,
    randn_like,
    tokens,
)

import tensorlens_tl
from tensorlens_tl.evaluation.masking import Masking
from tensorlens_tl.hosts.entry import adapt
from tensorlens_tl.recording.live_model import live_models
from tensorlens_tl.refusals.errors import NotRecomputableError, UnsupportedArchitectureError
from tensorlens_tl.relations.held_model import hold_frozen
from tensorlens_tl.relations.validity_errors import direction_errors
from tensorlens_tl.support.tiny_models import find

LAWS = [
    test_operator.test_operator_reproduces_the_logits,
    test_operator.test_adjoint,
    test_operator.test_linear_and_bias_apart,
    test_operator.test_gradient_and_curvature_of_the_frozen_model,
    test_operator.test_an_injected_vector_changes_every_later_site_as_predicted,
    test_operator.test_constants_sum_to_the_bias,
    test_operator.test_dense_block_and_scipy,
    test_attribution.test_token_contributions_are_gradient_times_input_of_the_frozen_model,
    test_granularity.test_every_direct_split_sums_to_the_target,
    test_granularity.test_finer_splits_sum_to_the_components,
    test_granularity.test_totals_are_what_injecting_a_writers_output_into_the_real_model_changes,
    test_granularity.test_edges_into_a_reader_sum_to_what_it_makes_of_the_target,
    test_granularity.test_edges_the_slow_way,
    test_qk_edges.test_query_and_key_edges_are_gradients_of_the_real_model,
    test_differences.test_the_tokens_part_by_the_slow_way,
    test_secant.test_rows_sum_to_the_difference_and_nothing_is_left_over,
    test_secant.test_edges_are_a_flow,
    test_secant.test_between_equal_runs_it_is_the_models_gradient,
    test_contraction.test_rows_and_constants_sum_to_the_target,
    test_circuits.test_edges_are_those_of_the_attribution,
    test_interventions.test_ablating_nothing_and_everything_gives_the_model_s_own_logits,
    test_recomputed.test_recomputed_equals_stored,
    test_padding.test_a_batch_is_its_prompts,
    test_saving.test_with_the_model_everything_is_equal_and_weights_are_the_models_own,
    test_edits.test_every_other_point_that_is_served,
    test_edits.test_an_edit_is_nothing_at_padding,
    test_edits.test_an_edit_that_the_host_discards_is_refused,
    test_baselines_gradient.test_attnlrp_in_every_family,
]
EDGE_BY_EDGE = {"olmo2", "gptj", "opt", "gemma3", "cohere"}
"""One norm of all heads, attention of Hugging Face's own, layers that differ, gains by head."""
NEW_SHAPES = {"phi", "gemma3", "olmo2", "bloom", "youtu"}
"""A norm for two branches, norms after sublayers, a norm of embeddings, a latent: all laws."""
OF_A_FAMILY = [
    test_qk_edges.test_query_and_key_edges_are_gradients_of_the_real_model,
    test_secant.test_rows_sum_to_the_difference_and_nothing_is_left_over,
    test_recomputed.test_recomputed_equals_stored,
]
"""What exactness does not tell, which ``test_every_name`` compares with Hugging Face."""
OF_THE_HOST = [
    *OF_A_FAMILY,
    test_operator.test_operator_reproduces_the_logits,
    test_operator.test_gradient_and_curvature_of_the_frozen_model,
    test_padding.test_a_batch_is_its_prompts,
]
"""Models that Hugging Face does not have: other classes, and compatibility mode."""
OWN_POSITIONS = {"opt", "mpt", "falcon"}
"""Families whose positions are no rotations by Hugging Face's tables: padding moves them."""
GIVEN = {"gate": "gate", "by": "token", "side": "left", "dtype": torch.float64, "target": 7}
SCORES = [
    test_interventions.test_one_edge_patched_is_path_patching_on_the_host,
    test_qk_edges.test_query_and_key_edges_are_gradients_of_the_real_model,
    test_secant.test_rows_sum_to_the_difference_and_nothing_is_left_over,
    test_secant.test_edges_are_a_flow,
    test_secant.test_between_equal_runs_it_is_the_models_gradient,
    test_circuits.test_edges_are_those_of_the_attribution,
]
"""Laws of what queries and keys are made of."""
APART = {"gptj", "gpt-neo", "opt"}
"""Families that run Hugging Face's attention: patterns are shown, not made or edited outside."""
NOT_PLAIN = {"youtu"}
"""Whose attention is more than W_V, a pattern and W_O: it has no edges into queries and keys."""
FLOAT32_SOFTMAX = {
    "phi",
    "cohere",
    "stablelm",
    "starcoder2",
    "mpt",
    "bloom",
    "gpt-bigcode",
    "codegen",
    "jais2",
    "cohere2",
} | APART
"""Whose Bridges compute it so: a pattern made anew is as inexact as their norms would be."""
MADE_ANEW = [
    *SCORES,
    test_recomputed.test_recomputed_equals_stored,
    test_padding.test_a_batch_is_its_prompts,
]
"""Laws of patterns made anew, or of padding, whose mask overflows float64 in that softmax."""
NO_SOLU = [
    test_secant.test_rows_sum_to_the_difference_and_nothing_is_left_over,
    test_baselines_gradient.test_attnlrp_in_every_family,
]
UNSHOWN = [
    *SCORES,
    test_interventions.test_ablating_nothing_and_everything_gives_the_model_s_own_logits,
    test_recomputed.test_recomputed_equals_stored,
]
REFUSALS = (
    r"W_Q and W_K, which|does not serve the attention|cannot be run edge by edge|"
    r"which SoLU is not|uses SoLU"
)
HOLD_NORMS = [
    test_operator.test_gradient_and_curvature_of_the_frozen_model,
    test_operator.test_an_injected_vector_changes_every_later_site_as_predicted,
    test_attribution.test_token_contributions_are_gradient_times_input_of_the_frozen_model,
    test_granularity.test_totals_are_what_injecting_a_writers_output_into_the_real_model_changes,
    test_qk_edges.test_query_and_key_edges_are_gradients_of_the_real_model,
    test_baselines_gradient.test_attnlrp_in_every_family,
]
"""Laws whose oracle hooks norms: the Bridge of OLMo cannot run so, as its norms have no weights."""


def family(case):
    return str(case).partition("-")[2].removesuffix("-compat")


def laws(case):
    raw = case.host == "bridge" and not str(case).endswith("-compat")
    if raw and family(case) in OWN_POSITIONS:
        return [*OF_A_FAMILY, test_padding.test_a_batch_is_its_prompts]
    return LAWS if raw and family(case) in NEW_SHAPES else OF_A_FAMILY if raw else OF_THE_HOST


HELD = [
    (case, law)
    for case in [*DRESSED, *MORE]
    for law in laws(case)
    if not (family(case) == "olmo" and law in HOLD_NORMS)
    and family(case) not in DELTA_NETS  # test_linear_attention.py
]
HELD += [
    (case, test_interventions.test_one_edge_patched_is_path_patching_on_the_host)
    for case in MORE
    if family(case) in EDGE_BY_EDGE
]


@pytest.mark.offered(bool(HELD))
@pytest.mark.parametrize(
    ("case", "law"),
    HELD,
    ids=[f"{case}-{law.__name__.removeprefix('test_')}" for case, law in HELD],
)
def test_the_law_holds_or_is_refused_by_name(case, law, tmp_path):
    if law in MADE_ANEW and family(case) in FLOAT32_SOFTMAX and case.host == "bridge":
        case = replace(case, float32_norms=True)
    given = GIVEN | {"case": case, "tmp_path": tmp_path, "path": tmp_path / "lens"}
    given = {name: given[name] for name in inspect.signature(law).parameters}
    unknown = family(case) in NOT_PLAIN and law in UNSHOWN
    if unknown or (family(case).startswith("solu") and law in NO_SOLU):
        with pytest.raises(ValueError, match=REFUSALS):
            law(**given)
    else:
        law(**given)


@pytest.mark.offered(bridge_offered("gptj"))
@pytest.mark.parametrize("case", [case for case in MORE if family(case) in APART], ids=str)
def test_patterns_that_hooks_cannot_change_are_not_held(case):
    lens, model = lens_of(case)[0], case.model()
    with live_models(lens.capture, model) as (live,):
        with pytest.raises(UnsupportedArchitectureError, match="computes on with its own patterns"):
            hold_frozen(live, ("scale", "pattern"))
        assert hold_frozen(live, ("scale", "ratio"))
    delta = randn_like(lens.embedding.expand(3, -1, -1))
    both = direction_errors(lens, model, delta, (0.1,), ("scale",)).held["scale"]
    alone = [
        direction_errors(lens, model, one[None], (0.1,), ("scale",)).held["scale"] for one in delta
    ]
    assert_close(both, torch.cat(alone), 1e-6, "scales are held for every direction")


BLOOMS = [case for case in MORE if family(case) == "bloom"]


@pytest.mark.parametrize("case", BLOOMS, ids=str)
def test_the_mean_embedding_is_that_of_normalized_rows(case):
    """BLOOM norms its embeddings before the first block reads them."""
    lens, model = lens_of(case)[0], case.model()
    every = torch.arange(model.cfg.d_vocab)[:, None]
    with torch.no_grad(), quiet():
        _, seen = model.run_with_cache(every, names_filter=lambda name: name.endswith("hook_embed"))
    rows = next(iter(seen.values()))[:, 0]
    assert (rows - model.W_E).abs().max() > 0.1
    mean = rows.mean(0)
    assert_close(Masking.of("mean", adapt(model)).embedding, mean, ROUNDING)
    assert lens.capture.embed_weights.rows(3, torch.float32).dtype == torch.float32
    ours = lens.attribute(3, 5, baseline="mean").values
    assert_close(ours, lens.attribute(3, 5, baseline=mean).values, ROUNDING)


BLOOM, MPT = MORE_BRIDGE["bloom"][1], MORE_BRIDGE["mpt"][1]
SIX = {"n_heads": 6, "d_model": 48}
LEANING = {
    "Bloom of 6 heads": ("Bloom", BLOOM | {"n_head": 6, "hidden_size": 48}),
    "Bloom of 1 head": ("Bloom", BLOOM | {"n_head": 1}),
    "Mpt of 6 heads": ("Mpt", MPT | SIX),
    "Mpt with its options": (
        "Mpt",
        MPT | {"attn_config": {"softmax_scale": 0.7}},
    ),
}
LEANING = LEANING if bridge_offered("mpt") else {}
if HookedTransformer is not None:
    LEANING["hooked"] = ("", SIX | {"positional_embedding_type": "alibi"})


@pytest.mark.parametrize("name", LEANING)
def test_slopes_of_any_number_of_heads(name):
    """Hosts keep slopes in float32; six heads have some that are no powers of 2."""
    cls, config = LEANING[name]
    with quiet():
        model = (
            build_bridge(cls, config, torch.float64) if cls else build_hooked(config, torch.float64)
        )
    stored, lens = test_recomputed.both(model, tokens(seq=30))
    test_recomputed.assert_same_answers(lens, stored, 1e-6)
    a = stored.attribute(3, 5, by="edge", qk=True).values
    assert_close(lens.attribute(3, 5, by="edge", qk=True).values, a, 1e-6)


OPTIONS = {
    "attention_dir": ("bidirectional", "both ways"),
    "use_attention_sinks": (True, "with attention sinks"),
}
KNOWN = ()
if HookedTransformer is not None:
    KNOWN = inspect.signature(find("transformer_lens", "HookedTransformerConfig")).parameters


@pytest.mark.offered(HookedTransformer is not None)
@pytest.mark.parametrize("option", [option for option in OPTIONS if option in KNOWN])
def test_alibi_that_is_not_recomputed_is_stored(option):
    value, what = OPTIONS[option]
    with quiet():
        config = {"positional_embedding_type": "alibi", option: value}
        model = build_hooked(config, torch.float64)
    lens = tensorlens_tl.capture(model, tokens())[1]
    assert lens.completeness_error <= ROUNDING
    with pytest.raises(NotRecomputableError, match=f"does not serve ALiBi {what}"):
        tensorlens_tl.capture(model, tokens(), pattern="recomputed")


@pytest.mark.offered(bridge_offered("bloom"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bloom_in_half_precision(dtype):
    name, config = MORE_BRIDGE["bloom"]
    with quiet(), torch.no_grad():
        model = build_bridge(name, config, dtype)
        model.embed_ln.original_component.weight.mul_(60)  # float16 cannot hold a row's square
    lens = tensorlens_tl.capture(model, tokens())[1]
    assert lens.completeness_error <= 0.05
    with pytest.raises(NotRecomputableError, match=r"BLOOM in half precision.*stored"):
        tensorlens_tl.capture(model, tokens(), pattern="recomputed")
    mean = lens.capture.embed_weights.mean(torch.float64)
    found = Masking.of("mean", adapt(model)).embedding
    assert found.dtype == dtype
    assert_close(found.double(), mean, 0.02)


@pytest.mark.offered(bridge_offered("bloom"))
def test_what_bloom_and_mpt_cannot_do_is_said():
    with quiet():
        name, config = MORE_BRIDGE["bloom"]
        config = config | {"apply_residual_connection_post_layernorm": True}
        model = build_bridge(name, config, torch.float64)
        short = build_bridge("Mpt", MPT, torch.float64)
    with pytest.raises(UnsupportedArchitectureError, match="add to the normalized residual"):
        tensorlens_tl.capture(model, tokens())
    with pytest.raises(ValueError, match="has 33 tokens, but the model's context holds n_ctx = 32"):
        tensorlens_tl.capture(short, tokens(seq=33))


@pytest.mark.offered(bridge_offered("mpt"))
def test_alibi_whose_biases_are_rounded_to_bfloat16_is_not_recomputed():
    with quiet():
        model = build_bridge("Falcon", MORE_BRIDGE["falcon"][1] | {"alibi": True}, torch.float64)
    lens = tensorlens_tl.capture(model, tokens())[1]
    assert lens.completeness_error <= 1e-6
    with pytest.raises(NotRecomputableError, match=r"does not serve .*ALiBiJoint.*stored"):
        tensorlens_tl.capture(model, tokens(), pattern="recomputed")
    with pytest.raises(ValueError, match=r"needs W_Q and W_K, .*ALiBiJoint"):
        lens.attribute(3, by="edge", qk=True)


@pytest.mark.offered(bridge_offered("mpt"))
def test_values_that_mpt_clips_behind_its_hooks_are_found_out():
    for clip, fits in ((1.0, False), (100.0, True)):
        with quiet():
            model = build_bridge("Mpt", MPT | {"attn_config": {"clip_qkv": clip}}, torch.float64)
        if fits:
            lens = tensorlens_tl.capture(model, tokens(), pattern="recomputed")[1]
            assert lens.completeness_error <= 1e-6
        else:
            with pytest.raises(ValueError, match=r"with clip_qkv=1\.0 exactly: it clips values of"):
                tensorlens_tl.capture(model, tokens())


@pytest.mark.offered(bridge_offered("opt"))
@pytest.mark.parametrize(
    "built", [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 16}], ids=str
)
def test_opt_350m_is_refused_by_name(built):
    name, config = MORE_BRIDGE["opt"]
    with quiet():
        model = build_bridge(name, {**config, **built}, torch.float64)
    with pytest.raises(UnsupportedArchitectureError, match="built like opt-350m"):
        tensorlens_tl.capture(model, tokens())


@pytest.mark.offered(bridge_offered("opt"))
def test_dropout_that_opt_keeps_in_its_configuration_is_named():
    name, config = MORE_BRIDGE["opt"]
    with quiet():
        model = build_bridge(name, {**config, "dropout": 0.1}, torch.float64).train()
    with pytest.raises(
        ValueError, match=r"training mode with dropout \(dropout = 0.1\).*model.eval"
    ):
        tensorlens_tl.capture(model, tokens())


@pytest.mark.offered(bridge_offered("bloom"))
def test_the_scale_of_logits_is_in_the_unembedding(monkeypatch):
    """Cohere's own attribute, which only hosts from 4.0 on run as Hugging Face does."""
    with quiet():
        model = build_bridge("Bloom", BLOOM, torch.float64)
    W_U = adapt(model).weights.unembed.W_U.clone()
    monkeypatch.setattr(model.original_model, "logit_scale", 0.25, raising=False)
    assert torch.equal(adapt(model).weights.unembed.W_U, 0.25 * W_U)
