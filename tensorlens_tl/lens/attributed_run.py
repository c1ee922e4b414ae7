"""Where a logit comes from: splits, paths and head loadings of one captured run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor

from ..attribution import (
    Attribution,
    GradientCache,
    Target,
    TargetGradient,
    TargetLike,
    attribute,
    attribute_many,
    check_comparable,
    difference,
    fixed_baseline,
    loadings,
    own_prediction,
    resolve_at_site,
    resolve_prompts,
)
from ..checks import as_list, spelled
from ..features import Feature, FeatureDictionary, feature_target, site_of_target
from ..graph import Edge, Node, numbered_site
from ..maps import DENSE_LIMIT
from ..operator import Capture, FrozenTransformer
from ..paths import Paths, find_paths
from .featured_run import FeaturedRun
from .sequence_attribution import Continuation, SequenceAttribution, continuation_targets


@spelled
class AttributedRun(FeaturedRun):
    """A captured run whose logits can be split by where they come from.

    Attributes:
        capture: The captured run.
        writes: What tells whether the weights or the returned logits were written to.
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
        *,
        of: str = "logit",
        site: str | int | None = None,
        saes: FeatureDictionary | Sequence[FeatureDictionary] | None = None,
    ) -> Attribution:
        """Split a logit, or a difference of two logits, by where it comes from.

        Args:
            target: What to split: a token string, a token id, a direction in logits [d_vocab] or in
                the final normalized residual [d_model], or None for the model's own prediction; a
                list of tokens, one per prompt; or a feature of an SAE, ``sae.feature(17)``.
            versus: What is subtracted from the target, of the same kinds; None subtracts nothing.
            pos: Position of the prediction among the real tokens; −1 is the last.
            by: The kind of source.

                * "token": every token's and every position's embedding, and every constant.
                * "constant": every constant, by position; each kind of embedding is one row.
                * "component": every writer: embeddings, heads, MLPs and constants (b_O, b_out, …).
                * "layer": the same as "component", with one row per layer.
                * "head": the same as "component", each head split over the positions it read.
                * "expert": the same as "component", each mixture split into its experts.
                * "neuron": the same as "component", each MLP split into its neurons.
                * "mlp": MLPs by position, as total effects only.
                * "dimension": the residual before the final norm, by dimension.
                * "feature": the residual at the site of an SAE, by feature and position; its error
                  and b_dec are rows, too. Of several SAEs the rows of each sum to the target.
                * "order": the number of heads and MLPs passed on the way to the target.
                * "edge": what each node reads of each other node's output. The rows of one reader,
                  ``.select(dest="L2H1.v")``, sum to that reader's effect; those of "logits" sum to
                  the target.
            effect: "direct" takes what is written at the target's position and read by the logits.
                Direct effects sum to the target. "total" takes what is written anywhere, along all
                paths. Total effects are influence: they overlap and do not sum. They exist for
                layer, component, head, mlp, expert and neuron.
            baseline: What the run is compared with, by token, component or edge. Pass the lens of a
                corrupted prompt of equal length, "zero" (no embeddings), "mean" (the mean of W_E's
                rows as every token's embedding, positions kept), or an embedding [d_model]. The
                rows then sum to the target in this run minus the target in the baseline. One row
                between two lenses is what the operators changed, or by component the readouts. By
                edge, the readers of one run read what writers add here and not in the baseline.
            at: The operator that reads the difference to a baseline lens: "clean" (of this lens),
                "corrupted" (of the baseline), or "secant" (between the two runs). With "secant"
                no row is left that an operator changed. Soft-capped logits and
                log-probabilities leave one row, "readout change"; by edge, those into "logits" sum
                to the rest.
            qk: Whether every head's queries and keys are readers, too, only by edge: "L2H1.q" and
                "L2H1.k". Their rows are the target's sensitivity to the attention scores, times
                what a writer adds to the scores. They are first-order and in no sum.
            of: "logit", or "logprob" for the log-probability of a token in nats. That is
                (z_t − Σ p z) − H(p), with the probabilities p of this run held: the bracket is
                split, and the entropy H(p) is one row, "softmax". With ``versus`` both are equal.
            site: A place in the residual stream whose own direction [d_model] is the target:
                ⟨direction, residual at pos⟩. Pass a name such as "blocks.5.hook_resid_post", or 5
                for the same. By edge, the reader called logits is then the site. None is the
                logits.
            saes: SAEs of ``features.load``, for ``by="feature"``. With ``by="edge"`` and one SAE,
                its features stand for all that was written before its site.

        Returns:
            Contributions in logits, in the capture's compute dtype. ``.sum("pos")`` sums positions.

        Raises:
            ValueError: If the target, the position, ``by``, ``effect`` or the site does not exist,
                or if the baseline is of another length or model.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> found = lens.attribute("Paris")
            >>> [(label, round(value, 1)) for label, value in found.top(2)]
            [('"France"@4', 15.6), ('"capital"@2', 6.0)]
        """
        # Refuses a feature with what does not go with one.
        site_of_target(target, versus, site, self._operator, baseline)
        gradient = self._gradient(target, versus, pos, None, of, site)
        if by == "feature" or saes is not None:
            if by not in ("feature", "edge") or baseline is not None or effect != "direct":
                raise ValueError(
                    f"saes= cannot be combined with by={by!r}, baseline= or effect= here. Pass "
                    "by='feature' or 'edge', and saes= alone."
                )
            return self._by_feature(gradient, by, saes, qk)
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
        # One target for both runs.
        predicted = own_prediction(self.capture, pos) if target is None else None
        reference = baseline._gradient(target, versus, pos, predicted, of, site)
        return difference(gradient, reference, by, at, qk)

    def dla(
        self,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
        *,
        of: str = "logit",
    ) -> Attribution:
        """Direct logit attribution: what every component writes at ``pos``, read by the logits.

        This is ``attribute(..., by="component")`` by its usual name. The final norm's scale is
        frozen, as in TransformerLens's ``cache.logit_attrs``. Unlike there, constants are rows of
        their own (b_U, ln_final.b, b_O, …), so that all rows sum to the model's own logit.

        Args:
            target: As in :meth:`attribute`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            of: "logit" or "logprob", as in :meth:`attribute`.

        Returns:
            One row per embedding, head, MLP and constant.

        Raises:
            ValueError: If the target or the position does not exist.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> [(label, round(value, 1)) for label, value in lens.dla("Paris").top(2)]
            [('L3MLP', 10.9), ('L2MLP', 2.8)]
        """
        return self.attribute(target, versus, pos, "component", of=of)

    def attribute_many(
        self,
        target: TargetLike | Sequence[TargetLike] = None,
        pos: int | Sequence[int] = -1,
        by: str = "token",
        effect: str = "direct",
        versus: TargetLike | Sequence[TargetLike] = None,
        qk: bool = False,
        *,
        of: str = "logit",
        site: str | int | None = None,
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
            of: "logit" or "logprob" for all targets, as in :meth:`attribute`.
            site: The site of all targets, as in :meth:`attribute`.

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
        run = self._until(site)
        resolved = [self._goal(run[0], goal, foil, at, None, of, site) for goal, at, foil in rows]
        return tuple(attribute_many(*run, resolved, by, effect, qk=qk))

    def attribute_sequence(
        self, continuation: Continuation, by: str = "token", *, of: str = "logprob"
    ) -> SequenceAttribution:
        """Split every token of a continuation by source: a matrix of sources by output tokens.

        Capture the prompt with its continuation, ``capture(model, prompt + continuation)``: that
        run predicted every token of the continuation from all tokens before it. Each column is
        exact and sums to its token, and all columns are made in one batched sweep.

        Args:
            continuation: What the prompt ends with: a text, whatever its white space, or token ids;
                or the position of its first token, −2 for the last two tokens.
            by: The kind of source, as in :meth:`attribute`.
            of: "logprob" (in nats; the columns sum to the continuation's log-probability, see
                ``.total()``) or "logit".

        Returns:
            The matrix, one for every prompt.

        Raises:
            ValueError: If the prompt does not end with the continuation, or if the continuations of
                several prompts have different lengths.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("Paris is the capital of France")
            >>> matrix = lens.attribute_sequence("of France")
            >>> matrix.outputs
            (('"of"@5', '"France"@6'),)
            >>> logits = lens.logits[0, 4:6].log_softmax(-1)
            >>> ids = lens.capture.prompts.tokens[0, 5:]
            >>> round(float(matrix.total().target_value), 3) == round(
            ...     float(logits[[0, 1], ids].sum()), 3
            ... )
            True
        """
        self._check_ready()
        goals, names = continuation_targets(self.capture, continuation, of)
        return SequenceAttribution(
            tuple(attribute_many(self.capture, self._operator, goals, by)), names
        )

    def paths(
        self,
        target: TargetLike = None,
        k: int = 10,
        versus: TargetLike = None,
        pos: int = -1,
        from_token: int | None = None,
        by_position: bool = False,
        constants: bool = True,
        max_expansions: int = 100_000,
        memory_limit: int = DENSE_LIMIT,
        progress: bool = True,
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
            max_expansions: How many partial paths to extend. The search is not exact where that is
                too few.
            memory_limit: Bytes that the search may take for its bounds.
            progress: Whether to show progress bars on standard error after 2 s.

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
        goal = resolve_prompts(self.capture, target, versus, pos)
        return find_paths(
            self.capture,
            self._operator,
            goal,
            k,
            from_token,
            by_position,
            constants,
            max_expansions,
            memory_limit,
            progress,
            self._bounds_of_paths,
        )

    @cached_property
    def _bounds_of_paths(self) -> dict[Any, Any]:
        """Bounds of the latest search for paths, which serve further targets."""
        return {}

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
        of: str = "logit",
        site: str | int | None = None,
    ) -> TargetGradient:
        self._check_ready()
        site = site_of_target(target, versus, site, self._operator)
        capture, operator = self._until(site)
        goal = self._goal(capture, target, versus, pos, predicted, of, site)
        return (
            self._gradients.gradient(goal)
            if site is None
            else TargetGradient(capture, operator, goal)
        )

    def _goal(
        self,
        capture: Capture,
        target: TargetLike,
        versus: TargetLike,
        pos: int,
        predicted: Int[Tensor, " batch"] | None,
        of: str,
        site: str | int | None,
    ) -> Target:
        """The functional that is asked for, at the end of a run or of its part up to a site."""
        if site is None:
            return resolve_prompts(capture, target, versus, pos, predicted, of)
        if of != "logit":
            raise ValueError(f"of={of!r} is not available with site=. Drop of= or site=.")
        if isinstance(target, Feature):
            return feature_target(target, self.capture, self._operator, pos)
        return resolve_at_site(capture, self._site(site), target, versus, pos)

    def _until(self, site: str | int | None) -> tuple[Capture, FrozenTransformer]:
        """The run up to a site, with its operator; None is the whole run."""
        if site is None:
            return self.capture, self._operator
        capture = self.capture.until(self._site(site))
        return capture, FrozenTransformer.of(capture)

    def _site(self, site: str | int) -> str:
        """The name of a site; a number is what that block leaves."""
        name = numbered_site(site, len(self.capture.blocks), "post")
        self._operator.site_index(name)  # refuses others
        return cast(str, name)

    @cached_property
    def _gradients(self) -> GradientCache:
        return GradientCache(self.capture, self._operator)


def _as_many(given: Any) -> list[Any] | None:
    """The values of a list, a range, ids [n] or directions [n, d]; None for a single value."""
    given = as_list(given)
    many = isinstance(given, list | tuple | range) or getattr(given, "ndim", 0) == 2
    return list(given) if many else None
