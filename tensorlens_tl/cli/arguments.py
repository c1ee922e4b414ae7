"""The commands and their options, parsed and checked without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..checks import nearest
from . import choices
from .fitting import check_files, check_together
from .option_types import Names, Parser, Version, lead, number, one_of, score

COMMANDS = {
    "explain": "where the next token's logit comes from (the default command)",
    "evaluate": "which of many methods names the tokens that the model needs",
    "discover": "the edges between heads and MLPs that make a prediction",
    "circuit": "print such edges from a file, or test them in the model",
    "edit": "the smallest edit of a run that makes another token win, and whether it does",
}
DEFAULT_BY = ("token", "component")
DEMO_METHODS = ("norm", "in_out", "rollout", "last_layer_attention", "random")
OVERVIEW = "\n".join(
    [
        "Explain what a transformer predicts, exactly, from one run.",
        "",
        "commands:",
        *(f"  {name:<10}{what}" for name, what in COMMANDS.items()),
        "",
        "examples:",
        "  tensorlens-tl 'The capital of France is'",
        "  tensorlens-tl --model gpt2 --by head --html report.html 'The capital of France is'",
        "  tensorlens-tl evaluate --methods in_out,rollout --file prompts.txt",
        "",
        "Each command has its own --help. A prompt that is a command's name follows the command:",
        "tensorlens-tl explain discover.",
    ]
)


# --- The commands --------------------------------------------------------------------------------


def parser(command: str) -> argparse.ArgumentParser:
    """Make the argument parser of a command.

    Args:
        command: One of :data:`COMMANDS`.

    Returns:
        The parser, with the options of this command.
    """
    name = "tensorlens-tl" if command == "explain" else f"tensorlens-tl {command}"
    first = {"explain": "[COMMAND] ", "circuit": "FILE "}.get(command, "")
    about = OVERVIEW if command == "explain" else f"Find {COMMANDS[command]}."
    if command == "circuit":
        about = "Print a circuit from a file of discover's, or test it in the model."
    if command == "evaluate":
        about = (
            "Mask the tokens that each method names, run the real model, and see what is left of\n"
            "its prediction."
        )
    p = Parser(
        prog=name,
        usage=f"{name} {first}[PROMPT ...] [options]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an error would name an option that was not typed
    )
    p.add_argument("--version", action=Version, nargs=0, help="print the versions in use")
    options = {"explain": _explain, "evaluate": _evaluate, "discover": _discover}
    (options | {"circuit": _circuit, "edit": _edit})[command](p)
    return p


def _common(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="a prompt in quotes, taken as typed; several give several results; '-' or none reads "
        "standard input, one prompt per line",
    )
    p.add_argument(
        "--file",
        type=Path,
        help="read prompts from a file in UTF-8, one per line; blank lines and line ends are no "
        "part of a prompt",
    )
    p.add_argument("--ids", action="store_true", help="prompts are token ids, such as '5 17 42'")
    p.add_argument(
        "--model",
        help="hub name, Hugging Face folder, GGUF file, or smollm2 (default: the bundled model)",
    )
    p.add_argument(
        "--kind",
        type=one_of(choices.KINDS),
        help="host class: bridge or hooked (default: what is installed)",
    )
    p.add_argument(
        "--dtype",
        type=one_of(choices.DTYPES),
        help=f"{', '.join(choices.DTYPES)} (default: as the model is loaded)",
    )
    p.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="whether a text gets the model's first token, BOS (default: as TransformerLens does)",
    )
    p.add_argument("--target", help="token, or '#' and its id (default: the model's prediction)")
    p.add_argument("--versus", help="explain the target's advantage over this token, or '#' and id")
    forms = p.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print JSON, with all numbers")
    forms.add_argument(
        "--html",
        action="store_true",
        help="make one HTML page; --html FILE.html writes it to that file",
    )
    p.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write to a file, not to standard output; a name in .json or .html chooses the form",
    )


def _position(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--pos",
        type=number(None),
        default=-1,
        help="position whose next token is predicted; -1 is the last (default: -1)",
    )


def _drawn(p: argparse.ArgumentParser) -> None:
    task = choices.TASKS
    p.add_argument(
        "--task",
        type=one_of(task),
        default="ioi",
        help=f"without prompts, those of the demo model: {', '.join(task)} (default: ioi)",
    )
    p.add_argument("--n", type=number(1), default=20, help="number of these prompts (default: 20)")


def _resumed(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--resume",
        type=Path,
        help="folder that keeps finished work, to go on from; processes of torchrun share the work",
    )


def _seeded(p: argparse.ArgumentParser, batch_size: int, of: str) -> None:
    p.add_argument(
        "--batch-size",
        type=number(1),
        default=batch_size,
        help=f"prompts at once (default: {batch_size})",
    )
    p.add_argument("--seed", type=number(0), default=0, help=f"seed of {of} (default: 0)")


def _explain(p: argparse.ArgumentParser) -> None:
    _common(p)
    _position(p)
    p.add_argument(
        "--by",
        action=Names,
        known=tuple(dict.fromkeys((*choices.BY, *choices.TOTALS))),
        default=DEFAULT_BY,
        help=f"one or more, comma-separated: {', '.join(choices.BY)} (default: token,component)",
    )
    p.add_argument(
        "--effect",
        type=one_of(("direct", "total")),
        default="direct",
        help="direct, or total along all paths (default: direct)",
    )
    p.add_argument("--qk", action="store_true", help="with --by edge: queries and keys read, too")
    p.add_argument("--top", type=number(1), default=12, help="rows to show (default: 12)")


def _evaluate(p: argparse.ArgumentParser) -> None:
    _common(p)

    def several(name: str, known: Sequence[str], default: tuple[str, ...]) -> None:
        p.add_argument(
            f"--{name}",
            action=Names,
            known=known,
            nargs="+",
            default=default,
            metavar="NAMES",
            help=f"comma-separated: {', '.join(known)} (default: {','.join(default)})",
        )

    several("methods", choices.METHODS, DEMO_METHODS)
    several("protocol", choices.PROTOCOLS, ("perturbation",))
    several("masking", choices.MASKINGS, ("delete",))
    p.add_argument(
        "--preset",
        type=one_of(choices.PRESETS),
        help=f"fractions of masked tokens: {', '.join(choices.PRESETS)}",
    )
    p.add_argument(
        "--metric",
        type=one_of(choices.METRICS),
        default="probability",
        help=f"{', '.join(choices.METRICS)} (default: probability)",
    )
    p.add_argument("--keep-last", action="store_true", help="never mask the last token")
    _resumed(p)
    _drawn(p)
    _seeded(p, 64, "prompts, ties and intervals")


def _discover(p: argparse.ArgumentParser) -> None:
    _common(p)
    _position(p)
    _corrupted(p)
    size = p.add_mutually_exclusive_group()
    size.add_argument("--n-edges", type=number(1), help="number of edges (default: 40)")
    size.add_argument("--threshold", type=score, help="keep edges that rank at or above this")
    p.add_argument(
        "--selection",
        type=one_of(choices.SELECTIONS),
        default="greedy",
        help=f"{', '.join(choices.SELECTIONS)} (default: greedy)",
    )
    p.add_argument(
        "--at",
        type=one_of(choices.AT),
        help="whose operator reads the difference: clean, corrupted, secant",
    )
    p.add_argument("--top", type=number(1), default=12, help="edges to show (default: 12)")
    p.add_argument(
        "--data",
        type=Path,
        help="CSV file with a column prompt, and, if wanted, corrupted, target and versus",
    )
    _resumed(p)
    _drawn(p)
    _seeded(p, 8, "prompts")


def _circuit(p: argparse.ArgumentParser) -> None:
    p.add_argument("circuit", type=Path, metavar="FILE", help="JSON of discover's, or of EAP-IG's")
    _common(p)
    _position(p)
    p.add_argument(
        "--test", action="store_true", help="run the model with every other edge ablated"
    )
    _corrupted(p)
    p.add_argument(
        "--ablation",
        type=one_of(choices.ABLATIONS),
        default="resample",
        help="what replaces the other edges: resample, mean, zero (default: resample)",
    )
    p.add_argument(
        "--attention",
        type=one_of(choices.ATTENTION),
        default="live",
        help="live or frozen patterns (default: live)",
    )
    p.add_argument("--top", type=number(1), default=12, help="edges to show (default: 12)")
    _drawn(p)
    _seeded(p, 8, "prompts and intervals")


def _edit(p: argparse.ArgumentParser) -> None:
    _common(p)
    _position(p)
    p.add_argument("--to", required=True, help="token that is to win, or '#' and its id")
    p.add_argument(
        "--site",
        default=None,
        help="block whose output is edited, or a residual site (default: the middle block)",
    )
    p.add_argument("--margin", type=lead, default=1.0, help="lead in logits (default: 1)")
    p.add_argument(
        "--refine",
        type=number(0),
        default=2,
        metavar="ROUNDS",
        help="corrections by runs of the edited model (default: 2)",
    )


def _corrupted(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--corrupted",
        type=Path,
        metavar="FILE",
        help="corrupted prompts, one per line: of as many tokens, one for each prompt",
    )


# --- From what was typed to arguments ------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check all that can be checked before torch is imported.

    Args:
        argv: What was typed after the program's name.

    Returns:
        The arguments, with the command's name as ``command``.

    Raises:
        ValueError: If a command, an option or a value does not exist.
    """
    named = bool(argv) and argv[0] in COMMANDS
    command = argv[0] if named else "explain"
    rest = _with_page_file(list(argv[1:] if named else argv))
    cut = rest.index("--") if "--" in rest else len(rest)
    p = parser(command)
    if not named and argv:
        _check_command(argv[0], alone=not any(" " in word for word in argv[1:]))
    args, unknown = p.parse_known_intermixed_args(rest[:cut])
    if unknown:
        raise ValueError(f"There is no option {unknown[0]}. {_nearest(unknown[0], p, command)}")
    if not named and args.prompts:
        _check_command(args.prompts[0])
    args.written_by = "--output" if any(w.startswith("--output") for w in argv) else "--html"
    args.prompts = [*args.prompts, *getattr(args, "caught", ()), *rest[cut + 1 :]]
    args.command = command
    check_files(args)
    check_together(args, DEFAULT_BY)
    return args


