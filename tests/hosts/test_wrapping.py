"""The model that the user passed is the one that is described, or is refused and left as it was."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import (
    BRIDGE,
    HOOKED,
    MORE_BRIDGE,
    ROUNDING,
    HookedTransformer,
    build_bridge_from_module,
    build_hf,
    build_hooked,
    quiet,
    to_bridge,
    tokens,
)
from torch import nn

import tensorlens_tl
from tensorlens_tl import UnsupportedArchitectureError
from tensorlens_tl.hosts import wrapping
from tensorlens_tl.refusals import supported
from tensorlens_tl.support.tiny_models import _OTHER_BRIDGE

wraps = pytest.mark.offered(build_bridge_from_module is not None)
hooked = pytest.mark.offered(HookedTransformer is not None)
ROWS = BRIDGE | MORE_BRIDGE | _OTHER_BRIDGE
FIXED = HookedTransformer is None
"""Under transformer_lens 4 Cohere's queries and keys are turned as Hugging Face turns them."""


def build(family, dtype=torch.float32, **options):
    name, config = ROWS[family]
    with quiet():
        return build_hf(name, config | options, dtype)


def plain(model, ids=None):
    with quiet(), torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def capture(model, *args, **kwargs):
    with quiet(), torch.no_grad():
        return tensorlens_tl.capture(model, *args, **kwargs)


def state(model):
    """All that a Bridge could have changed of a model."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            list(module._modules),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    } | {"": (model.config._attn_implementation, list(model.state_dict()))}


def refused(model, match, error=UnsupportedArchitectureError, ids=None):
    before = state(model)
    with quiet(), torch.no_grad(), pytest.raises(error, match=match):
        tensorlens_tl.capture(model, tokens() if ids is None else ids)
    assert state(model) == before


# --- The Bridge is the model ----------------------------------------------------------------------

OTHERS = [
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt-bigcode", {"scale_attn_weights": False}),
    ("gemma3", {"attn_logit_softcapping": 2.0}),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}),
    *([] if FIXED else [("cohere", {}), ("cohere", {"logit_scale": 1.0}), ("cohere2", {})]),
]


@wraps
@pytest.mark.parametrize(("family", "options"), OTHERS, ids=str)
def test_a_bridge_with_other_logits_is_refused_with_the_difference(family, options):
    model = build(family, torch.float64, **options)
    with quiet(), torch.no_grad():
        ids = wrapping._probe_ids(model)
        ours = to_bridge(build(family, torch.float64, **options))(ids, return_type="logits")
    theirs = plain(model, ids)
    off = (ours - theirs).abs().max() / theirs.abs().max()
    what = " and ".join(f"{key}={value}" for key, value in options.items())
    what = "transformer_lens 3" if family.startswith("cohere") else what
    assert off > 0.05
    refused(model, rf"{type(model).__name__} with {what} exactly.* differ.* by {off:.1e} of the")
    with quiet():
        own = to_bridge(build(family, torch.float64, **options))
    with pytest.raises(UnsupportedArchitectureError, match=f"{what} exactly: its Bridge gives oth"):
        capture(own, tokens())


@wraps
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "glm", "codegen", "falcon"])
def test_rounding_is_no_other_model(family, dtype):
    """These Bridges compute in another order than Hugging Face, and are taken in every dtype."""
    model = build(family, dtype)
    bridge = tensorlens_tl.wrap(model)
    assert type(bridge).__name__ == "TransformerBridge"
    tensorlens_tl.unwrap(bridge)


FAULTS = [
    (torch.float64, 1e-3, True),
    (torch.float32, 1e-3, True),
    (torch.float32, 1e-6, False),
    (torch.bfloat16, 0.5, True),
    (torch.float16, 0.1, True),
    (torch.float16, 1e-3, False),
]


@wraps
@pytest.mark.parametrize(("dtype", "fault", "found"), FAULTS, ids=str)
def test_how_wrong_a_bridge_may_be(dtype, fault, found):
    """A Bridge whose head's output is off by a factor."""
    model = build("gpt2", dtype)
    before = state(model)

    def faulty():
        bridge = to_bridge(model)
        bridge.unembed.register_forward_hook(lambda module, args, out: out * (1 + fault))
        return bridge

    with quiet():
        if not found:
            assert wrapping.build_bridge(model, faulty) is vars(model)[wrapping.BRIDGE]
            return
        with pytest.raises(UnsupportedArchitectureError, match=r"differ .* by .*rounding explains"):
            wrapping.build_bridge(model, faulty)
    assert state(model) == before


