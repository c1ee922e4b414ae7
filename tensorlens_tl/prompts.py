"""What a user types, as token ids: strings, lists of strings, ids; padding, masks, limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompts:
    """Token ids [batch, pos], each prompt's (start, stop) of real tokens, and their strings."""

    tokens: Int[Tensor, "batch pos"]
    spans: tuple[tuple[int, int], ...]
    strings: tuple[tuple[str, ...], ...]


EMPTY = "the prompt is empty: expected at least one token"
Spans = list[tuple[int, int]]


def is_text(inputs: Any) -> bool:
    """Whether the input is a string or a non-empty list of strings."""
    if isinstance(inputs, list | tuple):
        return bool(inputs) and all(isinstance(text, str) for text in inputs)
    return isinstance(inputs, str)


def tokenize(model: Any, texts: Sequence[str], kwargs: Mapping[str, Any]) -> tuple[Tensor, Spans]:
    """The host's own tokens of some texts, and where each text's real tokens stand.

    Args:
        model: A host with ``to_tokens``.
        texts: One or more.
        kwargs: The model's arguments; ``prepend_bos`` and ``padding_side`` matter here.

    Returns:
        Ids [batch, pos], and each prompt's (start, stop).

    Raises:
        ValueError: If the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: pass token ids, or set model.tokenizer")
    keys = {k: kwargs[k] for k in ("prepend_bos", "padding_side") if k in kwargs}
    keys["truncate"] = False  # a text over n_ctx is refused, not cut
    counts = [model.to_tokens(text, **keys).shape[-1] if text else 0 for text in texts]
    if 0 in counts:
        raise ValueError(EMPTY)
    tokens = model.to_tokens(list(texts), **keys)
    width = tokens.shape[-1]
    side = kwargs.get("padding_side") or getattr(model.tokenizer, "padding_side", "right")
    return tokens, [(width - n, width) if side == "left" else (0, n) for n in counts]


def as_ids(inputs: Any, device: torch.device) -> Int[Tensor, "batch pos"]:
    """Token ids as a tensor [batch, pos].

    Returns:
        The ids, on the device.

    Raises:
        ValueError: If they are none, or no ids.
    """
    try:
        ids = torch.as_tensor(inputs)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            "expected a string, a list of strings or token ids [pos] or [batch, pos], got "
            f"{type(inputs).__name__} that is no rectangle of ids; pad lists to one length, or pass strings"
        ) from None
    if ids.numel() == 0:
        raise ValueError(EMPTY)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        raise ValueError(
            f"expected a string, a list of strings or token ids [pos] or [batch, pos], got {ids.dtype} "
            f"of shape {list(ids.shape)}"
        )
    return (ids if ids.ndim == 2 else ids[None]).to(device=device, dtype=torch.long)


def mask_spans(mask: Any, shape: torch.Size) -> Spans:
    """The run of real tokens that an attention mask leaves each prompt.

    Args:
        mask: [batch, pos], true at real tokens.
        shape: The token ids' shape.

    Returns:
        Each prompt's (start, stop).

    Raises:
        ValueError: If the shapes differ, or a prompt's real tokens are none or not one run.
    """
    mask = torch.as_tensor(mask).bool()
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, expected the token ids' {list(shape)}"
        )
    spans = []
    for prompt, row in enumerate(mask):
        real = row.nonzero().flatten().tolist()
        if not real or real != list(range(real[0], real[-1] + 1)):
            raise ValueError(
                f"attention_mask of prompt {prompt} is empty or has a gap: expected one run of real "
                "tokens with padding before or after it"
            )
        spans.append((real[0], real[-1] + 1))
    return spans


def check_tokens(tokens: Int[Tensor, "batch pos"], n_ctx: int, d_vocab: int) -> None:
    """Refuse prompts that the model cannot take.

    Raises:
        ValueError: If the prompt is empty, longer than n_ctx, or has ids outside the vocabulary.
    """
    if tokens.numel() == 0:
        raise ValueError(EMPTY)
    if tokens.shape[1] > n_ctx:
        raise ValueError(
            f"the prompt has {tokens.shape[1]} tokens, the model's context holds n_ctx = {n_ctx}: "
            "shorten it"
        )
    if wrong := tokens[(tokens < 0) | (tokens >= d_vocab)].tolist():
        raise ValueError(
            f"token id {wrong[0]} is outside the vocabulary: expected 0 to {d_vocab - 1}"
        )
