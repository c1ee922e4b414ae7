"""The unembedding, frozen at one run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from .activations import soft_cap_ratio
from .batch_layout import Frame
from .linear_map import LinearMap
from .primitives import Linear
from .weights import UnembedWeights


@dataclass(frozen=True, eq=False)
class Unembed(LinearMap):
    """The readout (y W_U + b_U) ⊙ ratio: a soft cap's ratio cap(l) / l is frozen.

    ``final`` is the run's own final normalized residual: where it is capped, the ratio is
    computed from it on first use, since [pos, d_vocab] ratios are the largest frozen quantity.
    """

    frame: Frame
    weights: UnembedWeights
    final: Float[Tensor, "batch pos d_model"]

    @cached_property
    def ratio(self) -> Tensor | float:
        if self.weights.soft_cap is None:
            return 1.0
        logits = self._linear.apply(self.final) + self._linear.bias
        return soft_cap_ratio(logits, self.weights.soft_cap)

    @property
    def _linear(self) -> Linear:
        return Linear(self.frame, self.weights.W_U, self.weights.b_U, "b_U")

    @property
    def in_dim(self) -> int:
        return self.weights.W_U.shape[0]

    @property
    def out_dim(self) -> int:
        return self.weights.W_U.shape[1]

    def apply(self, x):
        return self._linear.apply(x) * self.ratio

    def apply_t(self, y, effects=None):
        return self._linear.apply_t(y * self.ratio, effects)

    @property
    def bias(self):
        return self._linear.bias * self.ratio

    def constants(self):
        return dict.fromkeys(self._linear.constants(), self.bias)
