"""How faithfully, and how causally, relations decode linearly: splits, methods, intervals.

:func:`decode` fits the maps of :mod:`relation_maps` on a few training subjects, again and again, and
asks of all others

    faithfulness   the share that β W h + b decodes to the model's own first token
    causality      the share that the real model, run again with h + W†(y′ − y) in h's place,
                   says the token of the subject it was edited into

Layer, β and rank are chosen on the training subjects alone (``Statements.fit``). β has no part in
edits: a method's are the same whether its β is tuned or not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation import Estimate, bootstrap
from .linear_relation import METHODS
from .relation import Relation
from .statements import RANKS, Statements, state

__all__ = ["BETAS", "RANKS", "Decoding", "Relation", "RelationStudy", "decode", "state"]

BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
FORMAT = "tensorlens_tl relation study 1"
VARIANTS = tuple(f"{method}, β {how}" for method in METHODS for how in ("= 1", "tuned"))
MEAN = "mean output"
"""The variant that knows no subject: W = 0, b the training subjects' mean output."""


@dataclass(frozen=True)
class Decoding:
    """One way to fit one relation from one draw of training subjects, tested on the rest.

    Attributes:
        relation: The relation's name.
        template: What the subjects filled.
        split: Which draw.
        train: The training subjects.
        n_test: How many others there were.
        variant: One of :data:`VARIANTS`, or :data:`MEAN`.
        layer: The layer chosen for decoding; None for the mean.
        beta: β chosen for decoding, or None.
        faithfulness: The share decoded as the model says.
        missed: The test subjects that are not.
        echoes: How many of these are decoded to a training subject's token.
        edit_layer: The layer chosen for edits, or None.
        rank: The rank chosen for edits, or None.
        causality: The share of edits after which the real model says the other's token, or None.
        ceiling: The same share with the other subject's own h put there, or None.
    """

    relation: str
    template: str
    split: int
    train: tuple[str, ...]
    n_test: int
    variant: str
    faithfulness: float
    missed: tuple[str, ...]
    echoes: int
    layer: int | None = None
    beta: float | None = None
    edit_layer: int | None = None
    rank: int | None = None
    causality: float | None = None
    ceiling: float | None = None


@dataclass(frozen=True)
class RelationStudy:
    """Every decoding of some relations, and what they come to.

    Attributes:
        model: The model's name.
        dtype: Its dtype.
        seed: Of the draws.
        betas: β to choose from.
        ranks: Ranks to choose from.
        accuracy: How often the model's own first token begins the object, by relation.
        rows: The decodings.
    """

    model: str
    dtype: str
    seed: int
    betas: tuple[float, ...]
    ranks: tuple[int, ...]
    accuracy: dict[str, float]
    rows: tuple[Decoding, ...]

    def select(self, variant: str, n_train: int, relation: str | None = None) -> list[Decoding]:
        """The decodings of a variant, in one order for all variants.

        Args:
            variant: One of those in the rows.
            n_train: From how many training subjects.
            relation: Of one relation, or of all.

        Returns:
            The rows.

        Raises:
            ValueError: If there is none; says what there is.
        """
        found = [
            row for row in self.rows
            if (row.variant, len(row.train)) == (variant, n_train) and relation in (None, row.relation)
        ]  # fmt: skip
        if not found:
            kinds = sorted({f"{row.variant} (n = {len(row.train)})" for row in self.rows})
            raise ValueError(
                f"no rows of {variant!r}, n = {n_train}, {relation or 'any relation'}; expected one of "
                f"{', '.join(kinds)} of {', '.join(self.accuracy)}"
            )
        return found

    def estimate(
        self, what: str, variant: str, n_train: int, relation: str | None = None
    ) -> Estimate:
        """The mean of a share over splits and, in each, relations; the bootstrap draws splits.

        Args:
            what: "faithfulness", "causality" or "ceiling".
            variant: As in :meth:`select`.
            n_train: Likewise.
            relation: Likewise.

        Returns:
            The mean and its 95 % interval.
        """
        rows = self.select(variant, n_train, relation)
        values = [getattr(row, what) for row in rows]
        return _over_splits(rows, [math.nan if value is None else value for value in values])

    def difference(
        self, what: str, variant: str, other: str, n_train: int, relation: str | None = None
    ) -> Estimate:
        """The same of a variant minus another, split by split.

        Args:
            what: As in :meth:`estimate`.
            variant: As in :meth:`select`.
            other: What is subtracted.
            n_train: As in :meth:`select`.
            relation: Likewise.

        Returns:
            The mean difference and its 95 % interval.
        """
        ours, theirs = (self.select(name, n_train, relation) for name in (variant, other))
        gaps = [getattr(a, what) - getattr(b, what) for a, b in zip(ours, theirs, strict=True)]
        return _over_splits(ours, gaps)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of training subjects."""
        return tuple(sorted({len(row.train) for row in self.rows}))

    def __repr__(self) -> str:
        splits = len({row.split for row in self.rows})
        lines = [f"RelationStudy({self.model}, {', '.join(self.accuracy)}; {splits} splits)"]
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

    def to_json(self) -> str:
        """Everything as JSON; :meth:`from_json` reads it."""
        return json.dumps({"format": FORMAT} | asdict(self), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> RelationStudy:
        """Read what :meth:`to_json` wrote.

        Returns:
            The study.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("it has another format")
            names = ("train", "missed")
            rows = (
                Decoding(**row | {name: tuple(row[name]) for name in names})
                for row in data.pop("rows")
            )
            lists = {name: tuple(data.pop(name)) for name in ("betas", "ranks")}
            return cls(rows=tuple(rows), **lists, **data)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected JSON with the format {FORMAT!r}, as RelationStudy.to_json writes: {error}"
            ) from None


