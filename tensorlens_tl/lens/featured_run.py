"""The features of SAEs in one captured run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from ..attribution import Attribution, TargetGradient
from ..checks import kind_of, spelled
from ..costs import Plan
from ..features import (
    FeatureDictionary,
    Reading,
    by_feature,
    by_feature_edge,
    check_fits,
    plan_by_feature,
)
from .frozen_run import FrozenRun

SAEs = FeatureDictionary | Sequence[FeatureDictionary] | None
"""One SAE, or several, of ``features.load``."""


@spelled
class FeaturedRun(FrozenRun):
    """A captured run that knows what features are at the sites of SAEs; see :class:`TensorLens`."""

    def _by_feature(self, gradient: TargetGradient, by: str, saes: SAEs, qk: bool) -> Attribution:
        """A target split by feature, or by edge from the features of one site on."""
        readings = self._readings(saes)
        if by == "edge" and len(readings) == 1:
            return by_feature_edge(gradient, readings[0], qk)
        if by == "edge" or qk:
            asked = "qk=True" if qk else f"by={by!r} with {len(readings)} SAEs"
            raise ValueError(f"{asked} is not available here. Pass by='edge' and one SAE.")
        return by_feature(gradient, readings)

    def _readings(self, saes: SAEs) -> list[Reading]:
        """The features of each SAE in this run, computed once."""
        given = listed(saes)
        for sae in given:
            if sae not in self._read:
                self._read[sae] = Reading.of(sae, self.capture, self._operator)
        return [self._read[sae] for sae in given]

    def _plan_by_feature(self, saes: SAEs, what: str) -> Plan:
        """What a split by feature will cost."""
        given = listed(saes)
        for sae in given:
            check_fits(sae, self.capture)
        return plan_by_feature(self._operator, given, self._read, what)

    @cached_property
    def _read(self) -> dict[FeatureDictionary, Reading]:
        return {}


def listed(saes: SAEs, name: str = "saes", kind: str = "SAE") -> list[FeatureDictionary]:
    """The dictionaries that were given, at least one.

    Args:
        saes: What the user passed.
        name: The name of the user's argument, for messages.
        kind: What it asks for, for messages.

    Returns:
        The dictionaries in a list.

    Raises:
        ValueError: If it is none, or two of them write at one place.
    """
    every = [saes] if not isinstance(saes, Iterable) or isinstance(saes, str) else list(saes)
    given = [sae for sae in every if isinstance(sae, FeatureDictionary)]
    if not given or len(given) < len(every):
        raise ValueError(
            f"{name}= is {kind_of(saes)}, which names no {kind}. Pass what "
            "tensorlens_tl.features.load gives, or a list of such."
        )
    sites = [sae.writes for sae in given]
    if twice := next((site for site in sites if sites.count(site) > 1), None):
        raise ValueError(
            f"{name}= has {sites.count(twice)} dictionaries that write at {twice!r}, and each "
            "would count all that stands there. Pass one for each site."
        )
    return given
