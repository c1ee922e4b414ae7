"""Which model something is of: its shape, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph import Wiring
from ..operator import Capture
from ..sublayers import BlockWeights, ModelWeights
from .edge_masks import wiring_of


@dataclass(frozen=True)
class ModelInfo:
    """Which model a circuit is of.

    Attributes:
        name: For people.
        wiring: Which edges it has.
        d_model: Width of its residual.
        fingerprint: Of some of its weights: tells models apart and proves nothing; "" if not known.
    """

    name: str
    wiring: Wiring
    d_model: int
    fingerprint: str = ""

    @classmethod
    def of(cls, name: str, weights: ModelWeights) -> ModelInfo:
        """Of a model's weights, as an adapter has them.

        Args:
            name: The model's.
            weights: All of them.

        Returns:
            What tells it from others.
        """
        blocks = weights.blocks
        outputs = [block.attn.W_O for block in blocks]
        return cls(name, wiring_of(weights), blocks[0].attn.W_O.shape[-1],
                   fingerprint([*outputs, weights.unembed.W_U]))  # fmt: skip

    @classmethod
    def of_capture(cls, capture: Capture) -> ModelInfo:
        """Of the model that a capture ran."""
        blocks = tuple(
            BlockWeights(
                b.attn.weights, getattr(b.mlp, "weights", None), None, None, None, None,
                parallel=b.resid_mid is None,
            )
            for b in capture.blocks
        )  # fmt: skip
        return cls.of(capture.model_name, ModelWeights(blocks, None, capture.unembed.weights))

    def check(self, other: ModelInfo) -> None:
        """Refuse another model than this.

        Raises:
            ValueError: If its shape or its weights are other ones.
        """
        if self.wiring != other.wiring or self.d_model != other.d_model:
            raise ValueError(
                f"expected a circuit of this model ({other.name}: {other.wiring}), got one of "
                f"{self.name} ({self.wiring}): find it anew"
            )
        if self.fingerprint and other.fingerprint and self.fingerprint != other.fingerprint:
            raise ValueError(
                f"expected a circuit of this model ({other.name}), got one of {self.name} with other "
                "weights: take that model, loaded and processed in the same way, or find it anew"
            )


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A short hash of a few numbers of every weight, the same for every dtype down to bfloat16.

    Args:
        tensors: Weights.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        W = tensor.detach().flatten(0, -2)
        some = torch.cat((W[:4, :4].flatten(), W[-4:, -4:].flatten())).float().bfloat16()
        digest.update(some.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
