"""Upper bounds for the path search: how much the ways from a source to a site can still add.

Let s be the state that one way makes at a site, and s_p its vector at position p. With

    C_p ⪰ Σ s_p s_pᵀ   over the states s of all ways from any source to the site,

no covector v reads more than Σ_p √(v_pᵀ C_p v_p) of any of them. C is built upwards, site by site:

1. At the first site, C = Σ x xᵀ over the vectors of the sources.
2. A node F adds F C Fᵀ, position by position, where F mixes no positions.
3. Where a head mixes positions, use Jensen's inequality, for any t > 0:
   (Σ_k A_k a_k)² ≤ (Σ_k |A_k| t_k) Σ_k |A_k| a_k² / t_k.
   With t_k the size of what is at k, a key that holds nothing costs nothing: e.g. the first token,
   for paths from a later one. With positions apart the factor is A_k² for each key, exactly.
4. A constant c that the step writes adds c cᵀ.
5. A norm N of the residual itself (post-norm models) makes C into N C Nᵀ.

A head is narrow: what it adds to C is W_Oᵀ m W_O, with m [pos, d_head, d_head] the mix of its keys'
c = W_Vᵀ C W_V. So a covector v tells what each way down can still add:

    through a head    Σ_k y_kᵀ c_k y_k,  y_k = Σ_q A[q, k] W_O v_q      straight on, past heads
    through an MLP    vᵀ C′ v − vᵀ C v, with C′ above and C below       vᵀ C′ v − Σ_h u_hᵀ m_h u_h

All is computed in the dtype of the run. :data:`ROUNDING` of every number is added on: errors of a
product are small beside the numbers that it sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import at_least_one, progress_bar
from ..graph import Node
from ..maps import Chain, Gate, Identity, Linear, LinearMap, Norm, Shift, Sum
from ..operator import Step
from ..sublayers import AnyMix, Attention, Sublayer
from .energies import ROUNDING, HeadBound, PathBound, Rows, padded

BASIS_ROWS = 64
"""Basis vectors that go through a node at once; more would need much memory inside an MLP."""
BLOCK = 96
"""Columns of a symmetric product that are multiplied at once."""


# --- A step as "straight on, or through one node" ------------------------------------------------


@dataclass(frozen=True, eq=False)
class NodeMap:
    """One node with its norms, as a map from the residual to the residual.

    Attributes:
        node: The head or MLP.
        map: The map from the residual that the node reads to what the node adds.
        constants: What the node's own constants make it add, by name [1, pos, d_model].
        step: Index of the step that the node belongs to.
        reads: Branch and key/value head (or node) that the node reads.
    """

    node: Node
    map: Chain
    constants: dict[str, Tensor]
    step: int
    reads: tuple[int, int]


@dataclass(frozen=True, eq=False)
class StepParts:
    """One step of the residual stream, taken apart into its nodes.

    Attributes:
        node_maps: The nodes of the step.
        outside: The constants that the step adds and no node holds, by name [1, pos, d_model].
        norm: The norm of the residual itself, after the sum, or None.
    """

    node_maps: tuple[NodeMap, ...]
    outside: dict[str, Tensor]
    norm: Norm | None

    @classmethod
    def of(cls, step: Step, index: int = 0) -> StepParts:
        """Take a step apart. Constants that are zero everywhere are left out."""
        node_maps, outside = [], {edit.name: edit.constant for edit in step.edits}
        for number, branch in enumerate(step.branches):
            body = branch.body
            kv_of = body.kv_of if isinstance(body, Attention) else range(len(body.nodes()))
            for kv, node in zip(kv_of, body.nodes(), strict=True):
                inside = tuple(m for m in (branch.pre, body.part(node)) if m is not None)
                whole = Chain(inside if branch.post is None else (*inside, branch.post))
                # A post-norm's own bias belongs to no node: it is outside.
                own, carried = Chain(inside).constants(), whole.constants()
                constants = {name: carried[name] for name in own if carried[name].any()}
                node_maps.append(NodeMap(node, whole, constants, index, (number, kv)))
            outside |= branch.outside()
        outside = {name: c for name, c in outside.items() if c.any()}
        return cls(tuple(node_maps), outside, step.norm)

    @property
    def positionwise(self) -> bool:
        """Whether a node of the step mixes no positions."""
        nodes = self.node_maps
        return any(not any(isinstance(m, AnyMix) for m in _flat(node.map)) for node in nodes)

    def written(self) -> list[Float[Tensor, "1 pos d_model"]]:
        """All constants that the step writes."""
        return [*self.outside.values(), *(c for m in self.node_maps for c in m.constants.values())]


# --- Nodes as matrices ---------------------------------------------------------------------------


def matrix_of(run: Iterable[LinearMap], M: Tensor | None = None) -> Tensor:
    """The matrix of a run of maps that mix no positions, at every position where they differ.

    Args:
        run: The maps, in the order in which they act.
        M: The matrix before them [pos_or_1, d_in, d], or None.

    Returns:
        Row i is what the maps make of the i-th unit vector [pos_or_1, d_in, d_out].
    """
    scale = ratio = None
    for part in run:
        frame = part.frame
        if isinstance(part, Linear):
            W = frame.cast(part.W)
            M = W[None] if M is None else M @ W if ratio is None else _gated(M, ratio, W)
            ratio = None
            continue
        M = frame.eye(part.in_dim)[None] if M is None else M
        M, ratio = M if ratio is None else M * ratio, None
        if isinstance(part, Gate):  # with the weights after it
            ratio = part.ratio[0][:, None]
        elif isinstance(part, Norm):
            w, own = part.weights, 1 / part.scale[0][..., None]
            M = M - M.mean(-1, keepdim=True) if w.center else M
            M = M if w.gain is None else M * frame.cast(w.gain)
            scale = own if scale is None else scale * own  # a number per position: last
        elif isinstance(part, Sum):  # the halves of a gated MLP
            M = sum((matrix_of(_flat(half), M) for half in part.maps), M.new_zeros(()))
        else:
            M = _pushed(M, part)
    M = cast(Tensor, M)
    M = M if ratio is None else M * ratio
    return M if scale is None else M * scale


def _gated(M: Tensor, ratio: Tensor, W: Tensor) -> Tensor:
    """(M ⊙ ratio) W, one position after the other: what lies between stays small."""
    found = W.new_empty(len(ratio), M.shape[1], W.shape[1])
    for p, (rows, r) in enumerate(zip(M.expand(len(ratio), -1, -1), ratio, strict=True)):
        found[p] = (rows * r) @ W
    return found


def _pushed(M: Tensor, part: LinearMap) -> Tensor:
    """Push the rows of a matrix through a map of any kind."""
    rows = M.expand(part.frame.n_pos, -1, -1).transpose(0, 1)[:, None]  # [in, 1, pos, d]
    done = [part.apply(some)[:, 0] for some in rows.split(BASIS_ROWS)]
    return torch.cat(done).transpose(0, 1)


def _symmetric(left: Float[Tensor, "pos k d"], right: Float[Tensor, "pos k d"]) -> Tensor:
    """Leftᵀ right, where that is symmetric: blocks below the diagonal are not multiplied."""
    found = right.new_empty(len(right), *left.shape[-1:], *right.shape[-1:])
    for start in range(0, right.shape[-1], BLOCK):
        own = slice(start, start + BLOCK)
        found[:, : own.stop, own] = left[..., : own.stop].mT @ right[..., own]
        found[:, own, :start] = found[:, :start, own].mT
    return found


def _flat(map_: LinearMap) -> Iterator[LinearMap]:
    """The innermost maps of a chain that are not the identity but for a constant, in order."""
    inner = map_.map if isinstance(map_, Sublayer) else map_
    if isinstance(inner, Chain):
        for m in inner.maps:
            yield from _flat(m)
    elif not isinstance(inner, Identity | Shift):
        yield inner


# --- The bounds ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StepBound:
    """What a covector above a step can find below it, way by way.

    Attributes:
        parts: The nodes of the step.
        heads: What is known of every node; None of those that mix no positions.
        below: The bound below the step; None where only heads are in it.
        constants: What the step writes besides, if constants are sources.
        own: The constants of the residual's norm after the step, if constants are sources.
    """

    parts: StepParts
    heads: tuple[HeadBound | None, ...]
    below: PathBound | None
    constants: Float[Tensor, "constant pos d_model"]
    own: Float[Tensor, "norm_constant pos d_model"]

    def past_norm(self, v: Tensor, e: Tensor) -> Tensor:
        """The energies of covectors above the step's norm, without its constants."""
        return (e - _squares(v, self.own) + self._lost(e)).clamp_min(0)

    def ways(
        self, v: Float[Tensor, "many pos d_model"], e: Float[Tensor, "many pos"]
    ) -> list[Float[Tensor, "many pos"]]:
        """Bound what comes straight from below, and through every node.

        Args:
            v: Covectors below the step's norm, if there is one.
            e: Energies of these covectors there.

        Returns:
            The energies of every way [many, pos], straight on first.
        """
        found: list[Tensor | None] = []
        rows, rest = Rows.of(v), e - _squares(v, self.constants) + self._lost(e)
        for head in self.heads:
            own = None if head is None else head.energies(rows)
            found.append(None if own is None else own[0])
            rest = rest if own is None else rest - own[1]
        rest = rest.clamp_min(0)
        if self.below is None:
            return [rest, *(e for e in found if e is not None)]
        straight = self.below.of_rows(rows)
        if self.below.whole is not None and found.count(None) == 1:
            # Straight on is padded.
            lost = self._lost(e) + 2 * rows.put(rows.lost(self.below.whole))
            other = (rest - straight + lost).clamp_min(0)
            return [straight, *(other if e is None else e for e in found)]
        return [
            torch.minimum(straight, rest),
            *(
                self.below.energies(m.map.apply_t(v[:, None])[:, 0]) if e is None else e
                for e, m in zip(found, self.parts.node_maps, strict=True)
            ),
        ]

    def _lost(self, e: Tensor) -> Tensor:
        """What differences of energies may lose."""
        return ROUNDING * torch.finfo(self.constants.dtype).eps * e


