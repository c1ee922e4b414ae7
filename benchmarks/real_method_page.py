"""``docs/real_methods.md`` from ``results/real_evaluation.json``: methods tested on real models."""

from __future__ import annotations

from typing import Any

from evaluation_page import ALPHA, difference, listed, span, table, verdict

TITLE = "Methods"
OURS = ("norm", "in_out")
RUNNER = "in_out, runner-up"
GROUPS = {
    "sentences": "SmolLM2: all sentences",
    "agreement": "SmolLM2: subject and verb",
    "relations": "SmolLM2: relations",
    "stories": "SmolLM2: stories",
    "indirect object": "SmolLM2: indirect object",
    "similarity": "MiniLM: pairs of sentences",
    "digits": "A vision transformer: digits",
}
MEASURES = {
    "positive tensorlens {}": "Perturbation 0–30 %, most relevant first",
    "leave_one_out {}": "Agreement with leave-one-out",
}
METRICS = {"probability": "probability", "cosine": "cosine", "logit_diff": "logit difference"}


def cells(r: dict[str, Any], group: str) -> Any:
    """(measure's title, metric, masking, cell) of a group."""
    for pattern, title in MEASURES.items():
        for metric in METRICS:
            for masking, found in r["tables"][group].items():
                if cell := found.get(pattern.format(metric)):
                    yield title, metric, masking, cell


def above(r: dict[str, Any], cell: dict[str, Any], ours: str) -> bool:
    """Whether a method is better than every attention-based one."""
    against = [cell["compared"][ours][other] for other in r["attention"]]
    return all(c[0] > 0 and c[3] < ALPHA for c in against)


