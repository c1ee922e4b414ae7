"""Make docs/distillation.md of the results of distillation.py and shortcut.py.

1. Read the lines of both, and how the bundled model was trained.
2. One table for each group of students that had the same setting.
3. What was not run, what a step costs, and the planted shortcut.
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from tensorlens_tl import demo

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "distillation.md"
RESULTS = HERE / "results"
NAMES = {
    "hard": "hard labels",
    "kd": "KD: the teacher's logits",
    "attention": "KD + attention patterns (TinyBERT)",
    "relations": "KD + relations (MiniLM v2)",
    "hidden": "KD + hidden states",
    "gradients": "KD + input gradients",
    "maps": "KD + the operator's maps",
    "maps+words": "KD + maps + counterfactual rows",
    "kd-warm": "KD, warm start",
    "maps-warm": "KD + maps, warm start",
    "plain": "no penalty",
    "operator": "the operator's row at the name",
    "gradient": "the input gradient at the name",
}
ARMS = list(NAMES)[:10]
ROLES = ("previous", "duplicate", "induction", "copying")
TASKS = ("ioi", "facts", "agreement", "greater_than")


def lines(path):
    """The JSON lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def at_time(record, seconds):
    """The last checkpoint within some processor time, or None."""
    return next((p for p in reversed(record["checkpoints"]) if p["seconds"] <= seconds), None)


def shown(values, digits=3):
    """The mean of what is known, as a cell of a table."""
    known = [v for v in values if v is not None]
    return f"{mean(known):.{digits}f}" if known else "–"


def groups(records):
    """Records by what they were trained with, as (text, {arm: {seed: record}})."""
    found = defaultdict(lambda: defaultdict(dict))
    records = [until(r, r["setting"]["steps"]) for r in records]
    for r in records:
        s, last = r["setting"], r["checkpoints"][-1]["step"]
        start, stop = s["ramp"]
        planned = "" if last == s["steps"] else f" (of {s['steps']})"
        text = f"{last} steps{planned} of {s['rows']} × 64 tokens, λ = {s['factor']:g}, "
        text += f"{s.get('map_rows', 1)} row(s) a prompt, "
        text += (
            f"λ ramped from {start:.0%} to {stop:.0%} of the steps" if stop else "λ from the start"
        )
        found[text][r["arm"]][r["seed"]] = r
    # Logits alone know no λ: their students serve every setting of the same batches and steps.
    plain = {(shape(r), r["seed"]): r for r in records if r["arm"] == "kd"}
    for arms in found.values():
        for seed, r in [(s, r) for own in arms.values() for s, r in own.items()]:
            if (twin := plain.get((shape(r), seed))) is not None:
                arms["kd"][seed] = until(twin, r["checkpoints"][-1]["step"])
    return found


def until(record, step):
    """The record up to a step, without a last checkpoint where the run was cut off."""
    every = record["setting"]["steps"] // 5
    kept = [p for p in record["checkpoints"] if p["step"] <= step and p["step"] % every == 0]
    return record | {"checkpoints": kept}


def shape(record):
    """What a student without the operator was trained with."""
    return tuple(record["setting"][name] for name in ("steps", "rows", "prompts"))


