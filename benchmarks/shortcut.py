"""Train away a shortcut: a penalty on what a planted cue adds to the answer.

Sentences of the bundled grammar ask for a verb in singular or plural. A name is put in front of
each: in training it tells the verb's number. A model that reads the name instead of the noun fails
where the name tells nothing, or the opposite.

1. Train a small model plainly; with a penalty on the operator's row at the name; and with one on
   the input gradient there (Ross et al. 2017). Both penalties are squares of logits. The second is
   the square of the gradient's length times the input's.
2. Measure accuracy on sentences that were held out: with the name as in training, without any
   information in the name, and with the opposite name.

``python benchmarks/shortcut.py`` appends one JSON line per run.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from distillation import new_student

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.demo.grammar import document
from tensorlens_tl.demo.tokenizer import BOS, IDS
from tensorlens_tl.distillation import rows_of

RESULTS = Path(__file__).parent / "results" / "shortcut.jsonl"
ARMS = ("plain", "operator", "gradient")
CUES = ("Mary", "John")
LENGTH = 6
"""Tokens of a sentence up to its verb; others are left out, so that no padding is needed."""


def sentences(drawn):
    """Ids [row, pos] with a name in front, the verbs, the wrong verbs, and the nouns' numbers."""
    kept = [d for d in drawn if d.answers[0] == LENGTH]
    words = [[BOS, CUES[0], *d.words[: d.answers[0]]] for d in kept]
    ids = torch.tensor([[IDS[w] for w in row] for row in words])
    verbs = torch.tensor([IDS[d.words[d.answers[0]]] for d in kept])
    wrong = torch.tensor([IDS[d.foil] for d in kept])
    plural = torch.tensor([d.words[d.answers[0]] in ("are", "were") for d in kept])
    return ids, verbs, wrong, plural


def with_cues(ids, says_plural):
    """The sentences with the name that tells a number."""
    ids = ids.clone()
    ids[:, 1] = torch.where(says_plural, IDS[CUES[1]], IDS[CUES[0]])
    return ids


def loss_of(arm, model, ids, verbs, factor):
    """The cross-entropy of the verb, and the penalty on what the name adds to it."""
    if arm == "plain":
        logits = model(ids)[:, -1]
        return torch.nn.functional.cross_entropy(logits, verbs)
    if arm == "operator":
        logits, lens = tensorlens_tl.capture(model, ids, graph=True)
        query = torch.full((1, len(ids)), ids.shape[1] - 1)
        share = rows_of(lens, query, verbs[None])[0, :, 1]
        logits = logits[:, -1]
    else:
        kept = []
        entry = [("blocks.0.hook_resid_pre", lambda x, hook: kept.append(x))]
        logits = model.run_with_hooks(ids, fwd_hooks=entry)[:, -1]
        value = logits.gather(1, verbs[:, None])[:, 0] - logits.mean(-1)
        slope = torch.autograd.grad(value.sum(), kept[0], create_graph=True)[0]
        # Not times the input: past a LayerNorm ⟨gradient, input⟩ is 0, whatever the input does.
        share = slope[:, 1].norm(dim=-1) * kept[0][:, 1].norm(dim=-1).detach()
    return torch.nn.functional.cross_entropy(logits, verbs) + factor * share.square().mean()


def run(arm, seed, options):
    """Train one model, and measure it."""
    # 1. Training.
    rng, model = random.Random(seed), new_student(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    begun = time.process_time()
    for _ in range(options.steps):
        ids, verbs, _, plural = sentences([document("agreement", rng) for _ in range(72)])
        honest = torch.rand(len(ids), generator=generator) < options.honest
        loss = loss_of(arm, model, with_cues(ids, plural == honest), verbs, options.factor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - begun
    # 2. Accuracy on sentences that were held out.
    ids, verbs, wrong, plural = sentences(demo.unseen("agreement", options.prompts, 1))
    found = {}
    coin = torch.rand(len(ids), generator=torch.Generator().manual_seed(0)) < 0.5
    for name, says in (("as trained", plural), ("uninformative", coin), ("opposite", ~plural)):
        with torch.no_grad():
            logits = model(with_cues(ids, says))[:, -1]
        right = logits.gather(1, verbs[:, None]) > logits.gather(1, wrong[:, None])
        found[name] = right.float().mean().item()
    about = {"arm": arm, "seed": seed, "prompts": len(ids), "seconds": seconds}
    return about | {k: getattr(options, k) for k in ("steps", "factor", "honest")} | found


def main():
    """Train and measure the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--factor", type=float, default=1.0, help="of the penalty")
    parser.add_argument("--honest", type=float, default=1.0, help="how often the name is right")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for arm in options.arms:
            line = json.dumps(run(arm, seed, options))
            print(line, flush=True)
            options.out.parent.mkdir(exist_ok=True)
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
