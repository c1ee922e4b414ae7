"""Names of the computational graph: nodes, and sites of the residual stream. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

FINAL_SITE = "unembed.hook_in"
"""The final normalized residual: what the unembedding reads."""

_NODE = re.compile(r"L(\d+)(?:H(\d+)(?:\.([qkv]))?|(MLP)|N(\d+)|\.(.+))?")
_NUMBERED = {"dim": "dimension", "order ": "order"}
_CHANGES = ("operator change", "readout change")


def resid_site(layer: int, where: str) -> str:
    """TransformerLens's name of a residual site.

    Args:
        layer: Block, from 0.
        where: "pre", "mid" or "post".

    Returns:
        The name.

    >>> resid_site(2, "pre")
    'blocks.2.hook_resid_pre'
    """
    return f"blocks.{layer}.hook_resid_{where}"


def site_parts(site: str) -> tuple[int, str]:
    """Split the name that :func:`resid_site` gives into the block and the place.

    Args:
        site: Name of a residual site.

    Returns:
        The block, from 0, and "pre", "mid" or "post". For any other text −1 and "".

    >>> site_parts("blocks.2.hook_resid_pre")
    (2, 'pre')
    """
    start, _, where = site.partition(".hook_resid_")
    layer = start.removeprefix("blocks.")
    named = layer.isdecimal() and resid_site(int(layer), where) == site
    return (int(layer), where) if named else (-1, "")


@dataclass(frozen=True)
class Node:
    """Something that writes to the residual stream, or reads from it.

    Attributes:
        kind: "embed", "pos_embed", "input" (both: all that enters the first block), "head", "mlp",
            "neuron", "constant" or "logits"; as rows of a
            split also "layer", "dimension", "order" and "change".
        layer: Block, from 0; None outside the blocks.
        index: Head, neuron, dimension of the residual, or order.
        name: A constant's own name, such as "b_O" or "ln_final.b"; which input of a head is read,
            "v", "q" or "k"; empty for what a head writes.
    """

    kind: str
    layer: int | None = None
    index: int | None = None
    name: str = ""

    def __str__(self) -> str:
        prefix = "" if self.layer is None else f"L{self.layer}"
        match self.kind:
            case "head":
                return f"{prefix}H{self.index}" + (f".{self.name}" if self.name else "")
            case "mlp":
                return f"{prefix}MLP"
            case "neuron":
                return f"{prefix}N{self.index}"
            case "constant":
                return f"{prefix}.{self.name}" if prefix else self.name
            case "layer":
                return prefix
            case "dimension":
                return f"dim{self.index}"
            case "order":
                return f"order {self.index}"
            case "change":
                return self.name
        return self.kind

    @classmethod
    def parse(cls, text: str) -> Node:
        """Read a node's name: "embed", "pos_embed", "input", "logits", "L3H7", "L3MLP", "L3N512", "L3.b_O".

        Also a head's input, "L3H7.v", and the rows "L3" (a layer), "dim5" and "order 2".

        Returns:
            The node.

        Raises:
            ValueError: If the text is no node's name.

        >>> Node.parse("L3H7")
        Node(kind='head', layer=3, index=7, name='')
        """
        if text in ("embed", "pos_embed", "input", "logits"):
            return cls(text)
        if text in ("b_U", "ln_final.b") or (text.endswith("[user]") and text[0] != "L"):
            return cls("constant", name=text)
        if text in _CHANGES:
            return cls("change", name=text)
        for start, kind in _NUMBERED.items():
            if text.startswith(start) and text.removeprefix(start).isdecimal():
                return cls(kind, index=int(text.removeprefix(start)))
        if not (found := _NODE.fullmatch(text)):
            raise ValueError(
                f"{text!r} is no node; expected 'embed', 'pos_embed', 'input', 'logits', a head 'L3H7' or "
                "its input 'L3H7.v', an MLP 'L3MLP', a neuron 'L3N512' or a constant 'L3.b_O'"
            )
        layer, head, reads, mlp, neuron, constant = found.groups()
        if head is not None:
            return cls("head", int(layer), int(head), reads or "")
        if mlp is not None:
            return cls("mlp", int(layer))
        if neuron is not None:
            return cls("neuron", int(layer), int(neuron))
        if constant is not None:
            return cls("constant", int(layer), name=constant)
        return cls("layer", int(layer))


@dataclass(frozen=True)
class Edge:
    """From what one node writes to what another reads, straight along the residual stream.

    Attributes:
        src: A writer: embeddings, a head, an MLP, a constant.
        dest: A reader: a head's value, query or key input ("L2H1.v"), an MLP, or "logits".
    """

    src: Node
    dest: Node

    def __str__(self) -> str:
        return f"{self.src}→{self.dest}"

    @property
    def conserved(self) -> bool:
        """Whether it is in a sum: what a query or key reads is first-order and in none."""
        return self.dest.name not in ("q", "k")

    @classmethod
    def parse(cls, text: str) -> Edge:
        """Read an edge's name, "L0H3→L2H1.v"; "->" does as well as the arrow.

        Returns:
            The edge.

        Raises:
            ValueError: If the text is no edge's name.

        >>> str(Edge.parse("L0H3->L2H1.v"))
        'L0H3→L2H1.v'
        """
        src, arrow, dest = text.replace("->", "→").partition("→")
        if not arrow:
            raise ValueError(f"{text!r} is no edge; expected a writer and a reader, 'L0H3→L2H1.v'")
        edge = cls(Node.parse(src.strip()), Node.parse(dest.strip()))
        reads = edge.dest.kind in ("mlp", "logits") or (edge.dest.kind == "head" and edge.dest.name)
        if not reads or edge.src.kind == "logits" or (edge.src.kind == "head" and edge.src.name):
            raise ValueError(
                f"{text!r} is no edge; expected a writer ('embed', 'L0H3', 'L0MLP', 'L0.b_O') and a reader "
                "('L2H1.v', 'L2MLP', 'logits')"
            )
        return edge
