"""How much of a lens's error is the model's own rounding: the same run on a float32 copy."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..operator.capture import Capture
from ..sublayers.batch_layout import HALF
from .bridge import adapt


def require_half_precision(dtype: torch.dtype) -> None:
    """Refuse a noise floor where a float32 copy would be no more precise than the model.

    Raises:
        ValueError: If the model is neither bfloat16 nor float16.
    """
    if dtype not in HALF:
        raise ValueError(
            f"noise_floor compares with a float32 copy of the model, expected a model in bfloat16 or "
            f"float16, got {str(dtype).removeprefix('torch.')}: leave noise_floor out"
        )


def with_noise_floor(
    capture: Capture, model: Any, inputs: Any, kwargs: Mapping[str, Any]
) -> Capture:
    """A capture that knows the model's own rounding, max |logits − exact| / max |exact|.

    ``exact`` are the logits [batch, pos, d_vocab] at real tokens of a deep copy of the model in
    float32, with the same weights, prompts and hooks of the user's own.

    Args:
        capture: The run.
        model: The model that ran; it is not touched.
        inputs: What it ran on: a string, a list of strings or token ids.
        kwargs: The arguments it ran with.

    Returns:
        The capture with its ``noise_floor``.
    """
    held = [v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor)]
    # Some Bridges keep a run's pattern, graph and all, which deepcopy refuses.
    copy = deepcopy(model, {id(v): v.detach() for v in held if not v.is_leaf})
    copy = copy.to(torch.float32, print_details=False)
    for module in copy.modules():
        # Processed weights of 3.9 are attributes, which .to() passes over.
        tensors = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        vars(module).update({k: v.float() for k, v in tensors.items() if v.dtype in HALF})
    adapter = adapt(copy)
    inputs, _ = adapter.prepare(inputs, kwargs)
    with torch.no_grad():
        exact = adapter.run(inputs, kwargs)[capture.frame.real]
    off = (capture.logits[capture.frame.real].to(exact) - exact).abs().max()
    return replace(capture, noise_floor=float(off / exact.abs().max().clamp_min(1e-30)))
