"""Circuits proved in the real model: every edge outside the circuit is ablated, and the rest runs.

    share(C) = (m(C) − m(∅)) / (m(N) − m(∅))

m is a metric of the logits, averaged over prompts. N is the model as it is. C is the model with
every edge outside the circuit ablated, and ∅ the model with every edge ablated (for ``resample``:
the run of the corrupted prompt itself). What replaces the output of an ablated writer is

    resample  its output in the run of the corrupted prompt
    mean      its mean output at each position, over prompts
    zero      nothing

Constants (biases that no node holds) stay in every run.

    attention="live"    query and key edges are edges like all others: ablated unless in the circuit
    attention="frozen"  the patterns of the clean run are held in every run, so they are no edges

With frozen attention the share of the full circuit is 1. The share of the empty circuit, which is
what the patterns alone carry, is reported beside. ∅ is always run with live patterns.

A study takes four steps:

1. Open the model edge by edge, and turn circuits into masks of edges.
2. Pair every prompt with its corrupted prompt, those of one length together.
3. Run each batch: clean, with every edge ablated, and once per circuit.
4. Measure the logits of every run, prompt by prompt.

Sources: Conmy et al. 2023 (arXiv 2304.14997), Hanna et al. 2024 (2403.17806), Mueller et al. 2025
(MIB, 2504.13151). The sizes of :func:`faithfulness_curve`, CPR and CMD are those of MIB.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import torch

from ..checks import at_least_one, kind_of, nearest, spelled, whole
from ..graph import Edge, Node
from ..passes import EdgeModel, edge_model
from .edge_averages import first_edges, ranked_scores
from .faithfulness_result import Faithfulness, FaithfulnessCurve
from .model_id import ModelInfo
from .prompt_pairs import METRIC_KEPT, Metric, check_metric
from .study import Study

ABLATIONS = ("resample", "mean", "zero")
ATTENTION = ("live", "frozen")
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Circuit sizes as shares of all edges (MIB)."""


@spelled
@dataclass(frozen=True, eq=False)
class AblationOptions:
    """How edges are ablated, and what is measured of the runs.

    Every function that takes ``options`` also takes these fields as keyword arguments of its own:
    ``faithfulness(…, ablation="zero")`` replaces the field ``ablation`` of ``options``.

    Attributes:
        ablation: What replaces the output of an ablated writer: "resample" (its output in the run
            of the corrupted prompt), "mean" (its mean at each position over prompts) or "zero".
            Only "resample" takes ``corrupted``; call without it for "mean" and "zero".
        attention: "live" for patterns that follow from the queries and keys of the ablated run,
            "frozen" for those of the clean run.
        metric: A function measured in place of target − versus: (logits at ``pos``
            [prompt, d_vocab], indices of these prompts [prompt]) → one number per prompt [prompt].
        pos: Position of the prediction. Negative positions count from the end, as in Python.
        mean_over: Prompts to average over for ablation="mean", all of the length of the tested
            prompts. By default, the tested prompts themselves.
        seed: Seed of the bootstrap over prompts.
        batch_size: Number of sequences run at once. By default, as many as write 256 MiB.
        resume: Folder that keeps finished chunks of 64 prompts: the same call goes on from it.
            With it, all processes that a launcher started share the work, and all return the
            result; see :doc:`/guides/many_prompts`. None keeps nothing.
        progress: Whether to show a progress bar on standard error after 2 s.

    Example:
        >>> from tensorlens_tl import AblationOptions
        >>> AblationOptions(ablation="zero").attention
        'live'
    """

    ablation: str = "resample"
    attention: str = "live"
    metric: Metric | None = None
    pos: int = -1
    mean_over: Any = None
    seed: int = 0
    batch_size: int | None = None
    resume: str | os.PathLike[str] | None = None
    progress: bool = True

    def __post_init__(self):
        for name, known in (("ablation", ABLATIONS), ("attention", ATTENTION)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} does not exist. Use one of {', '.join(known)}.")
        if self.mean_over is not None and self.ablation != "mean":
            raise ValueError(
                f"mean_over= is used by ablation='mean' only, not by ablation={self.ablation!r}. "
                "Drop mean_over=, or pass ablation='mean'."
            )
        if self.batch_size is not None:
            at_least_one(self.batch_size, "batch_size")
        whole(self.seed, "seed")
        check_metric(self.metric, self.pos)
        # Kept chunks are found by a digest of the question, and a function has none.
        if self.resume is not None and self.metric is not None:
            raise ValueError(METRIC_KEPT)
        if self.resume is not None and self.ablation == "mean":
            raise ValueError(
                "resume= needs ablation='resample' or 'zero', as chunks have no mean in common. "
                "Drop resume=."
            )

    @classmethod
    def of(cls, options: AblationOptions, changes: Mapping[str, Any]) -> AblationOptions:
        """Options with some fields replaced.

        Args:
            options: The options to start from.
            changes: New values by field name.

        Returns:
            The options with the new values.

        Raises:
            ValueError: If ``options`` is something else, there is no field of a name, or a value is
                not allowed.
        """
        if not isinstance(options, cls):
            raise ValueError(
                f"options={options!r} is not AblationOptions. Pass AblationOptions(…), or its "
                "fields as arguments, such as ablation='zero'."
            )
        names = [field.name for field in fields(cls)]
        for name in changes:
            if name not in names:
                close = nearest(name, names)
                remedy = f"Did you mean {close}=?" if close else f"Use {', '.join(names)}."
                raise ValueError(f"There is no option {name}=. {remedy}")
        # replace runs __post_init__ again, so changes are checked like first values.
        return replace(options, **changes) if changes else options


