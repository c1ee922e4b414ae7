"""Every way to say which tokens an output is made of, the operator's and earlier ones, by one call.

The operator's collapses (``collapse``: norm, in, out, in_out) and the baselines have the same names
and arguments everywhere: :func:`token_matrix` is how much of every token is in every position,
:func:`token_scores` how much of one target is due to each. :data:`METHODS` tells what each costs.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..attribution import Target, TargetLike
from ..graph import FINAL_SITE
from ..operator import Capture, FrozenTransformer
from . import baselines
from .baselines import BASELINES
from .operator_matrices import KINDS, token_row
from .operator_matrices import token_matrix as collapse
from .tables import TokenMatrix, TokenScores


@dataclass(frozen=True)
class Method:
    """What is known of a method before it runs.

    Attributes:
        name: What a user types.
        cost: What a target's scores take beyond the capture, about, in passes of the model.
        source: Where it was published.
        needs_model: Whether the real model must be run again.
    """

    name: str
    cost: str
    source: str
    needs_model: bool = False


_OPERATOR = {"norm": "d_model backwards of one position (or probes=k)", "in": "pos forwards",
             "out": "1 backward", "in_out": "1 backward"}  # fmt: skip

METHODS: dict[str, Method] = {
    name: Method(name, cost, "Atad et al. 2026") for name, cost in _OPERATOR.items()
} | {
    row.name: Method(row.name, row.cost, row.source, row.needs_model) for row in BASELINES.values()
}
"""Every method by name, the operator's own first."""


def token_matrix(
    name: str,
    capture: Capture,
    operator: FrozenTransformer,
    target: TargetLike = None,
    layers: tuple[str, str] | None = None,
    model: Any = None,
    **options: Any,
) -> TokenMatrix:
    """How much of token j is in the output at i, by one of :data:`METHODS`.

    Args:
        name: The method.
        capture: The run.
        operator: Its operator.
        target: For "out" and "in_out"; see :func:`collapse.token_matrix`.
        layers: For the operator's own: a part of it.
        model: The host the run came from, for methods that run it again; those give each row for
            the model's own prediction at that position.
        **options: The method's own.

    Returns:
        The matrices.

    Raises:
        ValueError: If there is no such method or option, or the model is missing.
    """
    if check(name, options) in KINDS:
        return collapse(capture, operator, name, target, layers, **options)
    if target is not None or layers is not None:
        what = "layers" if target is None else "target"
        raise ValueError(
            f"{what} is for {', '.join(KINDS)}, got {what}={target if layers is None else layers!r} for "
            f"{name!r}: leave it out" + (", or ask for token_scores" if target is not None else "")
        )
    values = baselines.token_matrix(name, capture, model, **options)
    sites = (str(operator.sites[0]), FINAL_SITE)
    return TokenMatrix(
        name, values, capture.prompts.strings, capture.frame.spans, capture.convention, sites
    )


def token_scores(
    name: str,
    capture: Capture,
    operator: FrozenTransformer,
    goal: Target,
    model: Any = None,
    **options: Any,
) -> TokenScores:
    """How much of a target is due to every token, by one of :data:`METHODS`.

    Args:
        name: The method. Those that know no target give their matrix's row at its position; "out" is
            ‖T_jᵀ u‖ and "in_out" uᵀ T_j x_j with the target's own u.
        capture: The run.
        operator: Its operator.
        goal: From :func:`tensorlens_tl.attribution.targets.resolve_target`.
        model: The host the run came from, for methods that run it again.
        **options: The method's own.

    Returns:
        The scores; signed where the method's are.

    Raises:
        ValueError: If there is no such method or option, or the model is missing.
    """
    if check(name, options) in KINDS:
        values = token_row(capture, operator, name, goal, **options)
    else:
        values = baselines.token_scores(name, capture, goal, model, **options)
    return TokenScores(
        name, values, capture.prompts.strings, capture.frame.spans, goal.name, capture.convention
    )


def check(name: str, options: dict[str, Any] | None = None) -> str:
    """Refuse a method or an option that does not exist.

    Args:
        name: The method.
        options: Its options.

    Returns:
        The name.

    Raises:
        ValueError: If there is none, with a list of all.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; expected one of {', '.join(METHODS)}")
    wrong = set(options or ()) - set(_ROW_OPTIONS)
    if name in KINDS and wrong:
        raise ValueError(
            f"{name} has no option {', '.join(sorted(wrong))}; its options: {', '.join(_ROW_OPTIONS)}"
        )
    return name


_ROW_OPTIONS = tuple(inspect.signature(token_row).parameters)[4:]
