"""The errors that refuse a model, a part of one, or one reading of it, by name."""

from __future__ import annotations


class UnsupportedArchitectureError(ValueError):
    """A model, or a part of one, cannot be frozen exactly; the message names it.

    Example:
        >>> import torch, tensorlens_tl
        >>> try:
        ...     tensorlens_tl.capture(torch.nn.Linear(2, 2), [1, 2])
        ... except tensorlens_tl.UnsupportedArchitectureError as error:
        ...     print(error)
        model is a Linear, which is neither a HookedTransformer nor a TransformerBridge. ...
    """


def refusal(what: str, why: str, remedy: str = "") -> str:
    """Word the message that refuses something by name.

    Args:
        what: The model, or the part of one, that is refused.
        why: What keeps it from being frozen exactly.
        remedy: What to do, as a sentence; "" tells where the supported models are listed.

    Returns:
        The message, in two sentences.
    """
    listed = "Supported models are listed in docs/models.md and by python -m tensorlens_tl.support."
    return f"Cannot freeze {what} exactly: {why}. {remedy or listed}"


class NotRecomputableError(ValueError):
    """A model whose patterns cannot be recomputed from what its hooks show; the message says why.

    Args:
        what: The part of the model that is in the way.
        why: The reason, as the end of a sentence.
    """

    def __init__(self, what: str, why: str):
        self.cause = f"{what}: {why}"
        super().__init__(f'pattern="recomputed" does not serve {self.cause}. Use pattern="stored".')

    @classmethod
    def unknown(cls, kind: str) -> NotRecomputableError:
        """The refusal of a class of attention modules that no adapter knows."""
        return cls(f"the attention {kind}", "it is not known what its scores are computed from")
