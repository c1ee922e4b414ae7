"""How a capture reads attention: the pattern as the run had it, or queries and keys.

Either way a block's reading becomes the map v → z over positions:

    StoredReading      reads the pattern itself, with the user's edits of it
    RecomputedReading  reads queries and keys, from which the pattern is computed when it is used

For the second, queries and keys are read as the scores are the product of them: normalized and
rotated. A host that rotates without a hook behind it is read before, and rotated here by its own
cosines. Scale, soft cap and window are the host's (``Adapter.recomputed_reading``). A wrong
one is found by the self-check, which mixes the run's values with the recomputed pattern.

The host's own forward pass computes the patterns all the same, one layer at a time. Nothing keeps
them longer: the run has no autograd graph, and a pattern that a Bridge leaves on its attention is
dropped as soon as the layer is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..maps import HALF, Frame, Mix, version
from ..sublayers import AttentionWeights, RecomputedMix, Scores

if TYPE_CHECKING:
    from .adapter import Adapter

Take = Callable[[int, str], Tensor]
"""Gives what was read of a block, by the adapter's name of it."""

Rotate = Callable[[int, Mapping[str, Tensor], Tensor], Tensor]
"""Rotates queries or keys [batch, pos, head, d_head] of a block, given what else was read there."""


class NotRecomputableError(ValueError):
    """A model whose patterns cannot be recomputed from what its hooks show; the message says why.

    Args:
        what: The part of the model that is in the way.
        why: The reason, as the end of a sentence.
    """

    def __init__(self, what: str, why: str):
        self.cause = f"{what}: {why}"
        super().__init__(f'pattern="recomputed" does not serve {self.cause}. Use pattern="stored".')

    @classmethod
    def unknown(cls, kind: str) -> NotRecomputableError:
        """The refusal of a class of attention modules that no adapter knows."""
        return cls(f"the attention {kind}", "it is not known what its scores are computed from")


@dataclass(frozen=True)
class StoredReading:
    """Read the pattern itself, as the run had it, the user's edits of it included."""

    reads = heads_first = ("pattern",)
    note = ""
    needs_grad = True  # whether the run keeps a graph is the user's choice

    def mix(self, layer: int, frame: Frame, take: Take, weights: AttentionWeights) -> Mix:
        """Make the map from values to mixed values of one block.

        Args:
            layer: Number of the block.
            frame: Spans of real tokens, positions, dtype and device of the run.
            take: Gives what was read of a block.
            weights: Attention weights of the block.

        Returns:
            The frozen attention over positions.

        Raises:
            ValueError: If a real token attends to padding.
        """
        pattern, real = take(layer, "pattern"), frame.real
        if any(span != (0, frame.n_pos) for span in frame.spans):
            padding_keys = real[:, None, :, None] & ~real[:, None, None]
            if bool((pattern * padding_keys).any()):
                raise ValueError(
                    f"L{layer} attention: real tokens attend to padding, so prompts of this batch "
                    "change each other. Pass attention_mask, or capture one prompt at a time."
                )
        return Mix(frame, pattern, weights.W_V.shape[0], weights.W_V.shape[2])

    def guards(self, edited: Mapping[str, nn.Module]) -> list[Any]:
        """Add no hooks: edits of the pattern are frozen as seen."""
        return []


