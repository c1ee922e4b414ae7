"""A branch of experts on rows: every token is multiplied with the matrices of its own experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ..maps import Chain, LinearMap, Sum
from ..sublayers import Sublayer


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """A branch of experts, which has no normal form: every token has matrices of its own.

    Attributes:
        branch: The branch as it is.
        prompt: Index of the prompt in the batch.
        positions: The prompt's positions in causal coordinates [pos].
        transposed: Whether the branch is applied as its adjoint.
    """

    branch: LinearMap
    prompt: int
    positions: Int[Tensor, " pos"]
    transposed: bool

    def rows(self, x: Tensor, at: Tensor | slice) -> Tensor:
        """What the branch makes of vectors [pos, many, d_model] at the positions ``at``."""
        here = _at(self.branch, self.prompt, self.positions[at])
        rows = x.transpose(0, 1)[:, None].to(here.frame.dtype)  # [many, batch, pos, d_model]
        made = here.apply_t(rows) if self.transposed else here.apply(rows)
        return made[:, 0].transpose(0, 1).to(x.dtype)


def _at(op: LinearMap, prompt: int, positions: Int[Tensor, " pos"]) -> LinearMap:
    """A map that keeps positions apart, at some positions of one prompt."""
    n_pos = len(positions)
    frame = replace(op.frame, n_pos=n_pos, spans=((0, n_pos),))

    def cut(part: LinearMap) -> LinearMap:
        if isinstance(part, Sublayer):
            return cut(part.map)
        if isinstance(part, Chain | Sum):
            return replace(part, maps=tuple(map(cut, part.maps)))
        held: dict[str, Any] = {"frame": frame}
        for name in ("scale", "ratio", "constant", "experts", "share"):
            if (tensor := getattr(part, name, None)) is not None:
                held[name] = tensor[prompt, positions][None]
        return replace(part, **held)

    return cut(op)
