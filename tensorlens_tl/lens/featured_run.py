"""The features of SAEs in one captured run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ..features import FeatureDictionary, Reading
from .frozen_run import FrozenRun

SAEs = FeatureDictionary | Sequence[FeatureDictionary] | None
"""One SAE, or several, of ``features.load``."""


class FeaturedRun(FrozenRun):
    """A captured run that knows what features are at the sites of SAEs; see :class:`TensorLens`."""

    def _readings(self, saes: SAEs) -> list[Reading]:
        """The features of each SAE in this run, computed once."""
        given = [saes] if isinstance(saes, FeatureDictionary) else list(saes or ())
        if not given or not all(isinstance(sae, FeatureDictionary) for sae in given):
            raise ValueError(
                f"saes={saes!r} names no SAE. Pass what tensorlens_tl.features.load gives, or a "
                "list of such."
            )
        for sae in given:
            if sae not in self._read:
                self._read[sae] = Reading.of(sae, self.capture, self._operator)
        return [self._read[sae] for sae in given]

    @cached_property
    def _read(self) -> dict[FeatureDictionary, Reading]:
        return {}
