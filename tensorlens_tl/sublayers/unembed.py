"""The unembedding, and the head before it, frozen at one run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from jaxtyping import Float, Int
from torch import Tensor

from ..maps import Chain, Frame, Gate, Linear, LinearMap, Mix, Norm, take_row
from .activations import gating_ratio, soft_cap_ratio
from .weights import PooledHead, UnembedWeights


@dataclass(frozen=True, eq=False)
class Unembed(LinearMap):
    """The frozen readout (h W_U + b_U) ⊙ ratio, with the ratio cap(l) / l of a soft cap.

    h is y itself. A masked language model has a head between, h = norm((y W + b) ⊙ act(z) / z),
    whose activation ratios and scale are frozen, too. The ratios [pos, d_vocab] are the largest
    frozen quantity. So all are computed on first use, from y.

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
        logits = self._linear.apply(self.hidden(self.final)) + self._linear.bias
        return soft_cap_ratio(logits, self.weights.soft_cap)

    @cached_property
    def head(self) -> Chain | None:
        """The frozen head, from y to what W_U reads; None where W_U reads y."""
        if (w := self.weights.head) is None:
            return None
        if isinstance(w, PooledHead):
            return self._pooled(w)
        into = Linear(self.frame, w.W, w.b, "mlm_head.b")
        z = into.apply(self.final) + into.bias
        ratio = gating_ratio(w.act, z)
        h = ratio * z
        h = h - h.mean(-1, keepdim=True) if w.norm.center else h
        scale = (h.square().mean(-1, keepdim=True) + (w.norm.eps or 0.0)).sqrt()
        norm = Norm(self.frame, "mlm_head.ln", scale, w.norm, h.shape[-1])
        return Chain((into, Gate(self.frame, ratio), norm))

    def _pooled(self, w: PooledHead) -> Chain:
        n_pos, width = self.frame.n_pos, self.final.shape[-1]
        weights = self.final.new_zeros(self.frame.batch, 1, n_pos, n_pos)
        weights[:, :, 0, : w.rows] = 1 / w.rows
        mean = Mix(self.frame, weights, 1, width)
        h = mean.apply(self.final)
        h = h - h.mean(-1, keepdim=True) if w.norm.center else h
        scale = (h.square().mean(-1, keepdim=True) + (w.norm.eps or 0.0)).sqrt()
        return Chain((mean, Norm(self.frame, "classifier.ln", scale, w.norm, width)))

    @property
    def rows(self) -> int:
        """How many rows one logit reads: the first ones of a pooled head, else one."""
        head = self.weights.head
        return head.rows if isinstance(head, PooledHead) else 1

    def hidden(
        self, y: Float[Tensor, "*many batch pos d_model"]
    ) -> Float[Tensor, "*many batch pos d_head"]:
        """What W_U reads of y: the frozen head's output, constants included; or y itself."""
        return y if self.head is None else self.head.apply(y) + self.head.bias

    def pull_head(
        self, c: Float[Tensor, "batch d_head"], query: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch d_model"], dict[str, Float[Tensor, " batch"]]]:
        """Pull covectors at what W_U reads back to y, at one position per prompt.

        Args:
            c: One covector per prompt.
            query: Index of the position, per prompt.

        Returns:
            The covectors at y, and what each constant of the head adds, by name. Without a head,
            the covectors as they are. A pooled head has one covector for all of its rows.
        """
        if self.head is None:
            return c, {}
        row, effects = self.frame.row, {}
        if isinstance(self.weights.head, PooledHead):
            y = cast(Norm, self.head.maps[1]).row(query).apply_t(c[:, None], effects) / self.rows
            return y[:, 0], {name: share[:, 0] for name, share in effects.items()}
        into, gate, norm = cast(tuple[Linear, Gate, Norm], self.head.maps)
        ratio = take_row(gate.ratio, query)
        y = norm.row(query).apply_t(c[:, None], effects) * ratio
        y = replace(into, frame=row).apply_t(y, effects)
        return y[:, 0], {name: share[:, 0] for name, share in effects.items()}

    def anew(self, y: Float[Tensor, "*many d_model"]) -> Float[Tensor, "*many d_head"]:
        """What W_U would read of another y: the head as the model would run it there."""
        if (w := self.weights.head) is None or isinstance(w, PooledHead):
            return y
        cast = self.frame.cast
        z = y @ cast(w.W)
        z = z if w.b is None else z + cast(w.b)
        h = gating_ratio(w.act, z) * z
        h = h - h.mean(-1, keepdim=True) if w.norm.center else h
        h = h / (h.square().mean(-1, keepdim=True) + (w.norm.eps or 0.0)).sqrt()
        h = h if w.norm.gain is None else h * cast(w.norm.gain)
        return h if w.norm.b is None else h + cast(w.norm.b)

    @property
    def _linear(self) -> Linear:
        return Linear(self.frame, self.weights.W_U, self.weights.b_U, "b_U")

    @property
    def in_dim(self) -> int:
        return self.final.shape[-1]

    @property
    def out_dim(self) -> int:
        return self.weights.W_U.shape[1]

    def apply(self, x):
        return self._linear.apply(x if self.head is None else self.head.apply(x)) * self.ratio

    def apply_t(self, y, effects=None):
        h = self._linear.apply_t(y * self.ratio, effects)
        return h if self.head is None else self.head.apply_t(h, effects)

    @property
    def bias(self):
        b = self._linear.bias
        b = b if self.head is None else self._linear.apply(self.head.bias) + b
        return b * self.ratio

    def constants(self):
        found = {} if self.head is None else self.head.constants()
        found = {name: self._linear.apply(c) * self.ratio for name, c in found.items()}
        return found | {name: b * self.ratio for name, b in self._linear.constants().items()}
