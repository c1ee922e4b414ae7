"""Test which tokens a model needs: scores are compared with runs of the real model, tokens masked.

An evaluation takes four steps:

1. Check the question: measures, maskings.
2. Check the prompts. Their tokens are scored by every method (``scoring``).
3. Run the model with the sets of tokens masked that the measures read (``parts``, ``protocols``,
   ``masking``): of all prompts at once, or chunk by chunk. Every set is run once, however many
   methods and measures read it.
4. Keep one number per prompt, method, measure and masking, and the curve that it comes from
   (``report``).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

from torch import Tensor

from ..checks import at_least_one, kind_of, spelled, whole
from ..chunks import model_mark, plain, question_of, spread
from ..hosts import Adapter, adapt, added_token, each_prompt
from ..methods import METHODS, check_method
from .masking import METRICS, Masking
from .parts import Masked, Parts, check_one_each
from .protocols import BEAM, Measure, measures
from .report import Evaluation, Row
from .scoring import CONTRASTS, Scored, score
from .significance import Number


@spelled
def evaluate(
    model: Any,
    prompts: Sequence[Any] | Scored,
    methods: str | Sequence[str] | None = None,
    protocol: str | Measure | Sequence[str | Measure] = "perturbation",
    masking: str | Sequence[str] = "delete",
    *,
    preset: str | Sequence[Number] | None = None,
    metric: str = "probability",
    target: str | SupportsIndex | Sequence[str | int] | None = None,
    versus: str | SupportsIndex | Sequence[str | int] | None = None,
    scores: Mapping[str, Sequence[Sequence[Number] | Tensor]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    mask_token: str | int | None = None,
    black: float | Sequence[float] | None = None,
    keep_last: bool = False,
    beam: int = BEAM,
    gate: str = "gate",
    seed: int = 0,
    batch_size: int = 64,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Test methods on prompts: mask the tokens they score, run the model, measure what is left.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        prompts: Strings, or token ids [pos], one sequence per prompt; pictures of a model of
            pictures [batch, channel, row, column]. Or what
            :func:`tensorlens_tl.evaluation.scoring.score` returned, so that evaluations share
            scores.
        methods: Names of :data:`tensorlens_tl.methods.METHODS`; None for all of them (or none,
            where ``scores`` are given).
        protocol: Names of :data:`tensorlens_tl.evaluation.protocols.PROTOCOLS`, or measures of
            :func:`tensorlens_tl.evaluation.protocols.measures`.
        masking: How tokens are masked, by one or several names: "delete" takes the token out of the
            prompt, "token" puts ``mask_token`` in its place, "mean" puts the mean embedding there.
            Of pictures, patches become black ("zero"), the picture's mean colour ("mean"), or
            blurred ("blur").
        preset: Fractions of the tokens that are masked: a key of
            :data:`tensorlens_tl.evaluation.protocols.PRESETS`, or fractions. By default, the preset
            of the protocol.
        metric: Number read of the masked runs: "probability", "log_odds" or "logit" of the target;
            "logit_diff", its logit less that of the token that ``versus`` names, or else of the
            likeliest other; or "agreement", whether the target is the model's prediction.
        target: Token or id for all prompts, a list with one per prompt, or None for the predictions
            of the model.
        versus: What methods explain the target's advantage over: "runner_up" for the likeliest
            other token, "all_others" for all of them by their probability (log-odds), a token or id
            for all prompts, or a list with one per prompt. None to explain the target's logit.
        scores: Scores of your own, by a name of your choice: for every prompt one number per token.
        options: Options of methods, by name: ``{"norm": {"probes": 16}}``.
        mask_token: Token or id that replaces masked tokens, for masking="token". By default, the
            tokenizer's mask token, or else its unknown, padding or end-of-sequence token.
        black: For masking="zero" of pictures, what 0 is after normalization, one number per
            channel: −mean / std of the model's image processor.
        keep_last: Whether the last token, at which the prediction is made, is never masked. The
            beginning-of-sequence token never is.
        beam: For "naopc", the number of orders kept in the search for its bounds.
        gate: How gated MLPs are made linear; see :class:`tensorlens_tl.Convention`.
        seed: Seed of ties between scores, of the bootstrap and of the permutations.
        batch_size: Number of masked prompts run at once.
        resume: Folder that keeps finished chunks of 64 prompts: the same call goes on from it.
            With it, all processes that a launcher started share the work, and all return the
            result; see :doc:`/guides/many_prompts`. None keeps nothing.
        progress: Whether to show progress bars on standard error after 2 s.

    Returns:
        One number per prompt, measure, masking and method.

    Raises:
        ValueError: If a method, protocol, preset, fraction, masking, metric or target does not
            exist, no prompt predicts the target, a prompt is too short, or an extra is not
            installed.

    Example:
        >>> from tensorlens_tl import demo
        >>> from tensorlens_tl.evaluation import evaluate
        >>> found = evaluate(demo.load_model(), ["The capital of France is"], ["in_out", "random"])
        >>> found.methods
        ('in_out', 'random')
    """
    # 1. The question.
    if scores is not None and not isinstance(scores, Mapping):
        raise ValueError(
            f"scores is {kind_of(scores)}, not a dictionary by method. Pass {{'mine': scores}}."
        )
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} does not exist. Use one of {', '.join(METRICS)}.")
    if not isinstance(keep_last, bool):
        raise ValueError(f"keep_last={keep_last!r} is not a choice. Pass True or False.")
    batch_size, seed = at_least_one(batch_size, "batch_size"), whole(seed, "seed")
    own = dict(scores or {})
    asked, adapter = _measures(protocol, preset, metric, beam), adapt(model)
    adapter.require_next_token("evaluate")
    maskings = _maskings(masking, adapter, mask_token, black)
    # 2. Prompts, and what scores them.
    if isinstance(prompts, Scored):
        made = _selected(prompts, methods, target, versus, options)
        names, named, n = list(made.scores), (made.targets, made.foils), len(made.prompts)
        prompts, against, gate, first = made.prompts, made.versus, made.gate, made.first_token
        given = [made.scores[name] for name in names]
    else:
        prompts = each_prompt(prompts, adapter.tokenizer)
        names, n, made, given = _names(methods, own, options or {}), len(prompts), None, []
        foils = versus if versus in CONTRASTS else _one_each("versus", versus, n)
        named = _one_each("target", target, n), foils
        against = foils if foils is None or isinstance(foils, str) else "own"
        first = added_token(adapter, prompts[0])

    def scored(start: int, stop: int) -> Scored:
        if made is not None:
            return made.take(range(start, stop))
        goal, foil = (x if x is None or isinstance(x, str) else x[start:stop] for x in named)
        some, shown = prompts[start:stop], progress and resume is None
        return score(model, some, names, goal, foil, options, gate, batch_size, shown)

    for name, values in own.items():
        check_one_each(name, values, n)
    how = Masked(adapter, asked, maskings, own, keep_last, seed, batch_size, progress)
    # 3. Masked runs: of all prompts at once, or chunk by chunk.
    if resume is None:
        some = scored(0, n)
        _check_predicted(adapter, some.targets, some.predicted)
        parts = [how.run(some, 0)]
    else:
        how = replace(how, progress=False)
        ways = [(way.kind, way.token, plain(way.black)) for way in maskings]
        about = names, asked, ways, repr(options), gate, seed, batch_size, keep_last, against
        lists = (None if isinstance(x, str) else x for x in (*named, *given, *own.values()))
        rows = zip(prompts, *([None] * n if x is None else x for x in lists), strict=True)
        question = question_of((model_mark(adapter.weights), about, *own), rows)
        parts = spread(resume, question, n, lambda a, b: how.run(scored(a, b), a), progress)
    done = Parts.of(parts)
    _check_predicted(adapter, done.targets, done.predicted)
    # 4. The report.
    rows = [
        Row(
            *(one.name, one.metric, one.preset, way.kind, name, one.higher),
            done.values[i][j][k],
            *done.curve(i, j, k, one.fractions),
        )
        for i, way in enumerate(maskings)
        for j, one in enumerate(asked)
        for k, name in enumerate((*names, *own))
    ]
    return Evaluation(
        rows=tuple(rows),
        model=adapter.name,
        dtype=str(adapter.dtype).removeprefix("torch."),
        lengths=done.lengths,
        targets=tuple(map(adapter.token_string, done.targets)),
        versus=against,
        mask_token=next((way.token for way in maskings if way.token is not None), None),
        convention=gate,
        batch_size=batch_size,
        keep_last=keep_last,
        seed=seed,
        seconds=dict(zip(names, done.seconds[:-1], strict=True) if made is None else made.seconds),
        forward_seconds=done.seconds[-1] if made is None else made.forward_seconds,
        runs=dict(zip((way.kind for way in maskings), done.runs, strict=True)),
        first_token=first,
    )