@dataclass(frozen=True)
class RecomputedReading:
    """Read queries and keys of every block's attention, and know how scores come from them.

    Attributes:
        reads: Names of what is read: queries, keys, then what is needed to rotate them.
        scores: Scale, soft cap, mask and ALiBi slopes of every block.
        heads_first: Names of the reads that the host has as [batch, head, pos, d_head].
        rotate: Rotates queries or keys of a block, or None.
        sinks: Attention sinks [head] of every block; empty where the model has none.
        listen: Adds the hooks that the host needs during such a run, and returns their handles.
    """

    reads: tuple[str, ...]
    scores: tuple[Scores, ...]
    heads_first: tuple[str, ...] = ()
    rotate: Rotate | None = None
    sinks: tuple[Tensor, ...] = ()
    listen: Callable[[], list[Any]] = list
    needs_grad = False  # autograd would keep every layer's scores and pattern
    note = ' with a recomputed pattern (pattern="stored" reads the run\'s own)'

    def mix(self, layer: int, frame: Frame, take: Take, weights: AttentionWeights) -> RecomputedMix:
        """Make the map of :meth:`StoredReading.mix`; padding is never attended to."""
        (kv_heads, _, d_head), heads = weights.W_V.shape, weights.W_O.shape[0]
        q, k, *others = (take(layer, key) for key in self.reads)
        if self.heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        # Hosts differ in whether heads are an axis: make it one, then tell heads by their number.
        q = q.flatten(2).unflatten(2, (heads, -1))
        k = k.flatten(2).unflatten(2, (-1, q.shape[-1]))
        k = k[:, :, :: k.shape[2] // kv_heads]  # a host may repeat grouped keys
        if self.rotate is not None:
            read = dict(zip(self.reads[2:], others, strict=True))
            q, k = self.rotate(layer, read, q), self.rotate(layer, read, k)
        sinks = self.sinks[layer] if self.sinks else None
        return RecomputedMix.of(frame, q, k, self.scores[layer], d_head, sinks)

    def guards(self, edited: Mapping[str, nn.Module]) -> list[Any]:
        """Add the hooks of the host, and those that refuse edits of scores and patterns.

        Args:
            edited: Hook points of scores and patterns that carry hooks of the user's own.

        Returns:
            Handles of the hooks, to be removed after the run.
        """
        handles = self.listen()
        for name, point in edited.items():
            handles += refuse_edits(name, point)
        return handles


def rotated(x: Tensor, quarter_turned: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first features of queries or keys, x cos + quarter-turned x sin.

    Args:
        x: Queries or keys [batch, pos, head, d_head].
        quarter_turned: The same after a quarter turn of every pair [batch, pos, head, rotary].
        cos: Cosines [batch or 1, pos, rotary]; features after the first ``rotary`` stay.
        sin: Sines of the same shape.

    Returns:
        The rotated queries or keys [batch, pos, head, d_head].
    """
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((turned * cos[:, :, None] + quarter_turned * sin[:, :, None], rest), -1)


def refuse_edits(name: str, point: nn.Module) -> list[Any]:
    """Refuse edits at a hook point of scores or patterns: a recomputed pattern would lack them.

    Args:
        name: Name of the hook point.
        point: The hook point, which carries hooks of the user's own.

    Returns:
        Handles to remove. While they are there, an edit raises a ValueError.
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
                f"A hook of your own edits {name}, and a pattern that is recomputed from queries "
                'and keys would not have that edit. Use pattern="stored".'
            )

    return [point.register_forward_pre_hook(before), point.register_forward_hook(after)]


# --- How the scores of each component of a Bridge are computed ------------------------------------


def _rotated_by_host(adapter: Adapter, parts: list[Any]) -> RecomputedReading:
    """Queries and keys are shown normalized and rotated; the rest is in the wrapped module."""

    def scores(attn: Any, layer: int) -> Scores:
        cap = getattr(attn, "attn_logit_softcapping", None)
        return Scores(float(attn.scaling), True, cap, _window(attn, layer))

    has_sinks = getattr(parts[0], "sinks", None) is not None
    sinks = tuple(part.sinks.detach().clone() for part in parts) if has_sinks else ()
    reads = ("q_normed", "k_normed") if norm_last(adapter) else ("rot_q", "rot_k")
    each = tuple(map(scores, parts, range(len(parts))))
    return RecomputedReading(reads, each, reads, sinks=sinks)


def norm_last(adapter: Adapter) -> bool:
    """Whether queries and keys are normalized after their rotation, as in HunYuan."""
    return bool(getattr(adapter.cfg, "qk_norm_after_rope", False))


def _joint_rotary(adapter: Adapter, parts: list[Any]) -> RecomputedReading:
    """Queries and keys are shown before they are rotated, beside the cosines and sines."""
    scale = adapter.cfg.d_head**-0.5
    scores = tuple(Scores(scale, window=_window(part, i)) for i, part in enumerate(parts))
    return RecomputedReading(("q", "k", "cos", "sin"), scores, rotate=_rotate_halves)


def _window(attn: Any, layer: int) -> int | None:
    """The sliding window of a layer by the configuration that its module holds, or None."""
    config = getattr(attn, "config", None)
    window, kinds = (getattr(config, name, None) for name in ("sliding_window", "layer_types"))
    local = kinds is None or kinds[layer] == "sliding_attention"
    return window if window and local else None


def _joint(adapter: Adapter, parts: list[Any]) -> RecomputedReading:
    """Nothing rotates; GPT-2 may divide the scores by the number of the layer, too."""
    by_layer = getattr(adapter.cfg, "scale_attn_by_inverse_layer_idx", False)
    scale = adapter.cfg.d_head**-0.5
    scores = (Scores(scale / (i + 1 if by_layer else 1)) for i in range(len(parts)))
    return RecomputedReading(("q", "k"), tuple(scores))


def _alibi(adapter: Adapter, parts: list[Any]) -> RecomputedReading:
    """ALiBi's slope · distance is subtracted from the scores, in the model's dtype."""
    cfg = adapter.cfg
    slopes = alibi_slopes(cfg.n_heads)
    scales = (getattr(part, "softmax_scale", cfg.d_head**-0.5) for part in parts)
    return RecomputedReading(("q", "k"), tuple(Scores(s, slopes=slopes) for s in scales))


def _bloom(adapter: Adapter, parts: list[Any]) -> RecomputedReading:
    if adapter.dtype in HALF:
        raise NotRecomputableError(
            what="BLOOM in half precision",
            why="the host rounds ALiBi's biases, which float32 would not",
        )
    return _alibi(adapter, parts)


def _wrapped(adapter: Adapter, parts: list[Any]) -> RecomputedReading:
    """Modules that run as they are, and whose queries and keys are shown before their rotation."""
    if (kind := type(parts[0]).__name__) not in _WRAPPED:
        raise NotRecomputableError.unknown(kind)
    scores = tuple(_WRAPPED[kind](adapter, part) for part in parts)
    if rotary_tables(parts[0]) is None:
        return RecomputedReading(("q", "k"), scores)
    rotate = _ByTables(adapter, parts)
    return RecomputedReading(("q", "k"), scores, rotate=rotate, listen=rotate.listen)


def _native(adapter: Adapter, part: Any) -> Scores:
    return Scores(1 / part.scale, part.causal, adapter.soft_cap("attn_scores_soft_cap"))


def _neo(adapter: Adapter, part: Any) -> Scores:
    return Scores(1.0, window=part.config.window_size if part.attention_type == "local" else None)


def _encoder(adapter: Adapter, part: Any) -> Scores:
    attention = getattr(part, "self")  # noqa: B009
    return Scores(attention.scaling, causal=bool(attention.is_decoder))


_WRAPPED: dict[str, Callable[[Adapter, Any], Scores]] = {
    "NativeAttention": _native,
    "GPTJAttention": lambda adapter, part: Scores(1 / float(part.scale_attn)),
    "CodeGenAttention": lambda adapter, part: Scores(1 / float(part.scale_attn)),
    "GPTNeoSelfAttention": _neo,
    "OPTAttention": lambda adapter, part: Scores(part.scaling),
    "ViTAttention": lambda adapter, part: Scores(part.scaling, causal=False),
    "DeiTAttention": lambda adapter, part: Scores(part.scaling, causal=False),
    "ASTAttention": lambda adapter, part: Scores(part.scaling, causal=False),
    "BertAttention": _encoder,
    "RobertaAttention": _encoder,
    "XLMRobertaAttention": _encoder,
}
"""How scores are made of queries and keys, by the class of the wrapped module."""


def _unknown(adapter: Adapter, parts: list[Any]) -> RecomputedReading:
    raise NotRecomputableError.unknown(type(adapter.model.blocks[0].attn).__name__)


BRIDGE_READINGS: dict[str, Callable[[Adapter, list[Any]], RecomputedReading]] = {
    "PositionEmbeddingsAttentionBridge": _rotated_by_host,
    "JointQKVPositionEmbeddingsAttentionBridge": _joint_rotary,
    "JointQKVAttentionBridge": _joint,
    "BloomAttentionBridge": _bloom,
    "MPTALiBiAttentionBridge": _alibi,
    "ALiBiJointQKVAttentionBridge": _unknown,
    "CodeGenAttentionBridge": _wrapped,
    "AttentionBridge": _wrapped,
}
"""How scores are computed, by the class of the attention component, or by one it derives from."""


def bridge_reading(adapter: Adapter) -> RecomputedReading:
    """The reading of a Bridge's attention, by the class of its components.

    Args:
        adapter: Adapter of the Bridge.

    Returns:
        The reading of every block's queries and keys.

    Raises:
        NotRecomputableError: If a class is not known.
    """
    attentions = [block.attn for block in adapter.model.blocks]
    makers = []
    for attn in attentions:
        names = (kind.__name__ for kind in type(attn).__mro__)
        makers.append(next(filter(None, map(BRIDGE_READINGS.get, names)), _unknown))
    if len(set(makers)) > 1:
        raise NotRecomputableError(
            what="a model whose layers attend in several ways", why="one way is read of all layers"
        )
    return makers[0](adapter, [attn.original_component for attn in attentions])


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's slopes (Press et al. 2022): 2^(−8 i / n), i = 1 … n, for n heads, a power of 2.

    Any other number of heads goes on, after the n of the next power below, with the odd steps of
    the series for 2n. HookedTransformer takes the first formula for every n.

    Args:
        heads: Number of query heads.

    Returns:
        One slope per query head, in scores per position.
    """
    n = 2 ** (heads.bit_length() - 1)
    exponents = [i / n for i in range(1, n + 1)] + [i / (2 * n) for i in range(1, 2 * n, 2)]
    return tuple(2 ** (-8 * e) for e in exponents[:heads])


def _rotate_halves(layer: int, read: Mapping[str, Tensor], x: Tensor) -> Tensor:
    cos, sin = read["cos"], read["sin"]  # [batch or 1, pos, rotary]
    a, b = x[..., : cos.shape[-1]].chunk(2, -1)
    return rotated(x, torch.cat((-b, a), -1), cos, sin)


def rotary_tables(part: Any) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [pos, rotary] that an attention module holds itself, in adjacent pairs.

    Args:
        part: The wrapped attention module.

    Returns:
        The two tables, or None where the module has none of its own.
    """
    if (rotary := getattr(part, "rotary", None)) is not None:
        return rotary.cos_cached, rotary.sin_cached
    if isinstance(table := getattr(part, "embed_positions", None), Tensor):
        sin, cos = (half.repeat_interleave(2, -1) for half in table.chunk(2, -1))
        return cos, sin
    return None


def rotates(attn: Any) -> bool:
    """Whether a layer rotates queries and keys; some of SmolLM3, Cohere-2 and EXAONE-4 do not."""
    if (without := getattr(attn, "_is_nope_layer", None)) is not None:
        return not without()
    return bool(getattr(attn.original_component, "use_rope", True))


class _ByTables:
    """Rotations by a module's own tables, at the positions that the host gave its attention."""

    def __init__(self, adapter: Adapter, parts: list[Any]):
        self.attentions = [block.attn for block in adapter.model.blocks]
        self.parts, self.positions = parts, [None] * len(parts)

    def listen(self) -> list[Any]:
        def see(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.positions[layer] = kwargs.get("position_ids")

        return [
            attn.register_forward_pre_hook(partial(see, layer), with_kwargs=True)
            for layer, attn in enumerate(self.attentions)
        ]

    def __call__(self, layer: int, read: Mapping[str, Tensor], x: Tensor) -> Tensor:
        at, tables = self.positions[layer], rotary_tables(self.parts[layer]) or ()
        at = torch.arange(x.shape[1], device=x.device)[None] if at is None else at
        cos, sin = (table.to(at.device)[at].to(x) for table in tables)
        a, b = x[..., : cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
        return rotated(x, torch.stack((-b, a), -1).flatten(-2), cos, sin)


def drop_pattern(module: Any, args: Any, output: Any) -> None:
    """Forget, as a hook on a Bridge's attention, the pattern that the Bridge keeps there."""
    module._pattern = None