DEFAULTS = AblationOptions()


# --- What a user calls ---------------------------------------------------------------------------


@spelled
def faithfulness(
    model: Any,
    prompts: Any,
    circuit_or_edges: Iterable[Edge | Node | str],
    corrupted: Any = None,
    target: Any = None,
    versus: Any = None,
    options: AblationOptions = DEFAULTS,
    **changes: Any,
) -> Faithfulness:
    """Run the real model with every edge outside a circuit ablated.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``. The call leaves the model
            unchanged.
        prompts: Strings, or token ids. Prompts of one length are run together.
        circuit_or_edges: A :class:`Circuit`, or edges or their names, or nodes (then all edges
            between them are kept). Constants are kept in any case.
        corrupted: One corrupted prompt per prompt, of the same number of tokens. Needed for
            ablation="resample"; None for "mean" and "zero", which refuse corrupted prompts.
        target: Token whose logit is measured, as a string or an id: one for all prompts, or a list
            with one per prompt. None for the token that the clean run predicts.
        versus: Token whose logit is subtracted, in the same forms. None for no subtraction.
        options: How edges are ablated and what is measured.
        **changes: Fields of :class:`AblationOptions` that differ from ``options``, such as
            ``ablation="zero"``, ``attention="frozen"`` or ``batch_size=8``.

    Returns:
        The metric of every prompt in the full, the ablated and the circuit's run, and the share
        that the circuit recovers.

    Raises:
        ValueError: If an edge, a prompt or an option does not exist, or the circuit is of another
            model. The message says which, and what to do.

    Example:
        >>> from tensorlens_tl import demo, faithfulness
        >>> model = demo.load_model()
        >>> pair = demo.prompts("ioi", 1)[0]
        >>> found = faithfulness(model, [pair.clean], ["L0H0", "L1H1"], [pair.corrupted])
        >>> 0 < found.share < 1
        True
    """
    many = faithfulness_of_many(
        model, prompts, {"": circuit_or_edges}, corrupted, target, versus, options, **changes
    )
    return many[""]


@spelled
def faithfulness_of_many(
    model: Any,
    prompts: Any,
    circuits: Mapping[str, Iterable[Edge | Node | str]],
    corrupted: Any = None,
    target: Any = None,
    versus: Any = None,
    options: AblationOptions = DEFAULTS,
    **changes: Any,
) -> dict[str, Faithfulness]:
    """Measure the :func:`faithfulness` of several circuits on the same prompts, run together.

    Args:
        model: As for :func:`faithfulness`.
        prompts: As for :func:`faithfulness`.
        circuits: Circuits, edges or nodes by a name of your choice.
        corrupted: As for :func:`faithfulness`.
        target: As for :func:`faithfulness`.
        versus: As for :func:`faithfulness`.
        options: As for :func:`faithfulness`.
        **changes: As for :func:`faithfulness`.

    Returns:
        One result per circuit, by name.

    Raises:
        ValueError: As for :func:`faithfulness`.

    Example:
        >>> from tensorlens_tl import demo, faithfulness_of_many
        >>> pair = demo.prompts("ioi", 1)[0]
        >>> circuits = {"none": [], "two heads": ["L0H0", "L1H1"]}
        >>> found = faithfulness_of_many(
        ...     demo.load_model(), [pair.clean], circuits, [pair.corrupted]
        ... )
        >>> abs(found["none"].share) < 0.01
        True
    """
    options = AblationOptions.of(options, changes)
    if not isinstance(circuits, Mapping):
        raise ValueError(
            f"circuits is {kind_of(circuits)}, not a dictionary of circuits by name. Pass "
            "{'mine': circuit}."
        )
    with edge_model(model) as edged, torch.no_grad():
        for circuit in circuits.values():
            _check_model(edged, circuit)
        # 1. Circuits as edges, and as masks of them below.
        kept = {name: edged.universe.named(given) for name, given in circuits.items()}
        # 2. to 4. Pairs, runs and measures.
        study = Study.of(edged, prompts, corrupted, target, versus, options)
        # The empty circuit runs along: with frozen attention it is not the ablated model.
        masks = [edged.universe.keep(edges) for edges in ([], *kept.values())]
        full, ablated, found = study.run(torch.stack(masks))
        empty, total = found[0] if study.frozen else ablated, len(edged.universe.edges)
        about = options.ablation, options.attention
        return {
            name: Faithfulness(full, ablated, empty, values, *about, len(edges), total, *study.told)
            for (name, edges), values in zip(kept.items(), found[1:], strict=True)
        }


