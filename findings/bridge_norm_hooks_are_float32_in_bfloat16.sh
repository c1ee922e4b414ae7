#!/usr/bin/env bash
# Two hook points inside a norm give float32 in a bfloat16 TransformerBridge, all others bfloat16.
#
# transformer_lens 4.3.0 with transformers 5.23.0. In a bfloat16 Llama Bridge, ln1.hook_normalized and
# ln1.hook_scale are float32, while what enters and leaves the norm is bfloat16. Multiplying the cached
# normalized residual by W_V, as analysis code does, raises an error of mixed dtypes.
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


bridge = bridged(
    build(
        "LlamaForCausalLM", torch.bfloat16, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=48,
    )
)
_, cache = bridge.run_with_cache(IDS)
kinds = {name: x.dtype for name, x in cache.items() if name.startswith("blocks.0.ln1.")}
print(kinds)
for point in ("hook_normalized", "hook_scale"):
    assert kinds[f"blocks.0.ln1.{point}"] == torch.float32
for point in ("hook_in", "hook_out"):
    assert kinds[f"blocks.0.ln1.{point}"] == torch.bfloat16
try:
    cache["blocks.0.ln1.hook_normalized"] @ bridge.W_V[0, 0]
except RuntimeError as error:
    print(error)
else:
    raise SystemExit("the product works now")
PYTHON
