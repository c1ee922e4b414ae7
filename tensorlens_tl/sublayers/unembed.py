"""The unembedding with its soft cap frozen at one run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from ..maps import Frame, Linear, LinearMap
from .activations import soft_cap_ratio
from .weights import UnembedWeights


@dataclass(frozen=True, eq=False)
class Unembed(LinearMap):
    """The frozen readout (y W_U + b_U) ⊙ ratio, with the ratio cap(l) / l of a soft cap.

    The ratios [pos, d_vocab] are the largest frozen quantity. So they are computed on first use.

    Attributes:
        frame: Layout of the batch.
        weights: Weights of the readout.
        final: Final normalized residual of the run, from which the ratios follow.
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
