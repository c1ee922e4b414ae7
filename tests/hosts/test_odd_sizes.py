"""Models and prompts of odd sizes, or with odd weights, against Hugging Face's own model."""

import pytest
import torch
from models import BRIDGE, D_VOCAB, MORE_BRIDGE, N_CTX, build_bridge_from_module, build_hf, quiet

import tensorlens_tl
from tensorlens_tl.support.tiny_models import bridge_offered

pytestmark = pytest.mark.offered(build_bridge_from_module is not None)
FAMILIES = {**BRIDGE, **MORE_BRIDGE}
EIGHT = ("gpt2", "neox", "llama", "qwen3", "gemma2", "falcon", "opt", "olmo2")
LAYERS, HEADS = ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads")
TOL = 2e-5
"""Of float32 runs, relative to the largest logit: 40 layers, or rows without variance."""


def build(name, keys=(), value=0, **more):
    """A family's tiny model, with one of some keys set to a value where the family has it."""
    kind, config = FAMILIES[name]
    changed = {key: value for key in keys if key in config}
    if keys == HEADS:
        if "num_key_value_heads" in config:
            changed["num_key_value_heads"] = max(1, value // 2)
        if "head_dim" in config:
            changed["head_dim"] = 32 // value
    if keys == LAYERS and "layer_types" in config:
        changed["layer_types"] = (config["layer_types"] * value)[:value]
    with quiet():
        return build_hf(kind, {**config, **changed, **more}, torch.float32)


def holds(hf, ids, target=1):
    """Logits are Hugging Face's, rows sum to theirs, and T is its own adjoint's."""
    with quiet(), torch.no_grad():
        theirs = hf(ids, use_cache=False).logits
        logits, lens = tensorlens_tl.capture(hf, ids)
    size = float(theirs.abs().max())
    assert (logits - theirs).abs().max() <= TOL * size
    rows = lens.attribute(target).values.double()
    largest = max(size, float(rows.abs().sum(-1).max()))
    assert (rows.sum(-1) - theirs[:, -1, target]).abs().max() <= TOL * largest
    assert tensorlens_tl.dot_test(lens.operator) <= TOL
    return lens


def ids_of(n, below=D_VOCAB):
    return torch.randint(0, below, (1, n), generator=torch.Generator().manual_seed(3))


def each(*names):
    return pytest.mark.parametrize("name", [n for n in names if bridge_offered(n)])


@each(*EIGHT)
def test_short_prompts_and_a_full_context(name):
    hf = build(name)
    for n in (1, 2, N_CTX):
        holds(hf, ids_of(n))


@each("gpt2", "neox", "gemma2", "olmo2")
def test_one_layer(name):
    holds(build(name, LAYERS, 1), ids_of(5))


@each("llama")
def test_forty_layers(name):
    holds(build(name, LAYERS, 40), ids_of(5))


@pytest.mark.parametrize("n", [1, 16])
@each("gpt2", "neox", "qwen3", "falcon", "opt")
def test_one_head_and_heads_of_two_dimensions(name, n):
    """NeoX's rotation has a quarter of them, so none where a head has two."""
    lens = holds(build(name, HEADS, n), ids_of(5))
    assert lens.attribute(1, by="edge", qk=True).values.isfinite().all()


@each("llama", "opt")
def test_a_vocabulary_of_two_tokens(name):
    holds(build(name, vocab_size=2, pad_token_id=0), ids_of(5, below=2))


@each("qwen3")
def test_a_width_that_no_number_of_heads_divides(name):
    holds(build(name, hidden_size=30), ids_of(5))


def nothing(hf):
    for weight in hf.parameters():
        weight.zero_()


def large(hf):
    for weight in hf.parameters():
        if weight.ndim == 2:
            weight.mul_(30)


def dead_neurons(hf):
    for name, weight in hf.named_parameters():
        if any(part in name for part in ("c_fc", "h_to_4h", "gate_proj", "fc1")):
            (weight.T if "c_fc.weight" in name else weight)[:5] = 0


def no_embeddings(hf):
    hf.get_input_embeddings().weight.zero_()


@each(*EIGHT)
def test_weights_that_are_zero_large_or_give_dead_neurons(name):
    for change in (dead_neurons, large, no_embeddings, nothing):
        hf = build(name)
        with torch.no_grad():
            change(hf)
        lens = holds(hf, ids_of(5))
    assert lens.attribute(1).values.abs().max() == 0


@each("llama", "gpt2")
def test_no_number_in_the_row_of_a_token_that_is_not_read(name):
    """Served where that row is read by nothing, refused where it is the token's logit, too."""
    hf, ids = build(name), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        hf.get_input_embeddings().weight[7] = torch.nan
    if not hf.config.tie_word_embeddings:
        holds(hf, ids)
        return
    with quiet(), pytest.raises(ValueError, match=r"as the weight transformer\.wte\.weight holds"):
        tensorlens_tl.capture(hf, ids)
