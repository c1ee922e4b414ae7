"""Is it the model? Circuits proved by running the real model with every other edge ablated.

    share(C) = (m(C) − m(∅)) / (m(N) − m(∅))

m is a measure of the logits, averaged over prompts; N the model as it is, C the model with every edge
outside the circuit ablated, ∅ with every edge ablated (for ``resample``: the corrupted run itself).
What stands in for an ablated writer: its output in the run of the prompt's corrupted twin
(``resample``), its mean at each position over prompts (``mean``), or nothing (``zero``); constants stay.

``pattern="live"``: query and key edges are edges like all others, patched unless in the circuit.
``pattern="frozen"``: the clean run's patterns are held, also in the corrupted twin's run, so they are no
edges; the full circuit's share is 1, and the empty one's, which is what the patterns alone carry, is
reported beside. ∅ is without them, as with live ones.

Sources: Conmy et al. 2023 (arXiv 2304.14997), Hanna et al. 2024 (2403.17806), Mueller et al. 2025 (MIB,
2504.13151), whose sizes, CPR and CMD :func:`faithfulness_curve` has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import at_least_one
from ..graph import INPUT, Edge, Node
from .edge_masks import EdgeUniverse
from .edge_patching import EdgeModel, Writes, edge_model
from .faithfulness_result import Faithfulness, FaithfulnessCurve, Prompt
from .prompt_pairs import Measure, Metric, Pairs, paired

ABLATIONS = ("resample", "mean", "zero")
PATTERNS = ("live", "frozen")
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Circuit sizes as shares of all edges (MIB)."""


# --- What a user calls -----------------------------------------------------------------------------


