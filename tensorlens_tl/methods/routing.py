"""Where the router of a mixture of experts sent the tokens of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import is_int, pick_prompts, place_label, spelled
from ..operator import Capture
from ..pictures import Page, Paged, Tabled, cell_map, grid_view
from ..sublayers import Experts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 12
"""Tokens that the repr of a routing shows."""


class Sent(NamedTuple):
    """One token sent to one expert: the prompt, the position, the token, the expert, the weight."""

    prompt: int
    pos: int
    token: str
    expert: int
    weight: float


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class Routing(Paged, Tabled):
    """Which experts each token of a run was sent to, and with which weight.

    Attributes:
        layer: Number of the block, from 0.
        tokens: For every prompt, the strings of its real tokens.
        spans: For every prompt, the (start, stop) of its real tokens.
        experts: The expert in every slot of every token; −1 in padding.
        weights: The router's weight of every slot: what the expert's output is multiplied with
            (in Llama-4 its input). It has no unit, and need not sum to 1 over a token's slots.
        n_experts: Number of experts of the block, without a shared one.

    Example:
        >>> import torch
        >>> from tensorlens_tl import Routing
        >>> experts = torch.tensor([[[0, 2], [2, 1]]])
        >>> weights = torch.tensor([[[0.7, 0.3], [0.6, 0.4]]])
        >>> routing = Routing(3, (("A", "cat"),), ((0, 2),), experts, weights, n_experts=4)
        >>> routing
        Routing of layer 3: 2 tokens, 2 of 4 experts each
          "A"@0    L3E0 0.700, L3E2 0.300
          "cat"@1  L3E2 0.600, L3E1 0.400
        >>> routing.counts
        tensor([[1, 1, 2, 0]])
    """

    layer: int
    tokens: tuple[tuple[str, ...], ...]
    spans: tuple[tuple[int, int], ...]
    experts: Int[Tensor, "batch pos slot"]
    weights: Float[Tensor, "batch pos slot"]
    n_experts: int

    _COLUMNS = Sent._fields

    def _rows(self) -> Iterator[Sent]:
        return self.rows()

    def _facts(self) -> dict[str, Any]:
        return {"layer": self.layer, "n_experts": self.n_experts}

    @classmethod
    def of(cls, capture: Capture, layer: int) -> Routing:
        """Read the routing of one block out of a capture.

        Args:
            capture: The captured run.
            layer: Number of the block; −1 is the last.

        Returns:
            The routing of that block.

        Raises:
            ValueError: If there is no such block, or it has no mixture of experts.
        """
        n = len(capture.blocks)
        with_experts = [i for i, b in enumerate(capture.blocks) if isinstance(b.mlp, Experts)]
        some = ", ".join(map(str, with_experts[:8])) + (", …" if len(with_experts) > 8 else "")
        remedy = f"Use one of {some}." if some else "No layer of this model has one."
        if not is_int(layer) or not -n <= layer < n:
            raise ValueError(f"layer={layer!r} is no layer of this model, which has {n}. {remedy}")
        mlp = capture.blocks[layer].mlp
        if not isinstance(mlp, Experts):
            raise ValueError(f"layer={layer} has no mixture of experts. {remedy}")
        tokens, spans = capture.prompts.strings, capture.frame.spans
        return cls(layer % n, tokens, spans, mlp.experts, mlp.share, mlp.n_experts)

    @property
    def counts(self) -> Int[Tensor, "batch expert"]:
        """How many tokens of each prompt reached each expert."""
        # one_hot takes no negative numbers, so padding, −1, becomes class 0.
        one_hot = torch.nn.functional.one_hot(self.experts + 1, self.n_experts + 1)
        return one_hot.sum((1, 2))[:, 1:]  # −1 stands first, for padding

    def rows(self) -> Iterator[Sent]:
        """Give every token and each of its experts, prompt by prompt.

        Yields:
            One row per token and slot.
        """
        for prompt, (start, stop) in enumerate(self.spans):
            experts = self.experts[prompt, start:stop].tolist()
            weights = self.weights[prompt, start:stop].tolist()
            for pos, token in enumerate(self.tokens[prompt]):
                for expert, weight in zip(experts[pos], weights[pos], strict=True):
                    yield Sent(prompt, pos, token, expert, weight)

    def plot(self, ax: Axes | None = None, prompt: int = 0) -> Axes:
        """Draw the weights of one prompt with matplotlib: tokens down, experts across.

        Args:
            ax: Axes to draw on. None makes a figure.
            prompt: Number of the prompt.

        Returns:
            The axes drawn on. A gray cell is an expert that the token was not sent to.

        Raises:
            ValueError: If matplotlib is missing, or there is no such prompt.
        """
        whole = pick_prompts(prompt, len(self.tokens), "routing", ".to_dataframe")[0]
        names, experts, grid = self._grid(whole)
        title, signed = f"router of layer {self.layer}", bool((self.weights < 0).any())
        return cell_map(ax, grid, names, experts, unit="weight", title=title, signed=signed)

    def _grid(self, prompt: int) -> tuple[list[str], list[str], list[list[float]]]:
        """Tokens, experts, and the weights of one prompt; nan where a token was not sent."""
        names = [place_label(token, i) for i, token in enumerate(self.tokens[prompt])]
        # nan is no weight of 0: it is an expert that the token was not sent to.
        grid = [[math.nan] * self.n_experts for _ in names]
        for sent in self.rows():
            if sent.prompt == prompt:
                grid[sent.pos][sent.expert] = sent.weight
        return names, [f"E{i}" for i in range(self.n_experts)], grid

    def _page(self) -> Page:
        axes = ("token", "expert")
        views = [
            replace(grid_view(*self._grid(i), axes, "weight", signed=False), tab=f"prompt {i + 1}")
            for i in range(len(self.tokens))
        ]
        head = repr(self).splitlines()[0]
        notes = ["An empty cell is an expert that the token was not sent to."]
        return Page(head, views, notes, tabs=len(views) > 1, height=700)

    def __repr__(self) -> str:
        slots, n = self.experts.shape[-1], sum(map(len, self.tokens))
        of = "" if len(self.tokens) == 1 else f", prompt 1 of {len(self.tokens)}"
        head = (
            f"Routing of layer {self.layer}: {n} tokens, {slots} of {self.n_experts} experts each"
        )
        lines: dict[str, list[str]] = {}
        for sent in self.rows():
            if sent.prompt or sent.pos == SHOWN:
                break
            label = place_label(sent.token, sent.pos)
            part = f"L{self.layer}E{sent.expert} {sent.weight:.3f}"
            lines.setdefault(label, []).append(part)
        width = max(map(len, lines), default=0)
        shown = [f"  {label:{width}}  {', '.join(parts)}" for label, parts in lines.items()]
        more = ["  …"] if len(self.tokens[0]) > SHOWN else []
        return "\n".join([head + of, *shown, *more])
