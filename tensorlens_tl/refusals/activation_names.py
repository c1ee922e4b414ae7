"""Names of activations: the hosts', those of their modules, and this library's."""

from __future__ import annotations

from typing import Any

from torch.nn.functional import softplus

from .errors import UnsupportedArchitectureError, refusal

_ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_fast",
    "gelu_bloom": "gelu_bloom",
    "quick_gelu": "quick_gelu",
    "solu": "solu",
    "solu_ln": "solu",
}
"""Activations by the hosts' names of them."""


def activation_name(act: str) -> str:
    """Name an activation as this library does.

    Args:
        act: The host's name of it.

    Returns:
        A key of :data:`tensorlens_tl.sublayers.activations.RATIOS`.

    Raises:
        UnsupportedArchitectureError: If no closed form of its gating ratio is known.
    """
    if act not in _ACTIVATIONS:
        raise UnsupportedArchitectureError(
            refusal(f"the activation {act!r}", "no closed form of act(z) / z is known for it")
        )
    return _ACTIVATIONS[act]


_ACT_FNS = {
    "BloomGelu": "gelu_bloom",
    "FastGELUActivation": "gelu_fast",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_new",
    "NewGELUActivation": "gelu_new",
    "PytorchGELUTanh": "gelu_new",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
"""Activations by the class of their module. A Bridge's config may name another one."""


def act_name(module: Any) -> str:
    """The host's name of an activation, by its module."""
    kind = type(module).__name__
    if kind == "GELU":
        return "gelu" if module.approximate == "none" else "gelu_new"
    return _ACT_FNS.get(kind, kind)


def xielu_name(mlp: Any) -> str:
    """Name of an xIELU with what it has learned; "" for another activation."""
    act: Any = getattr(getattr(mlp, "original_component", None), "act_fn", None)
    if type(act).__name__ != "XIELUActivation":
        return ""
    rise, fall = (float(softplus(alpha)) for alpha in (act.alpha_p, act.alpha_n))
    return f"xielu({rise}, {float(act.beta) + fall}, {float(act.beta)})"
