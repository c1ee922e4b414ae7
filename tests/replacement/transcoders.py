"""Random transcoders for tiny models."""

import torch

from tensorlens_tl import features

D_SAE = 24
KINDS = {
    "relu": {},
    "topk": {"activation": "topk", "k": 5},
    "abstopk": {"activation": "abstopk", "k": 5},
    "jumprelu": {"activation": "jumprelu"},
    "tanh": {"activation": "tanh-relu"},
    "gated": {"activation": "gated"},
    "layer norm": {"normalize_activations": "layer_norm"},
    "skip": {},
    "cross-layer": {},
    "cross-layer skip": {},
}
READS = ("resid", "mlp.hook_in", "ln2.hook_normalized")
"""What a transcoder reads: the residual, or what the MLP's norm gives, with or without weights."""


def transcoders(lens, kind="relu", reads="resid", writes="hook_mlp_out", layers=None, seed=0):
    """One random transcoder for each block, or for some, of no use whatever as such."""
    random = torch.Generator().manual_seed(seed)
    D, dtype = lens.operator.in_dim, lens.operator.frame.dtype

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    mlps = {s.layer: s for s in lens.operator.steps if any(not b.has_heads for b in s.branches)}
    found = []
    for layer, step in mlps.items():
        ahead = (len(mlps) - layer,) if "cross-layer" in kind else ()
        x = step.state if reads == "resid" else draw(1)  # how large what is read is
        weights = {
            "W_enc": draw(D, D_SAE) / D**0.5 / x.std() if reads == "resid" else draw(D, D_SAE),
            "W_dec": draw(D_SAE, *ahead, D) / D_SAE**0.5,
            "b_enc": 0.3 * draw(D_SAE),
            "b_dec": draw(D),
        }
        if kind == "jumprelu":
            weights["threshold"] = 0.3 * draw(D_SAE).abs()
        if kind == "gated":
            weights |= {name: 0.3 * draw(D_SAE) for name in ("r_mag", "b_mag", "b_gate")}
        if "skip" in kind:
            weights["W_skip"] = draw(D, D) / D
        site = step.site if reads == "resid" else f"blocks.{layer}.{reads}"
        places = {"site": site, "writes": f"blocks.{layer}.{writes}"}
        config = {"architecture": "transcoder"} | KINDS[kind]
        if layers is None or layer in layers:
            found.append(features.load(weights, **places, config=config))
    return found
