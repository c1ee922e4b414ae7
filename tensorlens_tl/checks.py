"""Checks of arguments that several rooms share."""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeGuard


def no_autocast(kind: str) -> None:
    """Refuse to compute where torch.autocast would round every product.

    Args:
        kind: The device's type.

    Raises:
        ValueError: If autocast is on there.
    """
    import torch

    if kind != "meta" and torch.is_autocast_enabled(kind):
        raise ValueError(
            "autocast is on, expected full precision, as it would round every product: leave the "
            "torch.autocast block; for a model in half precision, cast the model: model.to(dtype)"
        )


def is_int(number: object) -> TypeGuard[int]:
    """Whether it is an integer: NumPy's are, True is not."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def at_least_one(number: Any, name: str) -> int:
    """A count that a user gave.

    Args:
        number: What was given.
        name: What it counts.

    Returns:
        It, as an int.

    Raises:
        ValueError: If it is no integer, or below 1.
    """
    if not is_int(number) or number < 1:
        raise ValueError(f"expected {name} as an integer ≥ 1, got {number!r}")
    return int(number)


def as_list(given: Any) -> Any:
    """A tensor or an array of ids as a list of them; a direction, or anything else, as it is."""
    import torch

    ids = getattr(given, "ndim", 0) == 1 and not torch.as_tensor(given).is_floating_point()
    return given.tolist() if ids else given


def one_each(given: Any, n: int, name: str) -> list[Any]:
    """What a user gave for all prompts, or for each.

    Args:
        given: A list with one for each, or ids [n] as a tensor or an array; or one for all.
        n: How many prompts there are.
        name: What it is called.

    Returns:
        One for each.

    Raises:
        ValueError: If there are not as many.
    """
    given = as_list(given)
    if not isinstance(given, list | tuple):
        return [given] * n
    if len(given) != n:
        raise ValueError(
            f"expected one of {name} per prompt, {n}, or one for all, got {len(given)}"
        )
    return list(given)
