"""One MLP of a run with a transcoder in its place: what it reads, what fires, what is left out.

    y_p = Σ_f z_pf d_f + b_dec + x_p W_skip + ε_p

y is what the MLP wrote in the run, and the error ε is what this equation says it is, computed in
float64. An MLP without a transcoder is all error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..features import FeatureDictionary, Place, check_width, decoded
from ..maps import Norm
from ..operator import Capture, FrozenTransformer


@dataclass(frozen=True, eq=False)
class ReplacedMLP:
    """A transcoder in the place of an MLP, in one run of one prompt.

    Attributes:
        dictionary: The transcoder; None where the MLP has none.
        place: Where the MLP writes.
        site: The number of the residual site that the transcoder reads.
        norm: The norm that it reads this site through, or None.
        x: What it reads [pos, d_in].
        y: What the MLP wrote [pos, d_model].
        at: The position of every active feature, in order.
        features: The number of every active feature.
        acts: The activation of each.
    """

    dictionary: FeatureDictionary | None
    place: Place
    site: int
    norm: Norm | None
    x: Float[Tensor, "pos d_in"]
    y: Float[Tensor, "pos d_model"]
    at: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    acts: Float[Tensor, " n"]

    @classmethod
    def of(
        cls,
        dictionary: FeatureDictionary | None,
        place: Place,
        capture: Capture,
        operator: FrozenTransformer,
    ) -> ReplacedMLP:
        """Read the features of a run.

        Args:
            dictionary: A transcoder of this MLP, or None.
            place: Where the MLP writes.
            capture: The captured run of one prompt.
            operator: The operator of that run.

        Returns:
            All features that fire at real tokens.

        Raises:
            ValueError: If the transcoder reads what this model lacks, or is of another width.
        """
        y = place.state(operator, capture, read=True)[0]
        if dictionary is None:
            none = torch.zeros(0, dtype=torch.long, device=y.device)
            return cls(None, place, place.index, None, y[:, :0], y, none, none, y.new_zeros(0))
        site, norm = Place.read_by(dictionary, operator)
        if site > place.index:
            raise ValueError(
                f"{dictionary} reads what comes after the MLP that it stands for. Pass a "
                f"transcoder that reads {operator.sites[place.index]!r} or the MLP's input."
            )
        x = capture.frame.cast(operator.steps[site].state)
        x = x if norm is None else norm.apply(x) + norm.bias
        check_width("reads", dictionary, dictionary.d_in, dictionary.site, x)
        check_width("writes", dictionary, dictionary.W_dec.shape[-1], dictionary.writes, y)
        real = capture.frame.real[0].nonzero().flatten()
        rows, features, acts = dictionary.sparse(x[0, real])
        return cls(dictionary, place, site, norm, x[0], y, real[rows], features, acts)

    @property
    def layer(self) -> int:
        """The number of the block."""
        return self.place.layer

    @property
    def name(self) -> str:
        """What stands for the MLP in the names of constants, such as "L2.mlp_out"."""
        return f"L{self.layer}.{self.place.name}"

    @property
    def _dictionary(self) -> FeatureDictionary:
        """The transcoder, where features are known to fire."""
        return cast(FeatureDictionary, self.dictionary)

    def only(self, picked: Bool[Tensor, " n"]) -> ReplacedMLP:
        """The same with some of the active features.

        Args:
            picked: Whether each of them stays.

        Returns:
            The MLP without the others.
        """
        at, features, acts = (part[picked] for part in (self.at, self.features, self.acts))
        return replace(self, at=at, features=features, acts=acts)

    @cached_property
    def spans(self) -> tuple[tuple[int, slice], ...]:
        """The positions at which features fire, and where their features stand."""
        # ``at`` is sorted, so the features of a position stand side by side.
        positions, counts = self.at.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        starts = ends - counts
        parts = zip(positions.tolist(), starts.tolist(), ends.tolist(), strict=True)
        return tuple((pos, slice(start, end)) for pos, start, end in parts)

    @property
    def n_decoders(self) -> int:
        """How many blocks the features write to, from their own on."""
        if self.dictionary is None:
            return 0
        return self.dictionary.W_dec.shape[1] if self.dictionary.W_dec.ndim == 3 else 1

    def _W(self, ahead: int) -> Float[Tensor, "d_sae d_model"]:
        """The decoder that writes some blocks after its own."""
        W = self._dictionary.W_dec
        return W[:, ahead] if W.ndim == 3 else W

    def decoded(self, ahead: int = 0) -> Float[Tensor, "pos d_model"]:
        """Σ z d at every position, in float64.

        Args:
            ahead: How many blocks after its own it writes, for a cross-layer transcoder.

        Returns:
            One vector per position.
        """
        return decoded(self._W(ahead), self.at, self.features, self.acts, len(self.y))

    def read_by(
        self, y: Float[Tensor, "many pos d_model"], ahead: int = 0
    ) -> Float[Tensor, "many n"]:
        """⟨y, d⟩ of every active feature.

        Args:
            y: Covectors at what the MLP writes.
            ahead: How many blocks after its own that is.

        Returns:
            One number per covector and active feature.
        """
        found, W = y.new_zeros(len(y), len(self.at)), self._W(ahead)
        for pos, own in self.spans:
            # By position: one matrix product in place of a gathered covector for every feature.
            found[:, own] = y[:, pos] @ W[self.features[own]].to(y).T
        return found

    def constants(self) -> Float[Tensor, "pos d_out"]:
        """b_dec and x W_skip, in float64."""
        found = torch.zeros(self.y.shape, dtype=torch.float64, device=self.y.device)
        if self.dictionary is not None:
            found += self.dictionary.b_dec.to(found)
            if self.dictionary.W_skip is not None:
                found += self.x.double() @ self.dictionary.W_skip.to(found)
        return found

    @cached_property
    def slopes(self) -> Float[Tensor, " n"]:
        """The ratio z / a of every active feature: 1 but for a tanh."""
        if self.dictionary is None or self.dictionary.activation != "tanh-relu":
            return torch.ones_like(self.acts)
        # z = tanh a, so a = atanh z.
        return self.acts / self.acts.atanh()

    def encoders(self, picked: slice | Tensor) -> Float[Tensor, "row d_in"]:
        """The covectors of features' pre-activations at what is read, norms held.

        Args:
            picked: Numbers of active features.

        Returns:
            One row per feature.
        """
        features, x = self.features[picked], self.x[self.at[picked]]
        w = self._dictionary.W_enc[:, features].T.to(x)
        if self._dictionary.gain is not None:
            w = w * self._dictionary.gain[features, None].to(x)
        if self._dictionary.norm == "layer_norm":  # ⟨x − mean x, w⟩ = ⟨x, w − mean w⟩
            w = w - w.mean(-1, keepdim=True)
        # The scale of the transcoder's own norm is held, as those of the model are.
        return w * self._dictionary.normed(x).scale

    def biases(self, picked: slice | Tensor) -> Float[Tensor, " row"]:
        """b_enc of some active features.

        Args:
            picked: Numbers of active features.

        Returns:
            One number per feature.
        """
        return self._dictionary.b_enc[self.features[picked]].to(self.x)

    def to_read(
        self, y: Float[Tensor, "many 1 pos d_in"], effects: dict[str, Tensor]
    ) -> Float[Tensor, "many 1 pos d_model"]:
        """Pull covectors at what is read back to the residual."""
        return y if self.norm is None else self.norm.apply_t(y, effects)
