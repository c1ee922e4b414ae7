"""Every way to say which tokens an output is made of, by one call.

The operator's own methods ("norm", "in", "out", "in_out") and the earlier ones have the same names
and arguments everywhere. :func:`token_matrix` tells how much of every token is in every position.
:func:`token_scores` tells how much of one target is due to every token. :data:`METHODS` says what
each method costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..attribution import Target, TargetLike
from ..graph import FINAL_SITE
from ..operator import Capture, FrozenTransformer
from .baselines import BASELINES, baseline_matrix, baseline_scores
from .operator_matrices import OPERATOR_METHODS, matrix_options, operator_matrix, operator_row
from .tables import TokenMatrix, TokenScores


@dataclass(frozen=True)
class Method:
    """What is known of a method before it runs.

    Attributes:
        name: Name by which a user calls the method.
        cost: About what a target's scores cost beyond the capture, in passes of the model.
        source: Paper that published the method.
        needs_model: Whether the real model must be run again.
    """

    name: str
    cost: str
    source: str
    needs_model: bool = False


_OPERATOR_COSTS = {
    "norm": "d_model backwards of one position (or probes=k)",
    "in": "pos forwards",
    "out": "1 backward",
    "in_out": "1 backward",
}

METHODS: dict[str, Method] = {
    name: Method(name, cost, "Atad et al. 2026") for name, cost in _OPERATOR_COSTS.items()
} | {
    row.name: Method(row.name, row.cost, row.source, row.needs_model) for row in BASELINES.values()
}
"""Every method by name, the operator's own first."""


def token_matrix(
    name: str,
    capture: Capture,
    operator: FrozenTransformer,
    target: TargetLike = None,
    layers: tuple[str | int, str | int] | None = None,
    model: Any = None,
    **options: Any,
) -> TokenMatrix:
    """Compute how much of token j is in the output at position i, by one of :data:`METHODS`.

    Args:
        name: Name of the method.
        capture: The captured run.
        operator: The operator of that run.
        target: What the output is read by, for "out" and "in_out"; see :func:`operator_matrix`.
        layers: A pair of residual sites, for the operator's own methods on a part of the model;
            see :func:`operator_matrix`.
        model: The host model of the run, for methods that run it again. Each row of theirs is for
            the model's own prediction at that position.
        **options: Options of the method.

    Returns:
        The matrix of every prompt.

    Raises:
        ValueError: If there is no such method or option, or the model is missing.
    """
    check_method(name, options)
    if name in OPERATOR_METHODS:
        own = matrix_options(name, options)
        return operator_matrix(name, capture, operator, target, layers, own)
    if target is not None or layers is not None:
        wrong = "layers" if target is None else "target"
        more = "" if target is None else ", or ask for token_scores, which takes one"
        raise ValueError(
            f"{wrong}= is for {', '.join(OPERATOR_METHODS)}, not for {name!r}. Drop {wrong}={more}."
        )
    # Earlier methods know no part of a model: theirs are always about the whole.
    sites = (str(operator.sites[0]), FINAL_SITE)
    return TokenMatrix(
        kind=name,
        values=baseline_matrix(name, capture, model, **options),
        labels=capture.prompts.strings,
        spans=capture.frame.spans,
        convention=capture.convention,
        layers=sites,
    )


def token_scores(
    name: str,
    capture: Capture,
    operator: FrozenTransformer,
    goal: Target,
    model: Any = None,
    **options: Any,
) -> TokenScores:
    """Compute how much of a target is due to every token, by one of :data:`METHODS`.

    Args:
        name: Name of the method. A method that knows no target gives its matrix's row at the
            target's position. "out" gives ‖T_jᵀ u‖, and "in_out" uᵀ T_j x_j, with the target's u.
        capture: The captured run.
        operator: The operator of that run.
        goal: The target, as ``attribution.resolve_target`` gives one.
        model: The host model of the run, for methods that run it again.
        **options: Options of the method.

    Returns:
        A score for every token; signed where the method's scores are.

    Raises:
        ValueError: If there is no such method or option, or the model is missing.
    """
    check_method(name, options)
    if name in OPERATOR_METHODS:
        values = operator_row(name, capture, operator, goal, matrix_options(name, options))
    else:
        values = baseline_scores(name, capture, goal, model, **options)
    return TokenScores(
        method=name,
        values=values,
        labels=capture.prompts.strings,
        spans=capture.frame.spans,
        target=goal.name,
        convention=capture.convention,
    )


def check_method(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a method, or an option of the operator's own methods, that does not exist.

    Args:
        name: Name of the method.
        options: Options of the method, by name.

    Raises:
        ValueError: If there is no such method or option.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"There is no method {name!r}. Choose one of {', '.join(METHODS)}.")
    if name in OPERATOR_METHODS:
        matrix_options(name, options or {})
