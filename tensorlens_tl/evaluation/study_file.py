"""Studies as JSON texts, each with the name of its format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..checks import spelled

Study = TypeVar("Study")


@spelled
def study_text(data: Mapping[str, Any], study_format: str, **layout: Any) -> str:
    """Write a study's data as JSON, under the name of the format."""
    return json.dumps({"format": study_format} | dict(data), ensure_ascii=False, **layout)


@spelled
def read_study(
    text: str, study_format: str, build: Callable[[dict[str, Any]], Study], writer: str
) -> Study:
    """Read what :func:`study_text` wrote.

    Args:
        text: The JSON text.
        study_format: Name of the format that the text must have.
        build: Function that makes the study from the data.
        writer: Name of the method that writes such texts, for the message.

    Returns:
        The study that ``build`` made.

    Raises:
        ValueError: If the text is not JSON, or is not a study of this format.
    """
    try:
        data = json.loads(text)
        if data.pop("format") == study_format:
            return build(data)
        fault = "it has another format"
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        fault = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"The text is not a study of the format {study_format!r} ({fault}). "
        f"Pass what {writer} wrote."
    )
