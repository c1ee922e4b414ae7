"""What a sweep will cost, before it runs: operations, memory, seconds, and how it is cut.

Everything here is arithmetic on shapes. The formulas are those of ``contraction``, block by block and
stage by stage; only the rates at which this machine multiplies are measured (``rates``), by products of
the same shapes that take a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..checks import is_int
from .machine_rates import Cost, Rates, rates

BLOCK_ROWS, FOLDED_BLOCK_ROWS = 8, 32
"""Vectors that a block carries side by side, without and with folded maps."""

CAUSAL_TILE = 64
"""Positions of a pattern's tile: products skip what is above the diagonal, tile by tile."""

ROWS = 2048
"""Rows of one product with an MLP's matrices: enough to fill the units, few enough for the cache."""

HEAP, KEPT = 1.35, 2**24
"""Bytes that a process grows by for a byte of tensors, and the most that it keeps beside: an allocator
holds freed blocks that no later tensor fits; ``benchmarks/contraction.py`` compares plans with what it
takes."""

HALF_BYTES, HALF_SECONDS = 145 * 2**20, 0.1
"""What a CPU's bfloat16 products take beside, whatever their size: kernels compiled for every shape."""

SHARE = 0.5
"""Share of the free memory that heavy work may take unless told otherwise."""


def half_bytes(dtype: torch.dtype, device: torch.device) -> int:
    """:data:`HALF_BYTES` where they are taken, else 0."""
    return HALF_BYTES if dtype == torch.bfloat16 and device.type == "cpu" else 0


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def memory_budget(limit: int | None, device: torch.device) -> int:
    """The caller's limit in bytes, or a safe share of what is free.

    Returns:
        Bytes.

    Raises:
        ValueError: If the limit is no positive number.
    """
    if limit is None:
        return int(SHARE * free_memory(device))
    if not is_int(limit) or limit <= 0:
        raise ValueError(
            f"expected memory_limit as a positive whole number of bytes, got {limit!r}"
        )
    return int(limit)


@dataclass(frozen=True)
class BranchShape:
    """Widths of a branch in the direction of the sweep; no heads where positions stay apart.

    ``score`` is the width of the queries and keys from which the pattern is recomputed, tile by
    tile; 0 where it is stored.
    """

    width_in: int
    width_out: int
    heads: int = 0
    score: int = 0


StageShape = tuple[BranchShape, ...]
"""A step's branches; a norm has none."""


@dataclass(frozen=True)
class Block:
    """Vectors carried side by side: ``n`` start positions, positions up to ``end``."""

    first: int
    n: int
    end: int


