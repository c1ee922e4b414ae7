"""A captured run with its operator: what it maps, to where, and how exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from ..checks import no_autocast
from ..operator import Capture, Convention, FrozenTransformer
from ..sublayers import TINY, LinearMap, version
from .missing_weights import require_weights

Run = TypeVar("Run", bound="FrozenRun")


@dataclass(frozen=True, eq=False, repr=False)
class FrozenRun:
    """One run of a transformer as an affine map on its embedded tokens, and how exact that is.

    Attributes:
        capture: The captured run.
        versions: Tensors of the model or the user, each with its version at the capture.
    """

    capture: Capture
    versions: tuple[tuple[Tensor, int], ...] = ()

    def __repr__(self) -> str:
        c = self.capture
        count = [stop - start for start, stop in c.frame.spans]
        size = (
            f"{count[0]} tokens" if len(self) == 1 else f"{len(self)} prompts, {sum(count)} tokens"
        )
        known = c.noise_floor is not None and "_completeness_error" in vars(self)
        exact = f", {self.exactness}" if known else ""
        depth = f"{len(c.blocks)} layers × {c.n_heads} heads"
        check = f"capture check {c.check:.0e}{exact}"
        return f"{type(self).__name__}({c.model_name}, {size}, {depth}, {check})"

    def __len__(self) -> int:
        return self.capture.frame.batch

    def __getitem__(self: Run, prompt: int) -> Run:
        """The lens of one prompt of a batch, without padding. It shares the batch's memory."""
        if not -len(self) <= prompt < len(self):
            raise IndexError(f"There is no prompt {prompt}. The number of prompts is {len(self)}.")
        return type(self)(self.capture.prompt(prompt % len(self)), self.versions)

    def __iter__(self: Run) -> Iterator[Run]:
        return (self[i] for i in range(len(self)))

    # --- The operator

    @property
    def operator(self) -> FrozenTransformer:
        """The operator T and its bias: from X [batch, pos, d_model] to the final residual y."""
        self._check_ready()
        return self._operator

    @cached_property
    def _operator(self) -> FrozenTransformer:
        return FrozenTransformer.of(require_weights(self.capture))

    def _check_ready(self) -> None:
        """Refuse to compute under torch.autocast, or once a tensor of the run was written to."""
        no_autocast(self.capture.frame.device.type)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        for tensor, seen in self.versions:
            if version(tensor) != seen:
                what = "logits it returned" if tensor is self.capture.logits else "model's weights"
                raise ValueError(
                    f"The {what} were written to after the capture, so the lens does not describe "
                    "that run any more. Capture again, and clone logits before you edit them in "
                    "place."
                )

    @property
    def embedding(self) -> Float[Tensor, "batch pos d_model"]:
        """X, the residual that entered the first block, on which the operator acts."""
        return self.capture.blocks[0].resid_pre

    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        """Each prompt's real tokens as strings."""
        return self.capture.prompts.strings

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's own logits, in the model's dtype [batch, pos, d_vocab]."""
        return self.capture.logits

    @property
    def convention(self) -> Convention:
        """The choices under which the operator is unique."""
        return self.capture.convention

    def with_convention(self: Run, gate: str) -> Run:
        """Make gated MLPs linear in another way. Nothing is run again.

        Args:
            gate: The branch that is frozen: "gate", "up" or "half"; see :class:`Convention`.

        Returns:
            A lens of the same run, on the same tensors.
        """
        return type(self)(self.capture.with_convention(Convention(gate)), self.versions)

    def readout(
        self, y: Float[Tensor, "*many batch pos d_model"]
    ) -> Float[Tensor, "*many batch pos d_vocab"]:
        """Turn a final normalized residual into logits. The ratio of a soft cap is frozen.

        Args:
            y: Final normalized residuals, with any leading axes.

        Returns:
            The logits of each residual.
        """
        self._check_ready()
        return self.capture.unembed @ y + self.capture.unembed.bias

    def between(self, start: str, stop: str) -> LinearMap:
        """Give the operator from one residual site to a later one.

        Args:
            start: The first site, by TransformerLens's name, such as "blocks.2.hook_resid_pre".
            stop: The last site, such as "blocks.8.hook_resid_post", or "unembed.hook_in".

        Returns:
            The map between them; the identity where ``start`` is ``stop``.

        Raises:
            ValueError: If a site does not exist, or ``stop`` comes before ``start``.
        """
        return self.operator.between(start, stop)

    # --- How exact it is

    @property
    def capture_check(self) -> float:
        """The largest relative error of the random-projection check made during the run."""
        return self.capture.check

    @property
    def completeness_error(self) -> float:
        """Max |readout(T X + c) − logits| / max |logits|, computed once; see :meth:`verify`."""
        self._check_unchanged()
        return self._completeness_error

    @cached_property
    def _completeness_error(self) -> float:
        return self.verify()

    @property
    def noise_floor(self) -> float | None:
        """The model's own rounding at this prompt; None unless ``capture(..., noise_floor=True)``.

        It is max |logits − exact| / max |exact| over the real tokens, where ``exact`` are the
        logits of a float32 copy of the model. Compare the completeness error of a model in half
        precision with it.
        """
        return self.capture.noise_floor

    @property
    def exactness(self) -> str:
        """The completeness error in words, beside the noise floor where that is known."""
        error, floor = f"completeness error {self.completeness_error:.0e}", self.noise_floor
        name = str(self.logits.dtype).removeprefix("torch.")
        return error if floor is None else f"{error} (model's own {name} noise {floor:.0e})"

    def verify(self) -> float:
        """Compute the operator's logits anew, and compare them with the model's.

        Returns:
            max |Δ logits| / max |logits| over the real tokens. Rounding alone gives about 1e-15 in
            float64 and 1e-6 in float32.
        """
        real = self.capture.frame.real
        ours = self.readout(self.operator.apply(self.embedding) + self.operator.bias)[real]
        logits = self.capture.frame.cast(self.capture.logits)[real]
        return float((ours - logits).abs().max() / logits.abs().max().clamp_min(TINY))