def _with_page_file(words: list[str]) -> list[str]:
    """Write --html FILE.html as --html --output FILE.html; any other word there is a prompt."""
    for i, word in enumerate(words[:-1]):
        if word == "--":
            break
        if word == "--html" and words[i + 1].lower().endswith((".html", ".htm")):
            return [*words[: i + 1], "--output", *words[i + 1 :]]
    return words


def _nearest(option: str, p: argparse.ArgumentParser, command: str) -> str:
    name = option.partition("=")[0]
    if others := [c for c in COMMANDS if name in parser(c)._option_string_actions]:
        return f"It is an option of {' and '.join(others)}, not of {command}."
    if close := nearest(name, p._option_string_actions):
        return f"Did you mean {close}?"
    return "See tensorlens-tl --help; a prompt that begins so goes behind --."


def _check_command(word: str, alone: bool = False) -> None:
    """Refuse a word that is nearly a command, or a command behind an option.

    Args:
        word: The first word, or the first prompt.
        alone: Whether nothing else looks like a prompt; then less likeness is enough.

    Raises:
        ValueError: If a command was probably meant.
    """
    if not word.isalpha():
        return
    known = (*COMMANDS, "help", "version")
    meant = [name for name in known if alone and len(word) > 2 and name.startswith(word.lower())]
    close = meant[0] if meant else nearest(word, known, 0.6 if alone else 0.8, shortened=False)
    if close is not None:
        typed = close if close in COMMANDS else f"--{close}"
        raise ValueError(
            f"{word!r} may be a command or a prompt. Did you mean tensorlens-tl {typed}? "
            f"For the prompt, write tensorlens-tl explain {word}."
        )
