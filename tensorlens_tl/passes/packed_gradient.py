"""First-order effects of all edges: one forward and one backward pass of packed prompts per point.

With D_w what writer w adds in the clean and not in the corrupted run, and G_r the gradient of the
metric at the input of reader r, the effect of an edge is Σ ⟨D_w, G_r⟩ over tokens.

1. One ordinary run with a graph. Keys and values are repeated per query head before they are
   rotated, so one backward pass tells the readers of a group apart.
2. From queries (keys, values) to the residual, through the norm before attention. With the
   gradient g there, x̂ = (x − mean) / s what the norm makes of x before its weight γ, and
   u = γ ⊙ W g

       G = (u − mean u − x̂ c) / s,   c = ⟨x̂, u⟩ / d = ⟨q without biases, g⟩ / d

   (an RMSNorm subtracts no mean). So all but x̂ c / s is kept at the width of a head.
3. Over the points between the corrupted and the clean embeddings, g / s is summed before it is
   widened, and the rest is a product with one column per point.
4. D of all writers in one buffer, layer by layer times G of the layer's readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .edge_masks import EdgeUniverse
from .packed_layout import Layout
from .packed_model import PackedLayer, PackedModel, scale_of
from .packed_run import Outputs, Run, run

SummedMetric = Callable[[Float[Tensor, "prompt d_vocab"], Float[Tensor, "prompt d_vocab"]], Tensor]
"""(logits of a run after every prompt, those of the clean run) → the metric, summed."""


def tells_heads_apart(model: PackedModel) -> bool:
    """Whether no norm of queries or keys has a scale or weights that differ by head."""
    norms = (norm for layer in model.layers for norm in (layer.scores.q_norm, layer.scores.k_norm))
    return not any(
        norm is not None
        and (norm.whole or (norm.weights.w is not None and norm.weights.w.ndim > 1))
        for norm in norms
    )


@dataclass(frozen=True, eq=False)
class EdgeEffects:
    """The clean and the corrupted run of packed prompts, ready to be compared edge by edge.

    Attributes:
        model: Weights and scores of the model.
        universe: All edges of the model.
        where: The tokens from which two prompts differ.
        x: What enters the first block in the clean run.
        twin: What enters it in the corrupted run.
        past: A run whose keys and values stand in the prefixes, or None.
    """

    model: PackedModel
    universe: EdgeUniverse
    where: Layout
    x: Float[Tensor, "token d_model"]
    twin: Float[Tensor, "token d_model"]
    past: Run | None

    def sums(
        self, measure: SummedMetric, steps: int
    ) -> tuple[Float[Tensor, "reader writer"], Float[Tensor, "prompt d_vocab"]]:
        """Compute the effects of all edges, summed over prompts.

        Args:
            measure: What is measured of the logits.
            steps: Number of points on the way from the corrupted to the clean embeddings.

        Returns:
            The effects, 0 where there is no edge, and the clean run's logits.
        """
        with torch.no_grad():
            other = run(self.model, self.where, self.twin, past=self.past, keep=False).outputs
        points: list[_Point] = []
        for step in range(steps, 0, -1):  # the clean run first: its prediction may be asked for
            # EAP-IG's points: the right ends of equal steps, the clean run among them.
            at = self.twin + step / steps * (self.x - self.twin)
            points.append(_Point.of(self, at, measure, points[0].logits if points else None))
        clean = points[0].outputs
        with torch.no_grad():
            return self._products(clean, other, points), points[0].logits

    def _products(self, clean: Any, other: Any, points: list[_Point]) -> Tensor:
        def readers() -> Iterator[tuple[int, Tensor]]:
            for i, layer in enumerate(self.model.layers):
                heads, seen = len(layer.kv_of), [point.layers[i] for point in points]
                dense = layer.block.mlp is not None
                G = self.x.new_empty(3 * heads + dense, *self.x.shape)
                for j, side in enumerate("qkv"):
                    pull(layer, side, seen, G[j * heads :][:heads])
                if dense:
                    G[-1] = torch.stack([point["mlp"] for point in seen]).sum(0)
                yield i, G

        # 4. Writers times readers.
        D = differences(self.model, self.universe, clean, other)
        end = torch.stack([point.end for point in points]).sum(0)
        return products(self.model, self.universe, D, readers(), end, self.where) / len(points)


def differences(
    model: PackedModel, universe: EdgeUniverse, clean: Any, other: Any
) -> Float[Tensor, "writer token d_model"]:
    """What every writer adds in one run and not in another one, from their outputs."""
    D = clean.x.new_empty(len(universe.writers), *clean.x.shape)
    # In the order of the universe: the input, then heads and MLP of every layer.
    torch.sub(clean.x, other.x, out=D[0])
    at = 1
    for i, layer in enumerate(model.layers):
        heads = len(layer.kv_of)
        torch.bmm(clean.z[i] - other.z[i], layer.W_O, out=D[at : at + heads])
        at += heads
        if layer.block.mlp is not None:
            torch.sub(clean.mlp[i], other.mlp[i], out=D[at])
            at += 1
    return D


def products(
    model: PackedModel,
    universe: EdgeUniverse,
    D: Float[Tensor, "writer token d_model"],
    readers: Iterable[tuple[int, Float[Tensor, "reader token d_model"]]],
    end: Float[Tensor, "prompt d_model"],
    where: Layout,
) -> Float[Tensor, "all_reader writer"]:
    """Multiply what writers add with the gradients of all readers, summed over tokens.

    Args:
        model: Weights of the model.
        universe: All edges of the model.
        D: What every writer adds.
        readers: A layer, and the gradients at its queries, keys, values and MLP, in any order.
        end: The gradient at the final residual after every prompt.
        where: Where the tokens stand.

    Returns:
        The products, 0 where there is no edge.
    """
    sums = D.new_zeros(len(universe.readers), len(universe.writers))
    sizes = [(len(layer.kv_of), layer.block.mlp is not None) for layer in model.layers]
    first = [0, *accumulate(3 * heads + dense for heads, dense in sizes)]
    below = [*accumulate((heads + dense for heads, dense in sizes), initial=1)]
    for i, G in readers:
        rows, seen, (heads, dense) = slice(first[i], first[i + 1]), below[i], sizes[i]
        # Σ over tokens of ⟨G_r, D_w⟩: all readers of a layer by all writers below, in one product.
        sums[rows, :seen] = G.flatten(1) @ D[:seen].flatten(1).T
        if dense and not model.layers[i].block.parallel:  # the MLP reads the heads beside it
            new = slice(seen, seen + heads)
            sums[rows.stop - 1, new] = D[new].flatten(1) @ G[-1].flatten()
    sums[-1] = D[:, where.last].flatten(1) @ end.flatten()
    return sums


@dataclass(frozen=True, eq=False)
class _Point:
    """One run with its gradients.

    Attributes:
        outputs: What its writers add.
        logits: Logits after every prompt.
        layers: What was differentiated in every block, by name. "q", "k" and "v" are gradients of
            every query head, divided by the scale of the norm before them. "cq", "ck" and "cv" are
            c over the squared scale. "x" is the centred residual. "mlp" is the gradient there.
        end: The gradient at the final residual after every prompt.
    """

    outputs: Outputs
    logits: Tensor
    layers: list[dict[str, Tensor]]
    end: Tensor

    @classmethod
    def of(
        cls, runs: EdgeEffects, x: Tensor, measure: SummedMetric, clean: Tensor | None
    ) -> _Point:
        model, seen = runs.model, [{} for _ in runs.model.layers]

        def tap(what: str, layer: int, tensor: Tensor) -> Tensor:
            # A view is a node of the graph by itself, whose gradient is that of this reader alone.
            seen[layer][what] = found = tensor.view_as(tensor)
            return found

        with torch.enable_grad():
            # 1. One run with a graph, and the gradients at all taps.
            found = run(model, runs.where, x.detach().requires_grad_(), past=runs.past, tap=tap)
            last = found.last
            logits = model.logits(last)
            value = measure(logits, logits.detach() if clean is None else clean)
            if not value.requires_grad:
                raise ValueError(
                    "metric returned numbers without a gradient. Compute them from the logits "
                    "without detach() or item()."
                )
            wanted = [last, *(tensor for layer in seen for tensor in layer.values())]
            grads = torch.autograd.grad(value, wanted, allow_unused=True)
        # A place that the metric does not depend on has no gradient, which means 0.
        each = (torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True))
        with torch.no_grad():
            end, layers = next(each), []
            for i, (layer, taps) in enumerate(zip(model.layers, seen, strict=True)):
                g = dict(zip(taps, each, strict=False))
                layers.append(_scaled(layer, found.pre[i].detach(), taps, g))
        z = [one.detach() for one in found.outputs.z if one is not None]
        mlp = [None if one is None else one.detach() for one in found.outputs.mlp]
        return cls(Outputs(x.detach(), z, mlp), logits.detach(), layers, end)


def _scaled(
    layer: PackedLayer, pre: Tensor, taps: dict[str, Tensor], g: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients as :class:`_Point` keeps them."""
    norm = layer.block.ln1
    if norm is None:
        return g
    s = scale_of(norm, pre)
    found = {"x": pre - pre.mean(-1, keepdim=True) if norm.center else pre}
    for side in "qkv":
        # Queries of x̂ alone: without the biases, which are those of an input b.
        b = pre.new_zeros(pre.shape[-1]) if norm.b is None else norm.b.detach()
        y = taps[side].detach() - layer.of_query_heads(side, layer.shared(side, b[None]))
        found[side] = g[side] / s
        # x̂ c / s = (x − mean) · ⟨y, g⟩ / (d s²). The first factor is kept once, as "x".
        found[f"c{side}"] = (y * g[side]).sum(-1) / (s.squeeze(-1).square() * pre.shape[-1])
    return found | ({"mlp": g["mlp"]} if "mlp" in g else {})


def pull(
    layer: PackedLayer,
    side: str,
    points: list[dict[str, Tensor]],
    out: Float[Tensor, "head token d_model"],
) -> None:
    """Pull gradients at queries, keys or values back to the residual, summed over points.

    Args:
        layer: Weights of the block.
        side: "q", "k" or "v".
        points: The gradients of every point; see :class:`_Point`.
        out: Receives one row per query head.
    """
    # 2. and 3. Summed over points, widened, and through the norm.
    g = points[0][side] if len(points) == 1 else torch.stack([p[side] for p in points]).sum(0)
    W = layer.of_query_heads(side, layer.weights(side)[0].detach())
    torch.bmm(g, W.mT, out=out)
    norm = layer.block.ln1
    if norm is None:
        return
    if norm.gain is not None:
        out *= norm.gain.detach()
    if norm.center:
        out -= out.mean(-1, keepdim=True)
    # Less x̂ c / s, one column per point: [token, head, point] @ [token, point, d].
    c = torch.stack([p[f"c{side}"] for p in points], -1).transpose(0, 1)
    out -= (c @ torch.stack([p["x"] for p in points], 1)).transpose(0, 1)
