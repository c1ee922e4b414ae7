"""Prints how far activations and reconstructions are from SAELens's own: ``… FOLDER``."""

import json
import sys
from pathlib import Path

try:
    from sae_lens.registry import get_sae_class
    from sae_lens.saes import sae as base
except ImportError:
    print("no SAELens")
    sys.exit()

import torch

from tensorlens_tl import features

KINDS = {
    "standard": {},
    "topk": {"k": 5},
    "topk, rescaled": {"k": 5, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 5},
    "jumprelu": {},
    "gated": {},
    "standard, layer_norm": {"normalize_activations": "layer_norm"},
    "standard, constant norm": {"normalize_activations": "constant_norm_rescale"},
    "standard, input as it is": {"apply_b_dec_to_input": False},
    "transcoder": {"d_out": 32, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": 32, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": 32, "apply_b_dec_to_input": False},
}


def main() -> None:
    torch.manual_seed(0)
    x, off = torch.randn(50, 32) * 3, {}
    for name, options in KINDS.items():
        kind = name.partition(",")[0]
        own_class, config_class = get_sae_class(kind)
        cfg = config_class(d_in=32, d_sae=128, **options)
        cfg.metadata = base.SAEMetadata(
            hook_name="blocks.1.hook_resid_pre", hook_name_out="blocks.1.hook_mlp_out"
        )
        sae = own_class(cfg)
        for parameter in sae.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        if hasattr(sae, "threshold"):
            sae.threshold.data.abs_()
        folder = Path(sys.argv[1]) / name.replace(" ", "_")
        sae.save_model(folder)
        with torch.no_grad():
            for way, source in (("object", sae), ("folder", folder)):
                ours = features.load(source)
                theirs = sae.encode(x)
                largest = float(theirs.abs().max())
                off[f"{name}, {way}"] = float((ours.encode(x) - theirs).abs().max()) / largest
                out = ours.reconstruct(x)
                size = float(sae(x).abs().max())
                off[f"{name}, {way}, out"] = float((out - sae(x)).abs().max()) / size
    print(json.dumps(off))


main()
