"""Captures in files: safetensors for the tensors, a JSON header for the rest; nothing is executed.

A capture is a tree of frozen dataclasses, and the header is that tree (``headers``). Weights are
usually left out: what is saved of them is a fingerprint, by which a model is recognized when they
are attached again. A reader builds the tree of empty tensors first and runs the operator on those:
what does not fit is found before memory is taken.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import write_whole
from ..hosts import Adapter, adapt
from ..operator import Capture, FrozenTransformer
from ..sublayers import Frame
from .fingerprints import agree, products
from .missing_weights import missing
from .saved_checks import check
from .saved_tree import DTYPES, Builder, Writer, differences, parse_dtype, weights_in

FORMAT, VERSION = "tensorlens_tl lens", 1
_KEY = "tensorlens_tl"


def save_capture(capture: Capture, path: str | os.PathLike[str], weights: bool = False) -> None:
    """Write a capture to a file, whole or not at all.

    Args:
        capture: The run.
        path: Where to; a file that is there is replaced once the new one is complete.
        weights: Whether to store the weights, too, so that loading needs no model.

    Raises:
        ValueError: If there is no such folder, or weights are asked for that were not loaded.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir() or target.is_dir():
        wrong = "a folder" if target.is_dir() else "in a folder that does not exist"
        raise ValueError(f"expected the path of a file to write, got {path}, which is {wrong}")
    frame, writer = capture.frame, Writer(capture.frame, weights)
    about = {f.name: getattr(frame, f.name) for f in fields(frame) if f.name != "device"}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "weights": weights,
        "frame": {name: writer.node(value, f"frame.{name}") for name, value in about.items()},
        "capture": writer.node(capture, ""),
    }
    metadata = {_KEY: json.dumps(header)}
    write_whole(target, lambda file: save_file(writer.tensors, file, metadata=metadata))


