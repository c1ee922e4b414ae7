"""Loading a host model by name: from the hub, or from a local folder.

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
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from ..checks import file_path, spelled, usable_device
from ..refusals import UnsupportedArchitectureError
from .entry import wrap
from .gguf_files import gguf_file, read_gguf

KINDS = ("bridge", "hooked")
"""The two classes of host models, as ``load_model`` calls them."""


@spelled
def load_model(
    name_or_folder: str | os.PathLike[str], kind: str | None = None, **kwargs: Any
) -> Any:
    """Load a TransformerLens model with raw weights (nothing folded or centred), for evaluation.

    Args:
        name_or_folder: A hub name, a folder with config.json, weights and tokenizer files, a GGUF
            file, or a folder with one. A GGUF file's weights are dequantized.
        kind: "bridge" for a ``TransformerBridge`` or "hooked" for a ``HookedTransformer``. By
            default the Bridge where the installed transformer_lens has it.
        **kwargs: Arguments of the host's own loader (``dtype``, ``device``).

    Returns:
        The host model, in evaluation mode.

    Raises:
        ValueError: If the kind is not installed, the folder or file is no model, the hub name
            cannot be reached, or a GGUF file is given and the package gguf is missing.

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
        usable_device(kwargs["device"])
    if isinstance(dtype := kwargs.get("dtype"), str):
        kwargs["dtype"] = dtype = vars(torch).get(dtype, dtype)
    if not isinstance(dtype, torch.dtype | None) or (dtype and not dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r} is no dtype of weights. Pass one such as torch.float32.")
    folder = file_path(name_or_folder, "name_or_folder")
    if (file := gguf_file(folder)) is not None:
        is_bridge = hasattr(_host_class(kind), "boot_transformers")
        model = _call(bridge_from_gguf if is_bridge else hooked_from_gguf, file, kwargs)
        model.cfg.model_name = file.stem
        return model
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is no Hugging Face model folder, as it has no config.json. "
                "Give the folder that save_pretrained wrote, or a GGUF file."
            )
        with _neutral_link(folder) as link:
            model = _load(link, kind, True, kwargs)
        model.cfg.model_name = folder.resolve().name
        if not any(p for name in ("tokenizer*", "vocab*", "*.model") for p in folder.glob(name)):
            model.tokenizer = None  # transformers makes an empty one, which knows no word
        return model
    check_reachable(str(name_or_folder))
    return _load(str(name_or_folder), kind, False, kwargs)


def _call(load: Callable[..., Any], name: str | Path, kwargs: dict[str, Any]) -> Any:
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
    host = _host_class(kind)
    if hasattr(host, "boot_transformers"):
        return _call(host.boot_transformers, name, kwargs)
    if is_folder:
        return _call(hooked_from_folder, name, kwargs)
    return _call(host.from_pretrained_no_processing, name, kwargs)


def _host_class(kind: str | None) -> Any:
    """The class of a kind; by default the Bridge where it is installed."""
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
            return TransformerBridge
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        raise ValueError(
            'kind="hooked" needs transformer_lens 2 or 3, which have HookedTransformer. '
            'Install transformer_lens 3, or use kind="bridge".'
        ) from None
    return HookedTransformer


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


def bridge_from_gguf(file: Path, dtype: Any = None, device: Any = None) -> Any:
    """Load a GGUF file as a Hugging Face model, and wrap it; arguments as in :func:`read_gguf`."""
    return wrap(*read_gguf(file, dtype, device))


def hooked_from_gguf(file: Path, dtype: Any = None, device: Any = None) -> Any:
    """Load a GGUF file as a HookedTransformer; arguments as in :func:`read_gguf`."""
    hf, tokenizer = read_gguf(file, dtype)
    with tempfile.TemporaryDirectory(prefix="tensorlens-") as folder:
        hf.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return hooked_from_folder(folder, dtype, device, hf)


def hooked_from_folder(
    folder: str, dtype: Any = None, device: str | None = None, hf: Any = None
) -> Any:
    """Load a HookedTransformer from a Hugging Face folder, which its own loader refuses.

    Args:
        folder: Path of the folder.
        dtype: Dtype of the weights; None is float32.
        device: Device of the model, or None for the host's default.
        hf: The Hugging Face model, where the folder has no weights.

    Returns:
        The model, with raw weights.

    Raises:
        UnsupportedArchitectureError: If the host cannot make a HookedTransformer of the model.
    """
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = dtype or torch.float32
    hf = hf or AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
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
