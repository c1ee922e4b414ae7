"""Fold a branch of the residual stream into two matrices and a middle, for many vectors at once.

A branch is a chain of primitive maps. Every such chain has one normal form,

    branch(x) = middle(x · into) · out,      middle = ⊙ ratio[pos]  or  Σ_k A_h[q, k] (per head),

because a norm with a frozen scale is a fixed matrix (subtract the mean, multiply by w) and one
number per position. The matrix goes into the weights beside it, the number into the ratio or the
pattern. So many vectors cost two matrix products a branch and one pass over the middle, whatever
the architecture. Constants are not folded: ``apply`` and ``apply_t`` carry them.

Folding copies the two matrices of a branch. A sweep folds a step when it gets there and drops the
copy afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatchmethod

import torch
from torch import Tensor

from ..costs import BranchShape, StageShape
from ..maps import (
    Chain,
    Conv,
    DeltaRule,
    Gate,
    Identity,
    Linear,
    LinearMap,
    Mix,
    Norm,
    Residual,
    Routed,
    Shift,
    Sum,
)
from ..sublayers import AnyMix, RecomputedMix, Sublayer, Tiles
from .normal_forms import (
    Folded,
    FoldedNorm,
    FoldedStep,
    Mixing,
    Positionwise,
    RoutedRows,
    Scan,
    StoredTiles,
)

Stage = Residual | Norm
"""What an operator is a chain of: a residual step, or a norm on the stream itself."""


def stages_of(op: LinearMap) -> Iterator[Stage]:
    """The residual steps and norms that an operator is a chain of, without shifts and identities.

    Args:
        op: The ``map`` of an operator, or of a part of it that ``between`` gives.

    Yields:
        The residual steps and norms, first to last.

    Raises:
        ValueError: If the map is something else.
    """
    if isinstance(op, Residual | Norm):
        yield op
    elif isinstance(op, Chain):
        for part in op.maps:
            yield from stages_of(part)
    elif not isinstance(op, Shift | Identity):
        raise ValueError(
            f"The map {type(op).__name__} is not a chain of residual steps. "
            "Pass the operator of a lens, or what lens.between gives."
        )


def _branches(stage: Stage) -> tuple[LinearMap, ...]:
    """The branches of a residual step; a norm has none."""
    if isinstance(stage, Norm):
        return ()
    return stage.branch.maps if isinstance(stage.branch, Sum) else (stage.branch,)


def fold(stage: Stage, prompt: int, transposed: bool) -> Folded:
    """Fold one stage of an operator for one prompt of the batch.

    In the causal coordinates of a sweep, a vector at position t reaches positions ≤ t only, in
    either direction: a pull keeps the positions and transposes, a push reverses the positions.

    Args:
        stage: A residual step or a norm, from :func:`stages_of`.
        prompt: Index of the prompt in the batch.
        transposed: Whether to fold the adjoint, for a pull.

    Returns:
        The stage in normal form, on the prompt's real positions.
    """
    start, stop = stage.frame.spans[prompt]
    real = slice(start, stop)
    if isinstance(stage, Norm):
        inverse = stage.scale[prompt, real].reciprocal()
        return FoldedNorm(stage, inverse if transposed else inverse.flip(0), transposed)
    positions = torch.arange(start, stop, device=stage.frame.device)
    positions = positions if transposed else positions.flip(0)
    routed = [b for b in _branches(stage) if _is_routed(b)]
    plain = [b for b in _branches(stage) if not _is_routed(b)]
    folded = [_Folding(prompt, real).branch(b).flipped(transposed) for b in plain]
    return FoldedStep(
        tuple(b for b in folded if isinstance(b, Mixing)),
        tuple(b for b in folded if isinstance(b, Positionwise)),
        tuple(RoutedRows(b, prompt, positions, transposed) for b in routed),
    )


def _is_routed(branch: LinearMap) -> bool:
    return any(isinstance(part, Routed) for part in _primitives(branch))


class _Folding:
    """Walks along a branch's primitive maps and gathers its normal form.

    One method for each kind of primitive; what a norm leaves waits in ``norms`` and ``before``
    until the matrix or the middle comes that it goes into.
    """

    def __init__(self, prompt: int, real: slice):
        self.prompt, self.real = prompt, real
        self.into: Tensor | None = None
        self.out: Tensor | None = None
        self.ratio: Tensor | None = None
        self.values: Tensor | None = None  # a ratio before the pattern
        self.tiles: StoredTiles | Tiles | None = None
        self.groups = (1, 1)
        self.scan: list[Conv | Gate | DeltaRule] = []  # in place of tiles, in a delta net
        self.norms: list[Norm] = []  # their matrices go into the next one
        self.before: Tensor | None = None  # 1/scale of norms [pos, 1], for the middle to come
        self.after: Tensor | None = None  # and of norms after a delta net
        self.halves = 1  # branches of a gated MLP side by side

    def branch(self, op: LinearMap) -> Positionwise | Mixing:
        """The normal form of a branch."""
        for part in _primitives(op):
            self.take(part)
        into, out = _found(self.into), _found(self.out)
        if self.scan:
            scan, before = Scan(Chain(tuple(self.scan))), self.before
            return Mixing(into, out, scan, (1, 1), (before, self.after))
        if self.tiles is not None:
            return Mixing(into, out, self.tiles, self.groups, (self.values, self.ratio))
        out = out.repeat(self.halves, 1) if self.halves > 1 else out
        return Positionwise(into, out, _found(self.ratio))

    @singledispatchmethod
    def take(self, part: LinearMap) -> None:
        """Take the next primitive map into the normal form."""
        raise ValueError(
            f"The map {type(part).__name__} cannot be folded. Build branches of primitive maps."
        )

    @take.register
    def _shift(self, part: Shift) -> None:
        """Constants have no place in the linear part."""

    @take.register
    def _norm(self, part: Norm) -> None:
        if self.out is None:  # before the first matrix
            self.norms.append(part)
        else:  # after the second: y → (y C) ⊙ w / s
            self.out = _centred(self.out, -1) if part.weights.center else self.out
            if (gain := part.weights.gain) is not None:
                self.out = self.out * part.frame.cast(gain)
        self.scale(1 / self.cut(part.scale))

    @take.register
    def _linear(self, part: Linear) -> None:
        W = part.frame.cast(part.W)
        for norm in reversed(self.norms):  # x C diag(w) W: the norm's matrix from the left
            gain = norm.weights.gain
            # Nearest norm first: x N1 N2 W takes N2 into W before N1.
            W = W if gain is None else W * norm.frame.cast(gain)[:, None]
            W = _centred(W, 0) if norm.weights.center else W
        self.norms = []
        if self.ratio is not None or self.tiles is not None or self.scan:
            self.out = W
        else:  # before the middle; a latent is read by a second matrix
            self.into = W if self.into is None else self.into @ W

    @take.register
    def _gate(self, part: Gate) -> None:
        if self.scan:
            self._scan(part)
            return
        ratio = self.cut(part.ratio).repeat(1, self.halves)
        self.ratio = ratio if self.ratio is None else self.ratio * ratio
        if self.tiles is None:
            self.settle()

    @take.register(Conv)
    @take.register(DeltaRule)
    def _scan(self, part: Conv | DeltaRule | Gate) -> None:
        self.scan.append(part.cut(self.prompt, self.real))

    @take.register(Mix)
    @take.register(RecomputedMix)
    def _mix(self, part: AnyMix) -> None:
        self.groups = (part.kv_heads, part.heads // part.kv_heads)
        self.values, self.ratio = self.ratio, None
        if isinstance(part, RecomputedMix):
            self.tiles = part.tiles(self.prompt)
        else:
            pattern = part.pattern[self.prompt, :, self.real, self.real]
            self.tiles = StoredTiles(pattern.unflatten(0, self.groups))
        if self.before is not None:  # a norm before W_V scales what is read: the pattern's columns
            self.tiles, self.before = self.tiles.times(key_gain=self.before[:, 0]), None

    @take.register
    def _sum(self, part: Sum) -> None:
        """The two halves of a gated MLP, each Linear and Gate, become one twice as wide."""
        halves = []
        for half in part.maps:
            folding = _Folding(self.prompt, self.real)
            # Both halves read through the same norm.
            folding.norms, folding.before = list(self.norms), self.before
            for primitive in _primitives(half):
                folding.take(primitive)
            halves.append(folding)
        # Σ_i (x · into_i ⊙ r_i) · out is one product over both widths with out twice below itself.
        self.into = torch.cat([_found(half.into) for half in halves], -1)
        self.ratio = torch.cat([_found(half.ratio) for half in halves], -1)
        self.norms, self.before, self.halves = [], None, len(halves)

    def cut(self, tensor: Tensor) -> Tensor:
        """The real positions of the prompt."""
        return tensor[self.prompt, self.real]

    def scale(self, numbers: Tensor) -> None:
        """Take a norm's 1/scale [pos, 1] into the ratio or the pattern."""
        if self.scan and self.out is not None:
            self.after = numbers if self.after is None else self.after * numbers
        elif self.tiles is not None:  # a norm after W_O scales what is written: the pattern's rows
            self.tiles = self.tiles.times(query_gain=numbers[:, 0])
        else:
            self.before = numbers if self.before is None else self.before * numbers
            self.settle()

    def settle(self) -> None:
        """Move what waits for a ratio into the ratio."""
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


