#!/usr/bin/env bash
# A TransformerBridge's cache holds most tensors under several names.
#
# transformer_lens 4.3.0 with transformers 5.23.0. run_with_cache on a GPT-2 of two layers gives 93
# names and 45 different places in memory: old names (blocks.0.hook_resid_pre) stand beside the
# Bridge's own (blocks.0.hook_in). A sum, a count or a memory figure over all entries of the cache
# therefore counts most activations twice.
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


bridge = bridged(build("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=64))
_, cache = bridge.run_with_cache(IDS)
places = {(x.data_ptr(), x.shape) for x in cache.values()}
once = sum(shape.numel() for _, shape in places)
every = sum(x.numel() for x in cache.values())
print(f"{len(cache)} names, {len(places)} tensors; {every} numbers in all entries, {once} in memory")
a, b = cache["blocks.0.hook_resid_pre"], cache["blocks.0.hook_in"]
assert a.data_ptr() == b.data_ptr()
assert (len(cache), len(places)) == (93, 45)
assert every > 2 * once
PYTHON
