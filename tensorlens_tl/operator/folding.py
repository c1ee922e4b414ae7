"""Maps of the operator, folded for many vectors at once: two matrices a branch, and a middle.

A branch of the residual stream is a chain of primitives, and every such chain has one normal form,

    branch(x) = middle(x · into) · out,      middle = ⊙ ratio[pos]  or  Σ_k A_h[q, k] (per head),

because a norm with a frozen scale is a fixed matrix (centre, times w) and one number per position:
the matrix goes into its neighbour's weights, the number into the ratio or the pattern. So a sweep of
many vectors meets two matrix products a branch and one pass over the middle, whatever the
architecture. Constants play no part: they are carried by ``apply`` and ``apply_t``.

Folding a branch makes copies of its two matrices; a sweep folds a step when it comes to it and
drops it after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..sublayers import (
    AnyMix,
    Chain,
    Gate,
    Identity,
    Linear,
    LinearMap,
    Mix,
    Norm,
    RecomputedMix,
    Residual,
    Shift,
    Sublayer,
    Sum,
    Tiles,
)
from .cost_model import BranchShape, StageShape


@dataclass(frozen=True, eq=False)
class Positionwise:
    """A branch that keeps positions apart: x → ((x · into) ⊙ ratio) · out, for one prompt."""

    into: Float[Tensor, "d_in width"]
    out: Float[Tensor, "width d_out"]
    ratio: Float[Tensor, "pos width"]

    def flipped(self, transposed: bool) -> Positionwise:
        """In causal coordinates; see :func:`fold`."""
        if transposed:
            return Positionwise(self.out.T, self.into.T, self.ratio)
        return Positionwise(self.into, self.out, self.ratio.flip(0))


@dataclass(frozen=True, eq=False)
class Mixing:
    """A branch that mixes positions: x → Σ_h A_h (x · into_{g(h)}) · out_h, for one prompt.

    ``pattern[g, r]`` belongs to query head g · repeats + r, which reads group g of ``into`` (one
    group per key/value head). In causal coordinates ``gathers`` tells a pull, whose repeats are
    summed into one group, from a push, which copies one group to its repeats.
    """

    into: Float[Tensor, "d_in width_in"]
    out: Float[Tensor, "width_out d_out"]
    pattern: Float[Tensor, "group repeat to from"] | Tiles
    gathers: bool = False

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of query heads, and heads in each."""
        heads = self.pattern.queries if isinstance(self.pattern, Tiles) else self.pattern
        return heads.shape[0], heads.shape[1]

    def tile(self, to: slice, source: slice | Tensor) -> Float[Tensor, "group repeat to from"]:
        """A part of the pattern; made now where it is recomputed."""
        if isinstance(self.pattern, Tiles):
            return self.pattern[to, source]
        return self.pattern[:, :, to, source]

    def cast(self, kind: torch.dtype) -> Mixing:
        """In another precision; scores are recomputed in their own."""
        tiles = self.pattern
        tiles = replace(tiles, dtype=kind) if isinstance(tiles, Tiles) else tiles.to(kind)
        return Mixing(self.into.to(kind), self.out.to(kind), tiles, self.gathers)

    def flipped(self, transposed: bool) -> Mixing:
        """In causal coordinates; see :func:`fold`."""
        A = self.pattern
        if transposed:
            A = A.flipped(True) if isinstance(A, Tiles) else A.mT.contiguous()
            return Mixing(self.out.T, self.into.T, A, gathers=True)
        A = A.flipped(False) if isinstance(A, Tiles) else A.flip(-2, -1)
        return Mixing(self.into, self.out, A)


