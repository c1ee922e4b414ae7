"""Many vectors of the operator at once: sweeps.

A sweep carries P vectors from each of N positions through the operator: a pull (Tᵀ) from destinations
to sources, a push (T) from sources to destinations. In its causal coordinates (positions for a pull,
reversed positions for a push) a vector at t reaches positions ≤ t only. D = d_model, L positions,
m = d_mlp, H heads.

1. Row phase. Until the first attention a vector stays where it is: the top layer's MLP is done on
   N · P rows, not on N · P · L.                                          4 m D flops a row
2. Spread. The first attention leaves one row per head, R_h = z_h W_V^h, and spreads it in one
   product [L, H] × [H, P · D] per position.                             2 D² + 2 H t D flops a vector
3. Full phase. Vectors of neighbouring positions form blocks [t ≤ last, P · n, D], position first, no
   row above the diagonal but for the block's own triangle.    4 D² + 4 m D + 2 t D flops a row and layer
4. Where enough vectors share a position, its MLP becomes one map I + W_in diag(r) W_out, computed
   once for all blocks (2 m D² flops): 2 D² a row instead of 4 m D. See :func:`planning.folds_below`.
5. What is asked for is reduced block by block: ⟨vector, x⟩, ‖vector‖² or the vectors themselves.
   For ⟨vector, x⟩ the last attention's final product is not made: z is met with x W_V.

The state is 4 D P Σ t bytes over the positions t carried together; ``planning`` cuts the work so that
it fits. No autograd graph anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..sublayers import LinearMap, Tiles
from .cost_model import (
    CAUSAL_TILE,
    ROWS,
    SweepShape,
    carried_by,
    fold_group,
    folds_below,
    half_bytes,
    memory_budget,
)
from .folding import (
    Folded,
    FoldedNorm,
    FoldedStep,
    Mixing,
    Positionwise,
    fold,
    mixes_in,
    shape_of,
    stages_of,
)


@dataclass(frozen=True, eq=False)
class BatchedSweep:
    """A sweep of one prompt, ready to carry vectors.

    Attributes:
        op: The operator, or a part of it that ``between`` gives.
        prompt: Which prompt of the batch; positions below count its real tokens.
        transposed: Pull (Tᵀ) instead of push.
        precision: Dtype of matrices and vectors; sums are float32 at least.
        folding: Whether maps are folded per position: None decides by cost.
    """

    op: LinearMap
    prompt: int
    transposed: bool
    precision: torch.dtype | None = None
    folding: bool | None = None

    @property
    def n_pos(self) -> int:
        """Real tokens of the prompt."""
        start, stop = self.op.frame.spans[self.prompt]
        return stop - start

    @property
    def stages(self) -> tuple[LinearMap, ...]:
        """Steps and norms in the order in which the sweep meets them."""
        stages = tuple(stages_of(self.op))
        return stages[::-1] if self.transposed else stages

    @property
    def dtype(self) -> torch.dtype:
        """Of matrices and vectors."""
        return self.precision or self.op.frame.dtype

    def shape(self, at: Tensor, many: int, reduce: Reduction) -> SweepShape:
        """The sweep's shape, from which its cost is known."""
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
        """Carry ``many`` vectors from each of some positions; in chunks that fit the memory.

        Args:
            at: Positions, counted over the prompt's real tokens.
            vectors: Gives vectors ``part`` of those at positions ``at[index]``, for (index, part).
            many: Vectors per position.
            reduce: What is asked for.
            memory_limit: Bytes; by default half of what is free on the device.

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
        for part, blocks in tqdm(chunks, desc="sweep", delay=2, leave=False):
            index = order[blocks[0].first : blocks[-1].first + blocks[-1].n]
            spans = [
                slice(b.first - blocks[0].first, b.first - blocks[0].first + b.n) for b in blocks
            ]
            found[index, part] = self.run(at[index], vectors(index, part), reduce, spans)
        return found

    @cached_property
    def causal(self) -> bool:
        """Whether no pattern looks ahead; a user's own pattern may."""
        found = (m for stage in self.stages for m in mixes_in(stage))
        return not any(m.looks_ahead(self.prompt) for m in found)

    def coordinate(self, pos: Tensor) -> Tensor:
        """Causal coordinates of positions, and back."""
        return pos if self.transposed else self.n_pos - 1 - pos

    def run(
        self,
        at: Int[Tensor, " n"],
        vectors: Float[Tensor, "n many d_model"],
        reduce: Reduction,
        spans: Sequence[slice],
    ) -> Tensor:
        """Carry vectors from some positions, all blocks together through one stage after another.

        Args:
            at: Positions, ascending in causal coordinates.
            vectors: What starts there.
            reduce: What is asked for.
            spans: Which of them go side by side, in order.

        Returns:
            The reductions, [n, many, pos, …] in the prompt's positions.
        """
        t, rows = self.coordinate(at), self._cast(vectors)
        causal, last = self.causal, None
        states: list[Tensor] | None = None
        stages = list(self.stages)
        for i, stage in enumerate(stages):
            folded = fold(stage, self.prompt, self.transposed)
            if isinstance(folded, FoldedStep):
                folded = self._cast_step(folded)
            if states is None:
                if isinstance(folded, FoldedNorm) or not folded.mixes:
                    rows = self._rows(folded, rows, t)
                    continue
                ends = [int(t[s][-1]) + 1 if causal else self.n_pos for s in spans]
                states = self._spread(folded, rows, t, spans, ends)
            elif i == len(stages) - 1 and reduce.with_x is not None:
                last = self._step(folded, states, causal, finish=False)
            else:
                self._step(folded, states, causal)
        if states is None:
            ends = [int(t[s][-1]) + 1 for s in spans]
            states = [_placed(rows[s], t[s], end) for s, end in zip(spans, ends, strict=True)]
        return self._collect(reduce, states, last, spans, rows.shape[1])

    # --- Phases

    def _rows(self, folded: Folded, rows: Tensor, t: Tensor) -> Tensor:
        if isinstance(folded, FoldedNorm):
            return folded.rows(rows, t).to(rows.dtype)
        for branch in folded.branches:
            if isinstance(branch, Positionwise):
                states = [rows.clone()]
                at = Positionwise(branch.into, branch.out, branch.ratio[t])
                self._positionwise(at, states, [rows.shape[1]] * len(rows))
                rows = states[0]
        return rows

    def _spread(
        self,
        step: FoldedStep,
        rows: Tensor,
        t: Tensor,
        spans: Sequence[slice],
        ends: list[int],
    ) -> list[Tensor]:
        own = self._rows(FoldedStep(tuple(b for b in step.branches if isinstance(b, Positionwise))),
                         rows, t)  # fmt: skip
        states = []
        for span, end in zip(spans, ends, strict=True):
            state = _placed(own[span], t[span], end)
            for branch in step.branches:
                if isinstance(branch, Mixing):
                    _spread_one(branch, rows[span], t[span], state)
            states.append(state)
        return states

    def _step(
        self, step: Folded, states: list[Tensor], causal: bool, finish: bool = True
    ) -> list[tuple[Mixing, list[Tensor]]] | None:
        """One stage on all blocks, in place; without ``finish`` its mixing branches stay halfway."""
        if isinstance(step, FoldedNorm):
            for state in states:
                state.copy_(step.rows(state, slice(0, len(state))))
            return None
        mixing = [b for b in step.branches if isinstance(b, Mixing)]
        wise = [b for b in step.branches if isinstance(b, Positionwise)]
        together = len(mixing) + len(wise) > 1 or not finish
        half = [(b, [_mid(b, s, causal) for s in states]) for b in mixing] if together else []
        for branch in wise:
            self._positionwise(branch, states, carried_by([(len(s), s.shape[1]) for s in states]))
        if not finish:
            return half
        for k, state in reversed(list(enumerate(states))):
            mids = [(b, m[k]) for b, m in half] or [(b, _mid(b, state, causal)) for b in mixing]
            for branch, mid in mids:
                state.flatten(0, 1).addmm_(mid.flatten(0, 1), branch.out)
        return None

    def _positionwise(self, b: Positionwise, states: list[Tensor], carried: list[int]) -> None:
        """S += ((S · into) ⊙ ratio) · out, in place, by folded maps where they pay."""
        d_model, width = b.into.shape
        below = folds_below(width, d_model, carried, self.folding)
        group = min(fold_group(width, d_model), max(1, below))
        eye = torch.eye(d_model, dtype=b.into.dtype, device=b.into.device)
        for first in range(0, below, group):
            pos = slice(first, min(first + group, below))
            maps = torch.matmul(b.into * b.ratio[pos, None], b.out).add_(eye)
            for state in reversed(states):  # the largest first: what it frees, the others fit
                if len(part := state[pos]):
                    part.copy_(torch.bmm(part, maps[: len(part)]))
        for state in reversed(states):
            many = state.shape[1]
            size = max(1, ROWS // many)
            for first in range(below, len(state), size):
                part = state[first : first + size]
                hidden = part.flatten(0, 1) @ b.into
                hidden.unflatten(0, (-1, many)).mul_(b.ratio[first : first + len(part), None])
                part.flatten(0, 1).addmm_(hidden, b.out)

    def _collect(
        self,
        reduce: Reduction,
        states: list[Tensor],
        last: list[tuple[Mixing, list[Tensor]]] | None,
        spans: Sequence[slice],
        many: int,
    ) -> Tensor:
        x = None if reduce.with_x is None else self._cast(self._flip(reduce.with_x))
        found = []
        for k, (state, span) in enumerate(zip(states, spans, strict=True)):
            part = reduce.block(state, x)
            for branch, mids in last or ():
                part = part + _dot(mids[k], _given(x) @ branch.out.T)
            part = part.unflatten(1, (span.stop - span.start, many))
            whole = part.new_zeros(self.n_pos, *part.shape[1:])
            whole[: len(part)] = part
            found.append(self._flip(whole).movedim(0, 2))
        return torch.cat(found)

    def _flip(self, x: Tensor) -> Tensor:
        return x if self.transposed else x.flip(0)

    def _cast(self, x: Tensor) -> Tensor:
        return x if self.precision is None else x.to(self.precision)

    def _cast_step(self, folded: FoldedStep) -> FoldedStep:
        if self.precision is None:
            return folded
        kind = self.precision

        def cast(b: Positionwise | Mixing) -> Positionwise | Mixing:
            if isinstance(b, Mixing):
                return b.cast(kind)
            return Positionwise(b.into.to(kind), b.out.to(kind), b.ratio.to(kind))

        return FoldedStep(tuple(cast(b) for b in folded.branches))


@dataclass(frozen=True, eq=False)
class Reduction:
    """What a sweep is asked for: one number per vector and position, or the vectors themselves.

    Attributes:
        block: Reduces a block's state [pos, rows, d_model] to [pos, rows, …].
        with_x: Vectors [pos, d_model] that every state is met with, or None.
        kept: Numbers per vector and position in the result.
    """

    block: Callable[[Tensor, Tensor | None], Tensor]
    with_x: Float[Tensor, "pos d_model"] | None = None
    kept: int = 1


def dots(x: Float[Tensor, "pos d_model"]) -> Reduction:
    """⟨vector at t, x_t⟩."""
    return Reduction(lambda state, x: _dot(state, _given(x)), x)


def squares() -> Reduction:
    """‖vector at t‖²."""
    return Reduction(lambda state, _: _wide(state).square().sum(-1))


def states(d_model: int) -> Reduction:
    """The vectors themselves."""
    return Reduction(lambda state, _: _wide(state), kept=d_model)


# --- One block -----------------------------------------------------------------------------------


def _mid(b: Mixing, state: Tensor, causal: bool) -> Tensor:
    """Σ_from A[to, from] (state · into), before ``out``: [pos, rows, width]."""
    n, rows, _ = state.shape
    groups, repeats = b.groups
    z = state.flatten(0, 1) @ b.into
    inner = (groups, repeats, -1) if b.gathers else (groups, 1, -1)
    z = z.view(n, rows, *inner).permute(2, 3, 0, 1, 4).flatten(3)  # [group, repeat, from, rows · e]
    mixed = z.new_empty(groups, 1 if b.gathers else repeats, n, z.shape[-1])
    tile = CAUSAL_TILE if causal or isinstance(b.pattern, Tiles) else n
    for first in range(0, n, tile):
        to, source = slice(first, min(first + tile, n)), slice(first if causal else 0, n)
        pattern = b.tile(to, source)
        if not b.gathers:
            torch.matmul(pattern, z[:, :, source], out=mixed[:, :, to])
            continue
        out = torch.bmm(pattern[:, 0], z[:, 0, source])
        for r in range(1, repeats):
            out.baddbmm_(pattern[:, r], z[:, r, source])
        mixed[:, 0, to] = out
    return mixed.unflatten(3, (rows, -1)).permute(2, 3, 0, 1, 4).flatten(2)


def _spread_one(b: Mixing, rows: Tensor, t: Tensor, state: Tensor) -> None:
    """Add what one attention makes of rows [n, many, d_model] at t to an empty block."""
    n, many, d_model = rows.shape
    groups, repeats = b.groups
    z = rows.flatten(0, 1) @ b.into
    if b.gathers:
        z = z.view(n * many, groups, repeats, -1).permute(1, 2, 0, 3).flatten(1, 2)
        heads = torch.bmm(z, b.out.view(groups, -1, d_model))  # [group, repeat · n · many, d]
    else:
        z = z.view(n * many, groups, 1, -1).permute(1, 2, 0, 3)
        heads = torch.matmul(z, b.out.view(groups, repeats, -1, d_model))
    heads = heads.view(groups * repeats, n, many * d_model).transpose(0, 1)
    pattern = b.tile(slice(len(state)), t).flatten(0, 1).permute(2, 1, 0)  # [n, to, head]
    spread = torch.bmm(pattern, heads).unflatten(2, (many, d_model))
    state.unflatten(1, (n, many)).add_(spread.transpose(0, 1))


def _placed(rows: Tensor, t: Tensor, end: int) -> Tensor:
    """A block [end, n · many, d_model] that holds each row at its own position only."""
    n, many, d_model = rows.shape
    state = rows.new_zeros(end, n, many, d_model)
    state[t, torch.arange(n, device=t.device)] = rows
    return state.flatten(1, 2)


def _dot(state: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(_wide(state), _wide(x[: len(state), :, None])).squeeze(-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("expected vectors to meet the states with, got none")
    return x
