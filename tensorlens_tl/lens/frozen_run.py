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
        capture: The frozen run.
        versions: The tensors that are not the run's own, and their versions at the capture.
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
        return (
            f"{type(self).__name__}({c.model_name}, {size}, {len(c.blocks)} layers × {c.n_heads} heads, "
            f"capture check {c.check:.0e}{exact})"
        )

    def __len__(self) -> int:
        return self.capture.frame.batch

    def __getitem__(self: Run, prompt: int) -> Run:
        """The lens of one prompt of a batch, without padding; shares the batch's memory."""
        if not -len(self) <= prompt < len(self):
            raise IndexError(f"prompt {prompt} does not exist; there are {len(self)}")
        return type(self)(self.capture.prompt(prompt % len(self)), self.versions)

    def __iter__(self: Run) -> Iterator[Run]:
        return (self[i] for i in range(len(self)))

    # --- The operator

    @property
    def operator(self) -> FrozenTransformer:
        """T and its bias: X [batch, pos, d_model] → the final normalized residual y."""
        self._check_ready()
        return self._operator

    @cached_property
    def _operator(self) -> FrozenTransformer:
        return FrozenTransformer.of(require_weights(self.capture))

    def _check_ready(self) -> None:
        """Refuse to compute under torch.autocast, or once the run is not the model's any more."""
        no_autocast(self.capture.frame.device.type)
        self._check_unchanged()

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

    def with_convention(self: Run, gate: str) -> Run:
        """The same run with gated MLPs made linear in another way; nothing is run again.

        Args:
            gate: "gate", "up" or "half"; see :class:`Convention`.

        Returns:
            A lens on the same tensors.
        """
        return type(self)(self.capture.with_convention(Convention(gate)), self.versions)

    def readout(
        self, y: Float[Tensor, "*many batch pos d_model"]
    ) -> Float[Tensor, "*many batch pos d_vocab"]:
        """Logits of a final normalized residual; a soft cap's ratio is frozen."""
        self._check_ready()
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

    @property
    def noise_floor(self) -> float | None:
        """The model's own rounding at this prompt; None unless ``capture(..., noise_floor=True)``.

        max |logits − exact| / max |exact| over the real tokens, where ``exact`` are the logits of
        a float32 copy of the model: what a completeness error of a bfloat16 or float16 model is to
        be compared with.
        """
        return self.capture.noise_floor

    @property
    def exactness(self) -> str:
        """The completeness error in words, beside the noise floor where that was asked for."""
        error, floor = f"completeness error {self.completeness_error:.0e}", self.noise_floor
        name = str(self.logits.dtype).removeprefix("torch.")
        return error if floor is None else f"{error} (model's own {name} noise {floor:.0e})"

    def verify(self) -> float:
        """Compute the composed operator's logits anew and compare them with the model's.

        Returns:
            max |Δ logits| / max |logits| over the real tokens. Rounding is about 1e-15 in float64
            and 1e-6 in float32.
        """
        real = self.capture.frame.real
        ours = self.readout(self.operator.apply(self.embedding) + self.operator.bias)[real]
        logits = self.capture.frame.cast(self.capture.logits)[real]
        return float((ours - logits).abs().max() / logits.abs().max().clamp_min(TINY))
