"""The field's tests of token scores, as sets of masked tokens and numbers. No model in this file.

A prompt has n tokens that may be masked. A method's order lists them, most relevant first. Every
measure asks for some masked sets, and makes one number of their outcomes m(masked set): the metric
of the real model's run with that set masked. Sets are integers, where bit j stands for position j.

    MoRF curve   m with the first k of the order masked            (most relevant first)
    LeRF curve   m with the last k of the order masked             (least relevant first)

| measure | reads | better |
|---|---|---|
| positive, negative | area under MoRF, LeRF over fractions (Chefer et al. 2021) | low, high |
| morf, lerf, delta | mean of MoRF, of LeRF, and LeRF − MoRF (Samek et al. 2017) | low, high, high |
| deletion, insertion | area under MoRF, under first k kept, over m(∅) (Petsiuk 2018) | low, high |
| comprehensiveness | mean over k of m(∅) − m(first k masked) (DeYoung et al. 2020) | high |
| sufficiency | mean over k of m(∅) − m(all but the first k masked) | low |
| naopc | mean over all k of m(∅) − MoRF, between its bounds over orders (Edin et al. 2025) | high |
| leave_one_out | rank correlation of scores and m(∅) − m({j} masked) | high |

A fraction f of n tokens is ⌈f·n⌉ tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from ..checks import is_int
from .significance import Number, rank_correlation

Masked = int
"""A set of positions: bit j is position j."""
Outcomes = Callable[[Sequence[Masked]], Sequence[Number]]
"""m of many sets at once, since a model runs them in batches."""
Order = Sequence[int]

PRESETS: dict[str, tuple[float, ...]] = {
    "tensorlens": tuple(i / 100 for i in range(0, 31, 5)),
    "chefer": tuple(i / 10 for i in range(1, 10)),
    "eraser": (0.01, 0.05, 0.1, 0.2, 0.5),
    "full": tuple(i / 10 for i in range(11)),
}
"""Fractions of the tokens that are masked, by the name of the work that uses them."""

EXACT_NAOPC = 10
"""Largest number of tokens of which every subset is run, so that the bounds of AOPC are exact."""
BEAM = 5


def count(fraction: Number, n: int) -> int:
    """⌈f·n⌉, where f·n a rounding error above a whole number counts as that number."""
    return math.ceil(fraction * n - 1e-9)


def as_set(positions: Iterable[int]) -> Masked:
    """Positions as a set of bits."""
    return sum(1 << j for j in positions)


def first(order: Order, k: int) -> Masked:
    """The first k positions of an order, as a set."""
    return as_set(order[:k])


def nested(order: Order, fractions: Sequence[Number], keeps: bool = False) -> list[Masked]:
    """For every fraction the first positions of the order, or all but the first."""
    sets = [first(order, count(f, len(order))) for f in fractions]
    return [as_set(order) ^ s for s in sets] if keeps else sets


# --- Measures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure(ABC):
    """One number per prompt and method.

    Attributes:
        name: Name of the measure in tables.
        metric: The number m of a masked run, a key of
            :data:`tensorlens_tl.evaluation.masking.METRICS`.
        preset: Name of the fractions, or of another choice made; "" where nothing was chosen.
        fractions: Fractions of the tokens that are masked, from 0 to 1.
    """

    name: str
    metric: str
    preset: str = ""
    fractions: tuple[Number, ...] = ()

    higher = True
    least = 2
    """Smallest number of maskable tokens that the measure needs."""

    @abstractmethod
    def masks(self, order: Order) -> Iterator[Masked]:
        """Sets of positions whose outcomes the measure reads."""

    def points(self, m: Outcomes, order: Order) -> list[float]:
        """One number per fraction, of which the measure is the mean or the area; or none."""
        return []

    @abstractmethod
    def read(self, m: Outcomes, order: Order, scores: Sequence[Number]) -> float:
        """Compute the number; ``scores`` are in the order of the positions."""


@dataclass(frozen=True)
class MaskingCurve(Measure):
    """One number of a masking curve: its mean, or its area divided by the span of its fractions.

    Attributes:
        least_first: Whether the least relevant tokens are masked first.
        keeps: Whether the first k tokens are kept, and all others masked (insertion).
        area: Whether the number is the area by trapezoids, rather than the mean of the points.
        relative: Whether outcomes are divided by the outcome of the unmasked prompt.
    """

    least_first: bool = False
    keeps: bool = False
    area: bool = True
    relative: bool = False

    @property
    def higher(self) -> bool:  # type: ignore[override]
        return self.least_first or self.keeps

    def _sets(self, order: Order) -> list[Masked]:
        order = order[::-1] if self.least_first else order
        return nested(order, self.fractions, self.keeps)

    def masks(self, order: Order) -> Iterator[Masked]:
        yield from self._sets(order)
        if self.relative:
            yield 0

    def points(self, m: Outcomes, order: Order) -> list[float]:
        # Set 0 masks nothing: the model's own outcome.
        scale = m([0])[0] if self.relative else 1.0
        return [value / scale for value in m(self._sets(order))]

    def read(self, m: Outcomes, order: Order, scores: Sequence[Number]) -> float:
        values = self.points(m, order)
        return _area(self.fractions, values) if self.area else _mean(values)


@dataclass(frozen=True)
class Delta(Measure):
    """LeRF − MoRF, the difference of the means of the two curves."""

    def _curves(self) -> list[MaskingCurve]:
        return [
            MaskingCurve(
                self.name, self.metric, self.preset, self.fractions, least_first, area=False
            )
            for least_first in (True, False)
        ]

    def masks(self, order: Order) -> Iterator[Masked]:
        for curve in self._curves():
            yield from curve.masks(order)

    def points(self, m: Outcomes, order: Order) -> list[float]:
        lerf, morf = (curve.points(m, order) for curve in self._curves())
        return [a - b for a, b in zip(lerf, morf, strict=True)]

    def read(self, m: Outcomes, order: Order, scores: Sequence[Number]) -> float:
        return _mean(self.points(m, order))


@dataclass(frozen=True)
class Eraser(Measure):
    """Mean drop with the first k tokens masked (comprehensiveness) or kept alone (sufficiency).

    Attributes:
        keeps: Whether the first k tokens are kept, and all others masked.
    """

    keeps: bool = False

    @property
    def higher(self) -> bool:  # type: ignore[override]
        return not self.keeps

    def masks(self, order: Order) -> Iterator[Masked]:
        yield 0
        yield from nested(order, self.fractions, self.keeps)

    def points(self, m: Outcomes, order: Order) -> list[float]:
        clean = m([0])[0]
        return [clean - value for value in m(nested(order, self.fractions, self.keeps))]

    def read(self, m: Outcomes, order: Order, scores: Sequence[Number]) -> float:
        return _mean(self.points(m, order))


@dataclass(frozen=True)
class LeaveOneOut(Measure):
    """Spearman's ρ between the scores and the loss of the metric without each token."""

    least = 3

    def masks(self, order: Order) -> Iterator[Masked]:
        yield 0
        yield from (1 << j for j in order)

    def read(self, m: Outcomes, order: Order, scores: Sequence[Number]) -> float:
        # Scores are in the order of positions, so losses are, too; ranks do not care for a scale.
        clean, *without = m([0, *(1 << j for j in sorted(order))])
        return rank_correlation(scores, [clean - value for value in without])


