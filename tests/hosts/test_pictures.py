"""Models of pictures: exact against Hugging Face, with patches as rows and classes as targets."""

import pytest
import torch
from comparisons import assert_close
from models import ORACLE, ROUNDING, TOLERANCES, quiet
from oracles import FrozenModel
from pictures import COLUMNS, KINDS, OFFERED, ROWS, build, picture

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError
from tensorlens_tl.attribution import patch_map

pytestmark = pytest.mark.offered(OFFERED)
every_kind = pytest.mark.parametrize("kind", KINDS)
SPLITS = ("token", "constant", "component", "layer", "head", "neuron", "dimension", "order")


@every_kind
def test_the_operator_gives_what_hugging_face_gives(kind):
    _, _, expected, lens = picture(kind)
    ours = lens.readout(lens.operator @ lens.embedding + lens.operator.bias)
    assert_close(ours, expected, ROUNDING)
    assert_close(lens.logits, expected, ROUNDING)
    assert lens.completeness_error <= ROUNDING


@every_kind
@pytest.mark.parametrize("by", SPLITS)
def test_every_split_sums_to_the_class(kind, by):
    case = picture(kind)
    found = case.lens.attribute(case.target, by=by)
    value = case.expected[:, 3] if case.expected.ndim == 2 else case.expected[:, 0] @ case.target
    assert_close(found.target_value, value, ROUNDING)
    assert_close(found.values.sum(1), value, ROUNDING)


@every_kind
def test_the_adjoint_is_the_gradient_of_the_frozen_model(kind):
    model, inputs, _, lens = picture(kind)
    x = lens.embedding.clone().requires_grad_()
    y, _ = FrozenModel(model, inputs)(x)
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (gradient,) = torch.autograd.grad((y * u).sum(), x)
    assert_close(lens.operator.T @ u, gradient, ORACLE)


def test_a_class_of_sound_reads_two_rows_and_every_row_of_the_table_knows_it():
    case = picture("ast")
    y, head = case.lens.capture.unembed.final, case.model.original_model.classifier
    assert_close(head((y[:, 0] + y[:, 1]) / 2), case.expected, ROUNDING)
    x = case.lens.embedding.clone().requires_grad_()
    final, _ = FrozenModel(case.model, case.inputs)(x)
    pooled = (final[:, 0] + final[:, 1]) / 2
    with torch.no_grad():
        p = (y[:, 0] + y[:, 1]) / 2
        scale = (p.var(-1, unbiased=False, keepdim=True) + head.layernorm.eps).sqrt()
    named = dict(head.named_parameters())
    W, w = (next(p for n, p in named.items() if n.startswith(k)) for k in ("dense", "layernorm"))
    normed = (pooled - pooled.mean(-1, keepdim=True)) / scale * w
    (gradient,) = torch.autograd.grad((normed @ W[3]).sum(), x)
    by_row = case.lens.attribute(3).sum("node")
    rows = [i for i, source in enumerate(by_row.sources) if source.pos is not None]
    assert_close(by_row.values[:, rows], (gradient * x).sum(-1), ORACLE)
    heads = case.lens.attribute(3, by="head").sum("pos")
    parts = case.lens.attribute(3, by="component")
    at = {source.node: i for i, source in enumerate(parts.sources)}
    for source, value in zip(heads.sources, heads.values.T, strict=True):
        assert_close(value, parts.values[:, at[source.node]], ROUNDING)
    for asked in (lambda: case.lens[0].paths(3), lambda: case.lens.token_scores("rollout", 3)):
        with pytest.raises(ValueError, match="these classes read the mean of 2"):
            asked()


def test_rows_are_called_after_patches():
    names = picture("deit").lens.tokens[0]
    assert names[:3] == ("[CLS]", "[DIST]", "patch[0,0]")
    assert names[-1] == f"patch[{ROWS - 1},{COLUMNS - 1}]" and len(names) == 2 + ROWS * COLUMNS


