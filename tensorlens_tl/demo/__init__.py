"""The bundled demo model: a small GPT-2 trained on a grammar of its own, loaded offline.

`load_model` gives it as a TransformerLens model, `prompts` gives held-out prompts of its tasks.
"""

import random
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from ..hosts import load_model as load_host
from .facts import COUNTRIES, PHRASINGS, RELATIONS
from .grammar import TASKS, Document, document, induction, text

__all__ = ["TASKS", "PromptPair", "load_model", "model_folder", "prompts", "relation"]

_CLASSES = {
    "hooked": ("transformer_lens.HookedTransformer", "HookedTransformer"),
    "bridge": ("transformer_lens.model_bridge", "TransformerBridge"),
}


@dataclass(frozen=True)
class PromptPair:
    """A held-out prompt of a task and its corrupted twin.

    Args:
        clean: The prompt.
        corrupted: The prompt with one word changed, so that `answer` is no longer right (for
            "greater_than": no better than `foil`). It has as many tokens.
        answer: The word that follows `clean`; one token. For "greater_than" it is the two last
            digits of a year after the first, as "45".
        foil: A wrong word of the same kind; one token. For "greater_than", two digits of a year
            that is not after the first.
        task: The task's name.
    """

    clean: str
    corrupted: str
    answer: str
    foil: str
    task: str


def model_folder() -> Path:
    """Returns the folder of the model, in the Hugging Face layout."""
    return Path(__file__).parent / "model"


def prompts(task: str, n: int, seed: int = 0) -> list[PromptPair]:
    """Draws prompts that hold combinations the training never held.

    Args:
        task: One of `TASKS`: "ioi", "induction", "facts", "agreement", "greater_than".
        n: How many.
        seed: The same seed gives the same prompts.

    Returns:
        The pairs. An unknown task, and an `n` below 1, are a `ValueError`.
    """
    return [_pair(drawn) for drawn in unseen(task, n, seed)]


def relation(name: str) -> Any:
    """Returns one of the countries' relations, for `tensorlens_tl.relations`.

    Args:
        name: "capital", "language", "currency" or "continent".

    Returns:
        The `Relation`: its eight phrasings and sixty countries.

    Raises:
        ValueError: If there is no such relation.
    """
    from ..relations import Relation

    if name not in RELATIONS:
        raise ValueError(f"expected a relation of {', '.join(RELATIONS)}; got {name!r}: name one")
    samples = tuple((country, row[name]) for country, row in COUNTRIES.items())
    return Relation(name, PHRASINGS[name], samples)


def unseen(task: str, n: int, seed: int, length: int | None = None) -> list[Document]:
    """Draws the documents behind `prompts`.

    Args:
        task: One of `TASKS`.
        n: How many.
        seed: The same seed gives the same documents.
        length: Of the repeated segment, for "induction"; by default 4 to 25, drawn for each.

    Returns:
        Documents whose leading combinations are held out.

    Raises:
        ValueError: If there is no such task, or `n` is below 1.
    """
    if task not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}; got {task!r}: name one of them")
    if n < 1:
        raise ValueError(f"expected n, the number of prompts, to be at least 1; got {n}: raise it")
    rng = random.Random(f"{task} {seed}")
    if task == "induction":
        return [induction(rng, length or rng.randrange(4, 26)) for _ in range(n)]
    return [document(task, rng, unseen=True) for _ in range(n)]


def _pair(drawn: Document) -> PromptPair:
    end = len(drawn.twin)
    return PromptPair(
        text(drawn.words[:end]), text(drawn.twin), drawn.words[end], drawn.foil, drawn.task
    )


def load_model(kind: str | None = None) -> Any:
    """Loads the demo model, its weights as they were trained (nothing folded or centred).

    Args:
        kind: "hooked" for a `HookedTransformer`, "bridge" for a `TransformerBridge`; by default
            the first of the two that the installed TransformerLens has.

    Returns:
        The model, in evaluation mode, with its tokenizer.

    Raises:
        ValueError: If `kind` is neither, or the installed TransformerLens lacks it.
    """
    if kind not in (None, *_CLASSES):
        raise ValueError(f"expected kind 'hooked', 'bridge' or None; got {kind!r}: name one")
    for name in (kind,) if kind else tuple(_CLASSES):
        try:
            getattr(import_module(_CLASSES[name][0]), _CLASSES[name][1])
        except ImportError:
            continue
        with redirect_stdout(sys.stderr):
            model = load_host(str(model_folder()), name, device="cpu")
        model.cfg.model_name = "tensorlens_tl demo"
        return model
    raise ValueError(
        f"expected a TransformerLens with {_CLASSES[kind or 'hooked'][1]}; got "
        f"{metadata.version('transformer_lens')}, which has none: ask for the other kind"
    )
