"""How the parts of a host are read: hook points, attention, and experts.

Key concepts:
    AttentionReader: Tells what to read of an attention sublayer, and freezes it from what was read.
    RecomputedReading: Reads queries and keys, from which the pattern is computed when it is used.
    ExpertsRead: What the experts of a block did in one run.
"""

from .attention_parts import (
    AttentionReader,
    DeltaNetReader,
    FusedReader,
    GatedReader,
    LatentReader,
    NormedOutputReader,
    NormedValuesReader,
    gate_of,
)
from .attention_reading import (
    RecomputedReading,
    StoredReading,
    as_rotation,
    bridge_reading,
    drop_pattern,
    rotary_tables,
    rotates,
)
from .attention_scores import query_key_weights, score_weights, whole_norms
from .experts import (
    ExpertsRead,
    HookedMixture,
    Mixture,
    PackedMixture,
    eager_experts,
    hooked_weights,
    packed_weights,
    shared_expert,
)
from .feature_points import MLP_INPUTS, SUBLAYER_SITES
from .hook_points import (
    LAYER_HOOKS,
    MLP_OUT,
    HookReader,
    Read,
    alone,
    in_this_thread,
    is_spliced,
    norm_eps,
    with_graph,
)
from .host import QueryKeyWeights
from .linear import gated_mlp, head_weights, inner, joined_mlp, layer_scalar, linear_weights
from .module_tree import ModuleTree

__all__ = [
    "AttentionReader",
    "DeltaNetReader",
    "ExpertsRead",
    "FusedReader",
    "GatedReader",
    "HookReader",
    "HookedMixture",
    "LAYER_HOOKS",
    "LatentReader",
    "MLP_INPUTS",
    "MLP_OUT",
    "Mixture",
    "ModuleTree",
    "NormedOutputReader",
    "NormedValuesReader",
    "PackedMixture",
    "QueryKeyWeights",
    "Read",
    "RecomputedReading",
    "SUBLAYER_SITES",
    "StoredReading",
    "alone",
    "as_rotation",
    "bridge_reading",
    "drop_pattern",
    "eager_experts",
    "gate_of",
    "gated_mlp",
    "head_weights",
    "hooked_weights",
    "in_this_thread",
    "inner",
    "is_spliced",
    "joined_mlp",
    "layer_scalar",
    "linear_weights",
    "norm_eps",
    "packed_weights",
    "query_key_weights",
    "rotary_tables",
    "rotates",
    "score_weights",
    "shared_expert",
    "whole_norms",
    "with_graph",
]
