"""Attention patterns, and what each head adds to the logits from every position that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import TargetLike, attribute_many, resolve
from ..checks import as_array, spelled
from ..graph import Node
from ..operator import Capture, FrozenTransformer
from ..pictures import Page, Paged, Tabled, cell_map, depth, map_view, panel
from .operator_maps import beginning

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class HeadMaps(Paged, Tabled):
    """Heads twice: where they attend, and what they add to each position's target from there.

    A pattern says how much is read, not what. The second map is in the target's units: entry (i, j)
    is what the head, reading position j, adds directly to the target at position i. Over all heads,
    positions, MLPs and constants, the entries of row i sum to that target.

    Attributes:
        heads: Names of the heads, such as "L1H2".
        patterns: The attention patterns [prompt, head, query_pos, key_pos].
        values: What the heads add directly [prompt, head, query_pos, key_pos].
        labels: The tokens of every prompt.
        spans: Start and stop of every prompt's tokens.
        target: The target of the rows, in words.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> found = lens.head_maps(["L1H0", "L1H1"], "Paris")
        >>> found.values.shape
        torch.Size([1, 2, 6, 6])
        >>> direct = dict(lens.attribute("Paris", by="component").top(40))
        >>> abs(float(found.values[0, 0, -1].sum()) - direct["L1H0"]) < 1e-4
        True
    """

    heads: tuple[str, ...]
    patterns: Float[Tensor, "prompt head query_pos key_pos"]
    values: Float[Tensor, "prompt head query_pos key_pos"]
    labels: tuple[tuple[str, ...], ...]
    spans: tuple[tuple[int, int], ...]
    target: str

    _COLUMNS = ("prompt", "head", "query_pos", "key_pos", "pattern", "value")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for prompt, (start, stop) in enumerate(self.spans):
            here = slice(start, stop)
            for i, head in enumerate(self.heads):
                maps = (m[prompt, i, here, here].tolist() for m in (self.patterns, self.values))
                for query, rows in enumerate(zip(*maps, strict=True)):
                    for key, pair in enumerate(zip(*rows, strict=True)):
                        yield (prompt, head, query, key, *pair)

    def _facts(self) -> dict[str, Any]:
        return {"target": self.target, "tokens": self.labels}

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        n = self.values.shape[-1]
        names = ", ".join(self.heads[:4]) + (", …" if len(self.heads) > 4 else "")
        return f"HeadMaps({names}, {n} × {n}, of {self.target})"

    @property
    def _unit(self) -> str:
        """Of the values: a direction has a unit of its own."""
        tokens = self.target.startswith(("its own", "the logit of '", 'the logit of "'))
        return "logits" if tokens else "units of the target"

    def plot(
        self,
        ax: Axes | None = None,
        head: str | None = None,
        prompt: int = 0,
        what: str = "values",
    ) -> Axes:
        """Draw one head's map with matplotlib.

        Args:
            ax: Axes to draw on. None makes a figure.
            head: Name of the head. None is the first one.
            prompt: Index of the prompt in the batch.
            what: "values", what the head adds to the target; or "patterns", where it attends.

        Returns:
            The axes drawn on: rows are the positions that read, columns those that are read.

        Raises:
            ValueError: If matplotlib is missing, or there is no such head or map.
        """
        head, kinds = self.heads[0] if head is None else head, ("values", "patterns")
        if head not in self.heads:
            raise ValueError(f"head={head!r} is not here. Use one of {', '.join(self.heads)}.")
        if what not in kinds:
            raise ValueError(f"what={what!r} is not a map. Use one of {', '.join(kinds)}.")
        here, own = slice(*self.spans[prompt]), self.labels[prompt]
        added = what == "values"
        return cell_map(
            ax,
            as_array(getattr(self, what)[prompt, self.heads.index(head), here, here]),
            own,
            own,
            unit=self._unit if added else "share of the row",
            title=f"what {head} adds to {self.target}" if added else f"where {head} attends",
            axis_names=("query_pos: reads", "key_pos: is read"),
            signed=added,
        )

    def _page(self) -> Page:
        views = []
        for prompt, (start, stop) in enumerate(self.spans):
            here, panels = slice(start, stop), []
            small = len(self.heads) * (stop - start) ** 2 <= 2**16
            for name, unit, maps in (
                ("What the head adds directly", self._unit, self.values),
                ("Attention pattern", "share of the row", self.patterns),
            ):
                stops = [
                    depth(
                        head,
                        as_array(maps[prompt, i, here, here]),
                        None,
                        "exact" if small else None,
                    )
                    for i, head in enumerate(self.heads)
                ]
                panels.append(panel(name, unit, stops, signed=maps is self.values))
            own = self.labels[prompt]
            axes = ("query position", "key position")
            views.append(map_view(own, own, panels, axes, beginning(own), "Head"))
        notes = [
            f"Row i of the first map is for the target at position i: {self.target}.",
            "Direct effects alone: what later sublayers make of a head's writing is theirs.",
        ]
        title = self.heads[0] if len(self.heads) == 1 else "Heads"
        return Page(f"{title}: where, and what", views, notes, tabs=len(self) > 1, height=860)


def maps_of_heads(capture: Capture, heads: Sequence[str], target: TargetLike = None) -> HeadMaps:
    """Compute patterns of heads, and what they add to a target at every position.

    Args:
        capture: The captured run.
        heads: Names of heads, such as "L1H2".
        target: What is read at every position; None is each position's own prediction.

    Returns:
        Both maps of every head.

    Raises:
        ValueError: If a head or the target does not exist, or a head has no pattern.
    """
    nodes = [Node.parse(head) for head in heads]
    places = {str(node): i for i, node in enumerate(nodes)}
    frame = capture.frame
    patterns = torch.stack([_pattern(capture, node) for node in nodes], 1)
    real = frame.real[:, None, :, None] & frame.real[:, None, None, :]
    patterns = torch.where(real, patterns, 0)
    values = torch.zeros_like(patterns)
    for prompt, (start, stop) in enumerate(frame.spans):
        one = capture.prompt(prompt)
        first = one.frame.spans[0][0]
        goals = [resolve(one, target, None, pos) for pos in range(stop - start)]
        splits = attribute_many(one, FrozenTransformer.of(one), goals, "head")
        for query, found in enumerate(splits):
            for source, value in zip(found.sources, found.values[0], strict=True):
                head = places.get(str(source.node))
                if head is not None and source.pos is not None:
                    values[prompt, head, start + query, start + source.pos - first] = value
    said = "its own prediction" if target is None else f"the logit of {target!r}"
    names = tuple(map(str, nodes))
    return HeadMaps(names, patterns, values, capture.prompts.strings, frame.spans, said)


def _pattern(capture: Capture, node: Node) -> Float[Tensor, "prompt query_pos key_pos"]:
    layer, head = node.layer or 0, node.index or 0
    if node.kind != "head" or node.name or layer >= len(capture.blocks):
        raise ValueError(
            f"{str(node)!r} is not a head of {capture.model_name}. Pass names such as 'L0H0'."
        )
    pattern = getattr(capture.blocks[layer].attn, "pattern", None)
    if pattern is None:
        raise ValueError(
            f"Layer {layer} of {capture.model_name} has no attention pattern. Pass heads of other "
            "layers."
        )
    if head >= pattern.shape[1]:
        raise ValueError(
            f"There is no head {str(node)!r} in {capture.model_name}. Pass L{layer}H0 to "
            f"L{layer}H{pattern.shape[1] - 1}."
        )
    return pattern[:, head]
