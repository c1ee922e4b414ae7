"""What passed the hook points of one run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..maps import Frame, version
from ..operator import CaptureMismatchError
from ..readers import Read
from ..refusals import not_finite


class Activations:
    """What passed the hook points of one run, in the compute dtype.

    Args:
        frame: Spans of real tokens, positions, dtype and device of the run.
        heads_first: Names of what the host has as [batch, head, pos, …].
        model: The host model, for messages.
    """

    def __init__(self, frame: Frame, heads_first: tuple[str, ...], model: nn.Module):
        self.frame, self.heads_first, self.model = frame, heads_first, model
        self.padded = any(span != (0, frame.n_pos) for span in frame.spans)
        self.tensors: dict[Read, Tensor] = {}
        self._sources: dict[Read, tuple[Tensor, int]] = {}

    def store(self, read: Read, seen: Tensor) -> None:
        """Keep an activation, and the version that the host's tensor has now."""
        self._sources[read] = seen, version(seen)
        if seen.ndim == 2 and seen.shape[0] == self.frame.batch * self.frame.n_pos:
            seen = seen.unflatten(0, (self.frame.batch, -1))  # OPT's second norm
        self.tensors[read] = self.clean(read, self.frame.cast(seen))

    def clean(self, read: Read, tensor: Tensor) -> Tensor:
        """Put numbers in place of what padding rows hold; they may hold NaN.

        Args:
            read: What the tensor is.
            tensor: The activation, [batch, pos, …] or with heads first.

        Returns:
            The activation, finite; the same tensor where nothing was to be done.

        Raises:
            ValueError: If a real token's activation is not finite.
        """
        # A softmax over nothing is NaN. The row is nobody's, and becomes 0, or 1 where a norm
        # divides by it: 0 / 0 would reach real tokens as 0 · NaN.
        # A finite sum tells in one pass that all are finite; one that overflows tells nothing.
        if not self.padded or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all()):
            return tensor
        layer, key = read
        real = self.frame.real
        real = real[:, None, :, None] if key in self.heads_first else real
        real = real.reshape(*real.shape, *[1] * (tensor.ndim - real.ndim))
        cleaned = torch.where(real, tensor, 1 if key.endswith("scale") else 0)
        if not bool(cleaned.isfinite().all()):
            name = key if layer is None else f"L{layer} {key}"
            raise ValueError(not_finite(name, self.model))
        return cleaned

    def pop(self, layer: int | None, key: str) -> Tensor:
        """Take an activation; each is taken once.

        Args:
            layer: Number of the block, or None outside the blocks.
            key: What is taken, by the adapter's name of it.

        Returns:
            The activation as it was stored.

        Raises:
            ValueError: If its hook never fired.
        """
        if (found := self.tensors.pop((layer, key), None)) is None:
            if key == "pattern":
                cause = "the usual cause is fused attention"
                remedy = "Reload the model with attn_implementation='eager'."
            else:
                cause = "the host ran something else than its blocks"
                remedy = "Run the whole model, with no module replaced."
            where = _where(layer)
            raise ValueError(f"{where} ran without exposing its {key} ({cause}). {remedy}")
        self.unchanged(layer, key)
        return found

    def forget(self, layer: int, but: str) -> None:
        """Let go of the host's tensors of a block.

        Args:
            layer: Number of the block.
            but: Name of the one that is still to be compared, as it leaves the block.
        """
        for read in [r for r in self._sources if r[0] == layer and r[1] != but]:
            del self._sources[read]

    def unchanged(self, layer: int | None, key: str) -> None:
        """Refuse an activation that somebody wrote over after it was stored.

        Args:
            layer: Number of the block, or None outside the blocks.
            key: What was stored, by the adapter's name of it.

        Raises:
            CaptureMismatchError: If its version is not the one that was stored.
        """
        source, seen = self._sources[layer, key]
        if version(source) != seen:
            raise CaptureMismatchError(
                f"{_where(layer)} has a {key} that was changed in place after it had been read. "
                "Return a new tensor from your hook (t * 2 instead of t.mul_(2))."
            )


def _where(layer: int | None) -> str:
    return "The model" if layer is None else f"Block {layer}"
