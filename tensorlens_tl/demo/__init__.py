"""The bundled demo model: a small GPT-2 trained on a grammar of its own, loaded offline.

Key concepts:
    load_model: Gives it as a TransformerLens model.
    prompts: Draws held-out prompts of its tasks, each with a corrupted prompt.
    relation: Gives one of its countries' relations.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from ..checks import at_least_one, spelled
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
    """A held-out prompt of a task, and the same prompt corrupted.

    Attributes:
        clean: Text of the prompt.
        corrupted: The prompt with one word changed, so that ``answer`` is no longer right. For
            "greater_than" it is no better than ``foil``. Both prompts have the same number of
            tokens.
        answer: The word that follows ``clean``; one token. For "greater_than" it is the last two
            digits of a year after the first, such as "45".
        foil: A wrong word of the same kind; one token. For "greater_than" it is the last two
            digits of a year that is not after the first.
        task: Name of the task.
    """

    clean: str
    corrupted: str
    answer: str
    foil: str
    task: str


@spelled
def model_folder() -> Path:
    """Return the folder of the model, in the Hugging Face layout."""
    return Path(__file__).parent / "model"


@spelled
def prompts(task: str, n: int, seed: int = 0) -> list[PromptPair]:
    """Draw prompts of combinations that the training never held.

    Args:
        task: One of :data:`TASKS`: "ioi", "induction", "facts", "agreement", "greater_than".
        n: Number of prompts, at least 1.
        seed: Seed of the draw. The same seed gives the same prompts.

    Returns:
        The prompts, each with its corrupted version.

    Example:
        >>> from tensorlens_tl import demo
        >>> pair = demo.prompts("facts", 1)[0]
        >>> pair.answer != pair.foil
        True
    """
    return [_pair(drawn) for drawn in unseen(task, n, seed)]


@spelled
def relation(name: str) -> Any:
    """Return one of the countries' relations, for ``tensorlens_tl.relations``.

    Args:
        name: Name of the relation: "capital", "language", "currency" or "continent".

    Returns:
        The ``Relation``, with eight phrasings and sixty countries.

    Raises:
        ValueError: If there is no such relation.
    """
    from ..relations import Relation

    if name not in RELATIONS:
        raise ValueError(f"There is no relation {name!r}. Choose one of {', '.join(RELATIONS)}.")
    samples = tuple((country, row[name]) for country, row in COUNTRIES.items())
    return Relation(name, PHRASINGS[name], samples)


def unseen(task: str, n: int, seed: int, length: int | None = None) -> list[Document]:
    """Draw the documents behind :func:`prompts`.

    Args:
        task: One of :data:`TASKS`.
        n: Number of documents, at least 1.
        seed: Seed of the draw. The same seed gives the same documents.
        length: Number of words in the repeated segment, for "induction". None draws 4 to 25.

    Returns:
        Documents whose leading combinations are held out.

    Raises:
        ValueError: If there is no such task, or ``n`` is below 1.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}. Choose one of {', '.join(TASKS)}.")
    at_least_one(n, "n")
    rng = random.Random(f"{task} {seed}")
    if task == "induction":
        return [induction(rng, length or rng.randrange(4, 26)) for _ in range(n)]
    return [document(task, rng, unseen=True) for _ in range(n)]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers: the model is loaded in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pair(drawn: Document) -> PromptPair:
    end = len(drawn.corrupted)
    return PromptPair(
        text(drawn.words[:end]), text(drawn.corrupted), drawn.words[end], drawn.foil, drawn.task
    )


@spelled
def load_model(kind: str | None = None, device: Any = "cpu") -> Any:
    """Load the demo model, with weights as they were trained (nothing folded or centred).

    Args:
        kind: Host class: "hooked" for a ``HookedTransformer``, "bridge" for a
            ``TransformerBridge``. None is the first of the two that is installed.
        device: Device of the model, such as "cuda".

    Returns:
        The model, in evaluation mode, with its tokenizer.

    Example:
        >>> from tensorlens_tl import demo
        >>> model = demo.load_model()
        >>> model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
        (4, 4, 128)

    Raises:
        ValueError: If ``kind`` is neither, or the installed TransformerLens lacks it.
        ImportError: If another package that TransformerLens needs is broken.
    """
    if kind not in (None, *_CLASSES):
        raise ValueError(f"kind={kind!r} does not exist. Choose 'hooked', 'bridge' or None.")
    for name in (kind,) if kind else tuple(_CLASSES):
        try:
            getattr(import_module(_CLASSES[name][0]), _CLASSES[name][1])
        except ImportError as error:
            if not (error.name or "").startswith("transformer_lens"):
                raise  # a broken dependency, not a class that this host lacks
            continue
        with _without_bars(), redirect_stdout(sys.stderr):
            model = load_host(str(model_folder()), name, device=device)
        model.cfg.model_name = "tensorlens_tl demo"
        return model
    raise ValueError(
        f"TransformerLens {metadata.version('transformer_lens')} has no "
        f"{_CLASSES[kind or 'hooked'][1]}. Use the other kind of model."
    )