def test_cls_patches_and_positions_are_sources_apart():
    case = picture("deit")
    hf, n, found = case.model.original_model, 2, case.lens.capture.embeddings
    assert tuple(found) == ("cls_token", "distillation_token", "patch", "pos_embed")
    start = "deit.embeddings._original_component."
    own = {name.removeprefix(start): p for name, p in hf.named_parameters()}
    for row, name in enumerate(("cls_token", "distillation_token")):
        assert_close(found[name][:, row], own[name][0].expand(2, -1), ROUNDING)
        assert found[name].any(-1).sum() == 2  # in one row of each picture
    for i in range(ROWS):
        for j in range(COLUMNS):
            pixels = case.inputs[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1)
            patch = pixels @ own["patch_embeddings.projection.weight"].flatten(1).T
            patch = patch + own["patch_embeddings.projection.bias"]
            assert_close(found["patch"][:, n + i * COLUMNS + j], patch, ROUNDING)
    assert_close(found["pos_embed"], own["position_embeddings"].expand(2, -1, -1), ROUNDING)
    rows = case.lens.attribute(3).labels[0]
    assert rows[:4] == ('"[CLS]"@0', '"[DIST]"@1', "patch[0,0]", "patch[0,1]")
    assert rows[n + ROWS * COLUMNS] == "pos_embed@0"


def test_classes_are_called_by_name_and_number():
    case = picture("vit")
    by_name, by_number = case.lens.attribute("class 2"), case.lens.attribute(2)
    assert torch.equal(by_name.values, by_number.values)
    assert by_name.target == ("'class 2'",) * 2
    own = case.lens.attribute().target
    assert own == tuple(repr(f"class {i}") for i in case.expected.argmax(-1).tolist())
    difference = case.lens.attribute("class 2", versus="class 1", of="logprob")
    assert_close(difference.target_value, case.expected[:, 2] - case.expected[:, 1], ROUNDING)
    with pytest.raises(ValueError, match=r"target='klass 2' is no class of the model\. Pass a cl"):
        case.lens.attribute("klass 2")


def test_a_direction_is_read_at_any_row_and_a_class_at_one():
    case, u = picture("vit"), torch.linspace(-1, 1, 32, dtype=torch.float64)
    y = case.lens.capture.unembed.final
    for pos, row in ((0, 0), (-1, 0), (3, 3), (-2, -2)):
        assert_close(case.lens.attribute(u, pos=pos).target_value, y[:, row] @ u, ROUNDING)
    with pytest.raises(ValueError, match=r"are read at row 0 alone\. Ask there, or pass"):
        case.lens.attribute("class 2", pos=3)


def test_a_model_without_a_head_has_no_classes():
    lens = picture("vit-headless").lens
    for target in (None, 2, "class 2"):
        with pytest.raises(ValueError, match=r"ViTModel has no head\. Pass a direction in the fin"):
            lens.attribute(target)


WRONG = {
    "a cat": r"The input is a str, and .* reads pictures\. Pass numbers \[batch, channel, row, c",
    (1, 2): "The input is a tuple, and",
    torch.zeros(1, 2, dtype=torch.long): r"The input is torch.int64, and",
    torch.zeros(3, 8, 8): r"The input has shape \[3, 8, 8\], and .* reads \[batch, 3, 12, 8\]\. P",
    torch.zeros(0, 3, 12, 8): r"The input has shape \[0, 3, 12, 8\]",
}


@pytest.mark.parametrize("given", WRONG, ids=lambda given: type(given).__name__)
def test_what_is_no_picture_is_refused(given):
    with pytest.raises(ValueError, match=WRONG[given]):
        tensorlens_tl.capture(picture("vit").model, given)


def test_one_picture_an_array_and_a_processors_mapping():
    model, inputs, expected, _ = picture("vit")
    for given in (inputs[0], inputs[:1].numpy(), {"pixel_values": inputs[:1]}, [inputs[0]]):
        logits, lens = tensorlens_tl.capture(model, given)
        assert len(lens) == 1
        assert_close(logits, expected[:1], ROUNDING)


def test_a_picture_of_another_size():
    hf, inputs = build("vit", rows=COLUMNS)
    inputs = inputs.repeat(1, 1, 2, 2)
    with torch.no_grad(), quiet():
        expected = hf(inputs, interpolate_pos_encoding=True).logits
        logits, lens = tensorlens_tl.capture(hf, inputs, interpolate_pos_encoding=True)
    assert lens.tokens[0][-1] == "patch[3,3]"
    assert_close(logits, expected, ROUNDING)
    assert lens.completeness_error <= ROUNDING


