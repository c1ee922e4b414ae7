"""Edits along features, and circuits of features proved in the real model.

A feature is edited by adding (z′ − z) d where z was its activation: what the dictionary leaves out
stays as it is. In a circuit of features all others of their sites get an activation z′ of 0, their
mean, or theirs in another run; z follows from the run that is edited, so sites may be several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..circuits import Faithfulness
from ..features import Feature, FeatureDictionary, Reading
from ..hosts import adapt
from ..operator import Capture
from ..readers import alone
from ..recording import freeze
from .asking import Asked
from .edit import Edit
from .goals import Goal
from .real_runs import Hook, check_same, groups
from .smallest import smallest

REPLACED = ("zero", "mean", "resample")
"""What the activations of features outside a circuit become."""


def edit_along(
    asked: Asked,
    goal: Goal,
    reading: Reading,
    feature: Feature,
    to: int | float | None,
    by: int | float | None,
    activation: int | float | None,
) -> Edit:
    """Edit a run along one feature.

    Args:
        asked: Run, place and positions.
        goal: The target that is to change.
        reading: The features of the run.
        feature: The feature along whose decoder row the edit is.
        to: The value of the target that is wanted, in logits, or None.
        by: The change of the target that is wanted, in logits, or None.
        activation: The activation that the feature gets, or None. Give one of the three.

    Returns:
        The edit, with what it predicts.

    Raises:
        ValueError: If not one of the three is given, or the target does not depend on the feature.
    """
    if sum(value is not None for value in (to, by, activation)) != 1:
        raise ValueError("along= needs one of to=, by= and activation=. Give one of the three.")
    shape = asked.where.shape
    d = feature.dictionary.W_dec[feature.index].to(asked.state)
    d = reading.unscale.view(shape)[..., None] * d * asked.where[..., None]
    if activation is not None:
        return asked.edit(goal, (activation - reading.acts_of(feature.index))[..., None] * d)
    target = goal.on(asked.capture)
    change = torch.full_like(target.value, by or 0.0) if to is None else to - target.value
    g = asked.covector(target)
    size = (d * d).sum(-1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)
    along = (g * d).sum(-1, keepdim=True) / size * d
    return asked.edit(goal, smallest(along[:, None], change[:, None].to(g), asked.metric), g)


def faithfulness_of_features(
    model: Any,
    capture: Capture,
    goal: Goal,
    readings: Sequence[Reading],
    kept: Sequence[Feature],
    ablation: str,
    corrupted: Sequence[Reading] | None,
    seed: int,
) -> Faithfulness:
    """Run the real model with all features but some replaced, their errors kept.

    Args:
        model: The model of the run.
        capture: The captured run.
        goal: The target that is measured.
        readings: The features of every site in the run.
        kept: The features of the circuit.
        ablation: What replaces the others' activations, one of :data:`REPLACED`.
        corrupted: The features of every site in another run, for "resample".
        seed: Seed of the bootstrap over prompts.

    Returns:
        The target in the run, in the circuit, and with all features replaced.

    Raises:
        ValueError: If an argument does not fit.
    """
    if ablation not in REPLACED:
        raise ValueError(f"ablation={ablation!r} does not exist. Use one of {', '.join(REPLACED)}.")
    if (ablation == "resample") != (corrupted is not None):
        raise ValueError(
            f"ablation={ablation!r} and corrupted= do not go together. Pass corrupted= with "
            "ablation='resample', and only there."
        )
    sites = {reading.dictionary: set() for reading in readings}
    for one in kept:
        if not isinstance(one, Feature) or one.dictionary not in sites:
            raise ValueError(f"keep= has {one!r}, which is no feature of saes=. Pass those alone.")
        sites[one.dictionary].add(one.index)
    adapter = adapt(model)
    check_same(adapter, capture)
    for reading in readings:
        if reading.place == "mid" and "resid_mid" in adapter.before_edits:
            raise ValueError(
                f"{reading.dictionary.site} cannot be edited in {adapter.name}, which adds to the "
                "residual beside it. Pass an SAE of what a block reads or leaves."
            )
    others = corrupted or readings
    replaced = [_replaced(r, o, ablation) for r, o in zip(readings, others, strict=True)]
    full = goal.on(capture).value
    found = []
    for keep in (sites, {dictionary: set() for dictionary in sites}):
        values = torch.zeros_like(full)
        for rows, columns, ids in groups(capture.prompts):
            hooks = [
                _hook(r, z[rows[:, None], columns], keep[r.dictionary])
                for r, z in zip(readings, replaced, strict=True)
            ]
            with alone(adapter.model), adapter.model.hooks(fwd_hooks=hooks):
                given = adapter.all_real(ids)
                _, run = freeze(adapter, ids, dtype=capture.frame.dtype, **given)
            values[rows] = goal.on(run, rows.tolist()).value.to(values)
        found.append(values)
    active = sum(len(reading.features.unique()) for reading in readings)
    n = len({(id(one.dictionary), one.index) for one in kept})
    circuit, ablated = found
    return Faithfulness(
        full,
        ablated,
        ablated,
        circuit,
        ablation,
        "live",
        n,
        active,
        seed,
        first_token=capture.convention.first_token,
        parts="features",
    )


def _replaced(reading: Reading, other: Reading, ablation: str) -> Float[Tensor, "batch pos d_sae"]:
    """The activations that features get outside a circuit."""
    batch, n_pos = reading.error.shape[:2]
    d_sae = reading.dictionary.d_sae
    z = reading.acts.new_zeros(batch * n_pos, d_sae)
    if ablation != "zero":
        if other.error.shape != reading.error.shape:
            raise ValueError(
                f"corrupted= has prompts of shape {list(other.error.shape[:2])}, and this lens "
                f"{[batch, n_pos]}. Pass prompts of the same lengths."
            )
        z[other.at, other.features] = other.acts
    if ablation == "mean":
        z[:] = z.sum(0) / max(1, reading.n_real)
    return z.view(batch, n_pos, d_sae)


def _hook(reading: Reading, other: Float[Tensor, "batch pos d_sae"], kept: set[int]) -> Hook:
    """The hook that replaces all activations but those of a circuit."""
    dictionary: FeatureDictionary = reading.dictionary
    columns = sorted(kept)

    def replace(x: Tensor, hook: Any) -> Tensor:
        y = x.to(other)
        moved = other - dictionary.encode(y)
        moved[..., columns] = 0
        change = moved @ dictionary.W_dec.to(y) * dictionary.normed(y).unscale
        return x + change.to(x)

    return reading.hook, replace
