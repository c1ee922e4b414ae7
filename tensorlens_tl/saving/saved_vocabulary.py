"""The tokenizer in a saved lens: its own JSON, compressed, by which words are read without a model.

Reading it executes nothing: the JSON describes tables and rules, and the class is always the same.
"""

from __future__ import annotations

import base64
import json
import zlib
from functools import lru_cache
from typing import Any

from ..operator import ClassNames

_LIMIT = 2**28  # bytes of JSON; the largest vocabularies need an eighth


def write_vocabulary(tokenizer: Any) -> str | None:
    """Write a tokenizer as text for a file's header.

    Args:
        tokenizer: A tokenizer of ``transformers``, the names of classes, or None.

    Returns:
        The text; None where the tokenizer has no JSON, as those written in Python have none.
    """
    if isinstance(tokenizer, ClassNames):
        return _packed(json.dumps({"classes": tokenizer.names}))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    try:
        rules = backend.to_str()
    except Exception:  # parts of the user's own; the tokenizers library raises no class of its own
        return None
    names = tokenizer.special_tokens_map
    special = {name: token for name, token in names.items() if isinstance(token, str)}
    spaces = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    about = {"rules": rules, "special": special, "clean_up_tokenization_spaces": spaces}
    return _packed(json.dumps(about))


@lru_cache(maxsize=2)  # a vocabulary of megabytes, the same for every lens of a model
def _packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode())).decode()


def read_vocabulary(text: str) -> Any:
    """Read a tokenizer that :func:`write_vocabulary` wrote.

    Args:
        text: The text of the file's header.

    Returns:
        A tokenizer with the same words, ids and special tokens; or the names of classes.

    Raises:
        ValueError: If the text is damaged. The libraries that read it raise other classes, too.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    packed = zlib.decompressobj()
    about = json.loads(packed.decompress(base64.b64decode(text, validate=True), _LIMIT))
    if not packed.eof:
        raise ValueError("It is larger than any vocabulary. Save the lens again.")
    if "classes" in about:
        return ClassNames(about["classes"])
    spaces = about["clean_up_tokenization_spaces"]
    special = {str(name): str(token) for name, token in about["special"].items()}
    if wrong := sorted(name for name in special if not name.endswith("_token")):
        raise ValueError(f"{wrong[0]} is not a special token. Save the lens again.")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(about["rules"]),
        clean_up_tokenization_spaces=spaces is True,
        **special,
    )
