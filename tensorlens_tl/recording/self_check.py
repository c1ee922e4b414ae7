"""The check that a capture makes of itself, while it runs.

1. Every product that the operator will use is compared with the run's own activations under a
   random projection (Freivalds 1977). For y = x W + b and a random r, y·r = x·(W r) + b·r. That
   costs O(pos · d) once W r is known, and W r is kept per model until the weight changes.
2. A branch is checked by what it adds to the residual: attention as Σ_h A_h N(x) (W_V^h W_O^h r).
3. Its values and z are looked at only once that is wrong, to tell where the mistake is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..costs import forgets
from ..maps import TINY, Frame, Norm, NormWeights, version
from ..operator import CaptureMismatchError, tolerance
from ..refusals import not_finite, plain_name
from ..sublayers import AnyMix, AttentionWeights

_SAMPLE = 16
"""Positions at which an activation is compared: it is the same function everywhere."""

_ROUNDINGS = 2
"""Units of rounding by which a mean and a sum over the width may be off, in all.

A sum of d terms in blocks is off by about a unit of its terms' norm, whatever d is.
"""

Suspect = tuple[str, Tensor, Callable[[], Tensor]]
Rounding = Callable[[], Tensor | float]
"""What rounding alone may have made of a product [batch, pos]; asked for when one is refused."""

_products: WeakKeyDictionary[Any, dict] = forgets(WeakKeyDictionary())
"""Products that weights alone decide, by model; they are dropped with the model."""


@forgets
@cache
def _probe(*shape: int) -> Tensor:
    # Normal numbers, not signs: under ±1 an edit that moves δ from one coordinate to another is
    # invisible with probability ½, under a continuous probe with probability 0.
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float64
    )


def _without_grad(function: Callable) -> Callable:
    # A block asks for many small numbers, and torch.no_grad costs more than some of them.
    inside = torch.no_grad()(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (inside if torch.is_grad_enabled() else function)(*args, **kwargs)

    return call


class SelfCheck:
    """Collect the relative errors of the run's products under random projections.

    Args:
        model: The host model; what is kept of its weights goes with it.
        frame: Spans of real tokens, positions, compute dtype and device of the run.
        model_dtype: The model's own dtype, which decides what is tolerated.
    """

    def __init__(self, model: Any, frame: Frame, model_dtype: torch.dtype):
        self.model, self.frame, self.real = model, frame, frame.real
        self.whole_rows = all(span == (0, frame.n_pos) for span in frame.spans)
        self.per_row = 1 / math.sqrt(frame.batch * frame.n_pos)
        self.tolerance = tolerance(model_dtype, frame.dtype)
        # A state rounds at its own size: in half precision that hides small changes.
        self.rounding = 1.0 if model_dtype in (torch.bfloat16, torch.float16) else 0.05
        # Hosts compute norms in float32 at least, and the operator in its own dtype.
        norms = frame.dtype, torch.promote_types(model_dtype, torch.float32)
        self.unit = max(torch.finfo(dtype).eps for dtype in norms)
        self.errors: dict[str, float] = {}
        self._names: list[str] = []
        self._errors: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._roundings: list[Rounding] = []
        self._suspects: list[Suspect] = []
        self._states: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        self.remembered = False
        self._known = _products.setdefault(model, {})

    # --- Projections

    def probe(self, *shape: int) -> Tensor:
        """A fixed random covector of this shape, in the compute dtype."""
        key = ("probe", *shape, self.frame.dtype, self.frame.device)
        if key not in self._known:
            self._known[key] = _probe(*shape).to(self.frame.zeros(0))
        return self._known[key]

    def cached_product(
        self, name: str, parts: tuple[Tensor | NormWeights | None, ...], compute: Callable
    ) -> Any:
        """Look up what the weights alone decide; compute it anew when a weight has changed.

        Args:
            name: Name that tells this product from others of the same weights.
            parts: The model's own parameters and norms that the product is made of.
            compute: Function without arguments that makes the product.

        Returns:
            The product, which serves every prompt.
        """
        # A change shows in the storage, or in the version that torch counts up at every write.
        key: list[Any] = [name, self.frame.dtype, self.frame.device]
        versions: list[int] = []
        for part in parts:
            if isinstance(part, NormWeights):
                key += [part.center, part.offset]
            for W in (part.w, part.b) if isinstance(part, NormWeights) else (part,):
                key.append(W if W is None else (W.data_ptr(), W.shape, W.stride()))
                versions.append(0 if W is None else version(W))
        if (known := self._known.get(tuple(key))) is None or known[0] != versions:
            known = self._known[tuple(key)] = versions, compute()
        else:
            self.remembered = True
        return known[1]

    def forget(self) -> None:
        """Drop all cached products, and all notes: an edit through ``.data`` changes no version."""
        self._known.clear()
        self._names, self._errors, self._sizes, self._suspects = [], [], [], []
        self._roundings, self._states, self.remembered = [], [], False

    @_without_grad
    def state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Projection and norm of a residual state, each [batch, pos]."""
        # Every state is asked for twice: after one block, and before the next.
        for known, measured in self._states:
            if known is x:
                return measured
        measured = x @ self.probe(x.shape[-1]), torch.linalg.vector_norm(x, dim=-1)
        self._states = [*self._states[-1:], (x, measured)]
        return measured

    @_without_grad
    def project(self, x: Tensor) -> Tensor:
        """The projection x · r of a state or of what is added to one."""
        return x @ self.probe(x.shape[-1])

    def through(self, norm: NormWeights | None, p: Tensor) -> tuple[Tensor, Tensor | float]:
        """Pull a covector p [d, …] through a norm, but for its scale: C(w ⊙ p), and b · p."""
        if norm is None:
            return p, 0.0
        gain = norm.gain
        if gain is not None:
            p_gain = self.frame.cast(gain)
            c = p * (p_gain if p.ndim == 1 else p_gain[:, None])
        else:
            c = p
        return c - c.mean(0) if norm.center else c, self.dot(norm.b, p)

    def dot(self, b: Tensor | None, p: Tensor) -> Tensor | float:
        """The product b · p, or 0 where there is no bias."""
        return 0.0 if b is None else self.frame.cast(b) @ p

    def of_the_mean(self, norm: Norm | None, x: Tensor, p: Tensor) -> Tensor | float:
        """What rounding of the mean, and of the projection, makes of a product with N(x).

        Either is off by some units u of the row's own length. LayerNorm then divides by its scale,
        which may be as small as √ε: the product is off by u ‖x‖ ‖w ⊙ p‖ / s. In a row without a
        large mean that is u of the product's size, which no comparison notices.

        Args:
            norm: The frozen norm, or None.
            x: The residual that the norm reads [batch, pos, d_model].
            p: Covectors after the norm [d_model] or [d_model, head].

        Returns:
            The largest error [batch, pos] or [batch, pos, head]; 0 where no mean is subtracted.
        """
        if norm is None or not norm.weights.center:
            return 0.0
        gain = norm.weights.gain
        rows = p if p.ndim == 1 else p.mT  # one covector, or one per head
        rows = rows if gain is None else rows * self.frame.cast(gain)
        unit = _ROUNDINGS * self.unit * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        found = unit / norm.scale * torch.linalg.vector_norm(rows, dim=-1)
        return found.squeeze(-1) if p.ndim == 1 else found

    # --- Judging

    @_without_grad
    def compare(
        self,
        name: str,
        seen: Tensor,
        predicted: Tensor,
        size: Tensor,
        rounding: Rounding = float,
    ) -> None:
        """Note |seen − predicted| / size for every position.

        A row much smaller than the largest one is measured against a hundredth of that one. Rows
        that cancel to nearly nothing are no errors.

        Args:
            name: What is compared, for messages.
            seen: Projection of the run's activation [batch, pos].
            predicted: Projection of the operator's prediction [batch, pos].
            size: Size of a relative error of 1 [batch, pos].
            rounding: What rounding alone may have made of it.
        """
        self.note(name, (seen - predicted).abs(), size, rounding)

    def note(self, name: str, errors: Tensor, sizes: Tensor, rounding: Rounding = float) -> None:
        """Note errors of a product and the sizes of a relative error of 1, both [batch, pos]."""
        self._names.append(name)
        self._errors.append(errors)
        self._sizes.append(sizes)
        self._roundings.append(rounding)

    def check_later(self, name: str, seen: Tensor, predict: Callable[[], Tensor]) -> None:
        """Remember an inner prediction. It is made only if the output is wrong, to tell where."""
        self._suspects.append((name, seen, predict))

    @_without_grad
    def check_block(self, hooked: Callable[[], list[str]]) -> None:
        """Judge what was noted since the last call, usually one block.

        Args:
            hooked: Function that names the hook points with hooks of the user's own.

        Raises:
            CaptureMismatchError: If an error passes the tolerance; the message names the place.
            ValueError: If a real token's activations are not finite.
        """
        if not self._names:  # a block whose every product the user edited
            return
        sizes = torch.stack(self._sizes)  # [product, batch, pos]
        sizes = sizes + (0.01 * sizes.amax((1, 2), keepdim=True) + TINY)
        differences = torch.stack(self._errors)
        errors = differences / sizes
        errors = errors if self.whole_rows else torch.where(self.real, errors, 0)
        errors = errors.amax((1, 2)).tolist()
        names, suspects, roundings = self._names, self._suspects, self._roundings
        self._names, self._errors, self._sizes, self._suspects = [], [], [], []
        self._roundings = []
        for i, name in enumerate(names):
            if not math.isfinite(errors[i]):
                raise ValueError(not_finite(name, self.model))
            if errors[i] > self.tolerance:
                beyond = (differences[i] - roundings[i]()).clamp_min(0) / sizes[i]
                errors[i] = float(torch.where(self.real, beyond, 0).max())
            if errors[i] > self.tolerance:
                at = ", ".join(dict.fromkeys(map(plain_name, hooked())))
                remedy = (
                    f"Take off your own hooks at {at}: an edit there is not served."
                    if at
                    else "Likely causes, in this order: a module there was replaced or patched, "
                    "the model's configuration has an option that is not known here, or the "
                    "weights are laid out in another way. Load the plain model, or report it."
                )
                raise CaptureMismatchError(
                    f"{self._culprit(name, suspects)}: the run differs from what the operator "
                    f"predicts by {errors[i]:.1e} (relative; expected are at most "
                    f"{self.tolerance:.0e}). {remedy}"
                )
        self.errors.update(zip(names, errors, strict=True))

    def _culprit(self, name: str, suspects: list[Suspect]) -> str:
        for suspect, seen, predict in suspects if "output" in name else []:
            predicted = predict()
            if seen.shape != predicted.shape:  # a host that repeats grouped values
                continue
            off = (seen - predicted)[self.real].abs().max()
            if off > self.tolerance * seen[self.real].abs().max():
                return suspect
        return name

    # --- What is compared, per sublayer

    @_without_grad
    def attention(
        self,
        norm: Norm | None,
        x: Tensor,
        mix: AnyMix,
        w: AttentionWeights,
        post: Norm | None,
    ) -> tuple[Tensor, Rounding]:
        """Predict what attention adds: post(Σ_h A_h (N(x) W_V^h + b_V) W_O^h + b_O) · r.

        Args:
            norm: The frozen norm before attention, or None.
            x: The residual that attention reads [batch, pos, d_model].
            mix: The frozen attention over positions.
            w: Attention weights of the block.
            post: The frozen norm after attention, or None.

        Returns:
            The projection of what is added to the residual [batch, pos], and what rounding may
            have made of it.
        """
        before, after = affine(norm), affine(post)

        def heads() -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
            grouped = w.W_O.unflatten(0, (w.W_V.shape[0], -1))  # [kv_head, repeat, d_head, d_model]
            r, end = self.through(after, self.probe(w.W_O.shape[-1]))
            out = self.frame.cast(grouped) @ r
            # As rows: a matrix times a single column runs at half the memory's speed.
            both = (out @ self.frame.cast(w.W_V).mT).flatten(0, 1).T  # [d_model, head]
            return both, out, r, end

        def compute() -> tuple:
            both, out, r, end = heads()
            start, c = self.through(before, both)
            if w.b_V is not None:
                c = c + (out @ self.frame.cast(w.b_V)[..., None]).flatten()
            return start, c, self.dot(w.b_O, r), end

        parts = (w.W_V, w.b_V, w.W_O, w.b_O, before, after)
        start, c, b_O, end = self.cached_product("attention", parts, compute)
        values = x @ start if norm is None else (x @ start).div_(norm.scale)  # [batch, pos, head]
        values.add_(c)
        mixed = mix.sum_heads(values) + b_O

        def rounding() -> Tensor | float:
            off = self.of_the_mean(norm, x, heads()[0])
            off = mix.sum_heads(off) if isinstance(off, Tensor) else off
            return off if post is None else off / post.scale.squeeze(-1)

        return (mixed if post is None else mixed / post.scale.squeeze(-1) + end), rounding

    @_without_grad
    def linear(
        self, name: str, norm: Norm | None, x: Tensor, seen: Tensor, W: Tensor, b: Tensor | None
    ) -> None:
        """Compare pre-activations, or logits, with N(x) W + b."""
        before, r = affine(norm), self.probe(W.shape[1])

        def compute() -> tuple:
            start, c = self.through(before, self.frame.cast(W) @ r)
            # A normalized row has length √d: the size of the terms, that may cancel.
            return start, c + self.dot(b, r), 0.01 * math.sqrt(len(start)) * start.norm()

        start, c, terms = self.cached_product("linear", (W, b, before), compute)
        predicted = x @ start if norm is None else (x @ start).div_(norm.scale.squeeze(-1))
        off = (seen @ r).sub_(c)
        # E ⟨row, r⟩² = ‖row‖²: the projections tell the rows' size; a bias may dwarf them.
        rows = off if self.whole_rows else torch.where(self.real, off, 0)
        size = torch.linalg.vector_norm(rows) * self.per_row + terms

        def rounding() -> Tensor | float:
            return self.of_the_mean(norm, x, self.frame.cast(W) @ r)

        self.note(name, (off - predicted).abs_(), size.expand_as(off), rounding)

    @_without_grad
    def activation(self, name: str, seen: Tensor, post: Callable[[slice], Tensor]) -> None:
        """Compare post-activations at evenly spaced positions up to the last.

        Args:
            name: What is compared, for messages.
            seen: The post-activations of the run [batch, pos, d_mlp].
            post: Computes them at some positions.
        """
        n_pos = self.frame.n_pos
        step = max(1, n_pos // _SAMPLE)
        if step == 1:
            errors = ((seen - post(slice(None))) @ self.probe(seen.shape[-1])).abs_()
            self.note(name, errors, torch.linalg.vector_norm(seen, dim=-1))
            return
        rows = slice((n_pos - 1) % step, None, step)
        errors = torch.zeros_like(self.real, dtype=self.frame.dtype)
        sizes = torch.zeros_like(errors)
        errors[:, rows] = ((seen[:, rows] - post(rows)) @ self.probe(seen.shape[-1])).abs()
        sizes[:, rows] = torch.linalg.vector_norm(seen[:, rows], dim=-1)
        self.note(name, errors, sizes)

    @_without_grad
    def output(self, W: Tensor, b: Tensor | None, post: Norm | None, x: Tensor) -> Tensor:
        """Predict what an MLP adds, post(x W + b) · r, as a projection [batch, pos]."""
        after = affine(post)

        def compute() -> tuple:
            r, end = self.through(after, self.probe(W.shape[-1]))
            return self.frame.cast(W) @ r, self.dot(b, r), end

        start, c, end = self.cached_product("output", (W, b, after), compute)
        added = x @ start + c
        return added if post is None else added / post.scale.squeeze(-1) + end

    @_without_grad
    def residual(
        self, name: str, before: Tensor, after: Tensor, added: Tensor, rounding: Rounding = float
    ) -> None:
        """Compare the next state with the last one plus what the branches add."""
        (was, before_size), (seen, after_size) = self.state(before), self.state(after)
        change = seen - was
        # The difference rounds at the size of both states, so that counts a little, too.
        size = torch.maximum(before_size, after_size)
        size = torch.add(change.abs(), size, alpha=self.rounding)
        self.compare(name, change, added, size, rounding)

    @_without_grad
    def whole(self, name: str, seen: Tensor, predicted: Tensor) -> None:
        """Compare an activation with what the frozen maps make of the residual."""
        r = self.probe(seen.shape[-1])
        self.compare(name, seen @ r, predicted @ r, torch.linalg.vector_norm(seen, dim=-1))

    @_without_grad
    def same(self, name: str, seen: Tensor, predicted: Tensor) -> None:
        """Compare two residual states that should be one."""
        projected, size = self.state(seen)
        self.compare(name, projected, predicted @ self.probe(predicted.shape[-1]), size)


def affine(norm: Norm | None) -> NormWeights | None:
    """The weights of a norm, or None where there is no norm."""
    return None if norm is None else norm.weights
