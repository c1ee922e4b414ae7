"""``docs/real_relations.md`` from ``results/real_relations.json``: relations of a real model."""

from __future__ import annotations

import json
from typing import Any

from relations import OURS, THEIRS, causality, chosen, faithfulness

from tensorlens_tl.relations.decoding_study import RelationStudy

TITLE = "Relations"
WANTED = 15


def study_of(r: dict[str, Any]) -> RelationStudy:
    """The study of all relations."""
    return RelationStudy.from_json(json.dumps(r["study"]))


def bars(r: dict[str, Any]) -> list[list[str]]:
    """One row per number of training subjects."""
    study, rows = study_of(r), []
    n = len(study.accuracy)
    enough = "enough" if n >= WANTED else f"{WANTED} were wanted"
    for size in study.sizes:
        gap = study.difference("faithfulness", OURS, THEIRS, size)
        each = [
            study.difference("faithfulness", OURS, THEIRS, size, name).value >= 0
            for name in study.accuracy
        ]
        told = "met" if gap.value >= 0 and all(each) else "not met"
        told += f": by {100 * gap.value:+.1f} points overall, in {sum(each)} of {n} relations"
        shown = f"{n} relations ({enough})"
        rows.append([f"{OURS}, against {THEIRS}, n = {size}", shown, told])
    return rows


def page(r: dict[str, Any]) -> str:
    """The page."""
    study = study_of(r)
    splits = len({row.split for row in study.rows})
    depths = ", ".join(f"{d:.0%}" for d in r["depths"])
    most = max(len(row.train) + row.n_test for row in study.rows)
    return f"""<!-- Made by benchmarks/real_page.py; do not edit. -->

# Relations of a real model

[Relations, and local validity](relations.md) tells what is measured, on a small trained model. Here
it is SmolLM2-135M, and relations that Hernandez et al. 2024 published. Only subjects that the model
knows are used, at most {most} a relation: its own next token begins the object.
{len(r["without"])} of the relations that were tried have too few of them, or too few
different answers. {splits} draws a relation, seed {study.seed}.
Layers to choose from lie at {depths} of the depth.
`benchmarks/real_relations.py` measures, and goes on where it was stopped.

## Faithfulness: decoded to the model's own first token, in %

Bar: {OURS}, at least {THEIRS}, for each relation and overall.

{faithfulness(study)}

## Causality: the model says another subject's token after an edit, in %

{causality(study)}

## What was chosen

{chosen(study)}
"""
