"""The operator's map of one prompt, started at every depth, beside an earlier method's map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..attribution import TargetLike
from ..checks import as_list, spelled
from ..graph import FINAL_SITE
from ..methods import TokenMatrix, token_matrix
from ..operator import Capture, FrozenTransformer
from ..pictures import Page, Paged, Tabled, View, map_view
from .waterfalls import Waterfall, row_waterfalls

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL_DEPTHS, FEW = 512, 4
"""Up to so many tokens every site is a depth by default; beyond, so many sites are."""
ROWS = 128
"""Up to so many tokens every row is followed through depth, too."""


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class OperatorMaps(Paged, Tabled):
    """Token-by-token maps u_iᵀ T_ij x_j from several residual sites to the logits.

    From the first site, x_j are the embeddings. From a later site, x_j is the residual there: row i
    says which positions hold what the logit of i is made of. At every depth, a row and the share of
    the constants sum to the same logit.

    Attributes:
        depths: The "in_out" matrix from every site, the first site first.
        baseline: An earlier method's matrix, or None.
        target: The target of the rows, in words.
        waterfalls: For every prompt, its rows through depth; () beyond :data:`ROWS` tokens.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> maps = lens.operator_maps("Paris")
        >>> len(maps.depths), maps.completeness_error < 1e-5
        (9, True)
        >>> maps.to_html().count("</script>")
        2
    """

    depths: tuple[TokenMatrix, ...]
    baseline: TokenMatrix | None
    target: str
    waterfalls: tuple[Waterfall, ...] = ()

    _COLUMNS = ("prompt", "method", "site", "query_pos", "key_pos", "value")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for one in filter(None, (*self.depths, self.baseline)):
            for prompt in range(len(self)):
                for query, row in enumerate(one[prompt].tolist()):
                    for key, value in enumerate(row):
                        yield prompt, one.kind, one.layers[0], query, key, value

    def _facts(self) -> dict[str, Any]:
        return {"target": self.target, "tokens": self.depths[0].labels}

    def __len__(self) -> int:
        return len(self.depths[0])

    @property
    def completeness_error(self) -> float | None:
        """The largest completeness error of all depths."""
        errors = [one.completeness_error for one in self.depths]
        return max((error for error in errors if error is not None), default=None)

    def __repr__(self) -> str:
        beside = "" if self.baseline is None else f", beside {self.baseline.kind}"
        size = " × ".join(map(str, self.depths[0].values.shape[1:]))
        return f"OperatorMaps({self.target}, {size}, {len(self.depths)} depths{beside})"

    def plot(self, ax: Axes | None = None, prompt: int = 0, site: str | None = None) -> Axes:
        """Draw the map from one site with matplotlib.

        Args:
            ax: Axes to draw on. None makes a figure.
            prompt: Index of the prompt in the batch.
            site: The site at which the map starts, or the name of the method for comparison. None
                is the first site.

        Returns:
            The axes drawn on: rows are the positions that read, columns those that are read.

        Raises:
            ValueError: If matplotlib is missing, or there is no map from that site.
        """
        maps = {one.layers[0]: one for one in self.depths}
        if self.baseline is not None:
            maps[self.baseline.kind] = self.baseline
        site = next(iter(maps)) if site is None else site
        if site not in maps:
            raise ValueError(f"site={site!r} has no map here. Use one of {', '.join(maps)}.")
        return maps[site].plot(ax, prompt)

    def _page(self) -> Page:
        error = self.completeness_error
        notes = [
            f"Row i is the target at position i: {self.target}. At every depth, a row and the "
            f"constants sum to it, off by at most {0.0 if error is None else error:.0e} of it.",
            "The first token has its own column, like any other.",
            "A chosen row is shown through depth below the map."
            if self.waterfalls
            else f"Beyond {ROWS} tokens, lens.waterfall(pos=…) shows a row through depth.",
        ]
        views: list[View] = []
        for prompt, tokens in enumerate(self.depths[0].labels):
            panels = [TokenMatrix.panel(self.depths, prompt, "The operator")]
            if self.baseline is not None:
                name = f"{self.baseline.kind}, for comparison"
                panels.append(TokenMatrix.panel([self.baseline], prompt, name))
            heading, link = beginning(tokens), f"map {prompt}" if self.waterfalls else ""
            named = heading if len(self) > 1 else ""
            parts = [map_view(tokens, tokens, panels, heading=named, link=link)]
            if self.waterfalls:
                parts.append(self.waterfalls[prompt].row_view(tokens, link))
            views += [replace(part, tab=f"{prompt + 1}: {heading}") for part in parts]
        return Page(
            "Tokens by tokens, from every depth", views, notes, tabs=len(self) > 1, height=900
        )


def maps_by_depth(
    capture: Capture,
    operator: FrozenTransformer,
    target: TargetLike = "prediction",
    baseline: str | None = "rollout",
    sites: Sequence[str | int] | None = None,
    model: Any = None,
) -> OperatorMaps:
    """Compute the operator's map from several residual sites to the logits.

    Args:
        capture: The captured run.
        operator: The operator of that run.
        target: What each row reads: "prediction", a token, an id or a direction.
        baseline: An earlier method, or None.
        sites: Names of residual sites, or numbers of blocks. None is every site, or four of them
            where there are more than 512 tokens.
        model: The host model, for a baseline that runs it again.

    Returns:
        The maps of every prompt.

    Raises:
        ValueError: If a site, the target or the baseline does not exist.
    """
    chosen = list(operator.sites[:-1]) if sites is None else list(as_list(sites))
    if sites is None and capture.frame.n_pos > ALL_DEPTHS:
        chosen = chosen[:: max(1, len(chosen) // FEW)][:FEW]
    if not chosen:
        raise ValueError("sites= is empty. Pass names of sites, or None for all.")
    depths = tuple(
        token_matrix("in_out", capture, operator, target, (site, FINAL_SITE)) for site in chosen
    )
    beside = None if baseline is None else token_matrix(baseline, capture, operator, model=model)
    name = "its own prediction" if isinstance(target, str) and target == "prediction" else None
    rows = ()
    if capture.frame.n_pos <= ROWS and capture.logits.ndim == 3:
        own = None if name else target
        prompts = range(len(capture.frame.spans))
        rows = tuple(row_waterfalls(capture.prompt(prompt), own) for prompt in prompts)
    return OperatorMaps(depths, beside, name or f"the logit of {target!r}", rows)


def beginning(tokens: Sequence[str], most: int = 12) -> str:
    """The first tokens of a prompt, with dots where more follow."""
    return " ".join([*tokens[:most], *(["…"] if len(tokens) > most else [])])
