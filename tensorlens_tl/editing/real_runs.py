"""The real model on the prompts of an edit: whose it is, its runs, its gradient.

In a circuit of features x becomes x + Σ (z′ − z) d over all others of their sites. What an SAE
leaves out stays as it is, and z follows from the run that is edited, so sites may be several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..attribution import TargetGradient
from ..checks import spelled
from ..circuits import Faithfulness
from ..features import Feature, Reading
from ..hosts import Adapter, adapt
from ..operator import Capture, FrozenTransformer, Prompts
from ..readers import alone, is_spliced
from ..recording import freeze
from .goals import Goal
from .places import Place
from .ranking import feature_effects, replacements

Hook = tuple[str, Callable[..., Tensor]]
"""A hook point of the host, and a function of its activation."""


def check_same(adapter: Adapter, run: Capture) -> None:
    """Refuse another model than the one whose run is edited, by its output matrices.

    Args:
        adapter: Adapter of the model that is to be run.
        run: The run that is edited.

    Raises:
        ValueError: If W_U or a block's W_O differs.
    """
    mine = (adapter.weights.unembed.W_U, *(b.attn.W_O for b in adapter.weights.blocks))
    its = (run.unembed.weights.W_U, *(b.attn.weights.W_O for b in run.blocks))
    pairs = zip(mine, its, strict=False)
    if len(mine) != len(its) or not all(torch.equal(a, b.to(a)) for a, b in pairs):
        raise ValueError(
            f"{adapter.name} has other weights than the model of the lens. Pass the model of the "
            "lens, with the weights it had then."
        )


def require_hook(adapter: Adapter, hook: str) -> None:
    """Refuse a hook point that the host lacks.

    Args:
        adapter: Adapter of the model that is to be run.
        hook: Name of the hook point.

    Raises:
        ValueError: If there is none of this name, or an SAE stands in its place.
    """
    if hook not in adapter.hooks:
        raise ValueError(
            f"{adapter.name} has no hook point {hook}. Pass the model of the lens, or edit "
            "another site."
        )
    if is_spliced(adapter.hooks, hook):
        raise ValueError(
            f"An SAE stands in place of {hook}, which cannot be edited then. Take it off "
            "(model.reset_saes()), and capture again."
        )


def require_point(adapter: Adapter, hook: str) -> None:
    """Refuse a hook point that the host lacks, or whose edits do not enter the residual.

    Args:
        adapter: Adapter of the model that is to be run.
        hook: Name of the hook point.

    Raises:
        ValueError: If edits at that point are not what an edit of the place would do.
    """
    require_hook(adapter, hook)
    if hook.endswith(tuple(adapter.before_edits)):
        raise ValueError(
            f"{adapter.name} does not add what an edit at {hook} leaves: only the MLP reads it. "
            "Edit what a block reads or what it leaves."
        )


def groups(prompts: Prompts) -> Iterator[tuple[Int[Tensor, " row"], Tensor, Tensor]]:
    """Prompts of one length together, without their padding.

    Args:
        prompts: The prompts of a run.

    Yields:
        Numbers of the prompts, their columns in the run [row, pos], and what the model is run on.
    """
    device = prompts.given.device
    spans = torch.tensor(prompts.spans, device=device)
    lengths = spans[:, 1] - spans[:, 0]
    for n in sorted(set(lengths.tolist())):
        rows = (lengths == n).nonzero().flatten()
        columns = spans[rows, :1] + torch.arange(n, device=device)
        whole = prompts.tokens is None
        yield rows, columns, prompts.given[rows] if whole else prompts.given[rows[:, None], columns]


def jacobian_covectors(
    adapter: Adapter,
    run: Capture,
    place: Place,
    goal: Goal,
    delta: Float[Tensor, "batch pos d"] | None = None,
) -> tuple[Float[Tensor, "batch pos d"], Float[Tensor, " batch"]]:
    """The real model's gradient of a target at a place: everything moves.

    Args:
        adapter: Adapter of the model.
        run: The run whose prompts are taken.
        place: Where the gradient is taken.
        goal: The target whose gradient is taken.
        delta: An edit at the place, at which the gradient is taken; None for the run itself.

    Returns:
        The gradient at every position, and the target's value.
    """
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for rows, columns, ids in groups(run.prompts):
        seen: list[Tensor] = []

        def watch(tensor: Tensor, hook: Any, seen: list[Tensor] = seen) -> Tensor:
            # Its gradient is that at the place: the tensor itself may be a view, or made in no
            # graph.
            nudge = torch.zeros_like(tensor.flatten(2)).requires_grad_()
            seen.append(nudge)
            return tensor + nudge.view_as(tensor)

        edits = [] if delta is None else hooks_of(place, delta[rows[:, None], columns])
        with alone(adapter.model), torch.inference_mode(False), torch.enable_grad():
            with adapter.model.hooks(fwd_hooks=[*edits, (place.hook, watch)]):
                logits = adapter.run(ids, adapter.all_real(ids))
            at = logits if logits.ndim == 2 else logits[:, goal.pos]
            values = torch.stack([goal.read(at[i], row) for i, row in enumerate(rows.tolist())])
            (slope,) = torch.autograd.grad(values.sum(), seen[-1])
        found.append((rows, columns, slope.detach(), values.detach()))
    width = found[0][2].shape[-1]
    g, value = run.frame.zeros(width), run.frame.zeros(1)[:, 0, 0]
    for rows, columns, slope, values in found:
        g[rows[:, None], columns] = slope.to(g)
        value[rows] = values.to(value)
    return g, value


def row_of(logits: Tensor, i: int, at: Tensor) -> Float[Tensor, " d_vocab"]:
    """The logits of one prompt at its position, or a classifier's own."""
    return logits[i] if logits.ndim == 2 else logits[i, at[i]]


