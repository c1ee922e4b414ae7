"""Markdown of what becomes of every registered name: exact, refused and why, and what is answered.

A table has a line per served name. Lists have a line per reason, with the names that it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..refusals import family
from .every_name import QUESTIONS, Name

Names = Mapping[str, tuple[Name, ...]]
"""Outcomes of all names, by version of transformer_lens."""


def names_markdown(names: Names) -> str:
    """Write the tables and lists of every registered name.

    Args:
        names: Outcomes by version of transformer_lens, the newest last.

    Returns:
        Markdown in three parts: served names, refused ones, and what served ones do not answer.
    """
    by_version = {version: {one.name: one for one in found} for version, found in names.items()}
    newest = next(reversed(by_version.values()), {})
    served = [
        name
        for name in newest
        if any(found[name].outcome == "exact" for found in by_version.values() if name in found)
    ]
    others = [one for name, one in newest.items() if name not in served]
    return (
        "### Every name that transformer_lens registers\n\n"
        + _counts(by_version)
        + "\n"
        + _table(by_version, served)
        + "\n### What is in the way of the others\n\n"
        + _grouped(others)
        + "\n### What a served name does not answer\n\n"
        + _unanswered(newest[name] for name in served)
    )


def _counts(by_version: Mapping[str, Mapping[str, Name]]) -> str:
    lines = []
    for version, found in by_version.items():
        exact = [one for one in found.values() if one.outcome == "exact"]
        tested = [one.name for one in exact if not one.answers.get("circuits")]
        families = {family(name) for name in tested} - {""}
        built = sum(one.outcome != "not built" for one in found.values())
        lines.append(
            f"- transformer_lens {version} registers {len(found)} names. "
            f"{built} can be built here, and {len(exact)} of these are exact. "
            f"Circuits are served in {len(tested)} of them: {len(families)} families.\n"
        )
    return "".join(lines)


def _table(by_version: Mapping[str, Mapping[str, Name]], served: Iterable[str]) -> str:
    versions = [".".join(version.split(".")[:2]) for version in by_version]
    lines = [["name", *(f"Bridge {v}" for v in versions), *QUESTIONS]]
    lines.append(["---"] * len(lines[0]))
    for name in served:
        rows = [found.get(name) for found in by_version.values()]
        answers = next((r.answers for r in reversed(rows) if r and r.outcome == "exact"), {})
        cells = ["–" if row is None else str(row) for row in rows]
        lines.append([name, *cells, *("no" if answers.get(q) else "yes" for q in QUESTIONS)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _grouped(names: Iterable[Name]) -> str:
    """A line per reason: the names that are not served for it, and the module that is named."""
    found: dict[str, list[str]] = {}
    for one in names:
        why = re.sub(r"^Cannot freeze .*? exactly: |^Cannot freeze \S+ ", "", one.reason)
        why, module = [*re.split(r" (?:in|before) block ", why, maxsplit=1), ""][:2]
        why = re.sub(r"blocks in \S+ that", "blocks that", why.replace(one.name, "this name"))
        why, _, kind = why.partition(" that no test covers: ")
        module = module.partition(": ")[2] or kind
        why = f"{why} that no test covers" if kind else why
        found.setdefault(why, []).append(f"{one.name} ({module})" if module else one.name)
    return "".join(
        f"- {why}: {', '.join(names)}.\n" for why, names in sorted(found.items(), key=_most)
    )


def _unanswered(names: Iterable[Name]) -> str:
    """A line per question and reason, with the names that do not answer it."""
    found: dict[str, list[str]] = {}
    for one in names:
        for question, why in one.answers.items():
            if why:
                why = why.replace(one.name, "the model")
                why = re.sub(r"L\d+(H\d+|MLP|E\w+)?", "a block", why)
                found.setdefault(f"**{question}**: `{why}`", []).append(one.name)
    return "".join(
        f"- {why}: {', '.join(names)}.\n" for why, names in sorted(found.items(), key=_most)
    )


def _most(item: tuple[str, list[str]]) -> int:
    return -len(item[1])
