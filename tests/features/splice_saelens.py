"""Captures models that SAELens spliced dictionaries into: how far from the model's own numbers."""

import json
import sys

try:
    from sae_lens import HookedSAETransformer
    from sae_lens.registry import get_sae_class
    from sae_lens.saes import sae as base
except ImportError:
    print("no SAELens")
    sys.exit()

import torch
from transformer_lens import HookedTransformerConfig

import tensorlens_tl
from tensorlens_tl import features

D, WIDE = 32, {"attn.hook_z": 24}


def spliced(kind: str, site: str, writes: str | None = None):
    """A random dictionary of SAELens."""
    own_class, config_class = get_sae_class(kind)
    width = WIDE.get(site.partition("1.")[2], D)
    out = {"d_out": D, "apply_b_dec_to_input": False} if writes else {}
    cfg = config_class(d_in=width, d_sae=96, dtype="float64", **out)
    cfg.reshape_activations = "hook_z" if site.endswith("hook_z") else "none"
    cfg.metadata = base.SAEMetadata(hook_name=site, hook_name_out=writes)
    sae = own_class(cfg)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return sae


def main() -> None:
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=D,
        d_head=6,
        n_heads=4,
        d_mlp=48,
        n_ctx=12,
        d_vocab=40,
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
        dtype=torch.float64,
    )
    model = HookedSAETransformer(cfg).to(torch.float64).eval()
    ids = torch.randint(0, 40, (2, 7))
    plain = model(ids)[:, -1, 3].detach()
    sites = {name: f"blocks.1.{name}" for name in ("hook_resid_pre", "hook_resid_mid")}
    sites |= {name: f"blocks.1.{name}" for name in ("hook_attn_out", "attn.hook_z", "hook_mlp_out")}
    sites |= {"first": "blocks.0.hook_resid_pre", "last": "blocks.1.hook_resid_post"}
    sites |= {"transcoder": "blocks.1.hook_resid_mid"}
    found = {}
    for name, site in sites.items():
        writes = "blocks.1.hook_mlp_out" if name == "transcoder" else None
        sae = spliced("transcoder" if writes else "standard", site, writes)
        for error in (False, True):
            model.add_sae(sae, use_error_term=error)
            with torch.no_grad():
                logits = model(ids)
                returned, lens = tensorlens_tl.capture(model, ids)
            model.reset_saes()
            ours = features.load(sae)
            rows = lens.attribute(3, by="feature", saes=ours)
            size = float(rows.values.abs().max())
            kinds = [s.node.kind for s in rows.sources]
            errors = rows.values[:, [kind == "error" for kind in kinds]]
            parts = lens.attribute(3, by="token")
            names = [str(s.node) for s in parts.sources if str(s.node).endswith("[sae]")]
            found[f"{name}, {error}"] = {
                "logits": float((returned - logits).abs().max() / logits.abs().max()),
                "real": float((lens.logits - logits).abs().max() / logits.abs().max()),
                "moved": float((logits[:, -1, 3] - plain).abs().max()),
                "sums": [x.completeness_error for x in (rows, parts)],
                "error": float(errors.abs().max()) / size,
                "features": kinds.count("feature"),
                "constants": sorted(set(names)),
                "b_U": float((lens.dla(3).values.sum(1) - logits[:, -1, 3]).abs().max()),
            }
    print(json.dumps(found))


main()
