"""What a user types, as token ids: strings, lists of strings, ids; padding, masks, limits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

EMPTY = "The prompt is empty. Give at least one token."
Spans = list[tuple[int, int]]


def is_text(inputs: Any) -> bool:
    """Whether the input is a string or a non-empty list of strings."""
    if isinstance(inputs, list | tuple):
        return bool(inputs) and all(isinstance(text, str) for text in inputs)
    return isinstance(inputs, str)


def tokenize(model: Any, texts: Sequence[str], kwargs: Mapping[str, Any]) -> tuple[Tensor, Spans]:
    """Tokenize texts as the host does, and find where each text's real tokens stand.

    Args:
        model: A host model with a method ``to_tokens``.
        texts: One or more texts.
        kwargs: Arguments of the model; ``prepend_bos`` and ``padding_side`` matter here.

    Returns:
        Token ids [batch, pos], and the (start, stop) of each prompt's real tokens.

    Raises:
        ValueError: If the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("This model has no tokenizer. Pass token ids, or set model.tokenizer.")
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
        kwargs: Arguments that the user gave for the model.
        forbidden: Names of arguments that would change the run.
        hosts: The host model, and the model that it wraps.

    Raises:
        ValueError: If there is one.
    """
    if wrong := [key for key in forbidden if key in kwargs]:
        raise ValueError(
            f"{', '.join(wrong)} would change what is run, and a capture is one whole forward pass "
            "to the logits. Call without it."
        )
    known = {name for host in hosts for name in inspect.signature(type(host).forward).parameters}
    if wrong := [key for key in kwargs if key not in known]:
        raise ValueError(
            f"{', '.join(wrong)} is no argument of this function or of the model's forward pass. "
            "Check the name; prepend_bos, padding_side and attention_mask are known, for example."
        )


def each_prompt(prompts: Any, tokenizer: Any, masked: bool = False) -> list[Any]:
    """List prompts, each as a string or as its own ids [pos].

    Args:
        prompts: Strings, ids [pos] or [1, pos] as the host's ``to_tokens`` gives them, or ids
            [prompt, pos].
        tokenizer: Tokenizer of the model, which knows the padding token, or None.
        masked: Whether an attention mask tells padding.

    Returns:
        One string or tensor of ids [pos] per prompt.

    Raises:
        ValueError: If an entry is several prompts, or some prompts are padded.
    """
    found: list[Any] = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            found.append(prompt)
            continue
        ids = as_ids(prompt, torch.device("cpu"))
        if len(ids) != 1:
            raise ValueError(
                f"prompts[{i}] has ids of shape {list(ids.shape)}, which are {len(ids)} prompts. "
                "List each prompt by itself, as a string or token ids [pos]."
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
        tokens: Token ids of all prompts.
        tokenizer: Tokenizer of the model, or None.
        remedy: What may be passed instead of such ids, beside strings.

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
                f"prompt {prompt} {where} in the padding token (id {pad}) and others do not, so "
                f"padding would count as real tokens. Pass strings, or {remedy}."
            )


def as_ids(inputs: Any, device: torch.device) -> Int[Tensor, "batch pos"]:
    """Make a tensor [batch, pos] of token ids.

    Args:
        inputs: Token ids [pos] or [batch, pos], as a tensor, an array or lists.
        device: Where the ids are needed.

    Returns:
        The ids as integers of 64 bits, on the device.

    Raises:
        ValueError: If there are no ids, or ``inputs`` are not ids.
    """
    try:
        ids = torch.as_tensor(inputs)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"The input is a {type(inputs).__name__} that is neither text nor a rectangle of token "
            "ids. Pass strings, or pad lists to one length and give their attention_mask."
        ) from None
    if ids.numel() == 0:
        raise ValueError(EMPTY)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        raise ValueError(
            f"The input is {ids.dtype} of shape {list(ids.shape)}, which are no token ids. "
            "Pass a string, a list of strings, or integers [pos] or [batch, pos]."
        )
    return (ids if ids.ndim == 2 else ids[None]).to(device=device, dtype=torch.long)


def mask_spans(mask: Any, tokens: Int[Tensor, "batch pos"], tokenizer: Any) -> Spans:
    """Find the run of real tokens that an attention mask leaves each prompt.

    Args:
        mask: Attention mask [batch, pos], true at real tokens; None where all tokens are real.
        tokens: Token ids of all prompts.
        tokenizer: Tokenizer of the model; None where padding is no question.

    Returns:
        The (start, stop) of each prompt's real tokens.

    Raises:
        ValueError: If the shapes differ, if a prompt has no real tokens or more than one run of
            them, or if some prompts are padded and no mask tells it.
    """
    shape = tokens.shape
    if mask is None:
        check_padding(tokens, tokenizer, "the attention_mask that tells it")
        return [(0, shape[1])] * len(tokens)
    mask = torch.as_tensor(mask)
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, but the token ids have {list(shape)}. "
            "Give one entry per token."
        )
    real_numbers, mask = mask.is_floating_point(), mask.bool()
    spans = []
    for prompt, row in enumerate(mask):
        real = row.nonzero().flatten().tolist()
        if not real or real != list(range(real[0], real[-1] + 1)):
            raise ValueError(
                f"attention_mask of prompt {prompt} is empty or has a gap. Give one run of real "
                "tokens, with padding only before or after it."
            )
        spans.append((real[0], real[-1] + 1))
    if real_numbers:  # hosts index with it
        raise ValueError(
            "attention_mask holds real numbers, by which hosts cannot index. Pass mask.long()."
        )
    return spans


def check_tokens(tokens: Int[Tensor, "batch pos"], n_ctx: int, d_vocab: int) -> None:
    """Refuse prompts that the model cannot take.

    Args:
        tokens: Token ids of all prompts.
        n_ctx: Number of tokens that the model's context holds.
        d_vocab: Number of tokens in the vocabulary.

    Raises:
        ValueError: If the prompt is empty, longer than n_ctx, or has ids outside the vocabulary.
    """
    if tokens.numel() == 0:
        raise ValueError(EMPTY)
    if tokens.shape[1] > n_ctx:
        raise ValueError(
            f"The prompt has {tokens.shape[1]} tokens, but the model's context holds "
            f"n_ctx = {n_ctx}. Shorten the prompt."
        )
    if wrong := tokens[(tokens < 0) | (tokens >= d_vocab)].tolist():
        raise ValueError(
            f"Token id {wrong[0]} is outside the vocabulary. Give ids from 0 to {d_vocab - 1}."
        )
