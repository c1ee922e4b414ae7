"""A model as a graph: names of nodes, edges and sites, the edges that exist, the edges to keep.

Key concepts:
    Node: A writer to the residual stream, or a reader of it: "embed", "L0H3", "L3MLP", "logits".
    Edge: What one node writes and another reads: "L0H1→L2H3.v".
    Wiring: The edges that a model has, in the order of the run.

No torch in this room.
"""

from .eap_names import eap_name, parse_eap
from .nodes import (
    CONTENTS,
    EMBED_NORM_BIAS,
    FEATURE_SITES,
    FINAL_SITE,
    SOURCES,
    SPECIAL_ROWS,
    Edge,
    Node,
    feature_site,
    layer_site,
    numbered_site,
    resid_site,
    site_parts,
)
from .selection import connected, limits, select, shared_out
from .table_rows import at_sites, rows_that_fit
from .wiring import INPUT, LOGITS, Wiring, as_edges, owner

__all__ = [
    "CONTENTS",
    "EMBED_NORM_BIAS",
    "Edge",
    "FEATURE_SITES",
    "FINAL_SITE",
    "INPUT",
    "LOGITS",
    "Node",
    "SOURCES",
    "SPECIAL_ROWS",
    "Wiring",
    "as_edges",
    "at_sites",
    "connected",
    "eap_name",
    "feature_site",
    "layer_site",
    "limits",
    "numbered_site",
    "owner",
    "parse_eap",
    "resid_site",
    "rows_that_fit",
    "select",
    "shared_out",
    "site_parts",
]
