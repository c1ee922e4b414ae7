"""Targets: what a user may ask about, as linear functionals of the final normalized residual.

A target is u · y + constant, with y the final normalized residual at one position of each prompt:

    a token            u is the token's column of W_U, the constant its entry of b_U
    a logit direction  u = W_U w, the constant b_U · w, for weights w [d_vocab]
    a residual one     u is the direction itself, without constants
    a log-probability  see below
    a difference       the first functional minus the second

A soft cap of the logits is frozen: column and bias are multiplied by the cap's ratio in this run.
So is the head of a masked language model: the column is pulled back through it, to y.

The log-probability of a token t is not linear in the logits z. With p = softmax(z) held,

    log p_t = (z_t − Σ_i p_i z_i) − H(p),     H(p) = −Σ_i p_i log p_i

holds exactly. The bracket is a logit direction, the gradient of log p_t at this run. The entropy
H(p) is a constant, the row "softmax", in nats. It is what no part of the run is given. In the
difference of two log-probabilities the softmax cancels: it is the difference of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index as operator_index
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import token_text
from ..maps import take_row
from ..operator import Capture, token_id
from ..sublayers import soft_cap_ratio

TargetLike = str | SupportsIndex | Sequence[float] | Tensor | None
"""A token string, a token id, a direction [d_vocab] or [d_model], or None: the own prediction."""

OF = ("logit", "logprob")
"""What of a token is split: the logit, or the log-probability in nats."""


@dataclass(frozen=True, eq=False)
class Target:
    """A linear functional of the final normalized residual at one position per prompt.

    Attributes:
        name: What people call the target, one string per prompt.
        query: The position in each prompt, as a tensor index that counts padding [batch].
        covector: The direction u, so that target = u · y + constant [batch, d_model].
        constants: What constants above y add to the target, by name: b_U in logits, and softmax,
            in nats, where the target is a log-probability [batch].
        value: The target in the model's own logits, not in the operator's [batch].
        rows: How many positions from ``query`` on are read, each by ``covector``. More than one
            only below a head that pools them.
    """

    name: tuple[str, ...]
    query: Int[Tensor, " batch"]
    covector: Float[Tensor, "batch d_model"]
    constants: dict[str, Float[Tensor, " batch"]]
    value: Float[Tensor, " batch"]
    rows: int = 1

    @property
    def constant(self) -> Float[Tensor, " batch"]:
        """The sum of the constants [batch]."""
        return sum(self.constants.values(), torch.zeros_like(self.value))

    def same(self, target: Target) -> bool:
        """Tell whether another target is the same functional under the same name."""
        mine, others = (
            {"query": t.query, "covector": t.covector, "value": t.value} | t.constants
            for t in (self, target)
        )
        return (self.name, mine.keys()) == (target.name, others.keys()) and all(
            torch.equal(mine[name], others[name]) for name in mine
        )

    def row(self, prompt: int) -> Target:
        """Take the target of one prompt of the batch."""
        one = slice(prompt, prompt + 1)
        constants = {name: constant[one] for name, constant in self.constants.items()}
        parts = self.query[one], self.covector[one], constants, self.value[one]
        return Target(self.name[one], *parts, self.rows)

    @classmethod
    def stack(cls, targets: Sequence[Target]) -> Target:
        """Put targets of single prompts together into one target of the batch."""
        names = tuple(name for target in targets for name in target.name)
        query, covector, value = (
            torch.cat([getattr(t, part) for t in targets])
            for part in ("query", "covector", "value")
        )
        constants = {
            name: torch.cat([t.constants.get(name, torch.zeros_like(t.value)) for t in targets])
            for name in dict.fromkeys(name for t in targets for name in t.constants)
        }
        return cls(names, query, covector, constants, value, _same_rows(targets))

    def minus(self, versus: Target) -> Target:
        """Subtract another target at the same position.

        Two functionals that are equal up to rounding give exactly 0. A covector below
        10 eps (‖a‖ + ‖b‖) is all rounding, and a split of it would say nothing.

        Args:
            versus: The target that is subtracted.

        Returns:
            The advantage of this target over ``versus``.
        """
        names = (f"{a} − {b}" for a, b in zip(self.name, versus.name, strict=True))
        covector, zero = self.covector - versus.covector, torch.zeros_like(self.value)
        eps = 10 * torch.finfo(covector.dtype).eps
        size = self.covector.norm(dim=-1) + versus.covector.norm(dim=-1)
        equal = covector.norm(dim=-1) <= eps * size  # all of it is rounding
        nothing, constants = equal, {}
        for name in dict.fromkeys((*self.constants, *versus.constants)):
            a, b = self.constants.get(name, zero), versus.constants.get(name, zero)
            constants[name] = a - b
            nothing = nothing & ((a - b).abs() <= eps * (a.abs() + b.abs()))
        return Target(
            tuple(names),
            self.query,
            covector.masked_fill(equal[:, None], 0),
            {name: constant.masked_fill(nothing, 0) for name, constant in constants.items()},
            (self.value - versus.value).masked_fill(nothing, 0),
            _same_rows((self, versus)),
        )

    def each_row(self, y: Float[Tensor, "batch pos d_model"]) -> Iterator[Target]:
        """Split a target that reads several rows into one target for each of them.

        Args:
            y: The final normalized residual of the run.

        Yields:
            Targets that sum to this one. The first has the constants.
        """
        prompts = torch.arange(len(self.query), device=self.query.device)
        for i in range(self.rows):
            query, constants = self.query + i, {} if i else self.constants
            value = (y[prompts, query] * self.covector).sum(-1)
            value = sum(constants.values(), value)
            yield Target(self.name, query, self.covector, constants, value)

    def alone(self, asked: str) -> Target:
        """This target, for what can be asked of one row only.

        Args:
            asked: The question, as the user typed it.

        Returns:
            The same target.

        Raises:
            ValueError: If it reads several rows.
        """
        if self.rows > 1:
            raise ValueError(
                f"{asked} is for targets at one row, and these classes read the mean of "
                f"{self.rows}. Call attribute, or pass a direction in the residual."
            )
        return self


def _same_rows(targets: Sequence[Target]) -> int:
    rows = {target.rows for target in targets}
    if len(rows) > 1:
        raise ValueError(
            "A class reads the mean of several rows, and a direction reads one. Pass targets of "
            "one kind."
        )
    return rows.pop()


# --- Tokens --------------------------------------------------------------------------------------


def own_prediction(capture: Capture, pos: int = -1) -> Int[Tensor, " batch"]:
    """The id of the token that each prompt's logits rank first."""
    query = capture.frame.index(pos)
    return capture.logits_at(query).argmax(-1)


