"""What any call will cost: it is rehearsed without numbers on copies that keep nothing of it.

1. Fit the arguments. Files and folders are left out: nothing is written.
2. Copy lenses, and note the buffers of models, so that no tensor without content stays in them.
3. Rehearse the call, and turn the counted work into time at this machine's rates.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from inspect import signature
from types import FunctionType
from typing import Any
from warnings import catch_warnings, filterwarnings

from torch import nn

from ..checks import kind_of, spelled, unfit
from ..circuits import AblationOptions, Circuit
from ..costs import Plan, Rehearsal
from ..editing import Edit
from ..hosts import as_host
from .frozen_run import FrozenRun

LEFT_OUT = {"progress": False, "resume": None, "path": None}
"""Arguments that write or show something, and what they are in a rehearsal."""


@spelled
def plan(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """Estimate what a call of this library will cost, before it runs.

    The call is rehearsed: it takes its way, but no number is computed. Its flops are counted, and
    so are the bytes of all tensors that it holds at once. Nothing is written, and the model stays
    as it is. A rehearsal takes as long as the call's Python does, so for many prompts plan a few of
    them: the work of a call over prompts grows by the prompt.

    Where the way depends on the numbers themselves, as in a search for paths or edits, the real
    call may go further than its rehearsal, which takes every number for one near 0.

    Args:
        call: A function of this library, such as :func:`tensorlens_tl.faithfulness`, or a method of
            a lens, an edit or a circuit.
        *args: The arguments that the call itself would get.
        **kwargs: Arguments of the call by name.

    Returns:
        Time, flops and peak memory. The machine's rates are measured on products as large as the
        largest of the call.

    Raises:
        ValueError: If the call itself would be refused, or cannot be rehearsed.

    Example:
        >>> import tensorlens_tl
        >>> from tensorlens_tl import demo
        >>> model, pair = demo.load_model(), demo.prompts("ioi", 1)[0]
        >>> circuit = ["L0H0", "L1H1", "L2MLP"]
        >>> runs = [pair.clean], circuit, [pair.corrupted]
        >>> plan = tensorlens_tl.plan(tensorlens_tl.faithfulness, model, *runs)
        >>> plan.what, plan.flops > 0
        ('faithfulness', True)
    """
    if isinstance(call, partial):
        return plan(call.func, *call.args, *args, **call.keywords, **kwargs)
    owner = getattr(call, "__self__", None)
    room = str(getattr(call, "__module__", None)).split(".")[0]
    known = owner is None or isinstance(owner, FrozenRun | Circuit | Edit | nn.Module)
    if not known or not isinstance(getattr(call, "__func__", call), FunctionType):
        room = ""
    if room != __name__.split(".")[0]:
        raise ValueError(
            f"call is {kind_of(call)} that cannot be planned. Pass a function of this library, or "
            "a method of a lens, an edit or a circuit."
        )
    # 1. The arguments.
    if problem := unfit(call, args, kwargs):
        raise ValueError(problem)
    own = signature(call).parameters
    options = "changes" in own  # of AblationOptions
    left_out = {name: to for name, to in LEFT_OUT.items() if name in own or name in kwargs}
    kwargs = kwargs | left_out | ({"progress": False, "resume": None} if options else {})
    given = signature(call).bind(*args, **kwargs)
    # 2. Copies.
    for name, value in given.arguments.items():
        given.arguments[name] = _apart(value)
    if isinstance(owner, FrozenRun | Edit):
        call = getattr(_apart(owner), call.__name__)
    values = owner, *given.arguments.values()
    models = [value for value in values if isinstance(value, nn.Module)]
    buffers = [(part, dict(part._buffers)) for model in models for part in model.modules()]
    # 3. The rehearsal.
    try:
        with catch_warnings(), Rehearsal() as rehearsal:
            filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            call(*given.args, **given.kwargs)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"{call.__name__} cannot be rehearsed with these arguments ({error}). Measure a "
            "smaller call."
        ) from error
    finally:
        for part, own in buffers:
            part._buffers.update(own)
    return rehearsal.plan(call.__name__)


def rehearsable(lens: FrozenRun, what: str) -> bool:
    """Whether a name is that of a method that asks a lens a question."""
    plain = ("plan", "save", "save_headvis", "to", "cpu")
    return (
        isinstance(what, str)
        and not what.startswith("_")
        and what not in plain
        and hasattr(type(lens), what)
        and callable(getattr(type(lens), what))
    )


def _apart(value: Any) -> Any:
    """An argument that may keep what it computes, as a copy; a model of Hugging Face's, wrapped."""
    if isinstance(value, FrozenRun):
        return type(value)(value.capture.mapped(lambda tensor: tensor))
    if isinstance(value, Edit):
        return replace(value, capture=value.run.mapped(lambda tensor: tensor))
    if isinstance(value, AblationOptions):
        return replace(value, progress=False, resume=None)
    if isinstance(value, nn.Module):
        with suppress(AttributeError):
            return as_host(value)
    return value
