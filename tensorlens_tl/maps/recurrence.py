"""Maps of linear attention: a short convolution over positions, and the gated delta rule.

Neither has a pattern. Both are causal, and cost as many products as there are positions; the
[pos, pos] form is never built.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .batch_layout import Frame
from .linear_map import LinearMap


@dataclass(frozen=True, eq=False)
class Conv(LinearMap):
    """A causal convolution of each dimension apart: y_t = Σ_j w_j ⊙ x_{t−K+1+j}, j = 0 … K − 1.

    Padding counts as zeros, as hosts have it.

    Attributes:
        frame: Layout of the batch.
        W: The kernel of every dimension, newest position last.
    """

    frame: Frame
    W: Float[Tensor, "d kernel"]

    @property
    def in_dim(self) -> int:
        return self.W.shape[0]

    @property
    def out_dim(self) -> int:
        return self.W.shape[0]

    def _real(self, x: Tensor) -> Tensor:
        padded = any(span != (0, self.frame.n_pos) for span in self.frame.spans)
        return torch.where(self.frame.real[..., None], x, 0) if padded else x

    def apply(self, x):
        w, x = self.frame.cast(self.W).flip(-1), self._real(x)  # w[:, i] looks i positions back
        # y_t = Σ_i w_i ⊙ x_{t−i}: one product per tap, shifted by i. Nothing comes from before t =
        # 0.
        y = x * w[:, 0]
        for back in range(1, min(w.shape[1], x.shape[-2])):
            y[..., back:, :] += x[..., :-back, :] * w[:, back]
        return y

    def apply_t(self, y, effects=None):
        w = self.frame.cast(self.W).flip(-1)
        # The adjoint looks ahead where apply looks back: x̄_t = Σ_i w_i ⊙ ȳ_{t+i}.
        x = y * w[:, 0]
        for back in range(1, min(w.shape[1], y.shape[-2])):
            x[..., :-back, :] += y[..., back:, :] * w[:, back]
        return self._real(x)  # apply reads no padding, so its adjoint writes none

    def columns(self, dims: slice) -> Conv:
        """The convolution of some dimensions."""
        return replace(self, W=self.W[dims])

    def cut(self, prompt: int, pos: slice) -> Conv:
        """The convolution over some neighbouring positions of one prompt."""
        return replace(self, frame=self.frame.cut(pos))

    @property
    def bias(self):
        return self.frame.zeros(self.out_dim)

    def constants(self):
        return {}


@dataclass(frozen=True, eq=False)
class DeltaRule(LinearMap):
    """The gated delta rule (Yang et al. 2024, arXiv 2412.06464), with all but the values frozen.

    Each head carries a state S from position to position, which maps keys to values:

        S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ,     o_t = S_tᵀ q_t

    It is linear in v. The adjoint is the same recurrence, backwards, with q and β k exchanged:

        G_t = α_{t+1} (I − β_{t+1} k_{t+1} k_{t+1}ᵀ) G_{t+1} + q_t ō_tᵀ,     v̄_t = β_t G_tᵀ k_t

    Attributes:
        frame: Layout of the batch.
        q: The queries, normalized and scaled.
        k: The keys, normalized.
        beta: How much of a value is written, β.
        decay: What is left of the state, α.
        d_head: Width of the values of one head.
    """

    frame: Frame
    q: Float[Tensor, "batch pos head d_key"]
    k: Float[Tensor, "batch pos head d_key"]
    beta: Float[Tensor, "batch pos head"]
    decay: Float[Tensor, "batch pos head"]
    d_head: int

    @property
    def heads(self) -> int:
        """Number of heads; each has values of its own."""
        return self.k.shape[2]

    kv_heads = heads

    @property
    def in_dim(self) -> int:
        return self.heads * self.d_head

    @property
    def out_dim(self) -> int:
        return self.heads * self.d_head

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the run that the map keeps."""
        return self.q, self.k, self.beta, self.decay

    @property
    def pattern(self) -> Tensor:
        """A gated delta rule has no pattern.

        Raises:
            ValueError: At every access.
        """
        raise ValueError(
            "This model has gated delta nets, which have no attention pattern. Use a method that "
            "needs none, such as lens.token_matrix() of the operator or lens.attribute."
        )

    def apply(self, x):
        write = self.k * self.beta[..., None]
        y = torch.empty_like(x)
        state = None
        for t in range(x.shape[-2]):
            if state is not None:
                state = self._kept(state, t)
            # First S_t takes in β k vᵀ, then o_t reads it: an output sees its own token.
            v = x[..., t, :].unflatten(-1, (self.heads, -1))
            added = write[:, t, :, :, None] * v[..., None, :]
            state = added if state is None else state + added
            y[..., t, :] = (self.q[:, t, :, None] @ state).flatten(-3)
        return y

    def apply_t(self, y, effects=None):
        write = self.k * self.beta[..., None]
        x = torch.empty_like(y)
        state = None
        for t in reversed(range(y.shape[-2])):
            if state is not None:
                state = self._kept(state, t + 1)
            # Backwards, G_t takes in q ōᵀ first, and then v̄_t reads it.
            o = y[..., t, :].unflatten(-1, (self.heads, -1))
            added = self.q[:, t, :, :, None] * o[..., None, :]
            state = added if state is None else state + added
            x[..., t, :] = (write[:, t, :, None] @ state).flatten(-3)
        return x

    def _kept(self, state: Tensor, t: int) -> Tensor:
        """α_t (I − β_t k_t k_tᵀ) S, which is symmetric: both directions use it."""
        k = self.k[:, t, :, :, None]
        # kᵀ S comes first: the matrix k kᵀ would cost d_key times as much.
        erased = (k * self.beta[:, t, :, None, None]) @ (k.mT @ state)
        return self.decay[:, t, :, None, None] * (state - erased)

    def by_head_t(
        self, y: Float[Tensor, "*many batch pos z"]
    ) -> Float[Tensor, "*many batch pos head d_head"]:
        """The adjoint per head."""
        return self.apply_t(y).unflatten(-1, (self.heads, -1))

    def head(self, index: int) -> DeltaRule:
        """The part of one head."""
        one = slice(index, index + 1)
        parts = {name: getattr(self, name)[:, :, one] for name in _PARTS}
        return replace(self, **parts)

    def cut(self, prompt: int, pos: slice) -> DeltaRule:
        """The rule over some neighbouring positions of one prompt, which it starts with S = 0."""
        parts = {name: getattr(self, name)[prompt, pos][None] for name in _PARTS}
        return replace(self, frame=self.frame.cut(pos), **parts)

    def looks_ahead(self, prompt: int) -> bool:
        """Whether an output depends on a later position: never."""
        return False

    @property
    def bias(self):
        return self.frame.zeros(self.out_dim)

    def constants(self):
        return {}


_PARTS = ("q", "k", "beta", "decay")
