"""Scores of all edges by the operator between packed runs of prompts and corrupted prompts.

It serves what the packed model knows, where targets are tokens. All else is captured, and split by
:func:`tensorlens_tl.attribution.difference`, which also refuses what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import is_token
from ..passes import EdgeModel, PackedModel, Run, SecantEffects, has_secant, normed, run
from ..sublayers import soft_cap_ratio
from .packed_pairs import PackedPairs
from .prompt_pairs import LogitMetric, Pairs, paired, token_ids


@dataclass(frozen=True, eq=False)
class PackedSearch:
    """A model, opened edge by edge, and the position of the prediction."""

    edged: EdgeModel
    pos: int

    @torch.no_grad()
    def sums(
        self,
        prompts: Sequence[Any],
        corrupted: Sequence[Any],
        targets: Sequence[Any],
        versus: Sequence[Any],
    ) -> Float[Tensor, "reader writer"] | None:
        """Score every edge, summed over prompts.

        Args:
            prompts: Strings or token ids.
            corrupted: One corrupted prompt for each.
            targets: A target for each, or None for what the clean run predicts.
            versus: What is subtracted from each, or None.

        Returns:
            The scores in double precision, or None where this way does not serve.
        """
        edged = self.edged
        if not all(map(is_token, (*targets, *versus))):
            return None
        try:
            goals = [token_ids(edged.adapter, given, "target") for given in (targets, versus)]
            groups = paired(edged.adapter, prompts, corrupted)
            metric = LogitMetric(None, None, None, self.pos)
            longest = max(metric.row(group.n_pos) + 1 for group in groups)
        except ValueError:  # the other way tells what is wrong
            return None
        model = self._model(longest)
        return None if model is None else self._sums(model, groups, metric, goals)

    def _model(self, longest: int) -> PackedModel | None:
        edged = self.edged
        entry = edged.points[0, "resid_pre"]
        model = PackedModel.of(edged.adapter, edged.universe.wiring, entry, longest)
        return model if model is not None and has_secant(model) else None

    def _sums(
        self,
        model: PackedModel,
        groups: list[Pairs],
        metric: LogitMetric,
        goals: list[list[int | None]],
    ) -> Tensor | None:
        universe, first = self.edged.universe, True
        total = torch.zeros(len(universe.readers), len(universe.writers), dtype=torch.double)
        most = model.most_tokens(len(universe.writers))
        for p in PackedPairs.pieces(groups, metric, self.edged.device, lambda n: most // n):
            where, *embedded, past = p.entered(model)
            runs = [run(model, where, x, past=past, activated=True) for x in embedded]
            logits = model.logits(runs[0].last)
            # One comparison with the host is enough: it tells whether the weights are read rightly.
            if first and not model.agrees(p.rows[0], logits[0]):
                return None
            first, own = False, logits.argmax(-1).tolist()
            each = p.index.tolist()
            ids = [own[j] if (t := goals[0][i]) is None else t for j, i in enumerate(each)]
            foils = [goals[1][i] for i in each]
            us = [_covector(model, r, ids) - _covector(model, r, foils) for r in runs]
            # A soft cap's ratio, held inside u, differs between the runs: their mean is taken.
            found = SecantEffects(model, universe, *runs).sums((us[0] + us[1]) / 2)
            if found is None:
                return None
            # In float64, so that the order of many prompts' sums does not show.
            total += found.to(total)
        return total


def _covector(
    model: PackedModel, run: Run, ids: Sequence[int | None]
) -> Float[Tensor, "prompt d_model"]:
    """The covectors of logits at the final normalized residual, a soft cap's ratio held."""
    w = model.unembed
    # Where nothing is subtracted, some column is gathered, and multiplied by 0.
    given = [0 if i is None else i for i in ids]
    there = w.W_U.new_tensor([i is not None for i in ids])[:, None]
    u = w.W_U.detach()[:, given].T * there
    if w.soft_cap is None:
        return u
    raw = (normed(model.adapter.weights.ln_final, run.last) * u).sum(-1)
    raw = raw if w.b_U is None else raw + w.b_U.detach()[given]
    return u * soft_cap_ratio(raw, w.soft_cap)[:, None]
