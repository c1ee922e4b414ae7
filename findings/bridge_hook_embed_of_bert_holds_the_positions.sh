#!/usr/bin/env bash
# hook_embed of a BERT Bridge is what leaves the embeddings' norm, so decompose_resid counts positions twice.
#
# transformer_lens 4.3.0 with transformers 5.23.0, float64. In GPT-2, hook_embed is the token's embedding, and
# cache.decompose_resid(0) sums to what enters block 0. In BERT, hook_embed is the sum of token, position and
# type, normalized, and is itself what enters block 0. hook_pos_embed is added to it: the parts do not sum.
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


MODELS = {
    "GPT2LMHeadModel": dict(n_embd=32, n_layer=2, n_head=4),
    "BertForMaskedLM": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.3,
    ),
}
for name, config in MODELS.items():
    _, cache = bridged(build(name, torch.float64, **config)).run_with_cache(IDS)
    token = float((cache["hook_embed"] - cache["embed.hook_out"]).abs().max())
    entering = cache["blocks.0.hook_in"]
    off = float((cache.decompose_resid(0).sum(0) - entering).abs().max() / entering.abs().max())
    print(f"{name}: hook_embed is {token:.1e} from the token's embedding, parts are {off:.1e} off")
    if name == "BertForMaskedLM":
        assert torch.equal(cache["hook_embed"], entering) and token > 0.1 and off > 0.1
    else:
        assert token == 0 and off < 1e-12
PYTHON
