"""The real model with every reader's input rebuilt, edge by edge.

A reader r (a query head's q, k or v input, an MLP, the final norm) is given, in place of the residual,

    x_r = Σ_w  keep[r, w] · out_w  +  (1 − keep[r, w]) · other_w  +  constants

with out_w what writer w adds in this very pass, other_w what stands in for it (what it adds in a
corrupted run, a mean, 0), and constants what no writer holds (b_O, b_out, through the live post-norm).
The host computes all that is not linear in x_r: its own norm modules run on x_r; its own attention
rotates, normalizes, caps and masks the q and k that it is handed; its own MLP and final norm run on
theirs. Only W_Q, W_K, W_V, W_O and W_out are applied here. The residual the host itself carries along
is read by nobody.

Values are per query head: z_h = A_h v_h with v_h = N(x_{h.v}) W_V^{kv(h)} overwrites the host's z. Where
g query heads share a key, the batch is run in g copies: copy i carries, for every key head, the key of
its i-th query head, and of each copy's patterns those of its own query heads are taken.
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
    Edit,
    Layout,
    Read,
    UnsupportedArchitectureError,
    adapt,
    hooked,
    query_key_weights,
)
from ..sublayers import NormWeights
from .edge_masks import EdgeUniverse, wiring_of

Writes = Float[Tensor, "writer prompt pos d_model"]
CHUNK = 2**28
"""Bytes that the writers' outputs of one pass may take, about."""
_FLAGS = ("use_split_qkv_input", "use_attn_in", "ungroup_grouped_query_attention")


@dataclass(frozen=True, eq=False)
class EdgeRun:
    """What one pass left.

    Attributes:
        logits: The host's, by circuit.
        writes: What every writer added, by circuit.
        patterns: Every layer's attention pattern, by circuit.
    """

    logits: Float[Tensor, "circuit prompt pos d_vocab"]
    writes: Float[Tensor, "circuit writer prompt pos d_model"]
    patterns: tuple[Float[Tensor, "circuit prompt head query_pos key_pos"], ...]


