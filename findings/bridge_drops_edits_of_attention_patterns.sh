#!/usr/bin/env bash
# Some Bridges show their attention patterns to hooks and do not use what a hook returns.
#
# transformer_lens 4.3.0 with transformers 5.23.0. A hook sets every attention pattern of block 0 to
# zero. On Llama the logits change, as they must. On GPT-Neo, GPT-J and OPT the hook is called once
# and the logits stay the same to rounding; the same holds for the attention scores. An ablation or
# a patching experiment on patterns of these models therefore shows no effect of any head.
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


LLAMA = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
MODELS = {
    "LlamaForCausalLM": LLAMA,
    "GPTNeoForCausalLM": dict(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]
    ),
    "GPTJForCausalLM": dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "OPTForCausalLM": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    ),
}
for name, config in MODELS.items():
    bridge = bridged(build(name, **config))
    plain = bridge(IDS, return_type="logits")
    for point in ("hook_attn_scores", "hook_pattern"):
        calls = []

        def zero(x, hook):
            calls.append(hook.name)
            return torch.zeros_like(x)

        edited = bridge.run_with_hooks(
            IDS, return_type="logits", fwd_hooks=[(f"blocks.0.attn.{point}", zero)]
        )
        change = float((edited - plain).detach().abs().max())
        print(f"{name:<18} {point:<17} called {len(calls)} time, logits moved by {change:.1e}")
        assert len(calls) == 1
        assert change > 1e-2 if name == "LlamaForCausalLM" else change < 1e-12
PYTHON
