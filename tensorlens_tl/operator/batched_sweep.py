"""Carry many vectors through the operator at once.

A sweep carries P vectors from each of N positions: a pull (Tᵀ) from destinations to sources, or a
push (T) from sources to destinations. It works in causal coordinates, which are the positions for a
pull and the reversed positions for a push. There a vector that starts at t reaches positions ≤ t
only. D is d_model, L the number of positions, m is d_mlp, H the number of heads.

1. Rows. Until the first attention every vector stays at its own position, so the MLP that comes
   before it is done on N · P rows, not on N · P · L.                     4 m D flops a row
2. Spread. The first attention makes one row per head, R_h = z_h W_V^h, and spreads it by one
   product [L, H] × [H, P · D] per position.                           2 D² + 2 H t D flops a vector
3. Full. Vectors that start at neighbouring positions form blocks [t ≤ last, P · n, D], with the
   position first. No row lies above the diagonal, but for the block's own triangle.
                                                         4 D² + 4 m D + 2 t D flops a row and layer
4. Where enough vectors share a position, its MLP becomes one map I + W_in diag(r) W_out, computed
   once for all blocks (2 m D² flops). A row then costs 2 D² instead of 4 m D. The rule is
   :func:`~tensorlens_tl.operator.cost_model.folds_below`.
5. Reduce, block by block: ⟨vector, x⟩, ‖vector‖² or the vector itself. For ⟨vector, x⟩ the last
   attention's final product is left out: z is multiplied with x W_V instead.

The state takes 4 D P Σ t bytes, over the positions t that are carried together. ``cost_model`` cuts
the work so that it fits. Stages write over the state; only for a lens with a graph they write to a
copy, because autograd needs what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import progress_bar
from ..costs import (
    CAUSAL_TILE,
    ROWS,
    SweepShape,
    carried_by,
    fold_group,
    folds_below,
    half_bytes,
    memory_budget,
)
from ..maps import LinearMap
from ..sublayers import Tiles
from .folding import Stage, fold, mixes_in, shape_of, stages_of
from .normal_forms import (
    Folded,
    FoldedNorm,
    FoldedStep,
    Mixing,
    Positionwise,
    Reduction,
    Scan,
    StoredTiles,
    wide,
)


@dataclass(frozen=True, eq=False)
class BatchedSweep:
    """A sweep of one prompt, ready to carry vectors.

    Attributes:
        op: The chain of an operator, or of a part of it that ``between`` gives.
        prompt: Index of the prompt in the batch. Positions below count its real tokens.
        transposed: Whether to pull (Tᵀ) instead of push (T).
        precision: Dtype of matrices and vectors, or None for the operator's. Sums are float32 at
            least.
        folding: Whether to fold MLPs into one map per position. None decides by cost.
    """

    op: LinearMap
    prompt: int
    transposed: bool
    precision: torch.dtype | None = None
    folding: bool | None = None

    @property
    def n_pos(self) -> int:
        """Number of real tokens of the prompt."""
        start, stop = self.op.frame.spans[self.prompt]
        return stop - start

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Residual steps and norms, in the order in which the sweep comes to them."""
        stages = tuple(stages_of(self.op))
        return stages[::-1] if self.transposed else stages

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of matrices and vectors."""
        return self.precision or self.op.frame.dtype

    @cached_property
    def causal(self) -> bool:
        """Whether no pattern looks ahead. A pattern from a user's hook may."""
        mixes = (m for stage in self.stages for m in mixes_in(stage))
        return not any(m.looks_ahead(self.prompt) for m in mixes)

    def coordinate(self, pos: Tensor) -> Tensor:
        """Positions as causal coordinates; the same function leads back."""
        return pos if self.transposed else self.n_pos - 1 - pos

    def shape(self, at: Tensor, many: int, reduce: Reduction) -> SweepShape:
        """The numbers that the cost of a sweep depends on.

        Args:
            at: Positions [n] that vectors start from.
            many: Number of vectors per position.
            reduce: What to return of every vector.

        Returns:
            The shape of the sweep. It predicts the cost and cuts the work.
        """
        return SweepShape(
            tuple(shape_of(stage, self.transposed) for stage in self.stages),
            self.op.in_dim,
            self.n_pos,
            tuple(sorted(self.coordinate(at).tolist())),
            many,
            reduce.kept,
            self.dtype.itemsize,
            reduce.with_x is not None,
            self.causal,
            self.folding,
            half_bytes(self.dtype, self.op.frame.device),
        )

    def carry(
        self,
        at: Int[Tensor, " n"],
        vectors: Callable[[Tensor, slice], Float[Tensor, "n part d_model"]],
        many: int,
        reduce: Reduction,
        memory_limit: int | None = None,
    ) -> Float[Tensor, "n many pos ..."]:
        """Carry ``many`` vectors from each of some positions, in chunks that fit the memory.

        Args:
            at: Positions [n] among the prompt's real tokens.
            vectors: Called with indices into ``at`` and a slice of range(many). Gives the vectors
                that start there [n, part, d_model].
            many: Number of vectors per position.
            reduce: What to return of every vector.
            memory_limit: Most memory in bytes. None is half of what is free on the device.

        Returns:
            The reductions [n, many, pos] (or [n, many, pos, d_model]), in the order of ``at``.

        Raises:
            ValueError: If not even one vector fits.
        """
        device = self.op.frame.device
        chunks = self.shape(at, many, reduce).chunks(memory_budget(memory_limit, device))
        order = self.coordinate(at).argsort()
        size = (len(at), many, self.n_pos, *([reduce.kept] if reduce.kept > 1 else []))
        kind = torch.promote_types(self.dtype, torch.float32)
        found = torch.zeros(size, dtype=kind, device=device)
        with progress_bar("sweep", len(chunks) * len(self.stages), unit=" steps") as bar:
            for part, blocks in chunks:
                first = blocks[0].first
                index = order[first : blocks[-1].first + blocks[-1].n]
                spans = [slice(b.first - first, b.first - first + b.n) for b in blocks]
                rows = vectors(index, part)
                found[index, part] = self.run(at[index], rows, reduce, spans, bar.update)
        return found

    def run(
        self,
        at: Int[Tensor, " n"],
        vectors: Float[Tensor, "n many d_model"],
        reduce: Reduction,
        spans: Sequence[slice],
        moved: Callable[[], object],
    ) -> Tensor:
        """Carry vectors from some positions, all blocks together through one stage after another.

        Args:
            at: Positions [n], ascending in causal coordinates.
            vectors: The vectors that start there.
            reduce: What to return of every vector.
            spans: Slices of ``at`` that form a block each, in order.
            moved: Called after every stage, for a progress bar.

        Returns:
            The reductions [n, many, pos, …], at the prompt's positions.
        """
        t, rows = self.coordinate(at), self._cast(vectors)
        last: list[tuple[Mixing, list[Tensor]]] = []
        blocks: list[Tensor] | None = None
        for i, stage in enumerate(self.stages):
            if i:
                moved()
            folded = fold(stage, self.prompt, self.transposed)
            folded = folded if self.precision is None else folded.cast(self.precision)
            if blocks is None:
                if isinstance(folded, FoldedNorm) or not folded.mixing:  # 1. Rows
                    rows = self._rows(folded, rows, t)
                    continue
                # Coordinates ascend, and nothing moves upwards: a block ends at its last start.
                ends = [int(t[s][-1]) + 1 if self.causal else self.n_pos for s in spans]
                blocks = self._spread(folded, rows, t, spans, ends)  # 2. Spread
            elif i == len(self.stages) - 1 and reduce.with_x is not None:
                last = self._step(folded, blocks, finish=False)  # 3. and 5.
            else:
                self._step(folded, blocks)  # 3. Full, with 4. inside
        moved()
        if blocks is None:  # no attention: every vector is where it started
            blocks = [_placed(rows[s], t[s], int(t[s][-1]) + 1) for s in spans]
        return self._reduced(reduce, blocks, last, spans, rows.shape[1])

    # --- 1. Rows

    def _rows(self, folded: Folded, rows: Tensor, t: Tensor) -> Tensor:
        if isinstance(folded, FoldedNorm):
            return folded.rows(rows, t).to(rows.dtype)
        routed = [branch.rows(rows, t) for branch in folded.routed]
        for branch in folded.positionwise:
            state = rows.clone()
            here = Positionwise(branch.into, branch.out, branch.ratio[t])
            self._positionwise(here, [rows], [state], [rows.shape[1]] * len(rows))
            rows = state
        return sum(routed, rows)

    # --- 2. Spread

    def _spread(
        self,
        step: FoldedStep,
        rows: Tensor,
        t: Tensor,
        spans: Sequence[slice],
        ends: list[int],
    ) -> list[Tensor]:
        own = self._rows(replace(step, mixing=()), rows, t)
        blocks = []
        for span, end in zip(spans, ends, strict=True):
            state = _placed(own[span], t[span], end)
            # Branches side by side read the same rows: none sees what another one added.
            for branch in step.mixing:
                if branch.gates[1] is None and not isinstance(branch.tiles, Scan):
                    _spread_one(branch, rows[span], t[span], state)
                    continue
                # A factor after mixing differs from position to position: no outer product.
                mid = self._mid(branch, _placed(rows[span], t[span], end))
                state.flatten(0, 1).addmm_(mid.flatten(0, 1), branch.out)
            blocks.append(state)
        return blocks

    # --- 3. Full

    def _step(
        self, step: Folded, blocks: list[Tensor], finish: bool = True
    ) -> list[tuple[Mixing, list[Tensor]]]:
        """One stage on all blocks, in place.

        Args:
            step: The folded stage.
            blocks: States [pos, rows, d_model], that are changed.
            finish: Whether to apply the second matrices of the mixing branches, too.

        Returns:
            Without ``finish``, the mixing branches and what they read mixed; else nothing.
        """
        # Autograd needs what the stage read: then what it writes goes to a copy.
        read = list(blocks)
        if self.op.frame.graph:
            blocks[:] = [state.clone() for state in blocks]
        if isinstance(step, FoldedNorm):
            for state, was in zip(blocks, read, strict=True):
                state.copy_(step.rows(was, slice(0, len(was))))
            return []
        # Branches side by side read the same state: mix before any of them writes to it. A branch
        # alone is mixed and written block by block, which needs memory for one block only.
        branches = len(step.mixing) + len(step.positionwise) + len(step.routed)
        together = branches > 1 or not finish
        routed = [[b.rows(s, slice(0, len(s))) for b in step.routed] for s in read]
        half = [(b, [self._mid(b, s) for s in read]) for b in step.mixing] if together else []
        for branch in step.positionwise:
            carried = carried_by([(len(s), s.shape[1]) for s in blocks])
            self._positionwise(branch, read, blocks, carried)
        for state, added in zip(blocks, routed, strict=True):
            for rows in added:
                state += rows
        if not finish:
            return half
        for k, state in reversed(list(enumerate(blocks))):
            mids = [(b, m[k]) for b, m in half] or [(b, self._mid(b, read[k])) for b in step.mixing]
            for branch, mid in mids:
                state.flatten(0, 1).addmm_(mid.flatten(0, 1), branch.out)
        return []

    def _mid(self, b: Mixing, state: Tensor) -> Tensor:
        """Σ_from A[to, from] (state · into), before ``out``: [pos, rows, width]."""
        n, rows, _ = state.shape
        groups, repeats = b.groups
        # Narrow first: d_head numbers per head are mixed, not d_model.
        z = _times(state.flatten(0, 1) @ b.into, b.gates[0], slice(n))
        if isinstance(b.tiles, Scan):
            found = b.tiles(z.view(n, rows, -1))
            return _times(found.flatten(0, 1), b.gates[1], slice(n)).view_as(found)
        inner = (groups, repeats, -1) if b.gathers else (groups, 1, -1)
        z = z.view(n, rows, *inner).permute(2, 3, 0, 1, 4).flatten(3)  # [group, repeat, from, …]
        mixed = z.new_empty(groups, 1 if b.gathers else repeats, n, z.shape[-1])
        size = CAUSAL_TILE if self.causal or b.recomputed else n
        for first in range(0, n, size):
            # A causal tile skips what is below its first position, where the pattern is zero.
            to = slice(first, min(first + size, n))
            source = slice(first if self.causal else 0, n)
            pattern = b.tiles[to, source]
            if not b.gathers:
                if self.op.frame.graph:  # autograd knows no out=
                    mixed[:, :, to] = pattern @ z[:, :, source]
                else:
                    torch.matmul(pattern, z[:, :, source], out=mixed[:, :, to])
                continue
            # A pull sums the query heads of a group, so they add up in one buffer.
            out = torch.bmm(pattern[:, 0], z[:, 0, source])
            for r in range(1, repeats):
                out.baddbmm_(pattern[:, r], z[:, r, source])
            mixed[:, 0, to] = out
        found = mixed.unflatten(3, (rows, -1)).permute(2, 3, 0, 1, 4).flatten(2)
        return _times(found.flatten(0, 1), b.gates[1], slice(n)).view_as(found)

    # --- 4. MLPs

    def _positionwise(
        self, b: Positionwise, read: list[Tensor], blocks: list[Tensor], carried: list[int]
    ) -> None:
        """S += ((S · into) ⊙ ratio) · out, in place, by one map per position where that pays.

        Args:
            b: The branch, folded for the prompt of the sweep.
            read: The states S: those that are changed, or others with the same numbers.
            blocks: The states that are changed.
            carried: Number of vectors at every position.
        """
        d_model, width = b.into.shape
        below = folds_below(width, d_model, carried, self.folding)
        group = min(fold_group(width, d_model), max(1, below))
        eye = torch.eye(d_model, dtype=b.into.dtype, device=b.into.device)
        for first in range(0, below, group):
            pos = slice(first, min(first + group, below))
            # 1 + into · diag(r_t) · out: one map [d_model, d_model] serves all vectors at position
            # t.
            maps = torch.matmul(b.into * b.ratio[pos, None], b.out).add_(eye)
            # The largest first: the others fit into what it frees.
            for was, state in zip(reversed(read), reversed(blocks), strict=True):
                if len(part := was[pos]):
                    state[pos].copy_(torch.bmm(part, maps[: len(part)]))
        for was, state in zip(reversed(read), reversed(blocks), strict=True):
            many = state.shape[1]
            size = max(1, ROWS // many)
            for first in range(below, len(state), size):
                part = state[first : first + size]
                hidden = was[first : first + size].flatten(0, 1) @ b.into
                hidden.unflatten(0, (-1, many)).mul_(b.ratio[first : first + len(part), None])
                part.flatten(0, 1).addmm_(hidden, b.out)

    # --- 5. Reduce

    def _reduced(
        self,
        reduce: Reduction,
        blocks: list[Tensor],
        last: list[tuple[Mixing, list[Tensor]]],
        spans: Sequence[slice],
        many: int,
    ) -> Tensor:
        x = None if reduce.with_x is None else self._cast(self._flip(reduce.with_x))
        found = []
        for k, (state, span) in enumerate(zip(blocks, spans, strict=True)):
            if x is None:
                part = reduce.block(state)
            else:
                part = _dot(state, x)
                for branch, mids in last:  # ⟨mid · out, x⟩ = ⟨mid, x · outᵀ⟩, for one product less
                    part = part + _dot(mids[k], x @ branch.out.T)
            part = part.unflatten(1, (span.stop - span.start, many))
            whole = part.new_zeros(self.n_pos, *part.shape[1:])
            whole[: len(part)] = part
            found.append(self._flip(whole).movedim(0, 2))
        return torch.cat(found)

    def _flip(self, x: Tensor) -> Tensor:
        """Positions [pos, …] to causal coordinates, and back."""
        return x if self.transposed else x.flip(0)

    def _cast(self, x: Tensor) -> Tensor:
        return x if self.precision is None else x.to(self.precision)


# --- One block -----------------------------------------------------------------------------------


def _spread_one(b: Mixing, rows: Tensor, t: Tensor, state: Tensor) -> None:
    """Add what one attention makes of rows [n, many, d_model] at t to a block that holds them."""
    n, many, d_model = rows.shape
    groups, repeats = b.groups
    z = _times(rows.flatten(0, 1) @ b.into, b.gates[0], t)
    if b.gathers:
        z = z.view(n * many, groups, repeats, -1).permute(1, 2, 0, 3).flatten(1, 2)
        heads = torch.bmm(z, b.out.view(groups, -1, d_model))  # [group, repeat · n · many, d]
    else:
        z = z.view(n * many, groups, 1, -1).permute(1, 2, 0, 3)
        heads = torch.matmul(z, b.out.view(groups, repeats, -1, d_model))
    heads = heads.view(groups * repeats, n, many * d_model).transpose(0, 1)
    # Every row stands at one position, so mixing is an outer product with a column of A.
    tiles = cast(StoredTiles | Tiles, b.tiles)  # a scan has no columns, and does not come here
    pattern = tiles[slice(len(state)), t].flatten(0, 1).permute(2, 1, 0)  # [n, to, head]
    spread = torch.bmm(pattern, heads).unflatten(2, (many, d_model))
    state.unflatten(1, (n, many)).add_(spread.transpose(0, 1))


def _times(z: Tensor, gate: Tensor | None, at: Tensor | slice) -> Tensor:
    """Multiply vectors [n · many, width] at n positions by a factor [pos, width], or by 1."""
    if gate is None:
        return z
    factor = gate[at][:, None]
    return (z.unflatten(0, (len(factor), -1)) * factor).flatten(0, 1)


def _placed(rows: Tensor, t: Tensor, end: int) -> Tensor:
    """A block [end, n · many, d_model] that holds each row at its own position only."""
    n, many, d_model = rows.shape
    state = rows.new_zeros(end, n, many, d_model)
    state[t, torch.arange(n, device=t.device)] = rows
    return state.flatten(1, 2)


def _dot(state: Tensor, x: Tensor) -> Tensor:
    """⟨row, x_t⟩ for the rows [pos, rows, d] of a block: [pos, rows]."""
    return torch.bmm(wide(state), wide(x[: len(state), :, None])).squeeze(-1)
