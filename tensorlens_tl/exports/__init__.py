"""A run in the forms that other tools read: attribution graphs, HeadVis, CircuitsVis.

Key concepts:
    AttributionGraph: Tokens, heads, MLPs, experts and constants at positions, and their edges.
    save_headvis: The attention patterns of many prompts, as the HeadVis page reads them.
    circuitsvis_arguments: The arguments of every function of CircuitsVis, made from a run.
"""

from .attribution_graph import AttributionGraph, cumulative
from .circuitsvis import circuitsvis_arguments
from .headvis import save_headvis
from .placed_graph import Answer, GraphLink, GraphNode, PlacedGraph
from .position_edges import find_graph

__all__ = [
    "Answer",
    "AttributionGraph",
    "GraphLink",
    "GraphNode",
    "PlacedGraph",
    "circuitsvis_arguments",
    "cumulative",
    "find_graph",
    "save_headvis",
]
