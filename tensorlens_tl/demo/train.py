"""Train the demo model: ``python -m tensorlens_tl.demo.train --out FOLDER``.

1. Build a small GPT-2 with random weights.
2. Train it in two stages: mostly on repeated random words, until heads copy them, and then mostly
   on documents of the grammar. Combinations of words that are held out never occur.
3. Save it as a folder that every host loads, with the facts of the training beside.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .grammar import document, segment
from .tokenizer import BOS, IDS, save_tokenizer

N_CTX = 64
ROWS = 32
ANSWER_WEIGHT = 3.0


@dataclass(frozen=True)
class Stage:
    """One stage of the training: its length, its highest learning rate and its data.

    Attributes:
        steps: Largest number of batches.
        lr: Learning rate after the warm-up. A cosine takes the rate down to 2 % of this.
        induction: Share of rows that are induction.
        short: Share of induction rows that repeat a short segment many times.
        mix: Weight of every task in the other rows, by documents.
        until: Loss on fresh induction rows at which the stage ends. Above 0, the learning rate
            stays constant.
    """

    steps: int
    lr: float
    induction: float
    short: float
    mix: dict[str, float]
    until: float = 0.0


MIX = {"ioi": 0.26, "facts": 0.20, "agreement": 0.08, "greater_than": 0.32, "filler": 0.14}
STAGES = (
    Stage(2500, 1e-3, 0.75, 0.6, MIX, until=1.0),
    Stage(5400, 1e-3, 0.3, 0.2, MIX),
)


def training_documents(rng: random.Random, mix: dict[str, float]) -> Iterator:
    """Yield the documents of the training stream, none with a held-out combination.

    Args:
        rng: The source of randomness.
        mix: Weight of every task.

    Yields:
        Documents, without end.
    """
    tasks, weights = tuple(mix), tuple(mix.values())
    while True:
        yield document(rng.choices(tasks, weights)[0], rng)


def induction_row(rng: random.Random, short: float = 0.2) -> tuple[list[str], list[float]]:
    """Draw a row of random words, stretches of which are repeated.

    Args:
        rng: The source of randomness.
        short: Share of rows whose stretches are short and repeated many times.

    Returns:
        The words and their loss weights, which are 0 where nothing tells the word.
    """
    words = [BOS, *segment(rng, 12)[: rng.choice((0, rng.randrange(12)))]]
    weights = [0.0] * len(words)
    many = rng.random() < short
    while len(words) < N_CTX:
        length, times = (rng.randrange(3, 12), 6) if many else (rng.randrange(3, 32), 2)
        words += segment(rng, length) * times
        weights += [0.0] * (length + 1) + [1.0] * (length * (times - 1) - 1)
    return words[:N_CTX], weights[:N_CTX]


def document_row(documents: Iterator) -> tuple[list[str], list[float]]:
    """Fill a row with documents, a BOS before each.

    Args:
        documents: Endless source of documents.

    Returns:
        The words and their loss weights.
    """
    words: list[str] = []
    weights: list[float] = []
    while len(words) < N_CTX:
        drawn = next(documents)
        words += [BOS, *drawn.words]
        weights += [1.0] * (len(drawn.words) + 1)
        for position in drawn.answers:
            weights[position - len(drawn.words)] = ANSWER_WEIGHT
    return words[:N_CTX], weights[:N_CTX]


def batches(stage: Stage, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a stage's batches.

    Args:
        stage: Stage of the training.
        rng: The source of randomness.

    Yields:
        Token ids and loss weights, both [rows, position].
    """
    documents = training_documents(rng, stage.mix)
    for _ in range(stage.steps):
        yield encoded(
            [
                induction_row(rng, stage.short)
                if rng.random() < stage.induction
                else document_row(documents)
                for _ in range(ROWS)
            ]
        )


