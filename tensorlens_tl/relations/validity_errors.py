"""Errors of the operator and of the Jacobian along directions from one prompt.

Let F be the real model from X to the final normalized residual, and T, c the operator at X. For a
step δ of the embedded prompt, two errors are measured, with norms over all positions:

    operator   r(δ) = ‖F(X + δ) − T (X + δ) − c‖ / ‖F(X + δ) − F(X)‖
    jacobian   ‖F(X + δ) − F(X) − J δ‖ / ‖F(X + δ) − F(X)‖, with J the real Jacobian at X

An error of 1 is that of predicting no change. T is *not* J: T holds patterns, scales and ratios,
which J differentiates. So the Jacobian's error goes to 0 with δ, while r goes to the limit
‖(J − T) δ‖ / ‖J δ‖. It is 0 only where nothing that is frozen depends on δ. The same limit for the
real model with one frozen part held tells how much that part accounts for. With all parts held, F
is the operator.

1. Differentiate the real model along every direction, as it is and with each part held.
2. Run the real model at X and at every X + δ, in one batch.
3. Compare with the operator and with the first order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..lens import TensorLens
from ..recording import HookEdit, LiveModel, hooked, live_models
from .held_model import FREEZABLE, hold_frozen

DIRECTION_KINDS = ("random", "swap", "steering")
"""Kinds of directions; see :func:`draw`."""
SIZES = tuple(round(10 ** (k / 4), 4) for k in range(-12, 2))
"""Sizes of δ, as shares of ‖X‖ at the positions that δ moves: 0.001 to 1.8, four a decade."""
LARGEST_ERROR = 0.1
"""The error at which a radius ends."""


@dataclass(frozen=True, eq=False)
class DirectionErrors:
    """Errors along some directions.

    Attributes:
        operator: Error r of the operator at every size [direction, size].
        jacobian: Error of the Jacobian's first order at every size [direction, size].
        limit: Limit of r as δ goes to 0 [direction].
        held: The same limit for the real model with a part held, by the part's name [direction].
    """

    operator: Float[Tensor, "direction size"]
    jacobian: Float[Tensor, "direction size"]
    limit: Float[Tensor, " direction"]
    held: dict[str, Float[Tensor, " direction"]]


def direction_errors(
    lens: TensorLens,
    model: Any,
    directions: Float[Tensor, "direction pos d_model"],
    sizes: Sequence[float] = SIZES,
    held: Sequence[str] = (),
) -> DirectionErrors:
    """Measure errors of the operator and of the Jacobian along directions from one prompt.

    Cost: a forward pass and a push per direction and size, and two backward passes for all
    directions. Every held part costs two backward passes more.

    Args:
        lens: Lens of one prompt.
        model: The host model of the lens; left as it was.
        directions: Step δ of size 1, for every direction.
        sizes: Factors by which δ is multiplied.
        held: Names of parts of the real model to hold, each in turn: some of
            :data:`FREEZABLE`, or "all".

    Returns:
        Both errors along every direction.

    Raises:
        ValueError: If the lens holds several prompts, a direction has another shape, is 0 or not
            finite, or a size is not above 0.
    """
    _check(lens, directions, sizes)
    with live_models(lens.capture, model) as (live,):
        # 1. Derivatives.
        x, delta = live.x.detach(), directions.to(live.x)
        steps = torch.tensor(sizes, dtype=torch.float64).to(x)[:, None, None, None] * delta
        tangent = _jacobian_product(live, delta)
        edits = {part: hold_frozen(live, FREEZABLE if part == "all" else (part,)) for part in held}
        tangents = {part: _jacobian_product(live, delta, edit) for part, edit in edits.items()}
        # 2. Both ends in one batch, so that the host rounds them alike.
        with torch.no_grad():
            ends = live.run(torch.cat([x, (x + steps).flatten(0, 1)]))
            live.checked(ends[:1])
    # 3. Errors, in the operator's dtype.
    cast = lens.capture.frame.cast
    change = cast(ends[1:] - ends[:1]).unflatten(0, steps.shape[:2])
    moved = lens.embedding + cast(steps)[:, :, None]
    # T (X + δ) + c − F(X): less F(X) as the host rounds it, like the change beside it.
    predicted = lens.operator.apply(moved) + lens.operator.bias - cast(ends[0])
    # J is linear, so one product per direction serves all sizes.
    first_order = torch.stack([size * cast(tangent) for size in sizes])
    pushed = lens.operator.apply(cast(directions)[:, None])[:, 0]

    def limit(jacobian: Tensor) -> Tensor:
        # ‖(J − T) δ‖ / ‖J δ‖: what r tends to, since F(X + δ) − F(X) → J δ.
        return _norm(cast(jacobian) - pushed) / _norm(cast(jacobian))

    return DirectionErrors(
        operator=(_norm(change - predicted[:, :, 0]) / _norm(change)).T,
        jacobian=(_norm(change - first_order) / _norm(change)).T,
        limit=limit(tangent),
        held={part: limit(found) for part, found in tangents.items()},
    )


def _norm(x: Tensor) -> Tensor:
    return x.flatten(-2).norm(dim=-1)


def _check(lens: TensorLens, directions: Tensor, sizes: Sequence[float]) -> None:
    if len(lens) != 1:
        raise ValueError(f"The lens holds {len(lens)} prompts. Take one with lens[i].")
    pos, d_model = lens.embedding.shape[1:]
    if directions.ndim != 3 or directions.shape[1:] != (pos, d_model) or len(directions) == 0:
        raise ValueError(
            f"directions must be [direction, {pos}, {d_model}], not {list(directions.shape)}. "
            "Give them the shape of lens.embedding, one for each direction."
        )
    if not bool(directions.isfinite().all()) or not bool((_norm(directions) > 0).all()):
        raise ValueError("A direction is 0 or not finite. Drop such directions.")
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise ValueError(
            f"sizes={list(sizes)} are not all above 0 and finite. Pass positive numbers."
        )


def _jacobian_product(
    live: LiveModel, directions: Tensor, edits: Iterable[HookEdit] = ()
) -> Tensor:
    """J δ for every direction, as the derivative of Jᵀ u by u: two backward passes."""
    x = live.x.detach().expand(len(directions), -1, -1).clone().requires_grad_()
    y = live.run(x, edits)
    u = torch.zeros_like(y, requires_grad=True)
    # Jᵀ u is linear in u, so its derivative by u along δ is J δ, at any u: 0 will do.
    (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
    (pushed,) = torch.autograd.grad((pulled * directions).sum(), u)
    return pushed.detach()


def draw(
    lens: TensorLens, model: Any, kind: str, seed: int, steer: Tensor | None = None
) -> tuple[Float[Tensor, "pos d_model"], float]:
    """Draw a direction of a kind, as large as X at the positions that the direction moves.

    "random" is a Gaussian vector at every position. "swap" leads, at one random position, from the
    token's embedding to another random token's. "steering" is one vector at every position.

    Args:
        lens: Lens of one prompt.
        model: The host model of the lens.
        kind: One of :data:`DIRECTION_KINDS`.
        seed: Seed of the draw.
        steer: Vector [d_model] for "steering".

    Returns:
        The direction, and the size at which it is the whole swap or the vector itself.

    Raises:
        ValueError: If there is no such kind, or no vector to steer with.
    """
    generator = torch.Generator().manual_seed(seed)
    x = lens.embedding[0]
    if kind == "random":
        delta = torch.randn(x.shape, generator=generator, device="cpu", dtype=torch.float64).to(x)
    elif kind == "steering" and steer is not None:
        delta = steer.to(x).expand_as(x)
    elif kind == "swap":
        pos = int(torch.randint(len(x), (), generator=generator, device="cpu"))
        ids = lens.capture.prompts.ids("swap").clone()
        d_vocab = lens.capture.unembed.weights.W_U.shape[1]
        # A step of 1 to d_vocab − 1 around the vocabulary never gives the same token.
        step = int(torch.randint(1, d_vocab, (), generator=generator, device="cpu"))
        ids[0, pos] = (ids[0, pos] + step) % d_vocab
        delta = torch.zeros_like(x)
        delta[pos] = (_embedded(lens, model, ids) - x)[pos]
    else:
        raise ValueError(
            f"{kind!r} is not a kind of direction, or steer= is missing. "
            f"Choose one of {', '.join(DIRECTION_KINDS)}, the last with a vector to steer with."
        )
    # Size 1 is the size of X where δ is not 0, so that kinds can be compared.
    touched = x[delta.norm(dim=-1) > 0].norm()
    whole = float(delta.norm() / touched)
    return delta / whole, whole


def _embedded(lens: TensorLens, model: Any, ids: Tensor) -> Tensor:
    """X of other tokens, as many as the prompt has."""
    seen: list[Tensor] = []
    with live_models(lens.capture, model) as (live,):
        entry = live.adapter.points()[0, "resid_pre"]
        with torch.no_grad(), hooked([(entry, seen.append)]):
            live.run(live.x, ids=ids)  # seen before the entry is replaced: this hook came first
    return lens.capture.frame.cast(seen[0])[0]


def radius(sizes: Sequence[float], errors: Sequence[float], limit: float) -> float:
    """Tell how far along a direction the error stays within :data:`LARGEST_ERROR`.

    Between sizes the error is taken as linear. At 0 it is ``limit``.

    Args:
        sizes: Sizes of the step, rising.
        errors: Errors at these sizes.
        limit: Error at size 0.

    Returns:
        The size at which the error first passes: 0 where ``limit`` already does, infinity where no
        error does.
    """
    before, low = 0.0, limit
    if limit > LARGEST_ERROR:
        return 0.0
    for size, error in zip(sizes, errors, strict=True):
        if error > LARGEST_ERROR:
            # Where the line from the last size within to the first one beyond meets the limit.
            return before + (size - before) * (LARGEST_ERROR - low) / (error - low)
        before, low = size, error
    return math.inf
