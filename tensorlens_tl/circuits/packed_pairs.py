"""Prompts and corrupted prompts of any lengths side by side, cut to what a prediction reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from ..passes import Layout, PackedModel, Run, run
from .prompt_pairs import LogitMetric, Pairs


@dataclass(frozen=True, eq=False)
class PackedPairs:
    """Some prompts, run together.

    Attributes:
        index: Index of each prompt among all prompts of the call.
        rows: Token ids of every prompt, up to the position of the prediction.
        twins: The same of the corrupted prompts; empty where there are none.
        device: Device of the model.
    """

    index: Int[Tensor, " prompt"]
    rows: tuple[Int[Tensor, " _"], ...]
    twins: tuple[Int[Tensor, " _"], ...]
    device: torch.device

    @classmethod
    def pieces(
        cls,
        groups: Sequence[Pairs],
        metric: LogitMetric,
        device: torch.device,
        size: Callable[[int], int],
    ) -> Iterator[PackedPairs]:
        """Cut and split prompts, the longest first.

        Args:
            groups: Prompts by length, shortest first.
            metric: What is measured, which knows the position of the prediction.
            device: Device of the model.
            size: How many prompts of a length are run together.

        Yields:
            Pieces of at most so many prompts as their longest one allows.
        """
        # The longest first: attention is padded to the longest of a piece, and lengths there are
        # alike.
        pairs = [pair for group in reversed(groups) for pair in group.split(1)]
        while pairs:
            n = max(1, size(pairs[0].n_pos))
            some, pairs = pairs[:n], pairs[n:]
            # Models are causal here: no token after the prediction changes it.
            ends = [metric.row(pair.n_pos) + 1 for pair in some]
            both = list(zip(some, ends, strict=True))
            yield cls(
                torch.cat([pair.index for pair in some]),
                tuple(pair.ids[0, :end] for pair, end in both),
                tuple(p.corrupted[0, :end] for p, end in both if p.corrupted is not None),
                device,
            )

    @cached_property
    def where(self) -> Layout:
        """Where all tokens stand."""
        return Layout(tuple(map(len, self.rows)), (0,) * len(self.rows), self.device)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first token of every prompt that its corrupted prompt does not share, or the last."""
        return tuple(
            # Equal prompts keep their last token, at which the logits are read.
            min([*(row != twin).nonzero()[:1, 0].tolist(), len(row) - 1])
            for row, twin in zip(self.rows, self.twins, strict=True)
        )

    @cached_property
    def tail(self) -> Layout:
        """Where the tokens from :attr:`starts` on stand. Before them, all runs agree."""
        return Layout(self.where.lengths, self.starts, self.device)

    @cached_property
    def head(self) -> Layout:
        """Where the tokens before :attr:`starts` stand."""
        return Layout(self.starts, (0,) * len(self.rows), self.device)

    @torch.no_grad()
    def entered(self, model: PackedModel) -> tuple[Layout, Tensor, Tensor, Run | None]:
        """Where the tokens that differ stand, and what enters the first block there in both runs.

        Args:
            model: The model that runs both.

        Returns:
            The layout; embeddings of the prompts and of the corrupted ones [token, d_model]; and a
            run of the prefixes, or None where there are none.
        """
        # Before the first token that differs a causal model's states agree, whatever edges are cut.
        kept = self.tail.tail_of(self.where)
        x, twin = model.embed(self.rows), model.embed(self.twins)[kept]
        if not any(self.starts):
            return self.where, x[kept], twin, None
        past = run(model, self.head, x[self.head.tail_of(self.where)], keep=False)
        return self.tail, x[kept], twin, past
