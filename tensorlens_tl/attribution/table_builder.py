"""A table of contributions under construction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import Edge, Node
from ..operator import Capture
from .table import Attribution, Source
from .targets import Target


class TableBuilder:
    """Collects sources and their contributions to one target, and makes an Attribution of them."""

    def __init__(self, capture: Capture, target: Target):
        self.capture, self.target = capture, target
        self.sources: list[Source] = []
        self.values: list[Float[Tensor, "batch source"]] = []

    def add(self, nodes: Iterable[Node | Edge], values: Float[Tensor, "batch node"]) -> None:
        """Add one row per node, with no position.

        Args:
            nodes: Nodes or edges that contribute.
            values: The contribution of each, in units of the target.
        """
        self.sources += [Source(node) for node in nodes]
        self.values.append(values)

    def spread(self, node: Node, values: Float[Tensor, "batch pos"]) -> None:
        """Add one row per position.

        Args:
            node: A node that contributes at every position.
            values: The contribution at each position, in units of the target.
        """
        self.sources += [Source(node, pos) for pos in range(values.shape[1])]
        self.values.append(values)

    def add_constants(self) -> None:
        """Add the rows of what stands above the final norm: b_U, and the softmax."""
        for name, constant in self.target.constants.items():
            self.add([Node.parse(name)], constant[:, None])

    def to_attribution(
        self,
        by: str,
        effect: str = "direct",
        labels: tuple[tuple[str, ...], ...] | None = None,
    ) -> Attribution:
        """Finish the table.

        Args:
            by: The kind of source that the target was split by.
            effect: The kind of contribution: "direct" or "total".
            labels: A name per source, for every prompt; None to make them from the sources.

        Returns:
            The rows so far, in the order in which they were added.
        """
        capture, target = self.capture, self.target
        if labels is None:
            labels = _labels(capture, self.sources, read=(by, effect) == ("head", "direct"))
        return Attribution(
            values=torch.cat([target.value.new_zeros(len(target.value), 0), *self.values], -1),
            sources=tuple(self.sources),
            labels=labels,
            by=by,
            target=target.name,
            target_value=target.value,
            sums_to_target=effect == "direct" and by != "edge",
            convention=capture.convention,
            spans=capture.frame.spans,
            effect=effect,
        )


# --- Labels --------------------------------------------------------------------------------------


def _labels(capture: Capture, sources: Sequence[Source], read: bool) -> tuple[tuple[str, ...], ...]:
    if all(source.pos is None for source in sources):  # the same for every prompt
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
    # A head's direct effect is split over the positions that the head read.
    return f"{source.node} ← {token}" if read and kind == "head" else f"{source.node}@{pos}"


def _quote(text: Any) -> str:
    return '"' + str(text).replace("\n", "\\n") + '"'
