"""Checks of what a file holds against the annotations of the library's dataclasses.

A jaxtyping annotation such as ``Float[Tensor, "batch pos d_model"]`` names the sizes of a tensor. A
name must have one size wherever it stands inside one object.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor


class Misfit(ValueError):  # noqa: N818 (its message is a clause of the reader's error)
    """A part of a file that is not as it should be. The reader adds the file and the remedy."""


def check(value: Any, hint: Any, path: str, sizes: dict[str, int]) -> None:
    """Refuse a value that does not fit its annotation, shapes included.

    Args:
        value: What was read from a file.
        hint: The annotation of the field that the value is for.
        path: The dotted name of the field, for the message.
        sizes: Named sizes found so far. New ones are entered.

    Raises:
        Misfit: If the value does not fit.
    """
    if hint is Any:
        return
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    fitting = [option for option in options if _is_a(value, option)]
    ranks = [option for option in fitting if _rank(option) == getattr(value, "ndim", None)]
    if fitting:
        hint = (ranks or fitting)[0]
    else:
        raise Misfit(f"{path}: expected {hint}, got {type(value).__name__}")
    arguments = get_args(hint)
    if isinstance(value, Tensor):
        _check_shape(value, hint, path, sizes)
    elif isinstance(value, tuple):
        each = arguments[0] if arguments[-1] is Ellipsis else None
        if each is None and len(arguments) != len(value):
            raise Misfit(f"{path}: expected {len(arguments)} values, got {len(value)}")
        for i, item in enumerate(value):
            check(item, arguments[i] if each is None else each, f"{path}.{i}", sizes)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check(key, arguments[0], path, sizes)
            check(item, arguments[1], f"{path}.{key}", sizes)
    elif is_dataclass(value):
        hints, own = get_type_hints(type(value)), dict(sizes)
        parts = [(f.name, getattr(value, f.name)) for f in fields(value)]
        # Tensors first: they set the sizes that nested objects must agree with.
        for name, part in sorted(parts, key=lambda pair: not isinstance(pair[1], Tensor)):
            check(part, hints[name], f"{path}.{name}", own)


def _is_a(value: Any, hint: Any) -> bool:
    if hasattr(hint, "dim_str"):
        return isinstance(value, Tensor)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return type(value) is int
    return hint is Any or isinstance(value, get_origin(hint) or hint)


def _rank(hint: Any) -> int:
    return len(getattr(hint, "dim_str", "").split())


def _check_shape(tensor: Tensor, hint: Any, path: str, sizes: dict[str, int]) -> None:
    if tensor.is_floating_point() != hint.__name__.startswith("Float"):
        raise Misfit(f"{path}: expected {hint.__name__}, got {tensor.dtype}")
    names = hint.dim_str.split()
    if names[-1] == "...":  # axes of any number and size
        names[-1:] = [str(n) for n in tensor.shape[len(names) - 1 :]]
    expected = []
    for name, n in zip(names, tensor.shape, strict=False):
        axis = name.removeprefix("query_").removeprefix("key_")  # both are positions
        expected.append(int(name) if name.isdigit() else sizes.setdefault(axis, n))
    if len(names) != tensor.ndim or expected != list(tensor.shape):
        shown = f"[{', '.join(names)}] = {expected}" if len(names) == tensor.ndim else names
        raise Misfit(f"{path}: expected shape {shown}, got {list(tensor.shape)}")
