"""Affine maps on a batch of prompts, and how they compose.

Everything the library computes is built from one contract, :class:`LinearMap`: apply the linear
part, apply its adjoint, tell the constant. Vectors are rows: ``[..., batch, pos, dim]``, where
leading axes are many vectors at once. The constant never enters ``apply``.

    Chain((f, g))   x -> g(f(x))        Residual(f)    x -> x + f(x)
    Sum((f, g))     x -> f(x) + g(x)    Transposed(f)  y -> f^T y

Every composite checks its dimensions when it is built, so ``apply`` checks nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import need, no_autocast
from .batch_layout import Frame

DENSE_LIMIT = 2 * 2**30  # bytes that a dense form may fill unless the caller allows more


class LinearMap(ABC):
    """The linear part of an affine map between [batch, pos, in_dim] and [batch, pos, out_dim].

    Subclasses are frozen dataclasses that give ``frame``, ``in_dim``, ``out_dim``, :meth:`apply`,
    :meth:`apply_t` and :attr:`bias`; the rest is derived here, once.
    """

    frame: Frame

    @property
    @abstractmethod
    def in_dim(self) -> int:
        """Width of the input."""

    @property
    @abstractmethod
    def out_dim(self) -> int:
        """Width of the output."""

    @abstractmethod
    def apply(
        self, x: Float[Tensor, "*many batch pos in_dim"]
    ) -> Float[Tensor, "*many batch pos out_dim"]:
        """The linear part A x, without the constant."""

    @abstractmethod
    def apply_t(
        self,
        y: Float[Tensor, "*many batch pos out_dim"],
        effects: dict[str, Float[Tensor, "*many batch pos"]] | None = None,
    ) -> Float[Tensor, "*many batch pos in_dim"]:
        """The exact adjoint Aᵀ y.

        Args:
            y: Covectors at the output.
            effects: When given, each constant's share ⟨y pulled to where it is added, constant⟩,
                per position, is entered under the constant's name: a pull tells what every bias
                does at no further cost.
        """

    @property
    @abstractmethod
    def bias(self) -> Float[Tensor, "batch pos out_dim"]:
        """The constant of the affine map: its value at 0."""

    @abstractmethod
    def constants(self) -> dict[str, Float[Tensor, "batch pos out_dim"]]:
        """The named constants that :attr:`bias` is the sum of, each carried to the output."""

    @property
    def T(self) -> LinearMap:
        """The adjoint as a map of its own; its constant is 0."""
        return Transposed(self)

    def __add__(self, other: LinearMap) -> LinearMap:
        return Sum((self, other))

    @overload
    def __matmul__(self, other: LinearMap) -> LinearMap: ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    def __matmul__(self, other: LinearMap | Tensor) -> LinearMap | Tensor:
        if isinstance(other, LinearMap):
            return Chain((other, self))
        if not isinstance(other, Tensor):
            raise ValueError(
                f"expected a tensor or another map, got {type(other).__name__}: pass a torch tensor "
                "like lens.embedding"
            )
        no_autocast(self.frame.device.type)
        frame, expected = self.frame, (self.frame.batch, self.frame.n_pos, self.in_dim)
        found = other.shape[-3:], other.dtype, other.device
        if found != (expected, frame.dtype, frame.device):
            raise ValueError(
                f"expected a vector [..., batch, pos, dim] = [..., {', '.join(map(str, expected))}] "
                f"of {frame.dtype} on {frame.device}, got {list(other.shape)} of {other.dtype} on "
                f"{other.device}; "
                "lens.embedding has the right form, tensor.to(lens.embedding) the right dtype and device"
            )
        return self.apply(other)

    def block(self, query_pos: int, key_pos: int) -> Float[Tensor, "batch out_dim in_dim"]:
        """The block A[query_pos, key_pos]: how the token at key_pos enters the output at query_pos.

        It multiplies a column; for a row vector use ``x @ block.mT``. Cost: ``out_dim`` pulls.

        Args:
            query_pos: Destination, counted over each prompt's real tokens (−1 is the last).
            key_pos: Source, counted alike.

        Returns:
            The block of every prompt, [batch, out_dim, in_dim].

        Raises:
            ValueError: If a prompt has no such position.
        """
        no_autocast(self.frame.device.type)
        prompts = torch.arange(self.frame.batch, device=self.frame.device)
        query, key = self.frame.index(query_pos), self.frame.index(key_pos)
        u = self.frame.zeros(self.out_dim, self.out_dim)
        u[:, prompts, query] = self.frame.eye(self.out_dim)[:, None]
        return self.apply_t(u)[:, prompts, key].transpose(0, 1)

    def to_dense(
        self, memory_limit: int = DENSE_LIMIT
    ) -> Float[Tensor, "batch query_pos out_dim key_pos in_dim"]:
        """The whole tensor A, for small models and tests.

        Args:
            memory_limit: Largest result in bytes.

        Returns:
            The tensor; ``dense[b, q, :, k, :]`` is :meth:`block`.

        Raises:
            ValueError: If the result would be larger; the message says how large.
        """
        batch, pos = self.frame.batch, self.frame.n_pos
        no_autocast(self.frame.device.type)
        self._check_dense(memory_limit)
        dense = (
            self.frame.zeros(pos * self.in_dim, self.out_dim)
            .movedim(0, 2)
            .reshape(batch, pos, self.out_dim, pos, self.in_dim)
        )
        for key in range(pos):
            x = self.frame.zeros(self.in_dim, self.in_dim)
            x[:, :, key] = self.frame.eye(self.in_dim)[:, None]
            dense[:, :, :, key] = self.apply(x).permute(1, 2, 3, 0)
        return dense

    def _check_dense(self, memory_limit: int) -> None:
        # What both dense forms share.
        pos, width = self.frame.n_pos, self.out_dim * self.in_dim
        size = self.frame.batch * pos * pos * width * self.frame.dtype.itemsize
        if size > memory_limit:
            raise ValueError(
                f"the dense form needs {size / 2**30:.3g} GiB, expected at most memory_limit = "
                f"{memory_limit / 2**30:.3g} GiB; use op @ x, op.T @ u or op.block(i, j), which never "
                "build it, or raise memory_limit"
            )

    def to_scipy(self):
        """A single prompt's map as a ``scipy.sparse.linalg.LinearOperator`` on flat [pos, dim] vectors.

        ``scipy.sparse.linalg.svds(op.to_scipy(), k=5)`` then gives singular vectors without a
        dense form.

        Returns:
            An operator of shape [pos · out_dim, pos · in_dim].

        Raises:
            ValueError: If scipy is missing or there are several prompts.
        """
        linalg = need("scipy.sparse.linalg", "scipy", "to_scipy")
        if self.frame.batch != 1:
            raise ValueError(
                f"to_scipy expects one prompt, got {self.frame.batch}; take one with lens[i]"
            )

        def acting(dim: int, map_: LinearMap):
            def act(columns):  # [pos * dim, many] or [pos * dim]
                x = (
                    torch.from_numpy(columns)
                    .to(self.frame.zeros(0))
                    .reshape(self.frame.n_pos, dim, -1)
                )
                return (
                    map_.apply(x.movedim(-1, 0)[:, None])
                    .flatten(1)
                    .T.cpu()
                    .numpy()
                    .reshape(-1, *columns.shape[1:])
                )

            return act

        push, pull = acting(self.in_dim, self), acting(self.out_dim, self.T)
        return linalg.aslinearoperator(
            SimpleNamespace(
                shape=(self.frame.n_pos * self.out_dim, self.frame.n_pos * self.in_dim),
                matvec=push,
                matmat=push,
                rmatvec=pull,
                rmatmat=pull,
                dtype=str(self.frame.dtype).removeprefix("torch."),
            )
        )


def dot_test(op: LinearMap, seed: int = 0) -> float:
    """How far ``apply_t`` is from the adjoint of ``apply``.

    Formula: |⟨A u, v⟩ − ⟨u, Aᵀ v⟩| / (‖A u‖ ‖v‖ + ‖u‖ ‖Aᵀ v‖) for one random pair.

    Args:
        op: Any map.
        seed: Of the random vectors.

    Returns:
        A relative error; rounding in float64 is about 1e-16.
    """
    no_autocast(op.frame.device.type)
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(op.frame.zeros(op.in_dim).shape, generator=generator, device="cpu").to(
        op.frame.zeros(0)
    )
    v = torch.randn(op.frame.zeros(op.out_dim).shape, generator=generator, device="cpu").to(
        op.frame.zeros(0)
    )
    au, atv = op.apply(u), op.apply_t(v)
    scale = au.norm() * v.norm() + u.norm() * atv.norm()
    return float(
        (torch.sum(au * v) - torch.sum(u * atv)).abs() / scale.clamp_min(torch.finfo(u.dtype).tiny)
    )


def _same_frame(maps: Sequence[LinearMap]) -> None:
    if not maps:
        raise ValueError("expected at least one map, got none")
    if any(m.frame != maps[0].frame for m in maps):
        raise ValueError(
            "maps of different captures cannot be combined: expected one batch of prompts, dtype and device"
        )


@dataclass(frozen=True, eq=False)
class Chain(LinearMap):
    """Composition, first map first: x → maps[-1](… maps[0](x)).

    Raises:
        ValueError: If widths or captures do not fit.
    """

    maps: tuple[LinearMap, ...]

    def __post_init__(self):
        _same_frame(self.maps)
        for first, then in zip(self.maps, self.maps[1:], strict=False):
            if first.out_dim != then.in_dim:
                raise ValueError(
                    f"maps do not fit: one gives width {first.out_dim}, the next takes {then.in_dim}"
                )

    @property
    def frame(self) -> Frame:  # type: ignore[override]
        return self.maps[0].frame

    @property
    def in_dim(self) -> int:
        return self.maps[0].in_dim

    @property
    def out_dim(self) -> int:
        return self.maps[-1].out_dim

    def apply(self, x):
        return reduce(lambda state, m: m.apply(state), self.maps, x)

    def apply_t(self, y, effects=None):
        return reduce(lambda covector, m: m.apply_t(covector, effects), reversed(self.maps), y)

    @property
    def bias(self):
        return reduce(lambda c, m: m.apply(c) + m.bias, self.maps[1:], self.maps[0].bias)

    def constants(self):
        names: list[str] = []
        carried = self.frame.zeros(self.in_dim, 0)  # all constants ride one sweep, side by side
        for m in self.maps:
            own = m.constants()
            carried = torch.cat([m.apply(carried), *(c[None] for c in own.values())])
            names += own
        return dict(zip(names, carried, strict=True))


@dataclass(frozen=True, eq=False)
class Sum(LinearMap):
    """Maps side by side: x → Σ maps[i](x).

    Raises:
        ValueError: If widths or captures differ.
    """

    maps: tuple[LinearMap, ...]

    def __post_init__(self):
        _same_frame(self.maps)
        dims = {(m.in_dim, m.out_dim) for m in self.maps}
        if len(dims) != 1:
            raise ValueError(
                f"expected maps of equal widths to add, got (in, out) = {sorted(dims)}"
            )

    @property
    def frame(self) -> Frame:  # type: ignore[override]
        return self.maps[0].frame

    @property
    def in_dim(self) -> int:
        return self.maps[0].in_dim

    @property
    def out_dim(self) -> int:
        return self.maps[0].out_dim

    def apply(self, x):
        return reduce(torch.add, (m.apply(x) for m in self.maps))

    def apply_t(self, y, effects=None):
        return reduce(torch.add, (m.apply_t(y, effects) for m in self.maps))

    @property
    def bias(self):
        return reduce(torch.add, (m.bias for m in self.maps))

    def constants(self):
        found: dict[str, Tensor] = {}
        for name, c in (item for m in self.maps for item in m.constants().items()):
            found[name] = found[name] + c if name in found else c
        return found


@dataclass(frozen=True, eq=False)
class Residual(LinearMap):
    """A residual connection: x → x + branch(x).

    Raises:
        ValueError: If the branch changes the width.
    """

    branch: LinearMap

    def __post_init__(self):
        if self.branch.in_dim != self.branch.out_dim:
            raise ValueError(
                f"a residual branch keeps the width, got {self.branch.in_dim} → {self.branch.out_dim}"
            )

    @property
    def frame(self) -> Frame:  # type: ignore[override]
        return self.branch.frame

    @property
    def in_dim(self) -> int:
        return self.branch.in_dim

    @property
    def out_dim(self) -> int:
        return self.branch.out_dim

    def apply(self, x):
        return x + self.branch.apply(x)

    def apply_t(self, y, effects=None):
        return y + self.branch.apply_t(y, effects)

    @property
    def bias(self):
        return self.branch.bias

    def constants(self):
        return self.branch.constants()


@dataclass(frozen=True, eq=False)
class Transposed(LinearMap):
    """The adjoint of a map, as a map: y → Aᵀ y, without a constant."""

    map: LinearMap

    @property
    def frame(self) -> Frame:  # type: ignore[override]
        return self.map.frame

    @property
    def in_dim(self) -> int:
        return self.map.out_dim

    @property
    def out_dim(self) -> int:
        return self.map.in_dim

    def apply(self, x):
        return self.map.apply_t(x)

    def apply_t(self, y, effects=None):
        return self.map.apply(y)

    @property
    def bias(self):
        return self.frame.zeros(self.out_dim)

    def constants(self):
        return {}

    @property
    def T(self) -> LinearMap:
        return self.map
