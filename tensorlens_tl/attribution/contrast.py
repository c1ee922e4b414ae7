"""Where a difference of two runs comes from: a target against a baseline.

With T_c, T_k the operators of the clean run and of the baseline (a corrupted prompt), u_c, u_k the
target's covectors at their ends and x_c, x_k the embedded prompts, the two targets differ by

    u_c T_c (x_c − x_k)  +  [ (u_c T_c − u_k T_k) x_k + constants_c − constants_k ]

The first part is by token, the second is one row, ``operator change``: what the patterns, scales,
ratios and the readout changed. It is often the larger one. ``at="corrupted"`` takes the tokens'
part with the other operator. By component likewise, with the frozen readout (the final norm's scale
and a soft cap) in the operator's place: ``readout change``. A baseline "zero" or "mean" is no run:
the operator stays, and so there is no such row.

``at="secant"`` reads by the operator between the two runs (``secant``): S (x_c − x_k) is the whole
difference, queries, keys, norms and activations included, and no row is left over; only a soft cap on
the logits is each run's own, and what it did a row, ``readout change``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..graph import Node
from ..operator import Capture, FrozenTransformer, SecantOperator
from ..sublayers import EmbedWeights
from .edges import Writers
from .splits import by_edge, check_qk, edge_result, top_covector, written_at
from .table import Attribution
from .table_builder import TableBuilder
from .target_gradient import TargetGradient

BY = ("token", "component", "edge")
AT_OPERATORS = ("clean", "corrupted", "secant")


def check_comparable(clean: Capture, corrupted: Capture) -> None:
    """Refuse two runs that do not differ by their prompts alone.

    Raises:
        ValueError: If the prompts have unequal lengths, or the models or conventions differ.
    """
    ours, theirs = (
        [stop - start for start, stop in capture.frame.spans] for capture in (clean, corrupted)
    )
    if clean.frame.spans != corrupted.frame.spans:
        raise ValueError(
            f"expected a baseline of as many tokens, prompt by prompt and equally padded, got {theirs} "
            f"for {ours}: pad or reword the corrupted prompt"
        )
    if clean.frame != corrupted.frame or clean.convention != corrupted.convention:
        raise ValueError(
            f"expected a baseline captured alike ({clean.frame.dtype}, {clean.frame.device}, "
            f"{clean.convention}), got {corrupted.frame.dtype}, {corrupted.frame.device}, "
            f"{corrupted.convention}: capture both in the same way"
        )
    weights = [
        [tensor for tensor, _ in capture.versions(False) if tensor is not capture.logits]
        for capture in (clean, corrupted)
    ]
    if len(weights[0]) != len(weights[1]) or not all(map(_equal, *weights)):
        raise ValueError(
            f"expected a baseline of the same model ({clean.model_name}), got a lens of another one "
            f"({corrupted.model_name}): capture the corrupted prompt with the same model"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def fixed_baseline(
    gradient: TargetGradient, baseline: str | Float[Tensor, "*shape"]
) -> TargetGradient:
    """The same operator on other embeddings: what a baseline that is no run would have.

    Args:
        gradient: The target, pulled to every site.
        baseline: "zero", "mean", or an embedding [d_model] or [batch, pos, d_model].

    Returns:
        The target with those embeddings, and with every state pushed from them.

    Raises:
        ValueError: If the baseline is none of these, or the mean is not known.
    """
    capture, operator = gradient.capture, gradient.operator
    pos = capture.pos_embed
    if isinstance(baseline, str) and baseline == "zero":
        embed, pos = torch.zeros_like(capture.embed), None if pos is None else torch.zeros_like(pos)
    else:
        embed = _embedding(capture, baseline)
    capture = replace(capture, embed=embed, pos_embed=pos)
    state, steps = sum(capture.embeddings.values(), torch.zeros_like(embed)), []
    for step in operator.steps:
        steps.append(replace(step, state=state))
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
    width = capture.embed.shape[-1]
    if isinstance(baseline, str) and baseline == "mean":
        if capture.embed_weights is None:
            raise ValueError(
                "this lens does not know W_E, whose mean the baseline is: capture with the model, or "
                "load with model=, or pass the mean embedding as baseline"
            )
        start = capture.frame.spans[0][0]
        token = int(capture.prompts.tokens[0, start])
        baseline = mean_embedding(capture.embed[0, start], token, capture.embed_weights)
    if not isinstance(baseline, Tensor) or baseline.shape not in ((width,), capture.embed.shape):
        found = repr(baseline) if isinstance(baseline, str) else type(baseline).__name__
        found = list(baseline.shape) if isinstance(baseline, Tensor) else found
        raise ValueError(
            f"expected baseline to be a lens, zero, mean or an embedding [{width}], got {found}: "
            "capture a corrupted prompt for its lens"
        )
    return baseline.detach().to(capture.embed).expand_as(capture.embed)


def mean_embedding(
    seen: Float[Tensor, " d_model"], token: int, weights: EmbedWeights
) -> Float[Tensor, " d_model"]:
    """The mean of W_E's rows as they enter the residual: scaled (Gemma) or normalized (BLOOM).

    Args:
        seen: A token's embedding as it entered the residual, which tells the scale.
        token: Its id.
        weights: The embedding matrix, and its norm.

    Returns:
        The mean, in ``seen``'s dtype.

    Raises:
        ValueError: If ``seen`` is no multiple of the token's row.
    """
    # float16 has no room for sums of squares.
    exact = torch.promote_types(seen.dtype, torch.float32)
    row, wanted = weights.table(token, exact), seen.to(exact)
    scale = (wanted @ row) / (row @ row)
    if not (wanted - scale * row).abs().max() <= 1e-2 * wanted.abs().max():
        raise ValueError(
            "this run's token embeddings are not rows of W_E (edited, or resized): pass the mean "
            "embedding as baseline"
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
        baseline: The same target in the other run.
        by: "token", "component" or "edge".
        at: Whose operator the tokens (components, writers) are read by: "clean", "corrupted", or
            "secant", the one between the two.
        qk: Whether queries and keys are readers, too; by edge only.

    Returns:
        Contributions that sum to the target's value here minus its value there. By edge: what each
        reader of one run makes of the difference in what each writer adds, which does not.

    Raises:
        ValueError: If ``by`` or ``at`` is none of these.
    """
    if by not in BY:
        raise ValueError(f"expected by to be one of {', '.join(BY)} with a baseline, got {by!r}")
    if at not in AT_OPERATORS:
        raise ValueError(f"expected at to be one of {', '.join(AT_OPERATORS)}, got {at!r}")
    check_qk(by, qk)
    if at == "secant":
        return _between(clean, baseline, by, qk)
    if by == "edge":
        ours, theirs = (
            Writers.of(s.operator, s.capture, s.target.query) for s in (clean, baseline)
        )
        reads = clean if at == "clean" else baseline
        found = by_edge(reads, ours.minus(theirs), own=False, qk=qk)
        return replace(found, target=_names(clean),
                       target_value=clean.target.value - baseline.target.value)  # fmt: skip
    table = TableBuilder(clean.capture, clean.target)
    split = _by_token if by == "token" else _by_component
    change = split(table, clean, baseline, at == "clean")
    if baseline.operator.ln_final is not clean.operator.ln_final:  # another run
        name = "operator change" if by == "token" else "readout change"
        change = change + clean.target.constant - baseline.target.constant
        table.add([Node("change", name=name)], change[:, None])
    found = table.to_attribution(by)
    value = clean.target.value - baseline.target.value
    return replace(found, target=_names(clean), target_value=value)


