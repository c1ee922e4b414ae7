"""Do a method's scores say which tokens the model needs? The real model, run with them masked.

:func:`evaluate` scores every prompt's tokens by some methods, asks the protocols (``protocols``) which
sets of tokens to mask, runs the model with them masked (``masking``), each set once however
many methods ask for it, and keeps one number for each prompt, method, measure and masking.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, SupportsIndex

from torch import Tensor

from ..checks import at_least_one
from ..hosts import Adapter, adapt
from ..methods import METHODS, check_method
from .masking import METRICS, MaskedRuns, Masking
from .protocols import BEAM, Measure, as_set, measures
from .report import Evaluation, Row
from .scoring import RIVALS, Scored, score
from .significance import Number

CHUNK = 256
"""Prompts whose masked runs are remembered together."""


def evaluate(
    model: Any,
    prompts: Sequence[Any] | Scored,
    methods: str | Sequence[str] | None = None,
    protocol: str | Measure | Sequence[str | Measure] = "perturbation",
    masking: str | Sequence[str] = "delete",
    *,
    preset: str | Sequence[Number] | None = None,
    metric: str = "probability",
    targets: str | SupportsIndex | Sequence[str | int] | None = None,
    versus: str | SupportsIndex | Sequence[str | int] | None = None,
    scores: Mapping[str, Sequence[Sequence[Number] | Tensor]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    mask_token: str | int | None = None,
    keep_last: bool = False,
    beam: int = BEAM,
    gate: str = "gate",
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Test methods on prompts: mask the tokens they name, run the model, see what is left of a target.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        prompts: Strings, or token ids [pos], one sequence per prompt; or what
            :func:`tensorlens_tl.evaluation.scoring.score` made of them, so that evaluations share the scores.
        methods: Names of :data:`tensorlens_tl.methods.METHODS`; None for all of them (or none, where
            ``scores`` are given).
        protocol: Names of :data:`tensorlens_tl.evaluation.protocols.PROTOCOLS`, or measures of
            :func:`tensorlens_tl.evaluation.protocols.measures`.
        masking: "delete", "token", "mean", or several; see ``masking``.
        preset: Which fractions of the tokens are masked: a key of
            :data:`tensorlens_tl.evaluation.protocols.PRESETS`, or fractions; by default the protocol's.
        metric: What is read of the masked runs: "probability", "log_odds" or "logit" of the target;
            "logit_diff", its logit less that of the token ``versus`` names, or else of the likeliest
            other; or "agreement", whether the target is the model's prediction.
        targets: A token or id for all, one for each prompt, or None for the model's own predictions.
        versus: What methods explain the target's advantage over: "runner_up" for the likeliest other
            token, "others" for all of them by their probability (log-odds), a token or id for all,
            one for each prompt, or None for nothing: the target's logit.
        scores: Scores of your own, by name: for every prompt one number per token.
        options: Options of methods, by name: ``{"norm": {"probes": 16}}``.
        mask_token: What stands for masked tokens where masking is "token"; by default the tokenizer's
            mask token, or else its unknown, padding or end-of-sequence token.
        keep_last: Whether the last token, at which the prediction is made, is never masked; the
            beginning-of-sequence token never is.
        beam: For "naopc": orders kept in the search for its bounds.
        gate: See :class:`tensorlens_tl.Convention`.
        seed: Of ties between scores, the bootstrap and the permutations.
        batch_size: Rows run at once.
        progress: Whether to show progress on standard error.

    Returns:
        One number for each prompt, measure, masking and method.

    Raises:
        ValueError: If a method, protocol, preset, fraction, masking, metric or target does not exist,
            no prompt predicts the target, a prompt is too short, or an extra is missing.
    """
    if not isinstance(prompts, Scored) and (isinstance(prompts, str) or len(prompts) == 0):
        raise ValueError(f"expected a list of prompts, got {prompts!r}: put a single one in a list")
    if scores is not None and not isinstance(scores, Mapping):
        raise ValueError(
            f"expected scores by the name of a method of yours, got {type(scores).__name__}: pass "
            "{'mine': scores}"
        )
    batch_size, own = at_least_one(batch_size, "batch_size"), dict(scores or {})
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; expected one of {', '.join(METRICS)}")
    asked = _measures(protocol, preset, metric, beam)
    adapter = adapt(model)
    if mask_token is not None and "token" not in _listed(masking):
        raise ValueError(
            f"mask_token is for masking='token', got masking={masking!r}: leave it out"
        )
    maskings = [Masking.of(kind, adapter, mask_token) for kind in _listed(masking)]
    if isinstance(prompts, Scored):
        scored = _selected(prompts, methods, targets, versus, options)
    else:
        names = _names(methods, own)
        for name in names:
            check_method(name, dict((options or {}).get(name, {})))
        if absent := [name for name in options or {} if name not in names]:
            raise ValueError(
                f"expected options of {', '.join(names)}, got some of {', '.join(absent)}: name the "
                "method, too, or leave them out"
            )
        goals = _one_each("target", targets, len(prompts))
        foils = versus if versus in RIVALS else _one_each("versus", versus, len(prompts))
        scored = score(model, prompts, names, goals, foils, options, gate, batch_size, progress)
    if not any(map(int.__eq__, scored.targets, scored.predicted)):
        raise ValueError(
            f"no prompt predicts its target ({adapter.token_string(scored.targets[0])!r}, …): a target "
            "that no prompt has says nothing; leave targets out for the model's own predictions"
        )
    positions = _maskable(adapter, scored, asked, maskings, keep_last)
    orders = {
        name: _orders(name, values, scored.prompts, positions, seed)
        for name, values in (dict(scored.scores) | own).items()
    }
    rows: list[Row] = []
    runs: dict[str, int] = {}
    for way in maskings:
        runner = MaskedRuns(
            adapter, scored.prompts, scored.targets, scored.rivals, way, batch_size, progress
        )
        found = _read(runner, asked, orders, len(positions))
        runs[way.kind] = runner.runs
        rows += [
            Row(one.name, one.metric, one.preset, way.kind, name, one.higher,
                tuple(found[i, name]))
            for i, one in enumerate(asked)
            for name in orders
        ]  # fmt: skip
    return Evaluation(
        tuple(rows), adapter.name, str(adapter.dtype).removeprefix("torch."),
        tuple(map(len, positions)), tuple(map(adapter.token_string, scored.targets)),
        scored.versus, next((way.token for way in maskings if way.token is not None), None),
        scored.gate, batch_size,
        keep_last, seed, dict(scored.seconds), scored.forward_seconds, runs,
    )  # fmt: skip


