"""Every refusal says what was expected, what came, and what to do."""

import numpy as np
import pytest
import torch
from models import (
    BRIDGE,
    CASES,
    D_VOCAB,
    N_CTX,
    ROUNDING,
    SHAPES,
    HookedTransformer,
    build_hf,
    build_hooked,
    lens_of,
    quiet,
    to_bridge,
    tokens,
)
from models import build_bridge_from_module as bridge_builder

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError, UnsupportedArchitectureError, demo

every_host = pytest.mark.parametrize(
    "case",
    [next(c for c in SHAPES if c.host == host) for host in sorted({c.host for c in SHAPES})],
    ids=str,
)


def refused(model, inputs, match, error=ValueError, **kwargs):
    with quiet(), torch.no_grad(), pytest.raises(error, match=match):
        tensorlens_tl.capture(model, inputs, **kwargs)


@every_host
@pytest.mark.parametrize("empty", [[], [[]], torch.zeros(1, 0).long()], ids=repr)
def test_empty_prompt(case, empty):
    refused(case.model(), empty, "The prompt is empty. Give at least one token")


@every_host
def test_too_long(case):
    refused(
        case.model(),
        torch.zeros(1, N_CTX + 1).long(),
        rf"{N_CTX + 1} tokens, but the model's context holds n_ctx = {N_CTX}. Shorten the prompt",
    )


@every_host
@pytest.mark.parametrize("wrong", [-1, D_VOCAB])
def test_ids_outside_the_vocabulary(case, wrong):
    refused(
        case.model(),
        [1, wrong, 2],
        rf"Token id {wrong} is outside.*Give ids from 0 to {D_VOCAB - 1}",
    )


@every_host
@pytest.mark.parametrize(
    "inputs",
    [3.5, torch.zeros(2, 3), torch.zeros(1, 2, 3).long(), [[1, 2], [3]], {"a": 1}, 7],
    ids=["float", "floats", "three axes", "ragged", "dict", "one id"],
)
def test_no_tokens(case, inputs):
    refused(case.model(), inputs, "The input is .*Pass ")


@every_host
def test_what_can_be_read_once_is_a_prompt(case):
    """A generator of ids, of rows of ids, and of strings, where the run needs the prompt twice."""
    model, ids = case.model(), tokens()
    with quiet(), torch.no_grad():
        expected = model(ids, return_type="logits")
        for given in ((row.tolist() for row in ids), iter(list(ids))):
            assert torch.equal(tensorlens_tl.capture(model, given)[0], expected)
        one = tensorlens_tl.capture(model, (int(i) for i in ids[1]))[1]
        assert one.capture.prompts.tokens.tolist() == ids[1:].tolist()
        half, texts = demo.load_model(case.host).to(torch.bfloat16), ["The capital", "The key is"]
        lens = tensorlens_tl.capture(half, (t for t in texts), noise_floor=True)[1]
    assert len(lens) == 2 and lens.tokens[1][-1] == "is"
    column = np.array(texts)  # of strings, as a column of a table is
    with quiet(), torch.no_grad():
        assert tensorlens_tl.capture(half, column)[1].tokens == lens.tokens
    refused(model, (i for i in ()), "The prompt is empty")


@every_host
def test_text_without_a_tokenizer(case):
    refused(case.model(), "Hello", "no tokenizer. Pass token ids")


@every_host
@pytest.mark.parametrize("key", ["return_type", "stop_at_layer", "past_kv_cache"])
def test_arguments_that_change_the_run(case, key):
    refused(
        case.model(), tokens(), f"{key} would change what is run.*Call without it", **{key: None}
    )


