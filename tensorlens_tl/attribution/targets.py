"""Targets: what a user may ask about, as linear functionals of the final normalized residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index as operator_index
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..operator import Capture
from ..sublayers import soft_cap_ratio, take_row

TargetLike = str | SupportsIndex | Sequence[float] | Tensor | None
"""A token string, a token id, a direction [d_vocab] or [d_model], or None: the own prediction."""


@dataclass(frozen=True, eq=False)
class Target:
    """A linear functional of the final normalized residual at one position per prompt.

    Attributes:
        name: For people, one per prompt.
        query: Position [batch], as tensor index.
        covector: u [batch, d_model], so that target = u · y + constant.
        constant: What b_U contributes [batch].
        value: The run's own value [batch]: from the model's logits, not from the operator.
    """

    name: tuple[str, ...]
    query: Int[Tensor, " batch"]
    covector: Float[Tensor, "batch d_model"]
    constant: Float[Tensor, " batch"]
    value: Float[Tensor, " batch"]

    def same(self, other: Target) -> bool:
        """Whether it is the same functional under the same name."""
        tensors = ("query", "covector", "constant", "value")
        return self.name == other.name and all(
            torch.equal(getattr(self, n), getattr(other, n)) for n in tensors
        )

    def row(self, prompt: int) -> Target:
        """One prompt's."""
        one = slice(prompt, prompt + 1)
        parts = (self.query, self.covector, self.constant, self.value)
        return Target(self.name[one], *(part[one] for part in parts))

    @classmethod
    def stack(cls, targets: Sequence[Target]) -> Target:
        """One target of prompts that each have their own."""
        names = tuple(name for target in targets for name in target.name)
        parts = ("query", "covector", "constant", "value")
        return cls(names, *(torch.cat([getattr(t, part) for t in targets]) for part in parts))

    def minus(self, other: Target) -> Target:
        """This target's advantage over another at the same position.

        Of two functionals that are equal up to rounding it is exactly 0: what their covectors leave,
        at most 10 eps (‖a‖ + ‖b‖), says nothing.

        Args:
            other: What is subtracted.

        Returns:
            The difference.
        """
        names = (f"{a} − {b}" for a, b in zip(self.name, other.name, strict=True))
        covector, constant = self.covector - other.covector, self.constant - other.constant
        eps = 10 * torch.finfo(covector.dtype).eps
        size = self.covector.norm(dim=-1) + other.covector.norm(dim=-1)
        equal = covector.norm(dim=-1) <= eps * size
        nothing = equal & (constant.abs() <= eps * (self.constant.abs() + other.constant.abs()))
        return Target(
            tuple(names),
            self.query,
            covector.masked_fill(equal[:, None], 0),
            constant.masked_fill(nothing, 0),
            (self.value - other.value).masked_fill(nothing, 0),
        )


