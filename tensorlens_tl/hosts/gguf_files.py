"""Models in GGUF files, dequantized.

transformers reads such a file: weights, configuration and tokenizer are all in it, and reading it
executes nothing. Its weights are rounded to few bits and then held as ordinary floats, so the model
is one with other weights, for which the operator is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checks import need
from ..refusals import UnsupportedArchitectureError


def gguf_file(path: Path) -> Path | None:
    """Find the GGUF file that a path means.

    Args:
        path: A file, or a folder.

    Returns:
        The file itself, or the only one in a folder that has no config.json. Otherwise None.

    Raises:
        ValueError: If such a folder holds several GGUF files, or there is no such file.
    """
    if path.suffix.lower() == ".gguf" and not path.exists():
        raise ValueError(f"There is no file {path}. Pass the path of a GGUF file.")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} holds {len(found)} GGUF files. Pass one of them: {names}.")
    return found[0] if found else None


def read_gguf(file: Path, dtype: Any = None, device: Any = None) -> tuple[Any, Any]:
    """Load the causal language model of a GGUF file, with its tokenizer.

    Args:
        file: Path of the file.
        dtype: Dtype of the dequantized weights; None is float32.
        device: Device of the model; None is the CPU.

    Returns:
        The Hugging Face model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If the package gguf is missing, or the file cannot be read.
        UnsupportedArchitectureError: If transformers does not know the file's architecture.
    """
    need("gguf", "gguf", f"{file.name}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype or torch.float32)
    except Exception as error:  # transformers and gguf have no class of errors of their own
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        refusal = UnsupportedArchitectureError if "not supported" in str(error) else ValueError
        raise refusal(
            f"{file} cannot be read by transformers ({cause[:200]}). Check the file, or pass the "
            "Hugging Face folder of the model."
        ) from error
    # The weights are ordinary floats now; what calls them quantized would refuse save_pretrained.
    for holder in (model, model.config):
        for name in ("hf_quantizer", "quantization_method", "quantization_config"):
            vars(holder).pop(name, None)
    model.is_quantized = False
    model.config.architectures = [type(model).__name__]
    return model.to(device or "cpu").eval(), tokenizer
