"""Results as tables: the same columns for pandas and in JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..checks import Hinted, need, spelled

if TYPE_CHECKING:
    import pandas


class Result(Hinted):
    """Something that a call found, and what names stand for that are guessed of it."""

    _MEANT: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("to_df", "to_pandas", "to_csv", "to_xarray", "df"), "to_dataframe"),
        **dict.fromkeys(("to_dict", "json", "to_list", "tolist"), "to_json"),
        **dict.fromkeys(("numpy", "to_numpy"), "numpy.asarray of it"),
        **dict.fromkeys(("sort", "sorted", "largest", "head"), "top"),
        **dict.fromkeys(("filter", "query", "loc"), "select"),
        **dict.fromkeys(("draw", "figure", "heatmap"), "plot"),
        **dict.fromkeys(("save", "write"), "to_json"),
        **dict.fromkeys(("error", "sum_off", "exactness"), "completeness_error"),
        **dict.fromkeys(("scores", "contributions", "shape"), ".values"),
        **dict.fromkeys(("tokens", "names"), ".labels"),
    }


@spelled
class Tabled(Result):
    """A result whose numbers are rows of named columns."""

    _COLUMNS: ClassVar[tuple[str, ...]]
    """Names of the columns. One name means one thing in all results."""

    def _rows(self) -> Iterable[Sequence[Any]]:
        """The rows, in the order of :data:`_COLUMNS`."""
        raise NotImplementedError

    def _facts(self) -> Mapping[str, Any]:
        """What holds for all rows, by name: part of the JSON."""
        return {}

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the result as a pandas table. The guide to files says what its columns mean.

        Returns:
            One row per number or group of numbers that belong together.

        Raises:
            ValueError: If pandas is not installed.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        return pandas.DataFrame(list(self._rows()), columns=list(self._COLUMNS))

    def to_json(self) -> str:
        """Write the same rows as JSON, with what holds for all of them; nan is null."""
        words = re.sub(r"(?<!^)(?=[A-Z])", " ", type(self).__name__).lower()
        rows = [dict(zip(self._COLUMNS, row, strict=True)) for row in self._rows()]
        data = {"format": f"tensorlens_tl {words} 1", **self._facts(), "rows": rows}
        return json.dumps(_finite(data), ensure_ascii=False, default=str)


def _finite(data: Any) -> Any:
    """The same without nan and infinity, which JSON does not know: they are null."""
    if isinstance(data, Mapping):
        return {str(name): _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
