"""Vectors as wide as the residual, kept in the narrow form that a head gives them.

A head adds z W_O to the residual and reads it through W_V. So d_head numbers per position fix a
vector of d_model numbers. The vectors of all heads together are the largest quantity of a model
(heads · pos · d_model). Therefore they are widened for a span of positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factored:
    """One vector per node, prompt and position: finish(narrow · matrix).

    Attributes:
        narrow: The narrow vectors. Nodes that share a matrix stand side by side.
        matrix: Function that returns the matrices, or None where ``narrow`` has full width already.
            It runs at every use, because cast copies for all layers would be as large as the model.
        finish: Function that changes the wide vectors of a span of positions in place, or None.
            :meth:`total` needs one that does the same at every position.
        along: How much of ``common`` is added to each vector before ``finish``, or None.
        common: Vectors that all nodes share, such as those of a norm over all heads.
    """

    narrow: Float[Tensor, "node batch pos d_narrow"]
    matrix: Callable[[], Float[Tensor, "group d_narrow d_model"]] | None = None
    finish: Callable[[Tensor, slice], object] | None = None
    along: Float[Tensor, "node batch pos"] | None = None
    common: Float[Tensor, "batch pos d_model"] | None = None

    def then(
        self, scale: Float[Tensor, "batch pos 1"], finish: Callable[[Tensor], None]
    ) -> Factored:
        """The vectors after a norm, whose scale divides the narrow ones; ``finish`` is the rest."""
        # A scale is one number per position, so it may divide d_head numbers in place of d_model.
        along = None if self.along is None else self.along / scale[..., 0]
        narrow, last = self.narrow / scale, lambda wide, span: finish(wide)
        found = replace(self, narrow=narrow, along=along, finish=last)
        return found if self.matrix is not None else Factored(found.wide())

    def wide(
        self, span: slice = slice(None), out: Tensor | None = None
    ) -> Float[Tensor, "node batch span d_model"]:
        """Compute the wide vectors of a span of positions.

        Args:
            span: Slice of the position axis.
            out: Tensor to write the result to, or None for a new one.

        Returns:
            The wide vectors, one row per node.
        """
        narrow = self.narrow[:, :, span]
        if self.matrix is None:
            found = narrow if out is None else out.copy_(narrow)
        else:
            W = self.matrix()
            groups, _, width = W.shape
            rows = narrow.reshape(groups, -1, W.shape[1])
            # Query heads of one group share a matrix, so they stand side by side as rows of one
            # product.
            if out is None or rows.requires_grad or W.requires_grad:  # autograd knows no out=
                found = torch.bmm(rows, W).view(*narrow.shape[:-1], width)
                found = found if out is None else out.copy_(found)
            else:
                found = torch.bmm(rows, W, out=out.view(groups, -1, width))
                found = found.view(*narrow.shape[:-1], width)
        if self.along is not None and self.common is not None:
            found += self.along[:, :, span, None] * self.common[:, span]
        if self.finish is not None:
            self.finish(found, span)
        return found

    def total(self) -> Float[Tensor, "node batch d_model"]:
        """The sum over positions. It adds up narrow vectors and widens only the result."""
        if self.along is not None:  # what is common differs from position to position
            return self.wide().sum(2)
        return replace(self, narrow=self.narrow.sum(2, keepdim=True)).wide()[:, :, 0]

    def summed(self) -> Float[Tensor, "batch pos d_model"]:
        """The sum over nodes, without ``finish``: one product with all matrices side by side."""
        if self.matrix is None:
            return self.narrow.sum(0)
        W = self.matrix()
        groups, narrow, _ = W.shape
        # Σ_h z_h W_g(h) = Σ_g (Σ_{h in g} z_h) W_g, and side by side that is one product.
        together = self.narrow.unflatten(0, (groups, -1)).sum(1).permute(1, 2, 0, 3)
        found = together.flatten(2) @ W.reshape(groups * narrow, -1)
        if self.along is None or self.common is None:
            return found
        return found + self.along.sum(0)[..., None] * self.common

    def __sub__(self, other: Factored) -> Factored:
        """The difference to the vectors of the same nodes in another run of the model."""
        common = self.along is not None or other.along is not None
        if (self.matrix is None) != (other.matrix is None) or common:
            # One of the runs has a matrix and the other has none, or what is common differs: only
            # wide vectors can be compared.
            return Factored(self.wide() - other.wide())
        return replace(self, narrow=self.narrow - other.narrow)
