"""Sweeps from a target down to the sources, with many partial paths at once.

A partial path is a covector v at a site, and the nodes passed. In every step it goes straight on or
through one node; which of these ways are taken is told by one of two:

    Beam     those that read most of the state below
    Bounded  those whose bound is above the k-th largest path found so far
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import progress_bar
from ..operator import FrozenTransformer
from .bounds import NodeMap, PathBound, StepBound, StepParts

ROWS = 256
"""Partial paths that go through a node at once; more would need much memory inside an MLP."""

SHARES = 12
"""Into how many parts the budget is cut, at most; the next step has one of them."""

Key = tuple[str, int | None, tuple[NodeMap, ...], tuple[int, ...]]
"""A path: name and position of its source, the nodes passed, and where each of them writes."""


class Best:
    """The k largest whole paths so far, and the largest size that was let go."""

    def __init__(self, k: int):
        self.k, self.left_out, self.ticks = k, 0.0, count()
        self.heap: list[tuple[float, int, float, Key]] = []
        self.there: set[Key] = set()

    @property
    def threshold(self) -> float:
        return self.heap[0][0] if len(self.heap) == self.k else 0.0  # all enter until there are k

    def offer(self, value: float, key: Key) -> None:
        """Take in a whole path, if it is among the k largest so far and not there yet."""
        if key in self.there:
            return
        if abs(value) <= self.threshold:
            self.left_out = max(self.left_out, abs(value))
            return
        # The tick decides between equal sizes: the earlier path stays.
        heapq.heappush(self.heap, (abs(value), -next(self.ticks), value, key))
        self.there.add(key)
        if len(self.heap) > self.k:
            size, _, _, gone = heapq.heappop(self.heap)
            self.there.discard(gone)
            self.left_out = max(self.left_out, size)

    def offer_all(self, values: Tensor, key: Callable[..., Key]) -> None:
        """Offer those of many values that may be among the k largest."""
        large = values.abs() > self.threshold
        self.left_out = max(self.left_out, float(values.abs().masked_fill(large, 0).max()))
        for at in large.nonzero().tolist():
            self.offer(float(values[tuple(at)]), key(*at))


@dataclass(frozen=True, eq=False)
class Partials:
    """Some partial paths at one site.

    Attributes:
        v: Covector of each.
        passed: The nodes that each passes.
        positions: Where each of these writes, if positions are apart.
        at: The one position at which each reads, if positions are apart, or None.
    """

    v: Float[Tensor, "partial pos d_model"]
    passed: list[tuple[NodeMap, ...]]
    positions: list[tuple[int, ...]]
    at: list[int | None]

    def through(self, i: int, node: NodeMap | None) -> tuple[tuple[NodeMap, ...], tuple[int, ...]]:
        """Nodes and positions of a partial path after one more node, or straight on (None)."""
        if node is None:
            return self.passed[i], self.positions[i]
        at = self.at[i]
        here = () if at is None else (at,)
        return (node, *self.passed[i]), (*here, *self.positions[i])


Ways = tuple[Int[Tensor, " child"], Int[Tensor, " child"], Int[Tensor, " child"]]
"""Way (0 is straight on), partial path, and position (0 where they are summed)."""


@runtime_checkable
class Chooser(Protocol):
    """Which ways a sweep takes."""

    def choose(self, i: int, above: Tensor, v: Tensor) -> Ways:
        """Choose ways below a step.

        Args:
            i: Index of the step.
            above: Covectors above the step's own norm [partial, pos, d_model].
            v: The same below that norm.

        Returns:
            The ways taken.
        """
        ...


@dataclass(frozen=True, eq=False)
class PathSweep:
    """What all sweeps of one question share.

    Attributes:
        steps: The steps of the residual stream, from below.
        sources: The vectors that paths start with, by name [1, pos, d_model].
        constants: Whether constants are sources, too.
        by_position: Whether positions inside are apart.
        best: Takes whole paths.
    """

    steps: Sequence[StepParts]
    sources: Mapping[str, Tensor]
    constants: bool
    by_position: bool
    best: Best

    def run(self, partials: Partials, chooser: Chooser) -> None:
        """Go down from partial paths above the last step, as a chooser says."""
        for i in reversed(range(len(self.steps))):
            step, above = self.steps[i], partials.v
            v = above if step.norm is None else step.norm.apply_t(above[:, None])[:, 0]
            if self.constants:  # a path may start at any constant of this step
                own = {} if step.norm is None else step.norm.constants()
                self._start(partials, above, own, None)
                self._start(partials, v, step.outside, None)
                for node in step.node_maps:
                    self._start(partials, v, node.constants, node)
            if i == 0:  # what is left of these paths is their source
                self._end(partials, v)
                return
            ways = chooser.choose(i, above, v)
            if not len(ways[0]):
                return
            partials = self._below(partials, v, step, *ways)

    def _start(
        self, partials: Partials, v: Tensor, constants: Mapping[str, Tensor], node: NodeMap | None
    ) -> None:
        for name, constant in constants.items():
            values = (v * constant).sum((1, 2))
            self.best.offer_all(
                values, lambda i, name=name: (name, partials.at[i], *partials.through(i, node))
            )

    def _end(self, partials: Partials, v: Tensor) -> None:
        for node in (None, *self.steps[0].node_maps):
            pulled = _pulled(v, node)
            for name, x in self.sources.items():
                self.best.offer_all(
                    (pulled * x).sum(-1),
                    lambda i, pos, name=name, node=node: (name, pos, *partials.through(i, node)),
                )

    def _below(
        self, partials: Partials, v: Tensor, step: StepParts, way: Tensor, row: Tensor, pos: Tensor
    ) -> Partials:
        """The partial paths below a step."""
        nodes, parts = (None, *step.node_maps), []
        for w in way.unique(sorted=True).tolist():
            parts.append(_pulled(v[row[way == w]], nodes[w]))
        made = torch.cat(parts)
        at: list[int | None] = [None] * len(made)
        if self.by_position:
            at = [*pos.tolist()]
            # A child reads one position; the other positions of its parent are children of their
            # own.
            here = torch.arange(made.shape[1], device=made.device) == pos[:, None]
            made = made * here[..., None]
        pairs = zip(row.tolist(), way.tolist(), strict=True)
        through = [partials.through(i, nodes[w]) for i, w in pairs]
        return Partials(made, [p for p, _ in through], [p for _, p in through], at)


def _pulled(v: Float[Tensor, "many pos d_model"], node: NodeMap | None) -> Tensor:
    if node is None:
        return v
    return torch.cat([node.map.apply_t(some[:, None])[:, 0] for some in v.split(ROWS)])


def _largest(sizes: Float[Tensor, "way partial pos"], n: int) -> Ways:
    """The n largest, way by way."""
    at = sizes.flatten().topk(min(n, sizes.numel())).indices.sort().values
    found = torch.unravel_index(at, sizes.shape)
    return found[0], found[1], found[2]


class Beam:
    """Takes the ways that read most of the state below: the sum over all their completions."""

    def __init__(self, sweep: PathSweep, operator: FrozenTransformer, width: int):
        self.sweep, self.width = sweep, width
        x = torch.stack([*sweep.sources.values()]).sum(0)
        self.states = [x]
        for step in operator.steps:
            x = step.map.apply(x)
            x = x + step.map.bias if sweep.constants else x  # sums all ways
            self.states.append(x)

    def choose(self, i: int, above: Tensor, v: Tensor) -> Ways:
        x, nodes = self.states[i], self.sweep.steps[i].node_maps
        if self.sweep.by_position:
            sizes = [(_pulled(v, node) * x).sum(-1) for node in (None, *nodes)]
        else:  # what every node makes of the state
            made = (x, *(node.map.apply(x) for node in nodes))
            sizes = [(v * one).sum((1, 2))[:, None] for one in made]
        return _largest(torch.stack(sizes).abs(), self.width)


class Bounded:
    """Takes all ways whose bound is above the k-th largest path, as far as a budget goes.

    Attributes:
        cut: The largest bound of a way that the budget cut off.
        left_out: The largest bound of a way that was not taken for its bound.
        expansions: How many partial paths were extended.
    """

    def __init__(
        self,
        sweep: PathSweep,
        bounds: Sequence[StepBound],
        top: PathBound,
        budget: int,
        memory_limit: int,
        progress: bool,
    ):
        self.sweep, self.bounds, self.top = sweep, bounds, top
        self.budget, self.memory, self.progress = budget, memory_limit, progress
        self.cut = self.left_out = 0.0
        self.expansions = 0
        self.e: Tensor | None = None

    def run(self, start: Partials) -> None:
        """Search from the empty path."""
        self.e, self.expansions = self.top.energies(start.v), 1
        self.bar = progress_bar("steps of paths", len(self.bounds), self.progress)
        self.sweep.run(start, self)
        self.bar.close()

    def choose(self, i: int, above: Tensor, v: Tensor) -> Ways:
        self.bar.update()
        bound, apart = self.bounds[i], self.sweep.by_position
        e = torch.stack(bound.ways(v, bound.past_norm(above, cast(Tensor, self.e))))
        # |Σ_p v_p · s_p| ≤ Σ_p √(v_pᵀ C_p v_p): positions add where paths sum over them.
        sizes = e.sqrt() if apart else e.sqrt().sum(-1, keepdim=True)
        keep = sizes > self.sweep.best.threshold
        self.left_out = max(self.left_out, float(sizes.masked_fill(keep, 0).max()))
        # Below are i more steps. The widest may take a good part of the budget that is left.
        n, left = int(keep.sum()), self.budget - self.expansions
        most = left if left < i else left // min(i, SHARES)
        most = min(most, max(1, self.memory // (3 * v[0].numel() * v.element_size())))
        ways = _largest(sizes.masked_fill(~keep, -1), min(n, most))
        if n > most:
            taken = torch.zeros_like(keep)
            taken[ways] = True
            self.cut = max(self.cut, float(sizes.masked_fill(taken | ~keep, 0).max()))
        way, row, pos = ways
        self.expansions += len(way)
        self.e = e[way, row]
        if apart:
            self.e = self.e * (torch.arange(e.shape[-1], device=e.device) == pos[:, None])
        return ways