Ordered = tuple[tuple[int, ...], tuple[float, ...]]
"""Positions, most relevant first; and the scores, in the order of the positions."""


def _read(
    runner: MaskedRuns,
    asked: Sequence[Measure],
    orders: Mapping[str, Sequence[Ordered]],
    n: int,
) -> dict[tuple[int, str], list[float]]:
    found: dict[tuple[int, str], list[float]] = {
        (i, name): [] for i in range(len(asked)) for name in orders
    }
    for start in range(0, n, CHUNK):
        chunk = range(start, min(start + CHUNK, n))
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


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | Measure) else list(given)


def _selected(scored: Scored, methods: Any, *others: Any) -> Scored:
    if any(given is not None for given in others):
        raise ValueError("scores are made already: give targets, versus and options to score()")
    names = list(scored.scores) if methods is None else _listed(methods)
    if absent := [name for name in names if name not in scored.scores]:
        raise ValueError(f"expected scores by {', '.join(absent)}, got {', '.join(scored.scores)}")
    return replace(scored, scores={name: scored.scores[name] for name in names})


def _names(methods: str | Sequence[str] | None, own: Mapping[str, Any]) -> list[str]:
    if methods is None:
        methods = [] if own else list(METHODS)
    names = list(dict.fromkeys(_listed(methods)))
    if both := [name for name in own if name in METHODS]:
        raise ValueError(
            f"scores are named {', '.join(both)} like a method: give them another name"
        )
    if not names and not own:
        raise ValueError(f"expected at least one method, got none; there are {', '.join(METHODS)}")
    return names


def _measures(
    protocol: Any, preset: str | Sequence[Number] | None, metric: str, beam: int
) -> list[Measure]:
    asked: list[Measure] = []
    for one in _listed(protocol):
        asked += [one] if isinstance(one, Measure) else measures(one, preset, metric, beam)
    if not asked:
        raise ValueError("expected at least one protocol, got none")
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
            f"expected {name} as a token, an id, or one for each prompt, got {given!r}"
        )
    if len(given) != n:
        raise ValueError(f"expected one {name} per prompt, {n}, or one for all, got {len(given)}")
    return list(given)


def _maskable(
    adapter: Adapter,
    scored: Scored,
    asked: Sequence[Measure],
    maskings: Sequence[Masking],
    keep_last: bool,
) -> list[range]:
    """Positions that may be masked: all but the beginning-of-sequence token's, and the last if asked."""
    bos, found = getattr(adapter.tokenizer, "bos_token_id", None), []
    least = max(asked, key=lambda one: one.least)
    for i, ids in enumerate(scored.prompts):
        start = int(bos is not None and int(ids[0]) == bos)
        stop = len(ids) - keep_last
        n = stop - start
        if n < least.least:
            raise ValueError(
                f"prompt {i} has {n} tokens that may be masked, expected at least {least.least} for "
                f"{least.name}: leave it out, or make it longer"
            )
        found.append(places := range(start, stop))
        if n < len(ids) or all(way.kind != "delete" for way in maskings):
            continue
        if whole := [one.name for one in asked if as_set(places) in one.masks(places)]:
            raise ValueError(
                f"{whole[0]} masks every token, and prompt {i} has no beginning-of-sequence token that "
                "would stay: expected masking by token or mean, or fractions below 1"
            )
    return found


def _orders(
    name: str, scores: Sequence[Any], prompts: Sequence[Any], positions: Sequence[range], seed: int
) -> list[Ordered]:
    if len(scores) != len(prompts):
        raise ValueError(f"expected {name} scores for {len(prompts)} prompts, got {len(scores)}")
    found = []
    for prompt, (given, ids, places) in enumerate(zip(scores, prompts, positions, strict=True)):
        values = given.tolist() if hasattr(given, "tolist") else list(given)
        if len(values) != len(ids) or any(math.isnan(value) for value in values):
            raise ValueError(
                f"expected {name} to score the {len(ids)} tokens of prompt {prompt}, got "
                f"{len(values)} numbers" + (", nan among them" * any(map(math.isnan, values)))
            )
        tie = list(places)
        random.Random(f"{seed} {prompt}").shuffle(tie)
        order = sorted(tie, key=lambda j: -values[j])
        found.append((tuple(order), tuple(values[j] for j in places)))
    return found
