"""What one run leaves when it is frozen: an immutable ``Capture`` that knows no host model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import pick_prompts, spelled
from ..graph import FINAL_SITE, Node, site_parts
from ..maps import DeltaRule, Frame, Gate, Mix, Norm, Shift
from ..sublayers import (
    Attention,
    EmbedWeights,
    Experts,
    FeedForward,
    GatedMLP,
    RecomputedMix,
    ScoreWeights,
    Unembed,
)
from .prompts import Convention, Prompts


@dataclass(frozen=True, eq=False)
class FrozenBlock:
    """One transformer block of the run: frozen sublayers and the residual states before each.

    Attributes:
        resid_pre: The residual before the block [batch, pos, d_model].
        resid_mid: The residual between attention and MLP; None in parallel blocks and without MLP.
        attn: The frozen attention.
        mlp: The frozen MLP, or mixture of experts; None in an attention-only block.
        ln1: The norm that attention reads through, or None.
        ln2: The norm that the MLP reads through, or None.
        ln1_post: The norm after attention (as in Gemma-2), or None.
        ln2_post: The norm after the MLP, or None.
        mid_edits: What the user's hooks added to the residual after attention.
        post_edits: What the user's hooks added to the residual after the block.
        shared: The MLP that every token passes beside a mixture's experts, or None.
        mid_norm: The norm of the residual itself after attention (post-norm models), or None.
        post_norm: The same after the MLP.
    """

    resid_pre: Float[Tensor, "batch pos d_model"]
    resid_mid: Float[Tensor, "batch pos d_model"] | None
    attn: Attention
    mlp: FeedForward | None
    ln1: Norm | None
    ln2: Norm | None
    ln1_post: Norm | None
    ln2_post: Norm | None
    mid_edits: tuple[Shift, ...] = ()
    post_edits: tuple[Shift, ...] = ()
    shared: GatedMLP | None = None
    mid_norm: Norm | None = None
    post_norm: Norm | None = None

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms that the block has."""
        norms = self.ln1, self.ln2, self.ln1_post, self.ln2_post, self.mid_norm, self.post_norm
        return tuple(filter(None, norms))


