"""Relations decoded linearly, and how far from its prompt the operator holds: two studies.

``python benchmarks/relations.py [--quick] [--json PATH] [--page PATH]``; ``--from PATH`` makes the
page of a JSON file that is there already.

1. The bundled model's four relations of countries: the frozen operator's maps beside the
   Jacobian's. Bar: the operator's faithfulness at β = 1 is at least the Jacobian's at its tuned β,
   for each relation and over all. What the operator misses is decoded again with the subject's own
   W, or b.
2. Local validity of the operator and of the Jacobian's first order, on the bundled model and on
   stories260K (float64): along random, token-swap and steering directions, and with parts held.

3. Both are kept as JSON, of which alone ``docs/relations.md`` is made. The exit status is 1 where
   the operator is below the bar over all relations.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

import torch

from tensorlens_tl import demo
from tensorlens_tl.demo.facts import RELATIONS
from tensorlens_tl.evaluation.intervals import bootstrap
from tensorlens_tl.hosts import load_model
from tensorlens_tl.relations.decoding import MEAN, VARIANTS
from tensorlens_tl.relations.decoding_study import RelationStudy, decode
from tensorlens_tl.relations.linear_relation import MAP_METHODS
from tensorlens_tl.relations.statements import state
from tensorlens_tl.relations.validity_study import ValidityStudy, validity

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
JSON, PAGE = ROOT / "benchmarks" / "results" / "relations.json", ROOT / "docs" / "relations.md"
OURS, THEIRS = "operator, β = 1", "jacobian, β tuned"
HELD = ("pattern", "scale", "ratio", "all")
SHOWN = (0.01, 0.1, 0.3162, 1.0)


def stories_prompts(n):
    """Sentences of the TinyStories sample."""
    text = (SHARED / "text" / "tinystories_sample" / "tinystories_sample.txt").read_text()
    text = text.replace("<|endoftext|>", " ").replace("\n", " ")
    return [s.strip() + "." for s in text.split(".") if len(s.strip()) > 5][:n]


def demo_prompts(n):
    """Held-out prompts of every task, equally many."""
    return [pair.clean for task in demo.TASKS for pair in demo.prompts(task, n // len(demo.TASKS))]


def own_parts(model, study):
    """What the operator misses at β = 1, decoded with the subject's own W or b for the mean's.

    Counts by relation and number of training subjects.
    """
    found = {}
    missing = [row for n in study.sizes for row in study.select(OURS, n) if row.missed]
    for name, template in dict.fromkeys((row.relation, row.template) for row in missing):
        statements = state(model, demo.relation(name), template)
        index = statements.relation.subjects.index
        for row in missing:
            if (row.relation, row.template) != (name, template):
                continue
            mean = statements.fit("operator", [index(s) for s in row.train], layers=[row.layer])
            for i in map(index, row.missed):
                own, h = statements.maps("operator", i), statements.hidden[i, row.layer]
                W, b, token = own.W[row.layer], own.b[row.layer], statements.first[i]
                ways = {"own W": W @ h + mean.b, "own b": mean.W @ h + b, "own W and b": W @ h + b}
                hits = {
                    way: bool(statements.logits(y).argmax() == token) for way, y in ways.items()
                }
                counts = found.setdefault(f"{name}, n = {len(row.train)}", Counter(missed=0))
                counts.update({"missed": 1} | {way: int(hit) for way, hit in hits.items()})
    return found


def one_prompt(model, study):
    """Each subject's own W and b before block 0 at every other subject: n = 1, and a whole swap.

    At β = 1, and the Jacobian's also at the median β that :func:`decode` tuned for most subjects.

    Per subject: the median of ‖y′ − W h′ − b‖ / ‖y′ − y‖ and of the cosine of W h′ + b − y and y′ −
    y over the others, and the share of them decoded to the model's own first token.
    """
    found = {}
    tuned = statistics.median(row.beta for row in study.select(THEIRS, max(study.sizes)))
    for name in study.accuracy:
        statements = state(model, demo.relation(name), 0, layers=[0])
        n, y = len(statements), statements.output
        for method, beta in (*((method, 1.0) for method in MAP_METHODS), ("jacobian", tuned)):
            maps = [statements.maps(method, i) for i in range(n)]
            W, b = torch.cat([m.W for m in maps]), torch.cat([m.b for m in maps])
            told = beta * torch.einsum("ijk,mk->imj", W, statements.hidden[:, 0]) + b[:, None]
            true, off = y - y[:, None], ~torch.eye(n, dtype=torch.bool)
            # Subjects may share their object, not their output: a difference is 0 for itself only.
            errors = (told - y).norm(dim=-1)[off] / true.norm(dim=-1)[off]
            cosines = torch.cosine_similarity(told - y[:, None], true, dim=-1)[off]
            right = (statements.logits(told).argmax(-1) == statements.first)[off].double()
            per = [x.view(n, n - 1) for x in (errors, cosines, right)]
            rows = (per[0].median(1).values, per[1].median(1).values, per[2].mean(1))
            found[f"{name}, {method}, β = {beta:g}"] = [
                [round(v, 4) for v in row.tolist()] for row in rows
            ]
    return found


# --- The page ------------------------------------------------------------------------------------


def table(head, rows):
    return "\n".join(
        ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    )


def percent(estimate, signed=False):
    sign = "+" if signed else ""
    low, high = (f"{100 * x:{sign}.1f}" for x in (estimate.low, estimate.high))
    return f"{100 * estimate.value:{sign}.1f} [{low}, {high}]"


def number(estimate):
    low, high = (f"{x:.2g}" if x != float("inf") else "∞" for x in (estimate.low, estimate.high))
    return f"{estimate.value:.2g} [{low}, {high}]"


def relation_rows(study, what, variants):
    """One row per number of training subjects and relation, the last of each over all."""
    for n in study.sizes:
        for name in (*study.accuracy, None):
            cells = [percent(study.estimate(what, variant, n, name)) for variant in variants]
            yield n, name or "all", cells, (n, name)


def faithfulness(study):
    rows = []
    for n, name, cells, (_, key) in relation_rows(study, "faithfulness", (MEAN, *VARIANTS)):
        gap = study.difference("faithfulness", OURS, THEIRS, n, key)
        reached = "yes" if gap.value >= 0 else "no"
        rows.append([n, name, *cells, percent(gap, signed=True), reached])
    return table(["n", "relation", MEAN, *VARIANTS, f"{OURS} − {THEIRS}", "bar"], rows)


def causality(study):
    rows = []
    sides = [f"{method}, β = 1" for method in MAP_METHODS]
    for n, name, cells, (_, key) in relation_rows(study, "causality", sides):
        most = [percent(study.estimate("ceiling", side, n, key)) for side in sides]
        gap = percent(study.difference("causality", *sides, n, key), signed=True)
        rows.append([n, name, *cells, gap, *most])
    head = [
        "n",
        "relation",
        *MAP_METHODS,
        "difference",
        *(f"other's h there ({m})" for m in MAP_METHODS),
    ]
    return table(head, rows)


def chosen(study):
    rows = []
    for n in study.sizes:
        for variant in VARIANTS:
            found = study.select(variant, n)
            betas = statistics.quantiles([row.beta for row in found], n=4)
            wrong = sum(len(row.missed) for row in found)
            total = sum(row.n_test for row in found)
            echo = sum(row.echoes for row in found)
            rows.append(
                [
                    n,
                    variant,
                    f"{betas[1]:g} ({betas[0]:g} to {betas[2]:g})",
                    counts(found, "layer"),
                    counts(found, "edit_layer"),
                    counts(found, "rank"),
                    f"{wrong} of {total}",
                    f"{echo} of {wrong}",
                ]
            )
    head = [
        "n",
        "variant",
        "β: median (quartiles)",
        "layer: draws",
        "layer of edits",
        "rank of edits",
        "missed",
        "of these, a training subject's object",
    ]
    return table(head, rows)


def counts(rows, name):
    found = Counter(getattr(row, name) for row in rows)
    return ", ".join(f"{value}: {found[value]}" for value in sorted(found))


def most_missed(study):
    rows = []
    for variant in (OURS, THEIRS):
        found = Counter(
            f"{s} ({r.relation})"
            for n in study.sizes
            for r in study.select(variant, n)
            for s in r.missed
        )
        listed = ", ".join(f"{name} {count}" for name, count in found.most_common(6))
        rows.append([variant, found.total(), len(found), listed or "–"])
    return table(["variant", "missed", "different subjects", "most often"], rows)


def own_table(found):
    ways = ("missed", "own W", "own b", "own W and b")
    return table(
        ["relation", *ways], [[name, *(row[way] for way in ways)] for name, row in found.items()]
    )


def one_table(found):
    rows = []
    for name, (errors, cosines, right) in found.items():
        relation, method = name.split(", ", 1)
        cells = [number(bootstrap(errors)), number(bootstrap(cosines)), percent(bootstrap(right))]
        rows.append([relation, method, *cells])
    head = ["relation", "method", "error", "cosine", "decoded as the model says, in %"]
    return table(head, rows)


def radii(study):
    rows = []
    for kind in study.kinds:
        crossing = study.crossing(kind)
        whole = statistics.median(row.whole for row in study.select(kind))
        rows.append(
            [
                kind,
                *(number(study.radius(kind, method)) for method in MAP_METHODS),
                number(study.limit(kind)),
                f"{crossing:.2g}" if crossing else "–",
                "–" if kind == "random" else f"{whole:.2g}",
            ]
        )
    head = [
        "direction",
        "operator: radius of 10 %",
        "Jacobian: radius of 10 %",
        "operator's error at δ → 0",
        "operator's below the Jacobian's from",
        "size of the whole δ",
    ]
    return table(head, rows)


def errors(study):
    sizes = [size for size in SHOWN if size in study.sizes]
    rows = [
        [kind, method, *(number(study.error(kind, method, size)) for size in sizes)]
        for kind in study.kinds
        for method in MAP_METHODS
    ]
    return table(["direction", "method", *(f"{size:.2g}" for size in sizes)], rows)


def held(study):
    rows = [
        [kind, number(study.limit(kind)), *(number(study.limit(kind, part)) for part in HELD)]
        for kind in study.kinds
    ]
    return table(
        ["direction", "none", *(f"{part}s" if part != "all" else part for part in HELD)], rows
    )


def validity_study(one):
    """A validity study, and what its prompts were."""
    kind = one["prompts"]
    return ValidityStudy.from_json(
        json.dumps({k: v for k, v in one.items() if k != "prompts"})
    ), kind


def page(data):
    """The page, all figures from the JSON."""
    study = RelationStudy.from_json(json.dumps(data["relations"]))
    splits = len({row.split for row in study.rows})
    right = ", ".join(f"{name} {100 * share:.1f} %" for name, share in study.accuracy.items())
    sections = [
        f"""<!-- Made by benchmarks/relations.py of benchmarks/results/relations.json; \
