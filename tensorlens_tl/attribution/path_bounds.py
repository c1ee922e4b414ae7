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

Everything is in float64: a bound must not be lost to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import at_least_one, progress_bar
from ..graph import Node
from ..maps import Chain, LinearMap, Norm
from ..operator import Step
from ..sublayers import AnyMix, Sublayer

BASIS_ROWS = 64
"""Basis vectors that go through a node at once; more would need much memory inside an MLP."""


# --- A step as "straight on, or through one node" ------------------------------------------------


@dataclass(frozen=True, eq=False)
class NodeMap:
    """One node with its norms, as a map from the residual to the residual.

    Attributes:
        node: The head or MLP.
        map: The map from the residual that the node reads to what the node adds.
        constants: What the node's own constants make it add, by name [1, pos, d_model].
        step: Index of the step that the node belongs to.
    """

    node: Node
    map: Chain
    constants: dict[str, Tensor]
    step: int


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
        for branch in step.branches:
            for node in branch.body.nodes():
                inside = tuple(m for m in (branch.pre, branch.body.part(node)) if m is not None)
                whole = Chain(inside if branch.post is None else (*inside, branch.post))
                # A post-norm's own bias belongs to no node: it is outside.
                own, carried = Chain(inside).constants(), whole.constants()
                constants = {name: carried[name] for name in own if carried[name].any()}
                node_maps.append(NodeMap(node, whole, constants, index))
            outside |= branch.outside()
        outside = {name: c for name, c in outside.items() if c.any()}
        return cls(tuple(node_maps), outside, step.norm)


# --- The bounds ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PathBound:
    """An upper bound of C at one site, per position: C itself, or U Uᵀ + λ I.

    Attributes:
        whole: C itself, float64; None where a low rank has to serve.
        U: Directions of the low-rank bound, float64; None where ``whole`` is there.
        floor: The λ that covers all other directions, float64; None where ``whole`` is there.
    """

    whole: Float[Tensor, "pos d d"] | None
    U: Float[Tensor, "pos d r"] | None = None
    floor: Float[Tensor, " pos"] | None = None

    @classmethod
    def of(cls, C: Float[Tensor, "pos d d"], rank: int | None) -> PathBound:
        """Keep C, or at most ``rank`` of its directions and a λ that covers the others."""
        trace = C.diagonal(dim1=-2, dim2=-1).sum(-1)
        rounding = 1e-14 * trace  # what float64 loses in the recursion stays covered
        if rank is None:
            eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
            return cls(C + rounding[:, None, None] * eye)
        # Any U gives C = U Uᵀ + E ⪯ U Uᵀ + ‖E‖ I. This U is a Nyström sketch of C.
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(C.shape[-1], rank, generator=generator, device="cpu").to(C)
        Q = torch.linalg.qr(C @ (C @ probes)).Q
        size, axes = torch.linalg.eigh(Q.mT @ C @ Q)
        size = size.clamp_min(1e-12 * size[:, -1:]).clamp_min(torch.finfo(C.dtype).tiny)
        U = C @ Q @ (axes / size.sqrt()[:, None])
        return cls(None, U, torch.linalg.matrix_norm(C - U @ U.mT) + rounding)

    def bound(self, v: Float[Tensor, "many pos d"]) -> Float[Tensor, "many pos"]:
        """√(v_pᵀ C_p v_p), or more, for each covector and position, in float64."""
        v = v.double().transpose(0, 1)
        if self.whole is not None:
            energy = (v @ self.whole * v).sum(-1)
        elif self.U is not None and self.floor is not None:
            energy = (v @ self.U).square().sum(-1) + self.floor[:, None] * v.square().sum(-1)
        return energy.clamp_min(0).sqrt().T


