"""Results of one run that are made for looking at."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ..attribution import TargetLike, check_comparable, own_prediction
from ..checks import as_list, kind_of, spelled
from ..exhibits import (
    HeadMaps,
    OperatorMaps,
    PromptComparison,
    RunReport,
    Waterfall,
    compare_prompts,
    likeliest,
    logit_waterfall,
    maps_by_depth,
    maps_of_heads,
)
from .exported_run import ExportedRun


@spelled
class PicturedRun(ExportedRun):
    """A captured run with results that are pages: ``.show()``, ``.to_html(path)``."""

    def operator_maps(
        self,
        target: TargetLike = "prediction",
        baseline: str | None = "rollout",
        sites: Sequence[str | int] | None = None,
        *,
        model: Any = None,
    ) -> OperatorMaps:
        """Map tokens to predictions from every depth: what each position's logit is made of.

        Entry (i, j) is u_iᵀ T_ij x_j in the units of the target, with T from a residual site to the
        logits and x_j the residual at that site. A row and the constants sum to the target.

        Args:
            target: What each row reads. "prediction" is the logit of each position's own
                prediction. A token, an id or a direction is read at all positions.
            baseline: An earlier method of :meth:`token_matrix` that stands beside, or None.
            sites: Where the maps start: names of residual sites, or numbers of blocks. None is
                every site, or four sites where there are more than 512 tokens.
            model: The captured model, for a baseline that runs it again.

        Returns:
            The maps, whose page has a slider through the depths.

        Raises:
            ValueError: If a site, the target or the baseline does not exist.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.operator_maps("Paris", sites=[0, 2])
            OperatorMaps(the logit of 'Paris', 6 × 6, 2 depths, beside rollout)
        """
        self._check_ready()
        return maps_by_depth(self.capture, self._operator, target, baseline, sites, model)

    def waterfall(
        self, target: TargetLike = None, versus: TargetLike = None, pos: int = -1
    ) -> Waterfall:
        """Follow a logit through depth: what every sublayer adds, and the logit lens beside.

        Args:
            target: As in :meth:`attribute`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.

        Returns:
            The steps, which sum to the target.

        Raises:
            ValueError: If the target or the position does not exist.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> found = lens.waterfall("Paris", "Rome")
            >>> found.steps[int(found.sums[0].argmax())]
            'L3 MLP'
        """
        return logit_waterfall(self._gradient(target, versus, pos), target, versus, pos)

    def compare(
        self,
        other: PicturedRun,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
    ) -> PromptComparison:
        """Compare a target in two prompts of one length, and split its difference exactly.

        Args:
            other: The lens of the other prompt, such as a corrupted one.
            target: As in :meth:`attribute`. None is this run's own prediction, in both runs.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.

        Returns:
            The target by token in both runs, and the difference by token and by component, read by
            the operator between the two runs.

        Raises:
            ValueError: If the other lens is of another model or length, or the target does not
                exist.

        Example:
            >>> from tensorlens_tl import demo
            >>> model = demo.load_model()
            >>> _, lens = model.run_with_tensorlens("The capital of France is")
            >>> _, other = model.run_with_tensorlens("The capital of Italy is")
            >>> [label for label, _ in lens.compare(other, "Paris").tokens.top(1)]
            ['"France"@4 − "Italy"@4']
        """
        if not isinstance(other, PicturedRun):
            raise ValueError(
                f"other is {kind_of(other)}, not a lens. Capture the other prompt, and pass its "
                "lens."
            )
        check_comparable(self.capture, other.capture, "other run")
        predicted = own_prediction(self.capture, pos) if target is None else None
        return compare_prompts(
            self._gradient(target, versus, pos), other._gradient(target, versus, pos, predicted)
        )

    def head_maps(self, heads: str | Sequence[str], target: TargetLike = None) -> HeadMaps:
        """Show where heads attend, and what they add to the logits from there.

        Args:
            heads: Names of heads, such as "L1H2".
            target: What is read at every position: a token, an id or a direction. None is each
                position's own prediction.

        Returns:
            The pattern of every head, and its direct effect [query_pos, key_pos] on the target of
            each position.

        Raises:
            ValueError: If a head or the target does not exist.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.head_maps("L1H0")
            HeadMaps(L1H0, 6 × 6, of its own prediction)
        """
        self._check_ready()
        names = [heads] if isinstance(heads, str) else list(as_list(heads))
        return maps_of_heads(self.capture, names, target)

    def report(
        self,
        path: str | os.PathLike[str] | None = None,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
    ) -> RunReport:
        """Put the main pictures of one prompt on one page, each with how exact it is.

        The page holds the predictions; the target by token, through depth, by head and as a graph;
        and the operator's map from every depth. All rows are there, whatever text forms leave out.

        Args:
            path: A file to write the page to, whole or not at all. None writes none.
            target: As in :meth:`attribute`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.

        Returns:
            The report. What a model cannot have is named there with the reason.

        Raises:
            ValueError: If there are several prompts, the target or the position does not exist, or
                the folder does not.

        Example:
            >>> import os, tempfile
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = lens.report(os.path.join(folder, "report.html"), "Paris", "Rome")
            ...     os.listdir(folder)
            ['report.html']
        """
        if len(self) != 1:
            raise ValueError(
                f"report is of one prompt, but the lens has {len(self)}. Take one with lens[i]."
            )
        goal = target, versus, pos
        results: dict[str, Any] = {"By token": self.attribute(*goal)}
        left_out: dict[str, str] = {}

        def add(heading: str, *ways: Callable[[], Any]) -> None:
            for make in ways:
                try:
                    results[heading] = make()
                    return
                except ValueError as error:  # what this model or target cannot have
                    left_out[heading] = str(error)

        read = "prediction" if target is None else target
        add("Through depth", lambda: self.waterfall(*goal))
        add(
            "The operator",
            lambda: self.operator_maps(read),
            lambda: self.operator_maps(read, None),
        )
        add(
            "As a graph",
            lambda: self.attribution_graph(*goal),
            lambda: self.attribution_graph(*goal, qk=False),
        )
        add("By head", lambda: self.attribute(*goal, by="head"))
        exact = (
            f"{self.capture.model_name}: {self.exactness}, capture check {self.capture_check:.0e}.",
            f"The convention for gated MLPs is {self.convention.gate!r}.",
        )
        left_out = {name: why for name, why in left_out.items() if name not in results}
        found = RunReport(self.prompt, exact, likeliest(self.capture, pos), results, left_out)
        if path is not None:
            found.to_html(path)
        return found
