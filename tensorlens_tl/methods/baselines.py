"""Earlier ways to say which tokens a prediction comes from: their list, and one call for all.

:func:`baseline_matrix` asks how much of token j is in position i. :func:`baseline_scores` asks how
much of a target is due to every token. A method is one function and one row of :data:`BASELINES`.
Its formula stands in the function's docstring. The names of its parameters say what it needs:

    capture          the captured run. The function returns a matrix; a target's scores are the row
                     at its position
    live             the real model, to be run again. The function returns scores; a matrix has one
                     row per position, each for the model's own prediction there
    query, covector  a target's positions and its u; a function of a capture may do without

Every other parameter has a default and is an option of the method. Padding is 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Target
from ..operator import Capture
from ..recording import live_models
from ..sublayers import soft_cap_ratio
from .attention_maps import attention_flow, last_layer_attention, mean_attention, random, rollout
from .attnlrp import attnlrp
from .decompx import decompx
from .gradients import chefer, grad_x_input, integrated_gradients
from .value_vectors import alti, globenc, norm_attention, norm_attention_resln
from .value_zeroing import value_zeroing


@dataclass(frozen=True)
class Baseline:
    """One earlier method.

    Attributes:
        name: Name by which a user calls the method.
        function: Function that computes the matrix or the scores.
        cost: About what a target's scores cost beyond the capture, in passes of the model.
        source: Paper that published the method.
    """

    name: str
    function: Callable[..., Tensor]
    cost: str
    source: str

    @property
    def needs_model(self) -> bool:
        """Whether the real model must be run again."""
        return "live" in self._parameters

    @property
    def options(self) -> dict[str, Any]:
        """The method's options and their defaults."""
        return {name: p.default for name, p in self._parameters.items() if name not in _GIVEN}

    def given(self, **known: Any) -> dict[str, Any]:
        """The arguments among ``known`` that the function takes."""
        return {name: value for name, value in known.items() if name in self._parameters}

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters


_GIVEN = ("capture", "live", "query", "covector")
_ROWS = (
    Baseline("mean_attention", mean_attention, "none", "–"),
    Baseline("last_layer_attention", last_layer_attention, "none", "–"),
    Baseline("rollout", rollout, "none", "Abnar & Zuidema 2020"),
    Baseline("attention_flow", attention_flow, "pos maximum flows", "Abnar & Zuidema 2020"),
    Baseline("norm_attention", norm_attention, "1 forward", "Kobayashi et al. 2020"),
    Baseline("norm_attention_resln", norm_attention_resln, "1 forward", "Kobayashi et al. 2021"),
    Baseline("globenc", globenc, "1 forward", "Modarressi et al. 2022"),
    Baseline("alti", alti, "1 forward", "Ferrando et al. 2022"),
    Baseline("value_zeroing", value_zeroing, "pos forwards", "Mohebbi et al. 2023"),
    Baseline("grad_x_input", grad_x_input, "1 forward, 1 backward", "Shrikumar et al. 2016"),
    Baseline(
        "integrated_gradients",
        integrated_gradients,
        "steps + 1 forwards, steps backwards",
        "Sundararajan et al. 2017",
    ),
    Baseline("chefer", chefer, "1 forward, 1 backward", "Chefer et al. 2021"),
    Baseline("attnlrp", attnlrp, "1 forward, 1 backward", "Achtibat et al. 2024"),
    Baseline("decompx", decompx, "pos forwards", "Modarressi et al. 2023"),
    Baseline("random", random, "none", "–"),
)

BASELINES: dict[str, Baseline] = {row.name: row for row in _ROWS}
"""Every earlier method by name."""


