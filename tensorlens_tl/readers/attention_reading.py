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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..costs import rehearsed
from ..maps import HALF, Frame, Mix
from ..refusals import NotRecomputableError
from ..sublayers import AttentionWeights, RecomputedMix, Scores
from .hook_points import refuse_edits
from .host import Host

Take = Callable[[int, str], Tensor]
"""Gives what was read of a block, by the adapter's name of it."""

Rotate = Callable[[int, Mapping[str, Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]
"""Makes of queries and keys [batch, pos, head, d_head] of a block, and of what else was read there,
those that scores are products of."""


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
            if not rehearsed() and bool((pattern * padding_keys).any()):
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
        rotate: Rotates queries and keys of a block, and norms them, or None.
        sinks: Attention sinks [head] of every block; empty where the model has none.
        listen: Adds the hooks that the host needs during such a run, and returns their handles.
        longest: Tokens of the longest prompt whose scores are known, or None.
    """

    reads: tuple[str, ...]
    scores: tuple[Scores, ...]
    heads_first: tuple[str, ...] = ()
    rotate: Rotate | None = None
    sinks: tuple[Tensor, ...] = ()
    listen: Callable[[], list[Any]] = list
    longest: int | None = None
    needs_grad = False  # autograd would keep every layer's scores and pattern
    note = ' with a recomputed pattern (pattern="stored" reads the run\'s own)'

    def mix(self, layer: int, frame: Frame, take: Take, weights: AttentionWeights) -> RecomputedMix:
        """Make the map of :meth:`StoredReading.mix`; padding is never attended to."""
        self.fits(frame.n_pos)
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
            q, k = self.rotate(layer, read, q, k)
        sinks = self.sinks[layer] if self.sinks else None
        return RecomputedMix.of(frame, q, k, self.scores[layer], d_head, sinks)

    def fits(self, n_pos: int) -> None:
        """Refuse a prompt whose queries are scaled by position, or whose attention is in chunks."""
        if self.longest is not None and n_pos > self.longest:
            raise NotRecomputableError(
                what=f"a prompt of {n_pos} tokens",
                why=f"scores of this model are known up to {self.longest}",
            )

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


# --- How the scores of each component of a Bridge are computed ------------------------------------


def _rotated_by_host(adapter: Host, parts: list[Any]) -> RecomputedReading:
    """Queries and keys are shown normalized and rotated; the rest is in the wrapped module."""

    def scores(attn: Any, layer: int) -> Scores:
        cap = getattr(attn, "attn_logit_softcapping", None)
        return Scores(float(attn.scaling), True, cap, _window(attn, layer))

    has_sinks = getattr(parts[0], "sinks", None) is not None
    sinks = tuple(part.sinks.detach().clone() for part in parts) if has_sinks else ()
    last = adapter.attention[0].norm_last
    reads = ("q_normed", "k_normed") if last else ("rot_q", "rot_k")
    each = tuple(map(scores, parts, range(len(parts))))
    return RecomputedReading(reads, each, reads, sinks=sinks)


def _joint_rotary(adapter: Host, parts: list[Any]) -> RecomputedReading:
    """Queries and keys are shown before they are rotated, beside the cosines and sines."""
    windows = (_window(part, layer) for layer, part in enumerate(parts))
    scores = tuple(Scores(adapter.cfg.d_head**-0.5, window=window) for window in windows)
    return RecomputedReading(("q", "k", "cos", "sin"), scores, rotate=_rotate_halves)


def _window(attn: Any, layer: int) -> int | None:
    """The sliding window of a layer by the configuration that its module holds, or None."""
    config = getattr(attn, "config", None)
    window, kinds = (getattr(config, name, None) for name in ("sliding_window", "layer_types"))
    local = kinds is None or kinds[layer] == "sliding_attention"
    return window if window and local else None


def _joint(adapter: Host, parts: list[Any]) -> RecomputedReading:
    """Nothing rotates; GPT-2 may divide the scores by the number of the layer, too."""
    by_layer = getattr(adapter.cfg, "scale_attn_by_inverse_layer_idx", False)
    scale = adapter.cfg.d_head**-0.5
    scores = (Scores(scale / (i + 1 if by_layer else 1)) for i in range(len(parts)))
    return RecomputedReading(("q", "k"), tuple(scores))


def _alibi(adapter: Host, parts: list[Any]) -> RecomputedReading:
    """ALiBi's slope · distance is subtracted from the scores, in the model's dtype."""
    cfg = adapter.cfg
    slopes = alibi_slopes(cfg.n_heads)
    scales = (getattr(part, "softmax_scale", cfg.d_head**-0.5) for part in parts)
    return RecomputedReading(("q", "k"), tuple(Scores(s, slopes=slopes) for s in scales))


def _bloom(adapter: Host, parts: list[Any]) -> RecomputedReading:
    if adapter.dtype in HALF:
        raise NotRecomputableError(
            what="BLOOM in half precision",
            why="the host rounds ALiBi's biases, which float32 would not",
        )
    return _alibi(adapter, parts)


def _wrapped(adapter: Host, parts: list[Any]) -> RecomputedReading:
    """Modules that run as they are, and show queries and keys before their norm and rotation."""
    scores = []
    for layer, part in enumerate(parts):
        if (made := _WRAPPED.get(type(part).__name__)) is not None:
            scores.append(made(adapter, part))
        elif hasattr(part, "scaling") and hasattr(part, "is_causal"):
            scores.append(Scores(part.scaling, part.is_causal, window=_window(part, layer)))
        else:
            raise NotRecomputableError.unknown(type(part).__name__)
    rotate = _AsWrapped(adapter, parts)
    how = RecomputedReading(("q", "k"), tuple(scores), rotate=rotate, listen=rotate.listen)
    config: Any = getattr(parts[0], "config", None)
    limits = []
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        limits.append(int(config.attention_chunk_size))
    if getattr(parts[0], "attn_temperature_tuning", False):
        limits.append(int(parts[0].floor_scale) - 1)
    return replace(how, longest=min(limits, default=None))


def _native(adapter: Host, part: Any) -> Scores:
    return Scores(1 / part.scale, part.causal, adapter.soft_cap("attn_scores_soft_cap"))


def _neo(adapter: Host, part: Any) -> Scores:
    return Scores(1.0, window=part.config.window_size if part.attention_type == "local" else None)


def _encoder(adapter: Host, part: Any) -> Scores:
    attention = getattr(part, "self")  # noqa: B009
    return Scores(attention.scaling, causal=bool(attention.is_decoder))


def _glimmer(adapter: Host, part: Any) -> Scores:
    return Scores(part.scaling * part.qk_scale_factor, window=_window(part, part.layer_idx))


_WRAPPED: dict[str, Callable[[Host, Any], Scores]] = {
    "NativeAttention": _native,
    "GPTJAttention": lambda adapter, part: Scores(1 / float(part.scale_attn)),
    "CodeGenAttention": lambda adapter, part: Scores(1 / float(part.scale_attn)),
    "GPTNeoSelfAttention": _neo,
    "BertAttention": _encoder,
    "RobertaAttention": _encoder,
    "XLMRobertaAttention": _encoder,
    "XGLMAttention": lambda adapter, part: Scores(part.scaling),
    "MuseGlimmerTextAttention": _glimmer,
}
"""Modules that tell the scale of their scores in a way of their own, by class."""


def _unknown(adapter: Host, parts: list[Any]) -> RecomputedReading:
    raise NotRecomputableError.unknown(type(adapter.model.blocks[0].attn).__name__)


BRIDGE_READINGS: dict[str, Callable[[Host, list[Any]], RecomputedReading]] = {
    "PositionEmbeddingsAttentionBridge": _rotated_by_host,
    "JointQKVPositionEmbeddingsAttentionBridge": _joint_rotary,
    "JointQKVAttentionBridge": _joint,
    "BloomAttentionBridge": _bloom,
    "MPTALiBiAttentionBridge": _alibi,
    "ALiBiJointQKVAttentionBridge": _unknown,
    "MLAAttentionBridge": _unknown,
    "CodeGenAttentionBridge": _wrapped,
    "AttentionBridge": _wrapped,
}
"""How scores are computed, by the class of the attention component, or by one it derives from."""


def bridge_reading(adapter: Host) -> RecomputedReading:
    """The reading of a Bridge's attention, by the class of its components.

    Args:
        adapter: Adapter of the Bridge.

    Returns:
        The reading of every block's queries and keys.

    Raises:
        NotRecomputableError: If a class is not known.
    """
    makers, attentions = [], [block.attn for block in adapter.model.blocks]
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


def _rotate_halves(
    layer: int, read: Mapping[str, Tensor], q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    cos, sin = read["cos"], read["sin"]  # [batch or 1, pos, rotary]
    return _turned(q, cos, sin, False), _turned(k, cos, sin, False)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, adjacent: bool) -> Tensor:
    """Rotate the first features of x [batch, pos, head, d_head], x cos + quarter-turned x sin."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if adjacent else turned.chunk(2, -1)
    quarter = torch.stack((-b, a), -1).flatten(-2) if adjacent else torch.cat((-b, a), -1)
    cos, sin = (table.to(x)[:, :, None] for table in (cos, sin))
    return torch.cat((turned * cos + quarter * sin, rest), -1)


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
    """Whether a layer rotates queries and keys; some of SmolLM3, Cohere-2 and AFMoE do not."""
    if (without := getattr(attn, "_is_nope_layer", None)) is not None:
        return not without()
    part = attn.original_component
    if type(part).__name__ == "AfmoeAttention":
        return bool(part.is_local_attention)
    return bool(getattr(part, "use_rope", True))


NORM_LAST = ("NanoChatAttention",)
"""Modules that normalize queries and keys after they rotate them, where no option tells."""


def as_rotation(adapter: Host, tables: Any) -> tuple[Tensor, Tensor, bool]:
    """Read what a rotary module gives, in whichever of four layouts.

    Args:
        adapter: Adapter of the model.
        tables: Cosines and sines [..., pos, rotary], or complex numbers of them (Llama-4).

    Returns:
        Cosines, sines, and whether they turn adjacent pairs, as in :class:`Rotation`.
    """
    if isinstance(tables, Tensor):
        return tables.real.repeat_interleave(2, -1), tables.imag.repeat_interleave(2, -1), True
    cos, sin = tables
    part = adapter.model.blocks[0].attn.original_component
    sin = -sin if type(part).__name__ in NORM_LAST else sin  # it turns backwards, too
    a, b = sin.chunk(2, -1)
    if not torch.equal(a, b):
        if torch.equal(sin[..., ::2], sin[..., 1::2]):
            return cos, sin, True  # every angle twice in a row
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), False  # every angle once
    if not (getattr(adapter.cfg, "rotary_adjacent_pairs", False) or adapter.turns_neighbours):
        return cos, sin, False
    half = cos.shape[-1] // 2
    return *(t[..., :half].repeat_interleave(2, -1) for t in (cos, sin)), True


class _AsWrapped:
    """What wrapped modules make of queries and keys: norms, and the rotations they were given."""

    def __init__(self, adapter: Host, parts: list[Any]):
        self.adapter, self.parts = adapter, parts
        self.given: list[Any] = [{}] * len(parts)

    def listen(self) -> list[Any]:
        def see(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            names = ("position_ids", "position_embeddings")
            self.given[layer] = {name: kwargs.get(name) for name in names}

        return [
            block.attn.register_forward_pre_hook(partial(see, layer), with_kwargs=True)
            for layer, block in enumerate(self.adapter.model.blocks)
        ]

    def __call__(
        self, layer: int, read: Mapping[str, Tensor], q: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor]:
        reader, given, rotation = self.adapter.attention[layer], self.given[layer], None
        if (tables := rotary_tables(self.parts[layer])) is not None:
            at = given.get("position_ids")
            at = torch.arange(q.shape[1], device=q.device)[None] if at is None else at
            cos, sin = (table.to(at.device)[at] for table in tables)
            rotation = cos, sin, True
        elif given.get("position_embeddings") is not None and rotates(reader.block.attn):
            rotation = as_rotation(self.adapter, given["position_embeddings"])
        found = []
        for x, norm in zip((q, k), reader.norms(), strict=True):
            for step in ("turn", "norm") if reader.norm_last else ("norm", "turn"):
                if step == "turn" and rotation is not None:
                    x = _turned(x, *rotation)
                elif step == "norm" and norm is not None:
                    x = norm.apply(x.transpose(1, 2))[0].transpose(1, 2)
            found.append(x)
        return tuple(found)


def drop_pattern(module: Any, args: Any, output: Any) -> None:
    """Forget, as a hook on a Bridge's attention, the pattern that the Bridge keeps there."""
    module._pattern = None
