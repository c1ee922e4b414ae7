"""Edits in files: safetensors and JSON, of which nothing is executed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import file_path, is_int, new_file, spelled, write_whole
from .edit import Edit
from .goals import Goal
from .places import Place

_FORMAT = "tensorlens_tl edit"
_PARTS = ("delta", "before", "predicted", "size")


@spelled
def save_edit(edit: Edit, path: str | os.PathLike[str]) -> None:
    """Write an edit to a file, whole or not at all.

    Args:
        edit: The edit. Its run is not written.
        path: The file to write.

    Raises:
        ValueError: If the folder does not exist.

    Example:
        >>> import os, tempfile
        >>> from tensorlens_tl import demo, editing
        >>> _, lens = demo.load_model().run_with_tensorlens("The capital of France is")
        >>> edit = lens.edit("Paris", versus="Rome", by=-10.0, site=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "edit.safetensors")
        ...     editing.save_edit(edit, path)
        ...     bool((editing.load_edit(path, lens).delta == edit.delta).all())
        True
    """
    tensors = {name: getattr(edit, name).detach().contiguous() for name in _PARTS}
    goal: dict[str, Any] = {"pos": edit.goal.pos}
    for name in ("targets", "versus"):
        given = getattr(edit.goal, name)
        goal[name] = None if given is None else [_noted(one, name, tensors) for one in given]
    # Spans alone tell later whether a lens fits: the prompts themselves are the user's.
    spans = None if edit.capture is None else edit.capture.prompts.spans
    header = {"place": asdict(edit.place), "goal": goal, "spans": spans, "moves": edit.moves}
    target = new_file(path)
    write_whole(target, lambda p: save_file(tensors, p, metadata={_FORMAT: json.dumps(header)}))


@spelled
def load_edit(path: str | os.PathLike[str], lens: Any = None) -> Edit:
    """Read an edit that :func:`save_edit` wrote. Nothing in the file is executed.

    Args:
        path: The file to read.
        lens: The lens of the same prompts, for :meth:`Edit.check` and the like. Hooks need none.

    Returns:
        The edit, with its run where a lens was passed.

    Raises:
        ValueError: If the file is no edit or is damaged, or the lens has other prompts.

    Example:
        See :func:`save_edit`.
    """
    file = file_path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[_FORMAT])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        place = Place(**{**header["place"], "part": _pair(header["place"]["part"])})
        targets, versus = (_read(header["goal"][n], tensors) for n in ("targets", "versus"))
        pos, moves = header["goal"]["pos"], header.get("moves", (False, False))
        qk, gates = map(bool, moves)
        delta, before, predicted, size = (tensors[name] for name in _PARTS)
        batch, listed = (len(delta),), (before, predicted, size)
        # A file of another shape would fail far from here, in a hook.
        fits = delta.ndim == 3 and is_int(pos) and all(part.shape == batch for part in listed)
        fits &= (len(targets or ()),) == batch == (len(versus or targets or ()),)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError):
        fits = False
    if not fits:
        raise ValueError(
            f"{str(path)!r} is no edit, or is damaged. Pass a file that save_edit wrote."
        )
    capture = None if lens is None else lens.capture
    if capture is not None:
        spans = [list(span) for span in capture.prompts.spans]
        if header["spans"] not in (None, spans) or delta.shape[1] != capture.frame.n_pos:
            raise ValueError(
                "The edit is of prompts of other lengths than the lens. Pass the lens of its "
                "prompts."
            )
    goal = Goal(targets or (), versus, pos)
    return Edit(place, delta, goal, before, predicted, size, capture, (qk, gates))


def _noted(one: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A token's id as it is; a direction becomes a tensor of the file."""
    if is_int(one):
        return int(one)
    # Numbered: two prompts may have different directions.
    key = f"{name}.{sum(k.startswith(name) for k in tensors)}"
    tensors[key] = torch.as_tensor(one).detach().clone()
    return key


def _read(noted: Any, tensors: dict[str, Tensor]) -> tuple[Any, ...] | None:
    if noted is None:
        return None
    return tuple(one if is_int(one) else tensors[one] for one in noted)


def _pair(part: Any) -> tuple[int, int] | None:
    return None if part is None else (int(part[0]), int(part[1]))
