"""Names of nodes, edges and residual sites. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..checks import is_int, spelled

FINAL_SITE = "unembed.hook_in"
"""Site of the final normalized residual, which the unembedding reads."""

SPECIAL_ROWS = {"cls_token": "[CLS]", "distillation_token": "[DIST]"}
"""Sources that stand before the patches of a picture, and the names of their rows."""

CONTENTS = ("embed", *SPECIAL_ROWS, "patch", "inputs_embeds", "soft_prompt")
"""Sources that are what stands at a position: a token, a patch of a picture, or what the user gave
in place of both (``inputs_embeds=``, ``start_at_layer=0``) or before a prompt's tokens."""

SOURCES = (*CONTENTS, "pos_embed", "type_embed")
"""Sources of what enters the first block, besides constants. A node of such a source has its name.
What stands at a position comes first, then what is added to it there."""

EMBED_NORM_BIAS = "embed_ln.b"
"""The bias of a norm after the embeddings, which is a constant that enters the first block, too."""

_NODE = re.compile(
    r"L(\d+)(?:H(\d+)(?:\.([qkv]))?|(MLP)|E(\d+|\.shared)|(?:E(\d+|\.shared))?N(\d+)|\.(.+))?"
)
_OF_DICTIONARY = re.compile(r"L(\d+)\.(\w+?)(?:F(\d+)|\.(error|skip|past))")
_NUMBERED = {"dim": "dimension", "order ": "order"}
_CHANGES = ("operator change", "readout change")
_HEAD = ("mlm_head.b", "mlm_head.ln.b", "classifier.ln.b")


def resid_site(layer: int, where: str) -> str:
    """Name a residual site as TransformerLens does.

    Args:
        layer: Number of the block, from 0.
        where: "pre", "mid" or "post": before the block, after attention, after the block.

    Returns:
        The name of the site.

    >>> resid_site(2, "pre")
    'blocks.2.hook_resid_pre'
    """
    return f"blocks.{layer}.hook_resid_{where}"


def layer_site(layer: int, point: str) -> str:
    """Name a hook point of a block.

    Args:
        layer: Number of the block, from 0.
        point: Name of the point inside the block.

    Returns:
        The name of the point in the model.

    >>> layer_site(2, "attn.hook_z")
    'blocks.2.attn.hook_z'
    """
    return f"blocks.{layer}.{point}"


def site_parts(site: str) -> tuple[int, str]:
    """Split the name that :func:`resid_site` gives into the block and the place.

    Args:
        site: Name of a residual site.

    Returns:
        Number of the block, from 0, and "pre", "mid" or "post". For any other text −1 and "".

    >>> site_parts("blocks.2.hook_resid_pre")
    (2, 'pre')
    """
    start, _, where = site.partition(".hook_resid_")
    layer = start.removeprefix("blocks.")
    named = layer.isdecimal() and resid_site(int(layer), where) == site
    return (int(layer), where) if named else (-1, "")


def numbered_site(site: str | int, n_layers: int, where: str) -> str | int:
    """Name a site that was given by the number of its block.

    Args:
        site: Number of the block, negative ones from the end, or anything else.
        n_layers: Number of blocks.
        where: "pre" for what the block reads, "post" for what it leaves.

    Returns:
        The name of the site; ``site`` itself where it is not the number of a block.

    >>> numbered_site(-1, 12, "post")
    'blocks.11.hook_resid_post'
    """
    if is_int(site) and -n_layers <= site < n_layers:
        return resid_site(int(site) % n_layers, where)
    return site