# --- What is asked of a run on a picture


def test_patch_maps_have_rows_and_columns():
    case = picture("deit")
    found = case.lens.attribute(3)
    maps, n = found.grid(), 2 + ROWS * COLUMNS
    assert maps.shape == (2, ROWS, COLUMNS)
    by_row = found.sum("node")
    assert [source.pos for source in by_row.sources[:n]] == list(range(n))
    assert_close(maps.flatten(1), by_row.values[:, 2:n], ROUNDING)
    scores = case.lens.token_scores("in_out", 3)
    assert_close(scores.grid().flatten(1), scores.values[:, 2:], ROUNDING)
    with pytest.raises(ValueError, match=r"No row is a patch of a picture\. Take the map of a run"):
        case.lens.attribute(3, by="component").grid()


def test_a_notebook_shows_the_map_and_what_is_beside_it():
    found = picture("vit").lens[0].attribute(3)
    html = found._repr_html_()
    for value in found.grid()[0].flatten().tolist():
        assert f'title="{value:+.4g}"' in html
    rest = found.sum("node")
    cls = next(v for s, v in zip(rest.sources, rest.values[0].tolist(), strict=True) if s.pos == 0)
    constants = sum(
        v for s, v in zip(rest.sources, rest.values[0].tolist(), strict=True) if s.pos is None
    )
    assert "&quot;[CLS]&quot;@0 <b" in html and f'title="{cls:+.4g}"' in html
    assert f'title="{constants:+.4g}"' in html


def test_several_pictures_have_no_map():
    with pytest.raises(ValueError, match="patches of several pictures"):
        patch_map(("patch[0,0]", "patch[0,0]"), (1, 2), torch.ones(2))


