"""The real model with the input of every reader rebuilt, edge by edge.

A reader r (the q, k or v input of a query head, an MLP, the final norm) is given, in place of the
residual,

    x_r = Σ_w  keep[r, w] · out_w  +  (1 − keep[r, w]) · replacement_w  +  constants

with the host's own norms of the residual in between, where a post-norm model has them. out_w is
what writer w adds in this very pass, replacement_w what replaces it (its output in a corrupted run,
a mean, 0), and constants what no writer holds (b_O, b_out, through the live post-norm). The host
computes all that is not linear in x_r: its own norm modules run on x_r; its own attention rotates,
normalizes, caps and masks the q and k that it is given; its own MLP and final norm run on their
rebuilt inputs. Only W_Q, W_K, W_V, W_O and W_out are applied here. Its own residual goes unread.

Queries, keys and values are per query head: v_h = N(x_{h.v}) W_V^{kv(h)}. Where g query heads share
a key and a value, the batch is run in g copies. Copy i carries, for every key head, the key and the
value of its i-th query head; of what it makes, patterns and z of these query heads are taken. Where
one norm divides the queries of all heads, a head's query is what the host's norm makes of x_{h.q}
W_Q, all heads of it, and it is handed over behind that norm. Keys likewise.

One pass (:meth:`EdgeModel.run`) takes four steps, in every layer from below:

1. Readers: rebuild q, k, v and MLP inputs from what was written so far.
2. The host runs its norms, attention and MLP on them.
3. Writers: hooks on z and post give what each head and MLP adds, kept apart from the constants.
4. The final norm and the unembedding run on the rebuilt input of the logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ..checks import no_autocast
from ..hosts import Adapter, adapt
from ..maps import NormWeights
from ..readers import QueryKeyWeights, Read, query_key_weights, whole_norms
from ..recording import HookEdit, hooked, input_replaced, output_replaced, unsplit
from ..sublayers import ExpertsWeights
from .edge_masks import EdgeUniverse, norms_between, wiring_of
from .expert_patching import experts_apart, post_normed

Writes = Float[Tensor, "writer prompt pos d_model"]
CHUNK = 2**28
"""Bytes that the outputs of all writers in one pass may take, about."""


@dataclass(frozen=True, eq=False)
class EdgeRun:
    """Result of one pass.

    Attributes:
        logits: Logits of the host [circuit, prompt, pos, d_vocab].
        writes: Output of every writer [circuit, writer, prompt, pos, d_model].
        patterns: Attention pattern of every layer [circuit, prompt, head, query_pos, key_pos].
    """

    logits: Float[Tensor, "circuit prompt pos d_vocab"]
    writes: Float[Tensor, "circuit writer prompt pos d_model"]
    patterns: tuple[Float[Tensor, "circuit prompt head query_pos key_pos"], ...]


@dataclass(frozen=True, eq=False)
class EdgeModel:
    """A host model that is run edge by edge; see :func:`edge_model`.

    Attributes:
        adapter: Adapter of the host model.
        universe: All edges of the model.
        query_keys: W_Q, b_Q, W_K and b_K of every block.
        points: Hook points by layer and by what passes there.
        whole_norms: Norms of the queries ("q") or keys ("k") of all heads together, by layer.
    """

    adapter: Adapter
    universe: EdgeUniverse
    query_keys: tuple[QueryKeyWeights, ...]
    points: dict[Read, nn.Module]
    whole_norms: dict[Read, nn.Module]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of sums over writers: the dtype of the model, at least float32."""
        return torch.promote_types(self.adapter.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.adapter.weights.unembed.W_U.device

    def group(self) -> int:
        """Number of query heads that share a key head."""
        attn = self.adapter.weights.blocks[0].attn
        return len(attn.W_O) // len(attn.W_V)

    def at_once(self, n_pos: int) -> int:
        """Number of sequences of ``n_pos`` tokens run at once, to write :data:`CHUNK` bytes."""
        weights = self.adapter.weights
        heads, width = weights.blocks[0].attn.W_O.shape[0], weights.unembed.W_U.shape[0]
        # Per position: about 4 copies of all writes, 12 of one layer's heads, logits, patterns.
        cells = width * (4 * len(self.universe.writers) + 12 * heads)
        cells += weights.unembed.W_U.shape[1] + len(weights.blocks) * heads * n_pos
        return max(1, CHUNK // (cells * n_pos * self.dtype.itemsize * self.group()))

    def run(
        self,
        ids: Int[Tensor, "prompt pos"],
        keep: Shaped[Tensor, "circuit reader writer"] | None = None,
        replacement: Writes | None = None,
        patterns: Sequence[Float[Tensor, "prompt head query_pos key_pos"]] | None = None,
        nudge: Float[Tensor, "reader writer"] | None = None,
        direction: Writes | None = None,
        embeddings: Float[Tensor, "prompt pos d_model"] | None = None,
    ) -> EdgeRun:
        """Run one forward pass of several circuits at once; without circuits, the host's own pass.

        Args:
            ids: Token ids of prompts of one length [prompt, pos].
            keep: Mask of the circuits [circuit, reader, writer]: 1 where an edge is live, 0 where
                it is replaced, or anything between. None for the whole model.
            replacement: What replaces the output of a writer on an edge that is not live; None for
                zero.
            patterns: Attention patterns to hold, one per layer; None for those of this pass.
            nudge: How much of ``direction`` is added on each edge [reader, writer]. With zeros that
                require a gradient, the gradient of a metric is the first-order effect of each edge.
            direction: What is added on an edge, by writer [writer, prompt, pos, d_model].
            embeddings: Replaces what enters the first block [prompt, pos, d_model].

        Returns:
            Logits, outputs of the writers, and patterns.
        """
        own = keep is None and nudge is None and patterns is None and embeddings is None
        flow = Flow(self, ids, keep, replacement, patterns, nudge, direction, embeddings, not own)
        tokens = ids.repeat(flow.copies * flow.circuits, *[1] * (ids.ndim - 1))
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a Bridge says how it computes norms
            for module, replace in flow.modules():
                stack.callback(input_replaced(module, replace).remove)
            for read, module in self.whole_norms.items() if flow.attends else ():
                stack.callback(
                    output_replaced(module, partial(flow.at_norm.pop, read, None)).remove
                )
            for handle in experts_apart(flow):
                stack.callback(handle.remove)
            stack.enter_context(hooked(flow.edits()))
            logits = self.adapter.run(tokens, self.adapter.all_real(tokens))  # steps 1 to 4
        logits = logits[:, None] if logits.ndim == 2 else logits  # a classifier's
        return EdgeRun(flow.cells(logits), flow.written(), tuple(flow.patterns))


@contextmanager
def edge_model(model: Any) -> Iterator[EdgeModel]:
    """Open a host model to be run edge by edge; flags that are changed are restored at the end.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.

    Yields:
        The model with its adapter, edges and hook points.

    Raises:
        ValueError: If the model carries hooks of the user's own, or autocast is on.
        UnsupportedArchitectureError: If the architecture cannot be frozen.
    """
    with unsplit(model):
        adapter = adapt(model)
        if hooks := adapter.foreign_hooks():
            raise ValueError(
                f"The model carries hooks of your own at {', '.join(hooks[:3])}, and an ablation "
                "rebuilds what they would edit. Remove them first: model.reset_hooks(), or "
                "remove() of torch's own handles."
            )
        no_autocast(adapter.weights.unembed.W_U.device.type)
        points = adapter.points(("q", "k", "pattern"))
        universe = EdgeUniverse(wiring_of(adapter.weights), adapter.sources)
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            own = query_key_weights(adapter)
            yield EdgeModel(adapter, universe, own, points, whole_norms(adapter))


class Flow:
    """One pass under way: what was written so far, and what each reader is given of it."""

    def __init__(
        self,
        model: EdgeModel,
        ids: Tensor,
        keep: Tensor | None,
        replacement: Tensor | None,
        held: Sequence[Tensor] | None,
        nudge: Tensor | None,
        direction: Tensor | None,
        embeddings: Tensor | None,
        rebuilt: bool,
    ):
        self.model, self.universe, self.rebuilt = model, model.universe, rebuilt
        self.keep = None if keep is None else keep.to(model.device, model.dtype)
        self.replacement, self.held, self.embeddings = replacement, held, embeddings
        self.nudge, self.direction = nudge, direction
        self.circuits, self.prompts = 1 if keep is None else len(keep), len(ids)
        self.n_pos = model.adapter.n_pos_of(ids)
        self.attends = rebuilt and held is None
        """Whether patterns are made of rebuilt queries and keys."""
        self.copies = model.group() if self.attends else 1
        self.writes: dict[int, Tensor] = {}
        """By the first writer's index: [circuit, writer, prompt, pos, d_model]."""
        self.constants: dict[int, Tensor] = {}
        """What no writer holds, by the first writer's index: [circuit, prompt, pos, d_model]."""
        self.pending: list[Callable[[], None]] = []
        self.scales: dict[Read, Tensor] = {}
        self.patterns: list[Tensor] = []
        self.at_norm: dict[Read, Tensor | None] = {}
        """Normalized queries and keys, which wait for the host's norm."""
        self.firsts: dict[Any, int] = {}
        for i, node in enumerate(self.universe.readers):
            self.firsts.setdefault((node.kind, node.layer, node.name), i)
        for i, node in enumerate(self.universe.writers):
            self.firsts.setdefault(("out", node.kind, node.layer), i)
        between = norms_between(model.adapter)
        self.residual_norms = {self.firsts[("out", *at)]: norm for at, norm in between.items()}
        if embeddings is not None:
            self.enter(embeddings)

    # --- Shapes

    def cells(self, tensor: Tensor) -> Tensor:
        """[copies · circuit · prompt, …] → [circuit, prompt, …], of the first copy."""
        count = self.circuits * self.prompts
        if len(tensor) == 1 and count > 1:
            tensor = tensor.expand(count, *tensor.shape[1:])  # positions are the same for all
        return tensor[:count].unflatten(0, (self.circuits, self.prompts))

    def handed(self, tensor: Tensor) -> Tensor:
        """[circuit, prompt, …] → [copies · circuit · prompt, …], as the host takes it."""
        tensor = tensor.flatten(0, 1).to(self.model.adapter.dtype)
        return tensor.repeat(self.copies, *[1] * (tensor.ndim - 1))

    # --- Hooks

    def edits(self) -> list[HookEdit]:
        """The hooks of this pass."""
        make: dict[str, Callable[[int], Callable[[Tensor], Tensor | None]]] = {
            "pattern": lambda layer: lambda tensor: self.see_pattern(tensor),
            "z": lambda layer: lambda tensor: self.mix(layer, tensor),
            "post": lambda layer: lambda tensor: self.see_post(layer, tensor),
            "ln1_post.scale": lambda layer: lambda t: self.see_scale(layer, "ln1_post", t),
            "ln2_post.scale": lambda layer: lambda t: self.see_scale(layer, "ln2_post", t),
        }
        if self.attends:
            for side in ("q", "k", "v"):
                make[side] = lambda layer, side=side: partial(self.attend, layer, side)
        found: list[HookEdit] = []
        for (layer, key), point in self.model.points.items():
            if (layer, key) == (0, "resid_pre") and self.embeddings is None:
                found.append((point, self.enter))
            elif layer is not None and key in make:
                found.append((point, make[key](layer)))
        return found

    def modules(self) -> Iterator[tuple[nn.Module, Callable[[], Tensor | None]]]:
        """Modules whose input is a reader's, and what gives it."""
        if not self.rebuilt:
            return
        adapter = self.model.adapter
        host, weights = adapter.model, adapter.weights
        for layer, (block, w) in enumerate(zip(host.blocks, weights.blocks, strict=True)):
            if w.mlp is not None and not isinstance(w.mlp, ExpertsWeights):
                norm = adapter.norm(block, "ln2") if w.ln2 is not None else None
                read = partial(self.one, ("mlp", layer, ""), norm)
                yield adapter.mlp_entry(block), read
        end = host.ln_final if weights.ln_final is not None else adapter.readout  # step 4
        # NanoChat norms its embeddings by the same module, before anything is written.
        yield end, lambda: self.one(("logits", None, ""), None) if self.writes else None

    # --- 3. Writers

    def enter(self, tensor: Tensor) -> None:
        self.writes[0] = self.cells(tensor)[:, None].to(self.model.dtype)

    def see_scale(self, layer: int, norm: str, tensor: Tensor) -> None:
        self.scales[layer, norm] = self.cells(tensor).to(self.model.dtype)

    def see_post(self, layer: int, tensor: Tensor) -> None:
        post = self.cells(tensor.view(-1, self.n_pos, tensor.shape[-1])).to(self.model.dtype)
        self.pending.append(lambda: self.write_mlp(layer, post))

    def write_mlp(self, layer: int, post: Tensor) -> None:
        block = self.model.adapter.weights.blocks[layer]
        if block.mlp is None or isinstance(block.mlp, ExpertsWeights):
            return  # experts write apart
        W, scale = block.mlp.W_out.to(post), self.scales.get((layer, "ln2_post"))
        written = post_normed(block.ln2_post, scale, post @ W)
        at = self.firsts["out", "mlp", layer]
        self.writes[at] = written[:, None]
        self.constant(at, block.mlp.b_out, block.ln2_post, scale, written)

    def constant(
        self,
        at: int,
        b: Tensor | None,
        norm: NormWeights | None,
        scale: Tensor | None,
        like: Tensor,
    ) -> None:
        whole = torch.zeros_like(like) if b is None else b.to(like).expand_as(like)
        self.constants[at] = post_normed(norm, scale, whole, b=True)

    def write_heads(self, layer: int, z: Tensor) -> None:
        block = self.model.adapter.weights.blocks[layer]
        scale = self.scales.get((layer, "ln1_post"))
        parts = torch.einsum("cbphe,hed->chbpd", z, block.attn.W_O.to(z))
        at, each = self.firsts["out", "head", layer], None if scale is None else scale[:, None]
        self.writes[at] = post_normed(block.ln1_post, each, parts)
        self.constant(at, block.attn.b_O, block.ln1_post, scale, parts[:, 0])

    def written(self) -> Tensor:
        """What every writer added: [circuit, writer, prompt, pos, d_model]."""
        self.settle()
        return torch.cat([self.writes[at] for at in sorted(self.writes)], 1)

    def settle(self) -> None:
        # A post-norm's scale comes after what it scales: parts are written when somebody reads.
        while self.pending:
            self.pending.pop(0)()

    # --- 1. Readers

    def read(self, key: tuple[str, int | None, str], n: int) -> Tensor:
        """The inputs of n readers from this key on: [circuit, reader, prompt, pos, d]."""
        self.settle()
        first = self.firsts[key]
        below, rows = self.universe.below[first], slice(first, first + n)
        x, seen = self.writes[0].new_zeros(()), []
        for at in sorted(at for at in self.writes if at < below):
            seen.append(at)
            if (norm := self.residual_norms.get(at)) is not None:
                x, seen = self.normed(norm, x + self.brought(seen, rows)), []
        x = x + self.brought(seen, rows) if seen else x
        return x.expand(-1, n, -1, -1, -1)

    def brought(self, seen: list[int], rows: slice) -> Tensor:
        """What neighbouring writers bring some readers: [circuit, reader, prompt, pos, d]."""
        # x_r = Σ_w keep · out_w + (1 − keep) · replacement_w, one matrix product for n readers.
        live = torch.cat([self.writes[at] for at in seen], 1)
        shape, own = live.shape[2:], slice(seen[0], seen[0] + live.shape[1])
        if self.keep is None:
            found = live.sum(1, keepdim=True)
        else:
            found = (keep := self.keep[:, rows, own]) @ live.flatten(2)
            if self.replacement is not None:
                found = found + (1 - keep) @ self.replacement[own].to(found).flatten(1)
            found = found.unflatten(2, shape)
        if self.nudge is not None and self.direction is not None:
            added = self.nudge[rows, own].to(found) @ self.direction[own].to(found).flatten(1)
            found = found + added.unflatten(1, shape)
        return sum((self.constants[at][:, None] for at in seen if at in self.constants), found)

    def normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        """The host's own norm on what was rebuilt."""
        if norm is None:
            return x
        flat = norm(x.flatten(0, 2).to(self.model.adapter.dtype))
        return flat.unflatten(0, x.shape[:3]).to(self.model.dtype)

    def heads(self, layer: int, name: str) -> Tensor:
        """The q, k or v inputs of all query heads, normed: [circuit, head, prompt, pos, d]."""
        adapter = self.model.adapter
        w, block = adapter.weights.blocks[layer], adapter.model.blocks[layer]
        norm = adapter.norm(block, "ln1") if w.ln1 is not None else None
        return self.normed(norm, self.read(("head", layer, name), len(w.attn.W_O)))

    def one(self, key: tuple[str, int | None, str], norm: nn.Module | None) -> Tensor:
        """What a single reader is handed."""
        return self.handed(self.normed(norm, self.read(key, 1))[:, 0])

    def attend(self, layer: int, side: str, tensor: Tensor) -> Tensor | None:
        """Give the host's attention its queries, keys or values: a hook at "q", "k" or "v"."""
        own, adapter = self.projected(layer, side), self.model.adapter
        if side == "q":
            own = self.handed(own)
        else:
            # [circuit, prompt, pos, head, e] → a copy per member of each group of query heads.
            own = own.unflatten(3, (-1, self.copies)).movedim(4, 0).flatten(0, 2).to(adapter.dtype)
        if (layer, side) not in self.model.whole_norms:
            return own.reshape(tensor.shape)
        self.at_norm[layer, side] = own
        return None

    def projected(self, layer: int, side: str) -> Tensor:
        """Queries, keys or values of every query head [circuit, prompt, pos, head, e]."""
        W_Q, b_Q, W_K, b_K = self.model.query_keys[layer]
        attn = self.model.adapter.weights.blocks[layer].attn
        W, b = {"q": (W_Q, b_Q), "k": (W_K, b_K), "v": (attn.W_V, attn.b_V)}[side]
        of = [*range(len(W))] if side == "q" else self.kv_of(layer)
        x, norm = self.heads(layer, side), self.model.whole_norms.get((layer, side))
        if norm is None:
            return _projected(x, W[of], None if b is None else b[of])
        found = []
        for head, own in enumerate(of):  # the input of this head, through all heads' weights
            y = _projected(x[:, head, None].expand(-1, len(W), -1, -1, -1), W, b)
            y = self.normed(norm, y.flatten(-2)[:, None])[:, 0].unflatten(-1, W.shape[::2])
            found.append(y[..., own, :])
        return torch.stack(found, 3)

    def kv_of(self, layer: int) -> list[int]:
        attn = self.model.adapter.weights.blocks[layer].attn
        return [h * len(attn.W_V) // len(attn.W_O) for h in range(len(attn.W_O))]

    def own(self, tensor: Tensor, heads: int) -> Tensor:
        """What each query head made of its own key and value; heads are axis ``heads``."""
        each = tensor.unflatten(0, (self.copies, self.circuits, self.prompts))
        if self.copies == 1:
            return each[0]
        # Query head h read its own key in copy h mod g only.
        each = each.movedim(heads + 3, 1)
        head = torch.arange(each.shape[1], device=tensor.device)
        return each[head % self.copies, head].movedim(0, heads + 2)

    def see_pattern(self, tensor: Tensor) -> None:
        if self.held is None:
            self.patterns.append(self.own(tensor, 0))
            return
        self.patterns.append(self.held[len(self.patterns)].expand(self.circuits, -1, -1, -1, -1))

    def mix(self, layer: int, tensor: Tensor) -> Tensor | None:
        heads, width = self.model.adapter.weights.blocks[layer].attn.W_O.shape[:2]
        if self.held is None:
            z = self.own(tensor.reshape(*tensor.shape[:2], heads, width), 1)
        else:
            A = self.held[layer].to(self.model.dtype)
            z = torch.einsum("bhqk,cbkhe->cbqhe", A, self.projected(layer, "v"))
        z = z.to(self.model.dtype)
        self.pending.append(lambda: self.write_heads(layer, z))
        unchanged = self.held is None and self.copies == 1
        return None if unchanged else self.handed(z).reshape(tensor.shape)


def _projected(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """[circuit, head, prompt, pos, d] → [circuit, prompt, pos, head, e]."""
    found = torch.einsum("chbpd,hde->cbphe", x, W.to(x))
    return found if b is None else found + b.to(x)
