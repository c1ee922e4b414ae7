"""From what a user has to a model that can be captured, and on to its adapter.

    load_model   a hub name or a local Hugging Face folder → a host model
    wrap         a Hugging Face model → a TransformerBridge
    unwrap       a TransformerBridge → the Hugging Face model as it was
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
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ..checks import as_device, file_path, kind_of
from .adapter import Adapter
from .bridge import BEFORE, BRIDGE, BridgeAdapter, build_bridge
from .hook_points import alone
from .hooked_transformer import HookedTransformerAdapter, hooked_from_folder
from .supported import NotFoldedError, UnsupportedArchitectureError, restore
from .tokens import CONVENTION

KINDS = ("bridge", "hooked")
"""The two classes of host models, as ``load_model`` calls them."""

_GIVEN = "_tensorlens_tokenizer"
"""Attribute of a wrapped model: the tokenizer that the user gave, and what it was like then."""


# --- From what a user passes to the adapter -------------------------------------------------------


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
    if "HookedTransformer" in names:
        return HookedTransformerAdapter(model)
    if any("TransformerBridge" in name for name in names):
        return BridgeAdapter(model)
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
        try:
            if tokenizer is not None:
                give_tokenizer(bridge, tokenizer)
        except ValueError:
            if fresh:
                unwrap(model)
            raise
    return bridge


def _bridge_around(model: Any) -> Any:
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
    source = str(getattr(model, "name_or_path", ""))
    bridge.cfg.model_name = Path(source).resolve().name if os.path.isdir(source) else source
    try:
        with suppress(NotFoldedError):  # a call on the Bridge mends it
            adapt(bridge)
    except UnsupportedArchitectureError:
        unwrap(model)
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
    restore(vars(inner)[BEFORE])
    vars(bridge)[BRIDGE] = None  # adapt refuses it from now on
    return inner


# --- The tokenizer of a wrapped model ------------------------------------------------------------


def give_tokenizer(bridge: Any, tokenizer: Any) -> None:
    """Give a wrapped model the user's own tokenizer, under the host's convention.

    The host would load the tokenizer again from where it came from, without what was added to it
    since, and fails where it came from nowhere. Here it gets a copy of the tokenizer as it is, with
    the special tokens that the host needs. The user's own tokenizer is not touched.

    Args:
        bridge: The Bridge that :func:`tensorlens_tl.wrap` made.
        tokenizer: A tokenizer of ``transformers``.

    Raises:
        ValueError: If it is no such tokenizer.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer is {kind_of(tokenizer)}, and not a tokenizer of transformers. Pass "
            "one, such as PreTrainedTokenizerFast(tokenizer_object=...) around a Tokenizer."
        )
    probe = _probe(tokenizer)
    plain, own = (tokenizer.encode(probe, add_special_tokens=s) for s in (False, True))
    about = len(tokenizer), tokenizer.padding_side, str(tokenizer.special_tokens_map), own
    known, before, told, given = vars(bridge).get(_GIVEN, (None,) * 4)
    if known is tokenizer and before == about and bridge.tokenizer is given:
        return
    # 1. What the tokenizer itself puts before and after a text.
    start = next((i for i in range(len(own)) if own[i : i + len(plain)] == plain), 0)
    first, last = own[:start], own[start + len(plain) :]
    # 2. The special tokens that the host needs, in a copy.
    copy, cfg = deepcopy(tokenizer), bridge.cfg
    copy.padding_side = getattr(cfg, "default_padding_side", None) or copy.padding_side or "right"
    if copy.bos_token is None:
        copy.bos_token = tokenizer.decode(first) if len(first) == 1 else copy.eos_token
    if copy.pad_token is None:
        copy.add_special_tokens({"pad_token": str(copy.eos_token or "<pad>")})
    bos = copy.bos_token_id
    if not first and bos is not None and hasattr(copy, "add_bos_token"):
        # The host would write the token into the text, which can change how the text is cut.
        changed = deepcopy(copy)
        with suppress(ValueError, TypeError):  # a token that its post-processor cannot name
            changed.add_bos_token = True
            copy = changed if changed.encode(probe) == [bos, *own] else copy
    cfg.tokenizer_prepends_bos = bos is not None and copy.encode(probe)[:1] == [bos]
    cfg.tokenizer_appends_eos = bool(last) and last[-1] == copy.eos_token_id
    # 3. From None on, the host takes a tokenizer as it is, and keeps the size of the vocabulary.
    bridge.tokenizer = None
    bridge.tokenizer = copy
    # 4. What differs from the tokenizer's own ids.
    ids, how = bridge.to_tokens(probe)[0].tolist(), "token ids"
    for flag in (False, True):
        if bridge.to_tokens(probe, prepend_bos=flag)[0].tolist() == own:
            how = f"prepend_bos={flag}"
    host, itself = ([tokenizer.decode([i]) for i in row] for row in (ids, own))
    text = (
        f"TransformerLens reads {probe!r} as the tokens {host}, and the tokenizer itself as "
        f"{itself}. Pass {how} for the tokenizer's own."
    )
    new = text != told or vars(bridge).get(CONVENTION) == text  # or not told yet
    vars(bridge)[CONVENTION] = text if ids != own and new else None
    vars(bridge)[_GIVEN] = tokenizer, about, text, bridge.tokenizer


def _probe(tokenizer: Any) -> str:
    """A text that the tokenizer has ordinary tokens for."""

    def texts() -> Iterator[str]:
        yield "a"
        words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
        yield from sorted(words, key=lambda text: (not text.isalpha(), text))

    for text in texts():
        with suppress(Exception):  # the tokenizers library raises no class of its own
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and tokenizer.unk_token_id not in ids:
                return text
    raise ValueError("The tokenizer knows no text. Pass token ids.")


# --- Loading by name or folder --------------------------------------------------------------------


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
        return hooked_from_folder(name, **kwargs).eval()
    return HookedTransformer.from_pretrained_no_processing(name, **kwargs).eval()


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
