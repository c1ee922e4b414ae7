"""The pages of real models, from the files in ``benchmarks/results``, the source of every number.

``python benchmarks/real_page.py`` writes them:

1. Of ``real_models.json`` the page of exactness, heads and times. ``real_exactness.py``,
   ``real_heads.py`` and ``real_time.py`` fill it, entry by entry, so that a run which is stopped
   goes on where it was.
2. A page for each file of ``real_evaluation.py``, ``real_circuits.py`` and ``real_relations.py``,
   which are made of a folder of parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import real_circuit_page
import real_method_page
import real_relation_page

RESULTS = Path(__file__).parent / "results" / "real_models.json"
PAGES = Path(__file__).parents[1] / "docs"
PARTS = {
    "real_methods": ("real_evaluation", real_method_page),
    "real_circuits": ("real_circuits", real_circuit_page),
    "real_relations": ("real_relations", real_relation_page),
}
"""Pages with a file of results of their own, and what makes them."""


ASKED = [(dtype, n) for dtype in ("float32", "bfloat16") for n in (16, 64, 256, 1024, 2048)]
TIMED = (15, 128, 512)


def load(name: str = "real_models") -> dict[str, Any]:
    """All entries of a file so far, by name."""
    path = RESULTS.with_stem(name)
    return json.loads(path.read_text()) if path.exists() else {}


def kept(name: str, measure: Callable[[], Any], file: str = "real_models") -> Any:
    """An entry of the file; measured and written at once where the file lacks it."""
    if name in (found := load(file)):
        return found[name]
    value = measure()
    found = {**load(file), name: value}
    path = RESULTS.with_stem(file)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    os.replace(new, path)
    print(name, json.dumps(value)[:300], flush=True)
    return value


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(e: list[float], digits: int = 2) -> str:
    """A mean with its interval, from [mean, low, high]."""
    return "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*e, n=digits)


def exactness(r: dict[str, Any]) -> str:
    found = [(name.split()[1:], e) for name, e in r.items() if name.startswith("exactness ")]
    if not found:
        return ""
    rows = []
    for (dtype, length), e in sorted(found, key=lambda x: (x[0][0] != "float32", int(x[0][1]))):
        floor = "" if e["floor"] is None else f"{e['floor']:.1e}"
        errors = [f"{e[key]:.1e}" for key in ("check", "completeness", "attribution")]
        rows.append([dtype, length, *errors, floor])
    head = ["dtype", "tokens", "capture check", "completeness error", "by token, sum off by",
            "the model's own rounding"]  # fmt: skip
    single = [e["completeness"] for (dtype, _), e in found if dtype == "float32"]
    met = "met" if max(single) <= 2e-6 else "missed"
    bar = f"Largest completeness error in float32: {max(single):.1e}. Bar: 2e-6, {met}."
    return f"""## Exactness at size

30 layers, and a text that is repeated to the length.
The completeness error is the largest difference of the operator's logits and the model's, over the
largest logit. *The model's own rounding* is the same for the model's logits against those of a copy
in float64 (for float32, up to 256 tokens) or float32 (for bfloat16).
From 1,024 tokens on patterns are [recomputed](guides/long_prompts.md).

{table(head, rows)}

{bar}
"""


def heads(r: dict[str, Any]) -> str:
    if "heads ioi" not in r:
        return ""
    ioi, words, kinds = r["heads ioi"], r["heads attention"], r.get("heads kinds", {})
    rows = []
    for name, e in ioi["heads"].items():
        seen = words[name]
        parts = [f"{seen[key]:.2f}" for key in ("answer", "subject", "second subject")]
        rows.append([name, interval(e["direct"]), interval(e["effect"]), *parts])
    head = ["head", "direct effect", "effect in the model", "to the answer", "to the subject",
            "to the subject's second mention"]  # fmt: skip
    text = f"""## Named heads: who says the indirect object

{ioi["n"]} prompts such as "{ioi["example"]}".
The model prefers the right name by {ioi["difference"]:.2f} logits on average, and is right in
{ioi["right"]:.0%} of the prompts.
*Direct effect* is what a head writes into that difference (`by="component"`).
*Effect in the model* is how much of the difference is lost when the head's output at all positions
is replaced by its mean over the prompts, with nothing held.
In brackets, 95 % bootstrap intervals over prompts.
The last columns are the attention that the last position pays to three words.
The table has the {len(rows)} heads of the largest direct effect.

{table(head, rows)}

Spearman correlation of the two effects over these heads: {ioi["rho"]:.2f}.
"""
    if kinds:
        rows = [
            [name, f"{e['score']:.2f}", interval(e["effect"])]
            for name, e in kinds["induction"].items()
        ]
        before = [[name, f"{score:.2f}"] for name, score in kinds["previous"].items()]
        text += f"""
## Induction heads and previous-token heads

