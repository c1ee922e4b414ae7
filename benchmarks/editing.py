"""Edits, predicted and real: python benchmarks/editing.py [--model demo|smollm2] [--n 200].

1. Take the parts of the model's own gradient apart: patterns, norm scales and gating ratios, each
   held or live. Which does a covector need?
2. Ask for the target's opposite at the last position: what is delivered, at what size, by the
   operator, also with queries and keys, and gating ratios, to first order, before and after two
   corrections, by the Jacobian, also after two Newton steps, and by three other methods; and how
   far held-out prompts move.
3. Patch one position by its corrupted twin's, with attention patterns, or norm scales, held in the
   real model. How much of what the operator misses was moved by them?
4. Patch the same with nothing held, at the input of blocks. Compare what the operator in these
   forms and the Jacobian predict with what happens.
5. Give edits one size at every block's input. Does the predicted effect order them as the real one?

Every entry goes to results/editing.json at once, and a run that is stopped goes on where it was.
``editing_page.py`` makes docs/editing.md of them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import real_page
import torch

import tensorlens_tl
from tensorlens_tl import demo, editing
from tensorlens_tl.evaluation import bootstrap, estimate, median, rank_correlation

kept = partial(real_page.kept, file="editing")
TASKS = ("ioi", "facts", "agreement")
FORMS = ("operator", "operator_qk", "operator_qk_gates", "jacobian")
EDITS = (*FORMS, "refined", "refined_qk_gates", "refined_jacobian", "caa", "logit_lens", "random")
HELD_OUT = {
    "demo": ("Farmers in Peru buy seeds with the",),
    "smollm2": ("My sister plays the piano and I",),
}
BUDGET = 0.1

NAMES = ("Mary", "John", "Anna", "Peter", "Alice", "David", "Laura", "James", "Emma", "Daniel")
PLACES, THINGS = ("store", "park", "school", "office"), ("drink", "book", "ring", "letter")
CAPITALS = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid",
            "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "Greece": "Athens",
            "Egypt": "Cairo", "Ireland": "Dublin", "England": "London"}  # fmt: skip
NOUNS = ("key", "letter", "picture", "teacher", "doctor", "student", "book", "car", "dog", "boy")
NEAR = ("table", "garden", "window", "house", "road", "door")


def written(task: str, n: int) -> list[editing.study.Case]:
    """Prompts of English for a model of English, each with its corrupted prompt."""
    rng = random.Random(0)
    found: dict[str, tuple[str, str, str, str]] = {}
    for _ in range(100 * n):
        if task == "ioi":
            a, b = rng.sample(NAMES, 2)
            place, thing = rng.choice(PLACES), rng.choice(THINGS)
            head = f"When {a} and {b} went to the {place},"
            case = (
                f"{head} {b} gave a {thing} to",
                f"{head} {a} gave a {thing} to",
                f" {a}",
                f" {b}",
            )
        elif task == "facts":
            a, b = rng.sample(sorted(CAPITALS), 2)
            head = rng.choice(
                ("The capital of", "Everybody knows that the capital of", "I live in")
            )
            tail = ", in the city of" if head == "I live in" else " is the city of"
            case = f"{head} {a}{tail}", f"{head} {b}{tail}", f" {CAPITALS[a]}", f" {CAPITALS[b]}"
        else:
            noun, near = rng.choice(NOUNS), rng.choice(NEAR)
            one, two = f"The {noun} near the {near}", f"The {noun}s near the {near}"
            case = (one, two, " is", " are") if rng.random() < 0.5 else (two, one, " are", " is")
        found[case[0]] = case
        if len(found) == n:
            break
    return list(found.values())


def equally_long(model: Any, cases: list) -> list:
    """Cases whose prompts have equally many tokens, and whose answers are one token each."""

    def count(text: str) -> int:
        return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    return [c for c in cases if count(c[0]) == count(c[1]) and count(c[2]) == count(c[3]) == 1]


def spread(values: Sequence[float]) -> list[float]:
    found = estimate(list(values))
    return [round(x, 4) for x in (found.value, found.low, found.high)]


def predictions(model: Any, cases: list, site: str, gate: str) -> dict[str, Any]:
    made = editing.predict(model, cases, site, FORMS, gate)
    real, found = torch.tensor(made.real), {"n": len(made.real)}
    picks = torch.randint(len(real), (500, len(real)), generator=torch.Generator().manual_seed(0))
    for form in FORMS:
        off = (torch.tensor(made.predicted[form]) - real).abs()
        ratios = off[picks].sum(1) / real.abs()[picks].sum(1)
        low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
        found[form] = {
            "error": [round(x, 4) for x in (made.error(form), low, high)],
            "pearson": round(made.pearson(form), 4),
            "spearman": round(made.spearman(form), 4),
        }
    return found


def edits(model: Any, cases: list, site: str, gate: str, held: Sequence[str]) -> dict[str, Any]:
    study = editing.evaluate(model, cases, EDITS, (site,), gate=gate)
    found: dict[str, Any] = {"n": study.n}
    for m in EDITS:
        off = [abs(x - 1) for x in study.values[m, "delivered"]]
        middle = bootstrap(off, median)
        found[m] = {"miss": [round(x, 4) for x in (middle.value, middle.low, middle.high)]}
        found[m] |= {name: spread(study.values[m, name]) for name in ("size", "flipped")}
    for m, rival in (
        ("operator", "jacobian"),
        ("operator_qk_gates", "jacobian"),
        ("refined", "refined_jacobian"),
        ("refined_qk_gates", "refined_jacobian"),
    ):
        pairs = zip(study.values[m, "norm"], study.values[rival, "norm"], strict=True)
        found[m]["norm by the Jacobian's"] = spread([a / b for a, b in pairs])
    # How far other prompts move: some of the prompts, as each costs a run per edit.
    methods = ("operator", "operator_qk_gates", "jacobian", "random")
    other = editing.evaluate(model, cases[:40], methods, (site,), gate=gate, held_out=held)
    for m in methods:
        found[m]["kl_held_out"] = spread(other.values[m, "kl_held_out"])
    return found


def order(model: Any, cases: list, gate: str) -> dict[str, Any]:
    """Edits of one size at every block, and what predicts their effect."""
    prompts, answers, foils = ([case[i] for case in map(parts, cases)] for i in (0, 2, 3))
    _, lens = tensorlens_tl.capture(model, prompts, gate=gate)
    goals: dict[str, Any] = {"target": answers, "versus": foils}
    W_U, rows = lens.capture.unembed.weights.W_U, torch.arange(len(prompts))
    pairs = lens.edit(**goals, by=0.0, site=0).goal
    lens_way = (W_U[:, list(pairs.targets)] - W_U[:, list(pairs.versus or ())]).mT
    at = lens.capture.frame.index(-1)
    lens_way = lens.capture.ln_final.row(at).apply_t(lens_way[:, None])[:, 0]
    found: dict[str, list[float]] = {"operator": [], "qk_gates": [], "logit_lens": [], "real": []}
    for layer in range(model.cfg.n_layers):
        site = f"blocks.{layer}.hook_resid_pre"
        g = lens.covector(**goals, site=site)[rows, at]
        x = lens.operator.states()[site][rows, at]
        length = BUDGET * x.norm(dim=-1, keepdim=True)
        delta = torch.zeros_like(lens.operator.states()[site])
        delta[rows, at] = -length * g / g.norm(dim=-1, keepdim=True)
        edit = lens.edit(**goals, delta=delta, site=site)
        moved = lens.effect(delta, **goals, site=site, positions=None, qk=True, gates=True)
        real = edit.check(model).real
        found["operator"] += edit.predicted.tolist()
        found["qk_gates"] += moved.tolist()
        found["logit_lens"] += (-length[:, 0] * lens_way.norm(dim=-1)).tolist()
        found["real"] += real.tolist()
    own = {m: round(rank_correlation(v, found["real"]), 4) for m, v in found.items() if m != "real"}
    return {"n": len(prompts), "edits": len(found["real"]), **own}


def parts(case: Any) -> tuple[str, str, str, str]:
    return case if isinstance(case, tuple) else (case.clean, case.corrupted, case.answer, case.foil)


HELD = {"pattern": "attn.hook_pattern", "scale": "hook_scale", "gates": "mlp.hook_post"}


def pieces(model: Any, cases: list, layers: Sequence[int]) -> dict[str, Any]:
    """The model's own gradient with some quantities held, against the whole gradient."""
    found: dict[str, dict[str, list[float]]] = {}
    for clean, _, answer, foil in map(parts, cases):
        ids = model.to_tokens(clean)
        a, b = (
            model.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (answer, foil)
        )
        whole = gradient(model, ids, a, b, layers, ())
        for held in ((), ("pattern",), ("scale",), ("gates",), ("scale", "gates"), tuple(HELD)):
            g = whole if not held else gradient(model, ids, a, b, layers, held)
            for layer in layers:
                one, all_ = g[layer], whole[layer]
                size = {"norm": float(one.norm() / all_.norm())}
                size["cosine"] = float(torch.cosine_similarity(one, all_, 0))
                name = f"{layer} {' '.join(held) or 'nothing'}"
                for key, value in size.items():
                    found.setdefault(name, {}).setdefault(key, []).append(value)
    return {name: {k: spread(v) for k, v in one.items()} for name, one in found.items()}