# --- What a user asks for ------------------------------------------------------------------------


def _listed(given: Any, name: str) -> list[Any]:
    if isinstance(given, str | Measure):
        return [given]
    if not isinstance(given, Iterable):
        raise ValueError(f"{name}={given!r} is not a name or a list of names. Pass one of them.")
    return list(given)


def _maskings(
    masking: Any, adapter: Adapter, mask_token: str | int | None, black: Any
) -> list[Masking]:
    kinds = _listed(masking, "masking")
    if mask_token is not None and "token" not in kinds:
        raise ValueError(
            f"mask_token= is used by masking='token' only, not by masking={masking!r}. Drop "
            "mask_token=, or pass masking='token'."
        )
    if black is not None and "zero" not in kinds:
        raise ValueError(
            f"black= is used by masking='zero' only, not by masking={masking!r}. Drop black=, or "
            "pass masking='zero'."
        )
    return [Masking.of(kind, adapter, mask_token, black) for kind in kinds]


def _check_predicted(adapter: Adapter, targets: Sequence[int], predicted: Sequence[int]) -> None:
    if not any(map(int.__eq__, targets, predicted)):
        raise ValueError(
            f"target={adapter.token_string(targets[0])!r} is predicted by no prompt, so "
            "masking says nothing about it. Drop target= to use the model's own predictions."
        )