@spelled
def faithfulness_curve(
    model: Any,
    prompts: Any,
    ranking: Mapping[Edge, float] | Iterable[Edge | str],
    corrupted: Any = None,
    target: Any = None,
    versus: Any = None,
    options: AblationOptions = DEFAULTS,
    *,
    sizes: Sequence[float] = SIZES,
    **changes: Any,
) -> FaithfulnessCurve:
    """Measure the faithfulness of a ranking's first edges at growing sizes, with CPR and CMD.

    Args:
        model: As for :func:`faithfulness`.
        prompts: As for :func:`faithfulness`.
        ranking: Scores by edge (an edge without a score has 0), a :class:`Circuit` with scores, or
            a list of edges, best first.
        corrupted: As for :func:`faithfulness`.
        target: As for :func:`faithfulness`.
        versus: As for :func:`faithfulness`.
        options: As for :func:`faithfulness`.
        sizes: Circuit sizes as increasing shares of all edges, from 0 to 1.
        **changes: As for :func:`faithfulness`.

    Returns:
        The share recovered at every size, by signed and by absolute scores.

    Raises:
        ValueError: As for :func:`faithfulness`, or if the sizes are not increasing shares, or the
            circuit has no scores.

    Example:
        >>> from tensorlens_tl import demo, faithfulness_curve, score_edges
        >>> model, pair = demo.load_model(), demo.prompts("ioi", 1)[0]
        >>> runs = [pair.clean], [pair.corrupted]
        >>> scores = score_edges(model, *runs)
        >>> curve = faithfulness_curve(model, runs[0], scores, runs[1], sizes=(0.1, 1.0))
        >>> round(float(curve.shares[-1]), 3)
        1.0
    """
    options = AblationOptions.of(options, changes)
    shares = list(sizes) if isinstance(sizes, Iterable) else []
    numbers = all(isinstance(s, Real) and 0 <= s <= 1 for s in shares)
    if not shares or not numbers or sorted(set(shares)) != shares:
        raise ValueError(
            f"sizes={sizes!r} are not increasing shares of all edges. Pass numbers from 0 to 1, "
            "smallest first."
        )
    # Opened once for all sizes: opening a model reads all of its weights.
    with edge_model(model) as edged, torch.no_grad():
        _check_model(edged, ranking)
        universe, scores = edged.universe, ranked_scores(edged.universe, ranking)
        study = Study.of(edged, prompts, corrupted, target, versus, options)
        total = len(universe.edges)
        counts = tuple(max(1, round(size * total)) if size else 0 for size in shares)  # 0 is ∅
        masks = [
            universe.keep(first_edges(universe, scores, n, absolute))
            # CPR is of the signed ranking, CMD of the absolute one (MIB): both in one call.
            for absolute in (False, True)
            for n in counts
        ]
        full, ablated, found = study.run(torch.stack(masks))
        signed, absolute = found.split(len(counts))
        about = options.ablation, options.attention, total, *study.told
        return FaithfulnessCurve(tuple(shares), counts, full, ablated, signed, absolute, *about)


# --- Running it ----------------------------------------------------------------------------------


def _check_model(edged: EdgeModel, given: Any) -> None:
    """Refuse a circuit of another model; edges, names and scores do not say their model."""
    if isinstance(info := getattr(given, "model", None), ModelInfo):
        # Heads have the same names in every model: without this, another one's circuit would run.
        info.check(ModelInfo.of(edged.adapter.name, edged.adapter.weights))
