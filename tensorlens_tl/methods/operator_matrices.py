"""Token-by-token matrices of the operator: how much of token j is in the output at i.

    norm     ‖T_ij‖_F               D pulls per destination, or a few random ones
    in       ‖T_ij x_j‖             one push per source
    out      ‖T_ijᵀ u_i‖            one pull per destination
    in_out   u_iᵀ T_ij x_j          one pull per destination; signed: a row and its constants' share
                                    sum to the target

x_j is the state that enters, u_i a covector at destination i. All are sweeps (``contraction``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Target, TargetLike, resolve_target
from ..checks import whole
from ..graph import FINAL_SITE
from ..operator import (
    BatchedSweep,
    Capture,
    FrozenTransformer,
    Plan,
    Reduction,
    Segment,
    dots,
    make_plan,
    memory_budget,
    squares,
)
from ..sublayers import HOST, RecomputedMix
from .tables import TokenMatrix

KINDS = ("norm", "in", "out", "in_out")
PRECISIONS = {None: None, "bfloat16": torch.bfloat16}


# --- Random probes -------------------------------------------------------------------------------


def orthogonal_probes(n: int, k: int, d: int, generator: torch.Generator) -> Float[Tensor, "n k d"]:
    """Random orthogonal vectors of length 1, k for each of n positions.

    Rows of H ⊗ Q with random signs of coordinates and a random choice of rows, where H is the
    Hadamard matrix of the largest power of two in d and Q the cosine basis of the rest: all
    coordinates are about equally large, so the diagonal of TᵀT adds no variance.

    Args:
        n: Positions.
        k: Vectors each, at most d.
        d: Width.
        generator: Source of randomness.

    Returns:
        Probes g with E[g gᵀ] = 1 / d.
    """
    power = d & -d
    basis = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(basis) < power:
        basis = torch.cat([torch.cat([basis, basis], 1), torch.cat([basis, -basis], 1)])
    rest = torch.arange(d // power, dtype=torch.float64, device="cpu")
    cosine = torch.cos(math.pi * (rest[None] + 0.5) * rest[:, None] / len(rest))
    cosine /= cosine.norm(dim=1, keepdim=True)
    basis = torch.kron(basis / math.sqrt(power), cosine)
    chosen = torch.rand(n, d, generator=generator, device="cpu").argsort(-1)[:, :k]
    signs = torch.randint(0, 2, (n, 1, d), generator=generator, device="cpu") * 2 - 1
    return basis[chosen] * signs


# --- The four matrices ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sweep:
    """One prompt's sweep, what starts it, and how its result becomes a matrix."""

    sweep: BatchedSweep
    many: int
    vectors: Callable[[Tensor, slice], Tensor]
    reduce: Reduction


def token_matrix(
    capture: Capture,
    operator: FrozenTransformer,
    kind: str,
    target: TargetLike = None,
    layers: tuple[str, str] | None = None,
    probes: int | None = None,
    seed: int = 0,
    precision: str | None = None,
    memory_limit: int | None = None,
) -> TokenMatrix:
    """Collapse the operator to a token-by-token matrix.

    "norm" ‖T_ij‖_F, "in" ‖T_ij x_j‖, "out" ‖T_ijᵀ u_i‖, "in_out" u_iᵀ T_ij x_j (Atad et al. 2026).

    Args:
        capture: The run.
        operator: Its operator.
        kind: "norm", "in", "out" or "in_out".
        target: What u_i is, for "out" and "in_out": None is y_i / ‖y_i‖, the output's own direction;
            "prediction" the logit of each position's own prediction; a token, id or direction is
            taken at every position.
        layers: A pair of residual sites: that part of the operator only.
        probes: For "norm": how many random vectors per destination, at least 2; None is exact.
        seed: Of the probes.
        precision: "bfloat16" for products in that precision; None is the operator's own.
        memory_limit: Bytes; by default half of what is free.

    Returns:
        The matrix of every prompt.

    Raises:
        ValueError: If an argument is none of these, or the work does not fit ``memory_limit``.
    """
    part, sites = _segment(operator, layers)
    frame = capture.frame
    values = frame.zeros(frame.n_pos)
    error = None if probes is None else frame.zeros(frame.n_pos)
    constants = values_of = None
    if kind == "in_out":
        constants, values_of = frame.zeros(1)[..., 0], frame.zeros(1)[..., 0]
    limit = memory_budget(memory_limit, frame.device)
    bias = part.bias if kind == "in_out" else None
    for prompt, (start, stop) in enumerate(frame.spans):
        job = _prepare(
            capture, operator, part, sites, kind, target, probes, seed, precision, prompt
        )
        here = slice(start, stop)
        every = torch.arange(stop - start, device=frame.device)
        found = job.sweep.carry(every, job.vectors, job.many, job.reduce, limit).to(frame.dtype)
        values[prompt, here, here] = _entries(kind, found, part.out_dim, probes)
        if error is not None and probes is not None:
            samples, k = found * part.out_dim, probes
            deviation = samples.std(1) * math.sqrt((1 - k / part.out_dim) / k)
            error[prompt, here, here] = deviation / (2 * samples.mean(1).sqrt()).clamp_min(1e-30)
        if (
            kind == "in_out"
            and bias is not None
            and constants is not None
            and values_of is not None
        ):
            u, beside, value = _covectors(capture, operator, sites, target, prompt)
            constants[prompt, here] = (u * bias[prompt, here]).sum(-1) + beside
            values_of[prompt, here] = value
    return TokenMatrix(
        kind, values, capture.prompts.strings, frame.spans, capture.convention, sites,
        constants, values_of, error, probes,
    )  # fmt: skip


