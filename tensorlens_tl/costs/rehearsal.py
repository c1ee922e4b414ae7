"""A call rehearsed: it runs as it will, but no number is computed, and its work is counted.

Under :class:`Rehearsal`, tensors of floating-point numbers have a shape and no content (PyTorch's
"meta" device), while integers are what they are. Tokens, positions and masks thus lead the call the
way that they will lead it. A floating-point number that the way depends on is taken to be tiny.

1. Every floating-point argument of an operation is made a tensor without content.
2. The operation gives the shape of its result; its flops are those that PyTorch counts.
3. A result of integers, and one whose shape depends on content, is computed from tiny numbers.
4. Storages of results are watched: the most bytes that they hold at once is the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from .cost_model import CAUSAL_TILE, Plan, memory_budget
from .machine_rates import Cost, ProductShape, rates

NUMBER = 1e-30
"""What every floating-point number is taken to be: not 0, nor an error that a check refuses."""

_aten = torch.ops.aten
_MIXING = {_aten.bmm, _aten.baddbmm}
"""Products of batches, such as patterns with values; all others are with weights."""
_FACTORIES = {_aten.zeros, _aten.ones, _aten.empty, _aten.rand, _aten.randn, _aten.eye}
_caches: list[Callable[[], Any]] = []


_running: list[Any] = []


def rehearsed() -> bool:
    """Whether a call is rehearsed now: its numbers mean nothing, and no check may refuse them."""
    return bool(_running)


def forgets(cache: Any) -> Any:
    """Have a cache of tensors cleared after every rehearsal, as they would be without content.

    Args:
        cache: A dictionary, or a cached function.

    Returns:
        The cache that was given.
    """
    _caches.append(getattr(cache, "cache_clear", None) or cache.clear)
    return cache


class Rehearsal(TorchDispatchMode):
    """Count what is done under it, and compute nothing.

    Attributes:
        cost: The work so far, by kind.
        peak: The most bytes that results held at once.
    """

    def __init__(self):
        super().__init__()
        self.cost, self.peak, self._held = Cost(), 0, 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._fake, self._read = FakeTensorMode(allow_non_fake_inputs=True), _Read()
        self._random = Random(0)
        self._largest: dict[bool, tuple[int, Any, Any]] = {}

    def __enter__(self) -> Rehearsal:
        super().__enter__()
        self._read.__enter__()
        _running.append(self)
        return self

    def __exit__(self, *args: Any) -> None:
        _running.remove(self)
        self._read.__exit__(*args)
        super().__exit__(*args)
        for clear in _caches:
            clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        if not any(x.is_floating_point() for x in given) and (given or not _floats(func, kwargs)):
            return func(*args, **kwargs)  # integers alone
        if func is _aten._local_scalar_dense.default:
            return NUMBER * (1 + self._random.random())  # orders by such numbers are random
        # 1. No content.
        args, kwargs = _mapped(self._bare, args), _mapped(self._bare, kwargs)
        # 2. The shape of the result; 3. from tiny numbers where integers come out of it.
        try:
            with self._fake:
                out = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):  # its shape depends on content
            out = None
        if out is None or not all(x.is_floating_point() for x in _tensors(out)):
            return func(*_mapped(_content, args), **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _bare(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor) or not x.is_floating_point():
            return x
        with self._fake:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        packet, made = func._overloadpacket, _tensors(out)
        if packet in flop_registry:
            mixes = packet in _MIXING
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            self.cost.mixing += flops * mixes
            self.cost.product += flops * (not mixes)
            # Few rows cost what it takes to read the weights.
            self.cost.moved += sum(x.numel() for x in _tensors((args, made)))
            if flops > self._largest.get(mixes, (0,))[0]:
                self._largest[mixes] = flops, made[0], [x.shape for x in _tensors(args)]
        elif not func.is_view:
            self.cost.moved += sum(x.numel() for x in made)
        self.cost.calls += not func.is_view
        # 4. Memory: not that of views, and of what is written to.
        there = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        for storage in (x.untyped_storage() for x in made):
            if storage._cdata not in there:
                self._watch(storage)

    def plan(self, what: str) -> Plan:
        """The work that was counted, in seconds of this machine.

        Args:
            what: Name of what was rehearsed, for display.

        Returns:
            The plan. Rates are measured by products as large as the largest that were met.
        """
        with_weights = self._largest.get(False, (0, torch.empty(1), [(64, 64), (64, 64)]))
        mixing = self._largest.get(True, (0, torch.empty(1), [(1, 64, 64), (1, 64, 64)]))
        (*_, rows, inner), (*_, width) = with_weights[2][-2:]
        (heads, _, n_pos), (*_, d_head) = mixing[2][-2:]
        shape = ProductShape(
            min(inner, width), max(inner, width), heads, d_head, n_pos, rows, CAUSAL_TILE
        )
        made = with_weights[1]
        measured = rates(shape, made.dtype, made.device)
        budget = memory_budget(None, made.device)
        return Plan(what, self.cost.flops, measured.seconds(self.cost), self.peak, budget, 1)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages and not self._storages[key][0].expired():
            return
        self._held += storage.nbytes() - self._storages.get(key, (None, 0))[1]
        self._storages[key] = StorageWeakRef(storage), storage.nbytes()
        if self._held > self.peak:  # it may be less: some are gone
            self._storages = {k: one for k, one in self._storages.items() if not one[0].expired()}
            self._held = sum(size for _, size in self._storages.values())
            self.peak = max(self.peak, self._held)


class _Read(TorchFunctionMode):
    """Gives small numbers where the content of a tensor is read as Python's or NumPy's."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READ and isinstance(args[0], FakeTensor):
            with _disable_current_modes():
                return func(_content(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


_READ = {Tensor.numpy, Tensor.tolist, Tensor.__array__}


def _floats(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation without tensors makes floating-point numbers."""
    dtype = kwargs.get("dtype")
    return dtype.is_floating_point if dtype is not None else func._overloadpacket in _FACTORIES


def _content(x: Tensor) -> Tensor:
    if not isinstance(x, FakeTensor):
        return x
    return torch.full((), NUMBER, dtype=x.dtype, device=x.device).expand(x.shape)


def _mapped(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Arguments of an operation, with every tensor changed; torch's own maps take longer."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: _mapped(change, part) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_mapped(change, part) for part in tree)
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors of arguments or of a result."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [x for part in parts for x in _tensors(part)] if isinstance(tree, _HOLD) else []


_HOLD = (tuple, list, dict)
