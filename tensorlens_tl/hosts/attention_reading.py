"""What of a host's attention is read, and the map v → z it gives: stored, or to be recomputed.

To recompute a pattern, queries and keys are read as the scores are the product of them: rotated
and normalized. Hosts that rotate without a hook behind it are read before, and rotated here by
their own cosines. Scale, soft cap and window are the host's; a wrong one is found by the self-check,
which mixes the run's values with the recomputed pattern.

The host's own forward pass computes the patterns all the same, a layer at a time: see ``HOST``. What
would keep them longer is kept from it: it runs without autograd's graph, and the patterns that some
Bridges leave on their attention, which nothing reads, are dropped layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sublayers import HALF, AttentionWeights, Frame, Mix, RecomputedMix, Scores, version
from .adapter import Adapter

Take = Callable[[int, str], Tensor]
Rotate = Callable[[int, Take, Tensor], Tensor]


class NotRecomputableError(ValueError):
    """A model whose pattern cannot be recomputed from what its hooks show; the message says why."""

    def __init__(self, what: str, why: str):
        super().__init__(f'pattern="recomputed" does not serve {what}: {why}. Use pattern="stored"')


def reading(adapter: Adapter, pattern: str) -> Stored | Queries:
    """How a capture reads attention.

    Args:
        adapter: The model's.
        pattern: "stored" or "recomputed".

    Returns:
        The reads, and what they become.

    Raises:
        ValueError: If ``pattern`` is something else, or the model's cannot be recomputed.
    """
    if pattern not in ("stored", "recomputed"):
        raise ValueError(f'expected pattern="stored" or "recomputed", got {pattern!r}')
    return Stored() if pattern == "stored" else Queries.of(adapter)


@dataclass(frozen=True)
class Stored:
    """The pattern itself, as the run had it, the user's edits of it included."""

    reads = heads_first = ("pattern",)
    note = ""
    needs_grad = True  # the user's own business

    def mix(self, layer: int, frame: Frame, take: Take, weights: AttentionWeights) -> Mix:
        """A block's attention over positions, from what was read.

        Args:
            layer: Block.
            frame: Prompts, positions, dtype, device.
            take: Gives what was read of a block.
            weights: The block's.

        Returns:
            The map.

        Raises:
            ValueError: If a real token attends to padding.
        """
        pattern, real = take(layer, "pattern"), frame.real
        if any(span != (0, frame.n_pos) for span in frame.spans):
            padding_keys = real[:, None, :, None] & ~real[:, None, None]
            if bool((pattern * padding_keys).any()):
                raise ValueError(
                    f"L{layer} attention: real tokens attend to padding, so no prompt of the batch "
                    "is itself: expected causal attention, or a mask. Pass attention_mask, or "
                    "single prompts"
                )
        return Mix(frame, pattern, weights.W_V.shape[0], weights.W_V.shape[2])

    def guards(self, adapter: Adapter) -> list[Any]:
        """None: edits of the pattern are frozen as seen."""
        return []


