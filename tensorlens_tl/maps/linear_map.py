"""Affine maps on a batch of prompts, and how they compose.

Everything that the library computes is built from :class:`LinearMap`. A map can apply its linear
part, apply the adjoint, and give its constant. Vectors are rows ``[..., batch, pos, dim]``; the
leading axes hold many vectors at once. The constant never enters ``apply``.

    Chain((f, g))   x -> g(f(x))        Residual(f)    x -> x + f(x)
    Sum((f, g))     x -> f(x) + g(x)    Transposed(f)  y -> f^T y

Every composite checks its dimensions when it is built, so ``apply`` checks nothing. A user's own
vectors come in by ``op @ x``, which checks them.
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

from ..checks import kind_of, need, no_autocast, spelled, whole
from .batch_layout import Frame

DENSE_LIMIT = 2 * 2**30
"""Bytes that a dense form may fill unless the caller allows more."""


@spelled
class LinearMap(ABC):
    """An affine map x ↦ A x + bias from [batch, pos, in_dim] to [batch, pos, out_dim].

    ``op @ x`` is A x, ``op.T @ y`` the adjoint Aᵀ y, ``f @ g`` first g, then f, and ``f + g`` the
    sum of two maps. Subclasses give ``frame``, ``in_dim``, ``out_dim``, :meth:`apply`,
    :meth:`apply_t`, :attr:`bias` and :meth:`constants`.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("Paris is in France")
        >>> f = lens.between("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")
        >>> g = lens.between("blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre")
        >>> both = g @ f
        >>> x = lens.embedding
        >>> bool((both @ x - g @ (f @ x)).abs().max() < 1e-5)
        True
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
        """Apply the linear part: push vectors from the input to the output, A x."""

    @abstractmethod
    def apply_t(
        self,
        y: Float[Tensor, "*many batch pos out_dim"],
        effects: dict[str, Float[Tensor, "*many batch pos"]] | None = None,
    ) -> Float[Tensor, "*many batch pos in_dim"]:
        """Apply the exact adjoint: pull covectors from the output to the input, Aᵀ y.

        Args:
            y: Covectors at the output.
            effects: Dictionary that receives, by name, what each constant adds to ⟨y, output⟩ at
                every position: the constant times the covector at the place where it is added.
                The pull meets every constant on its way, so this costs no further product.
        """

    @property
    @abstractmethod
    def bias(self) -> Float[Tensor, "batch pos out_dim"]:
        """The constant of the affine map, its value at 0."""

    @abstractmethod
    def constants(self) -> dict[str, Float[Tensor, "batch pos out_dim"]]:
        """The named constants, each carried to the output. They sum to :attr:`bias`."""

    @property
    def T(self) -> LinearMap:
        """The adjoint as a map, with constant 0."""
        return Transposed(self)

    def __add__(self, other: LinearMap) -> LinearMap:
        return Sum((self, other))

    @overload
    def __matmul__(self, other: LinearMap) -> LinearMap: ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    def __matmul__(self, other: LinearMap | Tensor) -> LinearMap | Tensor:
        if isinstance(other, LinearMap):
            return Chain((other, self))  # a Chain names the first map first
        no_autocast(self.frame.device.type)
        self.frame.check(other, self.in_dim)
        return self.apply(other)

    def block(self, query_pos: int, key_pos: int) -> Float[Tensor, "batch out_dim in_dim"]:
        """Compute a block A[query_pos, key_pos]: the part of A from one position to another.

        A block multiplies a column vector; for a row vector use ``x @ block.mT``. The cost is
        ``out_dim`` pulls.

        Args:
            query_pos: Position of the output, among the real tokens of a prompt; −1 is the last.
            key_pos: Position of the input, counted in the same way.

        Returns:
            The block of every prompt [batch, out_dim, in_dim].

        Raises:
            ValueError: If a prompt has no such position.
        """
        no_autocast(self.frame.device.type)
        prompts = torch.arange(self.frame.batch, device=self.frame.device)
        query, key = self.frame.index(query_pos), self.frame.index(key_pos)
        u = self.frame.zeros(self.out_dim, self.out_dim)
        # Row i of the block is the pull of the unit covector i.
        u[:, prompts, query] = self.frame.eye(self.out_dim)[:, None]
        return self.apply_t(u)[:, prompts, key].transpose(0, 1)

    def to_dense(
        self, memory_limit: int = DENSE_LIMIT
    ) -> Float[Tensor, "batch query_pos out_dim key_pos in_dim"]:
        """Compute the whole tensor A. It is for small models and tests.

        Args:
            memory_limit: Largest size of the result, in bytes.

        Returns:
            The tensor; ``dense[b, q, :, k, :]`` is a :meth:`block`.

        Raises:
            ValueError: If the result would be larger. The message gives its size.
        """
        batch, pos = self.frame.batch, self.frame.n_pos
        no_autocast(self.frame.device.type)
        self._check_dense(memory_limit)
        dense = (
            self.frame.zeros(pos * self.in_dim, self.out_dim)
            .movedim(0, 2)
            .reshape(batch, pos, self.out_dim, pos, self.in_dim)
        )
        for key in range(pos):  # push the unit vectors of one key: column d of A[·, key] is A e_d
            x = self.frame.zeros(self.in_dim, self.in_dim)
            x[:, :, key] = self.frame.eye(self.in_dim)[:, None]
            dense[:, :, :, key] = self.apply(x).permute(1, 2, 3, 0)
        return dense

    def _check_dense(self, memory_limit: int) -> None:
        pos, width = self.frame.n_pos, self.out_dim * self.in_dim
        size = self.frame.batch * pos * pos * width * self.frame.dtype.itemsize
        if size > memory_limit:
            raise ValueError(
                f"The dense form needs {size / 2**30:.3g} GiB, and memory_limit is "
                f"{memory_limit / 2**30:.3g} GiB. Use op @ x, op.T @ u or op.block(i, j), which "
                "never build it, or raise memory_limit."
            )

    def to_scipy(self):
        """Wrap the map of a single prompt as a ``scipy.sparse.linalg.LinearOperator``.

        It acts on flat vectors [pos · dim]. ``scipy.sparse.linalg.svds(op.to_scipy(), k=5)`` then
        gives singular vectors without a dense form.

        Returns:
            An operator of shape [pos · out_dim, pos · in_dim].

        Raises:
            ValueError: If scipy is missing, or the batch has several prompts.
        """
        linalg = need("scipy.sparse.linalg", "scipy", "to_scipy")
        if self.frame.batch != 1:
            raise ValueError(f"The map has {self.frame.batch} prompts. Take one with lens[i].")

        def acting(dim: int, map_: LinearMap):
            def act(columns):  # [pos * dim, many] or [pos * dim]
                x = torch.from_numpy(columns).to(self.frame.zeros(0))
                x = x.reshape(self.frame.n_pos, dim, -1).movedim(-1, 0)[:, None]  # a batch of one
                y = map_.apply(x).flatten(1).T.cpu().numpy()
                return y.reshape(-1, *columns.shape[1:])

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