def gradient(
    model: Any, ids: Any, a: int, b: int, layers: Sequence[int], held: Sequence[str]
) -> dict[int, Any]:
    """The gradient of logit(a) − logit(b) at the last position of blocks' inputs."""
    seen: dict[int, Any] = {}
    up: dict[str, Any] = {}

    def watch(t: Any, hook: Any) -> Any:
        layer = int(hook.name.split(".")[1])
        seen[layer] = torch.zeros_like(t).requires_grad_()
        return t + seen[layer]

    def split(t: Any, hook: Any) -> Any:  # act(g) ⊙ u with act(g) held
        block = hook.name.split(".")[1]
        ratio = (t / up[block]).detach()
        return ratio * up[block]

    def keep(t: Any, hook: Any) -> None:
        up[hook.name.split(".")[1]] = t

    hooks = [(f"blocks.{n}.hook_resid_pre", watch) for n in layers]
    for name in model.hook_dict:
        if any(name.endswith(HELD[h]) for h in held if h != "gates"):
            hooks.append((name, lambda t, hook: t.detach()))
        if "gates" in held and name.endswith(("hook_pre_linear", "mlp.hook_post")):
            hooks.append((name, keep if name.endswith("linear") else split))
    with torch.enable_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=hooks)[0, -1]
        found = torch.autograd.grad(logits[a] - logits[b], list(seen.values()))
    return {n: g[0, -1] for n, g in zip(seen, found, strict=True)}


