"""The primitive maps. Every frozen sublayer is a chain of them.

Linear   x W + b                     weights
Mix      Σ_k A[q, k] v_k             a frozen attention pattern, per head
Gate     x ⊙ r + offset              frozen ratios r = act(z) / z
Norm     (x − mean x) / s ⊙ w + b    a frozen scale s
Shift    x + constant                what a hook of the user added
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .batch_layout import Frame
from .linear_map import LinearMap


@dataclass(frozen=True, eq=False)
class Linear(LinearMap):
    """An affine map with weights, x → x W + b.

    Attributes:
        frame: Layout of the batch.
        W: The weight matrix, in the layout of row vectors.
        b: The bias, or None.
        name: Name of the bias, such as "L3.b_O".
    """

    frame: Frame
    W: Float[Tensor, "d_in d_out"]
    b: Float[Tensor, " d_out"] | None = None
    name: str = ""

    @property
    def in_dim(self) -> int:
        return self.W.shape[0]

    @property
    def out_dim(self) -> int:
        return self.W.shape[1]

    def apply(self, x):
        return x @ self.frame.cast(self.W)

    def apply_t(self, y, effects=None):
        if effects is not None and self.b is not None:
            effects[self.name] = y @ self.frame.cast(self.b)  # ⟨y_p, b⟩, position by position
        return y @ self.frame.cast(self.W).T

    @property
    def bias(self):
        return self.frame.zeros(self.out_dim) if self.b is None else self.frame.spread(self.b)

    def constants(self):
        return {} if self.b is None else {self.name: self.bias}


def _stacked(x: Tensor) -> Tensor:
    """Flatten the leading axes into one: [many, batch, pos, dim]."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


@dataclass(frozen=True, eq=False)
class Mix(LinearMap):
    """Attention over positions with a stored pattern: z_q^h = Σ_k A_h[q, k] v_k^{kv(h)}.

    Its widths are kv_head · d_head for the values and head · d_head for the result.

    Attributes:
        frame: Layout of the batch.
        pattern: The attention pattern A.
        kv_heads: Number of key/value heads.
        d_head: Width of the values of one head.
    """

    frame: Frame
    pattern: Float[Tensor, "batch head query_pos key_pos"]
    kv_heads: int
    d_head: int

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.pattern.shape[1]

    @property
    def in_dim(self) -> int:
        return self.kv_heads * self.d_head

    @property
    def out_dim(self) -> int:
        return self.heads * self.d_head

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        return (self.pattern,)

    @property
    def _grouped(self) -> Tensor:
        # The r query heads of a group read the same values: their rows stand below each other.
        return rearrange(self.pattern, "b (g r) q k -> b g (r q) k", g=self.kv_heads)

    # Many vectors are put side by side in the last axis. So one product serves all of them, and the
    # pattern is never repeated; nor is it for the query heads that share a key/value head.

    def apply(self, x):
        v = rearrange(_stacked(x), "m b k (g e) -> b g k (m e)", g=self.kv_heads)
        z = rearrange(
            self._grouped @ v,
            "b g (r q) (m e) -> m b q (g r e)",
            q=self.pattern.shape[2],
            e=self.d_head,
        )
        return z.reshape(*x.shape[:-3], *z.shape[1:])

    def apply_t(self, y, effects=None):
        z = rearrange(
            _stacked(y), "m b q (g r e) -> b g (r q) (m e)", g=self.kv_heads, e=self.d_head
        )
        v = rearrange(self._grouped.mT @ z, "b g k (m e) -> m b k (g e)", e=self.d_head)
        return v.reshape(*y.shape[:-3], *v.shape[1:])

    def by_head_t(
        self, y: Float[Tensor, "*many batch pos z"]
    ) -> Float[Tensor, "*many batch pos head d_head"]:
        """The adjoint per query head. Summed over the heads of a group it is :meth:`apply_t`."""
        z = rearrange(_stacked(y), "m b q (h e) -> b h q (m e)", e=self.d_head)
        v = rearrange(self.pattern.mT @ z, "b h k (m e) -> m b k h e", e=self.d_head)
        return v.reshape(*y.shape[:-3], *v.shape[1:])

    def sum_heads(self, values: Float[Tensor, "batch pos head"]) -> Float[Tensor, "batch pos"]:
        """Mix one number per position and query head, and sum over heads: Σ_h A_h values_h."""
        # Σ_k A[q, k] v_k as a row vector times Aᵀ, which views the pattern and copies nothing.
        return (values.mT[..., None, :] @ self.pattern.mT).sum((1, 2))

    def head(self, index: int) -> Mix:
        """The part of one query head. It shares memory with the whole pattern."""
        return replace(self, pattern=self.pattern[:, index : index + 1], kv_heads=1)

    def looks_ahead(self, prompt: int) -> bool:
        """Whether a query of the prompt attends to a later key, as an edited pattern may."""
        start, stop = self.frame.spans[prompt]
        # Padding is cut off first: hosts leave any numbers in rows that no real token reads.
        return bool(self.pattern[prompt, :, start:stop, start:stop].triu(1).any())

    def rows(self, query: Int[Tensor, " batch"]) -> Float[Tensor, "batch head key_pos"]:
        """The rows of the pattern at one query position per prompt, given as indices [batch]."""
        return self.pattern[torch.arange(len(query), device=query.device), :, query]

    @property
    def bias(self):
        return self.frame.zeros(self.out_dim)

    def constants(self):
        return {}


