"""The real model run edge by edge: every reader on an input of its own.

Key concepts:
    EdgeModel: The host itself, with rebuilt inputs; see :func:`edge_model`.
    PackedModel: The same from the model's weights, for all prompts at once; many times as fast.
    EdgeUniverse: All edges of a model, and circuits as masks of them.
"""

from .edge_masks import EdgeUniverse, wiring_of
from .edge_patching import EdgeModel, Writes, edge_model
from .packed_circuit import CircuitRuns
from .packed_gradient import EdgeEffects, tells_heads_apart
from .packed_layout import Layout
from .packed_model import PackedModel, normed
from .packed_run import Outputs, Run, run
from .packed_secant import SecantEffects, has_secant

__all__ = [
    "EdgeEffects",
    "EdgeModel",
    "EdgeUniverse",
    "Layout",
    "Outputs",
    "PackedModel",
    "Run",
    "SecantEffects",
    "Writes",
    "CircuitRuns",
    "edge_model",
    "has_secant",
    "normed",
    "run",
    "tells_heads_apart",
    "wiring_of",
]
