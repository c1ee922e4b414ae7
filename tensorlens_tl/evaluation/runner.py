"""Test which tokens a model needs: scores are compared with runs of the real model, tokens masked.

An evaluation takes five steps:

1. Check the question: prompts, measures, maskings.
2. Score the tokens of every prompt by every method (``scoring``).
3. Order the tokens that may be masked, most relevant first.
4. Run the model with the sets of tokens masked that the measures read (``protocols``, ``masking``).
   Every set is run once, however many methods and measures read it.
5. Keep one number per prompt, method, measure and masking (``report``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, SupportsIndex

from torch import Tensor

from ..checks import at_least_one, kind_of, spelled, whole
from ..hosts import Adapter, adapt, each_prompt
from ..methods import METHODS, check_method
from .masking import METRICS, MaskedRuns, Masking, maskable
from .protocols import BEAM, Measure, as_set, measures
from .report import Evaluation, Row
from .scoring import CONTRASTS, Scored, score
from .significance import Number

CHUNK = 256
"""Prompts whose masked runs are remembered together."""


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
    # 2. Scores.
    if isinstance(prompts, Scored):
        scored = _selected(prompts, methods, target, versus, options)
    else:
        prompts = each_prompt(prompts, adapter.tokenizer)
        names = _names(methods, own, options or {})
        goals = _one_each("target", target, len(prompts))
        foils = versus if versus in CONTRASTS else _one_each("versus", versus, len(prompts))
        scored = score(model, prompts, names, goals, foils, options, gate, batch_size, progress)
    if not any(map(int.__eq__, scored.targets, scored.predicted)):
        raise ValueError(
            f"target={adapter.token_string(scored.targets[0])!r} is predicted by no prompt, so "
            "masking says nothing about it. Drop target= to use the model's own predictions."
        )
    # 3. Orders.
    lengths = [maskable(adapter, ids).stop for ids in scored.prompts]
    positions = _maskable(adapter, scored, asked, maskings, keep_last)
    orders = {
        name: _orders(name, values, lengths, positions, seed)
        for name, values in (dict(scored.scores) | own).items()
    }
    # 4. Masked runs.
    rows: list[Row] = []
    runs: dict[str, int] = {}
    for way in maskings:
        runner = MaskedRuns(
            adapter, scored.prompts, scored.targets, scored.foils, way, batch_size, progress
        )
        found = _read(runner, asked, orders, len(positions))
        runs[way.kind] = runner.runs
        rows += [
            Row(one.name, one.metric, one.preset, way.kind, name, one.higher, tuple(found[i, name]))
            for i, one in enumerate(asked)
            for name in orders
        ]
    # 5. The report.
    return Evaluation(
        rows=tuple(rows),
        model=adapter.name,
        dtype=str(adapter.dtype).removeprefix("torch."),
        lengths=tuple(map(len, positions)),
        targets=tuple(map(adapter.token_string, scored.targets)),
        versus=scored.versus,
        mask_token=next((way.token for way in maskings if way.token is not None), None),
        convention=scored.gate,
        batch_size=batch_size,
        keep_last=keep_last,
        seed=seed,
        seconds=dict(scored.seconds),
        forward_seconds=scored.forward_seconds,
        runs=runs,
        first_token=scored.first_token,
    )


Ordered = tuple[tuple[int, ...], tuple[float, ...]]
"""Positions, most relevant first; and the scores, in the order of the positions."""


def _read(
    runner: MaskedRuns,
    asked: Sequence[Measure],
    orders: Mapping[str, Sequence[Ordered]],
    n: int,
) -> dict[tuple[int, str], list[float]]:
    """The numbers of every measure and method, prompt by prompt, from masked runs."""
    found: dict[tuple[int, str], list[float]] = {
        (i, name): [] for i in range(len(asked)) for name in orders
    }
    for start in range(0, n, CHUNK):
        chunk = range(start, min(start + CHUNK, n))
        # All sets of a chunk at once, so that batches are full; then every measure reads its own.
        runner.need(
            (prompt, masked)
            for prompt in chunk
            for of in orders.values()
            for one in asked
            for masked in one.masks(of[prompt][0])
        )
        for prompt in chunk:
            m = {one.metric: partial(runner.outcomes, prompt, one.metric) for one in asked}
            for (i, name), values in found.items():
                values.append(asked[i].read(m[asked[i].metric], *orders[name][prompt]))
        runner.forget()
    return found


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


def _selected(scored: Scored, methods: Any, *others: Any) -> Scored:
    if any(given is not None for given in others):
        raise ValueError(
            "target=, versus= and options= cannot change scores that are made already. Pass them "
            "to score()."
        )
    names = list(scored.scores) if methods is None else _listed(methods, "methods")
    if absent := [name for name in names if name not in scored.scores]:
        raise ValueError(
            f"There are no scores by {', '.join(absent)}. The scores are by "
            f"{', '.join(scored.scores)}."
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


# --- Which tokens, in which order ----------------------------------------------------------------


def _maskable(
    adapter: Adapter,
    scored: Scored,
    asked: Sequence[Measure],
    maskings: Sequence[Masking],
    keep_last: bool,
) -> list[range]:
    """Positions that may be masked: all but the first special token, and the last if asked."""
    if keep_last and adapter.of_pictures:
        raise ValueError(
            "keep_last= keeps a token at which the prediction is made, and pictures have none. "
            "Drop keep_last=: the row [CLS] is never masked."
        )
    found = []
    least = max(asked, key=lambda one: one.least)
    for i, ids in enumerate(scored.prompts):
        rows = maskable(adapter, ids)
        start, stop = rows.start, rows.stop - keep_last
        n = stop - start
        if n < least.least:
            raise ValueError(
                f"Prompt {i} has {n} tokens that may be masked, but {least.name} needs "
                f"{least.least}. Drop the prompt, or use a longer one."
            )
        found.append(places := range(start, stop))
        # Deleting needs a token that stays: a kept one, or sets that are never all tokens.
        if n < rows.stop or all(way.kind != "delete" for way in maskings):
            continue
        if whole := [one.name for one in asked if as_set(places) in one.masks(places)]:
            raise ValueError(
                f"{whole[0]} masks every token of prompt {i}, which has no beginning-of-sequence "
                "token that stays. Use masking='token' or 'mean', or fractions below 1."
            )
    return found


def _orders(
    name: str, scores: Sequence[Any], lengths: Sequence[int], positions: Sequence[range], seed: int
) -> list[Ordered]:
    """Every prompt's maskable positions by falling score; ties in random order."""
    if not isinstance(scores, Sequence | Tensor):
        raise ValueError(
            f"scores[{name!r}] is {kind_of(scores)}, not a list. Pass one list of numbers for each "
            "prompt."
        )
    if len(scores) != len(lengths):
        raise ValueError(
            f"scores[{name!r}] has {len(scores)} entries for {len(lengths)} prompts. Pass one each."
        )
    found = []
    for prompt, (given, n, places) in enumerate(zip(scores, lengths, positions, strict=True)):
        values = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(values, list | tuple) or not all(isinstance(v, Real) for v in values):
            raise ValueError(
                f"scores[{name!r}][{prompt}] is {kind_of(given)}, not a list of numbers. Pass one "
                "list for each prompt, with one number for each token."
            )
        if len(values) != n:
            raise ValueError(
                f"scores[{name!r}] has {len(values)} numbers for the {n} tokens of prompt "
                f"{prompt}. Pass one number per token."
            )
        if any(map(math.isnan, values)):
            raise ValueError(
                f"scores[{name!r}] has nan in prompt {prompt}, which has no rank. Use numbers."
            )
        tie = list(places)
        random.Random(f"{seed} {prompt}").shuffle(tie)
        order = sorted(tie, key=lambda j: -values[j])
        found.append((tuple(order), tuple(values[j] for j in places)))
    return found
