"""One target pulled to every residual site, and the table that is built from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import Edge, Node
from ..operator import Capture, FrozenTransformer, Trace
from .table import Attribution, Source
from .targets import Target

B_U = Node("constant", name="b_U")


Effects = dict[str, Float[Tensor, "batch pos"]]


@dataclass(frozen=True, eq=False)
class Sweep:
    """One target, and its covectors at every residual site: pulled once, whatever is asked.

    Attributes:
        capture: The run.
        operator: Its operator.
        target: The target.
    """

    capture: Capture
    operator: FrozenTransformer
    target: Target

    @cached_property
    def trace(self) -> Trace:
        """The transposed sweep: covectors, and every constant's share ⟨covector, constant⟩."""
        return self.operator.pull(_spread([self])[0], self.target.query)

    @classmethod
    def all(cls, sweeps: Sequence[Sweep]) -> None:
        """Sweep for many targets of one run at once."""
        query = sweeps[0].target.query
        same = all(torch.equal(sweep.target.query, query) for sweep in sweeps)
        trace = sweeps[0].operator.pull(_spread(sweeps), query if same else None)
        for i, sweep in enumerate(sweeps):
            vars(sweep)["trace"] = trace[i]  # where cached_property looks


def _spread(sweeps: Sequence[Sweep]) -> Float[Tensor, "many batch pos d_model"]:
    """The targets' covectors, each at its position, zero elsewhere."""
    frame, width = sweeps[0].capture.frame, sweeps[0].operator.out_dim
    u = frame.zeros(width, len(sweeps))
    prompts = torch.arange(frame.batch, device=frame.device)
    for i, sweep in enumerate(sweeps):
        u[i, prompts, sweep.target.query] = sweep.target.covector
    return u


class Rows:
    """A table under construction: sources and their values, column by column."""

    def __init__(self):
        self.sources: list[Source] = []
        self.values: list[Tensor] = []

    def add(self, nodes: Iterable[Node | Edge], values: Float[Tensor, "batch node"]) -> None:
        """One row per node."""
        self.sources += [Source(node) for node in nodes]
        self.values.append(values)

    def spread(self, node: Node, values: Float[Tensor, "batch pos"]) -> None:
        """One row per position."""
        self.sources += [Source(node, pos) for pos in range(values.shape[1])]
        self.values.append(values)


def result(
    sweep: Sweep,
    rows: Rows,
    by: str,
    effect: str = "direct",
    labels: tuple[tuple[str, ...], ...] | None = None,
) -> Attribution:
    """The finished table.

    Args:
        sweep: The target.
        rows: Sources and values.
        by: What it was split by.
        effect: "direct" or "total".
        labels: Names per prompt, where they are known.

    Returns:
        The attribution.
    """
    capture, target = sweep.capture, sweep.target
    if labels is None:
        labels = _labels(capture, rows.sources, read=(by, effect) == ("head", "direct"))
    sums = effect == "direct" and by != "edge"
    return Attribution(
        torch.cat(rows.values, -1), tuple(rows.sources), labels, by, target.name, target.value,
        sums, capture.convention, capture.frame.spans, effect,
    )  # fmt: skip


def _has_b_U(capture: Capture) -> bool:
    return capture.unembed.weights.b_U is not None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _labels(capture: Capture, sources: Sequence[Source], read: bool) -> tuple[tuple[str, ...], ...]:
    if all(source.pos is None for source in sources):
        return (tuple(str(source.node) for source in sources),) * capture.frame.batch
    prompts = range(capture.frame.batch)
    return tuple(tuple(_label(capture, s, prompt, read) for s in sources) for prompt in prompts)


def _label(capture: Capture, source: Source, prompt: int, read: bool) -> str:
    if source.pos is None:
        return str(source.node)
    start, stop = capture.frame.spans[prompt]
    if not start <= source.pos < stop:
        return "padding"
    pos = source.pos - start
    token = f"{_quote(capture.prompts.strings[prompt][pos])}@{pos}"
    kind = getattr(source.node, "kind", "")
    if kind == "embed":
        return token
    return f"{source.node} ← {token}" if read and kind == "head" else f"{source.node}@{pos}"


def _quote(text: Any) -> str:
    return '"' + str(text).replace("\n", "\\n") + '"'
