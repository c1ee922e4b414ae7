"""Ask a run for edits: the smallest one for a target, the one that makes a token the likeliest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..attribution import Target, TargetGradient, TargetLike, resolve_token
from ..checks import as_list, finite, is_int, kind_of, one_each, spelled
from ..costs import rehearsed
from ..features import Feature, Reading
from ..maps import HALF, TINY
from ..operator import Capture, FrozenTransformer
from .edit import Edit
from .goals import Goal
from .places import Place, pulled
from .smallest import EditCost, smallest, smallest_above, smallest_shared

CAP_MOVED = 0.1
"""How far a soft cap's ratio may move under an edit, as a share of itself."""


class Asked:
    """A run, a place in it, and the positions there that may be edited.

    Args:
        capture: The captured run.
        operator: The operator of that run.
        site: The place, as in :meth:`Place.of`.
        positions: Positions among the real tokens, one or several; None is all of them.
        metric: What an edit costs, as in :class:`EditCost`.
        qk: Whether the prediction includes queries and keys, to first order.
        gates: Whether it includes the gating ratios of MLPs, to first order.
    """

    def __init__(
        self,
        capture: Capture,
        operator: FrozenTransformer,
        site: str | int,
        positions: int | Sequence[int] | None = None,
        metric: str | Tensor = "identity",
        qk: bool = False,
        gates: bool = False,
    ):
        self.capture, self.operator, self.moves = capture, operator, (qk, gates)
        self.place = Place.of(operator, site)
        self.state = self.place.state(operator, capture)
        self.where = _places(capture, positions)
        self.metric = EditCost(metric, self.state, capture.frame.real)

    def covector(self, target: Target) -> Float[Tensor, "batch pos d"]:
        """The gradient of a target at the place, at every position."""
        gradient = TargetGradient(self.capture, self.operator, target)
        return self.place.covector(self.operator, pulled(gradient, *self.moves))

    def row(self, target: Target) -> Float[Tensor, "batch pos d"]:
        """The same, 0 where nothing may be edited."""
        return self.covector(target) * self.where[..., None]

    def spread(self, delta: Tensor) -> Float[Tensor, "*many batch pos d"]:
        """Lay an edit of any shape out at every position.

        Args:
            delta: A vector, which goes to the edited positions, or numbers at every position.

        Returns:
            The edit [..., batch, pos, width].

        Raises:
            ValueError: If it does not fit the place.
        """
        d = _numbers(delta, "delta=").to(self.state)
        width, own = self.state.shape[-1], range(self.state.shape[-1])[self.place.columns]
        if d.ndim and d.shape[-1] == len(own) < width:  # of one head or neuron
            # One head's vector is some columns of z, and 0 in those of all other heads.
            whole = d.new_zeros(*d.shape[:-1], width)
            whole[..., self.place.columns] = d
            d = whole
        if d.shape == (width,):
            # A single vector goes to the edited positions; what has positions of its own stays as
            # it is.
            return d * self.where[..., None]
        shape = self.state.shape
        if d.shape == shape[1:] or d.shape[-3:] == shape:
            return d.expand(*d.shape[:-3], *shape)
        raise ValueError(
            f"delta= has shape {list(d.shape)}. Pass [{width}], {list(shape[1:])} or {list(shape)}."
        )

    def edit(self, goal: Goal, delta: Tensor, g: Tensor | None = None) -> Edit:
        """Make an edit of what is added, and predict what it does.

        Args:
            goal: The target that is to change.
            delta: What is added [batch, pos, width].
            g: The target's covector at the place, if it is known.

        Returns:
            The edit, with what it predicts.

        Raises:
            ValueError: If rounding would swallow the edit, or the frozen soft cap would not hold.
        """
        target = goal.on(self.capture)
        g = self.covector(target) if g is None else g
        # ⟨g, δ⟩ over all positions and dimensions: exact in the frozen model.
        predicted = (g * delta).flatten(1).sum(-1)
        edited = delta.abs().sum(-1) > 0
        # Against what stands at the edited positions alone, or long prompts would make edits look
        # small.
        stands = (self.state * edited[..., None]).flatten(1).norm(dim=-1).clamp_min(TINY)
        size = delta.flatten(1).norm(dim=-1) / stands
        dtype = self.capture.logits.dtype
        lost = dtype in HALF and bool(((size > 0) & (size < torch.finfo(dtype).eps)).any())
        if lost and not rehearsed():
            raise ValueError(
                f"The edit is {float(size.min()):.0e} of what stands there, which a model in "
                f"{str(dtype).removeprefix('torch.')} rounds away. Load the model in float32."
            )
        self._refuse_cap(target, predicted)
        return Edit(
            self.place, delta, goal, target.value, predicted, size, self.capture, self.moves
        )

    def _refuse_cap(self, target: Target, predicted: Tensor) -> None:
        cap = self.capture.unembed.weights.soft_cap
        if cap is None:
            return
        # Capped logits l = c tanh(z / c); the ratio l / z is held. Moved by Δ, it is another one.
        # A logit that rounds to the cap itself would have an infinite z.
        top = self.capture.logits.abs().max().clamp(max=cap * (1 - 1e-6)).to(predicted)
        z = cap * torch.atanh(top / cap)
        ratio = top / z
        moved = z + predicted.abs().max() / ratio
        if float((cap * torch.tanh(moved / cap) / moved / ratio - 1).abs()) > CAP_MOVED:
            raise ValueError(
                f"The edit moves logits by {float(predicted.abs().max()):.3g}, and the model caps "
                f"them at {cap:g}: the held ratio of the cap would be off by more than a tenth. "
                "Ask for a smaller change."
            )


