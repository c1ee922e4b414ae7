"""Ragged batches, padded left and right: each prompt is what it is alone."""

from functools import cache

import pytest
import torch
from comparisons import assert_close
from models import D_VOCAB, GATED, PER_SHAPE, SHAPES, build_bridge_from_module, quiet, tokens

import tensorlens_tl

LENGTHS = (7, 4, 1, 5)
SIDES = ("right", "left")

every_case = pytest.mark.parametrize("case", SHAPES, ids=str)
both_sides = pytest.mark.parametrize("side", SIDES)


def spans(side):
    width = max(LENGTHS)
    return [(0, n) if side == "right" else (width - n, width) for n in LENGTHS]


def prompts():
    return [tokens(1, n, seed=i) for i, n in enumerate(LENGTHS)]


def batch(side):
    """Ids [prompt, pos] with an ordinary token at padding, and the attention mask."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), D_VOCAB - 1)
    mask = torch.zeros_like(ids)
    for row, (prompt, (start, stop)) in enumerate(zip(prompts(), spans(side), strict=True)):
        ids[row, start:stop], mask[row, start:stop] = prompt[0], 1
    return ids, mask


def capture(model, ids, **kwargs):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(model, ids, **kwargs)[1]


@cache
def singles(case, dtype=torch.float32):
    """Every prompt alone."""
    return [capture(case.model(dtype), prompt) for prompt in prompts()]


def overflows(case, side):
    """Whether this host gives real tokens NaN in float64.

    Hugging Face masks scores with float64's lowest number and takes the softmax in float32, where
    that is −∞: a query that sees no real key (left padding; behind a sliding window also right
    padding) becomes NaN, and the next layer's 0 · NaN reaches real tokens. In compatibility mode
    the Bridge masks by itself.
    """
    if not case.name.startswith("bridge-") or case.name.endswith("-compat"):
        return False
    windowed = "mistral" in case.name or "gemma2" in case.name
    float32 = case.float32_norms or case.name == "bridge-opt"
    return float32 and (side == "left" or windowed)


def assert_equal_to_single(lens, singles, side, tol):
    assert lens.capture.frame.spans == tuple(spans(side))
    assert lens.completeness_error <= tol
    op, x = lens.operator, lens.embedding
    rows = lens.operator.apply(x), lens.operator.bias, lens.readout(op.apply(x) + op.bias)
    first, last = op.block(-1, 0), op.block(0, 0)
    total = {by: lens.attribute(3, 4, by=by) for by in ("token", "component")}
    for i, (single, (start, stop)) in enumerate(zip(singles, spans(side), strict=True)):
        alone, mine = single.operator, slice(start, stop)
        assert lens.tokens[i] == single.tokens[0]
        assert_close(lens.logits[i, mine], single.logits[0], tol, "logits")
        assert_close(x[i, mine], single.embedding[0], tol, "embedding")
        theirs = alone.apply(single.embedding), alone.bias
        theirs = *theirs, single.readout(theirs[0] + theirs[1])
        for name, ours, other in zip(("T·X", "bias", "readout"), rows, theirs, strict=True):
            assert_close(ours[i, mine], other[0], tol, name)
        assert_close(first[i], alone.block(-1, 0)[0], tol, "block")
        assert_close(last[i], alone.block(0, 0)[0], tol, "block")
        one = lens[i]
        assert one.completeness_error <= tol
        assert_close(one.operator.bias, alone.bias, tol, "one of the batch")
        for by, whole in total.items():
            part, other = whole[i], single.attribute(3, 4, by=by)
            assert part.labels == other.labels and part.target == other.target
            scale = other.values.abs().sum()
            assert (part.values - other.values).abs().max() <= tol * scale
            assert (one.attribute(3, 4, by=by).values - other.values).abs().max() <= tol * scale
            assert part.completeness_error <= 10 * tol
            assert_close(part.target_value, other.target_value, 10 * tol, "target")


@both_sides
@every_case
def test_a_batch_is_its_prompts(case, side):
    dtype = torch.float32 if overflows(case, side) else torch.float64
    model, (ids, mask) = case.model(dtype), batch(side)
    lens = capture(model, ids, attention_mask=mask)
    # Batched matrix products round in another order; both sides of a comparison do.
    tol = case.tol() if dtype == torch.float64 else 2 * case.tol(dtype)
    assert_equal_to_single(lens, singles(case, dtype), side, tol)


@both_sides
@pytest.mark.parametrize("case", GATED[:1] + GATED[-1:], ids=str)
@pytest.mark.parametrize("gate", ["up", "half"])
def test_other_conventions(case, side, gate):
    model, (ids, mask) = case.model(torch.float32), batch(side)
    lens = capture(model, ids, attention_mask=mask, gate=gate)
    singles = [capture(model, prompt, gate=gate) for prompt in prompts()]
    assert_equal_to_single(lens, singles, side, 2 * case.tol(torch.float32))


@both_sides
@pytest.mark.parametrize("case", PER_SHAPE, ids=str)
def test_positions_count_each_prompts_own_tokens(case, side):
    model, (ids, mask) = case.model(torch.float32), batch(side)
    keep = [0, 1, 3]  # the shortest has one token only
    lens = capture(model, ids[keep], attention_mask=mask[keep])
    for pos in (0, 2, -4):
        whole = lens.attribute(3, pos=pos)
        for i, k in enumerate(keep):
            alone = singles(case)[k]
            single = alone.attribute(3, pos=pos)
            assert whole[i].labels == single.labels
            # One token's only contribution may all but cancel inside: rounding is the logits'.
            scale = single.values.abs().sum() + alone.logits.abs().max()
            off = (whole[i].values - single.values).abs().max()
            assert off <= 2 * case.tol(torch.float32) * scale
    with pytest.raises(
        ValueError, match=r"Position 4 is outside prompt 1, which has 4 tokens. Pass -4 to 3"
    ):
        lens.attribute(3, pos=4)


@both_sides
@pytest.mark.offered(any(overflows(case, "left") for case in SHAPES))
@pytest.mark.parametrize("case", [c for c in SHAPES if overflows(c, "left")], ids=str)
def test_nan_in_real_tokens_is_refused_with_its_cause(case, side):
    ids, mask = batch(side)
    if overflows(case, side):
        with pytest.raises(
            ValueError, match=r"L1 pattern: .* not finite .usual causes: padding in a float64"
        ):
            capture(case.model(), ids, attention_mask=mask)
    assert not any(point._forward_hooks for point in case.model().hook_dict.values())
    assert capture(case.model(), tokens()).completeness_error <= case.tol()


NAN = [  # either point on either side, by turns
    (case, SIDES[(i + j) % 2], f"blocks.1.{name}")
    for i, case in enumerate(SHAPES)
    for j, name in enumerate(("hook_attn_out", "attn.hook_pattern"))
]


@pytest.mark.parametrize(("case", "side", "name"), NAN, ids=str)
def test_nan_at_padding_is_nobodys(case, side, name):
    """In the last layer no real token reads it any more: the host's logits there are NaN, too."""
    model, (ids, mask) = case.model(torch.float32), batch(side)
    real = mask.bool()

    def spoil(t, hook):
        rows = real[:, None, :, None] if hook.name.endswith("pattern") else real[..., None]
        return torch.where(rows, t, torch.nan)

    with model.hooks(fwd_hooks=[(name, spoil)]):
        lens = capture(model, ids, attention_mask=mask)
    # boot_native of 3.9 makes an edited pattern finite
    assert lens.logits[~real].isnan().all() or case.name.startswith("native")
    assert lens.logits[real].isfinite().all()
    assert not any("[user]" in constant for constant in lens.operator.constants())
    assert_equal_to_single(lens, singles(case), side, 2 * case.tol(torch.float32))


@every_case
def test_nan_in_one_real_token_is_refused(case):
    model, (ids, mask) = case.model(torch.float32), batch("right")

    def spoil(t, hook):
        t = t.clone()
        t[1, 3] = torch.nan
        return t

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", spoil)]),
        pytest.raises(
            ValueError, match=r"activations of a real token are not finite .* Use float32"
        ),
    ):
        capture(model, ids, attention_mask=mask)


if build_bridge_from_module is not None:
    from models import BRIDGE, build_bridge

    @pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
    @both_sides
    def test_the_hosts_own_nan_at_padding(name, side):
        """One layer in float64: the softmax over nothing stays in padding rows."""
        class_name, config = BRIDGE[name]
        with quiet():
            model = build_bridge(
                class_name, {**config, "num_hidden_layers": 1, "layer_types": None}, torch.float64
            )
        ids, mask = batch(side)
        lens = capture(model, ids, attention_mask=mask)
        windowed = name in ("mistral", "gemma2")
        assert lens.logits[~mask.bool()].isnan().any() == (side == "left" or windowed)
        singles = [capture(model, prompt) for prompt in prompts()]
        assert_equal_to_single(lens, singles, side, 1e-6)