@dataclass(frozen=True, eq=False)
class EdgeModel:
    """A host model to be run edge by edge; see :func:`edge_model`.

    Attributes:
        adapter: The host's.
        universe: Its edges.
        query_keys: W_Q, b_Q, W_K and b_K of every block.
        points: Hook points by what passes there.
    """

    adapter: Adapter
    universe: EdgeUniverse
    query_keys: tuple[Layout, ...]
    points: dict[Read, nn.Module]

    @cached_property
    def dtype(self) -> torch.dtype:
        """What sums over writers are computed in: the model's dtype, float32 at least."""
        return torch.promote_types(self.adapter.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.adapter.weights.unembed.W_U.device

    def group(self) -> int:
        """How many query heads share a key."""
        w = self.adapter.weights.blocks[0].attn
        return w.W_O.shape[0] // w.W_V.shape[0]

    def at_once(self, n_pos: int) -> int:
        """How many sequences of a length are run at once, so that :data:`CHUNK` holds what they write."""
        weights = self.adapter.weights
        heads, width = weights.blocks[0].attn.W_O.shape[0], weights.unembed.W_U.shape[0]
        cells = width * (4 * len(self.universe.writers) + 12 * heads) + int(
            self.adapter.cfg.d_vocab
        )
        cells = n_pos * (cells + len(weights.blocks) * heads * n_pos)
        return max(1, CHUNK // (cells * self.dtype.itemsize * self.group()))

    def run(
        self,
        ids: Int[Tensor, "prompt pos"],
        keep: Shaped[Tensor, "circuit reader writer"] | None = None,
        other: Writes | None = None,
        patterns: Sequence[Float[Tensor, "prompt head query_pos key_pos"]] | None = None,
        nudge: Float[Tensor, "reader writer"] | None = None,
        direction: Writes | None = None,
        embeddings: Float[Tensor, "prompt pos d_model"] | None = None,
    ) -> EdgeRun:
        """One forward pass, of several circuits at once. Without circuits it is the host's own.

        Args:
            ids: Tokens of prompts of one length.
            keep: 1 where an edge is live, 0 where it is replaced, and anything between.
            other: What stands in for each writer; zero if there is none.
            patterns: Attention patterns to hold; by default they are the pass's own.
            nudge: How much of ``direction`` is added on each edge: zeros that require a gradient
                make the metric's gradient the first-order effect of every edge.
            direction: What is added, writer by writer.
            embeddings: What stands in for the input's own output: token and position embeddings.

        Returns:
            Logits, what was written, patterns.
        """
        own = keep is None and nudge is None and patterns is None and embeddings is None
        flow = _Flow(self, ids, keep, other, patterns, nudge, direction, embeddings, not own)
        tokens = ids.repeat(flow.copies * flow.circuits, 1)
        kwargs = {}
        if self.adapter.mask(tokens, {}) is not None:  # a host that would mask pad ids
            kwargs["attention_mask"] = torch.ones_like(tokens)
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a Bridge says how it computes norms
            for module, replace in flow.modules():
                stack.callback(_before(module, replace).remove)
            stack.enter_context(hooked(flow.edits()))
            logits = self.adapter.run(tokens, kwargs)
        return EdgeRun(flow.cells(logits), flow.written(), tuple(flow.patterns))


@contextmanager
def edge_model(model: Any) -> Iterator[EdgeModel]:
    """A host model to be run edge by edge; its flags are set for that, and restored.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.

    Yields:
        The model.

    Raises:
        ValueError: If it carries hooks of the user's own, or autocast is on.
        UnsupportedArchitectureError: If it cannot be served.
    """
    flags = [flag for flag in _FLAGS if getattr(getattr(model, "cfg", None), flag, False)]
    try:
        for flag in flags:
            getattr(model, f"set_{flag}")(False)
        adapter = adapt(model)
        if adapter.attends_apart:
            raise UnsupportedArchitectureError(
                f"{adapter.name} cannot be run edge by edge: its host shows a layer's attention pattern "
                "only when the layer is done with it; rank edges by the operator, "
                "lens.discover(..., qk=False), or use a HookedTransformer"
            )
        if hooks := adapter.foreign_hooks():
            raise ValueError(
                f"the model carries hooks of your own at {', '.join(hooks[:3])}, expected none: an "
                "ablation rebuilds what they would edit. Take them off first (model.reset_hooks(), or remove() "
                "of torch's own)"
            )
        no_autocast(adapter.weights.unembed.W_U.device.type)
        points = adapter.points(("q", "k", "pattern"))
        universe = EdgeUniverse(wiring_of(adapter.weights), (None, "pos_embed") in points)
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            yield EdgeModel(adapter, universe, query_key_weights(adapter), points)
    finally:
        for flag in flags:
            getattr(model, f"set_{flag}")(True)


def _before(module: nn.Module, replace: Callable[[], Tensor]) -> Any:
    """A hook that gives a module another input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (replace(), *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): replace()}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _scaled(w: NormWeights | None, scale: Tensor | None, x: Tensor, b: bool = False) -> Tensor:
    """A part of what a post-norm normed: its live scale on x; the norm's own b, if asked for."""
    if w is None or scale is None:
        return x
    x = x - x.mean(-1, keepdim=True) if w.center else x
    x = x / scale
    x = x if w.gain is None else x * w.gain.to(x)
    return x + w.b.to(x) if b and w.b is not None else x


class _Flow:
    """One pass under way: what was written so far, and what each reader is given of it."""

    def __init__(self, model: EdgeModel, ids: Tensor, keep: Tensor | None, other: Tensor | None,
                 held: Sequence[Tensor] | None, nudge: Tensor | None, direction: Tensor | None,
                 embeddings: Tensor | None, rebuilt: bool):  # fmt: skip
        self.model, self.universe, self.rebuilt = model, model.universe, rebuilt
        self.keep = None if keep is None else keep.to(model.device, model.dtype)
        self.other, self.held, self.embeddings = other, held, embeddings
        self.nudge, self.direction = nudge, direction
        self.circuits, self.prompts = 1 if keep is None else len(keep), len(ids)
        self.copies = model.group() if rebuilt and held is None else 1
        self.writes: dict[int, Tensor] = {}
        """By the first writer's index: [circuit, writer, prompt, pos, d_model]."""
        self.constants: dict[int, Tensor] = {}
        """What no writer holds, by the index of the writers it came with: [circuit, prompt, pos, d_model]."""
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
            if layer is None and key in ("embed", "pos_embed") and self.embeddings is None:
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
        part = self.cells(tensor)[:, None].to(self.model.dtype)
        self.writes[0] = self.writes[0] + part if self.writes else part

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

    def constant(self, at: int, b: Tensor | None, norm: NormWeights | None, scale: Tensor | None,
                 like: Tensor) -> None:  # fmt: skip
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
        """The inputs of n readers, the first of which has this key: [circuit, reader, prompt, pos, d]."""
        self.settle()
        first = self.firsts[key]
        below, rows = self.universe.below[first], slice(first, first + n)
        seen = [at for at in sorted(self.writes) if at < below]
        live = torch.cat([self.writes[at] for at in seen], 1)
        shape = live.shape[2:]
        if self.keep is None:
            x = live.sum(1, keepdim=True)
        else:
            keep = self.keep[:, rows, :below]
            x = keep @ live.flatten(2)
            if self.other is not None:
                x = x + (1 - keep) @ self.other[:below].to(x).flatten(1)
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
        """What every query head's q, k or v input is, after the norm: [circuit, head, prompt, pos, d]."""
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
        b_V = None if w.b_V is None else w.b_V[kv_of]
        v = _projected(self.heads(layer, "v"), w.W_V[kv_of], b_V)
        z = torch.einsum("cbhqk,cbkhe->cbqhe", self.patterns[layer].to(v), v)
        self.pending.append(lambda: self.write_heads(layer, z))
        return self.handed(z).reshape(tensor.shape)


def _projected(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """[circuit, head, prompt, pos, d] → [circuit, prompt, pos, head, e]."""
    found = torch.einsum("chbpd,hde->cbphe", x, W.to(x))
    return found if b is None else found + b.to(x)
