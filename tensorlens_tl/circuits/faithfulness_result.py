"""Results of faithfulness runs: numbers by prompt, shares of their means, bootstrap intervals."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import as_array, need, spelled
from ..operator import Convention
from ..pictures import (
    Page,
    Paged,
    curves,
    curves_view,
    dots,
    interval_text,
    interval_view,
    intervals_over,
    table_view,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

UNIT = "the unit of the metric, logits by default; shares have none"
Interval = tuple[float, float]
Prompt = Float[Tensor, " prompt"]


@spelled
@dataclass(frozen=True, eq=False)
class Faithfulness(Paged):
    """How much of a behaviour a circuit keeps when everything else of the real model is ablated.

    Attributes:
        full: Metric of the model as it is [prompt], in the unit of the metric (logits by default).
        ablated: Metric with every edge ablated, m(∅) [prompt].
        empty: Metric of the empty circuit [prompt]: ``ablated``, unless attention is frozen.
        circuit: Metric of the circuit [prompt].
        ablation: What replaced ablated outputs: "resample", "mean" or "zero".
        attention: "live" or "frozen" patterns.
        n_edges: Number of edges in the circuit; token and position embeddings are one input.
        n_total: Number of edges in the model.
        seed: Seed of the bootstrap.
        first_token: Token that was put in front of the prompts, as in :class:`Convention`.
        parts: What is counted: "edges", or "features" of SAEs.

    Example:
        >>> from tensorlens_tl import demo, faithfulness
        >>> pair = demo.prompts("ioi", 1)[0]
        >>> found = faithfulness(demo.load_model(), [pair.clean], [], [pair.corrupted])
        >>> abs(found.share) < 0.01, found.n_edges
        (True, 0)
    """

    full: Prompt
    ablated: Prompt
    empty: Prompt
    circuit: Prompt
    ablation: str
    attention: str
    n_edges: int
    n_total: int
    seed: int = 0
    first_token: str | None = None
    parts: str = "edges"

    @property
    def share(self) -> float:
        """Share of the mean metric that the circuit recovers: (m(C) − m(∅)) / (m(N) − m(∅)).

        nan where ablating everything changes nothing.
        """
        return float(_share(self.full, self.ablated, self.circuit[None])[0])

    @property
    def empty_share(self) -> float:
        """Share of the empty circuit: 0, or with frozen attention what patterns alone carry."""
        return float(_share(self.full, self.ablated, self.empty[None])[0])

    @property
    def interval(self) -> Interval:
        """95 % bootstrap interval of the share over prompts; nan for one prompt."""
        # Prompts are drawn, not shares: a share is a ratio of means over the draw.
        shares = _resampled(self.full, self.ablated, self.circuit[None], self.seed)
        return _quantiles(shares[:, 0], len(self.full))

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the metrics as a pandas table.

        Returns:
            One row per prompt, with columns prompt, full, ablated, empty and circuit, in the unit
            of the metric.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        names = ("full", "ablated", "empty", "circuit")
        columns = {name: getattr(self, name).tolist() for name in names}
        return pandas.DataFrame({"prompt": range(len(self.full))} | columns)

    def to_json(self) -> str:
        """Write all numbers as JSON; nan is null."""
        tensors = ("full", "ablated", "empty", "circuit")
        names = ("ablation", "attention", "n_edges", "n_total", "seed", "first_token", "parts")
        names += ("share", "empty_share", "interval")
        data = {"format": "tensorlens_tl faithfulness 1", "unit": UNIT}
        data |= {n: getattr(self, n) for n in names}
        return json.dumps(_finite(data | {n: getattr(self, n).tolist() for n in tensors}))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the metric of every prompt with matplotlib, and its means as lines.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. The share and its interval stand above.

        Raises:
            ValueError: If matplotlib is missing.
        """
        names = ("full", "circuit", "empty", "ablated")
        if self.attention == "live":  # where the empty circuit is the ablated model
            # The empty circuit's dots would lie on those of "ablated".
            names = ("full", "circuit", "ablated")
        groups = {name: getattr(self, name).tolist() for name in names}
        title = f"share {self._share()}, {self.n_edges} {self.parts}"
        return dots(ax, groups, ylabel="metric (logits by default)", title=title)

    def _page(self) -> Page:
        names = ("full", "circuit", "empty", "ablated")
        labels = [[str(i)] for i in range(len(self.full))]
        values = np.stack([as_array(getattr(self, name)) for name in names], 1)
        table = table_view(["prompt"], names, labels, values, together=True)
        notes = [repr(self), "The metric of every prompt, in logits by default."]
        return Page(f"Faithfulness {self.share:.3f}", [table], notes, height=420)

    def _share(self) -> str:
        return f"{self.share:.3f} {interval_text(*self.interval, len(self.full), '.3f')}"

    def __repr__(self) -> str:
        beside = f", empty circuit {self.empty_share:.3f}" if self.attention == "frozen" else ""
        means = (float(x.mean()) for x in (self.full, self.ablated, self.circuit))
        return (
            f"Faithfulness({self._share()}{beside}: {self.n_edges} of "
            f"{self.n_total} {self.parts}, {self.ablation}, {self.attention} attention, "
            f"{_prompts(self)}; "
            "full {:.4g}, ablated {:.4g}, circuit {:.4g})".format(*means)
        )