def baseline_matrix(
    name: str, capture: Capture, model: Any = None, **options: Any
) -> Float[Tensor, "batch query_pos key_pos"]:
    """Compute how much of every token is in every position, by one of :data:`BASELINES`.

    Args:
        name: Name of the method.
        capture: The captured run.
        model: The host model of the run; only methods that differentiate the model ask for one.
        **options: Options of the method, such as ``steps`` or ``seed``.

    Returns:
        The matrix [batch, query_pos, key_pos]. A method that differentiates the model gives each
        row for the model's own prediction at that position, at one backward pass per position.

    Raises:
        ValueError: If the method or an option does not exist, or the model is missing.
    """
    baseline = _checked_method(name, model, options)
    if not baseline.needs_model:
        return baseline.function(capture, **options)
    if capture.headless or capture.logits.ndim == 2:
        raise ValueError(
            f"{name!r} has a row per position, for the model's own prediction there, and "
            f"{capture.model_name} predicts at one row or none. Call token_scores with a target."
        )
    # One row per position: each asks the real model about its own prediction there.
    frame, u = capture.frame, _predictions(capture)
    with live_models(capture, model) as lives:
        matrix = frame.zeros(frame.n_pos)
        for live in lives:
            prompts, columns = live.place
            for pos, at in enumerate(columns.T):
                query = torch.full_like(at, pos)
                scores = baseline.function(live, query, u[prompts, at], **options)
                # Live prompts have no padding: row pos of theirs is column ``at`` of the batch.
                matrix[prompts[:, None], at[:, None], columns] = frame.cast(scores)
    return matrix


def baseline_scores(
    name: str, capture: Capture, goal: Target, model: Any = None, **options: Any
) -> Float[Tensor, "batch pos"]:
    """Compute how much of a target is due to every token, by one of :data:`BASELINES`.

    Args:
        name: Name of the method.
        capture: The captured run.
        goal: The target. A method that knows no target gives its matrix's row at the target's
            position.
        model: The host model of the run; only methods that differentiate the model ask for one.
        **options: Options of the method, such as ``steps`` or ``seed``.

    Returns:
        A score for every token [batch, pos]; signed where the method's scores are.

    Raises:
        ValueError: If the method or an option does not exist, or the model is missing.
    """
    baseline, frame = _checked_method(name, model, options), capture.frame
    goal.alone(f"token_scores({name!r})")
    if not baseline.needs_model:
        given = baseline.given(query=goal.query, covector=goal.covector)
        found = baseline.function(capture, **given, **options)
        rows = torch.arange(frame.batch, device=frame.device)
        # A function that takes the query has computed the one row alone.
        return found[rows, goal.query] if found.ndim == 3 else found
    with live_models(capture, model) as lives:
        found = frame.zeros(1)[..., 0]
        for live in lives:
            prompts, columns = live.place
            query = goal.query[prompts] - columns[:, 0]  # counted without the padding
            scores = baseline.function(live, query, goal.covector[prompts], **options)
            found[prompts[:, None], columns] = frame.cast(scores)
    return found


def _checked_method(name: str, model: Any, options: dict[str, Any]) -> Baseline:
    if name not in BASELINES:
        raise ValueError(f"There is no method {name!r}. Choose one of {', '.join(BASELINES)}.")
    baseline = BASELINES[name]
    if wrong := options.keys() - baseline.options.keys():
        known = ", ".join(f"{k}={v!r}" for k, v in baseline.options.items())
        remedy = f"Use {known}, or none" if known else "Drop it, as this method has no options"
        raise ValueError(f"{name} has no option {', '.join(sorted(wrong))}. {remedy}.")
    if baseline.needs_model and model is None:
        raise ValueError(f"{name} runs the model again. Pass the captured model as model=.")
    return baseline


def _predictions(capture: Capture) -> Float[Tensor, "batch pos d_model"]:
    """The covector of the model's own prediction at every position; a soft cap's ratio is held."""
    frame, w = capture.frame, capture.unembed.weights
    ids = capture.logits.argmax(-1)
    u = frame.cast(w.W_U.T[ids])
    if (head := capture.unembed.head) is not None:
        # A head between final norm and unembedding is frozen, and part of the readout.
        return head.apply_t(u)
    if w.soft_cap is None:
        return u
    logits = (u * capture.unembed.final).sum(-1, keepdim=True)
    logits = logits if w.b_U is None else logits + frame.cast(w.b_U[ids])[..., None]
    return u * soft_cap_ratio(logits, w.soft_cap)
