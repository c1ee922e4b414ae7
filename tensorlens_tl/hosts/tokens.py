"""What a user types, as token ids: strings, lists of strings, ids; padding, masks, limits."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..checks import as_list, kind_of, no_table
from ..operator import EMPTY, Prompts, check_tokens

if TYPE_CHECKING:
    from .adapter import Adapter

Spans = list[tuple[int, int]]
CONVENTION = "_tensorlens_convention"
"""Attribute of a wrapped model: where its token ids differ from the tokenizer's own. Told once."""


def is_text(inputs: Any) -> bool:
    """Whether the input is a string or a non-empty list of strings."""
    listed = isinstance(inputs, list | tuple) and len(inputs) > 0
    return isinstance(inputs, str) or (listed and all(isinstance(text, str) for text in inputs))


def prepare(
    adapter: Adapter, inputs: Any, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Prompts]:
    """Check an input and tokenize it; see :meth:`Adapter.prepare`."""
    model, device, mask, added = adapter.model, adapter.weights.unembed.W_U.device, None, None
    hosts = model, getattr(model, "original_model", model)
    inputs, kwargs = unpacked(inputs, kwargs, hosts)
    typed = "type_embed" in adapter.source_hooks  # an encoder
    types = kwargs.pop("token_type_ids", None) if typed else None
    check_arguments(kwargs, adapter.forbidden, hosts)
    if isinstance(inputs, Prompts):
        return {**adapter.all_real(inputs.given, kwargs), **kwargs}, inputs
    if is_text(inputs):
        texts = [inputs] if isinstance(inputs, str) else inputs
        tokens, mask, count = tokenize(model, texts, kwargs, typed)
        added = adapter.token_string(int(tokens[0, mask[0].argmax()])) if count else ""
        tokens, mask = tokens.to(device), mask.to(device)
        kwargs.pop("prepend_bos", None)
    else:
        tokens = as_ids(inputs, device)
    if types is not None:
        kwargs["token_type_ids"] = types = as_ids(types, device)
        if types.shape != tokens.shape or ((types < 0) | (types >= adapter.n_types)).any():
            raise ValueError(
                f"token_type_ids of shape {list(types.shape)} are not one number below "
                f"{adapter.n_types} for each token. Pass what the tokenizer returns."
            )
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = mask = as_mask(kwargs["attention_mask"], tokens)
    elif mask is None:
        mask = adapter.mask(tokens, kwargs)
    elif not (mask if adapter.attends_ahead else mask[:, 0]).all() or (
        adapter.mask(tokens, kwargs) is not None
    ):
        kwargs["attention_mask"] = mask
    spans = mask_spans(mask, tokens, adapter.tokenizer)
    return kwargs, replace(prompts_of(adapter, tokens, spans), added=added)


def prompts_of(
    adapter: Adapter, tokens: Int[Tensor, "batch pos"], spans: Spans | None = None
) -> Prompts:
    """Describe token ids whose real tokens are known.

    Args:
        adapter: Adapter of the model that reads them.
        tokens: Token ids of all prompts.
        spans: The (start, stop) of each prompt's real tokens; None where all are real.

    Returns:
        The prompts, with the strings of their real tokens.

    Raises:
        ValueError: If they are longer than n_ctx, or have ids outside the vocabulary.
    """
    if tokens.is_floating_point():
        return adapter.prepare(tokens, {})[1]
    tokens = tokens.to(adapter.weights.unembed.W_U.device)
    spans = [(0, tokens.shape[1])] * len(tokens) if spans is None else spans
    check_tokens(tokens, adapter.n_ctx, adapter.cfg.d_vocab)
    rows = [row[start:stop] for row, (start, stop) in zip(tokens.tolist(), spans, strict=True)]
    text = {token: adapter.token_string(token) for row in rows for token in dict.fromkeys(row)}
    strings = tuple(tuple(text[token] for token in row) for row in rows)
    return Prompts(tokens, tuple(spans), strings)


def own_ids(adapter: Adapter, prompt: Any) -> Int[Tensor, " pos"]:
    """The token ids of one prompt of :func:`each_prompt`, all of them real."""
    if isinstance(prompt, str):
        return adapter.prepare(prompt, {})[1].given[0]
    return prompts_of(adapter, prompt[None]).given[0]


