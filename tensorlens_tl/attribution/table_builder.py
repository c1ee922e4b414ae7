"""A table of contributions under construction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..checks import place_label
from ..graph import CONTENTS, Edge, Node
from ..operator import Capture, CaptureMismatchError, tolerance
from .table import Attribution, Source
from .target_gradient import TargetGradient
from .targets import Target


class TableBuilder:
    """Collects sources and their contributions to one target, and makes an Attribution of them."""

    def __init__(self, capture: Capture, target: Target):
        self.capture, self.target = capture, target
        self.sources: list[Source] = []
        self.values: list[Float[Tensor, "batch source"]] = []

    def add(self, nodes: Iterable[Node | Edge], values: Float[Tensor, "batch node"]) -> None:
        """Add one row per node, with no position.

        Args:
            nodes: Nodes or edges that contribute.
            values: The contribution of each, in units of the target.
        """
        self.sources += [Source(node) for node in nodes]
        self.values.append(values)

    def spread(
        self,
        node: Node,
        values: Float[Tensor, "batch pos"],
        there: Bool[Tensor, " pos"] | None = None,
    ) -> None:
        """Add one row per position.

        Args:
            node: A node that contributes at every position.
            values: The contribution at each position, in units of the target.
            there: True at positions that get a row; None for all.
        """
        kept = range(values.shape[1]) if there is None else there.nonzero().flatten().tolist()
        self.sources += [Source(node, pos) for pos in kept]
        self.values.append(values if there is None else values[:, there])

    def add_constants(self) -> None:
        """Add the rows of what stands above the final norm: b_U, and the softmax."""
        for name, constant in self.target.constants.items():
            self.add([Node.parse(name)], constant[:, None])

    def to_attribution(
        self,
        by: str,
        effect: str = "direct",
        labels: tuple[tuple[str, ...], ...] | None = None,
        sums: bool = True,
    ) -> Attribution:
        """Finish the table.

        Args:
            by: The kind of source that the target was split by.
            effect: The kind of contribution: "direct" or "total".
            labels: A name per source, for every prompt; None to make them from the sources.
            sums: Whether direct effects sum to the target; those by edge never do.

        Returns:
            The rows so far, in the order in which they were added.
        """
        capture, target = self.capture, self.target
        if labels is None:
            labels = _labels(capture, self.sources, read=(by, effect) == ("head", "direct"))
        return Attribution(
            values=torch.cat([target.value.new_zeros(len(target.value), 0), *self.values], -1),
            sources=tuple(self.sources),
            labels=labels,
            by=by,
            target=target.name,
            target_value=target.value,
            sums_to_target=sums and effect == "direct" and by != "edge",
            convention=capture.convention,
            spans=capture.frame.spans,
            effect=effect,
        )


def summed(parts: Sequence[Attribution], value: Tensor) -> Attribution:
    """Add attributions of the rows that one target reads; a constant may be in the first alone."""
    names = list(dict.fromkeys(source for part in parts for source in part.sources))
    at = {source: i for i, source in enumerate(names)}
    values = parts[0].values.new_zeros(len(value), len(names))
    labels: list[list[str]] = [[""] * len(names) for _ in value]
    for part in parts:
        columns = [at[source] for source in part.sources]
        values[:, columns] += part.values
        for own, given in zip(labels, part.labels, strict=True):
            for i, label in zip(columns, given, strict=True):
                own[i] = own[i] or label
    return replace(
        parts[0],
        values=values,
        sources=tuple(names),
        labels=tuple(map(tuple, labels)),
        target_value=value,
    )


# --- The last guard ------------------------------------------------------------------------------


def check_sum(found: Attribution, *runs: TargetGradient) -> Attribution:
    """Refuse a table whose rows do not sum to its target, up to rounding.

    Most sums are well within a share of Σ |rows|. Terms that cancel inside a row round at their own
    size, however, and a model in half precision rounds at every step. So a larger error is
    compared with what rounding there was: all maps are affine, hence a state that a step gave is
    off by δ, and the target by ⟨covector, δ⟩.

    Args:
        found: A table of contributions to a target.
        *runs: The target in the captured runs that it is made of, one or two.

    Returns:
        The same table.

    Raises:
        CaptureMismatchError: If the sum is off by more. The message names the step that no longer
            gives what it gave in the run, if there is one.
    """
    if not found.sums_to_target:
        return found
    rows, target = found.values.double(), found.target_value.double()
    off, size = (rows.sum(1) - target).abs(), rows.abs().sum(1) + target.abs()
    share = tolerance(runs[0].capture.logits.dtype, found.values.dtype) * size
    if bool((off <= share).all()):
        return found
    if bool((off <= share + sum(_rounding(run) for run in runs)).all()):
        return found
    i = int((off / size).nan_to_num(torch.inf).argmax())
    raise CaptureMismatchError(
        f"The contributions sum to {float(rows[i].sum()):.6g}, but the target is "
        f"{float(target[i]):.6g}, more than rounding explains. Capture again; if it stays, report "
        "the model and the call."
    )


def _rounding(run: TargetGradient) -> Float[Tensor, " batch"]:
    """How far a sum may be off by what the run and the sweeps rounded.

    Args:
        run: The target in a captured run.

    Returns:
        A bound on the error of the sum [batch].

    Raises:
        CaptureMismatchError: If a step gives something else than in the run.
    """
    capture, operator, real = run.capture, run.operator, run.capture.frame.real
    dtype, within = capture.logits.dtype, tolerance(capture.logits.dtype, capture.frame.dtype)

    def norm(x: Tensor) -> Tensor:
        return x.double().masked_fill(~real[..., None], 0).flatten(1).norm(dim=1)

    # The logits are rounded at their own size, and a target may be a difference of two.
    logits = capture.logits if capture.logits.ndim == 2 else capture.logits[real]
    largest = logits.detach().abs().max().double()
    total = 4 * torch.finfo(dtype).eps * largest * torch.ones_like(run.target.value).double()
    states = [*operator.states().values(), capture.resid_final, capture.unembed.final]
    covectors, maps = run.trace.covectors, operator.map.maps
    for i, (map_, x, y) in enumerate(zip(maps, states[:-1], states[1:], strict=True)):
        # How far the run itself is from its operator, step by step.
        off, size = norm(y - (map_.apply(x) + map_.bias)), norm(x) + norm(y)
        if not bool((off <= within * size).all()):
            raise CaptureMismatchError(
                f"The step from {operator.sites[i]} no longer gives what it gave in the run, so "
                "the contributions would not sum to the target. Its weights were written to: "
                "capture again."
            )
        # Total effects are read by the covector after the step, direct ones by the last norm's.
        reads = norm(covectors[i + 1]) + norm(covectors[-2])
        # A state that is off by δ moves the target by ⟨covector, δ⟩ ≤ ‖covector‖ ‖δ‖.
        total = total + 2 * reads * (off + 64 * torch.finfo(capture.frame.dtype).eps * size)
    return total


# --- Labels --------------------------------------------------------------------------------------


def _labels(capture: Capture, sources: Sequence[Source], read: bool) -> tuple[tuple[str, ...], ...]:
    if all(source.pos is None for source in sources):  # the same for every prompt
        return (tuple(str(source.node) for source in sources),) * capture.frame.batch
    prompts = range(capture.frame.batch)
    return tuple(tuple(_label(capture, s, prompt, read) for s in sources) for prompt in prompts)


def _label(capture: Capture, source: Source, prompt: int, read: bool) -> str:
    if source.pos is None:
        return str(source.node)
    start, stop = capture.frame.spans[prompt]
    if not start <= source.pos < stop:
        return "padding"
    pos, kind = source.pos - start, getattr(source.node, "kind", "")
    # A head's direct effect is split over the positions that the head read.
    reads = read and kind == "head"
    if kind not in CONTENTS and not reads:
        return f"{source.node}@{pos}"
    token = place_label(capture.prompts.strings[prompt][pos], pos)
    return f"{source.node} ← {token}" if reads else token
