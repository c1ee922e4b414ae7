"""What every method returns: a matrix of tokens by tokens, or a score per token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import strip_html
from ..checks import at_least_one
from ..operator import Convention


@dataclass(frozen=True, eq=False, repr=False)
class TokenMatrix:
    """A token-by-token matrix [query_pos, key_pos] for every prompt of a batch.

    Attributes:
        kind: Which.
        values: [batch, query_pos, key_pos]; 0 where there is padding.
        labels: Every prompt's tokens.
        spans: Where in ``values`` each prompt's tokens are.
        constants: "in_out": the constants' share of every destination's target [batch, query_pos].
        target_value: "in_out": the targets, from the run itself [batch, query_pos].
        standard_error: "norm" with probes: of every entry.
        probes: How many, or None where exact.
        convention: The choice made for gated MLPs.
        layers: The sites between which.
    """

    kind: str
    values: Float[Tensor, "batch query_pos key_pos"]
    labels: tuple[tuple[str, ...], ...]
    spans: tuple[tuple[int, int], ...]
    convention: Convention
    layers: tuple[str, str]
    constants: Float[Tensor, "batch query_pos"] | None = None
    target_value: Float[Tensor, "batch query_pos"] | None = None
    standard_error: Float[Tensor, "batch query_pos key_pos"] | None = None
    probes: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, prompt: int) -> Float[Tensor, "query_pos key_pos"]:
        """One prompt's matrix, without padding."""
        start, stop = self.spans[prompt]
        return self.values[prompt, start:stop, start:stop]

    def __repr__(self) -> str:
        size = f"{len(self)} × " if len(self) > 1 else ""
        size += " × ".join(map(str, self.values.shape[1:]))
        how = "" if self.probes is None else f", estimated from {self.probes} probes"
        return f"TokenMatrix({self.kind}, {size}{how}, {self.layers[0]} → {self.layers[1]})"

    @property
    def completeness_error(self) -> float | None:
        """Largest |row sum + constants − target| / max |target| of "in_out"; None for other kinds."""
        if self.constants is None or self.target_value is None:
            return None
        off = (self.values.sum(-1) + self.constants - self.target_value).abs().max()
        return float(off / self.target_value.abs().max().clamp_min(1e-30))

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """A confidence interval of every estimated entry: t on the logarithm of the mean square.

        Args:
            level: Its coverage.

        Returns:
            Lower and upper bounds, [batch, query_pos, key_pos] each.

        Raises:
            ValueError: If the matrix is exact, or the level is no share.
        """
        if self.standard_error is None or self.probes is None:
            raise ValueError("this matrix is exact: expected a norm estimated with probes=k")
        if not 0 < level < 1:
            raise ValueError(f"expected a level between 0 and 1, got {level}")
        # d log(norm) = d norm / norm
        spread = student_t((1 + level) / 2, self.probes - 1) * self.standard_error
        factor = torch.exp(spread / self.values.clamp_min(1e-30))
        return self.values / factor, self.values * factor

    def to_dataframe(self, prompt: int = 0) -> Any:
        """One prompt's matrix as a pandas DataFrame, tokens on both sides.

        Returns:
            The frame.

        Raises:
            ValueError: If pandas is missing.
        """
        try:
            import pandas
        except ImportError:
            raise ValueError("to_dataframe needs pandas: pip install pandas") from None
        names = [f"{token}@{i}" for i, token in enumerate(self.labels[prompt])]
        return pandas.DataFrame(self[prompt].cpu().numpy(), index=names, columns=names)


def student_t(p: float, freedom: int) -> float:
    """A quantile of Student's t: closed for 1 and 2 degrees of freedom, else expanded around z.

    Source: Cornish-Fisher expansion, Abramowitz & Stegun 26.7.5.

    Returns:
        The quantile.
    """
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores:
    """How much of a target is due to every token, for every prompt of a batch.

    Attributes:
        method: Which.
        values: [batch, pos]; 0 where there is padding.
        labels: Every prompt's tokens.
        spans: Where in ``values`` each prompt's tokens are.
        target: The target's name, per prompt.
        convention: The choice made for gated MLPs.
    """

    method: str
    values: Float[Tensor, "batch pos"]
    labels: tuple[tuple[str, ...], ...]
    spans: tuple[tuple[int, int], ...]
    target: tuple[str, ...]
    convention: Convention

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, prompt: int) -> Float[Tensor, " pos"]:
        """One prompt's scores, without padding."""
        return self.values[prompt, slice(*self.spans[prompt])]

    def top(self, k: int = 10, prompt: int = 0) -> list[tuple[str, float]]:
        """The k tokens of the largest scores by absolute value, as (token@position, score).

        Returns:
            At most k pairs, largest first.

        Raises:
            ValueError: If k < 1.
        """
        scores = self[prompt]
        order = scores.abs().argsort(descending=True)[: at_least_one(k, "k")].tolist()
        return [(f'"{self.labels[prompt][i]}"@{i}', float(scores[i])) for i in order]

    def __repr__(self) -> str:
        head = f"{self.method} of {self.target[0]}"
        head += f", prompt 1 of {len(self)}" if len(self) > 1 else ""
        return "\n".join([head, *(f"  {value:+10.4f}  {name}" for name, value in self.top())])

    def _repr_html_(self) -> str:
        rows = zip(self.target, self.labels, range(len(self)), strict=True)
        strips = (f"<div><b>{self.method}</b> of {escape(target)}</div>"
                  + strip_html(tokens, self[i].tolist()) for target, tokens, i in rows)  # fmt: skip
        return "".join(strips)