def bounds_by_site(
    steps: Sequence[StepParts],
    sources: Mapping[str, Tensor],
    constants: bool,
    by_position: bool,
    memory_limit: int,
    progress: bool = False,
) -> list[PathBound]:
    """Bound what can come from below, at every residual site.

    Args:
        steps: The steps of the residual stream, from below.
        sources: The vectors that paths start with, by name [1, pos, d_model].
        constants: Whether constants are sources, too.
        by_position: Whether paths at different positions inside are apart.
        memory_limit: Bytes that all bounds may take. Where whole matrices need more, low-rank
            bounds serve.
        progress: Whether to show a progress bar on standard error after 2 s.

    Returns:
        One bound per site: before each step, and after the last.

    Raises:
        ValueError: If not even bounds of rank 1 fit in ``memory_limit``.
    """
    n_pos, width = next(iter(sources.values())).shape[1:]
    one, sites = 8 * n_pos * width**2, len(steps) + 1
    rank = None
    at_least_one(memory_limit, "memory_limit")
    if (sites + 5) * one > memory_limit:  # five more are at work in a step
        rank = (memory_limit - 5 * one) // (8 * n_pos * width * sites)
        if rank < 1:
            raise ValueError(
                f"memory_limit is {memory_limit / 2**30:.3g} GiB, but the search needs at least "
                f"{6 * one / 2**30:.3g} GiB for {n_pos} positions of width {width}. Raise "
                "memory_limit, or take a shorter prompt."
            )
        rank = min(rank, width // 2)

    # 1. The sources.
    C = _outer(list(sources.values()))
    found = [PathBound.of(C, rank)]
    bar = progress_bar("bounds of paths", len(steps), progress)
    for step in steps:
        bar.update()
        # 2. and 3. Through one node of the step; straight on, C stays.
        added = torch.zeros_like(C)
        for node_map in step.node_maps:
            added += _push(node_map, C, by_position)
        # 4. The constants of the step.
        written = [*step.outside.values()]
        written += [c for node_map in step.node_maps for c in node_map.constants.values()]
        C = C + added + (_outer(written) if constants and written else 0)
        # 5. The residual's own norm, and its b.
        if step.norm is not None:
            C = _sandwich([step.norm], C)
            b = [*step.norm.constants().values()]
            C = C + (_outer(b) if constants and b else 0)
        found.append(PathBound.of(C, rank))
    bar.close()
    return found


def _outer(written: Sequence[Tensor]) -> Float[Tensor, "pos d d"]:
    """Σ c cᵀ over vectors [1, pos, d], per position."""
    states = torch.stack([c[0].double() for c in written], 1)  # [pos, many, d]
    return states.mT @ states


def _push(
    node_map: NodeMap, C: Float[Tensor, "pos d d"], by_position: bool
) -> Float[Tensor, "pos d d"]:
    """F C Fᵀ of a node. Maps between two mixings of positions are multiplied out as one."""
    run: list[LinearMap] = []
    for map_ in _flat(node_map.map):
        if not isinstance(map_, AnyMix):
            run.append(map_)
            continue
        A = map_.pattern[0, 0].double().abs()  # a head's pattern: one head
        C = _sandwich(run, C)
        t = C.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
        weight = A * A if by_position else A * (A @ t)[:, None] / t
        C = torch.einsum("qk,kde->qde", weight.where(t > 0, 0), C)
        run = []
    return _sandwich(run, C)


def _flat(map_: LinearMap) -> Iterator[LinearMap]:
    """The innermost maps of a chain, in the order in which they act."""
    inner = map_.map if isinstance(map_, Sublayer) else map_
    if isinstance(inner, Chain):
        for m in inner.maps:
            yield from _flat(m)
    else:
        yield inner


def _sandwich(run: list[LinearMap], C: Tensor) -> Tensor:
    """F C Fᵀ for a run of maps that mix no positions: F is one dense matrix per position."""
    if not run:
        return C
    chain = Chain(tuple(run))
    basis = chain.frame.eye(chain.in_dim)[:, None, None]
    basis = basis.expand(-1, 1, chain.frame.n_pos, -1)
    rows = [chain.apply(part)[:, 0] for part in basis.split(BASIS_ROWS)]
    F = torch.cat(rows).transpose(0, 1).double()  # [pos, in, out]
    return F.mT @ C @ F
