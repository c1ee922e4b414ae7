"""The check that a capture makes of itself, while it runs.

Every product the operator will use is compared with the run's own activations under a few random
projections (Freivalds 1977): for y = x W + b and signs R [d, 4], y R = x (W R) + b R. That costs
O(pos · d) once W R is known, and W R is kept per model until the weight changes. The projections
also tell the size of what is compared: E ‖y R‖² = 4 ‖y‖².
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .linear_map import Frame
from .primitives import Norm
from .weights import AttentionWeights


class CaptureMismatchError(ValueError):
    """What the operator would compute is not what the run computed; the message names where."""


_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative error at which a product is refused, by the model's dtype. Hosts compute norms in
float32 inside float64 models, which alone costs 1e-7."""

_TINY = 1e-30
PROBES = 4

Suspect = tuple[str, Tensor, Callable[[], Tensor]]

_products: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()


@cache
def _signs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


class SelfCheck:
    """Collects the relative errors of the run's products under random projections."""

    def __init__(self, model: Any, frame: Frame, model_dtype: torch.dtype):
        self.frame, self.real = frame, frame.real
        self.tolerance = _TOLERANCE.get(model_dtype, 1e-4)
        self.errors: dict[str, float] = {}
        self._names: list[str] = []
        self._errors: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._suspects: list[Suspect] = []
        self._states: list[tuple[Tensor, Tensor]] = []
        self._scratch: Tensor | None = None
        self._known = _products.setdefault(model, {})

    # --- Projections

    def signs(self, *shape: int) -> Tensor:
        """Fixed random signs [*shape, probe] in the compute dtype."""
        key = ("signs", *shape, self.frame.dtype, self.frame.device)
        if key not in self._known:
            self._known[key] = _signs(*shape, PROBES).to(self.frame.zeros(0))
        return self._known[key]

    def kept(self, name: str, weights: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
        """A product of weights and signs, computed anew when a weight's storage or version changes.

        Args:
            name: Tells it from other products of the same weights.
            weights: Parameters of the model.
            compute: Makes it.

        Returns:
            The product, for use with every prompt.
        """
        key = (name, self.frame.dtype, self.frame.device)
        key += tuple((W.data_ptr(), W.shape, W.stride(), W.dtype) for W in weights)
        versions = tuple(W._version for W in weights)
        if key not in self._known or self._known[key][0] != versions:
            self._known[key] = versions, compute()
        return self._known[key][1]

    def into(self, W: Tensor) -> Tensor:
        """The product W R of a matrix [d_in, d_out], kept."""
        r = self.signs(W.shape[-1])
        return self.kept("W R", (W,), lambda: self.frame.cast(W) @ r)

    def state(self, x: Tensor) -> Tensor:
        """A residual state's projections; it is asked for once as "after" and once as "before"."""
        for known, projected in self._states:
            if known is x:
                return projected
        self._states = [*self._states[-1:], (x, x @ self.signs(x.shape[-1]))]
        return self._states[-1][1]

    def times(self, a: Tensor, b: Tensor) -> Tensor:
        """The product a ⊙ b, in a buffer that the next call overwrites."""
        if self._scratch is None or self._scratch.shape != a.shape:
            self._scratch = torch.empty_like(a)
        return torch.mul(a, b, out=self._scratch)

    def through_norm(self, norm: Norm | None, x: Tensor, p: Tensor) -> Tensor:
        """N(x) p, from x alone: (x · C(w ⊙ p)) / s + b p, with p [d, probe]."""
        if norm is None:
            return x @ p
        y = (x @ self.before_norm(norm, p)) / norm.scale
        return y + self.dot(norm.weights.b, p)

    def dot(self, b: Tensor | None, r: Tensor) -> Tensor | float:
        """The product b R, or 0 where there is no bias."""
        return 0.0 if b is None else self.frame.cast(b) @ r

    # --- Judging

    def compare(
        self, name: str, seen: Tensor, predicted: Tensor, size: Tensor | None = None
    ) -> None:
        """Note ‖seen − predicted‖ / ‖seen‖ over the probes, for every position.

        A row much smaller than the largest one is measured against a hundredth of that: rows that
        cancel to nearly nothing are no errors.

        Args:
            name: What is compared.
            seen: The run's, [batch, pos, ..., probe].
            predicted: The operator's.
            size: Norms to measure by, where not those of ``seen``.
        """
        error = (seen - predicted).flatten(2).norm(dim=-1)
        self._names.append(name)
        self._errors.append(error)
        self._sizes.append(seen.flatten(2).norm(dim=-1) if size is None else size)

    def suspect(self, name: str, seen: Tensor, predict: Callable[[], Tensor]) -> None:
        """Remember an inner prediction, to be made only if the output is wrong: it tells where."""
        self._suspects.append((name, seen, predict))

    def settle(self, hooked: Callable[[], list[str]]) -> None:
        """Judge what was noted since the last call.

        Args:
            hooked: Tells which hook points carry the user's own hooks.

        Raises:
            CaptureMismatchError: If an error passes the tolerance; names the first place.
            ValueError: If a real token's activations are not finite.
        """
        sizes = torch.stack(self._sizes)  # [product, batch, pos]
        sizes = sizes + 0.01 * sizes.amax((1, 2), keepdim=True) + _TINY
        errors = torch.where(self.real, torch.stack(self._errors) / sizes, 0)
        errors = errors.flatten(1).amax(-1).tolist()
        names, suspects = self._names, self._suspects
        self._names, self._errors, self._sizes, self._suspects = [], [], [], []
        for name, error in zip(names, errors, strict=True):
            if not math.isfinite(error):
                raise ValueError(
                    f"{name}: a real token's activations are not finite; float64 or float16 with "
                    "left padding is the usual cause: use float32, right padding, or single prompts"
                )
            if error > self.tolerance:
                self._known.clear()
                where = ", ".join(hooked())
                cause = (
                    f"hooks of your own at {where} may have edited it, which is not served yet"
                    if where
                    else "the weights as read are not those the model used, or the model computes "
                    "something else there"
                )
                raise CaptureMismatchError(
                    f"{self._culprit(name, suspects)}: the run's activations differ from what the "
                    f"operator predicts by {error:.1e} (relative; expected at most "
                    f"{self.tolerance:.0e}): {cause}"
                )
        self.errors.update(zip(names, errors, strict=True))

    def _culprit(self, name: str, suspects: list[Suspect]) -> str:
        for suspect, seen, predict in suspects if "output" in name else []:
            off = (seen - predict())[self.real].abs().max()
            if off > self.tolerance * seen[self.real].abs().max():
                return suspect
        return name

    # --- What is compared, per sublayer

    def attention(
        self, norm: Norm | None, x: Tensor, pattern: Tensor, w: AttentionWeights, post: Norm | None
    ) -> Tensor:
        """Projections of what attention adds, post(Σ_h A_h (N(x) W_V^h + b_V) W_O^h + b_O) R.

        W_V^h W_O^h R is known beforehand, so neither values nor z are needed.

        Returns:
            [batch, pos, probe].
        """
        kv_heads, repeat = w.W_V.shape[0], w.W_O.shape[0] // w.W_V.shape[0]
        W_V, W_O = w.W_V, w.W_O.unflatten(0, (kv_heads, repeat))
        r = self.signs(W_O.shape[-1])
        c = r if post is None else self.before_norm(post, r)

        def onto_probes() -> Tensor:
            return torch.einsum("grem,mk->grek", self.frame.cast(W_O), c)

        def through_values() -> Tensor:
            return torch.einsum("gde,grek->dgrk", self.frame.cast(W_V), out)

        if post is None:
            out = self.kept("W_O R", (W_O,), onto_probes)
            both = self.kept("W_V W_O R", (W_V, W_O), through_values)
        else:
            out = onto_probes()
            both = through_values()
        values = self.through_norm(norm, x, both.flatten(1)).unflatten(-1, both.shape[1:])
        if w.b_V is not None:
            values = values + torch.einsum("ge,grek->grk", self.frame.cast(w.b_V), out)
        grouped = pattern.unflatten(1, (kv_heads, repeat))
        mixed = torch.einsum("bgrqk,bkgre->bqe", grouped, values) + self.dot(w.b_O, c)
        return (
            mixed
            if post is None
            else mixed / post.scale + self.dot(post.weights.b, self.signs(len(r)))
        )

    def linear(
        self, name: str, norm: Norm | None, x: Tensor, seen: Tensor, W: Tensor, b: Tensor | None
    ) -> None:
        """Pre-activations N(x) W + b."""
        r = self.signs(W.shape[1])
        predicted = self.through_norm(norm, x, self.into(W)) + self.dot(b, r)
        self.compare(name, seen @ r, predicted)

    def output(self, W: Tensor, b: Tensor | None, post: Norm | None, x: Tensor) -> Tensor:
        """Projections of what an MLP adds, post(x W + b) R."""
        r = self.signs(W.shape[-1])
        if post is None:
            return x @ self.into(W) + self.dot(b, r)
        c = self.before_norm(post, r)
        y = (x @ (self.frame.cast(W) @ c) + self.dot(b, c)) / post.scale
        return y + self.dot(post.weights.b, r)

    def before_norm(self, norm: Norm, r: Tensor) -> Tensor:
        """Signs pulled through a norm but for its scale: C(w ⊙ r)."""
        c = r if norm.weights.w is None else r * self.frame.cast(norm.weights.w)[:, None]
        return c - c.mean(0) if norm.weights.center else c

    def residual(self, name: str, before: Tensor, after: Tensor, added: Tensor) -> None:
        """The next state is the last one plus what the branches add."""
        change = self.state(after) - self.state(before)
        # The subtraction rounds at the size of the state, so that counts a little, too.
        size = change.norm(dim=-1) + 0.05 * self.state(before).norm(dim=-1)
        self.compare(name, change, added, size)

    def same(self, name: str, seen: Tensor, predicted: Tensor) -> None:
        """Two residual states that should be one."""
        self.compare(name, self.state(seen), predicted @ self.signs(predicted.shape[-1]))