class _File:
    """An open file whose header has been read; tensors are read one by one."""

    def __init__(self, file: Any, path: str | os.PathLike[str]):
        self.file, self.path = file, path
        text = (file.metadata() or {}).get(_KEY)
        if text is None:
            raise ValueError(
                f"{path} is a safetensors file, but no saved lens; expected a file from lens.save"
            )
        self.tensors: dict[str, Tensor] = {}
        self.keys: set[str] = set()
        self.weights: dict[str, dict[str, Any]] = {}
        try:
            self.header = json.loads(text)
            version = self.header["version"] if self.header["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError, RecursionError):
            self.damaged("its header is not that of a lens")
        if version != VERSION:
            raise ValueError(
                f"{path} has version {version!r} of the format, expected {VERSION}: load it with "
                "the tensorlens_tl that wrote it, or save the lens again"
            )

    def damaged(self, what: str) -> NoReturn:
        """Refuse the file.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.path} is damaged: {what}; expected a file as lens.save wrote it: save it again"
        )

    def outline(self) -> Capture:
        """The capture with empty tensors of no memory, everything about it checked.

        Returns:
            The capture on the device "meta".

        Raises:
            ValueError: If anything does not fit.
        """
        try:
            if type(self.header["weights"]) is not bool:
                raise ValueError("its header does not say whether it holds weights")
            frame = self.frame(torch.device("meta"))
            capture = Builder(frame, self.empty).value(self.header["capture"], "")
            check(capture, Capture, "lens", {"batch": frame.batch, "pos": frame.n_pos})
            stored = set(self.file.keys())
            if wrong := stored ^ self.keys:
                name = min(wrong)
                raise ValueError(f"tensor {name} is {'unknown' if name in stored else 'missing'}")
            _check_run(capture)
            weights_in(self.header["capture"], "", self.weights)
        except Exception as error:  # whatever a foreign header makes go wrong
            what = str(error) if isinstance(error, ValueError) else repr(error)
            self.damaged(what)
        return capture

    def frame(self, device: torch.device) -> Frame:
        """The frame, its spans checked."""
        saved = self.header["frame"]
        values = {name: Builder(None, self.empty).value(saved[name], name) for name in saved}
        frame = Frame(**values, device=device)
        check(frame, Frame, "frame", {})
        for span in frame.spans:
            if not 0 <= span[0] < span[1] <= frame.n_pos:
                raise ValueError(f"expected spans within 0 to {frame.n_pos}, got {span}")
        if frame.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"expected a compute dtype float32 or float64, got {frame.dtype}")
        return frame

    def empty(self, node: dict[str, Any], path: str) -> Tensor:
        """A tensor's shape and dtype, compared with those in the file."""
        dtype, shape = parse_dtype(node["dtype"], path), node["shape"]
        if not all(type(n) is int and 0 < n < 2**40 for n in shape):
            raise ValueError(f"{path}: expected a shape of positive sizes, got {shape}")
        if not all(math.isfinite(float(p)) or p in ("nan", "inf") for p in node["products"]):
            raise ValueError(f"{path}: expected a fingerprint of numbers, got {node['products']}")
        if "key" in node:
            self.keys.add(node["key"])
            stored = self.file.get_slice(node["key"])
            if sorted(node["order"]) != list(range(len(shape))):
                raise ValueError(f"{path}: expected an order of axes, got {node['order']}")
            expected = DTYPES[node["dtype"]][1], [shape[axis] for axis in node["order"]]
            if (got := (stored.get_dtype(), list(stored.get_shape()))) != expected:
                raise ValueError(
                    f"{path}: expected {expected[0]} of shape {expected[1]}, got {got[0]} of shape "
                    f"{got[1]}"
                )
        elif self.header["weights"] is not False or ".weights." not in path:
            raise ValueError(f"{path} has no tensor")
        return torch.empty(shape, dtype=dtype, device="meta")

    def read(self, node: dict[str, Any], path: str, device: torch.device) -> Tensor:
        """A tensor's values, in memory of their own and with the strides they had."""
        key = node["key"]
        if key not in self.tensors:
            inverse = sorted(range(len(node["order"])), key=node["order"].__getitem__)
            tensor = self.file.get_tensor(key).clone().permute(inverse)
            if not agree(node["products"], products(tensor)):
                self.damaged(f"the values of {path} are not those that were saved")
            self.tensors[key] = tensor.to(device)
        return self.tensors[key]


def _check_run(capture: Capture) -> None:
    """Run the operator on shapes alone, and compare strings and spans."""
    frame, saved = capture.frame, capture.prompts
    lengths = tuple(stop - start for start, stop in frame.spans)
    if saved.spans != frame.spans or tuple(map(len, saved.strings)) != lengths:
        raise ValueError(f"prompts: expected tokens at {frame.spans}, got {saved.spans}")
    if not capture.blocks or not capture.checks:
        raise ValueError("expected at least one block and its checks, got none")
    with torch.no_grad():
        operator = FrozenTransformer.of(capture)
        y = operator @ capture.blocks[0].resid_pre + operator.bias
        logits = capture.unembed @ y + capture.unembed.bias
    if logits.shape != capture.logits.shape:
        raise ValueError(f"logits: expected {list(logits.shape)}, got {list(capture.logits.shape)}")


def _check_model(file: _File, adapter: Adapter, outline: Capture) -> None:
    node = Writer(outline.frame, False).node(adapter.weights, "")
    found: dict[str, dict[str, Any]] = {}
    weights_in(node, "", found)
    paths = dict.fromkeys((*file.weights, *found))
    wrong = [d for path in paths for d in differences(file.weights.get(path), found.get(path), path)]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{file.path}: the model ({adapter.name}) is not the one the lens was made with "
            f"({outline.model_name}): {'; '.join(wrong[:3])}{more}. Pass that model, loaded and "
            "processed in the same way"
        )


def load_capture(
    path: str | os.PathLike[str], model: Any = None, device: str | torch.device | None = None
) -> Capture:
    """Read a capture that :func:`save_capture` wrote.

    Args:
        path: The file.
        model: The model it was made with, to take the weights from, by reference.
        device: Where to put the tensors; the model's, or else the CPU.

    Returns:
        The capture; without a model or saved weights, any use of the weights raises a ValueError.

    Raises:
        ValueError: If the file is no saved lens, is damaged, or the model is another one.
        OSError: If it cannot be read.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}: expected one that lens.save wrote")
    adapter = None if model is None else adapt(model)
    place = torch.device(device or "cpu")
    if adapter is not None:
        place = adapter.weights.unembed.W_U.device
        if device is not None and torch.device(device) != place:
            raise ValueError(
                f"the model is on {place}, got device={str(device)!r}: leave it out, or move the model"
            )
    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); expected one that lens.save wrote: it "
            "may have been cut off, so save or copy it again"
        ) from None
    with opened as handle:
        file = _File(handle, path)
        outline = file.outline()
        attach: Any = None
        if adapter is not None:
            _check_model(file, adapter, outline)
            attach = partial(_attached, adapter)
        elif not file.header["weights"]:
            attach = missing
        builder = Builder(file.frame(place), partial(file.read, device=place), attach)
        capture: Capture = builder.value(file.header["capture"], "")
    if adapter is None:
        return capture
    scores = adapter.score_weights(capture.frame.n_pos)
    own = {"tokenizer": adapter.tokenizer, "embed_weights": adapter.embed_weights()}
    return replace(capture, **own, score_weights=scores)


def _attached(adapter: Adapter, cls: type, node: dict[str, Any], path: str) -> Any:
    found: Any = adapter.weights
    for name in path.removesuffix(".weights").split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    return found
