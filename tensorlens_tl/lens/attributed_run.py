"""Where a logit comes from: splits, paths and head loadings of one captured run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..attribution import (
    Attribution,
    GradientCache,
    Paths,
    TargetGradient,
    TargetLike,
    attribute,
    attribute_many,
    check_comparable,
    difference,
    find_paths,
    fixed_baseline,
    loadings,
    own_prediction,
    resolve,
)
from ..checks import as_list
from ..graph import Edge, Node
from ..sublayers import DENSE_LIMIT
from .frozen_run import FrozenRun


class AttributedRun(FrozenRun):
    """A captured run whose logits can be split by where they come from.

    Attributes:
        capture: The captured run.
        versions: Tensors of the model or the user, each with its version at the capture.
    """

    def attribute(
        self,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
        by: str = "token",
        effect: str = "direct",
        baseline: AttributedRun | str | Float[Tensor, "*shape"] | None = None,
        at: str = "clean",
        qk: bool = False,
    ) -> Attribution:
        """Split a logit, or a difference of two logits, by where it comes from.

        Args:
            target: What to split: a token string, a token id, a direction in logits [d_vocab] or in
                the final normalized residual [d_model], or None for the model's own prediction.
            versus: What is subtracted from the target, of the same kinds; None subtracts nothing.
            pos: Position of the prediction among the real tokens; −1 is the last.
            by: The kind of source.

                * "token": every token's and every position's embedding, and every constant.
                * "constant": every constant, by position; each kind of embedding is one row.
                * "component": every writer: embeddings, heads, MLPs and constants (b_O, b_out, …).
                * "layer": the same as "component", with one row per layer.
                * "head": the same as "component", each head split over the positions it read.
                * "mlp": the same as "component". "neuron": each MLP split into its neurons.
                * "dimension": the residual before the final norm, by dimension.
                * "order": the number of heads and MLPs passed on the way to the target.
                * "edge": what each node reads of each other node's output. The rows of one reader,
                  ``.select(dest="L2H1.v")``, sum to that reader's effect; those of "logits" sum to
                  the target.
            effect: "direct" takes what is written at the target's position and read by the logits.
                Direct effects sum to the target. "total" takes what is written anywhere, along all
                paths. Total effects are influence: they overlap and do not sum. They exist for
                layer, component, head, mlp and neuron.
            baseline: What the run is compared with, by token, component or edge. Pass the lens of a
                corrupted prompt of equal length, "zero" (no embeddings), "mean" (the mean of W_E's
                rows as every token's embedding, positions kept), or an embedding [d_model]. The
                rows then sum to the target in this run minus the target in the baseline. One row
                between two lenses is what the operators changed, or by component the readouts. By
                edge, the readers of one run read what writers add here and not in the baseline.
            at: The operator that reads the difference to a baseline lens: "clean" (of this lens),
                "corrupted" (of the baseline), or "secant" (between the two runs). With "secant"
                no row is left that an operator changed. Soft-capped logits leave one row,
                "readout change"; by edge, those into "logits" sum to the rest.
            qk: Whether every head's queries and keys are readers, too, only by edge: "L2H1.q" and
                "L2H1.k". Their rows are the target's sensitivity to the attention scores, times
                what a writer adds to the scores. They are first-order and in no sum.

        Returns:
            Contributions in logits, in the capture's compute dtype. ``.sum("pos")`` sums positions.

        Raises:
            ValueError: If the target, the position, ``by`` or ``effect`` does not exist, or if the
                baseline is of another length or model.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> found = lens.attribute("Paris")
            >>> [(label, round(value, 1)) for label, value in found.top(2)]
            [('"France"@4', 15.6), ('"capital"@2', 6.0)]
        """
        gradient = self._gradient(target, versus, pos)
        if baseline is None:
            if at != "clean":
                raise ValueError(f"at={at!r} needs a baseline. Pass baseline=, or drop at=.")
            return attribute(gradient, by, effect, qk)
        if effect != "direct":
            raise ValueError(
                f"effect={effect!r} is not available with a baseline. Drop effect= or baseline=."
            )
        if not isinstance(baseline, AttributedRun):
            return difference(gradient, fixed_baseline(gradient, baseline), by, at, qk)
        check_comparable(self.capture, baseline.capture)
        predicted = own_prediction(self.capture, pos)  # one target for both runs
        return difference(gradient, baseline._gradient(target, versus, pos, predicted), by, at, qk)

    def attribute_many(
        self,
        target: TargetLike | Sequence[TargetLike] = None,
        pos: int | Sequence[int] = -1,
        by: str = "token",
        effect: str = "direct",
        versus: TargetLike | Sequence[TargetLike] = None,
        qk: bool = False,
    ) -> tuple[Attribution, ...]:
        """Split many targets at once: in one batched sweep, cut in chunks that bound memory.

        Each of ``target``, ``pos`` and ``versus`` is one value for all splits, or a list with one
        value per split. ``lens.attribute_many(pos=range(n))`` splits the model's own predictions at
        the first n positions.

        Args:
            target: One target or a list, each as in :meth:`attribute`.
            pos: One position among the real tokens, or a list.
            by: The kind of source, as in :meth:`attribute`.
            effect: "direct" or "total", as in :meth:`attribute`.
            versus: What is subtracted from the target: one for all, a list, or None.
            qk: Whether queries and keys are readers, too, as in :meth:`attribute`.

        Returns:
            One attribution per split, in order.

        Raises:
            ValueError: If the lists are empty or of unequal lengths.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> paris, rome = lens.attribute_many(["Paris", "Rome"])
            >>> paris.target, rome.target
            (("'Paris'",), ("'Rome'",))
        """
        self._check_ready()
        given = {"target": target, "pos": pos, "versus": versus}
        pairs = ((name, _as_many(value)) for name, value in given.items())
        lists = {name: values for name, values in pairs if values is not None}
        sizes = {len(values) for values in lists.values()} or {1}
        if len(sizes) > 1 or 0 in sizes:
            shown = ", ".join(f"{name} has {len(values)} entries" for name, values in lists.items())
            raise ValueError(
                f"The lists cannot be paired: {shown}. Give lists of one length, at least 1, or "
                "one value for all."
            )
        n = sizes.pop()
        rows = zip(*(lists.get(name, [value] * n) for name, value in given.items()), strict=True)
        resolved = [resolve(self.capture, goal, foil, place) for goal, place, foil in rows]
        return tuple(attribute_many(self.capture, self.operator, resolved, by, effect, qk=qk))

    def paths(
        self,
        target: TargetLike = None,
        k: int = 10,
        versus: TargetLike = None,
        pos: int = -1,
        from_token: int | None = None,
        by_position: bool = False,
        constants: bool = True,
        max_expansions: int = 10_000,
        memory_limit: int = DENSE_LIMIT,
    ) -> Paths:
        """Find the k paths from a source through heads and MLPs to a logit that contribute most.

        Each path is a signed summand of the target. All paths from all sources sum to the target,
        but they cancel: none is a share of it. The search is exact, unless it stops at its budget.

        Args:
            target: As in :meth:`attribute`.
            k: How many paths to find.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            from_token: Position of a token whose embedding alone is the source. None takes every
                token's and position's embedding and every constant.
            by_position: Whether paths at different positions inside are apart, not summed.
            constants: Whether constants are sources, too.
            max_expansions: How many partial paths to extend before the search stops.
            memory_limit: Bytes that the search may take for its bounds.

        Returns:
            The paths. ``exact`` says whether the search was completed.

        Raises:
            ValueError: If there are several prompts, or an argument does not fit.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.paths("Paris", k=1)[0].name
            '"France"@4 → L0MLP → L1H0 → L3MLP → logits'
        """
        self._check_ready()
        goal = resolve(self.capture, target, versus, pos)
        return find_paths(
            self.capture,
            self.operator,
            goal,
            k,
            from_token,
            by_position,
            constants,
            max_expansions,
            memory_limit,
        )

    def loadings(
        self,
        source: int | str | Node | Edge,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
    ) -> Attribution:
        """Split a source's effect on a target by the heads that carry it, layer by layer.

        Args:
            source: A position among the real tokens (the token there), a node such as "L0H3" or
                "embed", or an edge such as "L0H3→L2H1.v".
            target: As in :meth:`attribute`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.

        Returns:
            The heads of every layer above the source, and one row per layer, such as ``L3.past``,
            for what no head of that layer moved. The rows of each layer sum to the effect of the
            source, which is the result's ``target_value``.

        Raises:
            ValueError: If the target, or the position, node or edge does not exist.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> carried = dict(lens.loadings(4, "Paris").top(20))  # position 4 is "France"
            >>> round(carried["L1H0"], 1), round(carried["L1H1"], 1)
            (9.0, 6.5)
        """
        if isinstance(source, str):
            source = Edge.parse(source) if "→" in source or "->" in source else Node.parse(source)
        return loadings(self._gradient(target, versus, pos), source)

    def _gradient(
        self,
        target: TargetLike,
        versus: TargetLike,
        pos: int,
        predicted: Int[Tensor, " batch"] | None = None,
    ) -> TargetGradient:
        self._check_ready()
        return self._gradients.gradient(resolve(self.capture, target, versus, pos, predicted))

    @cached_property
    def _gradients(self) -> GradientCache:
        return GradientCache(self.capture, self.operator)


def _as_many(given: Any) -> list[Any] | None:
    """The values of a list, a range, ids [n] or directions [n, d]; None for a single value."""
    given = as_list(given)
    many = isinstance(given, list | tuple | range) or getattr(given, "ndim", 0) == 2
    return list(given) if many else None
