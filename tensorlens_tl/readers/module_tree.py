"""The modules of a host, remembered while none is replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_KNOWN = "_tensorlens_modules"
"""Attribute of a host that holds what was found of it last."""


@dataclass(frozen=True, eq=False)
class ModuleTree:
    """Modules and hook points of a host, by name.

    Attributes:
        state: Every module of the host in order, and what else decides the names of hook points.
        named: Every module of the host, with its name.
        inner: Every module of the model inside a Bridge, or of the host, with its name.
        hooks: The host's hook points by name. A Bridge gathers them anew at every look.
    """

    state: tuple[list[Any], bool, int]
    named: tuple[tuple[str, Any], ...]
    inner: tuple[tuple[str, Any], ...]
    hooks: dict[str, Any]

    @classmethod
    def of(cls, model: Any) -> ModuleTree:
        """Look at a host; what was found last time is right where every module is the same one.

        Args:
            model: A host model.

        Returns:
            The modules and hook points of the host, as they are now.
        """
        inner = getattr(model, "original_model", model)
        modules, seen, left = [], {id(None)}, [inner, model]
        while left:
            if id(module := left.pop()) not in seen:
                seen.add(id(module))
                modules.append(module)
                left += module._modules.values()
        folded = bool(vars(model).get("compatibility_mode"))
        state = modules, folded, len(vars(model).get("_hook_registry", ()))
        known = vars(model).get(_KNOWN)
        if known is None or known.state != state:  # modules are equal only if they are one
            named = tuple(model.named_modules())
            own = named if inner is model else tuple(inner.named_modules())
            known = vars(model)[_KNOWN] = cls(state, named, own, dict(model.hook_dict))
        return known