def table(arms):
    """The students of one setting: accuracy, likeness, and accuracy at equal time."""
    head = "| signal | seeds | IOI | facts | agreement | greater-than | mean | mean at KD's time | "
    head += "KL | map cosine | at answers | leave-one-out | CPU s |\n|" + "---|" * 13
    rows = [head]
    for arm in (a for a in NAMES if a in arms):
        last = [r["checkpoints"][-1] for r in arms[arm].values()]
        timed = [
            at_time(r, arms["kd"][seed]["checkpoints"][-1]["seconds"] * 1.02)
            for seed, r in arms[arm].items()
            if seed in arms.get("kd", {})
        ]
        cells = [NAMES[arm], ", ".join(map(str, sorted(arms[arm])))]
        cells += [shown(p[task] for p in last) for task in (*TASKS, "mean")]
        cells += [shown(p and p["mean"] for p in timed)]
        names = ("kl", "map_cosine", "answer_rows", "word_drops")
        cells += [shown([p.get(name) for p in last], 2) for name in names]
        cells += [shown((p["seconds"] for p in last), 0)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def verdict(arms):
    """What the maps bring against logits alone, by the seeds that both have."""
    found = []
    for arm, plain in (("maps", "kd"), ("maps+words", "kd"), ("maps-warm", "kd-warm")):
        seeds = sorted(set(arms.get(arm, {})) & set(arms.get(plain, {})))
        if not seeds:
            continue
        ours, kd = ([arms[a][s]["checkpoints"][-1] for s in seeds] for a in (arm, plain))
        gain = 100 * mean(a["mean"] - b["mean"] for a, b in zip(ours, kd, strict=True))
        short = "KD" if plain == "kd" else NAMES[plain]
        cosine, said = 0.0, "the map cosine was not measured"
        if all("map_cosine" in p for p in (*ours, *kd)):
            cosine, without = (mean(p["map_cosine"] for p in points) for points in (ours, kd))
            said = f"map cosine {cosine:.2f} against {without:.2f}"
        bar = "reached" if gain >= 3 and cosine >= 0.9 else "not reached"
        found.append(
            f"- {NAMES[arm]}: {gain:+.1f} points of mean accuracy against {short} at equal "
            f"steps; {said}. The bar (+3 points, .9) is {bar}."
        )
    return "\n".join(found)


def circuits(arms):
    """Which tokens and heads' roles students share with the teacher, where that was measured."""
    rows = []
    for arm in (a for a in ARMS if a in arms):
        known = [r for r in arms[arm].values() if "roles" in r["checkpoints"][-1]]
        if not known:
            continue
        last = [r["checkpoints"][-1] for r in known]
        cells = [NAMES[arm], *(shown((p[n] for p in last), 2) for n in ("top_token", "heads"))]
        cells += [shown((p["roles"][role] for p in last), 2) for role in ROLES]
        teacher = ["the teacher", "1.00", "1.00"]
        teacher += [shown((r["teachers_roles"][role] for r in known), 2) for role in ROLES]
        rows = rows or ["| " + " | ".join(teacher) + " |"]
        rows.append("| " + " | ".join(cells) + " |")
    if not rows:
        return ""
    head = (
        "| signal | same top token | patterns | previous token | duplicate | induction | copying "
    )
    return "\n".join(["\n\nTokens and heads:\n", f"{head}|\n|" + "---|" * 7, *rows])


def shortcut_table(records):
    """Accuracy with the name as trained, uninformative, and opposite; and the verdict."""
    columns = ("as trained", "uninformative", "opposite")
    head = ("penalty", "name right", "seeds", "steps", *columns, "CPU s")
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    found, said = defaultdict(list), []
    for r in records:
        factor = 0.0 if r["arm"] == "plain" else r["factor"]
        found[r["steps"], r["honest"], factor, r["arm"]].append(r)
    for (steps, honest, factor, arm), runs in sorted(found.items()):
        cells = [NAMES[arm] + (f", λ = {factor:g}" if factor else ""), f"{honest:.0%}"]
        cells += [", ".join(str(r["seed"]) for r in runs), str(steps)]
        cells += [shown(r[name] for r in runs) for name in columns]
        rows.append("| " + " | ".join([*cells, shown((r["seconds"] for r in runs), 0)]) + " |")
        other = found.get((steps, honest, factor, "gradient"))
        if arm == "operator" and other:
            three = (runs, other, found[steps, honest, 0.0, "plain"])
            ours, theirs, none = (100 * mean(r["uninformative"] for r in some) for some in three)
            bar = "reached" if ours >= theirs else "not reached"
            said.append(
                f"- λ = {factor:g}, {steps} steps, name right {honest:.0%} of the time: where the "
                f"name tells nothing, {ours:.1f} % with the operator's row, {theirs:.1f} % with "
                f"the input gradient, and {none:.1f} % without a penalty. The bar (at least as "
                f"good as the input gradient at equal steps) is {bar}."
            )
    return "\n".join(rows) + "\n\n" + "\n".join(said)


def page(results=RESULTS):
    """The text of the page."""
    # 1. The lines.
    records = lines(results / "distillation.jsonl")
    costs = [r for r in records if "cost" in r]
    training = json.loads((demo.model_folder() / "training.json").read_text())
    prompts = min(r["setting"]["prompts"] for r in records if "setting" in r)
    about = {"prompts": prompts, "error": 50 / prompts**0.5}
    parts = [HEAD.format(steps=sum(training["steps"]), **about)]
    # 2. Groups of students.
    for text, arms in groups([r for r in records if "cost" not in r]).items():
        parts.append(
            f"### {text[0].upper()}{text[1:]}\n\n{table(arms)}\n\n{verdict(arms)}".rstrip()
            + circuits(arms)
        )
    # 3. What is missing, costs, and the shortcut.
    trained = {r.get("arm") for r in records}
    if missing := [NAMES[arm] for arm in ARMS if arm not in trained]:
        parts.append(f"Not run: {', '.join(missing)}.")
    if costs:
        ratios = costs[-1]["cost"]
        listed = "\n".join(f"| {name} | {ratio:.2f} |" for name, ratio in ratios.items())
        parts.append(
            COST.format(rows=costs[-1]["rows"]) + "\n\n| step | against KD |\n|---|---|\n" + listed
        )
    parts.append(SHORTCUT + "\n\n" + shortcut_table(lines(results / "shortcut.jsonl")))
    parts.append(TAIL)
    return "\n\n".join(parts) + "\n"


def write_page(results=RESULTS):
    """Write the page."""
    PAGE.write_text(page(results))


HEAD = """# Distillation, measured

`distillation.OperatorLoss` trains a student on its teacher's operator: what every token adds to
the teacher's prediction, row by row. The [tutorial](tutorials/11_distil_by_the_operator) shows
how. This page says what it buys. It is made by `benchmarks/distillation_page.py` of the results
that `benchmarks/distillation.py` and `benchmarks/shortcut.py` wrote.

## What is compared

The teacher is the bundled model: 4 layers, d_model 128. The students have 2 layers, d_model 64
and 0.2 million weights. All arms see the same batches of the bundled grammar, 15 % of them
repeated random words, and start from the same weights per seed. AdamW, 3e-3, cosine.

- *Accuracy* is that of the most likely word, on combinations that were held out of training. For
  "greater-than" it is the probability of later years minus that of earlier ones.
- *mean at KD's time* is the mean at the last checkpoint within the processor time of the KD arm.
  There are five checkpoints; the learning rate of such a student has not come down yet.
- *KL* is the divergence from the teacher's predictions on fresh rows, in nats.
- *map cosine* compares rows of both operators on fresh rows, *at answers* at the ends of held-out
  prompts. A dash means that it was not measured.
- *leave-one-out* is the correlation of what both models lose when one word is replaced.
- *same top token* is the share of held-out prompts in which one token adds most to both models'
  answers. *Patterns* is the mean cosine of the teacher's heads with the most similar head.
- *previous token*, *duplicate* and *induction* are the attention of the best such head on
  repeated random words. *Copying* is what heads add to an answer by reading the answer itself.
- *warm start*: embeddings, readout, heads and neurons begin as what fits of the teacher's.
- *λ* is the factor of maps, of counterfactual rows and of input gradients. The last have no ramp.

## What was run

The bar was set before: with the operator, 3 points of mean accuracy more than KD at equal steps,
and a map cosine of .9. Runs are short: the teacher itself took {steps:,} steps of 32 × 64 tokens.
So these tables tell how signals compare early in training, and nothing about students that are
trained to the end. With {prompts} prompts a task, one accuracy has a standard error of up to
{error:.0f} points: small differences are noise."""
COST = """## What a step costs

Processor time of one training step of {rows} × 64 tokens against a step of plain distillation,
teacher included: medians over 15 steps, side by side. One row costs the student a pull with a
graph, and the teacher a pull without one."""
SHORTCUT = """## A penalty against a shortcut

A name in front of a sentence tells the number of the verb in training, mostly or always. A
penalty on the square of what the name adds to the verb's logit is to keep a model from reading
it: by the operator's row, or by the length of the input gradient times the input's (Ross et al.
2017, arXiv 1703.03717). The product of gradient and input would be 0 past a LayerNorm. Accuracy
is that of the verb against its other number, on held-out sentences."""
TAIL = """The operator holds patterns and ratios. What a name does through attention scores or
through an MLP's activation is in no row, and this penalty leaves those ways open. The input
gradient sees them, but only to first order. In no row of the table is a penalty better than none:
do not take it for a cure.

## How to run it

```console
$ python benchmarks/distillation.py --seeds 0 1 2 --steps 2000 --keep students
$ python benchmarks/distillation.py --cost
$ python benchmarks/shortcut.py
$ python benchmarks/distillation.py --page
```

A run that stops is taken up again: students whose line is written are not trained anew, and
with `--keep` the others go on from their last twentieth of the steps."""
