"""What a user types, as token ids: strings, lists of strings, ids; padding, masks, limits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

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


def check_arguments(
    kwargs: Mapping[str, Any], forbidden: Sequence[str], hosts: Sequence[Any]
) -> None:
    """Refuse arguments that would change what is run, and those that no forward pass knows.

    A Hugging Face model ignores what it does not know: a misspelt argument would pass unseen.

    Args:
        kwargs: What the user gave for the model.
        forbidden: What would change the run.
        hosts: The model, and what it wraps.

    Raises:
        ValueError: If there is one.
    """
    if wrong := [key for key in forbidden if key in kwargs]:
        raise ValueError(
            f"{', '.join(wrong)} would change what is run; a capture is one whole forward pass "
            "to the logits: leave it out"
        )
    known = {name for host in hosts for name in inspect.signature(type(host).forward).parameters}
    if wrong := [key for key in kwargs if key not in known]:
        raise ValueError(
            f"no argument {', '.join(wrong)}, here or in the model's forward pass; expected those of "
            "this function, or the model's own, such as prepend_bos, padding_side or attention_mask: "
            "check the name"
        )


def each_prompt(prompts: Any, tokenizer: Any, masked: bool = False) -> list[Any]:
    """A list of prompts, each as a string or as its own ids [pos].

    Args:
        prompts: Strings, ids [pos] or [1, pos] as the host's ``to_tokens`` gives them, or ids
            [prompt, pos].
        tokenizer: The model's, or None; it knows the padding token.
        masked: Whether an attention mask tells padding.

    Returns:
        The prompts.

    Raises:
        ValueError: If one is several prompts, or some are padded.
    """
    found: list[Any] = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            found.append(prompt)
            continue
        ids = as_ids(prompt, torch.device("cpu"))
        if len(ids) != 1:
            raise ValueError(
                f"expected prompt {i} as a string or token ids [pos], got ids of shape "
                f"{list(ids.shape)}: list its {len(ids)} prompts one by one"
            )
        found.append(ids[0])
    rows = [prompt for prompt in found if not isinstance(prompt, str)]
    if len({len(row) for row in rows}) == 1 and not masked:
        check_padding(torch.stack(rows), tokenizer, "a list of each prompt's own ids")
    return found


def check_padding(tokens: Int[Tensor, "batch pos"], tokenizer: Any, remedy: str) -> None:
    """Refuse ids some of whose rows, and not all, end or begin in padding that nothing masks.

    They would be taken for real tokens, and the last of them for the prompt's last word.

    Args:
        tokens: The ids.
        tokenizer: The model's, or None.
        remedy: What may be passed instead of them, beside strings.

    Raises:
        ValueError: If there are such rows.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or tokens.shape[1] < 2:
        return
    padded = tokens == pad
    # A beginning-of-sequence token may be the padding token, too: two of them are padding.
    begins = padded[:, 0] & (padded[:, 1] | (pad != getattr(tokenizer, "bos_token_id", None)))
    for where, rows in (("ends", padded[:, -1]), ("begins", begins)):
        if rows.any() and not rows.all():
            prompt = int(rows.nonzero()[0])
            raise ValueError(
                f"prompt {prompt} {where} in the padding token (id {pad}) and others do not, expected "
                f"ids without padding, as it would count as real tokens: pass strings, or {remedy}"
            )


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
            f"{type(inputs).__name__} that is no rectangle of ids; pass strings, or pad "
            "lists to one length and tell it by attention_mask"
        ) from None
    if ids.numel() == 0:
        raise ValueError(EMPTY)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        raise ValueError(
            f"expected a string, a list of strings or token ids [pos] or [batch, pos], got {ids.dtype} "
            f"of shape {list(ids.shape)}"
        )
    return (ids if ids.ndim == 2 else ids[None]).to(device=device, dtype=torch.long)


def mask_spans(mask: Any, tokens: Int[Tensor, "batch pos"], tokenizer: Any) -> Spans:
    """The run of real tokens that an attention mask leaves each prompt.

    Args:
        mask: [batch, pos], true at real tokens; or None where all are.
        tokens: The token ids.
        tokenizer: The model's; None where padding is no question.

    Returns:
        Each prompt's (start, stop).

    Raises:
        ValueError: If the shapes differ, a prompt's real tokens are none or not one run, or some
            prompts are padded and no mask tells it.
    """
    shape = tokens.shape
    if mask is None:
        check_padding(tokens, tokenizer, "the attention_mask that tells it")
        return [(0, shape[1])] * len(tokens)
    mask = torch.as_tensor(mask)
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, expected the token ids' {list(shape)}"
        )
    real_numbers, mask = mask.is_floating_point(), mask.bool()
    spans = []
    for prompt, row in enumerate(mask):
        real = row.nonzero().flatten().tolist()
        if not real or real != list(range(real[0], real[-1] + 1)):
            raise ValueError(
                f"attention_mask of prompt {prompt} is empty or has a gap: expected one run of real "
                "tokens with padding before or after it"
            )
        spans.append((real[0], real[-1] + 1))
    if real_numbers:  # hosts index with it
        raise ValueError(
            "expected attention_mask of booleans or integers, got real numbers: pass mask.long()"
        )
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
