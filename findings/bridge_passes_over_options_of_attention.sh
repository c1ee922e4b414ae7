#!/usr/bin/env bash
# A TransformerBridge computes attention anew and passes over two options of the configuration.
#
# transformer_lens 4.3.0 with transformers 5.23.0, float64. GPT-2 with scale_attn_weights=False and
# Gemma-3 with attn_logit_softcapping are run by transformers, wrapped, and run again: the logits part
# by more than a hundredth of the largest one. With the options at their defaults they agree.
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
IDS = torch.tensor([[3, 17, 29, 5, 41, 8]])


def build(name, dtype=torch.float64, **config):
    """A random Hugging Face model with biases and gains that are not 0 and 1."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(vocab_size=50, **config)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn_like(p)
    model.set_attn_implementation("eager")
    return model


def bridged(model):
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config, tokenizer=None)


GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
GEMMA3 = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, query_pre_attn_scalar=8, pad_token_id=0, initializer_range=0.3,
)
CASES = [
    ("GPT2LMHeadModel", GPT2, {}),
    ("GPT2LMHeadModel", GPT2, dict(scale_attn_weights=False)),
    ("Gemma3ForCausalLM", GEMMA3, {}),
    ("Gemma3ForCausalLM", GEMMA3, dict(attn_logit_softcapping=2.0)),
]
for name, config, option in CASES:
    model = build(name, **config, **option)
    plain = model(IDS).logits.detach().clone()
    inside = bridged(model)(IDS, return_type="logits")
    off = float((inside - plain).detach().abs().max() / plain.abs().max())
    print(f"{name:<18} {option or 'defaults'}: differs by {off:.1e} of the largest logit")
    assert off > 1e-2 if option else off < 1e-5
PYTHON