@spelled
@dataclass(frozen=True)
class Node:
    """A place that writes to the residual stream, or reads from it.

    Attributes:
        kind: A source of the first residual (one of ``SOURCES``, such as "embed" and "pos_embed"),
            "input" (the sum of all sources, which enters the first block), "head", "mlp", "expert",
            "neuron", "constant" or "logits". Rows of an attribution can also be a "layer",
            "dimension", "order" or "change"; a "feature" of an SAE, the "error" that it leaves, the
            "skip" connection of a transcoder, or what goes "past" the sublayer that an SAE reads;
            the "rest", all features that a graph leaves out.
        layer: Number of the block, from 0, or None outside the blocks.
        index: Number of the head, the expert, the neuron, the feature, the dimension of the
            residual, or the order. None for the shared expert of a mixture, which every token
            passes.
        name: Name of a constant, such as "b_O" or "ln_final.b". For a reader, the input of the head
            that is read, "v", "q" or "k". Empty for the head as a writer. For the shared expert it
            is "shared", and for a neuron of an expert that expert, such as "E2". For a feature and
            an error it is the place that the SAE gives back: "pre" for a block's input, "mlp_out"
            for what the MLP writes.

    Example:
        >>> from tensorlens_tl import Node
        >>> Node("head", layer=3, index=7)
        Node(kind='head', layer=3, index=7, name='')
        >>> str(Node("head", layer=3, index=7))
        'L3H7'
        >>> Node.parse("L3MLP").kind
        'mlp'
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
            case "expert":
                return f"{prefix}E{self.index}" if self.index is not None else f"{prefix}E.shared"
            case "neuron":
                return f"{prefix}{self.name}N{self.index}"
            case "constant":
                return f"{prefix}.{self.name}" if prefix else self.name
            case "feature":
                return f"{prefix}.{self.name}F{self.index}"
            case "error" | "skip" | "past":
                return f"{prefix}.{self.name}.{self.kind}"
            case "layer":
                return prefix
            case "dimension":
                return f"dim{self.index}"
            case "order":
                return f"order {self.index}"
            case "change":
                return self.name
        return self.kind

    @property
    def enters(self) -> bool:
        """Whether it is one of the sources that sum to "input"."""
        return self.kind in SOURCES or self.name == EMBED_NORM_BIAS

    @classmethod
    def parse(cls, text: str) -> Node:
        """Read the name of a node.

        Args:
            text: A source such as "embed" or "patch", "input", "logits", a head "L3H7" or its input
                "L3H7.v", an MLP "L3MLP", an expert "L3E2" or "L3E.shared", a neuron "L3N512" or
                "L3E2N17", a constant "L3.b_O", or a row of an attribution: "L3" (a layer), "dim5"
                or "order 2".

        Returns:
            The node of this name.

        Raises:
            ValueError: If no node has this name.

        >>> Node.parse("L3H7")
        Node(kind='head', layer=3, index=7, name='')
        """
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is not a node. Pass a name such as 'L3H7' or 'embed'.")
        if text in (*SOURCES, "input", "logits", "rest"):
            return cls(text)
        if text in ("b_U", "ln_final.b", "softmax", "constants", EMBED_NORM_BIAS) or (
            text.endswith(("[user]", "[sae]")) and text[0] != "L"
        ):
            return cls("constant", name=text)
        if text in _HEAD:
            return cls("constant", name=text)
        if text in _CHANGES:
            return cls("change", name=text)
        for start, kind in _NUMBERED.items():
            if text.startswith(start) and text.removeprefix(start).isdecimal():
                return cls(kind, index=int(text.removeprefix(start)))
        if found := _OF_DICTIONARY.fullmatch(text):
            layer, place, index, kind = found.groups()
            if index is None:
                return cls(kind, int(layer), name=place)
            return cls("feature", int(layer), int(index), place)
        if not (found := _NODE.fullmatch(text)):
            raise ValueError(
                f"{text!r} is not a node. Name 'embed', 'pos_embed', 'input', 'logits', a head "
                "'L3H7' or its input 'L3H7.v', an MLP 'L3MLP', an expert 'L3E2', a neuron 'L3N512' "
                "or a constant 'L3.b_O'."
            )
        layer, head, reads, mlp, expert, of_expert, neuron, constant = found.groups()
        if head is not None:
            return cls("head", int(layer), int(head), reads or "")
        if mlp is not None:
            return cls("mlp", int(layer))
        if expert is not None:
            if expert == ".shared":
                return cls("expert", int(layer), name="shared")
            return cls("expert", int(layer), int(expert))
        if neuron is not None:
            name = "" if of_expert is None else f"E{of_expert}"
            return cls("neuron", int(layer), int(neuron), name)
        if constant is not None:
            return cls("constant", int(layer), name=constant)
        return cls("layer", int(layer))


FEATURE_SITES = ("pre", "z", "attn_out", "mid", "mlp_out", "post")
"""Names of the sites within a block at which features stand, in the order of the run."""


def feature_site(node: Any) -> str | None:
    """The site whose SAE or transcoder a node is of.

    Args:
        node: A node, or anything else that a row may have.

    Returns:
        The block and the site, such as "L2.pre", of a feature, of what stands beside the features,
        and of the dictionary's constants; None for any other row.
    """
    if not isinstance(node, Node) or node.kind not in _OF_SAES:
        return None
    site = node.name.partition(".")[0]
    return f"L{node.layer}.{site}" if site in FEATURE_SITES else None


_OF_SAES = ("feature", "error", "skip", "past", "constant")


@spelled
@dataclass(frozen=True)
class Edge:
    """A direct connection along the residual stream, from a writer to a reader.

    Attributes:
        src: The writer: embeddings, a head, an MLP, an expert or a constant.
        dest: The reader: the value, query or key input of a head ("L2H1.v"), an MLP, an expert, or
            the logits.

    Example:
        >>> from tensorlens_tl import Edge
        >>> edge = Edge.parse("L0H3->L2H1.k")
        >>> print(edge)
        L0H3→L2H1.k
        >>> edge.dest.name, edge.conserved
        ('k', False)
    """

    src: Node
    dest: Node

    def __str__(self) -> str:
        return f"{self.src}→{self.dest}"

    @property
    def conserved(self) -> bool:
        """Whether the edge is part of a sum that gives the target.

        Scores of edges into queries and keys are first-order estimates, and part of no sum.
        """
        return self.dest.name not in ("q", "k")

    @classmethod
    def parse(cls, text: str) -> Edge:
        """Read the name of an edge.

        Args:
            text: A writer and a reader, such as "L0H3→L2H1.v" or "L0H3->L2H1.v".

        Returns:
            The edge of this name.

        Raises:
            ValueError: If no edge has this name.

        >>> str(Edge.parse("L0H3->L2H1.v"))
        'L0H3→L2H1.v'
        """
        src, arrow, dest = str(text).replace("->", "→").partition("→")
        if not arrow:
            raise ValueError(f"{text!r} is not an edge. Name both ends, such as 'L0H3→L2H1.v'.")
        edge = cls(Node.parse(src.strip()), Node.parse(dest.strip()))
        reads = edge.dest.kind in ("mlp", "expert", "logits")
        reads = reads or (edge.dest.kind == "head" and edge.dest.name)
        if not reads or edge.src.kind == "logits" or (edge.src.kind == "head" and edge.src.name):
            raise ValueError(
                f"{text!r} is not an edge. Name a writer ('embed', 'L0H3', 'L0MLP', 'L0.b_O') "
                "and a reader ('L2H1.v', 'L2MLP', 'logits')."
            )
        return edge
