#!/usr/bin/env bash
# A Qwen3.5 Bridge of transformer_lens 3.9.0 fails in its gated delta nets when no cache is used.
#
# transformer_lens 3.9.0 with transformers 5.23.0. With use_cache=True, the default, the Bridge gives the
# logits of the Hugging Face model. With use_cache=False, which that model takes, the Bridge computes the
# layer by itself and reads an attribute that transformers does not have: "no attribute causal_conv1d_fn".
#
# Exit status 0: seen as described. Anything else: it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformer_lens==3.9.0 transformers==5.23.0
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


model = build(
    "Qwen3_5ForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"], pad_token_id=0,
)
plain = model(IDS).logits.clone()
assert torch.allclose(model(IDS, use_cache=False).logits, plain, atol=1e-5)
bridge = bridged(model)
print("with a cache:", float((bridge(IDS, return_type="logits") - plain).abs().max()))
assert torch.allclose(bridge(IDS, return_type="logits"), plain, atol=1e-5)
try:
    bridge(IDS, return_type="logits", use_cache=False)
except AttributeError as error:
    print("without:", error)
    assert "causal_conv1d_fn" in str(error)
else:
    raise SystemExit("it runs without a cache now")
PYTHON
