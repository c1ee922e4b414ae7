"""The result of a split: a table of contributions that prints, sorts, sums and saves itself.

A row is a source: a node or an edge, with or without a position. A column of ``values`` holds what
that source adds to the target, one number per prompt.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, astuple, dataclass, fields, replace
from html import escape
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import at_least_one, need
from ..graph import Edge, Node
from ..operator import Convention
from ..sublayers import TINY
from .html import grid_html, strip_html, table_html

if TYPE_CHECKING:
    import pandas

FORMAT = "tensorlens_tl attribution 2"

AXES = ("pos", "node", "layer", "src", "dest")
"""What :meth:`Attribution.sum` can sum over."""


@dataclass(frozen=True)
class Source:
    """What one row of an attribution stands for.

    Attributes:
        node: The node or edge that contributes.
        pos: The position, as a tensor index that counts padding; None where positions are summed.
    """

    node: Node | Edge
    pos: int | None = None


@dataclass(frozen=True, eq=False)
class Attribution:
    """A target split by source, one row per source, for every prompt of the batch.

    Attributes:
        values: Contributions in units of the target, usually logits [prompt, source].
        sources: What the rows stand for. Positions outside a prompt's real tokens contribute 0.
        labels: The names of the rows, one tuple per prompt.
        by: The kind of source that the target was split by, such as "token".
        target: The target's name, one per prompt.
        target_value: The target in the model's own run, in logits [prompt].
        sums_to_target: Whether the contributions add up to the target.
        convention: The choices under which the operator is unique.
        spans: The real tokens of each prompt, as (start, stop).
        effect: "direct" for what the logits read at once, "total" for influence along all paths.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> found = lens.attribute("Paris", by="component")
        >>> [(label, round(value, 1)) for label, value in found.top(2)]
        [('L3MLP', 10.9), ('L2MLP', 2.8)]
        >>> found.sums_to_target, found.completeness_error < 1e-5
        (True, True)
    """

    values: Float[Tensor, "prompt source"]
    sources: tuple[Source, ...]
    labels: tuple[tuple[str, ...], ...]
    by: str
    target: tuple[str, ...]
    target_value: Float[Tensor, " prompt"]
    sums_to_target: bool
    convention: Convention
    spans: tuple[tuple[int, int], ...]
    effect: str = "direct"

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, prompt: int) -> Attribution:
        """Take one prompt's attribution, without its padding."""
        if not -len(self) <= prompt < len(self):
            raise IndexError(f"There is no prompt {prompt}. The number of prompts is {len(self)}.")
        prompt %= len(self)
        start, stop = self.spans[prompt]
        keep = [i for i, s in enumerate(self.sources) if s.pos is None or start <= s.pos < stop]
        one = slice(prompt, prompt + 1)
        return replace(
            self,
            values=self.values[one, keep],
            sources=tuple(self.sources[i] for i in keep),
            labels=(tuple(self.labels[prompt][i] for i in keep),),
            target=self.target[one],
            target_value=self.target_value[one],
            spans=self.spans[one],
        )

    @property
    def completeness_error(self) -> float | None:
        """How far the sum is off: max over prompts of |Σ − target| / Σ|contributions|.

        It is None where the contributions do not sum to the target.
        """
        if not self.sums_to_target:
            return None
        off = (self.values.double().sum(1) - self.target_value).abs()
        size = self.values.double().abs().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        return float((off / size).max())

    def sum(self, axis: str) -> Attribution:
        """Sum rows along an axis. Rows that do not have the axis stay as they are.

        Args:
            axis: What to sum over. "pos" leaves one row per node. "node" leaves one row per
                position. "layer" sums the nodes of each layer. "src" and "dest" are for a split by
                edge: "src" sums over the writers into each reader, "dest" over the readers of each
                writer.

        Returns:
            The shorter table, in order of first appearance.

        Raises:
            ValueError: If there is no such axis.
        """
        if axis not in AXES:
            raise ValueError(f"There is no axis {axis!r}. Use one of {', '.join(AXES)}.")
        groups: dict[Source, int] = {}
        column = [groups.setdefault(_merged(s, axis), len(groups)) for s in self.sources]
        zeros = self.values.new_zeros(len(self), len(groups))
        index = torch.tensor(column, device=self.values.device)
        first: dict[int, int] = {}
        for i, group in enumerate(column):
            first.setdefault(group, i)
        labels = tuple(
            tuple(
                own[i] if group in (self.sources[i], _at(self.sources[i])) else _name(group, start)
                for i, group in zip(first.values(), groups, strict=True)
            )
            for own, (start, _) in zip(self.labels, self.spans, strict=True)
        )
        values = zeros.index_add(1, index, self.values)
        return replace(self, values=values, sources=tuple(groups), labels=labels)

    def select(self, src: str | Node | None = None, dest: str | Node | None = None) -> Attribution:
        """Select edges of a split by edge: out of a writer, into a reader, or both.

        Args:
            src: A writer, such as "L0H3"; None for every writer.
            dest: A reader, such as "L2H1.v"; None for every reader. All edges into one reader sum
                to the reader's total effect, and all edges into "logits" sum to the target.

        Returns:
            The rows of the selected edges.

        Raises:
            ValueError: If this is no split by edge, or if there is no such writer or reader. The
                message names those that there are.
        """
        edges = [source.node for source in self.sources if isinstance(source.node, Edge)]
        if not edges:
            raise ValueError(
                f"select needs a split by edge, but this one is by {self.by}. Call "
                "attribute(by='edge')."
            )
        keep = range(len(self.sources))
        for end, wanted in (("src", src), ("dest", dest)):
            if wanted is None:
                continue
            node = Node.parse(wanted) if isinstance(wanted, str) else wanted
            there = dict.fromkeys(str(getattr(edge, end)) for edge in edges)
            if str(node) not in there:
                raise ValueError(f"No edge has {end} {node}. Use one of {', '.join(there)}.")
            keep = [i for i in keep if getattr(self.sources[i].node, end, None) == node]
        return replace(
            self,
            values=self.values[:, list(keep)],
            sources=tuple(self.sources[i] for i in keep),
            labels=tuple(tuple(own[i] for i in keep) for own in self.labels),
            sums_to_target=src is None and dest is not None and str(dest) == "logits",
        )

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k largest contributions by absolute value.

        Args:
            k: How many rows to give.

        Returns:
            At most k pairs (label, value), largest first, in units of the target.

        Raises:
            ValueError: If k is below 1 or there are several prompts.
        """
        if len(self) != 1:
            raise ValueError(
                f"top needs one prompt, but there are {len(self)}. Take one with attribution[i]."
            )
        k = at_least_one(k, "k")
        order = self.values[0].abs().argsort(descending=True)[:k].tolist()
        return [(self.labels[0][i], float(self.values[0, i])) for i in order]

    def to_dataframe(self) -> pandas.DataFrame:
        """The rows as a pandas table.

        Returns:
            One row per prompt and source, with columns prompt, label, node, pos and value. Here
            pos counts real tokens only.

        Raises:
            ValueError: If pandas is not installed.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        rows = []
        for prompt, (start, stop) in enumerate(self.spans):
            for i, source in enumerate(self.sources):
                if source.pos is None or start <= source.pos < stop:
                    pos = None if source.pos is None else source.pos - start
                    value = float(self.values[prompt, i])
                    label = self.labels[prompt][i]
                    rows.append((prompt, label, str(source.node), pos, value))
        return pandas.DataFrame(rows, columns=["prompt", "label", "node", "pos", "value"])

    def to_json(self) -> str:
        """Write the attribution as JSON. :meth:`from_json` gives the same numbers back."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {"format": FORMAT, "dtype": str(self.values.dtype).removeprefix("torch.")}
        data["values"] = [[_number(x) for x in row] for row in self.values.tolist()]
        data["target_value"] = [_number(x) for x in self.target_value.tolist()]
        data["sources"] = [(astuple(source.node), source.pos) for source in self.sources]
        return json.dumps(data | {"convention": asdict(self.convention)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Attribution:
        """Read an attribution that :meth:`to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            The attribution, on the CPU.

        Raises:
            ValueError: If the text is not a whole attribution.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            dtype = {"float32": torch.float32, "float64": torch.float64}[data.pop("dtype")]
            for name in ("values", "target_value"):
                data[name] = _tensor(data[name], dtype)
            data["sources"] = tuple(Source(_node(node), pos) for node, pos in data["sources"])
            for name in ("labels", "spans"):
                data[name] = tuple(map(tuple, data[name]))
            data |= {
                "target": tuple(data["target"]),
                "convention": Convention(**data["convention"]),
            }
            found = cls(**data)
            shape = len(found.target), len(found.sources)
            widths = {len(found.sources), *map(len, found.labels)}
            heights = {
                len(found.target),
                len(found.labels),
                len(found.spans),
                len(found.target_value),
            }
            if found.values.shape != shape or len(widths) != 1 or len(heights) != 1:
                raise ValueError(f"values, sources, labels and target do not fit {list(shape)}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"The text is not an attribution as to_json writes it ({error}). Write it again."
            ) from None
        return found

    def _repr_html_(self) -> str:
        """For notebooks: tokens as a heat strip, heads as a grid, anything else as a table."""
        parts = []
        for i in range(min(3, len(self))):
            one = self[i]
            value = f"{escape(one.target[0])} = {float(one.target_value[0]):.4g}"
            parts += [f"<div><b>{value}</b>, by {self.by} ({self.effect})</div>", one._picture()]
        more = len(self) - 3
        return "".join(parts) + (f"<div>… {more} more prompts</div>" if more > 0 else "")

    def _picture(self) -> str:
        if self.by == "token":
            of_tokens = self.sum("node")
            columns = of_tokens.sources, of_tokens.labels[0], of_tokens.values[0].tolist()
            pairs = list(zip(*columns, strict=True))
            shown = [(label, value) for source, label, value in pairs if source.pos is not None]
            tokens = [label.rpartition("@")[0].strip('"') or label for label, _ in shown]
            beside = [(s.node, v) for s, _, v in pairs if s.pos is None]
            return strip_html(tokens, [value for _, value in shown]) + _beside(beside, "constants")
        heads = self.sum("pos")
        pairs = [(s.node, float(heads.values[0, i])) for i, s in enumerate(heads.sources)]
        at = {(node.layer, node.index): value for node, value in pairs if _is_head(node)}
        if self.by in ("head", "loading") and at:
            layers, width = (1 + max(key[axis] or 0 for key in at) for axis in (0, 1))
            grid = grid_html([[at.get((a, h), 0.0) for h in range(width)] for a in range(layers)])
            beside = [(node, value) for node, value in pairs if not _is_head(node)]
            return grid + _beside(beside if self.sums_to_target else [], "other components")
        return table_html(self.top(20))

    def __repr__(self) -> str:
        effect = " (total effect)" if self.effect == "total" else ""
        head = f"Attribution by {self.by}{effect} of {', '.join(self.target[:3])}"
        if len(self) > 1:
            dots = ", …" if len(self) > 3 else ""
            return f"{head}{dots}: {len(self)} prompts × {len(self.sources)} rows"
        values, size = self.values[0], self.values[0].abs().sum().clamp_min(TINY)
        error = self.completeness_error
        nothing = error is None or not bool(values.any())  # 0/0 tells nothing
        exact = "" if nothing else f" (sum off by {error:.0e} of Σ|·|)"
        shown = [(label, value) for label, value in self.top(10) if value != 0]
        lines = [f"{head} = {float(self.target_value[0]):.4g}{exact}"]
        lines += [f"  {value:+9.4f}  {label}" for label, value in shown]
        zeros = int((values == 0).sum())
        counts = {"more": len(self.sources) - len(shown) - zeros, "exactly 0": zeros}
        left = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        lines += [f"  … {left}"] if left else []
        for source, value in zip(self.sources, values.tolist(), strict=True):
            if _is_change(source.node):  # always shown: it qualifies all other rows
                lines.append(
                    f"  {source.node}: {value:+.4f}, {float(abs(value) / size):.0%} of Σ|·|"
                )
        return "\n".join(lines)


def _is_head(node: Node | Edge) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.kind == "head"


def _is_change(node: Node | Edge) -> bool:
    return isinstance(node, Node) and node.kind == "change"


def _beside(rows: list[tuple[Node | Edge, float]], name: str) -> str:
    """What a picture of positions or heads has no place for: changes apart, the rest summed."""
    changes = [(str(node), value) for node, value in rows if _is_change(node)]
    rest = [value for node, value in rows if not _is_change(node)]
    sums = ([(name, math.fsum(rest))] if rest else []) + changes
    return f"<div>{' · '.join(f'{escape(n)} {v:+.4g}' for n, v in sums)}</div>" if sums else ""


def _number(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)  # JSON has no nan


def _tensor(rows: Any, dtype: torch.dtype) -> Tensor:
    nested = bool(rows) and isinstance(rows[0], list)
    numbers = [[float(x) for x in row] for row in rows] if nested else [float(x) for x in rows]
    return torch.tensor(numbers, dtype=torch.float64).to(dtype)


def _node(parts: list[Any]) -> Node | Edge:
    return Edge(*(Node(*node) for node in parts)) if isinstance(parts[0], list) else Node(*parts)


def _merged(source: Source, axis: str) -> Source:
    """The row that a source is summed into."""
    node, pos = source.node, source.pos
    if axis == "pos":
        return Source(node)
    if isinstance(node, Edge):
        ends = {"src": node.dest, "dest": node.src}
        return Source(ends[axis], pos) if axis in ends else source
    if axis == "layer" and node.layer is not None:
        return Source(Node("layer", node.layer), pos)
    return Source(Node("pos"), pos) if axis == "node" and pos is not None else source


def _at(source: Source) -> Source | None:
    # A position is called by its token: '"Mary"@2'.
    embedded = isinstance(source.node, Node) and source.node.kind == "embed"
    return Source(Node("pos"), source.pos) if embedded else None


def _name(source: Source, start: int) -> str:
    return str(source.node) if source.pos is None else f"{source.node}@{source.pos - start}"
