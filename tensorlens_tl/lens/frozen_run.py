"""A captured run with its operator: what it maps, to where, and how exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import Hinted, kind_of, no_autocast, pick_prompts, spelled, usable_device
from ..maps import TINY, LinearMap
from ..operator import Capture, Convention, FrozenTransformer
from ..saving import require_weights
from .write_check import WriteCheck

Run = TypeVar("Run", bound="FrozenRun")


_TABLE = "those of a result, such as lens.attribute().to_dataframe()"
_PICTURE = "lens.report('report.html'), or .plot() and .show() of a result such as lens.attribute()"
_MODEL = "the model that ran, which a lens does not hold"
_MEANT = {
    **dict.fromkeys(("plot", "show", "to_html", "html", "summary", "visualize"), _PICTURE),
    **dict.fromkeys(("to_df", "to_pandas", "to_numpy", "to_dataframe", "to_json"), _TABLE),
    **dict.fromkeys(("model", "cfg", "config", "generate"), _MODEL),
    **dict.fromkeys(("predictions", "predict", "top_tokens"), "lens.logit_lens()"),
    **dict.fromkeys(("str_tokens", "to_str_tokens", "input_ids"), "tokens"),
    **dict.fromkeys(("svd", "eig", "singular_values"), "lens.operator.svd"),
    **dict.fromkeys(("attention", "patterns", "attentions"), "lens.head_maps or lens.token_matrix"),
    **dict.fromkeys(("features", "saes", "sae"), 'lens.attribute(by="feature", saes=...)'),
    **dict.fromkeys(("explain", "attributions", "shap"), "attribute"),
    **dict.fromkeys(("hidden_states", "states", "cache"), "lens.operator.states()"),
    **dict.fromkeys(("shape", "matrix"), "lens.operator, which has a shape and blocks T[i, j]"),
    "tokenizer": _MODEL,
    "load": "tensorlens_tl.load",
    "cuda": "lens.to('cuda')",
    "steer": "lens.steering_vector or lens.edit",
    "ablate": "tensorlens_tl.faithfulness, or a hook of your own while the model runs",
    "patch": "tensorlens_tl.faithfulness, or a hook of your own while the model runs",
    "jacobian": "lens.operator, which is not the Jacobian, as what is frozen has no slope",
    "neuronpedia": "attribution_graph",
    "to_circuitsvis": "circuitsvis",
    "direct_logit_attribution": "dla",
}
"""What names stand for that users of other tools may guess."""


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class FrozenRun(Hinted):
    """One run of a transformer as an affine map on its embedded tokens, and how exact that is.

    Attributes:
        capture: The captured run.
        writes: What tells whether the weights or the returned logits were written to.
    """

    capture: Capture
    writes: WriteCheck = field(default_factory=WriteCheck)

    _MEANT = _MEANT

    def __post_init__(self):
        if not isinstance(self.capture, Capture):
            name = type(self).__name__
            raise ValueError(
                f"{name} is made of a captured run, not of {kind_of(self.capture)}. Call "
                "tensorlens_tl.capture(model, prompt), which returns the logits and the lens."
            )

    def __repr__(self) -> str:
        c = self.capture
        count = [stop - start for start, stop in c.frame.spans]
        size = (
            f"{count[0]} tokens" if len(self) == 1 else f"{len(self)} prompts, {sum(count)} tokens"
        )
        size += f", {c.convention.in_front}" if c.convention.in_front else ""
        known = c.noise_floor is not None and "_completeness_error" in vars(self)
        exact = f", {self.exactness}" if known else ""
        depth = f"{len(c.blocks)} layers × {c.n_heads} heads"
        check = f"capture check {c.check:.0e}{exact}"
        return f"{type(self).__name__}({c.model_name}, {size}, {depth}, {check})"

    def __len__(self) -> int:
        return self.capture.frame.batch

    def __getitem__(self: Run, prompt: int | slice) -> Run:
        """Take one prompt without padding, or those of a slice; neighbours share memory."""
        picked = pick_prompts(prompt, len(self), "lens", "lens.attribute")
        return type(self)(self.capture.picked(picked), self.writes)

    def __iter__(self: Run) -> Iterator[Run]:
        return (self[i] for i in range(len(self)))

    # --- Copies

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle the lens with all its tensors, weights included, and no graph."""
        self._check_unchanged()
        return _again, (type(self), self.capture.mapped(_alone), bool(self.writes.tensors))

    def to(self: Run, device: str | torch.device) -> Run:
        """Give the same lens on another device. It no longer shares the model's weights there.

        Args:
            device: Where all tensors of the lens go, weights included, such as "cpu".

        Returns:
            The lens on that device: this lens, if it is there already. Once this one is dropped,
            nothing of it stays on the old device.

        Raises:
            ValueError: If there is no such device, or it is a dtype.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.to("cpu") is lens  # it is there already
            True
        """
        if isinstance(device, torch.dtype):
            name = str(device).removeprefix("torch.")
            raise ValueError(
                f"A lens cannot change its dtype to {name}: rounding of the run would stay. "
                f"Capture again with capture(..., dtype=torch.{name})."
            )
        place = usable_device(device)
        if place.type == "meta":
            raise ValueError("device='meta' holds no numbers. Pass a device of this machine.")
        if place == self.device:
            return self
        self._check_unchanged()
        capture = self.capture.mapped(lambda tensor: tensor.detach().to(place), place)
        return _again(type(self), capture, bool(self.writes.tensors))

    def cpu(self: Run) -> Run:
        """Give the same lens on the CPU; see :meth:`to`."""
        return self.to("cpu")

    @property
    def device(self) -> torch.device:
        """The device that the lens computes on."""
        return self.capture.frame.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the lens computes in: float32 or float64. The logits keep the model's."""
        return self.capture.frame.dtype

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
        self.capture.frame.with_gradients()
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if (tensor := self.writes.written()) is not None:
            # Logits are first among the tensors; lenses of one prompt share those of the batch.
            what = "logits it returned" if tensor is self.writes.tensors[0] else "model's weights"
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
    def prompt(self) -> str:
        """The prompt as the model read it: its tokens as one text, special tokens included.

        Raises:
            ValueError: If there are several prompts.
        """
        if len(self) != 1:
            raise ValueError(
                f"prompt needs one prompt, but there are {len(self)}. Take one with lens[i]."
            )
        prompts, tokenizer = self.capture.prompts, self.capture.tokenizer
        start, stop = prompts.spans[0]
        if tokenizer is None or prompts.tokens is None:
            return " ".join(prompts.strings[0])
        return tokenizer.decode(prompts.tokens[0, start:stop].tolist())

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's own logits [batch, pos, d_vocab], of a classifier [batch, d_vocab]."""
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
        return type(self)(
            self.capture.with_convention(replace(self.convention, gate=gate)), self.writes
        )

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
        found = self.capture.unembed @ y + self.capture.unembed.bias
        return found if self.logits.ndim == 3 else found[..., self.capture.frame.read_at, :]

    def between(self, start: str | int, stop: str | int) -> LinearMap:
        """Give the operator from one residual site to a later one.

        Args:
            start: The first site, by TransformerLens's name, such as "blocks.2.hook_resid_pre", or
                the number of the first block.
            stop: The last site, such as "blocks.8.hook_resid_post", or "unembed.hook_in", or the
                number of the last block.

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
        ours = self.readout(self.operator.apply(self.embedding) + self.operator.bias)
        logits = self.capture.frame.cast(self.capture.logits)
        if logits.ndim == 3:  # not of padding
            real = self.capture.frame.real
            ours, logits = ours[real], logits[real]
        return float(((ours - logits).abs().max() / logits.abs().max().clamp_min(TINY)).detach())


def _again(cls: type[Run], capture: Capture, shared: bool) -> Run:
    """A lens on a new capture, whose tensors are as they should be now."""
    return cls(capture, WriteCheck.of(capture.tensors() if shared else ()))


def _alone(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, without its graph and without what shares its memory."""
    whole = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.itemsize
    return tensor.detach() if whole else tensor.detach().clone()
