"""Run a model once and freeze the run.

1. Adapt the model and record one forward pass, frozen and checked block by block.
2. Attach what only some questions need: the embedding matrix, and the weights of the scores.
3. On request, run a float32 copy: the model's own rounding is the noise floor of a half-precision lens.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..operator import Capture, Convention
from ..sublayers import HALF, Frame
from .adapter import Adapter
from .attention_reading import reading
from .entry import adapt
from .recorder import Recorder
from .score_weights import score_weights


def freeze(
    model: Any,
    inputs: Any,
    *,
    gate: str = "gate",
    dtype: torch.dtype | None = None,
    pattern: str = "stored",
    noise_floor: bool = False,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos d_vocab"], Capture]:
    """Run a model once and freeze the run, with all that questions to it may need.

    Args:
        model: A host model, or the adapter of one that runs more than once.
        inputs: A string, a list of strings, or token ids [pos] or [batch, pos].
        gate: How gated MLPs are made linear, as in :class:`Convention`.
        dtype: Compute dtype of the operator, float32 or float64; None for the wider of float32
            and the model's own.
        pattern: "stored" or "recomputed".
        noise_floor: Whether to run a float32 copy of a half-precision model, too.
        **kwargs: The model's own arguments.

    Returns:
        The logits as the model returned them, and the capture.

    Raises:
        ValueError: On bad input, or where a hook never fired.
        UnsupportedArchitectureError: If the model cannot be frozen exactly.
        CaptureMismatchError: If the run is not what the operator would compute.
    """
    adapter = model if isinstance(model, Adapter) else adapt(model)
    if noise_floor:
        _require_half_precision(adapter.dtype)
    # 1. One forward pass.
    logits, capture = record(adapter, inputs, Convention(gate), dtype, pattern, **kwargs)
    # 2. What some questions need, by reference.
    scores = score_weights(adapter, capture.frame.n_pos)
    capture = replace(capture, embed_weights=adapter.embed_weights(), score_weights=scores)
    # 3. The model's own rounding.
    if noise_floor:
        capture = _with_noise_floor(capture, adapter.model, inputs, kwargs)
    return logits, capture


def record(
    adapter: Adapter,
    inputs: Any,
    convention: Convention | None = None,
    dtype: torch.dtype | None = None,
    pattern: str = "stored",
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos d_vocab"], Capture]:
    """Run the model once and freeze the run.

    Args:
        adapter: The model's.
        inputs: A string, a list of strings, or token ids.
        convention: The choices under which the operator is unique.
        dtype: Compute dtype of the operator, float32 or float64; by default float32, or the
            model's own where that is wider.
        pattern: "stored" or "recomputed".
        **kwargs: The model's own arguments.

    Returns:
        The logits as the model returned them, and the capture.

    Raises:
        ValueError: On bad input, or where a hook never fired.
        CaptureMismatchError: If the run is not what the operator would compute.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"expected dtype float32 or float64, got {dtype}")
    how = reading(adapter, pattern)
    inputs, prompts = adapter.prepare(inputs, kwargs)
    dtype = dtype or torch.promote_types(adapter.dtype, torch.float32)
    device = adapter.weights.unembed.W_U.device
    frame = Frame(prompts.spans, prompts.tokens.shape[1], dtype, device)
    recorder = Recorder(adapter, prompts, frame, convention or Convention(), how)
    handles = how.guards(adapter)
    try:
        for read, point in adapter.points(how.reads).items():
            early = read[1] in adapter.before_edits
            add = point.register_forward_pre_hook if early else point.register_forward_hook
            handles.append(add(recorder.listen(read)))
        with torch.set_grad_enabled(torch.is_grad_enabled() and how.needs_grad):
            logits = adapter.run(inputs, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        return logits, recorder.finish(logits)


def _require_half_precision(dtype: torch.dtype) -> None:
    """Refuse a noise floor where a float32 copy would be no more precise than the model.

    Raises:
        ValueError: If the model is neither bfloat16 nor float16.
    """
    if dtype not in HALF:
        raise ValueError(
            f"noise_floor compares with a float32 copy of the model, expected a model in bfloat16 or "
            f"float16, got {str(dtype).removeprefix('torch.')}: leave noise_floor out"
        )


def _with_noise_floor(
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
