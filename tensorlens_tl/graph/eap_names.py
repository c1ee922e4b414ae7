"""Names of nodes and edges in EAP-IG and MIB."""

from __future__ import annotations

import re

from .nodes import Edge, Node

_EAP = re.compile(r"input|logits|a(\d+)\.h(\d+)(?:<([qkv])>)?|m(\d+)(?:\.(e\d+|shared))?")
WRONG = "{!r} is not the name of an edge. Use names such as 'a0.h1->a1.h2<q>'."


def eap_name(node: Node | Edge) -> str:
    """Name a node or edge as the files of EAP-IG and MIB do: "a0.h1", "m0", "a0.h1->a1.h2<q>".

    Those know no experts. Here an expert is "m0.e2", and a shared expert "m0.shared".

    Args:
        node: The node or edge.

    Returns:
        The name of the node, or both names with an arrow for an edge.
    """
    if isinstance(node, Edge):
        return f"{eap_name(node.src)}->{eap_name(node.dest)}"
    if node.kind == "head":
        return f"a{node.layer}.h{node.index}" + (f"<{node.name}>" if node.name else "")
    if node.kind == "expert":
        return f"m{node.layer}." + (node.name if node.index is None else f"e{node.index}")
    return f"m{node.layer}" if node.kind == "mlp" else str(node)


def parse_eap(text: str) -> Edge:
    """Read the name of an edge in the files of EAP-IG and MIB.

    Returns:
        The edge of that name.

    Raises:
        ValueError: If the text is not the name of an edge.

    >>> str(parse_eap("a0.h1->a1.h2<q>"))
    'L0H1→L1H2.q'
    """
    ends = []
    for part in text.split("->"):
        if not (found := _EAP.fullmatch(part)):
            raise ValueError(WRONG.format(text))
        layer, head, name, mlp, expert = found.groups()
        if head is not None:
            ends.append(Node("head", int(layer), int(head), name or ""))
        elif expert is not None:
            shared = expert == "shared"
            index = None if shared else int(expert.removeprefix("e"))
            ends.append(Node("expert", int(mlp), index, "shared" if shared else ""))
        else:
            ends.append(Node(part) if mlp is None else Node("mlp", int(mlp)))
    if len(ends) != 2 or ends[0].name not in ("", "shared"):
        raise ValueError(WRONG.format(text))
    return Edge(*ends)
