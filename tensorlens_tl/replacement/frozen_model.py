"""The frozen replacement model: the run with transcoders in the place of its MLPs.

Patterns and scales of norms are held, as everywhere. Features, errors and tokens are sources, and
an MLP passes nothing on but what its transcoder's skip connection does. So

    Σ_f z_f ⟨d_f, c⟩ + Σ ⟨ε, c⟩ + Σ ⟨token, c⟩ + constants = what is explained, exactly

where c is the covector of a logit, or of the pre-activation of a feature, at what each of them adds
to the residual. Where features pass on what they read (``through``), with z / a held, the same sum
without features is again what is explained, and z ⟨d, c⟩ is the total effect of a feature.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..attribution import Target
from ..features import FeatureDictionary, Place, check_model
from ..graph import CONTENTS, Node, layer_site
from ..operator import Capture, FrozenTransformer
from ..readers import MLP_OUT
from .replaced_mlp import ReplacedMLP


@dataclass(frozen=True, eq=False)
class Shares:
    """What every source adds to some explained numbers.

    Attributes:
        features: Per replaced MLP, one number per active feature [many, n].
        errors: One number per replaced MLP and position [many, mlp, pos].
        tokens: One number per position [many, pos].
        rest: The features that are left out, summed [many].
        constants: One number per constant, positions summed, by name [many].
    """

    features: list[Float[Tensor, "many _"]]
    errors: Float[Tensor, "many mlp pos"]
    tokens: Float[Tensor, "many pos"]
    rest: Float[Tensor, " many"]
    constants: dict[str, Float[Tensor, " many"]]

    def total(self, with_features: bool = True) -> Float[Tensor, " many"]:
        """The sum of all shares, of features if asked."""
        found = self.errors.sum((1, 2)) + self.tokens.sum(1) + self.rest
        found = sum(self.constants.values(), found)
        return found + sum(f.sum(1) for f in self.features) if with_features else found


@dataclass(frozen=True, eq=False)
class ReplacementModel:
    """One run of one prompt with transcoders in the place of its MLPs, everything else held.

    Attributes:
        capture: The captured run.
        operator: The operator of that run.
        mlps: The MLPs of the run, each with its transcoder or none, and the features that are kept.
        rests: What the features that are left out write, MLP by MLP; () where there are none.
        errors: What all features of each MLP leave out of what it wrote.
    """

    capture: Capture
    operator: FrozenTransformer
    mlps: tuple[ReplacedMLP, ...]
    rests: tuple[Float[Tensor, "pos d_model"], ...] = ()
    errors: tuple[Float[Tensor, "pos d_model"], ...] = ()

    @classmethod
    def of(
        cls,
        transcoders: Sequence[FeatureDictionary],
        capture: Capture,
        operator: FrozenTransformer,
    ) -> ReplacementModel:
        """Put transcoders in the place of MLPs.

        Args:
            transcoders: At most one for every MLP.
            capture: The captured run of one prompt.
            operator: The operator of that run.

        Returns:
            The replacement model.

        Raises:
            ValueError: If there are several prompts, or a transcoder does not fit the run.
        """
        given = check_transcoders(transcoders, capture, operator)
        mlps = []
        for layer in _layers(operator):
            one, place = given.get(layer, (None, None))
            place = place or Place.of(layer_site(layer, MLP_OUT), operator)
            mlps.append(ReplacedMLP.of(one, place, capture, operator))
        found = cls(capture, operator, tuple(mlps))
        real = capture.frame.real[0][:, None]
        errors = tuple(
            # The error is all that is left of y, so the equation holds whatever the transcoder
            # does.
            ((mlp.y.double() - mlp.constants() - given) * real).to(mlp.y)
            for mlp, given in zip(mlps, found.decoded(mlps), strict=True)
        )
        return replace(found, errors=errors)

    @cached_property
    def steps(self) -> dict[int, int]:
        """The number of each MLP by the step that it writes in."""
        return {mlp.place.index: number for number, mlp in enumerate(self.mlps)}

    @property
    def n_active(self) -> int:
        """How many features fire, positions counted apart."""
        return sum(len(mlp.at) for mlp in self.mlps)

    def _writers(self, number: int) -> list[tuple[int, int]]:
        """The MLPs whose features write where one MLP does, and how many blocks ahead that is."""
        layer = self.mlps[number].layer
        # A cross-layer transcoder has one decoder for each block from its own on.
        ahead = ((i, layer - mlp.layer) for i, mlp in enumerate(self.mlps[: number + 1]))
        return [(i, n) for i, n in ahead if self.mlps[i].n_decoders > n]

    def decoded(self, mlps: Sequence[ReplacedMLP]) -> list[Float[Tensor, "pos d_model"]]:
        """What the features of some MLPs write, in float64.

        Args:
            mlps: The MLPs of the run, with some of their features.

        Returns:
            Σ z d of all features that write where each MLP does.
        """
        found = []
        for number, mlp in enumerate(mlps):
            given = [mlps[i].decoded(ahead) for i, ahead in self._writers(number)]
            found.append(sum(given, torch.zeros_like(mlp.y, dtype=torch.float64)))
        return found

    def kept(self, picked: Sequence[Bool[Tensor, " _"]]) -> ReplacementModel:
        """The same with some features; all others are one source, which reads nothing.

        Args:
            picked: Whether each active feature stays, MLP by MLP.

        Returns:
            The model with fewer features. Its errors are the same.
        """
        mlps = tuple(mlp.only(own) for mlp, own in zip(self.mlps, picked, strict=True))
        left = [mlp.only(~own) for mlp, own in zip(self.mlps, picked, strict=True)]
        rests = tuple(
            rest.to(mlp.y) for rest, mlp in zip(self.decoded(left), self.mlps, strict=True)
        )
        return replace(self, mlps=mlps, rests=rests)

    # --- Sweeps

    def of_targets(self, targets: Sequence[Target], through: bool = False) -> Shares:
        """What every source adds to some targets.

        Args:
            targets: Functionals of the final normalized residual.
            through: Whether features pass on what they read.

        Returns:
            One row per target.
        """
        frame, own = self.operator.frame, {}
        u = frame.zeros(self.operator.out_dim, len(targets))
        for i, target in enumerate(targets):
            # One prompt, and as many covectors as targets: [target, 1, pos, d_model].
            u[i, 0, target.query[0]] = target.covector[0]
        # Through the final norm, with its scale held.
        c = self.operator.map.maps[-1].apply_t(u, own)
        found = self._pull(c, len(self.operator.steps), own, through)
        for i, target in enumerate(targets):
            for name, constant in target.constants.items():
                row = found.constants.setdefault(name, c.new_zeros(len(targets)))
                row[i] += constant[0]
        return found

    def of_features(self, number: int, picked: slice | Tensor) -> Shares:
        """What every source adds to the pre-activations of some features of one MLP.

        Args:
            number: The number of the MLP.
            picked: Numbers of active features.

        Returns:
            One row per feature.
        """
        mlp, own = self.mlps[number], {}
        w, at = mlp.encoders(picked), mlp.at[picked]
        u = self.operator.frame.zeros(w.shape[1], len(w))
        # Each feature reads at the position where it fires.
        u[torch.arange(len(w), device=w.device), 0, at] = w
        found = self._pull(mlp.to_read(u, own), mlp.site, own)
        found.constants[f"{mlp.name}.b_enc"] = mlp.biases(picked)
        return found

    def explained(self, number: int, picked: slice | Tensor) -> Float[Tensor, " row"]:
        """The pre-activations of some features of one MLP, as the run has them."""
        mlp = self.mlps[number]
        return (mlp.encoders(picked) * mlp.x[mlp.at[picked]]).sum(-1) + mlp.biases(picked)

    def _pull(
        self,
        c: Float[Tensor, "many 1 pos d_model"],
        stop: int,
        effects: Mapping[str, Tensor],
        through: bool = False,
    ) -> Shares:
        """Carry covectors from a residual site down to the embeddings, and read off all shares."""
        many = len(c)
        found = Shares(
            [c.new_zeros(many, len(mlp.at)) for mlp in self.mlps],
            c.new_zeros(many, len(self.mlps), c.shape[2]),
            c.new_zeros(many, c.shape[2]),
            c.new_zeros(many),
            {},
        )
        _count(found, effects)
        # A transcoder may read a site below that of its MLP, such as what enters the block.
        later: dict[int, list[Tensor]] = defaultdict(list)
        for k in reversed(range(stop)):
            step, own = self.operator.steps[k], {}
            c = c if step.norm is None else step.norm.apply_t(c, own)
            for edit in reversed(step.edits):
                edit.apply_t(c, own)
            # 1. What the MLP writes: features, error, b_dec. Only its encoder and its skip
            #    connection lead further down.
            if k in self.steps:
                site, below = self._into(self.steps[k], c, found, own, through)
                if below is not None:
                    later[site].append(below)
            # 2. Attention passes everything on.
            heads = [b.map.apply_t(c, own) for b in step.branches if b.has_heads]
            c = sum((*heads, *later.pop(k, ())), c)
            _count(found, own)
        # 3. What enters block 0; and activations times what is read of their decoders.
        for name, x in self.capture.embeddings.items():
            share = (c * self.operator.frame.cast(x)).sum(-1)[:, 0]
            if Node.parse(name).kind in CONTENTS:
                found.tokens.add_(share)
            else:
                _count(found, {name: share})
        for mlp, share in zip(self.mlps, found.features, strict=True):
            # Every decoder was read once per position above; z multiplies the sum.
            share *= mlp.acts
        return found

    def _into(
        self, number: int, c: Tensor, found: Shares, effects: dict[str, Tensor], through: bool
    ) -> tuple[int, Tensor | None]:
        """Pull covectors into one replaced MLP: to its sources, and to what it reads, if asked."""
        mlp = self.mlps[number]
        y = c[:, 0]
        for i, ahead in self._writers(number):
            found.features[i] += self.mlps[i].read_by(y, ahead)
        found.errors[:, number] = (y * self.errors[number]).sum(-1)
        if self.rests:
            found.rest.add_((y * self.rests[number]).sum((-1, -2)))
        if mlp.dictionary is None:
            return mlp.site, None
        # b_dec is written at every position, and belongs to no feature.
        effects[f"{mlp.name}.b_dec"] = y @ mlp.dictionary.b_dec.to(y)
        x = None
        if mlp.dictionary.W_skip is not None:
            x = y @ mlp.dictionary.W_skip.to(y).T
        if through and len(mlp.at):
            # All that writes above is read by now, so this is ∂ target / ∂ a, with z = slope · a
            # held.
            passed = found.features[number] * mlp.slopes
            x = y.new_zeros(*y.shape[:2], mlp.x.shape[1]) if x is None else x
            for pos, own in mlp.spans:
                x[:, pos] += passed[:, own] @ mlp.encoders(own)
            effects[f"{mlp.name}.b_enc"] = passed @ mlp.biases(slice(None))
        return mlp.site, None if x is None else mlp.to_read(x[:, None], effects)


def _count(found: Shares, effects: Mapping[str, Tensor]) -> None:
    """Add the effects of constants, positions summed."""
    for name, effect in effects.items():
        whole = effect.flatten(1).sum(1) if effect.ndim > 1 else effect
        found.constants[name] = found.constants.get(name, 0) + whole


def _layers(operator: FrozenTransformer) -> list[int]:
    """The numbers of the blocks that have an MLP."""
    return [s.layer for s in operator.steps if any(not b.has_heads for b in s.branches)]


def check_transcoders(
    transcoders: Sequence[FeatureDictionary], capture: Capture, operator: FrozenTransformer
) -> dict[int, tuple[FeatureDictionary, Place]]:
    """Refuse transcoders that do not fit a run.

    Args:
        transcoders: At most one for every MLP.
        capture: The captured run of one prompt.
        operator: The operator of that run.

    Returns:
        Each of them and where it writes, by number of the block.

    Raises:
        ValueError: If there are several prompts, or a transcoder does not fit.
    """
    if capture.frame.batch != 1:
        raise ValueError(
            f"A feature graph needs one prompt, but the lens has {capture.frame.batch}. Take "
            "one with lens[i]."
        )
    layers = _layers(operator)
    found: dict[int, tuple[FeatureDictionary, Place]] = {}
    for one in transcoders:
        check_model(one, capture)
        place = Place.of(one.writes, operator)
        if place.name != "mlp_out" or not one.is_transcoder:
            raise ValueError(
                f"{one} is no transcoder of an MLP. Pass one that writes to "
                f"{layer_site(place.layer, MLP_OUT)!r}."
            )
        ahead = 1 if one.W_dec.ndim == 2 else one.W_dec.shape[1]
        later = range(place.layer, place.layer + ahead)
        if missing := [layer for layer in later if layer not in layers]:
            raise ValueError(
                f"{one} writes to the MLP of block {missing[0]}, which this model lacks. Pass a "
                "transcoder of this model."
            )
        if place.layer in found:
            raise ValueError(f"Two transcoders write to block {place.layer}. Pass one per block.")
        found[place.layer] = one, place
    if not found:
        raise ValueError("There is no transcoder. Pass one for every MLP, from features.load.")
    return found
