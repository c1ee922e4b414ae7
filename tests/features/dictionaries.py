"""Random dictionaries of features for tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tensorlens_tl import features

D, D_SAE = 32, 128
KINDS = {
    "standard": {},
    "tanh": {"activation_fn": "tanh-relu"},
    "topk": {"architecture": "topk", "k": 5},
    "rescaled topk": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"architecture": "abstopk", "k": 7},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "layer norm": {"normalize_activations": "layer_norm"},
    "constant norm": {"normalize_activations": "constant_norm_rescale"},
    "input as it is": {"apply_b_dec_to_input": False},
}


def weights(config=None, d_in=D, d_sae=D_SAE, seed=0, dtype=torch.float64):
    """Random weights by SAELens's names, of no use whatever as an SAE."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    found = {"W_enc": draw(d_in, d_sae) / d_in**0.5, "W_dec": draw(d_sae, d_in) / d_sae**0.5}
    found |= {"b_enc": 0.3 * draw(d_sae), "b_dec": draw(d_in)}
    kind = (config or {}).get("architecture", "standard")
    if kind == "jumprelu":
        found["threshold"] = 0.5 * draw(d_sae).abs()
    if kind == "gated":
        del found["b_enc"]
        found |= {name: 0.3 * draw(d_sae) for name in ("r_mag", "b_mag", "b_gate")}
    return found


def dictionary(kind="standard", site="blocks.1.hook_resid_pre", **options):
    """A random dictionary of one of :data:`KINDS`."""
    return features.load(weights(KINDS[kind], **options), site=site, config=KINDS[kind])


def by_saelens(script, *arguments):
    """What a script beside this file prints in a process of its own: the import takes long."""
    found = subprocess.run(
        [sys.executable, Path(__file__).parent / script, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if "no SAELens" in found.stdout:
        pytest.skip("sae_lens is not installed")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])
