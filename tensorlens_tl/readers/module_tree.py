"""The modules of a host, remembered while none is replaced."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

SPLICED = "hook_sae_output"
"""Hook point at which an SAE of SAELens ends that stands in place of a hook point."""

_KNOWN = "_tensorlens_modules"
"""Attribute of a host that holds what was found of it last."""


@dataclass(frozen=True, eq=False)
class ModuleTree:
    """Modules and hook points of a host, by name.

    Attributes:
        children: What every module of the host holds its parts in, and those parts.
        state: What else decides the names of hook points.
        named: Every module of the host, with its name.
        inner: Every module of the model inside a Bridge, or of the host, with its name.
        hooks: The host's hook points by name. A Bridge gathers them anew at every look.
    """

    children: tuple[list[dict[str, Any]], list[list[Any]]]
    state: tuple[Any, bool, int]
    named: tuple[tuple[str, Any], ...]
    inner: tuple[tuple[str, Any], ...]
    hooks: dict[str, Any]

    @cached_property
    def owners(self) -> tuple[tuple[str, Any], ...]:
        """Those of :attr:`named` that are no hook points, and may own weights."""
        return tuple(one for one in self.named if "fwd_hooks" not in vars(one[1]))

    @cached_property
    def by_end(self) -> dict[str, list[Any]]:
        """The modules of :attr:`inner` by the last part of their names."""
        found: dict[str, list[Any]] = {}
        for name, module in self.inner:
            found.setdefault(name.rpartition(".")[2], []).append(module)
        return found

    @classmethod
    def of(cls, model: Any) -> ModuleTree:
        """Look at a host; what was found last time is right where every module is the same one.

        Args:
            model: A host model.

        Returns:
            The modules and hook points of the host, as they are now.
        """
        inner = getattr(model, "original_model", model)
        folded = bool(vars(model).get("compatibility_mode"))
        state = inner, folded, len(vars(model).get("_hook_registry", ()))
        known = vars(model).get(_KNOWN)
        # Modules are equal only if they are one.
        if known is None or known.state != state or known.children[1] != _parts(known.children[0]):
            named = tuple(model.named_modules())
            own = named if inner is model else tuple(inner.named_modules())
            holders = list({id(m): m._modules for _, m in (*named, *own)}.values())
            children = holders, _parts(holders)
            hooks = dict(model.hook_dict)
            # An SAE that SAELens spliced in stands in place of a hook point.
            for name in [n for n in hooks if n.endswith(f".{SPLICED}")]:
                hooks.setdefault(name.removesuffix(f".{SPLICED}"), hooks[name])
            known = vars(model)[_KNOWN] = cls(children, state, named, own, hooks)
        return known


def _parts(holders: list[dict[str, Any]]) -> list[list[Any]]:
    return [list(parts.values()) for parts in holders]
