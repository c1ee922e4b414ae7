"""Hook points of the hosts: their names, and hooks of the user's own there.

Names are those of TransformerLens, without the number of the block. Both host classes know them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn

from ..graph import EMBED_NORM_BIAS, FINAL_SITE, SOURCES, resid_site
from ..maps import NormWeights, version
from ..operator import Prompts
from ..sublayers import ModelWeights
from .module_tree import SPLICED

Read = tuple[int | None, str]
"""What is read, and in which layer: (3, "pattern"), (None, "embed")."""

LAYER_HOOKS = {
    "pattern": "attn.hook_pattern",
    "scores": "attn.hook_attn_scores",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "rot_q": "attn.hook_rot_q",
    "rot_k": "attn.hook_rot_k",
    "q_normed": "attn.hook_q_normed",
    "k_normed": "attn.hook_k_normed",
    "cos": "attn.hook_cos",
    "sin": "attn.hook_sin",
    "pre": "mlp.hook_pre",
    "pre_linear": "mlp.hook_pre_linear",
    "post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "mlp.ln.scale": "mlp.ln.hook_scale",
    "q_norm.scale": "attn.q_norm.hook_scale",
    "k_norm.scale": "attn.k_norm.hook_scale",
    "q_latent.scale": "attn.q_a_layernorm.hook_scale",
}
"""Hook point of each activation of a block that the library may read."""

MLP_OUT = "hook_mlp_out"
"""Hook point of what an MLP adds to the residual, without the number of the block."""

NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
"""The norms of a block beside its residual."""

# What the MLP reads. A Bridge has hook_resid_mid beside the residual, so it is one of these, too.
_MLP_IN = (
    "hook_mlp_in",
    "hook_resid_mid",
    "ln2.hook_in",
    "ln2.hook_normalized",
    "ln2.hook_out",
    "mlp.hook_in",
    "mlp.in.hook_in",
)
EDITS = {
    "resid_pre": ("hook_resid_pre",),
    "v": (
        "ln1.hook_in",
        "ln1.hook_normalized",
        "ln1.hook_out",
        "attn.hook_in",
        "attn.v.hook_in",
        "attn.hook_v",
    ),
    "z": ("attn.hook_z",),
    "attn_out": (
        "hook_attn_out",
        "attn.hook_result",
        "attn.o.hook_out",
        "attn.hook_out",
        "ln1_post.hook_in",
        "ln1_post.hook_normalized",
        "hook_resid_mid",
    ),
    "pre": (*_MLP_IN, "mlp.gate.hook_in", "mlp.hook_pre"),
    "pre_linear": (*_MLP_IN, "mlp.hook_pre_linear"),
    "post": ("mlp.hook_mid", "mlp.ln.hook_normalized", "mlp.hook_post"),
    "mlp_out": (
        "hook_mlp_out",
        "mlp.out.hook_out",
        "mlp.hook_out",
        "ln2_post.hook_in",
        "ln2_post.hook_normalized",
        "hook_resid_post",
    ),
}
"""Hook points of a block whose edits become constants, by the stage at which they are seen."""

FINAL_EDITS = ("ln_final.hook_in", "ln_final.hook_normalized", "ln_final.hook_out", FINAL_SITE)
"""Hook points after the last block whose edits become a constant."""


_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_first_come = threading.Lock()


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """Wait until no other thread of the library runs this model or has hooks in it.

    A thread that is alone with a model may be so again inside.

    Args:
        model: A host model, or the model that a Bridge wraps.
    """
    inner = getattr(model, "original_model", model)
    if not isinstance(inner, nn.Module):  # refused inside
        yield
        return
    with _first_come:
        lock = _locks.setdefault(inner, threading.RLock())
    with lock:
        yield


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Make a hook that passes over what the user runs beside it in another thread."""
    thread = threading.get_ident()

    def only(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == thread else None

    return only


def host_names(names: tuple[str, ...], norms: Mapping[str, str]) -> dict[str, str]:
    """Translate names of hook points into the host's, without those of norms that it has not.

    A norm that two branches share is an edit of each: under its own name in either.

    Args:
        names: Names of hook points, without the block.
        norms: The host's name of each norm of :data:`NORMS` that the block has.

    Returns:
        The host's names by ours.
    """
    parts = {name: name.partition(".") for name in names}
    return {
        name: f"{norms.get(head, head)}{dot}{rest}"
        for name, (head, dot, rest) in parts.items()
        if head not in NORMS or head in norms
    }


def edited_points(hooks: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Find hook points that carry hooks of the user's own.

    Args:
        hooks: All hook points of the host, by name.
        names: Full names of the hook points in question; the host may lack some.

    Returns:
        The hook points with such hooks, by name.
    """
    found = {name: hooks.get(name) for name in names}
    return {name: p for name, p in found.items() if p is not None and _is_edited(p)}


def edited_labels(
    hooks: Mapping[str, Any], prefix: str, names: Mapping[str, str]
) -> tuple[str, ...]:
    """Label the hook points of one stage that carry hooks of the user's own.

    Args:
        hooks: All hook points of the host, by name.
        prefix: Beginning of the full names, such as "blocks.3.".
        names: The host's names of the hook points, by ours.

    Returns:
        Our names of the hook points, without "attn." and "mlp.".
    """
    points: dict[int, str] = {}  # a hook point of the Bridge has several names
    for name, own in names.items():
        point = hooks.get(prefix + own)
        if point is not None and (_is_edited(point) or is_spliced(hooks, prefix + own)):
            points.setdefault(id(point), name.removeprefix("attn.").removeprefix("mlp."))
    return tuple(points.values())


def foreign_hooks(hooks: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Name all hook points and modules that carry forward hooks of the user's own.

    Args:
        hooks: All hook points of the host, by name.
        model: The host model, whose modules may carry torch's own hooks.

    Returns:
        Names of the hook points and modules, each once.
    """
    points = {id(p): name for name, p in hooks.items() if _is_edited(p) or is_spliced(hooks, name)}
    for name, module in model.named_modules():
        own = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # Functions that are written in C, such as list.append, have no module.
        names = (getattr(getattr(hook, "func", hook), "__module__", None) for hook in own)
        made_by = {(name or "").split(".")[0] for name in names}
        if made_by - {"transformer_lens", "transformers", "tensorlens_tl"}:
            points.setdefault(id(module), name)
    return list(points.values())


def is_spliced(hooks: Mapping[str, Any], name: str) -> bool:
    """Whether an SAE of SAELens stands in place of a hook point."""
    return f"{name}.{SPLICED}" in hooks


def _is_edited(point: Any) -> bool:
    """Whether hooks stand at a hook point that the host did not put there itself."""

    # transformer_lens 4 gives OPT's MLP back its shape by permanent hooks of its own.
    def own(handle: Any) -> bool:
        made_by = getattr(getattr(handle, "user_hook", None), "__module__", None) or ""
        return handle.is_permanent and made_by.startswith("transformer_lens")

    return any(not own(handle) for handle in point.fwd_hooks)


class HookReader:
    """What an adapter finds at hook points: what enters block 0, and hooks of the user's own."""

    model: Any
    cfg: Any
    hooks: dict[str, Any]
    read_at: int | None
    weights: ModelWeights

    def norm_names(self, block: Any) -> dict[str, str]:
        """What the host calls each of a block's norms."""
        return dict(zip(NORMS, NORMS, strict=True))

    def norm_point(self, layer: int | None, norm: str, at: str) -> dict[Read, str]:
        """Where a norm's scale passes, or else what enters the norm, which tells the scale."""
        if f"{at}.hook_scale" in self.hooks or f"{at}.hook_in" not in self.hooks:
            return {(layer, f"{norm}.scale"): f"{at}.hook_scale"}
        return {(layer, f"{norm}.in"): f"{at}.hook_in"}

    # --- What enters block 0

    @property
    def source_hooks(self) -> dict[str, str | nn.Module]:
        """Hook points, or modules, at which the sources of what enters block 0 pass, by source.

        A norm between the sources and block 0 is :meth:`embed_norm`.
        """
        names: dict[str, str | nn.Module] = {"embed": "hook_embed"}
        kind = getattr(self.cfg, "positional_embedding_type", "standard")
        if kind == "standard" and self.read_at is None:
            names["pos_embed"] = "hook_pos_embed"
        return names

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources of what enters block 0 in a run on token ids."""
        norm = self.embed_norm()
        bias = norm is not None and norm.b is not None
        return (*self.source_hooks, *([EMBED_NORM_BIAS] if bias else []))

    def embed_norm(self) -> NormWeights | None:
        """The norm that the sources pass before block 0; None where they are read after it."""
        return None

    def sources_of(
        self, seen: Mapping[str, Tensor], prompts: Prompts, kwargs: Mapping[str, Any]
    ) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """Give the sources of what enters block 0 in a run, which sum to it.

        No source is a remainder: each is what its module gave, or is computed by that module. The
        recorder compares the sum with what entered.

        Args:
            seen: What passed at :attr:`source_hooks` in the run, by source; a hook that did not
                fire is missing.
            prompts: Tokens of the run.
            kwargs: Arguments of the run.

        Returns:
            The sources by name; see ``SOURCES`` for the names.

        Raises:
            ValueError: If no source was seen.
        """
        if prompts.soft_prompt is not None:
            rows = seen.get("embed", prompts.given)  # BLOOM's hook is behind a norm, and fires
            others = {name: part for name, part in seen.items() if name != "embed"}
            seen = others | prompts.by_source(rows)
        if not seen:
            raise ValueError(
                "The model ran without exposing its embeddings (the host ran something else than "
                "its blocks). Run the whole model, with no module replaced."
            )
        return {name: seen[name] for name in SOURCES if name in seen}

    @property
    def n_types(self) -> int:
        """Number of token types that have embeddings of their own."""
        return 0

    @property
    def attends_ahead(self) -> bool:
        """Whether a token reads later tokens, as in an encoder."""
        return getattr(self.cfg, "attention_dir", "causal") == "bidirectional"

    def residual_hooks(self, layer: int) -> dict[str, str]:
        """Find where a block's residual passes.

        Args:
            layer: Number of the block.

        Returns:
            Names of hook points, by what passes there: "resid_pre", "resid_mid" and "resid_post".
            Where norms read the sums, "mid_sum" and "post_sum" in place of "resid_mid".
        """
        block = self.weights.blocks[layer]
        names = ("pre", "post") if block.mlp is None or block.parallel else ("pre", "mid", "post")
        return {f"resid_{name}": resid_site(layer, name) for name in names}

    def added_after(self, layer: int, prompts: Prompts, like: Tensor) -> tuple[str, Tensor] | None:
        """What the model itself adds to the residual after a block, beside its sublayers.

        Args:
            layer: Number of the block.
            prompts: Tokens of the run.
            like: A residual of the run [batch, pos, d_model].

        Returns:
            The name of the constant, and its value [batch, pos, d_model]; None where it is nothing.
        """
        return None

    def not_recomputed(self, kwargs: Mapping[str, Any]) -> str:
        """Why patterns of a run with these arguments cannot be made again; "" if they can."""
        return ""

    def described(self, prompts: Prompts, kwargs: Mapping[str, Any]) -> Prompts:
        """Name the rows of a run as far as the run tells what they are."""
        return prompts

    # --- Hooks of the user's own

    def hooked_patterns(self) -> dict[str, nn.Module]:
        """Hook points of scores and patterns that carry hooks of the user's own."""
        names = (LAYER_HOOKS["scores"], LAYER_HOOKS["pattern"])
        layers = range(len(self.model.blocks))
        return edited_points(self.hooks, [f"blocks.{at}.{name}" for at in layers for name in names])

    def foreign_hooks(self) -> list[str]:
        """Names of the hook points and modules that carry hooks of the user's own."""
        return foreign_hooks(self.hooks, self.model)

    def edits(self) -> dict[Read, tuple[str, ...]]:
        """Find where hooks of the user's own may edit the run.

        Returns:
            Labels of the hook points, by (layer, stage); see ``hook_points.EDITS``.
        """
        spliced = any(name.endswith(f".{SPLICED}") for name in self.hooks)
        if not spliced and not any(point.fwd_hooks for point in self.hooks.values()):
            return {}
        found: dict[Read, tuple[str, ...]] = {(None, "normalized"): self._final_edits()}
        for layer, block in enumerate(self.model.blocks):
            own = self.norm_names(block)
            for stage, names in EDITS.items():
                found[layer, stage] = edited_labels(
                    self.hooks, f"blocks.{layer}.", host_names(names, own)
                )
        return {read: labels for read, labels in found.items() if labels}

    def edit_suffix(self, layer: int | None, labels: Sequence[str]) -> str:
        """How the constant of an edit ends: "[sae]" if one spliced SAE made it, else "[user]"."""
        start = "" if layer is None else f"blocks.{layer}."
        names = [f"{start}{inside}{labels[0]}" for inside in ("", "attn.", "mlp.")]
        spliced = len(labels) == 1 and any(is_spliced(self.hooks, name) for name in names)
        return "[sae]" if spliced else "[user]"

    def _final_edits(self) -> tuple[str, ...]:
        if self.weights.unembed.head is not None:  # these hook points are inside the head
            return ()
        return edited_labels(self.hooks, "", host_names(FINAL_EDITS, {}))


def with_graph(point: Any) -> list[Any]:
    """Have a norm compute the scale that it shows so that autograd follows it.

    A Bridge does that only where one of the host's own hooks listens.

    Args:
        point: The hook point of a scale.

    Returns:
        Handles of a hook that does nothing, to be removed after the run.
    """
    if not hasattr(point, "add_hook"):
        return []
    point.add_hook(lambda tensor, hook: None)
    handle = point.fwd_hooks[-1]
    return [handle.hook, SimpleNamespace(remove=lambda: point.fwd_hooks.remove(handle))]


def refuse_edits(name: str, point: nn.Module) -> list[Any]:
    """Refuse edits at a hook point of scores or patterns: a recomputed pattern would lack them.

    Args:
        name: Name of the hook point.
        point: The hook point, which carries hooks of the user's own.

    Returns:
        Handles to remove. While they are there, an edit raises a ValueError.
    """
    seen: list[tuple[Tensor, int]] = []

    def before(module: Any, args: Any) -> None:
        seen[:] = [(args[0], version(args[0]))]

    def after(module: Any, args: Any, output: Tensor) -> None:
        (given, was), same = seen.pop(), None
        if output is not given:  # equal, or not a number in both
            same = output.shape == given.shape and ((output == given) | (given != given)).all()
        if version(given) != was or not (same is None or bool(same)):
            raise ValueError(
                f"A hook of your own edits {name}, and a pattern that is recomputed from queries "
                'and keys would not have that edit. Use pattern="stored".'
            )

    return [point.register_forward_pre_hook(before), point.register_forward_hook(after)]


def norm_eps(norm: Any) -> float | None:
    """The ε that a host's norm adds to the variance; None where it shows none."""
    norm = getattr(norm, "original_component", norm)
    found = getattr(norm, "variance_epsilon", None)
    found = getattr(norm, "eps", None) if found is None else found
    return None if found is None else float(found)
