"""The laws of the other modules, once over, for families that are known block shapes in another dress."""

import inspect

import pytest
import test_attribution
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
from helpers import MORE, HookedTransformer

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
]
GIVEN = {"gate": "gate", "by": "token", "side": "left", "dtype": torch.float64, "target": 7}
SCORES = [
    test_qk_edges.test_query_and_key_edges_are_gradients_of_the_real_model,
    test_secant.test_rows_sum_to_the_difference_and_nothing_is_left_over,
    test_secant.test_edges_are_a_flow,
    test_secant.test_between_equal_runs_it_is_the_models_gradient,
    test_circuits.test_edges_are_those_of_the_attribution,
]
"""Laws of what queries and keys are made of."""
NO_SCORES = {"gemma3", "olmo2", "olmo3", "mpt"}
"""Whose scores' layout is not known here: two rotations, norms over all heads, ALiBi."""
if HookedTransformer is None:
    NO_SCORES |= {"cohere"}  # transformer_lens 4 turns queries another way; the self-check finds it
REFUSALS = (
    r"does not know W_Q and W_K|does not serve the attention|recomputed from W_Q and W_K differs"
)
HOLD_NORMS = [
    test_operator.test_gradient_and_curvature_of_the_frozen_model,
    test_operator.test_an_injected_vector_changes_every_later_site_as_predicted,
    test_attribution.test_token_contributions_are_gradient_times_input_of_the_frozen_model,
    test_granularity.test_totals_are_what_injecting_a_writers_output_into_the_real_model_changes,
    test_qk_edges.test_query_and_key_edges_are_gradients_of_the_real_model,
]
"""Laws whose oracle hooks norms: the Bridge of OLMo cannot run so, as its norms have no weights."""


def family(case):
    return str(case).partition("-")[2].removesuffix("-compat")


HELD = [
    (case, law)
    for case in MORE
    for law in LAWS
    if not (family(case) == "olmo" and law in HOLD_NORMS)
]


@pytest.mark.parametrize(
    ("case", "law"),
    HELD,
    ids=[f"{case}-{law.__name__.removeprefix('test_')}" for case, law in HELD],
)
def test_the_law_holds_or_is_refused_by_name(case, law, tmp_path):
    given = GIVEN | {"case": case, "tmp_path": tmp_path, "path": tmp_path / "lens"}
    given = {name: given[name] for name in inspect.signature(law).parameters}
    unknown = family(case) in NO_SCORES and law in SCORES
    if unknown or (family(case) == "mpt" and law is test_recomputed.test_recomputed_equals_stored):
        with pytest.raises(ValueError, match=REFUSALS):
            law(**given)
    else:
        law(**given)
