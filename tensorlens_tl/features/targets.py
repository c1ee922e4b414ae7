"""A feature's activation as a target: a functional of what its encoder reads."""

from __future__ import annotations

import torch

from ..attribution import Target
from ..checks import spelled
from ..graph import resid_site, site_parts
from ..maps import take_row
from ..operator import Capture
from .dictionary import Feature
from .places import place_of
from .reading import check_fits


@spelled
def site_of_target(
    target: object, versus: object, site: str | int | None, baseline: object = None
) -> str | int | None:
    """Give the site that a target is read at; refuse what does not go with a feature.

    Args:
        target: The feature, or any other target.
        versus: What the user subtracts; None beside a feature.
        site: The site that the user named; None beside a feature.
        baseline: The baseline that the user named; None beside a feature.

    Returns:
        The site of the feature's dictionary; ``site`` for any other target.

    Raises:
        ValueError: If one of the three is given beside a feature, or it reads inside a block.
    """
    if not isinstance(target, Feature):
        return site
    given = {"versus": versus, "site": site, "baseline": baseline}
    if names := [f"{name}=" for name, value in given.items() if value is not None]:
        raise ValueError(
            f"{', '.join(names)} cannot be combined with a feature as the target. Ask about "
            f"feature {target.index} alone."
        )
    site = target.dictionary.site
    if site_parts(site)[0] < 0:
        raise ValueError(
            f"Feature {target.index} reads {site!r}, and a feature is a target at a residual site "
            f"alone. Pass one of an SAE of such a site, such as {resid_site(2, 'pre')!r}."
        )
    return site


@spelled
def feature_target(feature: Feature, capture: Capture, pos: int) -> Target:
    """Make a target of a feature's activation z = slope · a, a = w · n(x) + b, at one position.

    The slope is held: 1 where the feature fires, z / a for a tanh, 0 where it does not fire. So are
    the scales of the dictionary's own norm.

    Args:
        feature: The feature that fires.
        capture: The run up to the site that the feature reads.
        pos: The position among the real tokens; −1 is the last.

    Returns:
        The functional ⟨w, x⟩ · slope and its constants b_enc and −w · b_dec.

    Raises:
        ValueError: If the feature fires at that position of no prompt, or its dictionary does not
            fit the model.
    """
    dictionary, i = feature.dictionary, feature.index
    check_fits(dictionary, capture)
    layer, place = place_of(dictionary.site)
    _check_not_spliced(capture, f"L{layer}.{dictionary.site.rpartition('.')[2]}[sae]")
    query = capture.frame.index(pos)
    x = take_row(capture.frame.cast(capture.resid_final), query)[:, 0]
    pre = dictionary.pre_activations(x)
    a, z = pre[0][:, i], dictionary.activations(*pre)[:, i]
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
    name = f"L{layer}.{place}"
    constants = {f"{name}.b_enc": slope * dictionary.b_enc[i].to(x)}
    if dictionary.centered:
        constants[f"{name}.b_dec"] = -slope * (dictionary.b_dec.to(x) @ w)
    label = f"{name}F{i}" + (" before its activation" if feature.pre else "")
    value = a if feature.pre else z
    return Target((label,) * len(query), query, shifted, constants, value)


def _check_not_spliced(capture: Capture, name: str) -> None:
    """Refuse the site of a spliced SAE: its features read what stood there before."""
    last = capture.blocks[-1:]
    edits = {edit.name for block in last for edit in (*block.mid_edits, *block.post_edits)}
    if name in edits or name in capture.embeddings:
        raise ValueError(
            f"An SAE is spliced in where the feature reads, and left {name!r}. Capture the model "
            "without it (model.reset_saes()), and ask there."
        )
