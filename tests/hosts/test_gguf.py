"""GGUF files: the model that they hold is the one that is loaded; what cannot be read is refused.

The oracle is a Hugging Face model whose weights are written to a file, unquantized and under the
names of llama.cpp.
"""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensorlens_tl
from tensorlens_tl.hosts.loading import KINDS, _host_class

WORDS = ["<unk>", "<s>", "</s>", *"abcdefgh", "Ġ", "Ġa", "Ġb"]
CONFIG = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def of_llama_cpp(weight, n_heads):
    """Rows of a rotated head in the order of llama.cpp: pairs beside each other."""
    d_head = len(weight) // n_heads
    return weight.view(n_heads, 2, d_head // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with one GGUF file, and the model that is in it."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    folder = tmp_path_factory.mktemp("gguf")
    file = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    file.add_block_count(2)
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_feed_forward_length(48)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_rope_dimension_count(8)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(WORDS))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(WORDS)
    file.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    file.add_token_merges(["Ġ a", "Ġ b"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.state_dict().items():
        for n_heads, part in ((4, "q_proj"), (2, "k_proj")):
            weight = of_llama_cpp(weight, n_heads) if part in name else weight
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        file.add_tensor(name, weight.numpy().copy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return folder, model


IDS = torch.tensor([[1, 3, 5, 4, 9]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_folder", [True, False])
def test_the_file_is_the_model(written, kind, as_folder):
    folder, truth = written
    try:
        _host_class(kind)
    except ValueError as error:
        pytest.skip(str(error))
    path = folder if as_folder else folder / "tiny.gguf"
    model = tensorlens_tl.load_model(path, kind=kind)
    logits, lens = tensorlens_tl.capture(model, IDS)
    torch.testing.assert_close(logits, truth(IDS).logits, atol=2e-6, rtol=1e-5)
    assert lens.completeness_error < 2e-6
    assert "tiny" in repr(lens)
    assert model.to_tokens("a b", prepend_bos=False).tolist() == [[3, 13]]


def test_dtype_and_saving(written, tmp_path):
    folder, _ = written
    try:
        _host_class("bridge")
    except ValueError as error:
        pytest.skip(str(error))
    model = tensorlens_tl.load_model(folder, dtype="float64")
    logits, lens = tensorlens_tl.capture(model, IDS)
    assert (
        lens.dtype == torch.float64 and lens.completeness_error < 1e-6
    )  # its norms run in float32
    hf = tensorlens_tl.unwrap(model)
    hf.save_pretrained(tmp_path)  # its weights are plain, so nothing calls it quantized
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(IDS).logits, logits, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_read(written, tmp_path, monkeypatch):
    folder, _ = written
    whole = (folder / "tiny.gguf").read_bytes()
    (tmp_path / "one.gguf").write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"one.gguf cannot be read by transformers .* Check"):
        tensorlens_tl.load_model(tmp_path)
    (tmp_path / "two.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 GGUF files. Pass one of them: one.gguf, two.gguf"):
        tensorlens_tl.load_model(tmp_path)
    with pytest.raises(ValueError, match="n_devices=2 is no argument of load_model"):
        tensorlens_tl.load_model(folder, n_devices=2)
    with pytest.raises(ValueError, match=r"There is no file .*none.gguf. Pass the path"):
        tensorlens_tl.load_model(tmp_path / "none.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"tiny.gguf needs the package gguf.*tensorlens-tl\[gguf"):
        tensorlens_tl.load_model(folder)
