#!/usr/bin/env bash
# enable_compatibility_mode folds GPT-OSS's value biases as if the attention sinks took no share.
#
# transformer_lens 4.3.0 with transformers 5.23.0, float32, random weights. A value bias times W_O is moved
# into b_O, which is right where every row of a pattern sums to 1. With sinks the rows sum to less, and the
# log-probabilities change by more than 0.1. With fold_value_biases=False, or with sinks of -10000, which
# take no share, they change by less than 1e-4.
#
# Exit status 0: seen as described. Anything else: it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformer_lens==4.3.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PYTHON'
import warnings

import torch
import transformers
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

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


def bridged(model):
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config, tokenizer=None)


def changed(sinks=None, **options):
    """How far compatibility mode moves the log-probabilities."""
    model = build(
        "GptOssForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, num_local_experts=4,
        num_experts_per_tok=2, initializer_range=0.3, pad_token_id=0,
    )
    if sinks is not None:
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(sinks)
    bridge = bridged(model)
    before = bridge(IDS, return_type="logits").log_softmax(-1).clone()
    bridge.enable_compatibility_mode(disable_warnings=True, **options)
    return float((bridge(IDS, return_type="logits").log_softmax(-1) - before).abs().max())


with_sinks, kept, without = changed(), changed(fold_value_biases=False), changed(-1e4)
print(f"sinks {with_sinks:.1e}, biases kept {kept:.1e}, no sinks {without:.1e}")
assert with_sinks > 0.1 and kept < 1e-4 and without < 1e-4
PYTHON
