"""What a user holds: a thin object whose every method is one call downwards."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from ..attribution import TargetLike, check_comparable, resolve
from ..checks import kind_of, spelled
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
    LogitLens,
    Routing,
    TokenMatrix,
    TokenScores,
    logit_lens,
    token_matrix,
    token_scores,
)
from ..saving import load_capture, save_capture
from .planned_run import PlannedRun
from .write_check import WriteCheck


@spelled
class TensorLens(PlannedRun):
    """One run of a transformer as an exact linear map, and every question to it as one call.

    A lens is made by ``model.run_with_tensorlens(prompt)`` or :func:`tensorlens_tl.capture`. Three
    things are frozen at their values in this run: attention patterns, norm scales, gating ratios.
    What remains is affine in the embedded prompt X: y = T X + c, and the logits are ``readout(y)``.
    This is exact: the lens gives the model's own logits, up to rounding.

    ===============================================  ==============================================
    Question                                         Call
    ===============================================  ==============================================
    Which words does a logit come from?              ``lens.attribute("Paris", versus="Rome")``
    Which heads, MLPs, neurons, constants, edges?    ``lens.attribute("Paris", by="head")``
    What changed between two prompts?                ``lens.attribute(baseline=other_lens)``
    Why are two sentences close?                     ``lens.attribute_similarity(other_lens)``
    What do many targets or positions come from?     ``lens.attribute_many(pos=range(3))``
    Where does every token of an answer come from?   ``lens.attribute_sequence("ele phant")``
    What does every component write directly?        ``lens.dla("Paris", versus="Rome")``
    What would the model say after each layer?       ``lens.logit_lens()``
    How does a logit grow through depth?             ``lens.waterfall("Paris").show()``
    What does the operator's map look like?          ``lens.operator_maps().show()``
    What makes a direction at a layer?               ``lens.attribute(direction, site=5)``
    Which chains of heads and MLPs carry it?         ``lens.paths("Paris", k=10)``
    Which heads carry what a token contributes?      ``lens.loadings(4, "Paris")``
    How much of token j is in the output at i?       ``lens.token_matrix("norm")``
    How important is each token, by any method?      ``lens.token_scores("rollout", "Paris")``
    Which edges make up the behaviour?               ``lens.discover("Paris", n_edges=40)``
    What does a given subgraph alone compute?        ``lens.circuit(["L0H1", "L2MLP"])``
    How do tokens, heads and MLPs make it together?  ``lens.attribution_graph("Paris")``
    What is T itself?                                ``lens.operator``, ``lens.between(a, b)``
    How exact is all this?                           ``lens.completeness_error``, ``lens.verify()``
    What will a large computation cost?              ``lens.plan("norm")``
    How do I show it to a colleague?                 ``lens.report("report.html")``
    How do I keep the lens?                          ``lens.save(path)``, ``tensorlens_tl.load``
    ===============================================  ==============================================

    Three things a lens is not. It is not the Jacobian, which also differentiates what is frozen
    here. It has no query and key edges of its own; ``qk=True`` adds first-order ones. And it makes
    no causal claim: it decomposes this run, and only the real model tells what an ablation does.

    Weights and logits are referenced, not copied. Once the weights or the returned logits are
    written to, the lens refuses to answer, as it would describe another run. It compares some
    numbers of every weight for that; only a write to a few numbers of a matrix may be missed.

    A lens of several prompts is a batch: ``len(lens)``, ``lens[i]``, ``lens[0:2]`` and a loop give
    its prompts. ``lens.to("cpu")`` moves it. Pickles and copies have their own weights.

    Attributes:
        capture: The captured run.
        writes: What tells whether the weights or the returned logits were written to.

    Example:
        >>> from tensorlens_tl import demo
        >>> logits, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> lens
        TensorLens(tensorlens_tl demo, 6 tokens, <bos> added in front, ...)
        >>> [(label, round(value, 1)) for label, value in lens.attribute("Paris").top(2)]
        [('"France"@4', 15.6), ('"capital"@2', 6.0)]
        >>> lens.completeness_error < 1e-5
        True
    """

    # --- Circuits

    def circuit(self, nodes_or_edges: Circuit | Iterable[Edge | Node | str]) -> Subgraph:
        """Restrict the operator to a subgraph.

        Args:
            nodes_or_edges: A circuit, edges such as "L0H1→L1H2.v", or nodes such as "L0H1". Between
                nodes, the input and the logits, all edges are kept.

        Returns:
            The restricted run: its logits, its share of a target, its attribution. Patterns and
            scales stay those of the whole run. Constants that no node holds are always kept.

        Raises:
            ValueError: If there is no such node or edge, or the circuit is of another model.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.circuit(["L0MLP", "L1H0", "L3MLP"])
            Subgraph(tensorlens_tl demo, ... edges, 5 nodes)
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
        """Find the edges that make a target: the largest scores, connected from tokens to logits.

        The score of an edge is what a reader makes of what a writer adds. With a corrupted run, it
        is what the reader makes of what the writer adds here and not there. Only the real model
        tells whether it needs those edges: see :meth:`Circuit.faithfulness`.

        Args:
            target: As in :meth:`attribute`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            n_edges: Size of the circuit. Give either this or ``threshold``.
            threshold: Keep every edge ranked at or above this value, plus the edges needed to
                connect it.
            selection: Ranking rule. "greedy" grows from the logits down by |score|. "absolute" and
                "signed" take the largest |score| or score. "influence" follows the shares of
                |score| that reach the logits.
            qk: Whether queries and keys are readers, too. Their edges are first-order, except with
                ``at="secant"``.
            corrupted: The lens of a corrupted prompt of equal length, or None.
            at: The operator that reads the difference to the corrupted run: "clean", "corrupted" or
                "secant", which is exact on the difference. None means "secant" with a corrupted
                run, and "clean" without.

        Returns:
            The circuit, with the score of every edge, averaged over the prompts of the lens.

        Raises:
            ValueError: If an argument does not fit, or the corrupted run is not comparable.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> len(lens.discover("Paris", versus="Rome", n_edges=20))
            20
        """
        if corrupted is None and at not in (None, "clean"):
            raise ValueError(f"at={at!r} needs a corrupted run. Pass corrupted=, or drop at=.")
        if isinstance(corrupted, TensorLens):
            check_comparable(self.capture, corrupted.capture, "corrupted run")
        elif corrupted is not None:
            raise ValueError(
                f"corrupted is {kind_of(corrupted)}, not a lens. Capture the corrupted "
                "prompt, and pass its lens."
            )
        at = at or ("clean" if corrupted is None else "secant")
        found = self.attribute(target, versus, pos, "edge", baseline=corrupted, at=at, qk=qk)
        names = list(dict.fromkeys(self._gradient(target, versus, pos).target.name))
        return select_circuit(
            ModelInfo.of_capture(self.capture),
            edge_scores(self.operator.wiring, found),
            n_edges,
            threshold,
            selection,
            target=", ".join(names[:3]) + (", …" if len(names) > 3 else ""),
            n_prompts=len(self),
            corrupted=corrupted is not None,
            convention=self.convention,
        )

    # --- Tokens by tokens

    def token_matrix(
        self,
        name: str,
        target: TargetLike = None,
        layers: tuple[str | int, str | int] | None = None,
        *,
        model: Any = None,
        **options: Any,
    ) -> TokenMatrix:
        """Measure how much of token j is in the output at i: one matrix [query_pos, key_pos] each.

        The operator's own methods are "norm" ‖T_ij‖_F, "in" ‖T_ij x_j‖, "out" ‖T_ijᵀ u_i‖ and
        "in_out" u_iᵀ T_ij x_j. The last is signed: with the share of the constants, a row sums to
        the target. Earlier methods have the same call: "rollout", "globenc", "attnlrp", …; see
        :data:`tensorlens_tl.methods.METHODS`.

        Args:
            name: The method, such as "norm".
            target: The u_i of "out" and "in_out". None is the output's own direction y_i / ‖y_i‖,
                "prediction" the logit of each position's own prediction. A token, id or direction
                is taken at all positions.
            layers: Two residual sites, to measure only the operator between them, or the first
                and the last block: (0, 2) is blocks 0 to 2. None for all.
            model: The captured model, for methods that differentiate it. Their rows are for the own
                prediction of each position.
            **options: Options of the method. Of the operator's own: ``probes`` (estimate "norm"
                from this many random vectors), ``seed`` (of the probes), ``precision``
                ("bfloat16") and ``memory_limit`` (bytes; by default half of what is free).

        Returns:
            One matrix per prompt.

        Raises:
            ValueError: If an argument does not exist, or the work does not fit in memory.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.token_matrix("in_out", "Paris").values.shape
            torch.Size([1, 6, 6])
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
        """Measure how much of a target is due to each token, by any method of :meth:`token_matrix`.

        "in_out" gives the tokens' shares of the target, "out" ‖T_jᵀ u‖ with its u. A method that
        knows no target gives the row of its matrix at ``pos``.

        Args:
            name: The method, such as "in_out".
            target: As in :meth:`attribute`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            model: The captured model, for methods that differentiate it.
            **options: Options of the method.

        Returns:
            One score per token, for every prompt.

        Raises:
            ValueError: If the method, the target or an option does not exist, or if the method
                needs ``model``.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> scores = lens.token_scores("in_out", "Paris")
            >>> lens.tokens[0][scores[0].argmax()]
            'France'
        """
        self._check_ready()
        goal = resolve(self.capture, target, versus, pos)
        return token_scores(name, self.capture, self.operator, goal, model, **options)

    def logit_lens(self, pos: int | None = -1, norm: str = "anew") -> LogitLens:
        """Read the residual at every site as if it were the last one: what the model would say.

        Args:
            pos: Position among the real tokens; −1 is the last. None is every position.
            norm: How the final norm reads an earlier residual. "anew" computes its scale from that
                residual, as the logit lens of nostalgebraist does. "frozen" keeps the scale of the
                run: what a layer adds to the residual is then what it adds to the logits.

        Returns:
            The logits of every site, from the embeddings to the last block. The last ones are the
            model's own.

        Raises:
            ValueError: If the position or ``norm`` does not exist, or the logits would fill memory.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> found = lens.logit_lens()
            >>> said = [row.token for row in found.rows(k=1)]  # the likeliest token of each site
            >>> said[0], said[-1]
            ('is', 'Paris')
        """
        return logit_lens(self.capture, self.operator, pos, norm)

    def routing(self, layer: int) -> Routing:
        """Tell which experts of a mixture every token was sent to, and with which weight.

        The router chooses, which no linear map does. So its choice and its weights are frozen, as
        attention patterns are: ``lens.attribute(by="expert")`` tells what came of them.

        Args:
            layer: Number of a block with a mixture of experts; −1 is the last block.

        Returns:
            The experts and weights of every token.

        Raises:
            ValueError: If there is no such block, or it has no mixture of experts.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> try:
            ...     lens.routing(0)
            ... except ValueError as error:
            ...     print(error)
            layer=0 has no mixture of experts. No layer of this model has one.
        """
        return Routing.of(self.capture, layer)

    # --- In a file

    def save(self, path: str | os.PathLike[str], weights: bool = False) -> None:
        """Write the lens to a file, whole or not at all. :func:`tensorlens_tl.load` reads it.

        Args:
            path: The file to write. An older file is replaced once the new one is complete.
            weights: Whether to store the model's weights, too. Without them the file holds a
                fingerprint of the weights, and the operator needs ``load(path, model=...)``.

        Raises:
            ValueError: If the folder does not exist, if the lens has no weights to store, or if
                the weights or the logits were written to.
        """
        self._check_unchanged()
        save_capture(self.capture, path, weights)


@spelled
def load(
    path: str | os.PathLike[str],
    model: Any = None,
    device: str | torch.device | None = None,
) -> TensorLens:
    """Read a lens that :meth:`TensorLens.save` wrote. Nothing in the file is executed.

    Args:
        path: The file to read.
        model: The model that the lens was made with. Its weights are compared with the saved
            fingerprint and used by reference. Without it, and without saved weights, the lens
            gives only what needs no weights: logits, tokens, embedding, capture check.
        device: Where to put the tensors. None is the model's device, or the CPU without a model.

    Returns:
        The lens of the saved run.

    Raises:
        ValueError: If the file is no saved lens or is damaged, or if the model is another one.

    Example:
        >>> import os, tempfile
        >>> from tensorlens_tl import demo, load
        >>> model = demo.load_model()
        >>> _, lens = model.run_with_tensorlens("The capital of France is")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "lens.safetensors")
        ...     lens.save(path)
        ...     load(path, model=model).tokens == lens.tokens
        True
    """
    captured = load_capture(path, model, device)
    # Only a model's weights can be written to by others; a file's are the lens's own.
    return TensorLens(captured, WriteCheck.of(() if model is None else captured.tensors()))
