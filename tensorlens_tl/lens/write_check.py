"""Whether the tensors of a run were written to since.

Torch counts most writes. It does not count those through ``.data``, by fused optimizers, by NumPy
views, or by ``module.half()``. So some numbers of every tensor are kept, too, and compared:

- all numbers of a vector;
- of a matrix one number of every column, and one of every row, or of every eighth row where there
  are more than eight rows to a column.

So an optimizer's step, a zeroed head and eight zeroed rows are noticed. A write to one number of a
matrix may not be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..maps import version

Group = tuple[list[int], list[Tensor]]

_WHOLE = 2**10
"""Tensors of up to this many numbers are kept whole."""


@dataclass(frozen=True, eq=False)
class WriteCheck:
    """Tensors of the model or the user, and what tells whether they were written to.

    Attributes:
        tensors: The tensors; none where nobody else has them.
        states: How often torch had counted a write to each, and where its memory begins.
        views: The places of some tensors, and views of what is kept of each, in groups that are
            quick to read.
        samples: The numbers that are kept, one vector per group.
    """

    tensors: tuple[Tensor, ...] = ()
    states: tuple[tuple[int, int], ...] = ()
    views: tuple[Group, ...] = ()
    samples: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> WriteCheck:
        """Note the state of tensors now."""
        views = _views(tensors)
        return cls(tuple(tensors), tuple(map(_state, tensors)), views, _read(views))

    def written(self) -> Tensor | None:
        """Find a tensor that was written to, or give None."""
        states, views = tuple(map(_state, self.tensors)), self.views
        for tensor, now, seen in zip(self.tensors, states, self.states, strict=True):
            if now[0] != seen[0]:
                return tensor
        if states != self.states:  # moved or replaced, perhaps by equal numbers
            views = _views(self.tensors)
        if [group[0] for group in views] != [group[0] for group in self.views]:
            return self.tensors[-1]  # other shapes, or several devices
        for (places, own), now, seen in zip(views, _read(views), self.samples, strict=True):
            if now.shape != seen.shape:
                return self.tensors[-1]
            if not _equal(now, seen):
                sizes = [len(view) for view in own]
                pairs = zip(places, now.split(sizes), seen.to(now).split(sizes), strict=True)
                return self.tensors[next((i for i, a, b in pairs if not _equal(a, b)), -1)]
        return None


def _state(tensor: Tensor) -> tuple[int, int]:
    return version(tensor), tensor.data_ptr()


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or a.shape != b.shape:
        return False
    if a.dtype != b.dtype:  # equal in a wider dtype, then: the lens reads the same numbers
        a, b = a.double(), b.double()
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _read(views: Sequence[Group]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(torch.cat(own) for _, own in views)


@torch.no_grad()
def _views(tensors: Sequence[Tensor]) -> tuple[Group, ...]:
    groups: dict[tuple, Group] = {}
    for i, tensor in enumerate(tensors):
        n, step = _lattice(tensor.shape, tensor.stride())
        # torch.cat is fast where all parts are contiguous.
        places, views = groups.setdefault((tensor.device, step == 1), ([], []))
        places.append(i)
        views.append(tensor.as_strided((n,), (step,)))
    return tuple(groups.values())


@lru_cache(1024)
def _lattice(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, int]:
    """How many numbers to keep of a tensor, and how far apart they lie in its memory."""
    if 0 in shape:  # cosines of a rotation of no dimension
        return 0, 1
    axes = [(st, size) for st, size in zip(stride, shape, strict=True) if size > 1 and st > 0]
    extent = 1 + sum(st * (size - 1) for st, size in axes)
    if extent <= _WHOLE:
        return extent, 1
    columns = min(axes)[1]
    rows = extent // columns
    # A step of at most a row meets every row. Of at least as many steps as columns, each meets
    # another column where the step has no divisor in common with the sizes.
    step = max(1, min(rows, columns if rows <= 8 * columns else 8 * columns))
    while math.gcd(step, math.prod(st * size for st, size in axes)) > 1:
        step -= 1
    return (extent - 1) // step + 1, step
