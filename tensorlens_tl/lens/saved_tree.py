"""A capture as a JSON tree: fingerprints, stand-ins for weights, writing, building, checking.

A tensor stands in the tree by dtype, shape and two products, its fingerprint, with or without a
key under which its data are stored. Only the library's own frozen dataclasses are built from a
tree, and what is built is checked against their annotations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..graph import Edge, Node
from ..operator import Capture, Convention, FrozenBlock, Prompts
from ..sublayers import (
    MLP,
    Attention,
    AttentionWeights,
    BlockWeights,
    Chain,
    EmbedWeights,
    Frame,
    Gate,
    GatedMLP,
    GatedMLPWeights,
    Identity,
    Linear,
    Mix,
    MLPWeights,
    ModelWeights,
    Norm,
    NormWeights,
    RecomputedMix,
    Residual,
    Rotation,
    Scores,
    ScoreWeights,
    Shift,
    Sum,
    Tiles,
    Transposed,
    Unembed,
    UnembedWeights,
)
from .fingerprints import agree, products
from .missing_weights import MISSING, MissingWeights

_SKIPPED = {"tokenizer", "embed_weights", "score_weights"}  # the host's own; no operator needs them
DTYPES = {
    str(dtype).removeprefix("torch."): (dtype, code)
    for dtype, code in (
        (torch.float64, "F64"),
        (torch.float32, "F32"),
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.int64, "I64"),
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
    )
}


_PARTS = (
    Capture, Convention, FrozenBlock, Prompts, Node, Edge, Chain, Sum, Residual, Transposed, Linear,
    Mix, Gate, Shift, Identity, Norm, Scores, RecomputedMix, Tiles, Attention, MLP, GatedMLP, Unembed,
)  # fmt: skip
_WEIGHTS = (
    ModelWeights, EmbedWeights, BlockWeights, AttentionWeights, MLPWeights, GatedMLPWeights,
    NormWeights, UnembedWeights, ScoreWeights, Rotation,
)  # fmt: skip
_CLASSES: dict[str, type] = {cls.__name__: cls for cls in (*_PARTS, *_WEIGHTS)}
"""What a file may hold: the library's own frozen dataclasses below the operator."""


def _holds_weights(cls: type) -> bool:
    return cls in _WEIGHTS


# --- Fingerprints --------------------------------------------------------------------------------


# --- Missing weights -----------------------------------------------------------------------------


# --- Writing -------------------------------------------------------------------------------------


