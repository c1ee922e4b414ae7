"""What questions to a captured run will cost."""

from __future__ import annotations

from typing import Any

from ..attribution import check_split, plan_edges
from ..checks import as_list, at_least_one, bound, spelled
from ..circuits import plan_score_edges
from ..costs import Cost, Plan
from ..methods import OPERATOR_METHODS, plan_token_matrix
from ..operator import PLANNED, Capture, FrozenTransformer
from ..sublayers import Attention, Experts
from .pictured_run import PicturedRun
from .planning import plan, rehearsable
from .sequence_attribution import continuation_targets

_OF_MODELS = ("faithfulness", "faithfulness_curve", "evaluate", "mean_attribution", "validity")
"""Functions that run the real model, which a lens does not hold."""

CALLS = {"token": (8, 220), "order": (58, 640)}
"""Calls of torch that a split makes beside its sweeps, for every step and for every target."""

BATCHED = tuple(CALLS)
"""Splits whose sweeps are carried side by side. All others are rehearsed."""

_KNOWN = (
    *("capture", "attribute", "attribute_many", "attribute_sequence", "discover", "feature_graph"),
    *("score_edges", "token_matrix", *OPERATOR_METHODS, *PLANNED),
)


@spelled
class PlannedRun(PicturedRun):
    """A captured run that tells what questions to it will cost."""

    def plan(self, what: str, **arguments: Any) -> Plan:
        """Estimate what a computation will cost, before it runs.

        Args:
            what: "capture", "attribute", "attribute_many", "attribute_sequence", "discover",
                "feature_graph", "score_edges", "token_matrix" or one of its methods ("norm", "in",
                "out", "in_out"), or of the operator "block", "to_dense", "frobenius_norm", "svd" or
                "spectral_norm". A split by token is a sweep, one by order a sweep per step. Of
                :func:`tensorlens_tl.score_edges` it is the runs of the real model for prompts as
                many and as long as the lens's. Any other method of the lens, such as "paths", is
                rehearsed as by :func:`tensorlens_tl.plan`.
            **arguments: The arguments that the call itself would get. Of score_edges these are
                ``method`` and ``steps``; of capture ``n_pos``, the number of tokens of another
                prompt of the same model, and ``pattern``.

        Returns:
            Time, flops, peak memory and chunks. The machine's rates are measured on products of
            these shapes, in a fraction of a second.

        Raises:
            ValueError: If the call itself would be refused.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.plan("norm").flops > 0
            True
        """
        if what in PLANNED:
            return self.operator.plan(what, **arguments)
        if what in ("attribute_many", "attribute_sequence"):
            return self._plan_many(what, arguments, bound(getattr(self, what), arguments))
        if what in ("capture", "score_edges"):
            call = getattr(_Calls(self), what)
            return call(**bound(call, arguments))
        if what == "feature_graph":
            return self._plan_feature_graph(bound(self.feature_graph, arguments))
        if what in ("attribute", "discover"):
            return self._plan_split(what, arguments, bound(getattr(self, what), arguments))
        if what == "token_matrix":
            call = getattr(self, what)
            what = bound(call, arguments)["name"]
            if what not in OPERATOR_METHODS:
                return plan(call, **arguments)
            arguments = {name: value for name, value in arguments.items() if name != "name"}
        if what in OPERATOR_METHODS:
            return plan_token_matrix(what, self.capture, self.operator, **arguments)
        if what in _OF_MODELS:
            raise ValueError(
                f"There is no plan of {what!r} in a lens, as it runs the real model. Pass the "
                "function and its arguments to tensorlens_tl.plan."
            )
        if not rehearsable(self, what):
            known = ", ".join(_KNOWN)
            raise ValueError(f"There is no plan of {what!r}. Use a method of the lens, or {known}.")
        return plan(getattr(self, what), **arguments)

    def _plan_split(self, what: str, arguments: dict[str, Any], given: dict[str, Any]) -> Plan:
        baseline = given.get("baseline", given.get("corrupted"))
        at = None if baseline is None else given["at"] or "secant"
        if given.get("by", "edge") == "edge":
            embeddings = len(self.capture.embeddings)
            return plan_edges(self.operator, embeddings, at, given["qk"], what)
        if given["by"] == "feature" and at is None:
            return self._plan_by_feature(given["saes"], what)
        check_split(given["by"], given["effect"])
        if at is not None or given["by"] not in BATCHED:
            return plan(getattr(self, what), **arguments)
        return self.operator.plan_pull(
            what, self._tables(given["by"], 1), many=self._sweeps(given["by"])
        )

    def _plan_many(self, what: str, arguments: dict[str, Any], given: dict[str, Any]) -> Plan:
        check_split(given["by"], given.get("effect", "direct"))
        if given["by"] not in BATCHED or given.get("site") is not None:
            return plan(getattr(self, what), **arguments)
        if what == "attribute_sequence":
            found = continuation_targets(self.capture, given["continuation"], given["of"])
            many, apart = len(found[0]), len(found[0]) > 1
        else:
            lists = [as_list(given[name]) for name in ("target", "pos", "versus")]
            many = max((len(one) for one in lists if _is_list(one)), default=1)
            apart = _is_list(lists[1]) and len(set(lists[1])) > 1
        tables = self._tables(given["by"], many)
        sweeps = many * self._sweeps(given["by"])
        return self.operator.plan_pull(what, tables, many=sweeps, apart=apart)

    def _tables(self, by: str, many: int) -> Cost:
        """The calls that name and sum the rows of some targets, and join them."""
        per_step, besides = CALLS[by]
        return Cost(calls=(many + (many > 1)) * (per_step * len(self.operator.steps) + besides))

    def _sweeps(self, by: str) -> int:
        """How many sweeps a split takes: orders take one for every step."""
        return len(self.operator.steps) if by == "order" else 1


