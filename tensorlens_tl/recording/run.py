"""Run a model once and freeze the run.

1. Adapt the model and record one forward pass, frozen and checked block by block.
2. Attach what only some questions need: the embedding matrix, and the weights of the scores.
3. On request, run the model in float32. Its own rounding is the noise floor of a half-precision
   lens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import no_autocast
from ..costs import free_memory
from ..hosts import Adapter, adapt
from ..maps import HALF, TINY, Frame
from ..operator import Capture, Convention
from ..readers import RecomputedReading, StoredReading, alone, with_graph
from ..refusals import NotRecomputableError
from .gradients import require_gradients, require_kept_graph
from .live_model import in_float32, inference_weights
from .recorder import Recorder

NOTED_BYTES = 2**30
"""Bytes of stored attention patterns from which on a warning names the other way."""


def freeze(
    model: Any,
    inputs: Any,
    *,
    gate: str = "gate",
    dtype: torch.dtype | None = None,
    pattern: str = "stored",
    noise_floor: bool = False,
    graph: bool = False,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos d_vocab"], Capture]:
    """Run a model once and freeze the run, with all that later questions may need.

    Args:
        model: A host model, or the adapter of one that runs more than once.
        inputs: A string, a list of strings, or token ids [pos] or [batch, pos].
        gate: How gated MLPs are made linear ("gate", "up" or "half"; see :class:`Convention`).
        dtype: Compute dtype of the operator, float32 or float64; None for the wider of float32
            and the model's own.
        pattern: "stored" to keep attention patterns, "recomputed" to keep queries and keys.
        noise_floor: Whether to run a half-precision model in float32, too.
        graph: Whether the capture keeps the autograd graph of the run.
        **kwargs: Arguments of the model's own forward pass.

    Returns:
        The logits as the model returned them, and the capture.

    Raises:
        ValueError: On bad input, or where a hook never fired.
        UnsupportedArchitectureError: If the model cannot be frozen exactly.
        CaptureMismatchError: If the run is not what the operator would compute.
    """
    if isinstance(inputs, Iterator):  # such as a generator; it can be read once
        inputs = list(inputs)
    with alone(model.model if isinstance(model, Adapter) else model):
        adapter = model if isinstance(model, Adapter) else adapt(model)
        if noise_floor:
            _require_half_precision(adapter.dtype)
        # 1. One forward pass.
        convention = Convention(gate)
        logits, capture = record(adapter, inputs, convention, dtype, pattern, graph, **kwargs)
        # 2. What some questions need. This is done now, although few lenses ask for query and key
        # edges: a capture holds no host, and it must know the version of every weight it may use,
        # so that a later change is refused. Only rotation tables are computed.
        # With a graph they are not known: these edges are first-order, and no gradient is theirs.
        scores = "graph=True" if graph else adapter.score_weights(capture.frame.n_pos, kwargs)
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
    graph: bool = False,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos d_vocab"], Capture]:
    """Run the model once and freeze the run.

    Args:
        adapter: Adapter of the model.
        inputs: A string, a list of strings, or token ids [pos] or [batch, pos].
        convention: The choices under which the operator is unique.
        dtype: Compute dtype of the operator, float32 or float64; by default float32, or the
            model's own where that is wider.
        pattern: "stored" to keep attention patterns, "recomputed" to keep queries and keys.
        graph: Whether the capture keeps the autograd graph of the run.
        **kwargs: Arguments of the model's own forward pass.

    Returns:
        The logits as the model returned them, and the capture.

    Raises:
        ValueError: On bad input, or where a hook never fired.
        NotRecomputableError: If patterns of this run cannot be recomputed.
        CaptureMismatchError: If the run is not what the operator would compute.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"dtype={dtype!r} is no compute dtype of the operator. "
            "Give torch.float32 or torch.float64."
        )
    how = choose_reading(adapter, pattern)
    if graph:
        require_gradients(adapter, pattern)
    dtype = dtype or torch.promote_types(adapter.dtype, torch.float32)
    device = adapter.weights.unembed.W_U.device
    no_autocast(device.type)
    with alone(adapter.model):
        kwargs, prompts = adapter.prepare(inputs, kwargs)
        if pattern == "recomputed" and (cause := adapter.not_recomputed(kwargs)):
            raise NotRecomputableError(f"this run of {adapter.name}", cause)
        frame = Frame(prompts.spans, prompts.n_pos, dtype, device, adapter.read_at, graph)
        if pattern == "stored":
            _note_patterns(adapter, frame)
        recorder = Recorder(adapter, prompts, frame, convention or Convention(), how, kwargs)
        handles = how.guards(adapter.hooked_patterns())
        try:
            for read, point in adapter.points(how.reads).items():
                early = read[1] in adapter.before_edits
                add = point.register_forward_pre_hook if early else point.register_forward_hook
                handles.append(add(recorder.listen(read)))
                if graph and read[1].endswith("scale"):
                    handles += with_graph(point)
            for layer, give in recorder.expert_readers():
                handles += adapter.mixture(layer).watch(give)
            keeps_graph = torch.is_grad_enabled() and how.needs_grad
            with torch.set_grad_enabled(keeps_graph and not inference_weights(adapter.model)):
                logits = adapter.run(prompts.given, kwargs)
        finally:
            for handle in handles:
                handle.remove()
        with torch.set_grad_enabled(graph):
            capture = recorder.finish(logits)
    if graph:
        require_kept_graph(adapter, capture)
    return logits, capture


