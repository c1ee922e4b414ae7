"""Vectors of the residual's width, kept as the narrow ones that a head's matrix makes them of.

A head adds z W_O and reads W_V s: d_head numbers per position say what d_model of them repeat. All
heads' vectors together are a model's largest quantity (heads · pos · d_model), so they are widened
a span of positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factored:
    """One vector per node, prompt and position: narrow · matrix, and what a norm makes of it.

    Attributes:
        narrow: The narrow vectors; nodes that share a matrix stand side by side.
        matrix: Gives the matrices (at every use: cast ones are copies, and all layers' together a
            model's worth). None where the vectors are narrow's own.
        finish: What is done to the wide vectors of a span of positions, in place. :meth:`total` needs
            one that does the same at every position.
    """

    narrow: Float[Tensor, "node batch pos d_narrow"]
    matrix: Callable[[], Float[Tensor, "group d_narrow d_model"]] | None = None
    finish: Callable[[Tensor, slice], object] | None = None

    def then(
        self, scale: Float[Tensor, "batch pos 1"], finish: Callable[[Tensor], None]
    ) -> Factored:
        """The vectors after a norm: its scale divides the narrow ones, the rest comes last."""
        found = replace(self, narrow=self.narrow / scale, finish=lambda wide, span: finish(wide))
        return found if self.matrix is not None else Factored(found.wide())

    def wide(
        self, span: slice = slice(None), out: Tensor | None = None
    ) -> Float[Tensor, "node batch span d_model"]:
        """The vectors.

        Args:
            span: Which positions.
            out: Where to write them, if anywhere.

        Returns:
            Them.
        """
        narrow = self.narrow[:, :, span]
        if self.matrix is None:
            found = narrow if out is None else out.copy_(narrow)
        else:
            W = self.matrix()
            groups, _, width = W.shape
            into = None if out is None else out.view(groups, -1, width)
            found = torch.bmm(narrow.reshape(groups, -1, W.shape[1]), W, out=into)
            found = found.view(*narrow.shape[:-1], width)
        if self.finish is not None:
            self.finish(found, span)
        return found

    def total(self) -> Float[Tensor, "node batch d_model"]:
        """The sum over positions, for d_narrow additions a position."""
        return replace(self, narrow=self.narrow.sum(2, keepdim=True)).wide()[:, :, 0]

    def summed(self) -> Float[Tensor, "batch pos d_model"]:
        """The sum over nodes, as one product of all that is narrow; without ``finish``."""
        if self.matrix is None:
            return self.narrow.sum(0)
        W = self.matrix()
        groups, narrow, _ = W.shape
        together = self.narrow.unflatten(0, (groups, -1)).sum(1).permute(1, 2, 0, 3)
        return together.flatten(2) @ W.reshape(groups * narrow, -1)

    def __sub__(self, other: Factored) -> Factored:
        """The difference to vectors of the same nodes in another run of the model."""
        if (self.matrix is None) != (other.matrix is None):
            return Factored(self.wide() - other.wide())
        return replace(self, narrow=self.narrow - other.narrow)