def token_id(capture: Any, text: str) -> int:
    """The id of a one-token string: as given, else without its leading space.

    Args:
        capture: A run, or anything else with a ``tokenizer``.
        text: The token.

    Returns:
        The id.

    Raises:
        ValueError: If there is no tokenizer, the string is not one token (the message shows its
            pieces), or the tokenizer does not know it.
    """
    tokenizer = capture.tokenizer
    if tokenizer is None:
        raise ValueError(f"no tokenizer to read the target {text!r} with: pass a token id")
    unknown = getattr(tokenizer, "unk_token_id", None)
    pieces: list[int] = []
    for attempt in dict.fromkeys((text, text.removeprefix(" "))):
        ids = tokenizer.encode(attempt, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != unknown:
            return ids[0]
        pieces = pieces or ids
    if len(pieces) == 1 or all(piece == unknown for piece in pieces):
        raise ValueError(f"the tokenizer does not know the target {text!r}: expected a known token")
    shown = ", ".join(f"{tokenizer.decode([piece])!r} #{piece}" for piece in pieces)
    raise ValueError(
        f"the target {text!r} is {len(pieces)} tokens ({shown}), expected one: take one of them, or "
        "pass a token id"
    )


def own_prediction(capture: Capture, pos: int = -1) -> Int[Tensor, " batch"]:
    """The token that each prompt's logits rank first."""
    query = capture.frame.index(pos)
    return capture.logits[torch.arange(len(query), device=query.device), query].argmax(-1)


def is_token(target: TargetLike) -> bool:
    """Whether a target is one token, or the own prediction: no direction."""
    return isinstance(target, str | int | None) or getattr(target, "ndim", None) == 0


def resolve_each(
    capture: Capture, targets: Sequence[TargetLike], pos: int, predicted: Int[Tensor, " batch"]
) -> Target:
    """A target for each prompt: see :func:`resolve_target`.

    Args:
        capture: The run.
        targets: One per prompt.
        pos: Position among the real tokens.
        predicted: What stands for the model's own predictions.

    Returns:
        The functional.
    """
    if not all(map(is_token, targets)):
        goals = (resolve_target(capture, target, pos, predicted) for target in targets)
        return Target.stack([goal.row(prompt) for prompt, goal in enumerate(goals)])
    ids = [own if target is None else resolve_token(capture, target)
           for target, own in zip(targets, predicted.tolist(), strict=True)]  # fmt: skip
    return resolve_target(capture, None, pos, torch.tensor(ids, device=predicted.device))


def resolve_target(
    capture: Capture,
    target: TargetLike,
    pos: int = -1,
    predicted: Int[Tensor, " batch"] | None = None,
) -> Target:
    """Turn what a user names into a functional of the final normalized residual.

    Args:
        capture: The run.
        target: A token string, a token id, a direction in logits [d_vocab] or in the final
            normalized residual [d_model], or None for the model's own prediction.
        pos: Position among the real tokens; −1 is the last.
        predicted: What stands for the model's own prediction; by default, this run's.

    Returns:
        The functional, for every prompt.

    Raises:
        ValueError: If the target or the position does not exist.
    """
    frame, unembed = capture.frame, capture.unembed.weights
    query, prompts = frame.index(pos), torch.arange(frame.batch, device=frame.device)
    y, logits = capture.unembed.final[prompts, query], frame.cast(capture.logits[prompts, query])
    if not is_token(target):
        return _direction(capture, target, query, y, logits)
    if target is None:
        ids = own_prediction(capture, pos) if predicted is None else predicted
    else:
        ids = torch.full_like(query, resolve_token(capture, target))
    covector = frame.cast(unembed.W_U[:, ids].T)
    constant = torch.zeros_like(y[:, 0]) if unembed.b_U is None else frame.cast(unembed.b_U[ids])
    if unembed.soft_cap is not None:
        ratio = soft_cap_ratio((covector * y).sum(-1) + constant, unembed.soft_cap)
        covector, constant = covector * ratio[:, None], constant * ratio
    names = tuple(repr(_decode(capture, int(i))) for i in ids)
    return Target(names, query, covector, constant, logits[prompts, ids])


def resolve(
    capture: Capture,
    target: TargetLike = None,
    versus: TargetLike = None,
    pos: int = -1,
    predicted: Int[Tensor, " batch"] | None = None,
) -> Target:
    """A target, or the difference of two, as a functional of the final normalized residual.

    Args:
        capture: The run.
        target: As in :func:`resolve_target`.
        versus: A target that is subtracted, or None.
        pos: Position among the real tokens; −1 is the last.
        predicted: Ids [batch] that stand for the model's own prediction; by default, this run's.

    Returns:
        The functional, for every prompt.

    Raises:
        ValueError: If a target or the position does not exist.
    """
    goal = resolve_target(capture, target, pos, predicted)
    return goal if versus is None else goal.minus(resolve_target(capture, versus, pos))


def likeliest_others(
    capture: Capture, ids: Int[Tensor, " batch"], pos: int = -1
) -> Int[Tensor, " batch"]:
    """The token that each prompt's logits rank first beside a given one: the runner-up."""
    return _without(capture, ids, pos).argmax(-1)


def expected_others(capture: Capture, ids: Int[Tensor, " batch"], pos: int = -1) -> Target:
    """The mean logit of all tokens but a given one, weighted by their probabilities at this run.

    A token's log-odds are log p/(1 − p) = logit − log Σ_others exp(logit). Their gradient is that of the
    logit less this mean: ``target.minus(expected_others(...))`` is what log-odds are linear in.

    Args:
        capture: The run.
        ids: The token, per prompt.
        pos: Position among the real tokens.

    Returns:
        The functional.
    """
    frame, unembed = capture.frame, capture.unembed
    query, prompts = frame.index(pos), torch.arange(frame.batch, device=frame.device)
    p = _without(capture, ids, pos).softmax(-1)
    ratio = unembed.ratio
    weights = p * (take_row(ratio, query)[:, 0] if isinstance(ratio, Tensor) else ratio)
    covector = weights @ frame.cast(unembed.weights.W_U).T
    b_U = unembed.weights.b_U
    constant = torch.zeros_like(covector[:, 0]) if b_U is None else weights @ frame.cast(b_U)
    logits = frame.cast(capture.logits[prompts, query])
    value = (p * logits).sum(-1)
    return Target(("the others",) * frame.batch, query, covector, constant, value)


def _without(capture: Capture, ids: Tensor, pos: int) -> Float[Tensor, "batch d_vocab"]:
    frame = capture.frame
    query, prompts = frame.index(pos), torch.arange(frame.batch, device=frame.device)
    return frame.cast(capture.logits[prompts, query]).scatter(1, ids[:, None], -torch.inf)


def resolve_token(capture: Capture, target: TargetLike) -> int:
    """The id of a token string or of an id.

    Args:
        capture: The run.
        target: The string or id.

    Returns:
        The id.

    Raises:
        ValueError: If it is no token of the vocabulary.
    """
    index = token_id(capture, target) if isinstance(target, str) else _as_id(target)
    d_vocab = capture.logits.shape[-1]
    if not 0 <= index < d_vocab:
        raise ValueError(
            f"target id {index} is outside the vocabulary: expected 0 to {d_vocab - 1}"
        )
    return index


def _as_id(target: Any) -> int:
    try:
        if isinstance(target, bool):
            raise TypeError
        return operator_index(target)
    except TypeError:
        raise _no_target(target) from None


def _no_target(target: Any) -> ValueError:
    return ValueError(
        f"expected a target token, id or direction, got {target!r} of {type(target).__name__}: pass "
        "a string, an integer or a one-dimensional tensor"
    )


def _direction(
    capture: Capture, direction: Any, query: Tensor, y: Tensor, logits: Tensor
) -> Target:
    frame, unembed = capture.frame, capture.unembed
    d_model, d_vocab = unembed.weights.W_U.shape
    try:
        u = torch.as_tensor(direction)
    except (TypeError, ValueError, RuntimeError):
        raise _no_target(direction) from None
    if u.ndim == 0:
        raise _no_target(direction)
    if u.ndim != 1 or u.shape[0] not in (d_model, d_vocab) or d_model == d_vocab:
        raise ValueError(
            f"expected a direction in logits [{d_vocab}] or in the final residual [{d_model}], got "
            f"shape {list(u.shape)}" + (" (the two widths are equal)" if d_model == d_vocab else "")
        )
    if u.is_complex() or not u.isfinite().all():
        what = "complex numbers" if u.is_complex() else "nan or inf in it"
        raise ValueError(f"expected a direction of finite real numbers, got {what}")
    u = u.detach().to(y)
    if u.shape[0] == d_model:
        covector, zeros = u.expand(frame.batch, -1), torch.zeros_like(y[:, 0])
        return Target(("residual direction",) * frame.batch, query, covector, zeros, y @ u)
    ratio = unembed.ratio
    weighted = u * (take_row(ratio, query)[:, 0] if isinstance(ratio, Tensor) else ratio)
    weighted = weighted.expand(frame.batch, -1)
    b_U = unembed.weights.b_U
    constant = torch.zeros_like(y[:, 0]) if b_U is None else weighted @ frame.cast(b_U)
    covector = weighted @ frame.cast(unembed.weights.W_U).T
    return Target(("logit direction",) * frame.batch, query, covector, constant, logits @ u)


def _decode(capture: Capture, token: int) -> str:
    return str(token) if capture.tokenizer is None else capture.tokenizer.decode([token])