@spelled
def smallest_edit(
    asked: Asked,
    goal: Goal,
    to: int | float | Sequence[float] | None,
    by: int | float | Sequence[float] | None,
    keep: TargetLike | Mapping[str, Any] | Sequence[TargetLike | Mapping[str, Any]],
    shared: bool = False,
) -> Edit:
    """The smallest edit that brings a target to a value, or changes it by one.

    Args:
        asked: Run, place and positions.
        goal: The target that is to change.
        to: The value that is wanted, in logits, or one per prompt, or None.
        by: The change that is wanted, in logits, or one per prompt, or None. Give one of the two.
        keep: Targets that may not change, one or a list: tokens, or mappings with target, versus
            and pos; or a probe at the place itself, {"direction": [width]}.
        shared: Whether all prompts and positions get one vector. Then a target changes by at least
            what is asked.

    Returns:
        The edit, with what it predicts.

    Raises:
        ValueError: If both or none of ``to`` and ``by`` are given, they are of other prompts, or no
            such edit exists.
    """
    if (to is None) == (by is None):
        raise ValueError("Both or none of to= and by= are given. Give one of the two.")
    target = goal.on(asked.capture)
    change = _change(target.value, to, by)
    g = asked.covector(target)
    rows = [g * asked.where[..., None]]
    for one in _targets(keep):
        rows += _kept(asked, one, goal.pos)
    wanted = torch.stack([change, *[torch.zeros_like(change)] * (len(rows) - 1)], 1).to(g)
    if shared:
        vector = smallest_shared(torch.stack(rows, 1), wanted, wanted.sign(), asked.metric)
        return asked.edit(goal, asked.spread(vector), g)
    return asked.edit(goal, smallest(torch.stack(rows, 1), wanted, asked.metric), g)


