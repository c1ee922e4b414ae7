"""The real model with the input of every reader rebuilt, edge by edge.

A reader r (the q, k or v input of a query head, an MLP, the final norm) is given, in place of the
residual,

    x_r = Σ_w  keep[r, w] · out_w  +  (1 − keep[r, w]) · replacement_w  +  constants

with out_w what writer w adds in this very pass, replacement_w what replaces it (its output in a
corrupted run, a mean, 0), and constants what no writer holds (b_O, b_out, through the live
post-norm). The host computes all that is not linear in x_r: its own norm modules run on x_r; its
own attention rotates, normalizes, caps and masks the q and k that it is given; its own MLP and
final norm run on their rebuilt inputs. Only W_Q, W_K, W_V, W_O and W_out are applied here. Nobody
reads the residual that the host itself carries along.

Values are per query head: z_h = A_h v_h with v_h = N(x_{h.v}) W_V^{kv(h)} overwrites the host's z.
Where g query heads share a key, the batch is run in g copies. Copy i carries, for every key head,
the key of its i-th query head; of its patterns, those of these query heads are taken.

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
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ..checks import no_autocast
from ..hosts import (
    Adapter,
    QueryKeyWeights,
    Read,
    UnsupportedArchitectureError,
    adapt,
    in_this_thread,
)
from ..maps import NormWeights
from ..recording import Edit, hooked, unsplit
from .edge_masks import EdgeUniverse, wiring_of

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
    """

    adapter: Adapter
    universe: EdgeUniverse
    query_keys: tuple[QueryKeyWeights, ...]
    points: dict[Read, nn.Module]

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
        w = self.adapter.weights.blocks[0].attn
        return w.W_O.shape[0] // w.W_V.shape[0]

    def at_once(self, n_pos: int) -> int:
        """Number of sequences of ``n_pos`` tokens run at once, to write :data:`CHUNK` bytes."""
        weights = self.adapter.weights
        heads, width = weights.blocks[0].attn.W_O.shape[0], weights.unembed.W_U.shape[0]
        # Per position: about 4 copies of all writes, 12 of one layer's heads, logits, patterns.
        cells = width * (4 * len(self.universe.writers) + 12 * heads)
        cells += weights.unembed.W_U.shape[1] + len(weights.blocks) * heads * n_pos
        cells *= n_pos
        return max(1, CHUNK // (cells * self.dtype.itemsize * self.group()))

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
        flow = _Flow(self, ids, keep, replacement, patterns, nudge, direction, embeddings, not own)
        tokens = ids.repeat(flow.copies * flow.circuits, 1)
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a Bridge says how it computes norms
            for module, replace in flow.modules():
                stack.callback(_before(module, replace).remove)
            stack.enter_context(hooked(flow.edits()))
            logits = self.adapter.run(tokens, self.adapter.all_real(tokens))
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
        UnsupportedArchitectureError: If the architecture cannot be run edge by edge.
    """
    with unsplit(model):
        adapter = adapt(model)
        if adapter.attends_apart:
            raise UnsupportedArchitectureError(
                f"{adapter.name} cannot be run edge by edge, as its host shows an attention "
                "pattern only after the layer has used it. Rank edges with lens.discover(..., "
                "qk=False), or load the model as a HookedTransformer."
            )
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
            yield EdgeModel(adapter, universe, adapter.query_key_weights(), points)


def _before(module: nn.Module, replace: Callable[[], Tensor]) -> Any:
    """Add a hook that gives a module another input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (replace(), *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): replace()}

    return module.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True)


def _scaled(w: NormWeights | None, scale: Tensor | None, x: Tensor, b: bool = False) -> Tensor:
    """Apply a post-norm to one part x of its input, at the scale of the whole; with b if asked."""
    if w is None or scale is None:
        return x
    x = x - x.mean(-1, keepdim=True) if w.center else x
    x = x / scale
    x = x if w.gain is None else x * w.gain.to(x)
    return x + w.b.to(x) if b and w.b is not None else x


