"""What all vectors of a captured batch share: prompts, positions, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import is_int

HALF = (torch.bfloat16, torch.float16)
"""Precisions that a model may have and the operator never has."""

TINY = 1e-30
"""Least denominator of a quotient: 0 / 0 is then 0, and no size that occurs is changed."""


@dataclass(frozen=True)
class Frame:
    """What all vectors of one captured batch share.

    Attributes:
        spans: For every prompt, the (start, stop) of its real tokens; what lies outside is padding.
        n_pos: Number of positions, padding included.
        dtype: Compute dtype, float32 or float64.
        device: Where the tensors are.
    """

    spans: tuple[tuple[int, int], ...]
    n_pos: int
    dtype: torch.dtype
    device: torch.device

    @property
    def batch(self) -> int:
        """Number of prompts."""
        return len(self.spans)

    @property
    def real(self) -> Tensor:
        """Boolean mask [batch, pos], True at real tokens."""
        pos = torch.arange(self.n_pos, device=self.device)
        start, stop = torch.tensor(self.spans, device=self.device).T
        return (pos >= start[:, None]) & (pos < stop[:, None])

    @property
    def row(self) -> Frame:
        """The frame of one position per prompt."""
        return replace(self, n_pos=1, spans=((0, 1),) * self.batch)

    def index(self, pos: int) -> Tensor:
        """Turn a position among the real tokens (Python counting) into tensor indices.

        Args:
            pos: Position; −1 is each prompt's last real token.

        Returns:
            Indices [batch] into the position axis.

        Raises:
            ValueError: If a prompt has no such position.
        """
        if not is_int(pos):
            raise ValueError(f"expected a position as an integer, got {pos!r}: −1 is the last")
        for prompt, (start, stop) in enumerate(self.spans):
            if not start - stop <= pos < stop - start:
                raise ValueError(
                    f"position {pos} is outside prompt {prompt}: expected {start - stop} to "
                    f"{stop - start - 1} (it has {stop - start} tokens, −1 is the last)"
                )
        indices = [(stop if pos < 0 else start) + pos for start, stop in self.spans]
        return torch.tensor(indices, device=self.device)

    def spread(self, b: Float[Tensor, " d"]) -> Float[Tensor, "batch pos d"]:
        """One vector at every position, as a view."""
        return self.cast(b).expand(self.batch, self.n_pos, -1)

    def zeros(self, dim: int, *many: int) -> Tensor:
        """Zeros of shape [*many, batch, pos, dim]."""
        return torch.zeros(*many, self.batch, self.n_pos, dim, dtype=self.dtype, device=self.device)

    def eye(self, dim: int) -> Tensor:
        """The unit vectors, [dim, dim]."""
        return torch.eye(dim, dtype=self.dtype, device=self.device)

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor, detached, in the compute dtype (no copy where it already is)."""
        return tensor.detach().to(self.dtype)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 where torch does not count (inference mode)."""
    return 0 if tensor.is_inference() else tensor._version