def _between(clean: TargetGradient, other: TargetGradient, by: str, qk: bool) -> Attribution:
    """The difference by the operator between the two runs."""
    if other.operator is not clean.operator and other.operator.ln_final is clean.operator.ln_final:
        raise ValueError(
            "expected a lens as baseline for at='secant', which is between two runs: capture a corrupted "
            "prompt, or leave at out"
        )
    ours, theirs, query = clean.target, other.target, clean.target.query
    u = clean.operator.frame.zeros(clean.operator.out_dim)
    prompts = torch.arange(len(query), device=query.device)
    u[prompts, query] = (ours.covector + theirs.covector) / 2
    runs = (clean.capture, clean.operator), (other.capture, other.operator)
    secant, table = SecantOperator(*runs, u), TableBuilder(clean.capture, clean.target)
    if by == "edge":
        writers = Writers.of(clean.operator, clean.capture, query)
        writers = writers.minus(Writers.of(other.operator, other.capture, query))
        found = edge_result(clean, writers, secant.readers(writers.below, qk))
    elif by == "token":
        c = secant.covectors[0]
        for name, (x_c, x_k) in _aligned(clean.capture.embeddings, other.capture.embeddings):
            table.spread(Node.parse(name), (c * (x_c - x_k)).sum(-1))
    else:
        c = secant.top[prompts, query]
        for node, (a_c, a_k) in _aligned(*map(_written, (clean, other))):
            if node.kind != "constant" or not torch.equal(a_c, a_k):  # a post-norm scales b_O
                table.add([node], ((a_c - a_k) * c).sum(-1, keepdim=True))
    if by != "edge":
        if clean.capture.unembed.weights.soft_cap is not None:  # each run's is a slope of its own
            y = (
                sum(gradient.capture.unembed.final[prompts, query] for gradient in (clean, other))
                / 2
            )
            change = (
                ((ours.covector - theirs.covector) * y).sum(-1) + ours.constant - theirs.constant
            )
            table.add([Node("change", name="readout change")], change[:, None])
        found = table.to_attribution(by)
    return replace(found, target=_names(clean), target_value=ours.value - theirs.value)