def _entries(kind: str, found: Tensor, d_model: int, probes: int | None) -> Tensor:
    """What a sweep found, as entries [destination, source]."""
    if kind == "in_out":
        return found[:, 0]
    if kind == "in":
        return found[:, 0].sqrt().T
    if probes is not None:
        return (found * d_model).mean(1).sqrt()  # E ‖Tᵀ g‖² = ‖T‖²_F / d
    return found.sum(1).sqrt()


def token_row(
    capture: Capture,
    operator: FrozenTransformer,
    kind: str,
    goal: Target,
    probes: int | None = None,
    seed: int = 0,
    precision: str | None = None,
    memory_limit: int | None = None,
) -> Float[Tensor, "batch pos"]:
    """One row of :func:`token_matrix`, at what one row costs: the output at a target's position.

    Args:
        capture: The run.
        operator: Its operator.
        kind: "norm" and "in" know no target but its position; "out" and "in_out" read by its u, so
            that the row of "in_out" and the constants' share sum to it.
        goal: The target.
        probes: As in :func:`token_matrix`.
        seed: Of the probes.
        precision: As in :func:`token_matrix`.
        memory_limit: Bytes; by default half of what is free.

    Returns:
        An entry for every token; 0 at padding.

    Raises:
        ValueError: If an argument is none of these, or the work does not fit ``memory_limit``.
    """
    part, sites = _segment(operator, None)
    frame, limit = capture.frame, memory_budget(memory_limit, capture.frame.device)
    values = frame.zeros(1)[..., 0]
    for prompt, (start, stop) in enumerate(frame.spans):
        u = goal.covector[prompt : prompt + 1]
        job = _prepare(
            capture, operator, part, sites, kind, None, probes, seed, precision, prompt, u
        )
        query = goal.query[prompt : prompt + 1] - start
        at = torch.arange(stop - start, device=frame.device) if kind == "in" else query
        found = job.sweep.carry(at, job.vectors, job.many, job.reduce, limit).to(frame.dtype)
        entries = _entries(kind, found, part.out_dim, probes)
        values[prompt, start:stop] = entries[query[0] if kind == "in" else 0]
    return values


def plan_token_matrix(
    capture: Capture,
    operator: FrozenTransformer,
    kind: str,
    target: TargetLike = None,
    layers: tuple[str, str] | None = None,
    probes: int | None = None,
    seed: int = 0,
    precision: str | None = None,
    memory_limit: int | None = None,
) -> Plan:
    """What :func:`token_matrix` would cost, with the same arguments; only rates are measured.

    Returns:
        The plan.

    Raises:
        ValueError: As :func:`token_matrix` would.
    """
    part, sites = _segment(operator, layers)
    frame, jobs, dtype = capture.frame, [], capture.frame.dtype
    for prompt, (start, stop) in enumerate(frame.spans):
        job = _prepare(
            capture, operator, part, sites, kind, target, probes, seed, precision, prompt
        )
        every = torch.arange(stop - start, device=frame.device)
        jobs.append(job.sweep.shape(every, job.many, job.reduce))
        dtype = job.sweep.dtype
    limit = memory_budget(memory_limit, frame.device)
    notes = (HOST,) if isinstance(capture.blocks[0].attn.mix, RecomputedMix) else ()
    return make_plan(f'token_matrix("{kind}")', jobs, limit, dtype, frame.device, notes)