do not edit. -->

# Relations, and local validity

Is the frozen operator of one prompt good for another? Two answers, on trained models. \
Where another subject
stands in the same sentence: its block from the subject to the end decodes the others, at β = 1, \
even
from one prompt. For a step in an arbitrary direction, however small: \
it is no first-order model of what
the real model does, which the Jacobian is, for small steps.

## Relations decoded linearly

y ≈ β W h + b: h is the residual before a block at the subject's last token, y the final normalized
residual at the last position, W and b means over n training subjects' prompts (Hernandez et al. \
2024,
arXiv 2308.09124). *Operator*: W is the frozen operator's block, \
b the operator on everything else; on
its own prompt W h + b = y exactly, without a remainder. *Jacobian*: W = ∂y/∂h of the real model, \
b the
remainder y − W h. *Mean output* knows no subject.

{study.model} ({study.dtype}). Its own first token is right in {right} of
the prompts. {splits} draws a relation, its phrasings in turn, seed {study.seed};
the subjects that are in no training set are tested.
The layer (and β of {", ".join(f"{b:g}" for b in study.betas)}; and the rank of edits of
{", ".join(map(str, study.ranks))}) is chosen on the training subjects alone. In brackets, \
95 % bootstrap
intervals over draws: they tell how much the training subjects and the phrasing matter, \
not how other
countries would do.

