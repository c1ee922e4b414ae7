"""Energies of many covectors: vᵀ C v, or more, at every position.

Most covectors of a search are 0 at most positions: those that passed no head read one position
only. So products are made position by position, with the covectors that are not 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ROUNDING = 64.0
"""What may be lost to rounding, in units of the last place of every entry on the diagonal."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Covectors where they are not 0, one position after the other.

    Attributes:
        x: The rows of all positions, below each other.
        there: Whether a covector has a row at a position.
        counts: How many rows each position has.
    """

    x: Float[Tensor, "row d"]
    there: Bool[Tensor, "pos many"]
    counts: list[int]

    @classmethod
    def of(cls, v: Float[Tensor, "many pos d"]) -> Rows:
        """Leave out all that is 0."""
        there = (v != 0).any(-1).T
        return cls(v.transpose(0, 1)[there], there, there.sum(-1).tolist())

    def put(self, values: Float[Tensor, " row"]) -> Float[Tensor, "many pos"]:
        """One number per row, at the place of the row."""
        return self._spread(values).T

    def times(self, M: Float[Tensor, "pos_or_1 d e"]) -> Rows:
        """The rows multiplied by the matrix of their position."""
        if len(M) == 1:
            return replace(self, x=self.x @ M[0])
        return replace(self, x=torch.cat([x @ m for x, m in self._each(M)]))

    def mixed(self, A: Float[Tensor, "query key"]) -> Float[Tensor, "key many d"]:
        """Σ_q A[q, k] v_q, at every position k."""
        wide = self._spread(self.x)
        # Covectors are pulled through a pattern by Aᵀ: key k gathers from all its queries.
        return (A.T @ wide.flatten(1)).view(len(A.T), *wide.shape[1:])

    def forms(self, C: Float[Tensor, "pos d d"]) -> Float[Tensor, " row"]:
        """vᵀ C v of every row, not below 0."""
        # C is positive semidefinite: a number below 0 is rounding.
        return torch.cat([(x @ c).mul_(x).sum(-1) for x, c in self._each(C)]).clamp_min(0)

    def lost(self, C: Float[Tensor, "pos d d"]) -> Float[Tensor, " row"]:
        """What rounding may take from vᵀ C v of every row."""
        return torch.cat([x.square() @ own for x, own in self._each(_margin(C))])

    def _each(self, per_position: Tensor) -> zip[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.counts), per_position, strict=True)

    def _spread(self, values: Float[Tensor, "row ..."]) -> Float[Tensor, "pos many ..."]:
        found = values.new_zeros(*self.there.shape, *values.shape[1:])
        found[self.there] = values
        return found


@dataclass(frozen=True, eq=False)
class HeadBound:
    """A head taken apart at its pattern, and the bounds on both sides of it.

    Attributes:
        above: The matrix from z to what the head adds.
        pattern: The head's pattern.
        c: Bound of what the head's values are, at every key.
        m: Bound of what its z is, at every query.
    """

    above: Float[Tensor, "pos_or_1 d_head d_model"]
    pattern: Float[Tensor, "query key"]
    c: Float[Tensor, "pos d_head d_head"]
    m: Float[Tensor, "pos d_head d_head"]

    def energies(self, v: Rows) -> tuple[Float[Tensor, "many pos"], Float[Tensor, "many pos"]]:
        """What can come through the head, at every key; and its part of the bound above it."""
        u = v.times(self.above.mT)
        y = u.mixed(self.pattern)
        through = (y @ self.c).mul_(y).sum(-1).clamp_min(0).T
        # The second part is subtracted from a bound, so here rounding must err downwards.
        return through, u.put(u.forms(self.m) - u.lost(self.m))


@dataclass(frozen=True, eq=False)
class PathBound:
    """An upper bound of C at one site, per position: C itself, or U Uᵀ + λ I.

    Attributes:
        whole: C itself; None where a low rank has to serve.
        U: Directions of the low-rank bound, float64; None where ``whole`` is there.
        floor: The λ that covers all other directions, float64; None where ``whole`` is there.
    """

    whole: Float[Tensor, "pos d d"] | None
    U: Float[Tensor, "pos d r"] | None = None
    floor: Float[Tensor, " pos"] | None = None

    @classmethod
    def of(cls, C: Float[Tensor, "pos d d"], rank: int | None) -> PathBound:
        """Keep C, or at most ``rank`` of its directions and a λ that covers the others."""
        if rank is None:
            return cls(padded(C))
        C = padded(C).double()
        rounding = 1e-14 * C.diagonal(dim1=-2, dim2=-1).sum(-1)
        # Any U gives C = U Uᵀ + E ⪯ U Uᵀ + ‖E‖ I. This U is a Nyström sketch of C.
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(C.shape[-1], rank, generator=generator, device="cpu").to(C)
        Q = torch.linalg.qr(C @ (C @ probes)).Q
        size, axes = torch.linalg.eigh(Q.mT @ C @ Q)
        size = size.clamp_min(1e-12 * size[:, -1:]).clamp_min(torch.finfo(C.dtype).tiny)
        U = C @ Q @ (axes / size.sqrt()[:, None])
        return cls(None, U, torch.linalg.matrix_norm(C - U @ U.mT) + rounding)

    def energies(self, v: Float[Tensor, "many pos d"]) -> Float[Tensor, "many pos"]:
        """v_pᵀ C_p v_p, or more, for each covector and position."""
        return self.of_rows(Rows.of(v))

    def of_rows(self, rows: Rows) -> Float[Tensor, "many pos"]:
        """The same for covectors without their zeros."""
        if self.U is None or self.floor is None:
            return rows.put(rows.forms(cast(Tensor, self.whole)))
        fine = replace(rows, x=rows.x.double())
        within = fine.put(fine.times(self.U).x.square().sum(-1))
        return within + self.floor * fine.put(fine.x.square().sum(-1))


def padded(C: Float[Tensor, "pos d d"]) -> Float[Tensor, "pos d d"]:
    """C, and on its diagonal what may be lost to rounding."""
    C = C.clone()
    C.diagonal(dim1=-2, dim2=-1).add_(_margin(C))
    return C


def _margin(C: Float[Tensor, "pos d d"]) -> Float[Tensor, "pos d"]:
    own = C.diagonal(dim1=-2, dim2=-1)
    # An entry rounds in proportion to √(C_ii C_jj), so the diagonal measures the error.
    return ROUNDING * torch.finfo(C.dtype).eps * own + 1e-14 * own.sum(-1, keepdim=True)
