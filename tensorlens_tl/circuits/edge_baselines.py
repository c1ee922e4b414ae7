"""Earlier ways to rank a model's edges, on the same edges and by the real model: see :data:`EDGE_METHODS`.

A score is what the measure owes to the edge: positive where ablating it (the writer's output in the
corrupted prompt's run in its place) would lower the measure. With a_w and a′_w what writer w adds in
the clean and in the corrupted run, and x_r reader r's input,

    eap     (a_w − a′_w) · ∂m/∂x_r, at the clean run
    eap_ig  (a_w − a′_w) · mean over k = 1 … steps of ∂m/∂x_r, at the run whose embeddings are
            x′ + k/steps (x − x′)
    direct  the smaller of the two ends' direct effects, |(a_w − a′_w) · ∂m/∂x_logits|
    random  edges in the order in which random walks from the logits down to the input meet them

All are means over the prompts and sums over positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import at_least_one
from ..graph import LOGITS, Edge, Node, owner
from .edge_masks import EdgeUniverse
from .edge_patching import EdgeModel, edge_model
from .prompt_pairs import Measure, Metric, Pairs, paired

EDGE_METHODS: dict[str, str] = {
    "eap": "Nanda 2023; Syed et al. 2023 (arXiv 2310.10348); 3 forwards, 1 backward",
    "eap_ig": "Hanna et al. 2024 (arXiv 2403.17806); 2 + steps forwards, steps backwards",
    "direct": "the final norm's gradient; 3 forwards, 1 backward",
    "random": "connected circuits; none",
}
"""Every method's source, and its cost in passes of the model."""


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
    progress: bool = False,
) -> dict[Edge, float]:
    """Score every edge of the model by an earlier method; for :func:`faithfulness_curve`.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``; left as it was.
        prompts: Strings or token ids; those of one length are run together.
        corrupted: Each prompt's twin, of as many tokens.
        method: One of :data:`EDGE_METHODS`.
        target: What is measured: as for :func:`faithfulness`.
        versus: Whose logit is subtracted.
        steps: Points of "eap_ig".
        metric: Another measure, differentiable.
        pos: Where the prediction is made.
        seed: Of "random".
        batch_size: Sequences run at once.
        progress: Whether to count prompts on standard error.

    Returns:
        Every edge's score.

    Raises:
        ValueError: If the method does not exist, or a prompt or target is not one.
    """
    if method not in EDGE_METHODS:
        raise ValueError(f"expected method to be one of {', '.join(EDGE_METHODS)}, got {method!r}")
    at_least_one(steps, "steps")
    with edge_model(model) as edged:
        universe = edged.universe
        if method == "random":
            return random_scores(universe, seed)
        groups = paired(edged.adapter, prompts, corrupted)
        n = sum(len(group.ids) for group in groups)
        measure = Measure.of(edged.adapter, n, target, versus, metric, pos)
        total = torch.zeros(len(universe.readers), len(universe.writers), dtype=edged.dtype)
        with tqdm(desc="prompts", total=n, disable=not progress) as bar:
            for group in groups:
                size = batch_size or max(1, edged.at_once(group.ids.shape[1]) // 4)  # with a graph
                for piece in group.split(size):
                    points = steps if method == "eap_ig" else 1
                    total += edge_gradients(edged, piece, measure, points).to(total)
                    bar.update(len(piece.ids))
    scores = _as_scores(universe, total / n)
    return _direct(universe, scores) if method == "direct" else scores


def edge_gradients(
    model: EdgeModel, pairs: Pairs, measure: Measure, steps: int = 1
) -> Float[Tensor, "reader writer"]:
    """First-order effects of all edges, summed over some prompts: one backward pass a step.

    Every edge is given the writer's difference a_w − a′_w times 0; the gradient of the measure with
    respect to that 0 is the edge's effect.

    Args:
        model: The model.
        pairs: Prompts of one length and their twins.
        measure: What is measured.
        steps: Points on the way from the corrupted embeddings to the clean ones; 1 is the clean run.

    Returns:
        The effects; 0 where there is no edge.

    Raises:
        ValueError: If the measure is not differentiable.
    """
    if pairs.twins is None:
        raise ValueError(
            "attribution patching compares two runs, got no corrupted prompts: pass them"
        )
    with torch.no_grad():
        run = model.run(pairs.ids)
        clean, twin = run.writes[0], model.run(pairs.twins).writes[0]
    found = clean.new_zeros(len(model.universe.readers), len(model.universe.writers))
    with torch.enable_grad():
        for step in range(1, steps + 1):
            nudge = torch.zeros_like(found).requires_grad_()
            at = twin[0] + step / steps * (clean[0] - twin[0])
            passed = model.run(pairs.ids, nudge=nudge, direction=clean - twin, embeddings=at)
            value = measure.values(passed.logits, run.logits[0], pairs.index).sum()
            if not value.requires_grad:
                raise ValueError("expected a differentiable metric, got one without a gradient")
            found += torch.autograd.grad(value, nudge)[0] / steps
    return found


def _as_scores(universe: EdgeUniverse, matrix: Tensor) -> dict[Edge, float]:
    rows = matrix.tolist()
    places = ((edge, universe.place(edge)) for edge in universe.edges)
    return {edge: rows[r][w] for edge, (r, w) in places}


def _direct(universe: EdgeUniverse, scores: dict[Edge, float]) -> dict[Edge, float]:
    by_node = {src: abs(scores[Edge(src, LOGITS)]) for src in universe.writers}
    by_node[LOGITS] = float("inf")
    return {edge: min(by_node[edge.src], by_node[owner(edge.dest)]) for edge in universe.edges}


def random_scores(universe: EdgeUniverse, seed: int = 0) -> dict[Edge, float]:
    """Random connected circuits of every size: each first so many edges lie on walks from logits to input.

    A walk goes from the logits to a writer drawn from all they see, from a head to one of its q, k and v
    inputs, and on to the input. Edges that no walk has met after as many walks as there are edges come
    last, in random order.

    Args:
        universe: The model's edges.
        seed: The same seed gives the same order.

    Returns:
        Scores that fall in the order of the edges.
    """
    draw: Callable[[int], int] = random.Random(seed).randrange
    below = dict(zip(universe.readers, universe.below, strict=True))
    order: dict[Edge, None] = {}
    for _ in universe.edges:
        reader: Node | None = LOGITS
        while reader is not None:
            edge = Edge(universe.writers[draw(below[reader])], reader)
            order[edge] = None
            reader = _reader_of(edge.src, draw)
    rest = [edge for edge in universe.edges if edge not in order]
    random.Random(seed).shuffle(rest)
    ranked = [*order, *rest]
    return {edge: float(len(ranked) - i) for i, edge in enumerate(ranked)}


def _reader_of(writer: Node, draw: Callable[[int], int]) -> Node | None:
    """One of a node's inputs; None for the input itself."""
    if writer.kind == "head":
        return Node("head", writer.layer, writer.index, "qkv"[draw(3)])
    return writer if writer.kind == "mlp" else None
