"""Blocks, norms and singular vectors of an operator, without its dense form.

``T[query, key]`` is a d_model × d_model block. A row of blocks is d_model pulls from its query, a
column d_model pushes from its key, all in one sweep (``contraction``); singular vectors take pushes
and pulls of single vectors only.
"""

from __future__ import annotations

from abc import abstractmethod
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import is_int
from ..sublayers import DENSE_LIMIT, LinearMap
from .batched_sweep import BatchedSweep, Reduction, squares, states
from .cost_model import Plan, make_plan, memory_budget
from .svd import SVD, SVDProblem

PLANNED = ("block", "to_dense", "frobenius_norm", "svd", "spectral_norm")

Positions = int | slice | None
"""A position among the real tokens (−1 is the last), a slice of them, or None for all."""


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
        places = self._places(query_pos, key_pos)
        found = [self._blocks(i, *place, memory_limit) for i, place in enumerate(places)]
        blocks = found[0][None] if len(found) == 1 else torch.stack(found)
        blocks = blocks.squeeze(3) if is_int(key_pos) else blocks
        return blocks.squeeze(1) if is_int(query_pos) else blocks

    def to_dense(self, memory_limit: int = DENSE_LIMIT) -> Tensor:
        """The whole tensor [batch, query_pos, d_out, key_pos, d_in], for small models and tests.

        Padding is 0 in it. See :meth:`block`.

        Returns:
            The tensor.

        Raises:
            ValueError: If it would be larger than ``memory_limit`` bytes; says how large.
        """
        frame = self.frame
        self._check_dense(memory_budget(memory_limit, frame.device))
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

    def plan(self, what: str = "block", **arguments: Any) -> Plan:
        """What a call of this operator would cost.

        Args:
            what: "block", "to_dense", "frobenius_norm", "svd" or "spectral_norm".
            **arguments: As the call would be given them.

        Returns:
            The plan; nothing has run but products that measure the machine.

        Raises:
            ValueError: If the call itself would be refused, or there is no such call.
        """
        if what not in PLANNED:
            raise ValueError(f"expected one of {', '.join(PLANNED)}, got {what!r}")
        try:
            given = signature(getattr(self, what)).bind(**arguments)
        except TypeError as error:
            expected = ", ".join(signature(getattr(self, what)).parameters)
            raise ValueError(f"expected the arguments of {what}: {expected}; {error}") from None
        given.apply_defaults()
        given, frame = given.arguments, self.frame
        limit = memory_budget(given.pop("memory_limit"), frame.device)
        if what in ("svd", "spectral_norm"):
            each = [{"k": 1, "prompt": i} for i in range(frame.batch)]
            asked = [self._triples(**one) for one in ([given] if what == "svd" else each)]
            plans = [triples.plan(what, limit, self.map) for triples in asked]
            flops, seconds = sum(p.flops for p in plans), sum(p.seconds for p in plans)
            peak = max(p.peak_bytes for p in plans)
            return Plan(what, flops, seconds, peak, limit, len(plans), plans[0].notes)
        if what == "to_dense":  # its limit is the result's
            self._check_dense(limit)
            limit = memory_budget(None, frame.device)
        jobs, places = [], self._places(**given, alike=what == "block")
        for i, (query, key) in enumerate(places):
            pull = len(query) <= len(key) or what == "frobenius_norm"
            dim, wide = (self.out_dim, self.in_dim) if pull else (self.in_dim, self.out_dim)
            reduce = squares() if what == "frobenius_norm" else states(wide)
            at = torch.tensor(query if pull else key, device=frame.device)
            jobs.append(BatchedSweep(self.map, i, pull).shape(at, dim, reduce))
        return make_plan(what, jobs, limit, frame.dtype, frame.device)

    def spectral_norm(self, memory_limit: int | None = None) -> Float[Tensor, " batch"]:
        """The largest singular value of every prompt's operator; see :meth:`svd`."""
        prompts = range(self.frame.batch)
        return torch.stack([self.svd(1, prompt=i, memory_limit=memory_limit).S[0] for i in prompts])

    def svd(
        self,
        k: int = 6,
        query_pos: Positions = None,
        key_pos: Positions = None,
        prompt: int = 0,
        seed: int = 0,
        memory_limit: int | None = None,
    ) -> SVD:
        """The k largest singular triples of the operator, or of its blocks [query_pos, key_pos].

        Matrix-free: ARPACK on pushes and pulls of single vectors (scipy), or the dense block where
        it is one block (``singular``). A step runs the whole batch: of many prompts take one, with
        ``lens[i]``.

        Args:
            k: How many.
            query_pos: Destinations; None is all.
            key_pos: Sources; None is all.
            prompt: Which prompt of the batch.
            seed: Of the first vector.
            memory_limit: Bytes; by default half of what is free.

        Returns:
            Singular values and vectors, largest first.

        Raises:
            ValueError: If k does not fit, there is no such prompt or position, it takes more memory,
                or scipy is missing.
        """
        triples = self._triples(k, query_pos, key_pos, prompt, seed)
        triples.check(memory_budget(memory_limit, self.frame.device), self.map)
        if triples.dense:
            return triples.of_dense(self._blocks(prompt, triples.query, triples.key, memory_limit))
        return triples.by_steps()

    def _triples(
        self,
        k: int,
        query_pos: Positions = None,
        key_pos: Positions = None,
        prompt: int = 0,
        seed: int = 0,
    ) -> SVDProblem:
        if not is_int(prompt) or not 0 <= prompt < self.frame.batch:
            raise ValueError(f"expected a prompt from 0 to {self.frame.batch - 1}, got {prompt!r}")
        start, stop = self.frame.spans[prompt]
        query = _positions(query_pos, stop - start, "query_pos", prompt)
        key = _positions(key_pos, stop - start, "key_pos", prompt)
        return SVDProblem(self, int(prompt), query, key, k, seed)

    def _places(
        self, query_pos: Positions = None, key_pos: Positions = None, alike: bool = True
    ) -> list[tuple[list[int], list[int]]]:
        """Every prompt's destinations and sources; where ``alike``, refused unless equally many."""
        found = []
        for prompt, (start, stop) in enumerate(self.frame.spans):
            query = _positions(query_pos, stop - start, "query_pos", prompt)
            found.append((query, _positions(key_pos, stop - start, "key_pos", prompt)))
        if alike and len({(len(query), len(key)) for query, key in found}) > 1:
            raise ValueError(
                "the prompts differ in how many positions that takes, expected equally many: take "
                "one prompt with lens[i]"
            )
        return found

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
        eye = self.frame.eye(dim)
        return BatchedSweep(self.map, prompt, transposed=pull).carry(
            torch.tensor(at, device=self.frame.device),
            lambda index, part: eye[part].expand(len(index), -1, -1),
            dim,
            reduce,
            memory_limit,
        )


def _in_a_row(pos: list[int]) -> bool:
    return pos == list(range(pos[0], pos[-1] + 1))


def _positions(pos: Positions, length: int, name: str, prompt: int) -> list[int]:
    """Positions as a list of indices among a prompt's real tokens."""
    wrong = f"expected {name} as a position, a slice or None, got {pos!r}: −1 is the last token"
    if is_int(pos):
        if not -length <= pos < length:
            raise ValueError(
                f"{name} {pos} is outside prompt {prompt}: expected {-length} to {length - 1} "
                f"(it has {length} tokens, −1 is the last)"
            )
        return [int(pos) % length]
    if not isinstance(pos, slice | None):
        raise ValueError(wrong)
    try:
        found = list(range(length)[pos or slice(None)])
    except (TypeError, ValueError):  # a slice of no integers, or with step 0
        raise ValueError(wrong) from None
    if not found:
        raise ValueError(
            f"{name} {pos} takes none of the {length} tokens of prompt {prompt}: expected a range "
            "that is not empty, start before stop"
        )
    return found
