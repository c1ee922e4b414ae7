"""The run of a circuit on packed prompts: every reader on an input of its own.

D_w is what writer w adds in this run and not in what replaces it. A reader r is given

    x_r = base + Σ_w keep[r, w] D_w

with ``base`` what it reads where every edge is ablated. D stands in one buffer [writer, token, d],
so the inputs of all readers of a layer are one matrix product.

1. From the logits down: a node is *used* if a used reader keeps it.
2. From the input up: a writer *moves* if its D is not 0: one of its readers keeps a writer that
   moves. All others are those of the base run, and nothing is computed for them.
3. Layer by layer: inputs of the readers that move, their queries, keys and values, patterns, z; D
   of heads; then the MLP.
4. The input of the logits at the last token of every prompt.

Where a corrupted run replaces what is ablated, ``base`` is that run, and D is 0 for every node that
does not move. Where a mean or nothing replaces it, D of such a node is what it adds in the base run
less that, and every used writer counts as one that moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..graph import Node
from ..maps import NormWeights
from ..sublayers import Rotation
from .edge_masks import EdgeUniverse
from .packed_model import (
    Layout,
    PackedLayer,
    PackedModel,
    normed,
    past_norm,
    scale_of,
    scale_past,
    with_bias,
)
from .packed_run import Outputs, Run, added


@dataclass(frozen=True, eq=False)
class CircuitRuns:
    """All that the runs of circuits on the same prompts share.

    Attributes:
        model: Weights and scores of the model.
        universe: All edges of the model.
        x: What enters the first block in the clean run, at the tokens that are run.
        base: The run with every edge ablated.
        other: What replaces the outputs of ablated writers.
        held: Patterns to hold, one per layer; None for live ones.
    """

    model: PackedModel
    universe: EdgeUniverse
    x: Float[Tensor, "token d_model"]
    base: Run
    other: Outputs
    held: Sequence[Tensor] | None

    @property
    def where(self) -> Layout:
        """Where the tokens stand."""
        return self.base.where

    @property
    def resampled(self) -> bool:
        """Whether what replaces an ablated writer is what it adds in the base run."""
        return self.other is self.base.outputs

    @cached_property
    def rotations(self) -> list[Rotation | None]:
        """The rotation of every block at these tokens."""
        return self.model.turns(self.where)

    @cached_property
    def places(self) -> list[tuple[slice, dict[str, slice], int, int]]:
        """By layer: heads among writers; q, k and v among readers; the MLP in both, −1 for none."""
        readers = {node: i for i, node in enumerate(self.universe.readers)}
        writers = {node: i for i, node in enumerate(self.universe.writers)}
        found = []
        for i, layer in enumerate(self.model.layers):
            n, first = len(layer.kv_of), writers[Node("head", i, 0)]
            sides = {s: readers[Node("head", i, 0, s)] for s in "qkv"}
            reads = {s: slice(at, at + n) for s, at in sides.items()}
            mlp = Node("mlp", i)
            found.append(
                (slice(first, first + n), reads, writers.get(mlp, -1), readers.get(mlp, -1))
            )
        return found

    def plan(
        self, keep: Bool[Tensor, "reader writer"]
    ) -> tuple[Bool[Tensor, " reader"], Bool[Tensor, " writer"]]:
        """Tell which readers get another input than in the base run, and which writers differ."""
        layers = list(zip(self.model.layers, self.places, strict=True))
        if self.model.leaks:
            # Constants are divided by a live scale, so they move wherever anything below does.
            return torch.ones(len(keep), dtype=torch.bool), torch.ones(keep.shape[1]).bool()
        # 1. What the logits use, from above.
        used, reads = keep[-1].clone(), torch.zeros(len(keep), dtype=torch.bool)
        reads[-1] = True
        for layer, (heads, sides, mlp, reader) in reversed(layers):
            if mlp >= 0 and used[mlp]:
                reads[reader] = True
                used |= keep[reader]
            if layer.block.ln1_post is not None and used[heads].any():
                used[heads] = True  # one scale divides all heads
            for side in sides.values():
                reads[side] = used[heads]
                used |= keep[side][used[heads]].any(0)
        # 2. What moves, from below.
        moves = torch.zeros_like(used) if self.resampled else used.clone()
        moves[0] = used[0]  # the input differs in any case
        active = torch.zeros_like(reads)
        for layer, (heads, sides, mlp, reader) in layers:
            for side in sides.values():
                active[side] = reads[side] & (keep[side] & moves).any(1)
                moves[heads] |= active[side]
            if layer.block.ln1_post is not None and moves[heads].any():
                # One head that moves changes the scale, and so what all others add.
                moves[heads] = used[heads]
            if mlp >= 0:
                active[reader] = reads[reader] & bool((keep[reader] & moves).any())
                moves[mlp] |= active[reader]
        return active, moves & used

    def last(self, keep: Bool[Tensor, "reader writer"]) -> Float[Tensor, "prompt d_model"]:
        """The final residual of a circuit at every prompt's last token.

        Args:
            keep: The circuit: true where an edge is live.

        Returns:
            The residual before the final norm.
        """
        keep = keep.cpu()
        if self.held is not None:  # no pattern reads queries and keys
            keep = keep.clone()
            for _, sides, _, _ in self.places:
                keep[sides["q"]] = keep[sides["k"]] = False
        active, moves = self.plan(keep)
        columns = moves.nonzero()[:, 0]
        return _Pass(self, keep, active, columns).last()


class _Pass:
    """One circuit's run under way."""

    def __init__(self, runs: CircuitRuns, keep: Tensor, active: Tensor, columns: Tensor):
        self.runs, self.active, self.columns = runs, active, columns
        self.keep = keep[:, columns].to(runs.x)  # D of all other writers is 0
        tokens, width = runs.x.shape
        self.D = runs.x.new_empty(len(columns), tokens, width)
        self.leak: Tensor | None = None
        """What constants add in this run and not in the base run, as post-norms scale them."""

    def below(self, writer: int) -> int:
        """Number of columns below a writer."""
        return int((self.columns < writer).sum())

    def last(self) -> Tensor:
        runs = self.runs
        if len(self.columns) and self.columns[0] == 0:
            self.D[0] = runs.x if runs.other.x is None else runs.x - runs.other.x
        for i, layer in enumerate(runs.model.layers):
            self.layer(i, layer)
        # 4. The input of the logits.
        rows = runs.where.last
        end = runs.base.end[rows] + torch.einsum("w,wpd->pd", self.keep[-1], self.D[:, rows])
        return end if self.leak is None else end + self.leak[rows]

    def given(self, rows: list[int], below: int, base: Tensor) -> Tensor:
        """The inputs of some readers of one place [reader, token, d]."""
        flat = self.D[:below].flatten(1)
        base = base if self.leak is None else base + self.leak
        # x_r = base + Σ_w keep[r, w] D_w: [reader, writer] @ [writer, token · d] for all readers at
        # once.
        x = torch.addmm(base.reshape(1, -1), self.keep[rows][:, :below], flat)
        return x.unflatten(1, base.shape)

    def layer(self, i: int, layer: PackedLayer) -> None:
        base, block = self.runs.base, layer.block
        heads, sides, mlp, reader = self.runs.places[i]
        own = {s: self.active[at].nonzero()[:, 0].tolist() for s, at in sides.items()}
        rows = [sides[s].start + h for s in "qkv" for h in own[s]]
        below, above = self.below(heads.start), self.below(heads.stop)
        new, written = slice(below, above), (self.columns[below:above] - heads.start).tolist()
        # 3a. One product for all readers of the layer; the MLP's row lacks the layer's own heads.
        early = reader >= 0 and bool(self.active[reader])
        mid = n = None
        if rows or early:
            x = self.given([*rows, reader] if early else rows, below, base.pre[i])
            n, mid = normed(block.ln1, x[: len(rows)]), x[-1] if early else None
        # 3b. Heads.
        moved = self.heads(i, layer, own, n, new, written) if rows or written else None
        # 3c. The MLP.
        if mid is not None:
            if not block.parallel:
                # What attention adds in the base run; then what kept heads of this layer add beyond
                # that.
                mid = mid + (base.mid[i] - base.pre[i])
                mid = mid + torch.einsum("w,wnd->nd", self.keep[reader, new], self.D[new])
                mid = mid if moved is None else mid + moved
            self.mlp(i, layer, mid, mlp)
        elif (m := base.outputs.mlp[i]) is not None and bool((self.columns == mlp).any()):
            self.put(self.below(mlp), m, self.runs.other.mlp[i])
        if moved is not None:
            self.leak = moved if self.leak is None else self.leak + moved

    def put(self, column: int, made: Tensor, replaced: Tensor | None) -> None:
        self.D[column] = made if replaced is None else made - replaced

    def mlp(self, i: int, layer: PackedLayer, mid: Tensor, mlp: int) -> None:
        m, block = layer.mlp(mid), layer.block
        scale = scale_past(block.ln2_post, m, layer.b_out)
        if scale is not None:
            m = past_norm(block.ln2_post, m) / scale
            moved = self.moved(i, 1, block.ln2_post, layer.b_out, scale)
            if moved is not None:
                self.leak = moved if self.leak is None else self.leak + moved
        if bool((self.columns == mlp).any()):
            self.put(self.below(mlp), m, self.runs.other.mlp[i])

    def moved(
        self, i: int, which: int, norm: NormWeights | None, b: Tensor | None, scale: Tensor
    ) -> Tensor | None:
        """What a constant adds in this run and not in the base run."""
        if b is None:
            return None
        return past_norm(norm, b.detach()) / scale - self.runs.base.leak[i, which]

    def heads(
        self,
        i: int,
        layer: PackedLayer,
        own: dict[str, list[int]],
        n: Tensor | None,
        new: slice,
        written: list[int],
    ) -> Tensor | None:
        """Fill in D of the heads that move; return what moved of their constants."""
        runs, block, moved = self.runs, layer.block, None
        z = runs.base.raw_z[i]
        if n is not None and len(n):
            some = sorted(set().union(*own.values()))
            z = z.clone()
            z[some] = self.mixed(i, layer, own, n, some)
        if (norm := block.ln1_post) is not None:
            attn = added(block.attn.W_O.detach(), z)
            scale = scale_of(norm, with_bias(attn, block.attn.b_O))
            z, moved = z / scale, self.moved(i, 0, norm, block.attn.b_O, scale)
        twin = runs.other.z[i]
        # D = z W_O − z′ W_O: subtracting before W_O saves a product.
        change = z[written] if twin is None else z[written] - twin[written]
        whole = len(written) == len(layer.W_O)
        torch.bmm(change, layer.W_O if whole else layer.W_O[written], out=self.D[new])
        return moved

    def mixed(
        self, i: int, layer: PackedLayer, own: dict[str, list[int]], n: Tensor, some: list[int]
    ) -> Float[Tensor, "head token d_head"]:
        """Z of some heads, of which queries, keys or values are new."""
        base, where, at = self.runs.base, self.runs.where, {h: j for j, h in enumerate(some)}
        made, first = {}, 0
        for s, heads in own.items():
            rows = n[first : first + len(heads)]
            made[s] = layer.apart(s, heads, rows, self.runs.rotations[i]) if heads else None
            first += len(heads)
        keys = [layer.kv_of[h] for h in some]
        twins = {
            "q": where.padded(base.q[i][some], False),
            "k": base.k[i][keys],
            "v": base.v[i][keys],
        }
        for s, y in made.items():
            if y is not None:
                index = [at[h] for h in own[s]]
                rows = where.queries_at if s == "q" else where.keys_at
                # Indexing by lists copied these rows, so writing to them leaves the base run as it
                # is.
                flat = twins[s].flatten(1, 2)
                flat[torch.tensor(index, device=y.device)[:, None], rows] = y
        if self.runs.held is not None:
            A = self.runs.held[i][some]
        else:
            A = base.A[i][some]
            anew = sorted({*own["q"], *own["k"]})
            if anew:
                index = [at[h] for h in anew]
                # A new value leaves a pattern as it is: only new queries or keys make it anew.
                A[index] = layer.pattern(twins["q"][index], twins["k"][index], anew, where)
        return where.packed(A @ twins["v"])
