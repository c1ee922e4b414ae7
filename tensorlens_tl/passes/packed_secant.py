"""Effects of all edges by the operator between two runs of packed prompts, in one sweep.

The operator and its secants are those of ``operator/secant.py``; here they run on packed tokens,
and only from the first token at which two prompts differ: before it every difference is 0.

1. D of all writers: what each adds in the clean and not in the corrupted run.
2. From the logits down: the target's covector through the secant of the final norm, of every MLP,
   and of attention. A layer's readers are multiplied with all writers below as they come.
3. At the embeddings, ⟨covector, Δx⟩ must be ⟨covector, Δy⟩ at the logits: S is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..maps import TINY, NormWeights
from ..operator import (
    NormSecant,
    act_secant,
    cap_secant,
    gated_secants,
    softmax_secant,
    tolerance,
    turned,
)
from ..sublayers import HeadNorm, Rotation
from .edge_masks import EdgeUniverse
from .packed_gradient import differences, products, tells_heads_apart
from .packed_model import PackedLayer, PackedModel, normed, scale_of, with_bias
from .packed_run import Run, added


def has_secant(model: PackedModel) -> bool:
    """Whether every part of the model has its secant here."""
    mlps = [layer.block.mlp for layer in model.layers]
    smooth = (getattr(m, "act", "") != "solu" and getattr(m, "ln", None) is None for m in mlps)
    return tells_heads_apart(model) and all(smooth)


@dataclass(frozen=True, eq=False)
class SecantEffects:
    """Two runs of packed prompts, ready to be compared edge by edge.

    Attributes:
        model: Weights and scores of the model.
        universe: All edges of the model.
        clean: The clean run, with what activations read.
        other: The corrupted run, likewise.
    """

    model: PackedModel
    universe: EdgeUniverse
    clean: Run
    other: Run

    @property
    def _runs(self) -> tuple[Run, Run]:
        return self.clean, self.other

    def sums(self, u: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "reader writer"] | None:
        """Compute the effects of all edges, summed over prompts.

        Args:
            u: The target's covector at the final normalized residual after every prompt: the mean
                of both runs'.

        Returns:
            The effects, 0 where there is no edge; None where the sweep misses a part of the whole
            difference.
        """
        where, ends = self.clean.where, [run.last for run in self._runs]
        top = _pulled_(self.model.adapter.weights.ln_final, ends, u.clone())
        D = differences(self.model, self.universe, self.clean.outputs, self.other.outputs)
        covectors = [torch.zeros_like(self.clean.end)]
        covectors[0][where.last] = top
        found = products(self.model, self.universe, D, self._sweep(covectors), top, where)
        # S is exact on the difference: ⟨c, Δx⟩ at the embeddings is ⟨u, Δy⟩ at the top, or a part
        # was missed.
        whole, change = (covectors[-1] * D[0]).sum(), ends[0] - ends[1]
        size = covectors[-1].norm() * D[0].norm() + top.norm() * change.norm()
        off = float((whole - (top * change).sum()).abs() / size.clamp_min(TINY))
        return found if off <= tolerance(D.dtype) else None

    def _sweep(self, covectors: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The gradients of every layer's readers, from above; adds the covector below each one."""
        rotations = self.model.turns(self.clean.where)
        for i in reversed(range(len(self.model.layers))):
            layer, c = self.model.layers[i], covectors[-1]
            block, heads = layer.block, len(layer.kv_of)
            G = c.new_empty(3 * heads + (block.mlp is not None), *c.shape)
            if block.mlp is not None:
                G[-1] = self._mlp(i, layer, c)
                # In a serial block the MLP reads what heads write, so heads are read through it as
                # well.
                c = c if block.parallel else c + G[-1]
            self._attention(i, layer, rotations[i], c, G[: 3 * heads])
            below = G if block.parallel else G[: 3 * heads]
            covectors.append(c + below.sum(0))
            yield i, G

    def _mlp(self, i: int, layer: PackedLayer, c: Tensor) -> Float[Tensor, "token d_model"]:
        """Back through the post-norm, W_out, the activation, W_in and the norm of an MLP."""
        block, w = layer.block, cast(Any, layer.block.mlp)  # a plain or a gated one
        reads = [cast(Sequence[Tensor], run.activated[i]) for run in self._runs]
        if block.ln2_post is not None:
            out = [with_bias(layer.mlp_of(tuple(read)), layer.b_out) for read in reads]
            c = _pulled_(block.ln2_post, out, c.clone())
        h = c @ w.W_out.detach().mT
        if len(reads[0]) > 1:
            gates, ups = zip(*reads, strict=True)
            on_up, on_gate = gated_secants(w.act, gates, ups)
            c = (h * on_gate) @ w.W_gate.detach().mT + (h * on_up) @ w.W_in.detach().mT
        else:
            c = (h * act_secant(w.act, reads[0][0], reads[1][0])) @ w.W_in.detach().mT
        return _pulled_(block.ln2, [run.mid[i] for run in self._runs], c)

    def _attention(
        self, i: int, layer: PackedLayer, rotation: Rotation | None, c: Tensor, out: Tensor
    ) -> None:
        """Gradients at the residual through the queries, keys and values of all heads."""
        runs, block, where = self._runs, layer.block, self.clean.where
        heads, own = list(range(len(layer.kv_of))), layer.kv_of
        W_O = block.attn.W_O.detach()
        if block.ln1_post is not None:
            made = [with_bias(added(W_O, run.raw_z[i]), block.attn.b_O) for run in runs]
            c = _pulled_(block.ln1_post, made, c.clone())
        # 1. At z. Rows of padding are 0.
        z = (c @ W_O.flatten(0, 1).mT).unflatten(-1, (len(heads), -1)).movedim(1, 0)
        z = where.padded(z, False)
        # 2. Through the secants of A v, of the softmax, of a soft cap, and of q k.
        q = [where.padded(run.q[i], False) for run in runs]
        k, v = ([getattr(run, side)[i] for run in runs] for side in "kv")
        P = [layer.products(a, b[own]) for a, b in zip(q, k, strict=True)]
        slope = 1.0
        if (cap := layer.scores.soft_cap) is not None:
            slope = cap_secant(cap, [cap * torch.tanh(one / cap) for one in P], P)
        S = [layer.capped(one, heads, where) for one in P]
        A, L = softmax_secant(S[0], S[1])
        total = L.sum(-1, keepdim=True).clamp_min(torch.finfo(L.dtype).tiny)
        A, L = (t[..., : where.n_keys] for t in (A, L))  # a sink has no value
        # A v − A′v′ = ΔA v̄ + Ā Δv, with means of both runs: values see the mean pattern (A below),
        # the pattern sees the mean value. The same for q kᵀ.
        g = L * (z @ ((v[0] + v[1]) / 2)[own].mT)
        # The softmax's secant is diag(L) − L Lᵀ / ΣL, symmetric like its derivative.
        dP = (g - L * (g.sum(-1, keepdim=True) / total)) * slope * layer.scores.scale
        at = {
            "q": where.packed(dP @ ((k[0] + k[1]) / 2)[own]),
            "k": (dP.mT @ ((q[0] + q[1]) / 2)).flatten(1, 2)[:, where.keys_at],
            "v": (A.mT @ z).flatten(1, 2)[:, where.keys_at],
        }
        # 3. Through rotations and norms, W_Q, W_K and W_V, and the norm before attention.
        for j, (side, y) in enumerate(at.items()):
            W, _, norm = layer.weights(side)
            if side != "v":
                y = y if layer.scores.norm_last else turned(y, rotation, back=True)
                if norm is not None:
                    y = self._norm_of_heads(i, layer, side, rotation, y)
                y = turned(y, rotation, back=True) if layer.scores.norm_last else y
            W = layer.of_query_heads(side, W.detach())
            torch.bmm(y, W.mT, out=out[j * len(heads) : (j + 1) * len(heads)])
        _pulled_(block.ln1, [run.pre[i] for run in runs], out)

    def _norm_of_heads(
        self, i: int, layer: PackedLayer, side: str, rotation: Rotation | None, y: Tensor
    ) -> Tensor:
        """Pull covectors at normalized queries or keys back to what their norm reads."""
        norm = cast(HeadNorm, layer.weights(side)[2])
        raw = [layer.shared(side, normed(layer.block.ln1, run.pre[i])) for run in self._runs]
        if layer.scores.norm_last:
            raw = [turned(one, rotation) for one in raw]
        scales = [norm.apply(one)[1] for one in raw]
        secant = NormSecant.of(norm.weights, raw[0], raw[1], scales[0], scales[1])
        mid, inverse = (layer.of_query_heads(side, t) for t in (secant.mid, secant.inverse))
        return replace(secant, mid=mid, inverse=inverse).pull_(y.clone())


def _pulled_(norm: NormWeights | None, inputs: Sequence[Tensor], c: Tensor) -> Tensor:
    """Pull covectors back through the secant of a norm between two inputs, in place."""
    if norm is None:
        return c
    x, y = inputs
    return NormSecant.of(norm, x, y, scale_of(norm, x), scale_of(norm, y)).pull_(c)
