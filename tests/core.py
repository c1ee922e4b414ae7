"""The core: the tests that notice most faults in a minute, on a few models. ``pytest -m core``.

``python tests/mutants.py --core`` tells which faults they notice.
"""

MODELS = ("hooked-gpt2", "hooked-gemma2", "bridge-llama", "native-llama")
"""Models that core tests run on, where they take one: biases; caps, windows, post-norms; groups."""

TESTS = {
    "sublayers": "parts_sum_to_the_whole ratio_times_z_is_the_activation soft_cap_ratio "
    "a_unit_at_zero_is_off",
    "linear_map": "primitives_are_linear_with_exact_adjoints",
    "recomputed": "recomputed_equals_stored padding what_cannot_be_recomputed_is_refused",
    "operator": "operator_reproduces_the_logits adjoint gradient_and_curvature_of_the_frozen_model "
    "constants_sum_to_the_bias conventions_differ_but_agree_on_the_run "
    "the_completeness_error_is_the_largest_one",
    "contraction": "blocks a_row_is_the_attribution_by_token probes_are_reproducible student_t "
    "work_is_cut_where_memory_is_short nothing_reaches_back_from_the_future "
    "as_many_probes_as_dimensions_are_exact bad_matrices_are_refused",
    "secant": "the_softmaxs_secant_is_exact rows_sum_to_the_difference_and_nothing_is_left_over "
    "edges_are_a_flow",
    "no_remainder": "such_an_operator_is_complete and_every_oracle_refutes_it",
    "capturing": "the_self_check_finds probe_products_follow_the_weights",
    "padding": "a_batch_is_its_prompts positions_count_each_prompts_own_tokens",
    "guards": "a_lens_knows_when_it_no_longer_describes_its_run in_place_edits_are_refused "
    "an_edit_that_moves_something_between_two_coordinates_is_seen "
    "real_tokens_that_read_padding_are_refused edits_through_data_are_no_false_refusal",
    "writes": "eight_rows_or_columns_of_any_weight_are_noticed "
    "every_column_and_eight_rows_of_large_matrices_are_noticed",
    "last_guard": "rows_that_are_left_out_are_an_error "
    "other_weights_are_an_error_where_no_sample_tells",
    "tokenizers": "special_tokens_that_are_also_padding padding_of_a_hooked_transformer "
    "prompts_of_a_batch_are_not_mixed_up",
    "edits": "an_edited_final_residual_in_every_split_path_and_file an_edit_is_nothing_at_padding",
    "precision": "autocast_is_refused",
    "bad_input": "hooked_refusals attention_mask a_hook_that_never_fires",
    "attribution": "contributions_sum_to_the_target two_tokens_by_hand norms_by_hand",
    "granularity": "every_direct_split_sums_to_the_target edges_the_slow_way "
    "orders_are_the_powers_of_the_branches totals_agree_with_each_other "
    "edges_into_a_reader_sum_to_what_it_makes_of_the_target constants_are_those_of_the_token_split "
    "a_parallel_block_of_as_many_heads_as_branches",
    "qk_edges": "query_and_key_edges_are_gradients_of_the_real_model",
    "differences": "a_difference_sums_to_the_difference_of_the_models_own_logits baseline_refusals "
    "every_layers_loadings_sum_to_the_effect "
    "fixed_baselines_run_no_second_pass_and_have_no_operator_term",
    "targets": "a_target_less_an_equal_one_is_exactly_0 many_targets_against_others",
    "datasets": "means_are_those_of_single_attributions",
    "paths": "by_hand k_best_equal_brute_force a_budget_stops_the_search_and_says_so "
    "energies_are_upper_bounds_of_all_states",
    "circuits": "restriction_the_slow_way a_selection_is_what_its_definition_says "
    "connected_edges_are_those_on_a_path a_nodes_constants_stay_if_it_has_a_path_to_the_logits "
    "circuits_of_other_models numbers_of_edges",
    "interventions": "shares_and_intervals_by_hand mean_and_zero_against_replacements_by_hand "
    "frozen_patterns_are_no_edges full_and_empty_circuits",
    "baselines_edges": "eap_ig_is_the_mean_slope_along_the_embeddings",
    "discovery": "scores_are_means_over_prompts "
    "an_interrupted_search_goes_on_where_it_was refusals",
    "protocols": "three_tokens_by_hand bounds_of_aopc_are_those_of_all_orders paired_comparisons "
    "rank_correlation_is_scipy_s counts_and_presets",
    "masking": "masked_runs_are_calls_of_the_model outcomes_are_read_off_the_model_s_logits",
    "evaluation": "bos_is_never_masked_and_the_last_token_on_request",
    "baselines": "attention_alone_by_hand norms_by_hand value_zeroing_by_hand decompx_by_hand",
    "baselines_gradient": "gradients_by_hand integrated_gradients_are_complete",
    "saving": "flipped_bits_in_the_data an_edited_weight_is_found_and_named edited_headers",
    "relations": "beta_one_is_exact_on_every_training_prompt bootstrap_intervals "
    "the_operators_map_is_the_frozen_real_model_and_exact_at_beta_one",
    "validity": "radii_by_hand with_all_three_held_the_real_model_is_the_operator",
    "public_api": "eight_results_are_what_they_were",
}
NAMES = {(file, f"test_{name}") for file, names in TESTS.items() for name in names.split()}
SINGLE = {
    "differences": (
        "fixed_baselines_run_no_second_pass_and_have_no_operator_term[bridge-gemma2]",
        "every_layers_loadings_sum_to_the_effect[bridge-neox-gate]",
    ),
    "interventions": ("one_edge_patched_is_path_patching_on_the_host[bridge-llama]",),
    "edits": (
        "an_edited_run_is_reproduced[hooked-gpt2-blocks.1.attn.hook_pattern]",
        "an_edited_run_is_reproduced[bridge-gpt2-blocks.1.attn.hook_pattern]",
    ),
    "more_families": ("slopes_of_any_number_of_heads[Bloom of 6 heads]",),
}
"""Tests of one model each, which none of :data:`MODELS` can stand for."""
CASES = {(file, f"test_{name}") for file, names in SINGLE.items() for name in names}


def is_core(file: str, name: str, test: str, parameters: dict) -> bool:
    """Whether a test of a file is of the core.

    Args:
        file: Name of the file, without ``test_``.
        name: Name of the test with its parameters.
        test: Name of its function.
        parameters: The parameters.

    Returns:
        Whether the test is listed here.
    """
    case = parameters.get("case")
    listed = (file, test) in NAMES and (case is None or str(case) in MODELS)
    return listed or (file, name) in CASES
