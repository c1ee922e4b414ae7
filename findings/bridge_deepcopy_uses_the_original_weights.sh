#!/usr/bin/env bash
# A deep copy of a Falcon Bridge still multiplies by the weights of the original.
#
# transformer_lens 4.3.0 with transformers 5.23.0. A bfloat16 Falcon Bridge is copied by
# copy.deepcopy, and the copy is turned to float32. Running the copy raises a RuntimeError about
# mixed dtypes, because its linear layers still read the original's bfloat16 weights. A Llama Bridge
# can be copied and converted.
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

import copy

for name, config in {
    "LlamaForCausalLM": dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    ),
    "FalconForCausalLM": dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
}.items():
    bridge = bridged(build(name, torch.bfloat16, **config))
    twin = copy.deepcopy(bridge).float()
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    try:
        seen = str(twin(IDS, return_type="logits").dtype)
    except RuntimeError as error:
        seen = str(error)
    print(f"{name}: {seen}")
    assert ("same dtype" in seen) == (name == "FalconForCausalLM")
PYTHON
