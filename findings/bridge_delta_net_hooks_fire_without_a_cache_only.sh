#!/usr/bin/env bash
# Hook points inside a gated delta net do not fire on a plain run of a Qwen3.5 Bridge.
#
# transformer_lens 4.3.0 with transformers 5.23.0. The Bridge has hook points for queries, keys, values,
# gates and the recurrence. With use_cache=True, the default of the model, none of them fires: run_with_cache
# leaves them out, and run_with_hooks passes over an edit there without a word. With use_cache=False all fire.
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


model = build(
    "Qwen3_5ForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"], pad_token_id=0,
)
bridge, point = bridged(model), "blocks.0.linear_attn.hook_v"
assert point in bridge.hook_dict
plain = bridge(IDS, return_type="logits")
off = {}
for use_cache in (True, False):
    _, cache = bridge.run_with_cache(IDS, use_cache=use_cache)
    edited = bridge.run_with_hooks(
        IDS, return_type="logits", use_cache=use_cache,
        fwd_hooks=[(point, lambda value, hook: torch.zeros_like(value))],
    )
    off[use_cache] = float((edited - plain).abs().max())
    print(f"use_cache={use_cache}: in the cache {point in cache}, an edit moves {off[use_cache]:.1e}")
    assert (point in cache) is not use_cache
assert off[True] == 0 and off[False] > 1e-3
PYTHON
