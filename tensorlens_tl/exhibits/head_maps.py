"""Attention patterns, and what each head adds to the logits from every position that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Target, attribute_many
from ..checks import as_array
from ..graph import Node
from ..operator import Capture, FrozenTransformer
from ..pictures import Page, Paged, depth, map_view, panel


@dataclass(frozen=True, eq=False, repr=False)
class HeadMaps(Paged):
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

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        n = self.values.shape[-1]
        names = ", ".join(self.heads[:4]) + (", …" if len(self.heads) > 4 else "")
        return f"HeadMaps({names}, {n} × {n}, of {self.target})"

    def _page(self) -> Page:
        views = []
        for prompt, (start, stop) in enumerate(self.spans):
            here, panels = slice(start, stop), []
            small = len(self.heads) * (stop - start) ** 2 <= 2**16
            for name, unit, maps in (
                ("Attention pattern", "share of the row", self.patterns),
                ("What the head adds directly", "units of the target", self.values),
            ):
                stops = [
                    depth(head, as_array(maps[prompt, i, here, here]), None, small and "exact" or None)
                    for i, head in enumerate(self.heads)
                ]
                panels.append(panel(name, unit, stops))
            own = self.labels[prompt]
            axes = ("query position", "key position")
            views.append(map_view(own, own, panels, axes, " ".join(own[:12]), "Head"))
        notes = [
            f"Row i of the second map is for the target at position i: {self.target}.",
            "Direct effects alone: what later sublayers make of a head's writing is theirs.",
        ]
        return Page("Heads: where, and what", views, notes, tabs=len(self) > 1, height=860)


def maps_of_heads(
    capture: Capture,
    operator: FrozenTransformer,
    goals: Sequence[Target],
    heads: Sequence[str],
    target: str,
) -> HeadMaps:
    """Compute patterns of heads, and what they add to a target at every position.

    Args:
        capture: The captured run.
        operator: The operator of that run.
        goals: The target at every position among the real tokens of the longest prompt.
        heads: Names of heads, such as "L1H2".
        target: The target in words.

    Returns:
        Both maps of every head.

    Raises:
        ValueError: If a head does not exist.
    """
    nodes = [Node.parse(head) for head in heads]
    for node in nodes:
        known = node.kind == "head" and not node.name and (node.layer or 0) < len(capture.blocks)
        n_heads = capture.blocks[node.layer or 0].attn.pattern.shape[1] if known else 0
        if not known or (node.index or 0) >= n_heads:
            raise ValueError(
                f"{str(node)!r} is not a head of {capture.model_name}. Pass names such as 'L0H0'."
            )
    frame = capture.frame
    patterns = torch.stack(
        [capture.blocks[node.layer or 0].attn.pattern[:, node.index] for node in nodes], 1
    )
    real = frame.real[:, None, :, None] & frame.real[:, None, None, :]
    values = patterns.new_zeros(patterns.shape)
    names = {str(node): i for i, node in enumerate(nodes)}
    for goal, found in zip(goals, attribute_many(capture, operator, goals, "head"), strict=True):
        rows = [
            (row, names[str(source.node)], source.pos)
            for row, source in enumerate(found.sources)
            if source.pos is not None and str(source.node) in names
        ]
        row, head, pos = (torch.tensor(column, device=values.device) for column in zip(*rows))
        for prompt in range(frame.batch):
            values[prompt, head, goal.query[prompt], pos] = found.values[prompt, row].to(values)
    return HeadMaps(
        tuple(map(str, nodes)),
        torch.where(real, patterns, 0),
        torch.where(real, values, 0),
        capture.prompts.strings,
        frame.spans,
        target,
    )
