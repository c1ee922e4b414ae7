"""One forward pass, frozen and checked.

The recorder listens at the adapter's hook points, and when a block has passed it

1. turns what it read into frozen sublayers (pattern, scales, gating ratios; weights by reference),
2. checks every product the operator will use against the run's own activations (``selfcheck``),
3. forgets values, z and post-activations.

A transposed, swapped or renamed weight is therefore an error at capture, never a wrong figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .adapters import Adapter, Read
from .linear_map import Frame
from .primitives import Norm, gating_ratio, soft_cap_ratio
from .prompts import Prompts
from .selfcheck import SelfCheck
from .sublayers import MLP, Attention, GatedMLP, Sublayer, Unembed
from .weights import BlockWeights, GatedMLPWeights, MLPWeights, NormWeights

GATES = ("gate", "up", "half")


@dataclass(frozen=True)
class Convention:
    """Choices under which the operator is unique; recorded in every result.

    Attributes:
        gate: How the product act(g) ⊙ u of a gated MLP is made linear: "gate" freezes act(g) and is
            linear in u, "up" freezes u and is linear in g, "half" takes half of each.
    """

    gate: str = "gate"

    def __post_init__(self):
        if self.gate not in GATES:
            raise ValueError(f"expected gate to be one of {', '.join(GATES)}, got {self.gate!r}")


@dataclass(frozen=True, eq=False)
class FrozenBlock:
    """A block's frozen sublayers, and the residual states that the run had before each.

    There is no ``resid_mid`` in a parallel or attention-only block.
    """

    resid_pre: Float[Tensor, "batch pos d_model"]
    resid_mid: Float[Tensor, "batch pos d_model"] | None
    attn: Attention
    mlp: Sublayer | None
    ln1: Norm | None
    ln2: Norm | None
    ln1_post: Norm | None
    ln2_post: Norm | None


@dataclass(frozen=True, eq=False)
class Capture:
    """Everything one run left: frozen sublayers, residual states, logits. No host, no hooks.

    Attributes:
        model_name: For people.
        frame: Prompts, positions, dtype, device.
        prompts: Tokens, spans, strings.
        embed: Token embeddings [batch, pos, d_model], as they entered the residual.
        pos_embed: Position embeddings, or None.
        blocks: The frozen blocks.
        resid_final: The residual after the last block.
        ln_final: The final norm, or None.
        unembed: The readout.
        logits: The model's own logits, in its own dtype.
        convention: The choices made.
        checks: Relative error of every checked product, by name.
        tokenizer: The host's, or None.
    """

    model_name: str
    frame: Frame
    prompts: Prompts
    embed: Float[Tensor, "batch pos d_model"]
    pos_embed: Float[Tensor, "batch pos d_model"] | None
    blocks: tuple[FrozenBlock, ...]
    resid_final: Float[Tensor, "batch pos d_model"]
    ln_final: Norm | None
    unembed: Unembed
    logits: Float[Tensor, "batch pos d_vocab"]
    convention: Convention
    checks: Mapping[str, float]
    tokenizer: Any = field(repr=False, default=None)

    @property
    def check(self) -> float:
        """The largest relative error of the self-check."""
        return max(self.checks.values())

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return self.blocks[0].attn.pattern.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of what the capture alone keeps alive: no weights, no logits."""
        tensors = [self.embed, self.pos_embed, self.resid_final]
        for block in self.blocks:
            norms = (block.ln1, block.ln2, block.ln1_post, block.ln2_post)
            tensors += [block.resid_pre, block.resid_mid, block.attn.pattern]
            tensors += [norm.scale for norm in norms if norm is not None]
            for name in ("ratio", "on_up", "on_gate", "ln_scale"):
                tensors.append(getattr(block.mlp, name, None))
        storages = {t.untyped_storage().data_ptr(): t for t in tensors if t is not None}
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    def prompt(self, index: int) -> Capture:
        """One prompt of the batch, its padding left out: exact, as real tokens never read padding."""
        start, stop = self.frame.spans[index]
        frame = replace(self.frame, spans=((0, stop - start),), n_pos=stop - start)
        one, pos = slice(index, index + 1), slice(start, stop)
        prompts = Prompts(
            self.prompts.tokens[one, pos], frame.spans, (self.prompts.strings[index],)
        )

        def cut(value: Any, name: str = "") -> Any:
            if isinstance(value, Frame):
                return frame
            if isinstance(value, Tensor):
                return value[one, :, pos, pos] if name == "pattern" else value[one, pos]
            if isinstance(value, FrozenBlock | Attention | MLP | GatedMLP | Norm | Unembed):
                parts = {
                    f.name: getattr(value, f.name) for f in fields(value) if f.name != "weights"
                }
                return replace(value, **{name: cut(part, name) for name, part in parts.items()})
            return tuple(cut(v) for v in value) if isinstance(value, tuple) else value

        names = ("embed", "pos_embed", "blocks", "resid_final", "ln_final", "unembed", "logits")
        pieces = {name: cut(getattr(self, name)) for name in names}
        return replace(self, frame=frame, prompts=prompts, **pieces)

    def with_convention(self, convention: Convention) -> Capture:
        """The same run under another convention; nothing is run again."""
        blocks = tuple(
            replace(block, mlp=replace(block.mlp, convention=convention.gate))
            if isinstance(block.mlp, GatedMLP)
            else block
            for block in self.blocks
        )
        return replace(self, blocks=blocks, convention=convention)