@dataclass(frozen=True, eq=False)
class FoldedStep:
    """x → x + Σ branches(x)."""

    branches: tuple[Positionwise | Mixing, ...]

    @property
    def mixes(self) -> bool:
        """Whether positions meet in it."""
        return any(isinstance(b, Mixing) for b in self.branches)


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """A norm on the stream itself: x → (x · C diag(w)) / s, or its transpose."""

    norm: Norm
    inverse: Float[Tensor, "pos 1"]
    transposed: bool

    def rows(self, x: Tensor, at: Tensor | slice) -> Tensor:
        """Applied to vectors [pos, many, d_model] at some positions."""
        w, scale = self.norm.weights, self.inverse[at][:, None]
        gain = None if w.gain is None else self.norm.frame.cast(w.gain)
        if self.transposed:
            x = (x if gain is None else x * gain) * scale
            return x - x.mean(-1, keepdim=True) if w.center else x
        x = (x - x.mean(-1, keepdim=True) if w.center else x) * scale
        return x if gain is None else x * gain


Folded = FoldedStep | FoldedNorm


def stages_of(op: LinearMap) -> Iterator[LinearMap]:
    """The steps and norms an operator is a chain of, shifts and identities left out.

    Args:
        op: The ``map`` of an operator, or of what ``between`` gives.

    Yields:
        Residual steps and norms, first to last.

    Raises:
        ValueError: If the map is of another kind.
    """
    if isinstance(op, Residual | Norm):
        yield op
    elif isinstance(op, Chain):
        for part in op.maps:
            yield from stages_of(part)
    elif not isinstance(op, Shift | Identity):
        raise ValueError(
            f"expected an operator, or what lens.between gives, got a {type(op).__name__}"
        )


def fold(stage: LinearMap, prompt: int, transposed: bool) -> Folded:
    """Fold one stage of an operator for one prompt of the batch.

    In the causal coordinates of a sweep a vector at position t reaches positions ≤ t only, in
    either direction: a pull keeps positions and transposes, a push reverses positions.

    Args:
        stage: One of :func:`stages_of`.
        prompt: Which prompt.
        transposed: Whether to fold the adjoint.

    Returns:
        The stage in normal form, on that prompt's real positions.

    Raises:
        ValueError: If the stage is neither a residual step nor a norm.
    """
    start, stop = stage.frame.spans[prompt]
    real = slice(start, stop)
    if isinstance(stage, Norm):
        inverse = stage.scale[prompt, real].reciprocal()
        return FoldedNorm(stage, inverse if transposed else inverse.flip(0), transposed)
    if not isinstance(stage, Residual):
        raise ValueError(f"expected a residual step or a norm, got {type(stage).__name__}")
    branches = stage.branch.maps if isinstance(stage.branch, Sum) else (stage.branch,)
    folded = (_Folding(prompt, real).branch(b).flipped(transposed) for b in branches)
    return FoldedStep(tuple(folded))