### Faithfulness: decoded to the model's own first token, in %

Bar: {OURS}, at least {THEIRS}.

{faithfulness(study)}

### Causality: the real model says another subject's token after h + W†(y′ − y), in %

β has no part in it. "Other's h there": the real model with the other subject's own h in the same \
place.

{causality(study)}

### What was chosen, and what is missed

{chosen(study)}

A decoding that says a training subject's object has b outweigh β W h: the last column tells what
share of the misses β could mend by being larger.

{most_missed(study)}

The operator's misses at β = 1, decoded again with the subject's own W beside the training \
subjects' b,
with its own b beside their W, and with both, which is the exactness on its own prompt:

{own_table(data["own parts"])}

Where the own W alone mends a miss, the mean W is what is wrong for this subject: its patterns,
scales and ratios are not those that the training subjects froze.

### From one prompt to another

One prompt's own W and b (n = 1, h before block 0, the first phrasing) at every other subject, \
as if its
token were swapped in: the error ‖y′ − β W h′ − b‖ / ‖y′ − y‖, \
the cosine of β W h′ + b − y and y′ − y, and
what is decoded. The Jacobian's also at the median β that was tuned for the largest n. Means over
prompts of each one's median (share) over subjects, 95 % bootstrap intervals over prompts.

{one_table(data["one prompt"])}

