"""The layout of a captured batch: real tokens, number of positions, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import is_int, kind_of

HALF = (torch.bfloat16, torch.float16)
"""Dtypes that a model may have and the operator never has."""

TINY = 1e-30
"""Smallest denominator of a ratio of sizes: it makes 0 / 0 zero and changes no other ratio."""


@dataclass(frozen=True)
class Frame:
    """The layout that all vectors of one captured batch share.

    Attributes:
        spans: For every prompt, the (start, stop) of its real tokens. Other positions are padding.
        n_pos: Number of positions, padding included.
        dtype: Dtype of the computation, float32 or float64.
        device: Device of the tensors.
        read_at: The row at which a classifier is read, or a model without a head; −1 means this
            row. None where every position predicts.
        graph: Whether tensors keep their autograd graph, so that gradients reach the weights.
    """

    spans: tuple[tuple[int, int], ...]
    n_pos: int
    dtype: torch.dtype
    device: torch.device
    read_at: int | None = None
    graph: bool = False

    @property
    def batch(self) -> int:
        """Number of prompts."""
        return len(self.spans)

    @cached_property
    def real(self) -> Tensor:
        """Boolean mask [batch, pos], True at real tokens."""
        pos = torch.arange(self.n_pos, device=self.device)
        start, stop = torch.tensor(self.spans, device=self.device).T
        return (pos >= start[:, None]) & (pos < stop[:, None])

    @property
    def held(self) -> Frame:
        """The frame without a graph."""
        return replace(self, graph=False) if self.graph else self

    def with_gradients(self) -> None:
        """Refuse to compute under ``torch.no_grad`` what is kept, and would have lost its graph.

        Raises:
            ValueError: If this frame keeps graphs, and gradients are off.
        """
        if self.graph and not torch.is_grad_enabled():
            raise ValueError(
                "The lens was captured with graph=True, but torch.no_grad is on. Ask outside, or "
                "capture without graph=True."
            )

    @property
    def row(self) -> Frame:
        """The frame of one position per prompt."""
        # read_at counts rows of the whole prompt, and only one of them is left.
        return replace(self, n_pos=1, spans=((0, 1),) * self.batch, read_at=None)

    def cut(self, pos: slice) -> Frame:
        """The frame of some neighbouring real positions of one prompt."""
        n_pos = len(range(*pos.indices(self.n_pos)))
        return replace(self, n_pos=n_pos, spans=((0, n_pos),), read_at=None)

    def index(self, pos: int) -> Tensor:
        """Turn a position among the real tokens into indices of the position axis.

        Args:
            pos: Position, counted as in Python: 0 is the first real token of a prompt, −1 the last,
                or the row that the model is read at.

        Returns:
            The index for every prompt [batch].

        Raises:
            ValueError: If a prompt has no such position.
        """
        if not is_int(pos):
            raise ValueError(f"Position {pos!r} is not an integer. Pass an integer such as −1.")
        if pos == -1 and self.read_at is not None:
            pos = self.read_at
        for prompt, (start, stop) in enumerate(self.spans):
            if not start - stop <= pos < stop - start:
                raise ValueError(
                    f"Position {pos} is outside prompt {prompt}, which has {stop - start} tokens. "
                    f"Pass {start - stop} to {stop - start - 1}; −1 is the last token."
                )
        # −1 is the last real token, wherever padding stands.
        indices = [(stop if pos < 0 else start) + pos for start, stop in self.spans]
        return torch.tensor(indices, device=self.device)

    def check(self, x: Tensor, width: int) -> None:
        """Refuse what is not a tensor [..., batch, pos, width] of this frame's dtype and device."""
        if not isinstance(x, Tensor):
            raise ValueError(
                f"The vector is {kind_of(x)}, and not a tensor. Give a torch tensor like "
                "lens.embedding; @ also takes another map."
            )
        expected = self.batch, self.n_pos, width
        if (x.shape[-3:], x.dtype, x.device) != (expected, self.dtype, self.device):
            raise ValueError(
                f"The vector is {list(x.shape)} of {x.dtype} on {x.device}, but this map takes "
                f"[..., {', '.join(map(str, expected))}] of {self.dtype} on {self.device}. Shape "
                "the vector like lens.embedding, and convert it by tensor.to(lens.embedding)."
            )

    def spread(self, b: Float[Tensor, " d"]) -> Float[Tensor, "batch pos d"]:
        """Repeat one vector at every position, as a view."""
        return self.cast(b).expand(self.batch, self.n_pos, -1)

    def zeros(self, dim: int, *many: int) -> Tensor:
        """Zeros of shape [*many, batch, pos, dim]."""
        return torch.zeros(*many, self.batch, self.n_pos, dim, dtype=self.dtype, device=self.device)

    def eye(self, dim: int) -> Tensor:
        """The unit vectors [dim, dim]."""
        return torch.eye(dim, dtype=self.dtype, device=self.device)

    def cast(self, tensor: Tensor) -> Tensor:
        """Convert a tensor to the compute dtype; it is detached unless the frame keeps graphs."""
        # The operator is a constant of its run: no gradient flows into the weights by itself.
        if tensor.requires_grad and not self.graph:
            tensor = tensor.detach()
        return tensor if tensor.dtype == self.dtype else tensor.to(self.dtype)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, or 0 where torch does not count (inference mode)."""
    return 0 if tensor.is_inference() else tensor._version
