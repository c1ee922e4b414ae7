"""A run as a graph and in the forms of other tools."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..attribution import TargetLike, is_token, resolve, resolve_token
from ..checks import as_list, spelled, token_text
from ..circuits import Circuit, circuit_from_names
from ..costs import Plan
from ..exports import Answer, AttributionGraph, circuitsvis_arguments, find_graph, save_headvis
from ..graph import Edge, Node
from ..replacement import (
    FeatureGraph,
    ReplacementModel,
    find_feature_graph,
    plan_feature_graph,
)
from .featured_run import SAEs, listed
from .similarity import PooledRun


@spelled
class ExportedRun(PooledRun):
    """A captured run that is written in the forms of other tools."""

    def attribution_graph(
        self,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
        *,
        n_nodes: int = 100,
        n_links: int = 2000,
        qk: bool = True,
        circuit: Circuit | Iterable[Edge | Node | str] | None = None,
    ) -> AttributionGraph:
        """Lay a target out as a graph of tokens, heads, MLPs, experts and constants at positions.

        The weight of an edge is what the reader at its position makes of what the writer adds at
        its own. All weights into a node sum to its total effect, and those into the target to the
        target. Edges into queries and keys are first-order, and in no sum. The sum over all
        positions is ``attribute(by="edge")``.

        Args:
            target: As in :meth:`attribute`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            n_nodes: How many heads, MLPs, experts and constants to keep, by total effect. Tokens
                are all kept.
            n_links: How many edges between them to keep, by absolute value.
            qk: Whether queries and keys are readers, too.
            circuit: A circuit, or its nodes or edges, to keep only what belongs to it. Constants
                are always kept.

        Returns:
            The graph. ``.to_json()`` writes it as attribution-graph JSON, for Neuronpedia and
            circuit-tracer.

        Raises:
            ValueError: If there are several prompts, or an argument does not fit.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> graph = lens.attribution_graph("Paris", n_nodes=30)
            >>> [(graph.labels[x.src], graph.labels[x.dest]) for x in graph.into(-1)[:1]]
            [('L3MLP@5', "'Paris'")]
        """
        gradient, only = self._gradient(target, versus, pos), None
        if circuit is not None:
            only = frozenset(circuit_from_names(self.capture, circuit).edges)
        found = find_graph(gradient, n_nodes, n_links, qk, only)
        return replace(found, prompt=self.prompt, answer=self._answer(target, versus, pos))

    def _answer(self, target: TargetLike, versus: TargetLike, pos: int) -> Answer:
        """The tokens of a target with their probabilities in the model; () for a direction."""
        if not (is_token(target) and is_token(versus)):
            return ()
        logits = self.capture.logits_at(self.capture.frame.index(pos))[0]
        shares = logits.double().softmax(-1)
        ids = [int(logits.argmax()) if target is None else resolve_token(self.capture, target)]
        ids += [] if versus is None else [resolve_token(self.capture, versus, "versus")]
        return tuple((token_text(self.capture.tokenizer, i), i, float(shares[i])) for i in ids)

    def feature_graph(
        self,
        transcoders: SAEs,
        target: TargetLike | Sequence[TargetLike] = None,
        versus: TargetLike = None,
        pos: int = -1,
        *,
        max_features: int = 5000,
        progress: bool = True,
    ) -> FeatureGraph:
        """Put transcoders in the place of MLPs, and lay targets out as a graph of their features.

        Every MLP is y = W_dec z + b_dec (+ x W_skip) + error. Attention patterns, norm scales and
        what fires are held, and the error is a source of its own. The weight of an edge is what the
        reader, a feature's pre-activation or a target, loses where the writer is taken away. With
        constants, and the features that are left out, all weights into a reader sum to it exactly.

        An MLP without a transcoder is all error: nothing is known of what it reads. Errors are
        printed by layer, and warned about where they do more than features.

        Args:
            transcoders: Transcoders of :func:`tensorlens_tl.features.load`, at most one per MLP,
                that write "hook_mlp_out", or "mlp.hook_out" where no norm follows; or a
                cross-layer transcoder.
            target: As in :meth:`attribute`; a list for several targets. Tokens count by their
                probabilities, directions and differences alike.
            versus: What is subtracted from every target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            max_features: How many features are nodes, by the size of their total effects. All
                others are one writer, "rest".
            progress: Whether to show a bar on standard error after 2 s.

        Returns:
            The graph, with its scores. ``.prune()`` keeps what matters, and ``.to_json()`` writes
            it for Neuronpedia and circuit-tracer.

        Raises:
            ValueError: If there are several prompts, or a transcoder does not fit the model.

        Example:
            See :class:`FeatureGraph`.

        Source: Ameisen et al., Circuit Tracing (2025).
        """
        self._check_ready()
        given = listed(transcoders, "transcoders", "transcoder")
        many = _targets(target)
        model = ReplacementModel.of(given, self.capture, self._operator)
        goals = [resolve(self.capture, one, versus, pos).alone("feature_graph") for one in many]
        answers = [self._answer(one, versus, pos) for one in many]
        likely = [answer[0][2] if len(answer) == 1 else None for answer in answers]
        sizes = [1.0] * len(many) if None in likely else [p for p in likely if p is not None]
        shares = [size / sum(sizes) for size in sizes]
        return find_feature_graph(
            model, goals, shares, answers, max_features, self.prompt, progress
        )

    def _plan_feature_graph(self, given: Mapping[str, Any]) -> Plan:
        """What :meth:`feature_graph` will cost, by its arguments."""
        transcoders = listed(given["transcoders"], "transcoders", "transcoder")
        many = _targets(given["target"])
        run = self.capture, self._operator
        return plan_feature_graph(transcoders, *run, len(many), given["max_features"])

    def save_headvis(
        self,
        folder: str | os.PathLike[str],
        *,
        top_k: int = 8,
        least: float = 0.005,
        n_intervals: int = 5,
        dataset: str = "prompts",
    ) -> None:
        """Write the attention patterns of all prompts as a data folder of HeadVis.

        Each head has a file with its largest keys per query, sparse, and one row of scores: to
        itself, to the token before, induction, distance, entropy. Capture many prompts at once, as
        a batch.

        Args:
            folder: The new folder. It is written whole or not at all.
            top_k: How many keys to keep for each query.
            least: Attention below this is not kept.
            n_intervals: Into how many groups the prompts of a head are put, by their largest
                attention.
            dataset: What the prompts are called.

        Raises:
            ValueError: If the folder exists or cannot be made, a number is wrong, the rows have no
                token ids, or a layer has no patterns.

        Example:
            >>> import os, tempfile
            >>> from tensorlens_tl import demo
            >>> prompts = ["The capital of France is", "The capital of Italy is"]
            >>> _, lens = demo.load_model().run_with_tensorlens(prompts)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     lens.save_headvis(os.path.join(folder, "data"))
            ...     len(os.listdir(os.path.join(folder, "data", "heads")))
            16
        """
        self._check_unchanged()
        save_headvis(self.capture, folder, top_k, least, n_intervals, dataset)

    def circuitsvis(
        self,
        function: str,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
        *,
        layer: int | None = None,
        head: int | None = None,
    ) -> dict[str, Any]:
        """Make the arguments of a function of CircuitsVis from this run.

        Call the function with them: ``circuitsvis.attention.attention_heads(**arguments)``.

        Args:
            function: The function's name. "attention_heads", "attention_patterns" and
                "attention_pattern" show patterns, and "colored_tokens" the tokens' shares of the
                target. "colored_tokens_multi" and "topk_samples" show the total effects of heads by
                position. "text_neuron_activations" and "topk_tokens" show the neurons of MLPs, and
                "token_log_probs" and "visualize_model_performance" the predictions.
            target: As in :meth:`attribute`, where shares of a target are shown.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            layer: The block whose patterns are shown; None is all blocks.
            head: The head of "attention_pattern".

        Returns:
            The arguments by name.

        Raises:
            ValueError: If there is no such function, block or head, or the run lacks what is shown.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.circuitsvis("attention_heads", layer=1)["attention"].shape
            torch.Size([4, 6, 6])
        """
        self._check_ready()
        return circuitsvis_arguments(
            function,
            self.capture,
            self._operator,
            lambda: self._gradient(target, versus, pos),
            layer,
            head,
        )


def _targets(target: Any) -> list[Any]:
    """One target, or several, as a list."""
    given = as_list(target)
    many = list(given) if isinstance(given, list | tuple) else [given]
    if not many:
        raise ValueError("target=[] names no target. Pass a token, or a list of tokens.")
    return many
