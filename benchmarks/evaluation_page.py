"""``docs/results.md`` from ``benchmarks/results/evaluation.json``, the source of every number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAIN = "positive tensorlens probability"
LOO = "leave_one_out probability"
LOO_DIFF = "leave_one_out logit_diff"
MAIN_DIFF = "positive tensorlens logit_diff"
LAST = ("last masked, too", "last kept")
MODELS = {"demo": "the bundled model", "stories": "stories260K"}
TITLES = {
    MAIN: "positive, 0–30 %",
    "negative tensorlens probability": "negative, 0–30 %",
    "positive chefer probability": "positive, 10–90 %",
    "negative chefer probability": "negative, 10–90 %",
    "positive tensorlens agreement": "positive, top-1",
    "negative tensorlens agreement": "negative, top-1",
    "morf full probability": "MoRF",
    "lerf full probability": "LeRF",
    "delta full probability": "LeRF − MoRF",
    "deletion full probability": "deletion",
    "insertion full probability": "insertion",
    "comprehensiveness eraser probability": "comprehens.",
    "sufficiency eraser probability": "sufficiency",
    LOO: "leave-one-out ρ",
    MAIN_DIFF: "positive, logit difference",
    "negative tensorlens logit_diff": "negative, logit difference",
    LOO_DIFF: "leave-one-out ρ, logit difference",
    "naopc probability": "NAOPC",
}
ALPHA = 0.01


def page(r: dict[str, Any]) -> str:
    """The page, as Markdown."""
    sections = [head(r), *missing(r), bars(r), contrast(r), odds(r), signs(r), costs(r)]
    for group in [*MODELS, *(name for name in r["sets"] if name not in MODELS)]:
        sections.append(everything(r, group))
    return "\n\n".join(sections) + "\n"


def head(r: dict[str, Any]) -> str:
    rows = [
        [
            name,
            s["model"],
            s["dtype"],
            " / ".join(str(n) for n in s["prompts"].values()),
            f"{s['tokens'][0]}–{s['tokens'][2]}, mean {s['tokens'][1]:.1f}",
            f"{s['runs']:,}",
        ]
        for name, s in r["sets"].items()
    ]
    parts = " / ".join(next(iter(r["sets"].values()))["prompts"])
    heads = ["prompts", "model", "dtype", f"n: {parts}", "tokens that may be masked", "masked runs"]
    return f"""# Which method says which tokens a model needs?

Made by `python benchmarks/evaluation.py` (torch {r["torch"]}, seed {r["seed"]}) from
`benchmarks/results/evaluation.json`; no number on this page was typed. Protocols, \
measures and their
sources: `tensorlens_tl/evaluation/protocols.py`; ways of masking: \
`tensorlens_tl/evaluation/masking.py`.

Every method scores the tokens of a prompt for the model's own prediction. \
Tokens are then masked in the
order of the scores and the real model is run again; what is left of the prediction's probability \
tells
whether the method named the tokens that matter. Masking by deleting, \
by a mask token (the tokenizer's
unknown token) and by the mean embedding; each takes the model off its training data in another \
way, so
no one of them is the truth. The beginning-of-sequence token is never masked. Numbers are means over
prompts with 95 % bootstrap intervals; p is of a paired permutation test (sign flips).

{table(heads, rows)}

The bundled model's prompts are held-out ones of its tasks (of 5 to 34 tokens). \
`stories` are windows that
begin with a sentence of the TinyStories sample, and continuations sampled from the model itself, \
of 24 to 64
tokens, the shorter of two draws. `norm`, `in`, `out` and `in_out` are the operator's collapses; \
the others
are earlier methods. Attention-based are {listed(r["attention"])}; \
gradient-based {listed(r["gradient"])}.

