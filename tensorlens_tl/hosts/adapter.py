"""What the library asks of a host model, whichever class it is.

An adapter reads a TransformerLens model and answers five questions in framework-free terms:

1. What are the weights? (:class:`ModelWeights`)
2. Where is each activation to be read? (:meth:`Adapter.points`, names in ``hook_points``)
3. How are attention scores computed? (:meth:`Adapter.recomputed_reading`, :class:`ScoreWeights`)
4. What are the tokens? (:class:`Prompts`)
5. How is the model run?

It never edits the run. The two classes of hosts are in ``hooked_transformer`` and ``bridge``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..checks import token_text
from ..graph import FINAL_SITE
from ..maps import NormWeights
from ..operator import Prompts
from ..readers import (
    LAYER_HOOKS,
    AttentionReader,
    HookReader,
    Mixture,
    ModuleTree,
    QueryKeyWeights,
    Read,
    RecomputedReading,
    alone,
    score_weights,
)
from ..refusals import (
    NotRecomputableError,
    UnsupportedArchitectureError,
    activation_name,
    check_weights,
    refusal,
)
from ..sublayers import (
    BlockWeights,
    EmbedWeights,
    GatedMLPWeights,
    MLPWeights,
    ModelWeights,
    Rotation,
    ScoreWeights,
    UnembedWeights,
)
from .tokens import prepare

_NORMS_AFTER = (
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "Exaone4ForCausalLM",
    "FlexOlmoForCausalLM",
)
"""Architectures whose norms follow the sublayers; transformer_lens 3 names them as if before."""


class Adapter(HookReader, ABC):
    """What the rest of the library needs of a host model. One subclass per host class.

    Args:
        model: The host model.
    """

    forbidden = (
        "return_type",
        "loss_per_token",
        "start_at_layer",
        "stop_at_layer",
        "past_kv_cache",
        "past_key_values",
        "use_cache",
        "names_filter",
        "inputs_embeds",
        "logits_to_keep",
    )
    """Keyword arguments that would make the run something else than prompt → logits."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Arguments that the host knows by another name, and that name."""

    before_edits: frozenset[str] = frozenset()
    """What is read before the user's own hooks at its point, as they do not enter the residual."""

    embed_norm_hook = "embed_ln.hook_scale"
    """Where the scale of the norm of the sources passes, in a model that has one."""

    read_at: int | None = None
    """The row at which a classifier is read, or a model without a head; None for every row."""

    of_pictures = False
    """Whether the model reads pictures or sounds, whose rows are patches."""

    headless = False
    """Whether the model has no head, and returns its final normalized residual."""

    raw_factor: float = 1.0
    """What the host multiplies logits by after its unembedding and before their soft cap."""

    split_flags: ClassVar[tuple[str, ...]] = (
        "use_split_qkv_input",
        "use_attn_in",
        "ungroup_grouped_query_attention",
    )
    """Flags of a host under which each head has inputs, or keys and values, of its own."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.cfg: Any = model.cfg
        self.tree = ModuleTree.of(model)
        self.hooks: dict[str, Any] = self.tree.hooks
        check_weights(self.tree.owners)
        self.check_model()
        if len(self.model.blocks) == 0:
            raise UnsupportedArchitectureError(refusal(self.name, "it has no blocks"))
        self.attention = tuple(self.attention_reader(block) for block in self.model.blocks)
        """How the attention of every block is read, and frozen from what is read."""
        self.weights = ModelWeights(
            tuple(map(self.block_weights, self.model.blocks, self.attention)),
            self.final_norm(),
            self.unembed_weights(),
        )

    # --- What differs between the hosts

    @abstractmethod
    def check_model(self) -> None:
        """Refuse what cannot be frozen, by name."""

    @abstractmethod
    def norm_weights(self, norm: nn.Module | None) -> NormWeights | None:
        """A norm's affine part in the canonical form; None where there is no norm."""

    @abstractmethod
    def attention_reader(self, block: Any) -> AttentionReader:
        """How the attention of a block is read, with its weights in the canonical layout."""

    @abstractmethod
    def block_weights(self, block: Any, attention: AttentionReader) -> BlockWeights:
        """A block's weights in the canonical layout."""

    @abstractmethod
    def unembed_weights(self) -> UnembedWeights:
        """The unembedding in the canonical layout."""

    @abstractmethod
    def recomputed_reading(self) -> RecomputedReading:
        """Tell what to read of attention to compute its patterns again, and how scores are made.

        Returns:
            The reading of every block's queries and keys.

        Raises:
            NotRecomputableError: If hooks do not show all that the scores are computed from.
        """

    @abstractmethod
    def mixture(self, layer: int) -> Mixture:
        """The reader of the mixture of experts in a block."""

    @abstractmethod
    def query_key_weights_of(self, attn: Any) -> QueryKeyWeights:
        """W_Q, b_Q, W_K and b_K of the host's attention module, in the canonical layout."""

    @abstractmethod
    def rotations(self, n_pos: int) -> Sequence[Rotation | None] | None:
        """Cosines and sines by which every block rotates queries and keys.

        Args:
            n_pos: Number of positions that are needed.

        Returns:
            One rotation per block, or None for a block that does not rotate; None in place of
            all where the model rotates by tables that are not found.
        """

    def norm_names(self, block: Any) -> dict[str, str]:
        """What the host calls each of a block's norms."""
        if self.architecture in _NORMS_AFTER and getattr(block, "ln1_post", None) is None:
            return {"ln1_post": "ln1", "ln2_post": "ln2"}
        return super().norm_names(block)

    def norm(self, block: Any, which: str) -> nn.Module | None:
        """A norm of a block of the host: "ln1", "ln1_post", "ln2" or "ln2_post"."""
        return getattr(block, self.norm_names(block).get(which, ""), None)

    def mlp_entry(self, block: Any) -> nn.Module:
        """The module that is given what a block's MLP reads."""
        # OPT's blocks have no module of their MLP: the Bridge puts the block itself there.
        part = getattr(block.mlp, "original_component", None)
        apart = part is None or part is not getattr(block, "original_component", None)
        return block.mlp if apart else getattr(block.mlp, "in")

    def final_norm(self) -> NormWeights | None:
        """The norm after the last block; None where there is none."""
        return self.norm_weights(getattr(self.model, "ln_final", None))

    @property
    def readout(self) -> nn.Module:
        """The module that reads the final residual: the unembedding, or a head before it."""
        has_head = self.weights.unembed.head is not None
        return self.model.mlm_head if has_head else self.model.unembed

    def require_next_token(self, asked: str) -> None:
        """Refuse a question about the next token to a model that predicts masked ones.

        Raises:
            UnsupportedArchitectureError: If the model has such a head.
        """
        if self.weights.unembed.head is not None:
            what = "predicts masked tokens. Call lens.attribute(token, pos=...) at a mask."
            if not self.attends_ahead:
                what = "has a head before its unembedding. Call lens.attribute(token)."
            raise UnsupportedArchitectureError(
                f"{asked} reads what a model predicts after a prompt, and {self.name} {what}"
            )

    def norms_of(self, block: Any) -> Callable[[str], NormWeights | None]:
        own = self.norm_names(block)
        return lambda which: self.norm_weights(getattr(block, own.get(which, ""), None))

    def embed_weights(self) -> EmbedWeights | None:
        """The embedding matrix and, where the host has one, the norm that its rows pass."""
        if (W_E := getattr(self.model, "W_E", None)) is None:
            return None
        norm = getattr(self.model, "embed_ln", None) or getattr(self.model.embed, "ln", None)
        return EmbedWeights(W_E, self.norm_weights(norm))

    def score_weights(
        self, n_pos: int, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[ScoreWeights, ...] | str:
        """What the attention scores of every block are made of, by reference.

        Nothing of a run is read for it. The run still tells whether the layout is right: the
        pattern recomputed from it must be the captured one (``QueryKey``).

        Args:
            n_pos: Number of positions for which rotations are needed.
            kwargs: Arguments of the run.

        Returns:
            One entry per block, or the reason why it is not known how scores were computed.
        """
        try:
            return tuple(score_weights(self, n_pos, (kwargs or {}).get("position_ids")))
        except NotRecomputableError as error:
            return error.cause
        except UnsupportedArchitectureError as error:  # such as a LoRA adapter
            reason = str(error).split(". ")[0].removeprefix("Cannot freeze ")
            return reason.replace(" exactly:", ":")

    @property
    def turns_neighbours(self) -> bool:
        """Whether the model turns neighbours by tables whose halves are equal."""
        return False

    @property
    def attends_apart(self) -> bool:
        """Whether attention is the wrapped model's own, which shows its pattern when it is done.

        What a hook returns for such a pattern is discarded.
        """
        return False

    @property
    def architecture(self) -> str | None:
        """Hugging Face's name of the model's class, where the host knows it."""
        names = ("architecture", "original_architecture")
        return next((found for name in names if (found := getattr(self.cfg, name, None))), None)

    @property
    def name(self) -> str:
        """The model's name, for people."""
        name = getattr(self.cfg, "model_name", None)
        if name in (None, "custom", "external", ""):
            name = getattr(self.cfg, "architecture", None) or "custom model"
        return str(name)

    def unlike(self, what: str) -> str:
        """Such as "L0 of Qwen3.5 has a gated delta net": the first reader without a property."""
        odd = [(i, r.kind) for i, r in enumerate(self.attention) if not getattr(r, what)]
        return f"L{odd[0][0]} of {self.name} has {odd[0][1]}" if odd else ""

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return int(self.cfg.n_heads)

    @property
    def tokenizer(self) -> Any:
        """The host's tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def dtype(self) -> torch.dtype:
        """The model's own dtype."""
        return self.weights.unembed.W_U.dtype

    def soft_cap(self, name: str = "output_logits_soft_cap") -> float | None:
        """The soft cap of logits or of scores; hosts write −1 or None for none."""
        cap = getattr(self.cfg, name, None)
        return float(cap) if cap is not None and cap > 0 else None

    @property
    def n_ctx(self) -> int:
        """Tokens that a prompt may have: as many as learned positions, or tables of them, hold."""
        return self.cfg.n_ctx

    @property
    def act_fn(self) -> str:
        """The activation's name in the host's words."""
        return self.cfg.act_fn

    def activation(self, act: str | None = None) -> str:
        """This library's name of an activation; by default of that of the model's MLPs."""
        return activation_name(self.act_fn if act is None else act)

    def mlp_points(self, layer: int) -> dict[str, nn.Module]:
        """Modules that show what an MLP without hooks computes; empty where hooks show it."""
        return {}

    def points(self, attention: tuple[str, ...] = ("pattern",)) -> dict[Read, nn.Module]:
        """Find the hook point where each needed activation passes.

        Args:
            attention: Names of what is read of attention beside values and z.

        Returns:
            The hook points, or modules, by what passes there.

        Raises:
            ValueError: If the host has no such hook point.
        """
        modules: dict[Read, nn.Module] = {}
        names: dict[Read, str] = {}
        for key, at in self.source_hooks.items():
            if isinstance(at, str):
                names[None, key] = at
            else:
                modules[None, key] = at
        if self.embed_norm() is not None and self.embed_norm_hook in self.hooks:
            names[None, "embed_ln.scale"] = self.embed_norm_hook
        if self.weights.ln_final is not None:
            names |= self.norm_point(None, "ln_final", "ln_final")
        for layer, block in enumerate(self.weights.blocks):
            wanted = list(attention) if self.attention[layer].has_pattern else []
            plain, gated = (isinstance(block.mlp, c) for c in (MLPWeights, GatedMLPWeights))
            wanted += ["pre", "post"] if plain or gated else []
            wanted += ["pre_linear"] if gated else []
            wanted += ["mlp.ln.scale"] if plain and getattr(block.mlp, "ln", None) else []
            shown = {} if block.mlp is None else self.mlp_points(layer)
            modules |= {(layer, key): at for key, at in shown.items()}
            both = ("pre", "pre_linear") if "pre_and_up" in shown else ()
            wanted = [key for key in wanted if key not in (*shown, *both)]
            names |= {(layer, key): f"blocks.{layer}.{LAYER_HOOKS[key]}" for key in wanted}
            for key, at in self.attention[layer].points.items():
                if isinstance(at, str):
                    names[layer, key] = f"blocks.{layer}.{at}"
                else:
                    modules[layer, key] = at
            for norm, own in self.norm_names(self.model.blocks[layer]).items():
                if getattr(block, norm) is not None:
                    names |= self.norm_point(layer, norm, f"blocks.{layer}.{own}")
            names |= {(layer, key): name for key, name in self.residual_hooks(layer).items()}
        hooks = self.hooks
        if missing := [name for name in names.values() if name not in hooks]:
            kind = type(self.model).__name__
            raise ValueError(
                f"{self.name}, a {kind}, has no hook point {', '.join(missing[:3])}. Load the "
                "model as HookedTransformer or TransformerBridge itself, of transformer_lens 2.18 "
                "to 4.x."
            )
        points = {read: hooks[name] for read, name in names.items()} | modules
        for layer, block in enumerate(self.weights.blocks):
            if block.shared is not None:
                points |= {(layer, key): at for key, at in self.mixture(layer).points.items()}
        if self.weights.unembed.soft_cap is not None:
            points[None, "raw_logits"] = self.model.unembed  # the cap comes after this module
        if self._final_edits():  # 2.18 has no hook at the unembedding
            points[None, "normalized"] = hooks.get(FINAL_SITE) or self.model.ln_final
        return points

    def score_points(self) -> dict[Read, nn.Module]:
        """Find where scores and norms of queries and keys pass; only patterns depend on them."""
        keys = ("scores", "q_norm.scale", "k_norm.scale", "q_latent.scale")
        layers, hooks = range(len(self.weights.blocks)), self.hooks
        names = {(at, key): f"blocks.{at}.{LAYER_HOOKS[key]}" for at in layers for key in keys}
        return {read: hooks[name] for read, name in names.items() if name in hooks}

    def prepare(self, inputs: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Prompts]:
        """Check an input and tokenize it.

        Args:
            inputs: A string, a list of strings, token ids [pos] or [batch, pos], or what a
                tokenizer returns. :class:`Prompts` are taken as they are.
            kwargs: Arguments of the model's own forward pass.

        Returns:
            The arguments for :meth:`run`, and the prompts, whose tokens are what is run.

        Raises:
            ValueError: On arguments that change the run or are unknown, an empty prompt, one longer
                than n_ctx, ids outside the vocabulary or padded, or text without a tokenizer.
        """
        return prepare(self, inputs, kwargs)

    def mask(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The attention mask under which the host runs token ids, or None."""
        return kwargs.get("attention_mask")

    def all_real(
        self, ids: Int[Tensor, "row pos"], kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Arguments under which the host takes every token id for a real token.

        Args:
            ids: Token ids without padding.
            kwargs: Other arguments of the run, such as padding_side.

        Returns:
            Keyword arguments for :meth:`run`. They are empty unless the host would mask ids that
            equal the padding token's.
        """
        masked = self.mask(ids, kwargs or {}) is not None
        return {"attention_mask": torch.ones_like(ids)} if masked else {}

    def n_pos_of(self, given: Tensor) -> int:
        """Number of rows that the model makes of each of some prompts without padding."""
        return given.shape[1]

    def token_string(self, token: int) -> str:
        """A token as text; "#" and its id where there is no tokenizer."""
        return token_text(self.tokenizer, token)

    def run(self, inputs: Any, kwargs: Mapping[str, Any]) -> Float[Tensor, "batch pos d_vocab"]:
        """One ordinary forward pass, when no other thread of the library runs the model."""
        kwargs = {self.renamed.get(name, name): value for name, value in kwargs.items()}
        with alone(self.model):
            return self.model(inputs, return_type="logits", **kwargs)
