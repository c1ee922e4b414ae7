"""The k largest paths from a source to a target: exact search under a bound, level by level.

A path starts at a source: a token's embedding, a position's embedding, or a constant. It passes
heads and MLPs, at most one in each step x → x + Σ nodes(x) of the residual stream, and ends at the
target. The target is the sum over all paths. There are too many to look at, and products of norms
prune nothing, so the search needs a better bound:

1. The empty path is the target's covector v below the final norm. Partial paths grow downwards.
2. A beam of few partial paths, those that read most of the state below them (the sum over all their
   completions), finds large paths. The k-th largest is a threshold.
3. Build the bounds, once, from below: C = Σ s sᵀ over the states s of all ways from any source to a
   site, per position p (``bounds``). No completion of v contributes more than Σ_p √(v_pᵀ C_p v_p),
   since C_p holds its own s_p s_pᵀ.
4. Go down again, with *all* partial paths at a site whose bound is above the threshold. The k found
   are the k largest.

With ``by_position`` a path is a sequence of nodes at given positions. A state then lives at one
position, the weights of a head enter squared, and vᵀ C_p v is exactly Σ (v · s_p)² over the ways.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..attribution import Target
from ..checks import at_least_one, place_label
from ..graph import CONTENTS, Node
from ..maps import DENSE_LIMIT
from ..operator import Capture, FrozenTransformer
from .bounds import NodeMap, StepParts, bounds_by_step
from .results import Path, Paths
from .sweep import Beam, Best, Bounded, Partials, PathSweep

WIDTH = 32
"""Partial paths in the beam."""


def find_paths(
    capture: Capture,
    operator: FrozenTransformer,
    target: Target,
    k: int = 10,
    from_token: int | None = None,
    by_position: bool = False,
    constants: bool = True,
    max_expansions: int = 100_000,
    memory_limit: int = DENSE_LIMIT,
    progress: bool = True,
    cache: dict[Any, Any] | None = None,
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
        max_expansions: How many partial paths to extend. Every step has a part of what is left.
            Where that is not enough, the largest bounds go on, and the search is not exact.
        memory_limit: Bytes that the bounds may take. Whole bounds are about (n_layers + 1) · pos ·
            d_model² numbers. Where that is more, low-rank bounds serve: the search stays exact but
            takes longer.
        progress: Whether to show progress bars on standard error after 2 s: of the bounds, then of
            the steps of the search.
        cache: Keeps the bounds for further targets of the same run, or None.

    Returns:
        At most k paths. ``exact`` and ``largest_unexplored`` tell what is known of the others.
        After an interruption from the keyboard, the paths so far.

    Raises:
        ValueError: If there are several prompts, if there is no such token, if ``k`` or
            ``max_expansions`` is below 1, or if the bounds do not fit in memory.

    Source: branch and bound, Land & Doig (1960), with a beam's paths as the first bound.
    """
    cache = {} if cache is None else cache
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

    # 1. The empty path: the target's covector below the final norm.
    steps = [StepParts.of(step, i) for i, step in enumerate(operator.steps)]
    best = Best(k)
    u = frame.zeros(operator.out_dim)
    u[:, target.query] = target.covector
    at = int(target.query) if by_position else None
    if constants:  # those above the last site
        for name, constant in target.constants.items():
            best.offer(float(constant), (name, None, (), ()))
        for name, constant in ln_final.constants().items():
            best.offer(float((u * constant).sum()), (name, at, (), ()))
    # The pull through the final norm makes it a covector of the residual, where paths end.
    start = Partials(ln_final.apply_t(u), [()], [()], [at])
    sweep = PathSweep(steps, sources, constants, by_position, best)
    expansions, exact, left = 0, False, math.inf
    try:
        # 2. A beam: its paths are most of the largest, and make a threshold.
        sweep.run(start, Beam(sweep, operator, WIDTH + min(k, WIDTH)))
        # 3. The bounds, and all partial paths that may still be larger.
        key = (from_token, by_position, constants, memory_limit)
        if key not in cache:
            cache.clear()
            cache[key] = bounds_by_step(
                steps, sources, constants, by_position, memory_limit, progress
            )
        bounds, top = cache[key]
        search = Bounded(sweep, bounds, top, budget, memory_limit, progress)
        search.run(start)
        expansions, exact = search.expansions, search.cut <= best.threshold
        left = max(best.left_out, search.left_out, search.cut)
    except KeyboardInterrupt:  # the paths so far, and nothing is known of all others
        pass
    # 4. The k largest, and what is known of all others.
    rows = sorted(best.heap, key=lambda row: (-row[0], -row[1]))
    return Paths(
        paths=tuple(_path(capture, by_position, value, *key) for _, _, value, key in rows),
        target=target.name[0],
        target_value=float(target.value),
        exact=exact,
        largest_unexplored=left,
        expansions=expansions,
        convention=capture.convention,
    )


def _path(
    capture: Capture,
    by_position: bool,
    value: float,
    name: str,
    at: int | None,
    passed: tuple[NodeMap, ...],
    positions: tuple[int, ...],
) -> Path:
    start = capture.frame.spans[0][0]
    pos, label = (None, name) if at is None else (at - start, f"{name}@{at - start}")
    if name in CONTENTS and pos is not None:
        label = place_label(capture.prompts.strings[0][pos], pos)
    where = tuple(p - start for p in positions) if by_position else None
    return Path(
        Node.parse(name), pos, tuple(node_map.node for node_map in passed), where, value, label
    )
