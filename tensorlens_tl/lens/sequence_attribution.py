"""Where every token of a continuation comes from: a matrix of sources by output tokens.

A lens of prompt and continuation holds the run that scored every token of the continuation: the
token at position p was predicted at p − 1. So each output token is one target, and all targets of
one lens are pulled back in one batched sweep.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..attribution import Attribution, Target, grid_html, legend_html, resolve
from ..checks import (
    as_array,
    as_list,
    at_least_one,
    is_int,
    need,
    pick_prompts,
    place_label,
    spelled,
)
from ..operator import Capture
from ..pictures import Page, Paged, cell_map, grid_view, unit_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl sequence attribution 1"
WHAT_MANY = {"logit": "logits", "log-probability": "log-probabilities"}
Continuation = int | str | Sequence[int] | Tensor
"""Where a continuation starts, or its text, or its token ids."""


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class SequenceAttribution(Paged):
    """Every token of a continuation split by source: a matrix, for every prompt of a lens.

    Attributes:
        columns: One attribution per output token. All have the same rows.
        outputs: For every prompt, the names of the output tokens, such as '"France"@6'.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("Paris is the capital of France")
        >>> matrix = lens.attribute_sequence("of France")
        >>> matrix.outputs
        (('"of"@5', '"France"@6'),)
        >>> matrix.values.shape == (1, len(matrix.columns[0].sources), 2)
        True
        >>> matrix.completeness_error < 1e-5  # every column sums to its token
        True
    """

    columns: tuple[Attribution, ...]
    outputs: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.outputs)

    def __getitem__(self, prompt: int | slice) -> SequenceAttribution:
        """Take the matrix of one prompt, or of a slice of prompts, without padding around them."""
        picked = pick_prompts(prompt, len(self), "matrix", ".to_dataframe")
        columns = tuple(column[prompt] for column in self.columns)
        return replace(self, columns=columns, outputs=tuple(self.outputs[i] for i in picked))

    @property
    def values(self) -> Float[Tensor, "prompt source output"]:
        """What every source adds to every output token, in units of the targets."""
        return torch.stack([column.values for column in self.columns], -1)

    @property
    def target_value(self) -> Float[Tensor, "prompt output"]:
        """The targets in the model's own run."""
        return torch.stack([column.target_value for column in self.columns], -1)

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """The names of the sources, one tuple per prompt."""
        return self.columns[0].labels

    @property
    def completeness_error(self) -> float | None:
        """The largest completeness error of the columns; None where rows do not sum."""
        errors = [column.completeness_error for column in self.columns]
        known = [error for error in errors if error is not None]
        return max(known) if known else None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The values [prompt, source, output] for NumPy."""
        return as_array(self.values, dtype, copy)

    def total(self) -> Attribution:
        """The sum over the outputs: of log-probabilities, that of the whole continuation.

        Returns:
            One attribution, whose rows sum to the sum of the targets.
        """
        first = self.columns[0]
        return replace(
            first,
            values=self.values.sum(-1),
            target=tuple(" + ".join(names) for names in zip(*self._targets(), strict=True)),
            target_value=self.target_value.sum(-1),
        )

    def sum(self, axis: str) -> SequenceAttribution:
        """Sum sources along an axis.

        Args:
            axis: What to sum over, as in :meth:`Attribution.sum`: "node" leaves one row per
                position, "pos" one per node.

        Returns:
            The matrix with fewer rows.

        Raises:
            ValueError: If there is no such axis.
        """
        return replace(self, columns=tuple(column.sum(axis) for column in self.columns))

    def to_dataframe(self, prompt: int = 0) -> pandas.DataFrame:
        """One prompt's matrix as a pandas table.

        Args:
            prompt: Number of the prompt in the batch.

        Returns:
            One row per source and one column per output token.

        Raises:
            ValueError: If pandas is not installed.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        one = self[prompt]
        values = one.values[0].cpu().numpy()
        return pandas.DataFrame(values, index=list(one.labels[0]), columns=list(one.outputs[0]))

    def to_json(self) -> str:
        """Write the matrix as JSON. :meth:`from_json` gives the same numbers back."""
        columns = [json.loads(column.to_json()) for column in self.columns]
        data = {"format": FORMAT, "outputs": self.outputs, "columns": columns}
        return json.dumps(data, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> SequenceAttribution:
        """Read a matrix that :meth:`to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            The matrix, on the CPU.

        Raises:
            ValueError: If the text is not a whole matrix.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            columns = tuple(Attribution.from_json(json.dumps(one)) for one in data["columns"])
            outputs = tuple(map(tuple, data["outputs"]))
            shapes = {column.values.shape for column in columns}
            if len(shapes) != 1 or {len(columns)} != {len(names) for names in outputs}:
                raise ValueError(f"columns and outputs do not fit: {shapes}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The text is not a matrix as to_json writes it ({error}). Write it again."
            ) from None
        return cls(columns, outputs)

    def _targets(self) -> Iterator[tuple[str, ...]]:
        return (column.target for column in self.columns)

    def _largest(self, most: int = 12) -> list[int]:
        """The rows of the first prompt with the largest entries, in the order of the table."""
        size = self.values[0].abs().amax(-1)
        return sorted(size.argsort(descending=True)[:most].tolist())

    def plot(self, ax: Axes | None = None, prompt: int = 0, top: int = 40) -> Axes:
        """Draw one prompt's matrix with matplotlib: sources down, output tokens across.

        Args:
            ax: Axes to draw on. None makes a figure.
            prompt: Number of the prompt in the batch.
            top: Most sources that are drawn: those with the largest entries, in order.

        Returns:
            The axes drawn on.

        Raises:
            ValueError: If matplotlib is missing.
        """
        one = self[prompt]
        rows = one._largest(at_least_one(top, "top"))
        names, more = [one.labels[0][i] for i in rows], len(one.labels[0]) - len(rows)
        title = f"by {self.columns[0].by}" + (f" (… {more} more rows)" if more else "")
        return cell_map(
            ax,
            one.values[0, rows].tolist(),
            names,
            one.outputs[0],
            unit=unit_of(one.columns[0].target[0]),
            title=title,
            axis_names=("source", "output"),
        )

    def __repr__(self) -> str:
        one, by = self[0], self.columns[0].by
        rows = one._largest()
        width = max(9, *(len(name) + 2 for name in one.outputs[0]))
        sums = "the rows do not sum"
        if self.completeness_error is not None:
            sums = f"each column sums to its last number, off by {self.completeness_error:.0e}"
        lines = [f"{self._head()}, by {by}; {sums}"]
        lines += ["".join(f"{name:>{width}}" for name in one.outputs[0])]
        for i in rows:
            numbers = "".join(f"{value:>+{width}.4f}" for value in one.values[0, i].tolist())
            lines.append(f"{numbers}  {one.labels[0][i]}")
        more = len(one.labels[0]) - len(rows)
        lines += [f"  … {more} more rows"] if more else []
        total = "".join(f"{value:>+{width}.4f}" for value in one.target_value[0].tolist())
        lines.append(f"{total}  = {self._what()}")
        return "\n".join(lines)

    def _what(self) -> str:
        """What is explained of every output token."""
        return "log-probability" if unit_of(self.columns[0].target[0]) == "nats" else "logit"

    def _head(self) -> str:
        first, *more = self.outputs[0]
        names = f"{first} … {more[-1]}, {1 + len(more)} tokens" if len(more) > 3 else ""
        names = names or ", ".join((first, *more))
        many = f", prompt 1 of {len(self)}" if len(self) > 1 else ""
        in_front = self.columns[0].convention.in_front
        many += f", {in_front}" if in_front else ""
        what = self._what() if not more else WHAT_MANY[self._what()]
        return f"SequenceAttribution of the {what} of {names}{many}"

    def _page(self) -> Page:
        views = []
        for prompt in range(len(self)):
            one = self[prompt]
            cells, names = as_array(one.values[0].double()), one.labels[0]
            axes, unit = ("source", "output token"), unit_of(one.columns[0].target[0])
            heading = f"{prompt + 1}: {' '.join(one.outputs[0])}"
            views.append(grid_view(names, one.outputs[0], cells, axes, unit, heading))
        exact = "The rows do not sum to the targets."
        if self.completeness_error is not None:
            exact = f"Columns sum to their token, off by {self.completeness_error:.0e} of Σ|·|."
        title = self._head().replace("SequenceAttribution", "Attribution", 1)
        return Page(title, views, [exact], tabs=len(self) > 1, height=760)

    def _strip(self) -> str:
        one = self[0]
        rows = one._largest(20)
        names = [one.labels[0][i] for i in rows]
        more = len(one.labels[0]) - len(rows)
        below = f"<div>… {more} more rows</div>" if more else ""
        values = one.values[0, rows]
        grid = grid_html(names, one.outputs[0], values.tolist())
        sums = [
            f"{escape(column.target[0])} = {value:.4g}"
            for column, value in zip(one.columns, one.target_value[0].tolist(), strict=True)
        ]
        exact = one.completeness_error
        what = "The rows do not sum to" if exact is None else "The columns sum to"
        off = "" if exact is None else f"; off by at most {exact:.0e} of Σ|·|"
        total = f"<div><small>{what} {', '.join(sums)}{off}.</small></div>"
        legend = legend_html(values.flatten().tolist())
        head = f"<div><b>{self._head()}</b> by {self.columns[0].by}</div>"
        return f"{head}{grid}{below}{legend}{total}"


def continuation_targets(
    capture: Capture, continuation: Continuation, of: str
) -> tuple[list[Target], tuple[tuple[str, ...], ...]]:
    """Make one target per token of a continuation, at the position before the token.

    Args:
        capture: The captured run of prompt and continuation.
        continuation: Position of the first token, or the text or the ids that end every prompt.
        of: "logit" or "logprob".

    Returns:
        The targets, and the names of the tokens, one tuple per prompt.

    Raises:
        ValueError: If the prompts do not end with the continuation, if nothing precedes the
            continuation, or if the prompts' continuations have different lengths.
    """
    if capture.unembed.head is not None:
        raise ValueError(
            "attribute_sequence reads every next token off the unembedding alone, and "
            f"{capture.model_name} has a head before it. Call lens.attribute(token, pos=...)."
        )
    spans, all_ids = capture.frame.spans, capture.prompts.ids("attribute_sequence")
    sizes = [_size(capture, prompt, continuation) for prompt in range(len(spans))]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"The continuations have different numbers of tokens: {', '.join(map(str, sizes))}. "
            "Pass a negative position, or take one prompt with lens[i]."
        )
    size = sizes[0]
    ids: Int[Tensor, "batch output"] = torch.stack(
        [all_ids[i, stop - size : stop] for i, (_, stop) in enumerate(spans)]
    ).to(capture.frame.device)
    if of == "logprob":  # each reads all of W_U: cast once, not once for each
        unembed = capture.unembed
        exact = replace(unembed.weights, W_U=capture.frame.cast(unembed.weights.W_U))
        capture = replace(capture, unembed=replace(unembed, weights=exact))
    goals = [resolve(capture, pos=i - size - 1, predicted=ids[:, i], of=of) for i in range(size)]
    names = tuple(
        tuple(place_label(token, len(own) - size + i) for i, token in enumerate(own[-size:]))
        for own in capture.prompts.strings
    )
    return goals, names


def _size(capture: Capture, prompt: int, continuation: Any) -> int:
    """How many tokens of a prompt the continuation has."""
    start, stop = capture.frame.spans[prompt]
    n, given = stop - start, as_list(continuation)
    if is_int(given):
        size = n - given if given >= 0 else -given
        if not 0 < size < n:
            raise ValueError(
                f"continuation={given} is not a token of prompt {prompt} with one before it. Pass "
                f"a position from 1 to {n - 1}, or from {1 - n} to −1."
            )
        return size
    if isinstance(given, str):
        size = _tail(capture.prompts.strings[prompt], given)
    elif isinstance(given, list | tuple) and given and all(map(is_int, given)):
        ids = capture.prompts.ids("attribute_sequence")[prompt, start:stop].tolist()
        size = len(given) if ids[-len(given) :] == list(given) else 0
    else:
        raise ValueError(
            f"continuation={continuation!r} is no continuation. Pass a position, a text or a list "
            "of token ids."
        )
    if not 0 < size < n:
        raise ValueError(
            f"continuation={continuation!r} is not what prompt {prompt} ends with. Capture the "
            "prompt with its continuation, or pass the position where the continuation starts."
        )
    return size


def _tail(tokens: Sequence[str], text: str) -> int:
    """How many of the last tokens spell a text, whatever the white space; 0 for none."""
    wanted, found = "".join(text.split()), ""
    for size, token in enumerate(reversed(tokens), 1):
        found = "".join(token.split()) + found
        if found and found == wanted:
            return size
        if not wanted.endswith(found):
            break
    return 0
