"""Edges: how much of one node's output another node reads, and what the target makes of it.

    Edge(w → r) = Σ_pos ⟨what w adds to the residual, covector of r at the residual⟩

The covector of a reader is the target's, carried back through that reader alone. Readers are the
values of a head ("L2H1.v"), an MLP, and the final norm ("logits"). Each reads every writer below,
and its own constants (its norm's b, b_V, b_in). Together they are the reader's total
effect; for "logits", they are the target. Edges into different readers overlap: they do not sum.

With queries and keys a head has two more readers, "L2H1.q" and "L2H1.k" (see ``QueryKey``). These
are first-order, and in no sum.

In post-norm models the residual passes norms between a writer and a reader. Then the writer's
output is carried past them, R out_w in place of out_w: a layer at a time, at 2 d_model flops each.

Both sides are kept narrow: d_head numbers per head and position. For one span of positions a time

1. all writers are widened to [writer, span · d_model], at 2 pos d_model² flops a layer,
2. the readers of a few layers are widened to [reader, span · d_model], at 2 pos d_model² flops
   a layer,
3. the two are multiplied, at 2 · readers · writers · pos · d_model flops in all.

So the memory in use is that of one span, whatever the prompt's length. A constant that is the same
everywhere (b_O, b_out) is read by the sum over positions of its reader's covectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..costs import Cost, Plan
from ..graph import LOGITS, Edge, Node
from ..maps import Factored, Norm
from ..operator import Branch, Capture, FrozenTransformer, QueryKey, Readers, Step, Trace
from ..sublayers import Attention, Experts
from .table import Source

SPAN_BYTES = 2**25
"""Bytes that the writers of one span of positions may take. The C library maps larger blocks anew
at every call, and touching fresh memory takes time."""
FEW_READERS = 36
"""Readers multiplied at a time. With fewer, a product waits for memory; with more, work is wasted
on writers that are not below."""


@dataclass(frozen=True, eq=False)
class Writers:
    """What every writer adds to the residual in a run, or the difference between two runs.

    Attributes:
        nodes: Embeddings, heads, MLPs and constants that no node holds, from below.
        below: How many writers come before each step; the last entry is the number of all writers.
        parts: What the writers add, in the order of ``nodes``. A part holds several writers,
            position by position, or one constant's vector [d_model]. In a difference, None stands
            for a constant that is the same in both runs.
    """

    nodes: tuple[Node, ...]
    below: tuple[int, ...]
    parts: tuple[Factored | Float[Tensor, " d_model"] | None, ...]

    @classmethod
    def of(
        cls,
        operator: FrozenTransformer,
        capture: Capture,
        query: Int[Tensor, " batch"],
    ) -> Writers:
        """Collect all writers of a run.

        Only the target reads what the last layer adds, and only at the target's position. So the
        heads and the MLP of that layer are computed there alone, and elsewhere left zero. What an
        MLP added is the residual after it minus the residual before it, where the run was computed
        as finely as the operator is.

        Args:
            operator: The operator of the run.
            capture: The captured run.
            query: The target's position in each prompt, as a tensor index [batch].

        Returns:
            The nodes and what each of them adds.
        """
        embeddings, steps = capture.embeddings, operator.steps
        names = [tuple(map(Node.parse, embeddings)), *map(_names, steps)]
        parts: list[Factored | Tensor | None] = [Factored(e[None]) for e in embeddings.values()]
        fine = capture.logits.dtype == operator.frame.dtype  # a coarser residual is mostly rounding
        after = [step.state if fine else None for step in steps[1:]]
        still = all(step.norm is None for step in steps)
        for step, then in zip(steps, [*after, None][: len(steps)], strict=True):
            last = step.layer == steps[-1].layer
            parts += _write(step, query if last else None, then, still)
        return cls(sum(names, ()), tuple(accumulate(map(len, names))), tuple(parts))

    def minus(self, baseline: Writers) -> Writers:
        """Subtract the writers of another run of the same model.

        Args:
            baseline: The writers of the reference run.

        Returns:
            What each writer adds in this run and not in the reference run.

        Raises:
            ValueError: If hooks of the user's own edited only one of the runs at some place.
        """
        if self.nodes != baseline.nodes:
            only = sorted({str(node) for node in set(self.nodes) ^ set(baseline.nodes)})
            raise ValueError(
                f"Only one of the two runs has {', '.join(only)}. Edit both runs at the same hook "
                "points."
            )
        pairs = zip(self.parts, baseline.parts, strict=True)
        parts = (
            a - b if isinstance(a, Factored) and isinstance(b, Factored) else None for a, b in pairs
        )
        return Writers(self.nodes, self.below, tuple(parts))

    def moving(self) -> tuple[tuple[Factored, ...], list[int]]:
        """The parts that differ from position to position, and the indices of their nodes."""
        found, at = [], 0
        which: list[int] = []
        for part in self.parts:
            many = len(part.narrow) if isinstance(part, Factored) else 1
            if isinstance(part, Factored):
                found.append(part)
                # A part without positions, a constant, is one vector; it is multiplied at the end.
                which += range(at, at + many)
            at += many
        return tuple(found), which


def edge_products(
    writers: Writers, readers: Iterable[Readers], n_pos: int
) -> tuple[tuple[Source, ...], tuple[str, ...], Float[Tensor, "batch edge"]]:
    """Multiply all writers with all readers of one target.

    Args:
        writers: What is written to the residual.
        readers: What reads the residual, from below: of a frozen run (:func:`frozen_readers`), or
            between two runs.
        n_pos: The number of positions.

    Returns:
        The edges, reader by reader from below, each reader's own constants last; their names; and
        their values, positions summed, in units of the target.
    """
    readers = list(readers)
    found = _products(writers, readers, n_pos)
    scores, at = [], 0
    for r in readers:
        rows = found[at : at + len(r.nodes), :, : r.n_writers]
        own = [share[..., None] for share in r.own.values()]
        scores.append(torch.cat([rows, *own], -1).transpose(0, 1).flatten(1))
        at += len(r.nodes)
    named = tuple((node, r.n_writers, tuple(r.own)) for r in readers for node in r.nodes)
    return *_rows(writers.nodes, named), torch.cat(scores, -1)


def frozen_readers(
    operator: FrozenTransformer,
    below: tuple[int, ...],
    trace: Trace,
    constants: dict[str, Float[Tensor, " batch"]] | None,
    scores_of: Callable[[Branch], QueryKey] | None = None,
) -> Iterator[Readers]:
    """Give every reader of a run, with patterns, scales and ratios held.

    Args:
        operator: The operator of the run.
        below: How many writers come before each step, and how many there are in all.
        trace: The target pulled to every site.
        constants: The shares of the constants above the final norm, by name [batch]. None leaves
            out the readers' own constants: they are the same in two runs.
        scores_of: Gives the queries and keys of an attention branch. With it, the query and key
            inputs of every head are readers, too.

    Yields:
        Groups of readers that see the same writers, from below.
    """
    steps = zip(operator.steps, trace.pulls, below, trace.written, strict=False)
    norm: Norm | None = None  # of the residual, since the readers before
    for step, pulls, seen, c in steps:
        for branch, pull in zip(step.branches, pulls, strict=True):
            covectors, own = branch.readers(pull)
            own = {} if constants is None else own
            yield Readers(branch.body.reads(), seen, covectors, own, norm)
            norm = None
            if scores_of is not None and branch.has_heads:
                side = scores_of(branch)  # first all heads' queries, then all heads' keys
                heads = len(side.reads()) // 2
                # ∂ target / ∂ scores, carried to queries with the keys held, and to keys with the
                # queries held.
                both = side.readers(branch.pull_to_hidden(c), step.state)
                for i, covectors in enumerate(both):
                    nodes = side.reads()[i * heads : (i + 1) * heads]
                    yield Readers(nodes, seen, covectors, {})
        # The readers of the next step are the first to see this norm.
        norm = step.norm
    top = {name: share[None] for name, share in (constants or {}).items()}
    # The logits read the last residual site, below the final norm.
    yield Readers((LOGITS,), below[-1], Factored(trace.covectors[-2][None]), top, norm)


def plan_edges(
    operator: FrozenTransformer, embeddings: int, at: str | None, qk: bool, what: str
) -> Plan:
    """Predict what a split by edge costs: the target's sweep, and the three steps of this file.

    Args:
        operator: The operator of the run.
        embeddings: How many writers the embeddings are.
        at: The operator that reads the difference of two runs; None where there is one run.
        qk: Whether queries and keys are readers, too.
        what: Name of what is planned, for display.

    Returns:
        The plan. Nothing has run but products that measure the machine.
    """
    frame, D, cost = operator.frame, operator.in_dim, Cost()
    rows, runs, secant = frame.batch * frame.n_pos, 1 if at is None else 2, at == "secant"
    readers: list[tuple[int, int]] = []  # how many there are, and how many writers they see
    starts: list[int] = []  # the readers after a norm of the residual
    kept, below = 0, embeddings
    for step in operator.steps:
        last, seen = step.layer == operator.steps[-1].layer, below
        alone = len(step.branches) == 1 and not step.edits
        for branch in step.branches:
            body, n = branch.body, len(branch.body.nodes())
            width, z = D * body.output.in_dim, frame.batch if last else rows  # what is written
            cells = 2 * frame.batch * frame.n_pos**2 * body.output.in_dim
            readers.append((len(body.reads()), seen))
            below += n + (branch.post is not None)
            kept += runs * rows * (body.output.in_dim if branch.has_heads else D)
            cost.calls += 56 * runs
            if isinstance(body, Experts):  # every expert's covector is pulled apart
                halves = 2 if body.convention == "half" else 1
                cost.product += 2 * rows * width * (1 + halves)
                cost.moved += n * rows * (2 * body.output.in_dim + 3 * D)
                cost.calls += 20 * n
            if not isinstance(body, Attention):
                cost.product += 0 if alone and n == 1 and not last else 2 * runs * z * width
                cost.product += 4 * (rows - frame.batch) * width if secant and last else 0
                cost.product += 2 * rows * width if secant and hasattr(body, "pre_linear") else 0
                cost.product += 12 * rows * width if secant and branch.post is not None else 0
                continue
            values, wide = 2 * rows * D * body.values.out_dim, 2 * rows * width
            # 1. What every head writes; 2. what its values read.
            cost.product += runs * ((0 if last else values) + 2 * z * width) + wide
            cost.mixing += 0 if last else runs * cells
            scores = wide + values  # W_Q and W_K
            if secant:
                cost.product += 2 * scores + 3 * wide
                cost.product += 2 * (rows - frame.batch) * width if last else 0
                cost.product += 2 * (values + 2 * wide) if branch.post is not None else 0
                cost.mixing += 5 * cells + (4 * cells if branch.post is not None else 0)
            elif qk:
                cost.product += scores + values + wide
                cost.mixing += 4 * cells
            if qk:
                cost.product += 2 * wide
                cost.calls += 180 + 10 * n
                readers += [(n, seen), (n, seen)]
        below += len(step.own)
        starts += [] if step.norm is None else [len(readers)]
    readers.append((1, below))
    # Names and sums of the rows; a selection reads every score.
    cost.calls += 650 + (len(operator.wiring.edges(qk)) if what == "discover" else 0)
    # 3. The products, of a few readers at a time.
    for group in _groups([n for n, _ in readers], starts):
        part = readers[group]
        cost.product += 2 * sum(n for n, _ in part) * max(seen for _, seen in part) * rows * D
    kept += 2 * min(SPAN_BYTES // frame.dtype.itemsize, below * rows * D)
    return operator.plan_pull(what, cost, kept * frame.dtype.itemsize)


def _products(
    writers: Writers, readers: list[Readers], n_pos: int
) -> Float[Tensor, "reader batch writer"]:
    """⟨writer, reader⟩ of all writers below a reader, and of some that are not below."""
    parts, which = writers.moving()
    like = readers[-1].covectors.narrow  # of the logits, hence wide
    batch, d_model = like.shape[1], like.shape[-1]
    n_readers = sum(len(r.nodes) for r in readers)
    sums = like.new_zeros(n_readers, batch, len(which))
    if not writers.nodes:
        return sums
    # Widened, all writers are heads · pos · d_model numbers: only some positions fit at a time.
    most = max(1, SPAN_BYTES // (len(which) * batch * d_model * like.element_size()))
    n_spans = -(-n_pos // most)
    # Spans of nearly one length, so that one buffer serves them all.
    size = -(-n_pos // n_spans)
    seen = [sum(i < r.n_writers for i in which) for r in readers]
    starts = [i for i, r in enumerate(readers) if i and r.norm is not None]
    groups = _groups([len(r.nodes) for r in readers], starts)
    rows = max(sum(len(r.nodes) for r in readers[group]) for group in groups)
    kept = [like.new_empty(many * batch * size * d_model) for many in (len(which), rows)]
    for start in range(0, n_pos, size):
        span = slice(start, min(start + size, n_pos))
        shape = (batch, span.stop - start, d_model)
        W, R = (k[: len(k) // size * shape[1]].view(-1, *shape) for k in kept)
        # 1. Widen the writers.
        at = 0
        for part in parts:
            part.wide(span, W[at : at + len(part.narrow)])
            at += len(part.narrow)
        first = 0
        for group in groups:
            # A norm of the residual that all writers below the group pass, but for its own b.
            if (norm := readers[group][0].norm) is not None:
                norm.push_(W[: seen[group][0] - (norm.weights.b is not None)], span)
            # 2. Widen a few readers.
            at = 0
            for r in readers[group]:
                r.covectors.wide(span, R[at : at + len(r.nodes)])
                at += len(r.nodes)
            # 3. Multiply. The few rows first: the other way, or batched, it takes longer.
            below = max(seen[group])
            for b in range(batch):
                sums[first : first + at, b, :below] += (
                    R[:at, b].flatten(1) @ W[:below, b].flatten(1).T
                )
            first += at
    if len(which) == len(writers.nodes):
        return sums
    found = like.new_zeros(n_readers, batch, len(writers.nodes))
    # Back to the order of nodes, constants among them.
    found[..., which] = sums
    # A constant that is the same at every position is read by the sum of covectors over positions.
    vectors = [part for part in writers.parts if isinstance(part, Tensor)]
    if vectors:
        still = [i for i in range(len(writers.nodes)) if i not in set(which)]
        found[..., still] = (
            torch.cat([r.covectors.total() for r in readers]) @ torch.stack(vectors).T
        )
    return found


def _groups(sizes: list[int], starts: list[int]) -> list[slice]:
    """Runs of neighbouring groups, each of at least :data:`FEW_READERS` readers where possible."""
    if starts:  # groups at which a norm of the residual begins a new run
        ends = [*starts, len(sizes)]
        return [slice(a, b) for a, b in zip([0, *starts], ends, strict=True)]
    found, start, held = [], 0, 0
    for i, size in enumerate(sizes):
        held += size
        if held >= FEW_READERS:
            found.append(slice(start, i + 1))
            start, held = i + 1, 0
    if held:  # a product with few rows takes as long as one with FEW_READERS rows
        start = found.pop().start if found and held < FEW_READERS // 2 else start
        found.append(slice(start, len(sizes)))
    return found


def _names(step: Step) -> tuple[Node, ...]:
    found: list[Node] = []
    for branch in step.branches:
        found += [*branch.body.nodes(), *map(Node.parse, branch.outside_names())]
    return (*found, *(Node.parse(name) for name in (*(e.name for e in step.edits), *step.own)))


def _write(
    step: Step,
    query: Int[Tensor, " batch"] | None,
    after: Float[Tensor, "batch pos d_model"] | None,
    still: bool,
) -> Iterator[Factored | Float[Tensor, " d_model"]]:
    """What the writers of a step add, in the order of :func:`_names`; only at ``query``, if any."""
    # b_O and b_out are one vector each where no norm comes after them.
    for branch in step.branches:
        outside, name = branch.outside(), branch.body.external[0]
        alone = len(branch.body.nodes()) == len(step.branches) == 1 and not step.edits
        # An MLP alone in its step has written the step's whole gain: no product is needed.
        alone = alone and step.norm is None
        if query is None and after is not None and alone:  # the residual tells it
            gained = after - step.state
            for constant in outside.values():
                gained -= constant
            yield Factored(gained[None])
        else:
            yield branch.writes(step.state, query)
        for constant_name, constant in outside.items():
            same = still and branch.post is None and constant_name == name
            yield constant[0, 0] if same else Factored(constant[None])
    for edit in step.edits:
        yield Factored(edit.constant[None])
    for constant in step.own.values():
        yield Factored(constant[None])


@lru_cache(maxsize=16)
def _rows(
    writers: tuple[Node, ...], readers: tuple[tuple[Node, int, tuple[str, ...]], ...]
) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    # Tens of thousands of rows, the same for all targets of a model: kept.
    found: list[Edge] = []
    for node, below, own in readers:
        found += [Edge(src, node) for src in (*writers[:below], *map(Node.parse, own))]
    return tuple(map(Source, found)), tuple(map(str, found))