def hooks_of(place: Place, delta: Float[Tensor, "batch pos d"]) -> list[Hook]:
    """Make the hook that adds an edit at a place.

    Args:
        place: Where the edit is made.
        delta: What is added at every position of the prompts.

    Returns:
        One hook, in a list.
    """

    def add(tensor: Tensor, hook: Any) -> Tensor:
        n = delta.shape[1]
        if tensor.shape[1] < n:  # a step of generation behind the prompt, with cached keys
            return tensor
        if tensor.shape[0] not in (len(delta), 1) and len(delta) > 1:
            raise ValueError(
                f"The run has {tensor.shape[0]} prompts, and the edit is of {len(delta)}. Run the "
                "prompts of the edit's lens."
            )
        # Never in place: the host or another hook may hold the same tensor.
        edited = tensor.clone()
        part = delta.to(tensor).view(*delta.shape[:2], *tensor.shape[2:])
        edited[:, :n] = edited[:, :n] + part
        return edited

    return [(place.hook, add)]


def divergence(plain: Tensor, edited: Tensor, at: Tensor) -> Float[Tensor, " batch"]:
    """The mean over all positions but one of KL(plain ‖ edited), in nats; 0 for one position."""
    if plain.ndim < 3 or plain.shape[1] == 1:
        return plain.new_zeros(len(plain))
    kl = _divergences(plain, edited)
    # The edit is meant to change the prediction: side effects are counted everywhere else.
    kl[torch.arange(len(kl)), at] = 0
    return kl.sum(1) / (kl.shape[1] - 1)


def held_out_divergence(
    adapter: Adapter, run: Capture, held: Capture, place: Place, delta: Tensor
) -> Float[Tensor, " batch"]:
    """Add every prompt's edit to other prompts, at the same positions from the end.

    Args:
        adapter: Adapter of the model.
        run: The run that is edited.
        held: The plain run of the other prompts.
        place: Where the edit is made.
        delta: The edits [batch, pos, width].

    Returns:
        For every edit the mean over the other prompts, and their positions from the first edited
        one on, of KL(plain ‖ edited), in nats.

    Raises:
        ValueError: If another prompt is shorter than the edit is far from the end.
    """
    found = torch.zeros(len(delta), dtype=torch.float64)
    for i, (_, stop) in enumerate(run.prompts.spans):
        at = (delta[i].abs().sum(-1) > 0).nonzero().flatten()
        if not len(at):
            continue
        # Prompts differ in length, so positions are counted from the end.
        first = int(at[0]) - stop
        for rows, columns, ids in groups(held.prompts):
            n = columns.shape[1]
            if n + first < 0:
                raise ValueError(
                    f"held_out= has a prompt of {n} tokens, and the edit is {-first} before the "
                    "end. Pass longer prompts."
                )
            moved = delta.new_zeros(1, n, delta.shape[-1])
            moved[0, at - stop + n] = delta[i, at]
            hooks = hooks_of(place, moved)
            with alone(adapter.model), torch.no_grad(), adapter.model.hooks(fwd_hooks=hooks):
                logits = adapter.run(ids, adapter.all_real(ids))
            whole = logits.ndim == 2  # a classifier has one row of logits
            plain = held.logits[rows] if whole else held.logits[rows[:, None], columns]
            kl = _divergences(plain, logits)
            found[i] += float((kl if whole else kl[:, first:].mean(1)).sum())
    return found / len(held.prompts.spans)


