"""Blocks, norms and singular vectors of an operator, without its dense form.

``T[query, key]`` is a d_model × d_model block. A row of blocks is d_model pulls from its query, a
column d_model pushes from its key, all in one sweep (``contraction``); singular vectors take pushes
and pulls of single vectors only.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor

from .contraction import Reduction, Sweep, squares, states
from .linear_map import DENSE_LIMIT, LinearMap
from .planning import Plan, make_plan, memory_budget

PLANNED = ("block", "to_dense", "frobenius_norm")

Positions = int | slice | None
"""A position among the real tokens (−1 is the last), a slice of them, or None for all."""


@dataclass(frozen=True, eq=False)
class SVD:
    """The largest singular triples of an operator, or of some of its blocks: T ≈ Σ S_k U_k V_kᵀ.

    Attributes:
        U: Left singular vectors, in the output: [k, query_pos, d_model].
        S: Singular values, largest first: [k].
        V: Right singular vectors, in the input: [k, key_pos, d_model].
        query_pos: Positions of U, among the real tokens.
        key_pos: Positions of V.
    """

    U: Float[Tensor, "k query_pos d_model"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "k key_pos d_model"]
    query_pos: tuple[int, ...]
    key_pos: tuple[int, ...]

    def __repr__(self) -> str:
        values = ", ".join(f"{s:.3g}" for s in self.S[:5].tolist())
        more = ", …" if len(self.S) > 5 else ""
        return f"SVD({len(self.S)} singular values: {values}{more})"


class Contractible(LinearMap):
    """An operator whose blocks can be contracted by sweeps: its ``map`` is a chain of steps."""

    @property
    @abstractmethod
    def map(self) -> LinearMap:
        """The chain of residual steps and norms."""

    def block(
        self, query_pos: Positions, key_pos: Positions, memory_limit: int | None = None
    ) -> Tensor:
        """Blocks T[query_pos, key_pos]: how tokens at key_pos enter the output at query_pos.

        A block multiplies a column; for a row vector use ``x @ block.mT``. Rows of blocks cost
        d_model pulls a query, columns d_model pushes a key; the fewer of the two are made.

        Args:
            query_pos: Destination: a position, a slice of positions, or None for all.
            key_pos: Source, likewise.
            memory_limit: Bytes; by default half of what is free.

        Returns:
            [batch, (query_pos,) d_out, (key_pos,) d_in]: a position that is one number has no axis,
            so ``block(-1, None)`` is the last token's row [batch, d_out, pos, d_in].

        Raises:
            ValueError: If a prompt has no such position, a range is empty, the prompts differ in
                how many positions a slice takes, or the result does not fit.
        """
        found = []
        for prompt, (start, stop) in enumerate(self.frame.spans):
            query = _positions(query_pos, stop - start, "query_pos", prompt)
            key = _positions(key_pos, stop - start, "key_pos", prompt)
            found.append(self._blocks(prompt, query, key, memory_limit))
        if len({part.shape for part in found}) > 1:
            raise ValueError(
                "the prompts differ in how many positions that takes, expected equally many: take "
                "one prompt with lens[i]"
            )
        blocks = found[0][None] if len(found) == 1 else torch.stack(found)
        blocks = blocks.squeeze(3) if isinstance(key_pos, int) else blocks
        return blocks.squeeze(1) if isinstance(query_pos, int) else blocks

    def to_dense(self, memory_limit: int = DENSE_LIMIT) -> Tensor:
        """The whole tensor [batch, query_pos, d_out, key_pos, d_in], for small models and tests.

        Padding is 0 in it. See :meth:`block`.

        Returns:
            The tensor.

        Raises:
            ValueError: If it would be larger than ``memory_limit`` bytes; says how large.
        """
        frame = self.frame
        self._check_dense(memory_limit)
        dense = frame.zeros(self.out_dim * frame.n_pos * self.in_dim).unflatten(
            2, (self.out_dim, frame.n_pos, self.in_dim)
        )
        for prompt, (start, stop) in enumerate(frame.spans):
            every = list(range(stop - start))
            dense[prompt, start:stop, :, start:stop] = self._blocks(prompt, every, every)
        return dense

    def frobenius_norm(self, memory_limit: int | None = None) -> Float[Tensor, " batch"]:
        """‖T‖_F of every prompt: d_model pulls per position."""
        found = []
        for prompt, (start, stop) in enumerate(self.frame.spans):
            total = self._every(prompt, list(range(stop - start)), True, squares(), memory_limit)
            found.append(total.sum().sqrt())
        return torch.stack(found)

    def plan(
        self,
        what: str = "block",
        query_pos: Positions = None,
        key_pos: Positions = None,
        memory_limit: int | None = None,
    ) -> Plan:
        """What :meth:`block`, :meth:`to_dense` or :meth:`frobenius_norm` would cost.

        Args:
            what: "block", "to_dense" or "frobenius_norm".
            query_pos: As :meth:`block` would be given it.
            key_pos: Likewise.
            memory_limit: Likewise.

        Returns:
            The plan; nothing has run but products that measure the machine.

        Raises:
            ValueError: If the call itself would be refused, or there is no such call.
        """
        if what not in PLANNED:
            raise ValueError(f"expected one of {', '.join(PLANNED)}, got {what!r}")
        jobs = []
        for prompt, (start, stop) in enumerate(self.frame.spans):
            query = _positions(query_pos, stop - start, "query_pos", prompt)
            key = _positions(key_pos, stop - start, "key_pos", prompt)
            pull = len(query) <= len(key) or what == "frobenius_norm"
            dim, wide = (self.out_dim, self.in_dim) if pull else (self.in_dim, self.out_dim)
            reduce = squares() if what == "frobenius_norm" else states(wide)
            at = torch.tensor(query if pull else key, device=self.frame.device)
            jobs.append(Sweep(self.map, prompt, pull).job(at, dim, reduce))
        frame = self.frame
        limit = memory_budget(memory_limit, frame.device)
        return make_plan(what, jobs, limit, frame.dtype, frame.device)

    def spectral_norm(self) -> Float[Tensor, " batch"]:
        """The largest singular value of every prompt's operator."""
        return torch.stack([self.svd(1, prompt=i).S[0] for i in range(self.frame.batch)])

    def svd(
        self,
        k: int = 6,
        query_pos: Positions = None,
        key_pos: Positions = None,
        prompt: int = 0,
        seed: int = 0,
    ) -> SVD:
        """The k largest singular triples of the operator, or of its blocks [query_pos, key_pos].

        Matrix-free: ARPACK on pushes and pulls of single vectors (scipy), or the dense block where
        it is one block.

        Args:
            k: How many.
            query_pos: Destinations; None is all.
            key_pos: Sources; None is all.
            prompt: Which prompt of the batch.
            seed: Of the first vector.

        Returns:
            Singular values and vectors, largest first.

        Raises:
            ValueError: If k does not fit, a position does not exist, or scipy is missing.
        """
        frame = self.frame
        start, stop = frame.spans[prompt]
        query = _positions(query_pos, stop - start, "query_pos", prompt)
        key = _positions(key_pos, stop - start, "key_pos", prompt)
        rows, columns = len(query) * self.out_dim, len(key) * self.in_dim
        most = min(rows, columns)
        if not isinstance(k, int) or not 1 <= k <= most:
            raise ValueError(f"expected 1 ≤ k ≤ {most} singular triples, got {k!r}")
        if len(query) == len(key) == 1 or k >= most - 1:
            if rows * columns * frame.dtype.itemsize > DENSE_LIMIT:
                raise ValueError(f"expected k well below {most}, got {k}: ask for fewer triples")
            dense = self._blocks(prompt, query, key).reshape(rows, columns)
            U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
            return _triples(U[:, :k].T, S[:k], Vh[:k], query, key)
        try:
            import numpy
            from scipy.sparse.linalg import aslinearoperator, svds
        except ImportError:
            raise ValueError("svd needs scipy: pip install 'tensorlens-tl[scipy]'") from None

        def act(at: list[int], to: list[int], dim: int, apply):
            def run(vector):
                x = frame.zeros(dim)
                x[prompt, [start + p for p in at]] = (
                    torch.as_tensor(vector).to(x).reshape(len(at), dim)
                )
                return apply(x)[prompt, [start + p for p in to]].flatten().cpu().numpy()

            return run

        dtype = str(frame.dtype).removeprefix("torch.")
        operator = aslinearoperator(
            SimpleNamespace(
                shape=(rows, columns),
                dtype=dtype,
                matvec=act(key, query, self.in_dim, self.apply),
                rmatvec=act(query, key, self.out_dim, self.apply_t),
            )
        )
        first = numpy.random.default_rng(seed).standard_normal(most)
        parts = svds(operator, k=k, v0=first.astype(dtype))
        U, S, Vh = (torch.as_tensor(part.copy()).to(frame.zeros(0)) for part in parts)
        order = S.argsort(descending=True)
        return _triples(U.mT[order], S[order], Vh[order], query, key)

    def _blocks(
        self, prompt: int, query: list[int], key: list[int], memory_limit: int | None = None
    ) -> Float[Tensor, "query_pos d_out key_pos d_in"]:
        pull = len(query) <= len(key)
        at, other = (query, key) if pull else (key, query)
        reduce = states(self.in_dim if pull else self.out_dim)
        # A slice is a view where a list would copy.
        taken = slice(other[0], other[-1] + 1) if _in_a_row(other) else other
        rows = self._every(prompt, at, pull, reduce, memory_limit)[:, :, taken]
        return rows if pull else rows.permute(2, 3, 0, 1)

    def _every(
        self, prompt: int, at: list[int], pull: bool, reduce: Reduction,
        memory_limit: int | None = None,
    ) -> Tensor:  # fmt: skip
        """A sweep of all unit vectors from some positions."""
        dim = self.out_dim if pull else self.in_dim
        eye = torch.eye(dim, dtype=self.frame.dtype, device=self.frame.device)
        return Sweep(self.map, prompt, transposed=pull).carry(
            torch.tensor(at, device=self.frame.device),
            lambda index, part: eye[part].expand(len(index), -1, -1),
            dim,
            reduce,
            memory_limit,
        )


def _in_a_row(pos: list[int]) -> bool:
    return pos == list(range(pos[0], pos[-1] + 1))


def _triples(U: Tensor, S: Tensor, V: Tensor, query: list[int], key: list[int]) -> SVD:
    return SVD(
        U.unflatten(1, (len(query), -1)),
        S,
        V.unflatten(1, (len(key), -1)),
        tuple(query),
        tuple(key),
    )


def _positions(pos: Positions, length: int, name: str, prompt: int) -> list[int]:
    """Positions as a list of indices among a prompt's real tokens."""
    if isinstance(pos, bool) or not isinstance(pos, int | slice | None):
        raise ValueError(
            f"expected {name} as a position, a slice or None, got {pos!r}: −1 is the last token"
        )
    if isinstance(pos, int):
        if not -length <= pos < length:
            raise ValueError(
                f"{name} {pos} is outside prompt {prompt}: expected {-length} to {length - 1} "
                f"(it has {length} tokens, −1 is the last)"
            )
        return [pos % length]
    found = list(range(length))[pos or slice(None)]
    if not found:
        raise ValueError(
            f"{name} {pos} takes none of the {length} tokens of prompt {prompt}: expected a range "
            "that is not empty, start before stop"
        )
    return found