{kinds["n"]} sequences of {kinds["length"]} random tokens, each repeated once.
An induction head attends from a token to the one that followed the same token before.
Its score is that attention, averaged. The effect is how much the loss in the repeated half rises,
in nats per token, when the head's output is set to 0. In the whole model the loss is
{kinds["loss"]:.2f} there, and {kinds["first"]:.2f} in the first half.

{table(["head", "induction score", "rise of the loss"], rows)}

Largest attention to the token before:

{table(["head", "score"], before)}
"""
    return text


def times(r: dict[str, Any]) -> str:
    """What each step costs, by length of the prompt; and where the time goes."""
    found: dict[str, dict[int, Any]] = {}
    for name, entry in r.items():
        if name.startswith("time "):
            _, n, job = name.split(" ", 2)
            found.setdefault(job, {})[int(n)] = entry
    if not found:
        return ""
    lengths = sorted({n for of in found.values() for n in of})
    rows = []
    for job, of in found.items():
        cells = []
        for n in lengths:
            e = of.get(n)
            cells += ["–"] * 2 if e is None else [f"{e['host']:.1f}", f"{e['transformers']:.1f}"]
        rows.append([job, *cells])
    head = ["job", *(f"{n} tokens, {of}" for n in lengths for of in ("F", "of transformers"))]
    rounds = {e["rounds"] for of in found.values() for e in of.values()}
    told = f"median of {min(rounds)} rounds" if min(rounds) > 1 else "one round"
    text = f"""## What each step costs

In plain forward passes of the same prompts, with all logits: of TransformerLens's Bridge (F), and
of transformers' own model of the same weights. CPU time of one thread, {told}, each
between two forward passes. Jobs on a captured run begin with a new capture, which is not counted.
A job on 8 pairs is told in passes of the 8 prompts.
`python benchmarks/real_time.py` measures them.

{table(head, rows)}
"""
    for name, entries in r.items():
        if name.startswith("profile "):
            shares = ", ".join(f"`{op}` {share:.0%}" for op, share, _ in entries)
            text += f"""
Where the time goes in a capture with an attribution by token and one by edge, at
{name.split()[1]} tokens: {shares}.
"""
    return text


def bars() -> str:
    """What was asked of every experiment, and what came out."""
    rows = []
    for name, (file, part) in PARTS.items():
        if r := load(file):
            rows += [[f"[{part.TITLE}]({name}.md)", *row] for row in part.bars(r)]
    return table(["experiment", "on", "n", "its bar"], rows) if rows else ""


def missing(r: dict[str, Any]) -> str:
    """What was asked and has no result yet."""
    lengths = [
        f"{n:,} tokens in {dtype}" for dtype, n in ASKED if f"exactness {dtype} {n}" not in r
    ]
    told = [f"exactness at {', '.join(lengths)}"] if lengths else []
    times = [str(n) for n in TIMED if not any(name.startswith(f"time {n} ") for name in r)]
    told += [f"what steps cost at {' and '.join(times)} tokens"] if times else []
    methods, circuits = load("real_evaluation"), load("real_circuits")
    told += [
        f"methods on {name}" for name in real_method_page.GROUPS if name not in methods["tables"]
    ]
    tasks = circuits["tasks"]
    told += [f"circuits of {name}" for name in real_circuit_page.ABOUT if name not in tasks]
    told += ["CPR and CMD"] if not all(task["areas"] for task in tasks.values()) else []
    patched = all(task["patched"] for task in tasks.values())
    told += [] if patched else ["circuits' scores beside activation patching"]
    told += [] if load("real_relations") else ["relations (`benchmarks/real_relations.py`)"]
    return f"Not run yet: {'; '.join(told)}." if told else ""


def page(r: dict[str, Any]) -> str:
    return (
        f"""<!-- Made by benchmarks/real_page.py of results/real_models.json; do not edit. -->

# A real language model

SmolLM2-135M-Instruct has 30 layers, 9 heads and width 576. Here it is dequantized from 4 bits to
float32, and runs on one thread of a CPU.
Texts begin with the token that TransformerLens puts first, `<|im_start|>`.
[Its package](your_model.md#two-real-models-from-packages) is small;
`python benchmarks/real_exactness.py` and `python benchmarks/real_heads.py` measure again.

## Experiments, and their bars

Beside what is on this page there are experiments with pages of their own. The machine that ran them
is small and was shared, so that some have fewer inputs than were wanted: every page says how many.

{bars()}

{missing(r)}

{exactness(r)}
{heads(r)}
{times(r)}""".rstrip()
        + "\n"
    )


def pages() -> dict[str, str]:
    """Every page by its name."""
    # 1. Exactness, heads and times.
    found = {"real_models": page(load())}
    # 2. Methods, circuits and relations.
    for name, (file, part) in PARTS.items():
        if r := load(file):
            found[name] = part.page(r)
    return found


def write() -> None:
    """Write all pages."""
    for name, text in pages().items():
        (PAGES / f"{name}.md").write_text(text)


if __name__ == "__main__":
    write()
