"""Attention with its pattern frozen at one run.

A frozen sublayer is a nonlinear one whose pattern, scale or gating ratio keeps the value of one
run. It is a short chain of primitive maps: attention is Linear, Mix, Linear, and an MLP is Linear,
Gate, Linear. Weights are referenced, never copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..graph import Node
from ..maps import (
    Chain,
    Conv,
    DeltaRule,
    Factored,
    Frame,
    Gate,
    Linear,
    Norm,
    Shift,
    put_effects,
    put_row,
    take_row,
)
from .recomputed_pattern import AnyMix
from .sublayer import Sublayer, _chain, _edits, _unknown
from .weights import AttentionWeights, DeltaNetWeights, LatentWeights


@dataclass(frozen=True, eq=False)
class Attention(Sublayer):
    """Frozen attention: y_q = Σ_h (Σ_k A_h[q, k] v_k^{kv(h)}) W_O^h + b_O, v_k = x_k W_V + b_V.

    Rows of A need not sum to 1, because of attention sinks or masked rows. So b_V stays inside the
    sum. Three parts that most models lack are frozen like a norm or an activation: the norm of a
    latent from which values are made, what multiplies the values, and what multiplies z. A gated
    delta net is attention whose mixing is a recurrence in place of a pattern.

    Attributes:
        frame: Layout of the batch.
        layer: Number of the block, from 0.
        mix: The map v → z by A. A is stored, or recomputed from queries and keys at every use; a
            delta rule has none.
        weights: Value and output matrices.
        v_edit: What a hook of the user added to the values, or None.
        z_edit: What a hook of the user added to z, or None.
        latent_scale: Scale of the norm of the latent that W_V reads [batch, pos, 1], as in the run.
            None where W_V reads the residual.
        value_ratio: What multiplies the values [batch, pos, kv_head · d_head], such as the inverse
            scale of their norm; None where nothing does.
        output_ratio: What multiplies z [batch, pos, head · d_head], such as an output gate; None
            where nothing does.
    """

    frame: Frame
    layer: int
    mix: AnyMix | DeltaRule
    weights: AttentionWeights
    v_edit: Shift | None = None
    z_edit: Shift | None = None
    latent_scale: Float[Tensor, "batch pos 1"] | None = None
    value_ratio: Float[Tensor, "batch pos d_values"] | None = None
    output_ratio: Float[Tensor, "batch pos d_z"] | None = None

    @cached_property
    def projected(self) -> Linear:
        """The map to x W_V + b_V, with all key/value heads side by side."""
        w = self.weights
        b_V = None if w.b_V is None else w.b_V.flatten()
        # Heads side by side make one product of all values. Grouped heads are not repeated here.
        return Linear(self.frame, rearrange(w.W_V, "h d e -> d (h e)"), b_V, f"L{self.layer}.b_V")

    @cached_property
    def compressed(self) -> Chain | None:
        """The map to the latent that W_V reads, or None where it reads the residual."""
        w, name = self.weights, f"L{self.layer}"
        if not isinstance(w, LatentWeights) or self.latent_scale is None:
            return None
        norm = Norm(self.frame, f"{name}.kv_norm", self.latent_scale, w.norm, w.W_DKV.shape[1])
        return Chain((Linear(self.frame, w.W_DKV, w.b_DKV, f"{name}.b_DKV"), norm))

    @property
    def value_maps(self) -> tuple[Conv | Gate, ...]:
        """The maps from x W_V + b_V to the values, which keep dimensions apart."""
        ratio, found = self.value_ratio, []
        if isinstance(self.weights, DeltaNetWeights):
            found.append(Conv(self.frame, self.weights.kernel))
        return tuple(found if ratio is None else [*found, Gate(self.frame, ratio)])

    @property
    def output_gate(self) -> Gate | None:
        """The map by which z is multiplied, or None."""
        return None if self.output_ratio is None else Gate(self.frame, self.output_ratio)

    @cached_property
    def values(self) -> Linear | Chain:
        """The map x → v, with all key/value heads side by side."""
        if self.compressed is None and not self.value_maps:
            return self.projected
        return _chain((self.compressed, self.projected, *self.value_maps))

    @property
    def pattern(self) -> Float[Tensor, "batch head query_pos key_pos"]:
        """The pattern A. Where it is not stored, every access recomputes all of it."""
        return self.mix.pattern

    @property
    def output(self) -> Linear:
        """The map from z to what attention adds to the residual."""
        W_O = self.weights.W_O.flatten(0, 1)
        return Linear(self.frame, W_O, self.weights.b_O, f"L{self.layer}.b_O")

    @cached_property
    def map(self) -> Chain:
        mixed = (self.mix, self.output_gate, self.z_edit)
        return _chain((self.values, self.v_edit, *mixed, self.output))

    @property
    def kv_of(self) -> list[int]:
        """Number of the key/value head that each query head reads."""
        heads, kv_heads = self.weights.W_O.shape[0], self.weights.W_V.shape[0]
        # Neighbouring query heads share a key/value head, as all hosts lay them out.
        return [h * kv_heads // heads for h in range(heads)]

    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node("head", self.layer, h) for h in range(self.weights.W_O.shape[0]))

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the run that the sublayer keeps."""
        kept = (self.latent_scale, self.value_ratio, self.output_ratio)
        return (*self.mix.frozen, *(tensor for tensor in kept if tensor is not None))

    def part(self, node: Node) -> Attention:
        if node not in self.nodes():
            raise _unknown(node, self.nodes())
        h, w = self.nodes().index(node), self.weights
        kv, d_head = self.kv_of[h], w.W_V.shape[2]
        values, z = slice(kv * d_head, (kv + 1) * d_head), slice(h * d_head, (h + 1) * d_head)
        return replace(
            self,
            mix=self.mix.head(h),
            # The user's edits belong to no head, and b_O is added once for all heads: both stay
            # outside.
            v_edit=None,
            z_edit=None,
            value_ratio=None if self.value_ratio is None else self.value_ratio[..., values],
            output_ratio=None if self.output_ratio is None else self.output_ratio[..., z],
            weights=replace(
                w,
                **({"kernel": w.kernel[values]} if isinstance(w, DeltaNetWeights) else {}),
                W_V=w.W_V[kv : kv + 1],
                b_V=None if w.b_V is None else w.b_V[kv : kv + 1],
                W_O=w.W_O[h : h + 1],
                b_O=None,
            ),
        )

    def hidden(self, x):
        # b_V goes through the pattern, as a row of A may sum to less than 1.
        z = self.mix.apply(self.values.apply(x) + self.values.bias)
        return z if self.output_gate is None else self.output_gate.apply(z)

    def hidden_at(self, x, query):
        w, frame = self.weights, self.frame
        if isinstance(self.mix, DeltaRule):  # the state passes through all positions anyway
            return take_row(self.hidden(x), query)[:, 0]
        row = self.mix.rows(query)
        kv_heads = w.W_V.shape[0]
        if self.value_maps:  # they differ from position to position, and so stand before mixing
            v = self.by_kv_head(self.values.apply(x) + self.values.bias)
            z = torch.einsum("bgrk,bkge->bgre", row.unflatten(1, (kv_heads, -1)), v).flatten(1)
        else:
            # Mixing comes first, A_h[q] x, then W_V on that one row: L·D + D² instead of L·D².
            mixed = row @ self._read(x)  # [batch, head, d_read]
            z = torch.einsum(
                "bgrd,gde->bgre", mixed.unflatten(1, (kv_heads, -1)), frame.cast(w.W_V)
            ).flatten(1, 2)
            if w.b_V is not None:
                # Σ_k A[q, k] b_V: the constant arrives with the weight that the row sums to.
                z = z + row.sum(-1, keepdim=True) * frame.cast(w.b_V)[self.kv_of]
            z = z.flatten(1)
        return z if self.output_ratio is None else z * take_row(self.output_ratio, query)[:, 0]

    def _read(self, x: Tensor) -> Tensor:
        """What W_V reads: the latent, constants included, or the input itself."""
        down = self.compressed
        return x if down is None else down.apply(x) + down.bias

    def by_kv_head(self, v: Float[Tensor, "*many e"]) -> Float[Tensor, "*many kv_head d_head"]:
        """Split values into one slice per key/value head."""
        return v.unflatten(-1, (self.weights.W_V.shape[0], -1))

    def reads(self):
        return tuple(replace(node, name="v") for node in self.nodes())

    def pull(self, y, effects):
        z = self.output.apply_t(y, effects)
        z = z if self.z_edit is None else self.z_edit.apply_t(z, effects)
        z = z if self.output_gate is None else self.output_gate.apply_t(z)
        return self._pull_values(self.mix.by_head_t(z), effects)

    def pull_at(self, y, query, effects):
        if isinstance(self.mix, DeltaRule):
            return self.pull(put_row(y, query, self.frame.n_pos), effects)
        own: dict[str, Tensor] = {}
        # y is nonzero at one query only, so the pull by A is an outer product with the row A[q].
        z = self.output.apply_t(y, own)[..., 0, :]
        if self.output_ratio is not None:
            z = z * take_row(self.output_ratio, query)[:, 0]
        effects |= put_effects(own, query, self.frame.n_pos)
        by_head = torch.einsum("...bhe,bhk->...bkhe", self.by_node(z), self.mix.rows(query))
        return self._pull_values(by_head, effects)

    def _pull_values(
        self, by_head: Float[Tensor, "*many batch pos head d_head"], effects: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        # Query heads of one group read the same values, so their covectors add up there.
        v = by_head.unflatten(-2, (self.weights.W_V.shape[0], -1)).sum(-2).flatten(-2)
        v = v if self.v_edit is None else self.v_edit.apply_t(v, effects)
        return self.values.apply_t(v, effects), by_head

    def _before_value_maps(
        self, by_head: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The covectors of the single heads at x W_V + b_V."""
        if not self.value_maps:
            return by_head
        # The maps act on key/value heads; the query heads of a group are carried as many vectors.
        v = rearrange(by_head, "b k (g r) e -> r b k (g e)", g=self.weights.W_V.shape[0])
        for m in reversed(self.value_maps):
            v = m.apply_t(v)
        return rearrange(v, "r b k (g e) -> b k (g r) e", g=self.weights.W_V.shape[0])

    def readers(
        self, kept: Float[Tensor, "batch pos head d_head"], norm: Norm | None
    ) -> tuple[Factored, dict[str, Float[Tensor, "head batch"]]]:
        """Compute the covector of every head's values at the residual. They sum to the adjoint.

        Args:
            kept: Covectors per head at the values, the second result of :meth:`pull`.
            norm: Norm through which the sublayer reads the residual, or None.

        Returns:
            The covectors, and what each head's own constants add to the target, by name
            [head, batch].
        """
        w, cast, own = self.weights, self.frame.cast, {}
        by_head = self._before_value_maps(kept).permute(2, 0, 1, 3)  # [head, batch, pos, d_head]
        if w.b_V is not None:
            own[self.projected.name] = by_head.sum(2), cast(w.b_V)
        if isinstance(w, LatentWeights) and self.latent_scale is not None:
            by_head = by_head / self.latent_scale  # a number per position, as the norm's own is
            if w.b_DKV is not None:
                b = cast(w.b_DKV) @ self._after_compression()
                own[f"L{self.layer}.b_DKV"] = by_head.sum(2), b
        if norm is not None and norm.weights.b is not None:
            # The norm's bias is the same at every position: it meets only the sum of the covectors.
            own[f"{norm.name}.b"] = by_head.sum(2), cast(norm.weights.b) @ self._value_matrices()
        shares = {name: (total * b[self.kv_of, None]).sum(-1) for name, (total, b) in own.items()}
        covectors = Factored(by_head, lambda: self._value_matrices().mT)
        return covectors if norm is None else covectors.then(norm.scale, norm.unscaled_t_), shares

    def _value_matrices(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """W_V of every head; of a latent W_DKV · norm · W_V, but for the norm's scale."""
        after, w = self._after_compression(), self.weights
        return self.frame.cast(w.W_DKV) @ after if isinstance(w, LatentWeights) else after

    def _after_compression(self) -> Float[Tensor, "kv_head d_read d_head"]:
        w, W_V = self.weights, self.frame.cast(self.weights.W_V)
        gain = w.norm.gain if isinstance(w, LatentWeights) else None
        return W_V if gain is None else W_V * self.frame.cast(gain)[:, None]

    def read_at(self, x, query, y):
        w, frame = self.weights, self.frame
        z = torch.einsum("bd,hed->bhe", y, frame.cast(w.W_O))
        if self.output_ratio is not None:
            z = z * self.by_node(take_row(self.output_ratio, query)[:, 0])
        if isinstance(self.mix, DeltaRule):
            by_head = self.mix.by_head_t(put_row(z.flatten(1)[:, None], query, frame.n_pos))
            v = self.by_node(self.projected.apply(x) + self.projected.bias)
            return (self._before_value_maps(by_head) * v).sum(-1).mT
        row, grouped = self.mix.rows(query), z.unflatten(1, (w.W_V.shape[0], -1))
        if self.value_maps:
            v = self.by_kv_head(self.values.apply(x) + self.values.bias)
            return row * torch.einsum("bgre,bkge->bgrk", grouped, v).flatten(1, 2)
        # y is carried back to one vector per head at the input. That costs D² once, and then L·D
        # for all positions, instead of L·D² for the outputs of all positions.
        v = torch.einsum("bgre,gde->bgrd", grouped, frame.cast(w.W_V)).flatten(1, 2)
        # ⟨y, A[q, k] x_k W_V W_O⟩ = A[q, k] ⟨y W_Oᵀ W_Vᵀ, x_k⟩: the pattern multiplies in the end.
        shares = v @ self._read(x).mT
        if w.b_V is not None:
            shares = shares + (z * frame.cast(w.b_V)[self.kv_of]).sum(-1, keepdim=True)
        return row * shares

    @property
    def external(self):
        return f"L{self.layer}.b_O", self.weights.b_O

    @property
    def edits(self) -> dict[str, Shift]:
        return _edits(v=self.v_edit, z=self.z_edit)
