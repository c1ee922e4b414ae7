"""The rows of a feature graph: which features are kept, and what each of them reads.

1. One sweep in which features pass on what they read finds the total effect of every feature, and
   the share of errors in every MLP. The features of the largest effects are kept.
2. The targets, and then the features of one MLP after another, are pulled down to all writers. A
   chunk of covectors is swept together.
3. Effects of nodes, influence and scores follow from the weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Target
from ..checks import at_least_one, progress_bar
from ..costs import Cost, Plan
from ..exports import Answer, cumulative
from ..features import FeatureDictionary
from ..graph import CONTENTS, Node
from ..maps import TINY
from ..operator import Capture, FrozenTransformer
from .feature_graph import MOST_ERROR, REST, FeatureGraph, FeatureNode
from .frozen_model import ReplacementModel, Shares, check_transcoders
from .influence import Influence

Row = tuple[Tensor, dict[str, Tensor], Tensor]
"""What some readers read: of tokens, features and errors; of constants by name; and of the rest."""
CHUNK_BYTES = 2**26
"""Bytes that the covectors of a chunk of readers may take at one site."""


def find_feature_graph(
    model: ReplacementModel,
    targets: Sequence[Target],
    shares: Sequence[float],
    answers: Sequence[Answer],
    max_features: int = 5000,
    prompt: str = "",
    progress: bool = True,
) -> FeatureGraph:
    """Find what every feature and target is made of.

    Args:
        model: The replacement model of one prompt.
        targets: The targets, at one position each.
        shares: How much each target counts.
        answers: The tokens of every target.
        max_features: How many features are nodes, by total effect. All others are one writer.
        prompt: The prompt as one text.
        progress: Whether to show a bar.

    Returns:
        The graph with its scores.

    Raises:
        ValueError: If ``max_features`` is below 1.
    """
    max_features = at_least_one(max_features, "max_features")
    frame, capture = model.operator.frame, model.capture
    start, stop = frame.spans[0]
    w = torch.tensor(shares, dtype=frame.dtype, device=frame.device)
    # 1. The features of the largest total effects.
    total = model.of_targets(targets, through=True)
    # Absolute values before the mean: a feature that helps one target and hurts another counts.
    sizes = [w @ own.abs() for own in total.features]
    by_layer, by_position = _error_shares(model, w, total, sizes, slice(start, stop))
    kept = model.kept(_largest(sizes, max_features))
    # 2. Rows.
    parts, values = [], []
    size = max(1, CHUNK_BYTES // (frame.n_pos * model.operator.in_dim * frame.dtype.itemsize))
    with progress_bar("features", kept.n_active, progress) as bar:
        for number, mlp in enumerate(kept.mlps):
            for first in range(0, len(mlp.at), size):
                own = slice(first, first + size)
                # A row per feature: what its pre-activation is made of, exactly.
                parts.append(_row(kept.of_features(number, own), start, stop))
                values.append(kept.explained(number, own))
                bar.update(len(values[-1]))
    parts.append(_row(kept.of_targets(targets), start, stop))
    values.append(torch.cat([target.value for target in targets]).to(w))
    # 3. The weights by reader, and what follows from them.
    names = list(dict.fromkeys(name for _, constants, _ in parts for name in constants))
    weights = torch.cat([_joined(part, names) for part in parts])
    readers = torch.cat(values)
    counts = stop - start, kept.n_active, len(kept.mlps) * (stop - start)
    flow = Influence(weights, counts, w)
    replacement, completeness = flow.scores()
    held, effects = cumulative(flow.of_nodes.tolist()), flow.effects(readers).tolist()
    query = int(targets[0].query) - start
    places = [
        *((Node(_content(model)), pos) for pos in range(stop - start)),
        *(
            (Node("feature", mlp.layer, feature, mlp.place.name), pos - start)
            for mlp in kept.mlps
            for pos, feature in zip(mlp.at.tolist(), mlp.features.tolist(), strict=True)
        ),
        *(
            (Node("error", mlp.layer, name=mlp.place.name), pos)
            for mlp in kept.mlps
            for pos in range(stop - start)
        ),
        *((Node.parse(name), query) for name in names),
        (REST, query),
    ]
    acts = iter(torch.cat([mlp.acts for mlp in kept.mlps]).tolist())
    nodes = [
        FeatureNode(
            node,
            pos,
            effects[i],
            next(acts) if node.kind == "feature" else effects[i],
            held[i] if i < len(held) else 1.0,
        )
        for i, (node, pos) in enumerate(places)
    ]
    last = readers[-len(targets) :].tolist()
    nodes += [
        FeatureNode(Node("logits", index=i), int(target.query) - start, value, value, 0.0)
        for i, (target, value) in enumerate(zip(targets, last, strict=True))
    ]
    prompts = capture.prompts
    return FeatureGraph(
        nodes=tuple(nodes),
        weights=weights,
        values=readers,
        target=", ".join(target.name[0] for target in targets),
        target_value=float(w @ readers[-len(targets) :]),
        targets=tuple(target.name[0] for target in targets),
        answers=tuple(answers),
        shares=tuple(shares),
        replacement_score=replacement,
        completeness_score=completeness,
        error_by_layer=by_layer,
        error_by_position=by_position,
        n_active=model.n_active,
        n_found=int(weights.count_nonzero()),
        tokens=prompts.strings[0],
        ids=None if prompts.tokens is None else tuple(prompts.tokens[0, start:].tolist()),
        model=capture.model_name,
        n_layers=len(capture.blocks),
        prompt=prompt,
    )


def plan_feature_graph(
    transcoders: Sequence[FeatureDictionary],
    capture: Capture,
    operator: FrozenTransformer,
    n_targets: int,
    max_features: int,
) -> Plan:
    """Predict what a feature graph costs: what transcoders read, a sweep per row, and the weights.

    Args:
        transcoders: At most one for every MLP.
        capture: The captured run of one prompt.
        operator: The operator of that run.
        n_targets: Number of targets.
        max_features: How many features are nodes at most.

    Returns:
        The plan. As what fires is not known, k features are counted at every position, or all.
        Nothing has run but products that measure the machine.

    Raises:
        ValueError: If a transcoder does not fit the model, or ``max_features`` is below 1.
    """
    most, frame = at_least_one(max_features, "max_features"), operator.frame
    places = check_transcoders(transcoders, capture, operator)
    n_pos, D, size, cost = frame.n_pos, operator.in_dim, frame.dtype.itemsize, Cost()
    active, read, encoded = 0, 0.0, 0
    for one, _ in places.values():
        fires = n_pos * (one.k or one.d_sae)
        active += fires
        read += fires * (one.W_dec.shape[1] if one.W_dec.ndim == 3 else 1)
        encoded = max(encoded, min(CHUNK_BYTES, 3 * n_pos * one.d_sae * size))
        cost.product += 2 * n_pos * one.d_in * one.d_sae + 4 * fires * D
        cost.moved += one.d_in * one.d_sae + 3 * n_pos * one.d_sae + 6 * fires * D
        cost.calls += 100
    n = min(most, active)
    rows, n_layers = n + n_targets, len(places)
    columns = n + (n_layers + 1) * n_pos + 16 * n_layers
    # On average a feature is swept through half of the model, and reads what comes before.
    half = (n_layers + 1) / (2 * n_layers)
    operator.count_pull(cost, math.ceil(half * rows) + n_targets, apart=True, mlps=False)
    cost.product += 2 * D * (half * rows * n / active + 2 * n_targets) * read
    chunk = min(CHUNK_BYTES, rows * n_pos * D * size)
    cost.moved += 4 * rows * columns + 2 * active * D + 8 * half * rows * n_pos * D * n_layers
    cost.calls += n_pos * n_layers * (1 + rows * n_pos * D * size // chunk)
    # Activations; what MLPs wrote, errors and rests; a chunk on its way; weights and their shares.
    peak = active * (16 + 4 * size) + 5 * n_layers * n_pos * D * 8 + 8 * chunk
    peak += 3 * rows * columns * size + 1000 * columns + 2 * encoded
    return operator.plan_work("feature_graph", cost, peak)


def _content(model: ReplacementModel) -> str:
    """The source that stands for what is at a position: "embed", or what the user gave for it."""
    return next(name for name in model.capture.embeddings if Node.parse(name).kind in CONTENTS)


def _row(found: Shares, start: int, stop: int) -> Row:
    """The shares of tokens, features and errors side by side, and those of all others."""
    errors = found.errors[:, :, start:stop].flatten(1)
    main = torch.cat([found.tokens[:, start:stop], *found.features, errors], 1)
    return main, found.constants, found.rest


def _joined(row: Row, names: Sequence[str]) -> Float[Tensor, "reader node"]:
    main, constants, rest = row
    zero = torch.zeros_like(rest)
    beside = torch.stack([*(constants.get(name, zero) for name in names), rest], 1)
    return torch.cat([main, beside], 1)


def _error_shares(
    model: ReplacementModel, w: Tensor, total: Shares, sizes: Sequence[Tensor], real: slice
) -> tuple[dict[int, float], dict[int, tuple[float, ...]]]:
    """The error's share of what an MLP's features and error do, by block, and by position."""
    by_layer, by_position = {}, {}
    for number, (mlp, size) in enumerate(zip(model.mlps, sizes, strict=True)):
        error = torch.einsum("t,tp->p", w, total.errors[:, number].abs())
        # index_add without an underscore: ``error`` itself is needed below.
        whole = error.index_add(0, mlp.at, size)[real]
        error = error[real]
        by_layer[mlp.layer] = float(error.sum() / whole.sum().clamp_min(TINY))
        by_position[mlp.layer] = tuple((error / whole.clamp_min(TINY)).tolist())
    if bad := [layer for layer, share in by_layer.items() if share > MOST_ERROR]:
        worst = max(bad, key=by_layer.__getitem__)
        warnings.warn(
            f"Errors do more than features in {len(bad)} of {len(by_layer)} MLPs, most in block "
            f"{worst} ({by_layer[worst]:.0%}). Do not read the features as the whole.",
            stacklevel=5,
        )
    return by_layer, by_position


def _largest(sizes: Sequence[Tensor], n: int) -> list[Tensor]:
    """Whether each feature is among the n largest."""
    every = torch.cat([*sizes])
    picked = torch.zeros_like(every, dtype=torch.bool)
    # Over all MLPs together, so that a layer of strong features may have more of them.
    picked[every.topk(min(n, len(every))).indices] = True
    return list(picked.split([len(own) for own in sizes]))
