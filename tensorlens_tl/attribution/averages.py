"""Attributions over many prompts: captured in batches, averaged as they come, streamed to disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import at_least_one, need, one_each
from ..graph import Edge, Node
from ..hosts import each_prompt, freeze, hosted
from ..operator import Capture, FrozenTransformer
from .html import table_html
from .splits import attribute
from .table import Attribution
from .target_gradient import TargetGradient
from .targets import TargetLike, resolve

if TYPE_CHECKING:
    import pandas


FORMAT = "tensorlens_tl mean attribution 1"


@dataclass(frozen=True, eq=False)
class MeanAttribution:
    """Attributions of many prompts, averaged row by row.

    Attributes:
        mean: Mean contribution [row].
        sem: Its standard error over prompts, s / √n [row]; nan for one prompt.
        nodes: What the rows are; positions are summed.
        by: What the targets were split by.
        effect: "direct" or "total".
        n: How many prompts.
        target_mean: The targets' mean value.
        completeness_error: The largest of all prompts, or None where rows do not sum.
    """

    mean: Float[Tensor, " row"]
    sem: Float[Tensor, " row"]
    nodes: tuple[Node | Edge, ...]
    by: str
    effect: str
    n: int
    target_mean: float
    completeness_error: float | None

    def top(self, k: int = 10) -> list[tuple[str, float, float]]:
        """The k largest means by absolute value, as (name, mean, standard error).

        Returns:
            At most k triples, largest first.

        Raises:
            ValueError: If k < 1.
        """
        k = at_least_one(k, "k")
        order = self.mean.abs().argsort(descending=True)[:k].tolist()
        return [(str(self.nodes[i]), float(self.mean[i]), float(self.sem[i])) for i in order]

    def to_dataframe(self) -> pandas.DataFrame:
        """The rows as a table: node, mean, sem.

        Returns:
            One row per node.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        columns = {
            "node": list(map(str, self.nodes)),
            "mean": self.mean.tolist(),
            "sem": self.sem.tolist(),
        }
        return pandas.DataFrame(columns)

    def to_json(self) -> str:
        """The means as JSON, with all that is needed to read them; nan is null."""
        rows = [
            {"node": str(n), "mean": _finite(m), "sem": _finite(s)}
            for n, m, s in zip(self.nodes, self.mean.tolist(), self.sem.tolist(), strict=True)
        ]
        names = ("by", "effect", "n", "target_mean", "completeness_error")
        data = {"format": FORMAT} | {name: getattr(self, name) for name in names}
        return json.dumps(data | {"rows": rows}, ensure_ascii=False)

    def _repr_html_(self) -> str:
        head = f"<div><b>by {self.by} ({self.effect}), mean of {self.n} prompts</b></div>"
        rows = [(f"{name} (± {sem:.3g})", mean) for name, mean, sem in self.top(20)]
        return head + table_html(rows)

    def __repr__(self) -> str:
        head = f"Attribution by {self.by}, mean of {self.n} prompts = {self.target_mean:.4g}"
        rows = (f"  {mean:+9.4f} ± {sem:.4f}  {name}" for name, mean, sem in self.top(10))
        more = len(self.nodes) - 10
        return "\n".join([head, *rows, *([f"  … {more} more"] if more > 0 else [])])


def mean_attribution(
    model: Any,
    prompts: Sequence[Any],
    targets: TargetLike | Sequence[TargetLike] = None,
    versus: TargetLike | Sequence[TargetLike] = None,
    pos: int = -1,
    by: str = "component",
    effect: str = "direct",
    *,
    qk: bool = False,
    batch_size: int = 8,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> MeanAttribution:
    """Split one target of each of many prompts, and average: Σ over prompts / n, row by row.

    Only one batch of captures is held at a time.

    Args:
        model: As for :func:`tensorlens_tl.capture`.
        prompts: Strings, or token ids [pos], one sequence per prompt.
        targets: A target for all, a list with one for each prompt, or None for each prompt's own
            prediction.
        versus: Subtracted from the target; for all, one for each prompt, or None.
        pos: Position of the prediction among the real tokens.
        by: As in :meth:`TensorLens.attribute`.
        effect: As in :meth:`TensorLens.attribute`.
        qk: As in :meth:`TensorLens.attribute`.
        batch_size: Prompts captured at once; strings are padded, ids are captured one by one where
            their lengths differ.
        path: A file to which every prompt's attribution is written as one line of JSON
            (:meth:`Attribution.from_json` reads a line back).
        progress: Whether to count prompts on standard error.
        **kwargs: For the capture: ``gate``, ``dtype``, the model's own arguments.

    Returns:
        Means and standard errors over the prompts, positions summed.

    Raises:
        ValueError: If there are no prompts, not as many targets as prompts, or a batch size below 1.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"expected a list of prompts, got {prompts!r}: put a single one in a list")
    masked = "attention_mask" in kwargs
    prompts = each_prompt(prompts, getattr(model, "tokenizer", None), masked)
    batch_size = at_least_one(batch_size, "batch_size")
    goals = one_each(targets, len(prompts), "targets"), one_each(versus, len(prompts), "versus")
    total, squares, sums, n, worst = None, None, 0.0, 0, None
    found: Attribution | None = None
    with open(os.devnull if path is None else Path(path), "w", encoding="utf-8") as file:
        captures = _captures(model, prompts, batch_size, kwargs)
        for captured in tqdm(captures, "prompts", len(prompts), disable=not progress):
            with torch.no_grad():
                goal = resolve(captured, goals[0][n], goals[1][n], pos)
                operator = FrozenTransformer.of(captured)
                one = attribute(TargetGradient(captured, operator, goal), by, effect, qk)
            if path is not None:
                file.write(one.to_json() + "\n")
            error = one.completeness_error
            worst = error if worst is None or error is None else max(worst, error)
            one, n = one.sum("pos"), n + 1
            sums, found = sums + float(one.target_value[0]), one
            values = one.values[0].double()
            # Welford: means and squared deviations in one pass, without cancellation.
            total = torch.zeros_like(values) if total is None else total
            squares = torch.zeros_like(values) if squares is None else squares
            step = values - total
            total = total + step / n
            squares = squares + step * (values - total)
    if found is None or total is None or squares is None:
        raise ValueError("expected at least one prompt, got none")
    sem = (squares / (n - 1) / n).sqrt() if n > 1 else torch.full_like(squares, math.nan)
    nodes = tuple(source.node for source in found.sources)
    return MeanAttribution(total, sem, nodes, by, effect, n, sums / n, worst)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _captures(
    model: Any, prompts: Sequence[Any], size: int, kwargs: dict[str, Any]
) -> Iterator[Capture]:
    """One capture per prompt; prompts that can be are run together."""
    model = hosted(model, kwargs.pop("tokenizer", None))
    for start in range(0, len(prompts), size):
        batch = list(prompts[start : start + size])
        text = all(isinstance(prompt, str) for prompt in batch)
        if text or len({len(prompt) for prompt in batch}) == 1:
            ids = batch if text else torch.stack([torch.as_tensor(prompt) for prompt in batch])
            with torch.no_grad():
                captured = freeze(model, ids, **kwargs)[1]
            yield from map(captured.prompt, range(captured.frame.batch))
        else:
            for prompt in batch:
                with torch.no_grad():
                    yield freeze(model, prompt, **kwargs)[1]
