"""Which model something is of: its shape, and a fingerprint of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from ..chunks import model_mark
from ..graph import Wiring
from ..operator import Capture
from ..passes import wiring_of
from ..sublayers import BlockWeights, ModelWeights


@dataclass(frozen=True)
class ModelInfo:
    """Identity of the model that a circuit is of.

    Attributes:
        name: Name of the model, for people.
        wiring: The edges that the model has.
        d_model: Width of the residual stream.
        fingerprint: Hash of a few of the weights; "" if not known. A fingerprint tells models
            apart; equal ones prove nothing.
    """

    name: str
    wiring: Wiring
    d_model: int
    fingerprint: str = ""

    @classmethod
    def of(cls, name: str, weights: ModelWeights) -> ModelInfo:
        """Identify a model by its weights.

        Args:
            name: Name of the model.
            weights: All weights, as an adapter has them.

        Returns:
            The identity of the model.
        """
        # W_O is [head, d_head, d_model] in every host.
        width = weights.blocks[0].attn.W_O.shape[-1]
        return cls(name, wiring_of(weights), width, model_mark(weights))

    @classmethod
    def of_capture(cls, capture: Capture) -> ModelInfo:
        """Identify the model that a capture ran."""
        no_norms = (None,) * 4  # norms do not count
        blocks = tuple(
            BlockWeights(
                b.attn.weights,
                getattr(b.mlp, "weights", None),
                *no_norms,
                parallel=b.resid_mid is None,
                shared=getattr(b.shared, "weights", None),
            )
            for b in capture.blocks
        )
        return cls.of(capture.model_name, ModelWeights(blocks, None, capture.unembed.weights))

    def check(self, other: ModelInfo) -> None:
        """Refuse to use a circuit of this model in another model.

        Args:
            other: Identity of the model that the circuit is used in.

        Raises:
            ValueError: If the shape or the weights of the two models differ.
        """
        if self.wiring != other.wiring or self.d_model != other.d_model:
            raise ValueError(
                f"The circuit is of {self.name} ({self.wiring}), not of this model ({other.name}: "
                f"{other.wiring}). Discover a circuit of this model."
            )
        # Edge lists of other tools know no weights: for them the shape has to do.
        if self.fingerprint and other.fingerprint and self.fingerprint != other.fingerprint:
            raise ValueError(
                f"The circuit is of {self.name}, and this model ({other.name}) has other weights. "
                "Load and process the model as it was, or discover the circuit again."
            )
