"""Find the rows of a table of nodes and edges by what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .nodes import Edge, Node, feature_site


def rows_that_fit(nodes: Sequence[Node | Edge], by: str, wanted: Mapping[str, Any]) -> list[int]:
    """The numbers of the rows that fit what ``select`` was given; refuse what nothing fits."""
    wanted = {name: value for name, value in wanted.items() if value is not None}
    edges = any(isinstance(node, Edge) for node in nodes)
    if not edges and wanted.keys() & {"src", "dest"}:
        raise ValueError(
            f"src= and dest= need a split by edge, but this one is by {by}. Call "
            "attribute(by='edge'), or select by kind= and layer=."
        )
    keep = list(range(len(nodes)))
    for name, value in wanted.items():
        has = [_property(node, name) for node in nodes]
        if name in ("src", "dest"):
            value = str(Node.parse(value) if isinstance(value, str) else value)
        if value not in has:
            raise ValueError(_nothing_has(name, value, list(dict.fromkeys(has))))
        keep = [i for i in keep if has[i] == value]
    if not keep:
        given = ", ".join(f"{name}={str(value)!r}" for name, value in wanted.items())
        raise ValueError(f"No row has {given} together. Drop one of them.")
    return keep


def _property(node: Node | Edge, name: str) -> Any:
    """What :meth:`Attribution.select` asks of a row. An edge has its writer's kind and layer."""
    if name in ("src", "dest"):
        return str(getattr(node, name)) if isinstance(node, Edge) else None
    return getattr(node.src if isinstance(node, Edge) else node, name)


def _nothing_has(name: str, value: Any, there: list[Any]) -> str:
    names = [str(one) for one in there if one is not None]
    # A head is named where one of its inputs is meant.
    near = [one for one in names if one.startswith(f"{value}.")] if name == "dest" else []
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Use one of {', '.join(names)}."
    return f"No {'edge' if name in ('src', 'dest') else 'row'} has {name} {value}. {hint}"


def at_sites(sources: Sequence[Any]) -> dict[str, list[int]]:
    """The rows that make up what stands at the sites of SAEs and transcoders.

    Args:
        sources: Sources of a split by feature, or of any other; each has a node and a position.

    Returns:
        Numbers of rows by site: features, what the dictionary adds everywhere, and errors. What
        goes past a sublayer, and constants after the site, are not among them.
    """
    found: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        site = feature_site(source.node)
        if site and source.pos is not None and getattr(source.node, "kind", "") != "past":
            found.setdefault(site, []).append(i)
    return found
