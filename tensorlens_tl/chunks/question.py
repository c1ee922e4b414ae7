"""What tells one question from another: hashes of weights, options and prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes


def question_of(about: Any, rows: Iterable[Iterable[Any]]) -> str:
    """Hash all that results depend on.

    Args:
        about: Options, and the fingerprint of the weights.
        rows: Prompts with their targets; tensors among them.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(about).encode())
    for row in rows:
        digest.update(repr([plain(part) for part in row]).encode())
    return digest.hexdigest()[:32]


def plain(value: Any) -> Any:
    """A tensor as lists; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Hash a few numbers of every weight; the hash is the same for every dtype down to bfloat16.

    Args:
        tensors: Weights of the model.

    Returns:
        16 hexadecimal digits, or "" where the weights have no content, as in a rehearsal.
    """
    tensors, digest = list(tensors), hashlib.sha256()
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return ""
    with _disable_current_modes():  # the weights' own numbers, also where a call is rehearsed
        for tensor in tensors:
            W = tensor.detach().flatten(0, -2)
            some = torch.cat((W[:4, :4].flatten(), W[-4:, -4:].flatten())).float().bfloat16()
            digest.update(some.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_mark(weights: Any) -> str:
    """Hash a few numbers of a model: of what its heads write, and of its unembedding.

    Args:
        weights: All weights, as an adapter has them.

    Returns:
        16 hexadecimal digits.
    """
    return fingerprint([*(block.attn.W_O for block in weights.blocks), weights.unembed.W_U])