_OF_THE_RUN = (FrozenBlock, Attention, FeedForward, Mix, RecomputedMix, DeltaRule, Gate)
_OF_THE_RUN = (*_OF_THE_RUN, Norm, Shift, Unembed)
"""Classes whose tensors, apart from ``weights``, have the axes batch and pos of a run."""


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class Capture:
    """Everything that one run left: frozen sublayers, residual states and logits.

    Attributes:
        model_name: The model's name, for display.
        frame: Spans of real tokens, number of positions, compute dtype and device.
        prompts: Token ids and token strings.
        embeddings: The sources of what enters block 0, each [batch, pos, d_model], by name:
            "embed" (tokens), "pos_embed" and others; what the user's hooks added is one, too.
        blocks: The frozen blocks, first to last.
        resid_final: The residual after the last block [batch, pos, d_model].
        ln_final: The final norm, or None.
        unembed: The frozen readout, from the final normalized residual to logits.
        logits: The model's own logits, in the model's dtype: of every position [batch, pos,
            d_vocab], or of a classifier [batch, d_vocab]. A model without a head gives the final
            normalized residual.
        convention: The choices under which the run was made linear.
        checks: Relative error of every product that was checked during the run, by name.
        tokenizer: The host's tokenizer, or None.
        final_edit: What the user's hooks added to the final normalized residual, or None.
        noise_floor: The model's own rounding, max |Δ logits| / max |logits| against a float32 copy
            of the model. None where it was not measured.
        embed_weights: The embedding matrix and its norm, where the host gave them. They are not
            saved with a lens.
        headless: Whether the model has no head, so that targets are directions of the residual.
        score_weights: For every block, the weights that its attention scores are made of, or the
            reason why they are not known. They are not saved, but a lens that is loaded with its
            model has them again; None without it.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> lens.capture.n_heads, tuple(lens.capture.embeddings)
        (4, ('embed', 'pos_embed'))
    """

    model_name: str
    frame: Frame
    prompts: Prompts
    embeddings: Mapping[str, Float[Tensor, "batch pos d_model"]]
    blocks: tuple[FrozenBlock, ...]
    resid_final: Float[Tensor, "batch pos d_model"]
    ln_final: Norm | None
    unembed: Unembed
    logits: Float[Tensor, "batch pos d_vocab"] | Float[Tensor, "batch d_vocab"]
    convention: Convention
    checks: Mapping[str, float]
    tokenizer: Any = field(repr=False, default=None)
    final_edit: Shift | None = None
    noise_floor: float | None = None
    embed_weights: EmbedWeights | None = field(repr=False, default=None)
    score_weights: tuple[ScoreWeights, ...] | str | None = field(repr=False, default=None)
    headless: bool = False

    def __repr__(self) -> str:
        shape = f"{self.frame.batch} × {self.frame.n_pos} tokens, {len(self.blocks)} layers"
        return f"Capture({self.model_name}, {shape}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def embed(self) -> Float[Tensor, "batch pos d_model"] | None:
        """The source of that name; None where no token was embedded."""
        return self.embeddings.get("embed")

    @property
    def pos_embed(self) -> Float[Tensor, "batch pos d_model"] | None:
        """The source of that name; None where the model adds no positions."""
        return self.embeddings.get("pos_embed")

    @property
    def input(self) -> Float[Tensor, "batch pos d_model"]:
        """The sum of :attr:`embeddings`, which enters block 0."""
        return sum(self.embeddings.values(), torch.zeros_like(self.resid_final))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that the model itself has, without edits by the user's hooks."""
        return tuple(name for name in self.embeddings if Node.parse(name).enters)

    def logits_at(self, query: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_vocab"]:
        """The model's logits at one position of each prompt, in its dtype.

        Args:
            query: The position of each prompt, as an index that counts padding.

        Returns:
            The logits of that position, or of the classifier.

        Raises:
            ValueError: If the model is a classifier, which reads another row.
        """
        if self.logits.ndim == 3:
            return self.logits[torch.arange(len(query), device=query.device), query]
        if bool((query != self.frame.read_at).any()):
            raise ValueError(
                f"The classes of {self.model_name} are read at row {self.frame.read_at} alone. Ask "
                "there, or pass a direction in the residual as the target."
            )
        return self.logits

    @property
    def known_scores(self) -> tuple[ScoreWeights, ...]:
        """:attr:`score_weights`; empty where they are not known."""
        return self.score_weights if isinstance(self.score_weights, tuple) else ()

    def required_scores(self, asked: str, otherwise: str) -> tuple[ScoreWeights, ...]:
        """:attr:`score_weights` for a question that needs them.

        Args:
            asked: The question as the user typed it.
            otherwise: What to ask instead.

        Returns:
            One entry per block.

        Raises:
            ValueError: If they are not known; the message says why.
        """
        if isinstance(self.score_weights, tuple):
            return self.score_weights
        reason, remedy = "it was loaded without its model", "Load it with model=, or"
        if self.score_weights is not None:
            reason, remedy = self.score_weights, "Instead,"
        raise ValueError(
            f"{asked} needs W_Q and W_K, which this lens does not know ({reason}). "
            f"{remedy} {otherwise}."
        )

    @property
    def check(self) -> float:
        """The largest relative error among :attr:`checks`."""
        return max(self.checks.values())

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer; the largest where layers differ."""
        return max(block.attn.mix.heads for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Memory in bytes that the capture alone keeps alive: no weights and no logits."""
        tensors = [*self.embeddings.values(), self.resid_final, self.unembed.final]
        tensors += [] if self.ln_final is None else [self.ln_final.scale]
        for block in self.blocks:
            tensors += [block.resid_pre, block.resid_mid, *block.attn.frozen]
            tensors += [norm.scale for norm in block.norms]
            names = ("pre", "pre_linear", "ln_scale", "experts", "share", "factor")
            parts = (block.mlp, block.shared)
            tensors += [getattr(part, name, None) for part in parts for name in names]
        # Views of one storage count once.
        storages = {t.untyped_storage().data_ptr(): t for t in tensors if t is not None}
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    def tensors(self, scores: bool = True, experts: bool = True) -> tuple[Tensor, ...]:
        """The tensors that others could write to: the logits, then the weights.

        Args:
            scores: Whether to include W_E and the weights of queries and keys, which only some
                lenses have.
            experts: Whether to include the experts of mixtures, not all of which were reached.

        Returns:
            The logits as the model returned them, and every weight that the lens reads.
        """
        weights: list[Any] = [self.unembed.weights]
        weights += [self.embed_weights, *self.known_scores] if scores else []
        for block in self.blocks:
            mlp = None if isinstance(block.mlp, Experts) and not experts else block.mlp
            parts = (block.attn, mlp, block.shared, *block.norms)
            weights += [getattr(part, "weights", None) for part in parts]
        weights.append(getattr(self.ln_final, "weights", None))
        return self.logits, *(tensor for owner in weights for tensor in _tensors(owner))

    def prompt(self, index: int) -> Capture:
        """One prompt of the batch without its padding. Exact, as real tokens never read padding.

        Args:
            index: The prompt's index in the batch.

        Returns:
            A capture of batch size 1, whose tensors are views of this one's.
        """
        return self.picked(pick_prompts(index, self.frame.batch, "capture.prompt", "its tensors"))

    def picked(self, rows: Sequence[int]) -> Capture:
        """Some prompts of the batch, without the positions that are padding in all of them.

        Args:
            rows: The prompts' indices in the batch, at least one.

        Returns:
            A capture of those prompts. Its tensors are views of this one's if rows are neighbours.
        """
        spans = [self.frame.spans[row] for row in rows]
        start, stop = min(span[0] for span in spans), max(span[1] for span in spans)
        one: Any = list(rows)
        if one == list(range(one[0], one[-1] + 1)):
            one = slice(one[0], one[-1] + 1)
        pos, spans = slice(start, stop), tuple((a - start, b - start) for a, b in spans)
        frame = replace(self.frame, spans=spans, n_pos=stop - start)
        prompts = self.prompts.picked(one, pos, spans)

        def cut(value: Any, name: str = "") -> Any:
            if isinstance(value, Frame):
                return frame
            if isinstance(value, tuple):
                return tuple(cut(part) for part in value)
            if isinstance(value, Mapping):
                return {key: cut(part) for key, part in value.items()}
            if isinstance(value, Tensor):
                # Most tensors are [batch, pos, …]; those of attention have heads in between.
                if name == "pattern":  # [batch, head, query_pos, key_pos]
                    return value[one, :, pos, pos]
                if name in ("queries", "keys"):  # [batch, head, d_score, pos]
                    return value[one, ..., pos]
                if value is self.logits and self.logits.ndim == 2:  # one prediction per prompt
                    return value[one]
                return value[one, pos]
            if value is self or isinstance(value, _OF_THE_RUN):
                names = [f.name for f in fields(value) if f.name != "weights"]
                return replace(value, **{name: cut(getattr(value, name), name) for name in names})
            return value

        return replace(cut(self), prompts=prompts)

    def until(self, site: str) -> Capture:
        """The run up to a residual site. The residual there is its final one, and has no norm.

        Args:
            site: Name of a site that the run has; see ``FrozenTransformer.site_index``.

        Returns:
            A capture of the blocks below the site, whose tensors are those of this one.
        """
        if site == FINAL_SITE:
            return self
        layer, where = site_parts(site)
        layer += where == "post"
        blocks = self.blocks[:layer]
        if where == "mid":
            block = self.blocks[layer]
            state, edits = block.resid_mid, block.mid_edits
            none = dict.fromkeys(("resid_mid", "mlp", "shared", "mid_norm"))
            ends = {"mid_edits": (), "post_edits": edits, "post_norm": block.mid_norm}
            blocks = (*blocks, replace(block, **none, **ends))
        else:
            state = self.resid_final if layer == len(self.blocks) else self.blocks[layer].resid_pre
        ends = {"resid_final": state, "ln_final": None, "final_edit": None}
        return replace(self, blocks=blocks, **ends, unembed=replace(self.unembed, final=state))

    def mapped(
        self, change: Callable[[Tensor], Tensor], device: torch.device | None = None
    ) -> Capture:
        """The same run on other tensors, without a graph.

        Args:
            change: Function that makes the new tensor of an old one. It is called once for each.
            device: Where the new tensors are; None for where the old ones are.

        Returns:
            The capture of the new tensors, weights included.
        """
        known: dict[int, Tensor] = {}

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) not in known:
                    known[id(value)] = change(value)
                return known[id(value)]
            if isinstance(value, Frame):
                return replace(value, device=device or value.device, graph=False)
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            if isinstance(value, Mapping):
                return {key: changed(part) for key, part in value.items()}
            if is_dataclass(value) and not isinstance(value, type):
                held = vars(value)  # the stand-in of weights that were not loaded holds none
                names = [f.name for f in fields(value) if f.name in held]
                parts = {name: changed(held[name]) for name in names}
                return replace(value, **parts) if parts else value
            return value

        return changed(self)

    def with_convention(self, convention: Convention) -> Capture:
        """The same run under another convention. Nothing is run again.

        Args:
            convention: The new choices.

        Returns:
            A capture that shares every tensor with this one.
        """

        def converted(part: Any) -> Any:
            gated = isinstance(part, GatedMLP | Experts)
            return replace(part, convention=convention.gate) if gated else part

        blocks = (replace(b, mlp=converted(b.mlp), shared=converted(b.shared)) for b in self.blocks)
        return replace(self, blocks=tuple(blocks), convention=convention)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a dataclass of weights, nested ones included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):  # one tensor per expert
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for part in vars(value).values():
            yield from _tensors(part)


_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance(*dtypes: torch.dtype) -> float:
    """Relative error at which what a run did and what its operator computes are two things.

    Hosts compute norms in float32 inside float64 models, which alone costs 1e-7.

    Args:
        *dtypes: Dtypes of the model and of the computation. The coarsest decides.

    Returns:
        The largest relative error that is rounding.
    """
    return max(_TOLERANCE.get(dtype, 1e-4) for dtype in dtypes)


class CaptureMismatchError(ValueError):
    """The operator would compute something else than the run did. The message says where.

    Example:
        >>> from tensorlens_tl import CaptureMismatchError, demo
        >>> model = demo.load_model()
        >>> swap_heads = lambda pattern, hook: pattern.flip(1)
        >>> with model.hooks([("blocks.1.attn.hook_pattern", swap_heads)]):
        ...     _, lens = model.run_with_tensorlens("The capital of France is")
        >>> try:  # query and key edges need the pattern that W_Q and W_K give
        ...     lens.attribute("Paris", by="edge", qk=True)
        ... except CaptureMismatchError:
        ...     print("refused")
        refused
    """