def _divergences(plain: Tensor, edited: Tensor) -> Float[Tensor, "*shape"]:
    """KL(plain ‖ edited) of every row of logits, in nats."""
    # In float64: a KL divergence is a small sum of differences of large terms.
    p, q = (logits.double().log_softmax(-1) for logits in (plain, edited))
    return (p.exp() * (p - q)).sum(-1)


# --- Circuits of features


@spelled
def faithfulness_of_features(
    model: Any,
    capture: Capture,
    goal: Goal,
    readings: Sequence[Reading],
    kept: Sequence[Feature] | int,
    ablation: str,
    corrupted: Sequence[Reading] | None,
    seed: int,
) -> Faithfulness:
    """Run the real model with all features but some replaced, their errors kept.

    Args:
        model: The model of the run.
        capture: The captured run.
        goal: The target that is measured.
        readings: The features of every site in the run.
        kept: The features of the circuit, or how many of the largest predicted effects.
        ablation: What replaces the others' activations, one of :data:`REPLACED`.
        corrupted: The features of every site in another run, for "resample".
        seed: Seed of the bootstrap over prompts.

    Returns:
        The target in the run, in the circuit, and with all features replaced.

    Raises:
        ValueError: If an argument does not fit.
    """
    replaced = replacements(readings, ablation, corrupted)
    if isinstance(kept, int):
        kept = _largest(kept, capture, goal, readings, replaced)
    sites = {reading.dictionary: set() for reading in readings}
    for one in kept:
        if not isinstance(one, Feature) or one.dictionary not in sites:
            raise ValueError(f"keep= has {one!r}, which is no feature of saes=. Pass those alone.")
        sites[one.dictionary].add(one.index)
    adapter = adapt(model)
    check_same(adapter, capture)
    for reading in readings:
        require_point(adapter, reading.dictionary.writes)
        require_hook(adapter, reading.dictionary.site)
    full = goal.on(capture).value
    found = []
    # The circuit, then ∅, in which the features of all sites are replaced.
    for keep in (sites, {dictionary: set() for dictionary in sites}):
        values = torch.zeros_like(full)
        for rows, columns, ids in groups(capture.prompts):
            hooks = [
                hook
                for r, z in zip(readings, replaced, strict=True)
                for hook in _hooks(r, z[rows[:, None], columns], keep[r.dictionary])
            ]
            with alone(adapter.model), adapter.model.hooks(fwd_hooks=hooks):
                given = adapter.all_real(ids)
                _, run = freeze(adapter, ids, dtype=capture.frame.dtype, **given)
            values[rows] = goal.on(run, rows.tolist()).value.to(values)
        found.append(values)
    active = sum(len(reading.features.unique()) for reading in readings)
    n = len({(id(one.dictionary), one.index) for one in kept})
    circuit, ablated = found
    return Faithfulness(
        full,
        ablated,
        ablated,
        circuit,
        ablation,
        "live",
        n,
        active,
        seed,
        first_token=capture.convention.first_token,
        parts="features",
    )


def _largest(
    n: int,
    capture: Capture,
    goal: Goal,
    readings: Sequence[Reading],
    replaced: Sequence[Float[Tensor, "batch pos d_sae"]],
) -> list[Feature]:
    """The features whose replacement is predicted to move the target most, in the mean."""
    gradient = TargetGradient(capture, FrozenTransformer.of(capture), goal.on(capture))
    pairs = list(zip(readings, replaced, strict=True))
    effects = [feature_effects(gradient, r, z).sum(0).abs() for r, z in pairs]
    every = [Feature(r.dictionary, i) for r in readings for i in range(r.dictionary.d_sae)]
    if not 0 <= n <= len(every):
        raise ValueError(f"keep={n} is no number of features. Pass one up to {len(every)}.")
    order = torch.cat(effects).topk(n).indices.tolist()
    return [every[i] for i in order]


def _hooks(
    reading: Reading, other: Float[Tensor, "batch pos d_sae"], kept: set[int]
) -> Iterator[Hook]:
    """The hooks that replace all activations but those of a circuit."""
    dictionary, columns = reading.dictionary, sorted(kept)
    seen: list[Tensor] = []

    def see(x: Tensor, hook: Any) -> Tensor:
        seen[:] = [x]
        return x

    def replace(y: Tensor, hook: Any) -> Tensor:
        x = (seen[0] if seen else y).reshape(*other.shape[:2], -1).to(other)
        # Anew in this run: what an edit further down has changed counts, and the error stays.
        moved = other - dictionary.encode(x)
        moved[..., columns] = 0
        change = moved @ dictionary.W_dec.to(x) * dictionary.normed(x).unscale
        return y + change.view(y.shape).to(y)

    if dictionary.is_transcoder:
        yield dictionary.site, see
    yield reading.place.hook, replace
