"""A dictionary of features: a sparse autoencoder or a transcoder, as its weights alone.

    n(x) = x, or x normalised (see ``norm``)      a = (n(x) − b_dec) W_enc + b_enc
    z = activation(a)                             x̂ = z W_dec + b_dec (+ x W_skip), n undone

A transcoder reads at one site and writes at another, subtracts no b_dec, and undoes no norm. A
gated SAE has a second bias, which decides what fires: (n(x) − b_dec) W_enc + b_gate > 0. The size
is ((n(x) − b_dec) W_enc) · gain + b_enc.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import is_int, spelled

ACTIVATIONS = ("relu", "tanh-relu", "topk", "abstopk", "jumprelu", "gated")
"""What makes activations of pre-activations."""
NORMS = ("none", "layer_norm", "constant_norm_rescale")
"""What is done to an input before it is encoded, and undone after."""
CHUNK_BYTES = 2**26
"""Bytes that the pre-activations of some positions may take at a time."""
_LN_EPS = 1e-5  # SAELens adds it to the standard deviation


class Normed(NamedTuple):
    """An input as the encoder reads it, (x − shift) · scale, and what undoes it, · unscale + shift.

    Attributes:
        x: The normalised input [..., d_in].
        shift: What was subtracted [..., 1].
        scale: What was multiplied by [..., 1].
        unscale: What a reconstruction is multiplied by [..., 1].
    """

    x: Tensor
    shift: Tensor | float
    scale: Tensor | float
    unscale: Tensor | float


@dataclass(frozen=True)
class Feature:
    """One feature of a dictionary, as a target: why did it fire?

    Attributes:
        dictionary: The SAE or transcoder.
        index: The number of the feature.
        pre: Whether the target is the pre-activation, which also tells why a feature did not fire.

    Example:
        See :meth:`FeatureDictionary.feature`.
    """

    dictionary: FeatureDictionary
    index: int
    pre: bool = False


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class FeatureDictionary:
    """A sparse autoencoder, or a transcoder, that a lens can read; :func:`load` makes it.

    Attributes:
        architecture: What it is called where it comes from, such as "topk" or "transcoder".
        site: The hook point that it reads, such as "blocks.2.hook_resid_pre".
        writes: The hook point that it reconstructs: ``site``, or another one for a transcoder.
        W_enc: The encoder [d_in, d_sae].
        b_enc: The bias of the encoder [d_sae].
        W_dec: The decoder, one row per feature [d_sae, d_out]; for a cross-layer transcoder one row
            per feature and layer from its own on [d_sae, layer, d_out].
        b_dec: The bias of the decoder [d_out].
        activation: One of "relu", "tanh-relu", "topk", "abstopk", "jumprelu" and "gated".
        k: How many features may fire at a position, for "topk" and "abstopk".
        threshold: What a pre-activation must exceed, for "jumprelu" [d_sae].
        gain: What W_enc is multiplied by for the size, for "gated" [d_sae].
        b_gate: The bias that decides what fires, for "gated" [d_sae].
        centered: Whether b_dec is subtracted from the input.
        norm: "none", "layer_norm" or "constant_norm_rescale".
        W_skip: The map from input to output beside the features [d_in, d_out], or None.
        model_name: The model that it was trained on; empty where that is not known.

    Example:
        >>> import torch
        >>> from tensorlens_tl import features
        >>> W = torch.eye(4)
        >>> weights = {"W_enc": W, "W_dec": W, "b_enc": W[0] * 0, "b_dec": W[0] * 0}
        >>> sae = features.load(weights, site="blocks.1.hook_resid_pre")
        >>> sae
        FeatureDictionary(standard, blocks.1.hook_resid_pre, 4 features of 4 dimensions)
        >>> sae.encode(torch.tensor([1.0, -1.0, 0.0, 2.0]))
        tensor([1., 0., 0., 2.])
    """

    architecture: str
    site: str
    writes: str
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Tensor
    b_dec: Float[Tensor, " d_out"]
    activation: str = "relu"
    k: int | None = None
    threshold: Float[Tensor, " d_sae"] | None = None
    gain: Float[Tensor, " d_sae"] | None = None
    b_gate: Float[Tensor, " d_sae"] | None = None
    centered: bool = True
    norm: str = "none"
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    model_name: str = ""

    def __repr__(self) -> str:
        place = self.site if self.writes == self.site else f"{self.site} → {self.writes}"
        size = f"{self.d_sae} features of {self.d_in} dimensions"
        return f"FeatureDictionary({self.architecture}, {place}, {size})"

    @property
    def d_in(self) -> int:
        """The width of what is read."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """The number of features."""
        return self.W_enc.shape[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.writes != self.site

    @property
    def nbytes(self) -> int:
        """Memory of the weights in bytes."""
        held = (getattr(self, f.name) for f in fields(self))
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))

    def feature(self, index: int, pre: bool = False) -> Feature:
        """Name one feature, as a target of a lens.

        Args:
            index: The number of the feature; negative ones count from the end.
            pre: Whether the target is the pre-activation, and not the activation.

        Returns:
            What ``lens.attribute`` takes as ``target``.

        Raises:
            ValueError: If there is no such feature.

        Example:
            >>> from tensorlens_tl import demo, features
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> W = lens.capture.unembed.weights.W_U[:, :64].detach()  # any directions serve
            >>> weights = {"W_enc": W, "W_dec": W.T, "b_enc": W[0] * 0, "b_dec": W[:, 0] * 0}
            >>> sae = features.load(weights, site="blocks.2.hook_resid_pre")
            >>> found = lens.attribute(sae.feature(6, pre=True))
            >>> found.target, found.completeness_error < 1e-5
            (('L2.preF6 before its activation',), True)
        """
        if not is_int(index) or not -self.d_sae <= index < self.d_sae:
            raise ValueError(
                f"index={index!r} is no feature of {self}. Pass a number below {self.d_sae}."
            )
        return Feature(self, int(index) % self.d_sae, pre)

    def normed(self, x: Float[Tensor, "*pos d_in"]) -> Normed:
        """Normalise an input as the encoder does.

        Args:
            x: What stands at the site.

        Returns:
            The normalised input, and how to undo it.
        """
        if self.norm == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            # torch's std divides by d − 1, as it does in SAELens, unlike the variance of a model's
            # norm.
            size = (x - shift).std(-1, keepdim=True)
            scale = 1 / (size + _LN_EPS)
            found = Normed((x - shift) * scale, shift, scale, size)
        elif self.norm == "constant_norm_rescale":
            # ‖n(x)‖ = √d, the length of a vector of ones.
            scale = self.d_in**0.5 / x.norm(dim=-1, keepdim=True)
            found = Normed(x * scale, 0.0, scale, 1 / scale)
        else:
            found = Normed(x, 0.0, 1.0, 1.0)
        # What a transcoder writes is no reconstruction of its input, so no norm is undone.
        return found._replace(shift=0.0, unscale=1.0) if self.is_transcoder else found

    def encode(self, x: Float[Tensor, "*pos d_in"]) -> Float[Tensor, "*pos d_sae"]:
        """Compute the activations of all features.

        Args:
            x: What stands at the site, in any floating dtype.

        Returns:
            The activations, computed in the dtype of ``x``.
        """
        return self.activations(*self.pre_activations(x))

    def reconstruct(self, x: Float[Tensor, "*pos d_in"]) -> Float[Tensor, "*pos *later d_out"]:
        """Compute what the dictionary gives back, or what a transcoder writes.

        Args:
            x: What stands at the site, in any floating dtype.

        Returns:
            Σ z d + b_dec, the norm undone, and the skip connection added. For a cross-layer
            transcoder one vector per layer from its own on, b_dec and the skip in the first alone.
        """
        # In the dtype of x: SAEs are often in half precision, and errors are differences.
        norm, W = self.normed(x), self.W_dec.to(x)
        found = torch.tensordot(self.encode(x), W, 1) * norm.unscale
        first = found[..., 0, :] if W.ndim == 3 else found
        # ``first`` is a view, so this changes ``found``.
        first += self.b_dec.to(x) * norm.unscale + norm.shift
        if self.W_skip is not None:
            first += x @ self.W_skip.to(x)
        return found

    def hooks(self) -> list[tuple[str, Callable[..., Tensor]]]:
        """Make the hook that puts what the SAE gives back in the place of what it reads.

        A capture under these hooks is of the model with the SAE spliced in. What the SAE changed,
        its error with the sign turned, is then a constant source such as
        ``L2.hook_resid_pre[user]``.

        Returns:
            One pair of the hook point's name and a function, for ``model.hooks(fwd_hooks=...)``.

        Raises:
            ValueError: If it is a transcoder, which reads elsewhere than it writes.

        Example:
            >>> import torch
            >>> from tensorlens_tl import demo, features
            >>> model, W = demo.load_model(), torch.eye(128)
            >>> weights = {"W_enc": W, "W_dec": W, "b_enc": W[0] * 0, "b_dec": W[0] * 0}
            >>> sae = features.load(weights, site="blocks.2.hook_resid_pre")
            >>> with model.hooks(fwd_hooks=sae.hooks()):
            ...     _, lens = model.run_with_tensorlens("The capital of France is")
            >>> rows = lens.attribute(by="component")
            >>> [str(s.node) for s in rows.sources if "user" in str(s.node)]
            ['L2.hook_resid_pre[user]']
        """
        if self.is_transcoder:
            raise ValueError(f"{self} writes elsewhere than it reads. Splice in an SAE.")

        def spliced(x: Tensor, hook: Any) -> Tensor:
            return self.reconstruct(x).to(x)

        return [(self.site, spliced)]

    def pre_activations(
        self, x: Float[Tensor, "*pos d_in"]
    ) -> tuple[Float[Tensor, "*pos d_sae"], Float[Tensor, "*pos d_sae"] | None]:
        """Compute what the activation function reads.

        Args:
            x: What stands at the site.

        Returns:
            The pre-activations, and for a gated SAE those of its gates, else None.
        """
        x = self.normed(x).x
        if self.centered:
            x = x - self.b_dec.to(x)
        # Gate and size share one product; they differ in a gain per feature and in the bias.
        a = x @ self.W_enc.to(x)
        if self.gain is None or self.b_gate is None:
            return a + self.b_enc.to(x), None
        return a * self.gain.to(x) + self.b_enc.to(x), a + self.b_gate.to(x)

    def activations(
        self, a: Float[Tensor, "*pos d_sae"], gate: Float[Tensor, "*pos d_sae"] | None
    ) -> Float[Tensor, "*pos d_sae"]:
        """Apply the activation function.

        Args:
            a: The pre-activations of all features.
            gate: The pre-activations of the gates, or None.

        Returns:
            The activations of all features.
        """
        if self.activation in ("topk", "abstopk"):
            ranked = a if self.activation == "topk" else a.abs()
            kept = ranked.topk(min(self.k or self.d_sae, self.d_sae), dim=-1).indices
            values = a.gather(-1, kept)
            # Fewer than k may be above 0. "abstopk" keeps the sign.
            values = values.relu() if self.activation == "topk" else values
            return torch.zeros_like(a).scatter(-1, kept, values)
        z = a.relu()
        if self.activation == "tanh-relu":
            return z.tanh()
        # A JumpReLU keeps the whole a above its threshold: it does not subtract it.
        if self.threshold is not None:
            return z * (a > self.threshold.to(a))
        return z if gate is None else z * (gate > 0)

    def covector(self, index: int) -> Float[Tensor, " d_in"]:
        """The direction whose product with a normalised input is a feature's pre-activation.

        Args:
            index: The number of the feature.

        Returns:
            The column of W_enc, with the gain of a gated SAE.
        """
        # (w · gain) · n(x): the gain scales a feature's size, not what decides whether it fires.
        w = self.W_enc[:, index]
        return w if self.gain is None else w * self.gain[index]

    def bias(self, index: int) -> Float[Tensor, ""]:
        """What a feature's pre-activation is where the normalised input is 0.

        Args:
            index: The number of the feature.

        Returns:
            b_enc − b_dec · w, or b_enc where b_dec is not subtracted; in float64.
        """
        own = self.b_enc[index].double()
        if not self.centered:
            return own
        return own - self.b_dec.double() @ self.covector(index).double()

    def sparse(
        self, x: Float[Tensor, "row d_in"]
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Encode some rows, and keep what fires: the memory is that of a chunk of rows.

        Args:
            x: One row per position.

        Returns:
            The row, the number and the activation of every feature that fires.
        """
        # Three tensors [row, d_sae] live at once: a, what is ranked or gated, and z.
        size = max(1, CHUNK_BYTES // (3 * self.d_sae * x.element_size()))
        found = []
        for start in range(0, len(x), size):
            z = self.encode(x[start : start + size])
            rows, features = z.nonzero(as_tuple=True)
            found.append((rows + start, features, z[rows, features]))
        rows, features, values = (torch.cat(part) for part in zip(*found, strict=True))
        return rows, features, values
