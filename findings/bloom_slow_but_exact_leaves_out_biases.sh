#!/usr/bin/env bash
# BLOOM with slow_but_exact=True and pretraining_tp > 1 leaves out two biases of every block.
#
# transformers 5.23.0, torch 2.13.0. slow_but_exact asks for the very sums that a model trained on
# several devices made. With the same weights, pretraining_tp=1 gives the usual logits; with
# pretraining_tp=2 they are the logits of the model whose self_attention.dense.bias and
# mlp.dense_4h_to_h.bias are zero: the sliced products are summed, and no bias is added.
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
from transformers import BloomConfig, BloomForCausalLM

transformers.logging.set_verbosity_error()
IDS = torch.tensor([[3, 17, 29]])


@torch.no_grad()
def logits(weights, **options):
    config = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=50, **options)
    model = BloomForCausalLM(config).double().eval()
    model.load_state_dict(weights)
    return model(IDS).logits


torch.manual_seed(0)
config = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=50)
weights = BloomForCausalLM(config).double().state_dict()
for name, tensor in weights.items():
    if name.endswith("bias"):
        tensor.normal_()
usual, sliced = logits(weights), logits(weights, slow_but_exact=True, pretraining_tp=2)
print("exact, one slice :", float((logits(weights, slow_but_exact=True) - usual).abs().max()))
print("exact, two slices:", float((sliced - usual).abs().max()))
for name in ("self_attention.dense.bias", "mlp.dense_4h_to_h.bias"):
    weights[f"transformer.h.0.{name}"].zero_()
left = float((logits(weights) - sliced).abs().max())
print("two slices against the usual run without the two biases:", left)
assert (sliced - usual).abs().max() > 1e-2
assert left < 1e-12
PYTHON
