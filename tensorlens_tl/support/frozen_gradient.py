"""The gradient of a plain Hugging Face model with its frozen quantities held, by autograd alone.

The model runs once as it is, and no host is asked. While it runs, each operation that makes the
model nonlinear is given another derivative; its value stays as it is:

1. Softmax, sigmoid, roots, powers and divisors are constants: patterns, gates and scales.
2. An activation is its ratio times its input. Where it is multiplied with something that also
   depends on the residual, it is a constant: the gate of a gated MLP.
3. A product of two other such things has no frozen form here, and raises.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONSTANT = {"softmax", "sigmoid", "rsqrt", "sqrt", "exp", "softplus", "logsigmoid", "norm",
             "vector_norm", "reciprocal", "topk"}  # fmt: skip
_RATIO = {"silu", "gelu", "relu", "relu6", "leaky_relu", "tanh", "clamp", "clip", "expm1", "elu",
          "hardtanh", "mish"}  # fmt: skip
_RULES = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule")
_PRODUCT = {"mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"}
_CAST = {"to", "type_as", "float", "double", "contiguous"}
_QUOTIENT = {"div", "divide", "true_divide", "__truediv__", "div_"}


class NoFrozenFormError(RuntimeError):
    """The model computes something that this file has no frozen form of."""


@dataclass(frozen=True)
class PlainRun:
    """One run of a Hugging Face model that no host has touched.

    Attributes:
        logits: Logits of the run [batch, pos, d_vocab], of classes [batch, class], or what a model
            without a head ends in [batch, pos, d_model].
        target: A token's id, a class, or a direction in the final residual [d_model].
        pos: Position at which the target is read.
        gradient: Gradient of the target with respect to what enters block 0, with frozen quantities
            held [batch, pos, d_model]. None where it has none.
        no_gradient: Why there is none; "" where there is one.
    """

    logits: Tensor
    target: int | Tensor
    pos: int
    gradient: Tensor | None = None
    no_gradient: str = ""

    def value(self, logits: Tensor) -> Tensor:
        """The target in such logits, for each prompt [batch]."""
        if logits.ndim == 2:
            return logits[:, self.target]
        at = logits[:, self.pos]
        return at @ self.target if isinstance(self.target, Tensor) else at[:, self.target]


def plain_run(model: Any, inputs: Mapping[str, Tensor]) -> PlainRun:
    """Run a model as it is, and again with frozen quantities held.

    Args:
        model: A Hugging Face model that is in no Bridge.
        inputs: Arguments of its forward pass.

    Returns:
        What it gave. The target is a token at the last position, a class, or a direction at the
        first position of a model without a head.
    """
    with torch.no_grad():
        logits, has_head = _outputs(model, inputs)
    token = 3 if logits.ndim == 3 else 1
    direction = torch.linspace(-1, 1, logits.shape[-1]).to(logits)
    plain = PlainRun(logits, token if has_head else direction, -1 if has_head else 0)
    try:
        with _leaf_at_block_0(model) as leaf, _derivatives(model):
            frozen, _ = _outputs(model, inputs)
            (gradient,) = torch.autograd.grad(plain.value(frozen).sum(), leaf[0])
    except Exception as error:
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        return replace(plain, no_gradient=why)
    off = (frozen - logits).abs().max() / logits.abs().max()
    why = "" if off < 1e-5 else "the frozen run is another one"
    return replace(plain, gradient=None if why else gradient, no_gradient=why)


def _outputs(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
    """What a model gives, and whether they are logits."""
    out = model(**inputs)
    return (out["logits"], True) if "logits" in out else (out[0], False)


@contextmanager
def _leaf_at_block_0(model: Any) -> Iterator[list[Tensor]]:
    """Make what enters block 0 a leaf of the graph."""
    leaf: list[Tensor] = []

    def enter(module: Any, args: Any, kwargs: Any) -> Any:
        if leaf:  # the block is used again
            return None
        x = args[0] if args else kwargs["hidden_states"]
        leaf.append(x.detach().clone().requires_grad_())
        if args:
            return (leaf[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": leaf[0]}

    hook = first_block(model).register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield leaf
    finally:
        hook.remove()


def first_block(model: Any) -> Any:
    """Block 0 of the longest stack of blocks of a model; lists inside blocks are none."""
    stacks: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if type(module).__name__ == "ModuleList" and not inside:
            stacks[name] = module
    return max(stacks.values(), key=len)[0]  # of the first, where two are as long


@contextmanager
def _derivatives(model: Any) -> Iterator[None]:
    """Hold what is frozen while the model runs."""
    mode, wrapped = _Frozen(), []
    learned = [p for p in model.parameters() if p.requires_grad]
    activations = [
        module
        for module in model.modules()
        if re.search("gelu|relu|silu|activation", type(module).__name__, re.I)
        and not any(True for _ in module.children())
    ]
    hooks = [h for module in activations for h in mode.around(module)]
    # Later versions of transformers have one function for all layers, beside their classes.
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    for module in (*model.modules(), *files):
        for name in _RULES:
            if rule := vars(module).get(name):
                wrapped.append((module, name, rule))
                setattr(module, name, _linear_in_values(rule))
    for p in learned:
        p.requires_grad_(False)
    try:
        with mode:
            yield
    finally:
        for p in learned:
            p.requires_grad_(True)
        for hook in hooks:
            hook.remove()
        for module, name, rule in wrapped:
            setattr(module, name, rule)


def _linear_in_values(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A delta rule whose queries, keys, gates and step sizes are constants."""

    def held(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        constants = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        with torch._C.DisableTorchFunction():
            return rule(query.detach(), key.detach(), value, **constants)

    return held


class _Frozen(TorchFunctionMode):
    """Give nonlinear operations the derivative that they have when their frozen part is held."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[int, Tensor] = {}  # kept, so that no id is used again
        self.sigmoids: dict[int, Tensor] = {}
        self.inside = 0

    def around(self, activation: Any) -> tuple[Any, Any]:
        """Take an activation module as one operation, whatever it computes inside."""

        def enter(module: Any, args: Any) -> None:
            self.inside += 1

        def leave(module: Any, args: Any, out: Tensor) -> Tensor:
            self.inside -= 1
            return self.ratio(out, args[0])

        return activation.register_forward_pre_hook(enter), activation.register_forward_hook(leave)

    def ratio(self, out: Tensor, x: Tensor) -> Tensor:
        """Give ``out`` as x times a constant ratio."""
        if not (isinstance(x, Tensor) and x.requires_grad):
            return out
        safe = torch.where(x == 0, torch.ones_like(x), x)
        found = x * (out / safe).detach()
        found = found + (out - found).detach()  # the same number to the last digit
        self.gates[id(found)] = found
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        live = [a for a in args[:2] if isinstance(a, Tensor) and a.requires_grad]
        if self.inside or not live:
            return func(*args, **kwargs)
        if name == "layer_norm":
            return _layer_norm(func, *args, **kwargs)
        if name == "rms_norm":
            return live[0] * (func(*args, **kwargs) / live[0]).detach()
        if name == "square" or (name in ("pow", "__pow__") and args[1] == 2):
            return args[0] * args[0].detach()
        if name in ("pow", "__pow__"):
            return func(*args, **kwargs).detach()
        if name in _PRODUCT and len(live) == 2:
            return self.product(*live)
        if name in _QUOTIENT and isinstance(args[1], Tensor):
            return func(args[0], args[1].detach(), *args[2:], **kwargs)
        out = func(*args, **kwargs)
        if name in _RATIO:
            return self.ratio(out, args[0])
        if name not in _CONSTANT:
            cast = name in _CAST and id(args[0]) in self.gates
            if cast or (name in _PRODUCT and any(id(a) in self.sigmoids for a in args[:2])):
                self.gates[id(out)] = out
            return out
        if isinstance(out, tuple):
            return type(out)(t.detach() if t.is_floating_point() else t for t in out)
        out = out.detach()
        if name == "sigmoid":
            self.sigmoids[id(out)] = out
        return out

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """A product of two things that depend on the residual."""
        if a is b:
            return a * a.detach()
        if id(a) in self.gates:
            return a.detach() * b
        if id(b) in self.gates:
            return a * b.detach()
        raise NoFrozenFormError(
            f"A product {tuple(a.shape)} · {tuple(b.shape)} is of no known kind. Add a rule."
        )


def _layer_norm(
    func: Any, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scale = (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt().detach()
    out = centered / scale
    out = out if weight is None else out * weight
    return out if bias is None else out + bias