class _Flow:
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
        self.copies = model.group() if rebuilt and held is None else 1
        self.writes: dict[int, Tensor] = {}
        """By the first writer's index: [circuit, writer, prompt, pos, d_model]."""
        self.constants: dict[int, Tensor] = {}
        """What no writer holds, by the first writer's index: [circuit, prompt, pos, d_model]."""
        self.pending: list[Callable[[], None]] = []
        self.scales: dict[Read, Tensor] = {}
        self.patterns: list[Tensor] = []
        self.firsts: dict[Any, int] = {}
        for i, node in enumerate(self.universe.readers):
            self.firsts.setdefault((node.kind, node.layer, node.name), i)
        for i, node in enumerate(self.universe.writers):
            self.firsts.setdefault(("out", node.kind, node.layer), i)
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

    def edits(self) -> list[Edit]:
        """The hooks of this pass."""
        make: dict[str, Callable[[int], Callable[[Tensor], Tensor | None]]] = {
            "pattern": lambda layer: lambda tensor: self.see_pattern(tensor),
            "z": lambda layer: lambda tensor: self.mix(layer, tensor),
            "post": lambda layer: lambda tensor: self.see_post(layer, tensor),
            "ln1_post.scale": lambda layer: lambda t: self.see_scale(layer, "ln1_post", t),
            "ln2_post.scale": lambda layer: lambda t: self.see_scale(layer, "ln2_post", t),
        }
        if self.rebuilt and self.held is None:
            make["q"] = lambda layer: lambda tensor: self.queries(layer, tensor)
            make["k"] = lambda layer: lambda tensor: self.keys(layer, tensor)
        found: list[Edit] = []
        for (layer, key), point in self.model.points.items():
            if (layer, key) == (0, "resid_pre") and self.embeddings is None:
                found.append((point, self.enter))
            elif layer is not None and key in make:
                found.append((point, make[key](layer)))
        return found

    def modules(self) -> Iterator[tuple[nn.Module, Callable[[], Tensor]]]:
        """Modules whose input is a reader's, and what gives it."""
        if not self.rebuilt:
            return
        adapter = self.model.adapter
        host, weights = adapter.model, adapter.weights
        for layer, (block, w) in enumerate(zip(host.blocks, weights.blocks, strict=True)):
            if w.mlp is not None:
                norm = adapter.norm(block, "ln2") if w.ln2 is not None else None
                read = lambda layer=layer, norm=norm: self.one(("mlp", layer, ""), norm)  # noqa: E731
                yield block.mlp, read
        end = host.ln_final if weights.ln_final is not None else host.unembed
        yield end, lambda: self.one(("logits", None, ""), None)

    # --- Writers

    def enter(self, tensor: Tensor) -> None:
        self.writes[0] = self.cells(tensor)[:, None].to(self.model.dtype)

    def see_scale(self, layer: int, norm: str, tensor: Tensor) -> None:
        self.scales[layer, norm] = self.cells(tensor).to(self.model.dtype)

    def see_post(self, layer: int, tensor: Tensor) -> None:
        post = self.cells(tensor).to(self.model.dtype)
        self.pending.append(lambda: self.write_mlp(layer, post))

    def write_mlp(self, layer: int, post: Tensor) -> None:
        block = self.model.adapter.weights.blocks[layer]
        if block.mlp is None:
            return
        W, scale = block.mlp.W_out.to(post), self.scales.get((layer, "ln2_post"))
        written = _scaled(block.ln2_post, scale, post @ W)
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
        self.constants[at] = _scaled(norm, scale, whole, b=True)

    def write_heads(self, layer: int, z: Tensor) -> None:
        block = self.model.adapter.weights.blocks[layer]
        scale = self.scales.get((layer, "ln1_post"))
        parts = torch.einsum("cbphe,hed->chbpd", z, block.attn.W_O.to(z))
        each = None if scale is None else scale[:, None]
        at = self.firsts["out", "head", layer]
        self.writes[at] = _scaled(block.ln1_post, each, parts)
        self.constant(at, block.attn.b_O, block.ln1_post, scale, parts[:, 0])

    def written(self) -> Tensor:
        """What every writer added: [circuit, writer, prompt, pos, d_model]."""
        self.settle()
        return torch.cat([self.writes[at] for at in sorted(self.writes)], 1)

    def settle(self) -> None:
        # A post-norm's scale comes after what it scales: parts are written when somebody reads.
        while self.pending:
            self.pending.pop(0)()

    # --- Readers

    def read(self, key: tuple[str, int | None, str], n: int) -> Tensor:
        """The inputs of n readers from this key on: [circuit, reader, prompt, pos, d]."""
        self.settle()
        first = self.firsts[key]
        below, rows = self.universe.below[first], slice(first, first + n)
        seen = [at for at in sorted(self.writes) if at < below]
        # x_r = Σ_w keep · out_w + (1 − keep) · replacement_w, one matrix product for n readers.
        live = torch.cat([self.writes[at] for at in seen], 1)
        shape = live.shape[2:]
        if self.keep is None:
            x = live.sum(1, keepdim=True)
        else:
            keep = self.keep[:, rows, :below]
            x = keep @ live.flatten(2)
            if self.replacement is not None:
                x = x + (1 - keep) @ self.replacement[:below].to(x).flatten(1)
            x = x.unflatten(2, shape)
        if self.nudge is not None and self.direction is not None:
            added = self.nudge[rows, :below].to(x) @ self.direction[:below].to(x).flatten(1)
            x = x + added.unflatten(1, shape)
        for at in seen:
            if at in self.constants:
                x = x + self.constants[at][:, None]
        return x.expand(-1, n, *shape)

    def normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        """The host's own norm on what was rebuilt."""
        if norm is None:
            return x
        flat = norm(x.flatten(0, 2).to(self.model.adapter.dtype))
        return flat.unflatten(0, x.shape[:3]).to(self.model.dtype)

    def heads(self, layer: int, name: str) -> Tensor:
        """The q, k or v inputs of all query heads, normed: [circuit, head, prompt, pos, d]."""
        adapter = self.model.adapter
        block = adapter.weights.blocks[layer]
        norm = adapter.norm(adapter.model.blocks[layer], "ln1") if block.ln1 is not None else None
        return self.normed(norm, self.read(("head", layer, name), block.attn.W_O.shape[0]))

    def one(self, key: tuple[str, int | None, str], norm: nn.Module | None) -> Tensor:
        """What a single reader is handed."""
        return self.handed(self.normed(norm, self.read(key, 1))[:, 0])

    def queries(self, layer: int, tensor: Tensor) -> Tensor:
        W_Q, b_Q, *_ = self.model.query_keys[layer]
        q = _projected(self.heads(layer, "q"), W_Q, b_Q)
        return self.handed(q).reshape(tensor.shape)

    def keys(self, layer: int, tensor: Tensor) -> Tensor:
        kv_of, (_, _, W_K, b_K) = self.kv_of(layer), self.model.query_keys[layer]
        b_K = None if b_K is None else b_K[kv_of]
        k = _projected(self.heads(layer, "k"), W_K[kv_of], b_K)
        # [circuit, prompt, pos, head, e] → a copy per member of each group of query heads.
        k = k.unflatten(3, (-1, self.copies)).movedim(4, 0).flatten(0, 2)
        return k.to(self.model.adapter.dtype).reshape(tensor.shape)

    def kv_of(self, layer: int) -> list[int]:
        w = self.model.adapter.weights.blocks[layer].attn
        heads, kv_heads = w.W_O.shape[0], w.W_V.shape[0]
        return [h * kv_heads // heads for h in range(heads)]

    def see_pattern(self, tensor: Tensor) -> None:
        if self.held is not None:
            held = self.held[len(self.patterns)]
            self.patterns.append(held.expand(self.circuits, *held.shape))
            return
        each = tensor.unflatten(0, (self.copies, self.circuits, self.prompts))
        # Query head h read its own key in copy h mod g only.
        head = torch.arange(each.shape[3], device=tensor.device)
        each = each[head % self.copies, :, :, head].movedim(0, 2) if self.copies > 1 else each[0]
        self.patterns.append(each)

    def mix(self, layer: int, tensor: Tensor) -> Tensor | None:
        w = self.model.adapter.weights.blocks[layer].attn
        shape = (self.circuits, self.prompts, -1, *w.W_O.shape[:2])
        if not self.rebuilt:
            z = self.cells(tensor).reshape(shape).to(self.model.dtype)
            self.pending.append(lambda: self.write_heads(layer, z))
            return None
        kv_of = self.kv_of(layer)
        # z_h = A_h v_h, per query head, as each head has a value input of its own.
        b_V = None if w.b_V is None else w.b_V[kv_of]
        v = _projected(self.heads(layer, "v"), w.W_V[kv_of], b_V)
        z = torch.einsum("cbhqk,cbkhe->cbqhe", self.patterns[layer].to(v), v)
        self.pending.append(lambda: self.write_heads(layer, z))
        return self.handed(z).reshape(tensor.shape)


def _projected(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """[circuit, head, prompt, pos, d] → [circuit, prompt, pos, head, e]."""
    found = torch.einsum("chbpd,hde->cbphe", x, W.to(x))
    return found if b is None else found + b.to(x)
