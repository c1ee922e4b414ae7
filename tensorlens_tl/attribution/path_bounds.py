"""How much can still come: energies of everything below a residual site, per position.

C_p ⪰ Σ s_p s_pᵀ over the states s of all ways from any source to the site, so that no covector v
reads more than Σ_p √(v_pᵀ C_p v_p) of any of them. It is built upwards, site by site:

1. at the first site, C = Σ x xᵀ over the sources' vectors;
2. a node's F adds F C Fᵀ, position by position, where it mixes none;
3. where a head mixes positions, Jensen: (Σ_k A_k a_k)² ≤ (Σ_k |A_k| t_k) Σ_k |A_k| a_k² / t_k for
   any t > 0. With t_k the size of what is at k, a key that holds nothing (the first token, for
   paths from a later one) costs nothing. With positions apart it is A_k² for each key, exactly;
4. a constant that the step writes adds c cᵀ.

All in float64: a bound must not be lost to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import Node
from ..operator import Step
from ..sublayers import AnyMix, Chain, LinearMap, Sublayer

# --- Steps as "straight on or through one node" --------------------------------------------------


@dataclass(frozen=True, eq=False)
class NodeMap:
    """A node with its norms, residual to residual, and what its own constants make it write."""

    node: Node
    map: Chain
    constants: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class StepParts:
    """A step of the residual stream: its nodes, and the constants it writes that no node holds."""

    node_maps: tuple[NodeMap, ...]
    outside: dict[str, Tensor]

    @classmethod
    def of(cls, step: Step) -> StepParts:
        """The same step, taken apart."""
        node_maps, outside = [], {edit.name: edit.constant for edit in step.edits}
        for branch in step.branches:
            for node in branch.body.nodes():
                inside = tuple(m for m in (branch.pre, branch.body.part(node)) if m is not None)
                whole = Chain(inside if branch.post is None else (*inside, branch.post))
                own, carried = Chain(inside).constants(), whole.constants()
                node_maps.append(
                    NodeMap(node, whole, {n: carried[n] for n in own if carried[n].any()})
                )
            outside |= branch.outside()
        return cls(tuple(node_maps), {name: c for name, c in outside.items() if c.any()})


# --- Energies ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PathBound:
    """An upper bound of C at one site, U Uᵀ + λ I per position; the whole C where U is None."""

    whole: Float[Tensor, "pos d d"] | None
    U: Float[Tensor, "pos d r"] | None = None
    floor: Float[Tensor, " pos"] | None = None

    @classmethod
    def of(cls, C: Float[Tensor, "pos d d"], rank: int | None) -> PathBound:
        """Keep C, or at most ``rank`` of its directions and a λ that covers the others."""
        # Any U gives C = U Uᵀ + E ⪯ U Uᵀ + ‖E‖ I; this one is a Nyström sketch.
        trace = C.diagonal(dim1=-2, dim2=-1).sum(-1)
        rounding = 1e-14 * trace  # what float64 loses in the recursion stays covered
        if rank is None:
            return cls(
                C + rounding[:, None, None] * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
            )
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(C.shape[-1], rank, generator=generator, device="cpu").to(C)
        Q = torch.linalg.qr(C @ (C @ probes)).Q
        size, axes = torch.linalg.eigh(Q.mT @ C @ Q)
        size = size.clamp_min(1e-12 * size[:, -1:]).clamp_min(torch.finfo(C.dtype).tiny)
        U = C @ Q @ (axes / size.sqrt()[:, None])
        return cls(None, U, torch.linalg.matrix_norm(C - U @ U.mT) + rounding)

    def bound(self, v: Float[Tensor, "many pos d"]) -> Float[Tensor, "many pos"]:
        """√(v_pᵀ C_p v_p), or more."""
        v = v.double().transpose(0, 1)
        if self.whole is not None:
            energy = (v @ self.whole * v).sum(-1)
        elif self.U is not None and self.floor is not None:
            energy = (v @ self.U).square().sum(-1) + self.floor[:, None] * v.square().sum(-1)
        return energy.clamp_min(0).sqrt().T


def _flat(map_: LinearMap) -> Iterator[LinearMap]:
    inner = map_.map if isinstance(map_, Sublayer) else map_
    if isinstance(inner, Chain):
        for m in inner.maps:
            yield from _flat(m)
    else:
        yield inner


def _push(
    node_map: NodeMap, C: Float[Tensor, "pos d d"], by_position: bool
) -> Float[Tensor, "pos d d"]:
    """F C Fᵀ of a node: through each run of maps between which nothing mixes positions at once."""
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


def _sandwich(run: list[LinearMap], C: Tensor) -> Tensor:
    if not run:
        return C
    chain = Chain(tuple(run))
    basis = chain.frame.eye(chain.in_dim)[:, None, None]
    basis = basis.expand(-1, 1, chain.frame.n_pos, -1)
    rows = [chain.apply(part)[:, 0] for part in basis.split(64)]  # bounds what an MLP needs between
    F = torch.cat(rows).transpose(0, 1).double()  # [pos, in, out]
    return F.mT @ C @ F


def bounds_by_site(
    steps: Sequence[StepParts],
    sources: dict[str, Tensor],
    constants: bool,
    by_position: bool,
    memory_limit: int,
) -> list[PathBound]:
    """An upper bound of C at every site but the last norm's."""
    n_pos, width = next(iter(sources.values())).shape[1:]
    one, sites = 8 * n_pos * width**2, len(steps) + 1
    rank = None
    if (sites + 5) * one > memory_limit:  # five more are at work in a step
        rank = (memory_limit - 5 * one) // (8 * n_pos * width * sites)
        if rank < 1:
            raise ValueError(
                f"the search needs {6 * one / 2**30:.3g} GiB at least for {n_pos} positions of width "
                f"{width}, expected at most memory_limit = {memory_limit / 2**30:.3g} GiB: take a "
                "shorter prompt, or raise memory_limit"
            )
        rank = min(rank, width // 2)

    def outer(written: Sequence[Tensor]) -> Tensor:
        states = torch.stack([c[0].double() for c in written], 1)  # [pos, many, d]
        return states.mT @ states

    C = outer(list(sources.values()))
    found = [PathBound.of(C, rank)]
    for parts in steps:
        added = torch.zeros_like(C)
        for node_map in parts.node_maps:
            added += _push(node_map, C, by_position)
        written = [
            *parts.outside.values(),
            *(c for w in parts.node_maps for c in w.constants.values()),
        ]
        C = C + added + (outer(written) if constants and written else 0)
        found.append(PathBound.of(C, rank))
    return found
