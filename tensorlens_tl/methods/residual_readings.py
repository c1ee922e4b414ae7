"""The logit lens (nostalgebraist 2020): every residual read as if it were the last one.

logits at a site = cap(norm(residual) W_U + b_U). Two readings of the final norm are usual:

    "anew"     the norm computes its scale from that residual, as the logit lens does
    "frozen"   the norm keeps the scale of the run, and a soft cap its ratio: the reading is affine,
               so that what layers add to the residual is also what they add to the logits

At the last site both are the model's own logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import TargetLike, resolve_token
from ..checks import as_array, at_least_one, need, pick_prompts, place_label, spelled, token_text
from ..maps import DENSE_LIMIT, Chain, Gate, Linear, Norm, take_row
from ..operator import Capture, Convention, FrozenTransformer
from ..pictures import Page, Paged, View, cell_map, table_view, words_view
from ..sublayers import soft_cap_ratio

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

FORMAT = "tensorlens_tl logit lens 1"
NORMS = ("anew", "frozen")
"""How the final norm may read a residual that is not the last one."""


class Reading(NamedTuple):
    """One token that a residual says.

    Attributes:
        prompt: Number of the prompt.
        site: Name of the residual site.
        label: The token that stands there, such as '"is"@5'.
        rank: Rank among all tokens, from 1.
        id: Id of the token that is said.
        token: Text of the token that is said.
        logit: Logit of the token.
        probability: Probability of the token.
    """

    prompt: int
    site: str
    label: str
    rank: int
    id: int
    token: str
    logit: float
    probability: float


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Paged):
    """What every residual of a run says as logits, from the embeddings to the last block.

    Attributes:
        logits: Logits at every residual site [prompt, site, pos, d_vocab]; 0 at padding.
        sites: Names of the sites, such as "blocks.2.hook_resid_mid", first to last.
        labels: For every prompt, the tokens that stand at the positions, such as '"is"@5'.
        spans: For every prompt, the start and stop of its real tokens along the pos axis.
        norm: How the final norm reads: "anew" or "frozen".
        tokenizer: The model's tokenizer, or None.
        convention: The run's convention, which tells what was put in front of the text.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> found = lens.logit_lens()
        >>> [round(float(p), 2) for p in found.logprob("Paris").exp()[0, ::4, 0]]
        [0.0, 0.23, 1.0]
        >>> bool((found.logits[:, -1, 0] - lens.logits[:, -1]).abs().max() < 1e-3)
        True
    """

    logits: Float[Tensor, "prompt site pos d_vocab"]
    sites: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    spans: tuple[tuple[int, int], ...]
    norm: str
    tokenizer: Any = field(default=None, repr=False)
    convention: Convention = field(default_factory=Convention)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, prompt: int | slice) -> LogitLens:
        """Take one prompt, or a slice of prompts, without padding around them."""
        picked = list(pick_prompts(prompt, len(self), "logit_lens", ".rows or .to_dataframe"))
        spans = [self.spans[i] for i in picked]
        start, stop = min(span[0] for span in spans), max(span[1] for span in spans)
        return replace(
            self,
            logits=self.logits[picked][:, :, start:stop],
            labels=tuple(self.labels[i] for i in picked),
            spans=tuple((a - start, b - start) for a, b in spans),
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The logits [prompt, site, pos, d_vocab] for NumPy."""
        return as_array(self.logits, dtype, copy)

    @property
    def probabilities(self) -> Float[Tensor, "prompt site pos d_vocab"]:
        """The softmax of the logits."""
        return self.logits.softmax(-1)

    def logprob(self, token: TargetLike) -> Float[Tensor, "prompt site pos"]:
        """The log-probability of one token at every site.

        Args:
            token: A token string or a token id.

        Returns:
            The log-probabilities, in nats.

        Raises:
            ValueError: If there is no such token.
        """
        return self.logits.log_softmax(-1)[..., resolve_token(self, token, "token")]

    def rows(self, k: int = 5) -> Iterator[Reading]:
        """The k likeliest tokens of every site and position.

        Args:
            k: How many tokens to give.

        Yields:
            One row per prompt, site, position and rank.

        Raises:
            ValueError: If k is below 1.
        """
        k = min(at_least_one(k, "k"), self.logits.shape[-1])
        for prompt in range(len(self)):
            one = self[prompt]
            logits, ids = one.logits[0].topk(k)
            # Softmax over the whole vocabulary, of which k tokens are kept.
            probabilities = (logits - one.logits[0].logsumexp(-1, keepdim=True)).exp()
            best = zip(logits.tolist(), ids.tolist(), probabilities.tolist(), strict=True)
            for site, of_site in zip(self.sites, best, strict=True):
                for label, *found in zip(one.labels[0], *of_site, strict=True):
                    for rank, (logit, token, p) in enumerate(zip(*found, strict=True), 1):
                        text = token_text(self.tokenizer, token)
                        yield Reading(prompt, site, label, rank, token, text, logit, p)

    def to_dataframe(self, k: int = 5) -> pandas.DataFrame:
        """The k likeliest tokens of every site and position as a pandas table.

        Args:
            k: How many tokens to give.

        Returns:
            Columns prompt, site, label (the token there), rank, id, token, logit and probability.

        Raises:
            ValueError: If pandas is not installed, or k is below 1.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        return pandas.DataFrame(list(self.rows(k)), columns=list(Reading._fields))

    def to_json(self, k: int = 5) -> str:
        """Write the k likeliest tokens of every site and position as JSON."""
        rows = [row._asdict() for row in self.rows(k)]
        data = {"format": FORMAT, "norm": self.norm, "sites": self.sites, "rows": rows}
        data |= {"convention": asdict(self.convention)}
        return json.dumps(data, ensure_ascii=False)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the table of the first prompt with matplotlib: words, coloured by probability.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The axes drawn on. A column is a position; of a single position, a rank from 1 to 5.

        Raises:
            ValueError: If matplotlib is missing.
        """
        names, rows = self._table()
        words = [[token for token, _ in cells] for _, cells in rows]
        shares = [[p for _, p in cells] for _, cells in rows]
        across = "rank" if len(self.labels[0]) == 1 else "position"
        return cell_map(
            ax,
            shares,
            self.sites,
            names,
            unit="probability",
            title=self._head(),
            axis_names=("", across),
            texts=words,
            signed=False,
            largest=1.0,
        )

    def _table(self) -> tuple[list[str], list[tuple[str, list[tuple[str, float]]]]]:
        """Names of columns, and rows of cells: the best five of one position, or one of each."""
        one = self[0]
        n = len(one.labels[0])
        names = [str(rank) for rank in range(1, 6)] if n == 1 else list(one.labels[0])
        cells: dict[str, list[tuple[str, float]]] = {site: [] for site in self.sites}
        for row in one.rows(5 if n == 1 else 1):
            cells[row.site].append((repr(row.token), row.probability))
        return names, list(cells.items())

    def _head(self) -> str:
        own = self.labels[0]
        where = own[0] if len(own) == 1 else f"{len(own)} positions"
        many = f", prompt 1 of {len(self)}" if len(self) > 1 else ""
        how = {"anew": "the final norm applied anew", "frozen": "the final norm's scale frozen"}
        head = f"Logit lens at {where}{many}, {how[self.norm]}"
        return ", ".join(filter(None, (head, self.convention.in_front)))

    def __repr__(self) -> str:
        names, rows = self._table()
        texts = [[f"{token} {p:.1%}" for token, p in cells] for _, cells in rows]
        width = max(len(site) for site in self.sites)
        widths = [max(map(len, column)) for column in zip(names, *texts, strict=False)]
        lines = [self._head()]
        for site, cells in [("", names), *zip(self.sites, texts, strict=True)]:
            line = "  ".join(f"{text:<{w}}" for text, w in zip(cells, widths, strict=False))
            lines.append(f"  {site:<{width}}  {line}".rstrip())
        return "\n".join(lines)

    def _page(self) -> Page:
        views: list[View] = []
        for prompt in range(len(self)):
            rows = list(self[prompt].rows(3))
            labels = [[row.site, row.label, str(row.rank), row.token] for row in rows]
            numbers = np.array([[row.probability, row.logit] for row in rows])
            names, columns = ["site", "position", "rank", "says"], ["probability", "logit"]
            across, cells = self[prompt]._table()
            words = [[token for token, _ in row] for _, row in cells]
            shares = np.array([[p for _, p in row] for _, row in cells])
            heading = "The likeliest tokens, by rank"
            if len(self.labels[prompt]) > 1:
                heading = "The likeliest token at every position, and its probability"
            parts = (
                words_view(self.sites, across, words, shares, heading),
                table_view(names, columns, labels, numbers),
            )
            views += [
                replace(part, tab=f"{prompt + 1}: {self.labels[prompt][-1]}") for part in parts
            ]
        return Page(self._head(), views, [], tabs=len(self) > 1)

    def _strip(self) -> str:
        names, rows = self._table()
        head = "".join(f"<th>{escape(name)}</th>" for name in ["", *names])
        lines = []
        for site, cells in rows:
            boxes = "".join(
                f'<td style="background:rgba(67, 147, 195, {p:.2f});white-space:pre" '
                f'title="{escape(token)}: {p:.4f}">{escape(token)} {p:.1%}</td>'
                for token, p in cells
            )
            lines.append(f"<tr><td>{escape(site)}</td>{boxes}</tr>")
        table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
        return f"<div><b>{escape(self._head())}</b></div>{table}"


