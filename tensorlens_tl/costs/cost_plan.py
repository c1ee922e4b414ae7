"""The predicted cost of a call, in words, as a table, and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import spelled
from ..pictures import Page, Paged, Tabled, bars, table_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@spelled
@dataclass(frozen=True)
class Plan(Paged, Tabled):
    """The predicted cost of a call.

    Attributes:
        what: Name of what was planned.
        flops: Number of floating-point operations.
        seconds: Predicted time on this machine in seconds, from rates measured just before.
        peak_bytes: Predicted memory in bytes beyond what is in use now, the result included.
        memory_limit: Most memory in bytes that the call may take.
        chunks: Number of pieces that the work is cut into.
        notes: What else the call will do, as sentences for the reader.
    """

    what: str
    flops: float
    seconds: float
    peak_bytes: int
    memory_limit: int
    chunks: int
    notes: tuple[str, ...] = ()

    _FRAMED = False
    _COLUMNS = ("what", "flops", "seconds", "peak_bytes", "memory_limit", "chunks")

    def _rows(self) -> list[tuple[Any, ...]]:
        return [tuple(getattr(self, name) for name in self._COLUMNS)]

    def _facts(self) -> dict[str, Any]:
        return {"notes": self.notes}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the memory that is needed beside the memory that is allowed, with matplotlib.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. Time, operations and chunks stand above.

        Raises:
            ValueError: If matplotlib is missing.
        """
        names, sizes = self._memory()
        notes = [f"{size:,.0f} MiB" if size >= 100 else f"{size:.3g} MiB" for size in sizes]
        title = self._short()
        return bars(ax, names, sizes, unit="memory, MiB", title=title, notes=notes, signed=False)

    def _memory(self) -> tuple[list[str], list[float]]:
        """Names and MiB of the bars."""
        return ["needed", "allowed"], [self.peak_bytes / 2**20, self.memory_limit / 2**20]

    def _page(self) -> Page:
        names, sizes = self._memory()
        labels = [[name] for name in names]
        table = table_view(["memory"], ["MiB"], labels, np.array(sizes)[:, None])
        notes = [f"{note[:1].upper()}{note[1:]}." for note in self.notes]
        return Page(self._short(), [table], notes, height=240)

    def _short(self) -> str:
        """What is planned, in one line without memory and notes."""
        chunks = f"{self.chunks} chunk{'s' if self.chunks > 1 else ''}"
        return f"{self.what}: about {self._time()}, {self.flops / 1e9:.3g} Gflop, {chunks}"

    def _time(self) -> str:
        return f"{self.seconds:.2g} s" if self.seconds < 120 else f"{self.seconds / 60:.1f} min"

    def __repr__(self) -> str:
        text = (
            f"Plan({self.what}: about {self._time()}, {self.flops / 1e9:.3g} Gflop, "
            f"{self.peak_bytes / 2**20:.0f} MiB of {self.memory_limit / 2**20:.0f} MiB, "
            f"{self.chunks} chunk{'s' if self.chunks > 1 else ''}"
        )
        return text + "".join(f"; {note}" for note in self.notes) + ")"
