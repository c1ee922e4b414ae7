"""Facts rewritten in an MLP's weights: python benchmarks/editing_weights.py [--n 40].

1. For some of the bundled model's capitals, draw another capital. Ask the plain model for the fact
   and for held-out phrasings of it, for other countries, about the country, and in other tasks.
2. Find the vector δ that writes the new capital at the country's token, in two ways:

    operator  one vector for the prompt behind several leads, from one sweep, corrected three times
    rome      what 20 steps of Adam make of −log P(new), behind the same leads, with ROME's penalty
              on the length of δ and on what "… is a country in" predicts

3. Write it into W_out of one block in ROME's form (Meng et al. 2022, arXiv 2202.05262),
   W_out + (C⁻¹ k) δᵀ / (kᵀ C⁻¹ k), with the second moments C of the activations on other prompts.
   Ask the edited model the same, and compare.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from editing import kept, spread

import tensorlens_tl
from tensorlens_tl import demo, editing
from tensorlens_tl.demo.facts import COUNTRIES, LEADS, PHRASINGS

ASKED, *HELD_OUT = PHRASINGS["capital"]
BACK = -2  # the country's place in the prompt that is rewritten, from its end
STEPS, RATE, DECAY, KL, LONGEST = 20, 0.5, 0.5, 0.0625, 4.0  # as in ROME's own configuration


def last_logits(model: Any, prompts: Sequence[str]) -> Any:
    """The logits at every prompt's last token, prompts of one length at a time."""
    ids = [model.to_tokens(prompt)[0] for prompt in prompts]
    found: dict[int, Any] = {}
    for n in sorted({len(one) for one in ids}):
        rows = [i for i, one in enumerate(ids) if len(one) == n]
        found |= dict(zip(rows, model(torch.stack([ids[i] for i in rows]))[:, -1], strict=True))
    return torch.stack([found[i] for i in range(len(ids))])


def led(prompt: str) -> list[str]:
    return [f"{lead} {prompt}".strip() for lead in LEADS]


def moments(model: Any, layer: int) -> Any:
    """Second moments of what W_out reads, on prompts of all tasks."""
    seen: list[Any] = []
    hooks = [(f"blocks.{layer}.mlp.hook_post", lambda t, hook: seen.append(t.flatten(0, -2)))]
    with torch.no_grad():
        for task in demo.TASKS:
            for case in demo.prompts(task, 60, seed=7):
                model.run_with_hooks(case.clean, fwd_hooks=hooks)
    k = torch.cat(seen).double()
    return k.mT @ k / len(k)


def by_operator(model: Any, prompts: list[str], new: str, old: str, layer: int) -> Any:
    _, lens = tensorlens_tl.capture(model, prompts)
    goal = {"target": new, "versus": old, "site": layer, "positions": BACK}
    edit = lens.edit(**goal, to=-float(lens.edit(**goal, by=1.0).before.mean()), shared=True)
    return edit.refine(model, rounds=3).vector


def by_rome(model: Any, prompts: list[str], new: str, country: str, layer: int) -> Any:
    token = int(model.to_tokens(new, prepend_bos=False)[0, -1])
    essence, hook = f"{country} is a country in", f"blocks.{layer}.hook_resid_post"
    written: list[Any] = []
    watch = [(f"blocks.{layer}.hook_mlp_out", lambda t, hook: written.append(t[0, BACK]))]
    with torch.no_grad():
        model.run_with_hooks(prompts[0], fwd_hooks=watch)
        kept_as = model(essence)[0, -1].log_softmax(-1)
    delta = torch.zeros(model.cfg.d_model, requires_grad=True)
    step = torch.optim.Adam([delta], lr=RATE)
    size = written[0].norm()

    def added(at: int) -> Any:
        def add(t: Any, hook: Any) -> Any:
            t = t.clone()
            t[:, at] = t[:, at] + delta
            return t

        return [(hook, add)]

    for _ in range(STEPS):
        with torch.enable_grad():
            with model.hooks(fwd_hooks=added(BACK)):
                loss = -last_logits(model, prompts).log_softmax(-1)[:, token].mean()
            with model.hooks(fwd_hooks=added(-5)):
                now = model(essence)[0, -1].log_softmax(-1)
            loss = loss + KL * (kept_as.exp() * (kept_as - now)).sum()
            loss = loss + DECAY * delta.square().sum() / size**2
            step.zero_grad()
            loss.backward()
            step.step()
        with torch.no_grad():
            delta *= (LONGEST * size / delta.norm()).clamp(max=1)
    return delta.detach()


def study(model: Any, layer: int, n: int) -> dict[str, Any]:
    rng, C = random.Random(0), moments(model, layer)
    found: dict[str, dict[str, list[float]]] = {"operator": {}, "rome": {}}
    capitals = {name: row["capital"] for name, row in COUNTRIES.items()}
    token = {c: int(model.to_tokens(c, prepend_bos=False)[0, -1]) for c in capitals.values()}
    others = [case.clean for t in ("ioi", "agreement") for case in demo.prompts(t, 10, seed=9)]
    for country in rng.sample(sorted(capitals), n):
        # 1. The fact, and what the plain model says.
        old, new = capitals[country], rng.choice(list(capitals.values()))
        asked = led(ASKED.format(country))
        elsewhere = [c for c in rng.sample(sorted(capitals), 20) if c != country]
        prompts = {
            "efficacy": asked,
            "held-out phrasing": [p.format(country) for p in HELD_OUT],
            "other countries unchanged": [ASKED.format(c) for c in elsewhere],
            "other questions unchanged": [
                p.format(country)
                for r in ("language", "currency", "continent")
                for p in PHRASINGS[r]
            ],
            "other tasks, KL": others,
        }
        with torch.no_grad():
            before = {name: last_logits(model, p) for name, p in prompts.items()}
        if new == old or int(before["efficacy"][0].argmax()) != token[old]:
            continue
        # 2. Two vectors.
        vectors = {
            "operator": by_operator(model, asked, new, old, layer),
            "rome": by_rome(model, asked, new, country, layer),
        }
        # 3. The edited model.
        _, lens = tensorlens_tl.capture(model, asked[0])
        for method, vector in vectors.items():
            edit = lens.edit(new, versus=old, site=layer, positions=BACK, delta=vector)
            with torch.no_grad(), editing.to_weights(edit, model, layer, C):
                after = {name: last_logits(model, p) for name, p in prompts.items()}
            row = found[method]
            row.setdefault("norm", []).append(float(edit.norm))
            for name, z in after.items():
                if name.endswith("KL"):
                    p, q = before[name].log_softmax(-1), z.log_softmax(-1)
                    value = (p.exp() * (p - q)).sum(-1).mean()
                elif name.endswith("unchanged"):
                    value = (z.argmax(-1) == before[name].argmax(-1)).float().mean()
                else:
                    value = (z[:, token[new]] > z[:, token[old]]).float().mean()
                    best = (z.argmax(-1) == token[new]).float().mean()
                    row.setdefault(f"{name}, top-1", []).append(float(best))
                row.setdefault(name, []).append(float(value))
    made = {method: {k: spread(v) for k, v in row.items()} for method, row in found.items()}
    return {"n": len(found["rome"]["norm"]), **made}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--layers", type=int, nargs="+", default=(0,))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = demo.load_model()
    for layer in args.layers:
        kept(f"demo weights {layer}", partial(study, model, layer, args.n))


if __name__ == "__main__":
    main()
