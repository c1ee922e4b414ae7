"""Where a difference of two runs comes from: a target in one run, minus the target in a baseline.

Write T_c, T_k for the operators of the clean run and of the baseline, often the run of a corrupted
prompt. Let u_c, u_k be the target's covectors at their ends and x_c, x_k the embedded prompts. Then
the two targets differ by

    u_c T_c (x_c − x_k)  +  [ (u_c T_c − u_k T_k) x_k + constants_c − constants_k ]

The first part is split by token. The second is one row, ``operator change``: what the patterns,
scales, ratios and the readout changed. It is often the larger one. ``at="corrupted"`` reads the
tokens by the other operator. A split by component is alike, with the frozen readout (the final
norm's scale and a soft cap) in the operator's place: its row is ``readout change``. A baseline
"zero" or "mean" is no run: the operator stays, and there is no such row.

``at="secant"`` reads by the operator S between the two runs (``SecantOperator``). S (x_c − x_k) is
the whole difference, queries, keys, norms and activations included, so no row is left over. Only a
soft cap on the logits is each run's own; what it did is one row, ``readout change``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import kind_of
from ..graph import CONTENTS, EMBED_NORM_BIAS, Node
from ..operator import Capture, FrozenTransformer, SecantOperator
from ..sublayers import EmbedWeights
from .edges import Writers
from .splits import by_edge, check_qk, edge_result, written_at
from .table import Attribution
from .table_builder import TableBuilder, check_sum, summed
from .target_gradient import TargetGradient, direct_covectors

BY = ("token", "component", "edge")
AT_OPERATORS = ("clean", "corrupted", "secant")
"""Whose operator reads the difference of two runs."""


def check_comparable(clean: Capture, baseline: Capture, what: str = "baseline") -> None:
    """Refuse two runs that do not differ by their prompts alone.

    Args:
        clean: The run that is explained.
        baseline: The run that it is compared with.
        what: What the user calls the latter, for messages.

    Raises:
        ValueError: If the prompts have unequal lengths, or the models or conventions differ.
    """
    lengths, reference = (
        [stop - start for start, stop in capture.frame.spans] for capture in (clean, baseline)
    )
    if len(lengths) != len(reference):
        raise ValueError(
            f"The {what} has {len(reference)} prompts for {len(lengths)}. Capture one corrupted "
            "prompt for each prompt."
        )
    for i, (n, n_baseline) in enumerate(zip(lengths, reference, strict=True)):
        if n != n_baseline:
            raise ValueError(
                f"Prompt and {what} must have the same number of tokens: prompt {i} has {n}, its "
                f"{what} {n_baseline}. Reword the corrupted prompt so that both have {n}."
            )
    if clean.frame.spans != baseline.frame.spans:
        raise ValueError(
            f"The prompts and their {what}s are padded differently. Pad both alike, on one side "
            "and to one length."
        )
    if clean.frame != baseline.frame or clean.convention != baseline.convention:
        raise ValueError(
            f"The lens was captured with {_settings(clean)}, its {what} with "
            f"{_settings(baseline)}. Capture both in the same way."
        )
    # By value, not by name: a difference of two runs means nothing where weights differ as well.
    weights = [capture.tensors(scores=False)[1:] for capture in (clean, baseline)]
    if len(weights[0]) != len(weights[1]) or not all(map(_equal, *weights)):
        raise ValueError(
            f"The lens is of the model {clean.model_name}, its {what} of another one "
            f"({baseline.model_name}). Capture the corrupted prompt with the same model."
        )


def _settings(capture: Capture) -> str:
    return f"{capture.frame.dtype}, {capture.frame.device}, {capture.convention}"


def _equal(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype
    # Most lenses share the model's own memory, so nothing is compared.
    return alike and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def fixed_baseline(
    gradient: TargetGradient, baseline: str | Float[Tensor, "*shape"]
) -> TargetGradient:
    """Put other embeddings under the same operator: a baseline that is no run.

    Args:
        gradient: The target in the captured run.
        baseline: "zero", "mean", or an embedding [d_model] or [batch, pos, d_model].

    Returns:
        The same target with those embeddings, and every state pushed up from them.

    Raises:
        ValueError: If the baseline is something else, or the mean embedding is not known.
    """
    capture, operator = gradient.capture, gradient.operator
    gradient.target.alone("A baseline that is no run")
    if isinstance(baseline, str) and baseline == "zero":
        other = {name: torch.zeros_like(capture.embeddings[name]) for name in capture.sources}
    else:
        other = {"embed": _embedding(capture, baseline)}
    capture = replace(capture, embeddings={**capture.embeddings, **other})
    state, steps = capture.input, []
    for step in operator.steps:
        steps.append(replace(step, state=state))
        # Not a run of the model: patterns, scales and ratios stay those of the captured run.
        state = step.map.apply(state) + step.map.bias
    operator = FrozenTransformer(operator.frame, tuple(steps), operator.ln_final, operator.edit)
    y = (operator.ln_final.apply(state) + operator.ln_final.bias) + (
        0 if operator.edit is None else operator.edit.constant
    )
    prompts = torch.arange(len(y), device=y.device)
    target = gradient.target
    value = (y[prompts, target.query] * target.covector).sum(-1) + target.constant
    return TargetGradient(capture, operator, replace(target, value=value))


def _embedding(capture: Capture, baseline: str | Tensor) -> Tensor:
    embed, width = capture.embed, capture.resid_final.shape[-1]
    if embed is None:
        raise ValueError(
            f"An embedding as baseline replaces those of tokens, and this run has none, but "
            f"{', '.join(capture.sources)}. Pass baseline='zero', or the lens of another prompt."
        )
    # A row of a picture, or of a soft prompt, is no token.
    others = [capture.embeddings[name] for name in CONTENTS if name in capture.sources]
    of_tokens = ~sum(others[1:], torch.zeros_like(embed)).any(-1)
    if isinstance(baseline, str) and baseline == "mean":
        if EMBED_NORM_BIAS in capture.embeddings:
            raise ValueError(
                "baseline='mean' is not available where a norm follows the embeddings, as each "
                "token has a scale of its own. Pass 'zero', or an embedding [d_model]."
            )
        tokens = capture.prompts.ids("baseline='mean'")
        if capture.embed_weights is None:
            raise ValueError(
                "baseline='mean' needs W_E, which this lens does not hold. Load the lens with "
                "model=, or pass the mean embedding as baseline."
            )
        real = capture.frame.real & of_tokens
        tokens = tokens.to(real.device)[real]
        baseline = mean_embedding(embed[real], tokens, capture.embed_weights)
    if not isinstance(baseline, Tensor) or baseline.shape not in ((width,), embed.shape):
        kind = kind_of(baseline)
        kind = f"a tensor of shape {list(baseline.shape)}" if isinstance(baseline, Tensor) else kind
        found = f"={baseline!r}" if isinstance(baseline, str) else f"= is {kind}, which"
        raise ValueError(
            f"baseline{found} is no baseline. Pass the lens of another prompt of equal length, "
            f"'zero', 'mean', or an embedding [{width}]."
        )
    return torch.where(of_tokens[..., None], baseline.detach().to(embed), 0)


def mean_embedding(
    seen: Float[Tensor, "token d_model"], tokens: Int[Tensor, " token"], weights: EmbedWeights
) -> Float[Tensor, " d_model"]:
    """The mean of W_E's rows as they enter the residual: scaled (Gemma) or normalized (BLOOM).

    Args:
        seen: Embeddings of some tokens as they entered the residual. The largest tells the scale.
        tokens: The ids of those tokens; a row of 0, as of many padding tokens, tells nothing.
        weights: The embedding matrix, and its norm if there is one.

    Returns:
        The mean embedding, in the dtype of ``seen``.

    Raises:
        ValueError: If that embedding is no multiple of its token's row of W_E.
    """
    # float16 has no room for sums of squares.
    exact = torch.promote_types(seen.dtype, torch.float32)
    rows = weights.rows(tokens, exact)
    # The longest row tells the scale best; rounding of short ones would be blown up.
    largest = rows.square().sum(-1).argmax()
    row, wanted = rows[largest], seen[largest].to(exact)
    # The s that makes ‖wanted − s · row‖ smallest: 1, or √d_model for Gemma.
    scale = (wanted @ row) / (row @ row)
    if not (seen.to(exact) - scale * rows).abs().max() <= 1e-2 * wanted.abs().max():
        raise ValueError(
            "The token embeddings of this run are not rows of W_E: they were edited or resized. "
            "Pass the mean embedding as baseline."
        )
    return (scale * weights.mean(exact)).to(seen.dtype)


def difference(
    clean: TargetGradient,
    baseline: TargetGradient,
    by: str = "token",
    at: str = "clean",
    qk: bool = False,
) -> Attribution:
    """Split the difference of one target between two runs.

    Args:
        clean: The target in this run.
        baseline: The same target in the reference run.
        by: The kind of source: "token", "component" or "edge".
        at: The operator that reads what differs: "clean", "corrupted", or "secant", which is the
            operator between the two runs.
        qk: Whether queries and keys are readers, too; only by edge.

    Returns:
        Contributions that sum to the target in this run minus the target in the reference run. By
        edge they do not sum: each row is what one reader makes of the difference in one writer.

    Raises:
        ValueError: If ``by`` or ``at`` does not exist.
    """
    if by not in BY:
        raise ValueError(f"by={by!r} is not available with a baseline. Use one of {', '.join(BY)}.")
    if at not in AT_OPERATORS:
        raise ValueError(f"at={at!r} does not exist. Use one of {', '.join(AT_OPERATORS)}.")
    check_qk(by, qk)
    if clean.target.rows > 1:
        pairs = zip(clean.each_row(), baseline.each_row(), strict=True)
        # A target that is a mean over rows is linear in them, and so are its splits.
        parts = [difference(*pair, by, at, qk) for pair in pairs]
        return summed(parts, clean.target.value - baseline.target.value)
    if at == "secant":
        found = _between(clean, baseline, by, qk)
    elif by == "edge":
        writers = _writers(clean).minus(_writers(baseline))
        found = by_edge(clean if at == "clean" else baseline, writers, own=False, qk=qk)
    else:
        table = TableBuilder(clean.capture, clean.target)
        split = _by_token if by == "token" else _by_component
        change = split(table, clean, baseline, at == "clean")
        if not _same_operator(clean, baseline):
            name = "operator change" if by == "token" else "readout change"
            # b_U under a soft cap, and the entropy of a log-probability, differ between the runs.
            change = change + clean.target.constant - baseline.target.constant
            table.add([Node("change", name=name)], change[:, None])
        found = table.to_attribution(by)
    names = tuple(f"{name}, less the baseline's" for name in clean.target.name)
    value = clean.target.value - baseline.target.value
    found = replace(found, target=names, target_value=value)
    # A baseline that is no run has no states of a run to compare with.
    runs = (clean,) if _same_operator(clean, baseline) else (clean, baseline)
    return check_sum(found, *runs)


def _same_operator(clean: TargetGradient, baseline: TargetGradient) -> bool:
    """Whether the baseline is no run of its own; see :func:`fixed_baseline`."""
    return baseline.operator.ln_final is clean.operator.ln_final


def _writers(gradient: TargetGradient) -> Writers:
    return Writers.of(gradient.operator, gradient.capture, gradient.target.query)


def _between(clean: TargetGradient, baseline: TargetGradient, by: str, qk: bool) -> Attribution:
    """Split the difference by the operator between the two runs."""
    if baseline.operator is not clean.operator and _same_operator(clean, baseline):
        raise ValueError(
            "at='secant' is between two runs, but this baseline is no run. Pass the lens of a "
            "corrupted prompt as baseline, or drop at=."
        )
    # The target is bilinear in covector and state: the mean covector reads the state's difference,
    # and the difference of covectors (a soft cap's) reads the mean state.
    goals, query = (clean.target, baseline.target), clean.target.query
    u = clean.operator.frame.zeros(clean.operator.out_dim)
    prompts = torch.arange(len(query), device=query.device)
    u[prompts, query] = (goals[0].covector + goals[1].covector) / 2
    runs = (clean.capture, clean.operator), (baseline.capture, baseline.operator)
    secant = SecantOperator(*runs, u)
    if by == "edge":
        writers = _writers(clean).minus(_writers(baseline))
        return edge_result(clean, writers, secant.readers(writers.below, qk))
    table = TableBuilder(clean.capture, clean.target)
    if by == "token":
        c = secant.covectors[0]
        for name, (x_c, x_k) in _aligned(clean.capture.embeddings, baseline.capture.embeddings):
            table.spread(Node.parse(name), (c * (x_c - x_k)).sum(-1))
    else:
        at = {node: i for i, nodes, _ in written_at(clean) for node in nodes}
        at |= {node: i for i, nodes, _ in written_at(baseline) for node in nodes}
        us = [u[prompts, query] for u in secant.direct]
        for node, (a_c, a_k) in _aligned(_written(clean), _written(baseline)):
            if node.kind != "constant" or not torch.equal(a_c, a_k):  # a post-norm scales b_O
                table.add([node], ((a_c - a_k) * us[at[node]]).sum(-1, keepdim=True))
    if not torch.equal(goals[0].covector, goals[1].covector):  # a soft cap's, or a softmax's
        # u·y − u′·y′ = ū·(y − y′) + (u − u′)·ȳ: this is the second term.
        y = sum(run.capture.unembed.final[prompts, query] for run in (clean, baseline)) / 2
        change = ((goals[0].covector - goals[1].covector) * y).sum(-1)
        change = change + goals[0].constant - goals[1].constant
        table.add([Node("change", name="readout change")], change[:, None])
    return table.to_attribution(by)


def _written(gradient: TargetGradient) -> dict[Node, Float[Tensor, "batch d_model"]]:
    """What every writer adds to the residual at the target's position."""
    return {
        node: vector
        for _, nodes, vectors in written_at(gradient)
        for node, vector in zip(nodes, vectors.unbind(1), strict=True)
    }


