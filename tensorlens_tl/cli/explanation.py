"""One prompt explained: its tables, and the report that is printed of them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from ..checks import token_text
from .output import wants_page
from .prompt_input import Prompt

WIDTH = 28


def explained(model: Any, prompt: Prompt, args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Capture one run, and split its prediction by every ``--by``.

    Args:
        model: The host model.
        prompt: Text, or token ids.
        args: Parsed arguments of ``explain``.

    Returns:
        What the command prints, as plain data; and the pictures of the run, or None where no page
        is wanted.
    """
    from ..plugin import capture

    unknown = unknown_words(model.tokenizer, prompt) if isinstance(prompt, str) else []
    if unknown:
        print(f"warning: the tokenizer does not know {', '.join(unknown)}", file=sys.stderr)
    half = next(model.parameters()).dtype.itemsize == 2
    logits, lens = capture(model, prompt, noise_floor=half)
    lens.capture.frame.index(args.pos)  # refused by name where there is no such position
    last = logits[0, args.pos].float()
    best = last.topk(min(5, len(last)))
    predictions = [
        {"token": token_text(model.tokenizer, int(i)), "logit": float(v), "prob": float(p)}
        for i, v, p in zip(best.indices, best.values, last.softmax(-1)[best.indices], strict=True)
    ]
    goal = token(args.target), token(args.versus)
    tables = {
        by: lens.attribute(*goal, args.pos, by=by, effect=args.effect, qk=args.qk and by == "edge")
        for by in args.by
    }
    first = next(iter(tables.values()))
    errors = [e for t in tables.values() if (e := t.completeness_error) is not None]
    report = {
        "model": lens.capture.model_name,
        "host": type(model).__name__,
        "lens": repr(lens),
        "prompt": prompt,
        "tokens": list(lens.tokens[0]),
        "unknown_words": unknown,
        "predictions": predictions,
        "target": first.target[0],
        "target_value": float(first.target_value[0]),
        "effect": args.effect,
        "sums": {
            by: float(table.values.double().sum())
            for by, table in tables.items()
            if table.sums_to_target
        },
        "rows": {by: _rows(table) for by, table in tables.items()},
        "attribution_error": max(errors, default=None),
        "capture_check": lens.capture_check,
        "completeness_error": lens.completeness_error,
        "noise_floor": lens.noise_floor,
        "exactness": lens.exactness,
    }
    if not wants_page(args):
        return report, None
    kind = "total effect" if args.effect == "total" else "direct"
    asked = {f"By {by}, {kind}" if by != "edge" else "By edge": t for by, t in tables.items()}
    pictures = lens.report(None, *goal, args.pos)
    kept = {name: one for name, one in pictures.results.items() if name != "By token"}
    return report, replace(pictures, results=asked | kept)


def token(text: str | None) -> str | int | None:
    """Read a token as typed: '#' and digits are an id."""
    numbered = text is not None and text.startswith("#") and text[1:].isdecimal()
    return int(text[1:]) if text is not None and numbered else text


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """List the words of a text for which the tokenizer has no token."""
    unk = getattr(tokenizer, "unk_token_id", None)
    if unk is None:
        return []
    words = dict.fromkeys(text.split())
    return [w for w in words if unk in tokenizer.encode(w, add_special_tokens=False)]


def _rows(table: Any) -> list[dict[str, Any]]:
    values = zip(table.sources, table.labels[0], table.values[0].tolist(), strict=True)
    return [
        {
            "label": label,
            "kind": getattr(source.node, "kind", "edge"),
            "pos": source.pos,
            "value": value,
        }
        for source, label, value in values
    ]


# --- Text ----------------------------------------------------------------------------------------


def render(report: dict[str, Any], top: int) -> str:
    """Turn a report into text.

    Args:
        report: What :func:`explained` gave.
        top: Number of rows to show of a table; the rest is one row.

    Returns:
        The text, with a bar for each row.
    """
    prompt = report["prompt"]
    shown = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
    lines = [f"{report['lens']}, {report['host']}", "", shown, "", "Predictions"]
    for p in report["predictions"]:
        lines.append(f"  {p['token']!r:<16} logit {p['logit']:8.3f}   {p['prob']:6.1%}")
    target, value = report["target"], report["target_value"]
    lines += ["", f"Where the logit {target} = {value:.3f} comes from"]
    for by, rows in report["rows"].items():
        table = _token_table(report) if by == "token" else _table(by, rows, report["effect"], top)
        lines += ["", *table]
    for by, total in report["sums"].items():
        lines += ["", f"Sum by {by}: {total:.4f}, the model's own: {value:.4f}"]
    exact = f"capture check {report['capture_check']:.0e}, {report['exactness']}"
    if (error := report["attribution_error"]) is not None:
        exact += f", attribution error {error:.0e}"
    return "\n".join([*lines, "", exact])


def _token_table(report: dict[str, Any]) -> list[str]:
    rows = report["rows"]["token"]
    at: dict[int, list[float]] = {i: [0.0, 0.0] for i in range(len(report["tokens"]))}
    constants = [row for row in rows if row["kind"] == "constant" and row["pos"] is None]
    for row in rows:
        if row["pos"] is not None:
            at[row["pos"]][row["kind"] == "pos_embed"] += row["value"]
    positions = any(row["kind"] == "pos_embed" for row in rows)
    entries = [
        (f"{i:3d} {token!r}", sum(at[i]), f"  position {at[i][1]:+.3f}" if positions else "")
        for i, token in enumerate(report["tokens"])
    ]
    if constants:
        total = sum(row["value"] for row in constants)
        entries.append((f"    {len(constants)} biases", total, ""))
    head = "By token (its embedding and its position's)" if positions else "By token"
    return [head, *_bars(entries)]


def _table(by: str, rows: list[dict[str, Any]], effect: str, top: int) -> list[str]:
    order = sorted(rows, key=lambda row: -abs(row["value"]))
    entries = [(row["label"], row["value"], "") for row in order[:top]]
    rest, more = order[top:], []
    if rest and effect == "direct" and by != "edge":
        entries.append((f"{len(rest)} more", sum(row["value"] for row in rest), ""))
    elif rest:  # rows that overlap have no sum
        more = [f"  … {len(rest)} more"]
    return [f"By {by} ({effect} effect)", *_bars(entries), *more]


def _bars(entries: list[tuple[str, float, str]]) -> list[str]:
    largest = max((abs(value) for _, value, _ in entries), default=0.0) or 1.0
    width = max((len(label) for label, _, _ in entries), default=0)
    lines = []
    for label, value, note in entries:
        bar = ("█" if value >= 0 else "░") * round(WIDTH * abs(value) / largest)
        lines.append(f"  {label:<{width}} {value:+9.3f}  {bar:<{WIDTH}}{note}".rstrip())
    return lines