**The last token.** A prediction is made at the last token. Where that may be masked, \
nearly every method
masks it first, the prediction is gone, and the measure says little about the others. So the first
protocol is run twice: with the last token masked, too, and with it kept."""


def missing(r: dict[str, Any]) -> list[str]:
    """What was not run, said first."""
    absent = [
        f"{name} ({part})"
        for name, s in r["sets"].items()
        for part, n in s["prompts"].items()
        if n == 0
    ]
    if not absent:
        return []
    return [
        f"**Not run yet: {'; '.join(absent)}.** The tables below are of what was; `python "
        "benchmarks/evaluation.py --keep FOLDER` runs the rest."
    ]


# --- The bars ------------------------------------------------------------------------------------


def bars(r: dict[str, Any]) -> str:
    lines = [
        "## Perturbation 0–30 %, and agreement with leave-one-out",
        "",
        "Area under the prediction's probability while the highest-scored 0–30 % of the tokens are "
        "masked: lower is better. Agreement: rank correlation of scores with what the probability "
        "loses without each token alone: higher is better. In bold where it is better than *every* "
        f"attention-based method with p < {ALPHA}, the largest p given; "
        "else that p, or how many it is better than.",
    ]
    for key in (MAIN, LOO):
        rows = []
        for group, title in MODELS.items():
            for part in LAST:
                tasks = r["members"][group].get(part, [])
                shown = f"{title} ({', '.join(tasks)})" if group == "demo" else title
                for masking, cells in r["tables"][group].get(part, {}).items():
                    rows.append([shown, part, masking, cells[key]["n"], *verdicts(r, cells[key])])
        heads = [
            "model",
            "last token",
            "masked by",
            "n",
            "norm",
            "in_out",
            "in_out, log-odds",
            "best attention-based",
            "best of all others",
        ]
        lines += ["", f"### {TITLES[key]}", "", table(heads, rows)]
    lines += ["", "### By task: positive, 0–30 %, last token kept", "", *by_set(r)]
    return "\n".join(lines)


def verdicts(r: dict[str, Any], cell: dict[str, Any]) -> Iterable[str]:
    """Ours, and whether above every attention-based method; the best of those; of others."""
    sign = 1 if cell["higher"] else -1
    means = {m: sign * v[0] for m, v in cell["methods"].items() if v[0] is not None}
    for ours in ("norm", "in_out", "in_out, log-odds"):
        yield verdict(r, cell, ours)
    best = max(r["attention"], key=lambda m: means[m])
    yield f"{best} {cell['methods'][best][0]:.3f}"
    own = ("norm", "in", "out", "in_out", "in_out, log-odds", "in_out, runner-up", "|in_out|")
    other = max((m for m in means if m not in own), key=lambda m: means[m])
    yield f"{other} {cell['methods'][other][0]:.3f}"


def verdict(r: dict[str, Any], cell: dict[str, Any], ours: str) -> str:
    """A mean, and whether it is above every attention-based method's."""
    against = [cell["compared"][ours][m] for m in r["attention"]]
    worst = max(against, key=lambda c: c[3] if c[0] > 0 else 2)
    shown = f"{cell['methods'][ours][0]:.3f}"
    if worst[0] > 0 and worst[3] < ALPHA:
        return f"**{shown}** (p ≤ {worst[3]:.1g})"
    if worst[0] > 0:
        return f"{shown} (p ≤ {worst[3]:.2g})"
    return f"{shown} (above {sum(c[0] > 0 for c in against)} of {len(against)})"


def by_set(r: dict[str, Any]) -> list[str]:
    rows = []
    for name in r["sets"]:
        for masking, cells in r["tables"][name]["last kept"].items():
            rows.append([name, masking, *verdicts(r, cells[MAIN])])
    heads = [
        "prompts",
        "masked by",
        "norm",
        "in_out",
        "in_out, log-odds",
        "best attention-based",
        "best of all others",
    ]
    return [table(heads, rows)]


# --- What was tested about them ------------------------------------------------------------------


def contrast(r: dict[str, Any]) -> str:
    ours, peer = "in_out, runner-up", "attnlrp, runner-up"
    tables = {}
    for key in (LOO_DIFF, MAIN_DIFF):
        rows = []
        for group in [*MODELS, *(name for name in r["sets"] if name not in MODELS)]:
            for masking, cells in r["tables"][group]["last kept"].items():
                cell = cells[key]
                means = {m: cell["methods"][m][0] for m in r["attention"]}
                best = (max if cell["higher"] else min)(means, key=means.__getitem__)
                rows.append(
                    [
                        group,
                        masking,
                        cell["n"],
                        span(cell["methods"]["in_out"]),
                        verdict(r, cell, ours),
                        f"{best} {span(cell['methods'][best])}",
                        span(cell["methods"][peer]),
                        difference(cell["compared"][ours][peer]),
                    ]
                )
        heads = [
            "prompts",
            "masked by",
            "n",
            "in_out",
            ours,
            "best attention-based",
            peer,
            "in_out is better than attnlrp by",
        ]
        tables[key] = table(heads, rows)
    return f"""## What is measured: a probability, or a choice between two answers

A prediction that is nearly certain loses its probability with any token without which the \
sentence breaks
(after "the keys near the" no verb is due, whatever its number): that is measured above, \
and most of it is no
question of *this* answer. The field's measure of a choice is the logit difference, \
here of the prediction and
the likeliest other token of the unmasked prompt. `in_out` can be asked for it \
(`versus="runner_up"`); a method
that is made of attention alone has no target to ask for. If `in_out` is behind in leave-one-out \
because
another question was asked, and not because it misreads the model, \
then asked and measured alike it must be
ahead of them, above all where it was behind (agreement, ioi). Last token kept; bold as above.

### {TITLES[LOO_DIFF]}

{tables[LOO_DIFF]}

### {TITLES[MAIN_DIFF]}: 0–30 % masked, lower is better

{tables[MAIN_DIFF]}"""


