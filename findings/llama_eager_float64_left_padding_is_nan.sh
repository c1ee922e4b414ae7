#!/usr/bin/env bash
# Llama with eager attention in float64 gives NaN for every token of a left-padded prompt.
#
# transformers 5.23.0, torch 2.13.0, CPU. The same prompt with the same attention mask is finite in
# float32 and bfloat16 with eager attention, and in float64 with sdpa. In float64 with eager attention
# the logits are NaN at the real tokens, too, not at padding alone.
#
# Exit status 0: seen as described. Anything else: it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=50, pad_token_id=0,
    )
).double().eval()
ids = torch.tensor([[0, 0, 3, 17, 29, 5]])
found = {}
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    for kind in ("eager", "sdpa"):
        model.to(dtype).set_attn_implementation(kind)
        with torch.no_grad():
            rows = model(ids, attention_mask=(ids != 0).long()).logits
        found[dtype, kind] = rows.isnan().any(-1)[0].tolist()
        print(dtype, kind, "NaN at", [i for i, nan in enumerate(found[dtype, kind]) if nan])
assert all(found.pop((torch.float64, "eager")))
assert not any(any(rows) for rows in found.values())
PYTHON
