"""The k largest paths from a source to a target: exact best-first search under an energy bound.

A path starts at a source (a token's embedding, a position's, a constant), passes through heads and
MLPs, at most one in each step x → x + Σ nodes(x) of the residual stream, and ends at the target.
Expanding every step's "either straight on or through one node" writes the target as the sum over
all paths, of which there are too many to look at, and whose products of norms prune nothing. So:

1. A partial path is grown from the target backwards; it is a covector v at a residual site.
2. Forwards, once: C = Σ s sᵀ over the states s of all ways to get from any source to a site.
   It starts at Σ x xᵀ; a step adds F C Fᵀ for each of its nodes and c cᵀ for each constant it writes.
   C is kept per position p; see energies.py.
3. No completion of v contributes more than Σ_p √(v_pᵀ C_p v_p), since C_p has its own s_p s_pᵀ in it.
4. Always extend the partial path of the largest bound (a heap). When that bound does not exceed the
   k-th largest whole path any more, the k found are the k largest.

With ``by_position`` a path is a sequence of nodes at given positions: a state lives at one position,
a head's weights enter squared, and the bound √(vᵀ C_p v) is the exact energy.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ..checks import at_least_one, need
from ..graph import Node
from ..operator import Capture, Convention, FrozenTransformer
from ..sublayers import DENSE_LIMIT
from .path_bounds import NodeMap, StepParts, bounds_by_site
from .targets import Target

if TYPE_CHECKING:
    import pandas

FORMAT = "tensorlens_tl paths 1"


# --- Results -------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Path:
    """One path to the target and what it contributes: a signed summand, never a share of the target.

    Attributes:
        start: The source: "embed", "pos_embed" or a constant.
        pos: Its position among the real tokens; None for a constant summed over positions.
        nodes: The heads and MLPs passed, in the order of the run.
        positions: Where each node writes, if the paths were asked for by position.
        contribution: In units of the target.
        label: The source's name, for people.
    """

    start: Node
    pos: int | None
    nodes: tuple[Node, ...]
    positions: tuple[int, ...] | None
    contribution: float
    label: str

    @property
    def name(self) -> str:
        """The path without its number, such as ``"Mary"@3 → L2H1 → L3MLP → logits``."""
        names = [str(node) for node in self.nodes]
        if self.positions is not None:
            names = [f"{name}@{p}" for name, p in zip(names, self.positions, strict=True)]
        return " → ".join((self.label, *names, "logits"))

    def __repr__(self) -> str:
        return f"{self.name}  {self.contribution:+.4g}"


@dataclass(frozen=True, eq=False, repr=False)
class Paths(Sequence[Path]):
    """The largest paths to a target, largest |contribution| first.

    Signed paths cancel: the sum over *all* paths is the target, but no path, and no sum of a few,
    is a share of it.

    Attributes:
        paths: The paths; those that contribute exactly 0 are left out.
        target: The target's name.
        target_value: Its value in the model's own run.
        exact: Whether no other path is larger; False if the search was stopped by its budget.
        largest_unexplored: No path that is not listed contributes more than this, in absolute value.
        expansions: Partial paths that were extended.
        convention: The choices under which the operator is unique.
    """

    paths: tuple[Path, ...]
    target: str
    target_value: float
    exact: bool
    largest_unexplored: float
    expansions: int
    convention: Convention

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Path, ...]: ...
    def __getitem__(self, index: int | slice) -> Path | tuple[Path, ...]:
        return self.paths[index]

    def __repr__(self) -> str:
        found = f"the {len(self)} largest" if self.exact else f"{len(self)} found before the budget"
        head = (
            f"Paths to {self.target} = {self.target_value:.4g}: {found}, {self.expansions} "
            f"expansions, none left out above {self.largest_unexplored:.3g}"
        )
        return "\n".join((head, *(f"  {path.contribution:+9.4f}  {path.name}" for path in self)))

    def to_dataframe(self) -> pandas.DataFrame:
        """The paths as a table: path, start, pos, nodes, positions, contribution.

        Returns:
            One row per path.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        rows = [{"path": path.name, **_plain(path)} for path in self]
        columns = ["path", "start", "pos", "nodes", "positions", "contribution", "label"]
        return pandas.DataFrame(rows, columns=columns)

    def to_json(self) -> str:
        """The paths as JSON, with all that is needed to read them."""
        names = ("target", "target_value", "exact", "largest_unexplored", "expansions")
        data: dict[str, Any] = {"format": FORMAT} | {name: getattr(self, name) for name in names}
        data |= {"convention": asdict(self.convention), "paths": [_plain(path) for path in self]}
        return json.dumps(data, ensure_ascii=False)


