"""How faithfully, and how causally, linear maps decode relations: a study over many draws.

1. Draw training subjects; test on the rest.
2. Fit the linear maps of every method on the training subjects.
3. Faithfulness: the share of test subjects that β W h + b decodes to the model's own next token.
4. Causality: the share of edits after which the real model says the other subject's token. An edit
   puts h + W†(y′ − y) in the place of h.
5. Take means over draws, with intervals.

Layer, β and rank are chosen on the training subjects alone (``Statements.fit``). Edits do not use
β, so a method's edits are the same whether β is tuned or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checks import need, progress_bar, spelled
from ..evaluation import Estimate, bootstrap, read_study, study_text
from ..pictures import Page, Paged, View, estimates, interval_view, intervals_over
from .decoding import MEAN, Decoding
from .linear_relation import MAP_METHODS
from .relation import Relation
from .statements import RANKS, Statements, state

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
"""Values of β to choose from where β is tuned."""
STUDY_FORMAT = "tensorlens_tl relation study 1"


@spelled
@dataclass(frozen=True)
class RelationStudy(Paged):
    """Every decoding of some relations, and their means.

    Attributes:
        model: Name of the model.
        dtype: Dtype of the model, such as "float32".
        seed: Seed of the draws.
        betas: Values of β to choose from.
        ranks: Ranks to choose from.
        accuracy: Share of subjects whose object begins with the model's own next token, by
            relation.
        rows: All decodings of the study.
    """

    model: str
    dtype: str
    seed: int
    betas: tuple[float, ...]
    ranks: tuple[int, ...]
    accuracy: dict[str, float]
    rows: tuple[Decoding, ...]

    def select(self, variant: str, n_train: int, relation: str | None = None) -> list[Decoding]:
        """Give the decodings of a variant, in the same order for all variants.

        Args:
            variant: Way of fitting, one of those in the rows.
            n_train: Number of training subjects.
            relation: Name of one relation. None is all of them.

        Returns:
            The rows of the variant.

        Raises:
            ValueError: If there is none.
        """
        found = [
            row
            for row in self.rows
            if (row.variant, len(row.train)) == (variant, n_train)
            and relation in (None, row.relation)
        ]
        if not found:
            kinds = sorted({f"{row.variant} (n = {len(row.train)})" for row in self.rows})
            raise ValueError(
                f"No rows are of {variant!r} with n = {n_train}, {relation or 'any relation'}. "
                f"Choose one of {', '.join(kinds)}, of {', '.join(self.accuracy)}."
            )
        return found

    def estimate(
        self, what: str, variant: str, n_train: int, relation: str | None = None
    ) -> Estimate:
        """Give the mean of a share over splits. The bootstrap of the interval draws splits.

        Args:
            what: Name of the share: "faithfulness", "causality" or "ceiling".
            variant: Way of fitting, one of those in the rows.
            n_train: Number of training subjects.
            relation: Name of one relation. None is the mean over all of them in each split.

        Returns:
            The mean and its 95 % interval.
        """
        rows = self.select(variant, n_train, relation)
        values = [getattr(row, what) for row in rows]
        return _over_splits(rows, [math.nan if value is None else value for value in values])

    def difference(
        self, what: str, variant: str, other: str, n_train: int, relation: str | None = None
    ) -> Estimate:
        """Give the mean difference of a share between two variants, split by split.

        Args:
            what: Name of the share: "faithfulness", "causality" or "ceiling".
            variant: Way of fitting, one of those in the rows.
            other: Way of fitting whose share is subtracted.
            n_train: Number of training subjects.
            relation: Name of one relation. None is the mean over all of them in each split.

        Returns:
            The mean difference and its 95 % interval.
        """
        rows, others = (self.select(name, n_train, relation) for name in (variant, other))
        gaps = [getattr(a, what) - getattr(b, what) for a, b in zip(rows, others, strict=True)]
        return _over_splits(rows, gaps)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of training subjects."""
        return tuple(sorted({len(row.train) for row in self.rows}))

    def __repr__(self) -> str:
        splits = len({row.split for row in self.rows})
        count = f"{splits} split{'s' * (splits != 1)}"
        lines = [f"RelationStudy({self.model}, {', '.join(self.accuracy)}; {count})"]
        for n in self.sizes:
            lines.append(f"  n = {n:<17} faithfulness           causality")
            for variant in dict.fromkeys(row.variant for row in self.rows):
                cells = [str(self.estimate("faithfulness", variant, n))]
                if variant != MEAN:
                    cells.append(str(self.estimate("causality", variant, n)))
                lines.append(
                    f"    {variant:<19} " + " ".join(f"{cell:<22}" for cell in cells).rstrip()
                )
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None, what: str = "faithfulness") -> Axes:
        """Draw the means of a share with matplotlib, with 95 % intervals over splits.

        Args:
            ax: Axes to draw on. None makes a figure.
            what: Name of the share, as in :meth:`estimate`.

        Returns:
            The axes drawn on: ways of fitting down, one point per number of training subjects.
        """
        names = list(dict.fromkeys(r.variant for r in self.rows if getattr(r, what) is not None))
        series = {}
        for n in self.sizes:
            found = [self.estimate(what, variant, n) for variant in names]
            series[f"n = {n}"] = [(e.value, e.low, e.high) for e in found]
        return estimates(
            ax, names, series, title=", ".join(self.accuracy), xlabel=f"{what} ({self._over(what)})"
        )

    def _over(self, what: str) -> str:
        """What the intervals of a share are over, or that there are none."""
        fits = {(row.variant, len(row.train)) for row in self.rows}
        ends = [self.estimate(what, *fit).low for fit in fits]
        return intervals_over(ends, len({row.split for row in self.rows}), "split")

    def _page(self) -> Page:
        many = len(self.accuracy) > 1
        views = [self._view(relation) for relation in (None, *(self.accuracy if many else ()))]
        notes = [repr(self).splitlines()[0], f"{self._over('faithfulness').capitalize()}."]
        title = "How far one map decodes a relation"
        return Page(title, views, notes, tabs=many, tab_name="Relation")

    def _view(self, relation: str | None) -> View:
        kept = [row for row in self.rows if relation in (None, row.relation)]
        order = sorted({(len(r.train), r.variant): 0 for r in kept}, key=lambda key: key[0])
        shares = {True: ("faithfulness",), False: ("faithfulness", "causality")}
        places = [(n, variant, what) for n, variant in order for what in shares[variant == MEAN]]
        found = [self.estimate(what, variant, n, relation) for n, variant, what in places]
        values, labels = [[e.value, e.low, e.high] for e in found], [[*map(str, p)] for p in places]
        named = ", ".join(f"{n} {x:.0%}" for n, x in self.accuracy.items() if relation in (None, n))
        caption = f"The model itself says the object first: {named} of the subjects."
        view = interval_view(["training", "fit", "share"], labels, np.array(values), caption)
        return replace(view, tab=relation or "all relations")

    def to_dataframe(self) -> pandas.DataFrame:
        """Give the decodings as a pandas table.

        Returns:
            One row per decoding, with its fields as columns; split is called draw, and rank
            edit_rank.

        Raises:
            ValueError: If pandas is missing.
        """
        pandas = need("pandas", "pandas", "to_dataframe")
        names = {"split": "draw", "rank": "edit_rank"}  # which are other things elsewhere
        return pandas.DataFrame([asdict(row) for row in self.rows]).rename(columns=names)

    def to_json(self) -> str:
        """Write the study as JSON; :meth:`from_json` reads it."""
        return study_text(asdict(self), STUDY_FORMAT, indent=1)

    @classmethod
    def from_json(cls, text: str) -> RelationStudy:
        """Read what :meth:`to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            The study that was written.
        """

        def build(data: dict[str, Any]) -> RelationStudy:
            names = ("train", "missed")
            rows = (
                Decoding(**row | {name: tuple(row[name]) for name in names})
                for row in data.pop("rows")
            )
            lists = {name: tuple(data.pop(name)) for name in ("betas", "ranks")}
            return cls(rows=tuple(rows), **lists, **data)

        return read_study(text, STUDY_FORMAT, build, "RelationStudy.to_json")