@every_host
@pytest.mark.parametrize("key", ["prepend_boss", "target"])
def test_arguments_that_nobody_takes(case, key):
    """A Hugging Face model would swallow them, and a misspelt target be no target."""
    refused(
        case.model(),
        tokens(),
        f"{key} is no argument of this function .*Check the name",
        **{key: True},
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_ids_are_told_apart_from_prompts(side):
    """Ids of two lengths from ``to_tokens``: refused without their mask, right with it."""
    model, texts = demo.load_model(), ["When Mary and John went to", "The capital"]
    ids, where = (
        model.to_tokens(texts, padding_side=side),
        {"left": "begins", "right": "ends"}[side],
    )
    match = rf"prompt 1 {where} in the padding token \(id 2\).*Pass strings, or the attention_mask"
    refused(model, ids, match)
    refused(model, ids[1:], f"prompt 0 {where} in the padding token .id 2., so padding would")
    with quiet(), torch.no_grad():
        batch = tensorlens_tl.capture(model, ids, attention_mask=ids != 2)[1]
        alone = tensorlens_tl.capture(model, texts[1])[1]
    assert batch[1].attribute().target_value == pytest.approx(alone.attribute().target_value, 1e-5)


@every_host
def test_attention_mask(case):
    match = r"attention_mask has shape \[2, 3\], but the token ids have \[2, 7\]"
    refused(case.model(), tokens(), match, attention_mask=torch.ones(2, 3))
    gap = torch.ones(2, 7)
    gap[1, 3] = 0
    refused(case.model(), tokens(), "prompt 1 is empty or has a gap", attention_mask=gap)


@every_host
def test_not_finite(case):
    model = case.build(torch.float64)
    with torch.no_grad():
        model.unembed.W_U[0, 0] = float("nan")
    refused(model, tokens(), "logits.*not finite, as the weight .* holds NaN or infinity")


@every_host
def test_an_edit_that_is_not_served(case):
    """A hook on the unembedding's output changes the logits: refused, and the hook named."""
    model = case.model()

    def double(t, hook):
        return t * 2

    if "unembed.hook_out" in model.hook_dict:
        with model.hooks(fwd_hooks=[("unembed.hook_out", double)]):
            refused(
                model,
                tokens(),
                r"logits.*your own hooks at (.*_out|hook_unembed): .*not served",
                error=CaptureMismatchError,
            )


@every_host
def test_a_hook_that_edits_the_pattern_is_frozen_as_seen(case):
    model = case.model()

    def first_key_only(t, hook):
        return torch.zeros_like(t).index_fill(-1, torch.tensor([0]), 1.0)

    with (
        quiet(),
        torch.no_grad(),
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", first_key_only)]),
    ):
        _, lens = tensorlens_tl.capture(model, tokens())
    assert lens.completeness_error <= case.tol()
    assert lens.capture.blocks[1].attn.pattern[..., 0].min() == 1


@every_host
@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
def test_split_inputs(case, flag):
    model = case.model()
    try:
        setattr(model.cfg, flag, True)
        refused(model, tokens(), rf"cfg\.{flag} is on, which gives every head.*set_{flag}\(False\)")
    finally:
        setattr(model.cfg, flag, False)


@every_host
@pytest.mark.parametrize("flag", ["use_attn_result", "use_hook_mlp_in"])
def test_other_flags_are_served(case, flag):
    model = case.build(torch.float64)
    getattr(model, f"set_{flag}")(True)
    with quiet(), torch.no_grad():
        _, lens = tensorlens_tl.capture(model, tokens())
    assert lens.completeness_error <= case.tol()


def test_no_transformer_lens_model():
    refused(
        torch.nn.Linear(2, 2),
        tokens(),
        "model is a Linear, which is neither a HookedTransformer nor a TransformerBridge",
    )
    with pytest.raises(ValueError, match="tokenizer is for Hugging Face models only"):
        tensorlens_tl.capture(SHAPES[0].model(), tokens(), tokenizer=object())


# --- Targets, positions, sites


def test_targets():
    lens = lens_of(SHAPES[0])
    for target, match in (
        (D_VOCAB, rf"target={D_VOCAB} is outside .*an id from 0 to {D_VOCAB - 1}"),
        (" Mary", "target=' Mary' is a string, but the model has no tokenizer. Pass a token id"),
        (
            torch.zeros(5),
            r"shape \[5\] is no direction .* in logits \[50\] or in the final residual \[32\]",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            lens.attribute(target)
    with pytest.raises(
        ValueError, match=r"Position 7 is outside prompt 0, which has 7 tokens. Pass -7 to 6"
    ):
        lens.attribute(3, pos=7)


def test_sites():
    lens = lens_of(SHAPES[0])
    with pytest.raises(
        ValueError, match=r"no residual site 'blocks\.9\.hook_resid_pre'. Pass one of blocks\.0"
    ):
        lens.between("blocks.9.hook_resid_pre", "unembed.hook_in")
    with pytest.raises(ValueError, match=r"comes before 'unembed.*Swap the two"):
        lens.between("unembed.hook_in", "blocks.0.hook_resid_pre")
    with pytest.raises(IndexError, match="There is no prompt 2"):
        lens[2]


@pytest.mark.wrong_types
def test_sites_that_are_no_names():
    with pytest.raises(ValueError, match=r"no residual site 2. Pass one of blocks\.0"):
        lens_of(SHAPES[0]).token_matrix("norm", layers=(1, 2))


# --- Refused by name


if HookedTransformer is not None:

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            ({"positional_embedding_type": "shortformer"}, "'shortformer' positions"),
        ],
    )
    def test_hooked_refusals(config, match):
        model = build_hooked(config, torch.float32)
        refused(
            model,
            tokens(),
            f"Cannot freeze .*{match}.*Supported models are listed in docs/models.md",
            UnsupportedArchitectureError,
        )

    def test_a_folder_that_the_host_cannot_load(tmp_path):
        build_hf(*BRIDGE["gemma2"], torch.float32).save_pretrained(tmp_path)
        with quiet(), pytest.raises(ValueError, match=r"has no Gemma2ForCausalLM. Load it with"):
            tensorlens_tl.load_model(str(tmp_path), kind="hooked")


if bridge_builder is not None:

    def test_bridge_refuses_an_untested_architecture():
        bridge = CASES["bridge-gpt2"].build(torch.float32)
        bridge.cfg.architecture = "MambaForCausalLM"
        refused(bridge, tokens(), "Cannot freeze MambaForCausalLM", UnsupportedArchitectureError)

    def test_bridge_in_training_mode_with_dropout():
        bridge = CASES["bridge-gpt2"].build(torch.float32)
        bridge.train()
        refused(bridge, tokens(), r"training mode with dropout \(.*p = 0.1\).*Call model\.eval\(\)")

    def test_bridge_with_an_unknown_activation():
        bridge = to_bridge(
            build_hf("GPT2", {**BRIDGE["gpt2"][1], "activation_function": "mish"}, torch.float32)
        )
        refused(
            bridge, tokens(), "Cannot freeze the activation 'Mish", UnsupportedArchitectureError
        )

    def test_a_hook_that_never_fires():
        bridge = CASES["bridge-gpt2"].build(torch.float32)
        bridge.blocks[1].attn.hook_pattern.forward = lambda x: x
        point = type(bridge.blocks[1].attn.hook_pattern)()
        bridge.blocks[1].attn._modules["hook_pattern"] = point
        refused(
            bridge,
            tokens(),
            "Block 1 ran without exposing its pattern.*attn_implementation='eager'",
        )

    def test_a_hugging_face_model_is_wrapped_once():
        hf = build_hf(*BRIDGE["gpt2"], torch.float64)
        with quiet(), torch.no_grad():
            expected = hf(tokens()).logits
            logits, _ = tensorlens_tl.capture(hf, tokens())
            _, again = tensorlens_tl.capture(hf, tokens())
        assert (logits - expected).abs().max() <= ROUNDING
        assert again.completeness_error <= ROUNDING and tensorlens_tl.wrap(
            hf
        ) is tensorlens_tl.wrap(hf)

    def test_bridge_of_a_hugging_face_model_equals_it():
        hf = build_hf(*BRIDGE["llama"], torch.float32)
        with quiet(), torch.no_grad():
            expected = build_hf(*BRIDGE["llama"], torch.float32)(tokens()).logits
            logits, _ = tensorlens_tl.capture(to_bridge(hf), tokens())
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@every_host
def test_a_model_without_blocks(case):
    model = case.build(torch.float64)
    model.blocks = torch.nn.ModuleList()
    refused(model, tokens(), "Cannot freeze .* it has no blocks", UnsupportedArchitectureError)
