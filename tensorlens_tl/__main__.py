"""The command line: explain a prediction, or test which method names the tokens it needs.

``tensorlens-tl [--model NAME_OR_FOLDER] [--target T] [--versus T] [--by token|component] [PROMPT]``
``tensorlens-tl evaluate [--model NAME_OR_FOLDER] [--protocol P …] [--methods M …] [--file F]``

Without ``--model`` the bundled demo model runs. Without a prompt it runs on one that it knows.

1. Parse the arguments; ``--help`` needs neither torch nor a host.
2. Read the prompt, and load the model.
3. Capture one run and make the tables, or evaluate methods on many prompts.
4. Print text or JSON on standard output, and everything else on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

WIDTH = 28
DTYPES = ("float64", "float32", "bfloat16", "float16")
EVALUATE = "evaluate"
DEMO_METHODS = ("norm", "in_out", "rollout", "last_layer_attention", "random")
DEMO_PROMPT = "When Mary and John went to the store, John gave a drink to"


def parser() -> argparse.ArgumentParser:
    """Make the argument parser of the main command."""
    p = argparse.ArgumentParser(
        prog="tensorlens-tl",
        description="Explain a transformer's next-token prediction with the TensorLens operator: "
        "what every token and every component adds to the logit, exactly.",
        epilog="tensorlens-tl evaluate --help: "
        "which of many methods names the tokens a model needs.",
    )
    p.add_argument("prompt", nargs="?", help="the text; '-' or nothing reads standard input")
    p.add_argument(
        "--model", help="hub name, or local Hugging Face folder (default: the bundled demo model)"
    )
    p.add_argument(
        "--kind", choices=("bridge", "hooked"), help="host class (default: what is there)"
    )
    p.add_argument(
        "--dtype", choices=DTYPES, help="run the model in this dtype (default: as it is loaded)"
    )
    p.add_argument("--file", type=Path, help="read the prompt from a file")
    p.add_argument("--target", help="token to explain, or '#' and its id (default: the prediction)")
    p.add_argument("--versus", help="explain the target's advantage over this token, or '#' and id")
    p.add_argument("--by", choices=("token", "component"), help="only this table (default: both)")
    p.add_argument("--top", type=int, default=12, help="components to show (default: 12)")
    p.add_argument("--json", action="store_true", help="print JSON, all rows")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name. None takes those of the process.

    Returns:
        0, or 2 after a user error, which is reported on standard error.
    """
    argv = sys.argv[1:] if argv is None else argv
    evaluating = argv[:1] == [EVALUATE]
    args = evaluate_parser().parse_args(argv[1:]) if evaluating else parser().parse_args(argv)
    try:
        with redirect_stdout(sys.stderr):  # hosts print while they load
            report = evaluation(args) if evaluating else explain(args)
    except (ValueError, OSError) as error:
        print(f"tensorlens-tl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        if isinstance(report, str):
            print(report)
        else:
            print(json.dumps(report, ensure_ascii=False) if args.json else render(report, args.top))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has what it wanted
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return 0


def explain(args: argparse.Namespace) -> dict[str, Any]:
    """Load, capture and attribute: give everything that the command prints, as plain data."""
    if args.top < 1:
        raise ValueError(f"--top {args.top} is below 1. Ask for at least one component.")
    prompt = read_prompt(args)
    model = _load(args)
    from .plugin import capture

    unknown = unknown_words(model.tokenizer, prompt)
    if unknown:
        print(f"warning: the tokenizer does not know {', '.join(unknown)}", file=sys.stderr)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # our own model: no graph, half the memory
    half = next(model.parameters()).dtype.itemsize == 2
    logits, lens = capture(model, prompt, noise_floor=half)
    last = logits[0, -1].float()
    best = last.topk(5)
    predictions = [
        {"token": model.tokenizer.decode([int(i)]), "logit": float(v), "prob": float(p)}
        for i, v, p in zip(best.indices, best.values, last.softmax(-1)[best.indices], strict=True)
    ]
    tables = {
        by: lens.attribute(_token(args.target), _token(args.versus), by=by)
        for by in ([args.by] if args.by else ["token", "component"])
    }
    first = next(iter(tables.values()))
    return {
        "model": lens.capture.model_name,
        "host": type(model).__name__,
        "lens": repr(lens),
        "prompt": prompt,
        "tokens": list(lens.tokens[0]),
        "unknown_words": unknown,
        "predictions": predictions,
        "target": first.target[0],
        "target_value": float(first.target_value[0]),
        "sums": {by: float(table.values.double().sum()) for by, table in tables.items()},
        "rows": {by: _rows(table) for by, table in tables.items()},
        "attribution_error": max(table.completeness_error or 0.0 for table in tables.values()),
        "capture_check": lens.capture_check,
        "completeness_error": lens.completeness_error,
        "noise_floor": lens.noise_floor,
        "exactness": lens.exactness,
    }


def evaluate_parser() -> argparse.ArgumentParser:
    """Make the argument parser of ``evaluate``."""
    p = argparse.ArgumentParser(
        prog=f"tensorlens-tl {EVALUATE}",
        description="Mask the tokens that each method names, run the real model, and see what is "
        "left of its prediction.",
    )
    p.add_argument(
        "prompts",
        nargs="*",
        help="prompts, each in quotes (default: --file, standard input, or --task)",
    )
    p.add_argument("--model", help="hub name, or local folder (default: the bundled demo model)")
    p.add_argument("--kind", choices=("bridge", "hooked"), help="host class")
    p.add_argument("--dtype", choices=DTYPES, help="run the model in this dtype")
    p.add_argument(
        "--protocol",
        nargs="+",
        default=["perturbation"],
        metavar="P",
        help="perturbation (the default), morf_lerf, insertion_deletion, eraser, naopc, "
        "leave_one_out; several give a table of all",
    )
    p.add_argument(
        "--methods",
        nargs="+",
        default=list(DEMO_METHODS),
        metavar="M",
        help=f"methods to test (default: {' '.join(DEMO_METHODS)}); an unknown name lists them all",
    )
    p.add_argument(
        "--masking",
        nargs="+",
        default=["delete"],
        metavar="HOW",
        help="delete (the default), token, mean",
    )
    p.add_argument("--preset", help="fractions: tensorlens, chefer, eraser or full")
    p.add_argument(
        "--metric", default="probability", help="or log_odds, logit, logit_diff, agreement"
    )
    p.add_argument("--target", help="token, or '#' and its id (default: each prompt's prediction)")
    p.add_argument(
        "--versus", help="explain the target's advantage over: runner_up, all_others, a token"
    )
    p.add_argument("--file", type=Path, help="prompts, one a line (default: standard input)")
    p.add_argument("--task", default="ioi", help="the demo model's own prompts (default: ioi)")
    p.add_argument("--n", type=int, default=20, help="number of these prompts (default: 20)")
    p.add_argument("--keep-last", action="store_true", help="never mask the last token")
    p.add_argument(
        "--batch-size", type=int, default=64, help="number of masked prompts run at once"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of prompts, ties and intervals")
    p.add_argument("--json", action="store_true", help="print JSON, every prompt's numbers")
    return p


def evaluation(args: argparse.Namespace) -> str:
    """Run ``evaluate`` and give the table, or the JSON, as text."""
    prompts = read_prompts(args)
    model = _load(args)
    from .evaluation import evaluate

    found = evaluate(
        model,
        prompts,
        args.methods,
        args.protocol,
        args.masking,
        preset=args.preset,
        metric=args.metric,
        target=_token(args.target),
        versus=_token(args.versus),
        seed=args.seed,
        keep_last=args.keep_last,
        batch_size=args.batch_size,
        progress=True,
    )
    return found.to_json() if args.json else repr(found)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Read the prompts: arguments, a file, standard input, or the demo model's own.

    Args:
        args: Parsed arguments of ``evaluate``.

    Returns:
        The arguments, or one prompt for each line that is not blank.

    Raises:
        ValueError: If there are no prompts, or both prompts and a file.
    """
    if args.prompts and args.file is not None:
        raise ValueError("Prompts and --file were both given. Drop one of them.")
    if args.prompts:
        return args.prompts
    text = _standard_input() if args.file is None else _file_text(args.file)
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts and args.file is None and args.model is None:
        from .demo import prompts as drawn

        prompts = [pair.clean for pair in drawn(args.task, args.n, args.seed)]
    if not prompts:
        raise ValueError(
            "There are no prompts. Pass them as arguments, or one per line in --file or on "
            "standard input."
        )
    return prompts


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--file {path} cannot be read ({error}). Pass a text in UTF-8.") from None


def _standard_input() -> str:
    """Standard input where it is piped, and nothing where a person would have to type."""
    return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()


def _token(text: str | None) -> str | int | None:
    numbered = text is not None and text.startswith("#") and text[1:].isdigit()
    return int(text[1:]) if text is not None and numbered else text


def _load(args: argparse.Namespace) -> Any:
    if args.model is None:
        from .demo import load_model as load_demo

        model = load_demo(args.kind)
    else:
        from .hosts import load_model

        model = load_model(args.model, args.kind)
    if args.dtype is not None:
        import torch

        model = model.to(getattr(torch, args.dtype))
    return model


def read_prompt(args: argparse.Namespace) -> str:
    """Read the prompt: an argument, a file, or standard input.

    Args:
        args: Parsed arguments of the main command.

    Returns:
        The text, without the last line break.

    Raises:
        ValueError: If there is no prompt, or both a prompt and a file.
    """
    if args.file is not None and args.prompt is not None:
        raise ValueError("A prompt and --file were both given. Drop one of them.")
    if args.file is not None:
        text = _file_text(args.file)
    elif args.prompt in (None, "-"):
        text = _standard_input()
    else:
        text = args.prompt
    text = text.rstrip("\n")
    if args.model is None and args.prompt is None and args.file is None and not text.strip():
        return DEMO_PROMPT
    if not text.strip():
        raise ValueError("The prompt is empty. Pass a text, --file, or standard input.")
    return text


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
        {"label": label, "kind": source.node.kind, "pos": source.pos, "value": value}
        for source, label, value in values
    ]


# --- Text ----------------------------------------------------------------------------------------


def render(report: dict[str, Any], top: int) -> str:
    """Turn a report into text."""
    lines = [f"{report['lens']}, {report['host']}", "", report["prompt"], "", "Predictions"]
    for p in report["predictions"]:
        lines.append(f"  {p['token']!r:<16} logit {p['logit']:8.3f}   {p['prob']:6.1%}")
    target, value = report["target"], report["target_value"]
    lines += ["", f"Where the logit {target} = {value:.3f} comes from"]
    if "token" in report["rows"]:
        lines += ["", *_token_table(report)]
    if "component" in report["rows"]:
        lines += ["", *_component_table(report["rows"]["component"], top)]
    for by, total in report["sums"].items():
        lines += ["", f"Sum by {by}: {total:.4f}, the model's own: {value:.4f}"]
    lines += [
        "",
        f"capture check {report['capture_check']:.0e}, {report['exactness']}, attribution error "
        f"{report['attribution_error']:.0e}",
    ]
    return "\n".join(lines)


def _token_table(report: dict[str, Any]) -> list[str]:
    rows = report["rows"]["token"]
    at: dict[int, list[float]] = {i: [0.0, 0.0] for i in range(len(report["tokens"]))}
    constants = [row for row in rows if row["kind"] == "constant"]
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


def _component_table(rows: list[dict[str, Any]], top: int) -> list[str]:
    order = sorted(rows, key=lambda row: -abs(row["value"]))
    entries = [(row["label"], row["value"], "") for row in order[:top]]
    if rest := order[top:]:
        entries.append((f"{len(rest)} more", sum(row["value"] for row in rest), ""))
    return ["By component (direct effect)", *_bars(entries)]


def _bars(entries: list[tuple[str, float, str]]) -> list[str]:
    largest = max(abs(value) for _, value, _ in entries) or 1.0
    width = max(len(label) for label, _, _ in entries)
    lines = []
    for label, value, note in entries:
        bar = ("█" if value >= 0 else "░") * round(WIDTH * abs(value) / largest)
        lines.append(f"  {label:<{width}} {value:+9.3f}  {bar:<{WIDTH}}{note}".rstrip())
    return lines


if __name__ == "__main__":
    sys.exit(main())
