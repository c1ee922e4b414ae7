"""A feature's activation as a target: a functional of what its encoder reads.

A target is read at a residual site. An encoder that reads an MLP's input reads the site before the
MLP through the MLP's norm; one that reads the MLP's output reads that site through the MLP, too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..attribution import Target
from ..checks import spelled
from ..graph import resid_site
from ..maps import put_row, take_row
from ..operator import Capture, FrozenTransformer
from .dictionary import Feature, FeatureDictionary
from .places import Place, input_of, place_of
from .reading import check_model, check_width


@spelled
def site_of_target(
    target: object,
    versus: object,
    site: str | int | None,
    operator: FrozenTransformer,
    baseline: object = None,
) -> str | int | None:
    """Give the site that a target is read at; refuse what does not go with a feature.

    Args:
        target: The feature, or any other target.
        versus: What the user subtracts; None beside a feature.
        site: The site that the user named; None beside a feature.
        operator: The operator of the run.
        baseline: The baseline that the user named; None beside a feature.

    Returns:
        The residual site that the feature's dictionary reads, through the MLP where it stands in
        one; ``site`` for any other target.

    Raises:
        ValueError: If one of the three is given beside a feature, or it reads what heads write.
    """
    if not isinstance(target, Feature):
        return site
    given = {"versus": versus, "site": site, "baseline": baseline}
    if names := [f"{name}=" for name, value in given.items() if value is not None]:
        raise ValueError(
            f"{', '.join(names)} cannot be combined with a feature as the target. Ask about "
            f"feature {target.index} alone."
        )
    return operator.sites[_read_at(target.dictionary, operator)[0]]


def _read_at(
    dictionary: FeatureDictionary, operator: FrozenTransformer
) -> tuple[int, Place | None]:
    """The residual site that a dictionary reads, and its place; None where it is an MLP's input."""
    name = place_of(dictionary.site)[1]
    if name in ("attn_out", "z"):
        raise ValueError(
            f"A feature of {dictionary.site!r} is no target: heads move what it reads between "
            f"positions. Pass one of an MLP, or of a site such as {resid_site(2, 'pre')!r}."
        )
    if not name:
        return Place.read_by(dictionary, operator)[0], None
    place = Place.of(dictionary.site, operator)
    return place.index, place


@spelled
def feature_target(
    feature: Feature, capture: Capture, operator: FrozenTransformer, pos: int
) -> Target:
    """Make a target of a feature's activation z = slope · a, a = w · n(x) + b, at one position.

    The slope is held: 1 where the feature fires, z / a for a tanh, 0 where it does not fire. So are
    the scales of the dictionary's own norm.

    Args:
        feature: The feature that fires.
        capture: The captured run.
        operator: The operator of that run.
        pos: The position among the real tokens; −1 is the last.

    Returns:
        The functional ⟨w, x⟩ · slope of the residual and its constants: b_enc, −w · b_dec, and
        those of the norm and the MLP between the residual and what the encoder reads.

    Raises:
        ValueError: If the feature fires at that position of no prompt, or its dictionary does not
            fit the model.
    """
    dictionary, i = feature.dictionary, feature.index
    check_model(dictionary, capture)
    _, place = _read_at(dictionary, operator)
    if place and place.step is None and place.splice(operator, capture) is not None:
        raise ValueError(
            f"An SAE is spliced in where the feature reads, and left {place.splice_name!r}. "
            "Capture the model without it (model.reset_saes()), and ask there."
        )
    query, there = capture.frame.index(pos), input_of(dictionary, operator, capture)
    check_width("reads", dictionary, dictionary.d_in, dictionary.site, there)
    x = take_row(there, query)[:, 0]
    pre = dictionary.pre_activations(x)
    a, z = pre[0][:, i], dictionary.activations(*pre)[:, i]
    # act(a) = slope · a at this run, as a model's own activation is frozen to a ratio.
    slope = torch.ones_like(a) if feature.pre else (z != 0).to(a)
    if dictionary.activation == "tanh-relu" and not feature.pre:
        slope = torch.where(z != 0, z / a, 0)
    if not bool(slope.any()):
        raise ValueError(
            f"Feature {i} of {dictionary.site} does not fire at pos={pos}. Pass another pos=, or "
            f"feature({i}, pre=True) to ask about its pre-activation."
        )
    norm, w = dictionary.normed(x), dictionary.covector(i).to(x)
    shifted = (slope[:, None] * norm.scale) * w
    if dictionary.norm == "layer_norm":  # ⟨x − mean x, w⟩ = ⟨x, w − mean w⟩
        shifted = shifted - shifted.mean(-1, keepdim=True)
    _, layer, *_, point = dictionary.site.split(".")
    name = f"L{layer}.{place_of(dictionary.site)[1] or point.partition('_')[2]}"
    covector, constants = _at_residual(dictionary, place, operator, shifted, query)
    constants[f"{name}.b_enc"] = slope * dictionary.b_enc[i].to(x)
    if dictionary.centered:
        constants[f"{name}.b_dec"] = -slope * (dictionary.b_dec.to(x) @ w)
    label = f"{name}F{i}" + (" before its activation" if feature.pre else "")
    value = a if feature.pre else z
    return Target((label,) * len(query), query, covector, constants, value)


def _at_residual(
    dictionary: FeatureDictionary,
    place: Place | None,
    operator: FrozenTransformer,
    u: Float[Tensor, "batch d_in"],
    query: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch d_model"], dict[str, Float[Tensor, " batch"]]]:
    """Pull a covector at what is read back to the residual, at one position of each prompt."""
    effects: dict[str, Tensor] = {}
    if place is None:  # an MLP's input
        norm = Place.read_by(dictionary, operator)[1]
        u = u if norm is None else norm.row(query).apply_t(u[:, None], effects)[:, 0]
    elif place.step is not None:  # its output
        # An MLP mixes no positions, so what is read at one position is of that position alone.
        c, u = put_row(u[:, None], query, operator.frame.n_pos), torch.zeros_like(u)
        for branch in place.branches:
            pull = branch.pull_at(c, query)
            u = u + take_row(pull.covector, query)[:, 0]
            for own, effect in pull.effects.items():
                effects[own] = effects.get(own, 0) + effect
    return u, {own: effect.sum(-1) for own, effect in effects.items()}
