#!/usr/bin/env bash
# A Bridge of transformer_lens 3.9.0 computes a vision tower's norms with ε and offset of the text's.
#
# transformer_lens 3.9.0 with transformers 5.23.0, float64. LLaVA's tower has layer_norm_eps 1e-5, and the
# text rms_norm_eps 1e-6. With a picture the Bridge's logits part from Hugging Face's by more than 1e-5 of
# the largest; with equal ε they do not. Gemma-3's text multiplies by 1 + weight. The Bridge does so in
# the LayerNorms of SigLIP, too, and its logits part by more than a hundredth.
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


def build(name, dtype=torch.float32, **config):
    """A random Hugging Face model with biases and gains that are not 0 and 1."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).to(dtype).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p += 0.1 * torch.randn_like(p)
    model.set_attn_implementation("eager")
    return model


def bridged(model):
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config, tokenizer=None)


TEXT = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, head_dim=8, pad_token_id=0,
)
SEES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8,
    patch_size=2,
)


def llava(eps):
    return build(
        "LlavaForConditionalGeneration", torch.float64, image_token_index=49, vision_feature_layer=-1,
        vision_config=dict(model_type="clip_vision_model", layer_norm_eps=eps, **SEES),
        text_config=dict(model_type="llama", rms_norm_eps=1e-6, **TEXT),
    )


def gemma():
    model = build(
        "Gemma3ForConditionalGeneration", torch.float64, image_token_index=49, mm_tokens_per_image=4,
        vision_config=dict(model_type="siglip_vision_model", layer_norm_eps=1e-6, **SEES),
        text_config=TEXT,
    )
    model.model.multi_modal_projector.mm_input_projection_weight.normal_()  # zeros at first
    return model


def off(model, n_rows=16):
    """How far the logits inside a Bridge are from those outside, relative to the largest one."""
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.tensor([[3, 17, *[49] * n_rows, 5, 41]])
    plain = model(ids, pixel_values=pixels).logits.clone()
    found = bridged(model)(ids, pixel_values=pixels, return_type="logits")
    return float((found - plain).abs().max() / plain.abs().max())


found = {"LLaVA": off(llava(1e-5)), "LLaVA, equal ε": off(llava(1e-6)), "Gemma-3": off(gemma(), 4)}
print({name: f"{value:.1e}" for name, value in found.items()})
assert found["LLaVA"] > 1e-5 and found["LLaVA, equal ε"] < 1e-12 and found["Gemma-3"] > 1e-2
PYTHON
