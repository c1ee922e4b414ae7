"""A model's weights and scores, ready to run packed prompts: real tokens of all prompts in one row.

The host computes nothing here. Embeddings are its own; all above is computed from its weights as
the operator knows them. So a study compares one run with the host's own logits (:meth:`agrees`),
and goes the host's way (``edge_patching``) where they differ or a part is not known.

Linear maps run on packed tokens [.., token, d] without padding. Attention alone is padded, on the
right, and the causal mask hides that padding.

    token    all tokens that are run, prompt by prompt
    prefix   tokens at the start of a prompt that are not run, as all runs agree there: only their
             keys and values are there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..costs import forgets
from ..graph import Wiring
from ..hosts import Adapter
from ..maps import HALF, NormWeights
from ..operator import turned
from ..recording import hooked
from ..refusals import NotRecomputableError, UnsupportedArchitectureError
from ..sublayers import (
    BlockWeights,
    GatedMLPWeights,
    HeadNorm,
    MLPWeights,
    Rotation,
    ScoreWeights,
    UnembedWeights,
    gating_ratio,
)
from .packed_layout import Layout

CHUNK = 2**28
"""Bytes that the outputs of all writers in one pass may take, about."""

AGREED: WeakKeyDictionary[Any, tuple[Any, int]] = forgets(WeakKeyDictionary())
"""Hosts that gave the logits of packed runs: their state then, and the length of the prompt."""


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """One block.

    Attributes:
        block: Weights of the block.
        scores: What its attention scores are made of.
        window: Number of keys that a query sees, its own included, or None for all.
    """

    block: BlockWeights
    scores: ScoreWeights
    window: int | None

    @cached_property
    def kv_of(self) -> list[int]:
        """The key and value head of every query head."""
        heads, kv_heads = len(self.block.attn.W_O), len(self.block.attn.W_V)
        return [h * kv_heads // heads for h in range(heads)]  # groups are neighbours

    @cached_property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """What a head adds is z W_O, divided by the scale of the post-norm where there is one."""
        return past_norm(self.block.ln1_post, self.block.attn.W_O.detach())

    @property
    def b_out(self) -> Float[Tensor, " d_model"] | None:
        """The bias of the MLP's output."""
        mlp = self.block.mlp
        return mlp.b_out if isinstance(mlp, MLPWeights | GatedMLPWeights) else None

    def weights(self, side: str) -> tuple[Tensor, Tensor | None, HeadNorm | None]:
        """Matrix, bias and norm of the queries, keys or values, by their own head."""
        s, attn = self.scores, self.block.attn
        found = {
            "q": (s.W_Q, s.b_Q, s.q_norm),
            "k": (s.W_K, s.b_K, s.k_norm),
            "v": (attn.W_V, attn.b_V, None),
        }
        return found[side]

    def turned(self, side: str, y: Tensor, rotation: Rotation | None) -> Tensor:
        """Norm and rotate queries or keys [.., head, token, e], in the order of the model."""
        norm = self.weights(side)[2]
        if side == "v":
            return y
        y = turned(y, rotation) if self.scores.norm_last else y
        y = y if norm is None else norm.apply(y)[0]
        return y if self.scores.norm_last else turned(y, rotation)

    def of_query_heads(self, side: str, x: Tensor) -> Tensor:
        """Rows of queries, keys or values [any_head, ..], one for every query head."""
        return x if side == "q" or len(x) == len(self.kv_of) else x[self.kv_of]

    def shared(self, side: str, n: Tensor) -> Tensor:
        """Queries, keys or values of all heads on one input [token, d]: [head, token, e]."""
        W, b, _ = self.weights(side)
        W = W.detach()
        # All heads' matrices side by side: one product [token, d] @ [d, head · e].
        y = (n @ W.movedim(0, 1).flatten(1)).unflatten(-1, (len(W), -1)).movedim(1, 0)
        return y if b is None else y + b.detach()[:, None]

    def apart(self, side: str, heads: list[int], n: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries, keys or values of some query heads, each on an input of its own.

        Args:
            side: "q", "k" or "v".
            heads: The query heads.
            n: Normalized inputs of these heads [head, token, d].
            rotation: Rotation of the tokens, or None.

        Returns:
            One row per head [head, token, e].
        """
        W, b, norm = self.weights(side)
        own = heads if side == "q" else [self.kv_of[h] for h in heads]
        gain = None if norm is None else norm.weights.gain
        if norm is not None and (norm.whole or (gain is not None and gain.ndim > 1)):
            # All heads' weights on one head's input: one norm divides them together.
            every = torch.stack([self.turned(side, self.shared(side, x), rotation) for x in n])
            return every[range(len(own)), own]
        whole = own == list(range(len(W)))
        y = torch.bmm(n, W.detach() if whole else W.detach()[own])
        if b is not None:
            y += b.detach()[own][:, None]
        return self.turned(side, y, rotation)

    def pattern(self, q: Tensor, k: Tensor, heads: list[int], where: Layout) -> Tensor:
        """Softmax of the scores of some query heads [head, prompt, query, key]."""
        S = self.capped(self.products(q, k), heads, where)
        # A sink takes its share of the softmax, and then is dropped: it has no value.
        return S.softmax(-1)[..., : k.shape[2]]

    def products(self, q: Tensor, k: Tensor) -> Float[Tensor, "head prompt query key"]:
        """Scores before a soft cap, ALiBi and the mask."""
        return q @ k.mT * self.scores.scale

    def capped(self, S: Tensor, heads: list[int], where: Layout) -> Tensor:
        """The scores that the softmax reads; in a last column the sinks, where there are any."""
        s = self.scores
        S = S if s.soft_cap is None else s.soft_cap * torch.tanh(S / s.soft_cap)
        if s.slopes is not None:
            slopes = S.new_tensor([s.slopes[h] for h in heads])[:, None, None, None]
            S = S - slopes * where.behind
        S = S.masked_fill(self.hidden(where), -torch.inf)
        if s.sinks is None:
            return S
        sinks = s.sinks.detach()[heads].to(S)[:, None, None, None].expand(*S.shape[:-1], 1)
        return torch.cat((S, sinks), -1)

    def hidden(self, where: Layout) -> Bool[Tensor, "prompt query key"]:
        """The keys that a query does not see."""
        hidden = where.behind < 0
        return hidden if self.window is None else hidden | (where.behind >= self.window)

    def preactivations(self, x: Tensor) -> tuple[Float[Tensor, "*many token d_mlp"], ...]:
        """What the activation of the MLP reads, and what a gated MLP multiplies it with."""
        w: Any = self.block.mlp  # a plain or a gated one
        n = normed(self.block.ln2, x)
        gated = [(w.W_gate, w.b_gate)] if isinstance(w, GatedMLPWeights) else []
        return tuple(_linear(n, W, b) for W, b in (*gated, (w.W_in, w.b_in)))

    def mlp_of(self, pre: tuple[Tensor, ...]) -> Float[Tensor, "*many token d"]:
        """What the MLP makes of its pre-activations, without b_out and without a post-norm."""
        w: Any = self.block.mlp
        h = _act(w.act, pre[0])
        h = with_bias(h * pre[1], w.b_post) if len(pre) > 1 else normed(w.ln, h)
        return h @ w.W_out.detach()

    def mlp(self, x: Tensor) -> Float[Tensor, "*many token d"]:
        """What the MLP makes of the residual, without b_out and without a post-norm."""
        return self.mlp_of(self.preactivations(x))


def _linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return with_bias(x @ W.detach(), b)


def _act(act: str, z: Tensor) -> Tensor:
    # act(z) = ratio(z) · z; silu has a kernel of its own, which makes one tensor less.
    return torch.nn.functional.silu(z) if act == "silu" else gating_ratio(act, z) * z


def normed(w: NormWeights | None, x: Tensor) -> Tensor:
    """A norm of the model on vectors [.., d], computed in their dtype."""
    if w is None:
        return x
    gain, b = (None if t is None else t.detach() for t in (w.gain, w.b))
    if w.center:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], gain, b, w.eps or 0.0)
    y = x / scale_of(w, x)
    y = y if gain is None else y.mul_(gain)
    return y if b is None else y + b


def scale_of(w: NormWeights, x: Tensor) -> Tensor:
    """What a norm divides its input by [.., 1]."""
    x = x - x.mean(-1, keepdim=True) if w.center else x
    return (
        # ‖x‖² / d is the mean of x², without a tensor of squares.
        torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + (w.eps or 0.0)
    ).sqrt()


def scale_past(w: NormWeights | None, x: Tensor, b: Tensor | None) -> Tensor | None:
    """What a post-norm divides a sublayer's output x and its bias by; None without a norm."""
    return None if w is None else scale_of(w, with_bias(x, b))


def with_bias(x: Tensor, b: Tensor | None) -> Tensor:
    """Add a bias, if there is one."""
    return x if b is None else x + b.detach()


def past_norm(w: NormWeights | None, x: Tensor) -> Tensor:
    """The linear part of a post-norm but for its scale: centre, then multiply by the weight."""
    return x if w is None else w.at_scale(x, x.new_ones(1), False)


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A model that runs packed prompts.

    Attributes:
        adapter: Adapter of the host, which gives embeddings and is compared with.
        layers: Weights of every block.
        wiring: The edges that the model has.
        entry: The hook point of what enters the first block.
    """

    adapter: Adapter
    layers: tuple[PackedLayer, ...]
    wiring: Wiring
    entry: nn.Module

    @classmethod
    def of(
        cls, adapter: Adapter, wiring: Wiring, entry: nn.Module, n_pos: int
    ) -> PackedModel | None:
        """Arrange the weights of a model.

        Args:
            adapter: Adapter of the host.
            wiring: The edges that the model has.
            entry: The hook point of what enters the first block.
            n_pos: Tokens of the longest prompt.

        Returns:
            The model, or None where some part of it is not known, or the host computes in half
            precision, whose rounding is its own.
        """
        weights = adapter.weights
        if adapter.dtype in HALF or adapter.of_pictures or adapter.headless or weights.unembed.head:
            return None
        if adapter.read_at is not None or not all(map(_known, weights.blocks)):
            return None
        if weights.ln_final is not None and weights.ln_final.eps is None:
            return None
        if any(b.mlp is not None and b.parallel != wiring.parallel for b in weights.blocks):
            return None
        scores = adapter.score_weights(n_pos)
        try:
            how = adapter.recomputed_reading().scores
        except (NotRecomputableError, UnsupportedArchitectureError):
            return None
        if isinstance(scores, str) or not all(s.causal for s in how):
            return None
        rows = zip(weights.blocks, scores, how, strict=True)
        return cls(adapter, tuple(PackedLayer(b, s, h.window) for b, s, h in rows), wiring, entry)

    @property
    def unembed(self) -> UnembedWeights:
        """The unembedding."""
        return self.adapter.weights.unembed

    @cached_property
    def leaks(self) -> bool:
        """Whether constants pass a live post-norm: then every node moves what is above it."""
        blocks = self.adapter.weights.blocks
        biased = (b.attn.b_O is not None and b.ln1_post is not None for b in blocks)
        return any(biased) or any(
            layer.b_out is not None and layer.block.ln2_post is not None for layer in self.layers
        )

    def most_tokens(self, n_writers: int) -> int:
        """Number of tokens run at once, to write :data:`CHUNK` bytes."""
        heads, _, width = self.layers[0].block.attn.W_O.shape
        cells = width * (n_writers + 6 * heads)
        return max(1, CHUNK // (cells * self.unembed.W_U.element_size()))

    def turns(self, where: Layout) -> list[Rotation | None]:
        """The rotation of every block at the positions of packed tokens."""
        made: dict[int, Rotation] = {}
        found: list[Rotation | None] = []
        for layer in self.layers:
            r = layer.scores.rotation
            # Most layers share one rotation, so its rows are taken once.
            if r is not None and id(r.cos) not in made:
                cos, sin = (t.detach()[where.pos].to(self.unembed.W_U) for t in (r.cos, r.sin))
                made[id(r.cos)] = replace(r, cos=cos, sin=sin)
            found.append(None if r is None else made[id(r.cos)])
        return found

    def logits(self, end: Float[Tensor, "*many d_model"]) -> Float[Tensor, "*many d_vocab"]:
        """Logits of the final residual at some positions."""
        w = self.unembed
        raw = _linear(normed(self.adapter.weights.ln_final, end), w.W_U, w.b_U)
        return raw if w.soft_cap is None else w.soft_cap * torch.tanh(raw / w.soft_cap)

    @torch.no_grad()
    def embed(self, rows: Sequence[Tensor]) -> Float[Tensor, "token d_model"]:
        """What enters the first block of prompts, packed: the host's own embeddings."""
        found: dict[int, Tensor] = {}
        for n in {len(row) for row in rows}:
            these = [i for i, row in enumerate(rows) if len(row) == n]
            ids = torch.stack([rows[i] for i in these])
            try:  # the host runs no block
                with hooked([(self.entry, _enter)]):
                    self.adapter.run(ids, self.adapter.all_real(ids))
            except _EnteredError as entered:
                found |= dict(zip(these, entered.x.expand(len(ids), -1, -1), strict=True))
        return torch.cat([found[i] for i in range(len(rows))])

    @torch.no_grad()
    def agrees(self, ids: Int[Tensor, " pos"], logits: Float[Tensor, " d_vocab"]) -> bool:
        """Whether the host gives the same logits after a prompt, up to rounding.

        The host is asked once for every length of prompt that is longer than those before it. What
        is compared is how weights are read, so writing to them needs no other answer.

        Args:
            ids: Token ids of the prompt.
            logits: Logits of this model after it.

        Returns:
            Whether they agree.
        """
        host = self.adapter.model
        state = repr(self.adapter.cfg), tuple(map(id, host.modules()))
        known, longest = AGREED.get(host, (None, 0))
        if known == state and len(ids) <= longest:
            return True
        ids = ids[None]
        own = self.adapter.run(ids, self.adapter.all_real(ids))[0, -1].detach()
        # √ε: rounding adds up over layers, and weights read wrongly are off by far more.
        eps = max(torch.finfo(own.dtype).eps, torch.finfo(torch.float32).eps)
        same = bool((own - logits).abs().max() <= eps**0.5 * own.abs().max())
        if same:
            AGREED[host] = state, ids.shape[1]
        return same


class _EnteredError(Exception):
    """Ends a run of the host where its first block begins."""

    def __init__(self, x: Tensor):
        self.x = x


def _enter(x: Tensor) -> None:
    raise _EnteredError(x.detach())


def _known(block: BlockWeights) -> bool:
    norms = (block.ln1, block.ln2, block.ln1_post, block.ln2_post, getattr(block.mlp, "ln", None))
    return (
        isinstance(block.mlp, MLPWeights | GatedMLPWeights | None)
        and block.shared is None
        and block.mid_norm is None
        and block.post_norm is None
        and all(norm is None or norm.eps is not None for norm in norms)
    )