def tokenize(
    model: Any, texts: Sequence[str], kwargs: Mapping[str, Any], encoder: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Tokenize texts one by one as the host does, and pad them to one length.

    Hosts guess by a token's id what is padding. Here each text has the ids that it has alone, and
    the mask knows which they are.

    Args:
        model: A host model with a method ``to_tokens``.
        texts: One or more texts.
        kwargs: Arguments of the model; ``prepend_bos`` and ``padding_side`` matter here.
        encoder: Whether the tokenizer itself adds all special tokens, such as [CLS] and [SEP].

    Returns:
        Token ids and mask of real tokens [batch, pos]; how many tokens were added to the first.

    Raises:
        ValueError: If the model has no tokenizer, or a text has no tokens or would lose one.
    """
    if model.tokenizer is None:
        remedy = "wrap the Hugging Face model with its tokenizer: tensorlens_tl.wrap(hf, tokenizer)"
        if hasattr(model, "set_tokenizer"):
            remedy = "call model.set_tokenizer(tokenizer)"
        raise ValueError(f"This model has no tokenizer. Pass token ids, or {remedy}.")
    if hasattr(model, "set_tokenizer") and model.cfg.tokenizer_prepends_bos is None:
        raise ValueError(
            "model.tokenizer was not set by set_tokenizer, so the host does not know whether it "
            "begins a text with BOS. Call model.set_tokenizer(tokenizer), or pass token ids."
        )
    if encoder and kwargs.get("prepend_bos") is not None:
        raise ValueError(
            "prepend_bos is not for an encoder, whose tokenizer adds special tokens. Drop it."
        )
    # Told once, where the host's convention is not the tokenizer's own and neither was chosen.
    told = vars(model).pop(CONVENTION, None) if kwargs.get("prepend_bos") is None else None
    if told and not encoder:
        warnings.warn(told, UserWarning, stacklevel=2)
    keys = {k: kwargs[k] for k in ("prepend_bos", "padding_side") if k in kwargs}
    keys |= {"truncate": False}  # a text over n_ctx is refused, not cut
    if encoder:
        rows = [torch.tensor(model.tokenizer(text)["input_ids"]) for text in texts if text]
    else:
        rows = [model.to_tokens(text, **keys)[0] for text in texts if text]
    typed = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if len(rows) < len(texts) or not all(map(len, typed)):
        raise ValueError(EMPTY)
    more = [len(row) - len(ids) for row, ids in zip(rows, typed, strict=True)]
    if min(more) < 0:
        text, row = texts[more.index(min(more))], rows[more.index(min(more))]
        raise ValueError(
            f"The model would lose a token of {text!r} and run {model.tokenizer.decode(row)!r}. "
            "Pass token ids, or mend model.cfg.tokenizer_prepends_bos."
        )
    side = kwargs.get("padding_side") or getattr(model.tokenizer, "padding_side", "right")
    pad = getattr(model.tokenizer, "pad_token_id", None)
    # A made-up padding token has an id beyond the vocabulary.
    pad = pad if pad is not None and 0 <= pad < model.cfg.d_vocab else 0
    filled = partial(pad_sequence, batch_first=True, padding_side=side)
    return filled(rows, padding_value=pad), filled([*map(torch.ones_like, rows)]), more[0]


def unpacked(
    inputs: Any, kwargs: Mapping[str, Any], hosts: Sequence[Any]
) -> tuple[Any, dict[str, Any]]:
    """Take what a tokenizer returns apart: its ids, and what the model's forward pass knows of it.

    Args:
        inputs: What the user gave as the prompt.
        kwargs: Arguments that the user gave for the model.
        hosts: The host model, and the model that it wraps.

    Returns:
        The prompt, and all arguments for the model.

    Raises:
        ValueError: If a mapping has no ids, or holds an argument that was also given by itself.
    """
    if not isinstance(inputs, Mapping):
        return inputs if isinstance(inputs, Tensor) else as_list(inputs), dict(kwargs)
    if not {"input_ids", "inputs_embeds"} & inputs.keys():
        raise ValueError(
            f"The input is {kind_of(inputs)} without input_ids. Pass what a tokenizer "
            "returns, or token ids."
        )
    # The model's own call ignores the rest, such as the offsets of tokens in the text.
    known = {k: v for k, v in inputs.items() if k != "input_ids" and k in _known(hosts)}
    if twice := sorted(known.keys() & kwargs.keys()):
        raise ValueError(
            f"{', '.join(twice)} is given twice, in the prompt's {type(inputs).__name__} and by "
            "itself. Drop one of them."
        )
    return inputs.get("input_ids"), {**known, **kwargs}


def _known(hosts: Sequence[Any]) -> set[str]:
    """Names of the arguments of the hosts' forward passes."""
    own = {name for host in hosts for name in inspect.signature(type(host).forward).parameters}
    own.add("inputs_embeds")  # refused by name where no host knows it
    return own | ({"attention_mask"} if "one_zero_attention_mask" in own else set())


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
        ValueError: If there is one, or if prepend_bos or padding_side has an unknown value.
    """
    known_values = {"prepend_bos": (None, True, False), "padding_side": (None, "left", "right")}
    for key, values in known_values.items():
        if kwargs.get(key) not in values:
            known = f"Pass one of {', '.join(map(repr, values))}."
            raise ValueError(f"{key}={kwargs[key]!r} is not known. {known}")
    if kwargs.get("token_type_ids") is not None:
        raise ValueError(
            "token_type_ids adds an embedding of its own to the residual stream, which the "
            "operator does not know. Call without it: pass input_ids and attention_mask only."
        )
    if wrong := [key for key in forbidden if key in kwargs]:
        raise ValueError(
            f"{', '.join(wrong)} would change what is run, and a capture is one whole forward pass "
            "to the logits. Call without it."
        )
    if wrong := sorted(kwargs.keys() - _known(hosts)):
        raise ValueError(
            f"{', '.join(wrong)} is no argument of this function or of the model's forward pass. "
            "Check the name; prepend_bos, padding_side and attention_mask are known, for example."
        )


def each_prompt(prompts: Any, tokenizer: Any, mask: Any = None, name: str = "prompts") -> list[Any]:
    """List prompts, each as a string or as its own ids [pos].

    Args:
        prompts: Strings, ids [pos] or [1, pos] as the host's ``to_tokens`` gives them, or ids
            [prompt, pos]; any iterable of them, or what a tokenizer returns for several texts.
        tokenizer: Tokenizer of the model, which knows the padding token, or None.
        mask: Attention mask of ids [prompt, pos], which tells padding, or None.
        name: Name of the argument in error messages.

    Returns:
        One string or tensor of ids [pos] per prompt.

    Raises:
        ValueError: If there are no prompts, if an entry is several prompts, or if some prompts are
            padded.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        mask = prompts.get("attention_mask") if mask is None else mask
        prompts = as_ids(prompts["input_ids"], torch.device("cpu"))
    one = isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable)
    if one or not (given := list(no_table(prompts, name))):
        raise ValueError(
            f"{name}={prompts!r} is not a non-empty list. Put a single prompt in a list."
        )
    if isinstance(prompts, Tensor) and prompts.ndim == 1:
        raise ValueError(
            f"{name} are token ids of one dimension, not [prompt, pos]. Add one with ids[None]."
        )
    found: list[Any] = []
    for i, prompt in enumerate(given):
        if isinstance(prompt, str):
            rows = [prompt]
        elif isinstance(prompt, Mapping) and "input_ids" in prompt:
            rows = each_prompt(prompt, tokenizer)
        else:
            rows = list(as_ids(prompt, torch.device("cpu")))
        if len(rows) != 1:
            raise ValueError(
                f"{name}[{i}] has ids of shape {[len(rows), len(rows[0])]}, which are {len(rows)} "
                "prompts. List each prompt by itself, as a string or token ids [pos]."
            )
        found += rows
    rows = [prompt for prompt in found if not isinstance(prompt, str)]
    equal = len({len(row) for row in rows}) == 1
    if mask is None:
        own = not isinstance(prompts, Tensor) and all(isinstance(p, Tensor) for p in given)
        if equal and not own:
            check_padding(torch.stack(rows), tokenizer, "each prompt's own ids as a tensor [pos]")
        return found
    if len(rows) < len(found):
        raise ValueError(
            "attention_mask= is for token ids, but these prompts are strings. Drop attention_mask=."
        )
    if not equal:
        raise ValueError(
            "attention_mask= is for ids padded to one length, but these have several lengths. Drop "
            "attention_mask=: each prompt is then taken without padding."
        )
    spans = mask_spans(mask, torch.stack(rows), None)
    return [row[start:stop] for row, (start, stop) in zip(rows, spans, strict=True)]


