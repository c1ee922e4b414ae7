"""The normal forms of a branch: two matrices, and a middle that mixes positions or does not.

``folding`` makes them of the primitive maps of a branch, and ``batched_sweep`` applies them. At the
end a sweep returns a ``Reduction`` of every vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..maps import Chain, Conv, DeltaRule, Gate, LinearMap, Norm, Sum
from ..sublayers import Sublayer, Tiles


@dataclass(frozen=True, eq=False)
class Positionwise:
    """A branch that keeps positions apart: x → ((x · into) ⊙ ratio) · out, for one prompt.

    Attributes:
        into: First matrix, norms before it included [d_in, width].
        out: Second matrix, norms after it included [width, d_out].
        ratio: Gating ratio over the scales of the norms [pos, width].
    """

    into: Float[Tensor, "d_in width"]
    out: Float[Tensor, "width d_out"]
    ratio: Float[Tensor, "pos width"]

    def flipped(self, transposed: bool) -> Positionwise:
        """The branch in causal coordinates; see :func:`fold`."""
        if transposed:
            # (into diag(r) out)ᵀ = outᵀ diag(r) intoᵀ: the normal form is closed under
            # transposition.
            return Positionwise(self.out.T, self.into.T, self.ratio)
        return Positionwise(self.into, self.out, self.ratio.flip(0))

    def cast(self, dtype: torch.dtype) -> Positionwise:
        """The branch in another precision."""
        return Positionwise(self.into.to(dtype), self.out.to(dtype), self.ratio.to(dtype))


@dataclass(frozen=True, eq=False)
class StoredTiles:
    """A stored pattern of one prompt that is used like :class:`~tensorlens_tl.sublayers.Tiles`.

    Attributes:
        pattern: Attention [group, repeat, to, from], where a group shares a key/value head.
    """

    pattern: Float[Tensor, "group repeat to from"]

    def __getitem__(
        self, at: tuple[slice, slice | Tensor]
    ) -> Float[Tensor, "group repeat to source"]:
        return self.pattern[:, :, at[0], at[1]]

    def times(
        self, query_gain: Tensor | None = None, key_gain: Tensor | None = None
    ) -> StoredTiles:
        """The pattern with rows of queries or columns of keys multiplied by numbers [pos]."""
        A = self.pattern if query_gain is None else self.pattern * query_gain[:, None]
        return StoredTiles(A if key_gain is None else A * key_gain)

    def flipped(self, transposed: bool) -> StoredTiles:
        """The pattern in the causal coordinates of a pull (transposed) or of a push."""
        return StoredTiles(
            self.pattern.mT.contiguous() if transposed else self.pattern.flip(-2, -1)
        )


@dataclass(frozen=True, eq=False)
class Scan:
    """What stands between the matrices of a delta net, for one prompt: it is no pattern.

    Attributes:
        map: The maps from x W_V to z, at the prompt's real positions.
        transposed: Whether the adjoint is meant.
    """

    map: Chain
    transposed: bool = False

    def __call__(self, z: Float[Tensor, "pos many width"]) -> Float[Tensor, "pos many width"]:
        """Apply the maps at the first positions in causal coordinates."""
        n, n_pos = len(z), self.map.frame.n_pos
        # In a push these are the last positions, backwards; nothing stands before them.
        at = slice(0, n) if self.transposed else slice(n_pos - n, n_pos)
        x = z.transpose(0, 1)[:, None].to(self.map.frame.dtype)
        cut = Chain(
            tuple(
                part.cut(0, at)
                for part in self.map.maps
                if isinstance(part, Conv | Gate | DeltaRule)
            )
        )
        y = cut.apply_t(x) if self.transposed else cut.apply(x.flip(2)).flip(2)
        return y[:, 0].transpose(0, 1).to(z.dtype)


@dataclass(frozen=True, eq=False)
class Mixing:
    """A branch that mixes positions: x → Σ_h A_h (x · into_{g(h)}) · out_h, for one prompt.

    What multiplies values or z, frozen, stands before and after A.

    Attributes:
        into: First matrix [d_in, width_in]: W_V for a push, W_Oᵀ for a pull.
        out: Second matrix [width_out, d_out].
        tiles: The pattern. ``tiles[to, from]`` is a part of it [group, repeat, to, from], stored or
            made when it is asked for. Query head g · repeats + r is ``[g, r]``.
        groups: Number of key/value heads, and of the query heads that share each.
        gates: Factors before mixing [pos, width_in] and after it [pos, width_out], or None.
        gathers: Whether the repeats of a group are summed, as in a pull. A push copies one group to
            its repeats.
    """

    into: Float[Tensor, "d_in width_in"]
    out: Float[Tensor, "width_out d_out"]
    tiles: StoredTiles | Tiles | Scan
    groups: tuple[int, int]
    gates: tuple[Tensor | None, Tensor | None] = (None, None)
    gathers: bool = False

    @property
    def recomputed(self) -> bool:
        """Whether tiles of the pattern are made when they are asked for."""
        return isinstance(self.tiles, Tiles)

    def flipped(self, transposed: bool) -> Mixing:
        """The branch in causal coordinates; see :func:`fold`."""
        tiles, (before, after) = self.tiles, self.gates
        tiles = (
            Scan(tiles.map, transposed) if isinstance(tiles, Scan) else tiles.flipped(transposed)
        )
        if transposed:
            return Mixing(self.out.T, self.into.T, tiles, self.groups, (after, before), True)
        gates = None if before is None else before.flip(0), None if after is None else after.flip(0)
        return Mixing(self.into, self.out, tiles, self.groups, gates)

    def cast(self, dtype: torch.dtype) -> Mixing:
        """The branch in another precision; scores are recomputed in their own."""
        A = self.tiles
        A = replace(A, dtype=dtype) if isinstance(A, Tiles) else A
        A = StoredTiles(A.pattern.to(dtype)) if isinstance(A, StoredTiles) else A
        before, after = self.gates
        gates = (
            None if before is None else before.to(dtype),
            None if after is None else after.to(dtype),
        )
        return replace(self, into=self.into.to(dtype), out=self.out.to(dtype), tiles=A, gates=gates)


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """A branch of experts, which has no normal form: every token has matrices of its own.

    Attributes:
        branch: The branch as it is.
        prompt: Index of the prompt in the batch.
        positions: The prompt's positions in causal coordinates [pos].
        transposed: Whether the branch is applied as its adjoint.
    """

    branch: LinearMap
    prompt: int
    positions: Int[Tensor, " pos"]
    transposed: bool

    def rows(self, x: Tensor, at: Tensor | slice) -> Tensor:
        """What the branch makes of vectors [pos, many, d_model] at the positions ``at``."""
        here = _at(self.branch, self.prompt, self.positions[at])
        rows = x.transpose(0, 1)[:, None].to(here.frame.dtype)  # [many, batch, pos, d_model]
        made = here.apply_t(rows) if self.transposed else here.apply(rows)
        return made[:, 0].transpose(0, 1).to(x.dtype)


def _at(op: LinearMap, prompt: int, positions: Int[Tensor, " pos"]) -> LinearMap:
    """A map that keeps positions apart, at some positions of one prompt."""
    n_pos = len(positions)
    frame = replace(op.frame, n_pos=n_pos, spans=((0, n_pos),))

    def cut(part: LinearMap) -> LinearMap:
        if isinstance(part, Sublayer):
            return cut(part.map)
        if isinstance(part, Chain | Sum):
            return replace(part, maps=tuple(map(cut, part.maps)))
        held: dict[str, Any] = {"frame": frame}
        for name in ("scale", "ratio", "constant", "experts", "share"):
            if (tensor := getattr(part, name, None)) is not None:
                held[name] = tensor[prompt, positions][None]
        return replace(part, **held)  # type: ignore[type-var]

    return cut(op)


@dataclass(frozen=True, eq=False)
class FoldedStep:
    """A step of the residual stream: x → x + Σ branches(x).

    Attributes:
        mixing: The branches that mix positions.
        positionwise: The branches that keep positions apart.
        routed: The branches of experts.
    """

    mixing: tuple[Mixing, ...]
    positionwise: tuple[Positionwise, ...]
    routed: tuple[RoutedRows, ...] = ()

    def cast(self, dtype: torch.dtype) -> FoldedStep:
        """The step in another precision; experts compute in the operator's own."""
        mixing = tuple(b.cast(dtype) for b in self.mixing)
        return FoldedStep(mixing, tuple(b.cast(dtype) for b in self.positionwise), self.routed)


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """A norm on the residual stream itself: x → (x · C diag(w)) / s, or its transpose.

    Attributes:
        norm: The frozen norm; C subtracts the mean, for a LayerNorm.
        inverse: 1/s of one prompt, in causal coordinates [pos, 1].
        transposed: Whether the norm is applied as its adjoint.
    """

    norm: Norm
    inverse: Float[Tensor, "pos 1"]
    transposed: bool

    def rows(self, x: Tensor, at: Tensor | slice) -> Tensor:
        """Apply the norm to vectors [pos, many, d_model] that stand at the positions ``at``."""
        w, scale = self.norm.weights, self.inverse[at][:, None]
        gain = None if w.gain is None else self.norm.frame.cast(w.gain)
        if self.transposed:
            # (C diag(w) / s)ᵀ = diag(w) C / s: centring is symmetric, and comes last in the
            # adjoint.
            x = (x if gain is None else x * gain) * scale
            return x - x.mean(-1, keepdim=True) if w.center else x
        x = (x - x.mean(-1, keepdim=True) if w.center else x) * scale
        return x if gain is None else x * gain

    def cast(self, dtype: torch.dtype) -> FoldedNorm:
        """The norm as it is: norms are computed in the operator's own precision."""
        return self


Folded = FoldedStep | FoldedNorm
"""A stage in normal form."""


# --- What a sweep returns -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reduction:
    """What to return of every vector at every position: a number, or the vector itself.

    Attributes:
        block: Turns the state of a block [pos, rows, d_model] into [pos, rows] or
            [pos, rows, kept]. Not used where ``with_x`` is given.
        with_x: Vectors [pos, d_model]. When given, the result is ⟨vector at t, x_t⟩.
        kept: How many numbers per vector and position the result has.
    """

    block: Callable[[Tensor], Tensor]
    with_x: Float[Tensor, "pos d_model"] | None = None
    kept: int = 1


def dots(x: Float[Tensor, "pos d_model"]) -> Reduction:
    """Ask for ⟨vector at t, x_t⟩."""
    return Reduction(wide, with_x=x)


def squares() -> Reduction:
    """Ask for ‖vector at t‖²."""
    return Reduction(lambda state: wide(state).square().sum(-1))


def states(d_model: int) -> Reduction:
    """Ask for the vectors themselves."""
    return Reduction(wide, kept=d_model)


def wide(x: Tensor) -> Tensor:
    """Half precision as float32, so that sums keep their digits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