def odds(r: dict[str, Any]) -> str:
    rows = []
    for group in MODELS:
        for masking, cells in r["tables"][group]["last kept"].items():
            cell = cells[MAIN]
            for name in ("in_out", *r["gradient"]):
                other = f"{name}, log-odds"
                one, two = cell["methods"][name], cell["methods"][other]
                plain = cell["compared"]["in_out"].get(name)
                against = cell["compared"]["in_out, log-odds"].get(other)
                rows.append(
                    [
                        group,
                        masking,
                        name,
                        span(one),
                        difference(plain),
                        span(two),
                        difference(against),
                    ]
                )
    heads = [
        "model",
        "masked by",
        "method",
        "logit",
        "in_out is better by",
        "log-odds",
        "in_out, log-odds, is better by",
    ]
    return f"""## What is explained: a logit, or log-odds

The measures read a probability, a function of log-odds: of the prediction's logit *less* all \
others'. A
method that explains the logit alone also credits what raises every candidate. \
With `versus="all_others"` the
target is the logit less the others' mean, weighted by their probabilities: \
what log-odds are linear in.
Positive perturbation 0–30 %, last token kept, beside the methods that differentiate the model; \
the fifth and
the last column are by how much `in_out` is better than the method when both explain the same, \
and p. What
each costs stands below.

{table(heads, rows)}"""


def signs(r: dict[str, Any]) -> str:
    rows = []
    for group in [*MODELS, *(name for name in r["sets"] if name not in MODELS)]:
        for masking, cells in r["tables"][group]["last kept"].items():
            cell = cells[LOO]
            best = max(r["attention"], key=lambda m: cell["methods"][m][0])
            rows.append(
                [
                    group,
                    masking,
                    span(cell["methods"]["in_out"]),
                    span(cell["methods"]["|in_out|"]),
                    span(cell["methods"]["norm"]),
                    f"{best} {span(cell['methods'][best])}",
                    difference(cell["compared"]["|in_out|"][best]),
                ]
            )
    heads = [
        "prompts",
        "masked by",
        "in_out",
        "its size, \\|in_out\\|",
        "norm",
        "best attention-based",
        "\\|in_out\\| is better by",
    ]
    return f"""## Signs and leave-one-out

`in_out` is signed: a token that speaks for another answer has a negative share. \
Taking such a token out
of a prompt whose answer is nearly certain cannot raise a probability of nearly 1; \
it rather breaks the
sentence. Leave-one-out then ranks it among the tokens that matter, and a signed score last. If
that is why `in_out` loses where it does, the same scores without their signs must do better exactly
there: the third column tests it.

{table(heads, rows)}"""


# --- Costs and tables ----------------------------------------------------------------------------


def costs(r: dict[str, Any]) -> str:
    sets = list(r["sets"])
    rows = [
        [name, cost, source, *(f"{r['sets'][s]['forwards'][name]:.3g}" for s in sets)]
        for name, (cost, source) in r["methods"].items()
    ]
    return f"""## What a method costs

Beyond the capture: what the registry says, and what scoring took in units of plain forward passes \
of the
same prompts ({", ".join(f"{s['timed']} of {name}" for name, s in r["sets"].items())}), \
timed on one thread
with nothing else running (small models, batches of up to 8 prompts of equal length: Python counts).

{table(["method", "cost", "source", *sets], rows)}"""


def everything(r: dict[str, Any], group: str) -> str:
    lines = [f"## All measures: {MODELS.get(group, group)}"]
    for masking in ("delete", "token", "mean"):
        cells: dict[str, Any] = {}
        names: dict[str, Any] = {}
        for part in r["tables"][group]:
            for key, cell in r["tables"][group][part][masking].items():
                names = {**names, **cell["methods"]}
                note = ", last kept" if part == "last kept" else ""
                arrow = "↑" if cell["higher"] else "↓"
                cells[f"{TITLES[key]}{note} {arrow} (n = {cell['n']})"] = cell["methods"]
        heads = list(cells)
        rows = [
            [name.replace("|", "\\|"), *(span(cells[h].get(name)) for h in heads)] for name in names
        ]
        lines += [
            "",
            f"<details><summary>Masked by {masking}</summary>",
            "",
            table(["method", *heads], rows),
            "",
            "</details>",
        ]
    note = ""
    if "naopc" in r["tables"][group]:
        note = (
            f"\n\nNAOPC's bounds are exact for at most {r['exact_naopc']} tokens, "
            f"else searched with {r['beam']} orders kept."
        )
    return "\n".join(lines) + note


def span(cell: list[float | None] | None) -> str:
    mean, low, high = (None,) * 3 if cell is None else cell[:3]
    return "–" if mean is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def difference(cell: list[float | None] | None) -> str:
    return "–" if cell is None or cell[0] is None else f"{cell[0]:+.3f}, p = {cell[3]:.2g}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table(heads: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
