"""Names of the computational graph: nodes, and sites of the residual stream. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

FINAL_SITE = "unembed.hook_in"
"""The final normalized residual: what the unembedding reads."""

_NODE = re.compile(r"L(\d+)(?:H(\d+)|(MLP)|N(\d+)|\.(.+))")


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


@dataclass(frozen=True)
class Node:
    """Something that writes to the residual stream, or reads from it.

    Attributes:
        kind: "embed", "pos_embed", "head", "mlp", "neuron", "constant" or "logits".
        layer: Block, from 0; None outside the blocks.
        index: Head or neuron.
        name: A constant's own name, such as "b_O" or "ln_final.b".
    """

    kind: str
    layer: int | None = None
    index: int | None = None
    name: str = ""

    def __str__(self) -> str:
        prefix = "" if self.layer is None else f"L{self.layer}"
        match self.kind:
            case "head":
                return f"{prefix}H{self.index}"
            case "mlp":
                return f"{prefix}MLP"
            case "neuron":
                return f"{prefix}N{self.index}"
            case "constant":
                return f"{prefix}.{self.name}" if prefix else self.name
        return self.kind

    @classmethod
    def parse(cls, text: str) -> Node:
        """Read a node's name: "embed", "pos_embed", "logits", "L3H7", "L3MLP", "L3N512", "L3.b_O", "ln_final.b".

        Returns:
            The node.

        Raises:
            ValueError: If the text is no node's name.

        >>> Node.parse("L3H7")
        Node(kind='head', layer=3, index=7, name='')
        """
        if text in ("embed", "pos_embed", "logits"):
            return cls(text)
        if text in ("b_U", "ln_final.b"):
            return cls("constant", name=text)
        if not (found := _NODE.fullmatch(text)):
            raise ValueError(
                f"{text!r} is no node; expected 'embed', 'pos_embed', 'logits', a head 'L3H7', an MLP 'L3MLP', "
                "a neuron 'L3N512' or a constant 'L3.b_O'"
            )
        layer, head, mlp, neuron, constant = found.groups()
        if head is not None:
            return cls("head", int(layer), int(head))
        if mlp is not None:
            return cls("mlp", int(layer))
        if neuron is not None:
            return cls("neuron", int(layer), int(neuron))
        return cls("constant", int(layer), name=constant)
