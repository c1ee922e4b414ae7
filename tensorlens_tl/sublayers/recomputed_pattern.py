"""Attention over positions without a stored pattern: blocks of A are recomputed when needed.

The pattern follows from what is kept: A[q, k] = exp(s[q, k] − lse[q]), with the masked scores s and
their log-sum-exp lse[q]. So nothing of size heads × L² needs to exist. Scores and lse are divided
by ln 2, which makes A = 2^(s − lse), because torch computes ``exp2`` faster than ``exp`` on a CPU.
The script ``benchmarks/recomputed.py`` prints by how much.

1. Keep q' = [q · scale / ln 2, −lse] and k' = [k, 1], positions last, so that one product q'ᵀ k'
   gives s − lse. Under a soft cap the scores are capped first, and −lse is added after. ALiBi's
   bias is added to the product; inside the product, distances would lose digits.
2. Compute lse in one pass over blocks of queries, once per capture.
3. Compute a block of A (rows × columns) by one product into a buffer, a power of 2 in place, and
   zeros at the mask. A block never leaves the cache, and blocks outside the mask are skipped.
4. For a push (A V) rows are queries and columns keys; for a pull (Aᵀ U) the other way round. A
   block of rows collects its own result, with the many vectors side by side in the values.
5. Run every prompt over its own real tokens. Padding is never read and stays 0.
6. Serve the query heads of one key/value head in turn, so keys and values are not repeated.
7. A batched sweep takes the pattern as ``Tiles`` instead, a few rows of all heads at a time. Norms
   on either side multiply the rows and columns of a tile.

Attention sinks are one more score per head in lse, and nothing else.

Flops per head for P vectors: L² (d_head + 1) for the scores, P L² d_head for the values, and L²/2
exponentials, as only the causal half is computed. Memory per layer: heads · L · (d_head + 1)
numbers. A pass adds the buffer and 2 L d_head P numbers.

Rabe and Staats, "Self-attention does not need O(n²) memory" (arXiv 2112.05682); Dao et al.,
"FlashAttention" (arXiv 2205.14135), for the recomputation from a saved log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..maps import Frame, LinearMap, Mix
from .attention_kernel import LN2, Scores, capped_, log_sum_exp, mix_blocks


@dataclass(frozen=True, eq=False)
class RecomputedMix(LinearMap):
    """Attention over positions like ``Mix``, with a pattern that is recomputed at every use.

    z_q^h = Σ_k A_h[q, k] v_k^{kv(h)} with A_h[q, k] = 2^(s_h[q, k] − lse_h[q]).

    Attributes:
        frame: Layout of the batch.
        queries: Queries [q · scale / ln 2, −lse], or [q · scale / cap, −lse] under a soft cap.
        keys: Keys [k, 1].
        scores: Scale, soft cap and mask.
        d_head: Width of one head's values.
    """

    frame: Frame
    queries: Float[Tensor, "batch head d_score pos"]
    keys: Float[Tensor, "batch kv_head d_score pos"]
    scores: Scores
    d_head: int

    @classmethod
    def of(
        cls,
        frame: Frame,
        q: Float[Tensor, "batch pos head d_query"],
        k: Float[Tensor, "batch pos kv_head d_query"],
        scores: Scores,
        d_head: int,
        sinks: Float[Tensor, " head"] | None = None,
    ) -> RecomputedMix:
        """Arrange queries and keys for the kernels, and compute lse.

        Args:
            frame: Layout of the batch.
            q: Queries, after their norm and rotation.
            k: Keys, after their norm and rotation. Grouped-query attention has fewer heads here.
            scores: Scale, soft cap and mask.
            d_head: Width of the values of one head.
            sinks: One more score per head, which takes part in the softmax and has no value
                (attention sinks), or None.

        Returns:
            The map from values to z.

        Raises:
            ValueError: If the number of query heads is not a multiple of the key/value heads.
        """
        if q.shape[2] % k.shape[2] or q.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"Queries {list(q.shape)} and keys {list(k.shape)} do not fit. Give the same "
                "positions, and query heads that are a multiple of the key/value heads."
            )
        if scores.slopes is not None and len(scores.slopes) != q.shape[2]:
            raise ValueError(
                f"{len(scores.slopes)} slopes were given for {q.shape[2]} heads. Give one for each."
            )
        # Scale and the change from nats to bits are put into the queries once, not into every
        # block.
        scale = scores.scale / (scores.soft_cap or LN2)
        queries = torch.nn.functional.pad((q * scale).permute(0, 2, 3, 1), (0, 0, 0, 1))
        keys = torch.nn.functional.pad(k.permute(0, 2, 3, 1), (0, 0, 0, 1), value=1.0)
        mix = cls(frame, queries.contiguous(), keys.contiguous(), scores, d_head)
        with torch.no_grad():
            beside = None if sinks is None else sinks.to(q).view(mix.kv_heads, -1, 1)
            slopes = scores.slopes_in_bits(q, mix.kv_heads)
            for _, _, heads, keys in mix._prompts():
                for r, queries in enumerate(heads):
                    lse = log_sum_exp(queries, keys, scores, None if slopes is None else slopes[r])
                    # A sink takes part in the softmax's sum and has no value: it only makes lse
                    # larger.
                    lse = lse if beside is None else torch.logaddexp(lse, beside[:, r])
                    queries[:, -1] = -lse / LN2
        return mix

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def heads(self) -> int:
        return self.queries.shape[1]

    @property
    def in_dim(self) -> int:
        return self.kv_heads * self.d_head

    @property
    def out_dim(self) -> int:
        return self.heads * self.d_head

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        return self.queries, self.keys

    @property
    def _repeat(self) -> int:
        return self.heads // self.kv_heads

    def _prompts(self) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Per prompt: number, real positions, queries [repeat, kv_head, d_score, pos] and keys."""
        grouped = self.queries.unflatten(1, (self.kv_heads, -1)).transpose(1, 2)
        for prompt, (start, stop) in enumerate(self.frame.spans):
            pos = slice(start, stop)
            yield prompt, pos, grouped[prompt, ..., pos], self.keys[prompt, ..., pos]

    @torch.no_grad()
    def _weigh(self, x: Tensor, pull: bool, from_heads: bool, to_heads: bool, width: int) -> Tensor:
        """Compute Σ A x or Σ Aᵀ x, per query head or per key/value head.

        Args:
            x: Vectors [..., batch, pos, head · width] or [..., batch, pos, kv_head · width].
            pull: Whether to apply Aᵀ instead of A.
            from_heads: Whether ``x`` has query heads, and not key/value heads.
            to_heads: Whether the result has query heads. Otherwise they are summed per group.
            width: Width of one head.

        Returns:
            Vectors [..., batch, pos, head · width] or [..., batch, pos, kv_head · width].
        """
        many = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        size = [self.kv_heads, self._repeat if from_heads else 1, width]
        # [batch, repeat, many, kv_head, pos, width]
        source = many.unflatten(-1, size).permute(1, 4, 0, 3, 2, 5)
        size[1] = self._repeat if to_heads else 1
        whole = all(span == (0, self.frame.n_pos) for span in self.frame.spans)
        # Without padding every number is written, so zeros would be written twice.
        out = (many.new_empty if whole else many.new_zeros)(*many.shape[:-1], *size)
        target = out.permute(1, 4, 0, 3, 2, 5)
        slopes = self.scores.slopes_in_bits(x, self.kv_heads)
        for prompt, pos, q, k in self._prompts():
            values, sums = source[prompt, ..., pos, :], target[prompt, ..., pos, :]
            # A view: query heads of one group see the same values at no cost in memory.
            values = values.expand(self._repeat, *values.shape[1:])
            # Sums over the group are added up inside the kernel; single heads need a call for each.
            if not to_heads:
                mix_blocks(q, k, values, sums[0], self.scores, slopes, pull)
                continue
            for r in range(self._repeat):
                own = slice(r, r + 1)
                only = None if slopes is None else slopes[own]
                mix_blocks(q[own], k, values[own], sums[r], self.scores, only, pull)
        return out.reshape(*x.shape[:-1], math.prod(size))

    def apply(self, x):
        return _Weighing.apply(x, self, False)

    def apply_t(self, y, effects=None):
        return _Weighing.apply(y, self, True)

    def by_head_t(
        self, y: Float[Tensor, "*many batch pos z"]
    ) -> Float[Tensor, "*many batch pos head d_head"]:
        """The adjoint per query head. Summed over the heads of a group it is :meth:`apply_t`."""
        size = self.heads, self.d_head
        return self._weigh(y, True, True, True, self.d_head).unflatten(-1, size)

    def sum_heads(self, values: Float[Tensor, "batch pos head"]) -> Float[Tensor, "batch pos"]:
        """Mix one number per position and query head, and sum over heads: Σ_h A_h values_h."""
        return self._weigh(values, False, True, False, 1).sum(-1)

    @property
    def bias(self):
        return self.frame.zeros(self.out_dim)

    def constants(self):
        return {}

    def head(self, index: int) -> RecomputedMix:
        """The part of one query head. It shares memory with the whole map."""
        kv, slopes = index // self._repeat, self.scores.slopes
        return replace(
            self,
            queries=self.queries[:, index : index + 1],
            keys=self.keys[:, kv : kv + 1],
            scores=replace(self.scores, slopes=None if slopes is None else (slopes[index],)),
        )

    def tiles(self, prompt: int) -> Tiles:
        """The pattern of one prompt on its real tokens, to be computed tile by tile."""
        _, _, queries, keys = list(self._prompts())[prompt]
        slopes = self.scores.slopes_in_bits(queries, self.kv_heads)
        slopes = None if slopes is None else slopes.transpose(0, 1)
        return Tiles(queries.transpose(0, 1), keys[:, None], self.scores, slopes)

    def looks_ahead(self, prompt: int) -> bool:
        """Whether a query of the prompt attends to a later key."""
        return not self.scores.causal

    @torch.no_grad()
    def rows(self, query: Int[Tensor, " batch"]) -> Float[Tensor, "batch head key_pos"]:
        """Compute the rows of the pattern at one query position per prompt.

        Args:
            query: Index of the query position, per prompt [batch].

        Returns:
            The rows A[query] [batch, head, key_pos], zero at padding.
        """
        found = self.frame.zeros(self.heads).mT
        for prompt, (start, stop) in enumerate(self.frame.spans):
            if start <= query[prompt] < stop:
                row = self.tiles(prompt)[query[prompt : prompt + 1] - start, slice(None)]
                found[prompt, :, start:stop] = row.flatten(0, 1)[:, 0]
        return found

    @property
    def pattern(self) -> Float[Tensor, "batch head query_pos key_pos"]:
        """The whole pattern of this layer, recomputed at every access: heads × L² numbers."""
        n, found = self.frame.n_pos, self.frame.zeros(self.heads * self.frame.n_pos)
        found = found.unflatten(2, (self.heads, n)).transpose(1, 2)
        for prompt, (start, stop) in enumerate(self.frame.spans):
            whole = self.tiles(prompt)[slice(None), slice(None)]
            found[prompt, :, start:stop, start:stop] = whole.flatten(0, 1)
        return found


