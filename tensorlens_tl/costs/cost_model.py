"""Predict what a sweep costs (operations, memory, seconds), and cut it so that it fits the memory.

Everything here is arithmetic on shapes. The formulas are those of ``batched_sweep``, block by block
and stage by stage. Only the rates at which this machine multiplies are measured, in
``machine_rates``, by products of the same shapes that take a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..checks import is_int
from .cost_plan import Plan
from .machine_rates import Cost, ProductShape, Rates, rates

BLOCK_ROWS, FOLDED_BLOCK_ROWS = 8, 32
"""Number of vectors that a block carries side by side, without and with folded maps."""

CAUSAL_TILE = 64
"""Positions in a tile of a pattern. Products skip the tiles above the diagonal."""

ROWS = 2048
"""Rows of one product with an MLP's matrices: enough to keep all units busy, few enough for the
cache."""

HEAP, KEPT = 1.35, 2**24
"""An allocator holds freed blocks that no later tensor fits. HEAP is how many bytes a process grows
by for a byte of tensors, KEPT the most that stays besides. ``benchmarks/contraction.py`` compares
plans with the memory that is taken."""

HALF_BYTES, HALF_SECONDS = 145 * 2**20, 0.1
"""Memory in bytes, and time in seconds, that bfloat16 products take on a CPU whatever their size:
kernels are compiled for every shape."""

SHARE = 0.5
"""Fraction of the free memory that a sweep may take where no limit is given."""


def half_bytes(dtype: torch.dtype, device: torch.device) -> int:
    """:data:`HALF_BYTES` where they are taken, else 0."""
    return HALF_BYTES if dtype == torch.bfloat16 and device.type == "cpu" else 0


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def memory_budget(limit: int | None, device: torch.device) -> int:
    """The memory that a call may take.

    Args:
        limit: The caller's ``memory_limit`` in bytes, or None for half of the free memory.
        device: The device that the sweep runs on.

    Returns:
        Most memory in bytes.

    Raises:
        ValueError: If the limit is not a positive integer.
    """
    if limit is None:
        return int(SHARE * free_memory(device))
    if not is_int(limit) or limit <= 0:
        raise ValueError(
            f"memory_limit={limit!r} is not a positive whole number of bytes. "
            "Pass one, or None for half of the free memory."
        )
    return int(limit)


@dataclass(frozen=True)
class BranchShape:
    """The widths of a branch, in the direction of the sweep.

    Attributes:
        width_in: Width of what its first matrix gives.
        width_out: Width of what its second matrix reads.
        heads: Number of query heads, or 0 where positions stay apart (an MLP).
        score: Width of the queries and keys from which a pattern is recomputed, or 0 where the
            pattern is stored.
    """

    width_in: int
    width_out: int
    heads: int = 0
    score: int = 0


StageShape = tuple[BranchShape, ...]
"""The branches of a step. A norm has none."""


@dataclass(frozen=True)
class Block:
    """Vectors that are carried side by side, because they start at neighbouring positions.

    Attributes:
        first: Index of the first start position.
        n: Number of start positions.
        end: Number of positions that the block's state has.
    """

    first: int
    n: int
    end: int


def folds_below(width: int, d_model: int, carried: Sequence[int], folding: bool | None) -> int:
    """The causal coordinate below which an MLP is folded into one map per position.

    A map costs 2 m D² flops. A row costs 2 D² through the map and 4 m D without it. So a map pays
    from m D / (2 m − D) rows on, which is 4 D / 7 where m = 4 D. The rule asks for a twentieth
    more, as small products run slower.

    Args:
        width: Width m of the MLP.
        d_model: Width D of the residual.
        carried: Number of rows at each coordinate, never increasing or all equal.
        folding: True or False to override the rule.

    Returns:
        The number of leading coordinates with folded maps.
    """
    if folding is not None:
        return len(carried) if folding else 0
    if 2 * width <= d_model:
        return 0
    enough = 1.05 * width * d_model / (2 * width - d_model)
    return sum(rows >= enough for rows in carried)


def carried_by(blocks: Sequence[tuple[int, int]]) -> list[int]:
    """Number of rows at each coordinate, of blocks (end, rows) together."""
    ending = [0] * max(end for end, _ in blocks)
    for end, rows in blocks:
        ending[end - 1] += rows
    return list(accumulate(reversed(ending)))[::-1]


def fold_group(width: int, d_model: int) -> int:
    """Number of positions whose folded maps are made at once."""
    return max(1, ROWS * 512 // (d_model * width))


@dataclass(frozen=True)
class SweepShape:
    """The numbers that the cost of a sweep depends on.

    Attributes:
        stages: Branch widths of every stage, in the order of the sweep.
        d_model: Width D of the residual.
        n_pos: Number of real tokens of the prompt.
        starts: Causal coordinates that vectors start from, ascending.
        many: Number of vectors per start.
        kept: How many numbers the result has per vector and position.
        itemsize: Size of one number in bytes.
        half: Whether the last attention leaves out its second matrix (step 5 of
            ``batched_sweep``).
        causal: Whether no pattern looks ahead.
        folding: True or False to override :func:`folds_below`.
        beside: Memory in bytes that is taken whatever the size.
    """

    stages: tuple[StageShape, ...]
    d_model: int
    n_pos: int
    starts: tuple[int, ...]
    many: int
    kept: int = 1
    itemsize: int = 4
    half: bool = False
    causal: bool = True
    folding: bool | None = None
    beside: int = 0

    def blocks(self, many: int) -> list[Block]:
        """Cut the starts into blocks that are carried side by side, ``many`` vectors each."""
        width = max((b.width_in for s in self.stages for b in s if not b.heads), default=0)
        average = [many * (len(self.starts) + 1) // 2]
        folded = bool(width and folds_below(width, self.d_model, average, self.folding))
        n = max(1, (FOLDED_BLOCK_ROWS if folded else BLOCK_ROWS) // many)
        found = []
        for first in range(0, len(self.starts), n):
            last = min(first + n, len(self.starts)) - 1
            end = self.starts[last] + 1 if self.causal else self.n_pos
            found.append(Block(first, last + 1 - first, end))
        return found

    def chunks(self, limit: int) -> list[tuple[slice, list[Block]]]:
        """Cut the work into chunks that fit the memory.

        Args:
            limit: Most memory of a chunk in bytes, the result included.

        Returns:
            The chunks in order: a slice of the vectors of each start, and the blocks that are
            carried together.

        Raises:
            ValueError: If not even one vector from one position fits.
        """

        def worst(many: int) -> int:
            return max(self.peak([block], many) for block in self.blocks(many))

        # 1. As many vectors of each start as fit into one block.
        many = self.many
        while many > 1 and worst(many) > limit:
            many = -(-many // 2)
        blocks = self.blocks(many)
        if (least := worst(many)) > limit:
            raise ValueError(
                f"memory_limit is {limit / 2**20:.1f} MiB, but the smallest chunk (one vector from "
                f"one position) and the result take {least / 2**20:.1f} MiB. Raise memory_limit, "
                "or ask for fewer positions."
            )
        # 2. As many blocks together as fit: they share folded maps and large products.
        groups: list[list[Block]] = []
        for block in blocks:
            if groups and self.peak([*groups[-1], block], many) <= limit:
                groups[-1].append(block)
            else:
                groups.append([block])
        parts = [slice(i, min(i + many, self.many)) for i in range(0, self.many, many)]
        return [(part, group) for part in parts for group in groups]

    @property
    def result_bytes(self) -> int:
        """Size of the finished result in bytes."""
        return self.itemsize * len(self.starts) * self.many * self.n_pos * self.kept

    def peak(self, blocks: Sequence[Block], many: int) -> int:
        """Most memory in bytes that a chunk uses at any moment, the finished result included."""
        D, L = self.d_model, self.n_pos
        rows = sum(b.n for b in blocks) * many
        area = sum(b.n * b.end for b in blocks) * many
        worst = max(b.n * b.end for b in blocks) * many
        parts = rows * L * self.kept
        # Numbers (not bytes) at the worst stage: the state, folded weights, frozen quantities and
        # what the products need. Before the first attention (met) the state is one row a vector.
        spread, most, met = True, 3 * rows * D, False
        for i, stage in enumerate(self.stages):
            mixes = any(b.heads for b in stage)
            for b in stage:
                weights = 2 * D * (b.width_in + b.width_out) if b.heads else 3 * D * b.width_in
                if not b.heads:  # an MLP: ratios, hidden rows, or a group of folded maps
                    frozen = 2 * L * b.width_in
                    use = min(area if met else rows, max(ROWS, many)) * b.width_in
                    if self.folded(b, blocks, many, met):
                        use = max(use, min(L, fold_group(b.width_in, D)) * D * (b.width_in + D))
                elif spread:  # the first attention: one row per head, spread over positions
                    n = max(block.n for block in blocks)
                    frozen = self._pattern(b, n)
                    use = 2 * b.heads * n * many * D + worst * D
                else:  # later attention: hidden rows before and after the pattern
                    frozen = self._pattern(b, CAUSAL_TILE)
                    use = worst * max(2 * b.width_in, b.width_in + 2 * b.width_out)
                    if self.half and i == len(self.stages) - 1:
                        use += area * b.width_out
                held = area * D if met or mixes else rows * D
                most = max(most, held + weights + frozen + use)
            met, spread = met or mixes, spread and not mixes
        tensors = self.itemsize * (most + rows * D + parts)
        # An allocator keeps more than what is in use.
        heap = int(HEAP * tensors + min(tensors / 5, KEPT))
        return heap + self.beside + self.result_bytes

    def _pattern(self, b: BranchShape, tile: int) -> int:
        """Numbers of a stored pattern, folded twice; or of queries, keys, a tile and its copy."""
        if not b.score:
            return 2 * b.heads * self.n_pos**2
        return b.heads * self.n_pos * (2 * b.score + 2 * tile)

    def folded(self, b: BranchShape, blocks: Sequence[Block], many: int, met: bool) -> int:
        """Number of positions at which an MLP is folded; ``met`` if attention came before."""
        together = carried_by([(x.end, x.n * many) for x in blocks])
        carried = together if met else [many] * sum(x.n for x in blocks)
        return folds_below(b.width_in, self.d_model, carried, self.folding)

    def cost(self, blocks: Sequence[Block], many: int) -> Cost:
        """The operations of a chunk, and the numbers that it moves."""
        D, cost, met = self.d_model, Cost(), False
        starts = sum(b.n for b in blocks)
        area = sum(b.n * b.end for b in blocks) * many
        for i, stage in enumerate(self.stages):
            mixes = any(b.heads for b in stage)
            cost.moved += D * sum(b.width_in + b.width_out for b in stage)  # the weights
            if not stage:  # a norm reads and writes the state
                cost.moved += 4 * (area if met else starts * many) * D
            for b in stage:
                if not b.heads:
                    self._count_mlp(cost, b, blocks, many, met)
                elif met:  # two products, and the pattern tile by tile
                    for x in blocks:
                        rows = x.n * x.end * many
                        half = self.half and i == len(self.stages) - 1
                        cost.product += 2 * D * rows * (b.width_in + (0 if half else b.width_out))
                        width = max(b.width_in, b.width_out)
                        tiles = range(0, x.end, CAUSAL_TILE) if self.causal else (0,)
                        size = CAUSAL_TILE if self.causal else x.end
                        cells = sum((x.end - t) * min(size, x.end - t) for t in tiles)
                        cost.mixing += 2 * width * x.n * many * cells
                        if b.score:  # tiles are recomputed from queries and keys
                            cost.mixing += 2 * b.score * b.heads * cells
                            cost.moved += 2 * b.heads * cells
                        cost.moved += 3 * rows * (b.width_in + b.width_out) + 2 * rows * D
                        cost.calls += 12 + 2 * len(tiles)
                else:  # the first attention spreads rows
                    for x in blocks:
                        n = x.n * many
                        cost.product += 2 * D * n * (b.width_in + b.width_out)
                        cost.mixing += 2 * x.end * b.heads * (n * D + x.n * b.score)
                        cost.moved += 4 * x.end * n * D
                        cost.calls += 12
            if mixes:
                met = True
        cost.moved += 3 * area * D
        # What is planned, started and named besides takes as long as some hundred calls.
        cost.calls += 400 + 8 * len(blocks) + 40 * len(self.stages)
        return cost

    def _count_mlp(
        self, cost: Cost, b: BranchShape, blocks: Sequence[Block], many: int, met: bool
    ) -> None:
        """Add an MLP's cost: maps made and used below a coordinate, two products above it."""
        D, m = self.d_model, b.width_in
        below = self.folded(b, blocks, many, met)
        ends = [(x.end, x.n * many) for x in blocks] if met else [(sum(x.n for x in blocks), many)]
        cost.making += 2 * m * D * D * below
        cost.moved += 2 * D * (m + D) * below
        group = fold_group(m, D)
        for end, rows in ends:
            inside, outside = min(end, below) * rows, max(0, end - below) * rows
            cost.folded += 2 * D * D * inside
            cost.product += 4 * m * D * outside
            cost.moved += 2 * inside * D + 2 * outside * (m + D)
            cost.calls += 3 * -(-min(end, below) // group) + 6 * -(-outside // ROWS)


# --- The plan ------------------------------------------------------------------------------------


def rates_of(
    stages: Sequence[StageShape],
    d_model: int,
    n_pos: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Rates:
    """This machine's rates for products as large as the widest stage's; see :func:`rates`."""
    branches = [b for stage in stages for b in stage]
    width = max((b.width_in for b in branches if not b.heads), default=d_model)
    heads = max((b.heads for b in branches), default=0) or 1
    d_head = max((b.width_in for b in branches if b.heads), default=d_model) // heads
    shape = ProductShape(d_model, width, heads, max(1, d_head), n_pos, rows, CAUSAL_TILE)
    return rates(shape, dtype, device)


def make_plan(
    what: str,
    shapes: Sequence[SweepShape],
    limit: int,
    dtype: torch.dtype,
    device: torch.device,
    notes: Sequence[str] = (),
) -> Plan:
    """Predict the cost of several sweeps that run one after another.

    Args:
        what: Name of what is planned, for display.
        shapes: The shapes of the sweeps.
        limit: Most memory in bytes.
        dtype: Dtype of the vectors.
        device: Device that the sweeps run on.
        notes: Sentences to show with the plan.

    Returns:
        The plan. Nothing has run but products that measure the machine.
    """
    flops, seconds, peak, count, held, folded = 0.0, 0.0, 0, 0, 0, 0
    for shape in shapes:
        chunks = shape.chunks(limit - held)
        mlps = [b for stage in shape.stages for b in stage if not b.heads]
        rows = max(b.n for _, blocks in chunks for b in blocks) * chunks[0][0].stop
        measured = rates_of(shape.stages, shape.d_model, shape.n_pos, rows, dtype, device)
        for part, blocks in chunks:
            many = part.stop - part.start
            cost = shape.cost(blocks, many)
            flops, seconds, count = flops + cost.flops, seconds + measured.seconds(cost), count + 1
            peak = max(peak, held + shape.peak(blocks, many))
            folded = max([folded, *(shape.folded(b, blocks, many, True) for b in mlps)])
        held += shape.result_bytes  # the results of earlier sweeps stay in memory
        seconds += HALF_SECONDS if shape.beside else 0.0
    if folded:
        notes = (*notes, f"MLPs folded into one map at {folded} positions")
    return Plan(what, flops, seconds, peak, limit, count, tuple(notes))
