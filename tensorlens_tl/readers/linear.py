"""Linear modules of a Bridge, however the model inside lays their weights out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..refusals import UnsupportedArchitectureError, is_adapted, merge_first, refusal


def inner(module: Any) -> Any:
    """The module inside a component of a Bridge, or the module itself."""
    return getattr(module, "original_component", module)


def linear_weights(bridge: Any) -> tuple[Tensor, Tensor | None]:
    """A Bridge's linear module as x @ W + b."""
    # The orientation is told by the module's type, never by the shape: square weights have both.
    module = inner(bridge)
    if is_adapted(module):
        at = bridge.hook_in.name.removesuffix(".hook_in") if module is not bridge else "an expert"
        raise UnsupportedArchitectureError(merge_first(at))
    if isinstance(module, nn.Linear):
        return module.weight.T, module.bias
    if type(module).__name__ == "Conv1D":
        return module.weight, module.bias
    raise UnsupportedArchitectureError(
        refusal(f"the linear module {type(module).__name__}", "its orientation is not known here")
    )