@wraps
@pytest.mark.parametrize(
    ("token", "logit", "found"),
    [(4, -torch.inf, False), (7, 0.1, True), (4, torch.inf, True), (7, -torch.inf, True)],
)
def test_logits_of_minus_infinity_do_not_hide_the_others(token, logit, found):
    """A vocabulary that is masked in part: the same infinities in both, and the rest compared."""
    model, ids = build("gpt2"), torch.arange(7)[None]
    masked = torch.zeros(model.config.vocab_size)
    masked[3:5] = -torch.inf
    with quiet(), torch.no_grad():
        expected = model(ids).logits + masked
        bridge = to_bridge(model)
        masked[token] = logit
        bridge.unembed.register_forward_hook(lambda module, args, out: out + masked)
        off, rounding = wrapping._difference(model, bridge, ids, expected)
    assert expected.isinf().any() and (off > rounding) == found


@wraps
def test_a_bridge_that_gives_nan_or_cannot_be_built_is_refused():
    model = build("gpt2")
    before = state(model)

    def broken():
        to_bridge(model)
        raise KeyError("embed")

    def nan():
        bridge = to_bridge(model)
        bridge.unembed.register_forward_hook(lambda module, args, out: out * torch.nan)
        return bridge

    for make, match in ((broken, "cannot bridge it .KeyError: 'embed'"), (nan, "by inf of")):
        with quiet(), pytest.raises(UnsupportedArchitectureError, match=match):
            wrapping.build_bridge(model, make)
        assert state(model) == before


@wraps
def test_comparing_leaves_mode_and_random_numbers_alone():
    """Dropout is on in some modules, and one random number is drawn before and after."""
    model = build("gpt2")
    model.transformer.h[1].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = torch.rand(1)
    bridge = tensorlens_tl.wrap(model)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    with pytest.raises(ValueError, match="training mode with dropout"):
        capture(bridge, tokens())
    assert modes == [module.training for module in tensorlens_tl.unwrap(model).modules()]


@wraps
def test_a_model_in_training_mode_is_left_as_it_was():
    refused(build("gpt2").train(), r"training mode with dropout.*Call model.eval\(\)", ValueError)


@wraps
def test_a_model_whose_tokenizer_is_refused_is_left_as_it_was():
    model = build("gpt2")
    before = state(model)
    with quiet(), pytest.raises(ValueError, match="tokenizer is an object"):
        tensorlens_tl.wrap(model, object())
    assert state(model) == before


@wraps
@pytest.mark.offered(FIXED)
@pytest.mark.parametrize("family", ["cohere", "cohere2"])
def test_cohere_is_hugging_face_s_in_compatibility_mode(family):
    model = build(family, torch.float64)
    expected = plain(model).log_softmax(-1)
    with quiet():
        bridge = tensorlens_tl.wrap(model)
        bridge.enable_compatibility_mode()
    logits, lens = capture(bridge, tokens())
    assert (logits.log_softmax(-1) - expected).abs().max() < 1e-6 > lens.completeness_error
    with pytest.raises(ValueError, match=r"has processed the weights.*Load the Hugging Face model"):
        tensorlens_tl.unwrap(model)


# --- The way back ---------------------------------------------------------------------------------


@wraps
@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "opt", "gptj"])
def test_unwrap_gives_the_model_back(family, tmp_path):
    model = build(family, torch.float64)
    if family in ("gpt2", "llama"):
        model.set_attn_implementation("sdpa")
    before, expected = state(model), plain(model)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    _, lens = capture(model, tokens())
    bridge = tensorlens_tl.wrap(model)
    assert state(model) != before
    with pytest.raises(ValueError, match=r"has renamed its weights. Call tensorlens_tl.unwrap"):
        model.save_pretrained(tmp_path / "wrapped")
    assert tensorlens_tl.unwrap(bridge) is model
    assert state(model) == before
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert torch.equal(plain(model), expected)
    assert lens.attribute(3)[0].completeness_error < 1e-5
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    again.set_attn_implementation(model.config._attn_implementation)
    assert (plain(again) - expected).abs().max() < ROUNDING
    with pytest.raises(ValueError, match=r"taken off its model by unwrap.*tensorlens_tl\.wrap"):
        capture(bridge, tokens())
    assert tensorlens_tl.unwrap(model) is model
    assert capture(model, tokens())[1].completeness_error < 1e-6
    assert tensorlens_tl.wrap(model) is not bridge


