"""The real model, frozen by hooks; written-out sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import quiet
from torch import Tensor

from tensorlens_tl.attribution import TargetGradient, resolve


def attends_apart(model: Any) -> bool:
    """Whether Hugging Face's own attention runs, so that edits of its pattern are discarded."""
    attn = model.blocks[1].attn
    made_here = getattr(getattr(attn, "original_component", None), "accepts_pattern_fn", False)
    return type(attn).__name__ == "AttentionBridge" and not made_here


class FrozenModel:
    """The host's own forward pass with pattern, scale and gating ratio overwritten by hooks.

    The frozen values come from the host's own cache (ratio = post / pre, by division), not from
    the library; a model call with them frozen is then a function of the first residual alone.
    """

    def __init__(self, model: Any, ids: Tensor, gate: str = "gate"):
        self.model, self.ids, self.gate = model, ids, gate
        with torch.no_grad(), quiet():
            _, cache_ = model.run_with_cache(ids, return_cache_object=False)
        self.cache = {k: v.detach() for k, v in cache_.items() if isinstance(v, Tensor)}
        self.layers = range(len(model.blocks))

    @property
    def post_norm(self) -> bool:
        return hasattr(self.model, "mlm_head")

    def host_name(self, site: str) -> str:
        """The hook point of a site: HookedEncoder's hook_resid_post is the sum before a norm."""
        after = site.replace("resid_post", "normalized_resid_post")
        return after if after in self.model.hook_dict else site

    def site_names(self) -> list[str]:
        names = []
        for layer in self.layers:
            names.append(f"blocks.{layer}.hook_resid_pre")
            if self.post_norm:
                continue
            mid = f"blocks.{layer}.hook_resid_mid"
            parallel = "Parallel" in type(self.model.blocks[layer]).__name__ or getattr(
                self.model.cfg, "parallel_attn_mlp", False
            )
            if mid in self.cache and not parallel:
                names.append(mid)
        return [*names, f"blocks.{self.layers[-1]}.hook_resid_post"]

    def _hooks(self) -> list[tuple[str, Callable]]:
        def constant(name):
            return lambda t, hook: self.cache[name].clone()

        held = (
            "ln1.hook_scale",
            "ln2.hook_scale",
            "ln1_post.hook_scale",
            "ln2_post.hook_scale",
            "attn.hook_pattern",
            "attn.kv_a_layernorm.hook_scale",
            "ln_final.hook_scale",
            "mlp.ln.hook_scale",
        )
        if attends_apart(self.model):  # it would go on with its own pattern: hold what makes it
            held += "attn.q.hook_out", "attn.k.hook_out"
        names = [n for n in self.cache if n.endswith(held)]
        hooks = [(name, constant(name)) for name in names]
        for layer in self.layers:
            mlp = f"blocks.{layer}.mlp"
            if f"{mlp}.hook_pre" in self.cache:
                hooks += self._gate_hooks(mlp)
        return hooks

    def _gate_hooks(self, mlp: str) -> list[tuple[str, Callable]]:
        pre, live = self.cache[f"{mlp}.hook_pre"], {}
        post_name = f"{mlp}.hook_mid" if f"{mlp}.hook_mid" in self.cache else f"{mlp}.hook_post"
        post = self.cache[post_name]

        def keep(name):
            return lambda t, hook: live.__setitem__(name, t)

        if f"{mlp}.hook_pre_linear" not in self.cache:
            ratio = post / pre
            return [
                (f"{mlp}.hook_pre", keep("pre")),
                (post_name, lambda t, hook: ratio * live["pre"]),
            ]
        up, share = self.cache[f"{mlp}.hook_pre_linear"], {"gate": 1.0, "up": 0.0, "half": 0.5}
        layer = self.model.blocks[int(mlp.split(".")[1])]
        b_post = getattr(layer.mlp, "b_in", None) if hasattr(layer.mlp, "W_gate") else None
        offset = (
            b_post.detach()
            if b_post is not None and "Bridge" not in type(layer.mlp).__name__
            else 0
        )
        product = post - offset
        a = share[self.gate]
        on_up, on_gate = a * product / up, (1 - a) * product / pre
        return [
            (f"{mlp}.hook_pre", keep("pre")),
            (f"{mlp}.hook_pre_linear", keep("up")),
            (post_name, lambda t, hook: on_up * live["up"] + on_gate * live["pre"] + offset),
        ]

    def __call__(
        self, x: Tensor, inject: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Final normalized residual and all residual sites, from the first residual x."""
        sites: dict[str, Tensor] = {}
        first = self.site_names()[0]

        def site_hook(name):
            def hook(t, hook):
                t = x if name == first else t
                if inject and name in inject and not name.endswith("mid"):
                    t = t + inject[name]
                sites[name] = t
                return t

            return hook

        hooks = [(self.host_name(name), site_hook(name)) for name in self.site_names()]
        hooks += self._hooks()
        # On the Bridge hook_resid_mid is only what ln2 reads: what reaches the residual there is
        # added to the attention's output.
        for name in inject or ():
            if name.endswith("mid"):
                at = name.replace("hook_resid_mid", "hook_attn_out")
                hooks.append((at, lambda t, hook, name=name: t + inject[name]))
        final: list[Tensor] = []
        has_norm = hasattr(self.model, "ln_final") and not self.post_norm
        handle = None
        if has_norm:
            handle = self.model.ln_final.register_forward_hook(lambda m, a, out: final.append(out))
        try:
            with quiet():
                self.model.run_with_hooks(self.ids, fwd_hooks=hooks)
        finally:
            if handle is not None:
                handle.remove()
        return (final[-1] if has_norm else sites[self.site_names()[-1]]), sites


def written(writers):
    """What every writer adds, everywhere: [batch, writer, pos, d_model]."""
    pos = writers.moving()[0][0].wide()
    rows = [
        part.wide() if hasattr(part, "wide") else part.expand_as(pos[:1]) for part in writers.parts
    ]
    return torch.cat(rows).transpose(0, 1)


def arrived(operator, writers, layer):
    """What every writer below a layer has added when it comes there, past the residual's norms."""
    found = written(writers).clone()
    for step, below in zip(operator.steps, writers.below[1:], strict=True):
        if step.norm is not None and step.layer < layer:
            own = below - len(step.own)  # its own constant is added after it
            found[:, :own] = step.norm.apply(found[:, :own].transpose(0, 1)).transpose(0, 1)
    return found


def gradient_of(lens, target, versus=None, pos=-1):
    """A target of a lens, and its gradient at every site."""
    goal = resolve(lens.capture, target, versus, pos)
    return TargetGradient(lens.capture, lens.operator, goal)