def behind(r: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Whether one attention-based method is better than both of ours."""
    return any(
        all(
            cell["compared"][ours][m][0] < 0 and cell["compared"][ours][m][3] < ALPHA
            for ours in OURS
        )
        for m in r["attention"]
    )


def bars(r: dict[str, Any]) -> list[list[str]]:
    """One row per model: prompts, and in how many settings a method of ours is above, or below."""
    rows = []
    for group in ("sentences", "similarity", "digits"):
        if group not in r["tables"]:
            continue
        n, wanted = sum(r["sets"][m]["n"] for m in r["members"][group]), r["wanted"][group]
        settings = [cell for *_, cell in cells(r, group)]
        met = [any(above(r, cell, name) for name in OURS) for cell in settings]
        runner = [above(r, c, RUNNER) for c in settings if RUNNER in c["compared"]]
        enough = "enough" if n >= wanted else f"{wanted} were wanted"
        verdict = "met" if all(met) else "met in part" if any(met) else "not met"
        told = f"{verdict}: in {sum(met)} of {len(met)} settings"
        if lost := sum(behind(r, cell) for cell in settings):
            told += f"; an attention-based method is better (p < {ALPHA}) in {lost}"
        if runner:
            told += f"; `in_out` for the runner-up: in {sum(runner)} of {len(runner)}"
        rows.append([GROUPS[group], f"{n} ({enough})", told])
    return rows


def main_table(r: dict[str, Any], group: str) -> str:
    """Ours, the best attention-based method and the best of all others, by setting."""
    rows = []
    for title, metric, masking, cell in cells(r, group):
        sign = 1 if cell["higher"] else -1
        means = {m: sign * v[0] for m, v in cell["methods"].items() if v[0] is not None}
        best = max(r["attention"], key=lambda m: means[m])
        own = {"norm", "in", "out", "in_out", "decompx", "|in_out|", RUNNER, "random"}
        other = max((m for m in means if m not in own), key=means.__getitem__)
        arrow = "↑" if cell["higher"] else "↓"
        ours = [verdict(r, cell, name) for name in OURS]
        size = span(cell["methods"]["|in_out|"])
        runner = verdict(r, cell, RUNNER) if RUNNER in cell["compared"] else "–"
        rows.append(
            [
                f"{title}, {METRICS[metric]} {arrow}",
                masking,
                *ours,
                size,
                runner,
                *(f"{m} {cell['methods'][m][0]:.3f}" for m in (best, other)),
                f"{cell['methods']['random'][0]:.3f}",
            ]
        )
    head = ["measure", "masked by", *OURS, "\\|in_out\\|", "in_out for the logit less the "
            "runner-up's", "best attention-based", "best of all others", "random"]  # fmt: skip
    return table(head, rows)


def every_method(r: dict[str, Any], group: str) -> str:
    """All methods and measures of a group, folded."""
    parts = []
    for masking, found in r["tables"][group].items():
        names = list(next(iter(found.values()))["methods"])
        heads = [f"{key} {'↑' if cell['higher'] else '↓'}" for key, cell in found.items()]
        rows = [
            [
                name.replace("|", "\\|"),
                *(span(cell["methods"].get(name)) for cell in found.values()),
            ]
            for name in names
        ]
        parts.append(
            f"<details><summary>{GROUPS[group]}, masked by {masking}: all methods</summary>\n\n"
            f"{table(['method', *heads], rows)}\n\n</details>"
        )
    return "\n\n".join(parts)


def gaps(r: dict[str, Any], group: str) -> str:
    """By how much in_out is better than each attention-based or gradient-based method."""
    rows = []
    for title, metric, masking, cell in cells(r, group):
        if metric == "logit_diff":
            continue
        compared = cell["compared"]["in_out"]
        rows.append(
            [
                title,
                masking,
                *(difference(compared.get(m)) for m in (*r["attention"], *r["gradient"])),
            ]
        )
    return table(["measure", "masked by", *r["attention"], *r["gradient"]], rows)


def page(r: dict[str, Any]) -> str:
    """The page."""
    rows = [
        [
            GROUPS[name],
            one["model"],
            f"{one['n']} of {one['wanted']}",
            f"{one['tokens'][0]}–{one['tokens'][2]}",
            f"{one['runs']:,}",
        ]
        for name, one in r["sets"].items()
    ]
    about = table(["inputs", "model", "n", "may be masked", "masked runs"], rows)
    options = "; ".join(
        f"`{name}` with {', '.join(f'{k}={v}' for k, v in own.items())}"
        for name, own in r["options"].items()
    )
    text = f"""<!-- Made by benchmarks/real_page.py; do not edit. -->

# Methods, tested on real models

Every method scores the tokens of a sentence, or the patches of a picture, for the model's own
prediction. They are then masked in the order of the scores, and the real model is run again.
[Methods, tested](results.md) has the same on small trained models, with every protocol.
`benchmarks/real_evaluation.py` measures, and goes on where it was stopped.

Bar: `in_out` or `norm` is better than *every* attention-based method, p < {ALPHA} by a paired
permutation test, in every setting. "For the runner-up" is `in_out` of the logit less that of the
likeliest other token, which is closer to what moves a probability.

{table(["model", "n", "the bar"], bars(r))}

{about}

Sentences of a kind have as many tokens, so that nothing is padded. Before each stands the token
that TransformerLens puts first, which is never masked. The last token, at which the prediction is
made, is kept. For MiniLM the target is the cosine of two sentence vectors, split over the first
sentence; [CLS] and [SEP] are kept. For digits it is the class.
Options: {options}. DecompX, read by the
target, gives the numbers of `in_out`; for SmolLM2 it is left out. Attention-based methods are
{listed(r["attention"])}.

In bold is what is better than every attention-based method with p < {ALPHA}; the largest p is
given. Else the number of them that it is better than. Intervals are 95 % bootstrap intervals.
"""
    for group, title in GROUPS.items():
        if group in r["tables"] and r["tables"][group]:
            text += f"\n## {title}\n\n{main_table(r, group)}\n"
    for group in ("sentences", "similarity", "digits"):
        if group in r["tables"]:
            text += f"\n## {GROUPS[group]}: by how much `in_out` is better\n\n{gaps(r, group)}\n"
            text += f"\n{every_method(r, group)}\n"
    costs = {k: one["forwards"] for k, one in r["sets"].items() if one["forwards"]}
    if costs:
        names = list(next(iter(costs.values())))
        names += [m for c in costs.values() for m in c if m not in names]
        rows = [
            [m, *(f"{c[m]:.3g}" if m in c else "–" for c in costs.values())]
            for m in dict.fromkeys(names)
        ]
        text += f"""
## What a method costs

Beyond the capture, in plain forward passes of the same prompts. Other work ran on the machine, so
these are rough.

{table(["method", *costs], rows)}
"""
    return text
