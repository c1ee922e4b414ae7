"""What stands where a lens was loaded without its weights."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..operator import Capture

MISSING = (
    "this lens was loaded without weights: pass model= to tensorlens_tl.load, or save with "
    "weights=True"
)


class MissingWeights:
    """Stands where weights were not loaded: any use raises a ValueError that says what to do."""

    __node__: dict[str, Any]

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise ValueError(MISSING)

    def __repr__(self) -> str:
        return "<weights not loaded>"


@cache
def _missing_class(cls: type) -> type:
    return type(f"Missing{cls.__name__}", (MissingWeights, cls), {})


def missing(cls: type, node: dict[str, Any], path: str) -> Any:
    """What stands in for weights of a class; it keeps their entry, to be saved again."""
    stand_in = object.__new__(_missing_class(cls))
    object.__setattr__(stand_in, "__node__", node)
    return stand_in


def require_weights(capture: Capture) -> Capture:
    """The capture, if its weights are there.

    Args:
        capture: The run.

    Returns:
        The same capture.

    Raises:
        ValueError: If it was loaded without weights.
    """
    if isinstance(capture.unembed.weights, MissingWeights):
        raise ValueError(MISSING)
    return capture