def _found(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(
            "A branch lacks a matrix or its middle. Build it of Linear, Gate or Mix, and Linear."
        )
    return tensor


def mixes_in(stage: Stage) -> list[AnyMix | DeltaRule]:
    """The attention patterns of a stage."""
    parts = (part for branch in _branches(stage) for part in _primitives(branch))
    return [part for part in parts if isinstance(part, AnyMix | DeltaRule)]


def shape_of(stage: Stage, transposed: bool) -> StageShape:
    """Widths of a stage's branches in the direction of a sweep, without folding the stage."""
    return tuple(_branch_shape(branch, transposed) for branch in _branches(stage))


def _branch_shape(branch: LinearMap, transposed: bool) -> BranchShape:
    parts = list(_primitives(branch))
    for mix in parts:
        if isinstance(mix, AnyMix | DeltaRule):
            score = mix.keys.shape[2] if isinstance(mix, RecomputedMix) else 0
            widths = (mix.out_dim, mix.in_dim) if transposed else (mix.in_dim, mix.out_dim)
            return BranchShape(*widths, mix.heads, score)
    # An MLP is as wide as its first matrix, or as those of its halves together.
    halves = [list(_primitives(half)) for p in parts if isinstance(p, Sum) for half in p.maps]
    firsts = [next(p for p in half if isinstance(p, Linear | Routed)) for half in halves or [parts]]
    width = sum(linear.out_dim for linear in firsts)
    return BranchShape(width, width)