def logit_lens(
    capture: Capture, operator: FrozenTransformer, pos: int | None = -1, norm: str = "anew"
) -> LogitLens:
    """Read every residual of a run through the final norm and the unembedding.

    Args:
        capture: The captured run.
        operator: The operator of that run.
        pos: Position among the real tokens, or None for all.
        norm: "anew" or "frozen".

    Returns:
        The logits of every site.

    Raises:
        ValueError: If the position or ``norm`` does not exist, or the logits would be too large.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (LessWrong, 2020).
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} does not exist. Use 'anew' or 'frozen'.")
    if capture.unembed.rows > 1:
        raise ValueError(
            f"The logit lens reads one row, and the classes of {capture.model_name} read the mean "
            f"of {capture.unembed.rows}. Call attribute with site=."
        )
    frame, weights = capture.frame, capture.unembed.weights
    query = None if pos is None else frame.index(pos)
    states = [*(step.state for step in operator.steps), capture.resid_final]
    n_pos = frame.n_pos if query is None else 1
    # A vocabulary at every site and position: the largest thing that a lens can be asked for.
    size = len(states) * frame.batch * n_pos * weights.W_U.shape[1] * frame.dtype.itemsize
    if size > DENSE_LIMIT:
        raise ValueError(
            f"The logits of all sites need {size / 2**30:.3g} GiB. Pass one position as pos=, or "
            "take one prompt with lens[i]."
        )

    def at(tensor: Tensor) -> Tensor:
        return tensor if query is None else take_row(tensor, query)

    def linear(y: Tensor) -> Tensor:
        if (head := capture.unembed.head) is not None:
            y = capture.unembed.anew(y) if norm == "anew" else _through(head, y, at)
        b_U = 0 if weights.b_U is None else frame.cast(weights.b_U)
        return y @ frame.cast(weights.W_U) + b_U

    ln, cap = capture.ln_final, weights.soft_cap
    # The cap's ratio in the run, cap tanh(z / cap) / z at the last site: what "frozen" multiplies
    # by.
    ratio = None if cap is None else soft_cap_ratio(linear(at(capture.unembed.final)), cap)
    eps = 0.0 if ln is None else _epsilon(ln, capture.resid_final[frame.real])
    found = []
    for state in map(at, states):
        y = state
        if ln is not None:
            scale = at(ln.scale)
            if norm == "anew":
                scale = (_variance(ln, state) + eps).sqrt()
            # A norm is linear but for its scale, so another scale is all that "anew" changes.
            y = replace(ln, scale=scale).apply(state)
            y = y if ln.weights.b is None else y + frame.cast(ln.weights.b)
        # A hook's edit of the final residual stands behind the norm, whatever the norm read.
        if capture.final_edit is not None:
            y = y + at(capture.final_edit.constant)
        logits = linear(y)
        if cap is not None and ratio is not None:
            logits = logits * ratio if norm == "frozen" else cap * torch.tanh(logits / cap)
        found.append(logits)
    logits, spans = torch.stack(found, 1), ((0, 1),) * frame.batch
    strings = capture.prompts.strings
    if pos is None:
        logits, spans = logits.masked_fill(~frame.real[:, None, :, None], 0), frame.spans
        shown = [range(len(own)) for own in strings]
    else:
        shown = [
            [int(i) - start] for i, (start, _) in zip(frame.index(pos), frame.spans, strict=True)
        ]
    labels = tuple(
        tuple(place_label(own[i], i) for i in places)
        for own, places in zip(strings, shown, strict=True)
    )
    # The last site holds what the final norm gives: it is not read through that norm again.
    found = logits, operator.sites[:-1], labels, spans, norm, capture.tokenizer
    return LogitLens(*found, capture.convention)


def _through(head: Chain, y: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
    """The frozen head on states at some positions."""
    into, gate, ln = cast(tuple[Linear, Gate, Norm], head.maps)
    z = y @ into.frame.cast(into.W)
    # The frozen activation: its ratio act(z) / z in the run, at these positions.
    z = (z if into.b is None else z + into.frame.cast(into.b)) * at(gate.ratio)
    h = replace(ln, scale=at(ln.scale)).apply(z)
    return h if ln.weights.b is None else h + ln.frame.cast(ln.weights.b)


def _variance(ln: Norm, x: Float[Tensor, "*many d"]) -> Float[Tensor, "*many 1"]:
    """What a norm divides by the root of, without ε: the variance, or the mean square."""
    x = x - x.mean(-1, keepdim=True) if ln.weights.center else x
    return x.square().mean(-1, keepdim=True)


def _epsilon(ln: Norm, final: Float[Tensor, "token d"]) -> float:
    """The ε of the final norm: the host's, or s² − var where var is smallest and hides it least."""
    if ln.weights.eps is not None:
        return ln.weights.eps
    # In float64: ε is the small difference of two nearly equal numbers.
    variance = _variance(ln, final.double())
    least = variance.argmin()
    scale = ln.scale[ln.frame.real].double()
    return float((scale.square() - variance).flatten()[least].clamp_min(0))
