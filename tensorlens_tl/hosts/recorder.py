"""One forward pass, recorded, frozen and checked.

The recorder listens at the adapter's hook points, and when a block has passed it

1. turns what it read into frozen sublayers (pattern, scales, gating ratios; weights by reference),
2. checks every product the operator will use against the run's own activations (``selfcheck``),
3. turns what the user's own hooks changed into constants of their own, ``L3.hook_z[user]``: the
   difference between what the run had and what the frozen sublayer predicts there,
4. forgets values, z and post-activations.

A transposed, swapped or renamed weight is therefore an error at capture, never a wrong figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..operator import Capture, CaptureMismatchError, Convention, FrozenBlock, Prompts
from ..sublayers import (
    MLP,
    Attention,
    AttentionWeights,
    BlockWeights,
    FeedForward,
    Frame,
    GatedMLP,
    GatedMLPWeights,
    MLPWeights,
    Norm,
    NormWeights,
    Shift,
    Unembed,
    gating_ratio,
    soft_cap_ratio,
    version,
)
from .adapter import Adapter, Read
from .attention_reading import Queries, Stored
from .self_check import SelfCheck, not_finite


class Recorder:
    """Listens to one forward pass and freezes block after block."""

    def __init__(self, adapter: Adapter, prompts: Prompts, frame: Frame, convention: Convention,
                 reading: Stored | Queries):  # fmt: skip
        self.adapter, self.prompts, self.frame, self.reading = adapter, prompts, frame, reading
        self.convention = convention
        self.check = SelfCheck(adapter.model, frame, adapter.dtype)
        self.hooked = adapter.edits()
        self.reads: dict[Read, Tensor] = {}
        self.sources: dict[Read, tuple[Tensor, int]] = {}
        self.blocks: list[FrozenBlock] = []
        self.padded = any(span != (0, frame.n_pos) for span in frame.spans)
        self.state: Tensor | None = None
        self.first_edit: Shift | None = None

    def listen(self, read: Read) -> Callable[..., None]:
        """A hook that stores one activation, and freezes a block when it was the last."""
        return partial(self._hear, read)

    def _hear(self, read: Read, module: Any, args: Any, output: Tensor | None = None) -> None:
        seen: Tensor = args[0] if output is None else output  # before the module, or after it
        self.sources[read] = seen, version(seen)
        if seen.ndim == 2 and seen.shape[0] == self.frame.batch * self.frame.n_pos:
            seen = seen.unflatten(0, (self.frame.batch, -1))  # OPT's second norm
        self.reads[read] = self._clean(read, self.frame.cast(seen))
        layer, key = read
        if key == "resid_post" and layer is not None:
            self.freeze_block(layer)

    def _clean(self, read: Read, tensor: Tensor) -> Tensor:
        # Padding rows may hold NaN (a softmax over nothing): they are nobody's, and become 0, or
        # 1 where a norm divides by them: 0 / 0 would reach real tokens as 0 · NaN.
        # A finite sum tells in one pass that all are finite; one that overflows tells nothing.
        if not self.padded or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all()):
            return tensor
        layer, key = read
        real = self.frame.real
        real = real[:, None, :, None] if key in self.reading.heads_first else real
        real = real.reshape(*real.shape, *[1] * (tensor.ndim - real.ndim))
        cleaned = torch.where(real, tensor, 1 if key.endswith("scale") else 0)
        if not bool(cleaned.isfinite().all()):
            raise ValueError(not_finite(key if layer is None else f"L{layer} {key}"))
        return cleaned

    def take(self, layer: int | None, key: str) -> Tensor:
        """An activation that was read; each is taken once.

        Returns:
            The activation, in the compute dtype.

        Raises:
            ValueError: If its hook never fired.
        """
        try:
            found = self.reads.pop((layer, key))
            self.unchanged(layer, key)
            return found
        except KeyError:
            remedy = "load the model with attn_implementation='eager'" if key == "pattern" else (
                "the host ran something else than its blocks"
            )  # fmt: skip
            where = "the model" if layer is None else f"block {layer}"
            raise ValueError(f"the hook for {key} of {where} never fired: {remedy}") from None

    def unchanged(self, layer: int | None, key: str) -> None:
        """Refuse an activation that somebody wrote over after it was read.

        Raises:
            CaptureMismatchError: If its version is not the one that was read.
        """
        source, seen = self.sources[layer, key]
        if version(source) != seen:
            where = "the model" if layer is None else f"block {layer}"
            raise CaptureMismatchError(
                f"{key} of {where} was changed in place after it had been read: a hook must return "
                "a new tensor (t * 2 instead of t.mul_(2))"
            )

    def norm(self, layer: int | None, key: str, weights: NormWeights | None) -> Norm | None:
        """A frozen norm, or None where the model has none."""
        if weights is None:
            return None
        name = key if layer is None else f"L{layer}.{key}"
        scale = self.take(layer, f"{key}.scale")
        return Norm(self.frame, name, scale, weights, self.adapter.cfg.d_model)

    # --- Edits of the user's own

    def edit(
        self,
        layer: int | None,
        stages: tuple[str, ...],
        seen: Tensor,
        predict: Callable[[], Tensor],
    ) -> Shift | None:
        """The constant by which hooks of the user's own changed an activation, or None.

        Args:
            layer: Block, or None after the last.
            stages: Where in it, as the adapter names them.
            seen: What the run had.
            predict: What it would have had.

        Returns:
            The difference, named after the hook points that carry the user's hooks.
        """
        labels = [label for stage in stages for label in self.hooked.get((layer, stage), ())]
        if not labels or seen.shape != (predicted := predict()).shape:
            return None
        change = torch.where(self.frame.real[..., None], seen - predicted, 0)
        # A hook that only looks leaves rounding: no source of its own.
        if change.abs().max() <= 0.1 * self.check.tolerance * seen.abs().max():
            return None
        prefix = "" if layer is None else f"L{layer}."
        return Shift(self.frame, change, f"{prefix}{'+'.join(labels)}[user]")

    # --- Block by block

    def freeze_block(self, layer: int) -> None:
        """Freeze and check one block; once more without what is kept, should that be stale."""
        before = dict(self.reads), self.state, list(self.blocks), self.first_edit
        self.check.remembered = False
        try:
            self.freeze_and_check(layer)
        except CaptureMismatchError:
            if not self.check.remembered:
                raise
            self.check.forget()
            self.reads, self.state, self.blocks, self.first_edit = before
            self.freeze_and_check(layer)

    def freeze_and_check(self, layer: int) -> None:
        """Freeze one block from what was read of it, and check it."""
        weights: BlockWeights = self.adapter.weights.blocks[layer]
        before, after = self.take(layer, "resid_pre"), self.take(layer, "resid_post")
        before = self.enter(layer, before)
        self.state = after
        ln1 = self.norm(layer, "ln1", weights.ln1)
        ln1_post = self.norm(layer, "ln1_post", weights.ln1_post)
        ln2 = self.norm(layer, "ln2", weights.ln2)
        ln2_post = self.norm(layer, "ln2_post", weights.ln2_post)

        attn, attn_added, attn_out = self.freeze_attention(
            layer, weights.attn, ln1, ln1_post, before
        )
        mid, mlp, mid_edits = None, None, ()
        name = f"L{layer} attention{self.reading.note}"
        if weights.mlp is None:
            stages = ("attn_out", "mlp_out")
            label = f"{name} output (W_O, b_O)"
            post_edits = self.step(layer, label, stages, before, after, attn_added, attn_out)
        elif weights.parallel:
            mlp, added, out = self.freeze_mlp(layer, weights.mlp, ln2, ln2_post, before)
            label = f"{name} and MLP output (W_O, b_O, W_out, b_out)"
            post_edits = self.step(
                layer, label, ("attn_out", "mlp_out"), before, after, attn_added + added,
                lambda: attn_out() + out(),
            )  # fmt: skip
        else:
            mid = self.take(layer, "resid_mid")
            label = f"{name} output (W_O, b_O)"
            mid_edits = self.step(layer, label, ("attn_out",), before, mid, attn_added, attn_out)
            mlp, added, out = self.freeze_mlp(layer, weights.mlp, ln2, ln2_post, mid)
            label = f"L{layer} MLP output (W_out, b_out)"
            post_edits = self.step(layer, label, ("mlp_out",), mid, after, added, out)
        self.check.settle(self.adapter.foreign_hooks)
        self.blocks.append(
            FrozenBlock(before, mid, attn, mlp, ln1, ln2, ln1_post, ln2_post, mid_edits, post_edits)
        )

    def enter(self, layer: int, state: Tensor) -> Tensor:
        """The state entering a block: the embeddings, or as it left the block before.

        Returns:
            The state; the same tensor as before where nothing came between.
        """
        if layer == 0:
            parts = self.reads[None, "embed"]
            if (pos := self.reads.get((None, "pos_embed"))) is not None:
                parts = parts + pos
            self.first_edit = self.edit(0, ("resid_pre",), state, lambda: parts)
            if self.first_edit is None:
                self.check.same("embedding (token + position)", state, parts)
            return state
        last = self.state
        self.unchanged(layer - 1, "resid_post")
        if last is None or state.data_ptr() == last.data_ptr():
            return state if last is None else last
        if edit := self.edit(layer, ("resid_pre",), state, lambda: last):
            block = self.blocks[-1]
            self.blocks[-1] = replace(block, post_edits=(*block.post_edits, edit))
        else:
            self.check.same(f"L{layer} input (residual of L{layer - 1})", state, last)
        return state

    def step(
        self,
        layer: int,
        name: str,
        stages: tuple[str, ...],
        before: Tensor,
        after: Tensor,
        added: Tensor,
        out: Callable[[], Tensor],
    ) -> tuple[Shift, ...]:
        """Check that a state is the last one plus what the branches add, or keep the user's edit.

        Args:
            layer: Block.
            name: What is checked.
            stages: Where the user may have edited.
            before: The last state.
            after: This state.
            added: What the branches add, projected.
            out: The same, whole.

        Returns:
            The edit, if there is one.
        """
        if edit := self.edit(layer, stages, after, lambda: before + out()):
            return (edit,)
        self.check.residual(name, before, after, added)
        return ()

    def freeze_attention(
        self, layer: int, w: AttentionWeights, norm: Norm | None, post: Norm | None, x: Tensor
    ) -> tuple[Attention, Tensor, Callable[[], Tensor]]:
        """The frozen attention, and what it adds: projected, and whole when asked for.

        Returns:
            The sublayer, the projection, and a function that computes the whole.
        """
        name = f"L{layer} attention{self.reading.note}"
        mix = self.reading.mix(layer, self.frame, self.take, w)
        v, z = self.take(layer, "v").flatten(2), self.take(layer, "z").flatten(2)
        attn = Attention(self.frame, layer, mix, w)

        def predict_v() -> Tensor:
            values = attn.values
            return values.apply(_normed(norm, x)) + values.bias

        attn = replace(
            attn,
            v_edit=self.edit(layer, ("v",), v, predict_v),
            z_edit=self.edit(layer, ("z",), z, lambda: mix.apply(v)),
        )

        def out() -> Tensor:
            return _normed(post, attn.output.apply(z) + attn.output.bias)

        if attn.edits:
            return attn, self.check.project(out()), out
        self.check.suspect(f"{name} values (W_V, b_V)", v, predict_v)
        self.check.suspect(f"{name} mixing (pattern · values)", z, lambda: mix.apply(v))
        return attn, self.check.attention(norm, x, mix, w, post), out

    def freeze_mlp(
        self,
        layer: int,
        w: MLPWeights | GatedMLPWeights,
        norm: Norm | None,
        post_norm: Norm | None,
        x: Tensor,
    ) -> tuple[FeedForward, Tensor, Callable[[], Tensor]]:
        """The frozen MLP, and what it adds: projected, and whole when asked for.

        The activation, one function for all positions, is compared at a sample of them; ratios
        are left to whoever asks for them first.

        Returns:
            The sublayer, the projection, and a function that computes the whole.
        """
        name, check = f"L{layer} MLP", self.check
        pre, seen = self.take(layer, "pre"), self.take(layer, "post")
        if isinstance(w, GatedMLPWeights):
            up = self.take(layer, "pre_linear")
            pre_edit = self.linear(layer, "pre", f"{name} gate (W_gate, b_gate)", norm, x, pre,
                                   w.W_gate, w.b_gate)  # fmt: skip
            up_edit = self.linear(layer, "pre_linear", f"{name} input (W_in, b_in)", norm, x, up,
                                  w.W_in, w.b_in)  # fmt: skip
            b_post = 0.0 if w.b_post is None else self.frame.cast(w.b_post)

            def post(s: slice) -> Tensor:
                g = pre[:, s]
                return gating_ratio(w.act, g) * g * up[:, s] + b_post

            label = f"{name} gating (activation · up)"
            edit = self.edit(layer, ("post",), seen, lambda: post(slice(None)))
            gate = self.convention.gate
            mlp: FeedForward = GatedMLP(
                self.frame, layer, w, pre, up, gate, pre_edit, up_edit, edit
            )
        else:
            pre_edit = self.linear(layer, "pre", f"{name} input (W_in, b_in)", norm, x, pre,
                                   w.W_in, w.b_in)  # fmt: skip
            ln = self.norm(layer, "mlp.ln", w.ln)
            scale = None if ln is None else ln.scale

            def post(s: slice) -> Tensor:
                mid = gating_ratio(w.act, pre[:, s]) * pre[:, s]
                if ln is None:
                    return mid
                b = 0.0 if ln.weights.b is None else self.frame.cast(ln.weights.b)
                return replace(ln, scale=ln.scale[:, s]).apply(mid) + b

            label = f"{name} activation" + ("" if ln is None else " and norm")
            edit = self.edit(layer, ("post",), seen, lambda: post(slice(None)))
            mlp = MLP(self.frame, layer, w, pre, scale, pre_edit, edit)

        def out() -> Tensor:
            return _normed(post_norm, mlp.output.apply(seen) + mlp.output.bias)

        if edit is None:
            check.activation(label, seen, post)
        return mlp, check.output(w.W_out, w.b_out, post_norm, seen), out

    def linear(
        self,
        layer: int,
        stage: str,
        name: str,
        norm: Norm | None,
        x: Tensor,
        seen: Tensor,
        W: Tensor,
        b: Tensor | None,
    ) -> Shift | None:
        """Check pre-activations N(x) W + b, or keep the user's edit of them."""

        def predict() -> Tensor:
            z = _normed(norm, x) @ self.frame.cast(W)
            return z if b is None else z + self.frame.cast(b)

        edit = self.edit(layer, (stage,), seen, predict)
        if edit is None:
            self.check.linear(name, norm, x, seen, W, b)
        return edit

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
        self.unchanged(len(self.blocks) - 1, "resid_post")
        ln_final = self.norm(None, "ln_final", weights.ln_final)
        y, edit, seen_logits = _normed(ln_final, final), None, self.frame.cast(logits)
        if (None, "normalized") in self.hooked:
            seen, predicted = self.take(None, "normalized"), y
            edit = self.edit(None, ("normalized",), seen, lambda: predicted)
            y = y if edit is None else seen
        unembed = Unembed(self.frame, weights.unembed, y)
        before = (final, ln_final) if edit is None else (y, None)
        self._check_logits(unembed, *before, self._clean((None, "logits"), seen_logits))
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
            self.first_edit,
            edit,
        )

    def _check_logits(
        self, unembed: Unembed, final: Tensor, ln_final: Norm | None, logits: Tensor
    ) -> None:
        u, raw = unembed.weights, logits
        if u.soft_cap is not None:
            raw = self.take(None, "raw_logits")
        for attempt in (1, 2):
            try:
                self.check.remembered = False
                self.check.linear("logits (W_U, b_U)", ln_final, final, raw, u.W_U, u.b_U)
                if u.soft_cap is not None:
                    capped, r = (
                        raw * soft_cap_ratio(raw, u.soft_cap),
                        self.check.probe(raw.shape[-1]),
                    )
                    size = torch.linalg.vector_norm(logits, dim=-1)
                    self.check.compare("logits (soft cap)", logits @ r, capped @ r, size)
                self.check.settle(self.adapter.foreign_hooks)
                return
            except CaptureMismatchError:
                if attempt == 2 or not self.check.remembered:
                    raise
                self.check.forget()


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm.apply(x) + norm.bias