def _squares(v: Tensor, constants: Tensor) -> Tensor:
    """Σ (v · c)² over constants [many, pos]."""
    return torch.einsum("npd,cpd->npc", v, constants).square().sum(-1)


def climb(
    steps: Sequence[StepParts],
    sources: Mapping[str, Tensor],
    constants: bool,
    by_position: bool,
) -> Iterator[tuple[Float[Tensor, "pos d d"], tuple[HeadBound | None, ...]]]:
    """Build C site by site.

    Args:
        steps: The steps of the residual stream, from below.
        sources: The vectors that paths start with, by name [1, pos, d_model].
        constants: Whether constants are sources, too.
        by_position: Whether paths at different positions inside are apart.

    Yields:
        C below every step, and what is known of the step's nodes; then C above the last.
    """
    C = _outer(list(sources.values()))  # 1. The sources.
    for step in steps:
        # 2. and 3. Through one node of the step; straight on, C stays.
        added, heads = torch.zeros_like(C), []
        values: dict[tuple[int, int], Tensor] = {}  # heads of a group read the same values
        for node_map in step.node_maps:
            maps = list(_flat(node_map.map))
            at = next((i for i, m in enumerate(maps) if isinstance(m, AnyMix)), None)
            if at is None:
                F = _matrix_of_node(maps)
                added += _symmetric(F, C @ F)
                heads.append(None)
                continue
            if node_map.reads not in values:
                below = matrix_of(maps[:at])
                values[node_map.reads] = padded(below.mT @ (C @ below))
            c, A = values[node_map.reads], cast(AnyMix, maps[at]).pattern[0, 0]
            heads.append(HeadBound(matrix_of(maps[at + 1 :]), A, c, _mixed(A, c, by_position)))
        own = [head for head in heads if head is not None]
        if own:
            wide = torch.cat([(head.m @ head.above) for head in own], 1)
            above = torch.cat([head.above.expand(len(wide), -1, -1) for head in own], 1)
            added += _symmetric(above, wide)
        yield C, tuple(heads)
        # 4. The constants of the step.
        C = C + added
        if constants and (written := step.written()):
            C = C + _outer(written)
        # 5. The residual's own norm, and its b.
        if step.norm is not None:
            F = matrix_of([step.norm])
            C = _symmetric(F, C @ F)
            b = [*step.norm.constants().values()]
            C = C + (_outer(b) if constants and b else 0)
    yield C, ()