@spelled
def edit_along(
    asked: Asked,
    goal: Goal,
    reading: Reading,
    feature: Feature,
    to: int | float | Sequence[float] | None,
    by: int | float | Sequence[float] | None,
    activation: int | float | None,
) -> Edit:
    """Edit a run along one feature.

    Args:
        asked: Run, place and positions.
        goal: The target that is to change.
        reading: The features of the run.
        feature: The feature along whose decoder row the edit is.
        to: The value of the target that is wanted, or one per prompt, or None.
        by: The change of the target that is wanted, or one per prompt, or None.
        activation: The activation that the feature gets, or None. Give one of the three.

    Returns:
        The edit, with what it predicts.

    Raises:
        ValueError: If not one of the three is given, or the target does not depend on the feature.
    """
    if sum(value is not None for value in (to, by, activation)) != 1:
        raise ValueError("along= needs one of to=, by= and activation=. Give one of the three.")
    shape = asked.where.shape
    d = feature.dictionary.W_dec[feature.index].to(asked.state)
    d = reading.unscale.view(shape)[..., None] * d * asked.where[..., None]
    if activation is not None:
        activation = finite(activation, "activation")
        return asked.edit(goal, (activation - reading.acts_of(feature.index))[..., None] * d)
    target = goal.on(asked.capture)
    change = _change(target.value, to, by)
    g = asked.covector(target)
    size = (d * d).sum(-1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)
    # g cut to the line of d at every position, so that the edit is along the feature alone.
    along = (g * d).sum(-1, keepdim=True) / size * d
    return asked.edit(goal, smallest(along[:, None], change[:, None].to(g), asked.metric), g)


@spelled
def edit_to_top(
    asked: Asked, token: TargetLike, pos: int, margin: int | float, most: int = 10
) -> Edit:
    """The smallest edit that makes a token the likeliest one.

    A token that would still be likelier becomes a further condition, up to ``most`` of them.

    Args:
        asked: Run, place and positions.
        token: The token, for every prompt.
        pos: Position of the prediction among the real tokens.
        margin: By how much the logit is to exceed all others, in logits, above 0.
        most: How many other tokens are looked at.

    Returns:
        The edit. Its target is the token's logit less the likeliest other one's.

    Raises:
        ValueError: If the edit does not settle, or depends on nothing here.
    """
    capture, frame = asked.capture, asked.capture.frame
    if (margin := finite(margin, "margin")) <= 0:
        raise ValueError(
            f"margin={margin:g} lets another token win. Pass one above 0, such as 1.0."
        )
    wanted = resolve_token(capture, token)
    # Later edits replace earlier ones, so logits are always those of the run plus one push.
    to_end = asked.operator.between(_site(asked), asked.operator.sites[-1])
    query, prompts = frame.index(pos), torch.arange(frame.batch, device=frame.device)
    rows: dict[int, Tensor] = {}
    delta = frame.zeros(asked.state.shape[-1])
    known: list[list[int]] = [[] for _ in range(frame.batch)]
    for _ in range(most):
        y = (capture.unembed.final + to_end.apply(delta))[prompts, query]
        logits = y @ frame.cast(capture.unembed.weights.W_U)
        if (b_U := capture.unembed.weights.b_U) is not None:
            logits = logits + frame.cast(b_U)
        lead = logits[:, wanted, None] - logits
        lead[:, wanted] = torch.inf  # not its own rival
        # The margin is met up to rounding, or the loop would ask for it for ever.
        rounding = 1e3 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
        short = (lead.min(1).values < margin - rounding).nonzero().flatten().tolist()
        if not short or (rows and rehearsed()):  # every number there is the same
            break
        for i in short:
            rival = int(lead[i].argmin())
            known[i] = [*known[i], rival] if rival not in known[i] else known[i]
            if rival not in rows:
                both = Goal.of(capture, wanted, rival, pos).on(capture)
                rows[rival] = asked.row(both)
        for i in short:
            stack = torch.stack([rows[rival][i] for rival in known[i]])
            y0 = capture.unembed.final[i, query[i]]
            z = y0 @ frame.cast(capture.unembed.weights.W_U)
            z = z if b_U is None else z + frame.cast(b_U)
            # Asked of the run as it was, since ``delta`` is found anew with one condition more.
            need = torch.stack([z[rival] - z[wanted] for rival in known[i]]) + margin
            delta[i] = smallest_above(stack, need, asked.metric)
    else:
        raise ValueError(
            f"After {most} other tokens {token!r} is still not the likeliest. Ask at another site, "
            "or at more positions."
        )
    rivals = [
        k[0] if k else int(capture.logits_at(query)[i].topk(2).indices[1])
        for i, k in enumerate(known)
    ]
    return asked.edit(Goal.of(capture, wanted, rivals, pos), delta)


