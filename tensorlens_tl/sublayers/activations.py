"""Activation functions as gating ratios act(z) / z, and the soft cap."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def _tanh_gelu(z: Tensor, k: float = math.sqrt(2 / math.pi)) -> Tensor:
    # ½(1 + tanh u) = σ(2u) with u = k (z + 0.044715 z³); in three passes, as it runs per neuron.
    return torch.addcmul(z.new_tensor(2 * k), z, z, value=2 * k * 0.044715).mul_(z).sigmoid_()


def _xielu(z: Tensor, rise: float, fall: float, slope: float) -> Tensor:
    # Between −1e-6 and 0 Hugging Face's own is off by up to 1e-6, as it takes e^−1e-6 there.
    below = fall * (torch.where(z < 0, torch.expm1(z) / z, 1) - 1)
    return torch.where(z > 0, rise * z, below) + slope


RATIOS = {
    "relu": lambda z: (z > 0).to(z.dtype),
    "relu2": lambda z: z.clamp_min(0),
    "silu": torch.sigmoid,
    "gelu": lambda z: 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": _tanh_gelu,
    "gelu_fast": lambda z: _tanh_gelu(z, 0.7978845608),  # √(2/π) as that activation rounds it
    "gelu_bloom": lambda z: _tanh_gelu(z, 0.79788456),  # and as Hugging Face's BLOOM does
    "quick_gelu": lambda z: torch.sigmoid(1.702 * z),
    "solu": lambda z: z.softmax(-1),
}
"""act(z) / z in closed form, by name of the activation: without a division, so exact at z = 0."""


def gating_ratio(act: str, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Compute the gating ratio r = act(z) / z of an activation, in closed form.

    GELU gives Φ(z), its tanh form ½(1 + tanh √(2/π)(z + 0.044715 z³)), SiLU σ(z), ReLU 1[z > 0],
    squared ReLU max(z, 0), SoLU softmax(z). xIELU gives a z + c above 0, and
    b ((eᶻ − 1) / z − 1) + c below. Its a, b and c are learned: "xielu(0.8, 0.9, 0.5)".

    Args:
        act: Name of the activation, one of :data:`RATIOS`, or of an xIELU.
        z: Pre-activations of any shape; SoLU takes its softmax over the last axis.

    Returns:
        The ratios, in the shape and dtype of ``z``. r ⊙ z is the activation.

    Raises:
        ValueError: If the activation is not known.
    """
    if act.startswith("xielu("):
        return _xielu(z, *map(float, act[len("xielu(") : -1].split(",")))
    if act not in RATIOS:
        raise ValueError(f"The activation {act!r} is not known. Use one of {', '.join(RATIOS)}.")
    return RATIOS[act](z)


def activation_slope(act: str, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Compute the derivative act′(z) of an activation that acts on every number by itself.

    Args:
        act: Name of the activation, as for :func:`gating_ratio`; not SoLU, whose softmax mixes.
        z: Pre-activations of any shape.

    Returns:
        The derivatives, in the shape and dtype of ``z``.

    Raises:
        ValueError: If the activation is SoLU, or not known.
    """
    if act == "solu":
        raise ValueError("SoLU's ratios depend on all neurons at once. Drop gates=.")
    with torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad((gating_ratio(act, z) * z).sum(), z)
    return slope


def soft_cap_ratio(logits: Tensor, cap: float) -> Tensor:
    """The ratio of capped to plain logits, cap · tanh(l / cap) / l, with its limit 1 at l = 0."""
    t = logits / cap
    return torch.where(t == 0, torch.ones_like(t), torch.tanh(t) / torch.where(t == 0, 1, t))
