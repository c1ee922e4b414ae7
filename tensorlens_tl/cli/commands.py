"""The commands: what each loads, runs and gives back.

1. Parse the arguments, check them, and read the prompts; nothing of this needs torch.
2. Load the model, once for all prompts.
3. Run the command.
4. Print text, JSON or HTML on standard output, and everything else on standard error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from .arguments import parse
from .explanation import explained, render, token
from .output import Output, emit
from .prompt_input import Prompt, read_corrupted, read_pairs, read_prompts, read_text


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name. None takes those of the process.

    Returns:
        0, or 2 after a user error, which is one line on standard error.
    """
    args = None
    try:
        # 1. What was typed.
        args = parse(sys.argv[1:] if argv is None else argv)
        # 2. The model, and 3. the command.
        with redirect_stdout(sys.stderr), warned(args):  # hosts print while they load
            found = _COMMANDS[args.command](args)
        # 4. The answer.
        emit(found, args)
    except (ValueError, OSError) as error:
        message = as_typed(" ".join(str(error).split()), args)
        print(f"tensorlens-tl: {message}", file=sys.stderr)
        return 2
    return 0


def as_typed(message: str, args: argparse.Namespace | None) -> str:
    """Write the arguments that a message names as options: ``--n-edges 3`` for ``n_edges=3``."""
    message = message.replace("prepend_bos=False", "--no-bos").replace("prepend_bos=True", "--bos")
    given = {} if args is None else vars(args)
    for name in given:
        aimed = name == "target" and given["command"] == "edit"
        option = "--to" if aimed else f"--{name.replace('_', '-')}"
        message = re.sub(rf"(?<![\w.]){name}=(?=[\s,.;:)]|$)", option, message)
        message = re.sub(rf"(?<![\w.]){name}=", f"{option} ", message)
    return message