def likeliest_others(
    capture: Capture, ids: Int[Tensor, " batch"], pos: int = -1
) -> Int[Tensor, " batch"]:
    """The id of the likeliest token except a given one, for each prompt."""
    return _without(capture, ids, pos).argmax(-1)


def check_head(capture: Capture, target: TargetLike, name: str = "target") -> None:
    """Refuse a token, a class or the own prediction of a model that has no head.

    Raises:
        ValueError: If the model has none.
    """
    if capture.headless:
        raise ValueError(
            f"{name}={target!r} is read off logits, and {capture.model_name} has no head. Pass a "
            f"direction in the final residual [{capture.resid_final.shape[-1]}]."
        )


def is_token(target: TargetLike) -> bool:
    """Tell whether a target is one token, or the own prediction, and not a direction."""
    return isinstance(target, str | int | None) or getattr(target, "ndim", None) == 0


def resolve_token(capture: Any, target: TargetLike, name: str = "target") -> int:
    """Find the id that a token string or an id stands for.

    Args:
        capture: The captured run, or anything else with ``tokenizer`` and ``logits``.
        target: A token as a string, or a token id.
        name: The name of the user's argument, for messages.

    Returns:
        The id of the token.

    Raises:
        ValueError: If there is no such token in the vocabulary.
    """
    index = token_id(capture, target, name) if isinstance(target, str) else _as_id(target, name)
    d_vocab = capture.logits.shape[-1]
    if not 0 <= index < d_vocab:
        raise ValueError(
            f"{name}={index} is outside the vocabulary. Pass an id from 0 to {d_vocab - 1}."
        )
    return index


# --- Functionals ---------------------------------------------------------------------------------


