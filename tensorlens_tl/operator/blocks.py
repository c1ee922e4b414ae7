"""Blocks, norms and singular vectors of an operator, without its dense form.

``T[query, key]`` is a d_model × d_model block. A row of blocks is d_model pulls from its query, a
column of blocks is d_model pushes from its key, and all of them are one batched sweep. Singular
vectors need pushes and pulls of single vectors only.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import bound, is_int, no_autocast, spelled
from ..costs import Plan, make_plan, memory_budget
from ..maps import DENSE_LIMIT, Chain
from ..sublayers import Mapped
from .batched_sweep import BatchedSweep
from .normal_forms import Reduction, squares, states
from .svd import SVD, SVDProblem

PLANNED = ("block", "to_dense", "frobenius_norm", "svd", "spectral_norm")
"""The methods of an operator whose cost ``plan`` predicts."""

Positions = int | slice | None
"""A position among the real tokens (−1 is the last), a slice of them, or None for all."""


@spelled
class StepChain(Mapped):
    """An operator that is a chain of residual steps and norms.

    Such a chain can be folded, so that many vectors go through it as a batched sweep. That is why
    blocks, norms and the dense form are computed here by sweeps, where any other
    :class:`LinearMap` pulls vector by vector. Subclasses give ``chain``.
    """

    @property
    @abstractmethod
    def chain(self) -> Chain:
        """The residual steps and norms, composed once."""

    @property
    def map(self) -> Chain:
        """The residual steps and norms. torch.autocast must be off."""
        no_autocast(self.frame.device.type)  # every product of the operator starts here
        self.frame.with_gradients()
        return self.chain

    def apply(self, x):
        self.frame.check(x, self.in_dim)
        return super().apply(x)

    def apply_t(self, y, effects=None):
        self.frame.check(y, self.out_dim)
        return super().apply_t(y, effects)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The shape of T, [batch, query_pos, d_out, key_pos, d_in], as of :meth:`to_dense`."""
        frame = self.frame
        return frame.batch, frame.n_pos, self.out_dim, frame.n_pos, self.in_dim

    def __getitem__(self, at: tuple[Positions, Positions]) -> Tensor:
        """The block T[i, j], of what token j adds to position i: ``block(i, j)``."""
        if not (isinstance(at, tuple) and len(at) == 2):
            raise ValueError(
                f"T[{at!r}] does not name a block, which has a destination and a source. "
                "Write T[i, j], with a number, a slice or None (all) for each."
            )
        return self.block(*at)

    def block(
        self, query_pos: Positions, key_pos: Positions, memory_limit: int | None = None
    ) -> Tensor:
        """Blocks T[query_pos, key_pos]: how tokens at key_pos enter the output at query_pos.

        A block multiplies a column. For a row vector use ``x @ block.mT``. A row of blocks costs
        d_model pulls, a column d_model pushes. The cheaper of the two ways is taken: pulls meet the
        tokens before their destination, pushes those behind their source.

        Args:
            query_pos: Destination: a position, a slice of positions, or None for all.
            key_pos: Source: a position, a slice of positions, or None for all.
            memory_limit: Most memory in bytes. None is half of what is free.

        Returns:
            The blocks [batch, query_pos, d_out, key_pos, d_in]. A position given as one number has
            no axis: ``block(-1, None)`` is the last token's row [batch, d_out, pos, d_in].

        Raises:
            ValueError: If a prompt has no such position, a slice is empty, a slice selects
                different numbers of positions in different prompts, or the result does not fit.
        """
        places = self._places(query_pos, key_pos)
        found = [self._blocks(i, *place, memory_limit) for i, place in enumerate(places)]
        blocks = found[0][None] if len(found) == 1 else torch.stack(found)
        blocks = blocks.squeeze(3) if is_int(key_pos) else blocks
        return blocks.squeeze(1) if is_int(query_pos) else blocks

    def to_dense(self, memory_limit: int = DENSE_LIMIT) -> Tensor:
        """The whole tensor T, for small models and tests. Entries of padding are zero.

        Args:
            memory_limit: Largest result in bytes.

        Returns:
            The tensor [batch, query_pos, d_out, key_pos, d_in].

        Raises:
            ValueError: If the tensor is larger than ``memory_limit``. The message says how large.
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
        """‖T‖_F of every prompt [batch], for d_model pulls per position."""
        found = []
        for prompt, (start, stop) in enumerate(self.frame.spans):
            total = self._every(prompt, list(range(stop - start)), True, squares(), memory_limit)
            found.append(total.sum().sqrt())
        return torch.stack(found)

    def plan(self, what: str = "block", **arguments: Any) -> Plan:
        """Predict what a call of this operator costs.

        Args:
            what: "block", "to_dense", "frobenius_norm", "svd" or "spectral_norm".
            **arguments: The arguments of that call.

        Returns:
            The plan. Nothing has run but products that measure the machine.

        Raises:
            ValueError: If the call itself would be refused, or ``what`` has another value.
        """
        if what not in PLANNED:
            raise ValueError(f"what={what!r} cannot be planned. Pass one of {', '.join(PLANNED)}.")
        given, frame = bound(getattr(self, what), arguments), self.frame
        limit = memory_budget(given.pop("memory_limit"), frame.device)
        # 1. Singular vectors: pushes and pulls of single vectors, a run for every prompt asked for.
        if what in ("svd", "spectral_norm"):
            each = [{"k": 1, "prompt": i} for i in range(frame.batch)]
            problems = [self._svd_problem(**one) for one in ([given] if what == "svd" else each)]
            plans = [problem.plan(what, limit, self.map) for problem in problems]
            flops, seconds = sum(p.flops for p in plans), sum(p.seconds for p in plans)
            peak = max(p.peak_bytes for p in plans)
            return Plan(what, flops, seconds, peak, limit, len(plans), plans[0].notes)
        # 2. Everything else: a batched sweep for every prompt.
        if what == "to_dense":  # its limit is the result's
            self._check_dense(limit)
            limit = memory_budget(None, frame.device)
        shapes, places = [], self._places(**given, alike=what == "block")
        for i, (query, key) in enumerate(places):
            pull = len(query) <= len(key) or what == "frobenius_norm"
            dim, wide = (self.out_dim, self.in_dim) if pull else (self.in_dim, self.out_dim)
            reduce = squares() if what == "frobenius_norm" else states(wide)
            at = torch.tensor(query if pull else key, device=frame.device)
            shapes.append(BatchedSweep(self.map, i, pull).shape(at, dim, reduce))
        return make_plan(what, shapes, limit, frame.dtype, frame.device)

    def spectral_norm(self, memory_limit: int | None = None) -> Float[Tensor, " batch"]:
        """The largest singular value of every prompt's operator [batch]; see :meth:`svd`."""
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

        One block is decomposed as a dense matrix. Anything larger is never built: ARPACK (scipy)
        needs pushes and pulls of single vectors only. Each of them runs the whole batch, so take
        one of many prompts with ``lens[i]``.

        Args:
            k: Number of triples.
            query_pos: Destinations: a position, a slice of positions, or None for all.
            key_pos: Sources: a position, a slice of positions, or None for all.
            prompt: Index of the prompt in the batch.
            seed: Seed of ARPACK's first vector.
            memory_limit: Most memory in bytes. None is half of what is free.

        Returns:
            Singular values and vectors, largest first.

        Raises:
            ValueError: If there are fewer than k triples, there is no such prompt or position, the
                memory does not suffice, or scipy is missing.
        """
        problem = self._svd_problem(k, query_pos, key_pos, prompt, seed)
        problem.check(memory_budget(memory_limit, self.frame.device), self.map)
        if problem.dense:
            return problem.of_dense(self._blocks(prompt, problem.query, problem.key, memory_limit))
        return problem.by_steps()

    def _svd_problem(
        self,
        k: int,
        query_pos: Positions = None,
        key_pos: Positions = None,
        prompt: int = 0,
        seed: int = 0,
    ) -> SVDProblem:
        if not is_int(prompt) or not 0 <= prompt < self.frame.batch:
            raise ValueError(
                f"prompt={prompt!r} is not in this batch. "
                f"Pass an index from 0 to {self.frame.batch - 1}."
            )
        start, stop = self.frame.spans[prompt]
        query = _positions(query_pos, stop - start, "query_pos", prompt)
        key = _positions(key_pos, stop - start, "key_pos", prompt)
        if self.frame.graph:
            raise ValueError(
                "Singular vectors carry no gradient, but the lens was captured with graph=True. "
                "Capture without graph=True."
            )
        return SVDProblem(self, int(prompt), query, key, k, seed)

    def _places(
        self, query_pos: Positions = None, key_pos: Positions = None, alike: bool = True
    ) -> list[tuple[list[int], list[int]]]:
        """Every prompt's destinations and sources, as lists of positions.

        Args:
            query_pos: Destinations as the user gave them.
            key_pos: Sources as the user gave them.
            alike: Whether all prompts must have the same number of each.

        Returns:
            For every prompt, its destinations and its sources.

        Raises:
            ValueError: If positions do not exist, or their numbers differ where they must not.
        """
        found = []
        for prompt, (start, stop) in enumerate(self.frame.spans):
            query = _positions(query_pos, stop - start, "query_pos", prompt)
            found.append((query, _positions(key_pos, stop - start, "key_pos", prompt)))
        if alike and len({(len(query), len(key)) for query, key in found}) > 1:
            raise ValueError(
                "query_pos and key_pos select different numbers of positions in different prompts. "
                "Take one prompt with lens[i]."
            )
        return found

    def _blocks(
        self, prompt: int, query: list[int], key: list[int], memory_limit: int | None = None
    ) -> Float[Tensor, "query_pos d_out key_pos d_in"]:
        pull = self._work(prompt, query, pull=True) <= self._work(prompt, key, pull=False)
        at, other = (query, key) if pull else (key, query)
        reduce = states(self.in_dim if pull else self.out_dim)
        # A slice is a view where a list would copy.
        taken = slice(other[0], other[-1] + 1) if _in_a_row(other) else other
        rows = self._every(prompt, at, pull, reduce, memory_limit)[:, :, taken]
        return rows if pull else rows.permute(2, 3, 0, 1)

    def _work(self, prompt: int, at: list[int], pull: bool) -> int:
        # Rows that are carried. Where no pattern looks ahead, a pull meets what is before its
        # position, and a push what is behind: a source near the end costs few rows.
        sweep = BatchedSweep(self.map, prompt, transposed=pull)
        coordinates = sweep.coordinate(torch.tensor(at, device="cpu")).tolist()
        reach = [c + 1 if sweep.causal else sweep.n_pos for c in coordinates]
        return sum(reach) * (self.out_dim if pull else self.in_dim)

    def _every(
        self,
        prompt: int,
        at: list[int],
        pull: bool,
        reduce: Reduction,
        memory_limit: int | None = None,
    ) -> Tensor:
        """Sweep all unit vectors from some positions."""
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
    wrong = (
        f"{name}={pos!r} is not a position. "
        "Pass an integer (−1 is the last token), a slice of integers, or None for all."
    )
    if is_int(pos):
        if not -length <= pos < length:
            raise ValueError(
                f"{name}={pos} is outside prompt {prompt}, which has {length} tokens. "
                f"Pass a position from {-length} to {length - 1}."
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
            f"{name}={pos} selects none of the {length} tokens of prompt {prompt}. "
            "Pass a slice whose start comes before its stop."
        )
    return found
