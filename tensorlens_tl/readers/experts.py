"""Mixtures of experts in the hosts: where weights and activations of single experts are found.

Three layouts are known, each told by the module itself:

1. Hugging Face packs all experts of a block into one module with two tensors, ``gate_up_proj`` and
   ``down_proj``. No hook shows what is inside, so the products with these two are watched while the
   module runs. It gets the tokens, the experts of each and their routing weights.
2. Llama-4 packs them, too, but every expert gets every token, times its routing weight.
3. HookedTransformer has one module per expert, with hook points.

Each gives an :class:`ExpertsRead` per run and block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..refusals import UnsupportedArchitectureError, refusal
from ..sublayers import ExpertsWeights
from .hook_points import in_this_thread
from .linear import inner

_PRODUCTS = ("linear", "matmul", "__matmul__", "bmm")
_QUICK = 1.702  # the factor of quick_gelu, act(z) = z σ(1.702 z)


@dataclass(frozen=True, eq=False)
class ExpertsRead:
    """What the experts of one block did in a run, token by token, padding included.

    Attributes:
        experts: The expert in every slot.
        share: The routing weight of every slot.
        pre: Pre-activations g = x W_gate + b_gate.
        pre_linear: Values u = x W_in + b_in, the factor beside the activation.
        post: What the output matrix read.
    """

    experts: Int[Tensor, "token slot"]
    share: Float[Tensor, "token slot"]
    pre: Float[Tensor, "token slot d_mlp"]
    pre_linear: Float[Tensor, "token slot d_mlp"]
    post: Float[Tensor, "token slot d_mlp"]


Give = Callable[[ExpertsRead], None]


class Mixture(ABC):
    """Reads the mixture of experts of one block.

    Args:
        module: The host's module of the whole mixture.
        factor: What the host's block multiplies what leaves the module with.
    """

    def __init__(self, module: Any, factor: float = 1.0):
        self.module, self.factor = module, factor

    @abstractmethod
    def watch(self, give: Give) -> list[Any]:
        """Read the experts whenever they run.

        Args:
            give: Called with what the experts did.

        Returns:
            Handles of the hooks, to be removed.
        """

    @abstractmethod
    def part(self, chunks: int) -> list[Any]:
        """Let the mixture run on one copy of its input per expert, where each meets that expert.

        The input is [chunk · row, pos, d_model]. In chunk e only expert e adds anything, with the
        weight that the router gives it there; in the last one, of a mixture with a shared expert,
        only that. The router runs on every copy. So what leaves a chunk is what one expert makes
        of it.

        Args:
            chunks: Number of experts, and one for a shared expert.

        Returns:
            Handles of the hooks, to be removed.
        """

    @property
    def points(self) -> dict[str, Any]:
        """Where the shared expert's activations pass; empty where there is none."""
        return {}


