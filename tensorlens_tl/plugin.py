"""The way in: ``capture``, and the ``run_with_tensorlens`` method of the host classes.

Importing this file imports neither torch nor a host. The host classes get their method when they
are imported, whether that is before or after this file.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import wrapt

from .checks import spelled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .lens import TensorLens

METHOD = "run_with_tensorlens"
"""Name of the method that host classes get."""

_HOSTS = {
    "transformer_lens.HookedTransformer": "HookedTransformer",
    "transformer_lens.HookedEncoder": "HookedEncoder",
    "transformer_lens.model_bridge.bridge": "TransformerBridge",
    "transformer_lens.model_bridge.transformer_bridge": "TransformerBridge",
}
_installed = False
_registered = False
_patched: list[type] = []


@spelled
def capture(
    model: Any,
    input: Any,
    *,
    gate: str = "gate",
    dtype: torch.dtype | None = None,
    pattern: str = "stored",
    tokenizer: Any = None,
    noise_floor: bool = False,
    graph: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, TensorLens]:
    """Run a model once and return its logits with the run's TensorLens.

    The model runs as usual, in one forward pass. Attention patterns, normalization scales and
    activation ratios are frozen at the values of this run. What is left is one affine map from the
    embedded prompt to the logits: the operator. The lens holds the operator and tells where a logit
    comes from. The run is checked against the model's own activations while it is recorded.

    On a TransformerLens model, ``model.run_with_tensorlens(input, ...)`` is the same call.

    Args:
        model: Model to run: a ``HookedTransformer``, a ``TransformerBridge``, or a Hugging Face
            causal language model. A Hugging Face model is wrapped by a Bridge *in place*; see
            :func:`wrap`.
        input: Prompt or prompts: a string, a list of strings, token ids [pos] or [batch, pos], or
            what a tokenizer returns. Strings are tokenized by the model's tokenizer, and padded.
            Padded ids need ``attention_mask=``. None where a Bridge runs ``inputs_embeds=``, rows
            [batch, pos, d_model] without ids. A model of pictures reads pixel values [batch,
            channel, row, column], and one of sounds spectrograms [batch, time, frequency].
        gate: Frozen factor of a gated MLP act(g) ⊙ u. "gate" freezes act(g), "up" freezes u, and
            "half" takes half of each; see :class:`Convention`. Models without gated MLPs ignore
            the argument.
        dtype: Dtype in which the lens computes, ``torch.float32`` or ``torch.float64``. None is
            float32, or the model's own dtype where that is wider.
        pattern: How attention patterns are kept. "stored" keeps n_heads × pos² numbers per layer.
            "recomputed" keeps queries and keys instead, and makes patterns anew where they are
            used: for long prompts. The results are the same to rounding, but the returned logits
            then carry no autograd graph.
        tokenizer: Tokenizer of a Hugging Face model, for text prompts; it is not changed. Leave it
            None for a TransformerLens model, which has its own.
        noise_floor: Whether to measure how much a bfloat16 or float16 model rounds. The prompt
            then also runs with the model held in float32 for a while, and the lens shows its own
            error beside the model's rounding. It costs that memory and a second run.
        graph: Whether the lens keeps the autograd graph of the run, as training on the operator
            needs. Patterns, scales, ratios and weights are then functions of the parameters, and
            so is all that the lens gives. It keeps every activation until the lens is dropped.
        **kwargs: Arguments of the model, such as ``prepend_bos`` or ``padding_side``. For a Bridge
            also ``soft_prompt``: rows [pos, d_model] that stand before the tokens of a prompt.

    Returns:
        The logits [batch, pos, d_vocab], exactly as the model returned them, and the lens.

    Raises:
        ValueError: If an argument is wrong. The message says what is wrong and what to do.
        UnsupportedArchitectureError: If the model cannot be frozen exactly.
        CaptureMismatchError: If the run is not what the operator would compute.

    Example:
        >>> from tensorlens_tl import capture, demo
        >>> model = demo.load_model()
        >>> logits, lens = capture(model, "The capital of France is")
        >>> model.tokenizer.decode([int(logits[0, -1].argmax())])
        'Paris'
        >>> lens
        TensorLens(tensorlens_tl demo, 6 tokens, <bos> added in front, ...)
        >>> lens.attribute("Paris", versus="Rome").top(1)
        [('"France"@4', 11.08...)]
    """
    from .hosts import as_host
    from .lens import TensorLens, WriteCheck
    from .recording import freeze

    logits, captured = freeze(
        as_host(model, tokenizer),
        input,
        gate=gate,
        dtype=dtype,
        pattern=pattern,
        noise_floor=noise_floor,
        graph=graph,
        **kwargs,
    )
    lens = TensorLens(captured, WriteCheck.of(captured.tensors()))
    if noise_floor:
        _ = lens.completeness_error  # computed now, so that the lens's repr shows both errors
    return logits, lens


def _run_with_tensorlens(self: Any, input: Any, **kwargs: Any) -> tuple[Tensor, TensorLens]:
    return capture(self, input, **kwargs)


_SAME_CALL = """
    On a TransformerLens model, ``model.run_with_tensorlens(input, ...)`` is the same call.
"""


def _describe(method: Any) -> None:
    """Give the method the name, parameters and docstring that ``help`` shows: those of capture."""
    signature = inspect.signature(capture)
    _, *parameters = [p for name, p in signature.parameters.items() if name != "tokenizer"]
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = signature.replace(parameters=[self, *parameters])
    method.__name__ = method.__qualname__ = METHOD
    # The model is the method's self, and has a tokenizer: neither is an argument here.
    entries = r"\n {8}(?:model|tokenizer): .*(?:\n {12}.*)*"
    text = re.sub(entries, "", capture.__doc__ or "")
    text = text.replace(_SAME_CALL, "").replace("import capture, demo", "import demo")
    method.__doc__ = text.replace("capture(model, ", f"model.{METHOD}(")


_describe(_run_with_tensorlens)
_run_with_tensorlens = spelled(_run_with_tensorlens)


def _patch(class_name: str, module: Any) -> None:
    cls = getattr(module, class_name, None)
    if _installed and isinstance(cls, type) and METHOD not in vars(cls):
        setattr(cls, METHOD, _run_with_tensorlens)
        _patched.append(cls)


@spelled
def install() -> None:
    """Give every TransformerLens model class its ``run_with_tensorlens`` method.

    Classes that are imported later get the method then. Importing the package calls this function;
    calling it again changes nothing.

    Example:
        >>> import tensorlens_tl
        >>> from tensorlens_tl import demo
        >>> tensorlens_tl.install()
        >>> hasattr(demo.load_model(), "run_with_tensorlens")
        True
    """
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


@spelled
def uninstall() -> None:
    """Take ``run_with_tensorlens`` off every class again, also off classes imported later.

    :func:`capture` goes on to work. Calling the function again changes nothing.

    Example:
        >>> import tensorlens_tl
        >>> from tensorlens_tl import demo
        >>> tensorlens_tl.uninstall()
        >>> hasattr(demo.load_model(), "run_with_tensorlens")
        False
        >>> tensorlens_tl.install()
    """
    global _installed
    _installed = False
    while _patched:
        delattr(_patched.pop(), METHOD)
