"""From what a user has to a model that can be captured, and on to its adapter.

wrap         a Hugging Face model → a TransformerBridge
unwrap       a TransformerBridge → the Hugging Face model as it was
as_host      whatever a user passes as ``model`` → a host model
adapt        a host model → its adapter
load_model   a hub name, or a local folder → a host model

Folders need care: ``HookedTransformer.from_pretrained`` refuses them, and some releases read the
architecture off the *path* (any path with "llama" or "gemma" in it). A folder is therefore loaded
through a temporary link of a neutral name.
"""

from __future__ import annotations

import os
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from ..checks import as_device, file_path, kind_of
from .adapter import Adapter
from .bridge import BridgeAdapter
from .encoders import (
    EncoderAdapter,
    PictureAdapter,
    SeeingAdapter,
    embeddings_of,
    normalizes_sums,
    sees_pictures,
)
from .hook_points import alone
from .hooked_transformer import HookedEncoderAdapter, HookedTransformerAdapter
from .supported import UNASKED, UnsupportedArchitectureError
from .wrapping import BEFORE, BRIDGE, ENCODER, build_bridge, give_tokenizer, restore, within_head


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
        if sees_pictures(model):
            return SeeingAdapter(model)
        of = BridgeAdapter if embeddings_of(model) is None else PictureAdapter
        return (EncoderAdapter if normalizes_sums(model) else of)(model)
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


# --- Loading by name ------------------------------------------------------------------------------

KINDS = ("bridge", "hooked")
"""The two classes of host models, as ``load_model`` calls them."""


def load_model(
    name_or_folder: str | os.PathLike[str], kind: str | None = None, **kwargs: Any
) -> Any:
    """Load a TransformerLens model with raw weights (nothing folded or centred), for evaluation.

    Args:
        name_or_folder: A hub name, or a folder with config.json, weights and tokenizer files.
        kind: "bridge" for a ``TransformerBridge`` or "hooked" for a ``HookedTransformer``. By
            default the Bridge where the installed transformer_lens has it.
        **kwargs: Arguments of the host's own loader (``dtype``, ``device``).

    Returns:
        The host model, in evaluation mode.

    Raises:
        ValueError: If the kind is not installed, the folder is no model, or the hub name cannot be
            reached.

    Example:
        >>> import tensorlens_tl
        >>> from tensorlens_tl import demo
        >>> model = tensorlens_tl.load_model(str(demo.model_folder()))
        >>> _, lens = tensorlens_tl.capture(model, "The capital of France is")
        >>> lens.completeness_error < 1e-4
        True
    """
    if kind not in (None, *KINDS):
        raise ValueError(f'kind={kind!r} is no class of host models. Give "bridge" or "hooked".')
    if kwargs.get("device") is not None:
        as_device(kwargs["device"])
    if isinstance(dtype := kwargs.get("dtype"), str):
        kwargs["dtype"] = dtype = vars(torch).get(dtype, dtype)
    if not isinstance(dtype, torch.dtype | None) or (dtype and not dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r} is no dtype of weights. Pass one such as torch.float32.")
    folder = file_path(name_or_folder, "name_or_folder")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is no Hugging Face model folder, as it has no config.json. "
                "Give the folder that save_pretrained wrote."
            )
        with _neutral_link(folder) as link:
            model = _load(link, kind, True, kwargs)
        model.cfg.model_name = folder.resolve().name
        if not any(p for name in ("tokenizer*", "vocab*", "*.model") for p in folder.glob(name)):
            model.tokenizer = None  # transformers makes an empty one, which knows no word
        return model
    check_reachable(str(name_or_folder))
    return _load(str(name_or_folder), kind, False, kwargs)


def _call(load: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> Any:
    """Call a loader; refuse arguments that it does not have, as far as it names them all."""
    _, *known = signature(load).parameters.values()
    wrong = sorted(kwargs.keys() - {parameter.name for parameter in known})
    if wrong and all(parameter.kind != parameter.VAR_KEYWORD for parameter in known):
        names = ", ".join(("kind", *(parameter.name for parameter in known)))
        raise ValueError(
            f"{wrong[0]}={kwargs[wrong[0]]!r} is no argument of load_model or of the host's "
            f"{load.__name__}. Use some of {names}."
        )
    return load(name, **kwargs).eval()


def _load(name: str, kind: str | None, is_folder: bool, kwargs: dict[str, Any]) -> Any:
    if kind != "hooked":
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError:
            if kind == "bridge":
                raise ValueError(
                    'kind="bridge" needs transformer_lens 3 or later, which has TransformerBridge. '
                    'Upgrade transformer_lens, or use kind="hooked".'
                ) from None
        else:
            return _call(TransformerBridge.boot_transformers, name, kwargs)
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        raise ValueError(
            'kind="hooked" needs transformer_lens 2 or 3, which have HookedTransformer. '
            'Install transformer_lens 3, or use kind="bridge".'
        ) from None
    if is_folder:
        return _call(hooked_from_folder, name, kwargs)
    return _call(HookedTransformer.from_pretrained_no_processing, name, kwargs)


@contextmanager
def _neutral_link(folder: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tensorlens-") as temporary:
        link = Path(temporary) / "model"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield str(link)


def check_reachable(name: str, timeout: float = 3.0) -> None:
    """Refuse at once a hub name that can be loaded neither from the hub nor from the cache.

    Args:
        name: Name of a model on the hub.
        timeout: Time to wait for the hub, in seconds.

    Raises:
        ValueError: If the hub does not answer and no downloaded model bears the name.
    """
    if not os.environ.get("HF_HUB_OFFLINE") and _hub_answers(timeout):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # spares six retries of 4 s each
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    last = name.split("/")[-1].lower()
    if not any(last.startswith(p.name.split("--")[-1].lower()) for p in cache.glob("models--*")):
        raise ValueError(
            f"{name!r} is no folder here, and the model hub cannot be reached to download it. "
            "Check name and connection, or pass the path of a Hugging Face model folder."
        )


def _hub_answers(timeout: float) -> bool:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # a server that refuses HEAD is there
        except OSError:
            return
        answers.append(True)

    # A thread, as name resolution has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout)
    return bool(answers)


def hooked_from_folder(folder: str, dtype: Any = None, device: str | None = None) -> Any:
    """Load a HookedTransformer from a Hugging Face folder, which its own loader refuses.

    Args:
        folder: Path of the folder.
        dtype: Dtype of the weights; None is float32.
        device: Device of the model, or None for the host's default.

    Returns:
        The model, with raw weights.

    Raises:
        UnsupportedArchitectureError: If the host cannot make a HookedTransformer of the model.
    """
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = dtype or torch.float32
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    try:
        cfg = loading_from_pretrained.get_pretrained_model_config(
            folder, hf_cfg=hf.config.to_dict(), fold_ln=False, device=device, dtype=dtype
        )
    except NotImplementedError:
        raise UnsupportedArchitectureError(
            f"The HookedTransformer of this transformer_lens has no {type(hf).__name__}. Load it "
            'with kind="bridge" of transformer_lens 3 or later.'
        ) from None
    state = loading_from_pretrained.get_pretrained_state_dict(folder, cfg, hf, dtype=dtype)
    has_tokenizer = any(Path(folder).glob("tokenizer*"))
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    cfg.tokenizer_name = folder if has_tokenizer else None
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    # Not load_and_process_state_dict: it passes through float32 even when nothing is processed.
    model.load_state_dict(model.fill_missing_keys(state), strict=False)
    model.move_model_modules_to_device()
    return model
