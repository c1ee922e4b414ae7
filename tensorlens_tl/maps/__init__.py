"""Affine maps with exact adjoints, and the layout of a batch that they all share.

Key concepts:
    LinearMap: x ↦ A x + bias, with the exact adjoint of A. No matrix A is ever built.
    Frame: What all vectors of a batch share: real tokens, number of positions, dtype, device.
"""

from .batch_layout import HALF, TINY, Frame, version
from .factored import Factored
from .linear_map import DENSE_LIMIT, Chain, LinearMap, Residual, Sum, Transposed, dot_test
from .primitives import (
    Factor,
    Gate,
    Identity,
    Linear,
    Mix,
    Norm,
    NormWeights,
    Shift,
    put_effects,
    put_row,
    take_row,
)
from .recurrence import Conv, DeltaRule
from .routed import Routed

__all__ = [
    "Chain",
    "Conv",
    "DENSE_LIMIT",
    "DeltaRule",
    "Factor",
    "Factored",
    "Frame",
    "Gate",
    "HALF",
    "Identity",
    "Linear",
    "LinearMap",
    "Mix",
    "Norm",
    "NormWeights",
    "Residual",
    "Routed",
    "Shift",
    "Sum",
    "TINY",
    "Transposed",
    "dot_test",
    "put_effects",
    "put_row",
    "take_row",
    "version",
]
