"""Find the largest singular triples of A = T[query_pos, key_pos], an operator or some blocks of it.

1. Dense: one block is small enough to be built and given to LAPACK. So is an A with so few rows or
   columns that ARPACK's basis would span it.
2. By steps: otherwise ARPACK works on AᵀA. A step pushes one vector and pulls it back. 20 steps
   (2k + 1 for more triples) fill a basis, and every restart keeps k of them. The number of restarts
   depends on the spectrum. Plans count 2 k / (k + 3), about what random and trained models took for
   k = 1 to 12; ``benchmarks/contraction.py`` compares.

A step runs the whole batch through ``apply`` and ``apply_t``: 4 D (width_in + width_out) flops per
position and branch, and the patterns. The basis takes n (2k + 1) numbers for n columns.

Lehoucq, Sorensen, Yang, "ARPACK Users' Guide" (1998).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import as_array, at_least_one, is_int, need, progress_bar, spelled, token_text
from ..costs import HEAP, KEPT, Cost, Plan, StageShape, make_plan, rates_of
from ..maps import TINY, LinearMap
from ..pictures import Page, Paged, bars, table_view
from .batched_sweep import BatchedSweep
from .folding import shape_of, stages_of
from .normal_forms import states

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl svd 1"
WORDS = 6
"""How many words of a direction a page lists on each side."""


@spelled
@dataclass(frozen=True, eq=False)
class SVD(Paged):
    """The largest singular triples of an operator, or of some of its blocks: T ≈ Σ S_k U_k V_kᵀ.

    Attributes:
        U: Left singular vectors, in the output space [k, query_pos, d_model].
        S: Singular values, largest first [k].
        V: Right singular vectors, in the input space [k, key_pos, d_model].
        query_pos: Positions of ``U`` among the real tokens.
        key_pos: Positions of ``V`` among the real tokens.
    """

    U: Float[Tensor, "k query_pos d_model"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "k key_pos d_model"]
    query_pos: tuple[int, ...]
    key_pos: tuple[int, ...]

    def words(self, lens: Any, k: int = 3) -> list[tuple[list[str], list[str]]]:
        """Read output directions as words: the tokens whose logits U_k W_U raises and lowers most.

        The sign of a triple is free, as U_k and V_k can change theirs together: neither list is
        the better one. Of several positions, the one with the largest part of U_k is read.

        Args:
            lens: The lens whose operator this is; it has the unembedding and the tokenizer.
            k: Number of tokens in each list.

        Returns:
            For every triple the tokens that are raised, and the tokens that are lowered.

        Raises:
            ValueError: If the model reads its logits through a head of its own.
        """
        unembed, tokenizer = lens.capture.unembed, lens.capture.tokenizer
        if unembed.head is not None or unembed.weights.W_U.shape[0] != self.U.shape[-1]:
            raise ValueError(
                "lens reads logits through a head, which single directions do not pass. Leave the "
                "words out."
            )
        strongest = self.U.norm(dim=-1).argmax(-1)
        rows = self.U[torch.arange(len(self.U), device=self.U.device), strongest]
        logits = rows @ unembed.weights.W_U.detach().to(rows)
        ends = (logits, -logits)
        best = (end.topk(min(at_least_one(k, "k"), end.shape[-1])).indices.tolist() for end in ends)
        read = ([[token_text(tokenizer, t) for t in ids] for ids in side] for side in best)
        return list(zip(*read, strict=True))

    def plot(self, ax: Axes | None = None, lens: Any = None) -> Axes:
        """Draw the singular values with matplotlib, and the words of their output directions.

        Args:
            ax: Axes to draw on. None makes a figure.
            lens: The lens whose operator this is, for the words of :meth:`words`. None writes the
                values instead.

        Returns:
            The axes drawn on, with one bar per triple.

        Raises:
            ValueError: If matplotlib is missing, or the model has no words for a direction.
        """
        names, notes = [f"S[{i}]" for i in range(len(self.S))], []
        if lens is not None:
            both = ([" ".join(map(repr, side)) for side in pair] for pair in self.words(lens))
            notes = [f"+ {up}   − {down}" for up, down in both]
        title = "singular values" + (", and what U raises and lowers" if notes else "")
        return bars(
            ax,
            names,
            self.S.tolist(),
            unit="singular value",
            title=title,
            notes=notes,
            signed=False,
        )

    def _page(self, lens: Any = None) -> Page:
        names = ["triple", "raises", "lowers"] if lens is not None else ["triple"]
        labels = [[f"S[{i}]"] for i in range(len(self.S))]
        if lens is not None:
            words = self.words(lens, WORDS)
            pairs = zip(labels, words, strict=True)
            labels = [[*own, *(" ".join(map(repr, side)) for side in pair)] for own, pair in pairs]
        square = as_array(self.S.double()) ** 2
        shares = square / max(square.sum(), TINY)
        values = np.stack([np.sqrt(square), shares], 1)
        table = table_view(names, ["singular value", "share of Σ S²"], labels, values)
        notes = ["Shares are of those found. The sign of a triple is free: no list of words leads."]
        return Page("Singular values of the operator", [table], notes, height=420)

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        beside: Any = None,
        lens: Any = None,
    ) -> str | None:
        """Write the spectrum as one interactive HTML page, which needs no network and no server.

        Args:
            path: The file to write, whole or not at all. None returns the text instead.
            beside: What stands below the title, too: a text, or a result whose text form is taken.
            lens: The lens whose operator this is, for the words of :meth:`words`.

        Returns:
            The text of the page, or None where a file was written.

        Raises:
            ValueError: If the folder does not exist, or the model has no words for a direction.
        """
        return self._page(lens).with_lines(beside).write(path)

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the triples as a pandas table.

        Returns:
            One row per triple: its number k, its singular value and its share of Σ S² of those
            found.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        square = self.S.double() ** 2
        shares = (square / square.sum().clamp_min(TINY)).tolist()
        columns = {"k": range(len(self.S)), "singular_value": self.S.tolist(), "share": shares}
        return pandas.DataFrame(columns)

    def to_json(self) -> str:
        """Write values, vectors and the positions that the vectors stand at as JSON."""
        data = {
            "format": FORMAT,
            "query_pos": self.query_pos,
            "key_pos": self.key_pos,
            "axes": {"U": ["k", "query_pos", "d_model"], "V": ["k", "key_pos", "d_model"]},
        }
        return json.dumps(data | {name: getattr(self, name).tolist() for name in "SUV"})

    def __repr__(self) -> str:
        values = ", ".join(f"{s:.3g}" for s in self.S[:5].tolist())
        more = ", …" if len(self.S) > 5 else ""
        return f"SVD({len(self.S)} singular values: {values}{more})"


LAPACK = 2.0
"""Time of a flop of LAPACK's decomposition over that of a flop of a large product. An estimate that
``benchmarks/contraction.py`` compares with what blocks take."""

BESIDE = 7 * 2**19
"""Memory in bytes that ARPACK took in ``benchmarks/contraction.py``, whatever the size."""

CALLS = 64
"""Calls of torch in a push and a pull through one branch. Families need 47 to 72."""


@dataclass(frozen=True, eq=False)
class SVDProblem:
    """The k largest singular triples of A, the blocks [query, key] of one prompt.

    Attributes:
        op: The operator T.
        prompt: Index of the prompt in the batch.
        query: Destinations among the prompt's real tokens.
        key: Sources among the prompt's real tokens.
        k: Number of triples.
        seed: Seed of ARPACK's first vector.

    Raises:
        ValueError: If A has fewer than k triples, or the seed is not an integer ≥ 0.
    """

    op: LinearMap
    prompt: int
    query: list[int]
    key: list[int]
    k: int
    seed: int = 0

    def __post_init__(self):
        most = min(self.shape)
        if not is_int(self.k) or not 1 <= self.k <= most:
            raise ValueError(
                f"k={self.k!r} does not fit an operator that has {most} singular triples. "
                f"Pass an integer from 1 to {most}."
            )
        if not is_int(self.seed) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} is not an integer ≥ 0. Pass one, such as 0.")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of A."""
        return len(self.query) * self.op.out_dim, len(self.key) * self.op.in_dim

    @property
    def dense(self) -> bool:
        """Whether A itself is built."""
        return len(self.query) == len(self.key) == 1 or self.basis >= min(self.shape)

    @property
    def basis(self) -> int:
        """Number of vectors that ARPACK keeps. It has to be less than A's rows and columns."""
        return max(2 * self.k + 1, 20)

    def check(self, limit: int, chain: LinearMap) -> None:
        """Refuse a decomposition that does not fit into memory.

        Args:
            limit: Most memory in bytes.
            chain: The operator as the chain of its steps.

        Raises:
            ValueError: If the decomposition takes more than ``limit``.
        """
        if (peak := self._peak(chain)) > limit:
            rows, columns = self.shape
            raise ValueError(
                f"memory_limit is {limit / 2**20:.1f} MiB, but {self.k} singular triples of a "
                f"{rows} × {columns} operator take {peak / 2**20:.1f} MiB. Raise memory_limit, or "
                "ask for fewer triples or positions."
            )

    def plan(self, what: str, limit: int, chain: LinearMap) -> Plan:
        """Predict the cost, for the usual number of ARPACK's restarts.

        Args:
            what: Name of what is planned, for display.
            limit: Most memory in bytes.
            chain: The operator as the chain of its steps.

        Returns:
            The predicted time and memory.

        Raises:
            ValueError: If the decomposition does not fit into memory.
        """
        self.check(limit, chain)
        frame, op, rows = self.op.frame, self.op, self._rows
        shapes = [shape_of(stage, False) for stage in stages_of(chain)]
        measured = rates_of(shapes, op.in_dim, frame.n_pos, rows, frame.dtype, frame.device)
        if not self.dense:
            # A first basis, then restarts that keep k of its vectors and fill the rest anew.
            restarts = 2 * self.k / (self.k + 3)
            steps = round(self.basis + restarts * (self.basis - self.k) + self.k / 2)
            cost = self._step(shapes)
            note = f"about {steps} pushes and pulls; the spectrum decides"
            seconds = steps * measured.seconds(cost)
            return Plan(what, steps * cost.flops, seconds, self._peak(chain), limit, 1, (note,))
        # From the side with fewer positions: a sweep costs one start per position and dimension.
        pull = len(self.query) <= len(self.key)
        at = torch.tensor(self.query if pull else self.key, device=frame.device)
        dim, kept = (op.out_dim, op.in_dim) if pull else (op.in_dim, op.out_dim)
        sweep = BatchedSweep(chain, self.prompt, pull).shape(at, dim, states(kept))
        built = make_plan(what, [sweep], limit, frame.dtype, frame.device)
        # Golub and Van Loan's count for S and thin U and V of a long matrix, by its QR first.
        short, long = sorted(self.shape)
        flops = 6 * long * short**2 + 20 * short**3
        return replace(
            built,
            flops=built.flops + flops,
            seconds=built.seconds + measured.seconds(Cost(product=LAPACK * flops)),
            peak_bytes=max(built.peak_bytes, self._peak(chain)),
        )

    @property
    def _rows(self) -> int:
        return self.op.frame.batch * self.op.frame.n_pos

    def _peak(self, chain: LinearMap) -> int:
        """Memory in bytes of the dense A and its factors, or of a product, basis and result."""
        (m, n), op = self.shape, self.op
        if self.dense:
            numbers = 3 * m * n + min(m, n) * (m + n)
        else:
            shapes = [b for stage in stages_of(chain) for b in shape_of(stage, False)]
            widest = max((b.width_in + b.width_out for b in shapes), default=0)
            numbers = self._rows * (4 * op.in_dim + 2 * widest)
            numbers += min(m, n) * (self.basis + 4) + 3 * self.k * (m + n)
        taken = op.frame.dtype.itemsize * numbers
        return int(HEAP * taken + min(taken / 5, KEPT)) + (0 if self.dense else BESIDE)

    def _step(self, shapes: Sequence[StageShape]) -> Cost:
        """The cost of one push and one pull of a vector, through all prompts."""
        frame, D, rows = self.op.frame, self.op.in_dim, self._rows
        cost = Cost(moved=2.0 * self.basis * min(self.shape))  # orthogonal to the basis, twice
        for b in (b for stage in shapes for b in stage):
            width = b.width_in + b.width_out
            cost.product += 4 * rows * D * width
            cost.moved += 2 * (D * width + rows * (2 * D + width))
            cost.calls += CALLS
            if b.heads:
                cells = b.heads * frame.batch * frame.n_pos**2
                cost.mixing += 4 * cells * (max(b.width_in, b.width_out) // b.heads + b.score)
        return cost

    def of_dense(self, blocks: Float[Tensor, "query_pos d_out key_pos d_in"]) -> SVD:
        """The triples from A itself, by LAPACK."""
        U, S, Vh = torch.linalg.svd(blocks.reshape(self.shape), full_matrices=False)
        return self._result(U.mT[: self.k], S[: self.k], Vh[: self.k])

    def by_steps(self) -> SVD:
        """The triples from pushes and pulls, by ARPACK.

        Returns:
            The k largest triples.

        Raises:
            ValueError: If scipy is missing.
        """
        linalg = need("scipy.sparse.linalg", "scipy", "svd")
        import numpy  # comes with scipy

        op, frame = self.op, self.op.frame
        start = frame.spans[self.prompt][0]
        steps = progress_bar("svd", None, unit=" products")

        # ARPACK knows flat vectors of the entries at some positions; the operator knows batches.
        def act(at: Sequence[int], to: Sequence[int], dim: int, apply):
            def run(vector):
                x = frame.zeros(dim)
                entries = torch.from_numpy(vector).to(x).reshape(len(at), dim)
                # All other positions and prompts are 0: only the asked columns of T are used.
                x[self.prompt, [start + p for p in at]] = entries
                steps.update()
                return apply(x)[self.prompt, [start + p for p in to]].flatten().cpu().numpy()

            return run

        dtype = str(frame.dtype).removeprefix("torch.")
        operator = linalg.aslinearoperator(
            SimpleNamespace(
                shape=self.shape,
                dtype=dtype,
                matvec=act(self.key, self.query, op.in_dim, op.apply),
                rmatvec=act(self.query, self.key, op.out_dim, op.apply_t),
            )
        )
        drawn = numpy.random.default_rng(self.seed).standard_normal(max(self.shape)).astype(dtype)
        # A start of its own: ARPACK's would be drawn anew in every call.
        first = drawn[: min(self.shape)]
        with steps, torch.no_grad():
            if not operator.matvec(drawn[: self.shape[1]]).any():  # A = 0: nothing starts ARPACK
                U, V = (
                    torch.eye(self.k, n, dtype=frame.dtype, device=frame.device) for n in self.shape
                )
                return self._result(U, U.new_zeros(self.k), V)
            parts = linalg.svds(operator, k=self.k, ncv=self.basis, v0=first)
        # Copied, as SciPy's arrays may be strided backwards, which torch refuses.
        U, S, Vh = (torch.from_numpy(part.copy()).to(frame.zeros(0)) for part in parts)
        # svds promises no order.
        order = S.argsort(descending=True)
        return self._result(U.mT[order], S[order], Vh[order])

    def _result(self, U: Tensor, S: Tensor, V: Tensor) -> SVD:
        U, V = U.unflatten(1, (len(self.query), -1)), V.unflatten(1, (len(self.key), -1))
        return SVD(U, S, V, tuple(self.query), tuple(self.key))
