"""A capture as a tree of JSON: written, built, and compared with a model.

1. ``Writer`` turns a capture into a tree. A tensor stands there by dtype, shape and fingerprint,
   with or without a key under which its data are stored.
2. ``Builder`` turns a tree into a capture. It builds only the library's own frozen dataclasses.
   What it builds is checked against their annotations (see saved_checks.py).
3. ``weights_in`` and ``differences`` compare the weights of a tree with those of a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..graph import Edge, Node
from ..maps import (
    Chain,
    DeltaRule,
    Factor,
    Frame,
    Gate,
    Identity,
    Linear,
    Mix,
    Norm,
    NormWeights,
    Residual,
    Routed,
    Shift,
    Sum,
    Transposed,
)
from ..operator import Capture, Convention, FrozenBlock, Prompts
from ..sublayers import (
    MLP,
    Attention,
    AttentionWeights,
    BlockWeights,
    DeltaNetWeights,
    EmbedWeights,
    Experts,
    ExpertsWeights,
    GatedMLP,
    GatedMLPWeights,
    HeadWeights,
    LatentWeights,
    MLPWeights,
    ModelWeights,
    PooledHead,
    RecomputedMix,
    Rotation,
    Scores,
    ScoreWeights,
    Tiles,
    Unembed,
    UnembedWeights,
)
from .fingerprints import agree, products
from .missing_weights import MISSING, MissingWeights
from .saved_checks import Misfit

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

"""What a tensor may be stored as: its dtype and safetensors' name for it."""

_PARTS = (
    Capture,
    Convention,
    FrozenBlock,
    Prompts,
    Node,
    Edge,
    Chain,
    Sum,
    Residual,
    Transposed,
    Linear,
    Mix,
    DeltaRule,
    Gate,
    Routed,
    Shift,
    Identity,
    Norm,
    Factor,
    Scores,
    RecomputedMix,
    Tiles,
    Attention,
    MLP,
    GatedMLP,
    Experts,
    Unembed,
)
_WEIGHTS = (
    ModelWeights,
    PooledHead,
    EmbedWeights,
    BlockWeights,
    AttentionWeights,
    LatentWeights,
    DeltaNetWeights,
    MLPWeights,
    GatedMLPWeights,
    ExpertsWeights,
    HeadWeights,
    NormWeights,
    UnembedWeights,
    ScoreWeights,
    Rotation,
)
_CLASSES: dict[str, type] = {cls.__name__: cls for cls in (*_PARTS, *_WEIGHTS)}
"""What a file may hold: the library's own frozen dataclasses below the operator."""


# --- Writing -------------------------------------------------------------------------------------


