"""``docs/editing.md`` from ``benchmarks/results/editing.json``, the source of every number.

``python benchmarks/editing_page.py`` writes the page: a section per experiment. ``editing.py`` and
``editing_weights.py`` fill the file, entry by entry. What the file lacks yet is left out.
"""

from __future__ import annotations

from typing import Any

from real_page import PAGES, load, table

PAGE = PAGES / "editing.md"
MODELS = {"demo": "bundled", "smollm2": "SmolLM2-135M"}
TASKS = {"ioi": "indirect object", "facts": "facts", "agreement": "agreement"}
NAMES = {
    "operator": "operator",
    "operator_qk": "operator, qk",
    "operator_qk_gates": "operator, qk and gates",
    "jacobian": "Jacobian",
    "refined": "operator, corrected twice",
    "refined_qk_gates": "operator, qk and gates, corrected twice",
    "refined_jacobian": "Jacobian, two Newton steps",
    "caa": "CAA",
    "logit_lens": "logit lens",
    "random": "random",
}
HELD = {
    "pattern": "patterns",
    "scale": "norm scales",
    "gates": "gating ratios",
    "scale gates": "norm scales and gating ratios",
    "pattern scale gates": "all three",
}
INTRO = """
# Edits, tested

Does an edit do what the operator says? Every edit was run in the real model. Prompts are held-out
ones of the bundled model's tasks, and English written for SmolLM2-135M-Instruct; those that a model
gets wrong are left out. m is logit(answer) − logit(foil). Sites are the inputs of blocks. Brackets
hold 95 % bootstrap intervals.

*Operator* holds patterns, norm scales and gating ratios. *qk* lets attention scores move to first
order, *gates* gating ratios, too; norm scales stay held. *Jacobian* is the real model's gradient.
""".strip()


def interval(e: list[float], digits: int = 2) -> str:
    return "{:.{n}f} [{:.{n}f}, {:.{n}f}]".format(*e, n=digits)


def found(r: dict[str, Any], kind: str) -> list[tuple[str, str, str, str, dict[str, Any]]]:
    """Model, convention, task, block and entry of every entry of a kind, in a fixed order."""
    rows = [(*name.split(), e) for name, e in r.items() if name.split()[2] == kind]
    order = [*MODELS, *TASKS]
    return sorted(
        ((m, gate, task, (*at, "")[0], e) for m, gate, _, task, *at, e in rows),
        key=lambda x: (order.index(x[0]), order.index(x[2]), int(x[3] or 0)),
    )


def where(model: str, gate: str, task: str, block: str, n: int) -> list[str]:
    name = MODELS[model] + ("" if model == "demo" else f", {gate}")
    return [name, TASKS[task], *([block] if block else []), str(n)]


def verdict(met: list[bool], what: str) -> str:
    """Whether a bar is met, in how many of the rows."""
    if not met:
        return ""
    said = "met" if all(met) else f"missed in {len(met) - sum(met)} of {len(met)} rows"
    return f"Bar: {what}; {said}."


def predictions(r: dict[str, Any]) -> list[str]:
    rows, small, close, ranks, half = [], [], [], [], []
    for model, gate, task, block, e in found(r, "predict"):
        cells = [
            f"{interval(e[m]['error'])} · {e[m]['pearson']:.3f} · {e[m]['spearman']:.2f}"
            for m in ("operator", "operator_qk", "operator_qk_gates", "jacobian")
        ]
        rows.append([*where(model, gate, task, block, e["n"]), *cells])
        best = max(e[m]["spearman"] for m in ("operator_qk", "operator_qk_gates"))
        if model == "demo" and task != "agreement":
            small.append(e["operator"]["error"][0] <= 0.15)
            close.append(e["operator"]["pearson"] >= 0.98)
            ranks.append(best >= e["jacobian"]["spearman"])
        if model == "smollm2":
            half.append(e["operator"]["error"][0] <= e["jacobian"]["error"][0] / 2)
    if not rows:
        return []
    head = ["model", "task", "block", "edits", *(NAMES[m] for m in list(NAMES)[:4])]
    bars = [
        verdict(small, "the operator's error is at most .15 (bundled, without agreement)"),
        verdict(close, "its Pearson is at least .98 there"),
        verdict(ranks, "with qk, or gates too, Spearman is at least the Jacobian's there"),
        verdict(half, "on SmolLM2 the operator's error is at most half the Jacobian's"),
    ]
    text = (
        "One position's residual is replaced by that of the corrupted prompt. Each cell: "
        "Σ |predicted − real| / Σ |real| · Pearson · Spearman, over all edits."
    )
    return ["## Predicted against real", text, table(head, rows), *filter(None, bars)]


