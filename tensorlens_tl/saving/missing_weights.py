"""Stand-ins for the weights of a lens that was loaded without them.

Logits, tokens and checks need no weights, so such a lens is of use. Whatever asks for a weight gets
an error that says how to load the weights, too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ..operator import Capture

MISSING = (
    "This lens was loaded without the model's weights. Pass model= to tensorlens_tl.load, or save "
    "the lens with weights=True."
)
"""The message of every such error."""


class MissingWeights:
    """Stands where weights were not loaded. Any use raises a ValueError that says what to do."""

    __node__: dict[str, Any]

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise ValueError(MISSING)

    def __repr__(self) -> str:
        return "<weights not loaded>"

    def __reduce__(self) -> tuple[Any, ...]:
        return missing, (type(self).__mro__[2], self.__node__, "")


@cache
def _missing_class(cls: type) -> type:
    # A subclass, so that annotations hold and isinstance still tells an MLP from attention.
    return type(f"Missing{cls.__name__}", (MissingWeights, cls), {})


def missing(cls: type, node: dict[str, Any], path: str) -> Any:
    """Make a stand-in for weights of a class. It keeps the file's entry, to be saved again."""
    stand_in = object.__new__(_missing_class(cls))
    object.__setattr__(stand_in, "__node__", node)
    return stand_in


def require_weights(capture: Capture) -> Capture:
    """Return the capture, if its weights were loaded.

    Args:
        capture: A captured run, perhaps from a file.

    Returns:
        The same capture.

    Raises:
        ValueError: If the capture was loaded without weights.
    """
    if isinstance(capture.unembed.weights, MissingWeights):
        raise ValueError(MISSING)
    return capture
