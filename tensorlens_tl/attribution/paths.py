"""The k largest paths from a source to a target: exact best-first search under a bound.

A path starts at a source: a token's embedding, a position's embedding, or a constant. It passes
heads and MLPs, at most one in each step x → x + Σ nodes(x) of the residual stream, and ends at the
target. The target is the sum over all paths. There are too many to look at, and products of norms
prune nothing, so the search needs a better bound:

1. Build the bounds, once, from below: C = Σ s sᵀ over the states s of all ways from any source to a
   site, per position p. See path_bounds.py.
2. Grow partial paths from the target backwards. A partial path is a covector v at a site.
3. No completion of v contributes more than Σ_p √(v_pᵀ C_p v_p), since C_p holds its own s_p s_pᵀ.
   Always extend the partial path with the largest bound; a heap keeps them in order.
4. Stop when that bound does not exceed the k-th largest whole path. The k found are the k largest.

With ``by_position`` a path is a sequence of nodes at given positions. A state then lives at one
position, the weights of a head enter squared, and vᵀ C_p v is exactly Σ (v · s_p)² over the ways.
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

from ..checks import at_least_one, is_int, need, place_label, progress_bar
from ..graph import CONTENTS, Node
from ..maps import DENSE_LIMIT
from ..operator import Capture, Convention, FrozenTransformer
from ..pictures import Page, Paged, flow_view, path_rows, unit_of
from .html import UNIT
from .path_bounds import NodeMap, StepParts, bounds_by_site
from .targets import Target

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl paths 1"


# --- Results -------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Path:
    """One path to the target, and what it contributes: a signed summand, never a share.

    Attributes:
        start: The source: one of the embeddings, such as "embed", or a constant.
        pos: The source's position among the real tokens; None for a constant summed over positions.
        nodes: The heads and MLPs that the path passes, in the order of the run.
        positions: The position at which each node writes, among the real tokens; None where
            positions inside are summed.
        contribution: The summand, in units of the target, usually logits.
        label: What people call the source, such as ``"Mary"@3``.
    """

    start: Node
    pos: int | None
    nodes: tuple[Node, ...]
    positions: tuple[int, ...] | None
    contribution: float
    label: str

    @property
    def name(self) -> str:
        """The path in words, without its number, such as ``"Mary"@3 → L2H1 → L3MLP → logits``."""
        return " → ".join((self.label, *self.stops, "logits"))

    @property
    def stops(self) -> tuple[str, ...]:
        """The names of the nodes passed, with positions where these are apart."""
        at = self.positions or [None] * len(self.nodes)
        pairs = zip(self.nodes, at, strict=True)
        return tuple(str(node) if p is None else f"{node}@{p}" for node, p in pairs)

    def __repr__(self) -> str:
        return f"{self.name}  {self.contribution:+.4g}"


@dataclass(frozen=True, eq=False, repr=False)
class Paths(Paged, Sequence[Path]):
    """The largest paths to a target, largest |contribution| first.

    Signed paths cancel. The sum over *all* paths is the target, but no path, and no sum of a few,
    is a share of the target.

    Attributes:
        paths: The paths found. Those that contribute exactly 0 are left out.
        target: The name of the target.
        target_value: The target in the model's own run, in logits.
        exact: Whether no other path is larger; False if the search stopped at its budget.
        largest_unexplored: No path that is not listed contributes more than this in absolute value.
        expansions: How many partial paths were extended.
        convention: The choices under which the operator is unique.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> paths = lens.paths("Paris", k=3)
        >>> paths[0].name, round(paths[0].contribution, 1)
        ('"France"@4 → L0MLP → L1H0 → L3MLP → logits', 2.3)
        >>> paths.exact
        True
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
        n = len(self)
        if is_int(index) and not -n <= index < n:  # loops end by it
            raise IndexError(f"There is no path {index}. The number of paths is {n}.")
        if not is_int(index) and not isinstance(index, slice):
            raise ValueError(
                f"paths[{index!r}] does not exist, as the index is a path's number or a slice. "
                "Pass an integer, or look for names in .to_dataframe()."
            )
        return self.paths[index]

    def __repr__(self) -> str:
        found = f"the {len(self)} largest" if self.exact else f"{len(self)} found before the budget"
        head = (
            f"Paths to {self.target} = {self.target_value:.4g}: {found}, {self.expansions} "
            f"expansions, none left out above {self.largest_unexplored:.3g}"
        )
        head = ", ".join(filter(None, (head, self.convention.in_front)))
        return "\n".join((head, *(f"  {path.contribution:+9.4f}  {path.name}" for path in self)))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each path as a row of its nodes with matplotlib, largest first.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. A line is as thick as √|contribution|, red above 0 and blue below.

        Raises:
            ValueError: If matplotlib is missing.
        """
        rows = [(p.label, list(zip(p.nodes, p.stops, strict=True)), p.contribution) for p in self]
        title = f"largest paths to {self.target} = {self.target_value:.4g}"
        return path_rows(ax, rows, title=title, unit=unit_of(self.target))

    def _page(self) -> Page:
        rows = [
            ((p.label, p.start), list(zip(p.stops, p.nodes, strict=True)), p.contribution)
            for p in self
        ]
        head, *listed = repr(self).splitlines()
        return Page(head, [flow_view(rows, unit_of(self.target))], listed)

    def to_dataframe(self) -> pandas.DataFrame:
        """The paths as a pandas table.

        Returns:
            One row per path, with columns path, start, pos, nodes, positions, contribution, label.

        Raises:
            ValueError: If pandas is not installed.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        rows = [{"path": path.name, **_plain(path)} for path in self]
        columns = ["path", "start", "pos", "nodes", "positions", "contribution", "label"]
        return pandas.DataFrame(rows, columns=columns)

    def to_json(self) -> str:
        """Write the paths as JSON, with all that is needed to read them."""
        names = ("target", "target_value", "exact", "largest_unexplored", "expansions")
        data: dict[str, Any] = {"format": FORMAT, "unit": UNIT}
        data |= {name: getattr(self, name) for name in names}
        data |= {"convention": asdict(self.convention), "paths": [_plain(path) for path in self]}
        return json.dumps(data, ensure_ascii=False)