@spelled
def dot_test(op: LinearMap, seed: int = 0) -> float:
    """Measure how far ``apply_t`` is from the adjoint of ``apply``.

    Formula: |⟨A u, v⟩ − ⟨u, Aᵀ v⟩| / (‖A u‖ ‖v‖ + ‖u‖ ‖Aᵀ v‖) for one random pair (u, v).

    Args:
        op: The map to test.
        seed: Seed of the random vectors.

    Returns:
        The relative error. Rounding in float64 gives about 1e-16.

    Raises:
        ValueError: If ``op`` is not a map, or ``seed`` is not an integer.

    Example:
        >>> from tensorlens_tl import demo, dot_test
        >>> _, lens = demo.load_model().run_with_tensorlens("Paris is in France")
        >>> dot_test(lens.operator) < 1e-5
        True
    """
    if not isinstance(op, LinearMap):
        raise ValueError(f"op is {kind_of(op)}, and not a map. Pass one such as lens.operator.")
    no_autocast(op.frame.device.type)
    generator = torch.Generator().manual_seed(whole(seed, "seed"))

    def draw(dim: int) -> Tensor:
        like = op.frame.zeros(dim)
        # Drawn on the CPU, so that a seed means the same vectors on every device.
        return torch.randn(like.shape, generator=generator, device="cpu").to(like)

    u, v = draw(op.in_dim), draw(op.out_dim)
    au, atv = op.apply(u), op.apply_t(v)
    # Relative to the limits of Cauchy–Schwarz: the products themselves may be near 0.
    scale = au.norm() * v.norm() + u.norm() * atv.norm()
    return float(
        (torch.sum(au * v) - torch.sum(u * atv)).abs() / scale.clamp_min(torch.finfo(u.dtype).tiny)
    )


