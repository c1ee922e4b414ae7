"""Captures in files: safetensors for the tensors, a JSON header for all else. Nothing is executed.

A capture is a tree of frozen dataclasses, and the header is that tree (saved_tree.py). The weights
are usually left out. What is saved of them is a fingerprint, by which a model is recognized when
its weights are attached again. A file is read in four steps:

1. Read the header, and build the capture of empty tensors that take no memory.
2. Check it: classes, shapes, and one run of the operator on shapes alone. So what does not fit is
   found before memory is taken.
3. Compare the weights of the given model, if any, with the saved fingerprints.
4. Build the capture again, now of the stored tensors. Each is compared with its fingerprint.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields, replace
from functools import partial
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import file_path, new_file, usable_device, write_whole
from ..hosts import Adapter, adapt
from ..maps import Frame
from ..operator import Capture, FrozenTransformer
from .fingerprints import agree, products
from .missing_weights import missing
from .saved_checks import Misfit, check
from .saved_tree import (
    DTYPES,
    Builder,
    Writer,
    as_written_now,
    differences,
    parse_dtype,
    weights_in,
)
from .saved_vocabulary import read_vocabulary, write_vocabulary

FORMAT, VERSION = "tensorlens_tl lens", 1
_KEY, _TOKENIZER = "tensorlens_tl", "tensorlens_tl tokenizer"


def save_capture(capture: Capture, path: str | os.PathLike[str], weights: bool = False) -> None:
    """Write a capture to a file, whole or not at all.

    Args:
        capture: The run to write.
        path: The file to write. An older file is replaced once the new one is complete.
        weights: Whether to store the weights, too, so that loading needs no model.

    Raises:
        ValueError: If the folder does not exist, or if weights are asked for that were not loaded.
    """
    target = new_file(path)
    frame, writer = capture.frame, Writer(capture.frame, weights)
    about = {f.name: getattr(frame, f.name) for f in fields(frame)}
    del about["device"], about["graph"]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "weights": weights,
        "frame": {name: writer.node(value, f"frame.{name}") for name, value in about.items()},
        "capture": writer.node(capture, ""),
    }
    metadata = {_KEY: json.dumps(header)}
    if (vocabulary := write_vocabulary(capture.tokenizer)) is not None:
        metadata[_TOKENIZER] = vocabulary
    write_whole(target, lambda file: save_file(writer.tensors, file, metadata=metadata))


class _File:
    """An open file whose header has been read. Tensors are read one by one."""

    def __init__(self, file: Any, path: str | os.PathLike[str]):
        self.file, self.path = file, path
        metadata = file.metadata() or {}
        text, self.vocabulary = metadata.get(_KEY), metadata.get(_TOKENIZER)
        if text is None:
            raise ValueError(
                f"{path} is a safetensors file, but no saved lens. Pass one that lens.save wrote."
            )
        self.tensors: dict[str, Tensor] = {}
        self.keys: set[str] = set()
        self.weights: dict[str, dict[str, Any]] = {}
        try:
            self.header = json.loads(text)
            version = self.header["version"] if self.header["format"] == FORMAT else None
            self.header["capture"] = as_written_now(self.header["capture"])
        except (ValueError, KeyError, TypeError, RecursionError):
            self.damaged("its header is not that of a lens")
        if version != VERSION:
            raise ValueError(
                f"{path} has version {version!r} of the format, but only version {VERSION} can be "
                "read. Load it with the tensorlens_tl that wrote it, or save the lens again."
            )

    def damaged(self, what: str) -> NoReturn:
        """Refuse the file.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.path} is damaged: {what.rstrip('.')}. Save the lens again, or copy it again."
        )

    def outline(self) -> Capture:
        """Build the capture of empty tensors that take no memory, and check all of it.

        Returns:
            The capture on the device "meta".

        Raises:
            Misfit: Inside only; it becomes an error that names the file.
        """
        try:
            if type(self.header["weights"]) is not bool:
                raise Misfit("its header does not say whether it holds weights")
            frame = self.frame(torch.device("meta"))
            capture = Builder(frame, self.empty).value(self.header["capture"], "")
            check(capture, Capture, "lens", {"batch": frame.batch, "pos": frame.n_pos})
            stored = set(self.file.keys())
            if wrong := stored ^ self.keys:
                name = min(wrong)
                raise Misfit(f"tensor {name} is {'unknown' if name in stored else 'missing'}")
            _check_run(capture)
            weights_in(self.header["capture"], "", self.weights)
        except Exception as error:  # whatever a foreign header makes go wrong
            what = str(error) if isinstance(error, ValueError) else repr(error)
            self.damaged(what)
        return capture

    def tokenizer(self) -> Any:
        """Build the tokenizer of the run; None where the file has none."""
        if self.vocabulary is None:
            return None
        try:
            return read_vocabulary(self.vocabulary)
        except Exception as error:  # whatever a foreign text makes go wrong
            self.damaged(f"its tokenizer cannot be read ({str(error).rstrip('.')})")

    def frame(self, device: torch.device) -> Frame:
        """Build the frame, its spans checked."""
        saved = self.header["frame"]
        values = {name: Builder(None, self.empty).value(saved[name], name) for name in saved}
        frame = Frame(**values, device=device)
        check(frame, Frame, "frame", {})
        for span in frame.spans:
            if not 0 <= span[0] < span[1] <= frame.n_pos:
                raise Misfit(f"expected spans within 0 to {frame.n_pos}, got {span}")
        if frame.dtype not in (torch.float32, torch.float64):
            raise Misfit(f"expected a compute dtype float32 or float64, got {frame.dtype}")
        return frame

    def empty(self, node: dict[str, Any], path: str) -> Tensor:
        """Make an empty tensor of an entry, once its shape and dtype agree with the file's."""
        dtype, shape = parse_dtype(node["dtype"], path), node["shape"]
        if not all(type(n) is int and 0 < n < 2**40 for n in shape):
            raise Misfit(f"{path}: expected a shape of positive sizes, got {shape}")
        if not all(math.isfinite(float(p)) or p in ("nan", "inf") for p in node["products"]):
            raise Misfit(f"{path}: expected a fingerprint of numbers, got {node['products']}")
        if "key" in node:
            self.keys.add(node["key"])
            stored = self.file.get_slice(node["key"])
            if sorted(node["order"]) != list(range(len(shape))):
                raise Misfit(f"{path}: expected an order of axes, got {node['order']}")
            expected = DTYPES[node["dtype"]][1], [shape[axis] for axis in node["order"]]
            if (got := (stored.get_dtype(), list(stored.get_shape()))) != expected:
                raise Misfit(
                    f"{path}: expected {expected[0]} of shape {expected[1]}, got {got[0]} of shape "
                    f"{got[1]}"
                )
        elif self.header["weights"] is not False or ".weights." not in path:
            raise Misfit(f"{path} has no tensor")
        return torch.empty(shape, dtype=dtype, device="meta")

    def read(self, node: dict[str, Any], path: str, device: torch.device) -> Tensor:
        """Read the values of a tensor, into memory of their own, with the strides they had."""
        key = node["key"]
        if key not in self.tensors:
            inverse = sorted(range(len(node["order"])), key=node["order"].__getitem__)
            tensor = self.file.get_tensor(key).clone().permute(inverse)
            if not agree(node["products"], products(tensor)):
                self.damaged(f"the values of {path} are not those that were saved")
            self.tensors[key] = tensor.to(device)
        return self.tensors[key]