def check_padding(
    tokens: Int[Tensor, "batch pos"], tokenizer: Any, remedy: str, alone: bool = False
) -> None:
    """Refuse ids that begin or end in padding that nothing masks.

    It would be taken for real tokens, and the last of them for the prompt's last word. Where all
    prompts begin or end alike, the token may be meant; what cannot be is refused if ``alone``.

    Args:
        tokens: Token ids of all prompts.
        tokenizer: Tokenizer of the model, or None.
        remedy: What may be passed instead of such ids, beside strings.
        alone: Whether to refuse padding that all prompts have.

    Raises:
        ValueError: If there are such rows.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or tokens.shape[1] < 2:
        return
    padded, bos = tokens == pad, getattr(tokenizer, "bos_token_id", None)
    # A beginning-of-sequence token may be the padding token, too: two of them are padding.
    begins = padded[:, 0] & (padded[:, 1] | (pad != bos))
    special = pad in [bos, *(getattr(tokenizer, f"{n}_token_id", None) for n in ("eos", "unk"))]
    sure = {"begins": padded[:, 0], "ends": padded[:, -1]}
    if special:
        sure["begins"] = sure["begins"] & (padded[:, 1] | ((tokens[:, 1] == bos) & (pad != bos)))
        sure["ends"] = sure["ends"] & padded[:, -2]
    for where, rows in (("ends", padded[:, -1]), ("begins", begins)):
        if rows.any() and not rows.all():
            others = " and others do not"
        elif alone and sure[where].any():
            others, rows = "", sure[where]
        else:
            continue
        prompt = int(rows.nonzero()[0])
        raise ValueError(
            f"prompt {prompt} {where} in the padding token (id {pad}){others}, so "
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
        ids = torch.as_tensor(_stacked(inputs))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"The input is {kind_of(inputs)}, which is neither text nor a rectangle of token "
            "ids. Pass strings, or pad lists to one length and give their attention_mask."
        ) from None
    if ids.numel() == 0:
        raise ValueError(EMPTY)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        many = f"{ids.dtype} of shape {list(ids.shape)}, which are no token ids"
        raise ValueError(
            f"The input is {many if ids.ndim else f'{inputs}, one value, not a list of ids'}. "
            "Pass a string, a list of strings, or integers [pos] or [batch, pos]."
        )
    return (ids if ids.ndim == 2 else ids[None]).to(device=device, dtype=torch.long)


def _stacked(inputs: Any) -> Any:
    """Ids of several prompts as one tensor, where they are a list of tensors [pos] or [1, pos]."""
    if not isinstance(inputs, list | tuple) or not all(isinstance(row, Tensor) for row in inputs):
        return inputs
    rows = [row[0] if row.ndim == 2 and len(row) == 1 else row for row in inputs]
    return torch.stack(rows) if rows else inputs


def as_mask(mask: Any, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Make an attention mask of ones and zeros, beside the token ids.

    Args:
        mask: Attention mask [batch, pos], or [pos] of one prompt, as a tensor, an array or lists.
        tokens: Token ids of all prompts.

    Returns:
        The mask as integers of 64 bits, on the device of the ids.

    Raises:
        ValueError: If the mask is no rectangle of ones and zeros, or its shape is another one.
    """
    try:
        found = torch.as_tensor(_stacked(mask))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"attention_mask is {kind_of(mask)} that is no rectangle of numbers. Give one "
            "entry per token: 1 where it is real, 0 at padding."
        ) from None
    found = found[None] if found.ndim == 1 and len(tokens) == 1 else found
    if found.shape != tokens.shape:
        raise ValueError(
            f"attention_mask has shape {list(found.shape)}, but the token ids have "
            f"{list(tokens.shape)}. Give one entry per token."
        )
    if ((found != 0) & (found != 1)).any():
        raise ValueError(
            "attention_mask holds other numbers than 1 and 0. Give 1 where a token is real, and 0 "
            "at padding."
        )
    return found.to(device=tokens.device, dtype=torch.long)


def mask_spans(mask: Any, tokens: Int[Tensor, "batch pos"], tokenizer: Any) -> Spans:
    """Find the run of real tokens that an attention mask leaves each prompt.

    Args:
        mask: Attention mask as for :func:`as_mask`; None where all tokens are real.
        tokens: Token ids of all prompts.
        tokenizer: Tokenizer of the model; None where padding is no question.

    Returns:
        The (start, stop) of each prompt's real tokens.

    Raises:
        ValueError: If a prompt has not one run of real tokens, or is padded and no mask tells it.
    """
    if mask is None:
        check_padding(tokens, tokenizer, "the attention_mask that tells it", alone=True)
        return [(0, tokens.shape[1])] * len(tokens)
    spans = []
    for prompt, row in enumerate(as_mask(mask, tokens)):
        real = row.nonzero().flatten().tolist()
        if not real or real != list(range(real[0], real[-1] + 1)):
            raise ValueError(
                f"attention_mask of prompt {prompt} is empty or has a gap. Give one run of real "
                "tokens, with padding only before or after it."
            )
        spans.append((real[0], real[-1] + 1))
    return spans