def _matrix_of_node(maps: list[LinearMap]) -> Tensor:
    """The matrix of a node that mixes no positions, at every position."""
    F = matrix_of(maps)
    return F.expand(maps[0].frame.n_pos, -1, -1)


def _mixed(A: Tensor, c: Tensor, by_position: bool) -> Tensor:
    """What a head with the pattern A makes of c, by Jensen's inequality."""
    A = A.abs()
    t = c.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
    weight = A * A if by_position else A * (A @ t)[:, None] / t
    return (weight.where(t > 0, 0) @ c.flatten(1)).unflatten(1, c.shape[1:])


def bounds_by_step(
    steps: Sequence[StepParts],
    sources: Mapping[str, Tensor],
    constants: bool,
    by_position: bool,
    memory_limit: int,
    progress: bool = False,
) -> tuple[list[StepBound], PathBound]:
    """Bound what can come from below, at every step of the residual stream.

    Args:
        steps: The steps of the residual stream, from below.
        sources: The vectors that paths start with, by name [1, pos, d_model].
        constants: Whether constants are sources, too.
        by_position: Whether paths at different positions inside are apart.
        memory_limit: Bytes that all bounds may take. Where whole matrices need more, low-rank
            bounds serve.
        progress: Whether to show a progress bar on standard error after 2 s.

    Returns:
        One bound per step, and the bound above the last one.

    Raises:
        ValueError: If not even bounds of rank 1 fit in ``memory_limit``.
    """
    x = next(iter(sources.values()))
    (n_pos, width), sites = x.shape[1:], len(steps) + 1
    at_least_one(memory_limit, "memory_limit")
    rank, kept = None, 1 + sum(step.positionwise for step in steps)
    one = x.element_size() * n_pos * width**2
    if (kept + 5) * one > memory_limit:  # five more are at work in a step
        one = 8 * n_pos * width**2
        rank = (memory_limit - 5 * one) // (8 * n_pos * width * sites)
        if rank < 1:
            raise ValueError(
                f"memory_limit is {memory_limit / 2**30:.3g} GiB, but the search needs at least "
                f"{6 * one / 2**30:.3g} GiB for {n_pos} positions of width {width}. Raise "
                "memory_limit, or take a shorter prompt."
            )
        rank = min(rank, width // 2)
    found, none = [], x[:0]
    bar = progress_bar("bounds of paths", len(steps), progress)
    grown = climb(steps, sources, constants, by_position)
    for step, (C, heads) in zip(steps, grown, strict=False):
        bar.update()
        below = PathBound.of(C, rank) if rank or step.positionwise else None
        own = [] if step.norm is None else [*step.norm.constants().values()]
        written, b = (
            torch.cat(some) if constants and some else none for some in (step.written(), own)
        )
        found.append(StepBound(step, heads, below, written, b))
    bar.close()
    return found, PathBound.of(next(grown)[0], rank)


def _outer(written: Sequence[Tensor]) -> Float[Tensor, "pos d d"]:
    """Σ c cᵀ over vectors [1, pos, d], per position."""
    states = torch.stack([c[0] for c in written], 1)  # [pos, many, d]
    return states.mT @ states
