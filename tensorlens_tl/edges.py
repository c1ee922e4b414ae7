"""Edges: how much of one node's output another node reads, and what the target makes of it.

    Edge(w → r) = Σ_pos ⟨what w adds to the residual, covector of r at the residual⟩

The covector of a reader is the target's, carried back through that reader alone: a head by its
values ("L2H1.v"), an MLP, or the final norm ("logits"). A reader sees every writer below it, and
its own constants (its norm's b, b_V, b_in) beside: together they are its total effect (of
"logits": the target). Edges into different readers overlap, so they do not sum.

With queries and keys a head has two more readers, "L2H1.q" and "L2H1.k" (``query_key``): first-order,
and in no sum.

All edges of one step are one matrix product, [readers, pos · d_model] × [pos · d_model, writers].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .branches import Branch, Step, Trace
from .capturing import Capture
from .composer import FrozenTransformer
from .graph import Edge, Node
from .query_key import QueryKey
from .results import Source

LOGITS = Node("logits")


@dataclass(frozen=True, eq=False)
class Writers:
    """What every writer adds to the residual in a run.

    Attributes:
        nodes: Embeddings, heads, MLPs and constants that no node holds, from below.
        below: How many of them write before each step, and how many there are.
        outputs: What they add.
    """

    nodes: tuple[Node, ...]
    below: tuple[int, ...]
    outputs: Float[Tensor, "batch writer pos d_model"]

    @classmethod
    def of(
        cls,
        operator: FrozenTransformer,
        capture: Capture,
        query: Int[Tensor, " batch"],
    ) -> Writers:
        """All writers of a run; takes 4 · writers · pos · d_model bytes.

        Nothing but a target reads what the last layer adds, and only where the target is: there
        alone its heads and MLP are computed, and elsewhere left zero. What an MLP added is read off
        the residual before and after it, where the run was computed as finely as the operator is.

        Args:
            operator: The operator.
            capture: The run.
            query: The target's position in each prompt, as tensor index.

        Returns:
            Nodes and outputs.
        """
        embeddings, steps = capture.embeddings, operator.steps
        names = [tuple(map(Node.parse, embeddings)), *map(_names, steps)]
        below = tuple(accumulate(map(len, names)))
        frame = operator.frame
        outputs = frame.zeros(0).new_empty(frame.batch, below[-1], frame.n_pos, operator.in_dim)
        for i, embedding in enumerate(embeddings.values()):
            outputs[:, i] = embedding
        fine = capture.logits.dtype == frame.dtype  # a coarser residual is mostly rounding
        after = [step.state if fine else None for step in steps[1:]]
        for step, then, start, stop in zip(steps, [*after, None], below, below[1:], strict=False):
            last = step.layer == steps[-1].layer
            _write(step, outputs[:, start:stop], query if last else None, then)
        return cls(sum(names, ()), below, outputs)

    def minus(self, other: Writers) -> Writers:
        """What they add here and do not add in another run of the same model.

        Args:
            other: The other run's.

        Returns:
            The differences.

        Raises:
            ValueError: If the user's own hooks edited one of the runs elsewhere than the other.
        """
        if self.nodes != other.nodes:
            only = sorted({str(node) for node in set(self.nodes) ^ set(other.nodes)})
            raise ValueError(
                f"only one of the runs has {', '.join(only)}: expected edits at the same hook points"
            )
        return Writers(self.nodes, self.below, self.outputs - other.outputs)


def edge_scores(
    operator: FrozenTransformer,
    writers: Writers,
    trace: Trace,
    query: Int[Tensor, " batch"],
    constants: dict[str, Float[Tensor, " batch"]] | None,
    scores_of: Callable[[Branch], QueryKey] | None = None,
) -> tuple[tuple[Source, ...], tuple[str, ...], Float[Tensor, "batch edge"]]:
    """All edges of one target, and every reader's own constants.

    Args:
        operator: The operator.
        writers: What is written.
        trace: The target's sweep.
        query: The target's position, as tensor index.
        constants: The shares of the constants above the final norm; None to leave readers' own
            constants out (they are the same in two runs).
        scores_of: Gives the queries and keys of an attention branch: with it, every head's query
            and key inputs are readers, too.

    Returns:
        The edges, reader by reader from below, their names, and their scores, positions summed.
    """
    outputs, below = writers.outputs, writers.below
    covectors, scores = outputs[:0], []
    readers: list[tuple[Node, int, tuple[str, ...]]] = []
    steps = zip(operator.steps, trace.pulls, below, trace.covectors[1:], strict=False)
    for _, layer in groupby(steps, key=lambda item: item[0].layer):
        own = list(layer)
        seen = own[0][2]
        branches = [branch for step, *_ in own for branch in step.branches]
        n_readers = sum(len(branch.body.reads()) for branch in branches)
        sides = {} if scores_of is None else {b: scores_of(b) for b in branches if b.has_heads}
        n_readers += sum(len(side.reads()) for side in sides.values())
        if covectors.shape[1] != n_readers or not len(covectors):  # fresh memory costs time
            covectors = torch.empty_like(outputs[:, :1]).repeat(1, n_readers, 1, 1)
        found, at = [], 0
        for step, pulls, start, c in own:
            for branch, pull in zip(step.branches, pulls, strict=True):
                nodes = branch.body.reads()
                out = covectors[:, at : at + len(nodes)]
                shares = branch.readers(pull, out)
                found.append((nodes, start, out, {} if constants is None else shares))
                at += len(nodes)
                if (side := sides.get(branch)) is not None:
                    out = covectors[:, at : at + len(side.reads())]
                    side.readers(branch.pull_to_hidden(c), step.state, out)
                    found.append((side.reads(), start, out, {}))
                    at += len(side.reads())
        # All readers of a layer at once against what is below it: the writers are read once.
        common = _products(covectors, outputs[:, :seen]).split([len(f[0]) for f in found], 1)
        for (nodes, start, out, shares), below_layer in zip(found, common, strict=True):
            rows = [below_layer, _products(out, outputs[:, seen:start])]
            rows += [share[..., None] for share in shares.values()]
            scores.append(torch.cat(rows, -1).flatten(1))
            readers += [(node, start, tuple(shares)) for node in nodes]
    prompts = torch.arange(len(query), device=query.device)
    last = (outputs[prompts, :, query] @ trace.covectors[-2][prompts, query, :, None])[..., 0]
    top = constants or {}
    scores.append(torch.cat([last, *(share[:, None] for share in top.values())], -1))
    readers.append((LOGITS, below[-1], tuple(top)))
    return *_rows(writers.nodes, tuple(readers)), torch.cat(scores, -1)


def _products(
    covectors: Float[Tensor, "batch reader pos d"], outputs: Float[Tensor, "batch writer pos d"]
) -> Float[Tensor, "batch reader writer"]:
    # Prompt by prompt, the few rows first: the other way, or batched, it takes twice as long.
    pairs = zip(outputs.flatten(2), covectors.flatten(2), strict=True)
    return torch.stack([c @ w.T for w, c in pairs])


def _names(step: Step) -> tuple[Node, ...]:
    found: list[Node] = []
    for branch in step.branches:
        found += [*branch.body.nodes(), *map(Node.parse, branch.outside_names())]
    return (*found, *(Node.parse(edit.name) for edit in step.edits))


def _write(
    step: Step,
    out: Float[Tensor, "batch writer pos d_model"],
    query: Int[Tensor, " batch"] | None,
    after: Float[Tensor, "batch pos d_model"] | None,
) -> None:
    """What a step's writers add, in the order of :func:`_names`; nodes at ``query`` alone, if any."""
    at = 0
    for branch in step.branches:
        nodes = len(branch.body.nodes())
        alone = nodes == len(step.branches) == 1 and not step.edits
        if query is None and after is not None and alone:
            torch.sub(after, step.state, out=out[:, at])
            for constant in branch.outside().values():
                out[:, at] -= constant
        elif query is None:
            branch.outputs(step.state, out=out[:, at : at + nodes])
        else:
            out[:, at : at + nodes] = 0
            prompts = torch.arange(len(query), device=query.device)
            out[prompts, at : at + nodes, query] = branch.outputs_at(step.state, query)
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
