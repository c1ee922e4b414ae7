"""From what a user has to a model that can be captured, and on to its adapter.

    load_model   a hub name or a local Hugging Face folder → a host model
    wrap         a Hugging Face model → a TransformerBridge
    as_host      whatever a user passes as ``model`` → a host model
    adapt        a host model → its adapter

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .bridge import BridgeAdapter
from .hooked_transformer import HookedTransformerAdapter
from .supported import SUPPORTED, UnsupportedArchitectureError, refusal

KINDS = ("bridge", "hooked")
"""The two classes of host models, as ``load_model`` calls them."""

_BRIDGE = "_tensorlens_bridge"
"""Attribute of a Hugging Face model that holds the Bridge around it."""


# --- From what a user passes to the adapter -------------------------------------------------------


def adapt(model: Any) -> Adapter:
    """Make the adapter of a TransformerLens model.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.

    Returns:
        A fresh adapter; it holds references to the weights.

    Raises:
        UnsupportedArchitectureError: If ``model`` is neither, or has a part that cannot be frozen.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if "HookedTransformer" in names:
        return HookedTransformerAdapter(model)
    if any("TransformerBridge" in name for name in names):
        return BridgeAdapter(model)
    raise UnsupportedArchitectureError(
        f"model is a {type(model).__name__}, which is neither a HookedTransformer nor a "
        "TransformerBridge. Pass one of these; wrap a Hugging Face model first: "
        "model = tensorlens_tl.wrap(model, tokenizer)."
    )


@contextmanager
def unsplit(model: Any) -> Iterator[None]:
    """Switch off, for a while, the flags under which each head has inputs of its own.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
    """
    cfg = getattr(model, "cfg", None)
    flags = [flag for flag in Adapter.split_flags if getattr(cfg, flag, False)]
    try:
        for flag in flags:
            getattr(model, f"set_{flag}")(False)
        yield
    finally:
        for flag in flags:
            getattr(model, f"set_{flag}")(True)


def as_host(model: Any, tokenizer: Any = None) -> Any:
    """Return a TransformerLens model as it is, and a Hugging Face model wrapped (:func:`wrap`).

    Args:
        model: A host model, or a ``transformers`` model, as for :func:`tensorlens_tl.capture`.
        tokenizer: Tokenizer of a Hugging Face model; None for a host, which has its own.

    Returns:
        The host model.

    Raises:
        ValueError: If a host is given a tokenizer.
    """
    # On the class first: a Bridge gathers its hook points at every look.
    hooked = hasattr(type(model), "hook_dict") or hasattr(model, "hook_dict")
    if not hooked and hasattr(model, "config"):
        return wrap(model, tokenizer)
    if tokenizer is not None:
        raise ValueError(
            f"tokenizer is for Hugging Face models only, and this {type(model).__name__} has its "
            "own. Leave tokenizer out, or set model.tokenizer."
        )
    return model


def wrap(model: Any, tokenizer: Any = None) -> Any:
    """Wrap a Hugging Face causal language model as a TransformerBridge, in place.

    The Bridge replaces submodules of the model it wraps, and attention is set to "eager": use the
    returned Bridge from then on. A model is wrapped once; a second call returns the same Bridge.

    Args:
        model: A ``transformers`` causal language model.
        tokenizer: Tokenizer of the model; needed for text prompts only.

    Returns:
        The ``TransformerBridge`` around the model.

    Raises:
        ValueError: If the installed transformer_lens has no Bridge.
        UnsupportedArchitectureError: If the model cannot be frozen; it is then left as it was.

    Example:
        >>> import tensorlens_tl
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50)
        >>> bridge = tensorlens_tl.wrap(GPT2LMHeadModel(config).eval())
        >>> _, lens = tensorlens_tl.capture(bridge, [1, 2, 3])
        >>> lens.completeness_error < 1e-4
        True
    """
    if (bridge := vars(model).get(_BRIDGE)) is not None:
        if tokenizer is not None:
            bridge.tokenizer = tokenizer
        return bridge
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError:
        raise ValueError(
            f"model is a Hugging Face {type(model).__name__}, which needs the TransformerBridge of "
            "transformer_lens 3 or later. Upgrade transformer_lens, or load a HookedTransformer."
        ) from None
    name = type(model).__name__
    if name not in SUPPORTED:  # before anything of the model is replaced
        raise UnsupportedArchitectureError(refusal(name, "this architecture is not tested"))
    model.set_attn_implementation("eager")
    bridge = build_bridge_from_module(model, name, hf_config=model.config, tokenizer=tokenizer)
    vars(model)[_BRIDGE] = bridge  # beside the submodules, not among them
    return bridge


# --- Loading by name or folder --------------------------------------------------------------------


def load_model(name_or_folder: str, kind: str | None = None, **kwargs: Any) -> Any:
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
    folder = Path(name_or_folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is no Hugging Face model folder, as it has no config.json. "
                "Give the folder that save_pretrained wrote."
            )
        with _neutral_link(folder) as link:
            model = _load(link, kind, True, kwargs)
        model.cfg.model_name = folder.resolve().name
        return model
    check_reachable(name_or_folder)
    return _load(name_or_folder, kind, False, kwargs)


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
            return TransformerBridge.boot_transformers(name, **kwargs).eval()
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        raise ValueError(
            'kind="hooked" needs transformer_lens 2 or 3, which have HookedTransformer. '
            'Install transformer_lens 3, or use kind="bridge".'
        ) from None
    if is_folder:
        return _hooked_from_folder(name, **kwargs).eval()
    return HookedTransformer.from_pretrained_no_processing(name, **kwargs).eval()


def _hooked_from_folder(folder: str, dtype: Any = None, device: str | None = None) -> Any:
    import torch
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = dtype or torch.float32
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    cfg = loading_from_pretrained.get_pretrained_model_config(
        folder, hf_cfg=hf.config.to_dict(), fold_ln=False, device=device, dtype=dtype
    )
    state = loading_from_pretrained.get_pretrained_state_dict(folder, cfg, hf, dtype=dtype)
    has_tokenizer = any(Path(folder).glob("tokenizer*"))
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    cfg.tokenizer_name = folder if has_tokenizer else None
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    # Not load_and_process_state_dict: it passes through float32 even when nothing is processed.
    model.load_state_dict(model.fill_missing_keys(state), strict=False)
    model.move_model_modules_to_device()
    return model


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
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # a server that refuses HEAD is there
        except OSError:
            return
        answered.set()

    # A thread, as name resolution has no time limit of its own.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(timeout)