def faithfulness(
    model: Any,
    prompts: Any,
    edges: Iterable[Edge | Node | str],
    corrupted: Any = None,
    ablation: str = "resample",
    pattern: str = "live",
    target: Any = None,
    versus: Any = None,
    *,
    metric: Metric | None = None,
    pos: int = -1,
    mean_over: Any = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Faithfulness:
    """Run the model itself with every edge outside a circuit ablated.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``; left as it was.
        prompts: Strings or token ids; those of one length are run together.
        edges: The circuit, as edges or their names, or as nodes, between which all edges are kept.
            Constants are kept in any case.
        corrupted: Each prompt's twin, of as many tokens; needed to ``resample``.
        ablation: "resample", "mean" or "zero".
        pattern: "live" or "frozen".
        target: What is measured: the logit of a token (string or id), for all prompts or one for each;
            None for what the clean run predicts.
        versus: Whose logit is subtracted.
        metric: Another measure: (logits at ``pos`` [prompt, d_vocab], indices of these prompts) → [prompt].
        pos: Where the prediction is made, counted as in Python.
        mean_over: For "mean", the prompts to average over, of one length with all others; by default
            the prompts themselves.
        seed: Of the bootstrap.
        batch_size: Sequences run at once; by default, as many as a quarter GiB holds.
        progress: Whether to count prompts on standard error.

    Returns:
        The measures, prompt by prompt, and the share recovered.

    Raises:
        ValueError: If an edge, a prompt or an option is not one; the message says which, and what to do.
    """
    found = faithfulness_of_many(
        model, prompts, {"": edges}, corrupted, ablation, pattern, target, versus, metric=metric,
        pos=pos, mean_over=mean_over, seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    return found[""]


def faithfulness_of_many(
    model: Any,
    prompts: Any,
    circuits: Mapping[str, Iterable[Edge | Node | str]],
    corrupted: Any = None,
    ablation: str = "resample",
    pattern: str = "live",
    target: Any = None,
    versus: Any = None,
    *,
    metric: Metric | None = None,
    pos: int = -1,
    mean_over: Any = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict[str, Faithfulness]:
    """:func:`faithfulness` of several circuits on the same prompts, run together.

    Args:
        model: As for :func:`faithfulness`, like all that is not told here.
        prompts: Prompts.
        circuits: Edges by name.
        corrupted: Twins.
        ablation: "resample", "mean" or "zero".
        pattern: "live" or "frozen".
        target: Token.
        versus: Token.
        metric: Measure.
        pos: Position.
        mean_over: Prompts.
        seed: Of the bootstrap.
        batch_size: Sequences run at once.
        progress: Whether to count prompts on standard error.

    Returns:
        The results by name; :func:`tensorlens_tl.circuits.faithfulness_result.share_difference` compares two.

    Raises:
        ValueError: As :func:`faithfulness`.
    """
    with edge_model(model) as edged, torch.no_grad():
        wanted = {name: edged.universe.named(edges) for name, edges in circuits.items()}
        keeps = [edged.universe.keep(edges) for edges in ([], *wanted.values())]
        setup = _Setup.of(edged, prompts, corrupted, ablation, pattern, mean_over, batch_size)
        measure = Measure.of(edged.adapter, setup.n, target, versus, metric, pos)
        full, ablated, found = setup.measured(torch.stack(keeps), measure, progress)
        empty, total = found[0] if setup.frozen else ablated, len(edged.universe.edges)
        return {
            name: Faithfulness(
                full, ablated, empty, values, ablation, pattern, len(edges), total, seed
            )
            for (name, edges), values in zip(wanted.items(), found[1:], strict=True)
        }


def faithfulness_curve(
    model: Any,
    prompts: Any,
    ranking: Mapping[Edge, float] | Sequence[Edge | str],
    corrupted: Any = None,
    ablation: str = "resample",
    pattern: str = "live",
    target: Any = None,
    versus: Any = None,
    *,
    sizes: Sequence[float] = SIZES,
    metric: Metric | None = None,
    pos: int = -1,
    mean_over: Any = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> FaithfulnessCurve:
    """Faithfulness of a ranking's first edges at growing sizes, and the areas CPR and CMD.

    Args:
        model: As for :func:`faithfulness`, like all that is not told here.
        prompts: Prompts.
        ranking: Every edge's score (an edge without one has 0), or edges, best first.
        corrupted: Twins.
        ablation: "resample", "mean" or "zero".
        pattern: "live" or "frozen".
        target: Token.
        versus: Token.
        sizes: Shares of all edges, increasing.
        metric: Measure.
        pos: Position.
        mean_over: Prompts.
        seed: Of the bootstrap.
        batch_size: Sequences run at once.
        progress: Whether to count prompts on standard error.

    Returns:
        The curve.

    Raises:
        ValueError: As :func:`faithfulness`, or if the sizes are not increasing shares.
    """
    given = list(sizes) if isinstance(sizes, Iterable) else []
    if not given or not all(0 <= size <= 1 for size in given) or sorted(set(given)) != given:
        raise ValueError(f"expected sizes as increasing shares of all edges, 0 to 1, got {sizes!r}")
    with edge_model(model) as edged, torch.no_grad():
        universe = edged.universe
        setup = _Setup.of(edged, prompts, corrupted, ablation, pattern, mean_over, batch_size)
        measure = Measure.of(edged.adapter, setup.n, target, versus, metric, pos)
        scores = _scores(universe, ranking)
        total = len(universe.edges)
        counts = tuple(max(1, round(size * total)) if size else 0 for size in sizes)
        keeps = [
            universe.keep(first_edges(universe, scores, n, absolute))
            for absolute in (False, True)
            for n in counts
        ]
        full, ablated, found = setup.measured(torch.stack(keeps), measure, progress)
        signed, absolute = found.split(len(counts))
        return FaithfulnessCurve(tuple(sizes), counts, full, ablated, signed, absolute, ablation,
                                 pattern, total, seed)  # fmt: skip


def first_edges(
    universe: EdgeUniverse, scores: Mapping[Edge, float], n: int, absolute: bool = True
) -> list[Edge]:
    """The n edges of the highest scores, connected or not.

    Args:
        universe: The model's edges.
        scores: By edge; 0 where there is none.
        n: How many.
        absolute: Whether by absolute value.

    Returns:
        The circuit; of equal scores, the lower edges.
    """

    def rank(edge: Edge) -> float:
        score = scores.get(edge, 0.0)
        return -abs(score) if absolute else -score

    return sorted(universe.edges, key=rank)[:n]


def _scores(
    universe: EdgeUniverse, ranking: Mapping[Edge, float] | Sequence[Edge | str]
) -> dict[Edge, float]:
    """Scores by edge; of the input's two embeddings, their sum."""
    scores = ranking if isinstance(ranking, Mapping) else dict.fromkeys(ranking, 0.0)
    found: dict[Edge, float] = {}
    for edge, score in scores.items():
        edge = Edge.parse(edge) if isinstance(edge, str) else edge
        if edge.src.kind in ("embed", "pos_embed"):
            edge = Edge(INPUT, edge.dest)
        found[edge] = found.get(edge, 0.0) + score
    universe.wiring.check(found)
    if ranking is scores:
        return found
    return {edge: float(len(found) - i) for i, edge in enumerate(found)}


# --- Running it -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Setup:
    """Prompts, what stands in for what is ablated, and how much is run at once."""

    model: EdgeModel
    groups: list[Pairs]
    ablation: str
    frozen: bool
    mean_over: Any
    batch_size: int | None

    @classmethod
    def of(cls, model: EdgeModel, prompts: Any, corrupted: Any, ablation: str, pattern: str,
           mean_over: Any, batch_size: int | None) -> _Setup:  # fmt: skip
        if ablation not in ABLATIONS:
            raise ValueError(
                f"expected ablation to be one of {', '.join(ABLATIONS)}, got {ablation!r}"
            )
        if pattern not in PATTERNS:
            raise ValueError(
                f"expected pattern to be one of {', '.join(PATTERNS)}, got {pattern!r}"
            )
        if ablation == "resample" and corrupted is None:
            raise ValueError(
                "ablation='resample' takes every ablated output from a corrupted prompt, got none: pass "
                "corrupted=, one of equal length for each prompt, or use ablation='mean' or 'zero'"
            )
        if ablation != "resample" and corrupted is not None:
            raise ValueError(
                f"corrupted is for ablation='resample', got {ablation!r}: leave it out, or pass "
                "mean_over=corrupted with ablation='mean' to take means over the twins"
            )
        if mean_over is not None and ablation != "mean":
            raise ValueError(f"mean_over is for ablation='mean', got {ablation!r}: leave it out")
        batch_size = None if batch_size is None else at_least_one(batch_size, "batch_size")
        groups = paired(model.adapter, prompts, corrupted)
        if ablation == "mean":
            lengths = [group.ids.shape[1] for group in groups]
            if mean_over is not None:
                mean_over = paired(model.adapter, mean_over)
                lengths += [group.ids.shape[1] for group in mean_over]
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"ablation='mean' averages position by position, expected prompts of one length, got "
                    f"{min(lengths)} to {max(lengths)} tokens: measure each length apart, or use 'resample'"
                )
            if sum(len(group.ids) for group in mean_over or groups) < 2:
                raise ValueError(
                    "ablation='mean' over one prompt replaces nothing, expected more: pass mean_over="
                )
        return cls(model, groups, ablation, pattern == "frozen", mean_over, batch_size)

    @property
    def n(self) -> int:
        """How many prompts there are."""
        return sum(len(group.ids) for group in self.groups)

    def at_once(self, n_pos: int) -> int:
        """How many sequences are run at once."""
        return self.batch_size or self.model.at_once(n_pos)

    def mean(self) -> Writes:
        """Every writer's mean at every position."""
        total, n = None, 0
        for group in self.mean_over or self.groups:
            for piece in group.split(self.at_once(group.ids.shape[1])):
                writes = self.model.run(piece.ids).writes[0].sum(1, keepdim=True)
                total, n = writes if total is None else total + writes, n + len(piece.ids)
        if total is None:
            raise ValueError("expected at least one prompt, got none")
        return total / n

    def measured(
        self, keeps: Bool[Tensor, "circuit reader writer"], measure: Measure, progress: bool
    ) -> tuple[Prompt, Prompt, Float[Tensor, "circuit prompt"]]:
        """The measure of the model as it is, with everything ablated, and of several circuits."""
        n = self.n
        full, ablated = torch.zeros(2, n, dtype=torch.float64, device="cpu")
        found = torch.zeros(len(keeps), n, dtype=torch.float64, device="cpu")
        # Equal circuits (small sizes, rankings without negative scores) are run once.
        keeps, which = torch.unique(keeps, dim=0, return_inverse=True)
        none = torch.zeros_like(keeps[:1])
        mean = self.mean() if self.ablation == "mean" else None
        with tqdm(desc="prompts", total=n, disable=not progress) as bar:
            for group in self.groups:
                size = self.at_once(group.ids.shape[1])
                circuits = min(len(keeps), size)
                for piece in group.split(max(1, size // circuits)):
                    clean = self.model.run(piece.ids)
                    other = mean if mean is None else mean.expand(-1, len(piece.ids), -1, -1)
                    held = [p[0] for p in clean.patterns] if self.frozen else None
                    if piece.twins is not None:
                        twin = self.model.run(piece.twins)
                        nothing = twin.logits
                        if held is not None:
                            twin = self.model.run(piece.twins, patterns=held)
                        other = twin.writes[0]
                    else:
                        nothing = self.model.run(piece.ids, none, other).logits
                    runs = (self.model.run(piece.ids, part, other, held).logits
                            for part in keeps.split(circuits))  # fmt: skip
                    take = lambda logits: measure.values(logits, clean.logits[0], piece.index)  # noqa: B023, E731
                    full[piece.index] = take(clean.logits)[0].double().cpu()
                    ablated[piece.index] = take(nothing)[0].double().cpu()
                    found[:, piece.index] = torch.cat([take(r) for r in runs])[which].double().cpu()
                    bar.update(len(piece.ids))
        return full, ablated, found
