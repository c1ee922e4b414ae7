"""Relations between subjects and objects, and the texts that ask for them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor, equal

from ..checks import file_path, spelled
from ..hosts import adapt


@spelled
@dataclass(frozen=True)
class Relation:
    """A relation between subjects and objects, and texts that ask for the object.

    Attributes:
        name: Name for people, such as "capital".
        templates: Texts with one ``{}`` each, where the subject goes. The object follows the text.
        samples: Pairs of a subject and the subject's object.

    Raises:
        ValueError: If there is no template or fewer than two subjects, a template has not exactly
            one ``{}``, or a text is empty.
    """

    name: str
    templates: tuple[str, ...]
    samples: tuple[tuple[str, str], ...]

    def __post_init__(self):
        # The first fault that is found is told.
        refuse(not self.templates, self.name, "at least one template", "none")
        for template in self.templates:
            wrong = template.count("{}") != 1
            refuse(wrong, self.name, "one {} for the subject in each template", repr(template))
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
        """Read a relation from a JSON file.

        The file holds ``{"name": "capital", "prompt_templates": ["The capital of {} is"],
        "samples": [{"subject": "France", "object": "Paris"}]}``. Other keys are ignored. Of samples
        with the same subject the first is taken. A few-shot prompt is a template that begins with
        the examples.

        Args:
            path: Path of the file.

        Returns:
            The relation in the file.

        Raises:
            ValueError: If the file does not exist, is not JSON or has another shape.
        """
        try:
            with open(file_path(path), encoding="utf-8") as file:
                data = json.load(file)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"There is no JSON file with a relation at {path} ({error}). "
                "Pass the path of a file with a name, prompt_templates and samples."
            ) from None
        data = data if isinstance(data, dict) else {}
        texts, rows = data.get("prompt_templates"), data.get("samples")
        refuse(not _all_are(str, texts), path, "prompt_templates as a list of strings", texts)
        refuse(not _all_are(dict, rows), path, "samples as a list of objects", rows)
        samples: dict[str, str] = {}
        for i, row in enumerate(rows or ()):
            pair = [row.get("subject"), row.get("object")]
            refuse(not _all_are(str, pair), f"Sample {i} of {path}", "a subject and an object", row)
            samples.setdefault(*pair)
        name = data.get("name")
        refuse(not isinstance(name, str), path, "a string as name", name)
        return cls(str(name), tuple(texts or ()), tuple(samples.items()))


def _all_are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def refuse(wrong: bool, where: Any, needed: str, found: Any) -> None:
    """Refuse what is not a relation, and tell what one is.

    Args:
        wrong: Whether the relation is wrong in this respect.
        where: Name or path of the relation.
        needed: Words that say what a relation must have.
        found: What this one has instead.

    Raises:
        ValueError: If ``wrong`` is true.
    """
    if wrong:
        shown = str(found) if len(str(found)) < 80 else f"{str(found)[:77]}…"
        raise ValueError(
            f"{where} must have {needed}, but has {shown}. Give a name, prompt_templates "
            'such as "The capital of {} is", and samples such as '
            '{"subject": "France", "object": "Paris"}.'
        )


def subject_position(model: Any, template: str, subject: str, tokens: Tensor, **kwargs: Any) -> int:
    """Find where the subject's last token stands in a filled template.

    Args:
        model: The host model, whose tokenizer is used.
        template: Text with one ``{}``.
        subject: Text that fills the template.
        tokens: Token ids of the filled template [pos].
        **kwargs: Arguments of the model, as for the capture.

    Returns:
        The position of the subject's last token.

    Raises:
        ValueError: If the subject ends within a token.
    """
    start = template.partition("{}")[0] + subject
    ids = adapt(model).prepare(start, kwargs)[1].ids("decode")[0]
    if len(ids) > len(tokens) or not equal(ids, tokens[: len(ids)]):
        raise ValueError(
            f"The subject {subject!r} does not end with a token in {template!r}, because the "
            "tokenizer joins its end to what follows. Put a space or a comma after the {}."
        )
    return len(ids) - 1