def encoded(rows: list[tuple[list[str], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn rows into tensors.

    Args:
        rows: Words and loss weights of every row.

    Returns:
        Token ids and loss weights, both [rows, position].
    """
    ids = torch.tensor([[IDS[word] for word in words] for words, _ in rows])
    return ids, torch.tensor([weights for _, weights in rows])


def new_model(seed: int) -> Any:
    """Build the untrained model.

    Its activation is the fast form of the one it is saved with; its MLPs are four times d_model
    wide, as ``HookedTransformer`` takes for granted.

    Args:
        seed: Seed of the initial weights.

    Returns:
        An untrained ``GPT2LMHeadModel``.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(IDS),
        n_positions=N_CTX,
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_inner=4 * 128,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[BOS],
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "lm_head" not in name:
            parameter.data *= 5.0 if "wte" in name or "wpe" in name else 2.5
    # Not tied, but the same at the start.
    model.lm_head.weight.data.copy_(model.transformer.wte.weight / 5.0)
    return model


def loss_of(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute the weighted cross-entropy of the next tokens.

    Args:
        model: The demo model.
        ids: Token ids, [rows, position].
        weights: Weight of every token as a target, [rows, position].

    Returns:
        The weighted mean, a scalar.
    """
    hidden = model.transformer(ids[:, :-1]).last_hidden_state
    chosen = weights[:, 1:] > 0
    losses = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[chosen]), ids[:, 1:][chosen], reduction="none"
    )
    return (losses * weights[:, 1:][chosen]).sum() / weights[:, 1:].sum()


def train(model: Any, stages: tuple[Stage, ...], seed: int) -> tuple[list[int], float]:
    """Train the model in place, and print the loss.

    Args:
        model: The demo model.
        stages: Stages of the training, in order.
        seed: Seed of the data.

    Returns:
        The number of steps of every stage, and the processor seconds of all of them.
    """
    rng = random.Random(seed)
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or ".wte." in n or ".wpe." in n or "lm_head" in n]
    decayed = [p for _, p in named if all(p is not q for q in plain)]
    begun, taken = time.process_time(), []
    for number, stage in enumerate(stages, 1):
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True
        )
        warm = max(1, min(200, stage.steps // 10))
        for step, (ids, weights) in enumerate(batches(stage, rng)):
            done = max(0, step - warm) / max(1, stage.steps - warm)
            cosine = 1.0 if stage.until else 0.51 + 0.49 * math.cos(math.pi * done)
            factor = min((step + 1) / warm, cosine)
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * factor
            loss = loss_of(model, ids, weights)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 49 and stage.until:
                probe = random.Random(f"probe {step}")
                with torch.no_grad():
                    fresh = loss_of(model, *encoded([induction_row(probe) for _ in range(ROWS)]))
                if fresh < stage.until:
                    break
            if step % 100 == 99:
                seconds = time.process_time() - begun
                print(f"stage {number} step {step + 1} loss {loss:.4f} {seconds:.0f} s", flush=True)
        taken.append(step + 1)
    return taken, time.process_time() - begun


def save(model: Any, folder: Path) -> None:
    """Write a folder that every host loads: configuration, weights and tokenizer.

    Args:
        model: The trained model.
        folder: Folder to write into; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The same function as the fast form of the training, under the name that every host knows.
    model.config.activation_function = "gelu_new"
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["n_ctx"] = N_CTX
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_tokenizer(folder, N_CTX)


def main() -> None:
    """Train from scratch, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every stage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # 1. A model without training.
    model = new_model(options.seed)
    # 2. Two stages.
    stages = tuple(replace(s, steps=max(1, int(s.steps * options.scale))) for s in STAGES)
    steps, seconds = train(model, stages, options.seed)
    # 3. The folder, and what made it.
    save(model, options.out)
    facts = {
        "seed": options.seed,
        "seconds": round(seconds),
        "steps": steps,
        "tokens": ROWS * N_CTX * sum(steps),
        "torch": torch.__version__.split("+")[0],
        "stages": [asdict(stage) for stage in stages],
    }
    (options.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
