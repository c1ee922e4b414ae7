"""Tiny random models of pictures and sounds, in float64, with what Hugging Face makes of them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from models import build_bridge_from_module, quiet
from torch import Tensor

import tensorlens_tl
from tensorlens_tl.lens.tensor_lens import TensorLens
from tensorlens_tl.support.tiny_models import find, randomize

SUPPORTED = (
    find("transformer_lens.factories.architecture_adapter_factory", "SUPPORTED_ARCHITECTURES") or ()
)
OFFERED = build_bridge_from_module is not None and "ViTForImageClassification" in SUPPORTED
"""Whether the installed host has models of pictures."""
ROWS, COLUMNS, CLASSES = 3, 2, 5
_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZE |= {"intermediate_size": 48, "patch_size": 4, "num_labels": CLASSES}
KINDS = {
    "vit": ("ViTForImageClassification", "ViTConfig"),
    "vit-headless": ("ViTModel", "ViTConfig"),
    "deit": ("DeiTForImageClassification", "DeiTConfig"),
    "deit-headless": ("DeiTModel", "DeiTConfig"),
    "ast": ("ASTForAudioClassification", "ASTConfig"),
}
_SOUND = {"time_stride": 2, "frequency_stride": 2, "max_length": 8, "num_mel_bins": 6}
"""Of overlapping patches: 2 rows of frequencies, 3 columns of times."""


class Picture(NamedTuple):
    """A model, two inputs, what Hugging Face's model made of them before, and the lens."""

    model: Any
    inputs: Tensor
    expected: Tensor
    lens: TensorLens

    @property
    def target(self) -> Any:
        """A target of the model: a class, or a direction where it has no head."""
        return 3 if self.expected.ndim == 2 else torch.linspace(-1, 1, 32, dtype=torch.float64)


def build(kind: str, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
    """A Hugging Face model that nobody has wrapped, and two inputs."""
    name, config = KINDS[kind]
    size = {**_SIZE, "image_size": (4 * rows, 4 * COLUMNS)}
    if kind == "ast":
        size = {**_SIZE, **_SOUND}
    cfg = find("transformers", config)(**size)
    cfg._attn_implementation = "eager"
    cfg.id2label = {i: f"class {i}" for i in range(CLASSES)}
    torch.manual_seed(0)
    model = find("transformers", name)(cfg).to(dtype).eval()
    randomize(model)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 3, 4 * rows, 4 * COLUMNS, generator=generator, dtype=torch.float64)
    inputs = (
        inputs[:, 0, : _SOUND["max_length"], : _SOUND["num_mel_bins"]] if kind == "ast" else inputs
    )
    return model, inputs.to(dtype)


@cache
def picture(kind: str) -> Picture:
    model, inputs = build(kind)
    with torch.no_grad(), quiet():
        found = model(inputs)
        expected = getattr(found, "logits", found[0])
        _, lens = tensorlens_tl.capture(model, inputs)
    return Picture(tensorlens_tl.wrap(model), inputs, expected, lens)