def _same_frame(maps: Sequence[LinearMap]) -> None:
    if not maps:
        raise ValueError("No map was given. Give at least one.")
    if any(m.frame != maps[0].frame for m in maps):
        raise ValueError(
            "Maps of different captures cannot be combined. Use one batch, dtype and device."
        )


@dataclass(frozen=True, eq=False)
class Chain(LinearMap):
    """Composition, first map first: x → maps[-1](… maps[0](x)).

    Attributes:
        maps: The maps, in the order in which they act.

    Raises:
        ValueError: If widths or captures do not fit.
    """

    maps: tuple[LinearMap, ...]

    def __post_init__(self):
        _same_frame(self.maps)
        for first, then in zip(self.maps, self.maps[1:], strict=False):
            if first.out_dim != then.in_dim:
                raise ValueError(
                    f"Two maps do not fit: one gives width {first.out_dim}, and the next takes "
                    f"{then.in_dim}. Compose maps whose widths agree."
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
        # (A_n … A_1)ᵀ = A_1ᵀ … A_nᵀ: the last map is pulled through first.
        return reduce(lambda covector, m: m.apply_t(covector, effects), reversed(self.maps), y)

    @property
    def bias(self):
        # The value at 0: each map's linear part carries what came before, and adds its constant.
        return reduce(lambda c, m: m.apply(c) + m.bias, self.maps[1:], self.maps[0].bias)

    def constants(self):
        names: list[str] = []
        carried = self.frame.zeros(self.in_dim, 0)  # all constants go through together
        for m in self.maps:
            own = m.constants()
            carried = torch.cat([m.apply(carried), *(c[None] for c in own.values())])
            names += own
        return dict(zip(names, carried, strict=True))


@dataclass(frozen=True, eq=False)
class Sum(LinearMap):
    """Maps side by side: x → Σ maps[i](x).

    Attributes:
        maps: The maps to add.

    Raises:
        ValueError: If widths or captures differ.
    """

    maps: tuple[LinearMap, ...]

    def __post_init__(self):
        _same_frame(self.maps)
        dims = {(m.in_dim, m.out_dim) for m in self.maps}
        if len(dims) != 1:
            raise ValueError(f"The maps have widths {sorted(dims)}. Add maps of equal widths.")

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
            # One edit by a hook may enter both halves of a gated MLP, under one name.
            found[name] = found[name] + c if name in found else c
        return found


@dataclass(frozen=True, eq=False)
class Residual(LinearMap):
    """A residual connection: x → x + branch(x).

    Attributes:
        branch: The map whose output is added to its input.

    Raises:
        ValueError: If the branch changes the width.
    """

    branch: LinearMap

    def __post_init__(self):
        if self.branch.in_dim != self.branch.out_dim:
            raise ValueError(
                f"The branch has widths {self.branch.in_dim} and {self.branch.out_dim}. Use a "
                "branch that keeps the width."
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
    """The adjoint of a map, as a map without a constant: y → Aᵀ y."""

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
