"""Token-by-token matrices of the operator: how much of token j is in the output at i.

    norm     ‖T_ij‖_F          d_model pulls per destination, or a few random ones
    in       ‖T_ij x_j‖        one push per source
    out      ‖T_ijᵀ u_i‖       one pull per destination
    in_out   u_iᵀ T_ij x_j     one pull per destination; signed

A push applies T, a pull its transpose. x_j is the state that enters at source j, and u_i a covector
at destination i (Atad et al. 2026). A row of "in_out" and the constants' share sum to the target.

1. Check the question, and find the part of the operator that it is about.
2. For every prompt, prepare one batched sweep: what starts it, and how its results are reduced.
3. Run the sweep, and turn what it found into entries [destination, source].
4. For "in_out", add up what the constants contribute to every destination.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Target, TargetLike, resolve_target
from ..checks import is_int, whole
from ..costs import Plan, make_plan, memory_budget
from ..graph import FINAL_SITE, numbered_site
from ..maps import TINY
from ..operator import BatchedSweep, Capture, FrozenTransformer, Reduction, Segment, dots, squares
from ..sublayers import HOST, RecomputedMix
from .tables import TokenMatrix

OPERATOR_METHODS = ("norm", "in", "out", "in_out")
"""The operator's own methods, by name."""
PRECISIONS = {None: None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MatrixOptions:
    """Options of the operator's own methods. Users type them by the names of these fields.

    Attributes:
        probes: Number of random vectors per destination that estimate "norm", from 2 to d_model.
            None computes it exactly.
        seed: Seed of the random vectors.
        precision: "bfloat16" multiplies in that precision. None keeps the operator's dtype.
        memory_limit: Most working memory in bytes. None allows half of what is free.
    """

    probes: int | None = None
    seed: int = 0
    precision: str | None = None
    memory_limit: int | None = None

    def __post_init__(self):
        whole(self.seed, "seed")
        if self.precision not in (None, "bfloat16"):
            raise ValueError(
                f"precision must be 'bfloat16' or None, not {self.precision!r}. "
                "Drop precision= to keep the operator's own dtype."
            )


def matrix_options(name: str, given: Mapping[str, Any]) -> MatrixOptions:
    """Options of one of the operator's own methods, as a user gave them.

    Args:
        name: One of :data:`OPERATOR_METHODS`.
        given: Values by the names of :class:`MatrixOptions`.

    Returns:
        The options, with defaults where nothing was given.

    Raises:
        ValueError: If there is no such option.
    """
    known = [field.name for field in fields(MatrixOptions)]
    if wrong := sorted(given.keys() - set(known)):
        raise ValueError(
            f"{name} has no option {', '.join(wrong)}. Use one of {', '.join(known)}, or none."
        )
    return MatrixOptions(**given)


# --- Random probes -------------------------------------------------------------------------------


def orthogonal_probes(n: int, k: int, d: int, generator: torch.Generator) -> Float[Tensor, "n k d"]:
    """Draw k random orthogonal vectors of length 1 for each of n positions.

    They are rows of H ⊗ Q, chosen at random, with random signs of coordinates. H is the Hadamard
    matrix of the largest power of two in d, and Q the cosine basis of the rest. All coordinates are
    about equally large, so the diagonal of TᵀT adds no variance to the estimate.

    Args:
        n: Number of positions.
        k: Number of vectors per position, at most d.
        d: Width of a vector.
        generator: Source of randomness.

    Returns:
        Vectors g [n, k, d] in float64, with E[g gᵀ] = 1 / d.
    """
    power = d & -d  # the largest power of two that divides d
    basis = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(basis) < power:
        basis = torch.cat([torch.cat([basis, basis], 1), torch.cat([basis, -basis], 1)])
    rest = torch.arange(d // power, dtype=torch.float64, device="cpu")
    cosine = torch.cos(math.pi * (rest[None] + 0.5) * rest[:, None] / len(rest))
    cosine /= cosine.norm(dim=1, keepdim=True)
    # The Kronecker product of two orthogonal bases is one, and any d is power · rest.
    basis = torch.kron(basis / math.sqrt(power), cosine)
    chosen = torch.rand(n, d, generator=generator, device="cpu").argsort(-1)[:, :k]
    signs = torch.randint(0, 2, (n, 1, d), generator=generator, device="cpu") * 2 - 1
    return basis[chosen] * signs


# --- The question --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _PromptSweep:
    """One prompt's batched sweep, as the arguments of its ``carry`` and ``shape``."""

    sweep: BatchedSweep
    many: int
    vectors: Callable[[Tensor, slice], Tensor]
    reduce: Reduction


@dataclass(frozen=True, eq=False)
class _Question:
    """What is asked of the operator, the same for every prompt of a batch."""

    name: str
    capture: Capture
    operator: FrozenTransformer
    part: Segment
    sites: tuple[str, str]
    target: TargetLike
    options: MatrixOptions
    limit: int

    def state(self, site: str) -> Float[Tensor, "batch pos d_model"]:
        """The run's own state at a residual site, the final normalized residual included."""
        index = self.operator.site_index(site)
        if index < len(self.operator.steps):
            return self.operator.steps[index].state
        last = len(self.operator.steps)
        return self.capture.resid_final if index == last else self.capture.unembed.final

    def covectors(self, prompt: int) -> tuple[Tensor, Tensor | float, Tensor]:
        """u_i [pos, d_model] of one prompt, what b_U adds [pos], and the target's value [pos]."""
        start, stop = self.capture.frame.spans[prompt]
        if self.target is None:  # the output's own direction: u_i · y_i = ‖y_i‖
            y = self.state(self.sites[1])[prompt, start:stop]
            size = y.norm(dim=-1)
            return y / size[:, None].clamp_min(TINY), 0.0, size
        one = self.capture.prompt(prompt)
        predicted = isinstance(self.target, str) and self.target == "prediction"
        goal = None if predicted else self.target
        found = [resolve_target(one, goal, pos) for pos in range(stop - start)]
        return (
            torch.cat([t.covector for t in found]),
            torch.cat([t.constant for t in found]),
            torch.cat([t.value for t in found]),
        )

    def sweep(self, prompt: int, u: Tensor | None = None) -> _PromptSweep:
        """Prepare one prompt's sweep; ``u`` [pos or 1, d_model] replaces the target's covectors."""
        options, d_model = self.options, self.part.out_dim
        start, stop = self.capture.frame.spans[prompt]
        precision = PRECISIONS[options.precision]
        sweep = BatchedSweep(self.part.map, prompt, self.name != "in", precision)
        if self.name == "norm" and options.probes is None:
            # ‖T_ij‖²_F is the sum over all unit vectors e of ‖T_ijᵀ e‖².
            eye = self.capture.frame.eye(d_model)
            return _PromptSweep(
                sweep, d_model, lambda index, part: eye[part].expand(len(index), -1, -1), squares()
            )
        if self.name == "norm" and options.probes is not None:
            generator = torch.Generator().manual_seed(options.seed + prompt)
            g = orthogonal_probes(stop - start, options.probes, d_model, generator)
            g = g.to(self.capture.resid_final)
            return _PromptSweep(
                sweep, options.probes, lambda index, part: g[index][:, part], squares()
            )
        if self.name == "in":
            x = self.state(self.sites[0])[prompt, start:stop]
            return _PromptSweep(sweep, 1, lambda index, part: x[index][:, None], squares())
        u = self.covectors(prompt)[0] if u is None else u
        reduce = squares()
        if self.name == "in_out":
            reduce = dots(self.state(self.sites[0])[prompt, start:stop])
        return _PromptSweep(sweep, 1, lambda index, part: u[index][:, None], reduce)

    def entries(self, found: Tensor) -> Float[Tensor, "query_pos key_pos"]:
        """Turn what a sweep found into entries [destination, source]."""
        if self.name == "in_out":
            return found[:, 0]
        if self.name == "in":  # a push starts at sources
            return _root(found[:, 0]).T
        if self.options.probes is not None:  # E ‖Tᵀ g‖² = ‖T‖²_F / d
            return _root((found * self.part.out_dim).mean(1))
        return _root(found.sum(1))

    def standard_error(self, found: Tensor) -> Float[Tensor, "query_pos key_pos"]:
        """The standard error of an estimated norm, from the spread over its probes."""
        k, d_model = found.shape[1], self.part.out_dim
        samples = found * d_model
        # Drawn without replacement from d orthogonal vectors, so k = d leaves no error.
        of_square = samples.std(1) * math.sqrt((1 - k / d_model) / k)
        return of_square / (2 * samples.mean(1).sqrt()).clamp_min(TINY)  # d√s = ds / 2√s


def _root(x: Tensor) -> Tensor:
    """√x, with the derivative 0 at 0: sources after a destination are 0 whatever the weights."""
    zero = x == 0
    return torch.where(zero, 0, torch.where(zero, 1, x).sqrt())


def _ask(
    name: str,
    capture: Capture,
    operator: FrozenTransformer,
    target: TargetLike,
    layers: tuple[str | int, str | int] | None,
    options: MatrixOptions,
) -> _Question:
    """Step 1: check every argument, and find the part of the operator."""
    if target is not None and name in ("norm", "in"):
        raise ValueError(f"{name!r} takes no target. Drop target=, or ask for 'out' or 'in_out'.")
    if options.probes is not None and name != "norm":
        raise ValueError(
            f"probes= estimates 'norm' only, but the method is {name!r}. Drop probes=."
        )
    layers = (operator.sites[0], FINAL_SITE) if layers is None else layers
    if isinstance(layers, str) or not (isinstance(layers, Sequence) and len(layers) == 2):
        raise ValueError(
            f"layers must be a pair of residual sites, not {layers!r}. Pass two blocks, such as "
            f"(0, 2) for blocks 0 to 2, or two of {', '.join(operator.sites)}."
        )
    part, n_layers = operator.between(*layers), len(capture.blocks)
    start = numbered_site(layers[0], n_layers, "pre")
    sites = str(start), str(numbered_site(layers[1], n_layers, "post"))
    probes = options.probes
    if probes is not None and (not is_int(probes) or not 2 <= probes <= part.out_dim):
        raise ValueError(
            f"probes must be an integer from 2 to d_model = {part.out_dim}, not {probes!r}. "
            "Give one of these, or drop probes= for exact norms."
        )
    if target is not None and operator.site_index(sites[1]) != len(operator.sites) - 1:
        raise ValueError(
            f"A target in logits needs layers up to {FINAL_SITE!r}, not up to {sites[1]!r}. "
            "Drop target=, or end layers there."
        )
    limit = memory_budget(options.memory_limit, capture.frame.device)
    return _Question(name, capture, operator, part, sites, target, options, limit)


# --- The answers ---------------------------------------------------------------------------------


def operator_matrix(
    name: str,
    capture: Capture,
    operator: FrozenTransformer,
    target: TargetLike = None,
    layers: tuple[str | int, str | int] | None = None,
    options: MatrixOptions | None = None,
) -> TokenMatrix:
    """Collapse the operator to a token-by-token matrix (Atad et al. 2026).

    Args:
        name: One of :data:`OPERATOR_METHODS`.
        capture: The captured run.
        operator: The operator of that run.
        target: What u_i reads, for "out" and "in_out". None is the output's own direction
            y_i / ‖y_i‖, and "prediction" the logit of each position's own prediction. A token, id
            or direction is read at every position.
        layers: A pair of residual sites, for that part of the operator only, or the first and the
            last block of that part: (0, 2) is blocks 0 to 2. None is all of it.
        options: Options of the method.

    Returns:
        The matrix of every prompt.

    Raises:
        ValueError: If an argument does not fit the method, or the work the memory limit.
    """
    # 1. The question.
    question = _ask(name, capture, operator, target, layers, options or MatrixOptions())
    frame, probes = capture.frame, question.options.probes
    values = frame.zeros(frame.n_pos)
    error = None if probes is None else frame.zeros(frame.n_pos)
    # 2. and 3. One sweep per prompt.
    for prompt, (here, found) in enumerate(_carried(question)):
        values[prompt, here, here] = question.entries(found)
        if error is not None:
            error[prompt, here, here] = question.standard_error(found)
    # 4. The constants' share.
    constants = totals = None
    if name == "in_out":
        constants, totals = frame.zeros(1)[..., 0], frame.zeros(1)[..., 0]
        bias = question.part.bias
        for prompt, (start, stop) in enumerate(frame.spans):
            here = slice(start, stop)
            u, beside, totals[prompt, here] = question.covectors(prompt)
            constants[prompt, here] = (u * bias[prompt, here]).sum(-1) + beside
    return TokenMatrix(
        kind=name,
        values=values,
        labels=capture.prompts.strings,
        spans=frame.spans,
        convention=capture.convention,
        layers=question.sites,
        constants=constants,
        target_value=totals,
        standard_error=error,
        probes=probes,
    )


def _carried(question: _Question) -> Iterator[tuple[slice, Tensor]]:
    """Where each prompt's tokens are, and what the sweep from all of its positions found."""
    frame = question.capture.frame
    for prompt, (start, stop) in enumerate(frame.spans):
        job = question.sweep(prompt)
        every = torch.arange(stop - start, device=frame.device)
        found = job.sweep.carry(every, job.vectors, job.many, job.reduce, question.limit)
        yield slice(start, stop), found.to(frame.dtype)


def operator_row(
    name: str,
    capture: Capture,
    operator: FrozenTransformer,
    goal: Target,
    options: MatrixOptions | None = None,
) -> Float[Tensor, "batch pos"]:
    """Compute the one row of :func:`operator_matrix` at a target's position, at a row's cost.

    Args:
        name: One of :data:`OPERATOR_METHODS`. "norm" and "in" know only the target's position.
            "out" and "in_out" read by the target's own covector, so that the row of "in_out" and
            the constants' share sum to the target.
        capture: The captured run.
        operator: The operator of that run.
        goal: The target whose position is read.
        options: Options of the method.

    Returns:
        An entry for every token [batch, pos]; 0 at padding.

    Raises:
        ValueError: If an option does not fit the method, or the work the memory limit.
    """
    if name == "in_out" and goal.rows > 1:
        rows = goal.each_row(capture.unembed.final)
        parts = [operator_row(name, capture, operator, row, options) for row in rows]
        # A target that is a mean over rows is linear in them, and so are the entries of "in_out".
        return sum(parts, torch.zeros_like(parts[0]))
    goal.alone(f"token_scores({name!r})")
    question = _ask(name, capture, operator, None, None, options or MatrixOptions())
    frame = capture.frame
    values = frame.zeros(1)[..., 0]
    for prompt, (start, stop) in enumerate(frame.spans):
        job = question.sweep(prompt, goal.covector[prompt : prompt + 1])
        query = goal.query[prompt : prompt + 1] - start
        # A pull starts at the destination alone; pushes are needed from every source.
        at = torch.arange(stop - start, device=frame.device) if name == "in" else query
        found = job.sweep.carry(at, job.vectors, job.many, job.reduce, question.limit)
        entries = question.entries(found.to(frame.dtype))
        values[prompt, start:stop] = entries[query[0] if name == "in" else 0]
    return values


def plan_token_matrix(
    name: str,
    capture: Capture,
    operator: FrozenTransformer,
    target: TargetLike = None,
    layers: tuple[str | int, str | int] | None = None,
    **options: Any,
) -> Plan:
    """Tell what :func:`operator_matrix` would cost, with the same arguments.

    Args:
        name: One of :data:`OPERATOR_METHODS`.
        capture: The captured run.
        operator: The operator of that run.
        target: The target, as for the matrix.
        layers: A pair of residual sites, or None.
        **options: Options of the method, by the names of :class:`MatrixOptions`.

    Returns:
        The plan. Only the machine's rates are measured; no sweep runs.

    Raises:
        ValueError: If the call itself would be refused.
    """
    question = _ask(name, capture, operator, target, layers, matrix_options(name, options))
    frame, jobs, dtype = capture.frame, [], capture.frame.dtype
    for prompt, (start, stop) in enumerate(frame.spans):
        job = question.sweep(prompt)
        every = torch.arange(stop - start, device=frame.device)
        jobs.append(job.sweep.shape(every, job.many, job.reduce))
        dtype = job.sweep.dtype
    notes = (HOST,) if isinstance(capture.blocks[0].attn.mix, RecomputedMix) else ()
    what = f'token_matrix("{name}")'
    return make_plan(what, jobs, question.limit, dtype, frame.device, notes)
