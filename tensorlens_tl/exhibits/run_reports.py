"""The main pictures of one prompt on one page, each with how exact it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..checks import spelled, token_text
from ..operator import Capture
from ..pictures import Page, Paged, Tabled, View, table_view

PREDICTIONS = 10
"""How many of the likeliest tokens are listed."""


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class RunReport(Paged, Tabled):
    """The main results of one prompt, put together for one page.

    Attributes:
        title: The prompt, or what stands for it.
        exactness: Sentences on how exact the run is.
        predictions: The likeliest next tokens: text, logit and probability.
        results: The results by heading, in the order of the page.
        left_out: What could not be made, by heading, and why.

    Example:
        >>> from tensorlens_tl import demo
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> report = lens.report(target="Paris", versus="Rome")
        >>> list(report.results)[:2]
        ['By token', 'Through depth']
        >>> report.to_html().count("</script>")
        2
    """

    title: str
    exactness: tuple[str, ...]
    predictions: tuple[tuple[str, float, float], ...]
    results: dict[str, Paged]
    left_out: dict[str, str]

    _COLUMNS = ("rank", "token", "logit", "probability")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        return ((rank, *row) for rank, row in enumerate(self.predictions, 1))

    def _facts(self) -> dict[str, Any]:
        results: dict[str, Any] = dict(self.results)
        made = {name: json.loads(one.to_json()) for name, one in results.items()}
        return {"title": self.title, "results": made, "left_out": self.left_out}

    def __repr__(self) -> str:
        lines = [f"RunReport of {self.title!r}", *(f"  {text}" for text in self.exactness)]
        lines += [f"  {heading}: {_first(result)}" for heading, result in self.results.items()]
        return "\n".join([*lines, *self._missing()])

    def _missing(self) -> list[str]:
        return [f"  {heading} is left out: {why}" for heading, why in self.left_out.items()]

    def _page(self) -> Page:
        views, said = list(self._predicted()), dict[str, list[str]]()
        for heading, result in self.results.items():
            page = result._page()
            for note in page.notes:
                said.setdefault(note, []).append(heading)
            for i, view in enumerate(page.views):
                own = f"{heading}: {view.heading}" if view.heading else heading
                if not i and not view.heading:
                    own = f"{heading}: {page.title.removesuffix(f', {heading.lower()}')}"
                views.append(replace(view, heading=own))
        notes = [f"{', '.join(headings)}: {note}" for note, headings in said.items()]
        left = [line.strip() for line in self._missing()]
        return Page(self.title, views, [*self.exactness, *notes, *left], height=900)

    def _predicted(self) -> Sequence[View]:
        if not self.predictions:
            return ()
        labels = [[repr(text)] for text, *_ in self.predictions]
        values = np.array([row[1:] for row in self.predictions], dtype=np.float64)
        columns = ["logit", "probability"]
        return (table_view(["token"], columns, labels, values, heading="Predictions"),)


def reports_page(reports: Sequence[RunReport]) -> Page:
    """Put reports on one page, one tab for each.

    Args:
        reports: The reports of one prompt each, at least one.

    Returns:
        The page. That of a single report is its own.
    """
    pages = [report._page() for report in reports]
    if len(pages) == 1:
        return pages[0]
    views, notes = [], []
    for number, page in enumerate(pages, 1):
        views += [replace(view, tab=f"{number}: {page.title}") for view in page.views]
        notes += [f"{number}. {note}" for note in page.notes]
    return Page(f"{len(pages)} prompts", views, notes, tabs=True, height=900)


def likeliest(capture: Capture, pos: int) -> tuple[tuple[str, float, float], ...]:
    """The likeliest tokens after a position: text, logit and probability, the first prompt's.

    Args:
        capture: The captured run.
        pos: The position, among the real tokens.

    Returns:
        At most :data:`PREDICTIONS` rows, the likeliest first.
    """
    logits = capture.logits_at(capture.frame.index(pos))[0].detach().double().cpu()
    best, shares = logits.topk(min(PREDICTIONS, len(logits))), logits.softmax(-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple((token_text(capture.tokenizer, i), x, float(shares[i])) for i, x in rows)


def _first(result: Paged) -> str:
    return repr(result).splitlines()[0]