@dataclass(frozen=True, eq=False)
class Tiles:
    """The pattern of one prompt; ``tiles[to, source]`` computes a tile when it is asked for.

    ``to`` are queries and ``source`` keys. A sweep flips them into its own causal coordinates: it
    exchanges keys and queries for a pull, and reverses positions for a push. Then A is 0 unless
    to ≤ source < to + window.

    Attributes:
        queries: Queries as in ``RecomputedMix``, grouped by key/value head.
        keys: Keys as in ``RecomputedMix``.
        scores: Soft cap and mask.
        slopes: ALiBi's slopes in bits, or None.
        query_gain: Factors of the rows of queries, or None.
        key_gain: Factors of the columns of keys, or None.
        flip: "pull", "push", or "" for queries and keys as they are.
        dtype: Dtype of the tiles, or None for the dtype of the queries.
    """

    queries: Float[Tensor, "group repeat d_score pos"]
    keys: Float[Tensor, "group 1 d_score pos"]
    scores: Scores
    slopes: Float[Tensor, "group repeat 1 1"] | None = None
    query_gain: Float[Tensor, " pos"] | None = None
    key_gain: Float[Tensor, " pos"] | None = None
    flip: str = ""
    dtype: torch.dtype | None = None

    @torch.no_grad()
    def __getitem__(
        self, at: tuple[slice | Tensor, slice | Tensor]
    ) -> Float[Tensor, "group repeat to source"]:
        pull, scores = self.flip == "pull", self.scores
        (i, rows, row_gain), (j, columns, column_gain) = zip(
            at,
            (self.keys, self.queries)[:: 1 if pull else -1],
            (self.key_gain, self.query_gain)[:: 1 if pull else -1],
            strict=True,
        )
        width = slice(None) if scores.soft_cap is None else slice(-1)
        block = rows[..., width, i].mT @ columns[..., width, j]
        if scores.soft_cap is not None:
            lse = self.queries[..., -1:, j] if pull else self.queries[..., -1:, i].mT
            capped_(block, scores).add_(lse)
        if scores.causal:
            pos = torch.arange(rows.shape[-1], device=rows.device)
            behind = pos[j] - pos[i][:, None] if self.flip else pos[i][:, None] - pos[j]
            if self.slopes is not None:
                block.addcmul_(self.slopes, behind.to(block), value=-1)
            hidden = behind < 0
            hidden = hidden if scores.window is None else hidden | (behind >= scores.window)
            # 2^−inf = 0 exactly, so hidden cells add nothing.
            block.masked_fill_(hidden, -math.inf)
        block.exp2_()
        for gain in (
            None if row_gain is None else row_gain[i][:, None],
            None if column_gain is None else column_gain[j],
        ):
            block = block if gain is None else block.mul_(gain)
        return block if self.dtype is None else block.to(self.dtype)

    def times(self, query_gain: Tensor | None = None, key_gain: Tensor | None = None) -> Tiles:
        """The tiles with rows of queries, or columns of keys, multiplied by factors [pos]."""

        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return b if a is None else a if b is None else a * b

        query_gain, key_gain = both(self.query_gain, query_gain), both(self.key_gain, key_gain)
        return replace(self, query_gain=query_gain, key_gain=key_gain)

    def flipped(self, transposed: bool) -> Tiles:
        """The tiles in the causal coordinates of a pull (``transposed``) or of a push."""
        if transposed:
            return replace(self, flip="pull")
        parts = ("queries", "keys", "query_gain", "key_gain")
        back = {name: getattr(self, name) for name in parts}
        back = {name: None if x is None else x.flip(-1) for name, x in back.items()}
        return replace(self, **back, flip="push")


AnyMix = Mix | RecomputedMix
"""Attention over positions with a stored or a recomputed pattern."""


class _Weighing(torch.autograd.Function):
    """A push whose gradient is the pull, and the other way round. Nothing is stored for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mix: RecomputedMix, pull: bool) -> Tensor:
        ctx.mix, ctx.pull = mix, pull
        return mix._weigh(x, pull, pull, not pull, mix.d_head)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Weighing.apply(gradients[0], ctx.mix, not ctx.pull), None, None


HOST = (
    "patterns recomputed tile by tile; the model's own forward pass computed them whole, one layer "
    "at a time, and kept none (HookedTransformer's and the Bridge's attention have no other way)"
)
"""A note for plans of memory: what pattern="recomputed" saves and what it cannot."""