def _written(gradient: TargetGradient) -> dict[Node, Float[Tensor, "batch d_model"]]:
    return {
        node: v for nodes, vectors in written_at(gradient)
        for node, v in zip(nodes, vectors.unbind(1), strict=True)
    }  # fmt: skip


def _names(clean: TargetGradient) -> tuple[str, ...]:
    return tuple(f"{name}, less the baseline's" for name in clean.target.name)


def _by_token(
    table: TableBuilder, clean: TargetGradient, other: TargetGradient, at_clean: bool
) -> Tensor:
    """Each embedding's difference, read by one operator; returns what the operators change."""
    same = other.operator.ln_final is clean.operator.ln_final
    c = clean.trace.covectors[0]
    k = c if same else other.trace.covectors[0]
    theirs = other.capture.embeddings
    change = torch.zeros_like(clean.target.value)
    for name, ours in _aligned(clean.capture.embeddings, theirs):
        x_c, x_k = ours
        table.spread(Node.parse(name), ((c if at_clean else k) * (x_c - x_k)).sum(-1))
        change = change + ((c - k) * (x_k if at_clean else x_c)).sum((-2, -1))
    if not same:
        for _, (e_c, e_k) in _aligned(clean.trace.effects, other.trace.effects):
            change = change + (e_c - e_k).sum(-1)
    return change


def _by_component(
    table: TableBuilder, clean: TargetGradient, other: TargetGradient, at_clean: bool
) -> Tensor:
    """Each writer's difference, read by one readout; returns what the readouts change."""
    (u_c, top_c), (u_k, top_k) = top_covector(clean), top_covector(other)
    written = map(_written, (clean, other))
    change = torch.zeros_like(clean.target.value)
    for node, (a_c, a_k) in _aligned(*written):
        read = u_c if at_clean else u_k
        table.add([node], ((a_c - a_k) * read[:, 0]).sum(-1, keepdim=True))
        change = change + ((a_k if at_clean else a_c) * (u_c - u_k)[:, 0]).sum(-1)
    for _, (e_c, e_k) in _aligned(top_c, top_k):
        change = change + (e_c - e_k).sum(-1)
    return change


def _aligned(ours: dict, theirs: dict) -> Iterator[tuple[Any, tuple[Tensor, Tensor]]]:
    """Entries side by side; what only one run has (an edit of the user's own) is 0 in the other."""
    for key in dict.fromkeys((*ours, *theirs)):
        either = ours[key] if key in ours else theirs[key]
        zero = torch.zeros_like(either)
        yield key, (ours.get(key, zero), theirs.get(key, zero))