def resolve(
    capture: Capture,
    target: TargetLike = None,
    versus: TargetLike = None,
    pos: int = -1,
    predicted: Int[Tensor, " batch"] | None = None,
    of: str = "logit",
) -> Target:
    """Turn a target, or a difference of two, into a functional of the final normalized residual.

    Args:
        capture: The captured run.
        target: As in :func:`resolve_target`.
        versus: A target that is subtracted, or None.
        pos: Position of the prediction among the real tokens; −1 is the last.
        predicted: Ids that stand for the model's own prediction [batch]; None to read the
            prediction from this run's logits.
        of: "logit", or "logprob" for a token's log-probability; of a difference both are the same.

    Returns:
        The functional, for every prompt.

    Raises:
        ValueError: If a target, the position or ``of`` does not exist, or if a direction is to have
            a log-probability.
    """
    if of not in OF:
        raise ValueError(f"of={of!r} does not exist. Use 'logit' or 'logprob'.")
    if of == "logprob" and not (is_token(target) and is_token(versus)):
        raise ValueError(
            "of='logprob' is for tokens, and a direction was passed. Pass a token, or drop of=."
        )
    goal = resolve_target(capture, target, pos, predicted)
    if versus is not None:
        return goal.minus(resolve_target(capture, versus, pos, name="versus"))
    return goal if of == "logit" else _log_probability(capture, goal, target, pos, predicted)


def resolve_target(
    capture: Capture,
    target: TargetLike,
    pos: int = -1,
    predicted: Int[Tensor, " batch"] | None = None,
    name: str = "target",
) -> Target:
    """Turn what a user names into a functional of the final normalized residual.

    Args:
        capture: The captured run.
        target: A token string, a token id, a direction in logits [d_vocab] or in the final
            normalized residual [d_model], or None for the model's own prediction.
        pos: Position of the prediction among the real tokens; −1 is the last.
        predicted: Ids that stand for the model's own prediction [batch]; None to read the
            prediction from this run's logits.
        name: The name of the user's argument, for messages.

    Returns:
        The functional, for every prompt.

    Raises:
        ValueError: If the target or the position does not exist.
    """
    frame, unembed = capture.frame, capture.unembed.weights
    query, prompts = frame.index(pos), torch.arange(frame.batch, device=frame.device)
    y = capture.unembed.final[prompts, query]
    if not is_token(target):
        return _direction(capture, target, query, y, name)
    check_head(capture, target, name)
    logits = frame.cast(capture.logits_at(query))
    if target is None:
        ids = own_prediction(capture, pos) if predicted is None else predicted
    else:
        ids = torch.full_like(query, resolve_token(capture, target, name))
    covector, constants = capture.unembed.pull_head(frame.cast(unembed.W_U[:, ids].T), query)
    if unembed.b_U is not None:
        constants["b_U"] = frame.cast(unembed.b_U[ids])
    if unembed.soft_cap is not None:  # c · tanh(l / c) = ratio · l, with the ratio held
        own = sum(constants.values(), (covector * y).sum(-1))
        ratio = soft_cap_ratio(own, unembed.soft_cap)
        covector = covector * ratio[:, None]
        constants = {name: constant * ratio for name, constant in constants.items()}
    names = tuple(repr(token_text(capture.tokenizer, int(i))) for i in ids)
    return Target(names, query, covector, constants, logits[prompts, ids], capture.unembed.rows)


def expected_others(capture: Capture, ids: Int[Tensor, " batch"], pos: int = -1) -> Target:
    """The mean logit of all tokens except a given one, weighted by their probabilities.

    A token's log-odds are log p/(1 − p) = logit − log Σ_others exp(logit). Their gradient is that
    of the logit minus this mean. So ``target.minus(expected_others(...))`` is what the log-odds are
    linear in at this run.

    Args:
        capture: The captured run.
        ids: The token that is left out, one id per prompt [batch].
        pos: Position of the prediction among the real tokens; −1 is the last.

    Returns:
        The functional of the weighted mean, for every prompt.
    """
    frame = capture.frame
    query = frame.index(pos)
    p = _without(capture, ids, pos).softmax(-1)
    value = (p * frame.cast(capture.logits_at(query))).sum(-1)
    weighted, rows = _weighted(capture, p, query), capture.unembed.rows
    return Target(("the others",) * frame.batch, query, *weighted, value, rows)


