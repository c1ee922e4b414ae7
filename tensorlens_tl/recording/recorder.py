"""Record one forward pass: freeze it and check it, block by block.

The recorder listens at the adapter's hook points. When a block has passed, it does the following:

1. Turn what was read into frozen sublayers: pattern, scales, gating ratios; weights by reference.
2. Check every product that the operator will use against the run's own activations (``SelfCheck``).
3. Turn what the user's own hooks changed into constants of their own, ``L3.hook_z[user]``. Such a
   constant is the difference between the run's activation and the frozen sublayer's prediction.
4. Forget values, z and post-activations.

A transposed, swapped or renamed weight is therefore an error at capture, never a wrong figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..graph import EMBED_NORM_BIAS, SOURCES
from ..hosts import Adapter
from ..maps import Factor, Frame, Norm, NormWeights, Shift, take_row
from ..operator import Capture, CaptureMismatchError, Convention, FrozenBlock, Prompts
from ..readers import ExpertsRead, Read, RecomputedReading, StoredReading, in_this_thread
from ..sublayers import (
    BlockWeights,
    ExpertsWeights,
    Unembed,
    soft_cap_ratio,
)
from .activations import Activations
from .attention import Added, freeze_attention, normed
from .mlps import freeze_mlps
from .self_check import SelfCheck


class Recorder:
    """Listen to one forward pass and freeze block after block.

    Args:
        adapter: Adapter of the model that runs.
        prompts: Tokens of the run.
        frame: Spans of real tokens, positions, compute dtype and device.
        convention: The choices under which the operator is unique.
        reading: How attention is read.
        kwargs: Arguments of the run.
    """

    def __init__(
        self,
        adapter: Adapter,
        prompts: Prompts,
        frame: Frame,
        convention: Convention,
        reading: StoredReading | RecomputedReading,
        kwargs: Mapping[str, Any],
    ):
        self.adapter, self.prompts, self.frame, self.reading = adapter, prompts, frame, reading
        self.convention, self.kwargs = convention, kwargs
        self.check = SelfCheck(adapter.model, frame.held, adapter.dtype)
        self.hooked = adapter.edits()
        by_head = (*reading.heads_first, "v_by_head")
        self.reads = Activations(frame, by_head, adapter.model)
        self.pop = self.reads.pop
        self.experts: dict[int, ExpertsRead] = {}
        self.blocks: list[FrozenBlock] = []
        self.state: Tensor | None = None
        self.embeddings: dict[str, Tensor] = {}

    # --- What is read

    def listen(self, read: Read) -> Callable[..., None]:
        """Make the hook that stores one activation, and freezes a block when it was the last."""
        return in_this_thread(partial(self._on_activation, read))

    def _on_activation(
        self, read: Read, module: Any, args: Any, output: Tensor | None = None
    ) -> None:
        self.reads.store(read, args[0] if output is None else output)  # before the module, or after
        layer, key = read
        if key == "resid_post" and layer is not None:
            self.checked(lambda: self.freeze_block(layer))
            self.experts.pop(layer, None)
            self.reads.forget(layer, but="resid_post")

    def expert_readers(self) -> Iterator[tuple[int, Callable[[ExpertsRead], None]]]:
        """The blocks with a mixture of experts, and what stores what its experts did."""
        for layer, block in enumerate(self.adapter.weights.blocks):
            if isinstance(block.mlp, ExpertsWeights):
                yield layer, partial(self.experts.__setitem__, layer)

    def norm(
        self, layer: int | None, key: str, weights: NormWeights | None, own: str = ""
    ) -> Norm | None:
        """Freeze a norm at the scale that was read; None where the model has none."""
        if weights is None:
            return None
        name = own or key
        name = name if layer is None else f"L{layer}.{name}"
        if (layer, f"{key}.in") in self.reads.tensors:  # the host shows no scale
            scale = weights.scale_at(self.pop(layer, f"{key}.in"))
        else:
            scale = self.pop(layer, f"{key}.scale")
        return Norm(self.frame, name, scale, weights, self.adapter.cfg.d_model)

    def edit(
        self,
        layer: int | None,
        stages: tuple[str, ...],
        seen: Tensor,
        predict: Callable[[], Tensor],
    ) -> Shift | None:
        """Find the constant by which hooks of the user's own changed an activation, or None.

        Args:
            layer: Number of the block, or None after the last.
            stages: Places in the block, as :meth:`Adapter.edits` names them.
            seen: What the run had [batch, pos, d].
            predict: Computes what the run would have had without the hooks [batch, pos, d].

        Returns:
            The difference, named after the hook points that carry the user's hooks.
        """
        labels = [label for stage in stages for label in self.hooked.get((layer, stage), ())]
        if not labels or seen.shape != (predicted := predict()).shape:
            return None
        # 3. Padding belongs to nobody, so an edit there is none.
        change = torch.where(self.frame.real[..., None], seen - predicted, 0)
        # A hook that only looks leaves rounding: no source of its own.
        if change.abs().max() <= 0.1 * self.check.tolerance * seen.abs().max():
            return None
        prefix = "" if layer is None else f"L{layer}."
        suffix = self.adapter.edit_suffix(layer, labels)
        return Shift(self.frame, change, f"{prefix}{'+'.join(labels)}{suffix}")

    # --- Block by block

    def checked(self, step: Callable[[], None]) -> None:
        """Run a step that ends in a check; once more should what is kept of the weights be stale.

        Args:
            step: Function that freezes and checks what was read.

        Raises:
            CaptureMismatchError: If the check fails with products of the weights as they are.
        """
        before = dict(self.reads.tensors), self.state, list(self.blocks), self.embeddings
        self.check.remembered = False
        try:
            step()
        except CaptureMismatchError:
            # A weight that was edited through .data keeps its version, and so its old products.
            if not self.check.remembered:
                raise
            self.check.forget()
            self.reads.tensors, self.state, self.blocks, self.embeddings = before
            step()

    def freeze_block(self, layer: int) -> None:
        """Freeze one block from what was read of it, and check it."""
        # 4. Whatever is popped here and not kept by a sublayer is forgotten at the end.
        weights: BlockWeights = self.adapter.weights.blocks[layer]
        before, after = self.pop(layer, "resid_pre"), self.pop(layer, "resid_post")
        before = self.enter(layer, before)
        self.state = after
        # 1. The frozen sublayers; each also notes its own products for the check.
        names = ("ln1", "ln2", "ln1_post", "ln2_post")
        norms = (self.norm(layer, name, getattr(weights, name)) for name in names)
        ln1, ln2, ln1_post, ln2_post = norms
        # Norms of the residual itself, which read the sums, have the host's names.
        mid_norm = self.norm(layer, "mid_norm", weights.mid_norm, "ln1")
        last, end = weights.post_norm, after
        if last is None or last.factor is None:
            post_norm = self.norm(layer, "post_norm", last, "ln2")
        else:
            post_norm = Factor.of(self.frame, f"L{layer}.layer_scalar", last, after)
            end = after * post_norm.scale

        attn, attn_own = freeze_attention(self, layer, ln1, ln1_post, before)
        mid, mlp, shared, mid_edits = None, None, None, ()
        name = f"L{layer} attention{self.reading.note}"
        if weights.mlp is None:
            stages = ("attn_out", "mlp_out")
            label = f"{name} output (W_O, b_O)"
            post_edits = self.step(layer, label, stages, before, end, attn_own)
        elif weights.parallel:
            mlp, shared, (added, out, _) = freeze_mlps(self, layer, ln2, ln2_post, before)
            attn_added, attn_out, rounding = attn_own
            stages = ("attn_out", "mlp_out")
            label = f"{name} and MLP output (W_O, b_O, W_out, b_out)"
            both = attn_added + added, lambda: attn_out() + out(), rounding
            post_edits = self.step(layer, label, stages, before, end, both)
        else:
            summed = mid = self.pop(layer, "resid_mid" if mid_norm is None else "mid_sum")
            label = f"{name} output (W_O, b_O)"
            mid_edits = self.step(layer, label, ("attn_out",), before, summed, attn_own)
            mid = normed(mid_norm, summed)
            mlp, shared, own = freeze_mlps(self, layer, ln2, ln2_post, mid)
            label = f"L{layer} MLP output (W_out, b_out)"
            apart = not (post_norm is None or isinstance(post_norm, Factor))
            summed = self.pop(layer, "post_sum") if apart else end
            post_edits = self.step(layer, label, ("mlp_out",), mid, summed, own)
            if post_norm is not None and apart:
                label = f"L{layer} output (norm of the residual, ln2)"
                expected = normed(post_norm, summed)
                if edit := self.edit(layer, ("mlp_out",), after, lambda: expected):
                    raise CaptureMismatchError(_behind_a_norm(edit))
                self.check.same(label, after, expected)
        # 2. All products of the block are judged together, which costs one transfer to the CPU.
        self.check.check_block(self.adapter.foreign_hooks)
        own = mid_edits, post_edits, shared, mid_norm, post_norm
        four = ln1, ln2, ln1_post, ln2_post
        self.blocks.append(FrozenBlock(before, mid, attn, mlp, *four, *own))

    def enter(self, layer: int, state: Tensor) -> Tensor:
        """Check the state that enters a block: the embeddings, or what left the block before.

        Args:
            layer: Number of the block.
            state: The state as it was read [batch, pos, d_model].

        Returns:
            The state; the same tensor as before where nothing came between.

        Raises:
            CaptureMismatchError: If a hook of the user's own edited it behind the norm of a sum.
        """
        if layer == 0:
            self.embeddings = self.sources(state)
            return state
        self.reads.unchanged(layer - 1, "resid_post")
        last = self.left()
        if last is None or state.data_ptr() == last.data_ptr():
            return state if last is None else last
        block = self.blocks[-1]
        edit = self.edit(layer, ("resid_pre",), state, lambda: last)
        if edit and isinstance(block.post_norm, Factor):  # edits stand before it
            edit = replace(edit, constant=edit.constant * block.post_norm.scale)
        elif edit and block.post_norm is not None:
            raise CaptureMismatchError(_behind_a_norm(edit))
        if edit:
            self.blocks[-1] = replace(block, post_edits=(*block.post_edits, edit))
        else:
            self.check.same(f"L{layer} input (residual of L{layer - 1})", state, last)
        return state

    def left(self) -> Tensor | None:
        """The residual after the last block, with what the model adds to it there."""
        if self.state is None:
            return None
        layer = len(self.blocks) - 1
        if (added := self.adapter.added_after(layer, self.prompts, self.state)) is None:
            return self.state
        block, (name, constant) = self.blocks[-1], added
        shift = Shift(self.frame, constant, name)
        self.blocks[-1] = replace(block, post_edits=(*block.post_edits, shift))
        return self.state + constant

    def sources(self, state: Tensor) -> dict[str, Tensor]:
        """Find the sources that sum to what enters the first block, and check that they do.

        A norm after the embeddings is frozen: each source is what its linear part makes of it, and
        its bias is one more.

        Args:
            state: What enters the first block [batch, pos, d_model].

        Returns:
            The sources by name, with what hooks of the user's own added.
        """
        seen = {key: self.pop(None, key) for at, key in [*self.reads.tensors] if key in SOURCES}
        parts = self.adapter.sources_of(seen, self.prompts, self.kwargs)
        parts = {name: self.frame.cast(part) for name, part in parts.items()}
        if (norm := self.embed_norm(sum(parts.values()))) is not None:
            parts = {name: norm.apply(part) for name, part in parts.items()}
            if norm.weights.b is not None:
                parts[EMBED_NORM_BIAS] = norm.bias
        first, *others = parts.values()
        total = sum(others, first)
        if edit := self.edit(0, ("resid_pre",), state, lambda: total):
            return {**parts, edit.name: edit.constant}
        self.check.same(f"what enters block 0 ({' + '.join(parts)})", state, total)
        return {name: part.expand_as(state) for name, part in parts.items()}

    def embed_norm(self, x: Any) -> Norm | None:
        """Freeze the norm that the sources pass before the first block; None where there is none.

        Args:
            x: The sum of the sources before the norm [batch, pos, d_model].

        Returns:
            The norm, at the scale that was read, or else at the one that is computed of the sum.
        """
        weights, read = self.adapter.embed_norm(), "embed_ln"
        if weights is None and (None, "ln_final.scale") in self.reads.tensors:
            weights, read = self.adapter.weights.ln_final, "ln_final"  # it ran before the blocks
        if weights is None:
            return None
        if (None, f"{read}.scale") in self.reads.tensors:
            scale = self.pop(None, f"{read}.scale")
        else:
            x = x - x.mean(-1, keepdim=True) if weights.center else x
            scale = (x.square().mean(-1, keepdim=True) + (weights.eps or 0)).sqrt()
        return Norm(self.frame, "embed_ln", scale, weights, x.shape[-1])

    def step(
        self,
        layer: int,
        name: str,
        stages: tuple[str, ...],
        before: Tensor,
        after: Tensor,
        branches: Added,
    ) -> tuple[Shift, ...]:
        """Check that a state is the last one plus what the branches add, or keep the user's edit.

        Args:
            layer: Number of the block.
            name: What is checked, for messages.
            stages: Places where the user may have edited.
            before: The residual before the branches [batch, pos, d_model].
            after: The residual after the branches [batch, pos, d_model].
            branches: What the branches add together.

        Returns:
            The edit, if there is one.
        """
        projected, whole, rounding = branches
        if edit := self.edit(layer, stages, after, lambda: before + whole()):
            return (edit,)
        self.check.residual(name, before, after, projected, rounding)
        return ()

    # --- The end of the run

    def finish(self, logits: Tensor) -> Capture:
        """Freeze the top, check the logits, and close.

        Args:
            logits: What the model returned [batch, pos, d_vocab].

        Returns:
            The finished capture.

        Raises:
            ValueError: If the model did not run through its blocks.
        """
        weights, final = self.adapter.weights, self.left()
        if final is None or len(self.blocks) != len(weights.blocks):
            raise ValueError(
                f"The model ran {len(self.blocks)} of its {len(weights.blocks)} blocks. "
                "Run one whole forward pass."
            )
        self.reads.unchanged(len(self.blocks) - 1, "resid_post")
        ln_final = self.norm(None, "ln_final", weights.ln_final)
        y, edit, seen_logits = normed(ln_final, final), None, self.frame.cast(logits)
        if (None, "normalized") in self.hooked:
            seen, predicted = self.pop(None, "normalized"), y
            edit = self.edit(None, ("normalized",), seen, lambda: predicted)
            y = y if edit is None else seen
        unembed = Unembed(self.frame, weights.unembed, y)
        before = (final, ln_final) if edit is None else (y, None)
        before = before if unembed.head is None else (unembed.hidden(y), None)
        if seen_logits.ndim == 2:  # of a classifier, which reads one row
            self._check_classes(unembed, *before, seen_logits[:, None])
        else:
            cleaned = self.reads.clean((None, "logits"), seen_logits)
            self.checked(lambda: self._check_logits(unembed, *before, cleaned))
        return Capture(
            self.adapter.name,
            self.frame,
            self.adapter.described(self.prompts, self.kwargs),
            self.embeddings,
            tuple(self.blocks),
            final,
            ln_final,
            unembed,
            logits if self.frame.graph else logits.detach(),
            replace(self.convention, first_token=self.prompts.added),
            self.check.errors,
            self.adapter.tokenizer,
            final_edit=edit,
            headless=self.adapter.headless,
        )

    def _check_classes(
        self, unembed: Unembed, final: Tensor, ln_final: Norm | None, logits: Tensor
    ) -> None:
        query, whole = self.frame.index(-1), self.check
        norm = None if ln_final is None else ln_final.row(query)
        self.check = SelfCheck(self.adapter.model, self.frame.row.held, self.adapter.dtype)
        row = take_row(final, query)
        self.checked(lambda: self._check_logits(unembed, row, norm, logits))
        whole.errors |= self.check.errors
        self.check = whole

    def _check_logits(
        self, unembed: Unembed, final: Tensor, ln_final: Norm | None, logits: Tensor
    ) -> None:
        u = unembed.weights
        raw = (
            logits if u.soft_cap is None else self.pop(None, "raw_logits") * self.adapter.raw_factor
        )
        self.check.linear("logits (W_U, b_U)", ln_final, final, raw, u.W_U, u.b_U)
        if u.soft_cap is not None:
            capped, r = raw * soft_cap_ratio(raw, u.soft_cap), self.check.probe(raw.shape[-1])
            size = torch.linalg.vector_norm(logits, dim=-1)
            self.check.compare("logits (soft cap)", logits @ r, capped @ r, size)
        self.check.check_block(self.adapter.foreign_hooks)


def _behind_a_norm(edit: Shift) -> str:
    return (
        f"{edit.name}: an edit there is not served, as the norm of a sum stands before it. Edit "
        "what attention or the MLP adds instead, at the output of W_O or W_out."
    )