@torch.no_grad()
def held_runs(model: Any, cases: list, site: str) -> dict[str, Any]:
    """The operator's error where the real model's patterns, or norm scales, are held, too."""
    names = {h: [n for n in model.hook_dict if n.endswith(HELD[h])] for h in ("pattern", "scale")}
    real: dict[str, list[float]] = {"nothing": [], "pattern": [], "scale": []}
    predicted: list[float] = []
    for clean, corrupted, answer, foil in map(parts, cases):
        _, lens = tensorlens_tl.capture(model, clean)
        logits, cache = model.run_with_cache(clean)
        _, twin = model.run_with_cache(corrupted)
        a, b = model.to_single_token(answer), model.to_single_token(foil)
        before = logits[0, -1, a] - logits[0, -1, b]
        if before <= 0:
            continue
        difference = twin[site] - cache[site]
        for pos in difference[0].abs().sum(-1).nonzero().flatten().tolist():
            delta = torch.zeros_like(difference)
            delta[0, pos] = difference[0, pos]
            predicted.append(float(lens.effect(delta, answer, versus=foil, site=site)))
            for held, seen in real.items():
                hooks: list[Any] = [(site, lambda t, hook, d=delta: t + d)]
                hooks += [(n, lambda t, hook, c=cache: c[hook.name]) for n in names.get(held, ())]
                moved = model.run_with_hooks(clean, fwd_hooks=hooks)[0, -1]
                seen.append(float(moved[a] - moved[b] - before))
    found: dict[str, Any] = {"n": len(predicted)}
    for held, seen in real.items():
        off = sum(abs(p - r) for p, r in zip(predicted, seen, strict=True))
        size = sum(map(abs, seen))
        found[held] = {"error": round(off / size, 4), "moved": round(size / len(seen), 4)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo", choices=("demo", "smollm2"))
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--layers", type=int, nargs="+", help="blocks whose input is edited")
    parser.add_argument("--gate", default="gate", help="how gated MLPs are made linear")
    parser.add_argument("--only", nargs="+", default=("predict", "held", "edit", "order", "pieces"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = args.model == "demo"
    model = demo.load_model() if own else tensorlens_tl.models.smollm2()
    layers = args.layers or range(model.cfg.n_layers)
    made = {
        t: demo.prompts(t, args.n) if own else equally_long(model, written(t, args.n))
        for t in TASKS
    }
    # 1. Parts of the gradient.
    if "pieces" in args.only and not own:
        for task in TASKS:
            short = made[task][:8]
            kept(f"{args.model} pieces {task}", lambda s=short: pieces(model, s, layers))
    for layer in layers:
        for task, cases in made.items():
            key, site = (
                f"{args.model} {args.gate} {{}} {task} {layer}",
                f"blocks.{layer}.hook_resid_pre",
            )
            # 2. Edits.
            if "edit" in args.only:
                work = partial(edits, model, cases, site, args.gate, HELD_OUT[args.model])
                kept(key.format("edit"), work)
            # 3. Patches with parts held.
            if "held" in args.only and own:
                kept(key.format("held"), partial(held_runs, model, cases, site))
            # 4. Patches.
            if "predict" in args.only:
                work = partial(predictions, model, cases, site, args.gate)
                kept(key.format("predict"), work)
    for task, cases in made.items():
        # 5. Edits of one size at every block.
        if "order" in args.only:
            work = partial(order, model, cases, args.gate)
            kept(f"{args.model} {args.gate} order {task}", work)


if __name__ == "__main__":
    main()
