"""Measure the demo model and write its card: ``python -m tensorlens_tl.demo.evaluate``.

1. Measure every task on held-out prompts, and print the figures beside their bars.
2. Measure its circuits: attention, ablation and patching of single heads.
3. Write the figures to ``metrics.json``, and make the card of them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from . import model_folder, unseen
from .card import card
from .circuits import indirect_object_circuit, induction_circuit, padded, repetition_accuracy
from .facts import COUNTRIES
from .grammar import NOUNS, TWO_DIGITS, WORDS, Document, plural
from .tokenizer import IDS

BARS = {
    "ioi": 0.99,
    "ioi_difference": 5.0,
    "induction_10": 0.98,
    "induction_25": 0.98,
    "facts": 0.98,
    "agreement": 0.99,
    "agreement_mismatched": 0.99,
    "greater_than": 0.90,
}


def end_logits(model: Any, drawn: list[Document], rows: int = 250) -> torch.Tensor:
    """Compute the next-token logits at the end of every prompt.

    Args:
        model: The demo model.
        drawn: Documents of a task. A prompt ends before the document's first answer.
        rows: Number of prompts to run at a time.

    Returns:
        The logits, [prompt, d_vocab].
    """
    parts = []
    for start in range(0, len(drawn), rows):
        words = [d.words[: d.answers[0]] for d in drawn[start : start + rows]]
        ends = torch.tensor([len(row) for row in words])
        parts.append(model(padded(words)).logits[torch.arange(len(words)), ends])
    return torch.cat(parts)


def mismatched(drawn: Document) -> bool:
    """Tell whether the attractor of an agreement document differs in number from the subject."""
    numbers = [word in NOUNS for word in drawn.words if word in _FORMS]
    return numbers[0] != numbers[1]


_FORMS = {*NOUNS, *map(plural, NOUNS)}


@torch.no_grad()
def evaluate(model: Any, n: int, seed: int) -> dict:
    """Measure every task on held-out prompts.

    Args:
        model: The demo model as a ``GPT2LMHeadModel``.
        n: Number of prompts per task.
        seed: Seed of the prompts.

    Returns:
        Figures by name: shares of prompts whose most likely next token, over the whole vocabulary,
        is the answer; mean logit differences to the foil; and for "greater_than" the mean
        probability of the years after the first minus that of the others.
    """
    figures = {}
    for task in ("ioi", "facts", "agreement"):
        drawn = unseen(task, n, seed)
        logits = end_logits(model, drawn)
        rows = torch.arange(n)
        answer = torch.tensor([IDS[d.words[d.answers[0]]] for d in drawn])
        foil = torch.tensor([IDS[d.foil] for d in drawn])
        right = (logits.argmax(-1) == answer).float()
        figures[task] = right.mean().item()
        figures[f"{task}_difference"] = (logits[rows, answer] - logits[rows, foil]).mean().item()
        if task == "agreement":
            other = torch.tensor([mismatched(d) for d in drawn])
            figures["agreement_mismatched"] = right[other].mean().item()
    for length in (10, 25):
        ids = padded([d.words for d in unseen("induction", n, seed, length)])
        parts = [repetition_accuracy(model, part) for part in ids.split(250)]
        figures[f"induction_{length}"] = sum(parts) / len(parts)
    drawn = unseen("greater_than", n, seed)
    chances = end_logits(model, drawn).softmax(-1)[:, [IDS[year] for year in TWO_DIGITS]]
    after = torch.arange(100) > torch.tensor([int(d.keys[0][2]) for d in drawn])[:, None]
    figures["greater_than"] = (
        (chances * after).sum(-1).sub((chances * ~after).sum(-1)).mean().item()
    )
    return figures


def main() -> None:
    """Measure the model of a folder, and write ``metrics.json`` and the card into it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_folder(), help="the model's folder")
    parser.add_argument("--n", type=int, default=1000, help="prompts a task")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    options = parser.parse_args()
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    # 1. Tasks, beside their bars.
    model = GPT2LMHeadModel.from_pretrained(options.model, attn_implementation="eager").eval()
    figures = evaluate(model, options.n, options.seed)
    for name, bar in BARS.items():
        print(f"{name:22} {figures[name]:8.4f}   bar {bar}   {figures[name] >= bar}")
    # 2. Circuits.
    with torch.no_grad():
        circuits = {
            "induction": induction_circuit(model, 200, options.seed),
            "indirect_object": indirect_object_circuit(model, 300, options.seed),
        }
    config = model.config
    metrics = {
        "prompts": options.n,
        "seed": options.seed,
        "shape": f"{config.n_layer} layers of {config.n_head} heads, d_model {config.n_embd},"
        f" d_mlp {config.n_inner or 4 * config.n_embd}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "words": len(WORDS),
        "countries": len(COUNTRIES),
        "tokens": len(IDS),
        "n_ctx": config.n_positions,
        "training": json.loads((options.model / "training.json").read_text()),
        "bars": BARS,
        "tasks": figures,
        "circuits": circuits,
    }
    metrics = json.loads(json.dumps(metrics), parse_float=lambda number: round(float(number), 4))
    # 3. The file of figures, and the card made of it.
    (options.model / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (options.model / "README.md").write_text(card(metrics))
    print((options.model / "README.md").read_text())


if __name__ == "__main__":
    main()
