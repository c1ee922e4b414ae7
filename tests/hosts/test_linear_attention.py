"""Gated delta nets, gated attention and latents, against plain Hugging Face models."""

import inspect
from dataclasses import dataclass, fields
from functools import partial

import pytest
import test_contraction
import test_edits
import test_granularity
import test_operator
import test_padding
import test_saving
import torch
from models import (
    MORE,
    MORE_BRIDGE,
    Case,
    HookedTransformer,
    bridge_offered,
    build_hf,
    lens_of,
    quiet,
    tokens,
)

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError, dot_test, validity
from tensorlens_tl.support.configurations import EXCEPTIONS
from tensorlens_tl.support.every_name import exactness, registered, tiny_model, try_name
from tensorlens_tl.support.frozen_gradient import plain_run

WITHIN = 1e-5
"""Hosts compute the recurrence in float32, in chunks, whatever the model's dtype."""
# The Bridges of transformer_lens 3 do not run gated delta nets; captures refuse them.
OWN = ("youtu", "qwen3.5", "olmo-hybrid") if HookedTransformer is None else ("youtu",)
ROWS = [name for name in OWN if bridge_offered(name)]
LAWS = [
    test_operator.test_operator_reproduces_the_logits,
    test_operator.test_adjoint,
    test_operator.test_linear_and_bias_apart,
    test_operator.test_constants_sum_to_the_bias,
    test_operator.test_dense_block_and_scipy,
    test_granularity.test_every_direct_split_sums_to_the_target,
    test_granularity.test_finer_splits_sum_to_the_components,
    test_granularity.test_edges_into_a_reader_sum_to_what_it_makes_of_the_target,
    test_granularity.test_edges_the_slow_way,
    test_contraction.test_rows_and_constants_sum_to_the_target,
    test_padding.test_a_batch_is_its_prompts,
    test_saving.test_with_the_model_everything_is_equal_and_weights_are_the_models_own,
    test_edits.test_every_other_point_that_is_served,
    test_edits.test_an_edit_is_nothing_at_padding,
]
GIVEN = {"gate": "gate", "by": "token", "side": "left", "dtype": torch.float64, "target": 7}


@dataclass(frozen=True)
class InFloat32(Case):
    """A case whose host computes more than norms in float32."""

    def tol(self, dtype: torch.dtype = torch.float64) -> float:
        return max(WITHIN, super().tol(dtype))

    def within(self, compared: str) -> float:
        return max(WITHIN, super().within(compared))


def of(name: str) -> Case:
    case = next(case for case in MORE if case.name == f"bridge-{name}")
    return InFloat32(**{f.name: getattr(case, f.name) for f in fields(Case)})


@pytest.mark.offered(bool(ROWS))
@pytest.mark.parametrize("name", ROWS)
def test_logits_sums_and_gradient_are_those_of_hugging_face(name):
    """Of the model before it is wrapped; the gradient with all that is frozen held."""
    with quiet():
        plain = plain_run(build_hf(*MORE_BRIDGE[name], torch.float64), {"input_ids": tokens()})
        lens = lens_of(of(name))
    assert not plain.no_gradient
    errors = exactness(lens, plain)
    assert {"logits", "token", "component", "adjoint"} <= errors.keys()
    assert max(errors.values()) <= WITHIN, errors
    assert dot_test(lens.operator) < 1e-14


NAMES = (
    "AfmoeForCausalLM",  # a gate on z
    "LagunaForCausalLM",  # one for each head, and as many heads as a layer wants
    "MuseGlimmerForConditionalGeneration",  # norms that show no scale, and a gate
    "Gemma4UnifiedForConditionalGeneration",  # such norms, and one of values
    "Gemma4ForCausalLM",
    "Qwen3NextForCausalLM",  # queries, keys and values of a delta net in one matrix
)
"""Registered names that have such a component."""
RECOMPUTED = NAMES[0], NAMES[2], NAMES[4]
"""Those with layers that do not rotate, a norm of queries without weights, and wide heads."""


@pytest.mark.offered(len(ROWS) > 1)
def test_edits_beside_a_factor_of_the_residual_are_constants(tmp_path):
    """Gemma-4 multiplies what leaves a block: an edit stands before the factor, or behind it."""
    with quiet():
        model = tensorlens_tl.wrap(tiny_model("Gemma4ForCausalLM"))
    ids, delta = tokens()[:1, :6], 0.3 * torch.arange(model.cfg.d_model, dtype=torch.float64)
    plain = model(ids, return_type="logits")
    for layer, point in ((0, "hook_mlp_out"), (0, "hook_resid_post"), (1, "hook_resid_pre")):
        name = f"L{layer}.{point}[user]"
        with model.hooks([(f"blocks.{layer}.{point}", lambda x, hook: x + delta)]):
            logits, lens = tensorlens_tl.capture(model, ids)
        assert (logits - plain).abs().max() > 0.1
        table = lens.attribute(7, by="component")
        assert name in lens.operator.constants() and name in table.labels[0]
        assert max(lens.completeness_error, table.completeness_error) < WITHIN
        assert lens.capture.blocks[0].post_norm.name == "L0.layer_scalar"
        lens.save(tmp_path / "lens")
        again = tensorlens_tl.load(tmp_path / "lens", model)
        assert torch.equal(again.attribute(7).values, lens.attribute(7).values)


@pytest.mark.offered(len(ROWS) > 1)
@pytest.mark.parametrize("name", NAMES if len(ROWS) > 1 else [])
def test_a_component_of_its_own_is_exact(name):
    if name not in registered():
        pytest.skip("the host does not know the name")
    found = try_name(name, ask=name in RECOMPUTED)
    assert found.outcome == "exact", found
    assert max(found.errors.values()) <= WITHIN
    assert not found.answers.get("recomputed")


