"""Paths as a user gets them: a signed summand of the target each, largest first."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ..attribution import UNIT
from ..checks import is_int, need, spelled
from ..graph import Node
from ..operator import Convention
from ..pictures import Page, Paged, flow_view, path_rows, table_view, unit_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl paths 1"


@dataclass(frozen=True, repr=False)
class Path:
    """One path to the target, and what it contributes: a signed summand, never a share.

    Attributes:
        start: The source: one of the embeddings, such as "embed", or a constant.
        pos: The source's position among the real tokens; None for a constant summed over positions.
        nodes: The heads and MLPs that the path passes, in the order of the run.
        positions: The position at which each node writes, among the real tokens; None where
            positions inside are summed.
        contribution: The summand, in units of the target, usually logits.
        label: What people call the source, such as ``"Mary"@3``.
    """

    start: Node
    pos: int | None
    nodes: tuple[Node, ...]
    positions: tuple[int, ...] | None
    contribution: float
    label: str

    @property
    def name(self) -> str:
        """The path in words, without its number, such as ``"Mary"@3 → L2H1 → L3MLP → logits``."""
        return " → ".join((self.label, *self.stops, "logits"))

    @property
    def stops(self) -> tuple[str, ...]:
        """The names of the nodes passed, with positions where these are apart."""
        at = self.positions or [None] * len(self.nodes)
        pairs = zip(self.nodes, at, strict=True)
        return tuple(str(node) if p is None else f"{node}@{p}" for node, p in pairs)

    def __repr__(self) -> str:
        return f"{self.name}  {self.contribution:+.4g}"


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class Paths(Paged, Sequence[Path]):
    """The largest paths to a target, largest |contribution| first.

    Signed paths cancel. The sum over *all* paths is the target, but no path, and no sum of a few,
    is a share of the target.

    Attributes:
        paths: The paths found. Those that contribute exactly 0 are left out.
        target: The name of the target.
        target_value: The target in the model's own run, in logits.
        exact: Whether no other path is larger; False if the search stopped at its budget.
        largest_unexplored: No path that is not listed contributes more than this in absolute value;
            inf after an interruption, when nothing is known.
        expansions: How many partial paths were extended.
        convention: The choices under which the operator is unique.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> paths = lens.paths("Paris", k=3)
        >>> paths[0].name, round(paths[0].contribution, 1)
        ('"France"@4 → L0MLP → L1H0 → L3MLP → logits', 2.3)
        >>> paths.exact
        True
    """

    paths: tuple[Path, ...]
    target: str
    target_value: float
    exact: bool
    largest_unexplored: float
    expansions: int
    convention: Convention

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Path, ...]: ...
    def __getitem__(self, index: int | slice) -> Path | tuple[Path, ...]:
        n = len(self)
        if is_int(index) and not -n <= index < n:  # loops end by it
            raise IndexError(f"There is no path {index}. The number of paths is {n}.")
        if not is_int(index) and not isinstance(index, slice):
            raise ValueError(
                f"paths[{index!r}] does not exist, as the index is a path's number or a slice. "
                "Pass an integer, or look for names in .to_dataframe()."
            )
        return self.paths[index]

    def __repr__(self) -> str:
        found = f"the {len(self)} largest" if self.exact else f"{len(self)} found before the budget"
        head = (
            f"Paths to {self.target} = {self.target_value:.4g}: {found}, {self.expansions} "
            f"expansions, none left out above {self.largest_unexplored:.3g}"
        )
        head = ", ".join(filter(None, (head, self.convention.in_front)))
        return "\n".join((head, *(f"  {path.contribution:+9.4f}  {path.name}" for path in self)))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each path as a row of its nodes with matplotlib, largest first.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. A line is as thick as √|contribution|, red above 0 and blue below.

        Raises:
            ValueError: If matplotlib is missing.
        """
        rows = [(p.label, list(zip(p.nodes, p.stops, strict=True)), p.contribution) for p in self]
        title = f"largest paths to {self.target} = {self.target_value:.4g}"
        return path_rows(ax, rows, title=title, unit=unit_of(self.target))

    def _page(self) -> Page:
        rows = [
            ((p.label, p.start), list(zip(p.stops, p.nodes, strict=True)), p.contribution)
            for p in self
        ]
        unit = unit_of(self.target)
        numbers = np.array([[p.contribution] for p in self], dtype=np.float64).reshape(-1, 1)
        table = table_view(["path"], [unit], [[p.name] for p in self], numbers)
        return Page(repr(self).splitlines()[0], [flow_view(rows, unit), table], height=860)

    def to_dataframe(self) -> pandas.DataFrame:
        """The paths as a pandas table.

        Returns:
            One row per path, with columns path, start, pos, nodes, positions, value, label.

        Raises:
            ValueError: If pandas is not installed.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        rows = [{"path": path.name, **_plain(path)} for path in self]
        columns = ["path", "start", "pos", "nodes", "positions", "value", "label"]
        return pandas.DataFrame(rows, columns=columns)

    def to_json(self) -> str:
        """Write the paths as JSON, with all that is needed to read them."""
        names = ("target", "target_value", "exact", "largest_unexplored", "expansions")
        data: dict[str, Any] = {"format": FORMAT, "unit": UNIT}
        data |= {name: getattr(self, name) for name in names}
        if math.isinf(self.largest_unexplored):  # JSON has no infinity
            data["largest_unexplored"] = None
        data |= {"convention": asdict(self.convention), "paths": [_plain(path) for path in self]}
        return json.dumps(data, ensure_ascii=False)


def _plain(path: Path) -> dict[str, Any]:
    nodes = [str(node) for node in path.nodes]
    own = {**vars(path), "start": str(path.start), "nodes": nodes}
    return own | {"value": own.pop("contribution")}