@dataclass(frozen=True, eq=False)
class Gate(LinearMap):
    """An elementwise factor, x → x ⊙ ratio + offset.

    Attributes:
        frame: Layout of the batch.
        ratio: The frozen factor, act(z) / z for an activation.
        offset: The constant that is added, or None.
        name: Name of the constant.
    """

    frame: Frame
    ratio: Float[Tensor, "batch pos d"]
    offset: Float[Tensor, " d"] | None = None
    name: str = ""

    @property
    def in_dim(self) -> int:
        return self.ratio.shape[-1]

    @property
    def out_dim(self) -> int:
        return self.ratio.shape[-1]

    def apply(self, x):
        return x * self.ratio

    def apply_t(self, y, effects=None):
        if effects is not None and self.offset is not None:
            effects[self.name] = y @ self.frame.cast(self.offset)
        return y * self.ratio  # a diagonal is its own transpose

    def columns(self, dims: slice) -> Gate:
        """The gate of some dimensions, without its offset."""
        return Gate(self.frame, self.ratio[..., dims])

    def cut(self, prompt: int, pos: slice) -> Gate:
        """The gate at some neighbouring positions of one prompt, without its offset."""
        return Gate(self.frame.cut(pos), self.ratio[prompt, pos][None])

    @property
    def bias(self):
        b = self.offset
        return self.frame.zeros(self.out_dim) if b is None else self.frame.spread(b)

    def constants(self):
        return {} if self.offset is None else {self.name: self.bias}


@dataclass(frozen=True, eq=False)
class Shift(LinearMap):
    """A constant that a hook of the user added in this run, x → x + constant.

    Attributes:
        frame: Layout of the batch.
        constant: What was added at every position.
        name: Name of the constant.
    """

    frame: Frame
    constant: Float[Tensor, "batch pos d"]
    name: str

    @property
    def in_dim(self) -> int:
        return self.constant.shape[-1]

    @property
    def out_dim(self) -> int:
        return self.constant.shape[-1]

    def apply(self, x):
        return x  # the linear part; the constant is in bias

    def apply_t(self, y, effects=None):
        if effects is not None:  # one edit may enter both halves of a gated MLP
            effects[self.name] = effects.get(self.name, 0) + (y * self.constant).sum(-1)
        return y

    @property
    def bias(self):
        return self.constant

    def constants(self):
        return {self.name: self.constant}


@dataclass(frozen=True, eq=False)
class Identity(LinearMap):
    """The identity, x → x. It stands for a norm that a model lacks.

    Attributes:
        frame: Layout of the batch.
        width: Width of the vectors.
    """

    frame: Frame
    width: int

    @property
    def in_dim(self) -> int:
        return self.width

    @property
    def out_dim(self) -> int:
        return self.width

    def apply(self, x):
        return x

    def apply_t(self, y, effects=None):
        return y

    @property
    def bias(self):
        return self.frame.zeros(self.width)

    def constants(self):
        return {}


@dataclass(frozen=True, eq=False)
class NormWeights:
    """The affine part of a norm, x ⊙ (w + offset) + b.

    Attributes:
        w: The weight, or None for 1.
        b: The bias, or None.
        center: Whether the norm subtracts the mean, as LayerNorm does and RMSNorm does not.
        offset: Number added to the weight (1 for Gemma).
        eps: The ε that the norm adds to the variance; None where it is not known.
        factor: In place of all this, a number that multiplies the residual; None for a norm.
    """

    w: Float[Tensor, " d"] | None
    b: Float[Tensor, " d"] | None
    center: bool
    offset: float = 0.0
    eps: float | None = None
    factor: float | None = None

    def scale_at(self, x: Float[Tensor, "*many d"]) -> Float[Tensor, "*many 1"]:
        """The divisor at an input, computed in float32 as hosts do; ε must be known."""
        x32 = x.float()
        x32 = x32 - x32.mean(-1, keepdim=True) if self.center else x32
        # The variance divides by d, not by d − 1: norms do not correct for the bias.
        return (x32.square().mean(-1, keepdim=True) + (self.eps or 0.0)).sqrt().to(x.dtype)

    @property
    def gain(self) -> Float[Tensor, " d"] | None:
        """The factor w + offset, or None for 1."""
        return self.w if self.w is None or not self.offset else self.w + self.offset

    def at_scale(
        self, x: Float[Tensor, "*shape d"], scale: Float[Tensor, "*#shape 1"], b: bool = True
    ) -> Float[Tensor, "*shape d"]:
        """Apply the norm to a part x of its input, at the scale of the whole; b if asked."""
        x = (x - x.mean(-1, keepdim=True) if self.center else x) / scale
        x = x if self.gain is None else x * self.gain.detach().to(x)
        return x + self.b.detach().to(x) if b and self.b is not None else x


