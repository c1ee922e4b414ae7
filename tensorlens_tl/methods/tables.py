"""What every method returns: a matrix of tokens by tokens, or a score per token."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import PROMPTS, legend_html, more_prompts, patch_map, strip_html
from ..checks import as_array, at_least_one, need, pick_prompts, place_label, spelled
from ..maps import TINY
from ..operator import Convention
from ..pictures import (
    Page,
    Paged,
    PagedPatches,
    cell_map,
    depth,
    map_view,
    panel,
    patch_figure,
    patch_view,
    table_view,
    token_figure,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

MATRIX_FORMAT, SCORES_FORMAT = "tensorlens_tl token matrix 1", "tensorlens_tl token scores 1"


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class TokenMatrix(Paged):
    """A token-by-token matrix [query_pos, key_pos] for every prompt of a batch.

    Attributes:
        kind: Name of the method that made the matrix.
        values: How much of token key_pos is in position query_pos [batch, query_pos, key_pos];
            0 where there is padding.
        labels: Strings of every prompt's tokens.
        spans: Start and stop of every prompt's tokens along the axes of ``values``.
        convention: Choice made for gated MLPs.
        layers: Names of the two residual sites that the matrix spans.
        constants: For "in_out", what constants add to every destination's target
            [batch, query_pos], in the target's units. None for other methods.
        target_value: For "in_out", every destination's target as the run had it
            [batch, query_pos]. None for other methods.
        standard_error: For an estimated "norm", the standard error of every entry
            [batch, query_pos, key_pos]. None for exact matrices.
        probes: Number of random vectors that estimated the entries. None for exact matrices.
    """

    kind: str
    values: Float[Tensor, "batch query_pos key_pos"]
    labels: tuple[tuple[str, ...], ...]
    spans: tuple[tuple[int, int], ...]
    convention: Convention
    layers: tuple[str, str]
    constants: Float[Tensor, "batch query_pos"] | None = None
    target_value: Float[Tensor, "batch query_pos"] | None = None
    standard_error: Float[Tensor, "batch query_pos key_pos"] | None = None
    probes: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, prompt: int) -> Float[Tensor, "query_pos key_pos"]: ...
    @overload
    def __getitem__(self, prompt: slice) -> TokenMatrix: ...
    def __getitem__(self, prompt: int | slice) -> Tensor | TokenMatrix:
        """One prompt's matrix, without padding; or the result of a slice of prompts."""
        picked = list(pick_prompts(prompt, len(self), "matrix", ".to_dataframe"))
        if isinstance(prompt, slice):
            names = ("values", "constants", "target_value", "standard_error")
            return replace(self, **_picked(self, names, picked))
        start, stop = self.spans[picked[0]]
        return self.values[picked[0], start:stop, start:stop]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The values [batch, query_pos, key_pos] for NumPy, by ``numpy.asarray(matrix)``."""
        return as_array(self.values, dtype, copy)

    def __repr__(self) -> str:
        size = f"{len(self)} × " if len(self) > 1 else ""
        size += " × ".join(map(str, self.values.shape[1:]))
        how = "" if self.probes is None else f", estimated from {self.probes} probes"
        about = f", {self.convention.in_front}" if self.convention.in_front else ""
        return f"TokenMatrix({self.kind}, {size}{how}, {self.layers[0]} → {self.layers[1]}{about})"

    @property
    def completeness_error(self) -> float | None:
        """Largest |row sum + constants − target| / max |target| of "in_out"; else None."""
        if self.constants is None or self.target_value is None:
            return None
        off = (self.values.sum(-1) + self.constants - self.target_value).abs().max()
        return float(off / self.target_value.abs().max().clamp_min(TINY))

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Compute a confidence interval of every estimated entry.

        The interval is Student's t on the logarithm of the norm, so that both bounds are positive.

        Args:
            level: Coverage of the interval, between 0 and 1.

        Returns:
            Lower and upper bounds, each [batch, query_pos, key_pos].

        Raises:
            ValueError: If the matrix is exact, or the level is not between 0 and 1.
        """
        if self.standard_error is None or self.probes is None:
            raise ValueError(
                "This matrix is exact and has no interval. Ask for token_matrix('norm', probes=k)."
            )
        if not 0 < level < 1:
            raise ValueError(f"level={level} is not between 0 and 1. Pass a share such as 0.95.")
        # On the logarithm, as d log(norm) = d norm / norm: the lower bound stays above 0.
        spread = student_t((1 + level) / 2, self.probes - 1) * self.standard_error
        factor = torch.exp(spread / self.values.clamp_min(TINY))
        return self.values / factor, self.values * factor

    def to_dataframe(self, prompt: int = 0) -> pandas.DataFrame:
        """Give one prompt's matrix as a pandas DataFrame, with its tokens on both sides.

        Args:
            prompt: Index of the prompt in the batch.

        Returns:
            The DataFrame; rows are destinations, columns sources.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        names = [f"{token}@{i}" for i, token in enumerate(self.labels[prompt])]
        return pandas.DataFrame(self[prompt].cpu().numpy(), index=names, columns=names)

    @staticmethod
    def panel(depths: Sequence[TokenMatrix], prompt: int, name: str) -> dict[str, Any]:
        """Lay out one prompt's matrix, at one or several depths, for a page's view of maps.

        Args:
            depths: Matrices of one method and one run that start at different sites.
            prompt: Index of the prompt in the batch.
            name: What stands above the map.

        Returns:
            The panel for :func:`tensorlens_tl.pictures.map_view`.
        """
        first, here = depths[0], slice(*depths[0].spans[prompt])
        n, stops = len(first.labels[prompt]), []
        for one in depths:
            small = len(depths) * n**2 <= SMALL
            form = None if one is first or small else "coarse" if n <= COARSE else "largest"
            constants = None if one.constants is None else as_array(one.constants[prompt, here])
            stops.append(depth(one.layers[0], as_array(one[prompt]), constants, form))
        goal = None if first.target_value is None else as_array(first.target_value[prompt, here])
        unit, signed = _UNITS.get(first.kind, _OWN_UNIT), first.kind == "in_out"
        return panel(name, unit, stops, goal, signed=signed)

    def plot(self, ax: Axes | None = None, prompt: int = 0, largest: float | None = None) -> Axes:
        """Draw one prompt's matrix with matplotlib. Signed entries have colours about 0.

        Args:
            ax: Axes to draw on. None makes a figure.
            prompt: Index of the prompt in the batch.
            largest: Where the colours end, so that figures can share a scale. None is the largest
                entry.

        Returns:
            The axes drawn on: rows are the positions that read, columns those that are read.

        Raises:
            ValueError: If matplotlib is missing.
        """
        values, names = as_array(self[prompt]), self.labels[prompt]
        signed = self.kind == "in_out" or bool((values < 0).any())
        return cell_map(
            ax,
            values,
            names,
            names,
            unit=_SHORT_UNITS.get(self.kind, "score"),
            title=f"{self.kind}, {self.layers[0]} → {self.layers[1]}",
            axis_names=("query_pos: reads", "key_pos: is read"),
            signed=signed,
            largest=largest,
        )

    def _page(self) -> Page:
        error = self.completeness_error
        notes = [f"{self!r}. {FIRST_TOKEN}"]
        if error is not None:
            notes.append(f"Rows and constants sum to the target, off by at most {error:.0e} of it.")
        if self.probes is not None:
            notes.append(f"Entries are estimated from {self.probes} random probes.")
        views = []
        for i, own in enumerate(self.labels):
            heading = " ".join([*own[:12], *["…"][: len(own) > 12]])
            views.append(map_view(own, own, [self.panel([self], i, self.kind)], heading=heading))
        return Page(f"Tokens by tokens: {self.kind}", views, notes, tabs=len(self) > 1, height=900)

    def to_json(self) -> str:
        """Write the matrix of every prompt as JSON, with its tokens and without its padding."""
        names = ("values", "constants", "target_value", "standard_error")
        prompts = []
        for prompt, (start, stop) in enumerate(self.spans):
            here = slice(start, stop)
            one = {"tokens": self.labels[prompt], "values": self[prompt].tolist()}
            for name in names[1:]:
                given = getattr(self, name)
                if given is not None:
                    own = given[prompt, here]
                    one[name] = (own if own.ndim == 1 else own[:, here]).tolist()
            prompts.append(one)
        return json.dumps(
            {
                "format": MATRIX_FORMAT,
                "method": self.kind,
                "layers": self.layers,
                "axes": ["query_pos", "key_pos"],
                "unit": _UNITS.get(self.kind, _OWN_UNIT),
                "completeness_error": self.completeness_error,
                "probes": self.probes,
                "convention": asdict(self.convention),
                "prompts": prompts,
            },
            ensure_ascii=False,
        )


SMALL, COARSE = 2**17, 128
"""Cells of all depths up to which each is packed exactly; tokens up to which all cells are kept."""
_OWN_UNIT = "a share or score of the method's own"
FIRST_TOKEN = "The first token has its own column, like any other."
_UNITS = {
    "norm": "a norm of the operator's block",
    "in": "a norm of the output",
    "out": "a norm of the covector",
    "in_out": "units of the target, logits for tokens",
}
_SHORT_UNITS = _UNITS | {"in_out": "logits, or the target's unit"}


def _picked(result: TokenMatrix | TokenScores, names: Sequence[str], rows: list[int]) -> Any:
    """The fields of some prompts of a result."""
    found = {
        name: tuple(getattr(result, name)[i] for i in rows)
        for name in ("labels", "spans", "target")
        if hasattr(result, name)
    }
    tensors = {name: getattr(result, name) for name in names}
    return found | {name: t[rows] for name, t in tensors.items() if t is not None}


def student_t(p: float, freedom: int) -> float:
    """Compute a quantile of Student's t distribution.

    The form is closed for 1 and 2 degrees of freedom. Otherwise it is the Cornish-Fisher expansion
    around the normal quantile z (Abramowitz & Stegun 26.7.5).

    Args:
        p: Probability below the quantile.
        freedom: Degrees of freedom, at least 1.

    Returns:
        The quantile t with P(T ≤ t) = p.
    """
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))  # Cauchy's distribution
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))  # t = x √2 / √(1 − x²), x = 2 p − 1
    # In powers of 1 / freedom; four terms are within 0.5 % from 3 degrees of freedom on.
    z = float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class TokenScores(PagedPatches):
    """How much of a target is due to every token, for every prompt of a batch.

    Attributes:
        method: Name of the method that gave the scores.
        values: Score of every token [batch, pos]; 0 where there is padding.
        labels: Strings of every prompt's tokens.
        spans: Start and stop of every prompt's tokens along the positions of ``values``.
        target: Name of the target, per prompt.
        convention: Choice made for gated MLPs.
    """

    method: str
    values: Float[Tensor, "batch pos"]
    labels: tuple[tuple[str, ...], ...]
    spans: tuple[tuple[int, int], ...]
    target: tuple[str, ...]
    convention: Convention

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, prompt: int) -> Float[Tensor, " pos"]: ...
    @overload
    def __getitem__(self, prompt: slice) -> TokenScores: ...
    def __getitem__(self, prompt: int | slice) -> Tensor | TokenScores:
        """One prompt's scores, without padding; or the result of a slice of prompts."""
        picked = list(pick_prompts(prompt, len(self), "scores", ".top or .to_dataframe"))
        if isinstance(prompt, slice):
            return replace(self, **_picked(self, ("values",), picked))
        return self.values[picked[0], slice(*self.spans[picked[0]])]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The values [batch, pos] for NumPy, by ``numpy.asarray(scores)``."""
        return as_array(self.values, dtype, copy)

    def grid(self) -> Float[Tensor, "prompt row column"]:
        """The scores of a picture's patches, as a map [prompt, row, column].

        Returns:
            The map of every prompt. Rows such as [CLS] have no place in it.

        Raises:
            ValueError: If no row is a patch, or a prompt has several pictures.
        """
        parts = ((names, range(len(names)), self[i]) for i, names in enumerate(self.labels))
        return torch.stack([patch_map(*part) for part in parts])

    def top(self, k: int = 10, prompt: int = 0) -> list[tuple[str, float]]:
        """Give the k tokens with the largest scores by absolute value, without exact zeros.

        Args:
            k: Number of tokens.
            prompt: Index of the prompt in the batch.

        Returns:
            At most k pairs ('"token"@position', score), largest first.

        Raises:
            ValueError: If k < 1.
        """
        scores = self[prompt]
        order = scores.abs().argsort(descending=True)[: at_least_one(k, "k")].tolist()
        found = [(place_label(self.labels[prompt][i], i), float(scores[i])) for i in order]
        return [(name, score) for name, score in found if score != 0]

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the scores as a pandas table.

        Returns:
            One row per prompt and token, with columns prompt, token, pos and score.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        rows = [
            (prompt, token, pos, score)
            for prompt, tokens in enumerate(self.labels)
            for pos, (token, score) in enumerate(zip(tokens, self[prompt].tolist(), strict=True))
        ]
        return pandas.DataFrame(rows, columns=["prompt", "token", "pos", "score"])

    def to_json(self) -> str:
        """Write the scores of every prompt as JSON, with its tokens and without its padding."""
        prompts = [
            {"target": self.target[i], "tokens": self.labels[i], "scores": self[i].tolist()}
            for i in range(len(self))
        ]
        data = {
            "format": SCORES_FORMAT,
            "method": self.method,
            "unit": _UNITS.get(self.method, _OWN_UNIT),
            "convention": asdict(self.convention),
            "prompts": prompts,
        }
        return json.dumps(data, ensure_ascii=False)

    def plot(self, ax: Axes | None = None, image: Any = None) -> Axes:
        """Draw the scores with matplotlib: bars, mirrored for two prompts; strips for more.

        Args:
            ax: Axes to draw on. None makes a figure.
            image: A picture to draw its patches' scores on, as a map; of one prompt.

        Returns:
            The axes drawn on, with tokens in the order of the prompt.

        Raises:
            ValueError: If matplotlib is missing, or the one prompt is no picture.
        """
        if image is not None:
            title = f"{self.target[0]}, {self.method}"
            grid = self[:1].grid()[0].tolist()
            return patch_figure(ax, grid, unit="score", title=title, image=image)
        many, prompts = len(self) > 2, range(len(self))
        names = [
            list(own) if many else [place_label(token, i) for i, token in enumerate(own)]
            for own in self.labels
        ]
        values = [self[i].tolist() for i in prompts]
        unit = "logits" if self.method == "in_out" else "score"
        return token_figure(ax, names, values, self.target, self.method, unit)

    def __repr__(self) -> str:
        head = f"{self.method} of {self.target[0]}"
        head += f", prompt 1 of {len(self)}" if len(self) > 1 else ""
        head += f", {self.convention.in_front}" if self.convention.in_front else ""
        return "\n".join([head, *(f"  {value:+10.4f}  {name}" for name, value in self.top())])

    def _page(self) -> Page:
        views = []
        for i, own in enumerate(self.labels):
            labels = [[place_label(token, pos)] for pos, token in enumerate(own)]
            numbers = as_array(self[i])[:, None]
            parts = [table_view(["token"], ["score"], labels, numbers, "", self.target[i])]
            if any("patch[" in name for name in own):
                with suppress(ValueError):  # of several pictures, or of a film
                    grid = patch_map(own, range(len(own)), self[i]).tolist()
                    parts.insert(0, patch_view(grid, "score", self.method == "in_out"))
            views += [replace(part, tab=f"{i + 1}: {self.target[i]}") for part in parts]
        unit = _UNITS.get(self.method, _OWN_UNIT)
        return Page(f"Scores of tokens by {self.method}", views, [f"In {unit}."], len(self) > 1)

    def _strip(self) -> str:
        parts = []
        for i in range(min(PROMPTS, len(self))):
            scores = self[i].tolist()
            head = f"<div><b>{self.method}</b> of {escape(self.target[i])}</div>"
            parts += [head, strip_html(self.labels[i], scores), legend_html(scores, "scores")]
        return "".join(parts) + more_prompts(len(self))
