"""Weights that cannot be read as they are: packed, elsewhere, or not finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .errors import UnsupportedArchitectureError


def check_weights(named: Iterable[tuple[str, Any]]) -> None:
    """Refuse weights that are packed or elsewhere, and modules in the place of hook points.

    Args:
        named: The modules of a host model, or of a Hugging Face model, with their names.

    Raises:
        UnsupportedArchitectureError: If there is such a module; the message names the first.
    """
    for name, module in named:
        own = vars(module)
        tensors = [*own["_parameters"].values(), *own["_buffers"].values()]
        # Most modules of a host are hook points, or own nothing.
        if "fwd_hooks" in own or not (tensors or "_hf_hook" in own or "hook_" in name):
            continue
        hook = own.get("_hf_hook")  # accelerate's
        if hook and any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook])):
            problem = f"The weights of {name or 'the model'} are offloaded"
            remedy = "Load the model whole on one device, without a device map that offloads."
        elif any(t is not None and t.is_meta for t in tensors):
            problem = f"The weights of {name or 'the model'} are on the meta device, without values"
            remedy = "Load the model with its weights, whole on one device."
        elif "hook_sae_output" in own["_modules"]:  # an SAE of SAELens, which is read there
            continue
        elif name.rpartition(".")[2].startswith("hook_"):
            problem = (
                f"A module {type(module).__name__} stands at {name} in place of the hook point"
            )
            remedy = "Take it off (model.reset_saes()), or call it in a hook of your own."
        elif tensors and _is_packed(module):
            weight = own["_parameters"].get("weight")
            packed = module if type(weight) in (type(None), Tensor, nn.Parameter) else weight
            kind = f"{type(packed).__name__} of {type(packed).__module__.split('.')[0]}"
            problem = f"The weights of {name} are quantized ({kind})"
            remedy = "Load the model without quantization, or dequantize it first."
        else:
            continue
        raise UnsupportedArchitectureError(f"{problem}. {remedy}")


def _is_packed(module: Any) -> bool:
    """Whether a linear module's weight is no matrix of numbers that can be multiplied with."""
    own = vars(module)  # not hasattr: a Bridge looks through all its modules for what it lacks
    if {"qweight", "W_q", "quant_state"} & {*own, *own["_parameters"], *own["_buffers"]}:
        return True
    weight = own["_parameters"].get("weight")
    if weight is None or not {"in_features", "out_features"} <= own.keys():
        return False
    shape = (module.out_features, module.in_features)
    if tuple(weight.shape) != shape or not weight.is_floating_point() or weight.itemsize < 2:
        return True
    if type(weight) in (Tensor, nn.Parameter):
        return False
    try:  # what is done to a weight here; packed tensors know few operations
        weight.detach().permute(1, 0).unflatten(0, (1, -1))
    except Exception:
        return True
    return False


def plain_name(name: str) -> str:
    """The name that a module or weight of a Bridge has in the user's own model."""
    return ".".join(part for part in name.split(".") if part.strip("_") != "original_component")


def not_finite(name: str, model: Any) -> str:
    """Message that refuses NaN and infinity in a real token, with the weight or the likely cause.

    Args:
        name: What is not finite.
        model: The host model, whose weights may hold the cause.

    Returns:
        The message, in two sentences.
    """
    held = (n for n, p in model.named_parameters() if not bool(p.isfinite().all()))
    if weight := next(held, None):
        return (
            f"{name}: activations of a real token are not finite, as the weight "
            f"{plain_name(weight)} holds NaN or infinity. Load weights that are numbers."
        )
    # In float64 a padding mask overflows the host's float32 softmax; later layers read the NaN.
    return (
        f"{name}: activations of a real token are not finite (usual causes: padding in a float64 "
        "model, overflow in a float16 one). Use float32, right padding, or single prompts."
    )
