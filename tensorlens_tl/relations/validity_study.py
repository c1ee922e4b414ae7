"""Local validity: how far from its prompt the frozen operator tells what the real model would do.

With F the real model from X to the final normalized residual, and T, c the operator at X, moved by δ

    r(δ) = ‖F(X + δ) − T (X + δ) − c‖ / ‖F(X + δ) − F(X)‖

beside the real Jacobian's first-order error ‖F(X + δ) − F(X) − J δ‖ / ‖F(X + δ) − F(X)‖. Norms are over all
positions. T is *not* J: it holds patterns, scales and ratios that J derives. So the Jacobian's error goes to
0 with δ, while r goes to its limit ‖(J − T) δ‖ / ‖J δ‖, which is 0 only where nothing that is frozen depends
on δ. 1 is the error of saying that nothing changes. Which frozen part it is due to is told by the
limit for the real model with that part held, too: with all held, F is the operator and it is 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation import Estimate, bootstrap, median
from ..hosts import Edit, LiveModel, hooked, live_models
from ..lens import TensorLens
from ..plugin import capture
from .held_model import PARTS, holding

KINDS = ("random", "swap", "steering")
METHODS = ("operator", "jacobian")
SIZES = tuple(round(10 ** (k / 4), 4) for k in range(-12, 2))
"""Sizes of δ, as shares of ‖X‖ at the positions it moves: 0.001 to 1.8, four a decade."""
PASSES = 0.1
"""The error at whose passing a radius ends."""
FORMAT = "tensorlens_tl validity study 1"


@dataclass(frozen=True, eq=False)
class Curves:
    """Errors along some directions.

    Attributes:
        operator: r at every size [direction, size].
        jacobian: The Jacobian's first-order error.
        limit: Where r goes as δ goes to 0 [direction].
        held: The same for the real model with one of :data:`PARTS` held, or all.
    """

    operator: Float[Tensor, "direction size"]
    jacobian: Float[Tensor, "direction size"]
    limit: Float[Tensor, " direction"]
    held: dict[str, Float[Tensor, " direction"]]


def curves(
    lens: TensorLens,
    model: Any,
    directions: Float[Tensor, "direction pos d_model"],
    sizes: Sequence[float] = SIZES,
    held: Sequence[str] = (),
) -> Curves:
    """Errors of the operator and of the Jacobian along directions from one prompt.

    J δ is the derivative of Jᵀ u by u, times δ: two backward passes for all directions, and as many
    again for every part to be held. Cost besides: a forward pass and a push per direction and size.

    Args:
        lens: One prompt's.
        model: The host it came from; left as it was.
        directions: δ at size 1.
        sizes: What δ is multiplied by.
        held: Parts of :data:`PARTS`, or "all", each to be held in turn.

    Returns:
        The errors.

    Raises:
        ValueError: If the lens holds several prompts, the directions are no [direction, pos, d_model]
            of finite numbers or one is 0, or a size is not above 0.
    """
    _check(lens, directions, sizes)
    with live_models(lens.capture, model) as (live,):
        x, delta = live.x.detach(), directions.to(live.x)
        moved = torch.tensor(sizes, dtype=torch.float64).to(x)[:, None, None, None] * delta
        tangent = _jacobian_product(live, delta)
        edits = {part: holding(live, PARTS if part == "all" else (part,)) for part in held}
        tangents = {part: _jacobian_product(live, delta, edit) for part, edit in edits.items()}
        with torch.no_grad():
            # Both ends in one batch, so that the host rounds them alike.
            ends = live.run(torch.cat([x, (x + moved).flatten(0, 1)]))
            live.checked(ends[:1])
    cast = lens.capture.frame.cast
    change = cast(ends[1:] - ends[:1]).unflatten(0, moved.shape[:2])
    told = cast(moved)[:, :, None]
    told = lens.operator.apply(lens.embedding + told) + lens.operator.bias - cast(ends[0])
    first = torch.stack([size * cast(tangent) for size in sizes])
    pushed = lens.operator.apply(cast(directions)[:, None])[:, 0]

    def limit(jacobian: Tensor) -> Tensor:
        return _norm(cast(jacobian) - pushed) / _norm(cast(jacobian))

    return Curves(
        (_norm(change - told[:, :, 0]) / _norm(change)).T,
        (_norm(change - first) / _norm(change)).T,
        limit(tangent),
        {part: limit(found) for part, found in tangents.items()},
    )


def _norm(x: Tensor) -> Tensor:
    return x.flatten(-2).norm(dim=-1)


def _check(lens: TensorLens, directions: Tensor, sizes: Sequence[float]) -> None:
    if len(lens) != 1:
        raise ValueError(f"expected one prompt, got {len(lens)}: take one with lens[i]")
    shape = lens.embedding.shape[1:]
    if directions.ndim != 3 or directions.shape[1:] != shape or len(directions) == 0:
        raise ValueError(
            f"expected directions [direction, {shape[0]}, {shape[1]}], got {list(directions.shape)}: they "
            "are added to lens.embedding[0]"
        )
    if not bool(directions.isfinite().all()) or not bool((_norm(directions) > 0).all()):
        raise ValueError("expected directions of finite numbers, none of them 0: leave such out")
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"expected finite sizes above 0, got {list(sizes)}")


def _jacobian_product(live: LiveModel, directions: Tensor, edits: Iterable[Edit] = ()) -> Tensor:
    """J δ for every direction, by differentiating a pull: the adjoint's own adjoint."""
    x = live.x.detach().expand(len(directions), -1, -1).clone().requires_grad_()
    y = live.run(x, edits)
    u = torch.zeros_like(y, requires_grad=True)
    (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
    (pushed,) = torch.autograd.grad((pulled * directions).sum(), u)
    return pushed.detach()


def draw(
    lens: TensorLens, model: Any, kind: str, seed: int, steer: Tensor | None = None
) -> tuple[Float[Tensor, "pos d_model"], float]:
    """A direction of a kind, as large as X at the positions it moves.

    "random": a Gaussian vector at every position. "swap": at one random position, from its token's
    embedding to a random other token's, as the host embeds it. "steering": one vector at every
    position.

    Args:
        lens: One prompt's.
        model: The host it came from.
        kind: One of :data:`KINDS`.
        seed: Of the draw.
        steer: The vector, for "steering".

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
        ids = lens.capture.prompts.tokens.clone()
        d_vocab = lens.capture.unembed.weights.W_U.shape[1]
        step = int(torch.randint(1, d_vocab, (), generator=generator, device="cpu"))
        ids[0, pos] = (ids[0, pos] + step) % d_vocab
        delta = torch.zeros_like(x)
        delta[pos] = (_embedded(lens, model, ids) - x)[pos]
    else:
        raise ValueError(
            f"expected a kind of {', '.join(KINDS)}, the last with a vector to steer with, got {kind!r}"
        )
    touched = x[delta.norm(dim=-1) > 0].norm()
    whole = float(delta.norm() / touched)
    return delta / whole, whole


def _embedded(lens: TensorLens, model: Any, ids: Tensor) -> Tensor:
    """X of other tokens of the same number."""
    seen: list[Tensor] = []
    with live_models(lens.capture, model) as (live,):
        entry = live.adapter.points()[0, "resid_pre"]
        with torch.no_grad(), hooked([(entry, seen.append)]):
            live.run(live.x, ids=ids)  # seen before the entry's replacement: put on first
    return lens.capture.frame.cast(seen[0])[0]


def radius(sizes: Sequence[float], errors: Sequence[float], limit: float) -> float:
    """How far along a direction the error stays within :data:`PASSES`: its first passing.

    Between sizes the error is taken as linear, and at 0 as its limit.

    Args:
        sizes: Rising.
        errors: At these sizes.
        limit: At 0.

    Returns:
        The radius: 0 where the limit is above, infinity where no size is.
    """
    before, low = 0.0, limit
    if limit > PASSES:
        return 0.0
    for size, error in zip(sizes, errors, strict=True):
        if error > PASSES:
            return before + (size - before) * (PASSES - low) / (error - low)
        before, low = size, error
    return math.inf


@dataclass(frozen=True)
class Curve:
    """What one prompt and kind of direction gave.

    Attributes:
        kind: One of :data:`KINDS`.
        operator: r at every size.
        jacobian: The Jacobian's first-order error.
        limit: Where r goes as δ goes to 0.
        held: The same with parts of the real model held.
        whole: The size at which δ is the whole swap, or the steering vector as it is.
    """

    kind: str
    operator: tuple[float, ...]
    jacobian: tuple[float, ...]
    limit: float
    held: dict[str, float]
    whole: float


@dataclass(frozen=True)
class ValidityStudy:
    """Curves of many prompts, and what they come to.

    Attributes:
        model: The model's name.
        dtype: Its dtype.
        seed: Of the directions.
        n: How many prompts.
        sizes: Sizes of δ.
        rows: A curve per prompt and kind.
    """

    model: str
    dtype: str
    seed: int
    n: int
    sizes: tuple[float, ...]
    rows: tuple[Curve, ...]

    def select(self, kind: str) -> list[Curve]:
        """The curves of a kind, one per prompt.

        Args:
            kind: One of :data:`KINDS`.

        Returns:
            The curves.

        Raises:
            ValueError: If there is none.
        """
        if not (found := [row for row in self.rows if row.kind == kind]):
            raise ValueError(f"expected a kind of {', '.join(self.kinds)}, got {kind!r}")
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of directions there are."""
        return tuple(dict.fromkeys(row.kind for row in self.rows))

    def error(self, kind: str, method: str, size: float) -> Estimate:
        """The median error over prompts at a size.

        Args:
            kind: As in :meth:`select`.
            method: One of :data:`METHODS`.
            size: One of the sizes.

        Returns:
            The median and its 95 % interval over prompts.
        """
        at = self.sizes.index(size)
        return bootstrap([getattr(row, method)[at] for row in self.select(kind)], median)

    def limit(self, kind: str, held: str | None = None) -> Estimate:
        """The median over prompts of where r goes as δ goes to 0; the Jacobian's error goes to 0.

        Args:
            kind: As in :meth:`select`.
            held: A part of the real model that is held, or "all".

        Returns:
            The median and its 95 % interval over prompts.
        """
        rows = self.select(kind)
        return bootstrap([row.limit if held is None else row.held[held] for row in rows], median)

    def radius(self, kind: str, method: str) -> Estimate:
        """The median over prompts of the :func:`radius` of 10 %.

        Args:
            kind: As in :meth:`select`.
            method: One of :data:`METHODS`.

        Returns:
            The median and its 95 % interval over prompts.
        """
        return bootstrap(
            [
                radius(self.sizes, getattr(r, method), r.limit if method == "operator" else 0.0)
                for r in self.select(kind)
            ],
            median,
        )

    def crossing(self, kind: str) -> float | None:
        """The smallest size from which on the operator's median error is below the Jacobian's, or None."""
        found = None
        for size in reversed(self.sizes):
            ours, theirs = (self.error(kind, method, size).value for method in METHODS)
            if ours >= theirs:
                break
            found = size
        return found

    def __repr__(self) -> str:
        lines = [f"ValidityStudy({self.model}, {self.n} prompts, {self.dtype})"]
        lines.append(
            f"  {'median error at ‖δ‖/‖X‖':<24}" + "".join(f"{s:>8.3g}" for s in self.sizes)
        )
        for kind in self.kinds:
            for method in METHODS:
                cells = [f"{self.error(kind, method, size).value:>8.3f}" for size in self.sizes]
                lines.append(f"  {kind + ', ' + method:<24}" + "".join(cells))
                lines.append(f"{'':>6}10 % is passed at {self.radius(kind, method)}")
            lines.append(f"{'':>6}the operator's error at δ → 0: {self.limit(kind)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything as JSON, curves to five digits; :meth:`from_json` reads it."""
        rows = [{name: _rounded(value) for name, value in asdict(row).items()} for row in self.rows]
        return json.dumps({"format": FORMAT} | asdict(self) | {"rows": rows}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ValidityStudy:
        """Read what :meth:`to_json` wrote.

        Returns:
            The study.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("it has another format")
            rows = tuple(
                Curve(**row | {method: tuple(row[method]) for method in METHODS})
                for row in data.pop("rows")
            )
            return cls(rows=rows, sizes=tuple(data.pop("sizes")), **data)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected JSON with the format {FORMAT!r}, as ValidityStudy.to_json writes: {error}"
            ) from None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def validity(
    model: Any,
    prompts: Sequence[Any],
    kinds: Sequence[str] = KINDS,
    sizes: Sequence[float] = SIZES,
    seed: int = 0,
    held: Sequence[str] = (),
    progress: bool = True,
    **kwargs: Any,
) -> ValidityStudy:
    """Measure both errors along one direction of each kind from each prompt.

    The steering vector of a prompt is the difference of two other prompts' mean embedded token. In
    float32 the smallest sizes are near the model's own rounding: a float64 model tells them better.

    Args:
        model: As for :func:`tensorlens_tl.capture`.
        prompts: Strings, or token ids [pos].
        kinds: Of :data:`KINDS`.
        sizes: Sizes of δ, rising, as shares of ‖X‖ at the positions it moves.
        seed: Of the directions.
        held: As for :func:`curves`.
        progress: Whether to show a bar, a step a prompt.
        **kwargs: For the capture.

    Returns:
        The study.

    Raises:
        ValueError: If there are fewer than three prompts, a kind does not exist, the sizes do not
            rise from above 0, or the model is in half precision.
    """
    if isinstance(prompts, str) or len(prompts) < 3:
        raise ValueError(f"expected a list of at least three prompts, got {prompts!r}")
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"expected kinds of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    if not sizes or sizes[0] <= 0 or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"expected sizes that rise from above 0, got {list(sizes)}")
    with torch.no_grad():
        lenses = [capture(model, prompt, **kwargs)[1] for prompt in prompts]
    dtype = lenses[0].logits.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected a model in float32 or float64, got {dtype}, whose rounding hides small δ: "
            "model.to(torch.float32)"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, lens in enumerate(tqdm(lenses, desc="validity", disable=not progress)):
        a, b = (
            j + (j >= i)
            for j in torch.randperm(len(lenses) - 1, generator=generator, device="cpu")[:2].tolist()
        )
        steer = lenses[a].embedding[0].mean(0) - lenses[b].embedding[0].mean(0)
        drawn = [draw(lens, model, kind, seed + i, steer) for kind in kinds]
        found = curves(lens, model, torch.stack([delta for delta, _ in drawn]), sizes, held)
        for row, (kind, (_, whole)) in enumerate(zip(kinds, drawn, strict=True)):
            ours, theirs = found.operator[row].tolist(), found.jacobian[row].tolist()
            limits = {part: float(values[row]) for part, values in found.held.items()}
            limit = float(found.limit[row])
            rows.append(Curve(kind, tuple(ours), tuple(theirs), limit, limits, whole))
    name = str(dtype).removeprefix("torch.")
    return ValidityStudy(
        lenses[0].capture.model_name, name, seed, len(lenses), tuple(sizes), tuple(rows)
    )
