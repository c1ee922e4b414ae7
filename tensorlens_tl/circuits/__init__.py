"""Edges that make a behaviour: found, kept in files, proved in the real model.

Key concepts:
    Circuit: Edges with scores, and the model they are of.
    Faithfulness: What the real model does with every other edge ablated.
    discover: The search for a circuit over many prompts.
"""

from .ablation import faithfulness, faithfulness_curve, faithfulness_of_many
from .circuit import Circuit, find, named
from .discovery import discover
from .edge_averages import edge_scores
from .edge_baselines import score_edges
from .faithfulness_result import Faithfulness, FaithfulnessCurve
from .model_id import ModelInfo
from .subgraph import Subgraph

__all__ = [
    "Circuit",
    "Faithfulness",
    "FaithfulnessCurve",
    "ModelInfo",
    "Subgraph",
    "discover",
    "edge_scores",
    "faithfulness",
    "faithfulness_curve",
    "faithfulness_of_many",
    "find",
    "named",
    "score_edges",
]
