"""Runs that start from embeddings in place of token ids: all rows given, or a soft prompt.

A host takes numbers [batch, pos, d_model] for embeddings. Whoever has a soft prompt has rows that
stand before the tokens; the tokens' own rows are then looked up here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..checks import kind_of
from ..operator import Prompts
from .tokens import as_mask, check_arguments, mask_spans, unpacked

if TYPE_CHECKING:
    from .adapter import Adapter


_BESIDE = ("inputs_embeds", "pixel_values", "position_ids", "token_type_ids")
"""Arguments whose entries would not fit the rows behind a soft prompt."""


def rows_of(
    adapter: Adapter, given: Any, name: str, start: str, taken: int = 0
) -> Float[Tensor, "batch pos d_model"]:
    """Check rows of the residual that a user gives.

    Args:
        adapter: Adapter of the model.
        given: The rows [batch, pos, d_model], or [pos, d_model] of one prompt.
        name: What they are, for messages.
        start: What such a run starts from, for messages.
        taken: Number of positions that something else takes.

    Returns:
        The rows, on the device and in the dtype of the weights.

    Raises:
        ValueError: If they are no such numbers, or more than the model reads.
    """
    W_U, width = adapter.weights.unembed.W_U, adapter.cfg.d_model
    numbers = isinstance(given, Tensor) and given.is_floating_point()
    x = given[None] if numbers and given.ndim == 2 else given
    limit = adapter.n_ctx - taken
    if not numbers or x.ndim != 3 or x.shape[-1] != width or not 0 < x.shape[1] <= limit:
        shown = f"{list(given.shape)}" if isinstance(given, Tensor) else kind_of(given)
        most = f", with at most {limit} positions" if limit < 2**31 else ""
        raise ValueError(
            f"{name} is {shown}, and {start}. Pass numbers [batch, pos, {width}]{most}."
        )
    return x.detach().to(W_U)


def all_rows(x: Float[Tensor, "batch pos d_model"], spans: Any = None) -> Prompts:
    """Describe a run on rows that the user gave, without token ids.

    Args:
        x: The rows [batch, pos, d_model] that enter in place of tokens.
        spans: The (start, stop) of each prompt's real rows; None where all are real.

    Returns:
        The prompts, whose rows are named "inputs_embeds[0]" and so on.
    """
    spans = tuple(spans or [(0, x.shape[1])] * len(x))
    names = tuple(tuple(f"inputs_embeds[{i}]" for i in range(b - a)) for a, b in spans)
    return Prompts(None, spans, names, x, 0)


def from_embeddings(
    adapter: Adapter, inputs: Any, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Prompts] | None:
    """Prepare a run that starts from embeddings.

    Args:
        adapter: Adapter of a Bridge.
        inputs: The prompt, as for ``Adapter.prepare``.
        kwargs: Arguments of the model's own forward pass; ``inputs_embeds`` or ``soft_prompt`` are
            taken from them.

    Returns:
        The arguments of the run, and the prompts; None for a run on token ids.

    Raises:
        ValueError: If both are given, or ``inputs_embeds`` beside a prompt, or other numbers than
            rows of the residual.
    """
    inputs, rest = unpacked(inputs, kwargs, (adapter.model, adapter.model.original_model))
    soft = rest.pop("soft_prompt", None)
    if soft is not None:
        return _after(adapter, soft, inputs, rest)
    x = rest.pop("inputs_embeds", None)
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim == 3:
        x, inputs = inputs if x is None else x, None if x is None else inputs
    if x is None:
        return None
    if inputs is not None or "pixel_values" in rest:
        other = "a prompt" if inputs is not None else "pixel_values"
        raise ValueError(
            f"inputs_embeds is given beside {other}, and stands in the place of a prompt. Pass "
            "None as the input, or rows that stand before a prompt as soft_prompt=."
        )
    check_arguments(rest, adapter.forbidden, (adapter.model, adapter.model.original_model))
    x = rows_of(
        adapter, x, "inputs_embeds", "a run from embeddings starts from rows of the residual"
    )
    mask = rest.get("attention_mask")
    if mask is not None:
        rest["attention_mask"] = mask = as_mask(mask, x[..., 0])
    return rest, all_rows(x, mask_spans(mask, x[..., 0], None))


def _after(
    adapter: Adapter, soft: Any, inputs: Any, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Prompts]:
    """Prepare a run of prompts that stand after a soft prompt."""
    wrong = [k for k in _BESIDE if k in kwargs]
    if inputs is None or wrong:
        what = f"{wrong[0]} is given beside it" if wrong else "no prompt stands after it"
        raise ValueError(
            f"soft_prompt stands before the tokens of a prompt, and {what}. Pass a text or token "
            "ids, or all rows as inputs_embeds=."
        )
    kwargs, told = adapter.prepare(inputs, kwargs)
    rows = [row[a:b] for row, (a, b) in zip(told.given, told.spans, strict=True)]
    longest = max(map(len, rows))
    what = "it holds the rows before a prompt's tokens"
    first = rows_of(adapter, soft, "soft_prompt", what, longest)
    if len(first) not in (1, len(rows)):
        raise ValueError(
            f"soft_prompt has {len(first)} prompts beside {len(rows)} others. Pass rows "
            "[pos, d_model], which stand before every prompt."
        )
    embed = adapter.model.embed  # its own module: no hook is to fire before the run
    table, first = getattr(embed, "original_component", embed), first.expand(len(rows), -1, -1)
    with torch.no_grad():
        parts = [torch.cat([a, table(ids).to(a)]) for a, ids in zip(first, rows, strict=True)]
    x, n = pad_sequence(parts, batch_first=True), first.shape[1]
    lengths = torch.tensor([len(part) for part in parts], device=x.device)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("attention_mask", "padding_side")}
    if (lengths < x.shape[1]).any():
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        kwargs["attention_mask"] = real.long()
    spans = tuple((0, length) for length in lengths.tolist())
    names = tuple(f"soft_prompt[{i}]" for i in range(n))
    return kwargs, Prompts(None, spans, tuple((*names, *own) for own in told.strings), x, n)