class Writer:
    """Turns values into JSON, and collects the tensors to store."""

    def __init__(self, frame: Frame, store_weights: bool):
        self.frame, self.store_weights = frame, store_weights
        self.tensors: dict[str, Tensor] = {}
        self.keys: dict[tuple, str] = {}
        self.storages: set[int] = set()

    def node(self, value: Any, path: str, stored: bool = True) -> Any:
        """A value as JSON; the path is its dotted name."""
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$": "float", "text": repr(value)}
        if isinstance(value, Tensor):
            return self.tensor(value, path, stored)
        if isinstance(value, torch.dtype):
            return {"$": "dtype", "name": str(value).removeprefix("torch.")}
        if isinstance(value, tuple):
            return [self.node(item, f"{path}.{i}", stored) for i, item in enumerate(value)]
        if isinstance(value, Mapping):
            pairs = ((k, v, f"{path}.{k}") for k, v in value.items())
            items = [[self.node(k, at, stored), self.node(v, at, stored)] for k, v, at in pairs]
            return {"$": "map", "items": items}
        if isinstance(value, Frame) and value == self.frame:
            return {"$": "Frame"}
        if isinstance(value, MissingWeights):
            if self.store_weights:
                raise ValueError(MISSING)
            return value.__node__
        name, cls = type(value).__name__, type(value)
        if isinstance(value, Frame) or _CLASSES.get(name) is not cls:
            raise ValueError(f"cannot save {path or 'a lens'}: expected no {name} in a capture")
        if _holds_weights(cls):
            stored = self.store_weights
        return {"$": name} | {
            f.name: self.node(getattr(value, f.name), _join(path, f.name), stored)
            for f in fields(value)
            if f.name not in _SKIPPED
        }

    def tensor(self, tensor: Tensor, path: str, stored: bool) -> dict[str, Any]:
        """A tensor's entry; equal views of one memory are stored once."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"cannot save {path} of {dtype}; expected one of {', '.join(DTYPES)}")
        node = {"$": "tensor", "dtype": dtype, "shape": list(tensor.shape)}
        node["products"] = products(tensor)
        if not stored:
            return node
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        # Stored in memory order, so that the loaded tensor has the same strides, and products with
        # it round in the same way.
        order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))
        if key not in self.keys:
            self.keys[key] = path
            data = tensor.detach().permute(order).contiguous().cpu()
            if data.untyped_storage().data_ptr() in self.storages:
                data = data.clone()
            self.storages.add(data.untyped_storage().data_ptr())
            self.tensors[path] = data
        return node | {"key": self.keys[key], "order": order}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- Building -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Builder:
    """Turns JSON into values: what to make of a tensor and of weights, by entry and name."""

    frame: Frame | None
    tensor: Callable[[dict[str, Any], str], Tensor]
    weights: Callable[[type, dict[str, Any], str], Any] | None = None

    def value(self, node: Any, path: str) -> Any:
        if isinstance(node, list):
            return tuple(self.value(item, f"{path}.{i}") for i, item in enumerate(node))
        if not isinstance(node, dict):
            return node
        kind = node.get("$")
        if kind == "tensor":
            return self.tensor(node, path)
        if kind == "float":
            return float(node["text"])
        if kind == "dtype":
            return parse_dtype(node["name"], path)
        if kind == "map":
            return {self.value(k, path): self.value(v, path) for k, v in node["items"]}
        if kind == "Frame":
            return self.frame
        if not (isinstance(kind, str) and (cls := _CLASSES.get(kind))):
            raise ValueError(f"{path}: expected a part of a lens, got {kind!r}")
        if self.weights is not None and _holds_weights(cls):
            return self.weights(cls, node, path)
        known = {f.name for f in fields(cls)} - _SKIPPED
        if unknown := set(node) - known - {"$"}:
            raise ValueError(f"{path}: {kind} has no {', '.join(sorted(unknown))}")
        parts = {name: self.value(node[name], _join(path, name)) for name in known & set(node)}
        return cls(**parts)


def parse_dtype(name: Any, path: str) -> torch.dtype:
    """The dtype of a name.

    Args:
        name: From a file.
        path: Where it stands, for the message.

    Returns:
        The dtype.

    Raises:
        ValueError: If it is none that is stored.
    """
    if name not in DTYPES:
        raise ValueError(f"{path}: expected a dtype of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name][0]


# --- Checking ----------------------------------------------------------------------------------------


# --- Weights of a model --------------------------------------------------------------------------


def weights_in(node: Any, path: str, found: dict[str, dict[str, Any]]) -> None:
    """Collect the entries of weights by where the model has them: "blocks.0.attn"."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            weights_in(item, _join(path, str(i)), found)
    elif isinstance(node, dict):
        if (cls := _CLASSES.get(node.get("$", ""))) and _holds_weights(cls):
            kind = node["$"]
            if kind not in ("ModelWeights", "BlockWeights"):
                found[path.removesuffix(".weights")] = node
                return
        for name, item in node.items():
            weights_in(item, _join(path, name), found)


def differences(saved: Any, other: Any, path: str) -> Iterator[str]:
    """How two entries of weights differ, in words.

    Args:
        saved: The file's.
        other: The model's.
        path: Where they stand.

    Yields:
        One sentence per difference.
    """
    if isinstance(saved, dict) and isinstance(other, dict) and saved.get("$") == other.get("$"):
        if saved["$"] != "tensor":
            for name in dict.fromkeys((*saved, *other)):
                yield from differences(saved.get(name), other.get(name), _join(path, name))
        elif (a := (saved["dtype"], saved["shape"])) != (b := (other["dtype"], other["shape"])):
            yield f"{path} is {b[0]} {b[1]}, expected {a[0]} {a[1]}"
        elif not agree(saved["products"], other["products"]):
            yield f"{path} has other values"
    elif isinstance(saved, dict) or isinstance(other, dict):
        a, b = (x.get("$") if isinstance(x, dict) else x for x in (saved, other))
        yield f"{path} is {b}, expected {a}"
    elif saved != other:
        yield f"{path} is {other!r}, expected {saved!r}"