## Local validity

r(δ) = ‖F(X + δ) − T (X + δ) − c‖ / ‖F(X + δ) − F(X)‖, with F the real model from X to the final \
normalized
residual at all positions, beside the real Jacobian's first-order error. Sizes are ‖δ‖ / ‖X‖ at the
positions that δ moves; 1 is the error of saying that nothing changes. *Random*: a Gaussian δ at
every position. *Swap*: one token's embedding toward a random other token's. *Steering*: \
one vector at
every position, the difference of two other prompts' mean embeddings. Medians over prompts, 95 %
bootstrap intervals; a radius is where the error first passes 10 %, 0 where it is above from the
start.

T holds what J derives, so r does not go to 0 with δ but to ‖(J − T) δ‖ / ‖J δ‖."""
    ]
    for one, kind in map(validity_study, data["validity"]):
        sections.append(
            f"""### {one.model}

{one.n} {kind}; {one.dtype}.

{radii(one)}

Errors by size:

{errors(one)}

The operator's error at δ → 0 where the real model holds parts of its run by hooks. \
With all three held,
what is left is rounding: pattern, scale and ratio are the whole difference between T and J.

{held(one)}"""
        )
    return "\n\n".join(sections) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 draws of 2 relations, 10 prompts")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--page", type=Path, help="where to write the page")
    parser.add_argument("--from", dest="source", type=Path, help="results to make the page of")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # 1. and 2. Both studies, or those of a file.
    data = json.loads(args.source.read_text()) if args.source else measure(args.quick)
    # 3. Kept, shown, and compared with the bar.
    if args.json:
        args.json.parent.mkdir(exist_ok=True)
        args.json.write_text(json.dumps(data, ensure_ascii=False) + "\n")
    study, text = RelationStudy.from_json(json.dumps(data["relations"])), page(data)
    print(study, *(validity_study(one)[0] for one in data["validity"]), text, sep="\n\n")
    if args.page:
        args.page.write_text(text)
    gaps = [study.difference("faithfulness", OURS, THEIRS, n).value for n in study.sizes]
    return int(min(gaps) < 0)


def measure(quick):
    return measure_relations(quick) | {"validity": measure_validity(quick)}


def measure_relations(quick):
    # 1. Relations.
    model = demo.load_model()
    relations = [demo.relation(name) for name in (RELATIONS[:2] if quick else RELATIONS)]
    study = decode(model, relations, (3, 5), splits=2 if quick else 16, progress=True)
    return {
        "relations": json.loads(study.to_json()),
        "own parts": own_parts(model, study),
        "one prompt": one_prompt(model, study),
    }


def measure_validity(quick):
    # 2. Local validity.
    kind = "held-out prompts of its grammar, equally many of every task"
    runs = [(demo.load_model().to(torch.float64), demo_prompts(10 if quick else 200), kind)]
    if (SHARED / "stories260K").is_dir():
        stories = load_model(str(SHARED / "stories260K"), "hooked").to(torch.float64)
        kind = "sentences of the TinyStories sample"
        runs.append((stories, stories_prompts(10 if quick else 100), kind))
    return [
        json.loads(validity(model, prompts, held=HELD, progress=True).to_json()) | {"prompts": kind}
        for model, prompts, kind in runs
    ]


if __name__ == "__main__":
    raise SystemExit(main())