def _log_probability(
    capture: Capture, goal: Target, target: TargetLike, pos: int, predicted: Tensor | None
) -> Target:
    """The log-probability of a token whose logit is ``goal``: z_t − Σ p z, and −H(p)."""
    frame, query = capture.frame, goal.query
    prompts = torch.arange(frame.batch, device=frame.device)
    # In float64: where p_t is near 1, 1 − p_t would be mostly rounding.
    log_p = capture.logits_at(query).detach().double().log_softmax(-1)
    p = log_p.exp()
    if target is None:
        ids = own_prediction(capture, pos) if predicted is None else predicted
    else:
        ids = torch.full_like(query, resolve_token(capture, target))
    gradient = torch.nn.functional.one_hot(ids, p.shape[-1]) - p
    covector, constants = _weighted(capture, frame.cast(gradient), query)
    constants["softmax"] = frame.cast(-torch.special.entr(p).sum(-1))
    names = tuple(f"log p({name})" for name in goal.name)
    value, rows = frame.cast(log_p[prompts, ids]), capture.unembed.rows
    return Target(names, query, covector, constants, value, rows)


def as_direction(direction: Any, name: str) -> Tensor:
    """A direction as a tensor of one axis, detached."""
    try:
        u = torch.as_tensor(direction)
    except (TypeError, ValueError, RuntimeError):
        raise _no_target(direction, name) from None
    if u.ndim == 0:
        raise _no_target(direction, name)
    if u.is_complex() or not u.isfinite().all():
        what = "complex numbers" if u.is_complex() else "nan or inf"
        raise ValueError(f"{name}= is a direction with {what}. Pass finite real numbers.")
    return u.detach()


def _direction(capture: Capture, direction: Any, query: Tensor, y: Tensor, name: str) -> Target:
    """A direction in the logits [d_vocab] or in the residual [d_model], told apart by its width."""
    frame = capture.frame
    d_model, d_vocab = capture.unembed.in_dim, capture.unembed.out_dim
    u = as_direction(direction, name)
    if u.ndim != 1 or u.shape[0] not in (d_model, d_vocab):
        raise ValueError(
            f"{name}= of shape {list(u.shape)} is no direction of this model. Pass a "
            f"direction in logits [{d_vocab}] or in the final residual [{d_model}]."
        )
    if d_model == d_vocab and not capture.headless:
        raise ValueError(
            f"A direction [{d_model}] has two meanings, as d_model = d_vocab. Pass a token."
        )
    u = u.to(y)
    if u.shape[0] == d_model:
        covector = u.expand(frame.batch, -1)
        return Target(("residual direction",) * frame.batch, query, covector, {}, y @ u)
    weighted = _weighted(capture, u.expand(frame.batch, -1), query)
    logits = frame.cast(capture.logits_at(query))
    names, rows = ("logit direction",) * frame.batch, capture.unembed.rows
    return Target(names, query, *weighted, logits @ u, rows)


def _weighted(
    capture: Capture, weights: Float[Tensor, "batch d_vocab"], query: Tensor
) -> tuple[Float[Tensor, "batch d_model"], dict[str, Float[Tensor, " batch"]]]:
    """The covector and the constants of a weighted sum of logits, a soft cap's ratio held."""
    frame, unembed = capture.frame, capture.unembed
    ratio = unembed.ratio
    weights = weights * (take_row(ratio, query)[:, 0] if isinstance(ratio, Tensor) else ratio)
    covector = weights @ frame.cast(unembed.weights.W_U).T
    covector, constants = unembed.pull_head(covector, query)
    if (b_U := unembed.weights.b_U) is not None:
        constants["b_U"] = weights @ frame.cast(b_U)
    return covector, constants


def _without(capture: Capture, ids: Tensor, pos: int) -> Float[Tensor, "batch d_vocab"]:
    """The logits at a position, with one token's set to −inf."""
    frame = capture.frame
    query = frame.index(pos)
    return frame.cast(capture.logits_at(query)).scatter(1, ids[:, None], -torch.inf)


def _as_id(target: Any, name: str) -> int:
    try:
        if isinstance(target, bool):  # True is an int to Python, but no token id
            raise TypeError
        return operator_index(target)
    except TypeError:
        raise _no_target(target, name) from None


def _no_target(target: Any, name: str) -> ValueError:
    several = isinstance(target, list | tuple) and all(isinstance(one, str) for one in target)
    if several and target:
        return ValueError(
            f"{name}={target!r} names several tokens. Pass one, or one per prompt; attribute_many "
            "takes several, and attribute_sequence those that the prompt ends with."
        )
    return ValueError(
        f"{name}={target!r} of type {type(target).__name__} is no token and no direction. Pass a "
        "string, an integer or a one-dimensional tensor."
    )
