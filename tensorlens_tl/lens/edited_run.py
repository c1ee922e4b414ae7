"""What a lens says about edits: the effect of one, the smallest one, and which would matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..attribution import TargetLike
from ..checks import is_int, spelled
from ..circuits import Faithfulness
from ..editing import (
    Asked,
    Edit,
    EditRanking,
    Goal,
    edit_along,
    edit_to_top,
    faithfulness_of_features,
    rank_edits,
    smallest_edit,
)
from ..features import Feature
from .attributed_run import AttributedRun
from .featured_run import SAEs


@spelled
class EditedRun(AttributedRun):
    """A frozen run that predicts edits of itself; see :class:`TensorLens`."""

    def covector(
        self,
        target: TargetLike | Sequence[TargetLike] = None,
        versus: TargetLike | Sequence[TargetLike] = None,
        pos: int = -1,
        *,
        site: str | int,
        qk: bool = False,
        gates: bool = False,
    ) -> Float[Tensor, "batch pos d"]:
        """The gradient g of a target at a place: an edit δ there changes the target by ⟨g, δ⟩.

        Exact while attention patterns, norm scales and gating ratios stay as they were.

        Args:
            target: As in :meth:`attribute`, or a list with one per prompt.
            versus: What is subtracted from the target, or None; or a list.
            pos: Position of the prediction among the real tokens; −1 is the last.
            site: A residual site such as "blocks.2.hook_resid_pre", or a block's number for what
                it leaves; or "blocks.2.attn.hook_z", "….hook_v", "blocks.2.mlp.hook_post"; or a
                head "L2H1", an MLP "L2MLP", a neuron "L2N7", or an expert "L2E1": what it adds,
                times its routing weight, at the tokens that reach it.
            qk: Whether attention scores move, too, to first order.
            gates: Whether the gating ratios of MLPs move, too, to first order. With ``qk`` only
                the scales of norms are then held.

        Returns:
            The covector at every position [batch, pos, width], in logits per unit.

        Raises:
            ValueError: If the target or the place does not exist.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.covector("Paris", site=1).shape
            torch.Size([1, 6, 128])
        """
        asked = self._asked(site, None, "identity", qk, gates)
        return asked.covector(Goal.of(self.capture, target, versus, pos).on(self.capture))

    def effect(
        self,
        delta: Tensor,
        target: TargetLike | Sequence[TargetLike] = None,
        versus: TargetLike | Sequence[TargetLike] = None,
        pos: int = -1,
        *,
        site: str | int,
        positions: int | Sequence[int] | None = -1,
        qk: bool = False,
        gates: bool = False,
    ) -> Float[Tensor, "*many batch"]:
        """Predict how an edit changes a target, without running the model.

        The change is ⟨g, δ⟩ with the covector g of :meth:`covector`. The real model's change also
        has what the edit does to patterns, scales and ratios: see :meth:`Edit.check`.

        Args:
            delta: What is added: one vector [width] at all ``positions``; or [pos, width] or
                [batch, pos, width], whatever ``positions`` is. A further axis in front of the
                latter holds many edits.
            target: As in :meth:`covector`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            site: The place, as in :meth:`covector`.
            positions: Where a vector is added, among the real tokens; None is everywhere.
            qk: Whether attention scores move, too, to first order.
            gates: Whether the gating ratios of MLPs move, too, to first order. With ``qk`` only
                the scales of norms are then held.

        Returns:
            The predicted change in logits [batch], or [many, batch].

        Raises:
            ValueError: If the edit does not fit the place, or the target does not exist.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> state = lens.operator.states()["blocks.2.hook_resid_pre"]
            >>> change = lens.effect(-state, "Paris", site="blocks.2.hook_resid_pre")
            >>> bool(change < 0)
            True
        """
        asked = self._asked(site, positions, "identity", qk, gates)
        g = asked.covector(Goal.of(self.capture, target, versus, pos).on(self.capture))
        return (g * asked.spread(delta)).flatten(-2).sum(-1)

    def edit(
        self,
        target: TargetLike | Sequence[TargetLike] = None,
        versus: TargetLike | Sequence[TargetLike] = None,
        pos: int = -1,
        *,
        site: str | int | None = None,
        to: int | float | Sequence[float] | None = None,
        by: int | float | Sequence[float] | None = None,
        delta: Tensor | None = None,
        positions: int | Sequence[int] | None = -1,
        keep: TargetLike | Mapping[str, Any] | Sequence[TargetLike | Mapping[str, Any]] = (),
        metric: str | Tensor = "identity",
        qk: bool = False,
        gates: bool = False,
        shared: bool = False,
        along: Feature | None = None,
        activation: int | float | None = None,
    ) -> Edit:
        """Find the smallest edit that brings a target to a value; or predict your own edit.

        δ = M⁻¹ Gᵀ (G M⁻¹ Gᵀ)⁻¹ t has the smallest δᵀ M δ of all edits that change the target by
        what is asked and what is kept by 0, in the frozen model.

        Args:
            target: As in :meth:`covector`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            site: The place, as in :meth:`covector`.
            to: The value that is wanted, in logits, or one per prompt.
            by: The change that is wanted, in logits, or one per prompt; 0 keeps a prompt's target.
            delta: Your own edit, as in :meth:`effect`. Give one of ``to``, ``by`` and ``delta``.
            positions: Positions that may be edited, among the real tokens; None is all.
            keep: Targets that may not change, one or a list: tokens, or mappings with "target", and
                "versus" and "pos" where they matter; or {"direction": w} for a probe w at the place
                itself.
            metric: What an edit costs: "identity" for ‖δ‖²; "activations" to weigh dimensions by
                their mean square in this run; or your own second moments, [width] or
                [width, width].
            qk: Whether attention scores move, too, to first order.
            gates: Whether the gating ratios of MLPs move, too, to first order. With ``qk`` only
                the scales of norms are then held.
            shared: Whether all prompts and ``positions`` get one vector: the smallest by which
                every prompt's target changes by at least what is asked, and by 0 where 0 is asked.
            along: A feature, ``sae.feature(17)``, along whose direction the edit is; its SAE names
                the site. The error that the SAE leaves stays as it is.
            activation: The activation that the feature gets, 0 to remove it; in place of ``to`` and
                ``by``.

        Returns:
            The edit: its prediction, its hooks, and its check in the real model.

        Raises:
            ValueError: If an argument does not fit, or no such edit exists.

        Example:
            >>> from tensorlens_tl import demo
            >>> model = demo.load_model()
            >>> _, lens = model.run_with_tensorlens("The capital of France is")
            >>> edit = lens.edit("Paris", versus="Rome", by=-10.0, site=1)
            >>> edit
            Edit(blocks.1.hook_resid_post, 1 prompt, target ... predicted, ... of what stands there)
            >>> edit.check(model)
            Edit at blocks.1.hook_resid_post, in the real model (predicted off by ...)
              ...
        """
        kept = keep is not None and not (isinstance(keep, list | tuple) and not keep)
        if along is not None:
            if (
                not isinstance(along, Feature)
                or site is not None
                or delta is not None
                or kept
                or shared
            ):
                raise ValueError(
                    f"along={along!r} names the site and the edit. Pass a feature of an SAE, and "
                    "drop site=, delta=, keep= and shared=."
                )
            (reading,) = self._readings(along.dictionary)
            site = reading.place.edited_at(self._operator)
            asked = self._asked(site, positions, metric, qk, gates)
            goal = Goal.of(self.capture, target, versus, pos)
            return edit_along(asked, goal, reading, along, to, by, activation)
        if site is None or activation is not None:
            missing = "site= is missing" if site is None else "activation= needs along="
            raise ValueError(f"{missing}. Pass a place such as site=2, or along=sae.feature(17).")
        asked = self._asked(site, positions, metric, qk, gates)
        goal = Goal.of(self.capture, target, versus, pos)
        if delta is None:
            return smallest_edit(asked, goal, to, by, keep, shared)
        if to is not None or by is not None or kept:
            raise ValueError("delta= is an edit already. Drop to=, by= and keep=, or drop delta=.")
        return asked.edit(goal, asked.spread(delta))

    def edit_to_top(
        self,
        token: TargetLike,
        pos: int = -1,
        *,
        site: str | int,
        margin: int | float = 1.0,
        positions: int | Sequence[int] | None = -1,
        metric: str | Tensor = "identity",
    ) -> Edit:
        """Find the smallest edit that makes a token the likeliest one, in the frozen model.

        It solves min δᵀ M δ such that the token's logit exceeds every other one by ``margin``.

        Args:
            token: The token that is to be predicted.
            pos: Position of the prediction among the real tokens; −1 is the last.
            site: A residual site, or the number of a block for what it leaves.
            margin: By how much the logit is to exceed all others, in logits, above 0.
            positions: Positions that may be edited, among the real tokens; None is all.
            metric: What an edit costs, as in :meth:`edit`.

        Returns:
            The edit. Its target is the token's logit less that of the likeliest other one.

        Raises:
            ValueError: If the token or the place does not exist, or no edit is found.

        Example:
            >>> from tensorlens_tl import demo
            >>> model = demo.load_model()
            >>> _, lens = model.run_with_tensorlens("The capital of France is")
            >>> lens.edit_to_top("Rome", site=2).check(model).tops
            (('Paris', 'Rome'),)
        """
        return edit_to_top(self._asked(site, positions, metric), token, pos, margin)

    def steering_vector(
        self,
        target: TargetLike | Sequence[TargetLike] = None,
        versus: TargetLike | Sequence[TargetLike] = None,
        pos: int = -1,
        *,
        site: str | int,
    ) -> Float[Tensor, " d"]:
        """Make one direction of all prompts that raises a target: the mean covector at ``pos``.

        Args:
            target: As in :meth:`covector`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction, and of the direction.
            site: The place, as in :meth:`covector`.

        Returns:
            The direction [width], so long that it raises the target by 1 logit in the mean of the
            frozen prompts when it is added at ``pos``.

        Raises:
            ValueError: If the target or the place does not exist, or the target does not depend on
                the place.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens(
            ...     ["The capital of France is", "The capital of Italy is"]
            ... )
            >>> v = lens.steering_vector("Paris", versus="Rome", site=1)
            >>> round(float(lens.effect(v, "Paris", versus="Rome", site=1).mean()), 4)
            1.0
        """
        asked = self._asked(site, pos)
        g = asked.row(Goal.of(self.capture, target, versus, pos).on(self.capture)).sum(1)
        mean = g.mean(0)
        if not bool(mean.square().sum() > 0):
            raise ValueError(
                f"The target does not depend on site={site!r} at pos={pos}. Pass another site."
            )
        return mean / mean.square().sum()

    def rank_edits(
        self,
        target: TargetLike | Sequence[TargetLike] = None,
        versus: TargetLike | Sequence[TargetLike] = None,
        pos: int = -1,
        *,
        by: str = "site",
        budget: int | float = 0.1,
        saes: SAEs = None,
        ablation: str = "zero",
        corrupted: EditedRun | None = None,
    ) -> EditRanking:
        """Rank edits by the change of a target that they predict, from one sweep.

        Args:
            target: As in :meth:`covector`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            by: "site" for the best edit of a given size at every site and position; "head",
                "neuron" or "expert" for the removal of each; "feature" for that of the features of
                ``saes``.
            budget: Size of the edit of a site, as a share of what stands there.
            saes: SAEs of ``features.load``, for ``by="feature"``.
            ablation: What the activations of a feature become: "zero", "mean" over all tokens of
                this lens, or "resample" for those in ``corrupted``.
            corrupted: The lens of prompts of the same lengths, for "resample".

        Returns:
            The predicted change of every edit.

        Raises:
            ValueError: If an argument does not exist.

        Example:
            >>> from tensorlens_tl import demo
            >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
            >>> lens.rank_edits("Paris", by="head").top(1)  # what its removal is predicted to do
            [('L1H0', -...)]
        """
        self._check_ready()
        goal = Goal.of(self.capture, target, versus, pos).on(self.capture)
        if (by == "feature") != (saes is not None):
            raise ValueError(
                f"by={by!r} and saes= do not go together. Pass by='feature' and saes=."
            )
        if by != "feature" and (ablation != "zero" or corrupted is not None):
            raise ValueError("ablation= and corrupted= are for by='feature'. Drop them.")
        readings = self._readings(saes) if by == "feature" else ()
        others = None if corrupted is None else corrupted._readings(saes)
        return rank_edits(
            self.capture, self._operator, goal, by, budget, readings, ablation, others
        )

    def feature_faithfulness(
        self,
        model: Any,
        saes: SAEs,
        keep: Sequence[Feature] | int,
        target: TargetLike | Sequence[TargetLike] = None,
        versus: TargetLike | Sequence[TargetLike] = None,
        pos: int = -1,
        *,
        ablation: str = "zero",
        corrupted: EditedRun | None = None,
        seed: int = 0,
    ) -> Faithfulness:
        """Test features as a circuit: the real model with all others of their sites replaced.

        At every site x becomes x + Σ (z′ − z) d over the features that are not kept, with z as they
        are in that very run. So the errors of the SAEs stay, and everything else is live.

        Args:
            model: The model of the lens, with the weights it had then.
            saes: One SAE, or several, of the residual or of what sublayers write.
            keep: The features that stay, such as ``[sae.feature(17)]``; or how many: those whose
                replacement is predicted to move the target most, |Σ (z′ − z) ⟨g, d⟩| with g the
                covector of the target at the site.
            target: As in :meth:`covector`.
            versus: What is subtracted from the target, or None.
            pos: Position of the prediction among the real tokens; −1 is the last.
            ablation: What z′ is: "zero", "mean" over all tokens of this lens, or "resample" for the
                activations in ``corrupted``.
            corrupted: The lens of prompts of the same lengths, for "resample".
            seed: Seed of the bootstrap over prompts.

        Returns:
            The share of the target that the features keep, in between all and none of them.

        Raises:
            ValueError: If an argument does not fit, or the model is another one.

        Example:
            >>> import torch
            >>> from tensorlens_tl import demo, features
            >>> model = demo.load_model()
            >>> _, lens = model.run_with_tensorlens("The capital of France is")
            >>> W = torch.eye(128)
            >>> weights = {"W_enc": W, "W_dec": W, "b_enc": W[0] * 0, "b_dec": W[0] * 0}
            >>> sae = features.load(weights, site="blocks.2.hook_resid_pre")
            >>> every = [sae.feature(i) for i in range(sae.d_sae)]
            >>> found = lens.feature_faithfulness(model, sae, every, "Paris")
            >>> round(found.share, 4)
            1.0
        """
        self._check_ready()
        goal, readings = Goal.of(self.capture, target, versus, pos), self._readings(saes)
        others = None if corrupted is None else corrupted._readings(saes)
        kept = int(keep) if is_int(keep) else list(keep)  # type: ignore[arg-type]
        return faithfulness_of_features(
            model, self.capture, goal, readings, kept, ablation, others, seed
        )

    def _asked(
        self,
        site: str | int,
        positions: int | Sequence[int] | None = None,
        metric: str | Tensor = "identity",
        qk: bool = False,
        gates: bool = False,
    ) -> Asked:
        self._check_ready()
        return Asked(self.capture, self._operator, site, positions, metric, qk, gates)
