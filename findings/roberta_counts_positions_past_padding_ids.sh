#!/usr/bin/env bash
# A padding id inside a prompt moves the positions of RoBERTa's later tokens, whatever the attention mask.
#
# transformers 5.23.0. RoBERTa counts positions over tokens that are not the padding id, and does not read the
# attention mask. With a mask of ones, the prompt 3 17 <pad> 5 41 8 has positions 2 3 1 4 5 6, where any other
# token in that place has 2 3 4 5 6 7. BERT, beside it, has 0 1 2 3 4 5 in both.
#
# Exit status 0: seen as described. Anything else: it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PYTHON'
import warnings

import torch
import transformers

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)


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


PROMPTS = torch.tensor([[3, 17, 1, 5, 41, 8]]), torch.tensor([[3, 17, 9, 5, 41, 8]])
EXPECTED = {
    "Roberta": ([[2, 3, 1, 4, 5, 6]], [[2, 3, 4, 5, 6, 7]]),
    "Bert": ([[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4, 5]]),
}
for family, expected in EXPECTED.items():
    model = build(
        f"{family}ForMaskedLM", hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, pad_token_id=1,
    )
    found = []
    table = model.base_model.embeddings.position_embeddings
    table.register_forward_hook(lambda module, args, output: found.append(args[0].tolist()))
    for ids in PROMPTS:
        model(ids, attention_mask=torch.ones_like(ids))
    print(family, *found)
    assert tuple(found) == expected
PYTHON
