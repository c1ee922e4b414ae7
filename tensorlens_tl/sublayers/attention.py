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
from ..maps import Chain, Factored, Frame, Linear, Norm, Shift, put_effects
from .recomputed_pattern import AnyMix
from .sublayer import Sublayer, _chain, _edits, _unknown
from .weights import AttentionWeights


@dataclass(frozen=True, eq=False)
class Attention(Sublayer):
    """Frozen attention: y_q = Σ_h Σ_k A_h[q, k] (x_k W_V^{kv(h)} + b_V) W_O^h + b_O.

    Rows of A need not sum to 1, because of attention sinks or masked rows. So b_V stays inside the
    sum.

    Attributes:
        frame: Layout of the batch.
        layer: Number of the block, from 0.
        mix: The map v → z by A. A is stored, or recomputed from queries and keys at every use.
        weights: Value and output matrices.
        v_edit: What a hook of the user added to the values, or None.
        z_edit: What a hook of the user added to z, or None.
    """

    frame: Frame
    layer: int
    mix: AnyMix
    weights: AttentionWeights
    v_edit: Shift | None = None
    z_edit: Shift | None = None

    @cached_property
    def values(self) -> Linear:
        """The map x → v, with all key/value heads side by side."""
        w = self.weights
        b_V = None if w.b_V is None else w.b_V.flatten()
        # Heads side by side make one product of all values. Grouped heads are not repeated here.
        return Linear(self.frame, rearrange(w.W_V, "h d e -> d (h e)"), b_V, f"L{self.layer}.b_V")

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
        return _chain((self.values, self.v_edit, self.mix, self.z_edit, self.output))

    @property
    def kv_of(self) -> list[int]:
        """Number of the key/value head that each query head reads."""
        heads, kv_heads = self.weights.W_O.shape[0], self.weights.W_V.shape[0]
        # Neighbouring query heads share a key/value head, as all hosts lay them out.
        return [h * kv_heads // heads for h in range(heads)]

    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node("head", self.layer, h) for h in range(self.weights.W_O.shape[0]))

    def part(self, node: Node) -> Attention:
        if node not in self.nodes():
            raise _unknown(node, self.nodes())
        h, w = self.nodes().index(node), self.weights
        kv = self.kv_of[h]
        return replace(
            self,
            mix=self.mix.head(h),
            # The user's edits belong to no head, and b_O is added once for all heads: both stay
            # outside.
            v_edit=None,
            z_edit=None,
            weights=AttentionWeights(
                w.W_V[kv : kv + 1],
                None if w.b_V is None else w.b_V[kv : kv + 1],
                w.W_O[h : h + 1],
                None,
            ),
        )

    def hidden(self, x):
        # b_V goes through the pattern, as a row of A may sum to less than 1.
        return self.mix.apply(self.values.apply(x) + self.values.bias)

    def hidden_at(self, x, query):
        # Mixing comes first, A_h[q] x, then W_V on that one row: L·D + D² instead of L·D².
        w, frame = self.weights, self.frame
        row = self.mix.rows(query)
        mixed = row @ x  # [batch, head, d_model]
        kv_heads = w.W_V.shape[0]
        z = torch.einsum(
            "bgrd,gde->bgre", mixed.unflatten(1, (kv_heads, -1)), frame.cast(w.W_V)
        ).flatten(1, 2)
        if w.b_V is not None:
            # Σ_k A[q, k] b_V: the constant arrives with the weight that the row sums to.
            z = z + row.sum(-1, keepdim=True) * frame.cast(w.b_V)[self.kv_of]
        return z.flatten(1)

    def reads(self):
        return tuple(replace(node, name="v") for node in self.nodes())

    def pull(self, y, effects):
        z = self.output.apply_t(y, effects)
        z = z if self.z_edit is None else self.z_edit.apply_t(z, effects)
        return self._pull_values(self.mix.by_head_t(z), effects)

    def pull_at(self, y, query, effects):
        own: dict[str, Tensor] = {}
        # y is nonzero at one query only, so the pull by A is an outer product with the row A[q].
        z = self.by_node(self.output.apply_t(y, own)[..., 0, :])
        effects |= put_effects(own, query, self.frame.n_pos)
        by_head = torch.einsum("...bhe,bhk->...bkhe", z, self.mix.rows(query))
        return self._pull_values(by_head, effects)

    def _pull_values(
        self, by_head: Float[Tensor, "*many batch pos head d_head"], effects: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        # Query heads of one group read the same values, so their covectors add up there.
        v = by_head.unflatten(-2, (self.weights.W_V.shape[0], -1)).sum(-2).flatten(-2)
        v = v if self.v_edit is None else self.v_edit.apply_t(v, effects)
        return self.values.apply_t(v, effects), by_head

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
        w, cast = self.weights, self.frame.cast
        by_head, own = kept.permute(2, 0, 1, 3), {}  # [head, batch, pos, d_head]
        if norm is not None and norm.weights.b is not None:
            # The norm's bias is the same at every position: it meets only the sum of the covectors.
            own[f"{norm.name}.b"] = cast(norm.weights.b) @ cast(w.W_V)
        if w.b_V is not None:
            own[self.values.name] = cast(w.b_V)
        total = by_head.sum(2)  # [head, batch, d_head]
        shares = {name: (total * b[self.kv_of, None]).sum(-1) for name, b in own.items()}
        covectors = Factored(by_head, lambda: cast(w.W_V).mT)
        return covectors if norm is None else covectors.then(norm.scale, norm.unscaled_t_), shares

    def read_at(self, x, query, y):
        # y is carried back to one vector per head at the input. That costs D² once, and then L·D
        # for all positions, instead of L·D² for the outputs of all positions.
        w, frame = self.weights, self.frame
        row = self.mix.rows(query)
        z = torch.einsum("bd,hed->bhe", y, frame.cast(w.W_O))
        grouped = z.unflatten(1, (w.W_V.shape[0], -1))
        v = torch.einsum("bgre,gde->bgrd", grouped, frame.cast(w.W_V)).flatten(1, 2)
        # ⟨y, A[q, k] x_k W_V W_O⟩ = A[q, k] ⟨y W_Oᵀ W_Vᵀ, x_k⟩: the pattern multiplies in the end.
        shares = v @ x.mT
        if w.b_V is not None:
            shares = shares + (z * frame.cast(w.b_V)[self.kv_of]).sum(-1, keepdim=True)
        return row * shares

    @property
    def external(self):
        return f"L{self.layer}.b_O", self.weights.b_O

    @property
    def edits(self) -> dict[str, Shift]:
        return _edits(v=self.v_edit, z=self.z_edit)
