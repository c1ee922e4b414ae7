"""Relations decoded linearly on SmolLM2-135M: the operator at β = 1 beside the Jacobian at its own.

    python benchmarks/real_relations.py --keep FOLDER [--data FOLDER] [--splits 6] [--until HH:MM]
    python benchmarks/real_relations.py --keep FOLDER --merge   # the JSON, and the page of it

1. Relations come from a folder (``--data``), in the form of Hernandez et al. 2024. Of each, the
   template is taken after which the model knows most subjects: its own next token begins the
   object. Known subjects alone are used, at most ``--most`` of them, and relations with too few are
   left out.
2. Every relation is studied by ``tensorlens_tl.relations.decode``: maps from 3 and from 5 training
   subjects, tested on the others, and edits with each map's inverse.
3. Every relation's study is kept in the folder, so a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import evaluation
import resumed
import torch

import tensorlens_tl
from tensorlens_tl.relations import Relation
from tensorlens_tl.relations.decoding_study import RelationStudy, decode

RESULTS = Path(__file__).parent / "results" / "real_relations.json"
N_TRAIN, LEAST = (3, 5), 9
DEPTHS, RANKS = (0.3, 0.5, 0.65, 0.8), (8, 32, 128)
"""Blocks before which h is read, as shares of all blocks; and ranks of edits."""


@torch.no_grad()
def known(model: Any, relation: Relation, most: int) -> Relation | None:
    """The best template, with subjects that the model knows; None for too few, or one object."""
    best: list[tuple[str, str]] = []
    chosen = ""
    for template in relation.templates:
        if not template.rstrip().endswith("{}"):  # else the object would follow at once
            rows = [model.to_tokens(template.replace("{}", s))[0] for s in relation.subjects]
            said = [""] * len(rows)
            for n in sorted({len(row) for row in rows}):
                these = [i for i, row in enumerate(rows) if len(row) == n]
                last = model(torch.stack([rows[i] for i in these]))[:, -1].argmax(-1)
                for i, token in zip(these, last.tolist(), strict=True):
                    said[i] = model.tokenizer.decode([token]).strip()
            pairs = zip(relation.samples, said, strict=True)
            found = [pair for pair, word in pairs if word and pair[1].startswith(word)]
            if len(found) > len(best):
                best, chosen = found, template
    drawn = torch.randperm(len(best), generator=torch.Generator().manual_seed(evaluation.SEED))
    best = [best[i] for i in drawn[:most].tolist()]
    if len(best) < LEAST or len({o for _, o in best}) < 3:
        return None
    return Relation(relation.name, (chosen,), tuple(best))


def run(args: argparse.Namespace) -> None:
    """One relation after the other, until the time is over or all is done."""
    load = tensorlens_tl.load_model
    model = load(args.model) if args.model else tensorlens_tl.models.smollm2()
    layers = sorted({round(depth * model.cfg.n_layers) for depth in DEPTHS})
    for path in sorted((args.data / "text" / "relations").glob("*.json")):
        kept = args.keep / path.name
        if kept.exists():
            continue
        start, study = time.process_time(), None
        try:
            # 1. The template and the subjects that are known.
            if relation := known(model, Relation.load(path), args.most):
                # 2. The study.
                how = {"layers": layers, "ranks": RANKS, "progress": False}
                study = decode(model, [relation], N_TRAIN, args.splits, **how)
        except ValueError as error:  # too few different answers, or a subject ends inside a token
            print(f"{path.stem}: {error}", file=sys.stderr)
        # 3. Kept.
        text = "null" if study is None else study.to_json()
        if resumed.keep(kept, text, f"{study}", start, args.until):
            return


def merged(folder: Path) -> dict[str, Any]:
    """One study of all relations, and the names of those that were left out."""
    studies, without = [], []
    for path in sorted(folder.glob("*.json")):
        text = path.read_text()
        if text == "null":
            without.append(path.stem)
        else:
            studies.append(json.loads(text))
    whole = dict(studies[0]) if studies else {}
    whole["accuracy"] = {k: v for one in studies for k, v in one["accuracy"].items()}
    whole["rows"] = [row for one in studies for row in one["rows"]]
    if studies:
        RelationStudy.from_json(json.dumps(whole))  # what the page is made of
    return {"study": whole, "without": without, "depths": DEPTHS}


def main() -> None:
    parser = resumed.arguments(__doc__, "every study")
    parser.add_argument("--splits", type=int, default=6)
    parser.add_argument("--most", type=int, default=16, help="subjects of a relation at most")
    args = parser.parse_args()
    resumed.measure_or_merge(args, run, merged, RESULTS)


if __name__ == "__main__":
    main()