@pytest.mark.parametrize("kind", ["vit", "vit-headless", "ast"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_lens_of_a_picture_is_saved_and_loaded(kind, weights, tmp_path):
    case, path = picture(kind), tmp_path / "lens.safetensors"
    case.lens.save(path, weights=weights)
    loaded = tensorlens_tl.load(path, model=None if weights else case.model)
    assert torch.equal(
        loaded.attribute(case.target).values, case.lens.attribute(case.target).values
    )
    assert loaded.tokens == case.lens.tokens
    assert torch.equal(loaded.capture.prompts.given, case.inputs)
    if kind == "vit":
        assert loaded.attribute("class 2").target == ("'class 2'",) * 2


@pytest.mark.parametrize("point", ["blocks.0.hook_mlp_out", "ln_final.hook_out"])
def test_edits_are_constants_of_their_own(point):
    model, inputs, expected, _ = picture("vit")
    with model.hooks([(point, lambda t, hook: t * 1.5)]):
        logits, lens = tensorlens_tl.capture(model, inputs)
    assert (logits - expected).abs().max() > 1e-2
    assert lens.completeness_error <= ROUNDING
    found = lens.attribute(3)
    assert any("[user]" in label for label in found.labels[0])
    assert found.completeness_error <= ROUNDING


def test_an_edit_of_the_row_that_the_head_reads_is_refused():
    model, inputs, _, _ = picture("vit")
    with (
        model.hooks([("unembed.hook_in", lambda t, hook: t * 1.5)]),
        pytest.raises(CaptureMismatchError, match=r"Take off your own hooks at unembed\.hook_in"),
    ):
        tensorlens_tl.capture(model, inputs)


@pytest.mark.parametrize("kind", ["vit", "ast"])
def test_differences_of_two_pictures_sum(kind):
    case = picture(kind)
    other = tensorlens_tl.capture(case.model, case.inputs.flip(0))[1]
    for by in ("token", "component"):
        found = case.lens.attribute(3, by=by, baseline=other)
        assert_close(found.values.sum(1), case.expected[:, 3] - case.expected.flip(0)[:, 3], ORACLE)


@pytest.mark.parametrize("method", ["grad_x_input", "chefer", "attnlrp", "decompx", "random"])
def test_earlier_methods_score_patches(method):
    case = picture("vit")
    scores = case.lens.token_scores(method, 3, model=case.model)
    assert scores.values.shape == (2, 1 + ROWS * COLUMNS)
    if method == "grad_x_input":
        x = case.inputs.clone().requires_grad_()
        seen = []
        with case.model.hooks([("blocks.0.hook_resid_pre", lambda t, hook: seen.append(t))]):
            logits = case.model(x)
        (gradient,) = torch.autograd.grad(logits[:, 3].sum(), seen)
        assert_close(scores.values, (gradient * seen[0]).sum(-1), ORACLE)


TEXT_ONLY = {
    "attribute_sequence needs token ids": lambda lens, model: lens.attribute_sequence(-2),
    "An embedding as baseline replaces those of tokens": lambda lens, model: lens.attribute(
        3, baseline="mean"
    ),
    "'chefer' has a row per position": lambda lens, model: lens.token_matrix("chefer", model=model),
    "The classes of .* are read at row 0": lambda lens, model: lens.token_matrix("in_out", 3),
}


@pytest.mark.parametrize("words", TEXT_ONLY)
def test_what_needs_text_or_a_prediction_per_row_is_refused(words):
    case = picture("vit")
    with pytest.raises(ValueError, match=words):
        TEXT_ONLY[words](case.lens, case.model)


def test_means_over_pictures():
    case = picture("vit")
    means = tensorlens_tl.mean_attribution(case.model, case.inputs, 3, by="component")
    rows = case.lens.attribute(3, by="component").sum("pos")
    assert_close(means.mean.sum(), case.expected[:, 3].mean(), ROUNDING)
    assert_close(means.mean, rows.values.mean(0), ROUNDING)


# --- Queries and keys, circuits


def test_a_recomputed_pattern_is_the_stored_one():
    case = picture("vit")
    _, lens = tensorlens_tl.capture(case.model, case.inputs, pattern="recomputed")
    other = case.lens.attribute(3).values
    assert_close(lens.attribute(3).values, other, TOLERANCES["oracle"][1])  # softmax in float32


def test_the_secant_between_two_pictures_leaves_nothing_over():
    case = picture("deit")
    other = tensorlens_tl.capture(case.model, case.inputs.flip(0))[1]
    apart = case.expected[:, 3] - case.expected.flip(0)[:, 3]
    found = case.lens.attribute(3, baseline=other, at="secant")
    assert {source.node.kind for source in found.sources} == {*other.capture.embeddings}
    assert_close(found.values.sum(1), apart, TOLERANCES["two runs"][1])
    edges = case.lens.attribute(3, by="edge", baseline=other, at="secant", qk=True)
    into = edges.select(dest="logits")
    assert_close(into.values.sum(1), apart, TOLERANCES["two runs"][1])


@pytest.mark.parametrize("kind", ["vit", "ast"])
def test_all_edges_are_the_model_and_none_the_other_picture(kind):
    case, other = picture(kind), picture(kind).inputs * 0.5
    circuit = case.lens.discover(3, n_edges=110, qk=True)
    proof = circuit.faithfulness(case.model, case.inputs, other, target="class 3")
    with torch.no_grad():
        ablated = case.model(other)[:, 3]
    assert_close(proof.circuit, case.expected[:, 3], TOLERANCES["oracle"][1])
    assert_close(proof.full, case.expected[:, 3], TOLERANCES["oracle"][1])
    assert_close(proof.ablated, ablated, TOLERANCES["oracle"][1])
    headless = picture("vit-headless")
    with pytest.raises(ValueError, match=r"A logit is measured, and ViTModel has no head\. Pass m"):
        circuit_of(headless).faithfulness(headless.model, headless.inputs, headless.inputs)


def test_a_circuit_of_all_nodes_has_the_models_classes():
    lens = picture("ast").lens
    names = [f"L{i}{node}" for i in range(2) for node in ("H0", "H1", "H2", "H3", "MLP")]
    assert_close(lens.circuit(names).logits, lens.logits, ROUNDING)


def circuit_of(case):
    return case.lens.discover(case.target, n_edges=5, qk=False)
