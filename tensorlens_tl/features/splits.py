"""A target split by feature: exact for every dictionary, as the error is a row, too.

    m = Σ_pf z_pf ⟨g_p, d_f⟩ + Σ_p ⟨g_p, b_dec⟩ + Σ_p ⟨g_p, ε_p⟩ + the constants after the site

with g the covector of the target at the site, from the same sweep as every other split. Nothing is
cut: the frozen MLPs stay, and features are coordinates of the residual ("basis" reading), or of
what a sublayer adds to it. Then what goes past the sublayer is a row, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from ..attribution import (
    Attribution,
    Source,
    TableBuilder,
    TargetGradient,
    check_sum,
)
from ..checks import spelled
from ..costs import Cost, Plan
from ..graph import Node, at_sites
from ..maps import TINY
from ..operator import FrozenTransformer
from .dictionary import CHUNK_BYTES, FeatureDictionary
from .reading import Reading

ROW_BYTES = 400
"""Bytes of a row's source and label."""
MOST_ERROR = 0.5
"""The share of Σ|rows| from which on a dictionary's errors are warned about."""


@spelled
def by_feature(gradient: TargetGradient, readings: Sequence[Reading]) -> Attribution:
    """Split a target by the features of one site, or of several sites.

    Args:
        gradient: The target, pulled to every site.
        readings: The features of each site.

    Returns:
        Rows for every active feature, error and b_dec by position, for what goes past a sublayer,
        and for constants after the site. They sum to the target. Of several sites, the rows of each
        sum to the target, and all constants after a site are one row.

    Raises:
        ValueError: If a site comes after the target's.
        CaptureMismatchError: If the rows of a site do not sum to the target, up to rounding.
    """
    tables = [_of_site(gradient, reading, len(readings) == 1) for reading in readings]
    parts = [check_sum(table.to_attribution("feature"), gradient) for table in tables]
    for reading, part in zip(readings, parts, strict=True):
        _warn(reading, part)
    if len(parts) == 1:
        return parts[0]
    whole = TableBuilder(gradient.capture, gradient.target)
    for table in tables:
        whole.sources += table.sources
        whole.values += table.values
    return whole.to_attribution("feature", sums=False)


@spelled
def error_shares(found: Attribution) -> dict[str, Float[Tensor, "prompt pos"]]:
    """What share of a split by feature is error, by site and position.

    Args:
        found: A split by feature.

    Returns:
        |error| / Σ|rows| at every position of a site, by the name of the site, such as "L2.pre".
        What goes past a sublayer, and constants after the site, count in neither.

    Raises:
        ValueError: If the split has no errors.

    Example:
        >>> import torch
        >>> from tensorlens_tl import demo, features
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> W = torch.eye(128)
        >>> weights = {"W_enc": W, "W_dec": W, "b_enc": W[0] * 0, "b_dec": W[0] * 0}
        >>> sae = features.load(weights, site="blocks.2.hook_resid_pre")
        >>> shares = features.error_shares(lens.attribute("Paris", by="feature", saes=sae))
        >>> {site: share.shape for site, share in shares.items()}
        {'L2.pre': torch.Size([1, 6])}
    """
    sizes = _sizes(found)
    if not sizes:
        raise ValueError("The split has no error rows. Pass one that attribute(by='feature') made.")
    return {site: error / whole.clamp_min(TINY) for site, (error, whole) in sizes.items()}


def _sizes(found: Attribution) -> dict[str, tuple[Tensor, Tensor]]:
    """Σ|error| and Σ|rows| at every position of every site [prompt, pos]."""
    n_pos, sizes = max(stop for _, stop in found.spans), {}
    for site, rows in at_sites(found.sources).items():
        error, whole = found.values.new_zeros(2, len(found), n_pos)
        for i in rows:
            source, size = found.sources[i], found.values[:, i].abs()
            whole[:, source.pos] += size
            if getattr(source.node, "kind", "") == "error":
                error[:, source.pos] += size
        sizes[site] = error, whole
    return sizes


@spelled
def plan_by_feature(
    operator: FrozenTransformer,
    dictionaries: Sequence[FeatureDictionary],
    known: Mapping[FeatureDictionary, Reading],
    what: str,
) -> Plan:
    """Predict what a split by feature costs: the sweep, and every dictionary read and multiplied.

    Args:
        operator: The operator of the run.
        dictionaries: The SAEs and transcoders.
        known: What is read already. Of others at most k features fire at a position, or all.
        what: Name of what is planned, for display.

    Returns:
        The plan. Nothing has run but products that measure the machine.
    """
    frame, cost, kept = operator.frame, Cost(), 0
    rows, size = frame.batch * frame.n_pos, frame.dtype.itemsize
    for one in dictionaries:
        read, d_out = known.get(one), one.W_dec.shape[-1]
        n = rows * (one.k or one.d_sae) if read is None else len(read.at)
        cost.product += 2 * n * d_out  # ⟨covector, d⟩ of what fires
        if read is None:  # encoded, and the error in float64
            cost.product += 2 * rows * one.d_in * one.d_sae + 2 * n * d_out
            cost.moved += 3 * rows * one.d_sae + 4 * n * d_out
        cost.moved += 2 * n * d_out
        cost.calls += 100 + n  # a row of the table each
        kept += n * (16 + 2 * size + ROW_BYTES) + 3 * rows * d_out * size + 2 * CHUNK_BYTES
    return operator.plan_pull(what, cost, kept)


def _of_site(gradient: TargetGradient, reading: Reading, apart: bool) -> TableBuilder:
    operator, trace, place = gradient.operator, gradient.trace, reading.place
    reading.check_below(operator)
    g, table = place.covectors(trace), TableBuilder(gradient.capture, gradient.target)
    batch, n_pos = g.shape[:2]
    # 1. The features that fire, one row per position and feature.
    keys, rows = reading.spots
    values = g.new_zeros(batch * len(keys))
    values.index_add_(0, (reading.at // n_pos) * len(keys) + rows, reading.shares(g))
    d_sae = reading.dictionary.d_sae
    pairs = [divmod(key, d_sae) for key in keys.tolist()]
    nodes = {feature: reading.node(feature) for feature in {feature for _, feature in pairs}}
    table.sources += [Source(nodes[feature], pos) for pos, feature in pairs]
    table.values.append(values.view(batch, -1))
    # 2. What the dictionary adds everywhere, and what it leaves out.
    for node, effect in reading.beside(g).items():
        table.spread(node, effect)
    if place.step is not None:
        table.spread(reading.beside_node("past"), place.past(trace))
    # 3. The constants after the site.
    after = {n: trace.effects[n].sum(-1) for n in place.constants_after(operator, trace)}
    if apart:
        for name, effect in after.items():
            table.add([Node.parse(name)], effect[:, None])
        table.add_constants()
    else:
        rest = sum(after.values(), gradient.target.constant)
        table.add([reading.constant("after")], rest[:, None])
    return table


def _warn(reading: Reading, part: Attribution) -> None:
    """Say so where a dictionary leaves out more than it explains."""
    error, whole = _sizes(part)[reading.site]
    share = float(error.sum() / whole.sum().clamp_min(TINY))
    if share > MOST_ERROR:
        warnings.warn(
            f"The error of {reading.dictionary} is {share:.0%} of Σ|·| there, more than its "
            "features. Do not read the features as the whole.",
            stacklevel=6,
        )
