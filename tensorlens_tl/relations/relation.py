"""Relations between subjects and objects, and the texts that ask for them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor, equal

from ..hosts import adapt


@dataclass(frozen=True)
class Relation:
    """A relation between subjects and objects, and ways to ask for it.

    Attributes:
        name: For people.
        templates: Texts with one ``{}`` each, where the subject goes; what follows is the object.
        samples: Pairs of a subject and its object.

    Raises:
        ValueError: If there is no template or fewer than two subjects, a template has not exactly
            one ``{}``, or a text is empty.
    """

    name: str
    templates: tuple[str, ...]
    samples: tuple[tuple[str, str], ...]

    def __post_init__(self):
        refuse(not self.templates, self.name, "at least one template", "none")
        for template in self.templates:
            wrong = template.count("{}") != 1
            refuse(wrong, self.name, "templates with one {} for the subject each", repr(template))
        for pair in self.samples:
            refuse(not all(pair), self.name, "a subject and an object that are not empty", pair)
        n = len(set(self.subjects))
        refuse(n < 2, self.name, "at least two different subjects", n)
        again = sorted({s for s in self.subjects if self.subjects.count(s) > 1})
        refuse(bool(again), self.name, "every subject once", f"{', '.join(again)} more than once")

    def __repr__(self) -> str:
        return (
            f"Relation({self.name}, {len(self.samples)} subjects, {len(self.templates)} templates)"
        )

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects."""
        return tuple(subject for subject, _ in self.samples)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Relation:
        """Read ``{"name": …, "prompt_templates": ["… {} …"], "samples": [{"subject": …, "object": …}]}``.

        Other keys are passed over. Of samples with the same subject the first is taken. A few-shot
        prompt is a template that begins with its shots.

        Args:
            path: A JSON file.

        Returns:
            The relation.

        Raises:
            ValueError: If the file is not there, is no JSON or has another shape; says where.
        """
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"expected a JSON file with a relation at {path}: {error}") from None
        data = data if isinstance(data, dict) else {}
        texts, rows = data.get("prompt_templates"), data.get("samples")
        refuse(not _all_are(str, texts), path, "prompt_templates to be a list of strings", texts)
        refuse(not _all_are(dict, rows), path, "samples to be a list of objects", rows)
        samples: dict[str, str] = {}
        for i, row in enumerate(rows or ()):
            pair = [row.get("subject"), row.get("object")]
            refuse(not _all_are(str, pair), f"{path}, sample {i}", "a subject and an object", row)
            samples.setdefault(*pair)
        name = data.get("name")
        refuse(not isinstance(name, str), path, "a name", name)
        return cls(str(name), tuple(texts or ()), tuple(samples.items()))


def _all_are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def refuse(wrong: bool, where: Any, expected: str, got: Any) -> None:
    """Say what a relation is, where something is not one.

    Raises:
        ValueError: If it is wrong.
    """
    if wrong:
        shown = str(got) if len(str(got)) < 80 else f"{str(got)[:77]}…"
        raise ValueError(
            f"{where}: expected {expected}, got {shown}; a relation is a name, prompt_templates such as "
            '"The capital of {} is" and samples {"subject": "France", "object": "Paris"}'
        )


def subject_position(model: Any, template: str, subject: str, tokens: Tensor, **kwargs: Any) -> int:
    """Where the subject's last token stands in a filled template.

    Args:
        model: The host; its tokenizer is asked.
        template: With one ``{}``.
        subject: What fills it.
        tokens: The whole text's ids [pos].
        **kwargs: The model's own arguments, as for the capture.

    Returns:
        The position.

    Raises:
        ValueError: If the subject ends within a token.
    """
    start = template.partition("{}")[0] + subject
    ids = adapt(model).prepare(start, kwargs)[1].tokens[0]
    if len(ids) > len(tokens) or not equal(ids, tokens[: len(ids)]):
        raise ValueError(
            f"expected the subject {subject!r} to end with a token in {template!r}, but the tokenizer joins "
            "its end and what follows: let a space or a comma follow the {}"
        )
    return len(ids) - 1
