"""Load a model by hub name, or from a local Hugging Face folder, with either host class.

Folders need care: ``HookedTransformer.from_pretrained`` refuses them, and some releases read the
architecture off the *path* (any path with "llama" or "gemma" in it), so a folder is loaded through
a
neutral temporary link.
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

KINDS = ("bridge", "hooked")


def load_model(name_or_folder: str, kind: str | None = None, **kwargs: Any) -> Any:
    """A TransformerLens model with raw weights (nothing folded or centred), in evaluation mode.

    Args:
        name_or_folder: A hub name, or a folder with config.json, weights and tokenizer files.
        kind: "bridge" or "hooked"; by default the Bridge where the installed host has it.
        **kwargs: For the host's own loader (``dtype``, ``device``).

    Returns:
        The model.

    Raises:
        ValueError: If the kind is not installed, the folder is no model, or the hub name cannot be
            reached.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"expected kind to be one of {', '.join(KINDS)}, got {kind!r}")
    folder = Path(name_or_folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is no Hugging Face model folder: it has no config.json")
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
                    "this transformer_lens has no TransformerBridge: use kind='hooked', or upgrade"
                ) from None
        else:
            return TransformerBridge.boot_transformers(name, **kwargs).eval()
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        raise ValueError(
            "this transformer_lens has no HookedTransformer: use kind='bridge', or version 3"
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
    """Say at once, and in one sentence, when a hub name can be loaded neither from hub nor cache.

    Args:
        name: A hub name.
        timeout: Seconds to wait for the hub.

    Raises:
        ValueError: If the hub does not answer and no downloaded model bears the name.
    """
    if not os.environ.get("HF_HUB_OFFLINE") and _hub_answers(timeout):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # spares six retries of 4 s each
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(
        os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub")  # fmt: skip
    last = name.split("/")[-1].lower()
    if not any(last.startswith(p.name.split("--")[-1].lower()) for p in cache.glob("models--*")):
        raise ValueError(
            f"{name!r} is no folder here, and the model hub cannot be reached to download it: check "
            "the name or the connection, or pass the path of a Hugging Face model folder"
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