@spelled
@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Paged):
    """Faithfulness of a ranking's first edges, at growing sizes.

    Attributes:
        sizes: Circuit sizes as shares of all edges.
        n_edges: Circuit sizes as numbers of edges.
        full: Metric of the model as it is [prompt].
        ablated: Metric with every edge ablated [prompt].
        signed: Metric of the circuits of the highest scores [size, prompt].
        absolute: Metric of the circuits of the highest absolute scores [size, prompt].
        ablation: What replaced ablated outputs: "resample", "mean" or "zero".
        attention: "live" or "frozen" patterns.
        n_total: Number of edges in the model.
        seed: Seed of the bootstrap.
        first_token: Token that was put in front of the prompts, as in :class:`Convention`.

    Example:
        >>> from tensorlens_tl import demo, faithfulness_curve, score_edges
        >>> model, pair = demo.load_model(), demo.prompts("ioi", 1)[0]
        >>> scores = score_edges(model, [pair.clean], [pair.corrupted])
        >>> prompts = [pair.clean], scores, [pair.corrupted]
        >>> curve = faithfulness_curve(model, *prompts, sizes=(0.0, 1.0))
        >>> [abs(round(float(share), 2)) for share in curve.shares]
        [0.0, 1.0]
    """

    sizes: tuple[float, ...]
    n_edges: tuple[int, ...]
    full: Prompt
    ablated: Prompt
    signed: Float[Tensor, "size prompt"]
    absolute: Float[Tensor, "size prompt"]
    ablation: str
    attention: str
    n_total: int
    seed: int = 0
    first_token: str | None = None

    @property
    def shares(self) -> Float[Tensor, " size"]:
        """Share f(C_k) recovered by the highest scores, at every size k."""
        return _share(self.full, self.ablated, self.signed)

    @property
    def absolute_shares(self) -> Float[Tensor, " size"]:
        """Share f(C_k) recovered by the highest absolute scores, at every size k."""
        return _share(self.full, self.ablated, self.absolute)

    @property
    def cpr(self) -> float:
        """Circuit performance ratio ∫ f dk of the signed ranking (trapezoids); more is better."""
        return float(self._area(self.shares))

    @property
    def cmd(self) -> float:
        """Circuit-model distance ∫ |1 − f| dk of the absolute ranking; less is better."""
        # |1 − f|, as a circuit may also do more than the model: CPR would reward that.
        return float(self._area((1 - self.absolute_shares).abs()))

    @property
    def cpr_interval(self) -> Interval:
        """95 % bootstrap interval of :attr:`cpr` over prompts."""
        shares = _resampled(self.full, self.ablated, self.signed, self.seed)
        return _quantiles(self._area(shares), len(self.full))

    @property
    def cmd_interval(self) -> Interval:
        """95 % bootstrap interval of :attr:`cmd` over prompts."""
        shares = _resampled(self.full, self.ablated, self.absolute, self.seed)
        return _quantiles(self._area((1 - shares).abs()), len(self.full))

    def _area(self, f: Float[Tensor, "*many size"]) -> Float[Tensor, "*many"]:
        # Over the sizes as shares of all edges, from the smallest to the largest that was measured.
        return torch.trapezoid(f, f.new_tensor(self.sizes), dim=-1)

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the shares as a pandas table.

        Returns:
            One row per size, with columns size, n_edges, signed and absolute: the shares recovered
            by the highest scores and by the highest absolute scores.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        shares = {"signed": self.shares.tolist(), "absolute": self.absolute_shares.tolist()}
        return pandas.DataFrame({"size": self.sizes, "n_edges": self.n_edges} | shares)

    def to_json(self) -> str:
        """Write all numbers as JSON; nan is null."""
        tensors = ("full", "ablated", "signed", "absolute", "shares", "absolute_shares")
        names = ("sizes", "n_edges", "ablation", "attention", "n_total", "seed", "first_token")
        names += ("cpr", "cpr_interval", "cmd", "cmd_interval")
        data = {"format": "tensorlens_tl faithfulness curve 1", "unit": UNIT}
        data |= {n: getattr(self, n) for n in names}
        return json.dumps(_finite(data | {n: getattr(self, n).tolist() for n in tensors}))

    def intervals(self) -> dict[str, list[Interval]]:
        """Compute 95 % bootstrap intervals of the shares over prompts.

        Returns:
            One interval per size, for "signed" and for "absolute"; nan for one prompt.
        """
        found = {}
        for name in ("signed", "absolute"):
            drawn = _resampled(self.full, self.ablated, getattr(self, name), self.seed)
            found[name] = [_quantiles(shares, len(self.full)) for shares in drawn.T]
        return found

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the shares by size with matplotlib, with 95 % bootstrap intervals over prompts.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on, with one curve per ranking.

        Raises:
            ValueError: If matplotlib is missing.
        """
        ends, series = self.intervals(), {}
        areas = {"signed": f"CPR {self.cpr:.3f}", "absolute": f"CMD {self.cmd:.3f}"}
        for name, shares in (("signed", self.shares), ("absolute", self.absolute_shares)):
            points = zip(shares.tolist(), ends[name], strict=True)
            series[f"{name} scores, {areas[name]}"] = [(f, low, high) for f, (low, high) in points]
        x = [100 * size for size in self.sizes]
        xlabel = f"edges kept, % of {self.n_total}"
        title = f"{self.ablation}, {self.attention} attention, {_over(self)}"
        return curves(ax, x, series, title=title, xlabel=xlabel, ylabel="share recovered")

    def _page(self) -> Page:
        ends, lines, labels = self.intervals(), [], []
        for name, shares in (("signed", self.shares), ("absolute", self.absolute_shares)):
            low, high = np.array(ends[name]).T
            lines.append((f"{name} scores", shares.cpu().numpy(), low, high))
            labels += [[str(n), f"{name} scores"] for n in self.n_edges]
        x, values = [100 * size for size in self.sizes], [np.stack(own, 1) for _, *own in lines]
        axes = (f"edges kept, % of {self.n_total}", "share recovered")
        views = [
            curves_view(x, lines, axes, {"the whole model": 1.0}),
            interval_view(["edges", "by"], labels, np.concatenate(values), what="share"),
        ]
        notes = [repr(self).splitlines()[0], f"{_over(self).capitalize()}."]
        return Page("Faithfulness by size", views, notes, height=680)

    def __repr__(self) -> str:
        cpr, cmd = (
            interval_text(*ends, len(self.full), ".3f")
            for ends in (self.cpr_interval, self.cmd_interval)
        )
        head = (
            f"FaithfulnessCurve(CPR {self.cpr:.3f} {cpr}, CMD {self.cmd:.3f} {cmd}: {self.n_total} "
            f"edges, {self.ablation}, {self.attention} attention, {_prompts(self)})"
        )
        columns = zip(self.sizes, self.n_edges, self.shares, self.absolute_shares, strict=True)
        rows = (f"  {k:5.1%}  {n:5d}  {float(f):6.3f}  {float(g):8.3f}" for k, n, f, g in columns)
        return "\n".join([head, "   size  edges  signed  absolute", *rows])


def share_difference(first: Faithfulness, second: Faithfulness) -> tuple[float, Interval]:
    """How much larger one circuit's share is than another's, with a paired bootstrap interval.

    Args:
        first: Result of one circuit.
        second: Result of the other circuit, on the same prompts and ablation.

    Returns:
        The first share less the second, and the 95 % interval of that difference over prompts.

    Raises:
        ValueError: If the prompts or the ablations differ.
    """
    same = zip((first.full, first.ablated), (second.full, second.ablated), strict=True)
    if not all(torch.equal(a, b) for a, b in same):
        raise ValueError(
            "first and second were not run on the same prompts and ablation. Run both with one "
            "call of faithfulness_of_many."
        )
    # Both circuits by the same draws: what prompts do to both cancels in the difference.
    both = torch.stack([first.circuit, second.circuit])
    drawn = _resampled(first.full, first.ablated, both, first.seed)
    # The interval of the difference, which is not the difference of two intervals.
    interval = _quantiles(drawn[:, 0] - drawn[:, 1], len(first.full))
    return first.share - second.share, interval


def _prompts(found: Faithfulness | FaithfulnessCurve) -> str:
    """How many prompts there are, and what was put in front of them."""
    in_front = Convention(first_token=found.first_token).in_front
    n = len(found.full)
    count = "one prompt, so no interval" if n == 1 else f"{n} prompts"
    return ", ".join(filter(None, (count, in_front)))


def _over(curve: FaithfulnessCurve) -> str:
    """What the bands of a curve are, or why there are none."""
    ends = (low for own in curve.intervals().values() for low, _ in own)
    return intervals_over(ends, len(curve.full))


# --- Shares and their intervals ------------------------------------------------------------------


def _share(full: Tensor, ablated: Tensor, circuits: Float[Tensor, "many prompt"]) -> Tensor:
    # A share of means, not a mean of shares: a single prompt's gap may be near 0.
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
    """Shares over prompts drawn with replacement; full, ablated and circuits share each draw."""
    # [times, prompt] indices on the CPU: a seed gives the same interval on every device.
    n, generator = len(full), torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (times, n), generator=generator, device="cpu")
    low = ablated[drawn].mean(-1)
    return (circuits[:, drawn].mean(-1) - low).T / (full[drawn].mean(-1) - low)[:, None]


def _quantiles(values: Float[Tensor, " times"], n: int) -> Interval:
    # A draw in which ablating everything changes nothing has no share, so there is no interval.
    if n < 2 or not bool(values.isfinite().all()):
        return math.nan, math.nan
    low, high = values.quantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def _finite(data: Any) -> Any:
    """Data for JSON, which has no nan and no infinity: both are null."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data