def _plain(path: Path) -> dict[str, Any]:
    nodes = [str(node) for node in path.nodes]
    return {**vars(path), "start": str(path.start), "nodes": nodes}


# --- The search ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Partial:
    """A path from a site to the target: the nodes passed, where they write, and where it now reads.

    The covector is pulled anew when the path's turn comes: a heap of covectors needs much memory.
    """

    site: int
    pos: int | None = None
    passed: tuple[NodeMap, ...] = ()
    positions: tuple[int, ...] = ()

    def through(self, node_map: NodeMap | None) -> tuple[tuple[NodeMap, ...], tuple[int, ...]]:
        """Nodes and positions after passing one more node, or after going straight on (None)."""
        if node_map is None:
            return self.passed, self.positions
        here = () if self.pos is None else (self.pos,)
        return (node_map, *self.passed), (*here, *self.positions)

    def covector(self, v: Tensor, steps: Sequence[StepParts]) -> Tensor:
        """The target's covector [1, pos, d_model] at the last site, pulled along the path."""
        read_at = (self.pos, *(self.positions or [None] * len(self.passed)))
        above = len(steps)
        for node_map, at in zip(reversed(self.passed), reversed(read_at[:-1]), strict=True):
            v, above = _past_norms(v, steps[node_map.step : above]), node_map.step
            v = node_map.map.apply_t(v)
            if at is not None:  # by position, the path goes through this position alone
                row = v[:, at]
                v = torch.zeros_like(v)
                v[:, at] = row
        return _past_norms(v, steps[self.site : above])


def _past_norms(v: Tensor, steps: Sequence[StepParts]) -> Tensor:
    """Pull a covector back through the norms of the residual itself, past all nodes."""
    for step in reversed(steps):
        v = v if step.norm is None else step.norm.apply_t(v)
    return v