@dataclass(frozen=True, eq=False)
class Norm(LinearMap):
    """LayerNorm or RMSNorm with its scale frozen: x → (x − mean x) / s ⊙ w + b.

    RMSNorm subtracts no mean.

    Attributes:
        frame: Layout of the batch.
        name: Name of the norm, such as "L3.ln1".
        scale: The divisor s = √(var + ε), or √(mean x² + ε) for RMSNorm, as in the run.
        weights: The weights w and b of the norm.
        width: Width of the vectors.
    """

    frame: Frame
    name: str
    scale: Float[Tensor, "batch pos 1"]
    weights: NormWeights
    width: int

    @property
    def in_dim(self) -> int:
        return self.width

    @property
    def out_dim(self) -> int:
        return self.width

    def apply(self, x):
        w = self.weights.gain
        # Subtracting the mean is linear, and only the scale is not: freezing s makes the norm
        # linear.
        y = (x - x.mean(-1, keepdim=True) if self.weights.center else x) / self.scale
        return y if w is None else y.mul_(self.frame.cast(w))  # y is new: in place is safe

    def apply_t(self, y, effects=None):
        w, b = self.weights.gain, self.weights.b
        if effects is not None and b is not None:
            effects[f"{self.name}.b"] = y @ self.frame.cast(b)
        # (C S W)ᵀ = W S C: centring is symmetric and acts last.
        y = (y if w is None else y * self.frame.cast(w)) / self.scale
        return y.sub_(y.mean(-1, keepdim=True)) if self.weights.center else y

    def unscaled_(self, x: Float[Tensor, "*many d"]) -> None:
        """:meth:`apply` in place, but for the division by the scale."""
        if self.weights.center:
            x -= x.mean(-1, keepdim=True)
        if self.weights.gain is not None:
            x *= self.frame.cast(self.weights.gain)

    def push_(self, x: Float[Tensor, "*many batch pos d"], span: slice) -> None:
        """:meth:`apply` in place, to vectors at a span of positions."""
        self.unscaled_(x)
        x /= self.scale[:, span]

    def unscaled_t_(self, y: Float[Tensor, "*many d"]) -> None:
        """:meth:`apply_t` in place, but for the division by the scale."""
        if self.weights.gain is not None:
            y *= self.frame.cast(self.weights.gain)
        if self.weights.center:
            y -= y.mean(-1, keepdim=True)

    def moved(self, was: Float[Tensor, "batch pos d"], x: Float[Tensor, "batch pos d"]) -> Norm:
        """The norm with the scale that the model would compute at x; the run's input is ``was``."""

        def variance(t: Tensor) -> Tensor:
            t = t - t.mean(-1, keepdim=True) if self.weights.center else t
            return t.square().mean(-1, keepdim=True)

        # s² = var + ε, so the scale at x is √(s² + var(x) − var(was)): ε is not needed.
        squared = self.scale.square() + variance(x) - variance(was)
        return replace(self, scale=squared.clamp_min(torch.finfo(x.dtype).tiny).sqrt())

    def row(self, query: Tensor) -> Norm:
        """The norm at one position per prompt, given as indices [batch]."""
        return replace(self, frame=self.frame.row, scale=take_row(self.scale, query))

    @property
    def bias(self):
        b = self.weights.b
        return self.frame.zeros(self.width) if b is None else self.frame.spread(b)

    def constants(self):
        return {} if self.weights.b is None else {f"{self.name}.b": self.bias}


@dataclass(frozen=True, eq=False)
class Factor(Norm):
    """A number of the model's own that multiplies the residual, as a norm of a constant scale."""

    @classmethod
    def of(cls, frame: Frame, name: str, weights: NormWeights, like: Tensor) -> Factor:
        """The map x → factor · x of residuals like one [batch, pos, d_model]."""
        scale = torch.full_like(like[..., :1], 1 / (weights.factor or 1.0))  # a norm divides
        return cls(frame, name, scale, weights, like.shape[-1])

    def moved(self, was, x):
        return self


def take_row(
    tensor: Float[Tensor, "*many batch pos d"], query: Int[Tensor, " batch"]
) -> Float[Tensor, "*many batch 1 d"]:
    """Take one position per prompt, given as indices [batch]."""
    return tensor[..., torch.arange(len(query), device=query.device), query, :][..., None, :]


def put_row(
    row: Float[Tensor, "*many batch 1 d"], query: Int[Tensor, " batch"], n_pos: int
) -> Float[Tensor, "*many batch {n_pos} d"]:
    """The adjoint of :func:`take_row`: put a row at its position, and zeros elsewhere."""
    whole = row.new_zeros(*row.shape[:-2], n_pos, row.shape[-1])
    whole[..., torch.arange(len(query), device=query.device), query, :] = row[..., 0, :]
    return whole


def put_effects(
    effects: dict[str, Float[Tensor, "*many batch 1"]], query: Int[Tensor, " batch"], n_pos: int
) -> dict[str, Float[Tensor, "*many batch {n_pos}"]]:
    """Put the parts of constants at one position per prompt, and zeros elsewhere."""
    return {name: put_row(e[..., None], query, n_pos)[..., 0] for name, e in effects.items()}
