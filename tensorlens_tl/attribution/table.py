"""The result of a split: a table of contributions that prints, sorts, sums and saves itself.

A row is a source: a node or an edge, with or without a position. A column of ``values`` holds what
that source adds to the target, one number per prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import as_array, at_least_one, pick_prompts, spelled
from ..graph import SOURCES, Edge, Node, rows_that_fit
from ..operator import Convention
from ..pictures import Page, PagedPatches, Tabled, split_figure
from .html import UNIT, as_split, attribution_html, attribution_page, changes, left_out, patch_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl attribution 2"

AXES = ("pos", "node", "layer", "src", "dest")
"""What :meth:`Attribution.sum` can sum over."""

_ADDED = {"pos_embed": "position", "type_embed": "type"}  # to a token's embedding


@dataclass(frozen=True)
class Source:
    """What one row of an attribution stands for.

    Attributes:
        node: The node or edge that contributes.
        pos: The position, as a tensor index that counts padding; None where positions are summed.
    """

    node: Node | Edge
    pos: int | None = None


@spelled
@dataclass(frozen=True, eq=False)
class Attribution(PagedPatches, Tabled):
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

    def __getitem__(self, prompt: int | slice) -> Attribution:
        """Take one prompt's attribution, or a slice of prompts, without padding around them."""
        rows = ".top, .select or .to_dataframe"
        chosen = list(pick_prompts(prompt, len(self), "attribution", rows))
        spans = tuple(self.spans[i] for i in chosen)
        start, stop = min(span[0] for span in spans), max(span[1] for span in spans)
        keep = [i for i, s in enumerate(self.sources) if s.pos is None or start <= s.pos < stop]
        return replace(
            self,
            values=self.values[chosen][:, keep],
            sources=tuple(self.sources[i] for i in keep),
            labels=tuple(tuple(self.labels[prompt][i] for i in keep) for prompt in chosen),
            target=tuple(self.target[i] for i in chosen),
            target_value=self.target_value[chosen],
            spans=spans,
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The values [prompt, source] for NumPy, by ``numpy.asarray(attribution)``."""
        return as_array(self.values, dtype, copy)

    def __sub__(self, other: Attribution) -> Attribution:
        """Subtract another attribution, row by row: of another target, run or prompt.

        Args:
            other: What is subtracted. Rows match by node and by position among the real tokens.

        Returns:
            The differences. They sum to the difference of the targets, where both sum to theirs.

        Raises:
            ValueError: If the two are of different kinds, or if their rows do not match.
        """
        return _difference(self, other) if isinstance(other, Attribution) else NotImplemented

    @property
    def completeness_error(self) -> float | None:
        """How far the sum is off: max over prompts of |Σ − target| / Σ|contributions|.

        It is None where the contributions do not sum to the target.
        """
        if not self.sums_to_target:
            return None
        off = (self.values.double().sum(1) - self.target_value).abs()
        size = self.values.double().abs().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        return float((off / size).max().detach())

    def grid(self) -> Float[Tensor, "prompt row column"]:
        """The shares of a picture's patches as a map: of the patch and of its position together.

        Returns:
            The map of every prompt. Rows at no patch, such as [CLS] and constants, are left out.

        Raises:
            ValueError: If no row is a patch, or a prompt has several pictures.
        """
        places = [source.pos for source in self.sources]
        pairs = zip(self.labels, self.values, strict=True)
        return torch.stack([patch_map(names, places, shares) for names, shares in pairs])

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
        if axis == "pos" and all(source.pos is None for source in self.sources):
            return self
        groups: dict[Source, list[int]] = {}
        for i, source in enumerate(self.sources):
            groups.setdefault(_merged(source, axis), []).append(i)
        at = {i: group for group, rows in enumerate(groups.values()) for i in rows}
        column = torch.tensor([at[i] for i in range(len(at))], device=self.values.device)
        labels = tuple(
            tuple(self._sum_label(group, rows, prompt) for group, rows in groups.items())
            for prompt in range(len(self))
        )
        values = self.values.new_zeros(len(self), len(groups)).index_add(1, column, self.values)
        return replace(self, values=values, sources=tuple(groups), labels=labels)

    def _sum_label(self, group: Source, rows: list[int], prompt: int) -> str:
        """A name for a sum of rows that no single row has."""
        label = self.labels[prompt][rows[0]]
        if group == self.sources[rows[0]] or (label == "padding" and group.pos is not None):
            return label
        at = "" if group.pos is None else f"@{group.pos - self.spans[prompt][0]}"
        if group.node != Node("pos"):
            return f"{group.node}{at}"
        if len(rows) == 1:
            return label
        kinds = {getattr(self.sources[i].node, "kind", "edge") for i in rows}
        if len(kinds) > 1 and kinds <= {*SOURCES, "constant"}:
            return " + ".join([label, *(name for kind, name in _ADDED.items() if kind in kinds)])
        if " ← " in label:  # heads by the position that they read
            return f"heads ← {label.partition(' ← ')[2]}"
        return f"{kinds.pop()}s{at}" if len(kinds) == 1 else f"all at {label}"

    def select(
        self,
        src: str | Node | None = None,
        dest: str | Node | None = None,
        *,
        kind: str | None = None,
        layer: int | None = None,
    ) -> Attribution:
        """Select rows: edges by their ends, any rows by the kind and layer of their node.

        Args:
            src: A writer, such as "L0H3", in a split by edge; None for every writer.
            dest: A reader, such as "L2H1.v", in a split by edge; None for every reader. All edges
                into one reader sum to the reader's total effect, and all edges into "logits" sum to
                the target.
            kind: A kind of node, such as "neuron" or "head"; of an edge, the kind of its writer.
            layer: The number of a block; of an edge, the block of its writer.

        Returns:
            The rows that fit everything given.

        Raises:
            ValueError: If nothing fits. The message names what there is.
        """
        wanted = {"src": src, "dest": dest, "kind": kind, "layer": layer}
        keep = rows_that_fit([source.node for source in self.sources], self.by, wanted)
        to_logits = str(dest) == "logits" and src is kind is layer is None
        return replace(
            self,
            values=self.values[:, keep],
            sources=tuple(self.sources[i] for i in keep),
            labels=tuple(tuple(own[i] for i in keep) for own in self.labels),
            sums_to_target=to_logits or (self.sums_to_target and len(keep) == len(self.sources)),
        )

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k largest contributions by absolute value, without those that are exactly 0.

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
        values = self.values[0].tolist()
        return [(self.labels[0][i], values[i]) for i in order if values[i] != 0]

    _COLUMNS = ("prompt", "label", "node", "pos", "value")

    def _rows(self) -> Iterator[tuple[int, str, str, int | None, float]]:
        for prompt, (start, stop) in enumerate(self.spans):
            for i, source in enumerate(self.sources):
                if source.pos is None or start <= source.pos < stop:  # a real token's
                    pos = None if source.pos is None else source.pos - start
                    value = float(self.values[prompt, i])
                    yield prompt, self.labels[prompt][i], str(source.node), pos, value

    def to_json(self) -> str:
        """Write the attribution as JSON. :meth:`from_json` gives the same numbers back."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        error = self.completeness_error
        data |= {"unit": UNIT, "completeness_error": None if error is None else _number(error)}
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
            for name in ("unit", "completeness_error"):  # they follow from the rest
                data.pop(name, None)
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

    def plot(
        self, ax: Axes | None = None, kind: str | None = None, top: int = 20, image: Any = None
    ) -> Axes:
        """Draw the contributions with matplotlib.

        Args:
            ax: Axes to draw on. None makes a figure.
            kind: "tokens" in the order of the prompt, "heads" (layer × head), "map" (node ×
                position), "waterfall" along the run, "graph" of edges, "patches" or "bars" of the
                largest rows. None takes what fits the split.
            top: Number of bars; a graph has three times as many edges.
            image: The picture that patches are of, to lie under their map.

        Returns:
            The axes. A picture, a map, a waterfall and a graph are of one prompt.

        Raises:
            ValueError: If matplotlib is missing, or the figure does not fit the rows.
        """
        split = as_split(self)
        return split_figure(ax, split, kind, top, grid=lambda: self.grid()[0].tolist(), image=image)

    def _page(self) -> Page:
        return attribution_page(self)

    def _strip(self) -> str:
        return attribution_html(self)

    def __repr__(self) -> str:
        effect = " (total effect)" if self.effect == "total" else ""
        head = f"Attribution by {self.by}{effect} of {', '.join(self.target[:3])}"
        if len(self) > 1:
            dots = ", …" if len(self) > 3 else ""
            size = f"{len(self)} prompts × {len(self.sources)} rows"
            return ", ".join(filter(None, (f"{head}{dots}: {size}", self.convention.in_front)))
        rows = self.top(10)
        nothing = self.completeness_error is None or not rows  # 0/0 tells nothing
        about = [] if nothing else [f"sum off by {self.completeness_error:.0e} of Σ|·|"]
        about += [self.convention.in_front] if self.convention.in_front else []
        exact = f" ({', '.join(about)})" if about else ""
        lines = [f"{head} = {self.target_value[0].item():.4g}{exact}"]
        lines += [f"  {value:+9.4f}  {label}" for label, value in rows]
        left = left_out(self.values[0], len(rows))
        lines += [f"  … {left}"] if left else []
        return "\n".join(lines + [f"  {line}" for line in changes(self)])


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


def _difference(a: Attribution, b: Attribution) -> Attribution:
    for name in ("by", "effect", "convention"):
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            raise ValueError(f"One has {name}={ours}, the other {theirs}. Make both alike.")
    if (a.sources, a.spans) != (b.sources, b.spans):
        if len(a) != 1 or len(b) != 1:
            raise ValueError("The two batches have different rows. Take one prompt of each.")
        a, b = a[0], b[0]
        ours, theirs = _places(a), _places(b)
        if alone := ours.keys() ^ theirs.keys():
            place = next(place for place in (*ours, *theirs) if place in alone)
            label = a.labels[0][ours[place]] if place in ours else b.labels[0][theirs[place]]
            raise ValueError(
                f"Only one of the attributions has the row {label}. Take prompts of one length, or "
                "sum positions first, with .sum('pos')."
            )
        order = [theirs[place] for place in ours]
        b = replace(b, values=b.values[:, order], labels=(tuple(b.labels[0][i] for i in order),))
    pairs = zip(a.labels, b.labels, strict=True)
    return replace(
        a,
        values=a.values - b.values,
        labels=tuple(
            tuple(x if x == y else f"{x} − {y}" for x, y in zip(*pair, strict=True))
            for pair in pairs
        ),
        target=tuple(
            f"change of {x}" if x == y else f"{x} − {y}"
            for x, y in zip(a.target, b.target, strict=True)
        ),
        target_value=a.target_value - b.target_value,
        sums_to_target=a.sums_to_target and b.sums_to_target,
    )


def _places(one: Attribution) -> dict[Source, int]:
    """The column of every row of one prompt, by node and position among the real tokens."""
    start = one.spans[0][0]
    return {
        Source(s.node, None if s.pos is None else s.pos - start): i
        for i, s in enumerate(one.sources)
    }
