"""From what a user has to a model that can be captured, and on to its adapter.

wrap         a Hugging Face model → a TransformerBridge
unwrap       a TransformerBridge → the Hugging Face model as it was
as_host      whatever a user passes as ``model`` → a host model
adapt        a host model → its adapter
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checks import kind_of, spelled
from ..readers import alone
from ..refusals import UnsupportedArchitectureError
from .adapter import Adapter
from .bridge import BRIDGE, UNASKED, BridgeAdapter
from .encoders import ENCODER, post_norm_adapter
from .hooked_transformer import HookedEncoderAdapter, HookedTransformerAdapter
from .pictures import PictureAdapter, embeddings_of
from .seeing import SeeingAdapter, senses
from .tokens import CONVENTION
from .wrapping import BEFORE, build_bridge, give_tokenizer, restore, within_head


def choose_bos(model: Any, bos: bool) -> None:
    """Make ``prepend_bos`` a host model's default, for calls that do not take it.

    Args:
        model: The host model.
        bos: Whether texts begin with BOS.

    Raises:
        ValueError: If the model is an encoder, whose tokenizer adds its own special tokens.
    """
    if "type_embed" in adapt(model).source_hooks:
        raise ValueError(
            f"prepend_bos={bos} is not for an encoder, whose tokenizer adds special tokens. "
            "Leave it out."
        )
    model.cfg.default_prepend_bos = bos
    vars(model).pop(CONVENTION, None)  # the user has chosen


def adapt(model: Any) -> Adapter:
    """Make the adapter of a model.

    Args:
        model: A ``HookedTransformer``, a ``TransformerBridge``, or a Hugging Face model, which is
            wrapped (:func:`wrap`).

    Returns:
        A fresh adapter; it holds references to the weights.

    Raises:
        UnsupportedArchitectureError: If ``model`` is neither, or has a part that cannot be frozen.
        ValueError: If it cannot be captured as it is, such as a Bridge that was unwrapped.
    """
    model = as_host(model)
    names = {cls.__name__ for cls in type(model).__mro__}
    if getattr(model, "__dict__", {}).get(BRIDGE, True) is None:
        raise ValueError(
            f"This {type(model).__name__} was taken off its model by unwrap, and runs no longer. "
            "Use what tensorlens_tl.wrap returns for the model now."
        )
    if "HookedEncoder" in names:
        return HookedEncoderAdapter(model)
    if "HookedTransformer" in names:
        return HookedTransformerAdapter(model)
    if any("TransformerBridge" in name for name in names):
        if senses(model):
            return SeeingAdapter(model)
        of = BridgeAdapter if embeddings_of(model) is None else PictureAdapter
        return (post_norm_adapter(model) or of)(model)
    raise UnsupportedArchitectureError(
        f"model is {kind_of(model)}, which is neither a HookedTransformer nor a "
        "TransformerBridge. Pass one of these, or a Hugging Face causal language model."
    )


def as_host(model: Any, tokenizer: Any = None) -> Any:
    """Return a TransformerLens model as it is, and a Hugging Face model wrapped (:func:`wrap`).

    Args:
        model: A host model, or a ``transformers`` model, as for :func:`tensorlens_tl.capture`.
        tokenizer: Tokenizer of a Hugging Face model; None for a host, which has its own.

    Returns:
        The host model.

    Raises:
        ValueError: If a host is given a tokenizer, or the model is a name, or cannot be captured
            as it is. A Hugging Face model that was not wrapped before is then as it was.
    """
    if isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"model is {str(model)!r}, which is the name of a model. "
            f"Load the model first: tensorlens_tl.load_model({str(model)!r})."
        )
    if not _is_host(model) and hasattr(model, "config"):
        with alone(model):
            fresh = BRIDGE not in vars(model)
            bridge = wrap(model, tokenizer)
            try:
                if fresh:
                    adapt(bridge)
                    vars(bridge)[UNASKED] = partial(unwrap, bridge)
            except ValueError:
                unwrap(model)
                raise
        return bridge
    wrapped = getattr(model, "original_model", None)
    if tokenizer is not None and wrapped is not None and vars(wrapped).get(BRIDGE) is model:
        give_tokenizer(model, tokenizer)
    elif tokenizer is not None:
        raise ValueError(
            f"tokenizer is for Hugging Face models only, and this {type(model).__name__} has its "
            "own. Leave tokenizer out, or set model.tokenizer."
        )
    return model


def _is_host(model: Any) -> bool:
    # On the class first: a Bridge gathers its hook points at every look.
    return hasattr(type(model), "hook_dict") or hasattr(model, "hook_dict")


@spelled
def wrap(model: Any, tokenizer: Any = None) -> Any:
    """Wrap a Hugging Face causal language model as a TransformerBridge, in place.

    The Bridge replaces submodules of the model it wraps, and attention is set to "eager": use the
    returned Bridge from then on, and :func:`unwrap` to have the model back. Once, on a few random
    tokens, the Bridge's logits are compared with the model's. A model is wrapped once; a second
    call returns the same Bridge. A TransformerLens model is returned as it is.

    Args:
        model: A ``transformers`` causal language model.
        tokenizer: Tokenizer of the model; needed for text prompts only.

    Returns:
        The ``TransformerBridge`` around the model.

    Raises:
        ValueError: If the installed transformer_lens has no Bridge, or ``model`` is no model.
        UnsupportedArchitectureError: If the model cannot be frozen, or its Bridge gives other
            logits; it is then left as it was.

    Example:
        >>> import tensorlens_tl
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50)
        >>> bridge = tensorlens_tl.wrap(GPT2LMHeadModel(config).eval())
        >>> _, lens = tensorlens_tl.capture(bridge, [1, 2, 3])
        >>> lens.completeness_error < 1e-4
        True
    """
    if _is_host(model) or not hasattr(model, "config"):
        return adapt(model).model if tokenizer is None else as_host(model, tokenizer)
    with alone(model), torch.inference_mode(False):  # the Bridge has weights of its own
        fresh = BRIDGE not in vars(model)
        bridge = _bridge_around(model) if fresh else vars(model)[BRIDGE]
        vars(bridge).pop(UNASKED, None)  # now the user holds it
        try:
            if tokenizer is not None:
                give_tokenizer(bridge, tokenizer)
        except ValueError:
            if fresh:
                unwrap(model)
            raise
    return bridge


def _bridge_around(encoder: Any) -> Any:
    model = within_head(encoder)
    name = type(model).__name__
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError:
        raise ValueError(
            f"model is a Hugging Face {name}, which needs the TransformerBridge of "
            "transformer_lens 3 or later. Upgrade transformer_lens, or load a HookedTransformer."
        ) from None

    def build() -> Any:
        model.set_attn_implementation("eager")
        return build_bridge_from_module(model, name, hf_config=model.config)

    bridge = build_bridge(model, build)
    if model is not encoder:
        vars(encoder)[BRIDGE], vars(encoder)[BEFORE] = bridge, vars(model)[BEFORE]
    source = str(getattr(encoder, "name_or_path", ""))
    source = source or ("" if model is encoder else type(encoder).__name__)
    bridge.cfg.model_name = Path(source).resolve().name if os.path.isdir(source) else source
    try:
        adapt(bridge)
    except UnsupportedArchitectureError:
        unwrap(encoder)
        raise
    except ValueError:  # a call on the model mends it, such as model.eval()
        pass
    return bridge


@spelled
def unwrap(model: Any) -> Any:
    """Give a Hugging Face model back as it was before :func:`wrap` or :func:`capture`.

    Its submodules, hooks and attention implementation are the model's own again, so that
    ``save_pretrained`` works. Weights keep the values and the place that they have now. The Bridge
    runs no longer; lenses that were captured with it do.

    Args:
        model: The Bridge that :func:`wrap` returned, or the Hugging Face model inside.

    Returns:
        The Hugging Face model.

    Raises:
        ValueError: If the Bridge was made by other means, or its weights have been processed.

    Example:
        >>> import tensorlens_tl
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50)
        >>> bridge = tensorlens_tl.wrap(GPT2LMHeadModel(config).eval())
        >>> model = tensorlens_tl.unwrap(bridge)
        >>> type(model.lm_head).__name__
        'Linear'
    """
    inner = model.original_model if _is_host(model) and hasattr(model, "original_model") else model
    bridge = getattr(inner, "__dict__", {}).get(BRIDGE)
    if bridge is None:
        if not _is_host(model) and hasattr(model, "config"):
            return model  # it is in no Bridge of this library
        raise ValueError(
            f"This {type(model).__name__} was not made by tensorlens_tl.wrap, so its former model "
            "is not known. Load the Hugging Face model again."
        )
    if getattr(bridge, "compatibility_mode", False):
        raise ValueError(
            "enable_compatibility_mode has processed the weights of this model, which are no "
            "longer the ones it had. Load the Hugging Face model again."
        )
    encoder, _ = vars(inner).get(ENCODER, (inner, None))
    restore(vars(inner)[BEFORE])
    vars(bridge)[BRIDGE] = None  # adapt refuses it from now on
    return encoder