class _Products(TorchFunctionMode):
    """Sees the products with two packed tensors: what the first gives, and what the second reads.

    Args:
        into: The packed matrices before the activation.
        out: The packed matrices after it.
    """

    def __init__(self, into: Tensor, out: Tensor):
        super().__init__()
        self.packed = {"into": into, "out": out}
        self.seen: dict[
            tuple[str, int], Tensor
        ] = {}  # by side, and the first expert of the product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _PRODUCTS and isinstance(args[1], Tensor):
            for side, packed in self.packed.items():
                offset = args[1].data_ptr() - packed.data_ptr()
                size = packed.stride(0) * packed.itemsize
                if 0 <= offset < size * len(packed):
                    self.seen[side, offset // size] = found if side == "into" else args[0]
        return found


# --- Hugging Face's packed experts ---------------------------------------------------------------


def shared_expert(mixture: Any) -> Any:
    """The MLP that every token passes beside the experts, or None."""
    found = (getattr(mixture, name, None) for name in ("shared_expert", "shared_experts"))
    return next((inner(module) for module in found if module is not None), None)


def packed_weights(module: Any, activation: Callable[[Any], str]) -> ExpertsWeights:
    """Weights of a packed module of experts, as views of its two tensors.

    Args:
        module: The module of Hugging Face.
        activation: Names an activation by its module.

    Returns:
        The weights in the canonical layout.

    Raises:
        UnsupportedArchitectureError: If an expert does something else than a gated MLP.
    """
    kind = type(module).__name__
    into: Any = getattr(module, "gate_up_proj", None)
    out: Any = getattr(module, "down_proj", None)
    if getattr(into, "ndim", 0) != 3 or getattr(out, "ndim", 0) != 3:
        raise UnsupportedArchitectureError(
            refusal(f"the experts {kind}", "they are no packed gated MLPs")
        )
    every_token = not hasattr(module, "is_transposed")  # Llama-4's
    into, out = (W if getattr(module, "is_transposed", True) else W.mT for W in (into, out))
    limit, offset = None, 0.0
    gate = getattr(type(module)._apply_gate, "__qualname__", "") if not every_token else ""
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedArchitectureError(
            refusal(f"the experts {kind}", "a norm follows each of them")
        )
    if gate.endswith("GptOssExperts._apply_gate"):
        limit, offset, act = float(module.limit), 1.0, "quick_gelu"
        if module.alpha != _QUICK:
            raise UnsupportedArchitectureError(
                refusal(f"the experts {kind}", f"swiglu_alpha={module.alpha} is not {_QUICK}")
            )
    elif every_token or gate == "_default_apply_gate":
        act = activation(module.act_fn)
    else:
        raise UnsupportedArchitectureError(
            refusal(f"the experts {kind}", "they combine gate and up in a way of their own")
        )
    b_into = getattr(module, "gate_up_proj_bias", None)
    joined = getattr(module, "is_concatenated", True)
    (W_gate, W_in), (b_gate, b_in) = _halves(into, joined), _halves(b_into, joined)
    b_out = getattr(module, "down_proj_bias", None)
    return ExpertsWeights(
        W_gate, b_gate, W_in, b_in, out, b_out, act, limit, offset, scales_input=every_token
    )


def _halves(packed: Any, joined: bool) -> tuple[Any, Any]:
    """Gate and up, which stand one after the other (joined) or in turns."""
    if packed is None:
        return None, None
    if joined:
        half = packed.shape[-1] // 2
        return packed[..., :half], packed[..., half:]
    return packed[..., ::2], packed[..., 1::2]


class PackedMixture(Mixture):
    """Experts in one packed module, as Hugging Face has them."""

    @property
    def points(self) -> dict[str, Any]:
        if (shared := shared_expert(self.module)) is None:
            return {}
        found = {"pre": shared.gate_proj, "pre_linear": shared.up_proj, "post": shared.down_proj}
        if (gate := getattr(self.module, "shared_expert_gate", None)) is not None:
            found["gate"] = gate
        return {f"shared.{name}": module for name, module in found.items()}

    def watch(self, give: Give) -> list[Any]:
        module = inner(self.module.experts)
        running: list[_Products] = []
        scores: list[Tensor] = []  # Llama-4's router tells the experts of a token

        def routed(router: Any, args: Any, output: Any) -> None:
            scores[:] = [output[0]]  # [token, expert]; 0 for the experts that were not chosen

        def before(module: Any, args: Any) -> None:
            running.append(_Products(module.gate_up_proj, module.down_proj))
            running[-1].__enter__()

        def after(module: Any, args: Any, output: Any) -> None:
            if not running:
                return
            products = running.pop()
            products.__exit__(None, None, None)
            if output is not None and every_token:
                give(_llama4_read(self.module.top_k, scores.pop(), products.seen))
            elif output is not None:  # None after an error inside
                tokens, experts, share = args
                give(_packed_read(module, (tokens, experts, share * factor), products.seen))

        after_all = type(self.module).__name__ == "LagunaSparseMoeBlock"  # others scale shares
        factor = float(self.module.routed_scaling_factor) if after_all else 1.0
        every_token = not hasattr(module, "is_transposed")
        listen = (
            [self.module.router.register_forward_hook(in_this_thread(routed))]
            if every_token
            else []
        )
        listen.append(module.register_forward_pre_hook(in_this_thread(before)))
        # Also after an error: the products of the rest of the program are nobody's business.
        listen.append(module.register_forward_hook(in_this_thread(after), always_call=True))
        return listen

    def part(self, chunks: int) -> list[Any]:
        module, rows = inner(self.module.experts), {}

        def only(router: Any, args: Any, output: Any) -> Any:  # Llama-4's
            scores, *rest = output
            expert = torch.arange(scores.shape[1], device=scores.device)
            return (scores * (_chunk(scores, chunks) == expert), *rest)

        def before(module: Any, args: Any) -> Any:
            tokens, experts, share = args
            token, slot = torch.where(experts == _chunk(tokens, chunks))
            rows["at"], rows["of"] = token, len(tokens)
            return tokens[token], experts[token, slot][:, None], share[token, slot][:, None]

        def after(module: Any, args: Any, output: Tensor) -> Tensor:
            whole = output.new_zeros(rows["of"], output.shape[-1])
            return whole.index_copy(0, rows["at"], output)

        def last(shared: Any, args: Any, output: Tensor) -> Tensor:
            flat = output.flatten(0, -2)
            return torch.where(_chunk(flat, chunks) == chunks - 1, flat, 0).view(output.shape)

        hooks: list[Any]
        if hasattr(module, "is_transposed"):
            hooks = [
                (module.register_forward_pre_hook, before),
                (module.register_forward_hook, after),
            ]
        else:
            hooks = [(self.module.router.register_forward_hook, only)]
        for name in ("shared_expert", "shared_experts"):
            if (shared := getattr(self.module, name, None)) is not None:
                hooks.append((shared.register_forward_hook, last))
        return [add(in_this_thread(hook)) for add, hook in hooks]


def _packed_read(module: Any, args: Any, seen: dict[tuple[str, int], Tensor]) -> ExpertsRead:
    tokens, experts, share = args
    width, rows = module.down_proj.shape[1 if module.is_transposed else 2], _rows(experts)
    into = tokens.new_empty(*experts.shape, 2 * width)
    post = tokens.new_empty(*experts.shape, width)
    bias = getattr(module, "gate_up_proj_bias", None)
    for (side, expert), found in seen.items():
        if side == "into" and bias is not None:
            found = found + bias[expert]
        whole = into if side == "into" else post
        whole.flatten(0, 1).index_copy_(0, rows[expert], found)
    return ExpertsRead(experts, share, *_halves(into, module.is_concatenated), post)


def _rows(experts: Int[Tensor, "token slot"]) -> dict[int, Int[Tensor, " row"]]:
    """Where the rows of each expert belong among [token · slot]."""
    # Hosts take an expert's tokens from a mask [slot, token], so its rows come slot by slot.
    tokens, slots = experts.shape
    found, order = experts.T.flatten().sort(stable=True)
    at = order % tokens * slots + order // tokens
    own, counts = found.unique_consecutive(return_counts=True)
    return dict(zip(own.tolist(), at.split(counts.tolist()), strict=True))


def _llama4_read(top_k: int, scores: Tensor, seen: dict[tuple[str, int], Tensor]) -> ExpertsRead:
    share, experts = scores.topk(top_k, dim=-1)
    token = torch.arange(len(scores), device=scores.device)[:, None]
    into, post = (seen[side, 0][experts, token] for side in ("into", "out"))
    return ExpertsRead(experts, share, *_halves(into, True), post)


def _chunk(tokens: Tensor, chunks: int) -> Int[Tensor, "token 1"]:
    """The copy that every token belongs to, of equal copies one after the other."""
    each = len(tokens) // chunks
    return torch.arange(len(tokens), device=tokens.device)[:, None] // each


@contextmanager
def eager_experts(modules: Iterable[Any]) -> Iterator[None]:
    """Let packed experts run one after the other for a while.

    Their other implementations hide what single experts do, and reject float64.

    Args:
        modules: Hugging Face's modules of experts.
    """
    own = [getattr(module, "config", None) for module in modules]
    name = "_experts_implementation_internal"  # the public name would set those of sub-models, too
    held = [(config, getattr(config, name)) for config in own if hasattr(config, name)]
    try:
        for config, _ in held:
            setattr(config, name, "eager")
        yield
    finally:
        for config, was in reversed(held):
            setattr(config, name, was)


# --- HookedTransformer's -------------------------------------------------------------------------


def hooked_weights(mixture: Any, act: str) -> ExpertsWeights:
    """Weights of HookedTransformer's list of experts, one tensor each.

    Args:
        mixture: The module of the mixture.
        act: Name of the activation in this library.

    Returns:
        The weights in the canonical layout.
    """

    def stack(name: str, kind: str) -> Any:
        parts = [getattr(getattr(expert, name), kind) for expert in mixture.experts]
        if any(part is None for part in parts):
            return None
        return tuple(part.T if kind == "weight" else part for part in parts)

    W, b = (
        [stack(name, kind) for name in ("W_gate", "W_in", "W_out")] for kind in ("weight", "bias")
    )
    own = (None, 0.0, act)
    if type(mixture).__name__ == "GptOssMoE":
        own = (7.0, 1.0, "quick_gelu")  # constants of that module
    return ExpertsWeights(W[0], b[0], W[1], b[1], W[2], b[2], own[2], own[0], own[1])


class HookedMixture(Mixture):
    """Experts in one module each, as HookedTransformer has them."""

    def watch(self, give: Give) -> list[Any]:
        seen: dict[Any, Tensor] = {}

        def keep(key: Any) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Tensor) -> None:
                seen[key] = output

            return in_this_thread(hook)

        def after(module: Any, args: Any, output: Any) -> None:
            give(_hooked_read(self.module, dict(seen)))
            seen.clear()

        points = {
            "share": self.module.hook_expert_weights,
            "experts": self.module.hook_expert_indices,
        }
        for i, expert in enumerate(self.module.experts):
            own = {"pre": expert.hook_gate, "pre_linear": expert.hook_pre, "post": expert.hook_post}
            points |= {(name, i): point for name, point in own.items()}
        handles = [point.register_forward_hook(keep(key)) for key, point in points.items()]
        return [*handles, self.module.register_forward_hook(in_this_thread(after))]

    def part(self, chunks: int) -> list[Any]:
        routed: dict[str, Tensor] = {}

        def keep(point: Any, args: Any, output: Tensor) -> None:
            routed["experts"] = output

        def only(expert: int) -> Callable[..., Any]:
            def hook(module: Any, args: Any, output: Tensor) -> Tensor:
                token = torch.where(routed["experts"].T.eq(expert))[1]
                return torch.where(_chunk(routed["experts"], chunks)[token] == expert, output, 0)

            return hook

        handles = [self.module.hook_expert_indices.register_forward_hook(in_this_thread(keep))]
        for i, expert in enumerate(self.module.experts):
            handles.append(expert.register_forward_hook(in_this_thread(only(i))))
        return handles


def _hooked_read(mixture: Any, seen: dict[Any, Tensor]) -> ExpertsRead:
    experts = seen.pop("experts")
    share = seen.pop("share").gather(1, experts)  # of all experts, before the best are chosen
    norms = type(mixture).__name__ == "MoE" and getattr(mixture.cfg, "norm_topk_prob", True)
    share = share / share.sum(-1, keepdim=True) if norms else share
    like = next(iter(seen.values()))
    rows, names = _rows(experts), ("pre", "pre_linear", "post")
    parts = {name: like.new_empty(*experts.shape, like.shape[-1]) for name in names}
    for (name, expert), found in seen.items():
        if expert in rows:  # some run on no token at all
            parts[name].flatten(0, 1).index_copy_(0, rows[expert], found)
    return ExpertsRead(experts, share.to(like.dtype), **parts)
