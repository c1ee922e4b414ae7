"""From what a user passes to the adapter of a host."""

from __future__ import annotations

from typing import Any

from .adapter import Adapter
from .bridge import BridgeAdapter
from .hooked_transformer import HookedTransformerAdapter
from .supported import UnsupportedArchitectureError


def adapt(model: Any) -> Adapter:
    """The adapter of a TransformerLens model.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.

    Returns:
        A fresh adapter; it holds references to the weights.

    Raises:
        UnsupportedArchitectureError: If it is neither, or has a part that cannot be frozen.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if "HookedTransformer" in names:
        return HookedTransformerAdapter(model)
    if any("TransformerBridge" in name for name in names):
        return BridgeAdapter(model)
    raise UnsupportedArchitectureError(
        f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}; a "
        "Hugging Face model is wrapped by tensorlens_tl.capture where the Bridge is installed"
    )


_BRIDGE = "_tensorlens_bridge"


def hosted(model: Any, tokenizer: Any = None) -> Any:
    """A model of TransformerLens's as it is; a Hugging Face model wrapped (see :func:`wrap`).

    Args:
        model: As for :func:`capture`.
        tokenizer: For a Hugging Face model only.

    Returns:
        The host.

    Raises:
        ValueError: If a host is given a tokenizer.
    """
    # On the class first: a Bridge gathers its hook points at every look.
    hooked = hasattr(type(model), "hook_dict") or hasattr(model, "hook_dict")
    if not hooked and hasattr(model, "config"):
        return wrap(model, tokenizer)
    if tokenizer is not None:
        raise ValueError("tokenizer is for Hugging Face models only: this host has its own")
    return model


def wrap(model: Any, tokenizer: Any = None) -> Any:
    """Wrap a Hugging Face causal language model as a TransformerBridge, in place.

    The Bridge replaces submodules of the model it wraps, and attention is set to "eager": use the
    returned Bridge from then on. A model is wrapped once; a second call returns the same Bridge.

    Args:
        model: A ``transformers`` model.
        tokenizer: Its tokenizer; needed for text prompts.

    Returns:
        The Bridge.

    Raises:
        ValueError: If the installed transformer_lens has no Bridge.
        UnsupportedArchitectureError: If the model cannot be frozen; it is then left as it was.
    """
    from .supported import SUPPORTED, UnsupportedArchitectureError, refusal

    if (bridge := vars(model).get(_BRIDGE)) is not None:
        if tokenizer is not None:
            bridge.tokenizer = tokenizer
        return bridge
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError:
        raise ValueError(
            f"a Hugging Face model ({type(model).__name__}) needs TransformerBridge, expected "
            "transformer_lens ≥ 3: upgrade it, or load a HookedTransformer"
        ) from None
    name = type(model).__name__
    if name not in SUPPORTED:  # before anything of the model is replaced
        raise UnsupportedArchitectureError(refusal(name, "this architecture is not tested"))
    model.set_attn_implementation("eager")
    bridge = build_bridge_from_module(model, name, hf_config=model.config, tokenizer=tokenizer)
    vars(model)[_BRIDGE] = bridge  # beside the submodules, not among them
    return bridge
