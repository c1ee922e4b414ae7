"""What one run leaves when it is frozen: a framework-free, immutable ``Capture``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..sublayers import (
    MLP,
    Attention,
    EmbedWeights,
    Frame,
    GatedMLP,
    Mix,
    Norm,
    RecomputedMix,
    ScoreWeights,
    Shift,
    Sublayer,
    Unembed,
    version,
)

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

    There is no ``resid_mid`` in a parallel or attention-only block. The edits are what the user's
    own hooks added to the residual after attention and after the block.
    """

    resid_pre: Float[Tensor, "batch pos d_model"]
    resid_mid: Float[Tensor, "batch pos d_model"] | None
    attn: Attention
    mlp: Sublayer | None
    ln1: Norm | None
    ln2: Norm | None
    ln1_post: Norm | None
    ln2_post: Norm | None
    mid_edits: tuple[Shift, ...] = ()
    post_edits: tuple[Shift, ...] = ()


_CUT = (FrozenBlock, Attention, Mix, RecomputedMix, MLP, GatedMLP, Norm, Shift, Unembed)


@dataclass(frozen=True, eq=False, repr=False)
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
        edit: What the user's own hooks added to the first residual, or None.
        final_edit: What they added to the final normalized residual, or None.
        noise_floor: max |Δ logits| / max |logits| against a float32 copy of the model, where it
            was asked for: the model's own rounding.
        embed_weights: The embedding matrix and its norm, where the host gave it; not saved.
        score_weights: What every block's attention scores are made of, where that is known; not
            saved, but attached again where a lens is loaded with its model.
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
    edit: Shift | None = None
    final_edit: Shift | None = None
    noise_floor: float | None = None
    embed_weights: EmbedWeights | None = field(repr=False, default=None)
    score_weights: tuple[ScoreWeights, ...] | None = field(repr=False, default=None)

    def __repr__(self) -> str:
        shape = f"{self.frame.batch} × {self.frame.n_pos} tokens, {len(self.blocks)} layers"
        return f"Capture({self.model_name}, {shape}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def embeddings(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """What the first residual is the sum of, by source."""
        parts = {"embed": self.embed, "pos_embed": self.pos_embed}
        if self.edit is not None:
            parts[self.edit.name] = self.edit.constant
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def check(self) -> float:
        """The largest relative error of the self-check."""
        return max(self.checks.values())

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return self.blocks[0].attn.mix.heads

    @property
    def nbytes(self) -> int:
        """Bytes of what the capture alone keeps alive: no weights, no logits."""
        tensors = [self.embed, self.pos_embed, self.resid_final, self.unembed.final]
        tensors += [] if self.ln_final is None else [self.ln_final.scale]
        for block in self.blocks:
            norms = (block.ln1, block.ln2, block.ln1_post, block.ln2_post)
            tensors += [block.resid_pre, block.resid_mid, *block.attn.mix.frozen]
            tensors += [norm.scale for norm in norms if norm is not None]
            for name in ("pre", "pre_linear", "ln_scale"):
                tensors.append(getattr(block.mlp, name, None))
        storages = {t.untyped_storage().data_ptr(): t for t in tensors if t is not None}
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    def versions(self, scores: bool = True) -> tuple[tuple[Tensor, int], ...]:
        """The tensors that others may write to (logits, weights), with their versions now.

        Args:
            scores: Whether with the weights of queries and keys, which only some lenses have.

        Returns:
            Tensors and versions.
        """
        found = [self.logits]

        def walk(value: Any) -> None:
            if isinstance(value, Tensor):
                found.append(value)
            elif is_dataclass(value):
                for f in fields(value):
                    walk(getattr(value, f.name))

        walk(self.unembed.weights)
        for weights in (self.score_weights or ()) if scores else ():
            walk(weights)
        for block in self.blocks:
            for part in (
                block.attn,
                block.mlp,
                block.ln1,
                block.ln2,
                block.ln1_post,
                block.ln2_post,
            ):
                walk(getattr(part, "weights", None))
        walk(getattr(self.ln_final, "weights", None))
        return tuple((tensor, version(tensor)) for tensor in found)

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
                if name in ("queries", "keys"):
                    return value[one, ..., pos]
                return value[one, :, pos, pos] if name == "pattern" else value[one, pos]
            if isinstance(value, _CUT):
                parts = {
                    f.name: getattr(value, f.name) for f in fields(value) if f.name != "weights"
                }
                return replace(value, **{name: cut(part, name) for name, part in parts.items()})
            return tuple(cut(v) for v in value) if isinstance(value, tuple) else value

        names = (
            "embed",
            "pos_embed",
            "blocks",
            "resid_final",
            "ln_final",
            "unembed",
            "logits",
            "edit",
            "final_edit",
        )
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


@dataclass(frozen=True, eq=False)
class Prompts:
    """Token ids [batch, pos], each prompt's (start, stop) of real tokens, and their strings."""

    tokens: Int[Tensor, "batch pos"]
    spans: tuple[tuple[int, int], ...]
    strings: tuple[tuple[str, ...], ...]


class CaptureMismatchError(ValueError):
    """What the operator would compute is not what the run computed; the message names where."""