def _over_splits(rows: Sequence[Decoding], values: Sequence[float]) -> Estimate:
    # Draws of one number take the same subjects in every relation, so they count as one.
    splits: dict[int, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        splits.setdefault(row.split, []).append(value)
    return bootstrap([sum(found) / len(found) for found in splits.values()])


@spelled
def decode(
    model: Any,
    relations: Sequence[Relation],
    n_train: Sequence[int] = (5,),
    splits: int = 8,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    betas: Sequence[float] = BETAS,
    ranks: Sequence[int] = RANKS,
    progress: bool = True,
    **kwargs: Any,
) -> RelationStudy:
    """Decode relations by linear maps of the operator and of the Jacobian, on held-out subjects.

    Split i takes template i, in turn, and draws an order of the subjects. The first n subjects
    train. Those after the largest n test, so that every n is tested on the same subjects. Every
    test subject is edited into another test subject that has another object. Splits of one relation
    share subjects. So an interval tells how much the draw matters, not how other subjects would do.

    Args:
        model: The model, as for :func:`tensorlens_tl.capture`.
        relations: Relations to decode, a list.
        n_train: Numbers of training subjects, a list.
        splits: Number of draws per relation.
        seed: Seed of the draws.
        layers: Indices of the blocks before which h may be read. None is all blocks.
        betas: Values of β to choose from where β is tuned.
        ranks: Ranks of edits to choose from.
        progress: Whether to show a bar after 2 s, one step per draw.
        **kwargs: Arguments of :func:`tensorlens_tl.capture`.

    Returns:
        The study: every decoding, and means with intervals.

    Raises:
        ValueError: If there is no relation or split, a training set has fewer than two subjects or
            leaves fewer than two to test, or all objects are the same.

    Example:
        >>> from tensorlens_tl import demo
        >>> from tensorlens_tl.relations import Relation, decode
        >>> whole = demo.relation("capital")
        >>> few = Relation("capital", whole.templates[:1], whole.samples[:8])
        >>> study = decode(demo.load_model(), [few], n_train=(3,), splits=1, ranks=(8,), layers=[1])
        >>> study.select("operator, β = 1", n_train=3)[0].n_test
        5
    """
    if isinstance(relations, Relation) or isinstance(n_train, int):
        raise ValueError("relations and n_train must be lists. Put a single one into a list.")
    if not relations or splits < 1 or not n_train or not betas:
        raise ValueError(
            f"There are {len(relations)} relations, {splits} splits, {len(n_train)} numbers of "
            f"training subjects and {len(betas)} β. Pass at least one of each."
        )
    if len({relation.name for relation in relations}) < len(relations):
        raise ValueError("Two relations have the same name. Rename one of them.")
    for relation in relations:
        if min(n_train) < 2 or max(n_train) > len(relation.samples) - 2:
            raise ValueError(
                f"n_train={list(n_train)} does not fit {relation.name}, which has "
                f"{len(relation.samples)} subjects, of which at least two must be left to test. "
                f"Pass numbers from 2 to {len(relation.samples) - 2}."
            )
    rows: list[Decoding] = []
    right: dict[str, list[float]] = {relation.name: [] for relation in relations}
    with progress_bar("relations", len(relations) * splits, progress) as bar:
        for relation in relations:
            for template in range(min(splits, len(relation.templates))):
                statements = state(model, relation, template, layers, **kwargs)
                right[relation.name].append(statements.accuracy)
                for split in range(template, splits, len(relation.templates)):
                    rows += _decode(statements, split, n_train, seed, betas, ranks)
                    bar.update()
    rows.sort(key=lambda row: (list(right).index(row.relation), row.split))
    logits, name = statements.lenses[0].logits, statements.lenses[0].capture.model_name
    return RelationStudy(
        model=name,
        dtype=str(logits.dtype).removeprefix("torch."),
        seed=seed,
        betas=tuple(betas),
        ranks=tuple(ranks),
        accuracy={relation: sum(shares) / len(shares) for relation, shares in right.items()},
        rows=tuple(rows),
    )


def _decode(
    statements: Statements,
    split: int,
    n_train: Sequence[int],
    seed: int,
    betas: Sequence[float],
    ranks: Sequence[int],
) -> list[Decoding]:
    """Decode one relation from one draw, by every method and number of training subjects."""
    # 1. The draw.
    order, pairs = _draw(statements, min(n_train), max(n_train), seed + split)
    test, subjects, token = order[max(n_train) :], statements.relation.subjects, statements.first
    said = token[[to for _, to in pairs]]
    rows = []
    for n in n_train:
        train = order[:n]

        def row(variant: str, decoded: Tensor, train=train, **chosen: Any) -> Decoding:
            wrong = decoded != token[test]
            return Decoding(
                relation=statements.relation.name,
                template=statements.template,
                split=split,
                train=tuple(subjects[i] for i in train),
                n_test=len(test),
                variant=variant,
                faithfulness=_share(~wrong),
                missed=tuple(subjects[i] for i, w in zip(test, wrong, strict=True) if w),
                echoes=int(torch.isin(decoded[wrong], token[train]).sum()),
                **chosen,
            )

        # A floor for all methods: the mean output knows no subject at all.
        mean = statements.logits(statements.output[train].mean(0)).argmax()
        rows.append(row(MEAN, mean.expand(len(test))))
        for method in MAP_METHODS:
            # 4. Edits, which do not depend on β.
            edit, rank = statements.fit_causal(method, train, ranks)
            edited = statements.causal(edit, rank, pairs).argmax(-1) == said
            most = statements.substituted(edit.layer, pairs).argmax(-1) == said
            shares = {"causality": _share(edited), "ceiling": _share(most)}
            edits = {"edit_layer": edit.layer, "rank": rank, **shares}
            # 2. and 3. The fit, and what it decodes.
            for how, grid in (("= 1", (1.0,)), ("tuned", betas)):
                fitted = statements.fit(method, train, grid)
                chosen = {"layer": fitted.layer, "beta": fitted.beta, **edits}
                rows.append(row(f"{method}, β {how}", statements.decoded(fitted, test), **chosen))
    return rows


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _draw(
    statements: Statements, fewest: int, most: int, seed: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Draw an order in which training and test subjects have at least two objects each.

    Args:
        statements: The statements of all subjects.
        fewest: Smallest number of training subjects, the first of the order.
        most: Largest number of training subjects; the subjects after these test.
        seed: Seed of the draw.

    Returns:
        The order, as indices, and the edits to test: pairs of test subjects with different objects.

    Raises:
        ValueError: If no such order was drawn.
    """
    first = statements.first.tolist()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        # With one object on either side, the constant answer would be right.
        order = torch.randperm(len(first), generator=generator, device="cpu").tolist()
        test = order[most:]
        if len({first[i] for i in order[:fewest]}) > 1 and len({first[i] for i in test}) > 1:
            break
    else:
        raise ValueError(
            f"After {statements.template!r} the model says {len(set(first))} different tokens for "
            f"{len(first)} subjects of {statements.relation.name}, too few to give training and "
            "test subjects two each. Use another template, or more subjects."
        )
    pairs = []
    for i in test:
        others = [j for j in test if first[j] != first[i]]
        chosen = int(torch.randint(len(others), (), generator=generator, device="cpu"))
        pairs.append((i, others[chosen]))
    return order, pairs