@wraps
def test_weights_stay_as_they_are_now():
    """What was trained or moved through the Bridge is the model's."""
    model = build("llama")
    bridge = tensorlens_tl.wrap(model)
    with quiet(), torch.no_grad():
        bridge.blocks[0].mlp.out.original_component.weight.mul_(2)
        bridge.to(torch.float64)
        expected = bridge(tokens(), return_type="logits")
    tensorlens_tl.unwrap(bridge)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(plain(model), expected)


@wraps
def test_what_unwrap_cannot_give_back():
    with quiet():
        bridge = to_bridge(build("gpt2"))
    with pytest.raises(ValueError, match=r"was not made by tensorlens_tl\.wrap"):
        tensorlens_tl.unwrap(bridge)
    refused(
        bridge.original_model, "inside a TransformerBridge already.*Pass that Bridge", ValueError
    )


@wraps
def test_two_threads_wrap_once():
    model, found = build("gpt2"), []
    threads = [
        threading.Thread(target=lambda: found.append(tensorlens_tl.wrap(model))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(map(id, found))) == 1


@wraps
def test_a_model_bears_its_own_name(tmp_path):
    model = build("gpt2")
    assert repr(capture(model, tokens())[1]).startswith("TensorLens(GPT2LMHeadModel,")
    tensorlens_tl.unwrap(model)
    model.name_or_path = "someone/tiny-gpt2"
    assert repr(capture(model, tokens())[1]).startswith("TensorLens(someone/tiny-gpt2,")
    tensorlens_tl.unwrap(model).save_pretrained(tmp_path / "my-model")
    again = type(model).from_pretrained(tmp_path / "my-model").eval()
    assert repr(capture(again, tokens())[1]).startswith("TensorLens(my-model,")


# --- Weights that cannot be read ------------------------------------------------------------------


class Packed(nn.Module):
    """Four bits of a weight to a number, like the 4-bit layers of several packages."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Grouped(nn.Module):
    """Integers, scales and zeros in buffers, like the layers of others."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.to(torch.int32))
        self.register_buffer("scales", torch.ones(1))


class Subclass(torch.Tensor):
    """A tensor that says it is float32, and cannot be turned."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "permute" in str(func):
            raise NotImplementedError("aten.permute")
        return super().__torch_function__(func, types, args, kwargs or {})


def _subclassed(linear):
    del linear._parameters["weight"]
    linear._parameters["weight"] = torch.randn(8, 32).as_subclass(Subclass)
    linear.in_features, linear.out_features = 32, 8
    return linear


@wraps
@pytest.mark.parametrize("pack", [Packed, Grouped, _subclassed], ids=lambda f: f.__name__)
def test_quantized_weights_are_named(pack):
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = pack(nn.Linear(32, 16, bias=False))
    kind = "Subclass of " if pack is _subclassed else f"{pack.__name__} of "
    refused(
        model,
        rf"layers\.1\.self_attn\.v_proj are quantized \({kind}.*without quantization, or deq",
    )


@hooked
def test_quantized_weights_of_another_host():
    model = build_hooked(HOOKED["gpt2"], torch.float32)
    model.blocks[1].mlp.extra = Grouped(nn.Linear(4, 4))
    with pytest.raises(UnsupportedArchitectureError, match=r"blocks\.1\.mlp\.extra are quantized"):
        capture(model, tokens())


@wraps
def test_weights_that_are_elsewhere_are_named():
    model = build("llama")
    for hook in (
        SimpleNamespace(offload=True),
        SimpleNamespace(hooks=[SimpleNamespace(offload=True)]),
    ):
        model.model.layers[1].mlp._hf_hook = hook
        refused(model, r"model\.layers\.1\.mlp are offloaded\. Load the model whole on one device")
    model.model.layers[1].mlp._hf_hook = SimpleNamespace(offload=False)
    assert capture(model, tokens())[1].completeness_error < 1e-5
    model = build("llama")
    model.model.layers[1].mlp.to("meta")
    refused(model, r"layers\.1\.mlp\.gate_proj are on the meta device, without values\. Load the")


# --- Adapters -------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A linear layer with a LoRA adapter beside it, built as peft builds it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        rows, columns = base.weight.shape if isinstance(base, nn.Linear) else base.weight.T.shape
        self.lora_A = nn.Linear(columns, rank, bias=False, dtype=base.weight.dtype)
        self.lora_B = nn.Linear(rank, rows, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapted(family, *paths):
    model = build(family, torch.float64)
    for path in paths:
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, Linear(model.get_submodule(path)))
    return model.eval()


@wraps
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_adapters_on_queries_and_keys_are_served(family):
    at = {"llama": "model.layers.{}.self_attn.{}_proj", "gptj": "transformer.h.{}.attn.{}_proj"}
    model = adapted(family, at[family].format(0, "q"), at[family].format(1, "k"))
    expected = plain(model)
    assert (expected - plain(build(family, torch.float64))).abs().max() > 1e-3
    logits, lens = capture(model, tokens())
    assert (logits - expected).abs().max() < ROUNDING
    assert lens.completeness_error < 1e-6
    assert lens.attribute(3, by="head")[0].completeness_error < 1e-5
    with pytest.raises(ValueError, match="needs W_Q and W_K"):
        lens.attribute(3, by="edge", qk=True)


ADAPTED = [
    ("llama", "model.layers.0.self_attn.v_proj", "blocks.0.attn.v"),
    ("llama", "model.layers.1.self_attn.o_proj", "blocks.1.attn.o"),
    ("llama", "model.layers.1.mlp.gate_proj", "blocks.1.mlp.gate"),
    ("llama", "lm_head", "unembed"),
    # one matrix for queries, keys and values, which the Bridge would split without the adapter
    ("gpt2", "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
    (
        "neox",
        "gpt_neox.layers.1.attention.query_key_value",
        "gpt_neox.layers.1.attention.query_key_",
    ),
]


@wraps
@pytest.mark.parametrize(("family", "path", "name"), ADAPTED, ids=str)
def test_adapters_elsewhere_are_named(family, path, name):
    match = rf"LoRA adapter at {name}.*Merge it first: model = model\.merge_and_unload"
    refused(adapted(family, path), match)


@wraps
def test_a_model_of_peft_s_own_class_is_told_to_merge():
    class PeftModelForCausalLM(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model, self.config = model, model.config

        def merge_and_unload(self):
            return self.base_model

    model = PeftModelForCausalLM(adapted("llama", "model.layers.0.self_attn.v_proj"))
    refused(model, r"LoRA adapter at base_model\.model\.layers\.0\.self_attn\.v_proj")


# --- Sparse autoencoders --------------------------------------------------------------------------


class Autoencoder(nn.Module):
    def forward(self, x):
        return x * 1


HOOKED_POINTS = [
    "hook_embed",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_attn_out",
    "blocks.1.attn.hook_z",
]


@hooked
@pytest.mark.parametrize("name", HOOKED_POINTS)
def test_an_autoencoder_in_place_of_a_hook_point_is_named(name):
    model = build_hooked(HOOKED["gpt2"], torch.float32)
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = Autoencoder()
    match = rf"A module Autoencoder stands at {name} in place of the hook point\. Take it off"
    with pytest.raises(UnsupportedArchitectureError, match=match):
        capture(model, tokens())


@wraps
def test_an_autoencoder_in_a_bridge_is_named():
    with quiet():
        model = to_bridge(build("gpt2"))
    model.blocks[0]._modules["hook_out"] = Autoencoder()
    with pytest.raises(
        UnsupportedArchitectureError, match=r"A module Autoencoder stands at blocks\.0\.hook_o"
    ):
        capture(model, tokens())


@wraps
def test_a_bridge_that_hides_hook_points_is_named():
    with quiet():
        model = to_bridge(build("gpt2"))

    class SAETransformerBridge(type(model)):
        @property
        def hook_dict(self):
            return {k: v for k, v in super().hook_dict.items() if "attn.hook_v" not in k}

    model.__class__ = SAETransformerBridge
    match = (
        r"a SAETransformerBridge, has no hook point blocks\.0\.attn\.hook_v.*TransformerBridge it"
    )
    with pytest.raises(ValueError, match=match):
        capture(model, tokens())


# --- Architectures and options --------------------------------------------------------------------

OBSTACLES = [
    ("t5", "an encoder and a decoder, with attention between them"),
    ("mamba", "a state space or other recurrence in block 0: MambaMixer"),
    (("GPT2Model", {"n_embd": 32, "n_layer": 1, "n_head": 4}), "no unembedding, so its output"),
    (("BioGptForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}),
     "blocks in biogpt.layers that no test covers: BioGptDecoderLayer"),
]  # fmt: skip


@wraps
@pytest.mark.parametrize(("what", "match"), OBSTACLES, ids=lambda x: str(x)[:20])
def test_an_untested_architecture_is_refused_for_its_first_obstacle(what, match):
    if isinstance(what, str):
        model = build(what)
    else:
        name, config = what
        cls = getattr(transformers, name)
        model = cls(cls.config_class(**config))
    with pytest.raises(UnsupportedArchitectureError, match=f"exactly: it has {match}") as error:
        capture(model, tokens())
    assert str(error.value).count(". ") == 1


@wraps
def test_an_obstacle_in_a_users_own_bridge_is_the_same():
    with quiet():
        bridge = to_bridge(build("mamba"))
    with pytest.raises(UnsupportedArchitectureError, match="recurrence in block 0: MambaMixer"):
        capture(bridge, tokens())


OPTIONS = [
    (
        "opt",
        {"_remove_final_layer_norm": True},
        "_remove_final_layer_norm=True exactly: transformer",
    ),
    (
        "falcon",
        {"new_decoder_architecture": True},
        "new_decoder_architecture=True exactly: transfor",
    ),
    ("neox", {"attention_bias": False}, "attention_bias=False exactly: transformer_lens .* cannot"),
    (
        "gpt-bigcode",
        {"multi_query": False},
        "multi_query=False exactly: transformer_lens .* cannot",
    ),
    ("opt", {"word_embed_proj_dim": 16}, "built like opt-350m"),
    ("falcon", {"activation": "gelu_10"}, "the activation 'ClippedGELUActivation'"),
]


@wraps
@pytest.mark.parametrize(("family", "options", "match"), OPTIONS, ids=str)
def test_an_option_in_the_way_is_named(family, options, match):
    refused(build(family, **options), match)


@wraps
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("falcon", {"activation": "relu"}),
        ("gemma", {"hidden_activation": "gelu"}),
        ("gemma3", {"hidden_activation": "gelu"}),
        ("gpt2", {"activation_function": "quick_gelu"}),
        ("olmo", {"clip_qkv": 500.0}),
    ],
    ids=str,
)
def test_an_option_that_is_no_matter_is_served(family, options):
    """Activations are read off the modules that compute them, and a wide clip clips nothing."""
    model = build(family, torch.float64, **options)
    expected = plain(model)
    logits, lens = capture(model, tokens())
    assert (logits - expected).abs().max() < 1e-6 > lens.completeness_error


@wraps
@pytest.mark.parametrize(
    ("family", "options"),
    [("olmo", {"clip_qkv": 0.5}), ("mpt", {"attn_config": {"clip_qkv": 0.5}})],
)
def test_a_clip_that_clips_is_named(family, options):
    """And the model is then as it was, unless it was wrapped before."""
    model, clips = build(family, torch.float64, **options), r"with clip_qkv=0\.5 exactly: it clips"
    before = state(model)
    for call in (capture, lambda *given: tensorlens_tl.discover(*given, n_edges=3)):
        with pytest.raises(UnsupportedArchitectureError, match=clips):
            call(model, tokens())
        assert state(model) == before
    bridge = tensorlens_tl.wrap(model)
    with pytest.raises(UnsupportedArchitectureError, match=clips):
        capture(model, tokens())
    assert vars(model)[wrapping.BRIDGE] is bridge
    tensorlens_tl.unwrap(bridge)


@wraps
@pytest.mark.parametrize(
    ("version", "match"),
    [((5, 23), ""), ((5, 24), "transformers 5.24 or later.*transformers<5.24")],
)
def test_codegen_is_refused_where_no_bridge_runs_it(monkeypatch, version, match):
    monkeypatch.setattr(supported, "_version", lambda package="transformer_lens": version)
    with quiet():
        bridge = to_bridge(build("codegen"))
    if match:
        with pytest.raises(UnsupportedArchitectureError, match=match):
            capture(bridge, tokens())
    else:
        assert capture(bridge, tokens())[1].completeness_error < 1e-5


# --- What is taken for a model --------------------------------------------------------------------


def test_names_and_other_things_are_no_models():
    for call in (tensorlens_tl.wrap, lambda name: tensorlens_tl.capture(name, [1, 2])):
        match = r"model is 'gpt2', which is the name of a model\. Load .*load_model\('gpt2'\)"
        with pytest.raises(ValueError, match=match):
            call("gpt2")
    for thing in (3, nn.Linear(2, 2), None):
        with pytest.raises(
            UnsupportedArchitectureError, match="which is neither a HookedTransform"
        ):
            tensorlens_tl.wrap(thing)


@hooked
def test_a_host_is_wrapped_already():
    model = build_hooked(HOOKED["gpt2"], torch.float32)
    assert tensorlens_tl.wrap(model) is model
    with pytest.raises(ValueError, match="tokenizer is for Hugging Face models only"):
        tensorlens_tl.wrap(model, object())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"dtype": "float23"}, "dtype='float23' is no dtype of weights"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8 is no dtype of weights"),
        ({"dtype": 16}, "dtype=16 is no dtype of weights"),
        ({"device": "gpu"}, "device='gpu' is no device of PyTorch. Pass one such as"),
    ],
    ids=str,
)
def test_loading_with_a_misspelt_argument(given, match):
    with pytest.raises(ValueError, match=match):
        tensorlens_tl.load_model("gpt2", **given)


def test_a_dtype_may_be_named():
    from tensorlens_tl import demo

    with quiet():
        model = tensorlens_tl.load_model(str(demo.model_folder()), dtype="float64")
    assert model.W_U.dtype == torch.float64


@wraps
def test_a_hugging_face_model_is_taken_wherever_a_model_is(tmp_path):
    """Each call gets a model that nothing has wrapped before."""
    from tensorlens_tl import evaluation, relations

    def fresh():
        return build("llama")

    clean, corrupted = tokens()[:1], tokens()[1:]
    _, lens = capture(fresh(), tokens())
    with quiet():
        for method in ("attnlrp", "chefer"):
            wrapped = tensorlens_tl.wrap(fresh())
            expected = lens.token_scores(method, 3, model=wrapped).values
            assert torch.equal(lens.token_scores(method, 3, model=fresh()).values, expected)
        path = tmp_path / "lens.safetensors"
        lens.save(path)
        loaded = tensorlens_tl.load(path, model=fresh())
        assert torch.equal(loaded.attribute(3).values, lens.attribute(3).values)
        circuit = tensorlens_tl.discover(fresh(), clean, corrupted, target=3, n_edges=5)
        ours = tensorlens_tl.faithfulness(fresh(), clean, circuit, corrupted, target=3)
        theirs = circuit.faithfulness(tensorlens_tl.wrap(fresh()), clean, corrupted, target=3)
        assert torch.equal(ours.circuit, theirs.circuit)
        assert tensorlens_tl.score_edges(fresh(), clean, corrupted, target=3)
        assert evaluation.evaluate(fresh(), tokens().tolist(), ["in_out"])
        many = tokens(batch=4).tolist()
        assert relations.validity(fresh(), many, kinds=("random",), sizes=(0.1,))


@wraps
def test_a_model_of_other_sizes_did_not_make_the_run():
    _, lens = capture(build("llama"), tokens())
    for options in ({"hidden_size": 64}, {"vocab_size": 20}):
        with (
            quiet(),
            pytest.raises(ValueError, match=r"does not repeat .* has other sizes than Llama"),
        ):
            lens.token_scores("chefer", 3, model=build("llama", **options))
    with pytest.raises(ValueError, match="model is 'gpt2', which is the name of a model"):
        lens.token_scores("chefer", 3, model="gpt2")


def test_loading_a_lens_to_a_misspelt_device(tmp_path):
    from tensorlens_tl import demo

    path = tmp_path / "lens.safetensors"
    demo.load_model().run_with_tensorlens("The capital of France is")[1].save(path)
    with pytest.raises(ValueError, match="device='gpu' is no device of PyTorch"):
        tensorlens_tl.load(path, device="gpu")


@wraps
def test_a_copy_of_a_wrapped_model_is_wrapped_itself():
    model = build("llama")
    tensorlens_tl.wrap(model)
    again = copy.deepcopy(model)
    before = tensorlens_tl.unwrap(model)
    assert tensorlens_tl.unwrap(again) is again is not before
    assert state(again) == state(before)
    assert torch.equal(plain(again), plain(before))
