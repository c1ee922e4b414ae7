"""The mathematics: affine maps, and each sublayer of a transformer frozen into such a map.

Key concepts:
    LinearMap: x ↦ A x + bias, with the exact adjoint of A. No matrix A is ever built.
    Frame: What all vectors of a batch share: real tokens, number of positions, dtype, device.
    Sublayer: Attention or MLP of one run, as a chain of linear maps with named parts (nodes).
"""

from .activations import gating_ratio, soft_cap_ratio
from .attention import Attention
from .attention_kernel import Scores, add_alibi_bias_
from .batch_layout import HALF, TINY, Frame, version
from .factored import Factored
from .linear_map import DENSE_LIMIT, Chain, LinearMap, Residual, Sum, Transposed, dot_test
from .mlp import MLP, FeedForward, GatedMLP
from .primitives import Gate, Identity, Linear, Mix, Norm, Shift, put_effects, put_row, take_row
from .recomputed_pattern import HOST, AnyMix, RecomputedMix, Tiles
from .sublayer import Mapped, Sublayer
from .unembed import Unembed
from .weights import (
    AttentionWeights,
    BlockWeights,
    EmbedWeights,
    GatedMLPWeights,
    MLPWeights,
    ModelWeights,
    NormWeights,
    Rotation,
    ScoreWeights,
    UnembedWeights,
)

__all__ = [
    "AnyMix",
    "Attention",
    "AttentionWeights",
    "BlockWeights",
    "Chain",
    "DENSE_LIMIT",
    "EmbedWeights",
    "Factored",
    "FeedForward",
    "Frame",
    "Gate",
    "GatedMLP",
    "GatedMLPWeights",
    "HALF",
    "HOST",
    "Identity",
    "Linear",
    "LinearMap",
    "MLP",
    "MLPWeights",
    "Mapped",
    "Mix",
    "ModelWeights",
    "Norm",
    "NormWeights",
    "RecomputedMix",
    "Residual",
    "Rotation",
    "ScoreWeights",
    "Scores",
    "Shift",
    "Sublayer",
    "Sum",
    "TINY",
    "Tiles",
    "Transposed",
    "Unembed",
    "UnembedWeights",
    "add_alibi_bias_",
    "dot_test",
    "gating_ratio",
    "put_effects",
    "put_row",
    "soft_cap_ratio",
    "take_row",
    "version",
]
