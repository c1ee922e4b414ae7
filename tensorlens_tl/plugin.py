"""The way in: ``capture`` and the ``run_with_tensorlens`` method of the host classes.

Importing this file imports neither torch nor a host: the host classes get their method when they
are imported, before or after the plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .lens import TensorLens

METHOD = "run_with_tensorlens"

_HOSTS = {
    "transformer_lens.HookedTransformer": "HookedTransformer",
    "transformer_lens.model_bridge.bridge": "TransformerBridge",
    "transformer_lens.model_bridge.transformer_bridge": "TransformerBridge",
}
_installed = False
_registered = False
_patched: list[type] = []


def capture(
    model: Any,
    input: Any,
    *,
    gate: str = "gate",
    dtype: torch.dtype | None = None,
    pattern: str = "stored",
    tokenizer: Any = None,
    noise_floor: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, TensorLens]:
    """Run a model once and return its logits with the run's TensorLens.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``; where the Bridge is installed
            also
            a Hugging Face causal language model, which is then wrapped *in place* (see
            :func:`wrap`).
        input: A string, a list of strings (padded by the host), or token ids [pos] or [batch, pos];
            padded ids need their ``attention_mask``.
        gate: How gated MLPs are made linear: "gate", "up" or "half" (:class:`Convention`).
        dtype: Compute dtype of the operator, float32 or float64; by default float32, or the
            model's own where that is wider.
        pattern: "stored" keeps every layer's heads × L² pattern; "recomputed" keeps queries and
            keys, and recomputes the pattern block by block wherever it is used: for long prompts.
            The numbers are the same to rounding; the logits carry no graph.
        tokenizer: For a Hugging Face model only.
        noise_floor: For a bfloat16 or float16 model: whether to run the prompt on a float32 copy of
            it, too, so that ``lens.completeness_error`` is shown beside the model's own rounding.
            It costs the copy's memory and a second run; the model itself is not touched.
        **kwargs: The model's own arguments, such as ``prepend_bos`` or ``padding_side``.

    Returns:
        The logits [batch, pos, d_vocab] exactly as the model returned them, and the lens.

    Raises:
        ValueError: On bad input; the message says what was expected, what came and what to do.
        UnsupportedArchitectureError: If the model cannot be frozen exactly.
        CaptureMismatchError: If the run is not what the operator would compute.
    """
    from .hosts import freeze, hosted
    from .lens import TensorLens

    logits, captured = freeze(
        hosted(model, tokenizer), input,
        gate=gate, dtype=dtype, pattern=pattern, noise_floor=noise_floor, **kwargs,
    )  # fmt: skip
    lens = TensorLens(captured, captured.versions())
    if noise_floor:
        _ = lens.completeness_error  # now known, so that its repr shows both
    return logits, lens


def _run_with_tensorlens(self: Any, input: Any, **kwargs: Any) -> tuple[Tensor, TensorLens]:
    """Like ``run_with_cache``: the logits, and the run's TensorLens. See ``tensorlens_tl.capture``."""
    return capture(self, input, **kwargs)


def _patch(class_name: str, module: Any) -> None:
    cls = getattr(module, class_name, None)
    if _installed and isinstance(cls, type) and METHOD not in vars(cls):
        setattr(cls, METHOD, _run_with_tensorlens)
        _patched.append(cls)


def install() -> None:
    """Give every host class its ``run_with_tensorlens``, now or when it is imported. Idempotent."""
    global _installed, _registered
    _installed = True
    import sys

    for name, class_name in _HOSTS.items():
        if name in sys.modules:
            _patch(class_name, sys.modules[name])
        elif not _registered:
            wrapt.register_post_import_hook(
                lambda module, class_name=class_name: _patch(class_name, module), name
            )
    _registered = True


def uninstall() -> None:
    """Take the method off again, and off classes yet to be imported. Idempotent."""
    global _installed
    _installed = False
    while _patched:
        delattr(_patched.pop(), METHOD)
