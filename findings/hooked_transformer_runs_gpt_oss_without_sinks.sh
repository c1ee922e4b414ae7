#!/usr/bin/env bash
# A HookedTransformer of transformer_lens 2.18.0 runs GPT-OSS without its attention sinks.
#
# transformer_lens 2.18.0 with transformers 4.57.6, float32, random weights. The configuration and the
# weights go through the two functions that from_pretrained calls. The converted model has no parameter for
# the sinks, and its log-probabilities differ by more than 1. With sinks of -10000, which take no share of
# the attention, both agree to 1e-4.
#
# Exit status 0: seen as described. Anything else: it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformer_lens==2.18.0 pyarrow==20.0.0 transformers==4.57.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PYTHON'
import warnings

import torch
import transformers
from transformer_lens import HookedTransformer, HookedTransformerConfig, loading_from_pretrained

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
IDS = torch.tensor([[3, 17, 29, 5, 41, 8]])


def build(name, dtype=torch.float32, **config):
    """A random Hugging Face model with biases and gains that are not 0 and 1."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(vocab_size=50, **config)).to(dtype).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p += 0.1 * torch.randn_like(p)
    model.set_attn_implementation("eager")
    return model


def hooked(model):
    """The same weights as a HookedTransformer."""
    model.save_pretrained("model")
    known = loading_from_pretrained.convert_hf_model_config("model")
    known |= dict(dtype=torch.float32, device="cpu", model_name="tiny", tokenizer_name=None)
    found = HookedTransformer(HookedTransformerConfig.from_dict(known))
    state = loading_from_pretrained.convert_gpt_oss_weights(model, found.cfg)
    found.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )
    return found


model = build(
    "GptOssForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48, num_local_experts=4,
    num_experts_per_tok=2, rope_scaling=None, max_position_embeddings=64, initializer_range=0.3,
    pad_token_id=0, architectures=["GptOssForCausalLM"],
)
off = {}
for sinks in ("random", "none"):
    if sinks == "none":
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    other = hooked(model)
    assert not [name for name, _ in other.named_parameters() if "sink" in name]
    off[sinks] = float((other(IDS).log_softmax(-1) - model(IDS).logits.log_softmax(-1)).abs().max())
    print(f"sinks: {sinks:<6} log-probabilities differ by {off[sinks]:.1e}")
assert off["random"] > 1 and off["none"] < 1e-4
PYTHON
