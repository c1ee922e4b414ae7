"""A capture as a JSON tree: fingerprints, stand-ins for weights, writing, building, checking.

A tensor stands in the tree by dtype, shape and two products, its fingerprint, with or without a
key under which its data are stored. Only the library's own frozen dataclasses are built from a
tree, and what is built is checked against their annotations.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..graph.nodes import Edge, Node
from ..hosts.tokens import Prompts
from ..operator.capture import Capture, Convention, FrozenBlock
from ..sublayers.attention import MLP, Attention, GatedMLP, Unembed
from ..sublayers.attention_kernel import Scores
from ..sublayers.batch_layout import Frame
from ..sublayers.linear_map import Chain, Residual, Sum, Transposed
from ..sublayers.primitives import Gate, Identity, Linear, Mix, Norm, Shift
from ..sublayers.recomputed_pattern import RecomputedMix, Tiles
from ..sublayers.weights import (
    AttentionWeights,
    BlockWeights,
    EmbedWeights,
    GatedMLPWeights,
    MLPWeights,
    ModelWeights,
    NormWeights,
    Rotation,
    ScoreWeights,
    UnembedWeights,
)

MISSING = (
    "this lens was loaded without weights: pass model= to tensorlens_tl.load, or save with "
    "weights=True"
)

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


def _numbers(n: int, seed: int) -> Tensor:
    """Fixed numbers in [−1, 1), the same on every machine: an integer hash of 1 … n."""
    x = (torch.arange(1, n + 1) + (seed << 40)) * 3141592653589793239
    x = (x ^ (x >> 29)) * 2718281828459045235
    return ((x ^ (x >> 32)) & 0xFFFFF).double() / 2**19 - 1


def products(tensor: Tensor) -> list[str]:
    """The product Σ r_i W_ij s_j with fixed pseudorandom r, s, and the norm of W, in float64."""
    W = tensor.detach()
    W = W.reshape(1, -1) if W.ndim < 2 else W
    s = _numbers(W.shape[-1], 1).to(W.device)
    rows, squares = [], torch.zeros((), dtype=torch.float64, device=W.device)
    for part in W.split(max(1, 2**22 // math.prod(W.shape[1:]))):
        part = part.double()
        rows.append((part @ s).flatten())
        squares += part.square().sum()
    row = torch.cat(rows)
    return [repr(float(row @ _numbers(len(row), 2).to(row))), repr(float(squares.sqrt()))]


def agree(saved: list[str], found: list[str]) -> bool:
    """Whether two pairs of products are of one tensor, up to rounding."""
    # Machines add in different orders: a float64 sum may be off by a little.
    off, size = abs(float(saved[0]) - float(found[0])), float(found[1])
    return saved == found or (off <= 1e-12 * size and math.isclose(float(saved[1]), size))


# --- Missing weights -----------------------------------------------------------------------------


class MissingWeights:
    """Stands where weights were not loaded: any use raises a ValueError that says what to do."""

    __node__: dict[str, Any]

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise ValueError(MISSING)

    def __repr__(self) -> str:
        return "<weights not loaded>"


@cache
def _missing_class(cls: type) -> type:
    return type(f"Missing{cls.__name__}", (MissingWeights, cls), {})


def missing(cls: type, node: dict[str, Any], path: str) -> Any:
    """What stands in for weights of a class; it keeps their entry, to be saved again."""
    stand_in = object.__new__(_missing_class(cls))
    object.__setattr__(stand_in, "__node__", node)
    return stand_in


def require_weights(capture: Capture) -> Capture:
    """The capture, if its weights are there.

    Args:
        capture: The run.

    Returns:
        The same capture.

    Raises:
        ValueError: If it was loaded without weights.
    """
    if isinstance(capture.unembed.weights, MissingWeights):
        raise ValueError(MISSING)
    return capture


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


def check(value: Any, hint: Any, path: str, sizes: dict[str, int]) -> None:
    """Refuse a value that is not what its annotation says, shapes included.

    Args:
        value: From a file.
        hint: The annotation of the field it is for.
        path: Where it stands, for the message.
        sizes: Named sizes so far; new ones are entered.

    Raises:
        ValueError: If it does not fit.
    """
    if hint is Any:
        return
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if _is_a(value, option):
            hint = option
            break
    else:
        raise ValueError(f"{path}: expected {hint}, got {type(value).__name__}")
    arguments = get_args(hint)
    if isinstance(value, Tensor):
        _check_shape(value, hint, path, sizes)
    elif isinstance(value, tuple):
        each = arguments[0] if arguments[-1] is Ellipsis else None
        if each is None and len(arguments) != len(value):
            raise ValueError(f"{path}: expected {len(arguments)} values, got {len(value)}")
        for i, item in enumerate(value):
            check(item, arguments[i] if each is None else each, f"{path}.{i}", sizes)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check(key, arguments[0], path, sizes)
            check(item, arguments[1], f"{path}.{key}", sizes)
    elif is_dataclass(value):
        hints, own = get_type_hints(type(value)), dict(sizes)
        parts = [(f.name, getattr(value, f.name)) for f in fields(value)]
        for name, part in sorted(parts, key=lambda pair: not isinstance(pair[1], Tensor)):
            check(part, hints[name], f"{path}.{name}", own)


def _is_a(value: Any, hint: Any) -> bool:
    if hasattr(hint, "dim_str"):
        return isinstance(value, Tensor)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return type(value) is int
    return hint is Any or isinstance(value, get_origin(hint) or hint)


def _check_shape(tensor: Tensor, hint: Any, path: str, sizes: dict[str, int]) -> None:
    if tensor.is_floating_point() != hint.__name__.startswith("Float"):
        raise ValueError(f"{path}: expected {hint.__name__}, got {tensor.dtype}")
    names = hint.dim_str.split()
    expected = [
        int(name) if name.isdigit() else sizes.setdefault(name.removeprefix("query_").removeprefix("key_"), n)
        for name, n in zip(names, tensor.shape, strict=False)
    ]  # fmt: skip
    if len(names) != tensor.ndim or expected != list(tensor.shape):
        shown = f"[{', '.join(names)}] = {expected}" if len(names) == tensor.ndim else names
        raise ValueError(f"{path}: expected shape {shown}, got {list(tensor.shape)}")


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