@dataclass(frozen=True)
class Naopc(Measure):
    """(AOPC − low) / (high − low), with AOPC's bounds over all orders of the prompt's tokens.

    Attributes:
        beam: Number of partial orders kept in the search for the bounds.
    """

    beam: int = BEAM

    def masks(self, order: Order) -> Iterator[Masked]:
        yield from (first(order, k) for k in range(len(order) + 1))

    def read(self, m: Outcomes, order: Order, scores: Sequence[Number]) -> float:
        low, high = aopc_bounds(m, tuple(sorted(order)), self.beam)
        value = aopc(m, order)
        # A beam may miss a bound. The method's own order is an order, too, and widens the bounds.
        low, high = min(low, value), max(high, value)
        return (value - low) / (high - low) if high > low else math.nan


# --- AOPC and its bounds -------------------------------------------------------------------------


def aopc(m: Outcomes, order: Order) -> float:
    """Mean over k = 1 … n of m(∅) − m(first k masked)."""
    clean, *values = m([first(order, k) for k in range(len(order) + 1)])
    return clean - _mean(values)


@lru_cache(maxsize=8)  # all methods of a prompt share them
def aopc_bounds(m: Outcomes, positions: tuple[int, ...], beam: int) -> tuple[float, float]:
    """Least and largest AOPC over all orders: exact for few tokens, else by two beam searches."""
    if len(positions) <= EXACT_NAOPC:
        return exact_bounds(m, positions)
    return beam_bound(m, positions, beam, 1), beam_bound(m, positions, beam, -1)


def subsets(positions: Sequence[int]) -> list[Masked]:
    """All sets of some positions, each after the sets that are inside it."""
    found = [0]
    for j in positions:
        found += [s | 1 << j for s in found]
    return found


def exact_bounds(m: Outcomes, positions: Sequence[int]) -> tuple[float, float]:
    """Bounds of AOPC over all n! orders, by the best path into every one of the 2ⁿ sets.

    An order is a path ∅ → … → all through the sets, and AOPC needs only the sum of m along the
    path: S(set) = m(set) + min over j in the set of S(set without j), and the same with max.

    Args:
        m: Outcomes of masked sets.
        positions: Positions of the maskable tokens.

    Returns:
        The least and the largest AOPC.
    """
    # Every set stands after those inside it, so its best path is known when it is reached.
    sets, n = subsets(positions), len(positions)
    clean, *values = m(sets)
    least, most = {0: 0.0}, {0: 0.0}
    for s, value in zip(sets[1:], values, strict=True):
        # The sets that lack one of its tokens: any of them may have been masked just before.
        before = [s ^ 1 << j for j in positions if s >> j & 1]
        least[s] = value + min(least[b] for b in before)
        most[s] = value + max(most[b] for b in before)
    return clean - most[sets[-1]] / n, clean - least[sets[-1]] / n


