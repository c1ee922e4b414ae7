"""What a reader asks of the adapter whose model it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..maps import NormWeights
from ..sublayers import Rotation

QueryKeyWeights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""W_Q [head, d_model, d_head], b_Q, W_K [kv_head, d_model, d_head], b_K; no bias is None."""


if TYPE_CHECKING:

    class Host(Protocol):
        """The part of ``hosts.Adapter`` that readers use; what each does is told there."""

        model: Any
        cfg: Any
        attention: Any

        @property
        def dtype(self) -> torch.dtype: ...
        @property
        def turns_neighbours(self) -> bool: ...
        def soft_cap(self, name: str = ..., /) -> float | None: ...
        def unlike(self, what: str, /) -> str: ...
        def norm_weights(self, norm: nn.Module | None, /) -> NormWeights | None: ...
        def query_key_weights_of(self, attn: Any, /) -> QueryKeyWeights: ...
        def rotations(self, n_pos: int, /) -> Sequence[Rotation | None] | None: ...
        def recomputed_reading(self) -> Any: ...
else:
    Host = Any  # an adapter makes its readers before it has all of this