def _plain(path: Path) -> dict[str, Any]:
    nodes = [str(node) for node in path.nodes]
    return {**vars(path), "start": str(path.start), "nodes": nodes}


# --- The search ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Partial:
    """A path from a site to the target: its nodes, where they write, and where it now reads.

    Its covector is pulled anew when it is its turn: a heap of covectors would fill the memory.
    """

    site: int
    pos: int | None = None
    ways: tuple[NodeMap, ...] = ()
    positions: tuple[int, ...] = ()

    def through(self, way: NodeMap | None) -> tuple[tuple[NodeMap, ...], tuple[int, ...]]:
        """Its nodes and their positions after taking one more, or going straight on."""
        if way is None:
            return self.ways, self.positions
        here = () if self.pos is None else (self.pos,)
        return (way, *self.ways), (*here, *self.positions)

    def covector(self, v: Tensor) -> Tensor:
        """The target's covector [1, pos, d] at the last site, pulled along the path."""
        read_at = (self.pos, *(self.positions or [None] * len(self.ways)))
        for way, at in zip(reversed(self.ways), reversed(read_at[:-1]), strict=True):
            v = way.map.apply_t(v)
            if at is not None:
                row = v[:, at]
                v = torch.zeros_like(v)
                v[:, at] = row
        return v


class _Best:
    """The k largest whole paths so far, and the largest thing that was let go."""

    def __init__(self, k: int):
        self.k, self.left_out, self.ticks = k, 0.0, count()
        self.heap: list[tuple[float, int, float, str, int | None, tuple]] = []

    @property
    def threshold(self) -> float:
        return self.heap[0][0] if len(self.heap) == self.k else 0.0

    def wanted(self, sizes: Tensor) -> list[list[int]]:
        """Where sizes (bounds, or contributions' absolute values) may still matter."""
        keep = sizes > self.threshold
        self.left_out = max(self.left_out, float(torch.where(keep, 0, sizes).max()))
        return keep.nonzero().tolist()

    def offer(self, value: float, name: str, pos: int | None, path: tuple) -> None:
        if abs(value) <= self.threshold:
            self.left_out = max(self.left_out, abs(value))
            return
        heapq.heappush(self.heap, (abs(value), -next(self.ticks), value, name, pos, path))
        if len(self.heap) > self.k:
            self.left_out = max(self.left_out, heapq.heappop(self.heap)[0])