def _site(asked: Asked) -> str:
    if asked.place.kind != "resid":
        raise ValueError(
            f"site={asked.place.name!r} is inside a sublayer, and edit_to_top is for residual "
            "sites. Pass one, such as 2."
        )
    return asked.operator.sites[asked.place.step]


def _change(value: Tensor, to: Any, by: Any) -> Float[Tensor, " batch"]:
    """The change of every prompt's target: one number for all, or one for each."""
    given, name = (by, "by") if to is None else (to, "to")
    given = given.tolist() if getattr(given, "ndim", 0) == 1 else given
    each = [finite(one, name) for one in one_each(given, len(value), f"{name}=")]
    wanted = value.new_tensor(each)
    return wanted if to is None else wanted - value


def _targets(given: Any) -> list[Any]:
    """What ``keep=`` lists; one target alone is a list of one."""
    if given is None or isinstance(given, str | Mapping):
        return [] if given is None else [given]
    listed = as_list(given)
    if isinstance(listed, list | tuple):
        direction = bool(listed) and all(isinstance(x, float) for x in listed)
        return [given] if direction else list(listed)
    alone = hasattr(given, "ndim") or not isinstance(given, Iterable)
    return [given] if alone else list(given)


def _numbers(given: Any, name: str) -> Tensor:
    """A vector or an edit as a tensor of finite numbers."""
    try:
        found = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {kind_of(given)}, not a tensor. Pass numbers.") from None
    if found.is_complex() or not bool(found.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not real and finite. Pass real numbers.")
    return found


def _kept(asked: Asked, one: TargetLike | Mapping[str, Any], pos: int) -> list[Tensor]:
    """The rows of something that an edit may not change."""
    if not isinstance(one, Mapping):
        return [asked.row(Goal.of(asked.capture, one, None, pos).on(asked.capture))]
    if set(one) == {"direction"}:
        w = _numbers(one["direction"], "keep= direction").to(asked.state)
        if w.shape != asked.state.shape[-1:]:
            raise ValueError(
                f"keep= has a direction of shape {list(w.shape)}. Pass one of the place, "
                f"[{asked.state.shape[-1]}]."
            )
        counts = asked.where.sum(1)
        if int(counts.min()) < int(counts.max()):
            raise ValueError(
                "keep= has a direction, and the prompts have different numbers of edited "
                "positions. List positions=, or edit prompts of one length."
            )
        # At each edited position by itself: the first of every prompt, the second, and so on.
        rank = asked.where.cumsum(1) * asked.where
        return [(rank == n)[..., None] * w for n in range(1, int(counts.max()) + 1)]
    if not {"target"} <= set(one) <= {"target", "versus", "pos"}:
        raise ValueError(
            f"keep= has an entry with {', '.join(map(str, one)) or 'nothing'}. Give target, and "
            "versus and pos where they matter; or direction alone."
        )
    at = one.get("pos", pos)
    goal = Goal.of(asked.capture, one["target"], one.get("versus"), at)
    return [asked.row(goal.on(asked.capture))]


def _places(capture: Capture, positions: int | Sequence[int] | None) -> Bool[Tensor, "batch pos"]:
    frame = capture.frame
    if positions is None:
        return frame.real
    listed = [positions] if is_int(positions) else list(positions)  # type: ignore[arg-type]
    if not listed:
        raise ValueError("positions=[] names no position. Pass one, or None for all.")
    found = torch.zeros_like(frame.real)
    prompts = torch.arange(frame.batch, device=frame.device)
    for position in listed:
        found[prompts, frame.index(position)] = True
    return found
