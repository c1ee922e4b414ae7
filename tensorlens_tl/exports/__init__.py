"""A run in the forms that other tools read: attribution graphs, HeadVis, CircuitsVis.

Key concepts:
    AttributionGraph: Tokens, heads, MLPs, experts and constants at positions, and their edges.
    save_headvis: The attention patterns of many prompts, as the HeadVis page reads them.
    circuitsvis_arguments: The arguments of every function of CircuitsVis, made from a run.
"""

from .attribution_graph import AttributionGraph, GraphLink, GraphNode
from .circuitsvis import circuitsvis_arguments
from .headvis import save_headvis
from .position_edges import find_graph

__all__ = [
    "AttributionGraph",
    "GraphLink",
    "GraphNode",
    "circuitsvis_arguments",
    "find_graph",
    "save_headvis",
]
