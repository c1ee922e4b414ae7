"""Matrices of which every token uses a few: the experts that it was sent to.

A token has a fixed number of slots, and an expert in each. What belongs to slots is one axis of
slot · d numbers, so gates and shifts act on it as on any other vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .batch_layout import Frame
from .linear_map import LinearMap

Stack = Float[Tensor, "expert d_in d_out"] | tuple[Float[Tensor, "d_in d_out"], ...]
Biases = Float[Tensor, "expert d"] | tuple[Float[Tensor, " d"], ...]


@dataclass(frozen=True, eq=False)
class Routed(LinearMap):
    """An expert's matrix per slot, into the slots or out of them.

        into     x → (x W_e(1) + b_e(1), x W_e(2) + b_e(2), …)     one result per slot
        out      (h_1, h_2, …) → Σ_s h_s W_e(s) + share_s b_e(s)   their sum

    Tokens are gathered expert by expert. An expert without a token costs nothing.

    Attributes:
        frame: Layout of the batch.
        experts: The expert in every slot of every token; −1 is none.
        W: The matrix of every expert.
        b: The bias of every expert, or None.
        name: Name of the bias, such as "L3.b_in".
        out: Whether the slots are summed.
        share: The routing weights, by which the biases count. None for 1, and into the slots.
    """

    frame: Frame
    experts: Int[Tensor, "batch pos slot"]
    W: Stack
    b: Biases | None = None
    name: str = ""
    out: bool = False
    share: Float[Tensor, "batch pos slot"] | None = None

    @property
    def slots(self) -> int:
        """Number of experts per token."""
        return self.experts.shape[-1]

    @property
    def in_dim(self) -> int:
        return self.W[0].shape[0] * (self.slots if self.out else 1)

    @property
    def out_dim(self) -> int:
        return self.W[0].shape[1] * (1 if self.out else self.slots)

    @cached_property
    def groups(self) -> tuple[tuple[int, Int[Tensor, " row"]], ...]:
        """The experts that tokens reached, and the slots of each among [batch · pos · slot]."""
        if self.experts.is_meta:  # shapes without values: one expert stands for all
            return ((0, torch.arange(self.experts.numel(), device="meta")),)
        # Sorted, the slots of an expert stand side by side. Stable keeps tokens in order, so that
        # sums round alike in every run.
        experts, order = self.experts.flatten().sort(stable=True)
        found, counts = experts.unique_consecutive(return_counts=True)
        pairs = zip(found.tolist(), order.split(counts.tolist()), strict=True)
        return tuple((expert, rows) for expert, rows in pairs if expert >= 0)

    @property
    def _tokens(self) -> int:
        return self.frame.batch * self.frame.n_pos

    def _into(self, x: Tensor, transposed: bool) -> Tensor:
        """Multiply every token with the matrix of each slot: [..., batch, pos, slot · d]."""
        rows = x.reshape(math.prod(x.shape[:-3]), self._tokens, x.shape[-1])
        width = self.W[0].shape[0 if transposed else 1]
        made = rows.new_zeros(len(rows), rows.shape[1] * self.slots, width)
        for expert, slots in self.groups:
            W = self.frame.cast(self.W[expert])
            # Slot s is of token s // slots. Every slot is written once, so no sum is needed.
            made[:, slots] = rows[:, slots // self.slots] @ (W.T if transposed else W)
        return made.view(*x.shape[:-1], self.slots * width)

    def _out(self, h: Tensor, transposed: bool) -> Tensor:
        """Multiply every slot with its matrix, and sum a token's slots: [..., batch, pos, d]."""
        slots = self._tokens * self.slots
        rows = h.reshape(math.prod(h.shape[:-3]), slots, h.shape[-1] // self.slots)
        width = self.W[0].shape[0 if transposed else 1]
        made = rows.new_zeros(len(rows), self._tokens, width)
        for expert, slots in self.groups:
            W = self.frame.cast(self.W[expert])
            # Slots of one token meet here: plain indexing would keep the last of them alone.
            made.index_add_(1, slots // self.slots, rows[:, slots] @ (W.T if transposed else W))
        return made.view(*h.shape[:-1], width)

    def apply(self, x):
        return (self._out if self.out else self._into)(x, False)

    def apply_t(self, y, effects=None):
        if effects is not None and self.b is not None:
            # The bias is that of each token's own experts: no one vector for all rows.
            effects[self.name] = (y * self.bias).sum(-1)
        return (self._into if self.out else self._out)(y, True)

    def each(self, h: Float[Tensor, "batch pos slot_d"]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What every reached expert adds, by itself, its bias included. Only out of the slots.

        Args:
            h: What the slots hold.

        Yields:
            The expert; its tokens among [batch · pos]; and what it adds there [token, d_out].
        """
        rows = h.reshape(-1, h.shape[-1] // self.slots)
        for expert, slots in self.groups:
            made = rows[slots] @ self.frame.cast(self.W[expert])
            if self.b is not None:
                made = made + self._share.flatten()[slots, None] * self.frame.cast(self.b[expert])
            yield expert, slots // self.slots, made

    def of_slots(self, vectors: Sequence[Tensor] | Tensor) -> Float[Tensor, "batch pos slot d"]:
        """A vector per expert, at the slots of that expert; 0 where a slot has none."""
        d = vectors[0].shape[-1]
        made = self.frame.zeros(d * self.slots).view(-1, d)
        for expert, slots in self.groups:
            made[slots] = self.frame.cast(vectors[expert])
        return made.view(*self.experts.shape, d)

    @property
    def _share(self) -> Tensor:
        # One number, expanded below: no tensor of ones is filled.
        ones = torch.ones((), dtype=self.frame.dtype, device=self.frame.device)
        return ones.expand(self.experts.shape) if self.share is None else self.share

    @property
    def bias(self):
        if self.b is None:
            return self.frame.zeros(self.out_dim)
        by_slot = self.of_slots(self.b)
        if self.out:
            return (by_slot * self._share[..., None]).sum(-2)
        return by_slot.flatten(2)

    def constants(self):
        return {} if self.b is None else {self.name: self.bias}