def _by_token(
    table: TableBuilder, clean: TargetGradient, baseline: TargetGradient, at_clean: bool
) -> Float[Tensor, " batch"]:
    """Add each embedding's difference, read by one operator; return what the operators change."""
    same = _same_operator(clean, baseline)
    c = clean.trace.covectors[0]
    k = c if same else baseline.trace.covectors[0]
    change = torch.zeros_like(clean.target.value)
    for name, (x_c, x_k) in _aligned(clean.capture.embeddings, baseline.capture.embeddings):
        table.spread(Node.parse(name), ((c if at_clean else k) * (x_c - x_k)).sum(-1))
        # c·x_c − k·x_k = c·(x_c − x_k) + (c − k)·x_k, or k·(x_c − x_k) + (c − k)·x_c: the second
        # term is what the operators change.
        change = change + ((c - k) * (x_k if at_clean else x_c)).sum((-2, -1))
    if not same:
        for _, (e_c, e_k) in _aligned(clean.trace.effects, baseline.trace.effects):
            change = change + (e_c - e_k).sum(-1)
    return change


def _by_component(
    table: TableBuilder, clean: TargetGradient, baseline: TargetGradient, at_clean: bool
) -> Float[Tensor, " batch"]:
    """Add each writer's difference, read by one readout; return what the readouts change."""
    (us_c, top_c), (us_k, top_k) = direct_covectors(clean), direct_covectors(baseline)
    change = torch.zeros_like(clean.target.value)
    at = {node: i for g in (clean, baseline) for i, nodes, _ in written_at(g) for node in nodes}
    for node, (a_c, a_k) in _aligned(_written(clean), _written(baseline)):
        u_c, u_k = us_c[at[node]], us_k[at[node]]
        read = u_c if at_clean else u_k
        table.add([node], ((a_c - a_k) * read[:, 0]).sum(-1, keepdim=True))
        # The same product rule, writer by writer.
        change = change + ((a_k if at_clean else a_c) * (u_c - u_k)[:, 0]).sum(-1)
    for _, (e_c, e_k) in _aligned(top_c, top_k):
        change = change + (e_c - e_k).sum(-1)
    return change


def _aligned(clean: Mapping, baseline: Mapping) -> Iterator[tuple[Any, tuple[Tensor, Tensor]]]:
    """Entries side by side. What only one run has (an edit of the user's own) is 0 in the other."""
    for key in dict.fromkeys((*clean, *baseline)):
        zero = torch.zeros_like(clean[key] if key in clean else baseline[key])
        yield key, (clean.get(key, zero), baseline.get(key, zero))