@pytest.mark.offered("BitNetForCausalLM" in registered())
def test_norms_before_the_output_matrices(tmp_path):
    """BitNet's: mixed values and gated products are divided by scales of the run."""
    with quiet():
        model = tensorlens_tl.wrap(tiny_model("BitNetForCausalLM"))
    ids = tokens()
    plain, lens = tensorlens_tl.capture(model, ids)
    for by in ("head", "neuron", "token"):
        assert lens.attribute(7, by=by).completeness_error < 1e-6
    for point in ("attn.hook_z", "attn.hook_v", "mlp.hook_post", "mlp.hook_pre_linear"):
        edit = [(f"blocks.0.{point}", lambda x, hook: x + 0.1 * x.roll(1, -1))]
        with model.hooks(edit):
            logits, edited = tensorlens_tl.capture(model, ids)
        assert (logits - plain).abs().max() > 0.1
        assert edited.attribute(7, by="component").completeness_error < 1e-6
    lens.save(tmp_path / "lens")
    again = tensorlens_tl.load(tmp_path / "lens", model)
    assert torch.equal(again.attribute(7).values, lens.attribute(7).values)
    # What is moved has the scale that the model gives there, and a row is that row.
    block, part = lens.capture.blocks[0], model.blocks[0].mlp.original_component
    change = block.resid_mid.roll(1, -1)
    x, moved = block.ln2.apply(block.resid_mid) + change, block.mlp.moved(change).map
    assert (moved.apply(x) + moved.bias - part(x)).abs().max() < 1e-5
    query = torch.tensor([2, 4])
    row = block.mlp.hidden_at(x, query)
    assert torch.allclose(row, block.mlp.hidden(x)[torch.arange(2), query], atol=1e-12)
    with pytest.raises(ValueError, match="MLPs without a norm before W_out"):
        other = tensorlens_tl.capture(model, ids.flip(0))[1]
        lens.attribute(7, baseline=other, at="secant")
    with pytest.raises(ValueError, match="L0 of BitNetForCausalLM has a norm before W_O"):
        lens.attribute(7, by="edge", qk=True)
    assert tensorlens_tl.capture(model, ids, pattern="recomputed")[1].completeness_error < 1e-6


@pytest.mark.offered(len(ROWS) > 1)
def test_per_layer_inputs_are_refused_by_name(monkeypatch):
    monkeypatch.delitem(EXCEPTIONS, "Gemma4TextConfig")
    found = try_name("Gemma4ForCausalLM")
    assert found.outcome == "refused" and "per-layer inputs" in found.reason


@pytest.mark.offered(len(ROWS) > 1)
@pytest.mark.parametrize(
    "law", LAWS if len(ROWS) > 1 else [], ids=lambda law: law.__name__.removeprefix("test_")
)
def test_the_law_holds_for_a_gated_delta_net(law, tmp_path):
    given = GIVEN | {"case": of("qwen3.5"), "tmp_path": tmp_path, "path": tmp_path / "lens"}
    law(**{name: given[name] for name in inspect.signature(law).parameters})


@pytest.mark.skipif(len(ROWS) < 2, reason="the host runs no gated delta net")
def test_what_a_gated_delta_net_cannot_answer_is_refused_by_name():
    case = of("qwen3.5")
    lens, model = lens_of(case), case.model()
    other = tensorlens_tl.capture(model, tokens(seed=1))[1]
    circuit, prompts = lens.discover(7, n_edges=3, qk=False), tokens().tolist()
    questions = [
        lambda: tensorlens_tl.capture(model, tokens(), pattern="recomputed"),
        lambda: lens.attribute(7, by="edge", qk=True),
        lambda: lens.attribute(7, baseline=other, at="secant"),
        lambda: lens.discover(7, n_edges=3),
        lambda: circuit.faithfulness(model, prompts, tokens(seed=1).tolist(), 7),
        lambda: validity(model, [*prompts, [3, 4, 5]], held=("pattern",)),
        *(partial(lens.token_matrix, method, model=model) for method in ("attnlrp", "chefer")),
        *(partial(lens.token_matrix, method) for method in ("rollout", "globenc", "alti")),
    ]
    for ask in questions:
        with quiet(), pytest.raises(ValueError, match="gated delta net"):
            ask()
    edited = [("blocks.0.linear_attn.hook_out", lambda x, hook: x * 1.1)]
    with (
        model.hooks(fwd_hooks=edited),
        pytest.raises(CaptureMismatchError, match=r"linear_attn\.hook"),
    ):
        tensorlens_tl.capture(model, tokens())


def test_what_a_delta_net_is_off_by_is_the_float32_of_its_host(monkeypatch):
    """With the recurrence in float64, the same run is as exact as other models with such norms."""
    if "qwen3.5" not in ROWS:
        pytest.skip("this host does not run gated delta nets")
    from transformers.models.qwen3_5 import modeling_qwen3_5 as host

    case = next(case for case in MORE if case.name == "bridge-qwen3.5")
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        text = inspect.getsource(getattr(host, name)).replace("torch.float32", "torch.float64")
        scope = dict(vars(host))
        exec(text[text.index("def ") :], scope)
        monkeypatch.setattr(host, name, scope[name])
    with quiet():
        _, lens = tensorlens_tl.capture(case.build(torch.float64), tokens())
    assert lens.completeness_error <= 1e-6