# --- Recording -----------------------------------------------------------------------------------


class Recorder:
    """Listens to one forward pass and freezes block after block."""

    def __init__(self, adapter: Adapter, prompts: Prompts, frame: Frame, convention: Convention):
        self.adapter, self.prompts, self.frame, self.convention = (
            adapter,
            prompts,
            frame,
            convention,
        )
        self.check = SelfCheck(adapter.model, frame, adapter.dtype)
        self.reads: dict[Read, Tensor] = {}
        self.blocks: list[FrozenBlock] = []
        self.padded = any(span != (0, frame.n_pos) for span in frame.spans)
        self.state: Tensor | None = None

    def listen(self, read: Read) -> Callable[..., None]:
        """A forward hook that stores one activation, and freezes a block when it was the last."""
        layer, key = read

        def hook(module: Any, args: Any, output: Tensor) -> None:
            self.reads[read] = self._clean(self.frame.cast(output), 2 if key == "pattern" else 1)
            if key == "resid_post" and layer is not None:
                self.freeze_block(layer)

        return hook

    def _clean(self, tensor: Tensor, pos_axis: int) -> Tensor:
        # Padding rows may hold NaN (a softmax over nothing): they are nobody's, and become 0.
        if not self.padded or bool(tensor.isfinite().all()):
            return tensor
        real = self.frame.real[:, None, :, None] if pos_axis == 2 else self.frame.real
        real = real.reshape(*real.shape, *[1] * (tensor.ndim - real.ndim))
        return torch.where(real, tensor, 0)

    def take(self, layer: int | None, key: str) -> Tensor:
        """An activation that was read; each is taken once.

        Returns:
            The activation, in the compute dtype.

        Raises:
            ValueError: If its hook never fired.
        """
        try:
            return self.reads.pop((layer, key))
        except KeyError:
            remedy = "load the model with attn_implementation='eager'" if key == "pattern" else (
                "the host ran something else than its blocks"
            )  # fmt: skip
            where = "the model" if layer is None else f"block {layer}"
            raise ValueError(f"the hook for {key} of {where} never fired: {remedy}") from None

    def norm(self, layer: int | None, key: str, weights: NormWeights | None) -> Norm | None:
        """A frozen norm, or None where the model has none."""
        if weights is None:
            return None
        name = key if layer is None else f"L{layer}.{key}"
        scale = self.take(layer, f"{key}.scale")
        return Norm(self.frame, name, scale, weights, self.adapter.cfg.d_model)

    def freeze_block(self, layer: int) -> None:
        """Freeze and check one block from what was read of it."""
        weights: BlockWeights = self.adapter.weights.blocks[layer]
        before, after = self.take(layer, "resid_pre"), self.take(layer, "resid_post")
        if layer == 0:
            self._check_embedding(before)
        else:
            before = self._check_passed(layer, before)
        self.state = after
        ln1 = self.norm(layer, "ln1", weights.ln1)
        ln1_post = self.norm(layer, "ln1_post", weights.ln1_post)
        ln2 = self.norm(layer, "ln2", weights.ln2)
        ln2_post = self.norm(layer, "ln2_post", weights.ln2_post)

        name, pattern = f"L{layer} attention", self.take(layer, "pattern")
        attn = Attention(self.frame, layer, pattern, weights.attn)
        added = self.check.attention(ln1, before, pattern, weights.attn, ln1_post)
        v, z = self.take(layer, "v").flatten(2), self.take(layer, "z").flatten(2)
        self.check.suspect(
            f"{name} values (W_V, b_V)", v, lambda: attn.values(_normed(ln1, before))
        )
        self.check.suspect(f"{name} mixing (pattern · values)", z, lambda: attn.mixed(v))
        mid, mlp = None, None
        if weights.mlp is None:
            self.check.residual(f"{name} output (W_O, b_O)", before, after, added)
        elif weights.parallel:
            mlp, mlp_added = self.freeze_mlp(layer, weights.mlp, ln2, ln2_post, before)
            label = f"L{layer} attention and MLP output (W_O, b_O, W_out, b_out)"
            self.check.residual(label, before, after, added + mlp_added)
        else:
            mid = self.take(layer, "resid_mid")
            self.check.residual(f"{name} output (W_O, b_O)", before, mid, added)
            mlp, added = self.freeze_mlp(layer, weights.mlp, ln2, ln2_post, mid)
            self.check.residual(f"L{layer} MLP output (W_out, b_out)", mid, after, added)
        self.check.settle(self.adapter.foreign_hooks)
        self.blocks.append(FrozenBlock(before, mid, attn, mlp, ln1, ln2, ln1_post, ln2_post))

    def freeze_mlp(
        self,
        layer: int,
        w: MLPWeights | GatedMLPWeights,
        norm: Norm | None,
        post_norm: Norm | None,
        x: Tensor,
    ) -> tuple[Sublayer, Tensor]:
        """The frozen MLP, and the projection of what the frozen MLP would add.

        That projection is of the *predicted* post-activations: compared with what the residual
        gained, it proves activation and W_out at once. The run's own post-activations are looked
        at only to tell the two apart when that fails.

        Returns:
            The MLP, and the projection.
        """
        name, check = f"L{layer} MLP", self.check
        pre, seen = self.take(layer, "pre"), self.take(layer, "post")
        ratio = gating_ratio(w.act, pre)
        if isinstance(w, GatedMLPWeights):
            up = self.take(layer, "pre_linear")
            check.linear(f"{name} gate (W_gate, b_gate)", norm, x, pre, w.W_gate, w.b_gate)
            check.linear(f"{name} input (W_in, b_in)", norm, x, up, w.W_in, w.b_in)
            on_up = ratio * pre
            post = check.times(on_up, up)
            b_post = 0.0 if w.b_post is None else self.frame.cast(w.b_post)
            post += b_post
            check.suspect(f"{name} gating (activation · up)", seen, lambda: on_up * up + b_post)
            on_gate = ratio * up
            mlp: Sublayer = GatedMLP(self.frame, layer, w, on_up, on_gate, self.convention.gate)
        else:
            check.linear(f"{name} input (W_in, b_in)", norm, x, pre, w.W_in, w.b_in)
            post, scale = check.times(ratio, pre), None
            if w.ln is None:
                check.suspect(f"{name} activation", seen, lambda: ratio * pre)
            else:
                check.suspect(f"{name} activation", self.take(layer, "mid"), lambda: ratio * pre)
                scale = self.take(layer, "mlp.ln.scale")
                ln = Norm(self.frame, f"L{layer}.mlp.ln", scale, w.ln, post.shape[-1])
                post = ln.apply(post) + ln.bias
                check.suspect(f"{name} norm", seen, lambda: ln.apply(ratio * pre) + ln.bias)
            mlp = MLP(self.frame, layer, w, ratio, scale)
        return mlp, check.output(w.W_out, w.b_out, post_norm, post)

    def _check_embedding(self, state: Tensor) -> None:
        parts = self.reads[None, "embed"]
        if (pos := self.reads.get((None, "pos_embed"))) is not None:
            parts = parts + pos
        self.check.same("embedding (token + position)", state, parts)

    def _check_passed(self, layer: int, state: Tensor) -> Tensor:
        # The state enters a block as it left the one before, unless somebody edited it between.
        if self.state is None or state.data_ptr() == self.state.data_ptr():
            return state if self.state is None else self.state
        self.check.same(f"L{layer} input (residual of L{layer - 1})", state, self.state)
        return state

    def finish(self, logits: Tensor) -> Capture:
        """Freeze the top, check the logits, and close.

        Args:
            logits: What the model returned.

        Returns:
            The finished capture.

        Raises:
            ValueError: If the model did not run through its blocks.
        """
        weights, final = self.adapter.weights, self.state
        if final is None or len(self.blocks) != len(weights.blocks):
            raise ValueError("the model ran without its blocks: expected one whole forward pass")
        ln_final = self.norm(None, "ln_final", weights.ln_final)
        u = weights.unembed
        unembed = Unembed(self.frame, u, _normed(ln_final, final))
        self._check_logits(unembed, final, ln_final, self._clean(self.frame.cast(logits), 1))
        return Capture(
            self.adapter.name,
            self.frame,
            self.prompts,
            self.take(None, "embed"),
            self.reads.pop((None, "pos_embed"), None),
            tuple(self.blocks),
            final,
            ln_final,
            unembed,
            logits.detach(),
            self.convention,
            self.check.errors,
            self.adapter.tokenizer,
        )

    def _check_logits(
        self, unembed: Unembed, final: Tensor, ln_final: Norm | None, logits: Tensor
    ) -> None:
        u, check = unembed.weights, self.check
        if u.soft_cap is None:
            check.linear("logits (W_U, b_U)", ln_final, final, logits, u.W_U, u.b_U)
        else:  # A capped logit is a product of its own, so a few are compared one by one.
            some = torch.arange(0, u.W_U.shape[1], max(1, u.W_U.shape[1] // 64))
            raw = unembed.final @ self.frame.cast(u.W_U[:, some])
            raw = raw if u.b_U is None else raw + self.frame.cast(u.b_U[some])
            predicted = raw * soft_cap_ratio(raw, u.soft_cap)
            seen, r = logits[..., some], check.signs(len(some))
            size = torch.linalg.vector_norm(seen, dim=-1)
            check.compare("logits (W_U, b_U, soft cap)", seen @ r, predicted @ r, size)
        check.settle(self.adapter.foreign_hooks)


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm.apply(x) + norm.bias


def record(
    adapter: Adapter,
    inputs: Any,
    convention: Convention | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos d_vocab"], Capture]:
    """Run the model once and freeze the run.

    Args:
        adapter: The model's.
        inputs: A string, a list of strings, or token ids.
        convention: The choices under which the operator is unique.
        dtype: Compute dtype of the operator, float32 or float64; by default float32, or the
            model's own where that is wider.
        **kwargs: The model's own arguments.

    Returns:
        The logits as the model returned them, and the capture.

    Raises:
        ValueError: On bad input, or where a hook never fired.
        CaptureMismatchError: If the run is not what the operator would compute.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"expected dtype float32 or float64, got {dtype}")
    inputs, prompts = adapter.prepare(inputs, kwargs)
    dtype = dtype or torch.promote_types(adapter.dtype, torch.float32)
    device = adapter.weights.unembed.W_U.device
    frame = Frame(prompts.spans, prompts.tokens.shape[1], dtype, device)
    recorder = Recorder(adapter, prompts, frame, convention or Convention())
    handles = []
    try:
        for read, point in adapter.points().items():
            handles.append(point.register_forward_hook(recorder.listen(read)))
        logits = adapter.run(inputs, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        return logits, recorder.finish(logits)