@contextmanager
def warned(args: argparse.Namespace) -> Iterator[None]:
    """Write warnings for people as one line each, as they would be typed."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if category is UserWarning:
                print(f"warning: {as_typed(str(message), args)}", file=sys.stderr)
            else:
                plain(message, category, *where)

        warnings.showwarning = show
        yield


def explain(args: argparse.Namespace) -> Output:
    """Split the prediction of every prompt."""
    prompts = read_prompts(args)
    if not prompts:
        raise ValueError("--ids needs prompts. Pass token ids, such as '5 17 42'.")
    model = load(args)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # our own model: no graph, half the memory
    reports, pictures = [], []
    for i, prompt in enumerate(prompts, 1):
        try:
            report, pictured = explained(model, prompt, args)
        except ValueError as error:
            where = f"Prompt {i} ({prompt!r}): " if len(prompts) > 1 else ""
            raise ValueError(f"{where}{error}") from None
        reports.append(report)
        pictures.append(pictured)
    text = "\n\n\n".join(render(report, args.top) for report in reports)
    data = json.dumps(reports, ensure_ascii=False)
    return Output(text, data, html=lambda: _together(pictures))


def _together(pictures: Sequence[Any]) -> str:
    from ..exhibits import reports_page

    return reports_page(pictures).html()


def evaluate(args: argparse.Namespace) -> Output:
    """Test methods on prompts."""
    prompts = read_prompts(args)
    model = load(args)
    from ..evaluation import evaluate

    found = evaluate(
        model,
        prompts or [pair.clean for pair in _pairs(args)],
        args.methods,
        args.protocol,
        args.masking,
        preset=args.preset,
        metric=args.metric,
        target=token(args.target),
        versus=token(args.versus),
        seed=args.seed,
        keep_last=args.keep_last,
        batch_size=args.batch_size,
        resume=args.resume,
        progress=True,
    )
    return Output(repr(found), found.to_json(), [("Evaluation", found)])


def discover(args: argparse.Namespace) -> Output:
    """Find a circuit over prompts."""
    if args.data is not None:
        columns = read_pairs(args)
        prompts, corrupted = columns["prompt"], columns.get("corrupted")
        target, versus = columns.get("target"), columns.get("versus")
    else:
        prompts, corrupted = _with_corrupted(args)
        target, versus = token(args.target), token(args.versus)
    model = load(args)
    from ..circuits import discover

    if not prompts:
        pairs = _pairs(args)
        prompts, corrupted = [p.clean for p in pairs], [p.corrupted for p in pairs]
    size = 40 if args.n_edges is None and args.threshold is None else args.n_edges
    found = discover(
        model,
        prompts,
        corrupted,
        target,
        versus,
        args.pos,
        n_edges=size,
        threshold=args.threshold,
        selection=args.selection,
        at=args.at,
        batch_size=args.batch_size,
        seed=args.seed,
        resume=args.resume,
        progress=True,
    )
    return _of_circuit(found, args.top)


def edit(args: argparse.Namespace) -> Output:
    """Find the edit of every prompt that makes a token the likeliest one, and run it."""
    if args.target is not None or args.versus is not None:
        raise ValueError("--target and --versus are not used by edit. Pass --to alone.")
    prompts = read_prompts(args)
    if not prompts:
        raise ValueError("--ids needs prompts. Pass token ids, such as '5 17 42'.")
    model = load(args)
    from ..plugin import capture

    site = model.cfg.n_layers // 2 if args.site is None else args.site
    site = int(site) if str(site).lstrip("-").isdecimal() else site
    from ..exhibits import RunReport, likeliest

    texts, numbers, pictures = [], [], []
    for prompt in prompts:
        _, lens = capture(model, prompt)
        found = lens.edit_to_top(
            token(args.to), args.pos, site=site, margin=args.margin, positions=args.pos
        )
        found = found.refine(model, args.refine) if args.refine else found
        check = found.check(model)
        heading = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
        texts.append(f"{heading}\n{found}\n{check}")
        results = {"In the real model": check, "Edit": found}
        top = likeliest(lens.capture, args.pos)
        pictures.append(RunReport(heading, (repr(lens),), top, results, {}))
        numbers.append(
            {"prompt": prompt, "site": check.site, "before": float(check.before)}
            | {name: float(getattr(check, name)) for name in ("predicted", "real", "kl", "size")}
            | {"top": check.tops[0][0], "top_after": check.tops[0][1]}
        )
    data = json.dumps(numbers, ensure_ascii=False)
    return Output("\n\n".join(texts), data, html=lambda: _together(pictures))


def circuit(args: argparse.Namespace) -> Output:
    """Print a circuit of a file, or test it in the model."""
    text = read_text(args.circuit, "FILE")
    if args.test:
        prompts, corrupted = _with_corrupted(args)
        if prompts and corrupted is None and args.ablation == "resample":
            raise ValueError(
                "--ablation resample needs --corrupted FILE. Pass it, or use --ablation mean or "
                "zero."
            )
    from ..circuits import Circuit

    try:
        found = Circuit.from_json(text)
    except ValueError as error:
        raise ValueError(f"FILE {args.circuit}: {error}") from None
    if not args.test:
        return _of_circuit(found, args.top)
    model = load(args)
    if not prompts:
        pairs = _pairs(args)
        prompts = [pair.clean for pair in pairs]
        if args.ablation == "resample":
            corrupted = [pair.corrupted for pair in pairs]
    proof = found.faithfulness(
        model,
        prompts,
        corrupted,
        token(args.target),
        token(args.versus),
        ablation=args.ablation,
        attention=args.attention,
        pos=args.pos,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=True,
    )
    return Output(repr(proof), proof.to_json(), [("Faithfulness", proof), ("Circuit", found)])


_COMMANDS = {
    "explain": explain,
    "evaluate": evaluate,
    "discover": discover,
    "circuit": circuit,
    "edit": edit,
}


# --- What several commands need ------------------------------------------------------------------


def load(args: argparse.Namespace) -> Any:
    """Load the model of ``--model``, in the dtype of ``--dtype``.

    Args:
        args: Parsed arguments of the command.

    Returns:
        The host model.

    Raises:
        ValueError: If there is no such model, or it has no tokenizer for text.
    """
    if args.model is None:
        from ..demo import load_model as load_demo

        model = load_demo(args.kind)
    elif args.model == "smollm2":
        from ..models import smollm2

        model = smollm2(args.kind)
    else:
        from ..hosts import load_model

        model = load_model(args.model, args.kind)
    if model.tokenizer is None and not args.ids:
        raise ValueError(
            f"--model {args.model} has no tokenizer, so it reads no text. Pass token ids: --ids "
            "'5 17 42'."
        )
    if args.bos is not None:
        from ..hosts import choose_bos

        choose_bos(model, args.bos)
    if args.dtype is not None:
        import torch

        model = model.to(getattr(torch, args.dtype))
    return model


def _with_corrupted(args: argparse.Namespace) -> tuple[Sequence[Prompt], Sequence[Prompt] | None]:
    prompts = read_prompts(args)
    return prompts, read_corrupted(args, prompts)


def _pairs(args: argparse.Namespace) -> Sequence[Any]:
    """Prompts of the demo model's own tasks."""
    from ..demo import prompts

    return prompts(args.task, args.n, args.seed)


def _of_circuit(found: Any, top: int) -> Output:
    order = sorted(found.edges, key=lambda edge: -abs(found.scores.get(edge, 0.0)))
    lines = [repr(found).splitlines()[0]]
    for edge in order[:top]:
        score = f"{found.scores[edge]:+9.4f}" if edge in found.scores else " " * 9
        lines.append(f"  {score}  {edge}")
    lines += [f"  … {len(order) - top} more"] if len(order) > top else []
    text = "\n".join(lines)
    return Output(text, found.to_json(), [("Circuit", found)], found.to_dot())