@dataclass(frozen=True)
class Queries:
    """Queries and keys of every block's attention, and how scores come from them.

    Attributes:
        reads: Queries, keys, and what is needed to rotate them, by the adapter's names.
        scores: Scale, soft cap and mask of every block.
        heads_first: Which of the reads the host has as [batch, head, pos, d_head].
        rotate: Rotates queries or keys [batch, pos, head, d_head] of a block, or None.
        sinks: Every block's attention sinks [head]; empty where the model has none.
    """

    reads: tuple[str, ...]
    scores: tuple[Scores, ...]
    heads_first: tuple[str, ...] = ()
    rotate: Rotate | None = None
    sinks: tuple[Tensor, ...] = ()
    needs_grad = False  # autograd would keep every layer's scores and pattern
    note = ' with a recomputed pattern (pattern="stored" reads the run\'s own)'

    @classmethod
    def of(cls, adapter: Adapter) -> Queries:
        """What to read of this model.

        Args:
            adapter: The model's.

        Returns:
            The reads.

        Raises:
            NotRecomputableError: If its scores cannot be computed from what its hooks show.
        """
        blocks, cfg = adapter.model.blocks, adapter.cfg
        rotary = getattr(cfg, "positional_embedding_type", None) == "rotary"
        kind, cap = type(blocks[0].attn).__name__, adapter.soft_cap("attn_scores_soft_cap")
        if kind in ("Attention", "GroupedQueryAttention"):
            if getattr(cfg, "use_logn_attn", False):
                raise NotRecomputableError("use_logn_attn", "no hook follows its scaling")
            if not rotary and getattr(cfg, "use_qk_norm", False):
                raise NotRecomputableError(
                    "use_qk_norm without rotary positions", "no hook follows the norm"
                )
            causal = cfg.attention_dir == "causal"
            slopes = None
            if cfg.positional_embedding_type == "alibi":
                if not causal:
                    raise NotRecomputableError("ALiBi both ways", "distances ahead count as 0")
                if getattr(cfg, "use_attention_sinks", False):
                    raise NotRecomputableError(
                        "ALiBi with attention sinks", "scores depend on the longest prompt before"
                    )
                slopes = tuple(2 ** (-8 * (i + 1) / cfg.n_heads) for i in range(cfg.n_heads))
            scores = (
                Scores(1 / block.attn.attn_scale, causal, cap,
                       cfg.window_size if causal and block.attn.attn_type == "local" else None,
                       slopes)
                for block in blocks
            )  # fmt: skip
            has_sinks = getattr(cfg, "use_attention_sinks", False)
            sinks = tuple(b.attn.sinks.detach().clone() for b in blocks) if has_sinks else ()
            reads = ("rot_q", "rot_k") if rotary else ("q", "k")
            return cls(reads, tuple(scores), sinks=sinks)
        parts = [block.attn.original_component for block in blocks]
        if kind == "PositionEmbeddingsAttentionBridge":
            if getattr(parts[0], "sinks", None) is not None:
                raise NotRecomputableError(
                    "attention sinks", "they change the scores after the last hook"
                )
            scores = (_hugging_face(attn, i) for i, attn in enumerate(parts))
            return cls(("rot_q", "rot_k"), tuple(scores), ("rot_q", "rot_k"))
        if kind == "JointQKVPositionEmbeddingsAttentionBridge":
            scores = (Scores(cfg.d_head**-0.5),) * len(parts)
            return cls(("q", "k", "cos", "sin"), scores, rotate=_read_rotation)
        if kind == "JointQKVAttentionBridge":
            by_layer = getattr(cfg, "scale_attn_by_inverse_layer_idx", False)
            scale = cfg.d_head**-0.5
            scores = (Scores(scale / (i + 1 if by_layer else 1)) for i in range(len(parts)))
            return cls(("q", "k"), tuple(scores))
        if kind == "BloomAttentionBridge" and adapter.dtype in HALF:
            raise NotRecomputableError(
                "BLOOM in half precision", "the host rounds ALiBi's biases, which float32 would not"
            )
        if kind in ("BloomAttentionBridge", "MPTALiBiAttentionBridge"):
            slopes = alibi_slopes(cfg.n_heads)
            scores = (
                Scores(getattr(attn, "softmax_scale", cfg.d_head**-0.5), slopes=slopes)
                for attn in parts
            )
            return cls(("q", "k"), tuple(scores))
        if kind == "AttentionBridge" and type(parts[0]).__name__ == "NativeAttention":
            scores = (Scores(1 / a.scale, a.causal, cap) for a in parts)
            return cls(("q", "k"), tuple(scores), rotate=_Tables(parts) if rotary else None)
        raise NotRecomputableError(
            f"the attention {kind}", "it is not known what its scores are computed from"
        )

    def mix(self, layer: int, frame: Frame, take: Take, weights: AttentionWeights) -> RecomputedMix:
        """A block's attention over positions, as :meth:`Stored.mix`; padding is never attended to."""
        (kv_heads, _, d_head), heads = weights.W_V.shape, weights.W_O.shape[0]
        q, k = (take(layer, key) for key in self.reads[:2])
        if self.heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q = q.flatten(2).unflatten(2, (heads, -1))
        k = k.flatten(2).unflatten(2, (-1, q.shape[-1]))
        k = k[:, :, :: k.shape[2] // kv_heads]  # a host may repeat grouped keys
        if self.rotate is not None:
            read: dict[str, Tensor] = {key: take(layer, key) for key in self.reads[2:]}
            q, k = (self.rotate(layer, lambda _, key: read[key], x) for x in (q, k))
        sinks = self.sinks[layer] if self.sinks else None
        return RecomputedMix.of(frame, q, k, self.scores[layer], d_head, sinks)

    def guards(self, adapter: Adapter) -> list[Any]:
        """Hooks that refuse edits of scores and patterns, see positions, drop what the host keeps.

        Returns:
            Their handles.
        """
        handles = self.rotate.listen() if isinstance(self.rotate, _Tables) else []
        keepers = (b.attn for b in adapter.model.blocks if hasattr(b.attn, "_pattern"))
        handles += [attn.register_forward_hook(_drop_pattern) for attn in keepers]
        for name, point in adapter.hooked_patterns().items():
            handles += guard(name, point)
        return handles


def _drop_pattern(module: Any, args: Any, output: Any) -> None:
    module._pattern = None


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's slopes (Press et al. 2022): 2^(−8 i / n), i = 1 … n, for n heads, a power of 2.

    Any other number of heads goes on, after the n of the next power below, with the odd steps of
    the series for 2n. HookedTransformer takes the first formula for every n.

    Args:
        heads: Number of heads.

    Returns:
        A slope per head.
    """
    n = 2 ** (heads.bit_length() - 1)
    exponents = [i / n for i in range(1, n + 1)] + [i / (2 * n) for i in range(1, 2 * n, 2)]
    return tuple(2 ** (-8 * e) for e in exponents[:heads])


def _hugging_face(attn: Any, layer: int) -> Scores:
    window, kinds = (getattr(attn.config, n, None) for n in ("sliding_window", "layer_types"))
    local = kinds is None or kinds[layer] == "sliding_attention"
    cap = getattr(attn, "attn_logit_softcapping", None)
    return Scores(float(attn.scaling), True, cap, window if window and local else None)


# --- Rotations -----------------------------------------------------------------------------------


def _read_rotation(layer: int, take: Take, x: Tensor) -> Tensor:
    cos, sin = take(layer, "cos"), take(layer, "sin")  # [batch or 1, pos, rotary]
    a, b = x[..., : cos.shape[-1]].chunk(2, -1)
    return _rotated(x, torch.cat((-b, a), -1), cos, sin)


class _Tables:
    """The native host's rotation: its own tables, at the positions it gave its attention."""

    def __init__(self, parts: list[Any]):
        self.parts, self.positions = parts, [None] * len(parts)

    def listen(self) -> list[Any]:
        def see(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.positions[layer] = kwargs.get("position_ids")

        return [
            part.register_forward_pre_hook(partial(see, layer), with_kwargs=True)
            for layer, part in enumerate(self.parts)
        ]

    def __call__(self, layer: int, take: Take, x: Tensor) -> Tensor:
        at, rotary = self.positions[layer], self.parts[layer].rotary
        at = torch.arange(x.shape[1], device=x.device)[None] if at is None else at
        cos, sin = rotary.cos_cached[at].to(x), rotary.sin_cached[at].to(x)
        a, b = x[..., : cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
        return _rotated(x, torch.stack((-b, a), -1).flatten(-2), cos, sin)


def _rotated(x: Tensor, quarter_turned: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((turned * cos[:, :, None] + quarter_turned * sin[:, :, None], rest), -1)


# --- Edits that are not served -------------------------------------------------------------------


def guard(name: str, point: nn.Module) -> list[Any]:
    """Refuse edits of scores or pattern at a hook point: a recomputed pattern would not have them.

    Args:
        name: The hook point's.
        point: It carries hooks of the user's own.

    Returns:
        Handles to remove; while they are there, an edit raises a ValueError.
    """
    seen: list[tuple[Tensor, int]] = []

    def before(module: Any, args: Any) -> None:
        seen[:] = [(args[0], version(args[0]))]

    def after(module: Any, args: Any, output: Tensor) -> None:
        (given, was), same = seen.pop(), None
        if output is not given:  # equal, or not a number in both
            same = output.shape == given.shape and ((output == given) | (given != given)).all()
        if version(given) != was or not (same is None or bool(same)):
            raise ValueError(
                f"a hook of your own edits {name}, expected none there: a pattern that is recomputed "
                'from queries and keys does not have that edit. Use pattern="stored"'
            )

    return [point.register_forward_pre_hook(before), point.register_forward_hook(after)]
