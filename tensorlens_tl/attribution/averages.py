"""Attributions averaged over many prompts.

1. Prompts are captured in batches: strings padded together, ids of one length stacked.
2. Every prompt's target is resolved and split on its own, without padding.
3. The split is written to a file, if one is given, and positions are summed.
4. Means and squared deviations grow by one prompt at a time, so one batch is held at most.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import as_array, at_least_one, need, new_file, one_each, progress_bar, spelled
from ..chunks import model_mark, question_of, spread
from ..graph import Edge, Node, rows_that_fit
from ..hosts import Adapter, adapt, as_host, each_prompt, prompts_of
from ..operator import Capture, Convention, FrozenTransformer
from ..pictures import Page, Paged, Split, split_figure, table_view
from ..recording import freeze
from .html import ROWS, UNIT, left_out, legend_html, sum_html, table_html
from .splits import attribute
from .table import Attribution
from .target_gradient import TargetGradient
from .targets import TargetLike, resolve

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl mean attribution 1"
_COLUMNS = ("mean", "sem")


@spelled
@dataclass(frozen=True, eq=False)
class MeanAttribution(Paged):
    """Attributions of many prompts, averaged row by row. Positions are summed.

    Attributes:
        mean: Mean contribution of each row, in units of the target, usually logits [row].
        sem: Standard error of each mean over prompts, s / √n [row]; nan for one prompt.
        nodes: The node or edge of each row.
        by: The kind of source that the targets were split by.
        effect: "direct" or "total", as in :meth:`TensorLens.attribute`.
        n: The number of prompts.
        target_mean: The mean of the targets in the model's own runs, in logits.
        completeness_error: The largest one of all prompts; None where rows do not sum.
        convention: The choices under which the operators are unique, and what was put in front of
            the first prompt.

    Example:
        >>> from tensorlens_tl import demo, mean_attribution
        >>> pairs = demo.prompts("ioi", 4)
        >>> prompts, answers = [p.clean for p in pairs], [p.answer for p in pairs]
        >>> means = mean_attribution(demo.load_model(), prompts, answers)
        >>> [(name, round(mean, 1)) for name, mean, sem in means.top(2)]
        [('L2MLP', 5.9), ('L3MLP', 2.6)]
    """

    mean: Float[Tensor, " row"]
    sem: Float[Tensor, " row"]
    nodes: tuple[Node | Edge, ...]
    by: str
    effect: str
    n: int
    target_mean: float
    completeness_error: float | None
    convention: Convention = field(default_factory=Convention)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The means [row] for NumPy, by ``numpy.asarray(means)``."""
        return as_array(self.mean, dtype, copy)

    def select(
        self,
        src: str | Node | None = None,
        dest: str | Node | None = None,
        *,
        kind: str | None = None,
        layer: int | None = None,
    ) -> MeanAttribution:
        """Select rows: edges by their ends, any rows by the kind and layer of their node.

        Args:
            src: A writer, as in :meth:`Attribution.select`; None for every writer.
            dest: A reader, as in :meth:`Attribution.select`; None for every reader.
            kind: A kind of node, such as "head"; of an edge, the kind of its writer.
            layer: The number of a block; of an edge, the block of its writer.

        Returns:
            The rows that fit everything given. A part of the rows has no completeness error, as a
            part of them sums to no target.

        Raises:
            ValueError: If nothing fits. The message names what there is.
        """
        wanted = {"src": src, "dest": dest, "kind": kind, "layer": layer}
        keep = rows_that_fit(self.nodes, self.by, wanted)
        whole = len(keep) == len(self.nodes)
        return replace(
            self,
            mean=self.mean[keep],
            sem=self.sem[keep],
            nodes=tuple(self.nodes[i] for i in keep),
            completeness_error=self.completeness_error if whole else None,
        )

    def top(self, k: int = 10) -> list[tuple[str, float, float]]:
        """The k largest means by absolute value, without those that are exactly 0.

        Args:
            k: How many rows to give.

        Returns:
            At most k triples (name, mean, standard error), largest first.

        Raises:
            ValueError: If k is below 1.
        """
        k = at_least_one(k, "k")
        order = self.mean.abs().argsort(descending=True)[:k].tolist()
        rows = [(str(self.nodes[i]), float(self.mean[i]), float(self.sem[i])) for i in order]
        return [row for row in rows if row[1] != 0]

    def to_dataframe(self) -> pandas.DataFrame:
        """The rows as a pandas table.

        Returns:
            One row per node, with columns node, mean and sem.

        Raises:
            ValueError: If pandas is not installed.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        numbers = {name: getattr(self, name).tolist() for name in _COLUMNS}
        return pandas.DataFrame({"node": list(map(str, self.nodes)), **numbers})

    def to_json(self) -> str:
        """Write the means as JSON, with all that is needed to read them. nan becomes null."""
        rows = [
            {"node": str(n), "mean": _finite(m), "sem": _finite(s)}
            for n, m, s in zip(self.nodes, self.mean.tolist(), self.sem.tolist(), strict=True)
        ]
        names = ("by", "effect", "n", "target_mean", "completeness_error")
        data = {"format": FORMAT, "unit": UNIT} | {name: getattr(self, name) for name in names}
        data |= {"convention": asdict(self.convention)}
        return json.dumps(data | {"rows": rows}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> MeanAttribution:
        """Read means that :meth:`to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            The means, on the CPU.

        Raises:
            ValueError: If the text does not hold means.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            data.pop("unit")
            rows = data.pop("rows")
            # Files of earlier builds do not tell it.
            convention = Convention(**data.pop("convention", {}))
            names = [row["node"] for row in rows]
            numbers = [[math.nan if row[k] is None else row[k] for row in rows] for k in _COLUMNS]
            mean, sem = torch.tensor(numbers, dtype=torch.float64)
            nodes = tuple((Edge if "→" in name else Node).parse(name) for name in names)
            return cls(mean, sem, nodes, convention=convention, **data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"The text is not means as to_json writes them ({error}). Write it again."
            ) from None

    def plot(self, ax: Axes | None = None, kind: str | None = None, top: int = 20) -> Axes:
        """Draw the means with matplotlib; bars have lines of one standard error to both sides.

        Args:
            ax: Axes to draw on. None makes a figure.
            kind: A figure as in :meth:`Attribution.plot`. None takes what fits the split.
            top: Number of bars; a graph has three times as many edges.

        Returns:
            The axes drawn on.

        Raises:
            ValueError: If matplotlib is missing, or the figure does not fit the rows.
        """
        sources, names = [(node, None) for node in self.nodes], [list(map(str, self.nodes))]
        about = [self.mean.tolist()], [self._of()], [self.target_mean]
        sums = self.completeness_error is not None
        split = Split(self.by, self.effect, sources, names, *about, sums, [(0, 0)])
        return split_figure(ax, split, kind, top, errors=self.sem.tolist())

    def _of(self) -> str:
        return f"mean of {self.n} prompts" if self.n > 1 else "one prompt (no standard error)"

    def _off(self, sem: float, form: str) -> str:
        return form.format(sem) if self.n > 1 else ""

    def _page(self) -> Page:
        names = [[str(node)] for node in self.nodes]
        values = torch.stack([self.mean, self.sem], 1).cpu().numpy()
        what = f"{self._of().capitalize()} = {self.target_mean:.4g}, by {self.by} ({self.effect})"
        what = ", ".join(filter(None, (what, self.convention.in_front)))
        columns = ["mean", "standard error"][: min(self.n, 2)]
        table = table_view([self.by], columns, names, values[:, : len(columns)], sort=0)
        exact = "The rows do not sum to the target."
        if self.completeness_error is not None:
            exact = f"The rows sum to it, off by at most {self.completeness_error:.0e} of Σ|·|."
        return Page(what, [table], [exact])

    def _strip(self) -> str:
        rows = [(name + self._off(sem, " (± {:.3g})"), mean) for name, mean, sem in self.top(ROWS)]
        parts = [
            f"<div><b>{self._of()} = {self.target_mean:.4g}</b>, by {self.by} "
            f"({self.effect})</div>",
            table_html(rows, left_out(self.mean, len(rows))),
            legend_html([mean for _, mean in rows]),
            sum_html(float(self.mean.sum()), self.completeness_error),
        ]
        return "".join(parts)

    def __repr__(self) -> str:
        head = f"Attribution by {self.by}, {self._of()} = {self.target_mean:.4g}"
        head = ", ".join(filter(None, (head, self.convention.in_front)))
        rows = [f"  {m:+9.4f}{self._off(sem, ' ± {:.4f}')}  {row}" for row, m, sem in self.top(10)]
        left = left_out(self.mean, len(rows))
        return "\n".join([head, *rows, *([f"  … {left}"] if left else [])])


@spelled
def mean_attribution(
    model: Any,
    prompts: Sequence[Any],
    target: TargetLike | Sequence[TargetLike] = None,
    versus: TargetLike | Sequence[TargetLike] = None,
    pos: int = -1,
    by: str = "component",
    effect: str = "direct",
    *,
    qk: bool = False,
    of: str = "logit",
    batch_size: int = 8,
    path: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> MeanAttribution:
    """Split a target of each of many prompts, and average the splits row by row.

    The mean of a row is Σ over prompts / n. Only one batch of captures is held at a time.

    Args:
        model: The model, as for :func:`tensorlens_tl.capture`.
        prompts: Strings, or token ids [pos], one sequence per prompt; any iterable of them.
        target: One target for all prompts, a list with one for each, or None for each prompt's own
            prediction. Each is as in :meth:`TensorLens.attribute`.
        versus: What is subtracted from the target: one for all prompts, a list with one for each,
            or None.
        pos: Position of the prediction among the real tokens; −1 is the last.
        by: The kind of source to split by, as in :meth:`TensorLens.attribute`.
        effect: "direct" or "total", as in :meth:`TensorLens.attribute`.
        qk: Whether queries and keys are readers, too; only with ``by="edge"``.
        of: "logit" or "logprob", as in :meth:`TensorLens.attribute`.
        batch_size: How many prompts to capture at once. Strings are padded to one length; ids of
            unequal lengths are captured one by one.
        path: A file to which every prompt's attribution is written as one line of JSON, which
            :meth:`Attribution.from_json` reads back. None writes no file.
        resume: Folder that keeps finished chunks of 64 prompts: the same call goes on from it.
            With it, all processes that a launcher started share the work, and all return the
            result; see :doc:`/guides/many_prompts`. None keeps nothing.
        progress: Whether to show a progress bar on standard error after 2 s.
        **kwargs: Arguments of the capture (``gate``, ``dtype``) and of the model itself.

    Returns:
        Means and standard errors over the prompts, positions summed.

    Raises:
        ValueError: If there are no prompts, if a list of targets has another length than
            ``prompts``, or if ``batch_size`` is below 1.

    Example:
        >>> from tensorlens_tl import demo, mean_attribution
        >>> pairs = demo.prompts("ioi", 4)
        >>> prompts, answers = [p.clean for p in pairs], [p.answer for p in pairs]
        >>> foils = [p.foil for p in pairs]
        >>> means = mean_attribution(demo.load_model(), prompts, answers, foils, by="layer")
        >>> [(name, round(mean, 1)) for name, mean, sem in means.top(2)]
        [('L2', 6.8), ('L1', 4.2)]
    """
    with torch.no_grad():
        adapter = adapt(as_host(model, kwargs.pop("tokenizer", None)))  # once for all batches
    prompts = each_prompt(prompts, adapter.tokenizer, kwargs.pop("attention_mask", None))
    batch_size = at_least_one(batch_size, "batch_size")
    targets = one_each(target, len(prompts), "target")
    foils = one_each(versus, len(prompts), "versus")
    rows = list(zip(prompts, targets, foils, strict=True))

    def average(some: list[tuple[Any, Any, Any]], file: Any, shown: bool) -> _Means:
        means, (given, goals, others) = _Means(), zip(*some, strict=True)
        # 1. Capture.
        captures = _captures(adapter, given, batch_size, kwargs)
        bar = progress_bar("prompts", len(some), shown, iterable=captures)
        for capture, goal, foil in zip(bar, goals, others, strict=True):
            # 2. Split.
            with torch.no_grad():
                resolved = resolve(capture, goal, foil, pos, of=of)
                operator = FrozenTransformer.of(capture)
                one = attribute(TargetGradient(capture, operator, resolved), by, effect, qk)
            # 3. Write.
            if file is not None:
                file.write(one.to_json() + "\n")
            # 4. Average.
            means.add(one.sum("pos"), one.completeness_error)
        return means

    if resume is None:
        with ExitStack() as stack:
            file = None
            if path is not None:
                file = stack.enter_context(open(new_file(path), "w", encoding="utf-8"))
            means = average(rows, file, progress)
    else:
        if path is not None:
            raise ValueError("path= is written by one call without resume=. Drop one of them.")
        about = (adapter.name, pos, by, effect, qk, of, batch_size, sorted(kwargs.items()))
        means = _Means()
        for chunk in spread(
            resume,
            question_of((model_mark(adapter.weights), about), rows),
            len(rows),
            lambda start, stop: average(rows[start:stop], None, False).tensors(),
            progress,
        ):
            means.join(_Means.of(chunk))
    return MeanAttribution(
        *(means.mean, means.sem, means.nodes),
        by,
        effect,
        means.n,
        means.target / means.n,
        None if math.isnan(means.worst) else means.worst,
        means.convention,
    )


class _Means:
    """Mean and standard error of each row, updated by one prompt at a time, or by a chunk of them.

    This is Welford's update: one pass, and no cancellation of large sums of squares. Two chunks are
    joined by Chan's rule.
    """

    def __init__(self):
        self.n, self.target, self.worst = 0, 0.0, 0.0
        self.mean, self.squares = torch.zeros(()), torch.zeros(())
        self.nodes: tuple[Node | Edge, ...] = ()
        self.convention = Convention()  # the first prompt's

    def add(self, one: Attribution, error: float | None) -> None:
        """Take in one prompt, positions summed."""
        values = one.values[0].double()
        step = values - self.mean
        self.convention = self.convention if self.n else one.convention
        self.n += 1
        self.mean = self.mean + step / self.n
        self.squares = self.squares + step * (values - self.mean)
        self.target += float(one.target_value[0])
        self.worst = _larger(self.worst, math.nan if error is None else error)
        self.nodes = tuple(source.node for source in one.sources)

    def join(self, other: _Means) -> None:
        """Take in a chunk."""
        if not self.n:
            self.__dict__ |= other.__dict__
            return
        step, n = other.mean - self.mean, self.n + other.n
        self.mean = self.mean + step * (other.n / n)
        self.squares = self.squares + other.squares + step * step * (self.n * other.n / n)
        self.n, self.target = n, self.target + other.target
        self.worst = _larger(self.worst, other.worst)

    def tensors(self) -> dict[str, Tensor]:
        """All as tensors, for a file."""
        names = "\n".join(map(str, self.nodes)).encode()
        numbers = torch.tensor([self.n, self.target, self.worst], dtype=torch.float64)
        own = json.dumps(asdict(self.convention)).encode()
        nodes, convention = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (names, own)
        )
        found = {"mean": self.mean, "squares": self.squares, "numbers": numbers}
        return found | {"nodes": nodes, "convention": convention}

    @classmethod
    def of(cls, found: dict[str, Tensor]) -> _Means:
        """Read what :meth:`tensors` gave."""
        means = cls()
        n, means.target, means.worst = found["numbers"].tolist()
        means.n, means.mean, means.squares = int(n), found["mean"], found["squares"]
        means.convention = Convention(**json.loads(bytes(found["convention"].tolist())))
        names = bytes(found["nodes"].tolist()).decode().split("\n")
        means.nodes = tuple((Edge if "→" in name else Node).parse(name) for name in names)
        return means

    @property
    def sem(self) -> Float[Tensor, " row"]:
        if self.n == 1:
            return torch.full_like(self.squares, math.nan)
        return (self.squares / (self.n - 1) / self.n).sqrt()


def _larger(a: float, b: float) -> float:
    """The larger one; nan if one of them is."""
    return a if math.isnan(a) or a > b else b


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _captures(
    adapter: Adapter, prompts: Sequence[Any], size: int, kwargs: dict[str, Any]
) -> Iterator[Capture]:
    """One capture per prompt. Strings run together, and so do ids of one length."""
    for start in range(0, len(prompts), size):
        batch = list(prompts[start : start + size])
        texts = [isinstance(prompt, str) for prompt in batch]
        together = all(texts) or (not any(texts) and len(set(map(len, batch))) == 1)
        for part in [batch] if together else [[prompt] for prompt in batch]:
            text = isinstance(part[0], str)
            with torch.no_grad():
                given = part if text else prompts_of(adapter, torch.stack(part))
                captured = freeze(adapter, given, **kwargs)[1]
            yield from map(captured.prompt, range(captured.frame.batch))