class _Calls:
    """Calls by their names and with their arguments, that give their plans."""

    def __init__(self, run: PlannedRun):
        self.run = run

    def score_edges(self, method: str = "eap", steps: int = 5) -> Plan:
        return plan_score_edges(self.run.capture, self.run.operator, method, steps)

    def capture(self, n_pos: int | None = None, pattern: str = "stored") -> Plan:
        n = self.run.capture.frame.n_pos if n_pos is None else at_least_one(n_pos, "n_pos")
        if pattern not in ("stored", "recomputed"):
            raise ValueError(
                f'pattern={pattern!r} is not known. Give pattern="stored" or pattern="recomputed".'
            )
        return plan_capture(self.run.capture, self.run.operator, n, pattern == "stored")


def plan_capture(capture: Capture, operator: FrozenTransformer, n_pos: int, stored: bool) -> Plan:
    """Predict what another capture of the same model costs: its forward pass, and what is kept.

    Args:
        capture: A captured run of the model, of as many prompts.
        operator: The operator of that run.
        n_pos: Number of tokens of each prompt of the other run.
        stored: Whether attention patterns are stored, or recomputed from queries and keys.

    Returns:
        The plan. Nothing has run but products that measure the machine.

    Raises:
        ValueError: If the model has blocks whose work the tokens decide, or that are no attention.
    """
    frame, D, cost, kept = capture.frame, operator.in_dim, Cost(), 0
    rows, cells = frame.batch * n_pos, frame.batch * n_pos**2
    for block in capture.blocks:
        if not isinstance(block.attn, Attention) or isinstance(block.mlp, Experts):
            raise ValueError(
                "There is no plan of captures with experts or without attention. Time a short one."
            )
        w, mlp = block.attn.weights, block.mlp
        gated, width = hasattr(mlp, "pre_linear"), 0 if mlp is None else mlp.output.in_dim
        heads, z = len(w.W_O), w.W_O.numel() // D
        cost.product += 2 * rows * (2 * w.W_O.numel() + 2 * w.W_V.numel())
        cost.product += 2 * rows * (3 if gated else 2) * width * D
        cost.mixing += 4 * cells * z * (1 if stored else 2)  # the check mixes anew
        cost.moved += rows * (8 * D + 3 * width) + 3 * heads * cells
        cost.moved += 2 * w.W_O.numel() + 2 * w.W_V.numel() + (3 if gated else 2) * width * D
        cost.calls += 390
        kept += heads * cells if stored else rows * 2 * z
        kept += rows * (2 * D + width)  # states before both branches, and ratios
    W_U = capture.unembed.weights.W_U
    cost.product += 2 * rows * W_U.numel()
    kept += rows * W_U.shape[-1]
    return operator.plan_work("capture", cost, kept * frame.dtype.itemsize)


def _is_list(given: Any) -> bool:
    return isinstance(given, list | tuple | range)
