"""What a user holds: a thin object whose every method is one call downwards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any, cast

import torch
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
from ..circuits import (
    Circuit,
    ModelInfo,
    Subgraph,
    circuit_from_names,
    edge_scores,
    select_circuit,
)
from ..graph import Edge, Node
from ..methods import (
    OPERATOR_METHODS,
    TokenMatrix,
    TokenScores,
    plan_token_matrix,
    token_matrix,
    token_scores,
)
from ..operator import PLANNED, Plan
from ..sublayers import DENSE_LIMIT
from .frozen_run import FrozenRun
from .saved_file import load_capture, save_capture


class TensorLens(FrozenRun):
    """One run of a transformer as an affine map on its embedded tokens, and questions to it.

    ``model.run_with_tensorlens(prompt)`` and :func:`tensorlens_tl.capture` make one. It is exact
    for this run: ``readout(operator @ embedding + operator.bias)`` are the model's logits. It is
    not the Jacobian (patterns, scales and gating ratios are held, not differentiated), it has no
    query/key edges, and what it says is a decomposition, not a causal claim.

    Weights and logits are referenced, not copied: once the model's weights or the returned logits
    are written to, the lens refuses to answer instead of describing another run.

    Attributes:
        capture: The frozen run.
        versions: The tensors that are not the lens's own, and their versions at the capture.
    """

    # --- Where a logit comes from

    def attribute(
        self,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
        by: str = "token",
        effect: str = "direct",
        baseline: TensorLens | str | Float[Tensor, "*shape"] | None = None,
        at: str = "clean",
        qk: bool = False,
    ) -> Attribution:
        """Split a logit, or a difference of two, by where it comes from.

        Args:
            target: A token string, a token id, a direction in logits [d_vocab] or in the final
                normalized residual [d_model], or None for the model's own prediction.
            versus: Subtracted from the target: a target of the same kinds, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            by: What to split by.
                "token": every token's and position's embedding and every constant.
                "constant": every constant, by position; the embeddings as one row each.
                "component": every writer to the residual: embeddings, heads, MLPs, b_O, b_out, …
                "layer": the same, one row per layer.
                "head": the same, each head split over the positions it read.
                "mlp": the same as "component"; "neuron": each MLP split into its neurons.
                "dimension": the residual before the final norm, by dimension.
                "order": how many heads and MLPs were passed on the way to the target.
                "edge": what each node reads of each other's output: ``.select(dest="L2H1.v")``
                sums to what that head's values make of the target, "logits" to the target.
            effect: "direct": what is written at the target's position and read by the logits; sums
                to the target. "total": what is written anywhere, along all paths (by layer,
                component, head, mlp or neuron): influence, which overlaps and does not sum.
            baseline: What the target is compared with, by token, component or edge: another lens of
                a prompt of equal length (the corrupted one), "zero" (no embeddings), "mean" (the
                mean of W_E's rows as every token's embedding, positions kept) or an embedding
                [d_model] of your own. The rows then sum to the target here minus the target there;
                between two lenses one row is what the operators (by component: the readouts)
                changed. By edge, readers of one run read what writers add here and not there.
            at: With a lens as baseline, by whose operator the tokens are read: "clean" (this lens),
                "corrupted", or "secant": the one between the two runs, for which nothing is left
                that an operator changed (where logits are soft-capped, "readout change" is left: by
                edge, those into "logits" sum to the rest). Half-precision runs agree to their own
                rounding.
            qk: By edge: whether every head's queries and keys are readers, too, "L2H1.q" and
                "L2H1.k": the target's sensitivity to the attention scores times what a writer adds
                to them. First-order, unlike the rest, and in no sum.

        Returns:
            Contributions in logits, in the capture's compute dtype. ``.sum("pos")`` collapses
            positions.

        Raises:
            ValueError: If the target, the position, ``by`` or ``effect`` does not exist, or the
                baseline is of another length or model.
        """
        gradient = self._gradient(target, versus, pos)
        if baseline is None:
            if at != "clean":
                raise ValueError(
                    f"expected a baseline to go with at={at!r}, got none: leave at out"
                )
            return attribute(gradient, by, effect, qk)
        if effect != "direct":
            raise ValueError(f"expected effect to be direct with a baseline, got {effect!r}")
        if not isinstance(baseline, TensorLens):
            return difference(gradient, fixed_baseline(gradient, baseline), by, at, qk)
        check_comparable(self.capture, baseline.capture)
        predicted = own_prediction(self.capture, pos)  # one target for both runs
        return difference(gradient, baseline._gradient(target, versus, pos, predicted), by, at, qk)

    def attribute_many(
        self,
        targets: Sequence[TargetLike] | None = None,
        pos: int | Sequence[int] = -1,
        by: str = "token",
        effect: str = "direct",
        versus: TargetLike | Sequence[TargetLike] = None,
        qk: bool = False,
    ) -> tuple[Attribution, ...]:
        """Split many targets at once: one batched sweep, in chunks that bound memory.

        Args:
            targets: Targets as in :meth:`attribute`; None for the model's own prediction at every
                position of ``pos``.
            pos: One position, or one for each target. ``lens.attribute_many(pos=range(n))`` are the
                model's own predictions at the first n positions.
            by: As in :meth:`attribute`.
            effect: As in :meth:`attribute`.
            versus: Subtracted from the targets: a list with one for each, one for all, or None.
            qk: As in :meth:`attribute`.

        Returns:
            One attribution per target.

        Raises:
            ValueError: If there are none, or not as many targets as positions.
        """
        self._check_ready()
        if isinstance(targets, str):
            raise ValueError(f"expected a list of targets, got {targets!r}: put it in a list")
        one = isinstance(pos, Integral)
        places: list[Any] = [pos] if one else list(cast("Sequence[int]", pos))
        goals = [None] * len(places) if targets is None else list(targets)
        places = places * len(goals) if one else places
        others: list[Any] = (
            list(versus) if isinstance(versus, list | tuple) else [versus] * len(goals)
        )
        if not goals or len(goals) != len(places) or len(goals) != len(others):
            raise ValueError(
                f"expected as many positions as targets, and at least one, got {len(places)} and "
                f"{len(goals)}"
                + (f", and {len(others)} versus" if len(others) != len(goals) else "")
            )
        resolved = [
            resolve(self.capture, *each) for each in zip(goals, others, places, strict=True)
        ]
        found = attribute_many(self.capture, self.operator, resolved, by, effect, qk=qk)
        return tuple(found)

    # --- Circuits

    def circuit(self, nodes_or_edges: Circuit | Iterable[Edge | Node | str]) -> Subgraph:
        """The operator restricted to a subgraph: its logits, its share of a target, its attribution.

        Args:
            nodes_or_edges: A circuit; edges, "L0H1→L1H2.v"; or nodes, "L0H1", between which, the
                input and the logits all edges are kept.

        Returns:
            The restricted run. Patterns and scales stay the whole run's; constants that no node
            holds are always kept.

        Raises:
            ValueError: If there is no such node or edge, or the circuit is of another model.
        """
        operator = self.operator
        return Subgraph(self.capture, operator, circuit_from_names(self.capture, nodes_or_edges))

    def discover(
        self,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
        *,
        n_edges: int | None = None,
        threshold: float | None = None,
        selection: str = "greedy",
        qk: bool = True,
        corrupted: TensorLens | None = None,
        at: str | None = None,
    ) -> Circuit:
        """The edges that make a target: the largest scores, connected from the tokens to the logits.

        An edge's score is what a reader makes of what a writer adds; with a corrupted run, of what
        it adds here and not there. Whether the model needs those edges, only the real model tells.

        Args:
            target: As in :meth:`attribute`.
            versus: Subtracted from the target, or None.
            pos: Position of the prediction among the real tokens.
            n_edges: So many edges; or
            threshold: the smallest number an edge is ranked by.
            selection: "greedy" grows from the logits down by |score|; "absolute" and "signed" take the
                largest |score| or score; "influence" what shares of |score| carry to the logits.
            qk: Whether queries and keys are readers, too (first-order, but for "secant").
            corrupted: The lens of a corrupted prompt of equal length, or None.
            at: With it, whose covectors read the difference: by default "secant", the operator
                between the two runs, which is exact on their difference; or "clean", "corrupted".

        Returns:
            The circuit, with every edge's score: the mean over the lens's prompts.

        Raises:
            ValueError: If an argument makes no sense, or the corrupted run is not comparable.
        """
        at = at or ("secant" if isinstance(corrupted, TensorLens) else "clean")
        found = self.attribute(target, versus, pos, "edge", baseline=corrupted, at=at, qk=qk)
        names = list(dict.fromkeys(self._gradient(target, versus, pos).target.name))
        return select_circuit(
            ModelInfo.of_capture(self.capture), edge_scores(self.operator.wiring, found),
            n_edges, threshold, selection,
            target=", ".join(names[:3]) + (", …" if len(names) > 3 else ""),
            n_prompts=len(self), corrupted=corrupted is not None, convention=self.convention,
        )  # fmt: skip

    def loadings(
        self,
        source: int | str | Node | Edge,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
    ) -> Attribution:
        """How much of a source's effect on a target each head carries, layer by layer.

        Args:
            source: A position among the real tokens (the token at it), a node ("L0H3", "embed") or
                an edge ("L0H3→L2H1.v").
            target: As in :meth:`attribute`.
            versus: Subtracted from the target, or None.
            pos: Position of the prediction among the real tokens.

        Returns:
            For every layer above the source its heads, and ``L3.past`` for what no head of it moved:
            each layer's rows sum to the effect, which is the result's ``target_value``.

        Raises:
            ValueError: If the target, or the position, node or edge does not exist.
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
        goal = resolve(self.capture, target, versus, pos, predicted)
        return self._gradients.gradient(goal)

    @cached_property
    def _gradients(self) -> GradientCache:
        return GradientCache(self.capture, self.operator)

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
        """The k paths, from a source through heads and MLPs to a logit, that contribute the most.

        Each is a signed summand of the target; all of them, from all sources, sum to it, but they
        cancel: none is a share of it. See :func:`tensorlens_tl.attribution.paths.find_paths`.

        Args:
            target: As in :meth:`attribute`.
            k: How many paths.
            versus: Subtracted from the target, or None.
            pos: Position of the prediction among the real tokens.
            from_token: Position of a token whose embedding alone is the source; None for every
                token's and position's embedding and every constant.
            by_position: Whether paths at different positions inside are apart, not summed.
            constants: Whether constants are sources, too.
            max_expansions: When to stop searching; the result then says that it is not exact.
            memory_limit: Bytes the search's bounds may take.

        Returns:
            The paths, largest |contribution| first; exact unless the search was stopped.

        Raises:
            ValueError: If the lens holds several prompts, the target, the position or the token
                does not exist, or k < 1.
        """
        self._check_ready()
        goal = resolve(self.capture, target, versus, pos)
        return find_paths(
            self.capture, self.operator, goal, k, from_token, by_position, constants,
            max_expansions, memory_limit,
        )  # fmt: skip

    def token_matrix(
        self,
        name: str,
        target: TargetLike = None,
        layers: tuple[str, str] | None = None,
        *,
        model: Any = None,
        **options: Any,
    ) -> TokenMatrix:
        """How much of token j is in the output at i: a matrix [query_pos, key_pos] per prompt.

        The operator's own: "norm" ‖T_ij‖_F, "in" ‖T_ij x_j‖, "out" ‖T_ijᵀ u_i‖, "in_out" u_iᵀ T_ij x_j:
        signed, and with the constants' share a row sums to the target. Earlier methods by the same
        call: "rollout", "globenc", "attnlrp", … (:data:`tensorlens_tl.methods.METHODS`).

        Args:
            name: The method.
            target: u_i, for "out" and "in_out": None is the output's own direction y_i / ‖y_i‖,
                "prediction" the logit of each position's own prediction; a token, id or direction
                is taken everywhere.
            layers: A pair of residual sites: that part of the operator only.
            model: The captured model, for methods that differentiate it: their rows are for each
                position's own prediction.
            **options: Of the operator's own: ``probes`` (estimate "norm" from so many random
                vectors), their ``seed``, ``precision`` ("bfloat16"), ``memory_limit`` (bytes; by
                default half of what is free). Of earlier methods: theirs, such as ``steps``.

        Returns:
            The matrices.

        Raises:
            ValueError: If an argument is none of these, or the work does not fit.
        """
        return token_matrix(name, self.capture, self.operator, target, layers, model, **options)

    def token_scores(
        self,
        name: str,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
        *,
        model: Any = None,
        **options: Any,
    ) -> TokenScores:
        """How much of a target is due to every token, by any method of :meth:`token_matrix`.

        "in_out" are the tokens' shares of the target; "out" ‖T_jᵀ u‖ with its u. A method that knows
        no target gives its matrix's row at ``pos``.

        Args:
            name: The method.
            target: As in :meth:`attribute`.
            versus: Subtracted from the target, or None.
            pos: Position of the prediction among the real tokens.
            model: The captured model, for methods that differentiate it.
            **options: The method's own.

        Returns:
            The scores of every prompt's tokens.

        Raises:
            ValueError: If the method, the target or an option does not exist, or the model is missing.
        """
        goal = resolve(self.capture, target, versus, pos)
        return token_scores(name, self.capture, self.operator, goal, model, **options)

    def plan(self, what: str, **arguments: Any) -> Plan:
        """What a contraction will cost, before it runs: time, flops, peak memory, chunks.

        Args:
            what: A kind of :meth:`token_matrix`; or "block", "to_dense", "frobenius_norm",
                "svd" or "spectral_norm" of the operator.
            **arguments: The same that would be given to it.

        Returns:
            The plan. Rates are measured on products of these shapes, in a fraction of a second.

        Raises:
            ValueError: If the call itself would be refused.
        """
        if what in PLANNED:
            return self.operator.plan(what, **arguments)
        if what not in OPERATOR_METHODS:
            raise ValueError(
                f"expected one of {', '.join((*OPERATOR_METHODS, *PLANNED))}, got {what!r}"
            )
        return plan_token_matrix(what, self.capture, self.operator, **arguments)

    # --- In a file

    def save(self, path: str | os.PathLike[str], weights: bool = False) -> None:
        """Write the lens to a file, whole or not at all; :func:`tensorlens_tl.load` reads it.

        Args:
            path: Where to. A file that is there is replaced once the new one is complete.
            weights: Whether to store the model's weights, too. Without them the file holds a
                fingerprint of them, and an operator needs ``load(path, model=...)``.

        Raises:
            ValueError: If there is no such folder, or the lens has no weights to store.
        """
        save_capture(self.capture, path, weights)


def load(
    path: str | os.PathLike[str],
    model: Any = None,
    device: str | torch.device | None = None,
) -> TensorLens:
    """Read a lens that :meth:`TensorLens.save` wrote; nothing in the file is executed.

    Args:
        path: The file.
        model: The model it was made with. Its weights are compared with the saved fingerprint and
            used by reference. Without it, and without saved weights, the lens serves what needs
            none: logits, tokens, embedding, capture check.
        device: Where to put the tensors; by default the model's device, or else the CPU.

    Returns:
        The lens.

    Raises:
        ValueError: If the file is no saved lens or is damaged, or the model is another one; the
            message says what was expected, what came and what to do.
    """
    captured = load_capture(path, model, device)
    # Only a model's weights can be written to by others; a file's are the lens's own.
    return TensorLens(captured, () if model is None else captured.versions())