def folds_below(width: int, d_model: int, carried: Sequence[int], folding: bool | None) -> int:
    """Below which causal coordinate an MLP is folded into one map per position.

    A map costs 2 m D² flops, a row 2 D² through it and 4 m D without: it pays from
    m D / (2 m − D) rows, 4 D / 7 where m = 4 D; a twentieth more, as small products run slower.

    Args:
        width: The MLP's width m.
        d_model: D.
        carried: How many rows stand at each coordinate; never increasing, or all alike.
        folding: True or False override the rule.

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
    """How many rows blocks of (end, rows) hold together at each coordinate."""
    ending = [0] * max(end for end, _ in blocks)
    for end, rows in blocks:
        ending[end - 1] += rows
    return list(accumulate(reversed(ending)))[::-1]


def fold_group(width: int, d_model: int) -> int:
    """How many positions' maps are made at once."""
    return max(1, ROWS * 512 // (d_model * width))


@dataclass(frozen=True)
class SweepShape:
    """One sweep's shape.

    Attributes:
        stages: In the order of the sweep.
        d_model: D.
        n_pos: Real tokens of the prompt.
        starts: Causal coordinates that vectors start from, ascending.
        many: Vectors per start.
        kept: Numbers that the result has per vector and position.
        itemsize: Bytes of a number.
        half: Whether the last attention is left halfway (``contraction``, point 5).
        causal: Whether no pattern looks ahead.
        folding: See :func:`folds_below`.
        beside: Bytes that are taken whatever the size.
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
        """Starts that go side by side, ``many`` vectors each."""
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
        """Cut the work: which vectors of each start, and which blocks, go together.

        Args:
            limit: Bytes that a chunk may take, the result included.

        Returns:
            Chunks, in order.

        Raises:
            ValueError: If not even one vector fits.
        """

        def worst(many: int) -> int:
            return max(self.peak([block], many) for block in self.blocks(many))

        many = self.many
        while many > 1 and worst(many) > limit:
            many = -(-many // 2)
        blocks = self.blocks(many)
        if (least := worst(many)) > limit:
            raise ValueError(
                f"memory_limit is {limit / 2**20:.1f} MiB, but the smallest chunk (one vector from "
                f"one position) with its result takes {least / 2**20:.1f} MiB: raise memory_limit, "
                "or ask for fewer positions"
            )
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
        """Bytes of the finished result."""
        return self.itemsize * len(self.starts) * self.many * self.n_pos * self.kept

    def peak(self, blocks: Sequence[Block], many: int) -> int:
        """Bytes in use at the worst moment of a chunk, the finished result included."""
        D, L = self.d_model, self.n_pos
        rows = sum(b.n for b in blocks) * many
        area = sum(b.n * b.end for b in blocks) * many
        worst = max(b.n * b.end for b in blocks) * many
        parts = rows * L * self.kept
        spread, most, met = True, 3 * rows * D, False
        for i, stage in enumerate(self.stages):
            mixes = any(b.heads for b in stage)
            for b in stage:
                weights = 2 * D * (b.width_in + b.width_out) if b.heads else 3 * D * b.width_in
                if not b.heads:
                    frozen = 2 * L * b.width_in
                    use = min(area if met else rows, max(ROWS, many)) * b.width_in
                    if self._folded(b, blocks, many, met):
                        use = max(use, min(L, fold_group(b.width_in, D)) * D * (b.width_in + D))
                elif spread:
                    n = max(block.n for block in blocks)
                    frozen = self._pattern(b, n)
                    use = 2 * b.heads * n * many * D + worst * D
                else:
                    frozen = self._pattern(b, CAUSAL_TILE)
                    use = worst * max(2 * b.width_in, b.width_in + 2 * b.width_out)
                    if self.half and i == len(self.stages) - 1:
                        use += area * b.width_out
                held = area * D if met or mixes else rows * D
                most = max(most, held + weights + frozen + use)
            met, spread = met or mixes, spread and not mixes
        tensors = self.itemsize * (most + rows * D + parts)
        heap = int(HEAP * tensors + min(tensors / 5, KEPT))
        return heap + self.beside + self.result_bytes

    def _pattern(self, b: BranchShape, tile: int) -> int:
        """Numbers: a stored pattern folded twice, or queries, keys and a tile made and copied."""
        if not b.score:
            return 2 * b.heads * self.n_pos**2
        return b.heads * self.n_pos * (2 * b.score + 2 * tile)

    def _folded(self, b: BranchShape, blocks: Sequence[Block], many: int, met: bool) -> int:
        together = carried_by([(x.end, x.n * many) for x in blocks])
        carried = together if met else [many] * sum(x.n for x in blocks)
        return folds_below(b.width_in, self.d_model, carried, self.folding)

    def cost(self, blocks: Sequence[Block], many: int) -> Cost:
        """What a chunk computes and moves."""
        D, cost, met = self.d_model, Cost(), False
        starts = sum(b.n for b in blocks)
        area = sum(b.n * b.end for b in blocks) * many
        for i, stage in enumerate(self.stages):
            mixes = any(b.heads for b in stage)
            if not stage:
                cost.moved += 4 * (area if met else starts * many) * D
            for b in stage:
                if not b.heads:
                    self._wise(cost, b, blocks, many, met)
                elif met:
                    for x in blocks:
                        rows = x.n * x.end * many
                        half = self.half and i == len(self.stages) - 1
                        cost.product += 2 * D * rows * (b.width_in + (0 if half else b.width_out))
                        width = max(b.width_in, b.width_out)
                        tiles = range(0, x.end, CAUSAL_TILE) if self.causal else (0,)
                        size = CAUSAL_TILE if self.causal else x.end
                        cells = sum((x.end - t) * min(size, x.end - t) for t in tiles)
                        cost.mixing += 2 * width * x.n * many * cells
                        if b.score:
                            cost.mixing += 2 * b.score * b.heads * cells
                            cost.moved += 2 * b.heads * cells
                        cost.moved += 3 * rows * (b.width_in + b.width_out) + 2 * rows * D
                        cost.calls += 12 + 2 * len(tiles)
                else:
                    for x in blocks:
                        n = x.n * many
                        cost.product += 2 * D * n * (b.width_in + b.width_out)
                        cost.mixing += 2 * x.end * b.heads * (n * D + x.n * b.score)
                        cost.moved += 4 * x.end * n * D
                        cost.calls += 12
            if mixes:
                met = True
        cost.moved += 3 * area * D
        cost.calls += 8 * len(blocks) + 30 * len(self.stages)
        return cost

    def _wise(
        self, cost: Cost, b: BranchShape, blocks: Sequence[Block], many: int, met: bool
    ) -> None:
        D, m = self.d_model, b.width_in
        below = self._folded(b, blocks, many, met)
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


@dataclass(frozen=True)
class Plan:
    """What a contraction will take.

    Attributes:
        what: What was asked for.
        flops: Floating-point operations.
        seconds: Predicted time on this machine, from rates measured just before.
        peak_bytes: Predicted memory beyond what is in use now, the result included.
        memory_limit: What it may take.
        chunks: Pieces that the work is cut into.
        notes: What else it will do.
    """

    what: str
    flops: float
    seconds: float
    peak_bytes: int
    memory_limit: int
    chunks: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        time_ = f"{self.seconds:.2g} s" if self.seconds < 120 else f"{self.seconds / 60:.1f} min"
        text = (
            f"Plan({self.what}: about {time_}, {self.flops / 1e9:.3g} Gflop, "
            f"{self.peak_bytes / 2**20:.0f} MiB of {self.memory_limit / 2**20:.0f} MiB, "
            f"{self.chunks} chunk{'s' if self.chunks > 1 else ''}"
        )
        return text + "".join(f"; {note}" for note in self.notes) + ")"


def rates_of(stages: Sequence[StageShape], d_model: int, n_pos: int, rows: int,
             dtype: torch.dtype, device: torch.device) -> Rates:  # fmt: skip
    """This machine's rates for products of the widest stage's shapes; see :func:`rates`."""
    branches = [b for stage in stages for b in stage]
    width = max((b.width_in for b in branches if not b.heads), default=d_model)
    heads = max((b.heads for b in branches), default=0) or 1
    d_head = max((b.width_in for b in branches if b.heads), default=d_model) // heads
    return rates(d_model, width, heads, max(1, d_head), n_pos, rows, CAUSAL_TILE, dtype, device,
                 torch.get_num_threads())  # fmt: skip


def make_plan(what: str, jobs: Sequence[SweepShape], limit: int, dtype: torch.dtype,
              device: torch.device, notes: Sequence[str] = ()) -> Plan:  # fmt: skip
    """Add up several sweeps, run one after another.

    Args:
        what: For people.
        jobs: Their shapes.
        limit: Bytes.
        dtype: Of the vectors.
        device: Where.
        notes: Kept.

    Returns:
        The plan; nothing has run but the calibration.
    """
    flops, seconds, peak, count, held = 0.0, 0.0, 0, 0, 0
    folded = 0
    for job in jobs:
        chunks = job.chunks(limit - held)
        wise = [b for s in job.stages for b in s if not b.heads]
        rows = max(b.n for _, blocks in chunks for b in blocks) * (chunks[0][0].stop)
        measured = rates_of(job.stages, job.d_model, job.n_pos, rows, dtype, device)
        for part, blocks in chunks:
            many = part.stop - part.start
            cost = job.cost(blocks, many)
            flops, seconds, count = flops + cost.flops, seconds + measured.seconds(cost), count + 1
            peak = max(peak, held + job.peak(blocks, many))
            folded = (
                max(folded, *(job._folded(b, blocks, many, True) for b in wise), 0) if wise else 0
            )
        held += job.result_bytes
        seconds += HALF_SECONDS if job.beside else 0.0
    if folded:
        notes = (*notes, f"MLPs folded into one map at {folded} positions")
    return Plan(what, flops, seconds, peak, limit, count, tuple(notes))