def _check_run(capture: Capture) -> None:
    """Refuse a capture whose maps, strings, spans and logits do not fit together."""
    frame, saved = capture.frame, capture.prompts
    lengths = tuple(stop - start for start, stop in frame.spans)
    if saved.spans != frame.spans or tuple(map(len, saved.strings)) != lengths:
        raise Misfit(f"prompts: expected tokens at {frame.spans}, got {saved.spans}")
    if not capture.blocks or not capture.checks or not capture.sources:
        raise Misfit("expected at least one block, its checks and a source, got none")
    with torch.no_grad():  # on the device "meta", where only shapes are computed
        operator = FrozenTransformer.of(capture)
        y = operator @ capture.blocks[0].resid_pre + operator.bias
        logits = capture.unembed @ y + capture.unembed.bias
    if frame.read_at is not None and not capture.headless:  # of a classifier
        logits = logits[:, frame.read_at]
    if logits.shape != capture.logits.shape:
        raise Misfit(f"logits: expected {list(logits.shape)}, got {list(capture.logits.shape)}")


def _check_model(file: _File, adapter: Adapter, outline: Capture) -> None:
    """Refuse a model whose weights differ from the saved fingerprints, and name the differences."""
    node = Writer(outline.frame, False).node(adapter.weights, "")
    found: dict[str, dict[str, Any]] = {}
    weights_in(node, "", found)
    paths = dict.fromkeys((*file.weights, *found))
    wrong = [
        difference
        for path in paths
        for difference in differences(file.weights.get(path), found.get(path), path)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"The model {adapter.name} is not the one that {file.path} was made with "
            f"({outline.model_name}): {'; '.join(wrong[:3])}{more}. Pass that model, loaded and "
            "processed in the same way."
        )


def load_capture(
    path: str | os.PathLike[str], model: Any = None, device: str | torch.device | None = None
) -> Capture:
    """Read a capture that :func:`save_capture` wrote.

    Args:
        path: The file to read.
        model: The model that the capture was made with; its weights are used by reference. None to
            use the weights of the file, if it holds any.
        device: Where to put the tensors. None is the model's device, or the CPU without a model.

    Returns:
        The capture. Without a model and without saved weights, any use of the weights raises a
        ValueError.

    Raises:
        ValueError: If the file is no saved lens or is damaged, or if the model is another one.
        OSError: If the file cannot be read.
    """
    if not file_path(path).is_file():
        raise ValueError(f"There is no file {path}. Pass the path of a file that lens.save wrote.")
    adapter = None if model is None else adapt(model)
    place = usable_device("cpu" if device is None else device)
    if adapter is not None:
        own = adapter.weights.unembed.W_U.device
        if device is not None and place != own:
            raise ValueError(
                f"device={str(device)!r} does not fit the model, which is on {own}. Drop "
                "device=, or move the model."
            )
        place = own
    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}). It may have been cut off: save or "
            "copy it again."
        ) from None
    with opened as handle:
        # 1. and 2.
        file = _File(handle, path)
        outline = file.outline()
        # 3.
        attach: Any = None
        if adapter is not None:
            _check_model(file, adapter, outline)
            attach = partial(_attached, adapter)
        elif not file.header["weights"]:
            attach = missing
        # 4.
        tokenizer = getattr(adapter, "tokenizer", None) or file.tokenizer()
        builder = Builder(file.frame(place), partial(file.read, device=place), attach)
        capture: Capture = builder.value(file.header["capture"], "")
    capture = replace(capture, tokenizer=tokenizer)
    if adapter is None:
        return capture
    scores = adapter.score_weights(capture.frame.n_pos)
    return replace(capture, embed_weights=adapter.embed_weights(), score_weights=scores)


def _attached(adapter: Adapter, cls: type, node: dict[str, Any], path: str) -> Any:
    """The model's own weights at a dotted name such as "blocks.0.attn.weights"."""
    found: Any = adapter.weights
    for name in path.removesuffix(".weights").split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    return found
