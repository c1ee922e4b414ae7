"""One linear map of a relation, and how well it decodes: a row of a study."""

from __future__ import annotations

from dataclasses import dataclass

from .linear_relation import MAP_METHODS

VARIANTS = tuple(f"{method}, β {how}" for method in MAP_METHODS for how in ("= 1", "tuned"))
MEAN = "mean output"
"""The variant that knows no subject: W is 0, and b the training subjects' mean output."""


@dataclass(frozen=True)
class Decoding:
    """One way to fit one relation from one draw of training subjects, tested on the rest.

    Attributes:
        relation: Name of the relation.
        template: Text that the subjects filled.
        split: Number of the draw.
        train: Texts of the training subjects.
        n_test: Number of test subjects.
        variant: Way of fitting, one of :data:`VARIANTS`, or :data:`MEAN`.
        faithfulness: Share of test subjects decoded to the model's own next token.
        missed: Texts of the test subjects decoded to another token.
        echoes: Number of missed subjects that are decoded to a training subject's token.
        layer: Layer chosen for decoding, or None for the mean.
        beta: Value of β chosen for decoding, or None for the mean.
        edit_layer: Layer chosen for edits, or None for the mean.
        rank: Rank chosen for edits, or None for the mean.
        causality: Share of edits after which the real model says the other subject's token, or
            None for the mean.
        ceiling: Share of runs with the other subject's own h in which the model says the other
            subject's token, or None for the mean.
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
