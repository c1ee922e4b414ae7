"""What a faithfulness run leaves: measures prompt by prompt, shares of their means, bootstrap intervals."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Interval = tuple[float, float]
Prompt = Float[Tensor, " prompt"]


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How much of a behaviour a circuit keeps when everything else of the real model is ablated.

    Attributes:
        full: The measure of the model as it is, prompt by prompt.
        ablated: With every edge ablated, m(∅).
        empty: The empty circuit's: ``ablated``, unless patterns are frozen.
        circuit: The circuit's.
        ablation: "resample", "mean" or "zero".
        pattern: "live" or "frozen".
        n_edges: The circuit's size, the input counted once.
        n_total: All edges.
        seed: Of the bootstrap.
    """

    full: Prompt
    ablated: Prompt
    empty: Prompt
    circuit: Prompt
    ablation: str
    pattern: str
    n_edges: int
    n_total: int
    seed: int = 0

    @property
    def share(self) -> float:
        """The share recovered, of the means; nan where ablating everything changes nothing."""
        return float(_share(self.full, self.ablated, self.circuit[None])[0])

    @property
    def empty_share(self) -> float:
        """The empty circuit's share: 0 with live patterns."""
        return float(_share(self.full, self.ablated, self.empty[None])[0])

    @property
    def interval(self) -> Interval:
        """The share's bootstrap interval over prompts, 95 %; nan for one prompt."""
        shares = _resampled(self.full, self.ablated, self.circuit[None], self.seed)
        return _quantiles(shares[:, 0], len(self.full))

    def to_json(self) -> str:
        """All of it as JSON; nan is null."""
        values = {
            name: getattr(self, name).tolist() for name in ("full", "ablated", "empty", "circuit")
        }
        names = (
            "ablation",
            "pattern",
            "n_edges",
            "n_total",
            "seed",
            "share",
            "empty_share",
            "interval",
        )
        data = {"format": "tensorlens_tl faithfulness 1"} | {n: getattr(self, n) for n in names}
        return json.dumps(_finite(data | values))

    def __repr__(self) -> str:
        low, high = self.interval
        beside = f", empty circuit {self.empty_share:.3f}" if self.pattern == "frozen" else ""
        means = (float(x.mean()) for x in (self.full, self.ablated, self.circuit))
        return (
            f"Faithfulness({self.share:.3f} [{low:.3f}, {high:.3f}]{beside}: {self.n_edges} of "
            f"{self.n_total} edges, {self.ablation}, {self.pattern} patterns, {len(self.full)} prompts; "
            "full {:.4g}, ablated {:.4g}, circuit {:.4g})".format(*means)
        )


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Faithfulness of a ranking's first edges, at growing sizes.

    Attributes:
        sizes: Shares of all edges.
        n_edges: The same in edges.
        full: As in :class:`Faithfulness`.
        ablated: As in :class:`Faithfulness`.
        signed: The measure of the circuits of the highest scores [size, prompt].
        absolute: Of the highest absolute scores [size, prompt].
        ablation: "resample", "mean" or "zero".
        pattern: "live" or "frozen".
        n_total: All edges.
        seed: Of the bootstrap.
    """

    sizes: tuple[float, ...]
    n_edges: tuple[int, ...]
    full: Prompt
    ablated: Prompt
    signed: Float[Tensor, "size prompt"]
    absolute: Float[Tensor, "size prompt"]
    ablation: str
    pattern: str
    n_total: int
    seed: int = 0

    @property
    def shares(self) -> Float[Tensor, " size"]:
        """f(C_k) of the signed ranking."""
        return _share(self.full, self.ablated, self.signed)

    @property
    def absolute_shares(self) -> Float[Tensor, " size"]:
        """f(C_k) of the absolute ranking."""
        return _share(self.full, self.ablated, self.absolute)

    @property
    def cpr(self) -> float:
        """∫ f dk of the signed ranking, trapezoids over linear k; more is better."""
        return float(self._area(self.shares))

    @property
    def cmd(self) -> float:
        """∫ |1 − f| dk of the absolute ranking, trapezoids over linear k; less is better."""
        return float(self._area((1 - self.absolute_shares).abs()))

    @property
    def cpr_interval(self) -> Interval:
        """Its bootstrap interval over prompts, 95 %."""
        shares = _resampled(self.full, self.ablated, self.signed, self.seed)
        return _quantiles(self._area(shares), len(self.full))

    @property
    def cmd_interval(self) -> Interval:
        """Its bootstrap interval over prompts, 95 %."""
        shares = _resampled(self.full, self.ablated, self.absolute, self.seed)
        return _quantiles(self._area((1 - shares).abs()), len(self.full))

    def _area(self, f: Float[Tensor, "*many size"]) -> Float[Tensor, "*many"]:
        return torch.trapezoid(f, f.new_tensor(self.sizes), dim=-1)

    def to_json(self) -> str:
        """All of it as JSON; nan is null."""
        names = ("full", "ablated", "signed", "absolute", "shares", "absolute_shares")
        values = {name: getattr(self, name).tolist() for name in names}
        names = ("sizes", "n_edges", "ablation", "pattern", "n_total", "seed")
        names += ("cpr", "cpr_interval", "cmd", "cmd_interval")
        data = {"format": "tensorlens_tl faithfulness curve 1"} | {
            n: getattr(self, n) for n in names
        }
        return json.dumps(_finite(data | values))

    def __repr__(self) -> str:
        cpr, cmd = self.cpr_interval, self.cmd_interval
        head = (
            f"FaithfulnessCurve(CPR {self.cpr:.3f} [{cpr[0]:.3f}, {cpr[1]:.3f}], CMD {self.cmd:.3f} "
            f"[{cmd[0]:.3f}, {cmd[1]:.3f}]: {self.n_total} edges, {self.ablation}, {self.pattern} "
            f"patterns, {len(self.full)} prompts)"
        )
        rows = zip(self.sizes, self.n_edges, self.shares, self.absolute_shares, strict=True)
        return "\n".join([head, "   size  edges  signed  absolute"] + [
            f"  {size:5.1%}  {n:5d}  {float(f):6.3f}  {float(g):8.3f}" for size, n, f, g in rows
        ])  # fmt: skip


def share_difference(ours: Faithfulness, other: Faithfulness) -> tuple[float, Interval]:
    """How much larger one circuit's share is than another's, and the bootstrap interval of that.

    Args:
        ours: One.
        other: The other, on the same prompts.

    Returns:
        The difference of the shares, and its interval over prompts, 95 %.

    Raises:
        ValueError: If the prompts or the ablations are not the same.
    """
    if not (torch.equal(ours.full, other.full) and torch.equal(ours.ablated, other.ablated)):
        raise ValueError(
            "expected two circuits on the same prompts and ablation, got others: run both"
        )
    both = torch.stack([ours.circuit, other.circuit])
    drawn = _resampled(ours.full, ours.ablated, both, ours.seed)
    return ours.share - other.share, _quantiles(drawn[:, 0] - drawn[:, 1], len(ours.full))


# --- Shares and their intervals ---------------------------------------------------------------------


def _share(full: Tensor, ablated: Tensor, circuits: Float[Tensor, "many prompt"]) -> Tensor:
    gap = full.mean() - ablated.mean()
    if not bool(gap):
        return torch.full_like(circuits[:, 0], math.nan)
    return (circuits.mean(-1) - ablated.mean()) / gap


def _resampled(
    full: Tensor,
    ablated: Tensor,
    circuits: Float[Tensor, "many prompt"],
    seed: int,
    times: int = 1000,
) -> Float[Tensor, "times many"]:
    """Shares over prompts drawn with replacement."""
    n = len(full)
    drawn = torch.randint(
        n, (times, n), generator=torch.Generator().manual_seed(seed), device="cpu"
    )
    low = ablated[drawn].mean(-1)
    return (circuits[:, drawn].mean(-1) - low).T / (full[drawn].mean(-1) - low)[:, None]


def _quantiles(values: Float[Tensor, " times"], n: int) -> Interval:
    if n < 2 or not bool(values.isfinite().all()):  # a draw in which ablating changes nothing
        return math.nan, math.nan
    low, high = values.quantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data