class _Folding:
    """Walks a branch's primitives, gathering the normal form."""

    def __init__(self, prompt: int, real: slice):
        self.prompt, self.real = prompt, real
        self.into: Tensor | None = None
        self.out: Tensor | None = None
        self.ratio: Tensor | None = None
        self.pattern: Tensor | Tiles | None = None
        self.before: Tensor | None = None  # numbers per position that a norm before leaves
        self.norms: list[Norm] = []  # norms not yet taken into the next matrix
        self.tiles = 1

    def branch(self, op: LinearMap) -> Positionwise | Mixing:
        """The normal form of a branch."""
        for part in _primitives(op):
            self.take(part)
        into, out = _given(self.into), _given(self.out)
        if self.pattern is not None:
            return Mixing(into, out, self.pattern)
        if self.tiles > 1:
            out = out.repeat(self.tiles, 1)
        return Positionwise(into, out, _given(self.ratio))

    def cut(self, tensor: Tensor) -> Tensor:
        return tensor[self.prompt, self.real]

    def take(self, part: LinearMap) -> None:
        if isinstance(part, Shift):
            return
        if isinstance(part, Norm) and self.out is None:
            self.norms.append(part)
            self.scale(1 / self.cut(part.scale))
        elif isinstance(part, Norm):  # after the sublayer: y → (y C) ⊙ w / s
            self.out = _centred(_given(self.out), -1) if part.weights.center else self.out
            if (gain := part.weights.gain) is not None:
                self.out = _given(self.out) * part.frame.cast(gain)
            self.scale(1 / self.cut(part.scale))
        elif isinstance(part, Linear):
            W = part.frame.cast(part.W)
            for norm in reversed(self.norms):
                gain = norm.weights.gain
                W = W if gain is None else W * norm.frame.cast(gain)[:, None]
                W = _centred(W, 0) if norm.weights.center else W
            self.norms = []
            if self.into is None:
                self.into = W
            else:
                self.out = W
        elif isinstance(part, Gate):
            ratio = self.cut(part.ratio).repeat(1, self.tiles)
            self.ratio = ratio if self.ratio is None else self.ratio * ratio
            self.settle()
        elif isinstance(part, RecomputedMix):
            self.pattern = part.tiles(self.prompt)
            if self.before is not None:
                self.pattern = self.pattern.times(key_gain=self.before[:, 0])
                self.before = None
        elif isinstance(part, Mix):
            pattern = part.pattern[self.prompt, :, self.real, self.real]
            self.pattern = pattern.unflatten(0, (part.kv_heads, -1))
            if self.before is not None:
                self.pattern, self.before = self.pattern * self.before.T, None
        elif isinstance(part, Sum):
            halves = []
            for half in part.maps:
                folding = _Folding(self.prompt, self.real)
                folding.norms, folding.before = list(self.norms), self.before
                for primitive in _primitives(half):
                    folding.take(primitive)
                halves.append(folding)
            self.into = torch.cat([_given(half.into) for half in halves], -1)
            self.ratio = torch.cat([_given(half.ratio) for half in halves], -1)
            self.norms, self.before, self.tiles = [], None, len(halves)
        else:
            raise ValueError(f"expected a primitive map, got {type(part).__name__}")

    def scale(self, numbers: Tensor) -> None:
        """Take numbers per position [pos, 1] along, into the ratio or the pattern."""
        if isinstance(self.pattern, Tiles):
            self.pattern = self.pattern.times(query_gain=numbers[:, 0])
        elif self.pattern is not None:
            self.pattern = self.pattern * numbers
        else:
            self.before = numbers if self.before is None else self.before * numbers
            self.settle()

    def settle(self) -> None:
        if self.ratio is not None and self.before is not None:
            self.ratio, self.before = self.ratio * self.before, None


def _primitives(op: LinearMap) -> Iterator[LinearMap]:
    if isinstance(op, Sublayer):
        op = op.map
    if isinstance(op, Chain):
        for part in op.maps:
            yield from _primitives(part)
    else:
        yield op


def _centred(W: Tensor, dim: int) -> Tensor:
    return W - W.mean(dim, keepdim=True)


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a branch has two matrices and a middle; this one lacks one")
    return tensor


def mixes_in(stage: LinearMap) -> list[AnyMix]:
    """The attention patterns of a stage."""
    branch = stage.branch if isinstance(stage, Residual) else stage
    maps = branch.maps if isinstance(branch, Sum) else (branch,)
    return [part for m in maps for part in _primitives(m) if isinstance(part, AnyMix)]


def shape_of(stage: LinearMap, transposed: bool) -> StageShape:
    """Widths of a stage's branches in the direction of a sweep, without folding it."""
    if isinstance(stage, Norm):
        return ()
    branch = stage.branch if isinstance(stage, Residual) else stage
    shapes = []
    for op in branch.maps if isinstance(branch, Sum) else (branch,):
        parts = list(_primitives(op))
        if mixes := [p for p in parts if isinstance(p, AnyMix)]:
            mix = mixes[0].T if transposed else mixes[0]
            score = mixes[0].keys.shape[2] if isinstance(mixes[0], RecomputedMix) else 0
            shape = BranchShape(mix.in_dim, mix.out_dim, mixes[0].heads, score)
        else:
            halves = [list(_primitives(h)) for p in parts if isinstance(p, Sum) for h in p.maps]
            firsts = [next(p for p in half if isinstance(p, Linear)) for half in halves or [parts]]
            width = sum(linear.out_dim for linear in firsts)
            shape = BranchShape(width, width)
        shapes.append(shape)
    return tuple(shapes)
