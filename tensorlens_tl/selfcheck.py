"""The check that a capture makes of itself, while it runs.

Every product the operator will use is compared with the run's own activations under one random
projection (Freivalds 1977): for y = x W + b and signs r, y·r = x·(W r) + b·r. That costs O(pos · d)
once W r is known, and W r is kept per model until the weight changes.
"""

from __future__ import annotations

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

_products: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()


@cache
def _signs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


class SelfCheck:
    """Collects the relative errors of the run's products under random projections."""

    def __init__(self, model: Any, frame: Frame, model_dtype: torch.dtype):
        self.frame = frame
        self.tolerance = _TOLERANCE.get(model_dtype, 1e-4)
        self.errors: dict[str, float] = {}
        self._pending: list[tuple[str, Tensor]] = []
        self._known = _products.setdefault(model, {})

    def signs(self, *shape: int) -> Tensor:
        """Fixed random signs in the compute dtype."""
        return _signs(*shape).to(self.frame.zeros(0))

    def product(self, equation: str, W: Tensor, r: Tensor) -> Tensor:
        """einsum(equation, W, r), kept until the weight's storage, version or view changes."""
        key = (equation, W.data_ptr(), W._version, W.shape, W.stride(), W.dtype, r.dtype, W.device)
        if key not in self._known:
            self._known[key] = torch.einsum(equation, self.frame.cast(W), r)
        return self._known[key]

    def compare(self, name: str, seen: Tensor, predicted: Tensor, size: Tensor) -> None:
        """Note max |seen − predicted| / size over the real tokens, size being row norms.

        A row much smaller than the largest one is measured against a hundredth of that: rows that
        cancel to nearly nothing are no errors.
        """
        size = size + 0.01 * size.amax() + torch.finfo(size.dtype).tiny
        error = (seen - predicted).abs() / size
        self._pending.append((name, error.flatten(2).amax(-1) if error.ndim > 2 else error))

    def settle(self, hooked: Callable[[], list[str]]) -> None:
        """Judge what was noted since the last call.

        Raises:
            CaptureMismatchError: If an error passes the tolerance; names the first place.
            ValueError: If a real token's activations are not finite.
        """
        real = self.frame.real
        errors = torch.stack([error for _, error in self._pending])
        errors = torch.where(real, errors, 0).flatten(1).amax(-1).tolist()
        names = [name for name, _ in self._pending]
        self._pending.clear()
        for name, error in zip(names, errors, strict=True):
            if error != error or error == float("inf"):
                raise ValueError(
                    f"{name}: a real token's activations are not finite; float64 or float16 with left "
                    "padding is the usual cause: use float32, right padding, or single prompts"
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
                    f"{name}: the run's activations differ from what the operator predicts by "
                    f"{error:.1e} (relative; expected at most {self.tolerance:.0e}): {cause}"
                )
        self.errors.update(zip(names, errors, strict=True))

    # --- What is compared, per sublayer

    def through_norm(self, norm: Norm | None, x: Tensor, p: Tensor) -> Tensor:
        """⟨N(x), p⟩ per position, from x alone: (x · C(w ⊙ p)) / s + b · p."""
        if norm is None:
            return x @ p
        w, b = norm.weights.w, norm.weights.b
        c = p if w is None else p * self.frame.cast(w)
        c = c - c.mean() if norm.weights.center else c
        y = (x @ c) / norm.scale.squeeze(-1)
        return y if b is None else y + self.frame.cast(b) @ p

    def dot(self, b: Tensor | None, r: Tensor) -> Tensor | float:
        return 0.0 if b is None else (self.frame.cast(b) * r).sum()

    def attention(
        self, name: str, norm: Norm | None, x: Tensor, v: Tensor, pattern: Tensor, z: Tensor, w:
        AttentionWeights
    ) -> None:  # fmt: skip
        """Values v = N(x) W_V + b_V, and z = A v."""
        kv_heads, _, d_head = w.W_V.shape
        r = self.signs(kv_heads, d_head)
        predicted = self.through_norm(norm, x, self.product("gde,ge->d", w.W_V, r))
        seen_v = v.unflatten(-1, (kv_heads, d_head))
        projected = (seen_v * r).sum(-1)  # [batch, pos, kv_head]
        predicted = predicted + self.dot(w.b_V, r)
        self.compare(f"{name} values (W_V, b_V)", projected.sum(-1), predicted, v.norm(dim=-1))
        heads = pattern.shape[1]
        repeat = heads // kv_heads
        mixed = pattern.unflatten(1, (kv_heads, repeat)) @ projected.mT[:, :, None, :, None]
        mixed = mixed.squeeze(-1).flatten(1, 2).mT  # [batch, pos, head]
        seen = (z.unflatten(-1, (kv_heads, repeat, d_head)) * r[:, None]).sum(-1).flatten(2)
        self.compare(f"{name} mixing (pattern · values)", seen, mixed, z.norm(dim=-1, keepdim=True))

    def mlp_in(
        self, name: str, norm: Norm | None, x: Tensor, seen: Tensor, W: Tensor, b: Tensor | None
    ) -> None:
        """Pre-activations z = N(x) W + b."""
        r = self.signs(W.shape[1])
        predicted = self.through_norm(norm, x, self.product("de,e->d", W, r)) + self.dot(b, r)
        self.compare(name, seen @ r, predicted, seen.norm(dim=-1))

    def gate(self, name: str, seen: Tensor, predicted: Tensor) -> None:
        """Post-activations, element by element."""
        size = torch.linalg.vector_norm(seen, ord=torch.inf, dim=-1)
        off = torch.linalg.vector_norm(seen - predicted, ord=torch.inf, dim=-1)
        self.compare(name, off, torch.zeros_like(off), size)

    def output(self, W: Tensor, b: Tensor | None, post: Norm | None, x: Tensor) -> Tensor:
        """⟨post-norm(x W + b), r⟩ per position: what a branch adds, projected."""
        r = self.signs(W.shape[-1])
        if post is None:
            return x @ self.product("ed,d->e", W, r) + self.dot(b, r)
        w = post.weights.w
        c = r if w is None else r * self.frame.cast(w)
        c = c - c.mean() if post.weights.center else c
        y = (x @ (self.frame.cast(W) @ c) + self.dot(b, c)) / post.scale.squeeze(-1)
        return y + self.dot(post.weights.b, r)

    def residual(self, name: str, before: Tensor, after: Tensor, added: Tensor) -> None:
        """The next state is the last one plus what the branches add."""
        change = after - before
        # The subtraction rounds at the size of the state, so that counts a little, too.
        size = change.norm(dim=-1) + 0.05 * before.norm(dim=-1)
        self.compare(name, change @ self.signs(change.shape[-1]), added, size)
