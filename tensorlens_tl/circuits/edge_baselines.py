"""Earlier ways to score a model's edges, by the real model: see :data:`EDGE_METHODS`.

The score of an edge is what the metric owes to it. It is positive where ablating the edge (the
output of its writer in the corrupted run in its place) would lower the metric. With a_w and a′_w
what writer w adds in the clean and in the corrupted run, and x_r the input of reader r,

    eap     (a_w − a′_w) · ∂m/∂x_r, at the clean run
    eap_ig  (a_w − a′_w) · mean over k = 1 … steps of ∂m/∂x_r, at the run whose embeddings are
            x′ + k/steps (x − x′)
    direct  the smaller of the two ends' direct effects, |(a_w − a′_w) · ∂m/∂x_logits|
    random  edges in the order in which random walks from the logits down to the input meet them

All are means over the prompts and sums over positions. :func:`score_edges` takes three steps:

1. Open the model edge by edge, and pair prompts of one length.
2. Run each batch forward and backward, and sum the gradients of all edges.
3. Divide by the number of prompts, and name the edges.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import at_least_one, progress_bar, spelled
from ..chunks import question_of, spread
from ..costs import Cost, Plan
from ..graph import LOGITS, Edge, Node, owner
from ..operator import Capture, FrozenTransformer
from ..passes import (
    EdgeEffects,
    EdgeModel,
    EdgeUniverse,
    PackedModel,
    edge_model,
    tells_heads_apart,
)
from .model_id import ModelInfo
from .packed_pairs import PackedPairs
from .prompt_pairs import METRIC_KEPT, LogitMetric, Metric, Pairs, paired

EDGE_METHODS: dict[str, str] = {
    "eap": "Nanda 2023; Syed et al. 2023 (arXiv 2310.10348); 2 forwards, 1 backward",
    "eap_ig": "Hanna et al. 2024 (arXiv 2403.17806); 1 + steps forwards, steps backwards",
    "direct": "the final norm's gradient; 2 forwards, 1 backward",
    "random": "connected circuits; none",
}
"""The source of every method, and its cost in passes of the model."""


@spelled
def score_edges(
    model: Any,
    prompts: Any,
    corrupted: Any,
    method: str = "eap",
    target: Any = None,
    versus: Any = None,
    *,
    steps: int = 5,
    metric: Metric | None = None,
    pos: int = -1,
    seed: int = 0,
    batch_size: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[Edge, float]:
    """Score every edge of the model by an earlier method, e.g. for :func:`faithfulness_curve`.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``. The call leaves the model
            unchanged.
        prompts: Strings, or token ids. Prompts of one length are run together.
        corrupted: One corrupted prompt per prompt, of the same number of tokens.
        method: How edges are scored, one of :data:`EDGE_METHODS`: "eap", "eap_ig", "direct" or
            "random".
        target: Token whose logit is measured, as for :func:`faithfulness`.
        versus: Token whose logit is subtracted, in the same forms.
        steps: Number of points on the way from the corrupted to the clean embeddings, for "eap_ig".
        metric: Function measured in place of target − versus; differentiable.
        pos: Position of the prediction. Negative positions count from the end, as in Python.
        seed: Seed of the walks of "random".
        batch_size: Number of sequences run at once.
        resume: Folder that keeps finished chunks of 64 prompts: the same call goes on from it.
            With it, all processes that a launcher started share the work, and all return the
            result; see :doc:`/guides/many_prompts`. None keeps nothing.
        progress: Whether to show a progress bar on standard error after 2 s.

    Returns:
        The score of every edge, in the unit of the metric (logits by default).

    Raises:
        ValueError: If the method, a prompt or a target does not exist.

    Example:
        >>> from tensorlens_tl import demo, score_edges
        >>> pair = demo.prompts("ioi", 1)[0]
        >>> scores = score_edges(demo.load_model(), [pair.clean], [pair.corrupted])
        >>> len(scores)
        479
    """
    _check(method, steps)
    # 1. The model and the prompts.
    with edge_model(model) as edged:
        universe = edged.universe
        if method == "random":
            return random_scores(universe, seed)
        groups = paired(edged.adapter, prompts, corrupted)
        n = sum(len(group.ids) for group in groups)
        measured = LogitMetric.of(edged.adapter, n, target, versus, metric, pos)
        # 2. Gradients of all edges.
        points = steps if method == "eap_ig" else 1
        if resume is None:
            total = _effects(edged, groups, measured, points, batch_size, progress)
        else:
            about = (method, steps, batch_size)
            total = _spread(edged, groups, measured, points, batch_size, progress, resume, about)
    # 3. Means, by edge.
    scores = universe.scores(total / n)
    return _direct(universe, scores) if method == "direct" else scores


def _spread(
    edged: EdgeModel,
    groups: list[Pairs],
    metric: LogitMetric,
    points: int,
    batch_size: int | None,
    progress: bool,
    resume: str | os.PathLike[str],
    about: tuple[Any, ...],
) -> Tensor:
    """Effects of all edges by chunks of prompts, which a folder keeps and processes share."""
    if metric.metric is not None:
        raise ValueError(METRIC_KEPT)
    pairs = [pair for group in groups for pair in group.split(1)]
    marked = ModelInfo.of(edged.adapter.name, edged.adapter.weights).fingerprint
    question = question_of((marked, metric.about, about), (pair.about for pair in pairs))

    def run(start: int, stop: int) -> dict[str, Tensor]:
        some = Pairs.together(pairs[start:stop])
        return {"sum": _effects(edged, some, metric, points, batch_size, False)}

    total = torch.zeros(len(edged.universe.readers), len(edged.universe.writers)).to(edged.dtype)
    for chunk in spread(resume, question, len(pairs), run, progress):
        total += chunk["sum"]
    return total


def _effects(
    edged: EdgeModel,
    groups: list[Pairs],
    metric: LogitMetric,
    points: int,
    batch_size: int | None,
    progress: bool,
) -> Tensor:
    """Effects of all edges, summed over prompts [reader, writer]."""
    total = _packed(edged, groups, metric, points, batch_size, progress)
    if total is None:
        total = _of_the_host(edged, groups, metric, points, batch_size, progress)
    return total


def _packed(
    edged: EdgeModel,
    groups: list[Pairs],
    metric: LogitMetric,
    points: int,
    batch_size: int | None,
    progress: bool,
) -> Tensor | None:
    """Effects of all edges, summed over prompts [reader, writer]; None for an unknown model."""
    universe, device = edged.universe, edged.device
    longest, n = max(group.n_pos for group in groups), sum(len(group.ids) for group in groups)
    model = PackedModel.of(edged.adapter, universe.wiring, edged.points[0, "resid_pre"], longest)
    if model is None or not tells_heads_apart(model) or groups[0].corrupted is None:
        return None
    total = torch.zeros(len(universe.readers), len(universe.writers), dtype=edged.dtype)
    # A backward pass keeps the graph: about as much as all writers.
    most = model.most_tokens(len(universe.writers)) // 2
    with progress_bar("prompts", n, progress) as bar:
        for p in PackedPairs.pieces(groups, metric, device, lambda n: batch_size or most // n):
            runs = EdgeEffects(model, universe, *p.entered(model))

            def measure(logits: Tensor, clean: Tensor, index: Tensor = p.index) -> Tensor:
                return metric.values_at(logits[None], clean, index).sum()

            found, logits = runs.sums(measure, points)
            # Asked before anything counts: where the host differs, it runs all prompts itself.
            if bar.n == 0 and not model.agrees(p.rows[0], logits[0]):
                return None
            total += found.to(total)
            bar.update(len(p.rows))
    return total


def _of_the_host(
    edged: EdgeModel,
    groups: list[Pairs],
    metric: LogitMetric,
    points: int,
    batch_size: int | None,
    progress: bool,
) -> Tensor:
    """The same by the host itself, with rebuilt inputs."""
    universe, n = edged.universe, sum(len(group.ids) for group in groups)
    total = torch.zeros(len(universe.readers), len(universe.writers), dtype=edged.dtype)
    with progress_bar("prompts", n, progress) as bar:
        for group in groups:
            # A backward pass keeps the graph: about four times the memory.
            size = batch_size or max(1, edged.at_once(group.n_pos) // 4)
            for piece in group.split(size):
                total += edge_gradients(edged, piece, metric, points).to(total)
                bar.update(len(piece.ids))
    return total


def plan_score_edges(
    capture: Capture, operator: FrozenTransformer, method: str = "eap", steps: int = 5
) -> Plan:
    """Predict what :func:`score_edges` costs for prompts like those of a run.

    Args:
        capture: The captured run, whose prompts are as many and as long.
        operator: The operator of the run.
        method: How edges are scored, one of :data:`EDGE_METHODS`.
        steps: Number of points of "eap_ig".

    Returns:
        The plan, of forward and backward passes of packed prompts. A model that the host must run
        (a mixture of experts, half precision) takes several times as long.

    Raises:
        ValueError: If the method does not exist, or ``steps`` is below 1.
    """
    _check(method, steps)
    frame, wiring, D = operator.frame, operator.wiring, operator.in_dim
    rows, points = frame.batch * frame.n_pos, steps if method == "eap_ig" else 1
    forward = readers = written = mixed = first = 0
    for block in reversed(capture.blocks):
        attn, mlp = block.attn.weights, block.mlp
        Z, group = attn.W_O.numel(), len(attn.W_O) // len(attn.W_V)
        out = 0 if mlp is None else mlp.output.in_dim * D
        first = Z + 2 * Z // group  # queries, keys and values
        forward += first + Z + (3 if hasattr(mlp, "pre_linear") else 2) * out
        readers += 3 * len(attn.W_O) * D
        written += Z
        mixed += frame.batch * frame.n_pos**2 * Z // D
    W_U = capture.unembed.weights.W_U.numel()
    calls = 340 * len(capture.blocks) * (1 + 2 * points) + len(wiring.edges())
    cost = Cost(calls=calls, moved=(1 + 2 * points) * forward + (1 + points) * W_U)
    # 1. Runs: corrupted; every point and back, but not below the first queries.
    cost.product = 2 * rows * (forward + points * (2 * forward - first))
    cost.product += 2 * 2 * points * frame.batch * W_U
    cost.mixing = 2 * mixed * (2 + 6 * points)
    # 2. Readers and writers, widened and multiplied.
    cost.product += 2 * rows * (4 * written + points * readers + len(wiring.edges()) * D)
    cost = Cost() if method == "random" else cost
    kept = rows * (D * len(wiring.writers()) + 4 * forward // D)
    return operator.plan_work("score_edges", cost, kept * frame.dtype.itemsize)


def _check(method: str, steps: int) -> None:
    if method not in EDGE_METHODS:
        raise ValueError(f"method={method!r} does not exist. Use one of {', '.join(EDGE_METHODS)}.")
    at_least_one(steps, "steps")


def edge_gradients(
    model: EdgeModel, pairs: Pairs, metric: LogitMetric, steps: int = 1
) -> Float[Tensor, "reader writer"]:
    """First-order effects of all edges, summed over some prompts: one backward pass per step.

    Every edge is given the difference a_w − a′_w of its writer times 0. The gradient of the metric
    with respect to that 0 is the effect of the edge.

    Args:
        model: The model, opened edge by edge.
        pairs: Prompts of one length with their corrupted prompts.
        metric: What is measured of the logits.
        steps: Number of points on the way from the corrupted to the clean embeddings; with 1, only
            the clean run.

    Returns:
        The effects [reader, writer]; 0 where there is no edge.

    Raises:
        ValueError: If there are no corrupted prompts, or the metric is not differentiable.
    """
    if pairs.corrupted is None:
        raise ValueError("corrupted=None, but this method compares two runs. Pass corrupted=.")
    with torch.no_grad():
        run = model.run(pairs.ids)
        clean, corrupted = run.writes[0], model.run(pairs.corrupted).writes[0]
    found = clean.new_zeros(len(model.universe.readers), len(model.universe.writers))
    with torch.enable_grad():
        for step in range(1, steps + 1):
            nudge = torch.zeros_like(found).requires_grad_()
            # Writer 0 is the input: the embeddings of this point on the way.
            at = corrupted[0] + step / steps * (clean[0] - corrupted[0])
            passed = model.run(pairs.ids, nudge=nudge, direction=clean - corrupted, embeddings=at)
            value = metric.values(passed.logits, run.logits[0], pairs.index).sum()
            if not value.requires_grad:
                raise ValueError(
                    "metric returned numbers without a gradient. Compute them from the logits "
                    "without detach() or item()."
                )
            found += torch.autograd.grad(value, nudge)[0] / steps
    return found


def _direct(universe: EdgeUniverse, scores: dict[Edge, float]) -> dict[Edge, float]:
    by_node = {src: abs(scores[Edge(src, LOGITS)]) for src in universe.writers}
    # The logits have no direct effect of their own: at such an edge the writer decides.
    by_node[LOGITS] = float("inf")
    return {edge: min(by_node[edge.src], by_node[owner(edge.dest)]) for edge in universe.edges}


def random_scores(universe: EdgeUniverse, seed: int = 0) -> dict[Edge, float]:
    """Random connected circuits of every size: the first k edges lie on walks from logits to input.

    A walk goes from the logits to a writer drawn from all that the reader can see, from a head to
    one of its q, k and v inputs, and on to the input. Edges that no walk has met after as many
    walks as there are edges come last, in random order.

    Args:
        universe: All edges of the model.
        seed: Seed of the walks; the same seed gives the same order.

    Returns:
        Scores that fall in the order of the edges.
    """
    draw: Callable[[int], int] = random.Random(seed).randrange
    below = dict(zip(universe.readers, universe.below, strict=True))
    order: dict[Edge, None] = {}
    for _ in universe.edges:
        reader: Node | None = LOGITS
        # A walk goes downwards, so it ends at the input, and all of its edges are connected.
        while reader is not None:
            edge = Edge(universe.writers[draw(below[reader])], reader)
            order[edge] = None
            reader = _reader_of(edge.src, draw)
    rest = [edge for edge in universe.edges if edge not in order]
    random.Random(seed).shuffle(rest)
    ranked = [*order, *rest]
    return {edge: float(len(ranked) - i) for i, edge in enumerate(ranked)}


def _reader_of(writer: Node, draw: Callable[[int], int]) -> Node | None:
    """One of the inputs of a node; None for the input of the model itself."""
    if writer.kind == "head":
        return Node("head", writer.layer, writer.index, "qkv"[draw(3)])
    return writer if writer.kind in ("mlp", "expert") else None
