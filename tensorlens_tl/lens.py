"""What a user holds: a thin object whose every method is one call downwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .attribution import Attribution, TargetLike, attribute, resolve_target
from .capturing import Capture, Convention
from .collapse import TokenMatrix, plan_token_matrix, token_matrix
from .composer import FrozenTransformer
from .headers import require_weights
from .linear_map import LinearMap, version
from .planning import Plan
from .saving import load_capture, save_capture


@dataclass(frozen=True, eq=False, repr=False)
class TensorLens:
    """One run of a transformer as an affine map on its embedded tokens, and questions to it.

    ``model.run_with_tensorlens(prompt)`` and :func:`tensorlens_tl.capture` make one. It is exact
    for this run: ``readout(operator @ embedding + operator.bias)`` are the model's logits. It is
    not the Jacobian (patterns, scales and gating ratios are held, not differentiated), it has no
    query/key edges, and what it says is a decomposition, not a causal claim.

    Weights and logits are referenced, not copied: once the model's weights or the returned logits
    are written to, the lens refuses to answer instead of describing another run.

    Attributes:
        capture: The frozen run.
        versions: The tensors that are not the lens's own, and their versions at the capture.
    """

    capture: Capture
    versions: tuple[tuple[Tensor, int], ...] = ()

    def __repr__(self) -> str:
        c = self.capture
        count = [stop - start for start, stop in c.frame.spans]
        size = (
            f"{count[0]} tokens" if len(self) == 1 else f"{len(self)} prompts, {sum(count)} tokens"
        )
        return (
            f"TensorLens({c.model_name}, {size}, {len(c.blocks)} layers × {c.n_heads} heads, "
            f"capture check {c.check:.0e})"
        )

    def __len__(self) -> int:
        return self.capture.frame.batch

    def __getitem__(self, prompt: int) -> TensorLens:
        """The lens of one prompt of a batch, without padding; shares the batch's memory."""
        if not -len(self) <= prompt < len(self):
            raise IndexError(f"prompt {prompt} does not exist; there are {len(self)}")
        return TensorLens(self.capture.prompt(prompt % len(self)), self.versions)

    def __iter__(self) -> Iterator[TensorLens]:
        return (self[i] for i in range(len(self)))

    # --- The operator

    @property
    def operator(self) -> FrozenTransformer:
        """T and its bias: X [batch, pos, d_model] → the final normalized residual y."""
        self._check_unchanged()
        return self._operator

    @cached_property
    def _operator(self) -> FrozenTransformer:
        return FrozenTransformer.of(require_weights(self.capture))

    def _check_unchanged(self) -> None:
        for tensor, seen in self.versions:
            if version(tensor) != seen:
                what = "logits it returned" if tensor is self.capture.logits else "model's weights"
                raise ValueError(
                    f"the {what} were written to after the capture, so this lens no longer describes "
                    "that run: capture again, and clone logits before editing them in place"
                )

    @property
    def embedding(self) -> Float[Tensor, "batch pos d_model"]:
        """X, the residual that entered the first block: what the operator acts on."""
        return self.capture.blocks[0].resid_pre

    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        """Each prompt's real tokens as strings."""
        return self.capture.prompts.strings

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's own logits."""
        return self.capture.logits

    @property
    def convention(self) -> Convention:
        """The choices under which the operator is unique."""
        return self.capture.convention

    def with_convention(self, gate: str) -> TensorLens:
        """The same run with gated MLPs made linear in another way; nothing is run again.

        Args:
            gate: "gate", "up" or "half"; see :class:`Convention`.

        Returns:
            A lens on the same tensors.
        """
        return TensorLens(self.capture.with_convention(Convention(gate)), self.versions)

    def readout(
        self, y: Float[Tensor, "*many batch pos d_model"]
    ) -> Float[Tensor, "*many batch pos d_vocab"]:
        """Logits of a final normalized residual; a soft cap's ratio is frozen."""
        self._check_unchanged()
        return self.capture.unembed @ y + self.capture.unembed.bias

    def between(self, start: str, stop: str) -> LinearMap:
        """The operator from one residual site to a later one.

        Args:
            start: TransformerLens's name of a site, "blocks.2.hook_resid_pre".
            stop: A later one, "blocks.8.hook_resid_post", or "unembed.hook_in" for the end.

        Returns:
            The map; the identity where start is stop.

        Raises:
            ValueError: If a site does not exist or stop comes before start.
        """
        return self.operator.between(start, stop)

    # --- How exact it is

    @property
    def capture_check(self) -> float:
        """The largest relative error of the random-projection check made during the run."""
        return self.capture.check

    @property
    def completeness_error(self) -> float:
        """Max |readout(T·X + bias) − logits| / max |logits|, computed once; see :meth:`verify`."""
        self._check_unchanged()
        return self._completeness_error

    @cached_property
    def _completeness_error(self) -> float:
        return self.verify()

    def verify(self) -> float:
        """Compute the composed operator's logits anew and compare them with the model's.

        Returns:
            max |Δ logits| / max |logits| over the real tokens. Rounding is about 1e-15 in float64
            and 1e-6 in float32.
        """
        real = self.capture.frame.real
        ours = self.readout(self.operator.apply(self.embedding) + self.operator.bias)[real]
        logits = self.capture.frame.cast(self.capture.logits)[real]
        return float((ours - logits).abs().max() / logits.abs().max().clamp_min(1e-30))

    # --- Where a logit comes from

    def attribute(
        self,
        target: TargetLike = None,
        versus: TargetLike = None,
        pos: int = -1,
        by: str = "token",
    ) -> Attribution:
        """Split a logit, or a difference of two, by where it comes from.

        Args:
            target: A token string, a token id, a direction in logits [d_vocab] or in the final
                normalized residual [d_model], or None for the model's own prediction.
            versus: Subtracted from the target: a target of the same kinds, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            by: "token": every token's and position's embedding and every constant;
                "component": the direct effect of every head, MLP and external constant.

        Returns:
            Contributions in logits that sum to the target.

        Raises:
            ValueError: If the target, the position or ``by`` does not exist.
        """
        self._check_unchanged()
        goal = resolve_target(self.capture, target, pos)
        if versus is not None:
            goal = goal.minus(resolve_target(self.capture, versus, pos))
        return attribute(self.capture, self.operator, goal, by)

    def token_matrix(
        self,
        kind: str,
        target: TargetLike = None,
        layers: tuple[str, str] | None = None,
        probes: int | None = None,
        seed: int = 0,
        precision: str | None = None,
        memory_limit: int | None = None,
    ) -> TokenMatrix:
        """How much of token j is in the output at i: a matrix [query_pos, key_pos] per prompt.

        "norm" ‖T_ij‖_F, "in" ‖T_ij x_j‖, "out" ‖T_ijᵀ u_i‖, "in_out" u_iᵀ T_ij x_j: signed, and with
        the constants' share a row sums to the target. See :func:`collapse.token_matrix`.

        Args:
            kind: Which.
            target: u_i: None is the output's own direction y_i / ‖y_i‖, "prediction" the logit of
                each position's own prediction; a token, id or direction is taken everywhere.
            layers: A pair of residual sites: that part of the operator only.
            probes: For "norm": estimate it from so many random vectors; None is exact.
            seed: Of the probes.
            precision: "bfloat16" for products in that precision.
            memory_limit: Bytes; by default half of what is free.

        Returns:
            The matrices.

        Raises:
            ValueError: If an argument is none of these, or the work does not fit.
        """
        return token_matrix(
            self.capture, self.operator, kind, target, layers, probes, seed, precision, memory_limit
        )

    def plan(self, what: str, **arguments: Any) -> Plan:
        """What a contraction will cost, before it runs: time, flops, peak memory, chunks.

        Args:
            what: A kind of :meth:`token_matrix`.
            **arguments: The same that would be given to it.

        Returns:
            The plan. Rates are measured on products of these shapes, in a fraction of a second.

        Raises:
            ValueError: If the call itself would be refused.
        """
        return plan_token_matrix(self.capture, self.operator, what, **arguments)

    # --- In a file

    def save(self, path: str | os.PathLike[str], weights: bool = False) -> None:
        """Write the lens to a file, whole or not at all; :func:`tensorlens_tl.load` reads it.

        Args:
            path: Where to. A file that is there is replaced once the new one is complete.
            weights: Whether to store the model's weights, too. Without them the file holds a
                fingerprint of them, and an operator needs ``load(path, model=...)``.

        Raises:
            ValueError: If there is no such folder, or the lens has no weights to store.
        """
        save_capture(self.capture, path, weights)


def load(
    path: str | os.PathLike[str],
    model: Any = None,
    device: str | torch.device | None = None,
) -> TensorLens:
    """Read a lens that :meth:`TensorLens.save` wrote; nothing in the file is executed.

    Args:
        path: The file.
        model: The model it was made with. Its weights are compared with the saved fingerprint and
            used by reference. Without it, and without saved weights, the lens serves what needs
            none: logits, tokens, embedding, capture check.
        device: Where to put the tensors; by default the model's device, or else the CPU.

    Returns:
        The lens.

    Raises:
        ValueError: If the file is no saved lens or is damaged, or the model is another one; the
            message says what was expected, what came and what to do.
    """
    captured = load_capture(path, model, device)
    # Only a model's weights can be written to by others; a file's are the lens's own.
    return TensorLens(captured, () if model is None else captured.versions())
