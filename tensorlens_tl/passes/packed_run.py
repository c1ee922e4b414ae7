"""One run of packed prompts, with all readers of a place on one input; and what it leaves.

Everything a circuit's run needs of its twin is kept narrow: queries, keys, values and patterns, z
and the MLPs' outputs, and the residual before every sublayer. With ``other`` the residual is given
the outputs of another run (or nothing) in place of its own: that is the run in which every edge is
ablated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..maps import NormWeights
from .packed_layout import Layout
from .packed_model import PackedModel, normed, past_norm, scale_past

Tap = Callable[[str, int, Tensor], Tensor]
"""Sees "q", "k" or "v" before their norm and rotation, or the input of an MLP, and passes it on."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the writers of a run add to the residual, narrow; None in all places adds nothing.

    Attributes:
        x: What enters the first block.
        z: z of every head by layer, divided by the scale of a post-norm.
        mlp: What every MLP adds, or None in a block without one.
    """

    x: Float[Tensor, "token d_model"] | None
    z: Sequence[Float[Tensor, "head token d_head"] | None]
    mlp: Sequence[Float[Tensor, "token d_model"] | None]


@dataclass(eq=False)
class Run:
    """One run of packed prompts.

    Attributes:
        where: Where its tokens stand.
        outputs: What its writers add.
        pre: Residual before attention, by layer.
        mid: Residual that the MLP reads.
        q: Queries of every head.
        k: Keys, padded, with those of the prefixes.
        v: Values, padded, with those of the prefixes.
        A: Patterns of every head.
        raw_z: z before the scale of a post-norm.
        activated: What the activation of every MLP reads; None in a block without one.
        leak: By layer and by sublayer (0 attention, 1 MLP): b_O or b_out past the post-norm, and
            the scale that divides it; only where there are both.
        end: Residual after the last block.
    """

    where: Layout
    outputs: Outputs
    pre: list[Tensor] = field(default_factory=list)
    mid: list[Tensor] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    A: list[Tensor] = field(default_factory=list)
    raw_z: list[Tensor] = field(default_factory=list)
    activated: list[tuple[Tensor, ...] | None] = field(default_factory=list)
    leak: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    end: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def last(self) -> Float[Tensor, "prompt d_model"]:
        """The final residual at every prompt's last token."""
        return self.end[self.where.last]


def run(
    model: PackedModel,
    where: Layout,
    x: Float[Tensor, "token d_model"],
    past: Run | None = None,
    held: Sequence[Tensor] | None = None,
    other: Outputs | None = None,
    tap: Tap | None = None,
    keep: bool = True,
    patterns: bool = False,
    activated: bool = False,
) -> Run:
    """Run packed prompts.

    Args:
        model: Weights and scores of the model.
        where: Where the tokens stand.
        x: What enters the first block.
        past: A run of the same prompts, whose keys and values stand in the prefixes.
        held: Patterns to hold, one per layer; None for those of this run.
        other: Outputs that are added to the residual in place of this run's own.
        tap: Sees queries, keys, values and inputs of MLPs on their way.
        keep: Whether to keep all that is listed in :class:`Run`; else outputs, keys, values and
            the end alone.
        patterns: Whether to keep the patterns in any case.
        activated: Whether to keep what activations read, too.

    Returns:
        What the run leaves.
    """
    zs: list[Tensor] = []
    mlps: list[Tensor | None] = []
    found = Run(where, Outputs(x, zs, mlps))
    rotations = model.turns(where)
    # The ablated run starts with what replaces the input, too.
    x = x if other is None else torch.zeros_like(x) if other.x is None else other.x
    for i, (layer, rotation) in enumerate(zip(model.layers, rotations, strict=True)):
        block, pre = layer.block, x
        # 1. Attention.
        n = normed(block.ln1, pre)
        q, k, v = (layer.shared(s, n) for s in "qkv")
        own = layer.kv_of
        if tap is not None:  # before the norm, for every query head apart
            heads = {s: layer.of_query_heads(s, y) for s, y in (("q", q), ("k", k), ("v", v))}
            q, k, v = (tap(s, i, y) for s, y in heads.items())
            own = list(range(len(own)))  # from here on a key and a value per query head
        q, k = (layer.turned(s, y, rotation) for s, y in (("q", q), ("k", k)))
        k, v = (where.padded(y, True) for y in (k, v))
        if past is not None:
            old = (layer.of_query_heads("k", y[i]) if tap else y[i] for y in (past.k, past.v))
            k, v = (_with_past(where, *pair) for pair in zip((k, v), old, strict=True))
        if held is None:
            A = layer.pattern(where.padded(q, False), k[own], list(range(len(own))), where)
        else:
            A = held[i]
        z = raw = where.packed(A @ v[own])
        gives = added(block.attn.W_O.detach(), z)
        # Of this run's own output, also where another one's is added: it still divides b_O.
        scale = scale_past(block.ln1_post, gives, block.attn.b_O)
        if scale is not None:
            z = z / scale
            gives = added(layer.W_O, z)
        if other is not None:
            gives = None if (twin := other.z[i]) is None else added(layer.W_O, twin)
        x, leak = _written(x, gives, block.ln1_post, block.attn.b_O, scale)
        if leak is not None:
            found.leak[i, 0] = leak
        # 2. The MLP.
        mid, m, read = pre if block.parallel else x, None, None
        if block.mlp is not None:
            mid = mid if tap is None else tap("mlp", i, mid)
            read = layer.preactivations(mid)
            m = layer.mlp_of(read)
            scale = scale_past(block.ln2_post, m, layer.b_out)
            m = m if scale is None else past_norm(block.ln2_post, m) / scale
            gives = m if other is None else other.mlp[i]
            x, leak = _written(x, gives, block.ln2_post, layer.b_out, scale)
            if leak is not None:
                found.leak[i, 1] = leak
        zs.append(z)
        mlps.append(m)
        found.k.append(k)
        found.v.append(v)
        if activated:
            found.activated.append(read)
        if keep or patterns:
            found.A.append(A)
        if keep:
            pairs = (found.pre, pre), (found.mid, mid), (found.q, q), (found.raw_z, raw)
            for into, tensor in pairs:
                into.append(tensor)
    found.end = x
    return found


def added(
    W_O: Float[Tensor, "head d_head d_model"], z: Float[Tensor, "head token d_head"]
) -> Float[Tensor, "token d_model"]:
    """What all heads add to the residual."""
    # Σ_h z_h W_O^h, as one product over h · d_head.
    return z.movedim(0, 1).flatten(1) @ W_O.flatten(0, 1)


def _written(
    x: Tensor,
    gives: Tensor | None,
    norm: NormWeights | None,
    b: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The residual after a sublayer and its constants, and the constant that its scale divides."""
    x = x if gives is None else x + gives
    b = None if b is None else past_norm(norm, b.detach())
    if norm is None or scale is None:
        return (x if b is None else x + b), None
    x = x if norm.b is None else x + norm.b.detach()
    return (x, None) if b is None else (x + b / scale, b / scale)


def _with_past(where: Layout, own: Tensor, past: Tensor) -> Tensor:
    """Padded keys or values, with those of another run in the prefixes."""
    starts = torch.tensor(where.starts, device=own.device)[:, None]
    before = torch.arange(where.n_keys, device=own.device) < starts
    past = torch.nn.functional.pad(past, (0, 0, 0, where.n_keys - past.shape[2]))
    return torch.where(before[..., None], past, own)
