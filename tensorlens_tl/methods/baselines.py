"""Earlier ways to say which tokens a prediction comes from, all behind one call.

:func:`token_matrix` asks how much of token j is in position i, :func:`token_scores` how much of a
target is due to each token. A method is one function and one row of :data:`BASELINES`; its formula
and what its numbers mean are told by the function. What it needs is told by its parameters' names:

    capture          the run; the function returns a matrix, and the row at a target's position is
                     taken for its scores
    live             the real model, to be run once more; the function returns scores, and a matrix
                     has one row per position, each for the model's own prediction there
    query, covector  a target's positions and its u; a function of a capture may do without

Whatever other parameters there are, all with defaults, are the method's options. Padding is 0.
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
from ..hosts import live_models
from ..operator import Capture
from ..sublayers import soft_cap_ratio
from .attention_maps import attention_flow, last_layer_attention, mean_attention, random, rollout
from .attnlrp import attnlrp
from .gradients import chefer, grad_x_input, integrated_gradients
from .value_vectors import (
    alti,
    decompx,
    globenc,
    norm_attention,
    norm_attention_resln,
    value_zeroing,
)


@dataclass(frozen=True)
class Baseline:
    """One method.

    Attributes:
        name: What a user types.
        function: What computes it.
        cost: What a target's scores take beyond the capture, about, in passes of the model.
        source: Where it was published.
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
        """Its options and their defaults."""
        return {name: p.default for name, p in self._parameters.items() if name not in _GIVEN}

    def given(self, **known: Any) -> dict[str, Any]:
        """Those of some arguments that the function takes."""
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
    Baseline("integrated_gradients", integrated_gradients,
             "steps + 1 forwards, steps backwards", "Sundararajan et al. 2017"),
    Baseline("chefer", chefer, "1 forward, 1 backward", "Chefer et al. 2021"),
    Baseline("attnlrp", attnlrp, "1 forward, 1 backward", "Achtibat et al. 2024"),
    Baseline("decompx", decompx, "pos forwards", "Modarressi et al. 2023"),
    Baseline("random", random, "none", "–"),
)  # fmt: skip

BASELINES: dict[str, Baseline] = {row.name: row for row in _ROWS}
"""Every method by name."""


def token_matrix(
    name: str, capture: Capture, model: Any = None, **options: Any
) -> Float[Tensor, "batch query_pos key_pos"]:
    """How much of every token is in every position, by one of :data:`BASELINES`.

    Args:
        name: The method.
        capture: The run.
        model: The host it came from; only methods that differentiate it ask for it.
        **options: The method's own, such as ``steps`` or ``seed``.

    Returns:
        The matrix, destination first. A method that differentiates the model gives each row for the
        model's own prediction at that position, at a backward pass per position.

    Raises:
        ValueError: If the method or an option does not exist, or the model is missing.
    """
    baseline = _checked(name, model, options)
    if not baseline.needs_model:
        return baseline.function(capture, **options)
    frame, u = capture.frame, _predictions(capture)
    with live_models(capture, model) as lives:
        matrix = frame.zeros(frame.n_pos)
        for live in lives:
            prompts, columns = live.place
            for pos, at in enumerate(columns.T):
                query = torch.full_like(at, pos)
                scores = baseline.function(live, query, u[prompts, at], **options)
                matrix[prompts[:, None], at[:, None], columns] = frame.cast(scores)
    return matrix


def token_scores(
    name: str, capture: Capture, goal: Target, model: Any = None, **options: Any
) -> Float[Tensor, "batch pos"]:
    """How much of a target is due to every token, by one of :data:`BASELINES`.

    Args:
        name: The method.
        capture: The run.
        goal: From :func:`tensorlens_tl.attribution.targets.resolve_target`. Methods that know no target give
            their matrix's row at its position.
        model: The host the run came from; only methods that differentiate it ask for it.
        **options: The method's own, such as ``steps`` or ``seed``.

    Returns:
        The scores; signed where the method's are.

    Raises:
        ValueError: If the method or an option does not exist, or the model is missing.
    """
    baseline, frame = _checked(name, model, options), capture.frame
    if not baseline.needs_model:
        given = baseline.given(query=goal.query, covector=goal.covector)
        found = baseline.function(capture, **given, **options)
        rows = torch.arange(frame.batch, device=frame.device)
        return found[rows, goal.query] if found.ndim == 3 else found
    with live_models(capture, model) as lives:
        found = frame.zeros(1)[..., 0]
        for live in lives:
            prompts, columns = live.place
            query = goal.query[prompts] - columns[:, 0]
            scores = baseline.function(live, query, goal.covector[prompts], **options)
            found[prompts[:, None], columns] = frame.cast(scores)
    return found


def _checked(name: str, model: Any, options: dict[str, Any]) -> Baseline:
    if name not in BASELINES:
        raise ValueError(f"no method {name!r}; expected one of {', '.join(BASELINES)}")
    baseline = BASELINES[name]
    if wrong := options.keys() - baseline.options.keys():
        known = ", ".join(f"{k}={v!r}" for k, v in baseline.options.items()) or "none"
        raise ValueError(f"{name} has no option {', '.join(sorted(wrong))}; its options: {known}")
    if baseline.needs_model and model is None:
        raise ValueError(f"{name} differentiates the model: pass model=, the one that was captured")
    return baseline


def _predictions(capture: Capture) -> Float[Tensor, "batch pos d_model"]:
    """The covector of the model's own prediction at every position."""
    frame, w = capture.frame, capture.unembed.weights
    ids = capture.logits.argmax(-1)
    u = frame.cast(w.W_U.T[ids])
    if w.soft_cap is None:
        return u
    logits = (u * capture.unembed.final).sum(-1, keepdim=True)
    logits = logits if w.b_U is None else logits + frame.cast(w.b_U[ids])[..., None]
    return u * soft_cap_ratio(logits, w.soft_cap)