def find_paths(
    capture: Capture,
    operator: FrozenTransformer,
    target: Target,
    k: int = 10,
    from_token: int | None = None,
    by_position: bool = False,
    constants: bool = True,
    max_expansions: int = 10_000,
    memory_limit: int = DENSE_LIMIT,
) -> Paths:
    """The k paths of the largest |contribution| from a source to a target, found exactly.

    Formula: a path's contribution is u · F_m … F_1 s, with s the source's vector, F_i the frozen
    linear map of its i-th node (norms included) and u the target's covector pulled through the
    final norm. Over all paths from all sources these sum to the target.

    Sources are every token's embedding, every position's embedding and every constant (b_V, ln1.b
    and the like start at the node that holds them, b_O and the like in the residual stream).

    Args:
        capture: The run, of one prompt.
        operator: Its operator.
        target: From :func:`resolve_target`.
        k: How many.
        from_token: Only paths that start at this token's embedding (Python counting over the real
            tokens); None for all sources.
        by_position: Whether paths at different positions inside are apart, not summed.
        constants: Whether constants are sources, too.
        max_expansions: Partial paths to extend before the search gives up being exact.
        memory_limit: Bytes for the energies, (2 n_layers + 1) · pos · d_model² numbers; when they
            need more, low-rank upper bounds of them serve (the search is as exact, but longer).

    Returns:
        At most k paths; ``exact`` and ``largest_unexplored`` say what is known of the others.

    Raises:
        ValueError: If there are several prompts, no such token, k or max_expansions is less than 1,
            or the memory does not suffice.

    Source: best-first (A*) search with an admissible bound, Hart, Nilsson & Raphael (1968).
    """
    k, budget = at_least_one(k, "k"), at_least_one(max_expansions, "max_expansions")
    frame, ln_final = capture.frame, operator.map.maps[-1]
    if frame.batch != 1:
        raise ValueError(f"paths expects one prompt, got {frame.batch}: take one with lens[i]")
    sources = capture.embeddings
    if from_token is not None:
        only = int(frame.index(from_token))
        sources = {"embed": torch.zeros_like(capture.embed)}
        sources["embed"][:, only] = capture.embed[:, only]
        constants = False
    steps = [StepParts.of(step) for step in operator.steps]
    bounds_at = bounds_by_site(steps, sources, constants, by_position, memory_limit)
    best = _Best(k)

    u = frame.zeros(operator.out_dim)
    u[:, target.query] = target.covector
    at = int(target.query) if by_position else None
    if constants:
        if capture.unembed.weights.b_U is not None:
            best.offer(float(target.constant), "b_U", None, ((), ()))
        for name, constant in ln_final.constants().items():
            best.offer(float((u * constant).sum()), name, at, ((), ()))
    root = ln_final.apply_t(u)
    heap = [(-float(bounds_at[-1].bound(root).sum()), next(best.ticks), _Partial(len(steps), at))]

    expansions = 0
    while heap and -heap[0][0] > best.threshold and expansions < budget:
        partial = heapq.heappop(heap)[-1]
        expansions += 1
        site, stage, v = partial.site - 1, steps[partial.site - 1], partial.covector(root)
        if constants:
            written = [(None, stage.outside), *((way, way.constants) for way in stage.ways)]
            for way, by_name in written:
                for name, constant in by_name.items():
                    value = float((v * constant).sum())
                    best.offer(value, name, partial.pos, partial.through(way))
        ways = (None, *stage.ways)
        pulled = torch.cat([v, *(way.map.apply_t(v) for way in stage.ways)])
        if site == 0:  # what is left of these paths is their source
            for name, x in sources.items():
                values = (pulled * x).sum(-1)
                for i, pos in best.wanted(values.abs()):
                    best.offer(float(values[i, pos]), name, pos, partial.through(ways[i]))
            continue
        bounds = bounds_at[site].bound(pulled)
        bounds = bounds if by_position else bounds.sum(-1, keepdim=True)
        for i, pos in best.wanted(bounds):
            child = _Partial(site, pos if by_position else None, *partial.through(ways[i]))
            heapq.heappush(heap, (-float(bounds[i, pos]), next(best.ticks), child))

    left = max(best.left_out, -heap[0][0] if heap else 0.0)
    exact = not heap or -heap[0][0] <= best.threshold
    rows = sorted(best.heap, key=lambda row: (-row[0], -row[1]))
    return Paths(
        tuple(_path(capture, by_position, *row[2:]) for row in rows),
        target.name[0],
        float(target.value),
        exact,
        left,
        expansions,
        capture.convention,
    )


def _path(
    capture: Capture, by_position: bool, value: float, name: str, at: int | None, path: tuple
) -> Path:
    start, (ways, positions) = capture.frame.spans[0][0], path
    pos, label = (None, name) if at is None else (at - start, f"{name}@{at - start}")
    if name == "embed" and pos is not None:
        text = str(capture.prompts.strings[0][pos]).replace("\n", "\\n")
        label = f'"{text}"@{pos}'
    where = tuple(p - start for p in positions) if by_position else None
    return Path(Node.parse(name), pos, tuple(way.node for way in ways), where, value, label)
