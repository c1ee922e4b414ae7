"""``docs/real_circuits.md`` from ``results/real_circuits.json``: circuits of a real model."""

from __future__ import annotations

from typing import Any

from circuits import CLEAN, OURS
from evaluation_page import table

TITLE = "Circuits"
NAMES = {
    OURS: "secant operator",
    CLEAN: "clean run's operator",
    "eap": "EAP",
    "eap_ig": "EAP-IG, 5 steps",
    "random": "random, connected",
}
ABOUT = {
    "agreement": "the verb's form after “The uncles behind the dogs”; the twin has another number",
    "indirect object": "the name that was said once; the twin has the same names, the other twice",
    "greater-than": "a second year's tens: above the first's less below; the twin's is 01",
}


def span(cell: dict[str, Any], signed: bool = False) -> str:
    """A share with its interval."""
    sign = "+" if signed else ""
    low, high = cell["interval"]
    return f"{cell['share']:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def triple(values: list[float]) -> str:
    """A number with its interval, from [value, low, high]."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)


def bars(r: dict[str, Any]) -> list[list[str]]:
    """One row per task: pairs, whether the secant reaches EAP-IG at every size, and its time."""
    rows = []
    for name, t in r["tasks"].items():
        gaps = [cells[OURS]["minus eap_ig"] for cells in t["shares"].values()]
        reached = [gap["share"] >= 0 for gap in gaps]
        sure = [gap["interval"][0] > 0 for gap in gaps]
        behind = [gap["interval"][1] < 0 for gap in gaps]
        ratio = t["forwards"][OURS] / t["forwards"]["eap_ig"]
        enough = "enough" if t["n_test"] >= r["wanted"] else f"{r['wanted']} were wanted"
        told = "met" if all(reached) else f"not met: at {sum(reached)} of {len(reached)} sizes"
        told += f" (surely above at {sum(sure)}, surely below at {sum(behind)})"
        time = f"{'met' if ratio <= 0.25 else 'not met'}: {ratio:.2f} of it"
        n = f"{t['n_test']} ({enough})"
        rows.append([name, n, f"secant ≥ EAP-IG at every size: {told}; in ¼ of its time: {time}"])
    return rows


def task(r: dict[str, Any], name: str) -> str:
    """One task's section."""
    t = r["tasks"][name]
    rows = []
    for method, shown in NAMES.items():
        shares = [span(cells[method]) for cells in t["shares"].values()]
        rows.append([shown, *shares, f"{t['forwards'][method]:.1f} F"])
    for other in ("eap_ig", "eap", CLEAN):
        gaps = [span(cells[OURS][f"minus {other}"], True) for cells in t["shares"].values()]
        rows.append([f"secant − {NAMES[other]}", *gaps, ""])
    head = ["method", *(f"{100 * size:g} %" for size in r["sizes"]), "time to score"]
    text = f"""## {name.capitalize()}

The measure is of {ABOUT[name]}.
{t["n_find"]} pairs to find circuits, {t["n_test"]} others to test them.
The model prefers the right answer in {t["right"]:.0%} of these.
The mean difference of logits is {t["full"]:.2f}, and {t["ablated"]:.2f} with every edge of
{t["n_total"]:,} ablated.

{table(head, rows)}
"""
    if t["areas"]:
        rows = [[NAMES[m], triple(a["cpr"]), triple(a["cmd"])] for m, a in t["areas"].items()]
        n = next(iter(t["areas"].values()))["n"]
        text += f"""
Whole curves, ten sizes, on {n} of these pairs: CPR (more is better) ranks by signed scores, CMD
(less is better) by absolute ones, and edges need not be connected.

{table(["method", "CPR", "CMD"], rows)}
"""
    if t["patched"]:
        rows = [[NAMES[m], triple([e["mean"], *e["interval"]])] for m, e in t["patched"].items()]
        n = next(iter(t["patched"].values()))["n"]
        text += f"""
Activation patching of each head and MLP, at all positions: Pearson's correlation of what the node
does in the model with what its edges' scores sum to, over all nodes of a pair; mean over {n} pairs.

{table(["method", "Pearson"], rows)}
"""
    return text


def page(r: dict[str, Any]) -> str:
    """The page."""
    head = ["task", "test pairs", "the bars"]
    sections = "\n".join(task(r, name) for name in r["tasks"])
    return (
        f"""<!-- Made by benchmarks/real_page.py; do not edit. -->

# Circuits of a real model

SmolLM2-135M has 30 layers and 123,211 edges. Every method scores all of them on some pairs of
prompts. Circuits are the best edges, grown greedily from the logits, and are tested on other pairs,
in the real model, everything else resampled from the twin prompt. The share is
(m(C) − m(∅)) / (m(N) − m(∅)); 1 is the whole model. [Circuits, tested](circuits.md) has small
trained models. `benchmarks/real_circuits.py` measures, and goes on where it was stopped.

{table(head, bars(r))}

F is a plain forward pass of the clean prompts, CPU time of one thread. Intervals are 95 % bootstrap
intervals over test pairs, of differences pair by pair.

{sections}""".rstrip()
        + "\n"
    )