def _selected(scored: Scored, methods: Any, *others: Any) -> Scored:
    if any(given is not None for given in others):
        raise ValueError(
            "target=, versus= and options= cannot change scores that are made already. Pass them "
            "to score()."
        )
    names = list(scored.scores) if methods is None else _listed(methods, "methods")
    if absent := [name for name in names if name not in scored.scores]:
        raise ValueError(
            f"There are no scores by {', '.join(absent)}. Choose among {', '.join(scored.scores)}."
        )
    return replace(scored, scores={name: scored.scores[name] for name in names})


def _names(
    methods: str | Sequence[str] | None, own: Mapping[str, Any], options: Mapping[str, Any]
) -> list[str]:
    """The methods that are asked for, known and with known options."""
    if methods is None:
        methods = [] if own else list(METHODS)
    names = list(dict.fromkeys(_listed(methods, "methods")))
    if not isinstance(options, Mapping) or not all(
        isinstance(own, Mapping) for own in options.values()
    ):
        raise ValueError(
            f"options={options!r} is not a dictionary of dictionaries. Pass options by method: "
            "{'norm': {'probes': 16}}."
        )
    if both := [name for name in own if name in METHODS]:
        raise ValueError(
            f"scores={{{both[0]!r}: …}} has the name of a method. Give your scores another name."
        )
    if not names and not own:
        raise ValueError(f"methods=[] names no method. Name at least one of {', '.join(METHODS)}.")
    for name in names:
        check_method(name, dict(options.get(name, {})))
    if absent := [name for name in options if name not in names]:
        raise ValueError(
            f"options= has an entry for {absent[0]}, which is not among methods= "
            f"({', '.join(names)}). Name the method, or drop its options."
        )
    return names


def _measures(
    protocol: Any, preset: str | Sequence[Number] | None, metric: str, beam: int
) -> list[Measure]:
    asked: list[Measure] = []
    for one in _listed(protocol, "protocol"):
        asked += [one] if isinstance(one, Measure) else measures(one, preset, metric, beam)
    if not asked:
        raise ValueError("protocol=[] names no protocol. Name at least one.")
    return asked


def _one_each(name: str, given: Any, n: int) -> Sequence[str | int] | None:
    if given is None:
        return None
    if isinstance(given, str):
        return [given] * n
    if isinstance(given, SupportsIndex) and not getattr(given, "shape", ()):  # NumPy's integers are
        return [int(given)] * n
    if not isinstance(given, Collection):
        raise ValueError(
            f"{name}={given!r} is not a token. Pass a token, an id, or a list with one per prompt."
        )
    if len(given) != n:
        raise ValueError(
            f"{name} has {len(given)} entries for {n} prompts. Pass one for each, or one for all."
        )
    return list(given)