def _note_patterns(adapter: Adapter, frame: Frame) -> None:
    """Refuse patterns that memory does not hold; warn of large ones that need not be stored."""
    blocks, cells = adapter.weights.blocks, frame.batch * frame.n_pos**2
    taken = sum(len(block.attn.W_O) for block in blocks) * cells * frame.dtype.itemsize
    if taken < NOTED_BYTES:
        return
    if taken > (free := free_memory(frame.device)):
        raise ValueError(
            f"The attention patterns of this run take {taken / 2**30:.2g} GiB, and "
            f'{free / 2**30:.2g} GiB are free. Pass pattern="recomputed", or a shorter prompt.'
        )
    with suppress(NotRecomputableError):
        adapter.recomputed_reading()
        warnings.warn(
            f"The attention patterns of this run take {taken / 2**30:.2g} GiB. Pass "
            'pattern="recomputed" to keep queries and keys instead.',
            stacklevel=5,
        )


def choose_reading(adapter: Adapter, pattern: str) -> StoredReading | RecomputedReading:
    """Choose how a capture reads attention.

    Args:
        adapter: Adapter of the model.
        pattern: "stored" or "recomputed".

    Returns:
        What to read of attention, and what becomes of it.

    Raises:
        ValueError: If ``pattern`` is something else.
        NotRecomputableError: If the model's patterns cannot be recomputed.
    """
    if pattern not in ("stored", "recomputed"):
        raise ValueError(
            f'pattern={pattern!r} is not known. Give pattern="stored" or pattern="recomputed".'
        )
    return StoredReading() if pattern == "stored" else adapter.recomputed_reading()


def _require_half_precision(dtype: torch.dtype) -> None:
    """Refuse a noise floor where a float32 copy would be no more precise than the model.

    Raises:
        ValueError: If the model is neither bfloat16 nor float16.
    """
    if dtype not in HALF:
        raise ValueError(
            "noise_floor compares a model in bfloat16 or float16 with its float32 copy, and this "
            f"model is in {str(dtype).removeprefix('torch.')}. Call without noise_floor."
        )


def _with_noise_floor(
    capture: Capture, model: Any, inputs: Any, kwargs: Mapping[str, Any]
) -> Capture:
    """Measure the model's own rounding, max |logits − exact| / max |exact|.

    ``exact`` are the logits [batch, pos, d_vocab] at real tokens of the model in float32, with the
    same weights, prompts and hooks of the user's own.

    Args:
        capture: Capture of the model's run.
        model: The model that ran; it has its own weights back at the end.
        inputs: Input of the run: a string, a list of strings or token ids.
        kwargs: Arguments of the run.

    Returns:
        The capture with its ``noise_floor``.
    """
    with in_float32(model), torch.no_grad():
        adapter = adapt(model)
        kwargs, prompts = adapter.prepare(inputs, kwargs)
        exact = adapter.run(prompts.given, kwargs)
    rows = capture.frame.real if exact.ndim == 3 else slice(None)
    off = (capture.logits[rows].to(exact) - exact[rows]).abs().max()
    return replace(capture, noise_floor=float(off / exact[rows].abs().max().clamp_min(TINY)))