def _over_splits(rows: Sequence[Decoding], values: Sequence[float]) -> Estimate:
    # Draws of one number take the same subjects in every relation, so they count as one.
    splits: dict[int, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        splits.setdefault(row.split, []).append(value)
    return bootstrap([sum(found) / len(found) for found in splits.values()])


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
    """Decode relations by the operator's and the Jacobian's maps, on subjects held out of the fit.

    Split i takes template i (in turn) and draws an order of the subjects; its first n train and those
    after the largest n test, so that all n are tested on the same subjects. Every test subject is edited
    into one of them with another object. Splits of one relation share subjects: their interval tells how
    much the draw matters, not how another set of subjects would do.

    Args:
        model: As for :func:`tensorlens_tl.capture`.
        relations: The relations.
        n_train: Numbers of training subjects.
        splits: How many draws a relation.
        seed: Of the draws.
        layers: Blocks before which h may be read; by default all.
        betas: β to choose from where it is tuned.
        ranks: Ranks of edits to choose from.
        progress: Whether to show a bar, a step a draw.
        **kwargs: For the capture.

    Returns:
        The study.

    Raises:
        ValueError: If there is no relation or split, a training set has fewer than two subjects or
            leaves fewer than two to test, or all objects are one.
    """
    if isinstance(relations, Relation) or isinstance(n_train, int):
        raise ValueError("expected lists of relations and of n_train, got one: put it in a list")
    if not relations or splits < 1 or not n_train or not betas:
        raise ValueError(
            f"expected at least one relation, split, number of training subjects and β, got "
            f"{len(relations)}, {splits}, {len(n_train)} and {len(betas)}"
        )
    if len({relation.name for relation in relations}) < len(relations):
        raise ValueError("expected relations with different names: rename one of them")
    for relation in relations:
        if min(n_train) < 2 or max(n_train) > len(relation.samples) - 2:
            raise ValueError(
                f"expected 2 to {len(relation.samples) - 2} training subjects of {relation.name}, got "
                f"{list(n_train)}: {len(relation.samples)} subjects leave two to test on at least"
            )
    rows: list[Decoding] = []
    right: dict[str, list[float]] = {relation.name: [] for relation in relations}
    with tqdm(total=len(relations) * splits, desc="relations", disable=not progress) as bar:
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
        name, str(logits.dtype).removeprefix("torch."), seed, tuple(betas), tuple(ranks),
        {name: sum(shares) / len(shares) for name, shares in right.items()}, tuple(rows),
    )  # fmt: skip


def _decode(
    statements: Statements, split: int, n_train: Sequence[int], seed: int,
    betas: Sequence[float], ranks: Sequence[int],
) -> list[Decoding]:  # fmt: skip
    order, pairs = _draw(statements, min(n_train), max(n_train), seed + split)
    test, subjects, token = order[max(n_train) :], statements.relation.subjects, statements.first
    said = token[[to for _, to in pairs]]
    rows = []
    for n in n_train:
        train = order[:n]

        def row(variant: str, decoded: Tensor, train=train, **chosen: Any) -> Decoding:
            wrong = decoded != token[test]
            return Decoding(
                relation=statements.relation.name, template=statements.template, split=split,
                train=tuple(subjects[i] for i in train), n_test=len(test), variant=variant,
                faithfulness=_share(~wrong),
                missed=tuple(subjects[i] for i, w in zip(test, wrong, strict=True) if w),
                echoes=int(torch.isin(decoded[wrong], token[train]).sum()),
                **chosen,
            )  # fmt: skip

        mean = statements.logits(statements.output[train].mean(0)).argmax()
        rows.append(row(MEAN, mean.expand(len(test))))
        for method in METHODS:
            edit, rank = statements.fit_causal(method, train, ranks)
            edited = statements.causal(edit, rank, pairs).argmax(-1) == said
            most = statements.substituted(edit.layer, pairs).argmax(-1) == said
            shares = {"causality": _share(edited), "ceiling": _share(most)}
            edits = {"edit_layer": edit.layer, "rank": rank, **shares}
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
    """An order of the subjects whose first ones have two objects at least, and the edits to test."""
    first = statements.first.tolist()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        order = torch.randperm(len(first), generator=generator, device="cpu").tolist()
        test = order[most:]
        if len({first[i] for i in order[:fewest]}) > 1 and len({first[i] for i in test}) > 1:
            break
    else:
        raise ValueError(
            f"expected {fewest} training subjects of {statements.relation.name} and the rest to have two "
            f"objects at least by the model's own word, but it says {len(set(first))} of {len(first)} "
            f"subjects after {statements.template!r}: take another template or more subjects"
        )
    pairs = []
    for i in test:
        others = [j for j in test if first[j] != first[i]]
        pairs.append(
            (i, others[int(torch.randint(len(others), (), generator=generator, device="cpu"))])
        )
    return order, pairs