class Writer:
    """Turns values into JSON, and collects the tensors to store.

    Attributes:
        tensors: The tensors to store, by key.
    """

    def __init__(self, frame: Frame, store_weights: bool):
        self.frame, self.store_weights = frame, store_weights
        self.tensors: dict[str, Tensor] = {}
        self.keys: dict[tuple, str] = {}  # by memory: views of one memory are stored once
        self.storages: set[int] = set()

    def node(self, value: Any, path: str, stored: bool = True) -> Any:
        """Turn a value into JSON; ``path`` is the dotted name of the value."""
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
            raise ValueError(
                f"Cannot save {path or 'a lens'}, which holds an object of class {name}. Save only "
                "lenses that tensorlens_tl.capture made."
            )
        if cls in _WEIGHTS:
            stored = self.store_weights
        return {"$": name} | {
            f.name: self.node(getattr(value, f.name), _join(path, f.name), stored)
            for f in fields(value)
            if f.name not in _SKIPPED
        }

    def tensor(self, tensor: Tensor, path: str, stored: bool) -> dict[str, Any]:
        """Make the entry of a tensor; equal views of one memory are stored once."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(
                f"Cannot save {path} of {dtype}. Convert it to one of {', '.join(DTYPES)}."
            )
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
    """Turns JSON into values.

    Attributes:
        frame: The frame of the capture; None while the frame itself is read.
        tensor: Makes a tensor of an entry and its dotted name.
        weights: Makes weights of a class, an entry and its dotted name; None to build them from the
            tree like any other part.
    """

    frame: Frame | None
    tensor: Callable[[dict[str, Any], str], Tensor]
    weights: Callable[[type, dict[str, Any], str], Any] | None = None

    def value(self, node: Any, path: str) -> Any:
        """Turn a node of the tree into a value; ``path`` is its dotted name."""
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
            keys = [self.value(key, path) for key, _ in node["items"]]
            items = zip(keys, node["items"], strict=True)
            return {key: self.value(item[1], _join(path, str(key))) for key, item in items}
        if kind == "Frame":
            return self.frame
        if not (isinstance(kind, str) and (cls := _CLASSES.get(kind))):
            raise Misfit(f"{path}: expected a part of a lens, got {kind!r}")
        if self.weights is not None and cls in _WEIGHTS:
            return self.weights(cls, node, path)
        known = {f.name for f in fields(cls)} - _SKIPPED
        if unknown := set(node) - known - {"$"}:
            raise Misfit(f"{path}: {kind} has no {', '.join(sorted(unknown))}")
        parts = {name: self.value(node[name], _join(path, name)) for name in known & set(node)}
        return cls(**parts)


def as_written_now(node: Any) -> Any:
    """The tree of a capture as it is written now.

    Args:
        node: The tree in a file. Earlier builds had three fields in place of ``embeddings``.

    Returns:
        The tree, with the field ``embeddings``.
    """
    if not isinstance(node, dict) or "embeddings" in node or "embed" not in node:
        return node
    former = {name: node.get(name) for name in ("embed", "pos_embed")}
    if edit := node.get("edit"):
        former[edit["name"]] = edit["constant"]
    items = [[name, part] for name, part in former.items() if part is not None]
    rest = {name: part for name, part in node.items() if name not in ("embed", "pos_embed", "edit")}
    return {**rest, "embeddings": {"$": "map", "items": items}}


def parse_dtype(name: Any, path: str) -> torch.dtype:
    """Find the dtype of a name.

    Args:
        name: The name in a file, such as "float32".
        path: The dotted name of the field, for the message.

    Returns:
        The dtype of that name.

    Raises:
        Misfit: If no tensor is stored as that dtype.
    """
    if name not in DTYPES:
        raise Misfit(f"{path}: expected a dtype of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name][0]


# --- Weights of a model --------------------------------------------------------------------------


def weights_in(node: Any, path: str, found: dict[str, dict[str, Any]]) -> None:
    """Collect into ``found`` the entries of weights, by place in the model: "blocks.0.attn"."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            weights_in(item, _join(path, str(i)), found)
    elif isinstance(node, dict):
        if (cls := _CLASSES.get(node.get("$", ""))) and cls in _WEIGHTS:
            kind = node["$"]
            if kind not in ("ModelWeights", "BlockWeights"):
                found[path.removesuffix(".weights")] = node
                return
        for name, item in node.items():
            weights_in(item, _join(path, name), found)


def differences(saved: Any, found: Any, path: str) -> Iterator[str]:
    """Tell how two entries of weights differ, in words.

    Args:
        saved: The entry in the file.
        found: The entry of the model.
        path: The dotted name of the weights.

    Yields:
        One clause per difference.
    """
    if isinstance(saved, dict) and isinstance(found, dict) and saved.get("$") == found.get("$"):
        if saved["$"] != "tensor":
            for name in dict.fromkeys((*saved, *found)):
                if name == "eps" and name not in saved:  # files of earlier builds lack it
                    continue
                yield from differences(saved.get(name), found.get(name), _join(path, name))
        elif (a := (saved["dtype"], saved["shape"])) != (b := (found["dtype"], found["shape"])):
            yield f"{path} is {b[0]} {b[1]}, expected {a[0]} {a[1]}"
        elif not agree(saved["products"], found["products"]):
            yield f"{path} has other values"
    elif isinstance(saved, dict) or isinstance(found, dict):
        a, b = (x.get("$") if isinstance(x, dict) else x for x in (saved, found))
        yield f"{path} is {b}, expected {a}"
    elif saved != found:
        yield f"{path} is {found!r}, expected {saved!r}"