def _segment(
    operator: FrozenTransformer, layers: tuple[str, str] | None
) -> tuple[Segment, tuple[str, str]]:
    if layers is None:
        layers = operator.sites[0], FINAL_SITE
    if not (isinstance(layers, Sequence) and len(layers) == 2) or isinstance(layers, str):
        raise ValueError(
            f"expected layers as a pair of residual sites, got {layers!r}; there are "
            f"{', '.join(operator.sites)}"
        )
    return operator.between(*layers), (str(layers[0]), str(layers[1]))


def _prepare(
    capture: Capture,
    operator: FrozenTransformer,
    part: Segment,
    sites: tuple[str, str],
    kind: str,
    target: TargetLike,
    probes: int | None,
    seed: int,
    precision: str | None,
    prompt: int,
    u: Tensor | None = None,
) -> _Sweep:
    if kind not in KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(KINDS)}, got {kind!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"expected precision 'bfloat16' or None, got {precision!r}")
    if target is not None and kind in ("norm", "in"):
        raise ValueError(f"{kind!r} has no target: leave it out, or ask for 'out' or 'in_out'")
    if probes is not None and kind != "norm":
        raise ValueError(f"probes are for 'norm', got {probes!r} for {kind!r}: leave them out")
    start, stop = capture.frame.spans[prompt]
    sweep = BatchedSweep(part.map, prompt, kind != "in", PRECISIONS[precision])
    d = part.out_dim
    if kind == "norm" and probes is None:
        eye = capture.frame.eye(d)
        return _Sweep(sweep, d, lambda i, p: eye[p].expand(len(i), -1, -1), squares())
    if kind == "norm":
        if not whole(probes) or not 2 <= probes <= d:
            raise ValueError(
                f"expected 2 ≤ probes ≤ {d} (d_model), got {probes!r}: two samples are the least "
                "that tell their error; None is exact"
            )
        generator = torch.Generator().manual_seed(seed + prompt)
        g = orthogonal_probes(stop - start, probes, d, generator).to(capture.embed)
        return _Sweep(sweep, probes, lambda i, p: g[i][:, p], squares())
    if kind == "in":
        x = state_at(capture, operator, sites[0])[prompt, start:stop]
        return _Sweep(sweep, 1, lambda i, p: x[i][:, None], squares())
    if u is None:
        u = _covectors(capture, operator, sites, target, prompt)[0]
    reduce = squares()
    if kind == "in_out":
        reduce = dots(state_at(capture, operator, sites[0])[prompt, start:stop])
    return _Sweep(sweep, 1, lambda i, p: u[i][:, None], reduce)


def state_at(
    capture: Capture, operator: FrozenTransformer, site: str
) -> Float[Tensor, "batch pos d_model"]:
    """The run's own state at a residual site, the final normalized residual included."""
    index = operator.site_index(site)
    if index < len(operator.steps):
        return operator.steps[index].state
    return capture.resid_final if index == len(operator.steps) else capture.unembed.final


def _covectors(
    capture: Capture,
    operator: FrozenTransformer,
    sites: tuple[str, str],
    target: TargetLike,
    prompt: int,
) -> tuple[Tensor, Tensor | float, Tensor]:
    """For every position u_i [pos, d_model], what b_U adds, and the run's own value of the target."""
    start, stop = capture.frame.spans[prompt]
    if target is None:
        y = state_at(capture, operator, sites[1])[prompt, start:stop]
        size = y.norm(dim=-1)
        return y / size[:, None].clamp_min(1e-30), 0.0, size
    if operator.site_index(sites[1]) != len(operator.sites) - 1:
        raise ValueError(
            f"a target in logits is read at {FINAL_SITE!r}, got layers up to {sites[1]!r}: leave the "
            "target out, or end there"
        )
    one = capture.prompt(prompt)
    goal = None if isinstance(target, str) and target == "prediction" else target
    found = [resolve_target(one, goal, pos) for pos in range(stop - start)]
    return (
        torch.cat([t.covector for t in found]),
        torch.cat([t.constant for t in found]),
        torch.cat([t.value for t in found]),
    )