def held(r: dict[str, Any]) -> list[str]:
    rows = []
    for model, gate, task, block, e in found(r, "held"):
        cells = [
            f"{e[h][key]:.2f}"
            for h in ("nothing", "pattern", "scale")
            for key in ("moved", "error")
        ]
        rows.append([*where(model, gate, task, block, e["n"]), *cells])
    if not rows:
        return []
    text = (
        "The same edits, in the real model with nothing held, with its attention patterns held, "
        "and with its norm scales held. *Moved* is the mean of |real|, in logits; *miss* is the "
        "operator's Σ |predicted − real| / Σ |real|. Where attention moves with the edit, m moves "
        "far more than the operator says; with patterns held, little is missed."
    )
    head = ["model", "task", "block", "edits", "moved", "miss",
            "moved, patterns held", "miss", "moved, scales held", "miss"]  # fmt: skip
    return ["## Why agreement is missed", text, table(head, rows)]


def edits(r: dict[str, Any]) -> list[str]:
    parts, entries = [], found(r, "edit")
    if not entries:
        return []
    missed, fixed, top, short, quiet = [], [], [], [], []
    for model, gate, task, block, e in entries:
        name = f"{MODELS[model]}, {TASKS[task]}, block {block}, {e['n']} prompts"
        name += "" if model == "demo" else f", gated MLPs by {gate}"
        rows = []
        for m, title in NAMES.items():
            one = e[m]
            ratio = one.get("norm by the Jacobian's")
            kl = one.get("kl_held_out")
            rows.append(
                [
                    title,
                    interval(one["miss"], 3),
                    interval(one["flipped"]),
                    interval(one["size"]),
                    interval(ratio) if ratio else "",
                    f"{kl[0]:.3f}" if kl else "",
                ]
            )
        head = ["edit by", "miss", "foil wins", "size", "‖δ‖ by the Jacobian's", "KL, held out"]
        parts += [f"### {name}", table(head, rows)]
        missed.append(e["operator"]["miss"][0] <= 0.15)
        fixed.append(e["refined"]["miss"][0] <= 0.03)
        top.append(e["operator"]["flipped"][0] >= 0.95)
        short.append(e["refined"]["norm by the Jacobian's"][0] <= 0.9)
        quiet.append(e["operator"]["kl_held_out"][0] <= e["random"]["kl_held_out"][0])
    text = (
        "m is to become −m, by an edit of the last position. *Miss*: median of |delivered / asked "
        "− 1|. *Size*: ‖δ‖ by the residual's norm. ‖δ‖ is compared prompt by prompt, of corrected "
        "edits with corrected ones, which deliver the same. *KL, held out*: on a prompt of another "
        "kind, whose last position gets the same vector; of up to 40 edits. CAA takes the mean "
        "difference of prompts and corrupted prompts, the logit lens the columns of W_U."
    )
    bars = [
        verdict(missed, "the operator's miss is at most .15"),
        verdict(fixed, "at most .03 after two corrections"),
        verdict(top, "the foil wins in at least .95"),
        verdict(short, "corrected, ‖δ‖ is at most .9 of the Jacobian's"),
        verdict(quiet, "held-out prompts move less than under a random edit of the same length"),
    ]
    return ["## The smallest edit", text, *filter(None, bars), *parts]


