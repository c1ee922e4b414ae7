"""Where the tokens of packed prompts stand: in one row for products, padded for attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of packed prompts stand.

    Attributes:
        lengths: Number of tokens of every prompt, its prefix included.
        starts: Number of tokens in every prompt's prefix.
        device: Device of the model.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    device: torch.device

    @cached_property
    def n_keys(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)

    @cached_property
    def n_queries(self) -> int:
        """Tokens of the longest prompt without its prefix."""
        return max(n - start for n, start in zip(self.lengths, self.starts, strict=True))

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """Prompt, first and last + 1 position of its tokens that are run."""
        return tuple(
            (i, *ends) for i, ends in enumerate(zip(self.starts, self.lengths, strict=True))
        )

    def _indices(self, of: Any) -> Int[Tensor, " token"]:
        # Position p of prompt i stands at p + of(i, start) in the layout that is asked for.
        rows = [torch.arange(a, b) + of(i, a) for i, a, b in self.spans]
        return torch.cat(rows).to(self.device)

    @cached_property
    def pos(self) -> Int[Tensor, " token"]:
        """Position of every token in its prompt."""
        return self._indices(lambda i, start: 0)

    @cached_property
    def keys_at(self) -> Int[Tensor, " token"]:
        """Row of every token among the padded keys."""
        return self._indices(lambda i, start: i * self.n_keys)

    @cached_property
    def queries_at(self) -> Int[Tensor, " token"]:
        """Row of every token among the padded queries."""
        return self._indices(lambda i, start: i * self.n_queries - start)

    @cached_property
    def last(self) -> Int[Tensor, " prompt"]:
        """Index of every prompt's last token."""
        sizes = torch.tensor([stop - start for _, start, stop in self.spans])
        return (sizes.cumsum(0) - 1).to(self.device)

    def tail_of(self, whole: Layout) -> Int[Tensor, " token"]:
        """Indices of these tokens in a layout of the same prompts without prefixes."""
        first = [0, *(whole.last + 1).tolist()]
        return self._indices(lambda i, start: first[i])

    @cached_property
    def behind(self) -> Int[Tensor, "prompt query key"]:
        """How far every key stands behind every query; negative where it follows the query.

        Rows of padding are those of the last token: every row has a key that it sees.
        """
        starts, lengths = torch.tensor((self.starts, self.lengths))[:, :, None]
        query = (torch.arange(self.n_queries) + starts).minimum(lengths - 1)
        return (query[..., None] - torch.arange(self.n_keys)).to(self.device)

    def padded(
        self, x: Float[Tensor, "head token e"], keys: bool
    ) -> Float[Tensor, "head prompt pos e"]:
        """Spread the tokens over rows of prompts, with zeros in between."""
        at, size = (self.keys_at, self.n_keys) if keys else (self.queries_at, self.n_queries)
        rows = x.new_zeros(len(x), len(self.lengths) * size, x.shape[-1])
        return rows.index_copy(1, at, x).unflatten(1, (-1, size))

    def queries_of(
        self, A: Float[Tensor, "head prompt all_query key"]
    ) -> Float[Tensor, "head prompt query key"]:
        """The rows of patterns of all tokens, the prefix among them, that are these queries'."""
        query = torch.arange(self.n_queries) + torch.tensor(self.starts)[:, None]
        # Rows of padding may point past the end. Nothing reads them, so any row serves there.
        rows = query.clamp(max=A.shape[2] - 1).to(A.device)
        return A[:, torch.arange(len(rows), device=A.device)[:, None], rows]

    def packed(self, z: Float[Tensor, "head prompt pos e"]) -> Float[Tensor, "head token e"]:
        """The rows of queries that are tokens."""
        return z.flatten(1, 2)[:, self.queries_at]
