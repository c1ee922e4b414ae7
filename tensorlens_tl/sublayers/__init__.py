"""The mathematics: each sublayer of a transformer, frozen into an affine map.

Key concepts:
    Sublayer: Attention, MLP or experts of one run: a chain of linear maps with named parts (nodes).
    gating_ratio: act(z) / z in closed form, by which an activation is frozen.
"""

from .activations import gating_ratio, soft_cap_ratio
from .attention import Attention
from .attention_kernel import Scores, add_alibi_bias_
from .delta_net import DeltaNetRun
from .experts import Experts
from .mlp import MLP, FeedForward, GatedMLP
from .recomputed_pattern import HOST, AnyMix, RecomputedMix, Tiles
from .sublayer import Mapped, Sublayer
from .unembed import Unembed
from .weights import (
    AttentionWeights,
    BlockWeights,
    DeltaNetWeights,
    EmbedWeights,
    ExpertsWeights,
    GatedMLPWeights,
    HeadNorm,
    HeadWeights,
    LatentWeights,
    MLPWeights,
    ModelWeights,
    PooledHead,
    Rotation,
    ScoreWeights,
    UnembedWeights,
)

__all__ = [
    "AnyMix",
    "Attention",
    "AttentionWeights",
    "BlockWeights",
    "DeltaNetRun",
    "DeltaNetWeights",
    "EmbedWeights",
    "Experts",
    "ExpertsWeights",
    "FeedForward",
    "GatedMLP",
    "GatedMLPWeights",
    "HeadWeights",
    "HOST",
    "HeadNorm",
    "LatentWeights",
    "MLP",
    "MLPWeights",
    "Mapped",
    "ModelWeights",
    "PooledHead",
    "RecomputedMix",
    "Rotation",
    "ScoreWeights",
    "Scores",
    "Sublayer",
    "Tiles",
    "Unembed",
    "UnembedWeights",
    "add_alibi_bias_",
    "gating_ratio",
    "soft_cap_ratio",
]
