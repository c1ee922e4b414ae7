"""Name movers, induction heads and previous-token heads of SmolLM2, with effects in the model.

``python benchmarks/real_heads.py [--n 24] [--model FOLDER]``

1. Split the logit difference of indirect-object prompts by head, and take the heads of the largest
   mean direct effect.
2. Replace each head's output by its mean over the prompts, one head at a time, in the real model.
3. Read where these heads attend from the last position.
4. On repeated random tokens, score all heads as induction and previous-token heads, and ablate the
   best induction heads one by one.
5. Keep what was found in ``results/real_models.json``; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import warnings

import real_page
import torch

import tensorlens_tl
from tensorlens_tl.evaluation.intervals import bootstrap

NAMES = ["Mary", "John", "Tom", "Anna", "James", "Sarah", "Paul", "Lucy", "Peter", "Emma", "Kate"]
PLACES = ["store", "park", "school", "office", "station", "beach"]
THINGS = ["drink", "book", "ring", "letter", "ball", "basket"]
TEXT = "When {} and {} went to the {}, {} gave a {} to"
HEADS, KINDS = 12, 8


def prompts(n, seed=0):
    """Texts with (answer, other name); both orders of the names alike."""
    drawn = torch.Generator().manual_seed(seed)
    texts, answers, foils = [], [], []
    for i in range(n):
        a, b = (NAMES[j] for j in torch.randperm(len(NAMES), generator=drawn)[:2].tolist())
        place, thing = (
            x[int(torch.randint(len(x), (1,), generator=drawn))] for x in (PLACES, THINGS)
        )
        answer, subject = (a, b) if i % 2 else (b, a)
        texts.append(TEXT.format(a, b, place, subject, thing))
        answers.append(" " + answer)
        foils.append(" " + subject)
    return texts, answers, foils


def split(name):
    layer, head = name[1:].split("H")
    return int(layer), int(head)


def without(name, value):
    """A hook that puts ``value`` in the place of one head's output."""
    layer, head = split(name)

    def put(z, hook):
        z = z.clone()
        z[:, :, head] = value
        return z

    return [(f"blocks.{layer}.attn.hook_z", put)]


def estimate(values):
    found = bootstrap(values.tolist())
    return [found.value, found.low, found.high]


def indirect_object(model, n):
    texts, answers, foils = prompts(n)
    # 1. Heads by direct effect.
    mean = tensorlens_tl.mean_attribution(model, texts, answers, foils)
    names = [name for name, *_ in mean.top(200) if "H" in name and "." not in name][:HEADS]
    ids = torch.cat([model.to_tokens(text) for text in texts])  # all have the same length
    right, wrong = (torch.tensor([model.to_single_token(w) for w in ws]) for ws in (answers, foils))

    # 2. Each replaced by its mean.
    def difference(hooks=()):
        with model.hooks(fwd_hooks=list(hooks)):
            last = model(ids, return_type="logits")[:, -1]
        return last.gather(1, right[:, None])[:, 0] - last.gather(1, wrong[:, None])[:, 0]

    whole, heads = difference(), {}
    layers = {f"blocks.{split(name)[0]}.attn.hook_z" for name in names}
    _, cache = model.run_with_cache(ids, names_filter=lambda name: name in layers)
    direct = {name: [] for name in names}
    for text, answer, foil in zip(texts, answers, foils, strict=True):
        _, lens = tensorlens_tl.capture(model, text)
        rows = dict(lens.attribute(answer, versus=foil, by="component").sum("pos").top(400))
        for name in names:
            direct[name].append(rows[name])
    for name in names:
        layer, head = split(name)
        z = cache[f"blocks.{layer}.attn.hook_z"][:, :, head].mean(0)
        heads[name] = {
            "direct": estimate(torch.tensor(direct[name])),
            "effect": estimate(whole - difference(without(name, z))),
        }
    ranks = [
        torch.tensor([heads[name][key][0] for name in names]).argsort().argsort().double()
        for key in ("direct", "effect")
    ]
    return {
        "n": n,
        "example": texts[0],
        "difference": float(whole.mean()),
        "right": float((whole > 0).double().mean()),
        "rho": float(torch.corrcoef(torch.stack(ranks))[0, 1]),
        "heads": heads,
    }


def attention(model, n, names):
    """Step 3: mean attention of the last position to the answer and to the subject's mentions."""
    texts, answers, foils = prompts(n)
    found = {name: {"answer": 0.0, "subject": 0.0, "second subject": 0.0} for name in names}
    for text, answer, foil in zip(texts, answers, foils, strict=True):
        _, lens = tensorlens_tl.capture(model, text)
        words = list(lens.tokens[0])
        places = {
            "answer": words.index(answer),
            "subject": words.index(foil),
            "second subject": len(words) - 1 - words[::-1].index(foil),
        }
        for name in names:
            layer, head = split(name)
            row = lens.capture.blocks[layer].attn.pattern[0, head, -1]
            for key, place in places.items():
                found[name][key] += float(row[place]) / n
    return found


def kinds(model, n=8, length=24):
    # 4. Repeated tokens: scores of all heads, and the best ablated.
    drawn = torch.Generator().manual_seed(0)
    half = torch.randint(100, 40_000, (n, length), generator=drawn)
    ids = torch.cat([model.to_tokens("a")[:, :1].expand(n, 1), half, half], 1)
    patterns = {f"blocks.{i}.attn.hook_pattern" for i in range(model.cfg.n_layers)}
    _, cache = model.run_with_cache(ids, names_filter=lambda name: name in patterns)
    induction, previous = {}, {}
    for layer in range(model.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        later = pattern[:, :, 1 + length :]  # from the repeated half, to what followed before
        copied = later.diagonal(2, -2, -1)[..., :-1].mean((0, -1))
        before = pattern.diagonal(-1, -2, -1).mean((0, -1))
        for head in range(model.cfg.n_heads):
            induction[f"L{layer}H{head}"] = float(copied[head])
            previous[f"L{layer}H{head}"] = float(before[head])

    def loss(hooks=(), at=slice(length, -1)):
        with model.hooks(fwd_hooks=list(hooks)):
            log = model(ids, return_type="logits").log_softmax(-1)
        return -log[:, :-1].gather(-1, ids[:, 1:, None])[:, :, 0][:, at].mean(-1)

    def best(scores):
        return sorted(scores, key=lambda name: -scores[name])[:KINDS]

    plain = loss(at=slice(length + 1, None))
    return {
        "n": n,
        "length": length,
        "loss": float(plain.mean()),
        "first": float(loss(at=slice(0, length)).mean()),
        "induction": {
            name: {
                "score": induction[name],
                "effect": estimate(loss(without(name, 0.0), slice(length + 1, None)) - plain),
            }
            for name in best(induction)
        },
        "previous": {name: previous[name] for name in best(previous)},
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--model", help="a folder of the same model, which loads faster")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    load = tensorlens_tl.load_model
    model = load(args.model) if args.model else tensorlens_tl.models.smollm2()
    # 5. All is kept.
    ioi = real_page.kept("heads ioi", lambda: indirect_object(model, args.n))
    real_page.kept("heads attention", lambda: attention(model, args.n, list(ioi["heads"])))
    real_page.kept("heads kinds", lambda: kinds(model))


if __name__ == "__main__":
    main()