class _Best:
    """The k largest whole paths so far, and the largest size that was let go."""

    def __init__(self, k: int):
        self.k, self.left_out, self.ticks = k, 0.0, count()
        self.heap: list[tuple[float, int, float, str, int | None, tuple]] = []

    @property
    def threshold(self) -> float:
        return self.heap[0][0] if len(self.heap) == self.k else 0.0

    def wanted(self, sizes: Tensor) -> list[list[int]]:
        """The indices at which sizes (bounds or |contributions|) may still matter."""
        keep = sizes > self.threshold
        self.left_out = max(self.left_out, float(torch.where(keep, 0, sizes).max()))
        return keep.nonzero().tolist()

    def offer(self, value: float, name: str, pos: int | None, path: tuple) -> None:
        """Take in a whole path, if it is among the k largest so far."""
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
    progress: bool = True,
) -> Paths:
    """Find the k paths of the largest |contribution| from a source to a target, exactly.

    A path's contribution is u · F_m … F_1 s. Here s is the vector of the source, F_i the frozen
    linear map of the i-th node (norms included), and u the target's covector, pulled through the
    final norm. Over all paths from all sources the contributions sum to the target.

    Sources are every token's embedding, every position's embedding and every constant. b_V, ln1.b
    and the like start at the node that holds them; b_O and the like start in the residual stream.

    Args:
        capture: The captured run, of one prompt.
        operator: The operator of that run.
        target: The functional, from ``resolve_target``.
        k: How many paths to find.
        from_token: Position of a token among the real ones: only paths that start at the embedding
            of this token. None for all sources.
        by_position: Whether paths at different positions inside are apart, not summed.
        constants: Whether constants are sources, too.
        max_expansions: How many partial paths to extend before the search stops, no longer exact.
        memory_limit: Bytes that the bounds may take. Whole bounds are (2 n_layers + 1) · pos ·
            d_model² numbers of 8 bytes. Where that is more, low-rank bounds serve: the search
            stays exact but takes longer.
        progress: Whether to show progress bars on standard error after 2 s: of the bounds, then of
            the partial paths, of which ``max_expansions`` is the most.

    Returns:
        At most k paths. ``exact`` and ``largest_unexplored`` tell what is known of the others.

    Raises:
        ValueError: If there are several prompts, if there is no such token, if ``k`` or
            ``max_expansions`` is below 1, or if the bounds do not fit in memory.

    Source: best-first (A*) search with an admissible bound, Hart, Nilsson & Raphael (1968).
    """
    k, budget = at_least_one(k, "k"), at_least_one(max_expansions, "max_expansions")
    target.alone("paths")
    frame, ln_final = capture.frame, operator.map.maps[-1]
    if frame.batch != 1:
        raise ValueError(
            f"paths needs one prompt, but the lens has {frame.batch}. Take one with lens[i]."
        )
    sources = capture.embeddings
    if from_token is not None:
        only = int(frame.index(from_token))
        sources = {n: torch.zeros_like(x) for n, x in sources.items() if n in CONTENTS}
        for name, x in sources.items():
            x[:, only] = capture.embeddings[name][:, only]
        constants = False

    # 1. The bounds.
    steps = [StepParts.of(step, i) for i, step in enumerate(operator.steps)]
    bounds = bounds_by_site(steps, sources, constants, by_position, memory_limit, progress)

    # 2. The empty path: the target's covector below the final norm.
    best = _Best(k)
    u = frame.zeros(operator.out_dim)
    u[:, target.query] = target.covector
    at = int(target.query) if by_position else None
    if constants:  # those above the last site
        for name, constant in target.constants.items():
            best.offer(float(constant), name, None, ((), ()))
        for name, constant in ln_final.constants().items():
            best.offer(float((u * constant).sum()), name, at, ((), ()))
    root = ln_final.apply_t(u)
    heap = [(-float(bounds[-1].bound(root).sum()), next(best.ticks), _Partial(len(steps), at))]

    # 3. Extend the partial path with the largest bound: straight on, or through one node.
    expansions, bar = 0, progress_bar("partial paths", budget, progress)
    while heap and -heap[0][0] > best.threshold and expansions < budget:
        partial = heapq.heappop(heap)[-1]
        expansions += 1
        bar.update()
        site = partial.site - 1
        step, v = steps[site], partial.covector(root, steps)
        own = {} if step.norm is None else step.norm.constants()
        if constants:
            for name, constant in own.items():
                value = float((v * constant).sum())
                best.offer(value, name, partial.pos, partial.through(None))
        v = _past_norms(v, [step])
        if constants:  # a path may start at any constant of this step
            written = [(None, step.outside), *((m, m.constants) for m in step.node_maps)]
            for node_map, by_name in written:
                for name, constant in by_name.items():
                    value = float((v * constant).sum())
                    best.offer(value, name, partial.pos, partial.through(node_map))
        choices = (None, *step.node_maps)
        pulled = torch.cat([v, *(node_map.map.apply_t(v) for node_map in step.node_maps)])
        if site == 0:  # what is left of these paths is their source
            for name, x in sources.items():
                values = (pulled * x).sum(-1)
                for i, pos in best.wanted(values.abs()):
                    best.offer(float(values[i, pos]), name, pos, partial.through(choices[i]))
            continue
        sizes = bounds[site].bound(pulled)
        sizes = sizes if by_position else sizes.sum(-1, keepdim=True)
        for i, pos in best.wanted(sizes):
            child = _Partial(site, pos if by_position else None, *partial.through(choices[i]))
            heapq.heappush(heap, (-float(sizes[i, pos]), next(best.ticks), child))
    bar.close()

    # 4. The k largest, and what is known of all others.
    left = max(best.left_out, -heap[0][0] if heap else 0.0)
    rows = sorted(best.heap, key=lambda row: (-row[0], -row[1]))
    return Paths(
        paths=tuple(_path(capture, by_position, *row[2:]) for row in rows),
        target=target.name[0],
        target_value=float(target.value),
        exact=not heap or -heap[0][0] <= best.threshold,
        largest_unexplored=left,
        expansions=expansions,
        convention=capture.convention,
    )


def _path(
    capture: Capture, by_position: bool, value: float, name: str, at: int | None, path: tuple
) -> Path:
    start, (passed, positions) = capture.frame.spans[0][0], path
    pos, label = (None, name) if at is None else (at - start, f"{name}@{at - start}")
    if name in CONTENTS and pos is not None:
        label = place_label(capture.prompts.strings[0][pos], pos)
    where = tuple(p - start for p in positions) if by_position else None
    return Path(
        Node.parse(name), pos, tuple(node_map.node for node_map in passed), where, value, label
    )
