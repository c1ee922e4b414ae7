"""Edges: how much of one node's output another node reads, and what the target makes of it.

    Edge(w → r) = Σ_pos ⟨what w adds to the residual, covector of r at the residual⟩

The covector of a reader is the target's, carried back through that reader alone: a head by its
values ("L2H1.v"), an MLP, or the final norm ("logits"). A reader sees every writer below it, and
its own constants (its norm's b, b_V, b_in) beside: together they are its total effect (of
"logits": the target). Edges into different readers overlap, so they do not sum.

All edges of one step are one matrix product, [readers, pos · d_model] × [pos · d_model, writers].
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .composer import FrozenTransformer, Step, Trace
from .graph import Edge, Node
from .results import Source

LOGITS = Node("logits")


def edge_scores(
    operator: FrozenTransformer,
    embeddings: dict[str, Float[Tensor, "batch pos d_model"]],
    trace: Trace,
    query: Int[Tensor, " batch"],
    b_U: Float[Tensor, " batch"] | None,
) -> tuple[tuple[Source, ...], tuple[str, ...], Float[Tensor, "batch edge"]]:
    """All edges of one target, and every reader's own constants.

    Cost: the writers' outputs (once), a product per step; memory 4 · writers · pos · d_model bytes.

    Args:
        operator: The operator.
        embeddings: What the first residual is the sum of, by name.
        trace: The target's sweep.
        query: The target's position, as tensor index.
        b_U: What the unembedding's constant contributes, where there is one.

    Returns:
        The edges, reader by reader from below, their names, and their scores, positions summed.
    """
    names = [_writers(step) for step in operator.steps]
    first = tuple(Node.parse(name) for name in embeddings)
    frame, width = operator.frame, operator.in_dim
    below = list(accumulate(map(len, (first, *names))))
    outputs = frame.zeros(0).new_empty(frame.batch, below[-1], frame.n_pos, width)
    for i, embedding in enumerate(embeddings.values()):
        outputs[:, i] = embedding
    covectors = outputs[:0]
    scores: list[Tensor] = []
    readers: list[tuple[Node, int, tuple[str, ...]]] = []
    steps = zip(operator.steps, trace.pulls, below, below[1:], strict=False)
    for _, layer in groupby(steps, key=lambda item: item[0].layer):
        own = list(layer)
        seen = own[0][2]
        n_readers = sum(len(branch.body.reads()) for step, *_ in own for branch in step.branches)
        if covectors.shape[:2] != (
            frame.batch,
            n_readers,
        ):  # fresh memory costs more than the product
            covectors = outputs.new_empty(frame.batch, n_readers, frame.n_pos, width)
        found, at = [], 0
        for step, pulls, start, stop in own:
            for branch, pull in zip(step.branches, pulls, strict=True):
                nodes = branch.body.reads()
                out = covectors[:, at : at + len(nodes)]
                found.append((nodes, start, out, branch.readers(pull, out)))
                at += len(nodes)
            _write(step, outputs[:, start:stop])
        # All readers of a layer at once against what is below it: the writers are read once.
        common = _products(covectors, outputs[:, :seen]).split([len(f[0]) for f in found], 1)
        for (nodes, start, out, shares), below_layer in zip(found, common, strict=True):
            rows = [below_layer, _products(out, outputs[:, seen:start])]
            rows += [share[..., None] for share in shares.values()]
            scores.append(torch.cat(rows, -1).flatten(1))
            readers += [(node, start, tuple(shares)) for node in nodes]
    prompts = torch.arange(frame.batch, device=frame.device)
    last = (outputs[prompts, :, query] @ trace.covectors[-2][prompts, query, :, None])[..., 0]
    own = {name: effect.sum(-1) for name, effect in trace.top.items()}
    own |= {} if b_U is None else {"b_U": b_U}
    scores.append(torch.cat([last, *(share[:, None] for share in own.values())], -1))
    readers.append((LOGITS, below[-1], tuple(own)))
    return *_rows(sum(names, first), tuple(readers)), torch.cat(scores, -1)


def _products(
    covectors: Float[Tensor, "batch reader pos d"], outputs: Float[Tensor, "batch writer pos d"]
) -> Float[Tensor, "batch reader writer"]:
    # Prompt by prompt, the long side first: a thin batched product is several times slower.
    pairs = zip(outputs.flatten(2), covectors.flatten(2), strict=True)
    return torch.stack([(w @ c.T).T for w, c in pairs])


def _writers(step: Step) -> tuple[Node, ...]:
    found: list[Node] = []
    for branch in step.branches:
        found += [*branch.body.nodes(), *map(Node.parse, branch.outside_names())]
    return (*found, *(Node.parse(edit.name) for edit in step.edits))


def _write(step: Step, out: Float[Tensor, "batch writer pos d_model"]) -> None:
    """What a step's writers add, in the order of :func:`_writers`."""
    at = 0
    for branch in step.branches:
        nodes = len(branch.body.nodes())
        branch.outputs(step.state, out=out[:, at : at + nodes])
        at += nodes
        for constant in branch.outside().values():
            out[:, at] = constant
            at += 1
    for i, edit in enumerate(step.edits, at):
        out[:, i] = edit.constant


@lru_cache(maxsize=16)
def _rows(
    writers: tuple[Node, ...], readers: tuple[tuple[Node, int, tuple[str, ...]], ...]
) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    # They are a model's, not a target's, and tens of thousands: kept.
    found: list[Edge] = []
    for node, below, own in readers:
        found += [Edge(src, node) for src in (*writers[:below], *map(Node.parse, own))]
    return tuple(map(Source, found)), tuple(map(str, found))
