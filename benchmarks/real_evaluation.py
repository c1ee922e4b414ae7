"""Every method on real models: which tokens, words or patches does a model need?

    python benchmarks/real_evaluation.py --keep FOLDER [--sets SET ...] [--until HH:MM]
    python benchmarks/real_evaluation.py --keep FOLDER --merge   # the JSON, and the page of it

1. Digits that a small vision transformer, trained here, has not seen.
2. Pairs of sentences that are made here, for all-MiniLM-L6-v2; the target is their cosine.
3. Four kinds of sentences for SmolLM2-135M: subject and verb, relations, stories, indirect object.
   They come from public data in a folder (``--data``): nounpp_test.jsonl of feature-circuits, the
   relations of Hernandez et al. 2024, a text of TinyStories, ioi_llama.csv of EAP-IG.

Chunks of the kinds run in turn, and each is kept in the folder. So a run may be stopped: the next
one goes on, and the page says how many prompts there were.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluation
import resumed
import torch
from real_sentences import similarity
from torch import Tensor

import tensorlens_tl
from tensorlens_tl.evaluation.protocols import Measure, measures
from tensorlens_tl.evaluation.report import Evaluation
from tensorlens_tl.evaluation.runner import evaluate
from tensorlens_tl.evaluation.scoring import Scored, score
from tensorlens_tl.methods.registry import METHODS

RESULTS = Path(__file__).parent / "results" / "real_evaluation.json"
OPTIONS = {"norm": {"probes": 8}, "integrated_gradients": {"steps": 4}}
CONTRASTED = ("in_out", "grad_x_input", "attnlrp")
CHUNKS = {"agreement": 10, "relations": 10, "stories": 10, "indirect object": 2}
"""Sentences of each kind in one chunk."""
LENGTHS = {"agreement": 5, "relations": 7, "stories": 9, "indirect object": 14}
"""Their tokens, alike within a kind: prompts of one length are run in one batch."""
TEXTS = tuple(CHUNKS)
SETS = ("digits", "similarity", *TEXTS)
WANTED = {"digits": 500, "similarity": 200, "agreement": 100, "relations": 100, "stories": 60,
          "indirect object": 40}  # fmt: skip
PICTURE_MASKINGS = ("zero", "mean", "blur")


# --- Data ----------------------------------------------------------------------------------------


def sentences(data: Path, model: Any) -> dict[str, list[Tensor]]:
    """Token ids by kind, drawn with a seed. Stories are windows that begin with a sentence."""
    rng, text = random.Random(evaluation.SEED), data / "text"
    lines = (text / "sva" / "nounpp_test.jsonl").read_text().splitlines()
    agreement = sorted({json.loads(line)["clean_prefix"] for line in lines})
    relations = []
    for path in sorted((text / "relations").glob("factual__*.json")):
        one = json.loads(path.read_text())
        for row in one["samples"]:
            relations.append(rng.choice(one["prompt_templates"]).format(row["subject"]))
    stories = []
    whole = (text / "tinystories_sample" / "tinystories_sample.txt").read_text()
    for story in whole.replace("\n", " ").split("<|endoftext|>"):
        words = story.split()
        starts = [i for i in range(1, len(words) - 12) if words[i - 1][-1] in '.!?"']
        stories += [" ".join(words[i : i + 12]) for i in starts]
    rows = (text / "circuits" / "ioi_llama.csv").read_text().splitlines()[1:]
    objects = [row.split('"')[1] for row in rows]
    found = dict(zip(TEXTS, (agreement, relations, stories, objects), strict=True))
    found = {kind: rng.sample(texts, len(texts)) for kind, texts in found.items()}
    ids = {kind: [model.to_tokens(text)[0] for text in texts] for kind, texts in found.items()}
    ids["stories"] = [one[: LENGTHS["stories"] + 1] for one in ids["stories"]]
    return {kind: [o for o in of if len(o) == LENGTHS[kind] + 1] for kind, of in ids.items()}


def digits() -> tuple[Any, Tensor]:
    """The vision transformer of docs/tutorials/09_a_digit.py, and 500 held-out pictures."""
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    given = load_digits()
    pixels = torch.tensor(given.images, dtype=torch.float32)[:, None] / 8 - 1
    classes = torch.tensor(given.target)
    order = torch.randperm(len(pixels))
    train, held_out = order[:1297], order[1297:]
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"image_size": 8, "patch_size": 2, "num_channels": 1, "intermediate_size": 96}
    model = ViTForImageClassification(ViTConfig(**sizes, id2label={i: str(i) for i in range(10)}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(20):
        for batch in train[torch.randperm(len(train))].split(64):
            loss = torch.nn.functional.cross_entropy(model(pixels[batch]).logits, classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model = model.eval()
    with torch.no_grad():
        right = (model(pixels[held_out]).logits.argmax(-1) == classes[held_out]).float().mean()
    print(f"held-out digits: {float(right):.1%} right", file=sys.stderr, flush=True)
    return tensorlens_tl.wrap(model), pixels[held_out]


# --- Running -------------------------------------------------------------------------------------


def scores(model: Any, prompts: Any, batch_size: int, without: tuple[str, ...] = ()) -> Scored:
    """All methods' scores; of some also for the logit less the runner-up's, or without signs."""
    common = {"progress": False, "batch_size": batch_size}
    methods = [name for name in METHODS if name not in without]
    plain = score(model, prompts, methods, options=OPTIONS, **common)
    aimed = score(model, prompts, CONTRASTED, versus="runner_up", **common)
    more = {f"{name}, runner-up": aimed.scores[name] for name in CONTRASTED}
    more["|in_out|"] = [one.abs() for one in plain.scores["in_out"]]
    return replace(plain, scores=dict(plain.scores) | more)


def asked() -> list[Measure]:
    return [*evaluation.last_kept(), *measures("perturbation", metric="agreement")]


def texts(model: Any, prompts: list[Tensor]) -> Evaluation:
    """One chunk of sentences; the last token, at which the prediction is made, is kept.

    In a model without biases DecompX gives the numbers of "in_out": it is left out.
    """
    found = scores(model, prompts, 16, ("decompx",))
    return evaluate(
        model,
        found,
        None,
        asked(),
        evaluation.MASKINGS,
        seed=evaluation.SEED,
        keep_last=True,
        progress=False,
    )


def pictures(model: Any, chosen: Tensor) -> Evaluation:
    """One chunk of pictures; [CLS], at which the prediction is made, is kept."""
    found = scores(model, chosen, 64)
    return evaluate(
        model,
        found,
        None,
        asked(),
        PICTURE_MASKINGS,
        black=-1.0,
        seed=evaluation.SEED,
        progress=False,
    )


def run(args: argparse.Namespace) -> None:
    """Chunks of all sets in turn, until the time is over or all is done."""
    held: dict[str, Any] = {}

    def once(name: str, make: Any) -> Any:
        if name not in held:
            held[name] = make()
        return held[name]

    def smollm2() -> Any:
        load = tensorlens_tl.load_model
        return load(args.model) if args.model else tensorlens_tl.models.smollm2()

    def chunk(name: str, i: int) -> Evaluation:
        # 1. Digits.
        if name == "digits":
            model, pixels = once("digits", digits)
            return pictures(model, pixels[100 * i : 100 * i + size[name]])
        # 2. Pairs of sentences.
        if name == "similarity":
            return similarity(20 * i, size[name], evaluation.SEED, asked(), OPTIONS)
        # 3. Sentences.
        model = once("model", smollm2)
        drawn = once("texts", lambda: sentences(args.data, model))[name]
        return texts(model, drawn[CHUNKS[name] * i :][: size[name]])

    per = {"digits": 100, "similarity": 20, **CHUNKS}
    size = {name: min(args.quick or n, n) for name, n in per.items()}
    for i in range(max(-(-WANTED[name] // per[name]) for name in args.sets)):
        for name in args.sets:
            path = args.keep / f"{name} {i}.json"
            if per[name] * i >= WANTED[name] or path.exists():
                continue
            start = time.process_time()
            found = chunk(name, i)
            if resumed.keep(path, found.to_json(), f"{len(found)}", start, args.until):
                return
        if args.quick:
            return


# --- Merging -------------------------------------------------------------------------------------


def merged(folder: Path) -> dict[str, Any]:
    """What makes the page: cells by group, masking, measure and method."""
    parts: dict[str, list[Evaluation]] = {}
    for path in sorted(folder.glob("*.json")):
        name = path.stem.rpartition(" ")[0]
        parts.setdefault(name, []).append(Evaluation.from_json(path.read_text()))
    groups = {name: [name] for name in SETS if name in parts}
    groups["sentences"] = [name for name in TEXTS if name in parts]
    about = {}
    for name, evaluations in parts.items():
        lengths = [n for one in evaluations for n in one.lengths]
        plain = sum(one.forward_seconds for one in evaluations)
        about[name] = {
            "model": "SmolLM2-135M-Instruct" if name in TEXTS else evaluations[0].model,
            "n": len(lengths),
            "wanted": WANTED[name],
            "tokens": [min(lengths), sum(lengths) / len(lengths), max(lengths)],
            "runs": sum(sum(one.runs.values()) for one in evaluations),
            "forwards": {
                method: evaluation.rounded(sum(one.seconds[method] for one in evaluations) / plain)
                for method in evaluations[0].seconds
                if plain
            },
        }
    tables = {
        group: evaluation.table([one for name in names for one in parts[name]], True)
        for group, names in groups.items()
        if names
    }
    return {
        "seed": evaluation.SEED,
        "torch": torch.__version__.split("+")[0],
        "options": OPTIONS,
        "attention": evaluation.ATTENTION,
        "gradient": evaluation.GRADIENT,
        "sets": about,
        "members": groups,
        "wanted": WANTED | {"sentences": sum(WANTED[name] for name in TEXTS)},
        "tables": tables,
    }


def main() -> None:
    parser = resumed.arguments(__doc__, "per-prompt numbers")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, metavar="SET")
    parser.add_argument("--quick", type=int, default=0, help="one chunk of so many prompts a set")
    args = parser.parse_args()
    resumed.measure_or_merge(args, run, merged, RESULTS, None)


if __name__ == "__main__":
    main()