def beam_bound(m: Outcomes, positions: Sequence[int], beam: int, sign: int) -> float:
    """Search a bound of AOPC by beams over masked sets of growing size.

    Args:
        m: Outcomes of masked sets.
        positions: Positions of the maskable tokens.
        beam: Number of sets kept at each size, each with the best order that leads there. With all
            sets kept the bound is exact.
        sign: 1 for the least AOPC (m stays high), −1 for the largest.

    Returns:
        The bound that was found.
    """
    sums = {0: 0.0}
    for _ in positions:
        steps = [(s, s | 1 << j) for s in sums for j in positions if not s >> j & 1]
        new = list(dict.fromkeys(after for _, after in steps))
        value, grown = dict(zip(new, m(new), strict=True)), dict[Masked, float]()
        for before, after in steps:
            total = sums[before] + value[after]
            if after not in grown or sign * total > sign * grown[after]:
                grown[after] = total
        # Ties by the set itself, so that a search gives the same bound in every run.
        best = sorted(grown, key=lambda s: (-sign * grown[s], s))[:beam]
        sums = {s: grown[s] for s in best}
    return m([0])[0] - next(iter(sums.values())) / len(positions)


# --- Protocols -----------------------------------------------------------------------------------

PROTOCOLS: dict[str, str] = {
    "perturbation": "tensorlens",
    "morf_lerf": "full",
    "insertion_deletion": "full",
    "eraser": "eraser",
    "naopc": "",
    "leave_one_out": "",
}
"""Every protocol, and the preset of its fractions ("" where it has none)."""


def measures(
    protocol: str,
    preset: str | Sequence[Number] | None = None,
    metric: str = "probability",
    beam: int = BEAM,
) -> tuple[Measure, ...]:
    """List the measures of a protocol.

    Args:
        protocol: Name of the protocol, a key of :data:`PROTOCOLS`.
        preset: A key of :data:`PRESETS`, or fractions of your own. By default, the preset of the
            protocol.
        metric: The number m of a masked run, e.g. "probability".
        beam: For "naopc", the number of partial orders kept in the search for its bounds.

    Returns:
        The measures, in the order of the table above.

    Raises:
        ValueError: If the protocol, the preset or a fraction does not exist.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"protocol={protocol!r} does not exist. Use one of {', '.join(PROTOCOLS)}."
        )
    name, shares = _fractions(protocol, preset)
    if protocol == "perturbation":
        return (
            MaskingCurve("positive", metric, name, shares),
            MaskingCurve("negative", metric, name, shares, least_first=True),
        )
    if protocol == "morf_lerf":
        return (
            MaskingCurve("morf", metric, name, shares, area=False),
            MaskingCurve("lerf", metric, name, shares, least_first=True, area=False),
            Delta("delta", metric, name, shares),
        )
    if protocol == "insertion_deletion":
        if metric != "probability":
            raise ValueError(
                f"metric={metric!r} may be 0 or negative, and {protocol} divides by the unmasked "
                "outcome. Use metric='probability'."
            )
        return (
            MaskingCurve("deletion", metric, name, shares, relative=True),
            MaskingCurve("insertion", metric, name, shares, keeps=True, relative=True),
        )
    if protocol == "eraser":
        return (
            Eraser("comprehensiveness", metric, name, shares),
            Eraser("sufficiency", metric, name, shares, keeps=True),
        )
    if protocol == "naopc":
        if not is_int(beam) or beam < 1:
            raise ValueError(f"beam={beam!r} keeps no order in the search. Use 1 or more.")
        return (Naopc("naopc", metric, f"beam {beam}", beam=beam),)
    return (LeaveOneOut("leave_one_out", metric),)


def _fractions(
    protocol: str, preset: str | Sequence[Number] | None
) -> tuple[str, tuple[float, ...]]:
    default = PROTOCOLS[protocol]
    if not default:
        if preset is not None:
            raise ValueError(
                f"preset={preset!r} names fractions, and protocol {protocol!r} has none. Drop "
                "preset=."
            )
        return "", ()
    if preset is None or isinstance(preset, str):
        name = preset or default
        if name not in PRESETS:
            raise ValueError(
                f"preset={name!r} does not exist. Use one of {', '.join(PRESETS)}, or fractions."
            )
        return name, PRESETS[name]
    try:
        shares = tuple(float(f) for f in preset)
    except (TypeError, ValueError):
        shares = ()
    if len(shares) < 2 or not all(0 <= f <= 1 for f in shares):
        raise ValueError(
            f"preset={list(shares) or preset!r} is not at least two fractions between 0 and 1. "
            "Write 30 % as 0.3."
        )
    if any(b <= a for a, b in pairwise(shares)):
        raise ValueError(f"preset={list(shares)} does not grow. List the smallest fraction first.")
    return "own", shares


def _mean(values: Sequence[Number]) -> float:
    return math.fsum(values) / len(values)


def _area(x: Sequence[Number], y: Sequence[Number]) -> float:
    steps = ((b - a) * (v + w) / 2 for (a, b), (v, w) in zip(pairwise(x), pairwise(y), strict=True))
    return math.fsum(steps) / (x[-1] - x[0])
