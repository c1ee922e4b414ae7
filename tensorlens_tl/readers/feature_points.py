"""Hook points inside a block at which dictionaries of features read and write."""

from __future__ import annotations

from .hook_points import LAYER_HOOKS, MLP_OUT

SUBLAYER_SITES = {
    "hook_attn_out": "attn_out",
    LAYER_HOOKS["z"]: "z",
    MLP_OUT: "mlp_out",
    "mlp.hook_out": "mlp_out",
}
"""What a sublayer writes, by hook point: after a post-norm, and z before W_O. The MLP's own output
is the same as what it adds to the residual where no norm follows."""

MLP_INPUTS = {
    "ln2.hook_normalized": "normalized",
    "ln2.hook_out": "weighted",
    "mlp.hook_in": "read",
}
"""What an MLP reads, by hook point: normalized before the norm's weight, after it, with no norm."""
