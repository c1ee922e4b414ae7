"""Checks of what a file holds against the annotations of the dataclasses."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor


def check(value: Any, hint: Any, path: str, sizes: dict[str, int]) -> None:
    """Refuse a value that is not what its annotation says, shapes included.

    Args:
        value: From a file.
        hint: The annotation of the field it is for.
        path: Where it stands, for the message.
        sizes: Named sizes so far; new ones are entered.

    Raises:
        ValueError: If it does not fit.
    """
    if hint is Any:
        return
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if _is_a(value, option):
            hint = option
            break
    else:
        raise ValueError(f"{path}: expected {hint}, got {type(value).__name__}")
    arguments = get_args(hint)
    if isinstance(value, Tensor):
        _check_shape(value, hint, path, sizes)
    elif isinstance(value, tuple):
        each = arguments[0] if arguments[-1] is Ellipsis else None
        if each is None and len(arguments) != len(value):
            raise ValueError(f"{path}: expected {len(arguments)} values, got {len(value)}")
        for i, item in enumerate(value):
            check(item, arguments[i] if each is None else each, f"{path}.{i}", sizes)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check(key, arguments[0], path, sizes)
            check(item, arguments[1], f"{path}.{key}", sizes)
    elif is_dataclass(value):
        hints, own = get_type_hints(type(value)), dict(sizes)
        parts = [(f.name, getattr(value, f.name)) for f in fields(value)]
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


def _check_shape(tensor: Tensor, hint: Any, path: str, sizes: dict[str, int]) -> None:
    if tensor.is_floating_point() != hint.__name__.startswith("Float"):
        raise ValueError(f"{path}: expected {hint.__name__}, got {tensor.dtype}")
    names = hint.dim_str.split()
    expected = [
        int(name) if name.isdigit() else sizes.setdefault(name.removeprefix("query_").removeprefix("key_"), n)
        for name, n in zip(names, tensor.shape, strict=False)
    ]  # fmt: skip
    if len(names) != tensor.ndim or expected != list(tensor.shape):
        shown = f"[{', '.join(names)}] = {expected}" if len(names) == tensor.ndim else names
        raise ValueError(f"{path}: expected shape {shown}, got {list(tensor.shape)}")