def pieces(r: dict[str, Any]) -> list[str]:
    rows = []
    for name, entry in r.items():
        if name.split()[1] != "pieces":
            continue
        task = name.split()[2]
        for key, e in sorted(entry.items(), key=lambda item: int(item[0].split()[0])):
            block, held = key.split(" ", 1)
            if held != "nothing":
                held = HELD.get(held, held)
                rows.append([TASKS[task], block, held, interval(e["norm"]), interval(e["cosine"])])
    if not rows:
        return []
    text = (
        "SmolLM2's own gradient of m at the last position of a block's input, with some quantities "
        "held as the operator holds them, against the whole gradient. A covector that is short or "
        "points elsewhere makes for a long edit. So this is what the operator's edits lack."
    )
    head = ["task", "block", "held", "norm, by the whole gradient's", "cosine with it"]
    return ["## What a covector lacks", text, table(head, rows)]


def order(r: dict[str, Any]) -> list[str]:
    rows, met = [], []
    for model, gate, task, _, e in found(r, "order"):
        rows.append(
            [
                *where(model, gate, task, "", e["n"]),
                str(e["edits"]),
                *(f"{e[m]:.2f}" for m in ("operator", "qk_gates", "logit_lens")),
            ]
        )
        met.append(e["operator"] >= 0.92)
    if not rows:
        return []
    text = (
        "Every block's input gets an edit of a tenth of its length, along the operator's covector. "
        "Spearman's correlation of the real change of m with what is predicted, over prompts and "
        "blocks; for the logit lens the change that it predicts of an edit of its own direction."
    )
    head = ["model", "task", "prompts", "edits", "operator", "operator, qk and gates", "logit lens"]
    bar = verdict(met, "the operator's correlation is at least .92")
    return ["## Which block to edit", text, table(head, rows), bar]


def weights(r: dict[str, Any]) -> list[str]:
    parts = []
    for name, e in r.items():
        if name.split()[1] != "weights":
            continue
        names = [key for key in e["operator"] if key != "norm"]
        rows = [
            [key, interval(e["operator"][key]), interval(e["rome"][key])]
            for key in ["norm", *names]
        ]
        one, rome = e["operator"], e["rome"]
        plain, key = "held-out phrasing", "held-out phrasing, top-1"
        parts += [
            f"Block {name.split()[2]}, {e['n']} capitals.",
            table(["measure", "operator", "ROME"], rows),
            verdict([one["efficacy"][0] >= 0.99], "efficacy is at least .99"),
            verdict([one[plain][0] >= rome[plain][0]], "held-out phrasings at least as ROME's"),
            verdict([one[key][0] >= rome[key][0]], "and in top-1"),
            verdict(
                [one["other countries unchanged"][0] >= 0.98],
                "other countries unchanged in at least .98",
            ),
        ]
    if not parts:
        return []
    text = (
        "Another capital is written into W_out of a block of the bundled model, at the country's "
        "token, by rank-one changes of one form that differ in the vector they write. *Operator*: "
        "the smallest vector for the prompt behind five leads, from one sweep, corrected three "
        "times. *ROME* (Meng et al. 2022): 20 steps of Adam with its penalties. Efficacy and "
        "held-out phrasing count logit(new) > logit(old); top-1 counts the likeliest token. Both "
        "change other answers about the edited country: nothing was asked to keep them."
    )
    return ["## Facts in weights", text, *parts]


def page(r: dict[str, Any]) -> str:
    made = "<!-- Made by benchmarks/editing_page.py of results/editing.json; do not edit. -->"
    parts = [made, INTRO]
    for part in (predictions, held, edits, pieces, order, weights):
        parts += part(r)
    end = (
        "`python benchmarks/editing.py [--model smollm2]` and `editing_weights.py` measure it anew."
    )
    return "\n\n".join([*parts, end]) + "\n"


def main() -> None:
    PAGE.write_text(page(load("editing")))


if __name__ == "__main__":
    main()
